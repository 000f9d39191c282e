"""Distillation-oriented momentum: a longer memory for what the teacher says than for the labels."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_same_tree, check_shape
from jaxref.optimizers.common import (
    accumulate,
    broadcast_mask,
    check_moment_dtype,
    check_rate,
    descend,
    store,
    widen,
    zeros_of_moment,
)


class DistillationOrientedState(NamedTuple):
    """State of `scale_by_distillation_oriented_momentum`.

    Attributes:
      task: v_ce, the momentum of the task's gradients; a tree like the parameters.
      distillation: v_kd, the momentum of the distillation loss's gradients.
    """

    task: optax.Updates
    distillation: optax.Updates


def distillation_value_and_grads(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, tuple[optax.Updates, optax.Updates]]]:
    r"""The two losses of a distillation and the gradient of each, from one forward pass.

        (l_ce, l_kd), (∂l_ce/∂x, ∂l_kd/∂x)

    The losses are one function, since what they share is the student's logits.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> (task_loss, distillation_loss)`, two floating
        scalars, each with its coefficient: for plain distillation 0.1 CE and 0.9 T² KL.
      has_aux: whether it returns `((task_loss, distillation_loss), aux)`. Default False.

    Returns:
      a function of the same arguments that returns `(losses, (task_grads, distillation_grads))`,
      where `losses` is what `loss_fn` returns, aux included; gradients are trees like params.

    Raises:
      ValueError: in the call, `loss_fn` returns no pair of scalars.

    Use it with `distillation_oriented_sgd`, whose momenta need the gradients apart.

    Cost: one pass forward and two backward, where two calls of `jax.value_and_grad` would go
    forward twice; two trees of gradients.

    Example:
      >>> student_losses = lambda x, teacher: (x**2 / 2, 3 * (x - teacher) ** 2 / 2)
      >>> losses, grads = distillation_value_and_grads(student_losses)(jnp.array(2.0), 1.0)
      >>> print(*losses, *grads)
      2.0 1.5 2.0 3.0

    Reference: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", 2023,
    arXiv:2307.08436.
    """

    def value_and_grads(params, *args, **kwargs):
        def pair_and_aux(params):
            result = loss_fn(params, *args, **kwargs)
            losses, aux = result if has_aux else (result, None)
            if not isinstance(losses, tuple | list) or len(losses) != 2:
                raise ValueError(
                    f"loss_fn must return (task_loss, distillation_loss), got {losses}"
                )
            check_shape((), task_loss=losses[0], distillation_loss=losses[1])
            return tuple(losses), aux

        (task, distillation), pull_back, aux = jax.vjp(pair_and_aux, params, has_aux=True)
        (task_grads,) = pull_back((jnp.ones_like(task), jnp.zeros_like(distillation)))
        (distillation_grads,) = pull_back((jnp.zeros_like(task), jnp.ones_like(distillation)))
        losses = task, distillation
        return (losses, aux) if has_aux else losses, (task_grads, distillation_grads)

    return value_and_grads


def scale_by_distillation_oriented_momentum(
    momentum: ArrayLike = 0.9,
    delta: ArrayLike = 0.075,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    shared_mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of DOT: momenta of two gradients, the distillation's with the longer memory.

        v_ce ← (μ - Δ) v_ce + g_ce + wd x
        v_kd ← (μ + Δ) v_kd + g_kd,     v_ce = v_kd = 0 at first
        u = v_ce + v_kd

    Under steady gradients u tends to g_ce/(1 - μ + Δ) + g_kd/(1 - μ - Δ), with the defaults
    5.7 g_ce + 40 g_kd. With Δ = 0 it is the momentum of the sum of the gradients.

    Args:
      momentum: μ in [0, 1). Default 0.9.
      delta: Δ at least 0, with μ - Δ at least 0 and μ + Δ below 1. Default 0.075, the paper's for
        CIFAR-100 and Tiny-ImageNet; it takes 0.09 for ImageNet.
      mu_dtype: the floating type of v_ce and v_kd; None takes the parameters'.
      weight_decay: wd at least 0, L2 regularisation of the task. Default 0.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.
      shared_mask: tree of booleans: which parameters both losses reach. The others, a projector
        of features for the distillation loss say, have Δ = 0. None: all are shared.

    Returns:
      the transformation; `update(task_grads, state, params, distillation_grads=...)`. Its updates
      have the task gradients' types, and are computed in at least float32. Its state is a
      `DistillationOrientedState`. A leaf that is None in one of the two trees of gradients has
      Δ = 0 there, as `shared_mask` would say.

      `optax.MultiSteps` averages the task gradients alone: accumulate both before the update.
      Transformations before it in an `optax.chain`, clipping say, see the task gradients alone.

    Raises:
      ValueError: a number out of its range; in `update`, `distillation_grads` missing, params
        missing where `weight_decay` needs them, or trees that do not match.
      TypeError: `mu_dtype` is not floating point.

    Use it in an `optax.chain` of one's own; `distillation_oriented_sgd` is the whole optimizer.

    Cost: two momenta for each parameter, as many as Adam has; a step needs two gradients.

    Example:
      >>> direction = scale_by_distillation_oriented_momentum()
      >>> task, teacher = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> state = direction.init(task)
      >>> for _ in range(500):
      ...     u, state = direction.update(task, state, distillation_grads=teacher)
      >>> print(u.round(2))
      [ 5.71 40. ]

    Reference: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", 2023,
    arXiv:2307.08436.
    """
    return _completed(_momenta(momentum, delta, mu_dtype, weight_decay, mask), shared_mask)


