import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxref import norms

SHRINK = norms.shrink_embedding_gradient


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def deep_norm64(x, output, scale, bias, alpha, epsilon):
    """The formula in float64."""
    z = alpha * x.astype(np.float64) + output
    centred = z - z.mean(-1, keepdims=True)
    return scale * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) + bias


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_match_the_formula(self):
        x, output, scale, bias = random((3, 6)), random((3, 6), 1), random(6, 2), random(6, 3)
        for num_layers, alpha in ((8, 4.0), (70, 140**0.5)):
            run = self.variant(
                lambda *a: norms.deep_norm_residual(*a, num_layers=num_layers, epsilon=0.1)
            )
            expected = deep_norm64(x, output, scale, bias, alpha, 0.1)
            np.testing.assert_allclose(run(x, output, scale, bias), expected, rtol=1e-4, atol=1e-5)
        ours = norms.deep_norm_residual(x, output, scale, bias, num_layers=8, alpha=1.5)
        expected = deep_norm64(x, output, scale, bias, 1.5, 1e-6)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_embedding_gradient_is_shrunk_and_the_value_is_not(self):
        x, cotangent = 1e4 * random((5, 7)), random((5, 7), 1)
        for alpha in (0.1, 1.0, 0.0):
            y, vjp = jax.vjp(self.variant(lambda x: SHRINK(x, alpha)), x)
            np.testing.assert_array_equal(y, x)
            np.testing.assert_allclose(vjp(cotangent)[0], alpha * cotangent, rtol=1e-6)

    def test_gradient_against_finite_differences(self):
        x, output = random((2, 5)).astype(float), random((2, 5), 1).astype(float)
        with jax.enable_x64(True):
            run = jax.jit(lambda *a: norms.deep_norm_residual(*a, num_layers=3, epsilon=0.1))
            check_grads(run, (x, output, x[0], output[0]), order=1, modes=["rev", "fwd"])

    def test_constants_of_glm(self):
        """Of its 70 layers, and the initial weights by JAX's Xavier-normal initializer."""
        np.testing.assert_allclose(norms.deep_norm_alpha(70), 11.832159566)
        np.testing.assert_allclose(norms.deep_norm_gain(70), 0.0845154255)
        init = jax.nn.initializers.variance_scaling(
            norms.deep_norm_gain(70) ** 2, "fan_avg", "normal"
        )
        weights = init(jax.random.key(0), (400, 600))
        np.testing.assert_allclose(weights.std(), 0.0845154255 * (2 / 1000) ** 0.5, rtol=0.02)


class TestClaims:
    @pytest.mark.claim("glm-130b")
    def test_a_step_of_fixed_size_moves_a_deep_stack_far_less_than_post_norm(self):
        """Of 64 blocks and of 4, each weight moved by 0.01 along the sign of its gradient, as Adam
        does first. Neither the larger skip branch nor the smaller weights are enough alone."""

        width = 16
        x, target = random((16, width), 2), random((16, width), 3)

        def stack(weights, alpha):
            def sublayer(x, pair):
                output = jax.nn.relu(x @ pair[0]) @ pair[1]
                return norms.deep_norm_residual(x, output, num_layers=1, alpha=alpha), None

            return jax.lax.scan(sublayer, x, weights)[0]

        @jax.jit
        def moved(weights, alpha):
            loss = lambda w: (jnp.sum(target * (y := stack(w, alpha))), y)
            gradient, before = jax.grad(loss, has_aux=True)(weights)
            after = stack(weights - 0.01 * jnp.sign(gradient), alpha)
            return jnp.linalg.norm(after - before) / jnp.linalg.norm(before)

        def change(num_layers, alpha, gain):
            weights = random((2 * num_layers, 2, width, width), 1) / width**0.5
            return float(moved(gain * weights, alpha))

        alpha, gain = norms.deep_norm_alpha, norms.deep_norm_gain
        shallow, deep = (change(n, alpha(n), gain(n)) for n in (4, 64))
        assert deep < 0.15
        assert 0.5 * shallow < deep < 2 * shallow
        for other in ((1.0, 1.0), (alpha(64), 1.0), (1.0, gain(64))):
            assert change(64, *other) > 5 * deep


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_computes_in_float32(dtype):
    x, output = (jnp.asarray(1e4 * random((3, 6), seed), dtype) for seed in range(2))
    ours = norms.deep_norm_residual(x, output, num_layers=70)  # √140 x overflows float16
    assert ours.dtype == dtype
    wide = norms.deep_norm_residual(*(a.astype(jnp.float32) for a in (x, output)), num_layers=70)
    np.testing.assert_array_equal(ours, wide.astype(dtype))
    np.testing.assert_array_equal(SHRINK(x), x)
    assert SHRINK(x).dtype == dtype


def test_zero_and_extreme_input_stays_finite():
    for size in (0.0, 1e4):
        x = size * random((3, 6))
        norm = lambda x: norms.deep_norm_residual(x, x, num_layers=2, epsilon=0.0)
        y, vjp = jax.vjp(norm, x)
        assert np.all(np.isfinite(y))
        assert np.all(np.isfinite(vjp(np.ones_like(x))[0]))


def test_bad_input_is_named():
    x = random((3, 6))
    with pytest.raises(ValueError, match="num_layers must be in"):
        norms.deep_norm_residual(x, x, num_layers=0)
    with pytest.raises(ValueError, match="alpha must be in"):
        norms.deep_norm_residual(x, x, num_layers=2, alpha=0.0)
    with pytest.raises(ValueError, match=r"sublayer_output must have shape \(3, 6\)"):
        norms.deep_norm_residual(x, x[:1], num_layers=2)
    with pytest.raises(ValueError, match=r"scale must have shape \(6,\)"):
        norms.deep_norm_residual(x, x, x, num_layers=2)
    with pytest.raises(TypeError, match="x must have a floating-point type"):
        norms.deep_norm_residual(x.astype(int), x, num_layers=2)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        SHRINK(x, 1.5)
    with pytest.raises(TypeError, match="x must have a floating-point type"):
        SHRINK(x.astype(int))
