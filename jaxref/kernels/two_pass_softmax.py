"""Softmax in two passes, without the maximum: exponentials with an exponent of their own.

The first of the three passes of a softmax, over the maximum, is there because exp(x) leaves the
range of floating point. A pair (m, n) that stands for m 2^n does not leave it, so that sums can be
taken at once.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.kernels.implementation import Implementation
from jaxref.kernels.row_function import RowFunction, Statistics, Tile
from jaxref.kernels.rows import apply_rows
from jaxref.kernels.softmax import SOFTMAX_BACKWARD, over_rows, row_kernel, softmax_by_xla

# ln 2 in three parts, of 10 significant bits the first two: n times either is exact for the n that
# 14 bits hold, which x up to 11000 has.
_LN2 = (0.6923828125, 0.0007638931274414062, 4.7493250390316726e-07)
# exp on [-ln 2 / 2, ln 2 / 2] within 1e-7 of itself, by Remez's exchange; the lowest power first.
_EXP = (1.0, 1.0, 0.4999999106, 0.1666641980, 0.04166823253, 0.008374898694, 0.001383674215)
# The exponent of what is 0: far below any other, and still a number when two are subtracted.
_NOTHING = -1e37


def extended_exponential(x: ArrayLike) -> tuple[Array, Array]:
    r"""exp(x) as a mantissa m and an exponent n, which neither overflow nor underflow.

        exp(x) = m 2^n,   n = round(x / ln 2),   m = exp(x - n ln 2)

    where n ln 2 is subtracted in parts (Cody and Waite), so that nothing of m is lost.

    Args:
      x: floating point, of any shape.

    Returns:
      m, between 0.70 and 1.42, and n, a whole number, both in the type of `x` and at least float32.
      For -inf, m = 0 and n is very small; NaN and +inf give m = NaN. For |x| up to 11000, m is as
      accurate as the exponential itself; beyond, the bits of n ln 2 that float32 lacks go missing.

    Raises:
      TypeError: `x` not floating point.

    Use it, with `extended_add`, to sum exponentials that leave the range of floats without a look
    at their maximum first; `two_pass_logsumexp` gives the logarithm of such a sum.

    Cost: elementwise, about the work of an exponential; two numbers for each entry.

    Example:
      >>> m, n = extended_exponential(jnp.array([0.0, 1000.0, -jnp.inf]))
      >>> print(m.round(2), n)
      [1.   0.81 0.  ] [ 0.000e+00  1.443e+03 -1.000e+37]

    Reference: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", 2020, arXiv:2001.04438.
    """
    check_floating(x=x)
    x = jnp.asarray(x, compute_dtype(x))
    return _extended_exponential(x)


def extended_add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    r"""The sum of two numbers m 2^n.

        (m_a, n_a) + (m_b, n_b) = (m_a 2^(n_a - n) + m_b 2^(n_b - n), n),   n = max(n_a, n_b)

    The powers are made from their bits; below 2^-126 they are 0.

    Args:
      a: mantissas and exponents, whole numbers in floating point.
      b: likewise, of shapes that broadcast.

    Returns:
      Mantissas and exponents of the sums; the mantissa of N exponentials is at most 1.42 N.

    Use it to join sums of `extended_exponential`s from parts of a row, in any order. `logsumexp`
    joins its parts by their maxima, with an exponential for each.

    Cost: elementwise, without an exponential.

    Example:
      >>> one, huge = extended_exponential(0.0), extended_exponential(1000.0)
      >>> extended_add(one, huge)[1] == huge[1]
      Array(True, dtype=bool)

    Reference: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", 2020, arXiv:2001.04438.
    """
    n = jnp.maximum(a[1], b[1])
    return a[0] * _power_of_two(a[1] - n) + b[0] * _power_of_two(b[1] - n), n


def two_pass_softmax(
    x: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Softmax along an axis, in two passes over memory and without a maximum.

        exp(x_i) = m_i 2^{n_i},   Σ_i m_i 2^{n_i} = M 2^N,   y_i = m_i (1 / M) 2^{n_i - N}

    The first pass reads x for the sum of the extended exponentials, the second reads it again and
    writes y.

    Args:
      x: floating point, of any shape with at least one axis.
      axis: the axis whose entries sum to 1. Default: the last.
      where: boolean, broadcastable to `x`: the entries that take part. Others are 0 in the result,
        and have no gradient. Default: all.
      implementation: what computes it, see `choose_implementation`. Default: Pallas on a TPU, XLA
        elsewhere.

    Returns:
      An array like `x`, computed in at least float32. An entry of -inf gives 0, a row without any
      other zeros; a row with NaN or +inf gives NaN. Beyond |x| = 11000 it is less accurate than
      `softmax`, see `extended_exponential`.

    Raises:
      ValueError: an `axis` that does not exist, a `where` of the wrong shape, or an
        `implementation` that cannot run.
      TypeError: `x` not floating point.

    The paper's algorithm, for where the maximum is what costs; `softmax`, which reads a row as few
    times, is the one to use otherwise.

    Cost: in a kernel 3 numbers moved for each of a row, where the passes of maximum, sum and
    scaling move 4, or 5 with stored exponentials; two exponentials an entry.

    Example:
      >>> print(two_pass_softmax(jnp.array([1000.0, 1001.0])).round(2))
      [0.27 0.73]

    Reference: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", 2020, arXiv:2001.04438.
    """
    return over_rows(_softmax, _softmax_kernel, x, axis=axis, where=where, choice=implementation)


