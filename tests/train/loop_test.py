import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from tensorboardX.proto.event_pb2 import Event

from jaxref.train import loop, program
from jaxref.train.checkpoints import CheckpointError
from jaxref.train.config import ConfigError
from jaxref.train.records import read_metrics

# Runs are compared bit for bit with those of fixtures and of other processes.
pytestmark = pytest.mark.optimized

# Everything that has a state: accumulation, keys, average, moments.
OVERRIDES = ("model.dropout=0.1", "accumulate=2", "average_decay=0.9", "seed=3")


def train(config, workdir):
    """Trains, and returns what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(config, workdir)
    return out.getvalue()


def final_state(config, workdir):
    corpus = loop.load(config)
    built = program.build(config, corpus.vocab_size)
    return loop.restore(config, corpus, built, workdir)


def assert_same_run(config, workdir, expected_workdir):
    """The same bits in the last checkpoint, the same records, the same text."""
    state, step = final_state(config, workdir)
    expected, expected_step = final_state(config, expected_workdir)
    assert step == expected_step == config.steps
    for a, e in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()
    assert records(workdir) == records(expected_workdir)
    assert (workdir / "sample.txt").read_bytes() == (expected_workdir / "sample.txt").read_bytes()


def records(workdir):
    """The metrics without their speed and times."""
    rows = read_metrics(workdir)
    for row in rows:
        assert row.pop("tokens_per_second") > 0
        assert min(row.pop(f"{kind}_seconds") for kind in ("input", "step", "save")) >= 0
    return rows


def events(workdir):
    """The (step, name, value) of all TensorBoard event files, from their TFRecords."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            position += 12 + length + 4
    return found


@pytest.fixture(autouse=True)
def one_device(devices):
    """All runs of this file are on the first of the eight devices."""


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(*OVERRIDES)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """The working directory of a run that nothing interrupted, and what it printed."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = program.make_mesh
        patch.setattr(program, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))
        return workdir, train(config, workdir)


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of that directory."""
    return shutil.copytree(uninterrupted[0], tmp_path / "copy")


@pytest.fixture
def at_record(monkeypatch):
    """`at_record(step, action)`: once, just after the record of this step is written."""

    def install(step, action):
        write, pending = loop.Records.write, [action]

        def written(self, now, metrics):
            write(self, now, metrics)
            if now == step and pending:
                pending.pop()()

        monkeypatch.setattr(loop.Records, "write", written)

    return install


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: messages.append(text % args))
    return messages


class Killed(BaseException):
    """Ends a run as no handler expects."""


def kill():
    raise Killed


def terminate(number=signal.SIGTERM):
    assert threading.current_thread() is threading.main_thread()
    os.kill(os.getpid(), number)


class TestFinishedRun:
    def test_what_is_printed(self, uninterrupted):
        workdir, out = uninterrupted
        first, data, model, training, *_ = out.splitlines()
        assert first == f"Working directory: {workdir}"
        assert data.startswith("Data: text of ")
        assert "tokens to train on" in data
        assert "Transformer with 10," in model
        assert "on 1 cpu device" in model
        assert training.startswith("Training: 12 steps of 128 tokens, adamw, ")
        assert out.endswith(f":\n{(workdir / 'sample.txt').read_bytes().decode()}")

    def test_metrics(self, config, uninterrupted):
        rows = records(uninterrupted[0])
        assert [row["step"] for row in rows] == list(range(1, 13))
        names = {"step", "loss", "gradient_norm", "learning_rate", "nonfinite_steps"}
        assert all(set(row) - {"validation_loss"} == names for row in rows)
        assert [row["step"] for row in rows if "validation_loss" in row] == [6, 12]
        assert rows[-1]["loss"] < rows[0]["loss"]
        schedule = program.build_schedule(config)
        rates = [row["learning_rate"] for row in rows]
        np.testing.assert_allclose(rates, [schedule(i) for i in range(12)], rtol=1e-6)

    def test_files(self, config, uninterrupted):
        workdir, _ = uninterrupted
        assert json.loads((workdir / "config.json").read_text()) == config.to_dict()
        assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8", "12"}
        picture = (workdir / "loss.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", picture[16:24])
        assert (width, height) == (1200, 672)
        assert 10_000 < len(picture) < 200_000
        text = (workdir / "sample.txt").read_bytes().decode(errors="replace")
        assert text.startswith("the ")
        assert text.endswith("\n")
        assert 10 < len(text) <= 25

    def test_tensorboard_has_the_metrics(self, uninterrupted):
        workdir, _ = uninterrupted
        rows = [
            (row["step"], name, np.float32(value))
            for row in read_metrics(workdir)
            for name, value in row.items()
            if name != "step"
        ]
        assert events(workdir) == rows

    def test_says_that_it_is_finished_and_does_nothing(self, config, finished):
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
        out = train(config, finished)
        final = read_metrics(finished)[-1]["validation_loss"]
        assert f"This run is finished (12 steps): validation {final:.3f} nats / " in out
        assert "Sample" not in out
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before

    def test_says_so_also_without_its_metrics(self, config, finished):
        final = read_metrics(finished)[-1]["validation_loss"]
        (finished / "metrics.jsonl").unlink()
        assert f"validation {final:.3f} nats / " in train(config, finished)

    def test_killed_before_its_sample_was_written(self, config, uninterrupted, finished):
        for name in ("sample.txt", "loss.png"):
            (finished / name).unlink()
        train(config, finished)
        assert (finished / "loss.png").exists()
        assert_same_run(config, finished, uninterrupted[0])


