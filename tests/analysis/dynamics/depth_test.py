import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.analysis import (
    DepthStatistics,
    hidden_state_statistics,
    layer_gradient_norms,
    layer_removal_drop,
    plot_depth_statistics,
    pre_ln_variance_growth,
)
from jaxref.parallel import make_mesh


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype(np.float32)


class TestPreLnVarianceGrowth:
    def test_matches_a_loop(self):
        variances = np.random.default_rng(0).uniform(0, 2, size=6)
        for scaling in (False, True):
            expected = [1.0]
            for number, variance in enumerate(variances, 1):
                expected.append(expected[-1] + variance / (number if scaling else 1))
            ours = pre_ln_variance_growth(6, variances, scaling=scaling)
            np.testing.assert_allclose(ours, expected)

    def test_is_linear_in_depth_and_with_scaling_logarithmic(self):
        assert pre_ln_variance_growth(64, 1.0)[-1] == 65
        scaled = pre_ln_variance_growth(64, 1.0, scaling=True)
        np.testing.assert_allclose(scaled[-1], 5.7439, atol=1e-4)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="depth must be in"):
            pre_ln_variance_growth(0, 1.0)
        with pytest.raises(ValueError, match=r"sublayer_variances must broadcast to shape \(3,\)"):
            pre_ln_variance_growth(3, [1.0, 2.0])
        with pytest.raises(ValueError, match="sublayer_variances must be in"):
            pre_ln_variance_growth(3, -1.0)


class HiddenStateStatisticsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(False, True)
    def test_matches_numpy(self, masked):
        states, gradients = random((3, 2, 5, 4)), random((3, 2, 5, 4), 1)
        exists = np.arange(5)[:, None] < np.array([[[3]], [[5]]]) if masked else None
        ours = self.variant(lambda x, g: hidden_state_statistics(x, gradients=g, where=exists))(
            states, gradients
        )
        keep = np.broadcast_to(True if exists is None else exists, states.shape[1:])
        for layer in range(3):
            x, size = states[layer][keep].astype(np.float64), np.abs(states[layer][keep])
            np.testing.assert_allclose(ours.variance[layer], x.var(), rtol=1e-5)
            np.testing.assert_allclose(ours.max_abs[layer], size.max(), rtol=1e-6)
            ratio = size.max() / np.median(size)
            np.testing.assert_allclose(ours.massive_ratio[layer], ratio, rtol=1e-5)
            norm = np.linalg.norm(gradients[layer][keep])
            np.testing.assert_allclose(ours.gradient_norm[layer], norm, rtol=1e-5)

    def test_a_sequence_is_a_stack_and_a_sharded_one_too(self):
        states = random((3, 8, 4))
        expected = hidden_state_statistics(states)
        assert expected.gradient_norm is None
        chex.assert_trees_all_close(hidden_state_statistics(list(states)), expected)
        sharding = NamedSharding(make_mesh({"data": 8}), P(None, "data"))
        ours = jax.jit(hidden_state_statistics)(jax.device_put(states, sharding))
        chex.assert_trees_all_close(ours, expected, rtol=1e-5)

    def test_edges(self):
        zero = hidden_state_statistics(np.zeros((1, 3, 4), np.float32))
        sparse = hidden_state_statistics(np.eye(4, dtype=np.float32)[None])
        nothing = hidden_state_statistics(random((1, 3, 4)), where=np.zeros((3, 4), bool))
        for statistics in (zero, nothing):
            assert [float(value[0]) for value in statistics[:3]] == [0, 0, 0]
        assert sparse.massive_ratio[0] == np.inf
        half = hidden_state_statistics(jnp.asarray(300 * random((2, 8, 4)), jnp.float16))
        assert half.variance.dtype == jnp.float32
        assert np.all(np.isfinite(half.variance))  # squares overflow float16

    def test_bad_input_is_named(self):
        states = random((2, 3, 4))
        with pytest.raises(ValueError, match="hidden_states must hold at least one layer"):
            hidden_state_statistics([])
        with pytest.raises(ValueError, match=r"hidden_states\[1\] must have shape \(3, 4\)"):
            hidden_state_statistics([states[0], states[1, :2]])
        with pytest.raises(TypeError, match=r"hidden_states\[0\] must have a floating-point type"):
            hidden_state_statistics(states.astype(int))
        with pytest.raises(ValueError, match="gradients must have shape"):
            hidden_state_statistics(states, gradients=states[:1])
        with pytest.raises(ValueError, match="where must broadcast"):
            hidden_state_statistics(states, where=np.ones((2, 3, 4), bool))
        with pytest.raises(ValueError, match="where must be None or a boolean"):
            hidden_state_statistics(states, where=np.ones((3, 4)))


