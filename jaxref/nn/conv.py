"""Convolutions, channels last, plain and with a reparametrized kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.core.checks import check_interval
from jaxref.nn.reparametrized import (
    Reparametrized,
    ScaledWeightStandardized,
    SigmaReparametrized,
    WeightStandardized,
)

Padding = str | Sequence[tuple[int, int]]


class Conv(nnx.Module):
    """A convolution over the axes before the last one, which holds the channels.

        y_p = Σ_q x_{s p + q} W_q (+ b)

    with a sum over the positions q of the kernel, and strides s: what is called convolution in
    networks, without reflecting the kernel.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: sizes of the kernel, one for each spatial axis: `(3, 3)` for images, `(3,)` for
        sequences.
      strides: the step between outputs, for all spatial axes or for each. Default 1.
      padding: "SAME" (default: output of the size of input / stride, rounded up), "VALID" (none),
        or the zeros before and after each spatial axis, `((1, 1), (1, 1))`.
      feature_group_count: groups of channels that do not see each other, a divisor of both feature
        counts; `in_features` for a depthwise convolution. Default 1.
      axes: logical names of the kernel's axes of inputs and of outputs, for the rules of
        `jaxref.parallel`; the spatial axes are never split. Default: nor are these.
      use_bias: add a bias `[out_features]`, initially 0.
      kernel_init: initializer, called with the kernel's shape. Default: truncated normal of
        variance 1 / (weights that feed an output).
      dtype: type to compute in; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      kernel: `[*kernel_size, in_features / feature_group_count, out_features]`.
      bias: `[out_features]`, or None.

    Raises:
      ValueError: sizes, strides or groups below 1, strides or padding not of each spatial axis,
        groups that do not divide the features, an unknown padding, or an input of the wrong shape.

    Use it in place of `flax.nnx.Conv` where parameters are to be sharded by what their axes mean.

    Cost: the size of the kernel · in_features · out_features / feature_group_count parameters, and
    as many multiplications for each position of the output.

    Example:
      >>> conv = Conv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((2, 7, 6, 3))).shape
      (2, 4, 3, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        feature_group_count: int = 1,
        axes: tuple[str | None, str | None] = (None, None),
        use_bias: bool = False,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size = tuple(kernel_size)
        ndim = len(self.kernel_size)
        self.strides = (strides,) * ndim if isinstance(strides, int) else tuple(strides)
        self.padding: Any = padding if isinstance(padding, str) else tuple(map(tuple, padding))
        self.feature_group_count = feature_group_count
        self._check()
        shape = (*self.kernel_size, in_features // feature_group_count, out_features)
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None,) * ndim + tuple(axes))
        bias = jnp.zeros(out_features, param_dtype)
        self.bias = nnx.Param(bias, axes=tuple(axes[1:])) if use_bias else None
        self.dtype = dtype

    def _check(self) -> None:
        ndim = len(self.kernel_size)
        if len(self.strides) != ndim:
            raise ValueError(
                f"strides must be one for each of the {ndim} spatial axes, got {self.strides}"
            )
        for name in ("kernel_size", "strides"):
            for value in getattr(self, name):
                check_interval(1, jnp.inf, **{name: value})
        check_interval(1, jnp.inf, feature_group_count=self.feature_group_count)
        if self.in_features % self.feature_group_count or (
            self.out_features % self.feature_group_count
        ):
            raise ValueError(
                f"feature_group_count must divide in_features = {self.in_features} and "
                f"out_features = {self.out_features}, got {self.feature_group_count}"
            )
        named = isinstance(self.padding, str)
        if (named and self.padding not in ("SAME", "VALID")) or (
            not named and [len(pair) for pair in self.padding] != [2] * ndim
        ):
            raise ValueError(
                f"padding must be 'SAME', 'VALID' or a pair for each of the {ndim} spatial axes, "
                f"got {self.padding!r}"
            )

    def _kernel_by_output(self) -> Array:
        """The parameter, whose outputs are its last axis."""
        return self.kernel[...]

    def effective_kernel(self) -> Array:
        """The kernel `[*kernel_size, in_features / feature_group_count, out_features]` that the
        input is convolved with, in the type to compute in: the parameter itself, but for subclasses
        that reparametrize it."""
        return self.kernel[...].astype(self.dtype or self.kernel.dtype)

    def __call__(self, x: Array) -> Array:
        """Maps `[..., *spatial, in_features]` to `[..., *new_spatial, out_features]`."""
        ndim = len(self.kernel_size)
        if x.ndim <= ndim or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have shape [..., {ndim} spatial axes, {self.in_features}], "
                f"got {tuple(x.shape)}"
            )
        dtype = self.dtype or self.kernel.dtype
        spatial = tuple(range(1, ndim + 1))
        by_batch, by_output = (0, ndim + 1, *spatial), (ndim + 1, ndim, *range(ndim))
        y = jax.lax.conv_general_dilated(
            x.astype(dtype).reshape(-1, *x.shape[-ndim - 1 :]),
            self.effective_kernel(),
            self.strides,
            self.padding,
            dimension_numbers=jax.lax.ConvDimensionNumbers(by_batch, by_output, by_batch),
            feature_group_count=self.feature_group_count,
        )
        y = y.reshape(*x.shape[: x.ndim - ndim - 1], *y.shape[1:])
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class ReparametrizedConv(Reparametrized, Conv):
    """A `Conv` that can be turned into a plain one."""

    def fold(self) -> Conv:
        """A plain `Conv` that computes what this one does in evaluation.

        Its parameters have the type that is computed in.
        """
        kernel = self._used_kernel(training=False)
        folded = Conv(
            self.in_features,
            self.out_features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            feature_group_count=self.feature_group_count,
            axes=self.kernel.get_metadata()["axes"][-2:],
            use_bias=self.bias is not None,
            kernel_init=lambda *_: kernel,
            dtype=self.dtype,
            param_dtype=kernel.dtype,
            rngs=nnx.Rngs(0),
        )
        if self.bias is not None and folded.bias is not None:
            folded.bias[...] = self.bias[...].astype(kernel.dtype)
        return folded


