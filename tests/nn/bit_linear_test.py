import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import MLP, BitLinear
from jaxref.quantization import bit_linear


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(inputs=(2, 3), outputs=(4, 5), **kwargs):
    axes = ("embed", None, "heads", None)
    return BitLinear(inputs, outputs, axes=axes, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize("options", [{}, {"scale": "mean", "norm": "rms", "activation_bits": 4}])
def test_is_the_function_over_flat_features(options):
    linear, x = build(use_bias=True, **options), random((3, 7, 2, 3))
    linear.bias[...] = random((4, 5), 1)
    kernel = linear.kernel[...].reshape(6, 20)
    expected = bit_linear(x.reshape(3, 7, 6), kernel, linear.bias[...].ravel(), **options)
    np.testing.assert_allclose(linear(x), expected.reshape(3, 7, 4, 5), rtol=1e-5, atol=1e-6)


def test_the_stored_kernel_gives_the_same_in_two_bits():
    linear, x = build(), random((3, 2, 3))
    q = linear.quantized_kernel()
    assert q.values.nbytes == linear.kernel.size / 4
    stored = bit_linear(x.reshape(3, 6), q).reshape(3, 4, 5)
    np.testing.assert_allclose(stored, linear(x), rtol=1e-6)
    effective = linear.effective_kernel()
    assert len(np.unique(effective)) == 3
    np.testing.assert_allclose(np.abs(effective).max(), q.scale[0, 0], rtol=1e-6)


def test_the_latent_kernel_gets_the_gradient_and_keeps_its_type():
    linear, x = build(dtype=jnp.bfloat16), random((3, 2, 3))
    assert linear(x).dtype == jnp.bfloat16
    gradient = nnx.grad(lambda linear: jnp.sum(linear(x).astype(jnp.float32)))(linear)
    assert gradient.kernel[...].dtype == jnp.float32
    assert np.all(np.any(gradient.kernel[...] != 0, axis=(0, 1)))


def test_within_an_mlp_under_jit():
    mlp = MLP(8, 16, linear=BitLinear, rngs=nnx.Rngs(0))
    x = random((3, 8))
    graphdef, state = nnx.split(mlp)
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    assert y.shape == (3, 8)
    np.testing.assert_allclose(y, mlp(x), rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x must have shape \[..., 2, 3\], got \(3, 6\)"):
        build()(jnp.ones((3, 6)))
    with pytest.raises(ValueError, match="norm must be 'layer', 'rms' or None"):
        build(norm="batch")(jnp.ones((3, 2, 3)))
