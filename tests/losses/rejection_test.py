import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.test_util import check_grads
from scipy.optimize import minimize_scalar

from jaxref import losses, metrics


def literal(r, p, cost, alpha, beta):
    r, p = np.float64(r), np.float64(p)
    accepted = p * np.exp(alpha / 2 * (r - 1)) + (1 - p) * np.exp(alpha / 2 * (r + 1))
    return accepted + cost * np.exp(-beta * r)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((0.05, 4.0, None), (0.3, 3.5, None), (0.2, 2.0, 1.5))
    def test_matches_the_formula_with_its_gradient(self, cost, alpha, beta):
        rng = np.random.default_rng(0)
        r = (0.5 * rng.normal(size=(3, 4))).astype("f")
        loss = self.variant(
            lambda r, a: losses.fixed_predictor_rejection_loss(
                r, a, cost=cost, alpha=alpha, beta=beta
            )
        )
        beta = beta or losses.calibrated_rejection_beta(cost, alpha)
        for correct in (rng.random((3, 4)) < 0.5, rng.random((3, 4)).astype("f")):
            expected = literal(r, correct, cost, alpha, beta)
            np.testing.assert_allclose(loss(r, correct), expected, rtol=1e-5)
            slope = jax.grad(lambda r: loss(r, correct).sum())(r)
            around = [literal(r + h, correct, cost, alpha, beta) for h in (1e-4, -1e-4)]
            np.testing.assert_allclose(slope, (around[0] - around[1]) / 2e-4, rtol=1e-3, atol=1e-3)

    @parameterized.parameters((0.05, 4.0, None), (0.3, 3.5, None), (0.2, 2.0, 1.5))
    def test_optimal_score_is_the_numerical_minimum(self, cost, alpha, beta):
        p = np.array([0.0, 0.4, 0.9, 0.97, 1.0])
        ours = losses.optimal_rejection_score(p.astype("f"), cost=cost, alpha=alpha, beta=beta)
        beta = beta or losses.calibrated_rejection_beta(cost, alpha)
        theirs = [
            minimize_scalar(lambda r: literal(r, q, cost, alpha, beta), tol=1e-12).x for q in p
        ]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    def test_gradient_against_finite_differences(self):
        with jax.enable_x64(True):
            r, p = np.array([-0.3, 0.1, 0.4]), np.array([0.0, 0.3, 1.0])
            loss = jax.jit(lambda r: losses.fixed_predictor_rejection_loss(r, p, cost=0.2))
            check_grads(loss, (r,), order=1, modes=["rev", "fwd"])


class TestClaims:
    @pytest.mark.claim("learning-to-reject-fixed-predictor")
    def test_the_best_score_is_zero_where_wrong_outputs_are_as_likely_as_the_cost(self):
        for cost, alpha in ((0.05, 4.0), (0.05, 3.5), (0.3, 1.0)):
            p = np.array([1 - cost - 1e-3, 1 - cost + 1e-3])
            grid = np.linspace(-0.05, 0.05, 20001)
            risk = lambda q, **options: losses.fixed_predictor_rejection_loss(
                grid, np.full(20001, q), cost=cost, alpha=alpha, **options
            )
            with jax.enable_x64(True):
                below, above = (grid[np.argmin(risk(q))] for q in p)
                assert below < 0 < above
                closed = losses.optimal_rejection_score(p, cost=cost, alpha=alpha)
                np.testing.assert_allclose(closed, [below, above], atol=6e-6)
                # another exponent accepts what is too likely wrong, or rejects what is not
                beta = losses.calibrated_rejection_beta(cost, alpha)
                for factor, side in ((1.1, 1), (0.9, -1)):
                    assert np.all(
                        side * grid[[np.argmin(risk(q, beta=factor * beta)) for q in p]] > 0
                    )

    def test_is_above_the_loss_that_it_stands_for(self):
        r = np.linspace(-2, 2, 401).astype("f")
        for cost in (0.05, 0.5):
            for correct in (True, False):
                ours = losses.fixed_predictor_rejection_loss(r, np.full(401, correct), cost=cost)
                each = jax.vmap(lambda r: metrics.rejection_risk(r, correct, cost=cost))(r)
                assert np.all(ours >= each - 1e-6)

    def test_a_trained_rejector_reaches_the_precision_and_nearly_the_best_coverage(self):
        """Outputs are right with a probability that one feature decides; the rejector is linear in
        the probability of being right and in its square."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=4000)
        p = 1 / (1 + np.exp(-2 - 2 * x))
        correct = rng.random(4000) < p
        inputs = jnp.array(np.stack([np.ones(4000), p, p**2], -1), jnp.float32)

        @jax.jit
        def train(w):
            loss = lambda w: losses.fixed_predictor_rejection_loss(
                inputs @ w, correct, cost=0.1
            ).mean()
            return jax.lax.fori_loop(0, 1000, lambda _, w: w - 0.01 * jax.grad(loss)(w), w)

        r = inputs @ train(jnp.zeros(3))
        accepted = np.asarray(r > 0)
        assert 1 - p[accepted].mean() < 0.1
        best = (p > 0.9).mean()
        assert abs(accepted.mean() - best) < 0.15 * best
        oracle = metrics.rejection_risk((p - 0.9).astype("f"), p, cost=0.1)
        assert metrics.rejection_risk(r, p, cost=0.1) < oracle + 0.003


class TestContract:
    def test_extremes_masks_and_types(self):
        r = np.array([1e4, -1e4, 0.0, np.nan], np.float32)
        where = np.array([True, True, True, False])
        for correct in (True, False):
            loss = lambda r: losses.fixed_predictor_rejection_loss(
                r, np.full(4, correct), cost=0.05, where=where
            )
            values, vjp = jax.vjp(loss, r)
            gradient = vjp(np.ones(4, "f"))[0]
            assert np.all(np.isfinite(values))
            assert np.all(np.isfinite(gradient))
            assert values[3] == gradient[3] == 0
        half = losses.fixed_predictor_rejection_loss(jnp.ones(2, jnp.float16), True, cost=0.5)
        assert half.dtype == jnp.float16
        certain = losses.optimal_rejection_score(jnp.array([0.0, 1.0], jnp.bfloat16), cost=0.5)
        assert certain.dtype == jnp.bfloat16
        assert np.all(np.isfinite(certain.astype(np.float32)))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda f: f(np.ones(2, "f"), True, cost=1.0), ValueError, "cost must be in"),
            (lambda f: f(np.ones(2, "f"), True, cost=0.5, alpha=0.0), ValueError, "alpha must be"),
            (lambda f: f(np.ones(2, "f"), True, cost=0.5, beta=0.0), ValueError, "beta must be in"),
            (lambda f: f(np.ones(2, "f"), np.ones(3), cost=0.5), ValueError, "correct must broad"),
            (lambda f: f(np.ones(2, int), True, cost=0.5), TypeError, "rejection_scores must have"),
            (
                lambda f: losses.optimal_rejection_score(1.5, cost=0.5),
                ValueError,
                "correct_probability must be in",
            ),
            (
                lambda f: losses.calibrated_rejection_beta(0.0),
                ValueError,
                "cost must be in",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        with pytest.raises(error, match=message):
            call(losses.fixed_predictor_rejection_loss)
