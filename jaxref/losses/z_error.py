"""Losses that leave out the members of a batch whose error or output is an outlier of it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.regression import squared_error


class ZErrorMask(NamedTuple):
    """Which members of a batch a z-error loss takes in, and how far out each one is.

    Attributes:
      included: boolean `[...]`.
      z: `[...]` in at least float32: by how many standard deviations each is off the mean.

    Reference: Godin, "Z-Error Loss for Training Neural Networks", 2025, arXiv:2506.02154.
    """

    included: Array
    z: Array


def z_error_mask(
    errors: ArrayLike,
    *,
    threshold: ArrayLike = 2.0,
    epsilon: float = 1e-8,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> ZErrorMask:
    r"""Which errors of a batch are within some standard deviations of their mean.

        z_i = (e_i - m) / (s + ε),   included_i = |z_i| ≤ τ

    with m and s² the mean and the unbiased variance of all errors e, and τ = threshold. The signed
    errors are tested: a shift or a scale of all of them changes nothing but by ε.

    Among n errors no |z| is above (n - 1) / √n: with τ = 2, five errors or fewer are all included.

    Args:
      errors: e `[...]` floating point, all its entries one batch.
      threshold: τ above 0; inf includes everything. It may be traced: the value of an optax
        schedule that falls, say from 4 to 2, leaves the untrained model its errors. Default 2.
      epsilon: ε at least 0. Default 1e-8.
      where: boolean, broadcastable to `errors`: the entries that exist. The others do not count and
        are not included; their z is 0.
      axis_name: name or names of the mesh or vmap axes over which the batch is spread.

    Returns:
      A `ZErrorMask`, with no gradient.

    Raises:
      ValueError: a hyperparameter out of its range, or a `where` that does not broadcast.
      TypeError: errors that are not floating point.

    Use it to find wrong data: count how often each example is left out over a training.
    `z_error_loss` applies it.

    Cost: three passes over the errors; no gradient.

    Example:
      >>> errors = jnp.array([0.1, -0.2, 0.0, 0.1, -0.1, 0.2, 9.0])
      >>> print(z_error_mask(errors).included)
      [ True  True  True  True  True  True False]

    Reference: Godin, "Z-Error Loss for Training Neural Networks", 2025, arXiv:2506.02154.
    """
    _check_threshold(threshold)
    check_interval(0, jnp.inf, epsilon=epsilon)
    check_floating(errors=errors)
    shape = jnp.shape(errors)
    check_broadcastable(shape, where=where)
    members = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    wide = jnp.asarray(errors).astype(compute_dtype(errors))
    return _mask_outliers(wide, members[..., None], threshold, epsilon, axis_name)


def z_error_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    threshold: ArrayLike = 2.0,
    base_loss: Callable[[Array, Array], Array] = squared_error,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, ZErrorMask]:
    r"""The mean loss of the predictions whose error is no outlier (a loss of the set): Z-Error.

        L = Σ_i M_i l(ŷ_i, y_i) / Σ_i M_i,   M = `z_error_mask` of the errors ŷ - y

    An example that is left out has no gradient, and the mask has none.

    Args:
      predictions: ŷ `[...]` floating point, all entries one batch.
      targets: y, numbers of the shape of ŷ.
      threshold: τ above 0, in standard deviations; inf gives the mean of l. It may be traced, as
        the value of an optax schedule. Default 2.
      base_loss: l, from predictions and targets `[...]` to losses `[...]`. Default
        `squared_error`.
      where: boolean, broadcastable to ŷ: the entries that exist.
      axis_name: name or names of the mesh or vmap axes over which the batch is spread.

    Returns:
      The loss, a scalar in at least float32, which is 0 where no entry exists, and the
      `ZErrorMask`.

    Raises:
      ValueError: a `threshold` out of its range, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it where a few targets are grossly wrong, in batches of some dozens at least;
    `huber_loss` bounds the pull of an outlier but keeps it.

    Cost: that of the base loss, and three passes over the errors.

    Example:
      >>> predictions, targets = jnp.zeros(7), jnp.array([0.1, -0.2, 0.0, 0.1, -0.1, 0.2, 9.0])
      >>> loss, mask = z_error_loss(predictions, targets)
      >>> print(loss.round(4), mask.included.sum())
      0.0183 6

    Reference: Godin, "Z-Error Loss for Training Neural Networks", 2025, arXiv:2506.02154.
    """
    check_floating(predictions=predictions)
    check_shape(jnp.shape(predictions), targets=targets)
    dtype = compute_dtype(predictions)
    y_hat, y = (jnp.asarray(x).astype(dtype) for x in (predictions, targets))
    if where is not None:
        check_broadcastable(y.shape, where=where)
        y_hat, y = (jnp.where(where, x, 0.0) for x in (y_hat, y))
    mask = z_error_mask(y_hat - y, threshold=threshold, where=where, axis_name=axis_name)
    return _included_mean(base_loss(y_hat, y), mask.included, axis_name), mask


def z_error_classification_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: ArrayLike = 2.0,
    space: str = "logit",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, ZErrorMask]:
    r"""The mean cross-entropy of examples that are no outliers of their class (a loss of the set).

        z_i = (u_i - m_c) / (s_c + 1e-8),   c = label of i,   included_i = |z_i| ≤ τ

    with m_c and s_c² the mean and the unbiased variance of the outputs u of all examples labelled
    c, and τ = threshold. For two classes u is the logit, or its sigmoid; for several, that of the
    own class, or its softmax. A class of one example, or of equal ones, is included.

    Args:
      logits: floating point: `[...]` of the shape of `labels` for two classes, or `[..., classes]`.
        All examples are one batch.
      labels: integer or boolean `[...]` ids; one that is no class makes the loss NaN.
      threshold: τ above 0, in standard deviations; inf gives the mean cross-entropy. It may be
        traced, as the value of an optax schedule. Default 2.
      space: "logit" or "probability", where outputs are compared.
      where: boolean, broadcastable to `labels`: the examples that exist.
      axis_name: name or names of the mesh or vmap axes over which the batch is spread.

    Returns:
      The loss in nats, a scalar in at least float32, which is 0 where no example exists, and the
      `ZErrorMask` in the shape of `labels`.

    Raises:
      ValueError: a `threshold` out of its range, a `space` that is neither, or shapes that do not
        match.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use it where some labels are wrong, once outputs tell the classes apart, with a threshold that
    falls; `gaussian_decision_threshold` then puts the decision between the outputs of two classes.

    Cost: that of a softmax over the classes, and the moments of each class, O(classes) an example.

    Example:
      >>> logits = jnp.array([2.0, 2.1, 1.9, 2.0, 2.2, 1.8, -5.0, -2.0, -1.0])
      >>> labels = jnp.array([1, 1, 1, 1, 1, 1, 1, 0, 0])
      >>> loss, mask = z_error_classification_loss(logits, labels)
      >>> print(loss.round(3), mask.included)
      0.151 [ True  True  True  True  True  True False  True  True]

    Reference: Godin, "Z-Error Loss for Training Neural Networks", 2025, arXiv:2506.02154.
    """
    _check_threshold(threshold)
    if space not in ("logit", "probability"):
        raise ValueError(f"space must be 'logit' or 'probability', got {space!r}")
    check_floating(logits=logits)
    ids = jnp.asarray(labels)
    if ids.dtype == bool:
        ids = ids.astype(jnp.int32)
    check_broadcastable(ids.shape, where=where)
    exists = jnp.ones(ids.shape, bool) if where is None else jnp.broadcast_to(where, ids.shape)
    f = jnp.asarray(logits).astype(compute_dtype(logits))
    two_classes = f.ndim == ids.ndim
    if two_classes:
        check_shape(ids.shape, logits=f)
        f = jnp.stack([jnp.zeros_like(f), f], axis=-1)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {ids.dtype.name}")
    f = jnp.where(exists[..., None], f, 0.0)
    q = label_distribution(ids, f, where=exists[..., None])
    own = q == 1
    log_p = masked_log_softmax(f, axis=-1, where=exists[..., None])
    # with two classes both compare the one logit there is
    outputs = f if space == "logit" else jnp.exp(log_p)
    u = outputs[..., 1] if two_classes else jnp.sum(jnp.where(own, outputs, 0.0), axis=-1)
    mask = _mask_outliers(u, own, threshold, 1e-8, axis_name)
    included = mask.included | jnp.isnan(q).any(axis=-1)  # an id of no class shows in the loss
    return _included_mean(-jnp.sum(q * log_p, axis=-1), included, axis_name), mask


def gaussian_decision_threshold(
    outputs: ArrayLike,
    labels: ArrayLike,
    *,
    use_priors: bool = False,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Where between two classes their outputs are equally likely, if both are normal.

        the x between m_0 and m_1 with w_0 N(x; m_0, s_0²) = w_1 N(x; m_1, s_1²)

    with the means, the unbiased variances and the shares w of the outputs of each class, or w = 1.
    For equal variances and w it is the midpoint. Where no such x lies between the means it is that
    with the same distance to both in standard deviations, (m_0 s_1 + m_1 s_0) / (s_0 + s_1).

    Args:
      outputs: `[...]` floating point: logits or probabilities of a trained classifier.
      labels: of the shape of `outputs`, each 0 or 1; others do not count.
      use_priors: weigh each class by its share of the examples. Default False.
      where: boolean, broadcastable to `outputs`: the examples that exist.
      axis_name: name or names of the mesh or vmap axes over which the examples are spread.

    Returns:
      A scalar in at least float32: outputs on the side of m_1 are of class 1. NaN where a class has
      no example.

    Raises:
      ValueError: shapes that do not match.
      TypeError: outputs that are not floating point.

    Use it after training in place of the decision at probability 1/2, with the outputs of examples
    that a z-error loss includes (`where`).

    Cost: two passes over the outputs.

    Example:
      >>> outputs, labels = jnp.array([-1.0, -3.0, 2.0, 4.0]), jnp.array([0, 0, 1, 1])
      >>> print(gaussian_decision_threshold(outputs, labels))
      0.5

    Reference: Godin, "Z-Error Loss for Training Neural Networks", 2025, arXiv:2506.02154.
    """
    check_floating(outputs=outputs)
    shape = jnp.shape(outputs)
    check_shape(shape, labels=labels)
    check_broadcastable(shape, where=where)
    y = jnp.asarray(labels)[..., None]
    members = y == jnp.arange(2)
    if where is not None:
        members &= jnp.broadcast_to(where, shape)[..., None]
    u = jnp.asarray(outputs).astype(compute_dtype(outputs))
    count, (m_0, m_1), s = _moments(u, members, axis_name)
    gap = m_1 - m_0
    # a class without spread gets some, far below the distance of the classes
    floor = 1e-6 * jnp.abs(gap) + jnp.finfo(u.dtype).tiny
    s_0, s_1 = jnp.maximum(s, floor)
    # x = m_0 + r gap turns log densities into -r² a_0 and -(1 - r)² a_1, less log(s / w)
    a_0, a_1 = (jnp.square(gap / s) / 2 for s in (s_0, s_1))
    b = jnp.log(s_0 / s_1)
    if use_priors:
        b += jnp.log(jnp.maximum(count[1], 1) / jnp.maximum(count[0], 1))
    discriminant = a_0 * a_1 - b * (a_0 - a_1)
    denominator = a_1 + jnp.sqrt(jnp.maximum(discriminant, 0.0))
    r = (a_1 - b) / jnp.where(denominator > 0, denominator, 1.0)
    between = (discriminant >= 0) & (denominator > 0) & (r >= 0) & (r <= 1)
    x = m_0 + jnp.where(between, r, s_0 / (s_0 + s_1)) * gap
    return jnp.where(jnp.all(count > 0), x, jnp.nan)


