"""Regression whose rare targets matter most: weights by the targets' density, and correlation.

Densities and weights are made once, from the targets of the training set; the weights then go with
their examples. `jaxref.data.stratified_batches` sees to it that every batch has rare targets.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.core.vectors import safe_sqrt

_CHUNK = 256
"""Queries that `label_density` compares with all labels at a time."""


def label_density(
    labels: ArrayLike, *, bandwidth: float = 0.07, queries: ArrayLike | None = None
) -> Array:
    r"""The density of the training targets, by Gaussian kernels.

        p(q) = 1/n Σ_i exp(-(q - y_i)² / (2 h²)) / (h √(2π)),   h = bandwidth · std(y)

    with n targets y and their standard deviation with n - 1, or 1 where all targets are equal.

    Args:
      labels: y `[n]` floating point, two at least.
      bandwidth: above 0, the width of the kernels in standard deviations. Default 0.07, the
        authors'.
      queries: `[...]` real numbers to give the density of. Default: the labels.

    Returns:
      The density at each query, in the type of `labels`, per unit of the labels.

    Raises:
      ValueError: labels of another shape, or a `bandwidth` that is not positive.
      TypeError: labels that are not floating point.

    Use it once for the whole training set; its result goes to `involution_importance` or one of the
    other weights.

    Cost: an exponential for each query and each label, O(n²) time by default, 256 queries at a
    time: memory for 256 n numbers.

    Example:
      >>> print(label_density(jnp.array([0.0, 0.0, 0.0, 2.0]), bandwidth=0.5).round(3))
      [0.598 0.598 0.598 0.2  ]

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    check_floating(labels=labels)
    check_interval(0, jnp.inf, closed="right", bandwidth=bandwidth)
    if jnp.ndim(labels) != 1 or jnp.size(labels) < 2:
        raise ValueError(f"labels must have shape [n], n at least 2, got {jnp.shape(labels)}")
    y = jnp.asarray(labels).astype(compute_dtype(labels))
    q = y if queries is None else jnp.asarray(queries).astype(y.dtype)
    varies = jnp.max(y) > jnp.min(y)
    # without the common part, which for large labels would take the digits that differ
    deviation = jnp.std(y - y[0], ddof=1)
    h = bandwidth * jnp.where(varies & (deviation > 0), deviation, 1.0)

    def density(query: Array) -> Array:
        return jnp.mean(jnp.exp(-0.5 * jnp.square((query - y) / h)))

    p = jax.lax.map(density, q.ravel(), batch_size=_CHUNK) / (h * math.sqrt(2 * math.pi))
    return p.reshape(q.shape).astype(jnp.result_type(labels))


def decreasing_involution(x: ArrayLike, *, alpha: float = 2.0) -> Array:
    r"""A decreasing function of [0, 1] that is its own inverse (MDI).

        g(x) = (1 - x^α)^(1/α),   g(g(x)) = x,   g(0) = 1,   g(1) = 0

    α = 1 is 1 - x, α = 2 the quarter of a circle. Above 1 it is concave and tends to 1; below 1 it
    is convex, as 1 / x is, and tends to 0.

    Args:
      x: `[...]` floating point in [0, 1]. Values outside are refused where they are concrete and
        give NaN where they are traced.
      alpha: α above 0. Default 2, the authors'.

    Returns:
      `[...]` values in [0, 1] in the type of `x`. The slopes at the ends that are infinite count
      as 0.

    Raises:
      ValueError: an `alpha` that is not positive, or values outside of [0, 1].
      TypeError: values that are not floating point.

    Use it to turn any relative frequency into an importance; `involution_importance` does so with
    densities.

    Cost: one pass over the values.

    Example:
      >>> print(decreasing_involution(jnp.array([0.0, 0.6, 1.0])).round(4))
      [1.  0.8 0. ]

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    check_floating(x=x)
    check_interval(0, jnp.inf, closed="neither", alpha=alpha)
    check_interval(0, 1, x=x)
    wide = jnp.asarray(x).astype(compute_dtype(x))
    inside = (wide != 0) & (wide != 1)
    # 1 - x^α as -expm1 loses nothing where it is small
    rest = -jnp.expm1(alpha * jnp.log(jnp.where(inside, wide, 0.5)))
    positive = rest > 0
    g = jnp.where(positive, jnp.exp(jnp.log(jnp.where(positive, rest, 1.0)) / alpha), rest)
    return jnp.where(inside, g, 1 - wide).astype(jnp.result_type(x))


def involution_importance(
    density: ArrayLike, *, alpha: float = 2.0, epsilon: float = 1e-3
) -> Array:
    r"""Weights of examples that fall with the density of their targets, by an involution (MDI).

        w_i = g(d_i) / mean_j g(d_j),   d_i = p_i / (max_j p_j + ε),   g(d) = (1 - d^α)^(1/α)

    The rarest targets get the largest weight, which is bounded, and the most frequent one a small
    one above 0. α chooses the shape: linear at 1, concave and gentle above, convex as the inverse
    density below.

    Args:
      density: p, at least 0, of the targets of the whole training set, of any shape; a negative
        one is refused where it is concrete.
      alpha: α above 0. Default 2, the authors'; tune it, and for the error and the correlation
        apart.
      epsilon: ε at least 0, in the unit of the density. Default 1e-3, the authors'.

    Returns:
      w of the shape and type of `density`, with mean 1: as many times the authors' as there are
      examples, whose sum is 1.

    Raises:
      ValueError: a negative density or `epsilon`, or an `alpha` that is not positive.
      TypeError: a density that is not floating point.

    Use it before training, for `cisir_loss`; the other weights of this file are what it is compared
    with in the paper.

    Cost: a few passes over the densities, once before training.

    Example:
      >>> involution_importance(jnp.array([0.6, 0.8, 0.0]), epsilon=0.2).tolist()
      [1.0, 0.75, 1.25]

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    return _mean_1(decreasing_involution(_share_of_largest(density, epsilon), alpha=alpha), density)


