import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxref.train import __main__ as cli
from jaxref.train.config import ROOMS
from jaxref.train.configs.default import get_config
from jaxref.train.records import read_metrics

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",  # as in conftest.py
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
CLI = [sys.executable, "-m", "jaxref.train"]


class TestModes:
    def test_train_then_evaluate_and_sample_from_the_workdir_alone(self, call, arguments, tmp_path):
        workdir = tmp_path / "run"
        changes = ("data.validation_fraction=0.2", "sample.temperature=0.0", "average_decay=0.5")
        command = arguments(workdir, *changes)
        code, out = call(*command)
        assert not code
        assert f"Working directory: {workdir}" in out
        final = read_metrics(workdir)[-1]["validation_loss"]

        assert "This run is finished (12 steps)" in call(*command)[1]
        code, out = call("--mode=eval", f"--workdir={workdir}")
        assert (code or 0, out[:33]) == (0, f"Step 12: validation {final:.3f} nats / ")
        text = (workdir / "sample.txt").read_bytes().decode()
        assert call("--mode=sample", f"--workdir={workdir}")[1] == text
        longer = call("--mode=sample", "--workdir", workdir, "--config.sample.length", "30")[1]
        assert longer.startswith(text[:-1])
        assert len(text) < len(longer) <= len(text) + 10  # bytes that are no text merge into one
        other = call("--mode=sample", f"--workdir={workdir}", "--config.sample.prompt=1e3 ")[1]
        assert other.startswith("1e3 ")

        in_4_bits = ("--config.quantize.method=round_to_nearest", "--config.quantize.bits=4")
        code, out = call("--mode=quantize", f"--workdir={workdir}", *in_4_bits)
        row = re.search(r"round_to_nearest-4bit +\d.* (\d+\.\d+) -> (\d+\.\d+) ", out)
        assert not code
        assert float(row[1]) == pytest.approx(final, abs=1e-4)
        code, out = call("--mode=eval", f"--workdir={workdir}", *in_4_bits)
        validated = re.match(r"Step 12, round_to_nearest-4bit: validation (\d+\.\d+) nats / ", out)
        assert not code
        assert float(validated[1]) == pytest.approx(float(row[2]), abs=1e-3)
        assert call("--mode=sample", f"--workdir={workdir}", *in_4_bits)[1].startswith("the ")
        code, _ = call("--mode=eval", f"--workdir={workdir}", "--config.quantize.method=int8")
        assert code.startswith("CheckpointError: ")
        assert "no quantized model int8-8bit, but round_to_nearest-4bit" in code

    def test_default_workdir_is_found_again_by_the_same_flags(
        self, call, arguments, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        changes = arguments("", "steps=2", "validate_every=2", "checkpoint_every=2")[1:]
        code, out = call(*changes)
        assert not code
        [workdir] = (tmp_path / "runs").iterdir()
        assert f"Working directory: {workdir}" in out
        assert call("--mode=eval", *changes)[1].startswith("Step 2: validation ")

    def test_home_directory(self, call, arguments, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        code, _ = call("--mode=eval", "--workdir=~/none")
        assert code == f"FileNotFoundError: {tmp_path}/none is not the working directory of a run"


class TestImages:
    DIGITS = (
        "--config=configs/digits.py",
        "--config.steps=6",
        "--config.batch_size=32",
        "--config.model.stages=(1,)",
        "--config.model.width=4",
        "--config.log_every=1",
        "--config.validate_every=3",
        "--config.checkpoint_every=3",
    )

    def test_train_then_evaluate_from_the_workdir_alone(self, call, tmp_path):
        workdir = tmp_path / "run"
        code, out = call(*self.DIGITS, f"--workdir={workdir}")
        assert not code
        assert "1,438 images of 8 x 8 x 1 to train on, 359 held out" in out
        assert "Model: ResNet with " in out
        assert "Training: 6 steps of 32 images, adamw, softmax_cross_entropy" in out
        assert f"Predictions: {workdir}/predictions.png" in out
        names = {path.name for path in workdir.iterdir() if ".tfevents." not in path.name}
        files = {"config.json", "metrics.jsonl", "starts.jsonl", "checkpoints"}
        assert names == files | {"loss.png", "predictions.png"}
        assert (workdir / "predictions.png").read_bytes().startswith(b"\x89PNG")

        rows = read_metrics(workdir)
        assert [row["step"] for row in rows] == list(range(1, 7))
        assert all(row["images_per_second"] > 0 for row in rows)
        validated = [row for row in rows if "validation_loss" in row]
        assert [row["step"] for row in validated] == [3, 6]
        accuracy = validated[-1]["validation_accuracy"]
        assert round(359 * accuracy) == pytest.approx(359 * accuracy, abs=1e-3)

        expected = (
            f"validation {validated[-1]['validation_loss']:.3f} nats / .* bits per image "
            rf"\(class frequencies 2.302 / 3.322\), {accuracy:.1%} right\n"
        )
        code, out = call("--mode=eval", f"--workdir={workdir}")
        assert not code
        assert re.fullmatch(f"Step 6: {expected}", out)
        assert re.search(
            rf"This run is finished \(6 steps\): {expected}",
            call(*self.DIGITS, f"--workdir={workdir}")[1],
        )
        (workdir / "predictions.png").unlink()  # as if killed before it was drawn
        assert "Predictions: " in call(*self.DIGITS, f"--workdir={workdir}")[1]
        code, _ = call("--mode=sample", f"--workdir={workdir}")
        assert code == "ConfigError: --mode=sample is for text, and data.name=digits is none"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (
                ["--config.data.name=digits"],
                r"ConfigError: model.name=Transformer is not a model of images, which "
                r"data.name=digits is: it takes no image_shape and no num_classes",
            ),
            (
                ["--config.model.name=ResNet"],
                r"ConfigError: model.name=ResNet is not a model of text, which "
                r"data.name=python_stdlib is: it takes no vocab_size and no max_length",
            ),
            (
                ["--config=configs/digits.py", "--config.data.name=images:/nowhere"],
                r"FileNotFoundError: there is no file /nowhere/train-images-idx3-ubyte",
            ),
            (
                ["--config.data.name=digit"],
                r"ConfigError: data.name must be python_stdlib, .* or series:FILE, got 'digit'",
            ),
        ],
    )
    def test_what_does_not_go_together_is_named(self, call, tmp_path, argv, message):
        code, _ = call(f"--workdir={tmp_path / 'run'}", *argv)
        assert re.match(message, code), code
        assert not (tmp_path / "run").exists()


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (
                ["--config.stps=3"],
                r"ConfigError: unknown configuration key 'stps'; did you mean st",
            ),
            (["--config.optimizer.name=lionn"], r"ConfigError: optimizer.name: .* did you mean li"),
            (["--config.optimizer.b7=1"], r"ConfigError: .* no argument 'b7'; did you mean b\d"),
            (["--config.loss.name=squentropi"], r"ConfigError: .* did you mean squentropy"),
            (["--config.steps=many"], r"ConfigError: steps must be int like its default 600"),
            (["--config.steps"], r"ConfigError: --config.steps needs a value"),
            (["--config=nothing.py"], r"ConfigError: --config: there is no file nothing.py"),
            (
                ["--config.data.name=text:/nowhere/*"],
                r"FileNotFoundError: text:/nowhere/\* matches",
            ),
            (["--config.mesh.data=3"], r"ValueError: mesh data=3 does not divide the 1 devices"),
            (["--config.batch_size=0"], r"ValueError: batch_size must be in"),
            (["steps=3"], r"unexpected argument 'steps=3'; --help shows what there is"),
            (
                ["--mode=eval", "--workdir=WORK"],
                r"FileNotFoundError: .* is not the working directo",
            ),
        ],
    )
    def test_one_line_that_says_what_is_wrong(self, call, tmp_path, argv, message):
        code, _ = call(f"--workdir={tmp_path / 'run'}", *argv)
        assert re.match(message, code), code
        assert "\n" not in code
        assert not (tmp_path / "run").exists()

    def test_errors_of_the_loss_at_the_first_step(self, call, arguments, tmp_path):
        code, _ = call(*arguments(tmp_path, "loss.name=squentropy", "loss.square_weight=heavy"))
        assert re.match(r"TypeError: square_weight must be a real number, got 'heavy'", code)

    def test_directory_of_another_run(self, call, arguments, tmp_path):
        changes = ("steps=2", "validate_every=2", "checkpoint_every=2")
        assert not call(*arguments(tmp_path, *changes))[0]
        code, _ = call(*arguments(tmp_path, *changes, "seed=5"))
        assert code.startswith("ValueError: ")
        assert "seed: workdir has 0, you asked for 5" in code

    def test_damaged_config_json(self, call, tmp_path):
        (tmp_path / "config.json").write_text("{")
        code, _ = call("--mode=sample", f"--workdir={tmp_path}")
        assert code.startswith("ConfigError: config.json of the workdir is not valid JSON")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--config.stps=3"], "ConfigError: unknown configuration key 'stps'; did you mean"),
            (
                ["--mode=fly"],
                "flag --mode=fly: value should be one of "
                "<train|eval|sample|quantize|align|unlearn|report>",
            ),
            (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ],
    )
    def test_exit_code_and_stderr(self, argv, message):
        result = subprocess.run([*CLI, *argv], capture_output=True, text=True, env=ENVIRONMENT)
        assert result.returncode == 1
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert message in result.stderr


