from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxref import losses

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "multilabel_retrieval.npz")
EVERYTHING = np.ones((4, 10), bool)


@cache
def compiled(name):
    """Values and gradients of scores and α, compiled once for all numbers of one shape."""

    def values_and_gradients(scores, k, alpha, where, cotangent):
        function = getattr(losses, name)
        values, pull = jax.vjp(
            lambda s, alpha: function(s, k=k, alpha=alpha, where=where), scores, alpha
        )
        return values, *pull(cotangent)

    return jax.jit(values_and_gradients)


def evaluate(name, scores, k, *, alpha=1.0, where=EVERYTHING, cotangent=ORACLE["cotangent"]):
    k = np.broadcast_to(np.int32(k), 4)
    return compiled(name)(np.float32(scores), k, np.float32(alpha), where, cotangent)


def solved(scores, k, alpha):
    """The shares of one row in float64, by another solver."""
    excess = lambda t: scipy.special.expit(alpha * (scores + t)).sum() - k
    reach = np.abs(scores).max() + 50 / alpha
    t = scipy.optimize.brentq(excess, -reach, reach, xtol=1e-13)
    return scipy.special.expit(alpha * (scores + t))


@pytest.mark.parametrize("case", ["1/0.5", "1/2.0", "4/0.5", "4/2.0"])
def test_matches_the_authors_code(case):
    k, alpha = map(float, case.split("/"))
    for name, stored in (("soft_top_k", "shares"), ("log_soft_top_k", "logarithms")):
        value, gradient, _ = evaluate(name, ORACLE["scores"], k, alpha=alpha)
        np.testing.assert_allclose(value, ORACLE[f"{stored}/{case}"], rtol=1e-5, atol=1e-7)
        expected = ORACLE[f"{stored}/{case}/gradient"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradient_of_alpha():
    scores, h = np.float64(ORACLE["scores"]), 1e-5
    _, _, found = evaluate("soft_top_k", scores, 3, alpha=1.5)
    change = [solved(row, 3, 1.5 + h) - solved(row, 3, 1.5 - h) for row in scores]
    np.testing.assert_allclose(found, np.sum(ORACLE["cotangent"] * change) / (2 * h), rtol=1e-3)


def test_every_k_has_its_sum_and_the_derivatives_of_the_equation():
    """First and second ones, forward over reverse under vmap, with the labels at the first axis."""
    scores, alpha = ORACLE["scores"][0, :6], 1.5
    ks = np.arange(1, 6)

    def derivatives(k):
        operator = lambda s: losses.soft_top_k(s[:, None], k[None], alpha=alpha, axis=0)[:, 0]
        jacobian = jax.jacrev(operator)
        return operator(scores), jacobian(scores), jax.jacfwd(jacobian)(scores)

    def expected(scores):
        p = np.stack([solved(scores, k, alpha) for k in ks])
        v = alpha * p * (1 - p)
        return p, v[:, :, None] * (np.eye(6) - v[:, None, :] / v.sum(axis=1)[:, None, None])

    shares, jacobians, second = jax.jit(jax.vmap(derivatives))(ks)
    np.testing.assert_allclose(shares.sum(axis=1), ks, rtol=1e-6)
    np.testing.assert_allclose(jacobians.sum(axis=-1), 0, atol=1e-6)
    exact = np.float64(scores)
    np.testing.assert_allclose(shares, expected(exact)[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jacobians, expected(exact)[1], atol=1e-6)
    steps = 1e-5 * np.eye(6)
    differences = [(expected(exact + e)[1] - expected(exact - e)[1]) / 2e-5 for e in steps]
    np.testing.assert_allclose(second, np.moveaxis(differences, 0, -1), atol=1e-5)


def test_limits_of_alpha_and_a_constant():
    scores = ORACLE["scores"]
    sharp, *_ = evaluate("soft_top_k", scores, 3, alpha=1e4)
    np.testing.assert_allclose(sharp, np.argsort(np.argsort(-scores)) < 3, atol=1e-6)
    flat, *_ = evaluate("soft_top_k", scores, 3, alpha=1e-6)
    np.testing.assert_allclose(flat, 0.3, atol=1e-4)
    shifted, *_ = evaluate("soft_top_k", scores + 100, 3)
    np.testing.assert_allclose(shifted, evaluate("soft_top_k", scores, 3)[0], rtol=1e-4)


@cache
def compiled_loss():
    loss = lambda s, positive, k, where: losses.soft_top_k_loss(s, positive, k=k, where=where)
    vjp = lambda s, *rest: jax.vjp(lambda s: loss(s, *rest), s)
    return jax.jit(lambda *arguments: (vjp(*arguments)[0], *vjp(*arguments)[1](jnp.ones(4))))


class TestLoss:
    def test_matches_the_authors_code(self):
        positive = ORACLE["positive"]
        value, gradient = compiled_loss()(
            ORACLE["scores"], positive, positive.sum(axis=1), EVERYTHING
        )
        np.testing.assert_allclose(value, ORACLE["top_k/number"], rtol=1e-5)
        expected = ORACLE["top_k/number/gradient"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_no_relevant_label(self):
        """Not even where k is their number, 0, which no t gives."""
        for k in (5, 0):
            found = compiled_loss()(
                ORACLE["scores"], 0 * ORACLE["positive"], np.full(4, k), EVERYTHING
            )
            for x in found:
                np.testing.assert_array_equal(x, 0)

    def test_no_more_than_k_labels(self):
        where = np.arange(10) < np.array([[8], [3], [2], [0]])
        value, gradient = compiled_loss()(
            ORACLE["scores"], EVERYTHING, np.full(4, 3), where
        )  # fmt: skip
        expected = -np.log(solved(np.float64(ORACLE["scores"][0, :8]), 3, 2.0)).mean()
        np.testing.assert_allclose(value, [expected, 0, 0, 0], rtol=1e-5)
        np.testing.assert_array_equal(gradient[~where], 0)
        np.testing.assert_array_equal(gradient[1:], 0)


class TestEdges:
    def test_far_and_equal_scores(self):
        scores = np.array([[1e4, 1, -1e4], [-1e30] * 3, [2, 1, 1], [1e30, -1e30, 0]])
        scores = np.pad(scores, ((0, 0), (0, 7)))
        where = np.broadcast_to(np.arange(10) < 3, (4, 10))
        shares, *gradients = evaluate("soft_top_k", scores, [1, 1, 2, 2], alpha=50.0, where=where)
        expected = [[1, 0, 0], [1 / 3] * 3, [1, 1 / 2, 1 / 2], [1, 0, 1]]
        np.testing.assert_allclose(shares[:, :3], expected, atol=1e-6)
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients)

    def test_logarithms_where_all_shares_are_0_or_1(self):
        """t lies in the middle between the last one in and the first one out."""
        scores = np.pad(np.tile([1e4, 1, -1e4], (4, 1)), ((0, 0), (0, 7)))
        where = np.broadcast_to(np.arange(10) < 3, (4, 10))
        log_p, slopes, _ = evaluate(
            "log_soft_top_k", scores, 1, where=where, cotangent=np.eye(4, 10, dtype="f")
        )
        np.testing.assert_allclose(log_p[0, :3], [0, -4999.5, -15000.5], rtol=1e-6)
        np.testing.assert_allclose(
            slopes[:3, :3], [[0, 0, 0], [-0.5, 0.5, 0], [-0.5, -0.5, 1]], atol=1e-6
        )

    def test_many_labels_have_an_interval_that_holds_t(self):
        """Where all of 40,000 scores are equal, t lies 10.6 / α below them."""
        shares = losses.soft_top_k(np.zeros(40_000, "f"), 1)
        np.testing.assert_allclose(shares, 1 / 40_000, rtol=1e-4)

    def test_labels_that_do_not_exist(self):
        scores, where = ORACLE["scores"], np.arange(10) < np.array([[8], [3], [2], [0]])
        p = solved(np.float64(scores[0, :8]), 3, 1.0)
        for name, expected, full in (("soft_top_k", p, 1), ("log_soft_top_k", np.log(p), 0)):
            poisoned = np.where(where, scores, np.nan)
            value, slope, _ = evaluate(name, poisoned, 3, where=where)
            np.testing.assert_allclose(value[0, :8], expected, rtol=1e-5)
            np.testing.assert_array_equal(value[1:], full * where[1:])
            assert np.all(np.isfinite(slope))
            np.testing.assert_array_equal(slope[~where], 0)
            np.testing.assert_array_equal(slope[1:], 0)

    def test_half_precision_computes_in_float32(self):
        def everything(scores):
            loss = losses.soft_top_k_loss(scores, ORACLE["positive"], k=3)
            return losses.soft_top_k(scores, 3), losses.log_soft_top_k(scores, 3), loss

        half = jnp.asarray(ORACLE["scores"], jnp.bfloat16)
        found, expected = jax.jit(lambda x: (everything(x), everything(x.astype("f"))))(half)
        for mine, wide in zip(found, expected):
            assert mine.dtype == jnp.bfloat16
            np.testing.assert_array_equal(mine, wide.astype(jnp.bfloat16))
        assert losses.soft_top_k(jnp.zeros((0, 4)), 2).shape == (0, 4)

    def test_bad_input_is_named(self):
        scores, positive = ORACLE["scores"], ORACLE["positive"]
        loss = partial(losses.soft_top_k_loss, positive_mask=positive)
        for f in (losses.soft_top_k, losses.log_soft_top_k, loss):
            for k in (0, 10, np.array([1, 2, 3, 10])):
                with pytest.raises(ValueError, match=r"k must be in \(0, 10\)"):
                    f(scores, k=k)
            with pytest.raises(TypeError, match=r"k must be an integer, got 2\.0"):
                f(scores, k=2.0)
            with pytest.raises(ValueError, match="k must broadcast"):
                f(scores, k=np.array([1, 2, 3]))
            with pytest.raises(ValueError, match="alpha must be in"):
                f(scores, k=2, alpha=0.0)
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            losses.soft_top_k(positive, 2)
        with pytest.raises(ValueError, match="num_iterations must be in"):
            losses.soft_top_k(scores, 2, num_iterations=0)
        with pytest.raises(ValueError, match="axis 2 is out of range"):
            losses.soft_top_k(scores, 2, axis=2)
        with pytest.raises(ValueError, match="positive_mask must have shape"):
            losses.soft_top_k_loss(scores, positive[:2])
