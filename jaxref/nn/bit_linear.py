"""A linear map with ternary weights that is trained in that form."""

from typing import Any, Literal

from jax import Array

from jaxref.nn.linear import Linear
from jaxref.quantization import QTensor, bit_linear, dequantize, ternary_weight_quantize


class BitLinear(Linear):
    """A `Linear` with inputs in 8 bits and the weights -γ, 0 and γ: BitNet b1.58.

        y = x̂ Ŵ (+ b)

    with x̂ and Ŵ as in `jaxref.quantization.bit_linear`. The parameter stays floating point, and the
    gradient passes straight through to it.

    Args:
      As `Linear`, and
      scale: γ from the "median" (default) or the "mean" of the magnitudes of the weights.
      activation_bits: 2 to 8, of the inputs. Default 8.
      norm: "layer" (default) or "rms", before the inputs are quantized; None where the layer has a
        norm before it.
      epsilon: that of the norm, and the least γ. Default 1e-5.

    Raises:
      ValueError: what `Linear` raises, and, when called, what `bit_linear` raises.

    Use it as the `linear` of `MultiHeadAttention` and `MLP`, in all layers but embeddings and the
    output layer. Small language models want twice the width for the same loss, as the paper finds.
    `QuantizedBitLinear` is what it becomes for inference.

    Cost: the parameters of `Linear` in training, quantized anew at each call, with a sort for the
    median; 2 bits per weight are left to store after it, by `quantized_kernel()`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> linear = BitLinear(8, 16, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
      >>> linear(jnp.eye(8)).shape
      (8, 16)
      >>> linear.quantized_kernel().values.nbytes, linear.kernel[...].nbytes
      (32, 512)

    Reference: Nielsen, Schneider-Kamp, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on
    Smaller Networks", 2024, arXiv:2407.09527.
    """

    def __init__(
        self,
        *args: Any,
        scale: Literal["median", "mean"] = "median",
        activation_bits: int = 8,
        norm: Literal["layer", "rms"] | None = "layer",
        epsilon: float = 1e-5,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.scale, self.activation_bits = scale, activation_bits
        self.norm, self.epsilon = norm, epsilon

    def quantized_kernel(self) -> QTensor:
        """The kernel `[inputs, outputs]` in 2 bits; `bit_linear` takes it in inference."""
        return ternary_weight_quantize(
            self._kernel_by_output(), scale=self.scale, epsilon=self.epsilon
        )

    def effective_kernel(self) -> Array:
        """The kernel that is used, in the type to compute in."""
        return dequantize(self.quantized_kernel(), dtype=self.dtype or self.kernel.dtype)

    def _product(self, rows: Array) -> Array:
        return bit_linear(
            rows,
            self._kernel_by_output(),
            scale=self.scale,
            activation_bits=self.activation_bits,
            norm=self.norm,
            epsilon=self.epsilon,
        )
