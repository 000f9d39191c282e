"""The functions of a training run: pure, jitted, sharded.

`build` turns a configuration into a `Program`; its functions take and return a `TrainState`, and
can be called alone, in a test or a notebook, without the loop around them.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxref.core.checks import check_interval
from jaxref.nn import AuxiliaryLoss, GradientState, Loss
from jaxref.nn.losses import OutputOfLoss, keeps_something
from jaxref.parallel import logical_sharding, make_mesh, mesh_axes, use_rules
from jaxref.parallel.sharding import Rules
from jaxref.train.components import (
    build_method,
    build_model_config,
    build_objective,
    build_schedule,
    check_loss,
)
from jaxref.train.config import ConfigError, resolve
from jaxref.train.evaluation import Evaluation
from jaxref.train.losses import TokenLoss, build_loss_of_logits
from jaxref.train.methods.frame import (
    Batch,
    Method,
    ModelState,
    Params,
    Problem,
)
from jaxref.train.objectives.frame import Objective

Merge = Callable[[Params, ModelState], Any]

NO_STATE = ModelState({}, {})
"""What most models keep besides their parameters."""


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    Attributes:
      step: steps taken, those skipped included.
      params: the model's parameters, as nested dictionaries: their tree is flattened at each step,
        which takes milliseconds for an `nnx.State` and none for these.
      opt_state: the optimizer's state, or a method's.
      average: moving average of the parameters, or None.
      key: random key of the run; a step uses it folded with its number.
      nonfinite: steps skipped because their gradient was not finite.
      nonfinite_in_row: how many of them since the last step that was not.
      model_state: statistics of the model; empty for most.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    average: Params | None
    key: Array
    nonfinite: Array
    nonfinite_in_row: Array
    model_state: ModelState


class Metrics(NamedTuple):
    """What a step reports: scalars.

    Attributes:
      loss: mean of the training loss over the batch's tokens, images or forecasts.
      gradient_norm: global norm of the gradient, or of what the method puts in its place, before
        clipping.
    """

    loss: Array
    gradient_norm: Array


class Program(NamedTuple):
    """A run's functions and where its arrays live.

    Attributes:
      graphdef: the model without its arrays; `nnx.merge(graphdef, params)` is the model, if it
        keeps nothing besides.
      merge: `merge(params, model_state) -> model`, in training.
      mesh: the devices.
      rules: the mesh axes that logical axes are split over.
      schedule: learning rate by step.
      objective: what is learned.
      state_shardings: `TrainState` of shardings.
      abstract_batch: a batch to train on, as `jax.ShapeDtypeStruct`s with their shardings.
      init: `init(key) -> TrainState`.
      step: `step(state, batch) -> (state, Metrics)`; the given state is donated.
      evaluate: `evaluate(params, batch, model_state=None) -> Evaluation`.
      nonfinite_parameters: `nonfinite_parameters(state, batch)`: which parameters are not finite,
        and which gradients.
      norms: `norms(state, batch)`: of each parameter, and of its gradient in the next step on this
        batch.
    """

    graphdef: nnx.GraphDef
    merge: Merge
    mesh: Mesh
    rules: Rules
    schedule: optax.Schedule
    objective: Objective
    state_shardings: TrainState
    abstract_batch: Batch
    init: Callable[[Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[..., Evaluation]
    nonfinite_parameters: Callable[[TrainState, Batch], Any]
    norms: Callable[[TrainState, Batch], Any]

    @property
    def abstract_state(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s with their shardings."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.state_shardings,
        )

    def model(self, params: Params, model_state: ModelState | None = None) -> Any:
        """The model with these parameters, in evaluation.

        Args:
          params: the parameters.
          model_state: its statistics. Default: none.

        Returns:
          The module.
        """
        model = self.merge(params, model_state or NO_STATE)
        model.eval()
        return model

    @property
    def rows(self) -> np.ndarray:
        """Which rows of a batch this process's devices hold, ascending."""
        ids = self.abstract_batch["ids"]
        places = ids.sharding.addressable_devices_indices_map(ids.shape)
        return np.unique(np.concatenate([np.arange(ids.size)[at] for at in places.values()]))

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """A batch as arrays sharded over the mesh, given this process's `rows` of it.

        Args:
          batch: arrays by name, of `rows` alone; may have a "where" of the shape of the losses.

        Returns:
          The global batch, of all processes.
        """
        like = dict(self.abstract_batch)
        if "where" in batch:  # as the losses, of tokens or of whole examples
            like["where"] = like["targets" if batch["where"].ndim == 2 else "ids"]
        if jax.process_count() == 1:
            return {name: jax.device_put(x, like[name].sharding) for name, x in batch.items()}
        rows, size = self.rows, self.abstract_batch["ids"].size

        def whole(array: np.ndarray, sharding: Any) -> Array:
            def piece(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(size)
                return array[np.searchsorted(rows, np.arange(start, stop)), *index[1:]]

            shape = (size, *array.shape[1:])
            return jax.make_array_from_callback(shape, sharding, piece, dtype=array.dtype)

        return {name: whole(x, like[name].sharding) for name, x in batch.items()}


def build(
    config: ConfigDict,
    vocab_size: int | None = None,
    num_examples: int | None = None,
    *,
    image_shape: tuple[int, int, int] | None = None,
    series_shape: tuple[int, int] | None = None,
    num_classes: int | None = None,
    context_length: int | None = None,
    horizon: int | None = None,
    channels: int | None = None,
    losses: TokenLoss | None = None,
    last: optax.GradientTransformation | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Program:
    """The program that a configuration describes, for text, for images or for series.

    Args:
      config: as `jaxref.train.config.load_config` returns it.
      vocab_size: number of token ids, for text.
      num_examples: number of examples to train on, for methods that keep something of each.
      image_shape: height, width and channels, for images.
      series_shape: steps and channels, for series that have labels.
      num_classes: number of classes, for images and for series that have labels.
      context_length, horizon: steps that are read and steps that are forecast, for series.
      channels: number of series.
      losses: `losses(model, batch, key)`, to minimise the mean of. Default: the objective's.
      last: what the optimizer's updates go through at the end. Default: nothing.
      devices: what it runs on, or is compiled for. Default: all that there are.

    Returns:
      The `Program`; nothing is compiled, and no parameter drawn, before its functions are called.

    Raises:
      ConfigError: a component that does not exist, or arguments that it does not take, or that do
        not go together.
      ValueError: arguments that a component refuses, or a mesh that does not fit the devices or
        the model's sizes.
    """
    _check_numbers(config)
    mesh = make_mesh(config.mesh.to_dict(), devices)
    rules = config.rules.to_dict()
    is_text = image_shape is None and series_shape is None and horizon is None
    _check_splits(config, mesh, rules, is_text=is_text)
    sizes: dict[str, Any]
    logits_shape: tuple[Any, ...]
    objective = build_objective(config, vocab_size if is_text else None)
    if losses is not None:
        objective = objective._replace(losses=losses, reference="")
    if vocab_size is not None:
        vocab_size += objective.special_tokens
    if is_text:
        sizes = {"vocab_size": vocab_size, "max_length": config.length}
        if objective.architecture is not None:
            sizes["architecture"] = objective.architecture
        logits_shape = (config.length, vocab_size)
    elif image_shape is not None:
        sizes = {"image_shape": image_shape, "num_classes": num_classes}
        logits_shape = (num_classes,)
    elif series_shape is not None:
        sizes = {"channels": series_shape[1], "num_classes": num_classes}
        logits_shape = (num_classes,)
    else:
        sizes = {"context_length": context_length, "horizon": horizon, "channels": channels}
        logits_shape = (horizon, channels)
    model_config = build_model_config(config, sizes)
    schedule = build_schedule(config)
    method = build_method(
        config,
        schedule,
        last=last,
        mesh=mesh,
        num_examples=num_examples,
        logits_shape=logits_shape,
    )

    loss_function = resolve(config, "loss")
    loss_asks = inspect.signature(loss_function).parameters
    if "learning_rate" in loss_asks and "learning_rate" not in config.loss:
        loss_function = partial(loss_function, learning_rate=schedule)

    def model(key: Array) -> nnx.Module:
        rngs = nnx.Rngs(params=key)
        model = model_config.build(rngs=rngs)
        check_loss(config, model, sizes)
        if objective.extend is not None:
            objective.extend(model, rngs)
        if keeps_something(loss_function):  # a part of the model, that it may train and be saved
            model.loss = Loss(
                loss_function,
                num_examples=num_examples,
                num_classes=num_classes or vocab_size,
                features=getattr(model_config, "features", None),
                rngs=rngs,
            )
            if "hidden" in loss_asks:
                model.output = OutputOfLoss(model.loss)
        return model

    abstract = nnx.eval_shape(lambda: model(jax.random.key(0)))
    graphdef, variables, backward, auxiliary, statistics = split_model(abstract)
    has_state = bool(jax.tree.leaves((backward, statistics)))
    owed = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(auxiliary))

    def merge(params: Params, model_state: ModelState) -> Any:
        model: Any = nnx.merge(graphdef, params, *model_state, owed)
        model.train()
        return model

    def stateful_losses(
        params: Params, model_state: ModelState, batch: Batch, key: Array
    ) -> tuple[Array, Any]:
        model = merge(params, model_state)
        value = objective.losses(model, batch, key)
        *_, auxiliary, statistics = split_model(model)
        for term in jax.tree.leaves(auxiliary):
            value = value + jnp.sum(term)  # stacked layers owe one each
        return value, nnx.to_pure_dict(statistics)

    def check_stateless() -> None:
        if has_state:
            raise ConfigError(
                f"optimizer.name={config.optimizer.name} evaluates the loss in its own way and "
                f"cannot move the statistics that model.name={config.model.name} or "
                f"loss.name={config.loss.name} keeps; choose a norm and a loss without, or an "
                "optimizer of one gradient"
            )

    def stateless_losses(params: Params, batch: Batch, key: Array) -> Array:
        check_stateless()
        return stateful_losses(params, NO_STATE, batch, key)[0]

    def logits(params: Params, batch: Batch, key: Array) -> Array:
        check_stateless()
        if config.objective.name != "next_token":
            raise ConfigError(
                f"optimizer.name={config.optimizer.name} reads logits, and "
                f"objective.name={config.objective.name} is more than a loss of these; choose "
                "next_token or an optimizer of one gradient"
            )
        if jax.tree.leaves(owed):
            raise ConfigError(
                f"optimizer.name={config.optimizer.name} reads logits and would leave out the "
                f"auxiliary loss of model.name={config.model.name}; choose an optimizer of one "
                "gradient"
            )
        return merge(params, NO_STATE)(batch["inputs"], key=key)

    problem = Problem(
        token_losses=stateless_losses,
        logits=logits,
        losses_of_logits=build_loss_of_logits(config),
        accumulate=config.accumulate,
        stateful_losses=stateful_losses if has_state else None,
    )

    def init(key: Array) -> TrainState:
        params_key, key = jax.random.split(key)
        _, params, backward, _, statistics = split_model(model(params_key))
        params = nnx.to_pure_dict(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=method.init(params),
            average=params if config.average_decay else None,
            key=key,
            nonfinite=jnp.zeros((), jnp.int32),
            nonfinite_in_row=jnp.zeros((), jnp.int32),
            model_state=ModelState(nnx.to_pure_dict(statistics), nnx.to_pure_dict(backward)),
        )

    state_shardings = _state_shardings(
        jax.eval_shape(init, jax.random.key(0)), variables, method, mesh, rules
    )
    problem = problem._replace(shardings=state_shardings.params)
    traced = partial(within, mesh, rules)
    step = make_step(problem, method, average_decay=config.average_decay)
    replicated = NamedSharding(mesh, PartitionSpec())

    def evaluate(params: Params, batch: Batch, model_state: ModelState) -> Evaluation:
        model = merge(params, model_state)
        model.eval()
        return objective.evaluate(model, batch)

    measure = jax.jit(
        traced(evaluate),
        in_shardings=(state_shardings.params, None, state_shardings.model_state),
        out_shardings=replicated,
    )

    def evaluated(
        params: Params, batch: Batch, model_state: ModelState | None = None
    ) -> Evaluation:
        return measure(params, batch, model_state or NO_STATE)

    return Program(
        graphdef=graphdef,
        merge=merge,
        mesh=mesh,
        rules=rules,
        schedule=schedule,
        objective=objective,
        state_shardings=state_shardings,
        abstract_batch=_abstract_batch(
            config,
            mesh,
            rules,
            image_shape or series_shape,
            sizes,
            has_reference=bool(objective.reference),
        ),
        init=jax.jit(init, out_shardings=state_shardings),
        step=jax.jit(
            traced(step),
            in_shardings=(state_shardings, None),
            out_shardings=(state_shardings, replicated),
            donate_argnums=0,
        ),
        evaluate=evaluated,
        nonfinite_parameters=jax.jit(
            traced(partial(nonfinite_parameters, problem)),
            in_shardings=(state_shardings, None),
            out_shardings=replicated,
        ),
        norms=jax.jit(
            traced(partial(norms, problem, variables)),
            in_shardings=(state_shardings, None),
            out_shardings=replicated,
        ),
    )


def split_model(model: nnx.Module) -> tuple[Any, ...]:
    """A model's graph definition, parameters, what the backward pass moves, what it owes the loss,
    and statistics.

    Args:
      model: an `nnx.Module`, or one of abstract arrays.

    Returns:
      The graph definition, and the states of `nnx.Param`, `GradientState`, `AuxiliaryLoss` and all
      other variables, in this order.
    """
    return nnx.split(model, nnx.Param, GradientState, AuxiliaryLoss, ...)


def make_step(
    problem: Problem, method: Method, *, average_decay: float = 0.0
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One step of training, as a pure function of state and batch.

    A step whose loss or gradient is not finite leaves parameters, the method's state and average
    as they were and is counted.

    Args:
      problem: the model and the loss.
      method: how the parameters move.
      average_decay: of the moving average of the parameters, in [0, 1), where the state has one.
        Default 0.

    Returns:
      `step(state, batch) -> (state, Metrics)`, not compiled.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        params, opt_state, value, norm, model_state = method.update(
            problem._replace(model_state=state.model_state),
            state.params,
            state.opt_state,
            _at_step(state, batch),
            key,
            state.step,
        )
        average = state.average
        if average is not None:
            average = optax.incremental_update(params, average, 1 - average_decay)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        keep = partial(jnp.where, finite)
        params, opt_state, average, model_state = jax.tree.map(
            keep,
            (params, opt_state, average, model_state or state.model_state),
            (state.params, state.opt_state, state.average, state.model_state),
        )
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            average=average,
            key=state.key,
            nonfinite=state.nonfinite + ~finite,
            nonfinite_in_row=jnp.where(finite, 0, state.nonfinite_in_row + 1),
            model_state=model_state,
        )
        return state, Metrics(loss=value, gradient_norm=norm)

    return step


def _at_step(state: TrainState, batch: Batch) -> Batch:
    """The batch, with the step for each row."""
    return batch | {"step": jnp.full(len(batch["inputs"]), state.step)}


def nonfinite_parameters(problem: Problem, state: TrainState, batch: Batch) -> Any:
    """For each parameter, whether it has a non-finite entry; and whether its gradient on this batch
    has one.

    Args:
      problem: the model and the loss.
      state: of which the parameters are looked at, and the key gives the randomness of its next
        step.
      batch: the batch of the gradient.

    Returns:
      Two trees like the parameters, of boolean scalars: True where a parameter, and where its
      gradient, is not finite throughout.
    """
    key = jax.random.fold_in(state.key, state.step)
    problem = problem._replace(model_state=state.model_state)
    _, gradient, _ = problem.value_and_grad(state.params, _at_step(state, batch), key)
    return jax.tree.map(lambda x: ~jnp.isfinite(x).all(), (state.params, gradient))


def norms(problem: Problem, variables: nnx.State, state: TrainState, batch: Batch) -> Any:
    """The norm of each parameter, and of its gradient in the next step on this batch: a scalar, or
    `[layers]` where an axis of the `variables`, the model's, is "layers".

    Args:
      problem: the model and the loss.
      variables: the model's parameters with their metadata, whose "axes" name the axes of each.
      state: of which the parameters are measured.
      batch: the batch of the gradient.

    Returns:
      Two trees like the parameters, in float32: the norms of the parameters, and those of their
      gradients before clipping.
    """
    key = jax.random.fold_in(state.key, state.step)
    problem = problem._replace(model_state=state.model_state)
    _, gradient, _ = problem.value_and_grad(state.params, _at_step(state, batch), key)
    axes = [
        variable.get_metadata()["axes"]
        for variable in jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nnx.Variable))
    ]

    def norm(x: Array, axes: tuple[str | None, ...]) -> Array:
        within = tuple(i for i, axis in enumerate(axes) if axis != "layers")
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=within))

    def of_tree(tree: Params) -> Params:
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, [norm(x, a) for x, a in zip(leaves, axes)])

    return of_tree(state.params), of_tree(gradient)


