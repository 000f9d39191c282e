"""Distillation of the order of the classes: the Plackett-Luce model of lists.

The model draws the members of a list one after the other, each with the softmax of the scores of
those that are left. `where` (boolean, broadcastable to the scores) says which members exist.
"""

import jax
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
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype


def plackett_luce_distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    teacher_temperature: float = 1.0,
    weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Negative log-likelihood of the teacher's order of the classes, the label first (PLD).

        L = Σ_k a_k [ log Σ_{l≥k} exp(s_{π_l}) - s_{π_k} ],   a_k = softmax(t / T)_{π_k}

    for the logits s of the student and t of the teacher, T = teacher_temperature, and the order π
    of `teacher_optimal_permutation`: the label, then the others from the largest t down. The weight
    of the first choice is the teacher's probability of the label, small where the teacher is wrong.
    L is convex in s, least where s has the order of π, and blind to constants added to s or to t.

    Args:
      student_logits: s `[..., classes]` floating point, the classes at `axis`.
      teacher_logits: t of the same shape, floating point; no gradient.
      labels: integer ids `[...]`. One that is not an admitted class gives NaN for its example.
      teacher_temperature: T above 0. Default 1, the paper's.
      weights: a at least 0, broadcastable to `[..., classes]`, the classes last, from the first
        choice to the last, in place of the teacher's: (1, 0, ..., 0) gives cross-entropy, 1 / C
        ListMLE over C, 2^(C - k) - 1 the position-aware ListMLE.
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `student_logits`, in nats; 0 for one class, and where no class
      is admitted.

    Raises:
      ValueError: shapes that do not match, no class, a `teacher_temperature` that is not positive
        or negative `weights`.
      TypeError: logits that are not floating point, or labels that are not integers: a distribution
        has no first class.

    Use it alone, in place of the sum of cross-entropy and `soft_label_distillation_loss`, whose
    mixture it does not need.

    Cost: one sort of the teacher's C classes, O(C log C), and a cumulative log-sum-exp, beside its
    softmax.

    Example:
      >>> student, teacher = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[2.0, 1.0, 0.0]])
      >>> print(plackett_luce_distillation_loss(student, teacher, jnp.array([0])).round(3))
      [1.457]

    Reference: Bassam, Zhu, Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025,
    arXiv:2506.12542.
    """
    check_interval(0, jnp.inf, closed="right", teacher_temperature=teacher_temperature)
    check_floating(student_logits=student_logits)
    shape = jnp.shape(student_logits)
    check_shape(shape, teacher_logits=teacher_logits)
    permutation = teacher_optimal_permutation(teacher_logits, labels, axis=axis, where=where)
    if weights is None:
        t = jax.lax.stop_gradient(jnp.asarray(teacher_logits))
        t = t.astype(compute_dtype(student_logits, t)) / teacher_temperature
        probabilities = jnp.exp(masked_log_softmax(t, axis=axis, where=where))
        weights = jnp.moveaxis(jnp.take_along_axis(probabilities, permutation, axis), axis, -1)
    losses = list_mle_loss(student_logits, permutation, weights=weights, axis=axis, where=where)
    (axis,) = canonical_axes(axis, len(shape))
    ids = jnp.expand_dims(jnp.asarray(labels), axis)
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    known = jnp.any((_class_ids(shape, axis, ids) == ids) & exists, axis=axis)
    return jnp.where(known | ~exists.any(axis=axis), losses, jnp.nan)


def teacher_optimal_permutation(
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""The label, then the other classes from the teacher's most likely one down.

        π_1 = label,   t_{π_2} ≥ t_{π_3} ≥ ... ≥ t_{π_C}

    Args:
      teacher_logits: t `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`. Where one is not an admitted class, all follow the teacher.
      axis: the class axis.
      where: boolean, broadcastable to the logits: the classes that exist; the others come last.
        Default: all.

    Returns:
      π `[..., classes]`, int32 ids in that order along `axis`; of equal classes, the one with the
      lower id comes first.

    Raises:
      ValueError: shapes that do not match, or no class.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use it to store the order of a teacher's logits in their place;
    `plackett_luce_distillation_loss` calls it, and `list_mle_loss` takes any order.

    Cost: one sort of the classes, O(C log C).

    Example:
      >>> print(teacher_optimal_permutation(jnp.array([[0.0, 2.0, 1.0]]), jnp.array([2])))
      [[2 1 0]]

    Reference: Bassam, Zhu, Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025,
    arXiv:2506.12542.
    """
    check_floating(teacher_logits=teacher_logits)
    shape = jnp.shape(teacher_logits)
    check_broadcastable(shape, where=where)
    (axis,) = canonical_axes(axis, len(shape))
    if shape[axis] == 0:
        raise ValueError(f"teacher_logits must have at least one class, got shape {shape}")
    ids = jnp.asarray(labels)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {ids.dtype.name}")
    check_shape(shape[:axis] + shape[axis + 1 :], labels=ids)
    t = jax.lax.stop_gradient(jnp.asarray(teacher_logits))
    ids = jnp.expand_dims(ids, axis)
    keys = jnp.where(_class_ids(shape, axis, ids) == ids, -jnp.inf, -t.astype(compute_dtype(t)))
    if where is not None:
        keys = jnp.where(where, keys, jnp.inf)
    return jnp.argsort(keys, axis=axis, stable=True).astype(jnp.int32)


