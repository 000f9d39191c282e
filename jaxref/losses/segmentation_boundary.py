"""Boundary losses of segmentation that weigh pixels by where the boundaries are."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.losses.segmentation import Axes, masked_pair, pixel_mask, ratio_or_zero
from jaxref.losses.segmentation_maps import euclidean_distance_transform


def boundary_loss(
    probabilities: ArrayLike,
    signed_distance: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""Probability times the signed distance to the true boundary, for each entry.

        L = φ p

    with φ = signed_distance, negative inside of the object. Its sum over an image is, up to a
    constant, the integral of the distance over the region between the two boundaries, and least for
    the object itself. The gradient φ is the same for every prediction.

    Args:
      probabilities: p, floating point in [0, 1], of any shape; usually `[..., classes]`.
      signed_distance: φ of the shape of `probabilities`, from `signed_distance_map` on the host, a
        map for each class.
      where: boolean, broadcastable to `probabilities`: the entries that count; others have loss 0.

    Returns:
      Losses of either sign of the shape and type of `probabilities`, in units of the distance;
      their mean over pixels and classes is the loss of the paper.

    Raises:
      ValueError: shapes that do not match.
      TypeError: probabilities that are not floating point.

    Use it beside a region loss such as `dice_loss`, with a weight that grows from 0.01 over
    training: alone it accepts an empty prediction. `region_wise_loss` is the same product with
    other maps, made to stand alone.

    Cost: one pass over the probabilities; a distance map for each image, made once on the host.

    Example:
      >>> probabilities, signed_distance = jnp.array([0.9, 0.2]), jnp.array([-1.0, 2.0])
      >>> print(boundary_loss(probabilities, signed_distance))
      [-0.9  0.4]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Kervadec et al., "Boundary loss for highly unbalanced
    segmentation", 2018, arXiv:1812.07032.
    """
    check_shape(jnp.shape(probabilities), signed_distance=signed_distance)
    p, distance, _ = masked_pair(probabilities, signed_distance, where)
    return (p * distance).astype(jnp.result_type(probabilities))


def hausdorff_distance_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    alpha: float = 2.0,
    axes: Axes | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Squared errors weighted by their distance from both boundaries (of the set: an image).

        L = mean over the pixels of (y - p)² (d_Y^α + d_P^α)

    with d_Y and d_P the distances to the boundaries of the true mask and of the predicted one,
    p > 1/2; on either side the distance to the nearest pixel of the other. An error far away from
    both counts most, as it alone decides the Hausdorff distance. d_P is computed on the device, by
    `euclidean_distance_transform`, and has no gradient.

    Args:
      probabilities: p, floating point in [0, 1], `[batch, ..., classes]` unless `axes` says
        otherwise.
      targets: y of the shape of `probabilities`, 0 or 1; or class ids of that shape without its
        last axis.
      alpha: α above 0. Default 2, the paper's.
      axes: the axes of an image. Default: all but the first and the last.
      where: boolean, broadcastable to `probabilities`: the pixels that count. Others belong to no
        mask.

    Returns:
      Losses at least 0 with the axes that are left, in the type of `probabilities`. A mask that is
      empty or full has no boundary and adds no distance.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or an `alpha` not above 0.
      TypeError: probabilities that are not floating point.

    Use it beside `dice_loss`, of about the same size, where the largest error matters; far from
    convergence `boundary_loss` is steadier.

    Cost: four distance transforms on the device in each call: 4 n operations a pixel for each axis
    of length n.

    Example:
      >>> targets = jnp.array([[0, 1, 1, 0, 0, 0]])
      >>> for errors in (jnp.array([0, 0, 0, 0.4, 0, 0]), jnp.array([0, 0, 0, 0, 0, 0.4])):
      ...     print(hausdorff_distance_loss(targets + errors, targets, axes=1).round(3))
      [0.053]
      [0.48]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Karimi, Salcudean, "Reducing the Hausdorff Distance in
    Medical Image Segmentation with Convolutional Neural Networks", 2019, arXiv:1904.10030.
    """
    check_interval(0, jnp.inf, closed="right", alpha=alpha)
    p, y, _ = masked_pair(probabilities, targets, where)
    axes = canonical_axes(
        tuple(range(1, p.ndim - 1)) if axes is None else axes, p.ndim, name="axes"
    )
    weights = sum(_distance_to_boundary(x > 0.5, axes) ** alpha for x in (p, y))
    loss = masked_mean(jnp.square(y - p) * weights, axis=axes, where=where)
    return loss.astype(jnp.result_type(probabilities))


def boundary_aware_loss(
    logits: ArrayLike,
    bins: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropies of the bins of each pixel's distance to the object's outside.

        L = Σ_k BCE(sigmoid(f_k), 1[k = bin])

    The network predicts, in place of a mask, how far each pixel of the object is from its outside:
    the truncated distance as one of K bins. A pixel then also knows its neighbourhood to be inside,
    and masks are put together from disks, past the edge of a window that cut the object.

    Args:
      logits: f `[..., K]` floating point.
      bins: integer ids `[...]` in [0, K), from `truncated_distance_bins` on the host; or targets of
        the shape of `logits`. An id that is no bin gives NaN for its pixel.
      where: boolean, broadcastable to `[...]`: the pixels that count; others have loss 0.

    Returns:
      `[...]` losses in the type of `logits`, in nats.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point, or bins of a type that is neither.

    Use it for instances in boxes that may miss a part; `decode_distance_bins` turns the argmax into
    a mask.

    Cost: one pass over the K outputs of each pixel.

    Example:
      >>> print(boundary_aware_loss(jnp.array([[4.0, -4.0, -4.0]]), jnp.array([0])).round(4))
      [0.0544]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Hayder, He, Salzmann, "Boundary-aware Instance
    Segmentation", 2016, arXiv:1612.03129.
    """
    exists = pixel_mask(where, jnp.shape(logits))
    y = label_distribution(bins, logits, where=exists)
    f = jnp.asarray(logits).astype(y.dtype)
    if exists is not None:
        f = jnp.where(exists, f, 0.0)
    losses = -y * jax.nn.log_sigmoid(f) - (1 - y) * jax.nn.log_sigmoid(-f)
    return jnp.sum(losses, axis=-1, where=exists).astype(jnp.result_type(logits))


