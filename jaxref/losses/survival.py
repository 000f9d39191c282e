"""Losses of survival analysis: hazards in intervals of time, in two terms, and Cox's likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, all_shards, sum_over_shards


def discrete_hazard_loss(
    hazard_logits: ArrayLike,
    event_interval: ArrayLike,
    observed: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Negative log-likelihood of a lifetime in intervals, by hazards (logistic hazard).

    With h_t = sigmoid(a_t) the probability that what is alive ends in interval t, for an end
    (e = 1) in interval k, or survival (e = 0) up to the end of k,

        L = -Σ_{j<k} log(1 - h_j) - e log h_k - (1 - e) log(1 - h_k)

    Binary cross-entropy over the intervals up to k, of which only k may have the target 1.

    Args:
      hazard_logits: a `[..., T]` floating point, T intervals.
      event_interval: k, integer `[...]` from 0 to T - 1; and -1 where nothing is known, of which
        the loss is 0. Any other number gives NaN.
      observed: e `[...]`: 1 or True for an end, 0 or False for a censored lifetime.
      weights: `[...]`, factors of the losses, without gradient, as of `click_through_rate_weights`.
        Default: 1.
      where: boolean, broadcastable to `[...]`: the items that count; the others have loss 0.
        Default: all.

    Returns:
      `[...]` losses in the type of `hazard_logits`.

    Raises:
      ValueError: no interval, shapes that do not match, or `observed` other than 0 and 1.
      TypeError: logits not floating point, or `event_interval` not integer.

    Use it where the hazard may take any shape over time, with `discretize_times` for its targets;
    `cox_partial_likelihood_loss` learns one risk, whatever the time.

    Cost: one pass over the T intervals of each item.

    Example:
      >>> logits = jnp.zeros((2, 3))
      >>> print(discrete_hazard_loss(logits, jnp.array([0, 2]), jnp.array([1, 0])).round(3))
      [0.693 2.079]

    Reference: Kitada, Iyatomi, Seki, "Ad Creative Discontinuation Prediction with Multi-Modal
    Multi-Task Neural Survival Networks", 2022, arXiv:2204.11588.
    """
    check_floating(hazard_logits=hazard_logits)
    a = jnp.asarray(hazard_logits)
    if a.ndim == 0 or a.shape[-1] == 0:
        raise ValueError(f"hazard_logits must have shape [..., intervals], got {a.shape}")
    items = a.shape[:-1]
    interval = jnp.asarray(event_interval)
    if not jnp.issubdtype(interval.dtype, jnp.integer):
        raise TypeError(f"event_interval must be integers, got {interval.dtype.name}")
    check_shape(items, event_interval=interval)
    ended = _observed(observed, items, where)
    check_broadcastable(items, weights=weights, where=where)
    a = a.astype(compute_dtype(a))
    if where is not None:
        a = jnp.where(jnp.asarray(where)[..., None], a, 0.0)
    step, k = jnp.arange(a.shape[-1]), interval[..., None]
    sign = jnp.where((step == k) & ended[..., None], -1.0, 1.0)
    loss = jnp.sum(jax.nn.softplus(sign * a), axis=-1, where=step <= k)
    known = (interval >= 0) & (interval < a.shape[-1]) | (interval == -1) & ~ended
    loss = jnp.where(known, loss, jnp.nan)
    if weights is not None:
        loss = loss * jax.lax.stop_gradient(jnp.asarray(weights))
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(hazard_logits))


def survival_from_hazard(hazard_logits: ArrayLike) -> Array:
    r"""The probability of being alive at the end of each interval.

        S_t = Π_{j≤t} (1 - sigmoid(a_j))

    by a sum of logarithms.

    Args:
      hazard_logits: a `[..., T]` floating point.

    Returns:
      S `[..., T]` in the type of `hazard_logits`, decreasing along T.

    Raises:
      TypeError: logits that are not floating point.

    Use it to read what `discrete_hazard_loss` has trained. The sum of S over t is the expected
    number of intervals survived: minus that is a risk to give `jaxref.metrics.concordance_index`.

    Cost: a cumulative sum over the T intervals.

    Example:
      >>> print(survival_from_hazard(jnp.zeros(3)))
      [0.5 0.25 0.125]

    Reference: Kitada, Iyatomi, Seki, "Ad Creative Discontinuation Prediction with Multi-Modal
    Multi-Task Neural Survival Networks", 2022, arXiv:2204.11588.
    """
    check_floating(hazard_logits=hazard_logits)
    a = jnp.asarray(hazard_logits)
    log_survival = jnp.cumsum(jax.nn.log_sigmoid(-a.astype(compute_dtype(a))), axis=-1)
    return jnp.exp(log_survival).astype(a.dtype)


