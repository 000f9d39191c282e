"""Measures which sizes of a kernel's tiles are the fastest, and keeps them for later programs."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array

from jaxref.bench.harness import Measurement, interleave, progress
from jaxref.kernels.block_sizes import record_block, trying_block

Block = tuple[int, ...]


def tune(
    bench: str,
    name: str,
    shape: tuple[int, ...],
    function: Callable[..., Any],
    args: tuple[Array, ...],
    candidates: Sequence[Block],
    repeats: int,
) -> Iterator[Measurement]:
    """Times a function of a kernel with each size of its tiles, and records the best.

    Args:
      bench: name of the bench.
      name: of the kernel.
      shape: what the sizes are for.
      function: what is timed, a function that calls the kernel.
      args: its arguments.
      candidates: the sizes.
      repeats: how often each is timed.

    Yields:
      The seconds of every size that the chip has memory for.

    Raises:
      RuntimeError: it has memory for none.
    """
    times: dict[Block, float] = {}
    for block in candidates:
        with trying_block(name, shape, block):
            try:
                # a function of its own for every size: jit would take it for the same
                call = partial(jax.jit(lambda *args: function(*args)), *args)
                seconds = interleave({name: call}, repeats=repeats)[name]
            except jax.errors.JaxRuntimeError as error:  # too large for the chip's memory
                progress(f"{name} in tiles of {block}: {str(error).partition(chr(10))[0]}")
                continue
        times[block] = statistics.median(seconds)
    if not times:
        raise RuntimeError(f"no tile of {candidates} runs for {name} of {shape}")
    best = min(times, key=lambda block: times[block])
    path = record_block(name, shape, best)
    progress(f"{name} {shape}: tiles of {best}, kept in {path}")
    for block, median in times.items():
        case = f"{list(shape)}, tiles of {name}"
        yield Measurement(bench, case, " x ".join(map(str, block)), "seconds", median)
