"""Residual networks whose convolution and norm are chosen by their configuration."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import variance_scaling
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.models.vision import (
    check_image_config,
    check_images,
    dropout,
    logits_dtype,
    split_keys,
    stochastic_depth,
)
from jaxref.models.vit import depth_rates
from jaxref.nn import Conv, Linear, Norm
from jaxref.norms import batch_norm
from jaxref.parallel import constrain

STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks of each stage, by depth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """What a `ResNet` is made of; `build` makes it. The defaults are ResNet-50.

    Attributes:
      num_classes: number of classes.
      image_shape: `(height, width, channels)`.
      depth: 18 or 34, of blocks of two convolutions; 50, 101 or 152, of bottleneck blocks.
      stages: blocks of each stage. Default: those of the depth. The first block of each stage but
        the first halves the image.
      width: channels of the first stage's convolutions; each stage doubles them, and bottleneck
        blocks give four times as many. Default 64.
      stem: "imagenet", a 7 x 7 convolution and a max pooling of stride 2 each; or "small", a 3 x 3
        convolution of stride 1, as for CIFAR.
      conv: `Conv`, or one of its kind from `jaxref.nn`: `WeightStandardizedConv`,
        `SigmaReparamConv`.
      norm: a norm of `jaxref.norms` over channels, with or without statistics, such as
        `batch_norm`, `ghost_batch_norm`, `group_norm`, `batch_channel_norm`; arguments are bound
        with `functools.partial`.
      activation: what follows a norm. None where the norm is an activation too, as EvoNorm is:
        norms that no activation follows are then a gain and a bias alone, and a ReLU follows each
        sum, as in EvoNorm's paper.
      zero_init_residual: start the gain of each branch's last norm at 0, so that blocks start as
        their shortcuts.
      dropout: rate in [0, 1) on the pooled features, where a key is given.
      stochastic_depth: rate in [0, 1) in the last block, growing linearly from 0.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: an unknown depth or stem, a size below 1, or a rate out of range.

    Use depth 18 or 34 where work is dear, `stem="small"` for images of few pixels, and
    `jaxref.norms.group_norm` with `jaxref.nn.WeightStandardizedConv` where batches are small.

    Cost: for 1000 classes 11.7 million parameters and 1.8 billion multiplications an image at depth
    18, 25.6 and 4.1 at 50, 60.2 and 11.5 at 152.

    Example:
      >>> config = ResNetConfig(num_classes=1000)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      25557032

    Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015,
    arXiv:1512.03385; the stride on the 3 x 3 convolution and gains that start at 0 after Goyal et
    al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, arXiv:1706.02677.
    """

    num_classes: int
    image_shape: tuple[int, int, int] = (224, 224, 3)
    depth: int = 50
    stages: tuple[int, ...] | None = None
    width: int = 64
    stem: str = "imagenet"
    conv: Callable[..., Any] = Conv
    norm: Callable[..., Any] = batch_norm
    activation: Callable[[Array], Array] | None = jax.nn.relu
    zero_init_residual: bool = True
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "ResNet":
        """The model of this configuration."""
        return ResNet(self, rngs=rngs)

    def __post_init__(self):
        check_image_config(self, rates=("dropout", "stochastic_depth"))
        check_interval(1, jnp.inf, width=self.width)
        check_stages(self.depth, self.stages)
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be 'imagenet' or 'small', got {self.stem!r}")


def check_stages(depth: int, stages: tuple[int, ...] | None) -> None:
    """Raises ValueError unless the depth is known and every stage has blocks."""
    if depth not in STAGES:
        raise ValueError(f"depth must be one of {sorted(STAGES)}, got {depth!r}")
    if stages is not None:
        if not stages:
            raise ValueError("stages must have at least one stage, got none")
        check_interval(1, jnp.inf, stages=stages)


class ResNet(nnx.Module):
    """An image classifier of residual blocks, with the norm after each convolution.

        x ← act(shortcut(x) + norm(conv(act(norm(conv(x))))))

    with one more convolution in bottleneck blocks: 1 x 1 to fewer channels, 3 x 3, which has the
    stride, and 1 x 1 to more. The shortcut is the identity, or a convolution and norm where the
    shape changes.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: when called, images of another shape, or a batch that the norm does not take.

    Use it to compare norms, convolutions or losses on the classifier that most papers have;
    `NFResNet` has no norms, `TinyNet` takes fewer operations.

    Cost: 25.6 million parameters and 4.1 billion multiplications an image at the defaults, and the
    state of the norm, for `jaxref.norms.batch_norm` two numbers a channel.

    `train()` and `eval()` say whether norms use the batch's statistics and move theirs.

    Example:
      >>> config = ResNetConfig(num_classes=10, image_shape=(32, 32, 3), depth=18, stem="small")
      >>> images = jnp.ones((2, 32, 32, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015,
    arXiv:1512.03385; the stride on the 3 x 3 convolution and gains that start at 0 after Goyal et
    al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, arXiv:1706.02677.
    """

    Config = ResNetConfig

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        small = config.stem == "small"
        self.stem = _ConvNorm(
            config,
            config.image_shape[2],
            config.width,
            3 if small else 7,
            strides=1 if small else 2,
            rngs=rngs,
        )
        stages = config.stages or STAGES[config.depth]
        rates = iter(depth_rates(config.stochastic_depth, sum(stages)))
        blocks, features = [], config.width
        for stage, count in enumerate(stages):
            for block in range(count):
                blocks.append(
                    _Block(
                        config,
                        features,
                        config.width * 2**stage,
                        strides=2 if stage > 0 and block == 0 else 1,
                        rate=next(rates),
                        rngs=rngs,
                    )
                )
                features = blocks[-1].features
        self.blocks = nnx.List(blocks)
        self.head = classifier_head(config, features, rngs)

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
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block, block_key in zip(self.blocks, keys):
            x = block(x, block_key)
        return self.head(dropout(pool_pixels(x), self.config.dropout, last))


class _Block(nnx.Module):
    """Two convolutions, or three with a bottleneck, and their shortcut."""

    def __init__(
        self,
        config: ResNetConfig,
        in_features: int,
        width: int,
        *,
        strides: int,
        rate: float,
        rngs: nnx.Rngs,
    ):
        bottleneck = config.depth >= 50
        self.features = features = 4 * width if bottleneck else width
        # kernel size, channels, stride
        layers = (
            [(1, width, 1), (3, width, strides), (1, features, 1)]
            if bottleneck
            else [(3, width, strides), (3, width, 1)]
        )
        convs, inputs = [], in_features
        for i, (size, outputs, stride) in enumerate(layers):
            last = i == len(layers) - 1
            convs.append(
                _ConvNorm(
                    config,
                    inputs,
                    outputs,
                    size,
                    strides=stride,
                    activated=not last,
                    zero_init=last and config.zero_init_residual,
                    rngs=rngs,
                )
            )
            inputs = outputs
        self.convs = nnx.List(convs)
        self.shortcut = (
            _ConvNorm(config, in_features, features, 1, strides=strides, activated=False, rngs=rngs)
            if strides > 1 or in_features != features
            else None
        )
        self.activation = config.activation or jax.nn.relu
        self.rate = rate

    def __call__(self, x: Array, key: Array | None) -> Array:
        y = x
        for conv in self.convs:
            y = conv(y)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.activation(shortcut + stochastic_depth(y, self.rate, key))
        return constrain(y, "batch", None, None, None)


class _ConvNorm(nnx.Module):
    """A convolution, its norm, and the activation where one is to follow."""

    def __init__(
        self,
        config: ResNetConfig,
        in_features: int,
        features: int,
        size: int,
        *,
        strides: int = 1,
        activated: bool = True,
        zero_init: bool = False,
        rngs: nnx.Rngs,
    ):
        self.conv = config.conv(
            in_features,
            features,
            (size, size),
            strides=strides,
            padding=((size // 2, size // 2),) * 2,
            use_bias=False,
            kernel_init=variance_scaling(2, "fan_out", "normal"),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        fused = config.activation is None
        norm = _affine if fused and not activated else config.norm
        self.norm = Norm(norm, features, param_dtype=config.param_dtype)
        if zero_init:
            name = "channel_scale" if hasattr(self.norm, "channel_scale") else "scale"
            gain = getattr(self.norm, name)
            gain[...] = jnp.zeros_like(gain[...])
        self.activation = config.activation if activated else None

    def __call__(self, x: Array) -> Array:
        y = self.norm(self.conv(x))
        return y if self.activation is None else self.activation(y)


def _affine(x: ArrayLike, scale: ArrayLike, bias: ArrayLike) -> Array:
    """What is left of an EvoNorm without its nonlinearity."""
    x = jnp.asarray(x)
    return (x * scale + bias).astype(x.dtype)


def pool_pixels(x: Array) -> Array:
    """The mean over the pixels of `[batch, height, width, features]`, in at least float32."""
    return jnp.mean(x, axis=(1, 2), dtype=compute_dtype(x))


def classifier_head(config: Any, features: int, rngs: nnx.Rngs) -> Linear:
    """The map from pooled features to logits."""
    return Linear(
        features,
        config.num_classes,
        axes=("embed", None),
        use_bias=True,
        kernel_init=jax.nn.initializers.normal(0.01),
        dtype=logits_dtype(config),
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
