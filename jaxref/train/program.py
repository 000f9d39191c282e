"""The functions of a training run: pure, jitted, sharded.

`build` turns a configuration into a `Program`; its functions take and return a `TrainState`, and
can be called alone, in a test or a notebook, without the loop around them.
"""

import inspect
from collections.abc import Callable, Iterable
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
from jaxref.kernels import linear_softmax_cross_entropy
from jaxref.nn import AuxiliaryLoss, GradientState, Loss
from jaxref.nn.losses import OutputOfLoss, keeps_something
from jaxref.parallel import logical_sharding, make_mesh, use_rules
from jaxref.train.config import ConfigError, resolve
from jaxref.train.methods.frame import (
    Batch,
    Method,
    ModelState,
    Params,
    Problem,
    from_transformation,
)

TokenLoss = Callable[[Any, Batch, Array], Array]
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
      loss: mean of the training loss over the batch's tokens, or images.
      gradient_norm: global norm of the gradient, or of what the method puts in its place, before
        clipping.
    """

    loss: Array
    gradient_norm: Array


class Evaluation(NamedTuple):
    """What a batch adds to the measurement of a model.

    Attributes:
      nats: cross-entropy, whatever the training loss, summed.
      examples: how many tokens, or images, it is the sum over.
      correct: how many of them the model's most probable class is right for; None for tokens,
        whose logits are never formed.
    """

    nats: Array
    examples: Array
    correct: Array | None


class Program(NamedTuple):
    """A run's functions and where its arrays live.

    Attributes:
      graphdef: the model without its arrays; `nnx.merge(graphdef, params)` is the model, if it
        keeps nothing besides.
      merge: `merge(params, model_state) -> model`, in training.
      mesh: the devices.
      schedule: learning rate by step.
      state_shardings: `TrainState` of shardings.
      batch_sharding: sharding of each array of a batch.
      init: `init(key) -> TrainState`.
      step: `step(state, batch) -> (state, Metrics)`; the given state is donated.
      evaluate: `evaluate(params, batch, model_state=None) -> Evaluation`.
      nonfinite_parameters: `nonfinite_parameters(state, batch)`: which parameters are not finite,
        and which gradients.
    """

    graphdef: nnx.GraphDef
    merge: Merge
    mesh: Mesh
    schedule: optax.Schedule
    state_shardings: TrainState
    batch_sharding: NamedSharding
    init: Callable[[Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[..., "Evaluation"]
    nonfinite_parameters: Callable[[TrainState, Batch], Any]

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
        """The model with these parameters, in evaluation."""
        model = self.merge(params, model_state or NO_STATE)
        model.eval()
        return model

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """This process's rows of a batch, as arrays sharded over the mesh."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, rows)
            for name, rows in batch.items()
        }


