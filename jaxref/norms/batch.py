"""Batch normalization and its kin: statistics of the whole batch, of parts of it, or estimated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.norms.group import check_groups, group_norm
from jaxref.norms.rms import reciprocal_root, spread_parameter


class BatchNormState(NamedTuple):
    """Running statistics of `batch_norm`, `ghost_batch_norm` and those that build on them.

    Attributes:
      mean: float32 `[features]`, initially 0.
      var: float32 `[features]`, initially 1; the biased variance.
    """

    mean: Array
    var: Array


def batch_norm_init(features: int) -> BatchNormState:
    r"""The running statistics before any batch: mean 0 and variance 1.

    The same for `batch_norm`, `ghost_batch_norm`, `estimated_batch_norm` and `batch_channel_norm`;
    it goes by their names too, with `_init`.

    Args:
      features: size of the last axis, at least 1.

    Returns:
      A `BatchNormState`.

    Raises:
      ValueError: `features` below 1.

    Use it once for each norm in functional code, and keep the state apart from the parameters,
    since no gradient reaches it; `jaxref.nn.Norm` makes and keeps its own.

    Cost: two numbers a channel.

    Example:
      >>> print(*batch_norm_init(2))
      [0. 0.] [1. 1.]

    Reference: Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, arXiv:1502.03167.
    """
    check_interval(1, jnp.inf, features=features)
    return BatchNormState(jnp.zeros(features, jnp.float32), jnp.ones(features, jnp.float32))


ghost_batch_norm_init = estimated_batch_norm_init = batch_channel_norm_init = batch_norm_init


def batch_norm(
    x: ArrayLike,
    state: BatchNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, BatchNormState]:
    r"""Batch normalization: zero mean and unit variance of each channel over the batch.

    With the mean μ and the biased variance σ² of a channel over all examples and positions,

        y = scale · (x - μ) / √(σ² + ε) + bias
        mean ← momentum · mean + (1 - momentum) μ,   var ← momentum · var + (1 - momentum) σ²

    in training; in evaluation `mean` and `var` of the state stand for μ and σ². The running
    variance is the biased one too; PyTorch keeps the unbiased, n / (n - 1) times as large.

    Args:
      x: `[batch, ..., features]` floating point, channels last; at most about 1e16 in size.
      state: the running statistics, from `batch_norm_init(features)` at first.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      training: whether to normalise with the batch's statistics and advance the running ones.
      momentum: in [0, 1], the share that the running statistics keep. Default 0.9; PyTorch's
        `momentum` is 1 minus this.
      epsilon: ε at least 0, added to the variance. Default 1e-5.
      where: boolean, broadcastable to `x`: the entries that exist. The others count for nothing and
        come out 0. Default: all.
      axis_name: name or names of mapped axes (`jax.shard_map`, `jax.vmap`) over which the batch is
        spread; statistics are then those of the global batch. Default: `x` is the whole batch.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient; in evaluation the same one. In training a channel whose entries are all
      equal, so also a batch of one example and one position, gives `bias` with a finite gradient;
      a channel without any admitted entry leaves its running statistics as they are.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, a mask that is not boolean or does not broadcast, `momentum` not in [0, 1], or
        a negative `epsilon`.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it in convolutional networks with some 16 examples or more at a time; `ghost_batch_norm`
    with very large batches, `batch_channel_norm` or `group_norm` with very small ones.

    Cost: the reductions of `layer_norm`, over batch and positions, each an all-reduce with
    `axis_name`; elementwise in evaluation. Two numbers a channel of state.

    Example:
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = batch_norm(x, batch_norm_init(2), training=True)
      >>> print(y.round(3).tolist(), state.mean)
      [[-1.0, -1.0], [1.0, 1.0]] [0.2 2. ]

    Reference: Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, arXiv:1502.03167.
    """
    wide = checked_batch(x, _fields(state), epsilon=epsilon, where=where)
    check_interval(0, 1, momentum=momentum)
    if training:
        centred, mean, variance = batch_moments(wide, where=where, axis_name=axis_name)
        admitted = any_admitted(wide, where, axis_name)
        state = _advance(state, mean, variance, 1 - momentum, admitted)
    else:
        centred, variance = wide - state.mean, state.var
    y = centred * reciprocal_root(variance, epsilon)
    return affine(y, scale, bias, where).astype(jnp.result_type(x)), state


def ghost_batch_norm(
    x: ArrayLike,
    state: BatchNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool,
    ghost_batch_size: int = 128,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
) -> tuple[Array, BatchNormState]:
    r"""Ghost batch normalization: batch normalization of a large batch in small parts.

    The batch is split along its first axis into G ghost batches of `ghost_batch_size` neighbouring
    examples, and each has its own mean μ_g and biased variance σ_g²:

        y = scale · (x - μ_g) / √(σ_g² + ε) + bias
        mean ← m^G mean + (1 - m) Σ_g m^(G - g) μ_g,   g = 1 ... G,   m = momentum

    and var likewise, as if `batch_norm` had been given one ghost batch after the other. In
    evaluation it is `batch_norm`. The statistics stay as noisy as those of a small batch, and no
    device needs to know what another one has.

    Args:
      x: `[batch, ..., features]` floating point, channels last; at most about 1e16 in size.
      state: the running statistics, from `ghost_batch_norm_init(features)` at first.
      scale: the gain `[features]`, shared by the ghost batches. Default: 1.
      bias: `[features]`. Default: 0.
      training: whether to normalise with the ghost batches' statistics and advance the running
        ones.
      ghost_batch_size: examples in a ghost batch, a divisor of the batch. Default 128, the paper's.
        A batch of fewer examples is one ghost batch.
      momentum: m in [0, 1], the share that the running statistics keep at each ghost batch.
        Default 0.9.
      epsilon: ε at least 0, added to the variances. Default 1e-5.
      axis_name: name or names of mapped axes over which the batch is spread, in the order of its
        shards; the running statistics then see the ghost batches of all. No ghost batch extends
        over two shards.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient. A channel whose entries are all equal in a ghost batch gives `bias`
      there, with a finite gradient.

    Raises:
      ValueError: a batch, or with `axis_name` a shard, that `ghost_batch_size` does not divide;
        what `batch_norm` raises.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it with batches of thousands, where `batch_norm` generalises worse;
    `jaxref.optimizers.large_batch_learning_rate` and `regime_adaptation` belong to the recipe.

    Cost: the reductions of `layer_norm`, over each ghost batch; with `axis_name` two all-reduces,
    for the running statistics alone. Two numbers a channel of state.

    Example:
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> y, _ = ghost_batch_norm(x, batch_norm_init(1), training=True, ghost_batch_size=2)
      >>> print(y.ravel().round(3))
      [-1.  1. -1.  1.]

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization
    gap in large batch training of neural networks", 2017, arXiv:1705.08741.
    """
    check_interval(0, 1, momentum=momentum)
    check_interval(1, jnp.inf, ghost_batch_size=ghost_batch_size)
    if not training:
        return batch_norm(x, state, scale, bias, training=False, epsilon=epsilon)
    wide = checked_batch(x, _fields(state), epsilon=epsilon)
    batch, *others = wide.shape
    size = min(ghost_batch_size, batch) if axis_name is None else ghost_batch_size
    if not isinstance(size, int) or batch % size:
        raise ValueError(
            f"ghost_batch_size must divide the batch of {batch} examples, got {ghost_batch_size}"
        )
    ghosts = batch // size
    of_a_ghost = tuple(range(1, wide.ndim))
    centred, mean, variance = batch_moments(wide.reshape(ghosts, size, *others), axes=of_a_ghost)
    y = (centred * reciprocal_root(variance, epsilon)).reshape(wide.shape)

    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    before = 0 if axis_name is None else jax.lax.axis_index(axis_name) * ghosts
    later = shards * ghosts - 1 - (before + jnp.arange(ghosts))  # ghost batches after each
    weights = (1 - momentum) * jnp.power(jnp.float32(momentum), later)

    def advanced(running, values):
        news = jnp.sum(weights[:, None] * values.reshape(ghosts, -1), axis=0)
        news = sum_over_shards(news, axis_name)
        kept = jnp.power(jnp.float32(momentum), shards * ghosts)
        return jax.lax.stop_gradient((kept * running + news).astype(running.dtype))

    state = BatchNormState(advanced(state.mean, mean), advanced(state.var, variance))
    return affine(y, scale, bias).astype(jnp.result_type(x)), state


def estimated_batch_norm(
    x: ArrayLike,
    state: BatchNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool,
    rate: float,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, BatchNormState]:
    r"""Batch normalization by running estimates, in training too.

    The estimates are advanced first, the variance around the mean from before, and then used:

        var ← (1 - r) var + r · avg (x - mean)²,   mean ← (1 - r) mean + r · avg x
        y = scale · (x - mean) / √(var + ε) + bias

    with avg the average over all examples and positions of a channel. No gradient passes through
    mean and var, so that dy/dx is diagonal. In evaluation the estimates are used as they are.

    Args:
      x: `[batch, ..., features]` floating point, channels last; at most about 1e16 in size.
      state: the estimates, from `estimated_batch_norm_init(features)` at first.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      training: whether to advance the estimates.
      rate: r in [0, 1], small: the share of the new batch. It may follow the learning rate, with
        which the features move.
      epsilon: ε at least 0, added to the variance. Default 1e-5.
      where: boolean, broadcastable to `x`: the entries that exist. The others count for nothing and
        come out 0. Default: all.
      axis_name: name or names of mapped axes over which the batch is spread; the estimates then see
        the global batch. Default: `x` is the whole batch.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient. A channel without any admitted entry leaves its estimates as they are.

    Raises:
      ValueError: what `batch_norm` raises, or `rate` not in [0, 1].
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it with one or two examples at a time, where `batch_norm` sees too few, in front of a norm
    that keeps the scale of the features in hand, since this one's gradient does not:
    `batch_channel_norm(..., estimate=True)` is both.

    Cost: the reductions of `batch_norm` forward, and none in the gradient of x; elementwise in
    evaluation. Two numbers a channel of state.

    Example:
      >>> x = jnp.array([[2.0], [6.0]])
      >>> y, state = estimated_batch_norm(x, batch_norm_init(1), training=True, rate=0.5)
      >>> print(y.ravel().round(3), state.mean, state.var)
      [0.    1.234] [2.] [10.5]

    Reference: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization
    and Weight Standardization", 2019, arXiv:1903.10520.
    """
    wide = checked_batch(x, _fields(state), epsilon=epsilon, where=where)
    check_interval(0, 1, rate=rate)
    if training:
        _, mean, variance = batch_moments(wide, where=where, axis_name=axis_name)
        around_old = variance + jnp.square(mean - state.mean)
        admitted = any_admitted(wide, where, axis_name)
        state = _advance(state, mean, around_old, rate, admitted)
    y = (wide - state.mean) * reciprocal_root(state.var, epsilon)
    return affine(y, scale, bias, where).astype(jnp.result_type(x)), state


def batch_channel_norm(
    x: ArrayLike,
    state: BatchNormState,
    batch_scale: ArrayLike | None = None,
    batch_bias: ArrayLike | None = None,
    channel_scale: ArrayLike | None = None,
    channel_bias: ArrayLike | None = None,
    *,
    training: bool,
    groups: int = 32,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    estimate: bool = False,
    axis_name: AxisName | None = None,
) -> tuple[Array, BatchNormState]:
    r"""Batch-channel normalization: batch statistics first, then groups of channels.

        y = group_norm(batch_norm(x; batch_scale, batch_bias); channel_scale, channel_bias)

    The channel step makes the result independent of the scale that the batch step leaves; the batch
    step keeps each channel away from being dead or alive for all examples at once, which group
    normalization alone allows.

    Args:
      x: `[batch, ..., features]` floating point, channels last; at most about 1e16 in size.
      state: the running statistics of the batch step, from `batch_channel_norm_init(features)` at
        first.
      batch_scale: the gain of the batch step, `[features]`. Default: 1.
      batch_bias: `[features]`. Default: 0.
      channel_scale: the gain of the channel step, `[features]`, or `[groups]` as in the authors'
        code. Default: 1.
      channel_bias: of either shape. Default: 0.
      training: whether the batch step is in training.
      groups: a divisor of the features. Default 32.
      momentum: in [0, 1], the share that the running statistics keep. Default 0.9.
      epsilon: ε at least 0, added to the variances of both steps. Default 1e-5.
      estimate: True for micro-batches: the batch step is `estimated_batch_norm` at the rate
        1 - `momentum`. False (the default): it is `batch_norm`.
      axis_name: name or names of mapped axes over which the batch is spread; the batch step's
        statistics are then those of the global batch. Default: `x` is the whole batch.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient.

    Raises:
      ValueError: `groups` no divisor of the features, a parameter of another shape, or what
        `batch_norm` raises.
      TypeError: `x` or a parameter is not floating point.

    Use it after a convolution whose kernel is weight-standardised: with `estimate` for batches of
    one or two examples, without for large ones, where `batch_norm` is the cheaper choice.

    Cost: a `batch_norm` and a `group_norm`, the latter in evaluation too. Two numbers a channel of
    state.

    Example:
      >>> x = jnp.array([[[1.0, 5.0], [3.0, 5.0]]])  # one example, two positions
      >>> y, _ = batch_channel_norm(x, batch_channel_norm_init(2), training=True, groups=1)
      >>> print(y.round(3).tolist())
      [[[-1.414, 0.0], [1.414, 0.0]]]

    Reference: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization
    and Weight Standardization", 2019, arXiv:1903.10520.
    """
    wide = checked_batch(x, _fields(state), epsilon=epsilon)
    features = wide.shape[-1]
    check_groups(groups, features)
    for name, parameter in (("batch_scale", batch_scale), ("batch_bias", batch_bias)):
        if parameter is not None:
            check_floating(**{name: parameter})
            check_shape((features,), **{name: parameter})
    channel_scale = _per_channel("channel_scale", channel_scale, groups, features)
    channel_bias = _per_channel("channel_bias", channel_bias, groups, features)
    check_interval(0, 1, momentum=momentum)
    batch_step = (wide, state, batch_scale, batch_bias)
    if estimate:
        y, state = estimated_batch_norm(
            *batch_step,
            training=training,
            rate=1 - momentum,
            epsilon=epsilon,
            axis_name=axis_name,
        )
    else:
        y, state = batch_norm(
            *batch_step,
            training=training,
            momentum=momentum,
            epsilon=epsilon,
            axis_name=axis_name,
        )
    y = group_norm(y, channel_scale, channel_bias, groups=groups, epsilon=epsilon)
    return y.astype(jnp.result_type(x)), state


def checked_batch(
    x: ArrayLike,
    statistics: dict[str, Array],
    *,
    epsilon: float,
    where: ArrayLike | None = None,
) -> Array:
    """`x [batch, ..., features]` in the type to compute in, after the checks of a batch norm.

    The statistics, by the names for messages, are to be of shape `[features]`.
    """
    check_floating(x=x)
    check_interval(0, jnp.inf, epsilon=epsilon)
    x = jnp.asarray(x)
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"x must have shape [batch, ..., features] and hold entries, got {x.shape}"
        )
    check_shape(x.shape[-1:], **statistics)
    check_broadcastable(x.shape, where=where)
    if where is not None:
        x = jnp.where(where, x, 0.0)
    return x.astype(compute_dtype(x))


def batch_moments(
    x: Array,
    *,
    axes: tuple[int, ...] | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array, Array]:
    """x - mean, and the mean and biased variance over `axes`, all but the last by default.

    Mean and variance keep the axes with size 1. Entries that `where` excludes must be finite; their
    difference is 0, as are the moments where none is admitted.
    """
    axes = tuple(range(x.ndim - 1)) if axes is None else axes
    # Measured from one of its own entries, the mean of equal entries is exact.
    lowest = jnp.finfo(x.dtype).min
    admitted = x if where is None else jnp.where(where, x, lowest)
    one = jax.lax.stop_gradient(jnp.max(admitted, axis=axes, keepdims=True))
    if axis_name is not None:
        one = jax.lax.pmax(one, axis_name)
    if where is not None:
        one = jnp.where(one == lowest, 0.0, one)
    x = x - one
    mean = global_mean(x, axes=axes, where=where, axis_name=axis_name)
    centred = x - mean if where is None else jnp.where(where, x - mean, 0.0)
    variance = global_mean(jnp.square(centred), axes=axes, where=where, axis_name=axis_name)
    return centred, one + mean, variance


def global_mean(
    x: Array,
    *,
    axes: tuple[int, ...],
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    """`masked_mean` with kept axes, over the shards that `axis_name` maps too."""
    mean = masked_mean(x, axis=axes, where=where, keepdims=True)
    if axis_name is None:
        return mean
    if where is None:
        return jax.lax.pmean(mean, axis_name)
    count = jnp.count_nonzero(jnp.broadcast_to(where, x.shape), axis=axes, keepdims=True)
    total = jax.lax.psum(mean * count, axis_name)
    return total / jnp.maximum(jax.lax.psum(count, axis_name), 1)


def any_admitted(x: Array, where: ArrayLike | None, axis_name: AxisName | None) -> Array | bool:
    """Whether a channel has entries that count, `[features]`, in any shard."""
    if where is None:
        return True
    admitted = jnp.broadcast_to(where, x.shape).any(axis=tuple(range(x.ndim - 1)))
    return sum_over_shards(admitted, axis_name) > 0


def affine(
    y: Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    where: ArrayLike | None = None,
) -> Array:
    """scale · y + bias over the last axis, and 0 where `where` says so."""
    if scale is not None:
        y = y * spread_parameter("scale", scale, (y.ndim - 1,), y.shape)
    if bias is not None:
        y = y + spread_parameter("bias", bias, (y.ndim - 1,), y.shape)
    return y if where is None else jnp.where(where, y, 0.0)


def _fields(state: BatchNormState) -> dict[str, Array]:
    return {"state.mean": state.mean, "state.var": state.var}


def _advance(
    state: BatchNormState,
    mean: Array,
    variance: Array,
    rate: float | Array,
    admitted: Array | bool,
) -> BatchNormState:
    """(1 - rate) running + rate · new, where a channel has entries at all."""

    def advanced(running, new):
        mixed = (1 - rate) * running + rate * new.reshape(running.shape)
        return jax.lax.stop_gradient(jnp.where(admitted, mixed, running).astype(running.dtype))

    return BatchNormState(advanced(state.mean, mean), advanced(state.var, variance))


def _per_channel(
    name: str, parameter: ArrayLike | None, groups: int, features: int
) -> Array | None:
    """A parameter of shape `[groups]` or `[features]` as one of shape `[features]`."""
    if parameter is None:
        return None
    check_floating(**{name: parameter})
    if jnp.shape(parameter) not in {(groups,), (features,)}:
        raise ValueError(
            f"{name} must have shape ({features},) or ({groups},), got {jnp.shape(parameter)}"
        )
    return jnp.repeat(jnp.asarray(parameter), features // jnp.size(parameter))
