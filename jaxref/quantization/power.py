"""Power quantization: uniform levels for a power of the magnitudes.

The maps of the positive numbers onto themselves that keep products are the powers, so a network
may compute on |x|^a in place of x wherever it multiplies, and an exponent below 1 puts the levels
where weights are: near 0.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.tensor import QTensor, QuantSpec
from jaxref.quantization.uniform import dequantize, quantize

_POINTS, _ROUNDS = 61, 2  # of the search: steps of a 60th of the range, twice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PowerTensor:
    """A tensor quantized in the domain of a power: uniform codes, and the exponent.

        x ≈ sign(u) |u|^(1/a),   u = scale (code - zero_point)

    A pytree like the `QTensor` in it.

    Attributes:
      transformed: the `QTensor` of u = sign(x) |x|^a.
      exponent: a, of at least float32.

    `power_quantize` makes one, `power_dequantize` reads it.

    Reference: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power
    Exponent Search", 2023, arXiv:2308.05600.
    """

    transformed: QTensor
    exponent: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that the codes stand for."""
        return self.transformed.shape

    @property
    def size(self) -> int:
        """The number of entries; `8 * nbytes / size` is the bits that each of them costs."""
        return self.transformed.size

    @property
    def nbytes(self) -> int:
        """The memory of codes, scales, zero points and the exponent together."""
        return self.transformed.nbytes + self.exponent.size * self.exponent.dtype.itemsize


def power_transform(x: ArrayLike, exponent: ArrayLike) -> Array:
    r"""The power of the magnitudes, under the sign of each entry.

        y = sign(x) |x|^a,   y(x₁ x₂) = y(x₁) y(x₂),   x = y(y(x; a); 1/a)

    Args:
      x: floating point, of any shape. Entries below the smallest normal number count as 0.
      exponent: a positive, broadcastable to `x`; 1 changes nothing.

    Returns:
      y with the shape and type of `x`. Differentiable in both; y and its derivatives are taken for
      0 at x = 0, where that in x would be infinite for a < 1.

    Raises:
      ValueError: an `exponent` that is not positive.
      TypeError: `x` not floating point.

    Transform activations with the exponent of the weights that they meet, and products of the two
    are powers of the true products; `power_quantize` also rounds.

    Cost: a logarithm and an exponential for each entry.

    Example:
      >>> print(power_transform(jnp.array([4.0, 0.0, -9.0]), 0.5).round(4))
      [ 2.  0. -3.]

    Reference: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power
    Exponent Search", 2023, arXiv:2308.05600.
    """
    check_floating(x=x)
    check_interval(0, jnp.inf, closed="neither", exponent=exponent)
    x = jnp.asarray(x)
    wide = x.astype(compute_dtype(x))
    is_zero = jnp.abs(wide) < jnp.finfo(wide.dtype).tiny
    # As x |x|^(a - 1), which is x itself for a = 1, to the last bit.
    log = jnp.log(jnp.abs(jnp.where(is_zero, 1.0, wide)))
    power = jnp.where(is_zero, 0.0, wide) * jnp.exp((jnp.asarray(exponent, wide.dtype) - 1) * log)
    return power.astype(x.dtype)


def power_quantize(x: ArrayLike, exponent: ArrayLike, spec: QuantSpec) -> PowerTensor:
    r"""Rounds to levels that are equally spaced after a power.

    With L = 2^(b-1) - 1 for a symmetric spec, and m the largest |x| that shares a scale,

        s = m^a / L,   code = round(sign(x) |x|^a / s),   x ≈ sign(code) (s |code|)^(1/a)

    a < 1 brings levels closer towards 0, a = 1/2 squares the codes, and a = 1 is `quantize`.

    Args:
      x: floating point and finite, of any shape; |x|^a has to be within the range of float32.
      exponent: a, one positive number.
      spec: format and granularity, a `QuantSpec`. An asymmetric one suits activations that are
        never negative: all of its 2^b levels are then at 0 and above.

    Returns:
      A `PowerTensor` with the shape of `x`: the bits per weight of a `QTensor`, and an exponent.

    Raises:
      ValueError: an exponent that is not one positive number, an axis of the spec that `x` does
        not have, or NaN or infinite entries (not under jit, where those spoil their group).
      TypeError: `x` not floating point, or `spec` not a `QuantSpec`.

    Bell-shaped weights lose a quarter to a half of their error against `quantize` of the same bits;
    what is evenly spread gains nothing. `search_power_exponent` finds the exponent.

    Cost: that of `quantize`, with a logarithm and an exponential for each entry; bits a weight as
    in a `QTensor`.

    Example:
      >>> q = power_quantize(jnp.array([0.0, 1.0, -4.0, 9.0]), 0.5, QuantSpec(bits=3))
      >>> print(q.transformed.codes, power_dequantize(q).round(4))
      [ 0  1 -2  3] [ 0.  1. -4.  9.]

    Reference: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power
    Exponent Search", 2023, arXiv:2308.05600.
    """
    check_shape((), exponent=exponent)
    check_floating(x=x)
    x = jnp.asarray(x)
    wide = x.astype(compute_dtype(x))
    transformed = quantize(power_transform(wide, exponent), spec)
    transformed = dataclasses.replace(transformed, dtype=x.dtype)
    return PowerTensor(transformed, jnp.asarray(exponent, wide.dtype))


