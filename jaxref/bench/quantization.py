"""What quantization costs a language model: validation loss against bits per weight, by method.

The main job is trained (or a run of one's own is taken: `--workdir`), and quantized by every method
at several widths; what the directory has of them already is not made again. ZeroQuant-V2's study is
among them: symmetric and asymmetric levels, blocks and none, integers for inputs as well, and
low-rank compensation on top. `--plot` draws the Pareto picture.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxref.bench.harness import Measurement, progress
from jaxref.core.figures import new_axes
from jaxref.train import loop
from jaxref.train.config import from_json, load_config, with_overrides
from jaxref.train.quantize import Result, quantize, read_results
from jaxref.train.quantized import directory

NAME = "quantization"

METHODS = {
    "round_to_nearest": (8, 4, 3, 2),
    "gptq": (8, 4, 3, 2),
    "baq": (4, 3, 2),
    "lnq": (4, 3, 2),
    "pyramid": (4, 3, 2),
    "adaptive_rounding": (4, 3, 2),
    "power": (4, 3),
    "nupes": (4, 3),
    "ternary": (2,),
    "int8": (8,),
    "llm_int8": (8,),
}
"""The widths that each method is tried at."""

VARIANTS = (
    "method=round_to_nearest bits=4 block_size=0",
    "method=round_to_nearest bits=4 block_size=0 symmetric=False",
    "method=round_to_nearest bits=4 symmetric=False",
    "method=round_to_nearest bits=4 block_size=0 low_rank=8",
    "method=round_to_nearest bits=3 low_rank=8",
    "method=round_to_nearest bits=2 low_rank=8",
    "method=gptq bits=3 low_rank=8",
)
"""What else is tried: settings of the section `quantize`."""

QUICK = (
    "steps=2 batch_size=8 length=16 validation_tokens=256 sample.length=4 model.num_layers=1 "
    "model.features=16 model.num_heads=2 model.mlp_features=32"
)


def run(*, quick: bool = False, workdir: str = "", plot: str = "") -> Iterator[Measurement]:
    """`workdir`: of a run, trained or to be trained; `plot`: a file to draw the result to."""
    config = load_config(None, [])
    cases = [f"method={name} bits={b}" for name, widths in METHODS.items() for b in widths]
    cases += VARIANTS
    with contextlib.ExitStack() as stack:
        path = Path(workdir).expanduser() if workdir else loop.default_workdir(config)
        if quick:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            text = f"data.name=text:{Path(__file__).parent}/*.py"
            config = load_config(None, [text, *QUICK.split()])
            cases = ["method=gptq bits=4 calibration_batches=1"]
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for what was measured
            if not (path / "config.json").is_file() or quick:
                loop.train(config, path)
            config = from_json((path / "config.json").read_text())
        results = []
        for case in cases:
            result = quantized(config, path, case)
            results.append(result)
            yield from measurements(result)
        if plot:
            plot_losses(results).figure.savefig(plot, dpi=120)


def quantized(config: Any, workdir: Path, case: str) -> Result:
    """What a quantized model costs: as it was found, or made now."""
    config = with_overrides(config, [f"quantize.{setting}" for setting in case.split()])
    name = directory(workdir, config.quantize).name
    if name not in {result.name for result in read_results(workdir)}:
        progress(case)
        with contextlib.redirect_stdout(sys.stderr):
            quantize(config, workdir)
    return next(result for result in read_results(workdir) if result.name == name)


def measurements(result: Result) -> Iterator[Measurement]:
    """The numbers of a result, as a bench reports them."""
    case = f"{result.matrices} matrices, {result.weights} weights"
    peer = "float32"
    for metric, value, ratio in (
        ("bits per weight", result.bits_per_weight, result.share_of_float32),
        ("loss", result.loss_after, result.loss_after / result.loss_before),
        (result.speed_unit, result.speed_after, result.speed_after / result.speed_before),
        ("disk bytes", result.bytes_on_disk, None),
    ):
        against = None if ratio is None else peer
        yield Measurement(NAME, case, result.name, metric, value, against, ratio)


def plot_losses(results: list[Result], *, axes: Any = None) -> Any:
    """Draws by how much the loss rises against bits per weight, and the Pareto frontier.

    Args:
      results: of quantized models of one run.
      axes: matplotlib axes. Default: of a new figure.

    Returns:
      The axes.
    """
    axes = new_axes() if axes is None else axes
    floor = 1e-4  # what a rise below it, or a fall, is drawn as

    def rise(result: Result) -> float:
        return max(result.loss_after / result.loss_before - 1, floor)

    frontier = pareto_frontier(results)
    axes.plot(
        [r.bits_per_weight for r in frontier],
        [rise(r) for r in frontier],
        color="lightgray",
        linewidth=4,
        zorder=0,
        label="Pareto frontier",
    )
    methods = list(dict.fromkeys(r.name.partition("-")[0] for r in results))
    for i, method in enumerate(methods):
        of_method = [r for r in results if r.name.partition("-")[0] == method]
        plain = [r for r in of_method if r.name.count("-") == 1]
        others = [r for r in of_method if r.name.count("-") > 1]
        style = {"color": f"C{i % 10}", "marker": "os^"[i // 10]}
        plain.sort(key=lambda r: r.bits_per_weight)
        axes.plot(
            [r.bits_per_weight for r in plain],
            [rise(r) for r in plain],
            label=method,
            linewidth=1,
            markersize=5,
            **style,
        )
        for r in others:
            axes.plot(r.bits_per_weight, rise(r), markersize=5, fillstyle="none", **style)
            variant = ", ".join(r.name.split("-")[2:])
            axes.annotate(
                variant,
                (r.bits_per_weight, rise(r)),
                fontsize=6,
                xytext=(4, 3),
                textcoords="offset points",
            )
    axes.set(
        xlabel="bits per weight, scales included",
        ylabel="rise of the validation loss",
        yscale="log",
        title=f"Quantizing {results[0].weights:,} weights (loss {results[0].loss_before:.3f})",
    )
    axes.legend(fontsize=7, ncols=2)
    return axes


def pareto_frontier(results: list[Result]) -> list[Result]:
    """The results that no other is as small as with a lower loss, by size.

    >>> pareto_frontier([])
    []
    """
    frontier: list[Result] = []
    for result in sorted(results, key=lambda r: (r.bits_per_weight, r.loss_after)):
        if not frontier or result.loss_after < frontier[-1].loss_after:
            frontier.append(result)
    return frontier
