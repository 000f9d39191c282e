"""Regression losses: one value for every pair of a prediction and a target.

Every function works element by element in at least float32 and returns the type of the predictions.
`where` (boolean, broadcastable to the predictions) says which entries exist; the others have loss 0
and gradient 0 and may hold anything, NaN included. With e = prediction - target, they differ in how
they weigh a large |e| against a small one:

- `squared_error`, and its root over the set, where large errors matter most; least at the mean;
- `absolute_error`, `huber_loss`, `log_cosh_loss` where targets have outliers; least at the median,
  or between it and the mean;
- `quantile_loss`, `multi_quantile_loss`, `gaussian_negative_log_likelihood` for intervals;
- `absolute_percentage_error`, and `squared_log_error` of `regression_logarithmic`, for positive
  targets of several orders of magnitude; `poisson_loss` for counts;
- `bias_error` to see whether predictions are too high or too low, never to train.

Errors relative to the whole set of targets are in `jaxref.metrics.regression`.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def squared_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The square of the error; its mean is the mean squared error.

        L = e²,   e = prediction - target

    Least in expectation at the conditional mean; the gradient is 2 e.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`, in the square of the targets' unit.

    Raises:
      ValueError: `targets` or `where` do not broadcast to `predictions`.
      TypeError: predictions that are not floating point.

    Use it for errors that are about normal; one outlier weighs as its square, which `huber_loss`
    and `log_cosh_loss` avoid.

    Cost: one pass over the predictions.

    Example:
      >>> print(squared_error(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0])))
      [0.25 4.  ]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; Jadon, Patil, Jadon, "A
    Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting", 2022,
    arXiv:2211.02989.
    """
    return jnp.square(_error(predictions, targets, where)).astype(jnp.result_type(predictions))


def absolute_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The size of the error; its mean is the mean absolute error.

        L = |e|,   e = prediction - target

    Least in expectation at the conditional median; the gradient is sign(e), 0 at e = 0.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`, in the targets' unit.

    Raises:
      ValueError: `targets` or `where` do not broadcast to `predictions`.
      TypeError: predictions that are not floating point.

    Use it where outliers should count no more than others; `quantile_loss` is its form for other
    quantiles than the median, `log_cosh_loss` its smooth one.

    Cost: one pass over the predictions.

    Example:
      >>> print(absolute_error(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0])))
      [0.5 2. ]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; Jadon, Patil, Jadon, "A
    Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting", 2022,
    arXiv:2211.02989.
    """
    e = _error(predictions, targets, where)
    # the slope of jnp.abs at 0 is 1, which would push exact predictions on
    return (e * jnp.sign(e)).astype(jnp.result_type(predictions))


def bias_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The error with its sign; its mean is the mean bias error (MBE).

        e = prediction - target,   mean e² = (mean e)² + variance of e

    so that the mean squared error is the squared bias and what no constant correction removes.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      where: boolean, broadcastable to `predictions`; excluded entries are 0. Default: all.

    Returns:
      `[...]` errors in the type of `predictions`, in the targets' unit: positive where predictions
      are too high. The survey's code has the opposite sign.

    Raises:
      ValueError: `targets` or `where` do not broadcast to `predictions`.
      TypeError: predictions that are not floating point.

    Use it to diagnose a forecast beside `absolute_error`: errors of both signs cancel, and as a
    loss it has no minimum.

    Cost: one pass over the predictions.

    Example:
      >>> print(bias_error(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0])))
      [-0.5  2. ]

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    return _error(predictions, targets, where).astype(jnp.result_type(predictions))


def absolute_percentage_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: float = 1e-7,
    where: ArrayLike | None = None,
) -> Array:
    r"""The size of the error as a share of the target; its mean is the MAPE.

        L = |e| / max(|target|, ε),   e = prediction - target,   ε = epsilon

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      epsilon: ε above 0, in the targets' unit: what a target of 0 counts as. Default 1e-7.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`, as a fraction: 100 times is the percentage.

    Raises:
      ValueError: `epsilon` not positive, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for positive targets away from 0. No positive forecast that is too low costs more than 1,
    so training prefers those; `squared_log_error` treats factors up and down alike.
    `jaxref.metrics.mean_absolute_percentage_error` is its mean with ε = 0.

    Cost: one pass over the predictions.

    Example:
      >>> print(absolute_percentage_error(jnp.array([1.5, 5.0]), jnp.array([2.0, 4.0])))
      [0.25 0.25]

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)
    e = _error(predictions, targets, where)
    wide = jnp.broadcast_to(jnp.asarray(targets).astype(e.dtype), e.shape)
    if where is not None:
        wide = jnp.where(where, wide, 1.0)
    loss = e * jnp.sign(e) / jnp.maximum(jnp.abs(wide), epsilon)
    return loss.astype(jnp.result_type(predictions))


