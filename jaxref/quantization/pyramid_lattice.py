"""The integer points whose magnitudes sum to K: their number, the nearest one, their indices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype

_LIMB = 16  # bits to a word of an index, so that int32 holds the sum of a few


def pyramid_count(n: int, k: int) -> int:
    r"""The number of integer vectors of size N whose magnitudes sum to K.

        V(N, K) = V(N-1, K) + V(N, K-1) + V(N-1, K-1),   V(N, 0) = 1,   V(0, K > 0) = 0

    Args:
      n: N at least 0.
      k: K at least 0.

    Returns:
      V as a Python integer, exact at any size. Computed on the host.

    Raises:
      ValueError: a negative size.

    Its binary logarithm is the bits of a direction; `pyramid_bits_per_weight` adds the rest.

    Cost: N · K additions of long integers, once for each size.

    Example:
      >>> pyramid_count(3, 2), pyramid_count(16, 32).bit_length()
      (18, 52)

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926.
    """
    check_interval(0, jnp.inf, n=n, k=k)
    return _counts(n, k)[n][k]


def pyramid_project(x: ArrayLike, k: int, *, refine: bool = True) -> Array:
    r"""The integer vector with magnitudes that sum to K nearest in direction to each vector.

    With y = K |x| / ‖x‖₁, p = ⌊y⌋, and the K - Σ p units that are missing go to the largest
    fractional parts, which is the point nearest to y. `refine` then moves single units from one
    entry to another, each time where it helps most, as long as the cosine x·p / (‖x‖₂ ‖p‖₂) grows.
    The signs are those of x.

    Args:
      x: floating point `[..., n]`.
      k: K at least 1, the pulses.
      refine: whether to look for the largest cosine. It takes n² comparisons at each move.

    Returns:
      int32 `[..., n]`; K at the first entry where x is 0.

    Raises:
      ValueError: `k` below 1, or vectors without entries.
      TypeError: `x` is not floating point.

    `pyramid_quantize` projects the groups of a kernel; by itself it is the fixed-rate quantizer of
    directions, without any table.

    Cost: two sorts of n entries; `refine` adds n² comparisons at each move, and all vectors wait
    for the one with most moves.

    Example:
      >>> pyramid_project(jnp.array([0.9, -0.5, 0.1]), 3)
      Array([ 2, -1,  0], dtype=int32)

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926; the lattice is that of Fischer, "A pyramid vector quantizer", 1986.
    """
    check_floating(x=x)
    check_count(1, k=k)
    x = jnp.asarray(x, compute_dtype(x))
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one entry to a vector, got shape {x.shape}")
    return project(x, k, refine)


def pyramid_encode(p: ArrayLike, k: int) -> Array:
    r"""The index of each point of the pyramid, in the enumeration of Fischer.

    Entry by entry: with n entries and k pulses left, the points with a 0 come first, V(n-1, k) of
    them, and then for |v| = 1 ... k those with +|v| and those with -|v|, V(n-1, k-|v|) each.

    Args:
      p: integers `[..., n]` whose magnitudes sum to `k`.
      k: K at least 1.

    Returns:
      uint8 `[..., ceil(log2(V) / 8)]`: the index below V = `pyramid_count(n, k)` in bytes, the
      lowest first.

    Raises:
      ValueError: `k` below 1, or, where the values are concrete, magnitudes with another sum.
      TypeError: `p` are not integers.

    `pyramid_decode` inverts it. Both run under jit, for an index of any number of bits.

    Cost: n steps in sequence, each over all points at once, on indices in words of 16 bits.

    Example:
      >>> code = pyramid_encode(jnp.array([0, -2, 0]), 2)
      >>> int.from_bytes(code.tobytes(), "little")
      7

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926; the enumeration is that of Fischer, "A pyramid vector quantizer", 1986.
    """
    p = jnp.asarray(p)
    if not jnp.issubdtype(p.dtype, jnp.integer):
        raise TypeError(f"p must be integers, got {p.dtype.name}")
    check_count(1, k=k)
    if p.ndim == 0 or p.shape[-1] == 0:
        raise ValueError(f"p must have at least one entry to a vector, got shape {p.shape}")
    if not isinstance(p, jax.core.Tracer) and not jnp.all(jnp.sum(jnp.abs(p), -1) == k):
        raise ValueError(f"p must have magnitudes that sum to k = {k}")
    bits = index_bits(p.shape[-1], k)
    return jnp.packbits(index_to_bits(encode(p, k), bits), axis=-1, bitorder="little")


def pyramid_decode(index: ArrayLike, n: int, k: int) -> Array:
    r"""The point of the pyramid with each index: `pyramid_encode` inverted.

    Args:
      index: uint8 `[..., ceil(log2(V) / 8)]` as `pyramid_encode` gives it.
      n: N at least 1, the entries of a point.
      k: K at least 1.

    Returns:
      int32 `[..., n]`. What an index of V or more stands for is undefined.

    Raises:
      ValueError: a size below 1, or another number of bytes.
      TypeError: `index` is not uint8.

    Use it to read what `pyramid_encode` stored; `pyramid_dequantize` restores a whole kernel.

    Cost: n steps in sequence, each with about log2(K) comparisons of long indices, for all points
    at once.

    Example:
      >>> pyramid_decode(jnp.array([7], jnp.uint8), 3, 2)
      Array([ 0, -2,  0], dtype=int32)

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926; the enumeration is that of Fischer, "A pyramid vector quantizer", 1986.
    """
    index = jnp.asarray(index)
    if index.dtype != jnp.uint8:
        raise TypeError(f"index must be uint8, got {index.dtype.name}")
    check_count(1, n=n, k=k)
    bits = index_bits(n, k)
    check_shape((*index.shape[:-1], -(-bits // 8)), index=index)
    bit = jnp.unpackbits(index, axis=-1, count=bits, bitorder="little")
    return decode(bits_to_index(bit), n, k)


def check_count(least: int, **values: int) -> None:
    """Raises unless the values are integers of at least `least`, naming the one that is not."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@functools.partial(jax.jit, static_argnames=("k", "refine"))
