from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import norms
from jaxref.attention import (
    attention_entropy,
    attention_entropy_lower_bound,
    attention_probabilities,
)
from jaxref.parallel import make_mesh

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "weight_norms.npz")


def random_kernel(shape=(6, 4), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spectral_norm(kernel):
    return np.linalg.norm(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), 2)


def converged(kernel, num_steps=200):
    state = norms.spectral_normalization_init(kernel)
    sigma, u, _ = norms.spectral_norm_power_iteration(kernel, state.u, num_steps)
    return norms.SpectralState(u, sigma)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_power_iteration_matches_the_formula(self):
        kernel, u = random_kernel((2, 3, 4)), np.array([0.5, -0.5, 0.5, 0.5], np.float32)
        for num_steps in (1, 3):
            ours = self.variant(
                lambda kernel, u: norms.spectral_norm_power_iteration(kernel, u, num_steps)
            )(kernel, u)
            matrix, expected_u = np.float64(kernel).reshape(6, 4), np.float64(u)
            for _ in range(num_steps):
                v = matrix @ expected_u
                v /= np.linalg.norm(v)
                expected_u = matrix.T @ v
                expected_u /= np.linalg.norm(expected_u)
            expected = (v @ matrix @ expected_u, expected_u, v)
            chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)

    def test_values_gradients_and_state_match_the_authors(self):
        """Their u belongs to the inputs of a torch kernel [out, in]: one half step apart from ours,
        so that the step is made on the transposed kernel here."""
        cotangent, x = ORACLE["cotangent"], ORACLE["x"]
        start = np.full(18, 18**-0.5, np.float32)

        def ours(kernel, gamma, x, bias):
            transposed = kernel.transpose(2, 0, 1, 3).reshape(18, 4).T
            w, state = norms.sigma_reparam(
                transposed, gamma, norms.SpectralState(start, jnp.float32(0))
            )
            kernel = w.T.reshape(3, 3, 2, 4).transpose(1, 2, 0, 3)
            y = jax.lax.conv_general_dilated(
                x, kernel, (2, 1), ((1, 1), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return y + bias, state

        arguments = (ORACLE["kernel"], np.float32(1.5), x, ORACLE["bias"])
        y, vjp, state = jax.vjp(ours, *arguments, has_aux=True)
        np.testing.assert_allclose(y, ORACLE["sigma"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.u, ORACLE["sigma_next_v"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.sigma, ORACLE["sigma_sigma"][0], rtol=1e-5)
        for name, gradient in zip(("kernel", "gamma", "x", "bias"), vjp(cotangent)):
            expected = ORACLE[f"sigma_grad_{name}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4, err_msg=name)

    def test_normalised_kernel_and_its_gradient_match_torch(self):
        kernel = ORACLE["kernel"].transpose(2, 0, 1, 3).reshape(18, 4)
        state = converged(kernel)
        w, vjp = jax.vjp(lambda w: norms.spectral_normalization(w, state)[0], kernel)
        np.testing.assert_allclose(w, ORACLE["spectral_norm"], rtol=1e-5, atol=1e-6)
        expected = ORACLE["spectral_norm_grad_kernel"]
        np.testing.assert_allclose(vjp(ORACLE["rows"])[0], expected, rtol=1e-4, atol=1e-4)

    def test_init_is_exact_and_leaves_the_layer_as_it_is(self):
        kernel = random_kernel((3, 2, 4))
        for gamma_init, expected in ((1.0, 1.0), (2.5, 2.5), ("spectral", spectral_norm(kernel))):
            gamma, state = norms.sigma_reparam_init(kernel, gamma_init)
            np.testing.assert_allclose(gamma, expected, rtol=1e-5)
            np.testing.assert_allclose(state.sigma, spectral_norm(kernel), rtol=1e-5)
            w, _ = norms.sigma_reparam(kernel, gamma, state)
            np.testing.assert_allclose(spectral_norm(w), expected, rtol=1e-5)
        np.testing.assert_allclose(w, kernel, rtol=1e-5)

    def test_state_follows_a_moving_kernel_and_stays_without_update(self):
        kernel, drift = random_kernel((8, 8)), 0.02 * random_kernel((8, 8), 1)
        _, state = norms.sigma_reparam_init(kernel)
        step = jax.jit(lambda kernel, state: norms.sigma_reparam(kernel, 1.0, state))
        for _ in range(20):
            kernel = kernel + drift
            w, state = step(kernel, state)
        np.testing.assert_allclose(state.sigma, spectral_norm(kernel), rtol=1e-2)
        fixed, same = norms.sigma_reparam(kernel, 1.0, state, update=False)
        assert same is state
        np.testing.assert_allclose(fixed, w, rtol=1e-2, atol=1e-3)


class TestClaims:
    @pytest.mark.claim("sigma-reparam")
    def test_attention_keeps_the_entropy_that_a_plain_layer_loses_at_a_large_rate(self):
        """The spectral norm is |γ|, and by it alone the entropy of attention is bounded."""
        kernel = random_kernel((8, 8))
        state = converged(kernel)
        reparam = lambda kernel: norms.sigma_reparam(kernel, -1.5, state)[0]
        w, vjp = jax.vjp(reparam, kernel)
        np.testing.assert_allclose(spectral_norm(w), 1.5, rtol=1e-5)
        np.testing.assert_allclose(reparam(7 * kernel), w, rtol=1e-5)
        (gradient,) = vjp(random_kernel((8, 8), 1))
        assert abs(np.sum(gradient * kernel)) < 1e-4 < np.abs(gradient).max()

        tokens = random_kernel((1, 12, 8), 2)
        target = random_kernel((1, 12, 8), 3)

        def entropy_and_output(query, key):
            probabilities = attention_probabilities(
                (tokens @ query)[:, :, None], (tokens @ key)[:, :, None]
            )
            return attention_entropy(probabilities), probabilities[:, 0] @ tokens

        def train(effective, parameters, carried):
            def loss(parameters, carried):
                (query, key), carried = effective(parameters, carried)
                entropy, output = entropy_and_output(query, key)
                return jnp.mean((output - target) ** 2), (entropy.mean(), (query, key), carried)

            def step(state, _):
                parameters, carried = state
                gradient, (entropy, used, carried) = jax.grad(loss, has_aux=True)(
                    parameters, carried
                )
                parameters = jax.tree.map(lambda p, g: p - 20 * g, parameters, gradient)
                return (parameters, carried), (entropy, used)

            return jax.lax.scan(step, (parameters, carried), length=100)[1]

        def plain(parameters, carried):
            return parameters, carried

        def reparametrized(parameters, carried):
            pairs = [norms.sigma_reparam(*p, s) for p, s in zip(parameters, carried)]
            return tuple(zip(*pairs))

        kernels = [random_kernel((8, 8), seed) / np.sqrt(8) for seed in (4, 5)]
        entropy, (query, key) = jax.jit(lambda k: train(plain, tuple(k), ()))(kernels)
        starts = [norms.sigma_reparam_init(kernel) for kernel in kernels]
        parameters = tuple((k, gamma) for k, (gamma, _) in zip(kernels, starts))
        states = tuple(state for _, state in starts)
        kept, (query_kept, key_kept) = jax.jit(lambda p, s: train(reparametrized, p, s))(
            parameters, states
        )
        size = np.linalg.norm(tokens[0], 2)
        for entropies, queries, keys in ((entropy, query, key), (kept, query_kept, key_kept)):
            product = np.linalg.norm(np.asarray(queries[-1] @ keys[-1].T), 2)
            bound = attention_entropy_lower_bound(product * size**2 / np.sqrt(8), 12)
            assert bound <= entropies[-1]
        assert kept.min() > 0.5
        assert entropy.min() < 0.05


class TestEdges:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        kernel = jnp.asarray(100 * random_kernel((64, 8)), dtype)
        gamma, state = norms.sigma_reparam_init(kernel, "spectral")
        assert gamma.dtype == state.u.dtype == state.sigma.dtype == jnp.float32
        w, state = norms.sigma_reparam(kernel, gamma, state)
        assert w.dtype == dtype
        assert state.u.dtype == state.sigma.dtype == jnp.float32
        np.testing.assert_array_equal(w, kernel)

    @pytest.mark.parametrize("epsilon", [0.0, 1e-12])
    def test_zero_kernel_and_the_way_out_of_it(self, epsilon):
        kernel = np.zeros((3, 2), np.float32)
        gamma, state = norms.sigma_reparam_init(kernel)
        norm = lambda kernel, state: norms.sigma_reparam(kernel, gamma, state, epsilon=epsilon)
        (w, state), vjp = jax.vjp(lambda kernel: norm(kernel, state), kernel)
        np.testing.assert_array_equal(w, 0)
        chex.assert_tree_all_finite(vjp((np.ones_like(w), jax.tree.map(jnp.zeros_like, state))))
        np.testing.assert_allclose(np.linalg.norm(state.u), 1, rtol=1e-6)
        for output in (0, 1):  # one of them is orthogonal to u
            kernel = np.zeros((3, 2), np.float32)
            kernel[1, output] = 5
            np.testing.assert_allclose(norm(kernel, state)[0], kernel / 5, rtol=1e-6)

    @pytest.mark.parametrize("size", [1e-20, 1e4, 1e16])
    def test_extreme_sizes(self, size):
        kernel = random_kernel((6, 4)) * np.float32(size)
        w, state = norms.spectral_normalization(
            kernel, norms.spectral_normalization_init(kernel), epsilon=1e-30
        )
        np.testing.assert_allclose(spectral_norm(w), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(state.u), 1, rtol=1e-5)

    def test_state_carries_no_gradient(self):
        kernel = random_kernel()
        _, state = norms.sigma_reparam_init(kernel)
        through_state = lambda kernel: sum(
            jnp.sum(field) for field in norms.sigma_reparam(kernel, 1.0, state)[1]
        )
        np.testing.assert_array_equal(jax.grad(through_state)(kernel), 0)

    def test_vmap_and_a_sharded_kernel(self):
        kernels = random_kernel((3, 8, 16))
        init = jax.vmap(lambda kernel: norms.sigma_reparam_init(kernel, 2.0))(kernels)
        mapped, states = jax.vmap(norms.sigma_reparam)(kernels, *init)
        for i, kernel in enumerate(kernels):
            gamma, state = norms.sigma_reparam_init(kernel, 2.0)
            w, state = norms.sigma_reparam(kernel, gamma, state)
            np.testing.assert_allclose(mapped[i], w, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(states.sigma[i], state.sigma, rtol=1e-5)
        mesh = make_mesh({"fsdp": 2, "tensor": 4})
        sharding = NamedSharding(mesh, P("fsdp", "tensor"))
        ours, _ = jax.jit(norms.sigma_reparam)(jax.device_put(kernel, sharding), gamma, state)
        assert ours.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(ours, w, rtol=1e-4, atol=1e-5)

    def test_bad_input_is_named(self):
        kernel = random_kernel()
        gamma, state = norms.sigma_reparam_init(kernel)
        with pytest.raises(TypeError, match="kernel must have a floating-point type"):
            norms.sigma_reparam_init(kernel.astype(int))
        with pytest.raises(ValueError, match="kernel must have shape"):
            norms.sigma_reparam_init(kernel[0])
        with pytest.raises(ValueError, match="kernel must have shape"):
            norms.sigma_reparam_init(kernel[:0])
        with pytest.raises(
            ValueError, match="gamma_init must be a number or 'spectral', got 'one'"
        ):
            norms.sigma_reparam_init(kernel, "one")
        with pytest.raises(ValueError, match=r"gamma must have shape \(\)"):
            norms.sigma_reparam(kernel, gamma[None], state)
        with pytest.raises(ValueError, match=r"u must have shape \(6,\)"):
            norms.sigma_reparam(kernel.T, gamma, state)
        with pytest.raises(ValueError, match="epsilon must be in"):
            norms.sigma_reparam(kernel, gamma, state, epsilon=-1.0)
        with pytest.raises(ValueError, match="num_steps must be in"):
            norms.spectral_norm_power_iteration(kernel, state.u, 0)
