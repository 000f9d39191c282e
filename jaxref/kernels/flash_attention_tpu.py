"""Flash attention by Pallas kernels for TPU.

A tile of the logits lies with its keys along the sublanes and its queries along the lanes, so that
what there is one of per query (maximum, sum, logsumexp) is a row: a reduction over keys adds
vectors, and a row is stored as it is. The grid goes over the tiles; tiles that do not take part
are neither computed nor, where the one before them can stay, loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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

# Queries and keys of a tile, where nothing else is asked for: of 1 MiB in float32, several of which
# fit into the fast memory of every chip.
_BLOCK = 512
_LANES = 128


class _Sizes(NamedTuple):
    """Lengths as they are, the blocks that cover them, and whether a bias is alike for all queries
    or for all keys: its last two axes are then exchanged, as a tile of logits has them."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    value_dim: int
    block_q: int
    block_k: int
    thin_bias: bool

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)


class _Inputs(NamedTuple):
    """Operands with heads ahead of positions, filled up with zeros to whole blocks.

    Attributes:
      query, cotangent: `[batch, heads, q_len, head_dim or value_dim]`.
      key, value: `[batch, kv_heads, k_len, head_dim or value_dim]`.
      bias: four axes.
      slopes: `[heads, 1, 1]`.
      query_segments, key_segments: `[batch, 1, q_len]` and `[batch, k_len, 1]`.
      logsumexp, delta: `[batch, heads, 1, q_len]`.
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


class _Tile(NamedTuple):
    """Where a step of a kernel is.

    Attributes:
      q_block, k_block: of the tile.
      is_first, is_last: whether the step begins or ends the sums of a block of results.
      takes_part: whether the tile has anything to see.
    """

    q_block: Array
    k_block: Array
    is_first: Array
    is_last: Array
    takes_part: Array | bool


class _Walk(NamedTuple):
    """An order in which to go over the tiles.

    Attributes:
      grid: steps along each axis.
      sums: how many axes, the last ones, are summed over.
      locate: a step's batch, head, block of queries and block of keys.
      load: the same of the tile to load, which a step that does not take part leaves as it is.
      takes_part: whether the step at such a place does.
      table: for a mask of blocks, what `load` and `takes_part` look up.
    """

    grid: tuple[int, ...]
    sums: int
    locate: Callable[..., tuple[Any, Any, Any, Any]]
    load: Callable[..., tuple[Any, Any, Any, Any]]
    takes_part: Callable[..., Array | bool]
    table: Array | None


def forward(operands: Operands, options: Options) -> tuple[Array, Array]:
    """The output `[batch, q_len, heads, value_dim]` and the logsumexp `[batch, heads, q_len]`."""
    sizes = _sizes(operands, options)
    inputs = _arrange(operands, sizes)
    dtype = inputs.query.dtype
    walk = _by_query(sizes, operands, options)

    def kernel(at: _Tile, x: _Inputs, output: Any, logsumexp: Any, top: Any, total: Any, acc: Any):
        @pl.when(at.is_first)
        def start() -> None:
            top[...] = jnp.full_like(top, -jnp.inf)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        @pl.when(at.takes_part)
        def update() -> None:
            logits, _ = _logits(at, x, sizes, options)
            top[...], total[...], weights, shrink = online_softmax(
                top[...], total[...], logits, axis=0
            )
            value = x.value[...]
            acc[...] = acc[...] * shrink + product(value, weights.astype(value.dtype), (0, 0))

        @pl.when(at.is_last)
        def finish() -> None:
            divisor, logsumexp[...] = finish_softmax(top[...], total[...])
            output[...] = (acc[...] / divisor).T.astype(output.dtype)

    output, logsumexp = _call(
        kernel,
        walk,
        inputs,
        sizes,
        options,
        results={
            "output": ((sizes.batch, sizes.heads, sizes.q_len, sizes.value_dim), dtype),
            "row": ((sizes.batch, sizes.heads, 1, sizes.q_len), jnp.float32),
        },
        scratch=[(1, sizes.block_q), (1, sizes.block_q), (sizes.value_dim, sizes.block_q)],
        width=sizes.dim + sizes.value_dim,
        name="forward",
    )
    return _to_public(output, operands), logsumexp[:, :, 0]


def backward(
    operands: Operands, options: Options, cotangent: Array, logsumexp: Array, delta: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of query, key, value and slopes; `logsumexp` and `delta` are finite everywhere."""
    sizes = _sizes(operands, options)
    inputs = _arrange(operands, sizes, cotangent, logsumexp, delta)
    d_query, d_slopes = _query_gradient(operands, inputs, sizes, options)
    d_key, d_value = _key_gradients(operands, inputs, sizes, options)
    return d_query, d_key, d_value, d_slopes