def build(
    config: ConfigDict,
    vocab_size: int | None = None,
    num_examples: int | None = None,
    *,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
) -> Program:
    """The program that a configuration describes, for text or for images.

    Args:
      config: as `jaxref.train.config.load_config` returns it.
      vocab_size: number of token ids, for text.
      num_examples: number of examples to train on, for methods that keep something of each.
      image_shape: height, width and channels, for images.
      num_classes: number of classes, for images.

    Raises:
      ConfigError: a component that does not exist, or arguments that it does not take, or that do
        not go together.
      ValueError: arguments that a component refuses, or a mesh that does not fit the devices or
        the model's sizes.
    """
    _check_numbers(config)
    mesh = make_mesh(config.mesh.to_dict())
    if config.batch_size % (config.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of accumulate x mesh.data x "
            f"mesh.fsdp = {config.accumulate} x {mesh.shape['data']} x {mesh.shape['fsdp']}"
        )
    if image_shape is None:
        sizes: dict[str, Any] = {"vocab_size": vocab_size, "max_length": config.length}
        logits_shape: tuple[Any, ...] = (config.length, vocab_size)
    else:
        sizes = {"image_shape": image_shape, "num_classes": num_classes}
        logits_shape = (num_classes,)
    model_config = _build_model_config(config, sizes)
    schedule = build_schedule(config)
    method = build_method(
        config, schedule, mesh=mesh, num_examples=num_examples, logits_shape=logits_shape
    )

    loss_function = resolve(config, "loss")
    loss_asks = inspect.signature(loss_function).parameters
    if "learning_rate" in loss_asks and "learning_rate" not in config.loss:
        loss_function = partial(loss_function, learning_rate=schedule)

    def model(key: Array) -> nnx.Module:
        rngs = nnx.Rngs(params=key)
        model = model_config.build(rngs=rngs)
        _check_loss(config, model, num_classes)
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
    losses = build_loss(config)

    def merge(params: Params, model_state: ModelState) -> Any:
        model: Any = nnx.merge(graphdef, params, *model_state, owed)
        model.train()
        return model

    def stateful_losses(
        params: Params, model_state: ModelState, batch: Batch, key: Array
    ) -> tuple[Array, Any]:
        model = merge(params, model_state)
        value = losses(model, batch, key)
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
        jax.eval_shape(init, jax.random.key(0)), variables, method, mesh
    )
    batch_sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    traced = partial(within, mesh)
    step = make_step(problem, method, average_decay=config.average_decay)
    replicated = NamedSharding(mesh, PartitionSpec())
    measure = jax.jit(
        traced(partial(evaluate, merge)),
        in_shardings=(state_shardings.params, batch_sharding, state_shardings.model_state),
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
        schedule=schedule,
        state_shardings=state_shardings,
        batch_sharding=batch_sharding,
        init=jax.jit(init, out_shardings=state_shardings),
        step=jax.jit(
            traced(step),
            in_shardings=(state_shardings, batch_sharding),
            out_shardings=(state_shardings, replicated),
            donate_argnums=0,
        ),
        evaluate=evaluated,
        nonfinite_parameters=jax.jit(
            traced(partial(nonfinite_parameters, problem)),
            in_shardings=(state_shardings, batch_sharding),
            out_shardings=replicated,
        ),
    )


def split_model(model: nnx.Module) -> tuple[Any, ...]:
    """A model's graph definition, parameters, what the backward pass moves, what it owes the loss,
    and statistics."""
    return nnx.split(model, nnx.Param, GradientState, AuxiliaryLoss, ...)


def _build_model_config(config: ConfigDict, sizes: dict[str, Any]) -> Any:
    """The configuration of the model, given the sizes that follow from the data."""
    follows = dict.fromkeys(sizes, "the data")
    if "max_length" in sizes:
        follows |= {"vocab_size": "data.vocab_size", "max_length": "length"}
    made = resolve(config, "model", follows | {"dtype": "dtype"})
    asked = inspect.signature(made).parameters
    missing = [name for name in sizes if name not in asked]
    if missing:
        kind = "text" if "vocab_size" in sizes else "images"
        raise ConfigError(
            f"model.name={config.model.name} is not a model of {kind}, which "
            f"data.name={config.data.name} is: it takes no {' and no '.join(missing)}"
        )
    return made(**sizes, dtype=jnp.dtype(config.dtype))


def _check_loss(config: ConfigDict, model: Any, num_classes: int | None) -> None:
    """Raises where the loss reads what the model does not have."""
    function = resolve(config, "loss")
    asked = inspect.signature(function).parameters
    if "hidden" in asked and not hasattr(model, "hidden"):
        raise ConfigError(
            f"loss.name={config.loss.name} reads the hidden states of a language model, and "
            f"model.name={config.model.name} is none; choose a loss of logits, such as "
            "softmax_cross_entropy_with_integer_labels"
        )
    if "hidden" in asked and keeps_something(function):  # an output matrix, which takes its steps
        for key, wrong, right in (
            ("model.tie_embeddings", model.output is None, False),
            ("accumulate", config.accumulate != 1, 1),
        ):
            if wrong:
                raise ConfigError(
                    f"loss.name={config.loss.name} trains an output matrix of its own, once for "
                    f"every batch: set {key}={right}"
                )
    if _reads_one_score(asked) and num_classes != 2:
        raise ConfigError(
            f"loss.name={config.loss.name} is of decisions between two classes, and "
            f"data.name={config.data.name} has {num_classes or 'tokens'}; name the classes to tell "
            "from the others in data.positive_classes"
        )


