"""What a trained model is measured by."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from jaxref.train.losses import class_logits, token_cross_entropy
from jaxref.train.methods.frame import Batch


class Evaluation(NamedTuple):
    """What a batch adds to the measurement of a model.

    Attributes:
      loss: cross-entropy in nats, whatever the training loss, summed; of forecasts the squared
        error, a mean over each.
      examples: how many tokens, images or forecasts it is the sum over.
      correct: how many of them the model's most probable class is right for; None for tokens,
        whose logits are never formed, and forecasts.
    """

    loss: Array
    examples: Array
    correct: Array | None


def evaluate(model: Any, batch: Batch) -> Evaluation:
    """Cross-entropy of a batch, or the squared error of forecasts; `batch["where"]` says which
    tokens, images or forecasts count, and the model is in evaluation.

    Args:
      model: of tokens, of classes or of forecasts.
      batch: "inputs", "targets" and "where", boolean of the shape of the losses: `[rows, length]`
        of tokens, `[rows]` of images, series and forecasts.

    Returns:
      The `Evaluation`, sums in float32 over what counts.
    """
    if jnp.issubdtype(batch["targets"].dtype, jnp.floating):
        error = model(batch["inputs"]).astype(jnp.float32) - batch["targets"]
        squares = jnp.mean(jnp.square(error), axis=(1, 2))
        return Evaluation(jnp.sum(squares, where=batch["where"]), jnp.sum(batch["where"]), None)
    if hasattr(model, "hidden"):
        nats = token_cross_entropy(model, batch)
        return Evaluation(jnp.sum(nats, dtype=jnp.float32), jnp.sum(batch["where"]), None)
    logits = class_logits(model, batch["inputs"]).astype(jnp.float32)
    nats = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return Evaluation(
        jnp.sum(nats, where=batch["where"]),
        jnp.sum(batch["where"]),
        jnp.sum(right, where=batch["where"]),
    )
