"""Losses made of the metrics of a confusion matrix, on counts that have a gradient (AnyLoss)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName
from jaxref.losses.segmentation import Axes, ratio_or_zero, set_sums


class ConfusionMatrix(NamedTuple):
    """The counts of a binary decision over a set, whole numbers or soft ones.

    Attributes:
      true_positives: `[...]`, positives that were predicted as such.
      false_negatives: `[...]`, positives that were missed.
      false_positives: `[...]`, negatives that were predicted positive.
      true_negatives: `[...]`, negatives that were predicted as such.

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """

    true_positives: Array
    false_negatives: Array
    false_positives: Array
    true_negatives: Array


def amplify_probability(probabilities: ArrayLike, *, steepness: float = 73.0) -> Array:
    r"""Moves probabilities almost to 0 or 1, with a gradient everywhere.

        A(p) = 1 / (1 + exp(-L (p - 1/2))),   L = steepness

    The slope is `L A (1 - A)`, computed so that it stays above 0 where A rounds to 1.

    Args:
      probabilities: p `[...]` floating point, meant in [0, 1]; A is defined beyond.
      steepness: L above 0. Default 73, the paper's: the greatest whole number for which A(1) stays
        below 1 in float64 (in float32 A(1) is 1 from 34 on).

    Returns:
      `[...]` in the type of `probabilities`; A(1/2) = 1/2 and A(p) + A(1 - p) = 1.

    Raises:
      ValueError: a `steepness` that is not positive.
      TypeError: probabilities that are not floating point.

    Use it to count decisions with a gradient; `soft_confusion_matrix` does.

    Cost: one pass over the probabilities.

    Example:
      >>> print(amplify_probability(jnp.array([0.45, 0.5, 0.6])).round(3))
      [0.025 0.5   0.999]

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """
    check_floating(probabilities=probabilities)
    check_interval(0, jnp.inf, closed="right", steepness=steepness)
    p = jnp.asarray(probabilities).astype(compute_dtype(probabilities))
    return _sigmoid(steepness * (p - 0.5)).astype(jnp.result_type(probabilities))


def soft_confusion_matrix(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    steepness: float = 73.0,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> ConfusionMatrix:
    r"""The confusion matrix of a set of binary decisions, with a gradient.

        TP = Σ y A,   FN = Σ y (1 - A),   FP = Σ (1 - y) A,   TN = Σ (1 - y) (1 - A)

    with y the targets and A = `amplify_probability(p)`.

    Args:
      probabilities: p `[...]` floating point, of the positive class, meant in [0, 1].
      targets: y `[...]` of the shape of `probabilities`, values in [0, 1] (booleans and integers
        too).
      steepness: L above 0. Default 73.
      reduce_axes: the axes of the set; None, the default, for all. Those that remain are sets side
        by side, such as one-against-rest decisions on one-hot targets, `reduce_axes=0`.
      where: boolean, broadcastable to `probabilities`: the entries that count. Default: all.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      A `ConfusionMatrix` of arrays with the axes that are left, in at least float32.

    Raises:
      ValueError: a `steepness` that is not positive, shapes that do not match, or axes that
        are not there.
      TypeError: probabilities that are not floating point.

    Use it where a metric needs the counts themselves; `metric_loss` makes a loss of one.

    Cost: one pass over the probabilities, and four sums for each set; with `axis_name` these alone
    are sent.

    Example:
      >>> matrix = soft_confusion_matrix(jnp.array([0.9, 0.8, 0.2]), jnp.array([1, 0, 0]))
      >>> print([round(float(count), 3) for count in matrix])
      [1.0, 0.0, 1.0, 1.0]

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """
    check_floating(probabilities=probabilities)
    check_interval(0, jnp.inf, closed="right", steepness=steepness)
    check_broadcastable(jnp.shape(probabilities), targets=targets, where=where)
    p = jnp.asarray(probabilities).astype(compute_dtype(probabilities))
    y = jnp.asarray(targets).astype(p.dtype)
    if where is not None:
        p = jnp.where(where, p, 0.5)
    x = steepness * (p - 0.5)
    positive, negative = _sigmoid(x), _sigmoid(-x)  # the second is 1 - A without its rounding
    counted = (y * positive, y * negative, (1 - y) * positive, (1 - y) * negative)
    terms = [term if where is None else jnp.where(where, term, 0.0) for term in counted]
    return ConfusionMatrix(*set_sums(tuple(terms), reduce_axes, axis_name))


def metric_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    metric: Callable[[ConfusionMatrix], Array],
    *,
    steepness: float = 73.0,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus any metric of the soft confusion matrix, AnyLoss (a loss of the set).

        L = 1 - metric(TP, FN, FP, TN)

    Args:
      probabilities: `[...]` floating point, of the positive class, meant in [0, 1].
      targets: `[...]` of the shape of `probabilities`, values in [0, 1] (booleans and integers
        too).
      metric: from a `ConfusionMatrix` to a value, entry by entry; it has to be defined, with a
        gradient, where a count is 0.
      steepness: L of `amplify_probability`, above 0. Default 73.
      reduce_axes: the axes of the set; None, the default, for all.
      where: boolean, broadcastable to `probabilities`: the entries that count. Default: all.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Losses with the axes that are left, a scalar by default, in the type of `probabilities`; 0 for
      a set without entries.

    Raises:
      ValueError: a `steepness` that is not positive, shapes that do not match, or axes that
        are not there.
      TypeError: probabilities that are not floating point.

    Use it for metrics that have no loss of their own here; `accuracy_loss`, `f_beta_loss`,
    `geometric_mean_loss` and `balanced_accuracy_loss` are made with it. A decision that is made
    gets next to no gradient, so that large batches and a good start help.

    Cost: that of `soft_confusion_matrix`, one pass, and `metric` of four numbers for each set.

    Example:
      >>> recall = lambda matrix: matrix.true_positives / (
      ...     matrix.true_positives + matrix.false_negatives)
      >>> print(metric_loss(jnp.array([0.9, 0.1, 0.2]), jnp.array([1, 1, 0]), recall).round(3))
      0.5

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """
    matrix = soft_confusion_matrix(
        probabilities,
        targets,
        steepness=steepness,
        reduce_axes=reduce_axes,
        where=where,
        axis_name=axis_name,
    )
    loss = jnp.where(sum(matrix) == 0, 0.0, 1 - metric(matrix))
    return loss.astype(jnp.result_type(probabilities))


