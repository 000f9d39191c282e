"""The spectrum of a Hessian from its products with vectors, by the Lanczos iteration."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from jaxref.core.checks import check_floating, check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import unit_vectors


class SpectrumResult(NamedTuple):
    """A spectral density, as points with weights.

    Attributes:
      nodes: Ritz values θ `[num_probes, steps]`, ascending for each probe.
      weights: τ `[num_probes, steps]`, at least 0, with sum 1 over all probes.
      ritz_min: the least of all nodes, never below the least eigenvalue.
      ritz_max: the largest of all nodes, never above the largest eigenvalue.
    """

    nodes: Array
    weights: Array
    ritz_min: Array
    ritz_max: Array


def stochastic_lanczos(
    hvp: Callable[[Any], Any],
    params: Any,
    *,
    num_steps: int,
    num_probes: int = 1,
    key: Array,
) -> SpectrumResult:
    r"""The spectral density of a Hessian, from its products with vectors alone.

    From a random unit vector q_1, m steps of

        w = H q_k,  α_k = q_kᵀ w,  w ← w - Σ_{j≤k} (q_jᵀ w) q_j,  β_k = ||w||,  q_{k+1} = w / β_k

    give the tridiagonal matrix T with diagonal α and off-diagonal β, which is H seen from the space
    of q_1, H q_1 ... H^{m-1} q_1. With its eigenvalues θ_i and unit eigenvectors u_i, and the mean
    over probes,

        tr f(H) / P ≈ Σ_i τ_i f(θ_i),   τ_i = (first entry of u_i)²

    for any f: without bias in the probes for the polynomials up to degree 2m - 1. The extreme
    nodes approach the extreme eigenvalues first.

    Args:
      hvp: v ↦ H v, linear, from and to trees like `params`; H symmetric of size P × P. For a loss:
        `lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]`.
      params: tree of floating-point arrays with P entries, at least one; only its shapes and types
        matter. The vectors come to `hvp` in its types.
      num_steps: m, at least 1; no more than P steps are made.
      num_probes: random vectors to start from, at least 1, one after the other. Default 1.
      key: random key of the probes, uniform on the sphere.

    Returns:
      a `SpectrumResult` in at least float32, with steps = min(m, P). Where the space is exhausted
      before (an eigenvalue has several eigenvectors, of which a probe sees one), the nodes that
      remain are α_1, with weight 0.

    Raises:
      ValueError: counts out of range, no parameters, or a result of `hvp` that is not like
        `params`.
      TypeError: parameters that are not floating point.

    Use it for the extreme eigenvalues and the density of a Hessian that is too large to form; for
    some thousand parameters `jnp.linalg.eigvalsh(jax.hessian(loss)(x))` is exact. The basis is made
    orthogonal in full, twice a step: without it, eigenvalues come up again as ghosts.

    Cost: for each probe m products H v, time O(m² P) for the basis and memory m P, one probe at a
    time.

    Example:
      >>> params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
      >>> curvature = {"w": jnp.array([1.0, 2.0, 8.0]), "b": jnp.array(-1.0)}
      >>> hvp = lambda v: jax.tree.map(jnp.multiply, curvature, v)
      >>> spectrum = stochastic_lanczos(hvp, params, num_steps=4, key=jax.random.key(0))
      >>> print(*(f"{x:.2f}" for x in spectrum.nodes[0]))
      -1.00 1.00 2.00 8.00

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", 2020, arXiv:2006.09092; Ghorbani, Krishnan,
    Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", 2019,
    arXiv:1901.10159.
    """
    check_interval(1, jnp.inf, num_steps=num_steps, num_probes=num_probes)
    direction, unravel = random_directions(params)

    def product(v: Array) -> Array:
        image = hvp(unravel(v))
        check_same_tree(params, **{"hvp(v)": image})
        return ravel_pytree(image)[0].astype(v.dtype)

    def one_probe(key: Array) -> tuple[Array, Array]:
        start = direction(key)
        return _gauss_quadrature(*_tridiagonalize(product, start, min(num_steps, start.size)))

    nodes, weights = lax.map(one_probe, jax.random.split(key, num_probes))
    return SpectrumResult(nodes, weights / num_probes, jnp.min(nodes), jnp.max(nodes))


def random_directions(params: Any) -> tuple[Callable[[Array], Array], Callable[[Array], Any]]:
    """Of a key, a flat unit vector of at least float32; and of such a vector, a tree like `params`.

    Raises:
      ValueError: no parameters.
      TypeError: parameters that are not floating point.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        check_floating(**{"params" + jax.tree_util.keystr(path): leaf})
    flat, unravel = ravel_pytree(params)
    if flat.size == 0:
        raise ValueError("params must have at least one entry, got none")

    def direction(key: Array) -> Array:
        return unit_vectors(jax.random.normal(key, flat.shape, compute_dtype(flat)))

    return direction, lambda v: unravel(v.astype(flat.dtype))


def _tridiagonalize(
    product: Callable[[Array], Array], start: Array, steps: int
) -> tuple[Array, Array]:
    """α `[steps]` and β `[steps - 1]`; once the space is exhausted, β is 0 and α is α_1."""
    dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)

    def step(carry, k):
        basis, q, norm = carry
        basis = basis.at[k].set(q)
        w = product(q)
        alpha = dot(q, w)
        for _ in range(2):  # what rounding leaves after the first is gone after the second
            w -= dot(dot(basis, w), basis)
        unit = unit_vectors(w)
        beta = dot(unit, w)
        norm = jnp.maximum(norm, jnp.maximum(jnp.abs(alpha), beta))
        is_left = beta > 32 * jnp.finfo(w.dtype).eps * norm
        next_q, beta = (jnp.where(is_left, x, 0.0) for x in (unit, beta))
        return (basis, next_q, norm), (alpha, beta, jnp.any(q != 0))

    zeros = jnp.zeros((steps, start.size), start.dtype)
    carry = (zeros, start, jnp.zeros((), start.dtype))
    _, (alpha, beta, is_reached) = lax.scan(step, carry, jnp.arange(steps))
    return jnp.where(is_reached, alpha, alpha[0]), beta[:-1]


def _gauss_quadrature(alpha: Array, beta: Array) -> tuple[Array, Array]:
    """The eigenvalues of a tridiagonal matrix and the squared first entries of its eigenvectors."""
    off_diagonal = jnp.diag(beta, 1)
    nodes, vectors = jnp.linalg.eigh(jnp.diag(alpha) + off_diagonal + off_diagonal.T)
    return nodes, jnp.square(vectors[0])
