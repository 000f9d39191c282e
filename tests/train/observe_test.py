import contextlib
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxref.train import loop, observe, program, report
from jaxref.train.chips import CHIPS
from jaxref.train.config import ConfigError, load_config
from jaxref.train.observe import DEVICE_KINDS, Stopwatch, Trace, steps_to_profile
from jaxref.train.records import read_metrics, read_norms, read_starts

# A resumed run is compared with the whole one bit for bit.
pytestmark = pytest.mark.optimized

KINDS = ("input_seconds", "step_seconds", "save_seconds")


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """All runs of this file are on the first of the eight devices."""
    make_mesh = program.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(program, "make_mesh", lambda sizes, _: make_mesh(sizes, first))
        yield


def train(config, workdir, profile):
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(config, workdir, profile)


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)`: that much time goes by; it stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(observe.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


class TestStopwatch:
    def test_what_is_measured_and_the_rest(self, clock):
        watch = Stopwatch()
        for _ in range(4):
            with watch.measure("input"):
                clock(1.0)
            clock(3.0)
        with watch.measure("save"):
            clock(8.0)
        with watch.measure("aside"):
            clock(1000.0)
        assert watch.lap(4) == dict(zip(KINDS, (1.0, 3.0, 2.0)))

    def test_each_lap_starts_from_nothing(self, clock):
        watch = Stopwatch()
        with watch.measure("save"):
            clock(8.0)
        with watch.measure("aside"):
            clock(1000.0)
        watch.lap(1)
        clock(6.0)
        assert watch.lap(2) == dict(zip(KINDS, (0.0, 3.0, 0.0)))

    @pytest.mark.parametrize("kind", ["save", "aside"])
    def test_steps_under_way_are_steps(self, clock, kind):
        class UnderWay:
            def block_until_ready(self):
                clock(5.0)
                return self

        watch = Stopwatch()
        with watch.measure(kind, after=UnderWay()):
            clock(2.0)
        seconds = watch.lap(1)
        assert seconds["step_seconds"] == 5.0
        assert seconds["save_seconds"] == (2.0 if kind == "save" else 0.0)


class TestStepsToProfile:
    def test_both_ends_are_included(self):
        assert list(steps_to_profile("20:22", 600)) == [20, 21, 22]
        assert list(steps_to_profile("600:600", 600)) == [600]
        assert len(steps_to_profile(None, 600)) == 0

    @pytest.mark.parametrize(
        "text", ["", "20", "20:", ":20", "a:b", "1.5:2", "-1:5", "1:2:3", "²:3"]
    )
    def test_no_two_numbers(self, text):
        with pytest.raises(ConfigError, match=r"--profile must be START:STOP, .* got "):
            steps_to_profile(text, 600)

    @pytest.mark.parametrize("text", ["0:3", "22:20", "599:601", "700:800"])
    def test_no_steps_of_the_run(self, text):
        with pytest.raises(ConfigError, match=rf"START <= STOP <= steps = 600, got {text}$"):
            steps_to_profile(text, 600)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (
                ["--profile=22:20"],
                r"ConfigError: --profile=START:STOP must have 1 <= START <= STOP",
            ),
            (["--profile=20"], r"ConfigError: --profile must be START:STOP, .* got '20'"),
            (
                ["--profile=1:2", "--mode=report"],
                r"ConfigError: --profile is of a training, and --mode=report is none",
            ),
            (["--config.norms_every=-1"], r"ValueError: norms_every must be in \[0, inf\)"),
        ],
    )
    def test_errors_come_before_anything_is_written(self, call, tmp_path, argv, message):
        code, _ = call(f"--workdir={tmp_path / 'run'}", *argv)
        assert re.match(message, code), code
        assert "\n" not in code
        assert not (tmp_path / "run").exists()


class TestSecondsAtPeak:
    data = SimpleNamespace(per_step=lambda config: (64, "tokens_per_second"))
    state = SimpleNamespace(
        params={
            "embed": {"embedding": np.zeros((256, 8))},
            "output": {"kernel": np.zeros((8, 256))},
        }
    )

    def of(self, kind, **data):
        config = load_config(
            overrides=["model.num_layers=2", "model.features=8", "model.num_heads=2", "length=16"]
        )
        devices = np.array([[SimpleNamespace(device_kind=kind)] * 2] * 2)
        built = SimpleNamespace(mesh=SimpleNamespace(devices=devices, size=4))
        data = SimpleNamespace(**{**vars(self.data), **data})
        return observe.seconds_at_peak(config, data, built, self.state)

    def test_by_the_formula(self):
        """The output matrix multiplies, the embedding does not; a TPU7x chip is two devices."""
        flops = (6 * 8 * 256 + 6 * 2 * 8 * 16) * 64
        assert self.of("TPU v5 lite") == pytest.approx(flops / (4 * 197e12))
        assert self.of("TPU7x") == pytest.approx(flops / (2 * 2307e12))

    def test_none_where_peak_or_formula_is_not_known(self):
        assert self.of("cpu") is None
        assert self.of("TPU v4", per_step=lambda config: (64, "images_per_second")) is None

    def test_every_chip_has_a_name(self):
        assert set(DEVICE_KINDS.values()) == set(CHIPS)


def test_a_trace_that_the_run_does_not_reach_the_end_of_is_written(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path, **_: called.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: called.append("stop"))
    with Trace(tmp_path, range(3, 6)) as trace:
        for step in range(1, 5):
            if trace.turns_before(step):
                trace.turn()
    assert called == [str(tmp_path), "stop"]
    with Trace(tmp_path, observe.NO_STEPS) as trace:
        assert not any(trace.turns_before(step) for step in range(5))
    assert called == [str(tmp_path), "stop"]


class TestObservedRun:
    """Two stacked layers; norms in every fifth step of twelve, and a trace of steps 3 and 4."""

    @pytest.fixture(scope="class")
    def config(self, tiny_config):
        return tiny_config(
            "model.num_layers=2",
            "model.scan_layers=True",
            "model.dropout=0.1",
            "norms_every=5",
        )

    @pytest.fixture(scope="class")
    def workdir(self, config, tmp_path_factory):
        workdir = tmp_path_factory.mktemp("observed")
        train(config, workdir, observe.NO_STEPS)
        return workdir

    def test_times_are_in_the_metrics(self, config, workdir):
        rows = read_metrics(workdir)
        assert len(rows) == 12
        for row in rows:
            assert min(row[kind] for kind in KINDS) >= 0
            seconds = sum(row[kind] for kind in KINDS)
            assert row["tokens_per_second"] == pytest.approx(8 * 16 / seconds)
        saved = [row["step"] for row in rows if row["save_seconds"] > 0]
        assert saved == [5, 9]  # in the record after the save

    def test_norms_are_those_of_the_step(self, workdir):
        loss = {row["step"]: row for row in read_metrics(workdir)}
        rows = read_norms(workdir)
        assert [row["step"] for row in rows] == [5, 10]
        for row in rows:
            assert list(row["parameters"]) == list(row["gradients"])
            total = sum(np.sum(np.square(norm)) for norm in row["gradients"].values())
            assert np.sqrt(total) == pytest.approx(loss[row["step"]]["gradient_norm"], rel=1e-5)

    def test_norms_by_layer_and_array(self, config, workdir):
        data = loop.load(config)
        built = loop.build_program(config, data)
        with loop.Checkpoints(workdir / "checkpoints") as checkpoints:
            assert 4 in checkpoints.all_steps()
            shutil.copytree(workdir / "checkpoints" / "4", workdir / "before" / "4")
        with loop.Checkpoints(workdir / "before") as checkpoints:
            batches = loop.training_batches(config, data, built.rows)
            state, _ = checkpoints.restore(built.abstract_state, batches)
        [row, _] = [row["parameters"] for row in read_norms(workdir)]
        stacked = np.asarray(state.params["blocks"][0]["mlp"]["function"]["up"]["kernel"])
        assert stacked.shape == (2, 16, 32)
        norms = np.sqrt(np.square(stacked).sum(axis=(1, 2)))
        assert norms[0] != norms[1]
        np.testing.assert_allclose(row["blocks/0/mlp/function/up/kernel"], norms, rtol=1e-5)
        output = np.linalg.norm(state.params["output"]["kernel"])
        assert row["output/kernel"] == pytest.approx(output, rel=1e-5)

    def test_tensorboard_has_the_norms(self, workdir):
        found = {}
        for path in workdir.glob("events.out.tfevents.*"):
            data = path.read_bytes()
            while data:
                length = int.from_bytes(data[:8], "little")
                event = Event.FromString(data[12 : 12 + length])
                found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
                data = data[16 + length :]
        row = read_norms(workdir)[1]
        path = "blocks/0/mlp/function/up/kernel"
        assert found[10, f"norms_of_gradients/{path}/1"] == np.float32(row["gradients"][path][1])
        single = found[10, "norms_of_parameters/output/kernel"]
        assert single == np.float32(row["parameters"]["output/kernel"])

    def test_facts(self, workdir):
        [start] = read_starts(workdir)
        assert start["step"] == 0
        assert start["devices"] == "1 x cpu"
        assert start["measure"] == "nats per byte"
        assert set(start["baselines"]) == {"unigram", "zlib", "lzma"}
        assert start["parameters"] > 10_000

    def test_a_resumed_run_has_everything_once(self, config, workdir, tmp_path):
        copy = shutil.copytree(workdir, tmp_path / "copy")
        for step in ("8", "12"):
            shutil.rmtree(copy / "checkpoints" / step)
        (copy / "sample.txt").unlink()
        with pytest.raises(ConfigError, match=r"start after step 4, .* continues, got 4:5"):
            train(config, copy, range(4, 6))
        train(config, copy, range(0))
        assert read_norms(copy) == read_norms(workdir)
        assert [start["step"] for start in read_starts(copy)] == [0, 4]

    def test_report(self, config, workdir, capsys):
        report.report(config, workdir)
        assert capsys.readouterr().out == f"Report: {workdir / 'report.html'}\n"
        page = (workdir / "report.html").read_text()
        assert page.count("data:image/png;base64,") == 6


@pytest.mark.slow
def test_the_trace_has_its_steps(arguments, tmp_path):
    """In a process of its own: the profiler would trace the TPU's compiler, which other tests may
    have loaded into this one, and end it."""
    command = [sys.executable, "-m", "jaxref.train", *arguments(tmp_path, "steps=5")]
    subprocess.run([*command, "--profile=3:4"], check=True, capture_output=True)
    [path] = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert steps == ["3", "4"]
    assert sum(event.get("name") == "input" for event in events) == 2
