"""MoMo: learning rates of momentum methods adapted to the loss, on SGD, Adam or any other."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_same_tree, check_shape
from jaxref.optimizers.common import (
    accumulate,
    accumulate_squares,
    broadcast_mask,
    check_moment_dtype,
    check_rate,
    store,
    widen,
    zeros_of_moment,
    zeros_of_second_moment,
)
from jaxref.optimizers.common import bias_correction as complement_of_power


class MomoPreconditioner(NamedTuple):
    """A positive definite matrix D, learnt from the gradients, for `momo_preconditioned`.

    Attributes:
      init: `init(params) -> state`, a tree of arrays, those like the parameters in trees of their
        structure.
      update: `update(gradients, state, count) -> (solve, state)` at step `count` = 1, 2, ...;
        `solve(d)` is D⁻¹ d with the new D, a tree like d, and linear in d. d and what it
        returns have at least float32.
    """

    init: Callable[[optax.Params], Any]
    update: Callable[..., tuple[Callable[[optax.Updates], optax.Updates], Any]]


class MomoState(NamedTuple):
    """State of `momo`, `momo_adam` and `momo_preconditioned`; scalars have at least float32.

    Attributes:
      count: int32 scalar, the steps taken.
      mu: d, the average of the gradients; a tree like the parameters.
      loss: f̄, the average of the losses.
      product: γ, the average of <g, x>.
      lower_bound: lb, as given or as estimated so far.
      preconditioner: the state of D.
      tau: τ, the step size of the last step, for logs: lr/ρ where the cap was in force.
      ratio: what τ would have been without the cap, for logs.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    mu: optax.Updates
    loss: Array
    product: Array
    lower_bound: Array
    preconditioner: Any
    tau: Array
    ratio: Array


