"""Functions of rows on a TPU: a grid of tiles, the statistics of their rows in its memory."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxref.kernels.implementation import kernel_result
from jaxref.kernels.row_function import RowFunction, Statistics, Tile, next_multiple

# What the tiles of one step may take, each of them twice, as the next is fetched meanwhile. The
# compiler grants 16 MiB of a core's fast memory by default, and the function's own arrays live
# there as well.
_TILE_BYTES = 6 * 2**20
_MAX_ROWS = 256


def run(
    function: RowFunction,
    values: tuple[Array, ...],
    of_row: tuple[Array, ...],
    of_column: tuple[Array, ...],
    dtypes: tuple[DTypeLike, ...],
    block: tuple[int, ...] | None,
    returns_statistics: bool,
    interpret: bool,
) -> tuple[tuple[Array, ...], tuple[Array, ...], Statistics]:
    """`apply_rows` of `[rows, columns]`, with `[rows, 1]` and `[1, columns]` beside it.

    Returns what is written, the sums over the rows, and the statistics.
    """
    values, of_row, of_column = (tuple(map(_readable, x)) for x in (values, of_row, of_column))
    dtypes = tuple(jnp.float32 if dtype == jnp.float16 else dtype for dtype in dtypes)
    count, width = values[0].shape
    rows, columns = block or default_block(count, width, len(values) + len(dtypes))
    row_blocks, num_tiles = pl.cdiv(count, rows), pl.cdiv(width, columns)
    first = 0 if function.identity else 1  # the turns over a row: measure, write
    writes = bool(dtypes) or function.num_sums > 0
    turns = (2 if writes else 1) - first
    num_sums, num_statistics = function.num_sums, len(function.identity)
    num_returned = num_statistics if returns_statistics else 0
    sizes = len(values), len(of_row), len(of_column), len(dtypes), num_sums, num_statistics

    def kernel(*refs):
        ins, of_rows, of_columns, outs, sums, known = _split(refs, *sizes)
        i, turn, j = pl.program_id(0), pl.program_id(1) + first, pl.program_id(2)
        column = j * columns + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
        tile = Tile(
            tuple(ref[...].astype(jnp.float32) for ref in ins),
            tuple(ref[...] for ref in of_rows),
            tuple(ref[...].astype(jnp.float32) for ref in of_columns),
            column,
            column < width,
        )
        if function.identity:

            @pl.when((turn == 0) & (j == 0))
            def _():
                for ref, number in zip(known, function.identity):
                    ref[...] = jnp.full(ref.shape, number, ref.dtype)

            @pl.when(turn == 0)
            def _():
                old = tuple(ref[...] for ref in known)
                for ref, x in zip(known, function.merge(old, function.measure(tile))):
                    ref[...] = x

        if writes:

            @pl.when(turn == 1)
            def _():
                statistics = tuple(ref[...] for ref in known)
                for ref, x in zip(outs, function.write(tile, statistics)):
                    ref[...] = x.astype(ref.dtype)
                row_exists = i * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < count
                for ref, x in zip(sums, function.add_up(tile, statistics)):
                    ref[0] = jnp.sum(jnp.where(row_exists, x, 0), axis=0, keepdims=True)

    whole = pl.BlockSpec((rows, columns), lambda i, turn, j: (i, j))
    # In the first turn nothing is written: the block stays where the second begins.
    written = pl.BlockSpec((rows, columns), lambda i, turn, j: (i, j * (turn + first)))
    # A block of rows has its own sums, so that the blocks can be spread over cores.
    summed = pl.BlockSpec((1, 1, columns), lambda i, turn, j: (i, 0, j * (turn + first)))
    row = pl.BlockSpec((rows, 1), lambda i, turn, j: (i, 0))
    column = pl.BlockSpec((1, columns), lambda i, turn, j: (0, j))
    operands = (*values, *of_row, *of_column)
    results = pl.pallas_call(
        kernel,
        grid=(row_blocks, turns, num_tiles),
        in_specs=[whole] * len(values) + [row] * len(of_row) + [column] * len(of_column),
        out_specs=[written] * len(dtypes) + [summed] * num_sums + [row] * num_returned,
        out_shape=[kernel_result((count, width), dtype, *operands) for dtype in dtypes]
        + [kernel_result((row_blocks, 1, width), jnp.float32, *operands)] * num_sums
        + [kernel_result((count, 1), jnp.float32, *operands)] * num_returned,
        scratch_shapes=[pltpu.VMEM((rows, 1), jnp.float32)] * (num_statistics - num_returned),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name=function.name,
    )(*operands)
    arrays, sums, statistics = _split(results, len(dtypes), num_sums, num_returned)
    return tuple(arrays), tuple(x.sum((0, 1)) for x in sums), tuple(statistics)


def default_block(count: int, width: int, arrays: int) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows where they fit, so that they are read once."""
    per_tile = _TILE_BYTES // (4 * 2 * arrays)  # elements
    columns = min(next_multiple(width, 128), per_tile // 8 // 128 * 128)
    rows = max(8, min(_MAX_ROWS, per_tile // columns) // 8 * 8)
    return min(rows, next_multiple(count, 8)), columns


def _readable(x: Array) -> Array:
    """An array of a type that the chips read: float16 is none."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _split(refs, *sizes):
    """References or results by kind."""
    parts, start = [], 0
    for size in sizes:
        parts.append(refs[start : start + size])
        start += size
    return parts
