"""`--mode=quantize`: a trained model in few bits, written beside its run and compared with it."""

import csv
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils.epath import Path
from flax import nnx
from jax import Array
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxref.core.checks import check_interval
from jaxref.models import generate
from jaxref.nn.calibration import called_linears, collect_hessians, collect_inputs
from jaxref.nn.quantized_linear import QuantizedLinear, quantize_linears
from jaxref.parallel import use_rules
from jaxref.train.config import ConfigError
from jaxref.train.data import Corpus
from jaxref.train.loop import (
    Data,
    Validation,
    build_program,
    load,
    prompt_tokens,
    restore,
    training_batches,
)
from jaxref.train.program import Batch, Program, TrainState
from jaxref.train.quantized import (
    directory,
    replicated,
    run_quantized,
    save_quantized,
    unstacked,
)
from jaxref.train.quantizers import Layer, quantizer
from jaxref.train.records import write_json_atomic, write_text_atomic

_SPEED_RUNS = 3  # of both models in turn; the quickest of each counts


class Result(NamedTuple):
    """What quantization did to a model.

    Attributes:
      name: of the quantized model, a directory under `quantized/`.
      step: of the training, after which it was quantized.
      matrices, weights: how many were quantized, and the numbers in them.
      bits_per_weight: that one of them takes in memory, with its share of scales and of whatever
        else belongs to a matrix.
      share_of_float32: the memory of these matrices as a share of that in float32.
      bytes_on_disk: of all arrays of the quantized model.
      loss_before, loss_after: validation loss in nats.
      speed_before, speed_after: in `speed_unit`, measured in turn.
      speed_unit: tokens generated, one sequence at a time, or read by a model that cannot; or
        images classified, or windows forecast.
      seconds: to calibrate and to quantize.
    """

    name: str
    step: int
    matrices: int
    weights: int
    bits_per_weight: float
    share_of_float32: float
    bytes_on_disk: int
    loss_before: float
    loss_after: float
    speed_before: float
    speed_after: float
    speed_unit: str
    seconds: float


def quantize(config: ConfigDict, workdir: Path) -> None:
    """Quantizes the model of a working directory's newest checkpoint, and prints what that did.

    The model is written to `quantized/NAME/`, where `--mode=eval` and `--mode=sample` find it by
    the same configuration; the numbers beside it to `result.json`, and those of all quantized
    models of the directory to `quantized/table.csv`. A process that is killed leaves the model that
    was there before, or the new one.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      workdir: the working directory of the run.

    Raises:
      ConfigError: no method, or one that does not exist, or options that it does not read.
      CheckpointError: there is no checkpoint that can be read, or the model cannot be written.
    """
    if not config.quantize.method:
        raise ConfigError("--mode=quantize needs a method: --config.quantize.method=gptq, say")
    path = directory(workdir, config.quantize)
    data = load(config)
    program = build_program(config, data)
    state, step = restore(config, data, program, workdir)
    loss_before = Validation(config, data, program).loss(state)

    start = time.perf_counter()
    params = state.params if state.average is None else state.average
    model = quantized_model(config, data, program, program.model(params, state.model_state))
    seconds = time.perf_counter() - start
    (path / "result.json").unlink(missing_ok=True)  # what it says of the model ends here
    size = save_quantized(path, model, step=step, config=config)
    print(f"Quantized model: {path}", flush=True)

    after_program, after = run_quantized(program, model, step)
    loss_after = Validation(config, data, after_program).loss(after)
    speed_before, speed_after = _speeds(
        _timed_run(config, data, program, state), _timed_run(config, data, after_program, after)
    )
    linears = [m for _, m in nnx.iter_modules(model) if isinstance(m, QuantizedLinear)]
    weights = sum(math.prod(m.in_features + m.out_features) for m in linears)
    stored = sum(m.nbytes for m in linears)
    result = Result(
        name=path.name,
        step=step,
        matrices=len(linears),
        weights=weights,
        bits_per_weight=8 * stored / weights,
        share_of_float32=stored / (4 * weights),
        bytes_on_disk=size,
        loss_before=loss_before,
        loss_after=loss_after,
        speed_before=speed_before,
        speed_after=speed_after,
        speed_unit=data.per_step(config)[1].replace("_per_second", "/s"),
        seconds=seconds,
    )
    if jax.process_index() == 0:
        write_json_atomic(path / "result.json", result._asdict())
        results = read_results(workdir)
        write_text_atomic(workdir / "quantized" / "table.csv", _csv(results))
        print(table([other for other in results if other.step == step]))


