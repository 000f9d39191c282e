"""The entropy of attention: how widely each query looks, its bounds, and how to steer it."""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.attention.dot_product import dot_product_attention
from jaxref.core.checks import (
    canonical_axes,
    check_attention_arguments,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def attention_probabilities(
    query: ArrayLike,
    key: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    r"""The weights with which each query of `dot_product_attention` averages the values.

        P = softmax(scale · Q Kᵀ + bias)

    over the keys that the mask admits.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      bias: added to the scaled logits, broadcastable to `[batch, heads, q_len, k_len]`. An entry
        of -inf masks its key as `mask` does.
      mask: boolean, broadcastable to `[batch, heads, q_len, k_len]`; True where the query may see
        the key. Default: everywhere.
      scale: a number; default `1 / sqrt(head_dim)`.
      is_causal: query i sees the keys j ≤ i only, on top of `mask`.

    Returns:
      P `[batch, heads, q_len, k_len]` in the common type of `query` and `key`, computed in at least
      float32. Masked keys have weight 0, and a query without any admitted key zeros throughout.

    Raises:
      ValueError: shapes that do not match, or heads that the key heads do not divide.
      TypeError: `query`, `key` or `bias` not floating point, or a `mask` not boolean.

    Use it where the weights themselves are looked at or penalised (`attention_entropy`);
    `dot_product_attention` needs less memory for the average alone.

    Cost: O(q_len · k_len · head_dim) time a head, where causal too, and all q_len · k_len weights a
    head in memory.

    Example:
      >>> query = jnp.log(jnp.array([9.0, 3.0])).reshape(1, 2, 1, 1)
      >>> key = jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1)
      >>> print(attention_probabilities(query, key, is_causal=True).round(2)[0, 0])
      [[1.   0.  ]
       [0.25 0.75]]

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.
    """
    check_attention_arguments(query, key, key, bias=bias, mask=mask)
    dtype = jnp.result_type(query, key)
    query, key = jnp.asarray(query, dtype), jnp.asarray(key, dtype)
    batch, q_len, heads, head_dim = query.shape
    k_len, kv_heads = key.shape[1:3]
    if scale is None:
        scale = head_dim**-0.5
    check_shape((), scale=scale)
    query = (query * scale).astype(dtype)
    query = query.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum(
        "bqhgd,bkhd->bhgqk", query, key, preferred_element_type=compute_dtype(query)
    ).reshape(batch, heads, q_len, k_len)
    admitted = jnp.asarray(True if mask is None else mask)
    if bias is not None:
        logits += bias
        admitted &= jnp.asarray(bias) > -jnp.inf
    if is_causal:
        admitted &= jnp.tri(q_len, k_len, dtype=bool)
    log_probabilities = masked_log_softmax(logits, axis=-1, where=admitted)
    return jnp.where(admitted, jnp.exp(log_probabilities), 0.0).astype(dtype)


def _entropy(probabilities: Array, axis: int, where: ArrayLike | None) -> Array:
    """`attention_entropy` in at least float32."""
    wide = probabilities.astype(compute_dtype(probabilities))
    counts = wide > 0 if where is None else where & (wide > 0)
    return jnp.sum(jnp.where(counts, -wide * jnp.log(jnp.where(counts, wide, 1.0)), 0.0), axis=axis)


def attention_entropy(
    probabilities: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    r"""The entropy of each query's attention weights, in nats.

        E = -Σ_j p_j log p_j,     0 log 0 = 0

    It is log n for a query that sees n keys alike, and 0 for one that sees a single key. Entropies
    that collapse to 0 go with unstable training; ones that stay near their maximum mark heads that
    select nothing.

    Args:
      probabilities: `[..., k_len]` floating point, at least 0, such as `attention_probabilities`
        gives; masked keys may have weight 0 or be excluded.
      axis: the axis of the keys.
      where: boolean, broadcastable to `probabilities`: the keys that exist. Default: all.

    Returns:
      E, `probabilities` without `axis`, in its type, computed in at least float32: `[batch, heads,
      q_len]` for the weights of an attention. 0 for a query without keys. The gradient with respect
      to a weight of 0 is taken as 0, where the limit is infinite.

    Raises:
      ValueError: `axis` out of range, or a mask that does not broadcast.
      TypeError: `probabilities` are not floating point.

    Use it to watch the training of a transformer, where it falls as training becomes unstable.
    `entropy_profile` sums it up by layer and head, and `attention_entropy_regularizer` keeps it in
    a band.

    Cost: one pass over the weights, with a logarithm for each.

    Example:
      >>> print(attention_entropy(jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])).round(3))
      [0.693 0.   ]

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296; Jha, Reagen, "Entropy-Guided Attention for Private LLMs",
    2025, arXiv:2501.03489.
    """
    check_floating(probabilities=probabilities)
    probabilities = jnp.asarray(probabilities)
    (axis,) = canonical_axes(axis, probabilities.ndim)
    check_broadcastable(probabilities.shape, where=where)
    return _entropy(probabilities, axis, where).astype(probabilities.dtype)


def attention_entropy_lower_bound(logit_norm: ArrayLike, num_keys: ArrayLike) -> Array:
    r"""The least entropy that the softmax of T logits of a given norm can have.

        E ≥ log(1 + (T - 1) β) + σ √(T (T - 1)) β / (1 + (T - 1) β),   β = exp(-σ √(T / (T - 1)))

    for logits of Euclidean norm at most σ; reached by `σ √(T / (T - 1)) (e_1 - 1/T)`. It falls
    exponentially in σ, so that bounding the spectral norms of the query and key projections keeps
    the entropy from collapsing: σ ≤ ‖W_K W_Qᵀ‖₂ ‖X Xᵀ‖₂, times the scale of the softmax.

    Args:
      logit_norm: σ at least 0, floating point: the norm of a query's logits, scale included.
      num_keys: T, integers at least 1, of a shape that broadcasts with `logit_norm`.

    Returns:
      The bound in nats, of the broadcast shape and the type of `logit_norm`, computed in at least
      float32; 0 for a single key, log T for σ = 0.

    Raises:
      ValueError: a `logit_norm` below 0 or a `num_keys` below 1, where they are no tracers.
      TypeError: `logit_norm` is not floating point, or `num_keys` are not integers.

    Use it to read a spectral norm in terms of `attention_entropy`, which is what the weights of one
    input have.

    Cost: one formula for each norm; no weights are needed.

    Example:
      >>> print(attention_entropy_lower_bound(jnp.array([0.0, 5.0]), 4).round(3))
      [1.386 0.063]

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """
    check_floating(logit_norm=logit_norm)
    if not jnp.issubdtype(jnp.result_type(num_keys), jnp.integer):
        raise TypeError(f"num_keys must be integers, got {jnp.result_type(num_keys).name}")
    check_interval(0, jnp.inf, logit_norm=logit_norm)
    check_interval(1, jnp.inf, num_keys=num_keys)
    logit_norm = jnp.asarray(logit_norm)
    norm = logit_norm.astype(compute_dtype(logit_norm))
    others = jnp.asarray(num_keys, norm.dtype) - 1
    ratio = 1 + 1 / jnp.maximum(others, 1)  # T / (T - 1)
    weight = others * jnp.exp(-norm * jnp.sqrt(ratio))  # (T - 1) β, 0 for one key
    bound = jnp.log1p(weight) + norm * jnp.sqrt(ratio) * weight / (1 + weight)
    return bound.astype(logit_norm.dtype)


def entropy_guided_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    log_temperature: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    r"""Attention whose heads learn, for each position, how widely they look.

        softmax(scale · Q Kᵀ / τ + bias) V,   τ = exp(log_temperature)

    with a temperature τ for each head and query position. A larger τ raises the entropy of the
    weights, a smaller one sharpens them; at τ = 1 it is `dot_product_attention`.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      value: `[batch, k_len, kv_heads, value_dim]`.
      log_temperature: `[heads, q_len]` floating point, learned from 0 on. In decoding, its columns
        at the positions of the queries. `query / τ` has to be a finite number of the query's type.
      bias: added to the scaled logits, broadcastable to `[batch, heads, q_len, k_len]`.
      mask: boolean, broadcastable to `[batch, heads, q_len, k_len]`; True where the query may see
        the key.
      scale: a number; default `1 / sqrt(head_dim)`.
      is_causal: query i sees the keys j ≤ i only.

    Returns:
      `[batch, q_len, heads, value_dim]` as `dot_product_attention` does; zeros for a query without
      any admitted key.

    Raises:
      ValueError: shapes that do not match.
      TypeError: an array that is not floating point, or a `mask` that is not boolean.

    Use it with `attention_entropy_regularizer` in a transformer without activations in its MLP or
    without normalization, whose early heads otherwise see all keys alike. The weights that the
    regularizer takes are `attention_probabilities` of a query divided by τ.

    Cost: that of `dot_product_attention`, and q_len parameters a head.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> log_temperature = jnp.array([[0.0, 5.0, -5.0]])
      >>> print(entropy_guided_attention(x, x, x, log_temperature).round(2).ravel())
      [2.58 2.01 3.  ]

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489.
    """
    check_attention_arguments(query, key, value, bias=bias, mask=mask)
    check_floating(log_temperature=log_temperature)
    query, log_temperature = jnp.asarray(query), jnp.asarray(log_temperature)
    check_shape((query.shape[2], query.shape[1]), log_temperature=log_temperature)
    inverse = jnp.exp(-log_temperature.astype(compute_dtype(query)))
    query = (query * inverse.T[:, :, None]).astype(query.dtype)
    return dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=scale, is_causal=is_causal
    )


def _entropy_by_query(
    probabilities: ArrayLike, context_size: int | None, where: ArrayLike | None
) -> tuple[Array, float]:
    """Checked: the entropies `[layers, batch, heads, q_len]` of a model, and their maximum."""
    check_floating(probabilities=probabilities)
    probabilities = jnp.asarray(probabilities)
    if probabilities.ndim != 5:
        raise ValueError(
            "probabilities must have shape [layers, batch, heads, q_len, k_len], "
            f"got {probabilities.shape}"
        )
    check_broadcastable(probabilities.shape[:-1], where=where)
    context_size = probabilities.shape[-1] if context_size is None else context_size
    check_interval(1, jnp.inf, context_size=context_size)
    return _entropy(probabilities, -1, None), math.log(context_size)


def attention_entropy_regularizer(
    probabilities: ArrayLike,
    threshold_weights: ArrayLike,
    *,
    tolerance: float = 0.2,
    coefficient: float = 1e-5,
    context_size: int | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    where: ArrayLike | None = None,
) -> Array:
    r"""A penalty on attention heads whose entropy is far from a level that they learn.

        d = E - w E_max,     penalty = d² where |d| > tolerance · E_max, else 0

    with E the `attention_entropy` of a query and E_max = log(context_size). The penalties are
    summed over batch and queries, averaged over heads and layers, and multiplied by `coefficient`.
    Within the tolerance a head is free, and neither it nor its w feels a gradient.

    Args:
      probabilities: `[layers, batch, heads, q_len, k_len]` floating point, the weights of all
        layers' attention.
      threshold_weights: w, broadcastable to `[layers, heads]`, floating point, in [0, 1] by
        meaning. Learned; the authors start from 0.5 and share `[heads]` over the layers.
      tolerance: in [0, 1]. Default 0.2.
      coefficient: at least 0. Default 1e-5, for the sum over batch and queries.
      context_size: the number of keys that stands for E_max. Default: `k_len`, for causal weights
        too, whose early queries cannot reach it.
      reduction: "sum" over batch and queries, or "mean" over those that `where` admits.
      where: boolean, broadcastable to `[layers, batch, heads, q_len]`: the queries that count.
        Default: all.

    Returns:
      The penalty, a scalar in at least float32, to add to the loss; 0 where no query counts.

    Raises:
      ValueError: shapes that do not match, a hyperparameter out of its range, or an unknown
        `reduction`.
      TypeError: an array that is not floating point.

    Use it to keep the heads of a network with few nonlinearities from seeing all keys alike.
    `query_key_norm_attention` prevents the opposite, weights that become one-hot.

    Cost: one pass over the weights of all layers, which have to be in memory: layers · heads ·
    q_len · k_len numbers an example.

    Example:
      >>> uniform = jnp.full((1, 1, 2, 3, 4), 0.25)  # entropy E_max: 0.5 and 0.1 E_max too high
      >>> penalty = attention_entropy_regularizer(uniform, jnp.array([0.5, 0.9]), coefficient=1.0)
      >>> print(penalty.round(4), (3 * (0.5 * jnp.log(4)) ** 2 / 2).round(4))
      0.7207 0.7207

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489.
    """
    check_floating(threshold_weights=threshold_weights)
    check_interval(0, 1, tolerance=tolerance)
    check_interval(0, jnp.inf, coefficient=coefficient)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    entropy, maximum = _entropy_by_query(probabilities, context_size, where)
    check_broadcastable((entropy.shape[0], entropy.shape[2]), threshold_weights=threshold_weights)
    weights = jnp.broadcast_to(threshold_weights, (entropy.shape[0], entropy.shape[2]))
    deviation = entropy - weights[:, None, :, None] * maximum
    penalty = jnp.where(jnp.abs(deviation) > tolerance * maximum, jnp.square(deviation), 0.0)
    if reduction == "mean":
        by_head = masked_mean(penalty, axis=(1, 3), where=where)
    else:
        by_head = jnp.sum(penalty, axis=(1, 3), where=where)
    return coefficient * jnp.mean(by_head)


class EntropyProfile(NamedTuple):
    """What `entropy_profile` says of a model's attention.

    Attributes:
      collapse_fraction: `[layers]`, the share of heads whose mean entropy is near 0.
      overload_fraction: `[layers]`, the share of heads whose mean entropy is near its maximum.
      per_head: `[layers, heads]`, the mean entropies.
    """

    collapse_fraction: Array
    overload_fraction: Array
    per_head: Array


def entropy_profile(
    probabilities: ArrayLike,
    *,
    collapse: float = 0.05,
    overload: float = 0.75,
    context_size: int | None = None,
    where: ArrayLike | None = None,
) -> EntropyProfile:
    r"""Which attention heads of a model look nowhere but at one key, and which look everywhere.

    A head's mean entropy over batch and queries is collapsed below `collapse · E_max` and
    overloaded above `overload · E_max`, with E_max = log(context_size). Without nonlinearities the
    deep layers of a transformer collapse, and its early ones are overloaded.

    Args:
      probabilities: `[layers, batch, heads, q_len, k_len]` floating point, the weights of all
        layers' attention.
      collapse, overload: in [0, 1]. Default 0.05 and 0.75.
      context_size: the number of keys that stands for E_max. Default: `k_len`.
      where: boolean, broadcastable to `[layers, batch, heads, q_len]`: the queries that count.
        Default: all.

    Returns:
      The `EntropyProfile`, in at least float32.

    Raises:
      ValueError: shapes that do not match, or a hyperparameter out of its range.
      TypeError: `probabilities` are not floating point.

    Use it on some batches now and then in training; `attention_entropy` keeps the single queries.

    Cost: one pass over the weights of all layers, which have to be in memory: layers · heads ·
    q_len · k_len numbers an example.

    Example:
      >>> uniform, one_hot = jnp.full((1, 1, 1, 4, 4), 0.25), jnp.eye(4).reshape(1, 1, 1, 4, 4)
      >>> profile = entropy_profile(jnp.concatenate([uniform, one_hot], axis=2))
      >>> print(profile.overload_fraction, profile.collapse_fraction)
      [0.5] [0.5]

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489.
    """
    check_interval(0, 1, collapse=collapse, overload=overload)
    entropy, maximum = _entropy_by_query(probabilities, context_size, where)
    per_head = masked_mean(entropy, axis=(1, 3), where=where)
    return EntropyProfile(
        jnp.mean(per_head < collapse * maximum, axis=-1, dtype=per_head.dtype),
        jnp.mean(per_head > overload * maximum, axis=-1, dtype=per_head.dtype),
        per_head,
    )


def scaled_fused_ffn(x: ArrayLike, kernel: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> Array:
    r"""A feed-forward sublayer without activation, its two matrices fused, with learned scales.

        y = β x + (1/α) x W,     W = W_up W_down

    The residual connection is the first summand. The scales take the place of a layer
    normalization: they keep training stable without dividing by statistics of the data.

    Args:
      x: `[..., features]` floating point, the residual stream.
      kernel: W `[features, features]` floating point.
      alpha: α, a number other than 0, learned from 1 on, one a layer.
      beta: β, a number, learned from 1 on, one a layer.

    Returns:
      y of the shape and type of `x`, summed in at least float32.

    Raises:
      ValueError: `kernel` is not square of the size of the features, or α or β not a number.
      TypeError: an argument that is not floating point.

    Use it where nonlinearities are dear, as on encrypted data; it works with
    `entropy_guided_attention` as the only nonlinearity.

    Cost: features² + 2 parameters and features² multiplications a token, an eighth of an MLP with
    hidden layers of 4 features.

    Example:
      >>> print(scaled_fused_ffn(jnp.array([1.0, 2.0]), jnp.eye(2), 2.0, 0.5))
      [1. 2.]

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489.
    """
    check_floating(x=x, kernel=kernel, alpha=alpha, beta=beta)
    check_shape((), alpha=alpha, beta=beta)
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("x must have shape [..., features], got a scalar")
    check_shape((x.shape[-1],) * 2, kernel=kernel)
    product = jnp.matmul(x, jnp.asarray(kernel, x.dtype), preferred_element_type=compute_dtype(x))
    return jnp.asarray(beta * x + product / alpha, x.dtype)
