"""Losses of forecasts of several steps: by how far ahead a step is, and relative to its size.

Both work element by element in at least float32 and return the type of the predictions. `where`
(boolean, broadcastable to the predictions) says which entries exist; the others have loss 0 and
gradient 0 and may hold anything, NaN included.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.losses.regression import absolute_error, squared_error


def signal_decay_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    time_axis: int = -2,
    decay: float = 0.5,
    base: Literal["absolute", "squared"] = "absolute",
    where: ArrayLike | None = None,
) -> Array:
    r"""An error that counts less the further ahead its step is (CARD's signal decay loss).

        L_t = t^(-d) |prediction_t - target_t|,   t = 1 ... T,   d = decay

    The error of a series that drifts has a variance that grows as t: with d = 1/2 all steps weigh
    the same in expectation, and the far ones, about which less can be known, do not drown the near.

    Args:
      predictions: floating point with the steps at `time_axis`, such as `[batch, horizon,
        channels]`.
      targets: real numbers, broadcastable to `predictions`.
      time_axis: the axis of the steps. Default -2, the one before channels.
      decay: d at least 0; 0 is the error itself. Default 1/2, the paper's. With squared errors, 1
        is its counterpart.
      base: "absolute" (the default) for |e|, or "squared" for e².
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      Losses of the shape and type of `predictions`; the caller takes the mean.

    Raises:
      ValueError: a negative `decay`, an unknown `base`, an axis out of range, or shapes that do not
        match.
      TypeError: predictions that are not floating point.

    Use it to train forecasts of many steps at a time, whatever the model, and report plain errors
    of the same forecasts.

    Cost: one pass over the predictions.

    Example:
      >>> losses = signal_decay_loss(jnp.zeros((4, 1)), jnp.ones((4, 1)))
      >>> print(losses.ravel().round(3))
      [1.    0.707 0.577 0.5  ]

    Reference: Wang, Zhou, Wen, Gao, Ding, Jin, "CARD: Channel Aligned Robust Blend Transformer for
    Time Series Forecasting", 2023, arXiv:2305.12095.
    """
    check_floating(predictions=predictions)
    check_interval(0, jnp.inf, decay=decay)
    if base not in ("absolute", "squared"):
        raise ValueError(f"base must be 'absolute' or 'squared', got {base!r}")
    result, dtype = jnp.result_type(predictions), compute_dtype(predictions)
    error = absolute_error if base == "absolute" else squared_error
    wide = error(jnp.asarray(predictions, dtype), targets, where=where)
    (axis,) = canonical_axes(time_axis, wide.ndim, name="time_axis")
    steps = np.arange(1.0, wide.shape[axis] + 1).reshape(-1, *[1] * (wide.ndim - axis - 1))
    return (jnp.asarray(steps**-decay, wide.dtype) * wide).astype(result)


def symmetric_absolute_percentage_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The size of the error as a share of the mean size of prediction and target.

        L = 2 |prediction - target| / (|prediction| + |target|)

    Args:
      predictions: `[...]` floating point.
      targets: real numbers, broadcastable to `predictions`.
      where: boolean, broadcastable to `predictions`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses from 0 to 2 in the type of `predictions`; 0 where both are 0, without gradient.

    Raises:
      ValueError: `targets` or `where` do not broadcast to `predictions`.
      TypeError: predictions that are not floating point.

    Use it to train on series of several scales at once, of one sign: it is flat at 2, without
    gradient, where prediction and target have different signs or the target is 0.
    `jaxref.metrics.symmetric_mean_absolute_percentage_error` is its mean, to report.

    Cost: one pass over the predictions.

    Example:
      >>> print(symmetric_absolute_percentage_error(jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])))
      [1. 0.]

    Reference: Lee, Jeon, Kang, Park, "Feature-aligned N-BEATS with Sinkhorn divergence", 2023,
    arXiv:2305.15196.
    """
    check_floating(predictions=predictions)
    result, dtype = jnp.result_type(predictions), compute_dtype(predictions)
    error = absolute_error(jnp.asarray(predictions, dtype), targets, where=where)
    is_error = error > 0
    prediction, target = (jnp.asarray(x, error.dtype) for x in (predictions, targets))
    sizes = absolute_error(prediction, 0.0, where=where) + jnp.where(is_error, jnp.abs(target), 0.0)
    return jnp.where(is_error, 2 * error / jnp.where(is_error, sizes, 1.0), 0.0).astype(result)
