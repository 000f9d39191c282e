"""Decoupled weight decay: AdamW and SGDW, and their forms with warm restarts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.optimizers.common import (
    accumulate,
    accumulate_squares,
    bias_correction,
    check_moment_dtype,
    check_rate,
    descend,
    momentum_trace,
    product,
    store,
    zeros_of_moment,
    zeros_of_second_moment,
)
from jaxref.optimizers.schedules import cosine_restarts, restart_period


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`: as of `optax.scale_by_adam`.

    Attributes:
      count: int32 scalar, the steps taken.
      mu: m, the average of the gradients; a tree like the parameters.
      nu: v, the average of their squares, in at least float32.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""The direction of Adam: averaged gradient over the root of the averaged square.

        m ← b1 m + (1 - b1) g,     v ← b2 v + (1 - b2) g²,     m = v = 0 at first
        u = m/(1 - b1ᵗ) / (√(v/(1 - b2ᵗ)) + eps)

    Args:
      b1: in [0, 1), decay of the average of the gradients. Default 0.9.
      b2: in [0, 1), decay of the average of their squares. Default 0.999.
      eps: at least 0, added to the root. Default 1e-8. With 0 a coordinate whose gradients were
        all zero gives NaN.
      mu_dtype: the floating type of m; None takes the parameters'. v has at least float32.

    Returns:
      the transformation; its updates have the gradients' types, and are computed in at least
      float32. Its state is a `ScaleByAdamState`.

    Raises:
      ValueError: a number out of its range; in `update`, gradients of another structure or shape
        than m.
      TypeError: `mu_dtype` is not floating point.

    Use it in an `optax.chain` of one's own; `adamw` is the whole optimizer.

    Cost: two moments for each parameter, v in at least float32; elementwise work.

    `optax.scale_by_adam` has the same steps for float32 parameters; for bfloat16 ones it keeps v in
    bfloat16, where v cannot follow the squares at b2 = 0.999.

    Example:
      >>> direction = scale_by_adam()
      >>> gradient = jnp.array([3.0, -0.5])
      >>> print(direction.update(gradient, direction.init(gradient))[0].round(3))
      [ 1. -1.]

    Reference: Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980.
    """
    check_interval(0, 1, closed="left", b1=b1, b2=b2)
    check_interval(0, jnp.inf, eps=eps)
    check_moment_dtype(mu_dtype)

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return ScaleByAdamState(
            count, zeros_of_moment(params, mu_dtype), zeros_of_second_moment(params)
        )

    def update(updates, state, params=None):
        del params
        check_same_tree(state.mu, updates=updates)
        count = optax.safe_increment(state.count)
        mu = accumulate(b1, 1 - b1, state.mu, updates)
        nu = accumulate_squares(b2, 1 - b2, state.nu, updates)
        first, second = bias_correction(b1, count), bias_correction(b2, count)
        direction = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        state = ScaleByAdamState(count, store(mu, state.mu), store(nu, state.nu))
        return store(direction, updates), state

    return optax.GradientTransformation(init, update)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    decay_scaled_by_learning_rate: bool = True,
) -> optax.GradientTransformation:
    r"""Adam with decoupled weight decay.

        m ← b1 m + (1 - b1) g,     v ← b2 v + (1 - b2) g²
        u = m/(1 - b1ᵗ) / (√(v/(1 - b2ᵗ)) + eps)
        x ← x - lr (u + wd x)          decay_scaled_by_learning_rate, as optax and PyTorch have it
        x ← x - lr u - wd x            otherwise, as the paper has it

    The decay does not pass through the averages, so that every coordinate shrinks by the same
    factor; L2 regularisation, which adds wd x to g, hardly shrinks those whose gradients are
    large. The two forms agree for wd_paper = lr wd.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      b1: in [0, 1), decay of the average of the gradients. Default 0.9.
      b2: in [0, 1), decay of the average of their squares. Default 0.999.
      eps: at least 0, added to the root. Default 1e-8.
      mu_dtype: the floating type of m; None takes the parameters'. v has at least float32.
      weight_decay: wd at least 0, or a schedule. Default 1e-4, as in optax. In the paper's form
        give it the schedule's shape: η lr for `learning_rate` goes with η wd.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.
        Usually biases and the scales of norms are not.
      decay_scaled_by_learning_rate: see above. Default True.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, or params
        missing where `weight_decay` needs them.
      TypeError: `mu_dtype` is not floating point.

    Use it first: it is what the others are measured by. `lion` has half of its state and
    `adam_8bit` a quarter; `adamwr` adds warm restarts and a decay that knows the length of the run.

    Cost: two moments for each parameter, 8 bytes in float32; one gradient a step.

    With bfloat16 gradients `optax.inject_hyperparams` wants `hyperparam_dtype=jnp.float32`: in
    bfloat16, b2 = 0.999 is 1.

    Example:
      >>> optimizer = adamw(0.1, weight_decay=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> print(optimizer.update(jnp.array([3.0, -0.1]), optimizer.init(x), x)[0].round(3))
      [-0.15  0.2 ]

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101.
    """
    direction = scale_by_adam(b1, b2, eps, mu_dtype)
    if decay_scaled_by_learning_rate:
        return descend(direction, learning_rate, weight_decay, mask)
    scaled = optax.chain(direction, _scale_by_rate(learning_rate))
    return descend(scaled, 1.0, weight_decay, mask)


