"""The log loss of classes, each of which counts as a whole."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards


def weighted_log_loss(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    limit: float = 1e-15,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Negative log-likelihood averaged within each class, then over classes (a loss of the set).

        L = -Σ_c w_c mean_{i in c} log p_{i,c} / Σ_c w_c

    over the classes that have examples, p clipped to [limit, 1 - limit] and scaled to the sum 1. A
    class counts by its weight, however many or few its examples are.

    Args:
      probabilities: p `[..., classes]` floating point in [0, 1]. Values outside are moved there.
      labels: integer ids `[...]`, or distributions of the shape of `probabilities`, which share an
        example out among classes. An id that is no class makes the loss NaN.
      class_weights: w `[classes]` at least 0. Default: all alike. PLAsTiCC's are 2 for the rare
        classes 15 and 64 and 1 for the others.
      limit: in [0, 1/2), the least probability to reckon with. Default 1e-15, PLAsTiCC's.
      where: boolean, broadcastable to `[...]`: the examples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the examples are spread.

    Returns:
      A scalar in the type of `probabilities`, in nats; log classes for uniform p, and 0 where no
      class with a weight has an example.

    Raises:
      ValueError: shapes that do not match, negative weights, or a `limit` out of its range.
      TypeError: probabilities or weights that are not floating point.

    Use it to report on, or to fine-tune for, data of imbalanced classes that matter alike;
    `jaxref.metrics.log_loss` counts every example the same.

    Cost: one pass over the probabilities; with `axis_name` two sums of `classes` numbers over the
    shards.

    Example:
      >>> p = jnp.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
      >>> print(weighted_log_loss(p, jnp.array([0, 0, 1])).round(3))
      1.498

    Reference: Allam, McEwen, "Paying Attention to Astronomical Transients: Introducing the
    Time-series Transformer for Photometric Classification", 2021, arXiv:2105.06178.
    """
    check_floating(probabilities=probabilities)
    check_interval(0, 0.5, closed="left", limit=limit)
    p = jnp.asarray(probabilities)
    p = p.astype(compute_dtype(p))
    q = label_distribution(labels, p)
    classes = p.shape[-1]
    check_broadcastable(p.shape[:-1], where=where)
    weights = jnp.ones(classes, p.dtype)
    if class_weights is not None:
        check_floating(class_weights=class_weights)
        check_shape((classes,), class_weights=class_weights)
        check_interval(0, jnp.inf, class_weights=class_weights)
        weights = jnp.asarray(class_weights).astype(p.dtype)
    if where is not None:
        counted = jnp.broadcast_to(jnp.expand_dims(jnp.asarray(where), -1), p.shape)
        p, q = jnp.where(counted, p, 1 / classes), jnp.where(counted, q, 0.0)
    p = jnp.clip(p, max(limit, float(jnp.finfo(p.dtype).tiny)), 1 - limit)
    log_p = jnp.log(p / jnp.sum(p, axis=-1, keepdims=True))
    examples = tuple(range(p.ndim - 1))
    sums = jnp.sum(q * log_p, axis=examples), jnp.sum(q, axis=examples)
    total, count = sum_over_shards(sums, axis_name)
    means = total / jnp.where(count == 0, 1.0, count)
    weights = jnp.where(count == 0, 0.0, weights)
    weight = jnp.sum(weights)
    loss = -jnp.sum(weights * means) / jnp.where(weight == 0, 1.0, weight)
    return loss.astype(jnp.result_type(probabilities))
