"""Boundary losses of segmentation that move a predicted boundary, or the features along one."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.segmentation import masked_pair, ratio_or_zero

# Down, up, left, right, and the diagonals: where a boundary pixel can move. Of equally near ones
# the first counts.
_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (-1, 1), (1, 1), (-1, -1), (1, -1))


def active_boundary_loss(
    logits: ArrayLike,
    boundary_distance: ArrayLike,
    *,
    truncation: float = 20.0,
    label_smoothing: float = 0.2,
    max_boundary_fraction: float = 0.01,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Cross-entropy of the direction in which predicted boundaries have to move (of the set).

    A pixel is on the predicted boundary if its class probabilities differ most from those below
    and to the right of it (KL divergence, at most the share `max_boundary_fraction` of an image),
    or is next to such a pixel. With M the distance to the true boundary, the direction g_i of pixel
    i is that of the neighbour of smallest M; a pixel that has it itself is left out. The predicted
    direction is a softmax over the 8 neighbours j of how much they differ from pixel i:

        L = mean over i of min(M_i, θ) / θ · CE(softmax_j KL(p_j || p_i), g_i),   θ = truncation

    so that the difference is raised in the direction of the true boundary, and lowered elsewhere.
    The neighbours' probabilities have no gradient here, which keeps conflicting pulls apart.

    Args:
      logits: `[batch, height, width, classes]` floating point.
      boundary_distance: M `[batch, height, width]`, at least 0, from `label_boundary_distance` on
        the host.
      truncation: θ above 0, from which distance on all count alike. Default 20 pixels.
      label_smoothing: in [0, 1], the mass of the target spread over the 7 other directions.
        Default 0.2.
      max_boundary_fraction: in (0, 1]. Default 0.01.
      where: boolean, broadcastable to `[batch, height, width]`: the pixels that count.
      axis_name: name or names of mapped axes over whose shards the batch is spread.

    Returns:
      A scalar at least 0 in the type of `logits`; 0 where no pixel has to move.

    Raises:
      ValueError: shapes that do not match, or a hyperparameter out of its range.
      TypeError: logits that are not floating point.

    Use it beside cross-entropy and a Lovász loss, once segments are roughly in place;
    `boundary_loss` pulls on the regions instead.

    Cost: ten divergences over the classes for each pixel, and a selection of the largest changes of
    each image; distances from the host.

    Example:
      >>> from jaxref.losses import label_boundary_distance
      >>> labels = jnp.tile(jnp.arange(10) > 6, (1, 10, 1)).astype(int)
      >>> distance = label_boundary_distance(labels)
      >>> for step in (0, -3):
      ...     logits = 4 * jax.nn.one_hot(jnp.roll(labels, step, axis=2), 2)
      ...     print(active_boundary_loss(logits, distance, max_boundary_fraction=0.5).round(2))
      0.0
      0.12

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Wang et al., "Active Boundary Loss for Semantic
    Segmentation", 2021, arXiv:2102.02696.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, closed="right", truncation=truncation)
    check_interval(0, 1, label_smoothing=label_smoothing)
    check_interval(0, 1, closed="right", max_boundary_fraction=max_boundary_fraction)
    z = jnp.asarray(logits).astype(compute_dtype(logits))
    if z.ndim != 4:
        raise ValueError(f"logits must have shape [batch, height, width, classes], got {z.shape}")
    check_shape(z.shape[:3], boundary_distance=boundary_distance)
    check_broadcastable(z.shape[:3], where=where)
    exists = jnp.ones(z.shape[:3], bool) if where is None else jnp.broadcast_to(where, z.shape[:3])
    log_p = jax.nn.log_softmax(jnp.where(exists[..., None], z, 0.0))
    distance = jnp.asarray(boundary_distance).astype(z.dtype)
    boundary = _predicted_boundary(jax.lax.stop_gradient(log_p), exists, max_boundary_fraction)
    beyond = jnp.pad(distance, ((0, 0), (1, 1), (1, 1)), constant_values=jnp.inf)
    around = jnp.stack([_shifted(beyond, *step) for step in (*_DIRECTIONS, (0, 0))], axis=-1)
    direction = jnp.argmin(around, axis=-1)
    moves = boundary & exists & (direction < 8)
    edge = jnp.pad(jax.lax.stop_gradient(log_p), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    scores = [_kl_divergence(_shifted(edge, *step), log_p) for step in _DIRECTIONS]
    log_directions = jax.nn.log_softmax(jnp.stack(scores, axis=-1))
    is_direction = direction[..., None] == jnp.arange(8)
    target = jnp.where(is_direction, 1 - label_smoothing, label_smoothing / 7)
    cross_entropy = -jnp.sum(target * log_directions, axis=-1)
    losses = jnp.minimum(distance, truncation) / truncation * cross_entropy
    sums = [jnp.sum(losses, where=moves), jnp.sum(moves, dtype=losses.dtype)]
    sums = sum_over_shards(sums, axis_name)
    return ratio_or_zero(*sums).astype(jnp.result_type(logits))


def inverse_form_loss(
    boundaries: ArrayLike,
    targets: ArrayLike,
    *,
    transform_network: Callable[[Array, Array], Array],
    tile_size: int | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""How far a transform between predicted and true boundary maps is from the identity.

        L = mean over the tiles of |θ - I|_F,   θ = transform_network(predicted tile, true tile)

    A network that has learned to tell the transform that relates two boundary maps (trained before,
    on true maps and warped copies of them, then frozen) judges the prediction: a boundary of the
    right form a few pixels off costs little, where the losses by pixel see nothing but errors.

    Args:
      boundaries: predicted boundary maps `[batch, height, width]`, floating point in [0, 1].
      targets: true boundary maps of that shape, in [0, 1].
      transform_network: from two arrays `[tiles, tile, tile]` to transforms `[tiles, rows,
        columns]`, such as 2 x 3 affine matrices. Its parameters are the caller's to freeze.
      tile_size: the side of the squares that the network compares, a divisor of height and width.
        Default: whole images, of whatever shape.
      where: boolean, broadcastable to `boundaries`: the pixels that count. Others are 0 in both
        maps.

    Returns:
      `[batch]` losses at least 0 in the type of `boundaries`.

    Raises:
      ValueError: shapes that do not match, a `tile_size` that is no divisor, or a network whose
        result is no matrix per tile.
      TypeError: boundaries that are not floating point.

    Use it beside the cross-entropies of labels and of boundary maps; `active_boundary_loss` needs
    no second network. The paper's other distance, along geodesics, is not here.

    Cost: a forward and a backward pass of `transform_network` over all tiles.

    Example:
      >>> def offset(a, b):  # translation of the centre of mass, in pixels
      ...     centre = lambda x: (x.sum(1) @ jnp.arange(4.0)) / x.sum((1, 2))
      ...     shift = (centre(a) - centre(b))[:, None]
      ...     return jnp.eye(2, 3) + jnp.pad(shift, ((0, 0), (2, 3))).reshape(-1, 2, 3)
      >>> lines = jnp.eye(4)[:, None, :] * jnp.ones((1, 4, 1))
      >>> print(inverse_form_loss(lines, jnp.roll(lines, -1, axis=0), transform_network=offset))
      [1. 1. 1. 3.]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Borse et al., "InverseForm: A Loss Function for
    Structured Boundary-Aware Segmentation", 2021, arXiv:2104.02745.
    """
    check_shape(jnp.shape(boundaries), targets=targets)
    maps = masked_pair(boundaries, targets, where)[:2]
    if maps[0].ndim != 3:
        raise ValueError(f"boundaries must have shape [batch, height, width], got {maps[0].shape}")
    batch, *sides = maps[0].shape
    tile = sides if tile_size is None else [tile_size, tile_size]
    if min(tile) < 1 or any(side % size for side, size in zip(sides, tile)):
        raise ValueError(f"tile_size must divide height and width {sides}, got {tile_size}")
    (rows, row), (columns, column) = ((side // size, size) for side, size in zip(sides, tile))
    split = [x.reshape(batch, rows, row, columns, column).swapaxes(2, 3) for x in maps]
    theta = transform_network(*(x.reshape(-1, row, column) for x in split))
    if theta.ndim != 3 or theta.shape[0] != batch * rows * columns:
        raise ValueError(
            f"transform_network must return one matrix for each of {batch * rows * columns} tiles, "
            f"got shape {theta.shape}"
        )
    squares = jnp.sum(jnp.square(theta - jnp.eye(theta.shape[1], theta.shape[2])), axis=(1, 2))
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    loss = jnp.mean(norms.reshape(batch, -1), axis=1)
    return loss.astype(jnp.result_type(boundaries))


def conditional_boundary_loss(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    logits: ArrayLike,
    boundary: ArrayLike,
    classifier: Callable[[Array], Array],
    window: int = 5,
    centre_weight: float = 2.0,
    classification_weight: float = 0.2,
    pair_weight: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Pulls the features of boundary pixels to their class nearby, and off others (of the set).

    Only neighbours in the window that are classified correctly count. With f_i the features of a
    boundary pixel, c_i the mean over its neighbours of the same class (its local centre), and the
    target 1 for neighbours j of the same class and 0 for others,

        L = a mean_i |f_i - c_i|² / F + b mean_i CE(classifier(c_i), y_i)
            + c mean_ij (cos(f_i, f_j) - 1[y_i = y_j])²

    over the boundary pixels that have a centre. In the first term c_i has no gradient.

    Args:
      features: f `[batch, height, width, F]` floating point, what the classifier is applied to.
      labels: integer ids `[batch, height, width]`.
      logits: `[batch, height, width, classes]`; only whose argmax is used.
      boundary: boolean `[batch, height, width]`: pixels at boundaries of the labels, some pixels
        wide.
      classifier: from features `[..., F]` to logits `[..., classes]`, the network's last layer. Its
        parameters are the caller's to freeze (`jax.lax.stop_gradient`), as the paper does.
      window: odd side of the neighbourhood, at least 3. Default 5.
      centre_weight: a at least 0. Default 2, the authors' code's, as the other two.
      classification_weight: b at least 0. Default 0.2.
      pair_weight: c at least 0. Default 1.
      where: boolean, broadcastable to `[batch, height, width]`: the pixels that count.
      axis_name: name or names of mapped axes over whose shards the batch is spread.

    Returns:
      A scalar at least 0 in the type of `features`; 0 where no boundary pixel has a centre.

    Raises:
      ValueError: shapes that do not match, an even or small window, or a negative weight.
      TypeError: features that are not floating point.

    Use it beside cross-entropy where boundaries are blurred by features that mix both sides; the
    other boundary losses see probabilities alone.

    Cost: window² - 1 passes over the features, made anew in the backward pass, so that memory does
    not grow with the window.

    Example:
      >>> labels = jnp.array([[[0, 0, 0, 1, 1, 1]]])
      >>> features = jax.nn.one_hot(labels, 2)
      >>> loss = conditional_boundary_loss(
      ...     features,
      ...     labels,
      ...     logits=features,
      ...     boundary=jnp.array([[[0, 0, 1, 1, 0, 0]]], bool),
      ...     classifier=lambda x: 100 * x,
      ... )
      >>> print(loss)
      0.0

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Wu et al., "Conditional Boundary Loss for Semantic
    Segmentation", 2023.
    """
    check_floating(features=features)
    check_interval(3, jnp.inf, window=window)
    check_interval(
        0,
        jnp.inf,
        centre_weight=centre_weight,
        classification_weight=classification_weight,
        pair_weight=pair_weight,
    )
    f = jnp.asarray(features).astype(compute_dtype(features))
    if f.ndim != 4 or window % 2 == 0:
        raise ValueError(
            "features must have shape [batch, height, width, channels] and window be odd, "
            f"got {f.shape} and {window}"
        )
    pixels = f.shape[:3]
    labels, predicted = jnp.asarray(labels), jnp.argmax(jnp.asarray(logits), axis=-1)
    check_shape(pixels, labels=labels, logits=predicted, boundary=boundary)
    check_broadcastable(pixels, where=where)
    exists = jnp.ones(pixels, bool) if where is None else jnp.broadcast_to(where, pixels)
    f = jnp.where(exists[..., None], f, 0.0)
    anchors = jnp.asarray(boundary).astype(bool) & exists
    reach = window // 2
    margin = ((0, 0), (reach, reach), (reach, reach))
    beyond = (
        jnp.pad(f, (*margin, (0, 0))),
        jnp.pad(labels, margin),
        jnp.pad((predicted == labels) & exists, margin),
    )
    offsets = jnp.asarray([i for i in range(window**2) if i != window**2 // 2])

    @jax.checkpoint  # else the backward pass keeps the features once per neighbour
    def add_neighbour(sums, offset):
        start = (0, offset // window, offset % window)
        g, label, correct = (
            jax.lax.dynamic_slice(x, (*start, 0)[: x.ndim], (*pixels, *x.shape[3:])) for x in beyond
        )
        same = label == labels
        alike, pair = correct & same, correct & anchors
        error = jnp.square(_cosine_similarity(f, g) - same)
        sums = (
            sums[0] + jnp.where(alike[..., None], g, 0.0),
            sums[1] + alike,
            sums[2] + jnp.where(pair, error, 0.0),
            sums[3] + pair,
        )
        return sums, None

    nothing = jnp.zeros_like(f[..., 0])
    (total, number, pair_error, pairs), _ = jax.lax.scan(
        add_neighbour, (jnp.zeros_like(f), nothing, nothing, nothing), offsets
    )
    anchors &= number > 0
    centres = total / jnp.maximum(number, 1)[..., None]
    pull = jnp.mean(jnp.square(f - jax.lax.stop_gradient(centres)), axis=-1)
    scores = classifier(centres)
    q = label_distribution(labels, scores, where=anchors[..., None])
    log_p = jax.nn.log_softmax(scores.astype(q.dtype))
    terms = (pull, -jnp.sum(q * log_p, axis=-1), pair_error)
    sums = [jnp.sum(term, where=anchors) for term in terms]
    counts = [jnp.sum(anchors, dtype=f.dtype), jnp.sum(pairs, where=anchors)]
    sums, counts = sum_over_shards((sums, counts), axis_name)
    loss = (
        centre_weight * ratio_or_zero(sums[0], counts[0])
        + classification_weight * ratio_or_zero(sums[1], counts[0])
        + pair_weight * ratio_or_zero(sums[2], counts[1])
    )
    return loss.astype(jnp.result_type(features))


def _kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _shifted(padded: Array, down: int, right: int) -> Array:
    """The neighbours in one direction, of an array whose axes 1 and 2 are padded by one."""
    height, width = padded.shape[1] - 2, padded.shape[2] - 2
    return padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]


def _predicted_boundary(log_p: Array, exists: Array, max_fraction: float) -> Array:
    """Pixels whose class probabilities change most to the next, and the pixels next to them."""
    change = jnp.zeros(log_p.shape[:3], log_p.dtype)
    for axis in (1, 2):
        size = log_p.shape[axis]
        here, following = (
            [jax.lax.slice_in_dim(x, *span, axis=axis) for x in (log_p, exists)]
            for span in ((0, size - 1), (1, size))
        )
        divergence = _kl_divergence(here[0], following[0])
        divergence = jnp.where(here[1] & following[1], divergence, 0.0)
        padding = [(0, 0)] * 3
        padding[axis] = (0, 1)
        change += jnp.pad(divergence, padding)
    flat = change.reshape(change.shape[0], -1)
    admitted = math.floor(max_fraction * flat.shape[1])
    threshold = jnp.full(flat.shape[:1], 1e-5, flat.dtype)
    if admitted < flat.shape[1]:
        threshold = jnp.maximum(threshold, jax.lax.top_k(flat, admitted + 1)[0][:, -1])
    changes = change > threshold[:, None, None]
    return jax.lax.reduce_window(changes, False, jax.lax.bitwise_or, (1, 3, 3), (1, 1, 1), "SAME")


def _cosine_similarity(a: Array, b: Array) -> Array:
    """Over the last axis; 0, with gradient 0, where either vector is 0."""
    squares = [jnp.sum(jnp.square(x), axis=-1) for x in (a, b)]
    defined = (squares[0] > 0) & (squares[1] > 0)
    norms = [jnp.sqrt(jnp.where(defined, square, 1.0)) for square in squares]
    return jnp.where(defined, jnp.sum(a * b, axis=-1) / norms[0] / norms[1], 0.0)
