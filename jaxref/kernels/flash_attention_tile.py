"""What the implementations of flash attention share: the arithmetic of one tile of the logits.

A tile is a block of queries against a block of keys. The functions work with queries along either
axis of it: positions, biases and statistics come in a shape that broadcasts against the tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Operands(NamedTuple):
    """The arrays of an attention, in the layout of the public function, with the query scaled.

    Attributes:
      query: `[batch, q_len, heads, head_dim]`.
      key, value: `[batch, k_len, kv_heads, head_dim or value_dim]`, of the query's type.
      bias: four axes, each of 1 or as long as in `[batch, heads, q_len, k_len]`.
      slopes: `[heads]` float32.
      query_segments, key_segments: int32 `[batch, q_len]` and `[batch, k_len]`.
      block_mask: boolean `[heads, q_blocks, k_blocks]`.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None
    slopes: Array | None
    query_segments: Array | None
    key_segments: Array | None
    block_mask: Array | None


class Options(NamedTuple):
    """What is known when a program is traced; a block size of None is for the kernel to choose."""

    is_causal: bool
    soft_cap: float | None
    block_q: int | None
    block_k: int | None
    interpret: bool


def product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The product of two matrices that contracts an axis of each, summed in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def tile_logits(
    products: Array,
    q_at: Array,
    k_at: Array,
    options: Options,
    *,
    lengths: tuple[int | None, int | None] = (None, None),
    bias: Array | None = None,
    slope: Array | None = None,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    keep: Array | None = None,
) -> tuple[Array, Array | None]:
    """The logits of a tile, -inf for what is not seen, and their derivative by the products.

    Args:
      products: of queries and keys.
      q_at, k_at: positions of the queries and of the keys.
      options: cap and causality.
      lengths: how many queries and keys there are, where the tile may reach past them.
      bias, slope, query_segments, key_segments: those of the tile.
      keep: boolean, what of the tile takes part.

    Returns:
      Logits, and the derivative where it is not 1 everywhere, else None.
    """
    derivative = None
    logits = products
    if options.soft_cap is not None:
        bent = jnp.tanh(products * (1 / options.soft_cap))
        logits, derivative = options.soft_cap * bent, 1 - bent * bent
    if bias is not None:
        logits += bias
    if slope is not None:
        logits -= slope * jnp.abs(q_at - k_at).astype(logits.dtype)
    q_len, k_len = lengths
    conditions = [
        k_at <= q_at if options.is_causal else None,
        q_at < q_len if q_len is not None else None,
        k_at < k_len if k_len is not None else None,
        query_segments == key_segments if query_segments is not None else None,
        keep,
    ]
    for condition in conditions:
        if condition is not None:
            logits = jnp.where(condition, logits, -jnp.inf)
    return logits, derivative


def online_softmax(
    top: Array, total: Array, logits: Array, axis: int
) -> tuple[Array, Array, Array, Array]:
    """Takes a tile into the running maximum and sum of weights of its queries.

    Returns:
      The new maximum and sum, the tile's weights relative to that maximum, and the factor by which
      what was summed before has shrunk.
    """
    new_top = jnp.maximum(top, jnp.max(logits, axis=axis, keepdims=True))
    peak = jnp.where(new_top > -jnp.inf, new_top, 0)  # no key seen yet: all weights are exp(-inf)
    weights = jnp.exp(logits - peak)
    shrink = jnp.exp(top - peak)
    return new_top, total * shrink + jnp.sum(weights, axis=axis, keepdims=True), weights, shrink


def finish_softmax(top: Array, total: Array) -> tuple[Array, Array]:
    """What to divide the sum of weighted values by, and the logsumexp: 1, -inf for no key."""
    sees_a_key = total > 0
    divisor = jnp.where(sees_a_key, total, 1)
    return divisor, jnp.where(sees_a_key, top + jnp.log(divisor), -jnp.inf)


def logit_gradient(
    weights: Array, value_products: Array, delta: Array, derivative: Array | None
) -> tuple[Array, Array]:
    """The gradients of a tile's logits and of its products, from those of the weights."""
    gradient = weights * (value_products - delta)
    return gradient, gradient if derivative is None else gradient * derivative
