"""Non-linear least squares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype


class SolveInfo(NamedTuple):
    """How a least-squares solve went.

    Attributes:
      steps: int32, the steps that were tried.
      converged: boolean, whether the last step was within the tolerance.
      cost: half the sum of the squared residuals.
    """

    steps: Array
    converged: Array
    cost: Array


def levenberg_marquardt(
    residual_fn: Callable[..., Array],
    w0: ArrayLike,
    args: Any = (),
    *,
    damping: float = 1.0,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> tuple[Array, SolveInfo]:
    r"""Minimises a sum of squares, between Gauss-Newton and gradient descent.

    With the residuals r of w and their Jacobian J, each step δ solves

        min_δ ‖r + J δ‖² + λ ‖D δ‖²

    with the norms of J's columns as the diagonal D, so that the units of w do not matter, by a QR
    decomposition of [J; √λ D], which keeps the condition of J where the normal equations square it.
    A step that lowers the sum is taken, and λ falls by a factor of up to 3, the more of the
    predicted decrease came true; otherwise λ grows, by 2, 4, 8, ... (Nielsen's rule). It ends with
    an all but undamped step (λ ≤ tolerance) whose entries are within the tolerance, relative to 1
    plus the largest |w|, or where rounding leaves nothing to gain.

    Args:
      residual_fn: `residual_fn(w, *args)`, residuals `[n]`, floating point.
      w0: `[m]` floating point, where to start.
      args: further arguments of `residual_fn`.
      damping: the initial λ, above 0. Default 1.
      tolerance: at least 0. Default 1e-4, which suits float32; float64 reaches 1e-12.
      max_steps: at least 1. Default 100.

    Returns:
      w in the type of `w0` and at least float32, and `SolveInfo`. Without convergence, the best w
      that was found. Not differentiable in reverse: see `jaxref.nn.hard_constraint_solve`.

    Raises:
      ValueError: `w0` or residuals that are not a vector, or a number that is out of range.
      TypeError: `w0` is not floating point.

    Use it for small problems inside of a compiled function; scipy.optimize outside of one.

    Cost: a step is an evaluation, after a successful one m forward-mode derivatives, and a QR
    decomposition, O((n + m) m²); J in memory.

    Example:
      >>> rosenbrock = lambda w: jnp.array([10 * (w[1] - w[0] ** 2), 1 - w[0]])
      >>> w, info = levenberg_marquardt(rosenbrock, jnp.array([-1.2, 1.0]))
      >>> print(w.round(3), info.converged)
      [1. 1.] True

    Reference: Nielsen, "Damping Parameter in Marquardt's Method", 1999; as the solver of
    Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
    mixture-of-experts", 2024, arXiv:2402.13412.
    """
    check_floating(w0=w0)
    check_interval(0, jnp.inf, closed="neither", damping=damping)
    check_interval(0, jnp.inf, tolerance=tolerance)
    check_interval(1, jnp.inf, max_steps=max_steps)
    w0 = jnp.asarray(w0, compute_dtype(w0))

    def residual(w: Array) -> Array:
        return residual_fn(w, *args)

    if w0.ndim != 1 or jax.eval_shape(residual, w0).ndim != 1:
        raise ValueError(
            f"w0 and the residuals must be vectors, got shapes {w0.shape} and "
            f"{jax.eval_shape(residual, w0).shape}"
        )
    jacobian = jax.jacfwd(residual)

    def step(at: _Progress) -> _Progress:
        norms = jnp.linalg.norm(at.jacobian, axis=0)
        rows = jnp.sqrt(at.damping) * jnp.diag(jnp.where(norms > 0, norms, 1.0))
        q, upper = jnp.linalg.qr(jnp.concatenate([at.jacobian, rows]))
        delta = jax.scipy.linalg.solve_triangular(upper, -(q[: at.r.shape[0]].T @ at.r))
        cost = _half_square(at.r)
        predicted = cost - _half_square(at.r + at.jacobian @ delta)
        w = at.w + delta
        r = residual(w)
        decrease = cost - _half_square(r)
        better = decrease > 0  # not where it is NaN
        gain = decrease / jnp.where(predicted > 0, predicted, 1.0)
        shrink = jnp.maximum(1 / 3, 1 - (2 * gain - 1) ** 3)
        within = jnp.max(jnp.abs(delta)) <= tolerance * (1 + jnp.max(jnp.abs(at.w)))
        exhausted = predicted <= 10 * jnp.finfo(w.dtype).eps * cost
        return _Progress(
            jnp.where(better, w, at.w),
            jnp.where(better, r, at.r),
            jax.lax.cond(better, jacobian, lambda w: at.jacobian, w),
            at.damping * jnp.where(better, shrink, at.growth),
            jnp.where(better, 2.0, 2 * at.growth),
            at.steps + 1,
            (within & (at.damping <= tolerance)) | exhausted,
        )

    r0 = residual(w0)
    start = _Progress(
        w0,
        r0,
        jacobian(w0),
        jnp.asarray(damping, w0.dtype),
        jnp.asarray(2.0, w0.dtype),
        jnp.zeros((), jnp.int32),
        _half_square(r0) == 0,
    )
    end = jax.lax.while_loop(lambda at: ~at.converged & (at.steps < max_steps), step, start)
    return end.w, SolveInfo(end.steps, end.converged, _half_square(end.r))


class _Progress(NamedTuple):
    w: Array
    r: Array
    jacobian: Array
    damping: Array
    growth: Array
    steps: Array
    converged: Array


def _half_square(r: Array) -> Array:
    return 0.5 * jnp.sum(jnp.square(r))
