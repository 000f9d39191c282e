"""How good detections are: overlaps, matches with the truth, average precision and recall.

On the host in float64. A detection has a score and its overlap (IoU) with each true object; boxes
give overlaps by `box_overlaps`, masks by their own. Whatever makes them, the rest is the same.
"""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10))


def box_overlaps(boxes: ArrayLike, true_boxes: ArrayLike) -> np.ndarray:
    r"""The intersection over union of every box with every true one.

        IoU_ij = |A_i ∩ B_j| / |A_i ∪ B_j|

    Args:
      boxes: `[detections, 4]` as (x_min, y_min, x_max, y_max).
      true_boxes: `[objects, 4]`.

    Returns:
      `[detections, objects]` from 0 to 1, in float64 on the host; 0 where both are empty.

    Raises:
      ValueError: a shape that is not `[n, 4]`.

    Use it for `detection_average_precision`; `jaxref.losses.iou_loss` compares pairs of boxes, with
    a gradient.

    Cost: O(detections · objects) time and memory, for all pairs.

    Example:
      >>> print(box_overlaps([[0, 0, 2, 2]], [[1, 0, 3, 2], [0, 0, 2, 2]]).round(3))
      [[0.333 1.   ]]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    a, b = np.asarray(boxes, np.float64), np.asarray(true_boxes, np.float64)
    for name, value in {"boxes": a, "true_boxes": b}.items():
        if value.ndim != 2 or value.shape[1] != 4:
            raise ValueError(f"{name} must have shape [n, 4], got {value.shape}")
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return np.where(union > 0, intersection / np.where(union > 0, union, 1), 0.0)


def detection_average_precision(
    scores: Sequence[ArrayLike],
    overlaps: Sequence[ArrayLike],
    *,
    thresholds: float | Sequence[float] = COCO_THRESHOLDS,
    recall_levels: int | None = 101,
) -> float:
    r"""The average precision of one class' detections over its recall (AP), in all images.

    In descending order of score, a detection is right if its overlap with the best object of its
    image that is not taken yet is at least the threshold, and takes it. With the precision P and
    the recall R of the first detections, for each number of them,

        AP = mean over recall levels r of max P where R ≥ r

    and its mean over thresholds.

    Args:
      scores: for each image, `[detections]`.
      overlaps: for each image, `[detections, objects]`: the IoU of boxes (`box_overlaps`) or masks.
        An image without objects has `[detections, 0]`.
      thresholds: of the overlap, each in (0, 1]. Default: 0.5, 0.55, ... 0.95, as COCO has it; 0.5
        is Pascal VOC's.
      recall_levels: how many levels from 0 to 1, evenly spaced. Default 101, COCO's; 11 is Pascal
        VOC 2007's; None is the area under the curve, VOC 2010's.

    Returns:
      AP from 0 to 1, in float64 on the host; 0 where no object is.

    Raises:
      ValueError: `scores` and `overlaps` of other images or detections, a threshold outside of
        (0, 1], or less than two `recall_levels`.

    Use it to report a detector, its mean over classes (mAP) for several; `detection_average_recall`
    leaves out how many detections were wrong.

    Cost: a sort of all scores, and for each threshold a Python step with a pass over the objects
    for every detection.

    Example:
      >>> overlaps = box_overlaps([[0, 0, 2, 2], [5, 5, 6, 6]], [[0, 0, 2, 2], [9, 9, 10, 10]])
      >>> print(round(detection_average_precision([[0.9, 0.8]], [overlaps]), 3))
      0.505

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    if recall_levels is not None:
        check_interval(2, np.inf, recall_levels=recall_levels)
    values = []
    for right, objects in _matches(scores, overlaps, thresholds):
        if not objects:
            return 0.0
        true = np.cumsum(right)
        recall = true / objects
        precision = true / np.arange(1, len(right) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        if recall_levels is None:
            values.append(float(np.sum(envelope * np.diff(recall, prepend=0))))
        else:
            levels = np.linspace(0, 1, recall_levels)
            index = np.searchsorted(recall, levels - 1e-12)  # 0.1 + 0.2 is at the level 0.3
            values.append(float(np.mean(np.append(envelope, 0.0)[index])))
    return float(np.mean(values))


def detection_average_recall(
    scores: Sequence[ArrayLike],
    overlaps: Sequence[ArrayLike],
    *,
    thresholds: float | Sequence[float] = COCO_THRESHOLDS,
    max_detections: int = 100,
) -> float:
    r"""The share of one class' objects that detections find, at several overlaps (AR).

        AR = mean over thresholds of (objects found) / (objects)

    Args:
      scores: for each image, `[detections]`.
      overlaps: for each image, `[detections, objects]`: the IoU of boxes (`box_overlaps`) or masks.
      thresholds: of the overlap, each in (0, 1]. Default: 0.5, 0.55, ... 0.95.
      max_detections: at least 1: how many of each image count, by score. Default 100.

    Returns:
      AR from 0 to 1, in float64 on the host; 0 where no object is.

    Raises:
      ValueError: `scores` and `overlaps` of other images or detections, a threshold outside of
        (0, 1], or `max_detections` below 1.

    Use it for proposals, which are to miss nothing; `detection_average_precision` charges for those
    that are wrong.

    Cost: a sort of all scores, and for each threshold a Python step with a pass over the objects
    for each kept detection.

    Example:
      >>> overlaps = box_overlaps([[0, 0, 2, 2], [5, 5, 6, 6]], [[0, 0, 2, 2], [9, 9, 10, 10]])
      >>> detection_average_recall([[0.9, 0.8]], [overlaps])
      0.5

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(1, np.inf, max_detections=max_detections)
    values = []
    for right, objects in _matches(scores, overlaps, thresholds, max_detections):
        if not objects:
            return 0.0
        values.append(np.sum(right) / objects)
    return float(np.mean(values))


def panoptic_quality(overlaps: Sequence[ArrayLike]) -> float:
    r"""How well a partition of images into segments of one class is found and outlined (PQ).

        PQ = Σ_{matches} IoU / (TP + FP/2 + FN/2)

    A predicted and a true segment match if their IoU exceeds 1/2, which for segments that do not
    overlap among themselves is one to one; FP and FN are the predicted and true ones left over. PQ
    is the mean IoU of matches times their F1 score.

    Args:
      overlaps: for each image, `[segments, true_segments]`: their IoU.

    Returns:
      PQ from 0 to 1, in float64 on the host; 0 where there is no segment.

    Raises:
      ValueError: overlaps that are no matrices or outside of [0, 1], or more than one match of a
        segment.

    Use it where every pixel has one label; its mean over classes is that of a dataset.
    `detection_average_precision` is for segments with scores, which may overlap.

    Cost: one pass over the overlaps of each image.

    Example:
      >>> panoptic_quality([np.array([[0.8, 0.0], [0.0, 0.4]])])
      0.4

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    total, halves = 0.0, 0
    for of_image in overlaps:
        iou = np.asarray(of_image, np.float64)
        check_interval(0, 1, overlaps=iou)
        if iou.ndim != 2:
            raise ValueError(f"overlaps must have shape [segments, objects], got {iou.shape}")
        match = iou > 0.5
        if np.any(match.sum(axis=0) > 1) or np.any(match.sum(axis=1) > 1):
            raise ValueError(
                "overlaps must match every segment at most once, got several above 0.5"
            )
        total += iou[match].sum()
        halves += sum(iou.shape)  # a match is two halves, and each that is left over one
    return float(2 * total / halves) if halves else 0.0


def _matches(
    scores: Sequence[ArrayLike],
    overlaps: Sequence[ArrayLike],
    thresholds: float | Sequence[float],
    max_detections: int | None = None,
) -> list[tuple[np.ndarray, int]]:
    """At each threshold: which detections are right, by descending score, and how many objects."""
    levels = np.atleast_1d(np.asarray(thresholds, np.float64))
    check_interval(0, 1, closed="right", thresholds=levels)
    if len(scores) != len(overlaps):
        raise ValueError(
            f"scores and overlaps must be of the same images, got {len(scores)} and {len(overlaps)}"
        )
    images, objects = [], 0
    for of_image, overlap in zip(scores, overlaps):
        score, iou = np.asarray(of_image, np.float64), np.asarray(overlap, np.float64)
        if score.ndim != 1 or iou.ndim != 2:
            raise ValueError(
                "scores must have shape [detections] and overlaps [detections, objects], "
                f"got {score.shape} and {iou.shape}"
            )
        check_shape((len(score), iou.shape[1]), overlaps=iou)
        order = np.argsort(-score, kind="stable")[:max_detections]
        images.append((score[order], iou[order]))
        objects += iou.shape[1]
    every_score = np.concatenate([score for score, _ in images] or [np.zeros(0)])
    overall = np.argsort(-every_score, kind="stable")
    results = []
    for threshold in levels:
        right = [_match_image(iou, threshold) for _, iou in images]
        results.append((np.concatenate(right or [np.zeros(0, bool)])[overall], objects))
    return results


def _match_image(iou: np.ndarray, threshold: float) -> np.ndarray:
    """Which detections of an image, in descending order of score, find an object not yet taken."""
    right, free = np.zeros(len(iou), bool), np.ones(iou.shape[1], bool)
    for i, row in enumerate(iou):
        left = np.where(free, row, -1)
        if left.size and left.max() >= threshold:
            right[i], free[left.argmax()] = True, False
    return right
