"""Neurons that are weighted means: Lehmer and Gini means of positive inputs, and their layer."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype


def lehmer_mean(
    x: ArrayLike,
    weights: ArrayLike,
    p: ArrayLike,
    *,
    axis: int = -1,
    epsilon: float = 1e-12,
) -> Array:
    r"""The weighted Lehmer mean: from the least of the inputs to the largest, as p grows.

        L_p(x; w) = Σ_i w_i x_i^p / Σ_i w_i x_i^(p-1)

    p = 1 is the arithmetic mean, 0 the harmonic and 2 the contraharmonic one, 1/2 the geometric
    mean of two equally weighted inputs; at ∞ and -∞ it is the largest and the least input of
    positive weight. It increases with p, and scales with x.

    Args:
      x: `[..., n]` floating point, at least 0, the inputs at `axis`. Below `epsilon` they count as
        that, with a gradient of 0.
      weights: at least 0 and not all 0: `[n]`, or broadcastable to `x`.
      p: the order; any number, also infinite. Differentiable where it is finite.
      axis: the axis of the mean.
      epsilon: above 0, the least that an input counts as. Default 1e-12.

    Returns:
      The mean without `axis`, in the type of `x`, from sums of exponentials of logarithms in at
      least float32. NaN where all weights are 0.

    Raises:
      ValueError: negative `x`, negative weights or only zeros (where values are known, not under
        jit), weights that do not fit, `axis` out of range, or `epsilon` not positive.
      TypeError: `x` or `weights` not floating point.

    Use it as a neuron with an adjustable logic, from AND (-∞) over a mean to OR (∞); `multiplet`
    has several orders at once, `gini_mean` two free exponents.

    Cost: O(n): a logarithm and two exponentials for each input.

    Example:
      >>> x, w = jnp.array([1.0, 4.0]), jnp.ones(2)
      >>> print([float(lehmer_mean(x, w, p).round(3)) for p in (0.0, 0.5, 1.0, 2.0)])
      [1.6, 2.0, 2.5, 3.4]

    Reference: Frick, "An Informal Introduction to Multiplet Neural Networks", 2020,
    arXiv:2006.01606.
    """
    x, weights, axis = _checked(x, weights, axis, epsilon)
    return _lehmer(x, weights, p, axis, epsilon).astype(x.dtype)


def gini_mean(
    x: ArrayLike,
    weights: ArrayLike,
    r: ArrayLike,
    s: ArrayLike,
    *,
    axis: int = -1,
    epsilon: float = 1e-12,
) -> Array:
    r"""The weighted Gini mean: two exponents, of which the Lehmer means have neighbouring ones.

        G_{r,s}(x; w) = (Σ_i w_i x_i^r / Σ_i w_i x_i^s)^(1 / (r - s))
        G_{r,r}(x; w) = exp(Σ_i w_i x_i^r ln x_i / Σ_i w_i x_i^r)

    It is symmetric in r and s, `G_{p,p-1} = L_p`, and `G_{p,0}` the power mean of order p.

    Args:
      x: `[..., n]` floating point, at least 0. Below `epsilon` they count as that.
      weights: at least 0 and not all 0: `[n]`, or broadcastable to `x`.
      r, s: finite exponents. Within 0.01 of each other they count as their middle, which is the
        same up to (r - s)².
      axis: the axis of the mean.
      epsilon: above 0. Default 1e-12.

    Returns:
      The mean without `axis`, in the type of `x`. NaN where all weights are 0.

    Raises:
      ValueError: as `lehmer_mean`, or an exponent that is infinite.
      TypeError: `x` or `weights` not floating point.

    Use it where one neuron is to reach power means and Lehmer means.

    Cost: O(n), about twice that of `lehmer_mean`: the form for r = s is computed as well.

    Example:
      >>> x, w = jnp.array([1.0, 4.0]), jnp.ones(2)
      >>> print([float(gini_mean(x, w, *rs).round(3)) for rs in ((0.0, 0.0), (2.0, 1.0))])
      [2.0, 3.4]

    Reference: Frick, "An Informal Introduction to Multiplet Neural Networks", 2020,
    arXiv:2006.01606.
    """
    x, weights, axis = _checked(x, weights, axis, epsilon)
    check_interval(-jnp.inf, jnp.inf, r=r, s=s)
    logs = _logarithms(x, epsilon)
    difference = jnp.asarray(r) - jnp.asarray(s)
    near = jnp.abs(difference) < 0.01
    quotient = _log_power_sum(logs, weights, r, axis) - _log_power_sum(logs, weights, s, axis)
    middle = _mean_logarithm(logs, weights, (jnp.asarray(r) + jnp.asarray(s)) / 2, axis)
    log_mean = jnp.where(near, middle, quotient / jnp.where(near, 1.0, difference))
    return jnp.exp(log_mean).astype(x.dtype)


def multiplet(
    x: ArrayLike,
    weights: ArrayLike,
    orders: Array | Sequence[float],
    *,
    epsilon: float = 1e-12,
) -> Array:
    r"""Units that each emit several Lehmer means of their inputs, with one vector of weights.

        y_{u,k} = L_{p_k}(x; w_u)

    Args:
      x: `[..., n]` floating point, at least 0.
      weights: `[n, units]`, at least 0, no column all 0.
      orders: `[m]`, p_1 ... p_m; numbers may be infinite.
      epsilon: above 0, the least that an input counts as. Default 1e-12.

    Returns:
      `[..., units, m]` in the type of `x`.

    Raises:
      ValueError: as `lehmer_mean`, or weights that are not `[n, units]`, or no order.
      TypeError: `x` or `weights` not floating point.

    Use it without an activation function: the orders are what makes it nonlinear.
    `MultipletLayer` is the module.

    Cost: 2 · m · n · units exponentials an example, and arrays `[..., n, units]`, in place of a
    matrix product.

    Example:
      >>> y = multiplet(jnp.array([1.0, 4.0]), jnp.ones((2, 1)), (-math.inf, 1.0, math.inf))
      >>> print(y.round(3))
      [[1. 2.5 4. ]]

    Reference: Frick, "An Informal Introduction to Multiplet Neural Networks", 2020,
    arXiv:2006.01606.
    """
    if jnp.ndim(weights) != 2:
        raise ValueError(f"weights must have shape [n, units], got {jnp.shape(weights)}")
    if jnp.asarray(orders).ndim != 1 or len(orders) == 0:
        raise ValueError(f"orders must be a vector of at least one order, got {orders}")
    x, weights = _check_values(x, weights, 0, epsilon)
    check_shape((*x.shape[:-1], weights.shape[0]), x=x)
    means = [_lehmer(x[..., None], weights, p, -2, epsilon) for p in orders]
    return jnp.stack(means, axis=-1).astype(x.dtype)


def lehmer_mean_weight_gradient(
    x: ArrayLike, weights: ArrayLike, p: float, *, axis: int = -1, epsilon: float = 1e-12
) -> Array:
    r"""How a Lehmer mean changes with each weight.

        ∂L_p / ∂w_i = x_i^(p-1) (x_i - L_p) / Σ_j w_j x_j^(p-1)

    Inputs above the mean raise it.

    Args:
      x, weights, axis, epsilon: as for `lehmer_mean`.
      p: the order, finite.

    Returns:
      Of the shape and type of `x`, also where the weights are shared by examples.

    Raises:
      ValueError: as `lehmer_mean`, or an infinite `p`.
      TypeError: `x` or `weights` not floating point.

    Use it for learning rules without backpropagation through the mean; `jax.grad` of `lehmer_mean`
    gives the same.

    Cost: O(n): five exponentials for each input.

    Example:
      >>> print(lehmer_mean_weight_gradient(jnp.array([1.0, 3.0]), jnp.ones(2), 1.0))
      [-0.5 0.5]

    Reference: Frick, "An Informal Introduction to Multiplet Neural Networks", 2020,
    arXiv:2006.01606.
    """
    x, weights, axis = _checked(x, weights, axis, epsilon)
    check_interval(-jnp.inf, jnp.inf, p=p)
    logs = _logarithms(x, epsilon)
    log_sum = jnp.expand_dims(_log_power_sum(logs, weights, p - 1, axis), axis)
    mean = jnp.expand_dims(_lehmer(x, weights, p, axis, epsilon), axis)
    return (jnp.exp((p - 1) * logs - log_sum) * (jnp.exp(logs) - mean)).astype(x.dtype)


def lehmer_mean_order_gradient(
    x: ArrayLike, weights: ArrayLike, p: float, *, axis: int = -1, epsilon: float = 1e-12
) -> Array:
    r"""How a Lehmer mean changes with its order: never downwards.

        ∂L_p / ∂p = L_p (E_p[ln x] - E_{p-1}[ln x]),   E_a[f] = Σ_i w_i x_i^a f_i / Σ_i w_i x_i^a

    Args:
      x, weights, axis, epsilon: as for `lehmer_mean`.
      p: the order, finite.

    Returns:
      `x` without `axis`, at least 0 up to rounding; 0 where all inputs of positive weight are
      equal.

    Raises:
      ValueError: as `lehmer_mean`, or an infinite `p`.
      TypeError: `x` or `weights` not floating point.

    Use it to see how far from equal the inputs are, seen from the order p; at p = 1 it is the
    `mean_case_slope_score`.

    Cost: O(n), about three times that of `lehmer_mean`.

    Example:
      >>> print(lehmer_mean_order_gradient(jnp.array([1.0, 3.0]), jnp.ones(2), 1.0).round(3))
      0.549

    Reference: Frick, "An Informal Introduction to Multiplet Neural Networks", 2020,
    arXiv:2006.01606.
    """
    x, weights, axis = _checked(x, weights, axis, epsilon)
    check_interval(-jnp.inf, jnp.inf, p=p)
    logs = _logarithms(x, epsilon)
    mean_logs = [_mean_logarithm(logs, weights, a, axis) for a in (p, p - 1)]
    mean = _lehmer(x, weights, p, axis, epsilon)
    return (mean * (mean_logs[0] - mean_logs[1])).astype(x.dtype)


def mean_case_slope_score(
    x: ArrayLike, weights: ArrayLike, *, axis: int = -1, epsilon: float = 1e-12
) -> Array:
    r"""How unequal the inputs are that a unit selects: the slope of its mean with the order, at 1.

        ∂L_p / ∂p at p = 1  =  Cov_w(x, ln x)

    the covariance under the weights as probabilities.

    Args:
      x, weights, axis, epsilon: as for `lehmer_mean`.

    Returns:
      `x` without `axis`, at least 0; 0 if and only if all inputs of positive weight are equal.

    Raises:
      ValueError: as `lehmer_mean`.
      TypeError: `x` or `weights` not floating point.

    Use it to find units that select inputs of one kind, or to scale a unit's learning rate.

    Cost: O(n): a logarithm and an exponential for each input.

    Example:
      >>> x, w = jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 0.0])
      >>> print(mean_case_slope_score(x, w).round(3))
      0.549

    Reference: Frick, "An Informal Introduction to Multiplet Neural Networks", 2020,
    arXiv:2006.01606.
    """
    x, weights, axis = _checked(x, weights, axis, epsilon)
    logs = _logarithms(x, epsilon)
    share = weights / jnp.sum(weights, axis=axis, keepdims=True)
    values = jnp.exp(logs)

    def centred(a: Array) -> Array:
        # Measured from one of its own entries, the mean of equal entries is exact.
        a -= jnp.take(a, jnp.array([0]), axis=axis)
        return a - jnp.sum(share * a, axis=axis, keepdims=True)

    return jnp.sum(share * centred(values) * centred(logs), axis=axis).astype(x.dtype)


class MultipletLayer(nnx.Module):
    """A layer of units that each emit several Lehmer means of their inputs.

        y_{u,k} = L_{p_k}(x; softplus(v_u))

    Args:
      in_features: size of the input's last axis; its entries are positive.
      units: vectors of weights.
      orders: p_1 ... p_m; infinite ones only if they are not trained.
        Default (-1, 0.5, 1, 2).
      train_orders: learn the orders too.
      epsilon: above 0, the least that an input counts as. Default 1e-12.
      dtype: type to compute in; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      kernel: v, `[in_features, units]`, initially standard normal.
      orders: `[m]`, a parameter where it is trained.

    Raises:
      ValueError: no orders, infinite orders that are to be trained, or an input of the wrong size.

    Use it in stacks without an activation function: what it emits is positive, and feeds the next.

    Cost: in_features · units parameters, and 2 · m exponentials for each of them and example, in
    place of a matrix product.

    Example:
      >>> layer = MultipletLayer(3, 2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 3))).shape
      (5, 8)

    Reference: Frick, "An Informal Introduction to Multiplet Neural Networks", 2020,
    arXiv:2006.01606.
    """

    def __init__(
        self,
        in_features: int,
        units: int,
        orders: tuple[float, ...] = (-1.0, 0.5, 1.0, 2.0),
        train_orders: bool = False,
        *,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(orders) == 0:
            raise ValueError(f"orders must be at least one, got {orders}")
        if train_orders:
            check_interval(-jnp.inf, jnp.inf, orders=jnp.asarray(orders))
        kernel = jax.random.normal(rngs.params(), (in_features, units), param_dtype)
        self.kernel = nnx.Param(kernel, axes=("embed", "mlp"))
        trained = jnp.asarray(orders, param_dtype)
        self.orders = nnx.Param(trained, axes=(None,)) if train_orders else tuple(orders)
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Array) -> Array:
        """Maps `[..., in_features]` to `[..., units · m]`, the orders of a unit together."""
        in_features, _ = self.kernel.shape
        if x.shape[-1:] != (in_features,):
            raise ValueError(f"x must have shape [..., {in_features}], got {tuple(x.shape)}")
        dtype = self.dtype or self.kernel.dtype
        weights = jax.nn.softplus(self.kernel[...].astype(dtype))
        orders = self.orders if isinstance(self.orders, tuple) else self.orders[...]
        y = multiplet(x.astype(dtype), weights, orders, epsilon=self.epsilon)
        return y.reshape(*x.shape[:-1], -1)


def _checked(
    x: ArrayLike, weights: ArrayLike, axis: int, epsilon: float
) -> tuple[Array, Array, int]:
    """x, the weights as they broadcast with it, and the axis."""
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    if jnp.shape(weights) == x.shape[axis : axis + 1]:
        weights = jnp.expand_dims(weights, [a for a in range(x.ndim) if a != axis])
    check_broadcastable(x.shape, weights=weights)
    x, weights = _check_values(x, jnp.broadcast_to(weights, x.shape), axis, epsilon)
    return x, weights, axis


def _check_values(
    x: ArrayLike, weights: ArrayLike, axis: int, epsilon: float
) -> tuple[Array, Array]:
    check_floating(x=x, weights=weights)
    check_interval(0, jnp.inf, x=x, weights=weights)
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    x, weights = jnp.asarray(x), jnp.asarray(weights)
    if not isinstance(weights, jax.core.Tracer) and not weights.any(axis=axis).all():
        raise ValueError("weights must not all be 0")
    return x, weights.astype(compute_dtype(x, weights))


def _logarithms(x: Array, epsilon: float) -> Array:
    return jnp.log(jnp.maximum(x.astype(compute_dtype(x)), epsilon))


def _log_power_sum(logs: Array, weights: Array, power: ArrayLike, axis: int) -> Array:
    """log Σ_i w_i x_i^power, linear in the weights: weights of 0 keep their gradient."""
    exponents = power * logs
    admitted = jnp.where(weights > 0, exponents, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(admitted, axis=axis, keepdims=True))
    # Only inputs of weight 0 can be far above the peak.
    terms = weights * jnp.exp(jnp.minimum(exponents - peak, 80.0))
    return jnp.log(jnp.sum(terms, axis=axis)) + jnp.squeeze(peak, axis)


def _mean_logarithm(logs: Array, weights: Array, power: ArrayLike, axis: int) -> Array:
    """Σ_i w_i x_i^power ln x_i / Σ_i w_i x_i^power."""
    log_sum = jnp.expand_dims(_log_power_sum(logs, weights, power, axis), axis)
    shares = weights * jnp.exp(jnp.minimum(power * logs - log_sum, 80.0))
    return jnp.sum(shares * logs, axis=axis)


def _lehmer(x: Array, weights: Array, p: ArrayLike, axis: int, epsilon: float) -> Array:
    logs = _logarithms(x, epsilon)
    if isinstance(p, float) and math.isinf(p):
        sign = math.copysign(1.0, p)
        return sign * jnp.max(jnp.where(weights > 0, sign * jnp.exp(logs), -jnp.inf), axis=axis)
    above = _log_power_sum(logs, weights, p, axis)
    return jnp.exp(above - _log_power_sum(logs, weights, jnp.asarray(p) - 1, axis))
