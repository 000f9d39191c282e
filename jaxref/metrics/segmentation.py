"""Metrics of segmentation: overlap per class, and the distance between boundaries."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy import ndimage

from jaxref.core.checks import check_broadcastable, check_interval, check_shape
from jaxref.core.reductions import masked_mean
from jaxref.core.shards import sum_over_shards


def mean_iou(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    num_classes: int,
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Mean over the classes of intersection over union, all pixels taken together.

        IoU_c = TP / (TP + FP + FN) of class c

    Args:
      predictions: integer ids in [0, num_classes), of any shape.
      targets: integer ids of that shape. An id of either that is no class, on a pixel that counts,
        makes the result NaN.
      num_classes: at least 1. Classes that are neither predicted nor true anywhere are left out of
        the mean.
      where: boolean, broadcastable to `predictions`: the pixels that count.
      axis_name: name or names of mapped axes over whose shards the pixels are spread.

    Returns:
      A float32 scalar in [0, 1]; 0 without pixels.

    Raises:
      ValueError: shapes that do not match, or `num_classes` below 1.
      TypeError: ids that are not integers.

    Use it where classes matter alike; `dice_score` has the classes apart, and puts each in the same
    order.

    Cost: `num_classes` comparisons a pixel; with `axis_name` one sum of 2 `num_classes` numbers
    over the shards.

    Example:
      >>> print(mean_iou(jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 1, 1]), num_classes=2).round(4))
      0.5833

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391.
    """
    hits, sizes = _class_counts(predictions, targets, num_classes, where, axis_name)
    union = sizes - hits
    return masked_mean(hits / jnp.where(union == 0, 1.0, union), where=union != 0)


def dice_score(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    num_classes: int,
    empty: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Dice coefficient of each class, its F1 score over the pixels.

        Dice_c = 2 TP / (2 TP + FP + FN) of class c

    Args:
      predictions: integer ids in [0, num_classes), of any shape.
      targets: integer ids of that shape. An id of either that is no class, on a pixel that counts,
        makes the result NaN.
      num_classes: at least 1.
      empty: the score of a class that is neither predicted nor true anywhere. Default 1.
      where: boolean, broadcastable to `predictions`: the pixels that count.
      axis_name: name or names of mapped axes over whose shards the pixels are spread.

    Returns:
      `[num_classes]` float32 in [0, 1].

    Raises:
      ValueError: shapes that do not match, or `num_classes` below 1.
      TypeError: ids that are not integers.

    Use it for medical images, where it is what papers report; one minus it is
    `jaxref.losses.dice_loss` of hard predictions.

    Cost: `num_classes` comparisons a pixel; with `axis_name` one sum of 2 `num_classes` numbers
    over the shards.

    Example:
      >>> print(dice_score(jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 1, 1]), num_classes=2))
      [0.6666667 0.8      ]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391.
    """
    hits, sizes = _class_counts(predictions, targets, num_classes, where, axis_name)
    return jnp.where(sizes == 0, empty, 2 * hits / jnp.where(sizes == 0, 1.0, sizes))


def hausdorff_distance_95(
    prediction: np.ndarray,
    target: np.ndarray,
    *,
    spacing: float | Sequence[float] | None = None,
) -> float:
    r"""Distance between the boundaries of two masks that 95 percent of them keep. On the host.

        HD95 = max(P_95 of d(a, B) over a in A, P_95 of d(b, A) over b in B)

    with A and B the outermost pixels of the masks and d the Euclidean distance to the nearest. The
    95th percentile in place of the maximum forgives single pixels.

    Args:
      prediction: boolean array of an image (other types: not 0).
      target: boolean array of that shape.
      spacing: the size of a pixel along each axis, above 0. Default: 1.

    Returns:
      The distance in units of `spacing`; 0 for two empty masks, infinity for one.

    Raises:
      ValueError: shapes that do not match, or a spacing that is not positive.

    Use it beside `dice_score`, which does not see how far off an error is;
    `jaxref.losses.hausdorff_distance_loss` trains for it.

    Cost: on the host, an erosion and a Euclidean distance transform of each mask, linear in its
    pixels.

    Example:
      >>> mask = np.pad(np.ones((3, 3), bool), 3)
      >>> print(hausdorff_distance_95(mask, np.roll(mask, 2, axis=0)))
      2.0

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391.
    """
    if spacing is not None:
        check_interval(0, np.inf, closed="right", spacing=spacing)
    masks = [np.asarray(mask) != 0 for mask in (prediction, target)]
    check_shape(masks[0].shape, target=masks[1])
    if not all(mask.any() for mask in masks):
        return 0.0 if not any(mask.any() for mask in masks) else float("inf")
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    directed = [
        np.percentile(ndimage.distance_transform_edt(~other, spacing)[edge], 95)
        for edge, other in (edges, edges[::-1])
    ]
    return float(max(directed))


def _class_counts(
    predictions: ArrayLike,
    targets: ArrayLike,
    num_classes: int,
    where: ArrayLike | None,
    axis_name: str | tuple[str, ...] | None,
) -> list[Array]:
    """TP and 2 TP + FP + FN of each class, `[num_classes]`; NaN where an id is no class."""
    check_interval(1, jnp.inf, num_classes=num_classes)
    shape = jnp.shape(predictions)
    check_shape(shape, targets=targets)
    check_broadcastable(shape, where=where)
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    belongs = []
    valid = jnp.asarray(True)
    for name, ids in (("predictions", predictions), ("targets", targets)):
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {ids.dtype.name}")
        valid &= jnp.all((ids >= 0) & (ids < num_classes) | ~exists)
        belongs.append((ids[..., None] == jnp.arange(num_classes)) & exists[..., None])
    axes = tuple(range(len(shape)))
    predicted, actual = belongs
    sums = [
        jnp.sum(predicted & actual, axis=axes, dtype=jnp.float32),
        jnp.sum(predicted, axis=axes, dtype=jnp.float32)
        + jnp.sum(actual, axis=axes, dtype=jnp.float32),
    ]
    sums = [jnp.where(valid, total, jnp.nan) for total in sums]
    return sum_over_shards(sums, axis_name)
