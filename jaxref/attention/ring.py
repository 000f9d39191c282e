"""Attention over a sequence that is split over devices, whose keys and values go round a ring."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_attention_arguments,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, varying_alike
from jaxref.kernels.block_sizes import tuned_block
from jaxref.kernels.flash_attention import checked_segments, module_of, row_sums, saveable
from jaxref.kernels.flash_attention_tile import Operands, Options
from jaxref.kernels.implementation import Implementation, choose_implementation
from jaxref.parallel.ring import go_round

LAYOUTS = ("contiguous", "zigzag")
"""How a sequence may be split over the shards of `ring_attention`."""


def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: AxisName,
    layout: str = "contiguous",
    alibi_slopes: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    soft_cap: float | None = None,
    is_causal: bool = False,
    query_segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Softmax attention over a sequence of which every shard of a mapped axis has a part.

    Shard i of S has queries Q_i, keys K_i and values V_i. Keys and values go round the ring of
    shards: at step t, shard i has those of shard j = i - t mod S, and attends to them while they
    are sent on,

        O_ij, L_ij = Attention(Q_i, K_j, V_j) and its logsumexp, as `flash_attention` gives them
        L_i = log Σ_j exp(L_ij),   O_i = Σ_j exp(L_ij - L_i) O_ij

    which are the rows of the attention over the whole sequence. The backward pass sends keys and
    values round once more, and their gradients with them: from L_i and the row sums of output times
    cotangent, a block's share follows from that block alone. A device holds two blocks of keys and
    values at a time, and keeps nothing of a step for the backward pass.

    With `is_causal`, blocks in a shard's future are skipped. Of a sequence that is split in order,
    "contiguous", the last shard then computes S blocks and the first one: all wait for the last.
    In the layout "zigzag", shard i has chunks i and 2S - 1 - i of 2S equal chunks, and every shard
    computes half a block at every step, which takes about half of the time.

    Args:
      query: `[batch, q_len / S, heads, head_dim]` floating point, the queries of this shard.
      key: `[batch, k_len / S, kv_heads, head_dim]`, its keys, `kv_heads` a divisor of `heads`.
      value: `[batch, k_len / S, kv_heads, value_dim]`; `value_dim` may differ from `head_dim`.
      axis_name: name or names of the mapped axes (`jax.shard_map`) over which the sequence is
        split; batch and heads may be split over others.
      layout: "contiguous" or "zigzag", whose order of positions `zigzag_positions` gives.
      alibi_slopes: `[heads]` floating point constants s, without gradients: s times the distance of
        the positions is subtracted from the logits of causal attention.
      scale: a number; default `1 / sqrt(head_dim)`.
      soft_cap: c above 0, a Python number; the logits are then c tanh(logits / c).
      is_causal: query i sees the keys j ≤ i only, by their positions in the whole sequence.
      query_segment_ids: integer `[batch, q_len / S]`. A query sees the keys of its own segment, as
        where several documents share a row.
      key_segment_ids: integer `[batch, k_len / S]`, given together with those of the queries.
      implementation: who computes a block, as in `flash_attention`.

    Returns:
      `[batch, q_len / S, heads, value_dim]` in the common type of `query`, `key` and `value`: this
      shard's rows. A query that sees no key gives zeros, and no gradient.

    Raises:
      ValueError: an axis that is not mapped, a layout or implementation that does not exist or
        cannot run, shapes that do not match, heads that the key/value heads do not divide, lengths
        of query and key that differ where `is_causal`, or are odd in the zigzag, slopes without
        `is_causal`, segments of one side alone, or a cap out of range.
      TypeError: an array that is not of the type above.

    Logits, softmax, and the sums over blocks are in at least float32; a block's own result and
    gradients have the inputs' type. Gradients reach query, key, value and scale, in reverse mode
    and once.

    Use it where one device cannot hold the sequence, or should not wait for all of it; while it
    can, `dot_product_attention` on batch and heads in shards exchanges nothing.

    Cost: 1/S of the time; a shard sends its keys and values S - 1 times, in the backward pass
    again, and S times their gradients in float32.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> mesh = jax.make_mesh((1,), ("sequence",), (jax.sharding.AxisType.Auto,))
      >>> rows = jax.P(None, "sequence")
      >>> attend = partial(ring_attention, axis_name="sequence", is_causal=True)
      >>> attend = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows)
      >>> print(attend(x, x, x).round(2).ravel())
      [1.   1.88 2.95]

    Reference: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite
    Context", 2023, arXiv:2310.01889. That causal attention wants a layout of its own: Brandon et
    al., "Striped Attention: Faster Ring Attention for Causal Transformers", 2023, arXiv:2311.09431;
    chunks i and 2S - 1 - i: Grattafiori et al., "The Llama 3 Herd of Models", 2024,
    arXiv:2407.21783.
    """
    check_attention_arguments(query, key, value)
    dtype = jnp.result_type(query, key, value)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch, q_len, heads, head_dim = query.shape
    k_len = key.shape[1]
    try:
        place = jax.lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name must be an axis that is mapped here, as by jax.shard_map, got {axis_name!r}"
        ) from error
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if is_causal and q_len != k_len:
        raise ValueError(
            f"key must be as long as query where is_causal, {q_len} in this shard, got {k_len}"
        )
    if layout == "zigzag" and (q_len % 2 or k_len % 2):
        raise ValueError(
            "query and key must have an even length in every shard, two chunks, where layout is "
            f"'zigzag', got {q_len} and {k_len}"
        )
    scale = head_dim**-0.5 if scale is None else scale
    check_shape((), scale=scale)
    if soft_cap is not None:
        check_interval(0, jnp.inf, closed="right", soft_cap=soft_cap)
        soft_cap = float(soft_cap)
    if alibi_slopes is not None:
        check_floating(alibi_slopes=alibi_slopes)
        check_shape((heads,), alibi_slopes=alibi_slopes)
        if not is_causal:
            raise ValueError("alibi_slopes must come with is_causal: here they only look back")
        alibi_slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes, compute_dtype(query)))
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("query_segment_ids and key_segment_ids must be given together")
    shard = _Shard(
        place,
        (query * scale).astype(dtype),
        _Keys(key, value, checked_segments((batch, k_len), key_segment_ids=key_segment_ids)),
        checked_segments((batch, q_len), query_segment_ids=query_segment_ids),
        alibi_slopes,
    )
    chosen = choose_implementation(implementation, query)
    if query.size == 0:
        return jnp.zeros((*query.shape[:3], value.shape[3]), dtype)
    leaves, structure = jax.tree.flatten(shard)
    shard = jax.tree.unflatten(structure, varying_alike(*leaves))
    return _attend(_Ring(axis_name, layout, is_causal, soft_cap, chosen), shard)


