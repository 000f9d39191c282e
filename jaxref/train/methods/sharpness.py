"""Losses beside the gradient's own: worst points nearby, past outputs, a teacher."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxref import optimizers
from jaxref.core.checks import check_interval
from jaxref.train.methods.frame import (
    Batch,
    Method,
    Outcome,
    Params,
    Problem,
    Transformation,
    check_whole,
    clipped,
    descended,
    on_each_device,
)


def sam(
    learning_rate: optax.Schedule,
    *,
    clip_norm: float,
    mesh: Mesh,
    base: Transformation = optimizers.adamw,
    rho: float = 0.05,
    p: float = 2,
    adaptive: bool = False,
    per_device: bool = False,
) -> Method:
    """Sharpness-aware minimization: the gradient at the worst point nearby, for any optimizer.

    Args:
      learning_rate, clip_norm, mesh: the program's.
      base: the optimizer that descends along the gradient. Default `adamw`.
      rho: the size of the perturbation, at least 0. Default 0.05.
      p: its norm, at least 1. Default 2.
      adaptive: whether sizes are relative to those of the weights (ASAM).
      per_device: whether each device along the axis "data" is perturbed by the gradient of its own
        rows, without an exchange of gradients (m-sharpness). Micro-batches (`accumulate`) each
        have their own perturbation in any case.

    Returns:
      The `Method`.

    Raises:
      ValueError: when a step is traced, a number out of range, or `per_device` on a mesh that
        splits anything but the batch, over "data".

    `jaxref.optimizers.sam_value_and_grad` says more.
    """
    optimizer = clipped(base(learning_rate=learning_rate), clip_norm)

    def update(
        problem: Problem, params: Params, state: Any, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        del step
        axis_name = "data" if per_device else None
        gradient_fn = optimizers.sam_value_and_grad(
            problem.loss, rho, p=p, adaptive=adaptive, axis_name=axis_name
        )
        value_and_grad = problem.averaged(gradient_fn)
        if per_device:
            value_and_grad = on_each_device(
                mesh,
                value_and_grad,
                (PartitionSpec(), PartitionSpec("data"), PartitionSpec()),
                PartitionSpec(),
            )
        value, gradient = value_and_grad(params, batch, key)
        return descended(optimizer, params, state, value, gradient)

    return Method(optimizer.init, update)


class WithAverage(NamedTuple):
    """State of a method that looks at a moving average of the parameters, or at past outputs.

    Attributes:
      optimizer: the optimizer's state.
      past: the average, a tree like the parameters, or the `SAFState`.
    """

    optimizer: optax.OptState
    past: Any


def saf(
    learning_rate: optax.Schedule,
    *,
    clip_norm: float,
    mesh: Mesh,
    num_examples: int,
    logits_shape: tuple[int, int],
    base: Transformation = optimizers.adamw,
    weight: float = 0.3,
    temperature: float = 5.0,
    lag: int = 3,
    start_epoch: int = 5,
    max_memory: float = 4e9,
) -> Method:
    """Sharpness-aware training for free: outputs stay near those of `lag` epochs ago.

    All logits of the last `lag` epochs are kept in bfloat16, 2 lag vocabulary bytes a token of the
    corpus, split over the devices of the axes "data" and "fsdp": for small corpora, gone through
    many times. The main job's own corpus is too large for it, and a run of 600 steps ends in its
    first epoch.

    Args:
      learning_rate, clip_norm, mesh, num_examples, logits_shape: the program's.
      base: the optimizer that descends along the gradient. Default `adamw`.
      weight: of the trajectory loss, at least 0. Default 0.3.
      temperature: above 0. Default 5.
      lag: epochs to look back, at least 1. Default 3.
      start_epoch: the last epoch (from 0) without the trajectory loss. Default 5.
      max_memory: bytes of past outputs that a device may hold. Default 4e9.

    Returns:
      The `Method`.

    Raises:
      ValueError: the past outputs do not fit in `max_memory`.

    `jaxref.optimizers.saf_loss` says more.
    """
    optimizer = clipped(base(learning_rate=learning_rate), clip_norm)
    split = PartitionSpec(None, ("data", "fsdp"))
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-num_examples // devices) * devices
    memory = 2 * lag * math.prod(logits_shape) * rows // devices
    if memory > max_memory:
        raise ValueError(
            f"max_memory must be at least {memory:.3g} bytes a device for the outputs of lag={lag} "
            f"epochs of {num_examples} examples, {list(logits_shape)} each; got {max_memory:.3g}"
        )

    def init(params: Params) -> WithAverage:
        memory = optimizers.saf_memory_init(rows, logits_shape, lag)
        return WithAverage(optimizer.init(params), memory)

    def shardings(state: WithAverage, params: Params, default: WithAverage) -> WithAverage:
        memory = jax.tree.map(lambda _: NamedSharding(mesh, split), state.past)
        return default._replace(past=memory)

    def update(
        problem: Problem, params: Params, state: WithAverage, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        epoch = step * len(batch["ids"]) // num_examples

        def loss(params: Params) -> tuple[Array, Any]:
            logits = problem.logits(params, batch, key)
            losses = problem.losses_of_logits(logits, batch)
            total, memory = optimizers.saf_loss(
                losses,
                logits,
                state.past,
                batch["ids"],
                epoch,
                weight=weight,
                temperature=temperature,
                start_epoch=start_epoch,
            )
            return jnp.mean(total, dtype=jnp.float32), (jnp.mean(losses, dtype=jnp.float32), memory)

        check_whole(problem, "saf")
        (_, (value, memory)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        done = descended(optimizer, params, state.optimizer, value, gradient)
        return done._replace(state=WithAverage(done.state, memory))

    return Method(init, update, shardings)


def mesa(
    learning_rate: optax.Schedule,
    *,
    clip_norm: float,
    base: Transformation = optimizers.adamw,
    weight: float = 0.8,
    temperature: float = 5.0,
    decay: float = 0.9995,
    start_step: int = 0,
) -> Method:
    """SAF with the outputs of the parameters' moving average in place of past outputs.

    Args:
      learning_rate, clip_norm: the program's.
      base: the optimizer that descends along the gradient. Default `adamw`.
      weight: of the trajectory loss, at least 0. Default 0.8.
      temperature: above 0. Default 5.
      decay: of the moving average, in [0, 1). Default 0.9995.
      start_step: the last step (from 0) without the trajectory loss. Default 0.

    Returns:
      The `Method`.

    Raises:
      ValueError: a number out of range.

    `jaxref.optimizers.mesa_loss` says more.
    """
    check_interval(0, 1, closed="left", decay=decay)
    optimizer = clipped(base(learning_rate=learning_rate), clip_norm)

    def init(params: Params) -> WithAverage:
        return WithAverage(optimizer.init(params), params)

    def update(
        problem: Problem, params: Params, state: WithAverage, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        def loss(params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
            logits = problem.logits(params, batch, key)
            losses = problem.losses_of_logits(logits, batch)
            total = optimizers.mesa_loss(
                losses,
                logits,
                problem.logits(state.past, batch, key),
                step,
                weight=weight,
                temperature=temperature,
                start_epoch=start_step,
            )
            return jnp.mean(total, dtype=jnp.float32), jnp.mean(losses, dtype=jnp.float32)

        value_and_grad = problem.averaged(jax.value_and_grad(loss, has_aux=True))
        (_, value), gradient = value_and_grad(params, batch, key)
        done = descended(optimizer, params, state.optimizer, value, gradient)
        average = optax.incremental_update(done.params, state.past, 1 - decay)
        return done._replace(state=WithAverage(done.state, average))

    return Method(init, update)


def distillation_oriented(
    learning_rate: optax.Schedule,
    *,
    clip_norm: float,
    momentum: float = 0.9,
    delta: float = 0.075,
    weight_decay: float = 5e-4,
    weight: float = 1.0,
    temperature: float = 4.0,
    decay: float = 0.99,
) -> Method:
    """The distillation-oriented trainer, with the parameters' moving average for a teacher.

    Args:
      learning_rate, clip_norm: the program's; each of the two gradients is clipped.
      momentum: in [0, 1). Default 0.9.
      delta: how much longer the memory of the distillation's gradient is. Default 0.075.
      weight_decay: L2, at least 0. Default 5e-4.
      weight: of the distillation loss τ² KL(teacher ‖ student), at least 0. Default 1.
      temperature: τ above 0. Default 4.
      decay: of the moving average, in [0, 1). Default 0.99.

    Returns:
      The `Method`.

    Raises:
      ValueError: a number out of range.

    `jaxref.optimizers.distillation_oriented_sgd` says more.
    """
    check_interval(0, jnp.inf, weight=weight)
    check_interval(0, 1, closed="left", decay=decay)
    optimizer = optimizers.distillation_oriented_sgd(
        learning_rate, momentum, delta, weight_decay=weight_decay
    )
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()

    def init(params: Params) -> WithAverage:
        return WithAverage(optimizer.init(params), params)

    def update(
        problem: Problem, params: Params, state: WithAverage, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        del step

        def losses(params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
            logits = problem.logits(params, batch, key)
            teacher = problem.logits(state.past, batch, key)
            distance = optimizers.trajectory_loss(logits, teacher, temperature=temperature)
            task = jnp.mean(problem.losses_of_logits(logits, batch), dtype=jnp.float32)
            return task, weight * jnp.mean(distance, dtype=jnp.float32)

        both = problem.averaged(optimizers.distillation_value_and_grads(losses))
        (value, _), gradients = both(params, batch, key)
        norm = optax.global_norm(gradients)
        task, distillation = (clip.update(g, clip.init(params))[0] for g in gradients)
        updates, optimizer_state = optimizer.update(
            task, state.optimizer, params, distillation_grads=distillation
        )
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, state.past, 1 - decay)
        return Outcome(params, WithAverage(optimizer_state, average), value, norm)

    return Method(init, update)
