"""Training with few bits in which weights do not oscillate between neighbouring levels (OFQ).

The scale of the weights is a statistic of them in place of a parameter, and in the last epochs only
the weights next to a threshold may still move. The third part, one matrix in the place of query and
key projections, is `jaxref.attention.query_key_reparameterization`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_same_tree,
    check_shape,
)
from jaxref.core.numerics import compute_dtype

_LEAST_STEP = 1e-8


def statistical_weight_quantize(
    w: ArrayLike, *, bits: int, axis: int | tuple[int, ...] = -2
) -> Array:
    r"""Rounds weights to levels whose scale is twice their mean magnitude (StatsQ).

        s = 2 mean|w|,   n = 2^(bits-1),   u = n clip(w / s, -1, 1) - 1/2
        code = clip(round(u), -n, n - 1),   w_q = s (code + 1/2) / n

    The levels are symmetric and 0 is none of them: ±s/4 and ±3s/4 for two bits. The gradient is
    straight-through, ∂w_q/∂w := 1, outside the range as well; the scale has none.

    Args:
      w: floating point, of any shape with axes: a kernel `[in, out]`, say.
      bits: 1 to 8.
      axis: the axis or axes whose entries share a scale. Default -2: all inputs of an output. For
        the W `[heads, features, features']` of `query_key_reparameterization`: -1.

    Returns:
      w_q with the shape and type of `w`, computed in at least float32; 0 where all weights that
      share a scale are.

    Raises:
      ValueError: `bits` or `axis` out of range, or NaN or infinite entries where values can be
        tested.
      TypeError: `w` is not floating point.

    A learned scale (`learned_step_quantize`) moves with every step, and with it the thresholds that
    the weights next to them then cross to and fro; the mean of many magnitudes hardly moves.
    `fake_quantize` takes the scale from the largest weight: with 2 bits most others become 0.
    `statistical_weight_codes` gives what to store.

    Cost: two passes over the weight, for the mean and the codes; no parameter and no state.

    Example:
      >>> print(statistical_weight_quantize(jnp.array([[0.5], [-0.1], [3.0], [-0.4]]), bits=2))
      [[ 0.5]
       [-0.5]
       [ 1.5]
       [-0.5]]

    Reference: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    return _straight_through(*_checked(w, bits, axis))


def statistical_weight_codes(
    w: ArrayLike, *, bits: int, axis: int | tuple[int, ...] = -2
) -> tuple[Array, Array]:
    r"""The codes and the scale of `statistical_weight_quantize`.

        w_q = s (code + 1/2) / 2^(bits-1)

    Args:
      w, bits, axis: as there.

    Returns:
      codes: int8 of the shape of `w`, in [-2^(bits-1), 2^(bits-1) - 1]. `pack` stores them, which
        makes `bits` per weight (3 as 4, more than 4 as 8) and the scale.
      s: in at least float32, of the shape of `w` with 1 for the axes that share it.

    Raises:
      ValueError: as there.
      TypeError: as there.

    The zero point of a `QTensor` is a code, and here 0 lies between two of them.

    Cost: two passes over the weight, a byte for each code until they are packed.

    Example:
      >>> codes, scale = statistical_weight_codes(jnp.array([[0.5], [-0.1], [3.0]]), bits=2)
      >>> print(codes.ravel(), scale.ravel())
      [ 0 -1  1] [2.4]

    Reference: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    w, bits, axes = _checked(w, bits, axis)
    steps, scale = _steps(w, bits, axes)
    return _round(steps, bits).astype(jnp.int8), scale


class OscillationState(NamedTuple):
    """The state of `oscillation_tracker_update`.

    Attributes:
      codes: int32, of the last step.
      direction: int32, the sign of each weight's last change of code; 0 before the first.
      frequency: float32, the running mean of the oscillations.
    """

    codes: Array
    direction: Array
    frequency: Array


def oscillation_tracker_init(codes: ArrayLike) -> OscillationState:
    """The state before the first change of codes.

    Args:
      codes: integers of any shape, of the weights before training.

    Returns:
      An `OscillationState` without oscillations.

    Raises:
      TypeError: `codes` are not integers.

    Use it at the start of a training with few bits, for each weight that shall be watched;
    `oscillation_tracker_update` then takes the codes of each step.

    Cost: three arrays of the weight's size: two of int32, one of float32.

    Example:
      >>> print(oscillation_tracker_init(jnp.array([1, -1])).frequency)
      [0. 0.]

    Reference: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    codes = _integer_codes(codes)
    zeros = jnp.zeros_like(codes)
    return OscillationState(codes, zeros, zeros.astype(jnp.float32))


