"""A layer that solves for the weights of its basis functions, so that an equation holds."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.decision import SolveInfo, levenberg_marquardt

Terms = Any


def hard_constraint_solve(
    basis: Terms,
    residual_fn: Callable[[Terms], Any],
    w0: ArrayLike | None = None,
    *,
    ridge: float = 1e-4,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> tuple[Array, SolveInfo]:
    r"""The combination of basis functions that satisfies an equation best.

    With functions b_1 ... b_m that a network proposes, and u = Σ_k w_k b_k,

        w* = argmin_w ‖r(u, u_t, u_x, ...)‖² + ‖ridge · w‖²

    for residuals r of the equation and of its initial and boundary conditions. Derivatives of u are
    linear in w as u is, so those of the b_k are computed once, before. The gradient comes from the
    implicit function theorem at w*, where `g(w, θ) = ½ ∂(...)/∂w = 0`:

        dw*/dθ = -(∂g/∂w)⁻¹ ∂g/∂θ

    one linear system of size m, whatever the number of steps.

    Args:
      basis: arrays `[..., m]` in a dictionary or another pytree: the functions and their
        derivatives, each where its residuals are taken; at a sample of a large mesh.
      residual_fn: from the same pytree, each array `[...]` combined by w, to residuals: an array
        or several in a pytree. What else it needs of traced arrays it may close over.
      w0: `[m]`, where to start. Default: ones.
      ridge: above 0, and small. Default 1e-4.
      tolerance, max_steps: of `jaxref.decision.levenberg_marquardt`.

    Returns:
      w* `[m]`, differentiable with respect to all that enters but `w0`, and the `SolveInfo`.
      Computed in at least float32; float64 under `jax.enable_x64` for stiff problems. Where it did
      not converge, w is the best that was found and its gradient only as good as that.

    Raises:
      ValueError: no arrays in `basis`, arrays that disagree on m, or a number that is out of range.
      TypeError: an array that is not floating point.

    Use it as the last layer of a network for a differential equation: what it emits obeys the
    equation as well as its basis can, also at inputs that training has not seen.

    Cost: O(n · m²) a step for n residuals, whose Jacobian `[n, m]` is in memory; for the gradient m
    Hessian products and a system of size m, O(m³).

    Example:
      >>> x = jnp.linspace(0.0, 1.0, 9)
      >>> basis = {"u_x": jnp.stack([jnp.ones(9), 2 * x], -1), "u": jnp.stack([x, x**2], -1)}
      >>> w, info = hard_constraint_solve(basis, lambda at: at["u_x"] - 3.0)  # u' = 3
      >>> [round(abs(float(weight)), 2) for weight in w]
      [3.0, 0.0]

    Reference: Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
    mixture-of-experts", 2024, arXiv:2402.13412.
    """
    size = _check_basis(basis=basis)
    check_interval(0, jnp.inf, closed="neither", ridge=ridge)
    dtype = compute_dtype(*jax.tree.leaves(basis))
    start = jnp.ones(size, dtype) if w0 is None else jnp.asarray(w0, dtype)
    check_shape((size,), w0=start)

    def residuals(w: Array) -> Array:
        values = residual_fn(jax.tree.map(lambda b: jnp.asarray(b, dtype) @ w, basis))
        parts = [jnp.ravel(r) for r in jax.tree.leaves(values)]
        return jnp.concatenate([*parts, ridge * w]).astype(dtype)

    def slope(w: Array) -> Array:
        return jax.grad(lambda w: 0.5 * jnp.sum(jnp.square(residuals(w))))(w)

    def solve(_: Callable[[Array], Array], w: Array) -> tuple[Array, tuple[Array, ...]]:
        w, info = levenberg_marquardt(residuals, w, tolerance=tolerance, max_steps=max_steps)
        return w, tuple(x.astype(dtype) for x in info)  # custom_root has no tangents of integers

    def solve_linear(linear: Callable[[Array], Array], y: Array) -> Array:
        return jnp.linalg.solve(jax.jacobian(linear)(jnp.zeros_like(y)), y)

    w, (steps, converged, cost) = jax.lax.custom_root(
        slope, jax.lax.stop_gradient(start), solve, solve_linear, has_aux=True
    )
    return w, SolveInfo(steps.astype(jnp.int32), converged > 0, cost)


def partition_domain(array: ArrayLike, num_experts: tuple[int, ...]) -> Array:
    r"""Cuts the mesh of an array into equal blocks, one for each expert.

    Args:
      array: `[n_1, ..., n_d, ...]`, the mesh on its leading axes.
      num_experts: `(k_1, ..., k_d)`: pieces of each axis, divisors of their sizes.

    Returns:
      `[K, n_1 / k_1, ..., n_d / k_d, ...]`, K = k_1 ... k_d, the last axis' pieces following each
      other.

    Raises:
      ValueError: more pieces than axes, or pieces that do not divide an axis.

    Use it for what `hard_constraint_mixture_of_experts` is to split in a way of its own;
    `merge_domain` undoes it.

    Cost: a copy of the array.

    Example:
      >>> partition_domain(jnp.arange(12).reshape(2, 6), (1, 3)).tolist()
      [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]

    Reference: Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
    mixture-of-experts", 2024, arXiv:2402.13412.
    """
    array = jnp.asarray(array)
    check_interval(1, jnp.inf, num_experts=jnp.asarray(num_experts))
    dims = len(num_experts)
    if dims > array.ndim or any(n % k for n, k in zip(array.shape, num_experts)):
        raise ValueError(
            f"num_experts must divide the leading axes of shape {array.shape}, got {num_experts}"
        )
    cut = [size for n, k in zip(array.shape, num_experts) for size in (k, n // k)]
    blocks = array.reshape(*cut, *array.shape[dims:])
    blocks = jnp.moveaxis(blocks, range(0, 2 * dims, 2), range(dims))
    return blocks.reshape(math.prod(num_experts), *blocks.shape[dims:])


def merge_domain(blocks: ArrayLike, num_experts: tuple[int, ...]) -> Array:
    r"""Puts the blocks of `partition_domain` back in their places.

    Args:
      blocks: `[K, b_1, ..., b_d, ...]`.
      num_experts: `(k_1, ..., k_d)` with the product K.

    Returns:
      `[k_1 b_1, ..., k_d b_d, ...]`.

    Raises:
      ValueError: blocks that are not K, or have fewer axes than there are pieces for.

    Use it to put together what experts gave for the blocks of `partition_domain`;
    `hard_constraint_mixture_of_experts` does so with u.

    Cost: a copy of the array.

    Example:
      >>> blocks = partition_domain(jnp.arange(12).reshape(2, 6), (1, 3))
      >>> merge_domain(blocks, (1, 3)).tolist()
      [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]

    Reference: Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
    mixture-of-experts", 2024, arXiv:2402.13412.
    """
    blocks, dims = jnp.asarray(blocks), len(num_experts)
    if blocks.shape[:1] != (math.prod(num_experts),) or blocks.ndim <= dims:
        raise ValueError(
            f"blocks must have shape [{math.prod(num_experts)}, {dims} mesh axes, ...], "
            f"got {blocks.shape}"
        )
    apart = blocks.reshape(*num_experts, *blocks.shape[1:])
    apart = jnp.moveaxis(apart, range(dims), range(0, 2 * dims, 2))
    mesh = [k * b for k, b in zip(num_experts, blocks.shape[1:])]
    return apart.reshape(*mesh, *blocks.shape[1 + dims :])


def hard_constraint_mixture_of_experts(
    basis: ArrayLike,
    residual_terms: Terms,
    residual_fn: Callable[[Terms, Terms, Any], Any],
    num_experts: tuple[int, ...],
    *,
    shared_terms: Terms = None,
    data: Any = None,
    w0: ArrayLike | None = None,
    ridge: float = 1e-4,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> tuple[Array, Array, SolveInfo]:
    r"""Hard constraints on a divided domain: an expert solves for each block with its own weights.

        w_e* = argmin_w ‖r(terms of block e, shared terms)‖² + ‖ridge · w‖²,   u = Σ_k w_e,k b_k

    on the block of expert e. Each has a problem of its own in the forward pass, and a linear system
    of its own in the backward pass; their axis can be split over devices.

    Args:
      basis: `[n_1, ..., n_d, m]`, the functions on the mesh.
      residual_terms: arrays `[n_1, ..., n_d, m]` in a pytree, the functions and their derivatives
        on the mesh; they are split.
      residual_fn: `residual_fn(terms, shared_terms, data) -> residuals` of one expert: the first
        two combined by its weights, `[n_1 / k_1, ...]` and `[...]`.
      num_experts: `(k_1, ..., k_d)`, pieces of each axis of the mesh.
      shared_terms: arrays `[..., m]` in a pytree that every expert sees whole, such as the
        functions at the boundaries. Default: none.
      data: arrays `[n_1, ..., n_d, ...]` in a pytree, split as the mesh and handed on as they are,
        such as a forcing. Default: none.
      w0, ridge, tolerance, max_steps: as for `hard_constraint_solve`.

    Returns:
      u `[n_1, ..., n_d]`, the weights `[K, m]` and the `SolveInfo` with an entry for each expert.
      Train the network that proposes the basis on the residuals, or the errors, of u.

    Raises:
      ValueError: pieces that do not divide the mesh, or what `hard_constraint_solve` raises.
      TypeError: an array that is not floating point.

    Use it where one set of weights cannot satisfy the equation everywhere, or one solve over the
    whole mesh takes too long; with one expert it is `hard_constraint_solve`.

    Cost: K solves on a K-th of the mesh each, with as many steps as the slowest takes; the
    Jacobians of all are in memory together.

    Example:
      >>> x = jnp.linspace(0.0, 1.0, 8)[:, None]
      >>> target = jnp.where(x[:, 0] < 0.5, 1.0, -2.0)
      >>> u, w, info = hard_constraint_mixture_of_experts(
      ...     jnp.ones((8, 1)), jnp.ones((8, 1)), lambda u, shared, f: u - f, (2,), data=target
      ... )
      >>> print(w.ravel().round(3))
      [ 1. -2.]

    Reference: Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
    mixture-of-experts", 2024, arXiv:2402.13412.
    """
    _check_basis(basis=basis, residual_terms=residual_terms)

    def cut(tree: Any) -> Any:
        return jax.tree.map(lambda a: partition_domain(a, num_experts), tree)

    def expert(terms: Terms, data: Any) -> tuple[Array, SolveInfo]:
        return hard_constraint_solve(
            (terms, shared_terms),
            lambda at: residual_fn(at[0], at[1], data),
            w0,
            ridge=ridge,
            tolerance=tolerance,
            max_steps=max_steps,
        )

    weights, info = jax.vmap(expert)(cut(residual_terms), cut(data))
    u = jax.vmap(lambda b, w: b.astype(w.dtype) @ w)(cut(basis), weights)
    return merge_domain(u, num_experts), weights, info


def diffusion_sorption_residual(
    u: ArrayLike,
    u_t: ArrayLike,
    u_xx: ArrayLike,
    *,
    diffusion: float = 5e-4,
    porosity: float = 0.29,
    bulk_density: float = 2880.0,
    freundlich_constant: float = 3.5e-4,
    freundlich_exponent: float = 0.874,
) -> Array:
    r"""By how much the equation of diffusion with sorption in a porous medium does not hold.

        r = u_t - D / R(u) · u_xx,   R(u) = 1 + (1 - φ) / φ · ρ k n_f (u + 1e-6)^(n_f - 1)

    with the retardation R of the Freundlich isotherm; concentrations below 0 count as 0 in it.

    Args:
      u, u_t, u_xx: floating point of one shape: the concentration, its derivative in time, and its
        second derivative in space.
      diffusion: D in m²/day, at least 0. Defaults are those of PDEBench and the paper.
      porosity: φ in (0, 1).
      bulk_density: ρ in kg/m³, at least 0.
      freundlich_constant: k, at least 0.
      freundlich_exponent: n_f above 0.

    Returns:
      r of that shape.

    Raises:
      ValueError: shapes that differ, or a constant out of its range.
      TypeError: an array that is not floating point.

    Use it as the `residual_fn` of a hard constraint, with the conditions at start and boundary
    beside it.

    Cost: elementwise, with one power for each entry.

    Example:
      >>> print(diffusion_sorption_residual(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0])))
      [-0.000158]

    Reference: Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
    mixture-of-experts", 2024, arXiv:2402.13412; the equation from Takamoto et al., "PDEBench: An
    Extensive Benchmark for Scientific Machine Learning", 2022, arXiv:2210.07182.
    """
    check_floating(u=u, u_t=u_t, u_xx=u_xx)
    check_shape(jnp.shape(u), u_t=u_t, u_xx=u_xx)
    check_interval(0, 1, closed="neither", porosity=porosity)
    check_interval(0, jnp.inf, diffusion=diffusion, bulk_density=bulk_density)
    check_interval(0, jnp.inf, freundlich_constant=freundlich_constant)
    check_interval(0, jnp.inf, closed="neither", freundlich_exponent=freundlich_exponent)
    sorbed = (1 - porosity) / porosity * bulk_density * freundlich_constant * freundlich_exponent
    retardation = 1 + sorbed * (jnp.maximum(u, 0.0) + 1e-6) ** (freundlich_exponent - 1)
    return jnp.asarray(u_t) - diffusion / retardation * u_xx


def _check_basis(**trees: Terms) -> int:
    """The number m of functions; raises unless all arrays have it as their last size."""
    leaves = {
        name + jax.tree_util.keystr(path): leaf
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    check_floating(**leaves)
    sizes = {name: jnp.shape(leaf)[-1:] for name, leaf in leaves.items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        shapes = {name: jnp.shape(leaf) for name, leaf in leaves.items()}
        raise ValueError(f"{', '.join(trees)} must be arrays [..., m] with one m, got {shapes}")
    return next(iter(sizes.values()))[0]
