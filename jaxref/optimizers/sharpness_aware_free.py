"""SAF and MESA: flat minima at the cost of one gradient, by staying near one's past outputs.

`sharpness_aware.py` has SAM, which takes two.
"""

from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype

_NEVER = jnp.iinfo(jnp.int32).min  # before any epoch that a lag can reach back to


def trajectory_loss(
    logits: ArrayLike,
    past_logits: ArrayLike,
    *,
    temperature: float = 5.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""How far an example's outputs have moved from its past ones, a smoothed KL divergence.

        τ² KL(p ‖ q) = τ² Σ_c p_c (log p_c - log q_c)
        p = softmax(past / τ),     q = softmax(logits / τ)

    Its gradient with respect to the logits is τ (q - p); the past is a constant. A model that has
    just dropped into a sharp minimum is far from its past outputs, so that penalising the distance
    keeps it out.

    Args:
      logits: floating point, `[..., classes]`.
      past_logits: floating point, of the same shape; -inf is a class of probability 0.
      temperature: τ above 0. Default 5, the authors'; the factor τ² is their code's and keeps the
        gradient of the size of cross-entropy's.
      axis: the class axis. Default -1.
      where: boolean, broadcastable to `logits`: the classes that exist for an example.

    Returns:
      one value per example, at least 0 up to rounding, of the shape without `axis` and in the type
      of `logits`.

    Raises:
      ValueError: shapes that differ, an `axis` out of range, `temperature` not above 0.
      TypeError: logits that are not floating point.

    Use it alone for a past of one's own; `saf_loss` and `mesa_loss` add it to a loss.

    Cost: two softmaxes over the classes.

    Example:
      >>> print(trajectory_loss(jnp.array([[0.0, 0.0]]), jnp.array([[5.0, 0.0]])))
      [2.773...]

    Reference: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", 2022,
    arXiv:2205.14083.
    """
    logits, past_logits = jnp.asarray(logits), jax.lax.stop_gradient(jnp.asarray(past_logits))
    check_floating(logits=logits, past_logits=past_logits)
    check_shape(logits.shape, past_logits=past_logits)
    check_broadcastable(logits.shape, where=where)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    (axis,) = canonical_axes(axis, logits.ndim)
    log_q, log_p = (
        masked_log_softmax(x.astype(compute_dtype(x)) / temperature, axis=axis, where=where)
        for x in (logits, past_logits)
    )
    p = jnp.exp(log_p)
    terms = p * jnp.where(p > 0, log_p - log_q, 0.0)
    return (temperature**2 * jnp.sum(terms, axis=axis)).astype(logits.dtype)


class SAFState(NamedTuple):
    """The memory of `saf_loss`; a slot of a ring for each of the last `lag` epochs.

    Attributes:
      logits: `[lag, examples, ..., classes]`, each example's outputs less their largest, which
        changes no softmax and keeps the likely classes exact in few bits.
      epoch: int32 `[lag, examples]`, when they were stored; far below 0 where they never were.
    """

    logits: Array
    epoch: Array


def saf_memory_init(
    num_examples: int,
    logits_shape: int | tuple[int, ...],
    lag: int = 3,
    dtype: DTypeLike = jnp.bfloat16,
) -> SAFState:
    r"""The empty memory of `saf_loss`: every example's outputs at its last `lag` epochs.

    Args:
      num_examples: at least 1; ids run from 0 to num_examples - 1.
      logits_shape: the shape of one example's logits, classes last: `10` or `(10,)` for a
        classifier, `(length, vocabulary)` for a language model whose example is a sequence.
      lag: at least 1, how many epochs back the past lies. Default 3, the authors'; they take 2
        for ImageNet.
      dtype: the floating type to store logits in. Default bfloat16.

    Returns:
      the `SAFState`. To shard it with the data, over the examples, take
      `jax.jit(saf_memory_init, static_argnums=(0, 1), out_shardings=...)` with
      `PartitionSpec(None, "data")` for both arrays, so that it never lies on one device.

    Raises:
      ValueError: a size that is no integer of at least 1.
      TypeError: `dtype` is not floating point.

    Use it once, before training with `saf_loss`; where this is too much memory, `mesa_loss` does
    without.

    Cost: 2 lag · num_examples · classes bytes in bfloat16, and 4 lag · num_examples for the epochs.

    Example:
      >>> saf_memory_init(50_000, 10, lag=2).logits.shape
      (2, 50000, 10)

    Reference: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", 2022,
    arXiv:2205.14083.
    """
    shape = (*logits_shape,) if isinstance(logits_shape, tuple | list) else (logits_shape,)
    sizes = {"num_examples": num_examples, "lag": lag, "logits_shape": shape}
    for name, size in sizes.items():
        each = size if isinstance(size, tuple) else (size,)
        if not each or any(not isinstance(n, Integral) or n < 1 for n in each):
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type, got {dtype!r}")
    return SAFState(
        logits=jnp.zeros((lag, num_examples, *shape), dtype),
        epoch=jnp.full((lag, num_examples), _NEVER, jnp.int32),
    )


def saf_loss(
    losses: ArrayLike,
    logits: ArrayLike,
    state: SAFState,
    example_ids: ArrayLike,
    epoch: int | Array,
    *,
    weight: ArrayLike = 0.3,
    temperature: float = 5.0,
    start_epoch: ArrayLike = 5,
    end_epoch: ArrayLike | None = None,
) -> tuple[Array, SAFState]:
    r"""SAF: a loss, and the distance of the outputs from the same example's of `lag` epochs ago.

        losses + weight τ² KL(softmax(past / τ) ‖ softmax(logits / τ))     (see `trajectory_loss`)

    Then the logits take the place of the past ones, in the slot epoch mod lag, where they will be
    the past of epoch + lag. The second term is 0 up to `start_epoch`, from `end_epoch` on, and for
    every example that was not seen in exactly the epoch that lies `lag` before.

    Args:
      losses: floating point, `[batch, ...]`: each example's (or token's) loss, cross-entropy with
        label smoothing 0.1 in the paper.
      logits: floating point, `[batch, ..., classes]`.
      state: from `saf_memory_init`, for logits of this shape.
      example_ids: integers `[batch]`, the same for an example in every epoch. An id outside of
        0 ... num_examples - 1 (of padding, say) has no past and is not stored. Where one comes
        twice, either of the two is stored.
      epoch: integer, from 0: how often the data has been gone through.
      weight: at least 0. Default 0.3, the authors'.
      temperature: τ above 0. Default 5, the authors'.
      start_epoch: the last epoch without the second term. Default 5; 30 percent of the epochs is
        the authors' other choice. -1 starts as soon as there is a past.
      end_epoch: the first epoch without it again. Default None: never.

    Returns:
      the values per example, of the shape and type of `losses` (their mean is the training loss),
      and the new state. NaN logits are stored too, and are back `lag` epochs later.

    Raises:
      ValueError: shapes that do not match, a number out of its range.
      TypeError: `losses` or `logits` not floating point, `example_ids` or `epoch` no integers.

    Use it for flat minima at the cost of one gradient, where the same examples come again in every
    epoch; `mesa_loss` needs no memory by example, `sam_value_and_grad` a second gradient instead.

    Cost: one gradient a step; the stored outputs of all examples, of which a step reads and writes
    a row for each in the batch (on CPU, XLA copies the table besides).

    Under `jit`, donate the state. With the state sharded over the examples inside `shard_map`, ids
    count from the shard's first example, and nothing is communicated.

    Example:
      >>> state = saf_memory_init(num_examples=100, logits_shape=2, lag=1)
      >>> losses, ids = jnp.array([1.0]), jnp.array([42])
      >>> for epoch, logits in enumerate(jnp.array([[[5.0, 0.0]], [[0.0, 0.0]]])):
      ...     values, state = saf_loss(losses, logits, state, ids, epoch, start_epoch=-1)
      ...     print(values)
      [1.]
      [1.832...]

    Reference: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", 2022,
    arXiv:2205.14083.
    """
    logits, ids = jnp.asarray(logits), jnp.asarray(example_ids)
    check_floating(logits=logits)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"example_ids must be integers, got {ids.dtype.name}")
    lag, num_examples = state.epoch.shape
    check_shape(logits.shape[:1], example_ids=ids)
    check_shape((lag, num_examples, *logits.shape[1:]), **{"state.logits": state.logits})
    active = _active(epoch, start_epoch, end_epoch)

    slot, ids = epoch % lag, ids.astype(jnp.int32)
    inside = (ids >= 0) & (ids < num_examples)
    row = slot, jnp.where(inside, ids, 0)
    known = inside & (state.epoch[row] == epoch - lag)
    counted = jnp.reshape(active & known, (-1,) + (1,) * (logits.ndim - 2))
    # Rows are read and written as bits: XLA for CPU would convert all of a bfloat16 table.
    dtype = state.logits.dtype
    bits = jnp.dtype(f"uint{jnp.finfo(dtype).bits}")
    table = jax.lax.bitcast_convert_type(state.logits, bits)
    past = jax.lax.bitcast_convert_type(table[row], dtype)
    values = _with_trajectory(losses, logits, past, counted, weight, temperature)

    newest = jax.lax.stop_gradient(logits - jnp.max(logits, axis=-1, keepdims=True))
    newest = jax.lax.bitcast_convert_type(newest.astype(dtype), bits)
    row = slot, jnp.where(inside, ids, num_examples)  # where writing does nothing
    table = table.at[row].set(newest, mode="drop")
    return values, SAFState(
        logits=jax.lax.bitcast_convert_type(table, dtype),
        epoch=state.epoch.at[row].set(epoch, mode="drop"),
    )


def mesa_loss(
    losses: ArrayLike,
    logits: ArrayLike,
    ema_logits: ArrayLike,
    epoch: int | Array,
    *,
    weight: ArrayLike = 0.8,
    temperature: float = 5.0,
    start_epoch: ArrayLike = 5,
    end_epoch: ArrayLike | None = None,
) -> Array:
    r"""MESA: a loss, and the distance of the outputs from those of the averaged parameters.

        losses + weight τ² KL(softmax(ema_logits / τ) ‖ softmax(logits / τ))
        after the step  v ← β v + (1 - β) w

    v are the parameters that `ema_logits` are computed with, on the same batch;
    `optax.incremental_update(w, v, 1 - β)` keeps them, with β = 0.9995 in the paper and 0.9998 in
    the authors' code. With β = 0 they are the parameters themselves, and the second term is 0.

    Args:
      losses: floating point, `[...]`: each example's (or token's) loss.
      logits: floating point, `[..., classes]`.
      ema_logits: floating point, of the same shape; a constant, no gradient goes through it.
      epoch: integer, from 0: how often the data has been gone through.
      weight: at least 0. Default 0.8, the authors'.
      temperature: τ above 0. Default 5, the authors'.
      start_epoch: the last epoch without the second term. Default 5.
      end_epoch: the first epoch without it again. Default None: never.

    Returns:
      the values per example, of the shape and type of `losses`; their mean is the training loss.

    Raises:
      ValueError: shapes that do not match, a number out of its range.
      TypeError: `losses` or logits not floating point, `epoch` no integer.

    Use it where the memory by example of `saf_loss` is too large or examples do not come again.

    Cost: one more forward pass a step, and one more set of parameters.

    Example:
      >>> logits, average = jnp.array([[0.0, 0.0]]), jnp.array([[5.0, 0.0]])
      >>> print(mesa_loss(jnp.array([1.0]), logits, average, epoch=6))
      [3.218...]

    Reference: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", 2022,
    arXiv:2205.14083.
    """
    logits = jnp.asarray(logits)
    check_floating(logits=logits, ema_logits=ema_logits)
    check_shape(logits.shape, ema_logits=ema_logits)
    active = _active(epoch, start_epoch, end_epoch)
    return _with_trajectory(losses, logits, ema_logits, active, weight, temperature)


def _active(epoch, start_epoch, end_epoch):
    """Whether the trajectory loss counts in this epoch."""
    end = jnp.iinfo(jnp.int32).max if end_epoch is None else end_epoch
    if not jnp.issubdtype(jnp.result_type(epoch), jnp.integer):
        raise TypeError(f"epoch must be an integer, got {epoch!r}")
    check_interval(0, jnp.inf, epoch=epoch)
    check_interval(-jnp.inf, jnp.inf, start_epoch=start_epoch, end_epoch=end)
    return (epoch > start_epoch) & (epoch < end)


def _with_trajectory(losses, logits, past_logits, counted, weight, temperature):
    """losses + weight trajectory_loss where it is counted, computed in at least float32."""
    losses = jnp.asarray(losses)
    check_floating(losses=losses)
    check_shape(logits.shape[:-1], losses=losses)
    check_interval(0, jnp.inf, weight=weight)
    logits = logits.astype(compute_dtype(logits, losses))
    distance = trajectory_loss(logits, past_logits, temperature=temperature)
    return (losses + weight * jnp.where(counted, distance, 0.0)).astype(losses.dtype)
