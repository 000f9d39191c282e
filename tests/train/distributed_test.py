import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import pytest

from jaxref.train import distributed, loop
from jaxref.train.config import ConfigError
from jaxref.train.distributed import check_agreement, cluster, first_process, initialize
from jaxref.train.records import read_metrics

ROOT = Path(__file__).parents[2]
CLUSTERS = {
    "Slurm": {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    },
    "Open MPI": {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    },
    "TPU pod": {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"},
}


@pytest.fixture
def alone(monkeypatch):
    """No cluster's environment."""
    for variables in distributed._ENVIRONMENTS.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def connected(alone):
    """`initialize`, and the arguments with which jax's own was called."""
    calls = []
    alone.setattr(distributed.logging, "level_debug", lambda: True)  # output stays as it is
    alone.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append((*args, kw)))

    def called(*args, **options):
        initialize(*args, **options)
        return calls

    yield called
    jax.config.update("jax_enable_preemption_service", True)


class TestInitialize:
    HERE: ClassVar = {"coordinator": "host:1234", "num_processes": 2, "process_id": 1}

    def test_one_process_needs_nothing(self, connected):
        assert connected() == connected("off") == []

    @pytest.mark.parametrize("mode", ["auto", "on"])
    def test_flags(self, connected, mode):
        options = {"initialization_timeout": 7, "heartbeat_timeout": 8}
        [call] = connected(mode, **self.HERE, **options, saves_when_terminated=True)
        assert call[:3] == ("host:1234", 2, 1)
        assert call[3] == {"initialization_timeout": 7, "heartbeat_timeout_seconds": 8}
        assert jax.config.jax_enable_preemption_service
        connected(mode, **self.HERE)
        assert not jax.config.jax_enable_preemption_service

    @pytest.mark.parametrize("name", CLUSTERS)
    def test_clusters_are_found_by_their_environment(self, connected, monkeypatch, name):
        assert cluster() is None
        for variable, value in CLUSTERS[name].items():
            monkeypatch.setenv(variable, value)
        assert cluster() == name
        assert connected("off") == []
        [call] = connected("auto")
        assert call[0] is None
        assert call[1:3] == ((2, 1) if name == "Open MPI" else (None, None))

    def test_kubernetes_needs_its_package(self, alone):
        alone.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        assert cluster() is None
        alone.setenv("JOB_COMPLETION_INDEX", "1")
        for package in (None, object()):
            alone.setattr(distributed.importlib.util, "find_spec", lambda _, found=package: found)
            assert cluster() == (None if package is None else "Kubernetes")

    def test_a_machine_with_tpus(self, alone):
        alone.setattr(distributed.importlib.util, "find_spec", lambda _: object())
        alone.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        assert cluster() is None  # JAX_PLATFORMS=cpu
        alone.setenv("JAX_PLATFORMS", "tpu,cpu")
        assert cluster() == "TPU pod"

    def test_later_open_mpi_needs_the_coordinator(self, connected, monkeypatch):
        for variable, value in CLUSTERS["Open MPI"].items():
            if variable != "OMPI_MCA_orte_hnp_uri":
                monkeypatch.setenv(variable, value)
        with pytest.raises(
            ConfigError, match="does not say where its first process is: give --coo"
        ):
            connected("auto")
        [call] = connected("auto", coordinator="host:1234")
        assert call[:3] == ("host:1234", 2, 1)

    @pytest.mark.parametrize(
        ("mode", "options", "message"),
        [
            (
                "on",
                {},
                "no cluster's environment .* give --coordinator and --num_processes and --p",
            ),
            ("auto", {"coordinator": "host:1"}, "give --num_processes and --process_id, too"),
            ("auto", {"process_id": 0}, "give --coordinator and --num_processes, too"),
            ("off", {"process_id": 0}, "--distributed=off contradicts --process_id"),
            ("auto", HERE | {"coordinator": "host"}, "--coordinator must be HOST:PORT, got 'host'"),
            ("auto", HERE | {"coordinator": "host:0"}, "must be HOST:PORT, got 'host:0'"),
            ("auto", HERE | {"coordinator": "host:65536"}, "must be HOST:PORT"),
            ("auto", HERE | {"coordinator": ":80"}, "must be HOST:PORT, got ':80'"),
            (
                "auto",
                HERE | {"process_id": 2},
                r"--process_id must be in \[0, 1\] for --num_processes=2, got 2",
            ),
        ],
    )
    def test_what_is_missing_or_wrong(self, connected, mode, options, message):
        with pytest.raises(ConfigError, match=message):
            connected(mode, **options)
        assert connected("off") == []

    def test_what_jax_does_not_find(self, connected, monkeypatch):
        def fails(*_, **__):
            raise ValueError("coordinator_address should be defined.")

        monkeypatch.setattr(jax.distributed, "initialize", fails)
        with pytest.raises(ConfigError, match="of a run does not find the others: coordinator_add"):
            connected(**self.HERE)


