"""Attention whose logits cannot grow out of hand: queries and keys normalised."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.attention.dot_product import dot_product_attention
from jaxref.core.checks import check_attention_arguments, check_floating, check_shape
from jaxref.norms import layer_norm


def normalize_query_key(
    query: ArrayLike,
    key: ArrayLike,
    query_scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    *,
    epsilon: float = 1e-6,
) -> tuple[Array, Array]:
    r"""Queries and keys, each standardised over the entries of its head (qk-norm).

        q̂ = g_q · (q - mean(q)) / √(var(q) + ε),   k̂ = g_k · (k - mean(k)) / √(var(k) + ε)

    a layer normalization over `head_dim` without bias, its gain shared by the heads. With gains of
    1 both have a norm of at most √head_dim, whatever the projections before them have grown to.

    Args:
      query: `[..., head_dim]` floating point.
      key: `[..., head_dim]` floating point.
      query_scale, key_scale: the gains g_q and g_k `[head_dim]`. Default: 1.
      epsilon: ε at least 0, added to the variances. Default 1e-6.

    Returns:
      q̂ and k̂, of the shapes and types of `query` and `key`.

    Raises:
      ValueError: a gain that is not of shape `[head_dim]`, or a negative `epsilon`.
      TypeError: an argument that is not floating point.

    Use it where something comes between norm and attention, such as a rotary embedding;
    `query_key_norm_attention` has both in one.

    Cost: a `jaxref.norms.layer_norm` of queries and one of keys, over head_dim.

    Example:
      >>> query, key = normalize_query_key(jnp.array([300.0, -100.0]), jnp.array([2.0, 1.0]))
      >>> print(query, key.round(3))
      [ 1. -1.] [ 1. -1.]

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv:2309.14322, after Dehghani et al., "Scaling Vision Transformers to
    22 Billion Parameters", 2023, arXiv:2302.05442.
    """
    check_floating(query=query, key=key)
    for name, array in (("query", query), ("key", key)):
        if jnp.ndim(array) == 0:
            raise ValueError(f"{name} must have shape [..., head_dim], got a scalar")
    if query_scale is not None:
        check_shape(jnp.shape(query)[-1:], query_scale=query_scale)
    if key_scale is not None:
        check_shape(jnp.shape(key)[-1:], key_scale=key_scale)
    return (
        layer_norm(query, query_scale, epsilon=epsilon),
        layer_norm(key, key_scale, epsilon=epsilon),
    )


def query_key_norm_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    epsilon: float = 1e-6,
) -> Array:
    r"""Attention on normalised queries and keys, so that its logits stay bounded (qk-layernorm).

        softmax(scale · q̂ k̂ᵀ + bias) V,   q̂, k̂ = normalize_query_key(q, k)

    With gains of 1 and the default scale no logit exceeds √head_dim, and rescaling queries or keys
    changes nothing (up to ε). Without it the logits grow in training until the softmax is one-hot,
    which happens at ever lower learning rates in ever larger models.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      value: `[batch, k_len, kv_heads, value_dim]`.
      query_scale, key_scale: gains `[head_dim]`, shared by the heads. Default: 1.
      bias: added to the scaled logits, broadcastable to `[batch, heads, q_len, k_len]`.
      mask: boolean, broadcastable to `[batch, heads, q_len, k_len]`; True where the query may see
        the key.
      scale: a number; default `1 / sqrt(head_dim)`.
      is_causal: query i sees the keys j ≤ i only.
      epsilon: ε at least 0, of the normalization. Default 1e-6.

    Returns:
      `[batch, q_len, heads, value_dim]` as `dot_product_attention` does; zeros for a query without
      any admitted key.

    Raises:
      ValueError: shapes that do not match, or a negative `epsilon`.
      TypeError: an array that is not floating point, or a `mask` that is not boolean.

    Use it to train at high learning rates, or large models, where `dot_product_attention` has
    logits of thousands (see `jaxref.analysis.max_attention_logit`).

    Cost: that of `dot_product_attention`, and a layer norm of queries and of keys; 2 head_dim
    parameters, if it has gains.

    Example:
      >>> x = jnp.array([0.0, 1.0, 1.0, 0.0]).reshape(1, 2, 1, 2)
      >>> print(query_key_norm_attention(x, 1000 * x, x).round(2).ravel())
      [0.06 0.94 0.94 0.06]

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv:2309.14322.
    """
    check_attention_arguments(query, key, value, bias=bias, mask=mask)
    query, key = normalize_query_key(query, key, query_scale, key_scale, epsilon=epsilon)
    return dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=scale, is_causal=is_causal
    )
