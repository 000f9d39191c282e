import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxref
from jaxref.train import checkpoints as checkpoints_module
from jaxref.train.checkpoints import CheckpointError, Checkpoints, _crc32, _fingerprint

# Runs are compared bit for bit with those of other processes.
pytestmark = pytest.mark.optimized

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
CONFIG = {"model": {"width": 4}, "rate": 0.1, "axes": ["data", None]}


def batches(seed=3):
    dataset = grain.MapDataset.range(40).shuffle(seed).repeat().batch(4)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def initial_state(size=6):
    params = {
        "w": jnp.linspace(-1, 1, size),
        "b": jnp.linspace(0, 1, 5, dtype=jnp.bfloat16),
    }
    return {
        "params": params,
        "opt_state": OPTIMIZER.init(params),
        "key": jax.random.key(7),
        "step": jnp.int32(0),
    }


@partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    """An update in which every leaf depends on all batches and keys so far."""
    key, noise = jax.random.split(state["key"])
    grads = jax.tree.map(
        lambda p: jax.random.normal(noise, p.shape, p.dtype) + p * batch.mean().astype(p.dtype),
        state["params"],
    )
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "key": key, "step": state["step"] + 1}


def train(checkpoints, state, iterator, start, stop, every=2):
    for step in range(start + 1, stop + 1):
        state = train_step(state, jnp.asarray(next(iterator)))
        if step % every == 0:
            checkpoints.save(step, state, iterator, config=CONFIG)
    return state


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def mesh_of(shape, axis_type=AxisType.Auto):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with the checkpoints 2, 4 and 6, the states in them and the next batches."""
    directory = tmp_path_factory.mktemp("trained")
    states, following = {}, {}
    with Checkpoints(directory) as checkpoints:
        state, iterator = initial_state(), batches()
        for step in (2, 4, 6):
            state = train(checkpoints, state, iterator, step - 2, step)
            states[step] = jax.tree.map(jnp.copy, state)
            position = iterator.get_state()
            following[step] = next(iterator)
            iterator.set_state(position)
    return directory, states, following


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    return tmp_path / "copy"


class TestRoundTrip:
    def test_the_newest_state_and_iterator_come_back_bit_for_bit(self, trained):
        directory, states, following = trained
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.all_steps() == [2, 4, 6]
            assert checkpoints.latest_step() == 6
            iterator = batches()
            state, step = checkpoints.restore(abstract(states[6]), iterator)
        assert step == 6
        assert_same_bits(state, states[6])
        assert not np.array_equal(following[6], next(batches()))
        np.testing.assert_array_equal(next(iterator), following[6])

    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, trained, tmp_path):
        _, states, _ = trained
        with Checkpoints(tmp_path) as checkpoints:
            train(checkpoints, initial_state(), batches(), 0, 4)
        with Checkpoints(tmp_path) as checkpoints:
            iterator = batches()
            state, step = checkpoints.restore(abstract(states[2]), iterator)
            assert_same_bits(train(checkpoints, state, iterator, step, 6), states[6])

    def test_every_type_of_leaf(self, tmp_path):
        bits = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16)
        state = {
            "all bfloat16, NaNs with their payloads": bits.view(jnp.bfloat16),
            "float8": jnp.linspace(-3, 3, 5).astype(jnp.float8_e4m3fn),
            "int8": jnp.arange(-3, 3, dtype=jnp.int8),
            "bool": jnp.array([[True, False]]),
            "complex": jnp.array([1 - 2j, 3j]),
            "scalar": jnp.float32(-0.0),
            "keys": jax.random.split(jax.random.key(1), (2, 3)),
            "rbg": jax.random.key(5, impl="rbg"),
            "nothing": None,
            "tuple": (jnp.ones(2), optax.EmptyState()),
        }
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(0, state, batches(), config=CONFIG, blocking=True)
            restored, step = checkpoints.restore(abstract(state), batches())
        assert step == 0
        assert_same_bits(restored, state)

    def test_without_shardings_it_goes_to_one_device(self, trained):
        directory, states, _ = trained
        with Checkpoints(directory) as checkpoints:
            state, _ = checkpoints.restore(jax.eval_shape(lambda: states[6]), batches())
        assert_same_bits(state, states[6])
        assert state["params"]["w"].devices() == {jax.local_devices()[0]}

    def test_the_manifest_holds_the_configuration(self, trained):
        manifest = json.loads((trained[0] / "4" / "manifest" / "metadata").read_text())
        assert manifest["content"]["config"] == CONFIG

    def test_no_checkpoint_yet(self, tmp_path):
        with Checkpoints(tmp_path / "new" / "run") as checkpoints:
            assert checkpoints.restore(abstract(initial_state()), batches()) is None
            assert checkpoints.latest_step() is None
            assert checkpoints.all_steps() == []

    def test_only_the_newest_are_kept(self, tmp_path):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            train(checkpoints, initial_state(), batches(), 0, 5, every=1)
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            assert checkpoints.all_steps() == [4, 5]

    def test_every_so_many_steps_one_is_kept_for_ever(self, tmp_path):
        options = {"keep": 1, "keep_every": 3}
        with Checkpoints(tmp_path, **options) as checkpoints:
            train(checkpoints, initial_state(), batches(), 0, 5, every=1)
        with Checkpoints(tmp_path, **options) as checkpoints:
            assert checkpoints.all_steps() == [3, 5]
            train(checkpoints, initial_state(), batches(), 5, 8, every=1)
            checkpoints.wait()
            assert checkpoints.all_steps() == [3, 6, 8]

    def test_a_relative_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with Checkpoints("here") as checkpoints:
            checkpoints.save(1, initial_state(), batches(), config={})
        assert (tmp_path / "here" / "1").is_dir()


class TestSharding:
    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_restored_on_another_mesh(self, tmp_path, axis_type):
        def shardings(shape, *spec):
            mesh = mesh_of(shape, axis_type)
            return {
                "w": NamedSharding(mesh, PartitionSpec(*spec)),
                "keys": NamedSharding(mesh, PartitionSpec(spec[0])),
                "scale": NamedSharding(mesh, PartitionSpec()),
            }

        values = {
            "w": jax.random.normal(jax.random.key(0), (8, 16), jnp.bfloat16),
            "keys": jax.random.split(jax.random.key(1), 8),
            "scale": jnp.arange(4.0),
        }
        with Checkpoints(tmp_path) as checkpoints:
            state = jax.device_put(values, shardings((4, 2), "data", "model"))
            checkpoints.save(1, state, batches(), config={})
            for shape, spec in [((2, 4), ("model", "data")), ((1, 1), ("data",)), ((8, 1), ())]:
                wanted = shardings(shape, *(spec or (None,)))
                abstract_state = jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), values, wanted
                )
                restored, _ = checkpoints.restore(abstract_state, batches())
                assert_same_bits(restored, values)
                for name, leaf in restored.items():
                    assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim)

    def test_leaves_on_different_devices(self, tmp_path):
        state = {
            "sharded": jax.device_put(
                jnp.arange(8.0), NamedSharding(mesh_of((4, 2)), PartitionSpec("data"))
            ),
            "single": jax.device_put(jnp.arange(3), jax.devices()[5]),
        }
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, batches(), config={})
            restored, _ = checkpoints.restore(state, batches())
        assert_same_bits(restored, state)
        assert restored["single"].devices() == {jax.devices()[5]}


def test_without_an_iterator_and_with_a_state_that_the_configuration_describes(tmp_path):
    x = jnp.arange(3.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, config={"size": 3})
        asked = []

        def described(config):
            asked.append(config)
            return {"x": jax.ShapeDtypeStruct((config["size"],), jnp.float32)}

        restored, step = checkpoints.restore(described)
        assert (step, asked) == (1, [{"size": 3}])
        assert_same_bits(restored, {"x": x})
        with pytest.raises(ValueError, match="has no iterator, you gave one"):
            checkpoints.restore({"x": x}, batches())


class TestDonation:
    @pytest.mark.parametrize(
        ("size", "spec"),
        [(3, None), (2**20, None), (2**18, PartitionSpec("data")), (2**16, PartitionSpec())],
    )
    def test_saves_what_was_there_when_the_buffers_are_reused_at_once(self, tmp_path, size, spec):
        @partial(jax.jit, donate_argnums=0)
        def overwrite(x):
            return x + 1

        x = jnp.zeros(size)
        if spec is not None:
            x = jax.device_put(x, NamedSharding(mesh_of((8, 1)), spec))
        overwrite(jax.tree.map(jnp.copy, x))  # compiled, so that the next one runs at once
        with Checkpoints(tmp_path) as checkpoints:
            for step in range(3):
                iterator = batches()
                checkpoints.save(step, {"x": x}, iterator, config={})
                next(iterator)
                for _ in range(3):
                    x = overwrite(x)
                x.block_until_ready()
                restored, at = checkpoints.restore({"x": x}, iterator)
                assert at == step
                np.testing.assert_array_equal(restored["x"], jnp.full(size, 3.0 * step))
                np.testing.assert_array_equal(next(iterator), next(batches()))


def flip(path):
    data = bytearray(path.read_bytes())
    position = random.Random(path.name).randrange(len(data))
    data[position] ^= 1 << random.Random(path.name).randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's loops
class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_no_damage_to_a_file_ever_gives_wrong_values(self, trained, tmp_path, warnings, damage):
        """Each file in turn: the state is intact all the same, or the one before is used."""
        directory, states, following = trained
        fallbacks = []
        for file in sorted(f for f in (directory / "6").rglob("*") if f.is_file()):
            if file.stat().st_size == 0 and damage != "deleted":
                continue
            run = tmp_path / "run"
            shutil.copytree(directory, run)
            DAMAGES[damage](run / file.relative_to(directory))
            warnings.clear()
            with Checkpoints(run) as checkpoints:
                iterator = batches()
                state, step = checkpoints.restore(abstract(states[6]), iterator)
            assert_same_bits(state, states[step])
            np.testing.assert_array_equal(next(iterator), following[step])
            if step == 6:
                assert not warnings
                assert sorted(p.name for p in run.iterdir()) == ["2", "4", "6"]
            else:
                assert step == 4
                (message,) = warnings
                assert message.startswith(f"Damaged checkpoint {run / '6'}: ")
                assert sorted(p.name for p in run.iterdir()) == ["2", "4", "damaged-6"]
                fallbacks.append(file)
            shutil.rmtree(run)
        assert {f.parent.name for f in fallbacks} >= {"manifest", "state", "d"}

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("kind", ["manifest/metadata", "state/manifest.ocdbt", "state/d/*"])
    def test_the_newest_two_damaged_alike(self, trained, copy, warnings, damage, kind):
        _, states, following = trained
        for step in (4, 6):
            for file in (copy / str(step)).glob(kind):
                DAMAGES[damage](file)
        with Checkpoints(copy) as checkpoints:
            iterator = batches()
            state, step = checkpoints.restore(abstract(states[6]), iterator)
        assert step == 2
        assert_same_bits(state, states[2])
        np.testing.assert_array_equal(next(iterator), following[2])
        assert [message.split()[2] for message in warnings] == [f"{copy / s}:" for s in "64"]
        assert sorted(p.name for p in copy.iterdir()) == ["2", "damaged-4", "damaged-6"]

    def test_values_that_only_the_fingerprint_can_tell_from_the_right_ones(
        self, trained, copy, warnings
    ):
        """The arrays are written anew, with storage checksums that fit, and one bit different."""
        _, states, _ = trained
        b = states[6]["params"]["b"]
        flipped = (b.view(jnp.uint16) ^ jnp.zeros(5, jnp.uint16).at[3].set(1)).view(b.dtype)
        shutil.rmtree(copy / "6" / "state")
        with ocp.StandardCheckpointer() as writer:
            state = {**states[6], "params": {**states[6]["params"], "b": flipped}}
            writer.save(copy / "6" / "state", state)
        with Checkpoints(copy) as checkpoints:
            state, step = checkpoints.restore(abstract(states[6]), batches())
        assert step == 4
        assert_same_bits(state, states[4])
        assert warnings == [f"Damaged checkpoint {copy / '6'}: not what was written: params.b"]

    @pytest.mark.parametrize(
        ("written", "changed"),
        [('"width": 4', '"width": 5'), ('{"next_index": 6}', '{"next_index": 7}')],
    )
    def test_a_changed_manifest(self, trained, copy, warnings, written, changed):
        file = copy / "6" / "manifest" / "metadata"
        assert written in file.read_text()
        file.write_text(file.read_text().replace(written, changed))
        with Checkpoints(copy) as checkpoints:
            _, step = checkpoints.restore(abstract(trained[1][6]), batches())
        assert step == 4
        assert warnings == [
            f"Damaged checkpoint {copy / '6'}: the manifest is not what was written"
        ]

    @pytest.mark.parametrize("lost", [[6], [4, 6]])
    def test_training_goes_on_from_the_one_before_and_ends_bit_identical(
        self, trained, copy, warnings, lost
    ):
        _, states, _ = trained
        for step in lost:
            shutil.rmtree(copy / str(step) / "state")
        with Checkpoints(copy) as checkpoints:
            iterator = batches()
            state, step = checkpoints.restore(abstract(states[6]), iterator)
            assert step == lost[0] - 2
            assert len(warnings) == len(lost)
            train(checkpoints, state, iterator, step, 6)
        with Checkpoints(copy) as checkpoints:
            assert checkpoints.all_steps() == [2, 4, 6]
            state, step = checkpoints.restore(abstract(states[6]), batches())
        assert step == 6
        assert_same_bits(state, states[6])
        for step in lost:  # nothing was deleted
            assert (copy / f"damaged-{step}" / "manifest").is_dir()

    def test_the_same_step_damaged_twice(self, trained, copy, warnings):
        _, states, _ = trained
        for moved in ("damaged-6", "damaged-6-again", "damaged-6-again-again"):
            shutil.rmtree(copy / "6" / "state")
            with Checkpoints(copy) as checkpoints:
                iterator = batches()
                state, step = checkpoints.restore(abstract(states[6]), iterator)
                train(checkpoints, state, iterator, step, 6)
            assert (copy / moved).is_dir()

    def test_none_intact_is_an_error_every_time(self, trained, copy, warnings):
        for step in ("2", "4", "6"):
            shutil.rmtree(copy / step / "state")
        for _ in range(2):
            with (
                Checkpoints(copy) as checkpoints,
                pytest.raises(CheckpointError, match=r"(?s)can be read.*6: .*4: .*2: "),
            ):
                checkpoints.restore(abstract(trained[1][6]), batches())
        assert sorted(p.name for p in copy.iterdir()) == ["2", "4", "6"]

    def test_only_damaged_ones_left_is_an_error(self, trained, copy):
        for step in ("2", "4"):
            shutil.rmtree(copy / step)
        (copy / "6").rename(copy / "damaged-6")
        with (
            Checkpoints(copy) as checkpoints,
            pytest.raises(CheckpointError, match="damaged-6: moved aside by an earlier run"),
        ):
            checkpoints.restore(abstract(trained[1][6]), batches())

    def test_too_little_memory_is_not_damage(self, trained, copy, monkeypatch):
        def fail(*args, **kwargs):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

        with Checkpoints(copy) as checkpoints:
            monkeypatch.setattr(checkpoints._manager, "restore", fail)
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
                checkpoints.restore(abstract(trained[1][6]), batches())
        assert sorted(p.name for p in copy.iterdir()) == ["2", "4", "6"]


class TestFingerprint:
    def test_single_bits_places_and_signs_of_zero_show(self):
        x = jax.random.normal(jax.random.key(0), (16, 4))
        seen = {
            int(_fingerprint(x)),
            int(_fingerprint(x[::-1])),
            int(_fingerprint(x.at[::5].set(0))),
        }
        seen.add(int(_fingerprint(x.at[::5].set(-0.0))))
        for bit in range(32):
            flipped = x.view(jnp.uint32) ^ jnp.zeros((16, 4), jnp.uint32).at[3, 2].set(1 << bit)
            seen.add(int(_fingerprint(flipped.view(jnp.float32))))
        assert len(seen) == 36

    def test_matches_a_plain_transcription(self):
        def mix(h):
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                h = ((h ^ (h >> shift)) * factor) % 2**32
            return h ^ (h >> 16)

        x = jax.random.normal(jax.random.key(1), (3, 5), jnp.bfloat16)
        words = np.asarray(x).view(np.uint16).ravel().tolist()
        expected = sum(mix(word ^ mix(i)) for i, word in enumerate(words)) % 2**32
        assert int(_fingerprint(x)) == expected


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow beyond `size` bytes in this process: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


class TestErrors:
    def test_a_failed_write_surfaces_and_the_earlier_checkpoint_survives(self, tmp_path):
        state = {"x": jax.random.normal(jax.random.key(0), (2**18,))}
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(1, state, batches(), config={}, blocking=True)
            for surface in (
                checkpoints.wait,
                lambda: checkpoints.save(3, state, batches(), config={}),
            ):
                with largest_file(2**16):
                    checkpoints.save(2, jax.tree.map(jnp.negative, state), batches(), config={})
                    with pytest.raises(CheckpointError, match=r"(?s)saving checkpoint 2 .*is 1\."):
                        surface()
                assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]  # space is free again
                restored, step = checkpoints.restore(state, batches())
                assert step == 1
                assert_same_bits(restored, state)
            checkpoints.save(2, state, batches(), config={})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]

    def test_a_failed_write_surfaces_on_exit(self, tmp_path):
        state = {"x": jax.random.normal(jax.random.key(0), (2**18,))}
        with (
            largest_file(2**16),
            pytest.raises(CheckpointError, match=r"(?s)checkpoint 5 .*no earlier one"),
            Checkpoints(tmp_path) as checkpoints,
        ):
            checkpoints.save(5, state, batches(), config={})

    @pytest.mark.parametrize("step", [1, 6])
    def test_a_step_that_is_not_newer(self, trained, copy, step):
        with (
            Checkpoints(copy) as checkpoints,
            pytest.raises(ValueError, match="step must be greater than 6"),
        ):
            checkpoints.save(step, initial_state(), batches(), config={})

    def test_another_state_is_named_and_is_not_damage(self, trained, copy, warnings):
        other = abstract(trained[1][6])
        other["params"]["w"] = jax.ShapeDtypeStruct((7,), jnp.float32)
        other["params"]["c"] = other["params"].pop("b")
        with (
            Checkpoints(copy) as checkpoints,
            pytest.raises(ValueError, match="of another state") as error,
        ):
            checkpoints.restore(other, batches())
        text = str(error.value)
        assert "params.w: checkpoint has float32[6], you asked for float32[7]" in text
        assert "params.b: checkpoint has bfloat16[5], you asked for nothing" in text
        assert "params.c: checkpoint has nothing, you asked for bfloat16[5]" in text
        assert "opt_state" not in text
        assert not warnings
        assert sorted(p.name for p in copy.iterdir()) == ["2", "4", "6"]

    def test_an_iterator_is_asked_for(self, trained, copy):
        with (
            Checkpoints(copy) as checkpoints,
            pytest.raises(ValueError, match="has an iterator, you gave none"),
        ):
            checkpoints.restore(abstract(trained[1][6]))

    def test_a_checkpoint_of_an_earlier_version(self, trained, copy):
        file = copy / "6" / "manifest" / "metadata"
        content = json.loads(file.read_text())["content"]
        content["iterator"] = [123456]  # a fingerprint for each process, as it was
        file.write_text(json.dumps({"crc32": _crc32(content), "content": content}))
        with (
            Checkpoints(copy) as checkpoints,
            pytest.raises(ValueError, match=f"{copy / '6'} is of an earlier version"),
        ):
            checkpoints.restore(abstract(trained[1][6]), batches())

    def test_processes_at_different_batches(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoints_module, "process_allgather", lambda x: np.stack([x, x + 1]))
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(CheckpointError, match=r"(?s)step 1 .* of process 0 at .*next_index': 0"),
        ):
            checkpoints.save(1, initial_state(), batches(), config={})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("bad", [{"keep": 0}, {"keep_every": -1}])
    def test_what_to_keep(self, tmp_path, bad):
        (name,) = bad
        with pytest.raises(ValueError, match=f"{name} must be in"):
            Checkpoints(tmp_path, **bad)


class TestUnfinished:
    def test_leftovers_are_ignored_by_readers_and_deleted_by_the_next_save(self, trained, copy):
        leftover = copy / f"8{ocp.utils.TMP_DIR_SUFFIX}-1"
        shutil.copytree(copy / "6", leftover)
        _, states, _ = trained
        with Checkpoints(copy) as checkpoints:
            iterator = batches()
            state, step = checkpoints.restore(abstract(states[6]), iterator)
            assert step == 6
            assert leftover.exists()  # it may be another process's save in progress
            checkpoints.save(8, state, iterator, config={})
        assert sorted(p.name for p in copy.iterdir()) == ["4", "6", "8"]

    @pytest.mark.slow
    def test_kill_in_the_middle_of_saves(self, tmp_path):
        """Two runs are killed while they write; the third finds its way and is silent."""
        script = f"""
