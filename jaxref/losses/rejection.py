"""Learning when to reject the output of a predictor that is fixed."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.exponential import linear_tail_exp
from jaxref.core.numerics import compute_dtype


def fixed_predictor_rejection_loss(
    rejection_scores: ArrayLike,
    correct: ArrayLike,
    *,
    cost: float,
    alpha: float = 4.0,
    beta: float | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""A convex loss for a rejector, whose threshold at 0 is the right one for the cost.

        L = exp((α/2) (r - a)) + c exp(-β r)

    with r the rejector's score, above 0 to accept, a = ±1 for a correct or a wrong output of the
    predictor, and c = cost that of rejecting, where an accepted wrong output costs 1. L is at least
    that loss, 1[a = -1] 1[r > 0] + c 1[r ≤ 0]. With β = `calibrated_rejection_beta` its minimum
    accepts exactly where an output is wrong with probability less than c.

    Args:
      rejection_scores: r `[...]` floating point.
      correct: of the shape of r: booleans, or the probability in [0, 1] that the output is right,
        which gives the expectation.
      cost: c in (0, 1), such as 0.05 for a precision of 95%.
      alpha: α above 0. Default 4, the paper's for text; 3.5 for images.
      beta: β above 0. Default: the calibrated one. Another one moves the threshold off the cost.
      where: boolean, broadcastable to r; excluded entries have loss 0.

    Returns:
      `[...]` losses in the type of r. The exponentials go on as their tangents once they pass 1e27
      (in float32).

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: scores that are not floating point.

    Use it where all that is known of outputs is whether they are acceptable, as with generated
    text; β is about 20 for a cost of 0.05, so take a small learning rate. `jaxref.metrics` has the
    risk and the curve of precision against coverage.

    Cost: one pass over the scores; three exponentials each.

    Example:
      >>> r, correct = jnp.array([0.1, 0.1, -0.1]), jnp.array([True, False, False])
      >>> print(fixed_predictor_rejection_loss(r, correct, cost=0.05).round(2))
      [0.17 9.03 6.42]

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, "Learning to Reject with a Fixed Predictor:
    Application to Decontextualization", 2023, arXiv:2301.09044.
    """
    check_floating(rejection_scores=rejection_scores)
    check_broadcastable(jnp.shape(rejection_scores), correct=correct, where=where)
    if beta is None:
        beta = calibrated_rejection_beta(cost, alpha)
    check_interval(0, 1, closed="neither", cost=cost)
    check_interval(0, jnp.inf, closed="right", alpha=alpha, beta=beta)
    dtype = compute_dtype(rejection_scores)
    r = jnp.asarray(rejection_scores).astype(dtype)
    if where is not None:
        r = jnp.where(where, r, 0.0)
    p = jnp.asarray(correct).astype(dtype)
    accepted = p * linear_tail_exp(alpha / 2 * (r - 1)) + (1 - p) * linear_tail_exp(
        alpha / 2 * (r + 1)
    )
    loss = accepted + linear_tail_exp(jnp.log(jnp.asarray(cost, dtype)) - beta * r)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(rejection_scores))


def calibrated_rejection_beta(cost: float, alpha: float = 4.0) -> float:
    r"""The β that puts the threshold of `fixed_predictor_rejection_loss` where the cost does.

        β = α I_c / (2c),   I_c = c exp(α/2) + (1 - c) exp(-α/2)

    Args:
      cost: c in (0, 1).
      alpha: α above 0. Default 4.

    Returns:
      β, a number; an array where an argument is one.

    Raises:
      ValueError: an argument out of its range.

    Use it to see how steep the loss is at its default, which this is; any other β moves the
    threshold of `fixed_predictor_rejection_loss` off the cost.

    Cost: a closed formula.

    Example:
      >>> print(round(calibrated_rejection_beta(0.05), 2))
      19.92

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, "Learning to Reject with a Fixed Predictor:
    Application to Decontextualization", 2023, arXiv:2301.09044.
    """
    check_interval(0, 1, closed="neither", cost=cost)
    check_interval(0, jnp.inf, closed="right", alpha=alpha)
    return alpha * _mean_exponential(1 - cost, alpha) / (2 * cost)


def optimal_rejection_score(
    correct_probability: ArrayLike,
    *,
    cost: float,
    alpha: float = 4.0,
    beta: float | None = None,
) -> Array:
    r"""The rejector's score that makes the expected `fixed_predictor_rejection_loss` least.

        r* = log(2βc / (α I)) / (α/2 + β),   I = p exp(-α/2) + (1 - p) exp(α/2)

    with p the probability that the output is right. For the calibrated β its sign is that of
    c - (1 - p).

    Args:
      correct_probability: p `[...]` floating point in [0, 1].
      cost: c in (0, 1).
      alpha: α above 0. Default 4.
      beta: β above 0. Default: the calibrated one.

    Returns:
      `[...]` scores in the type of p.

    Raises:
      ValueError: an argument out of its range.
      TypeError: probabilities that are not floating point.

    Use it to compare a trained rejector with the best one, where the probabilities are known.

    Cost: one pass over the probabilities.

    Example:
      >>> print(optimal_rejection_score(jnp.array([0.9, 0.99]), cost=0.05).round(3))
      [-0.025  0.04 ]

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, "Learning to Reject with a Fixed Predictor:
    Application to Decontextualization", 2023, arXiv:2301.09044.
    """
    check_floating(correct_probability=correct_probability)
    check_interval(0, 1, correct_probability=correct_probability)
    if beta is None:
        beta = calibrated_rejection_beta(cost, alpha)
    check_interval(0, 1, closed="neither", cost=cost)
    check_interval(0, jnp.inf, closed="right", alpha=alpha, beta=beta)
    p = jnp.asarray(correct_probability).astype(compute_dtype(correct_probability))
    ratio = 2 * beta * cost / (alpha * _mean_exponential(p, alpha))
    score = jnp.log(ratio) / (alpha / 2 + beta)
    return score.astype(jnp.result_type(correct_probability))


def _mean_exponential(p, alpha):
    """The mean of exp(-α a / 2), a = 1 with probability p and -1 else."""
    exp = np.exp if isinstance(alpha, float | int) else jnp.exp
    return p * exp(-alpha / 2) + (1 - p) * exp(alpha / 2)
