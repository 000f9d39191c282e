"""Scaled dot-product attention, which every other attention method is measured against."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_attention_arguments, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.kernels import flash_attention
from jaxref.kernels.implementation import choose_implementation


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    implementation: str | None = None,
) -> Array:
    r"""Softmax attention of queries over keys, averaging the values.

    For each head, with queries Q, keys K and values V as rows,

        Attention(Q, K, V) = softmax(scale · Q Kᵀ + bias) V

    where the softmax runs over the keys that the mask admits. It is `jax.nn.dot_product_attention`
    in shapes and meaning, except that a query without any admitted key gives zeros, with zero
    gradients, where JAX gives the mean of the values.

    Query heads may share key/value heads (grouped-query attention): with `heads = groups ·
    kv_heads`, query head h reads key/value head `h // groups`.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      value: `[batch, k_len, kv_heads, value_dim]`; `value_dim` may differ from `head_dim`.
      bias: added to the scaled logits, broadcastable to `[batch, heads, q_len, k_len]`. An entry
        of -inf masks its key as `mask` does.
      mask: boolean, broadcastable to `[batch, heads, q_len, k_len]`; True where the query may see
        the key. Default: everywhere.
      scale: a number; default `1 / sqrt(head_dim)`.
      is_causal: query i sees the keys j ≤ i only, on top of `mask`, both counted from the start.
      implementation: "xla"; "pallas" or another name of a kernel, which then computes by
        `jaxref.kernels.flash_attention`, a `mask` being part of its bias; or None, for the kernel
        on a TPU where there are 128 queries or more, and XLA elsewhere.

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of `query`, `key` and `value`. Logits,
      softmax and sums are in at least float32.

    Raises:
      ValueError: shapes that do not match, heads that the key/value heads do not divide, or an
        implementation that does not exist or cannot run.
      TypeError: `query`, `key`, `value` or `bias` not floating point, or a `mask` not boolean.

    Use it wherever attention is plain: `jaxref.kernels.flash_attention` is for weights that do not
    fit in memory, `ring_attention` for sequences that do not fit on a device, `linear_attention`
    for those whose square of weights costs too much.

    Cost: O(q_len · k_len · head_dim) time a head, about half of it where causal; by XLA q_len ·
    k_len weights a head kept for the backward pass, by a kernel none.

    By XLA it has derivatives of any kind and order, and is quick on CPU as well. A kernel has
    gradients in reverse mode, once.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> print(dot_product_attention(x, x, x, is_causal=True).round(2).ravel())
      [1.   1.88 2.95]

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; grouped heads
    after Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
    Checkpoints", 2023, arXiv:2305.13245.
    """
    check_attention_arguments(query, key, value, bias=bias, mask=mask)
    dtype = jnp.result_type(query, key, value)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    q_len, k_len = query.shape[1], key.shape[1]
    if scale is None:
        scale = query.shape[3] ** -0.5
    check_shape((), scale=scale)
    if takes_kernel(implementation, query, key, value, bias, suits=q_len >= 128):
        output = flash_attention(
            query,
            key,
            value,
            bias=masked_bias(bias, mask),
            scale=scale,
            is_causal=is_causal,
            implementation=implementation,
        )
        assert isinstance(output, Array)
        return output
    if query.size == 0:
        return jnp.zeros((*query.shape[:3], value.shape[3]), dtype)
    query = (query * scale).astype(dtype)
    # Heads lead from here on, and the length of keys and values is innermost: on CPU this layout
    # saves some 5% against keys and values that lie as the query does. For few queries, as in
    # generation, turning them around takes longer than the products that it serves.
    query = query.transpose(0, 2, 1, 3)
    layout = "bhkd" if q_len < min(32, k_len) else "bhdk"
    key, value = (jnp.einsum(f"bkhd->{layout}", x) for x in (key, value))
    # Causal attention runs in blocks of queries, each over the prefix of the keys that it may see:
    # nearly half of the square is never computed, and what is stays closer to the caches. On CPU
    # that takes 0.9 of the time of the whole square at length 128 and 0.6 at 256. At most eight
    # blocks, so that long sequences stay quick to compile.
    block = max(64, -(-q_len // 8)) if is_causal else q_len
    outputs = []
    for start in range(0, q_len, block):
        rows = slice(start, min(start + block, q_len))
        columns = slice(0, min(rows.stop, k_len) if is_causal else k_len)
        added, sees_a_key = _block_bias(bias, mask, rows, columns, is_causal, compute_dtype(query))
        seen = partial(jax.lax.slice_in_dim, limit_index=columns.stop, axis=layout.index("k"))
        output = _attend(query[:, :, rows], seen(key, 0), seen(value, 0), added, layout)
        outputs.append(output if sees_a_key is None else jnp.where(sees_a_key, output, 0))
    return jnp.concatenate(outputs, axis=2).transpose(0, 2, 1, 3)


def takes_kernel(implementation: str | None, *operands: ArrayLike | None, suits: bool) -> bool:
    """Whether a kernel computes an attention: one that is named, or that suits what is there.

    >>> takes_kernel("pallas_tpu", jnp.zeros(2), suits=False)
    True
    """
    given = [jnp.asarray(x) for x in operands if x is not None]
    chosen = choose_implementation(implementation, *given)
    return chosen.platform != "xla" and (implementation is not None or suits)


def masked_bias(bias: ArrayLike | None, mask: ArrayLike | None) -> ArrayLike | None:
    """A bias that is -inf where `mask` is False, of the shape to which the two broadcast.

    >>> masked_bias(None, jnp.array([True, False])).tolist()
    [0.0, -inf]
    """
    if mask is None:
        return bias
    return jnp.where(mask, jnp.float32(0) if bias is None else bias, -jnp.inf)


def _block_bias(
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    rows: slice,
    columns: slice,
    is_causal: bool,
    dtype: DTypeLike,
) -> tuple[Array | None, Array | None]:
    """What is added to the logits of a block, -inf for a masked key, and which rows see a key.

    One addition rather than a selection, and rows without a key set aside beforehand rather than
    guarded in the softmax: so XLA's CPU backend fuses product, sum and softmax into one pass.
    None stands for nothing to add, and for no row without a key.
    """

    def crop(x):
        x = jnp.asarray(x)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        x = x[:, :, rows] if x.shape[2] > 1 else x
        return x[..., columns] if x.shape[3] > 1 else x

    added = jnp.zeros((1, 1, 1, 1), dtype) if bias is None else crop(bias).astype(dtype)
    if mask is not None:
        added = jnp.where(crop(mask), added, -jnp.inf)
    if is_causal:
        causal = jnp.tri(rows.stop - rows.start, columns.stop, rows.start, dtype=bool)
        added = jnp.where(causal, added, -jnp.inf)
    if bias is None and mask is None:
        return (added if is_causal else None), None
    sees_a_key = jnp.any(added > -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(sees_a_key, added, 0), sees_a_key


def _fold(x: Array, kv_heads: int) -> Array:
    """Moves the groups of heads that share a key head into the rows, ahead of their rows.

    In two steps, which explicitly sharded arrays pass as well.
    """
    batch, heads, rows, columns = x.shape
    groups = heads // kv_heads
    x = x.reshape(batch, kv_heads, groups, rows, columns)
    return x.reshape(batch, kv_heads, groups * rows, columns)


def _unfold(x: Array, heads: int) -> Array:
    """Undoes `_fold`."""
    batch, kv_heads, rows, columns = x.shape
    groups = heads // kv_heads
    x = x.reshape(batch, kv_heads, groups, rows // groups, columns)
    return x.reshape(batch, heads, rows // groups, columns)


def _attend(query: Array, key: Array, value: Array, bias: Array | None, layout: str) -> Array:
    """Attention of `[batch, heads, q_len, head_dim]` over keys and values in a layout of "bhdk".

    The query comes scaled. The sum of the weights divides the output rather than the weights: the
    fewer numbers, and the backward pass of FlashAttention (arXiv:2205.14135) by differentiation.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    product = partial(jnp.einsum, preferred_element_type=compute_dtype(query))
    logits = _unfold(product(f"bhqd,{layout}->bhqk", _fold(query, kv_heads), key), heads)
    if bias is not None:
        logits += bias
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = _fold(weights.astype(value.dtype), kv_heads)
    output = _unfold(product(f"bhqk,{layout}->bhqd", weights, value), heads) / total
    return output.astype(value.dtype)
