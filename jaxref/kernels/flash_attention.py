"""Attention whose logits exist a block at a time, forward and backward."""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_attention_arguments,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import varying_alike
from jaxref.kernels import flash_attention_xla
from jaxref.kernels.block_sizes import tuned_block
from jaxref.kernels.flash_attention_tile import Operands, Options
from jaxref.kernels.implementation import choose_implementation

SAVEABLE = "flash_attention"
"""The name of attention's result, for `jax.checkpoint_policies.save_only_these_names`."""


def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    soft_cap: float | None = None,
    is_causal: bool = False,
    query_segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    block_mask: ArrayLike | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    return_logsumexp: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    r"""Softmax attention in memory that grows with the length, not with its square.

    For each head, with queries Q, keys K and values V as rows and i, j positions,

        S = cap(scale · Q Kᵀ) + bias - slope · |i - j|,   cap(x) = c tanh(x / c)
        Attention(Q, K, V) = softmax(S) V,   L = logsumexp(S)

    where softmax and logsumexp run over the keys that a query sees. Blocks of S update a running
    maximum and sum and are dropped; the backward pass makes them again from L, and no other sum is
    kept. It is `jax.nn.dot_product_attention` in shapes and meaning, grouped-query heads included:
    with `heads = groups · kv_heads`, query head h reads key/value head `h // groups`.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      value: `[batch, k_len, kv_heads, value_dim]`; `value_dim` may differ from `head_dim`.
      bias: added to the capped logits, broadcastable to `[batch, heads, q_len, k_len]`. An entry
        of -inf hides its key.
      alibi_slopes: `[heads]` floating point, such as `jaxref.attention.alibi_slopes`: ALiBi's
        biases, made where they are used.
      scale: a number; default `1 / sqrt(head_dim)`.
      soft_cap: c above 0, a Python number; the logits then stay within ±c. Default: no cap.
      is_causal: query i sees the keys j ≤ i only, both counted from the start.
      query_segment_ids: integer `[batch, q_len]`. A query sees the keys of its own segment, as
        where several documents share a row.
      key_segment_ids: integer `[batch, k_len]`, given together with those of the queries.
      block_mask: boolean `[heads, ceil(q_len / block_q), ceil(k_len / block_k)]`, the blocks of S
        that take part; the kernels compute no others. It wants `block_q` and `block_k`.
      block_q, block_k: queries and keys in a block of the kernels, at least 1: multiples of 128 on
        a TPU, powers of two from 16 on a GPU. By default as measured
        (`block_sizes`), else by the kernels' own rule.
      return_logsumexp: return L as well.
      implementation: who computes, see `jaxref.kernels.implementation`: None, for Pallas on a TPU
        and XLA elsewhere; "xla"; "pallas", "pallas_tpu" or "pallas_gpu"; or one of these with
        "_interpret".

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of `query`, `key` and `value`; with
      `return_logsumexp` also L `[batch, heads, q_len]` in float32 (float64 for such inputs), which
      has gradients like the output. A query that sees no key gives zeros, -inf in L, and no
      gradient.

    Raises:
      ValueError: shapes that do not match, heads that the key/value heads do not divide, segments
        of one side alone, a mask of blocks without their sizes, a size or cap out of range, or an
        implementation that does not exist or cannot run.
      TypeError: an array that is not of the type above.

    Logits, softmax and sums are in at least float32; operands of matrix products have the inputs'
    type. Where logits are of 1e4 the rounding of L in float32 is felt in gradients, by 5e-4 of
    their size. Gradients reach query, key, value, bias, slopes and scale, in reverse mode
    (`jax.grad`) and once. That of a bias is made by itself: where it is not used, nothing is spent
    on it. It is as large as the bias, of course, which for long sequences is better made of slopes
    and segments.

    Spread over devices, XLA's implementation goes anywhere; a kernel goes into `jax.shard_map`,
    over batch and heads. Use it for long sequences, in training above all; for short ones on CPU
    `jaxref.attention.dot_product_attention` is as good, and takes any mask.

    Cost: q_len · k_len · (head_dim + value_dim) multiplications a head, 2.5 times that backward
    (3.5 in kernels), half if causal; kept beside the arrays is a number a query.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> output, logsumexp = flash_attention(x, x, x, is_causal=True, return_logsumexp=True)
      >>> print(output.round(2).ravel(), logsumexp.round(2).ravel())
      [1.   1.88 2.95] [1.   4.13 9.05]

    Reference: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning", 2023, arXiv:2307.08691; ALiBi: Press, Smith, Lewis, "Train Short, Test Long:
    Attention with Linear Biases Enables Input Length Extrapolation", 2021, arXiv:2108.12409.
    """
    check_attention_arguments(query, key, value, bias=bias)
    dtype = jnp.result_type(query, key, value)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch, q_len, heads, head_dim = query.shape
    k_len = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    check_shape((), scale=scale)
    if soft_cap is not None:
        check_interval(0, jnp.inf, closed="right", soft_cap=soft_cap)
        soft_cap = float(soft_cap)
    if block_q is not None:
        check_interval(1, jnp.inf, block_q=block_q)
    if block_k is not None:
        check_interval(1, jnp.inf, block_k=block_k)
    if bias is not None:
        bias = jnp.asarray(bias)
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if alibi_slopes is not None:
        check_floating(alibi_slopes=alibi_slopes)
        check_shape((heads,), alibi_slopes=alibi_slopes)
        alibi_slopes = jnp.asarray(alibi_slopes, compute_dtype(query))
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("query_segment_ids and key_segment_ids must be given together")
    if block_mask is not None:
        if block_q is None or block_k is None:
            raise ValueError(
                "block_mask must come with block_q and block_k, the size of its blocks"
            )
        check_shape((heads, -(-q_len // block_q), -(-k_len // block_k)), block_mask=block_mask)
        if jnp.result_type(block_mask) != jnp.bool_:
            raise TypeError(f"block_mask must be boolean, got {jnp.result_type(block_mask).name}")
        block_mask = jnp.asarray(block_mask)
    given = [x for x in (query, key, value, bias, alibi_slopes) if x is not None]
    chosen = choose_implementation(implementation, *given)
    if query.size == 0:
        output = jnp.zeros((*query.shape[:3], value.shape[3]), dtype)
        logsumexp = jnp.full((batch, heads, q_len), -jnp.inf, compute_dtype(query))
    else:
        if block_q is None and block_k is None and chosen.platform != "xla":
            block_q, block_k = tuned_block("flash_attention", query.shape[1:]) or (None, None)
        options = Options(is_causal, soft_cap, block_q, block_k, chosen.interpret)
        leaves, structure = jax.tree.flatten(
            Operands(
                (query * scale).astype(dtype),
                key,
                value,
                bias,
                alibi_slopes,
                checked_segments((batch, q_len), query_segment_ids=query_segment_ids),
                checked_segments((batch, k_len), key_segment_ids=key_segment_ids),
                block_mask,
            )
        )
        operands = jax.tree.unflatten(structure, varying_alike(*leaves))
        output, logsumexp = _attend(chosen.platform, options, operands)
    return (output, logsumexp) if return_logsumexp else output


def checked_segments(shape: tuple[int, int], **segments: ArrayLike | None) -> Array | None:
    """Segment ids, given by the name of their argument, as int32 of that shape; None stays.

    >>> checked_segments((1, 2), key_segment_ids=jnp.array([[0, 1]]))
    Array([[0, 1]], dtype=int32)
    """
    ((name, ids),) = segments.items()
    if ids is None:
        return None
    check_shape(shape, **segments)
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise TypeError(f"{name} must be integers, got {jnp.result_type(ids).name}")
    return jnp.asarray(ids, jnp.int32)


def module_of(platform: str) -> ModuleType:
    """The `forward`, `backward` and `bias_gradient` of a platform; Pallas loads on first use.

    >>> module_of("xla").__name__
    'jaxref.kernels.flash_attention_xla'
    """
    if platform == "tpu":
        from jaxref.kernels import flash_attention_tpu

        return flash_attention_tpu
    if platform == "gpu":
        from jaxref.kernels import flash_attention_gpu

        return flash_attention_gpu
    return flash_attention_xla


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(platform: str, options: Options, operands: Operands) -> tuple[Array, Array]:
    """The output and the logsumexp of the logits."""
    return module_of(platform).forward(operands, options)


def _attend_forward(platform: str, options: Options, operands: Operands) -> Any:
    output, logsumexp = saveable(*_attend(platform, options, operands))
    return (output, logsumexp), (operands, output, logsumexp)


def saveable(output: Array, logsumexp: Array) -> tuple[Array, Array]:
    """What the backward pass takes of attention, by the name of it in policies of `jax.checkpoint`:
    where that is saved, attention is not computed again.

    >>> saveable(jnp.ones(2), jnp.zeros(1))[0].shape
    (2,)
    """
    return checkpoint_name(output, SAVEABLE), checkpoint_name(logsumexp, SAVEABLE)


def row_sums(
    output: Array, logsumexp: Array, cotangent: Array, of_logsumexp: ArrayLike
) -> tuple[Array, Array]:
    """What `backward` takes of the rows, whatever part of their keys it is given: the logsumexp of
    all keys, and `delta`, the sum of output times cotangent less the gradient of the logsumexp.
    Both are 0 for a query that sees no key.

    >>> x = jnp.ones((1, 1, 1, 2))
    >>> [y.item() for y in row_sums(x, jnp.full((1, 1, 1), 3.0), x, 0.5)]
    [3.0, 1.5]
    """
    dtype = logsumexp.dtype
    delta = jnp.einsum("bqhv,bqhv->bhq", output.astype(dtype), cotangent.astype(dtype))
    sees_a_key = logsumexp > -jnp.inf
    delta = jnp.where(sees_a_key, delta - of_logsumexp, 0)
    return jnp.where(sees_a_key, logsumexp, 0), delta


def _attend_backward(platform: str, options: Options, residuals: Any, cotangents: Any) -> Any:
    """The gradient of a logit is its weight times what `delta` is taken from: the gradient of the
    weight, and that of the logsumexp, whose derivative the weight is."""
    operands, output, logsumexp = residuals
    cotangent, of_logsumexp = cotangents
    given = operands, options, cotangent, *row_sums(output, logsumexp, cotangent, of_logsumexp)
    module = module_of(platform)
    d_query, d_key, d_value, d_slopes = module.backward(*given)
    d_bias = None
    if operands.bias is not None:
        d_bias = module.bias_gradient(*given).astype(operands.bias.dtype)
    return (Operands(d_query, d_key, d_value, d_bias, d_slopes, None, None, None),)


_attend.defvjp(_attend_forward, _attend_backward)
