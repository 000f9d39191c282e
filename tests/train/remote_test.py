"""Runs whose working directory is in an object store."""

import functools
import importlib.util
import json
import re
import threading
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from orbax.checkpoint._src.serialization import tensorstore_utils

from jaxref.train.checkpoints import CheckpointError, Checkpoints
from jaxref.train.places import place
from jaxref.train.records import Records, check_config, open_workdir, read_metrics, read_starts
from tests.train.object_store import Store


@functools.cache
def server(scheme):
    """One for all tests of a process: the clients stay with the first that they meet."""
    store = Store(scheme)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    return store


@pytest.fixture(params=["gs", "s3"])
def store(request, monkeypatch):
    pytest.importorskip({"gs": "gcsfs", "s3": "s3fs"}[request.param])
    store = server(request.param)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    yield store
    store.refused = None


@pytest.fixture
def address(store, request):
    """A place that no other test has looked at: the clients keep what they have listed."""
    return f"{store.scheme}://bucket/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"


def batches():
    return iter(grain.MapDataset.range(64).batch(2).to_iter_dataset())


def state_at(step):
    return {"w": jnp.arange(6.0) * step, "b": jnp.full(3, step, jnp.bfloat16)}


def save(checkpoints, *steps):
    """Saves states that tell their steps, with iterators that do."""
    for step in steps:
        iterator = batches()
        for _ in range(step):
            next(iterator)
        checkpoints.save(step, state_at(step), iterator, config={"width": 6}, blocking=True)


def restored(checkpoints):
    """The step of the checkpoint that is restored, whose content is checked."""
    iterator = batches()
    state, step = checkpoints.restore(state_at(0), iterator)
    for name, expected in state_at(step).items():
        assert np.asarray(state[name]).tobytes() == np.asarray(expected).tobytes()
    np.testing.assert_array_equal(next(iterator), [2 * step, 2 * step + 1])
    return step


