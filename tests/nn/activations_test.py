from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.stats import norm

from jaxref.nn import (
    MLP,
    CRReLU,
    activation_entropy,
    crrelu,
    entropy_correction,
    worst_activation,
)

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "crrelu.npz")


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_and_gradients_match_torch(self):
        x, epsilon, cotangent = (TORCH[n].astype("f") for n in ("x", "epsilon", "cotangent"))
        y, vjp = jax.vjp(self.variant(crrelu), x, epsilon)
        np.testing.assert_allclose(y, TORCH["y"], rtol=1e-5, atol=1e-6)
        for ours, name in zip(vjp(cotangent), ("grad_x", "grad_epsilon")):
            np.testing.assert_allclose(ours, TORCH[name], rtol=1e-5, atol=1e-6)

    def test_entropies_in_closed_form(self):
        grid = jnp.linspace(-12.0, 12.0, 4001)
        ours = activation_entropy(lambda t: t / 1.5, norm.pdf, grid)  # scales by 1.5
        expected = 0.5 * np.log(2 * np.pi * np.e) + np.log(1.5)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_correction_in_closed_form(self):
        t = np.linspace(0.2, 2.0, 7, dtype="f")
        ours = jax.jit(entropy_correction(lambda t: t**3, norm.pdf))(t)
        p = np.exp(-(np.float64(t) ** 6) / 2) / np.sqrt(2 * np.pi)
        expected = -(-(t**3) * p * 3 * t**2 + p * 6 * t / (3 * t**2))
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


class TestClaims:
    @pytest.mark.claim("crrelu-eafo")
    def test_the_correction_of_relu_descends_the_entropy_that_the_distribution_maximises(self):
        eta = entropy_correction(lambda t: t, norm.pdf)
        t = np.linspace(-3, 3, 13, dtype="f")
        np.testing.assert_allclose(eta(t), t * norm.pdf(t), atol=1e-6)
        added = crrelu(t, 0.3) - jax.nn.relu(t)
        np.testing.assert_allclose(added, 0.3 * np.sqrt(2 * np.pi) * eta(t), atol=1e-6)
        # G[y + h b] - G[y] is -h ∫ η b, for a bump b that vanishes at the ends
        grid = jnp.linspace(0.02, 0.98, 4001)
        bump = lambda t: jnp.sin(np.pi * (t - 0.02) / 0.96) ** 2 * (1 + t)
        entropy = jax.jit(
            lambda h: activation_entropy(
                lambda t: jax.scipy.special.logit(t) + h * bump(t), norm.pdf, grid
            )
        )
        slope = (entropy(0.02) - entropy(-0.02)) / 0.04
        eta = entropy_correction(jax.scipy.special.logit, norm.pdf)
        np.testing.assert_allclose(slope, -jnp.trapezoid(eta(grid) * bump(grid), grid), rtol=1e-2)
        # among the maps onto (0, 1) the distribution itself has the most entropy
        grid = jnp.linspace(1e-4, 1 - 1e-4, 4001)
        quantile = jax.scipy.special.ndtri
        entropies = [
            float(activation_entropy(lambda t, s=s: s * quantile(t), norm.pdf, grid))
            for s in (0.7, 1.0, 1.4)
        ]
        assert abs(entropies[1]) < 1e-3
        assert max(entropies[0], entropies[2]) < -0.05

    def test_worst_activation_makes_any_input_uniform(self):
        x = np.random.default_rng(0).normal(size=20000).astype("f")
        y = worst_activation(x, norm.cdf, low=-2.0, high=3.0)
        np.testing.assert_allclose(np.histogram(y, 5, (-2, 3))[0] / 20000, 0.2, atol=0.01)

    def test_shape_of_the_correction(self):
        x = np.linspace(-6, 6, 241, dtype="f")
        np.testing.assert_array_equal(crrelu(x, 0.0), jax.nn.relu(x))
        added = np.asarray(crrelu(x, 0.1) - jax.nn.relu(x))
        np.testing.assert_allclose(added, -added[::-1], atol=1e-6)
        assert x[added.argmax()] == pytest.approx(1)
        assert added.max() == pytest.approx(0.1 * np.exp(-0.5), rel=1e-5)
        slope = jax.grad(crrelu)(0.0, 0.1)
        assert slope == pytest.approx(0.1)


class TestModule:
    def test_learns_epsilon_as_the_activation_of_an_mlp(self):
        mlp = MLP(2, 3, activation=CRReLU, rngs=nnx.Rngs(0))
        assert mlp.activation.epsilon[...] == np.float32(0.01)
        assert mlp.activation.epsilon.get_metadata()["axes"] == ()
        slopes = nnx.grad(lambda mlp: jnp.sum(mlp(jnp.ones((4, 2)))))(mlp)
        assert nnx.to_pure_dict(slopes)["activation"]["epsilon"] != 0


class TestEdges:
    def test_extremes_have_finite_gradients(self):
        x = np.array([0, 1e-20, 1e4, -1e4, 1e25, -1e25], "f")
        y, slopes = jax.vmap(jax.value_and_grad(crrelu, argnums=(0, 1)))(x, np.full(6, 0.1, "f"))
        np.testing.assert_allclose(y, np.maximum(x, 0), atol=1e-6)
        chex.assert_tree_all_finite(slopes)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        x = jnp.asarray([-300.0, -1.0, 0.5, 300.0], dtype)
        ours = crrelu(x, 0.1)
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, crrelu(x.astype("f"), 0.1).astype(dtype))

    def test_outputs_without_density_count_for_nothing(self):
        grid = jnp.linspace(-100.0, 100.0, 20001)
        ours = activation_entropy(lambda t: t, norm.pdf, grid)
        np.testing.assert_allclose(ours, 0.5 * np.log(2 * np.pi * np.e), rtol=1e-4)

    def test_bad_input_is_named(self):
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            crrelu(np.ones(3, int))
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            worst_activation(np.ones(3, int), norm.cdf)
        with pytest.raises(ValueError, match="grid must be a vector"):
            activation_entropy(lambda t: t, norm.pdf, np.ones(1, "f"))
