"""Target-based surrogates (SSO): several cheap parameter steps from one gradient of the loss.

The loss is ℓ(f(θ)), where f maps parameters to targets such as logits. Where the gradient of ℓ is
what costs (a simulator, a rollout, a label to buy), one of it makes a surrogate in θ.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype

_TOLERANCE = 1e-6  # the authors' norm of the surrogate's gradient where the inner loop ends


def target_surrogate(
    gradient: ArrayLike,
    anchor: ArrayLike,
    targets: ArrayLike,
    eta: ArrayLike,
    *,
    divergence: Literal["squared", "kl"] = "squared",
) -> Array:
    r"""The surrogate of a loss around the targets where its gradient is known.

        g(f) = mean over examples of  d·(f - z) + ‖f - z‖² / 2η                 "squared"
                                      d·(f - z) + Σ_i (f_i log(f_i/z_i) - f_i + z_i) / η   "kl"

    It is 0 at f = z, where its gradient is that of the loss. The loss itself is at most
    ℓ(z) + g(f) for η up to 1/L, L the smoothness of ℓ in an example's targets: 1 for half the
    squared error, 1/4 for the logistic loss, 1/2 for softmax cross-entropy.

    Args:
      gradient: d `[..., targets]`, for each example the gradient of its loss at z; constant.
      anchor: z `[..., targets]`, the targets at which it was taken; constant.
      targets: f `[..., targets]`, the targets now.
      eta: η above 0, the step in the space of targets; or one for every coordinate, broadcastable
        to f, for AdaGrad's, Adam's or Newton's steps (1/η_i is the weight of a coordinate).
      divergence: "squared", or "kl" for positive targets such as probabilities: mirror descent,
        whose minimum is f ∝ z exp(-η d).

    Returns:
      g, a scalar in at least float32.

    Raises:
      ValueError: shapes that do not match, or an η that is not positive and finite.
      TypeError: arrays that are not floating point.

    Use it alone for an inner loop of one's own; `sso_step` builds and minimises it.

    Cost: one pass over the targets; no call of ℓ.

    Example:
      >>> d, z = jnp.array([[1.0, -1.0]]), jnp.array([[0.0, 0.0]])
      >>> print(target_surrogate(d, z, z - 0.5 * d, eta=0.5))
      -0.5

    Reference: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for
    Stochastic Optimization", 2023, arXiv:2302.02607.
    """
    check_floating(gradient=gradient, anchor=anchor, targets=targets)
    check_shape(jnp.shape(targets), gradient=gradient, anchor=anchor)
    check_broadcastable(jnp.shape(targets), eta=eta)
    check_interval(0, jnp.inf, closed="right", eta=eta)
    dtype = compute_dtype(gradient, anchor, targets)
    d, z = (jax.lax.stop_gradient(jnp.asarray(x, dtype)) for x in (gradient, anchor))
    f = jnp.asarray(targets, dtype)
    if divergence == "squared":
        distance = (f - z) ** 2 / 2
    elif divergence == "kl":
        tiny = jnp.finfo(dtype).tiny  # probabilities underflow to 0
        distance = f * jnp.log(jnp.maximum(f, tiny) / jnp.maximum(z, tiny)) - f + z
    else:
        raise ValueError(f'divergence must be "squared" or "kl", got {divergence!r}')
    return jnp.mean(jnp.sum(d * (f - z) + distance / eta, axis=-1))


def armijo_gradient_descent(
    init_step: ArrayLike = 10.0,
    c: ArrayLike = 0.5,
    shrink: ArrayLike = 0.9,
    expand: ArrayLike = 1.8,
    max_backtracks: ArrayLike = 100,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent with the largest step of a shrinking sequence that decreases enough.

        x ← x - s g,     s the first of e, e·shrink, e·shrink², ...
                         with f(x - s g) ≤ f(x) - c s ‖g‖²,     e = expand · (the last s)

    Args:
      init_step: above 0, in the place of the last s at first. Default 10, the authors'.
      c: in (0, 1), the part of the slope that the decrease must reach. Default 0.5, at which a
        quadratic of curvature L takes steps up to 1/L.
      shrink: in (0, 1). Default 0.9.
      expand: at least 1. Default 1.8; for minibatches the authors take 1.8^(1/batches an epoch).
      max_backtracks: at least 1. Where this many trials all fail, x stays, and the next search
        goes on from the last s. Default 100.

    Returns:
      the transformation. Its `update` takes `value`, f(x), and `value_fn`, the function f of
      params; the updates are final, learning rate and sign included. Its state is s.

    Raises:
      ValueError: a number out of its range.

    Use it as the inner optimizer of `sso_step`, or for any deterministic f whose step size is not
    known.

    Cost: one evaluation of f for each trial, at least one a step; a state of one number.

    Other than `optax.scale_by_backtracking_linesearch` it stays where the search fails instead of
    taking the last trial, recovers from trials that are not finite, and holds s in float32 for any
    parameters.

    Example:
      >>> optimizer, f = armijo_gradient_descent(init_step=1.0), lambda x: 2 * x**2
      >>> x = jnp.array(1.0)
      >>> updates, step = optimizer.update(4 * x, optimizer.init(x), x, value=f(x), value_fn=f)
      >>> print(updates.round(2), step.round(3))
      -0.97 0.243

    Reference: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for
    Stochastic Optimization", 2023, arXiv:2302.02607.
    """
    check_interval(0, jnp.inf, closed="right", init_step=init_step)
    check_interval(0, 1, closed="neither", c=c, shrink=shrink)
    check_interval(1, jnp.inf, expand=expand, max_backtracks=max_backtracks)

    def init(params):
        del params
        return jnp.asarray(init_step, jnp.float32)

    def update(updates, state, params=None, *, value, value_fn, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("params must be passed to update: the line search starts there")
        wide = jax.tree.map(lambda g: g.astype(compute_dtype(g)), updates)
        squares = optax.tree.norm(wide, squared=True)
        # A gradient of 0 takes any step. One of 0 or inf would never change again.
        first = jnp.where(squares > 0, expand * state, state)
        first = jnp.clip(first, jnp.finfo(state.dtype).tiny, jnp.finfo(state.dtype).max)

        def along(step):
            return jax.tree.map(lambda g: (-step * g).astype(g.dtype), updates)

        def fails(search):
            step, trials = search
            trial = value_fn(optax.apply_updates(params, along(step)))
            return (trials < max_backtracks) & ~(trial <= value - c * step * squares)  # or NaN

        step, trials = jax.lax.while_loop(
            fails,
            lambda search: (jnp.multiply(shrink, search[0]), search[1] + 1),
            (first, jnp.array(0)),
        )
        found = trials < max_backtracks
        return jax.tree.map(lambda u: jnp.where(found, u, 0), along(step)), step

    return optax.GradientTransformationExtraArgs(init, update)


class SSOMetrics(NamedTuple):
    """What `sso_step` saw.

    Attributes:
      loss: mean of ℓ(z), at the parameters before the step.
      surrogate: ℓ(z) + g at the parameters after it, a bound on their loss where η ≤ 1/L.
      inner_steps: int32, the steps taken on the surrogate.
      increased: whether a step made the surrogate larger, beyond rounding.
    """

    loss: Array
    surrogate: Array
    inner_steps: Array
    increased: Array


def sso_step(
    apply_fn: Callable[..., Array],
    target_loss: Callable[[Array, Any], Array],
    params: optax.Params,
    batch: Any,
    *,
    eta: ArrayLike,
    inner_steps: int = 10,
    inner: optax.GradientTransformation | Literal["armijo"] = "armijo",
    divergence: Literal["squared", "kl"] = "squared",
    key: Array | None = None,
) -> tuple[optax.Params, SSOMetrics]:
    r"""One step of SSO: one gradient with respect to targets, several with respect to parameters.

        z = f(θ),     d = ∇ℓ(z)                                       one call of ℓ
        θ ← `inner_steps` steps from θ of `inner` on g(θ) = target_surrogate(d, z, f(θ), η)

    With one plain gradient step it is SGD, for any η. With many it is a step of projected gradient
    descent in the space of targets, z - η d, and where η ≤ 1/L the loss of the batch cannot rise.

    Args:
      apply_fn: f, a function `(params, batch)` → targets `[..., targets]`, logits say. It must be
        deterministic; dropout's keyword `key` gets the same key in every inner step.
      target_loss: ℓ, a function `(targets, batch)` → the loss of each example, `[...]`, such as
        cross-entropy. It is differentiated once a step.
      params: θ, a tree of floating-point arrays.
      batch: what the functions read.
      eta: η above 0, or an array of them, broadcastable to the targets; see `target_surrogate`,
        and `target_step_schedule`.
      inner_steps: at least 1; default 10, the authors try 1 to 100. The inner loop ends early
        where the norm of g's gradient is at most 1e-6.
      inner: "armijo" for `armijo_gradient_descent()`, or an optax transformation, whose state is
        made anew in every step. Those that search a line get `value`, `grad` and `value_fn`.
      divergence: "squared" or "kl".
      key: random key that `apply_fn` gets as keyword `key`, where given.

    Returns:
      (params, `SSOMetrics`). The inner loop runs on parameters in at least float32; the result has
      the types of `params`.

    Raises:
      ValueError: `eta` or `inner_steps` out of range, a loss that is not one value per example, or
        an unknown `inner` or `divergence`.
      TypeError: targets that are not floating point.

    Use it where ℓ costs more than f, or to make the most of a full batch.

    Cost: one gradient of ℓ a step, and up to `inner_steps` gradients of f; with "armijo" an
    evaluation of f for each trial besides.

    Under jit a sharded batch gives the mean over all of it.

    Example:
      >>> squared = lambda z, batch: jnp.sum((z - batch["y"]) ** 2, axis=-1) / 2
      >>> batch = {"x": jnp.eye(2), "y": jnp.array([[1.0], [2.0]])}
      >>> w, metrics = sso_step(
      ...     lambda w, batch: batch["x"] @ w, squared, jnp.zeros((2, 1)), batch, eta=1.0
      ... )
      >>> print(w.ravel().round(2), metrics.loss)
      [1. 2.] 1.25

    Reference: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for
    Stochastic Optimization", 2023, arXiv:2302.02607.
    """
    check_interval(0, jnp.inf, closed="right", eta=eta)
    check_interval(1, jnp.inf, inner_steps=inner_steps)
    if isinstance(inner, str):
        if inner != "armijo":
            raise ValueError(f'inner must be "armijo" or an optax transformation, got {inner!r}')
        inner = armijo_gradient_descent()
    inner = optax.with_extra_args_support(inner)
    keywords = {} if key is None else {"key": key}

    def predict(theta):
        return apply_fn(theta, batch, **keywords)

    start = jax.tree.map(lambda x: jnp.asarray(x, compute_dtype(x)), params)
    anchor = jax.lax.stop_gradient(predict(start))
    check_floating(targets=anchor)

    def losses(targets):
        values = target_loss(targets, batch)
        check_shape(anchor.shape[:-1], **{"target_loss(targets, batch)": values})
        return values

    values, pull = jax.vjp(losses, anchor)
    (gradient,) = pull(jnp.ones_like(values))  # each example's own, not that of the mean
    loss = jnp.mean(values, dtype=compute_dtype(values))

    def surrogate(theta):  # without ℓ(z), a constant that would hide small decreases
        return target_surrogate(gradient, anchor, predict(theta), eta, divergence=divergence)

    def goes_on(carry):
        *_, norm, taken, _ = carry
        return (taken < inner_steps) & (norm > _TOLERANCE)

    def step(carry):
        theta, state, last, _, taken, increased = carry
        value, slope = jax.value_and_grad(surrogate)(theta)
        updates, state = inner.update(
            slope, state, theta, value=value, grad=slope, value_fn=surrogate
        )
        theta = optax.apply_updates(theta, updates)
        norm = optax.tree.norm(slope).astype(value.dtype)
        return theta, state, value, norm, taken + 1, increased | rises(last, value)

    def rises(last, value):  # by more than two programs that compute the same may differ
        return value > last + jnp.sqrt(jnp.finfo(last.dtype).eps) * abs(last)

    infinite = jnp.array(jnp.inf, compute_dtype(anchor))
    carry = (start, inner.init(start), infinite, infinite, 0, False)
    theta, _, last, _, taken, increased = jax.lax.while_loop(goes_on, step, carry)
    final = surrogate(theta)
    return (
        jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), theta, params),
        SSOMetrics(
            loss, loss + final, jnp.asarray(taken, jnp.int32), increased | rises(last, final)
        ),
    )