def quantized_model(config: ConfigDict, data: Data, program: Program, model: Any) -> Any:
    """The model with its linear layers quantized by the method of the configuration.

    Those are quantized that the model calls: not embeddings and the matrix that makes logits, which
    the loss reads. Methods that have to know the inputs are given training data, block after block:
    the inputs of each are those in the model whose blocks before it are quantized.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      data: of which the training batches calibrate.
      program: the run's.
      model: the model with its parameters, in evaluation.

    Returns:
      The model, with `QuantizedLinear`s and single blocks, its arrays on all devices.

    Raises:
      ConfigError: no such method, or options that it does not read, or a model without linear
        layers to quantize.
      ValueError: a number out of range.
    """
    method, options = quantizer(config.quantize)
    check_interval(
        1,
        np.inf,
        calibration_batches=options.calibration_batches,
        calibration_rows=options.calibration_rows,
    )
    graphdef, state = nnx.split(unstacked(model))
    model = nnx.merge(graphdef, jax.device_put(state, replicated(program)))

    def call(model: Any, batch: Batch) -> Array:
        with use_rules(program.mesh, program.rules):
            run = getattr(model, "hidden", model)
            return run(batch["inputs"])

    def batches(name: str) -> Iterator[Batch]:
        """The first of the training, the same ones every time."""
        bar.set_postfix_str(f"calibrating {name}", refresh=False)
        end = bar.n + options.calibration_batches
        first = itertools.islice(
            training_batches(config, data, program.rows), options.calibration_batches
        )
        try:
            for batch in first:
                yield program.put({"inputs": batch["inputs"]})
                bar.update()
        finally:  # also where not all of them were needed
            bar.update(end - bar.n)

    def gather(model: Any, name: str, members: list[str]) -> dict[str, Any]:
        """What the method needs to know of the inputs of some layers, by path."""
        if method.needs is None:
            return {}
        collect: Any = (
            collect_hessians
            if method.needs == "moments"
            else partial(collect_inputs, rows=options.calibration_rows)
        )
        return collect(model, batches(name), call=call, select=partial(_is_one_of, members))

    def quantize_kernel(known: dict[str, Any], path: str, kernel: Array) -> Any:
        bar.set_postfix_str(f"quantizing {path}", refresh=False)
        layer = Layer(kernel, jax.random.fold_in(jax.random.key(config.seed), paths.index(path)))
        if method.needs == "moments":
            layer = layer._replace(moments=known[path])
        elif method.needs == "inputs":
            layer = layer._replace(inputs=known[path], targets=originals[path] @ kernel)
        weight = jax.block_until_ready(method.quantize(layer, options))
        bar.update()
        return weight

    paths = called_linears(model, next(training_batches(config, data, program.rows)), call=call)
    if not paths:
        raise ConfigError(f"model.name={config.model.name} calls no linear layers to quantize")
    groups = blocks(paths)
    passes = {None: 0, "moments": len(groups), "inputs": len(groups) + 1}[method.needs]
    with _progress_bar(passes * options.calibration_batches + len(paths)) as bar:
        originals: dict[str, Array] = {}
        if method.needs == "inputs":
            originals = gather(model, "the model as it is", paths)
        for name, members in groups.items():
            end = bar.n + len(members)
            model = quantize_linears(
                model,
                partial(quantize_kernel, gather(model, name, members)),
                select=partial(_is_one_of, members),
                low_rank=options.low_rank,
                activations=method.activations,
                threshold=options.threshold,
                max_outliers=options.max_outliers or None,
            )
            bar.update(end - bar.n)  # for those that have a quantized kernel of their own
    return model


