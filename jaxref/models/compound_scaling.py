"""How resolution, depth and width of a network shrink together, and what it then costs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from jaxref.core.checks import check_interval, check_shape


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

    Cost: an interpolation between a few numbers on the host.

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

    Use it as what `tiny_formula` is compared with: it keeps more width, and less resolution.

    Cost: three powers on the host.

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
    base_flops: float | None = None,
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
      base_flops: above 0, those of the base. Default: `efficientnet_b0_flops()`.
      keep: in (0, 1], the share of networks that is kept. Default 0.2.

    Returns:
      A function from c > 0 to `Multipliers`. Far from the networks that were kept it gives their
      mean resolution and depth.

    Raises:
      ValueError: arrays of different lengths, a number out of its range, or fewer than three
        networks to keep; when called, a compression that is not positive, or at which the fit has
        no positive resolution or depth.

    Use it to shrink a base other than EfficientNet-B0, of which many small networks can be trained
    first; `tiny_formula` has what was found for that.

    Cost: n trained networks; on the host O(n²) comparisons and, in three fits, O(k³) a step for the
    k that are kept.

    Example:
      >>> sampled = [Multipliers(r, 1.0, 1.0) for r in np.linspace(0.3, 1, 20)]
      >>> cost = [m.compression for m in sampled]
      >>> formula = fit_tiny_formula(sampled, np.sqrt(cost), cost, base_flops=1.0, keep=1.0)
      >>> print("%.2f %.2f %.2f" % formula(0.5))
      0.71 1.00 1.00

    Reference: Han, Wang, Zhang, Zhang, Xu, Zhang, "Model Rubik's Cube: Twisting Resolution, Depth
    and Width for TinyNets", 2020, arXiv:2010.14819.
    """
    if base_flops is None:
        base_flops = efficientnet_b0_flops()
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

    Use it for every layer of a network that is scaled in width, such as by `tiny_formula`, so that
    channels stay multiples of what hardware likes.

    Cost: one formula on the host.

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

    Use it to know what the multipliers of `tiny_formula` come to before a `TinyNet` is built, and
    as the base of `fit_tiny_formula`.

    Cost: a sum over the blocks on the host; no model is built.

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
    for block in scaled_blocks(EFFICIENTNET_B0, depth, width):
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


def scaled_blocks(stages: Sequence[Stage], depth: float, width: float) -> list[Stage]:
    """The blocks one by one, as stages that are not repeated."""
    blocks = []
    for stage in stages:
        features = scale_channels(stage.features, width)
        for i in range(max(1, round(depth * stage.repeats))):
            strides = stage.strides if i == 0 else 1
            blocks.append(stage._replace(features=features, strides=strides, repeats=1))
    return blocks
