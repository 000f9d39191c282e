"""Scores of classifiers: log loss, and what is made of the counts of right and wrong decisions."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def log_loss(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    limit: float = 1e-12,
    where: ArrayLike | None = None,
) -> Array:
    r"""Mean negative log-likelihood of probabilities, of a binary event or of classes.

        mean_i -log p_i(y_i),   p kept from `limit` to 1

    Args:
      probabilities: floating point in [0, 1]: `[...]` of a binary event, or `[..., classes]` of
        classes. The shape of `labels` tells which. Values outside are moved to the interval.
      labels: `[...]`, for a binary event 0 or 1 (booleans too), for classes integer ids. An id that
        is no class gives NaN.
      limit: in [0, 1/2), the least probability to reckon with. Default 1e-12; in float32 that
        bounds the loss of an event's absence only where p rounds to 1.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A scalar in at least float32, in nats; 0 without any example.

    Raises:
      ValueError: shapes that do not match, or a `limit` out of its range.
      TypeError: probabilities that are not floating point.

    Use it to report; train on logits instead, whose cross-entropy needs no limit.

    Cost: one pass over the probabilities.

    Example:
      >>> print(log_loss(jnp.array([0.9, 0.2]), jnp.array([1, 0])).round(4))
      0.1643
      >>> print(log_loss(jnp.array([[0.7, 0.2, 0.1]]), jnp.array([0])).round(4))
      0.3567

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838;
    Shamanth, Mathias, Vijayalakshmi, "Detection of fake faces in videos", 2022, arXiv:2201.12051.
    """
    check_floating(probabilities=probabilities)
    check_interval(0, 0.5, closed="left", limit=limit)
    p, y = jnp.asarray(probabilities), jnp.asarray(labels)
    p = p.astype(compute_dtype(p))
    check_broadcastable(y.shape, where=where)
    if p.ndim == y.ndim + 1:
        q = label_distribution(y, p)
        loss = -jnp.sum(q * jnp.log(jnp.clip(p, limit, 1)), axis=-1)
    else:
        check_shape(p.shape, labels=y)
        p = jnp.clip(p, 0, 1)
        loss = -jnp.log(jnp.maximum(jnp.where(y.astype(p.dtype) > 0.5, p, 1 - p), limit))
    return masked_mean(loss, where=True if where is None else where)


def binary_counts(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int | tuple[int, ...] | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""How many positives were found, made up, and missed: the counts behind F1.

        (TP, FP, FN) = (Σ ŷ y, Σ ŷ (1 - y), Σ (1 - ŷ) y)

    Args:
      predictions: ŷ `[...]` 0 or 1, or booleans, such as `probabilities > 0.5`.
      targets: y `[...]` of the shape of `predictions`, 0 or 1, or booleans.
      axis: the axes to sum over; None, the default, for all and () for none: the counts of each
        decision, from which those of any group are sums.
      where: boolean, broadcastable to `predictions`: the decisions that count. Default: all.

    Returns:
      `[..., 3]` in float32, the axes that are left and the counts.

    Raises:
      ValueError: shapes that do not match, or an `axis` out of range.

    Use it with `f1_from_counts` and its like, and as the statistics of `simpsons_bias`.

    Cost: one pass over the decisions.

    Example:
      >>> print(binary_counts(jnp.array([1, 1, 0, 0]), jnp.array([1, 0, 1, 0])))
      [1. 1. 1.]

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """
    predicted, true = jnp.asarray(predictions) > 0, jnp.asarray(targets) > 0
    check_shape(predicted.shape, targets=true)
    check_broadcastable(predicted.shape, where=where)
    events = jnp.stack([predicted & true, predicted & ~true, ~predicted & true])
    if where is not None:
        events &= jnp.asarray(where)
    if axis is None:
        axis = tuple(range(predicted.ndim))
    axes = canonical_axes(axis, predicted.ndim) if axis != () else ()
    summed = tuple(a + 1 for a in axes)
    return jnp.moveaxis(jnp.sum(events, axis=summed, dtype=jnp.float32), 0, -1)


