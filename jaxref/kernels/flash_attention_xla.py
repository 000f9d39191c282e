"""Flash attention by XLA: blocks of queries, each over all the keys that it may see.

A block's logits exist as a whole, and those of no other block beside them. It is the reference that
the kernels are measured against, and serves any platform.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref.core.numerics import compute_dtype
from jaxref.kernels.flash_attention_tile import (
    Operands,
    Options,
    finish_softmax,
    logit_gradient,
    tile_logits,
)

# Logits of a block take this much, unless that were fewer rows than matrix products need to run at
# full speed.
_BLOCK_BYTES = 16 * 2**20
_MIN_ROWS = 64

# Blocks of causal attention share that many prefixes of the keys: each is compiled by itself.
_PREFIXES = 4


def forward(operands: Operands, options: Options) -> tuple[Array, Array]:
    """The output `[batch, q_len, heads, value_dim]` and the logsumexp `[batch, heads, q_len]`."""
    arrays = _arrange(operands, options)

    def attend(blocks: _Blocks, start: Array) -> tuple[Array, Array]:
        logits, _ = _logits(arrays, blocks, start)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
        divisor, logsumexp = finish_softmax(top, jnp.sum(weights, axis=-1, keepdims=True))
        value = arrays.value[:, :, : blocks.prefix]
        output = _product("bhgqk,bhkv->bhgqv", weights.astype(value.dtype), value) / divisor
        return output.astype(value.dtype), logsumexp

    rows = [_by_rows(jax.lax.map(partial(attend, x), x.starts)) for x in _blocks(arrays)]
    output, logsumexp = (jnp.concatenate(x, axis=3) for x in zip(*rows))
    return _to_public(output), logsumexp.reshape(*_merged(logsumexp))[..., 0]


def backward(
    operands: Operands, options: Options, cotangent: Array, logsumexp: Array, delta: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of query, key, value and slopes; `logsumexp` and `delta` are finite everywhere."""
    arrays = _arrange(operands, options)
    of_rows = _row_gradients(arrays, cotangent, logsumexp, delta)

    def step(blocks: _Blocks, sums: Any, start: Array) -> Any:
        query, given, weights, gradient, d_products = of_rows(blocks, start)
        key = arrays.key[:, :, : blocks.prefix]
        d_products, weights = d_products.astype(key.dtype), weights.astype(key.dtype)
        d_key = _product("bhgqk,bhgqd->bhkd", d_products, query)
        d_value = _product("bhgqk,bhgqv->bhkv", weights, given)
        d_slopes = None
        if arrays.slopes is not None:
            q_at, k_at = _positions(blocks, start)
            d_slopes = -jnp.sum(gradient * jnp.abs(q_at - k_at), axis=(0, 3, 4), keepdims=True)
        d_query = _product("bhgqk,bhkd->bhgqd", d_products, key).astype(key.dtype)
        return jax.tree.map(jnp.add, sums, (d_key, d_value, d_slopes)), d_query

    d_key, d_value = (jnp.zeros_like(x, logsumexp.dtype) for x in (arrays.key, arrays.value))
    d_slopes = None if arrays.slopes is None else jnp.zeros_like(arrays.slopes)
    rows = []
    for blocks in _blocks(arrays):
        prefix = slice(0, blocks.prefix)
        sums = (*(jnp.zeros_like(x[:, :, prefix]) for x in (d_key, d_value)), d_slopes)
        sums, d_query = jax.lax.scan(partial(step, blocks), sums, blocks.starts)
        d_key, d_value = (x.at[:, :, prefix].add(y) for x, y in zip((d_key, d_value), sums))
        d_slopes = sums[2]
        rows.append(_by_rows(d_query))
    d_query = _to_public(jnp.concatenate(rows, axis=3))
    d_key, d_value = (x.astype(arrays.key.dtype).swapaxes(1, 2) for x in (d_key, d_value))
    return d_query, d_key, d_value, None if d_slopes is None else d_slopes.reshape(-1)


def bias_gradient(
    operands: Operands, options: Options, cotangent: Array, logsumexp: Array, delta: Array
) -> Array:
    """The gradient of the bias, in float32 at least and of its shape."""
    arrays = _arrange(operands, options)
    of_rows = _row_gradients(arrays, cotangent, logsumexp, delta)
    assert operands.bias is not None
    assert arrays.bias is not None
    shape = arrays.bias.shape
    alike = tuple(axis for axis in range(5) if shape[axis] == 1)

    def step(blocks: _Blocks, total: Array, start: Array) -> tuple[Array, None]:
        gradient = of_rows(blocks, start)[3].sum(axis=alike, keepdims=True)
        at = [0, 0, 0, start if shape[3] > 1 else 0, 0]
        before = jax.lax.dynamic_slice(total, at, gradient.shape)
        return jax.lax.dynamic_update_slice(total, before + gradient, at), None

    total = jnp.zeros_like(arrays.bias, logsumexp.dtype)
    for blocks in _blocks(arrays):
        total, _ = jax.lax.scan(partial(step, blocks), total, blocks.starts)
    return total.reshape(operands.bias.shape)


