"""Compiles for TPUs that are not here, with the real compiler."""

import functools
import importlib.util
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install -e '.[tpu-aot]'",
)


@functools.cache
def tpu(chip: str) -> NamedSharding:
    """The sharding that places an array whole on one core of a chip."""
    from jax.experimental import topologies

    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no question to the cloud which machine this is
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("core",)), PartitionSpec())


def compile_for_tpu(chip: str, function, *shapes: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """`function` of arrays of these shapes, compiled."""
    place = tpu(chip)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    return jax.jit(function, out_shardings=place).trace(*placed).lower().compile()


def lower_for_gpu(function, *shapes: jax.ShapeDtypeStruct) -> str:
    """The program that would go to the compiler of an NVIDIA GPU."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