class TestLayerGradientNorms:
    def test_sequence_and_stacked_layers_match_numpy(self):
        stacked = {"a": random((3, 4, 5)), "b": {"c": random((3, 2), 1)}}
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)]
        expected = [
            np.linalg.norm(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(layer)]))
            for layer in layers
        ]
        np.testing.assert_allclose(layer_gradient_norms(layers), expected, rtol=1e-6)
        ours = jax.jit(lambda g: layer_gradient_norms(g, layer_axis=0))(stacked)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        moved = jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, -1), stacked)
        np.testing.assert_allclose(layer_gradient_norms(moved, layer_axis=-1), expected, rtol=1e-6)

    def test_half_precision_and_zero(self):
        layers = [{"w": jnp.full(4, 300, jnp.float16)}, {"w": jnp.zeros(4, jnp.float16)}]
        np.testing.assert_allclose(layer_gradient_norms(layers), [600, 0])

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="grads must hold a gradient"):
            layer_gradient_norms([])
        with pytest.raises(ValueError, match="grads must hold at least one gradient"):
            layer_gradient_norms({}, layer_axis=0)
        with pytest.raises(ValueError, match=r"grads\['b'\] must have 2 layers, got 3"):
            layer_gradient_norms({"a": random((2, 4)), "b": random((3, 4))}, layer_axis=0)
        with pytest.raises(ValueError, match="layer_axis must name axes"):
            layer_gradient_norms({"a": random((2, 4))}, layer_axis=2)
        with pytest.raises(TypeError, match=r"grads\['a'\] must have a floating-point type"):
            layer_gradient_norms([{"a": np.ones(3, int)}])


class TestLayerRemovalDrop:
    def test_is_the_difference_of_losses_with_and_without_each_block(self):
        x, weights = random((6, 4)), random((3, 4, 4), 1) / 4

        def loss(weights, keep):
            y = x
            for i, weight in enumerate(weights):
                y = jnp.where(keep[i], y + jnp.tanh(y @ weight), y)
            return jnp.mean(jnp.square(y))

        ours = jax.jit(lambda w: layer_removal_drop(loss, w, 3))(weights)
        full = loss(weights, [True] * 3)
        expected = [loss(weights, [j != i for j in range(3)]) - full for i in range(3)]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        zeroed = weights * np.array([1, 0, 1])[:, None, None]  # a block that does nothing
        np.testing.assert_allclose(layer_removal_drop(loss, zeroed, 3)[1], 0, atol=1e-6)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="layers must be in"):
            layer_removal_drop(lambda params, keep: 0.0, None, 0)
        with pytest.raises(ValueError, match=r"the value of loss_fn must have shape \(\)"):
            layer_removal_drop(lambda params, keep: jnp.ones(2), None, 3)


class TestPlotDepthStatistics:
    def test_draws_a_line_of_variances_for_each_model(self):
        curves = {
            name: DepthStatistics(np.array(variance), np.ones(3), np.ones(3))
            for name, variance in (("pre", [1.0, 2.0, 3.0]), ("peri", [1.0, 1.5, 2.0]))
        }
        ax = plot_depth_statistics(curves)
        assert ax.get_yscale() == "log"
        for line, (name, statistics) in zip(ax.get_lines(), curves.items(), strict=True):
            assert line.get_label() == name
            np.testing.assert_array_equal(line.get_ydata(), statistics.variance)
        assert plot_depth_statistics(curves, ax=ax) is ax
        with pytest.raises(ValueError, match="curves must hold at least one model"):
            plot_depth_statistics({})
