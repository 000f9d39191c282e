"""How well scores order positives before negatives: areas under the ROC curve, and parts of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def roc_auc(scores: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""Area under the ROC curve, exactly: how often a positive scores above a negative.

        AUC = mean over pairs of ( 1[s⁺ > s⁻] + 1/2 1[s⁺ = s⁻] )

    the Mann-Whitney statistic, over all entries as one set, by ranks.

    Args:
      scores: `[...]` floating point, higher for positives.
      labels: `[...]` of the same shape, 1 or True for positives, 0 for negatives.
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32; NaN without any positive, without any negative, or
      with a score that is NaN.

    Raises:
      ValueError: shapes that do not match, or labels other than 0 and 1.
      TypeError: scores that are not floating point.

    Use it for one set; under `jax.vmap` for one of each query, and `macro_auc` for many labels.
    `partial_auc` looks at low false positive rates alone.

    Cost: one sort and binary searches, O(n log n) time and O(n) memory in place of all pairs.

    Example:
      >>> print(roc_auc(jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([1, 1, 0, 0])))
      0.875

    Reference: Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar, "Optimizing What Matters:
    AUC-Driven Learning for Robust Neural Retrieval", 2025, arXiv:2510.00137.
    """
    positive, negative = split_by_label(scores, where, labels=labels)
    return _area(jnp.ravel(scores), positive.ravel(), negative.ravel())


def area_over_curve(positive_scores: ArrayLike, negative_scores: ArrayLike) -> Array:
    r"""Area over the ROC curve: how often a negative scores above a positive.

        AoC = 1 - AUC = mean over pairs of ( 1[s⁺ < s⁻] + 1/2 1[s⁺ = s⁻] )

    Args:
      positive_scores: `[...]` floating point, the scores of positives.
      negative_scores: `[...]` floating point, of any other shape: those of negatives.

    Returns:
      A scalar in [0, 1] in at least float32; NaN where either is empty or has a NaN.

    Raises:
      TypeError: scores that are not floating point.

    Use it where positives and negatives come apart; `jaxref.losses.mann_whitney_loss` over log 2 is
    never below it. `roc_auc` takes scores with labels.

    Cost: one sort and binary searches, O(n log n) time and O(n) memory in place of all pairs.

    Example:
      >>> print(area_over_curve(jnp.array([0.9, 0.4]), jnp.array([0.4, 0.1])))
      0.125

    Reference: Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar, "Optimizing What Matters:
    AUC-Driven Learning for Robust Neural Retrieval", 2025, arXiv:2510.00137.
    """
    check_floating(positive_scores=positive_scores, negative_scores=negative_scores)
    scores = jnp.concatenate([jnp.ravel(negative_scores), jnp.ravel(positive_scores)])
    positive = jnp.arange(scores.size) >= jnp.size(negative_scores)
    return 1 - _area(scores, positive, ~positive)


def partial_auc(
    scores: ArrayLike, labels: ArrayLike, *, max_fpr: float, where: ArrayLike | None = None
) -> Array:
    r"""Area under the ROC curve up to a false positive rate, on the scale of the whole area.

    With A the area under the piecewise linear curve from false positive rate 0 to m = max_fpr,

        1/2 (1 + (A - m²/2) / (m - m²/2))

    (McClish's standardisation): 1/2 for scores by chance, and 1 for a perfect order.

    Args:
      scores: `[...]` floating point, higher for positives, as one set.
      labels: `[...]` of the same shape, 1 or True for positives, 0 for negatives.
      max_fpr: m in (0, 1]; 1 gives `roc_auc`.
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.

    Returns:
      A scalar in at least float32, below 1/2 where the order is worse than chance; NaN without any
      positive, without any negative, or with a score that is NaN.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, or `max_fpr` out of range.
      TypeError: scores that are not floating point.

    Use it where false alarms are dear; `two_way_partial_auc` demands a true positive rate, too.

    Cost: three sorts and binary searches, O(n log n).

    Example:
      >>> print(partial_auc(jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([1, 1, 0, 0]), max_fpr=0.5))
      0.833

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619.
    """
    check_interval(0, 1, closed="right", max_fpr=max_fpr)
    positive, negative = (mask.ravel() for mask in split_by_label(scores, where, labels=labels))
    s = _wide(jnp.ravel(scores))
    thresholds = -jnp.sort(jnp.where(positive | negative, -s, jnp.inf))  # those of absent ones last
    tpr, fpr = (
        jnp.concatenate([jnp.zeros(1, s.dtype), _share_from(thresholds, s, mask)])
        for mask in (positive, negative)
    )
    left, right = jnp.minimum(fpr[:-1], max_fpr), jnp.minimum(fpr[1:], max_fpr)
    width = fpr[1:] - fpr[:-1]
    slope = (tpr[1:] - tpr[:-1]) / jnp.where(width > 0, width, 1)
    area = jnp.sum((right - left) * (tpr[:-1] + slope * (right - left) / 2))
    chance = max_fpr**2 / 2
    return _defined(0.5 * (1 + (area - chance) / (max_fpr - chance)), s, positive, negative)


