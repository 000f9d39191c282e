"""Lion and the Lion-K family: a convex function's subgradient of interpolated momentum.

Lion is Lion-K with the l1 norm; `lion_kappa.py` has the other functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers.common import (
    accumulate,
    check_moment_dtype,
    descend,
    store,
    zeros_of_moment,
)
from jaxref.optimizers.lion_kappa import Kappa, l1, max_norm, resolve_kappa


class ScaleByLionKState(NamedTuple):
    """State of `scale_by_lion_k`: as of `optax.scale_by_lion`.

    Attributes:
      count: int32 scalar, the steps taken.
      mu: m, the average of the gradients; a tree like the parameters.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    mu: optax.Updates


def scale_by_lion_k(
    kappa: Kappa | str = l1,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""The direction of Lion-K: a subgradient of K at the momentum mixed with the gradient.

        u = ∂K(b1 m + (1 - b1) g)
        m ← b2 m + (1 - b2) g,     m = 0 at first

    The direction uses the old m; only then m takes in the gradient. There is one buffer, no bias
    correction and no epsilon. The paper stores -m; K is even here, so that the steps are the same.

    Args:
      kappa: K, a `Kappa` of functions on the tree of all parameters, or the name of one: "l1",
        "l2", "lp", "group_l2", "huber", "entropy", "top_k_l1" or "relu_truncated", the last six
        with their default parameters. Default `l1`, which is Lion.
      b1: in [0, 1), weight of the momentum in the direction; with b1 = b2 the momentum is not
        mixed with the gradient a second time (signum for `l1`).
      b2: in [0, 1), decay of the momentum. Defaults 0.9 and 0.99 as in the Lion paper, which takes
        0.95 and 0.98 for language models.
      mu_dtype: the floating type of m; None takes the parameters'.

    Returns:
      the transformation; its updates have the gradients' types, and are computed in at least
      float32. Its state is a `ScaleByLionKState`.

    Raises:
      ValueError: `b1` or `b2` outside [0, 1), an unknown `kappa`; in `update`, gradients of
        another structure or shape than m.
      TypeError: `kappa` is neither a `Kappa` nor a name, or `mu_dtype` is not floating point.

    Use it in an `optax.chain` of one's own; `lion_k` is the whole optimizer.

    Cost: one momentum for each parameter, half of Adam's state; besides, what the subgradient of K
    takes.

    Example:
      >>> direction = scale_by_lion_k("l2")
      >>> gradient = jnp.array([3.0, -4.0])
      >>> print(direction.update(gradient, direction.init(gradient))[0])
      [ 0.6 -0.8]

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    kappa = resolve_kappa(kappa)
    check_interval(0, 1, closed="left", b1=b1, b2=b2)
    check_moment_dtype(mu_dtype)
    # b1 m + (1 - b1) g is also an average of g with the new m. Written so, no step has to read the
    # old m once the new one is written in its place, and XLA keeps no copy of it.
    from_new = isinstance(b1, int | float) and isinstance(b2, int | float) and b1 <= b2 > 0

    def init(params):
        return ScaleByLionKState(jnp.zeros([], jnp.int32), zeros_of_moment(params, mu_dtype))

    def update(updates, state, params=None):
        del params
        check_same_tree(state.mu, updates=updates)
        mu = accumulate(b2, 1 - b2, state.mu, updates)
        if from_new:
            mixed = accumulate(b1 / b2, 1 - b1 / b2, mu, updates)
        else:
            mixed = accumulate(b1, 1 - b1, state.mu, updates)
        direction = kappa.subgradient(mixed)
        count = optax.safe_increment(state.count)
        return store(direction, updates), ScaleByLionKState(count, store(mu, state.mu))

    return optax.GradientTransformation(init, update)


def lion_k(
    learning_rate: optax.ScalarOrSchedule,
    kappa: Kappa | str = l1,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    r"""Lion-K: the family of optimizers whose weight decay is a constraint or a regulariser.

        x ← x - lr (∂K(b1 m + (1 - b1) g) + wd x)
        m ← b2 m + (1 - b2) g

    With wd > 0 its fixed points are those of the composite problem

        min_x f(x) + K*(wd x) / wd

    For K = ‖x‖₁ (Lion) that is `min f(x)` subject to ‖x‖_∞ ≤ 1/wd; for ‖x‖₂ the ball
    ‖x‖₂ ≤ 1/wd; for log cosh the box with an entropy inside. Parameters outside of the set approach
    it at the rate (1 - lr wd) per step and, once inside, do not leave it (lr wd ≤ 1).

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      kappa: K, a `Kappa` or its name; see `scale_by_lion_k`. Default `l1`, which is Lion.
      b1: in [0, 1), weight of the momentum in the direction. Default 0.9.
      b2: in [0, 1), decay of the momentum. Default 0.99.
      mu_dtype: the floating type of m; None takes the parameters'.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. Default 1, the unit box. 0 is
        no constraint.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range, an unknown `kappa`; in `update`, trees that do not
        match, or params missing where `weight_decay` needs them.
      TypeError: `kappa` is neither a `Kappa` nor a name, or `mu_dtype` is not floating point.

    Use it to choose the geometry: `l2` for a norm ball, `entropy` or `huber` for steps that vanish
    at a minimum, `top_k_l1` for sparse steps; `lion` is the plain optimizer.

    Cost: one momentum for each parameter, one gradient a step; reductions over the parameters where
    K is a norm other than `l1`.

    Example:
      >>> optimizer = lion_k(0.1, "l2", weight_decay=2.0)
      >>> x = jnp.array([1.0, 0.0])
      >>> print(optimizer.update(jnp.array([3.0, -4.0]), optimizer.init(x), x)[0])
      [-0.26  0.08]

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    return descend(scale_by_lion_k(kappa, b1, b2, mu_dtype), learning_rate, weight_decay, mask)


def scale_by_lion(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""The direction of Lion: the sign of the momentum mixed with the gradient.

        u = sign(b1 m + (1 - b1) g)
        m ← b2 m + (1 - b2) g,     m = 0 at first

    Args:
      b1: in [0, 1), weight of the momentum in the direction. Default 0.9.
      b2: in [0, 1), decay of the momentum. Default 0.99.
      mu_dtype: the floating type of m; None takes the parameters', bfloat16 halves its memory.

    Returns:
      the transformation; its updates are -1, 0 or 1 in the gradients' types. Its state is a
      `ScaleByLionKState`.

    Raises:
      ValueError: `b1` or `b2` outside [0, 1); in `update`, gradients of another structure or shape
        than m.
      TypeError: `mu_dtype` is not floating point.

    Use it in an `optax.chain` of one's own; `lion` is the whole optimizer.

    Cost: one momentum for each parameter, half of Adam's state; elementwise work without a root.

    Example:
      >>> direction = scale_by_lion()
      >>> gradient = jnp.array([3.0, -0.1, 0.0])
      >>> print(direction.update(gradient, direction.init(gradient))[0])
      [ 1. -1.  0.]

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """
    return scale_by_lion_k(l1, b1, b2, mu_dtype)


def lion(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    r"""Lion, the optimizer found by program search: sign steps along interpolated momentum.

        x ← x - lr (sign(b1 m + (1 - b1) g) + wd x)
        m ← b2 m + (1 - b2) g,     m = 0 at first

    Every coordinate moves by lr whatever the size of its gradient, so that the step does not
    change when the loss is multiplied by a positive number. Weight decay keeps the parameters in
    the box ‖x‖_∞ ≤ 1/wd. The arguments stand in the order of `optax.lion`, and its steps are the
    same in float32; only the default of `weight_decay` differs.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr. Default 1e-4, as in the paper's
        program; 3 to 10 times smaller than AdamW's.
      b1: in [0, 1), weight of the momentum in the direction. Default 0.9.
      b2: in [0, 1), decay of the momentum. Default 0.99; the paper takes b1 = 0.95, b2 = 0.98 for
        language models.
      mu_dtype: the floating type of m; None takes the parameters', bfloat16 halves its memory.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. Default 0; 3 to 10 times
        larger than AdamW's.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, or params
        missing where `weight_decay` needs them.
      TypeError: `mu_dtype` is not floating point.

    Use it for large batches, where it needs less memory and time per step than AdamW
    (`lion_hyperparameters_from_adamw` translates the setting); `lion_k` has other geometries.

    Cost: one momentum for each parameter, half of the state of `adamw`; one gradient a step.

    Example:
      >>> optimizer = lion(0.1, weight_decay=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> print(optimizer.update(jnp.array([3.0, 0.1]), optimizer.init(x), x)[0])
      [-0.15  0.  ]

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """
    return lion_k(learning_rate, l1, b1, b2, mu_dtype, weight_decay, mask)


class LionHyperparameters(NamedTuple):
    """What `lion_hyperparameters_from_adamw` returns; `lion(**h._asdict())` takes it."""

    learning_rate: float
    weight_decay: float


def lion_hyperparameters_from_adamw(
    learning_rate: float, weight_decay: float, factor: float = 10.0
) -> LionHyperparameters:
    r"""Where to start with Lion, given a setting that works with AdamW.

        lr_Lion = lr / factor,     wd_Lion = wd factor

    Lion's step has the larger norm and so wants the smaller lr; the product lr wd, the strength of
    the decay, stays.

    Args:
      learning_rate: AdamW's lr, at least 0.
      weight_decay: AdamW's wd, at least 0, multiplied by lr as in optax and PyTorch.
      factor: above 0; the paper finds 3 to 10. Default 10.

    Returns:
      `LionHyperparameters(learning_rate, weight_decay)`.

    Raises:
      ValueError: a number out of its range.

    Use it where `adamw` has been tuned and `lion` has not, as the middle of a short search; try
    factors from 3 to 10.

    Cost: two multiplications, before the run.

    Example:
      >>> lion_hyperparameters_from_adamw(1e-3, 0.1)
      LionHyperparameters(learning_rate=0.0001, weight_decay=1.0)

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """
    check_interval(0, jnp.inf, learning_rate=learning_rate, weight_decay=weight_decay)
    check_interval(0, jnp.inf, closed="right", factor=factor)
    return LionHyperparameters(learning_rate / factor, weight_decay * factor)


def lion_k_lyapunov(
    x: optax.Params,
    momentum: optax.Updates,
    loss: float | Array,
    *,
    kappa: Kappa | str,
    alpha: float | Array,
    gamma: float | Array,
    epsilon: float | Array,
    weight_decay: float | Array,
) -> Array:
    r"""The Lyapunov function of Lion-K, which its continuous-time dynamics never increase.

    Along the flow

        m' = -α ∇f(x) - γ m
        x' = ∂K(m - ε (α ∇f(x) + γ m)) - wd x

    the value

        H = α f(x) + γ/wd K*(wd x) + (1 - ε γ)/(1 + ε wd) (K*(wd x) + K(m) - wd x·m)

    falls until it is stationary. Its last bracket is at least 0 by Fenchel and Young, and 0 where
    m maximises `wd x·m - K(m)`.

    Here m is a running average of -∇f, as in the paper: minus the `mu` of the state. Steps of
    `lion_k` are the Euler steps of length lr of the flow with
    `α = γ = (1 - b2) / lr` and `ε = (1 - b1) / γ`.

    Args:
      x: tree of the parameters.
      momentum: m, a tree like `x`.
      loss: f(x), a scalar.
      kappa: K, a `Kappa` or its name.
      alpha: α at least 0, the rate at which the gradient enters the momentum.
      gamma: γ above 0, the rate at which the momentum decays.
      epsilon: ε at least 0 with ε γ ≤ 1, how far the direction looks ahead.
      weight_decay: wd above 0; without it there is no constraint and no H.

    Returns:
      H, a scalar; inf while `x` is outside of the set that K* allows.

    Raises:
      ValueError: a number out of its range, trees that do not match or an unknown `kappa`.

    Use it to watch training (is it still descending?), or to test an integrator.

    Cost: K, K* and an inner product over the parameters; no gradient.

    Example:
      >>> x, m = jnp.array([0.5, -0.2]), jnp.array([-0.3, 0.1])
      >>> h = lion_k_lyapunov(
      ...     x, m, jnp.sum(x**2), kappa="l1", alpha=1.0, gamma=1.0, epsilon=0.5, weight_decay=1.0
      ... )
      >>> print(h.round(3))
      0.48

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    kappa = resolve_kappa(kappa)
    check_interval(0, jnp.inf, alpha=alpha, epsilon=epsilon)
    check_interval(0, jnp.inf, closed="right", gamma=gamma, weight_decay=weight_decay)
    check_interval(0, 1, closed="both", **{"epsilon * gamma": epsilon * gamma})
    check_same_tree(x, momentum=momentum)
    decayed = jax.tree.map(lambda x: weight_decay * jnp.asarray(x, compute_dtype(x)), x)
    conjugate = kappa.conjugate(decayed)
    gap = conjugate + kappa.value(momentum) - optax.tree.vdot(decayed, momentum)
    weight = (1 - epsilon * gamma) / (1 + epsilon * weight_decay)
    gap = jnp.where(weight > 0, weight * gap, 0)  # not 0 · inf outside of the constraint
    return alpha * loss + gamma / weight_decay * conjugate + gap


def box_constraint_violation(params: optax.Params, weight_decay: float | Array) -> Array:
    r"""How far the parameters are outside of the box that Lion's weight decay imposes.

        max(wd ‖x‖_∞ - 1, 0)

    Relative to the box's half side 1/wd. Each step of Lion multiplies it by at most (1 - lr wd).

    Args:
      params: tree of the parameters.
      weight_decay: wd at least 0; 0 is no box, and no violation.

    Returns:
      a scalar at least 0; 0 inside of the box.

    Raises:
      ValueError: `weight_decay` is negative or not finite.

    Use it to see whether the parameters have come into the box yet, before which `lion` mostly
    decays them; `lion_k_lyapunov` watches the loss as well.

    Cost: one maximum over the parameters.

    Example:
      >>> print(box_constraint_violation({"w": jnp.array([0.3, -3.0])}, weight_decay=0.5))
      0.5

    Reference: Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
    Predicts", 2023, arXiv:2310.05898.
    """
    check_interval(0, jnp.inf, weight_decay=weight_decay)
    return jnp.maximum(weight_decay * max_norm(params) - 1, 0)
