"""Runs of several processes: how they find each other, agree before they start, and end together.

Every process runs the same program on the same configuration, and reads the rows of each batch that
its own devices hold. Process 0 speaks for all; the others say nothing but what goes wrong.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental.multihost_utils import process_allgather, reached_preemption_sync_point

from jaxref.train import failures
from jaxref.train.config import ConfigError

_ENVIRONMENTS = {
    "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "TPU pod": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
}
"""What each process finds in its environment, by who started it."""

_LOST_CONNECTION = re.compile(
    "gloo|nccl|closed by peer|reset by peer|unavailable|heartbeat|coordination", re.IGNORECASE
)

_heartbeat_timeout = 0


def cluster() -> str | None:
    """The kind of cluster that started this process, as its environment tells; None for none.

    Returns:
      A name such as "Kubernetes" or "TPU pod"; nothing is asked of the cluster.
    """
    for name, variables in _ENVIRONMENTS.items():
        if all(variable in os.environ for variable in variables):
            if name == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
                logging.warning(
                    "This is an indexed job of Kubernetes, but there is no package kubernetes to "
                    "find its other processes: this one runs alone. pip install 'jax[k8s]'"
                )
                continue
            return name
    # A machine with TPUs asks the cloud for its neighbours; jax sets this where it sees none.
    sees_tpus = "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu")
    uses_tpus = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return "TPU pod" if sees_tpus and uses_tpus else None


def initialize(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
    saves_when_terminated: bool = False,
) -> None:
    """Connects this process with the others of its run, where there are others.

    Before anything is computed: afterwards `jax.devices()` are those of all processes. From then
    on, this process's standard output is only process 0's own, and the log of jax's coordination
    service is read by `jaxref.train.failures`; unless logging is set to debug.

    Args:
      mode: "auto" connects where a cluster's environment is found or a coordinator is given, "on"
        demands it, "off" never does.
      coordinator: HOST:PORT where process 0 waits for the others. Default: as the cluster says.
      num_processes, process_id: how many processes there are, and which of them this is, from 0
        on. Default: as the cluster says.
      initialization_timeout: seconds to wait for all processes, about.
      heartbeat_timeout: seconds without a sign of life after which a process is taken for dead, and
        all others end.
      saves_when_terminated: whether SIGTERM ends nothing itself, but is a notice to
        `agreed_termination`.

    Raises:
      ConfigError: arguments that contradict each other or are incomplete.
    """
    global _heartbeat_timeout
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    named = [flag for flag, value in given.items() if value is not None]
    if mode == "off" and named:
        raise ConfigError(f"--distributed=off contradicts {named[0]}; leave one of them away")
    kind = None if mode == "off" else cluster()
    if kind == "Open MPI":  # the later versions do not say where process 0 is
        num_processes = num_processes or int(os.environ["OMPI_COMM_WORLD_SIZE"])
        process_id = int(os.environ["OMPI_COMM_WORLD_RANK"]) if process_id is None else process_id
        if coordinator is None and "OMPI_MCA_orte_hnp_uri" not in os.environ:
            raise ConfigError(
                "this Open MPI does not say where its first process is: give "
                "--coordinator=HOST:PORT, or --distributed=off for processes without each other"
            )
    if kind is None and not named and mode != "on":
        return
    if kind is None and len(named) < len(given):
        missing = [flag for flag in given if flag not in named]
        raise ConfigError(
            f"no cluster's environment is found ({', '.join(_ENVIRONMENTS)}): give "
            f"{' and '.join(missing)}, too"
        )
    host, _, port = (coordinator or "cluster:1").rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise ConfigError(
            f"--process_id must be in [0, {num_processes - 1}] for --num_processes="
            f"{num_processes}, got {process_id}"
        )

    _heartbeat_timeout = heartbeat_timeout
    jax.config.update("jax_enable_preemption_service", saves_when_terminated)
    facts = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "initialization_timeout": initialization_timeout,
        "heartbeat_timeout": heartbeat_timeout,
    }
    if not logging.level_debug():
        _translate_log(facts)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"this process of a {kind or 'run'} does not find the others: {error} Give "
            "--coordinator, --num_processes and --process_id, or --distributed=off for a run alone"
        ) from error
    if not logging.level_debug():
        _silence(jax.process_index() != 0)


def _translate_log(facts: Mapping[str, Any]) -> None:
    """Sends what C++ writes to standard error through `failures`; Python's own goes straight."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    command = [sys.executable, "-I", "-S", failures.__file__, json.dumps(facts)]
    # a session of its own: Ctrl-C is not for it, as it ends when this process has
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    os.set_inheritable(2, True)


