"""The feed-forward sublayer, plain or gated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.attention.entropy import scaled_fused_ffn
from jaxref.nn.linear import Linear


def is_module_class(component: Any) -> bool:
    """Whether a component is the class of a module, arguments bound to it or not.

    >>> is_module_class(MLP), is_module_class(jax.nn.gelu)
    (True, False)
    """
    while isinstance(component, partial):
        component = component.func
    return isinstance(component, type) and issubclass(component, nnx.Module)


class MLP(nnx.Module):
    """Two linear maps around an activation; gated, a third one multiplies the activation.

        plain:  y = act(x W_up) W_down
        gated:  y = (act(x W_gate) * (x W_up)) W_down

    Args:
      features: size of input and output.
      hidden: size between them.
      activation: a function of the hidden units, or the class of a module that is one and has
        parameters of its own. GELU by default; SiLU with `gated` is SwiGLU.
      gated: the gated form.
      linear: the class of the maps: `Linear`, or one of its kind.
      use_bias: add biases to the maps.
      kernel_init: initializer of the maps that read the input. Default: the maps' own.
      output_init: initializer of the map that writes the output; default the same.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Raises:
      ValueError: an input whose last axis is not `features`.

    Use it as the feed-forward sublayer of a block, gated for a lower loss at the same work, as the
    paper finds; `MixtureOfExperts` for more parameters, `ScaledFusedMLP` for no activation.

    Cost: 2 · features · hidden parameters, or 3 gated, as many multiplications a token: at two
    thirds of the hidden units the gated form costs what the plain one does.

    Example:
      >>> mlp = MLP(4, 16, activation=jax.nn.silu, gated=True, rngs=nnx.Rngs(0))
      >>> mlp(jnp.ones((2, 4))).shape
      (2, 4)

    Reference: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Callable[..., Any] = jax.nn.gelu,
        gated: bool = False,
        linear: Callable[..., Any] = Linear,
        use_bias: bool = False,
        kernel_init: Initializer | None = None,
        output_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def project(
            inputs: int, outputs: int, axes: tuple[str, str], init: Initializer | None
        ) -> Any:
            given: dict[str, Any] = {} if init is None else {"kernel_init": init}
            if use_bias:
                given["use_bias"] = True
            return linear(
                inputs, outputs, axes=axes, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **given
            )

        self.activation = activation() if is_module_class(activation) else activation
        self.up = project(features, hidden, ("embed", "mlp"), kernel_init)
        self.gate = project(features, hidden, ("embed", "mlp"), kernel_init) if gated else None
        self.down = project(hidden, features, ("mlp", "embed"), output_init or kernel_init)

    def __call__(self, x: Array) -> Array:
        """Maps `[..., features]` to `[..., features]`."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class ScaledFusedMLP(nnx.Module):
    """A feed-forward sublayer without activation: one matrix, with learned scales.

        y = (β - 1) x + (1/α) x W

    so that `x + y` is `jaxref.attention.scaled_fused_ffn`, whose β scales the residual stream.

    Args:
      features: size of input and output.
      hidden: ignored: two matrices without an activation between them are one.
      activation, gated: refused unless they are an `MLP`'s defaults.
      kernel_init: as for `MLP`.
      output_init: initializer of W, before `kernel_init`.
      use_bias: must be False.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      alpha, beta: the scales, initially 1.

    Raises:
      ValueError: an activation, a gate or a bias is asked for.

    Use it with `norm=None` and `EntropyGuidedAttention`, where nonlinearities are dear, as on
    encrypted data; `MLP` where they are not.

    Cost: features² + 2 parameters, features² multiplications a token: an eighth of an `MLP` with
    4 · features hidden units.

    Example:
      >>> mlp = ScaledFusedMLP(4, 16, rngs=nnx.Rngs(0))
      >>> mlp(jnp.ones((2, 4))).shape
      (2, 4)

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Callable[..., Any] = jax.nn.gelu,
        gated: bool = False,
        use_bias: bool = False,
        kernel_init: Initializer | None = None,
        output_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del hidden
        if gated or use_bias or activation is not jax.nn.gelu:
            raise ValueError("gated, use_bias and activation have no meaning in ScaledFusedMLP")
        init = output_init or kernel_init
        given: dict[str, Any] = {} if init is None else {"kernel_init": init}
        self.map = Linear(
            features,
            features,
            axes=("embed", "mlp"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **given,
        )
        self.alpha = nnx.Param(jnp.ones((), param_dtype), axes=())
        self.beta = nnx.Param(jnp.ones((), param_dtype), axes=())

    def __call__(self, x: Array) -> Array:
        """Maps `[..., features]` to `[..., features]`."""
        y = scaled_fused_ffn(x, self.map.kernel[...], self.alpha[...], self.beta[...])
        return y - x
