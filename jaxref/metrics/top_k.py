"""What the top of a ranking holds: down to a rank in each list, or to a threshold over all."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def ndcg_at_k(
    scores: ArrayLike, relevance: ArrayLike, k: int, *, where: ArrayLike | None = None
) -> Array:
    r"""Normalized discounted cumulative gain of the first k ranks of each list.

        NDCG@k = Σ_{r ≤ k} g_r / log₂(r + 1)  /  the same in the best order

    with g_r the relevance of what is at rank r by its score.

    Args:
      scores: `[..., items]` floating point.
      relevance: g `[..., items]` at least 0: labels 0 and 1, or grades; `2.0**grade - 1` makes high
        grades count for more.
      k: an integer of at least 1; lists that have fewer items are all taken.
      where: boolean, broadcastable to `scores`: the items that exist. Default: all.

    Returns:
      `[...]` in [0, 1], in at least float32; 0 for a list without relevant items. Of items with
      equal scores the first ones come first.

    Raises:
      ValueError: shapes that do not match, a negative relevance, or a `k` below 1.
      TypeError: scores that are not floating point.

    Use it where the order among the first ranks matters; `recall_at_k` counts what is there.

    Cost: the k highest of each list, by score and by relevance; no full sort.

    Example:
      >>> print(ndcg_at_k(jnp.array([0.9, 0.5, 0.1]), jnp.array([0, 1, 1]), 2).round(4))
      0.3869

    Reference: a metric of Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong
    Baseline for Collaborative Filtering", 2021, arXiv:2109.12613; it is of Järvelin, Kekäläinen,
    "Cumulated gain-based evaluation of IR techniques", 2002.
    """
    check_interval(0, jnp.inf, relevance=relevance)
    gains, taken, k = _taken(scores, relevance, k, where, "relevance")
    discounts = 1 / jnp.log2(jnp.arange(2, k + 2, dtype=gains.dtype))
    best, _ = jax.lax.top_k(gains, k)
    found, most = (jnp.sum(x * discounts, axis=-1) for x in (taken, best))
    return jnp.where(most > 0, found / jnp.where(most > 0, most, 1), 0.0)


def recall_at_k(
    scores: ArrayLike, labels: ArrayLike, k: int, *, where: ArrayLike | None = None
) -> Array:
    r"""Which share of a list's relevant items is among its first k.

    Args:
      scores: `[..., items]` floating point.
      labels: `[..., items]`, 1 or True for relevant items, 0 for others.
      k: an integer of at least 1; lists that have fewer items are all taken.
      where: boolean, broadcastable to `scores`: the items that exist. Default: all.

    Returns:
      `[...]` in [0, 1], in at least float32; 0 for a list without relevant items. Of items with
      equal scores the first ones come first.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, or a `k` below 1.
      TypeError: scores that are not floating point.

    Use it for what retrieval hands on to ranking; `ndcg_at_k` sees the order, and
    `top_group_profit` of the labels is the precision at k.

    Cost: the k highest scores of each list, no full sort.

    Example:
      >>> print(recall_at_k(jnp.array([0.9, 0.5, 0.1]), jnp.array([0, 1, 1]), 2))
      0.5

    Reference: a metric of Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong
    Baseline for Collaborative Filtering", 2021, arXiv:2109.12613.
    """
    positive, _ = split_by_label(scores, where, labels=labels)
    relevant, taken, _ = _taken(scores, positive, k, where, "labels")
    found, number = (jnp.sum(x, axis=-1) for x in (taken, relevant))
    return found / jnp.maximum(number, 1)


def threshold_at_recall(
    scores: ArrayLike,
    labels: ArrayLike,
    recall: float = 0.95,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""The highest score to call positive without missing more than a share of the positives.

        max { t among the scores : share of positives with score ≥ t is at least `recall` }

    Args:
      scores: `[...]` floating point, higher for positives, as one set.
      labels: `[...]` of the same shape, 1 or True for positives, 0 for negatives.
      recall: in (0, 1]. Default 0.95.
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.

    Returns:
      A scalar t in at least float32, for decisions `scores >= t`; NaN without any positive, or with
      a score that is NaN.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, or `recall` out of range.
      TypeError: scores that are not floating point.

    Use it on validation data, pooled over queries, to set up a filter of what was retrieved;
    `threshold_at_fpr` bounds the false alarms in place of the misses.

    Cost: two sorts and binary searches, O(n log n).

    Example:
      >>> scores, labels = jnp.array([0.9, 0.4, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> print(threshold_at_recall(scores, labels, 0.8))
      0.3

    Reference: Rossi, Lin, Liu, Yang, Lee, Magnani, Liao, "Relevance Filtering for Embedding-based
    Retrieval", 2024, arXiv:2408.04887.
    """
    check_interval(0, 1, closed="right", recall=recall)
    threshold, _ = _at_recall(scores, labels, recall, where)
    return threshold


