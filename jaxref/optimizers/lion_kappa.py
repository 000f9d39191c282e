r"""The convex functions K that make the Lion-K family, with their subgradients and conjugates.

Each is a function of one vector x: all leaves of a pytree together, as the paper's K is a function
of all parameters. A norm that couples coordinates therefore couples the leaves; `group_l2` alone
has its groups within leaves. All are even, 0 at 0, and choose the subgradient 0 there.

A conjugate is infinite outside of the set where w·x - K(x) is bounded above; that set, scaled by
1 / weight_decay, is where Lion-K keeps its parameters. Membership is tested with a tolerance of
the square root of the machine epsilon, so that `conjugate(subgradient(x))` survives rounding.

Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
Predicts", 2023, arXiv:2310.05898.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import xlog1py

from jaxref.core.checks import canonical_axes, check_interval
from jaxref.core.numerics import compute_dtype


class Kappa(NamedTuple):
    """A convex function K of a pytree, with a subgradient and its conjugate.

    Attributes:
      value: x → K(x), a scalar.
      subgradient: x → an element of ∂K(x), a tree like x.
      conjugate: u → K*(u) = sup_x u·x - K(x), a scalar, inf where unbounded.

    Any K will do, for instance momentum SGD's `K(x) = ‖x‖² / 2`, its own conjugate:

      >>> half = lambda x: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)) / 2
      >>> momentum_sgd = Kappa(value=half, subgradient=lambda x: x, conjugate=half)
    """

    value: Callable[[Any], Array]
    subgradient: Callable[[Any], Any]
    conjugate: Callable[[Any], Array]


def _leaves(tree):
    """The leaves in the type that they are computed in."""
    return [jnp.asarray(x, compute_dtype(x)) for x in jax.tree.leaves(tree)]


def _total(function, tree):
    """Σ function(x_i) over all coordinates of the tree."""
    return sum((jnp.sum(function(x)) for x in _leaves(tree)), start=jnp.zeros(()))


def max_norm(tree: Any) -> Array:
    """‖x‖_∞ over all leaves of a tree; 0 if there are none."""
    return jnp.max(jnp.stack([jnp.zeros(()), *(jnp.max(abs(x), initial=0) for x in _leaves(tree))]))


def _each(function, tree):
    """`function` of every leaf, computed in at least float32, returned in the leaf's type."""

    def leaf(x):
        return function(jnp.asarray(x, compute_dtype(x))).astype(jnp.result_type(x))

    return jax.tree.map(leaf, tree)


def _within(norm, value=0.0, bound=1.0):
    """`value` where norm ≤ bound up to rounding, inf elsewhere."""
    tolerance = jnp.sqrt(jnp.finfo(norm.dtype).eps)
    return jnp.where(norm <= bound * (1 + tolerance), value, jnp.inf)


def _kth_magnitude(tree, k):
    """The k-th largest |x_i| of the tree; 0 if there are fewer.

    Non-negative floats are in the order of their bits, so that bisection finds the bits one by one
    with counts alone, which stay where the leaves are sharded; a sort would gather them.
    """
    leaves = _leaves(jax.lax.stop_gradient(tree))
    dtype = jnp.result_type(jnp.float32, *leaves)
    width = jnp.finfo(dtype).bits
    integer = jnp.dtype(f"int{width}")
    codes = [jax.lax.bitcast_convert_type(jnp.abs(x).astype(dtype), integer) for x in leaves]

    def set_bit(found, i):
        candidate = found | (jnp.ones((), integer) << i)
        count = sum((jnp.sum(code >= candidate) for code in codes), start=jnp.zeros(()))
        return jnp.where(count >= k, candidate, found), None

    bits = jnp.arange(width - 2, -1, -1, dtype=integer)  # from the highest; the sign bit is 0
    found, _ = jax.lax.scan(set_bit, jnp.zeros((), integer), bits)
    return jax.lax.bitcast_convert_type(found, dtype)


def _separable(value, derivative, conjugate=jnp.zeros_like) -> Kappa:
    """K(x) = Σ value(x_i) with |derivative| ≤ 1: its conjugate lives on the unit box."""

    def box_conjugate(tree):
        inside = _total(lambda u: conjugate(jnp.clip(u, -1, 1)), tree)
        return _within(max_norm(tree), inside)

    return Kappa(lambda x: _total(value, x), lambda x: _each(derivative, x), box_conjugate)


l1 = _separable(jnp.abs, jnp.sign)
"""`K(x) = ‖x‖₁`, ∂K = sign: Lion. K* confines u to the box ‖u‖_∞ ≤ 1."""

entropy = _separable(
    lambda x: jnp.abs(x) + jnp.log1p(jnp.exp(-2 * jnp.abs(x))) - jnp.log(2),  # log cosh x
    jnp.tanh,
    lambda u: (xlog1py(1 + u, u) + xlog1py(1 - u, -u)) / 2,
)
"""`K(x) = Σ log cosh x_i`, ∂K = tanh: a smooth Lion, with the binary entropy of the box
`K*(u) = ½ Σ (1+u) log(1+u) + (1-u) log(1-u)` as its regulariser."""


