"""TPU chips for programs that are compiled ahead of time: what their makers publish, and pods."""

import importlib.util
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh


class Chip(NamedTuple):
    """A generation of chips, by its published peaks.

    Attributes:
      flops: bfloat16 operations a second.
      hbm_bytes: capacity of the memory.
      hbm_bandwidth: bytes a second to and from the memory.
      link_bandwidth: bytes a second that one link to a neighbour carries in each direction; a chip
        has two links along each dimension of its torus.
      dcn_bandwidth: bytes a second that a chip sends over the data-centre network; None where that
        is not published.
      pod_size: chips that links can join.
      devices: what jax sees of a chip: 2 where its cores do not work as one.
      options: further options of the topology's description.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float | None
    pod_size: int
    devices: int = 1
    options: dict[str, str] | None = None


CHIPS = {
    "v4": Chip(
        275e12, 32 * 2**30, 1.2e12, 44.8e9, None, 4096, options={"chip_config_name": "megacore"}
    ),
    "v5e": Chip(197e12, 16 * 2**30, 0.819e12, 50e9, 3.125e9, 256),
    "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 100e9, 6.25e9, 8960),
    "v6e": Chip(918e12, 32 * 2**30, 1.638e12, 100e9, 12.5e9, 256),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7.38e12, 100e9, 12.5e9, 9216, devices=2),
}
"""From https://cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x. A link is the
bidirectional bandwidth of a chip, halved, over its 4 links (a 2D torus) or 6; of v4, whose page
does not say that, the pod's all-reduce bandwidth over its chips. The network is per chip, of v5e
the pod's over its chips."""


class Pod(NamedTuple):
    """Devices that are not here, to compile for.

    Attributes:
      name: such as v5e:16x16.
      chip: the generation's, or what a device has of one.
      slices: pods or parts of them, which a data-centre network joins.
      devices: of all slices.
    """

    name: str
    chip: Chip
    slices: int
    devices: list[jax.Device]


def describe_pod(name: str, slices: int = 1) -> Pod:
    """The devices of a topology.

    Args:
      name: generation and chips along each dimension, such as v5e:16x16 or v5p:8x8x8.
      slices: how many of it a data-centre network joins.

    Returns:
      The `Pod`, whose devices a program can be compiled for and not run on.

    Raises:
      ValueError: a generation or shape that does not exist.
      RuntimeError: libtpu is not installed.
    """
    from jax.experimental import topologies

    generation, _, shape = name.partition(":")
    if generation not in CHIPS or not all(size.isdigit() for size in shape.split("x")):
        raise ValueError(
            f"--topology must be a generation of {list(CHIPS)} and its chips along each dimension, "
            f"such as v5e:16x16 or v5p:8x8x8, got {name!r}"
        )
    if slices < 1:
        raise ValueError(f"--slices must be at least 1, got {slices}")
    chip = CHIPS[generation]
    if slices > 1 and chip.dcn_bandwidth is None:
        raise ValueError(f"--slices: the network between slices of {generation} is not published")
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("the TPU's compiler is not installed: pip install 'jaxref[tpu-aot]'")
    # Not to ask the cloud which machine this is, and to compile in several processes at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        described = topologies.get_topology_desc(
            name, platform="tpu", num_slices=slices, **chip.options or {}
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").partition("\n")[0]
        raise ValueError(
            f"--topology={name} is none that the compiler knows ({reason}); there are, for "
            "example, v5e:2x4 to v5e:16x16, v5p:2x2x1 to v5p:16x16x24, v6e:2x4 to v6e:16x16"
        ) from error
    share = chip._replace(
        flops=chip.flops / chip.devices,
        hbm_bytes=chip.hbm_bytes // chip.devices,
        hbm_bandwidth=chip.hbm_bandwidth / chip.devices,
        link_bandwidth=chip.link_bandwidth / chip.devices,
        dcn_bandwidth=chip.dcn_bandwidth and chip.dcn_bandwidth / chip.devices,
        pod_size=chip.pod_size * chip.devices,
    )
    return Pod(name, share, slices, list(described.devices))


def bandwidth(pod: Pod, mesh: Mesh, axes: tuple[str, ...]) -> float:
    """Bytes a second that a chip sends to the devices along some axes of a mesh: over the
    data-centre network where they are in several slices, else over the two links of every
    dimension of the torus in which their places differ.

    Args:
      pod: what the mesh is of.
      mesh: of the pod's devices.
      axes: names of axes of the mesh, at least one.

    Returns:
      The bandwidth in one direction, both links of a dimension together.
    """
    coordinates = [mesh.axis_names.index(axis) for axis in axes]
    group = np.moveaxis(mesh.devices, coordinates, range(len(axes)))
    group = group.reshape(*group.shape[: len(axes)], -1)[..., 0].ravel()
    if len({getattr(device, "slice_index", None) for device in group}) > 1:
        assert pod.chip.dcn_bandwidth is not None
        return pod.chip.dcn_bandwidth
    places = np.array([device.coords for device in group])
    dimensions = int((places != places[0]).any(axis=0).sum())
    return pod.chip.link_bandwidth * 2 * max(1, dimensions)
