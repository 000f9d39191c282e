"""The quantizer of GENIE-M: soft rounding from a floor that stays when the scale is learned.

`genie_reconstruct` learns them from the outputs of a block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.adaptive_rounding import _rounding_start, rectified_sigmoid
from jaxref.quantization.gptq import check_finite
from jaxref.quantization.reconstruction import as_qtensor, check_spec
from jaxref.quantization.tensor import QTensor, QuantSpec
from jaxref.quantization.uniform import _per_entry, quantize

_RATIOS = 100  # clipped ranges that are tried: 1.00, 0.99, ..., 0.01 of that of the data
_ERROR_POWER = 2.4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GenieWeight:
    """A weight whose rounding and scale are to be learned; a pytree.

    Attributes:
      base: B = ⌊W / s₀⌋, which stays, of the weight's shape.
      rounding: V, likewise; h(V) above one half is rounding up.
      scale: s, of the shape of a `QTensor`'s.
      zero_point: z likewise, a whole number as a float, which stays; None if symmetric.
      spec: the `QuantSpec`.
      dtype: the type of the weight.

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """

    base: Array
    rounding: Array
    scale: Array
    zero_point: Array | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GenieActivation:
    """Levels for activations, with one step for all; a pytree.

    Attributes:
      step: scalar, of `learned_step_quantize`.
      bits: 2 to 8.
      signed: whether there are levels below 0.

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """

    step: Array
    bits: int = dataclasses.field(metadata={"static": True})
    signed: bool = dataclasses.field(metadata={"static": True})


def genie_weight_quantizer_init(weight: ArrayLike, spec: QuantSpec) -> GenieWeight:
    r"""The state in which GENIE-M begins: the best clipped range, and soft rounding that gives W.

        s₀ = r s,   r in {1.00, 0.99, ..., 0.01} with the least mean |W - s₀ (code - z)|^2.4
        B = ⌊W / s₀⌋,   h(V) = W / s₀ - B

    with s and z of `quantize`, whose ranges include 0, r for each group that shares a scale, codes
    to the nearest, and h the `rectified_sigmoid`.

    Args:
      weight: W, floating point and finite, of any shape.
      spec: the format. The paper's: granularity "channel" along the outputs, asymmetric; 8 bits in
        the first and the last layer.

    Returns:
      A `GenieWeight`.

    Raises:
      ValueError: what `quantize` raises.
      TypeError: `weight` not floating point, or `spec` not a `QuantSpec`.

    Then `genie_reconstruct`; `genie_quantize` makes of it the nearest levels of the clipped range
    without any data.

    Cost: 100 roundings of the weight, no data.

    Example:
      >>> state = genie_weight_quantizer_init(jnp.array([[0.2], [1.0], [-2.0]]), QuantSpec(bits=4))
      >>> print(genie_soft_weight(state).ravel().round(3))
      [ 0.2   1.   -1.92]

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """
    check_spec(spec=spec)
    check_floating(weight=weight)
    wide = jnp.asarray(weight).astype(compute_dtype(weight))
    check_finite(weight=wide)
    return _weight_init(wide, spec=spec.resolve(wide.ndim), dtype=jnp.result_type(weight))


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def _weight_init(weight: Array, *, spec: QuantSpec, dtype: Any) -> GenieWeight:
    q = quantize(weight, spec)
    zero_point = None if q.zero_point is None else q.zero_point.astype(weight.dtype)
    scale = _clipped_scale(weight, q.scale, zero_point, spec.code_range, spec)
    position = weight / _per_entry(scale, weight.shape, spec)
    base = jnp.floor(position)
    rounding = _rounding_start(position - base, "sigmoid")
    return GenieWeight(base, rounding, scale, zero_point, spec, dtype)


def _clipped_scale(
    x: Array,
    scale: Array,
    zero_point: Array | None,
    code_range: tuple[int, int],
    spec: QuantSpec,
) -> Array:
    """The scale times the ratio that loses least. To clip a range keeps its zero point."""

    def entries(groups: Array) -> Array:
        return jnp.broadcast_to(_per_entry(groups, x.shape, spec), x.shape)

    zero = 0.0 if zero_point is None else _per_entry(zero_point, x.shape, spec)
    unit = entries(scale)

    def step(carry: tuple[Array, Array], percent: Array) -> tuple[Any, None]:
        least, best = carry
        new = scale * (percent / _RATIOS)
        steps = entries(new)
        codes = jnp.clip(jnp.round(x / steps) + zero, *code_range)
        errors = (jnp.abs(x - steps * (codes - zero)) / unit) ** _ERROR_POWER
        (total,) = jax.linear_transpose(entries, scale)(errors)  # over the entries of each group
        is_better = total < least
        return (jnp.where(is_better, total, least), jnp.where(is_better, new, best)), None

    start = (jnp.full_like(scale, jnp.inf), scale)
    (_, best), _ = jax.lax.scan(step, start, jnp.arange(_RATIOS, 0, -1))
    return best


def genie_soft_weight(state: GenieWeight) -> Array:
    r"""The weight with soft rounding, that gradients can move.

        Ŵ = s (clip(B + h(V) + z, q_min, q_max) - z)

    B does not depend on s, so that ∂Ŵ/∂s is the number in parentheses: a scale that moves leaves
    the rounding where it was.

    Args:
      state: of `genie_weight_quantizer_init`, or one with another V and s.

    Returns:
      Ŵ in at least float32, of the shape of the weight. At first it is W where that is not clipped.

    Raises:
      TypeError: `state` is not a `GenieWeight`.

    `genie_reconstruct` calls it; `genie_quantize` is what it leads to.

    Cost: elementwise; the gradient keeps V and B, two arrays of the weight's size.

    Example:
      >>> state = genie_weight_quantizer_init(jnp.array([0.2, -2.0]), QuantSpec(bits=4))
      >>> d_scale = jax.grad(lambda s: genie_soft_weight(dataclasses.replace(state, scale=s)).sum())
      >>> print(d_scale(state.scale) * state.scale)
      [-1.8]

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """
    codes, zero = _codes(state, rectified_sigmoid(_checked_state(state).rounding))
    return (codes - zero) * _per_entry(state.scale, state.base.shape, state.spec)


def genie_quantize(state: GenieWeight) -> QTensor:
    r"""The weight with rounding up where V is at least 0, and down elsewhere.

        code = clip(B + [V ≥ 0] + z, q_min, q_max),   W ≈ s (code - z)

    Args:
      state: of `genie_weight_quantizer_init`, or one with another V and s.

    Returns:
      A `QTensor` of the state's spec and type.

    Raises:
      TypeError: `state` is not a `GenieWeight`.

    `genie_reconstruct` ends with it. Before, its levels are the nearest ones of the clipped range,
    which in few bits lose less than those of `quantize`.

    Cost: one elementwise pass.

    Example:
      >>> state = genie_weight_quantizer_init(jnp.array([0.2, -2.0]), QuantSpec(bits=4))
      >>> print(genie_quantize(state).codes)
      [ 1 -7]

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """
    codes, _ = _codes(state, (_checked_state(state).rounding >= 0).astype(state.base.dtype))
    return as_qtensor(codes, state.scale, state.zero_point, state.spec, state.dtype)


def _checked_state(state: GenieWeight) -> GenieWeight:
    if not isinstance(state, GenieWeight):
        raise TypeError(f"state must be a GenieWeight, got {type(state).__name__}")
    return state


def _codes(state: GenieWeight, h: Array) -> tuple[Array, Array | float]:
    """B + h + z within the range, and z."""
    zero: Array | float = 0.0
    if state.zero_point is not None:
        zero = _per_entry(state.zero_point, h.shape, state.spec)
    low, high = state.spec.code_range
    codes = state.base + h + zero
    # Unlike jnp.clip, all of the gradient passes at the very ends.
    return jnp.where(codes < low, low, jnp.where(codes > high, high, codes)), zero


def genie_activation_quantizer_init(
    x: ArrayLike, *, bits: int, signed: bool | None = None
) -> GenieActivation:
    r"""The levels with which the activations of a block begin.

        s = r s₁,   s₁ = max x / (2^bits - 1),   2 max|x| / (2^bits - 1) if signed

    with r in {1.00, 0.99, ..., 0.01} for the least mean |x - x̂|^2.4.

    Args:
      x: floating point and finite, the activations on a batch, with entries.
      bits: 2 to 8. The paper takes 8 also for the inputs of the second and the last layer.
      signed: whether there are levels below 0. Default: whether there are activations below 0,
        which must be known for it, so not under jit.

    Returns:
      A `GenieActivation`.

    Raises:
      ValueError: no entries, NaN or infinite ones, or `bits` out of range.
      TypeError: `x` not floating point.

    Use it on one batch of a block's activations before `genie_reconstruct`, which goes on to learn
    the step. `learned_step_init` does not search: it takes the step from the mean magnitude.

    Cost: 100 roundings of the activations.

    Example:
      >>> levels = genie_activation_quantizer_init(jnp.array([0.0, 1.0, 2.0, 3.0]), bits=2)
      >>> print(levels.step, levels.signed)
      1.0 False

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """
    check_floating(x=x)
    check_interval(2, 8, bits=bits)
    if jnp.size(x) == 0:
        raise ValueError(f"x must have entries, got shape {jnp.shape(x)}")
    wide = jnp.asarray(x).astype(compute_dtype(x)).ravel()
    check_finite(x=wide)
    signed = bool(jnp.any(wide < 0)) if signed is None else signed
    return GenieActivation(_first_step(wide, bits=bits, signed=signed), bits, signed)


@functools.partial(jax.jit, static_argnames=("bits", "signed"))
def _first_step(x: Array, *, bits: int, signed: bool) -> Array:
    largest = 2.0 * jnp.max(jnp.abs(x)) if signed else jnp.max(x)
    least = 2.0 * jnp.finfo(x.dtype).tiny
    scale = jnp.maximum(largest / (2**bits - 1), least)[None]
    half = 2 ** (bits - 1)
    code_range = (-half, half - 1) if signed else (0, 2 * half - 1)
    return _clipped_scale(x, scale, None, code_range, QuantSpec())[0]
