"""Softmax losses with angular margins: the label's cosine has to be ahead of the others.

All go one way: cosines of the embeddings with the vectors of the classes, a label's cosine that is
lowered by a margin, and the softmax cross-entropy of these times a scale. The classes may be spread
over devices (`class_axis_name`), and then no device has all of the cosines.

`where` (boolean) says which classes exist for an example; one without any has loss 0 and counts in
no statistic. Embeddings and class vectors of length 0 have cosine 0 with everything. Gradients are
those of `jax.grad`, in reverse mode.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.core.vectors import safe_sqrt, unit_vectors
from jaxref.kernels import softmax_cross_entropy
from jaxref.kernels.vocabulary_parallel import local_ids, whole_width


def cosface_loss(
    embeddings: ArrayLike,
    class_weights: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 0.4,
    scale: float = 64.0,
    where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Softmax cross-entropy of cosines of which the label's is lowered by a constant (CosFace).

        L = -s (cos θ_y - m) + log( exp(s (cos θ_y - m)) + Σ_{k≠y} exp(s cos θ_k) )

    with θ_k the angle between e and W_k, m = margin and s = scale.

    Args:
      embeddings: e `[..., features]` floating point, of any length.
      class_weights: W `[classes, features]` floating point, a vector of any length for each class.
      labels: y, integer ids `[...]`. One that is not an admitted class gives NaN for its example.
      margin: m at least 0. Default 0.4; CosFace's authors had 0.35.
      scale: s above 0. Default 64.
      where: boolean, broadcastable to `[..., classes]`; classes to admit. Default: all.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `class_weights` and `where` are then of the shard's own classes, and ids
        count the classes of all shards.

    Returns:
      `[...]` losses in the type of `embeddings`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, no class, a negative `margin`, or a `scale` that is not
        positive.
      TypeError: embeddings or weights that are not floating point, or labels that are not integer.

    Use it where classes have to be apart on the sphere, as in recognising faces of people that were
    not in the training. `arcface_loss` has its margin in the angle; `adaface_loss` goes between the
    two, by the quality of the example.

    Cost: N C d multiplications, for N embeddings, C classes and d features, and N C cosines in
    memory; C / shards of each with `class_axis_name`.

    Example:
      >>> weights = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(cosface_loss(jnp.array([3.0, 4.0]), weights, jnp.array(1), scale=8.0).round(4))
      1.7839

    Reference: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", 2018,
    arXiv:1801.09414; as the middle of its margins: Kim, Jain, Liu, "AdaFace: Quality Adaptive
    Margin for Face Recognition", 2022, arXiv:2204.00964.
    """
    check_head(margin, scale)
    cosines, labels = labelled_cosines(embeddings, class_weights, labels, where)
    target = target_cosines(cosines, labels, class_axis_name) - margin
    losses = head_loss(cosines, target, labels, scale, where, class_axis_name)
    return losses.astype(jnp.result_type(embeddings))


