"""Doubly robust adversarial training: worst-case weights of examples, each under its own attack.

The attack is kept inside of its box by a barrier, so that its minimiser is a differentiable
function of the parameters; gradients of the losses then go through the attack, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards

Bounds = tuple[float, float] | None


class CompositionalState(NamedTuple):
    """The running estimate of the inner mean of `kl_distributionally_robust_loss`.

    Attributes:
      log_mean: float32 scalar, log u of the running mean u of exp(loss / r).
      step: int32 scalar, the number of updates so far.

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """

    log_mean: Array
    step: Array


def kl_robust_weights(
    losses: ArrayLike,
    *,
    r: float,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The worst weights of examples that stay near to equal ones (weights of the set).

        w = argmax over the simplex of Σ_i w_i l_i - r Σ_i w_i log(N w_i) = softmax(l / r)

    Args:
      losses: l `[...]` floating point; all entries together are the set, N of them.
      r: above 0, in the unit of the losses: the price of being unequal. Towards 0 all weight is on
        the largest loss; towards ∞ all weights are 1 / N.
      where: boolean, broadcastable to `losses`: the entries that count. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the set is spread.

    Returns:
      w `[...]` in the type of `losses`, of sum 1 over the set, without gradient; 0 for entries that
      do not count.

    Raises:
      ValueError: an `r` that is not positive, or a `where` that does not broadcast.
      TypeError: losses that are not floating point.

    Use them to see which examples a model is weakest on. The gradient of the losses' mean under
    these weights is that of `kl_distributionally_robust_loss`.

    Cost: that of a softmax over the N losses; between shards a maximum and three sums of scalars.

    Example:
      >>> print(kl_robust_weights(jnp.array([0.0, 1.0, 1.0]), r=1.0).round(3))
      [0.155 0.422 0.422]

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """
    scaled, count = _scaled(losses, r, where)
    log_mean, number = _log_mean_exp(scaled, count, axis_name)
    exponent = jnp.where(count, scaled - log_mean - _log_count(number), -jnp.inf)
    return jax.lax.stop_gradient(jnp.exp(exponent)).astype(jnp.result_type(losses))


