"""TinyNet: EfficientNet-B0, scaled by the tiny formula."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike

from jaxref.core.checks import check_interval
from jaxref.models.compound_scaling import (
    B0_PIXELS,
    EFFICIENTNET_B0,
    TINYNET_ANCHORS,
    Stage,
    scale_channels,
    scaled_blocks,
)
from jaxref.models.resnet import classifier_head, pool_pixels
from jaxref.models.vision import (
    check_image_config,
    check_images,
    dropout,
    split_keys,
    stochastic_depth,
)
from jaxref.models.vit import depth_rates
from jaxref.nn import Conv, Linear, Norm
from jaxref.norms import batch_norm
from jaxref.parallel import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyNetConfig:
    """What a `TinyNet` is made of; `build` makes it. The defaults are EfficientNet-B0.

    Attributes:
      num_classes: number of classes.
      image_shape: `(height, width, channels)`.
      depth, width: multipliers above 0 of blocks and channels.
      stages: the base's `Stage`s.
      stem_features: channels of the first convolution; the width leaves them alone.
      head_features: channels of the last convolution; a width above 1 multiplies them.
      dropout: rate in [0, 1) on the pooled features, where a key is given. Default 0.2.
      stochastic_depth: rate in [0, 1) in the last block, growing linearly from 0. Default 0.2.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1, or a number out of range.

    Use it with multipliers of your own, as of `tiny_formula`; `tinynet_config` has those of the
    five published networks.

    Cost: at the defaults for 1000 classes 5.3 million parameters and 386 million multiplications an
    image.

    Example:
      >>> config = TinyNetConfig(num_classes=1000)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      5288548

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """

    num_classes: int
    image_shape: tuple[int, int, int] = (B0_PIXELS, B0_PIXELS, 3)
    depth: float = 1.0
    width: float = 1.0
    stages: tuple[Stage, ...] = EFFICIENTNET_B0
    stem_features: int = 32
    head_features: int = 1280
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "TinyNet":
        """The model of this configuration."""
        return TinyNet(self, rngs=rngs)

    def __post_init__(self):
        check_image_config(self, rates=("dropout", "stochastic_depth"))
        check_interval(0, jnp.inf, closed="neither", depth=self.depth, width=self.width)
        for name in ("stem_features", "head_features"):
            check_interval(1, jnp.inf, **{name: getattr(self, name)})
        if not self.stages:
            raise ValueError("stages must have at least one entry, got none")


def tinynet_config(variant: str, **options: Any) -> TinyNetConfig:
    """The configuration of TinyNet-A to -E.

    Args:
      variant: "a", with 337 million operations, to "e", with 24.
      **options: further fields of the configuration, `num_classes` among them.

    Returns:
      The configuration.

    Raises:
      ValueError: an unknown variant.

    Use it for the published networks; for any other number of operations, `tiny_formula` gives the
    multipliers of a `TinyNetConfig`.

    Cost: no arrays; for 1000 classes 6.2, 3.7, 2.5, 2.3 and 2.0 million parameters from "a" to "e".

    Example:
      >>> config = tinynet_config("e", num_classes=1000)
      >>> config.image_shape, config.depth, config.width
      ((106, 106, 3), 0.6, 0.51)

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """
    if variant not in TINYNET_ANCHORS:
        raise ValueError(f"variant must be one of {list(TINYNET_ANCHORS)}, got {variant!r}")
    resolution, depth, width = TINYNET_ANCHORS[variant]
    pixels = round(B0_PIXELS * resolution)
    given: dict[str, Any] = {"image_shape": (pixels, pixels, 3), "depth": depth, "width": width}
    return TinyNetConfig(**(given | options))


class TinyNet(nnx.Module):
    """An image classifier of inverted bottlenecks: EfficientNet-B0, scaled.

        y = project(excite(act(norm(depthwise(act(norm(expand(x))))))),   x ← x + norm(y)

    where every map is a convolution without bias, `act` is SiLU, and `excite` multiplies channels
    by what two linear maps make of their means. Blocks that change the shape have no shortcut.

    Args:
      config: its parts and sizes; those of the paper come from `tinynet_config`.
      rngs: source of the `params` key.

    Use it where operations and memory are few; `ResNet` is quicker for its operations on large
    devices.

    Cost: 2.0 million parameters and 24 million multiplications an image (TinyNet-E) to 6.2 and 337
    (TinyNet-A); two numbers of state a channel of each norm.

    `train()` and `eval()` say whether norms use the batch's statistics and move theirs.

    Example:
      >>> config, images = tinynet_config("e", num_classes=10), jnp.ones((2, 106, 106, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images)).shape
      (2, 10)

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """

    Config = TinyNetConfig

    def __init__(self, config: TinyNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        features = config.stem_features
        self.stem = _ConvNorm(config, config.image_shape[2], features, 3, strides=2, rngs=rngs)
        stages = scaled_blocks(config.stages, config.depth, config.width)
        blocks = []
        for stage, rate in zip(stages, depth_rates(config.stochastic_depth, len(stages))):
            blocks.append(_InvertedBottleneck(config, features, stage, rate, rngs=rngs))
            features = stage.features
        self.blocks = nnx.List(blocks)
        wide = max(config.head_features, scale_channels(config.head_features, config.width))
        self.last = _ConvNorm(config, features, wide, 1, rngs=rngs)
        self.head = classifier_head(config, wide, rngs)

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
        for block, block_key in zip(self.blocks, keys):
            x = block(x, block_key)
        return self.head(dropout(pool_pixels(self.last(x)), self.config.dropout, last))


class _InvertedBottleneck(nnx.Module):
    """Expand, convolve each channel, weigh the channels, project."""

    def __init__(
        self, config: TinyNetConfig, in_features: int, stage: Stage, rate: float, *, rngs: nnx.Rngs
    ):
        hidden = in_features * stage.expansion
        self.expand = (
            _ConvNorm(config, in_features, hidden, 1, rngs=rngs) if stage.expansion > 1 else None
        )
        self.depthwise = _ConvNorm(
            config,
            hidden,
            hidden,
            stage.kernel_size,
            strides=stage.strides,
            groups=hidden,
            rngs=rngs,
        )
        options: dict[str, Any] = {
            "use_bias": True,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        squeezed = max(1, in_features // 4)
        self.squeeze = Linear(hidden, squeezed, axes=(None, None), **options)
        self.excite = Linear(squeezed, hidden, axes=(None, None), **options)
        self.project = _ConvNorm(config, hidden, stage.features, 1, activated=False, rngs=rngs)
        self.has_shortcut = stage.strides == 1 and in_features == stage.features
        self.rate = rate

    def __call__(self, x: Array, key: Array | None) -> Array:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        weights = self.excite(jax.nn.silu(self.squeeze(pool_pixels(y))))
        y = self.project(y * jax.nn.sigmoid(weights)[:, None, None].astype(y.dtype))
        if self.has_shortcut:
            y = x + stochastic_depth(y, self.rate, key)
        return constrain(y, "batch", None, None, None)


class _ConvNorm(nnx.Module):
    """A convolution, batch normalization, and SiLU where it is to follow."""

    def __init__(
        self,
        config: TinyNetConfig,
        in_features: int,
        features: int,
        size: int,
        *,
        strides: int = 1,
        groups: int = 1,
        activated: bool = True,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            in_features,
            features,
            (size, size),
            strides=strides,
            padding=((size // 2, size // 2),) * 2,
            feature_group_count=groups,
            kernel_init=variance_scaling(2 / groups, "fan_out", "normal"),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.norm = Norm(batch_norm, features, param_dtype=config.param_dtype)
        self.activated = activated

    def __call__(self, x: Array) -> Array:
        y = self.norm(self.conv(x))
        return jax.nn.silu(y) if self.activated else y
