"""Lengths of vectors and distances between them, with gradients where they are 0."""

import jax.numpy as jnp
from jax import Array, lax


def unit_vectors(x: Array) -> Array:
    """The vectors at the last axis of `x` at length 1; those of length 0 stay, with gradient 0."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0))
    is_zero = largest == 0
    scaled = x / jnp.where(is_zero, 1.0, largest)  # whose square neither over- nor underflows
    square = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    return scaled * jnp.where(is_zero, 0.0, lax.rsqrt(jnp.where(is_zero, 1.0, square)))


def squared_distances(x: Array, y: Array) -> Array:
    """||x_i - y_j||² `[..., n, m]` of `x` `[..., n, features]` and `y` `[..., m, features]`.

    From ||x||² + ||y||² - 2 x·y, at least 0: memory for n m numbers, not n m features, at the price
    of an error of some float32 roundings of ||x||² + ||y||².
    """
    lengths = jnp.sum(jnp.square(x), axis=-1)[..., :, None]
    lengths = lengths + jnp.sum(jnp.square(y), axis=-1)[..., None, :]
    products = jnp.einsum("...nf,...mf->...nm", x, y, precision=lax.Precision.HIGHEST)
    return jnp.maximum(lengths - 2 * products, 0.0)


def safe_sqrt(x: Array) -> Array:
    """√x, with gradient 0 where x is 0: distances from their squares."""
    is_zero = x == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, x)))
