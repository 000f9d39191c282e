"""What the sections of a configuration are: model, schedule, method; and what does not go
together."""

import inspect
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxref.nn.losses import keeps_something
from jaxref.train.config import ConfigError, resolve
from jaxref.train.losses import build_loss, reads_one_score
from jaxref.train.methods.frame import Method, from_transformation
from jaxref.train.objectives.frame import Objective


def build_model_config(config: ConfigDict, sizes: dict[str, Any]) -> Any:
    """The configuration of the model, given the sizes that follow from the data.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      sizes: what follows from the data, by argument of the model's configuration: `vocab_size` and
        `max_length` of text, with `architecture` where the objective has one; `image_shape` and
        `num_classes` of images; `channels` and `num_classes` of series with labels;
        `context_length`, `horizon` and `channels` of series to forecast.

    Returns:
      The model's configuration, of which `build(rngs=...)` makes the model.

    Raises:
      ConfigError: the section names no model, or one that is not of such data, or it has a key that
        the model does not take or that follows from something else.
      ValueError: a size that the model refuses.
    """
    follows = dict.fromkeys(sizes, "the data")
    if "max_length" in sizes:
        follows |= {"vocab_size": "data.vocab_size", "max_length": "length"}
    if "architecture" in sizes:
        follows["architecture"] = "objective.name"
    made = resolve(config, "model", follows | {"dtype": "dtype"})
    asked = inspect.signature(made).parameters
    missing = [name for name in sizes if name not in asked]
    if missing:
        kind = kind_of_data(sizes)
        raise ConfigError(
            f"model.name={config.model.name} is not a model of {kind}, which "
            f"data.name={config.data.name} is: it takes no {' and no '.join(missing)}"
        )
    return made(**sizes, dtype=jnp.dtype(config.dtype))


def build_objective(config: ConfigDict, vocab_size: int | None) -> Objective:
    """What is learned, of text with so many ids, or, without, of labels or numbers.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      vocab_size: number of ids of the text; None for images and series, which have labels or
        numbers to learn.

    Returns:
      The `Objective`, given the losses of the section `loss` where it asks for them.

    Raises:
      ConfigError: an objective of text for other data, one that does not exist, an argument that it
        does not take, or a `loss.name` beside an objective with losses of its own.
      ValueError: an argument that the objective refuses.
    """
    name = config.objective.name
    if vocab_size is None and name != "next_token":
        raise ConfigError(
            f"objective.name={name} is of text, and data.name={config.data.name} is none; choose "
            "next_token"
        )
    given = {
        "token_losses": build_loss(config),
        "vocab_size": vocab_size,
        "steps": config.steps,
    }
    made = resolve(config, "objective", dict.fromkeys(given, "the run"))
    asked = inspect.signature(made).parameters
    if "token_losses" not in asked and config.loss.name != "linear_softmax_cross_entropy":
        raise ConfigError(
            f"objective.name={name} has losses of its own: leave loss.name as it is, got "
            f"{config.loss.name!r}"
        )
    return made(**{key: value for key, value in given.items() if key in asked})


def kind_of_data(sizes: dict[str, Any]) -> str:
    """What the data are whose sizes these are.

    Args:
      sizes: as for `build_model_config`.

    Returns:
      "text", "images", "series" for those to forecast, or "series with labels".
    """
    if "vocab_size" in sizes:
        return "text"
    if "image_shape" in sizes:
        return "images"
    return "series" if "horizon" in sizes else "series with labels"


def check_loss(config: ConfigDict, model: Any, sizes: dict[str, Any]) -> None:
    """Raises where the loss reads what the model does not have.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      model: the model, or one of abstract arrays.
      sizes: as for `build_model_config`.

    Raises:
      ConfigError: a loss of numbers for data with labels or tokens, or the reverse; of hidden
        states for a model without; with an output matrix of its own for tied embeddings or
        micro-batches; or of two classes for data that have not two.
    """
    function = resolve(config, "loss")
    asked = inspect.signature(function).parameters
    num_classes, kind = sizes.get("num_classes"), kind_of_data(sizes)
    if (kind == "series") != (next(iter(asked)) == "predictions") and "hidden" not in asked:
        raise ConfigError(
            f"loss.name={config.loss.name} is {'not ' * (kind == 'series')}of predictions of "
            f"numbers, and data.name={config.data.name} is {kind}; choose "
            + ("squared_error or huber_loss" if kind == "series" else "a loss of logits")
        )
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
    if reads_one_score(asked) and num_classes != 2:
        raise ConfigError(
            f"loss.name={config.loss.name} is of decisions between two classes, and "
            f"data.name={config.data.name} has {num_classes or 'tokens'}; name the classes to tell "
            "from the others in data.positive_classes"
        )


def build_schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate by step. Lengths that the section leaves out follow from the run's:
    `decay_steps` and `transition_steps` are its steps, `warmup_steps` a tenth of them.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.

    Returns:
      `schedule(step)`, the learning rate of a step counted from 0.

    Raises:
      ConfigError: no such schedule, or an argument that it does not take.
      ValueError: an argument that it refuses.
    """
    schedule = resolve(config, "schedule")
    lengths = {
        "decay_steps": config.steps,
        "transition_steps": config.steps,
        "warmup_steps": config.steps // 10,
    }
    asked = inspect.signature(schedule).parameters
    return schedule(**{k: v for k, v in lengths.items() if k in asked and k not in config.schedule})


def build_method(
    config: ConfigDict,
    schedule: optax.Schedule,
    *,
    last: optax.GradientTransformation | None = None,
    **given: Any,
) -> Method:
    """The training method: an optimizer between clipping by global norm and `last`, or one of
    `jaxref.train.methods`, which is given what it asks for by name.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      schedule: the learning rate by step.
      last: what an optimizer's updates go through at the end. Default: nothing.
      **given: what else a method may ask for: `mesh`, `num_examples`, `logits_shape`.

    Returns:
      The `Method`.

    Raises:
      ConfigError: no such optimizer, one without a `learning_rate`, an argument that it does not
        take or that follows from the run, or `last` for a method that is no optimizer of one
        gradient.
      ValueError: an argument that it refuses, or `num_examples` None for one that asks for it.
    """
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
    if last is not None:
        if isinstance(made, Method):
            raise ConfigError(
                f"optimizer.name={config.optimizer.name} moves the parameters in its own way, and "
                "some of them are not to be moved; choose an optimizer of one gradient"
            )
        made = optax.chain(made, last)
    return made if isinstance(made, Method) else from_transformation(made, config.clip_norm)
