"""GPTQ: rounding a layer's weights one input after the other, each error spread over the rest.

Kernels are `[in, out]` as in flax; the paper's W is the transpose. `round_with_feedback` is the
loop itself, for other formats and methods; `HessianState` gathers what it needs from the data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.packing import pack, values_per_byte
from jaxref.quantization.tensor import QTensor, QuantSpec
from jaxref.quantization.uniform import _per_entry, quantize

_LAZY = 128  # inputs whose errors reach the inputs behind them together
_HIGHEST = jax.lax.Precision.HIGHEST


class HessianState(NamedTuple):
    """Second moments of a layer's inputs so far.

    Attributes:
      sum: float32 `[in, in]`, Σ x xᵀ.
      count: int32, the inputs so far.

    Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, arXiv:2210.17323.
    """

    sum: Array
    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax


def hessian_init(features: int) -> HessianState:
    r"""The second moments before any input.

    Args:
      features: the layer's inputs, at least 1.

    Returns:
      A `HessianState` of zeros.

    Raises:
      ValueError: `features` below 1.

    Use it once for each layer that is to be calibrated.

    Cost: d_in² float32 numbers.

    Example:
      >>> hessian_init(4).sum.shape
      (4, 4)

    Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, arXiv:2210.17323.
    """
    check_interval(1, jnp.inf, features=features)
    return HessianState(jnp.zeros((features, features)), jnp.zeros((), jnp.int32))


def hessian_update(state: HessianState, inputs: ArrayLike) -> HessianState:
    r"""Adds a batch of a layer's inputs.

        sum += Σ x xᵀ,   count += the number of x

    Args:
      state: what has been gathered so far.
      inputs: floating point `[..., in]`: every vector along the last axis is one input x. None at
        all is allowed.

    Returns:
      The new `HessianState`. Memory is that of the matrix: the inputs need not be kept.

    Raises:
      ValueError: a last axis that is not the layer's.
      TypeError: `inputs` not floating point.

    Use it under jit, batch by batch; the states of parts of the data add up, leaf by leaf.

    Cost: d_in² multiplications an input; d_in² numbers of memory, however many inputs come.

    Example:
      >>> state = hessian_update(hessian_init(2), jnp.array([[1.0, 2.0], [3.0, 0.0]]))
      >>> print(state.sum, state.count)
      [[10.  2.]
       [ 2.  4.]] 2

    Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, arXiv:2210.17323.
    """
    check_floating(inputs=inputs)
    inputs = jnp.asarray(inputs)
    features = state.sum.shape[-1]
    if inputs.ndim == 0 or inputs.shape[-1] != features:
        raise ValueError(f"inputs must have shape [..., {features}], got {inputs.shape}")
    x = inputs.reshape(-1, features).astype(state.sum.dtype)
    return HessianState(state.sum + jnp.matmul(x.T, x, precision=_HIGHEST), state.count + len(x))


def hessian(state: HessianState) -> Array:
    r"""The Hessian of a layer's mean squared error in any one of its outputs' weights.

        H = 2/N Σ_{n≤N} x_n x_nᵀ,   1/N Σ_n (x_nᵀ (w - q))² = ½ (w - q)ᵀ H (w - q)

    Args:
      state: what has been gathered.

    Returns:
      float32 `[in, in]`; zeros if there was no input yet.

    Use it for whatever takes a `hessian`: `gptq_quantize` and its relatives.

    Cost: O(d_in²), one scaled copy.

    Example:
      >>> print(hessian(hessian_update(hessian_init(2), jnp.array([[1.0, 2.0], [3.0, 0.0]]))))
      [[10.  2.]
       [ 2.  4.]]

    Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, arXiv:2210.17323.
    """
    return state.sum * (2.0 / jnp.maximum(state.count, 1))


def gptq_quantize(
    weight: ArrayLike,
    hessian: ArrayLike,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
    static_groups: bool = False,
) -> QTensor:
    r"""Quantizes a kernel so that the layer's outputs, rather than its weights, change little.

    With H' = H + λ mean(diag H) I and U the upper triangular factor of its inverse, H'⁻¹ = Uᵀ U,
    the inputs j are rounded in turn, and those behind j make up for the error:

        q_j = round(w_j),   e_j = (w_j - q_j) / U_jj,   w_k ← w_k - U_jk e_j  for k > j

    where round takes each entry to the nearest level of the spec. Then Σ_j |e_j|² is the whole
    increase tr (W - Q)ᵀ H' (W - Q). Errors reach the inputs of the same 128 at once, and those
    behind them by one matrix product for all 128: the same numbers with less traffic.

    An input that is always 0 (H_jj = 0) is dead: its weights become 0, and it has no part in the
    mean over the diagonal.

    Args:
      weight: floating point `[in, out]`, finite.
      hessian: `[in, in]`, symmetric and positive semidefinite, as `hessian` gives it; its size is
        of no importance, as λ is relative. Fewer samples than inputs are fine with λ > 0.
      spec: format and granularity, a `QuantSpec`. Its axes are those of `weight`: "channel" with
        axis 1 for a scale per output, "block" with axis 0 for groups of inputs.
      damping: λ, at least 0. Default 0.01, the paper's.
      activation_order: whether the inputs are rounded in the order of falling H_jj rather than as
        they come, which helps most at few bits. Groups of inputs are then static. Default False.
      static_groups: whether the scales of groups of inputs ("block" with axis 0) are those of the
        kernel as it is, rather than of the group when its turn comes, with all errors so far made
        up for. All other scales are those of the kernel as it is. Default False, the paper's.

    Returns:
      A `QTensor` with the shape of `weight`.

    Raises:
      ValueError: shapes that do not fit, NaN or infinite entries, `damping` out of range, or a
        Hessian that even with damping is not positive definite (the latter and the entries are
        tested where the values are known; under jit they leave scales that are NaN).
      TypeError: `weight` or `hessian` not floating point, or `spec` not a `QuantSpec`.

    The standard choice at 3 and 4 bits with some calibration data; `quantize` needs none and is as
    good at 8 bits. `guided_gptq` weighs the outputs by what they do to the end loss, `baq_quantize`
    gives inputs unequal bits.

    Cost: O(d_in³ + d_in² d_out) a layer, one factorization and d_in steps in sequence; the data
    only as its Hessian, no gradients.

    Example:
      >>> x = jnp.array([[1.0, 0.9, 0.0], [0.8, 1.0, 1.0], [-1.0, -1.1, 2.0]])
      >>> w = jnp.array([[0.4], [0.4], [3.0]])
      >>> spec = QuantSpec(bits=3, granularity="channel", axis=1)
      >>> h = hessian(hessian_update(hessian_init(3), x))
      >>> print(gptq_quantize(w, h, spec).codes.T, quantize(w, spec).codes.T)
      [[0 1 3]] [[0 0 3]]

    Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, arXiv:2210.17323.
    """
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, got {type(spec).__name__}")
    spec = spec.resolve(2)
    weight, hessian = checked_with_hessian(weight, hessian)
    order = jnp.argsort(-jnp.diagonal(hessian)) if activation_order else None
    factor, dead = inverse_factor(hessian, damping, order=order)
    codes, scale, zero_point = _gptq(
        weight, factor, dead, order, spec, static_groups or activation_order
    )
    padding = -weight.shape[1] % values_per_byte(spec.bits)
    return QTensor(pack(codes, spec.bits), scale, zero_point, spec, weight.dtype, padding)


def checked_with_hessian(weight: ArrayLike, hessian: ArrayLike) -> tuple[Array, Array]:
    """A kernel `[in, out]` and the Hessian `[in, in]` of its inputs as arrays, both finite.

    >>> checked_with_hessian(jnp.ones((3, 2)), jnp.eye(2))
    Traceback (most recent call last):
      ...
    ValueError: hessian must have shape (3, 3), got (2, 2)
    """
    check_floating(weight=weight, hessian=hessian)
    weight, hessian = jnp.asarray(weight), jnp.asarray(hessian)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape [in, out], none of them 0, got {weight.shape}")
    check_shape((len(weight), len(weight)), hessian=hessian)
    check_finite(weight=weight, hessian=hessian)
    return weight, hessian.astype(compute_dtype(hessian))


def check_finite(**arrays: Array) -> None:
    """Raises ValueError unless every array whose values are known is finite.

    >>> check_finite(weight=jnp.array([1.0, jnp.nan]))
    Traceback (most recent call last):
      ...
    ValueError: weight must be finite, got NaN or infinite entries
    """
    for name, array in arrays.items():
        if not isinstance(array, jax.core.Tracer) and not jnp.all(jnp.isfinite(array)):
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def nan_unless_finite(x: Array, factor: Array) -> Array:
    """`x`, or NaN if a factor that was not tested under jit turns out to be of no use.

    >>> nan_unless_finite(jnp.ones(2), jnp.array([[jnp.nan]]))
    Array([nan, nan], dtype=float32)
    """
    return jnp.where(jnp.all(jnp.isfinite(factor)), x, jnp.nan)


def inverse_factor(
    hessian: Array, damping: float, *, order: Array | None = None
) -> tuple[Array, Array]:
    """U, upper triangular with `(H + λ mean(diag H) I)⁻¹ = Uᵀ U`, and which inputs are dead.

    Dead inputs, those with H_jj = 0, have U_jj = 1 and no part in the mean. With `order`, U is that
    of the inputs in that order; `dead` is as they come.

    Raises:
      ValueError: `damping` is negative, or the damped matrix is not positive definite.

    >>> inverse_factor(jnp.array([[4.0, 0.0], [0.0, 0.0]]), 0.0)[0]
    Array([[0.5, 0. ],
           [0. , 1. ]], dtype=float32)
    """
    check_interval(0, jnp.inf, damping=damping)
    factor, dead = _inverse_factor(hessian, damping, order)
    if not isinstance(factor, jax.core.Tracer) and not jnp.all(jnp.isfinite(factor)):
        raise ValueError(
            "hessian must be positive definite with its damping, got one that is not "
            f"for damping={damping}"
        )
    return factor, dead


@jax.jit
def _inverse_factor(hessian: Array, damping: float, order: Array | None) -> tuple[Array, Array]:
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    size = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    matrix = hessian + jnp.diag(jnp.where(dead, 1, damping * size))
    if order is not None:
        matrix = matrix[order][:, order]
    # With the inputs in reverse, Cholesky's lower factor is an upper one R, H = R Rᵀ and U = R⁻¹:
    # more accurate than to factor the inverse.
    upper = jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(upper), dtype=upper.dtype)), dead


def round_with_feedback(
    weight: Array,
    factor: Array,
    round_row: Callable[[Array, Array, Callable[[int], Array], Any], tuple[Array, Any]],
    carry: Any,
) -> tuple[Array, Array, Any]:
    """GPTQ's loop over the inputs, for any way to round one of them.

    Args:
      weight: `[in, out]`, in at least float32.
      factor: U `[in, in]`, as `inverse_factor` gives it.
      round_row: `round_row(j, row, ahead, carry) -> (rounded, carry)` rounds `row [out]`, the
        weights of input j once all errors before it are made up for; `ahead(n)` gives those of the
        n inputs from j on `[n, out]`, zeros where there are none any more.
      carry: what `round_row` hands on from input to input.

    Returns:
      The rounded weights, the errors `e_j = (w_j - q_j) / U_jj`, both `[in, out]`, and the last
      carry.

    >>> w, e, _ = round_with_feedback(
    ...     jnp.array([[0.5], [0.0]]),
    ...     jnp.array([[1.0, 2.0], [0.0, 1.0]]),
    ...     lambda j, row, ahead, carry: (jnp.floor(row), carry),
    ...     None,
    ... )
    >>> print(w.T, e.T)
    [[ 0. -1.]] [[0.5 0. ]]
    """
    inputs = len(weight)
    size = min(_LAZY, inputs)
    padding = -inputs % size
    weight = jnp.pad(weight, [(0, padding), (0, 0)])
    factor = jnp.pad(factor, [(0, padding), (0, padding)])

    def block(number: Array, loop: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        weight, all_errors, carry = loop
        start = number * size
        rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
        square = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)

        def step(i: Array, loop: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            own, errors, carry = loop

            def ahead(count: int) -> Array:
                later = jax.lax.dynamic_slice_in_dim(
                    jnp.pad(weight, [(0, count), (0, 0)]), start + i, count
                )
                reach = jax.lax.dynamic_slice_in_dim(
                    jnp.pad(rows, [(0, 0), (0, count)]), start + i, count, axis=1
                )
                return later - jnp.matmul(reach.T, errors, precision=_HIGHEST)

            rounded, carry = round_row(start + i, own[i], ahead, carry)
            error = (own[i] - rounded) / square[i, i]
            own = (own - square[i, :, None] * error).at[i].set(rounded)
            return own, errors.at[i].set(error), carry

        own = jax.lax.dynamic_slice_in_dim(weight, start, size)
        # Not as far as the padding, which has no factor.
        end = jnp.minimum(size, inputs - start)
        own, errors, carry = jax.lax.fori_loop(0, end, step, (own, jnp.zeros_like(own), carry))
        weight -= jnp.matmul(rows.T, errors, precision=_HIGHEST)
        weight = jax.lax.dynamic_update_slice_in_dim(weight, own, start, axis=0)
        all_errors = jax.lax.dynamic_update_slice_in_dim(all_errors, errors, start, axis=0)
        return weight, all_errors, carry

    loop = (weight, jnp.zeros_like(weight), carry)
    weight, errors, carry = jax.lax.fori_loop(0, len(weight) // size, block, loop)
    return weight[:inputs], errors[:inputs], carry


@functools.partial(jax.jit, static_argnames=("spec", "static_groups"))
def _gptq(
    weight: Array,
    factor: Array,
    dead: Array,
    order: Array | None,
    spec: QuantSpec,
    static_groups: bool,
) -> tuple[Array, Array, Array | None]:
    """Codes `[in, out]` as int8, scale and zero point."""
    weight = jnp.where(dead[:, None], 0, weight.astype(jnp.result_type(weight, factor)))
    codes = jnp.zeros(weight.shape, jnp.int8)
    scale, zero = _scale_and_zero(weight, spec)

    def to_codes(row: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
        code = jnp.clip(jnp.round(row / scale) + zero, *spec.code_range)
        return code.astype(jnp.int8), scale * (code - zero)

    if spec.block_size is None or spec.axes != (-2,) or static_groups:
        scales, zeros = (
            jnp.broadcast_to(_per_entry(groups, weight.shape, spec), weight.shape)
            for groups in (scale, zero)
        )
        position = jnp.arange(len(weight)) if order is None else order

        def round_row(j, row, ahead, codes):
            code, rounded = to_codes(row, scales[position[j]], zeros[position[j]])
            return rounded, codes.at[position[j]].set(code)

        _, _, codes = round_with_feedback(weight[position], factor, round_row, codes)
    else:
        group = min(spec.block_size, len(weight))
        columns = QuantSpec(
            bits=spec.bits, granularity="channel", axis=-1, symmetric=spec.symmetric
        )

        def round_row_of_group(j, row, ahead, carry):
            codes, scale, zero = carry

            def reached(scale, zero):
                new_scale, new_zero = _scale_and_zero(ahead(group), columns)
                return scale.at[j // group].set(new_scale[0]), zero.at[j // group].set(new_zero[0])

            scale, zero = jax.lax.cond(j % group == 0, reached, lambda *groups: groups, scale, zero)
            code, rounded = to_codes(row, scale[j // group], zero[j // group])
            return rounded, (codes.at[j].set(code), scale, zero)

        _, _, (codes, scale, zero) = round_with_feedback(
            weight, factor, round_row_of_group, (codes, scale, zero)
        )
    return codes, nan_unless_finite(scale, factor), None if spec.symmetric else zero


def _scale_and_zero(x: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """Those that `quantize` takes, with zeros if symmetric."""
    q = quantize(x, spec)
    zero = jnp.zeros(q.scale.shape, jnp.int8) if q.zero_point is None else q.zero_point
    return q.scale, zero
