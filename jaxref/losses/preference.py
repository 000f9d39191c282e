"""Direct preference optimization: a policy fitted to choices, and kept near a reference (f-DPO).

A response's reward is a function of one number, the log of the ratio of its probability under the
policy to that under the reference, d = Σ_t (log π(y_t|·) - log π_ref(y_t|·)). With r = β f'(e^d)
the policy is the one that maximises E r - β D_f(π || π_ref), and a constant of the prompt drops out
of comparisons. Log-probabilities here are those of whole responses: sums over tokens, in nats.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]

DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")
"""The divergences whose reward is defined for every policy: f' is invertible, and f'(0) = -∞."""

_LARGEST_EXPONENT = 80.0
_LOWEST_LOG_PROB = -1e9


def f_dpo_loss(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Array:
    r"""How unlikely a choice is by the rewards that a policy implies (f-DPO; DPO by default).

        L = -(1 - ε) log σ(m) - ε log σ(-m),   m = r(d_w) - r(d_l),   r = `f_dpo_reward`

    with d_w and d_l the log-ratios of the chosen and the rejected response, and ε the smoothing.

    Args:
      policy_chosen: log π(y_w) `[...]` floating point, of the chosen responses.
      policy_rejected: log π(y_l) `[...]`, of the rejected ones.
      reference_chosen: log π_ref(y_w) `[...]`, without gradient.
      reference_rejected: log π_ref(y_l) `[...]`, without gradient.
      beta: β above 0, how dear the distance from the reference is. Default 0.1.
      divergence: which distance: "reverse_kl" (the default, DPO), "forward_kl", "jensen_shannon" or
        "alpha".
      alpha: α in (0, 1), of the last. Default 1/2. It is 1 minus the coefficient of trl.
      label_smoothing: ε in [0, 1/2), the share of choices that are taken for mistaken. Default 0.

    Returns:
      `[...]` losses above 0, in the type of `policy_chosen`; log 2 where the two rewards are alike,
      as for two equal responses or a policy that is the reference.

    Raises:
      ValueError: shapes that do not match, an unknown divergence, or a number out of its range.
      TypeError: log-probabilities that are not floating point.

    Use DPO to begin with; the Jensen-Shannon and α divergences give up some reward for a policy
    that keeps more of the reference's diversity. Rewards of the forward KL and of α fall as a power
    of the ratio, and are cut off at e^-80, beyond which there is no gradient.

    Cost: elementwise; both responses through the policy, and, without gradient, through the
    reference.

    Example:
      >>> chosen, rejected, reference = jnp.array([-3.0]), jnp.array([-4.0]), jnp.array([-4.0])
      >>> loss = f_dpo_loss(chosen, rejected, reference, reference, beta=1.0)
      >>> print(loss.round(4))
      [0.3133]

    Reference: Wang, Jiang, Yang, Liu, Chen, "Beyond Reverse KL: Generalizing Direct Preference
    Optimization with Diverse Divergence Constraints", 2023, arXiv:2309.16240; DPO is of Rafailov,
    Sharma, Mitchell, Ermon, Manning, Finn, "Direct Preference Optimization: Your Language Model is
    Secretly a Reward Model", 2023, arXiv:2305.18290.
    """
    check_interval(0, 0.5, closed="left", label_smoothing=label_smoothing)
    check_floating(policy_chosen=policy_chosen)
    check_shape(
        jnp.shape(policy_chosen),
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    dtype = compute_dtype(policy_chosen, policy_rejected)
    pairs = (policy_chosen, reference_chosen), (policy_rejected, reference_rejected)
    chosen, rejected = (
        f_dpo_reward(
            jnp.asarray(policy).astype(dtype),
            reference,
            beta=beta,
            divergence=divergence,
            alpha=alpha,
        )
        for policy, reference in pairs
    )
    margin = chosen - rejected
    losses = (1 - label_smoothing) * jax.nn.softplus(-margin)
    losses += label_smoothing * jax.nn.softplus(margin)
    return losses.astype(jnp.result_type(policy_chosen))


def f_dpo_reward(
    policy_log_prob: ArrayLike,
    reference_log_prob: ArrayLike,
    *,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> Array:
    r"""The reward that a policy implies for a response, up to a constant of its prompt.

        r = β f'(e^d),   d = log π(y) - log π_ref(y)

        reverse_kl      f = u log u                                f'(e^d) = d
        forward_kl      f = -log u                                 f'(e^d) = -e^(-d)
        jensen_shannon  f = u log u - (u + 1) log((u + 1) / 2)     f'(e^d) = log(2 / (1 + e^(-d)))
        alpha           f = (u^(1-α) - (1-α) u - α) / (α (α - 1))  f'(e^d) = (1 - e^(-α d)) / α

    α → 0 is the reverse KL divergence, α → 1 the forward one, up to a constant.

    Args:
      policy_log_prob: log π(y) `[...]` floating point.
      reference_log_prob: log π_ref(y) `[...]`, without gradient.
      beta, divergence, alpha: as in `f_dpo_loss`.

    Returns:
      `[...]` in the type of `policy_log_prob`; that of Jensen-Shannon is below β log 2.

    Raises:
      ValueError, TypeError: as `f_dpo_loss`.

    A log-probability of -∞ counts as -1e9: a response that is impossible under both has ratio 1.

    Use it to rank or to log rewards; detach it where it is a target.

    Cost: elementwise; a forward pass of two models for the log-probabilities.

    Example:
      >>> ratios = jnp.array([0.0, 2.0])
      >>> print(f_dpo_reward(ratios, jnp.zeros(2), beta=1.0, divergence="jensen_shannon").round(3))
      [0.    0.566]

    Reference: Wang, Jiang, Yang, Liu, Chen, "Beyond Reverse KL: Generalizing Direct Preference
    Optimization with Diverse Divergence Constraints", 2023, arXiv:2309.16240.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    _check_divergence(divergence, alpha)
    d = log_ratio(policy_log_prob=policy_log_prob, reference_log_prob=reference_log_prob)
    if divergence == "jensen_shannon":
        slope = jnp.log(2.0) - jax.nn.softplus(-d)
    elif divergence == "forward_kl":
        slope = -jnp.exp(jnp.minimum(-d, _LARGEST_EXPONENT))
    elif divergence == "alpha":
        slope = -jnp.expm1(jnp.minimum(-alpha * d, _LARGEST_EXPONENT)) / alpha
    else:
        slope = d
    return (beta * slope).astype(jnp.result_type(policy_log_prob))


