"""Bits where they matter: how many levels each input of a layer deserves, and GPTQ with those.

Kernels are `[in, out]` as in flax; the paper's W is the transpose, so that its columns are the
inputs here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.gptq import (
    checked_with_hessian,
    inverse_factor,
    nan_unless_finite,
    round_with_feedback,
)

_MOST_LEVELS = 2**16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BAQTensor:
    """A kernel `[in, out]` whose inputs have unequal numbers of levels.

    A pytree; `baq_quantize` makes one and `baq_dequantize` gives the kernel back.

    Attributes:
      codes: uint16 `[in, out]`, from 0 to `levels - 1` of their row.
      levels: int32 `[in]`, n_j: how many levels the weights of input j have.
      low, high: `[out]`, the range of each output, which includes 0.
      dtype: the floating-point type to dequantize to.

    Reference: Zhang et al., "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
    2025, arXiv:2506.05664.
    """

    codes: Array
    levels: Array
    low: Array
    high: Array
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """The memory of the arrays, two bytes a code: what an entropy coder needs is less."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> Array:
        """The mean of log2(n_j), the paper's measure, without `levels` and the ranges.

        Those cost an integer for each input and two numbers for each output. Codes whose number of
        levels is no power of two come to this size in mixed radix only.
        """
        return jnp.mean(jnp.log2(self.levels.astype(jnp.float32)), axis=-1)


def optimal_bit_allocation(
    sensitivity: ArrayLike,
    mean_bits: float,
    *,
    weights: ArrayLike | None = None,
    min_bits: float = 0.0,
) -> Array:
    r"""The bits for each component that make the sum of their losses least.

    Quantizing component i to R_i bits costs c_i 4^(-R_i). Among all R with the mean R̄,

        R_i = R̄ + ½ log2(c_i / GM(c)),   GM(c) = exp(mean log c)

    is best: every component then loses the same GM(c) 4^(-R̄). Components that would get less than
    `min_bits` get that, and the others share what is left in the same way (reverse water-filling).

    Args:
      sensitivity: c, at least 0, floating point `[..., components]`.
      mean_bits: R̄ above 0 and at least `min_bits`.
      weights: how much each component counts in the means, above 0, such as its number of entries;
        broadcastable to `sensitivity`. Default: all the same. The loss of component i is then
        weights_i c_i 4^(-R_i).
      min_bits: the least R_i. Default 0; something far below 0 for the formula alone.

    Returns:
      R, real numbers, with the shape and type of `sensitivity`. A component with c = 0 gets
      `min_bits`, unless all are 0, which all get R̄.

    Raises:
      ValueError: `mean_bits` or a known sensitivity or weight out of range.
      TypeError: `sensitivity` not floating point.

    Use it for any group of things that share a budget: inputs, channels, layers. `baq_levels` turns
    measured losses into whole numbers of levels.

    Cost: one sort of the components, O(n log n).

    Example:
      >>> print(optimal_bit_allocation(jnp.array([1.0, 4.0, 16.0]), 3))
      [2. 3. 4.]

    Reference: Zhang et al., "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
    2025, arXiv:2506.05664.
    """
    c, weights = _checked(sensitivity, weights)
    check_interval(0, jnp.inf, closed="right", mean_bits=mean_bits)
    check_interval(-jnp.inf, mean_bits, min_bits=min_bits)
    return _water_filling(_log2(c) / 2, c > 0, mean_bits, weights, min_bits).astype(
        jnp.result_type(sensitivity)
    )


def allocation_gain(sensitivity: ArrayLike, *, weights: ArrayLike | None = None) -> Array:
    r"""How much smaller the best allocation of bits makes the loss, against equal bits.

        Σ c_i 4^(-R_i) / Σ c_i 4^(-R̄) = GM(c) / AM(c) ≤ 1

    the geometric over the arithmetic mean, whatever R̄ is: for `optimal_bit_allocation` as long as
    no component ends at its `min_bits`.

    Args:
      sensitivity: c, at least 0, floating point `[..., components]`.
      weights: as in `optimal_bit_allocation`.

    Returns:
      `[...]`: 1 if all are the same (also if all are 0), 0 if some but not all are 0.

    Raises:
      ValueError: a known sensitivity or weight out of range.
      TypeError: `sensitivity` not floating point.

    Use it to see whether unequal bits are worth while for a layer before quantizing it.

    Cost: one pass over the components.

    Example:
      >>> print(allocation_gain(jnp.array([1.0, 4.0, 16.0])))
      0.5714286

    Reference: Zhang et al., "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
    2025, arXiv:2506.05664.
    """
    c, weights = _checked(sensitivity, weights)
    largest = jnp.max(c, axis=-1, keepdims=True, initial=0.0)
    c = c / jnp.where(largest > 0, largest, 1)
    total = jnp.sum(weights, axis=-1)
    arithmetic = jnp.sum(weights * c, axis=-1) / total
    geometric = jnp.exp2(jnp.sum(weights * _log2(c), axis=-1) / total)
    geometric = jnp.where(jnp.all(c > 0, axis=-1), geometric, 0)
    some = arithmetic > 0
    gain = jnp.where(some, geometric / jnp.where(some, arithmetic, 1), 1)
    return gain.astype(jnp.result_type(sensitivity))


