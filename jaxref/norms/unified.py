"""Unified normalization: quadratic means over a short window of steps, with a guard."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName
from jaxref.norms.batch import affine, checked_batch
from jaxref.norms.power import Entries, count_entries, summed_over_shards
from jaxref.norms.rms import reciprocal_root

_STEPS_BEFORE_COMPENSATION = 1000  # in the authors' code, when the warm-up is no longer


class UnifiedNormState(NamedTuple):
    """What `unified_norm` carries from step to step, C channels, windows of M_f and M_b steps.

    The gradient with respect to the fields in `backward_fields` is their next value; see
    `apply_gradient_state`.

    Attributes:
      running_var: `[C]` float32, the running mean of σ², initially 1; the only one that evaluation
        needs.
      x2_buffer: `[M_f, C]` float32, mean(x²) of the latest steps, initially 0.
      gz_buffer: `[M_b, C]` float32, mean(g z) of the latest steps, initially 0. The backward pass
        advances it.
      gz_ema: `[C]` float32, the running mean of what is taken out of the gradient, initially 0.
        The backward pass advances it.
      step: int32, the number of updates so far.
      skipped: int32, how many of them were outliers.

    Reference: Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers",
    2022, arXiv:2208.01313.
    """

    running_var: Array
    x2_buffer: Array
    gz_buffer: Array
    gz_ema: Array
    step: Array
    skipped: Array


UnifiedNormState.backward_fields = ("gz_buffer", "gz_ema")  # type: ignore[attr-defined]


def unified_norm_init(features: int, window: tuple[int, int] = (4, 4)) -> UnifiedNormState:
    """The state of `unified_norm` over `features` channels before the first step.

    Args:
      features: C at least 1, the size of the last axis.
      window: (M_f, M_b), each at least 1: over how many steps the forward and the backward pass
        average. Default (4, 4). With M_f = 1 every step uses its own statistics.

    Returns:
      A `UnifiedNormState` with running_var = 1 and zeros.

    Raises:
      ValueError: `features` or a window below 1.

    Use it once for each `unified_norm` in functional code, with wider windows for smaller batches;
    `jaxref.nn.Norm` makes and keeps its own.

    Cost: M_f + M_b + 2 numbers a channel and two counters.

    Example:
      >>> unified_norm_init(2, window=(3, 4)).x2_buffer.shape
      (3, 2)

    Reference: Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers",
    2022, arXiv:2208.01313.
    """
    check_interval(1, jnp.inf, features=features, window=window)
    forward, backward = window
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    return UnifiedNormState(
        running_var=jnp.ones(features, jnp.float32),
        x2_buffer=zeros((forward, features)),
        gz_buffer=zeros((backward, features)),
        gz_ema=zeros(features),
        step=jnp.int32(0),
        skipped=jnp.int32(0),
    )


def unified_norm(
    x: ArrayLike,
    state: UnifiedNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool,
    momentum: float = 0.9,
    warmup_steps: int = 4000,
    outlier_filtration: bool = False,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, UnifiedNormState]:
    r"""Unified normalization: every channel over its quadratic mean in the latest steps.

    With means over all axes but the last, q = mean(x²) of the batch, and M_f and M_b the windows
    of the state, the forward pass is

        σ² = GM(q of the latest M_f steps),   z = x / √(σ² + ε),   y = scale · z + bias
        r = √(σ² + ε) / √(running_var + ε) in [1/5, 5]
        running_var ← m running_var + (1 - m) σ²

    with GM the geometric mean, and the backward pass, g = r · scale · ∂L/∂y,

        ḡ = mean of mean(g z) of the latest M_b steps,   e ← m e + (1 - m) ḡ
        ∂L/∂x = (g - e z) / √(σ² + ε),   ∂L/∂scale = Σ r z ∂L/∂y

    with e the new gz_ema. Up to the warm-up's end and until a window is full its means are those
    of the step; r is 1 up to step 1000 at least. No mean is taken out of x: in evaluation
    y = scale · x / √(running_var + ε) + bias folds into the next linear layer, by
    `fold_unified_norm`.

    An outlier is a batch with which the window's arithmetic mean exceeds its geometric mean, in
    any channel, by more than M_f times the variance of √q in the window before it. It is
    normalised by its own q, with r = 1 and e replaced by its own mean(g z), which is the exact
    gradient; the windows store running_var and gz_ema in its place. With M_f = 1 all steps are
    treated so.

    Args:
      x: `[batch, ..., C]` floating point, at most about 1e16 in size.
      state: from `unified_norm_init(C, window)` or the step before, completed by
        `apply_gradient_state`.
      scale: the gain `[C]`. Default: 1.
      bias: `[C]`. Default: 0.
      training: whether to advance the state; else running_var is used as it is.
      momentum: m in [0, 1]. Default 0.9.
      warmup_steps: at least 0. Default 4000.
      outlier_filtration: look for outliers, from step `warmup_steps` on. Default False, for
        language; True is the authors' advice for vision.
      epsilon: ε at least 0. Default 1e-5.
      where: boolean, broadcastable to `x`: the entries that exist. The others count for nothing and
        come out 0. A channel without any takes its running means for those of the batch; a batch
        without any is no step. Default: all.
      axis_name: name or names of the mesh or vmap axes over which the batch is spread; means are
        then those of all of it. gz_buffer and gz_ema then behave as parameters do: their
        gradients, summed over the shards, are the next values. Not needed under jit with shardings.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the state of the next step
      except for gz_buffer and gz_ema, whose next values are the gradients with respect to them.

    Raises:
      ValueError: `x` without batch axis or entries, `state`, `scale` or `bias` not of C channels,
        `momentum` outside of [0, 1], a negative `warmup_steps` or `epsilon`, or a mask that is not
        boolean or does not broadcast.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it in place of `layer_norm` in transformers whose inference has to be fast; `power_norm`
    has longer memory and no guard.

    Cost: one reduction over batch and positions forward and one backward; elementwise in
    evaluation. M_f + M_b + 2 numbers a channel of state.

    Example:
      >>> x = jnp.array([[3.0, 1.0], [-1.0, 1.0]])
      >>> y, state = unified_norm(x, unified_norm_init(2), training=True)
      >>> print(y.round(3), state.running_var)
      [[ 1.342  1.   ]
       [-0.447  1.   ]] [1.4 1. ]

    Reference: Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers",
    2022, arXiv:2208.01313.
    """
    statistics = {"state.running_var": state.running_var, "state.gz_ema": state.gz_ema}
    wide = checked_batch(x, statistics, epsilon=epsilon, where=where)
    check_interval(0, 1, momentum=momentum)
    check_interval(0, jnp.inf, warmup_steps=warmup_steps)
    running = jax.lax.stop_gradient(state.running_var)
    if not training:
        y = affine(wide * reciprocal_root(running, epsilon), scale, bias, where)
        return y.astype(jnp.result_type(x)), state
    entries = count_entries(wide, where, axis_name)
    mean_square = entries.mean(jnp.square(jax.lax.stop_gradient(wide)), axis_name)
    mean_square = jnp.where(entries.number > 0, mean_square, running).astype(running.dtype)

    step, (window, _) = state.step + 1, state.x2_buffer.shape
    row = step % window
    buffer = state.x2_buffer.at[row].set(mean_square)
    skip = outlier = jnp.array(False)
    if window == 1:
        skip = jnp.array(True)
    elif outlier_filtration:
        excess = jnp.mean(buffer, axis=0) - _geometric_mean(buffer)
        bound = window * jnp.var(jnp.sqrt(state.x2_buffer), ddof=1)
        skip = outlier = (excess > bound).any() & (step >= warmup_steps) & (step > window)
        buffer = jnp.where(skip, buffer.at[row].set(running), buffer)
    by_itself = skip | (step <= window) | (step < warmup_steps)
    variance = jnp.where(by_itself, mean_square, _geometric_mean(buffer))
    ratio = reciprocal_root(running, epsilon) / reciprocal_root(variance, epsilon)
    uncompensated = skip | (step <= max(_STEPS_BEFORE_COMPENSATION, warmup_steps))
    ratio = jnp.where(uncompensated, 1.0, jnp.clip(ratio, 1 / 5, 5))

    backward = _Backward(
        entries, reciprocal_root(variance, epsilon), ratio, step, skip, warmup_steps, momentum
    )
    z = _unified_normalise(
        wide,
        summed_over_shards(state.gz_buffer, wide, axis_name),
        summed_over_shards(state.gz_ema, wide, axis_name),
        backward,
        axis_name,
    )
    if scale is not None:  # with slope r
        check_floating(scale=scale)
        check_shape(wide.shape[-1:], scale=scale)
        scale = jnp.asarray(scale).astype(wide.dtype)
        constant = jax.lax.stop_gradient(scale)
        scale = constant + ratio * (scale - constant)
    y = affine(z, scale, bias, where)
    advanced = state._replace(
        running_var=momentum * running + (1 - momentum) * variance,
        x2_buffer=buffer,
        step=step,
        skipped=state.skipped + outlier,
    )
    some = (entries.number > 0).any()
    state = jax.tree.map(partial(jnp.where, some), advanced, state)
    return y.astype(jnp.result_type(x)), jax.lax.stop_gradient(state)


def _geometric_mean(buffer: Array) -> Array:
    """Geometric mean over the first axis of entries at least 0."""
    return jnp.exp(jnp.mean(jnp.log(buffer), axis=0))


class _Backward(NamedTuple):
    """What the backward pass has from the forward pass, beside z and its own state."""

    entries: Entries
    reciprocal_sigma: Array
    ratio: Array
    step: Array
    skip: Array
    warmup_steps: ArrayLike
    momentum: ArrayLike


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _unified_normalise(
    x: Array, gz_buffer: Array, gz_ema: Array, backward: _Backward, axis_name: AxisName | None
) -> Array:
    """x / σ, with the smoothed gradient; that with respect to gz_* is their next value."""
    return x * backward.reciprocal_sigma


def _unified_normalise_forward(
    x: Array, gz_buffer: Array, gz_ema: Array, backward: _Backward, axis_name: Any
) -> tuple[Array, tuple[Any, ...]]:
    z = x * backward.reciprocal_sigma
    return z, (z, gz_buffer, gz_ema, backward)


def _unified_normalise_backward(axis_name: Any, kept: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    z, gz_buffer, gz_ema, backward = kept
    entries, step, skip = backward.entries, backward.step, backward.skip
    g *= backward.ratio
    gz = entries.mean(g * z, axis_name)
    gz = jnp.where(entries.number > 0, gz, gz_ema)
    window = gz_buffer.shape[0]
    buffer = gz_buffer.at[step % window].set(jnp.where(skip, gz_ema, gz).astype(gz_buffer.dtype))
    by_itself = skip | (step <= window) | (step < backward.warmup_steps)
    smooth = jnp.where(by_itself, gz, jnp.mean(buffer, axis=0))
    ema = backward.momentum * gz_ema + (1 - backward.momentum) * smooth
    taken_out = jnp.where(skip, smooth, ema)
    dx = (g - taken_out * z) * backward.reciprocal_sigma
    some = (entries.number > 0).any()
    following = (jnp.where(some, new, old) for new, old in ((buffer, gz_buffer), (ema, gz_ema)))
    return dx, *((value / entries.shards).astype(jnp.float32) for value in following), None


_unified_normalise.defvjp(_unified_normalise_forward, _unified_normalise_backward)


def fold_unified_norm(
    state: UnifiedNormState,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    kernel: ArrayLike,
    kernel_bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Array, Array]:
    r"""The linear layer that does what `unified_norm` in evaluation and a linear layer do.

        W' = diag(scale / √(running_var + ε)) W,   b' = b + bias W

    so that `x W' + b' = norm(x) W + b`.

    Args:
      state: the norm's state after training.
      scale: the norm's gain `[C]`, or None for 1.
      bias: the norm's bias `[C]`, or None for 0.
      kernel: W `[C, ...]`, applied to the norm's result from the right.
      kernel_bias: b of the kernel's trailing axes. Default: 0.
      epsilon: the norm's ε, at least 0. Default 1e-5.

    Returns:
      W' and b', of the types of `kernel` and `kernel_bias` (of `kernel`, where that is None),
      computed in at least float32.

    Raises:
      ValueError: shapes that do not fit `state`, or a negative `epsilon`.
      TypeError: an argument that is not floating point.

    Use it before inference, once for every linear layer that reads the norm's result.

    Cost: a pass over the kernel, once; inference then has no norm to pay for.

    Example:
      >>> state = unified_norm_init(2)._replace(running_var=jnp.array([4.0, 0.25]))
      >>> kernel, bias = fold_unified_norm(state, None, jnp.ones(2), jnp.eye(2))
      >>> print(kernel.round(3), bias)
      [[0.5 0. ]
       [0.  2. ]] [1. 1.]

    Reference: Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers",
    2022, arXiv:2208.01313.
    """
    check_interval(0, jnp.inf, epsilon=epsilon)
    (features,) = jnp.shape(state.running_var)
    given: dict[str, ArrayLike] = {"kernel": kernel}
    for name, value in (("scale", scale), ("bias", bias), ("kernel_bias", kernel_bias)):
        if value is not None:
            given[name] = value
    check_floating(**given)
    kernel = jnp.asarray(kernel)
    check_shape((features, *kernel.shape[1:]), kernel=kernel)
    for name in ("scale", "bias"):
        if name in given:
            check_shape((features,), **{name: given[name]})
    if kernel_bias is None:
        kernel_bias = jnp.zeros(kernel.shape[1:], kernel.dtype)
    check_shape(kernel.shape[1:], kernel_bias=kernel_bias)
    dtype = compute_dtype(*given.values())
    wide = kernel.astype(dtype).reshape(features, -1)
    gain = reciprocal_root(state.running_var, epsilon)
    if scale is not None:
        gain *= scale
    folded = (gain[:, None] * wide).reshape(kernel.shape)
    shift = jnp.asarray(kernel_bias).astype(dtype)
    if bias is not None:
        moved = jnp.matmul(jnp.asarray(bias).astype(dtype), wide, precision="highest")
        shift += moved.reshape(shift.shape)
    return folded.astype(kernel.dtype), shift.astype(jnp.result_type(kernel_bias))