def oscillation_tracker_update(
    state: OscillationState, codes: ArrayLike, *, momentum: float = 0.01
) -> OscillationState:
    r"""Counts the weights whose code has turned back.

        d = sign(code_t - code_{t-1}),   o = 1 where d ≠ 0 and d = -(the last d that was not 0)
        f ← momentum o + (1 - momentum) f

    Args:
      state: of the step before.
      codes: integers of the state's shape, from `statistical_weight_codes`, say.
      momentum: in [0, 1], the share of the newest step. Default 0.01.

    Returns:
      The next state. `frequency` is f: a weight that turns back at every step comes to 1.

    Raises:
      ValueError: another shape, or `momentum` out of range.
      TypeError: `codes` are not integers.

    Use it to see whether codes settle: where many weights keep turning back late in training,
    `confidence_guided_annealing` is what to do about it.

    Cost: one pass over the three arrays of the state a step, and the codes.

    Example:
      >>> state = oscillation_tracker_init(jnp.array([0, 0]))
      >>> for codes in ([1, 1], [0, 1], [1, 2]):
      ...     state = oscillation_tracker_update(state, jnp.array(codes), momentum=0.5)
      >>> print(state.frequency)
      [0.75 0.  ]

    Reference: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", 2022,
    arXiv:2203.11086; as the measure of Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit
    Vision Transformers", 2023, arXiv:2302.02210.
    """
    codes = _integer_codes(codes)
    check_shape(state.codes.shape, codes=codes)
    check_interval(0, 1, momentum=momentum)
    turn = jnp.sign(codes - state.codes)
    oscillates = turn * state.direction == -1
    return OscillationState(
        codes,
        jnp.where(turn == 0, state.direction, turn),
        momentum * oscillates + (1 - momentum) * state.frequency,
    )


def confidence_guided_mask(
    w: ArrayLike, *, bits: int, boundary: float = 0.005, axis: int | tuple[int, ...] = -2
) -> Array:
    r"""Which weights lie next to a threshold between two levels: their codes are not settled.

        |u - (i + 1/2)| ≤ boundary   for a code i in [-n, n - 2]

    with u and n of `statistical_weight_quantize`.

    Args:
      w, bits, axis: as there.
      boundary: in [0, 1/2], half the width of the zone in steps between levels. Default 0.005; the
        paper also takes 0.007.

    Returns:
      bool of the shape of `w`. False where all weights that share a scale are 0, and beyond the
      outermost thresholds.

    Raises:
      ValueError: as there, or `boundary` out of range.
      TypeError: as there.

    Use it to count the weights that are not settled, without a history;
    `oscillation_tracker_update` counts those that did turn back. `confidence_guided_annealing` lets
    none but these move.

    Cost: two passes over the weight.

    Example:
      >>> w = jnp.array([[1.1], [-1.0], [0.001], [-0.2], [3.0], [-0.7]])
      >>> print(confidence_guided_mask(w, bits=2).ravel())
      [False  True  True False False False]

    Reference: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    check_interval(0, 0.5, boundary=boundary)
    w, bits, axes = _checked(w, bits, axis)
    steps, scale = _steps(w, bits, axes)
    half_codes = 2 ** (bits - 1)
    lower = jnp.floor(steps)
    between = (lower >= -half_codes) & (lower <= half_codes - 2) & (scale > 0)
    return between & (jnp.abs(steps - lower - 0.5) <= boundary)


def confidence_guided_annealing(
    inner: optax.GradientTransformation,
    *,
    bits: int,
    boundary: float = 0.005,
    axis: int | tuple[int, ...] = -2,
) -> optax.GradientTransformationExtraArgs:
    r"""Annealing in which only the weights next to a threshold still move (CGA).

        g ← g · unconfident,   Δ ← inner(g) · unconfident

    with the `confidence_guided_mask` of the weights before the step, so that neither momentum nor
    weight decay moves the others, and these keep their exact values. It is for the last epochs (15
    of them in the paper) of a training with `statistical_weight_quantize`.

    Args:
      inner: the optimizer.
      bits, boundary, axis: of `confidence_guided_mask`.

    Returns:
      an optax transformation with the state of `inner`, whose `update` needs `params`; other extra
      arguments go to `inner`. Leaves with fewer than two axes (biases, gains) are not held, so
      `optax.multi_transform` has to keep embeddings and other kernels that are not quantized away.

    Raises:
      ValueError: a number out of its range; in `update`, params missing or of another structure.

    Use it when training has come to rest but for weights that cross their thresholds to and fro,
    around the same optimizer; from the start on it would freeze nearly all weights.

    Cost: the state of `inner`; two passes over each kernel a step, for its mask.

    Example:
      >>> optimizer = confidence_guided_annealing(optax.sgd(1.0), bits=2)
      >>> params = {"kernel": jnp.array([[0.001], [-0.7], [0.9]])}
      >>> gradients = {"kernel": jnp.array([[0.25], [0.25], [0.25]])}
      >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
      >>> print(updates["kernel"].ravel())
      [-0.25  0.    0.  ]

    Reference: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    check_interval(1, 8, bits=bits)
    check_interval(0, 0.5, boundary=boundary)
    wrapped = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("params must be passed to update: they say what may move, got None")
        check_same_tree(params, updates=updates)

        def held(update, w):
            if jnp.ndim(w) < 2:
                return update
            mask = confidence_guided_mask(w, bits=bits, boundary=boundary, axis=axis)
            return jnp.where(mask, update, 0.0)

        updates, state = wrapped.update(
            jax.tree.map(held, updates, params), state, params, **extra_args
        )
        return jax.tree.map(held, updates, params), state

    return optax.GradientTransformationExtraArgs(wrapped.init, update)


