"""A cache of keys and values whose precision falls with the age of the tokens."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.quantization.packing import pack, unpack, values_per_byte


class _Codes(NamedTuple):
    """Quantized `[..., tokens, kv_heads, head_dim]`: `x ≈ minimum + scale · code`, by groups."""

    values: Array  # packed along head_dim
    scale: Array  # with the number of groups for the axis that is grouped
    minimum: Array


_TOKENS, _ENTRIES = -3, -1  # the axes that keys and values are grouped along


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StaircaseCache:
    """Keys and values of the tokens so far: the newest as they are, older ones in fewer bits.

    A pytree: it goes through jit, vmap, scan and `jax.device_put`. `staircase_cache_init` makes it,
    `staircase_cache_append` fills it and `staircase_cache_read` gives its contents.

    Attributes:
      residual: the newest tokens, fewer than S of them, of keys and of values: two arrays
        `[batch, S, kv_heads, head_dim]`.
      stairs: for every width from the second on, the codes of keys and of values: of one block, and
        for the last width of all older blocks in their order.
      lengths: int32 `[batch]`, the tokens that each sequence has.
      max_length: the tokens that there is room for.
      bits: the widths, from the newest tokens to the oldest.
      group_sizes: how many tokens of a channel of the keys, and how many entries of a token of the
        values, share a scale.
    """

    residual: tuple[Array, Array]
    stairs: tuple[tuple[_Codes, _Codes], ...]
    lengths: Array
    max_length: int = dataclasses.field(metadata={"static": True})
    bits: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    group_sizes: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def block(self) -> int:
        """S, the tokens of a block."""
        return self.residual[0].shape[1]


def staircase_bits(num_blocks: int, bits: tuple[int, ...] = (16, 8, 4, 2)) -> tuple[int, ...]:
    r"""The widths in which a cache keeps its full blocks, from the newest to the oldest.

    With bits = (B_1, ..., B_q), the block of age i, where the newest has age 1, has

        B_min(i + 1, q)

    bits per entry. B_1 is that of the tokens that are not yet a block.

    Args:
      num_blocks: full blocks, at least 0.
      bits: B_1 of 16 or 32, then at least one width of 2 to 8, none of them larger than the one
        before. Default (16, 8, 4, 2).

    Returns:
      `num_blocks` widths.

    Raises:
      ValueError: a negative `num_blocks`, or widths that are out of range or grow.

    Use it to see what a cache will hold; `staircase_cache_nbytes` gives the memory of one.

    Cost: O(num_blocks), no arrays.

    Example:
      >>> staircase_bits(5)
      (8, 4, 2, 2, 2)

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    check_interval(0, jnp.inf, num_blocks=num_blocks)
    _check_bits(bits)
    return tuple(bits[min(age, len(bits) - 1)] for age in range(1, num_blocks + 1))