def reciprocal_importance(
    density: ArrayLike, *, alpha: float = 1.0, epsilon: float = 1e-3
) -> Array:
    r"""Weights of examples that are a power of the inverse density of their targets.

        w_i = v_i / mean_j v_j,   v_i = (d_i + 1e-8)^-α,   d_i = p_i / (max_j p_j + ε)

    α = 1 is inverse frequency (INV), α = 1/2 its root (SQINV).

    Args:
      density: p, at least 0, of the targets of the whole training set, of any shape.
      alpha: α at least 0. Default 1.
      epsilon: ε at least 0, in the unit of the density. Default 1e-3, the authors'.

    Returns:
      w of the shape and type of `density`, with mean 1.

    Raises:
      ValueError: a negative density, `alpha` or `epsilon`.
      TypeError: a density that is not floating point.

    Use it as the usual baseline; a few rarest targets take most of the weight, which
    `involution_importance` bounds.

    Cost: a few passes over the densities, once before training.

    Example:
      >>> print(reciprocal_importance(jnp.array([1.0, 0.25]), epsilon=0.0).round(3))
      [0.4 1.6]

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    check_interval(0, jnp.inf, alpha=alpha)
    log_inverse = -alpha * jnp.log(_share_of_largest(density, epsilon) + 1e-8)
    # taken relative to the largest, so that no power overflows
    return _mean_1(jnp.exp(log_inverse - jnp.max(log_inverse, initial=-jnp.inf)), density)


def linear_importance(density: ArrayLike) -> Array:
    r"""Weights of examples that fall linearly with the density of their targets.

        w_i = v_i / mean_j v_j,   v_i = max_j p_j - p_i

    The most frequent target has weight 0. A factor in front of v, which the authors have, cancels.

    Args:
      density: p, at least 0, of the targets of the whole training set, of any shape.

    Returns:
      w of the shape and type of `density`, with mean 1; all 1 where all densities are equal.

    Raises:
      ValueError: a negative density.
      TypeError: a density that is not floating point.

    Use it as a baseline without a parameter; `involution_importance` at α = 1 is the same but for
    its ε.

    Cost: a few passes over the densities, once before training.

    Example:
      >>> linear_importance(jnp.array([0.5, 0.5, 0.2, 0.1])).tolist()
      [0.0, 0.0, 1.714, 2.286]

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    p = _checked_density(density)
    return _mean_1(jnp.max(p, initial=0.0) - p, density)


