"""Reductions over the entries that a mask admits."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName


def masked_mean(
    x: ArrayLike,
    *,
    axis: int | tuple[int, ...] | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> Array:
    """Mean over the entries that `where` admits; 0, with gradient 0, where it admits none.

    Args:
      x: floating point; excluded entries may hold anything, NaN included.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `x`. Default: every entry.
      keepdims: keep the reduced axes with size 1.

    >>> masked_mean(jnp.array([1.0, 3.0, jnp.nan]), where=jnp.array([True, True, False]))
    Array(2., dtype=float32)
    """
    if where is None:
        return jnp.mean(x, axis=axis, keepdims=keepdims)
    where = jnp.broadcast_to(where, jnp.shape(x))
    count = jnp.count_nonzero(where, axis=axis, keepdims=keepdims)
    return jnp.sum(x, axis=axis, keepdims=keepdims, where=where) / jnp.maximum(count, 1)


def masked_logsumexp(
    x: ArrayLike,
    *,
    axis: int | None = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    """log Σ exp x over the entries that `where` admits, in at least float32.

    Excluded entries have gradient 0; where none is admitted the result is 0, not -inf.

    Args:
      x: floating point; excluded entries may hold anything, NaN included.
      axis: the axis to reduce; None for all.
      where: boolean, broadcastable to `x`. Default: every entry.
      axis_name: name or names of the mesh or vmap axes over which the reduced axis is spread.

    >>> masked_logsumexp(jnp.array([1.0, 1.0, jnp.nan]), where=jnp.array([True, True, False]))
    Array(1.6931472, dtype=float32)
    """
    x = jnp.asarray(x)
    x = x.astype(compute_dtype(x))
    if where is None and axis_name is None:
        return jax.nn.logsumexp(x, axis=axis)
    where = jnp.broadcast_to(True if where is None else where, x.shape)
    exists = where.any(axis=axis)
    total = jax.nn.logsumexp(jnp.where(where, x, jnp.finfo(x.dtype).min), axis=axis)
    if axis_name is None:
        return jnp.where(exists, total, 0.0)
    top = jax.lax.pmax(jax.lax.stop_gradient(jnp.where(exists, total, -jnp.inf)), axis_name)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    mass = jax.lax.psum(jnp.exp(total - top), axis_name)  # 0 from a shard without entries
    return top + jnp.log(jnp.where(mass > 0, mass, 1.0))
