"""Linear maps whose kernel is a function of its parameters: standardised, or of a given norm."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxref.core.checks import check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.nn.linear import Linear, _as_tuple
from jaxref.norms import (
    SpectralState,
    scaled_weight_standardization,
    sigma_reparam,
    sigma_reparam_init,
    spectral_normalization,
    spectral_normalization_init,
    weight_normalization,
    weight_standardization,
)


class Reparametrized:
    """What the reparametrized layers share; it stands before `Linear` or `Conv` in their bases.

    `reparametrize(kernel, training)` maps the parameter, with its outputs as last axis and in at
    least float32, to the kernel that is used.
    """

    def effective_kernel(self) -> Array:
        """The kernel that is used, in the type to compute in."""
        return self._used_kernel(training=not getattr(self, "use_running_average", True))

    def _used_kernel(self, training: bool) -> Array:
        layer: Any = self
        kernel = layer._kernel_by_output()
        used = layer.reparametrize(kernel.astype(compute_dtype(kernel)), training)
        return used.astype(layer.dtype or kernel.dtype)


class ReparametrizedLinear(Reparametrized, Linear):
    """A `Linear` that can be turned into a plain one."""

    def fold(self) -> Linear:
        """A plain `Linear` that computes what this one does in evaluation.

        Its parameters have the type that is computed in.
        """
        kernel = self._used_kernel(training=False)
        folded = Linear(
            self.in_features,
            self.out_features,
            axes=self.kernel.get_metadata()["axes"],
            use_bias=self.bias is not None,
            kernel_init=lambda *_: kernel,
            dtype=self.dtype,
            param_dtype=kernel.dtype,
            rngs=nnx.Rngs(0),
        )
        if self.bias is not None and folded.bias is not None:
            folded.bias[...] = self.bias[...].astype(kernel.dtype)
        return folded


class WeightStandardized:
    """The kernel of `jaxref.norms.weight_standardization`."""

    def __init__(self, *args: Any, epsilon: float = 1e-5, unbiased: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_interval(0, jnp.inf, epsilon=epsilon)
        self.epsilon, self.unbiased = epsilon, unbiased

    def reparametrize(self, kernel: Array, training: bool) -> Array:
        return weight_standardization(kernel, epsilon=self.epsilon, unbiased=self.unbiased)


class ScaledWeightStandardized:
    """The kernel of `jaxref.norms.scaled_weight_standardization`."""

    def __init__(
        self, *args: Any, nonlinearity_gain: float = 1.0, epsilon: float = 1e-4, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        check_interval(0, jnp.inf, closed="neither", nonlinearity_gain=nonlinearity_gain)
        check_interval(0, jnp.inf, epsilon=epsilon)
        self.nonlinearity_gain, self.epsilon = nonlinearity_gain, epsilon
        self.gain = _output_parameter(self, jnp.ones(()))

    def reparametrize(self, kernel: Array, training: bool) -> Array:
        return scaled_weight_standardization(
            kernel,
            self.gain[...].ravel(),
            nonlinearity_gain=self.nonlinearity_gain,
            epsilon=self.epsilon,
        )


class SigmaReparametrized:
    """The kernel of `jaxref.norms.sigma_reparam`, with its state."""

    def __init__(self, *args: Any, gamma_init: float | Literal["spectral"] = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        layer: Any = self
        gamma, state = sigma_reparam_init(layer._kernel_by_output(), gamma_init)
        self.gamma = nnx.Param(gamma.astype(layer.kernel.dtype), axes=())
        _set_spectral_state(self, state)

    def reparametrize(self, kernel: Array, training: bool) -> Array:
        state = _spectral_state(self)
        kernel, state = sigma_reparam(kernel, self.gamma[...], state, update=training)
        if training:
            _store_spectral_state(self, state)
        return kernel


class WeightStandardizedLinear(WeightStandardized, ReparametrizedLinear):
    """A `Linear` whose units are standardised: zero mean and unit variance of their weights.

        y = x Ŵ (+ b),   ŵ_o = (w_o - mean(w_o)) / √(var(w_o) + ε)

    Args:
      As `Linear`, and
      epsilon: ε at least 0. Default 1e-5.
      unbiased: divide the variance by inputs - 1 (default) and not by inputs.

    Raises:
      ValueError: what `Linear` raises, a negative `epsilon`, or a single input while `unbiased`.

    Use it before a `group_norm` or a `batch_channel_norm`, since the outputs have the variance of
    the sum of all inputs; `ScaledWeightStandardizedLinear` keeps the variance.

    Cost: that of `Linear`, and a mean and a variance of the kernel at each call, until `fold` makes
    it a plain one.

    Example:
      >>> linear = WeightStandardizedLinear(4, 2, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(linear(jnp.ones((3, 4))), 0, atol=1e-5))
      True

    Reference: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization
    and Weight Standardization", 2019, arXiv:1903.10520.
    """


class ScaledWeightStandardizedLinear(ScaledWeightStandardized, ReparametrizedLinear):
    """A `Linear` whose units have weights of zero mean and of a learned norm.

        y = x Ŵ (+ b),   ŵ_o = γ g_o (w_o - mean(w_o)) / √(max(N var(w_o), ε))

    Args:
      As `Linear`, and
      nonlinearity_gain: γ > 0, of the activation before the layer. Default 1.
      epsilon: ε at least 0. Default 1e-4.

    Attributes:
      gain: g `[*out_features]`, initially 1.

    Raises:
      ValueError: what `Linear` raises, a `nonlinearity_gain` that is not positive, a negative
        `epsilon`, or, when called, a layer of one input.

    Use it in networks without normalization, with `jaxref.norms.nf_residual_scales`;
    `WeightStandardizedLinear` is for those with a norm behind it, `WeightNormalizedLinear` does not
    centre.

    Cost: that of `Linear`, a gain for each output, and a mean and a variance of the kernel at each
    call, until `fold` makes it a plain one.

    Example:
      >>> axes = ("embed", "mlp")
      >>> linear = ScaledWeightStandardizedLinear(4, 2, axes=axes, rngs=nnx.Rngs(0))
      >>> print(jnp.linalg.norm(linear.effective_kernel(), axis=0).round(3))
      [1. 1.]

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692.
    """


class SigmaReparamLinear(SigmaReparametrized, ReparametrizedLinear):
    """A `Linear` whose spectral norm is a learned scalar.

        y = x Ŵ (+ b),   Ŵ = γ W / σ(W)

    σ is that of one step of power iteration. In training the step is stored; `train()` and `eval()`
    of this or any enclosing module say which it is.

    Args:
      As `Linear`, and
      gamma_init: the initial γ: a number, 1 by default, or "spectral" for σ(W), with which the
        layer is at first what `Linear` would be.

    Attributes:
      gamma: γ, a scalar.
      u, sigma: the state, `nnx.BatchStat`s: `[outputs]` and a scalar. A singular value
        decomposition gives them at first.
      use_running_average: whether steps are not stored (evaluation). Initially False.

    Raises:
      ValueError: what `Linear` raises, or an unknown `gamma_init`.

    Use it as the `linear` of `MultiHeadAttention` and `MLP` where training is unstable, or to do
    without warm-up and normalization; `SpectralNormalizedLinear` holds the norm at 1.

    Cost: that of `Linear`, and four products of the kernel with a vector at each call, in
    evaluation too, until `fold` makes it a plain one; outputs + 1 numbers of state.

    Example:
      >>> linear = SigmaReparamLinear(4, 2, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
      >>> print(jnp.linalg.norm(linear.effective_kernel(), 2).round(3))
      1.0

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """


class WeightNormalizedLinear(ReparametrizedLinear):
    """A `Linear` whose units have weights of a learned norm.

        y = x Ŵ (+ b),   ŵ_o = g_o w_o / ‖w_o‖

    Args:
      As `Linear`, which it equals at first: g is initially the norm of the initial weights.

    Attributes:
      gain: g `[*out_features]`.

    Raises:
      ValueError: what `Linear` raises.

    Use it for the feed-forward maps of networks that may not normalise by statistics of the data;
    `SpectralNormalizedLinear` bounds the layer as a whole.

    Cost: that of `Linear`, a gain for each output, and the norms of the kernel's columns at each
    call, until `fold` makes it a plain one.

    Example:
      >>> linear = WeightNormalizedLinear(4, 2, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
      >>> linear.gain[...] = jnp.array([2.0, 3.0])
      >>> print(jnp.linalg.norm(linear.effective_kernel(), axis=0).round(3))
      [2. 3.]

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489,
    after Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
    Training of Deep Neural Networks", 2016, arXiv:1602.07868.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        kernel = self._kernel_by_output()
        norms = jnp.linalg.norm(kernel.astype(compute_dtype(kernel)), axis=0)
        self.gain = _output_parameter(self, norms.reshape(self.out_features))

    def reparametrize(self, kernel: Array, training: bool) -> Array:
        return weight_normalization(kernel, self.gain[...].ravel())


class SpectralNormalizedLinear(ReparametrizedLinear):
    """A `Linear` over its largest singular value, so that it stretches nothing.

        y = x Ŵ (+ b),   Ŵ = W / σ(W)

    σ is that of one step of power iteration. In training the step is stored; `train()` and `eval()`
    of this or any enclosing module say which it is.

    Args:
      As `Linear`.

    Attributes:
      u, sigma: the state, `nnx.BatchStat`s: `[outputs]` and a scalar. A singular value
        decomposition gives them at first.
      use_running_average: whether steps are not stored (evaluation). Initially False.

    Raises:
      ValueError: what `Linear` raises.

    Use it where the layer's Lipschitz constant is to be 1; `SigmaReparamLinear` learns it.

    Cost: that of `Linear`, and four products of the kernel with a vector at each call, in
    evaluation too, until `fold` makes it a plain one; outputs + 1 numbers of state.

    Example:
      >>> linear = SpectralNormalizedLinear(4, 2, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
      >>> print(jnp.linalg.norm(linear.effective_kernel(), 2).round(3))
      1.0

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489,
    after Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial
    Networks", 2018, arXiv:1802.05957.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _set_spectral_state(self, spectral_normalization_init(self._kernel_by_output()))

    def reparametrize(self, kernel: Array, training: bool) -> Array:
        kernel, state = spectral_normalization(kernel, _spectral_state(self), update=training)
        if training:
            _store_spectral_state(self, state)
        return kernel


def _output_parameter(layer: Any, value: Array) -> nnx.Param:
    """A parameter with a value for each output, named as the kernel's axes of outputs are."""
    shape = _as_tuple(layer.out_features)
    axes = layer.kernel.get_metadata()["axes"][-len(shape) :]
    return nnx.Param(jnp.broadcast_to(value, shape).astype(layer.kernel.dtype), axes=axes)


def _set_spectral_state(layer: Any, state: SpectralState) -> None:
    layer.u = nnx.BatchStat(state.u, axes=(None,))
    layer.sigma = nnx.BatchStat(state.sigma, axes=())
    layer.use_running_average = False


def _spectral_state(layer: Any) -> SpectralState:
    return SpectralState(layer.u[...], layer.sigma[...])


def _store_spectral_state(layer: Any, state: SpectralState) -> None:
    layer.u[...], layer.sigma[...] = state
