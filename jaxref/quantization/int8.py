"""Products of quantized matrices in integers, and LLM.int8's decomposition for outlier features.

Inputs are `[..., in]` and kernels `[in, out]`, as in flax.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import canonical_axes, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.kernels import quantized_matmul
from jaxref.quantization.tensor import QTensor, QuantSpec
from jaxref.quantization.uniform import dequantize, quantize


def quantize_rowwise(
    x: ArrayLike, *, axis: int = -1, bits: int = 8, symmetric: bool = True
) -> QTensor:
    r"""Uniform quantization with a scale for every vector along an axis, one per token or column.

    For the vectors v along `axis`, with q = 2^(bits-1) - 1 and halves rounded to even,

        s = max|v| / q,   code = round(v / s)

    if symmetric; else the codes fit the range from the least to the largest entry of v, and 0.

    Args:
      x: floating point, `[..., n, ...]`.
      axis: the axis that shares a scale: -1 (default) gives every token of `[..., in]` its own, and
        0 or -2 every output of a kernel `[in, out]`, `[..., in, out]`.
      bits: 2 to 8. Default 8.
      symmetric: as in `QuantSpec`. Default True.

    Returns:
      A `QTensor` whose scale has size 1 along `axis`; a vector of zeros has codes 0.

    Raises:
      ValueError: `bits` or `axis` out of range, or NaN or infinite entries (under jit those spoil
        their vector).
      TypeError: `x` is not floating point.

    This is `quantize` with the spec that the two sides of `int8_matmul` need: row and column scales
    stand before the sum over the inputs, so they do not disturb it. Asymmetric suits activations
    that are mostly of one sign.

    Cost: two passes over `x`, for the ranges and the codes; one scale for each vector.

    Example:
      >>> q = quantize_rowwise(jnp.array([[127.0, -3.0], [0.5, -1.0]]))
      >>> print(q.codes)
      [[ 127   -3]
       [  64 -127]]

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339; per-token activations also in Nielsen,
    Schneider-Kamp, "BitNet b1.58 Reloaded", 2024, arXiv:2407.09527, and asymmetric in Yao, Wu, Li,
    Youn, He, "ZeroQuant-V2", 2023, arXiv:2303.08302.
    """
    x = jnp.asarray(x)
    (shared,) = canonical_axes(axis, x.ndim)
    others = tuple(a for a in range(x.ndim) if a != shared)
    if not others:
        return quantize(x, QuantSpec(bits=bits, symmetric=symmetric))
    spec = QuantSpec(bits=bits, granularity="channel", axis=others, symmetric=symmetric)
    return quantize(x, spec)


def int8_matmul(
    x_q: QTensor,
    w_q: QTensor,
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""The product of a quantized input and a quantized kernel, summed in integers.

        y_{t,o} = s_t s_o Σ_h (code_{t,h} - z_t) (code_{h,o} - z_o)

    with one scale s_t per token and one s_o per output (vector-wise quantization), or one for all;
    if symmetric, also one per block of inputs and output, whose sums are scaled before they are
    added up. Sums are exact, of type int32; nothing is rounded but the scalings.

    Args:
      x_q: a `QTensor` of shape `[..., in]` with scale `[..., 1]`: `quantize_rowwise(x)`.
      w_q: a `QTensor` of shape `[in, out]` with scale `[1, out]` or `[1, 1]`, such as
        `quantize_rowwise(w, axis=0)`, or with blocks along axis 0. Any number of bits.
      dtype: floating-point type of the result. Default: the common type of what was quantized.
      implementation: of `jaxref.kernels.quantized_matmul`, for two symmetric sides; XLA computes
        with zero points. Default: the best that the platform supports.

    Returns:
      y `[..., out]`. Differentiable in the scales, as the product of the dequantized two.

    Raises:
      ValueError: sizes that do not match, scales that vary along the inputs otherwise, zero points
        beside blocks, or so many inputs (of a block) that int32 may overflow: from 133145 on for
        two symmetric sides of 8 bits.
      TypeError: arguments that are not `QTensor`s, or a `dtype` that is not floating point.

    Use it where both sides are quantized; `llm_int8_matmul` quantizes them itself, and keeps
    outliers out.

    Cost: in · out integer multiplications a token; a byte or less of memory is read for each
    weight, and no floating-point copy is made.

    Example:
      >>> x, w = jnp.array([[127.0, -3.0]]), jnp.array([[1.0, 2.0], [127.0, -127.0]])
      >>> print(int8_matmul(quantize_rowwise(x), quantize_rowwise(w, axis=0)))
      [[-254.  635.]]

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339.
    """
    for name, q in (("x_q", x_q), ("w_q", w_q)):
        if not isinstance(q, QTensor):
            raise TypeError(f"{name} must be a QTensor, got {type(q).__name__}")
    dtype = jnp.dtype(jnp.promote_types(x_q.dtype, w_q.dtype) if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type, got {dtype.name}")
    _check_kernel(w_q.shape, x_q.shape, "w_q")
    inputs = w_q.shape[0]
    if x_q.scale.shape[-1:] != (1,):
        raise ValueError(f"x_q must have a scale of shape [..., 1], got {x_q.scale.shape}")
    if w_q.spec.block_size is None or w_q.spec.axes != (-2,):
        _check_column_scales(w_q, "w_q")
    if w_q.spec.block_size is None and inputs * _reach(x_q) * _reach(w_q) >= 2**31:
        raise ValueError(f"x_q must have fewer inputs for a sum in int32, got {inputs}")
    if x_q.zero_point is None and w_q.zero_point is None:
        return quantized_matmul(
            x_q.codes,
            w_q.values,
            w_q.scale,
            x_scale=x_q.scale,
            bits=w_q.spec.bits,
            padding=w_q.padding,
            block_size=w_q.spec.block_size,
            dtype=dtype,
            implementation=implementation,
        )
    _check_column_scales(w_q, "w_q")
    x_codes, w_codes = x_q.codes, w_q.codes
    total = jnp.matmul(x_codes, w_codes, preferred_element_type=jnp.int32)
    if w_q.zero_point is not None:
        x_sum = jnp.sum(x_codes, axis=-1, keepdims=True, dtype=jnp.int32)
        total -= x_sum * w_q.zero_point[0]
    if x_q.zero_point is not None:
        w_sum = jnp.sum(w_codes, axis=0, keepdims=True, dtype=jnp.int32)
        if w_q.zero_point is not None:
            w_sum -= inputs * w_q.zero_point.astype(jnp.int32)
        total -= x_q.zero_point * w_sum[0]
    return (total.astype(x_q.scale.dtype) * x_q.scale * w_q.scale[0]).astype(dtype)


def outlier_features(x: ArrayLike, *, threshold: float = 6.0) -> Array:
    r"""Which features of the input have an outlier.

        O = { h : max_t |x_{t,h}| ≥ threshold }

    Args:
      x: `[..., in]` floating point; the maximum is over all axes but the last.
      threshold: at least 0; infinity finds none. Default 6, the paper's.

    Returns:
      Boolean `[in]`.

    Raises:
      ValueError: a negative `threshold`, or NaN, or an `x` without axes.
      TypeError: `x` is not floating point.

    `llm_int8_matmul` takes these out of its integer product; `emergent_outlier_statistics` finds
    those that persist through a model.

    Cost: one pass over `x`.

    Example:
      >>> print(outlier_features(jnp.array([[0.5, -7.0], [1.0, 0.0]])))
      [False  True]

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339.
    """
    _check_threshold(threshold)
    return _feature_size(x) >= threshold


def llm_int8_matmul(
    x: ArrayLike,
    w: ArrayLike | QTensor,
    *,
    threshold: float = 6.0,
    max_outliers: int | None = None,
    implementation: str | None = None,
) -> Array:
    r"""LLM.int8's product: outlier features as they are, everything else in 8 bits.

    With O the `outlier_features` of x, which are few but large,

        y = Σ_{h∈O} x_h w_h  +  Σ_{h∉O} x̂_h ŵ_h

    where x̂ has a scale per token and ŵ one per output, both of them found without the features in
    O. The second sum is one of integers. Gradients are those of the product of what stands there,
    the roundings passed straight through.

    Args:
      x: `[..., in]` floating point.
      w: kernel `[in, out]`, or that kernel as a `QTensor` with scale `[1, out]` or `[1, 1]`: it
        takes a quarter of the memory, its rows in O are dequantized for the first sum, and its
        scales are those of all rows, outliers included.
      threshold: from which size on an entry makes its feature one of O, at least 0; 0 and infinity
        do without decomposition. Default 6, the paper's.
      max_outliers: static bound on the size of O, for which the features of the largest entries are
        taken; the first sum then is over so many gathered rows. Default: none, with a first sum
        over all features, all but O being 0: exact, but as expensive as the float product.
      implementation: of `jaxref.kernels.quantized_matmul`, for the integer product. Default: the
        best that the platform supports.

    Returns:
      y `[..., out]` in the type of `x` (the common type with `w`, if an array).

    Raises:
      ValueError: sizes that do not match, a negative `threshold` or `max_outliers`, scales of `w`
        that vary along the inputs, or entries of w, or of x outside of O, that are NaN or infinite.
        Under jit those spoil their output, or token.
      TypeError: `x` or `w` is not floating point.

    Use it for the linear layers of large trained transformers, in which few features are 20 times
    larger than the rest and leave few of the 255 levels to it. `int8_matmul` takes what is
    quantized already.

    Cost: the integer product and a float one, over `max_outliers` inputs or, without it, over all;
    a `w` that is an array is quantized at each call.

    Example:
      >>> x = jnp.array([[0.5, 100.0, -0.25]])
      >>> w = jnp.array([[1.0], [0.01], [-2.0]])
      >>> print(x @ w, llm_int8_matmul(x, w).round(3), llm_int8_matmul(x, w, threshold=0).round(3))
      [[2.]] [[2.008]] [[2.368]]

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339.
    """
    _check_threshold(threshold)
    x = jnp.asarray(x)
    check_floating(x=x)
    if isinstance(w, QTensor):
        _check_kernel(w.shape, x.shape, "w")
        _check_column_scales(w, "w")
        dtype = x.dtype
    else:
        w = jnp.asarray(w)
        check_floating(w=w)
        _check_kernel(w.shape, x.shape, "w")
        dtype = jnp.result_type(x, w)
    inputs = w.shape[0]
    if max_outliers is not None:
        check_interval(0, jnp.inf, max_outliers=max_outliers)
    if threshold in (0, math.inf) or max_outliers == 0:
        return _int8_linear(x, w, implementation).astype(dtype)
    size = jax.lax.stop_gradient(_feature_size(x))
    if max_outliers is None:
        is_outlier = size >= threshold
        outliers, rows = jnp.where(is_outlier, x, 0), w
    else:
        largest, features = jax.lax.top_k(size, min(max_outliers, inputs))
        found = largest >= threshold
        is_outlier = jnp.zeros(inputs, bool).at[features].set(found)
        outliers = jnp.where(found, x[..., features], 0)
        if isinstance(w, QTensor):
            rows = dataclasses.replace(w, values=w.values[features])
        else:
            rows = w[features]
    if isinstance(rows, QTensor):
        rows = dequantize(rows, dtype=x.dtype)
    y = jnp.matmul(outliers, rows, preferred_element_type=compute_dtype(x, rows))
    inliers = w if isinstance(w, QTensor) else jnp.where(is_outlier[:, None], 0, w)
    return (y + _int8_linear(jnp.where(is_outlier, 0, x), inliers, implementation)).astype(dtype)


class OutlierStatistics(NamedTuple):
    """Where features are outliers in the hidden states of a model, all `[features]`.

    Attributes:
      layer_fraction: the share of layers with at least one outlier in this feature.
      token_fraction: the share of positions, over all layers, that are outliers.
      largest: the largest magnitude.
      systematic: whether both shares reach their bounds.

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339.
    """

    layer_fraction: Array
    token_fraction: Array
    largest: Array
    systematic: Array


def emergent_outlier_statistics(
    hidden_states: ArrayLike,
    *,
    threshold: float = 6.0,
    min_layer_fraction: float = 0.25,
    min_token_fraction: float = 0.06,
) -> OutlierStatistics:
    r"""Which features of a model are outliers throughout its layers and positions.

    For the hidden states X_l, l = 1 ... L, with T positions each,

        layer_fraction_h = |{ l : max_t |X_{l,t,h}| ≥ threshold }| / L
        token_fraction_h = |{ (l, t) : |X_{l,t,h}| ≥ threshold }| / (L T)

    and a feature is systematic where both are at least their bounds.

    Args:
      hidden_states: `[layers, ..., features]` floating point: the inputs of the linear layers, with
        any axes of positions between.
      threshold: at least 0. Default 6.
      min_layer_fraction: in [0, 1]. Default 0.25.
      min_token_fraction: in [0, 1]. Default 0.06.

    Returns:
      `OutlierStatistics`.

    Raises:
      ValueError: fewer than two axes, an empty one, or a bound out of range.
      TypeError: `hidden_states` are not floating point.

    Use it to see whether a model needs `llm_int8_matmul`, and how large `max_outliers` must be: the
    paper finds at most 7 systematic features in models of up to 13 billion parameters.

    Cost: a few passes over the hidden states of all layers, which are in memory together.

    Example:
      >>> x = jnp.zeros((4, 10, 3)).at[1:, :, 2].set(-20.0).at[0, 0, 0].set(7.0)
      >>> statistics = emergent_outlier_statistics(x)
      >>> print(statistics.layer_fraction, statistics.token_fraction, statistics.systematic)
      [0.25 0.   0.75] [0.025 0.    0.75 ] [False False  True]

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339.
    """
    _check_threshold(threshold)
    check_interval(
        0, 1, min_layer_fraction=min_layer_fraction, min_token_fraction=min_token_fraction
    )
    x = jnp.asarray(hidden_states)
    check_floating(hidden_states=x)
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"hidden_states must have shape [layers, ..., features] and entries, got {x.shape}"
        )
    x = jnp.abs(x.reshape(x.shape[0], -1, x.shape[-1]))
    is_outlier = x >= threshold
    layer_fraction = jnp.mean(jnp.any(is_outlier, axis=1), axis=0, dtype=jnp.float32)
    token_fraction = jnp.mean(is_outlier, axis=(0, 1), dtype=jnp.float32)
    systematic = (layer_fraction >= min_layer_fraction) & (token_fraction >= min_token_fraction)
    return OutlierStatistics(layer_fraction, token_fraction, jnp.max(x, axis=(0, 1)), systematic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def straight_through_matmul(
    x: Array, w: Array | None, x_q: QTensor, w_q: QTensor, implementation: str | None = None
) -> Array:
    """`int8_matmul(x_q, w_q)`, in the type of the scale, with its gradients passed on to x and w.

    That is, those of the product of the dequantized two, also as gradients of x and w. Their codes
    are all that is kept for the backward pass. `w` is None for a kernel that is given quantized.
    """
    return int8_matmul(x_q, w_q, dtype=x_q.scale.dtype, implementation=implementation)


def _straight_through_forward(x, w, x_q, w_q, implementation):
    y = straight_through_matmul(x, w, x_q, w_q, implementation)
    return y, (None if w is None else (), x_q, w_q)


def _straight_through_backward(_, residuals, gradient):
    latent, x_q, w_q = residuals
    x, to_x_scale = jax.vjp(lambda q: dequantize(q, dtype=gradient.dtype), x_q)
    w, to_w_scale = jax.vjp(lambda q: dequantize(q, dtype=gradient.dtype), w_q)
    x_gradient, w_gradient = jax.vjp(jnp.matmul, x, w)[1](gradient)
    return (
        x_gradient.astype(x_q.dtype),
        None if latent is None else w_gradient.astype(w_q.dtype),
        *to_x_scale(x_gradient),
        *to_w_scale(w_gradient),
    )


straight_through_matmul.defvjp(_straight_through_forward, _straight_through_backward)


def _int8_linear(x: Array, w: Array | QTensor, implementation: str | None) -> Array:
    """x w with both sides in 8 bits, vector-wise, in at least float32."""
    x_q = quantize_rowwise(jax.lax.stop_gradient(x))
    if isinstance(w, QTensor):
        return straight_through_matmul(x, None, x_q, w, implementation)
    w_q = quantize_rowwise(jax.lax.stop_gradient(w), axis=0)
    return straight_through_matmul(x, w, x_q, w_q, implementation)


def _feature_size(x: ArrayLike) -> Array:
    """The largest magnitude of every feature, `[in]`."""
    x = jnp.asarray(x)
    check_floating(x=x)
    if x.ndim == 0:
        raise ValueError("x must have shape [..., in], got ()")
    return jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1)), initial=0)


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")


def _check_kernel(kernel: tuple[int, ...], x: tuple[int, ...], name: str) -> None:
    if len(kernel) != 2 or kernel[:1] != x[-1:]:
        inputs = x[-1] if x else "in"
        raise ValueError(f"{name} must have shape [{inputs}, out], got {kernel}")


def _check_column_scales(q: QTensor, name: str) -> None:
    if q.scale.shape not in ((1, 1), (1, q.shape[1])):
        raise ValueError(f"{name} must have a scale of shape [1, out], got {q.scale.shape}")


def _reach(q: QTensor) -> int:
    """The largest magnitude of code - zero_point."""
    return q.spec.code_range[1] if q.spec.symmetric else 2**q.spec.bits - 1