def cosine_importance(density: ArrayLike, *, alpha: float = 1.0, epsilon: float = 1e-3) -> Array:
    r"""Weights of examples that fall with the density of their targets as a cosine.

        w_i = v_i / mean_j v_j,   v_i = cos(π/2 (p_i - min p) / (max p + ε - min p))^α

    Args:
      density: p, at least 0, of the targets of the whole training set, of any shape.
      alpha: α at least 0. Default 1.
      epsilon: ε at least 0, in the unit of the density. Default 1e-3, the authors'.

    Returns:
      w of the shape and type of `density`, with mean 1; all 1 where all densities are equal.

    Raises:
      ValueError: a negative density, `alpha` or `epsilon`.
      TypeError: a density that is not floating point.

    Use it as a baseline that has rare targets weigh nearly alike; its shape is fixed up to a power,
    that of `involution_importance` is not.

    Cost: a few passes over the densities, once before training.

    Example:
      >>> cosine_importance(jnp.array([0.9, 0.1]), epsilon=0.4).tolist()
      [0.667, 1.333]

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    check_interval(0, jnp.inf, alpha=alpha, epsilon=epsilon)
    p = _checked_density(density)
    cosine = jnp.cos(0.5 * jnp.pi * _between_extremes(p, epsilon))
    tiny = jnp.finfo(p.dtype).tiny  # cos(π/2) may round to less than 0
    return _mean_1(jnp.maximum(cosine, tiny) ** alpha, density)


def dense_loss_importance(density: ArrayLike, *, alpha: float = 1.0, least: float = 1e-6) -> Array:
    r"""DenseWeight: weights that fall linearly with the scaled density, and end at a floor.

        w_i = v_i / mean_j v_j,   v_i = max(1 - α (p_i - min p) / (max p - min p), least)

    Args:
      density: p, at least 0, of the targets of the whole training set, of any shape.
      alpha: α at least 0: 0 weighs all alike; above 1 the most frequent targets have the floor's
        weight. Default 1.
      least: the floor, above 0. Default 1e-6.

    Returns:
      w of the shape and type of `density`, with mean 1; all 1 where all densities are equal.

    Raises:
      ValueError: a negative density or `alpha`, or a `least` that is not positive.
      TypeError: a density that is not floating point.

    Use it as a baseline whose weights are bounded, too; it is linear where
    `involution_importance` bends.

    Cost: a few passes over the densities, once before training.

    Example:
      >>> dense_loss_importance(jnp.array([0.5, 0.3, 0.1]), alpha=0.5).tolist()
      [0.667, 1.0, 1.333]

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339, which compares with Steininger, Kobs, Davidson, Krause,
    Hotho, "Density-based weighting for imbalanced regression", 2021.
    """
    check_interval(0, jnp.inf, alpha=alpha)
    check_interval(0, jnp.inf, closed="right", least=least)
    p = _checked_density(density)
    return _mean_1(jnp.maximum(1 - alpha * _between_extremes(p, 0.0), least), density)


def correlation_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    epsilon: float = 1e-7,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""One minus the weighted correlation of predictions and targets (a loss of the set).

        L = 1 - Σ w a b / (√(Σ w a² Σ w b²) + ε),   a = prediction - mean, b = target - mean

    with plain means over the set and importances w. 0 where the predictions are an increasing
    linear function of the targets, 2 where they are a decreasing one, 1 where they are constant. It
    sees whether predictions follow the targets, not how far off they are.

    Args:
      predictions: `[...]` floating point; all entries together are the set.
      targets: real numbers of the same shape.
      weights: w at least 0, broadcastable to `predictions`. Default: 1.
      epsilon: ε at least 0. Default 1e-7, the authors'.
      where: boolean, broadcastable to `predictions`: the entries that count. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the set is spread.

    Returns:
      A scalar from 0 to 2 in the type of `predictions`. 1, with gradient 0, where predictions or
      targets are constant; 0 where `where` admits no entry.

    Raises:
      ValueError: shapes that do not match, fewer than two entries, or a negative `epsilon`.
      TypeError: predictions that are not floating point.

    Use it beside an error, as `cisir_loss` does: alone it leaves scale and offset of the
    predictions open.

    Cost: three passes over the set; between shards a few scalars.

    Example:
      >>> loss = correlation_loss(jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 3.0, 2.0]))
      >>> print(loss.round(4))
      0.6726

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    check_interval(0, jnp.inf, epsilon=epsilon)
    prediction, target, w, count = _checked_set(predictions, targets, weights, where)
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if prediction.size * shards < 2:
        raise ValueError(f"predictions must have at least two entries, got {prediction.size}")

    number = sum_over_shards(jnp.sum(count), axis_name)

    def centred(x: Array) -> Array:
        # counted from an entry of the set, which makes what is constant exactly 0
        origin = jnp.max(jax.lax.stop_gradient(jnp.where(count, x, -jnp.inf)))
        if axis_name is not None:
            origin = jax.lax.pmax(origin, axis_name)
        x = jnp.where(count, x - jnp.where(number > 0, origin, 0.0), 0.0)
        mean = sum_over_shards(jnp.sum(x), axis_name) / jnp.maximum(number, 1)
        return jnp.where(count, x - mean, 0.0)

    a, b = centred(prediction), centred(target)
    covariance, square_a, square_b = sum_over_shards(
        tuple(jnp.sum(w * x) for x in (a * b, jnp.square(a), jnp.square(b))), axis_name
    )
    size = safe_sqrt(square_a) * safe_sqrt(square_b)
    varies = size > 0
    correlation = jnp.where(varies, covariance / jnp.where(varies, size + epsilon, 1.0), 0.0)
    loss = jnp.where(number > 0, 1 - correlation, 0.0)
    return loss.astype(jnp.result_type(predictions))


def cisir_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    error_weights: ArrayLike | None = None,
    correlation_weights: ArrayLike | None = None,
    correlation_coefficient: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Weighted squared error and weighted correlation (CISIR; a loss of the set).

        L = mean(w (prediction - target)²) + λ (1 - ρ_v)

    with the correlation ρ_v of `correlation_loss`, and w and v importances of the examples.

    Args:
      predictions: `[...]` floating point; all entries together are the set.
      targets: real numbers of the same shape.
      error_weights: w at least 0, broadcastable to `predictions`, such as `involution_importance`
        of the targets. Default: 1.
      correlation_weights: v, likewise; the paper tunes the two apart. Default: 1.
      correlation_coefficient: λ at least 0, in the square of the targets' unit. Default 1, as in
        the released code for most of its data sets; 0 is the error alone.
      where: boolean, broadcastable to `predictions`: the entries that count. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the set is spread.

    Returns:
      A scalar in the type of `predictions`; 0 where `where` admits no entry.

    Raises:
      ValueError: shapes that do not match, fewer than two entries, or a negative
        `correlation_coefficient`.
      TypeError: predictions that are not floating point.

    Use it for targets whose rare values matter most, on batches of
    `jaxref.data.stratified_batches`; `squared_error` serves frequent targets.

    Cost: four passes over the set; between shards a few scalars.

    Example:
      >>> predictions, targets = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 3.0, 2.0])
      >>> weights = jnp.array([0.5, 2.0, 0.5])
      >>> loss = jax.jit(cisir_loss)(predictions, targets, error_weights=weights)
      >>> print(loss.round(4))
      2.0059

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    check_interval(0, jnp.inf, correlation_coefficient=correlation_coefficient)
    prediction, target, w, count = _checked_set(predictions, targets, error_weights, where)
    total, number = sum_over_shards(
        (jnp.sum(w * jnp.square(prediction - target)), jnp.sum(count)), axis_name
    )
    dependence = correlation_loss(
        prediction, target, weights=correlation_weights, where=where, axis_name=axis_name
    )
    loss = total / jnp.maximum(number, 1) + correlation_coefficient * dependence
    return loss.astype(jnp.result_type(predictions))


def _checked_density(density: ArrayLike) -> Array:
    """A density in the type to compute in."""
    check_floating(density=density)
    check_interval(0, jnp.inf, closed="left", density=density)
    return jnp.asarray(density).astype(compute_dtype(density))


def _share_of_largest(density: ArrayLike, epsilon: float) -> Array:
    """p / (max p + epsilon), 0 where both are."""
    check_interval(0, jnp.inf, epsilon=epsilon)
    p = _checked_density(density)
    largest = jnp.max(p, initial=0.0) + epsilon
    return p / jnp.where(largest > 0, largest, 1.0)


def _between_extremes(p: Array, epsilon: float) -> Array:
    """Where p is on the way from its least to its largest + epsilon, from 0 to 1."""
    least = jnp.min(p, initial=jnp.inf)
    span = jnp.max(p, initial=0.0) + epsilon - least
    return (p - least) / jnp.where(span > 0, span, 1.0)


def _mean_1(v: Array, density: ArrayLike) -> Array:
    """v over its mean, or 1 where all of v is 0, in the type of the density."""
    mean = jnp.sum(v) / max(v.size, 1)
    w = jnp.where(mean > 0, v / jnp.where(mean > 0, mean, 1.0), 1.0)
    return w.astype(jnp.result_type(density))


def _checked_set(
    predictions: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None,
    where: ArrayLike | None,
) -> tuple[Array, Array, Array, Array]:
    """Predictions, targets and weights in the type to compute in, and which entries count; those
    that do not are 0 throughout."""
    check_floating(predictions=predictions)
    shape, dtype = jnp.shape(predictions), compute_dtype(predictions)
    check_shape(shape, targets=targets)
    check_broadcastable(shape, weights=weights, where=where)
    count = jnp.broadcast_to(True if where is None else where, shape)
    given = (predictions, targets, 1.0 if weights is None else weights)
    prediction, target, w = (jnp.where(count, jnp.asarray(x).astype(dtype), 0.0) for x in given)
    return prediction, target, w, count
