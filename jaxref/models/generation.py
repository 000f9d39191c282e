"""Text from a language model, token by token, with what came before remembered."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape


def sample_tokens(
    logits: ArrayLike,
    key: Array | None = None,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int = 0,
    top_p: ArrayLike = 1.0,
) -> Array:
    r"""Draws the next token of each sequence from its logits.

        p = softmax(logits / temperature), restricted to the k most probable tokens, then to the
        fewest most probable ones whose probabilities under p reach top_p, and normalised again

    The most probable token is never excluded. Tokens as probable as the last one that is admitted
    are admitted too.

    Args:
      logits: `[..., vocab_size]` floating point.
      key: random key; not needed at temperature 0.
      temperature: at least 0, broadcastable to `[...]`. 0 takes the most probable token, 1 the
        model's distribution.
      top_k: how many tokens to choose from; 0 for all.
      top_p: the probability to choose from, in (0, 1]; 1 for all.

    Returns:
      Integer `[...]`.

    Raises:
      ValueError: a number out of range, or no key where one is needed.
      TypeError: logits that are not floating point.

    Use a temperature below 1, or top_p (nucleus sampling) near 0.9, for text with fewer slips; 0
    for tasks with one answer.

    Cost: a pass over the vocabulary and a random number for each entry; with `top_k` a partial
    sort, with `top_p` a sort.

    Example:
      >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
      >>> int(sample_tokens(logits, temperature=0.0))
      0
      >>> keys = jax.random.split(jax.random.key(0), 100)
      >>> sorted(set(jax.vmap(lambda key: sample_tokens(logits, key, top_p=0.7))(keys).tolist()))
      [0, 1]

    Reference: Holtzman, Buys, Du, Forbes, Choi, "The Curious Case of Neural Text Degeneration",
    2019, arXiv:1904.09751; top-k after Fan, Lewis, Dauphin, "Hierarchical Neural Story
    Generation", 2018, arXiv:1805.04833.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, temperature=temperature, top_k=top_k)
    check_interval(0, 1, closed="right", top_p=top_p)
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    greedy = jnp.argmax(logits, axis=-1)
    if key is None:
        if isinstance(temperature, jax.core.Tracer) or np.any(np.asarray(temperature, float) > 0):
            raise ValueError("key must be given at a temperature above 0, got None")
        return greedy
    safe = jnp.where(jnp.asarray(temperature) > 0, temperature, 1.0)
    scaled = logits / safe[..., None]
    if top_k and top_k < logits.shape[-1]:
        last = jax.lax.top_k(scaled, top_k)[0][..., -1:]
        scaled = jnp.where(scaled >= last, scaled, -jnp.inf)
    if isinstance(top_p, jax.core.Tracer) or np.any(np.asarray(top_p, float) < 1):
        ordered = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled >= last, scaled, -jnp.inf)
    drawn = jax.random.categorical(key, scaled, axis=-1)
    return jnp.where(jnp.asarray(temperature) > 0, drawn, greedy)