def zigzag_positions(length: int, axis_size: int) -> np.ndarray:
    """The positions of a sequence, in the order of the zigzag layout of `ring_attention`.

    Of 2S equal chunks, shard i of S has chunks i and 2S - 1 - i, in this order.

    Args:
      length: of the whole sequence, a multiple of 2S.
      axis_size: S, the number of shards, at least 1.

    Returns:
      Integers `[length]`: row r of the layout is position `zigzag_positions(...)[r]`. So
      `tokens[:, positions]` goes into the layout, `x[:, np.argsort(positions)]` out of it, and
      `positions` are those of a rotary embedding.

    Raises:
      ValueError: a length that 2S does not divide, or S below 1.

    Use it once on tokens, targets and masks, on their way to the devices: all else of a model acts
    on every position alike. Without causality there is nothing to balance.

    Cost: O(length) on the host, once.

    Example:
      >>> zigzag_positions(8, 2).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]

    Reference: Grattafiori et al., "The Llama 3 Herd of Models", 2024, arXiv:2407.21783.
    """
    check_interval(1, jnp.inf, axis_size=axis_size)
    if length % (2 * axis_size):
        raise ValueError(
            f"length must be a multiple of {2 * axis_size}, two chunks for each of {axis_size} "
            f"shards, got {length}"
        )
    early, late = np.arange(length).reshape(2, axis_size, -1)
    return np.stack([early, late[::-1]], axis=1).reshape(-1)


