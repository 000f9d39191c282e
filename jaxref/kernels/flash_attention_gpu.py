"""Flash attention by Pallas kernels for NVIDIA GPUs, compiled by Triton.

A program takes a block of queries over the keys, or of keys over the queries, and loops over those
tiles that take part. It reads the arrays as they lie, batch and positions as rows and heads and
features as columns, and masks what reaches past their ends.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxref.kernels.flash_attention_tile import (
    Operands,
    Options,
    finish_softmax,
    logit_gradient,
    online_softmax,
    product,
    tile_logits,
)
from jaxref.kernels.implementation import kernel_result

_MIN_BLOCK = 16  # of Triton's matrix products


class _Sizes(NamedTuple):
    """Lengths, the shape of a bias, and the blocks that cover them."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    value_dim: int
    bias: tuple[int, ...]
    block_q: int
    block_k: int

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)


class _Inputs(NamedTuple):
    """Operands as matrices and vectors.

    Attributes:
      query, cotangent: `[batch * q_len, heads * size]`.
      key, value: `[batch * k_len, kv_heads * size]`.
      bias: its last axis against all others.
      slopes: `[heads]`.
      query_segments, key_segments: `[batch * q_len]` and `[batch * k_len]`.
      logsumexp, delta: `[batch * heads * q_len]`.
      keep: int32 `[heads * q_blocks * k_blocks]`, which tiles take part under a mask of blocks.
      key_order, key_count: the blocks of keys of each head and block of queries, those that take
        part first, and how many these are.
      query_order, query_count: likewise of queries, of each head and block of keys.
    """

    query: Any
    key: Any
    value: Any
    bias: Any
    slopes: Any
    query_segments: Any
    key_segments: Any
    cotangent: Any
    logsumexp: Any
    delta: Any
    keep: Any
    key_order: Any
    key_count: Any
    query_order: Any
    query_count: Any


class _Place(NamedTuple):
    """Which tile: of an example and a query head, a block of queries and a block of keys."""

    batch: Any
    head: Any
    q_block: Any
    k_block: Any


