"""Rewards of responses one by one: good or bad as they are, and not better than another.

The reward of a response is β times its log-ratio, d = log π(y) - log π_ref(y), as in DPO, whose
loss `f_dpo_loss` knows only differences of two of them. These losses set each reward against a
level of its own: a reference point, or 0. Log-probabilities are those of whole responses: sums over
their tokens, in nats; one of -∞ counts as -1e9.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_broadcastable, check_interval, check_shape
from jaxref.core.labels import label_distribution
from jaxref.core.reductions import masked_mean
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.preference import log_ratio


def kto_loss(
    policy_log_prob: ArrayLike,
    reference_log_prob: ArrayLike,
    labels: ArrayLike,
    policy_mismatched: ArrayLike,
    reference_mismatched: ArrayLike,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far responses are from being a gain, or a loss, as people see them (KTO; of the set).

        L = λ_D σ(-β (d - K))   for a desirable response,     d = log π(y) - log π_ref(y)
        L = λ_U σ(-β (K - d))   for an undesirable one,       K = max(0, mean of d')

    K is the point where gains begin. It stands for the divergence of policy and reference, and is
    estimated from d', the log-ratios of responses to other prompts of the batch, without gradient.
    What is far above or below it is left alone, as σ saturates.

    Args:
      policy_log_prob: log π(y) `[...]` floating point.
      reference_log_prob: log π_ref(y) `[...]`, without gradient.
      labels: booleans, or the numbers 0 and 1, `[...]`: which responses are desirable.
      policy_mismatched: log π(y') `[...]`, where y' is the response to another prompt, as that of
        the example before.
      reference_mismatched: log π_ref(y') `[...]`.
      beta: β above 0, how soon a person is content. Default 0.1.
      desirable_weight: λ_D at least 0. Default 1. The authors keep λ_D times the number of
        desirable examples between 1 and 4/3 of λ_U times that of the others.
      undesirable_weight: λ_U at least 0. Default 1.
      where: boolean, broadcastable to `[...]`: the examples that count, with their mismatched
        pairs. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread: K is then
        the mean of all. Not needed under jit with shardings.

    Returns:
      `[...]` losses between 0 and the weights in the type of `policy_log_prob`, 0 for examples that
      do not count. Half a weight where the policy is the reference. A response that is impossible
      under the reference alone is beyond all bounds, and has no gradient; among the mismatched it
      makes K as large as that, and leaves nothing to be learned of the batch.

    Raises:
      ValueError: shapes that do not match, labels that are neither 0 nor 1, or a number out of its
        range.
      TypeError: log-probabilities that are not floating point.

    Use it where people marked single responses, and where of one kind there are few. A batch of one
    example has no mismatched pair.

    Cost: elementwise; one pass more of policy and reference, without gradient, for the mismatched
    responses.

    Example:
      >>> policy, reference = jnp.array([-3.0, -3.0]), jnp.array([-4.0, -4.0])
      >>> loss = kto_loss(policy, reference, jnp.array([1, 0]), reference, reference, beta=1.0)
      >>> print(loss.round(2))
      [0.27 0.73]

    Reference: Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela, "KTO: Model Alignment as Prospect
    Theoretic Optimization", 2024, arXiv:2402.01306.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    check_interval(
        0, jnp.inf, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    check_shape(jnp.shape(policy_log_prob), policy_mismatched=policy_mismatched)
    desirable, undesirable = split_by_label(policy_log_prob, where, labels=labels)
    counted = desirable | undesirable
    d = log_ratio(policy_log_prob=policy_log_prob, reference_log_prob=reference_log_prob)
    d = jnp.where(counted, d, 0.0)
    mismatched = jax.lax.stop_gradient(
        log_ratio(policy_mismatched=policy_mismatched, reference_mismatched=reference_mismatched)
    )
    total, count = sum_over_shards(
        (jnp.sum(mismatched, where=counted), jnp.sum(counted, dtype=d.dtype)), axis_name
    )
    gain = beta * (d - jnp.maximum(total / jnp.maximum(count, 1.0), 0.0))
    losses = jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), 0.0)
    losses += jnp.where(undesirable, undesirable_weight * jax.nn.sigmoid(gain), 0.0)
    return losses.astype(jnp.result_type(policy_log_prob))


def nca_loss(
    policy_log_probs: ArrayLike,
    reference_log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    beta: float = 0.01,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Whether a response was drawn for its reward or by the reference, for several to a prompt.

        L = -Σ_i w_i log σ(r_i) - (1/n) Σ_i log σ(-r_i),   r_i = β (log π(y_i) - log π_ref(y_i))

    with w the share of response i in what is wanted: of a chosen and a rejected one 1 and 0, or
    softmax(rewards / α) of rewards that are given (noise contrastive alignment). Each r_i has its
    own best value, log(n w_i), where DPO only compares: so what is chosen becomes likelier, and not
    the rejected rarer alone.

    Args:
      policy_log_probs: log π(y) `[..., responses]` floating point, those to one prompt at `axis`.
      reference_log_probs: log π_ref(y) `[..., responses]`, without gradient.
      labels: w: which response is chosen, integer ids `[...]`, or a distribution
        `[..., responses]`. An id outside of the range gives NaN.
      beta: β above 0. Default 0.01, the authors'.
      axis: the axis of the responses.
      where: boolean, broadcastable to `[..., responses]`: those that there are. Default: all.

    Returns:
      `[...]` losses above 0 in the type of `policy_log_probs`; 2 log 2 where the policy is the
      reference, and 0 for a prompt without responses. A response that is impossible under the
      reference alone costs about β 1e9 / n if it is not chosen.

    Raises:
      ValueError: shapes that do not match, or a `beta` that is not positive.
      TypeError: log-probabilities that are not floating point.

    Use it where `f_dpo_loss` makes chosen responses rare, or rewards of several responses are
    known. A pair is `jnp.stack([chosen, rejected], axis=-1)` with 0 as label.

    Cost: elementwise; all responses to a prompt through the policy, and, without gradient, through
    the reference.

    Example:
      >>> pair, reference = jnp.array([-3.0, -5.0]), jnp.array([-4.0, -4.0])
      >>> print(nca_loss(pair, reference, 0, beta=1.0).round(4))
      1.1266

    Reference: Chen, He, Yuan, Cui, Su, Zhu, "Noise Contrastive Alignment of Language Models with
    Explicit Rewards", 2024, arXiv:2402.05369.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    r = beta * log_ratio(policy_log_probs=policy_log_probs, reference_log_probs=reference_log_probs)
    check_broadcastable(r.shape, where=where)
    wanted = label_distribution(labels, r, axis=axis, where=where)
    exists = jnp.broadcast_to(True if where is None else where, r.shape)
    r = jnp.where(exists, r, 0.0)
    losses = jnp.sum(wanted * jax.nn.softplus(-r), axis=axis)
    losses += masked_mean(jax.nn.softplus(r), axis=axis, where=exists)
    return losses.astype(jnp.result_type(policy_log_probs))
