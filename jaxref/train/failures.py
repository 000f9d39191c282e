"""What jax's coordination service logs before it ends a process, in a sentence.

The service ends a process from C++, by an abort under a page of its own log, when another process
is gone and when the processes do not find each other. `python failures.py FACTS` stands between
that log and a reader: what it reads from standard input it writes to standard error, but of the
service's records only what they mean. It is a process of its own, as it has to outlive the other,
and imports nothing heavy, as it is started before the other does anything.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_RECORD = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] ?")
_OF_THE_SERVICE = ("coordination_service", "preemption_", "client.h", "add_port.cc")
_END_OF_FATAL = "*** Check failure"

_CONTINUES = "The same command continues from the newest checkpoint."
_MEANINGS = (
    (
        r"unhealthy \(stopped sending heartbeats\):\n(?P<gone>(?:.*\d\n)+)",
        "{gone} gone: no sign of life for {heartbeat_timeout} s. " + _CONTINUES,
    ),
    (
        r"Task (?P<gone>\d+) heartbeat timeout",
        "{gone} gone: no sign of life for {heartbeat_timeout} s. " + _CONTINUES,
    ),
    (
        r"No address added out of total \d+ resolved for '(?P<address>.*)'",
        "process 0 cannot wait for the others at {address}: the port is taken, or not of this "
        "machine; choose another with --coordinator",
    ),
    (
        r"request from a newer incarnation",
        "another process has the same --process_id; there must be one of each from 0 on",
    ),
    (
        r"Unexpected task registered with task=(?P<number>\d+)",
        "process 0 was started with a smaller --num_processes than this process {number}; all must "
        "be given the same one",
    ),
    (
        r"DEADLINE_EXCEEDED(?:.*\n)*?.*RegisterTask",
        "the processes did not find each other within {initialization_timeout} s: {missing}",
    ),
    (
        r"Failed to send RPC to coordination service|RPC: .*(?:Heartbeat|PollForError)",
        "process 0 is gone. " + _CONTINUES,
    ),
)


def meaning(log: str, facts: Mapping[str, Any]) -> str | None:
    """The reason that a log of the coordination service gives for an end, or None.

    Args:
      log: its records, from the first on.
      facts: of the process that wrote them: `heartbeat_timeout` and `initialization_timeout` in
        seconds, and `process_id`, `num_processes` and `coordinator`, each None where the cluster
        knows.

    Returns:
      A sentence, and what to do; None where no known error is in the log.

    >>> log = "The following tasks are unhealthy (stopped sending heartbeats):\\n2\\n3\\n"
    >>> meaning(log, {"heartbeat_timeout": 10}).partition(".")[0]
    'processes 2, 3 are gone: no sign of life for 10 s'
    """
    for pattern, text in _MEANINGS:
        found = re.search(pattern, log)
        if found:
            said = found.groupdict()
            if "gone" in said:
                numbers = re.findall(r"(\d+)$", said["gone"], re.MULTILINE)
                one = len(numbers) == 1
                said["gone"] = (
                    f"process {numbers[0]} is" if one else f"processes {', '.join(numbers)} are"
                )
            return text.format(**{**facts, "missing": _missing(facts), **said})
    return None


def _missing(facts: Mapping[str, Any]) -> str:
    count = facts.get("num_processes")
    late = "not all processes came" if count is None else f"not all {count} processes came"
    if facts.get("process_id") == 0:
        return late
    where = f" at {facts['coordinator']}" if facts.get("coordinator") else ""
    return f"process 0 does not answer{where}, or {late}"


def translated(lines: Iterable[str], facts: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a log, with what a fatal error of the coordination service means in the place of
    all that the service wrote, and of the stack trace after it.

    Where nothing is known of the meaning, the fatal record itself stands there.

    Args:
      lines: of the log, with their line ends; read to the last.
      facts: as for `meaning`.

    Yields:
      The lines to show.
    """
    held: list[str] = []  # records of the service
    fatal = inside = False
    for line in lines:
        record = _RECORD.match(line)
        if record is not None:
            inside = record[1].startswith(_OF_THE_SERVICE)
            fatal = fatal or (inside and line.startswith("F"))
        if fatal and line.startswith(_END_OF_FATAL):
            break
        if inside:
            held.append(line)
        else:
            yield line
    said = meaning("".join(held), facts)
    if said is not None:
        number = facts.get("process_id")
        yield f"process {number}: {said}\n" if number else f"{said}\n"
    elif fatal:
        yield from held
    for _ in lines:  # the other must not be stopped by a full pipe
        pass


if __name__ == "__main__":
    for shown in translated(sys.stdin, json.loads(sys.argv[1])):
        sys.stderr.write(shown)
        sys.stderr.flush()
