r"""Approximations of Hessians, and their inverses once λ times the identity is added.

All four here are sums of outer products, kept as the `HessianFactors` that they are made of. Then
only the matrix of the factors' inner products is inverted, as large as there are factors.

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
from jax.scipy.linalg import cho_solve
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers.lion_kappa import l2


class HessianFactors(NamedTuple):
    """A positive semidefinite matrix as the sum of n outer products, H = Σ_i u_i u_iᵀ.

    Attributes:
      factors: the u_i, a tree like the point x whose leaves have a leading axis of length n: what
        `jax.jacobian` returns for a function of x with values [n].
    """

    factors: Any


HessianFn = Callable[[Any], Any]
"""x → H(x): `HessianFactors`, or an array [d, d], or what `jax.hessian` returns."""


def fisher_hessian(losses_fn: Callable[[Any], Array]) -> HessianFn:
    r"""The empirical Fisher matrix of a mean of losses, as a Hessian approximation.

        f(x) = 1/n Σ_i f_i(x),     H(x) = 1/n Σ_i ∇f_i(x) ∇f_i(x)ᵀ

    Args:
      losses_fn: x → the losses f_i of n examples, [n].

    Returns:
      the function x → H(x), as `HessianFactors` with n factors.

    Use it for likelihoods (logistic and softmax regression), of which H is the Fisher matrix where
    the model is right; it takes the gradient of every example and nothing of second order.

    Cost: n passes backward at once, each through all examples; n gradients in memory.

    Example:
      >>> losses = lambda x: x * jnp.array([1.0, 3.0])
      >>> print((fisher_hessian(losses)(jnp.array(0.0)).factors ** 2).round(3))
      [0.5 4.5]

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", 2025, arXiv:2506.13710.
    """

    def hessian(x):
        gradients = _jacobian(losses_fn, x)
        return HessianFactors(jax.tree.map(lambda g: g / jnp.sqrt(len(g)), gradients))

    return hessian


def gauss_newton_hessian(residual_fn: Callable[[Any], Array]) -> HessianFn:
    r"""The Gauss-Newton matrix of half the sum of squares, as a Hessian approximation.

        f(x) = ½ ‖u(x)‖²,     H(x) = J(x)ᵀ J(x),  J = ∂u/∂x

    Args:
      residual_fn: x → u(x), an array with m entries in all.

    Returns:
      the function x → H(x), as `HessianFactors` with m factors.

    Use it for least squares; `power_norm_hessian` is for other powers of the norm.

    Cost: m passes backward through the residuals, at once; m arrays like x in memory.

    Example:
      >>> residual = lambda x: jnp.stack([x - 1, 3 * x])
      >>> print(gauss_newton_hessian(residual)(jnp.array(0.0)).factors)
      [1. 3.]

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", 2025, arXiv:2506.13710.
    """
    return lambda x: HessianFactors(_jacobian(residual_fn, x))


def weighted_gauss_newton_log_sum_exp(
    scores_fn: Callable[[Any], Array], smoothing: ArrayLike = 1.0
) -> HessianFn:
    r"""The Gauss-Newton matrix of log-sum-exp, as a Hessian approximation.

        f(x) = μ log Σ_i exp(s_i(x)/μ),     H(x) = 1/μ Jᵀ diag(softmax(s/μ)) J,  J = ∂s/∂x

    The exact Hessian for affine scores s = A x - b is H - ∇f ∇fᵀ/μ.

    Args:
      scores_fn: x → s(x), an array with m entries in all.
      smoothing: μ above 0; f tends to the largest score for μ → 0. Default 1.

    Returns:
      the function x → H(x), as `HessianFactors` with m factors.

    Raises:
      ValueError: `smoothing` is not positive and finite.

    Use it for smooth maxima; it is positive semidefinite also where the scores are not convex.

    Cost: m passes backward through the scores, at once; m arrays like x in memory.

    Example:
      >>> scores = lambda x: jnp.stack([x, -x])
      >>> factors = weighted_gauss_newton_log_sum_exp(scores)(jnp.array(0.0)).factors
      >>> print((factors**2).round(3))
      [0.5 0.5]

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", 2025, arXiv:2506.13710.
    """
    check_interval(0, jnp.inf, closed="right", smoothing=smoothing)

    def hessian(x):
        scores = jnp.ravel(scores_fn(x))
        roots = jnp.sqrt(jax.nn.softmax(scores / smoothing) / smoothing)
        return HessianFactors(_scale_factors(roots, _jacobian(scores_fn, x)))

    return hessian


def power_norm_hessian(
    residual_fn: Callable[[Any], Array], p: ArrayLike, *, fisher_term_only: bool = False
) -> HessianFn:
    r"""The Gauss-Newton matrix of a power of a norm, as a Hessian approximation.

        f(x) = ‖u(x)‖^p / p
        H(x) = ‖u‖^{p-2} Jᵀ J + (p - 2) ‖u‖^{p-4} (Jᵀ u)(Jᵀ u)ᵀ,  J = ∂u/∂x

    It is exact for an affine u. The second term is (p - 2) / ‖u‖^p times ∇f ∇fᵀ. At u = 0 it is
    JᵀJ for p = 2 and 0 for p > 2.

    Args:
      residual_fn: x → u(x), an array with m entries in all.
      p: at least 2, the power; 2 is `gauss_newton_hessian`.
      fisher_term_only: keep the second term alone, a single factor which needs no Jacobian.

    Returns:
      the function x → H(x), as `HessianFactors` with m + 1 factors, or 1.

    Raises:
      ValueError: `p` is below 2 or not finite.

    Use it for nonlinear equations, of which larger powers weigh the far ones more.

    Cost: m + 1 passes backward, and as many arrays like x in memory; one with `fisher_term_only`.

    Example:
      >>> rank_one = power_norm_hessian(lambda x: x, 4, fisher_term_only=True)
      >>> print(rank_one(jnp.array([3.0, 4.0])).factors.round(3))
      [[4.243 5.657]]

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", 2025, arXiv:2506.13710.
    """
    check_interval(2, jnp.inf, p=p)

    def hessian(x):
        residual, pullback = jax.vjp(lambda x: jnp.ravel(residual_fn(x)), x)
        scale = l2.value(residual) ** ((p - 2) / 2)
        slope = jnp.sqrt(p - 2) * scale * l2.subgradient(residual)
        (rank_one,) = pullback(slope.astype(residual.dtype))
        rank_one = jax.tree.map(lambda u: u[None], rank_one)
        if fisher_term_only:
            return HessianFactors(rank_one)
        rest = jax.tree.map(lambda j: scale * j, _jacobian(residual_fn, x))
        return HessianFactors(jax.tree.map(lambda *u: jnp.concatenate(u), rest, rank_one))

    return hessian


def _jacobian(function, x):
    """A tree like x, with a leading axis for the raveled values of the function."""
    return jax.jacrev(lambda x: jnp.ravel(function(x)))(x)


def _scale_factors(scales, factors):
    """The factors, each multiplied by its number of the vector `scales`."""
    return jax.tree.map(lambda u: scales.reshape(-1, *[1] * (u.ndim - 1)) * u, factors)


tensordot = partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)


def _inner(factors, tree):
    """The products Σ u_i · x over all leaves: [n] for a tree x, [n, n] for factors x."""

    def leaf(u, x):
        axes = list(range(1, u.ndim)), list(range(x.ndim - u.ndim + 1, x.ndim))
        replicated = NamedSharding(jax.typeof(u).sharding.mesh, PartitionSpec())
        dtype = compute_dtype(u, x)
        return tensordot(u, x, axes, preferred_element_type=dtype, out_sharding=replicated)

    return sum(jax.tree.leaves(jax.tree.map(leaf, factors, tree)))


def regularized_inverse(hessian, unit):
    """λ → (I + H/λ)⁻¹ unit, for λ > 0; no longer than `unit` where H is positive semidefinite."""
    if hessian is None:
        return lambda lam: unit
    if not isinstance(hessian, HessianFactors):

        def solve(lam):
            root = jnp.linalg.cholesky(hessian + lam * jnp.eye(len(hessian), dtype=hessian.dtype))
            return lam * cho_solve((root, True), unit)

        return solve
    # (I + U Uᵀ/λ)⁻¹ = I - U (λ + UᵀU)⁻¹ Uᵀ; one decomposition of UᵀU serves every λ. Its
    # eigenvalues are sure to a rounding of the largest, and 1/λ would magnify what is below.
    factors = jax.tree.map(jnp.asarray, hessian.factors)
    eigenvalues, basis = jnp.linalg.eigh(_inner(factors, factors))
    floor = len(eigenvalues) * jnp.finfo(eigenvalues.dtype).eps * jnp.max(eigenvalues)
    coefficients = tensordot(_inner(factors, unit), basis, 1)

    def leave(lam):
        removed = jnp.where(eigenvalues > floor, coefficients / (lam + eigenvalues), 0)
        weights = tensordot(basis, removed, 1)

        def leaf(x, u):
            return x - tensordot(weights, u, 1, out_sharding=jax.typeof(x).sharding)

        return jax.tree.map(leaf, unit, factors)

    return leave


def flatten_hessian(hessian, x, size):
    """The approximation in raveled coordinates: None, [d, d], or factors [n, d] with n < d."""
    if isinstance(hessian, HessianFactors):
        check_factors(x, factors=hessian.factors)
        rows = jax.vmap(lambda u: ravel_pytree(u)[0])(hessian.factors)
        return HessianFactors(rows) if len(rows) < size else tensordot(rows.T, rows, 1)
    dtype = compute_dtype(*jax.tree.leaves(x))
    if getattr(hessian, "shape", None) == (size, size):
        return jnp.asarray(hessian, dtype)
    # A tree like x of trees like x, as from jax.hessian: a block for every pair of leaves.
    tree: Any = jax.tree.structure(x)
    sizes = [jnp.size(leaf) for leaf in jax.tree.leaves(x)]
    try:
        nested = [tree.flatten_up_to(row) for row in tree.flatten_up_to(hessian)]
        blocks = [
            [jnp.reshape(block, (i, j)) for block, j in zip(row, sizes)]
            for row, i in zip(nested, sizes)
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"hessian_fn must return HessianFactors, an array of shape {(size, size)} or what "
            f"jax.hessian returns, got the shapes {jax.tree.map(jnp.shape, hessian)}"
        ) from error
    return jnp.block(blocks).astype(dtype)


def check_factors(x, **factors):
    """Raises ValueError unless the tree is like x, with one leading axis of at least 1 more."""
    for name, tree in factors.items():
        lengths = {jnp.shape(u)[:1] for u in jax.tree.leaves(tree)}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            raise ValueError(
                f"{name} must have one leading axis in common, at least 1 long, got the shapes "
                f"{jax.tree.map(jnp.shape, tree)}"
            )
        one = jax.tree.map(lambda u: jax.ShapeDtypeStruct(jnp.shape(u)[1:], u.dtype), tree)
        check_same_tree(x, **{name: one})
