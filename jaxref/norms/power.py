"""Power normalization: batch normalization for language, by running quadratic means both ways."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.norms.batch import affine, checked_batch
from jaxref.norms.group import check_groups
from jaxref.norms.rms import reciprocal_root, rms_norm


class PowerNormState(NamedTuple):
    """What `power_norm` carries from step to step, C channels.

    The gradient with respect to the fields in `backward_fields` is their next value; see
    `apply_gradient_state`.

    Attributes:
      psi_squared: `[C]` float32, the running quadratic mean ψ², initially 1.
      nu: `[C]` float32, ν: the running mean of what normalising takes out of the gradient,
        initially 0. The backward pass advances it.
      step: int32, the number of updates so far.

    Reference: Shen, Yao, Gholami, Mahoney, Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, arXiv:2003.07845.
    """

    psi_squared: Array
    nu: Array
    step: Array


PowerNormState.backward_fields = ("nu",)  # type: ignore[attr-defined]


def power_norm_init(features: int) -> PowerNormState:
    """The state of `power_norm` over `features` channels before the first step.

    Args:
      features: C at least 1, the size of the last axis.

    Returns:
      A `PowerNormState` with ψ² = 1, ν = 0 and step 0.

    Raises:
      ValueError: `features` below 1.

    Use it once for each `power_norm` in functional code; `jaxref.nn.Norm` makes and keeps its own.

    Cost: two numbers a channel and a counter.

    Example:
      >>> power_norm_init(2).psi_squared
      Array([1., 1.], dtype=float32)

    Reference: Shen, Yao, Gholami, Mahoney, Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, arXiv:2003.07845.
    """
    check_interval(1, jnp.inf, features=features)
    return PowerNormState(
        jnp.ones(features, jnp.float32), jnp.zeros(features, jnp.float32), jnp.int32(0)
    )


def apply_gradient_state(state: Any, gradient: Any) -> Any:
    """A state with the fields that its backward pass advances taken from a gradient.

        state.f ← ∂loss/∂(state.f)   for every f in state.backward_fields

    `power_norm` and `unified_norm` also smooth their gradients over steps. The new value of those
    statistics is known only in the backward pass, which has one way out: as the "gradient" with
    respect to the old value. It is no slope: keep it from the optimizer, and from clipping.

    Args:
      state: the state that the norm returned in the forward pass, with the other fields advanced.
      gradient: the gradient of the loss with respect to the state that went in: anything with the
        attributes `backward_fields`, in the shapes of the state's; their types are taken over too.

    Returns:
      The complete state of the next step.

    Raises:
      ValueError: a field of another shape.

    Use it after every backward pass through `power_norm` or `unified_norm`; `jaxref.nn.Norm` needs
    no call of this.

    Cost: fields change places; nothing is computed.

    One backward pass is one step of these fields: where gradients are summed over micro-batches, or
    one layer is applied twice, so are these. Stacked states and gradients, as `jax.lax.scan` over
    layers has them, go in as they are.

    Example:
      >>> def loss(state, x):
      ...     y, state = power_norm(x, state, training=True)
      ...     return jnp.sum(y[:, 0] * x[:, 1]), state
      >>> x = jnp.array([[3.0, 1.0], [-1.0, 1.0]])
      >>> slope = jax.grad(loss, has_aux=True, allow_int=True)  # step is an integer
      >>> gradient, state = slope(power_norm_init(2), x)
      >>> print(state.nu, apply_gradient_state(state, gradient).nu)
      [0. 0.] [0.045 0. ]

    Reference: Shen, Yao, Gholami, Mahoney, Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, arXiv:2003.07845; the same way out serves Yang et al., "Unified
    Normalization for Accelerating and Stabilizing Transformers", 2022, arXiv:2208.01313.
    """
    fields = {name: getattr(gradient, name) for name in state.backward_fields}
    for name, value in fields.items():
        check_shape(jnp.shape(getattr(state, name)), **{f"gradient.{name}": value})
    return state._replace(**fields)


def power_norm(
    x: ArrayLike,
    state: PowerNormState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool,
    alpha_forward: float = 0.9,
    alpha_backward: float = 0.9,
    warmup_steps: int = 4000,
    groups: int | None = None,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, PowerNormState]:
    r"""Power normalization: every channel over its running quadratic mean, in both passes.

    With means over all axes but the last, ψ_B² = mean(x²) of the batch, and the state from before
    this step on the right-hand sides,

        forward:   x̂ = x / √(ψ² + ε),   y = scale · x̂ + bias
                   ψ² ← α_f ψ² + (1 - α_f) ψ_B²
        backward:  g = scale · ∂L/∂y,   ∂L/∂x = (g - ν x̂) / √(ψ² + ε)
                   ν ← ν (1 - (1 - α_b) mean(x̂²)) + (1 - α_b) mean(g x̂)

    In the first `warmup_steps` steps x̂ has ψ_B in place of ψ, and ψ² is first made the plain mean
    of the steps so far: ψ² ← ψ² + (ψ_B² - ψ²) / step, in all of them but the last. On constant
    inputs and gradients, value and gradient converge to those of `power_norm_v`. No mean is taken
    out, so that in evaluation, y = scale · x / √(ψ² + ε) + bias folds into a linear layer.

    Args:
      x: `[batch, ..., C]` floating point, at most about 1e16 in size.
      state: from `power_norm_init(C)` or the step before, its ν from `apply_gradient_state`.
      scale: the gain `[C]`. Default: 1.
      bias: `[C]`. Default: 0.
      training: whether to advance the state; else ψ is used as it is, without warm-up.
      alpha_forward: α_f in [0, 1]. Default 0.9.
      alpha_backward: α_b in [0, 1]. Default 0.9.
      warmup_steps: at least 0. Default 4000.
      groups: first apply `group_scaling` with so many groups, as the authors' code does with one.
        Default: do not, as in the paper.
      epsilon: ε at least 0. Default 1e-5.
      where: boolean, broadcastable to `x`: the entries that exist. The others count for nothing and
        come out 0. A channel without any keeps its ψ and ν; a batch without any is no step.
        Default: all.
      axis_name: name or names of the mesh or vmap axes over which the batch is spread; means are
        then those of all of it. ν then behaves as a parameter does: its gradient, summed over the
        shards, is the next value. Not needed under jit with shardings.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the state of the next step
      except for ν, whose next value is the gradient with respect to it.

    Raises:
      ValueError: `x` without batch axis or entries, `state`, `scale` or `bias` not of C channels, a
        rate outside of [0, 1], a negative `warmup_steps` or `epsilon`, `groups` that do not divide
        C, or a mask that is not boolean or does not broadcast.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it in transformers for language, where batch statistics fluctuate too much for batch norm
    but inference should not pay for `layer_norm`; `unified_norm` smooths over a short window
    instead, and guards against outliers.

    Cost: one reduction over batch and positions forward and two backward, each an all-reduce with
    `axis_name`; elementwise in evaluation. Two numbers a channel of state.

    Example:
      >>> x = jnp.array([[3.0, 1.0], [-1.0, 1.0]])
      >>> y, state = power_norm(x, power_norm_init(2), training=True)  # in warm-up
      >>> print(y.round(3), state.psi_squared)
      [[ 1.342  1.   ]
       [-0.447  1.   ]] [5. 1.]

    Reference: Shen, Yao, Gholami, Mahoney, Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, arXiv:2003.07845.
    """
    statistics = {"state.psi_squared": state.psi_squared, "state.nu": state.nu}
    wide = checked_batch(x, statistics, epsilon=epsilon, where=where)
    check_interval(0, 1, alpha_forward=alpha_forward, alpha_backward=alpha_backward)
    check_interval(0, jnp.inf, warmup_steps=warmup_steps)
    if groups is not None:
        wide = group_scaling(wide, groups, epsilon=epsilon)
    running = jax.lax.stop_gradient(state.psi_squared)
    if not training:
        x_hat = wide * reciprocal_root(running, epsilon)
        return affine(x_hat, scale, bias, where).astype(jnp.result_type(x)), state
    step = state.step + 1
    entries = count_entries(wide, where, axis_name)
    mean_square = entries.mean(jnp.square(jax.lax.stop_gradient(wide)), axis_name)
    seen = entries.number > 0
    current = jnp.where(step <= warmup_steps, mean_square, running)
    x_hat = _power_normalise(
        wide,
        summed_over_shards(state.nu, wide, axis_name),
        reciprocal_root(current, epsilon),
        entries,
        alpha_backward,
        axis_name,
    )
    y = affine(x_hat, scale, bias, where)
    plain_mean = jnp.where(step < warmup_steps, (mean_square - running) / step, 0.0) + running
    psi_squared = alpha_forward * plain_mean + (1 - alpha_forward) * mean_square
    state = PowerNormState(
        psi_squared=jnp.where(seen, psi_squared, running).astype(running.dtype),
        nu=jax.lax.stop_gradient(state.nu),
        step=jnp.where(seen.any(), step, state.step),
    )
    return y.astype(jnp.result_type(x)), state


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _power_normalise(
    x: Array,
    nu: Array,
    reciprocal_psi: Array,
    entries: "Entries",
    alpha: float,
    axis_name: AxisName | None,
) -> Array:
    """x / ψ, with the approximate gradient; the gradient with respect to ν is its next value."""
    return x * reciprocal_psi


def _power_normalise_forward(
    x: Array, nu: Array, reciprocal_psi: Array, entries: "Entries", alpha: float, axis_name: Any
) -> tuple[Array, tuple[Any, ...]]:
    x_hat = x * reciprocal_psi
    return x_hat, (x_hat, nu, reciprocal_psi, entries, alpha)


def _power_normalise_backward(axis_name: Any, kept: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    x_hat, nu, reciprocal_psi, entries, alpha = kept
    dx = (g - nu * x_hat) * reciprocal_psi
    gamma = entries.mean(jnp.square(x_hat), axis_name)
    lambda_ = entries.mean(g * x_hat, axis_name)
    following = nu * (1 - (1 - alpha) * gamma) + (1 - alpha) * lambda_
    return dx, (following / entries.shards).astype(nu.dtype), None, None, None


_power_normalise.defvjp(_power_normalise_forward, _power_normalise_backward)


def power_norm_v(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Power normalization by the batch alone (PN-V): every channel over its quadratic mean.

        y = scale · x / √(ψ_B² + ε) + bias,   ψ_B² = mean(x²) over all axes but the last

    with the exact gradient, through ψ_B too. Batch normalization without the mean, which on
    language fluctuates most. Unchanged by `x → a x` for a > 0 (up to ε).

    Args:
      x: `[batch, ..., C]` floating point, at most about 1e16 in size.
      scale: the gain `[C]`. Default: 1.
      bias: `[C]`. Default: 0.
      epsilon: ε at least 0. Default 1e-5.
      where: boolean, broadcastable to `x`: the entries that exist. The others count for nothing and
        come out 0. Default: all.
      axis_name: name or names of the mesh or vmap axes over which the batch is spread, whose mean
        is taken. Not needed under jit with shardings.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: `x` without batch axis or entries, `scale` or `bias` not of shape `[C]`, a
        negative `epsilon`, or a mask that is not boolean or does not broadcast.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it to study what the running means of `power_norm` are worth: it has the exact gradient, is
    less steady in training, and has no form for evaluation.

    Cost: one reduction over batch and positions, where `batch_norm` has three; no state.

    Example:
      >>> print(power_norm_v(jnp.array([[3.0, 1.0], [-1.0, 1.0]])).round(3))
      [[ 1.342  1.   ]
       [-0.447  1.   ]]

    Reference: Shen, Yao, Gholami, Mahoney, Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, arXiv:2003.07845.
    """
    wide = checked_batch(x, {}, epsilon=epsilon, where=where)
    entries = count_entries(wide, where, axis_name)
    mean_square = entries.mean(jnp.square(wide), axis_name)
    y = affine(wide * reciprocal_root(mean_square, epsilon), scale, bias, where)
    return y.astype(jnp.result_type(x))


