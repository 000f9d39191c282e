"""Regression losses with a logarithm: of the numbers themselves, or around their squared error.

Every function computes in at least float32 and returns the type of the predictions. `where`
(boolean, broadcastable to the predictions) says which entries exist; the others have loss 0 and
gradient 0 and may hold anything, NaN included.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName
from jaxref.metrics.regression import root_mean_squared_error


def squared_log_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The squared error of the logarithms of 1 + x; its mean is the MSLE.

        L = (log(1 + prediction) - log(1 + target))²

    It depends on the ratio (1 + prediction) / (1 + target) alone: the same factor costs the same
    at every size, and a prediction that is too low more than one too high by the same difference.

    Args:
      predictions: `[...]` floating point, at least 0; negative ones count as 0, with gradient 0.
      targets: real numbers, broadcastable to `predictions`, at least 0; negative ones count as 0.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`.

    Raises:
      ValueError: `targets` or `where` do not broadcast to `predictions`.
      TypeError: predictions that are not floating point.

    Use it for quantities at least 0 that grow by factors, such as sales and visits;
    `absolute_percentage_error` is bounded for low predictions, `squared_error` sees differences.

    Cost: one pass over the predictions; two logarithms each.

    Example:
      >>> print(squared_log_error(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])).round(4))
      [0.4805 0.4805]

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    prediction, target = _checked(predictions, targets, where)
    loss = jnp.square(_log_of_one_more(prediction) - _log_of_one_more(target))
    return loss.astype(jnp.result_type(predictions))


def root_mean_squared_log_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int | tuple[int, ...] | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The root of the mean squared error of the logarithms of 1 + x (RMSLE; a loss of the set).

        RMSLE = √mean((log(1 + prediction) - log(1 + target))²)

    Args:
      predictions: `[...]` floating point, at least 0; negative ones count as 0, with gradient 0.
      targets: the same shape, at least 0; negative ones count as 0.
      axis: the axes to reduce. Default: all.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      The loss without `axis`, at least 0, in the type of `predictions`, with gradient 0 where all
      predictions are exact; 0 of no entries.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to report `squared_log_error` on the scale of factors. The metric of depth maps that has
    this name in `jaxref.metrics` takes logarithms of the depths themselves, without the 1.

    Cost: one pass over the predictions; two logarithms each.

    Example:
      >>> print(root_mean_squared_log_error(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])).round(4))
      0.6931

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    check_shape(jnp.shape(predictions), targets=targets)
    prediction, target = _checked(predictions, targets, where)
    loss = root_mean_squared_error(
        _log_of_one_more(prediction),
        _log_of_one_more(target),
        axis=axis,
        where=where,
        axis_name=axis_name,
    )
    return loss.astype(jnp.result_type(predictions))


def logarithmic_squared_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    form: str = "barrier",
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> Array:
    r"""A logarithm around the squared error of data in [0, 1] (logarithmic MSE, LMSE).

        barrier   L = -log(1 - e²) = e² + e⁴/2 + ...,   gradient 2 e / (1 - e²)
        log1p     L = log(1 + e²)  = e² - e⁴/2 + ...,   gradient 2 e / (1 + e²)

    with e = prediction - target. The barrier pulls harder than the squared error, by 1 / (1 - e²),
    and without bound as |e| → 1; from where e² = 1 - ε, ε = epsilon, it goes on as the straight
    line with its slope there, so that a prediction out of range keeps a finite pull back. The other
    form pulls less the larger the error.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      form: "barrier", the default, or "log1p".
      epsilon: ε in (0, 1), how far before |e| = 1 the barrier's line begins. Default 1e-6.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`. Value, slope and curvature at 0 are those of
      `squared_error` in both forms, which lie above and below it elsewhere.

    Raises:
      ValueError: an unknown `form`, `epsilon` outside of (0, 1), or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use the barrier to train an autoencoder of images or spectrograms in [0, 1], whose mean loss
    over the features is then the score of an anomaly; "log1p" for targets with outliers on any
    scale. The mean over features may be taken within the logarithm as well: both agree to second
    order. The formula was inferred from the method's description (steeper gradients than the
    squared error's, steeper still for larger errors).

    Cost: one pass over the predictions.

    Example:
      >>> print(logarithmic_squared_error(jnp.array([0.1, 0.9]), jnp.zeros(2)).round(4))
      [0.0101 1.6607]

    Reference: Park, "Concise Logarithmic Loss Function for Robust Training of Anomaly Detection
    Model", 2022, arXiv:2201.05748.
    """
    check_interval(0, 1, closed="neither", epsilon=epsilon)
    prediction, target = _checked(predictions, targets, where)
    e = prediction - target
    if form == "log1p":
        loss = jnp.log1p(jnp.square(e))
    elif form == "barrier":
        size = jnp.abs(e)
        resolution = jnp.finfo(e.dtype).epsneg
        end = jnp.minimum(jnp.sqrt(1 - jnp.asarray(epsilon, e.dtype)), 1 - resolution)
        is_inside = size <= end
        slope = 2 * end / ((1 - end) * (1 + end))
        line = _barrier(end) + slope * (size - end)
        loss = jnp.where(is_inside, _barrier(jnp.where(is_inside, size, 0.0)), line)
    else:
        raise ValueError(f"form must be 'barrier' or 'log1p', got {form!r}")
    return loss.astype(jnp.result_type(predictions))


def _barrier(size: Array) -> Array:
    """-log(1 - size²) below 1, precise where the square is small and where the size is near 1."""
    is_small = size < 0.5
    near_1 = jnp.where(is_small, 0.5, size)
    square = jnp.square(jnp.where(is_small, size, 0.0))
    return -jnp.where(is_small, jnp.log1p(-square), jnp.log((1 - near_1) * (1 + near_1)))


def _log_of_one_more(x: Array) -> Array:
    return jnp.log1p(jnp.maximum(x, 0.0))


def _checked(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array]:
    """Both in the type to compute in and of one shape, and 0 at the entries that do not exist."""
    check_floating(predictions=predictions)
    check_broadcastable(jnp.shape(predictions), targets=targets, where=where)
    dtype = compute_dtype(predictions)
    a, b = jnp.asarray(predictions).astype(dtype), jnp.asarray(targets).astype(dtype)
    b = jnp.broadcast_to(b, a.shape)
    return (a, b) if where is None else (jnp.where(where, a, 0), jnp.where(where, b, 0))
