"""Block-wise quantization to 8 bits with the dynamic tree format, and its fast code."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape


@functools.cache
def _dynamic_tree(signed: bool) -> np.ndarray:
    numbers = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        fraction = (np.arange(count) + 0.5) / count
        magnitudes = (0.1 + 0.9 * fraction) * 10.0 ** (exponent - 6)
        numbers += [*magnitudes, *(-magnitudes if signed else ())]
    return np.sort(np.asarray(numbers, np.float32))


def dynamic_tree_codebook(signed: bool = True) -> np.ndarray:
    r"""The 256 numbers of the dynamic tree format: many decades, fine steps in the upper ones.

        ±10^(e-6) (0.1 + 0.9 (k + ½) / F_e),   k = 0 ... F_e - 1,   e = 0 ... 6,   and 0 and 1

    with F_e = 2^e when there are signs and 2^(e+1) when not. The bits before the first one count
    the decade, those after it are a linear fraction within it, so that each decade down halves
    the number of steps.

    Args:
      signed: numbers of both signs (gradients, momentum), or none below 0 (second moments), which
        doubles the steps. Default True.

    Returns:
      float32 `[256]`, strictly increasing, from -0.993 or 0 to 1; the smallest magnitudes above 0
      are 5.5e-7 and 3.25e-7. 1 is there so that the largest entry of a block, if it is positive,
      loses nothing; -1 is not.

    Use it for numbers whose sizes differ by orders of magnitude; where they are alike, the 8 bits
    of a uniform quantization (`jaxref.quantization`) are the finer ones.

    Cost: 256 numbers, computed once.

    Example:
      >>> codebook = dynamic_tree_codebook()
      >>> print(codebook[[0, 126, 127, 128, 255]])
      [-9.929688e-01 -5.500000e-07 0.000000e+00 5.500000e-07 1.000000e+00]

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """
    return _dynamic_tree(signed).copy()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockQuantized:
    """A tensor as one byte an entry and one scale a block: a pytree of the two arrays.

    Args:
      codes: uint8, of the tensor's shape: which entry of the codebook.
      absmax: float32 `[blocks]`, the largest magnitude in every block of the flattened tensor.
      block_size: entries in a block, static; the last block may have fewer.

    `quantize_blockwise` makes one, `dequantize_blockwise` reads it.
    """

    codes: Array
    absmax: Array
    block_size: int = dataclasses.field(metadata={"static": True})


def quantize_blockwise(x: ArrayLike, codebook: ArrayLike, block_size: int = 2048) -> BlockQuantized:
    r"""Quantizes a tensor to 8 bits an entry, with one scale for each block of it.

        N_b = max_{i in b} |x_i|,     code_i = argmin_c |codebook_c - x_i / N_b|

    over blocks b of the row-major flattened tensor. A block of its own keeps an outlier from
    costing the others their precision. A tie goes to the lower code; a block of zeros has N_b = 0.

    Args:
      x: floating point, of any shape.
      codebook: at most 256 increasing numbers in [-1, 1], concrete (not traced); see
        `dynamic_tree_codebook`.
      block_size: at least 1; need not divide the number of entries. Default 2048 as in the paper.

    Returns:
      the codes in the shape of `x` and the scales `[⌈size / block_size⌉]`. A block in which an
      entry is not finite has an infinite scale.

    Raises:
      ValueError: `block_size` below 1, or a `codebook` that is not as above.
      TypeError: `x` is not floating point or `block_size` not an int.

    Use it for tensors that are kept, not computed with: `jaxref.quantization` has the formats that
    matrix products understand.

    Cost: one byte an entry and 4 a block to keep; a binary search of 8 steps for each entry.

    Example:
      >>> codebook = dynamic_tree_codebook()
      >>> q = quantize_blockwise(jnp.array([0.5, 2.0, 1e-4, 3e-4]), codebook, block_size=2)
      >>> print(q.codes, q.absmax)
      [201 255 207 255] [2.e+00 3.e-04]

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """
    check_floating(x=x)
    check_size(block_size=block_size)
    thresholds = _thresholds(_check_codebook(codebook))
    x = jnp.asarray(x, jnp.float32)
    blocks = nan_as_inf(cut_blocks(x.reshape(1, -1), block_size))
    absmax = block_absmax(blocks)
    # XLA multiplies by the inverse of a scale, and flushes that of the largest numbers to 0.
    safe = jnp.where(absmax > 1, 0.25, 1.0)
    normalized = normalize_blocks(safe[..., None] * blocks, safe * absmax)
    codes = jnp.searchsorted(thresholds, normalized).astype(jnp.uint8)
    codes = join_blocks(codes, x.size).reshape(x.shape)
    return BlockQuantized(codes, absmax.reshape(-1), block_size)


def dequantize_blockwise(q: BlockQuantized, codebook: ArrayLike) -> Array:
    r"""The tensor that block-wise codes and scales stand for.

        x_i = codebook[code_i] N_b,     i in b

    Args:
      q: as `quantize_blockwise` returns it.
      codebook: the numbers that it was quantized with.

    Returns:
      float32, of the shape of `q.codes`.

    Raises:
      ValueError: `q.absmax` does not have one scale a block, or a `codebook` that is not as in
        `quantize_blockwise`.

    Use it to read a whole tensor that `quantize_blockwise` stored; `adam_8bit` decodes its moments
    piece by piece instead, so that they never exist whole in float32.

    Cost: one look-up an entry, and the result in float32, four times the codes.

    Example:
      >>> codebook = dynamic_tree_codebook()
      >>> q = quantize_blockwise(jnp.array([0.5, 2.0]), codebook)
      >>> print(dequantize_blockwise(q, codebook))
      [0.4953125 2. ]

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """
    numbers = jnp.asarray(_check_codebook(codebook))
    size = q.codes.size
    check_shape((-(-size // q.block_size),), absmax=q.absmax)
    blocks = numbers[cut_blocks(q.codes.reshape(1, -1), q.block_size)] * q.absmax[None, :, None]
    return join_blocks(blocks, size).reshape(q.codes.shape)


def cut_blocks(x: Array, block_size: int, fill: int = 0) -> Array:
    """`[rows, n]` as `[rows, blocks, block_size]`, the last block filled up."""
    padding = -x.shape[1] % block_size
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=fill)
    return x.reshape(x.shape[0], -1, block_size)


def join_blocks(blocks: Array, length: int) -> Array:
    """What `cut_blocks` cut, as `[rows, length]`."""
    return blocks.reshape(blocks.shape[0], -1)[:, :length]


def nan_as_inf(x: Array) -> Array:
    """x with inf for NaN: both spoil their block."""
    # XLA's maximum of a large array on CPU may lose a NaN; it does not lose this.
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def block_absmax(blocks: Array) -> Array:
    """The largest size in each block."""
    return jnp.max(jnp.abs(blocks), axis=-1, initial=0.0)


def normalize_blocks(blocks: Array, absmax: Array) -> Array:
    """The blocks over their largest sizes; zeros stay."""
    return blocks / jnp.where(absmax == 0, 1, absmax)[..., None]


def zero_code(signed: bool) -> int:
    """The code of 0."""
    return int(np.searchsorted(_dynamic_tree(signed), 0.0))


def decode(codes: Array, signed: bool) -> Array:
    """The numbers that codes stand for."""
    return jnp.asarray(_dynamic_tree(signed)).at[codes].get(mode="promise_in_bounds")


def encode(x: Array, signed: bool) -> Array:
    """The code nearest to x in [-1, 1], as `quantize_blockwise` defines it, in a few operations.

    Floats in increasing order are integers in increasing order (`_ordered`). A cell is the floats
    that share the upper 16 bits of theirs; the nearest code changes at most once within it. The
    cell's table entry has its first code in the upper half, and in the lower half what makes the
    sum with the lower 16 bits of x carry exactly beyond that change.
    """
    integer = _ordered(lax.bitcast_convert_type(x, jnp.int32))
    upper, lower = integer >> 16, integer & 0xFFFF
    cell = jnp.clip(upper, _LEAST - 1, _GREATEST) + jnp.clip(upper, -_GREATEST - 1, -_LEAST)
    entry = (
        jnp.asarray(_cells(signed)).at[cell + _GREATEST + 2 - _LEAST].get(mode="promise_in_bounds")
    )
    return ((entry + lower) >> 16).astype(jnp.uint8)


# The upper 16 bits of 2^-23, below which everything is nearest to 0, and of 1.
_LEAST, _GREATEST = (127 - 23) << 7, 127 << 7


def _ordered(bits):
    """int32 that increase with the float32 whose bits these are."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@functools.cache