def _check_numbers(config: ConfigDict) -> None:
    """Raises where a number that no function below checks is out of range."""
    counts = ("steps", "accumulate", "log_every", "validate_every", "checkpoint_every")
    for name in (*counts, "max_nonfinite_steps", "keep_checkpoints"):
        check_interval(1, jnp.inf, **{name: config[name]})
    for name in ("clip_norm", "norms_every", "keep_checkpoint_every"):
        check_interval(0, jnp.inf, **{name: config[name]})
    check_interval(0, 1, closed="left", average_decay=config.average_decay)
    if config.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype must be float32 or bfloat16, got {config.dtype!r}")


def _check_splits(config: ConfigDict, mesh: Mesh, rules: Rules, *, is_text: bool) -> None:
    """Raises where a batch cannot be split as the mesh and the rules say."""
    for name in rules:
        mesh_axes(name, mesh, rules)  # which exist
    over = mesh_axes("batch", mesh, rules)
    parts = {"accumulate": config.accumulate} | {f"mesh.{a}": mesh.shape[a] for a in over}
    if config.batch_size % math.prod(parts.values()):
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of {' x '.join(parts)} = "
            f"{' x '.join(map(str, parts.values()))}"
        )
    over = mesh_axes("length", mesh, rules)
    ways = math.prod(mesh.shape[axis] for axis in over)
    if over and not is_text:
        raise ConfigError(
            f"mesh.{over[0]} splits sequences of text, and data.name={config.data.name} is none"
        )
    if config.length % ways:
        raise ConfigError(
            f"length {config.length} must be a multiple of the {ways} parts that mesh axes "
            f"{list(over)} split it into"
        )


