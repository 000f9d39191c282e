"""Lengths of vectors and distances between them, with gradients where they are 0."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_shape
from jaxref.core.numerics import compute_dtype


def unit_vectors(x: Array) -> Array:
    """The vectors at the last axis of `x` at length 1; those of length 0 stay, with gradient 0."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0))
    is_zero = largest == 0
    scaled = x / jnp.where(is_zero, 1.0, largest)  # whose square neither over- nor underflows
    square = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    return scaled * jnp.where(is_zero, 0.0, lax.rsqrt(jnp.where(is_zero, 1.0, square)))


def unit_rows(features: ArrayLike) -> Array:
    """The rows of `features` `[examples, features]` at length 1, in at least float32."""
    check_floating(features=features)
    x = jnp.asarray(features)
    if x.ndim != 2:
        raise ValueError(f"features must have shape [examples, features], got {x.shape}")
    return unit_vectors(x.astype(compute_dtype(x)))


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


def embedding_pair(*, normalize: bool = True, **embeddings: ArrayLike) -> tuple[Array, Array]:
    """Two `[batch, features]` that belong together, in at least float32, at length 1 if wanted.

    Args:
      normalize: whether to bring the vectors to length 1.
      **embeddings: the two, by the names of the arguments.

    Raises:
      ValueError: shapes that do not match.
      TypeError: embeddings that are not floating point.

    >>> print(*embedding_pair(view_a=jnp.array([[3.0, 0.0]]), view_b=jnp.array([[0.0, 2.0]])))
    [[1. 0.]] [[0. 1.]]
    """
    check_floating(**embeddings)
    first, second = embeddings.values()
    if jnp.ndim(first) != 2:
        name = next(iter(embeddings))
        raise ValueError(f"{name} must have shape [batch, features], got {jnp.shape(first)}")
    check_shape(jnp.shape(first), **embeddings)
    dtype = compute_dtype(first, second)
    x, y = (jnp.asarray(vectors).astype(dtype) for vectors in (first, second))
    return (unit_vectors(x), unit_vectors(y)) if normalize else (x, y)
