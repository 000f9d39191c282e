"""What an objective is: what a step predicts of a batch of text.

Most text is learned token by token from what came before, which is `next_token`. Other objectives,
listed in this package's `__init__`, leave tokens out, weigh them, ask for those that were cut out,
or for those that another model put in. They are chosen by `--config.objective=NAME`, their
arguments by `--config.objective.ARGUMENT=VALUE`. Keywords without a default are given by the
program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxref.train.evaluation import Evaluation, evaluate
from jaxref.train.losses import TokenLoss
from jaxref.train.methods.frame import Batch

SPECIAL_TOKENS = 8
"""Ids of objectives that need any, used or not: devices can share the vocabulary as before."""


class Objective(NamedTuple):
    """What is learned from text, or else from labels.

    Attributes:
      losses: `losses(model, batch, key)`, floating point, whose mean is minimised: of each token,
        `[rows, length]`, of each image, `[rows]`. `batch["step"]`, `[rows]`, is the step.
      evaluate: `evaluate(model, batch) -> Evaluation` on held-out data.
      measure: what a validation loss is, where it is not the nats of the next token.
      special_tokens: how many ids follow those of the text.
      architecture: of the `Transformer`; None leaves it to `model.architecture`.
      extend: `extend(model, rngs)` adds what is trained besides the model.
      generates: whether the model can go on with a text.
      asked: what it is given of a text to go on with; see `jaxref.train.sampling.sample`.
      reference: the working directory of a run, whose model's log-probabilities of the targets are
        `batch["reference_log_probs"]`; "" for none.
    """

    losses: TokenLoss
    evaluate: Callable[[Any, Batch], Evaluation] = evaluate
    measure: str = ""
    special_tokens: int = 0
    architecture: str | None = None
    extend: Callable[[Any, nnx.Rngs], None] | None = None
    generates: bool = True
    asked: Callable[[np.ndarray], np.ndarray] | None = None
    reference: str = ""


def next_token(*, token_losses: TokenLoss) -> Objective:
    """The loss of the section `loss`, of every token given those before it; of images and series,
    of each of them.

    Args:
      token_losses: the losses of the section `loss`; given by the program.

    Returns:
      The `Objective`.
    """
    return Objective(token_losses)


def weighted(losses: Array, weights: Array) -> Array:
    """The losses times their weights, scaled so that their mean is the weighted mean; 0 where no
    weight is above 0.

    Args:
      losses: floating point.
      weights: at least 0, or boolean, broadcastable to `losses`.

    Returns:
      Of the shape of `losses`, whose mean over all entries is to be minimised.
    """
    weights = weights.astype(jnp.float32)
    mean = jnp.mean(weights)
    return losses * weights / jnp.where(mean > 0, mean, 1.0)


def each_row(function: Callable[..., Any], key: Array, *rows: Array) -> Any:
    """`function(key, row, ...)` of each row of a batch, with a key of its own.

    Args:
      function: of a random key and of rows without the axis of the batch.
      key: a random key.
      *rows: arrays `[rows, ...]`.

    Returns:
      What the function gives, `[rows, ...]`.
    """
    return jax.vmap(function)(jax.random.split(key, len(rows[0])), *rows)
