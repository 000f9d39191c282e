"""The quantized tensor and the specification of its format."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.core.checks import canonical_axes, check_interval
from jaxref.quantization.packing import unpack, values_per_byte

FORMATS = ("int", "float8_e4m3fn", "float8_e5m2")
GRANULARITIES = ("tensor", "channel", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantized: the format of its values and which of them share a scale.

    Args:
      format: "int" (default), the levels `scale (code - zero_point)` of uniform quantization; or
        "float8_e4m3fn" or "float8_e5m2", `scale code` with a code of that type: 4 or 5 bits of
        exponent, 3 or 2 of mantissa.
      bits: 2 to 8, the width of a code; 8 for float8. Codes of 5 bits and more take a byte each,
        two codes of 3 or 4 bits and four of 2 bits share one. Default 8.
      granularity: which entries share a scale. "tensor" (default): all. "channel": those with the
        same index along `axis`, so that (1,) gives every output channel of an `[in, out]` kernel
        its own scale, as `axis` of `torch.quantize_per_channel`. "block": runs of `block_size`
        entries along `axis`, every other axis having scales of its own; the last block may be
        shorter.
      axis: the axis or axes of the channels, or the one axis that is cut into blocks; negative
        ones count from the end. None for "tensor".
      block_size: at least 1, for "block" only; 32 to 128 is usual for weights of 4 bits.
      symmetric: True (default) has no zero point and the codes -(2^(b-1) - 1) ... 2^(b-1) - 1: the
        most negative code stays unused, so that x and -x are treated alike, the largest magnitude
        lies on a level, and an int8 product cannot meet -128 · -128. False, for "int" alone, fits
        the range from min(x, 0) to max(x, 0) with all codes -2^(b-1) ... 2^(b-1) - 1 and a zero
        point.

    Raises:
      ValueError: a value out of its range, or `axis` or `block_size` missing or out of place.
      TypeError: an argument of the wrong type.

    A spec is hashable, so it can be a static argument of jit.

    Cost: 2 bits an entry, 4 for 3 and 4, and 8 from 5 bits on; a float32 scale for each group, and
    an int8 zero point if not symmetric.

    Example:
      >>> QuantSpec(bits=4, granularity="block", axis=0, block_size=64).code_range
      (-7, 7)
    """

    format: str = "int"
    bits: int = 8
    granularity: str = "tensor"
    axis: int | tuple[int, ...] | None = None
    block_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {self.format!r}")
        check_interval(2, 8, bits=_check_int("bits", self.bits))
        if self.format != "int" and (self.bits != 8 or self.symmetric is not True):
            raise ValueError(
                f"bits and symmetric must be 8 and True for format {self.format!r}, got "
                f"{self.bits} and {self.symmetric}"
            )
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {GRANULARITIES}, got {self.granularity!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be a bool, got {self.symmetric!r}")
        for axis in self.axes:
            _check_int("axis", axis)
        if self.granularity == "tensor" and self.axis is not None:
            raise ValueError(f"axis must be None for granularity 'tensor', got {self.axis}")
        if self.granularity == "channel" and not self.axes:
            raise ValueError(f"axis must be given for granularity 'channel', got {self.axis}")
        if self.granularity == "block" and len(self.axes) != 1:
            raise ValueError(f"axis must be one axis for granularity 'block', got {self.axis}")
        if self.granularity == "block":
            if _check_int("block_size", self.block_size) < 1:
                raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        elif self.block_size is not None:
            raise ValueError(
                f"block_size must be None for granularity {self.granularity!r}, "
                f"got {self.block_size}"
            )

    @property
    def axes(self) -> tuple[int, ...]:
        """`axis` as a tuple, empty for granularity "tensor"."""
        if self.axis is None:
            return ()
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code.

        Raises:
          ValueError: the codes are floats: methods that choose among equally spaced levels need
            the format "int".
        """
        if self.format != "int":
            raise ValueError(f"format must be 'int' for codes in a range, got {self.format!r}")
        largest = 2 ** (self.bits - 1) - 1
        return (-largest if self.symmetric else -largest - 1), largest

    def resolve(self, ndim: int) -> "QuantSpec":
        """The spec with `axis` as a sorted tuple counted from the end, for arrays of `ndim` axes.

        Raises:
          ValueError: an axis is out of range or named twice.

        Example:
          >>> QuantSpec(granularity="channel", axis=0).resolve(3).axis
          (-3,)
        """
        if self.axis is None:
            return self
        axes = canonical_axes(self.axis, ndim)
        return dataclasses.replace(self, axis=tuple(axis - ndim for axis in axes))


def _check_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor: codes as stored, their scales and zero points.

        x ≈ scale (code - zero_point)

    A pytree of the three arrays, with everything else static: it goes through jit, vmap, scan,
    `jax.device_put`, `jax.tree.map` and checkpoints like any part of the parameters. All three
    arrays have as many axes as the tensor, so one sharding can fit all of them, and the spec
    counts its axes from the end, so axes that vmap, `jnp.stack` or scan add in front are fine.

    Args:
      values: the codes: int8 or float8 of the tensor's shape, or uint8 packed along the last axis.
      scale: in at least float32, positive; the tensor's shape with 1 for axes that share a scale,
        and the number of blocks for the axis in blocks.
      zero_point: int8 of the shape of `scale`, the code that stands for 0; None if symmetric.
      spec: the `QuantSpec`, resolved for the number of axes.
      dtype: the floating-point type to dequantize to.
      padding: how many codes at the end of the packed axis only fill up its last byte.

    `quantize` makes one; construct it directly only for codes that come from elsewhere.
    """

    values: Array
    scale: Array
    zero_point: Array | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    padding: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that the codes stand for."""
        per_byte = values_per_byte(self.spec.bits)
        if per_byte == 1:
            return self.values.shape
        return (*self.values.shape[:-1], self.values.shape[-1] * per_byte - self.padding)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim

    @property
    def size(self) -> int:
        """The number of entries; `8 * nbytes / size` is the bits that each of them costs."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The memory of codes, scales and zero points together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def codes(self) -> Array:
        """The codes of the tensor's shape, whatever their storage: int8, or float8."""
        if self.spec.format != "int":
            return self.values
        return unpack(self.values, self.spec.bits, padding=self.padding)