def accuracy_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    steepness: float = 73.0,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the soft accuracy (a loss of the set).

        L = 1 - (TP + TN) / (TP + FN + FP + TN)

    Args:
      probabilities: as for `metric_loss`, as are the other arguments.
      targets: of the shape of `probabilities`.
      steepness: L above 0. Default 73.
      reduce_axes: the axes of the set. Default: all.
      where: the entries that count. Default: all.
      axis_name: mapped axes over whose shards the set is spread.

    Returns:
      Losses as from `metric_loss`.

    Raises:
      ValueError: what `metric_loss` raises.
      TypeError: what `metric_loss` raises.

    Use it where classes are of similar size; else `balanced_accuracy_loss` counts both alike, and
    `f_beta_loss` the positives alone.

    Cost: that of `soft_confusion_matrix`: one pass over the probabilities.

    Example:
      >>> print(accuracy_loss(jnp.array([0.9, 0.8, 0.2, 0.1]), jnp.array([1, 0, 0, 0])).round(3))
      0.25

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """

    def accuracy(matrix: ConfusionMatrix) -> Array:
        return ratio_or_zero(
            matrix.true_positives + matrix.true_negatives, jnp.asarray(sum(matrix))
        )

    return metric_loss(
        probabilities,
        targets,
        accuracy,
        steepness=steepness,
        reduce_axes=reduce_axes,
        where=where,
        axis_name=axis_name,
    )


def f_beta_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    beta: float = 1.0,
    steepness: float = 73.0,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the soft F score of the positive class (a loss of the set).

        L = 1 - (1 + β²) TP / ((1 + β²) TP + β² FN + FP)

    Args:
      probabilities: as for `metric_loss`, as are the other arguments.
      targets: of the shape of `probabilities`.
      beta: β above 0, how many times as much recall counts as precision. Default 1.
      steepness: L above 0. Default 73.
      reduce_axes: the axes of the set. Default: all.
      where: the entries that count. Default: all.
      axis_name: mapped axes over whose shards the set is spread.

    Returns:
      Losses as from `metric_loss`; 1, with gradient 0, for a set of negatives.

    Raises:
      ValueError: a `beta` that is not positive, or what `metric_loss` raises.
      TypeError: what `metric_loss` raises.

    Use it where positives are rare and F1 is reported, with batches that hold some of them;
    `self_adjusting_dice_loss` has the same limit without the amplification.

    Cost: that of `soft_confusion_matrix`: one pass over the probabilities.

    Example:
      >>> print(f_beta_loss(jnp.array([0.9, 0.8, 0.2, 0.1]), jnp.array([1, 0, 0, 0])).round(3))
      0.333

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)

    def f_beta(matrix: ConfusionMatrix) -> Array:
        hits = (1 + beta**2) * matrix.true_positives
        return ratio_or_zero(hits, hits + beta**2 * matrix.false_negatives + matrix.false_positives)

    return metric_loss(
        probabilities,
        targets,
        f_beta,
        steepness=steepness,
        reduce_axes=reduce_axes,
        where=where,
        axis_name=axis_name,
    )


def geometric_mean_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    steepness: float = 73.0,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the soft geometric mean of sensitivity and specificity (a loss of the set).

        L = 1 - √(TP / (TP + FN) · TN / (TN + FP))

    Args:
      probabilities: as for `metric_loss`, as are the other arguments.
      targets: of the shape of `probabilities`.
      steepness: L above 0. Default 73.
      reduce_axes: the axes of the set. Default: all.
      where: the entries that count. Default: all.
      axis_name: mapped axes over whose shards the set is spread.

    Returns:
      Losses as from `metric_loss`; 1, with gradient 0, for a set that lacks one of the classes.

    Raises:
      ValueError: what `metric_loss` raises.
      TypeError: what `metric_loss` raises.

    Use it where neither class may be given up: it is 1 if one is. `balanced_accuracy_loss` trades
    one for the other.

    Cost: that of `soft_confusion_matrix`: one pass over the probabilities.

    Example:
      >>> loss = geometric_mean_loss(jnp.array([0.9, 0.8, 0.2, 0.1]), jnp.array([1, 0, 0, 0]))
      >>> print(loss.round(3))
      0.184

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """

    def geometric_mean(matrix: ConfusionMatrix) -> Array:
        sensitivity, specificity = _sensitivity_and_specificity(matrix)
        product = sensitivity * specificity
        root = jnp.sqrt(jnp.where(product > 0, product, 1.0))
        return jnp.where(product > 0, root, 0.0)

    return metric_loss(
        probabilities,
        targets,
        geometric_mean,
        steepness=steepness,
        reduce_axes=reduce_axes,
        where=where,
        axis_name=axis_name,
    )


