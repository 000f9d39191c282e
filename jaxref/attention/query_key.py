"""Attention with one learned matrix per head in the place of a query and a key projection."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.attention.entropy import attention_probabilities
from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def query_key_reparameterization(w_query: ArrayLike, w_key: ArrayLike) -> Array:
    r"""The product of query and key projection of each head, all that the scores depend on.

        W_h = W_q,h W_k,hᵀ,    (x W_q,h) · (x' W_k,h) = x W_h x'ᵀ

    Args:
      w_query: `[features, heads, head_dim]` floating point.
      w_key: `[features', kv_heads, head_dim]`, `kv_heads` a divisor of `heads`, query head h being
        with key head `h // (heads / kv_heads)`.

    Returns:
      W `[heads, features, features']` in the common type of both, summed in at least float32.

    Raises:
      ValueError: shapes that do not match.
      TypeError: an array that is not floating point.

    Use it with `query_key_reparameterized_attention` in training with few bits: the two factors,
    each quantized, make each other's values jump; their product, quantized once, does not.

    Cost: features² · head_dim multiplications a head, and features² numbers a head in place of 2
    features · head_dim.

    Example:
      >>> w_query, w_key = jnp.full((1, 1, 2), 2.0), jnp.full((1, 1, 2), 3.0)
      >>> float(query_key_reparameterization(w_query, w_key)[0, 0, 0])
      12.0

    Reference: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    check_floating(w_query=w_query, w_key=w_key)
    w_query, w_key = jnp.asarray(w_query), jnp.asarray(w_key)
    for name, kernel in (("w_query", w_query), ("w_key", w_key)):
        if kernel.ndim != 3:
            raise ValueError(
                f"{name} must have shape [features, heads, head_dim], got {tuple(kernel.shape)}"
            )
    heads, kv_heads = w_query.shape[1], w_key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"w_key must have heads that divide w_query's {heads}, got {kv_heads}")
    check_shape((w_key.shape[0], kv_heads, w_query.shape[2]), w_key=w_key)
    w_key = jnp.repeat(w_key, heads // kv_heads, axis=1)
    product = jnp.einsum(
        "ahe,bhe->hab", w_query, w_key, preferred_element_type=compute_dtype(w_query, w_key)
    )
    return product.astype(jnp.result_type(w_query, w_key))


def query_key_reparameterized_attention(
    x: ArrayLike,
    w_query_key: ArrayLike,
    value: ArrayLike,
    *,
    head_dim: int,
    context: ArrayLike | None = None,
    quantize: Callable[[Array], Array] | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    r"""Attention whose scores come from the tokens and one matrix per head.

        softmax(x W_h cᵀ / √head_dim + bias) V,   c = x unless given

    With W of `query_key_reparameterization` it is plain attention without biases or positions.

    Args:
      x: `[batch, q_len, features]` floating point, the tokens that ask.
      w_query_key: W `[heads, features, features']`, quantized or not.
      value: `[batch, k_len, heads, value_dim]`.
      head_dim: at least 1, the size of the heads that W is made of: the scores are divided by its
        root.
      context: c `[batch, k_len, features']`. Default: `x`.
      quantize: applied to `x W_h` `[batch, q_len, heads, features']`, as the activations of a
        quantized network are. Default: nothing.
      bias, mask, is_causal: as for `dot_product_attention`.

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of `x`, `w_query_key` and `value`,
      computed in at least float32; zeros for a query without any admitted key.

    Raises:
      ValueError: shapes that do not match, or a `head_dim` below 1.
      TypeError: an array that is not floating point, or a `mask` that is not boolean.

    Use it where W is quantized in training; fold W back into two matrices, for
    `dot_product_attention`, where precision is not the matter.

    Cost: features / head_dim times the work of `dot_product_attention` for the scores, and all
    q_len · k_len weights a head in memory.

    Example:
      >>> x = jnp.array([[[0.0], [1.0], [2.0]]])
      >>> w = jnp.ones((1, 1, 1))
      >>> y = query_key_reparameterized_attention(x, w, x[:, :, None], head_dim=1)
      >>> print(y.round(2).ravel())
      [1.   1.58 1.85]

    Reference: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers",
    2023, arXiv:2302.02210.
    """
    check_floating(x=x, w_query_key=w_query_key, value=value)
    check_interval(1, jnp.inf, head_dim=head_dim)
    x, w_query_key, value = jnp.asarray(x), jnp.asarray(w_query_key), jnp.asarray(value)
    context = x if context is None else jnp.asarray(context)
    for name, array in (("x", x), ("context", context)):
        if array.ndim != 3:
            raise ValueError(f"{name} must have shape [batch, length, features], got {array.shape}")
    if w_query_key.ndim != 3:
        raise ValueError(f"w_query_key must have shape [heads, a, b], got {w_query_key.shape}")
    heads = w_query_key.shape[0]
    check_shape((heads, x.shape[2], context.shape[2]), w_query_key=w_query_key)
    check_shape((x.shape[0], *context.shape[1:]), context=context)
    check_shape((*context.shape[:2], heads, *value.shape[3:4]), value=value)
    dtype = jnp.result_type(x, w_query_key, value)
    wide = compute_dtype(x, w_query_key, value)
    query = jnp.einsum("bqa,hac->bqhc", x, w_query_key, preferred_element_type=wide).astype(dtype)
    if quantize is not None:
        query = quantize(query)
    weights = attention_probabilities(
        query,
        context[:, :, None].astype(dtype),
        bias=bias,
        mask=mask,
        scale=head_dim**-0.5,
        is_causal=is_causal,
    )
    y = jnp.einsum("bhqk,bkhe->bqhe", weights, value.astype(dtype), preferred_element_type=wide)
    return y.astype(dtype)