def two_way_partial_auc(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    max_fpr: float = 0.05,
    min_tpr: float = 0.8,
    where: ArrayLike | None = None,
) -> Array:
    r"""Area under the ROC curve of the hardest positives and the hardest negatives alone.

    `roc_auc` of the ⌊n⁺ (1 - min_tpr)⌉ positives with the lowest scores and the ⌊n⁻ max_fpr⌉
    negatives with the highest, at least one of each: the top left corner of the curve.

    Args:
      scores: `[...]` floating point, higher for positives, as one set.
      labels: `[...]` of the same shape, 1 or True for positives, 0 for negatives.
      max_fpr: in (0, 1]. Default 0.05; the paper's adversarial set has 0.3.
      min_tpr: in [0, 1). Default 0.8; the paper's adversarial set has 0.4.
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32; NaN without any positive, without any negative, or
      with a score that is NaN. Numbers that end in 1/2 round to even ones.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, or a rate out of range.
      TypeError: scores that are not floating point.

    Use it to select checkpoints of a detector that has to find most positives at few false alarms,
    as trained by `jaxref.losses.two_way_partial_auc_loss`; `partial_auc` bounds the latter alone.

    Cost: five sorts, O(n log n), of all n scores however few of them count.

    Example:
      >>> scores, labels = jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([1, 1, 0, 0])
      >>> print(two_way_partial_auc(scores, labels, max_fpr=0.5, min_tpr=0.5))
      0.5

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619.
    """
    check_interval(0, 1, closed="right", max_fpr=max_fpr)
    check_interval(0, 1, closed="left", min_tpr=min_tpr)
    positive, negative = (mask.ravel() for mask in split_by_label(scores, where, labels=labels))
    s = jnp.ravel(scores)
    hard_positive = _lowest(s, positive, 1 - min_tpr)
    area = _area(s, hard_positive, _lowest(-s, negative, max_fpr))
    return _defined(area, s, positive, negative)


def threshold_at_fpr(
    scores: ArrayLike, labels: ArrayLike, max_fpr: float, *, where: ArrayLike | None = None
) -> Array:
    r"""The lowest score to call positive without exceeding a false positive rate.

        min { t among the scores : share of negatives with score ≥ t is at most max_fpr }

    Args:
      scores: `[...]` floating point, higher for positives, as one set.
      labels: `[...]` of the same shape, 1 or True for positives, 0 for negatives.
      max_fpr: in [0, 1].
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.

    Returns:
      A scalar t in at least float32, for decisions `score >= t`; infinity where every score of the
      set lets too many negatives pass. NaN without any negative, or with a score that is NaN.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, or `max_fpr` out of range.
      TypeError: scores that are not floating point.

    Use it on validation data to set a detector up, and report the F1 score of its decisions on
    others; `partial_auc` needs no threshold.

    Cost: one sort and binary searches, O(n log n).

    Example:
      >>> scores, labels = jnp.array([0.9, 0.4, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> print(threshold_at_fpr(scores, labels, 0.5))
      0.3

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619.
    """
    check_interval(0, 1, max_fpr=max_fpr)
    positive, negative = (mask.ravel() for mask in split_by_label(scores, where, labels=labels))
    s = _wide(jnp.ravel(scores))
    # Both sides are quotients rounded once, so that 0.05 admits exactly 1 of 20.
    admitted = _share_from(s, s, negative) <= jnp.asarray(max_fpr, s.dtype)
    threshold = jnp.min(s, where=admitted & (positive | negative), initial=jnp.inf)
    return _defined(threshold, s, positive | negative, negative)


