"""Cross-entropy of a linear head in XLA: all at once, by blocks of vocabulary, and of tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.core.numerics import compute_dtype

# A block of logits takes this much, and is never narrower than the width: at 2048 columns it weighs
# no more than a few times `hidden` itself, and its matrix products run at full speed. As the width
# bounds the number of blocks, so it does when the tokens are sharded over many devices.
_BLOCK_BYTES = 32 * 2**20
_MIN_BLOCK_WIDTH = 2048

# Rows of a block of tokens: enough for matrix products at full speed.
_BLOCK_ROWS = 256

Statistics = tuple[Array, Array, Array]
"""Of each row of logits its largest, log Σ exp(l - largest), and that of its id, 0 without one."""


def fits_in_a_block(tokens: int, vocabulary: int) -> bool:
    """Whether logits are so small that nothing is gained by blocks."""
    return _block_width(tokens, vocabulary) == vocabulary


def _block_width(tokens: int, vocabulary: int) -> int:
    """Columns of the vocabulary in a block: what `_BLOCK_BYTES` of float32 logits hold."""
    return min(vocabulary, max(_MIN_BLOCK_WIDTH, _BLOCK_BYTES // (4 * max(tokens, 1))))


def _logits(hidden: Array, kernel: Array) -> Array:
    return jnp.matmul(hidden, kernel, preferred_element_type=compute_dtype(hidden, kernel))


def plain_statistics(hidden: Array, kernel: Array, ids: Array) -> Statistics:
    """The statistics with all logits at once, differentiated by JAX."""
    # Rows of one flat matrix: with more axes XLA's CPU backend transposes the logits' gradient.
    logits = _logits(hidden.reshape(-1, hidden.shape[-1]), kernel)
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    log_sum = jnp.log(jnp.exp(logits - top[..., None]).sum(axis=-1))
    of_id = _take(logits, ids.reshape(-1), 0)
    return top.reshape(ids.shape), log_sum.reshape(ids.shape), of_id.reshape(ids.shape)


def _take(logits: Array, ids: Array, otherwise: Array | float) -> Array:
    """The logit of every token's id, or something else where there is no such logit."""
    inside = (ids >= 0) & (ids < logits.shape[-1])
    column = jnp.where(inside, ids, 0)[..., None]
    return jnp.where(inside, jnp.take_along_axis(logits, column, axis=-1)[..., 0], otherwise)


