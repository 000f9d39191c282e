"""Labels as every loss takes them: integer class ids or distributions over the classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def masked_log_softmax(logits: ArrayLike, *, axis: int, where: ArrayLike | None) -> Array:
    """log softmax over the classes that `where` admits, in at least float32.

    Entries that `where` excludes are 0, so that they drop out of weighted sums, and their gradient
    is 0; an example without any admitted class is 0 throughout.
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(compute_dtype(logits))
    if where is None:
        return jax.nn.log_softmax(logits, axis=axis)
    lowest = jnp.finfo(logits.dtype).min
    log_probs = jax.nn.log_softmax(jnp.where(where, logits, lowest), axis=axis)
    return jnp.where(where, log_probs, 0.0)


def label_distribution(
    labels: ArrayLike,
    logits: ArrayLike,
    *,
    axis: int = -1,
    label_smoothing: float = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    """The target distribution q that integer ids or given distributions stand for.

        q_k = (1 - s) 1[k = label] + s / C,   s = label_smoothing

    Args:
      labels: integer ids, of the shape of `logits` without `axis`, or a distribution (floating
        point) of the shape of `logits`.
      logits: the predictions; only their shape and type are used.
      axis: the class axis of `logits`.
      label_smoothing: s in [0, 1]; spread over the C classes that `where` admits.
      where: boolean, broadcastable to `logits`: the classes that exist for an example. Excluded
        classes get weight 0; an example with no class left gets 0 everywhere, whatever its label.

    Returns:
      q with the shape of `logits` in at least float32. An id that is not the id of an admitted
      class gives NaN in all of its example, never a silently clamped class.

    Raises:
      ValueError: shapes do not match, `axis` is out of range or `label_smoothing` not in [0, 1].
      TypeError: `logits` are not floating point, or `labels` neither integer nor floating point.

    >>> label_distribution(jnp.array([2]), jnp.zeros((1, 3)))
    Array([[0., 0., 1.]], dtype=float32)
    """
    logits = jnp.asarray(logits)
    check_interval(0, 1, label_smoothing=label_smoothing)
    axis = _checked_axis(logits, axis, where)
    labels = jnp.asarray(labels)
    dtype = compute_dtype(logits)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        check_shape(logits.shape[:axis] + logits.shape[axis + 1 :], labels=labels)
        id_dtype = jnp.promote_types(labels.dtype, jnp.int32)  # int8 ids cannot count 1000 classes
        classes = jax.lax.broadcasted_iota(id_dtype, logits.shape, axis)
        is_label = classes == jnp.expand_dims(labels.astype(id_dtype), axis)
        if where is not None:
            is_label &= where
        exists = is_label.any(axis=axis, keepdims=True)
        if where is not None:  # an example without classes has no label to be wrong about
            exists |= ~jnp.broadcast_to(where, logits.shape).any(axis=axis, keepdims=True)
        distribution = jnp.where(exists, is_label.astype(dtype), jnp.nan)
    elif jnp.issubdtype(labels.dtype, jnp.floating):
        check_shape(logits.shape, labels=labels)
        distribution = labels.astype(dtype)
        if where is not None:
            distribution = jnp.where(where, distribution, 0.0)
    else:
        raise TypeError(f"labels must be integer ids or a distribution, got {labels.dtype.name}")
    if where is None:
        uniform: float | Array = 1.0 / logits.shape[axis]
    else:
        admitted = jnp.broadcast_to(where, logits.shape)
        count = admitted.sum(axis=axis, keepdims=True)
        uniform = jnp.where(admitted, 1.0 / jnp.maximum(count, 1).astype(dtype), 0.0)
    return (1.0 - label_smoothing) * distribution + label_smoothing * uniform


def expected_over_labels(
    loss: Callable[[Array], Array],
    labels: ArrayLike,
    logits: ArrayLike,
    *,
    axis: int = -1,
    label_smoothing: float = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    """A function of the label's log-probability, its mean over the labels' distribution.

        Σ_k q_k loss(log p_k),   p = softmax(logits)

    For integer ids without smoothing it is evaluated at the label alone, and no array of the
    logits' size is made.

    Args:
      loss: of an array of log-probabilities in at least float32, elementwise.
      labels, logits, axis, label_smoothing, where: as for `label_distribution`.

    Returns:
      The shape of `logits` without `axis`, in at least float32; 0 where no class is admitted.

    Raises:
      As `label_distribution`.

    >>> expected_over_labels(jnp.negative, jnp.array([2]), jnp.zeros((1, 3))).round(3)
    Array([1.099], dtype=float32)
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    smoothed = isinstance(label_smoothing, jax.core.Tracer) or label_smoothing != 0
    if smoothed or not jnp.issubdtype(labels.dtype, jnp.integer):
        q = label_distribution(
            labels, logits, axis=axis, label_smoothing=label_smoothing, where=where
        )
        return jnp.sum(q * loss(masked_log_softmax(logits, axis=axis, where=where)), axis=axis)
    axis = _checked_axis(logits, axis, where)
    check_shape(logits.shape[:axis] + logits.shape[axis + 1 :], labels=labels)
    logits = logits.astype(compute_dtype(logits))
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # int8 does not know 1000
    known = (labels >= 0) & (labels < logits.shape[axis])
    place = jnp.expand_dims(jnp.where(known, labels, 0), axis)
    if where is not None:
        admitted = jnp.broadcast_to(where, logits.shape)
        known &= jnp.squeeze(jnp.take_along_axis(admitted, place, axis), axis)
        logits = jnp.where(admitted, logits, jnp.finfo(logits.dtype).min)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True))
    log_total = jnp.log(jnp.sum(jnp.exp(shifted), axis=axis))
    log_p = jnp.squeeze(jnp.take_along_axis(shifted, place, axis), axis) - log_total
    losses = loss(jnp.where(known, log_p, jnp.nan))
    # an example without classes has no label to be wrong about
    return losses if where is None else jnp.where(admitted.any(axis=axis), losses, 0.0)


def _checked_axis(logits: Array, axis: int, where: ArrayLike | None) -> int:
    """The class axis, counted from the first."""
    check_floating(logits=logits)
    check_broadcastable(logits.shape, where=where)
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"axis {axis} is out of range for logits of shape {logits.shape}")
    if logits.shape[axis] == 0:
        raise ValueError(f"logits must have at least one class, got shape {logits.shape}")
    return axis % logits.ndim
