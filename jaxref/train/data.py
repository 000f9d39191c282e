"""Token corpora named by a string, and the batches that training and validation read from them.

A corpus is two flat arrays of token ids, memory-mapped or backed by bytes, and a batch is cut out
of windows of them: window i holds the `length + 1` tokens from `i * length` on, so that its first
`length` tokens are inputs, its last `length` are targets, and every token but the first is a
target once.
"""

import fnmatch
import glob
import hashlib
import math
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from jaxref.core.checks import check_interval
from jaxref.train.baselines import compression_bits_per_byte, unigram_entropy

Batch = dict[str, np.ndarray]

_SEPARATOR = b"\0"  # between two files: the one byte that text does not contain
_SKIPPED_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_CHECKED_AT_ONCE = 2**24

_Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""To train on, excluded, and held out."""


class Corpus(NamedTuple):
    """Token ids to train on and to validate on.

    Attributes:
      train: 1-D array of uint8, uint16 or uint32 ids; read-only, in memory or memory-mapped.
      validation: the held-out ids, likewise.
      excluded: ids of the files that would be in `train` if they were not left out, likewise.
      vocab_size: every id is below it.
      is_bytes: whether an id is a byte, so that `tokens.tobytes()` is text.
      description: where the tokens come from, in a few words.

    The methods are what the training loop asks of its data; `jaxref.train.images.ImageSet` and
    `jaxref.train.series.SeriesSet` have them, too. They take the whole configuration.
    """

    train: np.ndarray
    validation: np.ndarray
    excluded: np.ndarray
    vocab_size: int
    is_bytes: bool
    description: str

    @property
    def measure(self) -> str:
        """What a validation loss is."""
        return f"nats per {'byte' if self.is_bytes else 'token'}"

    def sizes(self, config: ConfigDict) -> dict[str, Any]:
        """What the program has to know of the data."""
        num_examples = num_windows(self.train, config.length)
        return {"vocab_size": self.vocab_size, "num_examples": num_examples}

    def summary(self) -> str:
        """The data in a line."""
        return (
            f"{self.description}; {len(self.train):,} tokens to train on, "
            f"{len(self.validation):,} held out"
        )

    def per_step(self, config: ConfigDict) -> tuple[int, str]:
        """How many tokens a step reads, and a name for their rate."""
        return config.batch_size * config.length, "tokens_per_second"

    def batches(
        self, config: ConfigDict, rows: np.ndarray | None = None
    ) -> grain.IterDataset[Batch]:
        """The endless training batches, or of each only these rows."""
        return train_batches(
            self.train,
            batch_size=config.batch_size,
            length=config.length,
            seed=config.seed,
            rows=rows,
        )

    def held_out(self, config: ConfigDict) -> tuple[list[Batch], dict[str, float]]:
        """The validation batches, and the loss in nats of what needs no model, by name: the entropy
        of the symbols' frequencies ("unigram") and, for bytes, what zlib and lzma make of them."""
        window = {"length": config.length, "max_tokens": config.validation_tokens}
        tokens = validation_tokens(self.validation, **window)
        baselines = {"unigram": unigram_entropy(tokens)}
        if self.is_bytes:
            compressed = compression_bits_per_byte(validation_text(self.validation, **window))
            baselines |= {name: bits * math.log(2) for name, bits in compressed.items()}
        batches = validation_batches(self.validation, batch_size=config.batch_size, **window)
        return list(batches), baselines


