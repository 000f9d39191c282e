"""Where the scaling trends of two model families meet."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape


class ScalingIntersection(NamedTuple):
    """Two fitted trends and where they meet, by `scaling_intersection`.

    Attributes:
      coefficients_a, coefficients_b: `[2]`; level and slope of log loss over log hours.
      hours: compute at which both reach the same loss; inf where they never do.
      loss: that loss; 0 where they never do.
    """

    coefficients_a: np.ndarray
    coefficients_b: np.ndarray
    hours: float
    loss: float


def scaling_intersection(
    hours_a: ArrayLike, loss_a: ArrayLike, hours_b: ArrayLike, loss_b: ArrayLike
) -> ScalingIntersection:
    r"""The compute at which one model family overtakes another, by extrapolation of both.

    Fits to each family, by least squares over its models,

        log L = a_0 + a_1 log h

    with L the loss of a model trained for h accelerator hours, and solves for the crossing

        log h* = (b_0 - a_0) / (a_1 - b_1)

    Args:
      hours_a, hours_b: h of each family, `[models]`, at least two different positive numbers.
      loss_a, loss_b: L of each family, of the same shapes, positive: the loss, or a perplexity
        such as `jaxref.metrics.normalised_perplexity`.

    Returns:
      A `ScalingIntersection`, computed in float64 on the host. The crossing may be anywhere, that
      of diverging trends in the past; trends of the same slope never cross.

    Raises:
      ValueError: fewer than two different compute budgets, shapes that differ, or numbers that are
        not positive.

    Use it where one family is better at small and another improves faster. It is an extrapolation,
    at times over orders of magnitude: report the slopes along with it.

    Cost: two least squares lines on the host; each point is a training run.

    Example:
      >>> trends = scaling_intersection([1.0, 4.0], [4.0, 2.0], [1.0, 4.0], [3.0, 3.0])
      >>> trends.hours, trends.loss
      (1.778, 3.0)

    Reference: Stanić et al., "The Languini Kitchen: Enabling Language Modelling Research at
    Different Scales of Compute", 2023, arXiv:2309.11197.
    """
    a = _fit("a", hours_a, loss_a)
    b = _fit("b", hours_b, loss_b)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_hours = (b[0] - a[0]) / (a[1] - b[1])
        hours, loss = float(np.exp(log_hours)), float(np.exp(a[0] + a[1] * log_hours))
    if np.isclose(a[1], b[1], rtol=1e-12, atol=1e-12):  # but for rounding
        hours, loss = np.inf, 0.0
    return ScalingIntersection(a, b, hours, loss)


def _fit(name: str, hours: ArrayLike, loss: ArrayLike) -> np.ndarray:
    hours, loss = np.asarray(hours, float), np.asarray(loss, float)
    check_interval(0, np.inf, closed="right", **{f"hours_{name}": hours, f"loss_{name}": loss})
    if hours.ndim != 1 or np.unique(hours).size < 2:
        raise ValueError(f"hours_{name} must hold at least two different budgets, got {hours}")
    check_shape(hours.shape, **{f"loss_{name}": loss})
    start = np.log(hours).mean()  # measured from the middle, for the fit's condition
    slope, level = np.polyfit(np.log(hours) - start, np.log(loss), 1)
    return np.array([level - slope * start, slope])
