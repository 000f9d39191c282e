import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxref.train.local import commands, environment, run_together

STARTED = "import pathlib, os; pathlib.Path('{}').write_text(str(os.getpid())); "


def python(code):
    return [sys.executable, "-S", "-c", code]


def lasting(path, seconds=60):
    """A command that writes its process id to a file and takes its time."""
    return python(STARTED.format(path) + f"import time; time.sleep({seconds})")


def pid_in(path):
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(path.read_text())


def is_gone(pid):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_commands_meet_at_one_free_port():
    lines = commands(3, ["--config.steps=3"])
    [port] = {re.search(r"--coordinator=localhost:(\d+)", " ".join(line))[1] for line in lines}
    assert 0 < int(port) < 2**16
    for number, line in enumerate(lines):
        assert line[:3] == [sys.executable, "-m", "jaxref.train"]
        assert {f"--process_id={number}", "--num_processes=3"} < set(line)
        assert line[-1] == "--config.steps=3"


def test_environment_adds_devices_to_the_flags_of_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_force_host_platform_device_count=8")
    monkeypatch.setenv("PYTHONPATH", "here")
    made = environment(3)
    assert made["XLA_FLAGS"].startswith("--xla_dump_to=x ")
    assert made["XLA_FLAGS"].split()[-1] == "--xla_force_host_platform_device_count=3"
    assert (made["JAX_PLATFORMS"], made["PYTHONPATH"]) == ("cpu", "here")


def test_output_of_the_others_has_their_number(capfd):
    says = [
        python("print('zero')"),
        python("import sys; print('one'); print('again', file=sys.stderr)"),
        python("print('process 2: itself')"),
    ]
    assert run_together(says, dict(os.environ), grace=5) == 0
    out, err = capfd.readouterr()
    assert out == "zero\n"
    assert sorted(err.splitlines()) == [
        "process 1: again",
        "process 1: one",
        "process 2: itself",
    ]


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [
        ("sys.exit(3)", 3, "ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL"),
    ],
)
def test_one_that_fails_is_named_and_the_others_have_time_to_end(tmp_path, capfd, end, code, how):
    slow, patient = tmp_path / "slow", tmp_path / "patient"
    ends_itself = python(f"import time; time.sleep(0.3); open({str(patient)!r}, 'w').write('1')")
    fails = python(f"import os, sys, time; time.sleep(0.1); {end}")
    start = time.monotonic()
    assert run_together([ends_itself, lasting(slow), fails], dict(os.environ), grace=1.0) == code
    assert time.monotonic() - start < 10
    assert patient.exists()
    assert is_gone(pid_in(slow))
    err = capfd.readouterr().err
    assert f"process 2 {how}\n" in err
    assert "still there after 1 s and killed: 1\n" in err


LAUNCHER = """
import os, sys
from jaxref.train.local import run_together
code = "import pathlib, os, signal, sys, time\\n" \
       "signal.signal(signal.SIG{name}, {handler})\\n" \
       "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
commands = [[sys.executable, "-S", "-c", code, path] for path in sys.argv[1:]]
sys.exit(run_together(commands, dict(os.environ), grace=60))
"""
ENDS = "lambda *_: sys.exit(0)"


def launched(name, handler, paths):
    script = LAUNCHER.replace("{name}", name).replace("{handler}", handler)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, paths)])


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_signals_reach_all_and_the_second_one_kills(tmp_path, name):
    paths = [tmp_path / "a", tmp_path / "b"]
    number = signal.Signals[f"SIG{name}"]
    launcher = launched(name, ENDS, paths)
    pids = [pid_in(path) for path in paths]
    launcher.send_signal(number)
    assert launcher.wait(timeout=10) == 0
    assert all(map(is_gone, pids))

    for path in paths:
        path.unlink()
    launcher = launched(name, "signal.SIG_IGN", paths)
    pids = [pid_in(path) for path in paths]
    launcher.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(timeout=0.3)
    launcher.send_signal(number)
    assert launcher.wait(timeout=10) == 128 + signal.SIGKILL
    assert all(map(is_gone, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's notice is Linux's")
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    launcher = launched("TERM", ENDS, paths)
    pids = [pid_in(path) for path in paths]
    launcher.kill()
    launcher.wait()
    assert all(map(is_gone, pids))
