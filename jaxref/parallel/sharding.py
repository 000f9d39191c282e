"""Logical axis names on arrays, and rules as data that place them on mesh axes.

A parameter or activation names its axes by what they mean ("embed", "heads", "batch", ...). Rules
say which mesh axes each name is split over. The same model then runs on any mesh, by any
strategy, without a change in its code.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxref.parallel.mesh import MESH_AXES

Rules = Mapping[str, Sequence[str]]
Name = str | tuple[str, ...] | None
"""Of an axis: a logical name, those of the axes that were merged into it, or None."""

DEFAULT_RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
    "expert": ("expert",),
}
"""Sequences over data, fsdp and expert, their tokens over sequence; parameters along their
embedding axis over fsdp, and over expert those that are no expert's, and over tensor along heads,
hidden units or vocabulary. A name that is not here is not split."""

_active: contextvars.ContextVar[tuple[Mesh | AbstractMesh, Rules] | None] = contextvars.ContextVar(
    "active sharding rules", default=None
)


def partition_spec(
    axes: tuple[Name, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules = DEFAULT_RULES,
) -> PartitionSpec:
    """The `PartitionSpec` of an array whose axes bear the logical names `axes`.

    Args:
      axes: a logical name or None for each axis of the array. An axis into which several were
        merged bears a tuple of names, the outermost first.
      shape: the array's shape, to check that the mesh divides it.
      mesh: the mesh. One of `MESH_AXES` that it does not have counts as one of size 1.
      rules: mesh axes by logical name; a name without a rule is not split. A mesh axis that an
        earlier axis of the array already took is left out, so that an [embed, embed] matrix is
        split once.

    Returns:
      The spec, with mesh axes of size 1 left out.

    Raises:
      ValueError: `axes` and `shape` differ in length, a rule names an axis that no mesh has, or a
        size is not divisible by the product of its mesh axes.

    Use it where JAX asks for a spec, as the arguments of `jax.shard_map` do; `logical_sharding` has
    the mesh in it, for `jax.device_put` and `jax.jit`, and `constrain` is for activations.

    Cost: a look-up for each axis while tracing, nothing in a run.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 2, 2), ("data", "fsdp", "tensor"))
      >>> tuple(partition_spec(("embed", "heads", None), (64, 4, 16), mesh))
      ('fsdp', 'tensor', None)
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} do not name the axes of an array of shape {shape}")
    taken: set[str] = set()
    entries = []
    for name, size in zip(axes, shape):
        over = tuple(axis for axis in mesh_axes(name, mesh, rules) if axis not in taken)
        ways = math.prod(mesh.shape[axis] for axis in over)
        if size % ways:
            fitting = [n for n in range(ways, 0, -1) if size % n == 0][:1]
            raise ValueError(
                f"axis {name!r} of size {size} cannot be split {ways} ways over mesh axes "
                f"{list(over)}: make it a multiple of {ways}, or the mesh axes smaller, such as "
                f"{fitting[0]} in all"
            )
        taken.update(over)
        entries.append(over if len(over) > 1 else over[0] if over else None)
    return PartitionSpec(*entries)


def mesh_axes(
    name: Name, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES
) -> tuple[str, ...]:
    """The mesh axes that a logical name is split over, those of size 1 left out.

    Args:
      name, mesh, rules: as in `partition_spec`.

    Returns:
      Names of mesh axes, outermost first.

    Raises:
      ValueError: a rule names an axis that no mesh has.

    Use it to learn over how many devices a name is spread, or which axes a collective has to name;
    `split_over` asks the same of the rules in force.

    Cost: a look-up while tracing, nothing in a run.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 1, 2), ("data", "fsdp", "tensor"))
      >>> mesh_axes("batch", mesh), mesh_axes(("batch", "heads"), mesh)
      (('data',), ('data', 'tensor'))
    """
    if isinstance(name, tuple):
        return tuple(axis for part in name for axis in mesh_axes(part, mesh, rules))
    wanted = () if name is None else rules.get(name, ())
    unknown = set(wanted) - set(mesh.axis_names) - set(MESH_AXES)
    if unknown or isinstance(wanted, str):
        raise ValueError(
            f"rules place axis {name!r} on mesh axes {wanted!r}, but the mesh has "
            f"{list(mesh.axis_names)}"
        )
    return tuple(axis for axis in wanted if mesh.shape.get(axis, 1) > 1)


