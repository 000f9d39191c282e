"""Residual networks without normalization of activations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike

from jaxref.core.checks import check_interval
from jaxref.models.resnet import STAGES, check_stages, classifier_head, pool_pixels
from jaxref.models.vision import (
    check_image_config,
    check_images,
    dropout,
    split_keys,
    stochastic_depth,
)
from jaxref.nn import ScaledWeightStandardizedConv
from jaxref.norms import ResidualScale, nf_residual_scales, nonlinearity_gain
from jaxref.parallel import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFResNetConfig:
    """What an `NFResNet` is made of; `build` makes it. The defaults are NF-ResNet-50.

    Attributes:
      num_classes: number of classes.
      image_shape: `(height, width, channels)`.
      depth: 50, 101 or 152; of bottleneck blocks.
      stages: blocks of each stage. Default: those of the depth. The first block of each stage but
        the first halves the image.
      width: channels inside of the first stage's blocks, and of the stem. Default 64.
      stem: "imagenet", a 7 x 7 convolution and a max pooling of stride 2 each; or "small", a 3 x 3
        convolution of stride 1.
      alpha: α > 0, by which a block may change the stream. Default 0.2.
      activation: the name of a function of `jax.nn` that `jaxref.norms.nonlinearity_gain` knows.
      dropout: rate in [0, 1) on the pooled features, where a key is given. Default 0.25.
      stochastic_depth: rate in [0, 1); block i of n is dropped at i / n of it. Default 0.1.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: an unknown depth, stem or activation, a size below 1, or a rate out of range.

    Use `stem="small"` for images of few pixels, as CIFAR's, and `stochastic_depth` and `dropout`
    against what normalization no longer regularizes; `ResNetConfig` has norms.

    Cost: at the defaults for 1000 classes 25.6 million parameters and 4.1 billion multiplications
    an image.

    Example:
      >>> config = NFResNetConfig(num_classes=1000)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      25556984

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692; SkipInit after De, Smith, "Batch Normalization
    Biases Residual Blocks Towards the Identity Function in Deep Networks", 2020, arXiv:2002.10444.
    """

    num_classes: int
    image_shape: tuple[int, int, int] = (224, 224, 3)
    depth: int = 50
    stages: tuple[int, ...] | None = None
    width: int = 64
    stem: str = "imagenet"
    alpha: float = 0.2
    activation: str = "relu"
    dropout: float = 0.25
    stochastic_depth: float = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "NFResNet":
        """The model of this configuration."""
        return NFResNet(self, rngs=rngs)

    def __post_init__(self):
        check_image_config(self, rates=("dropout", "stochastic_depth"))
        check_interval(1, jnp.inf, width=self.width)
        check_interval(0, jnp.inf, closed="neither", alpha=self.alpha)
        check_stages(self.depth, self.stages)
        if self.depth < 50:
            raise ValueError(f"depth must be that of bottleneck blocks, got {self.depth}")
        nonlinearity_gain(self.activation)
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be 'imagenet' or 'small', got {self.stem!r}")


class NFResNet(nnx.Module):
    r"""An image classifier of residual blocks that keep their variance without any norm.

        x ← shortcut + α s f(a),   a = γ act(x) / β

    with f three convolutions of scaled weight standardization (1 x 1, 3 x 3 with the stride, 1 x 1)
    and γ act between them, γ the `nonlinearity_gain`; α and β the constants of
    `nf_residual_scales`; and s the learned scalar of SkipInit, initially 0. The shortcut is x, or a
    1 x 1 convolution of a where the shape changes.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: when called, images of another shape.

    Use it, with `jaxref.optimizers.adaptive_gradient_clip` at large rates, where batch statistics
    hurt: small batches, contrastive losses, federated clients. `ResNet` has norms.

    Cost: that of a `ResNet` of its depth, with each kernel standardised at every call in place of
    norms and their state.

    An example does not see its batch, in training or evaluation. An example that stochastic depth
    leaves in is not scaled up, as in the authors' code.

    Example:
      >>> config, images = NFResNetConfig(num_classes=10), jnp.ones((2, 224, 224, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692; SkipInit after De, Smith, "Batch Normalization
    Biases Residual Blocks Towards the Identity Function in Deep Networks", 2020, arXiv:2002.10444.
    """

    Config = NFResNetConfig

    def __init__(self, config: NFResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        small = config.stem == "small"
        self.stem = _conv(
            config,
            config.image_shape[2],
            config.width,
            3 if small else 7,
            strides=1 if small else 2,
            use_bias=False,
            rngs=rngs,
        )
        stages = config.stages or STAGES[config.depth]
        scales = nf_residual_scales(stages, config.alpha)
        blocks: list[_Block] = []
        inputs = config.width
        for stage, count in enumerate(stages):
            outputs = 4 * config.width * 2**stage
            for block in range(count):
                blocks.append(
                    _Block(
                        config,
                        inputs,
                        outputs,
                        strides=2 if stage > 0 and block == 0 else 1,
                        scale=scales[len(blocks)],
                        rate=config.stochastic_depth * len(blocks) / sum(stages),
                        rngs=rngs,
                    )
                )
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = classifier_head(config, inputs, rngs)

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
        last, *keys = split_keys(key, len(self.blocks) + 1)
        x = self.stem(images)
        if self.config.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for block, block_key in zip(self.blocks, keys):
            x = block(x, block_key)
        x = pool_pixels(_activated(self.config, x))
        return self.head(dropout(x, self.config.dropout, last))


class _Block(nnx.Module):
    """One residual block.

    Attributes:
      shortcut: the convolution of the shortcut; None for the identity.
      skip_gain: SkipInit's scalar.
    """

    def __init__(
        self,
        config: NFResNetConfig,
        in_features: int,
        features: int,
        *,
        strides: int,
        scale: ResidualScale,
        rate: float,
        rngs: nnx.Rngs,
    ):
        width = features // 4
        self.config, self.scale, self.rate = config, scale, rate
        self.shortcut = (
            _conv(config, in_features, features, 1, strides=strides, rngs=rngs)
            if strides > 1 or in_features != features
            else None
        )
        self.convs = nnx.List(
            [
                _conv(config, in_features, width, 1, rngs=rngs),
                _conv(config, width, width, 3, strides=strides, rngs=rngs),
                _conv(config, width, features, 1, rngs=rngs),
            ]
        )
        self.skip_gain = nnx.Param(jnp.zeros((), config.param_dtype), axes=())

    def __call__(self, x: Array, key: Array | None) -> Array:
        y = self.branch(x)
        y = stochastic_depth(y, self.rate, key, rescale=False)
        y = y * (self.scale.alpha * self.skip_gain[...]).astype(y.dtype)
        return constrain(self.skip(x) + y, "batch", None, None, None)

    def branch(self, x: Array) -> Array:
        """f, which at initial weights keeps the variance."""
        y = self._input(x)
        for i, conv in enumerate(self.convs):
            y = conv(y if i == 0 else _activated(self.config, y))
        return y

    def skip(self, x: Array) -> Array:
        """What the branch is added to."""
        return x if self.shortcut is None else self.shortcut(self._input(x))

    def _input(self, x: Array) -> Array:
        return _activated(self.config, x) / self.scale.beta


def _activated(config: NFResNetConfig, x: Array) -> Array:
    return getattr(jax.nn, config.activation)(x) * nonlinearity_gain(config.activation)


def _conv(
    config: NFResNetConfig,
    in_features: int,
    features: int,
    size: int,
    *,
    strides: int = 1,
    use_bias: bool = True,
    rngs: nnx.Rngs,
) -> Any:
    return ScaledWeightStandardizedConv(
        in_features,
        features,
        (size, size),
        strides=strides,
        use_bias=use_bias,
        kernel_init=variance_scaling(1, "fan_in", "normal"),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
