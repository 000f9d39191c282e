"""Language modelling that leaves some tokens out, so that no passage can be learned by heart."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.losses.cross_entropy import softmax_cross_entropy

Strategy = Literal["hash", "static", "random"]

_STRATEGIES = ("hash", "static", "random")
_MULTIPLIER = np.uint32(0x01000193)  # of the rolling hash; odd, so that no token is lost


def goldfish_mask(
    tokens: ArrayLike,
    *,
    k: int = 4,
    strategy: Strategy = "hash",
    context_width: int = 13,
    seed: int = 2971215073,
    start: int = 0,
    key: Array | None = None,
) -> Array:
    r"""Which tokens are targets, where about one of k is not.

        hash     token i is dropped where H(x_{i-h+1}, ..., x_i) < 1/k,   h = context_width
        static   every k-th token is dropped, from the position `start` on
        random   each token is dropped with probability 1/k

    with H a hash of a window of tokens to [0, 1): wherever a passage is repeated, in whatever
    document and at whatever offset, the same of its tokens are dropped, from its h-th on. The first
    h - 1 tokens of a sequence are kept.

    Args:
      tokens: integer `[..., length]`, the targets themselves.
      k: at least 2; 1/k of the tokens is dropped. Default 4.
      strategy: "hash" (the default, the paper's), "static", or "random".
      context_width: h at least 1. Default 13: narrow windows would always drop what follows a
        common phrase.
      seed: of the hash, in [0, 2³²).
      start: at least 0, for "static".
      key: for "random".

    Returns:
      Boolean `[..., length]`, True for tokens to keep.

    Raises:
      ValueError: a number out of its range, an unknown strategy, tokens without an axis, or no key
        for "random".
      TypeError: tokens that are not integers.

    Use it as the `where` of any loss of tokens, that of `linear_softmax_cross_entropy` for one,
    which forms no logits. Dropped tokens are still read. To train on as many targets as before,
    take k / (k - 1) times the steps.

    Cost: `context_width` passes over the tokens for "hash", one for the others; nothing of the
    vocabulary's size.

    Example:
      >>> tokens = jnp.arange(8)
      >>> print(goldfish_mask(tokens, k=4, strategy="static", start=1).astype(int))
      [1 0 1 1 1 0 1 1]

    Reference: Hans, Wen, Jain, Kirchenbauer, Kazemi, Singhania, Singh, Somepalli, Geiping, Bhatele,
    Goldstein, "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs",
    2024, arXiv:2406.10209.
    """
    check_interval(2, jnp.inf, k=k)
    check_interval(1, jnp.inf, context_width=context_width)
    check_interval(0, 2**32 - 1, seed=seed)
    check_interval(0, jnp.inf, start=start)
    x = jnp.asarray(tokens)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {x.dtype.name}")
    if x.ndim == 0:
        raise ValueError("tokens must have shape [..., length], got ()")
    length = x.shape[-1]
    if strategy == "static":
        place = jnp.arange(length) - start
        return jnp.broadcast_to((place < 0) | (place % k != 0), x.shape)
    if strategy == "random":
        if key is None:
            raise ValueError("key must be given where strategy is 'random'")
        return ~jax.random.bernoulli(key, 1 / k, x.shape)
    if strategy != "hash":
        raise ValueError(f"strategy must be one of {_STRATEGIES}, got {strategy!r}")
    before = context_width - 1
    padded = jnp.pad(x.astype(jnp.uint32), [(0, 0)] * (x.ndim - 1) + [(before, 0)])

    def roll(hashed: Array, first: Array) -> tuple[Array, None]:
        token = jax.lax.dynamic_slice_in_dim(padded, first, length, axis=-1)
        return hashed * _MULTIPLIER + token + 1, None

    hashed, _ = jax.lax.scan(roll, jnp.zeros_like(padded[..., :length]), jnp.arange(context_width))
    dropped = _mixed(hashed ^ jnp.uint32(seed)) < jnp.uint32(2**32 // k)
    return ~dropped | (jnp.arange(length) < before)


def goldfish_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    k: int = 4,
    strategy: Strategy = "hash",
    context_width: int = 13,
    seed: int = 2971215073,
    start: int = 0,
    key: Array | None = None,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Next-token cross-entropy without the tokens that `goldfish_mask` drops (goldfish loss).

        L = Σ_i G_i (-log p(x_i | x_<i)) / Σ_i G_i,   G = `goldfish_mask`

    A model that was never shown some tokens of a passage has to guess them, and goes astray there
    when it recites it.

    Args:
      logits: `[..., length, vocabulary]` floating point.
      labels: x, integer ids `[..., length]`. One that is out of the vocabulary gives NaN where it
        is kept.
      k, strategy, context_width, seed, start, key: as in `goldfish_mask`.
      where: boolean, broadcastable to `labels`: the tokens that count. Default: all.

    Returns:
      `[..., length]` losses in the type of `logits`, 0 for tokens that are dropped or do not count,
      and which tokens these are not: the mean is the sum of the first over the count of the second,
      or of `masked_mean`.

    Raises:
      ValueError: shapes that do not match, or as `goldfish_mask`.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use it where a text comes again and again, or must not be recited; with few repetitions and a
    large text `softmax_cross_entropy` learns a little faster.

    Cost: that of a softmax over the vocabulary for every token, the dropped ones included, and
    `goldfish_mask`.

    Example:
      >>> losses, kept = goldfish_loss(jnp.zeros((4, 8)), jnp.arange(4), k=2, strategy="static")
      >>> print(losses.round(3), kept.astype(int))
      [0.    2.079 0.    2.079] [0 1 0 1]

    Reference: Hans, Wen, Jain, Kirchenbauer, Kazemi, Singhania, Singh, Somepalli, Geiping, Bhatele,
    Goldstein, "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs",
    2024, arXiv:2406.10209.
    """
    check_floating(logits=logits)
    check_shape(jnp.shape(logits)[:-1], labels=labels)
    check_broadcastable(jnp.shape(labels), where=where)
    kept = goldfish_mask(
        labels,
        k=k,
        strategy=strategy,
        context_width=context_width,
        seed=seed,
        start=start,
        key=key,
    )
    if where is not None:
        kept &= jnp.asarray(where, bool)
    return jnp.where(kept, softmax_cross_entropy(logits, labels), 0.0), kept


def _mixed(x: Array) -> Array:
    """Every bit of a uint32 spread over all of them (the last step of MurmurHash3)."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
