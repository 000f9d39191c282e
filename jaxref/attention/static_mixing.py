"""Token mixers without weights that stand in for attention."""

from functools import reduce
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean

Reduction = Literal["min", "max", "mean"]
Context = Literal["global", "causal"] | None


def check_pair_reduction(reduction: str, context: str | None) -> None:
    """Raises ValueError unless `causal_pair_reduction` knows both.

    >>> check_pair_reduction("min", "causal")
    """
    if reduction not in ("min", "max", "mean"):
        raise ValueError(f"reduction must be 'min', 'max' or 'mean', got {reduction!r}")
    if context not in (None, "global", "causal"):
        raise ValueError(f"context must be None, 'global' or 'causal', got {context!r}")


def _reduce(candidates: list[Array], reduction: Reduction) -> Array:
    if reduction == "mean":
        return sum(candidates[1:], candidates[0]) / len(candidates)
    return reduce(jnp.minimum if reduction == "min" else jnp.maximum, candidates)


def _shift(x: Array, axis: int) -> Array:
    """Each entry's predecessor along `axis`; the first is its own."""
    length = x.shape[axis]
    first = jax.lax.slice_in_dim(x, 0, min(length, 1), axis=axis)
    others = jax.lax.slice_in_dim(x, 0, max(length - 1, 0), axis=axis)
    return jnp.concatenate([first, others], axis=axis)


def causal_pair_reduction(
    x: ArrayLike,
    *,
    reduction: Reduction = "min",
    context: Context = None,
    axis: int = -2,
    where: ArrayLike | None = None,
) -> Array:
    r"""Each token joined with the one before it, elementwise: a mixer in place of attention.

        y_t = reduce(x_t, x_{t-1}),    y_0 = x_0

    for each channel, with the minimum, maximum or mean as `reduce`. A context joins a third
    candidate g_t: with "causal" the mean of x_0 ... x_t; with "global" that of the whole sequence,
    and x_0 for the first token. It has no weights; a stack of L sees L tokens back, and a causal
    context all of them.

    Args:
      x: `[..., T, C]` floating point, the tokens along `axis`.
      reduction: "min", "max" or "mean". Default "min".
      context: None, "causal" or "global". Default None. "global" shows each token the ones that
        follow it: not for a language model.
      axis: the axis of the tokens.
      where: boolean, broadcastable to `x`: the tokens that exist. Others count for nothing and come
        out 0, and a token that follows one is joined with itself. Default: all.

    Returns:
      y of the shape and type of `x`, computed in at least float32. Where candidates are equal, the
      gradient is split between them.

    Raises:
      ValueError: an unknown `reduction` or `context`, `axis` out of range, or a mask that does not
        broadcast.
      TypeError: `x` is not floating point.

    Use it between linear maps where attention would be, or after the first map of an MLP in place
    of the activation (`jaxref.nn.CausalActivation`), where speed and size matter more than looking
    far back. `causal_pair_reduction_step` is the same one token at a time.

    Cost: O(T C), elementwise, with a cumulative sum for a causal context; no parameters.

    Example:
      >>> x = jnp.array([[3.0], [1.0], [2.0], [9.0]])
      >>> print(causal_pair_reduction(x).ravel())
      [3. 1. 1. 2.]
      >>> print(causal_pair_reduction(x, reduction="max", context="causal").ravel())
      [3. 3. 2. 9.]

    Reference: Hilsenbek, "Breaking the Attention Bottleneck", 2024, arXiv:2406.10906; the causal
    context is the safe form of its average over the whole sequence.
    """
    check_floating(x=x)
    check_pair_reduction(reduction, context)
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    check_broadcastable(x.shape, where=where)
    wide = x.astype(compute_dtype(x))
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        wide = jnp.where(where, wide, 0.0)
    previous = _shift(wide, axis)
    if where is not None:
        previous = jnp.where(_shift(where, axis), previous, wide)
    candidates = [wide, previous]
    if context is not None:
        exists = jnp.ones(x.shape, bool) if where is None else where
        count = jnp.cumsum(exists, axis=axis)
        if context == "causal":
            candidates.append(jnp.cumsum(wide, axis=axis) / jnp.maximum(count, 1))
        else:
            mean = masked_mean(wide, axis=axis, where=where, keepdims=True)
            candidates.append(jnp.where(count > 1, mean, wide))
    y = _reduce(candidates, reduction)
    return (y if where is None else jnp.where(where, y, 0.0)).astype(x.dtype)


