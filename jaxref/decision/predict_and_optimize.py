"""Whom to send a retention offer: profits, regret, losses to learn the choice by, and its measure.

Every customer is a decision of its own, to contact or not, unless a budget ties them together.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.ranks import ascending_ranks
from jaxref.core.shards import AxisName, sum_over_shards

_SURROGATES: dict[str, Callable[[Array], Array]] = {
    "logistic": lambda margin: jax.nn.softplus(-margin) / math.log(2),
    "hinge": lambda margin: jax.nn.relu(1 - margin),
    "sigmoid": lambda margin: jax.nn.sigmoid(-margin),
}


class ExpectedMaximumProfit(NamedTuple):
    """What a churn score is worth to a campaign that knows how often offers are accepted.

    Attributes:
      profit: expected maximum profit per customer, in the unit of the lifetime value.
      fraction: expected share of the customers to contact for it, in [0, 1].

    Reference: Verbraken, Verbeke, Baesens, "A Novel Profit Maximizing Metric for Measuring
    Classification Performance of Customer Churn Prediction Models", IEEE TKDE 25, 2013, as in
    Gómez-Vargas, Maldonado, Vairetti, "A predict-and-optimize approach to profit-driven churn
    prevention", 2023, arXiv:2310.07047.
    """

    profit: Array
    fraction: Array


def retention_profit(
    churned: ArrayLike,
    lifetime_value: ArrayLike,
    *,
    offer_cost: ArrayLike,
    contact_cost: ArrayLike,
    acceptance: ArrayLike,
) -> Array:
    r"""The profit of sending a customer a retention offer, over that of leaving the customer alone.

        π = c g (v - d) - (1 - c) d - f

    One who is about to leave (c = 1) accepts with probability g and then stays, worth the lifetime
    value v less the offer d; one who is not (c = 0) takes the offer. Contact costs f in any case.

    Args:
      churned: c `[...]`, whether each customer leaves without an offer: booleans, 0 and 1, or
        probabilities, for the expected profit.
      lifetime_value: v at least 0, broadcastable with `churned`, as all others are.
      offer_cost: d at least 0; a fraction of v is `fraction * lifetime_value`.
      contact_cost: f at least 0.
      acceptance: g in [0, 1].

    Returns:
      `[...]` profits in the floating-point type of the arguments, at least float32; negative where
      the offer costs more than it brings.

    Raises:
      ValueError: a value out of its range, or shapes that do not broadcast.

    Use it on what came of past customers, for the losses of this file to learn from, or on
    calibrated probabilities of churn, whose positive profits are whom to contact.

    Cost: elementwise.

    Example:
      >>> values = jnp.array([200.0, 200.0, 20.0])
      >>> costs = {"offer_cost": 10.0, "contact_cost": 1.0, "acceptance": 0.3}
      >>> print(retention_profit(jnp.array([1, 0, 1]), values, **costs).round(1))
      [ 56. -11.   2.]

    Reference: Gómez-Vargas, Maldonado, Vairetti, "A predict-and-optimize approach to profit-driven
    churn prevention", 2023, arXiv:2310.07047; the profit is Neslin et al.'s, 2006.
    """
    check_interval(0, 1, acceptance=acceptance)
    check_interval(0, 1, churned=jnp.asarray(churned, jnp.float32))
    check_interval(
        0, np.inf, lifetime_value=lifetime_value, offer_cost=offer_cost, contact_cost=contact_cost
    )
    dtype = compute_dtype(churned, lifetime_value, offer_cost, contact_cost, acceptance)
    c, v, d, f, g = (
        jnp.asarray(each, dtype)
        for each in (churned, lifetime_value, offer_cost, contact_cost, acceptance)
    )
    return c * g * (v - d) - (1 - c) * d - f


def optimal_targeting(
    profits: ArrayLike,
    *,
    budget: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Whom to contact for the most profit: all who bring any, or the best (a rule of the set).

        z* = argmax_z Σ_i π_i z_i   over z in {0, 1}^n with Σ_i z_i ≤ B

    Args:
      profits: π `[...]` floating point, of contacting each customer, known or predicted.
      budget: B at least 0, how many may be contacted. Default: everyone.
      where: boolean, broadcastable to `profits`; excluded customers are not contacted.
      axis_name: name or names of the mesh or vmap axes over which the set is spread; the budget is
        then that of all of it.

    Returns:
      `[...]` booleans z*. No profit is not contacted; of equal ones the first in memory are.

    Raises:
      ValueError: a negative `budget`, profits that are not finite, or a `where` that does not
        broadcast.
      TypeError: profits that are not floating point, or a `budget` that is not an integer.

    Use it on the true profits for the best that could be done, and on predictions or scores for the
    decision itself.

    Cost: one pass, with a budget a sort of the set; with `axis_name` every shard then gathers and
    sorts all profits.

    Example:
      >>> print(optimal_targeting(jnp.array([3.0, -1.0, 5.0, 4.0]), budget=2))
      [False False  True  True]

    Reference: Gómez-Vargas, Maldonado, Vairetti, "A predict-and-optimize approach to profit-driven
    churn prevention", 2023, arXiv:2310.07047.
    """
    check_floating(profits=profits)
    _check_budget(budget)
    check_broadcastable(jnp.shape(profits), where=where)
    _check_finite(profits, where)
    return _targeting(jnp.asarray(profits), budget, where, axis_name)


