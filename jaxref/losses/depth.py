"""Losses of depth estimation: on depth maps, and on images that a predicted depth reconstructs.

Depth and disparity maps are `[..., height, width]`, images `[..., height, width, channels]`. A loss
of a map reduces its pixels and returns one value for each; the losses of pixels return maps.
`where` (boolean, broadcastable to the maps) says which pixels exist, as with the holes of a depth
sensor: the others count for nothing and may hold anything, NaN included.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.losses.regression import absolute_error
from jaxref.metrics.image import structural_similarity, structural_similarity_map

MAP = (-2, -1)


def scale_invariant_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    balance: float = 0.5,
    where: ArrayLike | None = None,
) -> Array:
    r"""The error of log depth, less part of its scale's (a loss of the set of a map's pixels).

        L = mean(d²) - λ (mean d)²,   d = log prediction - log target,   λ = balance

    Args:
      predictions: `[..., height, width]` floating point depths, positive.
      targets: depths of the same shape, positive.
      balance: λ in [0, 1]: 0 is the squared error of log depth, and 1 the variance of d, which no
        scale of the predictions changes. Default 0.5.
      where: boolean, broadcastable to `predictions`: the pixels that exist. Default: all.

    Returns:
      `[...]` losses, at least 0, in the type of `predictions`; 0 for a map without pixels. Depths
      of 0 give ∞ or NaN, negative ones NaN.

    Raises:
      ValueError: `balance` outside of [0, 1], or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for metric depth, where the scale is the hardest to tell; `scale_shift_invariant_loss`
    leaves scale and shift open altogether.

    Cost: two passes over the map, and two logarithms a pixel.

    Example:
      >>> depth = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> print(scale_invariant_loss(2 * depth, depth, balance=1.0).round(6))
      0.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Eigen, Puhrsch,
    Fergus's, 2014, arXiv:1406.2283).
    """
    check_interval(0, 1, balance=balance)
    prediction, target = _checked_maps(predictions, targets, where, fill=1.0)
    d = jnp.log(prediction) - jnp.log(target)
    mean = masked_mean(d, axis=MAP, where=where, keepdims=True)
    variance = masked_mean(jnp.square(d - mean), axis=MAP, where=where)  # at least 0 when rounded
    loss = variance + (1 - balance) * jnp.square(mean[..., 0, 0])
    return loss.astype(jnp.result_type(predictions))


def berhu_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    fraction: float = 0.2,
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""The absolute error of small errors and the squared error of large ones (reverse Huber).

        L = |e|                   where |e| ≤ c
        L = (e² + c²) / (2 c)     elsewhere,     e = prediction - target,   c = fraction · max |e|

    with the maximum over all entries of the batch; c has no gradient. Value and slope are
    continuous at c.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      fraction: in (0, 1]: where the squared part begins. Default 0.2.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0 and do not count
        for the maximum. Default: all.
      axis_name: name or names of the mesh or vmap axes over which the batch is spread, for the
        maximum over all of it.

    Returns:
      `[...]` losses, one for each entry, in the type of `predictions`, with a slope from 1 to
      1 / `fraction`.

    Raises:
      ValueError: `fraction` outside of (0, 1], or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for depth, whose errors have a heavy tail that is to be learnt rather than left out, as
    `huber_loss` would.

    Cost: two passes over the entries; the first, for the maximum, over the whole batch.

    Example:
      >>> print(berhu_loss(jnp.array([0.5, 1.0, 5.0]), jnp.zeros(3)))
      [ 0.5  1.  13. ]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (for depth Laina et al.'s, 2016,
    arXiv:1606.00373).
    """
    check_interval(0, 1, closed="right", fraction=fraction)
    check_floating(predictions=predictions)
    dtype = compute_dtype(predictions)
    size = absolute_error(jnp.asarray(predictions).astype(dtype), targets, where=where)
    largest = jnp.max(jax.lax.stop_gradient(size), initial=0.0)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    c = jnp.maximum(fraction * largest, jnp.finfo(dtype).tiny)
    excess = jnp.maximum(size - c, 0)
    # (e² + c²) / (2c) = |e| + (|e| - c)² / (2c)
    return (size + excess * (excess / (2 * c))).astype(jnp.result_type(predictions))


