"""Pair losses in which learned vectors, one for each class, stand for the other one of a pair.

The mean field of a class, M, is a parameter, standard normal at the start and best trained with a
learning rate of its own. An example is then compared with C fields and not with a batch, and the
fields are kept apart by `mean_field_regularizer`. Embeddings and fields are compared by cosine.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.core.vectors import unit_vectors
from jaxref.kernels.vocabulary_parallel import local_ids, whole_width
from jaxref.losses.angular_margin import (
    checked_ids,
    class_cosines,
    counted_examples,
    labelled_cosines,
    target_cosines,
    with_target,
)
from jaxref.losses.metric_learning import admitted_rows, checked_batch


def mean_field_contrastive_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    mean_fields: ArrayLike,
    *,
    positive_margin: float = 0.02,
    negative_margin: float = 0.3,
    where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Contrastive loss of an example with the mean fields of the classes.

        L = max(0, d(e, M_y) - m⁺) + Σ_{c≠y} max(0, m⁻ - d(e, M_c)),   d = 1 - cos

    Args:
      embeddings: e `[..., features]` floating point, of any length.
      labels: y, integer ids `[...]`. One that is not an admitted class gives NaN for its example.
      mean_fields: M `[classes, features]` floating point, of any length.
      positive_margin: m⁺ in [0, 2]. Default 0.02, the authors'.
      negative_margin: m⁻ in [0, 2]. Default 0.3, the authors'.
      where: boolean, broadcastable to `[..., classes]`; classes to admit. Default: all.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `mean_fields` and `where` are then of the shard's own classes, and ids
        count the classes of all shards.

    Returns:
      `[...]` losses in the type of `embeddings`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, no class, or a margin out of its range.
      TypeError: embeddings or fields that are not floating point, or labels that are not integer.

    Use it, with `mean_field_regularizer`, where the pairs of a batch are too few for the number of
    classes. Unlike proxies in a softmax, a field beyond its margin leaves the example alone.

    Cost: one product of embeddings and fields; time O(n·C·d), memory O(n·C) for n examples, C
    classes of d features.

    Example:
      >>> fields = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(mean_field_contrastive_loss(jnp.array([3.0, 4.0]), jnp.array(1), fields).round(3))
      0.18

    Reference: Furusawa, "Mean Field Theory in Deep Metric Learning", 2023, arXiv:2306.15368.
    """
    check_interval(0, 2, positive_margin=positive_margin, negative_margin=negative_margin)
    cosines, labels = labelled_cosines(embeddings, mean_fields, labels, where)
    target = target_cosines(cosines, labels, class_axis_name)
    # in the label's own place is a distance that is far enough
    others = with_target(cosines, jnp.full_like(target, -1.0), labels, class_axis_name)
    hinges = jax.nn.relu(negative_margin - (1 - others))
    known = counted_examples(cosines, labels, None, class_axis_name)
    if where is not None:
        admitted = jnp.broadcast_to(where, cosines.shape)
        hinges = jnp.where(admitted, hinges, 0.0)
        known &= target_cosines(admitted.astype(cosines.dtype), labels, class_axis_name) > 0
    negative = sum_over_shards(jnp.sum(hinges, axis=-1), class_axis_name)
    losses = jnp.where(known, jax.nn.relu(1 - target - positive_margin) + negative, jnp.nan)
    if where is not None:
        some = sum_over_shards(admitted.any(axis=-1).astype(jnp.int32), class_axis_name)
        losses = jnp.where(some > 0, losses, 0.0)
    return losses.astype(jnp.result_type(embeddings))