class TestAgreement:
    def test_alike(self, monkeypatch):
        monkeypatch.setattr(distributed, "_texts", lambda text: 4 * [text])
        check_agreement({"seed": 1, "--mode": "train"})

    def test_differences_are_named_with_who_has_them(self, monkeypatch):
        def texts(text):
            mine = json.loads(text)
            other = {key: value for key, value in mine.items() if key != "seed"}
            return [text, json.dumps(mine | {"steps": 3}), text, json.dumps(other), text]

        monkeypatch.setattr(distributed, "_texts", texts)
        with pytest.raises(ConfigError) as error:
            check_agreement({"seed": 1, "steps": 2, "data.name": "text:x"})
        assert str(error.value) == (
            "the processes were not started alike:\n"
            "  seed: 1 in processes 0-2, 4, nothing in process 3\n"
            "  steps: 2 in processes 0, 2-4, 3 in process 1"
        )

    def test_versions(self, monkeypatch):
        def texts(text):
            return [text, json.dumps(json.loads(text) | {"version of jax": "0.0.1"})]

        monkeypatch.setattr(distributed, "_texts", texts)
        with pytest.raises(
            ConfigError, match=f"version of jax: '{jax.__version__}' in process 0, "
        ):
            check_agreement({})

    def test_numbers_of_devices(self, monkeypatch):
        devices = [SimpleNamespace(process_index=i) for i in (0, 0, 1, 2, 2)]
        monkeypatch.setattr(jax, "devices", lambda: devices)
        with pytest.raises(ConfigError, match="as many devices as the others; they have 2, 1, 2"):
            check_agreement({})

    def test_what_the_first_process_fails_at_all_fail_at(self, monkeypatch):
        def fails():
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            first_process(fails)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        first_process(fails)
        monkeypatch.setattr(distributed, "_texts", lambda text: ["disk full", text])
        with pytest.raises(ValueError, match="disk full"):
            first_process(fails)


ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",  # as in conftest.py
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(processes, devices, arguments):
    options = (f"--processes={processes}", f"--devices_per_process={devices}")
    return start("jaxref.train.local", *options, "--", *arguments)


def process_of(launcher, number):
    """The process id of one of the launcher's processes."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().split("\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher.pid and f"--process_id={number}" in command:
            return int(path.name)
    raise ProcessLookupError(number)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture
def arguments(tiny):
    def of(workdir, *overrides):
        quick = (
            "optimizer.name=sgd",
            "optimizer.momentum=0.9",
            "schedule.name=constant_schedule",
            "schedule.value=0.1",
            "validation_tokens=256",
            "sample.length=3",
            "checkpoint_every=5",
        )
        changes = tiny(*quick, *overrides)
        return [f"--workdir={workdir}", *(f"--config.{change}" for change in changes)]

    return of


def manifest(workdir, step):
    """With the fingerprint of every array, and of the input pipeline's position."""
    return json.loads((workdir / f"checkpoints/{step}/manifest/metadata").read_text())


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the test reads /proc")


