"""The linear map of quantized kernels of every format."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.quantization import (
    QuantSpec,
    baq_quantize,
    codebook_quantize,
    dequantize,
    dequantize_kernel,
    int8_matmul,
    llm_int8_matmul,
    lnq_quantize,
    power_quantize,
    pyramid_quantize,
    quantize,
    quantize_rowwise,
    quantized_linear,
    ternary_weight_quantize,
)

KEY = jax.random.key(0)
OUTPUTS = QuantSpec(granularity="channel", axis=1)
BLOCKS = QuantSpec(bits=4, granularity="block", axis=0, block_size=16)


def random_layer(inputs=48, outputs=12):
    keys = jax.random.split(KEY)
    return jax.random.normal(keys[0], (5, inputs)), jax.random.normal(keys[1], (inputs, outputs))


def spec(**options):
    return lambda w: quantize(w, QuantSpec(**options))


FORMATS = {
    "per output": lambda w: quantize(w, OUTPUTS),
    "per tensor, 2 bits": spec(bits=2),
    "blocks": lambda w: quantize(w, BLOCKS),
    "asymmetric blocks": spec(bits=3, granularity="block", axis=0, block_size=20, symmetric=False),
    "per input": spec(granularity="channel", axis=0),
    "blocks of outputs": spec(granularity="block", axis=1, block_size=5),
    "float8": spec(format="float8_e4m3fn", granularity="block", axis=0, block_size=16),
    "ternary": ternary_weight_quantize,
    "lnq": lambda w: lnq_quantize(w, jnp.eye(len(w)), bits=3),
    "baq": lambda w: baq_quantize(w, jnp.eye(len(w)), 4.0),
    "power": lambda w: power_quantize(w, 0.6, OUTPUTS),
    "pyramid": lambda w: pyramid_quantize(w, group_size=16, pulses=12, key=KEY),
    "codebooks": lambda w: codebook_quantize(
        w, codebook_size=8, group_size=4, iterations=2, key=KEY
    ),
}


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*FORMATS)
    def test_is_the_product_with_the_dequantized_kernel(self, name):
        x, w = random_layer()
        weight = FORMATS[name](w)
        y = self.variant(quantized_linear)(x, weight)
        np.testing.assert_allclose(y, x @ dequantize_kernel(weight), rtol=1e-4, atol=1e-4)

    def test_integer_products(self):
        x, w = random_layer()
        x = x.at[:, 3].set(20 * x[:, 3])
        per_output, in_blocks = FORMATS["per output"](w), FORMATS["blocks"](w)
        x_q = quantize_rowwise(x)
        linear = jax.jit(quantized_linear, static_argnames=("activations", "max_outliers"))
        for weight in (per_output, in_blocks):
            ours = linear(x, weight, activations="int8")
            np.testing.assert_allclose(ours, int8_matmul(x_q, weight), rtol=1e-5, atol=1e-4)
            theirs = dequantize(x_q) @ dequantize(weight)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
        ours = linear(x, per_output, activations="llm_int8", max_outliers=2)
        theirs = llm_int8_matmul(x, per_output, max_outliers=2)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        exact = x @ dequantize(per_output)
        plain = linear(x, per_output, activations="int8")
        assert np.abs(ours - exact).max() < 0.3 * np.abs(plain - exact).max()

    def test_kernels_agree(self):
        x, w = random_layer(64, 12)
        for options, weight in (
            ({}, quantize(w, QuantSpec(bits=4, granularity="block", axis=0, block_size=32))),
            ({}, FORMATS["lnq"](w)),
            ({"activations": "int8"}, FORMATS["per output"](w)),
        ):
            expected = quantized_linear(x, weight, implementation="xla", **options)
            for kernel in ("pallas_tpu_interpret", "pallas_gpu_interpret"):
                ours = quantized_linear(x, weight, implementation=kernel, **options)
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


class TestGradients:
    @pytest.mark.parametrize("activations", [None, "int8", "llm_int8"])
    def test_pass_straight_to_the_input(self, activations):
        x, w = random_layer()
        weight = FORMATS["per output"](w)
        slope = jax.grad(lambda x: quantized_linear(x, weight, activations=activations).sum())(x)
        expected = jnp.broadcast_to(dequantize(weight).sum(1), x.shape)
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4)

    def test_reach_scales_and_levels(self):
        x, w = random_layer()
        per_output, lnq = FORMATS["per output"](w), FORMATS["lnq"](w)
        for weight, pick in ((per_output, "scale"), (lnq, "codebook")):
            slopes = jax.grad(lambda q: quantized_linear(x, q).sum(), allow_int=True)(weight)
            through = jax.grad(lambda q: (x @ dequantize_kernel(q)).sum(), allow_int=True)(weight)
            np.testing.assert_allclose(
                getattr(slopes, pick), getattr(through, pick), rtol=1e-4, atol=1e-4
            )


class TestEdges:
    def test_half_precision_leading_axes_and_no_tokens(self):
        x, w = random_layer()
        for name in ("blocks", "lnq", "power"):
            weight = FORMATS[name](w)
            y = quantized_linear(x.astype(jnp.bfloat16)[:4].reshape(2, 2, -1), weight)
            assert y.dtype == jnp.bfloat16
            np.testing.assert_allclose(
                y.astype("f").reshape(4, -1), x[:4] @ dequantize_kernel(weight), atol=0.2
            )
            assert quantized_linear(x[:0], weight).shape == (0, 12)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda x, w: quantized_linear(x, w), TypeError, "weight must be one of QTensor"),
            (
                lambda x, w: quantized_linear(x[:, 1:], FORMATS["blocks"](w)),
                ValueError,
                r"weight must have shape \[47, out\]",
            ),
            (
                lambda x, w: quantized_linear(x, FORMATS["lnq"](w), activations="int8"),
                ValueError,
                "weight must be a QTensor",
            ),
            (
                lambda x, w: quantized_linear(x, FORMATS["blocks"](w), activations="fp4"),
                ValueError,
                "activations must be one of",
            ),
            (
                lambda x, w: quantized_linear(x, FORMATS["blocks"](w), activations="llm_int8"),
                ValueError,
                "w must have a scale of shape",
            ),
            (
                lambda x, w: quantized_linear(
                    x, FORMATS["asymmetric blocks"](w), activations="int8"
                ),
                ValueError,
                "scale of shape",
            ),
            (
                lambda x, w: quantized_linear(x.astype(int), FORMATS["blocks"](w)),
                TypeError,
                "x must have a floating-point type",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        with pytest.raises(error, match=message):
            call(*random_layer())
