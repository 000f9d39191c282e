"""Noise that gives the gradient of a large batch the covariance of a small one's."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval


def gradient_noise_weights(key: Array, batch_size: int, variance: ArrayLike) -> Array:
    r"""Random weights of the examples of a batch: multiplicative noise of the gradient.

        ĝ = 1/B Σ_n z_n g_n,     z_n ~ N(1, σ²) independent

    g_n is the gradient of example n. The mean stays the gradient's, since E z = 1, and

        cov ĝ = ((1 + σ²) E[g gᵀ] - E[g] E[g]ᵀ) / B

    for examples drawn independently. Where E[g gᵀ] outweighs E[g] E[g]ᵀ, as it does in deep
    networks, σ² = B/b - 1 gives a batch of B the covariance of a batch of b.

    Args:
      key: a PRNG key, another one for each step.
      batch_size: B at least 1, the examples.
      variance: σ² at least 0, in proportion to B; with 0 every weight is 1.

    Returns:
      z, float32 `[batch_size]`. Weigh the losses of the examples with it before their mean: the
      gradient of that is ĝ, and no gradient of a single example is ever formed. Weights below 0
      occur and belong to it.

    Raises:
      ValueError: a number out of its range.

    Use it where large batches generalise worse than small ones; `large_batch_learning_rate` makes
    up for the covariance of the step by the learning rate, and comes first.

    Cost: B random numbers; the gradient costs what it did.

    Example:
      >>> losses = jnp.array([0.5, 1.0, 2.0, 0.1])
      >>> z = gradient_noise_weights(jax.random.key(0), batch_size=4, variance=4096 / 128 - 1)
      >>> loss = jnp.mean(z * losses)

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization
    gap in large batch training of neural networks", 2017, arXiv:1705.08741.
    """
    check_interval(1, jnp.inf, batch_size=batch_size)
    check_interval(0, jnp.inf, variance=variance)
    return 1 + jnp.sqrt(variance) * jax.random.normal(key, (batch_size,), jnp.float32)