def into_zigzag(x: ArrayLike, axis_name: AxisName) -> Array:
    """A shard's rows in the zigzag layout of `ring_attention`, from rows in contiguous order.

    Of 2S equal chunks, shard i of S brings chunks 2i and 2i + 1 and has chunks i and 2S - 1 - i
    afterwards.

    Args:
      x: `[batch, length / S, ...]`, an even number of rows in every shard.
      axis_name: name or names of the mapped axes (`jax.shard_map`) that the sequence is split over.

    Returns:
      An array like `x`.

    Raises:
      ValueError: an odd number of rows.

    Use it around `ring_attention` where all else of a model has its sequences in order. With
    `zigzag_positions`, tokens that are put in this order beforehand need not be exchanged.

    Cost: a shard sends each half of its rows once, about a step of the ring, for what saves half of
    all steps' work.

    Example:
      >>> mesh = jax.make_mesh((1,), ("sequence",), (jax.sharding.AxisType.Auto,))
      >>> exchange = partial(into_zigzag, axis_name="sequence")
      >>> rows = jax.P(None, "sequence")
      >>> exchange = jax.shard_map(exchange, mesh=mesh, in_specs=rows, out_specs=rows)
      >>> print(exchange(jnp.arange(4)[None]))
      [[0 1 2 3]]

    Reference: Grattafiori et al., "The Llama 3 Herd of Models", 2024, arXiv:2407.21783.
    """
    even, odd = (
        jax.lax.ppermute(half, axis_name, [(i, home) for i, home in enumerate(homes)])
        for half, homes in zip(_halves(x), _homes(axis_name))
    )
    has_even_first = jax.lax.axis_index(axis_name) % 2 == 0
    first = jnp.where(has_even_first, even, odd)
    return jnp.concatenate([first, jnp.where(has_even_first, odd, even)], axis=1)


def out_of_zigzag(x: ArrayLike, axis_name: AxisName) -> Array:
    """A shard's rows in contiguous order, from rows in the zigzag layout: undoes `into_zigzag`.

    Args:
      x, axis_name: as in `into_zigzag`.

    Returns:
      An array like `x`.

    Raises:
      ValueError: an odd number of rows.

    Use it on what `ring_attention` gives for arguments of `into_zigzag`.

    Cost: that of `into_zigzag`: a shard sends each half of its rows once.

    Example:
      >>> mesh = jax.make_mesh((1,), ("sequence",), (jax.sharding.AxisType.Auto,))
      >>> exchange = partial(out_of_zigzag, axis_name="sequence")
      >>> rows = jax.P(None, "sequence")
      >>> exchange = jax.shard_map(exchange, mesh=mesh, in_specs=rows, out_specs=rows)
      >>> print(exchange(jnp.arange(4)[None]))
      [[0 1 2 3]]

    Reference: Grattafiori et al., "The Llama 3 Herd of Models", 2024, arXiv:2407.21783.
    """
    first, second = _halves(x)
    has_even_first = jax.lax.axis_index(axis_name) % 2 == 0
    even = jnp.where(has_even_first, first, second)
    odd = jnp.where(has_even_first, second, first)
    halves = [
        jax.lax.ppermute(half, axis_name, [(home, i) for i, home in enumerate(homes)])
        for half, homes in zip((even, odd), _homes(axis_name))
    ]
    return jnp.concatenate(halves, axis=1)


def _halves(x: ArrayLike) -> list[Array]:
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[1] % 2:
        raise ValueError(f"x must have shape [batch, an even number of rows, ...], got {x.shape}")
    return jnp.split(x, 2, axis=1)


def _homes(axis_name: AxisName) -> tuple[list[int], list[int]]:
    """The shards that have the chunks 2i, and 2i + 1, of shard i when they are zigzag."""
    size = jax.lax.axis_size(axis_name)
    homes = [min(chunk, 2 * size - 1 - chunk) for chunk in range(2 * size)]
    return homes[::2], homes[1::2]


class _Ring(NamedTuple):
    """What is known when a program is traced."""

    axis_name: AxisName
    layout: str
    is_causal: bool
    soft_cap: float | None
    chosen: Implementation


class _Keys(NamedTuple):
    """What goes round: `[batch, k_len, kv_heads, head_dim or value_dim]`, `[batch, k_len]`."""

    key: Array
    value: Array
    segments: Array | None


