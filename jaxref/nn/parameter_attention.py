"""A linear map's stand-in whose parameters are tokens, to which more can be added."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.attention import grow_parameter_tokens, parameter_attention
from jaxref.attention.parameter_attention import Normalization, parameter_attention_scale
from jaxref.core.checks import check_interval
from jaxref.nn.linear import _as_rows, _as_tuple, _from_rows


class ParameterAttention(nnx.Module):
    """Attention over learned tokens, in place of an affine map or of a whole MLP.

        y = Θ(x Kᵀ) V,     Θ(A) = gelu(τ A / (‖A‖₂ + ε)) or another `normalization`

    with the input's axes contracted with those of the n keys, and one value for each key; see
    `jaxref.attention.parameter_attention`.

    Args:
      in_features: size of the input's last axis, or sizes of its last axes.
      out_features: the same for the output; `(heads, head_dim)` projects to heads.
      axes: logical axis names, input axes first, for the rules of `jaxref.parallel`, as `Linear`
        takes them; the axis of the tokens is named "mlp".
      num_tokens: n. Default: the inputs, as in a projection; for an MLP take 4 times as many.
      normalization: "l2_gelu" (default), "gelu_l2" or "softmax".
      scale: τ. Default: that of `parameter_attention` for `num_tokens`. It stays when tokens are
        added; pass it to build a grown model anew.
      kernel_init: initializer of the keys, called with `[n, inputs]`. Default: normal of standard
        deviation 0.02.
      value_init: initializer of the values, called with `[n, outputs]`. Default: truncated normal
        of variance 1 / n; the paper's is `normal(2 / (L √inputs))` in a model of L layers.
      dtype: type to compute in; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      key_tokens: `[n, *in_features]`.
      value_tokens: `[n, *out_features]`.

    Raises:
      ValueError: `axes` do not name the axes of input and output, `num_tokens` below 1, an unknown
        `normalization`, or an input of the wrong size.

    Use it as the `linear` of a `MultiHeadAttention`, and for its MLP, where a model is to be scaled
    up in training by `grow`; `Linear` where its size is fixed.

    Cost: n · (inputs + outputs) parameters, as many multiplications a row: by default twice those
    of a square `Linear`.

    Example:
      >>> axes = ("embed", "heads", None)
      >>> project = ParameterAttention(8, (2, 4), axes=axes, rngs=nnx.Rngs(0))
      >>> project(jnp.ones((3, 5, 8))).shape
      (3, 5, 2, 4)

    Reference: Wang et al., "TokenFormer: Rethinking Transformer Scaling with Tokenized Model
    Parameters", 2024, arXiv:2410.23168.
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        num_tokens: int | None = None,
        normalization: Normalization = "l2_gelu",
        scale: float | None = None,
        kernel_init: Initializer = jax.nn.initializers.normal(0.02),
        value_init: Initializer = jax.nn.initializers.lecun_normal(),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features = _as_tuple(in_features), _as_tuple(out_features)
        num_inputs, sizes = len(self.in_features), self.in_features + self.out_features
        if len(axes) != len(sizes):
            raise ValueError(
                f"axes must name the {len(sizes)} axes of input and output {sizes}, got {axes}"
            )
        inputs, outputs = math.prod(self.in_features), math.prod(self.out_features)
        num_tokens = inputs if num_tokens is None else num_tokens
        check_interval(1, jnp.inf, num_tokens=num_tokens)
        default_scale = parameter_attention_scale(normalization, num_tokens)
        self.normalization = normalization
        self.scale = default_scale if scale is None else scale
        keys = kernel_init(rngs.params(), (num_tokens, inputs), param_dtype)
        values = value_init(rngs.params(), (num_tokens, outputs), param_dtype)
        self.key_tokens = nnx.Param(
            keys.reshape(num_tokens, *self.in_features), axes=("mlp", *axes[:num_inputs])
        )
        self.value_tokens = nnx.Param(
            values.reshape(num_tokens, *self.out_features), axes=("mlp", *axes[num_inputs:])
        )
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Maps `[..., *in_features]` to `[..., *out_features]`."""
        dtype = self.dtype or self.key_tokens.dtype
        keys, values = (
            tokens[...].astype(dtype) for tokens in (self.key_tokens, self.value_tokens)
        )
        y = parameter_attention(
            _as_rows(x.astype(dtype), self.in_features),
            keys.reshape(len(keys), -1),
            values.reshape(len(values), -1),
            normalization=self.normalization,
            scale=self.scale,
        )
        return _from_rows(y, x, self.in_features, self.out_features)

    def grow(self, extra: int, *, value_std: float = 0.02, rngs: nnx.Rngs) -> None:
        """Adds `extra` tokens, with keys of 0, which leave the outputs as they are.

        The new values are drawn with standard deviation `value_std`. An optimizer's state follows
        by `jaxref.attention.grow_optimizer_state`. Raises ValueError for the softmax form, in which
        a key of 0 has weight.
        """
        if self.normalization == "softmax":
            raise ValueError("normalization must be 'l2_gelu' or 'gelu_l2' to grow, got 'softmax'")
        keys, values = grow_parameter_tokens(
            self.key_tokens[...],
            self.value_tokens[...],
            extra,
            key=rngs.params(),
            value_std=value_std,
        )
        self.key_tokens = nnx.Param(keys, axes=self.key_tokens.get_metadata()["axes"])
        self.value_tokens = nnx.Param(values, axes=self.value_tokens.get_metadata()["axes"])
