"""Losses of retrieval with several relevant labels for a query, over labels that may be sharded."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_broadcastable, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.kernels.vocabulary_parallel import combine_over_vocabulary


def decoupled_softmax_loss(
    scores: ArrayLike,
    positive_mask: ArrayLike,
    *,
    label_weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Each relevant label against the irrelevant ones alone, not against the other relevant ones.

        L_q = 1/|P| Σ_{p ∈ P} w_p ( -s_p + log( exp s_p + Σ_{n ∉ P} exp s_n ) )

    with P the relevant labels of the query. A softmax over all labels has the other relevant ones
    in its denominator, too: it is least where each has probability 1/|P|, and pushes down one that
    is surer than that. Here every relevant label has a gradient of at most 0, and at its least the
    loss is 0.

    Args:
      scores: s `[..., labels]` floating point: similarities divided by the temperature, for which
        the paper has 0.05 with embeddings of length 1.
      positive_mask: of the same shape, True or 1 for relevant labels.
      label_weights: w at least 0, broadcastable to `scores`. Default 1; the number of relevant
        labels of each query, `[..., 1]`, gives the paper's sum over them, while its authors' code
        has the mean.
      where: boolean, broadcastable to `scores`: the labels that count for a query, such as
        `sampled_positives`. Default: all.
      axis_name: name or names of the mapped axes over whose shards the labels are spread, in
        `scores` and in what has their shape. Two numbers for each query are exchanged.

    Returns:
      `[...]` losses of at least 0 in the type of `scores`, the same on every shard; 0 for a query
      without relevant or without irrelevant labels.

    Raises:
      ValueError: shapes that do not match, a mask other than 0 and 1, or a negative weight.
      TypeError: scores that are not floating point.

    Use it to train a dual encoder on queries with many labels, on all labels or on sampled ones;
    `contrastive_retrieval_loss`, the mean over P of a softmax over all labels, is the same where
    every query has one. `soft_top_k_loss` aims at the first k ranks.

    Cost: that of a softmax over the labels; two numbers a query between shards.

    Example:
      >>> scores, relevant = jnp.array([[4.0, 1.0, 0.0]]), jnp.array([[1, 1, 0]])
      >>> print(decoupled_softmax_loss(scores, relevant).round(4))
      [0.1657]

    Reference: Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon, "Dual-Encoders for Extreme
    Multi-Label Classification", 2023, arXiv:2310.10636.
    """
    positive, negative = split_by_label(scores, where, positive_mask=positive_mask)
    check_broadcastable(positive.shape, label_weights=label_weights)
    s = jnp.asarray(scores).astype(compute_dtype(scores))
    log_total, has_negative = log_sum_of_negatives(s, negative, axis_name)
    counts = positive & has_negative[..., None]
    terms = jax.nn.softplus(jnp.where(counts, log_total[..., None] - s, 0.0))
    if label_weights is not None:
        check_interval(0, jnp.inf, label_weights=label_weights)
        terms *= jnp.asarray(label_weights).astype(s.dtype)
    loss = mean_over_labels(terms, counts, axis_name)
    return loss.astype(jnp.result_type(scores))


def sampled_positives(
    positive_mask: ArrayLike, number: int = 1, *, key: Array, where: ArrayLike | None = None
) -> Array:
    """Which labels stay where only some of each query's relevant ones count.

    Args:
      positive_mask: `[..., labels]`, True or 1 for relevant labels.
      number: of relevant labels to keep of each query, at least 1; of a query that has no more, all
        are kept. Default 1, the paper's.
      key: a random key; every choice of so many is as likely.
      where: boolean, broadcastable to `positive_mask`: the labels to choose from and to keep.
        Default: all.

    Returns:
      Boolean `[..., labels]`: the irrelevant labels, and the relevant ones that were drawn, for the
      `where` of `decoupled_softmax_loss` or `soft_top_k_loss`: those not drawn are neither
      relevant nor irrelevant.

    Raises:
      ValueError: a mask other than 0 and 1 or without an axis, or a `number` that is not an integer
        of at least 1.

    Use it where a query's labels are too many to be encoded in every step, and for
    `soft_top_k_loss` wherever they may be more than k, which cannot all be among the first k.

    Cost: a random number for each label and a selection of the `number` largest of each query.

    Example:
      >>> print(sampled_positives(jnp.array([[1, 0, 0], [1, 1, 1]]), key=jax.random.key(0)).sum(1))
      [3 1]

    Reference: Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon, "Dual-Encoders for Extreme
    Multi-Label Classification", 2023, arXiv:2310.10636.
    """
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"number must be an integer of at least 1, got {number!r}")
    shape = jnp.shape(positive_mask)
    if not shape:
        raise ValueError(f"positive_mask must have shape [..., labels], got {shape}")
    positive, negative = split_by_label(jnp.zeros(shape), where, positive_mask=positive_mask)
    lots = jnp.where(positive, jax.random.uniform(key, shape), -1.0)
    _, drawn = jax.lax.top_k(lots, min(number, shape[-1]))
    is_drawn = jnp.put_along_axis(jnp.zeros(shape, bool), drawn, True, axis=-1, inplace=False)
    return negative | (positive & is_drawn)


def log_sum_of_negatives(
    scores: Array, negative: Array, axis_name: AxisName | None = None
) -> tuple[Array, Array]:
    """log Σ exp of the negatives at the last axis, over all shards, and whether there are any; 0,
    with gradient 0, where there are none."""
    masked = jnp.where(negative, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(masked, axis=-1, initial=-jnp.inf))
    here = jnp.any(negative, axis=-1)
    shifted = jnp.where(negative, scores - jnp.where(here, top, 0.0)[..., None], -jnp.inf)
    total = jnp.sum(jnp.exp(shifted), axis=-1)
    log_sum = jnp.log(jnp.where(here, total, 1.0))
    number = jnp.sum(negative, axis=-1)
    top, log_sum, number = combine_over_vocabulary(top, log_sum, axis_name, number)
    exists = number > 0
    return jnp.where(exists, jnp.where(exists, top, 0.0) + log_sum, 0.0), exists


def mean_over_labels(terms: Array, counts: Array, axis_name: AxisName | None) -> Array:
    """Mean at the last axis, over all shards, of the terms that count; 0 where none does."""
    total = jnp.sum(terms, axis=-1, where=counts)
    number = jnp.sum(counts, axis=-1, dtype=terms.dtype)
    total, number = sum_over_shards((total, number), axis_name)
    return total / jnp.maximum(number, 1)