class TestEvaluation:
    def test_evaluate_prints_the_last_validation_loss(self, config, uninterrupted, capsys):
        loop.evaluate(config, uninterrupted[0])
        final = read_metrics(uninterrupted[0])[-1]["validation_loss"]
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(
            f"Step 12: validation {final:.3f} nats / {final / math.log(2):.3f} bits per byte "
        )
        assert all(f"{name} " in line for name in ("unigram", "zlib", "lzma"))

    def test_sample_is_that_of_the_run(self, config, uninterrupted, capsys):
        loop.print_sample(config, uninterrupted[0])
        text = (uninterrupted[0] / "sample.txt").read_bytes()
        assert capsys.readouterr().out == text.decode()

    @pytest.mark.parametrize("function", [loop.evaluate, loop.print_sample])
    def test_without_checkpoint(self, config, function, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no checkpoint yet; train first"):
            function(config, tmp_path)

    def test_average_is_what_is_evaluated(self, config, uninterrupted):
        corpus = loop.load(config)
        built = program.build(config, corpus.vocab_size)
        state, _ = loop.restore(config, corpus, built, uninterrupted[0])
        validation = loop.Validation(config, corpus, built)
        plain = validation.loss(state._replace(average=None))
        average = validation.loss(state)
        assert average == validation.loss(state._replace(average=None, params=state.average))
        assert abs(average - plain) > 1e-3
        assert average == read_metrics(uninterrupted[0])[-1]["validation_loss"]


class TestResumedRun:
    @pytest.mark.parametrize("step", [3, 8, 11])
    def test_killed(self, config, uninterrupted, tmp_path, at_record, step):
        """Before the first checkpoint, in the step of one, and between two."""
        at_record(step, kill)
        with pytest.raises(Killed):
            train(config, tmp_path)
        out = train(config, tmp_path)
        newest = (step - 1) // 4 * 4
        assert (f"Continuing after step {newest}." in out) == (newest > 0)
        assert_same_run(config, tmp_path, uninterrupted[0])

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_terminated(self, config, uninterrupted, tmp_path, at_record, number):
        handler = signal.getsignal(number)
        at_record(6, lambda: terminate(number))
        out = train(config, tmp_path)
        step = int(re.search(r"Terminated and saved at step (\d+). The same", out)[1])
        assert step in (6, 7)  # the signal comes when the step is nearly over
        assert not (tmp_path / "sample.txt").exists()
        assert signal.getsignal(number) is handler
        out = train(config, tmp_path)
        assert f"Continuing after step {step}." in out
        assert_same_run(config, tmp_path, uninterrupted[0])

    def test_terminated_at_the_last_step(self, config, uninterrupted, tmp_path, at_record):
        at_record(12, terminate)
        assert "Sample (" in train(config, tmp_path)
        assert_same_run(config, tmp_path, uninterrupted[0])

    def test_how_often_to_log_and_save_may_change(self, tiny_config, config, finished, tmp_path):
        shutil.rmtree(finished / "checkpoints" / "12")
        (finished / "sample.txt").unlink()
        changed = tiny_config(*OVERRIDES, "log_every=5", "checkpoint_every=3", "keep_checkpoints=5")
        train(changed, finished)
        assert [row["step"] for row in read_metrics(finished)] == [*range(1, 9), 10, 12]
        assert (finished / "checkpoints" / "9").exists()
        assert json.loads((finished / "config.json").read_text()) == changed.to_dict()

    def test_another_configuration(self, tiny_config, finished):
        changed = tiny_config(*OVERRIDES, "seed=4", "optimizer.name=lion")
        with pytest.raises(ValueError, match=r"another configuration") as error:
            train(changed, finished)
        assert "seed: workdir has 3, you asked for 4" in str(error.value)
        assert "optimizer.name: workdir has 'adamw', you asked for 'lion'" in str(error.value)
        assert "steps" not in str(error.value)


def test_statistics_are_resumed_as_they_were(tiny_config, tmp_path, at_record):
    """Those that the forward pass moves, and those that the backward pass does."""
    norms = ("norm.name=power_norm", "norm.warmup_steps=3", "final_norm.name=batch_norm")
    config = tiny_config(*(f"model.{choice}" for choice in norms), "steps=6", "average_decay=0.9")
    train(config, tmp_path / "whole")
    at_record(6, kill)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed")
    assert "Continuing after step 4." in train(config, tmp_path / "killed")
    assert_same_run(config, tmp_path / "killed", tmp_path / "whole")
    state, _ = final_state(config, tmp_path / "killed")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.model_state))
    corpus = loop.load(config)
    validation = loop.Validation(config, corpus, loop.build_program(config, corpus))
    assert validation.loss(state) == read_metrics(tmp_path / "whole")[-1]["validation_loss"]


