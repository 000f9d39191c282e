"""Layer and RMS normalization of rows, forward and backward in one pass over memory each.

What a row needs is known of its parts: how many columns, their mean and the sum of squares around
it, which come together as those of two samples do. The backward pass reads the input and the
cotangent, writes the gradient of the input, and adds up those of scale and bias on the way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import varying_alike
from jaxref.kernels.implementation import Implementation, choose_implementation
from jaxref.kernels.row_function import RowFunction, Statistics, Tile
from jaxref.kernels.rows import apply_rows


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> Array:
    r"""Layer normalization along the last axis, with a fused backward pass.

    With the mean μ and the biased variance σ² of the H entries of a row, x̂ = (x - μ) / √(σ² + ε),

        y = scale · x̂ + bias

    and for a cotangent g of y, with h = scale · g,

        dx = (h - mean(h) - x̂ · mean(h x̂)) / √(σ² + ε),   dscale = Σ_rows g x̂,   dbias = Σ_rows g

    Args:
      x: `[..., H]` floating point, of a size whose square float32 holds: at most about 1e16.
      scale: the gain `[H]`. Default: 1.
      bias: `[H]`. Default: 0.
      epsilon: ε at least 0, added to the variance; a number, not an array that is traced. Default
        1e-6 as in `jaxref.norms`.
      implementation: what computes it, see `choose_implementation`. Default: Pallas on a TPU, XLA
        elsewhere.

    Returns:
      y of the shape and type of `x`, computed in at least float32; `bias` for a row of equal
      entries, with a finite gradient for any ε.

    Raises:
      ValueError: an `x` without a last axis or with no entries along it, `scale` or `bias` not
        `[H]`, a negative `epsilon`, or an `implementation` that cannot run.
      TypeError: `x`, `scale` or `bias` not floating point, or a traced `epsilon`.

    Use it in training where the norm's traffic counts, in a kernel above all. It supports
    `jax.grad`, not `jax.jvp`; `jaxref.norms.layer_norm` supports both, has any axes and masks.

    Cost: in a kernel a read of `x` and a write, backward a read of `x` and g and a write; kept are
    `x` and two numbers a row.

    Example:
      >>> y = layer_norm(jnp.array([1.0, 2.0, 3.0]), implementation="pallas_interpret")
      >>> print(y.round(3))
      [-1.225  0.     1.225]

    Reference: Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450; Chan, Golub,
    LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    return _checked(x, scale, bias, epsilon, implementation, is_centred=True)


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    epsilon: float = 1e-6,
    implementation: str | None = None,
) -> Array:
    r"""Root-mean-square normalization along the last axis, with a fused backward pass.

    With the mean square ms of the H entries of a row, x̂ = x / √(ms + ε),

        y = scale · x̂

    and for a cotangent g of y, with h = scale · g,

        dx = (h - x̂ · mean(h x̂)) / √(ms + ε),   dscale = Σ_rows g x̂

    Args:
      x: `[..., H]` floating point, of a size whose square float32 holds: at most about 1e16.
      scale: the gain `[H]`. Default: 1.
      epsilon: ε at least 0, added to the mean square; a number, not an array that is traced.
        Default 1e-6 as in `jaxref.norms`.
      implementation: what computes it, see `choose_implementation`. Default: Pallas on a TPU, XLA
        elsewhere.

    Returns:
      y of the shape and type of `x`, computed in at least float32; 0 where `x` is 0 throughout,
      with a finite gradient for any ε.

    Raises:
      ValueError: an `x` without a last axis or with no entries along it, a `scale` not `[H]`, a
        negative `epsilon`, or an `implementation` that cannot run.
      TypeError: `x` or `scale` not floating point, or a traced `epsilon`.

    Use it in training where the norm's traffic counts, in a kernel above all. It supports
    `jax.grad`, not `jax.jvp`; `jaxref.norms.rms_norm` supports both, has any axes and masks.

    Cost: in a kernel a read of `x` and a write, backward a read of `x` and g and a write; kept are
    `x` and a number a row.

    Example:
      >>> print(rms_norm(jnp.array([2.0, -2.0]), implementation="pallas_interpret").round(3))
      [ 1. -1.]

    Reference: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    return _checked(x, scale, None, epsilon, implementation, is_centred=False)


def _checked(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    epsilon: float,
    implementation: str | None,
    *,
    is_centred: bool,
) -> Array:
    given = {
        name: jnp.asarray(parameter)
        for name, parameter in {"scale": scale, "bias": bias}.items()
        if parameter is not None
    }
    x = jnp.asarray(x)
    check_floating(x=x, **given)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have entries along its last axis, got shape {x.shape}")
    check_shape(x.shape[-1:], **given)
    if isinstance(epsilon, jax.core.Tracer):
        raise TypeError(f"epsilon must be a number that is known at trace time, got {epsilon}")
    check_interval(0, jnp.inf, epsilon=epsilon)
    chosen = choose_implementation(implementation, x, *given.values())
    if x.size == 0:
        return x
    x, *parameters = varying_alike(x, *given.values())
    shape = _Shape(x.shape[-1], float(epsilon), is_centred, "scale" in given, "bias" in given)
    return _normalise(x, tuple(parameters), shape, chosen)


class _Shape(NamedTuple):
    """Which norm it is, of how many features."""

    features: int
    epsilon: float
    is_centred: bool
    has_scale: bool
    has_bias: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normalise(
    x: Array, parameters: tuple[Array, ...], shape: _Shape, implementation: Implementation
) -> Array:
    return _apply(x, parameters, shape, implementation, returns_statistics=False)[0]


def _apply(
    x: Array,
    parameters: tuple[Array, ...],
    shape: _Shape,
    implementation: Implementation,
    *,
    returns_statistics: bool,
) -> tuple[Array, Statistics]:
    (y,), statistics = apply_rows(
        _normalisation(shape),
        (x,),
        of_row=_origin(x, shape),
        of_column=parameters,
        dtypes=(x.dtype,),
        implementation=implementation,
        returns_statistics=returns_statistics,
    )
    return y, statistics


def _forward(
    x: Array, parameters: tuple[Array, ...], shape: _Shape, implementation: Implementation
) -> tuple[Array, tuple]:
    y, statistics = _apply(x, parameters, shape, implementation, returns_statistics=True)
    return y, (x, parameters, _centre_and_factor(statistics, shape))


def _backward(
    shape: _Shape, implementation: Implementation, residuals: tuple, g: Array
) -> tuple[Array, tuple[Array, ...]]:
    x, parameters, known = residuals
    (dx, *sums), _ = apply_rows(
        _gradient(shape),
        (x, g),
        of_row=(*_origin(x, shape), *known),
        of_column=parameters[: shape.has_scale],
        dtypes=(x.dtype,),
        implementation=implementation,
        returns_statistics=False,
    )
    return dx, tuple(total.astype(p.dtype) for total, p in zip(sums, parameters, strict=True))


_normalise.defvjp(_forward, _backward)


def _origin(x: Array, shape: _Shape) -> tuple[Array, ...]:
    """Where the entries of a centred row are measured from: one of them.

    So the mean of equal entries is exact, and one that is far larger than the spread costs nothing.
    """
    return (x[..., 0].astype(compute_dtype(x)),) if shape.is_centred else ()


def _centre_and_factor(statistics: Statistics, shape: _Shape) -> tuple[Array, ...]:
    """The mean relative to the origin, where rows are centred, and 1 / √(σ² + ε)."""
    *centre, square_sum = statistics[1:] if shape.is_centred else statistics
    total = square_sum / shape.features + shape.epsilon
    return *centre, 1 / jnp.sqrt(jnp.where(total > 0, total, 1))


def _total(tile: Tile, x: Array) -> Array:
    return jnp.sum(jnp.where(tile.exists, x, 0), axis=-1, keepdims=True)


def _measure_squares(tile: Tile) -> Statistics:
    return (_total(tile, tile.values[0] * tile.values[0]),)


def _measure_spread(tile: Tile) -> Statistics:
    """Number of columns, their mean relative to the origin, the sum of squares around it."""
    relative = tile.values[0] - tile.of_row[0]
    count = _total(tile, jnp.ones_like(relative))
    mean = _total(tile, relative) / jnp.maximum(count, 1)
    return count, mean, _total(tile, (relative - mean) ** 2)


def _merge_spreads(a: Statistics, b: Statistics) -> Statistics:
    count = a[0] + b[0]
    share = b[0] / jnp.maximum(count, 1)
    apart = b[1] - a[1]
    return count, a[1] + share * apart, a[2] + b[2] + apart * apart * a[0] * share


def _add(a: Statistics, b: Statistics) -> Statistics:
    return tuple(x + y for x, y in zip(a, b, strict=True))


@functools.cache
def _normalisation(shape: _Shape) -> RowFunction:
    """Of x: y, and the statistics of its rows."""

    def write(tile: Tile, statistics: Statistics) -> tuple[Array, ...]:
        y = _normalised(tile, *tile.of_row, *_centre_and_factor(statistics, shape))
        parameters = list(tile.of_column)
        if shape.has_scale:
            y *= parameters.pop(0)
        if shape.has_bias:
            y += parameters.pop(0)
        return (y,)

    if shape.is_centred:
        return RowFunction("layer_norm", (0.0,) * 3, _measure_spread, _merge_spreads, write)
    return RowFunction("rms_norm", (0.0,), _measure_squares, _add, write)


@functools.cache
def _gradient(shape: _Shape) -> RowFunction:
    """Of x and the cotangent of y: that of x, and over all rows those of the parameters."""

    def scaled(tile: Tile) -> Array:
        return tile.values[1] * tile.of_column[0] if shape.has_scale else tile.values[1]

    def measure(tile: Tile) -> Statistics:
        h = scaled(tile)
        along = _total(tile, h * _normalised(tile, *tile.of_row))
        return (along, _total(tile, h)) if shape.is_centred else (along,)

    def write(tile: Tile, statistics: Statistics) -> tuple[Array, ...]:
        along, *level = (total / shape.features for total in statistics)
        inside = scaled(tile) - _normalised(tile, *tile.of_row) * along
        return (tile.of_row[-1] * (inside - level[0] if level else inside),)

    def add_up(tile: Tile, _: Statistics) -> tuple[Array, ...]:
        g = tile.values[1]
        of_scale = (g * _normalised(tile, *tile.of_row),) if shape.has_scale else ()
        return (*of_scale, g) if shape.has_bias else of_scale

    return RowFunction(
        "layer_norm_backward" if shape.is_centred else "rms_norm_backward",
        (0.0,) * (2 if shape.is_centred else 1),
        measure,
        _add,
        write,
        shape.has_scale + shape.has_bias,
        add_up,
    )


def _normalised(tile: Tile, *of_row: Array) -> Array:
    """x̂ of a tile: its first values less all but the last of these numbers, times the last."""
    *subtrahends, factor = of_row
    return functools.reduce(jnp.subtract, subtrahends, tile.values[0]) * factor
