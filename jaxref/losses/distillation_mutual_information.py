"""Distillation of representations by what the student's say about the teacher's.

The mutual information of the two is bounded from below with the scores of a critic, for all pairs
of a teacher's and a student's sample. Critic and student are trained to raise the bound.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.exponential import linear_tail_exp
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards

KINDS = ("infonce", "tuba", "nwj", "interpolated")


def mi_alpha_loss(
    scores: ArrayLike,
    log_baseline: ArrayLike | None = None,
    *,
    alpha: ArrayLike = 0.5,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Minus a lower bound on the mutual information of teacher and student (MI-α; a loss of the
    set).

        L = -1 - mean_{i≠j}(f_ii - u_ij) + mean_{i≠j} exp(f_ij - u_ii)
        u_ij = log( α / (K - 1) Σ_{k≠j} exp(f_ik) + (1 - α) exp(a_i) )

    for the scores f of K pairs. α weighs low variance against low bias: the bound is TUBA's at
    α = 0, and at most log(K - 1) at α = 1, which a constant added to a row does not change; in
    between it is at most 1 + log((K - 1) / α).

    Args:
      scores: f `[K, K]` floating point: row i of the teacher's sample i, column j of the student's
        sample j, matching pairs on the diagonal. K at least 2.
      log_baseline: a `[K]`, a learned function of the teacher's sample. Default: 0.
      alpha: α in [0, 1]. Default 0.5; the paper takes 0, 0.1, 0.5, 0.9 or 1, by task.
      axis_name: name or names of the mapped axes over whose shards the rows are spread: `scores`
        `[K / shards, K]` and `log_baseline` `[K / shards]` of a shard's own teacher samples. Not
        needed under jit with shardings.

    Returns:
      A scalar in the type of `scores`, in nats.

    Raises:
      ValueError: scores that are not square, K below 2, `log_baseline` of another size, or `alpha`
        outside of [0, 1].
      TypeError: scores that are not floating point.

    Use it beside the loss of the task, on the inner products of projections of both states, say;
    `mutual_information_lower_bound` has the plain bounds too. `hidden_mse_loss` needs no other
    samples.

    Cost: O(K²) time and memory, for the scores of all pairs, which a critic has to give.

    Example:
      >>> print(mi_alpha_loss(jnp.array([[2.0, 0.0], [0.0, 2.0]]), alpha=1.0))
      0.0

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105.
    """
    return -mutual_information_lower_bound(
        scores, kind="interpolated", log_baseline=log_baseline, alpha=alpha, axis_name=axis_name
    )