def statistics(hidden: Array, kernel: Array, ids: Array) -> Statistics:
    """The statistics of the logits `[..., vocabulary]`, from one block of columns at a time."""

    def update(start: Array | int, block: Array, carry: Any) -> Any:
        top, total, of_id = carry
        logits = _logits(hidden, block)
        # A constant: what log Z owes it is in the derivative of the sum.
        new_top = jnp.maximum(top, jax.lax.stop_gradient(logits).max(axis=-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
        return new_top, total, _take(logits, ids - start, of_id)

    zeros = jnp.zeros_like(hidden, compute_dtype(hidden, kernel), shape=ids.shape)
    width = _block_width(ids.size, kernel.shape[1])
    top, total, of_id = _over_blocks(update, kernel, width, (zeros - jnp.inf, zeros, zeros))
    return top, jnp.log(total), of_id


def logit_gradient(
    hidden: Array,
    block: Array,
    ids: Array,
    top: Array,
    log_sum: Array,
    of_log_sum: Array,
    of_id: Array,
) -> Array:
    """The gradient at a block's logits from those of log_sum and of the logit of the id."""
    # Kept apart, top and log_sum give the softmax without the rounding of a large log Z.
    softmax = jnp.exp(_logits(hidden, block) - top[..., None])
    is_id = jnp.arange(block.shape[1]) == ids[..., None]
    scale = of_log_sum * jnp.exp(-log_sum)
    d_logits = scale[..., None] * softmax + jnp.where(is_id, of_id[..., None], 0)
    return d_logits.astype(operand_dtype(hidden, block))


def gradients(
    hidden: Array,
    kernel: Array,
    ids: Array,
    *row_arrays: Array,
    logit_gradient: Callable[..., Array] = logit_gradient,
    precision: jax.lax.Precision | None = None,
) -> tuple[Array, Array]:
    """The gradients of `hidden [..., features]` and `kernel`, from one block at a time.

    `row_arrays` are what `logit_gradient` takes after the ids.
    """
    tokens = tuple(range(ids.ndim))
    dtype = compute_dtype(hidden, kernel)
    matmul = partial(jnp.tensordot, precision=precision, preferred_element_type=dtype)

    def update(start: Array | int, block: Array, carry: Any) -> Any:
        d_hidden, d_kernel = carry
        d_logits = logit_gradient(hidden, block, ids - start, *row_arrays)
        d_hidden += matmul(d_logits, block, axes=(-1, 1))
        d_block = matmul(hidden, d_logits, axes=(tokens, tokens)).astype(kernel.dtype)
        d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, d_block, start, axis=1)
        return d_hidden, d_kernel

    zeros = jnp.zeros_like(hidden, dtype), jnp.zeros_like(kernel)
    width = _block_width(ids.size, kernel.shape[1])
    d_hidden, d_kernel = _over_blocks(update, kernel, width, zeros)
    return d_hidden.astype(hidden.dtype), d_kernel


def _over_blocks(
    update: Callable[[Array | int, Array, Any], Any], kernel: Array, width: int, carry: Any
) -> Any:
    """Folds `update(first column, block, carry)` over blocks; the last may be narrower."""
    whole, rest = divmod(kernel.shape[1], width)

    def step(i: Array, carry: Any) -> Any:
        return update(i * width, jax.lax.dynamic_slice_in_dim(kernel, i * width, width, 1), carry)

    carry = jax.lax.fori_loop(0, whole, step, carry)
    if rest:
        carry = update(whole * width, kernel[:, whole * width :], carry)
    return carry


@jax.custom_vjp
def by_tokens(hidden: Array, kernel: Array, labels: Array, live: Array, z_loss: Array) -> Array:
    """Losses of the rows of `hidden [tokens, features]`; those not `live` get no gradient.

    Both gradients are made in the forward pass, from blocks of rows.
    """
    top, log_sum, of_label = statistics(hidden, kernel, labels)
    log_z = log_sum + top
    return log_sum + (top - of_label) + z_loss * log_z * log_z


def by_tokens_forward(
    hidden: Array, kernel: Array, labels: Array, live: Array, z_loss: Array
) -> Any:
    """The losses, and the gradients of their sum over the live tokens."""

    def update(i: Array, carry: Any) -> Any:
        losses, log_zs, d_hidden, d_kernel = carry
        block, start = _rows(i, hidden, labels, live)
        loss, log_z, d_logits = _loss_gradient(block, kernel, z_loss)
        d_block = jnp.matmul(d_logits, kernel.T, preferred_element_type=dtype)
        d_kernel = _add_product(d_kernel, _fresh(block[0], i, start), d_logits)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return put(losses, loss), put(log_zs, log_z), put(d_hidden, d_block), d_kernel

    dtype = compute_dtype(hidden, kernel)
    per_token = jnp.zeros_like(hidden, dtype, shape=labels.shape)
    carry = per_token, per_token, jnp.zeros_like(hidden, dtype), jnp.zeros_like(kernel, dtype)
    losses, log_zs, *gradients = jax.lax.fori_loop(0, _num_blocks(labels), update, carry)
    return losses, (hidden, kernel, labels, live, z_loss, log_zs, *gradients)


def by_tokens_backward(residuals: Any, cotangent: Array) -> Any:
    """The gradients of the forward pass, scaled; a second pass where cotangents differ."""
    hidden, kernel, labels, live, z_loss, log_zs, d_hidden, d_kernel = residuals
    cotangent = jnp.where(live, cotangent, 0)
    lowest = jnp.finfo(cotangent.dtype).min
    common = jnp.where(live.any(), jnp.max(cotangent, initial=lowest, where=live), 0)
    excess = jnp.where(live, cotangent - common, 0)

    def correct(i: Array, d_kernel: Array) -> Array:
        block, start = _rows(i, hidden, labels, excess)
        _, _, d_logits = _loss_gradient(block, kernel, z_loss)
        return _add_product(d_kernel, _fresh(block[0], i, start), d_logits)

    # No round where all live tokens have the same cotangent. A loop rather than a branch: its
    # carry is changed in place, where a branch would hold the kernel's gradient twice.
    rounds = jnp.where((excess == 0).all(), 0, _num_blocks(labels))
    d_kernel = jax.lax.fori_loop(0, rounds, correct, common * d_kernel)
    d_hidden = cotangent[:, None] * d_hidden
    d_z_loss = jnp.sum(cotangent * log_zs * log_zs)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype), None, None, d_z_loss


