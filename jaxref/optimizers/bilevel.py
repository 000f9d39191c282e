"""First-order bilevel optimization, ScaleBiO.

The outer parameters λ of a bilevel problem may be the weights of data sources: which mixture of
training data gives the best validation loss? `lisa.py` has the optimizer it is trained with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.numerics import compute_dtype

# (λ, w, batch) → scalar; also takes `key=` where the step is given one.
BilevelLoss = Callable[..., Array]


class BilevelOptimizers(NamedTuple):
    """The optax transformations of a bilevel problem, each with its own learning rate.

    Attributes:
      outer: of λ.
      inner: of w.
      auxiliary: of u; usually like `inner`, with its own key where it is `lisa`.
    """

    outer: optax.GradientTransformation
    inner: optax.GradientTransformation
    auxiliary: optax.GradientTransformation


class BilevelState(NamedTuple):
    """State of `first_order_bilevel_step`.

    Attributes:
      count: int32 scalar, the steps taken.
      outer_params: λ.
      inner_params: w, the parameters that the problem is about.
      auxiliary_params: u, a tree like w that follows the minimum of the inner loss.
      outer_state: the state of λ's optimizer; then of w's and of u's.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    outer_params: optax.Params
    inner_params: optax.Params
    auxiliary_params: optax.Params
    outer_state: optax.OptState
    inner_state: optax.OptState
    auxiliary_state: optax.OptState


class BilevelMetrics(NamedTuple):
    """What `first_order_bilevel_step` saw, before it moved.

    Attributes:
      outer_loss: L1(λ, w).
      inner_loss: L2(λ, w).
      gap: L2(λ, w) - L2(λ, u), which is at least 0 once u is at its minimum.
      penalty: a.
    """

    outer_loss: Array
    inner_loss: Array
    gap: Array
    penalty: Array


def first_order_bilevel_init(
    outer_params: optax.Params, inner_params: optax.Params, optimizers: BilevelOptimizers
) -> BilevelState:
    """The state that `first_order_bilevel_step` starts from, with u = w.

    Args:
      outer_params: λ, a tree of floating-point arrays.
      inner_params: w, likewise.
      optimizers: `BilevelOptimizers(outer, inner, auxiliary)`.

    Returns:
      the `BilevelState`; u is a copy of w, so that the whole state can be donated.

    Use it once, before the first `first_order_bilevel_step`; with `lisa` as the optimizer of w and
    of u their moments stay small.

    Cost: a copy of w, and the states of the three optimizers.

    Example:
      >>> sgd = optax.sgd(0.1)
      >>> state = first_order_bilevel_init(
      ...     jnp.zeros(2), {"w": jnp.ones(3)}, BilevelOptimizers(sgd, sgd, sgd)
      ... )
      >>> print(state.auxiliary_params["w"])
      [1. 1. 1.]

    Reference: Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting",
    2024, arXiv:2406.19976.
    """
    outer, inner = jax.tree.map(jnp.asarray, (outer_params, inner_params))
    auxiliary = jax.tree.map(jnp.array, inner)
    return BilevelState(
        jnp.zeros([], jnp.int32),
        outer,
        inner,
        auxiliary,
        optimizers.outer.init(outer),
        optimizers.inner.init(inner),
        optimizers.auxiliary.init(auxiliary),
    )


