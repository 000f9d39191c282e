import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import metrics

LITERAL = {
    "absolute_relative_error": lambda p, t: np.mean(abs(p - t) / t),
    "root_mean_squared_log_depth_error": lambda p, t: np.sqrt(
        np.mean((np.log(p) - np.log(t)) ** 2)
    ),
    "log10_error": lambda p, t: np.mean(abs(np.log10(p) - np.log10(t))),
    "depth_accuracy": lambda p, t: np.mean(np.maximum(p / t, t / p) < 1.25),
}


@pytest.mark.parametrize("name", LITERAL)
def test_matches_the_formula(name):
    p, t = np.random.default_rng(0).uniform(1, 2, size=(2, 3, 4, 5)).astype("f")
    metric = jax.jit(getattr(metrics, name))
    expected = [LITERAL[name](*x) for x in zip(np.float64(p), np.float64(t))]
    np.testing.assert_allclose(metric(p, t), expected, rtol=1e-5)
    where = np.random.default_rng(1).uniform(size=t.shape) < 0.7
    ours = metric(np.where(where, p, np.nan), np.where(where, t, 0), where=where)
    expected = [LITERAL[name](p[w].astype(float), t[w]) for p, t, w in zip(p, t, where)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert np.all(metric(p, t, where=np.zeros(t.shape, bool)) == 0)
    half = jnp.asarray(p, jnp.bfloat16)
    assert metric(half, t).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="targets must have shape"):
        metric(p, t[0])
    with pytest.raises(ValueError, match=r"predictions must have shape \[..., height, width\]"):
        metric(p[0, 0], t[0, 0])
    with pytest.raises(TypeError, match="predictions must have a floating-point type"):
        metric(p.astype(int), t)


def test_accuracy_at_other_thresholds():
    factors = jnp.array([[1.0, 1.3, 1 / 1.5, 1.9, 3.0]])
    found = [
        metrics.depth_accuracy(factors, jnp.ones((1, 5)), threshold=1.25**k) for k in (1, 2, 3)
    ]
    np.testing.assert_allclose(found, [0.2, 0.6, 0.8], rtol=1e-6)
    with pytest.raises(ValueError, match="threshold must be in"):
        metrics.depth_accuracy(factors, factors, threshold=1.0)


def test_human_disagreement_rate():
    a = jnp.array([2.0, 1.0, 1.0, 1.05])
    b = jnp.array([1.0, 2.0, 1.09, 1.0])
    seen = np.array([1, -1, 0, 0])
    assert metrics.human_disagreement_rate(a, b, seen) == 0
    assert metrics.human_disagreement_rate(b, a, -seen) == 0
    np.testing.assert_allclose(metrics.human_disagreement_rate(a, b, seen, tolerance=0.01), 0.5)
    weights = np.array([1.0, 3.0, 0.0, 0.0])
    ours = metrics.human_disagreement_rate(a, b, np.array([-1, -1, 1, 1]), weights=weights)
    np.testing.assert_allclose(ours, 0.25)
    assert metrics.human_disagreement_rate(a, b, -seen, weights=0 * weights) == 0
    with pytest.raises(ValueError, match="weights must be in"):
        metrics.human_disagreement_rate(a, b, seen, weights=-weights)
    with pytest.raises(ValueError, match="relations must have shape"):
        metrics.human_disagreement_rate(a, b, seen[:2])
