"""Metrics of sound event detection, on segments of a fixed length."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_interval, check_shape


def segment_based_f1(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    frames_per_segment: int,
    threshold: float = 0.5,
    empty: float = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""F1 score over all segments and classes together.

        F1 = 2 TP / (2 TP + FP + FN)

    A class is active in a segment if it is in any of the segment's frames.

    Args:
      predictions: activities `[..., frames, classes]`, active above `threshold`; booleans as they
        are. Frames that do not fill the last segment make a shorter one.
      targets: activities of that shape, 0 or 1.
      frames_per_segment: at least 1; a second's worth in the DCASE challenges.
      threshold: in (0, 1). Default 0.5.
      empty: the score where nothing is predicted or true. Default 0.
      where: boolean, broadcastable to `predictions`: the frames and classes that count.

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      ValueError: shapes that do not match, `frames_per_segment` below 1, or a threshold outside of
        (0, 1).

    Use it with `segment_based_error_rate`, the challenge's other measure: F1 ignores how errors are
    spread over segments.

    Cost: one pass over the frames.

    Example:
      >>> targets = jnp.array([[1, 0], [1, 0], [0, 0], [0, 1]])
      >>> predictions = jnp.array([[0.9, 0.1], [0.2, 0.3], [0.6, 0.1], [0.4, 0.8]])
      >>> print(segment_based_f1(predictions, targets, frames_per_segment=2))
      0.8

    Reference: Watcharasupat et al., "Improving Polyphonic Sound Event Detection on Multichannel
    Recordings with the Sørensen-Dice Coefficient Loss and Transfer Learning", 2021,
    arXiv:2107.10471.
    """
    predicted, actual = _segments(predictions, targets, frames_per_segment, threshold, where)
    hits = jnp.sum(predicted & actual, dtype=jnp.float32)
    active = jnp.sum(predicted, dtype=jnp.float32) + jnp.sum(actual, dtype=jnp.float32)
    return jnp.where(active == 0, empty, 2 * hits / jnp.maximum(active, 1))


def segment_based_error_rate(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    frames_per_segment: int,
    threshold: float = 0.5,
    where: ArrayLike | None = None,
) -> Array:
    r"""Substitutions, deletions and insertions over the number of active reference events.

        ER = Σ_k (S_k + D_k + I_k) / Σ_k N_k = Σ_k max(FN_k, FP_k) / Σ_k N_k

    In segment k, S = min(FN, FP) of the missed classes are put down to being taken for others,
    D = FN - S to deletion and I = FP - S to insertion. An empty output has rate 1, and a worse one
    more.

    Args:
      predictions: activities `[..., frames, classes]`, active above `threshold`; booleans as they
        are. Frames that do not fill the last segment make a shorter one.
      targets: activities of that shape, 0 or 1.
      frames_per_segment: at least 1; a second's worth in the DCASE challenges.
      threshold: in (0, 1). Default 0.5.
      where: boolean, broadcastable to `predictions`: the frames and classes that count.

    Returns:
      A float32 scalar at least 0; where nothing is true, 0 if nothing is predicted and else
      infinity.

    Raises:
      ValueError: shapes that do not match, `frames_per_segment` below 1, or a threshold outside of
        (0, 1).

    Use it with `segment_based_f1`, which counts a miss and a false alarm in one segment as two
    errors and not as one.

    Cost: one pass over the frames.

    Example:
      >>> targets = jnp.array([[1, 0], [1, 0], [0, 0], [0, 1]])
      >>> predictions = jnp.array([[0.9, 0.1], [0.2, 0.3], [0.6, 0.1], [0.4, 0.8]])
      >>> print(segment_based_error_rate(predictions, targets, frames_per_segment=2))
      0.5

    Reference: Watcharasupat et al., "Improving Polyphonic Sound Event Detection on Multichannel
    Recordings with the Sørensen-Dice Coefficient Loss and Transfer Learning", 2021,
    arXiv:2107.10471.
    """
    predicted, actual = _segments(predictions, targets, frames_per_segment, threshold, where)
    false_negatives = jnp.sum(actual & ~predicted, axis=-1, dtype=jnp.float32)
    false_positives = jnp.sum(predicted & ~actual, axis=-1, dtype=jnp.float32)
    errors = jnp.sum(jnp.maximum(false_negatives, false_positives))
    events = jnp.sum(actual, dtype=jnp.float32)
    without = jnp.where(errors > 0, jnp.inf, 0.0)
    return jnp.where(events == 0, without, errors / jnp.maximum(events, 1))


def _segments(
    predictions: ArrayLike,
    targets: ArrayLike,
    frames_per_segment: int,
    threshold: float,
    where: ArrayLike | None,
) -> tuple[Array, Array]:
    """Which classes are active in each segment, predicted and true: `[..., segments, classes]`."""
    check_interval(1, jnp.inf, frames_per_segment=frames_per_segment)
    check_interval(0, 1, closed="neither", threshold=threshold)
    predictions, targets = jnp.asarray(predictions), jnp.asarray(targets)
    if predictions.ndim < 2:
        raise ValueError(
            f"predictions must have shape [..., frames, classes], got {predictions.shape}"
        )
    check_shape(predictions.shape, targets=targets)
    check_broadcastable(predictions.shape, where=where)
    *batch, frames, classes = predictions.shape
    padding = [(0, 0)] * len(batch) + [(0, -frames % frames_per_segment), (0, 0)]

    def merged(active: Array) -> Array:
        if where is not None:
            active &= where
        active = jnp.pad(active, padding)
        return active.reshape(*batch, -1, frames_per_segment, classes).any(axis=-2)

    return merged(predictions > threshold), merged(targets > threshold)