@needs_linux
@pytest.mark.slow
def test_four_processes_train_as_one_and_one_that_is_killed_loses_nothing(
    arguments, tiny_config, tmp_path
):
    steps = ("steps=30", "validate_every=15", "model.dropout=0.1", "keep_checkpoints=10")
    together, single = tmp_path / "together", tmp_path / "single"

    launcher = start_together(4, 2, arguments(together, *steps))
    wait_for(lambda: len(read_metrics(together)) >= 22, launcher)
    at = time.monotonic()
    os.kill(process_of(launcher, 2), signal.SIGKILL)
    _, err = launcher.communicate()
    assert time.monotonic() - at < 30
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "process 2 was killed by SIGKILL" in err
    gone = r"process 2 is gone: no sign of life for 10 s. The same command continues from the new"
    for before in ("", "process 1: ", "process 3: "):
        assert re.search(rf"(?<!: ){before}{gone}", err), err
    assert "Traceback" not in err
    assert "Check failure" not in err
    assert "still there after" not in err

    uninterrupted = [manifest(together, step) for step in (10, 15)]
    for path in (together / "checkpoints").iterdir():  # as if it had been killed earlier
        if path.name != "5":
            shutil.rmtree(path)
    launcher = start_together(4, 2, arguments(together, *steps))
    out, err = launcher.communicate()
    assert launcher.returncode == 0, err
    assert "Continuing after step 5." in out
    assert "process" not in err, err  # only process 0 has something to say
    assert out.count("Sample (") == 1
    assert [manifest(together, step) for step in (10, 15)] == uninterrupted

    overrides = [argument.removeprefix("--config.") for argument in arguments(single, *steps)[1:]]
    loop.train(tiny_config(*overrides), single)  # on this process's eight devices
    rows, expected = read_metrics(together), read_metrics(single)
    assert [row["step"] for row in rows] == list(range(1, 31))
    for name in ("loss", "validation_loss", "gradient_norm"):
        values = [row[name] for row in rows if name in row]
        assert values == pytest.approx([row[name] for row in expected if name in row], rel=1e-5)


@needs_linux
@pytest.mark.slow
def test_sigterm_to_one_process_saves_in_all(arguments, tmp_path):
    changes = ("steps=100000", "validate_every=100000", "log_every=1")
    launcher = start_together(2, 1, arguments(tmp_path, *changes))
    wait_for(lambda: len(read_metrics(tmp_path)) >= 3, launcher)
    os.kill(process_of(launcher, 1), signal.SIGTERM)
    out, err = launcher.communicate()
    assert launcher.returncode == 0, err
    [step] = re.findall(r"Terminated and saved at step (\d+)\. The same command continues\.", out)
    assert len(read_metrics(tmp_path)) == int(step)
    assert manifest(tmp_path, step)["content"]["config"]["steps"] == 100000


@pytest.mark.slow
def test_processes_that_do_not_fit_together(arguments, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ["--num_processes=2", "--initialization_timeout=60", "--heartbeat_timeout=10"]
    different = [
        start(
            "jaxref.train",
            *arguments(tmp_path / "run", f"seed={number}", "steps=2"),
            f"--coordinator=localhost:{port}",
            f"--process_id={number}",
            *together,
        )
        for number in range(2)
    ]
    nowhere = start(
        "jaxref.train",
        *arguments(tmp_path / "run"),
        "--coordinator=localhost:1",
        "--num_processes=2",
        "--process_id=1",
        "--initialization_timeout=1",
    )
    for number, process in enumerate(different):
        out, err = process.communicate()
        assert (process.returncode, out) == (1, "")
        assert err == (
            f"{'process 1: ' if number else ''}ConfigError: the processes were not started alike:\n"
            "  seed: 0 in process 0, 1 in process 1\n"
        )
    out, err = nowhere.communicate()
    assert nowhere.returncode != 0
    assert (out, err) == (
        "",
        "process 1: the processes did not find each other within 1 s: process 0 does not answer at "
        "localhost:1, or not all 2 processes came\n",
    )
    assert not (tmp_path / "run").exists()
