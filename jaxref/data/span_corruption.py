"""Examples for models that write left to right and fill blanks: a mixture of both (CodeGen2).

Spans of a document are replaced by sentinels, and what they hid is appended. All of it is for one
window of tokens and of static shape, so that `jax.vmap` makes batches of it inside of a jitted
step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.ranks import ascending_ranks


class CorruptedExample(NamedTuple):
    """Tokens for a language model that predicts each from those before it.

    Attributes:
      tokens: integer `[..., output_length]`.
      where: boolean `[..., output_length]`: the tokens that exist; behind them all are the end of
        text.
      length: integer `[...]`: how many there were to write. Above `output_length`, the last are
        cut off.
      prefix_length: integer `[...]`: the tokens of the first corrupted document with its
        separator, which a prefix language model may see as a whole; 0 where nothing is masked.

    Inputs and targets are the tokens but the last, and but the first; the properties name them.

    Reference: Nijkamp, Hayashi, Xiong, Savarese, Zhou, "CodeGen2: Lessons for Training LLMs on
    Programming and Natural Languages", 2023, arXiv:2305.02309.
    """

    tokens: Array
    where: Array
    length: Array
    prefix_length: Array

    @property
    def inputs(self) -> Array:
        """`[..., output_length - 1]`: what the model reads."""
        return self.tokens[..., :-1]

    @property
    def targets(self) -> Array:
        """`[..., output_length - 1]`: what follows each of the inputs."""
        return self.tokens[..., 1:]

    @property
    def targets_where(self) -> Array:
        """`[..., output_length - 1]`: the targets that exist, and count for the loss."""
        return self.where[..., 1:]


def sample_span_mask(
    key: Array,
    length: int,
    *,
    mask_ratio: ArrayLike,
    mean_span_length: ArrayLike,
    max_spans: int | None = None,
) -> Array:
    r"""Random spans of a sequence that cover a given share of it.

        m = round(r L) masked tokens in n = max(1, round(m / μ)) spans

    All divisions of m tokens into n spans, and all places of n spans that do not touch, are alike
    likely: a span may be first or last. n is lowered where the L - m other tokens could not keep
    the spans apart.

    Args:
      key: a random key.
      length: L, at least 1.
      mask_ratio: r in [0, 1]; may be traced.
      mean_span_length: μ, at least 1; may be traced.
      max_spans: a limit of n, at least 1; spans are longer than μ where it holds. Default: none.

    Returns:
      Boolean `[length]`, exactly m of which are True.

    Raises:
      ValueError: a number out of its range.

    Use it for `corrupt_spans`; `jax.random.bernoulli` masks single tokens. T5 divides alike, but
    begins with a gap and ends with a span, whatever the key: one span is then always the end.

    Cost: two sorts of L random numbers.

    Example:
      >>> draw = lambda key: sample_span_mask(key, 12, mask_ratio=0.5, mean_span_length=3)
      >>> int(jax.jit(draw)(jax.random.key(0)).sum())
      6

    Reference: Nijkamp, Hayashi, Xiong, Savarese, Zhou, "CodeGen2: Lessons for Training LLMs on
    Programming and Natural Languages", 2023, arXiv:2305.02309; the random division is of Raffel et
    al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2019,
    arXiv:1910.10683.
    """
    check_interval(1, jnp.inf, length=length, mean_span_length=mean_span_length)
    check_interval(0, 1, mask_ratio=mask_ratio)
    if max_spans is not None:
        check_interval(1, jnp.inf, max_spans=max_spans)
    of_lengths, of_places = jax.random.split(key)
    masked = jnp.round(jnp.asarray(mask_ratio, jnp.float32) * length).astype(jnp.int32)
    spans = jnp.round(masked / jnp.asarray(mean_span_length, jnp.float32)).astype(jnp.int32)
    spans = jnp.minimum(jnp.maximum(spans, 1), jnp.minimum(masked, length - masked + 1))
    if max_spans is not None:
        spans = jnp.minimum(spans, max_spans)
    begins = _random_subset(of_lengths, spans - 1, masked - 1, length)
    first = jnp.concatenate([jnp.ones(1, bool), begins[:-1]])
    return _placed_spans(of_places, first, masked, spans)


def corrupt_spans(
    tokens: ArrayLike,
    span_mask: ArrayLike,
    *,
    sentinel_ids: Sequence[int] | ArrayLike,
    separator_id: int,
    end_of_mask_id: int,
    end_of_text_id: int,
    output_length: int,
    document_ids: ArrayLike | None = None,
) -> CorruptedExample:
    r"""Moves masked spans behind their document, and leaves sentinels in their places.

        a b c d e f  with b and d e masked   becomes
        a <1> c <2> f <eot> <sep> <1> b <eom> <2> d e <eom>

    A document ends with the end of text. One without a span stays as it is, and has no separator.
    A mask that goes on from one document to the next is two spans, and each document is followed by
    its own spans and counts its own sentinels: nothing leaves its document.

    Args:
      tokens: integer `[length]`, without any of the special ids.
      span_mask: boolean `[length]`, such as of `sample_span_mask`: each run of True is a span.
      sentinel_ids: integer `[sentinels]`, the ids <1>, <2>, ... that the spans of a document are
        given in their order.
      separator_id: <sep>.
      end_of_mask_id: <eom>, where a model is to stop that fills a blank.
      end_of_text_id: <eot>.
      output_length: at least 1. Tokens beyond it are cut off. L + 3 s + 2 is enough for one
        document of L tokens with s spans; each further document takes 2 more.
      document_ids: integer `[length]`; a document is a run of equal numbers. Default: all is one.

    Returns:
      A `CorruptedExample` whose arrays have the length `output_length`. Spans beyond the last
      sentinel are left in their places.

    Raises:
      ValueError: shapes that do not match, special ids of which two are alike, no sentinel, or, of
        a mask that is not traced, more spans in a document than sentinels.
      TypeError: tokens or ids that are not integers, or a mask that is not boolean.

    To have a trained model fill a blank, mask a span of any length in its place and give the model
    the result up to the last sentinel, `a <1> c <eot> <sep> <1>`. `blank_infilling_example` is for
    models that see the context in both directions.

    Cost: O(length + output_length): running sums and six scattered writes.

    Example:
      >>> corrupt = lambda tokens, mask: corrupt_spans(
      ...     tokens, mask, sentinel_ids=[13, 14], separator_id=10, end_of_mask_id=11,
      ...     end_of_text_id=12, output_length=12,
      ... )
      >>> tokens, mask = jnp.array([1, 2, 3, 4]), jnp.array([False, True, True, False])
      >>> example = jax.jit(corrupt)(tokens, mask)
      >>> print(example.tokens)
      [ 1 13  4 12 10 13  2  3 11 12 12 12]
      >>> int(example.length), int(example.prefix_length)
      (9, 5)

    Reference: Nijkamp, Hayashi, Xiong, Savarese, Zhou, "CodeGen2: Lessons for Training LLMs on
    Programming and Natural Languages", 2023, arXiv:2305.02309; the format is that of the models'
    card.
    """
    x = _checked_tokens(tokens)
    sentinels = _checked_sentinels(sentinel_ids)
    _check_distinct(
        sentinel_ids=sentinel_ids,
        separator_id=separator_id,
        end_of_mask_id=end_of_mask_id,
        end_of_text_id=end_of_text_id,
    )
    check_interval(1, jnp.inf, output_length=output_length)
    check_shape(x.shape, span_mask=span_mask)
    mask = jnp.asarray(span_mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"span_mask must be boolean, got {mask.dtype.name}")
    changes = jnp.zeros(len(x) - 1, bool)
    if document_ids is not None:
        documents = jnp.asarray(document_ids)
        check_shape(x.shape, document_ids=documents)
        if not jnp.issubdtype(documents.dtype, jnp.integer):
            raise TypeError(f"document_ids must be integers, got {documents.dtype.name}")
        changes = documents[1:] != documents[:-1]
    edge = jnp.ones(1, bool)
    opens, closes = jnp.concatenate([edge, changes]), jnp.concatenate([changes, edge])

    begins = mask & (opens | ~_shifted(mask, 1))
    number = _within_document(jnp.cumsum(begins) - begins, opens) + begins - 1
    if not isinstance(number, jax.core.Tracer) and int(number.max()) >= len(sentinels):
        raise ValueError(
            f"sentinel_ids must have an id for each of the {int(number.max()) + 1} spans of a "
            f"document, got {len(sentinels)}"
        )
    mask &= number < len(sentinels)
    begins &= mask
    ends = mask & (closes | ~_shifted(mask, -1))
    has_spans = closes & (number >= 0)
    sentinel = sentinels[jnp.clip(number, 0, len(sentinels) - 1)]

    # how many tokens each one leaves in its document, and how many behind the separator
    stays = ~mask | begins
    kept = stays.astype(jnp.int32) + closes + has_spans
    moved = mask.astype(jnp.int32) + begins + ends
    kept_through, moved_before = jnp.cumsum(kept), jnp.cumsum(moved) - moved
    at_opening = moved_before - _within_document(moved_before, opens)
    last = jnp.where(closes, kept_through, jnp.iinfo(jnp.int32).max)
    context_end = jax.lax.cummin(last, reverse=True)
    place = kept_through - kept + at_opening
    moved_place = moved_before + context_end

    written = jnp.full(output_length, end_of_text_id, x.dtype)
    for exists, where, value in (
        (stays, place, jnp.where(begins, sentinel, x)),
        (closes, place + stays, end_of_text_id),
        (has_spans, place + stays + 1, separator_id),
        (begins, moved_place, sentinel),
        (mask, moved_place + begins, x),
        (ends, moved_place + begins + 1, end_of_mask_id),
    ):
        written = written.at[jnp.where(exists, where, output_length)].set(value, mode="drop")
    total = kept_through[-1] + jnp.sum(moved)
    prefix = jnp.where(has_spans[jnp.argmax(closes)], context_end[0], 0)
    return CorruptedExample(
        written, jnp.arange(output_length) < total, total, jnp.minimum(prefix, output_length)
    )


def mixed_objective_example(
    key: Array,
    tokens: ArrayLike,
    *,
    sentinel_ids: Sequence[int] | ArrayLike,
    separator_id: int,
    end_of_mask_id: int,
    end_of_text_id: int,
    output_length: int,
    causal_probability: ArrayLike = 0.5,
    mask_ratio_range: tuple[float, float] = (0.05, 1.0),
    mean_span_length: ArrayLike = 3.0,
    document_ids: ArrayLike | None = None,
) -> CorruptedExample:
    r"""An example of one of two tasks, drawn by chance: to go on, or to fill blanks (CodeGen2).

        with probability p:   the tokens as they are
        otherwise:            `corrupt_spans` of r L of them in spans of mean length μ,
                              r ~ U(mask_ratio_range)

    and the loss is that of the next token for both.

    Args:
      key: a random key.
      tokens: integer `[length]`, without any of the special ids.
      sentinel_ids, separator_id, end_of_mask_id, end_of_text_id, output_length, document_ids: as in
        `corrupt_spans`. There are at most as many spans as sentinels, and longer ones in their
        place.
      causal_probability: p in [0, 1]. Default 0.5, the authors'.
      mask_ratio_range: the least and largest r, in [0, 1]. Default (0.05, 1): the authors draw
        the ratio, from a range that they do not publish.
      mean_span_length: μ at least 1. Default 3, of T5; the authors publish none.

    Returns:
      A `CorruptedExample`; `prefix_length` is 0 for tokens as they are.

    Raises:
      ValueError, TypeError: as `corrupt_spans`, or a number out of its range.

    Use it where one model is to write and to infill; it gives up a little of the first. The model's
    vocabulary has the special ids, too: 256 and up for one of bytes. For a prefix language model
    give `prefix_lm_mask` the `prefix_length`, and leave the prefix out of the loss.

    Cost: that of `sample_span_mask` and `corrupt_spans` for either task, as both examples are made
    and one is taken.

    Example:
      >>> window = jnp.arange(8)
      >>> keys = jax.random.split(jax.random.key(1), 4)
      >>> make = lambda key: mixed_objective_example(
      ...     key, window, sentinel_ids=range(259, 263), separator_id=256, end_of_mask_id=257,
      ...     end_of_text_id=258, output_length=20,
      ... )
      >>> batch = jax.jit(jax.vmap(make))(keys)
      >>> batch.inputs.shape, batch.targets.shape, batch.targets_where.shape
      ((4, 19), (4, 19), (4, 19))

    Reference: Nijkamp, Hayashi, Xiong, Savarese, Zhou, "CodeGen2: Lessons for Training LLMs on
    Programming and Natural Languages", 2023, arXiv:2305.02309.
    """
    check_interval(0, 1, causal_probability=causal_probability)
    low, high = mask_ratio_range
    check_interval(0, 1, mask_ratio_range=np.array([low, high]))
    if low > high:
        raise ValueError(f"mask_ratio_range must be in ascending order, got {mask_ratio_range}")
    x = _checked_tokens(tokens)
    of_task, of_ratio, of_spans = jax.random.split(key, 3)
    mask = sample_span_mask(
        of_spans,
        len(x),
        mask_ratio=jax.random.uniform(of_ratio, minval=low, maxval=high),
        mean_span_length=mean_span_length,
        max_spans=len(_checked_sentinels(sentinel_ids)),
    )
    corrupted = corrupt_spans(
        x,
        mask,
        sentinel_ids=sentinel_ids,
        separator_id=separator_id,
        end_of_mask_id=end_of_mask_id,
        end_of_text_id=end_of_text_id,
        output_length=output_length,
        document_ids=document_ids,
    )
    padding = jnp.full(max(output_length - len(x), 0), end_of_text_id, x.dtype)
    plain = CorruptedExample(
        jnp.concatenate([x, padding])[:output_length],
        jnp.arange(output_length) < len(x),
        jnp.int32(len(x)),
        jnp.int32(0),
    )
    is_causal = jax.random.bernoulli(of_task, causal_probability)
    return jax.tree.map(lambda a, b: jnp.where(is_causal, a, b), plain, corrupted)


def prefix_lm_mask(prefix_lengths: ArrayLike, length: int) -> Array:
    r"""Which tokens a token may see: all of a prefix, and those before it.

        mask[i, j] = j ≤ i  or  j < prefix length

    0 gives the causal mask and `length` that of an encoder.

    Args:
      prefix_lengths: integer `[...]`, from 0 to `length`.
      length: at least 1.

    Returns:
      Boolean `[..., length, length]`, queries by keys. Attention functions take it with an axis for
      the heads, `mask[:, None]`.

    Raises:
      ValueError: a length below 1, or, of an array that is not traced, a prefix out of its range.
      TypeError: prefix lengths that are not integers.

    Use it for `CorruptedExample.prefix_length` and for the context of `blank_infilling_example`. A
    `Transformer` of the architecture "prefix" makes it itself, of its argument `prefix_lengths`.

    Cost: length² booleans for each sequence.

    Example:
      >>> print(prefix_lm_mask(2, 3).astype(int))
      [[1 1 0]
       [1 1 0]
       [1 1 1]]

    Reference: Nijkamp, Hayashi, Xiong, Savarese, Zhou, "CodeGen2: Lessons for Training LLMs on
    Programming and Natural Languages", 2023, arXiv:2305.02309, and Zeng et al., "GLM-130B: An Open
    Bilingual Pre-trained Model", 2022, arXiv:2210.02414.
    """
    check_interval(1, jnp.inf, length=length)
    prefix = jnp.asarray(prefix_lengths)
    if not jnp.issubdtype(prefix.dtype, jnp.integer):
        raise TypeError(f"prefix_lengths must be integers, got {prefix.dtype.name}")
    check_interval(0, length, prefix_lengths=prefix)
    seen = jnp.arange(length) < prefix[..., None]
    return jnp.tri(length, dtype=bool) | seen[..., None, :]


def _random_subset(key: Array, count: Array, among: Array, size: int) -> Array:
    """`count` random ones of the first `among` places, boolean `[size]`."""
    scores = jax.random.uniform(key, (size,))
    ranks, _ = ascending_ranks(scores, where=jnp.arange(size) < among)
    return ranks < count


def _placed_spans(key: Array, first: Array, masked: Array, spans: Array) -> Array:
    """The mask of spans at random places, none of which touch; lengths by their first tokens.

    Args:
      first: boolean `[length]`: which of the masked tokens, written one after another, are the
        first of a span.
      masked: how many masked tokens there are.
      spans: how many spans, at most one more than tokens that are not masked.
    """
    length = len(first)
    slots = _random_subset(key, spans, length - masked + 1, length + 1)
    tokens_before = jnp.nonzero(slots, size=length)[0]
    order = jnp.arange(length)
    places = order + tokens_before[jnp.maximum(jnp.cumsum(first) - 1, 0)]
    places = jnp.where(order < masked, places, length)
    return jnp.zeros(length, bool).at[places].set(True, mode="drop")


def _shifted(mask: Array, by: int) -> Array:
    """The mask of each token's neighbour, False beyond the ends."""
    rolled = jnp.roll(mask, by)
    return rolled.at[0 if by > 0 else -1].set(False)