def discretize_times(
    times: ArrayLike, observed: ArrayLike, boundaries: ArrayLike
) -> tuple[Array, Array]:
    r"""Lifetimes as the targets of `discrete_hazard_loss`.

    Interval t is (b_{t-1}, b_t], b_{-1} = 0. A lifetime that ends in an interval has that one. A
    censored lifetime has the last interval that it outlived as a whole, or -1; so has one that goes
    on beyond the last boundary, and it becomes a censored one.

    Args:
      times: `[...]` at least 0: when the item ended, or was last seen.
      observed: `[...]`: 1 or True where it ended, 0 or False where it is censored.
      boundaries: b `[T]`, increasing, above 0: the ends of the intervals.

    Returns:
      Integer intervals `[...]` from -1 to T - 1, and boolean `[...]`, whether an end is observed.

    Raises:
      ValueError: shapes that do not match, a negative time, `observed` other than 0 and 1, or
        boundaries that are not positive and increasing.

    Use it on data for `discrete_hazard_loss`; `two_term_hazard_loss` does it by itself.

    Cost: two binary searches an item.

    Example:
      >>> times, observed = jnp.array([0.5, 2.0, 2.5, 9.0]), jnp.array([1, 1, 0, 1])
      >>> interval, ended = discretize_times(times, observed, jnp.array([1.0, 2.0, 4.0]))
      >>> print(interval, ended)
      [0 1 1 2] [ True  True False False]

    Reference: Kitada, Iyatomi, Seki, "Ad Creative Discontinuation Prediction with Multi-Modal
    Multi-Task Neural Survival Networks", 2022, arXiv:2204.11588.
    """
    shape = jnp.shape(times)
    ended = _observed(observed, shape, None)
    check_interval(0, jnp.inf, times=times)
    check_boundaries(boundaries=boundaries)
    times, ends = jnp.asarray(times), jnp.asarray(boundaries)
    ended &= times <= ends[-1]
    containing = jnp.searchsorted(ends, times, side="left")
    outlived = jnp.searchsorted(ends, times, side="right") - 1
    return jnp.where(ended, containing, outlived), ended


