"""Partial area under the ROC curve, maximised by distributionally robust weights of pairs.

The weights need means over all negatives of a training set, which a batch only estimates: both
losses carry running means from step to step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_interval, check_shape
from jaxref.core.exponential import log_blend
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.losses.pairwise import check_surrogate, pairwise_surrogate


class PartialAUCState(NamedTuple):
    """What the losses of partial AUC carry from step to step, for N training examples.

    Logarithms, so that pair losses of any size fit; that of a mean nothing has gone into is -inf.

    Attributes:
      log_u: `[N]` float32, of each positive: log of the running mean of exp(loss / λ) over
        negatives. It shards over examples.
      log_w: float32, log of the running mean of u^(λ/τ) over positives; the one-way loss leaves it.

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619.
    """

    log_u: Array
    log_w: Array


def two_way_partial_auc_init(num_examples: int) -> PartialAUCState:
    """The state of `two_way_partial_auc_loss` before the first step: all means empty.

    The same for `one_way_partial_auc_loss`; it goes by its name too, with `_init`.

    Args:
      num_examples: N at least 1, the size of the training set, negatives included.

    Returns:
      A `PartialAUCState`.

    Raises:
      ValueError: `num_examples` below 1.

    Use it once before training, by either name, with the size of the whole training set; losses
    over the pairs of one batch, such as `mann_whitney_loss`, need no state.

    Cost: N + 1 float32 numbers, kept between steps.

    Example:
      >>> two_way_partial_auc_init(2).log_u
      Array([-inf, -inf], dtype=float32)

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619.
    """
    check_interval(1, jnp.inf, num_examples=num_examples)
    return PartialAUCState(jnp.full(num_examples, -jnp.inf, jnp.float32), jnp.float32(-jnp.inf))


one_way_partial_auc_init = two_way_partial_auc_init


def two_way_partial_auc_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    indices: ArrayLike,
    state: PartialAUCState,
    *,
    temperature_negative: float = 1.0,
    temperature_positive: float = 1.0,
    decay: tuple[float, float] = (0.9, 0.9),
    margin: float = 1.0,
    surrogate: str = "squared_hinge",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, PartialAUCState]:
    r"""Two-way partial AUC by KL-robust weights of pairs (a loss of the set).

    With l_ij the surrogate loss of positive i and negative j, it descends

        F = τ log mean_i [ mean_j exp(l_ij / λ) ]^(λ/τ)

    over the whole training set: a mean of pair losses that leans to hard negatives, the more so the
    smaller λ = temperature_negative, and to hard positives the smaller τ = temperature_positive.
    From one batch, with γ₀, γ₁ = decay and e_ij = exp(l_ij / λ),

        u_i ← (1 - γ₀) u_i + γ₀ mean_j e_ij      for the positives i of the batch
        w   ← (1 - γ₁) w + γ₁ mean_i u_i^(λ/τ)
        L   = mean_ij p_ij l_ij,   p_ij = u_i^(λ/τ - 1) e_ij / w without gradient

    The gradient of L estimates that of F, and equals it for γ = (1, 1) and a batch of the whole
    set; the value of L is not that of F.

    Args:
      scores: `[batch]` floating point, higher for positives. The paper's are probabilities,
        sigmoid(logit), for which margin 1 and temperatures about 1 are made.
      labels: `[batch]`, 1 or True for positives, 0 for negatives.
      indices: integer `[batch]`, each example's number in the training set, in [0, N) and distinct;
        those of negatives are not read. One of a positive outside of that range gives NaN.
      state: from `two_way_partial_auc_init(N)` or the step before.
      temperature_negative: λ above 0. Default 1.
      temperature_positive: τ above 0. Default 1. Both large: the plain mean over pairs.
      decay: γ₀ and γ₁ in (0, 1], the shares of the new batch. Default (0.9, 0.9).
      margin: above 0, as for `pairwise_surrogate`. Default 1.
      surrogate: a kind of `pairwise_surrogate`. Default "squared_hinge".
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread; the state
        is the same on all. Not needed under jit with shardings.

    Returns:
      The loss, a scalar in the type of `scores`, and the next state, which has no gradient. A batch
      that lacks positives or negatives gives 0 and the state as it was.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, a hyperparameter out of its
        range, or an unknown `surrogate`.
      TypeError: scores not floating point, or indices not integer.

    Use it where the detector will work at a low false positive rate and has to reach a high true
    positive rate there; draw batches with positives and negatives in equal parts.
    `one_way_partial_auc_loss` weighs the positives evenly.

    Cost: all pairs of the batch, O(batch²) time and memory; a state of N + 1 numbers.

    Example:
      >>> state = two_way_partial_auc_init(3)
      >>> scores, labels = jnp.array([0.5, 0.7, 0.0]), jnp.array([1, 0, 0])
      >>> loss, state = two_way_partial_auc_loss(scores, labels, jnp.arange(3), state)
      >>> print(loss, state.log_u)
      1.44 [0.91 -inf -inf]

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619; the estimator is that of Zhu, Li, Wang, Wu, Yang,
    "When AUC meets DRO: Optimizing Partial AUC for Deep Learning with Non-Convex Convergence
    Guarantee", 2022, arXiv:2203.00176.
    """
    check_interval(0, jnp.inf, closed="right", temperature_positive=temperature_positive)
    decay_inner, decay_outer = decay
    check_interval(0, 1, closed="right", decay=decay_outer)
    pairs, log_u, state = _advance(
        scores,
        labels,
        indices,
        state,
        temperature=temperature_negative,
        decay=decay_inner,
        margin=margin,
        surrogate=surrogate,
        where=where,
        axis_name=axis_name,
    )
    power = temperature_negative / temperature_positive
    log_mean = pairs.log_mean_over_positives(power * log_u)
    log_w = jnp.where(pairs.exist, log_blend(state.log_w, log_mean, decay_outer), state.log_w)
    log_weights = (power - 1) * log_u[:, None] + pairs.log_e - log_w
    loss = pairs.weighted_mean(log_weights, -jnp.log(decay_inner) - jnp.log(decay_outer))
    state = state._replace(log_w=jax.lax.stop_gradient(log_w).astype(state.log_w.dtype))
    return loss.astype(jnp.result_type(scores)), state


def one_way_partial_auc_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    indices: ArrayLike,
    state: PartialAUCState,
    *,
    temperature: float = 1.0,
    decay: float = 0.9,
    margin: float = 1.0,
    surrogate: str = "squared_hinge",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, PartialAUCState]:
    r"""One-way partial AUC by KL-robust weights of negatives (a loss of the set).

    With l_ij the surrogate loss of positive i and negative j, it descends

        F = mean_i λ log mean_j exp(l_ij / λ)

    over the whole training set, λ = temperature. From one batch, with γ = decay and
    e_ij = exp(l_ij / λ),

        u_i ← (1 - γ) u_i + γ mean_j e_ij      for the positives i of the batch
        L   = mean_ij p_ij l_ij,   p_ij = e_ij / u_i without gradient

    The gradient of L estimates that of F; the value of L is not that of F.

    Args:
      scores: `[batch]` floating point, higher for positives; probabilities in the paper.
      labels: `[batch]`, 1 or True for positives, 0 for negatives.
      indices: integer `[batch]`, each example's number in the training set, in [0, N) and distinct;
        those of negatives are not read. One of a positive outside of that range gives NaN.
      state: from `one_way_partial_auc_init(N)` or the step before; log_w is passed through.
      temperature: λ above 0: small for few, hard negatives. Default 1.
      decay: γ in (0, 1], the share of the new batch. Default 0.9.
      margin: above 0, as for `pairwise_surrogate`. Default 1.
      surrogate: a kind of `pairwise_surrogate`. Default "squared_hinge".
      where: boolean, broadcastable to `scores`: the entries that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread; the state
        is the same on all. Not needed under jit with shardings.

    Returns:
      The loss, a scalar in the type of `scores`, and the next state, which has no gradient. A batch
      that lacks positives or negatives gives 0 and the state as it was.

    Raises:
      ValueError: shapes that do not match, labels other than 0 and 1, a hyperparameter out of its
        range, or an unknown `surrogate`.
      TypeError: scores not floating point, or indices not integer.

    Use it for the area at low false positive rates, whatever the true positive rate there;
    `two_way_partial_auc_loss` also turns to the hardest positives.

    Cost: all pairs of the batch, O(batch²) time and memory; a state of N numbers.

    Example:
      >>> state = one_way_partial_auc_init(3)
      >>> scores, labels = jnp.array([0.5, 0.7, 0.0]), jnp.array([1, 0, 0])
      >>> loss, state = one_way_partial_auc_loss(scores, labels, jnp.arange(3), state)
      >>> print(loss)
      1.29

    Reference: Thorat, Caines, "DACTYL: Diverse Adversarial Corpus of Texts Yielded from Large
    Language Models", 2025, arXiv:2508.00619; the estimator is that of Zhu, Li, Wang, Wu, Yang,
    "When AUC meets DRO: Optimizing Partial AUC for Deep Learning with Non-Convex Convergence
    Guarantee", 2022, arXiv:2203.00176.
    """
    pairs, log_u, state = _advance(
        scores,
        labels,
        indices,
        state,
        temperature=temperature,
        decay=decay,
        margin=margin,
        surrogate=surrogate,
        where=where,
        axis_name=axis_name,
    )
    loss = pairs.weighted_mean(pairs.log_e - log_u[:, None], -jnp.log(decay))
    return loss.astype(jnp.result_type(scores)), state


class _Pairs(NamedTuple):
    """The pairs of a batch: positives of this shard by row, negatives of all shards by column."""

    losses: Array
    log_e: Array  # [rows, columns] loss / λ, without gradient
    is_pair: Array
    num_positives: Array  # of all shards, as what follows
    num_negatives: Array
    is_positive: Array
    axis_name: AxisName | None

    @property
    def exist(self) -> Array:
        return (self.num_positives > 0) & (self.num_negatives > 0)

    def log_mean_over_positives(self, logs: Array) -> Array:
        logs = _replicated(logs, self.axis_name)
        total = masked_logsumexp(logs, where=self.is_positive)
        return total - jnp.log(jnp.maximum(self.num_positives, 1))

    def weighted_mean(self, log_weights: Array, log_most: ArrayLike) -> Array:
        """Mean over pairs of weight · loss, where no mean of weights is above exp(log_most)."""
        number = jnp.maximum(self.num_positives * self.num_negatives, 1)
        # Exact logarithms would need no bound; those of losses beyond 1e8 are whole units off.
        log_shares = jnp.minimum(log_weights - jnp.log(number), log_most)
        shares = jax.lax.stop_gradient(jnp.exp(jnp.where(self.is_pair, log_shares, -jnp.inf)))
        return sum_over_shards(jnp.sum(shares * self.losses), self.axis_name)


def _advance(
    scores: ArrayLike,
    labels: ArrayLike,
    indices: ArrayLike,
    state: PartialAUCState,
    *,
    temperature: float,
    decay: float,
    margin: float,
    surrogate: str,
    where: ArrayLike | None,
    axis_name: AxisName | None,
) -> tuple[_Pairs, Array, PartialAUCState]:
    """The pairs of a batch, log u of its positives (elsewhere 0), and the state with log u."""
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    check_interval(0, 1, closed="right", decay=decay)
    check_surrogate(surrogate, "surrogate")
    positive, negative = split_by_label(scores, where, labels=labels)
    if positive.ndim != 1:
        raise ValueError(f"scores must have shape [batch], got {positive.shape}")
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype.name}")
    check_shape(positive.shape, indices=indices)
    state = jax.lax.stop_gradient(state)
    s = jnp.asarray(scores).astype(compute_dtype(scores))
    is_pair = positive[:, None] & all_shards(negative, axis_name)
    difference = jnp.where(is_pair, s[:, None] - all_shards(s, axis_name), 0.0)
    losses = pairwise_surrogate(surrogate, difference, margin=margin)
    pairs = _Pairs(
        losses=losses,
        log_e=jax.lax.stop_gradient(losses / temperature),
        is_pair=is_pair,
        num_positives=sum_over_shards(jnp.sum(positive, dtype=s.dtype), axis_name),
        num_negatives=sum_over_shards(jnp.sum(negative, dtype=s.dtype), axis_name),
        is_positive=_replicated(positive, axis_name) > 0,
        axis_name=axis_name,
    )
    log_mean = masked_logsumexp(pairs.log_e, where=is_pair)
    log_mean = log_mean - jnp.log(jnp.maximum(pairs.num_negatives, 1))
    before = state.log_u.at[indices].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
    )
    log_u = jnp.where(positive & pairs.exist, log_blend(before, log_mean, decay), 0.0)
    # Written by what all shards know alike, so that the state stays the same on each.
    written = pairs.is_positive & pairs.exist
    rows = jnp.where(written, _replicated(indices, axis_name), len(state.log_u))
    advanced = state.log_u.at[rows].set(
        _replicated(log_u, axis_name).astype(state.log_u.dtype),
        mode="drop",
        wrap_negative_indices=False,
    )
    return pairs, log_u, state._replace(log_u=advanced)


def _replicated(values: Array, axis_name: AxisName | None) -> Array:
    """The entries of all shards in order, by a sum: known to be the same on each of them."""
    if axis_name is None:
        return values
    is_mine = jnp.arange(jax.lax.axis_size(axis_name)) == jax.lax.axis_index(axis_name)
    return jax.lax.psum(jnp.where(is_mine[:, None], values, 0), axis_name).reshape(-1)
