"""Which samples of a policy to learn from, by how far their rewards are from each other's.

A rollout is one sampled response. Those to the same prompt are a group, by which a reward is good
or bad. Nothing here has a gradient.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.ranks import ascending_ranks
from jaxref.core.shards import AxisName, all_shards, sum_over_shards


def group_relative_advantage(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    *,
    num_groups: int,
    weights: ArrayLike | None = None,
    correction: float = 1.0,
    normalise_std: bool = True,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How much better a rollout is than others to its prompt, in standard deviations (of the set).

        A_i = (R_i - μ_g) / (σ_g + ε)
        μ_g = Σ_{i in g} w_i R_i / W_g,   σ_g² = Σ_{i in g} w_i (R_i - μ_g)² / (W_g - c)

    with W_g the weights' sum and c the correction.

    Args:
      rewards: R `[rollouts]` floating point.
      group_ids: integers `[rollouts]`, from 0 to num_groups - 1: the prompt of each. One that is
        out of the range gives NaN for its rollout.
      num_groups: how many prompts there are, at least 1.
      weights: w `[rollouts]` at least 0, such as numbers of tokens; weight 0 leaves a rollout out.
        Default: 1.
      correction: c at least 0. The default 1, that of trl and verl, is the unbiased variance of
        n - 1; 0 is the population's, by which advantages are √(n / (n - 1)) as large.
      normalise_std: False for R - μ alone, which leaves prompts of all difficulties their scale.
      epsilon: ε above 0. Default 1e-6, verl's; trl has 1e-4.
      axis_name: name or names of the mapped axes over whose shards the rollouts are spread; a group
        may be in several of them.

    Returns:
      A `[rollouts]` in the type of `rewards`, without gradient; 0 in a group of one or of equal
      rewards, and for a rollout of weight 0.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: rewards that are not floating point, or ids that are not integers.

    Use it for `jaxref.losses.clipped_policy_loss`, instead of a learned value of the prompt.
    `jaxref.losses.token_level_group_advantage` counts tokens rather than rollouts.

    Cost: O(rollouts), sums by group; with `axis_name` a few numbers a group are exchanged. No model
    of values.

    Example:
      >>> rewards, prompts = jnp.array([1.0, 0, 0, 0, 1, 1]), jnp.array([0, 0, 0, 0, 1, 1])
      >>> print(group_relative_advantage(rewards, prompts, num_groups=2).round(2))
      [ 1.5 -0.5 -0.5 -0.5  0.   0. ]

    Reference: Shao, Wang, Zhu, Xu, Song, Bi, Zhang, Zhang, Li, Wu, Guo, "DeepSeekMath: Pushing the
    Limits of Mathematical Reasoning in Open Language Models", 2024, arXiv:2402.03300.
    """
    check_floating(rewards=rewards)
    check_interval(1, jnp.inf, num_groups=num_groups)
    check_interval(0, jnp.inf, correction=correction)
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    dtype = compute_dtype(rewards)
    values = jax.lax.stop_gradient(_rollouts(rewards=rewards).astype(dtype))
    ids = _checked_ids(group_ids, values)
    check_broadcastable(values.shape, weights=weights)
    w = jnp.broadcast_to(1.0 if weights is None else weights, values.shape).astype(dtype)
    w = jax.lax.stop_gradient(w)
    is_known = (ids >= 0) & (ids < num_groups)
    group = jnp.where(is_known, ids, num_groups)  # of its own, which is not looked at

    def sums(x: Array) -> Array:
        total = jax.ops.segment_sum(x, group, num_groups + 1)
        return sum_over_shards(total, axis_name)

    # from the least of a group, so that equal rewards differ from their mean by nothing
    least = jax.ops.segment_min(jnp.where(w > 0, values, jnp.inf), group, num_groups + 1)
    if axis_name is not None:
        least = jax.lax.pmin(least, axis_name)
    above = jnp.where(w > 0, values - least[group], 0.0)
    weight = sums(w)
    mean = sums(w * above) / jnp.where(weight > 0, weight, 1.0)
    advantages = above - mean[group]
    if normalise_std:
        freedom = weight - correction
        variance = sums(w * jnp.square(advantages)) / jnp.where(freedom > 0, freedom, 1.0)
        advantages /= jnp.sqrt(variance)[group] + epsilon
    advantages = jnp.where(w > 0, advantages, 0.0)
    return jnp.where(is_known, advantages, jnp.nan).astype(jnp.result_type(rewards))


