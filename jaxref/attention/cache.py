"""What attention remembers between the steps of generation."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_shape


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, at their positions.

    Attributes:
      key: `[batch, max_length, kv_heads, head_dim]`.
      value: `[batch, max_length, kv_heads, value_dim]`.
    """

    key: Array
    value: Array


def key_value_cache_init(
    batch: int,
    max_length: int,
    kv_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> KeyValueCache:
    r"""A cache of zeros: no token seen yet.

    Args:
      batch: sequences.
      max_length: positions that it has room for.
      kv_heads: key and value heads.
      head_dim: size of a key.
      value_dim: size of a value. Default: `head_dim`.
      dtype: type of what is stored. Default float32.

    Returns:
      The `KeyValueCache`.

    Raises:
      ValueError: a size below 1.

    Use it before the first `key_value_cache_append` of a generation;
    `jaxref.quantization.staircase_cache_init` takes less memory.

    Cost: max_length · kv_heads · (head_dim + value_dim) numbers a sequence and layer.

    Example:
      >>> key_value_cache_init(2, 16, 4, 8).key.shape
      (2, 16, 4, 8)

    Reference: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019,
    arXiv:1911.02150.
    """
    value_dim = head_dim if value_dim is None else value_dim
    check_interval(1, jnp.inf, batch=batch, max_length=max_length, kv_heads=kv_heads)
    check_interval(1, jnp.inf, head_dim=head_dim, value_dim=value_dim)
    shape = (batch, max_length, kv_heads)
    return KeyValueCache(
        jnp.zeros((*shape, head_dim), dtype), jnp.zeros((*shape, value_dim), dtype)
    )


def key_value_cache_append(
    cache: KeyValueCache, key: ArrayLike, value: ArrayLike, start: ArrayLike
) -> KeyValueCache:
    r"""Writes keys and values at the positions start, start + 1, ... of each sequence.

    Args:
      cache: what is remembered so far.
      key: `[batch, n, kv_heads, head_dim]`, the keys of the next n tokens.
      value: `[batch, n, kv_heads, value_dim]`.
      start: integer `[batch]`, the position of each sequence's first new token.

    Returns:
      The cache with the new entries in the type of the cache. What would lie beyond its length is
      dropped.

    Raises:
      ValueError: shapes that do not match the cache.

    Use it with a mask that admits the keys up to each query's position: sequences of a batch may
    differ in length, and what lies beyond a sequence's end is overwritten by its next tokens.

    Cost: n positions a sequence written in place where `jax.jit` donates the cache; a copy of the
    cache else.

    Example:
      >>> cache = key_value_cache_init(2, 4, 1, 1)
      >>> ones = jnp.ones((2, 1, 1, 1))
      >>> print(key_value_cache_append(cache, ones, ones, jnp.array([0, 2])).key[..., 0, 0])
      [[1. 0. 0. 0.]
       [0. 0. 1. 0.]]

    Reference: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019,
    arXiv:1911.02150.
    """
    batch, n = jnp.shape(key)[:2]
    check_shape((batch, n, *cache.key.shape[2:]), key=key)
    check_shape((batch, n, *cache.value.shape[2:]), value=value)
    check_shape((cache.key.shape[0],), start=start)
    rows = jnp.arange(batch)[:, None]
    columns = jnp.asarray(start)[:, None] + jnp.arange(n)

    def written(stored: Array, new: ArrayLike) -> Array:
        return stored.at[rows, columns].set(jnp.asarray(new, stored.dtype), mode="drop")

    return KeyValueCache(written(cache.key, key), written(cache.value, value))
