import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import eigsh

from jaxref.analysis.landscape.batch_hessian import (
    batch_gauss_newton_top_eigenvalue,
    batch_hessian_top_eigenvalue,
    estimate_hessian_variance,
    lanczos_learning_rate_and_momentum,
    maximal_learning_rate,
    scale_learning_rate,
)

LAWS = {"hessian": batch_hessian_top_eigenvalue, "gauss_newton": batch_gauss_newton_top_eigenvalue}


def hessian_law64(spike, variance, params, batch, examples):
    noise = params * (1 / batch - 1 / examples) * variance
    return spike + noise / spike if spike > np.sqrt(noise) else 2 * np.sqrt(noise)


def gauss_newton_law64(spike, variance, params, batch, examples):
    ratio = params * (1 / batch - 1 / examples)
    if spike > variance * (1 + np.sqrt(ratio)):
        return spike * (1 + ratio * variance / (spike - variance))
    return variance * (1 + np.sqrt(ratio)) ** 2


class LawTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_both_match_a_literal_transcription(self):
        rng = np.random.default_rng(0)
        spike, variance = rng.uniform(0.1, 20, size=(2, 200))
        params, batch, examples = 10 ** rng.uniform([[2], [0], [4]], [[5], [4], [6]], size=(3, 200))
        for law, law64 in (
            (batch_hessian_top_eigenvalue, hessian_law64),
            (batch_gauss_newton_top_eigenvalue, gauss_newton_law64),
        ):
            arguments = (spike, variance, params, batch, examples)
            expected = [law64(*scalars) for scalars in zip(*arguments)]
            np.testing.assert_allclose(self.variant(law)(*arguments), expected, rtol=2e-5)
            arguments = (spike, variance, params, batch)
            expected = [law64(*scalars, np.inf) for scalars in zip(*arguments)]
            np.testing.assert_allclose(self.variant(law)(*arguments), expected, rtol=2e-5)


def noise_matrix(rng, size):
    upper = np.triu(rng.normal(size=(size, size)))
    return upper + np.triu(upper, 1).T


class TestClaim:
    @pytest.mark.claim("batch-size-learning-rate-random-matrix")
    def test_random_batches_have_the_top_eigenvalue_and_the_learning_rate_of_the_law(self):
        """Gaussian noise on a spike; and batches of least squares, down from small to all."""
        rng = np.random.default_rng(0)
        noise, v = noise_matrix(rng, 600) / np.sqrt(40), rng.normal(size=600)
        spikes = np.array([1.0, 3.0, 8.0, 12.0])
        projector = np.outer(v, v) / (v @ v)
        largest = lambda matrix: eigsh(matrix, 1, which="LA", tol=1e-3, return_eigenvectors=False)[
            0
        ]
        observed = [largest(noise + spike * projector) for spike in spikes]
        predicted = batch_hessian_top_eigenvalue(spikes, 1.0, 600, 40)
        np.testing.assert_allclose(predicted, [7.746, 7.746, 9.875, 13.25], rtol=1e-4)
        np.testing.assert_allclose(predicted, observed, rtol=0.04)

        examples, params = 2000, 50
        x = rng.normal(size=(examples, params)) * np.r_[np.sqrt(6), np.ones(params - 1)]
        top = lambda x: np.linalg.eigvalsh(x.T @ x)[-1] / len(x)
        full, sizes = top(x), np.array([10, 25, 100, 400])
        tops = np.array(
            [[top(x[rng.permutation(examples)[:size]]) for _ in range(40)] for size in sizes]
        )
        observed = np.append(np.mean(tops, axis=1), full)
        assert np.all(np.diff(observed) < 0)
        assert observed[0] > 1.9 * full  # so that no law without noise passes
        law = (full, 1.0, params, np.append(sizes, examples), examples)
        np.testing.assert_allclose(batch_gauss_newton_top_eigenvalue(*law), observed, rtol=0.06)

        rates = maximal_learning_rate(*law, curvature="gauss_newton")[:4, None]
        diverges = lambda rate: np.mean(np.abs(1 - rate * tops) > 1, axis=1)
        assert np.all(diverges(0.7 * rates) < 0.15)
        assert np.all(diverges(1.4 * rates) > 0.85)