def two_term_hazard_loss(
    short_logits: ArrayLike,
    long_logits: ArrayLike,
    times: ArrayLike,
    observed: ArrayLike,
    *,
    short_boundaries: ArrayLike,
    long_boundaries: ArrayLike,
    ctr_weights: ArrayLike | None = None,
    mix: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Hazard losses of an early and of a late term, for two heads of one network.

        L = w ( L_short + mix · 1[time > H] L_long ),   H the last of `short_boundaries`

    with `discrete_hazard_loss` for both: in the short term, up to the horizon H, lifetimes beyond
    it are censored there (cut-out); in the long term, from H on, only items count that outlived it
    (wear-out). The two terms get intervals and parameters of their own.

    Args:
      short_logits: `[..., S]` floating point, for the intervals that end at `short_boundaries`.
      long_logits: `[..., L]` floating point, for those that end at `long_boundaries`; the first
        begins at H.
      times: `[...]` at least 0: when the item ended, or was last seen.
      observed: `[...]`: 1 or True where it ended, 0 or False where it is censored.
      short_boundaries: `[S]`, increasing, above 0, fine.
      long_boundaries: `[L]`, increasing, above H, coarse.
      ctr_weights: w `[...]`, from `click_through_rate_weights`. Default: 1.
      mix: at least 0, the weight of the long term. Default 1.
      where: boolean, broadcastable to `[...]`: the items that count; the others have loss 0.
        Default: all.

    Returns:
      `[...]` losses in the type of the logits.

    Raises:
      ValueError: shapes that do not match, a negative time or `mix`, `observed` other than 0 and 1,
        or boundaries that do not increase.
      TypeError: logits that are not floating point.

    Use it where lifetimes have two causes at two scales; `discrete_hazard_loss` has one term.

    Cost: one pass over the S + L intervals of each item; two heads of the network.

    Example:
      >>> loss = two_term_hazard_loss(
      ...     jnp.zeros((2, 2)), jnp.zeros((2, 3)), jnp.array([1.0, 30.0]), jnp.array([1, 1]),
      ...     short_boundaries=jnp.array([1.0, 7.0]), long_boundaries=jnp.array([14.0, 28.0, 56.0]),
      ... )
      >>> print(loss.round(3))
      [0.693 3.466]

    Reference: Kitada, Iyatomi, Seki, "Ad Creative Discontinuation Prediction with Multi-Modal
    Multi-Task Neural Survival Networks", 2022, arXiv:2204.11588.
    """
    check_floating(short_logits=short_logits, long_logits=long_logits)
    check_interval(0, jnp.inf, mix=mix)
    check_boundaries(short_boundaries=short_boundaries)
    check_boundaries(long_boundaries=long_boundaries)
    if not isinstance(short_boundaries, jax.core.Tracer) and not isinstance(
        long_boundaries, jax.core.Tracer
    ):
        horizon = float(np.asarray(short_boundaries)[-1])
        check_interval(horizon, jnp.inf, closed="right", long_boundaries=long_boundaries)
    items = jnp.shape(times)
    for name, logits, ends in (
        ("short_logits", short_logits, short_boundaries),
        ("long_logits", long_logits, long_boundaries),
    ):
        check_shape((*items, *jnp.shape(ends)), **{name: logits})
    if where is not None:
        check_broadcastable(items, where=where)
        times, observed = (jnp.where(where, x, 0) for x in (times, observed))
    short = discrete_hazard_loss(
        short_logits,
        *discretize_times(times, observed, short_boundaries),
        weights=ctr_weights,
        where=where,
    )
    outlived = jnp.asarray(times) > jnp.asarray(short_boundaries)[-1]
    late = discrete_hazard_loss(
        long_logits,
        *discretize_times(times, observed, long_boundaries),
        weights=ctr_weights,
        where=outlived if where is None else outlived & where,
    )
    return short + mix * late


def click_through_rate_weights(
    clicks: ArrayLike,
    impressions: ArrayLike,
    *,
    power: float = 1.0,
    prior: tuple[float, float] = (1.0, 100.0),
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Weights of items by their click-through rate, 1 on average (over the set).

        w_i = c_i^power / mean_j c_j^power,   c_i = (clicks_i + a) / (impressions_i + b)

    so that those items are predicted best which are worth most.

    Args:
      clicks: `[...]` at least 0.
      impressions: `[...]` at least 0.
      power: any number; 0 gives 1 throughout. Default 1.
      prior: a and b, at least 0: clicks and impressions that every item starts with. Default 1 and
        100, as if a rate of 1% had been seen; the library's choice.
      where: boolean, broadcastable to `[...]`: the items of the set; the others have weight 0.
        Default: all.
      axis_name: name or names of the mapped axes over whose shards the items are spread.

    Returns:
      `[...]` weights in at least float32, without gradient, as `weights` of the hazard losses.
      Without any click and without prior they are 0.

    Raises:
      ValueError: shapes that do not match, or a negative number.

    Use it with `discrete_hazard_loss` or `two_term_hazard_loss` where a wrong decision on a
    well-clicked item costs more than on others.

    Cost: one pass over the items, and two sums and a maximum over shards.

    Example:
      >>> weights = click_through_rate_weights(jnp.array([1, 5]), jnp.array([100, 100]))
      >>> print(weights)
      [0.5 1.5]

    Reference: Kitada, Iyatomi, Seki, "Ad Creative Discontinuation Prediction with Multi-Modal
    Multi-Task Neural Survival Networks", 2022, arXiv:2204.11588.
    """
    shape = jnp.shape(clicks)
    check_shape(shape, impressions=impressions)
    check_broadcastable(shape, where=where)
    check_interval(-jnp.inf, jnp.inf, power=power)
    check_interval(0, jnp.inf, clicks=clicks, impressions=impressions, prior=np.asarray(prior))
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    shown = jnp.asarray(impressions, compute_dtype(impressions)) + prior[1]
    rate = (jnp.asarray(clicks, shown.dtype) + prior[0]) / jnp.where(shown > 0, shown, 1)
    clicked = exists & (rate > 0)
    log_rate = power * jnp.log(jnp.where(clicked, rate, 1))
    # the largest as 1: powers of small rates leave the range of float32
    most = jnp.max(log_rate, where=clicked, initial=-jnp.inf)
    if axis_name is not None:
        most = jax.lax.pmax(most, axis_name)
    value = jnp.where(clicked, jnp.exp(log_rate - jnp.where(jnp.isfinite(most), most, 0)), 0)
    total, number = (
        sum_over_shards(jnp.sum(x, dtype=value.dtype), axis_name) for x in (value, exists)
    )
    weights = value * number / jnp.where(total > 0, total, 1)
    return jax.lax.stop_gradient(weights)


def cox_partial_likelihood_loss(
    log_risk: ArrayLike,
    times: ArrayLike,
    observed: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Negative log partial likelihood of proportional hazards (a loss of the set).

        L_i = e_i ( log Σ_{j: t_j ≥ t_i} exp(r_j) - r_i )

    Of those at risk when i ended, i was the one. Ends at the same time are all at risk at each
    other's (Breslow's form).

    Args:
      log_risk: r `[n]` floating point: higher for items that end earlier.
      times: t `[n]`, finite: when the item ended, or was last seen.
      observed: e `[n]`: 1 or True where it ended, 0 or False where it is censored.
      where: boolean `[n]`: the items that count; the others have loss 0. Default: all.
      axis_name: name or names of the mapped axes over whose shards the items are spread; each shard
        returns the losses of its own. Not needed under jit with shardings.

    Returns:
      `[n]` losses in the type of `log_risk`: 0 for a censored item. Their sum is minus the log
      partial likelihood; packages often divide it by the number of ends.

    Raises:
      ValueError: shapes that do not match, or `observed` other than 0 and 1.
      TypeError: risks that are not floating point.

    Use it as a baseline with one risk for all times, and large sets: a batch knows its own items
    alone. `discrete_hazard_loss` is a mean over items.

    Cost: one sort of the items of all shards and sums along it, O(n log n) time, O(n) memory.

    Example:
      >>> loss = cox_partial_likelihood_loss(
      ...     jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]), jnp.array([1, 0, 1])
      ... )
      >>> print(loss.round(3))
      [1.099 0.    0.   ]

    Reference: the baseline of Kitada, Iyatomi, Seki, "Ad Creative Discontinuation Prediction with
    Multi-Modal Multi-Task Neural Survival Networks", 2022, arXiv:2204.11588; the likelihood is
    Cox's, "Regression Models and Life-Tables", Journal of the Royal Statistical Society B, 1972.
    """
    check_floating(log_risk=log_risk)
    shape = jnp.shape(log_risk)
    if len(shape) != 1:
        raise ValueError(f"log_risk must have shape [n], got {shape}")
    check_shape(shape, times=times)
    check_broadcastable(shape, where=where)
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    ended = _observed(observed, shape, where) & exists
    r = jnp.asarray(log_risk).astype(compute_dtype(log_risk))
    r = jnp.where(exists, r, jnp.finfo(r.dtype).min)
    before = -jnp.where(exists, jnp.asarray(times, compute_dtype(times)), -jnp.inf)
    everyone, everyone_before = (all_shards(x, axis_name) for x in (r, before))
    order = jnp.argsort(everyone_before)
    log_sums = jax.lax.cumlogsumexp(everyone[order])
    # the last of those that are as late as i is where the sum over all of them stands
    last = jnp.searchsorted(everyone_before[order], before, side="right") - 1
    loss = jnp.where(ended, log_sums[last] - r, 0.0)
    return loss.astype(jnp.result_type(log_risk))


def check_boundaries(**boundaries: ArrayLike) -> None:
    """Raises ValueError unless every array is a row of positive, increasing numbers.

    >>> check_boundaries(boundaries=jnp.array([1.0, 2.0]))
    """
    for name, array in boundaries.items():
        if jnp.ndim(array) != 1 or jnp.size(array) == 0:
            raise ValueError(f"{name} must have shape [intervals], got {jnp.shape(array)}")
        if isinstance(array, jax.core.Tracer):
            continue
        ends = np.asarray(array, np.float64)
        if not (ends[0] > 0 and np.all(np.diff(ends) > 0) and np.all(np.isfinite(ends))):
            raise ValueError(f"{name} must be positive and increase, got {ends}")


def _observed(observed: ArrayLike, shape: tuple[int, ...], where: ArrayLike | None) -> Array:
    """The flags as booleans; concrete ones that count have to be 0 or 1."""
    check_shape(shape, observed=observed)
    if not isinstance(observed, jax.core.Tracer) and not isinstance(where, jax.core.Tracer):
        flags = np.asarray(observed)
        if where is not None:
            flags = flags[np.broadcast_to(np.asarray(where), shape)]
        if not np.all((flags == 0) | (flags == 1)):
            raise ValueError(f"observed must be 0 or 1, got {np.unique(flags)[:8]}")
    return jnp.asarray(observed) > 0