def hessian_sensitivity(weight: ArrayLike, hessian: ArrayLike, *, damping: float = 0.01) -> Array:
    r"""What the weights of each input of a layer cost per 4^(-bits), by the theory of noise.

        c_j = Σ_i (max_i - min_i)² / (24 U_jj²),   (H + λ mean(diag H) I)⁻¹ = Uᵀ U

    for levels that divide the range of output i into equal steps, whose errors are spread evenly
    over a step and are fed back as in GPTQ; ranges include 0.

    Args:
      weight: floating point `[in, out]`, finite.
      hessian: `[in, in]` as `jaxref.quantization.hessian` gives it.
      damping: λ, at least 0. Default 0.01.

    Returns:
      c `[in]` in at least float32; 0 for an input that is always 0.

    Raises:
      ValueError: shapes that do not fit, NaN or infinite entries, `damping` out of range, or a
        Hessian that even with damping is not positive definite.
      TypeError: `weight` or `hessian` not floating point.

    Use it with `optimal_bit_allocation` where one pass must do; `baq_quantize` measures the losses
    instead, in a first pass.

    Cost: O(d_in³) for the factor of the inverse Hessian, and one pass over the weight.

    Example:
      >>> w, h = jnp.array([[3.0], [-1.0]]), jnp.diag(jnp.array([3.0, 12.0]))
      >>> print(hessian_sensitivity(w, h, damping=0.0).round(4))
      [2. 8.]

    Reference: Zhang et al., "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
    2025, arXiv:2506.05664.
    """
    weight, hessian = checked_with_hessian(weight, hessian)
    factor, dead = inverse_factor(hessian, damping)
    weight = jnp.where(dead[:, None], 0, weight.astype(jnp.result_type(weight, factor)))
    low, high = _ranges(weight)
    return jnp.where(dead, 0, jnp.sum((high - low) ** 2) / (24 * jnp.diagonal(factor) ** 2))


def baq_levels(column_losses: ArrayLike, reference_bits: float, *, exponent: float = 1.95) -> Array:
    r"""How many levels each input deserves, from what each lost with equal bits.

        n_j = round(2^{R_j}),   R_j = R̄ + log2(l_j / GM(l)) / θ

    the allocation of `optimal_bit_allocation` for losses that fall as 2^(-θ R), with at least one
    level for each. Levels rather than bits: n_j need not be a power of two.

    Args:
      column_losses: l, at least 0, floating point `[..., in]`: what each input's weights lost, all
        with the same number of bits. Their size is of no importance.
      reference_bits: R̄ above 0, the bits that the inputs shall have in the mean.
      exponent: θ above 0. Default 1.95, the paper's, found by experiment; theory says 2.

    Returns:
      n int32 `[..., in]`, from 1 to 65536. The mean of log2(n) is R̄ up to the rounding.

    Raises:
      ValueError: an argument, or a known loss, out of range.
      TypeError: `column_losses` not floating point.

    Use it with losses of any first pass; `baq_quantize` does both passes. Where an input would get
    less than one level, the authors' program gives it one and lets the mean rise above R̄; here the
    others make up for it.

    Cost: one sort of the inputs.

    Example:
      >>> print(baq_levels(jnp.array([1.0, 4.0, 16.0]), 3, exponent=2))
      [ 4  8 16]

    Reference: Zhang et al., "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
    2025, arXiv:2506.05664.
    """
    losses, _ = _checked(column_losses, None, name="column_losses")
    check_interval(0, jnp.inf, closed="right", reference_bits=reference_bits)
    check_interval(0, jnp.inf, closed="right", exponent=exponent)
    return _levels(losses, reference_bits, exponent)