def scale_shift_invariant_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    gradient_weight: float = 0.5,
    num_scales: int = 4,
    where: ArrayLike | None = None,
) -> Array:
    r"""The error of a depth map up to scale and shift (a loss of the set of a map's pixels).

        L = mean(r²) / 2 + α Σ_{k<K} (Σ |∂_x r_k| + Σ |∂_y r_k|) / M_k
        r = s · prediction + t - target

    with the scale s and shift t of least mean(r²), r_k every 2^k-th pixel of r along both axes, and
    M_k their number. The second term keeps edges sharp.

    Args:
      predictions: `[..., height, width]` floating point, inverse depths in any unit.
      targets: inverse depths of the same shape.
      gradient_weight: α at least 0. Default 0.5.
      num_scales: K at least 1. Default 4.
      where: boolean, broadcastable to `predictions`: the pixels that exist; a difference exists
        where both of its pixels do. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`; 0 for a map without pixels. A constant
      prediction has s = 0.

    Raises:
      ValueError: a negative `gradient_weight`, `num_scales` below 1, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to train on depth from many sources, whose scale and shift are unknown;
    `scale_invariant_loss` where they are known.

    Cost: a few passes over the map; s and t are in closed form, and each further scale takes a
    quarter of the one before.

    Example:
      >>> depth = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> print(scale_shift_invariant_loss(2 * depth + 5, depth).round(6))
      0.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Ranftl et al.'s,
    2019, arXiv:1907.01341).
    """
    check_interval(0, jnp.inf, gradient_weight=gradient_weight)
    check_interval(1, jnp.inf, num_scales=num_scales)
    prediction, target = _checked_maps(predictions, targets, where)
    x, y = (z - masked_mean(z, axis=MAP, where=where, keepdims=True) for z in (prediction, target))
    covariance = masked_mean(x * y, axis=MAP, where=where, keepdims=True)
    variance = masked_mean(jnp.square(x), axis=MAP, where=where, keepdims=True)
    scale = jnp.where(variance > 0, covariance / jnp.where(variance > 0, variance, 1.0), 0.0)
    residual = scale * x - y
    loss = masked_mean(jnp.square(residual), axis=MAP, where=where) / 2
    admitted = jnp.broadcast_to(True if where is None else where, residual.shape)
    for k in range(num_scales):
        r, exists = (z[..., :: 2**k, :: 2**k] for z in (residual, admitted))
        count = jnp.maximum(jnp.count_nonzero(exists, axis=MAP), 1)
        differences = sum(
            jnp.sum(absolute_error(difference, 0.0), axis=MAP, where=both)
            for difference, both in _differences(r, exists)
        )
        loss += gradient_weight * differences / count
    return loss.astype(jnp.result_type(predictions))