def _reads_one_score(asked: Iterable[str]) -> bool:
    """Whether a loss, by the names of its arguments, is of a single score for each example."""
    return next(iter(asked)) in ("scores", "probabilities")


def build_schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate by step. Lengths that the section leaves out follow from the run's:
    `decay_steps` and `transition_steps` are its steps, `warmup_steps` a tenth of them."""
    schedule = resolve(config, "schedule")
    lengths = {
        "decay_steps": config.steps,
        "transition_steps": config.steps,
        "warmup_steps": config.steps // 10,
    }
    asked = inspect.signature(schedule).parameters
    return schedule(**{k: v for k, v in lengths.items() if k in asked and k not in config.schedule})


def build_method(config: ConfigDict, schedule: optax.Schedule, **given: Any) -> Method:
    """The training method: an optimizer behind clipping by global norm, or one of
    `jaxref.train.methods`, which is given what it asks for by name."""
    given = {"learning_rate": schedule, "clip_norm": config.clip_norm} | given
    optimizer = resolve(
        config, "optimizer", dict.fromkeys(given, "the run") | {"learning_rate": "schedule"}
    )
    asked = inspect.signature(optimizer).parameters
    if "learning_rate" not in asked:
        raise ConfigError(f"optimizer.name: {config.optimizer.name} takes no learning_rate")
    if "num_examples" in asked and given["num_examples"] is None:
        raise ValueError(f"num_examples must be given for {config.optimizer.name}, got None")
    made = optimizer(**{name: value for name, value in given.items() if name in asked})
    return made if isinstance(made, Method) else from_transformation(made, config.clip_norm)


def build_loss(config: ConfigDict) -> TokenLoss:
    """The loss per token, or image, of a batch, by what the function asks for.

    A loss with an argument `hidden` reads hidden states and output matrix (the logits never
    exist), or keeps the matrix itself, in the place of the model's, and trains it at its own
    `learning_rate`, by default the run's. One whose first argument is `scores` reads the log-odds
    of the second of two classes, one with `probabilities` its probability, one with `values` what
    all logits but the last exceed that by; any other reads logits. An argument `key` is given a
    random key, `indices` the examples' places in the training set.
    """
    function = resolve(config, "loss")
    parameters = inspect.signature(function).parameters

    def loss(model: Any, batch: Batch, key: Array) -> Array:
        keywords = {}
        if "key" in parameters:
            key, keywords["key"] = jax.random.split(key)
        if "indices" in parameters:
            keywords["indices"] = batch["ids"]
        if "hidden" in parameters:
            hidden = model.hidden(batch["inputs"], key=key)
            if keeps_something(function):
                return model.loss(hidden, batch["targets"], **keywords)
            return function(hidden, model.output_kernel(), batch["targets"], **keywords)
        predictions = _predictions(parameters, model(batch["inputs"], key=key))
        called = model.loss if keeps_something(function) else function
        return called(predictions, batch["targets"], **keywords)

    return loss


def _predictions(asked: Iterable[str], logits: Array) -> Array:
    """What a loss with these arguments reads of a model's logits."""
    first = next(iter(asked))
    if first == "values":
        return logits[..., :-1] - logits[..., -1:]
    if not _reads_one_score(asked):
        return logits
    scores = logits[..., 1] - logits[..., 0]
    return jax.nn.sigmoid(scores) if first == "probabilities" else scores


def class_logits(model: Any, inputs: Array) -> Array:
    """Logits of the classes: log-probabilities, where the loss has learned a link to them."""
    logits = model(inputs)
    loss = getattr(model, "loss", None)
    if loss is None or loss.link is None:
        return logits
    asked = inspect.signature(loss.function).parameters
    return loss.log_probabilities(_predictions(asked, logits))


