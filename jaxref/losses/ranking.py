"""Learning to rank: losses on lists whose members have relevances, or profits."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype

LAMBDA_SCHEMES = (
    "ndcg1",
    "ndcg2",
    "lambda_rank",
    "ndcg2pp",
    "rank_net",
    "rank_net_gap",
    "rank_net_squared_gap",
)


def profit_aware_ranking_loss(
    scores: ArrayLike,
    profits: ArrayLike,
    *,
    top_k: int = 6,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of the order of the most profitable members of a list (PA-BCE).

    Of the k = min(top_k, members) members with the largest profits π, from the largest down,

        L = 1/k Σ_{i<j} log₁₀(π_i - π_j + 1) log(1 + exp(-(s_i - s_j)))

    so that the order of two members matters the more, the further apart their profits are, and not
    at all for equal ones. Adding a constant to all scores or to all profits changes nothing; other
    units of profit do.

    Args:
      scores: s `[..., m]` floating point, the m members of a list at `axis`.
      profits: π `[..., m]`, finite and without gradient, in units in which differences of about 1
        to 10 begin to matter.
      top_k: at least 1; 1 gives 0. Default 6, the authors'.
      axis: the members' axis.
      where: boolean, broadcastable to `scores`: the members that exist. Default: all.

    Returns:
      `[...]` losses of the lists in the type of `scores`; 0 for a list with fewer than two members
      or with equal profits. The authors' mean over a batch leaves such lists out, as below.

    Raises:
      ValueError: shapes that do not match, or `top_k` not an integer of at least 1.
      TypeError: scores that are not floating point.

    Use it to find those few who move most money; `lambda_ranking_loss` sees graded relevances and
    the whole list.

    Cost: a selection of the k most profitable of m members, and their k² pairs.

    Example:
      >>> profits = jnp.array([[99.0, 0.0], [5.0, 5.0]])
      >>> loss = profit_aware_ranking_loss(jnp.array([[1.0, 0.0], [2.0, 2.0]]), profits)
      >>> print(loss.round(4), (loss.sum() / jnp.maximum(jnp.sum(loss > 0), 1)).round(4))
      [0.3133 0.    ] 0.3133

    Reference: Li, Ma, "Learn to Rank Risky Investors: A Case Study of Predicting Retail Traders'
    Behaviour and Profitability", 2025, arXiv:2509.16616.
    """
    s, exists = _lists(scores, axis, where, profits=profits)
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be an integer of at least 1, got {top_k!r}")
    profits = jnp.moveaxis(jnp.asarray(profits), axis, -1)
    gains = jax.lax.stop_gradient(profits.astype(compute_dtype(profits)))
    gains, top = jax.lax.top_k(jnp.where(exists, gains, -jnp.inf), min(top_k, s.shape[-1]))
    s, exists = (jnp.take_along_axis(x, top, axis=-1) for x in (s, exists))
    k = exists.shape[-1]
    is_pair = exists[..., :, None] & exists[..., None, :] & np.triu(np.ones((k, k), bool), 1)
    gaps = jnp.where(is_pair, gains[..., :, None] - gains[..., None, :], 0.0)
    weights = jnp.log1p(gaps) / np.log(10)
    differences = jnp.where(is_pair, s[..., :, None] - s[..., None, :], 0.0)
    total = jnp.sum(weights * jax.nn.softplus(-differences), axis=(-2, -1))
    loss = total / jnp.maximum(jnp.sum(exists, axis=-1), 1)
    return loss.astype(jnp.result_type(scores))


