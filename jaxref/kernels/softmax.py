"""Softmax, its logarithm and its normaliser, in as few passes over memory as the machine allows.

A row's maximum and the sum of its exponentials relative to it are taken together (online softmax):
where the maximum of two parts of a row differs, the sum of one is scaled. So a row is read once for
them and once more to write the result, and only once where it fits into the memory of the core.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_broadcastable, check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.kernels.implementation import Implementation, choose_implementation
from jaxref.kernels.row_function import RowFunction, Statistics, Tile
from jaxref.kernels.rows import apply_rows


def softmax(
    x: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Softmax along an axis.

        y_i = exp(x_i - m) / Σ_j exp(x_j - m),   m = max_j x_j

    Args:
      x: floating point, of any shape with at least one axis.
      axis: the axis whose entries sum to 1. Default: the last.
      where: boolean, broadcastable to `x`: the entries that take part. Others are 0 in the result,
        and have no gradient. Default: all.
      implementation: what computes it, see `choose_implementation`. Default: Pallas on a TPU, XLA
        elsewhere.

    Returns:
      An array like `x`, computed in at least float32. An entry of -inf gives 0, a row without any
      other zeros, with zero gradients; a row with NaN or +inf gives NaN.

    Raises:
      ValueError: an `axis` that does not exist, a `where` of the wrong shape, or an
        `implementation` that cannot run.
      TypeError: `x` not floating point.

    It is `jax.nn.softmax` but for rows without any entry. `two_pass_softmax` needs no maximum.
    Under a Pallas implementation it supports `jax.grad`, not `jax.jvp`.

    Cost: in a kernel one read of `x`, two where a row does not fit in the core's memory, and a
    write; y is kept for the gradient.

    Example:
      >>> print(softmax(jnp.array([0.0, 1.0, 2.0]), where=jnp.array([True, True, False])).round(3))
      [0.269 0.731 0.   ]

    Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
    arXiv:1805.02867.
    """
    return over_rows(_softmax, _softmax_kernel, x, axis=axis, where=where, choice=implementation)


