"""How far predictions of numbers are off: as a size, as a percentage, and as a share explained.

Every function reduces the axes in `axis` in at least float32 and returns the type of the
predictions. `where` (boolean, broadcastable to the predictions) says which entries exist; the
others may hold anything. A metric of no entries is 0. Gradients are finite, and 0 where all
predictions are exact, so that the errors of a set serve as losses: `jaxref.losses` has those under
the same names.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.core.vectors import safe_sqrt

Axis = int | tuple[int, ...] | None


def root_mean_squared_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The root of the mean squared error, in the targets' unit (RMSE; a loss of the set).

        RMSE = √mean((prediction - target)²)

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis`, in the type of `predictions`; lower is better.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it where large errors matter most; the mean of `jaxref.losses.absolute_error` gives all the
    same weight, and `normalized_root_mean_squared_error` compares series of several scales.

    Cost: one pass over the entries; with `axis_name` one sum over the shards.

    Example:
      >>> print(root_mean_squared_error(jnp.array([1.0, 5.0]), jnp.array([2.0, -2.0])))
      5.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; Jadon, Patil, Jadon, "A
    Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting", 2022,
    arXiv:2211.02989.
    """
    prediction, target = _checked(predictions, targets, where)
    mean_square = _mean(jnp.square(prediction - target), axis, where, axis_name)
    return safe_sqrt(mean_square).astype(jnp.result_type(predictions))


def mean_absolute_percentage_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean size of the errors, each as a share of its target (MAPE).

        MAPE = mean(|prediction - target| / |target|)

    Args:
      predictions: `[...]` floating point.
      targets: the same shape, not 0.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis` as a fraction, of which 100 times is the percentage, in the type of
      `predictions`; lower is better. An exact prediction of 0 counts as 0, any other of it is ∞.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for positive quantities of several scales; a prediction that is too low is charged for
    less than one that is too high, which `symmetric_mean_absolute_percentage_error` bounds.

    Cost: one pass over the entries; with `axis_name` one sum over the shards.

    Example:
      >>> print(mean_absolute_percentage_error(jnp.array([1.5, 5.0]), jnp.array([2.0, 4.0])))
      0.25

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; Jadon, Patil, Jadon, "A
    Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting", 2022,
    arXiv:2211.02989.
    """
    prediction, target = _checked(predictions, targets, where)
    ratio = _share(_size(prediction - target), jnp.abs(target))
    return _mean(ratio, axis, where, axis_name).astype(jnp.result_type(predictions))


def symmetric_mean_absolute_percentage_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean size of the errors, each as a share of prediction and target (SMAPE).

        SMAPE = mean(2 |prediction - target| / (|prediction| + |target|))

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis` as a fraction from 0 to 2, in the type of `predictions`; lower is
      better. Prediction and target of 0 count as 0.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it in place of `mean_absolute_percentage_error` where targets may be 0.

    Cost: one pass over the entries; with `axis_name` one sum over the shards.

    Example:
      >>> symmetric = symmetric_mean_absolute_percentage_error
      >>> print(symmetric(jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])))
      0.5

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked(predictions, targets, where)
    ratio = _share(2 * _size(prediction - target), _size(prediction) + jnp.abs(target))
    return _mean(ratio, axis, where, axis_name).astype(jnp.result_type(predictions))


