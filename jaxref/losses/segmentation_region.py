"""Region losses of segmentation beyond overlap: rates, Wasserstein, Lovász, information, t."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName
from jaxref.losses.segmentation import (
    Axes,
    binary_targets,
    masked_pair,
    pixel_mask,
    ratio_or_zero,
    set_axes,
    set_sums,
)


def sensitivity_specificity_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    sensitivity_weight: float = 0.05,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Weighted mean square errors of the positives and of the negatives (a loss of the set).

        L = w Σ (y - p)² y / Σ y + (1 - w) Σ (y - p)² (1 - y) / Σ (1 - y),   w = sensitivity_weight

    For predictions of 0 and 1 the two means are one minus the sensitivity and one minus the
    specificity. The overlap losses ignore true negatives; here each kind of entry is averaged by
    itself, however many there are.

    Args:
      probabilities: p, floating point in [0, 1] of any shape.
      targets: y, of the shape of `probabilities`, in [0, 1]; or class ids of that shape without its
        last axis.
      sensitivity_weight: w in [0, 1]. Default 0.05, which the method's paper found best for lesions
        that are a small part of the image.
      reduce_axes: the axes of the set. Default: all.
      where: boolean, broadcastable to `probabilities`: the entries that count.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`. A kind that the
      set has no entry of adds nothing.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a weight outside [0, 1].
      TypeError: probabilities that are not floating point.

    Use it where the two rates are what is traded; `tversky_loss` trades precision against recall.

    Cost: one pass over the probabilities; four sums a set, which shards exchange.

    Example:
      >>> probabilities, targets = jnp.array([0.8, 0.6, 0.1, 0.0]), jnp.array([1, 1, 0, 0])
      >>> print(sensitivity_specificity_loss(probabilities, targets, sensitivity_weight=0.5))
      0.0525

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391 (its equation lacks a sign), after Brosch et al., "Deep
    Convolutional Encoder Networks for Multiple Sclerosis Lesion Segmentation", 2015.
    """
    check_interval(0, 1, sensitivity_weight=sensitivity_weight)
    p, y, exists = masked_pair(probabilities, targets, where)
    square = jnp.square(y - p)
    positives, negatives = y, exists - y
    sums = set_sums(
        (square * positives, positives, square * negatives, negatives), reduce_axes, axis_name
    )
    misses, alarms = ratio_or_zero(*sums[:2]), ratio_or_zero(*sums[2:])
    loss = sensitivity_weight * misses + (1 - sensitivity_weight) * alarms
    return loss.astype(jnp.result_type(probabilities))


