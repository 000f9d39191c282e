"""Losses on the pairs and triplets of a batch that make distances mean the same everywhere.

A batch is one set: every example is compared with all others, of all shards where the batch is
spread over mapped axes (`axis_name`). `where` (boolean) says which examples count.
"""

from functools import partial

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
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.core.vectors import safe_sqrt, squared_distances, unit_vectors

_TRIPLETS_AT_ONCE = 2**21


def threshold_consistent_margin_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    margin_positive: float = 0.9,
    margin_negative: float = 0.5,
    weight_positive: float = 1.0,
    weight_negative: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far the hard pairs of a batch are from two cosines that all classes share (TCM; a loss
    of the set).

        L = w⁺ mean over pairs of one class with s ≤ m⁺ of (m⁺ - s)
          + w⁻ mean over pairs of two classes with s ≥ m⁻ of (s - m⁻)

    with s the cosine of a pair. Pairs on the right side of their margin have no gradient, and do
    not count in the mean: more easy pairs change nothing.

    Args:
      embeddings: `[batch, features]` floating point, of any length.
      labels: integers `[batch]`, the classes.
      margin_positive: m⁺ in [-1, 1]. Default 0.9.
      margin_negative: m⁻ in [-1, 1]. Default 0.5.
      weight_positive: w⁺ at least 0. Default 1.
      weight_negative: w⁻ at least 0. Default 1.
      where: boolean `[batch]`, the examples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread. Not needed
        under jit with shardings.

    Returns:
      A scalar in the type of `embeddings`; 0 where every pair is on its side, or where there is
      none.

    Raises:
      ValueError: shapes that do not match, or a margin or weight out of its range.
      TypeError: embeddings that are not floating point, or labels that are not integer.

    Use it in a sum with a loss that orders distances, where one threshold is to serve all classes:
    those losses ask only that classes are apart, each on its own scale. What it changes is seen in
    `jaxref.metrics.operating_point_inconsistency_score`.

    Cost: the cosines of all pairs of the batch, O(batch²) time and memory.

    Example:
      >>> embeddings = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
      >>> print(threshold_consistent_margin_loss(embeddings, jnp.array([0, 0, 1])).round(3))
      0.6

    Reference: Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    2023, arXiv:2307.04047.
    """
    check_interval(-1, 1, margin_positive=margin_positive, margin_negative=margin_negative)
    check_interval(0, jnp.inf, weight_positive=weight_positive, weight_negative=weight_negative)
    e, labels = checked_batch(embeddings, labels=labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {labels.dtype.name}")
    is_pair = pairs_of_batch(labels.shape, where, axis_name)
    e = unit_vectors(admitted_rows(e, where))
    s = jnp.matmul(e, all_shards(e, axis_name).T, precision=jax.lax.Precision.HIGHEST)
    is_same = labels[:, None] == all_shards(labels, axis_name)

    def mean_excess(excess: Array, of_kind: Array) -> Array:
        counts = of_kind & is_pair & (excess >= 0)
        total = jnp.sum(jnp.where(counts, excess, 0.0))
        sums = sum_over_shards((total, jnp.sum(counts, dtype=s.dtype)), axis_name)
        return sums[0] / jnp.maximum(sums[1], 1)

    loss = weight_positive * mean_excess(margin_positive - s, is_same)
    loss += weight_negative * mean_excess(s - margin_negative, ~is_same)
    return loss.astype(jnp.result_type(embeddings))


def contrastive_regression_triplet_loss(
    embeddings: ArrayLike,
    targets: ArrayLike,
    *,
    margin: float | str = "adaptive",
    target_range: float = 4.0,
    normalize: bool = True,
    reduction: str = "mean_active",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Triplet loss for a continuous target: what is nearer in the target has to be nearer in the
    embedding (SCOREQ; a loss of the set).

        l_ijk = max(0, D_ij - D_ik + m_ijk)   for all i, j, k with |y_i - y_j| < |y_i - y_k|
        m_ijk = (|y_i - y_k| - |y_i - y_j|) / R   or a constant

    with D the Euclidean distance of embeddings and R = target_range. There are no classes: every
    example is the anchor i of all triplets that its distances to others make, and equal distances
    make none. With the adaptive margin, a small difference in the target asks for a small one of
    the distances.

    Args:
      embeddings: `[batch, features]` floating point.
      targets: y `[batch]`, real numbers such as ratings.
      margin: "adaptive" (the default), or a constant of at least 0, as 0.2.
      target_range: R above 0, the largest difference of two targets. Default 4, that of mean
        opinion scores from 1 to 5. Only for the adaptive margin.
      normalize: whether embeddings are first brought to length 1. Default True.
      reduction: "mean_active" (the default), the mean over the triplets whose loss is above 0;
        "mean_valid", over all; "none", one mean for each anchor over all of its triplets.
      where: boolean `[batch]`, the examples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread. Not needed
        under jit with shardings.

    Returns:
      A scalar in the type of `embeddings`; `[batch]` for the reduction "none". 0 where there is no
      triplet.

    Raises:
      ValueError: shapes that do not match, an unknown `margin` or `reduction`, or a number out of
        its range.
      TypeError: embeddings that are not floating point, or targets that are not real numbers.

    Use it to train an encoder by ratings, before a linear layer on the frozen encoder is fitted to
    their values: features are then ordered by the rating, whatever the domain of the input, which
    a loss on the predicted value alone does not bring about.

    Cost: batch³ comparisons, some at a time where they are many; the gradient needs only batch²
    memory.

    Example:
      >>> targets = jnp.array([1.0, 2.0, 4.0])
      >>> loss = contrastive_regression_triplet_loss
      >>> print(loss(targets[:, None] / 8, targets, normalize=False).round(4))
      0.1667

    Reference: Ragano, Skoglund, Hines, "SCOREQ: Speech Quality Assessment with Contrastive
    Regression", 2024, arXiv:2410.06675.
    """
    if isinstance(margin, str):
        if margin != "adaptive":
            raise ValueError(f"margin must be 'adaptive' or a number, got {margin!r}")
        check_interval(0, jnp.inf, closed="right", target_range=target_range)
    else:
        check_interval(0, jnp.inf, margin=margin)
    if reduction not in ("mean_active", "mean_valid", "none"):
        raise ValueError(
            f"reduction must be 'mean_active', 'mean_valid' or 'none', got {reduction!r}"
        )
    e, y = checked_batch(embeddings, targets=targets)
    if not jnp.issubdtype(y.dtype, jnp.floating) and not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"targets must be real numbers, got {y.dtype.name}")
    exists = pairs_of_batch(y.shape, where, axis_name)
    e = admitted_rows(e, where)
    if normalize:
        e = unit_vectors(e)
    distances = safe_sqrt(squared_distances(e, all_shards(e, axis_name)))
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    gaps = jax.lax.stop_gradient(jnp.abs(y[:, None] - all_shards(y, axis_name)))
    positives = negatives = jnp.where(exists, distances, 0.0)
    if isinstance(margin, str):
        positives = negatives = positives - gaps.astype(e.dtype) / target_range
    else:
        positives = positives + margin
    totals, active, valid = _hinges_of_triplets(positives, negatives, gaps, exists)
    if reduction == "none":
        losses = totals / jnp.maximum(valid, 1)
    else:
        number = jnp.sum(active if reduction == "mean_active" else valid)
        total, number = sum_over_shards((jnp.sum(totals), number), axis_name)
        losses = total / jnp.maximum(number, 1)
    return losses.astype(jnp.result_type(embeddings))


