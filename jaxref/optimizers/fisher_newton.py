"""Gradient-regularized Newton steps on mini-batches, from the gradients of their examples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.optimizers.common import descend, store
from jaxref.optimizers.gradient_regularized_newton import decreases_enough
from jaxref.optimizers.hessian_approximations import (
    HessianFactors,
    check_factors,
    regularized_inverse,
)
from jaxref.optimizers.lion_kappa import l2


class FisherNewtonState(NamedTuple):
    """State of `fisher_newton`, besides those of schedules.

    Attributes:
      count: int32 scalar, the steps taken.
      fraction: float32 scalar in (0, 1], the radius γ that the search starts with over the
        learning rate.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    fraction: Array


def fisher_newton(
    learning_rate: optax.ScalarOrSchedule,
    max_search: ArrayLike = 10,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient-regularized Newton steps with the empirical Fisher matrix of the batch.

        x ← x - (H + ‖g‖/γ I)⁻¹ g - lr wd x,     H = 1/n Σ_i g_i g_iᵀ,  γ ≤ lr

    with the gradients g_i of the n examples and their mean g, so that the step is no longer than
    γ. H is applied through the n × n matrix of the g_i · g_j and never formed.

    `update` takes three extra arguments, all of the same batch:

    - `per_example_gradients`: the g_i, a tree like the gradients with a leading axis of length n,
      `jax.vmap(jax.grad(loss), (None, 0))(params, batch)`. Examples may be groups, of sequences
      say. Without it H = 0, and the step is γ g / ‖g‖.
    - `value_fn`: params → f, the batch's loss. With it γ is searched for as in
      `gradient_regularized_newton`: from twice the last step's share of lr, at most lr itself, it
      is halved until f(x) - f(x⁺) ≥ γ ‖∇f(x⁺)‖² / 8 ‖g‖. A trial costs one gradient, and the same
      randomness, of dropout say, has to go into each. Without it γ = lr.
    - `value`: f(x), which saves computing it for the search.

    On a mini-batch f is the loss of that batch alone, so that every accepted step decreases it;
    the paper's rates for the whole objective do not carry over. There lr, which the paper does not
    have, caps how far a single batch moves the parameters: a schedule that falls to 0 averages the
    noise out.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr: the largest step length, in the norm
        of all parameters together; 0.3 to 3 suits small networks.
      max_search: at least 1, the trials of a step. If all fail, the parameters do not move except
        by weight decay, and the next step starts with the last γ. Default 10; the paper's program
        takes 40.
      weight_decay: wd at least 0, or a schedule; multiplied by lr and outside of the search.
        Default 0.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.

    Returns:
      the transformation; its updates have the gradients' types. Its state, a `FisherNewtonState`
      and those of schedules, has numbers only.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, no examples, or
        params missing where `weight_decay` or `value_fn` needs them.

    Use it where per-example gradients are at hand and curvature matters more than the cost of a
    step: with the search for large batches, without it for small ones, whose noise makes the
    search settle for steps that are too short. Under `optax.masked` let `value_fn` and
    `per_example_gradients` be of the masked tree.

    Cost: n gradients at once and their products, O(n² d + n³) for d parameters; one more gradient
    for each trial of γ; a state of two numbers.

    Example:
      >>> losses = lambda x: (x - jnp.array([1.0, 3.0])) ** 2 / 2
      >>> f, x = lambda x: losses(x).mean(), jnp.array(0.0)
      >>> optimizer = fisher_newton(learning_rate=0.5)
      >>> print(optimizer.update(
      ...     jax.grad(f)(x), optimizer.init(x), x,
      ...     per_example_gradients=jax.jacobian(losses)(x), value_fn=f)[0].round(3))
      0.222

    Reference: Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with
    Approximate Hessians", 2025, arXiv:2506.13710.
    """
    check_interval(1, jnp.inf, max_search=max_search)
    direction = _scale_by_fisher_newton(learning_rate, max_search)
    steps = descend(direction, learning_rate, weight_decay, mask)

    def update(updates, state, params=None, *, value_fn=None, **extra_args):
        if value_fn is not None:
            if params is None:
                raise ValueError("params must be passed to update: value_fn needs them, got None")
            # `descend` widens the parameters; the loss is of those that will be stored.
            extra_args["value_fn"] = lambda x: value_fn(store(x, params))
        return steps.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(steps.init, update)


def _scale_by_fisher_newton(learning_rate, max_search):
    """The step over lr, of length at most 1; with φ = γ / lr it is φ (I + H/λ)⁻¹ g / ‖g‖."""

    def init(params):
        del params
        return FisherNewtonState(jnp.zeros([], jnp.int32), jnp.ones([], jnp.float32))

    def update(
        updates,
        state,
        params=None,
        *,
        value=None,
        value_fn=None,
        per_example_gradients=None,
        **extra_args,
    ):
        del extra_args
        cap = learning_rate(state.count) if callable(learning_rate) else learning_rate
        norm, unit = l2.value(updates), l2.subgradient(updates)
        factors, examples = None, 1
        if per_example_gradients is not None:
            check_factors(updates, per_example_gradients=per_example_gradients)
            factors = HessianFactors(per_example_gradients)
            examples = len(jax.tree.leaves(per_example_gradients)[0])
        direction = regularized_inverse(factors, unit)

        def step(fraction):
            gamma = fraction * cap
            lam = jnp.where(gamma > 0, norm / jnp.where(gamma > 0, gamma, 1), jnp.inf)
            # (I + Σ g_i g_iᵀ / nλ)⁻¹: dividing by n there copies no gradients.
            return jax.tree.map(lambda d: fraction * d, direction(examples * lam))

        if value_fn is None:
            taken, fraction = step(1.0), state.fraction
        else:
            value = value_fn(params) if value is None else value

            def attempt(search):
                fraction, trials, _ = search
                new = jax.tree.map(lambda x, d: x - cap * d, params, step(fraction))
                new_value, gradient = jax.value_and_grad(value_fn)(new)
                accepted = decreases_enough(
                    value, new_value, norm, l2.value(gradient), fraction * cap
                )
                return jnp.where(accepted, fraction, fraction / 2), trials + 1, accepted

            fraction, _, accepted = jax.lax.while_loop(
                lambda search: ~search[2] & (search[1] < max_search),
                attempt,
                (state.fraction, jnp.zeros((), jnp.int32), jnp.array(False)),
            )
            taken = jax.tree.map(lambda d: jnp.where(accepted, d, 0), step(fraction))
            fraction = jnp.where(accepted, jnp.minimum(2 * fraction, 1), fraction)
            fraction = jnp.maximum(fraction, jnp.finfo(jnp.float32).eps)
        return taken, FisherNewtonState(optax.safe_increment(state.count), fraction)

    return optax.GradientTransformationExtraArgs(init, update)
