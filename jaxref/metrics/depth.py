"""How far estimated depth is off: relative and logarithmic errors, accuracies, and the order.

Depth maps are `[..., height, width]`, positive; each map's pixels are reduced in at least float32,
and the type of the predictions is returned. `where` (boolean, broadcastable to the maps) says which
pixels exist; the others may hold anything. A map without pixels has 0.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean

MAP = (-2, -1)


def absolute_relative_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The mean error of depth as a share of the depth (AbsRel).

        AbsRel = mean(|prediction - target| / target)

    Args:
      predictions: `[..., height, width]` floating point depths, positive.
      targets: depths of the same shape, positive.
      where: boolean, broadcastable to `predictions`: the pixels that exist. Default: all.

    Returns:
      `[...]` in the type of `predictions`; lower is better.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it, with `depth_accuracy`, as the first number of a benchmark; far pixels count less than in
    `root_mean_squared_error`.

    Cost: one pass over the maps.

    Example:
      >>> print(absolute_relative_error(jnp.array([[1.5, 5.0]]), jnp.array([[2.0, 4.0]])))
      0.25

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked(predictions, targets, where)
    error = jnp.abs(prediction - target) / target
    return masked_mean(error, axis=MAP, where=where).astype(jnp.result_type(predictions))


def root_mean_squared_log_depth_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The root of the mean squared error of log depth (RMSE log).

        √mean((log prediction - log target)²)

    Args:
      predictions: `[..., height, width]` floating point depths, positive.
      targets: depths of the same shape, positive.
      where: boolean, broadcastable to `predictions`: the pixels that exist. Default: all.

    Returns:
      `[...]` in the type of `predictions`, in nats; lower is better.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it where a factor matters and not a difference; `log10_error` weighs outliers less.

    Cost: one pass over the maps, with two logarithms a pixel.

    Example:
      >>> print(root_mean_squared_log_depth_error(jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 2.0]])))
      0.6931

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked(predictions, targets, where)
    squares = jnp.square(jnp.log(prediction) - jnp.log(target))
    mean = masked_mean(squares, axis=MAP, where=where)
    return jnp.sqrt(mean).astype(jnp.result_type(predictions))


def log10_error(
    predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The mean error of the decimal logarithm of depth.

        mean |log₁₀ prediction - log₁₀ target|

    Args:
      predictions: `[..., height, width]` floating point depths, positive.
      targets: depths of the same shape, positive.
      where: boolean, broadcastable to `predictions`: the pixels that exist. Default: all.

    Returns:
      `[...]` in the type of `predictions`; lower is better.

    Raises:
      ValueError: shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it as benchmarks of indoor depth do; `root_mean_squared_log_depth_error` is theirs of roads.

    Cost: one pass over the maps, with two logarithms a pixel.

    Example:
      >>> print(log10_error(jnp.array([[10.0, 1.0]]), jnp.array([[1.0, 1.0]])))
      0.5

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    prediction, target = _checked(predictions, targets, where)
    error = jnp.abs(jnp.log(prediction) - jnp.log(target)) / math.log(10)
    return masked_mean(error, axis=MAP, where=where).astype(jnp.result_type(predictions))


def depth_accuracy(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    threshold: float = 1.25,
    where: ArrayLike | None = None,
) -> Array:
    r"""The share of pixels of which the depth is right up to a factor (δ accuracy).

        mean 1[max(prediction / target, target / prediction) < threshold]

    Args:
      predictions: `[..., height, width]` floating point depths, positive.
      targets: depths of the same shape, positive.
      threshold: above 1. Default 1.25; its square and cube are reported too.
      where: boolean, broadcastable to `predictions`: the pixels that exist. Default: all.

    Returns:
      `[...]` from 0 to 1 in the type of `predictions`; higher is better.

    Raises:
      ValueError: a `threshold` not above 1, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to see how many pixels are of use; `absolute_relative_error` says how far off the others
    are.

    Cost: one pass over the maps.

    Example:
      >>> print(depth_accuracy(jnp.array([[1.2, 1.3]]), jnp.array([[1.0, 1.0]])))
      0.5

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(1, jnp.inf, closed="right", threshold=threshold)
    prediction, target = _checked(predictions, targets, where)
    factor = jnp.maximum(prediction / target, target / prediction)
    right = (factor < threshold).astype(factor.dtype)
    return masked_mean(right, axis=MAP, where=where).astype(jnp.result_type(predictions))


def human_disagreement_rate(
    first_depths: ArrayLike,
    second_depths: ArrayLike,
    relations: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    tolerance: float = 0.1,
) -> Array:
    r"""How often the order of two pixels' depths is not what people say it is (WHDR).

        WHDR = Σ_i w_i 1[relation(a_i, b_i) ≠ r_i] / Σ_i w_i

        relation(a, b) = 1 where a > (1 + τ) b,  -1 where b > (1 + τ) a,  0 elsewhere

    Args:
      first_depths: a `[..., pairs]` floating point, positive: predicted at the first pixel.
      second_depths: b `[..., pairs]`, positive.
      relations: r `[..., pairs]`: 1 where people see the first farther away, -1 the second, 0
        neither.
      weights: w `[..., pairs]` at least 0: how sure they are. Default: 1.
      tolerance: τ at least 0: up to which ratio depths count as equal. Default 0.1.

    Returns:
      `[...]` from 0 to 1 in the type of `first_depths`; lower is better. 0 where all weights are.

    Raises:
      ValueError: a negative `tolerance`, negative weights, or shapes that do not match.
      TypeError: `first_depths` not floating point.

    Use it where images have no measured depth; it sees the order alone.

    Cost: one pass over the pairs, however large the images.

    Example:
      >>> a, b = jnp.array([2.0, 1.0, 1.0]), jnp.array([1.0, 1.05, 2.0])
      >>> print(human_disagreement_rate(a, b, jnp.array([1, 0, 1])).round(3))
      0.333

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_floating(first_depths=first_depths)
    check_interval(0, jnp.inf, tolerance=tolerance)
    shape = jnp.shape(first_depths)
    check_shape(shape, second_depths=second_depths, relations=relations)
    dtype = compute_dtype(first_depths)
    a, b = jnp.asarray(first_depths).astype(dtype), jnp.asarray(second_depths).astype(dtype)
    seen = jnp.where(a > (1 + tolerance) * b, 1, jnp.where(b > (1 + tolerance) * a, -1, 0))
    w = jnp.ones(shape, dtype)
    if weights is not None:
        check_shape(shape, weights=weights)
        check_interval(0, jnp.inf, weights=weights)
        w = jnp.asarray(weights).astype(dtype)
    total = jnp.sum(w, axis=-1)
    wrong = jnp.sum(w, axis=-1, where=seen != jnp.asarray(relations))
    return (wrong / jnp.where(total > 0, total, 1)).astype(jnp.result_type(first_depths))


def _checked(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array]:
    """Both maps in the type to compute in, with 1 at the pixels that do not exist."""
    check_floating(predictions=predictions)
    shape = jnp.shape(predictions)
    if len(shape) < 2:
        raise ValueError(f"predictions must have shape [..., height, width], got {shape}")
    check_shape(shape, targets=targets)
    check_broadcastable(shape, where=where)
    dtype = compute_dtype(predictions)
    a, b = jnp.asarray(predictions).astype(dtype), jnp.asarray(targets).astype(dtype)
    return (a, b) if where is None else (jnp.where(where, a, 1), jnp.where(where, b, 1))