def _within_document(counts: Array, opens: Array) -> Array:
    """Running counts that begin anew with each document."""
    return counts - jax.lax.cummax(jnp.where(opens, counts, 0))


def _checked_tokens(tokens: ArrayLike) -> Array:
    """The tokens in a type that has room for special ids."""
    x = jnp.asarray(tokens)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {x.dtype.name}")
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"tokens must have shape [length] with a length above 0, got {x.shape}")
    return x.astype(jnp.int32)


def _checked_sentinels(sentinel_ids: Any) -> Array:
    sentinels = sentinel_ids if isinstance(sentinel_ids, Array) else np.asarray(sentinel_ids)
    if sentinels.ndim != 1 or sentinels.size == 0:
        raise ValueError(f"sentinel_ids must have shape [sentinels], got {sentinels.shape}")
    if not jnp.issubdtype(sentinels.dtype, jnp.integer):
        raise TypeError(f"sentinel_ids must be integers, got {sentinels.dtype.name}")
    return jnp.asarray(sentinels, jnp.int32)


def _check_distinct(**special_ids: Any) -> None:
    """Raises where an id is negative, or two are alike; those that are traced pass."""
    check_interval(0, jnp.inf, **special_ids)
    known = [x for x in special_ids.values() if not isinstance(x, jax.core.Tracer)]
    listed = np.concatenate([np.ravel(np.asarray(x)) for x in known]).tolist()
    if len(set(listed)) < len(listed):
        raise ValueError(f"special ids must differ from one another, got {special_ids}")
