"""Sizes of the kernels' tiles, as measured on this machine.

What is fastest depends on the chip, the kernel and the shape. `python -m jaxref.bench softmax
--tune` measures, and keeps the best sizes in a file, `block_sizes.json` in the folder that the
environment variable JAXREF_CACHE_DIR names, else in `~/.cache/jaxref`. Where it says nothing of a
shape, a kernel's own rule holds.
"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax


def tuned_block(kernel: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The measured sizes of a kernel's tile, or None where nothing was measured.

    Args:
      kernel: its name.
      shape: what it is for. Sizes serve all shapes between two powers of two.

    >>> tuned_block("no such kernel", (8, 8)) is None
    True
    """
    sizes = _table(_path()).get(_entry(kernel, shape))
    return None if sizes is None else tuple(sizes)


def record_block(kernel: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Path:
    """Keeps the sizes of a kernel's tile for this chip, in the file and for this process.

    The file is replaced as a whole, so that one that is interrupted leaves the old one.

    Returns:
      The file.
    """
    path = _path()
    table = _table(path)
    table[_entry(kernel, shape)] = list(sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(table, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    return path


@contextlib.contextmanager
def trying_block(kernel: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[None]:
    """Programs that are traced inside have a kernel with these sizes; nothing is kept.

    >>> with trying_block("softmax", (8, 8), (8, 128)):
    ...     tuned_block("softmax", (8, 8))
    (8, 128)
    """
    table, entry = _table(_path()), _entry(kernel, shape)
    before = table.get(entry)
    table[entry] = list(sizes)
    try:
        yield
    finally:
        if before is None:
            del table[entry]
        else:
            table[entry] = before


def _entry(kernel: str, shape: tuple[int, ...]) -> str:
    rounded = "x".join(str(1 << max(size - 1, 0).bit_length()) for size in shape)
    return f"{jax.devices()[0].device_kind} {kernel} {rounded}"


def _path() -> Path:
    folder = os.environ.get("JAXREF_CACHE_DIR") or Path.home() / ".cache" / "jaxref"
    return Path(folder) / "block_sizes.json"


@functools.cache
def _table(path: Path) -> dict[str, list[int]]:
    """What the file holds, read once; a file that cannot be read holds nothing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
