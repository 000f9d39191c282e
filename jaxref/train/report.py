"""A page about a run, in one file: what it is, what came out, and its curves.

All of it is from what the run has recorded, so that it can be made while the run goes on, and on
another machine.
"""

import base64
import html
import io
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from etils.epath import Path
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxref.train.config import ConfigError, learned
from jaxref.train.configs.default import get_config
from jaxref.train.records import (
    VALIDATION_LOSS,
    plot_loss,
    read_metrics,
    read_norms,
    read_starts,
    write_text_atomic,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

KINDS_OF_TIME = {"step": "tab:blue", "input": "tab:orange", "save": "tab:green"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 70rem;
  padding: 0 1rem 3rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin-top: 1.2rem; }
.numbers div { background: #f4f6f8; border-radius: .4rem; padding: .5rem .8rem; }
.numbers b { display: block; font-size: 1.25rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr));
  gap: 1.5rem; align-items: start; }
figure { margin: 0; }
figcaption { font-size: .9rem; color: #555; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0;
  border-bottom: 1px solid #eee; font-weight: normal; }
th { color: #555; }
td { overflow-wrap: anywhere; min-width: 3.5rem; }
pre { background: #f4f6f8; border-radius: .4rem; padding: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
"""


def report(config: ConfigDict, workdir: Path) -> None:
    """Writes `report.html` of a run to its working directory and prints its path.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      workdir: the working directory of the run, which may go on meanwhile.

    Raises:
      ConfigError: the run has recorded nothing yet.
      OSError: the page cannot be written.
    """
    metrics = read_metrics(workdir)
    if not metrics:
        raise ConfigError(f"{workdir} holds no records yet; train first")
    path = workdir / "report.html"
    write_text_atomic(path, _page(config, workdir, metrics))
    print(f"Report: {path}")


def _page(config: ConfigDict, workdir: Path, metrics: Rows) -> str:
    starts, norms = read_starts(workdir), read_norms(workdir)
    facts = starts[-1] if starts else {}
    title = f"{config.model.name} on {config.data.name}"
    resumed = " Dotted: where it was resumed." if len(starts) > 1 else ""
    skipped = " Red: steps skipped because it was not finite." if _skipped(metrics) else ""
    curves = [
        _picture(_loss_figure(metrics, starts, facts), f"Training and validation loss.{resumed}"),
        _picture(
            plot_gradient(metrics, starts),
            f"Learning rate, and the norm of the gradient before clipping.{skipped}",
        ),
    ]
    if any("step_seconds" in row for row in metrics):
        curves += [
            _picture(
                plot_speed(metrics, starts),
                "Speed. The first record of a start, which has the time to compile in it, may lie "
                "outside, here and in the times.",
            ),
            _picture(
                plot_times(metrics, starts),
                "Time of a step: what the host waits for, be it devices (step), batches (input) or "
                "checkpoints (save).",
            ),
        ]
    by_layer = (
        "<p>Not recorded; <code>--config.norms_every=100</code> records them.</p>"
        if not norms
        else '<div class="figures">'
        + _picture(plot_norms(norms, by_layer=True), "By layer, all arrays of a layer together.")
        + _picture(plot_norms(norms, by_layer=False), "By array, over all layers together.")
        + "</div>"
    )
    sections = {
        "The run": _run_table(config, facts, starts),
        "Outcome": _outcome(workdir, metrics, facts),
        "Curves": f'<div class="figures">{"".join(curves)}</div>',
        "Norms": by_layer,
        "Configuration": _configuration(config),
    }
    body = "".join(f"<h2>{name}</h2>\n{content}\n" for name, content in sections.items())
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n<div>{_text(workdir)}, {written}</div>\n"
        f"{_numbers(config, metrics, facts)}\n{body}</body></html>\n"
    )


def _numbers(config: ConfigDict, metrics: Rows, facts: Mapping[str, Any]) -> str:
    """The figures that one looks for first."""
    rate = _rate(metrics)
    shown = {
        f"of {config.steps:,} steps": f"{metrics[-1]['step']:,}",
        "training loss": _last(metrics, "loss", ".3f"),
        f"validation, {facts.get('measure', 'nats')}": _last(metrics, VALIDATION_LOSS, ".3f"),
        "right in validation": _last(metrics, "validation_accuracy", ".1%"),
        rate.replace("_", " "): _last(metrics, rate, ",.0f"),
        "of the peak FLOPs": _last(metrics, "model_flops_utilisation", ".1%"),
        "steps skipped, not finite": _last(metrics, "nonfinite_steps", ",.0f"),
    }
    return (
        '<div class="numbers">'
        + "".join(f"<div><b>{value}</b>{name}</div>" for name, value in shown.items() if value)
        + "</div>"
    )


def _run_table(config: ConfigDict, facts: Mapping[str, Any], starts: Rows) -> str:
    used = {axis: size for axis, size in facts.get("mesh", {}).items() if size > 1}
    parts = " x ".join(f"{axis} {size}" for axis, size in used.items())
    rows = {
        "Model": config.model.name
        + (f", {facts['parameters']:,} parameters" if "parameters" in facts else ""),
        "Data": facts.get("data", config.data.name),
        "Training": f"{config.steps:,} steps of {config.batch_size:,} rows, "
        f"{config.optimizer.name}, {learned(config)}",
    }
    if starts:
        rows["Devices"] = facts["devices"] + (f" as {parts}" if parts else "")
        rows["Processes"] = str(facts["processes"])
        rows["jax"] = facts["jax"]
        rows["Started"] = "; ".join(
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start["time"]))
            + (f", continued after step {start['step']:,}" if start["step"] else "")
            for start in starts
        )
    return _table([[name, value] for name, value in rows.items()])


def _outcome(workdir: Path, metrics: Rows, facts: Mapping[str, Any]) -> str:
    """The validation loss beside what needs no model, and what the run has left."""
    losses = {row["step"]: row[VALIDATION_LOSS] for row in metrics if VALIDATION_LOSS in row}
    named = {f"validation, step {step:,}": loss for step, loss in list(losses.items())[-1:]}
    if losses:
        best = min(losses, key=losses.__getitem__)
        named |= {f"best validation, step {best:,}": losses[best]}
    named |= facts.get("baselines", {})
    parts = []
    if named:
        measure = facts.get("measure", "nats")
        rows = [[name, f"{loss:.3f}"] for name, loss in named.items()]
        if measure.startswith("nats"):
            rows = [[*row, f"{loss / math.log(2):.3f}"] for row, loss in zip(rows, named.values())]
        parts.append(_table(rows, ["", measure, "bits"][: len(rows[0])]))
    if (workdir / "sample.txt").exists():
        sample = (workdir / "sample.txt").read_bytes().decode(errors="replace")
        parts.append(f"<p>Sample:</p><pre>{_text(sample)}</pre>")
    if (workdir / "predictions.png").exists():
        picture = (workdir / "predictions.png").read_bytes()
        parts.append(f"<figure>{_image(picture, 'Held-out images, mistakes first')}</figure>")
    if (workdir / "forecasts.png").exists():
        picture = (workdir / "forecasts.png").read_bytes()
        parts.append(f"<figure>{_image(picture, 'Held-out series and their forecasts')}</figure>")
    return "".join(parts) or "<p>None yet.</p>"


def _configuration(config: ConfigDict) -> str:
    """What differs from the main job's, and all of it."""
    default = flatten_dict(get_config().to_dict(), sep=".")
    here = flatten_dict(config.to_dict(), sep=".")
    rows = [
        [key, repr(here[key]) if key in here else "", repr(default[key]) if key in default else ""]
        for key in {**default, **here}
        if key not in here or key not in default or here[key] != default[key]
    ]
    table = _table(rows, ["key", "this run", "main job"]) if rows else "<p>The main job's.</p>"
    everything = json.dumps(config.to_dict(), indent=2)
    return f"{table}<details><summary>All keys</summary><pre>{_text(everything)}</pre></details>"


def _loss_figure(metrics: Rows, starts: Rows, facts: Mapping[str, Any]) -> "Figure":
    figure = _new_figure(3.4)
    ax = figure.subplots()
    plot_loss(
        metrics, baselines=facts.get("baselines", {}), measure=facts.get("measure", "nats"), ax=ax
    )
    _tidy(ax, starts)
    return figure


def plot_gradient(metrics: Rows, starts: Rows) -> "Figure":
    """The learning rate, and the norm of the gradient with the spans where steps were skipped.

    Args:
      metrics: records as `jaxref.train.records.read_metrics` returns them.
      starts: as `jaxref.train.records.read_starts` returns them; all but the first are marked.

    Returns:
      The figure: one above the other.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _new_figure(3.4)
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot(*_curve(metrics, "learning_rate"), color="tab:purple")
    upper.set(ylabel="learning rate", ylim=(0, None))
    upper.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    lower.plot(*_curve(metrics, "gradient_norm"), color="tab:blue", linewidth=0.9)
    lower.set(ylabel="gradient norm", xlabel="training step", yscale="log")
    lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter(NullFormatter())
    for before, after in _skipped(metrics):
        lower.axvspan(before, after, color="tab:red", alpha=0.25, linewidth=0)
    for ax in (upper, lower):
        _tidy(ax, starts)
    return figure


def plot_speed(metrics: Rows, starts: Rows) -> "Figure":
    """Tokens or images a second, and the share of the chips' peak that this is, where it is known.

    The first record of a start, which has the time to compile in it, may lie outside of the axes.

    Args:
      metrics: records as `jaxref.train.records.read_metrics` returns them. Those without times are
        left out.
      starts: as `jaxref.train.records.read_starts` returns them; all but the first are marked.

    Returns:
      The figure.
    """
    from matplotlib.ticker import EngFormatter

    figure = _new_figure(3.4)
    ax = figure.subplots()
    timed, steady = _timed(metrics, starts)
    rate = _rate(timed)
    ax.plot(*_curve(timed, rate), color="tab:blue")
    ax.set(xlabel="training step", ylabel=rate.replace("_per_second", " / s"))
    ax.set_ylim(0, 1.12 * max(row[rate] for row in steady))
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    used = [row for row in timed if row.get("model_flops_utilisation")]
    if used:
        scale = used[-1]["model_flops_utilisation"] / used[-1][rate]
        right = ax.secondary_yaxis("right", functions=(lambda y: y * scale, lambda y: y / scale))
        right.set_ylabel("of the peak FLOPs")
        right.yaxis.set_major_formatter("{x:.0%}")
    _tidy(ax, starts)
    return figure


def plot_times(metrics: Rows, starts: Rows) -> "Figure":
    """What the host spends a step's time on; the first records of starts as in `plot_speed`, and
    left out of the means in the legend.

    Args:
      metrics: records as `jaxref.train.records.read_metrics` returns them. Those without times are
        left out.
      starts: as `jaxref.train.records.read_starts` returns them; all but the first are marked.

    Returns:
      The figure: the kinds of time stacked, in milliseconds a step.
    """
    figure = _new_figure(3.4)
    ax = figure.subplots()
    timed, steady = _timed(metrics, starts)
    milliseconds = {
        kind: np.array([1e3 * row[f"{kind}_seconds"] for row in timed]) for kind in KINDS_OF_TIME
    }
    means = {
        kind: np.mean([1e3 * row[f"{kind}_seconds"] for row in steady]) for kind in milliseconds
    }
    total = sum(means.values())
    ax.stackplot(
        [row["step"] for row in timed],
        list(milliseconds.values()),
        labels=[
            f"{kind} {float(f'{mean:.3g}'):,g} ms, {mean / total:.1%}"
            for kind, mean in means.items()
        ],
        colors=list(KINDS_OF_TIME.values()),
        step="pre",
        alpha=0.8,
    )
    most = max(sum(row[f"{kind}_seconds"] for kind in KINDS_OF_TIME) for row in steady)
    ax.set(xlabel="training step", ylabel="ms / step", ylim=(0, 1.12e3 * most))
    _tidy(ax, starts)
    figure.legend(
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize="small",
        handlelength=1,
        columnspacing=1.2,
    )
    return figure


def _timed(metrics: Rows, starts: Rows) -> tuple[list[Any], list[Any]]:
    """The records with times, and those of them that are not the first of a start, if there are
    any."""
    timed = [row for row in metrics if "step_seconds" in row]
    resumed = {0, *(start["step"] for start in starts)}
    steady = [
        row
        for last, row in pairwise([{"step": 0}, *timed])
        if not any(last["step"] <= step < row["step"] for step in resumed)
    ]
    return timed, steady or timed


def plot_norms(norms: Rows, *, by_layer: bool) -> "Figure":
    """Heat maps of log10 of the norms over the steps: a row for each layer, or else for each array,
    and the rest of the model below.

    Args:
      norms: records as `jaxref.train.records.read_norms` returns them, at least one.
      by_layer: whether a row is a layer, or an array over all layers.

    Returns:
      The figure: the parameters above, their gradients below.
    """
    steps = np.array([row["step"] for row in norms], float)
    grouped = {
        kind: _grouped([row[kind] for row in norms], by_layer=by_layer)
        for kind in ("parameters", "gradients")
    }
    rows = list(grouped["parameters"])
    layers = [i for i, row in enumerate(rows) if isinstance(row, tuple)]
    named = [i for i, row in enumerate(rows) if isinstance(row, str)]
    heights = np.ones(len(rows))
    heights[named] = max(1, len(layers) / 24)  # as high as their names, which are all shown
    edges = np.concatenate([[0], np.cumsum(heights)])
    shown = sorted([*layers[:: -(-len(layers) // 24) or 1], *named])
    names = [row if isinstance(row, str) else f"{row[0]} {row[1]}" for row in rows]
    figure = _new_figure(1.2 + 2 * max(0.17 * (len(named) + min(len(layers), 24)), 0.8))
    for ax, (kind, norm) in zip(figure.subplots(2, sharex=True), grouped.items()):
        values = np.array(list(norm.values()))
        logarithm = np.log10(values, out=np.full_like(values, np.nan), where=values > 0)
        mesh = ax.pcolormesh(_edges(steps), edges, np.ma.masked_invalid(logarithm), cmap="viridis")
        ax.set_facecolor("0.8")  # of what is zero or not finite
        ax.invert_yaxis()
        ax.set_yticks(
            [(edges[i] + edges[i + 1]) / 2 for i in shown],
            [names[i] for i in shown],
            fontsize="x-small",
        )
        ax.tick_params(axis="y", length=0)
        ax.set_title(kind, fontsize="medium", loc="left")
        bar = figure.colorbar(mesh, ax=ax, pad=0.015, aspect=30)
        bar.set_label("log10", fontsize="small")
        bar.ax.tick_params(labelsize="small")
    ax.set_xlabel("training step")
    return figure


def _grouped(records: Sequence[Mapping[str, Any]], *, by_layer: bool) -> dict[Any, np.ndarray]:
    """Norms over the records by layer, ("blocks", 3), or else by array, "blocks mlp/up/kernel";
    those of what is in no layer by the part of the model, or its path.

    Layers are the numbered entries of lists; those that are stacked in one array count on.
    """
    squares: dict[Any, np.ndarray] = {}
    for path in records[0]:
        values = np.array([record[path] for record in records], float)
        shown = path.replace("/function/", "/")
        numbered = re.fullmatch(r"(.+?)/(\d+(?:/\d+)*)/(.+)", shown)
        if numbered is None:
            keys: list[Any] = [(1, shown.split("/")[0] if by_layer else shown, ())]
        else:
            own, numbers, array = numbered.groups()
            place = tuple(map(int, numbers.split("/")))
            stack = [()] if values.ndim == 1 else [(i,) for i in range(values.shape[1])]
            keys = [(0, own, place + at) if by_layer else (0, f"{own} {array}", ()) for at in stack]
        for key, column in zip(keys, values.reshape(len(records), -1).T):
            squares[key] = squares.get(key, 0.0) + np.square(column)
    rows: dict[Any, np.ndarray] = {}
    counts: Counter[str] = Counter()
    for key in sorted(squares):
        _, name, place = key
        rows[(name, counts[name]) if place else name] = np.sqrt(squares[key])
        counts[name] += 1
    return rows


def _edges(steps: np.ndarray) -> np.ndarray:
    """Where each column of a heat map begins, and the last one ends."""
    gaps = np.diff(steps) if len(steps) > 1 else np.ones(1)
    first, last = steps[0] - gaps[0] / 2, steps[-1] + gaps[-1] / 2
    return np.concatenate([[first], (steps[:-1] + steps[1:]) / 2, [last]])


def _skipped(metrics: Rows) -> list[tuple[int, int]]:
    """The records between which steps were skipped, by their steps."""
    counted = [(r["step"], r["nonfinite_steps"]) for r in metrics if "nonfinite_steps" in r]
    return [(a, b) for (a, few), (b, more) in pairwise([(0, 0), *counted]) if more > few]


def _rate(metrics: Rows) -> str:
    """The name of the speed that is recorded."""
    names = (name for row in metrics for name in row if name.endswith("_per_second"))
    return next(names, "tokens_per_second")


def _last(metrics: Rows, name: str, form: str) -> str:
    values = [row[name] for row in metrics if name in row]
    return format(values[-1], form) if values else ""


def _curve(metrics: Rows, name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in metrics if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _new_figure(height: float) -> "Figure":
    """Narrow, for its text to be readable on a phone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(5.6, height), dpi=180, layout="constrained")


def _tidy(ax: "Axes", starts: Rows) -> None:
    ax.margins(x=0.015)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    for start in starts[1:]:
        ax.axvline(start["step"], color="0.5", linewidth=0.8, linestyle=":", zorder=1)


def _picture(figure: "Figure", caption: str) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    image = _image(picture.getvalue(), caption)
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>\n"


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{_text(description)}">'


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    lines = [f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>"] if head else []
    for first, *others in rows:
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{_text(first)}</th>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _text(value: Any) -> str:
    return html.escape(str(value))