def distillation_oriented_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    delta: ArrayLike = 0.075,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ArrayLike = 5e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    shared_mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DOT: SGD for distillation, with a momentum for each of the two losses.

        v_ce ← (μ - Δ) v_ce + g_ce + wd x
        v_kd ← (μ + Δ) v_kd + g_kd
        x ← x - lr (v_ce + v_kd)

    The losses' gradients conflict; the longer momentum lets the distillation lead, so that the
    student ends at flatter minima with a lower distillation loss.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr. The paper takes 0.05 for CIFAR-100
        and 0.2 for ImageNet.
      momentum: μ in [0, 1). Default 0.9.
      delta: Δ at least 0, with μ - Δ at least 0 and μ + Δ below 1. Default 0.075, the paper's for
        CIFAR-100 and Tiny-ImageNet; it takes 0.09 for ImageNet.
      mu_dtype: the floating type of v_ce and v_kd; None takes the parameters'.
      weight_decay: wd at least 0, L2 regularisation of the task, not decoupled. Default 5e-4.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.
      shared_mask: tree of booleans: which parameters both losses reach; the others have Δ = 0.
        None: all are shared. See `scale_by_distillation_oriented_momentum`.

    Returns:
      the transformation; `update(task_grads, state, params, distillation_grads=...)`. Its updates
      have the task gradients' types. On None leaves, accumulation and clipping see
      `scale_by_distillation_oriented_momentum`.

    Raises:
      ValueError: a number out of its range; in `update`, `distillation_grads` missing, params
        missing where `weight_decay` needs them, or trees that do not match.
      TypeError: `mu_dtype` is not floating point.

    Use it in place of SGD with momentum where a student learns from labels and from a teacher;
    `distillation_value_and_grads` computes its gradients.

    Cost: two momenta for each parameter; two gradients a step, from one pass forward and two
    backward.

    Example:
      >>> optimizer = distillation_oriented_sgd(0.1, weight_decay=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> task, teacher = jnp.array([3.0, 1.0]), jnp.array([1.0, 0.0])
      >>> print(optimizer.update(task, optimizer.init(x), x, distillation_grads=teacher)[0])
      [-0.45  0.  ]

    Reference: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", 2023,
    arXiv:2307.08436.
    """
    direction = _momenta(momentum, delta, mu_dtype, weight_decay, mask)
    return _completed(descend(direction, learning_rate), shared_mask)


def _momenta(momentum, delta, mu_dtype, weight_decay, mask):
    """The direction, for two whole trees of gradients and one that says what is shared."""
    check_interval(0, 1, closed="left", momentum=momentum)
    check_rate(delta=delta, weight_decay=weight_decay)
    short, long = momentum - delta, momentum + delta
    check_interval(0, 1, closed="left", **{"momentum - delta": short, "momentum + delta": long})
    check_moment_dtype(mu_dtype)
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init(params):
        return DistillationOrientedState(
            zeros_of_moment(params, mu_dtype), zeros_of_moment(params, mu_dtype)
        )

    def update(updates, state, params=None, *, distillation_grads, shared, **extra_args):
        del extra_args
        check_same_tree(state.task, updates=updates)
        task = widen(updates)
        if decays:
            if params is None:
                raise ValueError("params must be passed to update: weight_decay needs them")
            check_same_tree(updates, params=params)
            decayed = broadcast_mask(mask, updates)
            task = jax.tree.map(
                lambda g, x, here: g + weight_decay * here * x, task, widen(params), decayed
            )
        gaps = jax.tree.map(lambda here: delta * here, shared)
        task = jax.tree.map(
            lambda v, g, gap: accumulate(momentum - gap, 1, v, g), state.task, task, gaps
        )
        distillation = jax.tree.map(
            lambda v, g, gap: accumulate(momentum + gap, 1, v, g),
            state.distillation,
            distillation_grads,
            gaps,
        )
        direction = jax.tree.map(jnp.add, task, distillation)
        state = DistillationOrientedState(
            store(task, state.task), store(distillation, state.distillation)
        )
        return store(direction, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _completed(inner, shared_mask):
    """`inner` behind a step that makes both trees of gradients whole, and says what is shared."""

    def absent(gradient):
        return gradient is None or isinstance(gradient, optax.MaskedNode)

    def zeros_like(gradient):
        return jax.tree.map(jnp.zeros_like, gradient)

    def of_task(task, distillation):
        return zeros_like(distillation) if task is None else task

    def of_distillation(task, distillation):
        # `optax.masked` takes leaves out of the updates, and leaves extra arguments whole.
        if isinstance(task, optax.MaskedNode):
            return task
        return zeros_like(task) if distillation is None else distillation

    def by_both(task, distillation):
        return task is not None and distillation is not None

    def update(updates, state, params=None, *, distillation_grads=None, **extra_args):
        if distillation_grads is None:
            raise ValueError(
                "distillation_grads must be passed to update: the gradients of the distillation "
                "loss, got None"
            )
        try:
            task, distillation, both = (
                jax.tree.map(choose, updates, distillation_grads, is_leaf=absent)
                for choose in (of_task, of_distillation, by_both)
            )
        except ValueError as error:
            raise ValueError(
                f"distillation_grads must have the tree structure {jax.tree.structure(updates)}, "
                f"got {jax.tree.structure(distillation_grads)}"
            ) from error
        check_same_tree(task, distillation_grads=distillation)
        shared = jax.tree.map(
            operator.and_, broadcast_mask(both, task), broadcast_mask(shared_mask, task)
        )
        return inner.update(
            task, state, params, distillation_grads=distillation, shared=shared, **extra_args
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)
