"""Cross-entropy of a linear head on a TPU: tiles of logits that live in its fast memory alone.

A step of each kernel multiplies a block of tokens, whole in its features, by a block of columns.
The forward kernel folds tile after tile of a block of tokens into its statistics. Backward, tiles
are computed again, by one kernel that sums over the vocabulary for the gradient of `hidden`, and by
another that sums over the tokens for that of the weights: 10/6 of the plain matrix products, and no
array larger than the gradients themselves.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxref.kernels.block_sizes import tuned_block
from jaxref.kernels.implementation import kernel_result
from jaxref.kernels.linear_softmax_cross_entropy_xla import Statistics
from jaxref.kernels.row_function import next_multiple

# Rows and columns of a tile of logits at most, and half of them in float32, where the compiler has
# products in parts beside it. Larger blocks are fetched less often.
_BLOCK = (1024, 512)

# Features of a matrix product. The compiler writes out every one, and takes its time.
_FEATURES = 512

# What all blocks of a step may take, and what the compiler may use for them and for tiles of
# logits. The smallest fast memory, that of a TPU v7x, has 64 MiB.
_BLOCK_BYTES = 44 * 2**20
_MEMORY_BYTES = 58 * 2**20


def statistics(hidden: Array, kernel: Array, ids: Array, interpret: bool) -> Statistics:
    """The statistics of the logits of `hidden [tokens, features]`, at least one token."""
    hidden, kernel = _supported(hidden), _supported(kernel)
    (tokens, features), vocabulary = hidden.shape, kernel.shape[1]
    rows, columns = _block(
        hidden, kernel, features * 2 * hidden.dtype.itemsize, features * 2 * kernel.dtype.itemsize
    )

    def step(hidden_ref, kernel_ref, ids_ref, top_ref, sum_ref, of_id_ref, logits_ref):
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _():
            top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            of_id_ref[...] = jnp.zeros(of_id_ref.shape, jnp.float32)

        column = _place(j, (rows, columns), 1)
        logits = _logits(hidden_ref, kernel_ref, logits_ref)
        is_id = column == ids_ref[...]
        of_id_ref[...] += jnp.sum(jnp.where(is_id, logits, 0), axis=1, keepdims=True)
        if vocabulary % columns:
            logits = jnp.where(column < vocabulary, logits, -jnp.inf)
        top = top_ref[...]
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        block_sum = jnp.sum(jnp.exp(logits - new_top), axis=1, keepdims=True)
        top_ref[...] = new_top
        sum_ref[...] = sum_ref[...] * jnp.exp(top - new_top) + block_sum

        @pl.when(j == pl.num_programs(1) - 1)
        def _():
            sum_ref[...] = jnp.log(sum_ref[...])

    ids = ids[:, None]
    row = pl.BlockSpec((rows, 1), lambda i, j: (i, 0))
    top, log_sum, of_id = pl.pallas_call(
        step,
        grid=(pl.cdiv(tokens, rows), pl.cdiv(vocabulary, columns)),
        in_specs=[
            pl.BlockSpec((rows, features), lambda i, j: (i, 0)),
            pl.BlockSpec((features, columns), lambda i, j: (0, j)),
            row,
        ],
        out_specs=[row] * 3,
        out_shape=[kernel_result((tokens, 1), jnp.float32, hidden, kernel, ids)] * 3,
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(hidden, kernel, products=1),
        interpret=interpret,
        name="linear_softmax_statistics",
    )(hidden, kernel, ids)
    return top[:, 0], log_sum[:, 0], of_id[:, 0]


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
    types = hidden.dtype, kernel.dtype
    hidden, kernel = _supported(hidden), _supported(kernel)
    scale = of_log_sum * jnp.exp(-log_sum)
    row_arrays = tuple(x[:, None] for x in (ids, top, scale, of_id))
    d_hidden = _hidden_gradient(hidden, kernel, row_arrays, interpret)
    d_kernel = _kernel_gradient(hidden, kernel, row_arrays, interpret)
    return d_hidden.astype(types[0]), d_kernel.astype(types[1])


def _hidden_gradient(
    hidden: Array, kernel: Array, row_arrays: tuple[Array, ...], interpret: bool
) -> Array:
    """`d_logits kernelᵀ`, summed up over the blocks of the vocabulary."""
    (tokens, features), vocabulary = hidden.shape, kernel.shape[1]
    dtype = jnp.result_type(hidden, kernel)
    rows, columns = _block(
        hidden,
        kernel,
        features * (4 * hidden.dtype.itemsize + 4),
        features * 2 * kernel.dtype.itemsize,
    )

    def step(hidden_ref, kernel_ref, *refs):
        *row_refs, out_ref, logits_ref, total_ref = refs
        j = pl.program_id(1)
        logits = _logits(hidden_ref, kernel_ref, logits_ref)
        column = _place(j, (rows, columns), 1)
        d_logits = _logit_gradient(logits, column, row_refs)
        if vocabulary % columns:
            d_logits = jnp.where(column < vocabulary, d_logits, 0)
        d_logits = d_logits.astype(dtype)

        def add(at):
            weights = kernel_ref[at, :]
            if vocabulary % columns:  # what fills up a block may be NaN
                weights = jnp.where(_place(j, weights.shape, 1) < vocabulary, weights, 0)
            total_ref[:, at] += _dot(d_logits, weights, 1, 1)

        _accumulate(add, total_ref, out_ref, j, features)

    row = pl.BlockSpec((rows, 1), lambda i, j: (i, 0))
    block = pl.BlockSpec((rows, features), lambda i, j: (i, 0))
    return pl.pallas_call(
        step,
        grid=(pl.cdiv(tokens, rows), pl.cdiv(vocabulary, columns)),
        in_specs=[block, pl.BlockSpec((features, columns), lambda i, j: (0, j))] + [row] * 4,
        out_specs=block,
        out_shape=kernel_result(hidden.shape, hidden.dtype, hidden, kernel, *row_arrays),
        scratch_shapes=[
            pltpu.VMEM((rows, columns), jnp.float32),
            pltpu.VMEM((rows, features), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(hidden, kernel, products=2),
        interpret=interpret,
        name="linear_softmax_hidden_gradient",
    )(hidden, kernel, *row_arrays)


def _kernel_gradient(
    hidden: Array, kernel: Array, row_arrays: tuple[Array, ...], interpret: bool
) -> Array:
    """`hiddenᵀ d_logits`, summed up over the blocks of tokens."""
    (tokens, features), vocabulary = hidden.shape, kernel.shape[1]
    dtype = jnp.result_type(hidden, kernel)
    rows, columns = _block(
        hidden,
        kernel,
        features * 2 * hidden.dtype.itemsize,
        features * (4 * kernel.dtype.itemsize + 4),
        outer=1,
    )

    def step(hidden_ref, kernel_ref, *refs):
        *row_refs, out_ref, logits_ref, total_ref = refs
        i = pl.program_id(1)
        logits = _logits(hidden_ref, kernel_ref, logits_ref)
        column = _place(pl.program_id(0), (rows, columns), 1)
        d_logits = _logit_gradient(logits, column, row_refs)
        if tokens % rows:
            d_logits = jnp.where(_place(i, (rows, columns), 0) < tokens, d_logits, 0)
        d_logits = d_logits.astype(dtype)

        def add(at):
            x = hidden_ref[:, at]
            if tokens % rows:  # what fills up a block may be NaN
                x = jnp.where(_place(i, x.shape, 0) < tokens, x, 0)
            total_ref[at, :] += _dot(x, d_logits, 0, 0)

        _accumulate(add, total_ref, out_ref, i, features)

    row = pl.BlockSpec((rows, 1), lambda j, i: (i, 0))
    block = pl.BlockSpec((features, columns), lambda j, i: (0, j))
    return pl.pallas_call(
        step,
        grid=(pl.cdiv(vocabulary, columns), pl.cdiv(tokens, rows)),
        in_specs=[pl.BlockSpec((rows, features), lambda j, i: (i, 0)), block] + [row] * 4,
        out_specs=block,
        out_shape=kernel_result(kernel.shape, kernel.dtype, hidden, kernel, *row_arrays),
        scratch_shapes=[
            pltpu.VMEM((rows, columns), jnp.float32),
            pltpu.VMEM((features, columns), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(hidden, kernel, products=2),
        interpret=interpret,
        name="linear_softmax_kernel_gradient",
    )(hidden, kernel, *row_arrays)


def _cost(hidden: Array, kernel: Array, products: int) -> pl.CostEstimate:
    """Of so many products with all logits: what is read again for each outer block counts once."""
    (tokens, features), vocabulary = hidden.shape, kernel.shape[1]
    return pl.CostEstimate(
        flops=2 * products * tokens * features * vocabulary,
        transcendentals=tokens * vocabulary,
        bytes_accessed=products * (hidden.nbytes + kernel.nbytes),
    )


def _logits(hidden_ref, kernel_ref, logits_ref) -> Array:
    """A tile of logits."""
    logits_ref[...] = jnp.zeros(logits_ref.shape, jnp.float32)

    def add(at):
        logits_ref[...] += _dot(hidden_ref[:, at], kernel_ref[at, :], 1, 0)

    _over_features(add, kernel_ref.shape[0])
    return logits_ref[...]


def _logit_gradient(logits: Array, column: Array, row_refs: list) -> Array:
    """The gradient at a tile of logits, in float32."""
    ids, top, scale, of_id = (ref[...] for ref in row_refs)
    return scale * jnp.exp(logits - top) + jnp.where(column == ids, of_id, 0)


def _accumulate(add: Callable[..., None], total_ref, out_ref, step: Array, features: int) -> None:
    """Adds to a sum over the steps of the grid's last axis, which it stores after the last."""

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    _over_features(add, features)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _over_features(add: Callable[..., None], features: int) -> None:
    """Calls `add` with one range of features after the other."""
    whole, rest = divmod(features, _FEATURES)

    if whole:

        @pl.loop(0, whole)
        def _(k):
            add(pl.ds(pl.multiple_of(k * _FEATURES, _FEATURES), _FEATURES))

    if rest:
        add(pl.ds(whole * _FEATURES, rest))


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product of matrices, contracted over an axis of each."""
    dtype = jnp.result_type(a, b)
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((axis_a,), (axis_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _place(block: Array, shape: tuple[int, int], axis: int) -> Array:
    """The number, along an axis of the whole array, of each place of a block."""
    return block * shape[axis] + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _supported(x: Array) -> Array:
    """An array of a type that the chips multiply: float16 is none."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _block(
    hidden: Array, kernel: Array, row_bytes: int, column_bytes: int, *, outer: int = 0
) -> tuple[int, int]:
    """Rows and columns of a tile whose blocks fit, given what a row and a column of them take.

    The axis that the grid goes over on the outside (rows 0, columns 1) gets the most: the more it
    has, the less often the other operand is read. Below 256 of either, matrix units are idle.
    """
    largest = tuned_block("linear_softmax_cross_entropy", (*hidden.shape, kernel.shape[1]))
    largest = largest or _BLOCK
    halvings = range(1 if jnp.result_type(hidden, kernel) == jnp.float32 else 0, 11)
    rows = sorted({max(16, largest[0] >> i) for i in halvings})
    columns = sorted({max(128, largest[1] >> i) for i in halvings})
    blocks = [(r, c) for r in rows for c in columns]
    fitting = [b for b in blocks if b[0] * row_bytes + b[1] * column_bytes <= _BLOCK_BYTES]
    best = max(fitting, key=lambda b: (min(*b, 256), b[outer], b[1 - outer]))
    return (
        min(best[0], next_multiple(len(hidden), 16)),
        min(best[1], next_multiple(kernel.shape[1], 128)),
    )


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_MEMORY_BYTES
    )
