"""Text of any length from a trained model."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental.multihost_utils import process_allgather

from jaxref.core.checks import check_interval
from jaxref.models import generate


def sample(
    model: Any,
    prompt: np.ndarray,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cache: str = "full",
    key: Array | None = None,
    asked: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Continues a prompt, token by token.

    Each token is drawn by `jaxref.models.sample_tokens` from the model's prediction given the
    tokens in its window. The window holds `max_length` of them: when it is full, it starts again
    with the later half of them, so that each token is read about twice however long the text.

    Args:
      model: a language model of `jaxref.models`.
      prompt: integer `[n]`, at least one token.
      length: number of tokens to draw, at least 1.
      temperature: at least 0; 0 takes the most probable token.
      top_k: how many tokens to choose from; 0 for all.
      top_p: the probability to choose from, in (0, 1]; 1 for all.
      cache: "full" or "staircase", what the window remembers: see `jaxref.models.generate`.
      key: random key; not needed at temperature 0.
      asked: what the model is given of the tokens in its window, at least one more; of a prefix
        model the last is no part of the prefix. Default: the tokens.

    Returns:
      Prompt and continuation, integer `[n + length]`.

    Raises:
      ValueError: an empty prompt, an id that the model does not have, or a number out of range.
    """
    tokens = np.asarray(prompt)
    window = model.config.max_length
    check_request(
        tokens,
        model.config.vocab_size,
        length=length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cache=cache,
    )
    end = tokens.size + length
    room = window if asked is None else window + 1 - asked(tokens[:1]).size
    while tokens.size < end:
        seen = tokens if tokens.size <= room else tokens[-max(room // 2, 1) :]
        prefix_lengths = None
        if asked is not None:
            seen = asked(seen)
            if model.config.architecture == "prefix":
                prefix_lengths = np.array([seen.size - 1])
        count = min(end - tokens.size, window - seen.size + 1)
        padded = np.zeros((1, window), np.int32)  # one shape, one compilation
        padded[0, : seen.size] = seen
        drawn = generate(
            model,
            padded,
            np.array([seen.size]),
            num_tokens=count,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cache=cache,
            key=None if key is None else jax.random.fold_in(key, tokens.size),
            prefix_lengths=prefix_lengths,
        )
        tokens = np.concatenate([tokens, process_allgather(drawn[0], tiled=True)])
    return tokens


def check_request(
    prompt: np.ndarray,
    vocab_size: int,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cache: str = "full",
) -> None:
    """Raises what `sample` raises, without a model.

    Args:
      prompt: integer `[n]`, at least one token.
      vocab_size: what every id of it is to be below.
      length, temperature, top_k, top_p, cache: as for `sample`.

    Raises:
      ValueError: an empty prompt, an id of `vocab_size` or more, or a number out of range.
    """
    check_interval(1, np.inf, length=length)
    check_interval(0, np.inf, temperature=temperature, top_k=top_k)
    check_interval(0, 1, closed="right", top_p=top_p)
    if cache not in ("full", "staircase"):
        raise ValueError(f"cache must be 'full' or 'staircase', got {cache!r}")
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError(f"prompt must be [n] with at least one token, got shape {prompt.shape}")
    check_interval(0, vocab_size - 1, prompt=prompt)
