"""How alike two representations of the same inputs are."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_floating, check_shape
from jaxref.core.numerics import compute_dtype


def angular_distance(hidden_a: ArrayLike, hidden_b: ArrayLike, *, axis: int = -1) -> Array:
    r"""The angle between two hidden states as a share of π.

        d(a, b) = arccos(a · b / (‖a‖ ‖b‖)) / π = (2/π) atan2(‖â - b̂‖, ‖â + b̂‖)

    with â and b̂ of unit length; the second form, which is computed, has no cancellation near 0.

    Args:
      hidden_a: a, `[..., features]` floating point, the features at `axis`.
      hidden_b: b, of the same shape.
      axis: the axis of the features.

    Returns:
      d in [0, 1] for each token, `[...]` in at least float32: 0 for the same direction, 0.5 for
      orthogonal ones and wherever a vector is 0, 1 for opposite ones. At 0, 0.5 for a zero vector
      and 1 the gradient is 0.

    Raises:
      ValueError: shapes that differ, or an `axis` out of range.
      TypeError: an array that is not floating point.

    Use it on the stream before and after a block, averaged over tokens: near 0 the block does next
    to nothing, as late blocks of pre-norm models do. It ignores length, which the norm in front of
    the next block removes.

    Cost: a few passes over both states, linear in their size.

    Example:
      >>> print(angular_distance(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])).round(3))
      0.25

    Reference: Sun et al., "The Curse of Depth in Large Language Models", 2025, arXiv:2502.05795.
    """
    check_floating(hidden_a=hidden_a, hidden_b=hidden_b)
    check_shape(jnp.shape(hidden_a), hidden_b=hidden_b)
    (axis,) = canonical_axes(axis, jnp.ndim(hidden_a))
    dtype = compute_dtype(hidden_a, hidden_b)
    (a, a_exists), (b, b_exists) = (
        _unit(jnp.asarray(hidden, dtype), axis) for hidden in (hidden_a, hidden_b)
    )
    apart, together = _norm(a - b, axis), _norm(a + b, axis)
    exist = a_exists & b_exists
    angle = 2 * jnp.arctan2(jnp.where(exist, apart, 1.0), jnp.where(exist, together, 1.0))
    return jnp.squeeze(angle, axis) / jnp.pi


def _unit(x: Array, axis: int) -> tuple[Array, Array]:
    """x / ‖x‖, 0 for a zero vector, and whether it is none."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
    exists = size > 0
    x = x / jnp.where(exists, size, 1.0)  # so that squares neither overflow nor vanish
    return x / jnp.where(exists, _norm(x, axis), 1.0), exists


def _norm(x: Array, axis: int) -> Array:
    """‖x‖, with gradient 0 at 0."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
