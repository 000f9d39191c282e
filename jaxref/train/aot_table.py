"""The table of the configurations for pods, as the command that compiles them reports them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIGS = ("configs/llm_1b.py", "configs/llm_7b.py", "configs/llm_70b.py", "configs/llm_moe.py")
TOPOLOGIES = ("v5e:16x16", "v5p:8x8x8", "v6e:16x16")

_KEEP = "model.remat_policy=dots_with_no_batch_dims_saveable"

OVERRIDES = {
    ("configs/llm_7b.py", "v5e:16x16"): (_KEEP, "accumulate=2"),
    ("configs/llm_7b.py", "v5p:8x8x8"): (_KEEP, "mesh.tensor=2"),
    ("configs/llm_7b.py", "v6e:16x16"): (_KEEP,),
    ("configs/llm_70b.py", "v5e:16x16"): ("accumulate=16",),
    ("configs/llm_70b.py", "v5p:8x8x8"): (_KEEP, "accumulate=4"),
}
"""What a configuration changes on a topology, for the table: where there is memory to spare, layers
are not computed again."""

MARKERS = "<!-- ahead of time: begin -->", "<!-- ahead of time: end -->"


def table(path: Path) -> None:
    """Compiles every configuration for every topology and writes what came out into a file, between
    the two lines of `MARKERS`.

    Args:
      path: the file, such as BUILD.md; nothing is written before all has been compiled.

    Raises:
      ValueError: a file without these lines.
      RuntimeError: a configuration that cannot be compiled.
    """
    text = path.read_text("utf-8")
    before, found, rest = text.partition(MARKERS[0])
    _, ends, after = rest.partition(MARKERS[1])
    if not (found and ends):
        raise ValueError(f"--table: {path} has no lines {MARKERS[0]} and {MARKERS[1]}")
    rows = [
        "| configuration | parameters | topology | mesh | sequences | memory of a chip | compiled "
        "/ model FLOPs | sent by a chip | step, bound | step, sum | utilisation |",
        "|---|--:|---|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    changes = []
    for config in CONFIGS:
        for topology in TOPOLOGIES:
            overrides = OVERRIDES.get((config, topology), ())
            arguments = [f"--topology={topology}", f"--config={config}"]
            arguments += [f"--config.{change}" for change in overrides]
            print(*arguments, file=sys.stderr, flush=True)
            run = subprocess.run(  # one at a time: the compiler takes gigabytes and keeps them
                [sys.executable, "-m", "jaxref.train.aot", *arguments, "--json"],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if not run.stdout:
                raise RuntimeError(f"{' '.join(arguments)} failed")
            rows.append(_row(json.loads(run.stdout)))
            if overrides:
                changes.append(f"`{' '.join(arguments)}`")
    if changes:
        rows += ["", "Rows that change their configuration: " + ", ".join(changes) + "."]
    path.write_text("\n".join([before + MARKERS[0], "", *rows, "", MARKERS[1] + after]), "utf-8")


def _row(given: dict[str, Any]) -> str:
    memory, work, times = given["memory"], given["work"], given["estimate"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in given["mesh"].items() if n > 1)
    batch = f"{given['batch_size']}"
    if given["accumulate"] > 1:
        batch += f" in {given['accumulate']}"
    total = sum(value for kind, value in memory.items() if kind != "capacity")
    cells = [
        Path(given["config"]).stem,
        in_words(given["parameters"]),
        given["topology"],
        mesh,
        batch,
        f"{total / 2**30:.1f} of {memory['capacity'] / 2**30:g} GiB",
    ]
    if work is None:
        return "| " + " | ".join([*cells, "", "does not fit", "", "", ""]) + " |"
    sizes = {"+".join(one["axes"]): sum(one["kinds"].values()) for one in work["sent"]}
    sent = ", ".join(
        f"{axes} {size / 1e9:.{0 if size > 1e11 else 1}f} GB"
        for axes, size in sizes.items()
        if size > 0.01 * sum(sizes.values())
    )
    cells += [
        f"{work['flops'] / work['model_flops']:.2f}",
        sent,
        f"{times['bound']:.2f} s, {times['bound_by']}",
        f"{times['total']:.2f} s",
        f"{times['utilisation'][1]:.0%} to {times['utilisation'][0]:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def in_words(number: float) -> str:
    """A number in three digits and a word.

    Args:
      number: at least 0.

    Returns:
      With "million", "billion" or "trillion" from 1e6 on; below that, all digits.

    >>> in_words(70_553_706_496), in_words(812)
    ('70.6 billion', '812')
    """
    for unit, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"
