"""Floating-point formats of any number of exponent and mantissa bits, simulated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.tensor import QuantSpec
from jaxref.quantization.uniform import _group_max, _per_entry


def quantize_float(
    x: ArrayLike,
    *,
    exponent_bits: int,
    mantissa_bits: int,
    block_size: int | None = None,
    axis: int = -1,
) -> Array:
    r"""Rounds to the numbers of a floating-point format, with the gradient passed straight through.

    With E exponent and M mantissa bits and the bias b = 2^(E-1) - 1, the numbers are

        ± 2^(e-b) (1 + m / 2^M),  e = 1 ... 2^E - 1     and     ± 2^(1-b) m / 2^M,  m < 2^M

    no code being kept for infinity or NaN, so that the largest is 2^(2^E - 1 - b) (2 - 2^-M).
    E = 1 and E = 0 (with b = 0) are fixed-point numbers of M + 1 and M bits and a sign. In blocks,

        x̂ = s round(x / s),   s = max|x| / largest,   one s per block

    and b plays no part. Halves round to even. The result is in the type of `x`: this simulates the
    format, in which a tensor would take 1 + E + M bits per entry and a scale per block. The
    gradient is 1, and 0 for entries beyond the largest number.

    Args:
      x: floating point, of any shape; with axes if in blocks.
      exponent_bits: E, 0 to 8.
      mantissa_bits: M, 0 to 23, and at least 1 if E is 0. (E, M) = (2, 1) is FP4, (4, 3) FP8, whose
        e4m3fn gives the code of the largest number, 480, to NaN; (8, 7) is bfloat16.
      block_size: B at least 1, the entries along `axis` that share a scale; the last block may be
        shorter. Default: no scale, and entries beyond the largest number become that number.
      axis: the axis that is cut into blocks; for a kernel `[in, out]`, the inputs that are summed
        over are axis 0. Default -1.

    Returns:
      x̂ of the shape and type of `x`, computed in at least float32; numbers that are subnormal
      there are 0 on most devices.

    Raises:
      ValueError: bits out of range, `block_size` below 1, an `axis` that `x` does not have, or NaN
        or infinite entries. Under jit, where values cannot be tested, NaN stays NaN, infinity
        becomes the largest number, and in blocks either spoils its block.
      TypeError: `x` is not floating point, or bits that are not integers.

    Use it to study a format, or to train with one in simulation, as in the paper: on inputs and
    weights of linear layers, in the products of the forward and of the backward pass, which
    `reduced_precision_dot` does with one scale per tensor or none. `quantize` is for equally spaced
    levels, and stores codes.

    Cost: a few elementwise passes, in blocks one more for their maxima; `x` keeps the memory of its
    type.

    Example:
      >>> x = jnp.array([0.2, 0.3, 1.2, 2.4, 5.1, 9.0])
      >>> print(quantize_float(x, exponent_bits=2, mantissa_bits=1))
      [0.  0.5 1.  2.  6.  6. ]
      >>> print(quantize_float(x, exponent_bits=2, mantissa_bits=1, block_size=3).round(2))
      [0.2 0.3 1.2 2.25 4.5 9. ]

    Reference: Sun et al., "Scaling Laws for Floating Point Quantization Training", 2025,
    arXiv:2501.02423.
    """
    x = jnp.asarray(x)
    check_floating(x=x)
    _check_bits(0, 8, exponent_bits=exponent_bits)
    _check_bits(0 if exponent_bits else 1, 23, mantissa_bits=mantissa_bits)
    spec = None
    if block_size is not None:
        spec = QuantSpec(granularity="block", axis=axis, block_size=block_size).resolve(x.ndim)
    if not isinstance(x, jax.core.Tracer) and not jnp.all(jnp.isfinite(x)):
        raise ValueError("x must be finite, got NaN or infinite entries")
    return _quantize_float(x, exponent_bits, mantissa_bits, spec)


def _check_bits(low: int, high: int, **bits: Any) -> None:
    for name, value in bits.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    check_interval(low, high, **bits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _quantize_float(x: Array, exponent_bits: int, mantissa_bits: int, spec: QuantSpec | None):
    wide = x.astype(compute_dtype(x))
    if spec is None:
        bottom, top = _exponent_range(exponent_bits)
        largest = min(_largest(exponent_bits, mantissa_bits, top), float(jnp.finfo(wide.dtype).max))
        rounded = _round_to_grid(jnp.clip(wide, -largest, largest), mantissa_bits, bottom)
    else:
        # In units in which the largest numbers have exponent 0, so that nothing over- or
        # underflows for 8 exponent bits. The four keeps the factor normal.
        bottom, top = _exponent_range(exponent_bits)
        bottom, top = bottom - top, 0
        largest = _largest(exponent_bits, mantissa_bits, top)
        size = jnp.maximum(_group_max(jnp.abs(wide), spec), 4 * jnp.finfo(wide.dtype).tiny)
        unit = 0.25 * (wide * _per_entry(4 * largest / size, wide.shape, spec))
        rounded = jnp.clip(_round_to_grid(unit, mantissa_bits, bottom), -largest, largest)
        rounded *= _per_entry(size * (1 / largest), wide.shape, spec)
    limits = jnp.finfo(x.dtype)
    return jnp.clip(rounded, float(limits.min), float(limits.max)).astype(x.dtype)


@_quantize_float.defjvp
def _quantize_float_jvp(exponent_bits, mantissa_bits, spec, primals, tangents):
    (x,), (tangent,) = primals, tangents
    if spec is None:
        _, top = _exponent_range(exponent_bits)
        largest = min(_largest(exponent_bits, mantissa_bits, top), float(jnp.finfo(x.dtype).max))
        tangent = jnp.where(jnp.abs(x) <= largest, tangent, 0)
    return _quantize_float(x, exponent_bits, mantissa_bits, spec), tangent


def _exponent_range(exponent_bits: int) -> tuple[int, int]:
    """The exponents of the smallest normal numbers, and of the largest numbers."""
    if exponent_bits == 0:
        return 1, 1
    bias = 2 ** (exponent_bits - 1) - 1
    return 1 - bias, 2**exponent_bits - 1 - bias


def _largest(exponent_bits: int, mantissa_bits: int, top: int) -> float:
    leading = 2.0 if exponent_bits else 1.0  # without exponent bits, all numbers are subnormal
    return 2.0**top * (leading - 2.0**-mantissa_bits)


def _round_to_grid(x: Array, mantissa_bits: int, bottom: int) -> Array:
    """To `mantissa_bits` behind the leading bit, and to multiples of 2^(bottom - mantissa_bits)."""
    fraction, exponent = jnp.frexp(x)  # 1/2 <= |fraction| < 1
    bits = mantissa_bits + jnp.minimum(1, exponent - bottom)
    bits = jnp.maximum(bits, -1)  # everything below half of the smallest number is 0
    steps = jnp.round(fraction * jnp.ldexp(jnp.ones_like(x), bits))
    return jnp.ldexp(steps, exponent - bits)
