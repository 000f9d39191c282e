"""The linear map of a quantized kernel, whatever its format."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating
from jaxref.kernels import quantized_matmul
from jaxref.quantization.bit_allocation import BAQTensor, baq_dequantize
from jaxref.quantization.guided import LNQTensor, lnq_dequantize
from jaxref.quantization.int8 import (
    llm_int8_matmul,
    quantize_rowwise,
    straight_through_matmul,
)
from jaxref.quantization.power import PowerTensor, power_dequantize
from jaxref.quantization.pv_tuning import CodebookWeight, codebook_dequantize
from jaxref.quantization.pyramid import PyramidTensor, pyramid_dequantize
from jaxref.quantization.tensor import QTensor
from jaxref.quantization.uniform import dequantize

_DEQUANTIZE: dict[type, Callable[[Any], Array]] = {
    QTensor: dequantize,
    LNQTensor: lnq_dequantize,
    BAQTensor: baq_dequantize,
    PowerTensor: power_dequantize,
    PyramidTensor: pyramid_dequantize,
    CodebookWeight: lambda weight: codebook_dequantize(*weight),
}

_ACTIVATIONS = (None, "int8", "llm_int8")


def dequantize_kernel(weight: Any) -> Array:
    """The kernel that a quantized one of any format of this room stands for.

    Args:
      weight: a `QTensor`, `LNQTensor`, `BAQTensor`, `PowerTensor`, `PyramidTensor` or
        `CodebookWeight`.

    Returns:
      What the format's own function returns, `[in, out]` for those.

    Raises:
      TypeError: an object of another type.

    Use it where formats are compared; `dequantize`, `lnq_dequantize` and so on where the format is
    known.

    Cost: that of the format's own function; the whole kernel in floating point.

    Example:
      >>> from jaxref.quantization import QuantSpec, quantize
      >>> print(dequantize_kernel(quantize(jnp.array([[0.4, -3.0]]), QuantSpec(bits=3))))
      [[ 0. -3.]]

    Reference: the functions named.
    """
    for kind, restore in _DEQUANTIZE.items():
        if isinstance(weight, kind):
            return restore(weight)
    names = ", ".join(kind.__name__ for kind in _DEQUANTIZE)
    raise TypeError(f"weight must be one of {names}, got {type(weight).__name__}")


def quantized_linear(
    x: ArrayLike,
    weight: Any,
    *,
    activations: str | None = None,
    threshold: float = 6.0,
    max_outliers: int | None = None,
    implementation: str | None = None,
) -> Array:
    r"""The product of an input and a quantized kernel, on its codes where there is a kernel for it.

        y = x Ŵ           by default, and with "llm_int8" and "int8"
        y = Σ_{h∈O} x_h ŵ_h + Σ_{h∉O} x̂_h ŵ_h,     O empty for "int8"

    with Ŵ the kernel that `weight` stands for, x̂ the input in 8 bits with a scale per token, and O
    the `outlier_features`.

    Args:
      x: `[..., in]` floating point.
      weight: the kernel `[in, out]` in any format that `dequantize_kernel` takes. The products of a
        `QTensor` with scales per tensor, output or block of inputs and of an `LNQTensor` are taken
        on the codes (`quantized_matmul`); other kernels are dequantized first.
      activations: None, for the input as it is; "int8", for a product of integers; or "llm_int8",
        for one without outlier features (`llm_int8_matmul`). The latter two need a `QTensor`:
        "int8" a symmetric one if it has blocks, "llm_int8" one without blocks. Default None.
      threshold: from which size on an entry makes its feature an outlier. Default 6.
      max_outliers: static bound on the outlier features. Default: none.
      implementation: of `quantized_matmul`. Default: the best that the platform supports.

    Returns:
      y `[..., out]` in the type of `x`. Gradients pass to `x` (straight through its rounding) and
      to the scales and levels of `weight`.

    Raises:
      ValueError: sizes that do not match, an unknown `activations`, or a `weight` that they do not
        fit.
      TypeError: `x` is not floating point, or `weight` of no quantized format.

    It is what `jaxref.nn.QuantizedLinear` calls. Without `activations` only memory and its traffic
    are saved, which is what the speed of generation for few sequences hangs on; the integer
    products speed up large batches.

    Cost: in · out multiplications a token; the codes are read as they are, but formats without a
    product on codes are dequantized at each call.

    Example:
      >>> from jaxref.quantization import QuantSpec, quantize
      >>> spec = QuantSpec(bits=4, granularity="block", axis=0, block_size=2)
      >>> w = quantize(jnp.array([[7.0], [1.0], [0.7], [0.3]]), spec)
      >>> print(quantized_linear(jnp.ones((1, 4)), w))
      [[9.]]

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339.
    """
    x = jnp.asarray(x)
    check_floating(x=x)
    if activations not in _ACTIVATIONS:
        raise ValueError(f"activations must be one of {_ACTIVATIONS}, got {activations!r}")
    if activations is not None and not isinstance(weight, QTensor):
        raise ValueError(
            f"weight must be a QTensor for activations={activations!r}, got {type(weight).__name__}"
        )
    if activations == "llm_int8":
        return llm_int8_matmul(
            x,
            weight,
            threshold=threshold,
            max_outliers=max_outliers,
            implementation=implementation,
        )
    if isinstance(weight, LNQTensor):
        _check_kernel(weight.shape, x)
        return quantized_matmul(
            x,
            weight.values,
            jnp.ones((1, 1), weight.codebook.dtype),
            codebook=weight.codebook,
            bits=weight.bits,
            padding=weight.padding,
            implementation=implementation,
        )
    if not isinstance(weight, QTensor) or not _has_scales_of_outputs(weight):
        kernel = dequantize_kernel(weight)
        _check_kernel(kernel.shape, x)
        return (x @ kernel.astype(x.dtype)).astype(x.dtype)
    _check_kernel(weight.shape, x)
    if activations == "int8":
        x_q = quantize_rowwise(jax.lax.stop_gradient(x))
        return straight_through_matmul(x, None, x_q, weight, implementation).astype(x.dtype)
    return quantized_matmul(
        x,
        weight.values,
        weight.scale,
        zero_point=weight.zero_point,
        bits=weight.spec.bits,
        padding=weight.padding,
        block_size=weight.spec.block_size,
        implementation=implementation,
    )


def _has_scales_of_outputs(weight: QTensor) -> bool:
    """Whether inputs share a scale in one block or several."""
    per_output, in_blocks = (-1,), (-2,)
    axes = per_output if weight.spec.block_size is None else in_blocks
    return weight.spec.granularity == "tensor" or weight.spec.axes == axes


def _check_kernel(shape: tuple[int, ...], x: Array) -> None:
    if len(shape) != 2 or shape[:1] != x.shape[-1:]:
        inputs = x.shape[-1] if x.ndim else "in"
        raise ValueError(f"weight must have shape [{inputs}, out], got {shape}")
