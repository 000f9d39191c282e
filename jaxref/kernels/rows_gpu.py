"""Functions of rows on a GPU: a program for a few rows, which it goes over in tiles."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from jaxref.kernels.implementation import kernel_result
from jaxref.kernels.row_function import RowFunction, Statistics, Tile

# Elements of a tile: enough for eight warps to have 16 bytes each on the way.
_TILE_ELEMENTS = 4096
# Programs that keep a large GPU busy. Where there are fewer rows, each is cut into parts, which are
# measured apart.
_PROGRAMS = 256


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
    rows, columns = block or default_block(count, width)
    programs, num_tiles = pl.cdiv(count, rows), pl.cdiv(width, columns)
    parts = min(pl.next_power_of_2(pl.cdiv(_PROGRAMS, programs)), pl.next_power_of_2(num_tiles))
    call = functools.partial(
        _call, of_column=of_column, rows=rows, columns=columns, interpret=interpret
    )
    if parts == 1:
        return call(function, values, of_row, dtypes=dtypes, parts=1)
    statistics: Statistics = ()
    if function.identity:
        _, statistics = call(function, values, of_row, dtypes=(), parts=parts)
        while statistics[0].shape[1] > 1:
            even, odd = (tuple(x[:, start::2] for x in statistics) for start in (0, 1))
            statistics = function.merge(even, odd)
    if not dtypes:
        return (), statistics

    def write(tile: Tile, _: Statistics) -> tuple[Array, ...]:
        given, known = tile.of_row[: len(of_row)], tile.of_row[len(of_row) :]
        return function.write(tile._replace(of_row=given), known)

    second = RowFunction(function.name, write=write)
    written, _ = call(second, values, (*of_row, *statistics), dtypes=dtypes, parts=parts)
    return written, statistics


def _call(
    function: RowFunction,
    values: tuple[Array, ...],
    of_row: tuple[Array, ...],
    *,
    of_column: tuple[Array, ...],
    dtypes: tuple[DTypeLike, ...],
    parts: int,
    rows: int,
    columns: int,
    interpret: bool,
) -> tuple[tuple[Array, ...], Statistics]:
    """One kernel. Statistics are `[rows, parts]`, of the parts of rows apart."""
    count, width = values[0].shape
    num_tiles = pl.cdiv(pl.cdiv(width, columns), parts)

    def kernel(*refs):
        ins, rest = refs[: len(values)], refs[len(values) :]
        of_rows, rest = rest[: len(of_row)], rest[len(of_row) :]
        of_columns, rest = rest[: len(of_column)], rest[len(of_column) :]
        outs, sums = rest[: len(dtypes)], rest[len(dtypes) :]
        i, part = pl.program_id(0), pl.program_id(1)
        at_rows = pl.ds(i * rows, rows)
        row_exists = (i * rows + jnp.arange(rows) < count)[:, None]
        given = tuple(
            plgpu.load(ref.at[at_rows, pl.ds(0, 1)], mask=row_exists, other=0) for ref in of_rows
        )

        def place(j):
            start = (part * num_tiles + j) * columns
            column = (start + jnp.arange(columns))[None, :]
            return pl.ds(start, columns), column, column < width

        def load(j):
            at, column, exists = place(j)
            exists_both = exists & row_exists
            tiles = (plgpu.load(ref.at[at_rows, at], mask=exists_both, other=0) for ref in ins)
            scaled = (
                plgpu.load(ref.at[pl.ds(0, 1), at], mask=exists, other=0) for ref in of_columns
            )
            return Tile(
                tuple(x.astype(jnp.float32) for x in tiles),
                given,
                tuple(x.astype(jnp.float32) for x in scaled),
                column,
                exists,
            )

        def store(j, tile, statistics):
            at, _, exists = place(j)
            for ref, x in zip(outs, function.write(tile, statistics)):
                x = jnp.broadcast_to(x, (rows, columns)).astype(ref.dtype)
                plgpu.store(ref.at[at_rows, at], x, mask=exists & row_exists)

        is_one_tile = parts == 1 and num_tiles == 1
        tile = load(0) if is_one_tile else None  # read once
        statistics: Statistics = ()
        if function.identity:
            if tile is not None:
                statistics = function.measure(tile)
            else:
                statistics = jax.lax.fori_loop(
                    0,
                    num_tiles,
                    lambda j, s: function.merge(s, function.measure(load(j))),
                    tuple(jnp.full((rows, 1), x, jnp.float32) for x in function.identity),
                )
            for ref, x in zip(sums, statistics):
                plgpu.store(ref.at[at_rows, pl.ds(part, 1)], x, mask=row_exists)
        if dtypes:
            if tile is not None:
                store(0, tile, statistics)
            else:
                jax.lax.fori_loop(0, num_tiles, lambda j, _: store(j, load(j), statistics), None)

    operands = (*values, *of_row, *of_column)
    results = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, rows), parts),
        out_shape=[kernel_result((count, width), dtype, *operands) for dtype in dtypes]
        + [kernel_result((count, parts), jnp.float32, *operands) for _ in function.identity],
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows * columns >= 2048 else 4),
        interpret=interpret,
        name=function.name,
    )(*operands)
    return tuple(results[: len(dtypes)]), tuple(results[len(dtypes) :])


def default_block(count: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two: several rows at once where they are short."""
    columns = min(pl.next_power_of_2(width), _TILE_ELEMENTS)
    return min(pl.next_power_of_2(count), max(1, 1024 // columns)), columns
