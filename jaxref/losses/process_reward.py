"""Process rewards that come with an outcome reward model (implicit process reward models).

A model of outcomes whose reward is the log-ratio of two language models, r(y) = β log(π(y) /
π_ref(y)), also says what each token and each step of a response is worth, though it was trained on
labels of whole responses: rewards of tokens add up to those of steps, and these to that of the
response. `implicit_reward_cross_entropy` trains it on single responses; any other loss of such
log-ratios does as well: `f_dpo_loss` on pairs, `kto_loss`, `nca_loss`.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.losses.cross_entropy import binary_cross_entropy
from jaxref.losses.preference import log_ratio

Mode = Literal["single", "accumulated"]
Reduction = Literal["min", "sum", "mean"]


def implicit_token_rewards(
    policy_log_probs: ArrayLike,
    reference_log_probs: ArrayLike | None,
    *,
    beta: float = 0.05,
    where: ArrayLike | None = None,
) -> Array:
    r"""What each token of a response adds to its reward, by the ratio of two language models.

        r_t = β (log π(y_t | y_<t) - log π_ref(y_t | y_<t)),   Σ_t r_t = r(y) = β log(π(y)/π_ref(y))

    Their sum up to a token is the value of what has been written, which lies between the mean and
    the best reward that the reference would reach from there; the larger β, the closer to the mean:

        q_t = Σ_{s≤t} r_s = β log E[exp(r(y) / β) | y_≤t],   rest of y by π_ref

    Args:
      policy_log_probs: log π `[..., length]` floating point, of the tokens that were written, in
        nats.
      reference_log_probs: log π_ref `[..., length]`, without gradient. None leaves it out, which
        saves a model where responses are only judged.
      beta: β above 0. Default 0.05, as in training by the authors; where responses are only ranked
        its size makes no difference.
      where: boolean, broadcastable to `[..., length]`: the tokens of the response. Default: all.

    Returns:
      r `[..., length]` in the type of `policy_log_probs`, 0 where a token does not count. A token
      that only the reference finds impossible has a reward of β 1e9, one that only the policy does
      of -β 1e9: log-probabilities of -∞ count as -1e9.

    Raises:
      ValueError: shapes that do not match, or a `beta` that is not positive.
      TypeError: log-probabilities that are not floating point.

    Use it for rewards of tokens in reinforcement learning; `implicit_step_rewards` gathers them
    into steps.

    Cost: one pass over the tokens; a forward pass of the policy, and of the reference where given.

    Example:
      >>> policy, reference = jnp.log(jnp.array([0.5, 0.1])), jnp.log(jnp.array([0.25, 0.2]))
      >>> print(implicit_token_rewards(policy, reference, beta=1.0).round(3))
      [ 0.693 -0.693]

    Reference: Yuan, Li, Chen, Cui, Ding, Zhang, Zhou, Liu, Peng, "Free Process Rewards without
    Process Labels", 2024, arXiv:2412.01981.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    check_broadcastable(jnp.shape(policy_log_probs), where=where)
    if reference_log_probs is None:
        reference_log_probs = jnp.zeros_like(policy_log_probs)
    rewards = beta * log_ratio(
        policy_log_probs=policy_log_probs, reference_log_probs=reference_log_probs
    )
    return _only(where, rewards).astype(jnp.result_type(policy_log_probs))


def implicit_step_rewards(
    token_rewards: ArrayLike,
    step_ends: ArrayLike | None = None,
    *,
    mode: Mode = "single",
    where: ArrayLike | None = None,
) -> Array:
    r"""What each step of a response is worth: alone, or with all before it.

        single        q_{e_k} - q_{e_{k-1}}
        accumulated   q_{e_k},               q_t = Σ_{s≤t} r_s,   q of no tokens = 0

    with e_k the last token of step k. Rewards of single steps add up to that of the response, and
    accumulated ones are values of the response so far.

    Args:
      token_rewards: r `[..., length]` floating point, of `implicit_token_rewards`.
      step_ends: e, integer `[..., steps]`, increasing, with -1 for steps that a response does not
        have, all after its last. Default: every token is a step, so that "accumulated" gives q.
      mode: "single" (the default) or "accumulated".
      where: boolean, broadcastable to `[..., length]`: the tokens that count. Default: all.

    Returns:
      `[..., steps]` in the type of `token_rewards`; 0 where there is no step, and NaN where
      `step_ends` is below -1 or not a token.

    Raises:
      ValueError: shapes that do not match, or an unknown mode.
      TypeError: rewards that are not floating point, or ends that are not integers.

    Use single steps to find where a response goes wrong, accumulated ones as values, for search.
    Tokens after the last end belong to no step.

    Cost: a cumulative sum over the tokens.

    Example:
      >>> rewards = jnp.array([1.0, 2.0, -4.0, 1.0])
      >>> print(implicit_step_rewards(rewards, jnp.array([1, 3, -1])))
      [ 3. -3.  0.]

    Reference: Yuan, Li, Chen, Cui, Ding, Zhang, Zhou, Liu, Peng, "Free Process Rewards without
    Process Labels", 2024, arXiv:2412.01981.
    """
    if mode not in ("single", "accumulated"):
        raise ValueError(f"mode must be 'single' or 'accumulated', got {mode!r}")
    check_floating(token_rewards=token_rewards)
    if jnp.ndim(token_rewards) == 0:
        raise ValueError("token_rewards must have shape [..., length], got ()")
    check_broadcastable(jnp.shape(token_rewards), where=where)
    rewards = jnp.asarray(token_rewards).astype(compute_dtype(token_rewards))
    *batch, length = rewards.shape
    values = jnp.cumsum(_only(where, rewards), axis=-1)
    if step_ends is None:
        step_ends = jnp.broadcast_to(jnp.arange(length), rewards.shape)
    ends = jnp.asarray(step_ends)
    if not jnp.issubdtype(ends.dtype, jnp.integer):
        raise TypeError(f"step_ends must be integers, got {ends.dtype.name}")
    check_shape((*batch, *ends.shape[-1:]), step_ends=ends)
    start = jnp.zeros((*batch, 1), values.dtype)
    ends = ends.astype(jnp.promote_types(ends.dtype, jnp.int32))
    known = (ends >= -1) & (ends < length)
    place = jnp.where(known, ends + 1, 0)
    steps = jnp.take_along_axis(jnp.concatenate([start, values], axis=-1), place, axis=-1)
    steps = jnp.where(known, steps, jnp.nan)
    if mode == "single":
        steps = jnp.where(ends == -1, 0.0, jnp.diff(steps, axis=-1, prepend=start))
    return steps.astype(jnp.result_type(token_rewards))


