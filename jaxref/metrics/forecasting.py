"""How good forecasts of series are: beside a naive one, over quantiles, and as an investment.

Every function computes in at least float32 and returns the type of its first argument. `where`
(boolean) says which entries exist; the others may hold anything.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.core.shards import AxisName, sum_over_shards


class InvestmentMetrics(NamedTuple):
    """What a strategy earned, and at what risk; `[...]` each, `[..., time]` the first."""

    equity: Array
    annual_return: Array
    annual_deviation: Array
    maximum_drawdown: Array
    information_ratio: Array
    modified_information_ratio: Array


def investment_metrics(
    returns: ArrayLike,
    positions: ArrayLike,
    *,
    periods_per_year: float,
    cost: float = 0.0,
    where: ArrayLike | None = None,
) -> InvestmentMetrics:
    r"""The return of a strategy, its risk, and their ratios.

        g_t = p_t r_t - cost |p_t - p_{t-1}|,   p_0 = 0
        equity_t = Π_{s ≤ t} (1 + g_s)
        ARC = equity_n^(periods_per_year / n) - 1,   ASD = √periods_per_year · deviation of g
        MDD = max_t (1 - equity_t / max_{s ≤ t} equity_s),   equity_0 = 1
        IR = ARC / ASD,   IR** = ARC² sign(ARC) / (ASD MDD)

    Args:
      returns: r `[..., time]` floating point: simple returns of the asset in each period.
      positions: p, broadcastable to `returns`: the share of the capital that is held, such as the
        sign of a forecast; negative for short.
      periods_per_year: above 0: 252 for trading days, 365 for days of cryptocurrencies.
      cost: at least 0, as a share of what is traded. The first position is bought, the last is not
        sold. Default 0.
      where: boolean, broadcastable to `returns`: the periods that exist; in the others nothing is
        earned or traded, and they do not count as time. Default: all.

    Returns:
      InvestmentMetrics in the type of `returns`. Capital that is lost (g ≤ -1) stays lost. The
      deviation is that of a sample (over n - 1). A ratio over 0 is 0 where its numerator is, and ±∞
      elsewhere; without any period all but the equity, which is 1, are 0.

    Raises:
      ValueError: `periods_per_year` not positive, a negative `cost`, or shapes that do not match.
      TypeError: returns that are not floating point.

    Use it to judge the forecasts that `jaxref.losses.mean_absolute_directional_loss` chose. A loss
    of the forecast's size, such as RMSE, says nothing about what trading on it would have earned.

    Cost: a few running sums, products and maxima along the time, each one pass over the returns.

    Example:
      >>> returns, positions = jnp.array([0.5, -0.5, 0.25]), jnp.array([1.0, 1.0, -1.0])
      >>> result = investment_metrics(returns, positions, periods_per_year=3)
      >>> print(result.equity, result.maximum_drawdown, result.annual_return)
      [1.5    0.75   0.5625] 0.625 -0.4375

    Reference: Michańków, Sakowski, Ślepaczuk, "Alternative Loss Function in Evaluation of
    Transformer Models", 2025, arXiv:2507.16548, and "Mean Absolute Directional Loss as a New Loss
    Function for Machine Learning Problems in Algorithmic Investment Strategies", 2023,
    arXiv:2309.10546.
    """
    check_floating(returns=returns)
    check_interval(0, jnp.inf, closed="right", periods_per_year=periods_per_year)
    check_interval(0, jnp.inf, cost=cost)
    r = jnp.asarray(returns).astype(compute_dtype(returns))
    if r.ndim == 0:
        raise ValueError("returns must have shape [..., time], got ()")
    check_broadcastable(r.shape, positions=positions, where=where)
    exists = jnp.broadcast_to(True if where is None else where, r.shape)
    held = jnp.broadcast_to(jnp.asarray(positions).astype(r.dtype), r.shape)
    gains = jnp.where(exists, held * r, 0.0) - cost * _traded(held, exists)
    number = jnp.count_nonzero(exists, axis=-1)
    equity = jnp.cumprod(jnp.maximum(1 + gains, 0.0), axis=-1)
    end = jnp.prod(jnp.maximum(1 + gains, 0.0), axis=-1)
    years = jnp.maximum(number, 1) / periods_per_year
    annual_return = end ** (1 / years) - 1
    mean = masked_mean(gains, axis=-1, where=exists, keepdims=True)
    square = jnp.sum(jnp.square(gains - mean), axis=-1, where=exists)
    deviation = jnp.sqrt(periods_per_year * square / jnp.maximum(number - 1, 1))
    peak = jnp.maximum(_running_largest(equity), 1.0)
    drawdown = jnp.max(1 - equity / peak, axis=-1, initial=0.0)
    ratio = _ratio(annual_return, deviation)
    modified = _ratio(annual_return * jnp.abs(annual_return), deviation * drawdown)
    results = (equity, annual_return, deviation, drawdown, ratio, modified)
    return InvestmentMetrics(*(x.astype(jnp.result_type(returns)) for x in results))


def mean_absolute_scaled_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    history: ArrayLike,
    *,
    period: int = 1,
    where: ArrayLike | None = None,
    history_where: ArrayLike | None = None,
) -> Array:
    r"""The error of a forecast over that of the seasonal naive one in the past (MASE).

        MASE = mean |prediction - target| / mean |h_t - h_{t - m}|,   m = period

    Args:
      predictions: `[..., horizon]` floating point.
      targets: the same shape.
      history: h `[..., time]`: the series before the forecast.
      period: m at least 1, the length of a season. Default 1: the last value is the naive forecast.
      where: boolean, broadcastable to `predictions`: the entries that exist. Default: all.
      history_where: boolean, broadcastable to `history`. Default: all.

    Returns:
      `[...]` in the type of `predictions`: below 1 for forecasts that are better than the naive one
      was. Where the latter was exact, 0 for exact forecasts and ∞ for others; 0 of no entries.

    Raises:
      ValueError: `period` not positive, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to average over series of several scales, those around 0 included, where
    `mean_absolute_percentage_error` fails.

    Cost: one pass over the forecasts and one over the history.

    Example:
      >>> history = jnp.array([1.0, 3.0, 2.0, 4.0])
      >>> print(mean_absolute_scaled_error(jnp.array([4.0]), jnp.array([5.0]), history).round(3))
      0.6

    Reference: Chernov, "Fine-Tuning a Time Series Foundation Model with Wasserstein Loss", 2024,
    arXiv:2409.15367, which reports it, after Hyndman, Koehler, "Another look at measures of
    forecast accuracy", International Journal of Forecasting 22(4), 2006.
    """
    check_floating(predictions=predictions)
    if not isinstance(period, int) or period < 1:
        raise ValueError(f"period must be an integer at least 1, got {period!r}")
    shape = jnp.shape(predictions)
    check_shape(shape, targets=targets)
    check_broadcastable(shape, where=where)
    dtype = compute_dtype(predictions)
    f, y, h = (jnp.asarray(x).astype(dtype) for x in (predictions, targets, history))
    check_shape((*shape[:-1], *h.shape[-1:]), history=h)
    check_broadcastable(h.shape, history_where=history_where)
    known = jnp.broadcast_to(True if history_where is None else history_where, h.shape)
    exists = jnp.broadcast_to(True if where is None else where, shape)
    error = masked_mean(jnp.abs(f - y), axis=-1, where=exists)
    steps = jnp.abs(h[..., period:] - h[..., :-period])
    naive = masked_mean(steps, axis=-1, where=known[..., period:] & known[..., :-period])
    return _ratio(error, naive).astype(jnp.result_type(predictions))


def weighted_quantile_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    quantiles: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The pinball loss of forecast quantiles over the size of the targets (WQL; of the set).

        WQL = mean_q 2 Σ_t max(q r_t, (q - 1) r_t) / Σ_t |y_t|,   r_t = y_t - prediction of q

    About the continuous ranked probability score of the forecast, as a share of the targets.

    Args:
      predictions: `[..., quantiles]` floating point: a forecast of each quantile.
      targets: y `[...]`.
      quantiles: q `[quantiles]` in (0, 1).
      where: boolean, broadcastable to `targets`: the entries that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the entries are spread.

    Returns:
      A scalar in the type of `predictions`; lower is better. Targets of 0 alone give 0 for exact
      forecasts and ∞ for others; 0 of no entries.

    Raises:
      ValueError: a quantile outside of (0, 1), or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to compare probabilistic forecasts; with the quantile 1/2 alone it is the sum of the
    absolute errors over that of the targets, for point forecasts. To train, take
    `jaxref.losses.multi_quantile_loss`.

    Cost: one pass over the quantiles of each entry; with `axis_name` one sum over the shards.

    Example:
      >>> predictions, quantiles = jnp.array([[1.0, 2.0], [4.0, 5.0]]), jnp.array([0.25, 0.5])
      >>> print(weighted_quantile_loss(predictions, jnp.array([3.0, 5.0]), quantiles))
      0.15625

    Reference: Chernov, "Fine-Tuning a Time Series Foundation Model with Wasserstein Loss", 2024,
    arXiv:2409.15367, which reports it.
    """
    check_floating(predictions=predictions)
    check_interval(0, 1, closed="neither", quantiles=quantiles)
    if jnp.ndim(predictions) == 0:
        raise ValueError("predictions must have shape [..., quantiles], got ()")
    *entries, levels = jnp.shape(predictions)
    check_shape(tuple(entries), targets=targets)
    check_shape((levels,), quantiles=quantiles)
    check_broadcastable(tuple(entries), where=where)
    dtype = compute_dtype(predictions)
    f, y, q = (jnp.asarray(x).astype(dtype) for x in (predictions, targets, quantiles))
    exists = jnp.broadcast_to(True if where is None else where, y.shape)
    r = jnp.where(exists[..., None], y[..., None] - f, 0.0)
    pinball = jnp.sum(jnp.maximum(q * r, (q - 1) * r)) / max(levels, 1)
    size = jnp.sum(jnp.abs(y), where=exists)
    pinball, size = sum_over_shards((pinball, size), axis_name)
    return _ratio(2 * pinball, size).astype(jnp.result_type(predictions))


def _traded(held: Array, exists: Array) -> Array:
    """How far each position is from the one before that existed; the first from none."""
    periods = jnp.arange(held.shape[-1])
    latest = _running_largest(jnp.where(exists, periods, -1))
    before = jnp.concatenate([jnp.full_like(latest[..., :1], -1), latest[..., :-1]], axis=-1)
    known = jnp.where(exists, held, 0.0)
    previous = jnp.take_along_axis(known, jnp.maximum(before, 0), axis=-1)
    return jnp.where(exists, jnp.abs(known - jnp.where(before >= 0, previous, 0.0)), 0.0)


def _running_largest(x: Array) -> Array:
    return lax.cummax(x, axis=x.ndim - 1)


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole for a whole at least 0, with 0 / 0 = 0."""
    return part / jnp.where((part == 0) & (whole == 0), 1, whole)
