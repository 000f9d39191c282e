"""A smooth indicator of the k largest scores, and the loss that brings relevant labels there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards, varying_alike
from jaxref.losses.multilabel_retrieval import mean_over_labels


def soft_top_k(
    scores: ArrayLike,
    k: int | ArrayLike,
    *,
    alpha: float = 1.0,
    num_iterations: int = 32,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far each score belongs to the k largest: shares in (0, 1) that add up to k.

        p_j = sigmoid(α (s_j + t)),   t such that Σ_j p_j = k

    The gradient is that of the equation, whatever solves it: with v = α p (1 - p),
    dp_i/ds_j = v_i (1[i = j] - v_j / Σ v), so that adding a constant to all scores changes nothing.
    As α grows the shares tend to the indicator of the k largest.

    Args:
      scores: s `[..., labels, ...]` floating point, the labels at `axis`.
      k: an integer between 0 and the number of labels, both excluded, or an array of such integers,
        broadcastable to `scores` without `axis`.
      alpha: α above 0. Default 1.
      num_iterations: halvings of the interval of t, of width log(4 k (labels - k)) / α. Default 32,
        the authors', far below the rounding of float32.
      axis: the axis of the labels.
      where: boolean, broadcastable to `scores`: the labels that exist. The others have share 0, and
        where no more than k exist, each of these has 1. Default: all.
      axis_name: name or names of the mapped axes over whose shards the labels are spread.

    Returns:
      The shares, in the shape and type of `scores`.

    Raises:
      ValueError: a `k` outside of (0, labels), an `alpha` that is not positive, a `num_iterations`
        below 1, or shapes that do not match.
      TypeError: scores that are not floating point, or a `k` that is not an integer.

    Use it where a model has to choose k of many and learn from it; `log_soft_top_k` has the
    logarithms, which do not underflow. t is found from the odds of the k largest against the
    others, which tell it apart also where all shares round to 0 and 1.

    Cost: a selection of the k largest and `num_iterations` passes over the labels; one more for the
    gradient.

    Example:
      >>> print(soft_top_k(jnp.array([3.0, 1.0, 1.0, -2.0]), 2, alpha=5.0).round(3))
      [1.  0.5 0.5 0. ]

    Reference: Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon, "Dual-Encoders for Extreme
    Multi-Label Classification", 2023, arXiv:2310.10636.
    """
    logits, exists, limit = _logits(scores, k, alpha, num_iterations, axis, where, axis_name)
    shares = jnp.where(jnp.isnan(limit), jax.nn.sigmoid(logits), jnp.exp(limit))
    shares = jnp.moveaxis(jnp.where(exists, shares, 0.0), -1, axis)
    return shares.astype(jnp.result_type(scores))


