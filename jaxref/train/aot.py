"""Compiles the training step for a pod that is not here, and reports what it needs and how long it
takes at the chip's published peaks.

The step is the one that `python -m jaxref.train` runs with the same configuration, compiled by the
TPU's own compiler (the extra `tpu-aot`); no data is read, so `data.vocab_size` says how many token
ids there are. The exit status is 1 where the step does not fit the chip's memory.

  python -m jaxref.train.aot --topology=v5p:8x8x8 --config=configs/llm_70b.py
  python -m jaxref.train.aot --topology=v5e:16x16 --slices=4 --config=configs/llm_7b.py --scaling
  python -m jaxref.train.aot --table=BUILD.md
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxref.core.host import prepare_host
from jaxref.train.aot_table import in_words, table


class Memory(NamedTuple):
    """Bytes on one chip.

    Attributes:
      parameters, optimizer, rest, batch: of the step's arguments, `rest` being what else the state
        has, and what padding adds to all of them.
      temporaries: what the step needs besides, code included.
      capacity: of the chip.
    """

    parameters: int
    optimizer: int
    rest: int
    batch: int
    temporaries: int
    capacity: int

    @property
    def total(self) -> int:
        """All that is needed."""
        return sum(self[:-1])


class Report(NamedTuple):
    """What was compiled, and what came out.

    Attributes:
      topology, slices, config: of the command line.
      mesh: sizes of the axes.
      parameters: of the model; `active` are those that a token is multiplied with.
      batch_size, length, accumulate: of the configuration.
      memory: on a chip.
      work: of a chip; None where the compiler gave up for want of memory.
      uncounted: kernels whose operations `work` lacks, and how often they run.
      seconds: to compile.
    """

    topology: str
    slices: int
    config: str
    mesh: dict[str, int]
    parameters: int
    active: float
    batch_size: int
    length: int
    accumulate: int
    memory: Memory
    work: Any
    uncounted: dict[str, int]
    seconds: float


def compile_step(config: ConfigDict, pod: Any, name: str = "") -> Report:
    """Compiles the training step of a configuration for a pod.

    Args:
      config: the whole configuration; of its data, `data.vocab_size` alone is read.
      pod: the devices to compile for, from `jaxref.train.chips.describe_pod`.
      name: what the report calls the configuration. Default: nothing.

    Returns:
      The `Report`; without `work` where the step does not fit the memory of a chip.

    Raises:
      ConfigError, ValueError: a configuration that cannot be run, or not on so many devices.
    """
    import jax
    import numpy as np

    from jaxref.parallel.compiled import (
        collectives,
        flops,
        memory_traffic,
        sent_by_axes,
        uncounted_kernels,
    )
    from jaxref.train.chips import bandwidth
    from jaxref.train.config import ConfigError
    from jaxref.train.program import build
    from jaxref.train.roofline import Sent, Work, active_parameters, model_flops

    if config.data.name.partition(":")[0] not in ("python_stdlib", "text", "tokens"):
        raise ConfigError(
            f"data.name={config.data.name} is no text; ahead of time, language models are "
            "compiled: choose data.name=tokens:FILE and data.vocab_size"
        )
    program = build(config, config.data.vocab_size, devices=pod.devices)
    state, batch = program.abstract_state, program.abstract_batch

    def on_a_chip(tree: Any, itemsize: int | None = None) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
            for x in jax.tree.leaves(tree)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
        )

    held = Memory(
        parameters=on_a_chip(state.params),
        optimizer=on_a_chip(state.opt_state),
        rest=on_a_chip(state._replace(params={}, opt_state=())),
        batch=on_a_chip(batch),
        temporaries=0,
        capacity=pod.chip.hbm_bytes,
    )
    tokens = config.batch_size * config.length
    active = active_parameters(config, state.params)
    start = time.monotonic()
    work, uncounted = None, {}
    try:
        compiled, text = _compiled(program.step, state, batch)
    except jax.errors.JaxRuntimeError as error:
        needed = _bytes_in(str(error))
        if needed is None:
            raise
        memory = held._replace(temporaries=max(0, needed - held.total))
    else:
        analysis: Any = compiled.memory_analysis()
        memory = held._replace(
            rest=held.rest + max(0, analysis.argument_size_in_bytes - held.total),
            temporaries=analysis.temp_size_in_bytes
            + analysis.generated_code_size_in_bytes
            + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        )
        mesh = program.mesh
        uncounted = uncounted_kernels(text)
        work = Work(
            chips=len(pod.devices),
            flops=flops(text),
            model_flops=model_flops(config, active, tokens) / len(pod.devices),
            traffic=memory_traffic(text),
            state_bytes=held.parameters + held.optimizer,
            gradient_bytes=on_a_chip(state.params, jax.numpy.dtype(config.dtype).itemsize),
            sent=[
                Sent(
                    axes,
                    int(np.prod([mesh.shape[axis] for axis in axes])),
                    kinds,
                    bandwidth(pod, mesh, axes),
                )
                for axes, kinds in sent_by_axes(collectives(text, mesh)).items()
            ],
            tokens=tokens,
            rows=on_a_chip(batch["ids"], itemsize=1),
            accumulate=config.accumulate,
        )
    return Report(
        topology=pod.name,
        slices=pod.slices,
        config=name,
        mesh=dict(program.mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        active=active,
        batch_size=config.batch_size,
        length=config.length,
        accumulate=config.accumulate,
        memory=memory,
        work=work,
        uncounted=uncounted,
        seconds=time.monotonic() - start,
    )


def _compiled(step: Any, *arguments: Any) -> tuple[Any, str]:
    """A jitted function compiled for abstract arguments, and its optimised HLO. The compiler writes
    that itself: jax cannot read back what a newer compiler makes."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = step.lower(*arguments).compile(compiler_options=options)
        written = Path(folder).glob("*.after_optimizations.txt")
        return compiled, max(written, key=lambda path: path.stat().st_size).read_text("utf-8")