class _Arrays(NamedTuple):
    """Operands with heads ahead of positions, and query heads apart by the key head they share.

    Attributes:
      query: `[batch, kv_heads, groups, q_len, head_dim]`.
      key, value: `[batch, kv_heads, k_len, head_dim or value_dim]`.
      bias: five axes.
      slopes: `[1, kv_heads, groups, 1, 1]`.
      query_segments, key_segments: `[batch, 1, 1, q_len, 1]` and `[batch, 1, 1, 1, k_len]`.
      block_mask: `[1, kv_heads, groups, q_blocks, k_blocks]`.
      options: as given.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None
    slopes: Array | None
    query_segments: Array | None
    key_segments: Array | None
    block_mask: Array | None
    options: Options


class _Blocks(NamedTuple):
    """Blocks of as many rows each that see the same prefix of the keys."""

    starts: np.ndarray
    rows: int
    prefix: int


def _arrange(operands: Operands, options: Options) -> _Arrays:
    kv_heads = operands.key.shape[2]
    apart = partial(_apart, kv_heads=kv_heads)
    slopes, block_mask = operands.slopes, operands.block_mask
    q_segments, k_segments = operands.query_segments, operands.key_segments
    return _Arrays(
        apart(operands.query.swapaxes(1, 2)),
        operands.key.swapaxes(1, 2),
        operands.value.swapaxes(1, 2),
        None if operands.bias is None else apart(operands.bias),
        None if slopes is None else apart(slopes[None, :, None, None]),
        None if q_segments is None else q_segments[:, None, None, :, None],
        None if k_segments is None else k_segments[:, None, None, None, :],
        None if block_mask is None else apart(block_mask[None]),
        options,
    )


def _apart(x: Array, kv_heads: int) -> Array:
    """`[batch, kv_heads, groups, ...]` of `[batch, heads, ...]`; one head stays one."""
    split = (1, 1) if x.shape[1] == 1 else (kv_heads, x.shape[1] // kv_heads)
    return x.reshape(x.shape[0], *split, *x.shape[2:])


def _merged(x: Array) -> tuple[int, ...]:
    """The shape of `x [batch, kv_heads, groups, ...]` with its heads in one axis."""
    return (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _to_public(x: Array) -> Array:
    """`[batch, q_len, heads, size]` of `[batch, kv_heads, groups, q_len, size]`."""
    return x.reshape(_merged(x)).swapaxes(1, 2)


def _by_rows(x: Any) -> Any:
    """Joins blocks `[blocks, batch, kv_heads, groups, rows, size]` at their rows."""

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], x.shape[5])

    return jax.tree.map(join, x)


def _blocks(arrays: _Arrays) -> list[_Blocks]:
    """All rows in their order."""
    batch, kv_heads, groups, q_len, _ = arrays.query.shape
    k_len, is_causal = arrays.key.shape[2], arrays.options.is_causal
    rows = _BLOCK_BYTES // (4 * batch * kv_heads * groups * k_len)
    if is_causal:
        rows = min(rows, -(-q_len // _PREFIXES))
    rows = min(max(rows, _MIN_ROWS), q_len)
    whole, rest = divmod(q_len, rows)
    together = -(-whole // _PREFIXES) if is_causal else whole
    blocks = [np.arange(i, min(i + together, whole)) * rows for i in range(0, whole, together)]
    chosen = [(starts, rows) for starts in blocks]
    if rest:
        chosen.append((np.array([whole * rows]), rest))
    return [
        _Blocks(starts, rows, min(k_len, int(starts[-1]) + rows) if is_causal else k_len)
        for starts, rows in chosen
    ]


def _logits(arrays: _Arrays, blocks: _Blocks, start: Array) -> tuple[Array, Array | None]:
    """Logits `[batch, kv_heads, groups, rows, prefix]` of a block, as `tile_logits` has them."""

    def crop(x: Array | None) -> Array | None:
        if x is None:
            return None
        if x.shape[3] > 1:
            x = _rows(x, blocks, start)
        return x[..., : blocks.prefix] if x.shape[4] > 1 else x

    options = arrays.options
    query, key = _rows(arrays.query, blocks, start), arrays.key[:, :, : blocks.prefix]
    products = _product("bhgqd,bhkd->bhgqk", query, key)
    q_at, k_at = _positions(blocks, start)
    keep = None
    if arrays.block_mask is not None:
        block_q, block_k = cast("tuple[int, int]", options[2:4])
        keep = jnp.take(arrays.block_mask, q_at[:, 0] // block_q, axis=3)
        keep = jnp.take(keep, k_at[0] // block_k, axis=4)
    return tile_logits(
        products,
        q_at,
        k_at,
        options,
        bias=crop(arrays.bias),
        slope=arrays.slopes,
        query_segments=crop(arrays.query_segments),
        key_segments=crop(arrays.key_segments),
        keep=keep,
    )


def _row_gradients(
    arrays: _Arrays, cotangent: Array, logsumexp: Array, delta: Array
) -> Callable[[_Blocks, Array], tuple[Array, Array, Array, Array, Array]]:
    """A function of a block and where it starts, which gives its queries and cotangents, and its
    weights with the gradients of its logits and of the products in them."""
    kv_heads = arrays.key.shape[1]
    cotangent = _apart(cotangent.swapaxes(1, 2), kv_heads)
    logsumexp, delta = (_apart(x[..., None], kv_heads) for x in (logsumexp, delta))

    def of_rows(blocks: _Blocks, start: Array) -> tuple[Array, Array, Array, Array, Array]:
        query, given, at_top, shift = (
            _rows(x, blocks, start) for x in (arrays.query, cotangent, logsumexp, delta)
        )
        logits, derivative = _logits(arrays, blocks, start)
        weights = jnp.exp(logits - at_top)
        value = arrays.value[:, :, : blocks.prefix]
        products = _product("bhgqv,bhkv->bhgqk", given, value)
        return query, given, weights, *logit_gradient(weights, products, shift, derivative)

    return of_rows


def _positions(blocks: _Blocks, start: Array) -> tuple[Array, Array]:
    return start + jnp.arange(blocks.rows)[:, None], jnp.arange(blocks.prefix)[None]


def _rows(x: Array, blocks: _Blocks, start: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, blocks.rows, axis=3)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=compute_dtype(a, b))