def build_loss_of_logits(config: ConfigDict) -> Callable[[Array, Batch], Array]:
    """The loss per token, or image, as a function of the logits; one that reads hidden states is
    cross-entropy."""
    function = resolve(config, "loss")
    parameters = inspect.signature(function).parameters
    if "hidden" in parameters:
        function = optax.losses.softmax_cross_entropy_with_integer_labels

    def loss(logits: Array, batch: Batch) -> Array:
        if "key" in parameters or keeps_something(function):
            raise ConfigError(
                f"loss.name: {config.loss.name} draws random numbers or keeps something, which "
                f"optimizer.name={config.optimizer.name} cannot give it"
            )
        return function(_predictions(parameters, logits), batch["targets"])

    return loss


def make_step(
    problem: Problem, method: Method, *, average_decay: float = 0.0
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One step of training, as a pure function of state and batch.

    A step whose loss or gradient is not finite leaves parameters, the method's state and average
    as they were and is counted.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        params, opt_state, value, norm, model_state = method.update(
            problem._replace(model_state=state.model_state),
            state.params,
            state.opt_state,
            batch,
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


def evaluate(merge: Merge, params: Params, batch: Batch, model_state: ModelState) -> Evaluation:
    """Cross-entropy of a batch; `batch["where"]` says which tokens or images count."""
    model = merge(params, model_state)
    model.eval()
    if hasattr(model, "hidden"):
        hidden = model.hidden(batch["inputs"]).astype(jnp.float32)  # losses have the type of these
        if isinstance(model.output, OutputOfLoss):
            nats = optax.losses.softmax_cross_entropy_with_integer_labels(
                model.logits(hidden), batch["targets"]
            )
            nats = jnp.where(batch["where"], nats, 0.0)
        else:
            nats = linear_softmax_cross_entropy(
                hidden, model.output_kernel(), batch["targets"], where=batch["where"]
            )
        return Evaluation(jnp.sum(nats, dtype=jnp.float32), jnp.sum(batch["where"]), None)
    logits = class_logits(model, batch["inputs"]).astype(jnp.float32)
    nats = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return Evaluation(
        jnp.sum(nats, where=batch["where"]),
        jnp.sum(batch["where"]),
        jnp.sum(right, where=batch["where"]),
    )


def nonfinite_parameters(problem: Problem, state: TrainState, batch: Batch) -> Any:
    """For each parameter, whether it has a non-finite entry; and whether its gradient on this batch
    has one."""
    key = jax.random.fold_in(state.key, state.step)
    problem = problem._replace(model_state=state.model_state)
    _, gradient, _ = problem.value_and_grad(state.params, batch, key)
    return jax.tree.map(lambda x: ~jnp.isfinite(x).all(), (state.params, gradient))


def _check_numbers(config: ConfigDict) -> None:
    """Raises where a number that no function below checks is out of range."""
    counts = ("steps", "accumulate", "log_every", "validate_every", "checkpoint_every")
    for name in (*counts, "max_nonfinite_steps"):
        check_interval(1, jnp.inf, **{name: config[name]})
    check_interval(0, jnp.inf, clip_norm=config.clip_norm)
    check_interval(0, 1, closed="left", average_decay=config.average_decay)
    if config.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype must be float32 or bfloat16, got {config.dtype!r}")


def _state_shardings(
    state: TrainState,
    variables: nnx.State,
    method: Method,
    mesh: Mesh,
) -> TrainState:
    """Parameters by their logical axes; what the method keeps of a parameter's shape, alike."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def by_axes(path: Any, variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        try:
            return logical_sharding(variable.get_metadata()["axes"], shape, mesh)
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
        opt_state = method.shardings(state.opt_state, mesh, opt_state)
    return jax.tree.map(lambda _: replicated, state)._replace(
        params=shardings,
        opt_state=opt_state,
        average=None if state.average is None else shardings,
    )


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced with the activations' sharding rules in force."""

    @wraps(function)
    def traced(*args: Any) -> Any:
        with use_rules(mesh):
            return function(*args)

    return traced
