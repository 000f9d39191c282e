"""Objectives of the next token that leave tokens out, weigh them, or measure them otherwise."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.data import loss_based_weights, temperature_schedule
from jaxref.data.loss_reweighting import Strategy as Reweighting
from jaxref.losses import goldfish_mask, linear_emo_loss, reference_token_weights
from jaxref.losses.earth_mover import Mode
from jaxref.losses.goldfish import Strategy
from jaxref.losses.token_weights import Normalise, Weighting
from jaxref.train.config import ConfigError
from jaxref.train.losses import TokenLoss
from jaxref.train.methods.frame import Batch
from jaxref.train.objectives.frame import Objective, weighted


def goldfish(
    *,
    token_losses: TokenLoss,
    k: int = 4,
    strategy: Strategy = "hash",
    context_width: int = 13,
    seed: int = 2971215073,
) -> Objective:
    """The loss of the section `loss` without the tokens that `jaxref.losses.goldfish_mask` drops,
    so that no passage can be recited, however often it came.

    Args:
      token_losses: the losses of the section `loss`; given by the program.
      k: at least 2; 1/k of the tokens is dropped. Default 4.
      strategy: "hash" (the default), by the tokens before; "static", by the place; or "random".
      context_width: tokens that the hash is of, at least 1. Default 13.
      seed: of the hash, in [0, 2³²).

    Returns:
      The `Objective`.
    """

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        key, mask_key = jax.random.split(key)
        kept = goldfish_mask(
            batch["targets"],
            k=k,
            strategy=strategy,
            context_width=context_width,
            seed=seed,
            key=mask_key,
        )
        return weighted(token_losses(model, batch, key), kept)

    return Objective(losses)


def emo(*, mode: Mode = "mle", epsilon: float = 1e-10) -> Objective:
    """Cross-entropy and the earth mover's distance between words, which are as far apart as their
    columns of the output matrix (`jaxref.losses.linear_emo_loss`).

    Args:
      mode: as in `jaxref.losses.emo_loss`. Default "mle".
      epsilon: likewise, above 0. Default 1e-10.

    Returns:
      The `Objective`.
    """

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        hidden = model.hidden(batch["inputs"], key=key)
        kernel = model.output_kernel()
        return linear_emo_loss(
            hidden, kernel, batch["targets"], kernel.T, mode=mode, epsilon=epsilon
        )

    return Objective(losses)


def reweighted(
    *,
    token_losses: TokenLoss,
    steps: int,
    strategy: Reweighting = "linupper",
    temperature: float = 0.4,
    first_temperature: float = 100.0,
    warmup_share: float = 0.1,
    delta: float = 1.0,
) -> Objective:
    """The loss of the section `loss`, of each sequence by a weight that follows from how large it
    is beside the others' of the batch (`jaxref.data.loss_based_weights`); almost alike, at
    `first_temperature`, in the first `warmup_share` of the steps.

    Args:
      token_losses: the losses of the section `loss`; given by the program.
      steps: of the run; given by the program.
      strategy: how the weight follows from the loss, as in `jaxref.data.loss_based_weights`.
        Default "linupper".
      temperature: above 0; the larger, the more alike the weights are. Default 0.4.
      first_temperature: likewise, at the start. Default 100.
      warmup_share: in [0, 1]. Default a tenth.
      delta: above 0, as in `jaxref.data.loss_based_weights`. Default 1.

    Returns:
      The `Objective`.
    """
    warmup = round(warmup_share * steps)
    schedule = temperature_schedule(first_temperature, temperature, warmup, warmup)

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        values = token_losses(model, batch, key)
        weights = loss_based_weights(
            jnp.mean(values, axis=1),
            strategy=strategy,
            temperature=schedule(batch["step"][0]),
            delta=delta,
        )
        return weighted(values, weights[:, None])

    return Objective(losses)


def prior(
    *,
    token_losses: TokenLoss,
    reference: str = "",
    exponent: float = 1.0,
    weighting: Weighting = "complement",
    floor: float = 0.0,
    ceiling: float = 10.0,
    normalise: Normalise = "sequence",
) -> Objective:
    """The loss of the section `loss`, of each token the more, the less likely another model thinks
    it (PRIOR): that of the run in the directory `objective.reference`
    (`jaxref.losses.reference_token_weights`).

    Args:
      token_losses: the losses of the section `loss`; given by the program.
      reference: the working directory of the other run, whose vocabulary, windows and batches are
        the same.
      exponent: at least 0; 0 weighs all tokens alike. Default 1.
      weighting: "complement" (the default) or "inverse" of the reference's probability.
      floor, ceiling: the least and the largest score of a token. Default 0 and 10.
      normalise: over what weights have the mean 1: "sequence" (the default), "batch", or None for
        the scores themselves.

    Returns:
      The `Objective`.

    Raises:
      ConfigError: no `reference`.
    """
    if not reference:
        raise ConfigError("objective.reference must be the directory of a run, for its model")

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        weights = reference_token_weights(
            batch["reference_log_probs"],
            exponent=exponent,
            weighting=weighting,
            floor=floor,
            ceiling=ceiling,
            normalise=normalise,
        )
        return weights * token_losses(model, batch, key)

    return Objective(losses, reference=reference)
