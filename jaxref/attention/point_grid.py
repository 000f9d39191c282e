"""Attention from the cells of a grid to the points that fall in them, and the way back."""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def grid_cells(positions: ArrayLike, resolution: int) -> tuple[Array, Array]:
    """The cell that each point falls in, and its place there.

        g = floor(x R), at most R - 1,   offset = x - g / R,   x clipped to [0, 1]

    Args:
      positions: `[..., dim]` floating point.
      resolution: R at least 1, the cells along each axis.

    Returns:
      The cells as indices into a grid that is flattened, `[...]`, its first axis that of the first
      coordinate; and the offsets `[..., dim]` in [0, 1 / R], in at least float32.

    >>> cells, offsets = grid_cells(jnp.array([[0.75, 0.125]]), 2)
    >>> print(cells, offsets)
    [2] [[0.25  0.125]]
    """
    check_floating(positions=positions)
    check_interval(1, jnp.inf, resolution=resolution)
    x = jnp.clip(jnp.asarray(positions, compute_dtype(positions)), 0.0, 1.0)
    cells = jnp.minimum(jnp.floor(x * resolution), resolution - 1)
    index = jnp.moveaxis(cells.astype(jnp.int32), -1, 0)
    flat = jnp.ravel_multi_index(tuple(index), (resolution,) * x.shape[-1], mode="clip")
    return flat, x - cells / resolution


def scatter_softmax(logits: ArrayLike, segment_ids: ArrayLike, num_segments: int) -> Array:
    r"""Softmax over the rows that share a segment, for each channel by itself.

        w_i = exp(a_i - m_s) / Σ_{j in s} exp(a_j - m_s),   m_s = max_{j in s} a_j

    with s the segment of row i. The weights of a segment with rows add up to 1.

    Args:
      logits: a `[rows, ...]` floating point.
      segment_ids: integers `[rows]`, in any order. A row whose id is outside [0, num_segments) is
        in no segment, which is the way to leave out padding.
      num_segments: at least 1.

    Returns:
      w of the shape and type of `logits`, computed in at least float32; 0 for a row that is in no
      segment.

    Raises:
      ValueError: a scalar for `logits`, ids that are not one for each row, or `num_segments` below
        1.
      TypeError: `logits` are not floating point, or `segment_ids` not integers.

    Use it in place of a masked softmax where sets of different sizes lie one after the other;
    `point_grid_attention` forms the weighted sums too.

    Cost: O(rows) a channel, however the rows are spread: two reductions over segments and two
    look-ups.

    Example:
      >>> print(scatter_softmax(jnp.array([0.0, 5.0, 0.0]), jnp.array([1, 0, 1]), 3))
      [0.5 1.  0.5]

    Reference: Li, Gao, Liu, Liu, Gu, "GridFormer: Point-Grid Transformer for Surface
    Reconstruction", 2024, arXiv:2401.02292.
    """
    check_floating(logits=logits)
    check_interval(1, jnp.inf, num_segments=num_segments)
    logits, segment_ids = jnp.asarray(logits), jnp.asarray(segment_ids)
    if logits.ndim == 0:
        raise ValueError("logits must have shape [rows, ...], got a scalar")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype.name}")
    check_shape(logits.shape[:1], segment_ids=segment_ids)

    def of_rows(segments: Array, outside: float) -> Array:
        return segments.at[segment_ids].get(
            mode="fill", fill_value=outside, wrap_negative_indices=False
        )

    wide = logits.astype(compute_dtype(logits))
    largest = jax.ops.segment_max(jax.lax.stop_gradient(wide), segment_ids, num_segments)
    weights = jnp.exp(wide - of_rows(largest, jnp.inf))
    total = jax.ops.segment_sum(weights, segment_ids, num_segments)
    return (weights / of_rows(total, 1.0)).astype(logits.dtype)


