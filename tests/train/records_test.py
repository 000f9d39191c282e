import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

import jaxref
from jaxref.train.records import (
    Records,
    check_config,
    open_workdir,
    plot_loss,
    read_metrics,
    save_loss_plot,
    write_json_atomic,
    write_text_atomic,
)

CONFIG = {"optimizer": {"name": "lion", "betas": (0.9, 0.99)}, "steps": 10, "log": {"every": 5}}
METRICS = [
    {"step": s, "loss": 1 + 4 * 0.9**s, **({"validation_loss": 1.2} if s % 10 == 0 else {})}
    for s in range(101)
]


def events(workdir):
    """The TensorBoard events in all files: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted(Path(workdir).glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir):
    return [(e.step, v.tag, v.simple_value) for e in events(workdir) for v in e.summary.value]


class TestRecords:
    def test_what_is_written_can_be_read(self, tmp_path):
        with Records(tmp_path, resume_step=-1) as records:
            records.write(0, {"loss": jnp.float32(5.5), "rate": np.float64(0.1)})
            records.write(jnp.int32(10), {"loss": 2})
        assert read_metrics(tmp_path) == [
            {"step": 0, "loss": 5.5, "rate": 0.1},
            {"step": 10, "loss": 2.0},
        ]
        assert scalars(tmp_path) == [
            (0, "loss", 5.5),
            (0, "rate", pytest.approx(0.1)),
            (10, "loss", 2.0),
        ]

    def test_a_line_is_in_the_file_when_write_returns(self, tmp_path):
        with Records(tmp_path, resume_step=-1) as records:
            for step in range(3):
                records.write(step, {"loss": step})
                assert [row["step"] for row in read_metrics(tmp_path)] == list(range(step + 1))

    def test_values_that_are_not_finite_keep_the_file_valid_json(self, tmp_path):
        with Records(tmp_path, resume_step=-1) as records:
            records.write(1, {"a": np.nan, "b": np.inf, "c": -jnp.inf})

        def refuse(constant):
            raise AssertionError(constant)

        line = (tmp_path / "metrics.jsonl").read_text()
        expected = {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
        assert json.loads(line, parse_constant=refuse) == expected
        (row,) = read_metrics(tmp_path)
        assert np.isnan(row["a"])
        assert (row["b"], row["c"]) == (np.inf, -np.inf)

    @pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1.0}', "\0\0\0"])
    def test_a_resumed_run_has_each_step_once(self, tmp_path, torn):
        with Records(tmp_path, resume_step=-1) as records:
            for step in range(5):
                records.write(step, {"loss": step})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(torn)
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
        with Records(tmp_path, resume_step=2) as records:
            for step in range(3, 6):
                records.write(step, {"loss": -step})
        assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
            *((0, 0), (1, 1), (2, 2)),
            *((3, -3), (4, -4), (5, -5)),
        ]
        starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
        assert starts[-1] == 3  # TensorBoard hides what earlier files have from here on

    def test_a_fresh_start_drops_everything(self, tmp_path):
        for _ in range(2):
            with Records(tmp_path, resume_step=-1) as records:
                records.write(0, {"loss": 1})
        assert read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}]

    def test_a_broken_line_is_left_out_with_a_warning(self, tmp_path, monkeypatch):
        messages = []
        monkeypatch.setattr(logging, "warning", lambda text, *args: messages.append(text % args))
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 1}\n\0\0\n[3]\n{"loss": 1}\n{"step": 2, "loss": 3}\n')
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
        assert messages == [f"{path}: line {n} is not a record and is left out" for n in (2, 3, 4)]

    def test_no_file_is_no_records(self, tmp_path):
        assert read_metrics(tmp_path) == []


class TestAtomicWrites:
    def test_files_are_replaced_as_a_whole(self, tmp_path):
        path = tmp_path / "a.json"
        write_json_atomic(path, {"x": [1, None]})
        assert json.loads(path.read_text()) == {"x": [1, None]}
        write_text_atomic(path, "ä\n")
        assert path.read_text() == "ä\n"
        assert os.listdir(tmp_path) == ["a.json"]

    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        path = tmp_path / "a.json"
        write_text_atomic(path, "old")
        with pytest.raises(TypeError):
            write_json_atomic(path, {"x": object()})

        def fail(*args):
            raise OSError(28, "No space left on device")

        for name in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                with pytest.raises(OSError, match="No space left"):
                    write_text_atomic(path, "new")
            assert path.read_text() == "old"
            assert os.listdir(tmp_path) == ["a.json"]

    def test_permissions_are_those_of_an_ordinary_file(self, tmp_path):
        write_text_atomic(tmp_path / "atomic", "x")
        (tmp_path / "plain").write_text("x")
        assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestWorkdir:
    def test_is_created_with_its_parents_and_left_empty(self, tmp_path, monkeypatch):
        assert open_workdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert open_workdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert os.listdir(tmp_path / "a" / "b") == []
        monkeypatch.setenv("HOME", str(tmp_path))
        assert open_workdir("~/c") == tmp_path / "c"
        monkeypatch.chdir(tmp_path)
        assert open_workdir("d") == tmp_path / "d"

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_file_in_the_way(self, tmp_path, name):
        (tmp_path / "file").write_text("x")
        with pytest.raises(NotADirectoryError, match=rf"--workdir: '{tmp_path / name}'"):
            open_workdir(tmp_path / name)

    def test_a_file_system_that_takes_no_files(self):
        if not Path("/proc/self").is_dir():
            pytest.skip("no /proc, the one place where even root cannot write")
        with pytest.raises(OSError, match=r"cannot be written .* --workdir: '/proc/here'"):
            open_workdir("/proc/here")
        with pytest.raises(OSError, match=r"cannot be written .* --workdir: '/proc'"):
            open_workdir("/proc")

    @pytest.mark.parametrize(
        ("number", "kind"), [(13, PermissionError), (30, OSError), (28, OSError)]
    )
    def test_a_directory_that_cannot_be_written(self, tmp_path, monkeypatch, number, kind):
        def fail(*args):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(epath.Path, "write_bytes", fail)
        with pytest.raises(kind, match=re.escape(os.strerror(number))) as error:
            open_workdir(tmp_path)
        assert error.value.errno == number
        assert error.value.filename == str(tmp_path)


class TestConfig:
    def test_written_the_first_time_and_accepted_again(self, tmp_path):
        check_config(tmp_path, CONFIG)
        assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["name"] == "lion"
        before = (tmp_path / "config.json").stat()
        check_config(tmp_path, CONFIG)
        assert (tmp_path / "config.json").stat().st_mtime_ns == before.st_mtime_ns

    def test_every_difference_is_listed(self, tmp_path):
        check_config(tmp_path, CONFIG)
        other = {"optimizer": {"name": "adamw", "betas": [0.9, 0.99]}, "steps": 10, "seed": None}
        with pytest.raises(ValueError, match="another --workdir") as error:
            check_config(tmp_path, other)
        assert [line for line in str(error.value).splitlines() if line.startswith("  ")] == [
            "  optimizer.name: workdir has 'lion', you asked for 'adamw'",
            "  log.every: workdir has 5, you asked for nothing",
            "  seed: workdir has nothing, you asked for None",
        ]
        assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["name"] == "lion"

    def test_free_entries_may_change_and_are_recorded(self, tmp_path):
        check_config(tmp_path, CONFIG)
        other = {**CONFIG, "steps": 20, "log": {"every": 1, "plot": True}}
        with pytest.raises(ValueError, match=r"log\.every"):
            check_config(tmp_path, other, free=["steps", "lo"])
        check_config(tmp_path, other, free=["steps", "log"])
        assert json.loads((tmp_path / "config.json").read_text())["steps"] == 20
        check_config(tmp_path, other)
        with pytest.raises(ValueError, match=r"optimizer\.name"):
            check_config(
                tmp_path, {**other, "optimizer": {"name": "sgd"}}, free=["optimizer.betas"]
            )

    def test_a_broken_file_is_named(self, tmp_path):
        (tmp_path / "config.json").write_text('{"steps": ')
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            check_config(tmp_path, CONFIG)


class TestPlot:
    def test_curves_baselines_and_labels(self):
        metrics = [*METRICS, {"step": 101, "loss": np.nan}, {"step": 102, "rate": 0.1}]
        ax = plot_loss(metrics, baselines={"unigram": 3.3, "lzma": 1.4})
        raw, smooth, validation, *levels = ax.get_lines()
        steps = np.arange(101)
        np.testing.assert_array_equal(raw.get_xdata(), steps)
        np.testing.assert_allclose(raw.get_ydata(), 1 + 4 * 0.9**steps)
        assert np.all(np.abs(smooth.get_ydata() - raw.get_ydata()) < 0.1)
        np.testing.assert_array_equal(validation.get_xdata(), steps[::10])
        assert [line.get_ydata()[0] for line in levels] == [3.3, 1.4]
        assert [text.get_text() for text in ax.texts] == ["unigram 3.30", "lzma 1.40"]
        assert ax.get_xlabel() == "training step"
        assert ax.get_ylabel() == "loss (nats per byte)"
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == ["training", "validation"]

    def test_labels_of_levels_close_together_make_room(self):
        ax = plot_loss(METRICS, baselines={"unigram": 3.3, "zlib": 1.5, "lzma": 1.4, "none": 9.0})
        assert [text.get_va() for text in ax.texts] == ["center", "bottom", "top", "center"]
        assert ax.get_ylim()[0] == 0
        assert ax.get_ylim()[1] > 9

    def test_the_smoothed_curve_is_a_mean_over_neighbours(self):
        noise = np.random.default_rng(0).normal(size=1000)
        metrics = [{"step": i, "loss": x} for i, x in enumerate(noise)]
        smooth = plot_loss(metrics, baselines={}).get_lines()[1].get_ydata()
        np.testing.assert_allclose(smooth[500], noise[480:521].mean())
        np.testing.assert_allclose(smooth[40], noise[30:51].mean())
        np.testing.assert_allclose(smooth[-1], noise[-21:].mean())
        np.testing.assert_allclose(smooth[0], noise[0])

    def test_drawn_into_given_axes(self):
        ax = plot_loss(METRICS, baselines={}).figure.add_subplot(3, 3, 1)
        assert plot_loss([], baselines={"zlib": 2.0}, measure="nats per token", ax=ax) is ax
        assert ax.get_ylabel() == "loss (nats per token)"

    def test_the_picture_needs_no_pyplot_and_says_nothing(self, tmp_path):
        with Records(tmp_path, resume_step=-1) as records:
            for row in METRICS:
                records.write(row["step"], {k: v for k, v in row.items() if k != "step"})
        code = (
            "import sys; from jaxref.train.records import save_loss_plot; "
            "save_loss_plot(sys.argv[1], baselines={'zlib': 2.0}); "
            "assert 'matplotlib.pyplot' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(Path(jaxref.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert not list(tmp_path.glob(".*"))

    def test_before_the_first_record(self, tmp_path):
        assert save_loss_plot(tmp_path, baselines={}) == tmp_path / "loss.png"