def logical_sharding(
    axes: tuple[Name, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules = DEFAULT_RULES,
) -> NamedSharding:
    """`partition_spec` as a `NamedSharding` on `mesh`, with the same errors.

    Args:
      axes, shape, mesh, rules: as in `partition_spec`.

    Returns:
      The sharding.

    Use it to place parameters and batches on a mesh, by `jax.device_put` or as shardings of
    `jax.jit`; `constrain` fixes those of activations in between.

    Cost: a look-up for each axis; what it costs to move an array is up to what takes the sharding.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 2, 2), ("data", "fsdp", "tensor"))
      >>> logical_sharding(("embed", "mlp"), (64, 256), mesh).shard_shape((64, 256))
      (32, 128)
    """
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))


@contextlib.contextmanager
def use_rules(mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Within this context, `constrain` and `on_shards` split activations over `mesh` by `rules`.

    Enter it inside the function that is jitted, around the call of the model: a trace that was
    made elsewhere and is only called here does not see it.

    Args:
      mesh: the mesh that the function's arguments are on.
      rules: mesh axes by logical name, as in `partition_spec`.

    Returns:
      A context manager.

    Use it around a model that calls `constrain` and `on_shards`, to run it spread over a mesh;
    without it the same model runs on one device, or as the compiler likes.

    Cost: nothing in a run: it is read while tracing.

    Example:
      >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
      >>> with use_rules(mesh):
      ...     y = constrain(jax.numpy.ones((2, 3)), "batch", None)
    """
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def mapped_over(axis: str) -> Iterator[None]:
    """Within this context the rules in force leave a mesh axis out.

    Args:
      axis: the name of a mesh axis.

    Returns:
      A context manager.

    Use it around a function under `jax.vmap(..., spmd_axis_name=axis)`, whose mapped axis takes
    that one: what the function splits is then split over the others.

    Cost: nothing in a run: it is read while tracing.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "fsdp"))
      >>> with use_rules(mesh), mapped_over("data"):
      ...     print(split_over("batch"))
      ('fsdp',)
    """
    active = _active.get()
    if active is None:
        yield
        return
    mesh, rules = active
    others = {name: [a for a in axes if a != axis] for name, axes in rules.items()}
    with use_rules(mesh, others):
        yield


def constrain(x: Array, *axes: Name) -> Array:
    """`x` with its sharding fixed by its axes' logical names.

    Outside `use_rules`, and inside `jax.shard_map`, `x` itself.

    Args:
      x: an activation inside a traced function.
      *axes: for each axis of `x` a logical name, several where axes were merged, or None.

    Returns:
      `x`, for the compiler to place as the rules say.

    Raises:
      ValueError: as in `partition_spec`.

    Use it at the few places where a model's activations change hands, as at the entry of each
    block, so that the compiler need not guess; `logical_sharding` is for what goes in and out of a
    program.

    Cost: nothing where `x` lies so already, otherwise the collectives that the compiler moves it
    by.

    Example:
      >>> constrain(jax.numpy.ones((2, 3)), "batch", None).shape
      (2, 3)
    """
    active = _spread()
    if active is None:
        return x
    return jax.lax.with_sharding_constraint(x, logical_sharding(axes, x.shape, *active))


def split_over(*names: str) -> tuple[str, ...]:
    """The mesh axes that logical names are split over at this place in the program.

    Args:
      *names: logical names.

    Returns:
      Names of mesh axes; none outside `use_rules`, inside `jax.shard_map` and on one device.

    Use it in a function for `on_shards`, before the call, to find the `axis_name` of what it has to
    exchange; `mesh_axes` answers for any mesh and rules.

    Cost: a look-up while tracing, nothing in a run.

    Example:
      >>> split_over("length")
      ()
    """
    active = _spread()
    return () if active is None else mesh_axes(names, *active)


def on_shards(
    function: Callable[..., Any],
    in_axes: Sequence[tuple[Name, ...] | None],
    out_axes: tuple[Name, ...],
) -> Callable[..., Any]:
    """`function`, called by each device on its shards of the arguments.

    What the compiler does not partition itself, or not well: kernels, and algorithms that exchange
    something of their own. `jax.shard_map` by the rules in force. Without any, on one device and
    inside `jax.shard_map`, it is the function itself, which finds out by `split_over`, before, over
    which axes it has to exchange.

    Args:
      function: of arrays, to an array or a tree of arrays.
      in_axes: for each argument the logical names of its axes; None for an argument that every
        device has whole, or that is None.
      out_axes: the names of the result's axes, or of the first axes of all arrays in it.

    Returns:
      A function of the same arguments. It raises ValueError as `partition_spec` does.

    Use it for Pallas kernels and for algorithms that exchange something of their own; what the
    compiler partitions well needs no more than `constrain`.

    Cost: nothing where arguments lie as their names say, otherwise the collectives that bring them
    there; `function` adds its own.

    Example:
      >>> double = on_shards(lambda x: 2 * x, [("batch", None)], ("batch", None))
      >>> double(jax.numpy.ones((2, 3))).shape
      (2, 3)
    """
    active = _spread()
    if active is None:
        return function

    def sharded(*args: Any) -> Any:
        def spec(axes: tuple[Name, ...] | None, arg: Any) -> PartitionSpec:
            if axes is None or arg is None:
                return PartitionSpec()
            return partition_spec(axes, arg.shape, *active)

        call = jax.shard_map(
            function,
            mesh=active[0],
            in_specs=tuple(map(spec, in_axes, args)),
            out_specs=PartitionSpec(*(mesh_axes(name, *active) for name in out_axes)),
        )
        return call(*args)

    return sharded


def merge_rows(x: Array, leading: int = 2) -> Array:
    """`[batch, length, ...]` as rows `[batch · length, ...]`.

    Where the rules split the length, the rows are ordered so that those of each device stay there:
    shard after shard. `split_rows` restores the order.

    Args:
      x: an array.
      leading: how many axes to merge; other than 2 they are not batch and length, and their rows
        keep their order. Default 2.

    Returns:
      The rows. What is done to each row alone can be done to them.

    Use it before layers that act on each token alone, to give the compiler plain matrix products;
    `split_rows` brings the sequences back for attention.

    Cost: a reshape; where the length is split, a transposition within each device. Nothing is sent.

    Example:
      >>> merge_rows(jax.numpy.ones((2, 3, 4))).shape
      (6, 4)
    """
    shape, rest = x.shape[:leading], x.shape[leading:]
    ways = _ways(shape)
    if ways is None:
        return x.reshape(math.prod(shape), *rest)
    x = x.reshape(ways[0], shape[0] // ways[0], ways[1], shape[1] // ways[1], *rest)
    x = x.swapaxes(1, 2).reshape(math.prod(shape), *rest)
    return constrain(x, ("batch", "length"), *[None] * len(rest))


def split_rows(rows: Array, shape: tuple[int, ...]) -> Array:
    """Rows of `merge_rows` as `[batch, length, ...]`.

    Args:
      rows: `[batch · length, ...]`.
      shape: of the axes that were merged, `(batch, length)`.

    Returns:
      The array with these axes in the place of the first.

    Use it after `merge_rows` with the shape that was merged, under the same rules: in others the
    order of the rows would be another.

    Cost: a reshape; where the length is split, a transposition within each device. Nothing is sent.

    Example:
      >>> split_rows(jax.numpy.ones((6, 4)), (2, 3)).shape
      (2, 3, 4)
    """
    rest = rows.shape[1:]
    ways = _ways(shape)
    if ways is None:
        return rows.reshape(*shape, *rest)
    x = rows.reshape(*ways, shape[0] // ways[0], shape[1] // ways[1], *rest)
    return x.swapaxes(1, 2).reshape(*shape, *rest)


def _spread() -> tuple[Mesh | AbstractMesh, Rules] | None:
    """Mesh and rules, where there is something to split."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return None
    if jax.sharding.get_abstract_mesh().manual_axes:  # in `jax.shard_map`: it is placed
        return None
    return active


def _ways(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """How many ways batch and length are split, where the length is and the shape is of them."""
    active = _spread()
    if active is None or len(shape) != 2 or not split_over("length"):
        return None
    over = (mesh_axes(name, *active) for name in ("batch", "length"))
    batch, length = (math.prod(active[0].shape[axis] for axis in axes) for axes in over)
    return None if shape[0] % batch or shape[1] % length else (batch, length)