def project(x: Array, k: int, refine: bool = True) -> Array:
    """`pyramid_project` of what is known to be right."""
    size = jnp.abs(x)
    largest = jnp.max(size, axis=-1, keepdims=True)
    # by the largest, as sums of what is near the ends of the type's range are not finite
    size = size / jnp.where(largest > 0, largest, 1.0)
    size = jnp.where(largest > 0, size, jnp.zeros_like(size).at[..., 0].set(1.0))
    y = k * size / jnp.sum(size, axis=-1, keepdims=True)
    p = jnp.floor(y)
    missing = k - jnp.sum(p, axis=-1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(p - y, axis=-1), axis=-1)
    p += rank < missing
    if refine:
        p = _climb(size, p)
    return jnp.where(x < 0, -p, p).astype(jnp.int32)


def _climb(size: Array, p: Array) -> Array:
    """Moves single pulses to where they raise the cosine most, until none does."""
    entries = jnp.arange(p.shape[-1])

    def move(state: tuple[Array, Array]) -> tuple[Array, Array]:
        p, _ = state
        dot, square = jnp.sum(size * p, -1, keepdims=True), jnp.sum(p * p, -1, keepdims=True)
        now = dot / jnp.sqrt(square)

        def try_source(best: tuple[Array, Array, Array], i: Array) -> tuple:
            """The best place for a pulse of entry i, one entry at a time to save memory."""
            from_size, from_p = (jax.lax.dynamic_slice_in_dim(x, i, 1, axis=-1) for x in (size, p))
            is_move = (from_p > 0) & (entries != i)
            squares = jnp.where(is_move, square + 2 * (1 + p - from_p), 1.0)
            cosine = jnp.where(is_move, (dot - from_size + size) / jnp.sqrt(squares), -jnp.inf)
            target = jnp.argmax(cosine, axis=-1, keepdims=True)
            new = (jnp.max(cosine, axis=-1, keepdims=True), jnp.full_like(target, i), target)
            return tuple(jnp.where(new[0] > best[0], x, y) for x, y in zip(new, best)), None

        nowhere = jnp.zeros(now.shape, jnp.int32)
        (cosine, source, target), _ = jax.lax.scan(
            try_source, (jnp.full_like(now, -jnp.inf), nowhere, nowhere), entries
        )
        helps = cosine > (1 + 1e-6) * now
        change = (entries == target).astype(p.dtype) - (entries == source)
        return p + jnp.where(helps, change, 0), helps

    helps = jnp.ones((*p.shape[:-1], 1), bool)
    return jax.lax.while_loop(lambda state: jnp.any(state[1]), move, (p, helps))[0]


@functools.cache
def _counts(n: int, k: int) -> list[list[int]]:
    """V for all sizes up to (n, k)."""
    table = [[1] + [0] * k]
    for _ in range(n):
        above, row = table[-1], [1]
        for j in range(1, k + 1):
            row.append(above[j] + row[j - 1] + above[j - 1])
        table.append(row)
    return table


def index_bits(n: int, k: int) -> int:
    """Bits of the largest index of a point with n entries and k pulses."""
    return (pyramid_count(n, k) - 1).bit_length()


