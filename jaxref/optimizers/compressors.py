"""Contractive compressors of gradients: what a worker sends instead of a dense array.

A compressor C is contractive with α in (0, 1] if, for every x,

    E‖C(x) - x‖² ≤ (1 - α) ‖x‖²

Each works on one leaf, of any shape, and turns it into a message that is as small as it says.
A vector of zeros compresses to zeros, also where the code has no symbol for them.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxref.core.checks import check_interval


class Compressor(NamedTuple):
    """How one leaf is compressed, and read again: what `ef21` and `ef14` send.

    Attributes:
      compress: (x, key=None) → message, a small pytree of arrays: all that has to travel. x is a
        floating-point array of any shape.
      decompress: (message, like, key=None) → C(x), with the shape and the type of `like`, an array
        or `jax.ShapeDtypeStruct`. The key is the one that `compress` had, known to both sides.
      alpha: size → α in (0, 1] of a leaf with that many entries. For a tree the smallest counts.
      needs_key: whether the two functions need their key.

    Any other one will do, for instance rounding to bfloat16, α = 1 - 2⁻¹⁶:

      >>> bfloat16 = Compressor(
      ...     compress=lambda x, key=None: x.astype(jnp.bfloat16),
      ...     decompress=lambda message, like, key=None: message.astype(like.dtype),
      ...     alpha=lambda size: 1 - 2**-16,
      ... )

    Reference: Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to
    Arithmetic Mean of Smoothness Constants", 2024, arXiv:2402.10774.
    """

    compress: Callable[..., Any]
    decompress: Callable[..., jax.Array]
    alpha: Callable[[int], float]
    needs_key: bool = False


def identity_compressor() -> Compressor:
    """No compression, C(x) = x: `ef21` with it is gradient descent.

    Returns:
      the `Compressor`, with α = 1. Its message is x, of the same size.

    Use it as the baseline of the other compressors, or to check a program with `ef21` against
    gradient descent; `top_k_compressor` is the usual choice.

    Cost: the whole array travels, 4 bytes an entry in float32.

    Example:
      >>> print(identity_compressor().compress(jnp.array([3.0, -1.0])))
      [ 3. -1.]

    Reference: Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to
    Arithmetic Mean of Smoothness Constants", 2024, arXiv:2402.10774.
    """
    return Compressor(
        compress=lambda x, key=None: x,
        decompress=lambda message, like, key=None: message.astype(like.dtype),
        alpha=lambda size: 1.0,
    )


def top_k_compressor(k: int | float) -> Compressor:
    """The k entries of largest magnitude, with their positions.

        C(x)_i = x_i  where |x_i| is among the k largest,  0  elsewhere;     α = k / d

    Args:
      k: how many entries of each leaf: an int of at least 1, or a float in (0, 1], the fraction of
        the leaf. Never fewer than one, nor more than there are (d). Among ties the lowest index
        comes first.

    Returns:
      the `Compressor`. Its message has k values of the leaf's type and k unsigned positions, of
      one byte in a leaf of up to 256 entries, two up to 65536, four beyond.

    Raises:
      ValueError: `k` out of its range.
      TypeError: `k` is not a number.

    Use it first: it is deterministic, and errs far less than α says where few entries matter. For
    large leaves, whose search takes long, use `block_top_k_compressor`.

    Cost: a search for the k largest of d magnitudes; k values and k positions travel.

    Example:
      >>> message = top_k_compressor(2).compress(jnp.array([1.0, -4.0, 2.0]))
      >>> print(message["indices"], message["values"])
      [[1 2]] [[-4.  2.]]

    Reference: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", 2018, arXiv:1809.07599;
    Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of
    Smoothness Constants", 2024, arXiv:2402.10774.
    """
    return _largest(k, None)


def block_top_k_compressor(k: int | float, block_size: int = 256) -> Compressor:
    """The k entries of largest magnitude in each block of the flattened leaf.

        C(x)_i = x_i  where |x_i| is among the k largest of its block,  0  elsewhere
        α = k / block_size

    Args:
      k: how many entries of each block: an int of at least 1, or a float in (0, 1], the fraction
        of the block. Never fewer than one, nor more than the block has.
      block_size: entries to a block, at least 1. A leaf that is smaller is one block; where it
        does not divide a leaf, zeros fill the last block up. Default 256, the most that positions
        of one byte can tell apart.

    Returns:
      the `Compressor`. Its message has [blocks, k] values of the leaf's type and as many positions
      within their blocks, of one byte up to blocks of 256.

    Raises:
      ValueError: a number out of its range.
      TypeError: `k` is not a number.

    Use it for large leaves: short searches in parallel instead of a long one, and shorter
    positions. What is large in a block need not be so in the leaf, hence a somewhat larger error
    than `top_k_compressor` has for as many entries.

    Cost: one short search a block, all in parallel; k values and k positions a block travel.

    Example:
      >>> message = block_top_k_compressor(1, block_size=2).compress(jnp.array([1.0, -4.0, 2.0]))
      >>> print(message["indices"].T, message["values"].T)
      [[1 0]] [[-4.  2.]]

    Reference: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", 2018, arXiv:1809.07599;
    Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of
    Smoothness Constants", 2024, arXiv:2402.10774.
    """
    if not isinstance(block_size, Integral) or block_size < 1:
        raise ValueError(f"block_size must be an integer of at least 1, got {block_size!r}")
    return _largest(k, int(block_size))


def rand_k_compressor(k: int | float) -> Compressor:
    """k entries drawn at random: the receiver draws the same ones, so that only values travel.

        C(x)_i = x_i  for i in S,  0  elsewhere;     S uniform, |S| = k,     α = k / d

    This is the contractive form; d/k C(x) would be the unbiased one.

    Args:
      k: how many entries of each leaf: an int of at least 1, or a float in (0, 1], the fraction of
        the leaf. Never fewer than one, nor more than there are (d).

    Returns:
      the `Compressor`, which needs a key. Its message is the k values, of the leaf's type.

    Raises:
      ValueError: `k` out of its range.
      TypeError: `k` is not a number.

    Use it where positions cost as much as values and magnitudes should not be sorted: it sends half
    of what `top_k_compressor` does for large leaves in float32, but keeps only the share k/d of the
    energy.

    Cost: a random permutation of d numbers on each side; k values travel.

    Example:
      >>> compressor, key, x = rand_k_compressor(2), jax.random.key(0), jnp.array([1.0, -4.0, 2.0])
      >>> message = compressor.compress(x, key)
      >>> print(message.shape, (compressor.decompress(message, x, key) == x).sum())
      (2,) 2

    Reference: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", 2018, arXiv:1809.07599;
    Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of
    Smoothness Constants", 2024, arXiv:2402.10774.
    """
    _check_k(k)

    def drawn(key, size):
        return jax.random.permutation(key, size)[: _entries(k, size)]

    def compress(x, key):
        return jnp.ravel(x)[drawn(key, x.size)]

    def decompress(message, like, key):
        flat = jnp.zeros(like.size, like.dtype)
        indices = drawn(key, like.size)
        return flat.at[indices].set(message, unique_indices=True).reshape(like.shape)

    return Compressor(compress, decompress, lambda size: _share(k, size), needs_key=True)


def sign_compressor() -> Compressor:
    """The signs, eight to a byte, and one scale, the mean magnitude.

        C(x) = mean|x| sign(x),     ‖C(x) - x‖² = ‖x‖² - ‖x‖₁² / d,     α = 1 / d

    α is the worst case, a leaf with a single entry that is not zero; where the entries are of one
    size it is near 1 (2/π for normal ones). There is no third symbol: sign(0) is taken as 1, which
    leaves the error above as it is, and in a leaf of zeros the scale is 0.

    Returns:
      the `Compressor`. Its message has ⌈d/8⌉ bytes and one float32.

    Use it where every entry has to arrive in one bit, the least that can be sent of a dense
    gradient; `natural_compressor` keeps their sizes, in 9.

    Cost: one bit an entry and 4 bytes a leaf travel; one sum over the leaf.

    Example:
      >>> message = sign_compressor().compress(jnp.array([1.0, -4.0, 2.0, -1.0]))
      >>> print(message["signs"], message["scale"])
      [80] 2.0

    Reference: Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes", 2019, arXiv:1901.09847; Richtárik, Gasanov, Burlachenko, "Error Feedback
    Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants", 2024, arXiv:2402.10774.
    """

    def compress(x, key=None):
        # Divided before they are summed, so that the mean of large magnitudes does not overflow.
        scale = jnp.sum(jnp.abs(x).astype(jnp.float32) / x.size)
        return {"signs": jnp.packbits(jnp.ravel(x) < 0), "scale": scale}

    def decompress(message, like, key=None):
        negative = jnp.unpackbits(message["signs"], count=like.size).reshape(like.shape)
        scale = message["scale"]
        return jnp.where(negative, -scale, scale).astype(like.dtype)

    return Compressor(compress, decompress, lambda size: 1 / max(size, 1))


def natural_compressor(rounding: str = "stochastic") -> Compressor:
    """Magnitudes rounded to powers of two: sign and exponent, 9 bits an entry.

        stochastic:  C(x) = 8/9 R(x),  R(x) = ±2ᵉ or ±2ᵉ⁺¹ around x, with E[R(x)] = x
        nearest:     C(x) = ±2ᵉ or ±2ᵉ⁺¹, whichever is nearer
        α = 8/9 for both

    R alone has variance up to x²/8; the factor 8/9 makes of it the best contraction.

    Args:
      rounding: "stochastic" (default, as in the paper) or "nearest", which needs no key.

    Returns:
      the `Compressor`. Its message has d bytes, the exponents as in float32, and ⌈d/8⌉ bytes of
      signs. The range is that of normal float32 numbers: what is smaller is rounded to 0 or the
      smallest, and what is above the largest power to that.

    Raises:
      ValueError: another `rounding`.

    Use it for gradients of which every entry should arrive with its size, at a little more than a
    quarter of float32's bytes; `top_k_compressor` sends far less where few entries matter.

    Cost: 9 bits an entry travel; elementwise work, with a random number for each entry where it is
    stochastic.

    Example:
      >>> compressor, x = natural_compressor("nearest"), jnp.array([0.9, -5.0, 0.0])
      >>> print(compressor.decompress(compressor.compress(x), x))
      [ 1. -4.  0.]

    Reference: Horváth, Ho, Horváth, Sahu, Canini, Richtárik, "Natural Compression for Distributed
    Deep Learning", 2019, arXiv:1905.10988.
    """
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"rounding must be 'stochastic' or 'nearest', got {rounding!r}")
    stochastic = rounding == "stochastic"
    mantissa_bits, infinite, largest = 23, 255, 254

    def compress(x, key=None):
        flat = jnp.ravel(x).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(jnp.abs(flat), jnp.uint32)
        # What is added to the mantissa carries into the exponent with the right probability.
        if stochastic:
            added = jax.random.bits(key, flat.shape, jnp.uint32) >> (32 - mantissa_bits)
        else:
            added = jnp.uint32(1 << (mantissa_bits - 1))
        exponents = jnp.minimum(
            (bits + added) >> mantissa_bits, jnp.where(jnp.isfinite(flat), largest, infinite)
        )
        return {"signs": jnp.packbits(flat < 0), "exponents": exponents.astype(jnp.uint8)}

    def decompress(message, like, key=None):
        bits = message["exponents"].astype(jnp.uint32) << mantissa_bits
        magnitude = jax.lax.bitcast_convert_type(bits, jnp.float32)
        magnitude = magnitude * (8 / 9) if stochastic else magnitude
        negative = jnp.unpackbits(message["signs"], count=like.size)
        return jnp.where(negative, -magnitude, magnitude).reshape(like.shape).astype(like.dtype)

    return Compressor(compress, decompress, lambda size: 8 / 9, needs_key=stochastic)


def _check_k(k):
    if not isinstance(k, Integral):
        check_interval(0, 1, closed="right", k=k)
    elif k < 1:
        raise ValueError(f"k must be an integer of at least 1 or a fraction in (0, 1], got {k}")


def _entries(k, size):
    """How many of `size` entries `k` stands for, be it a number or a fraction."""
    return min(size, max(1, int(k) if isinstance(k, Integral) else round(k * size)))


def _share(k, size):
    return _entries(k, size) / size if size else 1.0


def _largest(k, block_size):
    """The k largest of each block; None makes the leaf one block."""
    _check_k(k)

    def block(size):
        return max(1, size if block_size is None else min(block_size, size))

    def compress(x, key=None):
        width = block(x.size)
        rows = jnp.pad(jnp.ravel(x), (0, -x.size % width)).reshape(-(-x.size // width), width)
        _, indices = jax.lax.top_k(jnp.abs(rows), _entries(k, width))
        values = jnp.take_along_axis(rows, indices, axis=1)
        return {"values": values, "indices": indices.astype(np.min_scalar_type(width - 1))}

    def decompress(message, like, key=None):
        width = block(like.size)
        indices = message["indices"].astype(jnp.int32)
        rows = jnp.zeros((len(indices), width), like.dtype)
        at = rows.at[jnp.arange(len(indices))[:, None], indices]
        filled = at.set(message["values"].astype(like.dtype), unique_indices=True)
        return jnp.ravel(filled)[: like.size].reshape(like.shape)

    return Compressor(compress, decompress, lambda size: _share(k, block(size)))
