"""TinyNet: EfficientNet-B0 made smaller, in resolution and depth less than in width."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import variance_scaling
from jax.typing import ArrayLike, DTypeLike
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from jaxref.core.checks import check_interval, check_shape
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


class Multipliers(NamedTuple):
    """The size of a network relative to its base.

    Attributes:
      resolution: r, of the side of the image.
      depth: d, of the number of blocks.
      width: w, of the number of channels.
    """

    resolution: float
    depth: float
    width: float

    @property
    def compression(self) -> float:
        """c = d w² r², nominally the operations relative to the base's."""
        return self.depth * self.width**2 * self.resolution**2


class Stage(NamedTuple):
    """Blocks of one kind.

    Attributes:
      kernel_size: side of the depthwise kernels.
      strides: of the first block.
      expansion: how many times the block's input channels the depthwise convolution has.
      features: output channels.
      repeats: blocks.
    """

    kernel_size: int
    strides: int
    expansion: int
    features: int
    repeats: int


EFFICIENTNET_B0 = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)
B0_PIXELS = 224

TINYNET_ANCHORS = {
    "a": Multipliers(192 / B0_PIXELS, 1.2, 1.0),
    "b": Multipliers(188 / B0_PIXELS, 1.1, 0.75),
    "c": Multipliers(184 / B0_PIXELS, 0.85, 0.54),
    "d": Multipliers(152 / B0_PIXELS, 0.695, 0.54),
    "e": Multipliers(106 / B0_PIXELS, 0.6, 0.51),
}
"""The published TinyNets, relative to EfficientNet-B0."""


def tiny_formula(
    compression: float, *, anchors: Sequence[Multipliers] = tuple(TINYNET_ANCHORS.values())
) -> Multipliers:
    r"""Resolution, depth and width of a network with a given share of the base's operations.

        r = r(c),   d = d(c),   w = √(c / (d r²))

    with r and d linear in log c between the anchors, and constant beyond them. For small c the
    resolution stays high, and the width gives way.

    Args:
      compression: c > 0.
      anchors: multipliers known to be good, of any order, at least one; their c are to differ.
        Default: the published TinyNets.

    Returns:
      `Multipliers` with d w² r² = c.

    Raises:
      ValueError: a compression that is not positive, no anchors, or two of equal c.

    Use it to shrink EfficientNet-B0; `fit_tiny_formula` finds r(c) and d(c) for another base, and
    `inverse_giant_formula` is what EfficientNet's own scaling would give.

    Example:
      >>> print("%.3f %.3f %.3f" % tiny_formula(0.1))
      0.696 0.713 0.538

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """
    check_interval(0, jnp.inf, closed="neither", compression=compression)
    if not anchors:
        raise ValueError("anchors must have at least one entry, got none")
    ordered = sorted(anchors, key=lambda anchor: anchor.compression)
    known = np.log([anchor.compression for anchor in ordered])
    if np.any(np.diff(known) <= 0):
        raise ValueError(f"anchors must differ in their compression, got {anchors}")
    at = np.log(compression)
    return _with_width(
        compression,
        float(np.interp(at, known, [anchor.resolution for anchor in ordered])),
        float(np.interp(at, known, [anchor.depth for anchor in ordered])),
    )


def inverse_giant_formula(
    phi: float, *, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15
) -> Multipliers:
    r"""EfficientNet's compound scaling backwards.

        d = α^(-φ),   w = β^(-φ),   r = γ^(-φ),   d w² r² ≈ 2^(-φ)   for α β² γ² ≈ 2

    Args:
      phi: φ, how often to halve the operations; below 0 it enlarges.
      alpha, beta, gamma: above 0. Defaults 1.2, 1.1 and 1.15, EfficientNet's.

    Returns:
      `Multipliers`.

    Raises:
      ValueError: a factor that is not positive.

    What `tiny_formula` is compared with: it keeps more width, and less resolution.

    Example:
      >>> print("%.3f %.3f %.3f" % inverse_giant_formula(1.0))
      0.870 0.833 0.909

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819, after Tan, Le, "EfficientNet: Rethinking Model
    Scaling for Convolutional Neural Networks", 2019, arXiv:1905.11946.
    """
    check_interval(-jnp.inf, jnp.inf, phi=phi)
    check_interval(0, jnp.inf, closed="neither", alpha=alpha, beta=beta, gamma=gamma)
    return Multipliers(gamma**-phi, alpha**-phi, beta**-phi)


