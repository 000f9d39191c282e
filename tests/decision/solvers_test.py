import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxref.decision import levenberg_marquardt


def decay(w, t, y):
    """Residuals of a sum of two exponentials."""
    return w[0] * jnp.exp(-w[1] * t) + w[2] * jnp.exp(-w[3] * t) - y


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_scipy(self):
        t = np.linspace(0, 4, 30)
        noise = np.random.default_rng(0).normal(size=30)
        y = 2 * np.exp(-0.5 * t) + np.exp(-3 * t) + 0.05 * noise
        w0 = np.array([1.0, 0.2, 0.5, 2.0])
        with jax.enable_x64(True):
            expected = scipy.optimize.least_squares(
                decay, w0, args=(t, y), method="lm", xtol=1e-12, ftol=1e-14, gtol=1e-14
            )
            solve = self.variant(
                lambda w0, *args: levenberg_marquardt(decay, w0, args, tolerance=1e-10)
            )
            w, info = solve(w0, t, y)
            assert info.converged
            np.testing.assert_allclose(w, expected.x, rtol=1e-5)
            np.testing.assert_allclose(info.cost, expected.cost, rtol=1e-8)


class TestBehaviour:
    @pytest.mark.parametrize("damping", [1e-6, 1.0, 1e4])
    def test_any_damping_and_any_unit_ends_at_the_solution_of_a_linear_problem(self, damping):
        rng = np.random.default_rng(0)
        a, y = rng.normal(size=(12, 3)), rng.normal(size=12)
        a[:, 1] *= 1e-3
        with jax.enable_x64(True):
            solve = lambda w0: levenberg_marquardt(
                lambda w: jnp.asarray(a) @ w - y, w0, damping=damping, tolerance=1e-10
            )
            w, info = jax.jit(solve)(np.zeros(3))
        assert info.converged
        np.testing.assert_allclose(w, np.linalg.lstsq(a, y, rcond=None)[0], rtol=1e-6)

    def test_steps_only_descend_and_the_best_is_kept(self):
        banana = lambda w: jnp.array([10 * (w[1] - w[0] ** 2), 1 - w[0]])
        start = jnp.array([-1.2, 1.0])
        costs = []
        for steps in (1, 3, 10, 100):
            w, info = levenberg_marquardt(banana, start, max_steps=steps)
            costs.append(float(info.cost))
            assert info.steps <= steps
        assert np.all(np.diff(costs) <= 0)
        assert info.converged
        np.testing.assert_allclose(w, 1, atol=1e-3)
        w, info = levenberg_marquardt(banana, jnp.ones(2))
        assert info.converged
        assert info.steps == 0

    def test_vmap(self):
        targets = jnp.array([[1.0, 2.0], [-3.0, 0.5]])
        solve = lambda y: levenberg_marquardt(lambda w: w**3 - y, jnp.ones(2))
        w, info = jax.jit(jax.vmap(solve))(targets)
        np.testing.assert_allclose(w, np.cbrt(targets), rtol=1e-3)
        assert np.all(info.converged)


class TestEdges:
    def test_steps_to_where_residuals_are_not_numbers_are_refused(self):
        w, info = levenberg_marquardt(lambda w: jnp.log(w) + 5, jnp.array([1.0]), damping=1e-6)
        assert info.converged
        np.testing.assert_allclose(w, np.exp(-5), rtol=1e-3)

    def test_a_weight_that_does_nothing_stays(self):
        w, info = levenberg_marquardt(lambda w: w[:1] - 2, jnp.array([0.0, 7.0]))
        np.testing.assert_allclose(w, [2, 7], rtol=1e-4)
        assert info.converged

    def test_bad_input_is_named(self):
        square = lambda w: w**2
        with pytest.raises(ValueError, match="w0 and the residuals must be vectors"):
            levenberg_marquardt(square, np.ones((2, 2), "f"))
        with pytest.raises(ValueError, match="w0 and the residuals must be vectors"):
            levenberg_marquardt(jnp.sum, np.ones(2, "f"))
        with pytest.raises(TypeError, match="w0 must have a floating-point type"):
            levenberg_marquardt(square, np.ones(2, int))
        for change in ({"damping": 0.0}, {"tolerance": -1.0}, {"max_steps": 0}):
            with pytest.raises(ValueError, match=f"{next(iter(change))} must be in"):
                levenberg_marquardt(square, np.ones(2, "f"), **change)