def momo_preconditioned(
    preconditioner: MomoPreconditioner | None = None,
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    beta: ArrayLike = 0.9,
    lower_bound: ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    adapt_lower_bound: bool = False,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MoMo on a method with momentum and preconditioner: steps of adapted length along D⁻¹d.

        d ← b d + (1 - b) g,    f̄ ← b f̄ + (1 - b) f,    γ ← b γ + (1 - b) <g, x>
        ρ = 1 - bᵗ with bias correction; otherwise 1, and d, f̄, γ start as the first g, f, <g, x>
        x ← argmin_y max{(f̄ - γ + <d, y>)/ρ, lb} + ‖y - x‖²_D / (2 lr) + wd ‖y‖²_D / 2

    The model of the loss is the average of the linear models that the past batches gave, cut off
    at a lower bound of the loss. Its minimum has a closed form; the sums run over all parameters:

        s = 1/(1 + lr wd)                      1 for parameters that are not decayed
        τ = min{lr/ρ, [f̄ - γ - ρ lb + Σ s d x]₊ / Σ s d (D⁻¹d)}
        x ← s (x - τ D⁻¹d)

    As long as the model stays above the bound, τ = lr/ρ, the step of the method itself. A D that
    is learnt is constant in the minimisation; where only some leaves are decayed it has to act on
    each leaf alone.

    With `adapt_lower_bound`, and f̂ = f̄ - γ + <d, x>, the bound is estimated:

        before the step, where p = f̄ - γ + Σ s d x < ρ lb:    lb ← max{p / (2ρ), lower_bound}
        after τ:    lb ← max{(f̂ - τ <d, D⁻¹d> / 2) / ρ, lower_bound}

    Args:
      preconditioner: D, a `MomoPreconditioner`. None takes that of Adam with b2 = 0.999 and
        eps = 1e-8: then this is `momo_adam`.
      learning_rate: lr at least 0, or a schedule count → lr; the cap of the steps.
      beta: b in [0, 1), decay of the averages. Default 0.9.
      lower_bound: lb, a finite number not above the smallest loss. Default 0.
      weight_decay: wd at least 0, or a schedule. Default 0. Proximal: x is divided by 1 + lr wd.
        `optax.contrib.momo` divides x before the step and not after it.
      adapt_lower_bound: whether to estimate the bound, from `lower_bound` upwards. Default False.
      bias_correction: how the averages start, see above. Default True.
      mu_dtype: the floating type of d; None takes the parameters'. For bfloat16 parameters
        float32 is better: rounding d shifts f̄ - γ + <d, x>.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; `update(gradients, state, params, value=loss)` takes the loss whose
      gradients they are, a scalar. Its updates have the gradients' types, and are computed in at
      least float32. Its state is a `MomoState`.

      Where d is zero, τ is 0. A loss that is not finite takes no step and leaves the state as it
      was; gradients that are not finite are the caller's to skip, by `optax.apply_if_finite` say.
      `update` of `optax.MultiSteps` hands on the loss of the last micro-batch: pass there the mean
      over those that are accumulated (its `gradient_transformation()` hands on none). Under
      `optax.masked` and `optax.multi_transform` the model is one of the parameters that this
      transformation sees. The gradients must be those of the loss, which clipped ones are not.

    Raises:
      ValueError: a number out of its range; in `update`, params or value that are missing, or
        trees that do not match.
      TypeError: `preconditioner` is no `MomoPreconditioner`, or `mu_dtype` is not floating point.

    Use it for a D of one's own; `momo` has none and `momo_adam` has Adam's.

    Cost: one momentum for each parameter and the state of D; three inner products a step, no
    further gradient.

    Example:
      >>> adagrad = MomoPreconditioner(
      ...     init=lambda x: jnp.zeros_like(x),
      ...     update=lambda g, sum, count: (lambda d: d / jnp.sqrt(sum + g**2), sum + g**2),
      ... )
      >>> optimizer = momo_preconditioned(adagrad, learning_rate=1.0)
      >>> x = jnp.array([3.0, -4.0])
      >>> updates, state = optimizer.update(x, optimizer.init(x), x, value=jnp.sum(x**2) / 2)
      >>> print(updates, state.ratio)  # 0.1 f = 1.25 over Σ d²/D = 0.07
      [-1.  1.] 17.857

    Reference: Schaipp, Ohana, Eickenberg, Defazio, Gower, "MoMo: Momentum Models for Adaptive
    Learning Rates", 2023, arXiv:2305.07583.
    """
    if preconditioner is None:
        preconditioner = _adams(b2=0.999, eps=1e-8)
    if not isinstance(preconditioner, MomoPreconditioner):
        raise TypeError(f"preconditioner must be a MomoPreconditioner, got {preconditioner!r}")
    check_rate(learning_rate=learning_rate, weight_decay=weight_decay)
    check_interval(0, 1, closed="left", beta=beta)
    check_interval(-jnp.inf, jnp.inf, lower_bound=lower_bound)
    check_moment_dtype(mu_dtype)

    def init(params):
        return MomoState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros_of_moment(params, mu_dtype),
            loss=jnp.zeros([], float),
            product=jnp.zeros([], float),
            lower_bound=jnp.asarray(lower_bound, float),
            preconditioner=preconditioner.init(params),
            tau=jnp.zeros([], float),
            ratio=jnp.zeros([], float),
        )

    def update(updates, state, params=None, *, value=None, **extra_args):
        del extra_args
        check_same_tree(state.mu, updates=updates)
        if params is None:
            raise ValueError("params must be passed to update: <g, x> needs them, got None")
        check_same_tree(updates, params=params)
        if value is None:
            raise ValueError("value must be passed to update: the loss at params, got None")
        check_shape((), value=value)
        value = jnp.asarray(value, state.loss.dtype)
        x, lr, wd = widen(params), _at(learning_rate, state), _at(weight_decay, state)
        count, total = optax.safe_increment(state.count), optax.tree.sum
        if bias_correction:
            weight, rho = 1 - beta, complement_of_power(beta, count)
        else:
            weight, rho = jnp.where(state.count == 0, 1, 1 - beta), jnp.ones([])

        d = accumulate(beta, weight, state.mu, updates)
        loss = beta * state.loss + weight * value
        product = beta * state.product + weight * total(_products(updates, x))
        solve, preconditioner_state = preconditioner.update(updates, state.preconditioner, count)
        direction = solve(d)

        pull = jax.tree.map(lambda decays: lr * wd * decays, broadcast_mask(mask, updates))
        shrunk = partial(jax.tree.map, lambda product, k: product / (1 + k))
        along, squares = _products(d, x), _products(d, direction)
        predicted = loss - product + total(shrunk(along, pull))
        bound = state.lower_bound if adapt_lower_bound else jnp.asarray(lower_bound, float)
        if adapt_lower_bound:
            reset = jnp.maximum(predicted / (2 * rho), lower_bound)
            bound = jnp.where(predicted < rho * bound, reset, bound)
        excess = jnp.maximum(predicted - rho * bound, 0)
        length = total(shrunk(squares, pull))
        ratio = jnp.where(length > 0, excess / jnp.where(length > 0, length, 1), 0)
        tau = jnp.minimum(lr / rho, ratio)
        if adapt_lower_bound:
            fall = total(squares)
            fall = jnp.where(jnp.isinf(fall), excess, tau * fall)  # not 0 · inf where d² overflows
            reached = loss - product + total(along) - fall / 2
            bound = jnp.maximum(reached / rho, lower_bound)
        step = jax.tree.map(lambda x, u, k: -(tau * u + k * x) / (1 + k), x, direction, pull)

        new_state = MomoState(
            count=count,
            mu=store(d, state.mu),
            loss=loss,
            product=product,
            lower_bound=bound,
            preconditioner=preconditioner_state,
            tau=tau,
            ratio=ratio,
        )
        keep = partial(jnp.where, jnp.isfinite(value))
        step = jax.tree.map(lambda u: keep(u, 0), step)
        return store(step, updates), store(jax.tree.map(keep, new_state, state), state)

    return optax.GradientTransformationExtraArgs(init, update)


def momo(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    beta: ArrayLike = 0.9,
    lower_bound: ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    adapt_lower_bound: bool = False,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MoMo: SGD with momentum whose learning rate adapts to the loss.

        d ← b d + (1 - b) g,    f̄ ← b f̄ + (1 - b) f,    γ ← b γ + (1 - b) <g, x>
        τ = min{lr, [(1 + lr wd)(f̄ - lb - γ) + <d, x>]₊ / ‖d‖²}
        x ← (x - τ d) / (1 + lr wd)

    d, f̄ and γ start as the first g, f and <g, x>. With `bias_correction` they start at zero, and
    lr/ρ and ρ lb replace lr and lb, ρ = 1 - bᵗ. Without momentum it is the Polyak step with a
    cap, min{lr, (f - lb)/‖g‖²}.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr; the cap of the steps, to be chosen
        rather large. Default 1.
      beta: b in [0, 1), decay of the averages. Default 0.9.
      lower_bound: lb, a finite number not above the smallest loss. Default 0, which most losses
        have.
      weight_decay: wd at least 0, or a schedule. Default 0.
      adapt_lower_bound: whether to estimate the bound, from `lower_bound` upwards; for losses
        that end far above it. Default False.
      bias_correction: see above. Default False.
      mu_dtype: the floating type of d; None takes the parameters', float32 is better for bfloat16.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; `update(gradients, state, params, value=loss)` takes the loss whose
      gradients they are, a scalar. Its updates have the gradients' types. Its state is a
      `MomoState`, which has τ for logs. On losses that are not finite, accumulation, masks and
      clipping see `momo_preconditioned`.

    Raises:
      ValueError: a number out of its range; in `update`, params or value that are missing, or
        trees that do not match.
      TypeError: `mu_dtype` is not floating point.

    Use it where SGD with momentum works well but its learning rate is not known to a factor of
    ten; `momo_adam` where Adam works well.

    Cost: one momentum for each parameter, one gradient a step; three inner products besides.

    Example:
      >>> optimizer = momo(learning_rate=10.0)
      >>> x = jnp.array([3.0, -4.0])
      >>> loss, gradient = jax.value_and_grad(lambda x: jnp.sum(x**2) / 2)(x)
      >>> print(optimizer.update(gradient, optimizer.init(x), x, value=loss)[0])
      [-1.5  2. ]

    Reference: Schaipp, Ohana, Eickenberg, Defazio, Gower, "MoMo: Momentum Models for Adaptive
    Learning Rates", 2023, arXiv:2305.07583.
    """
    return momo_preconditioned(
        MomoPreconditioner(
            lambda params: optax.EmptyState(), lambda g, state, count: (_same, state)
        ),
        learning_rate,
        beta,
        lower_bound,
        weight_decay,
        adapt_lower_bound,
        bias_correction,
        mu_dtype,
        mask,
    )


def momo_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    lower_bound: ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    adapt_lower_bound: bool = False,
    mu_dtype: DTypeLike | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MoMo-Adam: Adam whose learning rate adapts to the loss.

        d ← b1 d + (1 - b1) g,    f̄ ← b1 f̄ + (1 - b1) f,    γ ← b1 γ + (1 - b1) <g, x>
        v ← b2 v + (1 - b2) g²,    D = √(v/(1 - b2ᵗ)) + eps,    ρ = 1 - b1ᵗ
        τ = min{lr/ρ, [(1 + lr wd)(f̄ - ρ lb - γ) + <d, x>]₊ / Σ d²/D}
        x ← (x - τ d/D) / (1 + lr wd)

    All averages start at zero. With τ = lr/ρ and no decay it is the step of Adam.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr; the cap of the steps. Default 1e-2,
        above what Adam is usually given.
      b1: in [0, 1), decay of d, f̄ and γ. Default 0.9.
      b2: in [0, 1), decay of the average of the squares. Default 0.999.
      eps: at least 0, added to the root. Default 1e-8. With 0 a coordinate whose gradients were
        all zero gives NaN.
      lower_bound: lb, a finite number not above the smallest loss. Default 0.
      weight_decay: wd at least 0, or a schedule. Default 0.
      adapt_lower_bound: whether to estimate the bound, from `lower_bound` upwards; for losses
        that end far above it. Default False.
      mu_dtype: the floating type of d; None takes the parameters', float32 is better for
        bfloat16. v has at least float32.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; `update(gradients, state, params, value=loss)` takes the loss whose
      gradients they are, a scalar. Its updates have the gradients' types. Its state is a
      `MomoState`, which has τ for logs. On losses that are not finite, accumulation, masks and
      clipping see `momo_preconditioned`.

    Raises:
      ValueError: a number out of its range; in `update`, params or value that are missing, or
        trees that do not match.
      TypeError: `mu_dtype` is not floating point.

    Use it where Adam works well but its learning rate or its schedule is not known.

    Cost: two moments for each parameter, one gradient a step; three inner products besides.

    Example:
      >>> optimizer = momo_adam(learning_rate=10.0)
      >>> x = jnp.array([3.0, -4.0])
      >>> loss, gradient = jax.value_and_grad(lambda x: jnp.sum(x**2) / 2)(x)
      >>> print(optimizer.update(gradient, optimizer.init(x), x, value=loss)[0])  # 12.5/7 each
      [-1.786  1.786]

    Reference: Schaipp, Ohana, Eickenberg, Defazio, Gower, "MoMo: Momentum Models for Adaptive
    Learning Rates", 2023, arXiv:2305.07583.
    """
    check_interval(0, 1, closed="left", b1=b1, b2=b2)
    check_interval(0, jnp.inf, eps=eps)
    return momo_preconditioned(
        _adams(b2, eps),
        learning_rate,
        b1,
        lower_bound,
        weight_decay,
        adapt_lower_bound,
        bias_correction=True,
        mu_dtype=mu_dtype,
        mask=mask,
    )


def _adams(b2, eps):
    """D = √(v/(1 - b2ᵗ)) + eps."""

    def update(gradients, nu, count):
        new = accumulate_squares(b2, 1 - b2, nu, gradients)
        correction = complement_of_power(b2, count)

        def solve(d):
            return jax.tree.map(lambda d, v: d / (jnp.sqrt(v / correction) + eps), d, new)

        return solve, store(new, nu)

    return MomoPreconditioner(zeros_of_second_moment, update)


def _same(d):
    return d


def _at(number, state):
    return number(state.count) if callable(number) else number


def _products(a, b):
    """<a, b> of each leaf. Not `jnp.vdot`, which ravels: sharded leaves would have to move."""
    return jax.tree.map(lambda a, b: jnp.sum(a * b), widen(a), b)
