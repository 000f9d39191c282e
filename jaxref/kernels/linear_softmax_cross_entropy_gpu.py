"""Cross-entropy of a linear head on a GPU: tiles of logits that never leave the chip.

A program multiplies one tile of logits. The forward kernel keeps three numbers per row of a tile,
which are merged afterwards. Backward, a kernel computes the tiles of a block of columns again and
writes their gradient in the type of the weights; XLA multiplies it by the weights and by `hidden`.
A sum over the vocabulary for whole rows of `hidden`, or over the tokens for whole columns of the
weights, is larger than what a program can hold: beside a tile of logits it would be read and
written for every tile. So a block of the gradient is written once instead, logits are multiplied
out twice in all, and 8/6 of the plain matrix products suffice.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxref.kernels import linear_softmax_cross_entropy_xla as xla
from jaxref.kernels.block_sizes import tuned_block
from jaxref.kernels.implementation import kernel_result

# Rows, columns and features of the tiles that a program multiplies: what eight warps hold.
_BLOCK = (128, 128, 64)

# Blocks of rows whose programs run side by side, so that they share columns in the second cache.
_GROUP = 16


def statistics(hidden: Array, kernel: Array, ids: Array, interpret: bool) -> xla.Statistics:
    """The statistics of the logits of `hidden [tokens, features]`, at least one token."""
    tokens, vocabulary = len(hidden), kernel.shape[1]
    block = _block(hidden, kernel)
    parts = pl.cdiv(vocabulary, block[1])

    def program(hidden_ref, kernel_ref, ids_ref, top_ref, sum_ref, of_id_ref):
        i, j = _place(pl.cdiv(tokens, block[0]), parts)
        rows, row_exists = _range(i, block[0], tokens)
        _, column_exists = _range(j, block[1], vocabulary)
        logits = _logits(hidden_ref, kernel_ref, i, j, block)
        logits = jnp.where(column_exists[None, :], logits, -jnp.inf)
        top = jnp.max(logits, axis=1)
        total = jnp.sum(jnp.exp(logits - top[:, None]), axis=1)
        plgpu.store(top_ref.at[j, rows], top, mask=row_exists)
        plgpu.store(sum_ref.at[j, rows], total, mask=row_exists)
        ids = plgpu.load(ids_ref.at[rows], mask=row_exists, other=-1)
        is_id = _places(j, block[1])[None, :] == ids[:, None]
        of_id = jnp.sum(jnp.where(is_id, logits, 0), axis=1)
        mine = (ids >= j * block[1]) & (ids < (j + 1) * block[1])
        plgpu.store(of_id_ref.at[rows], of_id, mask=row_exists & mine)

    of_part = kernel_result((parts, tokens), jnp.float32, hidden, kernel, ids)
    of_row = kernel_result((tokens,), jnp.float32, hidden, kernel, ids)
    tops, sums, of_id = _call(
        program,
        (hidden, kernel, ids),
        (of_part, of_part, of_row),
        grid=pl.cdiv(tokens, block[0]) * parts,
        interpret=interpret,
        name="linear_softmax_statistics",
    )
    top = tops.max(axis=0)
    log_sum = jnp.log(jnp.sum(sums * jnp.exp(tops - top), axis=0))
    # where there is no such column, no program has written
    return top, log_sum, jnp.where((ids >= 0) & (ids < vocabulary), of_id, 0)


def gradients(
    hidden: Array,
    kernel: Array,
    ids: Array,
    top: Array,
    log_sum: Array,
    of_log_sum: Array,
    of_id: Array,
    interpret: bool,
) -> tuple[Array, Array]:
    """The gradients of `hidden` and `kernel` from those of log_sum and of the logit of the id."""
    scale = of_log_sum * jnp.exp(-log_sum)
    exact = jnp.result_type(hidden, kernel) == jnp.float32
    return xla.gradients(
        hidden,
        kernel,
        ids,
        top,
        scale,
        of_id,
        logit_gradient=partial(_logit_gradient, interpret=interpret),
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


def _logit_gradient(
    hidden: Array,
    kernel: Array,
    ids: Array,
    top: Array,
    scale: Array,
    of_id: Array,
    *,
    interpret: bool,
) -> Array:
    """The gradient at the logits `hidden @ kernel`, in the type that its products are taken in."""
    tokens, width = len(hidden), kernel.shape[1]
    block = _block(hidden, kernel)
    counts = pl.cdiv(tokens, block[0]), pl.cdiv(width, block[1])

    def program(hidden_ref, kernel_ref, ids_ref, top_ref, scale_ref, of_id_ref, out_ref):
        i, j = _place(*counts)
        rows, row_exists = _range(i, block[0], tokens)
        columns, column_exists = _range(j, block[1], width)
        logits = _logits(hidden_ref, kernel_ref, i, j, block)
        ids, top, scale, of_id = (
            plgpu.load(ref.at[rows], mask=row_exists, other=0)[:, None]
            for ref in (ids_ref, top_ref, scale_ref, of_id_ref)
        )
        is_id = _places(j, block[1])[None, :] == ids
        d_logits = scale * jnp.exp(logits - top) + jnp.where(is_id, of_id, 0)
        exists = row_exists[:, None] & column_exists[None, :]
        plgpu.store(out_ref.at[rows, columns], d_logits.astype(out_ref.dtype), mask=exists)

    operands = hidden, kernel, ids, top, scale, of_id
    (d_logits,) = _call(
        program,
        operands,
        (kernel_result((tokens, width), xla.operand_dtype(hidden, kernel), *operands),),
        grid=counts[0] * counts[1],
        interpret=interpret,
        name="linear_softmax_logit_gradient",
    )
    return d_logits


def _call(
    program: Callable[..., None],
    operands: tuple[Array, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    *,
    grid: int,
    interpret: bool,
    name: str,
) -> tuple[Array, ...]:
    params = plgpu.CompilerParams(num_warps=8, num_stages=3)
    call = pl.pallas_call(
        program,
        grid=(grid,),
        out_shape=results,
        compiler_params=params,
        interpret=interpret,
        name=name,
    )
    return tuple(call(*operands))


def _block(hidden: Array, kernel: Array) -> tuple[int, int, int]:
    """Rows, columns and features of a program's tiles."""
    tuned = tuned_block("linear_softmax_cross_entropy", (*hidden.shape, kernel.shape[1]))
    if tuned is not None:
        return tuned[0], tuned[1], tuned[2]
    rows, columns, features = _BLOCK
    if jnp.result_type(hidden, kernel) == jnp.float32:  # twice the room, and no matrix unit
        rows, features = max(16, rows // 2), max(16, features // 2)
    return rows, columns, features


def _place(row_blocks: int, column_blocks: int) -> tuple[Array, Array]:
    """The blocks of rows and of columns that are this program's tile.

    Programs go down a group of rows before they go on to the next columns.
    """
    group, within = jnp.divmod(pl.program_id(0), _GROUP * column_blocks)
    size = jnp.minimum(row_blocks - group * _GROUP, _GROUP)
    column, row = jnp.divmod(within, size)
    return group * _GROUP + row, column


def _logits(hidden_ref, kernel_ref, i: Array, j: Array, block: tuple[int, int, int]) -> Array:
    """A tile of logits. Rows and columns that do not exist are 0."""
    (tokens, features), vocabulary = hidden_ref.shape, kernel_ref.shape[1]
    dtype = jnp.result_type(hidden_ref.dtype, kernel_ref.dtype)
    rows, row_exists = _range(i, block[0], tokens)
    columns, column_exists = _range(j, block[1], vocabulary)

    def add(k: Array, total: Array) -> Array:
        at, exists = _range(k, block[2], features)
        x_exists = row_exists[:, None] & exists[None, :]
        x = plgpu.load(hidden_ref.at[rows, at], mask=x_exists, other=0)
        w_exists = exists[:, None] & column_exists[None, :]
        w = plgpu.load(kernel_ref.at[at, columns], mask=w_exists, other=0)
        return total + jax.lax.dot(
            x.astype(dtype),
            w.astype(dtype),
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    zeros = jnp.zeros(block[:2], jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(features, block[2]), add, zeros)


def _range(block: Array, size: int, end: int) -> tuple[pl.Slice | slice, Array]:
    """The places of a block, and whether each exists."""
    return pl.ds(block * size, size), _places(block, size) < end


def _places(block: Array, size: int) -> Array:
    return block * size + jnp.arange(size)
