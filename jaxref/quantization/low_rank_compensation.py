"""LoRC: what quantization took from a kernel, given back in part by a product of low rank."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.int8 import quantize_rowwise
from jaxref.quantization.tensor import QTensor
from jaxref.quantization.uniform import dequantize


def low_rank_compensation(
    weight: ArrayLike,
    weight_quantized: ArrayLike | QTensor,
    *,
    rank: int = 8,
    factor_bits: int | None = None,
) -> tuple[Array | QTensor, Array | QTensor]:
    r"""The two factors of the best approximation of a given rank to the error of quantization.

    With the singular values S_1 ≥ S_2 ≥ ... of

        E = W - Ŵ = U S Vᵀ,   A = U_m √S_m,   B = √S_m V_mᵀ

    no A B of rank m comes closer to E, in the Frobenius norm or in the spectral norm, and

        ‖W - (Ŵ + A B)‖_F² = Σ_{i>m} S_i²

    Args:
      weight: W `[..., in, out]` floating point: kernels before quantization. The paper's matrices
        are their transposes.
      weight_quantized: Ŵ, of the same shape, by any method: a `QTensor`, or an array that is
        dequantized already.
      rank: m at least 0; above min(in, out) it is that, and Ŵ + A B = W. Default 8; 4 to 16 in the
        paper.
      factor_bits: 2 to 8 bits for A and B too, with a scale for each of the columns of either. 8
        costs no accuracy. Default: factors in the type of `weight`.

    Returns:
      A `[..., in, m]` and B `[..., m, out]`, arrays or `QTensor`s. They add m (in + out) numbers to
      the in · out codes of Ŵ. Zero if E is.

    Raises:
      ValueError: shapes that do not match, fewer than two axes, a negative `rank`, `factor_bits`
        out of range, or NaN or infinite entries in either matrix (under jit those give NaN).
      TypeError: `weight` or an array as `weight_quantized` is not floating point.

    Use it last, whatever has quantized the weights, where 4 bits or fewer have left an error.
    `compensated_matmul` applies the factors.

    Cost: a singular value decomposition, O(in out min(in, out)) a kernel; m (in + out) numbers more
    to store, no data.

    Example:
      >>> from jaxref.quantization import QuantSpec, quantize
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> q = quantize(w, QuantSpec(bits=4, granularity="channel", axis=1))
      >>> errors = []
      >>> for rank in (0, 8, 64):
      ...     a, b = low_rank_compensation(w, q, rank=rank)
      ...     errors.append(float(jnp.linalg.norm(w - dequantize(q) - a @ b)))
      >>> print(f"{errors[1] / errors[0]:.2f} {errors[2] / errors[0]:.2f}")
      0.78 0.00

    Reference: Yao, Wu, Li, Youn, He, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs
    from Comprehensive Study to Low Rank Compensation", 2023, arXiv:2303.08302.
    """
    weight = jnp.asarray(weight)
    check_floating(weight=weight)
    if weight.ndim < 2:
        raise ValueError(f"weight must have shape [..., in, out], got {weight.shape}")
    check_interval(0, jnp.inf, rank=rank)
    wide = compute_dtype(weight)
    if isinstance(weight_quantized, QTensor):
        weight_quantized = dequantize(weight_quantized, dtype=wide)
    check_floating(weight_quantized=weight_quantized)
    check_shape(weight.shape, weight_quantized=weight_quantized)
    for name, value in (("weight", weight), ("weight_quantized", weight_quantized)):
        if not isinstance(value, jax.core.Tracer) and not jnp.all(jnp.isfinite(value)):
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    error = weight.astype(wide) - jnp.asarray(weight_quantized, wide)
    left, sizes, right = jnp.linalg.svd(error, full_matrices=False)
    root = jnp.sqrt(sizes[..., :rank])
    a = (left[..., :rank] * root[..., None, :]).astype(weight.dtype)
    b = (root[..., None] * right[..., :rank, :]).astype(weight.dtype)
    if factor_bits is None:
        return a, b
    a_q, b_q = (quantize_rowwise(factor, axis=-2, bits=factor_bits) for factor in (a, b))
    return a_q, b_q


def compensated_matmul(
    x: ArrayLike, weight: ArrayLike | QTensor, a: ArrayLike | QTensor, b: ArrayLike | QTensor
) -> Array:
    r"""The product with a quantized kernel and its compensation, without forming their sum.

        y = x Ŵ + (x A) B

    Args:
      x: `[..., in]` floating point.
      weight: Ŵ `[in, out]`, a `QTensor` or an array.
      a: A `[in, m]` of `low_rank_compensation`, an array or a `QTensor`.
      b: B `[m, out]`, the same.

    Returns:
      y `[..., out]` in the type of `x`. Differentiable in all that is floating point.

    Raises:
      ValueError: shapes that do not match.
      TypeError: an argument is neither floating point nor a `QTensor`.

    Use it in place of the linear layer. To add A B to the dequantized kernel once gives the same
    product, and takes the memory of a kernel that was never quantized.

    Cost: m (in + out) multiplications a token beside in · out; `QTensor`s are dequantized at each
    call.

    Example:
      >>> w = jnp.array([[2.0, 1.0], [1.0, -3.0]])
      >>> rounded = jnp.array([[2.0, 0.0], [0.0, -2.0]])
      >>> a, b = low_rank_compensation(w, rounded, rank=2)
      >>> y = compensated_matmul(jnp.array([[1.0, 1.0]]), rounded, a, b)
      >>> print(y.round().astype(int))
      [[ 3 -2]]

    Reference: Yao, Wu, Li, Youn, He, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs
    from Comprehensive Study to Low Rank Compensation", 2023, arXiv:2303.08302.
    """
    x = jnp.asarray(x)
    check_floating(x=x)
    weight, a, b = (
        dequantize(value, dtype=x.dtype) if isinstance(value, QTensor) else value
        for value in (weight, a, b)
    )
    check_floating(weight=weight, a=a, b=b)
    inputs, outputs = x.shape[-1:], jnp.shape(weight)[1:]
    check_shape((*inputs, *outputs), weight=weight)
    ranks = jnp.shape(a)[1:]
    check_shape((*inputs, *ranks), a=a)
    check_shape((*ranks, *outputs), b=b)
    weight, a, b = (jnp.asarray(value, x.dtype) for value in (weight, a, b))
    return x @ weight + (x @ a) @ b


def sensitivity_class(perplexity_difference: ArrayLike) -> Array:
    r"""How much a model suffers from a format: the study's classes 1, 2 and 3.

        1: Δ ≤ 0.1,   2: 0.1 < Δ ≤ 0.5,   3: 0.5 < Δ

    Args:
      perplexity_difference: Δ `[...]`: the mean perplexity over the evaluation sets with
        quantization less that without.

    Returns:
      int32 `[...]`. NaN, for a model that diverged, is of class 3.

    Use it to choose the bits of weights and activations: the study finds weights of 8 bits in class
    1 for all its models, but activations of 8 bits in class 3 for the largest ones, where
    asymmetric codes by token (`quantize_rowwise(x, symmetric=False)`) do better than symmetric.

    Cost: elementwise; the perplexities take an evaluation with the format and one without.

    Example:
      >>> sensitivity_class(jnp.array([-0.01, 0.3, 7.0]))
      Array([1, 2, 3], dtype=int32)

    Reference: Yao, Wu, Li, Youn, He, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs
    from Comprehensive Study to Low Rank Compensation", 2023, arXiv:2303.08302.
    """
    difference = jnp.asarray(perplexity_difference)
    return 3 - (difference <= 0.5).astype(jnp.int32) - (difference <= 0.1).astype(jnp.int32)
