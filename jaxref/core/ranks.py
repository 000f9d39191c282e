"""Ranks of the members of a set, over all of its shards."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.shards import AxisName, sum_over_shards


def ascending_ranks(
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """The rank of each entry among those that `where` admits, 0 for the smallest, and their number.

    Equal entries rank in their order in memory. Ranks have no gradient.

    Args:
      values: floating point of any shape, ranked as one set.
      where: boolean, broadcastable to `values`; the others rank after all that it admits.
      axis_name: name or names of the mesh or vmap axes over which the set is spread; ranks and
        number are then those of all of it.

    Returns:
      int32 ranks of the shape of `values`, and the number as an int32 scalar.

    >>> ascending_ranks(jnp.array([0.3, 0.1, 0.2]))[0]
    Array([2, 0, 1], dtype=int32)
    """
    values = jax.lax.stop_gradient(jnp.asarray(values))
    excluded = jnp.zeros(values.shape, bool)
    if where is not None:
        excluded = ~jnp.broadcast_to(where, values.shape)
    keys, absent = values.ravel(), excluded.ravel()
    start: Array | int = 0
    number = sum_over_shards(jnp.sum(~absent, dtype=jnp.int32), axis_name)
    if axis_name is not None:
        start = jax.lax.axis_index(axis_name) * keys.size
        keys, absent = jax.lax.all_gather((keys, absent), axis_name, tiled=True)
    order = jnp.lexsort((jnp.where(absent, 0, keys), absent))
    ranks = jnp.zeros(keys.shape, jnp.int32).at[order].set(jnp.arange(keys.size, dtype=jnp.int32))
    own = jax.lax.dynamic_slice_in_dim(ranks, start, values.size)
    return own.reshape(values.shape), number
