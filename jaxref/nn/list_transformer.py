"""A transformer over the members of a list, each embedded by one over its own features."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import normal
from jax.typing import DTypeLike

from jaxref.attention import attention_probabilities
from jaxref.core.checks import check_interval
from jaxref.nn.attention import MultiHeadAttention
from jaxref.nn.linear import Embed, Linear
from jaxref.nn.mlp import MLP
from jaxref.nn.normalization import Norm
from jaxref.norms import layer_norm

_norm = partial(layer_norm, epsilon=1e-5)
_gelu = partial(jax.nn.gelu, approximate=False)


class FeatureTransformer(nnx.Module):
    """A vector for each row of a table: a transformer over the row's features (FT-transformer).

    Each feature is a token, x_j w_j + b_j for a number and a row of a table for a category, with a
    class token in front; the embedding is what becomes of that.

    Args:
      categories: how many values each categorical feature has.
      num_numerical: how many numerical features there are.
      features: size of a token. Default 32.
      num_layers, num_heads, head_dim: depth, heads and their size. Defaults 2, 8 and 16.
      dropout: rate in [0, 1), where a key is given: on attention's weights and on the MLP's hidden
        units. Default 0.1.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.
      rngs: source of the `params` key.

    Raises:
      ValueError: no feature at all, a number below 1 or a rate out of range; when called, arrays
        of other features.

    Use it by itself to classify rows of mixed features, by `logits`, and so to train the embedder
    of a `ListTransformer` first.

    Cost: num_layers · (4 · features · num_heads · head_dim + 12 · features²) parameters, as many
    multiplications for each feature of a row, and attention over all pairs of its features.

    Example:
      >>> def embed(categorical, numerical):
      ...     return FeatureTransformer((3, 2), 4, rngs=nnx.Rngs(0))(categorical, numerical)
      >>> nnx.eval_shape(embed, jnp.zeros((5, 2), int), jnp.ones((5, 4))).shape
      (5, 32)

    Reference: Li, Ma, "Learn to Rank Risky Investors: A Case Study of Predicting Retail Traders'
    Behaviour and Profitability", 2025, arXiv:2509.16616, after Gorishniy, Rubachev, Khrulkov,
    Babenko, "Revisiting Deep Learning Models for Tabular Data", 2021, arXiv:2106.11959.
    """

    def __init__(
        self,
        categories: Sequence[int],
        num_numerical: int,
        *,
        features: int = 32,
        num_layers: int = 2,
        num_heads: int = 8,
        head_dim: int = 16,
        dropout: float = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(categories) + num_numerical < 1:
            raise ValueError("categories and num_numerical must give at least one feature")
        check_interval(1, jnp.inf, categories=np.asarray([1, *categories]))
        check_interval(0, jnp.inf, num_numerical=num_numerical)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def vectors(count: int) -> nnx.Param:
            initial = normal(1.0)(rngs.params(), (count, features), param_dtype)
            return nnx.Param(initial, axes=(None, "embed"))

        self.categories, self.features = tuple(categories), features
        self.class_token = vectors(1)
        self.table = (
            Embed(sum(categories), features, axes=(None, "embed"), **types) if categories else None
        )
        self.num_numerical = num_numerical
        self.numerical_scale: Any = vectors(num_numerical) if num_numerical else None
        self.numerical_bias: Any = vectors(num_numerical) if num_numerical else None
        self.blocks = nnx.List(
            _Block(
                features,
                num_heads,
                4 * features,
                attention={"head_dim": head_dim},
                gated=True,
                attention_dropout=dropout,
                hidden_dropout=dropout,
                **types,
            )
            for _ in range(num_layers)
        )
        self.output_norm = Norm(_norm, features, axes=("embed",), param_dtype=param_dtype)
        self.output = Linear(features, 1, axes=("embed", None), use_bias=True, **types)
        self.dtype = dtype or param_dtype

    def __call__(
        self, categorical: Array | None, numerical: Array | None, *, key: Array | None = None
    ) -> Array:
        """Embeds rows.

        Args:
          categorical: integer `[..., categorical features]`, or None where there are none. One that
            is no value of its feature gives NaN.
          numerical: `[..., numerical features]`, or None where there are none.
          key: random key for dropout; None drops nothing.

        Returns:
          `[..., features]`.
        """
        tokens = []
        for name, given, count in (
            ("categorical", categorical, len(self.categories)),
            ("numerical", numerical, self.num_numerical),
        ):
            if (0 if given is None else given.shape[-1]) != count:
                shape = None if given is None else given.shape
                raise ValueError(f"{name} must have shape [..., {count}], got {shape}")
        if self.table is not None and categorical is not None:
            sizes = np.asarray(self.categories, np.int32)
            known = (categorical >= 0) & (categorical < sizes)
            tokens.append(self.table(jnp.where(known, categorical + np.cumsum(sizes) - sizes, -1)))
        if self.numerical_scale is not None and numerical is not None:
            scale, bias = self.numerical_scale[...], self.numerical_bias[...]
            scale, bias = scale.astype(self.dtype), bias.astype(self.dtype)
            tokens.append(numerical[..., None].astype(self.dtype) * scale + bias)
        leading = tokens[0].shape[:-2]
        token = self.class_token[...].astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (*leading, *token.shape)), *tokens], axis=-2)
        x = x.reshape(-1, *x.shape[-2:])
        for block, block_key in zip(self.blocks, _split(key, len(self.blocks))):
            x = block(x, key=block_key)
        return x[:, 0].reshape(*leading, self.features)

    def logits(
        self, categorical: Array | None, numerical: Array | None, *, key: Array | None = None
    ) -> Array:
        """A logit `[...]` of each row, to train on a binary label."""
        hidden = jax.nn.relu(self.output_norm(self(categorical, numerical, key=key)))
        return self.output(hidden)[..., 0]


class ListTransformer(nnx.Module):
    """Scores for the members of a list, each in the light of all others (PA-RiskRanker).

        e = embedder(features of each member),   scores = tanh(MLP(encoder(e over the list)))

    with a pre-norm transformer as encoder that has no positions, so that permuted members have
    permuted scores.

    Args:
      embedder: `embedder(categorical, numerical, *, key) -> [..., features]`, a
        `FeatureTransformer`, trained before on a label of single members or not.
      features: what it gives. Default 32.
      num_layers, num_heads, mlp_features: depth, heads and hidden units of the encoder. Defaults 4,
        4 and 128, the authors'.
      head_features: hidden units of the last MLP. Default 32.
      dropout: rate in [0, 1), where a key is given: on what attention and MLP give, on attention's
        weights and on hidden units. Default 0.25.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.
      rngs: source of the `params` key.

    Raises:
      ValueError: heads that do not divide the features, a number below 1 or a rate out of range;
        when called, what the embedder raises.

    Use it where members compete: train it by `jaxref.losses.profit_aware_ranking_loss` or another
    loss on lists, the embedder with it or kept as it is (`jax.lax.stop_gradient` around it, or an
    optimizer for the others' parameters alone).

    Cost: num_layers · (4 · features² + 2 · features · mlp_features) parameters, as many
    multiplications a member, attention over all pairs of a list, and the embedder for each member.

    Example:
      >>> def rank(numerical):
      ...     rngs = nnx.Rngs(0)
      ...     model = ListTransformer(FeatureTransformer((), 4, rngs=rngs), rngs=rngs)
      ...     return model(None, numerical)
      >>> nnx.eval_shape(rank, jnp.ones((2, 5, 4))).shape
      (2, 5)

    Reference: Li, Ma, "Learn to Rank Risky Investors: A Case Study of Predicting Retail Traders'
    Behaviour and Profitability", 2025, arXiv:2509.16616.
    """

    def __init__(
        self,
        embedder: Callable[..., Array],
        *,
        features: int = 32,
        num_layers: int = 4,
        num_heads: int = 4,
        mlp_features: int = 128,
        head_features: int = 32,
        dropout: float = 0.25,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embedder: Any = embedder
        self.blocks = nnx.List(
            _Block(
                features,
                num_heads,
                mlp_features,
                attention={"use_bias": True},
                attention_dropout=dropout,
                hidden_dropout=dropout,
                output_dropout=dropout,
                **types,
            )
            for _ in range(num_layers)
        )
        self.hidden = Linear(features, head_features, axes=("embed", "mlp"), use_bias=True, **types)
        self.output = Linear(head_features, 1, axes=("mlp", None), use_bias=True, **types)
        self.dropout = dropout

    def __call__(
        self,
        categorical: Array | None,
        numerical: Array | None,
        *,
        where: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Scores the members of lists.

        Args:
          categorical: integer `[lists, members, categorical features]`, or None.
          numerical: `[lists, members, numerical features]`, or None.
          where: boolean `[lists, members]`: the members that exist. The others may hold anything.
          key: random key for dropout; None drops nothing.

        Returns:
          Scores `[lists, members]` in (-1, 1); 0 for members that do not exist.
        """
        keys = _split(key, len(self.blocks) + 2)
        if where is not None:
            categorical, numerical = (
                None if x is None else jnp.where(where[..., None], x, 0)
                for x in (categorical, numerical)
            )
        x = self.embedder(categorical, numerical, key=keys[0])
        for block, block_key in zip(self.blocks, keys[1:]):
            x = block(x, where=where, key=block_key)
        hidden = _drop(jax.nn.relu(self.hidden(x)), self.dropout, keys[-1])
        scores = jnp.tanh(self.output(hidden)[..., 0])
        return scores if where is None else jnp.where(where, scores, 0)


class _Block(nnx.Module):
    """Attention and MLP, each behind a norm: x ← x + attention(norm(x)), x ← x + mlp(norm(x))."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_features: int,
        *,
        attention: dict[str, Any],
        gated: bool = False,
        attention_dropout: float,
        hidden_dropout: float,
        output_dropout: float = 0.0,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_interval(0, 1, closed="left", dropout=hidden_dropout)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm, self.mlp_norm = (
            Norm(_norm, features, axes=("embed",), param_dtype=param_dtype) for _ in range(2)
        )
        self.attention = MultiHeadAttention(features, num_heads, **attention, **types)
        self.mlp = MLP(
            features, mlp_features, activation=_gelu, gated=gated, use_bias=True, **types
        )
        self.attention_dropout = attention_dropout
        self.hidden_dropout, self.output_dropout = hidden_dropout, output_dropout

    def __call__(self, x: Array, *, where: Array | None = None, key: Array | None = None) -> Array:
        """`x [batch, length, features]` after the block; `where [batch, length]` may be seen."""
        keys = _split(key, 4)
        attended = self._attend(self.attention_norm(x), where, keys[0])
        x = x + _drop(attended, self.output_dropout, keys[1])
        y = self.mlp_norm(x)
        if self.mlp.gate is None:
            hidden = self.mlp.activation(self.mlp.up(y))
        else:
            hidden = self.mlp.activation(self.mlp.gate(y)) * self.mlp.up(y)
        y = self.mlp.down(_drop(hidden, self.hidden_dropout, keys[2]))
        return x + _drop(y, self.output_dropout, keys[3])

    def _attend(self, x: Array, where: Array | None, key: Array | None) -> Array:
        mask = None if where is None else where[:, None, None, :]
        if key is None or self.attention_dropout == 0:
            return self.attention(x, mask=mask)
        query, (keys, values) = self.attention.query(x), self.attention.remember(x)
        weights = attention_probabilities(query, keys, mask=mask)
        weights = _drop(weights, self.attention_dropout, key)
        return self.attention.output(jnp.einsum("bhqk,bkhd->bqhd", weights, values))


def _split(key: Array | None, count: int) -> list[Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _drop(x: Array, rate: float, key: Array | None) -> Array:
    """Entries at 0 with probability `rate`, and the others enlarged so that the mean stays."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
