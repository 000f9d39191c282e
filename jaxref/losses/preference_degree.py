"""Degrees of preference from responses with parts of their content left out, without labels (SPO).

A response with some of its key content removed is worse, and the more so the more is removed. How
much it was is known for free, and a model that learns to tell it from the response knows degrees of
preference, where pairs of a chosen and a rejected response only say which is better. What the key
content is, an extractor of keywords says beforehand (RAKE, or TF-IDF).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.losses.cross_entropy import softmax_cross_entropy


class DegreeExamples(NamedTuple):
    """Responses of which more and more is left out.

    Attributes:
      tokens: integer `[..., degrees, length]`.
      where: boolean `[..., degrees, length]`: which tokens there are, the first of each row.
      degrees: int32 `[..., degrees]`: 0 for the response as it is, and one more each time.
      known: boolean `[..., degrees]`: False for responses without key content, which are alike in
        all degrees.
    """

    tokens: Array
    where: Array
    degrees: Array
    known: Array


def remove_key_content(
    tokens: ArrayLike,
    importance: ArrayLike,
    fraction: ArrayLike,
    *,
    where: ArrayLike | None = None,
    padding_id: int = 0,
) -> tuple[Array, Array]:
    r"""Responses without their most important tokens.

    Of the n tokens whose importance is above 0 the ⌈fraction n⌉ most important ones are left out,
    of equal ones the first; what remains keeps its order and moves up.

    Args:
      tokens: integer `[..., length]`.
      importance: `[..., length]`, the importance of each token, that of its keyword; 0 for tokens
        that are not of the key content.
      fraction: in [0, 1], broadcastable to `[...]`.
      where: boolean, broadcastable to `[..., length]`: the tokens of the response. Default: all.
      padding_id: what stands after the response. Default 0.

    Returns:
      Tokens `[..., length]` in the type of `tokens`, and where there are any, boolean.

    Raises:
      ValueError: shapes that do not match, or a fraction outside of [0, 1].
      TypeError: tokens that are not integers.

    Use it for a degree of one's own; `degree_dataset` makes all of them.

    Cost: three sorts of each response, O(length log length).

    Example:
      >>> tokens, where = remove_key_content(jnp.arange(1, 6), jnp.array([0, 2, 0, 3, 1]), 0.6)
      >>> print(tokens, where.astype(int))
      [1 3 5 0 0] [1 1 1 0 0]

    Reference: Li, Huang, Zhang, Xu, Chen, Song, Shi, Wang, Xu, "Self-supervised Preference
    Optimization: Enhance Your Language Model with Preference Degree Awareness", 2024,
    arXiv:2409.17791.
    """
    check_interval(0, 1, fraction=fraction)
    ids = jnp.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {ids.dtype.name}")
    if ids.ndim == 0:
        raise ValueError("tokens must have shape [..., length], got ()")
    check_shape(ids.shape, importance=importance)
    check_broadcastable(ids.shape, where=where)
    check_broadcastable(ids.shape[:-1], fraction=fraction)
    exists = jnp.broadcast_to(True if where is None else where, ids.shape)
    is_key = exists & (jnp.asarray(importance) > 0)
    count = jnp.count_nonzero(is_key, axis=-1, keepdims=True)
    # 0.6 of 25 tokens is 15 of them, though 0.6 in float32 is a little more than that
    share = jnp.asarray(fraction, jnp.float32)[..., None] * (1 - 4 * jnp.finfo(jnp.float32).eps)
    order = jnp.argsort(jnp.where(is_key, -jnp.asarray(importance, jnp.float32), jnp.inf), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    kept = exists & ~(is_key & (rank < jnp.ceil(share * count)))
    left = jnp.arange(ids.shape[-1]) < jnp.count_nonzero(kept, axis=-1, keepdims=True)
    moved = jnp.take_along_axis(ids, jnp.argsort(~kept, axis=-1), axis=-1)
    return jnp.where(left, moved, jnp.asarray(padding_id, ids.dtype)), left


def degree_dataset(
    tokens: ArrayLike,
    importance: ArrayLike,
    *,
    fractions: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0),
    where: ArrayLike | None = None,
    padding_id: int = 0,
) -> DegreeExamples:
    r"""Every response with more and more of its key content left out, and how much it is.

    Args:
      tokens, importance, where, padding_id: as in `remove_key_content`.
      fractions: at least two, increasing, in [0, 1]: what each degree leaves out. Default nothing,
        one and two thirds, and all.

    Returns:
      The responses `[..., degrees, length]`, with as many degrees as fractions.

    Raises:
      ValueError: fractions that do not increase, or as `remove_key_content`.
      TypeError: tokens that are not integers.

    Use it on the chosen and on the rejected responses of a batch: let the model read them after
    their prompt, and classify the degree from the state of each one's last token by a linear layer,
    which is dropped after training.

    Cost: `remove_key_content` for each fraction: three sorts, and as many copies of the responses.

    Example:
      >>> importance = jnp.array([0, 2, 0, 1])
      >>> print(degree_dataset(jnp.arange(1, 5), importance, fractions=(0, 0.5, 1)).tokens)
      [[1 2 3 4]
       [1 3 4 0]
       [1 3 0 0]]

    Reference: Li, Huang, Zhang, Xu, Chen, Song, Shi, Wang, Xu, "Self-supervised Preference
    Optimization: Enhance Your Language Model with Preference Degree Awareness", 2024,
    arXiv:2409.17791.
    """
    check_interval(0, 1, fractions=fractions)
    if len(fractions) < 2 or np.any(np.diff(fractions) <= 0):
        raise ValueError(f"fractions must be at least two and increase, got {fractions}")
    ids, scores = jnp.asarray(tokens), jnp.asarray(importance)
    check_shape(ids.shape, importance=scores)
    check_broadcastable(ids.shape, where=where)
    exists = jnp.broadcast_to(True if where is None else where, ids.shape)
    shape = (*ids.shape[:-1], len(fractions), *ids.shape[-1:])
    every = [jnp.broadcast_to(x[..., None, :], shape) for x in (ids, scores, exists)]
    removed, left = remove_key_content(
        every[0], every[1], np.asarray(fractions), where=every[2], padding_id=padding_id
    )
    has_keys = jnp.any(exists & (scores > 0), axis=-1, keepdims=True)
    return DegreeExamples(
        tokens=removed,
        where=left,
        degrees=jnp.broadcast_to(jnp.arange(len(fractions), dtype=jnp.int32), shape[:-1]),
        known=jnp.broadcast_to(has_keys, shape[:-1]),
    )


def self_supervised_preference_loss(
    alignment_loss: ArrayLike,
    chosen_degree_logits: ArrayLike,
    chosen_degrees: ArrayLike,
    rejected_degree_logits: ArrayLike,
    rejected_degrees: ArrayLike,
    *,
    chosen_weight: float = 0.1,
    rejected_weight: float = 0.1,
    chosen_where: ArrayLike | None = None,
    rejected_where: ArrayLike | None = None,
) -> Array:
    r"""A loss of preferences, and how badly the degrees of degraded responses are told (SPO).

        L = L_alignment + a mean_v(-log softmax(z_v)[k_v]) + b mean_u(-log softmax(z_u)[k_u])

    over the versions v of the chosen and u of the rejected response of a pair, of degrees k.

    Args:
      alignment_loss: `[...]` floating point, of pairs, by any loss: `f_dpo_loss`, `srpo_loss`.
      chosen_degree_logits: z `[..., versions, degrees]` floating point, of versions of the chosen
        response.
      chosen_degrees: k, integer ids `[..., versions]`. One that is out of range gives NaN.
      rejected_degree_logits: z `[..., versions, degrees]`, of the rejected response.
      rejected_degrees: k, integer ids `[..., versions]`.
      chosen_weight: a at least 0. Default 0.1.
      rejected_weight: b at least 0. Default 0.1.
      chosen_where: boolean, broadcastable to `[..., versions]`: the versions that count, `known` of
        `degree_dataset`. Default: all.
      rejected_where: the same of the rejected response.

    Returns:
      `[...]` losses in the type of `alignment_loss`; without weights they are `alignment_loss`, and
      logits of 0 add (a + b) log of the number of degrees. Nothing is added where no version
      counts.

    Raises:
      ValueError: shapes that do not match, or a negative weight.
      TypeError: losses or logits that are not floating point.

    Use it where few pairs are marked, or these differ widely in degree. The default weights are not
    the paper's, whose own could not be seen.

    Cost: a small softmax a version; the model has to read every version of each response, a forward
    and backward pass each.

    Example:
      >>> logits, degrees = jnp.zeros((4, 4)), jnp.arange(4)
      >>> loss = self_supervised_preference_loss(0.5, logits, degrees, logits, degrees)
      >>> print(loss.round(4))
      0.7773

    Reference: Li, Huang, Zhang, Xu, Chen, Song, Shi, Wang, Xu, "Self-supervised Preference
    Optimization: Enhance Your Language Model with Preference Degree Awareness", 2024,
    arXiv:2409.17791.
    """
    check_interval(0, jnp.inf, chosen_weight=chosen_weight, rejected_weight=rejected_weight)
    check_floating(alignment_loss=alignment_loss)
    total = jnp.asarray(alignment_loss).astype(compute_dtype(alignment_loss))
    for name, logits, degrees, weight, where in (
        ("chosen", chosen_degree_logits, chosen_degrees, chosen_weight, chosen_where),
        ("rejected", rejected_degree_logits, rejected_degrees, rejected_weight, rejected_where),
    ):
        check_floating(**{f"{name}_degree_logits": logits})
        check_shape((*total.shape, *jnp.shape(logits)[-2:-1]), **{f"{name}_degrees": degrees})
        check_broadcastable(jnp.shape(degrees), **{f"{name}_where": where})
        counts = jnp.broadcast_to(True if where is None else where, jnp.shape(degrees))
        z = jnp.where(counts[..., None], jnp.asarray(logits).astype(compute_dtype(logits)), 0.0)
        total += weight * masked_mean(softmax_cross_entropy(z, degrees), axis=-1, where=counts)
    return total.astype(jnp.result_type(alignment_loss))
