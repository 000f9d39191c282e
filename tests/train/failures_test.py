import json
import subprocess
import sys

import pytest

from jaxref.train import failures
from jaxref.train.failures import translated

FACTS = {
    "coordinator": "host:1234",
    "num_processes": 4,
    "process_id": 1,
    "initialization_timeout": 7,
    "heartbeat_timeout": 10,
}
FATAL = (
    "F1130 08:48:12.809540   15195 client.h:80] Terminating process because the JAX distributed "
    "service detected fatal errors. This most likely indicates that another task died. {}\n"
)
TRACE = "*** Check failure stack trace: ***\n    @     0x7efde2040634  absl::Flush()\n"
UNHEALTHY = (
    "E1130 08:48:45.148183   15495 coordination_service.cc:1549] [15083373119676149294] Use error "
    "polling to propagate the following error to all tasks: UNAVAILABLE: The following tasks are "
    "unhealthy (stopped sending heartbeats):\n{}The tasks have crashed. Check the task logs.\n"
)
GONE = "{} gone: no sign of life for 10 s. The same command continues from the newest checkpoint."


def shown(log, facts=FACTS):
    return "".join(translated(iter(log.splitlines(keepends=True)), facts))


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (UNHEALTHY.format("2\n") + FATAL.format("absl::Status"), GONE.format("process 2 is")),
        (
            UNHEALTHY.format("/job:jax_worker/replica:0/task:2\n/job:jax_worker/replica:0/task:3\n")
            + FATAL.format(""),
            GONE.format("processes 2, 3 are"),
        ),
        (
            FATAL.format("INTERNAL: Shutdown barrier has failed.")
            + "Barrier result: 'task is set to ERROR: UNAVAILABLE: Task 3 heartbeat timeout.'\n\n"
            + "RPC: /xla.coordination.CoordinationService/PollForError\n",
            GONE.format("process 3 is"),
        ),
        (
            FATAL.format("absl::Status: UNAVAILABLE: Failed to send RPC to coordination service."),
            "process 0 is gone. The same command continues from the newest checkpoint.",
        ),
        (
            FATAL.format("absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded")
            + "\nRPC: /xla.coordination.CoordinationService/Heartbeat\n",
            "process 0 is gone. The same command continues from the newest checkpoint.",
        ),
        (
            FATAL.format("absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded")
            + "\nRPC: /xla.coordination.CoordinationService/RegisterTask\n",
            "the processes did not find each other within 7 s: process 0 does not answer at "
            "host:1234, or not all 4 processes came",
        ),
        (
            FATAL.format("ALREADY_EXISTS: Aborted as there is a request from a newer incarnation."),
            "another process has the same --process_id; there must be one of each from 0 on",
        ),
        (
            FATAL.format("INVALID_ARGUMENT: Unexpected task registered with task=2"),
            "process 0 was started with a smaller --num_processes than this process 2; all must be "
            "given the same one",
        ),
    ],
)
def test_a_fatal_error_is_a_sentence(log, message):
    assert shown(log + TRACE) == f"process 1: {message}\n"
    assert shown(log + TRACE, FACTS | {"process_id": None}) == f"{message}\n"


def test_of_process_0():
    alone = FATAL.format("DEADLINE_EXCEEDED") + "\nRPC: /xla.coordination/RegisterTask\n"
    assert shown(alone + TRACE, FACTS | {"process_id": 0}) == (
        "the processes did not find each other within 7 s: not all 4 processes came\n"
    )
    taken = "E1130 08:52:29.1 17654 add_port.cc:83] Failed to add port to server: No address added "
    assert shown(
        f"{taken}out of total 1 resolved for '[::]:1234'\n", FACTS | {"process_id": 0}
    ) == (
        "process 0 cannot wait for the others at [::]:1234: the port is taken, or not of this "
        "machine; choose another with --coordinator\n"
    )


def test_everything_else_stays_as_it_is():
    warning = "W1130 08:48:45.1 15495 cpu_client.cc:12] slow\nits second line\n"
    assert shown(f"any line\n{warning}") == f"any line\n{warning}"
    harmless = "E1130 08:48:45.1 15 preemption_sync_manager.cc:159] Failed to cancel: {}\nmore\n"
    assert shown(f"one\n{harmless}{warning}") == f"one\n{warning}"
    other = (
        "F1130 08:48:45.1 15495 pjrt.cc:12] bug\n*** Check failure stack trace: ***\n    @ 0x7\n"
    )
    assert shown(other) == other


def test_a_fatal_error_of_unknown_meaning_is_shown():
    log = FATAL.format("INTERNAL: who knows")
    assert shown(f"before\n{log}{TRACE}") == f"before\n{log}"


def test_all_is_read_so_that_the_writer_is_never_held_up():
    lines = iter((FATAL.format("") + TRACE + 10 * "    @\n").splitlines(keepends=True))
    list(translated(lines, FACTS))
    assert next(lines, None) is None


def test_as_a_process():
    command = [sys.executable, "-I", "-S", failures.__file__, json.dumps(FACTS)]
    log = f"a line\n{UNHEALTHY.format('2' + chr(10))}{FATAL.format('')}{TRACE}" + 10_000 * "    @\n"
    result = subprocess.run(command, input=log, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == f"a line\nprocess 1: {GONE.format('process 2 is')}\n"