def first_order_bilevel_step(
    outer_loss: BilevelLoss,
    inner_loss: BilevelLoss,
    optimizers: BilevelOptimizers,
    state: BilevelState,
    outer_batch: Any,
    inner_batch: Any,
    *,
    penalty: optax.ScalarOrSchedule,
    key: Array | None = None,
) -> tuple[BilevelState, BilevelMetrics]:
    r"""One step on a bilevel problem, with first-order gradients only.

        min_λ L1(λ, w*(λ)),     w*(λ) = argmin_w L2(λ, w)          the problem
        min_{λ,w} max_u  L1(λ, w) + a (L2(λ, w) - L2(λ, u))        its penalty form

        u ← u - η_u a ∂u L2(λ, u)
        w ← w - η_w (∂w L1(λ, w) + a ∂w L2(λ, w))
        λ ← λ - η_λ (∂λ L1(λ, w) + a (∂λ L2(λ, w) - ∂λ L2(λ, u)))

    u stands for w*(λ), and w balances both losses. The three move at once, from gradients at the
    same point; each optimizer makes of its gradient what it will. Where w and u are at their
    minima the gradient of λ is that of L1(λ, w*(λ)) up to O(1/a).

    Args:
      outer_loss: L1, a function `(λ, w, batch)` → scalar, the validation loss.
      inner_loss: L2, a function `(λ, w, batch)` → scalar, the training loss.
      optimizers: `BilevelOptimizers(outer, inner, auxiliary)`, as in `first_order_bilevel_init`.
        One that takes the loss `value` is given that of the function it descends on.
      state: the `BilevelState`.
      outer_batch, inner_batch: what the losses read; w and u see the same `inner_batch`.
      penalty: a above 0, or a schedule count → a such as `penalty_schedule`.
      key: random key for dropout, say. Where given, the losses get a keyword `key`, L2 the same
        one for w and for u.

    Returns:
      (the next `BilevelState`, `BilevelMetrics`). Sums of gradients are computed in at least
      float32, and have the types of the parameters.

    Raises:
      ValueError: `penalty` is a number that is not positive and finite.

    Use it where λ has too many entries for a search, which trains anew for each candidate;
    `data_reweighting_losses` makes the two losses for weights of data sources.

    Cost: one gradient of L1 and two of L2 a step; u takes the memory of w and its moments once
    more, of which `lisa` saves most moments.

    Example:
      >>> problem = lambda l, w, batch: (w - 1) ** 2, lambda l, w, batch: (w - l) ** 2
      >>> sgd = BilevelOptimizers(optax.sgd(0.1), optax.sgd(0.1), optax.sgd(0.1))
      >>> state = first_order_bilevel_init(jnp.array(0.5), jnp.array(0.0), sgd)
      >>> state, metrics = first_order_bilevel_step(*problem, sgd, state, (), (), penalty=2.0)
      >>> print(state.inner_params, state.auxiliary_params, state.outer_params)
      0.4 0.2 0.5

    Reference: Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting",
    2024, arXiv:2406.19976.
    """
    if not callable(penalty):
        check_interval(0, jnp.inf, closed="right", penalty=penalty)
    a = jnp.asarray(penalty(state.count) if callable(penalty) else penalty, jnp.float32)
    outer_key, inner_key = ({}, {}) if key is None else ({"key": k} for k in jax.random.split(key))
    gradient_l1 = jax.value_and_grad(outer_loss, argnums=(0, 1))
    gradient_l2 = jax.value_and_grad(inner_loss, argnums=(0, 1))
    outer, inner, auxiliary = state.outer_params, state.inner_params, state.auxiliary_params
    l1, (outer_l1, inner_l1) = gradient_l1(outer, inner, outer_batch, **outer_key)
    l2, (outer_l2, inner_l2) = gradient_l2(outer, inner, inner_batch, **inner_key)
    least, (outer_least, inner_least) = gradient_l2(outer, auxiliary, inner_batch, **inner_key)
    gap = l2 - least

    def move(optimizer, params, opt_state, combine, gradients, value):
        gradient = jax.tree.map(lambda *g: _wide(combine, *g), *gradients)
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(gradient, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    auxiliary, auxiliary_state = move(
        optimizers.auxiliary,
        auxiliary,
        state.auxiliary_state,
        lambda h: a * h,
        (inner_least,),
        a * least,
    )
    inner, inner_state = move(
        optimizers.inner,
        inner,
        state.inner_state,
        lambda g1, g2: g1 + a * g2,
        (inner_l1, inner_l2),
        l1 + a * l2,
    )
    outer, outer_state = move(
        optimizers.outer,
        outer,
        state.outer_state,
        lambda g1, g2, h: g1 + a * (g2 - h),
        (outer_l1, outer_l2, outer_least),
        l1 + a * gap,
    )
    count = optax.safe_increment(state.count)
    return (
        BilevelState(count, outer, inner, auxiliary, outer_state, inner_state, auxiliary_state),
        BilevelMetrics(l1, l2, gap, a),
    )


def penalty_schedule(
    init_value: float = 0.03, growth: float = 2.0, *, transition_steps: int
) -> optax.Schedule:
    r"""The penalty of `first_order_bilevel_step`, which grows from one outer iteration to the next.

        a(t) = init growth^(1 + i),     i = ⌊t / transition_steps⌋

    The first iteration has already grown once, as in the authors' program. There the learning rates
    shrink in turn, by growth^(-i), and with the cosine of all steps.

    Args:
      init_value: init above 0. Default 0.03, the program's; it depends on the scale of the losses
        (the authors' examples take a constant a of 10 and of 100, which is just a number).
      growth: above 1. Default 2.
      transition_steps: at least 1, the steps of an outer iteration.

    Returns:
      the schedule count → a.

    Raises:
      ValueError: a number out of its range.

    Use it as the `penalty` of `first_order_bilevel_step` in runs of several outer iterations, whose
    bias of O(1/a) is to fall; a plain number will do where one a is known to work.

    Cost: one power a step.

    Example:
      >>> schedule = penalty_schedule(0.5, transition_steps=10)
      >>> print(schedule(0), schedule(9), schedule(10))
      1.0 1.0 2.0

    Reference: Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting",
    2024, arXiv:2406.19976.
    """
    check_interval(0, jnp.inf, closed="right", init_value=init_value)
    check_interval(1, jnp.inf, closed="right", growth=growth)
    check_interval(1, jnp.inf, transition_steps=transition_steps)
    return optax.exponential_decay(init_value * growth, transition_steps, growth, staircase=True)


def data_reweighting_losses(
    source_losses: Callable[..., Array], validation_loss: Callable[..., Array]
) -> tuple[BilevelLoss, BilevelLoss]:
    r"""The bilevel problem of weighing K sources of training data for a validation loss.

        L1(λ, w) = validation_loss(w),     L2(λ, w) = Σ_k p_k loss_k(w),     p = softmax(λ)

    Then the gradient of λ is p (D - p·D) with D_k = a (loss_k(w) - loss_k(u)): a source on which w,
    which validation pulls at, does better than u gains weight.

    Args:
      source_losses: `(w, batch)` → `[K]`, the mean loss over each source's examples in the batch
        (0 for a source that has none there).
      validation_loss: `(w, batch)` → scalar. Both get the keyword `key` where the step has one.

    Returns:
      (outer_loss, inner_loss) for `first_order_bilevel_step`; λ is an array `[K]`, and 0 the
      uniform weights. `jax.nn.softmax(state.outer_params)` are the weights found.

    Raises:
      ValueError: when called, `source_losses` of another shape than λ, or λ that is no vector.

    Use it to find how much of each data source to train on; for other λ give
    `first_order_bilevel_step` two losses of one's own.

    Cost: K numbers besides the model; a step evaluates the source losses and their gradients twice,
    at w and at u.

    Example:
      >>> outer_loss, inner_loss = data_reweighting_losses(
      ...     lambda w, batch: jnp.mean((w - batch) ** 2, axis=1),  # [K, rows]
      ...     lambda w, batch: jnp.mean((w - batch) ** 2),
      ... )
      >>> print(inner_loss(jnp.zeros(2), 1.0, jnp.array([[1.0, 1.0], [2.0, 4.0]])))
      2.5

    Reference: Pan et al., "ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting",
    2024, arXiv:2406.19976.
    """

    def outer_loss(outer_params, inner_params, batch, **keywords):
        del outer_params
        return validation_loss(inner_params, batch, **keywords)

    def inner_loss(outer_params, inner_params, batch, **keywords):
        losses = source_losses(inner_params, batch, **keywords)
        check_shape((jnp.size(outer_params),), outer_params=outer_params, source_losses=losses)
        weights = jax.nn.softmax(jnp.asarray(outer_params, compute_dtype(outer_params)))
        return jnp.sum(weights * losses)

    return outer_loss, inner_loss


def _wide(function, *arrays):
    """`function` of arrays in at least float32, rounded to the type of the first."""
    dtype = compute_dtype(*arrays)
    return function(*(x.astype(dtype) for x in arrays)).astype(arrays[0].dtype)
