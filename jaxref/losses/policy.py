"""Policy gradients of sampled tokens, kept near the policy that sampled them (PPO, GRPO, D³S).

Log-probabilities here are those of the sampled tokens, in nats, and not logits: over a large
vocabulary they are -`jaxref.kernels.linear_softmax_cross_entropy`, which forms no logits, and
entropies `jaxref.kernels.linear_softmax_entropy`.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.exponential import linear_tail_exp
from jaxref.core.reductions import masked_mean
from jaxref.core.shards import AxisName
from jaxref.data.rollout_selection import select_rollouts, select_tokens
from jaxref.losses.preference import log_ratio


def clipped_policy_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.2,
    dual_clip: float | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""The clipped surrogate of a policy's expected advantage, of each token (PPO, GRPO).

        L = -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A),   ρ = π(y_t) / π_old(y_t)

    Once a token is likelier than the clip allows and should be likelier yet, or less likely and
    should be less, its gradient is 0. Where A < 0 a dual clip c has min(L, -c A) instead: the ratio
    of a bad token has no other bound above.

    Args:
      log_probs: log π(y_t) `[...]` floating point, of sampled tokens.
      old_log_probs: log π_old(y_t) `[...]`, by the policy that sampled them, without gradient. In
        the first update after sampling these are the same values.
      advantages: A, broadcastable to `[...]`, without gradient: `[rollouts, 1]` for those of
        `jaxref.data.group_relative_advantage`.
      clip_low: ε_low at least 0, broadcastable to `[...]`. Default 0.2, PPO's.
      clip_high: ε_high likewise. Default 0.2; DAPO has 0.28, which leaves unlikely tokens room.
      dual_clip: c above 1. Default: none.
      where: boolean, broadcastable to `[...]`: the tokens that count, which are those of the
        response and not its padding. Others have loss and gradient 0, whatever they hold. Default:
        all.

    Returns:
      `[...]` losses in the type of `log_probs`, of either sign; -A where ρ is 1. Their mean is over
      all tokens of the batch in DAPO, `masked_mean(losses, where=where)`, and over the tokens of
      each response first in GRPO. From a log-ratio of 62 on ρ is continued by its tangent, so that
      it is finite.

    Raises:
      ValueError: shapes that do not match, a negative clip, or a dual clip of 1 or less.
      TypeError: log-probabilities that are not floating point.

    Use it to learn from rewards by samples. GRPO adds β times `kl_estimate`; `d3s_policy_loss`
    learns from fewer tokens, and `hapo_loss` treats them by their entropy.

    Cost: one pass over the tokens; log-probabilities of one model, the old ones kept from sampling.

    Example:
      >>> log_probs = jnp.log(jnp.array([0.5, 0.5, 0.5, 0.5]))
      >>> old, advantages = jnp.log(jnp.array([0.5, 0.25, 0.25, 0.9])), jnp.array([1.0, 1, -1, -1])
      >>> print(clipped_policy_loss(log_probs, old, advantages).round(3))
      [-1.  -1.2  2.   0.8]

    Reference: Schulman, Wolski, Dhariwal, Radford, Klimov, "Proximal Policy Optimization
    Algorithms", 2017, arXiv:1707.06347; Shao et al., "DeepSeekMath: Pushing the Limits of
    Mathematical Reasoning in Open Language Models", 2024, arXiv:2402.03300; the dual clip is of Ye
    et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2019,
    arXiv:1912.09729.
    """
    check_interval(0, jnp.inf, clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None:
        check_interval(1, jnp.inf, closed="neither", dual_clip=dual_clip)
    log_ratio, exists = _log_ratio(log_probs, where, old_log_probs=old_log_probs)
    check_broadcastable(
        log_ratio.shape, advantages=advantages, clip_low=clip_low, clip_high=clip_high
    )
    dtype = log_ratio.dtype
    a = jax.lax.stop_gradient(jnp.where(exists, jnp.asarray(advantages, dtype), 0.0))
    low, high = (jax.lax.stop_gradient(jnp.asarray(x, dtype)) for x in (clip_low, clip_high))
    ratio = linear_tail_exp(log_ratio)
    losses = -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a)
    if dual_clip is not None:
        losses = jnp.where(a < 0, jnp.minimum(losses, -dual_clip * a), losses)
    return jnp.where(exists, losses, 0.0).astype(jnp.result_type(log_probs))


