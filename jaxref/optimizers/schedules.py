"""Schedules and the rules that fit rate and decay to batch size and length of a run."""

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.optimizers.common import check_rate, product


def restart_period(
    count: ArrayLike, initial_period: int, period_multiplier: float = 2.0
) -> tuple[Array, Array]:
    r"""Where a step lies among periods of growing length.

        T_i = T_0 kⁱ,     period i starts at step T_0 (kⁱ - 1)/(k - 1)

    Args:
      count: steps taken, at least 0; a number or an array of any shape.
      initial_period: T_0, steps in the first period, at least 1.
      period_multiplier: k at least 1. Default 2.

    Returns:
      (T, T_i): steps into the period, in [0, T_i), and the period's length; both float32 of the
      shape of `count`, for whole numbers k exact up to 2²⁴ steps.

    Raises:
      ValueError: a number out of its range.

    Example:
      >>> print(*restart_period(jnp.arange(7), 2))
      [0. 1. 0. 1. 2. 3. 0.] [2. 2. 4. 4. 4. 4. 8.]

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101.
    """
    check_interval(1, jnp.inf, initial_period=initial_period, period_multiplier=period_multiplier)
    count, first, multiplier = (
        jnp.asarray(x, float) for x in (count, initial_period, period_multiplier)
    )
    k = jnp.where(multiplier > 1, multiplier, 2.0)  # equal periods: below

    def start(i):
        return first * (k**i - 1) / (k - 1)

    i = jnp.floor(jnp.log1p(count * (k - 1) / first) / jnp.log(k))
    i = i + (count >= start(i + 1)) - (count < start(i))  # the logarithm rounds
    growing = (jnp.maximum(count - start(i), 0), first * k**i)
    equal = (count % first, jnp.full_like(count, first))
    elapsed, period = (jnp.where(multiplier > 1, *both) for both in zip(growing, equal))
    return elapsed, period


def cosine_restarts(
    initial_period: int, period_multiplier: float = 2.0, peak_value: float = 1.0
) -> optax.Schedule:
    r"""Cosine annealing with warm restarts.

        η = peak (1 + cos(π T/T_i)) / 2     T steps into period i, of T_i = T_0 kⁱ steps

    Args:
      initial_period: T_0, steps in the first period, at least 1.
      period_multiplier: k at least 1. Default 2: each period has twice the steps of the last.
      peak_value: the value at each restart. Default 1, a multiplier.

    Returns:
      the schedule, count → float in (0, peak].

    Raises:
      ValueError: a number out of its range.

    Use it as a learning rate with `peak_value`, or through `adamwr`, which fits the decay to the
    periods too. `optax.sgdr_schedule` lists its periods one by one, and each may differ.

    Cost: one formula a step; no table of periods.

    Example:
      >>> print(cosine_restarts(2)(jnp.arange(7)).round(2))
      [1.   0.5  1.   0.85 0.5  0.15 1.  ]

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101; the schedule is theirs of 2016, arXiv:1608.03983.
    """
    check_interval(1, jnp.inf, initial_period=initial_period, period_multiplier=period_multiplier)
    check_interval(0, jnp.inf, peak_value=peak_value)

    def schedule(count):
        elapsed, period = restart_period(count, initial_period, period_multiplier)
        return peak_value * 0.5 * (1 + jnp.cos(jnp.pi * elapsed / period))

    return schedule


def normalized_weight_decay(
    norm_decay: ArrayLike, batch_size: int, num_examples: int, epochs: ArrayLike
) -> ArrayLike:
    r"""The weight decay of a run, given one that does not depend on its length.

        wd = wd_norm √(b / (B T))

    B T / b is the number of steps: longer runs decay less at each.

    Args:
      norm_decay: wd_norm at least 0; the paper finds 0.025 to 0.05 for image classification.
      batch_size: b at least 1, examples a step.
      num_examples: B at least 1, examples an epoch.
      epochs: T above 0, epochs of the run, or of the period between two restarts.

    Returns:
      wd, for the paper's form of the decay, which is not multiplied by the learning rate; divide
      by that for `adamw` as it is by default.

    Raises:
      ValueError: a number out of its range.

    Use it to carry a tuned decay over to a run of another length or batch size; `adamwr` normalises
    its decay for each period by itself.

    Cost: one formula, before the run.

    Example:
      >>> normalized_weight_decay(0.05, batch_size=100, num_examples=10_000, epochs=4)
      0.0025

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101.
    """
    check_interval(0, jnp.inf, norm_decay=norm_decay)
    check_interval(1, jnp.inf, batch_size=batch_size, num_examples=num_examples)
    check_interval(0, jnp.inf, closed="neither", epochs=epochs)
    return norm_decay * (batch_size / (num_examples * epochs)) ** 0.5