def _query_gradient(
    operands: Operands, inputs: _Inputs, sizes: _Sizes, options: Options
) -> tuple[Array, Array | None]:
    """The gradient of the query, and that of the slopes, for which there is a sum per query."""
    has_slopes = inputs.slopes is not None

    def kernel(at: _Tile, x: _Inputs, *refs: Any) -> None:
        (d_query, *d_slope), (acc, *slope_acc) = refs[: 1 + has_slopes], refs[1 + has_slopes :]

        @pl.when(at.is_first)
        def start() -> None:
            for sums in (acc, *slope_acc):
                sums[...] = jnp.zeros_like(sums)

        @pl.when(at.takes_part)
        def update() -> None:
            _, gradient, d_products = _gradients(at, x, sizes, options)
            key = x.key[...]
            acc[...] += product(key, d_products.astype(key.dtype), (0, 0))
            if has_slopes:
                q_at, k_at = _positions(at, sizes)
                distance = jnp.abs(q_at - k_at).astype(gradient.dtype)
                slope_acc[0][...] -= jnp.sum(gradient * distance, axis=0, keepdims=True)

        @pl.when(at.is_last)
        def finish() -> None:
            d_query[...] = acc[...].T.astype(d_query.dtype)
            if has_slopes:
                d_slope[0][...] = slope_acc[0][...]

    results = {"query": ((*inputs.query.shape[:2], sizes.q_len, sizes.dim), inputs.query.dtype)}
    scratch = [(sizes.dim, sizes.block_q)]
    if has_slopes:
        results["row"] = ((sizes.batch, sizes.heads, 1, sizes.q_len), jnp.dtype(jnp.float32))
        scratch.append((1, sizes.block_q))
    walk = _by_query(sizes, operands, options)
    width = 2 * sizes.dim + sizes.value_dim
    d_query, *d_slope = _call(
        kernel, walk, inputs, sizes, options, results, scratch, width, name="query_gradient"
    )
    return _to_public(d_query, operands), d_slope[0].sum((0, 2, 3)) if has_slopes else None


def _key_gradients(
    operands: Operands, inputs: _Inputs, sizes: _Sizes, options: Options
) -> tuple[Array, Array]:
    """The gradients of keys and values, summed over all queries of the heads that share them."""

    def kernel(at: _Tile, x: _Inputs, d_key: Any, d_value: Any, key_acc: Any, value_acc: Any):
        @pl.when(at.is_first)
        def start() -> None:
            key_acc[...] = jnp.zeros_like(key_acc)
            value_acc[...] = jnp.zeros_like(value_acc)

        @pl.when(at.takes_part)
        def update() -> None:
            weights, _, d_products = _gradients(at, x, sizes, options)
            query, cotangent = x.query[...], x.cotangent[...]
            key_acc[...] += product(d_products.astype(query.dtype), query, (1, 0))
            value_acc[...] += product(weights.astype(query.dtype), cotangent, (1, 0))

        @pl.when(at.is_last)
        def finish() -> None:
            d_key[...] = key_acc[...].astype(d_key.dtype)
            d_value[...] = value_acc[...].astype(d_value.dtype)

    lead = (sizes.batch, sizes.kv_heads, sizes.k_len)
    results = {
        "key": ((*lead, sizes.dim), inputs.key.dtype),
        "value": ((*lead, sizes.value_dim), inputs.key.dtype),
    }
    scratch = [(sizes.block_k, sizes.dim), (sizes.block_k, sizes.value_dim)]
    walk = _by_key(sizes, operands, options)
    width = 2 * (sizes.dim + sizes.value_dim)
    d_key, d_value = _call(
        kernel, walk, inputs, sizes, options, results, scratch, width, name="key_gradients"
    )
    return _to_public(d_key, operands), _to_public(d_value, operands)


