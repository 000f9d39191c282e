"""A linear map whose products are computed in few bits, in simulation."""

from typing import Any, Literal

from jax import Array

from jaxref.nn.linear import Linear
from jaxref.quantization import reduced_precision_dot, simulate_float


class ReducedPrecisionLinear(Linear):
    """A `Linear` whose forward and backward products have operands of few bits.

        y = R(x) R(W) (+ b)

    with R and the gradients as in `jaxref.quantization.reduced_precision_dot`. The parameter keeps
    all its bits, as do the sums.

    Args:
      As `Linear`, and
      exponent_bits: 2 to 8, of inputs and weights. Default 8.
      mantissa_bits: 0 to 23, of inputs and weights. Default 3.
      rounding: "truncate" (default) or "nearest".
      scaled: one scale for each operand, for "nearest". Default False.
      gradient_exponent_bits: 2 to 8, of the output's gradient. Default: `exponent_bits`.
      gradient_mantissa_bits: 0 to 23, of the output's gradient. Default: `mantissa_bits`.

    Raises:
      ValueError: what `Linear` raises, and, when called, what `reduced_precision_dot` raises.

    Use it as the `linear` of `MultiHeadAttention` and `MLP`, to see at which learning rates and how
    often the training of a model fails with fewer bits: `python -m jaxref.train
    --config.model.linear.name=ReducedPrecisionLinear --config.model.linear.mantissa_bits=3`. The
    paper leaves the output layer as it is.

    Cost: that of `Linear` in float32, and passes over kernel, inputs and the output's gradient to
    round them: a simulation saves no time.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> axes = ("embed", "mlp")
      >>> linear = ReducedPrecisionLinear(8, 16, axes=axes, mantissa_bits=0, rngs=nnx.Rngs(0))
      >>> print(jnp.unique(jnp.log2(jnp.abs(linear(jnp.eye(8)))) % 1))
      [0.]

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710.
    """

    def __init__(
        self,
        *args: Any,
        exponent_bits: int = 8,
        mantissa_bits: int = 3,
        rounding: Literal["truncate", "nearest"] = "truncate",
        scaled: bool = False,
        gradient_exponent_bits: int | None = None,
        gradient_mantissa_bits: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.exponent_bits, self.mantissa_bits = exponent_bits, mantissa_bits
        self.rounding, self.scaled = rounding, scaled
        self.gradient_exponent_bits = gradient_exponent_bits
        self.gradient_mantissa_bits = gradient_mantissa_bits

    def effective_kernel(self) -> Array:
        """The kernel that is used, in the type to compute in."""
        return simulate_float(
            super().effective_kernel(),
            exponent_bits=self.exponent_bits,
            mantissa_bits=self.mantissa_bits,
            rounding=self.rounding,
            scaled=self.scaled,
        )

    def _product(self, rows: Array) -> Array:
        return reduced_precision_dot(
            rows,
            super().effective_kernel(),
            exponent_bits=self.exponent_bits,
            mantissa_bits=self.mantissa_bits,
            rounding=self.rounding,
            scaled=self.scaled,
            gradient_exponent_bits=self.gradient_exponent_bits,
            gradient_mantissa_bits=self.gradient_mantissa_bits,
        )