def r2_score(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    num_features: int = 0,
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
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
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis`, at most 1, in the type of `predictions`; 0 for the mean of the
      targets, negative for worse. Constant targets give 1 where all predictions are exact and 0
      elsewhere. NaN where n - p - 1 is not positive, and p is.

    Raises:
      ValueError: a negative `num_features`, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to judge a fit without regard to units; adjusted, fits of different numbers of features.

    Cost: one pass for the errors and three over the targets (largest, mean, squares); with
    `axis_name` a maximum and three sums over the shards, or four when adjusted.

    Example:
      >>> predictions, targets = jnp.array([2.5, 0.0, 2.0, 8.0]), jnp.array([3.0, -0.5, 2.0, 7.0])
      >>> print(r2_score(predictions, targets).round(3))
      0.949

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(0, jnp.inf, num_features=num_features)
    prediction, target = _checked(predictions, targets, where)
    error = _mean(jnp.square(prediction - target), axis, where, axis_name)
    deviation = _deviation(target, axis, where, axis_name)
    variance = _mean(jnp.square(deviation), axis, where, axis_name)
    varies = variance > 0
    unexplained = jnp.where(varies, error / jnp.where(varies, variance, 1), error > 0)
    if num_features:
        admitted = jnp.broadcast_to(True if where is None else where, prediction.shape)
        count = sum_over_shards(jnp.count_nonzero(admitted, axis=axis), axis_name)
        left = count - num_features - 1
        unexplained *= jnp.where(left > 0, (count - 1) / jnp.where(left > 0, left, 1), jnp.nan)
    return (1 - unexplained).astype(jnp.result_type(predictions))


def relative_absolute_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The absolute error as a share of that of the targets' mean (RAE; a loss of the set).

        RAE = Σ |prediction - target| / Σ |target - mean target|

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis`, at least 0, in the type of `predictions`: 0 for exact predictions,
      1 for the mean of the targets, more for worse. Constant targets give 0 where all predictions
      are exact, and ∞ elsewhere.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to compare series of several scales; `relative_squared_error` weighs large errors more.

    Cost: one pass for the errors and three over the targets (largest, mean, sizes); with
    `axis_name` a maximum and three sums over the shards.

    Example:
      >>> print(relative_absolute_error(jnp.array([2.0, 2.0, 6.0]), jnp.array([1.0, 3.0, 5.0])))
      0.75

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    prediction, target = _checked(predictions, targets, where)
    error = _mean(_size(prediction - target), axis, where, axis_name)
    spread = _size(_deviation(target, axis, where, axis_name))
    share = _share(error, _mean(spread, axis, where, axis_name))
    return share.astype(jnp.result_type(predictions))


def relative_squared_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The squared error as a share of that of the targets' mean (RSE; a loss of the set).

        RSE = Σ (prediction - target)² / Σ (target - mean target)² = 1 - R²

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis`, at least 0, in the type of `predictions`: 0 for exact predictions,
      1 for the mean of the targets, more for worse. Constant targets give 0 where all predictions
      are exact, and ∞ elsewhere.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to compare series of several scales; its root is `normalized_root_mean_squared_error` by
    the standard deviation, and `r2_score` the same share the other way round.

    Cost: one pass for the errors and three over the targets (largest, mean, squares); with
    `axis_name` a maximum and three sums over the shards.

    Example:
      >>> print(relative_squared_error(jnp.array([2.0, 2.0, 6.0]), jnp.array([1.0, 3.0, 5.0])))
      0.375

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    prediction, target = _checked(predictions, targets, where)
    error = _mean(jnp.square(prediction - target), axis, where, axis_name)
    spread = jnp.square(_deviation(target, axis, where, axis_name))
    share = _share(error, _mean(spread, axis, where, axis_name))
    return share.astype(jnp.result_type(predictions))


def normalized_root_mean_squared_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    normalization: str = "mean",
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The root mean squared error as a share of the targets' scale (NRMSE; a loss of the set).

        NRMSE = √mean((prediction - target)²) / scale

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      normalization: the scale. "mean": |mean target|, the default; "range": the largest less the
        smallest target, taken as constants; "std": the targets' standard deviation (over n).
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis`, at least 0, in the type of `predictions`; lower is better. A scale
      of 0 gives 0 where all predictions are exact, and ∞ elsewhere.

    Raises:
      ValueError: an unknown `normalization`, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to compare series of several scales: by the mean where targets are positive, by the
    standard deviation (1 for the mean of the targets) or range where they are around 0.

    Cost: one pass for the errors and over the targets one for "mean", two for "range", three for
    "std", each a reduction over the shards with `axis_name`.

    Example:
      >>> predictions, targets = jnp.array([2.0, 2.0, 6.0]), jnp.array([1.0, 3.0, 5.0])
      >>> print(normalized_root_mean_squared_error(predictions, targets, normalization="range"))
      0.25

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    prediction, target = _checked(predictions, targets, where)
    error = safe_sqrt(_mean(jnp.square(prediction - target), axis, where, axis_name))
    if normalization == "mean":
        scale = _size(_mean(target, axis, where, axis_name))
    elif normalization == "range":
        largest, smallest = (_largest(x, axis, where, axis_name) for x in (target, -target))
        scale = jnp.reshape(largest + smallest, error.shape)  # smallest is that of -target
    elif normalization == "std":
        deviation = _deviation(target, axis, where, axis_name)
        scale = safe_sqrt(_mean(jnp.square(deviation), axis, where, axis_name))
    else:
        raise ValueError(f"normalization must be 'mean', 'range' or 'std', got {normalization!r}")
    return _share(error, scale).astype(jnp.result_type(predictions))


def relative_root_mean_squared_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The root of the errors' square over the predictions' (RRMSE; a loss of the set).

        RRMSE = √(Σ (prediction - target)² / Σ prediction²)

    Args:
      predictions: `[...]` floating point.
      targets: the same shape.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The metric without `axis`, at least 0, in the type of `predictions`; lower is better, and
      below 0.1 often counts as excellent. Predictions of 0 alone give 0 where all are exact, and ∞
      elsewhere.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it as studies that report it do. It is 1 in the limit of ever larger predictions and no
    larger for wilder ones, so train with `normalized_root_mean_squared_error` instead.

    Cost: one pass over the entries; with `axis_name` two sums over the shards.

    Example:
      >>> print(relative_root_mean_squared_error(jnp.array([3.0, 4.0]), jnp.array([0.0, 0.0])))
      1.0

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    prediction, target = _checked(predictions, targets, where)
    error = _mean(jnp.square(prediction - target), axis, where, axis_name)
    share = _share(error, _mean(jnp.square(prediction), axis, where, axis_name))
    return safe_sqrt(share).astype(jnp.result_type(predictions))


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


def _mean(
    x: Array,
    axis: Axis,
    where: ArrayLike | None,
    axis_name: AxisName | None,
    keepdims: bool = False,
) -> Array:
    """The mean over the entries that exist on all shards; 0 where none does."""
    exists = jnp.broadcast_to(True if where is None else where, x.shape)
    total = jnp.sum(x, axis=axis, keepdims=keepdims, where=exists)
    number = jnp.count_nonzero(exists, axis=axis, keepdims=keepdims)
    total, number = sum_over_shards((total, number), axis_name)
    return total / jnp.maximum(number, 1)


def _largest(x: Array, axis: Axis, where: ArrayLike | None, axis_name: AxisName | None) -> Array:
    """The largest of the entries that exist on all shards, with the reduced axes, no gradient."""
    exists = jnp.broadcast_to(True if where is None else where, x.shape)
    x = jax.lax.stop_gradient(x)
    largest = jnp.max(x, axis=axis, keepdims=True, where=exists, initial=-jnp.inf)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    return jnp.where(jnp.isneginf(largest), 0.0, largest)


def _deviation(x: Array, axis: Axis, where: ArrayLike | None, axis_name: AxisName | None) -> Array:
    """x less its mean; exactly 0 for constants, of which the mean itself may be rounded."""
    shifted = x - _largest(x, axis, where, axis_name)
    if where is not None:
        shifted = jnp.where(where, shifted, 0)
    return shifted - _mean(shifted, axis, where, axis_name, keepdims=True)


def _size(error: Array) -> Array:
    """|error|, whose slope is 0 at 0, where that of jnp.abs is 1."""
    return error * jnp.sign(error)


def _share(part: Array, whole: Array) -> Array:
    """part / whole of numbers at least 0: 0 / 0 = 0, and what is ∞ has no gradient."""
    is_zero = whole == 0
    infinite = jnp.where(part == 0, 0.0, jnp.inf * jax.lax.stop_gradient(part))
    return jnp.where(is_zero, infinite, part / jnp.where(is_zero, 1, whole))