def generalized_wasserstein_dice_loss(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    distance_matrix: ArrayLike,
    background: int = 0,
    reduce_axes: Axes | None = None,
    smooth: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Dice loss in which a confusion costs the distance of the two classes (a loss of the set).

    With a distance M between classes, largest entry 1, the mass that pixel n has to move to become
    its label l is W_n, and the background b does not count as found:

        W_n = Σ_c M[l_n, c] p_nc,   TP = Σ_n M[l_n, b] (1 - W_n)
        L = 1 - (2 TP + s) / (2 TP + Σ_n W_n + s),   s = smooth

    Two classes at distance 1 give the Dice loss of the foreground.

    Args:
      probabilities: p `[..., classes]`, floating point, the last axis a distribution.
      labels: integer ids `[...]`, or distributions of the shape of `probabilities` (expectations
        over the label). An id that is no class makes the sets that it belongs to NaN.
      distance_matrix: M `[classes, classes]`, not negative, 0 on the diagonal; divided by its
        largest entry. The paper sets it by hand, from a tree of the classes.
      background: b, the id of the class that true positives are not counted of. Default 0.
      reduce_axes: the axes of `labels` that make up a set. Default: all.
      smooth: s at least 0. Default 1.
      where: boolean, broadcastable to `[...]`: the pixels that count.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`; 0 for a set
      without pixels.

    Raises:
      ValueError: shapes that do not match, a distance matrix that is none, a background that is no
        class, axes that are not there, or a negative `smooth`.
      TypeError: probabilities that are not floating point, or labels of a type that is neither.

    Use it where some confusions are worse than others (left for right kidney, tumour for its own
    core); `dice_loss` treats all alike.

    Cost: classes² multiplications a pixel; two sums a set, which shards exchange.

    Example:
      >>> near = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.2], [1.0, 0.2, 0.0]])
      >>> wrong_core = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
      >>> loss = generalized_wasserstein_dice_loss(
      ...     wrong_core, jnp.array([0, 1]), distance_matrix=near, smooth=0.0
      ... )
      >>> print(loss.round(4))
      0.1111

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Fidon et al., "Generalised Wasserstein Dice Score for
    Imbalanced Multi-class Segmentation using Holistic Convolutional Networks", 2017,
    arXiv:1707.00478.
    """
    check_interval(0, jnp.inf, smooth=smooth)
    where = pixel_mask(where, jnp.shape(probabilities))
    q = label_distribution(labels, probabilities, where=where)
    p = jnp.asarray(probabilities).astype(q.dtype)
    p = p if where is None else jnp.where(where, p, 0.0)
    classes = p.shape[-1]
    check_shape((classes, classes), distance_matrix=distance_matrix)
    check_interval(0, jnp.inf, distance_matrix=distance_matrix)
    if not 0 <= background < classes:
        raise ValueError(f"background must be one of {classes} classes, got {background}")
    distance = jnp.asarray(distance_matrix).astype(q.dtype)
    if not isinstance(distance, jax.core.Tracer) and np.diagonal(distance).any():
        raise ValueError("distance_matrix must be 0 on its diagonal")
    distance = ratio_or_zero(distance, jnp.max(distance))
    to_move = jnp.einsum("...l,lc,...c->...", q, distance, p)
    found = (q @ distance[:, background]) * (1 - to_move)
    errors, true_positives = set_sums((to_move, found), reduce_axes, axis_name)
    loss = ratio_or_zero(errors, 2 * true_positives + errors + smooth)
    return loss.astype(jnp.result_type(probabilities))


def lovasz_softmax_loss(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    only_present: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The convex extension of the Jaccard loss, mean over the classes (a loss of the set).

    The Jaccard loss J of a class is a function of the set of its mispredicted pixels. Its Lovász
    extension is piecewise linear in the errors m_n = |y_n - p_n|: in falling order of the errors,

        L = Σ_i m_(i) [J({(1) ... (i)}) - J({(1) ... (i-1)})]

    It equals J, one minus the intersection over union, wherever the predictions are 0 or 1, and is
    the tightest convex function of the errors that does.

    Args:
      probabilities: p `[..., classes]`, floating point in [0, 1], after a softmax. All pixels given
        are one set; take `jax.vmap` for one set per image.
      labels: integer ids `[...]`, or one-hot arrays of the shape of `probabilities`. An id that is
        no class gives NaN.
      only_present: whether the mean is over the classes that have a pixel (the default), or over
        all. A class without any has the largest of its probabilities for its loss.
      where: boolean, broadcastable to `probabilities`: the entries that count.
      axis_name: name or names of mapped axes over whose shards the set is spread; all of its errors
        are then gathered.

    Returns:
      A scalar in [0, 1] in the type of `probabilities`; 0 without entries.

    Raises:
      ValueError: shapes that do not match.
      TypeError: probabilities that are not floating point.

    Use it to fine-tune for mean intersection over union, with cross-entropy beside it;
    `jaccard_loss` needs no sort, and is that measure only on hard predictions.

    Cost: a sort of all n pixels for each class, O(C n log n) for C classes, of all shards.

    Example:
      >>> probabilities = jnp.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
      >>> print(lovasz_softmax_loss(probabilities, jnp.array([0, 1, 1])).round(4))
      0.5

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Berman, Triki, Blaschko, "The Lovász-Softmax loss: A
    tractable surrogate for the optimization of the intersection-over-union measure in neural
    networks", 2017, arXiv:1705.08790.
    """
    p, y, exists = masked_pair(probabilities, labels, where)
    if p.ndim == 0:
        raise ValueError("probabilities must have shape [..., classes], got a scalar")
    exists = jnp.broadcast_to(exists, p.shape)
    columns = [x.reshape(-1, p.shape[-1]) for x in (jnp.abs(y - p), y, exists)]
    errors, positives, exists = gathered(columns, axis_name)
    losses = jax.vmap(_lovasz_extension, in_axes=1)(errors, positives, exists)
    counted = jnp.any((positives if only_present else exists) > 0, axis=0)
    loss = jnp.sum(jnp.where(counted, losses, 0.0)) / jnp.maximum(jnp.sum(counted), 1)
    # An id that is no class is nowhere positive; its NaN must not be taken for an absent class.
    loss = jnp.where(jnp.isnan(positives).any(), jnp.nan, loss)
    return same_on_all(loss, axis_name).astype(jnp.result_type(probabilities))


def lovasz_hinge_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The Lovász extension of the Jaccard loss on hinge errors, for two classes (of the set).

        m_n = max(0, 1 - z_n (2 y_n - 1)),   L = Σ_i m_(i) [J({(1) ... (i)}) - J({(1) ... (i-1)})]

    as `lovasz_softmax_loss`, of the foreground and with errors of the logits z. It is convex in
    them, and 0 where every pixel is right by a margin of 1.

    Args:
      logits: z, floating point of any shape, all one set; take `jax.vmap` for one set per image.
      targets: y of the shape of `logits`, 0 or 1.
      where: boolean, broadcastable to `logits`: the pixels that count.
      axis_name: name or names of mapped axes over whose shards the set is spread; all of its errors
        are then gathered.

    Returns:
      A scalar at least 0 in the type of `logits`; 0 without pixels.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point.

    Use it for one foreground class; with several, or beside a softmax, `lovasz_softmax_loss`.

    Cost: one sort of all n pixels, O(n log n), of all shards.

    Example:
      >>> print(lovasz_hinge_loss(jnp.array([2.0, 0.5, -3.0]), jnp.array([1, 1, 0])))
      0.25

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Berman, Triki, Blaschko, "The Lovász-Softmax loss: A
    tractable surrogate for the optimization of the intersection-over-union measure in neural
    networks", 2017, arXiv:1705.08790.
    """
    check_floating(logits=logits)
    check_shape(jnp.shape(logits), targets=targets)
    z, y, exists = masked_pair(logits, targets, where)
    exists = jnp.broadcast_to(exists, z.shape)
    rows = [x.reshape(-1) for x in (1 - z * (2 * y - 1), y, exists)]
    margins, positives, exists = gathered(rows, axis_name)
    loss = _lovasz_extension(jax.nn.relu(margins), positives, exists)
    return same_on_all(loss, axis_name).astype(jnp.result_type(logits))


def region_mutual_information_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    radius: int = 3,
    pool_size: int = 4,
    cross_entropy_weight: float = 0.5,
    epsilon: float = 5e-4,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy and a bound on the mutual information of neighbourhoods, per image.

    Each pixel stands for the d = radius² values around it, in the labels (Y) and in the predicted
    probabilities (P) of a class. With the scatter matrices Σ of these points over the image, what
    of Y a linear prediction from P leaves open bounds their mutual information from below:

        M = Σ_YY - Σ_YP (Σ_PP + ε I)⁻¹ Σ_PY,   R = Σ_classes log det(M + ε I) / (2 d)
        L = λ BCE + (1 - λ) R,   λ = cross_entropy_weight

    BCE is the binary cross-entropy, summed over the classes and averaged over the pixels. R has no
    lower bound but that of ε; only its differences mean something.

    Args:
      logits: `[batch, height, width, classes]` floating point; each class has its own sigmoid.
      labels: integer ids `[batch, height, width]`, or targets of the shape of `logits`. An id that
        is no class gives its image NaN.
      radius: the side of the neighbourhood, at least 1. Default 3.
      pool_size: both maps are first averaged over squares of this side, at least 1. Default 4, as
        in the authors' training; 1 leaves them as they are.
      cross_entropy_weight: λ in [0, 1]. Default 1/2.
      epsilon: ε above 0. Default 5e-4.
      where: boolean, broadcastable to `[batch, height, width]`: the pixels that count. Others are 0
        in both maps.

    Returns:
      `[batch]` losses in the type of `logits`; 0 for an image without pixels. Derivatives beyond
      the first leave out how the linear prediction moves.

    Raises:
      ValueError: shapes that do not match, images smaller than a neighbourhood after pooling, or a
        hyperparameter out of its range.
      TypeError: logits that are not floating point.

    Use it where thin structures and edges matter and neighbours should agree with the labels in
    pattern; the losses by pixel treat each by itself.

    Cost: two QR factorizations for each class, O(n d²) time and n·d memory for n pixels after
    pooling.

    Example:
      >>> labels = (jnp.arange(12) > 5)[None, :, None] * jnp.ones((1, 12, 12), int)
      >>> right = 8.0 * jax.nn.one_hot(labels, 2) - 4
      >>> values = [region_mutual_information_loss(z, labels, pool_size=1) for z in (right, -right)]
      >>> print(values[0] < values[1])
      [ True]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Zhao, Wang, Yang, Cai, "Region Mutual Information Loss
    for Semantic Segmentation", 2019, arXiv:1910.12037.
    """
    check_floating(logits=logits)
    check_interval(1, jnp.inf, radius=radius, pool_size=pool_size)
    check_interval(0, 1, cross_entropy_weight=cross_entropy_weight)
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)
    z = jnp.asarray(logits).astype(compute_dtype(logits))
    if z.ndim != 4:
        raise ValueError(f"logits must have shape [batch, height, width, classes], got {z.shape}")
    exists = pixel_mask(where, z.shape)
    if exists is None:
        exists = jnp.ones((*z.shape[:3], 1), bool)
    y = jnp.where(exists, binary_targets(labels, z), 0.0)
    z = jnp.where(exists, z, 0.0)
    p = jnp.where(exists, jax.nn.sigmoid(z), 0.0)
    bce = -y * jax.nn.log_sigmoid(z) - (1 - y) * jax.nn.log_sigmoid(-z)
    pixels = jnp.sum(exists, axis=(1, 2, 3))
    mean_bce = jnp.sum(bce, axis=(1, 2, 3), where=exists) / jnp.maximum(pixels, 1)
    predicted, actual = (_neighbourhoods(_average_pool(x, pool_size), radius) for x in (p, y))
    region = jnp.sum(_half_log_det_unexplained(actual, predicted, epsilon), axis=-1) / radius**2
    loss = cross_entropy_weight * mean_bce + (1 - cross_entropy_weight) * region
    return jnp.where(pixels > 0, loss, 0.0).astype(jnp.result_type(logits))


def robust_t_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    nu: ArrayLike = 1.0,
    reduce_axes: Axes | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Negative log-likelihood of an image's errors under a Student-t distribution (of the set).

    With the D errors e of an image as one point, the identity as scale matrix and ν = nu,

        L = log Γ(ν/2) - log Γ((ν + D)/2) + (D/2) log(π ν) + ((ν + D)/2) log(1 + |e|² / ν)

    An image whose labels are wrong has a large |e|²; its gradient (ν + D) e / (ν + |e|²) falls with
    it, where the mean squared error's, the limit of ν → ∞, grows. ν can be learned: then it is how
    much the labels are believed.

    Args:
      predictions: floating point, of any shape, usually probabilities.
      targets: of the shape of `predictions`, in [0, 1].
      nu: ν above 0, broadcastable to the result. To learn it, pass `jnp.exp` of a parameter that
        starts at 0. Default 1.
      reduce_axes: the axes of an image. Default: all but the first.
      where: boolean, broadcastable to `predictions`: the pixels that count; D is their number.

    Returns:
      Losses with the axes that are left, in the type of `predictions`; 0 without pixels. They are
      of the order of D, so that float32 resolves an image of 256² to about 0.02; the gradient is
      not affected.

    Raises:
      ValueError: shapes that do not match, axes that are not there, or a `nu` that is not positive.
      TypeError: predictions that are not floating point.

    Use it for labels that are noisy by whole images, with one learned ν for all of the data.

    Cost: one pass over the predictions; a sum for each image.

    Example:
      >>> predictions, targets = jnp.array([[0.9, 0.2], [0.1, 0.9]]), jnp.array([[1, 0], [1, 0]])
      >>> print(robust_t_loss(predictions, targets).round(2))
      [1.91 3.28]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Gonzalez-Jimenez et al., "Robust T-Loss for Medical
    Image Segmentation", 2023, arXiv:2306.00753.
    """
    check_interval(0, jnp.inf, closed="right", nu=nu)
    check_shape(jnp.shape(predictions), targets=targets)
    p, y, exists = masked_pair(predictions, targets, where)
    axes = set_axes(tuple(range(1, p.ndim)) if reduce_axes is None else reduce_axes, p.ndim)
    square = jnp.sum(jnp.square(p - y), axis=axes)
    size = jnp.sum(jnp.broadcast_to(exists, p.shape), axis=axes)
    nu = jnp.asarray(nu).astype(p.dtype)
    half = (nu + size) / 2
    log_normaliser = jax.lax.lgamma(nu / 2) - jax.lax.lgamma(half)
    loss = log_normaliser + size / 2 * jnp.log(jnp.pi * nu) + half * jnp.log1p(square / nu)
    return jnp.where(size > 0, loss, 0.0).astype(jnp.result_type(predictions))


def gathered(columns: list[Array], axis_name: AxisName | None) -> list[Array]:
    """Arrays `[n, ...]` with the rows of all shards, in their order."""
    if axis_name is None:
        return columns
    return [jax.lax.all_gather(x, axis_name, tiled=True) for x in columns]


def same_on_all(value: Array, axis_name: AxisName | None) -> Array:
    """A value that every shard has computed from gathered rows, marked as being the same."""
    return value if axis_name is None else jax.lax.pmean(value, axis_name)


def _lovasz_extension(errors: Array, positives: Array, exists: Array) -> Array:
    """Σ_i m_(i) ΔJ_i of one class: errors, targets and which rows count, all `[n]`."""
    order = jnp.argsort(jnp.where(exists > 0, -jax.lax.stop_gradient(errors), jnp.inf))
    m, y = jnp.where(exists > 0, errors, 0.0)[order], positives[order]
    total = jnp.sum(y)
    found_before = total - jnp.cumsum(y) + y
    union = total + jnp.cumsum(1 - y)
    union_before = union - 1 + y
    # What J grows by, as a sum of positive terms. Before any error, an empty union is all found.
    similarity_before = jnp.where(
        union_before > 0, found_before / jnp.where(union_before > 0, union_before, 1.0), 1.0
    )
    growth = (y + (1 - y) * similarity_before) / union
    return jnp.sum(m * growth)


def _average_pool(x: Array, size: int) -> Array:
    """Means over squares of `[batch, height, width, classes]`, the border padded with zeros."""
    if size == 1:
        return x
    window, padding = (1, size, size, 1), (size // 2, size // 2)
    sums = jax.lax.reduce_window(
        x, 0.0, jax.lax.add, window, window, ((0, 0), padding, padding, (0, 0))
    )
    return sums / size**2


def _neighbourhoods(x: Array, radius: int) -> Array:
    """Centred points `[batch, classes, positions, radius²]` from `[batch, h, w, classes]`."""
    height, width = (side - radius + 1 for side in x.shape[1:3])
    if min(height, width) < 1:
        raise ValueError(
            f"logits must have at least {radius} x {radius} pixels after pooling, "
            f"got {x.shape[1]} x {x.shape[2]}"
        )
    shifted = [x[:, i : i + height, j : j + width] for i in range(radius) for j in range(radius)]
    points = jnp.stack(shifted, axis=-1).reshape(x.shape[0], -1, x.shape[3], radius**2)
    return jnp.swapaxes(points - jnp.mean(points, axis=1, keepdims=True), 1, 2)


def _half_log_det_unexplained(actual: Array, predicted: Array, epsilon: float) -> Array:
    """log det(M + ε I) / 2 of centred points `[..., n, d]`.

    The scatter matrices would square what float32 has to resolve. M is instead the scatter of the
    residuals of a least-squares fit, and both steps are orthogonal factorizations of tall matrices.
    """
    d = actual.shape[-1]
    ridge = jnp.broadcast_to(
        jnp.sqrt(epsilon) * jnp.eye(d, dtype=actual.dtype), (*actual.shape[:-2], d, d)
    )
    # M is stationary in the fit, so that its gradient needs none of the fit's.
    fixed_predicted, fixed_actual = jax.lax.stop_gradient((predicted, actual))
    q, r = jnp.linalg.qr(jnp.concatenate([fixed_predicted, ridge], axis=-2))
    projected = jnp.swapaxes(q[..., : actual.shape[-2], :], -1, -2) @ fixed_actual
    fit = jax.scipy.linalg.solve_triangular(r, projected)
    residuals = [actual - predicted @ fit, ridge @ fit, ridge]
    r = jnp.linalg.qr(jnp.concatenate(residuals, axis=-2), mode="r")
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return jnp.sum(jnp.log(jnp.abs(diagonal)), axis=-1)
