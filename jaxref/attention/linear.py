"""Attention in linear time: a kernel of feature maps in place of the exponential."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_attention_arguments, check_shape
from jaxref.core.numerics import compute_dtype

_CHUNK = 64  # queries that see each other directly; about a head's size keeps both parts alike


def elu_plus_one(x: ArrayLike) -> Array:
    r"""The positive feature map of linear attention: elu(x) + 1.

        φ(x) = x + 1  for x > 0,   exp(x)  otherwise

    Args:
      x: `[...]` floating point.

    Returns:
      φ(x) of the shape and type of `x`, positive down to where the exponential underflows. There,
      unlike in `jax.nn.elu(x) + 1`, no digits are lost on the way.

    Use it as `feature_map` of `linear_attention`, whose default it is.

    Cost: elementwise, with one exponential for each entry.

    Example:
      >>> print(elu_plus_one(jnp.array([-1.0, 0.0, 2.0])))
      [0.368 1.    3.   ]

    Reference: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive
    Transformers with Linear Attention", 2020, arXiv:2006.16236.
    """
    x = jnp.asarray(x)
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    feature_map: Callable[[Array], Array] = elu_plus_one,
    bias: None = None,
    mask: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    normalise: bool = True,
) -> Array:
    r"""Attention whose weights are products of features, in time linear in the lengths.

    For each head, with queries q_i, keys k_j and values v_j,

        y_i = Σ_j w_ij v_j / Σ_j w_ij,   w_ij = φ(scale · q_i)ᵀ φ(k_j)
            = φ(q_i)ᵀ S / φ(q_i)ᵀ z,     S = Σ_j φ(k_j) v_jᵀ,   z = Σ_j φ(k_j)

    S and z are sums over all keys or, causal, over the keys j ≤ i. The causal form works in chunks
    of 64 queries: weights within a chunk, and the sums up to the chunk for all keys before it.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      value: `[batch, k_len, kv_heads, value_dim]`.
      feature_map: φ, from `[..., head_dim]` to `[..., features]`, of any size and best not
        negative. Default `elu_plus_one`.
      bias: must be None: there are no logits that it could be added to.
      mask: boolean, broadcastable to `[batch, heads, 1, k_len]`: the keys that exist. It may not
        depend on the query, for then no sum over the keys serves all queries.
      scale: a number. Default 1.
      is_causal: query i sees the keys j ≤ i only, on top of `mask`, both counted from the start.
      normalise: divide by the sum of the weights; without it y_i is the numerator.

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of `query`, `key` and `value`, computed
      in at least float32; zeros for a query without any admitted key, or whose weights all
      underflow.

    Raises:
      ValueError: shapes that do not match, a `bias`, or a `mask` that depends on the query.
      TypeError: an array that is not floating point, or a `mask` that is not boolean.

    Use it for sequences so long that the square of weights of `dot_product_attention` costs too
    much: several times `head_dim`. Its weights are less sharp than those of a softmax.

    Cost: O(T f v) time a head, for lengths T, f features and values of size v; causal, T / 64
    states of f (v + 1) numbers in memory.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> linear_attention(x, x, x, is_causal=True).ravel().tolist()
      [1.0, 1.60, 2.22]

    Reference: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive
    Transformers with Linear Attention", 2020, arXiv:2006.16236.
    """
    if bias is not None:
        raise ValueError("bias must be None: linear attention has no logits to add it to")
    check_attention_arguments(query, key, value, mask=mask)
    result_type = jnp.result_type(query, key, value)
    dtype = compute_dtype(query, key, value)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    if scale is not None:
        check_shape((), scale=scale)
        query = query * scale
    (batch, q_len, heads, _), value_dim = query.shape, value.shape[3]
    query, key = feature_map(query), feature_map(key)
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)  # weighs itself too
    if mask is not None:
        exists = query_independent_mask(mask=mask)
        if exists.shape[2] > 1:  # heads that share keys need not share the mask
            key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
        key = jnp.where(exists, key, 0)
    query = query.reshape(batch, q_len, key.shape[2], -1, query.shape[3])
    if is_causal:
        summed = _causal_sums(query, key, value)
    else:
        state = jnp.einsum("bkhf,bkhv->bhfv", key, value)
        summed = jnp.einsum("bqhgf,bhfv->bqhgv", query, state)
    summed = summed.reshape(batch, q_len, heads, value_dim + 1)
    output, total = summed[..., :-1], summed[..., -1:]
    if normalise:
        output = weighted_average(output, total)
    return output.astype(result_type)


def query_independent_mask(**masks: ArrayLike) -> Array:
    """A mask that is the same for every query, as `[batch or 1, k_len or 1, heads or 1, 1]`.

    Raises:
      ValueError: it depends on the query.

    >>> query_independent_mask(mask=jnp.ones((2, 1, 1, 5), bool)).shape
    (2, 5, 1, 1)
    """
    ((name, mask),) = masks.items()
    mask = jnp.asarray(mask)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[2] > 1:
        raise ValueError(
            f"{name} must have shape [batch, heads, 1, k_len], the same for every query: the sums "
            f"over the keys are shared by the queries; got {tuple(mask.shape)}"
        )
    return mask.transpose(0, 3, 1, 2)


def weighted_average(weighted: Array, total: Array) -> Array:
    """weighted / total, and 0 where the total is.

    Both are divided by the size of the total first, which changes neither value nor derivative, but
    keeps the square of a tiny total out of the backward pass.
    """
    tiny = jnp.finfo(total.dtype).tiny
    exists = jnp.abs(total) > tiny
    size = jax.lax.stop_gradient(jnp.where(exists, total, 1))
    average = (weighted / size) / jnp.where(exists, total / size, 1)
    return jnp.where(exists, average, 0)


def _causal_sums(query: Array, key: Array, value: Array) -> Array:
    """Σ_{j ≤ i} φ(q_i)ᵀ φ(k_j) v_j for features `[batch, length, kv_heads, (groups,) features]`."""
    q_len = query.shape[1]
    chunk = max(1, min(_CHUNK, q_len))

    def chunks(x):
        """[batch, chunks, chunk, ...]: cut at the last query, filled up with zeros."""
        x = x[:, :q_len]
        missing = -(-q_len // chunk) * chunk - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])

    query, key, value = chunks(query), chunks(key), chunks(value)
    states = jnp.einsum("bckhf,bckhv->bchfv", key, value)
    before = jnp.cumsum(jnp.pad(states[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * 3), axis=1)
    weights = jnp.einsum("bcqhgf,bckhf->bchgqk", query, key)
    weights = jnp.where(jnp.tri(chunk, dtype=bool), weights, 0)
    summed = jnp.einsum("bcqhgf,bchfv->bcqhgv", query, before)
    summed += jnp.einsum("bchgqk,bckhv->bcqhgv", weights, value)
    return summed.reshape(summed.shape[0], -1, *summed.shape[3:])[:, :q_len]