def mean_field_classwise_multi_similarity_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    mean_fields: ArrayLike,
    *,
    alpha: float = 0.01,
    beta: float = 80.0,
    delta: float = 0.8,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Multi-similarity loss of the classes of a batch with the mean fields (a loss of the set).

        P_c = mean over examples of c of exp(-α (cos(e, M_c) - δ))
        Q_cc' = mean over examples of c of exp(β (cos(e, M_c') - δ)), 0 for a class without examples
        L = 1 / (α n) Σ_c log(1 + P_c) + 1 / (2 β n) Σ_{c≠c'} log(1 + Q_cc' + Q_c'c)

    with n the number of classes that the batch has, the first sum over these, and the second over
    all ordered pairs of classes. For large β the second tends to hinges at δ.

    Args:
      embeddings: e `[batch, features]` floating point, of any length.
      labels: integer ids `[batch]`. One that is no class gives NaN.
      mean_fields: M `[classes, features]` floating point, of any length.
      alpha: α above 0. Default 0.01, the authors'.
      beta: β above 0. Default 80, the authors'.
      delta: δ in [-1, 1]. Default 0.8, the authors'.
      where: boolean `[batch]`, the examples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread. Not needed
        under jit with shardings.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `mean_fields` are then of the shard's own classes, and ids count the
        classes of all shards.

    Returns:
      A scalar in the type of `embeddings`; 0 for an empty batch.

    Raises:
      ValueError: shapes that do not match, no class, or a number out of its range.
      TypeError: embeddings or fields that are not floating point, or labels that are not integer.

    Use it as `mean_field_contrastive_loss`, from which it differs in that every class of a batch
    counts alike, however many examples it has, and of a class the hardest examples count most.

    Cost: memory O(n·C + n²) for n examples and C classes, never C²; time that of the n·C cosines.

    Example:
      >>> fields = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> embeddings = jnp.array([[3.0, 4.0], [1.0, 0.0]])
      >>> loss = mean_field_classwise_multi_similarity_loss
      >>> print(loss(embeddings, jnp.array([1, 0]), fields).round(3))
      69.265

    Reference: Furusawa, "Mean Field Theory in Deep Metric Learning", 2023, arXiv:2306.15368.
    """
    _check_similarity(alpha, beta, delta)
    e = _checked_embeddings(embeddings, labels, where)
    cosines = class_cosines(e, mean_fields)
    labels = jnp.asarray(labels)
    if len(labels) == 0:
        return jnp.zeros((), jnp.result_type(embeddings))
    counts = jnp.ones(labels.shape, bool) if where is None else jnp.broadcast_to(where, len(labels))
    batch = _Classes(labels, counts, axis_name)
    log_q = batch.log_means(beta * (cosines - delta))  # [slots, classes]
    own = batch.own_rows(log_q)
    # between classes that the batch has, which come in both orders
    of_others, here = local_ids(batch.all_labels, cosines.shape[-1], class_axis_name)
    forth = jnp.where(here, jnp.take(own, of_others, axis=1), 0.0)
    of_own, own_here = local_ids(labels, cosines.shape[-1], class_axis_name)
    back = jnp.where(own_here, jnp.take(log_q, of_own, axis=1), 0.0).T
    forth, back = sum_over_shards((forth, back), class_axis_name)
    both = jnp.where(batch.other_classes, jax.nn.softplus(jnp.logaddexp(forth, back)), 0.0)
    # with classes that it has not
    present = jnp.zeros(cosines.shape[-1], bool)
    present = present.at[of_others].max(here & all_shards(counts, axis_name))
    alone = jnp.where(~present & batch.is_first[:, None], jax.nn.softplus(own), 0.0)
    alone_total = sum_over_shards(jnp.sum(alone), class_axis_name)

    target = target_cosines(cosines, labels, class_axis_name)
    log_p = batch.own_rows(batch.log_means(-alpha * (target - delta)))
    attraction = jnp.sum(jnp.where(batch.is_first, jax.nn.softplus(log_p), 0.0))
    loss = attraction / alpha + (jnp.sum(both) + 2 * alone_total) / (2 * beta)
    unknown = counts & ~counted_examples(cosines, labels, None, class_axis_name)
    return _over_classes(loss, batch, unknown, axis_name).astype(jnp.result_type(embeddings))


def classwise_multi_similarity_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 0.01,
    beta: float = 80.0,
    delta: float = 0.8,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Multi-similarity loss with means over the pairs of classes (a loss of the set).

        P_c = mean over pairs of c of exp(-α (cos(e_i, e_j) - δ)), an example with itself included
        N_cc' = mean over pairs of c and c' of exp(β (cos(e_i, e_j) - δ))
        L = 1 / (α n) Σ_c log(1 + P_c / 2) + 1 / (2 β n) Σ_{c≠c'} log(1 + N_cc')

    over the n classes of the batch.

    Args:
      embeddings: e `[batch, features]` floating point, of any length.
      labels: integers `[batch]`, the classes.
      alpha: α above 0. Default 0.01.
      beta: β above 0. Default 80.
      delta: δ in [-1, 1]. Default 0.8.
      where: boolean `[batch]`, the examples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread. Not needed
        under jit with shardings.

    Returns:
      A scalar in the type of `embeddings`; 0 for an empty batch.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: embeddings that are not floating point, or labels that are not integer.

    Use it to compare with `mean_field_classwise_multi_similarity_loss`, which approximates it: this
    one sees no class that the batch has not, and needs no fields to train.

    Cost: the cosines of all pairs; time O(n²·d), memory O(n²) for n examples of d features.

    Example:
      >>> embeddings = jnp.array([[3.0, 4.0], [1.0, 0.0]])
      >>> print(classwise_multi_similarity_loss(embeddings, jnp.array([1, 0])).round(3))
      40.48

    Reference: Furusawa, "Mean Field Theory in Deep Metric Learning", 2023, arXiv:2306.15368.
    """
    _check_similarity(alpha, beta, delta)
    e = unit_vectors(_checked_embeddings(embeddings, labels, where))
    labels = jnp.asarray(labels)
    if len(labels) == 0:
        return jnp.zeros((), jnp.result_type(embeddings))
    counts = jnp.ones(labels.shape, bool) if where is None else jnp.broadcast_to(where, len(labels))
    batch = _Classes(labels, counts, axis_name)
    everyone = _Classes(batch.all_labels, all_shards(counts, axis_name), None)
    cosines = jnp.matmul(e, all_shards(e, axis_name).T, precision=jax.lax.Precision.HIGHEST)

    def log_means(x: Array) -> Array:
        """Of the classes of own examples with those of all, `[batch, slots]`."""
        return batch.own_rows(batch.log_means(everyone.log_means(x.T).T))

    log_n = log_means(beta * (cosines - delta))
    repulsion = jnp.sum(jnp.where(batch.other_classes, jax.nn.softplus(log_n), 0.0))
    log_p = log_means(-alpha * (cosines - delta))
    own = batch.is_first[:, None] & (batch.positions[:, None] == jnp.arange(log_p.shape[1]))
    attraction = jnp.sum(jnp.where(own, jax.nn.softplus(log_p - jnp.log(2.0)), 0.0))
    loss = attraction / alpha + repulsion / (2 * beta)
    unknown = jnp.zeros(labels.shape, bool)
    return _over_classes(loss, batch, unknown, axis_name).astype(jnp.result_type(embeddings))


def mean_field_regularizer(
    mean_fields: ArrayLike,
    *,
    weight: float,
    kind: str = "contrastive",
    power: float = 2.0,
    negative_margin: float = 0.3,
    beta: float = 80.0,
    delta: float = 0.8,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Keeps the mean fields of different classes apart.

        R = λ / C Σ_{c≠c'} h(cos(M_c, M_c'))^p,   λ = weight, p = power
        contrastive:       h(x) = max(0, m⁻ - (1 - x))
        multi_similarity:  h(x) = log(1 + exp(β (x - δ))) / β

    Args:
      mean_fields: M `[classes, features]` floating point, of any length.
      weight: λ at least 0. It has no default: it is tuned for each data set.
      kind: "contrastive" for `mean_field_contrastive_loss`, or "multi_similarity" for
        `mean_field_classwise_multi_similarity_loss`.
      power: p at least 1. Default 2.
      negative_margin: m⁻ in [0, 2], that of the loss. Default 0.3.
      beta, delta: those of the loss, β above 0 and δ in [-1, 1]. Default 80 and 0.8.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread.

    Returns:
      A scalar in the type of `mean_fields`.

    Raises:
      ValueError: fields that are no matrix, an unknown `kind`, or a number out of its range.
      TypeError: fields that are not floating point.

    Use it in a sum with `mean_field_contrastive_loss` or
    `mean_field_classwise_multi_similarity_loss`: the mean field theory has this term in place of
    the pairs of examples that the fields replace.

    Cost: the cosines of all pairs of classes; time O(C²·d), memory O(C²) for C classes of d
    features, whatever the batch.

    Example:
      >>> print(mean_field_regularizer(jnp.array([[1.0, 0.0], [0.8, 0.6]]), weight=1.0).round(4))
      0.01

    Reference: Furusawa, "Mean Field Theory in Deep Metric Learning", 2023, arXiv:2306.15368.
    """
    check_floating(mean_fields=mean_fields)
    check_interval(0, jnp.inf, weight=weight)
    check_interval(1, jnp.inf, power=power)
    check_interval(0, 2, negative_margin=negative_margin)
    _check_similarity(1.0, beta, delta)
    m = unit_vectors(jnp.asarray(mean_fields).astype(compute_dtype(mean_fields)))
    if m.ndim != 2:
        raise ValueError(f"mean_fields must have shape [classes, features], got {m.shape}")
    cosines = jnp.matmul(m, all_shards(m, class_axis_name).T, precision=jax.lax.Precision.HIGHEST)
    if kind == "contrastive":
        excess = jax.nn.relu(negative_margin - (1 - cosines))
    elif kind == "multi_similarity":
        excess = jax.nn.softplus(beta * (cosines - delta)) / beta
    else:
        raise ValueError(f"kind must be 'contrastive' or 'multi_similarity', got {kind!r}")
    start = 0 if class_axis_name is None else jax.lax.axis_index(class_axis_name) * len(m)
    is_other = jnp.arange(len(m))[:, None] + start != jnp.arange(cosines.shape[1])
    penalty = jnp.where(is_other & (excess > 0), jnp.where(excess > 0, excess, 1.0) ** power, 0.0)
    total = sum_over_shards(jnp.sum(penalty), class_axis_name)
    classes = whole_width(len(m), class_axis_name)
    return (weight * total / max(classes, 1)).astype(jnp.result_type(mean_fields))


class _Classes:
    """The classes of a batch. Each has a slot: the position of its first example that counts."""

    def __init__(self, labels: Array, counts: Array, axis_name: AxisName | None):
        self.axis_name = axis_name
        self.all_labels = all_shards(labels, axis_name)
        all_counts = all_shards(counts, axis_name)
        size = len(self.all_labels)
        start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(labels)
        self.positions = jnp.arange(len(labels)) + start
        is_same = (self.all_labels[:, None] == self.all_labels) & all_counts
        # no slot for examples that do not count
        first = jnp.argmax(is_same, axis=1)
        self.all_slots = jnp.where(all_counts, first, size)
        self.slots = jax.lax.dynamic_slice_in_dim(self.all_slots, start, len(labels))
        self.is_first = self.slots == self.positions
        all_first = self.all_slots == jnp.arange(size)
        self.other_classes = (
            self.is_first[:, None] & all_first & (self.slots[:, None] != self.all_slots)
        )

    def own_rows(self, rows: Array) -> Array:
        """The rows in the slots of the shard's own examples."""
        if self.axis_name is None:
            return rows
        return jax.lax.dynamic_slice_in_dim(rows, self.positions[0], len(self.positions))

    def log_means(self, x: Array) -> Array:
        """log of the mean of exp x `[batch, ...]` over each class, in its slot `[slots, ...]`.

        Slots of no class have a number that is far below all others.
        """
        size = len(self.all_slots)
        lowest = jnp.finfo(x.dtype).min / 4
        counts = (self.slots < size).reshape(-1, *(1,) * (x.ndim - 1))
        x = jnp.where(counts, x, lowest)
        top = jax.ops.segment_max(jax.lax.stop_gradient(x), self.slots, size)
        top = jnp.maximum(top, lowest)
        if self.axis_name is not None:
            top = jax.lax.pmax(top, self.axis_name)
        shares = jnp.where(counts, jnp.exp(x - top[jnp.minimum(self.slots, size - 1)]), 0.0)
        ones = jnp.ones(self.slots.shape, x.dtype)
        total, number = sum_over_shards(
            tuple(jax.ops.segment_sum(a, self.slots, size) for a in (shares, ones)),
            self.axis_name,
        )
        mean = total / jnp.maximum(number, 1).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, mean, 1.0)), lowest)


def _over_classes(
    loss: Array, batch: _Classes, unknown: Array, axis_name: AxisName | None
) -> Array:
    """A sum over the classes of all shards, by their number; NaN where an example has none."""
    sums = (loss, jnp.sum(batch.is_first, dtype=loss.dtype), jnp.sum(unknown, dtype=jnp.int32))
    total, number, strangers = sum_over_shards(sums, axis_name)
    return jnp.where(strangers > 0, jnp.nan, total / jnp.maximum(number, 1))


def _check_similarity(alpha: float, beta: float, delta: float) -> None:
    check_interval(0, jnp.inf, closed="right", alpha=alpha, beta=beta)
    check_interval(-1, 1, delta=delta)


def _checked_embeddings(embeddings: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> Array:
    """Embeddings `[batch, features]` in the type to compute in, 0 where they do not count."""
    e, ids = checked_batch(embeddings, labels=labels)
    checked_ids(e, ids)
    check_broadcastable(ids.shape, where=where)
    return admitted_rows(e, where)
