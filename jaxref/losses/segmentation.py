"""Overlap losses of segmentation: Dice, Jaccard, Tversky, and what is built on their sums.

All of them weigh three soft counts of a set against each other: with probabilities p and targets y

    TP = Σ p y,   FP = Σ p (1 - y),   FN = Σ (1 - p) y

True negatives never enter, whatever their number. What a set is, `reduce_axes` says: the axes that
the sums run over. With probabilities `[batch, height, width, classes]` it is `(0, 1, 2)` for one
value per class, `(1, 2)` for one per image and class, None for a single one, and `()` makes every
entry a set of its own.
"""

from typing import NamedTuple

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
from jaxref.core.shards import AxisName, sum_over_shards

Axes = int | tuple[int, ...]


def dice_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    reduce_axes: Axes | None = None,
    smooth: float = 1.0,
    squared_denominator: bool = False,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the soft Sørensen-Dice coefficient (a loss of the set).

        L = 1 - (2 Σ p y + s) / (Σ p + Σ y + s) = (FP + FN) / (2 TP + FP + FN + s)

    with s = smooth, or Σ p² + Σ y² in the denominator, which makes it Σ (p - y)² over that. For
    predictions of 0 and 1 and s = 0 it is one minus the F1 score of the set, so the set should be
    the one that the score is reported on: the mean of Dice losses over small sets (examples, small
    batches) is another objective than the Dice loss of their union.

    Args:
      probabilities: p, floating point in [0, 1] of any shape, after a sigmoid or softmax. Values
        outside are not refused; the formula is taken as it stands.
      targets: y, of the shape of `probabilities`, in [0, 1] (booleans and integers too); or class
        ids of that shape without its last axis, the classes. An id that is no class makes the sets
        that it belongs to NaN.
      reduce_axes: the axes of the set. Default: all.
      smooth: s at least 0. Default 1. A set without any positive has loss Σ p / (Σ p + s), which is
        flat at 1 for s much below Σ p: then choose a larger set before a larger s.
      squared_denominator: whether to take the squares (V-Net's form). Default False.
      where: boolean, broadcastable to `probabilities`: the entries that count.
      axis_name: name or names of the mesh or vmap axes over whose shards the set is spread. Not
        needed under jit with shardings.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`; 0 for a set
      without entries, or with s = 0 without anything predicted or true.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a negative `smooth`.
      TypeError: probabilities that are not floating point.

    Use it where positives are few and F1 or Dice is the measure; `tversky_loss` weighs the two
    kinds of errors apart (1/2 and 1/2 is this one), `jaccard_loss` is the same order of merit for
    intersection over union.

    Cost: one pass over the probabilities; three sums a set, which shards exchange.

    Example:
      >>> probabilities, targets = jnp.array([0.8, 0.6, 0.1, 0.0]), jnp.array([1, 1, 0, 0])
      >>> print(dice_loss(probabilities, targets, smooth=0.0).round(4))
      0.2

    Reference: Watcharasupat et al., "Improving Polyphonic Sound Event Detection on Multichannel
    Recordings with the Sørensen-Dice Coefficient Loss and Transfer Learning", 2021,
    arXiv:2107.10471; Li et al., "Dice Loss for Data-imbalanced NLP Tasks", 2019, arXiv:1911.02855;
    Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and Outlook", 2023,
    arXiv:2312.05391; on the choice of the set Yuan et al., "Simpson's Bias in NLP Training", 2021,
    arXiv:2103.11795.
    """
    loss = soft_dice(
        probabilities,
        targets,
        reduce_axes=reduce_axes,
        smooth=smooth,
        squared_denominator=squared_denominator,
        where=where,
        axis_name=axis_name,
    )
    return loss.astype(jnp.result_type(probabilities))


def log_cosh_dice_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    reduce_axes: Axes | None = None,
    smooth: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The logarithm of the hyperbolic cosine of the Dice loss (a loss of the set).

        L = log cosh(Dice loss)

    which is about half the square of a small Dice loss, and never more. Its slope tanh(Dice loss)
    vanishes as the overlap becomes perfect.

    Args:
      probabilities: p, floating point in [0, 1] of any shape.
      targets: of the shape of `probabilities`, in [0, 1]; or class ids of that shape without its
        last axis.
      reduce_axes: the axes of the set. Default: all.
      smooth: at least 0, as in `dice_loss`. Default 1.
      where: boolean, broadcastable to `probabilities`: the entries that count.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Losses from 0 to log cosh 1 = 0.434 with the axes that are left, in the type of
      `probabilities`; 0 for a set without entries.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a negative `smooth`.
      TypeError: probabilities that are not floating point.

    Use it in place of `dice_loss` where its gradient is too unsteady near convergence.

    Cost: that of `dice_loss`, one pass over the probabilities.

    Example:
      >>> probabilities, targets = jnp.array([0.8, 0.6, 0.1, 0.0]), jnp.array([1, 1, 0, 0])
      >>> print(log_cosh_dice_loss(probabilities, targets, smooth=0.0).round(4))
      0.0199

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Jadon, "A survey of loss functions for semantic
    segmentation", 2020, arXiv:2006.14822.
    """
    dice = soft_dice(
        probabilities,
        targets,
        reduce_axes=reduce_axes,
        smooth=smooth,
        where=where,
        axis_name=axis_name,
    )
    loss = jnp.log1p(2 * jnp.square(jnp.sinh(dice / 2)))  # cosh x = 1 + 2 sinh²(x/2)
    return loss.astype(jnp.result_type(probabilities))


def jaccard_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    reduce_axes: Axes | None = None,
    smooth: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the soft intersection over union (a loss of the set). Also called IoU loss.

        L = 1 - (TP + s) / (TP + FP + FN + s),   s = smooth

    It is `2 D / (1 + D)` of the Dice loss D of smoothing 2 s, and so puts sets in the same order.

    Args:
      probabilities: p, floating point in [0, 1] of any shape.
      targets: of the shape of `probabilities`, in [0, 1]; or class ids of that shape without its
        last axis.
      reduce_axes: the axes of the set. Default: all.
      smooth: s at least 0. Default 1.
      where: boolean, broadcastable to `probabilities`: the entries that count.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`; 0 for a set
      without entries.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a negative `smooth`.
      TypeError: probabilities that are not floating point.

    Use it where intersection over union is the measure; `lovasz_softmax_loss` is exactly that
    measure on hard predictions, and convex between them.

    Cost: one pass over the probabilities; three sums a set, which shards exchange.

    Example:
      >>> probabilities, targets = jnp.array([0.8, 0.6, 0.1, 0.0]), jnp.array([1, 1, 0, 0])
      >>> print(jaccard_loss(probabilities, targets, smooth=0.0).round(4))
      0.3333

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391.
    """
    return tversky_loss(
        probabilities,
        targets,
        false_positive_weight=1.0,
        false_negative_weight=1.0,
        reduce_axes=reduce_axes,
        smooth=smooth,
        where=where,
        axis_name=axis_name,
    )


def tversky_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    false_positive_weight: float = 0.5,
    false_negative_weight: float = 0.5,
    reduce_axes: Axes | None = None,
    smooth: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the soft Tversky index, in which both kinds of errors have a weight (of the set).

        L = 1 - (TP + s) / (TP + a FP + b FN + s) = (a FP + b FN) / (TP + a FP + b FN + s)

    with a = false_positive_weight, b = false_negative_weight, s = smooth. Papers call the two
    weights α and β, in either order: hence the names. Weights of 1/2 are the Dice loss of smoothing
    2 s, weights of 1 the Jaccard loss. More weight on false negatives gives more recall.

    Args:
      probabilities: p, floating point in [0, 1] of any shape.
      targets: of the shape of `probabilities`, in [0, 1]; or class ids of that shape without its
        last axis.
      false_positive_weight: a at least 0. Default 1/2.
      false_negative_weight: b at least 0. Default 1/2.
      reduce_axes: the axes of the set. Default: all.
      smooth: s at least 0. Default 1.
      where: boolean, broadcastable to `probabilities`: the entries that count.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`; 0 for a set
      without entries.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a negative weight or
        `smooth`.
      TypeError: probabilities that are not floating point.

    Use it where missing a positive costs more than inventing one, as for lesions; with a power on
    top it is `focal_tversky_loss`.

    Cost: one pass over the probabilities; three sums a set, which shards exchange.

    Example:
      >>> probabilities, targets = jnp.array([0.8, 0.6, 0.1, 0.0]), jnp.array([1, 1, 0, 0])
      >>> print(tversky_loss(probabilities, targets, false_negative_weight=1.0).round(4))
      0.2131

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Salehi, Erdogmus, Gholipour, "Tversky loss function for
    image segmentation using 3D fully convolutional deep networks", 2017, arXiv:1706.05721; a
    baseline of Li et al., "Dice Loss for Data-imbalanced NLP Tasks", 2019, arXiv:1911.02855.
    """
    loss = soft_tversky(
        probabilities,
        targets,
        false_positive_weight=false_positive_weight,
        false_negative_weight=false_negative_weight,
        reduce_axes=reduce_axes,
        smooth=smooth,
        where=where,
        axis_name=axis_name,
    )
    return loss.astype(jnp.result_type(probabilities))


def focal_tversky_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    false_negative_weight: float = 0.7,
    gamma: float = 0.75,
    reduce_axes: Axes | None = None,
    smooth: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""A power of the Tversky loss whose weights add up to 1 (a loss of the set).

        L = (1 - TI)^γ,   TI = (TP + s) / (TP + (1 - b) FP + b FN + s)

    with b = false_negative_weight, γ = gamma, s = smooth. γ below 1 steepens the loss where the
    overlap is nearly perfect, γ above 1 where it is poor; γ = 1 is the Tversky loss. The survey and
    the first paper write 1/γ for the exponent, so that their 4/3 is 0.75 here. Below 1e-7 of
    1 - TI the power is replaced by a straight line to 0, whose slope is finite.

    Args:
      probabilities: p, floating point in [0, 1] of any shape.
      targets: of the shape of `probabilities`, in [0, 1]; or class ids of that shape without its
        last axis.
      false_negative_weight: b in [0, 1]. Default 0.7.
      gamma: γ above 0. Default 0.75.
      reduce_axes: the axes of the set. Default: all.
      smooth: s at least 0. Default 1.
      where: boolean, broadcastable to `probabilities`: the entries that count.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`; 0 for a set
      without entries.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a hyperparameter out of its
        range.
      TypeError: probabilities that are not floating point.

    Use it for small structures that `tversky_loss` leaves half found; at b = 1/2 and γ = 1 it is
    `dice_loss` of smoothing 2 s.

    Cost: that of `tversky_loss`, one pass over the probabilities.

    Example:
      >>> probabilities, targets = jnp.array([0.8, 0.6, 0.1, 0.0]), jnp.array([1, 1, 0, 0])
      >>> print(focal_tversky_loss(probabilities, targets, smooth=0.0).round(4))
      0.347

    Reference: Radhakrishna et al., "SPOCKMIP: Segmentation of Vessels in MRAs with Enhanced
    Continuity using Maximum Intensity Projection as Loss", 2024, arXiv:2407.08655; Azad et al.,
    "Loss Functions in the Era of Semantic Segmentation: A Survey and Outlook", 2023,
    arXiv:2312.05391; after Abraham, Khan, "A Novel Focal Tversky loss function with improved
    Attention U-Net for lesion segmentation", 2018, arXiv:1810.07842.
    """
    check_interval(0, 1, false_negative_weight=false_negative_weight)
    check_interval(0, jnp.inf, closed="right", gamma=gamma)
    tversky = soft_tversky(
        probabilities,
        targets,
        false_positive_weight=1 - false_negative_weight,
        false_negative_weight=false_negative_weight,
        reduce_axes=reduce_axes,
        smooth=smooth,
        where=where,
        axis_name=axis_name,
    )
    return power_from_zero(tversky, gamma).astype(jnp.result_type(probabilities))


class SoftCounts(NamedTuple):
    """TP, FP and FN of a set, in at least float32."""

    true_positives: Array
    false_positives: Array
    false_negatives: Array


def soft_counts(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    reduce_axes: Axes | None,
    where: ArrayLike | None,
    axis_name: AxisName | None,
) -> SoftCounts:
    """The soft counts of each set, after the checks of an overlap loss."""
    p, y, exists = masked_pair(probabilities, targets, where)
    return SoftCounts(
        *set_sums((p * y, p * (exists - y), (exists - p) * y), reduce_axes, axis_name)
    )


def soft_dice(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    reduce_axes: Axes | None,
    smooth: float,
    squared_denominator: bool = False,
    where: ArrayLike | None,
    axis_name: AxisName | None,
) -> Array:
    """`dice_loss` in at least float32."""
    check_interval(0, jnp.inf, smooth=smooth)
    if squared_denominator:
        p, y, _ = masked_pair(probabilities, targets, where)
        sums = set_sums((jnp.square(p - y), jnp.square(p) + jnp.square(y)), reduce_axes, axis_name)
        return ratio_or_zero(sums[0], sums[1] + smooth)
    counts = soft_counts(
        probabilities, targets, reduce_axes=reduce_axes, where=where, axis_name=axis_name
    )
    errors = counts.false_positives + counts.false_negatives
    return ratio_or_zero(errors, 2 * counts.true_positives + errors + smooth)


def soft_tversky(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    false_positive_weight: float,
    false_negative_weight: float,
    reduce_axes: Axes | None,
    smooth: float,
    where: ArrayLike | None,
    axis_name: AxisName | None,
) -> Array:
    """`tversky_loss` in at least float32."""
    check_interval(
        0,
        jnp.inf,
        false_positive_weight=false_positive_weight,
        false_negative_weight=false_negative_weight,
        smooth=smooth,
    )
    counts = soft_counts(
        probabilities, targets, reduce_axes=reduce_axes, where=where, axis_name=axis_name
    )
    errors = (
        false_positive_weight * counts.false_positives
        + false_negative_weight * counts.false_negatives
    )
    return ratio_or_zero(errors, counts.true_positives + errors + smooth)


def masked_pair(
    probabilities: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array | float]:
    """Probabilities and targets of one shape, 0 where they do not count, and 1 where they do."""
    check_floating(probabilities=probabilities)
    p = jnp.asarray(probabilities).astype(compute_dtype(probabilities))
    check_broadcastable(p.shape, where=where)
    y = binary_targets(targets, p)
    if where is None:
        return p, y, 1.0
    return jnp.where(where, p, 0.0), jnp.where(where, y, 0.0), jnp.where(where, 1.0, 0.0)


def pixel_mask(where: ArrayLike | None, shape: tuple[int, ...], axis: int = -1) -> Array | None:
    """A mask of pixels as one of the entries of an array of `shape`, whose `axis` is the classes.

    As a mask of classes it leaves a masked pixel without any, and so without a label that could be
    wrong: neither an id that is no class nor a NaN reaches loss or gradient.
    """
    if where is None:
        return None
    (axis,) = canonical_axes(axis, len(shape))
    pixels = shape[:axis] + shape[axis + 1 :]
    check_broadcastable(pixels, where=where)
    return jnp.expand_dims(jnp.broadcast_to(where, pixels), axis)


def binary_targets(targets: ArrayLike, predictions: Array) -> Array:
    """Targets of the shape of the predictions, from those or from ids of the classes, last axis."""
    targets = jnp.asarray(targets)
    if targets.ndim == predictions.ndim - 1 and jnp.issubdtype(targets.dtype, jnp.integer):
        return label_distribution(targets, predictions)
    check_shape(predictions.shape, targets=targets)
    return targets.astype(predictions.dtype)


def set_sums(
    terms: tuple[Array, ...], reduce_axes: Axes | None, axis_name: AxisName | None
) -> list[Array]:
    """The sum of each term over the axes of the set, and over its shards."""
    axes = set_axes(reduce_axes, terms[0].ndim)
    sums = [jnp.sum(term, axis=axes) for term in terms]
    return sum_over_shards(sums, axis_name)


def set_axes(reduce_axes: Axes | None, ndim: int) -> tuple[int, ...]:
    """The axes of a set: those named, which may be none, or by default all."""
    if reduce_axes is None:
        return tuple(range(ndim))
    return () if reduce_axes == () else canonical_axes(reduce_axes, ndim, name="reduce_axes")


def ratio_or_zero(numerator: Array, denominator: Array) -> Array:
    """The ratio, and 0 with a gradient of 0 where the denominator is 0."""
    defined = denominator != 0
    return jnp.where(defined, numerator, 0.0) / jnp.where(defined, denominator, 1.0)


def power_from_zero(x: Array, exponent: float | Array, *, floor: float = 1e-7) -> Array:
    """x^exponent for x at least 0, below `floor` the straight line to 0, whose slope is finite."""
    above = x > floor
    power = jnp.where(above, x, floor) ** exponent
    return jnp.where(above, power, power / floor * x)