def power_dequantize(q: PowerTensor, *, dtype: DTypeLike | None = None) -> Array:
    r"""The tensor that the codes stand for.

        x = sign(u) |u|^(1/a),   u = scale (code - zero_point)

    Args:
      q: a `PowerTensor`.
      dtype: floating-point type of the result. Default: the type that was quantized.

    Returns:
      x with the shape of `q`. Differentiable in the scale and in the exponent, with the derivative
      0 for codes of 0.

    Raises:
      TypeError: `q` is not a `PowerTensor`, or `dtype` not floating point.

    Use it where a layer multiplies in floating point, as `quantized_linear` does with these. With
    activations in the same power (`power_transform`), products of the two are powers of the true
    products.

    Cost: a logarithm and an exponential for each entry; the whole tensor in floating point.

    Example:
      >>> q = power_quantize(jnp.array([0.3, -4.0]), 0.5, QuantSpec(bits=3))
      >>> print(power_dequantize(q).round(3))
      [ 0.444 -4.   ]

    Reference: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power
    Exponent Search", 2023, arXiv:2308.05600.
    """
    if not isinstance(q, PowerTensor):
        raise TypeError(f"q must be a PowerTensor, got {type(q).__name__}")
    dtype = jnp.dtype(q.transformed.dtype if dtype is None else dtype)
    check_floating(dtype=jnp.zeros((), dtype))
    u = dequantize(q.transformed, dtype=q.transformed.scale.dtype)
    return power_transform(u, 1 / q.exponent).astype(dtype)


def search_power_exponent(
    weights: Any,
    spec: QuantSpec,
    *,
    norm: float = 2.0,
    bounds: tuple[float, float] = (0.05, 1.5),
) -> Array:
    r"""The exponent whose levels are nearest to the weights, without any data.

        a* = argmin_a Σ_layers ‖W - Ŵ_a‖_p,   Ŵ_a = power_dequantize(power_quantize(W, a, spec))

    The sum is nearly convex, but jumps wherever a weight changes its level. So it is evaluated at
    61 exponents between the bounds, and again between the neighbours of the best, in steps of
    8·10⁻⁴. The best of all of them is returned.

    Args:
      weights: an array or a pytree of them, one per layer, floating point and finite.
      spec: format and granularity for each, a `QuantSpec`.
      norm: p at least 1. Default 2.
      bounds: the least and the largest exponent, positive. Default (0.05, 1.5).

    Returns:
      a*, a scalar of at least float32.

    Raises:
      ValueError: no weights, `norm` or `bounds` out of range, or an axis of the spec that a weight
        does not have, or NaN or infinite entries (not under jit).
      TypeError: weights not floating point, or `spec` not a `QuantSpec`.

    About 0.6 for Gaussian weights at 4 bits, less for heavier tails. One exponent for a whole
    network lets activations keep one power throughout. `nupes_quantize` goes on from here with
    data.

    Cost: 122 roundings of all weights, one after the other; no data.

    Example:
      >>> w = jax.random.laplace(jax.random.key(0), (64, 64))
      >>> 0.3 < search_power_exponent(w, QuantSpec(bits=4)) < 0.7
      Array(True, dtype=bool)

    Reference: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power
    Exponent Search", 2023, arXiv:2308.05600.
    """
    check_interval(1, jnp.inf, norm=norm)
    check_interval(0, jnp.inf, closed="neither", bounds=bounds)
    if bounds[0] > bounds[1]:
        raise ValueError(f"bounds must not fall, got {bounds}")
    leaves = jax.tree.leaves(weights)
    if not leaves:
        raise ValueError("weights must have at least one array, got none")
    for leaf in leaves:
        power_quantize(leaf, bounds[1], spec)  # its checks
    return _search([jnp.asarray(leaf) for leaf in leaves], spec, float(norm), tuple(bounds))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _search(
    weights: list[Array], spec: QuantSpec, norm: float, bounds: tuple[float, float]
) -> Array:
    weights = [w.astype(compute_dtype(w)) for w in weights]

    def error(exponent: Array) -> Array:
        total = jnp.zeros((), exponent.dtype)
        for w in weights:
            off = jnp.abs(power_dequantize(power_quantize(w, exponent, spec)) - w)
            largest = jnp.maximum(jnp.max(off, initial=0.0), jnp.finfo(off.dtype).tiny)
            total += largest * jnp.sum((off / largest) ** norm) ** (1 / norm)
        return total

    def narrow(_: int, bracket: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high = bracket[:2]
        exponents = low + (high - low) * jnp.linspace(0, 1, _POINTS, dtype=low.dtype)
        best = jnp.argmin(jax.lax.map(error, exponents))
        around = jnp.clip(best + jnp.array([-1, 1]), 0, _POINTS - 1)
        return exponents[around[0]], exponents[around[1]], exponents[best]

    dtype = compute_dtype(*weights)
    low, high = (jnp.asarray(end, dtype) for end in bounds)
    return jax.lax.fori_loop(0, _ROUNDS, narrow, (low, high, low))[2]
