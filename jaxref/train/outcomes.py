"""Pictures and tables of what a run came to."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from jaxref.train.records import new_figure, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_predictions(
    images: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    *,
    most: int = 40,
    figure: "Figure | None" = None,
) -> "Figure":
    """Draws images with what a model takes them for, its mistakes first and in red.

    Args:
      images: `[n, height, width, channels]`, of one channel or three, in any range.
      labels: integer `[n]`, the classes.
      predicted: integer `[n]`, what the model takes them for.
      most: how many to draw at most. Default 40.
      figure: matplotlib figure. Default: a new one.

    Returns:
      The figure.
    """
    figure = new_figure() if figure is None else figure
    order = np.argsort(labels == predicted, kind="stable")[:most]
    columns = 10
    rows = -(-len(order) // columns)
    figure.set_size_inches(7.5, 0.55 + 0.95 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    low, high = images.min(), images.max()
    for panel in panels.flat:
        panel.axis("off")
    for panel, i in zip(panels.flat, order):
        pixels = (images[i] - low) / max(high - low, 1e-12)
        one_channel = pixels.shape[-1] != 3
        panel.imshow(pixels[..., 0] if one_channel else pixels, cmap="gray_r", vmin=0, vmax=1)
        right = labels[i] == predicted[i]
        panel.set_title(
            f"{predicted[i]}" if right else f"{predicted[i]}, not {labels[i]}",
            fontsize="small",
            color="0.25" if right else "tab:red",
        )
    wrong = int(np.sum(labels != predicted))
    figure.suptitle(f"{wrong} of {len(labels)} held-out images taken for another class")
    return figure


def save_prediction_plot(
    workdir: str | os.PathLike, images: np.ndarray, labels: np.ndarray, predicted: np.ndarray
) -> epath.Path:
    """Draws `plot_predictions` to the working directory's `predictions.png`.

    Args:
      workdir: the working directory.
      images, labels, predicted: as for `plot_predictions`.

    Returns:
      The path of the picture.
    """
    return _save(workdir, "predictions.png", plot_predictions(images, labels, predicted))


def plot_forecasts(
    inputs: np.ndarray,
    targets: np.ndarray,
    predicted: np.ndarray,
    *,
    figure: "Figure | None" = None,
) -> "Figure":
    """Draws windows of series, how they went on, and how a model thought that they would.

    Args:
      inputs: `[n, context_length, channels]`; of the channels, the first four are drawn.
      targets: `[n, horizon, channels]`.
      predicted: `[n, horizon, channels]`, the forecasts.
      figure: matplotlib figure. Default: a new one.

    Returns:
      The figure: a column for each window, a row for each series.
    """
    figure = new_figure() if figure is None else figure
    windows, context_length, channels = inputs.shape
    rows = min(channels, 4)
    figure.set_size_inches(3.2 * windows, 0.8 + 1.5 * rows)
    panels = figure.subplots(rows, windows, sharex=True, sharey="row", squeeze=False)
    past, future = np.arange(-context_length, 0), np.arange(targets.shape[1])
    for i, panel in np.ndenumerate(panels):
        channel, window = i
        known = inputs[window, :, channel]
        panel.plot(past, known, color="0.55", linewidth=1)
        for values, color, name in (
            (targets, "tab:blue", "came"),
            (predicted, "tab:orange", "forecast"),
        ):
            line = np.append(known[-1:], values[window, :, channel])
            panel.plot([-1, *future], line, color=color, linewidth=1.6, label=name)
        panel.axvline(-0.5, color="0.8", linewidth=0.8, zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
        if window == 0:
            panel.set_ylabel(f"series {channel}")
        if channel == rows - 1:
            panel.set_xlabel("steps from now")
    error = np.mean(np.square(predicted - targets))
    figure.suptitle(f"held-out windows, standardised: squared error {error:.3f}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper right", frameon=False)
    return figure


def save_forecast_plot(
    workdir: str | os.PathLike, inputs: np.ndarray, targets: np.ndarray, predicted: np.ndarray
) -> epath.Path:
    """Draws `plot_forecasts` to the working directory's `forecasts.png`.

    Args:
      workdir: the working directory.
      inputs, targets, predicted: as for `plot_forecasts`.

    Returns:
      The path of the picture.
    """
    return _save(workdir, "forecasts.png", plot_forecasts(inputs, targets, predicted))


def plot_alignment(
    metrics: Sequence[Mapping[str, float]],
    reward: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    figure: "Figure | None" = None,
) -> "Figure":
    """Draws how the reward of what a model writes went up, and how far it went for that.

    Args:
      metrics: the records of the steps, with "step", "reward" and "divergence".
      reward: what the reward is called.
      before, after: "reward" and "divergence" on held-out prompts.
      figure: matplotlib figure. Default: a new one.

    Returns:
      The figure.
    """
    figure = new_figure() if figure is None else figure
    figure.set_size_inches(7.5, 5.2)
    steps = [row["step"] for row in metrics]
    panels = figure.subplots(2, 1, sharex=True)
    for panel, name, label in zip(
        panels, ("reward", "divergence"), (reward, "KL from the start,\nnats per body")
    ):
        values = np.array([row[name] for row in metrics])
        panel.plot(steps, values, color="tab:blue", linewidth=1.4, label="training prompts")
        ends = [steps[0] - 1, steps[-1]]
        panel.plot(ends, [before[name], after[name]], "o", color="tab:orange", label="held out")
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, max(1.0, panels[0].get_ylim()[1]))
    panels[1].set_xlabel("step")
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle(
        f"{reward}: {before['reward']:.0%} before, {after['reward']:.0%} after, on held-out prompts"
    )
    return figure


def save_alignment_plot(
    workdir: str | os.PathLike,
    metrics: Sequence[Mapping[str, float]],
    reward: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> epath.Path:
    """Draws `plot_alignment` to the working directory's `alignment.png`.

    Args:
      workdir: the working directory.
      metrics, reward, before, after: as for `plot_alignment`.

    Returns:
      The path of the picture.
    """
    return _save(workdir, "alignment.png", plot_alignment(metrics, reward, before, after))


def plot_unlearning(
    metrics: Sequence[Mapping[str, float]],
    before: Mapping[str, float],
    retrained: Mapping[str, float] | None = None,
    *,
    figure: "Figure | None" = None,
) -> "Figure":
    """Draws how the loss of what is forgotten rises, and that of the rest stays.

    Args:
      metrics: the records of the steps, with "step" and some with "forget" and "retain".
      before: "forget" and "retain" at the start.
      retrained: those of a model that never saw what is forgotten; dashed.
      figure: matplotlib figure. Default: a new one.

    Returns:
      The figure.
    """
    figure = new_figure() if figure is None else figure
    figure.set_size_inches(7.5, 4)
    panel = figure.subplots()
    rows = [row for row in metrics if "forget" in row]
    steps = [0, *(row["step"] for row in rows)]
    for name, color in (("forget", "tab:red"), ("retain", "tab:blue")):
        values = [before[name], *(row[name] for row in rows)]
        panel.plot(steps, values, "o-", color=color, markersize=3, label=name)
        if retrained is not None:
            panel.axhline(
                retrained[name],
                color=color,
                linestyle="--",
                linewidth=1,
                label=f"{name}, retrained",
            )
    panel.set_xlabel("step")
    panel.set_ylabel("nats per token")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.suptitle("what is to be forgotten, and the rest")
    return figure


def save_unlearning_plot(
    workdir: str | os.PathLike,
    metrics: Sequence[Mapping[str, float]],
    before: Mapping[str, float],
    retrained: Mapping[str, float] | None,
) -> epath.Path:
    """Draws `plot_unlearning` to the working directory's `unlearning.png`.

    Args:
      workdir: the working directory.
      metrics, before, retrained: as for `plot_unlearning`.

    Returns:
      The path of the picture.
    """
    return _save(workdir, "unlearning.png", plot_unlearning(metrics, before, retrained))


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Cells under their columns and beside the names of their rows.

    Args:
      columns: their names.
      rows: by their names, a cell for each column.

    Returns:
      Lines of text, of cells to the right.

    >>> print(table(["before", "after"], {"loss": ["2.31", "1.42"]}))
             before      after
    loss       2.31       1.42
    """
    width = max(map(len, rows))
    lines = {"": columns, **rows}
    return "\n".join(
        f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells)
        for name, cells in lines.items()
    )


def _save(workdir: str | os.PathLike, name: str, figure: "Figure") -> epath.Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path = epath.Path(workdir) / name
    write_atomic(path, picture.getvalue())
    return path
