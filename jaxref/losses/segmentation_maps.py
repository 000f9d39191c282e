"""Maps of the labels that the boundary losses of segmentation take as arrays.

Distances are Euclidean, in pixels or in the units of `spacing`. All functions but
`euclidean_distance_transform` and `decode_distance_bins` run on the host, on NumPy arrays, once per
label image and best in the input pipeline; they treat axes outside of `axes` as a batch.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy import ndimage

from jaxref.core.checks import canonical_axes, check_broadcastable, check_interval


def signed_distance_map(
    mask: np.ndarray,
    *,
    axes: int | tuple[int, ...] | None = None,
    spacing: float | Sequence[float] | None = None,
) -> np.ndarray:
    r"""Distance of every pixel to the boundary of a mask, negative inside. On the host.

        φ = d(pixel, nearest foreground) outside,   φ = 1 - d(pixel, nearest background) inside

    so that the outermost pixels of the mask have 0 (with `spacing`, its smallest takes the place of
    the 1).

    Args:
      mask: boolean array (other types: not 0); one-hot labels for a map per class.
      axes: the axes of an image. Default: all.
      spacing: the size of a pixel along each of them, above 0. Default: 1.

    Returns:
      float32 of the shape of `mask`; 0 throughout for an image that is all foreground or has none.

    Raises:
      ValueError: axes that are not there, or a spacing that is not positive or of another length.

    Use it for `boundary_loss`, and for `region_wise_loss` as one of its maps.

    Cost: two exact distance transforms of each image on the host, linear in its pixels; once for
    each label.

    Example:
      >>> print(signed_distance_map(np.array([0, 0, 1, 1, 1, 0])))
      [ 2.  1.  0. -1.  0.  1.]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Kervadec et al., "Boundary loss for highly unbalanced
    segmentation", 2018, arXiv:1812.07032.
    """
    rank = len(canonical_axes(_all_axes(axes, mask), np.ndim(mask), name="axes"))
    sampling = _sampling(spacing, rank)

    def signed(image: np.ndarray) -> np.ndarray:
        outside = ndimage.distance_transform_edt(~image, sampling)
        inside = ndimage.distance_transform_edt(image, sampling)
        return np.where(image, min(sampling) - inside, outside)

    return _per_image(mask, axes, _zero_without_boundary(signed))


def boundary_proximity_map(
    mask: np.ndarray,
    *,
    axes: int | tuple[int, ...] | None = None,
    spacing: float | Sequence[float] | None = None,
) -> np.ndarray:
    r"""Reversed distance to the boundary of a mask, from 1 next to it to 0 far away. On the host.

        Φ = (max d - d) / max d

    with d the distance to the nearest pixel of the other kind and its largest value on the pixel's
    own side. The survey speaks of the inverse of the distance without a formula; this reversal is
    what published code uses.

    Args:
      mask: boolean array (other types: not 0); one-hot labels for a map per class.
      axes: the axes of an image. Default: all.
      spacing: the size of a pixel along each of them, above 0. Default: 1.

    Returns:
      float32 in [0, 1) of the shape of `mask`; 0 throughout for an image that is all foreground or
      has none.

    Raises:
      ValueError: axes that are not there, or a spacing that is not positive or of another length.

    Use it for `distance_weighted_cross_entropy`; for several classes take the largest over the
    maps of their one-hot labels.

    Cost: two exact distance transforms of each image on the host, linear in its pixels; once for
    each label.

    Example:
      >>> print(boundary_proximity_map(np.array([0, 0, 0, 0, 1, 1])))
      [0.   0.25 0.5  0.75 0.5  0.  ]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Caliva et al., "Distance Map Loss Penalty Term for
    Semantic Segmentation", 2019, arXiv:1908.03679.
    """
    rank = len(canonical_axes(_all_axes(axes, mask), np.ndim(mask), name="axes"))
    sampling = _sampling(spacing, rank)

    def proximity(image: np.ndarray) -> np.ndarray:
        sides = [ndimage.distance_transform_edt(side, sampling) for side in (image, ~image)]
        reversed_sides = [(side.max() - side) / side.max() for side in sides]
        return np.where(image, *reversed_sides)

    return _per_image(mask, axes, _zero_without_boundary(proximity))


def rectified_region_map(
    mask: np.ndarray,
    *,
    axes: int | tuple[int, ...] | None = None,
    spacing: float | Sequence[float] | None = None,
) -> np.ndarray:
    r"""Rectified region-wise map: 1 outside of a class, distances scaled to [-1, 0) in it (host).

        z = 1 outside,   z = -d / max d inside

    with d the distance to the nearest pixel outside. Its sign never turns on pixels of the class,
    and its values outside are equal, which is what keeps training on it stable.

    Args:
      mask: boolean array (other types: not 0); one-hot labels for a map per class.
      axes: the axes of an image. Default: all.
      spacing: the size of a pixel along each of them, above 0. Default: 1.

    Returns:
      float32 of the shape of `mask`; for an image that is all of one class -1 throughout.

    Raises:
      ValueError: axes that are not there, or a spacing that is not positive or of another length.

    Use it for `region_wise_loss`, with no other loss beside it; a `signed_distance_map` needs one.

    Cost: one exact distance transform of each image on the host, linear in its pixels; once for
    each label.

    Example:
      >>> print(rectified_region_map(np.array([0, 1, 1, 1, 1, 0])))
      [ 1.  -0.5 -1.  -1.  -0.5  1. ]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Valverde, Tohka, "Region-wise Loss for Biomedical Image
    Segmentation", 2021, arXiv:2108.01405.
    """
    rank = len(canonical_axes(_all_axes(axes, mask), np.ndim(mask), name="axes"))
    sampling = _sampling(spacing, rank)

    def rectified(image: np.ndarray) -> np.ndarray:
        if image.all():
            return np.full(image.shape, -1.0)
        distance = ndimage.distance_transform_edt(image, sampling)
        return np.where(image, -distance / max(distance.max(), min(sampling)), 1.0)

    return _per_image(mask, axes, rectified)


def label_boundary_distance(
    labels: np.ndarray, *, where: np.ndarray | None = None, axes: int | tuple[int, ...] = (-2, -1)
) -> np.ndarray:
    r"""Distance of every pixel to the nearest boundary between labels, less 1. On the host.

    A pixel is on a boundary if the next one along an axis has another label, as is every pixel that
    does not count. The distance is 0 there and beside it.

    Args:
      labels: integer ids.
      where: boolean, broadcastable to `labels`: the pixels that count. Default: all.
      axes: the axes of an image. Default: the last two.

    Returns:
      float32 of the shape of `labels`, at least 0; 0 throughout for an image without boundary.

    Raises:
      ValueError: axes that are not there, or a `where` that does not broadcast.

    Use it for `active_boundary_loss`.

    Cost: one exact distance transform of each image on the host, linear in its pixels; once for
    each label.

    Example:
      >>> print(label_boundary_distance(np.array([[2, 2, 2, 2, 5]])))
      [[2. 1. 0. 0. 0.]]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Wang et al., "Active Boundary Loss for Semantic
    Segmentation", 2021, arXiv:2102.02696.
    """
    labels = np.asarray(labels)
    check_broadcastable(labels.shape, where=where)
    boundary = (
        np.zeros(labels.shape, bool) if where is None else ~np.broadcast_to(where, labels.shape)
    )
    for axis in canonical_axes(axes, labels.ndim, name="axes"):
        last = np.take(labels, [-1], axis=axis)
        boundary = boundary | (np.diff(labels, axis=axis, append=last) != 0)

    def distance(image: np.ndarray) -> np.ndarray:
        return np.maximum(ndimage.distance_transform_edt(~image) - 1, 0)

    return _per_image(boundary, axes, _zero_without_boundary(distance))


def truncated_distance_bins(
    mask: np.ndarray,
    *,
    truncation: int,
    num_bins: int,
    axes: int | tuple[int, ...] | None = None,
) -> np.ndarray:
    r"""Bins of the truncated distance of every pixel of an object to its outside. On the host.

        D = min(⌈d(pixel, nearest pixel outside)⌉, R) inside, 0 outside,   R = truncation

    Bin 0 is the outside; D = 1 ... R falls into the other bins, all of the same width (up to
    rounding).

    Args:
      mask: boolean array (other types: not 0), the object.
      truncation: R at least 1.
      num_bins: K from 2 to R + 1, which keeps every distance apart.
      axes: the axes of an image. Default: all.

    Returns:
      int32 bins in [0, K) of the shape of `mask`. An image that is all object lies in the last bin.

    Raises:
      ValueError: axes that are not there, or numbers out of their range.

    Use it for `boundary_aware_loss`; `decode_distance_bins` turns bins into a mask again.

    Cost: one exact distance transform of each object on the host, linear in the pixels.

    Example:
      >>> print(truncated_distance_bins(np.array([0, 1, 1, 1, 1, 1, 0]), truncation=2, num_bins=3))
      [0 1 2 2 2 1 0]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Hayder, He, Salzmann, "Boundary-aware Instance
    Segmentation", 2016, arXiv:1612.03129.
    """
    _check_bins(truncation, num_bins)

    def bins(image: np.ndarray) -> np.ndarray:
        if image.all():
            return np.full(image.shape, num_bins - 1)
        distance = np.minimum(np.ceil(ndimage.distance_transform_edt(image)), truncation)
        return np.where(image, 1 + (distance - 1) * (num_bins - 1) // truncation, 0)

    return _per_image(mask, axes, bins).astype(np.int32)


def decode_distance_bins(
    bins: ArrayLike,
    *,
    truncation: int,
    num_bins: int,
    axes: int | tuple[int, ...] | None = None,
) -> Array:
    r"""The mask that bins of truncated distances stand for: a union of disks.

    Each pixel of a bin vouches for the disk around it of all pixels nearer than the outside can be
    for that bin. Bins of `truncated_distance_bins` give back their mask; a pixel whose bin was
    missed is filled in by its neighbours.

    Args:
      bins: integers in [0, num_bins), the argmax of what `boundary_aware_loss` trains.
      truncation: R, as for `truncated_distance_bins`.
      num_bins: K, as for `truncated_distance_bins`.
      axes: the axes of an image. Default: all.

    Returns:
      Booleans of the shape of `bins`.

    Raises:
      ValueError: axes that are not there, or numbers out of their range.

    Use it on predictions, under jit if wanted; a mask that is known needs no bins but for training,
    those of `truncated_distance_bins`.

    Cost: num_bins - 1 distance transforms on the device, n operations a pixel each for each axis of
    length n.

    Example:
      >>> print(decode_distance_bins(jnp.array([0, 0, 0, 3, 0, 0]), truncation=3, num_bins=4))
      [False  True  True  True  True  True]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Hayder, He, Salzmann, "Boundary-aware Instance
    Segmentation", 2016, arXiv:1612.03129.
    """
    _check_bins(truncation, num_bins)
    bins = jnp.asarray(bins)
    mask = jnp.zeros(bins.shape, bool)
    lowest = {1 + (d - 1) * (num_bins - 1) // truncation: d for d in range(truncation, 0, -1)}
    for value, distance in lowest.items():
        away = euclidean_distance_transform(bins != value, axes=axes)
        mask |= away <= distance - 1
    return mask


def euclidean_distance_transform(
    mask: ArrayLike, *, axes: int | tuple[int, ...] | None = None
) -> Array:
    r"""Distance of every pixel of a mask to the nearest pixel outside of it, on the device.

        d(x) = min over y outside of |x - y|

    exact, one axis after the other: `d²(i) = min_j (d²(j) + (i - j)²)`. It runs under jit, vmap and
    shardings, and has no gradient.

    Args:
      mask: boolean array.
      axes: the axes of an image. Default: all.

    Returns:
      float32 of the shape of `mask`, 0 outside of it; inf throughout for an image without outside.

    Raises:
      ValueError: axes that are not there.

    Use it on predictions in a loss; for labels `scipy.ndimage.distance_transform_edt` on the host
    is faster.

    Cost: n operations a pixel for each axis of length n, all of a kind that devices are good at.

    Example:
      >>> print(euclidean_distance_transform(jnp.array([True, True, False, True])))
      [2. 1. 0. 1.]

    Reference: Felzenszwalb, Huttenlocher, "Distance Transforms of Sampled Functions", 2012; used
    here for a loss of Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey
    and Outlook", 2023, arXiv:2312.05391.
    """
    mask = jnp.asarray(mask).astype(bool)
    squares = jnp.where(mask, jnp.inf, 0.0).astype(jnp.float32)
    for axis in canonical_axes(_all_axes(axes, mask), mask.ndim, name="axes"):
        if mask.size == 0:
            break
        squares = jnp.moveaxis(_nearest_along_last(jnp.moveaxis(squares, axis, -1)), -1, axis)
    return jnp.sqrt(squares)


def _nearest_along_last(squares: Array, chunk: int = 16) -> Array:
    """min_j (squares_j + (i - j)²) along the last axis, some j at a time to save memory."""
    size = squares.shape[-1]
    chunk = min(chunk, size)
    padding = [(0, 0)] * (squares.ndim - 1) + [(0, -size % chunk)]
    padded = jnp.pad(squares, padding, constant_values=jnp.inf)

    def nearer(number: Array, best: Array) -> Array:
        start = number * chunk
        part = jax.lax.dynamic_slice_in_dim(padded, start, chunk, axis=-1)
        steps = jnp.arange(size)[:, None] - start - jnp.arange(chunk)
        away = part[..., None, :] + jnp.square(steps).astype(part.dtype)
        return jnp.minimum(best, jnp.min(away, axis=-1))

    return jax.lax.fori_loop(0, -(-size // chunk), nearer, squares)


def _all_axes(
    axes: int | tuple[int, ...] | None, array: np.ndarray | Array
) -> int | tuple[int, ...]:
    return tuple(range(np.ndim(array))) if axes is None else axes


def _sampling(spacing: float | Sequence[float] | None, rank: int) -> tuple[float, ...]:
    """The size of a pixel along each of `rank` axes."""
    if spacing is None:
        return (1.0,) * rank
    check_interval(0, np.inf, closed="right", spacing=spacing)
    sampling = np.ravel(np.asarray(spacing, float))
    if sampling.size not in {1, rank}:
        raise ValueError(f"spacing must have one value for each of {rank} axes, got {spacing}")
    return tuple(np.broadcast_to(sampling, rank))


def _check_bins(truncation: int, num_bins: int) -> None:
    check_interval(1, np.inf, truncation=truncation)
    check_interval(2, truncation + 1, num_bins=num_bins)


def _per_image(
    mask: np.ndarray,
    axes: int | tuple[int, ...] | None,
    function: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """`function` of each image over `axes`, in float32."""
    mask = np.asarray(mask) != 0
    spatial = canonical_axes(_all_axes(axes, mask), mask.ndim, name="axes")
    last = tuple(range(-len(spatial), 0))
    moved = np.moveaxis(mask, spatial, last)
    images = moved.reshape(-1, *moved.shape[moved.ndim - len(spatial) :])
    maps = np.zeros(images.shape, np.float32)
    for index, image in enumerate(images if images.size else ()):
        maps[index] = function(image)
    return np.moveaxis(maps.reshape(moved.shape), last, spatial)


def _zero_without_boundary(
    function: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray], np.ndarray]:
    """Distances to a boundary mean nothing, and are 0, where all pixels are of one kind."""
    return lambda image: function(image) if image.any() and not image.all() else np.zeros(())
