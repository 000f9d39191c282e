"""Steps that look inside the loss: logits as targets, parts of the corpus, curvature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxref import optimizers
from jaxref.core.checks import check_interval
from jaxref.train.methods.frame import (
    Batch,
    Method,
    Outcome,
    Params,
    Problem,
    Transformation,
    check_whole,
    clipped,
    descended,
    distance,
)


def target_surrogates(
    learning_rate: optax.Schedule,
    *,
    inner_steps: int = 5,
    init_step: float = 1.0,
    shrink: float = 0.5,
) -> Method:
    """Target-based surrogates: one gradient with respect to the logits, several steps from it.

    Args:
      learning_rate: the program's: the step size in the space of the logits, η, at most 2 for
        cross-entropy if the loss of the batch is not to rise.
      inner_steps: of gradient descent with Armijo's line search, at least 1. Default 5.
      init_step: where the search of each step's length starts, above 0. Default 1.
      shrink: what a trial that fails multiplies it by, in (0, 1). Default 0.5: the authors' 10 and
        0.9 take dozens of trials a step.

    Returns:
      The `Method`.

    Raises:
      ValueError: a number out of range; when a step is traced, `accumulate` other than 1.

    `jaxref.optimizers.sso_step` says more.
    """
    armijo = optimizers.armijo_gradient_descent(init_step, shrink=shrink)

    def update(
        problem: Problem, params: Params, state: Any, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        check_whole(problem, "target_surrogates")
        after, metrics = optimizers.sso_step(
            lambda params, batch, *, key: problem.logits(params, batch, key),
            problem.losses_of_logits,
            params,
            batch,
            eta=jnp.maximum(learning_rate(step), 1e-6),
            inner_steps=inner_steps,
            inner=armijo,
            key=key,
        )
        return Outcome(after, state, metrics.loss, distance(after, params))

    return Method(lambda params: (), update)


def scalebio(
    learning_rate: optax.Schedule,
    *,
    clip_norm: float,
    num_examples: int,
    base: Transformation = optimizers.adamw,
    num_sources: int = 4,
    outer_every: int = 4,
    outer_learning_rate: float = 0.01,
    penalty: float = 1.0,
    growth: float = 2.0,
    growth_steps: int = 100,
) -> Method:
    """First-order bilevel training: weights of the corpus's parts, learned along the way.

    The corpus is cut into `num_sources` equal parts. One row in `outer_every` is validation; the
    others train under the weights of their parts, which move so that validation gets better.

    Args:
      learning_rate, clip_norm, num_examples: the program's.
      base: the optimizer of both copies of the parameters. Default `adamw`.
      num_sources: parts of the corpus, at least 1. Default 4.
      outer_every: at least 2, and a divisor of the batch size. Default 4.
      outer_learning_rate: of the weights' logits, which Adam moves; at least 0. Default 0.01.
      penalty: of the training loss's distance from its minimum at first, above 0. Default 1.
      growth: what multiplies it every `growth_steps` steps, above 1. Default 2.
      growth_steps: at least 1. Default 100.

    Returns:
      The `Method`.

    Raises:
      ValueError: a number out of range; when a step is traced, `accumulate` other than 1, or a
        batch size that `outer_every` does not divide.

    `jaxref.optimizers.first_order_bilevel_step` says more.
    """
    check_interval(2, jnp.inf, outer_every=outer_every)
    check_interval(1, jnp.inf, num_sources=num_sources)
    check_interval(0, jnp.inf, outer_learning_rate=outer_learning_rate)
    # Where the second part begins, the third, and so on; ids x num_sources could overflow.
    starts = -(-np.arange(1, num_sources) * num_examples // num_sources)
    inner = clipped(base(learning_rate=learning_rate), clip_norm)
    three = optimizers.BilevelOptimizers(optax.adam(outer_learning_rate), inner, inner)
    schedule = optimizers.penalty_schedule(penalty, growth, transition_steps=growth_steps)

    def init(params: Params) -> optimizers.BilevelState:
        state = optimizers.first_order_bilevel_init(jnp.zeros(num_sources), params, three)
        return state._replace(inner_params=())  # they are the program's

    def update(
        problem: Problem,
        params: Params,
        state: optimizers.BilevelState,
        batch: Batch,
        key: Array,
        step: Array,
    ) -> Outcome:
        del step
        check_whole(problem, "scalebio")
        if len(batch["ids"]) % outer_every:
            raise ValueError(
                f"outer_every must divide the batch size {len(batch['ids'])}, got {outer_every}"
            )

        def source_losses(params: Params, batch: Batch, *, key: Array) -> Array:
            losses = problem.token_losses(params, batch, key)
            losses = jnp.mean(losses.reshape(len(losses), -1), axis=1)
            source = jnp.searchsorted(starts, batch["ids"], side="right")
            rows = jax.nn.one_hot(source, num_sources, axis=0)
            return rows @ losses / jnp.maximum(jnp.sum(rows, axis=1), 1)

        outer_loss, inner_loss = optimizers.data_reweighting_losses(
            source_losses, lambda params, batch, *, key: problem.loss(params, batch, key)
        )
        parts = jax.tree.map(lambda x: x.reshape(-1, outer_every, *x.shape[1:]), batch)
        state, metrics = optimizers.first_order_bilevel_step(
            outer_loss,
            inner_loss,
            three,
            state._replace(inner_params=params),
            jax.tree.map(lambda x: x[:, 0], parts),
            jax.tree.map(lambda x: x[:, 1:].reshape(-1, *x.shape[2:]), parts),
            penalty=schedule,
            key=key,
        )
        after = state.inner_params
        norm = distance(after, params)
        return Outcome(after, state._replace(inner_params=()), metrics.inner_loss, norm)

    return Method(init, update)


def fisher_newton(
    learning_rate: optax.Schedule,
    *,
    search: bool = False,
    max_search: int = 10,
    weight_decay: float = 0.0,
) -> Method:
    """Gradient-regularized Newton steps with the Fisher matrix of the batch's sequences.

    Args:
      learning_rate: the program's: the longest step, in the norm of all parameters.
      search: whether each step is shortened until the batch's loss decreases enough; default no,
        which for batches as small as the main job's makes more progress.
      max_search: trials of a step length, at least 1. Default 10.
      weight_decay: decoupled, at least 0. Default 0.

    Returns:
      The `Method`.

    Raises:
      ValueError: `max_search` below 1; when a step is traced, `accumulate` other than 1.

    `jaxref.optimizers.fisher_newton` says more.
    """
    optimizer = optimizers.fisher_newton(learning_rate, max_search, weight_decay)

    def update(
        problem: Problem, params: Params, state: Any, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        del step
        check_whole(problem, "fisher_newton")
        rows = jax.tree.map(lambda x: x[:, None], batch)
        keys = jax.random.split(key, len(batch["inputs"]))
        each = jax.vmap(jax.value_and_grad(problem.loss), (None, 0, 0))
        values, gradients = each(params, rows, keys)

        def mean_loss(params: Params) -> Array:
            return jnp.mean(jax.vmap(problem.loss, (None, 0, 0))(params, rows, keys))

        value = jnp.mean(values)
        gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
        return descended(
            optimizer,
            params,
            state,
            value,
            gradient,
            per_example_gradients=gradients,
            value_fn=mean_loss if search else None,
        )

    return Method(optimizer.init, update)