def baq_quantize(
    weight: ArrayLike,
    hessian: ArrayLike,
    mean_bits: float,
    *,
    damping: float = 0.01,
    exponent: float = 1.95,
) -> BAQTensor:
    r"""GPTQ with a number of levels for each input that is chosen for it.

    A first pass with round(2^R̄) levels for every input measures l_j = ½ Σ_i e_ji², with the errors
    e of `gptq_quantize`. `baq_levels` turns them into levels n_j, and a second pass quantizes with
    those: for output i, whose weights have the range [low_i, high_i] that includes 0,

        s = (high_i - low_i) / (n_j - 1),   z = round(-low_i / s),
        code = clip(round(w / s) + z, 0, n_j - 1),   w ≈ s (code - z)

    and 0 where n_j = 1. In both, the inputs behind j make up for its errors.

    Args:
      weight: floating point `[in, out]`, finite.
      hessian: `[in, in]` as `jaxref.quantization.hessian` gives it.
      mean_bits: R̄ above 0 and at most 16, what `bits_per_weight` of the result shall be, which it
        is up to the rounding of levels.
      damping: λ of `gptq_quantize`, at least 0. Default 0.01.
      exponent: θ of `baq_levels`. Default 1.95.

    Returns:
      A `BAQTensor`. All outputs share the levels of an input, so they cost one number for each.

    Raises:
      ValueError: shapes that do not fit, NaN or infinite entries, an argument out of range, or a
        Hessian that even with damping is not positive definite (the last and the entries are tested
        where the values are known; under jit they leave ranges that are NaN).
      TypeError: `weight` or `hessian` not floating point.

    For 2 to 4 bits where inputs differ much in what they do to the outputs (`allocation_gain` of
    the `hessian_sensitivity` well below 1). `gptq_quantize` gives all the same bits, in a format
    that multiplies quickly.

    Cost: O(d_in³ + d_in² d_out), one factorization and GPTQ's loop twice; R̄ bits a weight once
    entropy-coded, two bytes in memory.

    Example:
      >>> w, h = jnp.array([[1.0, 0.4], [-0.5, 0.3]]), jnp.diag(jnp.array([100.0, 1.0]))
      >>> q = baq_quantize(w, h, 3)
      >>> print(q.levels, round(float(q.bits_per_weight), 2))
      [23  3] 3.05

    Reference: Zhang et al., "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
    2025, arXiv:2506.05664.
    """
    check_interval(0, 16, closed="right", mean_bits=mean_bits)
    check_interval(0, jnp.inf, closed="right", exponent=exponent)
    weight, hessian = checked_with_hessian(weight, hessian)
    factor, dead = inverse_factor(hessian, damping)
    codes, levels, low, high = _baq(weight, factor, dead, mean_bits, exponent)
    return BAQTensor(codes, levels, low, high, weight.dtype)


def baq_dequantize(q: BAQTensor, *, dtype: DTypeLike | None = None) -> Array:
    """The kernel that the codes stand for.

    Args:
      q: what `baq_quantize` returned.
      dtype: floating-point type of the result. Default: the type that was quantized.

    Returns:
      `[in, out]`.

    Raises:
      TypeError: `q` is not a `BAQTensor`, or `dtype` not floating point.

    Use it before multiplying: codes with unequal numbers of levels have no product of their own, as
    those of a `QTensor` have in `quantized_linear`.

    Cost: one pass over the codes, the whole kernel in floating point.

    Example:
      >>> w, h = jnp.array([[1.0, 0.25], [-0.5, 0.0]]), jnp.diag(jnp.array([1.0, 1.0]))
      >>> print(baq_dequantize(baq_quantize(w, h, 2)))
      [[ 1.    0.25]
       [-0.5   0.  ]]

    Reference: Zhang et al., "BAQ: Efficient Bit Allocation Quantization for Large Language Models",
    2025, arXiv:2506.05664.
    """
    if not isinstance(q, BAQTensor):
        raise TypeError(f"q must be a BAQTensor, got {type(q).__name__}")
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type, got {dtype.name}")
    scale, zero = _grid(q.levels[..., None], q.low[..., None, :], q.high[..., None, :])
    return (scale * (q.codes.astype(scale.dtype) - zero)).astype(dtype)


