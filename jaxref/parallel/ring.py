"""Shards on a ring: what each has goes past all of them, and no device holds it all."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.core.shards import AxisName, all_shards, varying_alike

Block = Callable[[Any, Any, Array | int, Array | int], Array]
"""`block(rows, columns, first_row, first_column)` -> a value for each row."""


def go_round(
    axis_name: AxisName,
    travelling: Any,
    start: Callable[[Any], tuple[Any, Any]],
    step: Callable[[Any, Array, Any, Any], tuple[Any, Any]],
) -> tuple[Any, Any]:
    """Takes what every shard has past all shards, with sums that go with it.

    Args:
      axis_name: name or names of the mapped axes.
      travelling: a tree of arrays of this shard.
      start: `start(travelling)` of the shard's own: sums that stay with the shard, and sums that
        go with what travels, or None.
      step: `step(travelling, source, staying, going)` with what comes from the shard of index
        `source`: both sums anew.

    Returns:
      Both sums, each in the shard to which it belongs.

    What is sent does not depend on what is computed meanwhile, so that the compiler may do both at
    once. The steps are a loop, which compiles once whatever the size of the ring; the last one is
    apart, as it has nothing to send on.
    """
    size = jax.lax.axis_size(axis_name)
    if size == 1:
        return start(travelling)
    place = jax.lax.axis_index(axis_name)
    to_next = [(i, (i + 1) % size) for i in range(size)]

    def send(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, to_next), tree)

    def visit(t: Any, carry: Any, is_last: bool = False) -> Any:
        here, staying, going = carry
        coming = here if is_last else send(here)
        return coming, *step(here, (place - t) % size, staying, send(going))

    carry = send(travelling), *start(travelling)
    if size > 2:
        carry = jax.lax.fori_loop(1, size - 1, visit, carry)
    _, staying, going = visit(size - 1, carry, is_last=True)
    return staying, send(going)


def reduce_pairs(
    block: Block,
    rows: Any,
    columns: Any,
    *,
    combine: Literal["sum", "logsumexp"] = "sum",
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> Array:
    """A value for each row from its pairs with the columns of all shards.

    Args:
      block: `block(rows, columns, first_row, first_column)` -> `[rows]` floating point: the sum, or
        the log of the sum of exponentials, over these columns. The last two are the places of its
        rows and columns among those of all shards. It reads no traced values but its arguments.
      rows: a tree of arrays that stay, the first of them `[rows, ...]`; others may be shared by all
        rows.
      columns: a tree of arrays that are gathered or go round, each `[columns, ...]`.
      combine: how values of blocks become the value of all columns.
      axis_name: name or names of the mapped axes over which rows and columns are spread. Default:
        there is one block.
      ring: whether columns go round, and a device has one block of its rows with one shard's
        columns at a time, forward and backward, rather than gather all columns.

    Returns:
      `[rows]`, this shard's. Gradients reach the floating point arrays of all shards; in the ring
      in reverse mode and once.

    Every shard sends its columns to all others; in the ring's backward pass that again, and their
    gradients.

    >>> products = lambda rows, columns, first_row, first_column: (rows @ columns.T).sum(axis=1)
    >>> reduce_pairs(products, jnp.eye(2), jnp.arange(6.0).reshape(3, 2))
    Array([6., 9.], dtype=float32)
    """
    if axis_name is None:
        return block(rows, columns, 0, 0)
    place = jax.lax.axis_index(axis_name)
    if not ring:
        gathered = jax.tree.map(lambda x: all_shards(x, axis_name), columns)
        return block(rows, gathered, place * _length(rows), 0)
    leaves, structure = jax.tree.flatten((rows, columns))
    rows, columns = jax.tree.unflatten(structure, varying_alike(*leaves))
    return _on_ring(_Ring(block, combine, axis_name), place, rows, columns)


class _Ring(NamedTuple):
    """What is known when a program is traced."""

    block: Block
    combine: str
    axis_name: AxisName


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_ring(ring: _Ring, place: Array, rows: Any, columns: Any) -> Array:
    return _on_ring_forward(ring, place, rows, columns)[0]


def _on_ring_forward(ring: _Ring, place: Array, rows: Any, columns: Any) -> Any:
    first_row = place * _length(rows)
    merge = jnp.logaddexp if ring.combine == "logsumexp" else jnp.add

    def start(columns: Any) -> Any:
        return ring.block(rows, columns, first_row, place * _length(columns)), None

    def step(columns: Any, source: Array, values: Array, _: None) -> Any:
        block = ring.block(rows, columns, first_row, source * _length(columns))
        return merge(values, block), None

    values, _ = go_round(ring.axis_name, columns, start, step)
    return values, (place, rows, columns, values)


def _on_ring_backward(ring: _Ring, residuals: Any, cotangent: Array) -> Any:
    place, rows, columns, values = residuals
    own, restore_rows = _floating(rows)

    def gradients(columns: Any, source: Array) -> tuple[Any, Any]:
        travelling, restore_columns = _floating(columns)

        def block(own: list[Array], travelling: list[Array]) -> Array:
            first_row, first_column = place * _length(rows), source * _length(columns)
            return ring.block(
                restore_rows(own), restore_columns(travelling), first_row, first_column
            )

        part, pull = jax.vjp(block, own, travelling)
        share = cotangent
        if ring.combine == "logsumexp":
            is_empty = jnp.isneginf(part)
            share *= jnp.where(is_empty, 0.0, jnp.exp(jnp.where(is_empty, 0.0, part - values)))
        return pull(share)

    def step(columns: Any, source: Array, own: Any, travelling: Any) -> Any:
        return jax.tree.map(jnp.add, (own, travelling), gradients(columns, source))

    of_rows, of_columns = go_round(ring.axis_name, columns, partial(gradients, source=place), step)
    return None, restore_rows(of_rows, None), _floating(columns)[1](of_columns, None)


_on_ring.defvjp(_on_ring_forward, _on_ring_backward)


def _floating(tree: Any) -> tuple[list[Array], Callable[..., Any]]:
    """The floating point arrays of a tree, and what puts others in their place; the rest of the
    tree stays, or is one value."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def restore(floating: list[Array], *rest: None) -> Any:
        restored: list[Any] = list(rest) * len(leaves) or list(leaves)
        for i, array in zip(places, floating):
            restored[i] = array
        return jax.tree.unflatten(structure, restored)

    return [leaves[i] for i in places], restore


def _length(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]