def list_mle_loss(
    scores: ArrayLike,
    permutation: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Negative log-likelihood of an order of a list under the Plackett-Luce model (ListMLE).

        L = Σ_k a_k [ log Σ_{l≥k} exp(s_{π_l}) - s_{π_k} ]

    for the scores s and the order π from the first to the last. Each term is the cross-entropy of
    one choice among those that are left; that of the last is 0. Adding a constant to all scores
    changes nothing.

    Args:
      scores: s `[..., m]` floating point, the m members of a list at `axis`.
      permutation: π, integers of the shape of `scores`: the members' ids in order along `axis`. A
        list with an id outside of [0, m) gets NaN; ids that repeat are not noticed.
      weights: a, at least 0 and broadcastable to `[..., m]`, the order's places last. Default: 1.
      axis: the members' axis.
      where: boolean, broadcastable to `scores`: the members that exist, by id; the order of the
        others has no meaning. Default: all.

    Returns:
      `[...]` losses of the lists in the type of `scores`, in nats; 0 for a list without members.

    Raises:
      ValueError: shapes that do not match, or negative `weights`.
      TypeError: scores that are not floating point, or a `permutation` that is not integer.

    Use it where the whole order is known; `lambda_ranking_loss` takes grades, several members with
    the same one.

    Cost: one gather and one cumulative log-sum-exp over the m members; no sort.

    Example:
      >>> print(list_mle_loss(jnp.array([2.0, 0.0, 1.0]), jnp.array([0, 2, 1])).round(3))
      0.721

    Reference: the case of equal weights in Bassam, Zhu, Bian, "PLD: A Choice-Theoretic List-Wise
    Knowledge Distillation", 2025, arXiv:2506.12542; Xia, Liu, Wang, Zhang, Li, "Listwise Approach
    to Learning to Rank: Theory and Algorithm", ICML 2008.
    """
    check_floating(scores=scores)
    s, order = jnp.asarray(scores), jnp.asarray(permutation)
    if not jnp.issubdtype(order.dtype, jnp.integer):
        raise TypeError(f"permutation must be integers, got {order.dtype.name}")
    check_shape(s.shape, permutation=order)
    check_broadcastable(s.shape, where=where)
    (axis,) = canonical_axes(axis, s.ndim)
    exists = jnp.ones(s.shape, bool) if where is None else jnp.broadcast_to(where, s.shape)
    s, order, exists = (jnp.moveaxis(x, axis, -1) for x in (s, order, exists))
    s = s.astype(compute_dtype(s))
    known = (order >= 0) & (order < s.shape[-1])
    order = jnp.where(known, order, 0)
    s, exists = (jnp.take_along_axis(x, order, axis=-1) for x in (s, exists))
    left = jax.lax.cumlogsumexp(
        jnp.where(exists, s, jnp.finfo(s.dtype).min), axis=s.ndim - 1, reverse=True
    )
    terms = jnp.where(exists, left - s, 0.0)
    if weights is not None:
        check_interval(0, jnp.inf, weights=weights)
        check_broadcastable(s.shape, weights=weights)
        terms = terms * jax.lax.stop_gradient(jnp.asarray(weights).astype(s.dtype))
    losses = jnp.where(known.all(axis=-1), jnp.sum(terms, axis=-1), jnp.nan)
    return losses.astype(jnp.result_type(scores))


def _class_ids(shape: tuple[int, ...], axis: int, labels: Array) -> Array:
    """The ids of the classes along `axis`, in a type that counts them all and holds the labels."""
    return jax.lax.broadcasted_iota(jnp.promote_types(labels.dtype, jnp.int32), shape, axis)
