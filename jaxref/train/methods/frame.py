"""What a training method is: how a step turns a batch into new parameters.

Most optimizers are optax transformations of one gradient, and `from_transformation` makes a method
of any. The others, listed in this package's `__init__`, ask more of a batch: a second gradient
elsewhere, the loss without a gradient, the logits, the gradient of every sequence or device. They
are chosen by `--config.optimizer.name` like the rest; those that end in a transformation take it as
their `base`, a component of its own (`--config.optimizer.base.name`). Keywords without a default
are given by the program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

Batch = dict[str, Array]
Params = dict[Any, Any]
BatchFunction = Callable[[Params, Batch, Array], Any]
Transformation = Callable[..., optax.GradientTransformation]


class ModelState(NamedTuple):
    """What a model keeps besides its parameters, as nested dictionaries; empty for most.

    Attributes:
      statistics: what its forward pass moves.
      backward: what its backward pass moves: the gradient with respect to it is its next value.
    """

    statistics: dict[Any, Any]
    backward: dict[Any, Any]


class Problem(NamedTuple):
    """What a method may ask of a model and a loss. The functions take (params, batch, key).

    Attributes:
      token_losses: the training loss of each token, `[rows, length]`, or of each image, `[rows]`.
      logits: `[rows, length, vocabulary]`, or `[rows, classes]`.
      losses_of_logits: the losses as a function of (logits, batch).
      accumulate: micro-batches to cut a batch into.
      stateful_losses: for a model with statistics, `(params, model_state, batch, key) ->
        (token losses, the next statistics)`; None for others.
      model_state: the statistics that the batch meets.
      shardings: where each parameter lives.
    """

    token_losses: BatchFunction
    logits: BatchFunction
    losses_of_logits: Callable[[Array, Batch], Array]
    accumulate: int = 1
    stateful_losses: Callable[[Params, ModelState, Batch, Array], tuple[Array, Any]] | None = None
    model_state: ModelState | None = None
    shardings: Params | None = None

    def loss(self, params: Params, batch: Batch, key: Array) -> Array:
        """The mean loss over the batch's tokens."""
        return jnp.mean(self.token_losses(params, batch, key), dtype=jnp.float32)

    def loss_and_gradient(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Params]:
        """The mean loss of a batch as a whole and its gradient, which lives where the parameters
        do: devices that share them only sum up their own part."""
        value, gradient = jax.value_and_grad(self.loss)(params, batch, key)
        return value, self._placed(gradient)

    def _placed(self, gradient: Params) -> Params:
        places = jax.tree.leaves(self.shardings)
        if not places or places[0].mesh.size == 1:
            return gradient
        return jax.tree.map(jax.lax.with_sharding_constraint, gradient, self.shardings)

    def value_and_grad(
        self, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Params, ModelState | None]:
        """The mean loss, its gradient, and the model's next state.

        Micro-batches move the statistics one after the other.
        """
        stateful_losses, state = self.stateful_losses, self.model_state
        if stateful_losses is None or state is None:
            return *self.averaged(self.loss_and_gradient)(params, batch, key), state

        def loss(params: Params, backward: Any, statistics: Any, *rest: Any) -> Any:
            state = ModelState(statistics, backward)
            losses, statistics = stateful_losses(params, state, *rest)
            return jnp.mean(losses, dtype=jnp.float32), statistics

        def advance(state: ModelState, batch_and_key: Any) -> tuple[ModelState, Any]:
            function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (value, statistics), (gradient, backward) = function(
                params, state.backward, state.statistics, *batch_and_key
            )
            return ModelState(statistics, backward), (value, self._placed(gradient))

        if self.accumulate == 1:
            state, (value, gradient) = advance(state, (batch, key))
        else:
            parts = self._micro_batches(batch), jax.random.split(key, self.accumulate)

            def add(
                carry: tuple[ModelState, Any], part: Any
            ) -> tuple[tuple[ModelState, Any], None]:
                state, value_and_gradient = jax.lax.optimization_barrier(advance(carry[0], part))
                return (state, jax.tree.map(jnp.add, carry[1], value_and_gradient)), None

            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(advance, state, first)[1]
            zeros = jax.tree.map(jnp.zeros_like, shapes)
            (state, total), _ = jax.lax.scan(add, (state, zeros), parts)
            value, gradient = jax.tree.map(lambda x: x / self.accumulate, total)
        return value, gradient, state

    def _micro_batches(self, batch: Batch) -> Batch:
        """Rows i, i + accumulate, ...: each device's rows are among all of them, so that none has
        to change device."""
        return jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, self.accumulate, *x.shape[1:]), 1, 0), batch
        )

    def averaged(self, function: BatchFunction) -> BatchFunction:
        """The function's mean over the micro-batches."""
        if self.accumulate == 1:
            return function

        def average(params: Params, batch: Batch, key: Array) -> Any:
            batches = self._micro_batches(batch)
            keys = jax.random.split(key, self.accumulate)

            def add(total: Any, batch_and_key: tuple[Batch, Array]) -> tuple[Any, None]:
                # Behind a barrier: the TPU's compiler fails on a reduction that it would move out
                # of the loop, where the sum is of another type.
                part = jax.lax.optimization_barrier(function(params, *batch_and_key))
                return jax.tree.map(jnp.add, total, part), None

            first = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], batches), key)
            zeros = jax.tree.map(jnp.zeros_like, first)  # varying over devices where it varies
            total, _ = jax.lax.scan(add, zeros, (batches, keys))
            return jax.tree.map(lambda x: x / self.accumulate, total)

        return average