def log_soft_top_k(
    scores: ArrayLike,
    k: int | ArrayLike,
    *,
    alpha: float = 1.0,
    num_iterations: int = 32,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The logarithms of `soft_top_k`, however small the shares.

        log p_j = log sigmoid(α (s_j + t)),   t such that Σ_j p_j = k

    with d log p_i/ds_j = α (1 - p_i) (1[i = j] - v_j / Σ v), v = α p (1 - p).

    Args:
      scores, k, alpha, num_iterations, axis, axis_name: as for `soft_top_k`.
      where: boolean, broadcastable to `scores`: the labels that exist. The others are 0, so that
        they drop out of weighted sums, and where no more than k exist, so are these. Default: all.

    Returns:
      log p, at most 0, in the shape and type of `scores`.

    Raises:
      As `soft_top_k`.

    Use it in losses; `soft_top_k_loss` is the one of relevant labels.

    Cost: that of `soft_top_k`: a selection of the k largest and `num_iterations` passes over the
    labels.

    Example:
      >>> print(log_soft_top_k(jnp.array([300.0, 100.0, 40.0, -200.0]), 2).round(2))
      [  -0.   -0.  -30. -270.]

    Reference: Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon, "Dual-Encoders for Extreme
    Multi-Label Classification", 2023, arXiv:2310.10636.
    """
    logits, exists, limit = _logits(scores, k, alpha, num_iterations, axis, where, axis_name)
    log_p = jnp.where(jnp.isnan(limit), jax.nn.log_sigmoid(logits), limit)
    log_p = jnp.moveaxis(jnp.where(exists, log_p, 0.0), -1, axis)
    return log_p.astype(jnp.result_type(scores))


def soft_top_k_loss(
    scores: ArrayLike,
    positive_mask: ArrayLike,
    *,
    k: int | ArrayLike = 5,
    alpha: float = 2.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Relevant labels are to be among the k with the highest scores (SoftTop-k).

        L_q = -1/|P| Σ_{p ∈ P} log p_p,   p = `soft_top_k` of the scores of all labels

    A relevant label that is safely among the first k has no gradient, wherever it stands there.

    Args:
      scores: s `[..., labels]` floating point, for α as it is: similarities divided by the
        temperature, for which the paper has 0.05 with embeddings of length 1.
      positive_mask: of the same shape, True or 1 for relevant labels, at best no more than k of
        them: see `sampled_positives`.
      k: an integer between 0 and the number of labels, both excluded, or integers broadcastable to
        `[...]`, such as the numbers of relevant labels. Default 5.
      alpha: α above 0, the sharpness. Default 2, the authors'.
      where: boolean, broadcastable to `scores`: the labels that count for a query. Default: all.
      axis_name: name or names of the mapped axes over whose shards the labels are spread.

    Returns:
      `[...]` losses of at least 0 in the type of `scores`, the same on every shard; 0 for a query
      without relevant labels, or with no more than k labels that count.

    Raises:
      ValueError: shapes that do not match, a mask other than 0 and 1, a `k` outside of (0, labels)
        or an `alpha` that is not positive.
      TypeError: scores that are not floating point, or a `k` that is not an integer.

    Use it where only the first k ranks are shown; `decoupled_softmax_loss` wants each relevant
    label above all irrelevant ones, as this does with k = 1 and one relevant label.

    Cost: a selection of the k largest scores and 32 passes over the labels; k scores a query are
    gathered from shards.

    Example:
      >>> scores, relevant = jnp.array([[4.0, 1.0, 0.0, -1.0]]), jnp.array([[1, 1, 0, 0]])
      >>> print(soft_top_k_loss(scores, relevant, k=2).round(2))
      [0.17]

    Reference: Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon, "Dual-Encoders for Extreme
    Multi-Label Classification", 2023, arXiv:2310.10636.
    """
    positive, _ = split_by_label(scores, where, positive_mask=positive_mask)
    s = jnp.asarray(scores).astype(compute_dtype(scores))
    log_p = log_soft_top_k(s, k, alpha=alpha, where=where, axis_name=axis_name)
    loss = mean_over_labels(-log_p, positive, axis_name)
    return loss.astype(jnp.result_type(scores))


def _logits(
    scores: ArrayLike,
    k: int | ArrayLike,
    alpha: float,
    num_iterations: int,
    axis: int,
    where: ArrayLike | None,
    axis_name: AxisName | None,
) -> tuple[Array, Array, Array]:
    """α (s + t) with the labels at the last axis; which labels exist; and what log p is for rows
    where no t gives k, else NaN, as `[..., 1]`."""
    check_floating(scores=scores)
    check_interval(0, jnp.inf, closed="neither", alpha=alpha)
    check_interval(1, jnp.inf, num_iterations=num_iterations)
    s = jnp.asarray(scores)
    if not -s.ndim <= axis < s.ndim:
        raise ValueError(f"axis {axis} is out of range for scores of shape {s.shape}")
    check_broadcastable(s.shape, where=where)
    exists = jnp.ones(s.shape, bool) if where is None else jnp.broadcast_to(where, s.shape)
    s, exists = (jnp.moveaxis(x, axis, -1) for x in (s.astype(compute_dtype(s)), exists))
    labels = s.shape[-1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"k must be an integer, got {k!r}")
    check_interval(0, labels, closed="neither", k=k)
    check_broadcastable(s.shape[:-1], k=k)
    logits, limit = _solved_logits(
        s,
        exists,
        jnp.broadcast_to(jnp.asarray(k), s.shape[:-1])[..., None],
        jnp.asarray(alpha, s.dtype),
        reach=int(k) if isinstance(k, int | np.integer) else labels,
        num_iterations=num_iterations,
        axis_name=axis_name,
    )
    return logits, exists, limit


@partial(jax.jit, static_argnames=("reach", "num_iterations", "axis_name"))
def _solved_logits(
    s: Array,
    exists: Array,
    k: Array,
    alpha: Array,
    *,
    reach: int,
    num_iterations: int,
    axis_name: AxisName | None,
) -> tuple[Array, Array]:
    """The logits, and the limits of log p where there is no solution; `reach` is the largest k."""
    s = jnp.where(exists, s, 0.0)
    number, inside, last_in, first_out = _cut(jax.lax.stop_gradient(s), exists, k, reach, axis_name)
    k = k.astype(s.dtype)
    solvable = (k > 0) & (number > k)
    # About the middle of the gap t lies between these, wherever the other scores are.
    s = s - (last_in / 2 + first_out / 2)
    low = -jnp.log(2 * jnp.maximum(number - k, 1))
    high = jnp.log(2 * jnp.maximum(k, 1))
    outside = jnp.where(exists, 1 - inside, 0.0)
    half_gap = last_in / 2 - first_out / 2
    t = _shift(num_iterations, axis_name, s, alpha, inside, outside, half_gap, low, high)
    limit = jnp.where(solvable, jnp.nan, jnp.where(k > 0, 0.0, -jnp.inf))
    return jnp.where(solvable, alpha * (s + t), 0.0), limit


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _shift(
    num_iterations: int,
    axis_name: AxisName | None,
    s: Array,
    alpha: Array,
    inside: Array,
    outside: Array,
    half_gap: Array,
    low: Array,
    high: Array,
) -> Array:
    """t by halving the interval [low, high] / α of it.

    Σ p = k says Σ outside p = Σ inside (1 - p). The logarithms of both sides tell also those t
    apart where all p round to 0 or 1.
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        t = (low + high) / 2
        z = alpha * s + t
        log_p = jax.nn.log_sigmoid(z)
        # of those outside and of those inside, the nearest to the cut have the largest terms
        most = jax.nn.log_sigmoid(t - alpha * half_gap), jax.nn.log_sigmoid(-t - alpha * half_gap)
        sums = sum_over_shards(
            tuple(
                jnp.sum(w * jnp.exp(jnp.where(w > 0, x - top, 0.0)), axis=-1, keepdims=True)
                for w, x, top in ((outside, log_p, most[0]), (inside, log_p - z, most[1]))
            ),
            axis_name,
        )
        is_low = most[0] + jnp.log(sums[0]) < most[1] + jnp.log(sums[1])
        return jnp.where(is_low, t, low), jnp.where(is_low, high, t)

    low, high, _ = varying_alike(low, high, half_gap)
    low, high = jax.lax.fori_loop(0, num_iterations, halve, (low, high))
    return (low + high) / 2 / alpha


@_shift.defjvp
def _shift_jvp(
    num_iterations: int,
    axis_name: AxisName | None,
    primals: tuple[Array, ...],
    tangents: tuple[Array, ...],
) -> tuple[Array, Array]:
    """dt = -Σ v_j (ds_j + (s_j + t) dα / α) / Σ v, v = p (1 - p), of the equation alone."""
    t = _shift(num_iterations, axis_name, *primals)
    (s, alpha, inside, outside, *_), (ds, dalpha, *_) = primals, tangents
    log_p = jax.nn.log_sigmoid(alpha * (s + t))
    log_v = log_p + jax.nn.log_sigmoid(-alpha * (s + t))
    exists = inside + outside > 0
    top = jax.lax.stop_gradient(
        jnp.max(jnp.where(exists, log_v, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    )
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
    v = jnp.where(exists, jnp.exp(jnp.where(exists, log_v - top, 0.0)), 0.0)
    total, moved = sum_over_shards(
        tuple(jnp.sum(x, axis=-1, keepdims=True) for x in (v, v * (ds + (s + t) * dalpha / alpha))),
        axis_name,
    )
    return t, -moved / jnp.where(total == 0, 1.0, total)


def _cut(
    s: Array, exists: Array, k: Array, reach: int, axis_name: AxisName | None
) -> tuple[Array, Array, Array, Array]:
    """How many labels exist; which share of each is among the k largest, where equal scores share
    alike what is left for them; the last score among these and the first that is not."""
    # of a shard no more can be among the k largest of all
    top, _ = jax.lax.top_k(jnp.where(exists, s, -jnp.inf), min(reach, s.shape[-1]))
    if axis_name is not None:
        top = jax.lax.all_gather(top, axis_name, axis=top.ndim - 1, tiled=True)
        top, _ = jax.lax.top_k(top, min(reach, top.shape[-1]))
    cut = jnp.take_along_axis(top, jnp.maximum(k - 1, 0), axis=-1)
    if axis_name is not None:
        cut = jax.lax.pmax(cut, axis_name)  # it is the same everywhere, which types do not know
    above, level = exists & (s > cut), exists & (s == cut)
    number, num_above, num_level = sum_over_shards(
        tuple(jnp.sum(x, axis=-1, keepdims=True, dtype=s.dtype) for x in (exists, above, level)),
        axis_name,
    )
    share = jnp.clip((k - num_above) / jnp.maximum(num_level, 1), 0, 1)
    inside = jnp.where(above, 1.0, jnp.where(level, share, 0.0))
    ends = tuple(
        jnp.max(jnp.where(mask, x, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
        for mask, x in ((inside > 0, -s), (exists & (inside < 1), s))
    )
    if axis_name is not None:
        ends = jax.lax.pmax(ends, axis_name)
    last_in, first_out = (jnp.where(jnp.isneginf(x), 0.0, x) for x in ends)
    return number, inside, -last_in, first_out
