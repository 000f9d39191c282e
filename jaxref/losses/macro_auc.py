"""Surrogates of macro-AUC: three losses of multi-label classification that treat labels alike."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.pairwise import check_surrogate, mean_over_pairs, pairwise_surrogate


def macro_auc_pairwise_loss(
    scores: ArrayLike,
    targets: ArrayLike,
    *,
    base: str = "logistic",
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Mean loss over the pairs of a positive and a negative of each label (a loss of the set).

        L_k = 1/(n⁺ n⁻) Σ_p Σ_q ℓ(f_pk - f_qk),   p positive and q negative for label k

    With the logistic ℓ, its mean over labels / log 2 is never below 1 - macro-AUC. It depends on
    the differences of scores alone: a bias for each label cancels.

    Args:
      scores: f `[n, K]` floating point, n examples and K labels.
      targets: `[n, K]`, 1 or True where the example has the label, else 0.
      base: ℓ, "logistic" (default), "hinge", "exponential" or another kind of `pairwise_surrogate`.
      chunk_size: how many positives of each label to handle at a time, for less memory than n² K;
        chunks beyond the positives of the most frequent label are skipped. Default: all.
      where: boolean, broadcastable to `scores`: the targets that are known. Default: all.
      axis_name: name or names of the mapped axes over whose shards the examples are spread. Not
        needed under jit with shardings.

    Returns:
      `[K]` losses in the type of `scores`; 0 for a label without positives or without negatives.

    Raises:
      ValueError: scores that are no matrix, shapes that do not match, targets other than 0 and 1,
        an unknown `base` or a bad `chunk_size`.
      TypeError: scores that are not floating point.

    Use it with imbalanced labels where all pairs are affordable; `macro_auc_reweighted_loss` comes
    with as good a guarantee in O(n).

    Cost: O(n² K) time and memory, as masks choose the pairs; with `chunk_size` c, O(c n K) memory,
    and time for the positives of the most frequent label alone.

    Example:
      >>> scores, targets = jnp.array([[2.0], [0.0], [1.0]]), jnp.array([[1], [0], [0]])
      >>> print(macro_auc_pairwise_loss(scores, targets).round(4))
      [0.2201]

    Reference: Wu, Li, Yin, "Towards Understanding Generalization of Macro-AUC in Multi-label
    Learning", 2023, arXiv:2305.05248.
    """
    s, positive, negative, ell = _checked(scores, targets, base, where)
    losses = mean_over_pairs(
        ell, s, positive, s, negative, axis_name=axis_name, chunk_size=chunk_size
    )
    return losses.astype(jnp.result_type(scores))