@functools.cache
def _tables(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Words of V(i, j) and of Σ_{l<j} V(i, l), each `[n, k + 2, words]`, i counting from 0."""
    words = index_bits(n, k) // _LIMB + 1
    counts = [[*row, 0] for row in _counts(n, k)[:n]]
    totals = [[0, *itertools.accumulate(row[:-1])] for row in counts]

    def as_words(table: list[list[int]]) -> np.ndarray:
        shifts = [_LIMB * i for i in range(words)]
        digits = [[[(v >> by) % 2**_LIMB for by in shifts] for v in row] for row in table]
        return np.array(digits, np.int32)

    return as_words(counts), as_words(totals)


def _carried(words: Array) -> tuple[Array, Array]:
    """A number from words of any sign, in words of 16 bits, and whether it is at least 0."""
    digits, carry = [], jnp.int32(0)
    for word in jnp.moveaxis(words, -1, 0):
        carry += word
        digits.append(carry & (2**_LIMB - 1))
        carry >>= _LIMB
    return jnp.stack(digits, axis=-1), carry >= 0


def _first_index(n: int, k: int, left: Array, pulses: Array, size: Array) -> Array:
    """The first index with the magnitude `size` at an entry, `left` entries after it.

    V(left, pulses) + 2 Σ_{0<j<size} V(left, pulses - j) for size > 0, and 0 for 0, in words of
    either sign.
    """
    counts, totals = (jnp.asarray(table) for table in _tables(n, k))
    smaller = totals[left, pulses] - totals[left, pulses - size + 1]
    return jnp.where((size > 0)[..., None], counts[left, pulses] + 2 * smaller, 0)


@functools.partial(jax.jit, static_argnames="k")
def encode(p: Array, k: int) -> Array:
    """The index of each point in words."""
    n = p.shape[-1]
    counts = jnp.asarray(_tables(n, k)[0])

    def step(carry: tuple[Array, Array], entry: tuple[Array, Array]) -> tuple:
        index, pulses = carry
        value, left = entry
        size = jnp.abs(value)
        opposite = jnp.where((value < 0)[..., None], counts[left, pulses - size], 0)
        index += _first_index(n, k, left, pulses, size) + opposite
        return (_carried(index)[0], pulses - size), None

    index = jnp.zeros((*p.shape[:-1], counts.shape[-1]), jnp.int32)
    pulses = jnp.full(p.shape[:-1], k, jnp.int32)
    entries = (jnp.moveaxis(p.astype(jnp.int32), -1, 0), jnp.arange(n)[::-1])
    return jax.lax.scan(step, (index, pulses), entries)[0][0]


@functools.partial(jax.jit, static_argnames=("n", "k"))
def decode(index: Array, n: int, k: int) -> Array:
    """The point of each index in words."""
    counts = jnp.asarray(_tables(n, k)[0])
    steps = 2 ** jnp.arange(k.bit_length())[::-1]

    def step(carry: tuple[Array, Array], left: Array) -> tuple[tuple[Array, Array], Array]:
        index, pulses = carry

        def grow(size: Array, by: Array) -> tuple[Array, None]:
            """The largest magnitude whose first index is not above, bit by bit."""
            larger = jnp.minimum(size + by, pulses)
            fits = _carried(index - _first_index(n, k, left, pulses, larger))[1]
            return jnp.where((size + by <= pulses) & fits, larger, size), None

        size, _ = jax.lax.scan(grow, jnp.zeros_like(pulses), steps)
        index, _ = _carried(index - _first_index(n, k, left, pulses, size))
        beyond, is_negative = _carried(index - counts[left, pulses - size])
        is_negative &= size > 0
        index = jnp.where(is_negative[..., None], beyond, index)
        return (index, pulses - size), jnp.where(is_negative, -size, size)

    words = counts.shape[-1]
    index = jnp.pad(index, [(0, 0)] * (index.ndim - 1) + [(0, words - index.shape[-1])])
    pulses = jnp.full(index.shape[:-1], k, jnp.int32)
    _, values = jax.lax.scan(step, (index, pulses), jnp.arange(n)[::-1])
    return jnp.moveaxis(values, 0, -1)


def index_to_bits(words: Array, bits: int) -> Array:
    """uint8 `[..., bits]`, the lowest first."""
    bit = (words[..., None] >> jnp.arange(_LIMB)) & 1
    return bit.reshape(*words.shape[:-1], -1)[..., :bits].astype(jnp.uint8)


def bits_to_index(bit: Array) -> Array:
    """Words of `[..., bits]`, the lowest first."""
    bit = jnp.pad(bit, [(0, 0)] * (bit.ndim - 1) + [(0, -bit.shape[-1] % _LIMB)])
    bit = bit.reshape(*bit.shape[:-1], bit.shape[-1] // _LIMB, _LIMB).astype(jnp.int32)
    return jnp.sum(bit << jnp.arange(_LIMB), axis=-1)
