"""What theory says of EF21: the largest step size, and how many clones a client is worth."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.core.numerics import compute_dtype


def ef21_step_size(
    smoothness: ArrayLike,
    client_smoothness: ArrayLike,
    alpha: ArrayLike,
    *,
    analysis: str = "arithmetic",
) -> Array:
    r"""The largest constant step for which theory promises that EF21 converges.

        1 / (L + L̄ ξ(α)),     ξ(α) = √(1-α) / (1 - √(1-α)) = √(1-α) (1 + √(1-α)) / α

    L̄ is the mean of the L_i ("arithmetic"), for EF21-W with weights L_i and, as the paper shows,
    for EF21 just as well; or √(mean L_i²) ("quadratic"), as first proved. The former is never
    larger, and the two are equal only if all L_i are.

    Args:
      smoothness: L above 0, the Lipschitz constant of ∇f.
      client_smoothness: [n], the L_i above 0, those of the ∇f_i.
      alpha: the contraction α in (0, 1] of the compressor: the smallest `compressor.alpha(size)`
        over the leaves. 1 is no compression, and the step 1/L.
      analysis: "arithmetic" (default) or "quadratic".

    Returns:
      the step, a scalar.

    Raises:
      ValueError: a number out of its range, `client_smoothness` that is not a vector, an unknown
        `analysis`.

    Use it as the constant learning rate of `ef21` where the smoothness constants are known, as
    those of linear and logistic regression are; for networks, tune the rate instead.

    Cost: O(n), once.

    Example:
      >>> print(ef21_step_size(1.0, jnp.array([1.0, 3.0]), 0.75))
      0.33333334

    Reference: Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to
    Arithmetic Mean of Smoothness Constants", 2024, arXiv:2402.10774.
    """
    check_interval(0, jnp.inf, closed="neither", smoothness=smoothness)
    check_interval(0, 1, closed="right", alpha=alpha)
    constants = _check_constants(client_smoothness)
    if analysis == "arithmetic":
        mean = jnp.mean(constants)
    elif analysis == "quadratic":
        largest = jnp.max(constants)
        mean = largest * jnp.sqrt(jnp.mean((constants / largest) ** 2))
    else:
        raise ValueError(f"analysis must be 'arithmetic' or 'quadratic', got {analysis!r}")
    root = jnp.sqrt(1 - jnp.asarray(alpha, mean.dtype))
    return jnp.reciprocal(smoothness + mean * root * (1 + root) / alpha)


def clone_counts(client_smoothness: ArrayLike) -> Array:
    r"""How many clones of each client make the smoothness constants of all nearly equal.

        N_i = ⌈L_i / L_AM⌉,     L_AM = mean_i L_i

    With N = Σ N_i, a clone of client i has the function N / (n N_i) f_i, so that the mean over all
    clones is still f. N ≤ 2n, and the quadratic mean of the clones' constants is at most √2 L_AM:
    how the paper comes upon the arithmetic mean. EF21-W has the same effect without clones.

    Args:
      client_smoothness: [n], the L_i above 0.

    Returns:
      N_i, [n] int32.

    Raises:
      ValueError: a constant that is not positive, or not a vector of them.

    Use it to see how uneven the clients are, or to follow the paper's proof; in training, the
    `weights` of `ef21` have the same effect without clones.

    Cost: O(n), once.

    Example:
      >>> print(clone_counts(jnp.array([1.0, 1.0, 7.0])))
      [1 1 3]

    Reference: Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to
    Arithmetic Mean of Smoothness Constants", 2024, arXiv:2402.10774.
    """
    constants = _check_constants(client_smoothness)
    ratios = constants / jnp.mean(constants)
    # A ratio that is an integer but for the rounding of the mean is that integer.
    tolerance = 8 * jnp.finfo(ratios.dtype).eps
    return jnp.ceil(ratios * (1 - tolerance)).astype(jnp.int32)


def _check_constants(client_smoothness):
    check_interval(0, jnp.inf, closed="neither", client_smoothness=client_smoothness)
    constants = jnp.asarray(client_smoothness, compute_dtype(client_smoothness))
    if constants.ndim != 1 or constants.size == 0:
        raise ValueError(f"client_smoothness must have shape (n,), got {constants.shape}")
    return constants