def group_scaling(x: ArrayLike, groups: int = 1, *, epsilon: float = 1e-5) -> Array:
    r"""Every token over the quadratic mean of each of its groups of channels.

        y_i = x_i / √(mean_{j in group of i} x_j² + ε)

    `rms_norm` without gain over C / groups consecutive channels.

    Args:
      x: `[..., C]` floating point, at most about 1e16 in size.
      groups: a divisor of C. Default 1.
      epsilon: ε at least 0. Default 1e-5.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: `groups` below 1 or no divisor of C, or a negative `epsilon`.
      TypeError: `x` is not floating point.

    Use it before `power_norm`, through its argument `groups`, as the authors' code does: it takes
    the differences in size between tokens out of the statistics.

    Cost: that of `rms_norm`, one reduction over each group.

    Example:
      >>> print(group_scaling(jnp.array([3.0, -3.0, 0.1, 0.1]), 2).round(2))
      [ 1. -1.  1.  1.]

    Reference: Shen, Yao, Gholami, Mahoney, Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, arXiv:2003.07845.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("x must have shape [..., C], got a scalar")
    check_groups(groups, x.shape[-1])
    split = x.reshape((*x.shape[:-1], groups, x.shape[-1] // groups))
    return rms_norm(split, epsilon=epsilon).reshape(x.shape)


class Entries(NamedTuple):
    """How many entries of a batch count, over all shards: what their mean needs.

    Counted in the forward pass for both passes: in the backward pass under vmap, jax does not know
    the size of the mapped axis any more.

    Attributes:
      number: `[C]` float32, the entries of each channel.
      shards: float32, over how many shards they are spread.
    """

    number: Array
    shards: Array

    def mean(self, values: Array, axis_name: AxisName | None) -> Array:
        """Mean of `values [..., C]`, 0 where they do not count, over all axes but the last."""
        total = jnp.sum(values, axis=tuple(range(values.ndim - 1)))
        total = sum_over_shards(total, axis_name)
        return total / jnp.maximum(self.number, 1)


def count_entries(x: Array, where: ArrayLike | None, axis_name: AxisName | None) -> Entries:
    """The `Entries` of `x [..., C]` that `where` admits."""
    if where is None:
        number = jnp.full(x.shape[-1:], math.prod(x.shape[:-1]), jnp.float32)
    else:
        ones = jnp.ones(x.shape, jnp.float32)
        number = jnp.sum(ones, axis=tuple(range(x.ndim - 1)), where=where)
    entries = Entries(number, jnp.float32(1))
    return sum_over_shards(entries, axis_name)


def summed_over_shards(value: Array, x: Array, axis_name: AxisName | None) -> Array:
    """`value`, the same in every shard of `x`, such that their gradients with respect to it add up.

    For the arguments of a custom_vjp, whose rule jax takes at its word. A zero that may differ from
    shard to shard, as far as jax knows, makes it so under shard_map and vmap alike.
    """
    return value if axis_name is None else value + jnp.sum(x[:0]).astype(value.dtype)