def staircase_cache_init(
    batch: int,
    max_length: int,
    kv_heads: int,
    head_dim: int,
    *,
    block: int = 64,
    bits: tuple[int, ...] = (16, 8, 4, 2),
    group_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> StaircaseCache:
    r"""An empty staircase cache, with all the memory that it will ever take.

    Args:
      batch: sequences.
      max_length: tokens that each has room for.
      kv_heads: key and value heads; 1 for multi-query attention.
      head_dim: size of a key and of a value.
      block: S at least 1, the tokens that descend the stairs together. Default 64.
      bits: the widths as in `staircase_bits`. The first stands for `dtype`. Codes of 2 and 4 bits
        are packed four and two to the byte.
      group_size: G, a divisor of `block` and of `head_dim`: the entries that share a scale and a
        minimum, tokens of one channel for keys, channels of one token for values. Default: 32 where
        that divides the size, otherwise all of it.
      dtype: type of the newest tokens, of scales and minima and of what is read. Default float32;
        bfloat16 takes half of that.

    Returns:
      The `StaircaseCache`.

    Raises:
      ValueError: a size below 1, widths that are out of range or grow, or a `group_size` that does
        not divide.
      TypeError: `dtype` is not floating point.

    Use it where the cache of a long generation does not fit in memory;
    `jaxref.attention.key_value_cache_init` keeps all tokens as they are.

    Cost: for long caches about B_q bits an entry and two numbers of `dtype` for G of them, all
    allocated at once; S tokens stay as they are.

    Example:
      >>> cache = staircase_cache_init(1, 1024, 1, 64, dtype=jnp.bfloat16)
      >>> 2 * 2 * 1024 * 64 / staircase_cache_nbytes(cache) > 3.5  # of 16 bits each
      True

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441; groups after Liu et al., "KIVI: A Tuning-Free
    Asymmetric 2bit Quantization for KV Cache", 2024, arXiv:2402.02750.
    """
    check_interval(1, jnp.inf, batch=batch, max_length=max_length, kv_heads=kv_heads)
    check_interval(1, jnp.inf, head_dim=head_dim, block=block)
    _check_bits(bits)
    check_floating(dtype=jnp.zeros((), dtype))
    if group_size is not None:
        check_interval(1, jnp.inf, group_size=group_size)
        for name, size in (("block", block), ("head_dim", head_dim)):
            if size % group_size:
                raise ValueError(f"group_size must divide {name} = {size}, got {group_size}")
        group_sizes = (group_size, group_size)
    else:
        key_group, value_group = (32 if size % 32 == 0 else size for size in (block, head_dim))
        group_sizes = (key_group, value_group)
    zeros = jnp.zeros((batch, block, kv_heads, head_dim), dtype)
    old_blocks = max(1, max_length // block - (len(bits) - 2))

    def stair(width: int, *blocks: int) -> tuple[_Codes, _Codes]:
        one = _quantize_both((zeros, zeros), width, group_sizes)
        return jax.tree.map(lambda x: jnp.zeros((batch, *blocks, *x.shape[1:]), x.dtype), one)

    return StaircaseCache(
        (zeros, zeros),
        (*(stair(width) for width in bits[1:-1]), stair(bits[-1], old_blocks)),
        jnp.zeros(batch, jnp.int32),
        max_length,
        tuple(bits),
        group_sizes,
    )


def staircase_cache_append(
    cache: StaircaseCache, key: ArrayLike, value: ArrayLike, *, where: ArrayLike | None = None
) -> StaircaseCache:
    r"""Adds the next tokens; blocks that this fills descend the stairs.

    New tokens join the residual. When it holds S of them, it becomes a block of B_2 bits, and each
    older block is dequantized and quantized again to the next width, until it has B_q bits. For
    each group of G entries and b bits,

        code = round((x - min x) / s),   s = (max x - min x) / (2^b - 1),   x ≈ min x + s · code

    Args:
      cache: what is remembered so far.
      key, value: floating point, the next token's `[batch, kv_heads, head_dim]`, or the next n
        tokens' `[batch, n, kv_heads, head_dim]`, n at most `max_length`.
      where: boolean `[batch]` or `[batch, n]`: the tokens that exist, so that sequences may grow by
        different numbers of them. Default: all.

    Returns:
      The cache with these tokens. Those for which there is no room any more are dropped: see to it
      that `lengths` stay within `max_length`.

    Raises:
      ValueError: shapes that do not match the cache, or more tokens than it has room for.
      TypeError: `key` or `value` not floating point, or a `where` that is not boolean.

    Use it at each step of a generation, under jit with the cache donated, or for a whole prompt at
    once.

    Cost: O(q S) entries copied a step, for q widths, whatever the length; once in S tokens q - 1
    blocks are quantized anew.

    Example:
      >>> cache = staircase_cache_init(1, 8, 1, 1, block=2)
      >>> x = jnp.array([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1)
      >>> cache = staircase_cache_append(cache, x, -x)
      >>> print(cache.lengths, staircase_cache_read(cache)[0].ravel())
      [3] [0. 1. 2. 0. 0. 0. 0. 0.]

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    check_floating(key=key, value=value)
    batch, block, kv_heads, head_dim = cache.residual[0].shape
    if jnp.ndim(key) == 3:
        check_shape((batch, kv_heads, head_dim), key=key, value=value)
        key, value = jnp.expand_dims(key, 1), jnp.expand_dims(value, 1)
        where = None if where is None else jnp.expand_dims(where, 1)
    n = jnp.shape(key)[1] if jnp.ndim(key) == 4 else 1
    check_shape((batch, n, kv_heads, head_dim), key=key, value=value)
    if n > cache.max_length:
        raise ValueError(f"key must have at most {cache.max_length} tokens, got {n}")
    where = jnp.ones((batch, n), bool) if where is None else jnp.asarray(where)
    check_shape((batch, n), where=where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got {where.dtype.name}")
    if n == 0:
        return cache
    # In runs of at most S tokens, each of which fills at most one block of a sequence.
    run = min(n, block)
    dtype = cache.residual[0].dtype

    def runs(x: ArrayLike) -> Array:
        x = jnp.asarray(x)
        x = jnp.pad(x, [(0, 0), (0, -n % run)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, -1, run, *x.shape[2:]).swapaxes(0, 1)

    inputs = (runs(jnp.asarray(key, dtype)), runs(jnp.asarray(value, dtype)), runs(where))
    if n == run:
        return _append_run(cache, *(x[0] for x in inputs))
    return jax.lax.scan(lambda cache, x: (_append_run(cache, *x), None), cache, inputs)[0]


def staircase_cache_read(cache: StaircaseCache) -> tuple[Array, Array]:
    r"""All keys and values, dequantized, each at the position of its token.

    Args:
      cache: what is remembered so far.

    Returns:
      Keys and values `[batch, max_length, kv_heads, head_dim]` in the cache's type; zeros beyond
      the length of a sequence.

    Use it with an attention function and a mask that admits each sequence's `lengths` tokens.

    Cost: all `max_length` tokens are dequantized at each call: for the time of a step the cache
    takes its full size in `dtype`.

    Example:
      >>> cache = staircase_cache_init(2, 16, 4, 8, block=4)
      >>> [x.shape for x in staircase_cache_read(cache)]
      [(2, 16, 4, 8), (2, 16, 4, 8)]

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    batch, block, kv_heads, head_dim = cache.residual[0].shape
    num_blocks = -(-cache.max_length // block)
    full = cache.lengths // block

    newest = cache.residual
    *singles, old = (
        _dequantize_both(stair, width, newest[0])
        for stair, width in zip(cache.stairs, cache.bits[1:])
    )

    def in_order(which: int) -> Array:
        missing = num_blocks - old[which].shape[1]
        blocks = jnp.pad(old[which], [(0, 0), (0, missing)] + [(0, 0)] * 3)
        for age, one in enumerate([newest, *singles]):
            here = jnp.arange(num_blocks) == full[:, None] - age
            blocks = jnp.where(here[..., None, None, None], one[which][:, None], blocks)
        return blocks.reshape(batch, -1, kv_heads, head_dim)[:, : cache.max_length]

    return in_order(0), in_order(1)


def staircase_cache_nbytes(cache: StaircaseCache) -> int:
    r"""The memory of a cache: codes, scales, minima, the newest tokens and the lengths.

    Args:
      cache: any, of abstract arrays too (`jax.eval_shape`).

    Returns:
      Bytes.

    Use it to choose the block and the widths for a length.

    Cost: a sum over shapes, nothing is computed.

    Example:
      >>> staircase_cache_nbytes(staircase_cache_init(1, 8, 1, 4, block=4, bits=(16, 2)))
      276

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def _check_bits(bits: tuple[int, ...]) -> None:
    widths_fit = all(isinstance(width, int) and 2 <= width <= 8 for width in bits[1:])
    falling = all(old <= new for new, old in itertools.pairwise(bits))
    if len(bits) < 2 or bits[0] not in (16, 32) or not widths_fit or not falling:
        raise ValueError(
            f"bits must be 16 or 32 and then widths of 2 to 8 that do not grow, got {bits}"
        )


def _append_run(cache: StaircaseCache, key: Array, value: Array, where: Array) -> StaircaseCache:
    """`staircase_cache_append` of at most S tokens."""
    block, before = cache.block, cache.lengths
    offset = jnp.cumsum(where, axis=1, dtype=jnp.int32) - where
    where &= before[:, None] + offset < cache.max_length
    lengths = before + jnp.sum(where, axis=1, dtype=jnp.int32)
    place = jnp.where(where, before[:, None] % block + offset, 2 * block)

    def joined(residual: Array, new: Array) -> Array:
        room = jnp.concatenate([residual, jnp.zeros_like(residual)], axis=1)
        return jax.vmap(lambda room, place, new: room.at[place].set(new, mode="drop"))(
            room, place, new
        )

    room = (joined(cache.residual[0], key), joined(cache.residual[1], value))
    is_full = lengths // block > before // block

    def descend() -> list[tuple[_Codes, _Codes]]:
        """Every stair's new block: what was one stair above."""
        above = [tuple(x[:, :block] for x in room)] + [
            _dequantize_both(stair, width, cache.residual[0])
            for stair, width in zip(cache.stairs[:-1], cache.bits[1:])
        ]
        return [_quantize_both(x, b, cache.group_sizes) for x, b in zip(above, cache.bits[1:])]

    def stay() -> list[tuple[_Codes, _Codes]]:
        return [
            *cache.stairs[:-1],
            jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), cache.stairs[-1]),
        ]

    *newer, oldest = jax.lax.cond(is_full.any(), descend, stay)
    stairs = [_choose(is_full, new, old) for new, old in zip(newer, cache.stairs)]
    index = before // block - len(newer)
    last = jax.tree.map(
        lambda stored, new: _write(stored, new, index, is_full & (index >= 0)),
        cache.stairs[-1],
        oldest,
    )
    residual = tuple(_choose(is_full, x[:, block:], x[:, :block]) for x in room)
    return dataclasses.replace(cache, residual=residual, stairs=(*stairs, last), lengths=lengths)


def _choose(condition: Array, new: Any, old: Any) -> Any:
    """`new` for the sequences where the condition holds, `old` elsewhere."""
    return jax.tree.map(
        lambda a, b: jnp.where(jnp.expand_dims(condition, range(1, a.ndim)), a, b), new, old
    )


def _write(stored: Array, new: Array, index: Array, condition: Array) -> Array:
    """`new [batch, ...]` in place of `stored [batch, blocks, ...]` at each sequence's index."""
    place = jnp.where(condition, index, stored.shape[1])
    return jax.vmap(lambda stored, new, place: stored.at[place].set(new, mode="drop"))(
        stored, new, place
    )


def _quantize_both(
    key_and_value: tuple[Array, ...], bits: int, group_sizes: tuple[int, int]
) -> tuple[_Codes, _Codes]:
    key, value = key_and_value
    return _quantize(key, bits, _TOKENS, group_sizes[0]), _quantize(
        value, bits, _ENTRIES, group_sizes[1]
    )


def _dequantize_both(codes: tuple[_Codes, _Codes], bits: int, like: Array) -> tuple[Array, Array]:
    return _dequantize(codes[0], bits, _TOKENS, like), _dequantize(codes[1], bits, _ENTRIES, like)


def _quantize(x: Array, bits: int, axis: int, size: int) -> _Codes:
    """Codes of `[..., tokens, kv_heads, head_dim]` in groups of a size along an axis."""
    axis += x.ndim
    groups = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    grouped = x.astype(jnp.float32).reshape(groups)
    minimum = grouped.min(axis=axis + 1).astype(x.dtype)
    spread = grouped.max(axis=axis + 1) - minimum.astype(jnp.float32)
    scale = (spread / (2**bits - 1)).astype(x.dtype)
    # The codes go with scale and minimum as they are stored.
    low, step = (jnp.expand_dims(a.astype(jnp.float32), axis + 1) for a in (minimum, scale))
    codes = jnp.round((grouped - low) / jnp.where(step > 0, step, 1))
    codes = jnp.clip(codes, 0, 2**bits - 1).reshape(x.shape)
    return _Codes(pack((codes - 2 ** (bits - 1)).astype(jnp.int8), bits), scale, minimum)


def _dequantize(codes: _Codes, bits: int, axis: int, like: Array) -> Array:
    """What the codes stand for: in type and head_dim, `like`."""
    head_dim = like.shape[-1]
    x = unpack(codes.values, bits, padding=-head_dim % values_per_byte(bits))
    x = x.astype(jnp.float32) + 2 ** (bits - 1)
    axis += x.ndim

    def spread(groups: Array) -> Array:
        # jnp.repeat would ask for the sharding of its result on a mesh with explicit axes.
        size = x.shape[axis] // groups.shape[axis]
        shape = (*groups.shape[: axis + 1], size, *groups.shape[axis + 1 :])
        groups = jnp.expand_dims(groups.astype(jnp.float32), axis + 1)
        return jnp.broadcast_to(groups, shape).reshape(x.shape)

    limits = jnp.finfo(like.dtype)
    x = spread(codes.minimum) + spread(codes.scale) * x
    return jnp.clip(x, float(limits.min), float(limits.max)).astype(like.dtype)
