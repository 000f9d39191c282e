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
    block: tuple[int, int] | None,
    interpret: bool,
) -> tuple[tuple[Array, ...], Statistics]:
    """`apply_rows` of `[rows, columns]`, with `[rows, 1]` and `[1, columns]` beside it."""
    count, width = values[0].shape
    rows, columns = block or default_block(count, width, len(values) + len(dtypes))
    num_tiles = pl.cdiv(width, columns)
    first = 0 if function.identity else 1  # the turns over a row: measure, write
    turns = (2 if dtypes else 1) - first

    def kernel(*refs):
        ins, of_rows, of_columns, outs, sums = _split(
            refs, len(values), len(of_row), len(of_column), len(dtypes), len(function.identity)
        )
        turn, j = pl.program_id(1) + first, pl.program_id(2)
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
                for ref, number in zip(sums, function.identity):
                    ref[...] = jnp.full(ref.shape, number, ref.dtype)

            @pl.when(turn == 0)
            def _():
                old = tuple(ref[...] for ref in sums)
                for ref, x in zip(sums, function.merge(old, function.measure(tile))):
                    ref[...] = x

        if dtypes:

            @pl.when(turn == 1)
            def _():
                statistics = tuple(ref[...] for ref in sums)
                for ref, x in zip(outs, function.write(tile, statistics)):
                    ref[...] = x.astype(ref.dtype)

    whole = pl.BlockSpec((rows, columns), lambda i, turn, j: (i, j))
    # In the first turn nothing is written: the block stays where the second begins.
    written = pl.BlockSpec((rows, columns), lambda i, turn, j: (i, j * (turn + first)))
    row = pl.BlockSpec((rows, 1), lambda i, turn, j: (i, 0))
    column = pl.BlockSpec((1, columns), lambda i, turn, j: (0, j))
    operands = (*values, *of_row, *of_column)
    results = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, rows), turns, num_tiles),
        in_specs=[whole] * len(values) + [row] * len(of_row) + [column] * len(of_column),
        out_specs=[written] * len(dtypes) + [row] * len(function.identity),
        out_shape=[kernel_result((count, width), dtype, *operands) for dtype in dtypes]
        + [kernel_result((count, 1), jnp.float32, *operands) for _ in function.identity],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name=function.name,
    )(*operands)
    return tuple(results[: len(dtypes)]), tuple(results[len(dtypes) :])


def default_block(count: int, width: int, arrays: int) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows where they fit, so that they are read once."""
    per_tile = _TILE_BYTES // (4 * 2 * arrays)  # elements
    columns = min(next_multiple(width, 128), per_tile // 8 // 128 * 128)
    rows = max(8, min(_MAX_ROWS, per_tile // columns) // 8 * 8)
    return min(rows, next_multiple(count, 8)), columns


def _split(refs, *sizes):
    """References by kind."""
    parts, start = [], 0
    for size in sizes:
        parts.append(refs[start : start + size])
        start += size
    return parts
