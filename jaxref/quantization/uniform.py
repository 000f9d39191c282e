"""Uniform (affine) quantization: round to the nearest of equally spaced levels, or to float8.

The range comes from the data: the largest magnitude if symmetric, the least and the largest value
(and 0, which is a level of its own) if not.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_broadcastable, check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.packing import pack, values_per_byte
from jaxref.quantization.tensor import QTensor, QuantSpec


def quantize(x: ArrayLike, spec: QuantSpec) -> QTensor:
    r"""Rounds to equally spaced levels (or to float8), stored as codes with a scale per group.

    For each group of entries that share a scale s and, if not symmetric, a zero point z,

        code = clip(round(x / s) + z, q_min, q_max),   x ≈ s (code - z)
        symmetric:   s = max|x| / q_max,                    z = 0
        asymmetric:  s = (high - low) / (q_max - q_min),    z = q_min - round(low / s)

    with [q_min, q_max] the `code_range` of the spec, low the lesser of 0 and the least x, high the
    larger of 0 and the largest x. Halves round to even. The range covers the data, so no entry is
    off by more than s / 2, zeros stay exactly 0, and quantizing the result again gives the same
    codes: all up to the rounding of the floats (which can move a range end that lies half-way
    between two levels, if asymmetric).

    The formats of float8 have the codes x / s of that type instead, with s = max|x| / 448 for
    e4m3fn and / 57344 for e5m2, their largest numbers: entries far below the largest keep their
    precision.

    Args:
      x: floating point, of any shape; without axes only at 5 bits or more, as codes pack along the
        last axis.
      spec: format and granularity, a `QuantSpec`.

    Returns:
      A `QTensor` with the shape of `x` whose scales are in at least float32; s is at least twice
      the smallest normal number, so a group of zeros gives zeros.

    Raises:
      ValueError: an axis of the spec that `x` does not have, no axis to pack along, or NaN or
        infinite entries. Under jit, where values cannot be tested, those leave their group with a
        scale that is NaN or infinite.
      TypeError: `x` is not floating point, or `spec` not a `QuantSpec`.

    Symmetric suits weights, and keeps an integer product free of correction terms; asymmetric
    halves the step for one-sided data (activations after ReLU). Blocks bound the reach of an
    outlier to its block, at the price of a scale for each. Call it under jit, where it is one
    fused pass after the reductions. A kernel `[in, out]` with `QuantSpec(bits=4,
    granularity="channel", axis=1)`, one scale for each output, is GLM-130B's quantization for
    inference: of linear layers' weights alone, rounded to nearest, with 16-bit activations.

    Cost: two passes, for the ranges and the codes, no data; a code of 2, 4 or 8 bits for each
    entry, and a float32 scale for each group.

    Example:
      >>> rows = QuantSpec(bits=4, granularity="channel", axis=0)
      >>> q = quantize(jnp.array([[0.4, -1.0, 0.3], [9.0, 2.0, 0.0]]), rows)
      >>> print(q.codes)
      [[ 3 -7  2]
       [ 7  2  0]]
      >>> q.values.shape, q.scale.shape
      ((2, 2), (2, 1))

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877; for weights alone, Zeng et al.,
    "GLM-130B: An Open Bilingual Pre-trained Model", 2022, arXiv:2210.02414.
    """
    x, spec = _checked(x, spec)
    codes, scale, zero_point = _encode(x, spec)
    padding = -x.shape[-1] % values_per_byte(spec.bits) if x.ndim else 0
    values = pack(codes, spec.bits) if spec.format == "int" else codes
    return QTensor(values, scale, zero_point, spec, x.dtype, padding)


def dequantize(q: QTensor, *, dtype: DTypeLike | None = None) -> Array:
    """The tensor that the codes stand for.

        x = scale (code - zero_point)

    Args:
      q: a `QTensor`.
      dtype: floating-point type of the result. Default: the type that was quantized.

    Returns:
      `x` with the shape of `q`, computed in the type of the scale. Values that rounding carried
      past the largest number of `dtype` are that number. Differentiable in `q.scale`.

    Raises:
      ValueError: the shapes of scale or zero point do not fit the values and the spec, or there is
        a zero point though the spec is symmetric (or none though it is not).
      TypeError: `q` is not a `QTensor`, or `dtype` not floating point.

    Use it where the numbers themselves are wanted, to compare methods or before an operation that
    knows no codes; `quantized_linear` and `int8_matmul` multiply by the codes.

    Cost: one elementwise pass; the whole tensor in `dtype`.

    Example:
      >>> q = quantize(jnp.array([0.4, -3.0, 2.2]), QuantSpec(bits=3))
      >>> print(dequantize(q))
      [ 0. -3.  2.]

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"q must be a QTensor, got {type(q).__name__}")
    if (q.zero_point is None) != q.spec.symmetric:
        raise ValueError(
            f"q.zero_point must be {'None' if q.spec.symmetric else 'an array'} "
            f"for symmetric={q.spec.symmetric}, got {q.zero_point}"
        )
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type, got {dtype.name}")
    codes = q.codes
    groups = list(codes.shape)
    if q.spec.block_size is not None:
        groups[q.spec.axes[0]] = -(-groups[q.spec.axes[0]] // q.spec.block_size)
    check_broadcastable(tuple(groups), **{"q.scale": q.scale, "q.zero_point": q.zero_point})
    return _decode(codes, q.scale, q.zero_point, q.spec, dtype)


def fake_quantize(x: ArrayLike, spec: QuantSpec) -> Array:
    r"""Quantizes and dequantizes at once, with the straight-through gradient.

        y = dequantize(quantize(x, spec)),   ∂y/∂x := 1

    The rounding is a staircase whose gradient is 0 nearly everywhere; the straight-through
    estimator takes it for the identity, also where x sets its group's scale. Estimators that stop
    the gradient of clipped entries agree with this one: the range comes from the data, so nothing
    is clipped.

    Args:
      x: floating point, of any shape.
      spec: format and granularity, a `QuantSpec`.

    Returns:
      y with the shape and type of `x`.

    Raises:
      ValueError: an axis of the spec that `x` does not have, or NaN or infinite entries (under jit
        and grad, where values cannot be tested, those spoil their group instead).
      TypeError: `x` is not floating point, or `spec` not a `QuantSpec`.

    For quantization-aware training; `quantize` where the memory is to shrink.

    Cost: two passes, for the ranges and the levels; the memory of `x` stays.

    Example:
      >>> spec = QuantSpec(bits=3)
      >>> x = jnp.array([0.4, -3.0, 2.2])
      >>> print(fake_quantize(x, spec))
      [ 0. -3.  2.]
      >>> print(jax.grad(lambda x: fake_quantize(x, spec).sum())(x))
      [1. 1. 1.]

    Reference: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432.
    """
    return _straight_through(*_checked(x, spec))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _straight_through(x: Array, spec: QuantSpec) -> Array:
    return _decode(*_encode(x, spec), spec, x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(spec, primals, tangents):
    return _straight_through(*primals, spec), *tangents


def _checked(x: ArrayLike, spec: QuantSpec) -> tuple[Array, QuantSpec]:
    """`x` as an array and the spec resolved for its axes."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, got {type(spec).__name__}")
    x = jnp.asarray(x)
    check_floating(x=x)
    spec = spec.resolve(x.ndim)
    if not isinstance(x, jax.core.Tracer) and not jnp.all(jnp.isfinite(x)):
        raise ValueError("x must be finite, got NaN or infinite entries")
    return x, spec


def _encode(x: Array, spec: QuantSpec) -> tuple[Array, Array, Array | None]:
    """Codes (not packed), scale and zero point.

    With products by reciprocals in place of quotients: XLA makes that change in some programs and
    not in others, and the codes must not depend on what surrounds them.
    """
    x = x.astype(compute_dtype(x))
    smallest = 2.0 * jnp.finfo(x.dtype).tiny  # 4 / scale stays finite
    if spec.format != "int":
        largest = float(jnp.finfo(spec.format).max)
        scale = jnp.maximum((1.0 / largest) * _group_max(jnp.abs(x), spec), smallest)
        codes = 0.25 * (x * _per_entry(4.0 / scale, x.shape, spec))
        return jnp.clip(codes, -largest, largest).astype(spec.format), scale, None
    q_min, q_max = spec.code_range
    if spec.symmetric:
        scale = jnp.maximum((1.0 / q_max) * _group_max(jnp.abs(x), spec), smallest)
        codes = _round_steps(x, _per_entry(4.0 / scale, x.shape, spec))
        return jnp.clip(codes, q_min, q_max).astype(jnp.int8), scale, None
    low, high = -_group_max(-x, spec), _group_max(x, spec)
    half_range = 0.5 * high - 0.5 * low  # high - low may overflow
    scale = jnp.maximum((2.0 / (q_max - q_min)) * half_range, smallest)
    zero_point = q_min - _round_steps(low, 4.0 / scale)
    codes = _round_steps(x, _per_entry(4.0 / scale, x.shape, spec))
    codes = jnp.clip(codes + _per_entry(zero_point, x.shape, spec), q_min, q_max)
    return codes.astype(jnp.int8), scale, zero_point.astype(jnp.int8)


def _round_steps(x: Array, four_over_scale: Array) -> Array:
    """round(x / scale). The four keeps 1 / scale normal, subnormals being flushed to 0."""
    return jnp.round(0.25 * (x * four_over_scale))


def _decode(
    codes: Array, scale: Array, zero_point: Array | None, spec: QuantSpec, dtype: jnp.dtype
) -> Array:
    x = codes.astype(scale.dtype)
    if zero_point is not None:
        x -= _per_entry(zero_point.astype(x.dtype), x.shape, spec)
    x *= _per_entry(scale, x.shape, spec)
    limits = jnp.finfo(dtype)
    return jnp.clip(x, float(limits.min), float(limits.max)).astype(dtype)


def _group_max(x: Array, spec: QuantSpec) -> Array:
    """The largest entry, and at least 0, of every group that shares a scale."""
    if spec.block_size is None:
        shared = tuple(axis for axis in range(-x.ndim, 0) if axis not in spec.axes)
        return jnp.max(x, axis=shared, keepdims=True, initial=0.0)
    axis = spec.axes[0] + x.ndim
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % spec.block_size)
    x = jnp.pad(x, padding)
    blocks = x.shape[axis] // spec.block_size
    x = x.reshape(*x.shape[:axis], blocks, spec.block_size, *x.shape[axis + 1 :])
    return jnp.max(x, axis=axis + 1, initial=0.0)


def _per_entry(groups: Array, shape: tuple[int, ...], spec: QuantSpec) -> Array:
    """One value per group, repeated so that it broadcasts against a tensor of `shape`."""
    if spec.block_size is None:
        return groups
    axis = spec.axes[0] + len(shape)
    before, after = shape[:axis], shape[axis + 1 :]
    blocks = -(-shape[axis] // spec.block_size)
    groups = jnp.expand_dims(jnp.broadcast_to(groups, (*before, blocks, *after)), axis + 1)
    # jnp.repeat would ask for the sharding of its result on a mesh with explicit axes.
    groups = jnp.broadcast_to(groups, (*before, blocks, spec.block_size, *after))
    groups = groups.reshape(*before, blocks * spec.block_size, *after)
    return jax.lax.slice_in_dim(groups, 0, shape[axis], axis=axis)