def _check_threshold(threshold: ArrayLike) -> None:
    """Raises unless τ is above 0; infinity is."""
    if isinstance(threshold, jax.core.Tracer) or threshold == math.inf:
        return
    check_interval(0, jnp.inf, closed="right", threshold=threshold)


def _moments(
    values: Array, members: Array, axis_name: AxisName | None
) -> tuple[Array, Array, Array]:
    """Number, mean and unbiased standard deviation `[groups]` of each group's values `[...]`.

    `members` `[..., groups]` says who belongs to it. A group without values has mean 0, and one of
    fewer than two has deviation 0.
    """

    def total(x: Array) -> Array:
        sums = jnp.sum(x, axis=tuple(range(values.ndim)))
        return sum_over_shards(sums, axis_name)

    count = total(members.astype(values.dtype))
    mean = total(jnp.where(members, values[..., None], 0.0)) / jnp.maximum(count, 1)
    off = jnp.where(members, values[..., None] - mean, 0.0)
    variance = total(jnp.square(off)) / jnp.maximum(count - 1, 1)
    return count, mean, jnp.sqrt(variance)


def _mask_outliers(
    values: Array,
    members: Array,
    threshold: ArrayLike,
    epsilon: float,
    axis_name: AxisName | None,
) -> ZErrorMask:
    """Who is within τ deviations of the mean of its group; members of none are not included."""
    values = jax.lax.stop_gradient(values)
    _, mean, deviation = _moments(values, members, axis_name)
    scale = jnp.where(deviation + epsilon > 0, deviation + epsilon, 1.0)
    z = jnp.sum(jnp.where(members, (values[..., None] - mean) / scale, 0.0), axis=-1)
    return ZErrorMask(members.any(axis=-1) & (jnp.abs(z) <= threshold), z)


def _included_mean(losses: Array, included: Array, axis_name: AxisName | None) -> Array:
    sums = (jnp.sum(jnp.where(included, losses, 0.0)), jnp.sum(included, dtype=losses.dtype))
    sums = sum_over_shards(sums, axis_name)
    return sums[0] / jnp.maximum(sums[1], 1)