class CausalPairState(NamedTuple):
    """What `causal_pair_reduction_step` remembers of the tokens so far.

    Attributes:
      previous: `[batch, features]` float32, the newest token.
      total: `[batch, features]` float32, the sum of all tokens.
      count: int32 `[batch]`, how many they are.
    """

    previous: Array
    total: Array
    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax


def causal_pair_reduction_init(batch: int, features: int) -> CausalPairState:
    r"""The state before the first token.

    Args:
      batch: sequences.
      features: channels of a token.

    Returns:
      The `CausalPairState` of zeros.

    Raises:
      ValueError: a size below 1.

    Use it before the first `causal_pair_reduction_step` of a generation. To start one sequence of a
    batch anew, set its `count` and `total` to 0.

    Cost: 2 features + 1 numbers a sequence.

    Example:
      >>> causal_pair_reduction_init(2, 8).previous.shape
      (2, 8)

    Reference: Hilsenbek, "Breaking the Attention Bottleneck", 2024, arXiv:2406.10906.
    """
    check_interval(1, jnp.inf, batch=batch, features=features)
    zeros = jnp.zeros((batch, features))
    return CausalPairState(zeros, zeros, jnp.zeros(batch, jnp.int32))


def causal_pair_reduction_step(
    x: ArrayLike,
    state: CausalPairState,
    *,
    reduction: Reduction = "min",
    context: Literal["causal"] | None = None,
) -> tuple[Array, CausalPairState]:
    r"""`causal_pair_reduction` of one more token, for generation.

        y_t = reduce(x_t, x_{t-1})   and   y_t = reduce(x_t, x_{t-1}, (x_0 + ... + x_t) / (t + 1))

    with a causal context.

    Args:
      x: `[batch, features]` floating point, the next token of each sequence.
      state: what the previous call or `causal_pair_reduction_init` gave.
      reduction: "min", "max" or "mean". Default "min".
      context: None or "causal". Default None.

    Returns:
      y_t of the shape and type of `x`, and the next state.

    Raises:
      ValueError: an unknown `reduction`, a `context` that reads the tokens to come, or a shape that
        does not match the state.
      TypeError: `x` is not floating point.

    Use it to decode with what was trained by `causal_pair_reduction`: both agree, the sums of a
    context up to float32's rounding.

    Cost: O(features) a sequence, however many tokens came before; no cache.

    Example:
      >>> state = causal_pair_reduction_init(1, 1)
      >>> for token in (3.0, 1.0, 2.0):
      ...     y, state = causal_pair_reduction_step(jnp.array([[token]]), state)
      >>> print(y)
      [[1.]]

    Reference: Hilsenbek, "Breaking the Attention Bottleneck", 2024, arXiv:2406.10906.
    """
    check_floating(x=x)
    check_pair_reduction(reduction, context)
    if context == "global":
        raise ValueError("context must be None or 'causal' in decoding, got 'global'")
    check_shape(state.previous.shape, x=x)
    x = jnp.asarray(x)
    wide = x.astype(state.previous.dtype)
    total, count = state.total + wide, state.count + 1
    candidates = [wide, jnp.where(count[:, None] > 1, state.previous, wide)]
    if context == "causal":
        candidates.append(total / count[:, None])
    y = _reduce(candidates, reduction).astype(x.dtype)
    return y, CausalPairState(wide, total, count)