def learned_step_init(
    x: ArrayLike, *, bits: int, signed: bool = True, axis: int | tuple[int, ...] | None = None
) -> Array:
    r"""The step to begin `learned_step_quantize` with.

        step = 2 mean|x| / √q_max,   4 mean|x| / √q_max if not signed

    Args:
      x: floating point, the first batch of activations, or weights.
      bits, signed: of `learned_step_quantize`.
      axis: the axis or axes whose entries share a step. Default: all.

    Returns:
      The step, in at least float32, of the shape of `x` with 1 for the axes that share it.

    Raises:
      ValueError: `bits` or `axis` out of range.
      TypeError: `x` is not floating point.

    Use it once, on a weight or on the first batch of activations. `genie_activation_quantizer_init`
    searches for the step of the least error instead, and `elastic_quantizer_init` does so for many
    formats.

    Cost: one pass.

    Example:
      >>> print(learned_step_init(jnp.array([0.5, -1.5]), bits=2))
      [2.]

    Reference: Esser et al., "Learned Step Size Quantization", 2019, arXiv:1902.08153; without sign
    as in the code of Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision
    Transformers", 2023, arXiv:2302.02210.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    q_max = _code_range(bits, signed)[1]
    axes = None if axis is None else canonical_axes(axis, x.ndim)
    magnitudes = jnp.abs(x.astype(compute_dtype(x)))
    mean = jnp.mean(magnitudes, axis=axes, keepdims=True) if x.size else jnp.zeros(())
    return (2.0 if signed else 4.0) / q_max**0.5 * mean


def learned_step_quantize(
    x: ArrayLike, step: ArrayLike, *, bits: int, signed: bool = True
) -> Array:
    r"""Rounds to multiples of a step that is learned with the network (LSQ).

        y = s round(clip(x / s, q_min, q_max))
        q_min, q_max = -2^(bits-1), 2^(bits-1) - 1,   or 0, 2^bits - 1 if not signed

    Rounding is straight-through: ∂y/∂x := 1 inside the range and 0 outside, and

        ∂y/∂s := g (round(x/s) - x/s) inside, g q_min or g q_max outside;   g = 1/√(q_max n)

    with n the entries that share a step, so that the step learns as fast as they do.

    Args:
      x: floating point, of any shape.
      step: s, broadcastable to `x`. One below 1e-8 counts as 1e-8, but keeps its gradient.
      bits: 2 to 8, and 1 if not signed.
      signed: False for what is never negative, after a ReLU. Default True.

    Returns:
      y in the type of `x`, computed in at least float32.

    Raises:
      ValueError: `bits` out of range, or a `step` that does not broadcast to `x`.
      TypeError: an array that is not floating point.

    For the activations next to `statistical_weight_quantize`, shifted by what every channel learns
    before and after: `learned_step_quantize(x + before, step, bits=2) + after`.

    Cost: one elementwise pass; a number to learn for each group, whose gradient is a sum over its
    entries.

    Example:
      >>> x = jnp.array([-3.0, -0.3, 0.3, 3.0])
      >>> print(learned_step_quantize(x, 0.5, bits=3))
      [-2.  -0.5  0.5  1.5]

    Reference: Esser et al., "Learned Step Size Quantization", 2019, arXiv:1902.08153; as for the
    activations of Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    check_floating(x=x, step=step)
    x = jnp.asarray(x)
    check_broadcastable(x.shape, step=step)
    q_min, q_max = _code_range(bits, signed)
    wide = x.astype(compute_dtype(x, step))
    step = jnp.asarray(step, wide.dtype)
    factor = (q_max * max(x.size // max(step.size, 1), 1)) ** -0.5
    return round_to_step(wide, step, q_min, q_max, factor).astype(x.dtype)


def round_to_step(
    x: Array, step: Array, q_min: ArrayLike, q_max: ArrayLike, factor: ArrayLike
) -> Array:
    """The rounding of `learned_step_quantize`, with the factor on the gradient of the step."""
    step = scale_gradient(step, factor, value=jnp.maximum(step, _LEAST_STEP))
    steps = x / step
    # Unlike jnp.clip, all of the gradient passes at the very ends.
    steps = jnp.where(steps < q_min, q_min, jnp.where(steps > q_max, q_max, steps))
    return step * scale_gradient(steps, 1.0, value=jnp.round(steps))


def scale_gradient(x: Array, factor: ArrayLike, *, value: Array | None = None) -> Array:
    """`value`, which is `x` unless given, with the gradient of `x` times `factor`."""
    value = x if value is None else value
    return jax.lax.stop_gradient(value) + factor * (x - jax.lax.stop_gradient(x))


def _code_range(bits: int, signed: bool) -> tuple[int, int]:
    check_interval(2 if signed else 1, 8, bits=bits)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _integer_codes(codes: ArrayLike) -> Array:
    if not jnp.issubdtype(jnp.result_type(codes), jnp.integer):
        raise TypeError(f"codes must be integers, got {jnp.result_type(codes).name}")
    return jnp.asarray(codes, jnp.int32)


def _checked(
    w: ArrayLike, bits: int, axis: int | tuple[int, ...]
) -> tuple[Array, int, tuple[int, ...]]:
    """`w` as an array, and its axes counted from the end, which vmap leaves where they are."""
    check_floating(w=w)
    check_interval(1, 8, bits=bits)
    w = jnp.asarray(w)
    axes = tuple(i - w.ndim for i in canonical_axes(axis, w.ndim))
    if not isinstance(w, jax.core.Tracer) and not jnp.all(jnp.isfinite(w)):
        raise ValueError("w must be finite, got NaN or infinite entries")
    return w, bits, axes


def _steps(w: Array, bits: int, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """u, on which the codes are the integers, and the scale."""
    w = w.astype(compute_dtype(w))
    count = math.prod(w.shape[axis] for axis in axes)
    scale = (2.0 / max(count, 1)) * jnp.sum(jnp.abs(w), axis=axes, keepdims=True)
    half_codes = 2.0 ** (bits - 1)
    # A product, as `quantize` has it: the codes must not depend on what surrounds them.
    ratio = w * (1.0 / jnp.maximum(scale, 2.0 * jnp.finfo(w.dtype).tiny))
    return half_codes * jnp.clip(ratio, -1.0, 1.0) - 0.5, scale


def _round(steps: Array, bits: int) -> Array:
    return jnp.clip(jnp.round(steps), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _straight_through(w: Array, bits: int, axes: tuple[int, ...]) -> Array:
    steps, scale = _steps(w, bits, axes)
    return (scale * ((_round(steps, bits) + 0.5) / 2 ** (bits - 1))).astype(w.dtype)


@_straight_through.defjvp
def _straight_through_jvp(bits, axes, primals, tangents):
    return _straight_through(*primals, bits, axes), *tangents