def two_pass_logsumexp(x: ArrayLike, axis: int = -1) -> Array:
    r"""Logarithm of the sum of exponentials along an axis, without a maximum.

        log Σ_i exp(x_i) = log M + N ln 2,   M 2^N = Σ_i m_i 2^{n_i}

    Args:
      x: floating point, of any shape with at least one axis.
      axis: the axis to sum over. Default: the last.

    Returns:
      An array like `x` without `axis`, computed in at least float32; -inf for a row of -inf.

    Raises:
      ValueError: an `axis` that does not exist.
      TypeError: `x` not floating point.

    `logsumexp` has more: a mask, a kernel, and rows beyond the range of `extended_exponential`.

    Cost: an exponential for each entry, and another for the gradient, which keeps `x`; always by
    XLA.

    Example:
      >>> print(two_pass_logsumexp(jnp.array([1000.0, 1000.0])).round(3))
      1000.693

    Reference: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", 2020, arXiv:2001.04438.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    rows = jnp.moveaxis(x, axis, -1)
    if rows.size == 0:
        return jnp.full(rows.shape[:-1], -jnp.inf, x.dtype)
    return _logsumexp(rows.astype(compute_dtype(rows))).astype(x.dtype)


def three_pass_softmax(x: ArrayLike, *, axis: int = -1, recompute: bool = True) -> Array:
    r"""Softmax along an axis in the three passes of maximum, sum and scaling.

        m = max_j x_j,   Z = Σ_j exp(x_j - m),   y_i = exp(x_i - m) / Z

    Args:
      x: floating point, of any shape with at least one axis.
      axis: the axis whose entries sum to 1. Default: the last.
      recompute: whether the third pass computes the exponentials again (4 numbers moved for each of
        a row), or the second writes them and the third reads them (5). Default True.

    Returns:
      An array like `x`, computed in at least float32; NaN for a row of -inf.

    Raises:
      ValueError: an `axis` that does not exist.
      TypeError: `x` not floating point.

    What `two_pass_softmax` is measured against; `softmax` is the one to use.

    Cost: three reads of `x` and a write, and two exponentials an entry; one without `recompute`,
    for one more number moved.

    Example:
      >>> print(three_pass_softmax(jnp.array([0.0, 1.0]), recompute=False).round(2))
      [0.27 0.73]

    Reference: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", 2020, arXiv:2001.04438.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    canonical_axes(axis, x.ndim)
    wide = x.astype(compute_dtype(x))
    top = jax.lax.stop_gradient(jnp.max(wide, axis=axis, keepdims=True))
    exponentials = jnp.exp(wide - top)
    if not recompute:
        exponentials = jax.lax.optimization_barrier(exponentials)
    return (exponentials / jnp.sum(exponentials, axis=axis, keepdims=True)).astype(x.dtype)


def _extended_exponential(x: Array) -> tuple[Array, Array]:
    # Clipped where x / ln 2 overflows, and where the subtraction has no bits left.
    n = jnp.clip(jnp.floor(x * (1 / math.log(2)) + 0.5), _NOTHING, -_NOTHING)
    t = x
    for part in _LN2:
        t = t - n * part
    t = jnp.clip(t, -0.35, 0.35)
    if x.dtype == jnp.float32:
        # The exponential of any number would reduce its argument once more: see the bench.
        m = jnp.full_like(t, _EXP[-1])
        for coefficient in reversed(_EXP[:-1]):
            m = m * t + coefficient
    else:
        m = jnp.exp(t)
    m = jnp.where(x == jnp.inf, jnp.nan, m)
    return jnp.where(x == -jnp.inf, 0, m), jnp.where(x == -jnp.inf, _NOTHING, n)


def _power_of_two(k: Array) -> Array:
    """2^k for whole numbers k up to 0, from its bits; 0 where it is not a normal number."""
    if k.dtype == jnp.float64:
        return jnp.ldexp(jnp.ones_like(k), jnp.maximum(k, -1074).astype(jnp.int32))
    biased = jnp.maximum(k, -127).astype(jnp.int32) + 127
    return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def _measure(tile: Tile) -> Statistics:
    m, n = _extended_exponential(jnp.where(tile.exists, tile.values[0], -jnp.inf))
    top = jnp.max(n, axis=-1, keepdims=True)
    return jnp.sum(m * _power_of_two(n - top), axis=-1, keepdims=True), top


def _write(tile: Tile, statistics: Statistics) -> tuple[Array, ...]:
    total, top = statistics
    m, n = _extended_exponential(tile.values[0])
    return (m * (1 / jnp.where(total == 0, 1, total)) * _power_of_two(n - top),)


def _merge(a: Statistics, b: Statistics) -> Statistics:
    return extended_add((a[0], a[1]), (b[0], b[1]))


_SUM = RowFunction("two_pass_logsumexp", (0.0, _NOTHING), _measure, _merge)
_SOFTMAX = _SUM._replace(name="two_pass_softmax", write=_write)
_XLA = Implementation("xla")


_softmax = softmax_by_xla(_SOFTMAX)


@jax.custom_jvp
def _logsumexp(x: Array) -> Array:
    _, (total, top) = apply_rows(_SUM, (x,), implementation=_XLA)
    log = jnp.log(total)
    for part in reversed(_LN2):
        log = log + top * part
    return jnp.where(total == 0, -jnp.inf, log)


@_logsumexp.defjvp
def _logsumexp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return _logsumexp(x), jnp.sum(_softmax(x) * dx, axis=-1)


_softmax_kernel = row_kernel(_SOFTMAX, SOFTMAX_BACKWARD)