def macro_auc_univariate_loss(
    scores: ArrayLike,
    targets: ArrayLike,
    *,
    base: str = "logistic",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Mean loss over the examples of each label, as for classification (a loss of the set).

        L_k = 1/n ( Σ_p ℓ(f_pk) + Σ_q ℓ(-f_qk) ),   p positive and q negative for label k

    Binary cross-entropy where ℓ is logistic.

    Args:
      scores: f `[n, K]` floating point, n examples and K labels.
      targets: `[n, K]`, 1 or True where the example has the label, else 0.
      base: ℓ, "logistic" (default), "hinge", "exponential" or another kind of `pairwise_surrogate`.
      where: boolean, broadcastable to `scores`: the targets that are known; n counts those of a
        label. Default: all.
      axis_name: name or names of the mapped axes over whose shards the examples are spread. Not
        needed under jit with shardings.

    Returns:
      `[K]` losses in the type of `scores`, also for labels without positives or without negatives;
      0 for one of which nothing is known.

    Raises:
      ValueError: scores that are no matrix, shapes that do not match, targets other than 0 and 1,
        or an unknown `base`.
      TypeError: scores that are not floating point.

    Use it as the baseline, or for classification itself: for macro-AUC with rare labels its
    guarantee is the worst of the three, where `macro_auc_reweighted_loss` has a better one.

    Cost: one pass over the n K scores, as `macro_auc_reweighted_loss`.

    Example:
      >>> scores, targets = jnp.array([[2.0], [0.0], [1.0]]), jnp.array([[1], [0], [0]])
      >>> print(macro_auc_univariate_loss(scores, targets).round(4))
      [0.7111]

    Reference: Wu, Li, Yin, "Towards Understanding Generalization of Macro-AUC in Multi-label
    Learning", 2023, arXiv:2305.05248.
    """
    s, positive, negative, ell = _checked(scores, targets, base, where)
    sums = _class_sums(s, positive, negative, ell, axis_name)
    losses = (sums[0] + sums[1]) / jnp.maximum(sums[2] + sums[3], 1)
    return losses.astype(jnp.result_type(scores))


def macro_auc_reweighted_loss(
    scores: ArrayLike,
    targets: ArrayLike,
    *,
    base: str = "logistic",
    class_counts: tuple[ArrayLike, ArrayLike] | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Mean loss of each label's positives plus that of its negatives (a loss of the set).

        L_k = 1/n⁺ Σ_p ℓ(f_pk) + 1/n⁻ Σ_q ℓ(-f_qk),   p positive and q negative for label k

    As ℓ is convex, the pairwise loss at f is at most half of this at 2f; for n⁺ = n⁻ this is twice
    the univariate loss.

    Args:
      scores: f `[n, K]` floating point, n examples and K labels.
      targets: `[n, K]`, 1 or True where the example has the label, else 0.
      base: ℓ, "logistic" (default), "hinge", "exponential" or another kind of `pairwise_surrogate`.
      class_counts: numbers of positives and of negatives in the data set, each `[K]`. An example of
        a batch of n then weighs (n⁺ + n⁻) / n as much as in the formula, so that the mean over
        batches is the loss of the data set. Default: those of the batch itself.
      where: boolean, broadcastable to `scores`: the targets that are known; n counts those of a
        label. Default: all.
      axis_name: name or names of the mapped axes over whose shards the examples are spread. Not
        needed under jit with shardings.

    Returns:
      `[K]` losses in the type of `scores`; 0 for a label without positives or without negatives, in
      the data set where `class_counts` are given, else in the batch.

    Raises:
      ValueError: scores that are no matrix, shapes that do not match, targets other than 0 and 1,
        negative counts, or an unknown `base`.
      TypeError: scores that are not floating point.

    Use it for macro-AUC with imbalanced labels and many examples; `macro_auc_pairwise_loss` is
    closer to the metric, and leaves the bias of each label free.

    Cost: one pass over the n K scores; between shards four numbers for each label.

    Example:
      >>> scores, targets = jnp.array([[2.0], [0.0], [1.0]]), jnp.array([[1], [0], [0]])
      >>> print(macro_auc_reweighted_loss(scores, targets).round(4))
      [1.1301]

    Reference: Wu, Li, Yin, "Towards Understanding Generalization of Macro-AUC in Multi-label
    Learning", 2023, arXiv:2305.05248.
    """
    s, positive, negative, ell = _checked(scores, targets, base, where)
    *sums, positives, negatives = _class_sums(s, positive, negative, ell, axis_name)
    scale: Array | float = 1.0
    if class_counts is not None:
        in_batch = jnp.maximum(positives + negatives, 1)
        named: dict[str, Any] = {f"class_counts[{i}]": n for i, n in enumerate(class_counts)}
        check_shape(s.shape[1:], **named)
        check_interval(0, jnp.inf, **named)
        positives, negatives = (jnp.asarray(counts).astype(s.dtype) for counts in class_counts)
        scale = (positives + negatives) / in_batch
    means = [total / jnp.maximum(n, 1) for total, n in zip(sums, (positives, negatives))]
    has_both = (positives > 0) & (negatives > 0)
    return jnp.where(has_both, scale * sum(means), 0.0).astype(jnp.result_type(scores))


def _checked(
    scores: ArrayLike, targets: ArrayLike, base: str, where: ArrayLike | None
) -> tuple[Array, Array, Array, Callable[[Array], Array]]:
    """The scores in the type to compute in, masks of positives and negatives, and ℓ."""
    check_surrogate(base, "base")
    positive, negative = split_by_label(scores, where, targets=targets)
    if positive.ndim != 2:
        raise ValueError(f"scores must have shape [n, K], got {positive.shape}")
    s = jnp.asarray(scores).astype(compute_dtype(scores))
    return s, positive, negative, lambda margin: pairwise_surrogate(base, margin)


def _class_sums(
    s: Array,
    positive: Array,
    negative: Array,
    ell: Callable[[Array], Array],
    axis_name: AxisName | None,
) -> list[Array]:
    """Σ_p ℓ(f_p) and Σ_q ℓ(-f_q) of each label, and the numbers of p and of q."""
    known = jnp.where(positive | negative, s, 0.0)
    sums = [
        jnp.sum(ell(known), axis=0, where=positive),
        jnp.sum(ell(-known), axis=0, where=negative),
        jnp.sum(positive, axis=0, dtype=s.dtype),
        jnp.sum(negative, axis=0, dtype=s.dtype),
    ]
    return [sum_over_shards(total, axis_name) for total in sums]