def sgdw(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    decay_scaled_by_learning_rate: bool = True,
) -> optax.GradientTransformation:
    r"""Stochastic gradient descent with momentum and decoupled weight decay.

        m ← b m + lr g,     m = 0 at first
        x ← x - m - lr wd x            decay_scaled_by_learning_rate
        x ← x - m - wd x               otherwise, as the paper has it

    The momentum sums steps and not gradients: a change of lr acts on what comes, not on what is
    under way. The decay stays out of the momentum. Without momentum, and in no other case, L2
    regularisation by wd (the paper's form: wd/lr) takes the same steps.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      momentum: b in [0, 1). Default 0.9.
      mu_dtype: the floating type of m; None takes the parameters'.
      weight_decay: wd at least 0, or a schedule. Default 1e-4. In the paper's form give it the
        schedule's shape: η lr for `learning_rate` goes with η wd.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.
      decay_scaled_by_learning_rate: see above. Default True.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, or params
        missing where `weight_decay` needs them.
      TypeError: `mu_dtype` is not floating point.

    Use it where plain SGD with momentum works well, image models with batch norm above all;
    `sgdp` keeps the momentum from growing the norms of scale-invariant weights.

    Cost: one momentum for each parameter, half of the state of `adamw`; one gradient a step.

    Example:
      >>> optimizer = sgdw(0.1, weight_decay=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> print(optimizer.update(jnp.array([3.0, 1.0]), optimizer.init(x), x)[0])
      [-0.35  0.  ]

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101.
    """
    check_interval(0, 1, closed="left", momentum=momentum)
    check_rate(weight_decay=weight_decay)
    steps = optax.chain(_scale_by_rate(learning_rate), momentum_trace(momentum, dtype=mu_dtype))
    if decay_scaled_by_learning_rate:
        weight_decay = product(learning_rate, weight_decay)
    return descend(steps, 1.0, weight_decay, mask)