def bias_gradient(
    operands: Operands, options: Options, cotangent: Array, logsumexp: Array, delta: Array
) -> Array:
    """The gradient of the bias, in float32 and of its shape."""
    sizes = _sizes(operands, options)
    inputs = _arrange(operands, sizes, cotangent, logsumexp, delta)
    assert operands.bias is not None
    shape = operands.bias.shape
    tile = tuple(1 if n == 1 else b for n, b in zip(shape[2:], (sizes.block_q, sizes.block_k)))
    tile = tile[::-1] if sizes.thin_bias else tile

    def kernel(at: _Tile, x: _Inputs, d_bias: Any, acc: Any) -> None:
        @pl.when(at.is_first)
        def start() -> None:
            acc[...] = jnp.zeros_like(acc)

        @pl.when(at.takes_part)
        def update() -> None:
            _, gradient, _ = _gradients(at, x, sizes, options)
            gradient = gradient if sizes.thin_bias else gradient.T
            for axis in (0, 1):
                if acc.shape[axis] == 1:
                    gradient = jnp.sum(gradient, axis=axis, keepdims=True)
            acc[...] += gradient

        @pl.when(at.is_last)
        def finish() -> None:
            d_bias[...] = acc[...]

    results = {"bias": (inputs.bias.shape, jnp.dtype(jnp.float32))}
    walk = _by_bias(sizes, operands, options)
    width = sizes.dim + sizes.value_dim
    (d_bias,) = _call(
        kernel, walk, inputs, sizes, options, results, [tile], width, name="bias_gradient"
    )
    return d_bias.swapaxes(2, 3) if sizes.thin_bias else d_bias


def _sizes(operands: Operands, options: Options) -> _Sizes:
    batch, q_len, heads, dim = operands.query.shape
    _, k_len, kv_heads, value_dim = operands.value.shape
    for name, size in (("block_q", options.block_q), ("block_k", options.block_k)):
        if size is not None and size % _LANES and not options.interpret:
            raise ValueError(f"{name} must be a multiple of {_LANES} on a TPU, got {size}")
    block_q = options.block_q or _block_size(q_len)
    block_k = options.block_k or _block_size(k_len)
    thin_bias = operands.bias is not None and 1 in operands.bias.shape[2:]
    return _Sizes(batch, heads, kv_heads, q_len, k_len, dim, value_dim, block_q, block_k, thin_bias)