def huber_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    delta: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""The squared error of small errors and the absolute error of large ones (Huber).

        L = e² / 2            where |e| ≤ δ
        L = δ (|e| - δ / 2)   elsewhere,     e = prediction - target,   δ = delta

    The gradient is e, clipped to [-δ, δ]. δ → ∞ is half of the squared error, L / δ for δ → 0 the
    absolute error.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      delta: δ above 0, in the targets' unit: the size from which an error is an outlier. Default 1.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`.

    Raises:
      ValueError: `delta` not positive, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it in place of `squared_error` where a few targets are off; `smooth_l1_loss` is the same
    over δ, with a gradient of ±1 for large errors.

    Cost: one pass over the predictions.

    Example:
      >>> print(huber_loss(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0])))
      [0.125 1.5  ]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; Jadon, Patil, Jadon, "A
    Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting", 2022,
    arXiv:2211.02989.
    """
    check_interval(0, jnp.inf, closed="right", delta=delta)
    size = jnp.abs(_error(predictions, targets, where))
    quadratic = jnp.minimum(size, delta)
    loss = 0.5 * jnp.square(quadratic) + delta * (size - quadratic)
    return loss.astype(jnp.result_type(predictions))


def log_cosh_loss(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The logarithm of the error's hyperbolic cosine: a Huber loss that is smooth.

        L = log cosh e = |e| + log(1 + exp(-2 |e|)) - log 2,   e = prediction - target

    About e² / 2 for small errors and |e| - log 2 for large ones; the gradient is tanh e.

    Args:
      predictions: `[...]` floating point, in a unit in which 1 is where outliers begin.
      targets: real numbers, broadcastable to `predictions`.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`, to relative precision for small errors too.

    Raises:
      ValueError: `targets` or `where` do not broadcast to `predictions`.
      TypeError: predictions that are not floating point.

    Use it in place of `huber_loss` where second derivatives are needed.

    Cost: one pass over the predictions, with a few exponentials and logarithms each.

    Example:
      >>> print(log_cosh_loss(jnp.array([1.0, 3.0]), jnp.array([1.5, 1.0])).round(3))
      [0.12  1.325]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; Jadon, Patil, Jadon, "A
    Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting", 2022,
    arXiv:2211.02989.
    """
    e = _error(predictions, targets, where)
    is_small = jnp.abs(e) < 1
    # log cosh e = log(1 + 2 sinh²(e/2)) loses nothing near 0, where the other form cancels
    small = jnp.log1p(2 * jnp.square(jnp.sinh(0.5 * jnp.where(is_small, e, 0.0))))
    size = jnp.abs(jnp.where(is_small, 1.0, e))
    large = size + jax.nn.softplus(-2 * size) - math.log(2)
    return jnp.where(is_small, small, large).astype(jnp.result_type(predictions))