def kl_estimate(
    log_probs: ArrayLike, reference_log_probs: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""How far a policy is from a reference, by its own samples: unbiased and never negative (k3).

        k = e^d - d - 1,   d = log π_ref(y_t) - log π(y_t),   E_{y ~ π} k = KL(π || π_ref)

    The plain estimate -d has the same mean and either sign; e^d - 1 has mean 0 and offsets it.

    Args:
      log_probs: log π(y_t) `[...]` floating point, of tokens sampled from π.
      reference_log_probs: log π_ref(y_t) `[...]`, without gradient.
      where: boolean, broadcastable to `[...]`: the tokens that count; 0 for others. Default: all.

    Returns:
      `[...]` of at least 0 in the type of `log_probs`, in nats. From d = 62 on e^d is continued by
      its tangent, so that it is finite.

    Raises:
      ValueError: shapes that do not match.
      TypeError: log-probabilities that are not floating point.

    Use it with a weight β, 0.04 in GRPO, beside `clipped_policy_loss`. The mean is unbiased, the
    gradient of the mean is not quite that of the divergence: samples are taken as given.

    Cost: one pass over the tokens, and a forward pass of the reference, which has to be in memory.

    Example:
      >>> print(kl_estimate(jnp.array([-1.0, -1.0]), jnp.array([-1.0, -2.0])).round(4))
      [0.     0.3679]

    Reference: Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo, "DeepSeekMath: Pushing the
    Limits of Mathematical Reasoning in Open Language Models", 2024, arXiv:2402.03300.
    """
    log_ratio, _ = _log_ratio(log_probs, where, reference_log_probs=reference_log_probs)
    d = -log_ratio
    is_small = jnp.abs(d) < 0.1
    away = jnp.where(is_small, 1.0, d)
    series = jnp.square(d) / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5)))
    estimate = jnp.where(is_small, series, linear_tail_exp(away) - away - 1)
    return estimate.astype(jnp.result_type(log_probs))


def d3s_policy_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    entropy: ArrayLike,
    *,
    num_samples: int | Array,
    token_fraction: ArrayLike,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.2,
    sequence_ratio: bool = False,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    r"""The clipped surrogate of the rollouts and tokens of a batch that say most (D³S; of the set).

        S = `select_rollouts`: N rollouts of which Var(A) is largest
        T = `select_tokens`: the share K of the tokens of S with the largest |A_i| H_it
        L = mean over T of `clipped_policy_loss`

    N = all and K = 1 are GRPO, or GSPO, with a mean over all tokens.

    Args:
      log_probs: log π(y_it) `[rollouts, length]` floating point, of sampled tokens.
      old_log_probs: log π_old(y_it), of the same shape, without gradient.
      advantages: A `[rollouts]`, without gradient, as of `jaxref.data.group_relative_advantage`.
      entropy: H `[rollouts, length]`, at least 0, without gradient: of the current policy's
        distribution at each token, in nats.
      num_samples: N, an integer of at least 1; may be traced.
      token_fraction: K in (0, 1]; may be traced. Both are to grow during training, as
        `jaxref.data.down_sampling_schedule` has it.
      clip_low, clip_high: as in `clipped_policy_loss`, broadcastable to `[rollouts, length]`.
      sequence_ratio: True for GSPO's ratio, one for all tokens of a response: the geometric mean of
        theirs. The gradient of each is still by its own probability, so that tokens can be chosen.
        Its clips are far closer: 3e-4 and 4e-4 in GSPO.
      where: boolean, broadcastable to `[rollouts, length]`: the tokens of the responses. A rollout
        without any is not chosen. For a choice within each prompt set it to
        `tokens & select_rollouts(..., mode="group")[:, None]`, and `num_samples` to all.
      axis_name: name or names of the mapped axes over whose shards the rollouts are spread.

    Returns:
      `[rollouts, length]` losses in the type of `log_probs`, 0 for tokens that are not chosen, and
      the boolean `[rollouts, length]` of those that are: minimise
      `masked_mean(losses, where=chosen)`. Where all advantages are 0, so are losses and gradients.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: log-probabilities, advantages or an entropy that are not floating point, or
        `num_samples` that is no integer.

    Use it where many rollouts are alike: the authors' models took fewer steps, and less than a
    fifth of the tokens. To save the forward pass of the others as well, choose rollouts by
    `jaxref.data.select_rollouts` before.

    Cost: sorts of the rollouts and of all tokens, O(n log n), of all shards; entropies of the
    vocabulary at every token.

    Example:
      >>> log_probs = jnp.full((4, 2), -1.0)
      >>> entropy = jnp.array([[0.1, 0.9], [0.2, 0.1], [0.7, 0.3], [0.5, 0.5]])
      >>> losses, chosen = jax.jit(d3s_policy_loss)(
      ...     log_probs, log_probs, jnp.array([1.5, 0.0, -0.5, 0.0]), entropy,
      ...     num_samples=2, token_fraction=0.5,
      ... )
      >>> print(losses.ravel(), chosen.ravel().astype(int))
      [ 0.  -1.5  0.   0.   0.5  0.   0.   0. ] [0 1 0 0 1 0 0 0]

    Reference: Wang, Yang, Tian, Shi, Ma, Liu, Yao, Ding, "Learning More with Less: A Dynamic
    Dual-Level Down-Sampling Framework for Efficient Policy Optimization", 2025, arXiv:2509.22115;
    the ratio of sequences is of Zheng et al., "Group Sequence Policy Optimization", 2025,
    arXiv:2507.18071.
    """
    log_ratio, exists = _log_ratio(log_probs, where, old_log_probs=old_log_probs)
    if log_ratio.ndim != 2:
        raise ValueError(f"log_probs must have shape [rollouts, length], got {log_ratio.shape}")
    check_floating(advantages=advantages, entropy=entropy)
    check_shape(log_ratio.shape[:1], advantages=advantages)
    check_shape(log_ratio.shape, entropy=entropy)
    selected = select_rollouts(
        advantages, num_samples, where=exists.any(axis=1), axis_name=axis_name
    )
    chosen = select_tokens(
        advantages,
        entropy,
        fraction=token_fraction,
        where=exists & selected[:, None],
        axis_name=axis_name,
    )
    if sequence_ratio:
        mean = masked_mean(log_ratio, axis=1, where=exists, keepdims=True)
        log_ratio = jax.lax.stop_gradient(mean) + (log_ratio - jax.lax.stop_gradient(log_ratio))
    losses = clipped_policy_loss(
        log_ratio,
        jnp.zeros_like(log_ratio),
        jnp.asarray(advantages)[:, None],
        clip_low=clip_low,
        clip_high=clip_high,
        where=chosen,
    )
    return losses.astype(jnp.result_type(log_probs)), chosen


def _log_ratio(
    log_probs: ArrayLike, where: ArrayLike | None, **reference: ArrayLike
) -> tuple[Array, Array]:
    """log π - log of a fixed policy, 0 for tokens that do not count, and which do."""
    ratio = log_ratio(log_probs=log_probs, **reference)
    check_broadcastable(ratio.shape, where=where)
    exists = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), ratio.shape)
    return jnp.where(exists, ratio, 0.0), exists