def _abstract_batch(
    config: ConfigDict,
    mesh: Mesh,
    rules: Rules,
    labelled: tuple[int, ...] | None,
    sizes: dict[str, Any],
    *,
    has_reference: bool,
) -> Batch:
    rows = config.batch_size
    ids = ((rows,), jnp.int32)
    of_text = "vocab_size" in sizes
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if of_text:
        tokens = ((rows, config.length), jnp.int32)
        shapes = {"inputs": tokens, "targets": tokens}
        if has_reference:
            shapes["reference_log_probs"] = ((rows, config.length), jnp.float32)
    elif labelled is not None:
        shapes = {"inputs": ((rows, *labelled), jnp.float32), "targets": ids}
    else:
        past, future = (
            ((rows, sizes[length], sizes["channels"]), jnp.float32)
            for length in ("context_length", "horizon")
        )
        shapes = {"inputs": past, "targets": future}
    shapes["ids"] = ids

    def abstract(shape: tuple[int, ...], dtype: Any) -> Any:
        axes = ("batch", "length" if of_text else None, None, None)[: len(shape)]
        sharding = logical_sharding(axes, shape, mesh, rules)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {name: abstract(*shape) for name, shape in shapes.items()}


def _state_shardings(
    state: TrainState,
    variables: nnx.State,
    method: Method,
    mesh: Mesh,
    rules: Rules,
) -> TrainState:
    """Parameters by their logical axes; what the method keeps of a parameter's shape, alike."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def by_axes(path: Any, variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        try:
            return logical_sharding(variable.get_metadata()["axes"], shape, mesh, rules)
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)} of shape {shape}: {error}") from error

    def like_param(leaf: Any, sharding: NamedSharding, param: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # a parameter without a state
            return leaf
        return sharding if leaf.shape == param.shape else replicated

    shardings = jax.tree_util.tree_map_with_path(
        by_axes, variables, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    shardings = jax.tree.unflatten(jax.tree.structure(state.params), jax.tree.leaves(shardings))
    opt_state = optax.tree.map_params(
        method,
        like_param,
        state.opt_state,
        shardings,
        state.params,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    if method.shardings is not None:
        opt_state = method.shardings(state.opt_state, shardings, opt_state)
    return jax.tree.map(lambda _: replicated, state)._replace(
        params=shardings,
        opt_state=opt_state,
        average=None if state.average is None else shardings,
    )


def within(mesh: Mesh, rules: Rules, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced with the activations' sharding rules in force.

    Args:
      mesh: the devices.
      rules: the mesh axes that logical axes are split over.
      function: what is traced; it keeps its name and its arguments.

    Returns:
      The function, to be given to `jax.jit`.
    """

    @wraps(function)
    def traced(*args: Any) -> Any:
        with use_rules(mesh, rules):
            return function(*args)

    return traced
