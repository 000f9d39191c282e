"""The training loss of a run, and what it reads of a model."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from jaxref.kernels import linear_softmax_cross_entropy, linear_softmax_entropy
from jaxref.nn.losses import OutputOfLoss, keeps_something
from jaxref.parallel import on_shards, split_over
from jaxref.train.config import ConfigError, resolve
from jaxref.train.methods.frame import Batch

TokenLoss = Callable[[Any, Batch, Array], Array]


def build_loss(config: ConfigDict) -> TokenLoss:
    """The loss per token, or image, of a batch, by what the function asks for.

    A loss with an argument `hidden` reads hidden states and output matrix (the logits never
    exist), or keeps the matrix itself, in the place of the model's, and trains it at its own
    `learning_rate`, by default the run's. One whose first argument is `scores` reads the log-odds
    of the second of two classes, one with `probabilities` its probability, one with `values` what
    all logits but the last exceed that by; any other reads logits. An argument `key` is given a
    random key, `indices` the examples' places in the training set.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.

    Returns:
      `loss(model, batch, key)`: floating point `[rows, length]` of tokens, `[rows]` of images and
      series.

    Raises:
      ConfigError: no such loss, or an argument that it does not take.
    """
    function = resolve(config, "loss")
    parameters = inspect.signature(function).parameters
    of_states = spread_over_vocabulary(function) if "axis_name" in parameters else function

    def loss(model: Any, batch: Batch, key: Array) -> Array:
        keywords = {}
        if "key" in parameters:
            key, keywords["key"] = jax.random.split(key)
        if "indices" in parameters:
            keywords["indices"] = batch["ids"]
        if "hidden" in parameters:
            hidden = model.hidden(batch["inputs"], key=key, **how_read(batch))
            if keeps_something(function):
                return model.loss(hidden, batch["targets"], **keywords)
            return of_states(hidden, model.output_kernel(), batch["targets"], **keywords)
        logits = model(batch["inputs"], key=key, **how_read(batch))
        predictions = _predictions(parameters, logits)
        called = model.loss if keeps_something(function) else function
        return called(predictions, batch["targets"], **keywords)

    return loss


def how_read(batch: Batch) -> dict[str, Array]:
    """What a batch says of how its inputs are to be read: arguments of a `Transformer`'s call.

    Args:
      batch: arrays by name.

    Returns:
      Those of "prefix_lengths" and "positions" that the batch has.
    """
    return {name: batch[name] for name in ("prefix_lengths", "positions") if name in batch}


def token_cross_entropy(model: Any, batch: Batch) -> Array:
    """-log p of each target of a language model in float32, `[rows, length]`, 0 where
    `batch["where"]`, if there is one, is False; the logits never exist as a whole.

    Args:
      model: a language model with `hidden` and `output_kernel`.
      batch: "inputs" and "targets", `[rows, length]` integer; maybe "where", boolean of that shape,
        and how inputs are to be read (see `how_read`).

    Returns:
      The losses in nats.
    """
    return _of_states(model, _states(model, batch), batch)


def token_cross_entropy_and_entropy(model: Any, batch: Batch) -> tuple[Array, Array]:
    """`token_cross_entropy`, and the entropy of each token's prediction, without gradient.

    Args:
      model: a language model with `hidden` and `output_kernel`.
      batch: "inputs" and "targets", `[rows, length]` integer; maybe "where", boolean of that shape,
        and how inputs are to be read (see `how_read`).

    Returns:
      Losses and entropies in nats, float32 `[rows, length]` each.
    """
    hidden = _states(model, batch)
    if isinstance(model.output, OutputOfLoss):
        log_p = jax.lax.stop_gradient(model.logits(hidden))
        entropy = jnp.sum(jax.scipy.special.entr(jnp.exp(log_p)), axis=-1)
    else:

        def of_all(hidden: Array, kernel: Array, targets: Array, **options: Any) -> Array:
            del targets  # the entropy is that of all tokens
            return linear_softmax_entropy(hidden, kernel, **options)

        entropies = spread_over_vocabulary(of_all)
        where = batch.get("where")
        entropy = entropies(hidden, model.output_kernel(), batch["targets"], where)
    return _of_states(model, hidden, batch), entropy


def _states(model: Any, batch: Batch) -> Array:
    hidden = model.hidden(batch["inputs"], **how_read(batch))
    return hidden.astype(jnp.float32)  # losses have the type of these


def _of_states(model: Any, hidden: Array, batch: Batch) -> Array:
    if isinstance(model.output, OutputOfLoss):
        nats = optax.losses.softmax_cross_entropy_with_integer_labels(
            model.logits(hidden), batch["targets"]
        )
        return jnp.where(batch.get("where", True), nats, 0.0)
    cross_entropy = spread_over_vocabulary(linear_softmax_cross_entropy)
    return cross_entropy(hidden, model.output_kernel(), batch["targets"], batch.get("where"))


def _predictions(asked: Iterable[str], logits: Array) -> Array:
    """What a loss with these arguments reads of a model's logits."""
    first = next(iter(asked))
    if first == "values":
        return logits[..., :-1] - logits[..., -1:]
    if not reads_one_score(asked):
        return logits
    scores = logits[..., 1] - logits[..., 0]
    return jax.nn.sigmoid(scores) if first == "probabilities" else scores


