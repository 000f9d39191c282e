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


def varying_alike(*operands: Array) -> tuple[Array, ...]:
    """The operands, varying over all mesh axes of `jax.shard_map` over which any of them does.

    The operands of a kernel, or of a function with a gradient of its own, must agree in it, and the
    gradient of one that all shards share is then summed over them.

    >>> import jax.numpy as jnp
    >>> print(*varying_alike(jnp.array(1.0), jnp.array(2.0)))
    1.0 2.0
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    every = frozenset[str]().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(every - own)), to="varying") if every - own else x
        for x, own in zip(operands, varying, strict=True)
    )
