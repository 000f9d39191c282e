from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import MLP, Linear, ReducedPrecisionLinear
from jaxref.quantization import reduced_precision_dot, simulate_float

FP8 = {
    "exponent_bits": 4,
    "mantissa_bits": 3,
    "rounding": "nearest",
    "scaled": True,
    "gradient_exponent_bits": 5,
    "gradient_mantissa_bits": 2,
}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(linear=ReducedPrecisionLinear, **kwargs):
    axes = ("embed", None, "heads", None)
    return linear((2, 3), (4, 5), axes=axes, use_bias=True, rngs=nnx.Rngs(0), **kwargs)


def test_is_the_function_over_flat_features():
    linear, x, weights = build(**FP8), random((3, 7, 2, 3)), random((3, 7, 4, 5), 2)
    linear.bias[...] = random((4, 5), 1)
    kernel = linear.kernel[...].reshape(6, 20)

    @jax.jit
    def expected(x, w, weights):
        y, vjp = jax.vjp(lambda w: reduced_precision_dot(x, w, **FP8), w)
        return y, *vjp(weights)

    @nnx.jit
    def ours(linear, x, weights):
        def loss(linear):
            y = linear(x)
            return jnp.sum(weights * y), y

        gradient, y = nnx.grad(loss, has_aux=True)(linear)
        return y - linear.bias[...], gradient.kernel[...], linear.effective_kernel()

    y, gradient, used = ours(linear, x, weights)
    y_expected, gradient_expected = expected(x.reshape(21, 6), kernel, weights.reshape(21, 20))
    np.testing.assert_allclose(y.reshape(21, 20), y_expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.reshape(6, 20), gradient_expected, rtol=1e-5, atol=1e-6)
    assert np.any(used != kernel)
    names = ("exponent_bits", "mantissa_bits", "rounding", "scaled")
    np.testing.assert_allclose(
        used, simulate_float(kernel, **{name: FP8[name] for name in names}), rtol=1e-6
    )


def test_within_an_mlp_in_half_precision_and_with_all_of_its_bits():
    x, ys = random((3, 8)), []
    for linear, mantissa_bits in (
        (ReducedPrecisionLinear, 0),
        (ReducedPrecisionLinear, 7),
        (Linear, None),
    ):
        options = {} if mantissa_bits is None else {"mantissa_bits": mantissa_bits}
        mlp = MLP(8, 16, linear=partial(linear, **options), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        y = nnx.jit(lambda mlp, x: mlp(x))(mlp, x)
        assert y.dtype == jnp.bfloat16
        ys.append(np.float32(y))
    np.testing.assert_allclose(ys[1], ys[2], rtol=2e-2, atol=2e-2)
    assert np.max(np.abs(ys[0] - ys[2])) > 0.1 * np.max(np.abs(ys[2]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x must have shape \[..., 2, 3\], got \(3, 6\)"):
        build()(jnp.ones((3, 6)))
    with pytest.raises(ValueError, match=r"exponent_bits must be in \[2, 8\], got 9"):
        build(exponent_bits=9)(jnp.ones((3, 2, 3)))