class TestLimits:
    def test_all_examples_or_a_large_batch_have_no_noise(self):
        for law in LAWS.values():
            np.testing.assert_array_equal(law(8.0, 1.0, 600, 50, 50), 8.0)
            np.testing.assert_allclose(law(8.0, 1.0, 600, 1e9), 8.0, rtol=1e-6)
            np.testing.assert_array_equal(law(8.0, 0.0, 600, 40), 8.0)
            assert law(8.0, 1.0, 600, 20, 50) < law(8.0, 1.0, 600, 20)
        np.testing.assert_array_equal(batch_hessian_top_eigenvalue(0.0, 1.0, 600, 50, 50), 0.0)

    def test_is_continuous_where_the_spike_leaves_the_bulk_and_its_gradient_is_finite(self):
        for law, leaves in zip(LAWS.values(), (np.sqrt(15), 1 + np.sqrt(15))):
            around = law(leaves * np.array([1 - 1e-3, 1 + 1e-3]), 1.0, 600, 40)
            np.testing.assert_allclose(around[0], around[1], rtol=1e-5)
            slope = jax.jit(jax.vmap(jax.grad(law, (0, 1, 3)), (0, 0, None, 0, None)))
            spike = jnp.array([0.0, 1.0, 5.0, 1e4, 0.0, 8.0, 8.0])
            variance = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
            batch = jnp.array([40.0, 40.0, 40.0, 40.0, 40.0, 40.0, 1000.0])
            assert np.all(np.isfinite(np.stack(slope(spike, variance, 600, batch, 1000))))

    def test_a_huge_model_and_half_precision(self):
        for law, law64 in zip(LAWS.values(), (hessian_law64, gauss_newton_law64)):
            ours = law(jnp.bfloat16(8.0), jnp.bfloat16(1e-3), 70_000_000_000, 4096, 10**12)
            assert ours.dtype == jnp.float32
            variance = float(jnp.bfloat16(1e-3))
            np.testing.assert_allclose(ours, law64(8.0, variance, 7e10, 4096, 1e12), rtol=1e-5)


class TestMaximalLearningRate:
    def test_doubling_a_small_batch_and_a_large_one(self):
        """By 2 where the Gauss-Newton noise rules, √2 at the Hessian's edge, 1 without noise."""
        rate = jax.jit(
            functools.partial(maximal_learning_rate, 8.0, 1.0, 1e6), static_argnames="curvature"
        )
        for curvature, factor in (("hessian", np.sqrt(2)), ("gauss_newton", 2)):
            gain = lambda batch, curvature=curvature: (
                rate(2 * batch, curvature=curvature) / rate(batch, curvature=curvature)
            )
            np.testing.assert_allclose(gain(2.0), factor, rtol=1e-2)
            np.testing.assert_allclose(gain(1e8), 1, rtol=1e-2)
            assert 1.01 < gain(1e5) < factor
            law = LAWS[curvature]
            np.testing.assert_allclose(
                rate(1e5, curvature=curvature) * law(8.0, 1.0, 1e6, 1e5), 2, rtol=1e-6
            )

    def test_scaled_rates(self):
        rates = jnp.array([0.1, 0.3])
        np.testing.assert_allclose(scale_learning_rate(rates, 32, 512), [1.6, 4.8], rtol=1e-6)
        root = jax.jit(scale_learning_rate, static_argnames="rule")(rates, 512, 32, rule="sqrt")
        np.testing.assert_allclose(root, [0.025, 0.075], rtol=1e-6)


class TestEstimateHessianVariance:
    def test_of_least_squares_is_the_variance_of_the_entries(self):
        rng = np.random.default_rng(1)
        examples, size, count = 400, 20, 50
        x = rng.normal(size=(examples, 24)).astype(np.float32)
        batches = np.stack([rng.permutation(examples)[:size] for _ in range(count)])
        params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(8)}

        def product(rows, v):
            flat = rows.T @ (rows @ jnp.concatenate([v["w"].ravel(), v["b"]])) / len(rows)
            return {"w": flat[:16].reshape(4, 4), "b": flat[16:]}

        estimate = jax.jit(
            lambda x, batches, key, num_probes: estimate_hessian_variance(
                lambda v: jax.vmap(lambda rows: product(rows, v))(batches),
                lambda v: product(x, v),
                params,
                size,
                examples,
                num_probes=num_probes,
                key=key,
            ),
            static_argnames="num_probes",
        )
        ours = estimate(x, x[batches], jax.random.key(0), num_probes=200)
        x64 = np.float64(x)
        full = x64.T @ x64 / examples
        entries = [x64[rows].T @ x64[rows] / size - full for rows in batches]
        exact = np.mean(np.square(entries)) / (1 / size - 1 / examples)
        np.testing.assert_allclose(ours, exact, rtol=0.03)
        across = np.mean(np.var(x64[:, :, None] * x64[:, None, :], axis=0, ddof=1))
        np.testing.assert_allclose(ours, across, rtol=0.1)

    def test_half_precision(self):
        noise = jnp.array([[1.0, -1.0, 2.0], [-1.0, 1.0, -2.0]], jnp.bfloat16)
        ours = estimate_hessian_variance(
            lambda v: (3 + noise) * v,
            lambda v: 3 * v,
            jnp.zeros(3, jnp.bfloat16),
            4,
            num_probes=300,
            key=jax.random.key(0),
        )
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, 4 * 2 / 3, rtol=0.1)


