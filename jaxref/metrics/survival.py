"""How well risks order lifetimes."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_broadcastable, check_floating, check_shape
from jaxref.core.numerics import compute_dtype

_ROWS_AT_A_TIME = 256


def concordance_index(
    risk: ArrayLike, times: ArrayLike, observed: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""How often the item that ended earlier has the higher risk (Harrell's C).

        C = mean over comparable pairs (i, j) of ( 1[r_i > r_j] + 1/2 1[r_i = r_j] )

    A pair is comparable where i is known to have ended before j: e_i = 1, and t_i < t_j, or
    t_i = t_j with j censored then.

    Args:
      risk: r `[n]` floating point, higher for items that should end earlier: minus an expected
        lifetime, say.
      times: t `[n]`: when the item ended, or was last seen.
      observed: e `[n]`: 1 or True where it ended, 0 or False where it is censored.
      where: boolean `[n]`: the items that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32: 1 for a perfect order, 1/2 for constant risks; NaN
      without any comparable pair, or with a risk or time that is NaN.

    Raises:
      ValueError: shapes that do not match, or `observed` other than 0 and 1.
      TypeError: risks that are not floating point.

    Use it on what `jaxref.losses.discrete_hazard_loss` or `cox_partial_likelihood_loss` trained;
    `roc_auc` is its form for a fixed time without censoring.

    Cost: O(n²) comparisons, 256 rows of them in memory at a time.

    Example:
      >>> risk, times = jnp.array([0.9, 0.5, 0.1]), jnp.array([1.0, 3.0, 2.0])
      >>> print(concordance_index(risk, times, jnp.array([1, 0, 1])))
      0.667

    Reference: Kitada, Iyatomi, Seki, "Ad Creative Discontinuation Prediction with Multi-Modal
    Multi-Task Neural Survival Networks", 2022, arXiv:2204.11588; the index is of Harrell, Califf,
    Pryor, Lee, Rosati, "Evaluating the Yield of Medical Tests", JAMA 1982.
    """
    check_floating(risk=risk)
    shape = jnp.shape(risk)
    if len(shape) != 1:
        raise ValueError(f"risk must have shape [n], got {shape}")
    check_shape(shape, times=times)
    check_broadcastable(shape, where=where)
    ended, censored = split_by_label(risk, where, observed=observed)
    r = jnp.asarray(risk).astype(compute_dtype(risk))
    t = jnp.asarray(times).astype(compute_dtype(times))
    exists = ended | censored

    def of_item(item: tuple[Array, Array]) -> tuple[Array, Array]:
        risk, time = item
        later = (exists & (time < t)) | (censored & (time == t))
        wins = jnp.sum((risk > r) + 0.5 * (risk == r), where=later)
        return wins, jnp.sum(later)

    wins, pairs = jax.lax.map(of_item, (r, t), batch_size=_ROWS_AT_A_TIME)
    total = jnp.sum(pairs, where=ended, dtype=r.dtype)
    is_nan = jnp.any(exists & (jnp.isnan(r) | jnp.isnan(t)))
    index = jnp.sum(wins, where=ended) / jnp.maximum(total, 1)
    return jnp.where((total > 0) & ~is_nan, index, jnp.nan)