def _cells(signed: bool) -> np.ndarray:
    """The table of `encode`: the cells of [-1, -2^-23], of all between, and of [2^-23, 1]."""
    changes = np.int64(_ordered(_thresholds(_dynamic_tree(signed)).view(np.int32)))
    upper = np.arange(_LEAST, _GREATEST + 1)
    starts = np.concatenate([~upper[::-1], [0], upper]) << 16
    code = np.searchsorted(changes, starts)
    before_change = np.append(changes, np.iinfo(np.int64).max)[code] - starts
    before_change[len(upper)] = 0xFFFF  # whatever the lower bits
    entries = (code << 16) + 0xFFFF - np.minimum(before_change, 0xFFFF)
    return entries.astype(np.int32)


def _thresholds(codebook: np.ndarray) -> np.ndarray:
    """The largest float32 that are nearest to each entry, or to it and the next alike."""
    middle = (np.float64(codebook[1:]) + codebook[:-1]) / 2
    rounded = np.float32(middle)
    below = np.nextafter(rounded, np.float32(-2))
    return np.asarray(np.where(rounded > middle, below, rounded))


def _check_codebook(codebook: ArrayLike) -> np.ndarray:
    numbers = np.asarray(codebook, np.float32)
    if numbers.ndim != 1 or not 1 <= numbers.size <= 256 or not np.all(np.diff(numbers) > 0):
        raise ValueError(
            f"codebook must be at most 256 increasing numbers, got shape {numbers.shape}"
        )
    check_interval(-1, 1, codebook=numbers)
    return numbers


def check_size(**sizes: Any) -> None:
    """Raises unless every size is an int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
    check_interval(1, jnp.inf, **sizes)
