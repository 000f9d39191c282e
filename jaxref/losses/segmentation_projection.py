"""Projection losses of segmentation: what a maximum intensity projection shows of a volume."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName
from jaxref.losses.segmentation import focal_tversky_loss


def maximum_intensity_projection(
    volume: ArrayLike, *, axis: int, where: ArrayLike | None = None
) -> Array:
    r"""The largest value along an axis: a picture of a volume from one side.

        MIP(V)(x, y) = max_z V(x, y, z)

    The gradient goes to the voxel of the maximum alone; equal maxima share it evenly. Monotone
    functions commute with it, so that it may come before or after a sigmoid.

    Args:
      volume: numbers, of any shape.
      axis: the axis to look along.
      where: boolean, broadcastable to `volume`: the voxels that are seen. A line without any is 0.

    Returns:
      The projection, without `axis`, in the type of `volume`.

    Raises:
      ValueError: an axis that is not there, or a `where` that does not broadcast.

    Use it on predictions and labels alike; `projection_loss` compares the two.

    Cost: one pass over the volume.

    Example:
      >>> print(maximum_intensity_projection(jnp.array([[0.1, 0.9], [0.2, 0.0]]), axis=1))
      [0.9 0.2]

    Reference: Radhakrishna et al., "SPOCKMIP: Segmentation of Vessels in MRAs with Enhanced
    Continuity using Maximum Intensity Projection as Loss", 2024, arXiv:2407.08655.
    """
    volume = jnp.asarray(volume)
    (axis,) = canonical_axes(axis, volume.ndim)
    check_broadcastable(volume.shape, where=where)
    if where is None:
        return jnp.max(volume, axis=axis)
    lowest = (
        jnp.finfo(volume.dtype).min
        if jnp.issubdtype(volume.dtype, jnp.floating)
        else jnp.iinfo(volume.dtype).min
    )
    where = jnp.broadcast_to(where, volume.shape)
    seen = jnp.max(jnp.where(where, volume, lowest), axis=axis)
    return jnp.where(where.any(axis=axis), seen, 0)


def projection_loss(
    probabilities: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    target_projections: Sequence[ArrayLike] | None = None,
    axes: int | tuple[int, ...] = -1,
    base_loss: Callable[..., Array] = focal_tversky_loss,
    where: ArrayLike | None = None,
) -> Array:
    r"""An overlap loss between maximum intensity projections, for each sample of a batch.

        L = Σ over the axes a of base_loss(MIP_a(P), MIP_a(Y))

    A gap in a vessel does not show along an axis where something else is behind it; from two or
    three sides it does. All of the gradient goes to the voxels that are seen.

    Args:
      probabilities: P `[batch, ...]`, floating point in [0, 1], of one foreground.
      targets: Y of the shape of `probabilities`, 0 or 1.
      target_projections: in place of `targets` the projections of the labels, one `[batch, ...]`
        without its axis for each of `axes` in their order. For patches the paper projects the whole
        volume and cuts out the patch's window, so that vessels before and behind it are seen too.
      axes: the axes to look along, not the first. Default: the last.
      base_loss: an overlap loss that takes `reduce_axes`. Default `focal_tversky_loss`.
      where: boolean, broadcastable to `probabilities`: the voxels that count.

    Returns:
      `[batch]` losses in the type of `probabilities`.

    Raises:
      ValueError: shapes that do not match, axes that are not there or the batch's, or not one of
        `targets` and `target_projections`.
      TypeError: probabilities that are not floating point.

    Use it beside an overlap loss of the volume, as `spockmip_loss` does.

    Cost: one pass over the volume for each axis, and the base loss of areas in place of volumes.

    Example:
      >>> vessel = jnp.zeros((1, 3, 4, 3)).at[:, 1, :, 1].set(1)
      >>> gap = vessel.at[:, 1, 1:3, 1].set(0)
      >>> print(projection_loss(gap, vessel, axes=2), projection_loss(gap, vessel).round(2))
      [0.] [0.42]

    Reference: Radhakrishna et al., "SPOCKMIP: Segmentation of Vessels in MRAs with Enhanced
    Continuity using Maximum Intensity Projection as Loss", 2024, arXiv:2407.08655.
    """
    if (targets is None) == (target_projections is None):
        raise ValueError("projection_loss needs one of targets and target_projections")
    p = _masked(probabilities, where)
    axes = canonical_axes(axes, p.ndim, name="axes")
    if axes[0] == 0:
        raise ValueError("axes must not have the batch's, 0")
    if target_projections is None:
        check_shape(p.shape, targets=targets)
        y = jnp.where(True if where is None else where, jnp.asarray(targets), 0)
        target_projections = [maximum_intensity_projection(y, axis=axis) for axis in axes]
    if len(target_projections) != len(axes):
        raise ValueError(
            f"target_projections must have one array for each of {len(axes)} axes, "
            f"got {len(target_projections)}"
        )
    losses = [
        base_loss(
            maximum_intensity_projection(p, axis=axis),
            projection,
            reduce_axes=tuple(range(1, p.ndim - 1)),
        )
        for axis, projection in zip(axes, target_projections)
    ]
    return jnp.sum(jnp.stack(losses), axis=0)


def spockmip_loss(
    probabilities: ArrayLike | Sequence[ArrayLike],
    targets: ArrayLike,
    *,
    target_projections: Sequence[ArrayLike] | None = None,
    axes: int | tuple[int, ...] | None = None,
    volume_weight: float = 0.7,
    projection_weight: float = 0.3,
    level_weights: Sequence[float] = (1.0, 0.66, 0.34),
    base_loss: Callable[..., Array] = focal_tversky_loss,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Overlap loss of a volume and of its projections, under deep supervision (of the set).

        L = Σ_l w_l [ v base_loss(P_l, Y) + m mean over the batch of projection_loss(P_l, Y) ]

    with v = volume_weight, m = projection_weight, w = level_weights. The base loss of the volume
    has the whole batch as its set, a projection its sample. Outputs of lower resolution are
    enlarged by repetition.

    Args:
      probabilities: P `[batch, ...]`, floating point in [0, 1], of one foreground; or a sequence of
        levels, each of a shape that divides the shape of `targets`.
      targets: Y `[batch, ...]`, 0 or 1.
      target_projections: as in `projection_loss`, of the whole volume around a patch. Default:
        those of `targets`.
      axes: the axes to look along, not the first. Default: all others, the paper's multi-axis form;
        its single-axis form is -1.
      volume_weight: v at least 0. Default 0.7.
      projection_weight: m at least 0. Default 0.3.
      level_weights: w, at least 0 and as many as there are levels or more. Default 1, 0.66, 0.34.
      base_loss: an overlap loss that takes `reduce_axes` and `axis_name`. Default
        `focal_tversky_loss`, for other parameters under `functools.partial`.
      where: boolean, broadcastable to `targets`: the voxels that count.
      axis_name: name or names of mapped axes over whose shards the batch is spread.

    Returns:
      A scalar in the type of the first level.

    Raises:
      ValueError: shapes that do not match or divide, axes that are not there or the batch's, more
        levels than weights, or a negative weight.
      TypeError: probabilities that are not floating point.

    Use it for thin connected structures, vessels first of all; `focal_tversky_loss` alone leaves
    gaps in them.

    Cost: for each level the base loss of the whole volume and a pass over it for each axis, at full
    resolution.

    Example:
      >>> vessel = jnp.zeros((1, 4, 4, 4)).at[:, 1, :, 1].set(1)
      >>> gap = vessel.at[:, 1, 1:3, 1].set(0)
      >>> print(spockmip_loss(gap, vessel).round(3), spockmip_loss(vessel, vessel))
      0.551 0.0

    Reference: Radhakrishna et al., "SPOCKMIP: Segmentation of Vessels in MRAs with Enhanced
    Continuity using Maximum Intensity Projection as Loss", 2024, arXiv:2407.08655.
    """
    levels = probabilities if isinstance(probabilities, Sequence) else [probabilities]
    check_interval(0, jnp.inf, volume_weight=volume_weight, projection_weight=projection_weight)
    check_interval(0, jnp.inf, level_weights=level_weights)
    if len(levels) > len(level_weights):
        raise ValueError(f"level_weights must have {len(levels)} values, got {level_weights}")
    targets = jnp.asarray(targets)
    check_broadcastable(targets.shape, where=where)
    axes = tuple(range(1, targets.ndim)) if axes is None else axes
    y = jnp.where(True if where is None else where, targets, 0)
    compared = {"targets": y} if target_projections is None else {}
    total = jnp.zeros(())
    for level, level_weight in zip(levels, level_weights):
        p = _masked(_enlarged(level, targets.shape), where)
        volume = base_loss(p, y, axis_name=axis_name)
        projections = projection_loss(
            p, target_projections=target_projections, axes=axes, base_loss=base_loss, **compared
        )
        projected = jnp.mean(projections)
        if axis_name is not None:
            projected = jax.lax.pmean(projected, axis_name)
        total += level_weight * (volume_weight * volume + projection_weight * projected)
    return total.astype(jnp.result_type(levels[0]))


def _masked(probabilities: ArrayLike, where: ArrayLike | None) -> Array:
    """Probabilities in at least float32, 0 where they do not count."""
    check_floating(probabilities=probabilities)
    p = jnp.asarray(probabilities).astype(compute_dtype(probabilities))
    check_broadcastable(p.shape, where=where)
    return p if where is None else jnp.where(where, p, 0.0)


def _enlarged(level: ArrayLike, shape: tuple[int, ...]) -> Array:
    """A level whose shape divides `shape`, every entry repeated to fill it."""
    level = jnp.asarray(level)
    if level.ndim != len(shape) or any(n % size for n, size in zip(shape, level.shape)):
        raise ValueError(
            f"probabilities must have a shape that divides that of targets, {shape}, "
            f"got {level.shape}"
        )
    for axis, (n, size) in enumerate(zip(shape, level.shape)):
        level = jnp.repeat(level, n // size, axis=axis) if n != size else level
    return level
