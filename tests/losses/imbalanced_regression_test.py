from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy.stats import gaussian_kde

from jaxref import losses
from jaxref.data import stratified_batches

PEER = np.load(Path(__file__).parents[1] / "oracles" / "imbalanced_regression.npz")
WEIGHTS = {
    "involution": losses.involution_importance,
    "reciprocal": losses.reciprocal_importance,
    "linear": lambda p, alpha=None: losses.linear_importance(p),
    "cosine": losses.cosine_importance,
    "dense": losses.dense_loss_importance,
}
CASES = [name for name in PEER.files if name.partition("_")[0] in WEIGHTS]
involution = jax.jit(losses.decreasing_involution)
cisir = jax.jit(jax.value_and_grad(losses.cisir_loss))
correlation = jax.jit(jax.value_and_grad(losses.correlation_loss))


class TestNumbers:
    @pytest.mark.parametrize("queries", [None, np.linspace(-2, 3, 6).reshape(2, 3)])
    def test_density_matches_scipy(self, queries):
        labels = PEER["labels"] * 3 + 100
        expected = gaussian_kde(np.float64(labels), 0.3)
        q = None if queries is None else 3 * queries + 100
        ours = losses.label_density(labels, bandwidth=0.3, queries=q)
        theirs = expected(np.ravel(labels if q is None else q)).reshape(ours.shape)
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)

    @pytest.mark.parametrize("case", CASES)
    def test_weights_match_the_release(self, case):
        name, _, alpha = case.partition("_")
        density = losses.label_density(PEER["labels"])
        np.testing.assert_allclose(density, PEER["density"], rtol=1e-4)
        ours = WEIGHTS[name](density, alpha=float(alpha or 1))
        theirs = PEER[case] / PEER[case].mean()
        np.testing.assert_allclose(ours, theirs, rtol=3e-4, atol=3e-4)

    @pytest.mark.parametrize("case", ["plain", "weighted"])
    def test_correlation_matches_the_release(self, case):
        weights = None if case == "plain" else PEER["involution_2"]
        value, slope = correlation(PEER["predictions"], PEER["labels"], weights=weights)
        np.testing.assert_allclose(value, PEER[f"correlation_{case}"], rtol=1e-5)
        expected = PEER[f"correlation_{case}_gradient"]
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)

    def test_the_loss_is_the_sum_of_its_parts(self):
        p, y = PEER["predictions"], PEER["labels"]
        w, v = (WEIGHTS["involution"](PEER["density"].astype("f"), alpha=a) for a in (0.5, 2.0))
        ours = losses.cisir_loss(
            p, y, error_weights=w, correlation_weights=v, correlation_coefficient=3.3
        )
        expected = np.mean(w * (p - y) ** 2) + 3.3 * PEER["correlation_weighted"]
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("cisir")
    def test_rare_targets_are_learned(self):
        """An involution of the density; correlation that lines alone reach; batches that never miss
        the rare ones; and together a smaller error on these than squared error leaves."""
        x = np.linspace(0, 1, 41, dtype=np.float32)
        for alpha in (0.5, 1.0, 2.0):
            g = involution(x, alpha=alpha)
            np.testing.assert_allclose(involution(g, alpha=alpha), x, atol=1e-5)
            assert np.all(np.diff(g) < 0)
            assert (g[0], g[-1]) == (1, 0)
        np.testing.assert_allclose(involution(x, alpha=1.0), 1 - x, atol=1e-6)
        np.testing.assert_allclose(involution(x, alpha=500.0)[:-1], 1, atol=1e-4)

        p, y = PEER["predictions"], PEER["labels"]
        value = correlation(p, y)[0]
        np.testing.assert_allclose(value, 1 - np.corrcoef(p, y)[0, 1], rtol=1e-5)
        np.testing.assert_allclose(correlation(5 * p + 3, y)[0], value, rtol=1e-5)
        np.testing.assert_allclose(correlation(2 * y - 1, y)[0], 0, atol=1e-5)
        np.testing.assert_allclose(correlation(-2 * y, y)[0], 2, rtol=1e-5)

        rng = np.random.default_rng(0)
        x = np.where(np.arange(1000) < 990, rng.normal(0, 0.3, 1000), rng.uniform(2, 3, 1000))
        y = x**2 + 0.05 * rng.normal(size=1000)  # no line fits both parts
        x, y = jnp.stack([np.ones(1000), x], -1), jnp.array(y)
        batches = jax.jit(stratified_batches, static_argnums=1)(y, 100, key=jax.random.key(0))
        rank = np.argsort(np.argsort(y))[batches]
        np.testing.assert_array_equal(rank // 10, np.tile(np.arange(100), (10, 1)))
        uniform = rng.permutation(1000).reshape(10, 100)
        assert np.mean(np.any(uniform >= 990, axis=1)) < 0.9
        importance = lambda y: losses.involution_importance(losses.label_density(y), alpha=0.5)
        weights = jax.jit(importance)(y)

        @jax.jit
        def fit(batches, weights, coefficient):
            def step(line, batch):
                loss = lambda line: losses.cisir_loss(
                    x[batch] @ line,
                    y[batch],
                    error_weights=weights[batch],
                    correlation_coefficient=coefficient,
                )
                return line - 0.05 * jax.grad(loss)(line), None

            return jax.lax.scan(step, jnp.zeros(2), jnp.tile(batches, (20, 1)))[0]

        ours, plain = fit(batches, weights, 0.5), fit(uniform, jnp.ones(1000), 0.0)
        rare = np.arange(1000) >= 990
        error = lambda line: np.mean(np.abs(x @ line - y)[rare])
        assert error(ours) < 0.7 * error(plain)
        assert correlation(x @ ours, y)[0] < correlation(x @ plain, y)[0] + 1e-3


class TestSets:
    def test_eight_devices_see_the_whole_set(self):
        p, y = PEER["predictions"], PEER["labels"]
        w, where = PEER["involution_2"].astype("f"), np.arange(24) % 5 > 0

        def loss(p, y, w, where, axis_name=None):
            return losses.cisir_loss(
                p, y, error_weights=w, correlation_weights=w, where=where, axis_name=axis_name
            )

        sharded = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 4,
            out_specs=P(),
        )
        found, expected = (jax.jit(jax.value_and_grad(f))(p, y, w, where) for f in (sharded, loss))
        kept = loss(*(a[where] for a in (p, y, w)), None)
        np.testing.assert_allclose(expected[0], kept, rtol=1e-5)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)

    def test_missing_entries_may_hold_anything(self):
        p, y = PEER["predictions"], PEER["labels"]
        where = np.arange(24) < 20
        poisoned = np.where(where, p, np.nan)
        value, slope = cisir(poisoned, y, where=where)
        np.testing.assert_allclose(value, cisir(p[:20], y[:20])[0], rtol=1e-5)
        assert np.all(slope[20:] == 0)
        assert cisir(p, y, where=np.zeros(24, bool))[0] == 0

    @pytest.mark.parametrize("constant", [0.1, 0.0, 1e4, -1e4])
    def test_constant_predictions_have_loss_1_and_no_slope(self, constant):
        predictions = np.full(24, constant, "f")
        value, slope = correlation(predictions, PEER["labels"])
        assert value == 1
        assert np.all(slope == 0)
        value, slope = correlation(PEER["predictions"], np.full(24, constant, "f"))
        assert value == 1
        assert np.all(slope == 0)

    def test_half_precision_and_large_values(self):
        p, y = PEER["predictions"], PEER["labels"]
        half = jnp.asarray(p, jnp.bfloat16)
        ours, slope = cisir(half, y)
        assert (ours.dtype, slope.dtype) == (jnp.bfloat16, jnp.bfloat16)
        np.testing.assert_allclose(np.float32(ours), cisir(half.astype("f"), y)[0], rtol=4e-3)
        value, slope = correlation(1e15 * p, 1e15 * y)
        np.testing.assert_allclose(value, correlation(p, y)[0], rtol=1e-4)
        assert np.all(np.isfinite(slope))


