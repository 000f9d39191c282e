r"""Newton's method whose regularisation is the gradient's norm over a radius γ, found by search,
and the property of a function and a Hessian approximation that says how large γ may be.

Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
Approximate Hessians", 2025, arXiv:2506.13710.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers.hessian_approximations import (
    HessianFactors,
    HessianFn,
    flatten_hessian,
    regularized_inverse,
    tensordot,
)
from jaxref.optimizers.lion_kappa import l2


class NewtonResult(NamedTuple):
    """What `gradient_regularized_newton` found.

    Attributes:
      x: the last point, a tree like x0 in at least float32.
      iterations: int32 scalar, the steps K that were taken.
      evaluations: int32 scalar, how often the function and its gradient were computed.
      converged: boolean scalar, whether a tolerance was reached.
      values: [max_iterations + 1] values of the function at x_0, ..., x_K; NaN thereafter.
      gradient_norms: [max_iterations + 1] dual norms of the gradient at these points.
      gammas: [max_iterations] radii γ of the steps; no step is longer than its γ where H is
        positive semidefinite.
    """

    x: Any
    iterations: Array
    evaluations: Array
    converged: Array
    values: Array
    gradient_norms: Array
    gammas: Array


class _Trial(NamedTuple):
    """The last trial of a search for γ: the next γ to try or, if accepted, its own."""

    gamma: Array
    trials: Array
    accepted: Array
    y: Array
    value: Array
    gradient: Array


class _Progress(NamedTuple):
    """Where the method is, the γ of its next trial, and the history of `NewtonResult`."""

    y: Array
    value: Array
    gradient: Array
    gamma: Array
    moved: Array
    iterations: Array
    evaluations: Array
    values: Array
    gradient_norms: Array
    gammas: Array


def _widen(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, compute_dtype(x)), tree)


def decreases_enough(value, new_value, norm, new_norm, gamma):
    """f(x) - f(x⁺) ≥ ‖∇f(x⁺)‖² / 8λ, λ = ‖∇f(x)‖ / γ; False where anything is NaN."""
    ratio = new_norm / jnp.where(norm > 0, norm, 1)
    return value - new_value >= gamma * ratio * new_norm / 8


def _objective(fun, unravel):
    """The function of the raveled point, checked to be scalar."""

    def objective(flat):
        value = fun(unravel(flat))
        check_shape((), **{"the value of fun": value})
        check_floating(**{"the value of fun": value})
        return value.astype(flat.dtype)

    return objective


def gradient_regularized_newton(
    fun: Callable[[Any], Array],
    x0: Any,
    hessian_fn: HessianFn | None = None,
    *,
    gamma0: ArrayLike = 1.0,
    adaptive: bool = True,
    metric: ArrayLike | None = None,
    max_iterations: int = 100,
    gradient_tolerance: ArrayLike = 1e-8,
    target_value: ArrayLike | None = None,
    gamma_min: ArrayLike = 1e-9,
    max_search: int = 40,
) -> NewtonResult:
    r"""Minimises a function by Newton steps that the gradient's norm regularises.

        x⁺ = x - (H(x) + λ B)⁻¹ g,     g = ∇f(x),  λ = ‖g‖_* / γ,  ‖g‖_*² = g · B⁻¹ g

    so that ‖x⁺ - x‖_B ≤ γ where H is positive semidefinite. The step is taken, and γ doubled for
    the next, if

        f(x) - f(x⁺) ≥ ‖∇f(x⁺)‖_*² / 8λ

    and otherwise γ is halved. A matrix H + λ B that has no Cholesky factor, and a trial value that
    is not finite, count as failures too. H may be inexact: the search adapts to its error and to
    the smoothness of f alike, whatever the problem's class.

    Args:
      fun: f, from a tree like x0 to a scalar.
      x0: where to start, a tree of arrays with d coordinates in all; computed in at least float32.
      hessian_fn: x → H(x), symmetric: `jax.hessian(fun)`, an array [d, d] in the order of
        `jax.flatten_util.ravel_pytree`, or `HessianFactors` of n vectors. For n < d the factors
        cost O(n² d) and memory O(n d), never a matrix [d, d]; n = 1 is the Sherman-Morrison
        formula. Default None, H = 0: normalised gradient descent with the same search.
      gamma0: γ above 0 for the first trial. Default 1, as are the other defaults the authors'.
      adaptive: False keeps γ = gamma0 and takes every step that is finite.
      metric: B, symmetric and positive definite, [d, d]. Default: the identity.
      max_iterations: at least 1, the most steps.
      gradient_tolerance: at least 0; the method stops where ‖g‖_* is no larger. Default 1e-8, for
        float64; float32 cannot see a decrease below about 1e-7 |f| and stops there by itself.
      target_value: stop where f(x) is no larger, say the known minimum plus a tolerance. Default:
        no target.
      gamma_min: at least 0; after a step γ is at least this. Default 1e-9.
      max_search: at least 1, the trials of one search. If none succeeds, the method stops.

    Returns:
      a `NewtonResult`: the point, whether it converged, and the history.

    Raises:
      ValueError: a number out of its range, `metric` of another shape or not positive definite,
        `fun` not scalar, a result of `hessian_fn` that does not fit.
      TypeError: `fun` or `hessian_fn` is not callable, or the value is not floating point.

    Use it for deterministic problems of up to some thousand variables, or more with few factors,
    in float64 where accuracy matters; it is a `jax.lax.while_loop` and may be jitted, vmapped and
    sharded. `fisher_newton` is the step for mini-batches of larger models.

    Cost: a Hessian a step, and for each trial a gradient and a factorization, O(d³); with n < d
    factors O(n² d) a step.

    Example:
      >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
      >>> result = gradient_regularized_newton(
      ...     rosenbrock, jnp.array([-1.2, 1.0]), jax.hessian(rosenbrock), gradient_tolerance=1e-3)
      >>> print(result.x.round(3), result.converged)
      [1. 1.] True

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", 2025, arXiv:2506.13710.
    """
    if not callable(fun):
        raise TypeError(f"fun must be a function, got {fun!r}")
    if hessian_fn is not None and not callable(hessian_fn):
        raise TypeError(f"hessian_fn must be a function or None, got {hessian_fn!r}")
    check_interval(0, jnp.inf, closed="right", gamma0=gamma0)
    check_interval(0, jnp.inf, gradient_tolerance=gradient_tolerance, gamma_min=gamma_min)
    check_interval(1, jnp.inf, max_iterations=max_iterations, max_search=max_search)

    start, unravel = ravel_pytree(_widen(x0))
    dtype, size = start.dtype, start.size
    # A metric B = L Lᵀ is the change of variables y = Lᵀ x: from here on the norm is Euclidean.
    from_y = to_dual = lambda y: y
    if metric is not None:
        root = _metric_root(metric, size, dtype)
        from_y = partial(solve_triangular, root, trans=1, lower=True)
        to_dual = partial(solve_triangular, root, lower=True)
        start = root.T @ start
    value_and_grad = jax.value_and_grad(lambda y: _objective(fun, unravel)(from_y(y)))

    def hessian_at(y):
        if hessian_fn is None:
            return None
        x = unravel(from_y(y))
        hessian = flatten_hessian(hessian_fn(x), x, size)
        if isinstance(hessian, HessianFactors):
            return HessianFactors(to_dual(hessian.factors.T).T)
        return to_dual(to_dual(hessian).T)

    def search(at):
        norm, unit = l2.value(at.gradient), l2.subgradient(at.gradient)
        direction = regularized_inverse(hessian_at(at.y), unit)

        def attempt(last):
            new = at.y - last.gamma * direction(norm / last.gamma)
            value, gradient = value_and_grad(new)
            if adaptive:
                accepted = decreases_enough(at.value, value, norm, l2.value(gradient), last.gamma)
                gamma = jnp.where(accepted, last.gamma, last.gamma / 2)
            else:
                accepted, gamma = jnp.isfinite(value), last.gamma
            return _Trial(gamma, last.trials + 1, accepted, new, value, gradient)

        return jax.lax.while_loop(
            lambda last: ~last.accepted & (last.trials < (max_search if adaptive else 1)),
            attempt,
            _Trial(at.gamma, jnp.zeros((), jnp.int32), jnp.array(False), *at[:3]),
        )

    def iterate(at):
        found = search(at)

        def keep(new: ArrayLike, old: ArrayLike) -> Array:
            return jnp.where(found.accepted, new, old)

        value, gradient = keep(found.value, at.value), keep(found.gradient, at.gradient)
        gamma = jnp.clip(2 * found.gamma, gamma_min, jnp.finfo(dtype).max)
        k, after = at.iterations, at.iterations + found.accepted
        return _Progress(
            y=keep(found.y, at.y),
            value=value,
            gradient=gradient,
            gamma=gamma if adaptive else at.gamma,
            moved=found.accepted,
            iterations=after,
            evaluations=at.evaluations + found.trials,
            values=at.values.at[after].set(value),
            gradient_norms=at.gradient_norms.at[after].set(l2.value(gradient)),
            gammas=at.gammas.at[k].set(keep(found.gamma, jnp.nan)),
        )

    def reached(at):
        small = l2.value(at.gradient) <= gradient_tolerance
        return small if target_value is None else small | (at.value <= target_value)

    def unfinished(at):
        finite = jnp.isfinite(at.value) & jnp.isfinite(l2.value(at.gradient))
        return finite & at.moved & ~reached(at) & (at.iterations < max_iterations)

    value, gradient = value_and_grad(start)
    history = jnp.full(max_iterations + 1, jnp.nan, dtype)
    begin = _Progress(
        y=start,
        value=value,
        gradient=gradient,
        gamma=jnp.asarray(gamma0, dtype),
        moved=jnp.array(True),
        iterations=jnp.zeros((), jnp.int32),
        evaluations=jnp.ones((), jnp.int32),
        values=history.at[0].set(value),
        gradient_norms=history.at[0].set(l2.value(gradient)),
        gammas=history[1:],
    )
    end = jax.lax.while_loop(unfinished, iterate, begin)
    return NewtonResult(
        x=unravel(from_y(end.y)),
        iterations=end.iterations,
        evaluations=end.evaluations,
        converged=reached(end),
        values=end.values,
        gradient_norms=end.gradient_norms,
        gammas=end.gammas,
    )


def _metric_root(metric, size, dtype):
    """The lower Cholesky factor of the metric."""
    check_shape((size, size), metric=metric)
    metric = jnp.asarray(metric, dtype)
    root = jnp.linalg.cholesky(metric)
    if not isinstance(root, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(root))):
        raise ValueError("metric must be positive definite, it has no Cholesky factor")
    return root


def gradient_normalized_smoothness(
    fun: Callable[[Any], Array],
    x: Any,
    hessian_fn: HessianFn | None = None,
    *,
    key: Array,
    num_directions: int = 64,
    max_radius: float = 1e6,
) -> Array:
    r"""Estimates the radius in which a Hessian approximation predicts the gradient well.

        γ(x) = max { r : ‖∇f(x + h) - ∇f(x) - H h‖ ≤ ‖∇f(x)‖ ‖h‖ / r  for all ‖h‖ ≤ r }

    the gradient-normalized smoothness: the step of `gradient_regularized_newton` with γ ≤ γ(x)
    makes good progress. As an infimum it is

        γ(x) = inf_h max(‖h‖, ‖∇f(x)‖ ‖h‖ / ‖∇f(x + h) - ∇f(x) - H h‖)

    which is taken over random directions, and along each over the radii of a bisection for the
    place where the error is as large as the gradient. So the estimate is an upper bound.

    Args:
      fun: f, from a tree like x to a scalar.
      x: the point, a tree of arrays; computed in at least float32, float64 recommended.
      hessian_fn: x → H, as in `gradient_regularized_newton`. Default None, H = 0.
      key: of the random directions.
      num_directions: at least 1, random directions; both signs of each are tried. Default 64.
      max_radius: above 1 and finite; radii from 1 / max_radius to max_radius are looked at.
        Default 1e6.

    Returns:
      a scalar; inf where the error stays below the gradient up to `max_radius`, as it does for a
      quadratic function with its own Hessian, and 0 where the gradient vanishes but the error does
      not.

    Raises:
      ValueError: a number out of its range, `fun` not scalar, an unfitting `hessian_fn`.
      TypeError: the value of `fun` is not floating point.

    Use it to compare Hessian approximations at a point: multiplying f and H by a number leaves it
    alone, and it is at least √(2 ‖∇f‖ / L) where the exact Hessian has the Lipschitz constant L.

    Cost: 46 gradients for each direction in float32, 104 in float64; the arrays of all directions
    at once.

    Example:
      >>> cube = lambda x: x**3
      >>> second = lambda x: jnp.full((1, 1), 6 * x)
      >>> print(gradient_normalized_smoothness(
      ...     cube, jnp.array(1.0), second, key=jax.random.key(0)).round(3))
      1.0

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", 2025, arXiv:2506.13710.
    """
    check_interval(1, jnp.inf, num_directions=num_directions)
    check_interval(1, jnp.inf, closed="right", max_radius=max_radius)
    flat, unravel = ravel_pytree(_widen(x))
    grad = jax.grad(_objective(fun, unravel))
    gradient = grad(flat)
    norm = l2.value(gradient)
    hessian = None
    if hessian_fn is not None:
        hessian = flatten_hessian(hessian_fn(unravel(flat)), unravel(flat), flat.size)

    def product(h):
        if hessian is None:
            return jnp.zeros_like(h)
        if isinstance(hessian, HessianFactors):
            rows = hessian.factors
            return tensordot(tensordot(rows, h, 1), rows, 1)
        return tensordot(hessian, h, 1)

    def smallest_bound(direction):
        curvature = product(direction)

        def bisect(carry, _):
            low, high, best = carry
            radius = jnp.exp2((low + high) / 2)
            h = radius * direction
            error = l2.value(grad(flat + h) - gradient - radius * curvature)
            outside = ~(error <= norm)  # so is a point without finite gradient
            bound = jnp.where(error > 0, radius * jnp.maximum(1, norm / error), jnp.inf)
            middle = (low + high) / 2
            low, high = jnp.where(outside, low, middle), jnp.where(outside, middle, high)
            return (low, high, jnp.minimum(best, jnp.where(jnp.isnan(error), radius, bound))), None

        reach = jnp.log2(jnp.asarray(max_radius, flat.dtype))
        start = -reach, reach, jnp.array(jnp.inf, flat.dtype)
        (_, high, best), _ = jax.lax.scan(bisect, start, length=jnp.finfo(flat.dtype).nmant)
        best = jnp.where(norm > 0, best, 0)
        return jnp.where(high < reach, best, jnp.inf)  # never outside: no radius is too large

    directions = jax.random.normal(key, (num_directions, flat.size), flat.dtype)
    directions = jax.vmap(l2.subgradient)(directions)
    return jnp.min(jax.vmap(smallest_bound)(jnp.concatenate([directions, -directions])))
