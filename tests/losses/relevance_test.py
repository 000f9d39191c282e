from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

KINDS = {"linear": 2, "sqrt": 2, "quadratic": 2, "power": 3}


def case(kind, seed=0):
    rng = np.random.default_rng(seed)
    cosine = rng.uniform(-1, 1, size=(4, 6)).astype("f")
    parameters = rng.normal(size=(4, KINDS[kind])).astype("f")
    return cosine, parameters, rng.uniform(size=(4, 6)).astype("f"), rng.uniform(size=(4, 6)) < 0.8


def literal(kind, cosine, parameters):
    """The logits in float64."""
    softplus = lambda x: np.log1p(np.exp(np.float64(x)))[:, None] + 1e-6
    a, b = softplus(parameters[:, 0]), np.float64(parameters[:, 1])[:, None]
    u = np.clip((1 + np.float64(cosine)) / 2, 1e-6, 1)
    p = {"sqrt": 0.5, "quadratic": 2.0}.get(kind) or softplus(parameters[:, -1])
    return a * (np.float64(cosine) if kind == "linear" else u**p) + b


@partial(jax.jit, static_argnames="kind")
def evaluate(cosine, parameters, relevance, where, kind):
    """Logits, losses and gradients, compiled once for all numbers of one kind."""
    loss = lambda c, p: losses.relevance_filter_loss(c, p, relevance, kind=kind, where=where)
    value, pull = jax.vjp(loss, cosine, parameters)
    logits = losses.monotone_score_map(cosine, parameters, kind=kind)
    return logits, value, *pull(jnp.ones_like(value))


@pytest.mark.parametrize("kind", KINDS)
class TestMaps:
    def test_match_the_formulas(self, kind):
        cosine, parameters, relevance, where = case(kind)
        logits, value, slope, of_parameters = evaluate(cosine, parameters, relevance, where, kind)
        z = literal(kind, cosine, parameters)
        np.testing.assert_allclose(logits, z, rtol=1e-5, atol=1e-5)
        entropy = np.logaddexp(0, z) - relevance * z
        np.testing.assert_allclose(value, np.where(where, entropy, 0), rtol=1e-4, atol=1e-6)
        h = 1e-5

        def total(cosine, parameters):
            z = literal(kind, cosine, parameters)
            return np.sum((np.logaddexp(0, z) - relevance * z) * where, axis=1)

        for i in range(KINDS[kind]):
            step = h * np.eye(KINDS[kind])[i]
            sides = [total(cosine, parameters + sign * step) for sign in (1, -1)]
            expected = (sides[0] - sides[1]) / (2 * h)
            np.testing.assert_allclose(of_parameters[:, i], expected, rtol=1e-3, atol=1e-4)
        step = h * np.eye(6)[2]
        sides = [total(np.float64(cosine) + sign * step, parameters) for sign in (1, -1)]
        expected = (sides[0] - sides[1]) / (2 * h)
        np.testing.assert_allclose(slope[:, 2], expected, rtol=1e-3, atol=1e-4)

    def test_ends_and_documents_without_label(self, kind):
        """Far parameters, cosines of -1 and of rounding above 1, and NaN where there is none."""
        cosine, parameters, relevance, where = case(kind)
        cosine[:, :3] = [-1, 1, 1 + 1e-7]
        where[:, :3] = True
        parameters[0], parameters[1] = -100, 100
        poisoned = (np.where(where, x, np.nan) for x in (cosine, relevance))
        cosine, relevance = poisoned
        logits, *found = evaluate(cosine, parameters, relevance, where, kind)
        assert np.all(np.isfinite(np.asarray(logits)[where]))
        assert all(np.all(np.isfinite(x)) for x in found)
        for x in found[:2]:
            np.testing.assert_array_equal(x[~where], 0)

    def test_half_precision_and_bad_input(self, kind):
        cosine, parameters, relevance, where = case(kind)
        half = jnp.asarray(cosine, jnp.bfloat16)
        found = evaluate(half, parameters, relevance, where, kind)
        expected = evaluate(half.astype("f"), parameters, relevance, where, kind)
        for mine, wide in zip(found[:2], expected[:2]):
            assert mine.dtype == jnp.bfloat16
            np.testing.assert_allclose(np.float32(mine), wide, rtol=0.02, atol=0.02)
        loss = partial(losses.relevance_filter_loss, kind=kind)
        with pytest.raises(ValueError, match=r"cosine must be in \[-1, 1\], got \[1\.5"):
            loss(0 * cosine + 1.5, parameters, relevance)
        with pytest.raises(ValueError, match="parameters must have shape"):
            loss(cosine, parameters[:, 1:], relevance)
        with pytest.raises(ValueError, match="parameters without their last axis must broadcast"):
            loss(cosine, parameters[:3], relevance)
        with pytest.raises(ValueError, match="relevance must have shape"):
            loss(cosine, parameters, relevance[:3])
        with pytest.raises(ValueError, match="relevance must be in"):
            loss(cosine, parameters, 2 + relevance)
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(cosine, parameters, relevance, where=where[:3])
        with pytest.raises(TypeError, match="cosine must have a floating-point type"):
            loss(cosine.astype(int), parameters, relevance)


def test_identity_and_unknown_kinds():
    cosine = np.linspace(-1, 1, 5, dtype="f")
    parameters = np.array([np.log(np.expm1(1 - 1e-6)), 0], "f")
    ours = losses.monotone_score_map(cosine, parameters, kind="linear")
    np.testing.assert_allclose(ours, cosine, atol=1e-6)
    with pytest.raises(ValueError, match="kind must be one of"):
        losses.monotone_score_map(cosine, parameters, kind="cubic")
