"""Device meshes by axis size."""

import math
import operator
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""The axes every mesh has, outermost first: neighbours on `tensor` talk most."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `expert`, `sequence` and `tensor` over all devices.

    Within a slice the axes follow the interconnect, as `mesh_utils.create_device_mesh` lays them.
    Devices of several slices, which a data-centre network connects, must be the same number in
    each: the axis `data` goes over the slices first, so that all others stay within one.

    Args:
      sizes: size by axis name; an axis that is missing has size 1. One axis may be -1: it takes
        the devices that the others leave.
      devices: the devices to arrange; default all of `jax.devices()`.

    Returns:
      A `jax.sharding.Mesh` with axis names `MESH_AXES`, whose axes are of type Auto.

    Raises:
      ValueError: an axis name that does not exist, a size below 1 (other than one -1), a product
        of sizes that is not the number of devices, or a size of `data` that the number of slices
        does not divide.
      TypeError: a size that is not an integer.

    Use it once, at the start of a program: `data` or `fsdp` first, `tensor` where a layer is too
    large for a device, `sequence` where a sequence is. `jax.make_mesh` makes meshes with other
    axes, for which rules have to be written.

    Cost: no arrays and no communication, but a layout of the devices on the host.

    Example:
      >>> make_mesh({"data": -1}, jax.devices()[:1]).shape["tensor"]
      1
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"mesh has no axis {sorted(unknown)}; its axes are {list(MESH_AXES)}")
    shape = [operator.index(sizes.get(axis, 1)) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(f"mesh sizes must be positive, and at most one -1, got {dict(sizes)}")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{a}={size}" for a, size in zip(MESH_AXES, shape) if size != 1)
        raise ValueError(
            f"mesh {wanted or 'of size 1'} does not divide the {len(devices)} devices: the product "
            f"of its sizes must be {len(devices)}"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        data, *within = shape
        if data % slices:
            raise ValueError(
                f"mesh data={data} must be a multiple of the {slices} slices that the devices are "
                "in: it is the axis that goes over them"
            )
        placed = mesh_utils.create_hybrid_device_mesh(
            [data // slices, *within],
            [slices, *(1 for _ in within)],
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