def large_batch_learning_rate(
    base_learning_rate: optax.ScalarOrSchedule,
    base_batch_size: int,
    batch_size: int,
    rule: str = "sqrt",
) -> optax.ScalarOrSchedule:
    r"""The learning rate for a batch, given a good one for another.

        lr = lr_b √(B / b)     rule "sqrt"
        lr = lr_b B / b        rule "linear"

    The mean of B gradients has a covariance in proportion to 1/B; with the root, the step of the
    large batch has the covariance of the small one's.

    Args:
      base_learning_rate: lr_b at least 0, tuned for batches of `base_batch_size`, or a schedule.
      base_batch_size: b at least 1, examples a step.
      batch_size: B at least 1.
      rule: "sqrt" (the default, the paper's) or "linear", usual for SGD where B is moderate.

    Returns:
      lr; a schedule where `base_learning_rate` is one.

    Raises:
      ValueError: a number out of its range, or another rule.

    Use it where the rate was tuned for another batch size; `regime_adaptation` lets the run take as
    many steps as before.

    Cost: one product; it leaves the step as it is.

    Such rates may need clipped gradients at first (`optax.clip_by_global_norm`), as in the paper.

    Example:
      >>> large_batch_learning_rate(0.1, base_batch_size=128, batch_size=2048)
      0.4

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization
    gap in large batch training of neural networks", 2017, arXiv:1705.08741.
    """
    exponents = {"sqrt": 0.5, "linear": 1.0}
    check_rate(base_learning_rate=base_learning_rate)
    check_interval(1, jnp.inf, base_batch_size=base_batch_size, batch_size=batch_size)
    if rule not in exponents:
        raise ValueError(f"rule must be one of {', '.join(exponents)}, got {rule!r}")
    return product(base_learning_rate, (batch_size / base_batch_size) ** exponents[rule])


def regime_adaptation(schedule: optax.Schedule, batch_ratio: ArrayLike) -> optax.Schedule:
    r"""A schedule over epochs, stretched until a larger batch takes as many steps as a small one.

        adapted(e) = schedule(e / r),     r = B / b

    An epoch of N examples has N/B steps in place of N/b, so that r epochs do the work of one: the
    t-th step is at epoch t B/N, where the adapted schedule is schedule(t b/N), what the t-th step
    of the small batch had. The run itself must take r times the epochs too. A schedule over steps
    needs nothing but the same number of them; the one over epochs or examples is to be adapted.

    Args:
      schedule: epochs, or examples seen, → value, for batches of b. It is called with fractions.
      batch_ratio: r above 0, how many times the small batch the large one is.

    Returns:
      the schedule over epochs, or examples, for batches of B.

    Raises:
      ValueError: `batch_ratio` is not above 0.
      TypeError: `schedule` is not callable.

    Use it where a large batch generalises worse than the small one at the same epochs: the paper
    finds the number of steps behind it, not the batch.

    Cost: one division a call; but the run goes through the data r times as often.

    Example:
      >>> drops = optax.piecewise_constant_schedule(0.1, {80: 0.1, 120: 0.1})
      >>> adapted = regime_adaptation(drops, batch_ratio=4)  # drops at epochs 320 and 480
      >>> print(*(adapted(epoch).round(4) for epoch in (319, 320, 480)))
      0.1 0.01 0.001

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization
    gap in large batch training of neural networks", 2017, arXiv:1705.08741.
    """
    if not callable(schedule):
        raise TypeError(f"schedule must be a function of the epoch, got {schedule!r}")
    check_interval(0, jnp.inf, closed="neither", batch_ratio=batch_ratio)
    return lambda count: schedule(count / batch_ratio)
