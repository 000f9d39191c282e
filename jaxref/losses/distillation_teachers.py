"""Distillation from two teachers, one accurate and one robust, that balances what they weigh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.distillation import softmax_divergence


class MTARDState(NamedTuple):
    """What `multi_teacher_adversarial_distillation_loss` carries from step to step.

    The entries of each field are the adversarial teacher's and the natural one's, in this order.

    Attributes:
      temperatures: `[2]` float32, τ of the teachers.
      weights: `[2]` float32, w of their losses; of sum 1.
      initial_losses: `[2]` float32, the mean losses of the first step; 0 before it.
      step: int32, the number of updates so far.

    Reference: Zhao, Wang, Wei, "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher
    Adversarial Distillation", 2023, arXiv:2306.16170.
    """

    temperatures: Array
    weights: Array
    initial_losses: Array
    step: Array


class MTARDMetrics(NamedTuple):
    """What a step of `multi_teacher_adversarial_distillation_loss` saw, adversarial first.

    Attributes:
      losses: `[2]` float32, the mean divergences from the two teachers.
      entropies: `[2]` float32, the mean entropies of the teachers' softened predictions.

    Reference: Zhao, Wang, Wei, "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher
    Adversarial Distillation", 2023, arXiv:2306.16170.
    """

    losses: Array
    entropies: Array


def mtard_init(
    *, temperature: float = 1.0, weights: tuple[float, float] = (0.5, 0.5)
) -> MTARDState:
    """The state of `multi_teacher_adversarial_distillation_loss` before the first step.

    Args:
      temperature: of both teachers, above 0. Default 1.
      weights: of the adversarial and of the natural loss, at least 0 and of sum 1. Default 1/2.

    Returns:
      An `MTARDState` with these and step 0.

    Raises:
      ValueError: a `temperature` that is not positive, or `weights` that are not two of sum 1.

    Use it once, before training; uneven `weights` favour accuracy or robustness at the start alone,
    as `normalized_loss_balance` moves them.

    Cost: seven numbers.

    Example:
      >>> mtard_init().weights
      Array([0.5, 0.5], dtype=float32)

    Reference: Zhao, Wang, Wei, "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher
    Adversarial Distillation", 2023, arXiv:2306.16170.
    """
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    check_interval(0, 1, weights=weights)
    check_shape((2,), weights=weights)
    if abs(sum(weights) - 1) > 1e-5:
        raise ValueError(f"weights must have the sum 1, got {weights}")
    return MTARDState(
        jnp.full(2, temperature, jnp.float32),
        jnp.asarray(weights, jnp.float32),
        jnp.zeros(2, jnp.float32),
        jnp.int32(0),
    )


def multi_teacher_adversarial_distillation_loss(
    student_natural: ArrayLike,
    student_adversarial: ArrayLike,
    clean_teacher_natural: ArrayLike,
    robust_teacher_adversarial: ArrayLike,
    state: MTARDState,
    *,
    temperature_rate: ArrayLike = 0.001,
    weight_rate: ArrayLike = 0.025,
    temperature_bounds: tuple[float, float] = (1.0, 10.0),
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, MTARDState, MTARDMetrics]:
    r"""Divergence from an accurate teacher on clean images and a robust one on attacked ones.

        L = w_adv KL(softmax(t_adv / τ_adv) || softmax(s_adv))
          + w_nat KL(softmax(t_nat / τ_nat) || softmax(s_nat))

    with the weights of `normalized_loss_balance` for the batch's mean divergences, which raise what
    has fallen less since the first step. For the next step, `entropy_balance` moves τ so that
    neither teacher knows more than the other. The gradient is w (softmax(s) - softmax(t / τ)).

    Args:
      student_natural: s_nat `[..., classes]` floating point, of the clean images.
      student_adversarial: s_adv of the same shape, of the images attacked for the student.
      clean_teacher_natural: t_nat of the same shape: the accurate teacher's of the clean images; no
        gradient.
      robust_teacher_adversarial: t_adv of the same shape: the robust teacher's of the attacked
        images; no gradient.
      state: from `mtard_init` or the step before.
      temperature_rate: at least 0. Default 1e-3, the paper's.
      weight_rate: in [0, 1]. Default 0.025, the paper's, which divides both rates by 10 together
        with the learning rate.
      temperature_bounds: the least and the largest τ, above 0. Default (1, 10).
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit. An example without any counts
        for nothing. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread, for the
        means over it. Not needed under jit with shardings.

    Returns:
      `[...]` losses in the type of `student_natural`, in nats, of which the mean is the paper's;
      the state of the next step, which a batch without examples leaves as it is; and
      `MTARDMetrics`.

    Raises:
      ValueError: shapes that do not match, no class, a rate out of its range, or bounds that are
        not positive and in order.
      TypeError: logits that are not floating point.

    Use it for robustness at less cost of accuracy; `projected_gradient_attack` on the student's
    cross-entropy makes the attacked images, and `mart_loss` needs no teacher. The authors' code
    adds 1e-5 within its logarithms, and averages over classes, too, which weighs all this against
    weight decay by 1 / classes.

    Cost: four forward passes, two of the student and one of each teacher, beside the attack's; here
    two softmaxes of both pairs, and a state of seven numbers.

    Example:
      >>> student, clean, robust = jnp.array([[[0.0, 0.0]], [[4.0, 0.0]], [[1.0, 0.0]]])
      >>> losses, state, metrics = multi_teacher_adversarial_distillation_loss(
      ...     student, student, clean, robust, mtard_init()
      ... )
      >>> print(losses.round(2), state.temperatures, state.weights)
      [0.36] [1.    1.001] [0.5 0.5]

    Reference: Zhao, Wang, Wei, "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher
    Adversarial Distillation", 2023, arXiv:2306.16170.
    """
    logits = {
        "student_natural": student_natural,
        "student_adversarial": student_adversarial,
        "clean_teacher_natural": clean_teacher_natural,
        "robust_teacher_adversarial": robust_teacher_adversarial,
    }
    check_floating(**logits)
    shape = jnp.shape(student_natural)
    check_shape(shape, **logits)
    check_broadcastable(shape, where=where)
    check_interval(0, jnp.inf, temperature_rate=temperature_rate)
    check_interval(0, 1, weight_rate=weight_rate)
    _check_bounds(temperature_bounds=temperature_bounds)
    (axis,) = canonical_axes(axis, len(shape))
    if shape[axis] == 0:
        raise ValueError(f"student_natural must have at least one class, got shape {shape}")
    dtype = compute_dtype(*logits.values())
    natural, adversarial, t_nat, t_adv = (jnp.asarray(z).astype(dtype) for z in logits.values())
    state = jax.lax.stop_gradient(state)

    # adversarial first, as in the state
    students = jnp.stack([adversarial, natural])
    tau = state.temperatures.astype(dtype).reshape(2, *[1] * len(shape))
    softened = jax.lax.stop_gradient(jnp.stack([t_adv, t_nat])) / tau
    divergences = softmax_divergence(softened, students, axis=axis + 1, where=where)
    log_q = masked_log_softmax(softened, axis=axis + 1, where=where)
    entropies = -jnp.sum(jnp.exp(log_q) * log_q, axis=axis + 1)

    is_example = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    is_example = is_example.any(axis=axis)
    examples = tuple(range(1, len(shape)))
    sums = [jnp.sum(x, axis=examples, where=is_example) for x in (divergences, entropies)]
    sums.append(jnp.sum(is_example, dtype=dtype))
    *sums, number = jax.lax.stop_gradient(sum_over_shards(sums, axis_name))
    means, mean_entropies = ((x / jnp.maximum(number, 1)).astype(jnp.float32) for x in sums)

    initial = jnp.where(state.step == 0, means, state.initial_losses)
    weights = normalized_loss_balance(state.weights, means, initial, rate=weight_rate)
    temperatures = entropy_balance(
        *state.temperatures, *mean_entropies, rate=temperature_rate, bounds=temperature_bounds
    )
    following = MTARDState(jnp.stack(temperatures), weights, initial, state.step + 1)
    following = jax.tree.map(
        lambda new, old: jnp.where(number > 0, new, old).astype(old.dtype), following, state
    )
    losses = weights[0] * divergences[0] + weights[1] * divergences[1]
    metrics = MTARDMetrics(means, mean_entropies)
    return losses.astype(jnp.result_type(student_natural)), following, metrics


def entropy_balance(
    temperature_adversarial: ArrayLike,
    temperature_natural: ArrayLike,
    entropy_adversarial: ArrayLike,
    entropy_natural: ArrayLike,
    *,
    rate: ArrayLike = 0.001,
    bounds: tuple[float, float] = (1.0, 10.0),
) -> tuple[Array, Array]:
    r"""A step of two teachers' temperatures towards equal entropies.

        τ_adv ← clip(τ_adv - r sign(H_adv - H_nat)),   τ_nat ← clip(τ_nat - r sign(H_nat - H_adv))

    The teacher that is less certain is sharpened, the other one softened, until the bounds.

    Args:
      temperature_adversarial, temperature_natural: τ, real numbers or arrays.
      entropy_adversarial, entropy_natural: H at least 0, the mean entropies of the teachers'
        predictions at these temperatures, in any unit.
      rate: r at least 0. Default 1e-3, the paper's.
      bounds: the least and the largest temperature, above 0. Default (1, 10).

    Returns:
      Both new temperatures, in at least float32; the old ones, within the bounds, where the
      entropies are equal.

    Raises:
      ValueError: a negative `rate`, or `bounds` that are not positive and in order.

    Use it alone with other losses of two teachers; the step of
    `multi_teacher_adversarial_distillation_loss` has it built in.

    Cost: a few operations for each temperature.

    Example:
      >>> print(*entropy_balance(2.0, 2.0, 0.9, 0.4, rate=0.5))
      1.5 2.5

    Reference: Zhao, Wang, Wei, "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher
    Adversarial Distillation", 2023, arXiv:2306.16170.
    """
    check_interval(0, jnp.inf, rate=rate)
    _check_bounds(bounds=bounds)
    low, high = bounds
    dtype = compute_dtype(temperature_adversarial, temperature_natural)
    difference = jnp.asarray(entropy_adversarial) - jnp.asarray(entropy_natural)
    step = (rate * jnp.sign(difference)).astype(dtype)
    moved = (
        jnp.asarray(temperature_adversarial, dtype) - step,
        jnp.asarray(temperature_natural, dtype) + step,
    )
    adversarial, natural = (jnp.clip(temperature, low, high) for temperature in moved)
    return adversarial, natural


def normalized_loss_balance(
    weights: ArrayLike,
    losses: ArrayLike,
    initial_losses: ArrayLike,
    *,
    rate: ArrayLike = 0.025,
    exponent: float = 1.0,
) -> Array:
    r"""A step of the weights of several losses towards those that have fallen less.

        w_k ← w_k - r (w_k - R_k / Σ_j R_j),   R_k = (L_k / L_k(0))^β

    followed by a division by their sum. Under losses that fall alike, the weights tend to equal
    ones.

    Args:
      weights: w `[K]` at least 0, of sum 1.
      losses: L `[K]` at least 0.
      initial_losses: L(0) `[K]` at least 0; R is 1 where it is 0.
      rate: r in [0, 1]. Default 0.025, the paper's.
      exponent: β at least 0. Default 1, the paper's; larger ones turn to what lags behind more
        sharply.

    Returns:
      The new weights `[K]`, at least 0 and of sum 1, in at least float32; the old ones where all
      losses are 0.

    Raises:
      ValueError: shapes that do not match, a `rate` outside of [0, 1], or a negative `exponent`.

    Use it for any number of losses or teachers, with the means of a batch; the step of
    `multi_teacher_adversarial_distillation_loss` has it built in, for two.

    Cost: O(K), beside losses that are at hand.

    Example:
      >>> weights = normalized_loss_balance([0.5, 0.5], [1.0, 3.0], [2.0, 2.0], rate=0.1)
      >>> print(weights.round(3))
      [0.475 0.525]

    Reference: Zhao, Wang, Wei, "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher
    Adversarial Distillation", 2023, arXiv:2306.16170.
    """
    check_interval(0, 1, rate=rate)
    check_interval(0, jnp.inf, exponent=exponent)
    weights, losses, initial_losses = map(jnp.asarray, (weights, losses, initial_losses))
    check_shape(weights.shape, losses=losses, initial_losses=initial_losses)
    if weights.ndim != 1:
        raise ValueError(f"weights must have shape [K], got {weights.shape}")
    w = weights.astype(compute_dtype(weights))
    known = initial_losses > 0
    relative = jnp.where(known, losses / jnp.where(known, initial_losses, 1), 1.0) ** exponent
    relative = jnp.minimum(relative, 1e30)  # for the sake of the sum
    total = jnp.sum(relative)
    target = jnp.where(total > 0, relative / jnp.where(total > 0, total, 1.0), w)
    w = jnp.maximum(w - rate * (w - target), 0.0)
    return w / jnp.sum(w)


def _check_bounds(**bounds: tuple[float, float]) -> None:
    check_interval(0, jnp.inf, closed="right", **bounds)
    for name, (low, high) in bounds.items():
        if not low <= high:
            raise ValueError(f"{name} must be (least, largest), got {(low, high)}")
