"""Where a run lives: a local directory, or a place in an object store, as gs://bucket/runs/1."""

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator

from etils import epath


def place(path: str | os.PathLike) -> epath.Path:
    """The absolute path of a local directory, `~` being the home directory; or an address in an
    object store as it is.

    Raises:
      ValueError: an address of a store that checkpoints cannot be written to, or whose package is
        not installed.

    >>> place("gs://bucket") / "checkpoints"
    PosixGPath('gs://bucket/checkpoints')
    """
    address = os.fspath(path)
    store, separator, _ = address.partition("://")
    if not separator:
        return epath.Path(path).expanduser().resolve()
    if store != "gs":
        raise ValueError(
            f"{address!r} is no place for a run: arrays can be written to local directories and to "
            "gs://BUCKET/PATH; use one of these, and copy what comes out"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{address!r} needs the package gcsfs: pip install 'jaxref[remote]'")
    return epath.Path(address)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in an object store: of whole files, which cannot be appended to
    or renamed."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def only_os_errors(path: epath.Path) -> Iterator[None]:
    """Raises OSError, with the path in its message, for whatever error the package of an object
    store raises within this context."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(path)) from error


def copy_files(source: epath.Path, to: epath.Path) -> None:
    """Copies the files in a local directory, and in those below it, to a place where those of the
    same names are replaced.

    Raises:
      OSError: a file cannot be written.
    """
    for directory, _, files in source.walk():
        for name in files:
            file = directory / name
            with only_os_errors(to):
                (to / file.relative_to(source)).write_bytes(file.read_bytes())


def total_bytes(directory: epath.Path) -> int:
    """The size of all files in a directory and in those below it."""
    return sum(
        total_bytes(path)
        if path.is_dir()
        else path.stat().length
        if is_remote(path)
        else os.path.getsize(path)
        for path in directory.iterdir()
    )