def huber(epsilon: float = 1e-3) -> Kappa:
    r"""The Huber function: Lion with a linear zone around 0.

        K(x) = Σ_i  x_i² / 2ε  where |x_i| ≤ ε,  |x_i| - ε/2  elsewhere
        ∂K(x) = clip(x / ε, -1, 1),     K*(u) = ε/2 ‖u‖²  on the box ‖u‖_∞ ≤ 1

    Args:
      epsilon: ε above 0, the size of momentum under which a coordinate's step shrinks. The paper
        leaves it open; the default 1e-3 suits gradients of that order.

    Returns:
      the `Kappa`, for `lion_k`.

    Raises:
      ValueError: `epsilon` is not positive and finite.

    Use it for Lion with steps that vanish at a minimum; `entropy` is the smooth form.

    Cost: elementwise, as `l1`; no norm to compute.

    Example:
      >>> print(huber(0.5).subgradient(jnp.array([0.25, -3.0])))
      [ 0.5 -1. ]

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)

    def value(x):
        clipped = jnp.clip(x / epsilon, -1, 1)
        return clipped * (x - epsilon * clipped / 2)

    return _separable(value, lambda x: jnp.clip(x / epsilon, -1, 1), lambda u: epsilon / 2 * u**2)


def relu_truncated(threshold: float = 1e-3) -> Kappa:
    r"""The soft-thresholded l1 norm: Lion that leaves coordinates of small momentum alone.

        K(x) = Σ_i max(|x_i| - e, 0),     ∂K(x) = sign(x) 1[|x| > e]
        K*(u) = e ‖u‖₁  on the box ‖u‖_∞ ≤ 1

    Args:
      threshold: e at least 0; 0 is `l1`. The paper leaves it open; the default 1e-3 suits gradients
        of that order.

    Returns:
      the `Kappa`, for `lion_k`.

    Raises:
      ValueError: `threshold` is negative or not finite.

    Use it for sparse parameters: with weight decay, K* is an l1 penalty.

    Cost: elementwise, as `l1`; no norm to compute.

    Example:
      >>> print(relu_truncated(0.5).subgradient(jnp.array([0.25, -3.0])))
      [ 0. -1.]

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    check_interval(0, jnp.inf, threshold=threshold)
    return _separable(
        lambda x: jnp.maximum(jnp.abs(x) - threshold, 0),
        lambda x: jnp.where(jnp.abs(x) > threshold, jnp.sign(x), 0),
        lambda u: threshold * jnp.abs(u),
    )


