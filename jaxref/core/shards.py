"""Sets that are spread over the shards of mapped axes."""

from typing import TypeVar

import jax
from jax import Array

AxisName = str | tuple[str, ...]
"""The name or names of mesh or vmap axes."""

Tree = TypeVar("Tree")


def sum_over_shards(values: Tree, axis_name: AxisName | None) -> Tree:
    """The values summed over all shards, in each of them; as they are without an axis.

    >>> import jax.numpy as jnp
    >>> jax.vmap(lambda x: sum_over_shards(x, "shards"), axis_name="shards")(jnp.arange(3))
    Array([3, 3, 3], dtype=int32)
    """
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def all_shards(values: Array, axis_name: AxisName | None) -> Array:
    """The values of all shards, one after the other along the first axis, in each of them.

    >>> import jax.numpy as jnp
    >>> jax.vmap(lambda x: all_shards(x[None], "shards"), axis_name="shards")(jnp.arange(2)).shape
    (2, 2)
    """
    return values if axis_name is None else jax.lax.all_gather(values, axis_name, tiled=True)
