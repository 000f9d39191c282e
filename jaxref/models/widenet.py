"""WideNet: one block of attention and experts, run many times with norms of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.core.checks import check_interval
from jaxref.models.vision import (
    check_image_config,
    check_images,
    dropout,
    logits_dtype,
    split_keys,
)
from jaxref.models.vit import PatchEmbedding, prepend, token_parameter
from jaxref.nn import Linear, MixtureOfExperts, MultiHeadAttention, Norm
from jaxref.norms import layer_norm
from jaxref.parallel import constrain


class WideNetEncoder(nnx.Module):
    r"""Blocks that share attention, experts and router, and have nothing of their own but norms.

        x ← x + attention(norm_{l,1}(x)),   x ← x + moe(norm_{l,2}(x)),   l = 1 ... L

    The experts make up for what sharing takes away.
    With norms of their own the blocks see the tokens differently, and route them differently.

    Args:
      features: size of a token.
      num_layers: L, how often the block is run.
      num_heads: heads of the attention.
      mlp_features: hidden units of an expert.
      num_experts: E. Default 4.
      top_k: K in [1, E], experts per token. Default 2.
      capacity_factor: above 0, as for `MixtureOfExperts`. Default 1.2.
      noise_std: at least 0, of the router's noise. Default 1 / E.
      balance_coefficient: weight of the balance loss, at least 0. Default 0.01.
      dropout: rate in [0, 1) on what attention and experts give. Default 0.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      attention: the `MultiHeadAttention`.
      moe: the `MixtureOfExperts`. After a call in training its `auxiliary_loss` is the mean over
        the blocks' routings.

    Raises:
      ValueError: a value out of its range, or heads that do not divide the features.

    Use it as the token stack without embedding or head: behind a table of words it is the paper's
    language model. `WideNet` is the image classifier.

    Cost: the parameters of one block and 4 · features a layer, at the work of L blocks; in training
    a dispatch to the experts that grows with the square of the batch's tokens.

    Example:
      >>> tokens = jnp.ones((1, 5, 64))
      >>> nnx.eval_shape(lambda: WideNetEncoder(64, 12, 2, 128, rngs=nnx.Rngs(0))(tokens)).shape
      (1, 5, 64)

    Reference: Xue, Shi, Wei, Lou, Liu, You, "Go Wider Instead of Deeper", 2021, arXiv:2107.11817.
    """

    def __init__(
        self,
        features: int,
        num_layers: int,
        num_heads: int,
        mlp_features: int,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        capacity_factor: float = 1.2,
        noise_std: float | None = None,
        balance_coefficient: float = 0.01,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, num_layers=num_layers)
        check_interval(0, 1, closed="left", dropout=dropout)
        types: dict[str, Any] = {
            "kernel_init": jax.nn.initializers.xavier_uniform(),
            "use_bias": True,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.attention = MultiHeadAttention(features, num_heads, **types)
        self.moe = MixtureOfExperts(
            features,
            mlp_features,
            num_experts=num_experts,
            top_k=top_k,
            capacity_factor=capacity_factor,
            noise_std=noise_std,
            balance_coefficient=balance_coefficient,
            **types,
        )

        def norms() -> nnx.List:
            return nnx.List(
                Norm(layer_norm, features, axes=("embed",), param_dtype=param_dtype)
                for _ in range(num_layers)
            )

        self.attention_norms, self.moe_norms = norms(), norms()
        self.dropout = dropout

    def __call__(self, x: Array, *, key: Array | None = None, where: Array | None = None) -> Array:
        """Maps `[batch, length, features]` to the same.

        Args:
          x: the tokens.
          key: random key of the router's noise and of dropout; None (evaluation) has neither.
          where: boolean `[batch, length]`: the tokens that others may see.
        """
        mask = None if where is None else where[:, None, None, :]
        losses = []
        block_keys = split_keys(key, len(self.moe_norms))
        for *norms, block_key in zip(self.attention_norms, self.moe_norms, block_keys):
            keys = split_keys(block_key, 3)
            y = self.attention(norms[0](x), mask=mask)
            x = constrain(x + dropout(y, self.dropout, keys[0]), "batch", None, None)
            y = self.moe(norms[1](x), key=keys[1])
            x = constrain(x + dropout(y, self.dropout, keys[2]), "batch", None, None)
            losses.append(self.moe.auxiliary_loss[...])
        if not self.moe.deterministic:
            self.moe.auxiliary_loss[...] = sum(losses) / len(losses)
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideNetConfig:
    """What a `WideNet` is made of; `build` makes it. The defaults are WideNet-B on patches of 16.

    Attributes:
      num_classes: number of classes.
      image_shape: `(height, width, channels)`.
      patch_size: side of a patch, a divisor of height and width.
      num_layers, features, num_heads, mlp_features, num_experts, top_k, capacity_factor, noise_std,
        balance_coefficient: as for `WideNetEncoder`.
      dropout: rate in [0, 1), where a key is given: on the embedded patches, and on what attention
        and experts give.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1 or a rate out of range.

    Use more `num_experts` to make up for what blocks share; `top_k` says how many of them work on a
    token, `balance_coefficient` how evenly tokens spread.

    Cost: at the defaults for 1000 classes 22.8 million parameters; in evaluation, where all experts
    see all tokens, 51 billion multiplications an image.

    Example:
      >>> config = WideNetConfig(num_classes=1000)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      22805224

    Reference: Xue, Shi, Wei, Lou, Liu, You, "Go Wider Instead of Deeper", 2021, arXiv:2107.11817.
    """

    num_classes: int
    image_shape: tuple[int, int, int] = (224, 224, 3)
    patch_size: int = 16
    num_layers: int = 12
    features: int = 768
    num_heads: int = 12
    mlp_features: int = 3072
    num_experts: int = 4
    top_k: int = 2
    capacity_factor: float = 1.2
    noise_std: float | None = None
    balance_coefficient: float = 0.01
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "WideNet":
        """The model of this configuration."""
        return WideNet(self, rngs=rngs)

    def __post_init__(self):
        check_image_config(self, rates=("dropout",))
        for name in ("num_layers", "features", "num_heads", "mlp_features"):
            check_interval(1, jnp.inf, **{name: getattr(self, name)})


class WideNet(nnx.Module):
    """An image classifier: patches and a class token through a `WideNetEncoder`.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: a patch size that does not divide the image, heads that do not divide the
        features, or `top_k` above the number of experts.

    Use it in place of `VisionTransformer` where parameters are dear: at its depth and width,
    WideNet-B has a quarter of ViT-B's.

    Cost: 22.8 million parameters at the defaults; in training top_k · capacity_factor times the
    work of a `VisionTransformer`'s MLPs, in evaluation num_experts times.

    `train()` and `eval()` say whether experts have limited room and the balance loss is stored; see
    `jaxref.nn.AuxiliaryLoss`.

    Example:
      >>> config, images = WideNetConfig(num_classes=10), jnp.ones((2, 224, 224, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: Xue, Shi, Wei, Lou, Liu, You, "Go Wider Instead of Deeper", 2021, arXiv:2107.11817.
    """

    Config = WideNetConfig

    def __init__(self, config: WideNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        features, param_dtype = config.features, config.param_dtype
        types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": param_dtype, "rngs": rngs}
        inits = jax.nn.initializers
        self.patches = PatchEmbedding(config.image_shape, config.patch_size, features, **types)
        self.class_token = token_parameter(1, features, param_dtype, inits.zeros, rngs)
        self.positions = token_parameter(
            self.patches.num_tokens + 1, features, param_dtype, inits.normal(0.02), rngs
        )
        self.encoder = WideNetEncoder(
            features,
            config.num_layers,
            config.num_heads,
            config.mlp_features,
            num_experts=config.num_experts,
            top_k=config.top_k,
            capacity_factor=config.capacity_factor,
            noise_std=config.noise_std,
            balance_coefficient=config.balance_coefficient,
            dropout=config.dropout,
            **types,
        )
        self.final_norm = Norm(layer_norm, features, axes=("embed",), param_dtype=param_dtype)
        self.head = Linear(
            features,
            config.num_classes,
            axes=("embed", None),
            use_bias=True,
            kernel_init=inits.zeros,
            dtype=logits_dtype(config),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, images: Array, *, key: Array | None = None) -> Array:
        """Logits `[batch, num_classes]`, in at least float32.

        Args:
          images: floating point `[batch, *image_shape]`.
          key: random key for dropout and the router's noise; None (evaluation) has neither.

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating point.
        """
        check_images(images, self.config.image_shape)
        first, key = split_keys(key, 2)
        x = prepend(self.class_token[...], self.patches(images))
        x = dropout(x + self.positions[...].astype(x.dtype), self.config.dropout, first)
        x = self.encoder(x, key=key)
        return self.head(self.final_norm(x[:, 0]).astype(self.head.dtype))
