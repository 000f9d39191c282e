"""EvoNorms: normalization and activation as one layer, found by evolution."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.core.shards import AxisName
from jaxref.norms.batch import affine, batch_moments, checked_batch
from jaxref.norms.group import check_groups
from jaxref.norms.rms import spread_parameter


class EvoNormState(NamedTuple):
    """Running statistics of `evonorm_b0`, `evonorm_b1` and `evonorm_b2`.

    Attributes:
      var: float32 `[features]`, initially 1; the biased variance.
    """

    var: Array


def evonorm_b0_init(features: int) -> EvoNormState:
    """The running variance before any batch: 1.

    The same for `evonorm_b0`, `evonorm_b1` and `evonorm_b2`; it goes by their names, with `_init`.

    Args:
      features: size of the last axis, at least 1.

    Returns:
      An `EvoNormState`.

    Raises:
      ValueError: `features` below 1.

    Use it once for each `evonorm_b0`, `evonorm_b1` or `evonorm_b2` in functional code; `evonorm_s0`
    and its kin need no state.

    Cost: one number a channel.

    Example:
      >>> print(*evonorm_b0_init(2))
      [1. 1.]

    Reference: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020,
    arXiv:2004.02967.
    """
    check_interval(1, jnp.inf, features=features)
    return EvoNormState(jnp.ones(features, jnp.float32))


evonorm_b1_init = evonorm_b2_init = evonorm_b0_init


def evonorm_b0(
    x: ArrayLike,
    state: EvoNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    v: ArrayLike | None = None,
    *,
    training: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
) -> tuple[Array, EvoNormState]:
    r"""EvoNorm-B0: batch normalization and an activation in one, no activation to follow.

    With the biased variances σ² of a channel over the batch and all positions, and s² over the
    positions of one example,

        y = scale · x / max(√(σ² + ε), v x + √(s² + ε)) + bias
        var ← momentum · var + (1 - momentum) σ²

    in training; in evaluation `var` of the state stands for σ², but s² is still the example's own.
    Where x is small or negative the layer is linear, x over the batch's deviation; where it is
    large it saturates at 1/v. No mean is taken out of x. The running variance is the biased one;
    timm keeps the unbiased, n / (n - 1) times as large.

    Args:
      x: `[batch, ..., features]` floating point, channels last, with any number of axes for the
        positions; at most about 1e16 in size.
      state: the running variance, from `evonorm_b0_init(features)` at first.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      v: the weight of x in the denominator `[features]`. Default: 1, also its initial value.
      training: whether to normalise with the batch's variance and advance the running one.
      momentum: in [0, 1], the share that the running variance keeps. Default 0.9.
      epsilon: ε above 0, added to the variances. Default 1e-5; timm has 1e-3.
      axis_name: name or names of mapped axes (`jax.shard_map`, `jax.vmap`) over which the batch is
        spread in equal parts; σ² is then that of the global batch. Default: `x` is the whole batch.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient; in evaluation the same one. Without positions, or with one, s² is 0.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, `momentum` not in [0, 1], or `epsilon` not above 0.
      TypeError: `x`, `scale`, `bias` or `v` is not floating point.

    Use it in convolutional networks in place of batch norm and ReLU, at large batches; its kin
    `evonorm_b1` and `evonorm_b2` do without v, and `evonorm_s0` without the batch.

    Cost: two variances, of the batch and of each example, where `batch_norm` has one; in evaluation
    the latter alone. One number a channel of state.

    Example:
      >>> x = jnp.array([[[-4.0], [4.0]], [[-4.0], [4.0]]])  # two examples of two positions
      >>> y, state = evonorm_b0(x, evonorm_b0_init(1), training=True)
      >>> print(y[0].round(3).ravel(), state.var)
      [-1.   0.5] [2.5]

    Reference: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020,
    arXiv:2004.02967.
    """

    def other(x: Array) -> Array:
        deviation = jnp.sqrt(batch_moments(x, axes=_positions(x))[2] + epsilon)
        return _weighted(x, v) + deviation

    return _batch_dependent(x, state, scale, bias, other, training, momentum, epsilon, axis_name)


def evonorm_b1(
    x: ArrayLike,
    state: EvoNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
) -> tuple[Array, EvoNormState]:
    r"""EvoNorm-B1: as `evonorm_b0`, with the size of an example in place of its deviation.

    With the biased variance σ² of a channel over the batch and all positions, and the mean square
    m² over the positions of one example,

        y = scale · x / max(√(σ² + ε), (x + 1) √(m² + ε)) + bias
        var ← momentum · var + (1 - momentum) σ²

    in training; in evaluation `var` of the state stands for σ².

    Args:
      x: `[batch, ..., features]` floating point, channels last, with any number of axes for the
        positions; at most about 1e16 in size.
      state: the running variance, from `evonorm_b1_init(features)` at first.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      training: whether to normalise with the batch's variance and advance the running one.
      momentum: in [0, 1], the share that the running variance keeps. Default 0.9.
      epsilon: ε above 0, added to the statistics. Default 1e-5.
      axis_name: name or names of mapped axes over which the batch is spread in equal parts, as in
        `evonorm_b0`.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient; in evaluation the same one.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, `momentum` not in [0, 1], or `epsilon` not above 0.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it where `evonorm_b0` would go, without its v; the authors put B0 first.

    Cost: a variance of the batch and a mean square of each example; in evaluation the latter alone.
    One number a channel of state.

    Example:
      >>> x = jnp.array([[[-4.0], [4.0]], [[-4.0], [4.0]]])
      >>> print(evonorm_b1(x, evonorm_b1_init(1), training=True)[0][0].round(3).ravel())
      [-1.   0.2]

    Reference: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020,
    arXiv:2004.02967.
    """

    def other(x: Array) -> Array:
        return (x + 1) * _size(x, _positions(x), epsilon)

    return _batch_dependent(x, state, scale, bias, other, training, momentum, epsilon, axis_name)


def evonorm_b2(
    x: ArrayLike,
    state: EvoNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
) -> tuple[Array, EvoNormState]:
    r"""EvoNorm-B2: as `evonorm_b1`, but linear for large x and saturated for negative x.

    With the biased variance σ² of a channel over the batch and all positions, and the mean square
    m² over the positions of one example,

        y = scale · x / max(√(σ² + ε), √(m² + ε) - x) + bias
        var ← momentum · var + (1 - momentum) σ²

    in training; in evaluation `var` of the state stands for σ².

    Args:
      x: `[batch, ..., features]` floating point, channels last, with any number of axes for the
        positions; at most about 1e16 in size.
      state: the running variance, from `evonorm_b2_init(features)` at first.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      training: whether to normalise with the batch's variance and advance the running one.
      momentum: in [0, 1], the share that the running variance keeps. Default 0.9.
      epsilon: ε above 0, added to the statistics. Default 1e-5.
      axis_name: name or names of mapped axes over which the batch is spread in equal parts, as in
        `evonorm_b0`.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient; in evaluation the same one.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, `momentum` not in [0, 1], or `epsilon` not above 0.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it where `evonorm_b0` would go, without its v; of the three it is the closest to ReLU.

    Cost: a variance of the batch and a mean square of each example; in evaluation the latter alone.
    One number a channel of state.

    Example:
      >>> x = jnp.array([[[-4.0], [4.0]], [[-4.0], [4.0]]])
      >>> print(evonorm_b2(x, evonorm_b2_init(1), training=True)[0][0].round(3).ravel())
      [-0.5  1. ]

    Reference: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020,
    arXiv:2004.02967.
    """

    def other(x: Array) -> Array:
        return _size(x, _positions(x), epsilon) - x

    return _batch_dependent(x, state, scale, bias, other, training, momentum, epsilon, axis_name)


def evonorm_s0(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    v: ArrayLike | None = None,
    *,
    groups: int = 32,
    epsilon: float = 1e-5,
) -> Array:
    r"""EvoNorm-S0: group normalization and an activation in one, no activation to follow.

        y = scale · x sigmoid(v x) / √(σ_g² + ε) + bias

    with σ_g² the biased variance of the entry's example and group of channels, over positions and
    channels. No mean is taken out of x. An example does not see the rest of the batch, and there
    is no state. For large v it is ReLU over the deviation.

    Args:
      x: `[batch, ..., features]` floating point, channels last, with any number of axes for the
        positions; at most about 1e16 in size.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      v: the steepness of the activation `[features]`. Default: 1, also its initial value.
      groups: a divisor of `features`. Default 32.
      epsilon: ε above 0, added to the variance. Default 1e-5.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, `groups` that do not divide `features`, or `epsilon` not above 0.
      TypeError: `x`, `scale`, `bias` or `v` is not floating point.

    Use it in convolutional networks in place of group norm and ReLU, at any batch size; with large
    batches `evonorm_b0` is the stronger one.

    Cost: the reductions of `group_norm`, and a sigmoid for each entry; no state.

    Example:
      >>> x = jnp.array([[[-4.0, 4.0], [-4.0, 4.0]]])  # one example, two positions, two channels
      >>> print(evonorm_s0(x, groups=1)[0, 0].round(3))
      [-0.018  0.982]

    Reference: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020,
    arXiv:2004.02967.
    """
    wide = _checked(x, epsilon)
    activated = wide * jax.nn.sigmoid(_weighted(wide, v))
    split = _split(wide, groups)
    variance = batch_moments(split, axes=_group_axes(split))[2]
    y = _split(activated, groups) / jnp.sqrt(variance + epsilon)
    return affine(y.reshape(wide.shape), scale, bias).astype(jnp.result_type(x))


def evonorm_s1(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    groups: int = 32,
    epsilon: float = 1e-5,
) -> Array:
    r"""EvoNorm-S1: SiLU over the deviation of the group, no activation to follow.

        y = scale · x sigmoid(x) / √(σ_g² + ε) + bias

    with σ_g² the biased variance of the entry's example and group of channels: `evonorm_s0` at
    v = 1.

    Args:
      x: `[batch, ..., features]` floating point, channels last, with any number of axes for the
        positions; at most about 1e16 in size.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      groups: a divisor of `features`. Default 32.
      epsilon: ε above 0, added to the variance. Default 1e-5.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, `groups` that do not divide `features`, or `epsilon` not above 0.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it where `evonorm_s0` would go, without its v.

    Cost: that of `evonorm_s0`: the reductions of `group_norm`, and a sigmoid for each entry; no
    state.

    Example:
      >>> x = jnp.array([[[-4.0, 4.0], [-4.0, 4.0]]])
      >>> print(evonorm_s1(x, groups=1)[0, 0].round(3))
      [-0.018  0.982]

    Reference: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020,
    arXiv:2004.02967.
    """
    return evonorm_s0(x, scale, bias, groups=groups, epsilon=epsilon)


def evonorm_s2(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    groups: int = 32,
    epsilon: float = 1e-5,
) -> Array:
    r"""EvoNorm-S2: SiLU over the quadratic mean of the group, no activation to follow.

        y = scale · x sigmoid(x) / √(m_g² + ε) + bias

    with m_g² the mean square of the entry's example and group of channels.

    Args:
      x: `[batch, ..., features]` floating point, channels last, with any number of axes for the
        positions; at most about 1e16 in size.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      groups: a divisor of `features`. Default 32.
      epsilon: ε above 0, added to the mean square. Default 1e-5.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, `groups` that do not divide `features`, or `epsilon` not above 0.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it where `evonorm_s1` would go; the two agree on groups of mean 0, and this one bounds y by
    √(entries of a group) where the entries are nearly equal.

    Cost: one reduction, where `evonorm_s1` has three, and a sigmoid for each entry; no state.

    Example:
      >>> x = jnp.array([[[-4.0, 4.0], [-4.0, 4.0]]])
      >>> print(evonorm_s2(x + 8, groups=1)[0, 0].round(3))
      [0.439 1.342]

    Reference: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020,
    arXiv:2004.02967.
    """
    wide = _checked(x, epsilon)
    split = _split(wide, groups)
    y = split * jax.nn.sigmoid(split) / _size(split, _group_axes(split), epsilon)
    return affine(y.reshape(wide.shape), scale, bias).astype(jnp.result_type(x))


def _batch_dependent(
    x: ArrayLike,
    state: EvoNormState,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    other: Callable[[Array], Array],
    training: bool,
    momentum: float,
    epsilon: float,
    axis_name: AxisName | None,
) -> tuple[Array, EvoNormState]:
    """scale · x / max(√(σ² + ε), other(x)) + bias, and the running variance."""
    wide = _checked(x, epsilon, state)
    check_interval(0, 1, momentum=momentum)
    variance = state.var
    if training:
        variance = batch_moments(wide, axis_name=axis_name)[2].reshape(state.var.shape)
        advanced = momentum * state.var + (1 - momentum) * variance
        state = EvoNormState(jax.lax.stop_gradient(advanced.astype(state.var.dtype)))
    y = wide / jnp.maximum(jnp.sqrt(variance + epsilon), other(wide))
    return affine(y, scale, bias).astype(jnp.result_type(x)), state


def _checked(x: ArrayLike, epsilon: float, state: EvoNormState | None = None) -> Array:
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)  # the denominators have only it
    return checked_batch(x, {} if state is None else {"state.var": state.var}, epsilon=epsilon)


def _weighted(x: Array, v: ArrayLike | None) -> Array:
    return x if v is None else x * spread_parameter("v", v, (x.ndim - 1,), x.shape)


def _size(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """√(mean square over `axes` + ε)."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + epsilon)


def _positions(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def _split(x: Array, groups: int) -> Array:
    """`[..., features]` as `[..., groups, features / groups]`."""
    check_groups(groups, x.shape[-1])
    return x.reshape((*x.shape[:-1], groups, x.shape[-1] // groups))


def _group_axes(split: Array) -> tuple[int, ...]:
    return (*range(1, split.ndim - 2), split.ndim - 1)