class TestPlace:
    def test_a_local_path_becomes_absolute(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/someone")
        assert place("runs/../a") == tmp_path / "a"
        assert str(place("~/a")) == "/home/someone/a"

    def test_another_store_is_refused_and_what_would_do_is_said(self):
        with pytest.raises(
            ValueError, match=r"'az://bucket/run' is no place .* gs://BUCKET/PATH and s3://BUCKET"
        ):
            place("az://bucket/run")
        with pytest.raises(ValueError, match="no place"):
            Checkpoints("az://bucket/run")

    @pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
    def test_a_missing_package_is_named_with_its_extra(self, scheme, package, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=rf"{package}: pip install 'jaxref\[remote\]'"):
            place(f"{scheme}://bucket/run")

    def test_the_server_of_amazon_s3_is_that_of_the_environment(self, monkeypatch):
        pytest.importorskip("s3fs")
        for name in server("s3").environment:
            monkeypatch.delenv(name, raising=False)
        place("s3://bucket/run")
        build = tensorstore_utils.build_kvstore_tspec
        of_amazon = {"driver": "s3", "bucket": "bucket", "path": "run/1"}
        assert build("s3://bucket/run/1")["base"] == of_amazon
        assert build("s3://bucket/run/1", use_ocdbt=False) == of_amazon
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://server")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "here")
        expected = {**of_amazon, "endpoint": "http://server", "aws_region": "here"}
        assert build("s3://bucket/run/1")["base"] == expected


class TestCheckpoints:
    def test_the_newest_is_restored_and_old_ones_are_deleted(self, store, address):
        with Checkpoints(address, keep=2) as checkpoints:
            assert checkpoints.restore(state_at(0), batches()) is None
            save(checkpoints, 1, 2, 3)
            assert restored(checkpoints) == 3
        with Checkpoints(address, keep=2) as checkpoints:
            assert checkpoints.all_steps() == [2, 3]
            assert restored(checkpoints) == 3
        assert {name.partition("/")[0] for name in store.below(address)} == {"2", "3"}

    @pytest.mark.slow
    def test_whenever_a_process_is_killed_a_complete_one_is_restored(self, store, address):
        """The store as it was after each single change, to which another process comes."""
        bucket = store.key(address)
        before = len(store.changes)
        with Checkpoints(address, keep=1) as checkpoints:
            save(checkpoints, 1, 2)
        changes = [(name.removeprefix(bucket), data) for name, data in store.changes[before:]]
        seen = []
        for moment in range(len(changes) + 1):
            copy = f"{bucket}-{moment}"
            for name, data in changes[:moment]:
                store.delete(copy + name) if data is None else store.put(copy + name, data)
            with Checkpoints(f"{store.scheme}://{copy}") as checkpoints:
                latest = checkpoints.latest_step()
                assert latest == (None if latest is None else restored(checkpoints))
            if moment % 10 == 5:  # and it goes on from there
                with Checkpoints(f"{store.scheme}://{copy}") as checkpoints:
                    save(checkpoints, 3)
                with Checkpoints(f"{store.scheme}://{copy}") as checkpoints:
                    assert restored(checkpoints) == 3
                    steps = {
                        int(name.partition("/")[0])
                        for name in store.below(f"{store.scheme}://{copy}")
                    }
                    assert steps == set(checkpoints.all_steps())  # what was unfinished is deleted
            seen.append(latest)
        assert seen == sorted(seen, key=lambda step: step or 0)
        assert set(seen) == {None, 1, 2}

    def test_damaged_ones_are_moved_aside(self, store, address, warnings):
        with Checkpoints(address, keep=4) as checkpoints:
            save(checkpoints, 1, 2, 3, 4)
        for part in ("2/manifest/metadata", "3/state/manifest.ocdbt", "4/state/d/"):
            (name,) = (name for name in store.below(address) if name.startswith(part))
            key = f"{store.key(address)}/{name}"
            data = bytearray(store.objects[key][0])
            data[len(data) // 2] ^= 8
            store.put(key, bytes(data))
        with Checkpoints(address, keep=4) as checkpoints:
            assert restored(checkpoints) == 1
            assert len(warnings) == 3
            save(checkpoints, 2)
        with Checkpoints(address, keep=4) as checkpoints:
            assert restored(checkpoints) == 2
        places = {name.partition("/")[0] for name in store.below(address)}
        assert places == {"1", "2", "damaged-2", "damaged-3", "damaged-4"}

    def test_what_cannot_be_written_is_said_and_the_earlier_one_survives(self, store, address):
        with Checkpoints(address) as checkpoints:
            save(checkpoints, 1)
            store.refused = r"/2/state/"
            with pytest.raises(
                CheckpointError, match=r"(?s)saving checkpoint 2 .* newest one is 1"
            ):
                save(checkpoints, 2)
            store.refused = None
            assert restored(checkpoints) == 1
            save(checkpoints, 2)
            assert restored(checkpoints) == 2

    def test_a_connection_that_is_lost_is_no_damage(self, store, address, monkeypatch):
        says = {"gs": "UNAVAILABLE: Error opening", "s3": "Could not connect to the endpoint URL"}

        def fail(*args, **kwargs):
            raise ValueError(says[store.scheme])

        with Checkpoints(address) as checkpoints:
            save(checkpoints, 1, 2)
            monkeypatch.setattr(checkpoints._manager, "restore", fail)
            with pytest.raises(ValueError, match=says[store.scheme]):
                checkpoints.restore(state_at(0), batches())
        assert {name.partition("/")[0] for name in store.below(address)} == {"1", "2"}


class TestRecords:
    def test_they_are_there_when_a_checkpoint_is_saved_and_no_step_twice(self, store, address):
        for resume_step, steps in ((-1, range(1, 6)), (3, range(4, 7))):
            records = Records(address, resume_step=resume_step)  # and never closed
            records.write_start({"process": resume_step})
            for step in steps:
                records.write(step, {"loss": step + resume_step})
                if step == 4:
                    records.flush()
        assert [(row["step"], row["loss"]) for row in read_metrics(address)] == [
            *((1, 0), (2, 1), (3, 2), (4, 7)),
        ]
        assert [row["step"] for row in read_starts(address)] == [0, 3]
        assert any(name.startswith("events.out.tfevents.") for name in store.below(address))
        records.close()
        assert read_metrics(address)[-1]["step"] == 6

    def test_the_working_directory(self, store, address):
        assert str(open_workdir(address)) == address
        assert store.below(address) == {}
        check_config(address, {"steps": 3})
        with pytest.raises(ValueError, match="steps: workdir has 3, you asked for 4"):
            check_config(address, {"steps": 4})
        store.refused = "."
        with pytest.raises(OSError, match=r"(?s)cannot be written .*--workdir: '..://bucket/"):
            open_workdir(address)


@pytest.mark.slow
def test_the_whole_program(store, address, call, arguments, monkeypatch):
    def trace(directory, **_):
        (Path(directory) / "plugins").mkdir()
        (Path(directory) / "plugins" / "trace").write_text("of two steps")

    monkeypatch.setattr(jax.profiler, "start_trace", trace)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    command = arguments(address, "steps=4", "checkpoint_every=2", "validate_every=2")
    code, out = call(*command, "--profile=2:2")
    assert not code, code
    assert f"Working directory: {address}" in out
    objects = store.below(address)
    assert json.loads(objects["config.json"])["steps"] == 4
    root = f"{store.key(address)}/"
    moments = {name.removeprefix(root): i for i, (name, _) in enumerate(store.changes)}
    before = [
        data
        for name, data in store.changes[: moments["checkpoints/2/commit_success.txt"]]
        if name == f"{root}metrics.jsonl"
    ]
    assert b'"step": 2,' in before[-1]  # no record is lost when a process is killed thereafter
    assert [row["step"] for row in read_metrics(address)] == [1, 2, 3, 4]
    assert objects["loss.png"].startswith(b"\x89PNG")
    assert {name.split("/")[1] for name in objects if name.startswith("checkpoints/")} == {"2", "4"}
    assert objects["profile/plugins/trace"] == b"of two steps"
    assert "This run is finished (4 steps)" in call(*command)[1]
    assert call("--mode=eval", f"--workdir={address}")[1].startswith("Step 4: validation ")
    text = objects["sample.txt"].decode()
    assert call("--mode=sample", f"--workdir={address}")[1] == text
    in_4_bits = ("--config.quantize.method=round_to_nearest", "--config.quantize.bits=4")
    code, out = call("--mode=quantize", f"--workdir={address}", *in_4_bits)
    assert not code, code
    assert "round_to_nearest-4bit" in out
    quantized = store.below(f"{address}/quantized/round_to_nearest-4bit")
    written = sum(len(data) for name, data in quantized.items() if name.startswith("1/state/"))
    assert json.loads(quantized["result.json"])["bytes_on_disk"] == written
    code, out = call("--mode=eval", f"--workdir={address}", *in_4_bits)
    assert out.startswith("Step 4, round_to_nearest-4bit: validation ")
    assert not call("--mode=report", f"--workdir={address}")[0]
    assert b"<html" in store.below(address)["report.html"]
    assert (
        "no quantized model"
        in call("--mode=eval", f"--workdir={address}", "--config.quantize.method=int8")[0]
    )
    objects = store.below(address)  # as a process leaves them that is killed after two steps
    for name in objects:
        if name.startswith(("checkpoints/4/", "sample.txt")):
            store.delete(root + name)
    fsspec_backend.fs(address).invalidate_cache()  # of a process before
    assert "Continuing after step 2" in call(*command)[1]
    assert store.below(address)["sample.txt"].decode() == text
    assert [row["step"] for row in read_metrics(address)] == [1, 2, 3, 4]