def max_variance_subset(
    values: ArrayLike,
    size: int | Array,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The subset of a given size whose values vary most (a choice in the set).

        S = argmax_{|S| = N} Var(v_S)

    It is the i smallest values and the N - i largest, for some i: the variance is convex in each
    value, so that one between two others can be exchanged for one of them. All i are compared by
    sums over the sorted values.

    Args:
      values: v `[n]` floating point.
      size: N, an integer of at least 1; may be traced.
      where: boolean, broadcastable to `values`: those that there are. Default: all.
      axis_name: name or names of the mapped axes over whose shards the values are spread.

    Returns:
      Boolean `[n]`, True for N values, or for all where there are fewer. Of equal values the first
      count as the smallest, and of equal variances, up to rounding, that of the smallest i is
      taken.

    Raises:
      ValueError: a size below 1, or shapes that do not match.
      TypeError: values that are not floating point, or a size that is not an integer.

    Use it on advantages of one prompt or of a batch, as `select_rollouts` does.

    Cost: two sorts, O(n log n); with `axis_name` every shard gathers and sorts all values.

    Example:
      >>> print(max_variance_subset(jnp.array([0.1, 2.0, 0.0, -1.0]), 2).astype(int))
      [0 1 0 1]

    Reference: Wang, Yang, Tian, Shi, Ma, Liu, Yao, Ding, "Learning More with Less: A Dynamic
    Dual-Level Down-Sampling Framework for Efficient Policy Optimization", 2025, arXiv:2509.22115.
    """
    check_floating(values=values)
    _check_integer(size=size)
    check_interval(1, jnp.inf, size=size)
    check_broadcastable(jnp.shape(values), where=where)
    own = jax.lax.stop_gradient(_rollouts(values=values).astype(compute_dtype(values)))
    exists = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), own.shape)
    ranks, number = ascending_ranks(own, where=exists, axis_name=axis_name)
    ordered = jnp.sort(all_shards(jnp.where(exists, own, jnp.inf), axis_name))
    n = len(ordered)
    is_real = jnp.arange(n) < number
    mean = jnp.sum(ordered, where=is_real) / jnp.maximum(number, 1)
    centred = jnp.where(is_real, ordered - mean, 0.0)
    moments = jnp.stack([centred, jnp.square(centred)])
    smallest, largest = (
        jnp.pad(jnp.cumsum(x, axis=1), ((0, 0), (1, 0))) for x in (moments, moments[:, ::-1])
    )
    kept = jnp.minimum(size, number)
    i = jnp.arange(n + 1)
    rest = jnp.clip(n - number + kept - i, 0, n)  # what does not exist is sorted after the largest
    first, second = (smallest + largest[:, rest]) / jnp.maximum(kept, 1)
    best = jnp.argmax(jnp.where(i <= kept, second - jnp.square(first), -jnp.inf))
    return exists & ((ranks < best) | (ranks >= number - kept + best))


def select_rollouts(
    advantages: ArrayLike,
    size: int | Array,
    *,
    mode: Literal["batch", "group"] = "batch",
    group_ids: ArrayLike | None = None,
    num_groups: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The rollouts to train on: those whose advantages vary most (D³S, level of samples; a set).

        batch    `max_variance_subset` of all advantages, which crosses prompts
        group    `max_variance_subset` of those of each prompt

    A prompt whose rollouts are all right or all wrong has advantages of 0, and in mode "batch"
    little of it is chosen while others have more to say.

    Args:
      advantages: A `[rollouts]` floating point, of `group_relative_advantage` with all rollouts;
        they are not to be normalised again after the choice.
      size: N, an integer of at least 1, of the batch or of each prompt; may be traced, as that of
        `down_sampling_schedule`.
      mode: "batch", the default, or "group".
      group_ids: integers `[rollouts]` from 0 to num_groups - 1, for mode "group". Rollouts of other
        ids are never chosen.
      num_groups: how many prompts there are, for mode "group".
      where: boolean, broadcastable to `advantages`: the rollouts that there are. Default: all.
      axis_name: name or names of the mapped axes over whose shards the rollouts are spread.

    Returns:
      Boolean `[rollouts]`, True for N, or for N of each prompt.

    Raises:
      ValueError: a size below 1, an unknown mode, shapes that do not match, or mode "group" without
        groups.
      TypeError: advantages that are not floating point, or ids or a size that are not integers.

    Use it before the forward pass of training, which it makes cheaper where the chosen are gathered
    by `jnp.flatnonzero(selected, size=N)`; `jaxref.losses.d3s_policy_loss` chooses among what has
    been evaluated already.

    Cost: a `max_variance_subset`, O(n log n); in mode "group" one for each prompt, each over all n
    rollouts at once.

    Example:
      >>> advantages, prompts = jnp.array([1.0, -1.0, 0.0, 0.0]), jnp.array([0, 0, 1, 1])
      >>> print(select_rollouts(advantages, 2).astype(int))
      [1 1 0 0]
      >>> grouped = select_rollouts(
      ...     advantages, 1, mode="group", group_ids=prompts, num_groups=2
      ... )
      >>> print(grouped.reshape(2, 2).sum(axis=1))
      [1 1]

    Reference: Wang, Yang, Tian, Shi, Ma, Liu, Yao, Ding, "Learning More with Less: A Dynamic
    Dual-Level Down-Sampling Framework for Efficient Policy Optimization", 2025, arXiv:2509.22115.
    """
    if mode not in ("batch", "group"):
        raise ValueError(f"mode must be 'batch' or 'group', got {mode!r}")
    if mode == "batch":
        return max_variance_subset(advantages, size, where=where, axis_name=axis_name)
    if group_ids is None or num_groups is None:
        raise ValueError("group_ids and num_groups must be given where mode is 'group'")
    check_interval(1, jnp.inf, num_groups=num_groups)
    values = _rollouts(advantages=advantages)
    ids = _checked_ids(group_ids, values)
    check_broadcastable(values.shape, where=where)
    exists = True if where is None else jnp.asarray(where, bool)

    def of_group(group: Array) -> Array:
        return max_variance_subset(values, size, where=exists & (ids == group), axis_name=axis_name)

    return jnp.any(jax.vmap(of_group)(jnp.arange(num_groups)), axis=0)


def select_tokens(
    advantages: ArrayLike,
    entropy: ArrayLike,
    *,
    fraction: ArrayLike,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The tokens to train on: those that matter and are undecided (D³S, level of tokens; a set).

        the ⌈K n⌉ of n tokens with the largest |A_i| H_it

    Args:
      advantages: A `[rollouts]` floating point.
      entropy: H `[rollouts, length]` floating point, at least 0: that of the current policy's
        distribution from which each token was drawn, in nats.
      fraction: K in (0, 1]; may be traced, as that of `down_sampling_schedule`.
      where: boolean, broadcastable to `entropy`: the tokens to choose from, which are those of the
        chosen rollouts. Default: all.
      axis_name: name or names of the mapped axes over whose shards the rollouts are spread.

    Returns:
      Boolean `[rollouts, length]`. Of equal scores the first in memory are taken.

    Raises:
      ValueError: a `fraction` out of its range, or shapes that do not match.
      TypeError: advantages or an entropy that are not floating point.

    Use it as the `where` of any loss of tokens, after `select_rollouts`.

    Cost: a sort of all tokens' scores; with `axis_name` every shard gathers and sorts all of them.

    Example:
      >>> entropy = jnp.array([[0.1, 0.5], [0.3, 0.2]])
      >>> print(select_tokens(jnp.array([1.0, -2.0]), entropy, fraction=0.5).astype(int))
      [[0 1]
       [1 0]]

    Reference: Wang, Yang, Tian, Shi, Ma, Liu, Yao, Ding, "Learning More with Less: A Dynamic
    Dual-Level Down-Sampling Framework for Efficient Policy Optimization", 2025, arXiv:2509.22115.
    """
    check_floating(advantages=advantages, entropy=entropy)
    check_interval(0, 1, closed="right", fraction=fraction)
    if jnp.ndim(entropy) != 2:
        raise ValueError(f"entropy must have shape [rollouts, length], got {jnp.shape(entropy)}")
    check_shape(jnp.shape(entropy)[:1], advantages=advantages)
    check_broadcastable(jnp.shape(entropy), where=where)
    dtype = compute_dtype(advantages, entropy)
    scores = jnp.abs(jnp.asarray(advantages, dtype))[:, None] * jnp.asarray(entropy, dtype)
    exists = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), scores.shape)
    ranks, number = ascending_ranks(-scores, where=exists, axis_name=axis_name)
    # 0.3 of 50 are 15, whatever 0.3 is in binary
    return exists & (ranks < jnp.maximum(jnp.ceil(fraction * number - 1e-3), 1))


def down_sampling_schedule(
    progress: ArrayLike, *, initial: tuple[int, float], final: tuple[int, float]
) -> tuple[Array, Array]:
    r"""How many rollouts and which share of tokens to train on, from few to many (D³S).

        [N, K] = (1 - p) [N_initial, K_initial] + p [N_final, K_final]

    Args:
      progress: p in [0, 1], the share of the training that is done; may be traced.
      initial: rollouts of at least 1, and a share of tokens in (0, 1]. A quarter of the batch and
        0.2 are a start; the values here are ours.
      final: the same at the end. All rollouts and 1 leave nothing out.

    Returns:
      N, an int32 scalar, rounded, and K, a float32 scalar; they may be passed as they are, within
      jit, to `select_rollouts` and `select_tokens`.

    Raises:
      ValueError: a number out of its range.
      TypeError: rollouts that are not integers.

    Use it with `jaxref.losses.d3s_policy_loss`: strict choices learn fast from few signals, which
    loose ones later keep from being learned by heart.

    Cost: a few scalars a step.

    Example:
      >>> rollouts, share = down_sampling_schedule(0.5, initial=(16, 0.2), final=(64, 1.0))
      >>> print(rollouts, share.round(3))
      40 0.6

    Reference: Wang, Yang, Tian, Shi, Ma, Liu, Yao, Ding, "Learning More with Less: A Dynamic
    Dual-Level Down-Sampling Framework for Efficient Policy Optimization", 2025, arXiv:2509.22115.
    """
    check_interval(0, 1, progress=progress)
    (first, first_share), (last, last_share) = initial, final
    for size, share in (initial, final):
        _check_integer(rollouts=size)
        check_interval(1, jnp.inf, rollouts=size)
        check_interval(0, 1, closed="right", share=share)
    p = jnp.asarray(progress, jnp.float32)
    rollouts = jnp.round((1 - p) * first + p * last).astype(jnp.int32)
    return rollouts, (1 - p) * first_share + p * last_share


def _rollouts(**values: ArrayLike) -> Array:
    ((name, x),) = values.items()
    array = jnp.asarray(x)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {array.shape}")
    return array


def _check_integer(**values: ArrayLike) -> None:
    ((name, x),) = values.items()
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise TypeError(f"{name} must be integer, got {jnp.result_type(x).name}")


def _checked_ids(group_ids: ArrayLike, values: Array) -> Array:
    check_shape(values.shape, group_ids=group_ids)
    _check_integer(group_ids=group_ids)
    return jnp.asarray(group_ids)
