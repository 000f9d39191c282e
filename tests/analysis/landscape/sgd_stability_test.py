import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

from jaxref.analysis.landscape.sgd_stability import (
    hessian_coherence,
    linearized_sgd_growth_rate,
    sgd_instability_threshold,
    sgd_stability_boundary,
    simulate_linearized_sgd,
)

coherence = jax.jit(hessian_coherence, static_argnames="factored")
growth = jax.jit(linearized_sgd_growth_rate, static_argnames=("num_iterations", "factored"))


def random_factors(n=5, d=4, rank=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d, rank)).astype(np.float32)


def products(factors):
    return np.float64(factors) @ np.swapaxes(np.float64(factors), -1, -2)


def coherence64(hessians):
    """With the square roots of the definition."""
    roots = [np.real(sqrtm(h)) for h in hessians]
    matrix = np.array([[np.linalg.norm(a @ b) for b in roots] for a in roots])
    sharpest = max(np.linalg.eigvalsh(h)[-1] for h in hessians)
    return np.linalg.eigvalsh(matrix)[-1] / sharpest, matrix


def moments_step64(hessians, rate, batch):
    """T as a matrix on the d² entries of N."""
    n, d, _ = hessians.shape
    kept = np.eye(d) - rate * np.mean(hessians, axis=0)
    spread = sum(np.kron(h, h) for h in hessians)
    return np.kron(kept, kept) + rate**2 / n**2 * (n / batch - 1) * spread


class CoherenceTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_square_roots_of_the_definition(self):
        for n, d, rank in ((5, 4, 2), (4, 3, 3)):
            factors = random_factors(n, d, rank)
            hessians = products(factors)
            sigma, matrix = coherence64(hessians)
            for f, ours in (
                (hessian_coherence, np.float32(hessians)),
                (functools.partial(hessian_coherence, factored=True), factors),
            ):
                result = self.variant(f)(ours)
                np.testing.assert_allclose(result.sigma, sigma, rtol=1e-5)
                np.testing.assert_allclose(result.matrix, matrix, rtol=1e-4)


class TestHessianCoherence:
    def test_is_one_for_examples_apart_and_their_number_for_equal_ones(self):
        x = np.float32(3 * np.eye(6)[:, :, None])
        np.testing.assert_allclose(coherence(x, factored=True).sigma, 1, rtol=1e-6)
        same = np.tile(random_factors(1, 6, 1), (6, 1, 1))
        result = coherence(same, factored=True)
        np.testing.assert_allclose(result.sigma, 6, rtol=1e-5)
        np.testing.assert_allclose(result.matrix, np.sum(same[0] ** 2), rtol=1e-5)

    def test_neither_scale_nor_coordinates_matter(self):
        factors = random_factors()
        expected = coherence(factors, factored=True).sigma
        rotation = np.linalg.qr(random_factors(1, 4, 4)[0])[0]
        for other in (rotation @ factors, 1e15 * factors, 1e-15 * factors):
            ours = coherence(np.float32(other), factored=True)
            np.testing.assert_allclose(ours.sigma, expected, rtol=1e-5)
            assert np.all(np.isfinite(ours.matrix) & (ours.matrix > 0))
        for scale in (1e25, 1e-25):
            ours = coherence(np.float32(scale * products(factors)))
            np.testing.assert_allclose(ours.sigma, expected, rtol=1e-5)

    def test_half_precision_and_hessians_of_zero(self):
        half = jnp.asarray(random_factors(), jnp.bfloat16)
        ours = coherence(half, factored=True)
        assert ours.sigma.dtype == ours.matrix.dtype == jnp.float32
        expected = coherence64(products(np.float64(half)))[0]
        np.testing.assert_allclose(ours.sigma, expected, rtol=1e-4)
        for zero in (coherence(jnp.zeros((5, 4, 4))), coherence(0 * half, factored=True)):
            assert np.isnan(zero.sigma)
            np.testing.assert_array_equal(zero.matrix, 0)


