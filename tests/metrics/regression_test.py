from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses, metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "forecasting.npz")

METRICS = {
    "root_mean_squared_error": sklearn.metrics.root_mean_squared_error,
    "mean_absolute_percentage_error": sklearn.metrics.mean_absolute_percentage_error,
    "symmetric_mean_absolute_percentage_error": lambda t, p: np.mean(
        2 * abs(p - t) / (abs(p) + abs(t))
    ),
    "r2_score": sklearn.metrics.r2_score,
}
ERRORS = {
    "normalized_mean": metrics.normalized_root_mean_squared_error,
    "normalized_range": partial(metrics.normalized_root_mean_squared_error, normalization="range"),
    "normalized_std": partial(metrics.normalized_root_mean_squared_error, normalization="std"),
    "relative_squared": metrics.relative_squared_error,
    "root_squared_log": losses.root_mean_squared_log_error,
    "percentage": metrics.mean_absolute_percentage_error,
    "relative_absolute": metrics.relative_absolute_error,
    "relative_root": metrics.relative_root_mean_squared_error,
    "root": metrics.root_mean_squared_error,
    "r2": metrics.r2_score,
    "symmetric": metrics.symmetric_mean_absolute_percentage_error,
}
"""Errors of sets by the names of PyTorch's peers, and those without one."""


def all_errors(predictions, targets, where, axis_name=None):
    return jnp.stack(
        [f(predictions, targets, where=where, axis_name=axis_name) for f in ERRORS.values()]
    )


@jax.jit
def errors_of_sixteen(predictions, targets, where):
    slopes = jax.jacrev(all_errors)(predictions, targets, where)
    return all_errors(predictions, targets, where), slopes


def errors_and_slopes(predictions, targets, where):
    """Of up to sixteen entries, by one program for all tests."""
    missing = 16 - len(predictions)
    padded = [np.pad(x, (0, missing)) for x in (predictions, targets, where)]
    values, slopes = errors_of_sixteen(*padded)
    return values, slopes[:, : len(predictions)]


class TestErrorsOfSets:
    def test_values_and_gradients_match_torchmetrics(self):
        arguments = (PEER[name].astype("f") for name in ("predictions", "targets"))
        values, slopes = errors_and_slopes(*arguments, np.ones(12, bool))
        for name, value, slope in zip(ERRORS, values, slopes):
            if f"{name}_value" in PEER:
                np.testing.assert_allclose(value, PEER[f"{name}_value"], rtol=1e-5)
                expected = PEER[f"{name}_gradient"]
                np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-6, err_msg=name)

    def test_shards_see_the_whole_set(self):
        rng = np.random.default_rng(0)
        targets, where = rng.uniform(0.1, 3, size=16), rng.uniform(size=16) < 0.7
        predictions = np.where(where, targets * rng.uniform(0.5, 1.5, size=16), np.nan)
        sharded = jax.shard_map(
            partial(all_errors, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
        )
        arguments = predictions.astype("f"), targets.astype("f"), where
        weights = np.arange(1.0, 12)
        weighted = jax.jit(jax.value_and_grad(lambda *x: sharded(*x) @ weights))
        value, gradient = weighted(*arguments)
        values, slopes = errors_and_slopes(*arguments)
        np.testing.assert_allclose(value, values @ weights, rtol=1e-5)
        np.testing.assert_allclose(gradient, weights @ slopes, rtol=1e-4, atol=1e-5)
        assert np.all(gradient[~where] == 0)

    def test_axes_and_masks_are_sets_of_their_own(self):
        rng = np.random.default_rng(1)
        targets, where = rng.uniform(1, 3, size=(2, 12)), rng.uniform(size=(2, 12)) < 0.7
        predictions = targets + 0.3 * rng.normal(size=(2, 12))
        several = list(ERRORS.values())[:3]
        found = jax.jit(lambda p, t: [error(p, t, axis=1, where=where) for error in several])(
            np.where(where, predictions, np.nan).astype("f"), targets.astype("f")
        )
        for i, admitted in enumerate(where):
            p, t = predictions[i][admitted], targets[i][admitted]
            root = np.sqrt(np.mean((p - t) ** 2))
            expected = [root / abs(t.mean()), root / np.ptp(t), root / t.std()]
            np.testing.assert_allclose([x[i] for x in found], expected, rtol=1e-5)

    def test_edges(self):
        """Exact predictions, constant targets, predictions of 0 and nothing at all."""
        ones, zeros, third = np.ones(12, "f"), np.zeros(12, "f"), np.full(12, 1 / 3, "f")
        order = {name: i for i, name in enumerate(ERRORS)}
        varied = np.linspace(0.5, 2, 12).astype("f")
        for case in ((varied, varied, True), (third, third, True), (zeros, zeros, True)):
            values, slopes = errors_and_slopes(*case[:2], np.full(12, case[2]))
            expected = np.zeros(11)
            expected[order["r2"]] = 1
            np.testing.assert_array_equal(values, expected)
            np.testing.assert_array_equal(slopes, 0)
        values, slopes = errors_and_slopes(np.nan * ones, ones, np.zeros(12, bool))
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(slopes, 0)
        values, slopes = errors_and_slopes(third + 1, third, np.ones(12, bool))
        infinite = ("normalized_range", "normalized_std", "relative_squared", "relative_absolute")
        assert set(np.array(list(ERRORS))[np.isinf(values)]) == set(infinite)
        assert values[order["r2"]] == 0
        assert np.all(np.isfinite(slopes))
        values, slopes = errors_and_slopes(zeros, varied, np.ones(12, bool))
        assert values[order["relative_root"]] == np.inf
        assert np.all(np.isfinite(slopes))
        values, slopes = errors_and_slopes(1e4 * varied, -1e4 * ones, np.ones(12, bool))
        assert np.all(np.isfinite(slopes))

    def test_bad_input_is_named(self):
        for name, error in ERRORS.items():
            with pytest.raises(ValueError, match="targets must have shape"):
                error(jnp.ones(3), jnp.ones(2))
            with pytest.raises(ValueError, match="where must broadcast"):
                error(jnp.ones(3), jnp.ones(3), where=np.ones(2, bool))
            with pytest.raises(TypeError, match="predictions must have a floating-point type"):
                error(np.ones(3, int), np.ones(3))
            out = jax.eval_shape(error, jnp.ones((3, 0), jnp.float16), jnp.ones((3, 0)))
            assert out.dtype == jnp.float16, name
        with pytest.raises(ValueError, match="normalization must be 'mean', 'range' or 'std'"):
            metrics.normalized_root_mean_squared_error(jnp.ones(3), jnp.ones(3), normalization="l2")


@pytest.mark.parametrize("name", METRICS)
class TestMetrics:
    def test_matches_scikit_learn(self, name):
        rng = np.random.default_rng(0)
        targets = rng.normal(size=(40, 3)).astype("f")
        predictions = (targets + 0.5 * rng.normal(size=(40, 3))).astype("f")
        expected = [
            METRICS[name](*x) for x in zip(np.float64(targets.T), np.float64(predictions.T))
        ]
        metric = jax.jit(getattr(metrics, name), static_argnames="axis")
        np.testing.assert_allclose(metric(predictions, targets, axis=0), expected, rtol=1e-5)
        whole = METRICS[name](np.float64(targets.ravel()), np.float64(predictions.ravel()))
        np.testing.assert_allclose(metric(predictions, targets), whole, rtol=1e-5)
        where = np.arange(40)[:, None] < 20
        poisoned = np.where(where, predictions, np.nan)
        ours = metric(poisoned, targets, axis=0, where=where)
        np.testing.assert_allclose(ours, metric(predictions[:20], targets[:20], axis=0), rtol=1e-5)

    def test_edges_and_bad_input(self, name):
        metric = getattr(metrics, name)
        zero = jnp.zeros(3)
        assert metric(zero, zero) == (name == "r2_score")
        nothing = metric(zero, zero + 1, where=np.zeros(3, bool))
        assert nothing == (name == "r2_score")
        assert metric(zero.astype(jnp.bfloat16), zero).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match="targets must have shape"):
            metric(zero, jnp.zeros(2))
        with pytest.raises(ValueError, match="where must broadcast"):
            metric(zero, zero, where=np.ones(2, bool))
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            metric(np.zeros(3, int), zero)


def test_r2_of_the_mean_of_constants_and_adjusted():
    targets = jnp.array([1.0, 2.0, 4.0, 5.0])
    assert metrics.r2_score(jnp.full(4, 3.0), targets) == 0
    assert metrics.r2_score(jnp.full(4, 9.0), targets) < 0
    assert metrics.r2_score(jnp.array([2.0, 3.0]), jnp.array([2.0, 2.0])) == 0
    predictions = targets + jnp.array([0.5, -0.5, 0.5, 0.5])
    plain = metrics.r2_score(predictions, targets)
    adjusted = metrics.r2_score(predictions, targets, num_features=2)
    np.testing.assert_allclose(1 - adjusted, (1 - plain) * 3, rtol=1e-5)
    assert np.isnan(metrics.r2_score(predictions, targets, num_features=3))
    with pytest.raises(ValueError, match="num_features must be in"):
        metrics.r2_score(predictions, targets, num_features=-1)


def test_percentages_of_zero():
    predictions, targets = jnp.array([0.0, 1.0]), jnp.zeros(2)
    each = lambda metric: [metric(predictions[i : i + 1], targets[i : i + 1]) for i in (0, 1)]
    assert each(metrics.mean_absolute_percentage_error) == [0, np.inf]
    assert each(metrics.symmetric_mean_absolute_percentage_error) == [0, 2]