def f_divergence(
    p: ArrayLike,
    q: ArrayLike,
    *,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    axis: int = -1,
) -> Array:
    r"""How far a distribution is from a reference, by the divergences of `f_dpo_reward`.

        D_f(p || q) = Σ_y q(y) f(p(y) / q(y))

    The reverse KL divergence is KL(p || q), the forward one KL(q || p), and Jensen-Shannon's here
    is 2 JS, KL(p || m) + KL(q || m) with m = (p + q) / 2.

    Args:
      p: probabilities `[...]` floating point, summing to 1 over `axis`.
      q: the reference's, broadcastable to `p`.
      divergence, alpha: as in `f_dpo_loss`.
      axis: the axis of the outcomes.

    Returns:
      Of the shape of `p` without `axis`, at least 0, in the type of `p`; infinite where a KL
      divergence is.

    Raises:
      ValueError: shapes that do not match, an unknown divergence, or an `alpha` out of range.
      TypeError: probabilities that are not floating point.

    Use it to measure on finitely many outcomes how far a policy went.

    Cost: one pass over the outcomes.

    Example:
      >>> print(f_divergence(jnp.array([0.9, 0.1]), jnp.array([0.5, 0.5])).round(4))
      0.3681

    Reference: Wang, Jiang, Yang, Liu, Chen, "Beyond Reverse KL: Generalizing Direct Preference
    Optimization with Diverse Divergence Constraints", 2023, arXiv:2309.16240.
    """
    _check_divergence(divergence, alpha)
    check_floating(p=p, q=q)
    check_broadcastable(jnp.shape(p), q=q)
    dtype = compute_dtype(p, q)
    ours = jnp.asarray(p).astype(dtype)
    theirs = jnp.broadcast_to(jnp.asarray(q).astype(dtype), ours.shape)
    if divergence == "reverse_kl":
        terms = jax.scipy.special.rel_entr(ours, theirs)
    elif divergence == "forward_kl":
        terms = jax.scipy.special.rel_entr(theirs, ours)
    elif divergence == "jensen_shannon":
        middle = (ours + theirs) / 2
        terms = jax.scipy.special.rel_entr(ours, middle)
        terms += jax.scipy.special.rel_entr(theirs, middle)
    else:
        mixed = ours ** (1 - alpha) * theirs**alpha
        terms = ((1 - alpha) * ours + alpha * theirs - mixed) / (alpha * (1 - alpha))
    return jnp.sum(terms, axis=axis).astype(jnp.result_type(p))


