"""Pixel losses of segmentation: cross-entropy of the hardest pixels, and near boundaries.

Cross-entropy itself, with weights of the classes, is `softmax_cross_entropy`; `focal_loss` turns
down the easy pixels.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName
from jaxref.losses.cross_entropy import softmax_cross_entropy
from jaxref.losses.segmentation import pixel_mask
from jaxref.losses.segmentation_region import gathered, same_on_all


def topk_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    fraction: float = 0.1,
    class_weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Mean cross-entropy of the hardest pixels (a loss of the set).

        L = (1/k) Σ_{n in K} CE_n,   K the k = max(1, round(fraction · n)) pixels of largest CE

    A fraction of 1 is the mean cross-entropy.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`. All pixels are one set; take
        `jax.vmap` for one set per image.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is no class
        gives NaN.
      fraction: in (0, 1], the share of the pixels that count. Default 0.1.
      class_weights: `[classes]`, as in `softmax_cross_entropy`. Default: 1.
      axis: the class axis.
      where: boolean, broadcastable to `[...]`: the pixels to choose from.
      axis_name: name or names of mapped axes over whose shards the set is spread; all of its losses
        are then gathered.

    Returns:
      A scalar in the type of `logits`, in nats; 0 without pixels.

    Raises:
      ValueError: shapes that do not match, or a `fraction` outside (0, 1].
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where most pixels are easy from the start, and labels are clean: wrong ones are among the
    hardest. `focal_loss` turns easy pixels down smoothly.

    Cost: a softmax over the classes and one sort of all pixels' losses, those of all shards.

    Example:
      >>> logits, labels = jnp.array([[4.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), jnp.array([0, 0, 0])
      >>> print(topk_cross_entropy(logits, labels, fraction=1 / 3).round(3))
      1.313

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Wu, Shen, van den Hengel, "Bridging Category-level and
    Instance-level Semantic Image Segmentation", 2016, arXiv:1605.06885.
    """
    check_interval(0, 1, closed="right", fraction=fraction)
    losses = _cross_entropy(logits, labels, class_weights, axis, where)
    exists = (
        jnp.ones(losses.shape, bool) if where is None else jnp.broadcast_to(where, losses.shape)
    )
    losses, exists = gathered([losses.reshape(-1), exists.reshape(-1)], axis_name)
    if losses.size == 0:
        return jnp.zeros((), jnp.result_type(logits))
    hardest = jax.lax.top_k(jnp.where(exists, losses, -1.0), losses.size)[0]
    if where is None:
        count = jnp.asarray(max(1, math.floor(fraction * losses.size + 0.5)))
    else:
        pixels = jnp.sum(exists)
        count = jnp.minimum(jnp.maximum(1, jnp.floor(fraction * pixels + 0.5)), pixels)
    chosen = jnp.sum(jnp.where(jnp.arange(losses.size) < count, hardest, 0.0))
    # An id that is no class may sort to either end.
    loss = jnp.where(jnp.isnan(losses).any(), jnp.nan, chosen / jnp.maximum(count, 1))
    return same_on_all(loss, axis_name).astype(jnp.result_type(logits))


def distance_weighted_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    proximity: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of each pixel, raised near the boundaries of the objects.

        L = (1 + Φ) CE

    with Φ = proximity, a map of the labels that is largest at their boundaries. The 1 keeps the
    gradient of pixels far from any.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is no class
        gives NaN for its pixel.
      proximity: Φ, broadcastable to `[...]`, at least 0; `boundary_proximity_map` makes it on the
        host, with the labels.
      class_weights: `[classes]`, as in `softmax_cross_entropy`. Default: 1.
      axis: the class axis.
      where: boolean, broadcastable to `[...]`: the pixels that count; others have loss 0.

    Returns:
      `[...]` losses in the type of `logits`, in nats.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where errors gather at the boundaries and a weight is enough; `boundary_loss` measures
    how far off the boundary is.

    Cost: that of a softmax over the classes; a map for each image, made once on the host.

    Example:
      >>> logits, labels = jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 0])
      >>> print(distance_weighted_cross_entropy(logits, labels, jnp.array([1.0, 0.0])).round(3))
      [0.254 0.127]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Caliva et al., "Distance Map Loss Penalty Term for
    Semantic Segmentation", 2019, arXiv:1908.03679.
    """
    losses = _cross_entropy(logits, labels, class_weights, axis, where)
    check_broadcastable(losses.shape, proximity=proximity)
    weights = 1 + jnp.asarray(proximity).astype(losses.dtype)
    return (weights * losses).astype(jnp.result_type(logits))


def _cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    class_weights: ArrayLike | None,
    axis: int,
    where: ArrayLike | None,
) -> Array:
    """Cross-entropy of each pixel in at least float32, 0 where it does not count."""
    check_floating(logits=logits)
    z = jnp.asarray(logits).astype(compute_dtype(logits))
    exists = pixel_mask(where, z.shape, axis)
    return softmax_cross_entropy(z, labels, class_weights=class_weights, axis=axis, where=exists)