class Outcome(NamedTuple):
    """What a method makes of a batch.

    Attributes:
      params: the new parameters.
      state: the new state.
      loss: the training loss at the old parameters.
      gradient_norm: the norm of what stands for the gradient, before clipping.
      model_state: the model's next state; None where the method moves none.
    """

    params: Params
    state: Any
    loss: Array
    gradient_norm: Array
    model_state: ModelState | None = None


class Method(NamedTuple):
    """A way to train.

    Attributes:
      init: `init(params) -> state`, a tree of arrays.
      update: `update(problem, params, state, batch, key, step) -> Outcome`. `key` is of this step
        alone, `step` counts from 0.
      shardings: `shardings(state, params, default) -> tree of shardings`: where the state lives,
        given the shapes, where the parameters live, and the default, which is like the parameters
        for what is stored for each of them in its shape, and replicated for the rest. None takes
        the default.
    """

    init: Callable[[Params], Any]
    update: Callable[[Problem, Params, Any, Batch, Array, Array], Outcome]
    shardings: Callable[[Any, Params, Any], Any] | None = None


def from_transformation(optimizer: optax.GradientTransformation, clip_norm: float = 0.0) -> Method:
    """One gradient of the mean loss, and an optax transformation of it.

    Args:
      optimizer: the transformation; `update` is given the loss as `value`.
      clip_norm: the global norm to clip the gradient to; 0 does not clip.

    Returns:
      The `Method`.
    """
    optimizer = clipped(optimizer, clip_norm)

    def update(
        problem: Problem, params: Params, state: Any, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        del step
        value, gradient, model_state = problem.value_and_grad(params, batch, key)
        outcome = descended(optimizer, params, state, value, gradient)
        return outcome._replace(model_state=model_state)

    return Method(optimizer.init, update)


def clipped(
    optimizer: optax.GradientTransformation, clip_norm: float
) -> optax.GradientTransformationExtraArgs:
    """The transformation behind clipping by global norm; 0 does not clip.

    Args:
      optimizer: what the clipped gradient goes to.
      clip_norm: the global norm to clip to, at least 0.

    Returns:
      The transformation, whose `update` takes further arguments by name.
    """
    if clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return optax.with_extra_args_support(optimizer)


def descended(
    optimizer: optax.GradientTransformationExtraArgs,
    params: Params,
    state: Any,
    value: Array,
    gradient: Params,
    **extra_args: Any,
) -> Outcome:
    """A step of the optimizer along the gradient.

    Args:
      optimizer: the transformation.
      params: the parameters.
      state: the optimizer's.
      value: the training loss, which the optimizer is given as `value`.
      gradient: a tree like the parameters.
      **extra_args: further arguments of the optimizer's `update`.

    Returns:
      The `Outcome`, without a state of the model.
    """
    updates, state = optimizer.update(gradient, state, params, value=value, **extra_args)
    params = optax.apply_updates(params, updates)
    return Outcome(params, state, value, optax.global_norm(gradient))


def on_each_device(
    mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """The function of what each device along the axis "data" holds, which is whole parameters.

    Args:
      mesh: the devices.
      function: of the part of each.
      in_specs, out_specs: as for `jax.shard_map`.

    Returns:
      The function of whole arrays.

    Raises:
      ValueError: a mesh with an axis other than "data" of a size above 1.
    """
    split = {axis: size for axis, size in mesh.shape.items() if axis != "data" and size > 1}
    if split:
        raise ValueError(
            f"a method of single devices needs whole parameters on each: mesh sizes of 1 other "
            f"than for data, got {split}"
        )
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def check_whole(problem: Problem, name: str) -> None:
    """Raises where batches are to be cut into micro-batches, for a method that cannot.

    Args:
      problem: of which `accumulate` is looked at.
      name: of the method, for the message.

    Raises:
      ValueError: `problem.accumulate` is not 1.
    """
    if problem.accumulate != 1:
        raise ValueError(
            f"accumulate must be 1 with optimizer.name={name}, got {problem.accumulate}"
        )


def distance(after: Params, before: Params) -> Array:
    """The norm of the difference: what stands for a gradient's where there is no single one.

    Args:
      after, before: trees like the parameters.

    Returns:
      A scalar.
    """
    return optax.global_norm(jax.tree.map(jnp.subtract, after, before))