class _Shard(NamedTuple):
    """A shard's place on the ring and its arrays, with the query scaled."""

    place: Array
    query: Array
    keys: _Keys
    query_segments: Array | None
    slopes: Array | None


class _Part(NamedTuple):
    """Rows and columns of a block; `is_causal` where they are on the diagonal of causal attention,
    else all of these columns are seen."""

    rows: slice
    columns: slice
    is_causal: bool = False


class _Block(NamedTuple):
    """A part of a block as `forward` and `backward` of a kernel take it.

    Attributes:
      operands, options: theirs.
      shift: what the logits of a row lack, added to its logsumexp; broadcasts to
        `[batch, heads, rows]`.
    """

    operands: Operands
    options: Options
    shift: Array | float


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, shard: _Shard) -> Array:
    return _attend_forward(ring, shard)[0]


def _attend_forward(ring: _Ring, shard: _Shard) -> Any:
    dtype = compute_dtype(shard.query)
    length = shard.query.shape[1]
    module = module_of(ring.chosen.platform)

    def attend(part: _Part, keys: _Keys, source: Array) -> tuple[Array, Array]:
        block = _block(ring, shard, keys, source, part)
        output, logsumexp = module.forward(block.operands, block.options)
        return (
            _filled(output, part.rows, length, axis=1),
            _filled(logsumexp + block.shift, part.rows, length, axis=2, value=-jnp.inf),
        )

    def start(keys: _Keys) -> Any:
        parts = _own_parts(ring, shard)
        (output, logsumexp), *others = (attend(part, keys, shard.place) for part in parts)
        return reduce(_merge, others, (output.astype(dtype), logsumexp)), None

    def step(keys: _Keys, source: Array, rows: tuple[Array, Array], _: None) -> Any:
        nothing = jnp.zeros_like(rows[0], shard.query.dtype), jnp.full_like(rows[1], -jnp.inf)
        block = _where_seen(ring, shard, source, partial(attend, keys=keys, source=source), nothing)
        return _merge(rows, block), None

    (output, logsumexp), _ = go_round(ring.axis_name, shard.keys, start, step)
    output, logsumexp = saveable(output.astype(shard.query.dtype), logsumexp)
    return output, (shard, output, logsumexp)


def _attend_backward(ring: _Ring, residuals: Any, cotangent: Array) -> Any:
    shard, output, of_rows = residuals
    logsumexp, delta = row_sums(output, of_rows, cotangent, 0)
    module = module_of(ring.chosen.platform)
    q_len, k_len = shard.query.shape[1], shard.keys.key.shape[1]

    def gradients(part: _Part, keys: _Keys, source: Array) -> tuple[Array, tuple[Array, Array]]:
        block, rows = _block(ring, shard, keys, source, part), part.rows
        d_query, d_key, d_value, _ = module.backward(
            block.operands,
            block.options,
            cotangent[:, rows],
            logsumexp[:, :, rows] - block.shift,
            delta[:, :, rows],
        )
        d_key, d_value = (_filled(x, part.columns, k_len, axis=1) for x in (d_key, d_value))
        return _filled(d_query, rows, q_len, axis=1), (d_key, d_value)

    def start(keys: _Keys) -> Any:
        first, *others = (gradients(part, keys, shard.place) for part in _own_parts(ring, shard))
        first = jax.tree.map(lambda x: x.astype(logsumexp.dtype), first)
        return reduce(partial(jax.tree.map, jnp.add), others, first)

    def step(keys: _Keys, source: Array, d_query: Array, d_keys: Any) -> Any:
        nothing = jax.tree.map(jnp.zeros_like, (shard.query, (keys.key, keys.value)))
        attended = partial(gradients, keys=keys, source=source)
        block = _where_seen(ring, shard, source, attended, nothing)
        return jax.tree.map(jnp.add, (d_query, d_keys), block)

    summed = go_round(ring.axis_name, shard.keys, start, step)
    d_query, (d_key, d_value) = jax.tree.map(lambda x: x.astype(shard.query.dtype), summed)
    nothing = jax.tree.map(lambda _: None, shard)
    return (nothing._replace(query=d_query, keys=_Keys(d_key, d_value, None)),)


_attend.defvjp(_attend_forward, _attend_backward)


def _everything(shard: _Shard) -> _Part:
    return _Part(slice(0, shard.query.shape[1]), slice(0, shard.keys.key.shape[1]))


