"""Kills a training at random moments, starts it again, and compares it with one left alone.

Both are `python -m jaxref.train` in processes of their own, on the standard library. A process is
killed (SIGKILL) some moments after a step that is drawn, which may be while it saves, and one of
four while it starts and restores. In the end every array of the last checkpoint is compared bit for
bit, and every record of `metrics.jsonl` but for its times.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxref.bench.harness import Measurement, progress
from jaxref.train.config import load_config
from jaxref.train.loop import build_program, load, restore
from jaxref.train.records import read_metrics

NAME = "interruptions"


def run(
    *, quick: bool = False, kills: int = 20, steps: int = 400, every: int = 20, seed: int = 0
) -> Iterator[Measurement]:
    """A run of `steps` steps with a checkpoint `every` so many, killed `kills` times if it does not
    end before."""
    size = {"num_layers": 2, "features": 128, "num_heads": 2, "mlp_features": 256}
    if quick:
        kills, steps, every = 1, 12, 4
        size = {"num_layers": 1, "features": 16, "num_heads": 2, "mlp_features": 32}
    overrides = [
        f"steps={steps}",
        f"checkpoint_every={every}",
        f"validate_every={steps}",
        "log_every=1",
        "length=64",
        "validation_tokens=4096",
        "sample.length=20",
        *(f"model.{name}={value}" for name, value in size.items()),
    ]
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        alone, killed = (os.path.join(directory, name) for name in ("alone", "killed"))
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": os.path.join(directory, "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        start = time.monotonic()
        progress(f"{steps} steps without interruption")
        process = launch(alone, overrides, environment)
        wait_for(process, alone, 1)
        startup = time.monotonic() - start
        finish(process)
        lost: list[int] = []
        for number, moment in enumerate(sorted(draw.choices(range(1, steps), k=kills)), 1):
            process = launch(killed, overrides, environment)
            if draw.random() < 0.25:
                time.sleep(draw.uniform(0, startup))
            else:
                wait_for(process, killed, moment)
                time.sleep(draw.uniform(0, 0.3))
            process.kill()
            process.communicate()
            if process.returncode != -signal.SIGKILL:
                break
            reached, saved = last_step(killed), newest_checkpoint(killed)
            lost.append(reached - saved)
            elapsed = time.monotonic() - start
            progress(f"[{elapsed:.0f} s] kill {number} at step {reached}, {saved} are saved")
        finish(launch(killed, overrides, environment))

        config = load_config(overrides=overrides)
        data = load(config)
        program = build_program(config, data)
        states = [restore(config, data, program, Path(workdir)) for workdir in (alone, killed)]
        records = [read_metrics(workdir) for workdir in (alone, killed)]
    arrays = list(zip(*(map(bits, jax.tree.leaves(state)) for state, _ in states)))
    timeless = [[without_times(row) for row in rows] for rows in records]
    case = f"steps={steps} every={every} seed={seed}"
    for metric, value in (
        ("kills", len(lost)),
        ("most steps lost", max(lost, default=0)),
        ("last step", states[1][1]),
        ("arrays", len(arrays)),
        ("arrays that differ", sum(a != b for a, b in arrays)),
        ("records", len(timeless[1])),
        ("records that differ", differences(*timeless)),
    ):
        yield Measurement(NAME, case, "killed", metric, float(value))


def launch(
    workdir: str, overrides: Sequence[str], environment: dict[str, str]
) -> subprocess.Popen[str]:
    """Starts the training in a working directory."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "jaxref.train", f"--workdir={workdir}"),
            *(f"--config.{override}" for override in overrides),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], workdir: str, step: int) -> None:
    """Waits until a step is recorded, or the process has ended."""
    while last_step(workdir) < step and process.poll() is None:
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for the end of the training.

    Raises:
      RuntimeError: the training failed.
    """
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the training failed: {error}")


def last_step(workdir: str) -> int:
    """The last step that is recorded, 0 where none is."""
    rows = read_metrics(workdir)
    return rows[-1]["step"] if rows else 0


def newest_checkpoint(workdir: str) -> int:
    """The step of the newest complete checkpoint, 0 where there is none."""
    names = (path.name for path in Path(workdir, "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def bits(leaf: Any) -> bytes:
    """All of an array, a random key's included."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """What a record says that does not depend on the machine's speed."""
    return {name: v for name, v in row.items() if not name.endswith(("_seconds", "_per_second"))}


def differences(alone: Sequence[Any], killed: Sequence[Any]) -> int:
    """How many records are not the same, those that one has more included."""
    return sum(a != b for a, b in zip(alone, killed)) + abs(len(alone) - len(killed))