def optimal_f_policy(
    rewards: ArrayLike,
    reference: ArrayLike,
    *,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> Array:
    r"""The distribution over finitely many outcomes that earns most, near a reference.

        π = argmax E_π r - β D_f(π || π_ref),   π(y) = π_ref(y) (f')⁻¹((r(y) - λ) / β)

    with λ such that π sums to 1, found by bisection; of the reverse KL divergence it is the softmax
    of log π_ref + r / β.

    Args:
      rewards: r `[..., outcomes]` floating point.
      reference: π_ref `[..., outcomes]` floating point, positive, summing to 1.
      beta, divergence, alpha: as in `f_dpo_loss`.

    Returns:
      π `[..., outcomes]` in the type of `rewards`, without gradient.

    Raises:
      ValueError: shapes that do not match, an unknown divergence, or a number out of its range.
      TypeError: rewards or reference not floating point.

    Use it to see what `f_dpo_loss` leads to: the policy that explains all choices by these rewards.

    Cost: 60 passes over the outcomes, of the bisection; a softmax for the reverse KL divergence.

    Example:
      >>> print(optimal_f_policy(jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5]), beta=1.0).round(3))
      [0.731 0.269]

    Reference: Wang, Jiang, Yang, Liu, Chen, "Beyond Reverse KL: Generalizing Direct Preference
    Optimization with Diverse Divergence Constraints", 2023, arXiv:2309.16240.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    _check_divergence(divergence, alpha)
    check_floating(rewards=rewards, reference=reference)
    check_shape(jnp.shape(rewards), reference=reference)
    dtype = compute_dtype(rewards, reference)
    values = jax.lax.stop_gradient(jnp.asarray(rewards).astype(dtype) / beta)
    log_q = jnp.log(jax.lax.stop_gradient(jnp.asarray(reference).astype(dtype)))
    if divergence == "reverse_kl":
        return jax.nn.softmax(log_q + values, axis=-1).astype(jnp.result_type(rewards))
    # f' has an upper bound, of which the best reward stays short by a slack, and others by more
    best = jnp.max(values, axis=-1, keepdims=True)
    most = jnp.exp(jnp.max(log_q, axis=-1, keepdims=True, initial=-jnp.inf, where=values == best))

    def policy(log_slack: Array) -> Array:
        short = jnp.exp(log_slack) + best - values
        if divergence == "jensen_shannon":
            log_ratio = -jnp.log(jnp.expm1(short))
        elif divergence == "forward_kl":
            log_ratio = -jnp.log(short)
        else:
            log_ratio = -jnp.log(alpha * short) / alpha
        return jnp.exp(log_q + log_ratio)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        too_much = jnp.sum(policy(middle), axis=-1, keepdims=True) > 1
        return jnp.where(too_much, middle, low), jnp.where(too_much, high, middle)

    # at the one end the best outcomes alone have probability 1 or more, at the other no ratio is
    # above 1
    if divergence == "jensen_shannon":
        low, high = jnp.log1p(most), math.log(2)
    elif divergence == "forward_kl":
        low, high = most, 1.0
    else:
        low, high = most**alpha / alpha, 1 / alpha
    ends = jnp.log(low), jnp.full(most.shape, math.log(high), dtype)
    found = policy(jnp.mean(jnp.stack(jax.lax.fori_loop(0, 60, halve, ends)), axis=0))
    found /= jnp.sum(found, axis=-1, keepdims=True)
    return found.astype(jnp.result_type(rewards))


def log_ratio(**log_probs: ArrayLike) -> Array:
    """log π(y) - log π_ref(y) in at least float32, without gradient to the reference.

    The two are given by the names of the arguments. A log-probability of -∞ counts as -1e9, so that
    a response that is impossible under both has ratio 1.
    """
    check_floating(**log_probs)
    policy, reference = log_probs.values()
    check_shape(jnp.shape(policy), **log_probs)
    dtype = compute_dtype(policy, reference)
    ours, theirs = (
        jnp.maximum(jnp.asarray(x).astype(dtype), _LOWEST_LOG_PROB) for x in (policy, reference)
    )
    return ours - jax.lax.stop_gradient(theirs)


def _check_divergence(divergence: str, alpha: float) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}")
    check_interval(0, 1, closed="neither", alpha=alpha)