def _is_one_of(members: list[str], path: str, _: nnx.Module) -> bool:
    return path in members


def blocks(paths: list[str]) -> dict[str, list[str]]:
    """Layers in groups, to be calibrated together: by their paths up to the first number.

    Args:
      paths: dotted paths of layers, in the order in which they are called.

    Returns:
      For each group its members, in their order.

    >>> blocks(["patches", "blocks.0.up", "blocks.0.down", "blocks.1.up"])
    {'patches': ['patches'], 'blocks.0': ['blocks.0.up', 'blocks.0.down'], ...}
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        keys = path.split(".")
        end = next((i for i, key in enumerate(keys) if key.isdigit()), 0) + 1
        groups.setdefault(".".join(keys[:end]), []).append(path)
    return groups


def read_results(workdir: Path) -> list[Result]:
    """The results of all quantized models of a working directory, by name.

    Args:
      workdir: the working directory of the run.

    Returns:
      A `Result` for each; none where nothing was quantized.
    """
    paths = sorted((workdir / "quantized").glob("*/result.json"))
    return [Result(**json.loads(path.read_text())) for path in paths]


def table(results: list[Result]) -> str:
    """The results as a table, a line each.

    Args:
      results: its lines, in their order.

    Returns:
      Lines of text, with a header.
    """
    header = ("", "bits/weight", "of float32", "on disk", "validation loss", "change", "")
    rows = [
        (
            r.name,
            f"{r.bits_per_weight:.2f}",
            f"{r.share_of_float32:.1%}",
            f"{r.bytes_on_disk:,}",
            f"{r.loss_before:.4f} -> {r.loss_after:.4f}",
            f"{r.loss_after / r.loss_before - 1:+.2%}",
            f"{r.speed_before:,.0f} -> {r.speed_after:,.0f}",
        )
        for r in results
    ]
    header = (*header[:-1], results[0].speed_unit if results else "")
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in (header, *rows)
    )


def _csv(results: list[Result]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Result._fields)
    writer.writerows(results)
    return text.getvalue()


def _speeds(*runs: Callable[[], float]) -> list[float]:
    """The best of some runs of each, taken in turn, after one that compiles."""
    for run in runs:
        run()
    return [max(each) for each in zip(*([run() for run in runs] for _ in range(_SPEED_RUNS)))]


def _timed_run(
    config: ConfigDict, data: Data, program: Program, state: TrainState
) -> Callable[[], float]:
    """A function that runs the model once, and gives what it does a second: tokens that it writes,
    or where it cannot, examples of the held-out data that it is evaluated on."""
    params = state.params if state.average is None else state.average
    if isinstance(data, Corpus) and program.objective.generates:
        model, window = program.model(params, state.model_state), config.length
        prompt = prompt_tokens(config, data)[: max(window // 2, 1)]
        padded = np.zeros((1, window), np.int32)
        padded[0, : prompt.size] = prompt
        count = window + 1 - prompt.size

        def once() -> Any:
            return generate(
                model,
                padded,
                np.array([prompt.size]),
                num_tokens=count,
                cache=config.sample.cache,
                key=jax.random.key(config.sample.seed),
            )

    else:
        held_out = data.held_out(config)[0][0]
        batch = program.put({name: array[program.rows] for name, array in held_out.items()})
        count, _ = data.per_step(config)

        def once() -> Any:
            return program.evaluate(params, batch, state.model_state)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(once())
        return count / (time.perf_counter() - start)

    return run


def _progress_bar(steps: int) -> tqdm:
    return tqdm(
        total=steps,
        disable=jax.process_index() != 0,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        bar_format="{percentage:3.0f}%|{bar}| step {n}/{total} [{elapsed}<{remaining}{postfix}]",
    )
