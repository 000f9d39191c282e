import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.quantization import quantize_float

FORMATS = {  # exponent bits, mantissa bits, the largest number that the type has
    "float4_e2m1fn": (2, 1, 6.0),
    "float6_e2m3fn": (2, 3, 7.5),
    "float6_e3m2fn": (3, 2, 28.0),
    "float8_e4m3fn": (4, 3, 448.0),
    "float8_e5m2": (5, 2, 57344.0),
    "bfloat16": (8, 7, 3e38),
}


rounded = jax.jit(
    quantize_float, static_argnames=("exponent_bits", "mantissa_bits", "block_size", "axis")
)


def random_numbers(shape=(4000,), seed=0):
    """Of sizes from 2^-20 to 2^10."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 2.0 ** rng.integers(-20, 10, shape)).astype(np.float32)


def all_numbers(exponent_bits, mantissa_bits):
    """The numbers of the format that are not negative, code by code."""
    bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits else 0
    numbers = []
    for e in range(2**exponent_bits):
        for m in range(2**mantissa_bits):
            if e:
                numbers.append(2.0 ** (e - bias) * (1 + m / 2**mantissa_bits))
            else:
                numbers.append(2.0 ** (1 - bias) * m / 2**mantissa_bits)
    return np.array(numbers)


def quantize64(x, exponent_bits, mantissa_bits, block_size=None):
    """The nearest number by search, the last axis in blocks; of two the one with the even code."""
    numbers = all_numbers(exponent_bits, mantissa_bits)
    blocks = (
        [x] if block_size is None else np.split(x, range(block_size, x.shape[-1], block_size), -1)
    )
    result = []
    for block in blocks:
        block = block.astype(np.float64)
        scale = 1.0
        if block_size is not None:
            scale = np.abs(block).max(-1, keepdims=True) / numbers[-1]
            scale = np.where(scale == 0, 1.0, scale)
        distance = np.abs(np.abs(block / scale)[..., None] - numbers)
        nearest = np.argmin(distance, axis=-1)
        second = np.minimum(nearest + 1, len(numbers) - 1)
        tie = np.take_along_axis(distance, second[..., None], -1)[..., 0] == distance.min(-1)
        nearest = np.where(tie & (nearest % 2 == 1), second, nearest)
        result.append(np.sign(block) * scale * numbers[nearest])
    return np.concatenate(result, -1)


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*FORMATS)
    def test_matches_ml_dtypes(self, name):
        exponent_bits, mantissa_bits, largest = FORMATS[name]
        x = np.clip(random_numbers(), -largest, largest)
        ours = self.variant(
            lambda x: quantize_float(x, exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)
        )(x)
        np.testing.assert_array_equal(ours, x.astype(getattr(ml_dtypes, name)).astype(np.float32))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((2, 1), (4, 3), (3, 0), (1, 2), (0, 3))
    def test_matches_a_search_through_all_codes(self, exponent_bits, mantissa_bits):
        x = random_numbers((3, 50))
        x[1, :7] = 0
        fmt = {"exponent_bits": exponent_bits, "mantissa_bits": mantissa_bits}
        plain = self.variant(lambda x: quantize_float(x, **fmt))(x)
        np.testing.assert_array_equal(plain, quantize64(x, exponent_bits, mantissa_bits))
        blocks = self.variant(lambda x: quantize_float(x, block_size=7, **fmt))(x)
        np.testing.assert_allclose(
            blocks, quantize64(x, exponent_bits, mantissa_bits, 7), rtol=1e-6, atol=0
        )

    def test_every_number_of_the_format_and_the_halves_between(self):
        numbers = all_numbers(4, 3)
        assert numbers[-1] == 480.0  # which float8_e4m3fn has no code for
        fmt = {"exponent_bits": 4, "mantissa_bits": 3}
        np.testing.assert_array_equal(rounded(jnp.float32(numbers), **fmt), numbers)
        middles = (numbers[1:] + numbers[:-1]) / 2
        even = np.where(np.arange(len(middles)) % 2 == 0, numbers[:-1], numbers[1:])
        np.testing.assert_array_equal(rounded(-jnp.float32(middles), **fmt), -even)


def test_sixteen_bits_change_no_half_precision_number():
    x = jnp.asarray(random_numbers((200,)), jnp.bfloat16)
    np.testing.assert_array_equal(rounded(x, exponent_bits=8, mantissa_bits=7), x)
    y = rounded(x, exponent_bits=8, mantissa_bits=7, block_size=8)
    np.testing.assert_allclose(np.float32(y), np.float32(x), rtol=2**-7)


def test_gradient_is_one_and_zero_beyond_the_largest():
    x = jnp.array([-7.0, -6.0, 0.3, 6.1])
    f = lambda x: jnp.sum(rounded(x, exponent_bits=2, mantissa_bits=1) * jnp.arange(1, 5))
    np.testing.assert_array_equal(jax.grad(f)(x), [0, 2, 3, 0])
    f = lambda x: jnp.sum(rounded(x, exponent_bits=2, mantissa_bits=1, block_size=2))
    np.testing.assert_array_equal(jax.grad(f)(x), [1, 1, 1, 1])


def test_blocks_along_another_axis_and_under_vmap():
    x = random_numbers((2, 10, 3))
    f = lambda x, axis: rounded(x, exponent_bits=2, mantissa_bits=1, block_size=4, axis=axis)
    expected = np.swapaxes(f(np.swapaxes(x, 1, 2), -1), 1, 2)
    np.testing.assert_array_equal(f(x, 1), expected)
    np.testing.assert_array_equal(jax.vmap(lambda x: f(x, 0))(x), expected)


def test_smaller_blocks_bound_the_reach_of_outliers():
    x = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    x[:, 3] *= 100
    errors = [
        np.mean((rounded(x, exponent_bits=2, mantissa_bits=1, block_size=b) - x) ** 2)
        for b in (1, 16, 256)
    ]
    assert errors[0] < 1e-8
    assert errors == sorted(errors)
    assert errors[1] < 0.5 * errors[2]


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 1e-36])
@pytest.mark.parametrize("exponent_bits", [1, 4, 8])
def test_extreme_sizes_in_blocks_are_as_unit_sizes(size, exponent_bits):
    x = np.clip(random_numbers((40,)), -1, 1)
    f = lambda x: rounded(x, exponent_bits=exponent_bits, mantissa_bits=3, block_size=40)
    x[0] = 1.0
    np.testing.assert_allclose(
        np.float64(f(np.float32(x * size))) / size, f(x), rtol=1e-6, atol=2e-38 / size
    )


@pytest.mark.parametrize("block_size", [None, 4])
def test_zeros_single_entries_and_none(block_size):
    f = lambda x: rounded(x, exponent_bits=4, mantissa_bits=3, block_size=block_size)
    zeros = jnp.zeros((2, 6))
    np.testing.assert_array_equal(f(zeros), zeros)
    np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(zeros), zeros + 1)
    np.testing.assert_allclose(f(jnp.full((1, 1), -2.5)), -2.5, rtol=1e-6)
    assert f(jnp.zeros((0, 3))).shape == (0, 3)


def test_values_that_are_not_finite():
    f = lambda x, **kwargs: rounded(x, exponent_bits=2, mantissa_bits=1, **kwargs)
    x = jnp.array([1.0, jnp.nan, 2.0, jnp.inf, 1.0, -3.0])
    with pytest.raises(ValueError, match="x must be finite"):
        quantize_float(x, exponent_bits=2, mantissa_bits=1)
    np.testing.assert_array_equal(f(x), [1, np.nan, 2, 6, 1, -3])
    in_blocks = f(x, block_size=2)
    np.testing.assert_array_equal(np.isfinite(in_blocks)[4:], True)
    assert np.isnan(in_blocks[:2]).all()
    assert not np.isfinite(in_blocks[3])


def test_float16_stays_finite():
    x = jnp.array([65504.0, -1.0], jnp.float16)
    for block_size in (None, 2):
        y = rounded(x, exponent_bits=5, mantissa_bits=2, block_size=block_size)
        assert y.dtype == jnp.float16
        assert np.isfinite(y).all()


def test_bad_input_is_named():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"exponent_bits must be in \[0, 8\], got 9"):
        quantize_float(x, exponent_bits=9, mantissa_bits=1)
    with pytest.raises(ValueError, match=r"mantissa_bits must be in \[1, 23\], got 0"):
        quantize_float(x, exponent_bits=0, mantissa_bits=0)
    with pytest.raises(TypeError, match=r"mantissa_bits must be an int, got 1\.5"):
        quantize_float(x, exponent_bits=2, mantissa_bits=1.5)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        quantize_float(x, exponent_bits=2, mantissa_bits=1, block_size=0)
    with pytest.raises(ValueError, match="axis must name axes"):
        quantize_float(x, exponent_bits=2, mantissa_bits=1, block_size=2, axis=2)
    with pytest.raises(TypeError, match="x must have a floating-point type"):
        quantize_float(jnp.ones(3, int), exponent_bits=2, mantissa_bits=1)
