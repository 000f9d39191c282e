"""Runs whose working directory is in an object store: a server on this machine that speaks as much
of Google Cloud Storage's JSON API as orbax, tensorstore and gcsfs ask for. Its objects are whole,
listed by prefix, and cannot be renamed or appended to."""

import base64
import hashlib
import importlib.util
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.train.checkpoints import CheckpointError, Checkpoints
from jaxref.train.places import place
from jaxref.train.records import Records, check_config, open_workdir, read_metrics, read_starts

if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("gcsfs is not installed", allow_module_level=True)


class Store(ThreadingHTTPServer):
    """A server of objects.

    Attributes:
      objects: data and generation of each, by "BUCKET/NAME".
      changes: every object that was written, with its data, or deleted, with None, in this order.
      refused: a pattern of the names that may not be written, or None.
      environment: with which the clients find the server, and look for no credentials.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects = {}
        self.changes = []
        self.refused = None
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.uploads = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.environment = {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def handle_error(self, request, client_address):
        """Clients leave when another of their requests was quicker."""

    def put(self, key, data):
        self.changes.append((key, data))
        self.objects[key] = (data, next(self.generations))

    def delete(self, key):
        self.changes.append((key, None))
        del self.objects[key]

    def below(self, address):
        """The objects whose names start with `gs://BUCKET/.../`, by the rest of it."""
        start = address.removeprefix("gs://") + "/"
        return {
            name.removeprefix(start): data
            for name, (data, _) in sorted(self.objects.items())
            if name.startswith(start)
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: in two, the second waits for the first to be noticed

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.respond()

    do_POST = do_PUT = do_DELETE = do_GET

    def respond(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with self.server.lock:
            status, headers, content = self.answer(self.command, url.path, query, body)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, method, path, query, body):
        """Status, headers and content; the paths are those of the JSON API."""
        if path == "/batch/storage/v1":
            return self.batch(body)
        if path.startswith("/upload/"):
            return self.upload(method, path, query, body)
        match = re.fullmatch(
            r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?"
            r"(?:/(rewriteTo|moveTo)(?:/b/([^/]+))?/o/(.+))?",
            path,
        )
        if match is None:
            return 501, {}, {"error": {"code": 501, "message": f"{method} {path}"}}
        bucket, name, how, to_bucket, to_name = (part and unquote(part) for part in match.groups())
        key = f"{bucket}/{name}"
        objects = self.server.objects
        if name is None:
            return self.list(bucket, query) if path.endswith("/o") else (200, {}, {"name": bucket})
        if key not in objects:
            return 404, {}, {"error": {"code": 404, "message": f"No such object: {key}"}}
        data, generation = objects[key]
        if method == "DELETE":
            self.server.delete(key)
            return 204, {}, b""
        if how is not None:
            to = f"{to_bucket or bucket}/{to_name}"
            self.server.put(to, data)
            if how == "moveTo":
                self.server.delete(key)
                return 200, {}, self.resource(to)
            return 200, {}, {"done": True, "resource": self.resource(to)}
        if query.get("alt") != "media":
            return 200, {}, self.resource(key)
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, b""
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return 200, headers, data
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return 416, headers, b""
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return 206, headers, data[start : end + 1]

    def list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found, below = [], set()
        for key in sorted(self.server.objects):
            name = key.removeprefix(f"{bucket}/")
            if key == name or not name.startswith(prefix):
                continue
            head, separator, _ = name[len(prefix) :].partition(delimiter or "\0")
            if delimiter and separator:
                below.add(prefix + head + separator)
            else:
                found.append(self.resource(key))
        return 200, {}, {"kind": "storage#objects", "items": found, "prefixes": sorted(below)}

    def upload(self, method, path, query, body):
        bucket = unquote(path.split("/")[5])
        if query["uploadType"] == "resumable":
            if method == "POST" and "upload_id" not in query:
                number = str(len(self.server.uploads))
                self.server.uploads[number] = (f"{bucket}/{query['name']}", bytearray())
                url = f"{self.server.url}{path}?uploadType=resumable&upload_id={number}"
                return 200, {"Location": url}, {}
            key, data = self.server.uploads[query["upload_id"]]
            data += body
            total = self.headers.get("Content-Range", "/0").rpartition("/")[2]
            if total == "*" or len(data) < int(total):
                return 308, {"Range": f"bytes=0-{len(data) - 1}"}, b""
            return self.written(key, bytes(data), query)
        if query["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, description, content, _ = re.split(rb"\r?\n?--" + re.escape(boundary), body)
            name = json.loads(re.split(rb"\r?\n\r?\n", description, maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            return self.written(f"{bucket}/{name}", body, query)
        return self.written(f"{bucket}/{query['name']}", body, query)

    def written(self, key, data, query):
        if self.server.refused and re.search(self.server.refused, key):
            return 403, {}, {"error": {"code": 403, "message": f"no writing of {key}"}}
        _, generation = self.server.objects.get(key, (b"", 0))
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return 412, {}, {"error": {"code": 412, "message": "the generation is another"}}
        self.server.put(key, data)
        return 200, {}, self.resource(key)

    def resource(self, key):
        data, generation = self.server.objects[key]
        bucket, _, name = key.partition("/")
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def batch(self, body):
        boundary = "answers"
        parts = []
        for path in re.findall(rb"DELETE (\S+) HTTP", body):
            status, _, _ = self.answer("DELETE", path.decode(), {}, b"")
            parts.append(
                f"--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} x\r\n\r\n"
            )
        content = "".join(parts) + f"--{boundary}--"
        return 200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, content.encode()


@pytest.fixture(scope="module")
def store():
    store = Store()
    threading.Thread(target=store.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store
    store.shutdown()


@pytest.fixture
def address(store, request):
    """A place that no other test has looked at: the clients keep what they have listed."""
    yield f"gs://bucket/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"
    store.refused = None


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
        with pytest.raises(ValueError, match=r"'s3://bucket/run' is no place .* gs://BUCKET/PATH"):
            place("s3://bucket/run")
        with pytest.raises(ValueError, match="no place"):
            Checkpoints("s3://bucket/run")

    def test_a_missing_package_is_named_with_its_extra(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install 'jaxref\[remote\]'"):
            place("gs://bucket/run")


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
        bucket = address.removeprefix("gs://")
        before = len(store.changes)
        with Checkpoints(address, keep=1) as checkpoints:
            save(checkpoints, 1, 2)
        changes = [(name.removeprefix(bucket), data) for name, data in store.changes[before:]]
        seen = []
        for moment in range(len(changes) + 1):
            copy = f"{bucket}-{moment}"
            for name, data in changes[:moment]:
                store.delete(copy + name) if data is None else store.put(copy + name, data)
            with Checkpoints(f"gs://{copy}") as checkpoints:
                latest = checkpoints.latest_step()
                assert latest == (None if latest is None else restored(checkpoints))
            if moment % 10 == 5:  # and it goes on from there
                with Checkpoints(f"gs://{copy}") as checkpoints:
                    save(checkpoints, 3)
                with Checkpoints(f"gs://{copy}") as checkpoints:
                    assert restored(checkpoints) == 3
                    steps = {int(name.partition("/")[0]) for name in store.below(f"gs://{copy}")}
                    assert steps == set(checkpoints.all_steps())  # what was unfinished is deleted
            seen.append(latest)
        assert seen == sorted(seen, key=lambda step: step or 0)
        assert set(seen) == {None, 1, 2}

    def test_damaged_ones_are_moved_aside(self, store, address, warnings):
        with Checkpoints(address, keep=4) as checkpoints:
            save(checkpoints, 1, 2, 3, 4)
        for part in ("2/manifest/metadata", "3/state/manifest.ocdbt", "4/state/d/"):
            (name,) = (name for name in store.below(address) if name.startswith(part))
            key = f"{address.removeprefix('gs://')}/{name}"
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
        def fail(*args, **kwargs):
            raise ValueError("UNAVAILABLE: Error opening kvstore")

        with Checkpoints(address) as checkpoints:
            save(checkpoints, 1, 2)
            monkeypatch.setattr(checkpoints._manager, "restore", fail)
            with pytest.raises(ValueError, match="UNAVAILABLE"):
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
        with pytest.raises(OSError, match=r"(?s)cannot be written .*--workdir: 'gs://bucket/"):
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
    root = f"{address.removeprefix('gs://')}/"
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
    fsspec.filesystem("gcs", finalize_on_close=True).invalidate_cache()  # of a process before
    assert "Continuing after step 2" in call(*command)[1]
    assert store.below(address)["sample.txt"].decode() == text
    assert [row["step"] for row in read_metrics(address)] == [1, 2, 3, 4]
