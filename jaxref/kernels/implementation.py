"""Who computes a kernel: XLA, or Pallas for a TPU or a GPU."""

from typing import NamedTuple

import jax
from jax import Array
from jax.typing import DTypeLike

IMPLEMENTATIONS = (
    "xla",
    "pallas",
    "pallas_interpret",
    "pallas_tpu",
    "pallas_gpu",
    "pallas_tpu_interpret",
    "pallas_gpu_interpret",
)
"""What `implementation=` may be, besides None."""


class Implementation(NamedTuple):
    """A choice made.

    Attributes:
      platform: "xla", or whose Pallas kernel it is, "tpu" or "gpu".
      interpret: whether the kernel is interpreted, which runs anywhere and is slow.
    """

    platform: str
    interpret: bool = False


def choose_implementation(implementation: str | None, *operands: Array) -> Implementation:
    """What computes a kernel.

    Args:
      implementation: None, for Pallas on a TPU and XLA elsewhere; "xla"; "pallas", the kernel of
        the default backend, inside `jax.shard_map` of the mesh's devices; "pallas_tpu" or
        "pallas_gpu", that of a platform whether or not it is here, to compile for it ahead of time;
        or one of the three with "_interpret", which any machine can run ("pallas_interpret" is that
        of a TPU where the default backend is a CPU).
      *operands: the arrays to compute with.

    Returns:
      The choice. None is XLA too for float64, which the kernels do not compute with, and where a
      program is spread over devices by the compiler, which does not cut kernels: there
      `jax.shard_map` gives each device its part.

    Raises:
      ValueError: a name that does not exist, a kernel that the default backend has not, or a Pallas
        kernel for float64.

    >>> choose_implementation("pallas_interpret")
    Implementation(platform='tpu', interpret=True)
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    backend = _backend()
    is_double = any(x.dtype.itemsize == 8 and x.dtype.kind == "f" for x in operands)
    if implementation is None:
        return Implementation("tpu" if backend == "tpu" and _whole() and not is_double else "xla")
    if implementation == "xla":
        return Implementation("xla")
    if is_double:
        raise ValueError(
            f"implementation must be None or 'xla' for float64, got {implementation!r}"
        )
    interpret = implementation.endswith("_interpret")
    named = implementation.removesuffix("_interpret").removeprefix("pallas").removeprefix("_")
    if not named:
        if not interpret and backend not in ("tpu", "gpu"):
            raise ValueError(
                f"implementation 'pallas' needs a TPU or a GPU, and the default backend is "
                f"{backend}: 'xla' and 'pallas_interpret' run here, 'pallas_tpu' and 'pallas_gpu' "
                "compile for another machine"
            )
        named = "gpu" if backend == "gpu" else "tpu"
    return Implementation(named, interpret)


def _backend() -> str:
    """The platform of the devices of `jax.shard_map`, which a program may be compiled for where
    they are not; elsewhere the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _whole() -> bool:
    """Whether arrays are whole on one device where a program is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    inside_shard_map = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() == 1 or inside_shard_map


def kernel_result(
    shape: tuple[int, ...], dtype: DTypeLike, *operands: Array
) -> jax.ShapeDtypeStruct:
    """What a kernel returns, for the `out_shape` of `pallas_call`.

    Inside `jax.shard_map` a result varies over the mesh axes over which any of its operands does.

    >>> kernel_result((2, 3), "float32").shape
    (2, 3)
    """
    varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    manual = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)