def response_score(
    step_rewards: ArrayLike,
    *,
    reduction: Reduction = "min",
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""How good a response is by its steps: as good as its worst, by default.

        min_k r_k,   Σ_k r_k   or   Σ_k r_k / K

    Args:
      step_rewards: r `[..., steps]` floating point, of `implicit_step_rewards`, or tokens' rewards.
      reduction: "min" (the default), "sum" or "mean".
      axis: the axis of the steps.
      where: boolean, broadcastable to `step_rewards`: the steps that there are, `step_ends >= 0`.
        Default: all.

    Returns:
      Of the shape of `step_rewards` without `axis`, in its type; 0 for a response without a step.

    Raises:
      ValueError: an unknown reduction, or shapes that do not match.
      TypeError: rewards that are not floating point.

    Use it to choose among n responses to a prompt: take that of the largest score. For a vote with
    weights add up the scores of all responses with the same answer,
    `jax.ops.segment_sum(scores, answers)`.

    Cost: one pass over the steps.

    Example:
      >>> rewards = jnp.array([[0.5, -2.0, 1.0], [0.1, 0.1, 0.0]])
      >>> print(response_score(rewards), response_score(rewards, reduction="sum"))
      [-2.  0.] [-0.5  0.2]

    Reference: Yuan, Li, Chen, Cui, Ding, Zhang, Zhou, Liu, Peng, "Free Process Rewards without
    Process Labels", 2024, arXiv:2412.01981.
    """
    if reduction not in ("min", "sum", "mean"):
        raise ValueError(f"reduction must be 'min', 'sum' or 'mean', got {reduction!r}")
    check_floating(step_rewards=step_rewards)
    check_broadcastable(jnp.shape(step_rewards), where=where)
    rewards = jnp.asarray(step_rewards).astype(compute_dtype(step_rewards))
    exists = jnp.broadcast_to(True if where is None else where, rewards.shape)
    if reduction == "mean":
        score = masked_mean(rewards, axis=axis, where=exists)
    elif reduction == "sum":
        score = jnp.sum(rewards, axis=axis, where=exists)
    else:
        score = jnp.min(rewards, axis=axis, where=exists, initial=jnp.inf)
        score = jnp.where(exists.any(axis=axis), score, 0.0)
    return score.astype(jnp.result_type(step_rewards))


def implicit_reward_cross_entropy(
    policy_log_prob: ArrayLike,
    reference_log_prob: ArrayLike,
    labels: ArrayLike,
    *,
    beta: float = 0.05,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of whether a response is right, by the log-ratio as its reward.

        L = -l log σ(r) - (1 - l) log σ(-r),   r = β (log π(y) - log π_ref(y))

    Args:
      policy_log_prob: log π(y) `[...]` floating point, of whole responses: sums over their tokens,
        in nats.
      reference_log_prob: log π_ref(y) `[...]`, without gradient.
      labels: l `[...]`, booleans or numbers in [0, 1]: whether the response is right, or how
        probably.
      beta: β above 0. Default 0.05, the authors'.
      where: boolean, broadcastable to `[...]`; the losses of other responses are 0. Default: all.

    Returns:
      `[...]` losses in the type of `policy_log_prob`; log 2 where the policy is the reference, or
      the response is empty: a sum over no tokens. A log-probability of -∞ counts as -1e9: where a
      response is impossible under the reference alone, the loss is 0 if it is right, and about
      β 1e9 if it is not.

    Raises:
      ValueError: shapes that do not match, labels outside of [0, 1], or a `beta` that is not
        positive.
      TypeError: log-probabilities that are not floating point.

    Use it where there is one response to a prompt, or few that are right; from pairs `f_dpo_loss`
    learns more.

    Cost: elementwise; each response through the policy, and, without gradient, through the
    reference.

    Example:
      >>> loss = implicit_reward_cross_entropy(
      ...     jnp.array([-10.0, -10.0]), jnp.array([-12.0, -12.0]), jnp.array([1, 0]), beta=1.0
      ... )
      >>> print(loss.round(3))
      [0.127 2.127]

    Reference: Yuan, Li, Chen, Cui, Ding, Zhang, Zhou, Liu, Peng, "Free Process Rewards without
    Process Labels", 2024, arXiv:2412.01981.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    if jnp.result_type(labels) != jnp.bool_:
        check_interval(0, 1, labels=labels)
    check_shape(jnp.shape(policy_log_prob), labels=labels)
    rewards = beta * log_ratio(
        policy_log_prob=policy_log_prob, reference_log_prob=reference_log_prob
    )
    losses = binary_cross_entropy(rewards, labels, where=where)
    return losses.astype(jnp.result_type(policy_log_prob))


def _only(where: ArrayLike | None, x: Array) -> Array:
    return x if where is None else jnp.where(where, x, 0.0)
