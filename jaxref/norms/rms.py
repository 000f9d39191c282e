"""Root-mean-square normalization, and its compressed form for vectors of zero mean."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref import kernels
from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def normalised_axes(axis: int | tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as a sorted tuple of non-negative ints that hold at least one entry of `shape`."""
    axes = canonical_axes(axis, len(shape))
    if any(shape[a] == 0 for a in axes):
        raise ValueError(f"axis {axis} holds no entries to normalise in x of shape {shape}")
    return axes


def spread_parameter(
    name: str, parameter: ArrayLike, axes: tuple[int, ...], shape: tuple[int, ...]
) -> Array:
    """A parameter of the shape of the normalised `axes` of `shape`, with size 1 at the others."""
    check_floating(**{name: parameter})
    check_shape(tuple(shape[a] for a in axes), **{name: parameter})
    return jnp.expand_dims(parameter, [a for a in range(len(shape)) if a not in axes])


def reciprocal_root(mean_square: Array, epsilon: float) -> Array:
    """1 / √(mean_square + ε), with a sum of 0 counted as 1.

    The quotient, not `rsqrt`: the derivative of that forms the power -3/2, which overflows below
    1e-26 and is lost above 1e25.
    """
    total = mean_square + epsilon
    if isinstance(epsilon, jax.core.Tracer) or epsilon < 1e-12:  # else it cannot be 0
        total = jnp.where(total > 0, total, 1.0)
    return 1 / jnp.sqrt(total)


