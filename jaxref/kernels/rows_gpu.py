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
# Columns of a tile where sums over rows are wanted: a tile that is a whole row is read once for
# them and for what is measured. The sums stay in the registers of sixteen warps.
_SUMMED_COLUMNS = 8192
# Programs that keep a large GPU busy. Where there are fewer rows, each is cut into parts, which are
# measured apart. Where sums over rows are wanted, there are no more, and each goes over many rows.
_PROGRAMS = 256


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
    count, width = values[0].shape
    rows, columns = block or default_block(count, width, function.num_sums > 0)
    programs, num_tiles = pl.cdiv(count, rows), pl.cdiv(width, columns)
    parts = min(pl.next_power_of_2(pl.cdiv(_PROGRAMS, programs)), pl.next_power_of_2(num_tiles))
    call = functools.partial(
        _call, of_column=of_column, rows=rows, columns=columns, interpret=interpret
    )
    writing_parts = num_tiles if function.num_sums else parts
    if parts == writing_parts == 1:
        return call(
            function, values, of_row, dtypes=dtypes, parts=1, returns_statistics=returns_statistics
        )
    statistics: Statistics = ()
    if function.identity:
        first = function._replace(num_sums=0)
        _, _, statistics = call(first, values, of_row, dtypes=(), parts=parts)
        while statistics[0].shape[1] > 1:
            even, odd = (tuple(x[:, start::2] for x in statistics) for start in (0, 1))
            statistics = function.merge(even, odd)
    if not dtypes and not function.num_sums:
        return (), (), statistics

    def of_known(compute):
        def from_tile(tile: Tile, _: Statistics) -> tuple[Array, ...]:
            given, known = tile.of_row[: len(of_row)], tile.of_row[len(of_row) :]
            return compute(tile._replace(of_row=given), known)

        return from_tile

    second = function._replace(
        identity=(), write=of_known(function.write), add_up=of_known(function.add_up)
    )
    written, sums, _ = call(
        second, values, (*of_row, *statistics), dtypes=dtypes, parts=writing_parts
    )
    return written, sums, statistics if returns_statistics else ()


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
    returns_statistics: bool = True,
) -> tuple[tuple[Array, ...], tuple[Array, ...], Statistics]:
    """One kernel. Statistics are `[rows, parts]`, of the parts of rows apart.

    Where there are sums over rows, a part is one tile.
    """
    count, width = values[0].shape
    num_tiles = pl.cdiv(pl.cdiv(width, columns), parts)
    num_returned = len(function.identity) if returns_statistics else 0
    row_blocks = pl.cdiv(count, rows)
    programs = min(row_blocks, pl.cdiv(_PROGRAMS, parts)) if function.num_sums else row_blocks

    def kernel(*refs):
        ins, rest = refs[: len(values)], refs[len(values) :]
        of_rows, rest = rest[: len(of_row)], rest[len(of_row) :]
        of_columns, rest = rest[: len(of_column)], rest[len(of_column) :]
        outs, rest = rest[: len(dtypes)], rest[len(dtypes) :]
        sums, known = rest[: function.num_sums], rest[function.num_sums :]
        program, part = pl.program_id(0), pl.program_id(1)

        def place(j):
            start = (part * num_tiles + j) * columns
            column = (start + jnp.arange(columns))[None, :]
            return pl.ds(start, columns), column, column < width

        def go_over(i, totals):
            """One block of rows; returns the totals with what it adds to them."""
            at_rows = pl.ds(i * rows, rows)
            row_exists = (i * rows + jnp.arange(rows) < count)[:, None]
            given = tuple(
                plgpu.load(ref.at[at_rows, pl.ds(0, 1)], mask=row_exists, other=0)
                for ref in of_rows
            )

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

            is_one_tile = num_tiles == 1 and (parts == 1 or function.num_sums > 0)
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
                for ref, x in zip(known, statistics):  # none, or all of them
                    plgpu.store(ref.at[at_rows, pl.ds(part, 1)], x, mask=row_exists)
            if tile is not None:
                store(0, tile, statistics)
                added = function.add_up(tile, statistics)
                return tuple(t + jnp.where(row_exists, x, 0) for t, x in zip(totals, added))
            if dtypes:
                jax.lax.fori_loop(0, num_tiles, lambda j, _: store(j, load(j), statistics), None)
            return totals

        if not sums:
            go_over(program, ())
            return
        totals = jax.lax.fori_loop(
            0,
            pl.cdiv(row_blocks, programs),
            lambda turn, totals: go_over(turn * programs + program, totals),
            tuple(jnp.zeros((rows, columns), jnp.float32) for _ in sums),
        )
        at, _, exists = place(0)
        for ref, x in zip(sums, totals):
            total = jnp.sum(x, axis=0, keepdims=True)
            plgpu.store(ref.at[pl.ds(program, 1), at], total, mask=exists)

    operands = (*values, *of_row, *of_column)
    results = pl.pallas_call(
        kernel,
        grid=(programs, parts),
        out_shape=[kernel_result((count, width), dtype, *operands) for dtype in dtypes]
        + [kernel_result((programs, width), jnp.float32, *operands)] * function.num_sums
        + [kernel_result((count, parts), jnp.float32, *operands)] * num_returned,
        compiler_params=plgpu.CompilerParams(num_warps=_num_warps(rows * columns)),
        interpret=interpret,
        name=function.name,
    )(*operands)
    written, rest = results[: len(dtypes)], results[len(dtypes) :]
    sums, statistics = rest[: function.num_sums], rest[function.num_sums :]
    return tuple(written), tuple(x.sum(0) for x in sums), tuple(statistics)


def default_block(count: int, width: int, sums: bool) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two: several rows at once where they are short.

    `sums`: whether sums over the rows are wanted, for which fewer programs have more on the way.
    """
    columns = pl.next_power_of_2(width)
    if not sums or columns > _SUMMED_COLUMNS:
        columns = min(columns, _TILE_ELEMENTS)
    rows = max(1, (_TILE_ELEMENTS if sums else 1024) // columns)
    return min(pl.next_power_of_2(count), rows), columns


def _num_warps(elements: int) -> int:
    """Of a program with a tile of this size: sixteen numbers of an array to a thread at most."""
    return 4 if elements < 2048 else 8 if elements <= _TILE_ELEMENTS else 16
