"""Prompts for in-context learning: examples of a function, and a query."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape


class InContextPrompts(NamedTuple):
    """Examples of a function each, and the query whose target is to be predicted.

    Attributes:
      x: inputs of the examples `[..., num_examples, dimension]`.
      y: their targets `[..., num_examples]`.
      x_query: input of the query `[..., dimension]`.
      y_query: its target `[...]`, with noise as the others.
      weights: the weights of the function `[..., dimension]`.

    Reference: Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
    In-Context Learner with One Layer of Linear Self-Attention", 2023, arXiv:2307.03576.
    """

    x: Array
    y: Array
    x_query: Array
    y_query: Array
    weights: Array

    @property
    def tokens(self) -> Array:
        """`[..., num_examples + 1, dimension + 1]`: (x_i, y_i), and last the query (x_q, 0)."""
        inputs = jnp.concatenate([self.x, self.x_query[..., None, :]], axis=-2)
        targets = jnp.concatenate([self.y, jnp.zeros_like(self.y[..., :1])], axis=-1)
        return jnp.concatenate([inputs, targets[..., None]], axis=-1)


def linear_regression_prompts(
    key: Array,
    batch: int,
    num_examples: int,
    dimension: int,
    *,
    noise_variance: ArrayLike = 0.0,
    covariance: ArrayLike | None = None,
    nonlinearity: Callable[[Array], Array] | None = None,
) -> InContextPrompts:
    r"""Random regression problems, one per prompt.

        x_i ~ N(0, Σ),   w ~ N(0, Σ⁻¹),   y_i = f(w · x_i) + ε_i,   ε_i ~ N(0, σ²)

    for the n examples and the query. The signal w · x has variance d, whatever Σ is.

    Args:
      key: a random key.
      batch: the number of prompts.
      num_examples: n, at least 1.
      dimension: d, at least 1.
      noise_variance: σ², at least 0. Default 0.
      covariance: Σ `[d, d]`, symmetric and positive definite. Default: the identity.
      nonlinearity: f, elementwise. With the identity as Σ, its law is the same in all directions.
        Default: none, linear regression.

    Returns:
      `InContextPrompts` in float32, with `batch` as leading axis.

    Raises:
      ValueError: a size below 1, a negative `noise_variance`, or a Σ of another shape or not
        positive definite.
      TypeError: Σ is not floating point.

    Use it to train and to measure in-context learners, such as `jaxref.attention`'s
    `linear_self_attention`; the mean square error to `y_query` is at least σ².

    Cost: batch · (n + 1) · d normal numbers; with Σ a Cholesky factor, O(d³), and batch · (n + 1) ·
    d² multiplications.

    Example:
      >>> prompts = linear_regression_prompts(jax.random.key(0), 2, 5, 3)
      >>> prompts.x.shape, prompts.y.shape, prompts.tokens.shape
      ((2, 5, 3), (2, 5), (2, 6, 4))
      >>> bool(jnp.allclose(prompts.y_query, jnp.sum(prompts.weights * prompts.x_query, -1)))
      True

    Reference: Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
    In-Context Learner with One Layer of Linear Self-Attention", 2023, arXiv:2307.03576.
    """
    check_interval(1, jnp.inf, batch=batch, num_examples=num_examples, dimension=dimension)
    check_interval(0, jnp.inf, noise_variance=noise_variance)
    x_key, weights_key, noise_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (batch, num_examples + 1, dimension))
    weights = jax.random.normal(weights_key, (batch, dimension))
    if covariance is not None:  # with Σ = L Lᵀ, L z has covariance Σ and L⁻ᵀ z has Σ⁻¹
        check_floating(covariance=covariance)
        check_shape((dimension, dimension), covariance=covariance)
        if not isinstance(covariance, jax.core.Tracer):
            concrete = np.asarray(covariance, np.float64)
            if not np.allclose(concrete, concrete.T) or np.linalg.eigvalsh(concrete)[0] <= 0:
                raise ValueError(
                    f"covariance must be symmetric and positive definite, got {covariance}"
                )
        root = jnp.linalg.cholesky(jnp.asarray(covariance, x.dtype))
        x = x @ root.T
        weights = solve_triangular(root, weights.T, trans="T", lower=True).T
    signal = jnp.einsum("bnd,bd->bn", x, weights)
    if nonlinearity is not None:
        signal = nonlinearity(signal)
    noise = jax.random.normal(noise_key, signal.shape)
    y = signal + jnp.sqrt(noise_variance) * noise
    return InContextPrompts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1], weights)