def adamwr(
    learning_rate: optax.ScalarOrSchedule,
    initial_period: int = 1000,
    period_multiplier: float = 2.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    weight_decay: float = 0.025,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    r"""AdamW with warm restarts and normalised weight decay.

        η = (1 + cos(π T/T_i)) / 2        T steps into period i, of T_i = T_0 kⁱ steps
        x ← x - η (lr u + wd/√T_i x)      u the direction of Adam

    The rate falls to zero in each period and then starts again at lr; the averages go on. The
    decay is normalised: divided by the root of the number of steps in the period, so that one wd
    serves short periods and long ones.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr that the restarts multiply.
      initial_period: T_0, steps in the first period, at least 1. Default 1000.
      period_multiplier: k at least 1. Default 2, as in the paper.
      b1: in [0, 1), decay of the average of the gradients. Default 0.9.
      b2: in [0, 1), decay of the average of their squares. Default 0.999.
      eps: at least 0, added to the root. Default 1e-8.
      mu_dtype: the floating type of m; None takes the parameters'. v has at least float32.
      weight_decay: wd at least 0, the normalised decay. Default 0.025, the paper's for CIFAR-10.
        It is not multiplied by lr.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, or params
        missing where `weight_decay` needs them.
      TypeError: `mu_dtype` is not floating point.

    Use it where good parameters are wanted at several moments of one run: the end of each
    period. In `jaxref.train`, take `schedule.name=constant_schedule`.

    Cost: that of `adamw`: two moments for each parameter, one gradient a step.

    Example:
      >>> optimizer = adamwr(0.1, initial_period=4, weight_decay=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> print(optimizer.update(jnp.array([3.0, 0.1]), optimizer.init(x), x)[0].round(3))
      [-0.35  0.4 ]

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101.
    """
    rate, decay = _with_restarts(learning_rate, weight_decay, initial_period, period_multiplier)
    return adamw(rate, b1, b2, eps, mu_dtype, decay, mask, decay_scaled_by_learning_rate=False)


def sgdwr(
    learning_rate: optax.ScalarOrSchedule,
    initial_period: int = 1000,
    period_multiplier: float = 2.0,
    momentum: ArrayLike = 0.9,
    mu_dtype: DTypeLike | None = None,
    weight_decay: float = 0.025,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    r"""SGDW with warm restarts and normalised weight decay.

        η = (1 + cos(π T/T_i)) / 2        T steps into period i, of T_i = T_0 kⁱ steps
        m ← b m + η lr g
        x ← x - m - η wd/√T_i x

    Args:
      learning_rate: lr at least 0, or a schedule count → lr that the restarts multiply.
      initial_period: T_0, steps in the first period, at least 1. Default 1000.
      period_multiplier: k at least 1. Default 2, as in the paper.
      momentum: b in [0, 1). Default 0.9.
      mu_dtype: the floating type of m; None takes the parameters'.
      weight_decay: wd at least 0, the normalised decay. Default 0.025. It is not multiplied by lr.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, or params
        missing where `weight_decay` needs them.
      TypeError: `mu_dtype` is not floating point.

    Use it as `adamwr`, for good parameters at several moments of one run, where SGD with momentum
    trains better than Adam.

    Cost: that of `sgdw`: one momentum for each parameter, one gradient a step.

    Example:
      >>> optimizer = sgdwr(0.1, initial_period=4, weight_decay=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> print(optimizer.update(jnp.array([3.0, 1.0]), optimizer.init(x), x)[0])
      [-0.55  0.4 ]

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101.
    """
    rate, decay = _with_restarts(learning_rate, weight_decay, initial_period, period_multiplier)
    return sgdw(rate, momentum, mu_dtype, decay, mask, decay_scaled_by_learning_rate=False)


def _scale_by_rate(learning_rate):
    check_rate(learning_rate=learning_rate)
    return optax.scale_by_learning_rate(learning_rate, flip_sign=False)


def _with_restarts(learning_rate, weight_decay, initial_period, period_multiplier):
    """Both schedules under the restarts; the decay is 0, and not a schedule, where it is off."""
    check_rate(learning_rate=learning_rate)
    check_interval(0, jnp.inf, weight_decay=weight_decay)
    restarts = cosine_restarts(initial_period, period_multiplier)

    def normalised(count):
        _, period = restart_period(count, initial_period, period_multiplier)
        return 1 / jnp.sqrt(period)

    return product(learning_rate, restarts), product(weight_decay, restarts, normalised)
