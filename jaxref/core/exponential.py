"""Exponentials for losses: finite, with finite gradients, for every finite input."""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.numerics import compute_dtype


def linear_tail_exp(x: ArrayLike) -> Array:
    """exp x, continued by its tangent line from 0.7 times the largest exponent of the type on.

    That is from 62 on in float32, where exp x is 1e27. Convex, with a continuous derivative.

    >>> linear_tail_exp(jnp.array([0.0, -1e4]))
    Array([1., 0.], dtype=float32)
    >>> bool(jnp.isfinite(linear_tail_exp(1e4)))
    True
    """
    dtype = compute_dtype(x)
    limit = 0.7 * math.log(float(jnp.finfo(dtype).max))
    x = jnp.asarray(x, dtype)
    body = jnp.minimum(x, limit)
    return jnp.exp(body) * (1 + (x - body))


def relative_expm1(x: ArrayLike) -> Array:
    """(exp x - 1) / x, which is 1 at 0, with the tail of `linear_tail_exp`.

    >>> print(relative_expm1(jnp.array([0.0, 1.0, -1e4])).round(4))
    [1.     1.7183 0.0001]
    """
    x = jnp.asarray(x, compute_dtype(x))
    small = jnp.abs(x) < 1e-4
    away = jnp.where(small, 1.0, x)
    # expm1 where exp does not lose the difference from 1, and the finite exp where expm1 is not
    low = jnp.expm1(jnp.minimum(away, 1.0))
    ratio = jnp.where(away < 1, low, linear_tail_exp(away) - 1) / away
    return jnp.where(small, 1 + x / 2 + jnp.square(x) / 6, ratio)


def log_blend(log_old: Array, log_new: Array, share: ArrayLike) -> Array:
    """log of (1 - share) old + share new, of logarithms that may be -inf.

    >>> print(jnp.exp(log_blend(jnp.log(2.0), jnp.log(6.0), 0.25)).round(4))
    3.0
    """
    return jnp.logaddexp(jnp.log1p(-jnp.float32(share)) + log_old, jnp.log(share) + log_new)
