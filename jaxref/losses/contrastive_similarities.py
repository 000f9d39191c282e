"""Contrastive losses of rows of similarities, one of which is the positive's.

They differ in which negatives they push, and how hard. `jaxref.analysis.relative_penalty` measures
it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import expected_over_labels
from jaxref.core.numerics import compute_dtype


def info_nce_loss(
    similarities: ArrayLike,
    positive_index: ArrayLike,
    *,
    temperature: float = 0.07,
    where: ArrayLike | None = None,
) -> Array:
    r"""Softmax cross-entropy of the positive among all candidates (InfoNCE).

        L = -log( exp(s⁺ / τ) / Σ_k exp(s_k / τ) ),   the positive in the sum
        ∂L/∂s_k = P_k / τ,   ∂L/∂s⁺ = -Σ_{k ≠ +} P_k / τ,   P = softmax(s / τ)

    The pull on the positive and the pushes on all negatives sum to 0, and a push grows with the
    similarity: for τ → 0, τ L tends to max(0, max_k s_k - s⁺), which pushes the hardest alone, and
    for τ → ∞, τ (L - log N) to mean_k s_k - s⁺, which pushes all N candidates alike.

    Args:
      similarities: s `[..., candidates]` floating point, cosines as a rule.
      positive_index: integer `[...]`, the place of the positive. One that is no candidate's, or of
        one that `where` excludes, gives NaN.
      temperature: τ above 0. Default 0.07.
      where: boolean, broadcastable to `similarities`: the candidates that count. Default: all.

    Returns:
      `[...]` losses of at least 0 in the type of `similarities`; 0 without any negative, or any
      candidate.

    Raises:
      ValueError: shapes that do not match, or a temperature that is not above 0.
      TypeError: similarities that are not floating point, or an index that is not integer.

    Use it on similarities from anywhere, a queue of negatives, say; `softmax_contrastive_loss` and
    `nt_xent_loss` make their own from embeddings, also of other devices. Low temperatures
    spread features evenly, high ones tolerate that examples of a kind are alike.

    Cost: that of a softmax over the candidates.

    Example:
      >>> s = jnp.array([[0.9, 0.5, 0.1]])
      >>> print(info_nce_loss(s, jnp.array([0]), temperature=0.5).round(4))
      [0.5015]

    Reference: Wang, Liu, "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    s, index, _, _ = _checked(similarities, positive_index, where)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    losses = expected_over_labels(jnp.negative, index, s / temperature, where=where)
    return losses.astype(jnp.result_type(similarities))


def hard_contrastive_loss(
    similarities: ArrayLike,
    positive_index: ArrayLike,
    *,
    temperature: float = 0.2,
    hard_fraction: float = 0.1,
    threshold: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""InfoNCE against the hardest negatives alone.

        L = -log( exp(s⁺ / τ) / (exp(s⁺ / τ) + Σ_{k hard} exp(s_k / τ)) )

    where hard are the negatives with s_k at or above a threshold that is their row's own quantile.
    It is aware of hardness without a low temperature, and can have features spread as evenly with
    one that tolerates examples of a kind.

    Args:
      similarities: s `[..., candidates]` floating point.
      positive_index: integer `[...]`, as for `info_nce_loss`.
      temperature: τ above 0. Default 0.2.
      hard_fraction: in (0, 1]: the threshold is the quantile of a row's negatives that leaves this
        share above. The hardest always counts, and all at 1, which gives `info_nce_loss`. Default
        0.1.
      threshold: in place of it, broadcastable to `[...]`; no negative may be above it.
      where: boolean, broadcastable to `similarities`: the candidates that count. Default: all.

    Returns:
      `[...]` losses of at least 0 in the type of `similarities`; 0 without any hard negative. The
      choice has no gradient.

    Raises:
      ValueError: shapes that do not match, a temperature that is not above 0 or a fraction out of
        range.
      TypeError: similarities that are not floating point, or an index that is not integer.

    Use it at temperatures of 0.3 and above, where `info_nce_loss` hardly tells negatives apart;
    `hard_simple_contrastive_loss` has no temperature.

    Cost: one sort of each row and a softmax; with `threshold` there is no sort.

    Example:
      >>> s = jnp.array([[0.9, 0.5, 0.1]])
      >>> loss = jax.jit(hard_contrastive_loss)
      >>> print(loss(s, jnp.array([0]), temperature=0.5, hard_fraction=0.5).round(4))
      [0.3711]

    Reference: Wang, Liu, "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    s, index, positive, exists = _checked(similarities, positive_index, where)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    hard = _hard(s, exists & ~positive, hard_fraction, threshold)
    lost = ~jnp.any(positive & exists, axis=-1, keepdims=True)  # keep enough to give NaN
    admitted = hard | (exists & (positive | lost))
    losses = expected_over_labels(jnp.negative, index, s / temperature, where=admitted)
    return losses.astype(jnp.result_type(similarities))


def simple_contrastive_loss(
    similarities: ArrayLike,
    positive_index: ArrayLike,
    *,
    weight: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""A pull on the positive and the same push on every negative.

        L = -s⁺ + λ Σ_{k ≠ +} s_k,   λ = weight

    to which `info_nce_loss` tends at high temperatures.

    Args:
      similarities: s `[..., candidates]` floating point.
      positive_index: integer `[...]`, as for `info_nce_loss`.
      weight: λ at least 0. Default 1. One over the number of negatives balances pull and push.
      where: boolean, broadcastable to `similarities`: the candidates that count. Default: all.

    Returns:
      `[...]` losses in the type of `similarities`; 0 without any candidate.

    Raises:
      ValueError: shapes that do not match, or a negative `weight`.
      TypeError: similarities that are not floating point, or an index that is not integer.

    Use it to see what hardness is worth: trained by it alone, features do not come apart;
    `hard_simple_contrastive_loss` does nearly as well as `info_nce_loss`.

    Cost: one pass over the similarities.

    Example:
      >>> print(simple_contrastive_loss(jnp.array([[0.9, 0.5, 0.1]]), jnp.array([0])).round(4))
      [-0.3]

    Reference: Wang, Liu, "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    s, _, positive, exists = _checked(similarities, positive_index, where)
    return _linear(s, positive, exists, exists & ~positive, weight).astype(
        jnp.result_type(similarities)
    )


def hard_simple_contrastive_loss(
    similarities: ArrayLike,
    positive_index: ArrayLike,
    *,
    weight: float = 1.0,
    hard_fraction: float = 0.1,
    threshold: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""A pull on the positive and the same push on each of the hardest negatives.

        L = -s⁺ + λ Σ_{k hard} s_k,   λ = weight

    Args:
      similarities: s `[..., candidates]` floating point.
      positive_index: integer `[...]`, as for `info_nce_loss`.
      weight: λ at least 0. Default 1.
      hard_fraction: in (0, 1], as for `hard_contrastive_loss`. Default 0.1.
      threshold: in place of it, broadcastable to `[...]`.
      where: boolean, broadcastable to `similarities`: the candidates that count. Default: all.

    Returns:
      `[...]` losses in the type of `similarities`; 0 without any candidate. The choice has no
      gradient.

    Raises:
      ValueError: shapes that do not match, a negative `weight` or a fraction out of range.
      TypeError: similarities that are not floating point, or an index that is not integer.

    Use it as `hard_contrastive_loss` where there shall be no temperature to tune.

    Cost: one sort of each row; one pass alone with `threshold`.

    Example:
      >>> s = jnp.array([[0.9, 0.5, 0.1]])
      >>> print(hard_simple_contrastive_loss(s, jnp.array([0])).round(4))
      [-0.4]

    Reference: Wang, Liu, "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    s, _, positive, exists = _checked(similarities, positive_index, where)
    hard = _hard(s, exists & ~positive, hard_fraction, threshold)
    return _linear(s, positive, exists, hard, weight).astype(jnp.result_type(similarities))


def _checked(
    similarities: ArrayLike, positive_index: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """Similarities in at least float32, the index, the positive's place, and what counts."""
    check_floating(similarities=similarities)
    s, index = jnp.asarray(similarities), jnp.asarray(positive_index)
    if s.ndim == 0 or s.shape[-1] == 0:
        raise ValueError(f"similarities must have shape [..., candidates], got {s.shape}")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"positive_index must be integers, got {index.dtype.name}")
    check_shape(s.shape[:-1], positive_index=index)
    check_broadcastable(s.shape, where=where)
    exists = True if where is None else jnp.asarray(where, bool)
    positive = index.astype(jnp.int32)[..., None] == jnp.arange(s.shape[-1])
    return s.astype(compute_dtype(s)), index, positive, jnp.broadcast_to(exists, s.shape)


def _hard(s: Array, negative: Array, hard_fraction: float, threshold: ArrayLike | None) -> Array:
    """The negatives at or above the threshold of their row."""
    s = jax.lax.stop_gradient(s)
    if threshold is not None:
        check_broadcastable(s.shape[:-1], threshold=threshold)
        return negative & (s >= jnp.asarray(threshold, s.dtype)[..., None])
    check_interval(0, 1, closed="right", hard_fraction=hard_fraction)
    descending = -jnp.sort(jnp.where(negative, -s, jnp.inf), axis=-1)
    number = jnp.sum(negative, axis=-1, keepdims=True)
    # between this one and the next is the quantile; 1e-6 for fractions that are not quite whole
    last = jnp.floor(hard_fraction * jnp.maximum(number - 1, 0) + 1e-6).astype(jnp.int32)
    return negative & (s >= jnp.take_along_axis(descending, last, axis=-1))


def _linear(s: Array, positive: Array, exists: Array, pushed: Array, weight: ArrayLike) -> Array:
    check_interval(0, jnp.inf, weight=weight)
    known = jnp.any(positive & exists, axis=-1) | ~exists.any(axis=-1)
    pull = jnp.sum(s, axis=-1, where=positive & exists)
    push = jnp.sum(s, axis=-1, where=pushed)
    return jnp.where(known, weight * push - pull, jnp.nan)
