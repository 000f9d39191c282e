"""Means over pairs of a positive and a negative entry: the common part of the losses on ranking."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.exponential import linear_tail_exp
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, all_shards, sum_over_shards

_SURROGATES: dict[str, Callable[[Array, float], Array]] = {
    "squared_hinge": lambda d, m: jnp.square(jax.nn.relu(m - d)),
    "squared": lambda d, m: jnp.square(m - d),
    "hinge": lambda d, m: jax.nn.relu(m - d),
    "logistic": lambda d, m: jax.nn.softplus(-m * d),
    "exponential": lambda d, m: linear_tail_exp(-m * d),
}


def pairwise_surrogate(kind: str, difference: ArrayLike, *, margin: float = 1.0) -> Array:
    r"""The loss of a positive that scores higher than a negative by a difference, by its name.

    With d = difference and m = margin,

        squared_hinge:  max(m - d, 0)²        squared:      (m - d)²
        hinge:          max(m - d, 0)         logistic:     log(1 + exp(-m d))
                                              exponential:  exp(-m d)

    All are convex and stand for the step 1[d < 0], whose mean over the pairs is 1 - AUC.

    Args:
      kind: one of the names above.
      difference: d `[...]` floating point: the score of the positive minus that of the negative.
      margin: m above 0; the slope for the logistic and the exponential. Default 1.

    Returns:
      `[...]` losses in the type of `difference`. The exponential goes on as its tangent once it
      passes 1e27 (in float32).

    Raises:
      ValueError: an unknown `kind`, or a `margin` that is not positive.
      TypeError: differences that are not floating point.

    Use it to see or to plot what `two_way_partial_auc_loss` and the losses for macro-AUC average
    over pairs. "squared" punishes pairs that are far apart in the right order, too; the others
    decrease in d.

    Cost: one pass over the differences.

    Example:
      >>> print(pairwise_surrogate("squared_hinge", jnp.array([-1.0, 0.5, 2.0])))
      [4.   0.25 0.  ]

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619.
    """
    check_floating(difference=difference)
    check_surrogate(kind)
    check_interval(0, jnp.inf, closed="right", margin=margin)
    d = jnp.asarray(difference)
    return _SURROGATES[kind](d.astype(compute_dtype(d)), margin).astype(d.dtype)


def check_surrogate(kind: str, name: str = "kind") -> None:
    """Raises ValueError unless `pairwise_surrogate` knows the kind.

    >>> check_surrogate("hinge")
    """
    if kind not in _SURROGATES:
        raise ValueError(f"{name} must be one of {sorted(_SURROGATES)}, got {kind!r}")


def mean_over_pairs(
    pair_loss: Callable[[Array], Array],
    positives: Array,
    is_positive: Array,
    negatives: Array,
    is_negative: Array,
    *,
    axis_name: AxisName | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Mean of `pair_loss(positive - negative)` over all pairs; 0 where there is none.

    Each shard takes its own positives, against the negatives of all.

    Args:
      pair_loss: of an array of differences, elementwise.
      positives, is_positive: `[P, ...]` scores, and the mask of those that count. Trailing axes
        are so many independent means.
      negatives, is_negative: `[N, ...]` likewise.
      axis_name: mapped axes over whose shards both are spread.
      chunk_size: rows of `positives` at a time. Rows that count come first, chunks without any are
        skipped at run time, and nothing of a chunk is kept for the backward pass. Default: all.

    Returns:
      `[...]` means in the type of the scores.
    """
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
    numbers = [jnp.sum(mask, axis=0, dtype=positives.dtype) for mask in (is_positive, is_negative)]
    num_positives, num_negatives = (sum_over_shards(number, axis_name) for number in numbers)
    negatives, is_negative = (all_shards(x, axis_name) for x in (negatives, is_negative))

    def total_of(positives: Array, is_positive: Array) -> Array:
        is_pair = is_positive[:, None] & is_negative
        difference = jnp.where(is_pair, positives[:, None] - negatives, 0.0)
        return jnp.sum(jnp.where(is_pair, pair_loss(difference), 0.0), axis=(0, 1))

    if chunk_size is None or chunk_size >= len(positives):
        total = total_of(positives, is_positive)
    else:
        order = jnp.argsort(~is_positive, axis=0, stable=True)
        rows = [jnp.take_along_axis(x, order, axis=0) for x in (positives, is_positive)]
        padding = [(0, -len(positives) % chunk_size)] + [(0, 0)] * (positives.ndim - 1)
        chunks = [jnp.pad(x, padding).reshape(-1, chunk_size, *x.shape[1:]) for x in rows]
        # a zero that varies over the shards as the sums do
        nothing = jnp.sum(positives[:0], axis=0) + jnp.sum(negatives[:0], axis=0)

        def step(total: Array, chunk: list[Array]) -> tuple[Array, None]:
            some = jax.lax.cond(
                chunk[1].any(), jax.checkpoint(total_of), lambda *_: nothing, *chunk
            )
            return total + some, None

        total, _ = jax.lax.scan(step, nothing, chunks)
    return sum_over_shards(total, axis_name) / jnp.maximum(num_positives * num_negatives, 1)