def region_wise_loss(
    logits: ArrayLike,
    region_map: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Expectation of a map of the labels under each pixel's class probabilities.

        L = Σ_c softmax(f)_c z_c

    with the logits f and z = region_map, which says what mass on class c costs at this pixel. The
    map makes the loss: with `rectified_region_map` it trains alone, `signed_distance_map` makes it
    the `boundary_loss` summed over the classes.

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`.
      region_map: z of the shape of `logits`.
      axis: the class axis.
      where: boolean, broadcastable to `[...]`: the pixels that count; others have loss 0.

    Returns:
      `[...]` losses in the type of `logits`.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point.

    Use it where costs of pixels and classes are known; `distance_weighted_cross_entropy` weighs
    logarithms.

    Cost: that of a softmax over the classes; a map for each image, made once on the host.

    Example:
      >>> print(region_wise_loss(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, -0.5]])))
      [0.25]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Valverde, Tohka, "Region-wise Loss for Biomedical Image
    Segmentation", 2021, arXiv:2108.01405.
    """
    check_floating(logits=logits)
    check_shape(jnp.shape(logits), region_map=region_map)
    exists = pixel_mask(where, jnp.shape(logits), axis)
    f, z = (jnp.asarray(x).astype(compute_dtype(logits)) for x in (logits, region_map))
    if exists is not None:
        f, z = jnp.where(exists, f, 0.0), jnp.where(exists, z, 0.0)
    loss = jnp.sum(jax.nn.softmax(f, axis=axis) * z, axis=axis)
    return loss.astype(jnp.result_type(logits))


def boundary_difference_over_union_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    axes: Axes | None = None,
    smooth: float = 1e-5,
    where: ArrayLike | None = None,
) -> Array:
    r"""Difference over union, the intersection's inside taken out of it (of the set: an image).

        L = (P + Y - 2 I) / (P + Y - (1 + α) I + s),   α = min(max(0, 1 - 2 C / S), 0.8)

    with I = Σ p y, P = Σ p², Y = Σ y, s = smooth, and of the true mask the area S and the length C
    of its boundary (its pixels with a neighbour outside). A large object has few boundary pixels
    and α near 1, so that most of its inside is taken out and the boundary decides; for a small or
    thin one α is 0, and the loss is that of the soft intersection over union.

    Args:
      probabilities: p, floating point in [0, 1], `[batch, ..., classes]` unless `axes` says
        otherwise.
      targets: y of the shape of `probabilities`, 0 or 1; or class ids of that shape without its
        last axis.
      axes: the axes of an image. Default: all but the first and the last.
      smooth: s at least 0. Default 1e-5.
      where: boolean, broadcastable to `probabilities`: the pixels that count. Others belong to no
        mask.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`; 0 where nothing
      is predicted or true.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a negative `smooth`.
      TypeError: probabilities that are not floating point.

    Use it alone, in place of `dice_loss`, for large objects of which the boundary matters. The
    authors' code takes all images of a batch for one, and lets α fall below 0.

    Cost: a few passes over the probabilities and the mask; no distances.

    Example:
      >>> square = jnp.pad(jnp.ones((8, 8)), 2)
      >>> shifted = jnp.roll(square, 1, axis=0)
      >>> print(boundary_difference_over_union_loss(shifted, square, axes=(0, 1)).round(3))
      0.246

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Sun, Luo, Li, "Boundary Difference Over Union Loss For
    Medical Image Segmentation", 2023, arXiv:2308.00220.
    """
    check_interval(0, jnp.inf, smooth=smooth)
    p, y, _ = masked_pair(probabilities, targets, where)
    axes = canonical_axes(
        tuple(range(1, p.ndim - 1)) if axes is None else axes, p.ndim, name="axes"
    )
    area = jnp.sum(y, axis=axes)
    length = jnp.sum((y > 0) & _has_neighbour_outside(y > 0, axes), axis=axes)
    alpha = jnp.clip(1 - 2 * ratio_or_zero(length.astype(area.dtype), area), 0.0, 0.8)
    intersection = jnp.sum(p * y, axis=axes)
    difference = jnp.sum(jnp.square(p - y), axis=axes)  # P + Y - 2 I of a binary y
    loss = ratio_or_zero(difference, difference + (1 - alpha) * intersection + smooth)
    return loss.astype(jnp.result_type(probabilities))


def _distance_to_boundary(mask: Array, axes: tuple[int, ...]) -> Array:
    """Distance to the nearest pixel of the other kind; 0 where there is none."""
    distance = sum(euclidean_distance_transform(side, axes=axes) for side in (mask, ~mask))
    return jnp.where(jnp.isfinite(distance), distance, 0.0)


def _has_neighbour_outside(mask: Array, axes: tuple[int, ...]) -> Array:
    """Whether a pixel has a neighbour along an axis that is not in the mask or not there."""
    outside = jnp.zeros(mask.shape, bool)
    for axis in axes:
        for shift in (1, -1):
            index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis)
            edge = index == (0 if shift == 1 else mask.shape[axis] - 1)
            outside |= edge | ~jnp.roll(mask, shift, axis=axis)
    return outside
