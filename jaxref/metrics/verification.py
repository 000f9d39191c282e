"""Whether one threshold on the similarity of embeddings suits all classes."""

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
from jaxref.core.vectors import unit_vectors


def class_utility_curves(
    similarities: ArrayLike,
    labels: ArrayLike,
    thresholds: ArrayLike,
    *,
    num_classes: int,
    c: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""How well each threshold tells the examples of a class from all others.

        U_k(d) = (1 + c²) φ ψ / (c² φ + ψ)
        ψ = share of the pairs within class k with similarity ≥ d  (sensitivity)
        φ = share of the pairs of class k with others with similarity < d  (specificity)

    Args:
      similarities: `[n, n]` floating point, symmetric; the diagonal does not count.
      labels: integers `[n]` in [0, num_classes).
      thresholds: d `[t]` floating point.
      num_classes: at least 1.
      c: above 0; how much more the sensitivity counts. Default 1, the harmonic mean.
      where: boolean `[n]`, the examples that count. Default: all.

    Returns:
      `[num_classes, t]` in [0, 1] in at least float32, 0 where ψ and φ are; NaN for a class with
      fewer than two examples, or without any example of another class.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: similarities or thresholds that are not floating point, or labels that are not
        integer.

    Use it to see which classes a threshold fails; `operating_point_inconsistency_score` sums up
    how far the curves are from each other.

    Cost: O(t n²) time, one threshold after the other, and O(n²) memory for the pairs.

    Example:
      >>> cosines = jnp.array([[1.0, 0.9, 0.4], [0.9, 1.0, 0.6], [0.4, 0.6, 1.0]])
      >>> labels, thresholds = jnp.array([0, 0, 1]), jnp.array([0.3, 0.5, 0.8])
      >>> print(class_utility_curves(cosines, labels, thresholds, num_classes=2).round(3))
      [[0.    0.667 1.   ]
       [  nan   nan   nan]]

    Reference: Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    2023, arXiv:2307.04047.
    """
    check_floating(similarities=similarities, thresholds=thresholds)
    check_interval(1, jnp.inf, num_classes=num_classes)
    check_interval(0, jnp.inf, closed="right", c=c)
    s, labels = jnp.asarray(similarities), jnp.asarray(labels)
    if s.ndim != 2 or s.shape[0] != s.shape[1]:
        raise ValueError(f"similarities must have shape [n, n], got {s.shape}")
    if jnp.ndim(thresholds) != 1:
        raise ValueError(f"thresholds must have shape [t], got {jnp.shape(thresholds)}")
    s = s.astype(compute_dtype(s, thresholds))
    positive, negative = _pairs(labels, len(s), where)

    def shares(pairs: Array, accepted: Array) -> Array:
        """Of the pairs of each class, those that are accepted; NaN where it has none."""
        by_class = [
            jax.ops.segment_sum(jnp.sum(x, axis=1, dtype=s.dtype), labels, num_classes)
            for x in (pairs & accepted, pairs)
        ]
        return jnp.where(by_class[1] > 0, by_class[0] / jnp.maximum(by_class[1], 1), jnp.nan)

    def utility(threshold: Array) -> Array:
        sensitivity = shares(positive, s >= threshold)
        specificity = shares(negative, s < threshold)
        total = c**2 * specificity + sensitivity
        product = (1 + c**2) * specificity * sensitivity
        return jnp.where(total == 0, 0.0, product / jnp.where(total == 0, 1.0, total))

    return jax.lax.map(utility, jnp.asarray(thresholds, s.dtype)).T


def operating_point_inconsistency_score(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    false_accept_range: tuple[float, float] = (1e-2, 1e-1),
    num_thresholds: int = 100,
    c: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""How much the usefulness of one threshold varies between classes (OPIS).

        OPIS = mean_k mean over d in [d_min, d_max] of (U_k(d) - mean_k' U_k'(d))²

    with U_k of `class_utility_curves` on the cosines, and the thresholds d between those that a
    given share of all pairs of different classes passes. The mean over d is the trapezoidal rule
    on an even grid, and that over k is of the classes with at least two examples.

    Args:
      embeddings: `[n, features]` floating point, of any length.
      labels: integers `[n]`, the classes.
      false_accept_range: two shares in [0, 1], the smaller one first: at d_max, and at d_min.
        Default 1 % and 10 %. Between pairs they are interpolated linearly.
      num_thresholds: at least 2. Default 100.
      c: above 0; how much more the sensitivity counts. Default 1.
      where: boolean `[n]`, the examples that count. Default: all.

    Returns:
      A scalar in at least float32, at least 0; NaN without pairs of different classes, or without
      any of the same.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: embeddings that are not floating point, or labels that are not integer.

    Use it beside recall, which does not see it: two models of one recall can need thresholds that
    differ by class. `epsilon_opis` looks at the worst classes, and
    `jaxref.losses.threshold_consistent_margin_loss` trains for it.

    Cost: a sort of the n² cosines and O(num_thresholds · n²) comparisons; O(n²) memory.

    Example:
      >>> angles = jnp.array([0.0, 0.1, 1.0, 2.4])  # the second class is wider
      >>> embeddings = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
      >>> print(operating_point_inconsistency_score(embeddings, jnp.array([0, 0, 1, 1])).round(2))
      0.18

    Reference: Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    2023, arXiv:2307.04047.
    """
    curves, deviations = _deviations(
        embeddings, labels, false_accept_range, num_thresholds, c, where
    )
    return _mean(deviations, ~jnp.isnan(curves).any(axis=1))


def epsilon_opis(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: float = 0.1,
    false_accept_range: tuple[float, float] = (1e-2, 1e-1),
    num_thresholds: int = 100,
    c: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""How far the worst classes are from the others at one threshold (ε-OPIS).

        mean over the worst k of mean over d in [d_min, d_max] of (U_k(d) - mean_k' U_k'(d))²

    The worst are the share ε of the classes, rounded up, that have the lowest mean of U over d.

    Args:
      embeddings, labels: as for `operating_point_inconsistency_score`.
      epsilon: ε in (0, 1]; 1 gives `operating_point_inconsistency_score`. Default 0.1.
      false_accept_range, num_thresholds, c, where: as for `operating_point_inconsistency_score`.

    Returns:
      A scalar in at least float32, at least 0; NaN without pairs of different classes, or without
      any of the same.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: embeddings that are not floating point, or labels that are not integer.

    Use it where a few classes must not be left behind, and a mean over all would hide them.

    Cost: that of `operating_point_inconsistency_score`: O(num_thresholds · n²) time, O(n²) memory.

    Example:
      >>> angles = jnp.array([0.0, 0.1, 1.0, 2.4])
      >>> embeddings = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
      >>> print(epsilon_opis(embeddings, jnp.array([0, 0, 1, 1])).round(2))
      0.18

    Reference: Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    2023, arXiv:2307.04047.
    """
    check_interval(0, 1, closed="right", epsilon=epsilon)
    curves, deviations = _deviations(
        embeddings, labels, false_accept_range, num_thresholds, c, where
    )
    counts = ~jnp.isnan(curves).any(axis=1)
    means = jnp.where(counts, _over_range(curves), jnp.inf)
    number = jnp.ceil(epsilon * jnp.sum(counts))
    ranks = jnp.argsort(jnp.argsort(means))
    return _mean(deviations, counts & (ranks < number))


def _deviations(
    embeddings: ArrayLike,
    labels: ArrayLike,
    false_accept_range: tuple[float, float],
    num_thresholds: int,
    c: float,
    where: ArrayLike | None,
) -> tuple[Array, Array]:
    """Utility `[slots, t]` of each class, in the slot of one of its examples and NaN in others, and
    the mean square of its distance from their mean."""
    check_floating(embeddings=embeddings)
    low, high = false_accept_range
    check_interval(0, 1, false_accept_range=jnp.asarray(false_accept_range))
    if not low < high:
        raise ValueError(
            f"false_accept_range must be two numbers in ascending order, got {false_accept_range}"
        )
    check_interval(2, jnp.inf, num_thresholds=num_thresholds)
    check_interval(0, jnp.inf, closed="right", c=c)
    e, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    if e.ndim != 2 or len(e) == 0:
        raise ValueError(
            f"embeddings must have shape [n, features], at least one example, got {e.shape}"
        )
    _, negative = _pairs(labels, len(e), where)
    e = unit_vectors(e.astype(compute_dtype(e)))
    s = jnp.matmul(e, e.T, precision=jax.lax.Precision.HIGHEST)
    negative &= jnp.triu(jnp.ones_like(negative), 1)  # each pair once
    ordered = jnp.sort(jnp.where(negative, s, jnp.inf).ravel())
    last = jnp.maximum(jnp.sum(negative) - 1, 0)
    places = (1 - jnp.array([high, low], s.dtype)) * last
    below = jnp.floor(places).astype(int)
    share = places - below
    above = jnp.minimum(below + 1, last)
    first, final = (1 - share) * ordered[below] + share * ordered[above]
    thresholds = jnp.linspace(first, final, num_thresholds)
    slots = jnp.argmax(labels[:, None] == labels, axis=1)
    curves = class_utility_curves(s, slots, thresholds, num_classes=len(e), c=c, where=where)
    counts = ~jnp.isnan(curves)
    mean = masked_mean(curves, axis=0, where=counts)
    return curves, _over_range(jnp.where(counts, jnp.square(curves - mean), 0.0))


def _over_range(curves: Array) -> Array:
    """The mean over the thresholds by the trapezoidal rule."""
    return (jnp.mean(curves[:, 1:], axis=1) + jnp.mean(curves[:, :-1], axis=1)) / 2


def _mean(deviations: Array, counts: Array) -> Array:
    return jnp.where(counts.any(), masked_mean(deviations, where=counts), jnp.nan)


def _pairs(labels: Array, n: int, where: ArrayLike | None) -> tuple[Array, Array]:
    """`[n, n]`: which pairs are of one class, and which of two."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {labels.dtype.name}")
    check_shape((n,), labels=labels)
    check_broadcastable((n,), where=where)
    counts = jnp.ones(n, bool) if where is None else jnp.broadcast_to(where, n)
    exists = counts[:, None] & counts & ~jnp.eye(n, dtype=bool)
    is_same = labels[:, None] == labels
    return exists & is_same, exists & ~is_same
