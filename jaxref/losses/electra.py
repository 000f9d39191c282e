"""Pre-training of an encoder that tells replaced tokens from original ones (ELECTRA).

A small generator fills in masked tokens, and the discriminator, which is the model one wants, says
of every token whether it is still the original:

    masked = sample_masked_positions(tokens, key=key, special_ids=(cls_id, sep_id, mask_id))
    generator_logits = generator(jnp.where(masked, mask_id, tokens))
    corrupted, is_replaced = electra_corrupt(tokens, masked, generator_logits, key=other_key)
    loss, terms = electra_loss(
        generator_logits, discriminator(corrupted), tokens, masked, is_replaced
    )

The two share their token embeddings and nothing else.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.cross_entropy import binary_cross_entropy, softmax_cross_entropy


class ElectraTerms(NamedTuple):
    """The parts of `electra_loss`, scalars without their weights.

    Attributes:
      masked_language_modelling: mean cross-entropy of the generator over the masked tokens.
      replaced_token_detection: mean binary cross-entropy of the discriminator over all tokens.
    """

    masked_language_modelling: Array
    replaced_token_detection: Array


def sample_masked_positions(
    tokens: ArrayLike,
    *,
    key: Array,
    special_ids: Sequence[int],
    mask_probability: float = 0.15,
    max_predictions: int | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Which tokens of each sequence to mask: a fixed number of them, at random.

        k = max(1, round(p n)),   n the tokens of a sequence that exist,   p = mask_probability

    distinct positions, all sets of k alike likely, of those that hold no special token; all of
    these where they are fewer than k. Special tokens count in n. Halves are rounded to even.

    Args:
      tokens: integer ids `[..., length]`.
      key: a random key.
      special_ids: ids that are never masked, such as those of [CLS], [SEP], [MASK] and [PAD].
      mask_probability: p in (0, 1]. Default 0.15; the paper's large model takes 0.25.
      max_predictions: at least 1, an upper limit of k. Default: none. With one, the masked
        positions fit in an array of a known size.
      where: boolean, broadcastable to `tokens`: the tokens that exist, not padding. Default: all.

    Returns:
      Boolean `[..., length]`, True at the positions to mask.

    Raises:
      ValueError: a number out of its range, tokens without an axis, or a `where` that does not
        broadcast.
      TypeError: tokens that are not integers.

    Use it for each batch anew; `electra_corrupt` fills in what it masks. The authors' code draws
    positions with replacement, so that it sometimes masks a few less than k; and of those masked it
    leaves 15% visible to the generator, as `masked & jax.random.bernoulli(key, 0.85, masked.shape)`
    in its input does.

    Cost: a random number for each token, and two sorts of each sequence.

    Example:
      >>> tokens, key = jnp.array([1, 7, 8, 9, 7, 8, 9, 2]), jax.random.key(0)
      >>> masked = sample_masked_positions(tokens, key=key, special_ids=(1, 2))
      >>> print(masked.sum(), masked[0], masked[-1])
      1 False False

    Reference: Clark, Luong, Le, Manning, "ELECTRA: Pre-training Text Encoders as Discriminators
    Rather Than Generators", 2020, arXiv:2003.10555.
    """
    x = _checked_ids(tokens)
    check_interval(0, 1, closed="right", mask_probability=mask_probability)
    check_broadcastable(x.shape, where=where)
    exists = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), x.shape)
    n = jnp.sum(exists, axis=-1, keepdims=True)
    k = jnp.maximum(1, jnp.round(mask_probability * n))
    if max_predictions is not None:
        check_interval(1, jnp.inf, max_predictions=max_predictions)
        k = jnp.minimum(k, max_predictions)
    candidates = exists & ~jnp.isin(x, jnp.asarray(special_ids, int))
    order = jnp.where(candidates, jax.random.uniform(key, x.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
    return candidates & (rank < k)


def electra_corrupt(
    tokens: ArrayLike,
    masked: ArrayLike,
    generator_logits: ArrayLike,
    *,
    key: Array,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    r"""The generator's sample in place of the masked tokens, and which tokens it changed.

        x̂_t ~ softmax(g_t / T) where t is masked, else x_t,   T = temperature
        is_replaced_t = 1[x̂_t ≠ x_t]

    A masked token that the generator happens to guess counts as original. Drawn without a gradient:
    the generator does not learn to fool the discriminator.

    Args:
      tokens: x, integer ids `[..., length]`.
      masked: boolean, broadcastable to `tokens`, such as `sample_masked_positions`.
      generator_logits: g `[..., length, vocabulary]` floating point; those where no token is masked
        are not looked at.
      key: a random key.
      temperature: T above 0. Default 1; towards 0 the most likely token is taken.

    Returns:
      The ids x̂ `[..., length]`, and a boolean array `[..., length]`.

    Raises:
      ValueError: shapes that do not match, or a `temperature` that is not positive.
      TypeError: tokens that are not integers, a mask that is not boolean, or logits that are not
        floating point.

    Use it between the two models: the ids go to the discriminator, and what it should say of them
    to `electra_loss`. Logits of 0 make a generator that is uniform, which teaches less than one
    that learns.

    Cost: one random number for each logit, at all positions: length · vocabulary a sequence.

    Example:
      >>> tokens, masked = jnp.array([3, 1, 2, 0]), jnp.array([True, True, False, False])
      >>> logits = jnp.array([[0.0, 0.0, 0.0, 99.0], [99.0, 0.0, 0.0, 0.0]] * 2)
      >>> corrupted, is_replaced = electra_corrupt(tokens, masked, logits, key=jax.random.key(0))
      >>> print(corrupted, is_replaced.astype(int))
      [3 0 2 0] [0 1 0 0]

    Reference: Clark, Luong, Le, Manning, "ELECTRA: Pre-training Text Encoders as Discriminators
    Rather Than Generators", 2020, arXiv:2003.10555.
    """
    x = _checked_ids(tokens)
    check_floating(generator_logits=generator_logits)
    check_interval(0, jnp.inf, closed="neither", temperature=temperature)
    _check_mask(x.shape, masked=masked)
    g = jnp.asarray(generator_logits)
    check_shape((*x.shape, *g.shape[-1:]), generator_logits=g)
    g = g.astype(compute_dtype(g))
    # from the largest on, so that no small temperature makes them overflow
    shifted = (g - jnp.max(g, axis=-1, keepdims=True)) / temperature
    corrupted = jnp.where(masked, jax.random.categorical(key, shifted, axis=-1), x)
    return corrupted, corrupted != x


def electra_loss(
    generator_logits: ArrayLike,
    discriminator_logits: ArrayLike,
    tokens: ArrayLike,
    masked: ArrayLike,
    is_replaced: ArrayLike,
    *,
    generator_weight: float = 1.0,
    discriminator_weight: float = 50.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, ElectraTerms]:
    r"""Loss of a generator and a discriminator. A loss on the whole set of tokens: one number.

        L = w_G mean_{t masked} (-log softmax(g_t)_{x_t})
          + w_D mean_t (softplus(d_t) - r_t d_t),   r = is_replaced

    The discriminator learns from every token, the generator from the masked ones alone.

    Args:
      generator_logits: g `[..., length, vocabulary]` floating point, of the masked sequence.
      discriminator_logits: d `[..., length]` floating point, of the corrupted sequence; above 0 for
        a token that seems replaced.
      tokens: x, the original integer ids `[..., length]`. One that is out of the vocabulary gives
        NaN where it is masked.
      masked: boolean, broadcastable to `tokens`.
      is_replaced: r, boolean, of the shape of `tokens`: from `electra_corrupt`.
      generator_weight: w_G at least 0. Default 1, the paper's.
      discriminator_weight: w_D at least 0. Default 50, the paper's: a binary loss is much smaller
        than one over a vocabulary.
      where: boolean, broadcastable to `tokens`: the tokens that exist, not padding. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the tokens are spread,
        whose means are taken together.

    Returns:
      L, a scalar in at least float32, and its two means. A mean over no token is 0.

    Raises:
      ValueError: shapes that do not match, or a negative weight.
      TypeError: logits that are not floating point, tokens that are not integers, or a mask that is
        not boolean.

    Use it to pre-train an encoder that learns from every token of a text, where masked language
    modelling learns from the masked ones; fine-tune the discriminator alone afterwards.
    `binary_cross_entropy(d, r, where=masked)` is the paper's ablation that learns from the masked
    tokens only.

    Cost: a forward and a backward pass of both models; here a softmax over the vocabulary at all
    positions, and one pass over the discriminator's logits.

    Example:
      >>> masked = jnp.array([True, False])
      >>> g, d, x = jnp.zeros((2, 8)), jnp.zeros(2), jnp.array([5, 3])
      >>> loss, terms = electra_loss(g, d, x, masked, jnp.array([True, False]))
      >>> print(loss.round(3), terms.replaced_token_detection.round(3))
      36.737 0.693

    Reference: Clark, Luong, Le, Manning, "ELECTRA: Pre-training Text Encoders as Discriminators
    Rather Than Generators", 2020, arXiv:2003.10555.
    """
    x = _checked_ids(tokens)
    check_floating(generator_logits=generator_logits, discriminator_logits=discriminator_logits)
    check_interval(
        0, jnp.inf, generator_weight=generator_weight, discriminator_weight=discriminator_weight
    )
    g, d = jnp.asarray(generator_logits), jnp.asarray(discriminator_logits)
    check_shape((*x.shape, *g.shape[-1:]), generator_logits=g)
    check_shape(x.shape, discriminator_logits=d, is_replaced=is_replaced)
    _check_mask(x.shape, masked=masked, is_replaced=is_replaced)
    check_broadcastable(x.shape, where=where)
    exists = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), x.shape)
    predicted = exists & masked
    g = jnp.where(predicted[..., None], g.astype(compute_dtype(g)), 0.0)
    d = d.astype(compute_dtype(d))
    of_generator = softmax_cross_entropy(g, x)
    of_discriminator = binary_cross_entropy(d, is_replaced, where=exists)
    sums = sum_over_shards(
        (
            (jnp.sum(of_generator, where=predicted), jnp.sum(predicted)),
            (jnp.sum(of_discriminator, where=exists), jnp.sum(exists)),
        ),
        axis_name,
    )
    terms = ElectraTerms(*(total / jnp.maximum(count, 1) for total, count in sums))
    loss = generator_weight * terms.masked_language_modelling
    return loss + discriminator_weight * terms.replaced_token_detection, terms


def _checked_ids(tokens: ArrayLike) -> Array:
    x = jnp.asarray(tokens)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {x.dtype.name}")
    if x.ndim == 0:
        raise ValueError("tokens must have shape [..., length], got ()")
    return x


def _check_mask(shape: tuple[int, ...], **masks: ArrayLike) -> None:
    check_broadcastable(shape, **masks)
    for name, mask in masks.items():
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f"{name} must be boolean, got {jnp.result_type(mask).name}")
