"""What a training run writes besides checkpoints: its configuration, its metrics, its curve.

All of it lives in the run's working directory: `config.json`, `metrics.jsonl` with one line a
record, `norms.jsonl` where the run measures norms, TensorBoard event files with the same numbers,
`starts.jsonl` with one line for each time that the run was started, `loss.png`, and for images
`predictions.png`. The directory may be a place in an object store, where files can only be written
as a whole.
"""

import errno
import io
import json
import math
import os
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from etils import epath

from jaxref.train.places import copy_files, is_remote, only_os_errors, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING_LOSS = "loss"
VALIDATION_LOSS = "validation_loss"

_METRICS = "metrics.jsonl"
_NORMS = "norms.jsonl"
_STARTS = "starts.jsonl"
_CONFIG = "config.json"


def open_workdir(path: str | os.PathLike) -> epath.Path:
    """Creates the working directory where it is missing and makes sure that it can be written.

    Args:
      path: the directory; `~` is the home directory. Its parents are created too.

    Returns:
      The absolute path.

    Raises:
      OSError: of the fitting kind (PermissionError, NotADirectoryError, ...), with a message that
        says which path cannot be used and what to do.
      ValueError: as `place`.
    """
    workdir = place(path)
    try:
        with only_os_errors(workdir):
            if workdir.exists() and not workdir.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            workdir.mkdir(parents=True, exist_ok=True)
            probe = workdir / f".probe-{secrets.token_hex(8)}"
            probe.write_bytes(b"x")  # the permission bits alone know nothing of read-only mounts
            probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno or errno.EIO,
            f"the working directory cannot be written ({error.strerror or error}), "
            "choose another with --workdir",
            str(workdir),
        ) from error
    return workdir


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Replaces the file by one with this text: a reader, or a crash, sees the old or the new one.

    Args:
      path: the file.
      text: what it is to hold, in UTF-8.

    Raises:
      OSError: it cannot be written; the old file is still there.
    """
    write_atomic(epath.Path(path), text.encode())


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """`write_text_atomic` of an object as indented JSON.

    Args:
      path: the file.
      obj: what JSON can hold.

    Raises:
      TypeError: the object is not what JSON can hold.
      OSError: the file cannot be written; the old one is still there.
    """
    write_text_atomic(path, json.dumps(obj, indent=2) + "\n")


def check_config(
    workdir: str | os.PathLike, config: Mapping[str, Any], *, free: Sequence[str] = ()
) -> None:
    """Makes sure that a run is resumed with the configuration it was started with.

    The first time, the configuration is written to `config.json` in the working directory. Later,
    it must be the same, except for the keys that are `free`, whose new values are recorded.

    Args:
      workdir: the working directory.
      config: nested mapping of what JSON can hold.
      free: dotted names of entries, or of whole sections, that may change from one start to the
        next, `("steps", "logging")` say.

    Raises:
      ValueError: entries differ: the message lists each with both values; or `config.json` is not
        readable as JSON.
      TypeError: the configuration is not what JSON can hold.

    Example:
      >>> import tempfile
      >>> workdir = tempfile.mkdtemp()
      >>> check_config(workdir, {"optimizer": {"name": "lion"}, "steps": 10}, free=["steps"])
      >>> check_config(workdir, {"optimizer": {"name": "lion"}, "steps": 20}, free=["steps"])
      >>> check_config(workdir, {"optimizer": {"name": "adamw"}, "steps": 20}, free=["steps"])
      Traceback (most recent call last):
        ...
      ValueError: ...
        optimizer.name: workdir has 'lion', you asked for 'adamw'
      Use the same configuration to continue this run, or another --workdir for a new one.
    """
    path = epath.Path(workdir) / _CONFIG
    asked = json.loads(json.dumps(config))  # tuples are lists, as they are in the file
    if path.exists():
        try:
            present = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}); repair it, or use another --workdir"
            ) from error
        old, new = _flatten(present), _flatten(asked)
        different = [
            f"{key}: workdir has {old.get(key, _NOTHING)!r}, "
            f"you asked for {new.get(key, _NOTHING)!r}"
            for key in {**old, **new}
            if old.get(key, _NOTHING) != new.get(key, _NOTHING)
            and not any(f"{key}.".startswith(f"{name}.") for name in free)
        ]
        if different:
            raise ValueError(
                f"{path} is of a run with another configuration:\n  "
                + "\n  ".join(different)
                + "\nUse the same configuration to continue this run, "
                "or another --workdir for a new one."
            )
        if present == asked:
            return
    write_json_atomic(path, asked)


class Records:
    """The metrics of a run, appended to `metrics.jsonl` and to TensorBoard event files; norms of
    single arrays likewise, but to `norms.jsonl`.

    Opened again after a crash, it drops what was written after `resume_step`, a line that the
    crash cut short included, so that the resumed run has every step once. When `write` returns, the
    line is in the file, and a killed process does not lose it; TensorBoard's file is up to a
    second behind. In an object store the files are as they were at the last `flush`. Only one
    process of a run may have the records open.

    Args:
      workdir: the working directory.
      resume_step: step of the checkpoint that the run continues from; -1 for one that starts anew.

    Raises:
      OSError: the files cannot be written.

    Example:
      >>> import tempfile
      >>> workdir = tempfile.mkdtemp()
      >>> with Records(workdir, resume_step=-1) as records:
      ...     records.write(10, {"loss": 5.4, "gradient_norm": 1.3})
      >>> read_metrics(workdir)
      [{'step': 10, 'loss': 5.4, 'gradient_norm': 1.3}]
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int):
        from tensorboardX import SummaryWriter  # slow: it imports torch where there is one

        self._workdir = place(workdir)
        self._directory = self._workdir
        self._resume_step = resume_step
        if is_remote(workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix="jaxref-records-")
            self._directory = epath.Path(self._temporary.name)
        for name in (_METRICS, _NORMS):
            rows = _complete_lines(self._workdir / name)
            if rows or name == _METRICS:
                self._replace(name, [row for row in rows if row["step"] <= resume_step])
        self._lines = (self._directory / _METRICS).open("a")
        self._events = SummaryWriter(str(self._directory), purge_step=resume_step + 1, flush_secs=1)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record.

        Args:
          step: the training step that the numbers belong to.
          metrics: number by name; anything that `float` takes. In `metrics.jsonl`, values that
            are not finite are the strings "nan", "inf" and "-inf", as JSON has no such numbers.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._lines.write(json.dumps({"step": int(step), **_json(values)}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, int(step))

    def write_norms(self, step: int, **norms: Mapping[str, Any]) -> None:
        """Appends one record to `norms.jsonl`.

        Args:
          step: the training step that they belong to.
          **norms: by what they are of, "parameters" say: for each array by its path a number, or
            `[layers]` of them for one that is of several layers.
        """
        row = {
            kind: {path: _json(np.asarray(value).tolist()) for path, value in of_kind.items()}
            for kind, of_kind in norms.items()
        }
        with (self._directory / _NORMS).open("a") as lines:
            lines.write(json.dumps({"step": int(step), **row}) + "\n")
        for kind, of_kind in norms.items():
            for path, value in of_kind.items():
                for index, single in np.ndenumerate(np.asarray(value)):
                    if np.isfinite(single):  # each other one would be a warning
                        tag = "/".join(map(str, (f"norms_of_{kind}", path, *index)))
                        self._events.add_scalar(tag, float(single), int(step))

    def write_start(self, facts: Mapping[str, Any]) -> None:
        """Appends to `starts.jsonl` the step that the run continues from, the seconds since the
        epoch, and what else is to be known of this start, of what JSON can hold."""
        rows = _complete_lines(self._workdir / _STARTS)
        start = {"step": max(self._resume_step, 0), "time": time.time(), **facts}
        self._replace(_STARTS, [*rows, start])
        self.flush()

    def _replace(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        write_text_atomic(self._directory / name, "".join(f"{json.dumps(row)}\n" for row in rows))

    def flush(self) -> None:
        """Writes to the object store what it does not have, if the working directory is in one.

        To be called before a checkpoint is saved: a run that continues from it lacks no record.
        """
        if self._directory != self._workdir:
            self._events.flush()
            copy_files(self._directory, self._workdir)

    def close(self) -> None:
        """Closes the files, all written."""
        self.flush()
        self._lines.close()
        self._events.close()
        if self._directory != self._workdir:
            self._temporary.cleanup()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records in `metrics.jsonl`, `{"step": int, name: float, ...}` each, in their order.

    A last line that was cut short is left out, and any other that is not a record with a warning.
    No file is no records. It may be read during a run.

    Args:
      workdir: the working directory.

    Returns:
      The records.
    """
    return [_numbers(row) for row in _complete_lines(epath.Path(workdir) / _METRICS)]


def read_norms(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records in `norms.jsonl`, `{"step": int, kind: {path: norm or [norm by layer]}}` each, as
    `read_metrics` reads the others.

    Args:
      workdir: the working directory.

    Returns:
      The records.
    """
    return [_numbers(row) for row in _complete_lines(epath.Path(workdir) / _NORMS)]


def read_starts(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `starts.jsonl`, in their order: `{"step": int, "time": seconds, ...}` each.

    Args:
      workdir: the working directory.

    Returns:
      One for each start of the run; none where there is no file.
    """
    return _complete_lines(epath.Path(workdir) / _STARTS)


def plot_loss(
    metrics: Sequence[Mapping[str, Any]],
    *,
    baselines: Mapping[str, float],
    measure: str = "nats per byte",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws the training and validation loss over the steps, with levels to compare them to.

    The training loss is drawn thin, and on top of it its mean over a window of 1/25 of the
    records, which is narrower at the start, where the loss falls fast. What is above four times all
    levels and validation losses is cut off.

    Args:
      metrics: records as `read_metrics` returns them, with `loss` and `validation_loss`;
        records without one of them, or where it is not finite, are left out of its curve.
      baselines: losses by name ("unigram", "zlib", "lzma"); a horizontal line each.
      measure: what the losses are, for the axis label. Default "nats per byte".
      ax: matplotlib axes. Default: those of a new figure, `.figure` of the result.

    Returns:
      The axes.
    """
    if ax is None:
        ax = new_figure().subplots()
    steps, loss = _curve(metrics, TRAINING_LOSS)
    ax.plot(steps, loss, color="tab:blue", linewidth=0.6, alpha=0.35)
    ax.plot(steps, _smooth(loss), color="tab:blue", linewidth=1.8, label="training")
    steps, loss = _curve(metrics, VALIDATION_LOSS)
    levels = [*loss, *baselines.values()]
    ax.plot(steps, loss, "o", color="tab:orange", markersize=5, label="validation", clip_on=False)
    for level in baselines.values():
        ax.axhline(level, color="0.35", linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
    ax.set_ylim(bottom=0)
    if levels and ax.get_ylim()[1] > 4 * max(levels):  # a start that would flatten all else
        ax.set_ylim(top=4 * max(levels))
    close = 0.05 * ax.get_ylim()[1]  # the height of a label, about
    for name, level in baselines.items():
        distances = [level - other for other in baselines.values()]
        va = "center"
        if any(0 < distance < close for distance in distances):
            va = "bottom"
        elif any(-close < distance < 0 for distance in distances):
            va = "top"
        ax.annotate(  # in the right margin, clear of the curves
            f"{name} {level:.2f}",
            (1, level),
            xycoords=ax.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va=va,
            fontsize="small",
            color="0.25",
        )
    ax.set(xlabel="training step", ylabel=f"loss ({measure})")
    ax.margins(x=0.015)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(  # above the axes, clear of curves and levels
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, frameon=False
    )
    return ax


def save_loss_plot(
    workdir: str | os.PathLike, *, baselines: Mapping[str, float], measure: str = "nats per byte"
) -> epath.Path:
    """Draws `plot_loss` of the working directory's metrics to its `loss.png`.

    No display is needed, and matplotlib's current figure is left alone.

    Args:
      workdir: the working directory.
      baselines: losses by name, as in `plot_loss`.
      measure: as in `plot_loss`.

    Returns:
      The path of the picture.
    """
    picture = io.BytesIO()
    figure = new_figure()
    plot_loss(read_metrics(workdir), baselines=baselines, measure=measure, ax=figure.subplots())
    figure.savefig(picture, format="png")
    path = epath.Path(workdir) / "loss.png"
    write_atomic(path, picture.getvalue())
    return path


def write_atomic(path: epath.Path, data: bytes) -> None:
    """Writes a file so that there is all of it, or what was there before.

    Args:
      path: the file.
      data: its bytes.
    """
    if is_remote(path):  # an object appears as a whole
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _complete_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The records in the file, as they stand there, without a last one that was cut short."""
    if not path.exists():
        return []
    # What no newline ends is torn.
    *lines, _ = path.read_bytes().decode(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError):
            logging.warning("%s: line %d is not a record and is left out", path, number)
        else:
            rows.append(row)
    return rows


def _json(value: Any) -> Any:
    """A number, or numbers in a list or a mapping, of which those that JSON does not have are
    strings."""
    if isinstance(value, Mapping):
        return {name: _json(below) for name, below in value.items()}
    if isinstance(value, list):
        return [_json(below) for below in value]
    return value if math.isfinite(value) else str(value)


def _numbers(value: Any) -> Any:
    """The numbers again, of what `_json` made."""
    if isinstance(value, Mapping):
        return {name: _numbers(below) for name, below in value.items()}
    if isinstance(value, list):
        return [_numbers(below) for below in value]
    return float(value) if isinstance(value, str) else value


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def new_figure() -> "Figure":
    """An empty figure of the size of a run's pictures, of no display and no pyplot.

    Returns:
      The figure, of matplotlib's object interface.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(7.5, 4.2), dpi=160, layout="constrained")


def _curve(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(m["step"], m[name]) for m in metrics if math.isfinite(m.get(name, math.nan))]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over centred windows; at the start narrow ones, at the end of what is there."""
    i = np.arange(len(values))
    before = np.minimum(i // 4, len(values) // 50)
    after = np.minimum(before, i[::-1])
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[i + after + 1] - total[i - before]) / (before + 1 + after)
