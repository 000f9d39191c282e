from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, PartitionSpec

from jaxref.data.loss_reweighting import loss_based_weights, reweighted_mean, temperature_schedule

STRATEGIES = {
    "linupper": lambda h, delta: np.minimum(h + delta, delta),
    "upper": lambda h, delta: (h + delta) / 2,
    "quadratic": lambda h, delta: 1 - h**2 / delta**2,
    "extremes": lambda h, delta: np.abs(h),
    "uniform": lambda h, delta: 0 * h,
}
LOSSES = np.random.default_rng(0).gamma(2.0, size=24).astype("f")
WHERE = np.arange(24) % 5 != 2


@partial(jax.jit, static_argnames=("delta",))
def all_weights(losses, temperature, where=True, delta=1.0):
    return {
        name: loss_based_weights(
            losses, strategy=name, temperature=temperature, delta=delta, where=where
        )
        for name in STRATEGIES
    }


def scores(losses, name, delta=1.0):
    low, high = losses.min(), losses.max()
    return STRATEGIES[name](2 * delta * (losses - (low + high) / 2) / (high - low), delta)


class TestWeights:
    def test_match_the_formula(self):
        masked = np.where(WHERE, LOSSES, np.nan)
        for delta in (1.0, 2.5):
            for name, found in all_weights(masked, 0.4, WHERE, delta).items():
                expected = np.zeros(24)
                kept = np.float64(LOSSES[WHERE])
                expected[WHERE] = scipy.special.softmax(scores(kept, name, delta) / 0.4)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)

    def test_maximise_what_they_trade(self):
        """The mean score minus r times the divergence from uniform weights, on the simplex."""
        rng = np.random.default_rng(1)
        for name, found in all_weights(LOSSES, 0.4).items():
            f, best = scores(np.float64(LOSSES), name), np.float64(found)
            objective = lambda w: w @ f - 0.4 * np.sum(scipy.special.rel_entr(w, 1 / 24), axis=-1)
            others = rng.dirichlet(np.full(24, 5.0), size=200)
            near = 0.99 * best + 0.01 * others
            assert objective(best) > objective(others).max()
            assert objective(best) > objective(near).max() - 1e-6

    def test_do_not_change_with_scale_and_shift_and_are_even_when_hot(self):
        plain = all_weights(LOSSES, 0.4)
        for name, found in all_weights(100 + 7 * LOSSES, 0.4).items():
            np.testing.assert_allclose(found, plain[name], rtol=1e-3)
        for found in all_weights(LOSSES, 1e6).values():
            np.testing.assert_allclose(found, 1 / 24, rtol=1e-5)
        ordered = np.asarray(all_weights(np.sort(LOSSES), 0.4)["linupper"])
        assert np.all(np.diff(ordered) >= 0)
        middle = (LOSSES.min() + LOSSES.max()) / 2
        assert np.all(ordered[np.sort(LOSSES) >= middle] == ordered[-1])
        mirrored = all_weights(-LOSSES, 0.4)["quadratic"]
        np.testing.assert_allclose(mirrored, plain["quadratic"], rtol=1e-3)

    def test_edges(self):
        for losses in (np.full(24, 3.0), np.full(24, -1e4), np.full(24, 3e38)):
            for found in all_weights(losses.astype("f"), 0.4).values():
                np.testing.assert_allclose(found, 1 / 24, rtol=1e-6)
        for found in all_weights(LOSSES, 0.4, False).values():
            np.testing.assert_array_equal(found, 0)
        far = np.where(np.arange(24) == 3, 1e4, LOSSES).astype("f")
        for name, found in all_weights(far, 1e-4).items():
            assert np.isfinite(found).all()
            assert name not in ("linupper", "upper") or found[3] == 1
        half = all_weights(jnp.asarray(LOSSES, jnp.bfloat16), 0.4)["linupper"]
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(half), all_weights(LOSSES, 0.4)["linupper"], rtol=0.1)

    def test_bad_input(self):
        for options, message in (
            ({"strategy": "lower"}, "strategy must be one of"),
            ({"temperature": 0.0}, r"temperature must be in \(0, inf\), got 0.0"),
            ({"delta": 0.0}, "delta must be in"),
            ({"where": np.ones(3, bool)}, "where must broadcast"),
        ):
            with pytest.raises(ValueError, match=message):
                loss_based_weights(LOSSES, **options)
        with pytest.raises(TypeError, match="losses must have a floating-point type"):
            reweighted_mean(np.arange(3))


