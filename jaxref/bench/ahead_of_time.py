"""Compiles for TPUs that are not here, with the real compiler (the extra `tpu-aot`)."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""A small slice of every generation, by the generation's name."""


@functools.cache
def one_core(chip: str) -> NamedSharding:
    """The sharding that places an array whole on one core of a chip of `TOPOLOGIES`.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    from jax.experimental import topologies

    if jax.default_backend() == "cpu":
        # Not to ask the cloud which machine this is, and to compile in several processes at once.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("core",)), PartitionSpec())


def compile_for_tpu(
    chip: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
) -> jax.stages.Compiled:
    """`function` of arrays of these shapes, compiled for one core of a chip of `TOPOLOGIES`.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    place = one_core(chip)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    return jax.jit(function, out_shardings=place).trace(*placed).lower().compile()


def lower_for_gpu(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> str:
    """The program of `function` that would go to the compiler of an NVIDIA GPU."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
