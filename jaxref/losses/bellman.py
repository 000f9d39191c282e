"""Robust Bellman errors: losses of the expected temporal difference error of each state."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.regression import absolute_error

KINDS = ("squared", "huber", "absolute")


def mean_huber_bellman_error(
    expected_td_errors: ArrayLike,
    state_weights: ArrayLike,
    *,
    threshold: float = 1.0,
    axis: int = -1,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean Huber Bellman error (a loss of the set of states).

        MHBE = Σ_s d(s) p(E[δ|s]),   p(a) = a² where |a| ≤ τ, 2 τ |a| - τ² elsewhere

    with d = state_weights and τ = threshold. p acts on the expectation of the error in a state: it
    is least at the expected return, which a Huber loss of the sampled errors misses.

    Args:
      expected_td_errors: E[δ|s] `[..., states]` floating point, the states at `axis`.
      state_weights: d at least 0, broadcastable to `[..., states]` with the states at `axis`; of
        sum 1 for a mean.
      threshold: τ above 0, in the unit of values. Default 1; τ → ∞ is the mean squared error.
      axis: the states' axis.
      axis_name: name or names of the mapped axes over whose shards the states are spread. Not
        needed under jit with shardings.

    Returns:
      `[...]` errors in the type of `expected_td_errors`.

    Raises:
      ValueError: shapes that do not match, negative weights, or a `threshold` that is not positive.
      TypeError: errors that are not floating point.

    Use it where the expectations are known, to judge; `saddlepoint_bellman_loss` minimizes it from
    samples.

    Cost: one pass over the states.

    Example:
      >>> print(mean_huber_bellman_error(jnp.array([0.5, 3.0]), jnp.array([0.5, 0.5])))
      2.625

    Reference: Patterson, Liao, White, "Robust Losses for Learning Value Functions", 2022,
    arXiv:2205.08464.
    """
    check_interval(0, jnp.inf, closed="right", threshold=threshold)
    check_floating(expected_td_errors=expected_td_errors)
    wide = jnp.asarray(expected_td_errors).astype(compute_dtype(expected_td_errors))
    h = jnp.clip(wide, -threshold, threshold)  # where 2 a h - h² is largest, which is p(a)
    losses = h * (2 * wide - h)
    return _weighted_sum(losses, expected_td_errors, state_weights, axis, axis_name)