by_tokens.defvjp(by_tokens_forward, by_tokens_backward)


def _num_blocks(labels: Array) -> int:
    return -(-labels.size // min(_BLOCK_ROWS, labels.size))


def _rows(i: Array, *arrays: Array) -> tuple[list[Array], Array]:
    """The i-th block of rows of each array, and its first row.

    All blocks have the same size: the last one reaches back into rows of the one before.
    """
    size = min(_BLOCK_ROWS, len(arrays[0]))
    start = jnp.minimum(i * size, len(arrays[0]) - size)
    return [jax.lax.dynamic_slice_in_dim(x, start, size) for x in arrays], start


def _fresh(rows: Array, i: Array, start: Array) -> Array:
    """The rows of the i-th block, those that the block before had too being 0."""
    index = start + jnp.arange(len(rows))
    return jnp.where((index >= i * len(rows))[:, None], rows, 0)


def _loss_gradient(block: list[Array], kernel: Array, z_loss: Array) -> tuple[Array, Array, Array]:
    """Losses and log Z of a block of rows, and the gradient of `weight * loss` at its logits."""
    hidden, labels, weight = block
    logits = _logits(hidden, kernel)
    top = logits.max(axis=-1)
    # The unit axis and the barrier save a second array of this size: XLA's CPU backend would make
    # one of the maxima, and keep the logits beside their gradient.
    total = jnp.exp(logits[:, None] - top[:, None, None]).sum(axis=(1, 2))
    log_z = jnp.log(total) + top
    losses = jnp.log(total) + (top - _take(logits, labels, 0)) + z_loss * log_z * log_z
    logits, losses = jax.lax.optimization_barrier((logits, losses))
    scale = weight * (1 + 2 * z_loss * log_z) / total
    is_label = jnp.arange(kernel.shape[1]) == labels[:, None]
    softmax = scale[:, None] * jnp.exp(logits - top[:, None])
    d_logits = softmax - jnp.where(is_label, weight[:, None], 0)
    return losses, log_z, d_logits.astype(operand_dtype(hidden, kernel))


def _add_product(total: Array, rows: Array, d_logits: Array) -> Array:
    """`total + rowsᵀ d_logits`, a few columns at a time, so that the product needs no array."""
    transposed = jax.lax.optimization_barrier(rows.T)  # once, not for every product
    whole, rest = divmod(total.shape[1], _MIN_BLOCK_WIDTH)

    def add(start: Array | int, width: int, total: Array) -> Array:
        columns = jax.lax.dynamic_slice_in_dim(d_logits, start, width, axis=1)
        product = jnp.matmul(transposed, columns, preferred_element_type=total.dtype)
        old = jax.lax.dynamic_slice_in_dim(total, start, width, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + product, start, axis=1)

    total = jax.lax.fori_loop(
        0, whole, lambda j, total: add(j * _MIN_BLOCK_WIDTH, _MIN_BLOCK_WIDTH, total), total
    )
    return add(whole * _MIN_BLOCK_WIDTH, rest, total) if rest else total


def operand_dtype(hidden: Array, kernel: Array) -> jnp.dtype:
    """The type in which gradients of logits enter matrix products."""
    dtype = jnp.result_type(hidden, kernel)
    # float16 would flush most of the softmax to zero
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
