"""Losses of object detection: offsets and landmarks by their error, boxes by their overlap, YOLO.

Boxes are `[..., 4]` as (x_min, y_min, x_max, y_max) in any one unit; one whose corners are swapped
along an axis has no area. Unreduced: one value for each offset or box, and for each image of
`yolo_loss`. `where` (boolean) says which of the values exist; the others are 0.
"""

import math
from typing import NamedTuple

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
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.losses.regression import absolute_error


def smooth_l1_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    beta: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""The absolute error with its corner rounded off: the box offsets' loss of Fast R-CNN.

        L = e² / (2β)     where |e| ≤ β
        L = |e| - β / 2   elsewhere,      e = prediction - target

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      beta: β at least 0; 0 is the absolute error. Default 1; detectors with precise boxes use 1/9.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`, with a gradient between -1 and 1.

    Raises:
      ValueError: a negative `beta`, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for offsets in units of the box; `huber_loss` is β times this, `balanced_l1_loss` gives
    small errors more of the gradient.

    Cost: one pass over the predictions.

    Example:
      >>> print(smooth_l1_loss(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0])))
      [0.125 1.5  ]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(0, jnp.inf, beta=beta)
    size = _wide_absolute_error(predictions, targets, where)
    quadratic = jnp.minimum(size, beta)
    scale = jnp.maximum(beta, jnp.finfo(size.dtype).tiny)  # β = 0 leaves no quadratic part
    loss = 0.5 * jnp.square(quadratic) / scale + (size - quadratic)
    return loss.astype(jnp.result_type(predictions))


def balanced_l1_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    alpha: float = 0.5,
    gamma: float = 1.5,
    where: ArrayLike | None = None,
) -> Array:
    r"""A smooth absolute error that gives accurate boxes more of the gradient (Libra R-CNN).

        L = (α/b) (b |e| + 1) log(b |e| + 1) - α |e|   where |e| ≤ 1
        L = γ |e| + γ/b - α                            elsewhere,     e = prediction - target

    with b such that α log(b + 1) = γ. The gradient of small errors, α log(b |e| + 1), is the
    steeper at 0 the smaller α is, and ends at γ.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      alpha: α above 0. Default 0.5.
      gamma: γ above 0, the largest gradient. Default 1.5.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`.

    Raises:
      ValueError: a hyperparameter that is not positive, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it in place of `smooth_l1_loss` where most offsets are small already and few outliers hold
    most of the gradient.

    Cost: one pass over the predictions, with a logarithm for each.

    Example:
      >>> print(balanced_l1_loss(jnp.array([0.0, 1.0]), 0.0).round(3))
      [0.    1.079]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Pang et al.'s,
    2019, arXiv:1904.02701).
    """
    check_interval(0, jnp.inf, closed="right", alpha=alpha, gamma=gamma)
    size = _wide_absolute_error(predictions, targets, where)
    b = jnp.expm1(gamma / alpha)
    inner = jnp.minimum(size, 1)
    stretched = b * inner + 1
    loss = alpha * (stretched * jnp.log(stretched) / b - inner) + gamma * (size - inner)
    return loss.astype(jnp.result_type(predictions))


def wing_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    width: float = 10.0,
    curvature: float = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""A loss of landmarks that is steepest for the small errors (wing loss).

        L = w log(1 + |e| / ε)                 where |e| ≤ w
        L = |e| - w + w log(1 + w / ε)         elsewhere,     e = prediction - target

    with w = width and ε = curvature. The gradient is w / (ε + |e|) for small errors and 1 for large
    ones; at e = 0 it is 0.

    Args:
      predictions: `[...]` floating point, coordinates in pixels.
      targets: real numbers, broadcastable to `predictions`.
      width: w above 0, in pixels. Default 10.
      curvature: ε above 0, in pixels: below it the curve straightens. Default 2.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`.

    Raises:
      ValueError: a hyperparameter that is not positive, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for landmarks that are to be precise to a pixel; `smooth_l1_loss` lets go of small
    errors.

    Cost: one pass over the predictions, with a logarithm for each.

    Example:
      >>> print(wing_loss(jnp.array([2.0, 10.0]), 0.0).round(3))
      [ 6.931 17.918]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Feng et al.'s,
    2017, arXiv:1711.06753).
    """
    check_interval(0, jnp.inf, closed="right", width=width, curvature=curvature)
    size = _wide_absolute_error(predictions, targets, where)
    inner = jnp.minimum(size, width)
    loss = width * jnp.log1p(inner / curvature) + jnp.maximum(size - width, 0)
    return loss.astype(jnp.result_type(predictions))


