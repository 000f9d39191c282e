"""Losses of recommendation: the item that a user chose against items drawn at random."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.losses.multilabel_retrieval import log_sum_of_negatives


def cosine_contrastive_loss(
    positive_scores: ArrayLike,
    negative_scores: ArrayLike,
    *,
    margin: float = 0.5,
    negative_weight: float | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""The cosine of what was chosen is to be 1, those of others at most a margin (CCL).

        L = max(0, 1 - y⁺) + w/|N| Σ_{n ∈ N} max(0, y_n - m),   m = margin, w = negative_weight

    Only the hard negatives, with a cosine above the margin, have a gradient, and so their number
    may be large: of hundreds or thousands that are drawn at random, few count.

    Args:
      positive_scores: y⁺ `[...]` floating point: cosines of users with items that they chose.
      negative_scores: y_n `[..., negatives]`: cosines of the same users with other items.
      margin: m in [-1, 1]. Default 0.5, as in public code; the paper tunes it, mostly within 0.4 to
        0.9.
      negative_weight: w at least 0, the weight of all negatives together. Default None: w = |N|, a
        plain sum. From 1 to some hundreds; public code has 10.
      where: boolean, broadcastable to `negative_scores`: the negatives that count. Default: all.

    Returns:
      `[...]` losses of at least 0 in the type of `positive_scores`; without negatives, those of the
      positives alone.

    Raises:
      ValueError: shapes that do not match, a `margin` outside of [-1, 1], or a negative weight.
      TypeError: scores that are not floating point.

    Use it to train `jaxref.nn.SimpleX` or plain matrix factorization with many negatives;
    `bayesian_personalized_ranking_loss` and `sampled_softmax_loss` compare scores of any size.

    Cost: one pass over the scores, |N| + 1 for each choice; those are what takes time.

    Example:
      >>> positive, negative = jnp.array([0.75]), jnp.array([[0.9, 0.7, -0.2]])
      >>> print(cosine_contrastive_loss(positive, negative).round(3))
      [0.85]

    Reference: Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong Baseline for
    Collaborative Filtering", 2021, arXiv:2109.12613.
    """
    check_interval(-1, 1, margin=margin)
    positive, negative, exists = _scores(positive_scores, negative_scores, where)
    excess = jax.nn.relu(negative - margin)
    if negative_weight is None:
        push = jnp.sum(excess, axis=-1, where=exists)
    else:
        check_interval(0, jnp.inf, negative_weight=negative_weight)
        push = negative_weight * masked_mean(excess, axis=-1, where=exists)
    return (jax.nn.relu(1 - positive) + push).astype(jnp.result_type(positive_scores))