def mean_absolute_bellman_error(
    expected_td_errors: ArrayLike,
    state_weights: ArrayLike,
    *,
    axis: int = -1,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean absolute Bellman error (a loss of the set of states).

        MABE = Σ_s d(s) |E[δ|s]|

    with d = state_weights.

    Args:
      expected_td_errors: E[δ|s] `[..., states]` floating point, the states at `axis`.
      state_weights: d at least 0, broadcastable to `[..., states]` with the states at `axis`; of
        sum 1 for a mean.
      axis: the states' axis.
      axis_name: name or names of the mapped axes over whose shards the states are spread. Not
        needed under jit with shardings.

    Returns:
      `[...]` errors in the type of `expected_td_errors`, in the unit of values.

    Raises:
      ValueError: shapes that do not match, or negative weights.
      TypeError: errors that are not floating point.

    Use it where states that cannot be fitted are to weigh least of all; `mean_huber_bellman_error`
    is smooth where errors are small.

    Cost: one pass over the states.

    Example:
      >>> print(mean_absolute_bellman_error(jnp.array([0.5, -3.0]), jnp.array([0.5, 0.5])))
      1.75

    Reference: Patterson, Liao, White, "Robust Losses for Learning Value Functions", 2022,
    arXiv:2205.08464.
    """
    check_floating(expected_td_errors=expected_td_errors)
    wide = jnp.asarray(expected_td_errors).astype(compute_dtype(expected_td_errors))
    losses = absolute_error(wide, 0.0)
    return _weighted_sum(losses, expected_td_errors, state_weights, axis, axis_name)


def saddlepoint_bellman_loss(
    values: ArrayLike,
    next_values: ArrayLike,
    rewards: ArrayLike,
    discounts: ArrayLike,
    auxiliary: ArrayLike,
    *,
    kind: str = "squared",
    threshold: float = 1.0,
    correction: bool = False,
    importance_ratios: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Surrogates whose gradients minimize a robust Bellman error from single samples.

    With δ = r + γ v(s') - v(s), an error p(E[δ|s]) is max_h E[2 δ h - h²] over h = h(s), free for
    "squared", in [-τ, τ] for "huber", and max_h E[δ h] over h in [-1, 1] for "absolute". h comes
    from an estimate u of E[δ|s], a head of its own; τ = threshold:

        value loss:      ρ h δ,   h = u, clip(u, -τ, τ) or sign(u), without gradient
        auxiliary loss:  (ρ δ - u)² / 2,   ρ δ without gradient

    At u = E[δ|s] the mean gradient of the value loss is half that of the squared and of the Huber
    error, and that of the absolute one. With `correction` the value loss is

        -ρ g v(s) + ρ γ h v(s'),   g = δ, clip(δ, -τ, τ) or sign(δ), without gradient

    which varies less (TDC). For "squared" it has the same solutions; for the others it clips
    samples and not their expectation, and has not.

    Args:
      values: v(s) `[...]` floating point.
      next_values: v(s') of the same shape, with its gradient: no target network.
      rewards: r, real numbers, broadcastable to `values`.
      discounts: γ (1 - done), likewise; 0 at the end of an episode.
      auxiliary: u(s) of the shape of `values`, floating point.
      kind: "squared", "huber" or "absolute". Default "squared": GTD2, or TDC with `correction`.
      threshold: τ above 0, of "huber", in the unit of values. Default 1.
      correction: see above. Default False.
      importance_ratios: ρ at least 0, broadcastable to `values`: the probability of the action
        under the policy to evaluate over that under the one that acted. Default: 1.
      where: boolean, broadcastable to `values`: the transitions that exist. Default: all.

    Returns:
      The value losses and the auxiliary losses `[...]`, in the types of `values` and of
      `auxiliary`. Add both: neither has a gradient for the other's network. What the value losses
      are has no meaning of its own.

    Raises:
      ValueError: shapes that do not match, an unknown `kind`, a `threshold` that is not positive or
        a negative ratio.
      TypeError: values or auxiliary that are not floating point.

    Use it off-policy, where temporal difference learning may diverge, and with "huber" where errors
    are large in a few states. u reads features without gradient (`jax.lax.stop_gradient`), and
    learns faster than v. `qrc_huber_loss` is the form for control.

    Cost: one pass over the transitions; of the networks forward and backward passes at s and s',
    and a second head.

    Example:
      >>> losses = saddlepoint_bellman_loss(
      ...     jnp.array([1.0]), jnp.array([2.0]), 1.0, 0.5, jnp.array([3.0]), kind="huber"
      ... )
      >>> print(*losses)
      [1.] [2.]

    Reference: Patterson, Liao, White, "Robust Losses for Learning Value Functions", 2022,
    arXiv:2205.08464.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {kind!r}")
    check_interval(0, jnp.inf, closed="right", threshold=threshold)
    check_floating(values=values, next_values=next_values, auxiliary=auxiliary)
    shape = jnp.shape(values)
    check_shape(shape, next_values=next_values, auxiliary=auxiliary)
    check_broadcastable(
        shape,
        rewards=rewards,
        discounts=discounts,
        importance_ratios=importance_ratios,
        where=where,
    )
    ratios = 1.0 if importance_ratios is None else importance_ratios
    check_interval(0, jnp.inf, importance_ratios=ratios)
    dtype = compute_dtype(values, next_values, auxiliary)
    v, v_next, r, gamma, u, rho = (
        jnp.broadcast_to(jnp.asarray(x).astype(dtype), shape)
        for x in (values, next_values, rewards, discounts, auxiliary, ratios)
    )
    if where is not None:
        v, v_next, r, gamma, u, rho = (
            jnp.where(where, x, 0.0) for x in (v, v_next, r, gamma, u, rho)
        )
    bounded = {
        "squared": lambda a: a,
        "huber": lambda a: jnp.clip(a, -threshold, threshold),
        "absolute": jnp.sign,
    }[kind]
    delta = r + gamma * v_next - v
    h = jax.lax.stop_gradient(bounded(u))
    if correction:
        value_loss = rho * (gamma * h * v_next - jax.lax.stop_gradient(bounded(delta)) * v)
    else:
        value_loss = rho * h * delta
    auxiliary_loss = 0.5 * jnp.square(jax.lax.stop_gradient(rho * delta) - u)
    return (
        value_loss.astype(jnp.result_type(values)),
        auxiliary_loss.astype(jnp.result_type(auxiliary)),
    )


def qrc_huber_loss(
    q_values: ArrayLike,
    actions: ArrayLike,
    rewards: ArrayLike,
    discounts: ArrayLike,
    next_q_values: ArrayLike,
    auxiliary: ArrayLike,
    *,
    threshold: float = 1.0,
    regularization: float = 1.0,
    auxiliary_params: Any = None,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Q-learning that minimizes a Huber Bellman error (QRC-Huber).

    `saddlepoint_bellman_loss` of kind "huber", with

        v(s) = q(s, a),   v(s') = max_b q(s', b),   u(s, a) = w_a · features
        auxiliary loss + β / 2 ||w||²,   β = regularization

    The penalty holds the correction back where u is not yet known; β → ∞ leaves no update at all.

    Args:
      q_values: q(s, ·) `[..., actions]` floating point.
      actions: integer `[...]`, a: one outside of the actions gives NaN.
      rewards: r, real numbers, broadcastable to `[...]`.
      discounts: γ (1 - done), likewise.
      next_q_values: q(s', ·) `[..., actions]`, with its gradient: no target network.
      auxiliary: u(s, ·) `[..., actions]` floating point, a linear head on features without
        gradient.
      threshold: τ above 0, in the unit of values. Default 1.
      regularization: β at least 0. Default 1.
      auxiliary_params: a tree of the head's parameters w, of which β sees the squares. Default: no
        penalty.
      where: boolean, broadcastable to `[...]`: the transitions that exist. Default: all.

    Returns:
      The value losses and the auxiliary losses `[...]`, in the types of `q_values` and of
      `auxiliary`. The penalty is in each auxiliary loss of a transition that exists, so that it
      counts once in their mean.

    Raises:
      ValueError: shapes that do not match, a `threshold` that is not positive or a negative
        `regularization`.
      TypeError: values or auxiliary not floating point, or actions not integer.

    Use it in place of Q-learning with a clipped error and a target network; to evaluate a given
    policy take `saddlepoint_bellman_loss`.

    Cost: one pass over the values of all actions and over w; of the networks forward and backward
    passes at s and s', and a second head.

    Example:
      >>> q, next_q, u = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]]), jnp.array([[3.0, 0.0]])
      >>> print(*qrc_huber_loss(q, jnp.array([0]), 1.0, 0.5, next_q, u))
      [1.] [2.]

    Reference: Patterson, Liao, White, "Robust Losses for Learning Value Functions", 2022,
    arXiv:2205.08464.
    """
    check_interval(0, jnp.inf, regularization=regularization)
    check_floating(q_values=q_values, next_q_values=next_q_values, auxiliary=auxiliary)
    shape = jnp.shape(q_values)
    if not shape or shape[-1] == 0:
        raise ValueError(f"q_values must have shape [..., actions], got {shape}")
    check_shape(shape, next_q_values=next_q_values, auxiliary=auxiliary)
    chosen = jnp.asarray(actions)
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise TypeError(f"actions must be integers, got {chosen.dtype.name}")
    check_shape(shape[:-1], actions=chosen)
    known = (chosen >= 0) & (chosen < shape[-1])
    place = jnp.where(known, chosen, 0)[..., None]

    def of_action(x: ArrayLike) -> Array:
        taken = jnp.take_along_axis(jnp.asarray(x), place, axis=-1)[..., 0]
        return jnp.where(known, taken, jnp.nan)

    value_loss, auxiliary_loss = saddlepoint_bellman_loss(
        of_action(q_values),
        jnp.max(jnp.asarray(next_q_values), axis=-1),
        rewards,
        discounts,
        of_action(auxiliary),
        kind="huber",
        threshold=threshold,
        where=where,
    )
    if auxiliary_params is not None:
        leaves = [jnp.asarray(w) for w in jax.tree.leaves(auxiliary_params)]
        squares = sum(jnp.sum(jnp.square(w.astype(compute_dtype(w)))) for w in leaves)
        penalized = auxiliary_loss + 0.5 * regularization * squares
        if where is not None:
            penalized = jnp.where(where, penalized, 0.0)
        auxiliary_loss = penalized.astype(auxiliary_loss.dtype)
    return value_loss, auxiliary_loss


def _weighted_sum(
    losses: Array,
    errors: ArrayLike,
    state_weights: ArrayLike,
    axis: int,
    axis_name: AxisName | None,
) -> Array:
    check_interval(0, jnp.inf, state_weights=state_weights)
    check_broadcastable(losses.shape, state_weights=state_weights)
    (axis,) = canonical_axes(axis, losses.ndim)
    weighted = jnp.asarray(state_weights).astype(losses.dtype) * losses
    total = sum_over_shards(jnp.sum(weighted, axis=axis), axis_name)
    return total.astype(jnp.result_type(errors))