def load_corpus(
    name: str = "python_stdlib",
    *,
    validation_fraction: float = 0.05,
    vocab_size: int | None = None,
    token_dtype: str = "uint16",
    exclude: str = "",
    **images: Any,
) -> Corpus:
    """The corpus that a name stands for, split into training and validation tokens.

    Nothing is downloaded, and nothing is written. `name` is one of

    - `python_stdlib`: the source code of the running Python's standard library, about 12 MB of
      bytes, without its tests. Joined in the order of the relative paths.
    - `text:GLOB`: the bytes of the matching files, `**` matching any depth and `~` the home
      directory; sorted, joined and held in memory, or memory-mapped when there is just one.
    - `tokens:FILE`: ids of an earlier tokenization, a flat little-endian memory-mapped array.

    Joined files are separated by a byte 0. They are split by file: in the order of a hash of their
    relative paths, which no other machine or install path changes, files are held out as long as
    they fit in `validation_fraction` of the bytes. Where that holds out less than half of the
    fraction (one file, or a few large ones), and for `tokens:FILE`, the tail is held out instead.

    Args:
      name: the source of the tokens, as above.
      validation_fraction: in [0, 1), the share of all tokens to hold out. Default 0.05.
      vocab_size: number of different ids, at most 2**31. Default 256 for bytes; `tokens:FILE`
        must give it.
      token_dtype: "uint16" or "uint32", the type of the ids of `tokens:FILE`.
      exclude: a pattern of relative paths, as of `fnmatch`, of files not to train on. What is held
        out stays the same. "" leaves out none.
      **images: what belongs to images; ignored.

    Returns:
      The `Corpus`.

    Raises:
      ValueError: a name of none of the forms, an argument out of range, files that are all empty,
        a token file of an odd size, an id of `vocab_size` or more, with its position, or a pattern
        that leaves out nothing, or all.
      FileNotFoundError: nothing matches the glob, or there is no such token file.

    Example:
      >>> corpus = load_corpus("python_stdlib")
      >>> corpus.vocab_size, corpus.is_bytes, corpus.train.dtype.name
      (256, True, 'uint8')
    """
    check_interval(0, 1, closed="left", validation_fraction=validation_fraction)
    del images
    if vocab_size is not None:
        check_interval(1, 2**31, vocab_size=vocab_size)
    source, _, where = name.partition(":")
    excluded = np.zeros(0, np.uint8)
    if name == "python_stdlib":
        parts, description = _load_python_stdlib(validation_fraction, exclude)
        train, excluded, validation = parts
    elif source == "text" and where:
        parts, description = _load_text(where, validation_fraction, exclude)
        train, excluded, validation = parts
    elif source == "tokens" and where:
        if vocab_size is None:
            raise ValueError(f"{name} needs vocab_size, the number of different token ids")
        tokens = _map_tokens(where, token_dtype)
        train, validation = _split_tail(tokens, validation_fraction)
        description = f"{token_dtype} tokens of {where}"
    else:
        raise ValueError(
            f"the corpus must be 'python_stdlib', 'text:GLOB' or 'tokens:FILE', got {name!r}"
        )
    is_bytes = source != "tokens"
    vocab_size = 256 if vocab_size is None else vocab_size
    for part, tokens in (("training", train), ("validation", validation)):
        _check_ids(tokens, vocab_size, f"the {part} tokens of {name}")
    if exclude and not (excluded.size and train.size):
        which = "leaves nothing of" if excluded.size else "matches no file to train on of"
        raise ValueError(f"exclude={exclude!r} {which} {name}")
    return Corpus(train, validation, excluded, vocab_size, is_bytes, description)


def train_batches(
    tokens: np.ndarray,
    *,
    batch_size: int,
    length: int,
    seed: int,
    rows: np.ndarray | None = None,
) -> grain.IterDataset[Batch]:
    """Endless batches of windows in an order that is shuffled anew every epoch.

    The windows of all epochs form one endless sequence, of which the k-th global batch takes
    `batch_size` in a row, across the end of an epoch too: an epoch holds every window once. A
    process makes those rows of a global batch that its devices hold, and so the batch is the same
    array whatever the number of processes.

    `iter(dataset)` is a `grain.DatasetIterator`. Its `get_state()` is the number of batches taken,
    and `set_state()` continues exactly there; orbax saves and restores it with
    `grain.checkpoint.CheckpointSave` and `CheckpointRestore`. One thread prepares two batches
    ahead.

    Args:
      tokens: 1-D integer ids; memory-mapped arrays are read as they are needed.
      batch_size: rows of the global batch, over all processes together.
      length: tokens per row.
      seed: in [0, 2**32); the same one in every process.
      rows: the rows of the global batch to make, in this order; `Program.rows` are those that a
        process needs. Default: all.

    Returns:
      A dataset of `{"inputs", "targets", "ids"}`: int32 `[rows, length]` twice, the targets being
      the inputs shifted by one token, and the index of each row's window, int32 `[rows]`, below
      `num_windows(tokens, length)`.

    Raises:
      ValueError: fewer tokens than one window, sizes that are not positive, `rows` that are not in
        the batch, or a `seed` out of range.

    Example:
      >>> tokens = np.arange(100, dtype=np.uint16)
      >>> batch = next(iter(train_batches(tokens, batch_size=4, length=8, seed=0)))
      >>> batch["inputs"].shape, bool((batch["targets"] == batch["inputs"] + 1).all())
      ((4, 8), True)
    """
    windows = _windows(tokens, length)
    return example_batches(
        len(windows),
        lambda ids: _inputs_and_targets(windows[ids]),
        batch_size=batch_size,
        seed=seed,
        rows=rows,
    )