def point_grid_attention(
    point_keys: ArrayLike,
    point_values: ArrayLike,
    grid_queries: ArrayLike,
    positions: ArrayLike,
    weight_fn: Callable[[Array], Array],
    *,
    resolution: int,
    share_groups: int = 8,
) -> Array:
    r"""Attention of each cell of a grid to the points that fall in it (point-grid attention).

    With x_i the positions and g(i) = floor(x_i R) the cell of point i,

        a_i = weight_fn(k_i - q_g(i)),   w = softmax of a over the points of the same cell
        F_g = Σ_{i in g} w_i ⊗ v_i

    The logits are vectors: a channel has a softmax of its own, and its weight is shared by the
    channels that lie the same place in the `share_groups` parts of v. No point is compared with
    another.

    Args:
      point_keys: k `[batch, points, features]` floating point; in the paper the sum of a linear map
        of a point's features and the encoding e_i of its place in the cell.
      point_values: v `[batch, points, features]`; in the paper with the same e_i added.
      grid_queries: q `[batch, R, ..., R, features]`, an axis for each coordinate in their order.
      positions: `[batch, points, dim]`; dim is 2 for a plane, 3 for a volume. Coordinates outside
        [0, 1) count as those of the cell at the border.
      weight_fn: from differences `[batch, points, features]` to logits
        `[batch, points, features / share_groups]`; in the paper a linear map, a norm and a ReLU.
      resolution: R at least 1.
      share_groups: a divisor of `features`. Default 8, the paper's.

    Returns:
      F `[batch, R, ..., R, features]` in the type of `point_values`, softmax and sums in at least
      float32. A cell with one point is its value, one without points 0. The order of the points
      does not matter.

    Raises:
      ValueError: shapes that do not match, `resolution` or `share_groups` below 1, or
        `share_groups` that do not divide the features.
      TypeError: an array that is not floating point.

    Use it to put the features of a point cloud on a grid for convolutions, where a mean or a
    maximum over a cell loses what differs in it; `grid_to_points` is the way back, and
    `jaxref.nn.PointGridBlock` both with their maps.

    Cost: O((n + R^dim) · features) for n points, and `weight_fn` of each point; no pairs of points.

    Example:
      >>> values = jnp.array([[[1.0], [3.0], [7.0]]])
      >>> positions = jnp.array([[[0.1], [0.2], [0.9]]])
      >>> grid = point_grid_attention(
      ...     0 * values, values, jnp.zeros((1, 3, 1)), positions, jax.nn.relu, resolution=3,
      ...     share_groups=1,
      ... )
      >>> print(grid.ravel())
      [2. 0. 7.]

    Reference: Li, Gao, Liu, Liu, Gu, "GridFormer: Point-Grid Transformer for Surface
    Reconstruction", 2024, arXiv:2401.02292.
    """
    check_floating(
        point_keys=point_keys,
        point_values=point_values,
        grid_queries=grid_queries,
        positions=positions,
    )
    keys, values, queries = map(jnp.asarray, (point_keys, point_values, grid_queries))
    if keys.ndim != 3:
        raise ValueError(f"point_keys must have shape [batch, points, features], got {keys.shape}")
    batch, points, features = keys.shape
    dim = jnp.shape(positions)[-1] if jnp.ndim(positions) == 3 else 0
    if dim == 0 or jnp.shape(positions)[:2] != (batch, points):
        raise ValueError(
            f"positions must have shape [{batch}, {points}, dim], got {jnp.shape(positions)}"
        )
    check_interval(1, jnp.inf, resolution=resolution, share_groups=share_groups)
    if features % share_groups:
        raise ValueError(f"share_groups must divide {features} features, got {share_groups}")
    check_shape(keys.shape, point_values=values)
    grid_shape = (batch, *(resolution,) * dim, features)
    check_shape(grid_shape, grid_queries=queries)

    cells, _ = grid_cells(positions, resolution)
    num_cells = resolution**dim
    of_points = jnp.take_along_axis(
        queries.reshape(batch, num_cells, features), cells[..., None], axis=1
    )
    logits = weight_fn(keys - of_points)
    channels = features // share_groups
    check_shape((batch, points, channels), **{"what weight_fn returns": logits})
    wide = logits.astype(compute_dtype(logits, values))
    weights = jax.vmap(partial(scatter_softmax, num_segments=num_cells))(wide, cells)
    parts = values.reshape(batch, points, share_groups, channels)
    weighted = (weights[..., None, :] * parts).reshape(keys.shape)
    grid = jax.vmap(partial(jax.ops.segment_sum, num_segments=num_cells))(weighted, cells)
    return grid.reshape(grid_shape).astype(values.dtype)


