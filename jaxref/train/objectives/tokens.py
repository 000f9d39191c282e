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
    so that no passage can be recited, however often it came."""

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
    columns of the output matrix (`jaxref.losses.linear_emo_loss`)."""

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
    `first_temperature`, in the first `warmup_share` of the steps."""
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
    (`jaxref.losses.reference_token_weights`)."""
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