def _bytes_in(message: str) -> int | None:
    """What a step needs, from the compiler's error that it has not so much."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    return int(float(found[1]) * 2 ** (10 * " KMGT".index(found[2])))


def advice(report: Report, config: ConfigDict) -> list[str]:
    """What would make a step fit, from what it needs; the most promising first.

    Args:
      report: of a step that does not fit.
      config: the configuration that was compiled.

    Returns:
      Lines of text with the flags to set.
    """
    memory, mesh, model = report.memory, report.mesh, config.model
    held = memory.parameters + memory.optimizer + memory.rest
    chips, sharded = math.prod(mesh.values()), math.prod(mesh.values()) // mesh["data"]
    lines = []
    if held > memory.capacity / 2:
        if mesh["data"] > 1:
            lines.append(
                f"parameters and optimizer state take {_size(held)} a chip: shard them further, by "
                f"--config.mesh.data=1 --config.mesh.fsdp={mesh['fsdp'] * mesh['data']}"
            )
        else:
            least = math.ceil(held * sharded / (memory.capacity / 2))
            lines.append(
                f"parameters and optimizer state take {_size(held)} a chip, sharded over all "
                f"{chips}: this model wants at least {least} chips of {_size(memory.capacity)}"
            )
    room = max(memory.capacity - held, memory.capacity // 8)
    lines.append(
        f"temporaries take {_size(memory.temporaries)}, and {_size(room)} are left for them:"
    )
    rows = config.batch_size // (
        config.accumulate * mesh["data"] * mesh["fsdp"] * mesh.get("expert", 1)
    )
    if not model.remat:
        lines.append("recompute the layers in the backward pass, by --config.model.remat=True")
    elif model.get("remat_policy", "nothing_saveable") != "nothing_saveable":
        lines.append("keep less, by --config.model.remat_policy=nothing_saveable")
    if rows > 1:
        factor = min(rows, 2 ** math.ceil(math.log2(max(2, memory.temporaries / room))))
        while rows % factor:
            factor -= 1
        lines.append(
            f"a chip computes {rows} sequences at once: accumulate more, by "
            f"--config.accumulate={config.accumulate * factor}"
        )
    else:
        lines.append(
            "a chip computes one sequence at once: split it over more chips, by "
            f"--config.mesh.tensor={2 * mesh['tensor']} or --config.mesh.sequence="
            f"{2 * mesh.get('sequence', 1)}, with as much less of mesh.fsdp"
        )
    if config.loss.name != "linear_softmax_cross_entropy":
        lines.append("never write the logits, by --config.loss.name=linear_softmax_cross_entropy")
    return lines


def describe(report: Report, pod: Any) -> str:
    """The report as it is printed.

    Args:
      report: from `compile_step`.
      pod: what it was compiled for.

    Returns:
      Lines of text: the mesh, the memory of a chip and, where the step fits, its work and its
      times.
    """
    from jaxref.train.roofline import estimate

    mesh = " x ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1) or "1 chip"
    chips = math.prod(report.mesh.values())
    slices = f", {report.slices} slices" if report.slices > 1 else ""
    tokens = report.batch_size * report.length
    micro = f" in {report.accumulate} micro-batches" if report.accumulate > 1 else ""
    lines = [
        f"{report.config} on {report.topology} ({chips} chips{slices}), "
        f"compiled in {report.seconds:.0f} s",
        "",
        f"Mesh        {mesh}",
        f"Parameters  {in_words(report.parameters)}, of which {in_words(report.active)} multiply "
        "each token",
        f"Batch       {report.batch_size} sequences of {report.length} tokens{micro}: "
        f"{in_words(tokens)} tokens a step",
        "",
        "Memory of a chip",
    ]
    memory = report.memory
    for kind, size in zip(memory._fields, memory[:-1]):
        lines.append(f"  {kind:<12}{size / 2**30:8.2f} GiB")
    share = memory.total / memory.capacity
    lines.append(
        f"  {'total':<12}{memory.total / 2**30:8.2f} GiB of {memory.capacity / 2**30:g} GiB, "
        f"{share:.0%}"
    )
    work = report.work
    if work is None:
        return "\n".join(lines)
    lines += [
        "",
        "Work of a chip in a step",
        f"  operations  {work.flops / 1e12:10.2f} TFLOP in the compiled matrix products",
        f"              {work.model_flops / 1e12:10.2f} TFLOP by 6 · parameters · tokens + "
        "attention",
        f"              {work.flops / work.model_flops:10.2f} ratio",
    ]
    if report.uncounted:
        names = ", ".join(f"{name} ({n} times)" for name, n in report.uncounted.items())
        lines.append(f"              without kernels that declare no cost: {names}")
    lines.append(f"  memory      {work.traffic / 1e9:10.1f} GB read and written")
    for sent in work.sent:
        kinds = ", ".join(f"{kind} {value / 1e9:.3g}" for kind, value in sent.kinds.items())
        total = sum(sent.kinds.values()) / 1e9
        lines.append(f"  sent        {total:10.3f} GB along {'+'.join(sent.axes)}: {kinds}")
    times = estimate(work, pod)
    lines += ["", "Time of a step at the published peaks"]
    bandwidths = {"+".join(sent.axes): sent.bandwidth for sent in work.sent}
    for name, seconds in times.seconds.items():
        rate = f" at {bandwidths[name] / 1e9:g} GB/s" if name in bandwidths else ""
        lines.append(f"  {name:<24}{seconds * 1e3:10.1f} ms{rate}")
    for text, i, seconds in (
        (f"all at once: {times.bound_by}", 0, times.bound),
        ("one after the other", 1, times.total),
    ):
        lines.append(
            f"  {text:<24}{seconds * 1e3:10.1f} ms: "
            f"{in_words(times.tokens_per_second[i])} tokens/s, "
            f"{times.utilisation[i]:.1%} model-FLOPs utilisation"
        )
    return "\n".join(lines)


def describe_scaling(report: Report, pod: Any) -> str:
    """How step time and utilisation go on with more chips, and where they are bound by something
    other than computing.

    Args:
      report: of a step that fits.
      pod: what it was compiled for.

    Returns:
      Two tables, of weak and of strong scaling, to up to 128 times the chips; without a mesh axis
      fsdp above 1 a line that says so.
    """
    from jaxref.train.roofline import estimate, scaled

    if report.mesh["fsdp"] == 1:
        return "\nMore chips would come by a larger mesh.fsdp, which is 1: --scaling needs it."
    lines = []
    for weak, title in ((True, "the batch grows with the chips"), (False, "the same batch")):
        lines += [
            "",
            f"{'Weak' if weak else 'Strong'} scaling: {title}",
            "   chips  sequences   all at once  utilisation  one by one  utilisation  bound by",
        ]
        computes = 0
        bound_by = ""
        for factor in (2**i for i in range(8)):
            work = scaled(report.work, pod, factor, weak=weak)
            if work is None:
                break
            times = estimate(work, pod)
            overlapped, apart = times.utilisation
            lines.append(
                f"{work.chips:8}{round(work.tokens / report.length):11}"
                f"{times.bound * 1e3:11.1f} ms{overlapped:13.1%}"
                f"{times.total * 1e3:9.1f} ms{apart:13.1%}  {times.bound_by}"
            )
            if times.bound_by == "compute" and not bound_by:
                computes = work.chips
            elif times.bound_by != "compute":
                bound_by = bound_by or times.bound_by
        if not bound_by:
            lines.append(f"Bound by computing up to {computes} chips, as far as this goes.")
        elif computes:
            lines.append(f"Bound by computing up to {computes} chips, beyond by {bound_by}.")
        else:
            lines.append(f"Never bound by computing, but by {bound_by}.")
    return "\n".join(lines)


def _fields(value: Any) -> Any:
    """NamedTuples as dictionaries, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: _fields(below) for name, below in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _fields(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_fields(below) for below in value]
    return value


