"""A layer between the features of a point cloud and those of planes or a volume."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.attention import grid_to_points, point_grid_attention
from jaxref.attention.point_grid import grid_cells
from jaxref.core.checks import check_interval, check_shape
from jaxref.nn.conv import Conv
from jaxref.nn.linear import Linear
from jaxref.nn.normalization import Norm
from jaxref.norms import batch_norm


class PointGridBlock(nnx.Module):
    """Points write on grids by attention, and read what convolutions make of it (GridFormer).

    With features c_i of points at x_i, and features F of each grid,

        k_i = W_k c_i,   v_i = MLP(c_i),   q = W_q F,   e_i = MLP(x_i - floor(x_i R) / R)
        A = point-grid attention of q to k_i + e_i and v_i + e_i, by a = ReLU(norm(W_a ·))
        F' = ReLU(conv(A)) + conv(F),   c'_i = v_i + Σ_grids F'(x_i)

    The grids share all parameters. W_q is a convolution of size 1, the other two have size 3.

    Args:
      in_features: size of the points' features.
      out_features: size of the grids' features, and of what comes out: a multiple of
        `share_groups`.
      grids: the coordinates along the axes of each grid. Default: the three planes xy, xz and yz;
        `((0, 1, 2),)` is one volume, `((0, 1),)` one plane.
      share_groups: of `jaxref.attention.point_grid_attention`. Default 8.
      norm: of the attention's logits, one of `jaxref.norms` over channels. Default `batch_norm`, as
        in the release, over the points of the batch; `layer_norm` needs no statistics.
      position_norm: the same inside of the encoding of the place in a cell. Default `batch_norm`;
        over the few numbers of a place, `layer_norm` leaves little but their order.
      dtype: type to compute in; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      key: W_k.
      value: the three linear maps of the value MLP, of sizes C, 2 C and C, ReLU between them.
      position: linear map, norm, and after a ReLU the linear map to C, of e.
      query: W_q.
      weight, weight_norm: W_a and its norm.
      update, residual: the convolutions of A and of F.

    Raises:
      ValueError: `out_features` that `share_groups` do not divide, or grids of different numbers of
        axes or none; when called, shapes that do not match, or a grid that is not of the same size
        along all its axes.

    Use it at each level of a U-Net on the grids, c and F handed from one to the next; the attention
    alone is `jaxref.attention.point_grid_attention`.

    Cost: (2 · 3^dim + 1) · C² multiplications a cell of each grid and about 2 · (in_features +
    2 · C) · C a point, for C = out_features; as many parameters as both together.

    Example:
      >>> block = PointGridBlock(3, 16, grids=((0, 1),), rngs=nnx.Rngs(0))
      >>> features, (plane,) = block(
      ...     jnp.ones((2, 9, 3)), [jnp.ones((2, 4, 4, 16))], jnp.full((2, 9, 3), 0.5)
      ... )
      >>> features.shape, plane.shape
      ((2, 9, 16), (2, 4, 4, 16))

    Reference: Li, Gao, Liu, Liu, Gu, "GridFormer: Point-Grid Transformer for Surface
    Reconstruction", 2024, arXiv:2401.02292.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        grids: Sequence[tuple[int, ...]] = ((0, 1), (0, 2), (1, 2)),
        share_groups: int = 8,
        norm: Callable[..., Any] = batch_norm,
        position_norm: Callable[..., Any] = batch_norm,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, share_groups=share_groups)
        if out_features % share_groups:
            raise ValueError(
                f"out_features must be a multiple of share_groups = {share_groups}, "
                f"got {out_features}"
            )
        if len({len(axes) for axes in grids}) != 1 or () in grids:
            raise ValueError(f"grids must have the same number of axes each, got {grids}")
        self.out_features, self.share_groups = out_features, share_groups
        self.grids = tuple(map(tuple, grids))
        dim, weights = len(self.grids[0]), out_features // share_groups

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(
                inputs,
                outputs,
                axes=(None, None),
                use_bias=True,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        def conv(size: int) -> Conv:
            return Conv(
                out_features,
                out_features,
                (size,) * dim,
                use_bias=True,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.key = linear(in_features, out_features)
        self.value = nnx.List(
            [
                linear(in_features, out_features),
                linear(out_features, 2 * out_features),
                linear(2 * out_features, out_features),
            ]
        )
        self.position = nnx.List(
            [
                linear(dim, dim),
                Norm(position_norm, dim, param_dtype=param_dtype),
                linear(dim, out_features),
            ]
        )
        self.query = conv(1)
        self.weight = linear(out_features, weights)
        self.weight_norm = Norm(norm, weights, param_dtype=param_dtype)
        self.update, self.residual = conv(3), conv(3)

    def __call__(
        self, features: Array, grids: Sequence[Array], positions: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Takes and gives features of the points and of the grids.

        Args:
          features: c `[batch, points, in_features]`.
          grids: F of each grid, `[batch, R, ..., R, out_features]`.
          positions: x `[batch, points, coordinates]` in [0, 1), outside of it clipped.

        Returns:
          c' `[batch, points, out_features]`, and F' of each grid in the shape of F.
        """
        if len(grids) != len(self.grids):
            raise ValueError(f"grids must be {len(self.grids)} arrays, got {len(grids)}")
        coordinates = max(map(max, self.grids)) + 1
        if positions.ndim != 3 or positions.shape[-1] < coordinates:
            raise ValueError(
                f"positions must have shape [batch, points, at least {coordinates} coordinates], "
                f"got {positions.shape}"
            )
        keys, values = self.key(features), self._values(features)
        new_features, new_grids = values, []
        for i, (axes, grid) in enumerate(zip(self.grids, grids)):
            size = grid.shape[1:2] * len(axes)
            check_shape((len(features), *size, self.out_features), **{f"grids[{i}]": grid})
            places = positions[..., list(axes)]
            encoding = self._encoding(grid_cells(places, size[0])[1])
            attended = point_grid_attention(
                keys + encoding,
                values + encoding,
                self.query(grid),
                places,
                self._logits,
                resolution=size[0],
                share_groups=self.share_groups,
            )
            new_grid = jax.nn.relu(self.update(attended)) + self.residual(grid)
            new_features = new_features + grid_to_points(new_grid, places)
            new_grids.append(new_grid)
        return new_features, tuple(new_grids)

    def _values(self, features: Array) -> Array:
        into, between, out = self.value
        return out(jax.nn.relu(between(jax.nn.relu(into(features)))))

    def _encoding(self, offsets: Array) -> Array:
        into, norm, out = self.position
        return out(jax.nn.relu(norm(into(offsets))))

    def _logits(self, relation: Array) -> Array:
        return jax.nn.relu(self.weight_norm(self.weight(relation)))