def example_batches(
    num_examples: int,
    gather: Callable[[np.ndarray], Batch],
    *,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
) -> grain.IterDataset[Batch]:
    """Endless batches of examples in an order that is shuffled anew every epoch: see
    `train_batches`.

    Args:
      num_examples: examples of an epoch.
      gather: makes a batch of the examples of given ids, int32 `[rows]`.
      batch_size, seed, rows: as in `train_batches`.

    Returns:
      A dataset of what `gather` makes, and "ids".

    Raises:
      ValueError: sizes that are not positive, `rows` that are not in the batch, or a `seed` out of
        range.

    Example:
      >>> batches = example_batches(5, lambda ids: {"inputs": ids}, batch_size=2, seed=0)
      >>> sorted(next(iter(batches)))
      ['ids', 'inputs']
    """
    check_interval(1, np.inf, batch_size=batch_size)
    check_interval(0, 2**32 - 1, seed=seed)
    if rows is None:
        rows = np.arange(batch_size)
    elif not np.isin(rows, np.arange(batch_size)).all():
        raise ValueError(f"rows must be in [0, {batch_size - 1}], got {rows}")
    order = grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat()

    def batch(number: int) -> Batch:
        ids = np.array([order[number * batch_size + row] for row in rows.tolist()], np.int32)
        return gather(ids) | {"ids": ids}

    return (
        grain.MapDataset.range(sys.maxsize // batch_size)
        .map(batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )


def validation_batches(
    tokens: np.ndarray, *, batch_size: int, length: int, max_tokens: int
) -> Iterator[Batch]:
    """The same windows every time, spread evenly over the tokens, in batches of a static shape.

    Of the n windows, k = min(n, max_tokens // length) are evaluated: those of index `i n // k`.

    Args:
      tokens: 1-D integer ids.
      batch_size: rows per batch.
      length: tokens per row.
      max_tokens: most targets to evaluate, at least `length`.

    Returns:
      An iterator of `{"inputs", "targets", "where"}`, each `[batch_size, length]`: int32, int32
      and a boolean mask that is false in the rows that pad the last batch, whose ids are 0.

    Raises:
      ValueError: fewer tokens than one window, `max_tokens` below `length`, or sizes that are not
        positive.

    Example:
      >>> tokens = np.arange(100, dtype=np.uint16)
      >>> batches = list(validation_batches(tokens, batch_size=2, length=8, max_tokens=24))
      >>> [batch["where"].sum().item() for batch in batches]
      [16, 8]
    """
    check_interval(1, np.inf, batch_size=batch_size)
    windows = _spread_windows(tokens, length, max_tokens)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(windows), batch_size):
            rows = windows[start : start + batch_size]
            where = np.zeros((batch_size, length), bool)
            where[: len(rows)] = True
            padded = np.pad(rows, ((0, batch_size - len(rows)), (0, 0)))
            yield _inputs_and_targets(padded) | {"where": where}

    return batches()


def validation_tokens(tokens: np.ndarray, *, length: int, max_tokens: int) -> np.ndarray:
    """The targets that `validation_batches` evaluates, as one 1-D array in their own type.

    Args:
      tokens: 1-D integer ids.
      length: tokens per row, as given to `validation_batches`.
      max_tokens: most targets to evaluate, likewise.

    Returns:
      `[k * length]` ids, what to compute baselines on. With `max_tokens` of `len(tokens)` or more
      they are `tokens` without its first and the remainder of its last window; with fewer, text
      is in pieces of `length`, where a compressor finds less to repeat.

    Raises:
      ValueError: as `validation_batches`.

    Example:
      >>> validation_tokens(np.arange(100, dtype=np.uint16), length=4, max_tokens=8)
      array([ 1,  2,  3,  4, 49, 50, 51, 52], dtype=uint16)
    """
    return _spread_windows(tokens, length, max_tokens)[:, 1:].flatten()


def validation_text(tokens: np.ndarray, *, length: int, max_tokens: int) -> bytes:
    """The bytes of `validation_tokens`: for a corpus of bytes, the text that is evaluated.

    Args:
      tokens: 1-D integer ids.
      length: tokens per row, as given to `validation_batches`.
      max_tokens: most targets to evaluate, likewise.

    Returns:
      One byte per token for uint8; two or four for uint16 and uint32.

    Raises:
      ValueError: as `validation_batches`.

    Example:
      >>> text = np.frombuffer(b"to be, or not to be", np.uint8)
      >>> validation_text(text, length=6, max_tokens=12)
      b'o be, or not'
    """
    return validation_tokens(tokens, length=length, max_tokens=max_tokens).tobytes()


def num_windows(tokens: np.ndarray, length: int) -> int:
    """How many windows of `length + 1` tokens there are: the examples of an epoch.

    Args:
      tokens: 1-D integer ids.
      length: tokens per row, at least 1.

    Returns:
      The number of windows, which share a token with their neighbours; the rest at the end is left
      out.

    Raises:
      ValueError: fewer tokens than one window.

    >>> num_windows(np.arange(100), 8)
    12
    """
    return len(_windows(tokens, length))


def _windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """A view `[n, length + 1]` of `tokens`: window i starts at `i * length`."""
    check_interval(1, np.inf, length=length)
    if len(tokens) < length + 1:
        raise ValueError(
            f"tokens must hold at least one window of length + 1 = {length + 1}, got {len(tokens)}"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


def _spread_windows(tokens: np.ndarray, length: int, max_tokens: int) -> np.ndarray:
    windows = _windows(tokens, length)
    if max_tokens < length:
        raise ValueError(f"max_tokens must be at least length = {length}, got {max_tokens}")
    count = min(len(windows), max_tokens // length)
    return windows[np.arange(count) * len(windows) // count]


def _inputs_and_targets(windows: np.ndarray) -> Batch:
    return {
        "inputs": windows[:, :-1].astype(np.int32),
        "targets": windows[:, 1:].astype(np.int32),
    }


def _load_python_stdlib(validation_fraction: float, exclude: str) -> tuple[_Parts, str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [d for d in subdirectories if d not in _SKIPPED_DIRECTORIES]
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    texts = _read(_with_content(files), root)
    if not texts:
        raise FileNotFoundError(f"the standard library in {root} has no Python source files")
    description = f"source of the Python {platform.python_version()} standard library"
    parts = _split_by_file(texts, validation_fraction, exclude)
    return parts, f"{description}, {len(texts)} files"


def _load_text(pattern: str, validation_fraction: float, exclude: str) -> tuple[_Parts, str]:
    expanded = os.path.expanduser(pattern)
    files = [Path(match) for match in set(glob.glob(expanded, recursive=True))]
    if not any(file.is_file() for file in files):
        raise FileNotFoundError(f"text:{pattern} matches no file")
    files = _with_content(files)
    if not files:
        raise ValueError(f"text:{pattern} matches only empty files")
    description = f"text of {pattern}, {len(files)} file{'s' if len(files) > 1 else ''}"
    if len(files) == 1:
        tokens = np.memmap(files[0], np.uint8, "r")
        train, validation = _split_tail(tokens, validation_fraction)
        return (train, tokens[:0], validation), description
    fixed = takewhile(lambda part: not any(c in part for c in "*?["), Path(expanded).parts)
    texts = _read(files, Path(*fixed))
    return _split_by_file(texts, validation_fraction, exclude), description


def _with_content(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if file.is_file() and file.stat().st_size]


def _read(files: Sequence[Path], root: Path) -> dict[str, bytes]:
    """The text of every file by its path below `root`, sorted."""
    texts = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    return dict(sorted(texts.items()))


def _split_by_file(texts: dict[str, bytes], fraction: float, exclude: str) -> _Parts:
    target = fraction * sum(map(len, texts.values()))
    room, held_out = target, set()
    for path in sorted(texts, key=lambda path: hashlib.sha256(os.fsencode(path)).digest()):
        if len(texts[path]) <= room:
            held_out.add(path)
            room -= len(texts[path])
    if room > target / 2:
        cut, validation = _split_tail(_join(list(texts.values())), fraction)
        if not exclude:
            return cut, cut[:0], validation
        train, start = {}, 0
        for path, text in texts.items():
            train[path] = text[: max(len(cut) - start, 0)]
            start += len(text) + len(_SEPARATOR)
        train = {path: text for path, text in train.items() if text}
    else:
        train = {path: text for path, text in texts.items() if path not in held_out}
        validation = _join([text for path, text in texts.items() if path in held_out])
    out = {path for path in train if fnmatch.fnmatch(path, exclude)}
    kept = [text for path, text in train.items() if path not in out]
    return _join(kept), _join([train[path] for path in train if path in out]), validation


def _join(texts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(_SEPARATOR.join(texts), np.uint8)


def _split_tail(tokens: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    cut = len(tokens) - round(fraction * len(tokens))
    return tokens[:cut], tokens[cut:]


def _map_tokens(file: str, dtype: str) -> np.ndarray:
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"token_dtype must be 'uint16' or 'uint32', got {dtype!r}")
    path = Path(file).expanduser()
    little_endian = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"the token file {file} is empty")
    if size % little_endian.itemsize:
        raise ValueError(
            f"the token file {file} has the odd size {size}: not a multiple of "
            f"{little_endian.itemsize} bytes, the size of {dtype}"
        )
    return np.memmap(path, little_endian, "r")


def _check_ids(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    if vocab_size > np.iinfo(tokens.dtype).max:
        return
    largest, position = -1, 0
    for start in range(0, len(tokens), _CHECKED_AT_ONCE):
        chunk = tokens[start : start + _CHECKED_AT_ONCE]
        i = int(chunk.argmax())
        if chunk[i] > largest:
            largest, position = int(chunk[i]), start + i
    if largest >= vocab_size:
        raise ValueError(
            f"{name} must be below vocab_size {vocab_size}, got {largest} at position {position}"
        )
