"""Dependence of two discrete variables, exactly: as information and as a distance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy import sparse
from scipy.optimize import linprog

from jaxref.core.numerics import compute_dtype


class WassersteinDependency(NamedTuple):
    """What `exact_wasserstein_dependency` found.

    Attributes:
      value: the distance, in the unit of the costs.
      critic: float64 `[n, m]`, a best critic: a function of pairs that is 1-Lipschitz and whose
        mean over the joint distribution exceeds that over the product by `value`.

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780.
    """

    value: float
    critic: np.ndarray


def mutual_information(joint: ArrayLike) -> Array:
    r"""The mutual information of two discrete variables.

        I = Σ_ij p_ij log(p_ij / (p_i q_j)),   p_i = Σ_j p_ij, q_j = Σ_i p_ij

    Args:
      joint: p `[n, m]`, probabilities of the pairs, of sum 1.

    Returns:
      I of at least 0 in nats, in at least float32; 0 · log 0 counts as 0.

    Raises:
      ValueError: a matrix of another shape or, where its values are concrete, with negative entries
        or a sum other than 1.

    Use it beside `exact_wasserstein_dependency` to see what each of the two measures grows with.

    Cost: one pass over the n m pairs.

    Example:
      >>> print(mutual_information(jnp.eye(4) / 4).round(4))  # log 4
      1.3863

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780.
    """
    p = jnp.asarray(joint).astype(compute_dtype(joint))
    _check_joint(joint)
    product = jnp.sum(p, axis=1, keepdims=True) * jnp.sum(p, axis=0, keepdims=True)
    exists = p > 0
    ratio = jnp.where(exists, p, 1.0) / jnp.where(exists, product, 1.0)
    return jnp.maximum(jnp.sum(p * jnp.log(ratio)), 0.0)


def exact_wasserstein_dependency(
    joint: ArrayLike, x_cost: ArrayLike, y_cost: ArrayLike
) -> WassersteinDependency:
    r"""The Wasserstein distance of a joint distribution from the product of its marginals.

        I_W = min over plans t of Σ t(ij, i'j') (c_ii' + d_jj')
            = max over 1-Lipschitz f of Σ_ij (p_ij - p_i q_j) f_ij

    where t moves the joint distribution p to the product p_i q_j. It is 0 for independent
    variables only, and at most the largest cost, however much information the variables share.

    Args:
      joint: p `[n, m]`, probabilities of the pairs, of sum 1.
      x_cost: c `[n, n]`, the distances of the values of the first variable.
      y_cost: d `[m, m]`, those of the second.

    Returns:
      A `WassersteinDependency`: the value and a critic that attains it.

    Raises:
      ValueError: shapes that do not match, negative entries or costs, a sum other than 1, or
        distances from a value to itself other than 0.
      RuntimeError: the linear program was not solved.

    Use it to measure bounds such as `jaxref.losses.wasserstein_dependency_bound` by, for n m of up
    to a hundred or so. The distances should be symmetric and satisfy the triangle inequality; else
    the critic is Lipschitz with respect to shortest paths.

    Cost: a linear program of (n m)² variables and 2 n m - 1 constraints, on the host.

    Example:
      >>> apart = 1 - jnp.eye(2)
      >>> print(exact_wasserstein_dependency(jnp.eye(2) / 2, apart, apart).value)
      0.5

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780.
    """
    _check_joint(joint)
    p = np.asarray(joint, np.float64)
    p = p / p.sum()
    n, m = p.shape
    costs = []
    for name, cost, size in (("x_cost", x_cost, n), ("y_cost", y_cost, m)):
        cost = np.asarray(cost, np.float64)
        if cost.shape != (size, size):
            raise ValueError(f"{name} must have shape {(size, size)}, got {cost.shape}")
        if not np.all(np.isfinite(cost) & (cost >= 0)) or np.any(np.diag(cost) != 0):
            raise ValueError(f"{name} must be at least 0, and 0 on its diagonal")
        costs.append(cost)
    total = costs[0][:, None, :, None] + costs[1][None, :, None, :]
    product = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    ones, identity = sparse.csr_array(np.ones((1, n * m))), sparse.eye_array(n * m)
    # one of the constraints follows from the others
    leaves = sparse.kron(identity, ones, format="csr")
    arrives = sparse.kron(ones, identity, format="csr")[:-1]
    solution = linprog(
        total.ravel(),
        A_eq=sparse.vstack([leaves, arrives]),
        b_eq=np.concatenate([p.ravel(), product.ravel()[:-1]]),
        method="highs",
    )
    if not solution.success:
        raise RuntimeError(f"the linear program was not solved: {solution.message}")
    # the potential at the goals, made 1-Lipschitz everywhere
    at_goals = np.append(solution.eqlin.marginals[n * m :], 0.0)
    critic = np.min(total.reshape(n * m, n * m) - at_goals, axis=1).reshape(n, m)
    return WassersteinDependency(float(solution.fun), critic)


def _check_joint(joint: ArrayLike) -> None:
    if jnp.ndim(joint) != 2:
        raise ValueError(f"joint must have shape [n, m], got {jnp.shape(joint)}")
    if isinstance(joint, jax.core.Tracer):
        return
    p = np.asarray(joint, np.float64)
    if not np.all(p >= 0) or abs(p.sum() - 1) > 1e-3:
        raise ValueError(f"joint must be at least 0 and of sum 1, got the sum {p.sum():.4g}")