state, iterator, step = initial_state(2**20), batches(), 0
with Checkpoints({str(tmp_path / "run")!r}) as checkpoints:
    restored = checkpoints.restore(abstract(state), iterator)
    if restored is not None:
        state, step = restored
    train(checkpoints, state, iterator, step, 8, every=1)
"""
        unfinished = lambda: list(tmp_path.glob(f"run/*{ocp.utils.TMP_DIR_SUFFIX}*"))
        complete = lambda: {int(p.name) for p in tmp_path.glob("run/*") if p.name.isdigit()}
        for kill_at, delay in ((2, 0), (4, 0.03)):
            process = start(script)
            while process.poll() is None:
                if complete() and max(complete()) >= kill_at and unfinished():
                    time.sleep(delay)
                    process.kill()
                    break
                time.sleep(0.002)
            output, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL, output
            assert complete()
        process = start(script)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert output == ""
        assert complete() == {6, 7, 8}
        assert not unfinished()
        expected = initial_state(2**20)
        iterator = batches()
        for _ in range(8):
            expected = train_step(expected, jnp.asarray(next(iterator)))
        with Checkpoints(tmp_path / "run") as checkpoints:
            state, step = checkpoints.restore(abstract(expected), batches())
        assert step == 8
        assert_same_bits(state, expected)

    @pytest.mark.slow
    def test_what_is_on_disk_at_random_moments(self, tmp_path, warnings):
        """A process that saves and saves is stopped at random, which leaves on disk what killing it
        would, and its directory is copied."""
        size = 2**19
        script = f"""