def _checked(
    sensitivity: ArrayLike, weights: ArrayLike | None, *, name: str = "sensitivity"
) -> tuple[Array, Array]:
    check_floating(**{name: sensitivity})
    check_interval(0, jnp.inf, closed="both", **{name: sensitivity})
    c = jnp.asarray(sensitivity, compute_dtype(sensitivity))
    c = jnp.where(c < jnp.finfo(c.dtype).tiny, 0, c)  # subnormals have no logarithm on all devices
    if c.ndim == 0 or c.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one component, got shape {c.shape}")
    if weights is None:
        return c, jnp.ones_like(c)
    check_broadcastable(c.shape, weights=weights)
    check_interval(0, jnp.inf, closed="right", weights=weights)
    return c, jnp.broadcast_to(jnp.asarray(weights, c.dtype), c.shape)


def _log2(c: Array) -> Array:
    """log2(c), and 0 where c = 0."""
    return jnp.log2(jnp.where(c > 0, c, 1))


def _water_filling(
    wish: Array, positive: Array, mean: ArrayLike, weights: Array, least: ArrayLike
) -> Array:
    """max(θ + wish, least) with the θ that gives the mean; `least` where not `positive`.

    In rising order of the wishes, the components at the bound come first. Their number is the least
    for which the next one, with the θ of those that are left, is above it; the last always is.
    """
    order = jnp.argsort(jnp.where(positive, wish, -jnp.inf), axis=-1)
    a, w, free = (jnp.take_along_axis(x, order, axis=-1) for x in (wish, weights, positive))

    def of_this_and_later(x: Array) -> Array:
        return jnp.cumsum(x[..., ::-1], axis=-1)[..., ::-1]

    later = of_this_and_later(w)
    budget = mean * jnp.sum(w, axis=-1, keepdims=True) - least * (later[..., :1] - later)
    theta = (budget - of_this_and_later(w * a)) / later
    fits = (free & (theta + a >= least)).at[..., -1].set(True)
    first = jnp.argmax(fits, axis=-1, keepdims=True)
    theta = jnp.take_along_axis(theta, first, axis=-1)
    bits = jnp.where(positive, jnp.maximum(theta + wish, least), least)
    return jnp.where(jnp.any(positive, axis=-1, keepdims=True), bits, mean)


def _levels(losses: Array, mean_bits: ArrayLike, exponent: ArrayLike) -> Array:
    wish = _log2(losses) / exponent
    bits = _water_filling(wish, losses > 0, mean_bits, jnp.ones_like(losses), 0.0)
    return jnp.round(jnp.exp2(jnp.minimum(bits, jnp.log2(_MOST_LEVELS)))).astype(jnp.int32)


def _ranges(weight: Array) -> tuple[Array, Array]:
    """The least and the largest weight of every output, and 0."""
    return jnp.min(weight, axis=0, initial=0.0), jnp.max(weight, axis=0, initial=0.0)


def _grid(levels: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Scale and zero point; a scale of 0 where there is one level, NaN where the range is."""
    steps = (levels - 1).astype(low.dtype)
    some = (steps > 0) & (high > low)
    scale = jnp.where(some, (high - low) / jnp.where(some, steps, 1), 0)
    zero = jnp.where(some, jnp.round(-low / jnp.where(some, scale, 1)), 0)
    return jnp.where(high >= low, scale, jnp.nan), zero


@jax.jit
def _baq(
    weight: Array, factor: Array, dead: Array, mean_bits: ArrayLike, exponent: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """Codes, levels and ranges."""
    weight = jnp.where(dead[:, None], 0, weight.astype(jnp.result_type(weight, factor)))
    low, high = _ranges(weight)

    def one_pass(levels: Array) -> tuple[Array, Array]:
        def round_row(j, row, ahead, codes):
            scale, zero = _grid(levels[j], low, high)
            code = jnp.round(row / jnp.where(scale > 0, scale, 1)) + zero
            code = jnp.clip(code, 0, levels[j] - 1) * (scale > 0)
            return scale * (code - zero), codes.at[j].set(code.astype(jnp.uint16))

        _, errors, codes = round_with_feedback(
            weight, factor, round_row, jnp.zeros(weight.shape, jnp.uint16)
        )
        return codes, 0.5 * jnp.sum(errors**2, axis=1)

    equal = jnp.full(len(weight), jnp.maximum(jnp.round(jnp.exp2(mean_bits)), 2), jnp.int32)
    levels = _levels(one_pass(equal)[1], mean_bits, exponent)
    return one_pass(levels)[0], levels, low, nan_unless_finite(high, factor)
