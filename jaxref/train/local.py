"""Starts the processes of a training run on this machine: each one takes virtual CPU devices.

  python -m jaxref.train.local --processes=4 --devices_per_process=2 -- FLAGS OF jaxref.train

What works here works on a cluster, where each process has a machine of its own. Process 0 writes as
it does alone; lines of the others have their number before them. SIGTERM and Ctrl-C reach all
processes, a second one kills them. When one fails, the program says which and how, gives the others
--grace seconds to end by themselves, and ends with its exit code (for a signal, 128 more).

Examples
  python -m jaxref.train.local --processes=2 -- --config.steps=100
  python -m jaxref.train.local --processes=4 --devices_per_process=2 -- --config.mesh.fsdp=8
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from absl import app, flags

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", 1, "Virtual CPU devices of each process.", lower_bound=1
)
_GRACE = flags.DEFINE_float(
    "grace", 30.0, "Seconds that the others have to end when one has failed.", lower_bound=0.0
)

_HEARTBEAT_TIMEOUT = 10  # seconds: on one machine a sign of life is never long under way
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def commands(processes: int, arguments: Sequence[str]) -> list[list[str]]:
    """The command lines of the processes, which meet at a free port of this machine.

    Args:
      processes: how many, at least 1.
      arguments: flags of `jaxref.train`, the same for each.

    Returns:
      A command line for each process, by its number.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        [
            sys.executable,
            "-m",
            "jaxref.train",
            f"--coordinator=localhost:{port}",
            f"--num_processes={processes}",
            f"--process_id={number}",
            f"--heartbeat_timeout={_HEARTBEAT_TIMEOUT}",
            *arguments,
        ]
        for number in range(processes)
    ]


def environment(devices: int) -> dict[str, str]:
    """This process's environment, with so many virtual CPU devices.

    Args:
      devices: how many, at least 1.

    Returns:
      The variables, with what `XLA_FLAGS` had before.
    """
    count = f"--xla_force_host_platform_device_count={devices}"
    given = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": given}


def run_together(
    commands: Sequence[Sequence[str]], environment: dict[str, str], *, grace: float
) -> int:
    """Runs the commands until all have ended; none outlives this process, whatever ends it.

    What process 0 writes goes where this process writes; lines of the others go to standard error
    with their number before them. SIGTERM and Ctrl-C are passed on, a second one as SIGKILL.

    Args:
      commands: the command lines, of process 0 first.
      environment: the variables of all of them.
      grace: seconds that the others have to end when one has failed, before they are killed.

    Returns:
      The exit code of the first that failed, with 128 added to the number of a signal; else 0.
    """
    processes: list[subprocess.Popen[str]] = []
    asked, parent = threading.Event(), os.getpid()
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before
                os._exit(1)

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(signal.SIGKILL if asked.is_set() else number)
        asked.set()

    previous = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number, command in enumerate(commands):
            relayed = number > 0
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C comes through `pass_on`, once
                    preexec_fn=die_with_parent,
                    stdout=subprocess.PIPE if relayed else None,
                    stderr=subprocess.STDOUT if relayed else None,
                )
            )
        relays = [
            threading.Thread(target=_relay, args=(number, process), daemon=True)
            for number, process in enumerate(processes)
            if process.stdout is not None
        ]
        for relay in relays:
            relay.start()
        code = _wait(processes, grace)
        for relay in relays:
            relay.join(timeout=1)
        return code
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _relay(number: int, process: subprocess.Popen[str]) -> None:
    prefix = f"process {number}: "
    assert process.stdout is not None
    for line in process.stdout:
        sys.stderr.write(line if line.startswith(prefix) else prefix + line)
        sys.stderr.flush()


def _wait(processes: Sequence[subprocess.Popen[str]], grace: float) -> int:
    """The exit code of the first process that fails, 0 if none does, when all have ended."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if not failed and any(codes):
            first, failed = next((number, code) for number, code in enumerate(codes) if code)
            print(f"process {first} {_how(failed)}", file=sys.stderr, flush=True)
            deadline = time.monotonic() + grace
        alive = [number for number, code in enumerate(codes) if code is None]
        if not alive:
            return failed if failed >= 0 else 128 - failed
        if time.monotonic() > deadline:
            names = ", ".join(map(str, alive))
            print(f"still there after {grace:g} s and killed: {names}", file=sys.stderr, flush=True)
            for number in alive:
                processes[number].kill()
            deadline = float("inf")
        time.sleep(0.05)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def main(argv: list[str]) -> None:
    """Runs what the command line asks for.

    Args:
      argv: the program's name, and what stood behind the flags of this program: the flags of
        `jaxref.train`.

    Raises:
      SystemExit: at the end, with the exit code of `run_together`.
    """
    found = commands(_PROCESSES.value, argv[1:])
    sys.exit(run_together(found, environment(_DEVICES.value), grace=_GRACE.value))


def run() -> None:
    """Starts the program: reads the flags of the command line and calls `main`.

    Raises:
      SystemExit: as `main`; or flags that do not exist.
    """
    sys.modules["__main__"].__doc__ = __doc__
    app.run(main)


if __name__ == "__main__":
    run()