iterator = batches()
with Checkpoints({str(tmp_path / "run")!r}, keep=2) as checkpoints:
    for step in range(1, 10**6):
        next(iterator)
        checkpoints.save(step, {{"x": jnp.full({size}, step)}}, iterator, config={{}})
"""
        process = start(script)
        draw, found, unfinished = random.Random(0), [], 0
        try:
            while not list(tmp_path.glob("run/[0-9]")):
                assert process.poll() is None
                time.sleep(0.05)
            for moment in range(20):
                time.sleep(draw.uniform(0, 0.2))
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                shutil.copytree(tmp_path / "run", tmp_path / str(moment))
                process.send_signal(signal.SIGCONT)
        finally:
            process.kill()
            process.communicate()
        for moment in range(20):
            run = tmp_path / str(moment)
            unfinished += len(list(run.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")))
            with Checkpoints(run) as checkpoints:
                iterator = batches()
                state, step = checkpoints.restore({"x": jnp.zeros(size, int)}, iterator)
            np.testing.assert_array_equal(state["x"], np.full(size, step))
            assert iterator.get_state() == {"next_index": step}
            found.append(step)
        assert found == sorted(found)
        assert len(set(found)) > 3
        assert unfinished > 3
        assert not warnings


def start(script):
    """A process that runs it with all that is defined here."""
    prelude = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax
jax.config.update("jax_num_cpu_devices", 8)  # as here: it decides how loops are split and rounded
from checkpoints_test import *
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(jaxref.__file__).parents[1]),
        "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",  # as in conftest.py
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", prelude + script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_save_blocks_briefly(tmp_path):
    """Three copies of a million parameters; the limit is generous, for slow and busy machines."""
    state = {name: jax.random.normal(jax.random.key(0), (1000, 1000)) for name in "abc"}
    blocked = []
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(5):
            iterator = batches()
            checkpoints.wait()
            before = time.perf_counter()
            checkpoints.save(step, state, iterator, config=CONFIG)
            blocked.append(time.perf_counter() - before)
    assert min(blocked) < 0.5