def fit_tiny_formula(
    configs: Sequence[Multipliers],
    accuracies: ArrayLike,
    flops: ArrayLike,
    *,
    base_flops: float,
    keep: float = 0.2,
) -> Callable[[float], Multipliers]:
    r"""A tiny formula from networks that were trained: `tiny_formula` for any base.

    The best networks by accuracy and operations are kept, Pareto front after Pareto front. Through
    their resolutions, and through their depths, Gaussian processes with the covariance

        k(c, c') = s² exp(-(c - c')² / (2 l²)) + σ² 1[c = c'],   c = flops / base_flops

    give r(c) and d(c); s, l and σ maximise the likelihood. Then `w = √(c / (d r²))`.

    Args:
      configs: n multipliers (resolution, depth, width), sampled at random.
      accuracies: `[n]`, of the networks.
      flops: `[n]` above 0, their operations.
      base_flops: above 0, those of the base.
      keep: in (0, 1], the share of networks that is kept. Default 0.2.

    Returns:
      A function from c > 0 to `Multipliers`. Far from the networks that were kept it gives their
      mean resolution and depth.

    Raises:
      ValueError: arrays of different lengths, a number out of its range, or fewer than three
        networks to keep; when called, a compression that is not positive, or at which the fit has
        no positive resolution or depth.

    Example:
      >>> sampled = [Multipliers(r, 1.0, 1.0) for r in np.linspace(0.3, 1, 20)]
      >>> cost = [m.compression for m in sampled]
      >>> formula = fit_tiny_formula(sampled, np.sqrt(cost), cost, base_flops=1.0, keep=1.0)
      >>> print("%.2f %.2f %.2f" % formula(0.5))
      0.71 1.00 1.00

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """
    check_interval(0, 1, closed="right", keep=keep)
    check_interval(0, jnp.inf, closed="neither", base_flops=base_flops, flops=flops)
    check_interval(-jnp.inf, jnp.inf, accuracies=accuracies)
    check_shape((len(configs),), accuracies=accuracies, flops=flops)
    count = round(keep * len(configs))
    if count < 3:
        raise ValueError(f"keep must leave 3 networks at least, got {keep} of {len(configs)}")
    order = _pareto_order(np.asarray(accuracies, float), np.asarray(flops, float))[:count]
    at = np.asarray(flops, float)[order] / base_flops
    resolution = _gaussian_process(at, np.array([configs[i].resolution for i in order]))
    depth = _gaussian_process(at, np.array([configs[i].depth for i in order]))

    def formula(compression: float) -> Multipliers:
        check_interval(0, jnp.inf, closed="neither", compression=compression)
        return _with_width(compression, resolution(compression), depth(compression))

    return formula


def scale_channels(channels: int, width: float, *, divisor: int = 8) -> int:
    """`width` times as many channels, rounded to a multiple of `divisor`.

    Rounding never takes more than a tenth, and leaves at least `divisor` channels.

    Args:
      channels: at least 1.
      width: above 0.
      divisor: at least 1. Default 8.

    Returns:
      The number of channels.

    Raises:
      ValueError: a number out of its range.

    Example:
      >>> scale_channels(24, 0.54), scale_channels(80, 0.54)
      (16, 40)

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """
    check_interval(1, jnp.inf, channels=channels, divisor=divisor)
    check_interval(0, jnp.inf, closed="neither", width=width)
    wanted = channels * width
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


