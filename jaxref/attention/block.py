"""Attention in which blocks of queries and keys take part by chance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.attention.dot_product import masked_bias, takes_kernel
from jaxref.attention.linear import weighted_average
from jaxref.core.checks import (
    check_attention_arguments,
    check_broadcastable,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.kernels import flash_attention


def harmonic_block_probability(distance: ArrayLike) -> Array:
    r"""The chance of a block of keys to take part, by its distance from the block of queries.

        p(D) = 1 / (1 + D)

    Args:
      distance: D at least 0, in blocks.

    Returns:
      p of the shape of `distance`, in at least float32.

    Use it as `keep_probability` of `probabilistic_block_attention`, whose default it is: of N
    blocks, ln N + 0.58 take part on average.

    Cost: one division for each distance.

    Example:
      >>> print(harmonic_block_probability(jnp.arange(4)))
      [1.   0.5   0.333   0.25 ]

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    return 1 / (1 + jnp.asarray(distance, float))


def probabilistic_block_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    key_rng: Array,
    block_size: int = 64,
    keep_probability: Callable[[Array], ArrayLike] = harmonic_block_probability,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = True,
    implementation: str | None = None,
) -> Array:
    r"""Softmax attention over a random choice of blocks, near ones more often than far ones.

    Queries and keys are cut into blocks. For each head, the block b' of keys takes part for the
    block b of queries with probability p(|b - b'|), independently,

        y_i = Σ_j softmax_j(scale · q_i · k_j + bias_ij + log K_ij) v_j,   K ∈ {0, 1} by blocks

    and p(0) = 1, so that a query always sees its own block. All examples of the batch share a draw.

    The kernels of `jaxref.kernels.flash_attention` skip the blocks that the draw leaves out,
    forward and backward, so that time falls with their share. XLA masks them, for the shapes of its
    programs cannot depend on chance: there it shows what the draw does to a model, and does not
    save its time. One step of a loop takes a block of queries, or causal, the two blocks r and
    N - 1 - r of N, which see N + 1 blocks of keys together: blocks later than the queries are never
    computed, and no more than two rows of weights exist at a time, in the backward pass too.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      value: `[batch, k_len, kv_heads, value_dim]`.
      key_rng: a random key, of the draw.
      block_size: positions in a block, at least 1; the last one may be shorter. Default 64. A TPU's
        kernel wants a multiple of 128, a GPU's a power of two from 16.
      keep_probability: p, from integer distances `[n]` in blocks to probabilities of that shape,
        or one for all; 1 at 0 and not increasing. Default `harmonic_block_probability`.
      bias: added to the scaled logits, broadcastable to `[batch, heads, q_len, k_len]`.
      mask: boolean, broadcastable to `[batch, heads, q_len, k_len]`; True where the query may see
        the key.
      scale: a number; default `1 / sqrt(head_dim)`.
      is_causal: query i sees the keys j ≤ i only, both counted from the start. Default True.
      implementation: "xla"; "pallas" or another name of a kernel; or None, for the kernel on a TPU
        where the blocks suit it, and XLA elsewhere. The draw is the same.

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of `query`, `key` and `value`, computed
      in at least float32 (the kernels multiply in the inputs' type, and sum in float32); zeros for
      a query without any admitted key.

    Raises:
      ValueError: shapes that do not match, a `block_size` below 1 or one that the kernel cannot
        take, probabilities that are not 1 at distance 0, increase, or leave [0, 1], or an
        implementation that does not exist or cannot run.
      TypeError: an array that is not floating point, or a `mask` that is not boolean.

    Use it in training, with a new key at each step, as a regularizer of far attention; with p = 1
    everywhere it is `dot_product_attention`, which evaluation takes.

    Cost: O(q_len · k_len · head_dim) time a head by XLA, the share of drawn blocks of it by a
    kernel; the weights of two rows of blocks in memory.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> near = lambda distance: distance == 0
      >>> attend = lambda **kw: probabilistic_block_attention(0 * x, x, x, block_size=2, **kw)
      >>> print(attend(key_rng=jax.random.key(0), keep_probability=near).ravel())
      [0.  0.5 2.  2.5]

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    check_attention_arguments(query, key, value, bias=bias, mask=mask)
    check_interval(1, jnp.inf, block_size=block_size)
    (batch, q_len, heads, head_dim), kv_heads = jnp.shape(query), jnp.shape(key)[2]
    scale = head_dim**-0.5 if scale is None else scale
    check_shape((), scale=scale)
    result_type = jnp.result_type(query, key, value)
    dtype = compute_dtype(query, key, value)
    if batch * q_len * heads == 0:
        return jnp.zeros((batch, q_len, heads, jnp.shape(value)[3]), result_type)
    query, key, value = (jnp.asarray(x, result_type) for x in (query, key, value))
    if is_causal:  # later keys are never seen
        key, value = key[:, :q_len], value[:, :q_len]
    k_len = key.shape[1]
    q_blocks, k_blocks = -(-q_len // block_size), -(-k_len // block_size)
    keep = draw_blocks(key_rng, heads, q_blocks, k_blocks, keep_probability)
    if takes_kernel(implementation, query, key, value, bias, suits=block_size % 128 == 0):
        added = masked_bias(bias, mask)
        output = flash_attention(
            query,
            key,
            value,
            bias=added
            if added is None or jnp.ndim(added) == 0
            else jnp.asarray(added)[..., :k_len],
            scale=scale,
            is_causal=is_causal,
            block_mask=keep,
            block_q=block_size,
            block_k=block_size,
            implementation=implementation,
        )
        assert isinstance(output, Array)
        return output
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    groups = heads // kv_heads

    def blocks(x, groups):
        """`[blocks, batch, kv_heads, groups, block_size, size]`, the last filled up with zeros."""
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block_size), (0, 0), (0, 0)])
        x = x.reshape(batch, -1, block_size, *x.shape[2:])
        x = x.reshape(*x.shape[:3], kv_heads, groups, x.shape[4])  # explicit sharding: step by step
        return x.transpose(1, 0, 3, 4, 2, 5)

    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)  # weighs itself too
    q_cut, k_cut, v_cut = blocks(query * scale, groups), blocks(key, 1), blocks(value, 1)
    keep = keep.transpose(1, 2, 0).reshape(q_blocks, k_blocks, kv_heads, groups)
    added = jnp.zeros((), dtype) if bias is None else jnp.asarray(bias, dtype)
    if mask is not None:
        added = jnp.where(mask, added, -jnp.inf)
    added = _added_blocks(added[..., :k_len] if added.ndim else added, kv_heads, block_size)
    tables = (_triangle if is_causal and q_blocks == k_blocks else _rectangle)(q_blocks, k_blocks)

    @jax.checkpoint
    def attend(step):
        """Outputs of the rows of one step: `[rows, batch, kv_heads, groups, block_size, size]`."""
        step_rows, row_of_slot, columns, is_slot = step
        rows = step_rows[row_of_slot]
        offsets = jnp.arange(block_size)
        q_at = (rows[:, None] * block_size + offsets)[:, :, None]
        k_at = (columns[:, None] * block_size + offsets)[:, None, :]
        seen = is_slot[:, None, None] & (k_at < k_len)
        if is_causal:
            seen &= k_at <= q_at
        seen = seen[:, None, None, None] & keep[rows, columns][:, None, :, :, None, None]
        logits = jnp.einsum("sbhgqd,sbhtd->sbhgqt", q_cut[rows], k_cut[columns][:, :, :, 0])
        logits += added[
            rows if added.shape[0] > 1 else 0 * rows, columns if added.shape[1] > 1 else 0 * columns
        ]
        logits = jnp.where(seen, logits, -jnp.inf)
        peaks = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        belongs = row_of_slot == jnp.arange(len(step_rows))[:, None]  # [rows, slots]
        peaks = jnp.where(belongs[:, :, None, None, None, None, None], peaks, -jnp.inf).max(axis=1)
        weights = jnp.exp(logits - jnp.where(peaks > -jnp.inf, peaks, 0)[row_of_slot])
        summed = jnp.einsum("sbhgqt,sbhtv->sbhgqv", weights, v_cut[columns][:, :, :, 0])
        summed = jnp.einsum("rs,sbhgqv->rbhgqv", belongs.astype(dtype), summed)
        return weighted_average(summed[..., :-1], summed[..., -1:])

    output = jax.lax.map(attend, tables)
    output = output.reshape(-1, *output.shape[2:])[np.unique(tables[0], return_index=True)[1]]
    output = output.transpose(1, 0, 4, 2, 3, 5)
    output = output.reshape(batch, -1, *output.shape[3:])[:, :q_len]
    return output.reshape(batch, q_len, heads, output.shape[4]).astype(result_type)


def draw_blocks(
    key_rng: Array,
    heads: int,
    q_blocks: int,
    k_blocks: int,
    keep_probability: Callable[[Array], ArrayLike] = harmonic_block_probability,
) -> Array:
    """Which blocks of keys take part, boolean `[heads, q_blocks, k_blocks]`.

    Raises:
      ValueError: probabilities that are not 1 at distance 0, increase, or leave [0, 1].

    >>> draw_blocks(jax.random.key(0), 2, 3, 3, lambda distance: distance == 0)[1].tolist()
    [[True, False, False], [False, True, False], [False, False, True]]
    """
    distances = max(q_blocks, k_blocks)
    with jax.ensure_compile_time_eval():  # so that they can be checked under jit as well
        probabilities = jnp.asarray(keep_probability(jnp.arange(distances)), float)
        check_broadcastable((distances,), keep_probability=probabilities)
        probabilities = jnp.broadcast_to(probabilities, (distances,))
    check_interval(0, 1, keep_probability=probabilities)
    if not isinstance(probabilities, jax.core.Tracer):
        concrete = np.asarray(probabilities)
        if concrete[0] != 1 or np.any(np.diff(concrete) > 0):
            raise ValueError(
                f"keep_probability must be 1 at distance 0 and not increase, got {concrete}"
            )
    apart = np.abs(np.arange(q_blocks)[:, None] - np.arange(k_blocks))
    return jax.random.uniform(key_rng, (heads, q_blocks, k_blocks)) < probabilities[apart]


def _added_blocks(added: Array, kv_heads: int, block_size: int) -> Array:
    """What is added to the logits, by blocks; axes along which it is constant keep size 1.

    `[q_blocks, k_blocks, batch, kv_heads, groups, block_size, block_size]`
    """
    added = added.reshape((1,) * (4 - added.ndim) + added.shape)
    batch, heads, *lengths = added.shape
    sizes = [1 if length == 1 else block_size for length in lengths]
    missing = [-length % size for length, size in zip(lengths, sizes)]
    added = jnp.pad(added, [(0, 0), (0, 0), (0, missing[0]), (0, missing[1])])
    head_axes = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    counts = [length // size for length, size in zip(added.shape[2:], sizes)]
    added = added.reshape(batch, *head_axes, *added.shape[2:])
    added = added.reshape(batch, *head_axes, counts[0], sizes[0], added.shape[4])
    added = added.reshape(*added.shape[:5], counts[1], sizes[1])
    return added.transpose(3, 5, 0, 1, 2, 4, 6)


def _triangle(q_blocks: int, k_blocks: int) -> tuple[np.ndarray, ...]:
    """The lower triangle of N x N blocks as a rectangle: row r beside row N - 1 - r.

    Returns, for each step, its rows `[steps, 2]`, and of its N + 1 slots the row among those, the
    column, and whether there is one: the row in the middle of an odd N stands alone.
    """
    steps = -(-q_blocks // 2)
    slots = np.arange(k_blocks + 1)
    row = np.arange(steps)[:, None]
    mirrored = q_blocks - 1 - row
    is_first = slots <= row
    columns = np.where(is_first, slots, slots - row - 1)
    is_slot = is_first | (mirrored > row)
    rows = np.concatenate([row, mirrored], axis=1)
    return rows, np.where(is_first, 0, 1), np.minimum(columns, k_blocks - 1), is_slot


def _rectangle(q_blocks: int, k_blocks: int) -> tuple[np.ndarray, ...]:
    """All blocks, a row at a step, as `_triangle` has them."""
    columns = np.broadcast_to(np.arange(k_blocks), (q_blocks, k_blocks))
    return (
        np.arange(q_blocks)[:, None],
        np.zeros_like(columns),
        columns,
        np.ones(columns.shape, bool),
    )
