"""Pyramid vector quantization: directions from an integer lattice, lengths from the law they obey.

The rows of a weight matrix are rotated until their entries look Gaussian, and cut into groups. Each
group is a direction, one of the integer points whose magnitudes sum to K, and a length.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.pyramid_lattice import (
    bits_to_index,
    check_count,
    decode,
    encode,
    index_bits,
    index_to_bits,
    project,
)

_NORM_BITS = 16  # bfloat16: the range of float32, and a rounding far below that of the lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PyramidTensor:
    r"""A kernel in pyramid vector quantization, with all codes in one string of bits.

    With Q the rotation, group g of the rotated column j is

        (Q w)_gj ≈ norm_j · level[a_gj] · p_gj / ‖p_gj‖₂,   Σ |p_gj| = K

    A pytree of its arrays. It is made by `pyramid_quantize` or `pyramid_quantize_hessian`, and
    `pyramid_dequantize` gives the kernel again; `8 * q.nbytes / q.size` is its bits per weight.

    Attributes:
      codes: uint8 `[out, bytes]`: for each output, the bits of all of its groups, of each the index
        of its direction and then that of its length, lowest bit first.
      norms: bfloat16 `[out]`, the lengths of the columns.
      signs: uint8 `[in / 8]`, the signs of the rotation as bits; None without rotation.
      shape: (in, out) of the kernel.
      dtype: the floating-point type to dequantize to.
      group_size: N, the inputs that share a direction.
      pulses: K, the magnitudes' sum.
      amplitude_bits: the bits of a length.

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926.
    """

    codes: Array
    norms: Array
    signs: Array | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    pulses: int = dataclasses.field(metadata={"static": True})
    amplitude_bits: int = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The memory of codes, norms and signs together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@functools.cache
def _cached_levels(group_size: int, row_size: int, bits: int, method: str) -> np.ndarray:
    a, b = group_size / 2, (row_size - group_size) / 2
    if b == 0:
        return np.ones(2**bits)
    middles = (np.arange(2**bits) + 0.5) / 2**bits
    if method == "quantile":
        return np.sqrt(scipy.special.betaincinv(a, b, middles))
    # Lloyd's iteration is slow for many levels: start where they are best in the limit of many, at
    # equal steps of the integral of density^(1/3)
    low, high = np.sqrt(scipy.special.betaincinv(a, b, [1e-9, 1 - 1e-9]))
    r = np.linspace(float(low), min(float(high), 1 - 1e-9), 4001)
    density = np.exp((2 * a - 1) * np.log(r) + (b - 1) * np.log1p(-np.square(r)))
    steps = np.cumsum(np.cbrt(density / density.max()))
    levels = np.interp(middles * steps[-1], steps, r)
    mean = math.exp(scipy.special.betaln(a + 0.5, b) - scipy.special.betaln(a, b))
    explained = 0.0
    for _ in range(1000):
        edges = np.square(np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]]))
        mass = np.maximum(np.diff(scipy.special.betainc(a, b, edges)), 1e-300)
        moment = mean * np.diff(scipy.special.betainc(a + 0.5, b, edges))
        levels = np.where(mass > 1e-12, moment / mass, levels)
        before, explained = explained, np.sum(np.square(moment) / mass)
        if explained - before < 1e-7 * (a / (a + b) - explained):  # of the mean squared error
            break
    return levels


def beta_amplitude_codebook(
    group_size: int, row_size: int, bits: int, *, method: str = "lloyd_max"
) -> np.ndarray:
    r"""The levels for the share of a group in the length of its row.

    For a row of M independent Gaussian entries, the share r of N of them has

        r² = ‖w_g‖² / ‖w‖² ~ Beta(N / 2, (M - N) / 2)

    "lloyd_max" has the levels with the least mean squared error under this law, each the mean of
    the r that are nearest to it; "quantile" has those at equal steps of its distribution function,
    r_i = √F⁻¹((i + ½) / 2^b).

    Args:
      group_size: N at least 1.
      row_size: M at least N.
      bits: b from 1 to 8.
      method: "lloyd_max" (default) or "quantile".

    Returns:
      float64 `[2^b]` ascending, of NumPy: computed on the host, once for each set of arguments. All
      are 1 for a row of one group.

    Raises:
      ValueError: an argument out of its range, or an unknown method.

    Use it for the lengths of groups whose entries look Gaussian, as after a rotation;
    `pyramid_quantize` takes "lloyd_max". With "quantile" all levels come equally often, at a larger
    error.

    Cost: up to 1000 iterations over the 2^b levels on the host, a closed form for "quantile"; the
    levels are kept for the next call.

    Example:
      >>> print(beta_amplitude_codebook(16, 1024, 2).round(3))
      [0.093 0.115 0.134 0.158]

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926.
    """
    check_count(1, group_size=group_size, row_size=row_size, bits=bits)
    check_interval(1, 8, bits=bits)
    check_interval(group_size, jnp.inf, row_size=row_size)
    if method not in ("lloyd_max", "quantile"):
        raise ValueError(f"method must be 'lloyd_max' or 'quantile', got {method!r}")
    return _cached_levels(group_size, row_size, bits, method).copy()


def pyramid_bits_per_weight(
    group_size: int, pulses: int, amplitude_bits: int, *, row_size: float = math.inf
) -> float:
    r"""The bits of a weight in pyramid vector quantization.

        (⌈log2 V(N, K)⌉ + b) / N + 16 / M

    Args:
      group_size: N at least 1.
      pulses: K at least 1.
      amplitude_bits: b from 1 to 8.
      row_size: M, the weights that share a norm. Default: so many that it costs nothing.

    Returns:
      Bits per weight. A `PyramidTensor` takes this much, up to filling the last byte of a column
      and one bit for each input for the signs.

    Raises:
      ValueError: an argument out of its range.

    Use it to choose N and K: steps of K are a fraction of a bit, so that any budget can be met.

    Cost: that of `pyramid_count`, on the host.

    Example:
      >>> [pyramid_bits_per_weight(16, k, 4) for k in (8, 16, 32)]
      [1.8125, 2.625, 3.5]

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926.
    """
    check_count(1, group_size=group_size, pulses=pulses, amplitude_bits=amplitude_bits)
    check_interval(1, 8, amplitude_bits=amplitude_bits)
    if not row_size >= 1:
        raise ValueError(f"row_size must be at least 1, got {row_size}")
    return (index_bits(group_size, pulses) + amplitude_bits) / group_size + _NORM_BITS / row_size


def pyramid_quantize(
    w: ArrayLike,
    *,
    pulses: int,
    group_size: int = 16,
    amplitude_bits: int = 4,
    rotate: bool = True,
    key: Array | None = None,
) -> PyramidTensor:
    r"""Quantizes a kernel, group by group to a direction of the pyramid and a length.

    With Q = H D of random signs D and the orthonormal Hadamard matrix H, for the group g of N
    inputs of a column of Q w with the norm n,

        p_g = pyramid_project((Q w)_g, K),   r_g = (Q w)_g · p_g / (‖p_g‖₂ n)

    and r_g, the best length for this direction, is rounded to the nearest level of
    `beta_amplitude_codebook`, which is made for Gaussian entries: the rotation brings any kernel
    near them, outliers too.

    Args:
      w: floating point `[in, out]`, a kernel; the columns are the rows of the paper. The inputs are
        filled up with zeros to whole groups.
      pulses: K at least 1. With 16 inputs to a group, K = 8, 16, 32 are 1.6, 2.3, 3.2 bits.
      group_size: N at least 1. Default 16.
      amplitude_bits: bits of a length, 1 to 8. Default 4, a quarter of a bit per weight.
      rotate: whether to rotate the inputs, in blocks of the largest power of two that divides
        their number. Default True; False for a kernel that is rotated already.
      key: of the random signs; needed to rotate.

    Returns:
      A `PyramidTensor`. A column of zeros stays zero; in others a group of zeros gets the smallest
      length.

    Raises:
      ValueError: an argument out of its range, not two axes, no entries, no key to rotate with, or
        NaN or infinite entries where the values are concrete.
      TypeError: `w` is not floating point.

    It halves the error of uniform quantization with as many bits, for a decoding that takes N steps
    to a group. Activations go the same way as `x.T`, a token to a column.
    `pyramid_quantize_hessian` where inputs are known.

    Cost: N² comparisons at each move of a projection, and N steps to encode, all groups at once; no
    data.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 8))
      >>> q = pyramid_quantize(w, pulses=16, key=jax.random.key(1))
      >>> print(jnp.mean((pyramid_dequantize(q) - w) ** 2) < 0.08)
      True

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926.
    """
    w = _checked(w, pulses, group_size, amplitude_bits, rotate, key)
    return _quantized(w, key if rotate else None, pulses, group_size, amplitude_bits)


def pyramid_quantize_hessian(
    w: ArrayLike,
    hessian: ArrayLike,
    *,
    pulses: int,
    group_size: int = 16,
    amplitude_bits: int = 4,
    rotate: bool = True,
    damping: float = 0.01,
    key: Array | None = None,
) -> PyramidTensor:
    r"""Quantizes a kernel so that its outputs change least, group after group of its inputs.

    With H the Hessian of the rotated inputs and H⁻¹ = Uᵀ U, U upper triangular, each group g of
    inputs, after those before it, gets its direction p from its weights w as they are by now, and
    the length

        s = wᵀ S p / (pᵀ S p),   S = (U_ggᵀ U_gg)⁻¹

    rounded as in `pyramid_quantize`. S is what remains of H for a group when the later ones make up
    for it as well as they can, which they do: with e the error of the group,

        w_later ← w_later - U_g,laterᵀ U_gg⁻ᵀ e

    Args:
      w: floating point `[in, out]`, a kernel.
      hessian: `[in, in]`, the second moments of the inputs up to a factor, symmetric and positive
        semi-definite.
      pulses, group_size, amplitude_bits, rotate, key: as for `pyramid_quantize`.
      damping: at least 0; this part of the mean of the Hessian's diagonal is added to it. Default
        0.01, that of GPTQ. It must be positive for a singular Hessian.

    Returns:
      A `PyramidTensor`, in the format of `pyramid_quantize`.

    Raises:
      ValueError: an argument out of its range, shapes that do not match, no key to rotate with, or
        NaN or infinite entries where the values are concrete.
      TypeError: `w` or `hessian` not floating point.

    Use it where a sample of the layer's inputs is to be had, as `hessian` gathers it;
    `pyramid_quantize` needs none. `gptq_quantize` has codes that multiply as integers.

    Cost: O(d_in³ + d_in² d_out), one factorization and d_in / N steps in sequence, each with a
    projection; the data only as their Hessian.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (128, 32)) @ jnp.diag(jnp.linspace(0.1, 2, 32))
      >>> w = jax.random.normal(jax.random.key(1), (32, 8))
      >>> arguments = {"pulses": 8, "key": jax.random.key(2)}
      >>> plain = pyramid_dequantize(pyramid_quantize(w, **arguments))
      >>> informed = pyramid_dequantize(pyramid_quantize_hessian(w, x.T @ x, **arguments))
      >>> print(jnp.sum((x @ (informed - w)) ** 2) < jnp.sum((x @ (plain - w)) ** 2))
      True

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926.
    """
    w = _checked(w, pulses, group_size, amplitude_bits, rotate, key)
    check_floating(hessian=hessian)
    check_shape((w.shape[0], w.shape[0]), hessian=hessian)
    check_interval(0, jnp.inf, damping=damping)
    _check_finite(hessian=hessian)
    key = key if rotate else None
    rotated, signs = _rotated(w, group_size, key)
    hessian = jnp.asarray(hessian, rotated.dtype)
    factor = _inverse_factor(hessian, rotated.shape[0], signs, damping)
    if not isinstance(factor, jax.core.Tracer) and not jnp.all(jnp.isfinite(factor)):
        raise ValueError(f"hessian must be positive definite with damping {damping}")
    codes, norms = _quantized_forward(rotated, factor, pulses, group_size, amplitude_bits)
    shape = (w.shape[0], w.shape[1])
    return PyramidTensor(codes, norms, signs, shape, w.dtype, group_size, pulses, amplitude_bits)


def pyramid_dequantize(q: PyramidTensor) -> Array:
    r"""The kernel that the codes of a `PyramidTensor` stand for.

        w_j = Qᵀ [norm_j · level[a_gj] · p_gj / ‖p_gj‖₂]_g

    Args:
      q: a `PyramidTensor`.

    Returns:
      `[in, out]` of the type that was quantized.

    Raises:
      TypeError: `q` is not a `PyramidTensor`.

    Use it before multiplying: directions have no product of their own, so the format saves memory
    and transfer, not arithmetic.

    Cost: N steps of decoding, each over all groups at once; then at most log2(in) passes over the
    kernel for the rotation.

    Example:
      >>> q = pyramid_quantize(jnp.ones((20, 3)), pulses=64, key=jax.random.key(0))
      >>> pyramid_dequantize(q).shape
      (20, 3)

    Reference: van der Ouderaa, Croci, Hilmkil, Hensman, "Pyramid Vector Quantization for LLMs",
    2024, arXiv:2410.16926.
    """
    if not isinstance(q, PyramidTensor):
        raise TypeError(f"q must be a PyramidTensor, got {type(q).__name__}")
    return _dequantized(q)


def _check_finite(**arrays: ArrayLike) -> None:
    for name, array in arrays.items():
        if not isinstance(array, jax.core.Tracer) and not jnp.all(jnp.isfinite(array)):
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def _checked(
    w: ArrayLike,
    pulses: int,
    group_size: int,
    amplitude_bits: int,
    rotate: bool,
    key: Array | None,
) -> Array:
    w = jnp.asarray(w)
    check_floating(w=w)
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"w must have shape [in, out] with entries, got {w.shape}")
    check_count(1, pulses=pulses, group_size=group_size, amplitude_bits=amplitude_bits)
    check_interval(1, 8, amplitude_bits=amplitude_bits)
    if rotate and key is None:
        raise ValueError("key must be given to rotate, got None")
    _check_finite(w=w)
    return w


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantized(
    w: Array, key: Array | None, pulses: int, group_size: int, amplitude_bits: int
) -> PyramidTensor:
    """`pyramid_quantize`."""
    rotated, signs = _rotated(w, group_size, key)
    norms = _norms(rotated)
    groups = rotated.T.reshape(w.shape[1], -1, group_size)
    points = project(groups, pulses)
    direction = points / _length(points)
    share = jnp.sum(groups * direction, axis=-1) / _divisible(norms)[:, None]
    levels = _levels(group_size, rotated.shape[0], amplitude_bits, groups.dtype)
    codes = _pack(points, _nearest(share, levels), pulses, amplitude_bits)
    shape = (w.shape[0], w.shape[1])
    return PyramidTensor(codes, norms, signs, shape, w.dtype, group_size, pulses, amplitude_bits)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantized_forward(
    rotated: Array, factor: Array, pulses: int, group_size: int, amplitude_bits: int
) -> tuple[Array, Array]:
    """Codes and norms of `pyramid_quantize_hessian`."""
    norms = _norms(rotated)
    levels = _levels(group_size, rotated.shape[0], amplitude_bits, rotated.dtype)

    def step(w: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        rows = jax.lax.dynamic_slice_in_dim(factor, start, group_size)
        block = jax.lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
        group = jax.lax.dynamic_slice_in_dim(w, start, group_size).T  # [out, N]
        points = project(group, pulses)
        direction = points / _length(points)

        def whiten(x: Array) -> Array:
            """U_gg⁻ᵀ x: xᵀ S y is the product of what it makes of x and of y."""
            return jax.scipy.linalg.solve_triangular(block, x.T, trans="T")

        white, pole = whiten(group), whiten(direction)
        length = jnp.sum(white * pole, axis=0) / jnp.sum(jnp.square(pole), axis=0)
        amplitudes = _nearest(length / _divisible(norms), levels)
        restored = (norms.astype(w.dtype) * levels[amplitudes])[:, None] * direction
        return w - rows.T @ whiten(group - restored), (points, amplitudes)

    starts = jnp.arange(0, rotated.shape[0], group_size)
    _, (points, amplitudes) = jax.lax.scan(step, rotated, starts)
    return _pack(points.swapaxes(0, 1), amplitudes.T, pulses, amplitude_bits), norms


@jax.jit
def _dequantized(q: PyramidTensor) -> Array:
    size = _padded(q.shape[0], q.group_size)
    dtype = compute_dtype(jnp.zeros((), q.dtype))
    points, amplitudes = _unpack(q)
    levels = _levels(q.group_size, size, q.amplitude_bits, dtype)
    lengths = q.norms.astype(dtype)[:, None] * levels[amplitudes]
    groups = lengths[..., None] * points / _length(points)
    w = groups.reshape(q.shape[1], size).T
    if q.signs is not None:
        w = _signs(q.signs, size, dtype)[:, None] * _hadamard(w)
    limits = jnp.finfo(q.dtype)
    return jnp.clip(w[: q.shape[0]], float(limits.min), float(limits.max)).astype(q.dtype)


def _pack(points: Array, amplitudes: Array, pulses: int, amplitude_bits: int) -> Array:
    """The bits of `[out, groups, N]` directions and of their lengths, by output."""
    direction = index_to_bits(encode(points, pulses), index_bits(points.shape[-1], pulses))
    length = index_to_bits(amplitudes[..., None], amplitude_bits)
    bit = jnp.concatenate([direction, length], axis=-1)
    return jnp.packbits(bit.reshape(bit.shape[0], -1), axis=-1, bitorder="little")


def _unpack(q: PyramidTensor) -> tuple[Array, Array]:
    """The directions `[out, groups, N]` and the indices of their lengths."""
    groups = _padded(q.shape[0], q.group_size) // q.group_size
    index_width = index_bits(q.group_size, q.pulses)
    width = index_width + q.amplitude_bits
    bit = jnp.unpackbits(q.codes, axis=-1, count=groups * width, bitorder="little")
    bit = bit.reshape(*q.codes.shape[:-1], groups, width)
    points = decode(bits_to_index(bit[..., :index_width]), q.group_size, q.pulses)
    return points, bits_to_index(bit[..., index_width:])[..., 0]


def _levels(group_size: int, row_size: int, bits: int, dtype: jnp.dtype) -> Array:
    return jnp.asarray(_cached_levels(group_size, row_size, bits, "lloyd_max"), dtype)


def _nearest(share: Array, levels: Array) -> Array:
    return jnp.sum(share[..., None] > (levels[1:] + levels[:-1]) / 2, axis=-1)


def _length(points: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(points.astype(jnp.float32)), axis=-1, keepdims=True))


def _norms(w: Array) -> Array:
    """The length of each column, also where its square is not finite."""
    largest = _divisible(jnp.max(jnp.abs(w), axis=0))
    norms = largest * jnp.sqrt(jnp.sum(jnp.square(w / largest), axis=0))
    return jnp.minimum(norms, float(jnp.finfo(jnp.bfloat16).max)).astype(jnp.bfloat16)


def _divisible(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x, 1.0)


def _padded(size: int, group_size: int) -> int:
    return -(-size // group_size) * group_size


def _signs(packed: Array, size: int, dtype: jnp.dtype) -> Array:
    return 1 - 2 * jnp.unpackbits(packed, count=size).astype(dtype)


def _hadamard(x: Array) -> Array:
    """The orthonormal Hadamard matrix times `[size, ...]`, in blocks of a power of two.

    As log2(block) passes of sums and differences, where the matrix itself would be a large one.
    """
    size = x.shape[0]
    block = size & -size
    stride = 1
    while stride < block:
        first, second = jnp.moveaxis(
            math.sqrt(0.5) * x.reshape(size // (2 * stride), 2, stride, *x.shape[1:]), 1, 0
        )
        x = jnp.stack([first + second, first - second], axis=1).reshape(x.shape)
        stride *= 2
    return x


@functools.partial(jax.jit, static_argnames="group_size")
def _rotated(w: Array, group_size: int, key: Array | None) -> tuple[Array, Array | None]:
    """The kernel with whole groups, rotated if there is a key, and the signs as bits."""
    w = w.astype(compute_dtype(w))
    w = jnp.pad(w, [(0, _padded(w.shape[0], group_size) - w.shape[0]), (0, 0)])
    if key is None:
        return w, None
    signs = jnp.packbits(jax.random.bernoulli(key, shape=(w.shape[0],)))
    return _hadamard(_signs(signs, w.shape[0], w.dtype)[:, None] * w), signs


@functools.partial(jax.jit, static_argnames="size")
def _inverse_factor(hessian: Array, size: int, signs: Array | None, damping: float) -> Array:
    """U of H⁻¹ = Uᵀ U, upper triangular, with H damped, of whole groups, and rotated."""
    diagonal = jnp.mean(jnp.diagonal(hessian))
    hessian = hessian / _divisible(diagonal)
    hessian = jnp.pad(hessian, [(0, size - hessian.shape[0])] * 2)
    if signs is not None:
        sign = _signs(signs, size, hessian.dtype)
        hessian = _hadamard(_hadamard(sign[:, None] * hessian * sign).T)
    # of zeros, as of no inputs at all, the identity; inputs that fill up a group cannot do without
    least = jnp.where(diagonal == 0, 1.0, damping)
    hessian += least * jnp.eye(size, dtype=hessian.dtype)
    # Uᵀ U = H⁻¹ is, with all in reverse order, the inverse of the lower factor of H
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(size, dtype=hessian.dtype)
    inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    return inverse[::-1, ::-1]