class WeightStandardizedConv(WeightStandardized, ReparametrizedConv):
    """A `Conv` whose filters are standardised: zero mean and unit variance of their weights.

        y = conv(x, Ŵ) (+ b),   ŵ_o = (w_o - mean(w_o)) / √(var(w_o) + ε)

    Args:
      As `Conv`, and
      epsilon: ε at least 0. Default 1e-5.
      unbiased: divide the variance by N - 1 (default) and not by N, the weights of a filter.

    Raises:
      ValueError: what `Conv` raises, a negative `epsilon`, or, when called, filters of a single
        weight while `unbiased`.

    Use it with `group_norm` or `batch_channel_norm` where batches are small;
    `ScaledWeightStandardizedConv` is for networks without normalization of the activations.

    Cost: that of `Conv`, and a mean and a variance of the kernel at each call, until `fold` makes
    it a plain one.

    Example:
      >>> conv = WeightStandardizedConv(3, 8, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(conv(jnp.ones((1, 5, 5, 3))), 0, atol=1e-4))
      True

    Reference: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization
    and Weight Standardization", 2019, arXiv:1903.10520.
    """


class ScaledWeightStandardizedConv(ScaledWeightStandardized, ReparametrizedConv):
    """A `Conv` whose filters have weights of zero mean and of a learned norm.

        y = conv(x, Ŵ) (+ b),   ŵ_o = γ g_o (w_o - mean(w_o)) / √(max(N var(w_o), ε))

    Args:
      As `Conv`, and
      nonlinearity_gain: γ > 0, of the activation before the layer, such as
        `jaxref.norms.nonlinearity_gain("relu")`. Default 1.
      epsilon: ε at least 0. Default 1e-4.

    Attributes:
      gain: g `[out_features]`, initially 1.

    Raises:
      ValueError: what `Conv` raises, a `nonlinearity_gain` that is not positive, a negative
        `epsilon`, or, when called, filters of a single weight.

    Use it in networks without normalization, with `jaxref.norms.nf_residual_scales`;
    `WeightStandardizedConv` is for those with a norm behind it.

    Cost: that of `Conv`, a gain for each output, and a mean and a variance of the kernel at each
    call, until `fold` makes it a plain one.

    Example:
      >>> conv = ScaledWeightStandardizedConv(3, 2, (3, 3), rngs=nnx.Rngs(0))
      >>> print(jnp.sum(conv.effective_kernel() ** 2, axis=(0, 1, 2)).round(3))
      [1. 1.]

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692; Zhuang, Lyu, "FedWon: Triumphing Multi-domain
    Federated Learning Without Normalization", 2023, arXiv:2306.05879.
    """


class SigmaReparamConv(SigmaReparametrized, ReparametrizedConv):
    """A `Conv` whose kernel, as a matrix `[fan_in, out]`, has a learned spectral norm.

        y = conv(x, Ŵ) (+ b),   Ŵ = γ W / σ(W)

    It holds one power iteration step for each call, as `SigmaReparamLinear` does.

    Args:
      As `Conv`, and
      gamma_init: the initial γ: a number, 1 by default, or "spectral" for σ(W), with which the
        layer is at first what `Conv` would be.

    Attributes:
      gamma: γ, a scalar.
      u, sigma: the state, `nnx.BatchStat`s: `[out_features]` and a scalar.
      use_running_average: whether steps are not stored (evaluation). Initially False.

    Raises:
      ValueError: what `Conv` raises, or an unknown `gamma_init`.

    Use it beside `SigmaReparamLinear`, for the patches of a vision transformer. The matrix's norm
    is not that of the convolution as a map of whole images.

    Cost: that of `Conv`, and four products of the kernel with a vector at each call, in evaluation
    too, until `fold` makes it a plain one; out_features + 1 numbers of state.

    Example:
      >>> conv = SigmaReparamConv(3, 8, (4, 4), strides=4, padding="VALID", rngs=nnx.Rngs(0))
      >>> print(jnp.linalg.norm(conv.effective_kernel().reshape(-1, 8), 2).round(3))
      1.0

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """
