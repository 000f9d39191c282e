import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from jaxref import metrics

METRICS = {
    "root_mean_squared_error": sklearn.metrics.root_mean_squared_error,
    "mean_absolute_percentage_error": sklearn.metrics.mean_absolute_percentage_error,
    "symmetric_mean_absolute_percentage_error": lambda t, p: np.mean(
        2 * abs(p - t) / (abs(p) + abs(t))
    ),
    "r2_score": sklearn.metrics.r2_score,
}


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