class TestLanczosLearningRateAndMomentum:
    def test_is_the_best_pair_for_a_quadratic(self):
        """The largest root of the heavy ball's two polynomials is √ρ, and any other pair's more."""
        eigenvalues = np.r_[np.linspace(0.5, 30, 40), -3.0, 0.0].astype(np.float32)
        find = jax.jit(
            lambda curvature, key: lanczos_learning_rate_and_momentum(
                lambda v: curvature * v, jnp.zeros(42), num_steps=42, key=key
            )
        )
        rate, momentum = find(eigenvalues, jax.random.key(0))
        high, low = np.sqrt(30), np.sqrt(0.5)
        np.testing.assert_allclose(rate, (2 / (high + low)) ** 2, rtol=1e-4)
        np.testing.assert_allclose(momentum, ((high - low) / (high + low)) ** 2, rtol=1e-4)

        def slowest(rate, momentum):
            roots = [np.roots([1, -(1 + momentum - rate * h), momentum]) for h in (0.5, 30)]
            return np.max(np.abs(roots))

        best = slowest(float(rate), float(momentum))
        np.testing.assert_allclose(best, np.sqrt(momentum), rtol=1e-2)
        for factor, shift in ((0.9, 0), (1.1, 0), (1, -0.05), (1, 0.05), (1.1, 0.05), (0.9, -0.05)):
            assert slowest(rate * factor, momentum + shift) > best * 1.005

    def test_one_eigenvalue_none_and_few_steps(self):
        find = jax.jit(
            jax.vmap(
                lambda curvature, key: lanczos_learning_rate_and_momentum(
                    lambda v: curvature * v, jnp.zeros(30), key=key
                ),
                (0, None),
            )
        )
        rows = np.stack([np.full(30, 4.0), np.full(30, -4.0), np.zeros(30), np.linspace(1, 9, 30)])
        rate, momentum = find(np.float32(rows), jax.random.key(0))
        np.testing.assert_allclose(rate[:3], [0.25, np.inf, np.inf], rtol=1e-5)
        np.testing.assert_allclose(momentum[:3], 0, atol=1e-5)
        assert 0.25 < rate[3] < 0.3  # l_min is too high and l_max too low
        assert 0.15 < momentum[3] < 0.25


def test_bad_input_is_named():
    key, ones = jax.random.key(0), jnp.ones(3)
    for law in LAWS.values():
        for arguments, message in [
            ((-1.0, 1.0, 600, 40), "lambda_1 must be in"),
            ((1.0, -1.0, 600, 40), "variance must be in"),
            ((1.0, 1.0, 0, 40), "num_params must be in"),
            ((1.0, 1.0, 600, 0), "batch_size must be in"),
            ((1.0, 1.0, 600, 40, 0), "dataset_size must be in"),
            ((1.0, 1.0, 600, 40, 30), "batch_size must be at most dataset_size 30, got 40"),
        ]:
            with pytest.raises(ValueError, match=message):
                law(*arguments)
    with pytest.raises(ValueError, match="batch_size must be at most dataset_size 30"):
        jax.jit(lambda spike: batch_hessian_top_eigenvalue(spike, 1.0, 600, 40, 30))(1.0)
    with pytest.raises(ValueError, match="curvature must be one of hessian, gauss_newton, got 'f"):
        maximal_learning_rate(1.0, 1.0, 600, 40, curvature="fisher")
    with pytest.raises(ValueError, match="variance must be in"):
        maximal_learning_rate(1.0, -1.0, 600, 40)
    for arguments, keywords, message in [
        ((0.1, 0, 1), {}, "old_batch_size must be in"),
        ((0.1, 1, -1), {}, "new_batch_size must be in"),
        ((-0.1, 1, 1), {}, "learning_rate must be in"),
        ((0.1, 1, 1), {"rule": "cubic"}, "rule must be 'linear' or 'sqrt', got 'cubic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            scale_learning_rate(*arguments, **keywords)
    for batches, full, message in [
        (lambda v: jnp.stack([v, v]), lambda v: v[:2], r"full_hvp\(v\) must have shape \(3,\)"),
        (lambda v: v, lambda v: v, r"batch_hvps\(v\) must have shape \(3, 3\), got \(3,\)"),
        (lambda v: v[:0, None], lambda v: v, r"batch_hvps\(v\) must have shape \(1, 3\), got \(0"),
        (lambda v: jnp.sum(v), lambda v: v, r"batch_hvps\(v\) must have shape \(1, 3\), got \(\)"),
        (lambda v: {"a": v}, lambda v: v, r"batch_hvps\(v\) must have the tree structure"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimate_hessian_variance(batches, full, ones, 4, key=key)
    with pytest.raises(ValueError, match="num_probes must be in"):
        estimate_hessian_variance(lambda v: v[None], lambda v: v, ones, 4, num_probes=0, key=key)
    with pytest.raises(ValueError, match="num_steps must be in"):
        lanczos_learning_rate_and_momentum(lambda v: v, ones, num_steps=0, key=key)
