"""Policy optimisation that treats every token by how undecided the policy was there (HAPO).

A token of low entropy continues what is clear already, one of high entropy decides where to go. On
a scale h from -1 to 1 the first are sampled colder and may be unlearned further, and the second are
sampled hotter and may be learned further.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.exponential import linear_tail_exp
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.data.rollout_selection import group_relative_advantage
from jaxref.losses.policy import clipped_policy_loss

_LEAST_ENTROPY = 1e-8


class EntropyStats(NamedTuple):
    """The scale of a batch's entropies, for `normalised_entropy` and `entropy_temperature`.

    Attributes:
      pivot: scalar, the log of the entropy at which h is 0.
      above: scalar, how far above it is the largest, where h is 1; 1 where none is above.
      below: scalar, how far below it is the smallest, where h is -1; 1 where none is below.

    Reference: Liu, Liu, Wen, Cai, Cui, He, Zhang, "From Uniform to Heterogeneous: Tailoring Policy
    Optimization to Every Token's Nature", 2025, arXiv:2509.16591.
    """

    pivot: Array
    above: Array
    below: Array


def normalised_entropy(
    entropy: ArrayLike,
    *,
    pivot: float = 0.8,
    stats: EntropyStats | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, EntropyStats]:
    r"""The entropies of a batch's tokens on a scale from -1 to 1 (HAPO; of the set).

        e = log max(H, 1e-8),   m = the q-quantile of e over all tokens, the nearest one of them
        h = (e - m) / max(e - m) where e > m,   h = (e - m) / max(m - e) where e ≤ m

    The authors divide e - m by its deviation first, which cancels. Their code turns the sign of
    negative h, so that tokens of low entropy had h > 0; here they have h < 0, as in the paper.

    Args:
      entropy: H `[...]` floating point, at least 0, of the policy's distribution at each token; all
        entries are one batch.
      pivot: q in [0, 1]. Default 0.8, the authors': a fifth of the tokens counts as undecided.
      stats: the scale of another batch, to take h by. Default: that of this one.
      where: boolean, broadcastable to `[...]`: the tokens that there are. Others have h = 0.
      axis_name: name or names of the mapped axes over whose shards the tokens are spread.

    Returns:
      h `[...]` in at least float32 without gradient, in [-1, 1] and with both ends attained where
      there are values on both sides of m, or beyond with the `stats` of others; and the scale,
      which is 0, 1, 1 of no token.

    Raises:
      ValueError: a `pivot` out of its range, or a `where` that does not broadcast.
      TypeError: an entropy that is not floating point.

    Use it once a step for the scale that `entropy_temperature` takes at the next; `hapo_loss`
    calls it by itself.

    Cost: one sort of the entropies of all tokens, of all shards; with `stats` one pass.

    Example:
      >>> h, stats = normalised_entropy(jnp.exp(jnp.array([-4.0, -3.0, -2.0, 0.0, 1.0])), pivot=0.5)
      >>> print(h.round(3))
      [-1.    -0.5    0.     0.667  1.   ]

    Reference: Liu, Liu, Wen, Cai, Cui, He, Zhang, "From Uniform to Heterogeneous: Tailoring Policy
    Optimization to Every Token's Nature", 2025, arXiv:2509.16591.
    """
    check_interval(0, 1, pivot=pivot)
    check_floating(entropy=entropy)
    check_broadcastable(jnp.shape(entropy), where=where)
    e = jax.lax.stop_gradient(jnp.asarray(entropy, compute_dtype(entropy)))
    exists = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), e.shape)
    e = jnp.log(jnp.maximum(e, _LEAST_ENTROPY))
    if stats is None:
        ordered = jnp.sort(all_shards(jnp.where(exists, e, jnp.inf).ravel(), axis_name))
        number = sum_over_shards(jnp.count_nonzero(exists), axis_name)
        last = jnp.maximum(number - 1, 0)
        middle = jnp.round(pivot * last).astype(jnp.int32)
        m, least, most = jnp.where(number > 0, ordered[jnp.stack([middle, 0, last])], 0.0)
        stats = EntropyStats(
            m, jnp.where(most > m, most - m, 1.0), jnp.where(m > least, m - least, 1.0)
        )
    difference = e - stats.pivot
    h = difference / jnp.where(difference > 0, stats.above, stats.below)
    return jnp.where(exists, h, 0.0), stats


def entropy_temperature(
    logits: ArrayLike,
    temperature: ArrayLike,
    stats: EntropyStats | None = None,
    *,
    tau: float = 0.05,
    axis: int = -1,
) -> Array:
    r"""The temperature to draw a token at: hotter where the policy is undecided (HAPO).

        T_t = T (1 + τ clip(h, -1, 1))

    with h the entropy of softmax(logits) on the scale of `normalised_entropy`.

    Args:
      logits: `[..., vocabulary]` floating point, before any temperature; they may be -∞.
      temperature: T above 0, broadcastable to `[...]`.
      stats: the scale, of the previous step's tokens. Default: none yet, and T.
      tau: τ in [0, 1). Default 0.05, the authors'; less of it where training collapses.
      axis: the axis of the vocabulary.

    Returns:
      `[...]` temperatures in the type of `logits`, from T (1 - τ) to T (1 + τ), without gradient.

    Raises:
      ValueError: a number out of its range, or a temperature that does not broadcast.
      TypeError: logits that are not floating point.

    Use it in the sampler, with `jax.random.categorical(key, logits / temperature[..., None])`.

    Cost: that of one more softmax over the vocabulary for each token.

    Example:
      >>> logits = jnp.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
      >>> _, stats = normalised_entropy(jnp.array([0.01, 0.1, 0.9]), pivot=0.5)
      >>> print(entropy_temperature(logits, 1.0, stats).round(3))
      [1.05 0.95]

    Reference: Liu, Liu, Wen, Cai, Cui, He, Zhang, "From Uniform to Heterogeneous: Tailoring Policy
    Optimization to Every Token's Nature", 2025, arXiv:2509.16591.
    """
    check_interval(0, jnp.inf, closed="neither", temperature=temperature)
    check_interval(0, 1, closed="left", tau=tau)
    check_floating(logits=logits)
    dtype = compute_dtype(logits)
    z = jax.lax.stop_gradient(jnp.asarray(logits, dtype))
    log_p = jax.nn.log_softmax(z, axis=axis)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=axis)
    check_broadcastable(entropy.shape, temperature=temperature)
    base = jnp.broadcast_to(jnp.asarray(temperature, dtype), entropy.shape)
    if stats is not None:
        h, _ = normalised_entropy(entropy, stats=stats)
        base *= 1 + tau * jnp.clip(h, -1.0, 1.0)
    return base.astype(jnp.result_type(logits))


def token_level_group_advantage(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    *,
    num_groups: int,
    where: ArrayLike,
    normalise_std: bool = True,
    fallback: float = 5.0,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How much better a rollout's reward is than that of the tokens of its prompt (of the set).

        A_it = (R_i - μ_g) / (σ_g + ε)

    with μ and σ the mean and the population's deviation over all tokens of all responses to the
    prompt, each with the reward of its response. The advantages of a prompt's tokens then add up to
    0, where with those of `jaxref.data.group_relative_advantage` long responses outweigh short
    ones. Where an advantage of a prompt is as large as the fallback, as that of the one short
    response among long ones, the prompt takes those of responses instead.

    Args:
      rewards: R `[rollouts]` floating point.
      group_ids: integers `[rollouts]`, from 0 to num_groups - 1: the prompt of each. One that is
        out of the range gives NaN for the tokens of its rollout.
      num_groups: how many prompts there are, at least 1.
      where: boolean `[rollouts, length]`: the tokens of the responses.
      normalise_std: False for R - μ alone.
      fallback: above 0, inf for never. Default 5, the authors'.
      epsilon: ε above 0. Default 1e-6, the authors'.
      axis_name: name or names of the mapped axes over whose shards the rollouts are spread.

    Returns:
      A `[rollouts, length]` in the type of `rewards`, without gradient; 0 where there is no token
      and for equal rewards.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: rewards that are not floating point, or ids that are not integers.

    Use it where the loss is a mean over tokens, as in `hapo_loss` and DAPO.

    Cost: one pass over the `[rollouts, length]` tokens; sums of prompts over rollouts alone.

    Example:
      >>> where = jnp.array([[1, 1, 1], [1, 0, 0]], bool)
      >>> advantages = token_level_group_advantage(
      ...     jnp.array([1.0, 0.0]), jnp.array([0, 0]), num_groups=1, where=where
      ... )
      >>> print(advantages.round(3).ravel())
      [ 0.577  0.577  0.577 -1.732  0.     0.   ]

    Reference: Liu, Liu, Wen, Cai, Cui, He, Zhang, "From Uniform to Heterogeneous: Tailoring Policy
    Optimization to Every Token's Nature", 2025, arXiv:2509.16591.
    """
    if fallback != jnp.inf:
        check_interval(0, jnp.inf, closed="neither", fallback=fallback)
    if jnp.ndim(where) != 2:
        raise ValueError(f"where must have shape [rollouts, length], got {jnp.shape(where)}")
    check_shape(jnp.shape(where)[:1], rewards=rewards)
    check_floating(rewards=rewards)
    exists = jnp.asarray(where, bool)
    values = jnp.asarray(rewards, compute_dtype(rewards))
    of_rollouts = partial(
        group_relative_advantage,
        values,
        group_ids,
        num_groups=num_groups,
        normalise_std=normalise_std,
        epsilon=epsilon,
        axis_name=axis_name,
    )
    of_tokens = of_rollouts(weights=jnp.count_nonzero(exists, axis=1), correction=0.0)
    ids = jnp.asarray(group_ids)
    too_large = jax.ops.segment_sum(
        (jnp.abs(of_tokens) >= fallback).astype(jnp.int32),
        jnp.where((ids >= 0) & (ids < num_groups), ids, num_groups),
        num_groups,
    )
    too_large = sum_over_shards(too_large, axis_name)
    a = jnp.where(too_large[ids] > 0, of_rollouts(), of_tokens)
    return jnp.where(exists, a[:, None], 0.0).astype(jnp.result_type(rewards))