def precision_at_recall(
    scores: ArrayLike,
    labels: ArrayLike,
    recall: float = 0.95,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""How much of what passes is relevant, where a share of the relevant has to pass (P@R95).

        |positives with score ≥ t| / |all with score ≥ t|,   t = `threshold_at_recall`

    Args:
      scores: `[...]` floating point, higher for positives, as one set.
      labels: `[...]` of the same shape, 1 or True for positives, 0 for negatives.
      recall: in (0, 1]. Default 0.95.
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32; NaN without any positive, or with a score that is NaN.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, or `recall` out of range.
      TypeError: scores that are not floating point.

    Use it to compare scores by what one threshold over all queries makes of them;
    `precision_recall_auc` looks at all thresholds.

    Cost: two sorts and binary searches, O(n log n).

    Example:
      >>> scores, labels = jnp.array([0.9, 0.4, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> print(precision_at_recall(scores, labels).round(4))
      0.6667

    Reference: Rossi, Lin, Liu, Yang, Lee, Magnani, Liao, "Relevance Filtering for Embedding-based
    Retrieval", 2024, arXiv:2408.04887.
    """
    check_interval(0, 1, closed="right", recall=recall)
    _, precision = _at_recall(scores, labels, recall, where)
    return precision


def precision_recall_auc(
    scores: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Area under the curve of precision over recall, in steps (average precision).

        AP = mean over positives p of |positives with score ≥ s_p| / |all with score ≥ s_p|

    Args:
      scores: `[...]` floating point, higher for positives, as one set.
      labels: `[...]` of the same shape, 1 or True for positives, 0 for negatives.
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32; the share of positives for scores that say nothing.
      NaN without any positive, or with a score that is NaN.

    Raises:
      ValueError: shapes that do not match, or labels other than 0 and 1.
      TypeError: scores that are not floating point.

    Use it in place of `roc_auc` where positives are few. Its steps do not interpolate between
    thresholds, which would promise too much.

    Cost: two sorts and binary searches, O(n log n).

    Example:
      >>> scores, labels = jnp.array([0.9, 0.4, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> print(precision_recall_auc(scores, labels).round(4))
      0.8333

    Reference: Rossi, Lin, Liu, Yang, Lee, Magnani, Liao, "Relevance Filtering for Embedding-based
    Retrieval", 2024, arXiv:2408.04887.
    """
    s, positive, hits, passed = _passing(scores, labels, where)
    precision = (hits / jnp.maximum(passed, 1)).astype(s.dtype)
    return _defined(masked_mean(precision, where=positive), s, positive)


def _taken(
    scores: ArrayLike, gains: ArrayLike, k: int, where: ArrayLike | None, name: str
) -> tuple[Array, Array, int]:
    """All gains, 0 where there is no item; those of the first ranks; and how many these are."""
    check_floating(scores=scores)
    shape = jnp.shape(scores)
    check_shape(shape, **{name: gains})
    check_broadcastable(shape, where=where)
    if not shape:
        raise ValueError(f"scores must have shape [..., items], got {shape}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    k = min(k, shape[-1])
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    order = jnp.where(jnp.asarray(scores) == 0, 0.0, scores)  # top_k has -0.0 below 0.0
    _, first = jax.lax.top_k(jnp.where(exists, order, -jnp.inf), k)
    g = jnp.where(exists, gains, 0).astype(compute_dtype(scores))
    return g, jnp.take_along_axis(g, first, axis=-1), k


def _passing(
    scores: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """Of the entries as one set: scores, which are positive, and how many positives and how many of
    all have at least the score of each."""
    positive, negative = (mask.ravel() for mask in split_by_label(scores, where, labels=labels))
    s = jnp.where(positive | negative, jnp.ravel(scores).astype(compute_dtype(scores)), 0.0)

    def number_from(mask: Array) -> Array:
        ordered = jnp.sort(jnp.where(mask, s, jnp.inf))
        below = jnp.searchsorted(ordered, s, side="left")
        return jnp.maximum(jnp.sum(mask) - below, 0)

    return s, positive, number_from(positive), number_from(positive | negative)


def _at_recall(
    scores: ArrayLike, labels: ArrayLike, recall: float, where: ArrayLike | None
) -> tuple[Array, Array]:
    """The highest threshold that lets the share of positives pass, and the precision there."""
    s, positive, hits, passed = _passing(scores, labels, where)
    # Both sides are quotients rounded once, so that 19 of 20 are 0.95.
    shares = hits.astype(s.dtype) / jnp.maximum(jnp.sum(positive), 1)
    # the highest is the score of a positive: below it, down to the next one, none is added
    enough = positive & (shares >= jnp.asarray(recall, s.dtype))
    threshold = jnp.max(s, where=enough, initial=-jnp.inf)
    there = enough & (s == threshold)
    precision = jnp.max(hits / jnp.maximum(passed, 1), where=there, initial=0)
    return _defined(threshold, s, positive), _defined(precision.astype(s.dtype), s, positive)


def _defined(value: Array, scores: Array, positive: Array) -> Array:
    """NaN in place of what is not defined."""
    return jnp.where(positive.any() & ~jnp.any(jnp.isnan(scores)), value, jnp.nan)
