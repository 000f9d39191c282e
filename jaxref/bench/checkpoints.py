"""What saving checkpoints costs a training: time blocked, and all in all.

The main job's training step, in rounds of as many steps as lie between two checkpoints: one round
saves at its start and waits at its end for what is still unwritten, the next does not save. How
long `save` keeps the training is a share of the round; the rest of the difference is what the
writing takes away from the steps beside it, where they share a processor. Seconds of processor time
are of all threads: their ratio stands on a busy machine, too.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np

from jaxref.bench.harness import Measurement, interleave, progress, ratios
from jaxref.bench.train_step import Runner
from jaxref.train.checkpoints import Checkpoints
from jaxref.train.config import load_config
from jaxref.train.program import build

NAME = "checkpoints"
VOCABULARY = 256


def run(
    *, quick: bool = False, features: int = 192, every: int = 150, repeats: int = 5
) -> Iterator[Measurement]:
    """`repeats` rounds of either kind, of `every` steps each, with a model of `features` features,
    a multiple of 64, on which the size of the state depends."""
    small = ["model.num_layers=1", "batch_size=8", "length=16"] if quick else []
    if quick:
        features, every, repeats = 64, 3, 2
    config = load_config(
        overrides=[
            f"model.features={features}",
            f"model.num_heads={features // 64}",
            f"model.mlp_features={features * 8 // 3}",
            *small,
        ]
    )
    progress(f"compiling a model of {features} features")
    program = build(config, VOCABULARY)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.length + 1)
    tokens = rng.integers(0, VOCABULARY, shape, np.int32)
    batch = program.put({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
    runner = Runner(program.step, program.init(jax.random.key(0)), batch)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state.params))
    size += sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state.opt_state))

    blocked: list[float] = []
    processor: dict[str, list[float]] = {"with saves": [], "without": []}
    numbers = itertools.count(1)
    with (
        tempfile.TemporaryDirectory() as directory,
        Checkpoints(directory, keep=1) as checkpoints,
    ):

        def with_saves() -> None:
            before = time.process_time()
            start = time.perf_counter()
            checkpoints.save(next(numbers), runner.state, config=config.to_dict())
            blocked.append(time.perf_counter() - start)
            runner(every)
            checkpoints.wait()
            processor["with saves"].append(time.process_time() - before)

        def without() -> None:
            before = time.process_time()
            runner(every)
            processor["without"].append(time.process_time() - before)

        warmup = 1
        functions = {"with saves": with_saves, "without": without}
        seconds = interleave(functions, repeats=repeats, warmup=warmup)

    case = f"state={size / 2**20:.1f}MiB every={every}"
    blocked, alone = blocked[warmup:], seconds["without"]
    yield Measurement(NAME, case, "without", "seconds", statistics.median(alone) / every)
    yield Measurement(
        NAME,
        case,
        "with saves",
        "seconds",
        statistics.median(seconds["with saves"]) / every,
        "without",
        ratios(seconds, "with saves", "without"),
    )
    yield Measurement(
        NAME,
        case,
        "with saves",
        "blocked seconds",
        statistics.median(blocked),
        "without",
        statistics.median(b / whole for b, whole in zip(blocked, alone)),
    )
    processor = {name: values[warmup:] for name, values in processor.items()}
    yield Measurement(
        NAME,
        case,
        "with saves",
        "processor seconds",
        statistics.median(processor["with saves"]) / every,
        "without",
        ratios(processor, "with saves", "without"),
    )