def _block_size(length: int) -> int:
    """Blocks as equal as may be, of whole vectors."""
    blocks = -(-length // _BLOCK)
    return -(-length // (blocks * _LANES)) * _LANES


def _arrange(
    operands: Operands,
    sizes: _Sizes,
    cotangent: Array | None = None,
    logsumexp: Array | None = None,
    delta: Array | None = None,
) -> _Inputs:
    def fill(x: Array | None, block: int, axis: int) -> Array | None:
        if x is None or x.shape[axis] % block == 0:
            return x
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % block)
        return jnp.pad(x, widths)

    def widened(x: Array) -> Array:
        return x.astype(jnp.float32) if x.dtype == jnp.float16 else x  # a TPU does not have it

    def heads_first(x: Array | None, block: int) -> Any:
        return None if x is None else fill(widened(x).swapaxes(1, 2), block, 2)

    def row(x: Array | None) -> Array | None:
        return None if x is None else fill(x[:, :, None], sizes.block_q, 3)

    bias, slopes = operands.bias, operands.slopes
    if bias is not None:
        bias = widened(bias.swapaxes(2, 3) if sizes.thin_bias else bias)
    q_segments, k_segments = operands.query_segments, operands.key_segments
    return _Inputs(
        heads_first(operands.query, sizes.block_q),
        heads_first(operands.key, sizes.block_k),
        heads_first(operands.value, sizes.block_k),
        bias,
        None if slopes is None else slopes[:, None, None],
        None if q_segments is None else q_segments[:, None, :],
        None if k_segments is None else k_segments[:, :, None],
        heads_first(cotangent, sizes.block_q),
        row(logsumexp),
        row(delta),
    )


def _to_public(x: Array, operands: Operands) -> Array:
    """`[batch, length, heads, size]` in the operands' type."""
    return x.swapaxes(1, 2).astype(operands.query.dtype)


def _by_query(sizes: _Sizes, operands: Operands, options: Options) -> _Walk:
    """For each block of queries, the keys in turn."""

    def nearest(b: Any, h: Any, i: Any, j: Any) -> Any:
        return jnp.minimum(j, jax.lax.div(i * sizes.block_q + sizes.block_q - 1, sizes.block_k))

    table, stay, takes_part = _schedule(sizes, operands, options, 2, nearest)

    def load(*ids: Any) -> tuple[Any, Any, Any, Any]:
        b, h, i, _ = ids[:4]
        return b, h, i, stay(*ids)

    grid = (sizes.batch, sizes.heads, sizes.q_blocks, sizes.k_blocks)
    return _Walk(grid, 1, lambda *ids: ids[:4], load, takes_part, table)


def _by_key(sizes: _Sizes, operands: Operands, options: Options) -> _Walk:
    """For each block of keys, the queries of all heads that share them in turn."""
    groups = sizes.heads // sizes.kv_heads

    def locate(b: Any, kv_head: Any, j: Any, step: Any, *table: Any) -> tuple[Any, Any, Any, Any]:
        head = kv_head * groups + jax.lax.div(step, sizes.q_blocks)
        return b, head, jax.lax.rem(step, sizes.q_blocks), j

    def nearest(b: Any, h: Any, i: Any, j: Any) -> Any:
        first = jax.lax.div(j * sizes.block_k, sizes.block_q)
        return jnp.minimum(jnp.maximum(i, first), sizes.q_blocks - 1)

    table, stay, takes_part = _schedule(sizes, operands, options, 1, nearest)

    def load(*ids: Any) -> tuple[Any, Any, Any, Any]:
        b, h, i, j = locate(*ids)
        return b, h, stay(b, h, i, j, *ids[4:]), j

    grid = (sizes.batch, sizes.kv_heads, sizes.k_blocks, groups * sizes.q_blocks)
    return _Walk(grid, 1, locate, load, takes_part, table)


def _by_bias(sizes: _Sizes, operands: Operands, options: Options) -> _Walk:
    """For each block of the bias, all tiles that it is added to in turn."""
    assert operands.bias is not None
    steps = (sizes.batch, sizes.heads, sizes.q_blocks, sizes.k_blocks)
    alike = [axis for axis in range(4) if operands.bias.shape[axis] == 1]
    order = [axis for axis in range(4) if axis not in alike] + alike

    def locate(*ids: Any) -> tuple[Any, Any, Any, Any]:
        b, h, i, j = (ids[order.index(axis)] for axis in range(4))
        return b, h, i, j

    table, _, takes_part = _schedule(sizes, operands, options, 2, lambda b, h, i, j: j)
    return _Walk(
        tuple(steps[axis] for axis in order), len(alike), locate, locate, takes_part, table
    )


def _schedule(
    sizes: _Sizes, operands: Operands, options: Options, axis: int, nearest: Callable[..., Any]
) -> tuple[Array | None, Callable[..., Any], Callable[..., Any]]:
    """A table, the block to load, and whether a tile takes part, both as functions of its place.

    Args:
      sizes, operands, options: of the attention.
      axis: along which the innermost steps go: 1 for queries, 2 for keys.
      nearest: without a table, the block along that axis to load in a causal attention.
    """

    def sees(i: Any, j: Any) -> Any:
        return j * sizes.block_k <= i * sizes.block_q + sizes.block_q - 1

    if operands.block_mask is None:
        if not options.is_causal:
            return None, lambda b, h, i, j: (i, j)[axis - 1], lambda b, h, i, j: True
        return None, nearest, lambda b, h, i, j: sees(i, j)
    keep = operands.block_mask
    if options.is_causal:
        keep &= sees(jnp.arange(sizes.q_blocks)[:, None], jnp.arange(sizes.k_blocks))
    # Of each tile the last one up to it that takes part, -1 for none, in one line of scalars.
    latest = jnp.where(keep, jax.lax.broadcasted_iota(jnp.int32, keep.shape, axis), -1)
    table = jax.lax.cummax(latest, axis=axis).reshape(-1)

    def look_up(h: Any, i: Any, j: Any, table: Any) -> Any:
        return table[(h * sizes.q_blocks + i) * sizes.k_blocks + j]

    def stay(b: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
        return jnp.maximum(look_up(h, i, j, table), 0)

    def takes_part(b: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
        return look_up(h, i, j, table) == (i, j)[axis - 1]

    return table, stay, takes_part


def _call(
    kernel: Callable[..., None],
    walk: _Walk,
    inputs: _Inputs,
    sizes: _Sizes,
    options: Options,
    results: Mapping[str, tuple[tuple[int, ...], Any]],
    scratch: Sequence[tuple[int, ...]],
    width: int,
    name: str,
) -> tuple[Array, ...]:
    """Runs `kernel(tile, inputs, *results, *scratch)` over a walk.

    `results` has shapes and types, by what their blocks go along with; `width` is how many
    multiplications the kernel's products have for each logit.
    """
    groups = sizes.heads // sizes.kv_heads
    bias_shape = (1, 1, 1, 1) if inputs.bias is None else inputs.bias.shape
    blocks = (sizes.block_q, sizes.block_k)
    blocks = blocks[::-1] if sizes.thin_bias else blocks
    bias_tile = [1 if n == 1 else block for n, block in zip(bias_shape[2:], blocks)]

    def bias_at(b: Any, h: Any, i: Any, j: Any) -> tuple[Any, ...]:
        places = (b, h, j, i) if sizes.thin_bias else (b, h, i, j)
        return tuple(0 if n == 1 else place for n, place in zip(bias_shape, places))

    kinds: dict[str, tuple[tuple[int | None, ...], Callable[..., tuple[Any, ...]]]] = {
        "query": ((None, None, sizes.block_q, sizes.dim), lambda b, h, i, j: (b, h, i, 0)),
        "output": ((None, None, sizes.block_q, sizes.value_dim), lambda b, h, i, j: (b, h, i, 0)),
        "key": (
            (None, None, sizes.block_k, sizes.dim),
            lambda b, h, i, j: (b, jax.lax.div(h, groups), j, 0),
        ),
        "value": (
            (None, None, sizes.block_k, sizes.value_dim),
            lambda b, h, i, j: (b, jax.lax.div(h, groups), j, 0),
        ),
        "bias": ((None, None, *bias_tile), bias_at),
        "slopes": ((None, 1, 1), lambda b, h, i, j: (h, 0, 0)),
        "query_segments": ((None, 1, sizes.block_q), lambda b, h, i, j: (b, 0, i)),
        "key_segments": ((None, sizes.block_k, 1), lambda b, h, i, j: (b, j, 0)),
        "row": ((None, None, 1, sizes.block_q), lambda b, h, i, j: (b, h, 0, i)),
    }

    def spec(kind: str) -> pl.BlockSpec:
        shape, place = kinds[kind]
        return pl.BlockSpec(shape, lambda *ids: place(*walk.load(*ids)))

    of_input = {"cotangent": "output", "logsumexp": "row", "delta": "row"}
    specs = _Inputs(
        *(
            None if x is None else spec(of_input.get(name, name))
            for name, x in zip(_Inputs._fields, inputs)
        )
    )
    leaves = jax.tree.leaves(inputs)

    def body(*refs: Any) -> None:
        table, refs = (refs[:1], refs[1:]) if walk.table is not None else ((), refs)
        ids = [pl.program_id(axis) for axis in range(len(walk.grid))]
        summed = list(zip(ids, walk.grid))[len(ids) - walk.sums :]
        b, h, i, j = walk.locate(*ids)
        is_first = is_last = jnp.bool_(True)
        for step, steps in summed:
            is_first, is_last = is_first & (step == 0), is_last & (step == steps - 1)
        tile = _Tile(i, j, is_first, is_last, walk.takes_part(b, h, i, j, *table))
        x = jax.tree.unflatten(jax.tree.structure(inputs), refs[: len(leaves)])
        kernel(tile, x, *refs[len(leaves) :])

    out_shape = [kernel_result(shape, dtype, *leaves) for shape, dtype in results.values()]
    logits = sizes.batch * sizes.heads * _computed_logits(sizes, options)
    cost = pl.CostEstimate(
        flops=2 * width * logits,
        transcendentals=logits,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*leaves, *out_shape)),
    )
    semantics: Any = ["parallel"] * (len(walk.grid) - walk.sums) + ["arbitrary"] * walk.sums
    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0 if walk.table is None else 1,
            grid=walk.grid,
            in_specs=jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
            out_specs=[spec(kind) for kind in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=cost,
        interpret=options.interpret,
        name=f"flash_attention_{name}",
    )(*(() if walk.table is None else (walk.table,)), *leaves)


def _computed_logits(sizes: _Sizes, options: Options) -> int:
    """Logits of a head in the tiles that take part; blocks that a mask leaves out count, too."""
    if not options.is_causal:
        return sizes.q_len * sizes.k_len
    ends = np.minimum((np.arange(sizes.q_blocks) + 1) * sizes.block_q, sizes.q_len)
    keys = np.minimum(-(-ends // sizes.block_k) * sizes.block_k, sizes.k_len)
    return int(np.sum(keys * np.diff(ends, prepend=0)))


def _positions(at: _Tile, sizes: _Sizes) -> tuple[Array, Array]:
    q_at = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.block_q), 1)
    k_at = jax.lax.broadcasted_iota(jnp.int32, (sizes.block_k, 1), 0)
    return at.q_block * sizes.block_q + q_at, at.k_block * sizes.block_k + k_at


def _logits(at: _Tile, x: _Inputs, sizes: _Sizes, options: Options) -> tuple[Array, Array | None]:
    """Logits `[block_k, block_q]` of a tile, as `tile_logits` has them."""
    bias, slope, q_segments, k_segments = (
        None if ref is None else ref[...]
        for ref in (x.bias, x.slopes, x.query_segments, x.key_segments)
    )
    if bias is not None:
        bias = bias.astype(jnp.float32)
        bias = bias if sizes.thin_bias else bias.T
    return tile_logits(
        product(x.key[...], x.query[...], (1, 1)),
        *_positions(at, sizes),
        options,
        lengths=(
            sizes.q_len if sizes.q_len % sizes.block_q else None,
            sizes.k_len if sizes.k_len % sizes.block_k else None,
        ),
        bias=bias,
        slope=slope,
        query_segments=q_segments,
        key_segments=k_segments,
    )


def _gradients(
    at: _Tile, x: _Inputs, sizes: _Sizes, options: Options
) -> tuple[Array, Array, Array]:
    """The weights of a tile, and the gradients of its logits and of the products in them."""
    logits, derivative = _logits(at, x, sizes, options)
    weights = jnp.exp(logits - x.logsumexp[...])
    products = product(x.value[...], x.cotangent[...], (1, 1))
    return weights, *logit_gradient(weights, products, x.delta[...], derivative)
