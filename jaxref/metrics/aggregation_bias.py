"""What a metric of the whole data has to do with the mean of its values over parts of them."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.numerics import compute_dtype


class SimpsonsBias(NamedTuple):
    """A metric of the whole data and its mean over groups.

    Attributes:
      population: scalar, the metric of the summed statistics.
      average: scalar, the mean of the metric over groups.
      bias: average - population.
      second_order: what the spread of the groups lets expect of the bias.
      empty_fraction: share of the groups with members whose statistics are all 0, where the value
        of the metric is a convention.

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """

    population: Array
    average: Array
    bias: Array
    second_order: Array
    empty_fraction: Array


def simpsons_bias(
    metric: Callable[[Array], Array],
    statistics: ArrayLike,
    group_ids: ArrayLike,
    *,
    num_groups: int,
    weights: Literal["uniform", "size"] = "uniform",
) -> SimpsonsBias:
    r"""How far the mean of a metric over groups is from the metric of all of them together.

        bias = Σ_t w_t F(s_t) - F(Σ_t s_t),   second order: 1/2 Σ_ij ∂²F/∂s_i∂s_j Cov_w(s_i, s_j)

    with s_t the summed statistics of group t and F the metric, that does not change when all
    statistics grow alike. The bias is 0 for means (accuracy, by size), and not for ratios of sums:
    F1, precision, BLEU. It can turn the order of two models round, and a loss that is averaged over
    groups pursues the average. Of random groups it falls like one over their size; for F = A / B
    the second order is (F Var B - Cov(A, B)) / (E B)².

    Args:
      metric: F, from statistics `[..., S]` to values `[...]`, such as `f1_from_counts`; for the
        second order it has to have two derivatives at the mean.
      statistics: `[examples, S]`, what each example adds, such as `binary_counts(..., axis=())`.
      group_ids: integer `[examples]`, from 0 to num_groups - 1, the sentence, batch or class of
        each; an id beyond makes the result NaN.
      num_groups: at least 1. Groups without members do not count.
      weights: w_t, "uniform" (the default), or "size" for the share of the examples.

    Returns:
      A `SimpsonsBias` in at least float32.

    Raises:
      ValueError: no examples, shapes that do not match, `num_groups` below 1 or unknown `weights`.
      TypeError: ids that are not integers.

    Use it before a metric is averaged over batches, sentences or classes, or taken as a loss of
    them: choose the level that is reported, or batches large enough.

    Cost: one pass over the statistics; `metric` on the sum and on `num_groups` rows, and its
    Hessian, S by S, once.

    Example:
      >>> from jaxref.metrics.classification import f1_from_counts
      >>> counts = jnp.array([[1.0, 0, 0], [1, 0, 3]])  # a small group, and a large one
      >>> result = simpsons_bias(f1_from_counts, counts, jnp.array([0, 1]), num_groups=2)
      >>> print(result.population.round(3), result.average.round(3), result.bias.round(3))
      0.571 0.7 0.129

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """
    values, ids = jnp.asarray(statistics), jnp.asarray(group_ids)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"statistics must have shape [examples, S], got {values.shape}")
    check_shape(values.shape[:1], group_ids=ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"group_ids must be integers, got {ids.dtype.name}")
    check_interval(1, jnp.inf, num_groups=num_groups)
    if weights not in ("uniform", "size"):
        raise ValueError(f"weights must be 'uniform' or 'size', got {weights!r}")
    values = values.astype(compute_dtype(values))
    all_known = jnp.where(jnp.all((ids >= 0) & (ids < num_groups)), 1.0, jnp.nan)
    population = metric(jnp.sum(values, axis=0)) * all_known
    sums = jax.ops.segment_sum(values, ids, num_groups)
    sizes = jax.ops.segment_sum(jnp.ones(len(ids), values.dtype), ids, num_groups)
    exists = sizes > 0
    share = exists / jnp.sum(exists) if weights == "uniform" else sizes / jnp.sum(sizes)
    average = jnp.sum(jnp.where(exists, share * metric(sums), 0.0)) * all_known

    rates = sums if weights == "uniform" else sums / jnp.maximum(sizes, 1)[:, None]
    mean = share @ rates
    spread = rates - mean
    covariance = (share[:, None] * spread).T @ spread
    second_order = jnp.sum(jax.hessian(metric)(mean) * covariance) / 2
    empty = exists & jnp.all(sums == 0, axis=-1)
    return SimpsonsBias(
        population, average, average - population, second_order, jnp.sum(empty) / jnp.sum(exists)
    )


def bleu_statistics(
    candidates: Sequence[Sequence[Hashable]],
    references: Sequence[Sequence[Hashable]],
    *,
    max_order: int = 4,
) -> np.ndarray:
    r"""What each sentence adds to the BLEU score of a corpus.

        (m_1 ... m_N, t_1 ... t_N, c, r)

    the n-grams of the candidate that are in the reference, each at most as often as there, and all
    of its n-grams, for the orders 1 to N; the lengths of candidate and reference.

    Args:
      candidates: for each sentence, its tokens.
      references: for each sentence, the tokens of its reference.
      max_order: N at least 1. Default 4.

    Returns:
      `[sentences, 2 N + 2]` in float64 on the host.

    Raises:
      ValueError: numbers of sentences that differ, or `max_order` below 1.

    Use it with `bleu_from_statistics`, of whose sums any group of sentences is scored; `bleu` takes
    a corpus with several references a sentence.

    Cost: O(N) n-grams counted for each token, in Python on the host; 2 N + 2 numbers a sentence are
    kept.

    Example:
      >>> bleu_statistics(["the cat sat".split()], ["the cat ran".split()], max_order=2)
      array([[2., 1., 3., 2., 3., 3.]])

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """
    check_interval(1, np.inf, max_order=max_order)
    if len(candidates) != len(references):
        raise ValueError(
            f"references must be as many as candidates, got {len(references)} and {len(candidates)}"
        )

    def grams(tokens: Sequence[Hashable], n: int) -> Counter:
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    rows = []
    for candidate, reference in zip(candidates, references):
        orders = [(grams(candidate, n), grams(reference, n)) for n in range(1, max_order + 1)]
        matches = [(ours & theirs).total() for ours, theirs in orders]
        totals = [ours.total() for ours, _ in orders]
        rows.append([*matches, *totals, len(candidate), len(reference)])
    return np.array(rows, np.float64).reshape(-1, 2 * max_order + 2)


def bleu_from_statistics(statistics: ArrayLike, *, smoothing: float = 0.0) -> Array:
    r"""The BLEU score of a corpus or of single sentences, from summed statistics.

        min(1, exp(1 - r/c)) · exp(1/N Σ_n log p_n),   p_1 = m_1 / t_1,
        p_n = (m_n + k) / (t_n + k) for n > 1,   k = smoothing

    Args:
      statistics: `[..., 2 N + 2]`, of `bleu_statistics`: summed over the sentences for a corpus, or
        as they are for each sentence.
      smoothing: k at least 0. Default 0, for a corpus; 1 is usual for sentences, most of which have
        an order without a match.

    Returns:
      `[...]` from 0 to 1 in at least float32; 0 where an order has no match.

    Raises:
      ValueError: statistics of another shape, or a negative `smoothing`.

    Use it as the metric of `simpsons_bias`: the mean over sentences is not the BLEU of the corpus.

    Cost: 2 N logarithms a row, whatever the length of the texts.

    Example:
      >>> statistics = bleu_statistics(["the cat sat on".split()], ["the cat sat".split()])
      >>> print(bleu_from_statistics(statistics, smoothing=1.0).round(3))
      [0.658]

    Reference: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP Training", 2021, arXiv:2103.11795.
    """
    check_interval(0, jnp.inf, smoothing=smoothing)
    s = jnp.asarray(statistics)
    if s.ndim == 0 or s.shape[-1] < 4 or s.shape[-1] % 2:
        raise ValueError(f"statistics must have shape [..., 2 N + 2], got {s.shape}")
    s = s.astype(compute_dtype(s))
    orders = s.shape[-1] // 2 - 1
    added = smoothing * (jnp.arange(orders) > 0)
    matches, totals = s[..., :orders] + added, s[..., orders:-2] + added
    found = matches != 0
    log_precision = jnp.log(jnp.where(found, matches, 1.0)) - jnp.log(jnp.where(found, totals, 1.0))
    length = jnp.maximum(s[..., -2], 1)
    brevity = jnp.minimum(0.0, 1 - s[..., -1] / length)
    score = jnp.exp(brevity + jnp.mean(log_precision, axis=-1))
    return jnp.where(found.all(axis=-1), score, 0.0)
