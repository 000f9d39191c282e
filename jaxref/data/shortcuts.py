"""Data with a shortcut: a simple feature that predicts the labels, beside one worth learning."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.core.checks import check_interval


def two_moons_shortcut(
    num_samples: int, *, key: Array, margin: float = 0.1, noise: float = 0.1
) -> tuple[Array, Array]:
    r"""Two moons, folded so that one coordinate tells the classes apart by a margin.

    Points (a, b) on two interleaving half circles, with normal noise, b of mean 0 after each class
    is moved by 0.3 away from the other, and t = 2y - 1 the sign of the class, become

        x = (-t (|b| + margin), a - 1/2)

    For margin > 0 the first coordinate alone separates the classes, by 2 · margin at least; both
    together do so by more, along a curve.

    Args:
      num_samples: at least 2; half of them, rounded down, are of class 1.
      key: a key from `jax.random`.
      margin: half the gap between the classes; a negative one makes them overlap. Default 0.1, the
        paper's, which also has -0.1.
      noise: the standard deviation, at least 0. Default 0.1, the authors'.

    Returns:
      x `[num_samples, 2]` float32 and y `[num_samples]` int32, in random order.

    Raises:
      ValueError: an argument out of its range.

    Use it to see whether a loss learns past the shortcut: the accuracy after the first coordinate
    is shuffled, or a look at the boundary, tells. `jaxref.losses.spectral_decoupling_loss` is meant
    to.

    Cost: O(num_samples).

    Example:
      >>> x, y = two_moons_shortcut(100, key=jax.random.key(0))
      >>> print(jnp.mean((x[:, 0] < 0) == y))
      1.0

    Reference: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks",
    2020, arXiv:2011.09468.
    """
    check_interval(2, jnp.inf, num_samples=num_samples)
    check_interval(-jnp.inf, jnp.inf, margin=margin)
    check_interval(0, jnp.inf, noise=noise)
    order_key, noise_key = jax.random.split(key)
    index = jax.random.permutation(order_key, num_samples)
    y = index % 2
    place = (
        index // 2 / jnp.maximum(jnp.where(y == 1, num_samples // 2, (num_samples + 1) // 2) - 1, 1)
    )
    angle = jnp.pi * place
    outer = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    inner = jnp.array([1.0, 0.5]) - outer
    points = jnp.where(y[:, None] == 1, inner, outer)
    points += noise * jax.random.normal(noise_key, points.shape)
    t = 2 * y - 1
    height = points[:, 1] - 0.3 * t
    height -= height.mean()
    x = jnp.stack([-t * (jnp.abs(height) + margin), points[:, 0] - 0.5], axis=-1)
    return x, y