def kl_distributionally_robust_loss(
    losses: ArrayLike,
    *,
    r: float,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean of losses under weights that are their worst, at a price (a loss of the set).

        F = max_w Σ_i w_i l_i - r Σ_i w_i log(N w_i) = r log(1/N Σ_i exp(l_i / r))

    between the mean, r → ∞, and the largest, r → 0. Its gradient is Σ_i w_i ∇l_i with the weights
    of `kl_robust_weights`.

    Args:
      losses: l `[...]` floating point; all entries together are the set, N of them.
      r: above 0, in the unit of the losses.
      where: boolean, broadcastable to `losses`: the entries that count. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the set is spread.

    Returns:
      A scalar in the type of `losses`; 0 for an empty set.

    Raises:
      ValueError: an `r` that is not positive, or a `where` that does not broadcast.
      TypeError: losses that are not floating point.

    Use it in place of the mean where the weakest examples count. On a batch its expectation is
    less than that of all data, for which `compositional_weights` makes up.

    Cost: that of a log-sum-exp over the N losses.

    Example:
      >>> print(kl_distributionally_robust_loss(jnp.array([0.0, 1.0, 1.0]), r=1.0).round(4))
      0.7634

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """
    scaled, count = _scaled(losses, r, where)
    log_mean, _ = _log_mean_exp(scaled, count, axis_name)
    return (r * log_mean).astype(jnp.result_type(losses))


def compositional_state_init() -> CompositionalState:
    """The state of `compositional_weights` before the first step.

    Returns:
      A `CompositionalState` that takes the mean of the first batch as it is.

    Use it once, before training; with `doubly_robust_value_and_grad` it is the first `state`, too.

    Cost: two scalars.

    Example:
      >>> print(compositional_state_init().step)
      0

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """
    return CompositionalState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def compositional_weights(
    losses: ArrayLike,
    state: CompositionalState,
    *,
    r: float,
    eta: float = 0.1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, CompositionalState]:
    r"""Worst-case weights of a batch's examples among all data's, by a running mean.

        u_t = (1 - η) u_{t-1} + η 1/B Σ_i exp(l_i / r),   u_0 that of the first batch
        w_i = exp(l_i / r) / (B u_t)

    Σ_i w_i ∇l_i estimates the gradient of `kl_distributionally_robust_loss` over all data: the mean
    inside of the logarithm is one over many batches. A batch of easy examples so has weights of a
    sum below 1, one of hard ones above. η = 1 gives `kl_robust_weights` of the batch.

    Args:
      losses: l `[...]` floating point of a batch; B of them.
      state: of `compositional_state_init`, or what the last call gave.
      r: above 0, in the unit of the losses.
      eta: η in (0, 1]. Default 0.1.
      where: boolean, broadcastable to `losses`: the entries that count. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread.

    Returns:
      w `[...]` in the type of `losses`, without gradient, and the next state. No weight is above
      1 / η. A batch without entries leaves the state as it is.

    Raises:
      ValueError: an `r` that is not positive, an `eta` outside of (0, 1], or a `where` that does
        not broadcast.
      TypeError: losses that are not floating point.

    Use it where batches are too small for their own mean; it is kept in logarithms, so that no loss
    overflows.

    Cost: that of a softmax over the B losses; a state of two scalars, whatever the data's size.

    Example:
      >>> weights, state = compositional_weights(jnp.zeros(2), compositional_state_init(), r=1.0)
      >>> weights, state = compositional_weights(jnp.array([0.0, 1.0]), state, r=1.0, eta=0.5)
      >>> print(weights.round(3))
      [0.35  0.951]

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """
    check_interval(0, 1, closed="right", eta=eta)
    scaled, count = _scaled(jax.lax.stop_gradient(losses), r, where)
    of_batch, number = _log_mean_exp(scaled, count, axis_name)
    old = state.log_mean.astype(of_batch.dtype)
    rate = jnp.where(state.step == 0, 1.0, jnp.asarray(eta, of_batch.dtype))
    empty = number == 0
    log_mean = jnp.logaddexp(jnp.log1p(-rate) + old, jnp.log(rate) + of_batch)
    log_mean = jnp.where(empty, old, log_mean)
    exponent = jnp.where(count, scaled - log_mean - _log_count(number), -jnp.inf)
    step = jnp.where(empty, state.step, state.step + 1)
    state = CompositionalState(log_mean.astype(jnp.float32), step.astype(jnp.int32))
    return jnp.exp(exponent).astype(jnp.result_type(losses)), state


def box_log_barrier(
    delta: ArrayLike, lower: ArrayLike, upper: ArrayLike, *, strength: float
) -> Array:
    r"""What keeps a perturbation strictly inside of its box, for each of its entries.

        B = -c (log(δ - lo) + log(hi - δ)),   c = strength

    Args:
      delta: δ `[...]` floating point.
      lower: lo, broadcastable to `delta`.
      upper: hi, likewise, at least lo.
      strength: c above 0. Towards 0 the minimum of an objective with B is that in the box.

    Returns:
      `[...]` values in the type of `delta`, ∞ with gradient 0 on the box's edge and outside of it.
      Where lo = hi, δ has one place only, and B is 0.

    Raises:
      ValueError: a `strength` that is not positive, or bounds that do not broadcast.
      TypeError: a perturbation that is not floating point.

    Use it in the objective of an attack of one's own, by its sum, to make the minimiser
    differentiable; `barrier_attack` has it in its own.

    Cost: one pass over the perturbation, with two logarithms for each entry.

    Example:
      >>> delta = jnp.array([0.0, 0.5, 2.0])
      >>> print(box_log_barrier(delta, -1.0, 1.0, strength=1.0).round(3))
      [-0.     0.288    inf]

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """
    check_floating(delta=delta)
    check_interval(0, jnp.inf, closed="neither", strength=strength)
    check_broadcastable(jnp.shape(delta), lower=lower, upper=upper)
    dtype = compute_dtype(delta)
    d, low, high = (jnp.asarray(x).astype(dtype) for x in (delta, lower, upper))
    inside = (d > low) & (d < high)
    below, above = (jnp.where(inside, gap, 1.0) for gap in (d - low, high - d))
    barrier = -strength * (jnp.log(below) + jnp.log(above))
    barrier = jnp.where(inside, barrier, jnp.where(low == high, 0.0, jnp.inf))
    return barrier.astype(jnp.result_type(delta))


def barrier_attack(
    loss_fn: Callable[[Array], Array],
    inputs: ArrayLike,
    *,
    epsilon: float = 8 / 255,
    strength: float = 1e-3,
    step_size: float = 2 / 255,
    num_steps: int = 10,
    optimizer: str = "adam",
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    r"""Adversarial examples in the interior of their box, by descent with a barrier.

        δ ← Π(δ - α D(∇(-L(x + δ) + B(δ))))

    from δ = 0, with the barrier B of `box_log_barrier` and the projection Π on the box of all
    ‖δ‖_∞ ≤ ε with x + δ within `bounds`, a thousandth of its width narrower on each side. D is the
    gradient itself or Adam's step. The limit is a differentiable function of the parameters of L,
    as that of a projected attack, which ends in a corner, is not.

    Args:
      loss_fn: from inputs of the shape and type of `inputs` to losses of any shape, whose sum is
        raised; the loss of an example has to depend on that example alone.
      inputs: x `[batch, ...]` floating point, within `bounds`.
      epsilon: ε at least 0, in units of the inputs; 0 leaves them as they are. Default 8/255.
      strength: the barrier's c above 0, in units of the loss. Default 1e-3.
      step_size: α at least 0. Default 2/255, for Adam, whose steps are about that long.
      num_steps: at least 0. Default 10.
      optimizer: "adam" (DONE-ADAM) or "gd", gradient descent (DONE-GD).
      bounds: the least and the largest value of an input, or None. Default (0, 1).

    Returns:
      x + δ of the shape and type of `inputs`, with no gradient.

    Raises:
      ValueError: a hyperparameter out of its range, or an unknown `optimizer`.
      TypeError: inputs that are not floating point.

    Use it inside of training, as `doubly_robust_value_and_grad` does; to test robustness,
    `projected_gradient_attack` is stronger at the same number of steps.

    Cost: `num_steps` forward and backward passes of `loss_fn`, one after another; Adam keeps two
    arrays of the inputs' size meanwhile, "gd" none.

    Example:
      >>> loss_fn = lambda x: x @ jnp.array([1.0, -1.0])
      >>> attack = barrier_attack(loss_fn, jnp.array([[0.5, 0.5]]), epsilon=0.03, num_steps=30)
      >>> print(attack.round(2))
      [[0.52 0.48]]

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """
    check_interval(0, jnp.inf, step_size=step_size, num_steps=num_steps)
    if optimizer not in ("adam", "gd"):
        raise ValueError(f"optimizer must be 'adam' or 'gd', got {optimizer!r}")
    wide, low, high = _box(inputs, epsilon, bounds)
    margin = 1e-3 * (high - low)
    make = optax.adam(step_size) if optimizer == "adam" else optax.sgd(step_size)

    def project(delta: Array) -> Array:
        return jnp.clip(delta, low + margin, high - margin)

    def objective(delta: Array) -> Array:
        perturbed = (wide + delta).astype(jnp.result_type(inputs))
        barrier = box_log_barrier(delta, low, high, strength=strength)
        return jnp.sum(barrier) - jnp.sum(loss_fn(perturbed)).astype(delta.dtype)

    def step(_: int, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        delta, moments = carry
        change, moments = make.update(jax.grad(objective)(delta), moments)
        return project(delta + change), moments

    start = project(jnp.zeros_like(wide))
    delta, _ = jax.lax.fori_loop(0, num_steps, step, (start, make.init(start)))
    return jax.lax.stop_gradient((wide + delta).astype(jnp.result_type(inputs)))


def doubly_robust_value_and_grad(
    loss_fn: Callable[..., Array],
    *,
    r: float,
    eta: float = 0.1,
    epsilon: float = 8 / 255,
    strength: float = 1e-3,
    step_size: float = 2 / 255,
    num_steps: int = 10,
    optimizer: str = "adam",
    bounds: Bounds = (0.0, 1.0),
    implicit: bool = True,
    hessian_steps: int = 0,
) -> Callable[..., tuple[tuple[Array, CompositionalState], Any]]:
    r"""Gradients for doubly robust adversarial training (DONE, by the algorithm CID).

        F(θ) = r log mean_i exp(l_i(θ, δ_i(θ)) / r),   δ_i(θ) = argmin_δ -l_i(θ, δ) + B(δ)
        g = Σ_i w_i (∇_θ l_i + ∂²l_i/∂θ∂δ H_i⁻¹ ∇_δ l_i),   H_i = ∇²_δ (B - l_i)

    with the attacks of `barrier_attack` and the weights w of `compositional_weights`. The second
    term is how the attack moves with the parameters. H is its diagonal part of the barrier,
    c / (δ - lo)² + c / (hi - δ)², or is solved with by steps of conjugate gradients.

    Args:
      loss_fn: `(params, inputs, *args)` to losses `[batch]`, that of each example dependent on its
        own input alone; without dropout, or with the same.
      r: above 0, in the unit of the losses: small for the weakest examples, large for all alike.
      eta: η in (0, 1], how fast the mean over batches moves. Default 0.1.
      epsilon, strength, step_size, num_steps, optimizer, bounds: as for `barrier_attack`.
      implicit: whether to take the second term; without it the attacks count as constants, as in
        plain adversarial training. Default: yes.
      hessian_steps: steps of conjugate gradients on the whole H, preconditioned by the diagonal; at
        least 0. Default 0: the diagonal alone, which is all of H for a network of ReLUs with a loss
        that is linear in the logits.

    Returns:
      The function `(params, state, inputs, *args)` to `((value, state), gradient)`, with a state of
      `compositional_state_init()` at first. The value is `kl_distributionally_robust_loss` of the
      attacked batch; the gradient has the structure of `params`.

    Raises:
      ValueError: a hyperparameter out of its range; in the function, losses that are not one for
        each input.
      TypeError: inputs that are not floating point.

    Use it where `jax.value_and_grad` would stand, to train against attacks with most weight on the
    weakest examples; any optimizer takes its gradients. With few steps the second term, that of a
    solved attack, is an approximation; `implicit=False` leaves it out. A batch that is sharded
    under `jit` needs nothing else.

    Cost: `num_steps` gradients for the attack and about four more, one of them of second order;
    about two for each step of `hessian_steps`, and a state of two scalars.

    Example:
      >>> loss_fn = lambda w, x: jax.nn.softplus(-x @ w)
      >>> grad_fn = jax.jit(doubly_robust_value_and_grad(loss_fn, r=1.0, epsilon=0.1))
      >>> x = jnp.array([[0.5, 0.7], [0.2, 0.9]])
      >>> (value, state), gradient = grad_fn(jnp.ones(2), compositional_state_init(), x)
      >>> gradient.shape
      (2,)

    Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training",
    2023, arXiv:2308.00311.
    """
    check_interval(0, jnp.inf, closed="neither", r=r, strength=strength)
    check_interval(0, 1, closed="right", eta=eta)
    check_interval(0, jnp.inf, hessian_steps=hessian_steps)

    def value_and_grad(
        params: Any, state: CompositionalState, inputs: ArrayLike, *args: Any
    ) -> tuple[tuple[Array, CompositionalState], Any]:
        x, low, high = _box(inputs, epsilon, bounds)
        attacked = barrier_attack(
            lambda x: loss_fn(params, x, *args),
            inputs,
            epsilon=epsilon,
            strength=strength,
            step_size=step_size,
            num_steps=num_steps,
            optimizer=optimizer,
            bounds=bounds,
        )
        losses = loss_fn(params, attacked, *args)
        check_shape(x.shape[:1], **{"losses of loss_fn": losses})
        weights, state = compositional_weights(losses, state, r=r, eta=eta)

        def slope(params: Any, perturbed: Array) -> Array:
            return jax.grad(lambda x: jnp.sum(loss_fn(params, x, *args)))(perturbed)

        def along() -> Array:
            """H⁻¹ ∇_δ l of each example."""
            delta = attacked.astype(x.dtype) - x
            inside = (delta > low) & (delta < high)
            gaps = (jnp.where(inside, gap, 1.0) for gap in (delta - low, high - delta))
            diagonal = jnp.asarray(strength * sum(1 / jnp.square(gap) for gap in gaps), x.dtype)
            ascent = jnp.where(inside, slope(params, attacked).astype(x.dtype), 0.0)

            def product(v: Array) -> Array:
                tangent = v.astype(attacked.dtype)
                _, curvature = jax.jvp(lambda x: slope(params, x), (attacked,), (tangent,))
                return diagonal * v - jnp.where(inside, curvature.astype(x.dtype), 0.0)

            return _conjugate_gradients(product, ascent, diagonal, hessian_steps)

        direction = along() if implicit else None

        def surrogate(params: Any) -> Array:
            total = jnp.sum(weights * loss_fn(params, attacked, *args))
            if direction is None:
                return total
            w = weights.reshape((-1,) + (1,) * (x.ndim - 1))
            return total + jnp.sum(w * direction * slope(params, attacked)).astype(total.dtype)

        value = kl_distributionally_robust_loss(losses, r=r)
        return (value, state), jax.grad(surrogate)(params)

    return value_and_grad


def _scaled(losses: ArrayLike, r: float, where: ArrayLike | None) -> tuple[Array, Array]:
    """l / r in the type to compute in, and which entries count."""
    check_floating(losses=losses)
    check_interval(0, jnp.inf, closed="neither", r=r)
    check_broadcastable(jnp.shape(losses), where=where)
    count = jnp.broadcast_to(True if where is None else where, jnp.shape(losses))
    wide = jnp.asarray(losses).astype(compute_dtype(losses))
    return jnp.where(count, wide, 0.0) / r, count


def _log_mean_exp(x: Array, count: Array, axis_name: AxisName | None) -> tuple[Array, Array]:
    """log of the mean of exp x over the entries of all shards that count, 0 without any, and their
    number."""
    number = sum_over_shards(jnp.count_nonzero(count), axis_name)
    largest = jnp.max(jax.lax.stop_gradient(jnp.where(count, x, -jnp.inf)), initial=-jnp.inf)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    largest = jnp.where(number > 0, largest, 0.0)
    below = sum_over_shards(jnp.sum(jnp.expm1(jnp.where(count, x - largest, 0.0))), axis_name)
    below = below / jnp.maximum(number, 1)  # from -1 to 0, 0 where all are equal
    near = below > -0.5
    total = sum_over_shards(jnp.sum(jnp.exp(jnp.where(count, x - largest, -jnp.inf))), axis_name)
    far = jnp.log(jnp.where(near, 1.0, total)) - _log_count(number)
    return largest + jnp.where(near, jnp.log1p(jnp.where(near, below, 0.0)), far), number


def _log_count(number: Array) -> Array:
    """log of a number of entries, 0 without any."""
    return jnp.log(jnp.maximum(number, 1).astype(jnp.float32))


def _box(inputs: ArrayLike, epsilon: float, bounds: Bounds) -> tuple[Array, Array, Array]:
    """The inputs in the type to compute in, and the least and the largest perturbation."""
    check_floating(inputs=inputs)
    check_interval(0, jnp.inf, epsilon=epsilon)
    x = jnp.asarray(inputs).astype(compute_dtype(inputs))
    low, high = jnp.full_like(x, -epsilon), jnp.full_like(x, epsilon)
    if bounds is not None:
        low, high = jnp.maximum(low, bounds[0] - x), jnp.minimum(high, bounds[1] - x)
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    return x, low, high


def _conjugate_gradients(
    product: Callable[[Array], Array], target: Array, diagonal: Array, num_steps: int
) -> Array:
    """Solves `product(v) = target` for each example, from target / diagonal on.

    Each example has steps of its own, and stops where it is solved or `product` has no positive
    curvature left.
    """

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)

    def step(_: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        v, residual, direction, size = carry
        image = product(direction)
        curvature = dot(direction, image)
        goes = (curvature > 0) & (size > 0)
        length = jnp.where(goes, size / jnp.where(goes, curvature, 1.0), 0.0)
        v, residual = v + length * direction, residual - length * image
        scaled = residual / diagonal
        next_size = dot(residual, scaled)
        ratio = jnp.where(goes, next_size / jnp.where(goes, size, 1.0), 0.0)
        return v, residual, jnp.where(goes, scaled + ratio * direction, 0.0), next_size

    v = target / diagonal
    if num_steps:
        residual = target - product(v)
        start = (v, residual, residual / diagonal, dot(residual, residual / diagonal))
        v = jax.lax.fori_loop(0, num_steps, step, start)[0]
    return v
