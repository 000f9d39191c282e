"""What contrastive losses do to representations: which pairs they push, and how far it went."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.vectors import squared_distances, unit_rows


def relative_penalty(
    similarities: ArrayLike,
    positive_index: ArrayLike,
    *,
    temperature: float = 0.07,
    where: ArrayLike | None = None,
) -> Array:
    r"""How a contrastive loss shares its push among the negatives.

        r_k = |∂L/∂s_k| / |∂L/∂s⁺| = exp(s_k / τ) / Σ_{j ≠ +} exp(s_j / τ)

    for L = `jaxref.losses.info_nce_loss`: a Boltzmann distribution over the negatives, which lies
    on the hardest at low temperatures and is even at high ones. It sums to 1: the pushes together
    are as strong as the pull on the positive.

    Args:
      similarities: s `[..., candidates]` floating point.
      positive_index: integer `[...]`, the place of the positive; any other makes all candidates
        negatives.
      temperature: τ above 0. Default 0.07.
      where: boolean, broadcastable to `similarities`: the candidates that count. Default: all.

    Returns:
      r `[..., candidates]` in at least float32, 0 for the positive and for what does not count.

    Raises:
      ValueError: shapes that do not match, or a temperature that is not above 0.
      TypeError: similarities that are not floating point, or an index that is not integer.

    Use it on a batch's similarities to see how many negatives matter; `penalty_entropy` sums it up.

    Cost: that of a softmax over the candidates.

    Example:
      >>> s = jnp.array([[0.9, 0.5, 0.1]])
      >>> print(*relative_penalty(s, jnp.array([0]), temperature=0.5)[0].round(2))
      0.0 0.69 0.31

    Reference: Wang, Liu, "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    log_share, negative = _log_shares(similarities, positive_index, temperature, where)
    return jnp.where(negative, jnp.exp(log_share), 0.0)


def penalty_entropy(
    similarities: ArrayLike,
    positive_index: ArrayLike,
    *,
    temperature: float = 0.07,
    where: ArrayLike | None = None,
) -> Array:
    r"""Over how many negatives a contrastive loss spreads its push, as an entropy.

        H = -Σ_k r_k log r_k,   r = `relative_penalty`

    It rises with the temperature, from 0 to the log of the number of negatives.

    Args:
      similarities: s `[..., candidates]` floating point.
      positive_index: integer `[...]`, as for `relative_penalty`.
      temperature: τ above 0. Default 0.07.
      where: boolean, broadcastable to `similarities`: the candidates that count. Default: all.

    Returns:
      H `[...]` in nats, in at least float32; 0 with one negative or none.

    Raises:
      ValueError: shapes that do not match, or a temperature that is not above 0.
      TypeError: similarities that are not floating point, or an index that is not integer.

    Use exp H as a number of negatives that count, to choose a temperature for a new batch size.

    Cost: that of a softmax over the candidates.

    Example:
      >>> s = jnp.array([[0.9, 0.5, 0.1]])
      >>> print(penalty_entropy(s, jnp.array([0]), temperature=0.5).round(3))
      [0.619]

    Reference: Wang, Liu, "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    log_share, negative = _log_shares(similarities, positive_index, temperature, where)
    return -jnp.sum(jnp.exp(log_share) * log_share, axis=-1, where=negative)


def uniformity(features: ArrayLike, *, t: float = 2.0) -> Array:
    r"""How evenly features lie on the sphere, lower for more evenly.

        U = log mean over pairs i ≠ j of exp(-t |f_i - f_j|²),   f at length 1

    Args:
      features: `[examples, features]` floating point, brought to length 1 here.
      t: above 0, the inverse width of the kernel. Default 2.

    Returns:
      A scalar in [-4 t, 0] in at least float32: 0 where all are in one place. NaN for fewer than
      two examples.

    Raises:
      ValueError: features of another number of axes, or a `t` that is not above 0.
      TypeError: features that are not floating point.

    Use it with `tolerance`: contrastive training at low temperatures gains the first and loses the
    second.

    Cost: O(examples²) memory, for the distances of all pairs, and `features` times as much time.

    Example:
      >>> print(uniformity(jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).round(2))
      -4.4

    Reference: of Wang, Isola, "Understanding Contrastive Representation Learning through Alignment
    and Uniformity on the Hypersphere", 2020, arXiv:2005.10242, as used by Wang, Liu,
    "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    f = unit_rows(features)
    check_interval(0, jnp.inf, closed="right", t=t)
    other = ~jnp.eye(len(f), dtype=bool)
    log_total = masked_logsumexp(-t * squared_distances(f, f).ravel(), where=other.ravel())
    pairs = len(f) * (len(f) - 1)
    return log_total - jnp.log(pairs) if pairs else jnp.array(jnp.nan, f.dtype)


def tolerance(features: ArrayLike, labels: ArrayLike) -> Array:
    r"""How alike the features of examples of a kind are.

        T = mean over pairs i ≠ j of equal labels of f_i · f_j,   f at length 1

    Args:
      features: `[examples, features]` floating point, brought to length 1 here.
      labels: integer `[examples]`, which were not used in training.

    Returns:
      A scalar in [-1, 1] in at least float32: 1 where the examples of each label are in one place.
      NaN where no two labels are equal.

    Raises:
      ValueError: shapes that do not match.
      TypeError: features that are not floating point, or labels that are not integer.

    Use it with `uniformity`, on features of one data set: the paper's number is the mean over all
    pairs, with 0 for labels that differ, which is T times their share of equal ones.

    Cost: O(examples²) memory, for the products of all pairs, and `features` times as much time.

    Example:
      >>> features = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
      >>> print(tolerance(features, jnp.array([0, 0, 1])).round(3))
      0.6

    Reference: Wang, Liu, "Understanding the Behaviour of Contrastive Loss", 2020, arXiv:2012.09740.
    """
    f, labels = unit_rows(features), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype.name}")
    check_shape(f.shape[:1], labels=labels)
    alike = (labels[:, None] == labels) & ~jnp.eye(len(f), dtype=bool)
    pairs = jnp.sum(alike)
    total = jnp.sum(f @ f.T, where=alike)
    return jnp.where(pairs > 0, total / jnp.maximum(pairs, 1), jnp.nan)


def _log_shares(
    similarities: ArrayLike,
    positive_index: ArrayLike,
    temperature: float,
    where: ArrayLike | None,
) -> tuple[Array, Array]:
    """log r, 0 where it does not count, and which are negatives."""
    check_floating(similarities=similarities)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    s, index = jnp.asarray(similarities), jnp.asarray(positive_index)
    if s.ndim == 0:
        raise ValueError("similarities must have shape [..., candidates], got a scalar")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"positive_index must be integers, got {index.dtype.name}")
    check_shape(s.shape[:-1], positive_index=index)
    check_broadcastable(s.shape, where=where)
    negative = index.astype(jnp.int32)[..., None] != jnp.arange(s.shape[-1])
    if where is not None:
        negative &= jnp.asarray(where, bool)
    logits = s.astype(compute_dtype(s)) / temperature
    return masked_log_softmax(logits, axis=-1, where=negative), negative
