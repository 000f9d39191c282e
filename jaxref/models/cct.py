"""Compact transformers for small image collections: SeqPool behind tokens of convolutions."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import truncated_normal, zeros
from jax.typing import DTypeLike

from jaxref.attention import sequence_pooling, sinusoidal_position_embedding
from jaxref.core.checks import check_interval
from jaxref.models.tokenizers import HE_NORMAL, ConvTokenizer
from jaxref.models.vision import (
    check_image_config,
    check_images,
    dropout,
    logits_dtype,
    split_keys,
)
from jaxref.models.vit import (
    EncoderBlock,
    PatchEmbedding,
    depth_rates,
    prepend,
    token_parameter,
)
from jaxref.nn import Linear, Norm
from jaxref.norms import layer_norm

_norm = partial(layer_norm, epsilon=1e-5)
_gelu = partial(jax.nn.gelu, approximate=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactEncoderConfig:
    """What the compact transformers have in common.

    Attributes:
      num_classes: number of classes.
      num_layers, features, num_heads: depth, width, heads. Defaults 7, 256, 4.
      mlp_ratio: hidden units of the MLP, in multiples of `features`. Default 2.
      positions: what is added to the tokens: "learned" (default), "sinusoidal" or None.
      dropout: rate in [0, 1), where a key is given: on the tokens, on what attention and MLP give,
        and on the MLP's hidden units. Default 0.
      attention_dropout: rate in [0, 1) on the attention's weights. Default 0.1.
      stochastic_depth: rate in [0, 1) in the last layer, growing linearly from 0. Default 0.1.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1, a rate out of range, or unknown `positions`.
    """

    num_classes: int
    num_layers: int = 7
    features: int = 256
    num_heads: int = 4
    mlp_ratio: float = 2.0
    positions: str | None = "learned"
    dropout: float = 0.0
    attention_dropout: float = 0.1
    stochastic_depth: float = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        for name in ("num_classes", "num_layers", "features", "num_heads"):
            check_interval(1, jnp.inf, **{name: getattr(self, name)})
        check_interval(0, jnp.inf, closed="neither", mlp_ratio=self.mlp_ratio)
        for name in ("dropout", "attention_dropout", "stochastic_depth"):
            check_interval(0, 1, closed="left", **{name: getattr(self, name)})
        if self.positions not in ("learned", "sinusoidal", None):
            raise ValueError(
                f"positions must be 'learned', 'sinusoidal' or None, got {self.positions!r}"
            )


class CompactEncoder(nnx.Module):
    """The encoder of compact transformers, from tokens to logits.

    A block's second norm replaces the stream that it reads from:

        x ← x + drop(attention(norm(x))),   x ← norm(x),   x ← x + drop(mlp(x))

    Args:
      config: its parts and sizes.
      num_tokens: the length of the sequences.
      class_token: read a token that is put in front, instead of `sequence_pooling`.
      rngs: source of the `params` key.

    Raises:
      ValueError: heads that do not divide the features, or sequences of another length where
        positions are added.

    Use it behind a tokenizer of your own, such as `TextTokenizer`;
    `CompactConvolutionalTransformer`, `CompactVisionTransformer` and `ViTLite` have it behind those
    of images.

    Cost: num_layers · (4 + 2 · mlp_ratio) · features² parameters, as many multiplications a token,
    and attention over all pairs of tokens.

    Example:
      >>> config = CompactEncoderConfig(num_classes=2, features=128)
      >>> tokens = jnp.ones((3, 5, 128))
      >>> nnx.eval_shape(lambda: CompactEncoder(config, 5, rngs=nnx.Rngs(0))(tokens)).shape
      (3, 2)

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    def __init__(
        self,
        config: CompactEncoderConfig,
        num_tokens: int,
        *,
        class_token: bool = False,
        rngs: nnx.Rngs,
    ):
        features, param_dtype = config.features, config.param_dtype
        small = truncated_normal(0.02)
        self.config = config
        self.num_tokens = num_tokens + class_token
        self.class_token = (
            token_parameter(1, features, param_dtype, zeros, rngs) if class_token else None
        )
        self.positions = (
            token_parameter(self.num_tokens, features, param_dtype, truncated_normal(0.2), rngs)
            if config.positions == "learned"
            else None
        )
        self.blocks = nnx.List(
            EncoderBlock(
                features,
                config.num_heads,
                int(features * config.mlp_ratio),
                norm=_norm,
                activation=_gelu,
                query_bias=False,
                norm_replaces_stream=True,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                stochastic_depth=rate,
                kernel_init=small,
                dtype=config.dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for rate in depth_rates(config.stochastic_depth, config.num_layers)
        )
        self.final_norm = Norm(_norm, features, axes=("embed",), param_dtype=param_dtype)

        pooled = not class_token
        self.pool_kernel = (
            nnx.Param(small(rngs.params(), (features,), param_dtype), axes=("embed",))
            if pooled
            else None
        )
        self.pool_bias = nnx.Param(jnp.zeros((), param_dtype), axes=()) if pooled else None
        self.head = Linear(
            features,
            config.num_classes,
            axes=("embed", None),
            use_bias=True,
            kernel_init=small,
            dtype=logits_dtype(config),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, tokens: Array, *, key: Array | None = None, where: Array | None = None
    ) -> Array:
        """Logits `[batch, num_classes]`, in at least float32.

        Args:
          tokens: `[batch, num_tokens, features]`.
          key: random key for what drops; None (evaluation) drops nothing.
          where: boolean `[batch, num_tokens]`: the tokens that exist.
        """
        first, *keys = split_keys(key, len(self.blocks) + 1)
        x = tokens
        if self.class_token is not None:
            x = prepend(self.class_token[...], x)
            if where is not None:
                where = jnp.concatenate([jnp.ones_like(where[:, :1]), where], axis=1)
        positions = self._positions()
        if positions is not None:
            if x.shape[1] != self.num_tokens:
                raise ValueError(
                    f"tokens must be {self.num_tokens} with the class token where there is one, "
                    f"got {x.shape[1]}"
                )
            x = x + positions.astype(x.dtype)
        x = dropout(x, self.config.dropout, first)
        for block, block_key in zip(self.blocks, keys):
            x = block(x, key=block_key, where=where)
        x = self.final_norm(x).astype(self.head.dtype)
        if self.pool_kernel is None or self.pool_bias is None:
            return self.head(x[:, 0])
        kernel, bias = self.pool_kernel[...], self.pool_bias[...]
        return self.head(sequence_pooling(x, kernel, bias, where=where))

    def _positions(self) -> Array | None:
        if self.config.positions == "sinusoidal":
            return sinusoidal_position_embedding(self.num_tokens, self.config.features)
        return None if self.positions is None else self.positions[...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactConvolutionalTransformerConfig(CompactEncoderConfig):
    """What a `CompactConvolutionalTransformer` is made of; `build` makes it.

    Attributes:
      image_shape: `(height, width, channels)`. Default (32, 32, 3).
      kernel_size, conv_layers: of the `ConvTokenizer`. Defaults 3 and 1.
      conv_strides, conv_padding: of its convolutions. Defaults by `kernel_size`.
      Others: as in `CompactEncoderConfig`. The defaults are CCT-7/3x1.

    Raises:
      ValueError: what `CompactEncoderConfig` raises, or a size below 1.

    Use it with sizes of your own; `cct_2`, `cct_4`, `cct_6`, `cct_7` and `cct_14` are the paper's.
    More `conv_layers` leave fewer tokens.

    Cost: at the defaults for ten classes 3.8 million parameters and 1.2 billion multiplications an
    image.

    Example:
      >>> config = CompactConvolutionalTransformerConfig(num_classes=10)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      3760139

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    kernel_size: int = 3
    conv_layers: int = 1
    conv_strides: int | None = None
    conv_padding: int | None = None

    def build(self, *, rngs: nnx.Rngs) -> "CompactConvolutionalTransformer":
        """The model of this configuration."""
        return CompactConvolutionalTransformer(self, rngs=rngs)

    def __post_init__(self):
        super().__post_init__()
        check_image_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PatchConfig(CompactEncoderConfig):
    """A `CompactEncoderConfig` for images that are cut into patches."""

    image_shape: tuple[int, int, int] = (32, 32, 3)
    patch_size: int = 4

    def __post_init__(self):
        super().__post_init__()
        check_image_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactVisionTransformerConfig(_PatchConfig):
    """What a `CompactVisionTransformer` is made of; `build` makes it.

    Attributes:
      image_shape: `(height, width, channels)`. Default (32, 32, 3).
      patch_size: side of a patch, a divisor of height and width. Default 4.
      Others: as in `CompactEncoderConfig`.

    Raises:
      ValueError: what `CompactEncoderConfig` raises, or a size below 1.

    Use it for patches where `CompactConvolutionalTransformerConfig` has convolutions; half the
    `patch_size` makes four times the tokens.

    Cost: at the defaults for ten classes 3.7 million parameters and 250 million multiplications an
    image.

    Example:
      >>> config = CompactVisionTransformerConfig(num_classes=10)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      3716619

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    def build(self, *, rngs: nnx.Rngs) -> "CompactVisionTransformer":
        """The model of this configuration."""
        return CompactVisionTransformer(self, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTLiteConfig(_PatchConfig):
    """What a `ViTLite` is made of; `build` makes it.

    Attributes:
      image_shape: `(height, width, channels)`. Default (32, 32, 3).
      patch_size: side of a patch, a divisor of height and width. Default 4.
      Others: as in `CompactEncoderConfig`.

    Raises:
      ValueError: what `CompactEncoderConfig` raises, or a size below 1.

    Use it for a baseline with a class token; `CompactVisionTransformerConfig` has the same fields
    and pools the tokens.

    Cost: at the defaults for ten classes 3.7 million parameters and 254 million multiplications an
    image.

    Example:
      >>> config = ViTLiteConfig(num_classes=10)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      3716874

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    def build(self, *, rngs: nnx.Rngs) -> "ViTLite":
        """The model of this configuration."""
        return ViTLite(self, rngs=rngs)


class _CompactClassifier(nnx.Module):
    """A tokenizer of images and a `CompactEncoder`."""

    config: Any
    tokenizer: Any
    encoder: CompactEncoder

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
        return self.encoder(self.tokenizer(images), key=key)


class CompactConvolutionalTransformer(_CompactClassifier):
    """An image classifier (CCT): a `ConvTokenizer`, an encoder, and SeqPool.

    Args:
      config: its parts and sizes; `cct_7(3, 1, num_classes=10)` and the like are the paper's.
      rngs: source of the `params` key.

    Raises:
      ValueError: heads that do not divide the features, or an image too small for the convolutions.

    Use it to train a transformer from scratch on tens of thousands of small images;
    `VisionTransformer` wants many more, `ResNet` has no attention.

    Cost: 0.28 million parameters and 35 million multiplications an image of 32 x 32 pixels
    (`cct_2`) to 3.8 million and 1.2 billion (`cct_7`).

    Example:
      >>> config, images = cct_7(3, 1, num_classes=10), jnp.ones((2, 32, 32, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    Config = CompactConvolutionalTransformerConfig

    def __init__(self, config: CompactConvolutionalTransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        height, width, channels = config.image_shape
        self.tokenizer = ConvTokenizer(
            channels,
            config.features,
            kernel_size=config.kernel_size,
            num_layers=config.conv_layers,
            strides=config.conv_strides,
            padding=config.conv_padding,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        tokens = self.tokenizer.num_tokens(height, width)
        if tokens < 1:
            raise ValueError(
                f"image_shape {config.image_shape} is too small for kernel_size "
                f"{config.kernel_size}: no token is left"
            )
        self.encoder = CompactEncoder(config, tokens, rngs=rngs)


def _patches(config: _PatchConfig, rngs: nnx.Rngs) -> PatchEmbedding:
    return PatchEmbedding(
        config.image_shape,
        config.patch_size,
        config.features,
        kernel_init=HE_NORMAL,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


class CompactVisionTransformer(_CompactClassifier):
    """An image classifier (CVT): small patches, an encoder, and SeqPool.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: a patch size that does not divide the image, or heads that do not divide the
        features.

    Use it to tell what a class token and convolutions are worth: it stands between `ViTLite`, which
    has the one, and `CompactConvolutionalTransformer`, which has the others.

    Cost: at the defaults 3.7 million parameters and 250 million multiplications an image of 32 x 32
    pixels.

    Example:
      >>> config = CompactVisionTransformerConfig(num_classes=10)
      >>> images = jnp.ones((2, 32, 32, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    Config = CompactVisionTransformerConfig

    def __init__(self, config: CompactVisionTransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokenizer = _patches(config, rngs)
        self.encoder = CompactEncoder(config, self.tokenizer.num_tokens, rngs=rngs)


class ViTLite(_CompactClassifier):
    """An image classifier: small patches, a small encoder, and a class token.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: a patch size that does not divide the image, or heads that do not divide the
        features.

    Use it as the baseline of the compact transformers, `CompactVisionTransformer` and
    `CompactConvolutionalTransformer`; `VisionTransformer` is the original.

    Cost: at the defaults 3.7 million parameters and 254 million multiplications an image of 32 x 32
    pixels.

    Example:
      >>> config, images = ViTLiteConfig(num_classes=10), jnp.ones((2, 32, 32, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    Config = ViTLiteConfig

    def __init__(self, config: ViTLiteConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokenizer = _patches(config, rngs)
        self.encoder = CompactEncoder(
            config, self.tokenizer.num_tokens, class_token=True, rngs=rngs
        )


def _cct(kernel_size: int, conv_layers: int, options: dict[str, Any], *sizes: Any) -> Any:
    names = ("num_layers", "num_heads", "mlp_ratio", "features")
    given = dict(zip(names, sizes)) | {"kernel_size": kernel_size, "conv_layers": conv_layers}
    return CompactConvolutionalTransformerConfig(**(given | options))


def cct_2(
    kernel_size: int = 3, conv_layers: int = 2, **options: Any
) -> CompactConvolutionalTransformerConfig:
    """CCT-2/KxM: 2 layers of 128 features, 2 heads, as many hidden units.

    Args:
      kernel_size, conv_layers: K and M, of the tokenizer. Defaults 3 and 2.
      **options: further fields of the configuration, `num_classes` among them.

    Returns:
      The configuration. `cct_4`, `cct_6`, `cct_7` and `cct_14` are the paper's larger ones.

    Raises:
      ValueError: what `CompactConvolutionalTransformerConfig` raises.

    Use it for the smallest of the paper's models, or to try something out.

    Cost: no arrays; for ten classes 0.28 million parameters and 35 million multiplications an image
    of 32 x 32 pixels.

    Example:
      >>> cct_2(num_classes=10).conv_layers
      2

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """
    return _cct(kernel_size, conv_layers, options, 2, 2, 1.0, 128)


def cct_4(
    kernel_size: int = 3, conv_layers: int = 2, **options: Any
) -> CompactConvolutionalTransformerConfig:
    """CCT-4/KxM: as `cct_2`, with 4 layers.

    Args:
      kernel_size, conv_layers: K and M, of the tokenizer. Defaults 3 and 2.
      **options: further fields of the configuration, `num_classes` among them.

    Returns:
      The configuration.

    Raises:
      ValueError: what `CompactConvolutionalTransformerConfig` raises.

    Use it where `cct_2` is too weak and `cct_6` too dear.

    Cost: no arrays; for ten classes 0.48 million parameters and 50 million multiplications an image
    of 32 x 32 pixels.

    Example:
      >>> cct_4(num_classes=10).num_layers
      4

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """
    return _cct(kernel_size, conv_layers, options, 4, 2, 1.0, 128)


def cct_6(
    kernel_size: int = 3, conv_layers: int = 1, **options: Any
) -> CompactConvolutionalTransformerConfig:
    """CCT-6/KxM: as `cct_2`, with 6 layers of 256 features, 4 heads, twice the hidden units.

    Args:
      kernel_size, conv_layers: K and M, of the tokenizer. Defaults 3 and 1.
      **options: further fields of the configuration, `num_classes` among them.

    Returns:
      The configuration.

    Raises:
      ValueError: what `CompactConvolutionalTransformerConfig` raises.

    Use it in place of `cct_7` where a layer less is enough; two `conv_layers` make a quarter of the
    tokens.

    Cost: no arrays; for ten classes 3.2 million parameters and 1.0 billion multiplications an image
    of 32 x 32 pixels.

    Example:
      >>> cct_6(num_classes=10).features
      256

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """
    return _cct(kernel_size, conv_layers, options, 6, 4, 2.0, 256)


def cct_7(
    kernel_size: int = 3, conv_layers: int = 1, **options: Any
) -> CompactConvolutionalTransformerConfig:
    """CCT-7/KxM: as `cct_6`, with 7 layers.

    Args:
      kernel_size, conv_layers: K and M, of the tokenizer. Defaults 3 and 1.
      **options: further fields of the configuration, `num_classes` among them.

    Returns:
      The configuration.

    Raises:
      ValueError: what `CompactConvolutionalTransformerConfig` raises.

    Use it for the best of the paper's results on images of 32 x 32 pixels; `cct_14` is for larger
    ones.

    Cost: no arrays; for ten classes 3.8 million parameters and 1.2 billion multiplications an image
    of 32 x 32 pixels.

    Example:
      >>> cct_7(num_classes=10).num_layers
      7

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """
    return _cct(kernel_size, conv_layers, options, 7, 4, 2.0, 256)


def cct_14(
    kernel_size: int = 7, conv_layers: int = 2, **options: Any
) -> CompactConvolutionalTransformerConfig:
    """CCT-14/KxM: as `cct_2`, with 14 layers of 384 features, 6 heads, 3 times the hidden units.

    Args:
      kernel_size, conv_layers: K and M, of the tokenizer. Defaults 7 and 2.
      **options: further fields of the configuration, `num_classes` among them.

    Returns:
      The configuration.

    Raises:
      ValueError: what `CompactConvolutionalTransformerConfig` raises.

    Use it for images of 224 x 224 pixels, as the paper does; give it their `image_shape`. `cct_7`
    is for small ones.

    Cost: no arrays; for 1000 classes 22.4 million parameters and 5.5 billion multiplications an
    image of 224 x 224 pixels.

    Example:
      >>> cct_14(num_classes=1000, image_shape=(224, 224, 3)).features
      384

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """
    return _cct(kernel_size, conv_layers, options, 14, 6, 3.0, 384)