class TestDamage:
    def damage(self, workdir, step):
        """Turns around bytes in the middle of the largest file of a checkpoint."""
        files = [p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 64] = bytes(255 - b for b in data[middle : middle + 64])
        largest.write_bytes(data)

    def test_newest_checkpoint(self, config, uninterrupted, finished, warnings):
        self.damage(finished, 12)
        out = train(config, finished)
        [warning] = [text for text in warnings if text.startswith("Damaged checkpoint")]
        assert str(finished / "checkpoints" / "12") in warning
        assert "Continuing after step 8." in out
        assert_same_run(config, finished, uninterrupted[0])

    def test_all_checkpoints(self, config, finished):
        for step in (4, 8, 12):
            self.damage(finished, step)
        metrics = (finished / "metrics.jsonl").read_bytes()
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read:\n  12: "):
                train(config, finished)
        assert (finished / "metrics.jsonl").read_bytes() == metrics

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_disk_full(self, config, uninterrupted, tmp_path, at_record, monkeypatch):
        """Files can grow to 20 kB only, once the first checkpoint is there."""
        _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        opened = []

        def fill():
            opened[-1].wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

        enter = loop.Checkpoints.__enter__
        monkeypatch.setattr(
            loop.Checkpoints,
            "__enter__",
            lambda self: opened.append(self) or enter(self),
        )
        at_record(6, fill)
        try:
            with pytest.raises(CheckpointError, match=r"saving checkpoint 8 .* failed: ") as error:
                train(config, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(error.value).endswith("The newest one is 4.")
        assert "Continuing after step 4." in train(config, tmp_path)
        assert_same_run(config, tmp_path, uninterrupted[0])


class TestNonFinite:
    def poisoned(self, monkeypatch, value):
        """Programs that begin with a value in the MLP of the first block."""
        build = loop.build

        def poisoned_build(*args, **kwargs):
            built = build(*args, **kwargs)

            def init(key):
                state = built.init(key)
                up = state.params["blocks"][0]["mlp"]["function"]["up"]
                up["kernel"] = up["kernel"].at[0, 0].set(value)
                return state

            return built._replace(init=init)

        monkeypatch.setattr(loop, "build", poisoned_build)

    def test_run_stops_with_the_path_of_the_parameter(self, tiny_config, tmp_path, monkeypatch):
        self.poisoned(monkeypatch, np.nan)
        config = tiny_config("max_nonfinite_steps=3")
        with pytest.raises(loop.NonFiniteError) as error:
            train(config, tmp_path)
        assert str(error.value) == (
            "3 steps in a row had a gradient that is not finite; stopped after step 3. "
            "Parameters that are not finite: blocks/0/mlp/function/up/kernel"
        )

    def test_fewer_in_a_row_are_counted_only(self, tiny_config, tmp_path, monkeypatch):
        """The loss is infinite in about every second step."""
        built = program.build(tiny_config(), 256)
        make_step = program.make_step

        def failing(problem, *args, **kwargs):
            def sometimes(params, batch, key):
                step_key = jax.random.key_data(key)[0]
                losses = problem.token_losses(params, batch, key)
                return losses * jnp.where(step_key % 2 == 0, 1.0, jnp.inf)

            return make_step(problem._replace(token_losses=sometimes), *args, **kwargs)

        monkeypatch.setattr(program, "make_step", failing)
        config = tiny_config("max_nonfinite_steps=12")
        train(config, tmp_path)
        rows = records(tmp_path)
        skipped = [not math.isfinite(row["gradient_norm"]) for row in rows]
        assert 0 < sum(skipped) < 12
        assert [row["nonfinite_steps"] for row in rows] == np.cumsum(skipped).tolist()
        state, _ = loop.restore(config, loop.load(config), built, tmp_path)
        assert int(state.nonfinite) == sum(skipped)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


class TestTokens:
    @pytest.fixture
    def tokens(self, tmp_path):
        path = tmp_path / "ids.bin"
        (np.arange(4000) % 37 + 300).astype("<u2").tofile(path)
        return [f"data.name=tokens:{path}", "data.vocab_size=400"]

    def test_sample_is_ids(self, tiny_config, tokens, tmp_path):
        config = tiny_config(*tokens, "sample.prompt=300 301 302")
        out = train(config, tmp_path / "run")
        ids = (tmp_path / "run" / "sample.txt").read_text().split()
        assert ids[:3] == ["300", "301", "302"]
        assert len(ids) == 23
        assert "nats" in out
        assert "bits per token (unigram" in train(config, tmp_path / "run")
        assert "zlib" not in out

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ([], r"sample.prompt must be token ids .* got 'the '"),
            (["sample.prompt="], r"prompt must be \[n\] with at least one token"),
            (["sample.prompt=1 400"], r"prompt must be in \[0, 399\]"),
        ],
    )
    def test_prompt_is_checked_before_the_training(
        self, tiny_config, tokens, tmp_path, overrides, message
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_config(*tokens, *overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "error", "message"),
        [
            (
                ["data.name=text:/nowhere/*.py"],
                FileNotFoundError,
                r"text:/nowhere/\*.py matches no",
            ),
            (["data.name=text:EMPTY"], ValueError, r"matches only empty files"),
            (["data.name=tokens:ODD"], ValueError, r"odd.bin has the odd size 7"),
            (["data.name=tokens:/nowhere"], FileNotFoundError, r"/nowhere"),
            (["data.name=wiki"], ConfigError, r"python_stdlib, text:GLOB, .* got 'wiki'"),
            (["data.vocab_size=100"], ValueError, r"below vocab_size 100, got 1\d\d at position"),
            (["data.validation_fraction=0.0"], ValueError, r"at least one window .* got 0"),
            (["length=100000"], ValueError, r"at least one window"),
            (["validation_tokens=15"], ValueError, r"max_tokens must be at least length = 16"),
            (["sample.prompt="], ValueError, r"prompt must be \[n\] with at least one token"),
            (["sample.length=0"], ValueError, r"length must be in \[1, inf\)"),
            (["sample.temperature=-1"], ValueError, r"temperature must be in \[0, inf\)"),
            (["sample.top_p=0.0"], ValueError, r"top_p must be in \(0, 1\], got 0"),
            (["sample.cache=half"], ValueError, r"cache must be 'full' or 'staircase', got 'half'"),
            (["model.architecture=encoder"], ValueError, r"sees what follows: it cannot generate"),
            (["seed=-1"], ValueError, r"seed must be in"),
            (["optimizer.name=lionn"], ConfigError, r"did you mean lion"),
        ],
    )
    def test_named_before_anything_is_written(
        self, tiny_config, tmp_path, overrides, error, message
    ):
        (tmp_path / "empty.txt").touch()
        (tmp_path / "odd.bin").write_bytes(b"7 bytes")
        names = {"EMPTY": str(tmp_path / "*.txt"), "ODD": str(tmp_path / "odd.bin")}
        for name, path in names.items():
            overrides = [override.replace(name, path) for override in overrides]
        with pytest.raises(error, match=message):
            train(tiny_config(*overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_workdir_is_a_file(self, config, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"cannot be written .* choose another with --workdir"):
            train(config, tmp_path / "file")

    def test_workdir_cannot_be_written(self, config, tmp_path):
        workdir = tmp_path / "run"
        if os.geteuid() == 0:  # whom permissions do not stop
            workdir = "/proc/run"
        else:
            workdir.mkdir(mode=0o500)
        with pytest.raises(OSError, match=r"cannot be written .* choose another with --workdir"):
            train(config, workdir)

    def test_keep_no_checkpoints(self, tiny_config, tmp_path):
        with pytest.raises(ValueError, match=r"keep_checkpoints must be in \[1, inf\), got 0"):
            train(tiny_config("keep_checkpoints=0"), tmp_path)


def test_default_workdir_is_one_for_each_configuration(tiny_config):
    first = loop.default_workdir(tiny_config())
    assert first.parts[0] == "runs"
    assert first.name.startswith("text-adamw-")
    assert loop.default_workdir(tiny_config("log_every=7", "sample.length=3")) == first
    assert loop.default_workdir(tiny_config("seed=7")) != first
