"""Cross-entropy of given logits, read once for the loss and once for its gradient.

What a row's loss needs of its logits are a few sums: the statistics of the softmax, and for every
way to weigh the classes (the label, a given distribution, all alike) the weighted sum. They come
out of one pass; the gradient is made in another one from the logits and the sums, so that nothing
else of the logits' size is kept.
"""

import functools
from typing import NamedTuple

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
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.kernels.implementation import Implementation, choose_implementation
from jaxref.kernels.row_function import RowFunction, Statistics, Tile
from jaxref.kernels.rows import apply_rows
from jaxref.kernels.softmax import finite, measure_exponentials, merge_exponentials
from jaxref.kernels.vocabulary_parallel import combine_over_vocabulary, local_ids, whole_width


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    z_loss: float | Array = 0.0,
    soft_cap: float | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Softmax cross-entropy of logits, with the terms that language models add to it.

    For a row of logits f, capped to l = c tanh(f / c) where there is a cap c,

        L = log Z - Σ_k q_k l_k + z (log Z)²,   log Z = log Σ_k exp(l_k)
        q_k = (1 - s) 1[k = label] + s / C

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`, at least one.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its row, and no gradient.
      label_smoothing: s in [0, 1], the mass spread evenly over the C admitted classes whose logit
        is not -inf. Default 0.
      z_loss: z at least 0, the weight of the term that keeps log Z near 0. Default 0; 1e-4 is the
        paper's.
      soft_cap: c greater than 0, the bound of the capped logits. Default: no cap; 30 is Gemma 2's.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.
      axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `logits`, `where` and distributions are then the shard's own classes, ids
        count the classes of all shards, and the shards exchange a few numbers per row.
      implementation: what computes it, see `choose_implementation`. Default: Pallas on a TPU, XLA
        elsewhere.

    Returns:
      `[...]` losses in the type of `logits`, in nats, computed in at least float32; 0, with no
      gradient, where no class is admitted.

    Raises:
      ValueError: `label_smoothing` outside of [0, 1], a negative `z_loss`, a `soft_cap` not above
        0, no class, shapes that do not match, or an `implementation` that cannot run.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    With all options at their defaults it is `jaxref.losses.softmax_cross_entropy`; that one has
    weights of classes and forward-mode differentiation, this one fewer passes over large logits
    (`jax.grad` only) and classes spread over devices. Where the logits serve the loss alone,
    `linear_softmax_cross_entropy` does not even make them.

    Cost: in a kernel one read of the logits, backward one read and one write; kept are the logits
    and two numbers a row. Shards exchange a few numbers a row.

    Example:
      >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0]])
      >>> print(softmax_cross_entropy(logits, jnp.array([0, 1]), label_smoothing=0.1).round(4))
      [0.2269 2.0269]

    Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
    arXiv:1805.02867; label smoothing: Szegedy et al., "Rethinking the Inception Architecture for
    Computer Vision", 2015, arXiv:1512.00567; z-loss: Chowdhery et al., "PaLM: Scaling Language
    Modeling with Pathways", 2022, arXiv:2204.02311; the cap: Gemma Team, "Gemma 2: Improving Open
    Language Models at a Practical Size", 2024, arXiv:2408.00118; over shards: Shoeybi et al.,
    "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
    arXiv:1909.08053.
    """
    check_floating(logits=logits)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    (axis,) = canonical_axes(axis, logits.ndim)
    check_broadcastable(logits.shape, where=where)
    check_interval(0, 1, label_smoothing=label_smoothing)
    check_interval(0, jnp.inf, z_loss=z_loss)
    if soft_cap is not None:
        check_interval(0, jnp.inf, closed="neither", soft_cap=soft_cap)
    width = logits.shape[axis]
    if width == 0:
        raise ValueError(f"logits must have at least one class, got shape {logits.shape}")
    rows = jnp.moveaxis(logits, axis, -1)
    has_ids = jnp.issubdtype(labels.dtype, jnp.integer)
    if has_ids:
        check_shape(rows.shape[:-1], labels=labels)
    elif jnp.issubdtype(labels.dtype, jnp.floating):
        check_shape(logits.shape, labels=labels)
    else:
        raise TypeError(f"labels must be integer ids or a distribution, got {labels.dtype.name}")
    if rows.size == 0:
        return jnp.zeros(rows.shape[:-1], logits.dtype)
    chosen = choose_implementation(implementation, rows)
    admitted = None
    if where is not None:
        admitted = jnp.moveaxis(jnp.broadcast_to(where, logits.shape), axis, -1)
        rows = jnp.where(admitted, rows, -jnp.inf)
    if has_ids:
        target, here = local_ids(labels, width, axis_name)
        known = (labels >= 0) & (labels < whole_width(width, axis_name))
        if admitted is not None:
            here &= jnp.take_along_axis(admitted, target[..., None], axis=-1)[..., 0]
            known &= sum_over_shards(here.astype(int), axis_name) > 0
        target = jnp.where(here, target, -1)  # no column
    else:
        target = jnp.moveaxis(labels, axis, -1).astype(compute_dtype(rows))
        if admitted is not None:
            target = jnp.where(admitted, target, 0)
        known = None
    smooth = isinstance(label_smoothing, Array) or label_smoothing != 0
    sums = _sums(rows, target, _Options(soft_cap, smooth), chosen)
    sums = _over_shards(sums, axis_name)
    losses = sums.target_mass * sums.log_sum - sums.target
    if smooth:
        even = sums.log_sum - sums.spread / jnp.maximum(sums.classes, 1)
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    top = finite(sums.top)
    log_z = sums.log_sum + top
    losses = losses + z_loss * log_z * log_z
    if known is not None:
        losses = jnp.where(known, losses, jnp.nan)
    return jnp.where(sums.top == -jnp.inf, 0, losses).astype(logits.dtype)


class _Options(NamedTuple):
    soft_cap: float | None
    smooth: bool


class _Sums(NamedTuple):
    """What rows are reduced to.

    Attributes:
      top: m, the largest logit l; a constant to differentiation.
      log_sum: log Σ exp(l - m).
      target: Σ q (l - m) over the target distribution q, which is 1 at the label.
      target_mass: Σ q.
      spread: Σ (l - m) over the classes whose logit is not -inf, where labels are smoothed.
      classes: how many these are.
    """

    top: Array
    log_sum: Array
    target: Array
    target_mass: Array
    spread: Array | float = 0.0
    classes: Array | float = 0.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sums(logits: Array, target: Array, options: _Options, implementation: Implementation) -> _Sums:
    return _sums_forward(logits, target, options, implementation)[0]


def _sums_forward(
    logits: Array, target: Array, options: _Options, implementation: Implementation
) -> tuple[_Sums, tuple]:
    values, of_row = _operands(logits, target)
    # Outside of a kernel every sum is another pass over the logits, and looking a label up is none.
    looks_up = implementation.platform == "xla" and bool(of_row)
    _, (top, total, *weighted) = apply_rows(
        _reduction(options, weighs_target=not looks_up),
        values,
        of_row=of_row,
        implementation=implementation,
    )
    if looks_up:
        here = target >= 0
        logit = jnp.take_along_axis(logits, jnp.where(here, target, 0)[..., None], axis=-1)[..., 0]
        relative = _capped(logit.astype(top.dtype), options.soft_cap) - finite(top)
        weighted = [jnp.where(here, relative, 0), here.astype(top.dtype), *weighted]
    log_sum = jnp.log(jnp.where(total == 0, 1, total))
    return _Sums(top, log_sum, *weighted), (logits, target, top, log_sum)


def _sums_backward(
    options: _Options, implementation: Implementation, residuals: tuple, cotangents: _Sums
) -> tuple[Array, Array | None]:
    logits, target, top, log_sum = residuals
    values, of_row = _operands(logits, target)
    given = [finite(top), log_sum, cotangents.log_sum, cotangents.target]
    if options.smooth:
        given.append(cotangents.spread)
    (d_logits,), _ = apply_rows(
        _gradient(options),
        values,
        of_row=(*of_row, *given),
        dtypes=(logits.dtype,),
        implementation=implementation,
    )
    if of_row:
        return d_logits, None
    relative = _capped(logits.astype(target.dtype), options.soft_cap) - finite(top)[..., None]
    relative = jnp.where(logits == -jnp.inf, 0, relative)
    d_target = cotangents.target[..., None] * relative + cotangents.target_mass[..., None]
    return d_logits, d_target


_sums.defvjp(_sums_forward, _sums_backward)


def _operands(logits: Array, target: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Arrays to go over, and those of a number per row: where the target is, or its place."""
    is_place = jnp.issubdtype(target.dtype, jnp.integer)
    return ((logits,), (target,)) if is_place else ((logits, target), ())


def _capped(logits: Array, soft_cap: float | None) -> Array:
    if soft_cap is None:
        return logits
    return jnp.where(logits == -jnp.inf, logits, soft_cap * jnp.tanh(logits / soft_cap))


def _target_of(tile: Tile) -> Array:
    """The target distribution of a tile's classes."""
    if len(tile.values) == 2:
        return tile.values[1]
    return jnp.where(tile.column == tile.of_row[0], 1.0, 0.0).astype(tile.values[0].dtype)


@functools.cache
def _reduction(options: _Options, *, weighs_target: bool) -> RowFunction:
    def measure(tile: Tile) -> Statistics:
        logits = _capped(tile.values[0], options.soft_cap)
        top, total = measure_exponentials(tile._replace(values=(logits,)))
        relative = logits - finite(top)
        total_of = functools.partial(jnp.sum, axis=-1, keepdims=True)
        sums = []
        if weighs_target:
            target = jnp.where(tile.exists, _target_of(tile), 0)
            sums += [total_of(jnp.where(target != 0, target * relative, 0)), total_of(target)]
        if options.smooth:
            there = tile.exists & (logits != -jnp.inf)
            count = total_of(jnp.where(there, jnp.ones_like(logits), 0))
            sums += [total_of(jnp.where(there, relative, 0)), count]
        return top, total, *sums

    def merge(a: Statistics, b: Statistics) -> Statistics:
        top, total = merge_exponentials(a[:2], b[:2])
        shifts = finite(a[0]) - finite(top), finite(b[0]) - finite(top)
        sums: list[Array] = []
        for k in range(2, len(a), 2):
            sums.append(a[k] + a[k + 1] * shifts[0] + b[k] + b[k + 1] * shifts[1])
            sums.append(a[k + 1] + b[k + 1])
        return top, total, *sums

    identity = (-jnp.inf, 0.0) + (0.0, 0.0) * (options.smooth + weighs_target)
    return RowFunction("softmax_cross_entropy", identity, measure, merge)


@functools.cache
def _gradient(options: _Options) -> RowFunction:
    def write(tile: Tile, _: Statistics) -> tuple[Array, ...]:
        given = tile.of_row if len(tile.values) == 2 else tile.of_row[1:]
        top, log_sum, of_log_sum, of_target, *of_spread = given
        logits = _capped(tile.values[0], options.soft_cap)
        gradient = of_log_sum * jnp.exp(logits - top - log_sum) + of_target * _target_of(tile)
        if options.smooth:
            gradient += of_spread[0]
        if options.soft_cap is not None:
            gradient *= 1 - (logits / options.soft_cap) ** 2
        return (jnp.where(logits == -jnp.inf, 0, gradient),)

    return RowFunction("softmax_cross_entropy_gradient", write=write)


def _over_shards(sums: _Sums, axis_name: AxisName | None) -> _Sums:
    """The sums of whole rows from those of the shards' classes."""
    if axis_name is None:
        return sums._replace(top=jax.lax.stop_gradient(sums.top))
    top, log_sum = combine_over_vocabulary(sums.top, sums.log_sum, axis_name)
    shift = finite(jax.lax.stop_gradient(sums.top)) - finite(top)
    own = sums._replace(
        target=sums.target + sums.target_mass * shift, spread=sums.spread + sums.classes * shift
    )
    return _Sums(top, log_sum, *jax.lax.psum(own[2:], axis_name))
