"""Small integers packed into bytes: two of 3 or 4 bits, or four of 2 bits, to the byte."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval


def values_per_byte(bits: int) -> int:
    """How many integers of `bits` bits share a byte: 4 of 2 bits, 2 of 3 or 4, 1 of 5 to 8.

    >>> [values_per_byte(bits) for bits in (2, 3, 4, 5, 8)]
    [4, 2, 2, 1, 1]
    """
    check_interval(2, 8, bits=bits)
    return 8 // bits


def pack(codes: ArrayLike, bits: int) -> Array:
    """Packs signed integers of `bits` bits along the last axis, the first one lowest.

    With k = 8 // bits values to the byte, each in a field of w = 8 / k bits,

        byte_i = Σ_{j<k} (codes_{k i + j} mod 2^w) 2^{w j}

    Args:
      codes: `[..., n]` integers in [-2^(bits-1), 2^(bits-1) - 1]; further bits are dropped.
      bits: 2 to 8.

    Returns:
      `[..., ceil(n / k)]` uint8, the last byte filled up with zeros. int8 codes as they are for 5
      bits and more.

    Raises:
      ValueError: `bits` out of range, or codes without an axis to pack along.
      TypeError: `codes` are not integers.

    Use it for codes that are stored or sent; those of a `QTensor` are packed already. `pack_trits`
    takes 1.6 bits for codes of three values.

    Cost: one pass; 2 bits a code of 2, 4 bits of 3 or 4, and 8 from 5 on.

    Example:
      >>> pack(jnp.array([1, -1, 7], jnp.int8), 4)
      Array([241, 7], dtype=uint8)

    Reference: the bit order of ONNX's packed INT4 tensors, the first element in the lowest bits.
    """
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype.name}")
    codes = codes.astype(jnp.int8)
    count = values_per_byte(bits)
    if count == 1:
        return codes
    if codes.ndim == 0:
        raise ValueError(f"codes of {bits} bits must have an axis to pack along, got shape ()")
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    width = 8 // count
    fields = codes.reshape(*codes.shape[:-1], codes.shape[-1] // count, count)
    fields = fields.astype(jnp.uint8) & (2**width - 1)
    return jnp.sum(fields << (width * jnp.arange(count, dtype=jnp.uint8)), axis=-1, dtype=jnp.uint8)


def unpack(values: ArrayLike, bits: int, *, padding: int = 0) -> Array:
    """The signed integers that `pack` packed.

    Args:
      values: `[..., m]` as `pack` returns them.
      bits: 2 to 8.
      padding: how many of the last values along the last axis only fill up the last byte.

    Returns:
      `[..., m k - padding]` int8, k = 8 // bits.

    Raises:
      ValueError: `bits` out of range.
      TypeError: `values` are not uint8 (int8 for 5 bits and more).

    Use it to look at single codes. `dequantize` goes on to the numbers, and
    `jaxref.kernels.quantized_matmul` reads packed codes as they are.

    Cost: one pass, a byte for each code.

    Example:
      >>> unpack(jnp.array([241, 7], jnp.uint8), 4, padding=1)
      Array([ 1, -1,  7], dtype=int8)

    Reference: the bit order of ONNX's packed INT4 tensors, the first element in the lowest bits.
    """
    values = jnp.asarray(values)
    count = values_per_byte(bits)
    stored = jnp.int8 if count == 1 else jnp.uint8
    if values.dtype != stored:
        raise TypeError(
            f"values of {bits} bits must be {stored.dtype.name}, got {values.dtype.name}"
        )
    if count == 1:
        return values
    width = 8 // count
    # Each field moves to the top of its byte, and the signed shift back extends its sign.
    left = 8 - width * (1 + jnp.arange(count, dtype=jnp.uint8))
    fields = jax.lax.bitcast_convert_type(values[..., None] << left, jnp.int8) >> (8 - width)
    codes = fields.reshape(*values.shape[:-1], values.shape[-1] * count)
    return codes[..., : codes.shape[-1] - padding]
