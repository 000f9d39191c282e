"""How far predictions of numbers are off: as a size, as a percentage, and as a share explained.

Every function reduces the axes in `axis` in at least float32 and returns the type of the
predictions. `where` (boolean, broadcastable to the predictions) says which entries exist; the
others may hold anything. A metric of no entries is 0.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean

Axis = int | tuple[int, ...] | None


def root_mean_squared_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""The root of the mean squared error, in the targets' unit.

        RMSE = √mean((prediction - target)²)

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.

    Returns:
      The metric without `axis`, in the type of `predictions`; lower is better.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it where large errors matter most; the mean of `jaxref.losses.absolute_error` gives all the
    same weight.

    Example:
      >>> print(root_mean_squared_error(jnp.array([1.0, 5.0]), jnp.array([2.0, -2.0])))
      5.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked(predictions, targets, where)
    mean_square = masked_mean(jnp.square(prediction - target), axis=axis, where=where)
    return jnp.sqrt(mean_square).astype(jnp.result_type(predictions))


def mean_absolute_percentage_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""The mean size of the errors, each as a share of its target (MAPE).

        MAPE = mean(|prediction - target| / |target|)

    Args:
      predictions: `[...]` floating point.
      targets: the same shape, not 0.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.

    Returns:
      The metric without `axis` as a fraction, of which 100 times is the percentage, in the type of
      `predictions`; lower is better. An exact prediction of 0 counts as 0, any other of it is ∞.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for positive quantities of several scales; a prediction that is too low is charged for
    less than one that is too high, which `symmetric_mean_absolute_percentage_error` bounds.

    Example:
      >>> print(mean_absolute_percentage_error(jnp.array([1.5, 5.0]), jnp.array([2.0, 4.0])))
      0.25

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked(predictions, targets, where)
    ratio = _share(jnp.abs(prediction - target), jnp.abs(target))
    return masked_mean(ratio, axis=axis, where=where).astype(jnp.result_type(predictions))


def symmetric_mean_absolute_percentage_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""The mean size of the errors, each as a share of prediction and target (SMAPE).

        SMAPE = mean(2 |prediction - target| / (|prediction| + |target|))

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.

    Returns:
      The metric without `axis` as a fraction from 0 to 2, in the type of `predictions`; lower is
      better. Prediction and target of 0 count as 0.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it in place of `mean_absolute_percentage_error` where targets may be 0.

    Example:
      >>> symmetric = symmetric_mean_absolute_percentage_error
      >>> print(symmetric(jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])))
      0.5

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked(predictions, targets, where)
    ratio = _share(2 * jnp.abs(prediction - target), jnp.abs(prediction) + jnp.abs(target))
    return masked_mean(ratio, axis=axis, where=where).astype(jnp.result_type(predictions))


def r2_score(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    num_features: int = 0,
    axis: Axis = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""The share of the targets' variance that predictions explain (R²), adjusted for features.

        R² = 1 - Σ (prediction - target)² / Σ (target - mean target)²
        adjusted R² = 1 - (1 - R²) (n - 1) / (n - p - 1),   n entries, p = num_features

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      num_features: p at least 0, how many inputs the model was fitted to, for the adjusted form.
        Default 0: R² itself.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.

    Returns:
      The metric without `axis`, at most 1, in the type of `predictions`; 0 for the mean of the
      targets, negative for worse. Constant targets give 1 where all predictions are exact and 0
      elsewhere. NaN where n - p - 1 is not positive, and p is.

    Raises:
      ValueError: a negative `num_features`, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to judge a fit without regard to units; adjusted, fits of different numbers of features.

    Example:
      >>> predictions, targets = jnp.array([2.5, 0.0, 2.0, 8.0]), jnp.array([3.0, -0.5, 2.0, 7.0])
      >>> print(r2_score(predictions, targets).round(3))
      0.949

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(0, jnp.inf, num_features=num_features)
    prediction, target = _checked(predictions, targets, where)
    mean = masked_mean(target, axis=axis, where=where, keepdims=True)
    error = masked_mean(jnp.square(prediction - target), axis=axis, where=where)
    variance = masked_mean(jnp.square(target - mean), axis=axis, where=where)
    varies = variance > 0
    unexplained = jnp.where(varies, error / jnp.where(varies, variance, 1), error > 0)
    if num_features:
        admitted = jnp.broadcast_to(True if where is None else where, prediction.shape)
        count = jnp.count_nonzero(admitted, axis=axis)
        left = count - num_features - 1
        unexplained *= jnp.where(left > 0, (count - 1) / jnp.where(left > 0, left, 1), jnp.nan)
    return (1 - unexplained).astype(jnp.result_type(predictions))


def _checked(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array]:
    """Both in the type to compute in, and 0 at the entries that do not exist."""
    check_floating(predictions=predictions)
    check_shape(jnp.shape(predictions), targets=targets)
    check_broadcastable(jnp.shape(predictions), where=where)
    dtype = compute_dtype(predictions)
    a, b = jnp.asarray(predictions).astype(dtype), jnp.asarray(targets).astype(dtype)
    return (a, b) if where is None else (jnp.where(where, a, 0), jnp.where(where, b, 0))


def _share(part: Array, whole: Array) -> Array:
    """The quotient of numbers that are not negative, with 0 / 0 = 0."""
    return part / jnp.where((part == 0) & (whole == 0), 1, whole)
