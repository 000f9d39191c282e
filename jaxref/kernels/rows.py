"""Functions of the rows of arrays, computed by XLA or by a Pallas kernel.

XLA takes a row as one tile, a kernel as many, which it sums up one by one.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxref.core.numerics import compute_dtype
from jaxref.kernels.block_sizes import tuned_block
from jaxref.kernels.implementation import Implementation
from jaxref.kernels.row_function import RowFunction, Statistics, Tile


def apply_rows(
    function: RowFunction,
    values: tuple[Array, ...],
    *,
    of_row: tuple[Array, ...] = (),
    of_column: tuple[Array, ...] = (),
    dtypes: tuple[DTypeLike, ...] = (),
    implementation: Implementation,
    block: tuple[int, ...] | None = None,
    returns_statistics: bool = True,
) -> tuple[tuple[Array, ...], Statistics]:
    """A function of the rows of arrays, which lie along their last axes.

    Args:
      function: what to compute.
      values: arrays `[..., columns]` of one shape, with at least one column and one row.
      of_row: arrays `[...]`, given to the function.
      of_column: arrays `[columns]`, given to the function.
      dtypes: types of what is written.
      implementation: what computes it, from `choose_implementation`.
      block: rows and columns of a kernel's tile; XLA does without. Default: as measured
        (`block_sizes`), else by the shape.
      returns_statistics: False keeps what is measured inside of a kernel.

    Returns:
      The arrays written `[..., columns]`, followed by the sums over the rows `[columns]`, in the
      type of the statistics; and the statistics `[...]`, or none where they are not returned.

    >>> total = lambda tile: jnp.sum(jnp.where(tile.exists, *tile.values, 0), -1, keepdims=True)
    >>> share = RowFunction(
    ...     name="share",
    ...     identity=(0.0,),
    ...     measure=lambda tile: (total(tile),),
    ...     merge=lambda a, b: (a[0] + b[0],),
    ...     write=lambda tile, total: (tile.values[0] / total[0],),
    ... )
    >>> x, interpreted = jnp.array([[1.0, 3.0]]), Implementation("gpu", interpret=True)
    >>> print(*apply_rows(share, (x,), dtypes=("float32",), implementation=interpreted))
    (Array([[0.25, 0.75]], dtype=float32),) (Array([4.], dtype=float32),)
    """
    *lead, width = values[0].shape
    if implementation.platform == "xla":
        rows = tuple(x[..., None] for x in of_row)
        columns = tuple(x[None] for x in of_column)
        written, sums, statistics = _at_once(function, values, rows, columns)
        statistics = statistics if returns_statistics else ()
    else:
        if implementation.platform == "tpu":
            from jaxref.kernels.rows_tpu import run
        else:
            from jaxref.kernels.rows_gpu import run
        written, sums, statistics = run(
            function,
            tuple(x.reshape(-1, width) for x in values),
            tuple(x.reshape(-1, 1) for x in of_row),
            tuple(x.reshape(1, width) for x in of_column),
            dtypes,
            block or tuned_block(function.name, (math.prod(lead), width)),
            returns_statistics,
            implementation.interpret,
        )
    written = tuple(
        x.reshape(*lead, width).astype(dtype) for x, dtype in zip(written, dtypes, strict=True)
    )
    return (*written, *sums), tuple(x.reshape(lead) for x in statistics)


def _at_once(
    function: RowFunction,
    values: tuple[Array, ...],
    of_row: tuple[Array, ...],
    of_column: tuple[Array, ...],
) -> tuple[tuple[Array, ...], tuple[Array, ...], Statistics]:
    dtype = compute_dtype(*values)
    column = jnp.arange(values[0].shape[-1], dtype=jnp.int32)[None]
    wide = tuple(x.astype(dtype) for x in values)
    scaled = tuple(x.astype(dtype) for x in of_column)
    tile = Tile(wide, of_row, scaled, column, jnp.ones_like(column, bool))
    statistics = function.measure(tile)
    rows = tuple(range(values[0].ndim - 1))
    sums = tuple(jnp.sum(x, axis=rows) for x in function.add_up(tile, statistics))
    return function.write(tile, statistics), sums, statistics