def target_step_schedule(
    eta0: float,
    kind: Literal["constant", "inverse_sqrt", "exponential"] = "constant",
    total_steps: int | None = None,
) -> optax.Schedule:
    r"""The step η of `sso_step` in the space of targets, by the count of steps.

        constant:      η₀                    for a full batch, or a model that interpolates
        inverse_sqrt:  η₀ / √t,              t = count + 1
        exponential:   η₀ (1/T)^(t/T),       T = total_steps

    Args:
      eta0: η₀ above 0; 1/L is the authors' choice, see `target_surrogate`.
      kind: one of the three. Default "constant".
      total_steps: T, at least 1; for "exponential" alone.

    Returns:
      the schedule count → η.

    Raises:
      ValueError: an unknown kind, a number out of its range, or `total_steps` missing.

    Use it for the `eta` of `sso_step`: constant for a full batch, one of the falling ones for
    minibatches with noise, of which the exponential one needs no knowledge.

    Cost: one formula a step.

    Example:
      >>> schedule = target_step_schedule(2.0, "inverse_sqrt")
      >>> print(schedule(0), schedule(3))
      2.0 1.0

    Reference: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for
    Stochastic Optimization", 2023, arXiv:2302.02607.
    """
    check_interval(0, jnp.inf, closed="right", eta0=eta0)
    if kind == "constant":
        return optax.constant_schedule(eta0)
    if kind == "inverse_sqrt":
        return lambda count: eta0 * jax.lax.rsqrt(jnp.asarray(count + 1, jnp.float32))
    if kind == "exponential":
        if total_steps is None:
            raise ValueError('total_steps must be given for kind "exponential", got None')
        check_interval(1, jnp.inf, total_steps=total_steps)
        return lambda count: eta0 * jnp.asarray(1 / total_steps) ** ((count + 1) / total_steps)
    raise ValueError(f'kind must be "constant", "inverse_sqrt" or "exponential", got {kind!r}')