def bayesian_personalized_ranking_loss(
    positive_scores: ArrayLike, negative_scores: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""What was chosen is to score above each of the others, by a logistic loss of pairs (BPR).

        L = 1/|N| Σ_{n ∈ N} -log sigmoid(y⁺ - y_n)

    Args:
      positive_scores: y⁺ `[...]` floating point, of users with items that they chose.
      negative_scores: y_n `[..., negatives]`, of the same users with other items; one in the method
        as it was first given.
      where: boolean, broadcastable to `negative_scores`: the negatives that count. Default: all.

    Returns:
      `[...]` losses above 0 in the type of `positive_scores`; 0 without negatives.

    Raises:
      ValueError: shapes that do not match.
      TypeError: scores that are not floating point.

    Use it as the common baseline of recommendation; `pairwise_hinge_loss` lets go of pairs that are
    far enough apart, and `cosine_contrastive_loss` of all easy negatives.

    Cost: one softplus for each pair, |N| for each choice.

    Example:
      >>> positive, negative = jnp.array([1.0]), jnp.array([[1.0, 0.0]])
      >>> print(bayesian_personalized_ranking_loss(positive, negative).round(4))
      [0.5032]

    Reference: a baseline of Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong
    Baseline for Collaborative Filtering", 2021, arXiv:2109.12613; it is of Rendle, Freudenthaler,
    Gantner, Schmidt-Thieme, "BPR: Bayesian Personalized Ranking from Implicit Feedback", 2009.
    """
    positive, negative, exists = _scores(positive_scores, negative_scores, where)
    loss = masked_mean(jax.nn.softplus(negative - positive[..., None]), axis=-1, where=exists)
    return loss.astype(jnp.result_type(positive_scores))


def pairwise_hinge_loss(
    positive_scores: ArrayLike,
    negative_scores: ArrayLike,
    *,
    margin: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""What was chosen is to score above each of the others by a margin.

        L = 1/|N| Σ_{n ∈ N} max(0, m - (y⁺ - y_n)),   m = margin

    Args:
      positive_scores: y⁺ `[...]` floating point, of users with items that they chose.
      negative_scores: y_n `[..., negatives]`, of the same users with other items.
      margin: m at least 0. Default 1, as in the authors' code.
      where: boolean, broadcastable to `negative_scores`: the negatives that count. Default: all.

    Returns:
      `[...]` losses of at least 0 in the type of `positive_scores`; 0 without negatives.

    Raises:
      ValueError: shapes that do not match, or a negative `margin`.
      TypeError: scores that are not floating point.

    Use it where scores are bounded, as negated distances are; for scores without bounds
    `bayesian_personalized_ranking_loss` needs no margin. `pairwise_surrogate` has other losses of a
    pair.

    Cost: one pass over the pairs, |N| for each choice.

    Example:
      >>> positive, negative = jnp.array([1.0]), jnp.array([[1.0, -0.5]])
      >>> print(pairwise_hinge_loss(positive, negative))
      [0.5]

    Reference: a baseline of Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong
    Baseline for Collaborative Filtering", 2021, arXiv:2109.12613.
    """
    check_interval(0, jnp.inf, margin=margin)
    positive, negative, exists = _scores(positive_scores, negative_scores, where)
    loss = masked_mean(jax.nn.relu(margin + negative - positive[..., None]), axis=-1, where=exists)
    return loss.astype(jnp.result_type(positive_scores))


def sampled_softmax_loss(
    positive_scores: ArrayLike, negative_scores: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""What was chosen is to be found among the others: a softmax over it and them.

        L = -y⁺ + log( exp y⁺ + Σ_{n ∈ N} exp y_n )

    Args:
      positive_scores: y⁺ `[...]` floating point, of users with items that they chose. Cosines are
        to be divided by a temperature before.
      negative_scores: y_n `[..., negatives]`, of the same users with other items. Where they are
        not drawn alike, subtracting the logarithms of their rates makes up for it.
      where: boolean, broadcastable to `negative_scores`: the negatives that count. Default: all.

    Returns:
      `[...]` losses of at least 0 in the type of `positive_scores`, in nats; 0 without negatives.

    Raises:
      ValueError: shapes that do not match.
      TypeError: scores that are not floating point.

    Use it with a few hundred negatives, of which the hard ones weigh most; with all other items it
    is softmax cross-entropy. `cosine_contrastive_loss` gives the easy ones no weight at all.

    Cost: that of a softmax over |N| + 1 scores for each choice, in place of all items.

    Example:
      >>> positive, negative = jnp.array([1.0]), jnp.array([[1.0, 0.0]])
      >>> print(sampled_softmax_loss(positive, negative).round(4))
      [0.862]

    Reference: a baseline of Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong
    Baseline for Collaborative Filtering", 2021, arXiv:2109.12613.
    """
    positive, negative, exists = _scores(positive_scores, negative_scores, where)
    log_total, has_negative = log_sum_of_negatives(negative, exists)
    loss = jax.nn.softplus(jnp.where(has_negative, log_total - positive, 0.0))
    return jnp.where(has_negative, loss, 0.0).astype(jnp.result_type(positive_scores))


def _scores(
    positive_scores: ArrayLike, negative_scores: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Scores in the type to compute in, those that do not count at 0, and which negatives do."""
    check_floating(positive_scores=positive_scores, negative_scores=negative_scores)
    shape = jnp.shape(negative_scores)
    check_shape((*jnp.shape(positive_scores), *shape[-1:]), negative_scores=negative_scores)
    check_broadcastable(shape, where=where)
    dtype = compute_dtype(positive_scores, negative_scores)
    positive, negative = (jnp.asarray(x).astype(dtype) for x in (positive_scores, negative_scores))
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    return positive, jnp.where(exists, negative, 0.0), exists