def lambda_ranking_loss(
    scores: ArrayLike,
    relevance: ArrayLike,
    *,
    scheme: str = "ndcg2pp",
    sigma: float = 1.0,
    mu: float = 10.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Loss of pairs in the wrong order, weighed by what that costs in NDCG (LambdaLoss family).

        L = Σ_{i,j: y_i > y_j} w_ij log₂(1 + exp(-σ (s_i - s_j)))

    With r the rank by score from 1 on, D(r) = log₂(1 + r), G_i = (2^{y_i} - 1) / the largest DCG of
    the list, and no gradient through the weights,

        ndcg2:          w = |1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)| |G_i - G_j|
        lambda_rank:    w = |1/D(r_i) - 1/D(r_j)| |G_i - G_j|
        ndcg2pp:        w = μ w of ndcg2 + w of lambda_rank
        rank_net:       w = 1
        rank_net_gap:   w = |y_i - y_j|             rank_net_squared_gap:  w = |y_i² - y_j²|
        ndcg1:          w = G_i / D(r_i), and the sum over all i and j, i = j too

    Args:
      scores: s `[..., m]` floating point, the m members of a list at `axis`.
      relevance: y `[..., m]`, grades of at least 0, small enough for 2^y.
      scheme: one of the names above. Default "ndcg2pp".
      sigma: σ above 0, the steepness. Default 1.
      mu: μ at least 0, for "ndcg2pp". Default 10.
      axis: the members' axis.
      where: boolean, broadcastable to `scores`: the members that exist. Default: all.

    Returns:
      `[...]` losses of the lists in the type of `scores`, in bits; 0 for a list without a pair of
      different relevances (but "ndcg1") or without any relevant member. Of equal scores, the one
      that comes first ranks first.

    Raises:
      ValueError: shapes that do not match, a negative relevance, an unknown `scheme`, or `sigma` or
        `mu` out of range.
      TypeError: scores that are not floating point.

    Use it for graded relevances and NDCG; `profit_aware_ranking_loss` for amounts of money.

    Cost: two sorts and all pairs of a list, O(m²) time and memory.

    Example:
      >>> print(lambda_ranking_loss(jnp.array([0.0, 1.0]), jnp.array([1, 0]), scheme="rank_net"))
      1.895

    Reference: the baseline of Li, Ma, "Learn to Rank Risky Investors: A Case Study of Predicting
    Retail Traders' Behaviour and Profitability", 2025, arXiv:2509.16616; the family is of Wang, Li,
    Golbandi, Bendersky, Najork, "The LambdaLoss Framework for Ranking Metric Optimization", CIKM
    2018.
    """
    if scheme not in LAMBDA_SCHEMES:
        raise ValueError(f"scheme must be one of {sorted(LAMBDA_SCHEMES)}, got {scheme!r}")
    check_interval(0, jnp.inf, closed="right", sigma=sigma)
    check_interval(0, jnp.inf, mu=mu)
    s, exists = _lists(scores, axis, where, relevance=relevance)
    if where is None:
        check_interval(0, jnp.inf, relevance=relevance)
    y = jnp.where(exists, jnp.moveaxis(jnp.asarray(relevance), axis, -1), 0).astype(s.dtype)
    order = jnp.argsort(jnp.where(exists, -s, jnp.inf), axis=-1, stable=True)
    s, y, exists = (jnp.take_along_axis(x, order, axis=-1) for x in (s, y, exists))

    ranks = jnp.arange(1, s.shape[-1] + 1)
    discounts = jnp.log2(1 + ranks.astype(s.dtype))
    gains = jnp.exp2(y) - 1
    best = jnp.sum(jnp.sort(gains, axis=-1, descending=True) / discounts, axis=-1, keepdims=True)
    gains = gains / jnp.where(best > 0, best, 1)

    def gap(values: Array) -> Array:
        return jnp.abs(values[..., :, None] - values[..., None, :])

    distance = gap(ranks)
    by_distance = jnp.abs(
        1 / jnp.log2(1.0 + jnp.maximum(distance, 1)) - 1 / jnp.log2(2.0 + distance)
    )
    swap = gap(1 / discounts)
    weights = {
        "ndcg1": lambda: jnp.broadcast_to((gains / discounts)[..., None], gap(y).shape),
        "ndcg2": lambda: by_distance * gap(gains),
        "lambda_rank": lambda: swap * gap(gains),
        "ndcg2pp": lambda: (mu * by_distance + swap) * gap(gains),
        "rank_net": lambda: jnp.ones_like(gap(y)),
        "rank_net_gap": lambda: gap(y),
        "rank_net_squared_gap": lambda: gap(jnp.square(y)),
    }[scheme]()
    is_pair = exists[..., :, None] & exists[..., None, :]
    if scheme != "ndcg1":
        is_pair &= y[..., :, None] > y[..., None, :]
    differences = jnp.where(is_pair, s[..., :, None] - s[..., None, :], 0.0)
    losses = jax.nn.softplus(-sigma * differences) / np.log(2)
    total = jnp.sum(jax.lax.stop_gradient(weights) * losses, axis=(-2, -1), where=is_pair)
    return total.astype(jnp.result_type(scores))


def _lists(
    scores: ArrayLike, axis: int, where: ArrayLike | None, **others: ArrayLike
) -> tuple[Array, Array]:
    """Scores in the type to compute in and the mask of members, with the members last."""
    check_floating(scores=scores)
    shape = jnp.shape(scores)
    (axis,) = canonical_axes(axis, len(shape))
    check_shape(shape, **others)
    check_broadcastable(shape, where=where)
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    exists = jnp.moveaxis(exists, axis, -1)
    s = jnp.moveaxis(jnp.asarray(scores).astype(compute_dtype(scores)), axis, -1)
    return jnp.where(exists, s, 0.0), exists
