"""Gradient starvation: which features a network responds to, and how one holds another back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def tangent_features(
    apply_fn: Callable[[Any, Array], Array], params: Any, inputs: ArrayLike
) -> Array:
    r"""The gradient of a network's output with respect to all its weights, for each input.

        Φ_ij = ∂ f(w, x_i) / ∂ w_j

    In the kernel regime f stays linear in the weights, and Φ is its matrix of features.

    Args:
      apply_fn: from the weights and a batch `[1, ...]` of inputs to one output: the logit of a
        binary classifier.
      params: w, a tree of p floating-point numbers in all.
      inputs: x `[n, ...]`; up to a few thousand, since Φ is dense.

    Returns:
      Φ `[n, p]`, the weights in the order of the leaves of the tree.

    Raises:
      ValueError: an `apply_fn` with more than one output for one input.

    Use it at initialisation, and hand it to `feature_response`.

    Cost: a forward and a backward pass for each of the n inputs, all at once, and n p numbers in
    memory.

    Example:
      >>> apply_fn = lambda w, x: x @ w["kernel"] + w["bias"]
      >>> params = {"bias": jnp.array(0.0), "kernel": jnp.array([1.0, -1.0])}
      >>> print(tangent_features(apply_fn, params, jnp.array([[2.0, 3.0]])))
      [[1. 2. 3.]]

    Reference: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks",
    2020, arXiv:2011.09468.
    """
    flat, unravel = ravel_pytree(params)

    def output(flat: Array, x: Array) -> Array:
        y = apply_fn(unravel(flat), x[None])
        if y.size != 1:
            raise ValueError(f"apply_fn must give one output for one input, got shape {y.shape}")
        return y.reshape(())

    return jax.vmap(jax.grad(output), (None, 0))(flat, jnp.asarray(inputs))


class FeatureResponse(NamedTuple):
    """The features of a data set, and what a network made of them, by `feature_response`.

    Attributes:
      directions: U `[n, r]`: each column a feature, by its size at every example.
      strengths: S `[r]`, decreasing.
      responses: z `[..., r]`, how far the outputs go along each feature.

    Reference: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks",
    2020, arXiv:2011.09468.
    """

    directions: Array
    strengths: Array
    responses: Array


def feature_response(features: ArrayLike, labels: ArrayLike, outputs: ArrayLike) -> FeatureResponse:
    r"""A network's outputs in terms of the features that its tangent kernel sees.

    With the labels as signs t = 2y - 1 and the singular value decomposition diag(t) Φ = U S Vᵀ,

        z = Uᵀ diag(t) f

    is the response of the outputs f to each feature, of strength S. Singular vectors have their
    sign such that the entries of each column of U have a sum of at least 0.

    Args:
      features: Φ `[n, p]` floating point, from `tangent_features`.
      labels: y `[n]`, each 0 or 1.
      outputs: f `[..., n]` floating point, such as the logits after each step of a training
        `[steps, n]`.

    Returns:
      A `FeatureResponse` with r = min(n, p) features, in at least float32.

    Raises:
      ValueError: shapes that do not match.
      TypeError: features or outputs that are not floating point.

    Use it to see weak features being left behind; `starved_response` computes where they end up.

    Cost: a singular value decomposition of `[n, p]`, O(n p min(n, p)), and O(n r) for each row of
    outputs.

    Example:
      >>> features, labels = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1, 1])
      >>> print(feature_response(features, labels, jnp.array([3.0, 0.5])).responses)
      [3.  0.5]

    Reference: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks",
    2020, arXiv:2011.09468.
    """
    check_floating(features=features, outputs=outputs)
    phi, f = jnp.asarray(features), jnp.asarray(outputs)
    if phi.ndim != 2:
        raise ValueError(f"features must have shape [examples, weights], got {phi.shape}")
    check_shape(phi.shape[:1], labels=labels)
    check_shape((*f.shape[:-1], phi.shape[0]), outputs=f)
    dtype = compute_dtype(phi, f)
    signs = 2 * jnp.asarray(labels).astype(dtype) - 1
    u, strengths, _ = jnp.linalg.svd(signs[:, None] * phi.astype(dtype), full_matrices=False)
    u *= jnp.where(u.sum(axis=0) < 0, -1.0, 1.0)
    return FeatureResponse(u, strengths, (signs * f.astype(dtype)) @ u)


def starved_response(
    directions: ArrayLike,
    strengths: ArrayLike,
    *,
    weight_decay: float = 0.0,
    coefficient: float = 0.0,
) -> np.ndarray:
    r"""How far a linear model responds to each feature when training has converged.

    With features U of strengths S, the margins u = U S w and the response z = Uᵀ u, at the w that
    makes least

        Σ_i log(1 + exp(-u_i)) + (d/2) ‖w‖² + c ‖u‖²,   d = weight_decay, c = coefficient

    With weight decay alone, features that share examples compete: making one stronger lowers the
    response to others, ∂z_j / ∂(S_i²) < 0. With spectral decoupling alone and all of S positive,
    each u_i solves sigmoid(-u_i) = 2c u_i, whatever S is.

    Args:
      directions: U `[n, r]` with orthonormal columns, of a `FeatureResponse` or of your own.
      strengths: S `[r]`, each at least 0.
      weight_decay: d at least 0.
      coefficient: c at least 0, as in `jaxref.losses.spectral_decoupling_loss`.

    Returns:
      z `[r]`, in float64 on the host.

    Raises:
      ValueError: shapes that do not match, a negative number, neither kind of penalty (without any
        the margins of separable data have no end), or directions that are not orthonormal.

    Use it to predict starvation from `feature_response`; that one measures it.

    Cost: a few Newton steps on the host, each O(n r² + r³); no training.

    Example:
      >>> directions = [[0.8, -0.6], [0.6, 0.8]]
      >>> for strength in (2.0, 6.0):
      ...     print(starved_response(directions, [strength, 2.0], weight_decay=0.01).round(2))
      [6.27 0.9 ]
      [9.01 0.62]

    Reference: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks",
    2020, arXiv:2011.09468.
    """
    check_interval(0, np.inf, weight_decay=weight_decay, coefficient=coefficient)
    u, s = np.asarray(directions, np.float64), np.asarray(strengths, np.float64)
    check_interval(0, np.inf, strengths=s)
    if u.ndim != 2 or not np.allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-4):
        raise ValueError(f"directions must be a matrix of orthonormal columns, got shape {u.shape}")
    check_shape(u.shape[1:], strengths=s)
    if weight_decay == coefficient == 0:
        raise ValueError("weight_decay and coefficient must not both be 0")
    to_margins = u * s

    def loss(w: np.ndarray) -> float:
        margins = to_margins @ w
        penalty = weight_decay / 2 * w @ w + coefficient * margins @ margins
        return np.logaddexp(0, -margins).sum() + penalty

    def gradient(w: np.ndarray) -> np.ndarray:
        margins = to_margins @ w
        return to_margins.T @ (2 * coefficient * margins - expit(-margins)) + weight_decay * w

    def hessian(w: np.ndarray) -> np.ndarray:
        p = expit(to_margins @ w)
        curvature = to_margins.T * (p * (1 - p) + 2 * coefficient)
        return curvature @ to_margins + weight_decay * np.eye(s.size)

    start = np.zeros(s.size)
    found = minimize(
        loss, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-10}
    )
    return s * found.x
