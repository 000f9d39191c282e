"""Objectives that cut spans out of a text and ask for them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref.core.checks import check_interval
from jaxref.data import (
    BlankInfillingExample,
    CorruptedExample,
    blank_infilling_example,
    mixed_objective_example,
)
from jaxref.train.evaluation import Evaluation
from jaxref.train.evaluation import evaluate as evaluate_tokens
from jaxref.train.losses import TokenLoss
from jaxref.train.methods.frame import Batch
from jaxref.train.objectives.frame import SPECIAL_TOKENS, Objective, each_row, weighted


def codegen_mixture(
    *,
    token_losses: TokenLoss,
    vocab_size: int,
    causal_probability: float = 0.5,
    mask_ratio_range: tuple[float, float] = (0.05, 1.0),
    mean_span_length: float = 3.0,
    num_sentinels: int = 13,
    document_separator: int | None = 0,
) -> Objective:
    """To go on with a text, or to fill its blanks, which stand behind it
    (`jaxref.data.mixed_objective_example`); measured by the next token of texts without blanks.

    No blank goes over the end of a document, which `document_separator` is the id of.

    Args:
      token_losses: the losses of the section `loss`; given by the program.
      vocab_size: number of ids of the text; given by the program. Further ids follow them.
      causal_probability: of a text without blanks, in [0, 1]. Default 1/2.
      mask_ratio_range: the least and the largest share of tokens in blanks, in [0, 1]. Default 0.05
        and 1.
      mean_span_length: tokens of a blank, at least 1. Default 3.
      num_sentinels: the most blanks, at least 1. Default 13.
      document_separator: an id, or None where a text is one document. Default 0, the byte between
        files.

    Returns:
      The `Objective`.

    Raises:
      ValueError: a number out of range.
    """
    check_interval(1, jnp.inf, num_sentinels=num_sentinels)
    separator, end_of_mask, end_of_text, first_sentinel = range(vocab_size, vocab_size + 4)

    def corrupt(key: Array, tokens: Array) -> CorruptedExample:
        of_task, of_blanks = jax.random.split(key)
        # what is written for each blank needs room
        room = min(3 * num_sentinels + 2, len(tokens) // 2)

        def example(tokens: Array, causal_probability: float) -> CorruptedExample:
            ends = tokens == document_separator
            return mixed_objective_example(
                of_blanks,
                tokens,
                sentinel_ids=range(first_sentinel, first_sentinel + num_sentinels),
                separator_id=separator,
                end_of_mask_id=end_of_mask,
                end_of_text_id=end_of_text,
                output_length=length,
                causal_probability=causal_probability,
                mask_ratio_range=mask_ratio_range,
                mean_span_length=mean_span_length,
                document_ids=None if document_separator is None else jnp.cumsum(ends) - ends,
            )

        length = len(tokens)
        is_causal = jax.random.bernoulli(of_task, causal_probability)
        return jax.tree.map(
            partial(jnp.where, is_causal), example(tokens, 1.0), example(tokens[:-room], 0.0)
        )

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        key, corruption_key = jax.random.split(key)
        example = each_row(corrupt, corruption_key, _windows(batch))
        corrupted = batch | {"inputs": example.inputs, "targets": example.targets}
        return weighted(token_losses(model, corrupted, key), example.targets_where)

    return Objective(losses, special_tokens=num_sentinels + 3)


def glm_blank(
    *,
    token_losses: TokenLoss,
    vocab_size: int,
    short_mask_probability: float = 0.3,
    span_mean: float = 3.0,
    span_ratio: float = 0.15,
) -> Objective:
    """Autoregressive blank infilling by a prefix model: short spans, or all of the end
    (`jaxref.data.blank_infilling_example`).

    Held-out text is measured by what fills its blanks, with blanks that are always the same.

    Args:
      token_losses: the losses of the section `loss`; given by the program.
      vocab_size: number of ids of the text; given by the program. Further ids follow them.
      short_mask_probability: of short spans, in [0, 1]. Default 0.3.
      span_mean: tokens of a short span, above 0. Default 3.
      span_ratio: the least share of tokens in short spans, in (0, 1). Default 0.15.

    Returns:
      The `Objective`.
    """
    mask, gmask, start, end = range(vocab_size, vocab_size + 4)

    def blank(key: Array, tokens: Array) -> BlankInfillingExample:
        spans = span_ratio * len(tokens) / span_mean
        room = min(2 * (2 + round(spans)), len(tokens) // 2)  # for what stands around each span
        return blank_infilling_example(
            key,
            tokens[:-room],
            mask_id=mask,
            gmask_id=gmask,
            start_id=start,
            end_id=end,
            output_length=len(tokens),
            short_mask_probability=short_mask_probability,
            span_mean=span_mean,
            span_ratio=span_ratio,
        )

    def blanked(batch: Batch, key: Array) -> tuple[Batch, Array]:
        example = each_row(blank, key, batch["inputs"])
        read = {
            "inputs": example.tokens,
            "targets": example.targets,
            "prefix_lengths": example.context_length,
            "positions": example.rotary_positions,
        }
        return batch | read, example.where

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        key, blank_key = jax.random.split(key)
        batch, where = blanked(batch, blank_key)
        return weighted(token_losses(model, batch, key), where)

    def evaluate(model: Any, batch: Batch) -> Evaluation:
        is_row = jnp.any(batch["where"], axis=1, keepdims=True)
        batch, where = blanked(batch, jax.random.key(0))
        return evaluate_tokens(model, batch | {"where": where & is_row})

    def asked(tokens: np.ndarray) -> np.ndarray:
        return np.append(tokens[tokens < vocab_size], [gmask, start])

    return Objective(
        losses,
        evaluate=evaluate,
        measure="nats per token of a blank",
        special_tokens=SPECIAL_TOKENS,
        architecture="prefix",
        asked=asked,
    )


def _windows(batch: Batch) -> Array:
    """The tokens that inputs and targets are of, `[rows, length + 1]`."""
    return jnp.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
