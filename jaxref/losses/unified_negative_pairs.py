"""Margin softmax that also has the batch's pairs of different classes in its denominator (UNPG)."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.core.vectors import unit_vectors
from jaxref.kernels import softmax_cross_entropy
from jaxref.kernels.vocabulary_parallel import combine_over_vocabulary
from jaxref.losses.angular_margin import (
    angle_margin,
    check_head,
    checked_ids,
    counted_examples,
    labelled_cosines,
    target_cosines,
    with_target,
)
from jaxref.losses.metric_learning import admitted_rows

_HEADS = {"arcface": angle_margin, "cosface": lambda cosine, margin: cosine - margin}


def in_batch_negative_similarities(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    r"""Cosines of the pairs of a batch, and which are of different classes, each pair once.

        S = { cos(e_i, e_k) : i < k, y_i ≠ y_k }

    Args:
      embeddings: e `[batch, features]` floating point, of any length.
      labels: y, integers `[batch]`.
      where: boolean `[batch]`, the examples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread; each has
        the pairs of its own examples with all later ones.

    Returns:
      `[batch, batch of all shards]` cosines in at least float32, and a mask of that shape, True in
      the places of S.

    Raises:
      ValueError: shapes that do not match.
      TypeError: embeddings that are not floating point, or labels that are not integer.

    Use it for the negatives of `unified_negative_pair_softmax`, or to look at how alike the most
    similar strangers of a batch are.

    Cost: the cosines of all pairs, O(batch²·features) time and O(batch²) memory.

    Example:
      >>> cosines, is_negative = in_batch_negative_similarities(jnp.eye(3), jnp.array([0, 0, 1]))
      >>> print(is_negative.astype(int))
      [[0 0 1]
       [0 0 1]
       [0 0 0]]

    Reference: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature
    Space for Face Recognition", 2022, arXiv:2203.11593.
    """
    check_floating(embeddings=embeddings)
    e = jnp.asarray(embeddings).astype(compute_dtype(embeddings))
    if e.ndim != 2:
        raise ValueError(f"embeddings must have shape [batch, features], got {e.shape}")
    labels = checked_ids(e, labels)
    check_broadcastable(labels.shape, where=where)
    counts = jnp.ones(labels.shape, bool) if where is None else jnp.broadcast_to(where, len(e))
    e = unit_vectors(admitted_rows(e, where))
    others, other_labels, others_count = (all_shards(x, axis_name) for x in (e, labels, counts))
    similarities = jnp.matmul(e, others.T, precision=jax.lax.Precision.HIGHEST)
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(e)
    row, column = (jax.lax.broadcasted_iota(int, similarities.shape, axis) for axis in (0, 1))
    is_negative = (row + start < column) & (labels[:, None] != other_labels)
    return similarities, is_negative & counts[:, None] & others_count


def box_and_whisker_mask(
    similarities: ArrayLike,
    *,
    whisker: float = 1.5,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Which values of a set are no outliers, by its box plot (of the set; without gradient).

        Q1 - r (Q3 - Q1) ≤ x ≤ Q3 + r (Q3 - Q1),   r = whisker

    With the n values in ascending order and counted from 0, Q1 is the one at ⌊n / 4⌋ and Q3 the one
    at ⌊3 n / 4⌋.

    Args:
      similarities: x `[...]` floating point, one set.
      whisker: r at least 0, the length of the whiskers. Default 1.5.
      where: boolean, broadcastable to x: the values that belong to the set. Default: all.
      axis_name: name or names of the mapped axes over whose shards the set is spread.

    Returns:
      `[...]` booleans, False outside of `where`.

    Raises:
      ValueError: a negative `whisker`, or shapes that do not match.
      TypeError: values that are not floating point.

    Use it to leave noise out of the negatives of `unified_negative_pair_softmax`: pairs whose
    labels may be wrong, and those that are far apart anyway.

    Cost: one sort of all n values, O(n log n), of all shards.

    Example:
      >>> print(box_and_whisker_mask(jnp.array([0.1, 0.2, 0.15, 0.9, 0.12])))
      [ True  True  True False  True]

    Reference: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature
    Space for Face Recognition", 2022, arXiv:2203.11593.
    """
    check_floating(similarities=similarities)
    check_interval(0, jnp.inf, whisker=whisker)
    x = jax.lax.stop_gradient(jnp.asarray(similarities).astype(compute_dtype(similarities)))
    check_broadcastable(x.shape, where=where)
    if x.size == 0:
        return jnp.zeros(x.shape, bool)
    belongs = jnp.ones(x.shape, bool) if where is None else jnp.broadcast_to(where, x.shape)
    ordered = jnp.sort(all_shards(jnp.where(belongs, x, jnp.inf).ravel(), axis_name))
    number = sum_over_shards(jnp.sum(belongs, dtype=jnp.int32), axis_name)
    # ⌊3 n / 4⌋ without the product, which int32 cannot hold for large sets
    low, high = (ordered[i] for i in (number // 4, number // 4 * 3 + number % 4 * 3 // 4))
    reach = whisker * (high - low)
    return belongs & (x >= low - reach) & (x <= high + reach)


def unified_negative_pair_softmax(
    margin_cosines: ArrayLike,
    labels: ArrayLike,
    negative_similarities: ArrayLike,
    *,
    scale: float = 64.0,
    negative_mask: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Softmax cross-entropy with further negatives, the same for every example.

        L = -s t_y + log( Σ_k exp(s t_k) + Σ_{n ∈ N} exp(s n) ),   s = scale

    Args:
      margin_cosines: t `[..., classes]` floating point: cosines with the classes, the label's
        lowered by the margin of any head.
      labels: y, integer ids `[...]`. One that is not an admitted class gives NaN for its example.
      negative_similarities: n `[...]` floating point, of any shape: cosines of pairs of examples.
      scale: s above 0. Default 64.
      negative_mask: boolean, broadcastable to n: the ones in N. Default: all.
      where: boolean, broadcastable to t; classes to admit. Default: all.
      axis_name: name or names of the mapped axes over whose shards N is spread; each example then
        has all of it. Default: N is that of the shard.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: t and `where` are then of the shard's own classes, and ids count the
        classes of all shards.

    Returns:
      `[...]` losses in the type of `margin_cosines`, never below those without N; 0 where no class
      is admitted.

    Raises:
      ValueError: shapes that do not match, no class, or a `scale` that is not positive.
      TypeError: cosines or similarities that are not floating point, or labels that are not
        integer.

    Use it with a head that `unpg_loss` has not; a term on lengths, as MagFace has one, is added to
    it unchanged.

    Cost: that of a softmax over the classes, and one pass over the negatives for all examples
    together.

    Example:
      >>> t, negatives = jnp.array([[0.9, 0.1]]), jnp.array([0.3, 0.5])
      >>> print(unified_negative_pair_softmax(t, jnp.array([0]), negatives, scale=4.0).round(4))
      [0.2877]

    Reference: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature
    Space for Face Recognition", 2022, arXiv:2203.11593.
    """
    check_floating(margin_cosines=margin_cosines, negative_similarities=negative_similarities)
    check_interval(0, jnp.inf, closed="right", scale=scale)
    dtype = compute_dtype(margin_cosines)
    t, n = (jnp.asarray(x).astype(dtype) for x in (margin_cosines, negative_similarities))
    check_broadcastable(n.shape, negative_mask=negative_mask)
    labels = checked_ids(t, labels)
    base = softmax_cross_entropy(scale * t, labels, where=where, axis_name=class_axis_name)
    if n.size == 0:
        return base.astype(jnp.result_type(margin_cosines))
    # log Σ exp over N, as over a row of classes
    belongs = jnp.ones(n.shape, bool) if negative_mask is None else negative_mask
    n = jnp.where(belongs, scale * n, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(n))
    total = jnp.sum(jnp.where(belongs, jnp.exp(n - jnp.where(top > -jnp.inf, top, 0.0)), 0.0))
    log_sum = jnp.log(jnp.where(total > 0, total, 1.0))
    top, log_sum = combine_over_vocabulary(top, log_sum, axis_name)
    log_negatives = jnp.where(top > -jnp.inf, top + log_sum, 0.0)

    counts = counted_examples(t, labels, where, class_axis_name) & ~jnp.isnan(base)
    log_classes = base + scale * target_cosines(t, labels, class_axis_name)
    added = jax.nn.softplus(log_negatives - jnp.where(counts, log_classes, 0.0))
    losses = base + jnp.where(counts & (top > -jnp.inf), added, 0.0)
    return losses.astype(jnp.result_type(margin_cosines))


def unpg_loss(
    embeddings: ArrayLike,
    class_weights: ArrayLike,
    labels: ArrayLike,
    *,
    head: str = "arcface",
    margin: float = 0.5,
    scale: float = 64.0,
    whisker: float = 1.5,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Margin softmax whose negatives are other classes and pairs of examples of different classes
    (UNPG).

        L_i = -s t_i + log( exp(s t_i) + Σ_{k≠y} exp(s cos(e_i, W_k)) + Σ_{n ∈ N} exp(s n) )
        N = { cos(e_j, e_k) : j < k, y_j ≠ y_k }  without outliers

    with t the cosine of `arcface_loss` or `cosface_loss` with its margin, and s = scale. Class
    vectors represent their examples only on the average; the pairs make the most similar strangers
    of a batch count.

    Args:
      embeddings: e `[batch, features]` floating point, of any length.
      class_weights: W `[classes, features]` floating point, a vector of any length for each class.
      labels: y, integer ids `[batch]`. One that is not an admitted class gives NaN for its example,
        and counts in no pair.
      head: "arcface" or "cosface". Default "arcface".
      margin: of the head, in [0, π]. Default 0.5.
      scale: s above 0. Default 64.
      whisker: at least 0; which pairs are outliers, see `box_and_whisker_mask`. Default 1.5.
      where: boolean, broadcastable to `[batch, classes]`; classes to admit. Examples without any
        count in no pair. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread: N is then
        of all of it. Not needed under jit with shardings.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `class_weights` and `where` are then of the shard's own classes, and ids
        count the classes of all shards.

    Returns:
      `[batch]` losses in the type of `embeddings`, those of the head where no pair is of different
      classes; 0 where no class is admitted.

    Raises:
      ValueError: an unknown `head`, shapes that do not match, no class, or a number out of its
        range.
      TypeError: embeddings or weights that are not floating point, or labels that are not integer.

    Use it where a threshold on the similarity of two embeddings has to keep strangers apart; for
    other heads take `unified_negative_pair_softmax`.

    Cost: that of `arcface_loss`, and the batch² similarities of the examples with a sort of them,
    O(batch² log batch).

    Example:
      >>> embeddings, weights = jnp.array([[3.0, 4.0], [4.0, 3.0]]), jnp.eye(2)
      >>> labels = jnp.array([1, 0])
      >>> print(unpg_loss(embeddings, weights, labels, scale=8.0).round(3))
      [4.431 4.431]

    Reference: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature
    Space for Face Recognition", 2022, arXiv:2203.11593.
    """
    if head not in _HEADS:
        raise ValueError(f"head must be one of {sorted(_HEADS)}, got {head!r}")
    check_head(margin, scale, largest=jnp.pi)
    cosines, labels = labelled_cosines(embeddings, class_weights, labels, where)
    target = _HEADS[head](target_cosines(cosines, labels, class_axis_name), margin)
    counts = counted_examples(cosines, labels, where, class_axis_name)
    similarities, is_negative = in_batch_negative_similarities(
        embeddings, labels, where=counts, axis_name=axis_name
    )
    losses = unified_negative_pair_softmax(
        with_target(cosines, target, labels, class_axis_name),
        labels,
        similarities,
        scale=scale,
        negative_mask=box_and_whisker_mask(
            similarities, whisker=whisker, where=is_negative, axis_name=axis_name
        ),
        where=where,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
    )
    return losses.astype(jnp.result_type(embeddings))