def hapo_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    entropy: ArrayLike,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 10.0,
    pivot: float = 0.8,
    clip_strength: float = 1.0,
    advantage_strength: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The clipped surrogate with clips and advantages by each token's entropy (HAPO; of the set).

        ε_low(h) = ε_low (1 - s h) where h ≤ 0,   ε_high(h) = ε_high (1 + s h) where h > 0
        A' = A (1 + b h) where 1 - ε_low(h)/2 < ρ < 1 + ε_high(h)/2 and h ≤ 0, or neither
        L = `clipped_policy_loss` of A' with these clips,   h = `normalised_entropy`

    The other clip of each is as it was. Tokens of low entropy learn little while the policy is
    where it was, and may be unlearned further; those of high entropy learn more once it has moved,
    and may be learned further.

    Args:
      log_probs: log π(y_t) `[...]` floating point, of sampled tokens, all of one batch.
      old_log_probs: log π_old(y_t) `[...]`, without gradient.
      advantages: A, broadcastable to `[...]`, without gradient, as of
        `token_level_group_advantage`.
      entropy: H `[...]`, at least 0, without gradient: of the current policy's distribution at each
        token, in nats.
      clip_low: ε_low at least 0. Default 0.2, the authors'.
      clip_high: ε_high at least 0. Default 0.2, the authors'.
      dual_clip: as in `clipped_policy_loss`. Default 10, the authors'; None for none.
      pivot: as in `normalised_entropy`. Default 0.8, the authors'.
      clip_strength: s at least 0. Default 1, the authors'; 0 leaves the clips as they are.
      advantage_strength: b in [0, 1]. Default 1, the authors'; 0 leaves the advantages as they are.
      where: boolean, broadcastable to `[...]`: the tokens of the responses. Others have loss and
        gradient 0, whatever they hold. Default: all.
      axis_name: name or names of the mapped axes over whose shards the tokens are spread.

    Returns:
      `[...]` losses in the type of `log_probs`; the authors minimise their mean over all tokens of
      the batch, `masked_mean(losses, where=where)`, without divergence and bonus of entropy.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: log-probabilities or an entropy that are not floating point.

    Use it to keep a policy from becoming certain too early; with both strengths 0 it is
    `clipped_policy_loss`.

    Cost: one sort of the entropies of all tokens beside `clipped_policy_loss`; an entropy over the
    vocabulary at every token.

    Example:
      >>> log_probs, entropy = jnp.full(3, -1.0), jnp.array([0.01, 0.1, 0.9])
      >>> old = jnp.array([-1.0, -1.0, -1.3])
      >>> options = {"pivot": 0.5, "advantage_strength": 0.5}
      >>> print(hapo_loss(log_probs, old, jnp.ones(3), entropy, **options).round(2))
      [-0.5  -1.   -2.02]

    Reference: Liu, Liu, Wen, Cai, Cui, He, Zhang, "From Uniform to Heterogeneous: Tailoring Policy
    Optimization to Every Token's Nature", 2025, arXiv:2509.16591.
    """
    check_interval(0, jnp.inf, clip_low=clip_low, clip_high=clip_high, clip_strength=clip_strength)
    check_interval(0, 1, advantage_strength=advantage_strength)
    check_floating(log_probs=log_probs, old_log_probs=old_log_probs)
    shape = jnp.shape(log_probs)
    check_shape(shape, old_log_probs=old_log_probs, entropy=entropy)
    check_broadcastable(shape, advantages=advantages, where=where)
    h, _ = normalised_entropy(entropy, pivot=pivot, where=where, axis_name=axis_name)
    low = clip_low * (1 + clip_strength * jnp.maximum(-h, 0.0))
    high = clip_high * (1 + clip_strength * jnp.maximum(h, 0.0))
    dtype = compute_dtype(log_probs, old_log_probs)
    ratio = linear_tail_exp(jnp.asarray(log_probs, dtype) - jnp.asarray(old_log_probs, dtype))
    is_near = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    scale = jnp.where((h > 0) != is_near, 1 + advantage_strength * h, 1.0)
    return clipped_policy_loss(
        log_probs,
        old_log_probs,
        jnp.asarray(advantages, dtype) * scale,
        clip_low=low,
        clip_high=high,
        dual_clip=dual_clip,
        where=where,
    )
