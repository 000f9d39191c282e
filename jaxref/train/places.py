"""Where a run lives: a local directory, or a place in an object store, as gs://bucket/runs/1."""

import contextlib
import errno
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from etils import epath

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # by store


def place(path: str | os.PathLike) -> epath.Path:
    """The place of a run: a local directory, or an address in an object store.

    Args:
      path: a local path, `~` being the home directory, or `gs://BUCKET/PATH` of Google Cloud
        Storage, or `s3://BUCKET/PATH` of Amazon S3 or of the server at `AWS_ENDPOINT_URL`, in the
        environment, that speaks its protocol.

    Returns:
      The absolute path, or the address as it is.

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
    if store not in _PACKAGES:
        raise ValueError(
            f"{address!r} is no place for a run: arrays can be written to local directories, "
            "gs://BUCKET/PATH and s3://BUCKET/PATH; use one of these, and copy what comes out"
        )
    if importlib.util.find_spec(_PACKAGES[store]) is None:
        raise ValueError(
            f"{address!r} needs the package {_PACKAGES[store]}: pip install 'jaxref[remote]'"
        )
    if store == "s3":
        _let_orbax_use_s3()
    return epath.Path(address)


@functools.cache
def _let_orbax_use_s3() -> None:
    """From here on, orbax does at s3:// what it does at gs://: it asks for `commit_success.txt`,
    and it writes and reads arrays with the driver of the store.

    It decides so in three places, none of which is open to others; of S3 it has long been asked:
    https://github.com/google/orbax/pull/2739
    """
    from orbax.checkpoint._src.path import atomicity_defaults
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for module, name in (
        (atomicity_defaults, "get_default_temporary_path_class"),
        (atomicity_defaults, "get_item_default_temporary_path_class"),
        (tensorstore_utils, "build_kvstore_tspec"),
    ):
        setattr(module, name, _at_s3_as_at_gs(getattr(module, name)))


def _at_s3_as_at_gs(decide: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(decide)
    def decide_for_any_store(path: Any, *args: Any, **kwargs: Any) -> Any:
        store, _, rest = os.fspath(path).partition("://")
        if store != "s3":
            return decide(path, *args, **kwargs)
        return _in_s3(decide(type(path)(f"gs://{rest}"), *args, **kwargs))

    return decide_for_any_store


def _in_s3(spec: Any) -> Any:
    """What tensorstore is told of a place in Google Cloud Storage, told of the same in S3."""
    if isinstance(spec, str) and spec.startswith("gs://"):  # of earlier versions
        bucket, _, path = spec.removeprefix("gs://").partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": path}
    if isinstance(spec, list):
        return [_in_s3(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    if not spec.get("driver", "").startswith("gcs"):
        return {name: _in_s3(part) for name, part in spec.items()}
    spec = {**spec, "driver": "s3"}
    # s3fs finds the server in these variables, tensorstore does not.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        if region := os.environ.get("AWS_DEFAULT_REGION"):
            spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:  # or tensorstore complains of there being no ~/.aws
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in an object store: of whole files, which cannot be appended to
    or renamed.

    Args:
      path: as `place` takes it.

    Returns:
      True or False.
    """
    return "://" in os.fspath(path)


@contextlib.contextmanager
def only_os_errors(path: epath.Path) -> Iterator[None]:
    """Raises OSError, with the path in its message, for whatever error the package of an object
    store raises within this context.

    Args:
      path: what is read or written there.

    Yields:
      Nothing.

    Raises:
      OSError: of any other exception, its type and text in the message; an OSError passes.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(path)) from error


def move(directory: epath.Path, to: epath.Path) -> None:
    """Renames a directory; in an object store, by copies of what is in it.

    Args:
      directory: what is renamed, in a directory or below an address that `place` takes.
      to: what it is then; there is nothing yet.

    Raises:
      OSError: a file cannot be written.
    """
    if not os.fspath(directory).startswith("s3://"):
        directory.rename(to)
        return
    with only_os_errors(to):  # by file: s3fs takes a directory for a file that it does not find
        store = fsspec.filesystem("s3")
        root = os.fspath(directory).removeprefix("s3://")
        names = store.find(root)
        store.mv(names, [f"{to}{name.removeprefix(root)}" for name in names])


def copy_files(source: epath.Path, to: epath.Path) -> None:
    """Copies the files in a local directory, and in those below it, to a place where those of the
    same names are replaced.

    Args:
      source: the local directory.
      to: the place; its directories need not exist in an object store.

    Raises:
      OSError: a file cannot be written.
    """
    for directory, _, files in source.walk():
        for name in files:
            file = directory / name
            with only_os_errors(to):
                (to / file.relative_to(source)).write_bytes(file.read_bytes())


def total_bytes(directory: epath.Path) -> int:
    """The size of all files in a directory and in those below it.

    Args:
      directory: a path or an address.

    Returns:
      Bytes.
    """
    return sum(
        total_bytes(path)
        if path.is_dir()
        else path.stat().length
        if is_remote(path)
        else os.path.getsize(path)
        for path in directory.iterdir()
    )
