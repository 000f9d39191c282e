"""The softmax on the sphere: classes and embeddings are directions, their cosines the logits."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName
from jaxref.kernels import softmax_cross_entropy
from jaxref.losses.angular_margin import class_cosines


def normalized_softmax_logits(
    embeddings: ArrayLike, class_weights: ArrayLike, *, scale: float = 10.0
) -> Array:
    r"""Logits of a classifier on the sphere: scaled cosines with the vectors of the classes.

        z_k = s cos(e, W_k),   s = scale

    Args:
      embeddings: e `[..., features]` floating point, of any length.
      class_weights: W `[classes, features]` floating point, a vector of any length for each class.
      scale: s above 0. Default 10, the authors'; see `minimum_scale`.

    Returns:
      `[..., classes]` logits between -s and s, in the type of `embeddings`.

    Raises:
      ValueError: shapes that do not match, no class, or a `scale` that is not positive.
      TypeError: embeddings or weights that are not floating point.

    Use it to classify with what any loss on cosines has trained: their margins are for training.
    Lengths and a bias have no part in it, so that a class vector can be set without training
    (`jaxref.adaptation.imprint_class`).

    Cost: one product with the class vectors, d·C multiplications an example for C classes of d
    features.

    Example:
      >>> weights = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(normalized_softmax_logits(jnp.array([0.0, 4.0]), weights))
      [ 0. 10.]

    Reference: Pereira, Joly, Valduriez, Porto, "Hyperspherical embedding for novel class
    classification", 2021, arXiv:2102.03243.
    """
    check_interval(0, jnp.inf, closed="right", scale=scale)
    cosines = class_cosines(embeddings, class_weights)
    return (scale * cosines).astype(jnp.result_type(embeddings))


def normalized_softmax_loss(
    embeddings: ArrayLike,
    class_weights: ArrayLike,
    labels: ArrayLike,
    *,
    scale: float = 10.0,
    where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Softmax cross-entropy of scaled cosines, without margin.

        L = -s cos(e, W_y) + log Σ_k exp(s cos(e, W_k)),   s = scale

    Args:
      embeddings: e `[..., features]` floating point, of any length.
      class_weights: W `[classes, features]` floating point, a vector of any length for each class.
      labels: y, integer ids `[...]`, or distributions `[..., classes]`. An id that is not an
        admitted class gives NaN for its example.
      scale: s above 0. Default 10, the authors'; see `minimum_scale`.
      where: boolean, broadcastable to `[..., classes]`; classes to admit. Default: all.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `class_weights`, `where` and distributions are then of the shard's own
        classes, and ids count the classes of all shards.

    Returns:
      `[...]` losses in the type of `embeddings`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, no class, or a `scale` that is not positive.
      TypeError: embeddings or weights that are not floating point, or labels that are neither.

    Use it as the plainest loss of the sphere: it needs no pairs, and classes of which it has seen
    nothing can be added later. `cosface_loss` and `arcface_loss` also ask for a margin.

    Cost: one product with the class vectors and a softmax; memory of n·C logits for n examples, C
    classes.

    Example:
      >>> weights = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(normalized_softmax_loss(jnp.array([3.0, 4.0]), weights, jnp.array(1)).round(4))
      0.1269

    Reference: Pereira, Joly, Valduriez, Porto, "Hyperspherical embedding for novel class
    classification", 2021, arXiv:2102.03243.
    """
    check_interval(0, jnp.inf, closed="right", scale=scale)
    cosines = class_cosines(embeddings, class_weights)
    losses = softmax_cross_entropy(scale * cosines, labels, where=where, axis_name=class_axis_name)
    return losses.astype(jnp.result_type(embeddings))


def minimum_scale(num_classes: int, probability: ArrayLike) -> Array:
    r"""The least scale of the cosines at which all classes can reach a probability at once.

        s = (C - 1) / C · log((C - 1) p / (1 - p)),   p = probability, C = num_classes

    Logits are at most s, so that the softmax cannot come near 1 where s is small. The best that all
    C classes can have together is 1 / (1 + (C - 1) exp(-s C / (C - 1))), with class vectors at the
    corners of a simplex; this is its inverse.

    Args:
      num_classes: C at least 2.
      probability: p `[...]` in (0, 1).

    Returns:
      `[...]` scales in at least float32, at least 0, which is enough for any p up to 1 / C.

    Raises:
      ValueError: `num_classes` below 2, or a probability outside of (0, 1).

    Use it to choose the scale of `normalized_softmax_loss`: the loss of a perfect embedding is
    -log p. Fewer than C - 1 features cannot hold the simplex, and need more.

    Cost: a closed formula.

    Example:
      >>> print(minimum_scale(1000, 0.99).round(2))
      11.49

    Reference: Pereira, Joly, Valduriez, Porto, "Hyperspherical embedding for novel class
    classification", 2021, arXiv:2102.03243.
    """
    check_interval(2, jnp.inf, num_classes=num_classes)
    check_interval(0, 1, closed="neither", probability=probability)
    p = jnp.asarray(probability, compute_dtype(probability))
    scale = (num_classes - 1) / num_classes * (jnp.log((num_classes - 1) * p) - jnp.log1p(-p))
    return jnp.maximum(scale, 0)
