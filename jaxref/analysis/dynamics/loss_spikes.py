"""Runs that go wrong: spikes of the loss, and how many of several runs diverge."""

import numpy as np
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval


def loss_spike_score(losses: ArrayLike, window: int, *, deviations: float = 7.0) -> np.ndarray:
    r"""The share of steps whose loss is far above those of the steps before.

        mean_t 1[ℓ_t > m_t + c s_t],   t = W ... T - 1

    with m_t and s_t the mean and the standard deviation of the W losses before step t.

    Args:
      losses: ℓ `[..., steps]`, one value for each step or logging interval. NaN and infinity are
        spikes, for which later windows have the last finite loss.
      window: W, 1 to steps - 1: so many that the training hardly gets better within.
      deviations: c above 0. Default 7.

    Returns:
      `[...]` in [0, 1], in float64 on the host.

    Raises:
      ValueError: an argument out of range, or losses without axes.

    Use it to see a recipe getting unstable before its final loss is worse; of two recipes, with the
    same window. `divergence_rate` counts the runs that do not recover.

    Cost: O(W) operations a step, on the host, and memory for a few copies of the losses.

    Example:
      >>> losses = np.array([2.0, 2.1, 1.9, 2.0, 9.0, 2.0, 1.9, 2.1])
      >>> float(loss_spike_score(losses, 4))
      0.25

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710.
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim == 0:
        raise ValueError("losses must have shape [..., steps], got ()")
    steps = losses.shape[-1]
    check_interval(1, steps - 1, window=window)
    check_interval(0, np.inf, closed="right", deviations=deviations)
    is_finite = np.isfinite(losses)
    last = np.maximum.accumulate(np.where(is_finite, np.arange(steps), -1), axis=-1)
    last = np.where(last < 0, np.argmax(is_finite, axis=-1, keepdims=True), last)
    filled = np.take_along_axis(np.where(is_finite, losses, 0.0), last, axis=-1)
    # From each window's first loss on, so that a flat one has a deviation of exactly 0.
    first, ahead = filled[..., : steps - window], steps - window

    def moved(k: int) -> np.ndarray:
        return filled[..., k : k + ahead] - first

    mean = sum(moved(k) for k in range(window)) / window
    variance = sum(np.square(moved(k) - mean) for k in range(window)) / window
    high = filled[..., window:] - first > mean + deviations * np.sqrt(variance)
    return np.mean(high | ~is_finite[..., window:], axis=-1)


def divergence_rate(losses: ArrayLike, threshold: float) -> np.ndarray:
    r"""The share of runs whose loss ends above a threshold.

        mean_r 1[ℓ_{r,T} > τ]

    Args:
      losses: ℓ `[..., runs, steps]`; runs that differ by their seed, for example. A NaN or infinite
        loss at the end is a diverged run.
      threshold: τ, a finite number: such as the loss of guessing by the frequency of the tokens, or
        a fixed distance above the loss of the best run.

    Returns:
      `[...]` in [0, 1], in float64 on the host.

    Raises:
      ValueError: a `threshold` that is not finite, or losses with fewer than two axes or none.

    Use it with many seeds: in the paper one of ten runs of a small model with the default settings
    diverges in bfloat16, which a single run would not show. `learning_rate_sensitivity` has the
    learning rate in place of the seed.

    Cost: O(runs) on the host; each run is a training.

    Example:
      >>> float(divergence_rate([[3.0, 2.0], [3.0, 7.0], [3.0, float("nan")], [9.0, 2.1]], 5.0))
      0.5

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710.
    """
    losses = np.asarray(losses, np.float64)
    check_interval(-np.inf, np.inf, threshold=threshold)
    if losses.ndim < 2 or losses.size == 0:
        raise ValueError(
            f"losses must have shape [..., runs, steps] and entries, got {losses.shape}"
        )
    last = losses[..., -1]
    return np.mean(~np.isfinite(last) | (last > threshold), axis=-1)
