"""Classifiers for classes that training has not seen, from a few examples of each."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import unit_vectors


def class_prototypes(
    embeddings: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""The mean embedding of each class.

        P_k = mean of e_i over y_i = k

    Args:
      embeddings: e `[examples, features]` floating point: the support set.
      labels: y, integers `[examples]`; examples of other classes than 0 ... num_classes - 1 do not
        count.
      num_classes: at least 1.
      where: boolean `[examples]`, those that count. Default: all.

    Returns:
      `[num_classes, features]` in the type of `embeddings`; 0 for a class without examples.

    Raises:
      ValueError: shapes that do not match, or `num_classes` below 1.
      TypeError: embeddings that are not floating point, or labels that are not integer.

    Use it to classify by the nearest prototype, in Euclidean distance; `novel_class_head` is for
    cosines.

    Cost: a product of num_classes · examples · features, and an embedding of each example; no
    training.

    Example:
      >>> support = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
      >>> print(class_prototypes(support, jnp.array([0, 0, 1]), 2))
      [[2. 0.]
       [0. 4.]]

    Reference: Mendez-Ruiz et al., "SuSana Distancia is all you need: Enforcing class separability
    in metric learning via two novel distance-based loss functions for few-shot image
    classification", 2023, arXiv:2305.09062.
    """
    e, labels = _checked_support(embeddings, labels, num_classes, where)
    return _means(e, labels, num_classes).astype(jnp.result_type(embeddings))


def novel_class_head(
    embeddings: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""A head on the sphere for new classes alone, without training (the disjoint scenario).

        W_k = m / |m|,   m = mean of e_i / |e_i| over y_i = k

    Args:
      embeddings: e `[examples, features]` floating point, of any length.
      labels: y, integers `[examples]`; examples of other classes than 0 ... num_classes - 1 do not
        count.
      num_classes: at least 1.
      where: boolean `[examples]`, those that count. Default: all.

    Returns:
      `[num_classes, features]` class vectors of length 1 in the type of `embeddings`, for
      `jaxref.losses.normalized_softmax_logits`; 0, with cosine 0 to everything, for a class without
      examples or one whose mean is 0.

    Raises:
      ValueError: shapes that do not match, or `num_classes` below 1.
      TypeError: embeddings that are not floating point, or labels that are not integer.

    Use it where the classes of training are not asked for any more; `imprint_class` adds to them.
    A largest cosine below a threshold says that an input is of no class.

    Cost: a product of num_classes · examples · features, and an embedding of each example; no
    training.

    Example:
      >>> support = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
      >>> print(novel_class_head(support, jnp.array([0, 0, 1]), 2))
      [[1. 0.]
       [0. 1.]]

    Reference: Pereira, Joly, Valduriez, Porto, "Hyperspherical embedding for novel class
    classification", 2021, arXiv:2102.03243.
    """
    e, labels = _checked_support(embeddings, labels, num_classes, where)
    means = _means(unit_vectors(e), labels, num_classes)
    return unit_vectors(means).astype(jnp.result_type(embeddings))


def imprint_class(class_weights: ArrayLike, embeddings: ArrayLike) -> Array:
    r"""A head on the sphere with one more class, from examples of it (the joint scenario).

        W' = (W, m / |m|),   m = mean of e_i / |e_i|

    Args:
      class_weights: W `[classes, features]` floating point, the head so far.
      embeddings: e `[examples, features]` floating point, at least one, of any length.

    Returns:
      `[classes + 1, features]` in the type of `class_weights`, whose first rows are unchanged; the
      new one is 0 where the mean is.

    Raises:
      ValueError: shapes that do not match, or no example.
      TypeError: weights or embeddings that are not floating point.

    Use it to go on with a classifier that was trained with `jaxref.losses.normalized_softmax_loss`
    or a loss with angular margin: the vectors of a class are then where its embeddings are. Other
    heads have lengths and biases, which an imprinted class would not fit.

    Cost: one pass over the embeddings and a copy of the head; no training.

    Example:
      >>> print(imprint_class(jnp.eye(2), jnp.array([[3.0, 3.0]])).round(3))
      [[1.    0.   ]
       [0.    1.   ]
       [0.707 0.707]]

    Reference: Pereira, Joly, Valduriez, Porto, "Hyperspherical embedding for novel class
    classification", 2021, arXiv:2102.03243.
    """
    check_floating(class_weights=class_weights, embeddings=embeddings)
    weights, e = jnp.asarray(class_weights), jnp.asarray(embeddings)
    if weights.ndim != 2:
        raise ValueError(f"class_weights must have shape [classes, features], got {weights.shape}")
    if e.ndim != 2 or len(e) == 0:
        raise ValueError(
            f"embeddings must have shape [examples, features], at least one example, got {e.shape}"
        )
    check_shape((len(e), weights.shape[1]), embeddings=e)
    mean = jnp.mean(unit_vectors(e.astype(compute_dtype(e))), axis=0)
    return jnp.concatenate([weights, unit_vectors(mean)[None].astype(weights.dtype)])


def _checked_support(
    embeddings: ArrayLike, labels: ArrayLike, num_classes: int, where: ArrayLike | None
) -> tuple[Array, Array]:
    """Embeddings in the type to compute in, and labels, -1 for the examples that do not count."""
    check_floating(embeddings=embeddings)
    check_interval(1, jnp.inf, num_classes=num_classes)
    e, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    if e.ndim != 2:
        raise ValueError(f"embeddings must have shape [examples, features], got {e.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {labels.dtype.name}")
    check_shape(e.shape[:1], labels=labels)
    if where is not None:
        check_shape(e.shape[:1], where=where)
        labels, e = jnp.where(where, labels, -1), jnp.where(jnp.asarray(where)[:, None], e, 0)
    return e.astype(compute_dtype(e)), labels


def _means(e: Array, labels: Array, num_classes: int) -> Array:
    """The mean of each class; 0 where it has none."""
    is_of = jax.nn.one_hot(labels, num_classes, axis=0, dtype=e.dtype)
    number = jnp.maximum(jnp.sum(is_of, axis=1, keepdims=True), 1)
    return jnp.matmul(is_of, e, precision=jax.lax.Precision.HIGHEST) / number
