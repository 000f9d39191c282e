"""Norms of the weights instead of the activations, and the scales of networks that need no other.

Kernels are `[..., out]`, as `[in, out]` of a dense layer or `[height, width, in, out]` of a
convolution, and a unit is what feeds one output.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.norms.layer import layer_norm
from jaxref.norms.rms import reciprocal_root, spread_parameter

# 1 / std f(z) of z ~ N(0, 1), integrated numerically; elu and gelu with jax.nn's defaults.
_NONLINEARITY_GAINS = {
    "identity": 1.0,
    "relu": math.sqrt(2 / (1 - 1 / math.pi)),
    "relu6": 1.7128585550,
    "leaky_relu": 1.7048316272,
    "elu": 1.2708434179,
    "celu": 1.2708434179,
    "selu": 1.0,
    "gelu": 1.7009165617,
    "silu": 1.7871872221,
    "mish": 1.5920253811,
    "hard_swish": 1.8138714738,
    "sigmoid": 4.8013133720,
    "log_sigmoid": 1.9191259801,
    "softplus": 1.9191259801,
    "soft_sign": 2.3375333631,
    "tanh": 1.5925374197,
}


class ResidualScale(NamedTuple):
    """The constants of one normalizer-free residual block, `x + α f(x / β)`.

    Attributes:
      beta: β, the standard deviation that the block's input has at initialization.
      alpha: α, the weight of the residual branch.
      is_transition: whether the block is the first of its stage, whose shortcut takes `x / β` too.
    """

    beta: float
    alpha: float
    is_transition: bool


def fan_in_axes(kernel: ArrayLike, output_axis: int) -> tuple[int, ...]:
    """The axes of a kernel that run within a unit, which has to have at least one entry."""
    shape = jnp.shape(kernel)
    (output,) = canonical_axes(output_axis, len(shape), name="output_axis")
    axes = tuple(a for a in range(len(shape)) if a != output)
    if not axes or any(shape[a] == 0 for a in axes):
        raise ValueError(f"kernel must have inputs beside output_axis {output_axis}, got {shape}")
    return axes


def weight_standardization(
    kernel: ArrayLike,
    *,
    output_axis: int = -1,
    epsilon: float = 1e-5,
    unbiased: bool = True,
) -> Array:
    r"""Weight standardization: the weights of each unit with zero mean and unit variance.

    With the mean μ_o and the variance σ_o² of the N weights that feed output o,

        ŵ_o = (w_o - μ_o) / √(σ_o² + ε),   σ_o² = Σ_i (w_oi - μ_o)² / (N - 1)

    Unchanged by `w_o → a w_o + b` for a > 0 (up to ε), and differentiated through μ and σ, so that
    the gradient of a unit's weights has zero mean and, but for ε, no part along them: that makes
    the loss smoother. There is no gain, since a norm of the activations follows.

    Args:
      kernel: `[..., out]` floating point, of a size whose square float32 holds: at most about 1e16.
      output_axis: the axis of the units. Default: the last.
      epsilon: ε at least 0, inside of the root. Default 1e-5, the authors'; timm has 1e-6.
      unbiased: divide by N - 1, as the authors' code does; False for N, as timm does.

    Returns:
      the kernel ŵ of the shape and type of `kernel`, computed in at least float32; 0 for a unit of
      equal weights, with a finite gradient for any ε.

    Raises:
      ValueError: `output_axis` out of range, a unit without weights, or of a single one while
        `unbiased`, or a negative `epsilon`.
      TypeError: `kernel` is not floating point.

    Use it with `group_norm` or `batch_channel_norm` where batches are too small for batch
    normalization; `scaled_weight_standardization` does without norm of the activations.

    Cost: the reductions of `layer_norm` over the kernel, whatever the batch; once for all in
    inference.

    Example:
      >>> print(weight_standardization(jnp.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])).round(3))
      [[-1.  0.]
       [ 0.  0.]
       [ 1.  0.]]

    Reference: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization
    and Weight Standardization", 2019, arXiv:1903.10520.
    """
    check_floating(kernel=kernel)
    check_interval(0, jnp.inf, epsilon=epsilon)
    kernel = jnp.asarray(kernel)
    axes = fan_in_axes(kernel, output_axis)
    wide = kernel.astype(compute_dtype(kernel))
    if not unbiased:
        return layer_norm(wide, axis=axes, epsilon=epsilon).astype(kernel.dtype)
    count = math.prod(kernel.shape[a] for a in axes)
    if count == 1:
        raise ValueError(
            f"kernel must have two weights for each output or unbiased be False, got {kernel.shape}"
        )
    shrink = (count - 1) / count  # √(σ² + ε) = √((σ_biased² + shrink ε) / shrink)
    y = math.sqrt(shrink) * layer_norm(wide, axis=axes, epsilon=shrink * epsilon)
    return y.astype(kernel.dtype)


def scaled_weight_standardization(
    kernel: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    output_axis: int = -1,
    nonlinearity_gain: float = 1.0,
    epsilon: float = 1e-4,
) -> Array:
    r"""Scaled weight standardization: units of zero mean and of a given norm.

    With the mean μ_o and the biased variance σ_o² of the N weights that feed output o,

        ŵ_o = γ g_o (w_o - μ_o) / √(max(N σ_o², ε))

    so that ‖ŵ_o‖ = γ g_o, and inputs of unit variance give outputs of variance (γ g_o)². The zero
    mean takes out what the positive mean of a rectified input would add: no statistics of
    activations are needed, and an example does not depend on its batch.

    Args:
      kernel: `[..., out]` floating point, of a size whose square float32 holds: at most about 1e16.
      gain: g, learned, `[out]`. Default: 1.
      output_axis: the axis of the units. Default: the last.
      nonlinearity_gain: γ > 0, the constant of the activation before the layer
        (`nonlinearity_gain("relu")`). Default 1: the activation carries it, or there is none.
      epsilon: ε at least 0, the least squared norm that is divided by. Default 1e-4, the authors'.
        timm adds 1e-6 to σ² instead, which differs for units of nearly equal weights.

    Returns:
      the kernel ŵ of the shape and type of `kernel`, computed in at least float32; 0 for a unit of
      equal weights, with a finite gradient for any ε.

    Raises:
      ValueError: `output_axis` out of range, a unit of fewer than two weights, `gain` not of shape
        `[out]`, a `nonlinearity_gain` that is not positive, or a negative `epsilon`.
      TypeError: `kernel` or `gain` is not floating point.

    Use it in networks without normalization, with `nf_residual_scales` and, for large rates or
    small batches, `jaxref.optimizers.adaptive_gradient_clip`; `weight_standardization` is for
    networks that normalise activations as well.

    Cost: three reductions over the kernel, whatever the batch, and none over activations; once for
    all in inference.

    Example:
      >>> print(scaled_weight_standardization(jnp.array([[1.0], [3.0]]), jnp.array([2.0])).round(3))
      [[-1.414]
       [ 1.414]]

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692; Zhuang, Lyu, "FedWon: Triumphing Multi-domain
    Federated Learning Without Normalization", 2023, arXiv:2306.05879.
    """
    check_floating(kernel=kernel)
    check_interval(0, jnp.inf, epsilon=epsilon)
    check_interval(0, jnp.inf, closed="neither", nonlinearity_gain=nonlinearity_gain)
    kernel = jnp.asarray(kernel)
    axes = fan_in_axes(kernel, output_axis)
    if math.prod(kernel.shape[a] for a in axes) == 1:
        raise ValueError(f"kernel must have two weights for each output, got {kernel.shape}")
    wide = kernel.astype(compute_dtype(kernel))
    # Measured from one of its own weights, the mean of equal weights is exact.
    wide -= jax.lax.stop_gradient(jnp.max(wide, axis=axes, keepdims=True))
    centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
    square_norm = jnp.sum(jnp.square(centred), axis=axes, keepdims=True)
    y = centred * (nonlinearity_gain * reciprocal_root(jnp.maximum(square_norm, epsilon), 0.0))
    if gain is not None:
        output = canonical_axes(output_axis, kernel.ndim)
        y *= spread_parameter("gain", gain, output, kernel.shape)
    return y.astype(kernel.dtype)


def weight_normalization(
    kernel: ArrayLike, gain: ArrayLike | None = None, *, output_axis: int = -1
) -> Array:
    r"""Weight normalization: the direction of each unit's weights, and apart from it their length.

        ŵ_o = g_o w_o / ‖w_o‖₂

    Unchanged by `w_o → a w_o` for a > 0, so that the gradient is orthogonal to w_o and the weights
    can only grow: by themselves they find the rate of learning.

    Args:
      kernel: `[..., out]` floating point, of a size whose square float32 holds: at most about 1e16.
      gain: g, learned, `[out]`. Default: 1. At ‖w_o‖ the layer starts as it was.
      output_axis: the axis of the units. Default: the last.

    Returns:
      the kernel ŵ of the shape and type of `kernel`, computed in at least float32; 0 for a unit of
      zeros, with a finite gradient.

    Raises:
      ValueError: `output_axis` out of range, a unit without weights, or `gain` not of shape
        `[out]`.
      TypeError: `kernel` or `gain` is not floating point.

    Use it in place of `layer_norm` where dividing by statistics of the data is too dear, as under
    encryption, or in recurrent and generative models. `scaled_weight_standardization` also centres;
    `spectral_normalization` bounds the kernel as a whole.

    Cost: one reduction over the kernel, whatever the batch, and none over activations; once for all
    in inference.

    Example:
      >>> print(weight_normalization(jnp.array([[3.0], [4.0]]), jnp.array([10.0])))
      [[6.]
       [8.]]

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489,
    after Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
    Training of Deep Neural Networks", 2016, arXiv:1602.07868.
    """
    check_floating(kernel=kernel)
    kernel = jnp.asarray(kernel)
    axes = fan_in_axes(kernel, output_axis)
    wide = kernel.astype(compute_dtype(kernel))
    square_norm = jnp.sum(jnp.square(wide), axis=axes, keepdims=True)
    y = wide * reciprocal_root(square_norm, 0.0)
    if gain is not None:
        output = canonical_axes(output_axis, kernel.ndim)
        y *= spread_parameter("gain", gain, output, kernel.shape)
    return y.astype(kernel.dtype)


def nonlinearity_gain(name: str) -> float:
    r"""The factor after which an activation keeps the variance of a standard normal input.

        γ = 1 / √(Var f(z)),   z ~ N(0, 1),     for ReLU √(2 / (1 - 1/π)) = 1.7129

    Args:
      name: a function of `jax.nn` with its default arguments: "relu", "relu6", "leaky_relu",
        "elu", "celu", "selu", "gelu", "silu", "mish", "hard_swish", "sigmoid", "log_sigmoid",
        "softplus", "soft_sign", "tanh"; or "identity".

    Returns:
      γ to ten digits. The authors' code has estimates from samples, 1.7140 for ReLU.

    Raises:
      ValueError: an unknown name.

    Use it to multiply an activation, or the kernel that reads it (`scaled_weight_standardization`);
    `estimate_nonlinearity_gain` serves for any other function.

    Cost: a look-up, before training.

    Example:
      >>> print(round(nonlinearity_gain("relu"), 4), round(nonlinearity_gain("silu"), 4))
      1.7129 1.7872

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692.
    """
    if name not in _NONLINEARITY_GAINS:
        raise ValueError(f"name must be one of {sorted(_NONLINEARITY_GAINS)}, got {name!r}")
    return _NONLINEARITY_GAINS[name]


def estimate_nonlinearity_gain(
    fn: Callable[[Array], Array], key: Array, num_samples: int = 1 << 16
) -> Array:
    r"""An estimate from samples of `nonlinearity_gain`, for any function.

        γ ≈ 1 / std(f(z_1), ..., f(z_n)),   z_i ~ N(0, 1)

    Args:
      fn: the activation f, elementwise.
      key: for `jax.random`.
      num_samples: n at least 2. Default 65536, for an error of about half a percent.

    Returns:
      γ, a float32 scalar; infinite for a constant function, which no factor can help.

    Raises:
      ValueError: `num_samples` below 2.

    Use it where `nonlinearity_gain` has no entry.

    Cost: the function of n random numbers, once.

    Example:
      >>> gain = estimate_nonlinearity_gain(jax.nn.relu, jax.random.key(0))
      >>> print(bool(abs(gain - nonlinearity_gain("relu")) < 0.02))
      True

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692.
    """
    check_interval(2, jnp.inf, num_samples=num_samples)
    return 1 / jnp.std(fn(jax.random.normal(key, (num_samples,))))


def nf_residual_scales(
    num_blocks_per_stage: Sequence[int], alpha: float = 0.2
) -> list[ResidualScale]:
    r"""The constants β and α of every residual block of a normalizer-free network.

        x_{l+1} = x_l + α f_l(x_l / β_l),   β_l = √v_l,   v_{l+1} = v_l + α²,   v_0 = 1

    with f_l that keep the variance. In the first block of a stage the shortcut takes `x_l / β_l`
    too, so that the variance starts anew there: v_{l+1} = 1 + α².

    Args:
      num_blocks_per_stage: the blocks of each stage, each at least 1: (3, 4, 6, 3) of a ResNet-50.
      alpha: α > 0, by which a block may change the stream. Default 0.2.

    Returns:
      one `ResidualScale` for each block, in their order. The variances are those at initialization,
      without SkipInit's scalar, which starts the branches at 0.

    Raises:
      ValueError: a stage without blocks, or an `alpha` that is not positive.

    Use it for residual networks of `scaled_weight_standardization` layers, whose signal grows as
    that of a batch-normalised one does, in a saw-tooth.

    Cost: two constants a block, before training.

    Example:
      >>> [(round(scale.beta ** 2, 2), scale.is_transition) for scale in nf_residual_scales([2, 2])]
      [(1.0, True), (1.04, False), (1.08, True), (1.04, False)]

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692.
    """
    check_interval(0, jnp.inf, closed="neither", alpha=alpha)
    variance = 1.0
    scales = []
    for num_blocks in num_blocks_per_stage:
        check_interval(1, jnp.inf, num_blocks_per_stage=num_blocks)
        for block in range(num_blocks):
            scales.append(ResidualScale(math.sqrt(variance), alpha, is_transition=block == 0))
            variance = (1.0 if block == 0 else variance) + alpha**2
    return scales
