"""Learning with noisy labels by two models that choose each other's examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.ranks import ascending_ranks
from jaxref.core.shards import AxisName, sum_over_shards


def forget_rate_schedule(forget_rate: float, warmup_epochs: int = 5) -> Callable[..., Array]:
    r"""The share of examples to leave out, which grows from 0 while models learn what is easy.

        R(e) = forget_rate · min(1, e / (warmup_epochs - 1)),   epochs e = 0, 1, ...

    Args:
      forget_rate: in [0, 1), about the share of wrong labels: 0.2 for CIFAR at that noise and for
        ANIMAL-10N, 0.3 for Clothing1M in the paper.
      warmup_epochs: at least 0: the epochs from 0 to the whole rate, both included; with 1 the
        first epoch has rate 0 and the second all, and with 0 so has the first, as for models that
        are trained already. Default 5, the authors'.

    Returns:
      A function of the epoch, an integer that may be traced, to the rate, a float32 scalar.

    Raises:
      ValueError: an argument out of its range.

    Use it for the `forget_rate` of `co_teaching_losses`: models fit the true labels before they
    memorise the wrong ones.

    Cost: a few scalars an epoch.

    Example:
      >>> schedule = forget_rate_schedule(0.2, 5)
      >>> [round(float(schedule(epoch)), 2) for epoch in range(6)]
      [0.0, 0.05, 0.1, 0.15, 0.2, 0.2]

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """
    check_interval(0, 1, closed="left", forget_rate=forget_rate)
    check_interval(0, jnp.inf, warmup_epochs=warmup_epochs)

    def rate(epoch: ArrayLike) -> Array:
        if warmup_epochs == 0:
            return jnp.full(jnp.shape(epoch), forget_rate, jnp.float32)
        progress = jnp.asarray(epoch, jnp.float32) / max(warmup_epochs - 1, 1)
        return forget_rate * jnp.minimum(progress, 1.0)

    return rate


def co_teaching_select(
    losses: ArrayLike,
    forget_rate: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Which examples of a batch to train on: those of the smallest losses (choice in a set).

        keep = the ⌊(1 - R) n⌋ examples with the smallest losses,   R = forget_rate

    Args:
      losses: `[...]` floating point; all entries together are the batch, n of them.
      forget_rate: R in [0, 1); may be traced, as of a `forget_rate_schedule`.
      where: boolean, broadcastable to `losses`: the examples that exist. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread.

    Returns:
      Boolean `[...]`. Of equal losses the first are taken; R = 0 keeps every example that exists.

    Raises:
      ValueError: a `forget_rate` outside of [0, 1), or a `where` that does not broadcast.
      TypeError: losses that are not floating point.

    Use it on the losses of one model to choose examples for another; a model that chooses its own
    repeats its own mistakes.

    Cost: a sort of the batch's losses; with `axis_name` every shard gathers and sorts all of them.

    Example:
      >>> co_teaching_select(jnp.array([0.3, 5.0, 0.1, 0.2]), 0.25).tolist()
      [True, False, True, True]

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140; co-teaching is of Han et al., "Co-teaching: Robust Training of Deep
    Neural Networks with Extremely Noisy Labels", 2018, arXiv:1804.06872.
    """
    check_floating(losses=losses)
    check_interval(0, 1, closed="left", forget_rate=forget_rate)
    check_broadcastable(jnp.shape(losses), where=where)
    exists = jnp.broadcast_to(True if where is None else where, jnp.shape(losses))
    ranks, number = ascending_ranks(losses, where=exists, axis_name=axis_name)
    kept = jnp.floor(
        (1 - forget_rate) * number + 1e-3
    )  # 0.7 of 10 are 7, whatever 0.7 is in binary
    return exists & (ranks < kept)


def co_teaching_losses(
    losses_a: ArrayLike,
    losses_b: ArrayLike,
    forget_rate: ArrayLike,
    *,
    selection_losses_a: ArrayLike | None = None,
    selection_losses_b: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    r"""The losses of two models on the examples that the other chose (co-teaching; of the set).

        L_a = mean of l_a over select(s_b),   L_b = mean of l_b over select(s_a)

    with the choice of `co_teaching_select`, through which no gradient goes.

    Args:
      losses_a: l_a `[...]` floating point, losses of model a in training.
      losses_b: l_b of the same shape, of model b.
      forget_rate: R in [0, 1), the share to leave out; may be traced.
      selection_losses_a: s_a, of the same shape: losses of model a by which it chooses for b, such
        as those in evaluation, of the features that `jaxref.nn.best_truncation` finds. Its entries
        are the examples of `losses_b`: in the authors' training each model chooses from a half of
        the batch, on which the other is trained. Default: `losses_a`.
      selection_losses_b: s_b likewise, of the examples of `losses_a`. Default: `losses_b`.
      where: boolean, broadcastable to the losses: the examples that exist. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread.

    Returns:
      (L_a, L_b), scalars in the types of the losses; minimise their sum, as neither depends on the
      other's parameters. 0 where nothing is chosen.

    Raises:
      ValueError: a `forget_rate` outside of [0, 1), or shapes that do not match.
      TypeError: losses that are not floating point.

    Use it to go on with two models that were trained on noisy labels with
    `jaxref.nn.nested_dropout`, one width for both in a step, and average their logits in the end.
    R = 0 trains both on everything.

    Cost: two models to train, with a forward and a backward pass each, one more forward pass each
    for losses in evaluation, and two sorts of the batch.

    Example:
      >>> a, b = jnp.array([0.1, 2.0, 0.2, 0.3]), jnp.array([0.2, 0.1, 3.0, 0.4])
      >>> loss_a, loss_b = jax.jit(co_teaching_losses)(a, b, 0.5)
      >>> print(loss_a, loss_b)  # b chose the first two, a the first and the third
      1.05 1.6

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """
    check_floating(losses_a=losses_a, losses_b=losses_b)
    s_a = losses_a if selection_losses_a is None else selection_losses_a
    s_b = losses_b if selection_losses_b is None else selection_losses_b
    shape = jnp.shape(losses_a)
    check_shape(shape, losses_b=losses_b, selection_losses_a=s_a, selection_losses_b=s_b)

    def mean_over(losses: ArrayLike, chosen: Array) -> Array:
        wide = jnp.asarray(losses).astype(compute_dtype(losses))
        total, number = sum_over_shards(
            (jnp.sum(jnp.where(chosen, wide, 0.0)), jnp.count_nonzero(chosen)), axis_name
        )
        return (total / jnp.maximum(number, 1)).astype(jnp.result_type(losses))

    of_a, of_b = (
        co_teaching_select(jax.lax.stop_gradient(s), forget_rate, where=where, axis_name=axis_name)
        for s in (s_a, s_b)
    )
    return mean_over(losses_a, of_b), mean_over(losses_b, of_a)