def forward(operands: Operands, options: Options) -> tuple[Array, Array]:
    """The output `[batch, q_len, heads, value_dim]` and the logsumexp `[batch, heads, q_len]`."""
    sizes = _sizes(operands, options, blocks=(128, 64))
    inputs = _arrange(operands, sizes, options)

    def kernel(x: _Inputs, output: Any, logsumexp: Any) -> None:
        i, h, b = (pl.program_id(axis) for axis in range(3))
        rows = _Place(b, h, i, 0)
        query = _queries(x.query, rows, sizes, sizes.dim)

        def step(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, summed = carry
            place = _Place(b, h, i, _key_block(x, rows, at, sizes))
            key = _keys(x.key, place, sizes, sizes.dim)
            value = _keys(x.value, place, sizes, sizes.value_dim)
            logits, _ = _logits(x, place, query, key, sizes, options)
            top, total, weights, shrink = online_softmax(top, total, logits, axis=1)
            summed = summed * shrink + product(weights.astype(value.dtype), value, (1, 0))
            return top, total, summed

        top = jnp.full((sizes.block_q, 1), -jnp.inf, jnp.float32)
        total = jnp.zeros((sizes.block_q, 1), jnp.float32)
        summed = jnp.zeros((sizes.block_q, _padded(sizes.value_dim)), jnp.float32)
        steps = _key_steps(x, rows, sizes, options)
        top, total, summed = jax.lax.fori_loop(0, steps, step, (top, total, summed))
        divisor, of_rows = finish_softmax(top, total)
        _store_queries(output, rows, summed / divisor, sizes, sizes.value_dim)
        _store_row(logsumexp, rows, of_rows, sizes)

    shape = sizes.batch * sizes.q_len, sizes.heads * sizes.value_dim
    output, logsumexp = _call(
        kernel,
        (sizes.q_blocks, sizes.heads, sizes.batch),
        inputs,
        options,
        [(shape, operands.value.dtype), ((sizes.batch * sizes.heads * sizes.q_len,), jnp.float32)],
        name="forward",
        warps=4 if sizes.dim <= 64 else 8,
    )
    output = output.reshape(sizes.batch, sizes.q_len, sizes.heads, sizes.value_dim)
    return output, logsumexp.reshape(sizes.batch, sizes.heads, sizes.q_len)


def backward(
    operands: Operands, options: Options, cotangent: Array, logsumexp: Array, delta: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of query, key, value and slopes; `logsumexp` and `delta` are finite everywhere."""
    sizes = _sizes(operands, options, blocks=(64, 64))
    inputs = _arrange(operands, sizes, options, cotangent, logsumexp, delta)
    d_query, d_slopes = _query_gradient(operands, inputs, sizes, options)
    d_key, d_value = _key_gradients(operands, inputs, sizes, options)
    return d_query, d_key, d_value, d_slopes


def _query_gradient(
    operands: Operands, inputs: _Inputs, sizes: _Sizes, options: Options
) -> tuple[Array, Array | None]:
    """The gradient of the query, and that of the slopes, for which there is a sum per query."""
    has_slopes = inputs.slopes is not None

    def kernel(x: _Inputs, d_query: Any, *d_slope: Any) -> None:
        i, h, b = (pl.program_id(axis) for axis in range(3))
        rows = _Place(b, h, i, 0)
        query = _queries(x.query, rows, sizes, sizes.dim)
        cotangent = _queries(x.cotangent, rows, sizes, sizes.value_dim)

        def step(at: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            summed, of_slope = carry
            place = _Place(b, h, i, _key_block(x, rows, at, sizes))
            key = _keys(x.key, place, sizes, sizes.dim)
            value = _keys(x.value, place, sizes, sizes.value_dim)
            tiles = query, key, value, cotangent
            _, gradient, d_products = _gradients(x, place, tiles, sizes, options)
            if has_slopes:
                q_at, k_at = _positions(place, sizes)
                distance = jnp.abs(q_at - k_at).astype(jnp.float32)
                of_slope -= jnp.sum(gradient * distance, axis=1, keepdims=True)
            return summed + product(d_products.astype(key.dtype), key, (1, 0)), of_slope

        zeros = jnp.zeros((sizes.block_q, _padded(sizes.dim)), jnp.float32)
        carry = zeros, jnp.zeros((sizes.block_q, 1), jnp.float32)
        steps = _key_steps(x, rows, sizes, options)
        summed, of_slope = jax.lax.fori_loop(0, steps, step, carry)
        _store_queries(d_query, rows, summed, sizes, sizes.dim)
        if has_slopes:
            _store_row(d_slope[0], rows, of_slope, sizes)

    shape = sizes.batch * sizes.q_len, sizes.heads * sizes.dim
    results: list[Any] = [(shape, operands.query.dtype)]
    if has_slopes:
        results.append(((sizes.batch * sizes.heads * sizes.q_len,), jnp.float32))
    grid = sizes.q_blocks, sizes.heads, sizes.batch
    d_query, *d_slope = _call(kernel, grid, inputs, options, results, "query_gradient")
    d_query = d_query.reshape(operands.query.shape)
    if not has_slopes:
        return d_query, None
    return d_query, d_slope[0].reshape(sizes.batch, sizes.heads, sizes.q_len).sum((0, 2))


def _key_gradients(
    operands: Operands, inputs: _Inputs, sizes: _Sizes, options: Options
) -> tuple[Array, Array]:
    """The gradients of keys and values, summed over all queries of the heads that share them."""
    groups = sizes.heads // sizes.kv_heads

    def kernel(x: _Inputs, d_key: Any, d_value: Any) -> None:
        j, kv_head, b = (pl.program_id(axis) for axis in range(3))
        rows = _Place(b, kv_head * groups, 0, j)
        key = _keys(x.key, rows, sizes, sizes.dim)
        value = _keys(x.value, rows, sizes, sizes.value_dim)

        def of_head(group: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            h = kv_head * groups + group

            def step(at: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                of_key, of_value = carry
                place = _Place(b, h, _query_block(x, h, j, at, sizes), j)
                query = _queries(x.query, place, sizes, sizes.dim)
                given = _queries(x.cotangent, place, sizes, sizes.value_dim)
                tiles = query, key, value, given
                weights, _, d_products = _gradients(x, place, tiles, sizes, options, True)
                of_key += product(d_products.astype(query.dtype), query, (1, 0))
                of_value += product(weights.astype(given.dtype), given, (1, 0))
                return of_key, of_value

            first, last = _query_steps(x, h, j, sizes, options)
            return jax.lax.fori_loop(first, last, step, carry)

        zeros = [
            jnp.zeros((sizes.block_k, _padded(size)), jnp.float32)
            for size in (sizes.dim, sizes.value_dim)
        ]
        of_key, of_value = jax.lax.fori_loop(0, groups, of_head, tuple(zeros))
        _store_keys(d_key, rows, of_key, sizes, sizes.dim)
        _store_keys(d_value, rows, of_value, sizes, sizes.value_dim)

    rows = sizes.batch * sizes.k_len
    results = [
        ((rows, sizes.kv_heads * size), operands.key.dtype) for size in (sizes.dim, sizes.value_dim)
    ]
    grid = sizes.k_blocks, sizes.kv_heads, sizes.batch
    warps = 4 if sizes.dim <= 64 else 8
    d_key, d_value = _call(kernel, grid, inputs, options, results, "key_gradients", warps)
    return d_key.reshape(operands.key.shape), d_value.reshape(operands.value.shape)


def bias_gradient(
    operands: Operands, options: Options, cotangent: Array, logsumexp: Array, delta: Array
) -> Array:
    """The gradient of the bias, in float32 and of its shape."""
    sizes = _sizes(operands, options, blocks=(64, 64))
    inputs = _arrange(operands, sizes, options, cotangent, logsumexp, delta)
    bias = sizes.bias
    steps = sizes.batch, sizes.heads, sizes.q_blocks, sizes.k_blocks
    tile = [1 if n == 1 else size for n, size in zip(bias[2:], (sizes.block_q, sizes.block_k))]
    kept = tuple(1 if n == 1 else step for n, step in zip(bias, steps))
    summed = tuple(step if n == 1 else 1 for n, step in zip(bias, steps))

    def kernel(x: _Inputs, d_bias: Any) -> None:
        start = _Place(*_unravel(pl.program_id(0), kept))

        def add(place: _Place, total: Array) -> Array:
            tiles = (
                _queries(x.query, place, sizes, sizes.dim),
                _keys(x.key, place, sizes, sizes.dim),
                _keys(x.value, place, sizes, sizes.value_dim),
                _queries(x.cotangent, place, sizes, sizes.value_dim),
            )
            _, gradient, _ = _gradients(x, place, tiles, sizes, options)
            for axis in (0, 1):
                if tile[axis] == 1:
                    gradient = jnp.sum(gradient, axis=axis, keepdims=True)
            return total + gradient

        def step(at: Array, total: Array) -> Array:
            place = _Place(*(a + b for a, b in zip(start, _unravel(at, summed))))
            if not options.is_causal and x.keep is None:
                return add(place, total)
            return jax.lax.cond(
                _takes_part(x, place, sizes, options),
                partial(add, place),
                lambda total: total,
                total,
            )

        total = jax.lax.fori_loop(0, math.prod(summed), step, jnp.zeros(tile, jnp.float32))
        ref, mask = _bias_tile(d_bias, start, sizes)
        plt.store(ref, total, mask=mask)

    shape = bias[0] * bias[1] * bias[2], bias[3]
    results = [(shape, jnp.float32)]
    (d_bias,) = _call(kernel, (math.prod(kept),), inputs, options, results, "bias_gradient")
    return d_bias.reshape(bias)


def _sizes(operands: Operands, options: Options, blocks: tuple[int, int]) -> _Sizes:
    """The sizes, with `blocks` of queries and keys where nothing else is asked for."""
    batch, q_len, heads, dim = operands.query.shape
    _, k_len, kv_heads, value_dim = operands.value.shape
    for name, size in (("block_q", options.block_q), ("block_k", options.block_k)):
        is_power = size is None or size & (size - 1) == 0
        if size is not None and (not is_power or (size < _MIN_BLOCK and not options.interpret)):
            raise ValueError(
                f"{name} must be a power of two, at least {_MIN_BLOCK}, on a GPU, got {size}"
            )
    # Twice the bytes per feature, or twice the features, leave room for half as many rows.
    weight = operands.query.dtype.itemsize * max(_padded(dim), _padded(value_dim)) // (2 * 128)
    q_default, k_default = (max(_MIN_BLOCK, size // max(weight, 1)) for size in blocks)
    block_q = options.block_q or min(q_default, _padded(q_len))
    block_k = options.block_k or min(k_default, _padded(k_len))
    bias = () if operands.bias is None else operands.bias.shape
    return _Sizes(batch, heads, kv_heads, q_len, k_len, dim, value_dim, bias, block_q, block_k)


def _padded(size: int) -> int:
    """Lengths of tiles are powers of two."""
    return max(_MIN_BLOCK, pl.next_power_of_2(size))


def _arrange(
    operands: Operands,
    sizes: _Sizes,
    options: Options,
    cotangent: Array | None = None,
    logsumexp: Array | None = None,
    delta: Array | None = None,
) -> _Inputs:
    def matrix(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])

    def line(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(-1)

    keep = operands.block_mask
    orders: list[Array | None] = [None] * 4
    if keep is not None:
        if options.is_causal:
            q_blocks, k_blocks = jnp.arange(sizes.q_blocks), jnp.arange(sizes.k_blocks)
            keep &= _sees(_Place(0, 0, q_blocks[:, None], k_blocks), sizes)
        orders = []
        for blocks in (keep, keep.swapaxes(1, 2)):
            orders.append(jnp.argsort(~blocks, axis=-1, stable=True).astype(jnp.int32).reshape(-1))
            orders.append(blocks.sum(axis=-1, dtype=jnp.int32).reshape(-1))
        keep = keep.astype(jnp.int32)
    bias = operands.bias
    return _Inputs(
        matrix(operands.query),
        matrix(operands.key),
        matrix(operands.value),
        None if bias is None else bias.reshape(-1, bias.shape[3]),
        operands.slopes,
        line(operands.query_segments),
        line(operands.key_segments),
        matrix(cotangent),
        line(logsumexp),
        line(delta),
        line(keep),
        *orders,
    )


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: _Inputs,
    options: Options,
    results: Sequence[tuple[tuple[int, ...], Any]],
    name: str,
    warps: int = 4,
) -> list[Array]:
    """Runs `kernel(inputs, *results)` over a grid; `results` has shapes and types."""
    leaves, structure = jax.tree.flatten(inputs)

    def body(*refs: Any) -> None:
        kernel(jax.tree.unflatten(structure, refs[: len(leaves)]), *refs[len(leaves) :])

    return pl.pallas_call(
        body,
        out_shape=[kernel_result(shape, dtype, *leaves) for shape, dtype in results],
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
        interpret=options.interpret,
        name=f"flash_attention_{name}",
    )(*leaves)


def _unravel(index: Any, shape: tuple[int, ...]) -> list[Any]:
    places = []
    for n in reversed(shape):
        places.append(jax.lax.rem(index, n))
        index = jax.lax.div(index, n)
    return places[::-1]


def _sees(place: _Place, sizes: _Sizes) -> Any:
    """Whether a query of the tile sees a key of it, in a causal attention."""
    return place.k_block * sizes.block_k <= place.q_block * sizes.block_q + sizes.block_q - 1


def _takes_part(x: _Inputs, place: _Place, sizes: _Sizes, options: Options) -> Any:
    if x.keep is None:
        return _sees(place, sizes) if options.is_causal else True
    row = place.head * sizes.q_blocks + place.q_block
    return x.keep[row * sizes.k_blocks + place.k_block] > 0


def _key_steps(x: _Inputs, rows: _Place, sizes: _Sizes, options: Options) -> Any:
    """How many blocks of keys a block of queries meets."""
    if x.key_count is not None:
        return x.key_count[rows.head * sizes.q_blocks + rows.q_block]
    if not options.is_causal:
        return sizes.k_blocks
    last = jax.lax.div(rows.q_block * sizes.block_q + sizes.block_q - 1, sizes.block_k)
    return jnp.minimum(last + 1, sizes.k_blocks)


def _key_block(x: _Inputs, rows: _Place, step: Any, sizes: _Sizes) -> Any:
    if x.key_order is None:
        return step
    return x.key_order[(rows.head * sizes.q_blocks + rows.q_block) * sizes.k_blocks + step]


def _query_steps(
    x: _Inputs, head: Any, k_block: Any, sizes: _Sizes, options: Options
) -> tuple[Any, Any]:
    """The first step, and that after the last, of a block of keys over those of queries."""
    if x.query_count is not None:
        return 0, x.query_count[head * sizes.k_blocks + k_block]
    if not options.is_causal:
        return 0, sizes.q_blocks
    return jax.lax.div(k_block * sizes.block_k, sizes.block_q), sizes.q_blocks


def _query_block(x: _Inputs, head: Any, k_block: Any, step: Any, sizes: _Sizes) -> Any:
    if x.query_order is None:
        return step
    return x.query_order[(head * sizes.k_blocks + k_block) * sizes.q_blocks + step]


def _inside(start: Any, size: int, length: int) -> Array | None:
    """Which of `size` entries from `start` exist; None for all."""
    return start + jnp.arange(size) < length if length % size else None


def _both(rows: Array | None, columns: Array | None) -> Array | None:
    if rows is None or columns is None:
        return rows[:, None] if rows is not None else columns if columns is None else columns[None]
    return rows[:, None] & columns[None]


def _load(ref: Any, mask: Array | None) -> Array:
    return plt.load(ref, mask=mask, other=None if mask is None else 0)


def _query_tile(ref: Any, place: _Place, sizes: _Sizes, size: int) -> tuple[Any, Array | None]:
    """A block of queries of a head in `[batch * q_len, heads * size]`, and what of it exists."""
    start, width = place.q_block * sizes.block_q, _padded(size)
    rows = pl.ds(place.batch * sizes.q_len + start, sizes.block_q)
    mask = _both(_inside(start, sizes.block_q, sizes.q_len), _inside(0, width, size))
    return ref.at[rows, pl.ds(place.head * size, width)], mask


def _key_tile(ref: Any, place: _Place, sizes: _Sizes, size: int) -> tuple[Any, Array | None]:
    """A block of keys of the head that a query head reads, and what of it exists."""
    start, width = place.k_block * sizes.block_k, _padded(size)
    head = jax.lax.div(place.head, sizes.heads // sizes.kv_heads)
    rows = pl.ds(place.batch * sizes.k_len + start, sizes.block_k)
    mask = _both(_inside(start, sizes.block_k, sizes.k_len), _inside(0, width, size))
    return ref.at[rows, pl.ds(head * size, width)], mask


def _bias_tile(ref: Any, place: _Place, sizes: _Sizes) -> tuple[Any, Array | None]:
    """The bias of a tile, or its gradient, with an axis of 1 where it is alike, and what exists."""
    batch, head, q_at, k_at = (
        0 if n == 1 else at
        for n, at in zip(
            sizes.bias,
            (
                place.batch,
                place.head,
                place.q_block * sizes.block_q,
                place.k_block * sizes.block_k,
            ),
        )
    )
    _, heads, q_len, k_len = sizes.bias
    block_q, block_k = 1 if q_len == 1 else sizes.block_q, 1 if k_len == 1 else sizes.block_k
    mask = _both(_inside(q_at, block_q, q_len), _inside(k_at, block_k, k_len))
    rows = pl.ds((batch * heads + head) * q_len + q_at, block_q)
    return ref.at[rows, pl.ds(k_at, block_k)], mask


def _row(ref: Any, place: _Place, sizes: _Sizes) -> tuple[Any, Array | None]:
    """A block of queries of a head in `[batch * heads * q_len]`, and what of it exists."""
    start = place.q_block * sizes.block_q
    offset = (place.batch * sizes.heads + place.head) * sizes.q_len + start
    return ref.at[pl.ds(offset, sizes.block_q)], _inside(start, sizes.block_q, sizes.q_len)


def _segments(ref: Any, batch: Any, block: Any, size: int, length: int) -> Array:
    start = block * size
    return _load(ref.at[pl.ds(batch * length + start, size)], _inside(start, size, length))


def _queries(ref: Any, place: _Place, sizes: _Sizes, size: int) -> Array:
    return _load(*_query_tile(ref, place, sizes, size))


def _keys(ref: Any, place: _Place, sizes: _Sizes, size: int) -> Array:
    return _load(*_key_tile(ref, place, sizes, size))


def _store_queries(ref: Any, place: _Place, x: Array, sizes: _Sizes, size: int) -> None:
    tile, mask = _query_tile(ref, place, sizes, size)
    plt.store(tile, x.astype(ref.dtype), mask=mask)


def _store_keys(ref: Any, place: _Place, x: Array, sizes: _Sizes, size: int) -> None:
    tile, mask = _key_tile(ref, place, sizes, size)
    plt.store(tile, x.astype(ref.dtype), mask=mask)


def _store_row(ref: Any, place: _Place, x: Array, sizes: _Sizes) -> None:
    tile, mask = _row(ref, place, sizes)
    plt.store(tile, x.reshape(sizes.block_q), mask=mask)


def _positions(place: _Place, sizes: _Sizes, keys_first: bool = False) -> tuple[Array, Array]:
    q_at = place.q_block * sizes.block_q + jnp.arange(sizes.block_q)
    k_at = place.k_block * sizes.block_k + jnp.arange(sizes.block_k)
    return _along(q_at, keys_first), _along(k_at, not keys_first)


def _along(x: Array, last: bool) -> Array:
    """A vector along the last axis of a tile, or along the first."""
    return x[None] if last else x[:, None]


def _logits(
    x: _Inputs,
    place: _Place,
    query: Array,
    key: Array,
    sizes: _Sizes,
    options: Options,
    keys_first: bool = False,
) -> tuple[Array, Array | None]:
    """Logits `[block_q, block_k]` of a tile, as `tile_logits` has them, or turned around."""
    bias = slope = query_segments = key_segments = None
    if x.bias is not None:
        bias = _load(*_bias_tile(x.bias, place, sizes)).astype(jnp.float32)
        bias = bias.T if keys_first else bias
    if x.slopes is not None:
        slope = x.slopes[place.head]
    if x.query_segments is not None:
        at = x.query_segments, place.batch, place.q_block
        query_segments = _segments(*at, sizes.block_q, sizes.q_len)
        query_segments = _along(query_segments, keys_first)
        at = x.key_segments, place.batch, place.k_block
        key_segments = _segments(*at, sizes.block_k, sizes.k_len)
        key_segments = _along(key_segments, not keys_first)
    return tile_logits(
        product(key, query, (1, 1)) if keys_first else product(query, key, (1, 1)),
        *_positions(place, sizes, keys_first),
        options,
        lengths=(
            sizes.q_len if sizes.q_len % sizes.block_q else None,
            sizes.k_len if sizes.k_len % sizes.block_k else None,
        ),
        bias=bias,
        slope=slope,
        query_segments=query_segments,
        key_segments=key_segments,
    )


def _gradients(
    x: _Inputs,
    place: _Place,
    tiles: tuple[Array, Array, Array, Array],
    sizes: _Sizes,
    options: Options,
    keys_first: bool = False,
) -> tuple[Array, Array, Array]:
    """The weights of a tile, and the gradients of its logits and of the products in them.

    `tiles` are the queries, keys, values and cotangents.
    """
    query, key, value, cotangent = tiles
    logsumexp, delta = (
        _along(_load(*_row(ref, place, sizes)), keys_first) for ref in (x.logsumexp, x.delta)
    )
    logits, derivative = _logits(x, place, query, key, sizes, options, keys_first)
    weights = jnp.exp(logits - logsumexp)
    pair = (value, cotangent) if keys_first else (cotangent, value)
    return weights, *logit_gradient(weights, product(*pair, (1, 1)), delta, derivative)