def balanced_accuracy_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    steepness: float = 73.0,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the mean of the soft sensitivity and specificity (a loss of the set).

        L = 1 - (TP / (TP + FN) + TN / (TN + FP)) / 2

    Args:
      probabilities: as for `metric_loss`, as are the other arguments.
      targets: of the shape of `probabilities`.
      steepness: L above 0. Default 73.
      reduce_axes: the axes of the set. Default: all.
      where: the entries that count. Default: all.
      axis_name: mapped axes over whose shards the set is spread.

    Returns:
      Losses as from `metric_loss`; a class that the set lacks counts as wholly missed.

    Raises:
      ValueError: what `metric_loss` raises.
      TypeError: what `metric_loss` raises.

    Use it where classes differ in size and both count alike; `geometric_mean_loss` lets neither be
    given up for the other.

    Cost: that of `soft_confusion_matrix`: one pass over the probabilities.

    Example:
      >>> loss = balanced_accuracy_loss(jnp.array([0.9, 0.8, 0.2, 0.1]), jnp.array([1, 0, 0, 0]))
      >>> print(loss.round(3))
      0.167

    Reference: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss
    Functions", 2024, arXiv:2405.14745.
    """

    def balanced_accuracy(matrix: ConfusionMatrix) -> Array:
        sensitivity, specificity = _sensitivity_and_specificity(matrix)
        return (sensitivity + specificity) / 2

    return metric_loss(
        probabilities,
        targets,
        balanced_accuracy,
        steepness=steepness,
        reduce_axes=reduce_axes,
        where=where,
        axis_name=axis_name,
    )


@jax.custom_jvp
def _sigmoid(x: Array) -> Array:
    """The logistic function, whose own derivative s - s² is 0 once s rounds to 1."""
    return jax.nn.sigmoid(x)


@_sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    s = _sigmoid(x)
    return s, s * _sigmoid(-x) * tangent


def _sensitivity_and_specificity(matrix: ConfusionMatrix) -> tuple[Array, Array]:
    true_positives, false_negatives, false_positives, true_negatives = matrix
    return (
        ratio_or_zero(true_positives, true_positives + false_negatives),
        ratio_or_zero(true_negatives, true_negatives + false_positives),
    )
