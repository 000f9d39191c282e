"""Probabilities of several models, or of the frames of a video, made one."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def ensemble_probability(
    probabilities: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    space: Literal["probability", "logit"] = "probability",
) -> Array:
    r"""The probability that several models give to an event together.

        Σ_m w_m p_m   or   sigmoid(Σ_m w_m logit(p_m)),   Σ_m w_m = 1

    The log loss of the first is never above the mean log loss of the models, since -log is convex.

    Args:
      probabilities: p `[models, ...]` floating point in [0, 1], of a binary event, or of each class
        in the space of probabilities. Values outside are not refused.
      weights: w `[models]` at least 0, scaled to the sum 1. Default: all alike.
      space: where the mean is taken, "probability" (the default) or "logit", a geometric mean in
        which a confident model counts for more. There p is first kept 1e-7 away from 0 and 1.

    Returns:
      `[...]` probabilities in the type of `probabilities`.

    Raises:
      ValueError: no model, `weights` of another shape, negative or all 0, or an unknown `space`.
      TypeError: probabilities that are not floating point.

    Use it over members, such as two networks or the models of several folds; `video_probability`
    is for the frames of one video.

    Cost: one pass over the probabilities, those of all models at once.

    Example:
      >>> print(ensemble_probability(jnp.array([[0.9, 0.2], [0.5, 0.4]])).round(2))
      [0.7 0.3]

    Reference: Shamanth, Mathias, Vijayalakshmi, "Detection of fake faces in videos", 2022,
    arXiv:2201.12051.
    """
    check_floating(probabilities=probabilities)
    p = jnp.asarray(probabilities)
    if p.ndim == 0 or len(p) == 0:
        raise ValueError(f"probabilities must have shape [models, ...], got {p.shape}")
    if space not in ("probability", "logit"):
        raise ValueError(f"space must be 'probability' or 'logit', got {space!r}")
    dtype = compute_dtype(p)
    p = p.astype(dtype)
    if weights is None:
        share = jnp.full(len(p), 1 / len(p), dtype)
    else:
        check_shape((len(p),), weights=weights)
        check_interval(0, jnp.inf, weights=weights)
        share = jnp.asarray(weights).astype(dtype)
        total = jnp.sum(share)
        check_interval(0, jnp.inf, closed="right", **{"the sum of weights": total})
        share = share / total
    if space == "probability":
        mean = jnp.tensordot(share, p, axes=1)
    else:
        logits = jax.scipy.special.logit(jnp.clip(p, 1e-7, 1 - 1e-7))
        mean = jax.nn.sigmoid(jnp.tensordot(share, logits, axes=1))
    return mean.astype(jnp.result_type(probabilities))


def video_probability(
    frame_probabilities: ArrayLike,
    where: ArrayLike | None = None,
    *,
    limit: float = 0.01,
) -> Array:
    r"""The probability of an event in a video, from those of its frames.

        clip(mean of p over the frames with a face, limit, 1 - limit)

    Args:
      frame_probabilities: p `[..., frames]` floating point in [0, 1]. Values outside are not
        refused, and are clipped in the result.
      where: boolean, broadcastable to `frame_probabilities`: the frames that count, such as those
        in which a face was found. Default: all.
      limit: in [0, 1/2], how far from 0 and 1 to stay. The log loss of a video is then at most
        -log(limit). Default 0.01.

    Returns:
      `[...]` probabilities in the type of `frame_probabilities`; 1/2 for a video without any frame
      that counts.

    Raises:
      ValueError: a `limit` that is not in [0, 1/2], or a `where` that does not broadcast.
      TypeError: probabilities that are not floating point.

    Use it with `log_loss`, for which a single sure error would be ruinous.

    Cost: one pass over the frames.

    Example:
      >>> frames, found = jnp.array([[0.9, 0.7, 0.1], [1.0, 1.0, 1.0]]), jnp.array([1, 1, 0]) == 1
      >>> print(video_probability(frames, found).round(2))
      [0.8  0.99]

    Reference: Shamanth, Mathias, Vijayalakshmi, "Detection of fake faces in videos", 2022,
    arXiv:2201.12051.
    """
    check_floating(frame_probabilities=frame_probabilities)
    check_interval(0, 0.5, limit=limit)
    p = jnp.asarray(frame_probabilities)
    check_broadcastable(p.shape, where=where)
    counted = jnp.broadcast_to(True if where is None else where, p.shape)
    mean = masked_mean(p.astype(compute_dtype(p)), axis=-1, where=counted)
    mean = jnp.where(counted.any(axis=-1), jnp.clip(mean, limit, 1 - limit), 0.5)
    return mean.astype(p.dtype)
