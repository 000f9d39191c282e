"""The vision transformer: an image as a sequence of patches, and the encoder that others share."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.attention import attention_probabilities
from jaxref.core.checks import check_interval
from jaxref.models.vision import (
    check_image_config,
    check_images,
    dropout,
    logits_dtype,
    split_keys,
    stochastic_depth,
)
from jaxref.nn import MLP, Linear, MultiHeadAttention, Norm
from jaxref.norms import layer_norm
from jaxref.parallel import constrain


class PatchEmbedding(nnx.Module):
    """An image cut into squares, each mapped linearly to a token.

    Args:
      image_shape: `(height, width, channels)`.
      patch_size: side of a square, a divisor of height and width.
      features: size of a token.
      kernel_init: initializer of the map.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      num_tokens: how many squares there are.

    Raises:
      ValueError: a patch size that does not divide the image.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        patch_size: int,
        features: int,
        *,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        check_interval(1, jnp.inf, patch_size=patch_size)
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size must divide the image of {height} x {width}, got {patch_size}"
            )
        self.patch_size = patch_size
        self.num_tokens = (height // patch_size) * (width // patch_size)
        self.project = Linear(
            patch_size * patch_size * channels,
            features,
            axes=(None, "embed"),
            use_bias=True,
            kernel_init=kernel_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, images: Array) -> Array:
        """Maps `[batch, height, width, channels]` to `[batch, num_tokens, features]`, in reading
        order."""
        batch, height, width, channels = images.shape
        size = self.patch_size
        x = images.reshape(batch, height // size, size, width // size, size, channels)
        return self.project(x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, self.num_tokens, -1))


class EncoderBlock(nnx.Module):
    """Attention and MLP around a stream of tokens, with norms before them and dropout.

        x ← x + drop(attention(norm(x))),   x ← x + drop(mlp(norm(x)))

    or, where the second norm replaces the stream, `x ← norm(x)`, `x ← x + drop(mlp(x))`.

    Args:
      features: size of a token.
      num_heads: heads, a divisor of `features`.
      mlp_features: hidden units of the MLP.
      norm: a norm of `jaxref.norms`.
      activation: of the MLP.
      query_bias: biases in the maps to query, key and value; the others have theirs in any case.
      norm_replaces_stream: the second form.
      dropout: rate of what attention and MLP give, and of the hidden units.
      attention_dropout: rate of the attention's weights.
      stochastic_depth: rate at which an example skips attention or MLP.
      kernel_init: initializer of all linear maps.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_features: int,
        *,
        norm: Callable[..., Any] = layer_norm,
        activation: Callable[..., Any] = jax.nn.gelu,
        query_bias: bool = True,
        norm_replaces_stream: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        kernel_init: Initializer,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {
            "kernel_init": kernel_init,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.attention_norm = Norm(norm, features, axes=("embed",), param_dtype=param_dtype)
        self.attention = MultiHeadAttention(
            features, num_heads, linear=partial(_project, query_bias=query_bias), **types
        )
        self.mlp_norm = Norm(norm, features, axes=("embed",), param_dtype=param_dtype)
        self.mlp = MLP(features, mlp_features, activation=activation, use_bias=True, **types)
        self.norm_replaces_stream = norm_replaces_stream
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.stochastic_depth = stochastic_depth

    def __call__(self, x: Array, *, key: Array | None = None, where: Array | None = None) -> Array:
        """`x [batch, length, features]` after the block; `where [batch, length]` are the tokens
        that others may see."""
        keys = split_keys(key, 6)
        x = self._add(x, self._attend(self.attention_norm(x), keys[0], where), keys[1:3])
        y = self.mlp_norm(x)
        if self.norm_replaces_stream:
            x = y
        hidden = self.mlp.activation(self.mlp.up(y))
        return self._add(x, self.mlp.down(dropout(hidden, self.dropout, keys[3])), keys[4:])

    def _attend(self, x: Array, key: Array | None, where: Array | None) -> Array:
        mask = None if where is None else where[:, None, None, :]
        if key is None or self.attention_dropout == 0:
            return self.attention(x, mask=mask)
        query, (keys, values) = self.attention.query(x), self.attention.remember(x)
        weights = attention_probabilities(query, keys, mask=mask)
        weights = dropout(weights, self.attention_dropout, key)
        return self.attention.output(jnp.einsum("bhqk,bkhd->bqhd", weights, values))

    def _add(self, x: Array, branch: Array, keys: Sequence[Array | None]) -> Array:
        branch = dropout(branch, self.dropout, keys[0])
        x = x + stochastic_depth(branch, self.stochastic_depth, keys[1])
        return constrain(x, "batch", None, None)


def _project(inputs: Any, outputs: Any, *, query_bias: bool, **options: Any) -> Linear:
    """A map to heads, or from them."""
    return Linear(inputs, outputs, use_bias=query_bias or isinstance(outputs, int), **options)


def depth_rates(last: float, num_layers: int) -> list[float]:
    """Rates of stochastic depth that grow linearly from 0 in the first layer.

    >>> depth_rates(0.1, 3)
    [0.0, 0.05, 0.1]
    """
    return [last * i / max(num_layers - 1, 1) for i in range(num_layers)]


def token_parameter(
    tokens: int, features: int, param_dtype: DTypeLike, init: Initializer, rngs: nnx.Rngs
) -> nnx.Param:
    """Vectors to add to tokens, or to put among them: `[tokens, features]`."""
    return nnx.Param(init(rngs.params(), (tokens, features), param_dtype), axes=(None, "embed"))


def prepend(token: Array, x: Array) -> Array:
    """`x [batch, length, features]` with the token `[1, features]` in front."""
    first = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    return jnp.concatenate([first, x], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """What a `VisionTransformer` is made of; `build` makes it. The defaults are ViT-B/16.

    Attributes:
      num_classes: number of classes.
      image_shape: `(height, width, channels)`.
      patch_size: side of a patch, a divisor of height and width.
      num_layers, features, num_heads, mlp_features: depth, width, heads, hidden units.
      pool: "class", the token that was put in front for it; or "mean" of the patches, without one.
      activation: of the MLP. GELU in the tanh form, as in the authors' code; PyTorch's models have
        `functools.partial(jax.nn.gelu, approximate=False)`.
      dropout: rate in [0, 1), where a key is given: on the embedded patches, on what attention and
        MLP give, and on the MLP's hidden units.
      stochastic_depth: rate in [0, 1) in the last layer, growing linearly from 0.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1, a rate out of range, or an unknown `pool`.

    Use a `patch_size` of 32 for a quarter of the tokens and of the work; `pool="mean"` does without
    a class token.

    Cost: at the defaults for 1000 classes 86.6 million parameters and 17.6 billion multiplications
    an image.

    Example:
      >>> config = VisionTransformerConfig(num_classes=1000)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      86567656

    Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
    Recognition at Scale", 2020, arXiv:2010.11929.
    """

    num_classes: int
    image_shape: tuple[int, int, int] = (224, 224, 3)
    patch_size: int = 16
    num_layers: int = 12
    features: int = 768
    num_heads: int = 12
    mlp_features: int = 3072
    pool: str = "class"
    activation: Callable[..., Any] = jax.nn.gelu
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "VisionTransformer":
        """The model of this configuration."""
        return VisionTransformer(self, rngs=rngs)

    def __post_init__(self):
        check_image_config(self, rates=("dropout", "stochastic_depth"))
        for name in ("num_layers", "features", "num_heads", "mlp_features"):
            check_interval(1, jnp.inf, **{name: getattr(self, name)})
        if self.pool not in ("class", "mean"):
            raise ValueError(f"pool must be 'class' or 'mean', got {self.pool!r}")


class VisionTransformer(nnx.Module):
    """An image classifier: embed patches, add positions, `num_layers` pre-norm blocks, pool.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: a patch size that does not divide the image, or heads that do not divide the
        features.

    Use it where there is much data, or a trained model to start from;
    `CompactConvolutionalTransformer` learns from some ten thousand images, `WideNet` has fewer
    parameters.

    Cost: num_layers · (4 · features² + 2 · features · mlp_features) parameters, as many
    multiplications a token, and attention over all pairs of tokens.

    The head starts at 0.

    Example:
      >>> config = VisionTransformerConfig(num_classes=10, patch_size=32)
      >>> images = jnp.ones((2, 224, 224, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
    Recognition at Scale", 2020, arXiv:2010.11929.
    """

    Config = VisionTransformerConfig

    def __init__(self, config: VisionTransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        features, param_dtype = config.features, config.param_dtype
        types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patches = PatchEmbedding(config.image_shape, config.patch_size, features, **types)
        tokens = self.patches.num_tokens
        has_class_token = config.pool == "class"
        self.class_token = (
            token_parameter(1, features, param_dtype, jax.nn.initializers.zeros, rngs)
            if has_class_token
            else None
        )
        self.positions = token_parameter(
            tokens + has_class_token,
            features,
            param_dtype,
            jax.nn.initializers.normal(0.02),
            rngs,
        )
        self.blocks = nnx.List(
            EncoderBlock(
                features,
                config.num_heads,
                config.mlp_features,
                activation=config.activation,
                dropout=config.dropout,
                stochastic_depth=rate,
                kernel_init=jax.nn.initializers.xavier_uniform(),
                **types,
            )
            for rate in depth_rates(config.stochastic_depth, config.num_layers)
        )
        self.final_norm = Norm(layer_norm, features, axes=("embed",), param_dtype=param_dtype)
        self.head = Linear(
            features,
            config.num_classes,
            axes=("embed", None),
            use_bias=True,
            kernel_init=jax.nn.initializers.zeros,
            dtype=logits_dtype(config),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, images: Array, *, key: Array | None = None) -> Array:
        """Logits `[batch, num_classes]`, in at least float32.

        Args:
          images: floating point `[batch, *image_shape]`.
          key: random key for dropout and stochastic depth; None (evaluation) drops nothing.

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating point.
        """
        check_images(images, self.config.image_shape)
        first, *keys = split_keys(key, len(self.blocks) + 1)
        x = self.patches(images)
        if self.class_token is not None:
            x = prepend(self.class_token[...], x)
        x = dropout(x + self.positions[...].astype(x.dtype), self.config.dropout, first)
        for block, block_key in zip(self.blocks, keys):
            x = block(x, key=block_key)
        x = self.final_norm(x).astype(self.head.dtype)
        return self.head(x.mean(axis=1) if self.class_token is None else x[:, 0])
