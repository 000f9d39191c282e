"""Functions of rows, told by what they do with a part of a row.

Softmax, its losses and the norms go over a row to sum something up, and then perhaps over the row
again to write a number per place and to sum numbers up over the rows. What they do with a tile of
rows and columns, and how what is known of two tiles comes together, is all that XLA and the Pallas
kernels need.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

Statistics = tuple[Array, ...]
"""What is known of rows: arrays `[..., 1]` in float32 (float64 in XLA, where the input is)."""


class Tile(NamedTuple):
    """Some columns of some rows.

    Attributes:
      values: arrays `[..., columns]` in float32, one of each array that a function goes over.
      of_row: arrays `[..., 1]`, what is given for each row.
      of_column: arrays `[1, columns]` in float32, what is given for each column.
      column: int32, broadcastable to the values: the numbers of the columns.
      exists: like `column`, boolean: whether the column is one, and not what fills up the tile.
        Values that do not exist are arbitrary, not a number included.
    """

    values: tuple[Array, ...]
    of_row: tuple[Array, ...]
    of_column: tuple[Array, ...]
    column: Array
    exists: Array


class RowFunction(NamedTuple):
    """A function of rows, by tiles.

    Attributes:
      name: of the kernel, in profiles.
      identity: the statistics of no column at all, numbers. Empty: nothing is measured.
      measure: `measure(tile) -> statistics`, of the columns that exist, at least one.
      merge: `merge(statistics, statistics) -> statistics` of two sets of columns.
      write: `write(tile, statistics) -> arrays [..., columns]`, from the statistics of whole rows.
      num_sums: how many arrays `add_up` returns.
      add_up: `add_up(tile, statistics) -> arrays [..., columns]`, whose sums over all rows are
        wanted. Its tiles are those that `write` gets.
    """

    name: str
    identity: tuple[float, ...] = ()
    measure: Callable[[Tile], Statistics] = lambda tile: ()
    merge: Callable[[Statistics, Statistics], Statistics] = lambda a, b: ()
    write: Callable[[Tile, Statistics], tuple[Array, ...]] = lambda tile, statistics: ()
    num_sums: int = 0
    add_up: Callable[[Tile, Statistics], tuple[Array, ...]] = lambda tile, statistics: ()


def next_multiple(size: int, of: int) -> int:
    """The least multiple that is not smaller.

    >>> next_multiple(300, 128)
    384
    """
    return -(-size // of) * of
