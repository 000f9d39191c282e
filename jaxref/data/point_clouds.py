"""Points in space with an occupancy: which of them to train on."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype

_BLOCK = 256  # points whose distances to all points are in memory at a time


def boundary_mask(
    points: ArrayLike,
    occupancy: ArrayLike,
    *,
    radius: float = 0.08,
    neighbors: int = 100,
) -> Array:
    r"""Which points lie at the boundary of what is occupied (boundary sampling).

        kept_i = some j with o_j ≠ o_i, |x_i - x_j| < radius, among the nearest `neighbors` of i

    The nearest opposite point decides: it is nearer than `radius`, and fewer than `neighbors`
    points are nearer than it, of which i itself is one.

    Args:
      points: x `[points, dim]` floating point.
      occupancy: o `[points]`, boolean, or integers of two values.
      radius: above 0, in the unit of `points`. Default 0.08, the paper's for shapes of size 1.
      neighbors: at least 1, and a point is among its own; of those at the same distance, opposite
        ones count first. Default 100, the paper's.

    Returns:
      Boolean `[points]`; all False where the occupancy is the same everywhere.

    Raises:
      ValueError: shapes that do not match, a `radius` that is not positive, or `neighbors` below 1.
      TypeError: `points` are not floating point, or `occupancy` is.

    Use it once on the points of a shape, to train a second stage on those that it keeps, with
    `jaxref.losses.margin_binary_cross_entropy`. `jax.vmap` takes several shapes.

    Cost: O(points² · dim) time, for all pairs; distances of 256 points to all others in memory at a
    time.

    Example:
      >>> points = jnp.array([[0.0], [0.05], [0.1], [0.5]])
      >>> print(boundary_mask(points, jnp.array([True, True, False, False])))
      [False  True  True False]

    Reference: Li, Gao, Liu, Liu, Gu, "GridFormer: Point-Grid Transformer for Surface
    Reconstruction", 2024, arXiv:2401.02292.
    """
    check_floating(points=points)
    check_interval(0, jnp.inf, closed="neither", radius=radius)
    check_interval(1, jnp.inf, neighbors=neighbors)
    points, occupancy = jnp.asarray(points), jnp.asarray(occupancy)
    if points.ndim != 2:
        raise ValueError(f"points must have shape [points, dim], got {points.shape}")
    if jnp.issubdtype(occupancy.dtype, jnp.inexact):
        raise TypeError(f"occupancy must be boolean or integers, got {occupancy.dtype.name}")
    check_shape(points.shape[:1], occupancy=occupancy)
    wide = points.astype(compute_dtype(points))

    def kept(point_and_occupancy: tuple[Array, Array]) -> Array:
        point, own = point_and_occupancy
        distances = jnp.sum(jnp.square(wide - point), axis=-1)
        nearest = jnp.min(distances, where=occupancy != own, initial=jnp.inf)
        nearer = jnp.count_nonzero(distances < nearest)
        return (nearest < jnp.square(radius)) & (nearer < neighbors)

    return jax.lax.map(kept, (wide, occupancy), batch_size=_BLOCK)