def clusters(sigma, n=12):
    """n/σ orthogonal directions, each with σ equal Hessians of rank one; sharpness σ/n."""
    directions = np.linalg.qr(random_factors(1, n // sigma, n // sigma)[0])[0]
    return np.float32(np.repeat(directions, sigma, axis=0)[:, :, None])


class TestGrowthRate:
    @pytest.mark.claim("sgd-linear-stability-coherence")
    def test_diverges_by_the_condition_and_at_the_boundary_for_clusters(self):
        """The boundary is exact for clusters, and no family beyond the threshold is stable."""
        n, batch, rate = 12, 3, 0.5
        for sigma in (1, 2, 3, 4, 6):
            factors = clusters(sigma)
            np.testing.assert_allclose(coherence(factors, factored=True).sigma, sigma, rtol=1e-5)
            boundary = sgd_stability_boundary(sigma, rate, n, batch)
            for part in (0.98, 1.02):
                scaled = factors * np.sqrt(part * boundary * n / sigma)
                assert (growth(scaled, rate, batch, factored=True) > 1) == (part > 1)
            threshold = sgd_instability_threshold(sigma, rate, n, batch)
            assert boundary <= threshold <= boundary * (sigma + n / batch - 1) / sigma

        rng = np.random.default_rng(0)
        shape, batch = (200, 8, 5, 2), 1
        common = rng.normal(size=(200, 1, 5, 2)) * rng.uniform(0, 4, size=(200, 1, 1, 1))
        families = rng.normal(size=shape) * rng.uniform(0, 1, size=(200, 8, 1, 2)) ** 4 + common
        hessians = np.mean(products(families), axis=1)
        families *= np.sqrt(
            rng.uniform(0.1, 3, size=200) / np.linalg.eigvalsh(hessians)[:, -1]
        ).reshape(-1, 1, 1, 1)
        sharpness = np.linalg.eigvalsh(np.mean(products(families), axis=1))[:, -1]
        measure = jax.jit(
            jax.vmap(
                lambda f: (
                    hessian_coherence(f, factored=True).sigma,
                    linearized_sgd_growth_rate(f, 1.0, batch, factored=True),
                )
            )
        )
        sigma, rates = measure(np.float32(families))
        diverges = sharpness > sgd_instability_threshold(sigma, 1.0, 8, batch)
        assert np.all(rates[diverges] >= 1 - 1e-5)
        by_coherence = diverges & (sharpness < 2)
        assert np.sum(by_coherence) > 10
        assert np.sum(rates[~diverges] < 0.9999) > 10

    def test_is_the_spectral_radius_of_the_moments(self):
        """Of the whole matrix on d² entries; with the null space it would be 1 at least."""
        for d, rank in ((4, 1), (3, 3)):
            factors = random_factors(5, d, rank, seed=d)
            hessians = products(factors)
            for rate, batch in ((0.3, 1.0), (0.8, 2.5), (1.4, 5.0), (0.05, 1.0)):
                step = moments_step64(hessians, rate, batch)
                expected = np.max(np.abs(np.linalg.eigvals(step)))
                for ours in (
                    growth(np.float32(hessians), rate, batch),
                    growth(factors, rate, batch, factored=True),
                ):
                    assert expected * (1 - 2e-3) < ours < expected * (1 + 1e-5)

    def test_a_smaller_batch_is_less_stable_and_a_full_one_is_gradient_descent(self):
        factors = random_factors()
        sharpness = np.linalg.eigvalsh(np.mean(products(factors), axis=0))
        rates = [growth(factors, 0.5, b, factored=True) for b in (1.0, 2.0, 3.0, 5.0)]
        assert np.all(np.diff(rates) < 0)
        expected = np.max((1 - 0.5 * sharpness) ** 2)
        np.testing.assert_allclose(rates[-1], expected, rtol=1e-4)
        for factor in (0.99, 1.01):
            full = growth(factors, factor * 2 / sharpness[-1], 5.0, factored=True)
            assert (full > 1) == (factor > 1)

    def test_directions_without_curvature_do_not_count(self):
        """In many more dimensions than examples, in either form and however long the iteration."""
        factors = np.zeros((5, 30, 2), np.float32)
        factors[:, 3:7] = random_factors()
        rotated = np.linalg.qr(random_factors(1, 30, 30)[0])[0] @ factors
        expected = growth(random_factors(), 0.1, 2.0, factored=True)
        assert expected < 0.99
        for ours in (
            growth(np.float32(rotated), 0.1, 2.0, num_iterations=2000, factored=True),
            growth(np.float32(products(rotated)), 0.1, 2.0, num_iterations=2000),
        ):
            np.testing.assert_allclose(ours, expected, rtol=2e-3)
        assert growth(np.zeros((5, 4, 4), np.float32), 0.1, 2.0) == 1
        assert growth(np.zeros((5, 4, 2), np.float32), 0.1, 2.0, factored=True) == 1
        identity = np.float32(np.tile(np.eye(4), (5, 1, 1)))
        np.testing.assert_allclose(growth(identity, 1.0, 5.0), 0, atol=1e-10)  # there in one step
        half = linearized_sgd_growth_rate(jnp.asarray(identity, jnp.bfloat16), 0.5, 5)
        assert half.dtype == jnp.float32
        np.testing.assert_allclose(half, 0.25, rtol=1e-6)

    def test_huge_and_tiny_steps(self):
        factors = random_factors()
        hessians = products(factors)
        huge = growth(factors, 1e4, 1.0, factored=True)
        expected = np.max(np.linalg.eigvalsh(moments_step64(hessians, 1e4, 1.0)))
        np.testing.assert_allclose(huge, expected, rtol=2e-3)
        np.testing.assert_allclose(growth(factors, 1e-8, 1.0, factored=True), 1, rtol=1e-6)


class TestConditions:
    def test_match_a_literal_transcription(self):
        for sigma, rate, n, batch in ((1.5, 0.1, 100, 4), (30.0, 0.1, 100, 64), (3.0, 2.0, 9, 1)):
            expected = min(2 / rate, sigma / rate * (n / batch - 1) ** -0.5)
            ours = sgd_instability_threshold(sigma, rate, n, batch)
            np.testing.assert_allclose(ours, expected, rtol=1e-6)
            expected = 2 * sigma / rate / (sigma + n / batch - 1)
            ours = sgd_stability_boundary(sigma, rate, n, batch)
            np.testing.assert_allclose(ours, expected, rtol=1e-6)

    def test_a_full_batch_has_that_of_gradient_descent_with_finite_gradients(self):
        for condition in (sgd_instability_threshold, sgd_stability_boundary):
            np.testing.assert_allclose(condition(2.0, 0.1, 50, 50), 20, rtol=1e-6)
            values = condition(jnp.array([1.0, 5.0]), 0.1, 50, jnp.array([[1.0], [50.0]]))
            assert values.shape == (2, 2)
            assert condition(jnp.bfloat16(2.0), 0.1, 50, 5).dtype == jnp.float32
            slope = jax.jit(jax.grad(lambda s, r, b, f=condition: f(s, r, 50, b), (0, 1, 2)))
            assert np.all(np.isfinite(np.stack(slope(2.0, 0.1, 50.0))))


class TestSimulation:
    def test_the_mean_square_distance_is_that_of_the_moments(self):
        factors, start = random_factors(6, 3, 1, seed=3) * 0.6, np.float32([1.0, -2.0, 0.5])
        hessians, rate, batch, steps = products(factors), 0.7, 2, 10
        step = moments_step64(hessians, rate, batch)
        moments, expected = np.outer(start, start).ravel(), []
        for _ in range(steps + 1):
            expected.append(np.trace(moments.reshape(3, 3)))
            moments = step @ moments
        keys = jax.random.split(jax.random.key(0), 20000)
        for h, factored in ((np.float32(hessians), False), (factors, True)):
            runs = jax.jit(
                jax.vmap(
                    lambda key, h, factored=factored: simulate_linearized_sgd(
                        h, start, rate, batch, num_steps=steps, key=key, factored=factored
                    ),
                    (0, None),
                )
            )(keys, h)
            assert runs.shape == (20000, steps + 1, 3)
            observed = np.mean(np.sum(np.square(np.float64(runs)), axis=2), axis=0)
            np.testing.assert_allclose(observed, expected, rtol=0.05)
            assert np.max(np.std(runs[:, -1], axis=0)) > 0.01

    def test_a_full_batch_is_gradient_descent(self):
        factors = random_factors(6, 3, 1)
        half = jnp.asarray([1.0, -2.0, 0.5], jnp.bfloat16)
        run = simulate_linearized_sgd(
            factors, half, 0.1, 6, num_steps=4, key=jax.random.key(0), factored=True
        )
        assert run.dtype == jnp.float32
        kept = np.eye(3) - 0.1 * np.mean(products(factors), axis=0)
        expected = [np.linalg.matrix_power(kept, t) @ [1.0, -2.0, 0.5] for t in range(5)]
        np.testing.assert_allclose(run, expected, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    hessians, key = np.float32(products(random_factors())), jax.random.key(0)
    skewed = hessians.copy()
    skewed[0, 0, 1] += 1
    run = functools.partial(simulate_linearized_sgd, num_steps=3, key=key)
    for f, arguments, keywords, error, message in [
        (hessian_coherence, (np.ones((3, 4, 5), "f"),), {}, ValueError, r"\[examples, d, d\] and"),
        (hessian_coherence, (np.ones((3, 4), "f"),), {"factored": True}, ValueError, "d, r"),
        (hessian_coherence, (np.ones((0, 4, 4), "f"),), {}, ValueError, r"entries, got \(0, 4, 4"),
        (hessian_coherence, (np.ones((3, 4, 4), int),), {}, TypeError, "hessians must have a fl"),
        (hessian_coherence, (skewed,), {}, ValueError, "hessians must be symmetric"),
        (linearized_sgd_growth_rate, (skewed, 0.1, 1), {}, ValueError, "must be symmetric"),
        (linearized_sgd_growth_rate, (hessians, 0.0, 1), {}, ValueError, "learning_rate must be"),
        (linearized_sgd_growth_rate, (hessians, 0.1, 0.5), {}, ValueError, "batch_size must be in"),
        (linearized_sgd_growth_rate, (hessians, 0.1, 6), {}, ValueError, r"in \[1, 5\], got 6"),
        (
            linearized_sgd_growth_rate,
            (hessians, 0.1, 1),
            {"num_iterations": 0},
            ValueError,
            "num_iterations",
        ),
        (run, (hessians, np.ones(3, "f"), 0.1, 1), {}, ValueError, r"start must have shape \(4,\)"),
        (run, (hessians, np.ones(4, int), 0.1, 1), {}, TypeError, "start must have a floating"),
        (run, (hessians, np.ones(4, "f"), 0.1, 9), {}, ValueError, "batch_size must be in"),
        (run, (hessians, np.ones(4, "f"), 0.1, 1), {"num_steps": 0}, ValueError, "num_steps"),
    ]:
        with pytest.raises(error, match=message):
            f(*arguments, **keywords)
    for condition in (sgd_instability_threshold, sgd_stability_boundary):
        for arguments, message in [
            ((0.0, 0.1, 9, 3), "sigma must be in"),
            ((1.0, -0.1, 9, 3), "learning_rate must be in"),
            ((1.0, 0.1, 0, 3), "num_examples must be in"),
            ((1.0, 0.1, 9, 10), r"batch_size must be in \[1, 9\]"),
        ]:
            with pytest.raises(ValueError, match=message):
                condition(*arguments)
