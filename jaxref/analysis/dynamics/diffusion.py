"""How weights move away from where they started: ultra-slow diffusion."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_same_tree, check_shape
from jaxref.core.numerics import compute_dtype


def weight_distance(params: Any, init_params: Any) -> Array:
    r"""The Euclidean distance of the weights from those at initialisation.

        ‖w - w_0‖ = √(Σ_i (w_i - w_0i)²)

    over all entries of all leaves.

    Args:
      params: w, a tree of floating-point arrays.
      init_params: w_0, a tree of the same structure and shapes.

    Returns:
      The distance, a scalar in at least float32; its gradient at w_0 is 0.

    Raises:
      ValueError: trees of different structures or shapes.

    Use it at some steps of a run, spaced evenly in their logarithm, and hand the distances to
    `fit_ultra_slow_diffusion`.

    Cost: one pass over the weights, and a copy of them at initialisation in memory.

    Example:
      >>> start = {"kernel": jnp.array([0.0, 1.0]), "bias": 0.0}
      >>> weight_distance({"kernel": jnp.array([3.0, 1.0]), "bias": 4.0}, start)
      Array(5., dtype=float32)

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization
    gap in large batch training of neural networks", 2017, arXiv:1705.08741.
    """
    check_same_tree(init_params, params=params)

    def square_sum(w, w_0):
        dtype = compute_dtype(w, w_0)
        return jnp.sum(jnp.square(jnp.asarray(w, dtype) - jnp.asarray(w_0, dtype)))

    sums = jax.tree.leaves(jax.tree.map(square_sum, params, init_params))
    total = jnp.asarray(sum(sums), jnp.result_type(jnp.float32, *sums))
    moved = total > 0
    return jnp.where(moved, jnp.sqrt(jnp.where(moved, total, 1.0)), 0.0)


class UltraSlowDiffusion(NamedTuple):
    """The fit of distance = slope · log(step) + intercept, by `fit_ultra_slow_diffusion`.

    Attributes:
      slope: distance for each factor of e in the steps.
      intercept: the distance at step 1.
      r_squared: the share of the distances' variance that the fit explains; at most 1.
    """

    slope: float
    intercept: float
    r_squared: float


def fit_ultra_slow_diffusion(steps: ArrayLike, distances: ArrayLike) -> UltraSlowDiffusion:
    r"""Fits the growth of the weights' distance as the logarithm of the steps.

        ‖w_t - w_0‖ ≈ slope · log t + intercept

    by least squares. A random walk on a random potential whose differences grow as
    E (L(w) - L(w'))² ~ ‖w - w'‖^α moves as (log t)^(2/α); the loss of deep networks has α = 2 at
    high learning rates. The large batch starts along the same line, and has taken fewer steps.

    Args:
      steps: t, `[points]`, positive, at least two different ones. Only those before the learning
        rate first drops, or the loss has settled.
      distances: `[points]`, at least 0, as of `weight_distance`.

    Returns:
      An `UltraSlowDiffusion`, computed in float64 on the host; an `r_squared` of 1 for distances
      that are all equal.

    Raises:
      ValueError: fewer than two different steps, shapes that differ, or numbers out of range.

    Use it to see whether a run is still in its initial phase of exploration, and how many steps
    more a larger batch needs to come as far: `jaxref.optimizers.regime_adaptation` gives it those.
    Compare `r_squared` with that of a line in t, since any growth has some fit.

    Cost: one least squares line through the points, on the host.

    Example:
      >>> fit = fit_ultra_slow_diffusion([1, 10, 100], [1.0, 3.0, 5.0])
      >>> print(f"{fit.slope * np.log(10):.2f} a decade, {fit.r_squared:.2f}")
      2.00 a decade, 1.00

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization
    gap in large batch training of neural networks", 2017, arXiv:1705.08741.
    """
    t, distance = np.asarray(steps, float), np.asarray(distances, float)
    check_interval(0, np.inf, closed="right", steps=t)
    check_interval(0, np.inf, distances=distance)
    if t.ndim != 1 or np.unique(t).size < 2:
        raise ValueError(f"steps must hold at least two different steps in a row, got {t}")
    check_shape(t.shape, distances=distance)
    log_t = np.log(t)
    slope, intercept = np.polyfit(log_t, distance, 1)
    unexplained = np.sum(np.square(distance - slope * log_t - intercept))
    total = np.sum(np.square(distance - distance.mean()))
    r_squared = 1.0 if np.ptp(distance) == 0 else 1 - unexplained / total
    return UltraSlowDiffusion(float(slope), float(intercept), float(r_squared))
