"""How well a rejector tells right outputs from wrong ones: risk, precision and coverage."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def rejection_risk(
    rejection_scores: ArrayLike,
    correct: ArrayLike,
    *,
    cost: float,
    where: ArrayLike | None = None,
) -> Array:
    r"""The mean cost of accepting wrong outputs, at 1 each, and of rejecting any, at c each.

        mean of 1[wrong] 1[r > 0] + c 1[r ≤ 0],   c = cost

    Args:
      rejection_scores: r `[...]` floating point, above 0 to accept.
      correct: of the shape of r: booleans, or the probability in [0, 1] that an output is right.
      cost: c in (0, 1).
      where: boolean, broadcastable to r: the outputs that exist.

    Returns:
      A scalar in at least float32; 0 where no output exists.

    Raises:
      ValueError: a `cost` out of its range, or shapes that do not match.
      TypeError: scores that are not floating point.

    Use it to compare rejectors for one cost; `jaxref.losses.fixed_predictor_rejection_loss` is its
    convex bound. `precision_coverage_curve` compares for every cost.

    Cost: one pass over the scores.

    Example:
      >>> scores, correct = jnp.array([1.0, 2.0, -1.0]), jnp.array([True, False, True])
      >>> print(rejection_risk(scores, correct, cost=0.2))
      0.4

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, "Learning to Reject with a Fixed Predictor:
    Application to Decontextualization", 2023, arXiv:2301.09044.
    """
    check_floating(rejection_scores=rejection_scores)
    check_interval(0, 1, closed="neither", cost=cost)
    check_broadcastable(jnp.shape(rejection_scores), correct=correct, where=where)
    dtype = compute_dtype(rejection_scores)
    wrong = 1 - jnp.asarray(correct).astype(dtype)
    return masked_mean(jnp.where(jnp.asarray(rejection_scores) > 0, wrong, cost), where=where)


class PrecisionCoverage(NamedTuple):
    """Precision and coverage at each threshold, by `precision_coverage_curve`.

    Attributes:
      precision: `[n]`, the share of right outputs among the accepted.
      coverage: `[n]`, the share of outputs that are accepted, which does not decrease.
      thresholds: `[n]`, which do not increase: outputs with at least this score are accepted.

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, "Learning to Reject with a Fixed Predictor:
    Application to Decontextualization", 2023, arXiv:2301.09044.
    """

    precision: Array
    coverage: Array
    thresholds: Array


def precision_coverage_curve(
    rejection_scores: ArrayLike, correct: ArrayLike, *, where: ArrayLike | None = None
) -> PrecisionCoverage:
    r"""How precise the accepted outputs are, against how many are accepted, at every threshold.

        precision(θ) = |right and r ≥ θ| / |r ≥ θ|,   coverage(θ) = |r ≥ θ| / n

    at θ each of the n scores r, largest first: equal scores are accepted together.

    Args:
      rejection_scores: r `[n]` floating point.
      correct: `[n]` booleans, or the probability in [0, 1] that an output is right.
      where: boolean `[n]`: the outputs that exist. The last entries of the curve, as many
        as there are others, are NaN.

    Returns:
      A `PrecisionCoverage` in at least float32.

    Raises:
      ValueError: shapes that do not match, or scores that are not one axis.
      TypeError: scores that are not floating point.

    Use it to compare rejectors at all costs; `coverage_at_precision` reads one point of it.

    Cost: one sort, O(n log n).

    Example:
      >>> curve = precision_coverage_curve(jnp.array([0.1, 0.9, 0.5]), jnp.array([0, 1, 1]))
      >>> print(curve.precision.round(3), curve.coverage.round(3))
      [1.    1.    0.667] [0.333 0.667 1.   ]

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, "Learning to Reject with a Fixed Predictor:
    Application to Decontextualization", 2023, arXiv:2301.09044.
    """
    check_floating(rejection_scores=rejection_scores)
    scores = jnp.asarray(rejection_scores)
    if scores.ndim != 1:
        raise ValueError(f"rejection_scores must have shape [n], got {scores.shape}")
    check_shape(scores.shape, correct=correct)
    check_broadcastable(scores.shape, where=where)
    exists = (
        jnp.ones(scores.shape, bool) if where is None else jnp.broadcast_to(where, scores.shape)
    )
    dtype = compute_dtype(scores)
    descending = jnp.lexsort((-jnp.where(exists, scores, 0), ~exists))
    r, exists = scores[descending].astype(dtype), exists[descending]
    right = jnp.cumsum(jnp.asarray(correct).astype(dtype)[descending])
    # the last of those with an equal score stands for all of them
    keys = jnp.where(exists, -r, jnp.inf)
    last = jnp.searchsorted(keys, keys, side="right") - 1
    last = jnp.minimum(last, jnp.maximum(exists.sum() - 1, 0))
    accepted = last + 1
    curve = (right[last] / accepted, accepted / jnp.maximum(exists.sum(), 1), r)
    return PrecisionCoverage(*(jnp.where(exists, part, jnp.nan).astype(dtype) for part in curve))


def coverage_at_precision(
    rejection_scores: ArrayLike,
    correct: ArrayLike,
    *,
    precision: float,
    where: ArrayLike | None = None,
) -> Array:
    r"""The largest share of outputs that can be accepted at a given precision.

        max { coverage(θ) : precision(θ) ≥ precision }

    Args:
      rejection_scores: r `[n]` floating point.
      correct: `[n]` booleans, or the probability in [0, 1] that an output is right.
      precision: in [0, 1].
      where: boolean `[n]`: the outputs that exist.

    Returns:
      A scalar in [0, 1], in at least float32; 0 where no threshold is precise enough.

    Raises:
      ValueError: a `precision` out of its range, shapes that do not match, or scores that are not
        one axis.
      TypeError: scores that are not floating point.

    Use it to report a rejector by the number that matters, at the precision that is asked for.

    Cost: that of `precision_coverage_curve`, one sort.

    Example:
      >>> scores, correct = jnp.array([0.1, 0.9, 0.5, 0.4]), jnp.array([0, 1, 0, 1])
      >>> print(coverage_at_precision(scores, correct, precision=0.6))
      0.75

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, "Learning to Reject with a Fixed Predictor:
    Application to Decontextualization", 2023, arXiv:2301.09044.
    """
    check_interval(0, 1, precision=precision)
    curve = precision_coverage_curve(rejection_scores, correct, where=where)
    enough = curve.precision >= precision  # NaN is not
    return jnp.max(jnp.where(enough, curve.coverage, 0.0), initial=0.0)
