import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats
from sklearn.datasets import load_digits

from jaxref.quantization import (
    bit_linear,
    dequantize,
    pack_trits,
    quantize_rowwise,
    ternary_weight_quantize,
    unpack_trits,
)

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "bit_linear.npz")

linear = jax.jit(bit_linear, static_argnames=("scale", "activation_bits", "norm"))
ternary = jax.jit(ternary_weight_quantize, static_argnames="scale")


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ("AbsMedian", "median", "layer"),
        ("AbsMean", "mean", "layer"),
        ("transformers", "mean", None),
    )
    def test_matches_the_authors_and_transformers(self, name, scale, norm):
        f = self.variant(lambda x, w: bit_linear(x, w, scale=scale, norm=norm))
        y, vjp = jax.vjp(f, TORCH["x"], TORCH["w"])
        np.testing.assert_allclose(y, TORCH[name], rtol=1e-5, atol=1e-5)
        x_gradient, w_gradient = vjp(TORCH["cotangent"])
        np.testing.assert_allclose(x_gradient, TORCH[f"{name}_x_gradient"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(w_gradient, TORCH[f"{name}_w_gradient"], rtol=1e-4, atol=1e-5)

    @parameterized.parameters(("median", "layer", 8), ("mean", "rms", 4), ("median", None, 8))
    def test_packed_integers_give_what_fake_quantization_gives(self, scale, norm, activation_bits):
        x, w, bias = random((2, 3, 16)), random((16, 6), 1), random((6,), 2)
        normed = np.float64(x)
        if norm == "layer":
            normed -= normed.mean(-1, keepdims=True)
        if norm:
            normed /= np.sqrt(np.mean(normed**2, -1, keepdims=True) + 1e-5)
        largest = 2 ** (activation_bits - 1) - 1
        step = np.abs(normed).max(-1, keepdims=True) / largest
        gamma = (np.median if scale == "median" else np.mean)(np.abs(np.float64(w)))
        x_hat, w_hat = step * np.rint(normed / step), gamma * np.clip(np.rint(w / gamma), -1, 1)
        q = ternary(w, scale=scale)
        np.testing.assert_allclose(dequantize(q), w_hat, rtol=1e-6)
        for kernel in (w, q):
            y = linear(x, kernel, bias, scale=scale, norm=norm, activation_bits=activation_bits)
            np.testing.assert_allclose(y, x_hat @ w_hat + bias, rtol=1e-5, atol=1e-5)

    def test_share_of_zeros_of_normally_distributed_weights(self):
        w = random((400, 400))
        for scale, gamma in (("median", stats.norm.ppf(0.75)), ("mean", np.sqrt(2 / np.pi))):
            expected = 1 - 2 * stats.norm.cdf(-gamma / 2)
            q = ternary(w, scale=scale)
            np.testing.assert_allclose(q.scale[0, 0], gamma, rtol=0.01)
            np.testing.assert_allclose(np.mean(q.codes == 0), expected, atol=0.005)

    def test_the_median_of_an_even_number_is_the_middle(self):
        q = ternary_weight_quantize(jnp.array([[1.0, -2.0], [4.0, 100.0]]))
        np.testing.assert_array_equal(q.scale, [[3.0]])
        np.testing.assert_array_equal(q.codes, [[0, -1], [1, 1]])


def train_digits(layer, steps=120):
    """The accuracy of two layers on held-out digits, of a quarter as many classes as pixels."""
    digits = load_digits()
    x, labels = digits.data.astype(np.float32) / 16, digits.target
    parameters = [0.2 * random((64, 48)), 0.2 * random((48, 10), 1)]
    optimizer = optax.adam(3e-3)

    def loss(parameters):
        hidden = jax.nn.relu(layer(x[:1200], parameters[0]))
        logits = layer(hidden, parameters[1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[:1200]))

    def step(carry, _):
        parameters, state = carry
        updates, state = optimizer.update(jax.grad(loss)(parameters), state)
        return (optax.apply_updates(parameters, updates), state), None

    @jax.jit
    def train(parameters):
        carry = parameters, optimizer.init(parameters)
        parameters, _ = jax.lax.scan(step, carry, length=steps)[0]
        return layer(jax.nn.relu(layer(x[1200:], parameters[0])), parameters[1])

    return np.mean(np.argmax(train(parameters), -1) == labels[1200:])


@pytest.mark.claim("bitnet-b158-reloaded")
def test_ternary_layers_learn_nearly_as_well_and_the_median_ignores_outliers():
    w = random((1000, 1)).ravel()
    median, mean = (ternary_weight_quantize(w, scale=scale).codes for scale in ("median", "mean"))
    w[np.argmax(np.abs(w))] *= 1000
    np.testing.assert_array_equal(ternary_weight_quantize(w).codes, median)
    assert np.mean(mean == 0) < 0.4
    assert np.mean(ternary_weight_quantize(w, scale="mean").codes == 0) > 0.8
    plain, ternary_accuracy = train_digits(lambda x, w: x @ w), train_digits(bit_linear)
    assert plain > 0.85
    assert ternary_accuracy > plain - 0.05


class TestTernaryWeights:
    @pytest.mark.parametrize("scale", ["median", "mean"])
    def test_three_values_whatever_the_size_of_the_weights(self, scale):
        w = random((16, 6))
        q = ternary(w, scale=scale)
        np.testing.assert_array_equal(np.unique(q.codes), [-1, 0, 1])
        for size in (1e-4, 1e4, 1e30):
            scaled = ternary(np.float32(size * w), scale=scale)
            np.testing.assert_array_equal(scaled.codes, q.codes)
            np.testing.assert_allclose(scaled.scale, size * q.scale, rtol=1e-5)

    def test_two_bits_a_weight_and_five_trits_to_the_byte(self):
        q = ternary(random((16, 20)))
        assert q.shape == (16, 20)
        assert q.nbytes == 16 * 20 / 4 + 4
        trits = jax.jit(pack_trits)(q.codes)
        assert trits.nbytes == 16 * 20 / 5
        assert trits.max() < 243
        np.testing.assert_array_equal(jax.jit(unpack_trits)(trits), q.codes)

    def test_trits_of_any_number(self):
        rng = np.random.default_rng(0)
        for shape in ((1,), (3, 7), (2, 0), (4,)):
            codes = rng.integers(-1, 2, shape).astype(np.int8)
            packed = pack_trits(codes)
            assert packed.shape == (*shape[:-1], -(-shape[-1] // 5))
            unpacked = unpack_trits(packed, padding=-shape[-1] % 5)
            assert unpacked.dtype == jnp.int8
            np.testing.assert_array_equal(unpacked, codes)

    def test_zero_constant_single_and_mostly_zero_kernels(self):
        for scale in ("median", "mean"):
            zeros = ternary(np.zeros((4, 3), np.float32), scale=scale)
            assert not zeros.codes.any()
            assert np.all(zeros.scale > 0)
            for shape in ((4, 3), (1, 1)):
                constant = ternary(np.full(shape, -0.3, np.float32), scale=scale)
                np.testing.assert_allclose(dequantize(constant), np.full(shape, -0.3), rtol=1e-6)
        sparse = np.zeros((4, 3), np.float32)
        sparse[0] = 1.0, -2.0, 3.0
        np.testing.assert_array_equal(ternary(sparse).codes, np.sign(sparse))
        np.testing.assert_allclose(ternary(sparse).scale, [[1e-5]], rtol=1e-6)
        assert ternary_weight_quantize(jnp.zeros((0, 3))).shape == (0, 3)


class TestBitLinear:
    def test_the_gradient_reaches_bias_and_scales(self):
        x, q, bias = random((5, 16)), ternary(random((16, 6), 1)), random((6,), 2)
        f = lambda scale, bias: linear(x, dataclasses.replace(q, scale=scale), bias).sum()
        scale_gradient, bias_gradient = jax.grad(f, argnums=(0, 1))(q.scale, bias)
        np.testing.assert_array_equal(bias_gradient, np.full(6, 5.0))
        expected = f(q.scale, 0 * bias)
        np.testing.assert_allclose(scale_gradient.sum() * q.scale[0, 0], expected, rtol=1e-4)

    def test_inputs_without_size_or_variance(self):
        w = random((16, 6))
        for value in (0.0, 3.0, 1e4):
            x = np.full((2, 16), value, np.float32)
            y, vjp = jax.vjp(linear, x, w)
            np.testing.assert_allclose(y, np.zeros((2, 6)), atol=1e-3)
            chex.assert_tree_all_finite(vjp(jnp.ones_like(y)))
        assert linear(np.zeros((0, 16), np.float32), w).shape == (0, 6)

    def test_the_norm_takes_the_size_of_the_inputs(self):
        x, w = random((5, 16)), random((16, 6), 1)
        np.testing.assert_allclose(linear(1e4 * x, w), linear(x, w), rtol=0.05, atol=0.05)
        far = linear(1e4 * x, w, norm=None)
        np.testing.assert_allclose(far, 1e4 * linear(x, w, norm=None), rtol=1e-3, atol=1)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        x, w = random((5, 16)).astype(dtype), random((16, 6), 1).astype(dtype)
        y, vjp = jax.vjp(linear, x, w)
        assert {y.dtype, *(g.dtype for g in vjp(jnp.ones_like(y)))} == {jnp.dtype(dtype)}
        wide = linear(x.astype(jnp.float32), w.astype(jnp.float32))
        np.testing.assert_allclose(np.float32(y), wide, rtol=0.05, atol=0.1)

    def test_vmap_over_kernels(self):
        x, w = random((5, 16)), random((3, 16, 6), 1)
        mapped = jax.jit(jax.vmap(bit_linear, (None, 0)))(x, w)
        for one, y in zip(w, mapped, strict=True):
            np.testing.assert_allclose(linear(x, one), y, rtol=1e-5, atol=1e-6)

    def test_sharded_batch(self):
        x, w = random((16, 16)), random((16, 6), 1)
        f = jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(bit_linear(x, w)))))
        mesh = jax.make_mesh((8,), ("data",))
        place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
        value, gradient = f(place(w), place(x, "data"))
        expected_value, expected_gradient = f(w, x)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 3))
    for call, error, message in (
        (lambda: ternary_weight_quantize(w, scale="max"), ValueError, "scale must be 'median' or"),
        (lambda: ternary_weight_quantize(w, epsilon=0), ValueError, "epsilon must be in"),
        (lambda: ternary_weight_quantize(jnp.float32(1)), ValueError, "must have an axis to pack"),
        (lambda: ternary_weight_quantize(w * jnp.nan), ValueError, "w must be finite"),
        (lambda: ternary_weight_quantize(jnp.ones(3, int)), TypeError, "w must have a floating"),
        (lambda: bit_linear(x, w[1:]), ValueError, r"w must have shape \[8, out\], got \(7, 3\)"),
        (lambda: bit_linear(x, w, jnp.ones(4)), ValueError, "bias must broadcast to shape"),
        (lambda: bit_linear(x, w, norm="batch"), ValueError, "norm must be 'layer', 'rms' or"),
        (lambda: bit_linear(x, w, activation_bits=1), ValueError, "bits must be in"),
        (lambda: bit_linear(jnp.ones((4, 8), int), w), TypeError, "x must have a floating"),
        (
            lambda: bit_linear(x, quantize_rowwise(w), norm=None),
            ValueError,
            r"w must have a scale of shape \[1, out\]",
        ),
        (lambda: pack_trits(jnp.ones(3)), TypeError, "codes must be integers, got float32"),
        (lambda: pack_trits(jnp.int8(1)), ValueError, "codes must have an axis to pack along"),
        (lambda: unpack_trits(jnp.ones(3, jnp.int8)), TypeError, "values must be uint8, got int8"),
        (lambda: unpack_trits(jnp.uint8(1)), ValueError, "values must have an axis to unpack"),
        (
            lambda: unpack_trits(jnp.ones(3, jnp.uint8), padding=5),
            ValueError,
            r"padding must be in \[0, 4\]",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
