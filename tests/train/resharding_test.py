"""Checkpoints that are read on other devices, and otherwise cut, than they were written on."""

import json
import math
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.train import loop
from jaxref.train.checkpoints import Checkpoints
from jaxref.train.program import build
from jaxref.train.records import read_metrics, read_starts


def iterator():
    return iter(grain.MapDataset.range(8).to_iter_dataset())


def bits(state):
    """Types, shapes and bytes of all leaves."""
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def test_the_same_bits_on_other_devices(tiny_config, tmp_path):
    """Parameters, both moments and key: from 8 devices to 4, and from these to one."""

    def made(**mesh):
        sizes = (f"mesh.{axis}={size}" for axis, size in ({"data": 1} | mesh).items())
        config = tiny_config(*sizes)
        return build(config, 256, devices=jax.devices()[: math.prod(mesh.values())])

    def filled(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(3), leaf.sharding)
        return jax.device_put(draw.integers(1, 1000, leaf.shape).astype(leaf.dtype), leaf.sharding)

    draw = np.random.default_rng(0)
    state = written = jax.tree.map(filled, made(fsdp=8).abstract_state)
    manifests = []
    for step, mesh in enumerate(({"tensor": 4}, {"fsdp": 1}), 1):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(step, state, iterator(), config={})
            program = made(**mesh)
            state, at = checkpoints.restore(program.abstract_state, iterator())
        assert at == step
        assert bits(state) == bits(written)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(program.state_shardings)):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        file = tmp_path / str(step) / "manifest" / "metadata"
        manifests.append(json.loads(file.read_text())["content"])
    assert all(manifest == manifests[0] for manifest in manifests)
    assert len(manifests[0]["leaves"]) > 40


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tiny_config, tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    sizes = ("steps=8", "mesh.data=1")
    loop.train(tiny_config(*sizes, "mesh.fsdp=8"), whole)
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints" / "8")
    (other / "sample.txt").unlink()
    loop.train(tiny_config(*sizes, "mesh.fsdp=2", "mesh.tensor=4"), other)
    assert [row["step"] for row in read_starts(other)] == [0, 4]
    rows, expected = read_metrics(other), read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, as_expected in zip(rows, expected):
        for name in ("loss", "gradient_norm"):
            rtol = 0 if row["step"] <= 4 else 1e-4
            np.testing.assert_allclose(row[name], as_expected[name], rtol=rtol)
    np.testing.assert_allclose(
        rows[-1]["validation_loss"], expected[-1]["validation_loss"], rtol=1e-4
    )
    assert [row["loss"] for row in rows] != [row["loss"] for row in expected]  # other sums