def precision_from_counts(counts: ArrayLike, *, empty: float = 0.0) -> Array:
    r"""Share of the predicted positives that are true.

        TP / (TP + FP)

    Args:
      counts: `[..., 3]`, TP, FP and FN, from `binary_counts`.
      empty: the value without any predicted positive. Default 0.

    Returns:
      `[...]` in at least float32.

    Raises:
      ValueError: counts of another shape.

    Use it beside `recall_from_counts`; one alone is easily made 1.

    Cost: O(1) for each three counts.

    Example:
      >>> print(precision_from_counts(jnp.array([3.0, 1.0, 2.0])))
      0.75

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """
    hits, false_positives, _ = _three(counts)
    return _share(hits, hits + false_positives, empty)


def recall_from_counts(counts: ArrayLike, *, empty: float = 0.0) -> Array:
    r"""Share of the positives that were found.

        TP / (TP + FN)

    Args:
      counts: `[..., 3]`, TP, FP and FN, from `binary_counts`.
      empty: the value without any positive. Default 0.

    Returns:
      `[...]` in at least float32.

    Raises:
      ValueError: counts of another shape.

    Use it beside `precision_from_counts`; one alone is easily made 1.

    Cost: O(1) for each three counts.

    Example:
      >>> print(recall_from_counts(jnp.array([3.0, 1.0, 2.0])).round(4))
      0.6

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """
    hits, _, misses = _three(counts)
    return _share(hits, hits + misses, empty)


def f1_from_counts(counts: ArrayLike, *, empty: float = 0.0) -> Array:
    r"""The F1 score, the harmonic mean of precision and recall.

        2 TP / (2 TP + FP + FN)

    Args:
      counts: `[..., 3]`, TP, FP and FN, from `binary_counts`.
      empty: the value with neither a positive nor a predicted one. Default 0.

    Returns:
      `[...]` in at least float32.

    Raises:
      ValueError: counts of another shape.

    Use it on counts of the whole data: the mean of the F1 scores of parts is another number
    (`simpsons_bias`). `f1_score` takes the decisions themselves.

    Cost: O(1) for each three counts.

    Example:
      >>> print(f1_from_counts(jnp.array([3.0, 1.0, 2.0])).round(4))
      0.6667

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """
    hits, false_positives, misses = _three(counts)
    return _share(2 * hits, 2 * hits + false_positives + misses, empty)


def f1_score(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    empty: float = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""The F1 score of binary decisions, over all of them as one set.

        2 TP / (2 TP + FP + FN)

    Args:
      predictions: `[...]` 0 or 1, or booleans, such as `probabilities > 0.5`.
      targets: `[...]` of the shape of `predictions`, 0 or 1, or booleans.
      empty: the value with neither a positive nor a predicted one. Default 0.
      where: boolean, broadcastable to `predictions`: the decisions that count. Default: all.

    Returns:
      A scalar in [0, 1] in float32.

    Raises:
      ValueError: shapes that do not match.

    Use it where positives are rare, and accuracy says little; for one score per class take
    `binary_counts` over the examples.

    Cost: one pass over the decisions.

    Example:
      >>> print(f1_score(jnp.array([1, 1, 0, 0]), jnp.array([1, 0, 1, 0])))
      0.5

    Reference: Shamanth, Mathias, Vijayalakshmi, "Detection of fake faces in videos", 2022,
    arXiv:2201.12051.
    """
    return f1_from_counts(binary_counts(predictions, targets, where=where), empty=empty)


def _three(counts: ArrayLike) -> Array:
    """Counts `[..., 3]` as `[3, ...]` in at least float32."""
    array = jnp.asarray(counts)
    if array.ndim == 0 or array.shape[-1] != 3:
        raise ValueError(f"counts must have shape [..., 3], got {array.shape}")
    return jnp.moveaxis(array.astype(compute_dtype(array)), -1, 0)


def _share(part: Array, whole: Array, empty: float) -> Array:
    return jnp.where(whole == 0, empty, part / jnp.where(whole == 0, 1.0, whole))