def _size(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def main(argv: list[str]) -> int:
    """Does what the command line asks for, and returns the exit status.

    Args:
      argv: the program's name and the command line.

    Returns:
      0, or 1 where the step does not fit.

    Raises:
      ConfigError, ValueError, RuntimeError: as `compile_step`, `describe_pod` or `table`.
    """
    from jaxref.train.__main__ import split_overrides

    arguments, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(
        prog="python -m jaxref.train.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", default="v5e:16x16", help="v5e:16x16, v5p:8x8x8, ...")
    parser.add_argument("--slices", type=int, default=1, help="how many of them a network joins")
    parser.add_argument("--config", help="as of python -m jaxref.train; also --config.KEY=VALUE")
    parser.add_argument("--scaling", action="store_true", help="extrapolate to more chips")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of all configs")
    options = parser.parse_args(arguments[1:])
    if options.table:
        table(options.table)
        return 0

    from jaxref.train.chips import describe_pod
    from jaxref.train.config import load_config
    from jaxref.train.roofline import estimate

    config = load_config(options.config, overrides)
    pod = describe_pod(options.topology, options.slices)
    report = compile_step(config, pod, options.config or "configs/default.py")
    if options.json:
        times = None if report.work is None else estimate(report.work, pod)
        print(json.dumps({**_fields(report), "estimate": _fields(times)}))
    else:
        print(describe(report, pod))
        if options.scaling and report.work is not None:
            print(describe_scaling(report, pod))
    if report.work is None:
        print(f"\nThis does not fit {options.topology}.", file=sys.stderr)
        print(*(f"  {line}" for line in advice(report, config)), sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU that is here has nothing to do
    prepare_host()
    try:
        sys.exit(main(sys.argv))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