def _silence(all_output: bool) -> None:
    """Drops what C++ writes to standard output, gloo's greetings, and Python's, too, if asked."""
    sys.stdout.flush()
    output = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    if all_output:
        logging.set_verbosity(logging.ERROR)
        os.dup2(nothing, output)
    os.close(nothing)
    sys.stdout = os.fdopen(output, "w", buffering=1, encoding=sys.stdout.encoding)


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Makes sure that all processes were started alike, before anything is compiled.

    Args:
      settings: by their names, flags or dotted keys, what must be the same everywhere; anything
        that JSON can hold. The versions of jax and of jaxref are compared besides.

    Raises:
      ConfigError: in every process, with each setting that differs and who has which value.
    """
    counts = np.bincount([device.process_index for device in jax.devices()])
    if len(set(counts.tolist())) > 1:
        raise ConfigError(
            "every process must have as many devices as the others; they have "
            + ", ".join(map(str, counts))
        )
    mine = {**settings, **{f"version of {name}": version(name) for name in ("jax", "jaxref")}}
    theirs = [json.loads(text) for text in _texts(json.dumps(mine))]
    lines = []
    for key in dict.fromkeys(key for one in theirs for key in one):
        who: dict[str, list[int]] = {}
        for number, one in enumerate(theirs):
            who.setdefault(repr(one[key]) if key in one else "nothing", []).append(number)
        if len(who) > 1:
            values = (f"{value} in {_processes(numbers)}" for value, numbers in who.items())
            lines.append(f"\n  {key}: {', '.join(values)}")
    if lines:
        raise ConfigError(f"the processes were not started alike:{''.join(lines)}")


def first_process(action: Callable[[], None]) -> None:
    """Does in process 0 what only one may do, while the others wait for it.

    Args:
      action: called in process 0 alone; without result.

    Raises:
      ValueError, OSError: `action` did in process 0: there what it raised, elsewhere a ValueError
        of the same text.
    """
    problem: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            problem = error
    said, *_ = _texts("" if problem is None else str(problem))
    if problem is not None:
        raise problem
    if said:
        raise ValueError(said)


def _texts(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = process_allgather(np.int32(data.size))
    padded = process_allgather(np.pad(data, (0, sizes.max() - data.size)))
    return [row[:size].tobytes().decode() for row, size in zip(padded, sizes)]


def _processes(numbers: Sequence[int]) -> str:
    """
    >>> _processes([0, 1, 2, 5]), _processes([3])
    ('processes 0-2, 5', 'process 3')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(names)}"


@contextmanager
def agreed_termination() -> Iterator[Callable[[int], bool]]:
    """Within this context SIGTERM or Ctrl-C at any process ends nothing: the function that it
    gives, called by every process after every step with its number, says when all are to stop.

    jax watches for SIGTERM itself, from `initialize` on. Whoever gets one asks the others which
    step they are at, in threads besides; so a step costs nothing.

    Yields:
      `terminated(step)`, which says the same in every process.
    """
    previous = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield reached_preemption_sync_point
    finally:
        signal.signal(signal.SIGINT, previous)


def leave(error: BaseException, message: str) -> NoReturn:
    """Ends this process alone, on an error: the others will know by its silence.

    An orderly exit would wait for them, who may wait for this one. An error of the connection is
    the end of another process; which one's, jax knows within the heartbeat timeout, says it, and
    ends this process.

    Args:
      error: what happened.
      message: what to say of it; the traceback where it is empty.
    """
    if _LOST_CONNECTION.search(str(error)):
        time.sleep(_heartbeat_timeout + 5)
        message = f"the connection to another process is lost: {error}"
    number = jax.process_index()
    said = message or "".join(traceback.format_exception(error))
    print(f"process {number}: {said}" if number else said, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if number == 0:  # without it, what the others have to say would be that it is gone
        time.sleep(1)
    os._exit(1)