class TestEdges:
    def test_equal_densities_weigh_alike(self):
        uneven = jnp.resize(jnp.array([1e4, 0.0, 1e-30], jnp.float16), 24)
        for name, weights in WEIGHTS.items():
            weights = partial(weights, alpha=1.0)
            np.testing.assert_allclose(weights(jnp.full(24, 2.0)), 1, rtol=1e-6, err_msg=name)
            ours = weights(uneven)
            assert ours.dtype == jnp.float16
            assert np.all(np.isfinite(ours)), name
        assert np.all(losses.linear_importance(jnp.zeros(24)) == 1)
        equal = losses.label_density(jnp.full(24, 7.0), bandwidth=0.5)
        np.testing.assert_allclose(equal, 2 / np.sqrt(2 * np.pi), rtol=1e-6)

    @pytest.mark.parametrize("alpha", [0.5, 2.0])
    def test_slopes_of_the_involution_are_finite(self, alpha):
        x = np.resize(np.array([0.0, 1e-30, 0.3, 1.0], "f"), 41)
        _, vjp = jax.vjp(lambda x: involution(x, alpha=alpha), x)
        slope = vjp(np.ones(41, "f"))[0]
        assert np.all(np.isfinite(slope))
        g = (1 - 0.3**alpha) ** (1 / alpha)
        np.testing.assert_allclose(slope[2], -((0.3 / g) ** (alpha - 1)), rtol=1e-5)

    def test_bad_input_is_named(self):
        p, y = PEER["predictions"], PEER["labels"]
        with pytest.raises(ValueError, match="alpha must be in"):
            losses.involution_importance(p**2, alpha=0.0)
        with pytest.raises(ValueError, match="density must be in"):
            losses.linear_importance(-(p**2))
        with pytest.raises(ValueError, match=r"x must be in \[0, 1\]"):
            losses.decreasing_involution(jnp.array([1.5]))
        with pytest.raises(ValueError, match="bandwidth must be in"):
            losses.label_density(y, bandwidth=0.0)
        with pytest.raises(ValueError, match=r"labels must have shape \[n\]"):
            losses.label_density(y[:1])
        for loss in (losses.correlation_loss, losses.cisir_loss):
            with pytest.raises(ValueError, match="predictions must have at least two entries"):
                loss(p[:1], y[:1])
            with pytest.raises(ValueError, match="targets must have shape"):
                loss(p, y[:3])
            with pytest.raises(TypeError, match="predictions must have a floating-point type"):
                loss(np.arange(24), y)
        with pytest.raises(ValueError, match="weights must broadcast"):
            losses.correlation_loss(p, y, weights=np.ones(3))
        with pytest.raises(ValueError, match="correlation_coefficient must be in"):
            losses.cisir_loss(p, y, correlation_coefficient=-1.0)