def grid_to_points(grid: ArrayLike, positions: ArrayLike) -> Array:
    r"""Features of a grid at points between its nodes, by (bi-, tri-) linear interpolation.

    With R_d nodes along axis d, the first at 0 and the last at 1,

        y_i = Σ_j F_j Π_d max(0, 1 - |x_id (R_d - 1) - j_d|),   x clipped to [0, 1]

    Args:
      grid: F `[batch, R_1, ..., R_dim, features]` floating point, an axis for each coordinate in
        their order.
      positions: x `[batch, points, dim]` floating point; beyond the border a point reads the
        border.

    Returns:
      y `[batch, points, features]` in the type of `grid`, computed in at least float32. Linear in
      `grid`; its gradient with respect to `positions` is one-sided at the nodes.

    Raises:
      ValueError: shapes that do not match, or an axis without nodes.
      TypeError: an array that is not floating point.

    Use it to read features at points; nodes at the corners of [0, 1]^dim are what PyTorch's
    `grid_sample` has with `align_corners=True` and the border as padding, and what the paper's
    release reads with, though its cells of `point_grid_attention` are R equal parts.

    Cost: 2^dim look-ups of the features of a node for each point.

    Example:
      >>> grid = jnp.array([0.0, 1.0, 5.0]).reshape(1, 3, 1)
      >>> print(grid_to_points(grid, jnp.array([[[0.25], [0.5], [2.0]]])).ravel())
      [0.5 1.  5. ]

    Reference: Li, Gao, Liu, Liu, Gu, "GridFormer: Point-Grid Transformer for Surface
    Reconstruction", 2024, arXiv:2401.02292.
    """
    check_floating(grid=grid, positions=positions)
    grid, positions = jnp.asarray(grid), jnp.asarray(positions)
    if grid.ndim < 3 or 0 in grid.shape[1:-1]:
        raise ValueError(f"grid must have shape [batch, R_1, ..., features], got {grid.shape}")
    batch, *resolution, features = grid.shape
    dim = len(resolution)
    if positions.ndim != 3 or (positions.shape[0], positions.shape[2]) != (batch, dim):
        raise ValueError(
            f"positions must have shape [{batch}, points, {dim}], got {positions.shape}"
        )
    last = np.array(resolution) - 1
    places = jnp.clip(positions.astype(compute_dtype(positions)), 0.0, 1.0) * last
    lower = jnp.minimum(jnp.floor(places), np.maximum(last - 1, 0)).astype(jnp.int32)
    beyond = places - lower
    rows = grid.reshape(batch, -1, features)
    y = jnp.zeros((), compute_dtype(grid, positions))
    for corner in itertools.product((0, 1), repeat=dim):
        node = jnp.moveaxis(lower + np.array(corner), -1, 0)
        index = jnp.ravel_multi_index(tuple(node), resolution, mode="clip")
        share = jnp.where(np.array(corner) == 1, beyond, 1 - beyond)
        weight = jnp.prod(share, axis=-1, keepdims=True)
        y = y + weight * jnp.take_along_axis(rows, index[..., None], axis=1)
    return y.astype(grid.dtype)
