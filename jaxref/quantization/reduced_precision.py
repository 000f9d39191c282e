"""Training in fewer bits, simulated: products whose operands are reduced, forward and backward."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.int8 import _check_kernel
from jaxref.quantization.number_formats import (
    _check_bits,
    _exponent_range,
    _largest,
    _quantize_float,
)
from jaxref.quantization.tensor import QuantSpec

Rounding = Literal["truncate", "nearest"]


def mask_mantissa_bits(x: ArrayLike, *, mantissa_bits: int) -> Array:
    r"""Cuts the mantissa off after some bits, with the gradient passed straight through.

        ± 2^e (1.m_1 m_2 ... m_k ... m_n)_2   becomes   ± 2^e (1.m_1 m_2 ... m_k)_2

    which is towards zero, by less than the part 2^-k of the number: one bitwise operation.

    Args:
      x: floating point, of any shape.
      mantissa_bits: k, 0 to 23. Types with no more than k bits stay as they are: bfloat16 has 7,
        float16 10, float32 23.

    Returns:
      The numbers in the shape and type of `x`; infinite ones and NaN are not changed.

    Raises:
      ValueError: `mantissa_bits` out of range.
      TypeError: `x` is not floating point, or `mantissa_bits` not an integer.

    The formats E8M0 to E8M6 out of bfloat16. `clip_exponent_range` takes bits of the exponent, and
    `simulate_float` of both. `quantize_float` rounds to nearest.

    Cost: one elementwise pass; the memory of `x` stays.

    Example:
      >>> x = jnp.array([1.9, -3.9, 0.3])
      >>> print(mask_mantissa_bits(x, mantissa_bits=1))
      [ 1.5  -3.    0.25]

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710.
    """
    check_floating(x=x)
    _check_bits(0, 23, mantissa_bits=mantissa_bits)
    return _truncate(jnp.asarray(x), None, mantissa_bits)


def clip_exponent_range(x: ArrayLike, *, exponent_bits: int) -> Array:
    r"""Clips numbers to those that fewer exponent bits can tell apart.

    With E bits and the bias b = 2^(E-1) - 1, the exponents go from 1 - b to 2^E - 1 - b. Numbers
    below 2^(1-b) become 0, and those beyond the largest number that number. The gradient is 1, and
    0 of what is beyond the largest.

    Args:
      x: floating point, of any shape.
      exponent_bits: E, 2 to 8. Types with no more than E stay as they are: float16 has 5, bfloat16
        and float32 have 8.

    Returns:
      The numbers in the shape and type of `x`; infinite ones and NaN are not changed.

    Raises:
      ValueError: `exponent_bits` out of range.
      TypeError: `x` is not floating point, or `exponent_bits` not an integer.

    The formats E2M7 to E7M7 out of bfloat16. As in `quantize_float` no code is kept for infinity
    and NaN; the paper does not say what becomes of small numbers, and here there are no subnormal
    ones.

    Cost: one elementwise pass; the memory of `x` stays.

    Example:
      >>> x = jnp.array([0.2, 0.3, 1.0, -9.0, jnp.inf])
      >>> print(clip_exponent_range(x, exponent_bits=3).round(3))
      [ 0.     0.3    1.    -9.       inf]
      >>> print(clip_exponent_range(x, exponent_bits=2).round(3))
      [ 0.  0.  1. -8. inf]

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710.
    """
    x = jnp.asarray(x)
    check_floating(x=x)
    _check_bits(2, 8, exponent_bits=exponent_bits)
    return _truncate(x, exponent_bits, jnp.finfo(x.dtype).nmant)


def simulate_float(
    x: ArrayLike,
    *,
    exponent_bits: int = 8,
    mantissa_bits: int,
    rounding: Rounding = "truncate",
    scaled: bool = False,
) -> Array:
    r"""Reduces numbers to those of a short floating-point format, one of a training's operands.

        truncate:         mask_mantissa_bits(clip_exponent_range(x, E), M)
        nearest:          quantize_float(x, E, M)
        nearest, scaled:  s quantize_float(x / s, E, M),   s = max|x| / largest

    Args:
      x: floating point, of any shape.
      exponent_bits: E, 2 to 8. Default 8, those of float32 and bfloat16.
      mantissa_bits: M, 0 to 23.
      rounding: "truncate" (default) as in the paper, "nearest" with halves to even and subnormal
        numbers as in hardware.
      scaled: one scale for the tensor, for "nearest", so that its largest entry becomes the largest
        number. Default False.

    Returns:
      The numbers in the shape and type of `x`; infinite ones and NaN are not changed. Gradients as
      those of the functions named.

    Raises:
      ValueError: bits out of range, an unknown `rounding`, or `scaled` with "truncate".
      TypeError: `x` is not floating point, or bits that are not integers.

    Use it on what goes into products that are not those of linear layers, attention's for example;
    `reduced_precision_dot` applies it to a linear layer's. `quantize_float` is the one with a scale
    for each block, and refuses NaN.

    Cost: elementwise, with one more pass for the scale if `scaled`; the memory of `x` stays.

    Example:
      >>> x = jnp.array([1.3, -7.9, 70.0])
      >>> print(simulate_float(x, exponent_bits=3, mantissa_bits=1))
      [ 1. -6. 24.]
      >>> nearest = {"rounding": "nearest", "scaled": True}
      >>> print(simulate_float(x, exponent_bits=3, mantissa_bits=1, **nearest).round(2))
      [ 1.46 -8.75 70.  ]

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710.
    """
    check_floating(x=x)
    return _simulate(jnp.asarray(x), _format(exponent_bits, mantissa_bits, rounding, scaled))


def reduced_precision_dot(
    x: ArrayLike,
    w: ArrayLike,
    *,
    exponent_bits: int = 8,
    mantissa_bits: int,
    rounding: Rounding = "truncate",
    scaled: bool = False,
    gradient_exponent_bits: int | None = None,
    gradient_mantissa_bits: int | None = None,
) -> Array:
    r"""A product whose operands have few bits, and so have those of its two backward products.

        y = R(x) R(w),   ∂L/∂x = R_g(g) R(w)ᵀ,   ∂L/∂w = R(x)ᵀ R_g(g),   g = ∂L/∂y

    with R and R_g `simulate_float` in the format of the operands and in that of the gradients, and
    sums in float32. The gradients are these products: nothing is subtracted for clipped entries, as
    hardware does not either.

    Args:
      x: `[..., in]` floating point.
      w: kernel `[in, out]` floating point.
      exponent_bits: 2 to 8, of x and w. Default 8.
      mantissa_bits: 0 to 23, of x and w. 7 with 8 exponent bits is bfloat16.
      rounding: "truncate" (default) or "nearest".
      scaled: one scale for each operand, for "nearest". Default False.
      gradient_exponent_bits: 2 to 8, of g. Default: `exponent_bits`.
      gradient_mantissa_bits: 0 to 23, of g. Default: `mantissa_bits`.

    Returns:
      y `[..., out]` in the common type of `x` and `w`. For the backward pass R(x) and R(w) are
      kept.

    Raises:
      ValueError: bits out of range, an unknown `rounding`, `scaled` with "truncate", or sizes that
        do not match.
      TypeError: `x` or `w` is not floating point, or bits that are not integers.

    Use it to ask how few bits a training would bear before the hardware exists. Recipes for FP8 are
    E4M3 forward, E5M2 for gradients, and scales: `exponent_bits=4, mantissa_bits=3,
    gradient_exponent_bits=5, gradient_mantissa_bits=2, rounding="nearest", scaled=True`.
    `jaxref.nn.ReducedPrecisionLinear` is the module.

    Cost: that of products in full float32, one and two more in the backward pass, beside passes
    over the operands: a simulation saves no time.

    Example:
      >>> f = lambda x, w: reduced_precision_dot(x, w, mantissa_bits=1)
      >>> y, vjp = jax.vjp(f, jnp.array([[1.9, 0.3]]), jnp.array([[1.0], [1.1]]))
      >>> print(y, *vjp(jnp.array([[3.9]])))
      [[1.75]] [[3. 3.]] [[4.5 ]
       [0.75]]

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710.
    """
    check_floating(x=x, w=w)
    dtype = jnp.result_type(x, w)
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    _check_kernel(w.shape, x.shape, "w")
    operands = _format(exponent_bits, mantissa_bits, rounding, scaled)
    gradients = _format(
        exponent_bits if gradient_exponent_bits is None else gradient_exponent_bits,
        mantissa_bits if gradient_mantissa_bits is None else gradient_mantissa_bits,
        rounding,
        scaled,
        prefix="gradient_",
    )
    return _reduced_dot(x, w, operands, gradients)


class _Format(NamedTuple):
    exponent_bits: int
    mantissa_bits: int
    rounding: Rounding
    scaled: bool


def _format(
    exponent_bits: int, mantissa_bits: int, rounding: Rounding, scaled: bool, prefix: str = ""
) -> _Format:
    _check_bits(2, 8, **{f"{prefix}exponent_bits": exponent_bits})
    _check_bits(0, 23, **{f"{prefix}mantissa_bits": mantissa_bits})
    if rounding not in ("truncate", "nearest"):
        raise ValueError(f"rounding must be 'truncate' or 'nearest', got {rounding!r}")
    if scaled and rounding == "truncate":
        raise ValueError("scaled must be False for rounding 'truncate'")
    return _Format(exponent_bits, mantissa_bits, rounding, scaled)


def _simulate(x: Array, fmt: _Format) -> Array:
    if fmt.rounding == "truncate":
        return _truncate(x, fmt.exponent_bits, fmt.mantissa_bits)
    spec = QuantSpec() if fmt.scaled else None
    reduced = _quantize_float(x, fmt.exponent_bits, fmt.mantissa_bits, spec)
    return jnp.where(jnp.isfinite(x), reduced, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _truncate(x: Array, exponent_bits: int | None, mantissa_bits: int) -> Array:
    limits, y = jnp.finfo(x.dtype), x
    smallest, largest = _normal_range(x.dtype, exponent_bits)
    if smallest > limits.tiny or largest < limits.max:
        y = jnp.where(jnp.abs(x) < smallest, 0, jnp.clip(x, -largest, largest))
    dropped = max(limits.nmant - mantissa_bits, 0)
    kept = (2**limits.bits - 1) >> dropped << dropped
    codes = jax.lax.bitcast_convert_type(y, jnp.dtype(f"uint{limits.bits}"))
    y = jax.lax.bitcast_convert_type(codes & np.array(kept, codes.dtype), x.dtype)
    return jnp.where(jnp.isfinite(x), y, x)  # a NaN without its last bits may be infinity


@_truncate.defjvp
def _truncate_jvp(exponent_bits, mantissa_bits, primals, tangents):
    (x,), (tangent,) = primals, tangents
    _, largest = _normal_range(x.dtype, exponent_bits)
    if largest < jnp.finfo(x.dtype).max:
        tangent = jnp.where(jnp.abs(x) <= largest, tangent, 0)
    return _truncate(x, exponent_bits, mantissa_bits), tangent


def _normal_range(dtype: jnp.dtype, exponent_bits: int | None) -> tuple[float, float]:
    """The smallest and the largest number with those exponents, or all, and the type's mantissa."""
    limits = jnp.finfo(dtype)
    if exponent_bits is None:
        return float(limits.tiny), float(limits.max)
    bottom, top = _exponent_range(exponent_bits)
    return 2.0**bottom, min(_largest(exponent_bits, limits.nmant, top), float(limits.max))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _reduced_dot(x: Array, w: Array, operands: _Format, gradients: _Format) -> Array:
    return _reduced_dot_forward(x, w, operands, gradients)[0]


def _reduced_dot_forward(x, w, operands, gradients):
    x_r, w_r = _operand(x, operands), _operand(w, operands)
    return _float32_matmul(x_r, w_r).astype(x.dtype), (x_r, w_r)


def _reduced_dot_backward(operands, gradients, residuals, gradient):
    y, vjp = jax.vjp(_float32_matmul, *residuals)
    to_x, to_w = vjp(_operand(gradient, gradients).astype(y.dtype))
    return to_x.astype(gradient.dtype), to_w.astype(gradient.dtype)


_reduced_dot.defvjp(_reduced_dot_forward, _reduced_dot_backward)


def _operand(x: Array, fmt: _Format) -> Array:
    # A short number times its scale needs more bits than a short type has.
    return _simulate(x.astype(compute_dtype(x)) if fmt.scaled else x, fmt)


def _float32_matmul(a: Array, b: Array) -> Array:
    """In full, where the default on TPU would round float32 operands to bfloat16."""
    return jnp.matmul(
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=compute_dtype(a, b),
    )
