"""How a language model forgets some of what it was trained on, and keeps the rest.

A method is a function `loss(model, forget, retain, key) -> scalar` of two batches of text. They are
chosen by `--config.unlearn.method=NAME`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref.adaptation import flat_loss_of_log_probs, loreun_loss
from jaxref.adaptation.unlearning import FlatDivergence
from jaxref.core.checks import check_interval
from jaxref.train.losses import token_cross_entropy
from jaxref.train.methods.frame import Batch

ForgetBy = Literal["random_tokens", "gradient_ascent"]


class Unlearning(NamedTuple):
    """A way to forget.

    Attributes:
      loss: `loss(model, forget, retain, key)`, as above.
      keep_fraction: the share of weights, those that the text to forget moves most, that are
        trained.
      retains: whether the loss has a part of what is to be retained, so that what is lost of that
        on the way comes back.
    """

    loss: Callable[[Any, Batch, Batch, Array], Array]
    keep_fraction: float = 1.0
    retains: bool = True


def gradient_ascent(*, retain_weight: float = 10.0) -> Unlearning:
    """Up the loss of what is to be forgotten, down that of the rest."""

    def loss(model: Any, forget: Batch, retain: Batch, key: Array) -> Array:
        del key
        kept = jnp.mean(token_cross_entropy(model, retain))
        return retain_weight * kept - jnp.mean(token_cross_entropy(model, forget))

    return Unlearning(loss, retains=retain_weight > 0)


def salun(
    *,
    forget_by: ForgetBy = "random_tokens",
    keep_fraction: float = 0.5,
    retain_weight: float = 10.0,
) -> Unlearning:
    """SalUn: random tokens as targets of what is to be forgotten, or ascent, for the weights it
    moves most (`jaxref.adaptation.saliency_mask`)."""
    _check_forget_by(forget_by)

    def loss(model: Any, forget: Batch, retain: Batch, key: Array) -> Array:
        forgotten = _forgetting(model, forget, forget_by, key)
        return jnp.mean(forgotten) + retain_weight * jnp.mean(token_cross_entropy(model, retain))

    return Unlearning(loss, keep_fraction, retains=retain_weight > 0)


def loreun(
    *,
    forget_by: ForgetBy = "gradient_ascent",
    temperature: float = 1.0,
    keep_fraction: float = 1.0,
    retain_weight: float = 10.0,
) -> Unlearning:
    """LoReUn: each sequence is forgotten the harder the better the model still knows it
    (`jaxref.adaptation.loreun_loss`)."""
    _check_forget_by(forget_by)

    def loss(model: Any, forget: Batch, retain: Batch, key: Array) -> Array:
        forgotten = jnp.mean(_forgetting(model, forget, forget_by, key), axis=1)
        known = jnp.mean(token_cross_entropy(model, forget), axis=1)
        kept = jnp.mean(token_cross_entropy(model, retain), axis=1)
        return loreun_loss(
            forgotten, kept, known, temperature=temperature, retain_weight=retain_weight
        )

    return Unlearning(loss, keep_fraction, retains=retain_weight > 0)


def flat(
    *,
    divergence: FlatDivergence = "jensen_shannon",
    template: str = "# This text is not available.\n",
    prompt_share: float = 0.2,
    retain_weight: float = 0.0,
) -> Unlearning:
    """FLAT: after the first part of each sequence to forget, a template in the place of the rest
    (`jaxref.adaptation.flat_loss_of_log_probs`).

    It does not read what is to be retained, and keeps it where that is another kind of text, at a
    learning rate of a few thousandths of the training's. Texts that are much alike need a
    `retain_weight`, which is not the paper's. Jensen-Shannon weighs forgetting, sigmoid(P_f), above
    the template, sigmoid(-P_e), and costs the rest less than total variation, which weighs them
    alike.
    """
    check_interval(0, 1, closed="neither", prompt_share=prompt_share)
    answer = np.frombuffer(template.encode(), np.uint8).astype(np.int32)
    if answer.size == 0:
        raise ValueError("template must have at least one byte, got ''")

    def loss(model: Any, forget: Batch, retain: Batch, key: Array) -> Array:
        del key
        length = forget["targets"].shape[1]
        first = max(1, round(prompt_share * length))  # of the answer, among the targets
        where = jnp.broadcast_to(jnp.arange(length) >= first, forget["targets"].shape)
        filled = jnp.asarray(np.resize(answer, length - first))
        templates = jnp.asarray(forget["targets"]).at[:, first:].set(filled)
        told = {
            "inputs": jnp.concatenate([forget["inputs"][:, :1], templates[:, :-1]], axis=1),
            "targets": templates,
        }
        log_probs = [
            -token_cross_entropy(model, batch | {"where": where}) for batch in (told, forget)
        ]
        value = jnp.mean(
            flat_loss_of_log_probs(
                *log_probs, divergence=divergence, template_where=where, forget_where=where
            )
        )
        if retain_weight:
            value += retain_weight * jnp.mean(token_cross_entropy(model, retain))
        return value

    return Unlearning(loss, retains=retain_weight > 0)


def _check_forget_by(forget_by: str) -> None:
    if forget_by not in ("random_tokens", "gradient_ascent"):
        raise ValueError(
            f"forget_by must be 'random_tokens' or 'gradient_ascent', got {forget_by!r}"
        )


def _forgetting(model: Any, batch: Batch, forget_by: ForgetBy, key: Array) -> Array:
    """What is minimised to forget, of each token: the loss of a random other token in its place, or
    minus its own."""
    if forget_by == "gradient_ascent":
        return -token_cross_entropy(model, batch)
    targets, tokens = batch["targets"], model.config.vocab_size
    others = (targets + jax.random.randint(key, targets.shape, 1, tokens)) % tokens
    return token_cross_entropy(model, batch | {"targets": others})
