"""BitNet b1.58: linear maps with the weights -1, 0 and 1, trained in that form."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.norms import layer_norm, rms_norm
from jaxref.quantization.int8 import (
    _check_column_scales,
    _check_kernel,
    quantize_rowwise,
    straight_through_matmul,
)
from jaxref.quantization.packing import pack, values_per_byte
from jaxref.quantization.tensor import QTensor, QuantSpec

_TRITS = 5  # to the byte: 3^5 = 243


def ternary_weight_quantize(
    w: ArrayLike, *, scale: Literal["median", "mean"] = "median", epsilon: float = 1e-5
) -> QTensor:
    r"""Rounds weights to -γ, 0 and γ, with one γ for all of them.

        γ = max(median|w|, ε)   or   γ = max(mean|w|, ε)
        code = clip(round(w / γ), -1, 1),   w ≈ γ code

    so that what is smaller than γ / 2 becomes 0: of normally distributed weights 26 % with the
    median, 31 % with the mean.

    Args:
      w: floating point, of any shape with axes: a kernel of a linear or convolutional layer.
      scale: "median" (default) or "mean". The median of an even number is the middle of the
        central two.
      epsilon: ε above 0, for kernels of which half is exactly zero (the others then become ±ε), or,
        with the mean, all. Default 1e-5.

    Returns:
      A `QTensor` with four codes to the byte and one scale: 2 bits per weight. `pack_trits` stores
      them in 1.6.

    Raises:
      ValueError: an unknown `scale`, an `epsilon` not above 0, no axis to pack along, or NaN or
        infinite entries (under jit those spoil the scale, and with it the tensor).
      TypeError: `w` is not floating point.

    A few large weights raise the mean, and the share of zeros with it, but leave the median where
    it is. `quantize` with 2 bits has the same codes for a scale of max|w|, which makes almost all
    weights 0. `bit_linear` trains through it.

    Cost: 2 bits a weight, no data; a sort of all weights for the median, a pass for the mean.

    Example:
      >>> q = ternary_weight_quantize(jnp.array([0.5, -0.75, 0.25, -9.0]))
      >>> print(q.codes, q.scale)
      [ 1 -1  0 -1] [0.625]

    Reference: Nielsen, Schneider-Kamp, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on
    Smaller Networks", 2024, arXiv:2407.09527; the mean is that of Ma et al., "The Era of 1-bit
    LLMs: All Large Language Models are in 1.58 Bits", 2024, arXiv:2402.17764.
    """
    w = jnp.asarray(w)
    codes, gamma = _ternary_codes(w, scale, epsilon)
    padding = -w.shape[-1] % values_per_byte(2) if w.ndim else 0
    return QTensor(pack(codes, 2), gamma, None, QuantSpec(bits=2), w.dtype, padding)


def bit_linear(
    x: ArrayLike,
    w: ArrayLike | QTensor,
    bias: ArrayLike | None = None,
    *,
    scale: Literal["median", "mean"] = "median",
    activation_bits: int = 8,
    norm: Literal["layer", "rms"] | None = "layer",
    epsilon: float = 1e-5,
) -> Array:
    r"""A linear map of inputs in 8 bits by weights of -1, 0 and 1.

        x' = norm(x),   s = max|x'| / (2^(b-1) - 1),   x̂ = s round(x' / s)   per token
        y = x̂ ŵ + bias,   ŵ = γ clip(round(w / γ), -1, 1)

    with γ as in `ternary_weight_quantize`, and the sum over the inputs one of integers. Gradients
    pass the roundings and clippings straight through: ∂L/∂x' = ∂L/∂y ŵᵀ and ∂L/∂w = x̂ᵀ ∂L/∂y. The
    weights w themselves stay floating point in training: optimizer, weight decay and checkpoints
    see those.

    Args:
      x: `[..., in]` floating point.
      w: kernel `[in, out]`; or, in inference, its `QTensor` from `ternary_weight_quantize`, which
        gives the same result and `scale` then plays no part.
      bias: `[out]`, not quantized. Default: 0.
      scale: γ from the "median" (default) or the "mean" of the magnitudes.
      activation_bits: b, 2 to 8. Default 8.
      norm: "layer" (default) or "rms": without gain or bias, over the inputs of each token. None:
        x is taken as it is, for a layer that has a norm before it.
      epsilon: ε above 0, that of the norm and the least γ. Default 1e-5.

    Returns:
      y `[..., out]` in the type of `x` (the common type with `w`, if an array).

    Raises:
      ValueError: sizes that do not match, an unknown `scale` or `norm`, `activation_bits` or
        `epsilon` out of range, or NaN or infinite entries where values can be tested.
      TypeError: `x`, `w` or `bias` is not floating point.

    Use it in place of all linear layers but embeddings and the output layer, from the first step
    of training on; `llm_int8_matmul` and the functions of this room quantize what is trained.
    `jaxref.nn.BitLinear` is the module.

    Cost: one int8 product, in training two floating-point ones in the backward pass; `w` that is an
    array is quantized at each call, with a sort for the median.

    Example:
      >>> x, w = jnp.array([[3.0, 1.0, -1.0, 1.0]]), jnp.array([[1.2], [-0.2], [-0.9], [1.1]])
      >>> print(bit_linear(x, w).round(3), bit_linear(x, ternary_weight_quantize(w)).round(3))
      [[2.828]] [[2.828]]

    Reference: Nielsen, Schneider-Kamp, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on
    Smaller Networks", 2024, arXiv:2407.09527.
    """
    x = jnp.asarray(x)
    check_floating(x=x)
    dtype = x.dtype
    if not isinstance(w, QTensor):
        w = jnp.asarray(w)
        check_floating(w=w)
        dtype = jnp.result_type(x, w)
    _check_kernel(w.shape, x.shape, "w")
    if bias is not None:
        check_floating(bias=bias)
        check_broadcastable(w.shape[1:], bias=bias)
    if norm not in ("layer", "rms", None):
        raise ValueError(f"norm must be 'layer', 'rms' or None, got {norm!r}")
    if norm is not None:
        x = (layer_norm if norm == "layer" else rms_norm)(x, epsilon=epsilon)
    x_q = quantize_rowwise(jax.lax.stop_gradient(x), bits=activation_bits)
    if isinstance(w, QTensor):
        _check_column_scales(w, "w")
        y = straight_through_matmul(x, None, x_q, w)
    else:
        codes, gamma = _ternary_codes(jax.lax.stop_gradient(w), scale, epsilon)
        # A byte per code, as they would be unpacked right away.
        y = straight_through_matmul(x, w, x_q, QTensor(codes, gamma, None, QuantSpec(), w.dtype))
    if bias is not None:
        y += bias
    return y.astype(dtype)


def pack_trits(codes: ArrayLike) -> Array:
    r"""Packs the codes -1, 0 and 1 along the last axis, five to the byte.

        byte_i = Σ_{j<5} (codes_{5 i + j} + 1) 3^j

    Args:
      codes: `[..., n]` integers in {-1, 0, 1}; what is outside is clipped.

    Returns:
      `[..., ceil(n / 5)]` uint8 below 243, the last byte filled up with codes 0: 1.6 bits per code,
      where the information in three equally frequent ones is 1.585.

    Raises:
      ValueError: codes without an axis to pack along.
      TypeError: `codes` are not integers.

    Use it for storage and transfer; a `QTensor` of 2 bits is quicker to unpack.

    Cost: O(n), 1.6 bits a code.

    Example:
      >>> pack_trits(jnp.array([1, 0, -1, -1, -1, 1]))
      Array([  5, 122], dtype=uint8)

    Reference: Nielsen, Schneider-Kamp, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on
    Smaller Networks", 2024, arXiv:2407.09527, for the codes; five trits to the byte are folklore.
    """
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype.name}")
    if codes.ndim == 0:
        raise ValueError("codes must have an axis to pack along, got shape ()")
    size = codes.shape[-1]
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -size % _TRITS)])
    digits = (jnp.clip(codes, -1, 1) + 1).astype(jnp.uint8)
    digits = digits.reshape(*codes.shape[:-1], -(-size // _TRITS), _TRITS)
    return jnp.sum(digits * _powers_of_three(), axis=-1, dtype=jnp.uint8)


def unpack_trits(values: ArrayLike, *, padding: int = 0) -> Array:
    """The codes that `pack_trits` packed.

    Args:
      values: `[..., m]` uint8 as `pack_trits` returns them.
      padding: how many of the last codes along the last axis only fill up the last byte, 0 to 4.

    Returns:
      `[..., 5 m - padding]` int8 in {-1, 0, 1}.

    Raises:
      ValueError: `padding` out of range, or values without axes.
      TypeError: `values` are not uint8.

    Use it when loading what `pack_trits` stored, before weights are multiplied; the codes of a
    `QTensor` are read by `unpack`.

    Cost: five divisions with remainder a byte.

    Example:
      >>> unpack_trits(jnp.array([5, 122], jnp.uint8), padding=4)
      Array([ 1,  0, -1, -1, -1,  1], dtype=int8)

    Reference: Nielsen, Schneider-Kamp, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on
    Smaller Networks", 2024, arXiv:2407.09527, for the codes; five trits to the byte are folklore.
    """
    values = jnp.asarray(values)
    if values.dtype != jnp.uint8:
        raise TypeError(f"values must be uint8, got {values.dtype.name}")
    if values.ndim == 0:
        raise ValueError("values must have an axis to unpack along, got shape ()")
    check_interval(0, _TRITS - 1, padding=padding)
    digits = values[..., None] // _powers_of_three() % 3
    codes = digits.astype(jnp.int8).reshape(*values.shape[:-1], values.shape[-1] * _TRITS) - 1
    return codes[..., : codes.shape[-1] - padding]


def _ternary_codes(w: Array, scale: str, epsilon: float) -> tuple[Array, Array]:
    """Codes (int8, not packed), and γ with as many axes."""
    check_floating(w=w)
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)
    if scale not in ("median", "mean"):
        raise ValueError(f"scale must be 'median' or 'mean', got {scale!r}")
    if not isinstance(w, jax.core.Tracer) and not jnp.all(jnp.isfinite(w)):
        raise ValueError("w must be finite, got NaN or infinite entries")
    wide = w.astype(compute_dtype(w))
    gamma = jnp.zeros((1,) * w.ndim, wide.dtype)
    if w.size:
        statistic = (jnp.median if scale == "median" else jnp.mean)(jnp.abs(wide))
        gamma = statistic.reshape(gamma.shape)
    gamma = jnp.maximum(gamma, epsilon)
    codes = jnp.clip(jnp.round(wide / gamma), -1, 1)
    return codes.astype(jnp.int8), gamma


def _powers_of_three() -> Array:
    return jnp.array([3**j for j in range(_TRITS)], jnp.uint8)