def apply_kernel(
    kernel: Callable[..., Array],
    x: Array,
    axes: tuple[int, ...],
    where: ArrayLike | None,
    **parameters: ArrayLike | None,
) -> Array:
    """A kernel over the last axis, on `x` whose entries along `axes` are one row.

    Raises:
      ValueError: a mask, or a parameter not of the normalised shape.
    """
    if where is not None:
        raise ValueError("implementation must be None or 'xla' where a mask `where` is given")
    last = tuple(range(-len(axes), 0))
    rows, features = jnp.moveaxis(x, axes, last), tuple(x.shape[a] for a in axes)
    given = {name: p for name, p in parameters.items() if p is not None}
    check_shape(features, **given)
    flat = {name: jnp.reshape(p, -1) for name, p in given.items()}
    y = kernel(rows.reshape(*rows.shape[: -len(axes)], math.prod(features)), **flat)
    return jnp.moveaxis(y.reshape(rows.shape), last, axes)


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Root-mean-square normalization: each example divided by the size of its entries.

    With H entries along `axis`,

        y = scale · x / √(ms + ε),   ms = (1/H) Σ_i x_i²

    Unchanged by `x → a x` for a > 0 (up to ε), but not by adding a constant. On x of zero mean it
    is `layer_norm`, so that a network whose residual stream is kept at zero mean may use either.

    Args:
      x: `[...]` floating point, of a size whose square float32 holds: at most about 1e16.
      scale: the gain, of the shape of the normalised axes in the order in which `x` has them.
        Default: 1.
      axis: the axis or axes to normalise over.
      epsilon: ε at least 0, added to the mean square. Default 1e-6.
      where: boolean, broadcastable to `x`: the entries that exist. The others count for nothing and
        come out 0. Default: all.
      implementation: "xla"; or a kernel of `jaxref.kernels`, "pallas" or another name of
        `jaxref.kernels.implementation`: one pass over memory forward and one backward, without
        `jax.jvp` or `where`. Default: XLA, which joins a norm to what stands around it.

    Returns:
      y of the shape and type of `x`, computed in at least float32; 0 where `x` is 0 throughout,
      with a finite gradient for any ε.

    Raises:
      ValueError: `axis` out of range or over no entries, `scale` not of the normalised shape, a
        mask that is not boolean or does not broadcast, a negative `epsilon`, or an
        `implementation` that does not exist or cannot run.
      TypeError: `x` or `scale` is not floating point.

    Use it where `layer_norm` would go and the mean carries no information; `compressed_rms_norm`
    also drops the redundant entry of a stream of zero mean.

    Cost: one reduction over the features, where `layer_norm` has three; a kernel reads `x` once. No
    state.

    Example:
      >>> print(rms_norm(jnp.array([3.0, 4.0])))
      [0.849 1.131]

    Reference: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467;
    Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient
    Pre-LN Transformers", 2023, arXiv:2305.14858.
    """
    check_floating(x=x)
    check_interval(0, jnp.inf, epsilon=epsilon)
    x = jnp.asarray(x)
    axes = normalised_axes(axis, x.shape)
    check_broadcastable(x.shape, where=where)
    if implementation not in (None, "xla"):
        kernel = partial(kernels.rms_norm, epsilon=epsilon, implementation=implementation)
        return apply_kernel(kernel, x, axes, where, scale=scale)
    wide = x.astype(compute_dtype(x))
    if where is not None:
        wide = jnp.where(where, wide, 0.0)
    mean_square = masked_mean(jnp.square(wide), axis=axes, where=where, keepdims=True)
    y = wide * reciprocal_root(mean_square, epsilon)
    if scale is not None:
        y *= spread_parameter("scale", scale, axes, x.shape)
    return y.astype(x.dtype)


def compressed_rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
) -> Array:
    r"""RMS normalization of a zero-mean d-vector that is stored as its first d - 1 entries.

        y = scale · x / √(ms + ε),   ms = (1/d) (Σ_i x_i² + (Σ_i x_i)²),   i = 1 ... d - 1

    The second square is that of the entry left out, `-Σ_i x_i`. Without `scale`,
    `compressed_rms_norm(compress_zero_mean(z)) = compress_zero_mean(rms_norm(z))`.

    Args:
      x: `[..., d - 1]` floating point, the entries at `axis`; at most about 1e16 in size.
      scale: a gain `[d - 1]` on the stored entries. Default: 1. It is not the gain of a `rms_norm`
        of size d, whose result has no zero mean any more: fold that one into the following kernel.
      axis: the axis to normalise over.
      epsilon: ε at least 0, added to the mean square. Default 1e-6.

    Returns:
      y of the shape and type of `x`, computed in at least float32; 0 where `x` is 0 throughout,
      with a finite gradient for any ε.

    Raises:
      ValueError: `axis` out of range, `scale` not of the normalised shape, or a negative `epsilon`.
      TypeError: `x` or `scale` is not floating point.

    Use it in a pre-norm network whose weights write only d - 1 columns of the residual stream;
    choose d - 1, not d, as the multiple that the hardware likes.

    Cost: two reductions over d - 1 entries, where `rms_norm` has one over d; no state.

    Example:
      >>> print(compressed_rms_norm(jnp.array([1.0, -3.0])))  # stands for [1, -3, 2]
      [ 0.463 -1.389]

    Reference: Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and
    Efficient Pre-LN Transformers", 2023, arXiv:2305.14858.
    """
    check_floating(x=x)
    check_interval(0, jnp.inf, epsilon=epsilon)
    x = jnp.asarray(x)
    axes = canonical_axes(axis, x.ndim)
    wide = x.astype(compute_dtype(x))
    total = jnp.sum(wide, axis=axes, keepdims=True)
    square_sum = jnp.sum(jnp.square(wide), axis=axes, keepdims=True) + jnp.square(total)
    y = wide * reciprocal_root(square_sum / (x.shape[axis] + 1), epsilon)
    if scale is not None:
        y *= spread_parameter("scale", scale, axes, x.shape)
    return y.astype(x.dtype)


def compress_zero_mean(x: ArrayLike, *, axis: int = -1) -> Array:
    r"""The first d - 1 entries of a zero-mean d-vector, which determine the last one.

    Args:
      x: `[..., d]` floating point, d at least 1, of zero mean along `axis`. That is not checked; of
        any other vector, `decompress_zero_mean` changes the last entry.
      axis: the axis to shorten.

    Returns:
      `[..., d - 1]` in the type of `x`.

    Raises:
      ValueError: `axis` out of range or without entries.
      TypeError: `x` is not floating point.

    Use it on the embeddings and the output kernels of a network, re-centred first, to store its
    residual stream in d - 1 columns.

    Cost: a copy; nothing is computed.

    Example:
      >>> print(compress_zero_mean(jnp.array([1.0, -3.0, 2.0])))
      [ 1. -3.]

    Reference: Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and
    Efficient Pre-LN Transformers", 2023, arXiv:2305.14858.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    if x.shape[axis] == 0:
        raise ValueError(f"axis {axis} holds no entry to drop in x of shape {x.shape}")
    return jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)


def decompress_zero_mean(x: ArrayLike, *, axis: int = -1) -> Array:
    r"""The zero-mean d-vector whose first d - 1 entries are given: appends `-Σ_i x_i`.

    Args:
      x: `[..., d - 1]` floating point, the entries at `axis`.
      axis: the axis to lengthen.

    Returns:
      `[..., d]` in the type of `x`; the appended sum is taken in at least float32.

    Raises:
      ValueError: `axis` out of range.
      TypeError: `x` is not floating point.

    Use it to read a compressed residual stream; it undoes `compress_zero_mean`.

    Cost: one sum over the entries, and a copy.

    Example:
      >>> print(decompress_zero_mean(jnp.array([1.0, -3.0])))
      [ 1. -3.  2.]

    Reference: Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and
    Efficient Pre-LN Transformers", 2023, arXiv:2305.14858.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    last = -jnp.sum(x, axis=axis, keepdims=True)  # jnp.sum adds half precision up in float32
    return jnp.concatenate([x, last], axis=axis)