def efficientnet_b0_flops(
    resolution: float = 1.0, depth: float = 1.0, width: float = 1.0, *, num_classes: int = 1000
) -> int:
    """Multiplications of EfficientNet-B0 for one image, scaled as TinyNets are.

    Those of convolutions, squeeze-and-excitation and the classifier; by custom they are called
    floating-point operations. Stem and head keep their width, so that small networks have more than
    `d w² r²` of the base's.

    Args:
      resolution, depth, width: multipliers above 0. The image has `round(224 resolution)` pixels a
        side.
      num_classes: classes. Default 1000.

    Returns:
      The number of multiplications.

    Raises:
      ValueError: a multiplier that is not positive.

    Example:
      >>> print(f"{efficientnet_b0_flops() / 1e6:.0f}M")
      386M

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """
    check_interval(0, jnp.inf, closed="neither", resolution=resolution, depth=depth, width=width)
    side = -(-round(B0_PIXELS * resolution) // 2)
    total = side**2 * 9 * 3 * 32
    inputs = 32
    for block in _scaled_blocks(EFFICIENTNET_B0, depth, width):
        hidden = inputs * block.expansion
        if block.expansion > 1:
            total += side**2 * inputs * hidden
        side = -(-side // block.strides)
        total += side**2 * hidden * block.kernel_size**2
        total += 2 * hidden * (inputs // 4)
        total += side**2 * hidden * block.features
        inputs = block.features
    head = max(1280, scale_channels(1280, width))
    return total + side**2 * inputs * head + head * num_classes


def _with_width(compression: float, resolution: float, depth: float) -> Multipliers:
    if resolution <= 0 or depth <= 0:
        raise ValueError(
            f"compression {compression} is out of reach: resolution {resolution}, depth {depth}"
        )
    return Multipliers(resolution, depth, float(np.sqrt(compression / (depth * resolution**2))))


def _pareto_order(accuracies: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """Indices by Pareto front, the first one first, and by accuracy within a front."""
    at_least = (accuracies[:, None] >= accuracies) & (flops[:, None] <= flops)
    dominates = at_least & ~at_least.T
    left = np.ones(len(flops), bool)
    order: list[int] = []
    while left.any():
        front = np.flatnonzero(left & ~dominates[left].any(axis=0))
        order += sorted(front, key=lambda i: -accuracies[i])
        left[front] = False
    return np.array(order)


def _gaussian_process(inputs: np.ndarray, targets: np.ndarray) -> Callable[[float], float]:
    """The posterior mean of a Gaussian process around the targets' mean."""
    mean = targets.mean()
    residual = targets - mean
    spread = max(residual.std(), 1e-6)
    distance = np.square(inputs[:, None] - inputs)

    def covariance(squares: np.ndarray, log_scales: np.ndarray) -> np.ndarray:
        signal, length, _ = np.exp(log_scales)
        return signal**2 * np.exp(-squares / (2 * length**2))

    def solved(log_scales: np.ndarray) -> tuple[Any, np.ndarray]:
        noisy = covariance(distance, log_scales) + np.exp(2 * log_scales[2]) * np.eye(len(inputs))
        factor = cho_factor(noisy, lower=True)
        return factor, cho_solve(factor, residual)

    def loss(log_scales: np.ndarray) -> float:
        factor, weights = solved(log_scales)
        return 0.5 * residual @ weights + np.log(np.diag(factor[0])).sum()

    extent = max(np.ptp(inputs), 1e-6)
    middle = np.log([spread, extent / 2, spread / 5])
    reach = np.log([30.0, 10.0, 30.0])
    fits = [
        minimize(
            loss,
            middle + shift,
            method="L-BFGS-B",
            bounds=np.stack([middle - reach, middle + reach], axis=-1),
        )
        for shift in np.log([[1.0, 1.0, 1.0], [1.0, 0.3, 1.0], [1.0, 3.0, 0.3]])
    ]
    best: np.ndarray = min(fits, key=lambda fit: fit.fun).x
    weights = solved(best)[1]
    return lambda at: float(mean + covariance(np.square(at - inputs), best) @ weights)


def _scaled_blocks(stages: Sequence[Stage], depth: float, width: float) -> list[Stage]:
    """The blocks one by one, as stages that are not repeated."""
    blocks = []
    for stage in stages:
        features = scale_channels(stage.features, width)
        for i in range(max(1, round(depth * stage.repeats))):
            strides = stage.strides if i == 0 else 1
            blocks.append(stage._replace(features=features, strides=strides, repeats=1))
    return blocks


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


def tinynet(variant: str, **options: Any) -> TinyNetConfig:
    """The configuration of TinyNet-A to -E.

    Args:
      variant: "a", with 339 million operations, to "e", with 24.
      **options: further fields of the configuration, `num_classes` among them.

    Returns:
      The configuration.

    Raises:
      ValueError: an unknown variant.

    For any other number of operations, `tiny_formula` gives the multipliers.

    Example:
      >>> config = tinynet("e", num_classes=1000)
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
      config: its parts and sizes; `tinynet("a", num_classes=1000)` and the like are the paper's.
      rngs: source of the `params` key.

    `train()` and `eval()` say whether norms use the batch's statistics and move theirs. Use it
    where operations and memory are few; `ResNet` is quicker for its operations on large devices.

    Example:
      >>> config = TinyNetConfig(
      ...     num_classes=10, image_shape=(8, 8, 3), stages=(Stage(3, 2, 2, 8, 1),),
      ...     stem_features=8, head_features=8,
      ... )
      >>> TinyNet(config, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 10)

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """

    Config = TinyNetConfig

    def __init__(self, config: TinyNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        features = config.stem_features
        self.stem = _ConvNorm(config, config.image_shape[2], features, 3, strides=2, rngs=rngs)
        stages = _scaled_blocks(config.stages, config.depth, config.width)
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
