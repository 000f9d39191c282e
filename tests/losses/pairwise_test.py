import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.losses import pairwise_surrogate
from jaxref.losses.pairwise import mean_over_pairs

LITERAL = {
    "squared_hinge": lambda d, m: np.maximum(m - d, 0) ** 2,
    "squared": lambda d, m: (m - d) ** 2,
    "hinge": lambda d, m: np.maximum(m - d, 0),
    "logistic": lambda d, m: np.log1p(np.exp(-m * d)),
    "exponential": lambda d, m: np.exp(-m * d),
}


@pytest.mark.parametrize("kind", LITERAL)
def test_surrogates_match_their_formulas_and_bound_the_step(kind):
    d = np.linspace(-3, 3, 13, dtype=np.float32)
    expected = LITERAL[kind](np.float64(d), 0.7)
    np.testing.assert_allclose(pairwise_surrogate(kind, d, margin=0.7), expected, rtol=1e-5)
    values, vjp = jax.vjp(lambda d: pairwise_surrogate(kind, d), d)
    scale = np.log(2) if kind == "logistic" else 1.0
    assert np.all(values / scale >= (d <= 0) - 1e-6)
    if kind != "squared":
        assert np.all(vjp(np.ones_like(d))[0] <= 0)
    assert pairwise_surrogate(kind, d.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_surrogates_stay_finite_and_name_bad_input():
    for kind in LITERAL:
        value, slope = jax.value_and_grad(lambda d: pairwise_surrogate(kind, d).sum())(
            jnp.array([-2e4, 0.0, 1.0, 2e4])
        )
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match="kind must be one of"):
        pairwise_surrogate("cubic", jnp.ones(2))
    with pytest.raises(ValueError, match="margin must be in"):
        pairwise_surrogate("hinge", jnp.ones(2), margin=0.0)
    with pytest.raises(TypeError, match="difference must have a floating-point type"):
        pairwise_surrogate("hinge", jnp.ones(2, int))


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7])
def test_mean_over_pairs_is_a_double_loop_in_chunks_of_any_size(chunk_size):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(7, 3)).astype(np.float32)
    is_positive, is_negative = rng.uniform(size=(2, 7, 3)) < 0.5
    is_positive[:, 2] = False

    def mean(scores):
        return mean_over_pairs(
            jax.nn.softplus, scores, is_positive, scores, is_negative, chunk_size=chunk_size
        )

    values, vjp = jax.jit(lambda s: jax.vjp(mean, s))(scores)
    expected, slope = np.zeros(3), np.zeros((7, 3))
    for k in range(2):
        pairs = [
            (p, q)
            for p in np.flatnonzero(is_positive[:, k])
            for q in np.flatnonzero(is_negative[:, k])
        ]
        for p, q in pairs:
            d = np.float64(scores[p, k]) - scores[q, k]
            expected[k] += np.log1p(np.exp(d)) / len(pairs)
            slope[p, k] += 1 / (1 + np.exp(-d)) / len(pairs)
            slope[q, k] -= 1 / (1 + np.exp(-d)) / len(pairs)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(vjp(np.ones(3, "f"))[0], slope, rtol=1e-5, atol=1e-7)


def test_chunk_size_is_checked():
    ones, mask = jnp.ones(3), jnp.ones(3, bool)
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1"):
        mean_over_pairs(jax.nn.softplus, ones, mask, ones, mask, chunk_size=0)