class TestHelp:
    @pytest.mark.parametrize(
        "command", [CLI, [str(Path(sys.executable).with_name("jaxref-train"))]]
    )
    def test_shows_modes_keys_and_examples(self, command):
        if not Path(command[0]).exists():
            pytest.skip("the console script is not installed")
        for flag in ("--help", "--helpshort"):
            result = subprocess.run([*command, flag], capture_output=True, text=True)
            assert result.stderr == ""
            for text in (
                "python -m jaxref.train --mode=sample",
                "--config.optimizer.name=NAME",
                "--workdir:",
                "--mode: <train|eval|sample|quantize|align|unlearn|report>:",
                "--config:",
            ):
                assert text in result.stdout

    def test_keys_and_components_exist(self):
        """Every key is in the default configuration, or an argument of a component."""
        keys = set(re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", cli.__doc__))
        assert len(keys) > 5
        for key in keys:
            section, _, last = key.rpartition(".")
            node = get_config()
            for part in section.split(".") if section else ():
                node = node[part]
            assert last in node or section in ROOMS, key
        assert all(re.search(rf"\b{re.escape(section)}\b", cli.__doc__) for section in ROOMS)


def start(command, environment=ENVIRONMENT):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.mark.slow
def test_killed_at_random_moments(arguments, tmp_path):
    """SIGKILL twice, then SIGTERM: the run ends as one that nothing interrupted."""
    changes = (
        "steps=40",
        "checkpoint_every=5",
        "model.dropout=0.1",
        "average_decay=0.9",
        "validate_every=20",
    )
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    alone = start([*CLI, *arguments(uninterrupted, *changes)])
    draw = random.Random()
    for records in (draw.randint(1, 15), draw.randint(16, 25), draw.randint(26, 35)):
        process = start([*CLI, *arguments(killed, *changes)])
        while len(read_metrics(killed)) < records and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        last = records > 25
        process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
        out, err = process.communicate()
        assert "Traceback" not in err
        if last:
            assert process.returncode == 0, err
            assert re.search(r"Terminated and saved at step \d+|Sample \(", out)
        else:
            assert process.returncode == -signal.SIGKILL, err
    for process in (start([*CLI, *arguments(killed, *changes)]), alone):
        _, err = process.communicate()
        assert process.returncode == 0, err
    rows, expected = read_metrics(killed), read_metrics(uninterrupted)
    for row in rows + expected:
        assert row.pop("tokens_per_second") > 0
        assert min(row.pop(f"{kind}_seconds") for kind in ("input", "step", "save")) >= 0
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows == expected
    for name in ("sample.txt", "config.json"):
        assert (killed / name).read_bytes() == (uninterrupted / name).read_bytes()
    # The manifest has the fingerprint of every array, and of the input pipeline's position.
    manifests = [
        json.loads((workdir / "checkpoints" / "40" / "manifest" / "metadata").read_text())
        for workdir in (killed, uninterrupted)
    ]
    assert manifests[0] == manifests[1]
    assert len(manifests[0]["content"]["leaves"]) > 30


@pytest.mark.slow
def test_full_disk_is_one_error_without_traceback(arguments, tmp_path):
    limited = ["bash", "-c", 'ulimit -f 20 && exec "$@"', "bash", *CLI, *arguments(tmp_path)]
    process = start(limited, ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    _, err = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert re.search(r"CheckpointError: saving checkpoint 4 in .* failed: .*File too large", err)
    assert err.endswith("There is no earlier one.\n")
