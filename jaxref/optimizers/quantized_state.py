"""Optimizers whose state is 8 bits a number: Adam and momentum."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers.blockwise import (
    block_absmax,
    check_size,
    cut_blocks,
    decode,
    encode,
    join_blocks,
    nan_as_inf,
    normalize_blocks,
    zero_code,
)
from jaxref.optimizers.common import descend

FullPrecision = str | Callable[[str], bool] | None


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`: trees like the parameters.

    Attributes:
      count: int32 scalar, the steps taken.
      mu: the average of the gradients: uint8 codes of the parameter's shape, or floating point for
        a parameter that is not quantized.
      mu_absmax: the scales of its blocks, float32 `[blocks]`; a single 0 for one not quantized.
      nu: the average of the squared gradients, alike.
      nu_absmax: the scales of its blocks.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    mu: optax.Updates
    mu_absmax: optax.Updates
    nu: optax.Updates
    nu_absmax: optax.Updates


def scale_by_adam_8bit(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    block_size: int = 2048,
    min_quantized_size: int = 4096,
    full_precision: FullPrecision = None,
) -> optax.GradientTransformation:
    r"""The direction of Adam, its two averages kept in 8 bits between the steps.

        m = b1 m̃ + (1 - b1) g,     v = b2 ṽ + (1 - b2) g²
        u = (m / (1 - b1^t)) / (√(v / (1 - b2^t)) + eps)
        m̃ ← Q(m),     ṽ ← Q(v)

    Q rounds to the dynamic tree format in blocks (`quantize_blockwise`), with signs for m and
    without for v. The step itself is Adam's in float32. Large parameters are worked on piece by
    piece, so that neither average ever exists whole in float32.

    Args:
      b1: in [0, 1), decay of m. Default 0.9.
      b2: in [0, 1), decay of v. Default 0.999.
      eps: at least 0. Default 1e-8.
      block_size: entries that share a scale, at least 1; need not divide the sizes of the
        parameters. Default 2048 as in the paper.
      min_quantized_size: parameters with fewer entries keep their averages in float32; at least 1.
        Default 4096 as in the paper.
      full_precision: which other parameters do: a regular expression, or a predicate, of a
        parameter's path ("layers/0/kernel"). Default None, no others.

    Returns:
      the transformation; its updates have the gradients' types. Its state is a
      `ScaleByAdam8bitState`. A gradient that is not finite makes all of its block not finite.

    Raises:
      ValueError: a number out of its range; in `update`, gradients of another structure or shape
        than the state's.
      TypeError: `block_size` or `min_quantized_size` is not an int: both fix shapes, so that
        `optax.inject_hyperparams` must be told that they are static.

    Use it in an `optax.chain` of one's own; `adam_8bit` is the whole optimizer.

    Cost: 2 bytes a parameter and 8 a block; decoding and coding of both averages each step.

    Example:
      >>> direction = scale_by_adam_8bit()
      >>> gradient = jnp.linspace(-1.0, 1.0, 4096)
      >>> updates, state = direction.update(gradient, direction.init(gradient))
      >>> state.mu.dtype, state.mu_absmax.shape, print(updates[:2])
      [-1. -1.]
      (dtype('uint8'), (2,), None)

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """
    check_interval(0, 1, closed="left", b1=b1, b2=b2)
    check_interval(0, jnp.inf, eps=eps)
    init_moment = _moment_init(block_size, min_quantized_size, full_precision)

    def init(params):
        mu, mu_absmax = init_moment(params, _SIGNED)
        nu, nu_absmax = init_moment(params, _UNSIGNED)
        return ScaleByAdam8bitState(jnp.zeros([], jnp.int32), mu, mu_absmax, nu, nu_absmax)

    def update(updates, state, params=None):
        del params
        check_same_tree(state.mu, updates=updates)
        count = optax.safe_increment(state.count)
        numbers = (b1, b2, eps, 1 / (1 - b1**count), 1 / (1 - b2**count))
        direction, *moments = _update_tree(
            _adam, numbers, updates, state[1:], (_SIGNED, _UNSIGNED), block_size
        )
        return direction, ScaleByAdam8bitState(count, *moments)

    return optax.GradientTransformation(init, update)


def adam_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    block_size: int = 2048,
    min_quantized_size: int = 4096,
    full_precision: FullPrecision = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    r"""Adam or AdamW with a state of 2 bytes a parameter instead of 8.

        x ← x - lr (u + wd x)

    with Adam's direction u from averages that are rounded, after the step, to 8 bits with one
    scale for each block (`scale_by_adam_8bit`). Hyperparameters carry over from Adam unchanged.

    An average of squares below 1.6e-7 of the largest in its block is rounded to 0. If such a
    coordinate still has momentum when its gradient vanishes, its next step is far longer than
    Adam's: give layers where gradients differ so much, embeddings and the output matrix of a
    language model, full precision.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      b1: in [0, 1), decay of the average of the gradients. Default 0.9.
      b2: in [0, 1), decay of the average of their squares. Default 0.999.
      eps: at least 0. Default 1e-8.
      block_size: entries that share a scale, at least 1; need not divide the sizes of the
        parameters. Default 2048 as in the paper.
      min_quantized_size: parameters with fewer entries keep a state in float32; at least 1.
        Default 4096 as in the paper.
      full_precision: which other parameters do: a regular expression, or a predicate, of a
        parameter's path ("embed/embedding"). The paper asks for it for embeddings; see also
        `jaxref.nn.StableEmbedding`. Default None, no others.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. Default 0, which is Adam.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; its updates have the gradients' types. A gradient that is not finite
      makes all of its block of the state not finite.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, or params
        missing where `weight_decay` needs them.
      TypeError: `block_size` or `min_quantized_size` is not an int: both fix shapes, so that
        `optax.inject_hyperparams` must be told that they are static.

    Use it where Adam's state is what does not fit; `lion` has half of Adam's without rounding.

    Cost: 2 bytes of state a parameter instead of 8; one gradient a step, and the rounding of both
    averages.

    The codes have the parameter's shape and shard like it. Blocks follow the flattened parameter: a
    parameter that is split along its first axis into pieces of whole blocks is updated without
    communication, any other way of splitting exchanges codes and gradients.

    Example:
      >>> optimizer = adam_8bit(0.1, full_precision="embed")
      >>> x = {"embed": jnp.ones((64, 64)), "out": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> print(*(leaf.dtype for leaf in jax.tree.leaves(optimizer.init(x)[0].mu)))
      float32 float32 uint8

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """
    direction = scale_by_adam_8bit(b1, b2, eps, block_size, min_quantized_size, full_precision)
    return descend(direction, learning_rate, weight_decay, mask)


class ScaleByMomentum8bitState(NamedTuple):
    """State of `scale_by_momentum_8bit`: trees like the parameters.

    Attributes:
      trace: the momentum: uint8 codes of the parameter's shape, or floating point for a parameter
        that is not quantized.
      trace_absmax: the scales of its blocks, float32 `[blocks]`; a single 0 for one not quantized.
    """

    trace: optax.Updates
    trace_absmax: optax.Updates


def scale_by_momentum_8bit(
    momentum: ArrayLike = 0.9,
    block_size: int = 2048,
    min_quantized_size: int = 4096,
    full_precision: FullPrecision = None,
) -> optax.GradientTransformation:
    r"""The momentum of SGD, kept in 8 bits between the steps.

        m = μ m̃ + g,     u = m,     m̃ ← Q(m)

    Q rounds to the signed dynamic tree format in blocks (`quantize_blockwise`).

    Args:
      momentum: μ in [0, 1). Default 0.9.
      block_size, min_quantized_size, full_precision: as in `scale_by_adam_8bit`.

    Returns:
      the transformation; its updates have the gradients' types. Its state is a
      `ScaleByMomentum8bitState`.

    Raises:
      ValueError, TypeError: as `scale_by_adam_8bit`.

    Use it in an `optax.chain` of one's own; `momentum_8bit` is the whole optimizer.

    Cost: one byte a parameter and 4 a block; decoding and coding each step.

    Example:
      >>> direction = scale_by_momentum_8bit(0.5)
      >>> gradient = jnp.ones(4096)
      >>> _, state = direction.update(gradient, direction.init(gradient))
      >>> print(direction.update(gradient, state)[0][:2])
      [1.5 1.5]

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """
    check_interval(0, 1, closed="left", momentum=momentum)
    init_moment = _moment_init(block_size, min_quantized_size, full_precision)

    def init(params):
        return ScaleByMomentum8bitState(*init_moment(params, _SIGNED))

    def update(updates, state, params=None):
        del params
        check_same_tree(state.trace, updates=updates)
        direction, *moments = _update_tree(
            _heavy_ball, (momentum,), updates, state, (_SIGNED,), block_size
        )
        return direction, ScaleByMomentum8bitState(*moments)

    return optax.GradientTransformation(init, update)


def momentum_8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    block_size: int = 2048,
    min_quantized_size: int = 4096,
    full_precision: FullPrecision = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    r"""SGD with momentum, with a state of 1 byte a parameter instead of 4.

        x ← x - lr (m + wd x),     m = μ m̃ + g,     m̃ ← Q(m)

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      momentum: μ in [0, 1). Default 0.9.
      block_size, min_quantized_size, full_precision: as in `adam_8bit`.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. Default 0.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError, TypeError: as `adam_8bit`.

    Use it where SGD trains well (convolutional networks); `adam_8bit` elsewhere.

    Cost: one byte of state a parameter instead of 4; one gradient a step, and the rounding of the
    momentum.

    Example:
      >>> optimizer = momentum_8bit(0.1)
      >>> x = jnp.ones(4096)
      >>> print(optimizer.update(x, optimizer.init(x), x)[0][:2])
      [-0.1 -0.1]

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """
    direction = scale_by_momentum_8bit(momentum, block_size, min_quantized_size, full_precision)
    return descend(direction, learning_rate, weight_decay, mask)


_SIGNED, _UNSIGNED = True, False

# A large leaf is updated in at most so many pieces, none of fewer entries than this, so that a
# sixteenth of its averages in float32 is alive, or less than a cache holds.
_PIECES, _PIECE_SIZE = 32, 2**17
# It is cut into up to so many segments, and a piece takes blocks of all of them: split along its
# first axis over that many devices, each device has its part of every piece.
_SEGMENTS = 256


def _adam(numbers, g, m, v):
    b1, b2, eps, scale_m, scale_v = numbers
    m = (1 - b1) * g + b1 * m
    v = (1 - b2) * g**2 + b2 * v
    return scale_m * m / (jnp.sqrt(scale_v * v) + eps), m, v


def _heavy_ball(numbers, g, m):
    (momentum,) = numbers
    m = g + momentum * m
    return m, m


def _moment_init(block_size: int, min_quantized_size: int, full_precision: FullPrecision):
    """`init(params, signed)`: codes or zeros like the parameters, and the scales of the codes."""
    check_size(block_size=block_size, min_quantized_size=min_quantized_size)
    if callable(full_precision):
        keeps: Callable[[str], Any] = full_precision
    elif full_precision is None or isinstance(full_precision, str):
        keeps = re.compile("(?!)" if full_precision is None else full_precision).search
    else:
        raise TypeError(
            "full_precision must be a regular expression or a predicate of a path, got "
            f"{full_precision!r}"
        )

    def is_quantized(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.size(x) >= min_quantized_size and not keeps(name)

    def init(params, signed):
        def moment(path, x):
            if is_quantized(path, x):
                return jnp.full_like(x, zero_code(signed), dtype=jnp.uint8)
            return jnp.zeros_like(x, dtype=compute_dtype(x))

        def absmax(path, x):
            # Not an empty array for the others: orbax does not save those.
            shape = (-(-jnp.size(x) // block_size),) if is_quantized(path, x) else ()
            return jnp.zeros(shape, jnp.float32)

        with_path = jax.tree_util.tree_map_with_path
        return with_path(moment, params), with_path(absmax, params)

    return init


def _update_tree(rule, numbers, updates, moments, signs, block_size):
    """The direction, and each of `moments` (codes and scales in turn), as trees like `updates`."""
    rows = zip(*map(jax.tree.leaves, (updates, *moments)))
    results = [_update_leaf(rule, signs, block_size, numbers, *row) for row in rows]
    structure = jax.tree.structure(updates)
    columns = range(1 + len(moments))
    return [jax.tree.unflatten(structure, [row[i] for row in results]) for i in columns]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _update_leaf(rule, signs, block_size, numbers, gradient, *stored):
    """`rule` on one leaf, with its moments as they are stored: codes and scales in turn."""
    codes, scales = stored[::2], stored[1::2]
    if codes[0].dtype == jnp.uint8:
        quantized = functools.partial(_update_in_pieces, rule, signs, block_size)
        u, codes, scales = _with_auto_axes(quantized, (gradient, codes, scales))(
            numbers, gradient, codes, scales
        )
    else:
        u, *new = rule(numbers, gradient.astype(compute_dtype(gradient)), *codes)
        u = u.astype(gradient.dtype)
        codes = tuple(m.astype(old.dtype) for m, old in zip(new, codes))
    return u, *(x for pair in zip(codes, scales) for x in pair)


def _with_auto_axes(function, results):
    """`function`, its reshapes free of explicit mesh axes; it returns arrays like `results`."""
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, results)
    meshes = [s.mesh for s in jax.tree.leaves(shardings) if not s.mesh.empty]
    if not meshes:
        return function
    on_mesh = jax.tree.map(lambda s: jax.NamedSharding(meshes[0], s.spec), shardings)
    return jax.sharding.auto_axes(function, out_sharding=on_mesh)


def _update_in_pieces(rule, signs, block_size, numbers, gradient, codes, scales):
    """`rule` on a leaf with quantized moments: the direction, new codes and new scales."""
    aligned = gradient.size % block_size == 0
    segments = math.gcd(gradient.size // block_size, _SEGMENTS) if aligned else 1
    length = gradient.size // segments
    least = -(-length // (_PIECES * block_size))
    blocks = max(least, _PIECE_SIZE // (segments * block_size))  # of each segment, in a piece
    cut = functools.partial(lax.dynamic_slice_in_dim, axis=1)
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=1)

    def piece(first, width, carry):
        """The update of the blocks from `first` on, `width` entries of each segment."""
        u, codes, scales = jax.tree.map(lambda x: x.reshape(segments, -1), carry)
        start, count = first * block_size, -(-width // block_size)
        g = nan_as_inf(cut_blocks(cut(u, start, width), block_size))
        old = [
            decode(cut_blocks(cut(c, start, width), block_size, zero_code(signed)), signed)
            * cut(s, first, count)[..., None]
            for c, s, signed in zip(codes, scales, signs)
        ]
        direction, *new = rule(numbers, g.astype(compute_dtype(g)), *old)
        new = [m.astype(jnp.float32) for m in new]
        absmax = [block_absmax(m) for m in new]
        coded = [encode(normalize_blocks(m, s), signed) for m, s, signed in zip(new, absmax, signs)]
        updated = (
            put(u, join_blocks(direction.astype(u.dtype), width), start),
            tuple(put(c, join_blocks(x, width), start) for c, x in zip(codes, coded)),
            tuple(put(s, x, first) for s, x in zip(scales, absmax)),
        )
        return jax.tree.map(lambda new, x: new.reshape(x.shape), updated, carry)

    carry = gradient, codes, scales  # the direction takes the gradient's place
    width = blocks * block_size
    pieces, rest = divmod(length, width)
    if rest:  # XLA updates in place in loops; the barrier keeps it from unrolling this one
        once = lax.optimization_barrier(1)
        carry = lax.fori_loop(0, once, lambda i, c: piece(pieces * blocks, rest, c), carry)
    if pieces:
        carry = lax.fori_loop(0, pieces, lambda i, c: piece(i * blocks, width, c), carry)
    return carry