def arcface_loss(
    embeddings: ArrayLike,
    class_weights: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 0.5,
    scale: float = 64.0,
    where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    r"""Softmax cross-entropy of cosines of which the label's has a constant added to its angle
    (ArcFace).

        L = -s t + log( exp(s t) + Σ_{k≠y} exp(s cos θ_k) ),   t = cos(θ_y + m)

    with θ_k the angle between e and W_k, m = margin and s = scale. Where θ_y + m would pass π, and
    the cosine rise again, t = cos θ_y - m sin m.

    Args:
      embeddings: e `[..., features]` floating point, of any length.
      class_weights: W `[classes, features]` floating point, a vector of any length for each class.
      labels: y, integer ids `[...]`. One that is not an admitted class gives NaN for its example.
      margin: m in [0, π], in radians. Default 0.5.
      scale: s above 0. Default 64.
      where: boolean, broadcastable to `[..., classes]`; classes to admit. Default: all.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `class_weights` and `where` are then of the shard's own classes, and ids
        count the classes of all shards.

    Returns:
      `[...]` losses in the type of `embeddings`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, no class, a `margin` out of range, or a `scale` that is
        not positive.
      TypeError: embeddings or weights that are not floating point, or labels that are not integer.

    Use it as `cosface_loss`, which asks for the same gap in the cosine at every angle; this one's
    is a distance on the sphere, and pulls less on what is far away.

    Cost: N C d multiplications, for N embeddings, C classes and d features, and N C cosines in
    memory; C / shards of each with `class_axis_name`.

    Example:
      >>> weights = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(arcface_loss(jnp.array([3.0, 4.0]), weights, jnp.array(1), scale=8.0).round(4))
      1.6889

    Reference: Deng, Guo, Yang, Xue, Kotsia, Zafeiriou, "ArcFace: Additive Angular Margin Loss for
    Deep Face Recognition", 2018, arXiv:1801.07698; as an end of its margins: Kim, Jain, Liu,
    "AdaFace: Quality Adaptive Margin for Face Recognition", 2022, arXiv:2204.00964.
    """
    check_head(margin, scale, largest=math.pi)
    cosines, labels = labelled_cosines(embeddings, class_weights, labels, where)
    target = angle_margin(target_cosines(cosines, labels, class_axis_name), margin)
    losses = head_loss(cosines, target, labels, scale, where, class_axis_name)
    return losses.astype(jnp.result_type(embeddings))


class AdaFaceState(NamedTuple):
    """What `adaface_loss` carries from step to step: how long embeddings are.

    Attributes:
      mean: μ, float32, the running mean of their lengths.
      std: σ, float32, the running standard deviation of their lengths.

    Reference: Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", 2022,
    arXiv:2204.00964.
    """

    mean: Array
    std: Array


def adaface_init(*, mean: float = 20.0, std: float = 100.0) -> AdaFaceState:
    """The state of `adaface_loss` before the first step.

    Args:
      mean: μ above 0, a guess at the mean length. Default 20, the authors'.
      std: σ at least 0, a guess at its deviation. Default 100, the authors': all margins then
        begin near the middle.

    Returns:
      An `AdaFaceState`.

    Raises:
      ValueError: a `mean` that is not positive or a negative `std`.

    Use it once, before training, with `mean` and `std` near those of the embeddings where they are
    known: at the default `ema` of `adaface_loss` the guess takes hundreds of steps to fade.

    Cost: two scalars.

    Example:
      >>> print(adaface_init().mean)
      20.0

    Reference: Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", 2022,
    arXiv:2204.00964.
    """
    check_interval(0, jnp.inf, closed="right", mean=mean)
    check_interval(0, jnp.inf, std=std)
    return AdaFaceState(jnp.float32(mean), jnp.float32(std))


def adaface_loss(
    embeddings: ArrayLike,
    class_weights: ArrayLike,
    labels: ArrayLike,
    state: AdaFaceState,
    *,
    margin: float = 0.4,
    h: float = 0.333,
    scale: float = 64.0,
    ema: float = 0.01,
    training: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> tuple[Array, AdaFaceState]:
    r"""Margin softmax whose margin depends on the quality of the image, seen in the embedding's
    length (AdaFace).

        μ ← a mean(n) + (1 - a) μ,   σ ← a std(n) + (1 - a) σ,   n = |e| in [0.001, 100]
        q = h (n - μ) / (σ + 0.001) in [-1, 1]
        t = cos(θ_y - m q) - m (1 + q)
        L = -s t + log( exp(s t) + Σ_{k≠y} exp(s cos θ_k) )

    with θ_k the angle between e and W_k, m = margin, a = ema, s = scale, and std of n - 1 degrees
    of freedom. At q = -1 it is `arcface_loss`, at 0 `cosface_loss`, and at 1 the angle counts less
    than it is: the gradient then favours hard examples, at low quality the easy ones. Lengths have
    no gradient. Cosines are kept within ±0.999, and θ_y - m q between 0.001 and π - 0.001.

    Args:
      embeddings: e `[..., features]` floating point, not normalised.
      class_weights: W `[classes, features]` floating point, a vector of any length for each class.
      labels: y, integer ids `[...]`. One that is not an admitted class gives NaN for its example.
      state: from `adaface_init` or the step before.
      margin: m in [0, π]. Default 0.4.
      h: at least 0; how much of the lengths' spread changes the margin. Default 0.333: about two
        thirds of the examples are within a third of the range.
      scale: s above 0. Default 64.
      ema: a in [0, 1], the weight of the batch in the statistics. Default 0.01.
      training: False leaves the state as it is, and takes the cosines without margin.
      where: boolean, broadcastable to `[..., classes]`; classes to admit. Examples without any are
        not in the statistics. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread: the
        statistics are then those of all of it. Not needed under jit with shardings.
      class_axis_name: name or names of mapped axes over whose shards the classes are spread, inside
        `jax.shard_map`: `class_weights` and `where` are then of the shard's own classes, and ids
        count the classes of all shards.

    Returns:
      `[...]` losses in the type of `embeddings`, 0 where no class is admitted, and the state of the
      next step. A batch of one leaves σ as it is.

    Raises:
      ValueError: shapes that do not match, no class, a `margin` or `ema` out of range, a negative
        `h`, or a `scale` that is not positive.
      TypeError: embeddings or weights that are not floating point, or labels that are not integer.

    Use it where images differ in quality, and some show nothing that could be recognised; with
    images of one quality it is no better than `arcface_loss` and `cosface_loss`.

    Cost: that of `arcface_loss`, N C d multiplications and N C cosines in memory, and a few sums of
    N lengths; a state of two scalars.

    Example:
      >>> embeddings, weights = jnp.array([[3.0, 4.0], [30.0, 40.0]]), jnp.array([[2.0, 0], [0, 1]])
      >>> state = adaface_init(mean=25.0, std=20.0)
      >>> values, state = adaface_loss(embeddings, weights, jnp.array([1, 1]), state, scale=8.0)
      >>> print(values.round(2), state.mean)
      [1.49 2.32] 25.025

    Reference: Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", 2022,
    arXiv:2204.00964.
    """
    check_head(margin, scale, largest=math.pi)
    check_interval(0, jnp.inf, h=h)
    check_interval(0, 1, ema=ema)
    cosines, labels = labelled_cosines(embeddings, class_weights, labels, where)
    check_shape((), **{"state.mean": state.mean, "state.std": state.std})
    target = target_cosines(cosines, labels, class_axis_name)
    if training:
        cosines, target = (jnp.clip(x, -1 + 1e-3, 1 - 1e-3) for x in (cosines, target))
        lengths = jnp.linalg.norm(jnp.asarray(embeddings, cosines.dtype), axis=-1)
        lengths = jax.lax.stop_gradient(jnp.clip(lengths, 1e-3, 100.0))
        counted = counted_examples(cosines, labels, where, class_axis_name)
        state = _next_state(lengths, counted, state, ema, axis_name)
        q = jnp.clip(h * (lengths - state.mean) / (state.std + 1e-3), -1, 1)
        angle = jnp.clip(jnp.arccos(target) - margin * q, 1e-3, math.pi - 1e-3)
        target = jnp.cos(angle) - margin * (1 + q)
    losses = head_loss(cosines, target, labels, scale, where, class_axis_name)
    return losses.astype(jnp.result_type(embeddings)), state


def _next_state(
    lengths: Array, counted: Array, state: AdaFaceState, ema: float, axis_name: AxisName | None
) -> AdaFaceState:
    """The running statistics after a batch of lengths."""
    number = sum_over_shards(jnp.sum(counted, dtype=lengths.dtype), axis_name)
    total = sum_over_shards(jnp.sum(lengths, where=counted), axis_name)
    mean = total / jnp.maximum(number, 1)
    squares = sum_over_shards(jnp.sum(jnp.square(lengths - mean), where=counted), axis_name)
    std = jnp.sqrt(squares / jnp.maximum(number - 1, 1))
    old = jax.tree.map(jax.lax.stop_gradient, state)
    return AdaFaceState(
        jnp.where(number > 0, ema * mean + (1 - ema) * old.mean, old.mean).astype(jnp.float32),
        jnp.where(number > 1, ema * std + (1 - ema) * old.std, old.std).astype(jnp.float32),
    )


def check_head(margin: float, scale: float, largest: float = math.inf) -> None:
    """Raises ValueError unless margin and scale are those of a margin softmax.

    >>> check_head(0.5, 64.0)
    """
    check_interval(0, largest, margin=margin)
    check_interval(0, jnp.inf, closed="right", scale=scale)


def class_cosines(embeddings: ArrayLike, class_weights: ArrayLike) -> Array:
    """cos(e, W_k) `[..., classes]` in at least float32.

    >>> class_cosines(jnp.array([3.0, 4.0]), jnp.eye(2)).round(2)
    Array([0.6, 0.8], dtype=float32)
    """
    check_floating(embeddings=embeddings, class_weights=class_weights)
    dtype = compute_dtype(embeddings, class_weights)
    e, w = (jnp.asarray(x).astype(dtype) for x in (embeddings, class_weights))
    if w.ndim != 2 or len(w) == 0:
        raise ValueError(
            f"class_weights must have shape [classes, features], at least one class, got {w.shape}"
        )
    if e.ndim == 0:
        raise ValueError("embeddings must have shape [..., features], got ()")
    check_shape((*e.shape[:-1], w.shape[1]), embeddings=e)
    # the scale of the logits would show the rounding of a faster product
    return jnp.einsum(
        "...f,cf->...c", unit_vectors(e), unit_vectors(w), precision=jax.lax.Precision.HIGHEST
    )


def labelled_cosines(
    embeddings: ArrayLike, class_weights: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array]:
    """The cosines, and the labels, of a head whose arguments fit together."""
    cosines = class_cosines(embeddings, class_weights)
    labels = checked_ids(cosines, labels)
    check_broadcastable(cosines.shape, where=where)
    return cosines, labels


def checked_ids(cosines: Array, labels: ArrayLike) -> Array:
    """The labels, integer ids of the shape of the cosines without their classes."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {labels.dtype.name}")
    check_shape(cosines.shape[:-1], labels=labels)
    return labels


def target_cosines(cosines: Array, labels: Array, class_axis_name: AxisName | None) -> Array:
    """The cosine with the label's class, on every shard; 0 where there is no such class."""
    ids, here = local_ids(labels, cosines.shape[-1], class_axis_name)
    own = jnp.take_along_axis(cosines, ids[..., None], axis=-1)[..., 0]
    return sum_over_shards(jnp.where(here, own, 0.0), class_axis_name)


def angle_margin(cosine: Array, margin: float) -> Array:
    """cos(θ + m) of cos θ, continued so as not to rise where θ + m passes π."""
    sine = safe_sqrt(jnp.maximum(1 - jnp.square(cosine), 0))
    shifted = cosine * jnp.cos(margin) - sine * jnp.sin(margin)
    return jnp.where(cosine >= -jnp.cos(margin), shifted, cosine - margin * jnp.sin(margin))


def with_target(
    cosines: Array, target: Array, labels: Array, class_axis_name: AxisName | None
) -> Array:
    """The cosines with the label's replaced by `target`."""
    ids, here = local_ids(labels, cosines.shape[-1], class_axis_name)
    column = jax.lax.broadcasted_iota(ids.dtype, cosines.shape, cosines.ndim - 1)
    is_target = (column == ids[..., None]) & here[..., None]
    return jnp.where(is_target, target[..., None], cosines)


def head_loss(
    cosines: Array,
    target: Array,
    labels: Array,
    scale: ArrayLike,
    where: ArrayLike | None,
    class_axis_name: AxisName | None,
) -> Array:
    """Cross-entropy of the scaled cosines with the label's replaced by `target`."""
    logits = scale * with_target(cosines, target, labels, class_axis_name)
    return softmax_cross_entropy(logits, labels, where=where, axis_name=class_axis_name)


def counted_examples(
    cosines: Array, labels: Array, where: ArrayLike | None, class_axis_name: AxisName | None
) -> Array:
    """Which examples have a label that is a class, and any class admitted."""
    counted = (labels >= 0) & (labels < whole_width(cosines.shape[-1], class_axis_name))
    if where is not None:
        admitted = jnp.broadcast_to(where, cosines.shape).any(axis=-1)
        counted &= sum_over_shards(admitted.astype(jnp.int32), class_axis_name) > 0
    return counted