def macro_auc(
    scores: ArrayLike,
    targets: ArrayLike,
    *,
    ties: float = 0.5,
    where: ArrayLike | None = None,
) -> Array:
    r"""Mean over labels of the area under the ROC curve of each (multi-label classification).

        mean_k mean over pairs of label k of ( 1[f_pk > f_qk] + ties 1[f_pk = f_qk] )

    over the labels that have both positives p and negatives q.

    Args:
      scores: f `[n, K]` floating point, n examples and K labels.
      targets: `[n, K]`, 1 or True where the example has the label, else 0.
      ties: what a pair of equal scores counts, in [0, 1]. Default 1/2; the authors' code has 1.
      where: boolean, broadcastable to `scores`: the targets that are known. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32; NaN where no label has both, or with a score that is
      NaN. The authors' code divides by K in any case.

    Raises:
      ValueError: scores that are no matrix, shapes that do not match, targets other than 0 and 1,
        or `ties` out of range.
      TypeError: scores that are not floating point.

    Use it where labels count alike, however rare; `roc_auc` of the whole matrix compares scores of
    different labels.

    Cost: one sort for each label, O(K n log n).

    Example:
      >>> scores = jnp.array([[0.9, 0.1], [0.2, 0.1], [0.4, 0.1]])
      >>> print(macro_auc(scores, jnp.array([[1, 1], [0, 0], [0, 1]])))
      0.75

    Reference: Wu, Li, Yin, "Towards Understanding Generalization of Macro-AUC in Multi-label
    Learning", 2023, arXiv:2305.05248.
    """
    check_interval(0, 1, ties=ties)
    positive, negative = split_by_label(scores, where, targets=targets)
    check_label_matrix(scores=scores)
    areas = jax.vmap(_area, in_axes=(1, 1, 1, None))(jnp.asarray(scores), positive, negative, ties)
    has_both = positive.any(axis=0) & negative.any(axis=0)
    return jnp.where(has_both.any(), masked_mean(areas, where=has_both), jnp.nan)