def generate(
    model: Any,
    prompts: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    num_tokens: int,
    temperature: float | Callable[[Array], Array] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Array | None = None,
    cache: str = "full",
    prefix_lengths: ArrayLike | None = None,
    source: ArrayLike | None = None,
    source_where: ArrayLike | None = None,
    **cache_options: Any,
) -> Array:
    r"""Continues each prompt of a batch by `num_tokens` tokens.

    The prompts are read in one pass and their keys and values remembered; then each step reads one
    token per sequence. At temperature 0 the tokens are those of recomputing everything at every
    step. One program is compiled for a model and a shape of prompts, however many tokens are drawn
    and at whatever temperature and `top_p`.

    Args:
      model: a `jaxref.models.Transformer` that is no encoder.
      prompts: integer `[batch, n]`, padded at the end where a prompt is shorter than n.
      lengths: integer `[batch]`, in [1, n]: how many tokens of each prompt are real. Default: n.
      num_tokens: tokens to draw, at least 1; the longest prompt and all of them but the last fit
        in `max_length`.
      temperature, top_k, top_p: as for `sample_tokens`. A temperature may depend on the logits: a
        function of `[batch, vocab_size]` to `[batch]` as a `jax.tree_util.Partial`, whose arrays
        may be others in the next call.
      key: random key; not needed at temperature 0.
      cache: "full" keys and values, or "staircase" for those whose precision falls with age.
      prefix_lengths: integer `[batch]`, of a prefix model: how many tokens of each prompt all may
        see. Default: `lengths`.
      source, source_where: of an encoder-decoder.
      **cache_options: as for `jaxref.quantization.staircase_cache_init`.

    Returns:
      Integer `[batch, num_tokens]`: the continuations.

    Raises:
      ValueError: shapes that do not match, ids that the model does not have, more tokens than the
        model's `max_length`, a number out of range, or a model that cannot go on step by step.

    Use it to complete prompts with a trained model; `sample_tokens` draws a single token, and
    `model.init_cache` and `model.extend` are for other ways to search.

    Cost: a pass over the prompts at once, then one over parameters and cache for each token; a
    cache of the model's max_length positions a sequence.

    Example:
      >>> from jaxref.models import TransformerConfig
      >>> model = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16
      ... ).build(rngs=nnx.Rngs(0))
      >>> prompts = jnp.array([[1, 2, 3], [4, 0, 0]])
      >>> generate(model, prompts, jnp.array([3, 1]), num_tokens=5, temperature=0.0).shape
      (2, 5)

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; Shazeer, "Fast
    Transformer Decoding: One Write-Head is All You Need", 2019, arXiv:1911.02150.
    """
    prompts = np.asarray(prompts)
    config = model.config
    if prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(f"prompts must be [batch, at least one token], got shape {prompts.shape}")
    batch, n = prompts.shape
    lengths = np.full(batch, n) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape {(batch,)}, got {lengths.shape}")
    check_interval(1, n, lengths=lengths)
    where = np.arange(n) < lengths[:, None]
    check_interval(0, config.vocab_size - 1, prompts=np.where(where, prompts, 0))
    check_interval(1, jnp.inf, num_tokens=num_tokens)
    check_interval(0, jnp.inf, top_k=top_k)
    check_interval(0, 1, closed="right", top_p=top_p)
    is_drawn = callable(temperature) or temperature > 0
    if not callable(temperature):
        check_interval(0, jnp.inf, temperature=temperature)
    if lengths.max() + num_tokens - 1 > config.max_length:  # the last token is not read
        raise ValueError(
            f"num_tokens must be at most {config.max_length + 1 - lengths.max()} after a prompt of "
            f"{lengths.max()} tokens, for max_length = {config.max_length}, got {num_tokens}"
        )
    if key is None and is_drawn:
        raise ValueError("key must be given at a temperature above 0, got None")
    if config.architecture == "prefix":
        prefix_lengths = lengths if prefix_lengths is None else np.asarray(prefix_lengths)
        check_shape((batch,), prefix_lengths=prefix_lengths)
        check_interval(0, n, prefix_lengths=prefix_lengths)
    elif prefix_lengths is not None:
        raise ValueError(f"prefix_lengths must be None for architecture {config.architecture!r}")
    graphdef, state = nnx.split(model)
    tokens = _generate(
        graphdef,
        state,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        None if prefix_lengths is None else jnp.asarray(prefix_lengths, jnp.int32),
        num_tokens,
        temperature,
        top_p,
        jax.random.key(0) if key is None else key,
        source,
        source_where,
        top_k=top_k,
        nucleus=top_p < 1,
        cache_kind=cache,
        cache_options=tuple(sorted(cache_options.items())),
    )
    return tokens[:, :num_tokens]


@partial(
    jax.jit, static_argnums=0, static_argnames=("top_k", "nucleus", "cache_kind", "cache_options")
)
def _generate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompts: Array,
    lengths: Array,
    prefix_lengths: Array | None,
    num_tokens: Array,
    temperature: Any,
    top_p: Array,
    key: Array,
    source: Array | None,
    source_where: Array | None,
    *,
    top_k: int,
    nucleus: bool,
    cache_kind: str,
    cache_options: tuple[tuple[str, Any], ...],
) -> Array:
    """The continuations in `[batch, max_length]`, of which the first `num_tokens` are drawn."""
    model: Any = nnx.merge(graphdef, state)
    model.eval()
    batch, n = prompts.shape

    def draw(hidden: Array, step: Array | int) -> Array:
        logits = model.logits(hidden)
        return sample_tokens(
            logits,
            jax.random.fold_in(key, step),
            temperature=temperature(logits) if callable(temperature) else temperature,
            top_k=top_k,
            top_p=top_p if nucleus else 1.0,
        ).astype(jnp.int32)

    cache = model.init_cache(
        batch, kind=cache_kind, source=source, source_where=source_where, **dict(cache_options)
    )
    hidden, cache = model.extend(
        jnp.where(jnp.arange(n) < lengths[:, None], prompts, 0),
        cache,
        where=jnp.arange(n) < lengths[:, None],
        prefix_lengths=prefix_lengths,
    )
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    drawn = jnp.zeros((batch, model.config.max_length), jnp.int32).at[:, 0].set(draw(last, 0))

    def advance(step: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        drawn, cache = carry
        token = jax.lax.dynamic_slice_in_dim(drawn, step - 1, 1, axis=1)
        hidden, cache = model.extend(token, cache)
        token = draw(hidden[:, 0], step)
        return jax.lax.dynamic_update_slice_in_dim(drawn, token[:, None], step, axis=1), cache

    return jax.lax.fori_loop(1, num_tokens, advance, (drawn, cache))[0]