def log_softmax(
    x: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Logarithm of the softmax along an axis.

        y_i = (x_i - m) - log Σ_j exp(x_j - m),   m = max_j x_j

    Args:
      x: floating point, of any shape with at least one axis.
      axis: the axis whose exponentials sum to 1. Default: the last.
      where: boolean, broadcastable to `x`: the entries that take part. Others are -inf in the
        result, and have no gradient. Default: all.
      implementation: what computes it, see `choose_implementation`.

    Returns:
      An array like `x`, computed in at least float32; -inf where `x` is.

    Raises:
      ValueError: an `axis` that does not exist, a `where` of the wrong shape, or an
        `implementation` that cannot run.
      TypeError: `x` not floating point.

    For a loss of one label per row, `softmax_cross_entropy` writes no array of this size.

    Cost: in a kernel one read of `x`, two where a row does not fit in the core's memory, and a
    write; y is kept for the gradient.

    Example:
      >>> print(log_softmax(jnp.array([0.0, 1e4])))
      [-10000.      0.]

    Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
    arXiv:1805.02867.
    """
    return over_rows(
        _log_softmax, _log_softmax_kernel, x, axis=axis, where=where, choice=implementation
    )


def logsumexp(
    x: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Logarithm of the sum of exponentials along an axis, the normaliser of the softmax.

        log Z = m + log Σ_j exp(x_j - m),   m = max_j x_j

    Args:
      x: floating point, of any shape with at least one axis.
      axis: the axis to sum over. Default: the last.
      where: boolean, broadcastable to `x`: the entries that take part. Default: all.
      implementation: what computes it, see `choose_implementation`.

    Returns:
      An array like `x` without `axis`, computed in at least float32; -inf for a row without any
      entry but -inf, whose gradient is zero.

    Raises:
      ValueError: an `axis` that does not exist, a `where` of the wrong shape, or an
        `implementation` that cannot run.
      TypeError: `x` not floating point.

    It is `jax.scipy.special.logsumexp` over one axis, in one pass.

    Cost: in a kernel one read of `x` and a number a row written; `x` is kept, and read once more
    for the gradient.

    Example:
      >>> print(logsumexp(jnp.array([[1e4, 1e4], [0.0, 0.0]])).round(2))
      [1.000069e+04 6.900000e-01]

    Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
    arXiv:1805.02867.
    """
    return over_rows(
        _logsumexp,
        _logsumexp_kernel,
        x,
        axis=axis,
        where=where,
        choice=implementation,
        reduces=True,
    )


def over_rows(
    by_xla: Callable[[Array], Array],
    by_kernel: Callable[[Array, Implementation], Array],
    x: ArrayLike,
    *,
    axis: int,
    where: ArrayLike | None,
    choice: str | None,
    reduces: bool = False,
) -> Array:
    """A function of rows along any axis of an array, in at least float32, entries left out -inf.

    Args:
      by_xla: the function of rows along the last axis.
      by_kernel: the same by a Pallas kernel.
      x: the array.
      axis: where its rows are.
      where: the entries that take part.
      choice: `implementation` of the caller.
      reduces: whether the function returns one number per row.

    Raises:
      ValueError: an `axis` that does not exist, a `where` of the wrong shape, or a `choice` that
        cannot run.
      TypeError: `x` not floating point.

    >>> total = lambda x: x.sum(-1)
    >>> x = jnp.ones((2, 3))
    >>> print(over_rows(total, None, x, axis=0, where=None, choice="xla", reduces=True))
    [2. 2. 2.]
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    check_broadcastable(x.shape, where=where)
    implementation = choose_implementation(choice, x)
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    rows = jnp.moveaxis(x, axis, -1)
    if rows.size == 0:
        return jnp.full(rows.shape[:-1], -jnp.inf, x.dtype) if reduces else x
    if implementation.platform == "xla":
        y = by_xla(rows.astype(compute_dtype(rows))).astype(x.dtype)
    else:
        y = by_kernel(rows, implementation)
    return y if reduces else jnp.moveaxis(y, -1, axis)


def measure_exponentials(tile: Tile) -> Statistics:
    """Maximum m of a tile's first values, and Σ exp(x - m).

    >>> x = jnp.array([[0.0, 1.0, 9.0]])
    >>> tile = Tile((x,), (), (), jnp.arange(3), jnp.array([[True, True, False]]))
    >>> print(*measure_exponentials(tile))
    [[1.]] [[1.3678794]]
    """
    x = jnp.where(tile.exists, tile.values[0], -jnp.inf)
    top = jnp.max(x, axis=-1, keepdims=True)
    return top, jnp.sum(jnp.exp(x - finite(top)), axis=-1, keepdims=True)


def merge_exponentials(a: Statistics, b: Statistics) -> Statistics:
    """Maximum and sum of two sets of columns together.

    >>> zero, one, two = jnp.array([[0.0]]), jnp.array([[1.0]]), jnp.array([[2.0]])
    >>> print([x.round(3) for x in merge_exponentials((zero, two), (one, one))])
    [Array([[1.]], dtype=float32), Array([[1.736]], dtype=float32)]
    """
    top = jnp.maximum(a[0], b[0])
    low = finite(top)
    return top, a[1] * jnp.exp(a[0] - low) + b[1] * jnp.exp(b[0] - low)


def finite(top: Array) -> Array:
    """A maximum, or 0 where it is -inf, so that -inf less the maximum is no NaN.

    >>> print(finite(jnp.array([-jnp.inf, 2.0])))
    [0. 2.]
    """
    return jnp.where(top == -jnp.inf, 0, top)


def _write_softmax(tile: Tile, statistics: Statistics) -> tuple[Array, ...]:
    top, total = statistics
    # A row without entries has the total 0.
    return (jnp.exp(tile.values[0] - finite(top)) * (1 / jnp.where(total == 0, 1, total)),)


def _write_log_softmax(tile: Tile, statistics: Statistics) -> tuple[Array, ...]:
    top, total = statistics
    return (tile.values[0] - finite(top) - jnp.log(jnp.where(total == 0, 1, total)),)


def _sum_of(terms: Callable[[Tile], Array]) -> Callable[[Tile], Statistics]:
    def measure(tile: Tile) -> Statistics:
        return (jnp.sum(jnp.where(tile.exists, terms(tile), 0), axis=-1, keepdims=True),)

    return measure


def _add(a: Statistics, b: Statistics) -> Statistics:
    return (a[0] + b[0],)


_EXPONENTIALS = RowFunction("logsumexp", (-jnp.inf, 0.0), measure_exponentials, merge_exponentials)
_SOFTMAX = _EXPONENTIALS._replace(name="softmax", write=_write_softmax)
_LOG_SOFTMAX = _EXPONENTIALS._replace(name="log_softmax", write=_write_log_softmax)
SOFTMAX_BACKWARD = RowFunction(  # of y and its cotangent
    "softmax_backward",
    (0.0,),
    _sum_of(lambda tile: tile.values[0] * tile.values[1]),
    _add,
    lambda tile, s: (tile.values[0] * (tile.values[1] - s[0]),),
)
_LOG_SOFTMAX_BACKWARD = RowFunction(
    "log_softmax_backward",
    (0.0,),
    _sum_of(lambda tile: tile.values[1]),
    _add,
    lambda tile, s: (tile.values[1] - jnp.exp(tile.values[0]) * s[0],),
)
_XLA = Implementation("xla")


def softmax_by_xla(function: RowFunction) -> Callable[[Array], Array]:
    """A softmax along the last axis, and its change with its argument, y (dx - Σ y dx).

    >>> print(softmax_by_xla(_SOFTMAX)(jnp.zeros(4)))
    [0.25 0.25 0.25 0.25]
    """

    @jax.custom_jvp
    def softmax(x: Array) -> Array:
        return apply_rows(function, (x,), dtypes=(x.dtype,), implementation=_XLA)[0][0]

    @softmax.defjvp
    def tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        (x,), (dx,) = primals, tangents
        y = softmax(x)
        return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))

    return softmax


_softmax = softmax_by_xla(_SOFTMAX)


@jax.custom_jvp
def _log_softmax(x: Array) -> Array:
    return apply_rows(_LOG_SOFTMAX, (x,), dtypes=(x.dtype,), implementation=_XLA)[0][0]


@_log_softmax.defjvp
def _log_softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y = _log_softmax(x)
    return y, dx - jnp.sum(jnp.exp(y) * dx, axis=-1, keepdims=True)


@jax.custom_jvp
def _logsumexp(x: Array) -> Array:
    _, (top, total) = apply_rows(_EXPONENTIALS, (x,), implementation=_XLA)
    return _log_z(top, total)


@_logsumexp.defjvp
def _logsumexp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    _, (top, total) = apply_rows(_EXPONENTIALS, (x,), implementation=_XLA)
    return _log_z(top, total), jnp.sum(_shares(x, top, total) * dx, axis=-1)


def _log_z(top: Array, total: Array) -> Array:
    return top + jnp.log(jnp.where(total == 0, 1, total))


def _shares(x: Array, top: Array, total: Array) -> Array:
    """The softmax from its statistics, without the rounding of a large log Z."""
    return jnp.exp(x - finite(top)[..., None]) / jnp.where(total == 0, 1, total)[..., None]


def row_kernel(
    function: RowFunction, backward: RowFunction
) -> Callable[[Array, Implementation], Array]:
    """A kernel `kernel(x, implementation)` whose gradient is another, of result and cotangent.

    >>> kernel = row_kernel(_SOFTMAX, SOFTMAX_BACKWARD)
    >>> print(kernel(jnp.zeros((1, 4)), Implementation("tpu", interpret=True)))
    [[0.25 0.25 0.25 0.25]]
    """

    def compute(f, values, dtype, implementation):
        options = {"implementation": implementation, "returns_statistics": False}
        return apply_rows(f, values, dtypes=(dtype,), **options)[0]

    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def kernel(x: Array, implementation: Implementation) -> Array:
        return compute(function, (x,), x.dtype, implementation)[0]

    def forward(x: Array, implementation: Implementation) -> tuple[Array, Array]:
        y = kernel(x, implementation)
        return y, y

    def pull_back(implementation: Implementation, y: Array, g: Array) -> tuple[Array, ...]:
        return compute(backward, (y, g), y.dtype, implementation)

    kernel.defvjp(forward, pull_back)
    return kernel


_softmax_kernel = row_kernel(_SOFTMAX, SOFTMAX_BACKWARD)
_log_softmax_kernel = row_kernel(_LOG_SOFTMAX, _LOG_SOFTMAX_BACKWARD)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _logsumexp_kernel(x: Array, implementation: Implementation) -> Array:
    return _logsumexp_forward(x, implementation)[0]


def _logsumexp_forward(x: Array, implementation: Implementation) -> tuple[Array, tuple]:
    _, (top, total) = apply_rows(_EXPONENTIALS, (x,), implementation=implementation)
    return _log_z(top, total).astype(x.dtype), (x, top, total)


def _logsumexp_backward(
    implementation: Implementation, residuals: tuple[Array, Array, Array], g: Array
) -> tuple[Array]:
    x, top, total = residuals
    return ((g[..., None] * _shares(x.astype(top.dtype), top, total)).astype(x.dtype),)


_logsumexp_kernel.defvjp(_logsumexp_forward, _logsumexp_backward)