def label_imbalance(targets: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    r"""The share of the rarer side of each label, positives or negatives.

        τ_k = min(n⁺_k, n⁻_k) / n_k

    Args:
      targets: `[n, K]`, 1 or True where the example has the label, else 0.
      where: boolean, broadcastable to `targets`: those that are known, of which n_k counts the ones
        of label k. Default: all.

    Returns:
      `[K]` float32 in [0, 1/2]; 0 for a label without positives or without negatives.

    Raises:
      ValueError: targets that are no matrix, or other than 0 and 1, or a `where` that does not
        broadcast.

    Use it to see which labels a surrogate of macro-AUC will find hard; `imbalance_factors` sums
    them up.

    Cost: one pass over the targets.

    Example:
      >>> print(label_imbalance(jnp.array([[1, 1], [0, 0], [0, 1], [0, 0]])))
      [0.25 0.5 ]

    Reference: Wu, Li, Yin, "Towards Understanding Generalization of Macro-AUC in Multi-label
    Learning", 2023, arXiv:2305.05248.
    """
    check_label_matrix(targets=targets)
    masks = split_by_label(jnp.zeros(jnp.shape(targets)), where, targets=targets)
    positives, negatives = (jnp.sum(mask, axis=0, dtype=jnp.float32) for mask in masks)
    return jnp.minimum(positives, negatives) / jnp.maximum(positives + negatives, 1)


class ImbalanceFactors(NamedTuple):
    """What the bounds on the generalization of surrogates of macro-AUC multiply 1/√n with.

    Attributes:
      mean: mean over labels of 1/τ_k.
      root_mean: √mean.
      max: the largest 1/τ_k.
      has_both: boolean `[K]`, the labels with positives and negatives; any other has 1/τ = ∞.

    Reference: Wu, Li, Yin, "Towards Understanding Generalization of Macro-AUC in Multi-label
    Learning", 2023, arXiv:2305.05248.
    """

    mean: Array
    root_mean: Array
    max: Array
    has_both: Array


def imbalance_factors(targets: ArrayLike, *, where: ArrayLike | None = None) -> ImbalanceFactors:
    r"""How much the imbalance of labels loosens what is known of learning for macro-AUC.

        mean_k 1/τ_k,   √(mean_k 1/τ_k),   max_k 1/τ_k,   τ from `label_imbalance`

    The bounds of the pairwise and of the reweighted univariate loss grow with about the root of the
    mean, that of the plain univariate loss with a higher power of 1/τ.

    Args:
      targets: `[n, K]`, 1 or True where the example has the label, else 0.
      where: boolean, broadcastable to `targets`: those that are known. Default: all.

    Returns:
      `ImbalanceFactors`, float32: 2, √2 and 2 for balanced labels, infinite where a label lacks
      positives or negatives.

    Raises:
      ValueError: targets that are no matrix, or other than 0 and 1, or a `where` that does not
        broadcast.

    Use it before choosing among `jaxref.losses.macro_auc_pairwise_loss` and its cheaper relatives;
    `label_imbalance` has the labels apart.

    Cost: one pass over the targets.

    Example:
      >>> factors = imbalance_factors(jnp.array([[1, 1], [0, 0], [0, 1], [0, 0]]))
      >>> print(factors.mean, factors.max)
      3.0 4.0

    Reference: Wu, Li, Yin, "Towards Understanding Generalization of Macro-AUC in Multi-label
    Learning", 2023, arXiv:2305.05248.
    """
    tau = label_imbalance(targets, where=where)
    inverse = 1 / tau
    mean = jnp.mean(inverse)
    return ImbalanceFactors(mean, jnp.sqrt(mean), jnp.max(inverse), tau > 0)


def top_group_profit(
    scores: ArrayLike, profits: ArrayLike, k: int, *, where: ArrayLike | None = None
) -> Array:
    r"""Mean profit of the members of a list that are ranked highest.

        (1/k) Σ profit of the k members with the highest scores

    Args:
      scores: `[..., m]` floating point, m members of each list.
      profits: `[..., m]`, in any currency.
      k: from 1 to m; a list of fewer members is all taken.
      where: boolean, broadcastable to `scores`: the members that exist. Default: all.

    Returns:
      `[...]` means in at least float32; 0 for a list without members. Of members with equal scores
      the first ones are taken.

    Raises:
      ValueError: shapes that do not match, or `k` not an integer from 1 to m.
      TypeError: scores that are not floating point.

    Use it to see what a ranking earns, as trained by `jaxref.losses.profit_aware_ranking_loss`;
    `roc_auc` of a label counts all mistakes alike.

    Cost: the k highest of each list, no full sort.

    Example:
      >>> print(top_group_profit(jnp.array([0.1, 0.9, 0.5]), jnp.array([100.0, 10.0, -4.0]), 2))
      3.0

    Reference: Li, Ma, "Learn to Rank Risky Investors: A Case Study of Predicting Retail Traders'
    Behaviour and Profitability", 2025, arXiv:2509.16616.
    """
    check_floating(scores=scores)
    shape = jnp.shape(scores)
    check_shape(shape, profits=profits)
    check_broadcastable(shape, where=where)
    if not shape or not isinstance(k, int) or not 1 <= k <= shape[-1]:
        raise ValueError(f"k must be an integer from 1 to the {shape[-1:]} members, got {k!r}")
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    _, top = jax.lax.top_k(jnp.where(exists, scores, -jnp.inf), k)
    taken = jnp.take_along_axis(jnp.asarray(profits), top, axis=-1)
    taken = taken.astype(compute_dtype(profits))
    return masked_mean(taken, axis=-1, where=jnp.take_along_axis(exists, top, axis=-1))


def check_label_matrix(**arrays: ArrayLike) -> None:
    """Raises ValueError unless every array is a matrix of examples and labels.

    >>> check_label_matrix(scores=jnp.zeros((3, 2)))
    """
    for name, array in arrays.items():
        if jnp.ndim(array) != 2:
            raise ValueError(f"{name} must have shape [n, K], got {jnp.shape(array)}")


def _wide(scores: Array) -> Array:
    return scores.astype(compute_dtype(scores))


def _defined(value: Array, scores: Array, positive: Array, negative: Array) -> Array:
    """NaN in place of what is not defined."""
    is_nan = jnp.any(jnp.isnan(scores) & (positive | negative))
    return jnp.where(positive.any() & negative.any() & ~is_nan, value, jnp.nan)


def _area(scores: Array, positive: Array, negative: Array, ties: float = 0.5) -> Array:
    """Mean over pairs of 1[s⁺ > s⁻] + ties 1[s⁺ = s⁻], for `[n]` scores and masks."""
    s = _wide(scores)
    ordered = jnp.sort(jnp.where(negative, s, jnp.inf))
    number = jnp.sum(negative)
    below, up_to = (
        jnp.minimum(jnp.searchsorted(ordered, s, side=side), number) for side in ("left", "right")
    )
    wins = (below + ties * (up_to - below)) / jnp.maximum(number, 1)
    return _defined(masked_mean(wins.astype(s.dtype), where=positive), s, positive, negative)


def _share_from(thresholds: Array, scores: Array, mask: Array) -> Array:
    """The share of the masked scores that are not below each threshold."""
    ordered = jnp.sort(jnp.where(mask, scores, jnp.inf))
    number = jnp.sum(mask)
    below = jnp.minimum(jnp.searchsorted(ordered, thresholds, side="left"), number)
    return (number - below).astype(scores.dtype) / jnp.maximum(number, 1)


def _lowest(scores: Array, mask: Array, share: float) -> Array:
    """The mask of the given share, rounded, of the masked scores, but of one at least."""
    s = _wide(scores)
    ranks = jnp.argsort(jnp.argsort(jnp.where(mask, s, jnp.inf)))
    count = jnp.maximum(jnp.round(jnp.sum(mask, dtype=s.dtype) * share), 1)
    return mask & (ranks < count)