class TestMean:
    def test_weights_have_no_gradient(self):
        masked = np.where(WHERE, LOSSES, np.nan)
        value, slope = jax.jit(jax.value_and_grad(partial(reweighted_mean, where=WHERE)))(masked)
        weights = np.asarray(all_weights(LOSSES, 0.4, WHERE)["linupper"])
        np.testing.assert_allclose(slope, weights, rtol=1e-5)
        np.testing.assert_allclose(value, weights @ LOSSES, rtol=1e-5)
        assert reweighted_mean(masked, where=False) == 0

    def test_shards_have_the_weights_of_the_whole_batch(self):
        rows = PartitionSpec("data")
        where = WHERE & (np.arange(24) >= 3)  # a shard without examples

        def on_devices(losses):
            each = lambda x, where: (
                reweighted_mean(x, where=where, axis_name="data"),
                loss_based_weights(x, where=where, axis_name="data"),
            )
            return jax.shard_map(
                each,
                mesh=jax.make_mesh((8,), ("data",), (AxisType.Auto,)),
                in_specs=rows,
                out_specs=(PartitionSpec(), rows),
            )(losses, where)

        value, slope, weights = jax.jit(
            lambda x: (*jax.value_and_grad(lambda x: on_devices(x)[0])(x), on_devices(x)[1])
        )(LOSSES)
        expected = all_weights(LOSSES, 0.4, where)["linupper"]
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        np.testing.assert_allclose(slope, expected, rtol=1e-5)
        np.testing.assert_allclose(value, expected @ LOSSES, rtol=1e-5)

    @pytest.mark.claim("dynamic-loss-reweighting")
    def test_less_weight_for_low_losses_learns_from_redundant_data_in_fewer_steps(self):
        """Regression where four points come forty times each beside forty that come once: after as
        many steps, less weight for low losses has the least error on the law behind them, then the
        weights of the middle; more weight for both ends is worse than none."""

        def error(key, strategy):
            of_law, of_easy, of_rest, of_test, of_batches = jax.random.split(key, 5)
            law = jax.random.normal(of_law, (20,))
            easy, rest = (jax.random.normal(k, (n, 20)) for k, n in ((of_easy, 4), (of_rest, 40)))
            x = jnp.concatenate([jnp.repeat(easy, 40, axis=0), rest])
            picks = jax.random.randint(of_batches, (300, 32), 0, len(x))

            def step(weights, pick):
                def loss(weights):
                    losses = jnp.square(x[pick] @ (weights - law))
                    return reweighted_mean(losses, strategy=strategy)

                return weights - 0.01 * jax.grad(loss)(weights), None

            weights, _ = jax.lax.scan(step, jnp.zeros(20), picks)
            test = jax.random.normal(of_test, (200, 20))
            return jnp.mean(jnp.square(test @ (weights - law)))

        @jax.jit
        def errors(keys):
            return {
                name: jax.vmap(lambda key: error(key, name))(keys).mean()
                for name in ("linupper", "quadratic", "uniform", "extremes")
            }

        found = errors(jax.random.split(jax.random.key(0), 5))
        assert 2 * found["linupper"] < found["quadratic"]
        assert 1.5 * found["quadratic"] < found["uniform"]
        assert 1.1 * found["uniform"] < found["extremes"]


class TestSchedule:
    def test_high_then_along_a_line_or_at_once(self):
        steps = jnp.arange(8)
        line = temperature_schedule(100.0, 0.4, 2, 6)(steps)
        np.testing.assert_allclose(line, np.interp(np.arange(8), [2, 6], [100, 0.4]), rtol=1e-5)
        jump = jax.jit(temperature_schedule(100.0, 0.4, 3, 3))(steps)
        np.testing.assert_allclose(jump, [100, 100, 100, 0.4, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)
        for arguments, message in (
            ((0.0, 0.4, 1, 2), "initial must be in"),
            ((1.0, 0.4, 3, 2), r"total_steps must be in \[3, inf\), got 2"),
        ):
            with pytest.raises(ValueError, match=message):
                temperature_schedule(*arguments)