def targeting_regret(
    decision_scores: ArrayLike, profits: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The profit that is missed by contacting the customers with positive scores.

        R_i = π_i 1[π_i > 0] - π_i 1[s_i > 0] = |π_i| 1[(s_i > 0) ≠ (π_i > 0)]

    Args:
      decision_scores: s `[...]` floating point; above 0 is to contact.
      profits: π of the shape of `decision_scores`, floating point, of contacting each customer.
      where: boolean, broadcastable to `decision_scores`; excluded entries have regret 0.

    Returns:
      `[...]` regrets, at least 0, in the type of `decision_scores`; 0 where the profit is 0. Its
      gradient with respect to the scores is 0.

    Raises:
      ValueError: shapes that do not match, or profits that are not finite.
      TypeError: scores or profits that are not floating point.

    Use it to measure decisions; `profit_regret_surrogate` and `spo_plus_loss` are for learning.

    Cost: one pass over the scores.

    Example:
      >>> print(targeting_regret(jnp.array([1.0, 1.0, -1.0]), jnp.array([56.0, -11.0, 2.0])))
      [ 0. 11.  2.]

    Reference: Gómez-Vargas, Maldonado, Vairetti, "A predict-and-optimize approach to profit-driven
    churn prevention", 2023, arXiv:2310.07047.
    """
    s, profit = _checked_pair(profits, where, decision_scores=decision_scores)
    regrets = jnp.where((s > 0) != (profit > 0), jnp.abs(profit), 0.0)
    return _excluding(regrets, where).astype(jnp.result_type(decision_scores))


def profit_regret_surrogate(
    decision_scores: ArrayLike,
    profits: ArrayLike,
    *,
    kind: str = "logistic",
    temperature: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""A differentiable loss in place of the regret of contacting those with positive scores.

    With the margin m = sign(π) s / T, T = temperature,

        logistic   |π| log(1 + exp(-m)) / log 2
        hinge      |π| max(1 - m, 0)
        sigmoid    |π| / (1 + exp(m))

    The first two are convex and nowhere below `targeting_regret`; their scores of least expected
    loss have the sign of E[π | x]. The last one is the regret itself as T goes to 0, and is not
    convex.

    Args:
      decision_scores: s `[...]` floating point; above 0 is to contact.
      profits: π of the shape of `decision_scores`, floating point. Losses are in their unit: divide
        them by their mean size for a learning rate that does not depend on it.
      kind: "logistic" (default), "hinge" or "sigmoid".
      temperature: T above 0, the size of a score that counts as sure. Default 1.
      where: boolean, broadcastable to `decision_scores`; excluded entries have loss 0.

    Returns:
      `[...]` losses, at least 0, in the type of `decision_scores`; 0 where the profit is 0.

    Raises:
      ValueError: an unknown `kind`, a `temperature` that is not positive, shapes that do not match,
        or profits that are not finite.
      TypeError: scores or profits that are not floating point.

    Use it to learn whom to contact where lifetime values differ and a probability of churn says too
    little; `spo_plus_loss` learns profits, which a budget can be spent by.

    Cost: one pass over the scores.

    Example:
      >>> losses = profit_regret_surrogate(jnp.array([1.0, 1.0]), jnp.array([56.0, -11.0]))
      >>> print(losses.round(2))
      [25.31 20.84]

    Reference: Gómez-Vargas, Maldonado, Vairetti, "A predict-and-optimize approach to profit-driven
    churn prevention", 2023, arXiv:2310.07047.
    """
    if kind not in _SURROGATES:
        raise ValueError(f"kind must be one of {', '.join(_SURROGATES)}, got {kind!r}")
    check_interval(0, np.inf, closed="neither", temperature=temperature)
    s, profit = _checked_pair(profits, where, decision_scores=decision_scores)
    losses = jnp.abs(profit) * _SURROGATES[kind](jnp.sign(profit) * s / temperature)
    return _excluding(losses, where).astype(jnp.result_type(decision_scores))


def spo_plus_loss(
    predicted_profits: ArrayLike,
    profits: ArrayLike,
    *,
    budget: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""A convex loss of predicted profits, never below the regret of acting on them (SPO+).

    With z*(π), whom `optimal_targeting` contacts for profits π, and predictions h,

        L = max_z (2h - π)·z - 2 h·z*(π) + π·z*(π) = (2h - π)·(z*(2h - π) - z*(π))

    and the subgradient 2 (z*(2h - π) - z*(π)). Without a budget it is a sum over customers, whose
    terms are returned; with one it is a loss of the set.

    Args:
      predicted_profits: h `[...]` floating point.
      profits: π of the shape of `predicted_profits`, floating point. Losses are in their unit:
        divide both by their mean size for a learning rate that does not depend on it.
      budget: at least 0, how many may be contacted. Default: everyone.
      where: boolean, broadcastable to `predicted_profits`; excluded customers have loss 0 and spend
        no budget.
      axis_name: name or names of the mesh or vmap axes over which the set is spread; only a budget
        needs it.

    Returns:
      `[...]` losses without a budget, a scalar with one, at least 0, in the type of
      `predicted_profits`; 0 where h = π.

    Raises:
      ValueError: a negative `budget`, shapes that do not match, or profits that are not finite.
      TypeError: predictions or profits that are not floating point, or a `budget` that is not an
        integer.

    Use it where the predictions have to rank customers for a budget, or be profits;
    `profit_regret_surrogate` learns a bare decision.

    Cost: one pass over the predictions, with a budget two sorts of the set.

    Example:
      >>> print(spo_plus_loss(jnp.array([10.0, 3.0]), jnp.array([56.0, -11.0])))
      [36. 17.]

    Reference: Elmachtoub, Grigas, "Smart 'Predict, then Optimize'", 2017, arXiv:1710.08005, of the
    decisions of Gómez-Vargas, Maldonado, Vairetti, "A predict-and-optimize approach to
    profit-driven churn prevention", 2023, arXiv:2310.07047.
    """
    _check_budget(budget)
    h, profit = _checked_pair(profits, where, predicted_profits=predicted_profits)
    worst = 2 * h - profit
    chosen = _targeting(worst, budget, where, axis_name)
    best = _targeting(profit, budget, where, axis_name)
    losses = worst * (chosen.astype(worst.dtype) - best)
    if budget is not None:
        losses = jnp.sum(losses)
        losses = sum_over_shards(losses, axis_name)
    return losses.astype(jnp.result_type(predicted_profits))


def expected_maximum_profit(
    scores: ArrayLike,
    churned: ArrayLike,
    *,
    lifetime_value: float = 200.0,
    offer_cost: float = 10.0,
    contact_cost: float = 1.0,
    alpha: float = 6.0,
    beta: float = 14.0,
    where: ArrayLike | None = None,
) -> ExpectedMaximumProfit:
    r"""What ordering customers by a churn score is worth: the expected maximum profit (EMP).

    A campaign that contacts the customers with scores above t, when a share γ of those about to
    leave accept, makes per customer

        P(t; γ) = CLV [(γ (1 - δ) - φ) π_0 F_0(t) - (δ + φ) π_1 F_1(t)]

    with the shares π_0 of churners and π_1 of others, the shares F_0 and F_1 of either that are
    contacted, δ = d / CLV and φ = f / CLV. With γ ~ Beta(α, β),

        EMP = E_γ max_t P(t; γ)

    A threshold is the best for some γ where it is a vertex of the ROC curve's convex hull, an edge
    of which is a group of a churners and b others that is contacted once γ exceeds

        (φ a + (δ + φ) b) / ((1 - δ) a)

    so that the expectation is a sum over edges of incomplete Beta functions, without an error.

    Args:
      scores: `[...]` floating point, higher for churners; one set. Only their order counts.
      churned: `[...]` of the same shape, 1 or True for churners, 0 for others.
      lifetime_value: CLV above 0, the same for all. Default 200, the authors'.
      offer_cost: d in [0, CLV). Default 10, the authors'.
      contact_cost: f at least 0. Default 1, the authors'.
      alpha: α above 0. Default 6, the authors'.
      beta: β above 0. Default 14, the authors': 30% accept on average.
      where: boolean, broadcastable to `scores`: the customers that count. Default: all.

    Returns:
      `ExpectedMaximumProfit` of scalars in at least float32, with no gradient with respect to the
      scores. Without churners, or customers, both are 0; with a score that is NaN, NaN.

    Raises:
      ValueError: a number out of its range, shapes that do not match, or labels other than 0 and 1.
      TypeError: scores that are not floating point.

    Use it to choose between models before values of single customers are known; with them,
    `targeting_regret`. `jaxref.metrics.roc_auc` weighs all thresholds, of which most lose money.

    Cost: a sort, and a scan of n steps in sequence for the hull, O(n log n); two incomplete Beta
    functions for each of n edges.

    Example:
      >>> scores, churned = jnp.array([0.9, 0.8, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> result = expected_maximum_profit(scores, churned)
      >>> print(result.profit.round(2), result.fraction.round(2))
      25.25 0.75

    Reference: Verbraken, Verbeke, Baesens, "A Novel Profit Maximizing Metric for Measuring
    Classification Performance of Customer Churn Prediction Models", IEEE TKDE 25, 2013, as in
    Gómez-Vargas, Maldonado, Vairetti, "A predict-and-optimize approach to profit-driven churn
    prevention", 2023, arXiv:2310.07047.
    """
    check_interval(0, np.inf, closed="neither", lifetime_value=lifetime_value)
    high = np.inf if isinstance(lifetime_value, jax.core.Tracer) else float(lifetime_value)
    check_interval(0, high, closed="left", offer_cost=offer_cost)
    check_interval(0, np.inf, contact_cost=contact_cost)
    check_interval(0, np.inf, closed="neither", alpha=alpha, beta=beta)
    leaving, staying = split_by_label(scores, where, churned=churned)
    dtype = compute_dtype(scores)
    churners, others = _hull_edges(
        jnp.ravel(scores), leaving.ravel().astype(dtype), staying.ravel().astype(dtype)
    )
    gain = (lifetime_value - offer_cost) * churners
    cost = contact_cost * churners + (offer_cost + contact_cost) * others
    paying = cost < gain
    share = jnp.where(paying, cost / jnp.where(paying, gain, 1.0), 1.0)
    # E[γ; γ > share] over E[γ], and P(γ > share), by the symmetry of the incomplete Beta function
    accepted = jax.scipy.special.betainc(beta, alpha + 1.0, 1 - share)
    contacted = jax.scipy.special.betainc(beta, alpha, 1 - share)
    size = jnp.maximum(jnp.sum(churners + others), 1)
    size = jnp.where(jnp.any(jnp.isnan(scores) & (leaving | staying)), jnp.nan, size)
    profit = jnp.sum(gain * alpha / (alpha + beta) * accepted - cost * contacted) / size
    return ExpectedMaximumProfit(profit, jnp.sum((churners + others) * contacted) / size)


def _hull_edges(scores: Array, churners: Array, others: Array) -> tuple[Array, Array]:
    """Churners and others of each edge of the ROC curve's upper convex hull, padded with zeros.

    From the highest score down, groups are merged while a later one has the higher share of
    churners. Of equal scores the others come first, so that all of these merge."""
    order = jnp.lexsort((churners, -scores, churners + others == 0))
    zeros = jnp.zeros_like(churners)

    def rises(edges: tuple[Array, Array, Array]) -> Array:
        a, b, last = edges
        before = jnp.maximum(last - 1, 0)
        return (last > 0) & (a[before] * b[last] <= a[last] * b[before])

    def merge(edges: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, b, last = edges
        a, b = (x.at[last - 1].add(x[last]).at[last].set(0.0) for x in (a, b))
        return a, b, last - 1

    def add(edges: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
        a, b, last = edges
        edges = a.at[last + 1].set(churners[i]), b.at[last + 1].set(others[i]), last + 1
        return jax.lax.while_loop(rises, merge, edges), None

    (a, b, _), _ = jax.lax.scan(add, (zeros, zeros, jnp.int32(-1)), order)
    return a, b


def _targeting(
    profits: Array,
    budget: int | None,
    where: ArrayLike | None,
    axis_name: AxisName | None,
) -> Array:
    targeted = profits > 0
    if budget is not None:
        ranks, _ = ascending_ranks(-profits, where=where, axis_name=axis_name)
        targeted &= ranks < budget
    return targeted if where is None else targeted & where


def _checked_pair(
    profits: ArrayLike, where: ArrayLike | None, **predictions: ArrayLike
) -> tuple[Array, Array]:
    """Predictions and finite profits of one shape, in at least float32, 0 where excluded."""
    check_floating(**predictions, profits=profits)
    (values,) = predictions.values()
    check_shape(jnp.shape(values), profits=profits)
    check_broadcastable(jnp.shape(values), where=where)
    _check_finite(profits, where)
    dtype = compute_dtype(values, profits)
    pair = jnp.asarray(values, dtype), jnp.asarray(profits, dtype)
    return _excluding(pair[0], where), _excluding(pair[1], where)


def _check_finite(profits: ArrayLike, where: ArrayLike | None) -> None:
    """Raises where a concrete profit of a customer who counts is not finite."""
    if not isinstance(profits, jax.core.Tracer) and not isinstance(where, jax.core.Tracer):
        check_interval(-np.inf, np.inf, profits=_excluding(jnp.asarray(profits), where))


def _check_budget(budget: int | None) -> None:
    if budget is not None:
        if not isinstance(budget, int):
            raise TypeError(f"budget must be an integer, got {budget!r}")
        check_interval(0, np.inf, budget=budget)


def _excluding(values: Array, where: ArrayLike | None) -> Array:
    return values if where is None else jnp.where(where, values, 0.0)