def _own_parts(ring: _Ring, shard: _Shard) -> list[_Part]:
    """What a shard sees of its own block, in parts that cover it.

    Positions rise within a shard, so that causality is that of the rows. In the zigzag they do not
    rise evenly, and slopes make parts of the chunks.
    """
    everything = _everything(shard)._replace(is_causal=ring.is_causal)
    if ring.layout == "contiguous" or shard.slopes is None:
        return [everything]
    length = everything.rows.stop
    early, late = slice(0, length // 2), slice(length // 2, length)
    return [_Part(early, early, True), _Part(late, late, True), _Part(late, early)]


def _where_seen(
    ring: _Ring, shard: _Shard, source: Array, attend: Callable[..., Any], nothing: Any
) -> Any:
    """`attend(part)` of what this shard sees of the block of another one, or `nothing`.

    In the zigzag, both chunks of a shard see the first chunk of an earlier one, and the second
    chunk sees both chunks of a later one.
    """
    rows, columns, _ = everything = _everything(shard)
    if not ring.is_causal:
        return attend(everything)
    is_earlier = source < shard.place
    if ring.layout == "contiguous":
        return jax.lax.cond(is_earlier, lambda: attend(everything), lambda: nothing)
    half = rows.stop // 2
    first_columns, second_rows = _Part(rows, slice(0, half)), _Part(slice(half, None), columns)
    return jax.lax.cond(is_earlier, lambda: attend(first_columns), lambda: attend(second_rows))


def _block(ring: _Ring, shard: _Shard, keys: _Keys, source: Array, part: _Part) -> _Block:
    """A part of the block of the keys of shard `source`.

    Slopes are the kernel's own on the diagonal, where positions count from the part's start. Off
    it, -s (q - k) = s (k - p) - s (q - p), p the position of the last of these keys, all of which
    are earlier than the queries. The first term is a bias of the keys, small for those that are
    near; the second is alike for all keys of a row, and added to its logsumexp.
    """
    rows, columns, is_causal = part
    bias: Array | None = None
    shift: Array | float = 0.0
    if shard.slopes is not None and not is_causal:
        q_at, k_at = (_positions(ring, x, shard.query.shape[1]) for x in (shard.place, source))
        q_at, k_at = q_at[rows], k_at[columns]
        bias = (shard.slopes[:, None] * (k_at - k_at[-1]))[None, :, None]
        shift = shard.slopes[:, None] * (k_at[-1] - q_at)
    query = shard.query[:, rows]
    block_q, block_k = None, None
    if ring.chosen.platform != "xla":
        block_q, block_k = tuned_block("flash_attention", query.shape[1:]) or (None, None)
    return _Block(
        Operands(
            query,
            keys.key[:, columns],
            keys.value[:, columns],
            bias,
            shard.slopes if is_causal else None,
            None if shard.query_segments is None else shard.query_segments[:, rows],
            None if keys.segments is None else keys.segments[:, columns],
            None,
        ),
        Options(is_causal, ring.soft_cap, block_q, block_k, ring.chosen.interpret),
        shift,
    )


def _positions(ring: _Ring, index: Array, length: int) -> Array:
    """The positions of the rows of a shard, which rise."""
    if ring.layout == "contiguous":
        return index * length + jnp.arange(length)
    half = length // 2
    chunks = jnp.stack([index, 2 * jax.lax.axis_size(ring.axis_name) - 1 - index])
    return (chunks[:, None] * half + jnp.arange(half)).reshape(-1)


def _filled(x: Array, at: slice, length: int, *, axis: int, value: float = 0) -> Array:
    """An axis of that length which has `x` at a slice, and elsewhere a value."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (at.start, length - at.start - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _merge(rows: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[Array, Array]:
    """Output and logsumexp of the keys of both: averages, weighted by the sums of exponentials."""
    logsumexp = jnp.logaddexp(rows[1], block[1])
    top = jnp.where(logsumexp > -jnp.inf, logsumexp, 0)  # no key seen yet: both weigh exp(-inf)
    before, added = (
        output * jnp.exp(x - top).swapaxes(1, 2)[..., None] for output, x in (rows, block)
    )
    return before + added, logsumexp
