import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.analysis import SignalPropagation, plot_signal_propagation, signal_propagation


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype(np.float32)


class SignalPropagationTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_numpy_on_stages_of_different_size(self):
        blocks = [random((4, 6, 6, 3)), random((4, 3, 3, 5), 1)]
        branches = [random((4, 6, 6, 3), 2), random((4, 3, 3, 5), 3)]
        ours = self.variant(signal_propagation)(blocks, branches)
        for i, (x, f) in enumerate(zip(blocks, branches)):
            channels = x.astype(np.float64).reshape(-1, x.shape[-1])
            squared_mean = (channels.mean(0) ** 2).mean()
            np.testing.assert_allclose(ours[0][i], squared_mean, rtol=1e-5)
            np.testing.assert_allclose(ours[1][i], channels.var(0).mean(), rtol=1e-5)
            expected = f.astype(np.float64).reshape(-1, f.shape[-1]).var(0).mean()
            np.testing.assert_allclose(ours.residual_variance[i], expected, rtol=1e-5)

    def test_channels_first_and_a_sharded_batch(self):
        blocks, branches = [random((8, 4, 4, 3))], [random((8, 4, 4, 3), 1)]
        expected = signal_propagation(blocks, branches)
        first = [[np.moveaxis(x, -1, 1) for x in arrays] for arrays in (blocks, branches)]
        chex.assert_trees_all_close(signal_propagation(*first, channel_axis=1), expected, rtol=1e-5)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = jax.jit(signal_propagation)(*jax.device_put((blocks, branches), sharding))
        chex.assert_trees_all_close(ours, expected, rtol=1e-5)

    def test_the_mean_of_activations_grows_where_branches_are_not_normalised(self):
        """A ReLU network at He initialisation: the first sign the plots are made for. Divided by
        the expected deviation of its stream, with centred weights, it keeps both in bounds."""
        depth, width = 16, 128
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(depth, width, width)) / width**0.5

        def run(centred):
            x, blocks, branches = rng.normal(size=(256, width)), [], []
            for i, weight in enumerate(weights):
                if centred:
                    weight = weight - weight.mean(0)
                    gain = np.sqrt(2 / (1 - 1 / np.pi)) * 0.2 / np.sqrt(1 + 0.04 * i)
                else:
                    gain = np.sqrt(2)
                branches.append(np.float32(gain * np.maximum(x, 0) @ weight))
                x = x + branches[-1]
                blocks.append(np.float32(x))
            return signal_propagation(blocks, branches)

        plain, free = run(False), run(True)
        assert plain.average_channel_variance[-1] > 1e3
        assert plain.average_channel_squared_mean[-1] > 1e3
        np.testing.assert_allclose(
            free.average_channel_variance, 1 + 0.04 * np.arange(1, depth + 1), rtol=0.15
        )
        assert np.max(free.average_channel_squared_mean) < 0.1
        np.testing.assert_allclose(free.residual_variance, 0.04, rtol=0.25)

    def test_edges_and_bad_input(self):
        half = [jnp.asarray(300 * random((8, 4)), jnp.float16)]
        ours = signal_propagation(half, half)
        assert ours.average_channel_variance.dtype == jnp.float32
        assert np.all(np.isfinite(ours.average_channel_variance))
        one = signal_propagation([random((1, 4))], [np.zeros((1, 4), np.float32)])
        assert (one.average_channel_variance[0], one.residual_variance[0]) == (0, 0)
        with pytest.raises(ValueError, match="must be of the same blocks, at least one; got 0"):
            signal_propagation([], [])
        with pytest.raises(ValueError, match="got 1 and 0"):
            signal_propagation(half, [])
        with pytest.raises(ValueError, match=r"channel_axis of block_outputs\[0\] must name axes"):
            signal_propagation(half, half, channel_axis=2)
        with pytest.raises(TypeError, match=r"branch_outputs\[0\] must have a floating-point type"):
            signal_propagation(half, [np.ones((8, 4), int)])


class TestPlotSignalPropagation:
    def test_draws_each_signal_in_a_panel(self):
        curves = {
            "plain": SignalPropagation(*np.geomspace(1, 1e6, 12).reshape(3, 4)),
            "free": SignalPropagation(np.zeros(4), np.ones(4), np.ones(4)),
        }
        axes = plot_signal_propagation(curves)
        for panel, field in zip(axes, SignalPropagation._fields, strict=True):
            for line, signal in zip(panel.get_lines(), curves.values(), strict=True):
                np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
                np.testing.assert_array_equal(line.get_ydata(), getattr(signal, field))
        assert [panel.get_yscale() for panel in axes] == ["linear", "log", "log"]
        assert list(plot_signal_propagation(curves, ax=axes)) == list(axes)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="curves must hold at least one network"):
            plot_signal_propagation({})
        signal = SignalPropagation(np.zeros(4), np.ones(4), np.ones(4))
        axes = plot_signal_propagation({"free": signal})
        with pytest.raises(ValueError, match="ax must be three axes, got 2"):
            plot_signal_propagation({"free": signal}, ax=axes[:2])
