"""How often several samples of a model have a right one among them: pass@k, and its best policy."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype


def pass_at_n(probabilities: ArrayLike, n: float) -> Array:
    r"""The probability that one of n independent samples is right, from that of each.

        pass@n = 1 - (1 - p)^n

    Args:
      probabilities: p `[...]` floating point in [0, 1], of a right answer for each problem.
      n: at least 1; need not be whole.

    Returns:
      `[...]` in the type of `probabilities`, precise for small p too. What is
      outside of [0, 1] gives none.

    Raises:
      ValueError: `n` below 1.
      TypeError: probabilities that are not floating point.

    Use it where p is known, as from log-likelihoods; `unbiased_pass_at_k` estimates it from counts.
    Its mean over problems is the coverage of the model.

    Cost: one pass over the probabilities, whatever n.

    Example:
      >>> print(pass_at_n(jnp.array([0.0, 0.1, 1.0]), 16).round(3))
      [0.    0.815 1.   ]

    Reference: Chen, Raventós, Cheng, Ganguli, Druckmann, "Rethinking Fine-Tuning when Scaling
    Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", 2025, arXiv:2502.07154.
    """
    check_floating(probabilities=probabilities)
    check_interval(1, jnp.inf, n=n)
    p = jnp.asarray(probabilities)
    covered = -jnp.expm1(n * jnp.log1p(-p.astype(compute_dtype(p))))
    return covered.astype(p.dtype)


def unbiased_pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> np.ndarray:
    r"""An unbiased estimate of pass@k from more samples than k.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - Π_{j<k} (n - c - j) / (n - j)

    the share of all sets of k samples in which one is right.

    Args:
      num_samples: n `[...]` integers, at least k.
      num_correct: c `[...]` integers from 0 to n, broadcastable with `num_samples`.
      k: at least 1.

    Returns:
      `[...]` from 0 to 1, in float64 on the host.

    Raises:
      ValueError: `k` below 1 or above n, or c outside of [0, n].

    Use it, averaged over problems, to report pass@k; 1 - (1 - c/n)^k, which it replaces, is too low
    for few samples.

    Cost: O(k) time and memory for each problem, beside the n samples.

    Example:
      >>> print(unbiased_pass_at_k(10, np.array([0, 3, 10]), 5).round(3))
      [0.    0.917 1.   ]

    Reference: Chen, Raventós, Cheng, Ganguli, Druckmann, "Rethinking Fine-Tuning when Scaling
    Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", 2025, arXiv:2502.07154
    (the estimate is Chen et al.'s, 2021, arXiv:2107.03374).
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    check_interval(1, np.inf, k=k)
    check_interval(k, np.inf, num_samples=n)
    check_interval(0, np.inf, num_correct=c)
    check_interval(0, np.inf, num_wrong=n - c)
    j = np.arange(k)
    missed = np.maximum(n[..., None] - c[..., None] - j, 0) / (n[..., None] - j)
    return 1 - np.prod(missed, axis=-1)


def optimal_coverage_policy(weights: ArrayLike, n: float) -> np.ndarray:
    r"""The distribution over answers of best pass@n, given how likely each is to be the right one.

        argmax_p Σ_i w_i (1 - (1 - p_i)^n)   over   p_i ≥ 0, Σ p_i = 1

    Of the answers that get anything, the (1 - p_i)^{n-1} are as 1 / w_i: the flatter, the larger n
    is. n = 1 puts all on the best answer.

    Args:
      weights: w `[..., answers]` at least 0 and not all 0; need not sum to 1.
      n: at least 1; need not be whole.

    Returns:
      p `[..., answers]`, in float64 on the host; answers of equal weight share alike.

    Raises:
      ValueError: `n` below 1, or weights that are negative or all 0.

    Use it as the bound of what training for pass@n can reach, or to spread a budget of guesses.

    Cost: one sort of the answers and a running sum: no iterations.

    Example:
      >>> print(optimal_coverage_policy([0.5, 0.3, 0.15, 0.05], 4).round(3))
      [0.456 0.356 0.188 0.   ]

    Reference: Chen, Raventós, Cheng, Ganguli, Druckmann, "Rethinking Fine-Tuning when Scaling
    Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", 2025, arXiv:2502.07154.
    """
    check_interval(1, np.inf, n=n)
    w = np.asarray(weights, np.float64)
    check_interval(0, np.inf, weights=w)
    best = w.max(axis=-1, keepdims=True)
    if not np.all(best > 0):
        raise ValueError("weights must not be all 0")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # 1 - p_i = q r_i: the k likeliest answers get what is left, q = (k - 1) / Σ_{i≤k} r_i
        ratios = np.where(w == best, 1.0, np.exp((np.log(best) - np.log(w)) / np.float64(n - 1)))
        rising = np.sort(ratios, axis=-1)
        left = np.arange(w.shape[-1]) / np.cumsum(rising, axis=-1)
        count = np.sum(left * rising < 1, axis=-1, keepdims=True)
        q = np.take_along_axis(left, count - 1, axis=-1)
        return np.maximum(1 - np.where(q > 0, q * ratios, np.where(w == best, 0, 1)), 0)
