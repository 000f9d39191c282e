"""Checkpoints of a training run: asynchronous, atomic, and checked bit for bit when read back.

A checkpoint is one directory named by its step, with two items that appear together or not at all:
the `state` (any pytree of arrays), and a `manifest` with the run's configuration, the position of
the input pipeline, and the fingerprints by which damage is found. None of it depends on how the
arrays were sharded and by how many processes, so that a run may be continued on other devices.

In a file system a checkpoint is written beside its place and appears by being renamed. An object
store cannot rename: there it appears with `commit_success.txt`, which is written last.
"""

import contextlib
import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from grain import DatasetIterator
from jax import Array
from jax.experimental.multihost_utils import process_allgather
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from jaxref.core.checks import check_interval
from jaxref.train.places import move, place

_NO_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError, ConnectionError, TimeoutError)
_NO_DAMAGE_SAYS = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED"),
    "endpoint URL",  # of every failed connection to S3
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that exist can be read."""


class Checkpoints:
    """The checkpoints of one run, the newest of them and every so many, in a place of their own.

    Every process of the run opens the same directory and makes the same calls. What unfinished
    saves left behind is deleted by the first `save`, not on opening: it may be another process that
    is writing, and a directory in use can be read.

    Args:
      directory: where the checkpoints are; created when absent. A path, or an address in
        an object store, `gs://BUCKET/PATH` or `s3://BUCKET/PATH`.
      keep: how many of the newest to keep, at least 1; older ones are deleted once a newer one is
        complete. Default 3.
      keep_every: the checkpoints of steps that this divides are kept for ever. Default 0: none.

    Raises:
      ValueError: `keep` is below 1 or `keep_every` below 0, or `directory` is no place that
        checkpoints can be written to.

    Example:
      >>> import grain, tempfile
      >>> batches = iter(grain.MapDataset.range(8).to_iter_dataset())
      >>> state = {"weights": jnp.arange(3.0), "key": jax.random.key(0)}
      >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     checkpoints.save(1, state, batches, config={"width": 3})
      ...     restored, step = checkpoints.restore(state, batches)
      >>> print(step, restored["weights"])
      1 [0. 1. 2.]
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 3, keep_every: int = 0):
        check_interval(1, np.inf, keep=keep)
        check_interval(0, np.inf, keep_every=keep_every)
        self.directory = place(directory)
        kept = [LatestN(keep), *([EveryNSteps(keep_every)] if keep_every else [])]
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(kept)),
        )
        self._unfinished_may_remain = True
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; one that is being written counts."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest of `all_steps`, None when there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        iterator: DatasetIterator | None = None,
        *,
        config: Mapping[str, Any],
        blocking: bool = False,
    ) -> None:
        """Starts writing a checkpoint and returns as soon as its content is copied off the device.

        The caller may donate or delete `state` and advance `iterator` right away. A save that is
        still under way is awaited first. A checkpoint becomes visible when all of it is on disk;
        a process that is killed before leaves the earlier ones as they were.

        Args:
          step: number of the checkpoint, greater than those of all checkpoints that exist.
          state: pytree of jax arrays of any sharding, typed PRNG keys included.
          iterator: the input pipeline, at the batch that follows `step`; in every process at the
            same one. Default: none, for what is not trained on.
          config: what the run was started with; anything that JSON can hold.
          blocking: wait until the checkpoint is complete. Default False.

        Raises:
          ValueError: there is a checkpoint at `step` or later.
          CheckpointError: this save could not start, or the one before it failed meanwhile (disk
            full, say), or the processes' input pipelines are at different batches. Complete
            checkpoints are not affected.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step must be greater than {latest}, the newest checkpoint in {self.directory}, "
                f"got {step}; restore from it first, or use another directory"
            )
        if self._unfinished_may_remain:
            self._delete_unfinished()
        position = None if iterator is None else iterator.get_state()
        if len(np.unique(process_allgather(np.uint32(_crc32(position))))) > 1:
            raise CheckpointError(
                f"step {step} cannot be saved in {self.directory}: the input pipelines of the "
                f"processes are at different batches, that of process {jax.process_index()} at "
                f"{position}"
            )
        content = {"config": config, "leaves": _inventory(state), "iterator": position}
        self._saving = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    manifest=ocp.args.JsonSave({"crc32": _crc32(content), "content": content}),
                ),
                force=True,
            )
        except Exception as error:
            raise self._failure(error) from error
        if blocking:
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way, if any.

        Raises:
          CheckpointError: that save failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error
        self._saving = None

    def close(self) -> None:
        """Waits like `wait` and releases the threads; a context manager does it on exit."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(
        self, abstract_state: Any, iterator: DatasetIterator | None = None
    ) -> tuple[Any, int] | None:
        """Reads the newest checkpoint that is intact.

        A checkpoint is intact when the fingerprints of every array and of the manifest are what
        they were when it was written. One that is not is reported by a warning, and the one before
        it is tried. Once an intact one is found, the damaged ones are moved aside (to
        `damaged-STEP`, nothing is deleted), so that training can save their steps again.

        Args:
          abstract_state: pytree like the saved state, with `jax.ShapeDtypeStruct` leaves (or
            arrays) whose `sharding` says where each array goes; it need not be the sharding that
            was saved. A leaf without one goes to the first local device. Or a function that makes
            the pytree from the `config` that was saved.
          iterator: an iterator over the same pipeline; set to where the saved one was. Default:
            none, where none was saved.

        Returns:
          (state, step), or None when the directory has never had a checkpoint.

        Raises:
          CheckpointError: there are checkpoints, and none is intact. They stay where they are.
          ValueError: the newest checkpoint is of another state: the message lists the arrays; or
            it has an iterator and you have none, or the other way round; or its iterator is in the
            form of an earlier version.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.all_steps()):
            state, problem = self._read(step, abstract_state, iterator)
            if problem is None:
                self._move_aside(damaged)
                return state, step
            logging.warning("Damaged checkpoint %s: %s", self.directory / str(step), problem)
            damaged[step] = problem
        moved = sorted(path.name for path in self.directory.glob("damaged-*"))
        if damaged or moved:
            tried = [f"{step}: {problem}" for step, problem in damaged.items()]
            tried += [f"{name}: moved aside by an earlier run" for name in moved]
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read:\n  "
                + "\n  ".join(tried)
                + "\nBring an intact one back, or start over in another directory."
            )
        return None

    def _read(
        self, step: int, abstract_state: Any, iterator: DatasetIterator | None
    ) -> tuple[Any, str | None]:
        """The state at `step`, and what is wrong with it (None when it is intact)."""

        def read(**items: Any) -> tuple[Any, str | None]:
            restored = problem = None
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # orbax and tensorstore raise nearly every kind
                of_this_machine = any(status in str(error) for status in _NO_DAMAGE_SAYS)
                if isinstance(error, _NO_DAMAGE) or of_this_machine:
                    raise
                problem = f"{type(error).__name__}: {error}"
            return restored, _first_of_any_process(problem)

        restored, problem = read(manifest=ocp.args.JsonRestore())
        if problem is not None:
            return None, problem
        content = restored["manifest"].get("content")
        if content is None or restored["manifest"].get("crc32") != _crc32(content):
            return None, "the manifest is not what was written"
        if callable(abstract_state):
            abstract_state = abstract_state(content["config"])
        abstract_state = jax.tree.map(_with_sharding, abstract_state)
        self._check_same_run(step, content, abstract_state, iterator)
        restored, problem = read(state=ocp.args.StandardRestore(abstract_state))
        if problem is not None:
            return None, problem
        state = restored["state"]
        found = _inventory(state)
        changed = [name for name, leaf in content["leaves"].items() if found[name] != leaf]
        problem = f"not what was written: {', '.join(changed)}" if changed else None
        problem = _first_of_any_process(problem)
        if problem is None and iterator is not None:
            iterator.set_state(content["iterator"])
        return state, problem

    def _check_same_run(
        self,
        step: int,
        content: dict[str, Any],
        abstract_state: Any,
        iterator: DatasetIterator | None,
    ) -> None:
        saved = {
            name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in content["leaves"].items()
        }
        asked = {
            name: f"{leaf['dtype']}{leaf['shape']}"
            for name, leaf in _describe(abstract_state).items()
        }
        different = [
            f"{name}: checkpoint has {saved.get(name, 'nothing')}, "
            f"you asked for {asked.get(name, 'nothing')}"
            for name in {**saved, **asked}
            if saved.get(name) != asked.get(name)
        ]
        if different:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} is of another state:\n  "
                + "\n  ".join(different[:20])
                + ("\n  ..." if len(different) > 20 else "")
            )
        if (content["iterator"] is None) != (iterator is None):
            has, given = ("no", "one") if content["iterator"] is None else ("an", "none")
            raise ValueError(
                f"checkpoint {self.directory / str(step)} has {has} iterator, you gave {given}"
            )
        if isinstance(content["iterator"], list):
            raise ValueError(
                f"checkpoint {self.directory / str(step)} is of an earlier version of this "
                "program, which kept the input pipeline in another form; continue with that "
                "version, or start over in another directory"
            )

    def _move_aside(self, damaged: Mapping[int, str]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            taken = {path.name for path in self.directory.iterdir()}
            for step in damaged:
                name = f"damaged-{step}"
                while name in taken:  # the same step may have been damaged before
                    name += "-again"
                move(self.directory / str(step), self.directory / name)
        _first_of_any_process(None)  # nobody looks before the directories have moved
        self._manager.reload()

    def _failure(self, error: Exception) -> CheckpointError:
        """The error to raise for a save that failed; its unfinished directory gives way."""
        with contextlib.suppress(OSError):  # other writers of this save may still be at it
            self._unfinished_may_remain = True
            self._delete_unfinished()
        self._manager.reload()
        intact = self.latest_step()
        return CheckpointError(
            f"saving checkpoint {self._saving} in {self.directory} failed: {error}\n"
            + ("There is no earlier one." if intact is None else f"The newest one is {intact}.")
        )

    def _delete_unfinished(self) -> None:
        if jax.process_index() == 0:
            for path in self.directory.glob("*"):
                if ocp.utils.is_tmp_checkpoint(path) and not path.name.startswith("damaged-"):
                    path.rmtree(missing_ok=True)
        self._unfinished_may_remain = False


def has_checkpoint(directory: epath.Path) -> bool:
    """Whether a directory has a checkpoint, complete or damaged; not one that is half written.

    Args:
      directory: as of `Checkpoints`; it need not exist.

    Returns:
      True or False.
    """
    return any(
        path.name.removeprefix("damaged-").isdigit() and not ocp.utils.is_tmp_checkpoint(path)
        for path in directory.glob("*")
    )


def _describe(state: Any) -> dict[str, dict[str, Any]]:
    """Type and shape of every leaf by its dotted name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): {
            "dtype": str(leaf.dtype),
            "shape": list(leaf.shape),
        }
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _inventory(state: Any) -> dict[str, dict[str, Any]]:
    """Type, shape and fingerprint of every leaf by its dotted name."""
    together: dict[Any, dict[str, Array]] = defaultdict(dict)  # what is on the same devices
    for name, leaf in zip(described := _describe(state), jax.tree.leaves(state)):
        together[getattr(leaf.sharding, "mesh", leaf.sharding)][name] = leaf
    for leaves in together.values():
        # One program after the other: on CPU devices, those that sum over all of them and are under
        # way at once take each other's threads and wait for ever.
        for name, fingerprint in zip(leaves, jax.device_get(_fingerprints([*leaves.values()]))):
            described[name]["fingerprint"] = int(fingerprint)
    return described


@jax.jit
def _fingerprints(arrays: list[Array]) -> list[Array]:
    return [_fingerprint(x) for x in arrays]


def _fingerprint(x: Array) -> Array:
    """Σ_i mix(word_i ⊕ mix(i)) modulo 2^32, over the 32-bit words of the array in C order.

    `mix` is a bijection, so that a change to a single word always shows; mixing in the index shows
    words that changed places. Integer addition commutes: the sharding makes no difference.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = 8 * min(x.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index * jnp.uint32(size % 2**32) + position
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _mix(h: Array) -> Array:
    """The finalizer of MurmurHash3, a bijection of 32-bit words."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _first_of_any_process(problem: str | None) -> str | None:
    """The problem of this process, or else that there is one elsewhere; None if nowhere."""
    if np.any(process_allgather(np.asarray(problem is not None))):
        return problem or "another process could not read its part"
    return None