def class_logits(model: Any, inputs: Array) -> Array:
    """Logits of the classes: log-probabilities, where the loss has learned a link to them.

    Args:
      model: of classes, or of forecasts.
      inputs: what it reads.

    Returns:
      `[rows, classes]`; of a model of forecasts what it gives.
    """
    logits = model(inputs)
    loss = getattr(model, "loss", None)
    if loss is None or loss.link is None:
        return logits
    asked = inspect.signature(loss.function).parameters
    return loss.log_probabilities(_predictions(asked, logits))


def build_loss_of_logits(config: ConfigDict) -> Callable[[Array, Batch], Array]:
    """The loss per token, or image, as a function of the logits; one that reads hidden states is
    cross-entropy.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.

    Returns:
      `loss(logits, batch)`, of the shape of `batch["targets"]`.

    Raises:
      ConfigError: no such loss; when the function is called, one that draws random numbers or keeps
        something.
    """
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


def spread_over_vocabulary(function: Callable[..., Array]) -> Callable[..., Array]:
    """A loss `(hidden, kernel, targets, *, where=None, axis_name)`, of which each device computes
    that of its tokens, over its part of the vocabulary: no logits are exchanged.

    The features of the matrix are gathered from wherever they are, in the type of the states.

    Args:
      function: the loss, such as `jaxref.kernels.linear_softmax_cross_entropy`.

    Returns:
      `loss(hidden, kernel, targets, where=None)` of global arrays, `[rows, length, features]`,
      `[features, vocabulary]` and twice `[rows, length]`; sharded as the rules in force say, and as
      it is without any.
    """

    def loss(hidden: Array, kernel: Array, targets: Array, where: Array | None = None) -> Array:
        over_features, over_vocabulary = split_over("embed"), split_over("vocabulary")

        def on_each(hidden: Array, kernel: Array, targets: Array, where: Array | None) -> Array:
            if over_features:
                kernel = kernel.astype(hidden.dtype)
                kernel = jax.lax.all_gather(kernel, over_features, axis=0, tiled=True)
            return function(hidden, kernel, targets, where=where, axis_name=over_vocabulary or None)

        tokens = ("batch", "length")
        spread = on_shards(
            on_each,
            [
                (*tokens, None),
                ("embed", "vocabulary"),
                tokens,
                tokens,
            ],
            tokens,
        )
        return spread(hidden, kernel, targets, where)

    return loss


def reads_one_score(asked: Iterable[str]) -> bool:
    """Whether a loss, by the names of its arguments, is of a single score for each example.

    Args:
      asked: names of the loss's arguments, in their order.

    Returns:
      True where the first is `scores` or `probabilities`.
    """
    return next(iter(asked)) in ("scores", "probabilities")