def mutual_information_lower_bound(
    scores: ArrayLike,
    *,
    kind: str = "interpolated",
    log_baseline: ArrayLike | None = None,
    alpha: ArrayLike = 0.5,
    axis_name: AxisName | None = None,
) -> Array:
    r"""A lower bound on the mutual information of two variables from K pairs (one number for the
    set).

        infonce:       log K + mean_i( f_ii - log Σ_j exp(f_ij) )
        tuba:          1 + mean_i(f_ii - a_i) - mean_{i≠j} exp(f_ij - a_i)
        nwj:           tuba with a = 1
        interpolated:  1 + mean_{i≠j}(f_ii - u_ij) - mean_{i≠j} exp(f_ij - u_ii)
                       u_ij = log( α / (K - 1) Σ_{k≠j} exp(f_ik) + (1 - α) exp(a_i) )

    Each holds in expectation for any scores f. "infonce" is at most log K, with low variance;
    "tuba" and "nwj" are tight for the best scores, with high variance.

    Args:
      scores: f `[K, K]` floating point: row i of the first variable's sample i, column j of the
        second's sample j, matching pairs on the diagonal. K at least 2.
      kind: one of the names above. Default "interpolated".
      log_baseline: a `[K]`, of the first variable's samples, for "tuba" and "interpolated".
        Default: 0.
      alpha: α in [0, 1], for "interpolated": 0 is "tuba". Default 0.5.
      axis_name: name or names of the mapped axes over whose shards the rows are spread: `scores`
        `[K / shards, K]` and `log_baseline` `[K / shards]` of a shard's own rows. Not needed under
        jit with shardings.

    Returns:
      A scalar in the type of `scores`, in nats. The exponential of an offdiagonal score goes on as
      a straight line where it would overflow.

    Raises:
      ValueError: scores that are not square, K below 2, an unknown `kind`, `log_baseline` of
        another size or for a kind without one, or `alpha` outside of [0, 1].
      TypeError: scores that are not floating point.

    Use it to measure; `mi_alpha_loss` is the loss. The authors' code has the student's samples in
    the rows, and takes the logit of α.

    Cost: O(K²) time and memory; "interpolated" keeps several arrays of K² numbers, "infonce" one.

    Example:
      >>> scores = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> for kind in ("infonce", "nwj"):
      ...     print(mutual_information_lower_bound(scores, kind=kind).round(3))
      0.566
      1.632

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105; the bounds from
    Poole, Ozair, van den Oord, Alemi, Tucker, "On Variational Bounds of Mutual Information", 2019,
    arXiv:1905.06922.
    """
    check_floating(scores=scores)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {kind!r}")
    check_interval(0, 1, alpha=alpha)
    f = jnp.asarray(scores).astype(compute_dtype(scores))
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if f.ndim != 2 or f.shape[0] * shards != f.shape[1]:
        expected = "[K, K]" if shards == 1 else f"[K / {shards}, K]"
        raise ValueError(f"scores must have shape {expected}, got {f.shape}")
    rows, size = f.shape
    if size < 2:
        raise ValueError(f"scores must be of at least two pairs, got {size}")
    a = jnp.full(rows, 1.0 if kind == "nwj" else 0.0, f.dtype)
    if log_baseline is not None:
        if kind in ("infonce", "nwj"):
            raise ValueError(f"log_baseline must be None for {kind!r}, got one")
        check_shape((rows,), log_baseline=log_baseline)
        a = jnp.asarray(log_baseline).astype(f.dtype)

    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
    own = start + jnp.arange(rows)
    is_match = jnp.arange(size) == own[:, None]
    match = jnp.take_along_axis(f, own[:, None], axis=1)[:, 0]

    def mean_of(row_sums: Array, count: int) -> Array:
        return sum_over_shards(jnp.sum(row_sums), axis_name) / count

    if kind == "infonce":
        bound = math.log(size) + mean_of(match - jax.nn.logsumexp(f, axis=1), size)
        return bound.astype(jnp.result_type(scores))
    pairs = size * (size - 1)
    if kind == "interpolated":
        others = _log_sum_of_others(f) - math.log(size - 1)
        alpha = jnp.asarray(alpha, f.dtype)
        u = jnp.logaddexp(jnp.log(alpha) + others, jnp.log1p(-alpha) + a[:, None])
        joint = mean_of(jnp.where(is_match, 0.0, match[:, None] - u), pairs)
        log_scale = jnp.take_along_axis(u, own[:, None], axis=1)
    else:
        joint, log_scale = mean_of(match - a, size), a[:, None]
    marginal = mean_of(jnp.where(is_match, 0.0, linear_tail_exp(f - log_scale)), pairs)
    return (1 + joint - marginal).astype(jnp.result_type(scores))


def _log_sum_of_others(f: Array) -> Array:
    """log Σ_{k≠j} exp(f_ik) for all i and j: what comes before j and what comes after it.

    Nothing is subtracted, so that it holds where one entry makes up the sum.
    """
    none = jnp.full((len(f), 1), jnp.finfo(f.dtype).min)
    before = jax.lax.cumlogsumexp(f, axis=1)[:, :-1]
    after = jax.lax.cumlogsumexp(f, axis=1, reverse=True)[:, 1:]
    return jnp.logaddexp(
        jnp.concatenate([none, before], axis=1), jnp.concatenate([after, none], axis=1)
    )