def lp(p: float = 1.5) -> Kappa:
    r"""The lp norm over all leaves: from Lion (p = 1) to the normalised gradient (p = 2) and on.

        K(x) = ‖x‖_p,     ∂K(x) = sign(x) (|x| / ‖x‖_p)^{p-1}
        K* confines u to ‖u‖_q ≤ 1, 1/p + 1/q = 1

    Args:
      p: at least 1 and finite; `top_k_l1(1)` is the limit p → ∞. Default 1.5, halfway from `l1`
        to `l2`.

    Returns:
      the `Kappa`, for `lion_k`.

    Raises:
      ValueError: `p` is below 1 or not finite.

    Use it to choose between steps of equal size in every coordinate and steps that follow the
    gradient; `l2` is p = 2.

    Cost: a maximum and a sum over all parameters a step, and two powers for each of them.

    Example:
      >>> print(lp(2).subgradient(jnp.array([3.0, -4.0])))
      [ 0.6 -0.8]

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    check_interval(1, jnp.inf, p=p)

    def scales(tree, order):
        """‖x‖_∞ and the norm over ‖x‖_∞, which neither under- nor overflows; 1 and 1 for 0."""
        largest = jax.lax.stop_gradient(max_norm(tree))
        largest = jnp.where(largest > 0, largest, 1)
        powers = _total(lambda x: (jnp.abs(x) / largest) ** order, tree)
        return largest, jnp.where(powers > 0, powers, 1) ** (1 / order)

    def norm(tree, order):
        largest, ratio = scales(tree, order)
        return jnp.where(max_norm(tree) > 0, largest * ratio, 0)

    def subgradient(tree):
        largest, ratio = scales(tree, p)
        return _each(lambda x: jnp.sign(x) * (jnp.abs(x) / largest / ratio) ** (p - 1), tree)

    def conjugate(tree):
        return _within(max_norm(tree) if p == 1 else norm(tree, p / (p - 1)))

    return Kappa(lambda tree: norm(tree, p), subgradient, conjugate)


l2 = lp(2)
"""`K(x) = ‖x‖₂` over all leaves, ∂K = x / ‖x‖₂: the normalised gradient. K* confines u to the unit
ball."""


def group_l2(axis: int | tuple[int, ...] = -1) -> Kappa:
    r"""The sum of the l2 norms of groups: every group takes a step of length one.

        K(x) = Σ_G ‖x_G‖₂,     ∂K(x)_G = x_G / ‖x_G‖₂
        K* confines u to ‖u_G‖₂ ≤ 1 for every group G

    Args:
      axis: the axes of each leaf that run within a group: -1 (the default) gives the rows of a
        matrix, 0 its columns (the fan-in of an `[in, out]` kernel). A scalar leaf is a group.

    Returns:
      the `Kappa`, for `lion_k`.

    Raises:
      ValueError: when applied to a leaf with dimensions but without `axis`.

    Use it where a neuron or a channel is the unit; `l2` has one group for everything.

    Cost: a maximum and a sum over each group a step.

    Example:
      >>> print(group_l2().subgradient(jnp.array([[3.0, -4.0], [0.0, 2.0]])))
      [[ 0.6 -0.8]
       [ 0.   1. ]]

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """

    def over_groups(function, scalar):
        """`function` of one vector, mapped over the groups of a leaf."""

        def mapped(x):
            axes = canonical_axes(axis, x.ndim) if x.ndim else ()
            each = function
            for a in range(x.ndim):  # the first axis is the innermost map's: all keep their places
                if a not in axes:
                    each = jax.vmap(each, in_axes=a, out_axes=0 if scalar else a)
            return each(x)

        return mapped

    norms = over_groups(l2.value, scalar=True)
    directions = over_groups(l2.subgradient, scalar=False)
    return Kappa(
        lambda tree: _total(norms, tree),
        lambda tree: _each(directions, tree),
        lambda tree: _within(max_norm([norms(x) for x in _leaves(tree)])),
    )


def top_k_l1(k: int = 1) -> Kappa:
    r"""The sum of the k largest magnitudes over all leaves: k coordinates move per step.

        K(x) = Σ_{i≤k} |x|_(i),     ∂K(x) = sign(x) 1[|x| ≥ |x|_(k)]
        K* confines u to ‖u‖_∞ ≤ 1 and ‖u‖₁ ≤ k

    Coordinates tied for the last places share them: with n ties for r places each gets r / n, which
    is a subgradient too and favours no order of the leaves.

    Args:
      k: at least 1. 1 (the default) is the max norm, whose K* confines u to the l1 ball; as many as
        there are coordinates, or more, is `l1`.

    Returns:
      the `Kappa`, for `lion_k`.

    Raises:
      ValueError: `k` is not an integer of at least 1.

    Use it for sparse steps; `relu_truncated` cuts at a fixed size instead.

    Cost: a count over all parameters for each bit of the k-th magnitude, 31 in float32, whatever k;
    no sort.

    Example:
      >>> print(top_k_l1(2).subgradient(jnp.array([3.0, -4.0, 0.5])))
      [ 1. -1.  0.]

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")

    def weights(tree):
        """|x_i| → the weight of the coordinate: 1 above the k-th magnitude, a share at it."""
        last = _kth_magnitude(tree, k)
        above = _total(lambda x: jnp.abs(x) > last, tree)
        tied = _total(lambda x: jnp.abs(x) == last, tree)
        share = jnp.clip((k - above) / jnp.maximum(tied, 1), 0, 1)
        return lambda size: jnp.where(size > last, 1, jnp.where(size == last, share, 0))

    def value(tree):
        weight = weights(tree)
        return _total(lambda x: weight(jnp.abs(x)) * jnp.abs(x), tree)

    def subgradient(tree):
        weight = weights(tree)
        return _each(lambda x: weight(jnp.abs(x)) * jnp.sign(x), tree)

    def conjugate(tree):
        return _within(max_norm(tree)) + _within(_total(jnp.abs, tree), bound=k)

    return Kappa(value, subgradient, conjugate)


_NAMED = {
    "l1": lambda: l1,
    "l2": lambda: l2,
    "entropy": lambda: entropy,
    "lp": lp,
    "group_l2": group_l2,
    "huber": huber,
    "top_k_l1": top_k_l1,
    "relu_truncated": relu_truncated,
}


def resolve_kappa(kappa: Kappa | str) -> Kappa:
    """The function itself, or the one of that name with its default parameter.

    Raises:
      ValueError: no function has the name.
      TypeError: neither a `Kappa` nor a string.

    >>> resolve_kappa("entropy") is entropy
    True
    """
    if isinstance(kappa, Kappa):
        return kappa
    if not isinstance(kappa, str):
        raise TypeError(f"kappa must be a Kappa or the name of one, got {kappa!r}")
    if kappa not in _NAMED:
        raise ValueError(f"kappa must be a Kappa or one of {', '.join(_NAMED)}, got {kappa!r}")
    return _NAMED[kappa]()
