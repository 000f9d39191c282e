"""What a run measures besides its loss: where its time goes, what it gets out of its chips, and
traces of single steps."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils.epath import Path
from ml_collections import ConfigDict

from jaxref.train.chips import CHIPS
from jaxref.train.config import ConfigError
from jaxref.train.places import copy_files, is_remote
from jaxref.train.program import Program, TrainState
from jaxref.train.roofline import active_parameters, model_flops

NO_STEPS = range(0)

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}
"""The chip by the name that jax has for its devices."""


class Stopwatch:
    """Where the seconds go between one record and the next, as the host sees it.

    The devices compute while the host prepares what comes next, so these are not their busy times.
    "input" is how long the host waited for a batch and handed it over, "save" how long a checkpoint
    kept it, and "step" is all the rest: to start steps, and to wait for what comes out. What is
    measured as "aside", validation say, counts nowhere.

    Example:
      >>> watch = Stopwatch()
      >>> with watch.measure("input"):
      ...     time.sleep(0.02)
      >>> with watch.measure("aside"):
      ...     time.sleep(0.5)
      >>> seconds = watch.lap(steps=2)
      >>> list(seconds), 0.01 <= sum(seconds.values()) < 0.2
      (['input_seconds', 'step_seconds', 'save_seconds'], True)
    """

    def __init__(self) -> None:
        self._start_lap()

    def _start_lap(self) -> None:
        self._since = time.perf_counter()
        self._spent = {"input": 0.0, "save": 0.0, "aside": 0.0}

    @contextlib.contextmanager
    def measure(self, kind: str, after: Any = None) -> Iterator[None]:
        """Within this context time is spent on `kind`, which shows in traces, too.

        Args:
          kind: "input", "save" or "aside".
          after: arrays that are waited for first, so that steps under way are not taken for a part
            of it.
        """
        jax.block_until_ready(after)
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(kind):
            yield
        self._spent[kind] += time.perf_counter() - start

    def lap(self, steps: int) -> dict[str, float]:
        """`input_seconds`, `step_seconds` and `save_seconds` a step, the mean since the last lap,
        which was `steps` before. The next one starts."""
        total = time.perf_counter() - self._since - self._spent["aside"]
        seconds = {
            "input": self._spent["input"],
            "step": total - self._spent["input"] - self._spent["save"],
            "save": self._spent["save"],
        }
        self._start_lap()
        return {f"{kind}_seconds": value / steps for kind, value in seconds.items()}


class Trace:
    """A profile of some steps, for XProf and TensorBoard.

    It is written when the steps are over, or the context is left before. The trace has a step
    "train" for each, and in it what `Stopwatch` measures.

    Args:
      directory: where it goes, to `plugins/profile/TIME`.
      steps: the steps, an empty range for no trace.
    """

    def __init__(self, directory: Path, steps: range):
        self._directory = directory
        self._steps = steps
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()

    def turns_before(self, step: int) -> bool:
        """Whether the trace starts or ends just before a step."""
        return len(self._steps) > 0 and step in (self._steps.start, self._steps.stop)

    def turn(self) -> None:
        """Starts or ends the trace."""
        if self._running:
            self._stop()
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would be thousands of events a step
        self._local = self._directory
        if is_remote(self._directory):
            self._temporary = tempfile.TemporaryDirectory(prefix="jaxref-trace-")
            self._local = Path(self._temporary.name)
        jax.profiler.start_trace(str(self._local), profiler_options=options)
        self._running = True

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        if self._local != self._directory:
            copy_files(self._local, self._directory)
            self._temporary.cleanup()


def steps_to_profile(text: str | None, steps: int) -> range:
    """The steps that `--profile=START:STOP` names, both included; none for None.

    Args:
      text: what the flag says.
      steps: of the whole run.

    Returns:
      The steps, a range of which the last is included.

    Raises:
      ConfigError: it is not two whole numbers, of steps of the run, in their order.

    >>> steps_to_profile("20:22", 600)
    range(20, 23)
    """
    if text is None:
        return NO_STEPS
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ConfigError(
            f"--profile must be START:STOP, two numbers of steps such as 20:24, got {text!r}"
        )
    start, stop = int(first), int(last)
    if not 1 <= start <= stop <= steps:
        raise ConfigError(
            f"--profile=START:STOP must have 1 <= START <= STOP <= steps = {steps}, got {text}"
        )
    return range(start, stop + 1)


def seconds_at_peak(
    config: ConfigDict, data: Any, program: Program, state: TrainState
) -> float | None:
    """How long the model's operations of a step would take if all chips computed at their published
    peak, that of bfloat16. A step's model-FLOPs utilisation is the share of its time that this is.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      data: a `Corpus`, an `ImageSet` or a `SeriesSet`.
      program: the run's, for its devices.
      state: the run's, for its sizes.

    Returns:
      The seconds, by `model_flops` of language models; None for other models, and for devices whose
      peak is not known.
    """
    chip = CHIPS.get(DEVICE_KINDS.get(program.mesh.devices.flat[0].device_kind, ""))
    tokens, per_second = data.per_step(config)
    if chip is None or per_second != "tokens_per_second":
        return None
    flops = model_flops(config, active_parameters(config, state.params), tokens)
    return flops / (program.mesh.size / chip.devices * chip.flops)


def facts(
    program: Program, state: TrainState, data: Any, baselines: Mapping[str, float]
) -> dict[str, Any]:
    """What a run is and where it runs, as a report shows it, by name: anything that JSON holds.

    Args:
      program: the run's.
      state: the run's, for its sizes.
      data: a `Corpus`, an `ImageSet` or a `SeriesSet`.
      baselines: losses of what needs no model.

    Returns:
      "parameters", "data", "measure", "baselines", "mesh", "devices", "processes" and "jax".
    """
    devices = program.mesh.devices
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "data": data.summary(),
        "measure": data.measure,
        "baselines": dict(baselines),
        "mesh": dict(program.mesh.shape),
        "devices": f"{devices.size} x {devices.flat[0].device_kind}",
        "processes": jax.process_count(),
        "jax": jax.__version__,
    }