def iou_loss(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""What two boxes lack of covering each other: one minus intersection over union.

        L = 1 - IoU,   IoU = |A ∩ B| / |A ∪ B|

    Unchanged by shifts and scalings of both boxes together. Without gradient where they do not
    meet.

    Args:
      predictions: `[..., 4]` floating point boxes (x_min, y_min, x_max, y_max).
      targets: boxes, broadcastable to `predictions`.
      where: boolean, broadcastable to `[...]`; excluded boxes have loss 0. Default: all.

    Returns:
      `[...]` losses from 0 to 1 in the type of `predictions`; 1 where both boxes are empty.

    Raises:
      ValueError: a last axis that is not 4, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to refine boxes that overlap; `giou_loss` and `diou_loss` also draw others together.

    Cost: one pass over the boxes.

    Example:
      >>> print(iou_loss(jnp.array([0.0, 0.0, 2.0, 2.0]), jnp.array([1.0, 0.0, 3.0, 2.0])).round(3))
      0.667

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    pair = _compare(predictions, targets, where)
    return _masked(1 - pair.iou, where).astype(jnp.result_type(predictions))


def giou_loss(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""One minus the generalised intersection over union.

        L = 1 - IoU + (|H| - |A ∪ B|) / |H|

    H is the least box around both. Boxes that do not meet are drawn together, as their hull shrinks
    with the gap.

    Args:
      predictions: `[..., 4]` floating point boxes (x_min, y_min, x_max, y_max).
      targets: boxes, broadcastable to `predictions`.
      where: boolean, broadcastable to `[...]`; excluded boxes have loss 0. Default: all.

    Returns:
      `[...]` losses from 0 to 2 in the type of `predictions`; 1 where the hull has no area.

    Raises:
      ValueError: a last axis that is not 4, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it from the start of training, when boxes may be far off; one box inside the other gives no
    more than `iou_loss` does, which `diou_loss` improves on.

    Cost: one pass over the boxes, as `iou_loss`.

    Example:
      >>> apart = giou_loss(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([3.0, 0.0, 4.0, 1.0]))
      >>> print(apart)
      1.5

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Rezatofighi et
    al.'s, 2019, arXiv:1902.09630).
    """
    pair = _compare(predictions, targets, where)
    hull = jnp.prod(pair.hull, axis=-1)
    loss = 1 - pair.iou + _ratio(hull - pair.union, hull)
    return _masked(loss, where).astype(jnp.result_type(predictions))


def diou_loss(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""One minus intersection over union, plus the distance of the boxes' centres.

        L = 1 - IoU + ρ² / d²

    with ρ the distance of the centres, and d the diagonal of the least box around both.

    Args:
      predictions: `[..., 4]` floating point boxes (x_min, y_min, x_max, y_max).
      targets: boxes, broadcastable to `predictions`.
      where: boolean, broadcastable to `[...]`; excluded boxes have loss 0. Default: all.

    Returns:
      `[...]` losses from 0 to 2 in the type of `predictions`; 1 where both are one point.

    Raises:
      ValueError: a last axis that is not 4, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it in place of `giou_loss`, for a gradient to the centre wherever the boxes lie;
    `ciou_loss` adds one to the shape.

    Cost: one pass over the boxes, as `iou_loss`.

    Example:
      >>> apart = diou_loss(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([3.0, 0.0, 4.0, 1.0]))
      >>> print(apart.round(3))
      1.529

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Zheng et al.'s,
    2019, arXiv:1911.08287).
    """
    pair = _compare(predictions, targets, where)
    loss = 1 - pair.iou + pair.centre_distance
    return _masked(loss, where).astype(jnp.result_type(predictions))


def ciou_loss(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""One minus intersection over union, plus the centres' distance and the shapes' difference.

        L = 1 - IoU + ρ² / d² + α v
        v = (4/π²) (atan(w*/h*) - atan(w/h))²,   α = v / (1 - IoU + v)

    with w, h the sides of the predicted box and w*, h* those of the target, and ρ, d as in
    `diou_loss`. The weight α has no gradient.

    Args:
      predictions: `[..., 4]` floating point boxes (x_min, y_min, x_max, y_max).
      targets: boxes, broadcastable to `predictions`.
      where: boolean, broadcastable to `[...]`; excluded boxes have loss 0. Default: all.

    Returns:
      `[...]` losses from 0 to 3 in the type of `predictions`; `diou_loss` where both have the same
      ratio of the sides.

    Raises:
      ValueError: a last axis that is not 4, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it in place of `diou_loss` for objects of many shapes, whose sides' ratio it corrects, too;
    `giou_loss` has neither term.

    Cost: one pass over the boxes, with two arctangents for each.

    Example:
      >>> wide = ciou_loss(jnp.array([0.0, 0.5, 4.0, 1.5]), jnp.array([1.0, 0.0, 3.0, 2.0]))
      >>> print(wide.round(3))
      0.685

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Zheng et al.'s,
    2019, arXiv:1911.08287).
    """
    pair = _compare(predictions, targets, where)
    angles = [_angle(sides) for sides in (pair.sides, pair.target_sides)]
    v = (4 / math.pi**2) * jnp.square(angles[1] - angles[0])
    alpha = jax.lax.stop_gradient(_ratio(v, 1 - pair.iou + v))
    loss = 1 - pair.iou + pair.centre_distance + alpha * v
    return _masked(loss, where).astype(jnp.result_type(predictions))


def yolo_loss(
    boxes: ArrayLike,
    confidences: ArrayLike,
    class_probabilities: ArrayLike,
    target_boxes: ArrayLike,
    target_labels: ArrayLike,
    has_object: ArrayLike,
    *,
    coordinate_weight: float = 5.0,
    no_object_weight: float = 0.5,
) -> Array:
    r"""The sum of squares that trains a one-stage detector on a grid of cells (YOLO).

    Each of the S × S cells predicts B boxes with a confidence each, and one distribution over the
    classes. In a cell with an object, the box of largest IoU with the truth is responsible for it;
    its confidence should be that IoU, and that of all other boxes 0:

        L = λ_coord Σ_responsible [(x - x*)² + (y - y*)² + (√w - √w*)² + (√h - √h*)²]
            + Σ_responsible (c - IoU)² + λ_noobj Σ_others c² + Σ_object cells Σ_k (p_k - 1[k = y])²

    Args:
      boxes: `[..., S, S, B, 4]` floating point (x, y, w, h): the centre within its cell in units of
        the cell, the sides in units of the image. Sides below 1e-6 count as that.
      confidences: c `[..., S, S, B]`.
      class_probabilities: p `[..., S, S, classes]`.
      target_boxes: `[..., S, S, 4]`, of the cells in which an object has its centre.
      target_labels: integer class ids `[..., S, S]`; one that is no class gives NaN, where there is
        an object.
      has_object: boolean `[..., S, S]`; what the targets hold elsewhere is no matter.
      coordinate_weight: λ_coord at least 0. Default 5.
      no_object_weight: λ_noobj at least 0. Default 0.5.

    Returns:
      `[...]` losses, one for each image, in the type of `boxes`. The IoU has no gradient.

    Raises:
      ValueError: a negative weight, or shapes that do not match.
      TypeError: `boxes`, `confidences` or `class_probabilities` not floating point, or
        `target_labels` not integer.

    Use it for the original detector; later ones replace the terms one by one, by `ciou_loss` for
    the boxes and `binary_cross_entropy` for the confidences and classes.

    Cost: one pass over the predictions, S² (5 B + classes) numbers an image; boxes and truths are
    matched within their cells alone.

    Example:
      >>> boxes = jnp.array([0.5, 0.5, 0.25, 0.25]).reshape(1, 1, 1, 4)
      >>> p = jnp.array([[[0.5, 0.5]]])
      >>> has_object = jnp.array([[True]])
      >>> print(yolo_loss(boxes, p[..., :1], p, boxes[:, :, 0], jnp.array([[0]]), has_object))
      0.75

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Redmon et al.'s,
    2015, arXiv:1506.02640).
    """
    check_floating(boxes=boxes, confidences=confidences, class_probabilities=class_probabilities)
    check_interval(
        0, jnp.inf, coordinate_weight=coordinate_weight, no_object_weight=no_object_weight
    )
    shape = jnp.shape(boxes)
    if len(shape) < 4 or shape[-1] != 4 or shape[-4] != shape[-3] or 0 in shape[-4:]:
        raise ValueError(f"boxes must have shape [..., S, S, B, 4], got {shape}")
    check_shape(shape[:-1], confidences=confidences)
    check_shape(shape[:-2], target_labels=target_labels, has_object=has_object)
    check_shape((*shape[:-2], 4), target_boxes=target_boxes)
    if not jnp.issubdtype(jnp.result_type(target_labels), jnp.integer):
        raise TypeError(
            f"target_labels must be integers, got {jnp.result_type(target_labels).name}"
        )
    dtype = compute_dtype(boxes)
    has_object = jnp.asarray(has_object, bool)
    neutral = jnp.array([0.5, 0.5, 1.0, 1.0], dtype)
    truth = jnp.where(has_object[..., None], jnp.asarray(target_boxes).astype(dtype), neutral)
    truth = truth[..., None, :]
    wide, confidence = jnp.asarray(boxes).astype(dtype), jnp.asarray(confidences).astype(dtype)

    def corners(box: Array) -> Array:
        """In units of the image, seen from the cell's corner."""
        centre, half = box[..., :2] / shape[-3], jnp.maximum(box[..., 2:], 0) / 2
        return jnp.concatenate([centre - half, centre + half], axis=-1)

    truth = jnp.broadcast_to(truth, wide.shape)
    iou = jax.lax.stop_gradient(_compare(corners(wide), corners(truth), None).iou)
    best = jnp.argmax(iou, axis=-1, keepdims=True)
    responsible = (jnp.arange(shape[-2]) == best) & has_object[..., None]
    root_sides, root_truth = (jnp.sqrt(jnp.maximum(x[..., 2:], 1e-6)) for x in (wide, truth))
    place = jnp.square(wide[..., :2] - truth[..., :2]) + jnp.square(root_sides - root_truth)
    of_box = jnp.where(
        responsible,
        coordinate_weight * jnp.sum(place, axis=-1) + jnp.square(confidence - iou),
        no_object_weight * jnp.square(confidence),
    )
    p = jnp.asarray(class_probabilities).astype(dtype)
    labels = jnp.where(has_object, target_labels, 0)
    of_class = jnp.sum(jnp.square(p - label_distribution(labels, p)), axis=-1)
    of_cell = jnp.sum(of_box, axis=-1) + jnp.where(has_object, of_class, 0.0)
    return jnp.sum(of_cell, axis=(-2, -1)).astype(jnp.result_type(boxes))


class _Pair(NamedTuple):
    """What the losses compare of two boxes; `centre_distance` is squared, over the diagonal's."""

    iou: Array
    union: Array
    hull: Array
    centre_distance: Array
    sides: Array
    target_sides: Array


def _compare(predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None) -> _Pair:
    check_floating(predictions=predictions)
    shape = jnp.shape(predictions)
    if shape[-1:] != (4,):
        raise ValueError(f"predictions must have shape [..., 4], got {shape}")
    check_broadcastable(shape, targets=targets)
    check_broadcastable(shape[:-1], where=where)
    dtype = compute_dtype(predictions)
    a, b = (jnp.asarray(x).astype(dtype) for x in (predictions, jnp.broadcast_to(targets, shape)))
    if where is not None:
        admitted = jnp.broadcast_to(where, shape[:-1])[..., None]
        a, b = (jnp.where(admitted, x, 0.0) for x in (a, b))
    (a_low, a_high), (b_low, b_high) = ((x[..., :2], x[..., 2:]) for x in (a, b))
    a_sides, b_sides = jnp.maximum(a_high - a_low, 0), jnp.maximum(b_high - b_low, 0)
    overlap = jnp.minimum(a_high, b_high) - jnp.maximum(a_low, b_low)
    meets = jnp.all((overlap > 0) & (a_sides > 0) & (b_sides > 0), axis=-1)
    intersection = jnp.where(meets, jnp.prod(overlap, axis=-1), 0.0)
    union = jnp.prod(a_sides, axis=-1) + jnp.prod(b_sides, axis=-1) - intersection
    hull = jnp.maximum(a_high, b_high) - jnp.minimum(a_low, b_low)
    centre = (a_low + a_high - b_low - b_high) / 2
    return _Pair(
        iou=_ratio(intersection, union),
        union=union,
        hull=hull,
        centre_distance=_ratio(_square_norm(centre), _square_norm(hull)),
        sides=a_sides,
        target_sides=b_sides,
    )


def _square_norm(x: Array) -> Array:
    return jnp.sum(jnp.square(x), axis=-1)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where the denominator, which is not negative, is 0."""
    exists = denominator > 0
    return jnp.where(exists, numerator / jnp.where(exists, denominator, 1.0), 0.0)


def _angle(sides: Array) -> Array:
    """atan(width / height), and π/4 for a point, which has no shape."""
    is_point = jnp.all(sides == 0, axis=-1)
    width, height = (jnp.where(is_point, 1.0, sides[..., i]) for i in (0, 1))
    return jnp.arctan2(width, height)


def _masked(loss: Array, where: ArrayLike | None) -> Array:
    return loss if where is None else jnp.where(where, loss, 0.0)


def _wide_absolute_error(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> Array:
    """|prediction - target| in the type to compute in, and 0 for entries that do not exist."""
    check_floating(predictions=predictions)
    wide = jnp.asarray(predictions).astype(compute_dtype(predictions))
    return absolute_error(wide, targets, where=where)