def quantile_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    quantile: ArrayLike = 0.5,
    where: ArrayLike | None = None,
) -> Array:
    r"""The pinball loss, whose expectation is least at a quantile of the target.

        L = max(q r, (q - 1) r),   r = target - prediction,   q = quantile

    A prediction below the target costs q for each unit, one above it 1 - q. q = 1/2 is half of the
    absolute error.

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      quantile: q in (0, 1): a number, or an array broadcastable to `predictions`, such as one value
        for each of the quantiles along the last axis. Default 0.5, the median.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`; the gradient at r = 0 is 1/2 - q, the middle of
      the slopes on both sides.

    Raises:
      ValueError: a `quantile` outside of (0, 1), or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for intervals, with several quantiles of one prediction each; `absolute_error` for the
    median alone.

    Cost: one pass over the predictions, of which the model makes one for each quantile.

    Example:
      >>> quantiles = jnp.array([0.1, 0.5, 0.9])
      >>> print(quantile_loss(jnp.array([1.0, 2.0, 4.0]), 3.0, quantile=quantiles).round(2))
      [0.2 0.5 0.1]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; Jadon, Patil, Jadon, "A
    Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting", 2022,
    arXiv:2211.02989.
    """
    check_interval(0, 1, closed="neither", quantile=quantile)
    check_broadcastable(jnp.shape(predictions), quantile=quantile)
    r = -_error(predictions, targets, where)
    q = jnp.asarray(quantile).astype(r.dtype)
    return jnp.maximum(q * r, (q - 1) * r).astype(jnp.result_type(predictions))


