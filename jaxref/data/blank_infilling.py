"""Autoregressive blank infilling: a context with blanks, and what was there in random order (GLM).

The context sees all of itself, what fills the blanks is written left to right: one objective for
understanding and for generation. Examples are of one window of tokens and of static shape, so that
`jax.vmap` makes batches of them inside of a jitted step.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.core.ranks import ascending_ranks
from jaxref.data.span_corruption import _check_distinct, _checked_tokens, _placed_spans

Objective = Literal["mixed", "mask", "gmask"]

_OBJECTIVES = ("mixed", "mask", "gmask")


class BlankInfillingExample(NamedTuple):
    """A context with blanks, then the pieces that fill them.

    Attributes:
      tokens: integer `[..., output_length]`: what the model reads. Behind all pieces are ends of
        piece.
      targets: integer `[..., output_length]`: what it is to say in their places.
      where: boolean `[..., output_length]`: the targets that count, those of the pieces.
      positions: integer `[..., output_length]`: a token's place in the context; for tokens of a
        piece, that of its blank.
      block_positions: integer `[..., output_length]`: 0 in the context; from 1 on in each piece.
      context_length: integer `[...]`: the tokens of the context, which see one another.
      length: integer `[...]`: how many tokens there were to write. Above `output_length`, the last
        are cut off.
      uses_gmask: boolean `[...]`: the blank is all of the end, and not several short spans.

    Reference: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2022, arXiv:2210.02414.
    """

    tokens: Array
    targets: Array
    where: Array
    positions: Array
    block_positions: Array
    context_length: Array
    length: Array
    uses_gmask: Array

    @property
    def rotary_positions(self) -> Array:
        """`[..., output_length]`: the one position of GLM-130B, which goes on after a [gMASK]."""
        goes_on = self.uses_gmask[..., None]
        return self.positions + jnp.where(goes_on, self.block_positions, 0)


def blank_infilling_example(
    key: Array,
    tokens: ArrayLike,
    *,
    mask_id: int,
    gmask_id: int,
    start_id: int,
    end_id: int,
    output_length: int,
    objective: Objective = "mixed",
    short_mask_probability: ArrayLike = 0.3,
    span_mean: float = 3.0,
    span_ratio: float = 0.15,
) -> BlankInfillingExample:
    r"""Blanks some of a text, and appends what is to be filled in (autoregressive blank infilling).

        mask:   a b c d e f  with b and d e blanked, the second first, becomes
                tokens     a [M] c [M] f   <s> d  e    <s> b
                targets                     d  e  </s>  b  </s>
                positions  0  1  2  3  4    3  3  3     1  1
                blocks     0  0  0  0  0    1  2  3     1  2
        gmask:  a b [gM]   <s> c d e f     with the targets   c d e f </s>

    The lengths of the short spans follow Poisson(λ) without 0; spans are drawn until they have the
    share r of the tokens, are put at random places where none touch, and are filled in in random
    order. The length of the end that [gMASK] blanks is uniform from 1 to all of the text.

    Args:
      key: a random key.
      tokens: integer `[length]`, without any of the special ids.
      mask_id: [MASK], the blank of a short span.
      gmask_id: [gMASK], the blank of the end.
      start_id: <s>, which a piece starts from.
      end_id: </s>, the target behind a piece.
      output_length: at least 1. Tokens beyond it are cut off. The length plus 2 for each span is
        enough: at most 2 (1 + r length) more.
      objective: "mask" for short spans, "gmask" for the end, "mixed" (the default) for either by
        chance.
      short_mask_probability: of short spans where mixed, in [0, 1]. Default 0.3, the paper's.
      span_mean: λ above 0. Default 3, the paper's; without 0 spans have 3.16 tokens on average.
      span_ratio: r in (0, 1), the least share of tokens in short spans. Default 0.15, the paper's.

    Returns:
      A `BlankInfillingExample` whose arrays have the length `output_length`. Where r is so large
      that the last spans would touch others, these are left out.

    Raises:
      ValueError: an unknown objective, special ids of which two are alike, a number out of its
        range, or tokens that are not of one axis.
      TypeError: tokens that are not integers.

    Use it for a model with `prefix_lm_mask` of the `context_length`: a `Transformer` of the
    architecture "prefix" takes it as `prefix_lengths`. `mixed_objective_example` is for models
    that see only what was before.

    Cost: a few sorts of `length` numbers and scattered writes of `output_length`, under jit; no
    host.

    Example:
      >>> make = lambda key: blank_infilling_example(
      ...     key, jnp.arange(6), mask_id=256, gmask_id=257, start_id=258, end_id=259,
      ...     output_length=10, objective="gmask",
      ... )
      >>> example = jax.jit(make)(jax.random.key(2))
      >>> int(example.length), int(example.where.sum() + example.context_length)
      (8, 8)

    Reference: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2022, arXiv:2210.02414;
    both positions are of Du et al., "GLM: General Language Model Pretraining with Autoregressive
    Blank Infilling", 2021, arXiv:2103.10360.
    """
    x = _checked_tokens(tokens)
    _check_distinct(mask_id=mask_id, gmask_id=gmask_id, start_id=start_id, end_id=end_id)
    check_interval(1, jnp.inf, output_length=output_length)
    check_interval(0, 1, short_mask_probability=short_mask_probability)
    check_interval(0, jnp.inf, closed="right", span_mean=span_mean)
    check_interval(0, 1, closed="neither", span_ratio=span_ratio)
    if objective not in _OBJECTIVES:
        raise ValueError(f"objective must be one of {_OBJECTIVES}, got {objective!r}")
    length = len(x)
    of_objective, of_end, of_spans, of_order = jax.random.split(key, 4)
    probability = {"mixed": short_mask_probability, "mask": 1.0, "gmask": 0.0}[objective]
    uses_gmask = ~jax.random.bernoulli(of_objective, probability)
    end = jax.random.randint(of_end, (), 0, length)
    spans = _poisson_spans(of_spans, length, span_mean, span_ratio)
    mask = jnp.where(uses_gmask, jnp.arange(length) >= end, spans)

    begins = mask & ~jnp.concatenate([jnp.zeros(1, bool), mask[:-1]])
    span = jnp.maximum(jnp.cumsum(begins) - 1, 0)
    within = jnp.arange(length) - jax.lax.cummax(jnp.where(begins, jnp.arange(length), 0))
    sizes = jnp.zeros(length, jnp.int32).at[span].add(mask)
    pieces = sizes + (sizes > 0)
    stays = ~mask | begins
    place = jnp.cumsum(stays) - 1  # in the context, and of masked tokens that of their blank
    context_length = place[-1] + 1
    order = jax.random.permutation(of_order, length)
    ordered = pieces[order]
    starts = jnp.zeros(length, jnp.int32).at[order].set(jnp.cumsum(ordered) - ordered)
    piece = context_length + starts[span]  # where the piece of a token starts

    blank = jnp.where(uses_gmask, gmask_id, mask_id)
    inner = piece + within
    total = context_length + jnp.sum(pieces)

    def written(fill: int, *places: tuple[Array, Array, Array | int]) -> Array:
        array = jnp.full(output_length, fill, jnp.int32)
        for exists, where, value in places:
            array = array.at[jnp.where(exists, where, output_length)].set(value, mode="drop")
        return array

    index = jnp.arange(output_length)
    return BlankInfillingExample(
        tokens=written(
            end_id,
            (stays, place, jnp.where(begins, blank, x)),
            (begins, piece, start_id),
            (mask, inner + 1, x),
        ),
        targets=written(end_id, (mask, inner, x)),
        where=(index >= context_length) & (index < total),
        positions=written(
            0, (stays, place, place), (begins, piece, place), (mask, inner + 1, place)
        ),
        block_positions=written(0, (begins, piece, 1), (mask, inner + 1, within + 2)),
        context_length=jnp.minimum(context_length, output_length),
        length=total,
        uses_gmask=uses_gmask,
    )


def _poisson_spans(key: Array, length: int, mean: float, ratio: float) -> Array:
    """A mask of spans of Poisson lengths above 0 that have at least a share of the tokens."""
    of_lengths, of_order, of_places = jax.random.split(key, 3)
    least = max(int(ratio * length), 1)
    sizes = np.arange(1, int(mean + 12 * math.sqrt(mean) + 12))
    log_probability = sizes * math.log(mean) - [math.lgamma(size + 1) for size in sizes]
    probability = np.exp(log_probability - log_probability.max())
    drawn = jax.random.choice(of_lengths, sizes, (least,), p=probability / probability.sum())
    drawn = jnp.minimum(drawn, length)
    through = jnp.cumsum(drawn)
    taken = (through - drawn < least) & (through + jnp.arange(least) <= length)
    # the last one drawn is longer on average: it must not be the last in the text as well
    rank, spans = ascending_ranks(jax.random.uniform(of_order, (least,)), where=taken)
    shuffled = jnp.zeros(least, jnp.int32).at[rank].set(jnp.where(taken, drawn, 0))
    starts = jnp.where(jnp.arange(least) < spans, jnp.cumsum(shuffled) - shuffled, length)
    first = jnp.zeros(length, bool).at[starts].set(True, mode="drop")
    return _placed_spans(of_places, first, jnp.sum(shuffled), spans)