def _hinges_of_triplets(
    positives: Array, negatives: Array, gaps: Array, exists: Array
) -> tuple[Array, Array, Array]:
    """Σ_jk max(0, positives_ij - negatives_ik) over gaps_ij < gaps_ik for each row i, and how many.

    A hinge is linear where it is above 0: the sum is that of the entries, each times the number of
    hinges that it is in. Only these numbers are made of triplets, and they have no gradient.

    Returns:
      `[rows]` sums, and numbers of the triplets above 0 and of all, in the type of `positives`.
    """

    def count(row: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array]:
        positive, negative, gap, exists = row
        is_triplet = jnp.where(exists, gap, jnp.inf)[:, None] < jnp.where(exists, gap, -jnp.inf)
        active = is_triplet & (positive[:, None] > negative)
        return active.sum(axis=1), active.sum(axis=0), is_triplet.sum()

    rows = jax.lax.stop_gradient((positives, negatives, gaps, exists))
    at_once = max(_TRIPLETS_AT_ONCE // max(positives.shape[1] ** 2, 1), 1)
    counts = jax.vmap(count)
    if at_once < len(positives):
        counts = partial(jax.lax.map, count, batch_size=at_once)
    of_positives, of_negatives, valid = (x.astype(positives.dtype) for x in counts(rows))
    # Both sides count every hinge, so that a shift of the row drops out, and large terms with it.
    shift = jax.lax.stop_gradient(jnp.mean(positives, axis=1, keepdims=True))
    totals = jnp.sum(of_positives * (positives - shift), axis=1)
    totals -= jnp.sum(of_negatives * (negatives - shift), axis=1)
    return totals, jnp.sum(of_positives, axis=1), valid


def checked_batch(embeddings: ArrayLike, **of_examples: ArrayLike) -> tuple[Array, Array]:
    """Embeddings `[batch, features]` in the type to compute in, and what else examples have."""
    check_floating(embeddings=embeddings)
    e = jnp.asarray(embeddings)
    if e.ndim != 2:
        raise ValueError(f"embeddings must have shape [batch, features], got {e.shape}")
    check_shape(e.shape[:1], **of_examples)
    (values,) = of_examples.values()
    return e.astype(compute_dtype(e)), jnp.asarray(values)


def admitted_rows(embeddings: Array, where: ArrayLike | None) -> Array:
    """The embeddings `[batch, features]`, 0 for examples that do not count, whatever they hold.

    >>> admitted_rows(jnp.array([[1.0], [jnp.nan]]), jnp.array([True, False])).ravel()
    Array([1., 0.], dtype=float32)
    """
    if where is None:
        return embeddings
    counts = jnp.broadcast_to(where, embeddings.shape[:1])
    return jnp.where(counts[:, None], embeddings, 0)


def pairs_of_batch(
    shape: tuple[int, ...], where: ArrayLike | None, axis_name: AxisName | None
) -> Array:
    """`[batch, batch of all shards]`: whether both of a pair count and are not the same example.

    >>> pairs_of_batch((2,), None, None)
    Array([[False,  True],
           [ True, False]], dtype=bool)
    """
    check_broadcastable(shape, where=where)
    counts = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    others = all_shards(counts, axis_name)
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * shape[0]
    row, column = (jax.lax.broadcasted_iota(int, (*shape, len(others)), axis) for axis in (0, 1))
    return (row + start != column) & counts[:, None] & others
