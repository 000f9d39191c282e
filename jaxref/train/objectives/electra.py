"""Detecting the tokens that a small generator put in the place of others (ELECTRA)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxref.core.checks import check_interval
from jaxref.losses import (
    binary_cross_entropy,
    electra_corrupt,
    sample_masked_positions,
    softmax_cross_entropy,
)
from jaxref.nn import Embed, Linear
from jaxref.train.config import ConfigError
from jaxref.train.evaluation import Evaluation
from jaxref.train.methods.frame import Batch
from jaxref.train.objectives.frame import SPECIAL_TOKENS, Objective


def electra(
    *,
    vocab_size: int,
    mask_probability: float = 0.15,
    generator_size: float = 0.25,
    generator_weight: float = 1.0,
    discriminator_weight: float = 50.0,
    temperature: float = 1.0,
) -> Objective:
    """An encoder says of every token whether a generator has replaced it.

    The generator, the model at `generator_size` of its width, learns to fill in the masked tokens
    that it replaces. It shares the encoder's embeddings, through a map from one width to the other.

    Args:
      vocab_size: number of ids of the text; given by the program. Further ids follow them.
      mask_probability: the share of tokens that the generator fills in, in (0, 1]. Default 0.15.
      generator_size: its width as a share of the encoder's, in (0, 1]. Default a quarter.
      generator_weight, discriminator_weight: of the two losses. Default 1 and 50.
      temperature: at which the generator's tokens are drawn, above 0. Default 1.

    Returns:
      The `Objective`, whose model reads and does not write.

    Raises:
      ValueError: a `generator_size` out of range.
    """
    check_interval(0, 1, closed="right", generator_size=generator_size)

    def extend(model: Any, rngs: nnx.Rngs) -> None:
        if not isinstance(model.embed, Embed):
            raise ConfigError(
                "objective.name=electra shares embeddings, which model.stable_embedding does not: "
                "set it to False"
            )
        config = model.config
        heads = max(1, int(config.num_heads * generator_size))
        head_dim = max(2, int(config.features * generator_size) // heads // 2 * 2)
        generator = dataclasses.replace(
            config,
            features=heads * head_dim,
            num_heads=heads,
            num_kv_heads=None,
            head_dim=None,
            mlp_features=max(1, int(config.mlp_features * generator_size)),
        ).build(rngs=rngs)
        generator.embed = _NarrowEmbed(model.embed, config.features, heads * head_dim, rngs)
        generator.output = _NarrowOutput(model.embed, config.features, heads * head_dim, rngs)
        model.generator = generator
        model.output = Linear(config.features, 1, axes=("embed", None), rngs=rngs)

    def corrupted(
        model: Any, batch: Batch, key: Array, dropout_key: Array | None
    ) -> tuple[Array, Array, Array]:
        """The tokens, some of them replaced; which; and the generator's loss, a mean by row."""
        tokens = batch["inputs"]
        mask_key, draw_key = jax.random.split(key)
        masked = sample_masked_positions(
            tokens, key=mask_key, special_ids=(), mask_probability=mask_probability
        )
        count = max(1, round(mask_probability * tokens.shape[1]))
        places = jnp.argsort(~masked, axis=1)[:, :count]  # of the masked ones, alike in number
        hidden = model.generator.hidden(jnp.where(masked, vocab_size, tokens), key=dropout_key)
        hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
        original = jnp.take_along_axis(tokens, places, axis=1)
        logits = model.generator.logits(hidden).astype(jnp.float32)
        drawn, replaced = electra_corrupt(
            original, True, logits[..., :vocab_size], key=draw_key, temperature=temperature
        )
        rows = jnp.arange(len(tokens))[:, None]
        is_replaced = jnp.zeros(tokens.shape, bool).at[rows, places].set(replaced)
        filled_in = jnp.mean(softmax_cross_entropy(logits, original), axis=1)
        return tokens.at[rows, places].set(drawn), is_replaced, filled_in

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        key, *dropout_keys = jax.random.split(key, 3)
        tokens, is_replaced, filled_in = corrupted(model, batch, key, dropout_keys[0])
        scores = model(tokens, key=dropout_keys[1])[..., 0]
        detected = binary_cross_entropy(scores, is_replaced)
        return discriminator_weight * detected + generator_weight * filled_in[:, None]

    def evaluate(model: Any, batch: Batch) -> Evaluation:
        tokens, is_replaced, _ = corrupted(model, batch, jax.random.key(0), None)
        scores = model(tokens)[..., 0]
        detected = binary_cross_entropy(scores, is_replaced)
        where = batch["where"]
        right = (scores > 0) == is_replaced
        return Evaluation(
            jnp.sum(detected, where=where), jnp.sum(where), jnp.sum(right, where=where)
        )

    return Objective(
        losses,
        evaluate=evaluate,
        measure="nats per token, replaced or not",
        special_tokens=SPECIAL_TOKENS,
        architecture="encoder",
        extend=extend,
        generates=False,
    )


class _NarrowEmbed(nnx.Module):
    """Embeddings of another model in the generator's width."""

    def __init__(self, embed: Embed, features: int, narrow: int, rngs: nnx.Rngs):
        self.embed = embed
        self.project = Linear(features, narrow, axes=("embed", None), rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        return self.project(self.embed(ids))


class _NarrowOutput(nnx.Module):
    """The output layer whose matrix is the embeddings of another model, in its width."""

    bias = None

    def __init__(self, embed: Embed, features: int, narrow: int, rngs: nnx.Rngs):
        self.embed = embed
        self.project = Linear(
            narrow,
            features,
            axes=("embed", None),
            kernel_init=jax.nn.initializers.normal((narrow * features) ** -0.5),
            rngs=rngs,
        )

    @property
    def kernel(self) -> Array:
        """`[narrow, vocabulary]`."""
        return self.project.kernel[...] @ self.embed.embedding[...].T
