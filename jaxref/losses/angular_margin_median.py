"""Angular margins that follow the training: scale and margin from the batch's median example."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.kernels.vocabulary_parallel import combine_over_vocabulary, local_ids, whole_width
from jaxref.losses.angular_margin import (
    checked_ids,
    counted_examples,
    head_loss,
    labelled_cosines,
    target_cosines,
)


def madacos_scale_margin(
    cosines: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 0.02,
    rho: float = 9999999.0,
    min_scale: float = 32.0,
    max_scale: float | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    r"""The scale and the margin at which the median example of a batch has a chosen probability
    (of the set; without gradient).

    With i the example whose cosine c with its label is the batch's lower median,

        s = max( min_scale, log(ρ (1 - α) / α) / (1 - c) )
        m = max( 0, c - log(α / (1 - α) Σ_{k≠y_i} exp(s cos θ_ik)) / s )

    so that, wherever m is above 0, the softmax of s (cos θ - m 1[label]) gives the label of i the
    probability α: half of the batch has less. Both grow as the cosines come near 1.

    Args:
      cosines: cos θ `[..., classes]` floating point, all leading axes one batch.
      labels: integer ids `[...]`. An example with one that is no class does not count.
      alpha: α in (0, 1). Default 0.02.
      rho: ρ above 0. Default 9999999, the authors'.
      min_scale: above 0. Default 32.
      max_scale: at least `min_scale`. Default: none, as in the paper. Where the median is near 1, s
        goes into the thousands (1 - c counts as 1e-6 at least), and so does the loss of examples
        far below it.
      where: boolean, broadcastable to `cosines`; classes to admit. Examples without any do not
        count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread; the median
        is then that of all of it.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread.

    Returns:
      s and m, scalars in at least float32; `min_scale` and 0 where no example counts, and m = 0
      where i has no other class.

    Raises:
      ValueError: shapes that do not match, fewer than two classes, or a number out of its range.
      TypeError: cosines that are not floating point, or labels that are not integer.

    Use it to watch how a training goes, or with another loss on cosines; `madacos_loss` uses it.

    Cost: one sort of the batch's N label cosines, gathered from the shards of `axis_name`, and one
    pass over the classes of the median example.

    Example:
      >>> cosines = jnp.array([[0.9, 0.2], [0.7, 0.1], [0.3, 0.4]])
      >>> s, m = madacos_scale_margin(cosines, jnp.array([0, 0, 0]))
      >>> print(s.round(2), m.round(2))
      66.7 0.66
      >>> print(jax.nn.softmax(s * (cosines[1] - m * jnp.eye(2)[0])).round(3))
      [0.02 0.98]

    Reference: Zhu, Gao, Ke, Qiao, Sun, "Coarse-to-Fine: Learning Compact Discriminative
    Representation for Single-Stage Image Retrieval", 2023, arXiv:2308.04008.
    """
    check_floating(cosines=cosines)
    cosines = jax.lax.stop_gradient(jnp.asarray(cosines).astype(compute_dtype(cosines)))
    check_broadcastable(cosines.shape, where=where)
    labels = checked_ids(cosines, labels)
    check_interval(0, 1, closed="neither", alpha=alpha)
    check_interval(0, jnp.inf, closed="neither", rho=rho, min_scale=min_scale)
    if max_scale is not None:
        check_interval(min_scale, jnp.inf, max_scale=max_scale)
    classes = whole_width(cosines.shape[-1], class_axis_name)
    if classes < 2:
        raise ValueError(f"cosines must be with at least two classes, got {classes}")
    target = target_cosines(cosines, labels, class_axis_name).ravel()
    counted = counted_examples(cosines, labels, where, class_axis_name).ravel()
    if target.size == 0:
        return jnp.asarray(min_scale, cosines.dtype), jnp.zeros((), cosines.dtype)

    ordered = jnp.argsort(all_shards(jnp.where(counted, target, jnp.inf), axis_name))
    number = sum_over_shards(jnp.sum(counted, dtype=jnp.int32), axis_name)
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * target.size
    place = ordered[jnp.maximum(number - 1, 0) // 2] - start
    is_here = (place >= 0) & (place < target.size) & (number > 0)
    place = jnp.where(is_here, place, 0)
    median = sum_over_shards(jnp.where(is_here, target[place], 0.0), axis_name)
    scale = jnp.log(rho * (1 - alpha) / alpha) / jnp.maximum(1 - median, 1e-6)
    scale = jnp.clip(jnp.where(number > 0, scale, min_scale), min_scale, max_scale)

    row = scale * cosines.reshape(-1, cosines.shape[-1])[place]
    own, here = local_ids(labels.ravel()[place], row.size, class_axis_name)
    is_other = ~(here & (jnp.arange(row.size) == own))
    if where is not None:
        is_other &= jnp.broadcast_to(where, cosines.shape).reshape(-1, row.size)[place]
    row = jnp.where(is_other, row, -jnp.inf)
    top = jnp.max(row)
    total = jnp.sum(jnp.exp(row - jnp.where(is_other.any(), top, 0.0)))
    log_sum = jnp.log(jnp.where(is_other.any(), total, 1.0))
    top, log_sum = combine_over_vocabulary(top, log_sum, class_axis_name)
    has_others = is_here & (top > -jnp.inf)
    log_others = sum_over_shards(jnp.where(has_others, top + log_sum, 0.0), axis_name)
    margin = jnp.maximum(median - (log_others + jnp.log(alpha) - jnp.log1p(-alpha)) / scale, 0.0)
    is_set = sum_over_shards(has_others.astype(jnp.int32), axis_name) > 0
    return scale, jnp.where(is_set, margin, 0.0)


def madacos_loss(
    embeddings: ArrayLike,
    class_weights: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 0.02,
    rho: float = 9999999.0,
    min_scale: float = 32.0,
    max_scale: float | None = None,
    training: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Margin softmax that sets its own scale and margin by the batch's median example (MadaCos).

        L = -s (cos θ_y - m) + log( exp(s (cos θ_y - m)) + Σ_{k≠y} exp(s cos θ_k) )

    with θ_k the angle between e and W_k, and s, m of `madacos_scale_margin`, which are constants to
    the gradient.

    Args:
      embeddings: e `[..., features]` floating point, of any length.
      class_weights: W `[classes, features]` floating point, a vector of any length for each class.
      labels: y, integer ids `[...]`. One that is not an admitted class gives NaN for its example.
      alpha: α in (0, 1), the probability of the median example's label. Default 0.02.
      rho, min_scale, max_scale: of the scale, see `madacos_scale_margin`.
      training: False takes m = 0.
      where: boolean, broadcastable to `[..., classes]`; classes to admit. Examples without any are
        not in the median. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread: the median
        is then that of all of it. Not needed under jit with shardings.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `class_weights` and `where` are then of the shard's own classes, and ids
        count the classes of all shards.

    Returns:
      `[...]` losses in the type of `embeddings`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, fewer than two classes, or a number out of its range.
      TypeError: embeddings or weights that are not floating point, or labels that are not integer.

    Use it as `arcface_loss`, without scale and margin to be tuned: they become stricter as the
    training goes on.

    Cost: that of `arcface_loss`, N C d multiplications and N C cosines in memory, and one sort of N
    numbers; no state.

    Example:
      >>> embeddings, weights = jnp.array([[3.0, 4.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> loss = madacos_loss(embeddings, weights, jnp.array([1]), alpha=0.1)
      >>> print(loss.round(3), -jnp.log(0.1).round(3))
      [2.303] 2.303

    Reference: Zhu, Gao, Ke, Qiao, Sun, "Coarse-to-Fine: Learning Compact Discriminative
    Representation for Single-Stage Image Retrieval", 2023, arXiv:2308.04008.
    """
    cosines, labels = labelled_cosines(embeddings, class_weights, labels, where)
    scale, margin = madacos_scale_margin(
        cosines,
        labels,
        alpha=alpha,
        rho=rho,
        min_scale=min_scale,
        max_scale=max_scale,
        where=where,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
    )
    target = target_cosines(cosines, labels, class_axis_name)
    if training:
        target = target - margin
    losses = head_loss(cosines, target, labels, scale, where, class_axis_name)
    return losses.astype(jnp.result_type(embeddings))