def multi_quantile_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    quantiles: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""The pinball losses of several quantiles of one target, summed.

        L = Σ_k max(q_k (y - f_k), (q_k - 1) (y - f_k)),   f = predictions,   q = quantiles

    Args:
      predictions: f `[..., quantiles]` floating point: a forecast of each quantile.
      targets: y `[...]`.
      quantiles: q `[quantiles]` in (0, 1).
      where: boolean, broadcastable to `targets`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`. Forecasts that cross are not charged for it.

    Raises:
      ValueError: a quantile outside of (0, 1), or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it for a forecast with its interval; `quantile_loss` is each of the terms, and
    `jaxref.metrics.weighted_quantile_loss` what benchmarks report.

    Cost: one pass over the predictions, as many for each target as there are quantiles.

    Example:
      >>> predictions, quantiles = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([0.1, 0.5, 0.9])
      >>> print(multi_quantile_loss(predictions, jnp.array([3.0]), quantiles).round(2))
      [0.8]

    Reference: Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for
    Time Series Forecasting", 2022, arXiv:2211.02989.
    """
    check_floating(predictions=predictions)
    check_interval(0, 1, closed="neither", quantiles=quantiles)
    if jnp.ndim(predictions) == 0:
        raise ValueError("predictions must have shape [..., quantiles], got ()")
    *entries, number = jnp.shape(predictions)
    check_shape((number,), quantiles=quantiles)
    check_shape(tuple(entries), targets=targets)
    check_broadcastable(tuple(entries), where=where)
    losses = quantile_loss(
        jnp.asarray(predictions).astype(compute_dtype(predictions)),
        jnp.asarray(targets)[..., None],
        quantile=quantiles,
        where=None if where is None else jnp.asarray(where)[..., None],
    )
    return jnp.sum(losses, axis=-1).astype(jnp.result_type(predictions))


def gaussian_negative_log_likelihood(
    mean: ArrayLike,
    targets: ArrayLike,
    scale: ArrayLike,
    *,
    min_variance: float = 1e-2,
    full: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    r"""The negative log-likelihood of a normal law of predicted mean and deviation.

        L = (log v + (y - m)² / v) / 2,   v = max(s², min_variance)

    with the mean m, the scale s and the target y. Over all predictions its expectation is least at
    the mean and the standard deviation of the target given the input: a forecast that says how sure
    it is. The floor changes the value of v alone: the gradient passes it and reaches s, so that a
    scale that has become too small grows again.

    Args:
      mean: m `[...]` floating point.
      targets: real numbers y, broadcastable to `mean`.
      scale: s, broadcastable to `mean`: a standard deviation, such as the softplus of an output.
      min_variance: above 0, in the square of the targets' unit. Default 1e-2.
      full: whether to add log(2π) / 2, which depends on nothing. Default: no.
      where: boolean, broadcastable to `mean`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `mean`, in nats; may be negative.

    Raises:
      ValueError: `min_variance` not positive, or shapes that do not match.
      TypeError: means that are not floating point.

    Use it where the noise differs between inputs; `squared_error` is its case of equal noise, and
    `multi_quantile_loss` needs no law.

    Cost: one pass over the predictions, two for each target.

    Example:
      >>> loss = gaussian_negative_log_likelihood(jnp.zeros(2), jnp.array([0.0, 2.0]), 2.0)
      >>> print(loss.round(3))
      [0.693 1.193]

    Reference: Liu, Cai, Chen, Li, "Towards Better Understanding of In-Context Learning Ability from
    In-Context Uncertainty Quantification", 2024, arXiv:2405.15115.
    """
    check_floating(mean=mean)
    check_interval(0, jnp.inf, closed="right", min_variance=min_variance)
    check_broadcastable(jnp.shape(mean), scale=scale)
    e = _error(mean, targets, where)
    s = jnp.broadcast_to(jnp.asarray(scale).astype(e.dtype), e.shape)
    if where is not None:
        s = jnp.where(where, s, 1.0)
    variance = jnp.square(s)
    variance += jax.lax.stop_gradient(jnp.maximum(variance, min_variance) - variance)
    loss = 0.5 * (jnp.log(variance) + jnp.square(e) / variance)
    if full:
        loss += 0.5 * math.log(2 * math.pi)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(mean))


def poisson_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    log_rates: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    r"""The negative log-likelihood of counts under a Poisson distribution, less a constant.

        L = λ - y log λ

    for the predicted rate λ and the count y; log y!, which depends on the target alone, is left
    out. Least at λ = y, with the gradient 1 - y / λ.

    Args:
      predictions: `[...]` floating point: rates λ at least 0, or their logarithms.
      targets: counts y at least 0, broadcastable to `predictions`; need not be whole.
      log_rates: whether `predictions` are log λ, which may be any number. Default: no.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`, in nats. 0 for λ = y = 0; ∞ for λ = 0 under a
      positive count; NaN for a negative rate under a positive count.

    Raises:
      ValueError: `targets` or `where` do not broadcast to `predictions`.
      TypeError: predictions that are not floating point.

    Use it for counts of events; predict logarithms where the rate spans orders of magnitude.

    Cost: one pass over the predictions, with a logarithm or an exponential each.

    Example:
      >>> print(poisson_loss(jnp.array([2.0, 0.0]), jnp.array([3, 0])).round(3))
      [-0.079  0.   ]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    rates, counts = _checked(predictions, targets, where)
    if where is not None:
        rates, counts = (jnp.where(where, x, 0.0) for x in (rates, counts))
    if log_rates:
        loss = jnp.exp(rates) - counts * rates
        if where is not None:
            loss = jnp.where(where, loss, 0.0)
    else:
        loss = rates - counts * jnp.log(jnp.where(counts == 0, 1.0, rates))
    return loss.astype(jnp.result_type(predictions))


def _checked(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array]:
    """Both in the type to compute in, and in the shape of the predictions."""
    check_floating(predictions=predictions)
    check_broadcastable(jnp.shape(predictions), targets=targets, where=where)
    dtype = compute_dtype(predictions)
    wide = jnp.asarray(predictions).astype(dtype)
    return wide, jnp.broadcast_to(jnp.asarray(targets).astype(dtype), wide.shape)


def _error(predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None) -> Array:
    """prediction - target, and 0 for the entries that do not exist."""
    wide, targets = _checked(predictions, targets, where)
    return wide - targets if where is None else jnp.where(where, wide - targets, 0.0)