def edge_loss(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""How far the edges of a depth map are off (a loss of the set of a map's pixels).

        L = mean |∂_x e| + mean |∂_y e|,   e = prediction - target

    with differences of neighbouring pixels.

    Args:
      predictions: `[..., height, width]` floating point.
      targets: the same shape.
      where: boolean, broadcastable to `predictions`: the pixels that exist; a difference exists
        where both of its pixels do. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`; 0 for a map without neighbours.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it beside a loss of the depth itself, such as `berhu_loss`, to sharpen what that leaves
    blurred; it does not see a constant error.

    Cost: one pass over the map, with two differences a pixel.

    Example:
      >>> step = jnp.array([[0.0, 0.0, 1.0]])
      >>> print(edge_loss(step, jnp.zeros((1, 3))), edge_loss(step + 5, step))
      0.5 0.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked_maps(predictions, targets, where)
    admitted = jnp.broadcast_to(True if where is None else where, prediction.shape)
    loss = sum(
        masked_mean(absolute_error(difference, 0.0), axis=MAP, where=both)
        for difference, both in _differences(prediction - target, admitted)
    )
    return jnp.asarray(loss).astype(jnp.result_type(predictions))


def disparity_smoothness_loss(
    disparities: ArrayLike, images: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""How rough a disparity map is off its image's edges (a loss of the set of a map's pixels).

        L = mean(|∂_x d| exp(-|∂_x I|)) + mean(|∂_y d| exp(-|∂_y I|))

    with differences of neighbouring pixels, and |∂ I| the mean over the image's channels.

    Args:
      disparities: d `[..., height, width]` floating point. Those of different scales compare when
        each is divided by its mean first.
      images: I `[..., height, width, channels]`, in units in which an edge is about 1.
      where: boolean, broadcastable to `disparities`: the pixels that exist; a difference exists
        where both of its pixels do. Default: all.

    Returns:
      `[...]` losses in the type of `disparities`; 0 for a map without neighbours.

    Raises:
      ValueError: shapes that do not match.
      TypeError: disparities that are not floating point.

    Use it beside `photometric_loss`, which says nothing where the image has no texture, with a
    weight of about 0.001 to 0.1.

    Cost: one pass over map and image, with two exponentials a pixel.

    Example:
      >>> step, image = jnp.array([[0.0, 1.0]]), jnp.array([[[0.0], [1.0]]])
      >>> print(disparity_smoothness_loss(step, image).round(3))
      0.368

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Godard, Mac Aodha,
    Brostow's, 2016, arXiv:1609.03677).
    """
    check_floating(disparities=disparities)
    shape = _checked_map_shape(disparities=disparities)
    if jnp.ndim(images) != len(shape) + 1 or jnp.shape(images)[:-1] != shape:
        raise ValueError(f"images must have shape {(*shape, 'channels')}, got {jnp.shape(images)}")
    check_broadcastable(shape, where=where)
    dtype = compute_dtype(disparities)
    admitted = jnp.broadcast_to(True if where is None else where, shape)
    d = jnp.where(admitted, jnp.asarray(disparities).astype(dtype), 0.0)
    image = jnp.where(admitted[..., None], jnp.asarray(images).astype(dtype), 0.0)
    channels = jnp.moveaxis(image, -1, 0)
    loss = sum(
        masked_mean(
            absolute_error(slope, 0.0) * jnp.exp(-jnp.mean(absolute_error(edges, 0.0), axis=0)),
            axis=MAP,
            where=both,
        )
        for (slope, both), (edges, _) in zip(
            _differences(d, admitted), _differences(channels, admitted)
        )
    )
    return jnp.asarray(loss).astype(jnp.result_type(disparities))


def left_right_consistency_loss(left_disparities: ArrayLike, right_disparities: ArrayLike) -> Array:
    r"""How far two views' disparities disagree (a loss of the set of a map's pixels).

        L = mean |l(x) - r(x - l(x))| + mean |r(x) - l(x + r(x))|

    A pixel at column x of the left view is seen at x - l(x) in the right one. Between columns the
    maps are interpolated, and beyond their ends continued.

    Args:
      left_disparities: l `[..., height, width]` floating point, in pixels.
      right_disparities: r, the same shape.

    Returns:
      `[...]` losses in the type of `left_disparities`, in pixels.

    Raises:
      ValueError: shapes that differ or have less than two axes.
      TypeError: disparities that are not floating point.

    Use it beside `photometric_loss` where both views' disparities are predicted from one of them;
    `disparity_smoothness_loss` needs one view alone.

    Cost: four gathers along the rows, two for each map.

    Example:
      >>> left = jnp.full((2, 8), 3.0)
      >>> print(left_right_consistency_loss(left, left + 1))
      2.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Godard, Mac Aodha,
    Brostow's, 2016, arXiv:1609.03677).
    """
    check_floating(left_disparities=left_disparities, right_disparities=right_disparities)
    check_shape(
        _checked_map_shape(left_disparities=left_disparities), right_disparities=right_disparities
    )
    dtype = compute_dtype(left_disparities, right_disparities)
    left, right = (jnp.asarray(x).astype(dtype) for x in (left_disparities, right_disparities))
    columns = jnp.arange(left.shape[-1], dtype=dtype)
    of_left = absolute_error(left, _at_columns(right, columns - left))
    of_right = absolute_error(right, _at_columns(left, columns + right))
    return jnp.mean(of_left + of_right, axis=MAP).astype(jnp.result_type(left_disparities))


def ssim_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    max_value: float = 1.0,
    window_size: int = 11,
    sigma: float | None = 1.5,
) -> Array:
    r"""What two images lack of structural similarity (a loss of the set of an image's pixels).

        L = 1 - SSIM

    Args:
      predictions: `[..., height, width, channels]` floating point.
      targets: the same shape.
      max_value: above 0, the range of the values. Default 1.
      window_size: odd, in pixels. Default 11.
      sigma: above 0, the width of the Gaussian that weighs the window's pixels; None weighs them
        evenly. Default 1.5.

    Returns:
      `[...]` losses from 0 to 2 in the type of `predictions`.

    Raises:
      ValueError: a `window_size` that is not odd or exceeds the images, `max_value` or `sigma` not
        positive, or shapes that differ or have less than three axes.
      TypeError: predictions that are not floating point.

    Use it for images or maps that should look alike; it sees little of a constant that is added,
    wherefore it goes with `absolute_error`, as in `photometric_loss`.

    Cost: five window means of the images, each of 2 · `window_size` multiplications a value.

    Example:
      >>> image = jnp.arange(256.0).reshape(16, 16, 1) / 256
      >>> print(ssim_loss(image, image), ssim_loss(image, 1 - image) > 1)
      0.0 True

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (SSIM is Wang, Bovik, Sheikh,
    Simoncelli's, 2004).
    """
    check_floating(predictions=predictions)
    wide = jnp.asarray(predictions).astype(compute_dtype(predictions))
    ssim = structural_similarity(
        wide, targets, max_value=max_value, window_size=window_size, sigma=sigma
    )
    return (1 - ssim).astype(jnp.result_type(predictions))


def photometric_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    ssim_weight: float = 0.85,
    max_value: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""How unlike an image and its reconstruction are at each pixel.

        L = α (1 - SSIM) / 2 + (1 - α) |prediction - target| / max_value,   α = ssim_weight

    as means over the channels, with SSIM in even windows of 3 by 3 pixels, and images continued by
    their reflection.

    Args:
      predictions: `[..., height, width, channels]` floating point, at least 2 by 2 pixels: the
        image that the predicted depth reconstructs from another view.
      targets: the same shape.
      ssim_weight: α in [0, 1]. Default 0.85.
      max_value: above 0, the range of the values. Default 1.
      where: boolean, broadcastable to `[..., height, width]`: the pixels that exist; the others
        have loss 0, and count as equal in the windows of their neighbours. Default: all.

    Returns:
      `[..., height, width]` losses in the type of `predictions`.

    Raises:
      ValueError: `ssim_weight` outside of [0, 1], `max_value` not positive, or shapes that do not
        match.
      TypeError: predictions that are not floating point.

    Use it to learn depth from views alone, with `disparity_smoothness_loss`;
    `minimum_reprojection_loss` takes the best of several views.

    Cost: five means in windows of 3 by 3 pixels, and one pass beside them.

    Example:
      >>> image = jnp.full((4, 4, 3), 0.5)
      >>> print(photometric_loss(image, image).max(), photometric_loss(image, 0 * image).shape)
      0.0 (4, 4)

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Godard, Mac Aodha,
    Brostow's, 2016, arXiv:1609.03677).
    """
    check_floating(predictions=predictions)
    check_interval(0, 1, ssim_weight=ssim_weight)
    check_shape(jnp.shape(predictions), targets=targets)
    check_broadcastable(jnp.shape(predictions)[:-1], where=where)
    dtype = compute_dtype(predictions)
    a, b = (jnp.asarray(x).astype(dtype) for x in (predictions, targets))
    if where is not None:
        admitted = jnp.broadcast_to(where, a.shape[:-1])
        a, b = (jnp.where(admitted[..., None], x, 0.0) for x in (a, b))
    ssim = structural_similarity_map(
        a, b, max_value=max_value, window_size=3, sigma=None, reflect=True
    )
    unlike = jnp.clip((1 - ssim) / 2, 0, 1)
    error = absolute_error(a, b) / max_value
    loss = jnp.mean(ssim_weight * unlike + (1 - ssim_weight) * error, axis=-1)
    if where is not None:
        loss = jnp.where(admitted, loss, 0.0)
    return loss.astype(jnp.result_type(predictions))


def minimum_reprojection_loss(
    predictions: Sequence[ArrayLike],
    targets: ArrayLike,
    *,
    sources: Sequence[ArrayLike] | None = None,
    ssim_weight: float = 0.85,
    max_value: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""The photometric loss of the view that shows a pixel best, of several.

        L = μ min_k pe(prediction_k, target),   μ = 1[min_k pe(prediction_k) < min_k pe(source_k)]

    with pe the `photometric_loss`. A pixel that is hidden in one view counts in another. The mask μ
    takes out pixels that match without any warp, as those of objects that move with the camera.

    Args:
      predictions: K images `[..., height, width, channels]` floating point: the reconstructions of
        the target from each of the views.
      targets: the same shape.
      sources: the K views themselves, for the mask μ. Default: μ = 1.
      ssim_weight: in [0, 1]. Default 0.85.
      max_value: above 0, the range of the values. Default 1.
      where: boolean, broadcastable to `[..., height, width]`: the pixels that exist. Default: all.

    Returns:
      `[..., height, width]` losses in the type of the first of `predictions`.

    Raises:
      ValueError: no prediction, `ssim_weight` outside of [0, 1], `max_value` not positive, or
        shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for depth from video, with the frames before and after as views; for one view it is
    `photometric_loss`.

    Cost: K times `photometric_loss`, and 2 K times with `sources`; all K maps of losses in memory.

    Example:
      >>> image = jnp.full((4, 4, 3), 0.5)
      >>> print(minimum_reprojection_loss([0 * image, image], image).max())
      0.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (the loss is Godard et al.'s,
    2018, arXiv:1806.01260).
    """

    def least(images: Sequence[ArrayLike]) -> Array:
        losses = [
            photometric_loss(
                image, targets, ssim_weight=ssim_weight, max_value=max_value, where=where
            )
            for image in images
        ]
        return jnp.min(jnp.stack(losses), axis=0)

    if not len(predictions):
        raise ValueError("predictions must hold at least one image, got none")
    loss = least(predictions)
    if sources is not None:
        loss = jnp.where(loss < least(sources), loss, 0.0)
    return loss.astype(jnp.result_type(predictions[0]))


def _checked_map_shape(**maps: ArrayLike) -> tuple[int, ...]:
    ((name, value),) = maps.items()
    if jnp.ndim(value) < 2:
        raise ValueError(f"{name} must have shape [..., height, width], got {jnp.shape(value)}")
    return jnp.shape(value)


def _checked_maps(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None, fill: float = 0.0
) -> tuple[Array, Array]:
    """Both maps in the type to compute in, with `fill` at the pixels that do not exist."""
    check_floating(predictions=predictions)
    shape = _checked_map_shape(predictions=predictions)
    check_shape(shape, targets=targets)
    check_broadcastable(shape, where=where)
    dtype = compute_dtype(predictions)
    a, b = jnp.asarray(predictions).astype(dtype), jnp.asarray(targets).astype(dtype)
    return (a, b) if where is None else (jnp.where(where, a, fill), jnp.where(where, b, fill))


def _differences(x: Array, admitted: Array) -> list[tuple[Array, Array]]:
    """The differences of neighbours along both axes of a map, and where both of them exist."""
    return [
        (x[..., 1:] - x[..., :-1], admitted[..., 1:] & admitted[..., :-1]),
        (x[..., 1:, :] - x[..., :-1, :], admitted[..., 1:, :] & admitted[..., :-1, :]),
    ]


def _at_columns(maps: Array, columns: Array) -> Array:
    """Each row at fractional columns, interpolated, and beyond its ends continued."""
    columns = jnp.clip(columns, 0, maps.shape[-1] - 1)
    below = jnp.floor(columns)
    index = below.astype(jnp.int32)
    after = jnp.minimum(index + 1, maps.shape[-1] - 1)
    low, high = (jnp.take_along_axis(maps, i, axis=-1) for i in (index, after))
    return low + (columns - below) * (high - low)
