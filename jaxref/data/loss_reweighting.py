"""Weights of the examples of a batch by their current losses."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, sum_over_shards

Strategy = Literal["linupper", "upper", "quadratic", "extremes", "uniform"]

_STRATEGIES = ("linupper", "upper", "quadratic", "extremes", "uniform")


def loss_based_weights(
    losses: ArrayLike,
    *,
    strategy: Strategy = "linupper",
    temperature: ArrayLike = 0.4,
    delta: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Weights of examples by where their losses are between the batch's least and largest (a set).

        w = softmax(f(h) / r),   h = δ (2 l - (max l + min l)) / max(max l - min l, 1e-6)

        linupper    min(h + δ, δ)     little for the lowest losses, all above the middle alike
        upper       (h + δ) / 2       the more, the higher
        quadratic   1 - (h / δ)²      most in the middle
        extremes    |h|               most at both ends
        uniform     0

    h is from -δ to δ. w maximises Σ w f(h) - r KL(w || uniform) over all weights.

    Args:
      losses: l `[...]` floating point, of all examples of the batch; of a sequence, the mean over
        its tokens.
      strategy: f. Default "linupper", the paper's best. "quadratic" is the authors' "mid".
      temperature: r above 0; may be traced, as of `temperature_schedule`. The larger, the closer to
        uniform. Default 0.4, the paper's for its larger models; 1 for that of 124M parameters.
      delta: δ above 0. Default 1, the paper's.
      where: boolean, broadcastable to `losses`: the examples that exist. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread.

    Returns:
      `[...]` weights in the type of `losses`, without gradient, whose sum over the batch is 1; 0
      for examples that do not exist. Equal losses have equal weights.

    Raises:
      ValueError: an unknown strategy, a number out of its range, or a mask that does not fit.
      TypeError: losses that are not floating point.

    Use it where much of a corpus is redundant and soon learned; where labels are wrong, examples of
    high loss are to be left out instead, as `co_teaching_select` does.

    Cost: a few passes over the batch's losses, of which shards exchange four numbers; all examples
    take forward and backward passes, whatever their weight.

    Example:
      >>> weights = loss_based_weights(jnp.array([1.0, 2.0, 3.0, 4.0]))
      >>> [round(float(weight), 3) for weight in weights]
      [0.033, 0.173, 0.397, 0.397]

    Reference: Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic Loss-Based Sample
    Reweighting for Improved Large Language Model Pretraining", 2025, arXiv:2502.06733.
    """
    check_floating(losses=losses)
    check_broadcastable(jnp.shape(losses), where=where)
    check_interval(0, jnp.inf, closed="right", temperature=temperature, delta=delta)
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy must be one of {_STRATEGIES}, got {strategy!r}")
    x = jax.lax.stop_gradient(jnp.asarray(losses).astype(compute_dtype(losses)))
    exists = jnp.broadcast_to(True if where is None else where, x.shape)
    low = jnp.min(x, where=exists, initial=jnp.inf)
    high = jnp.max(x, where=exists, initial=-jnp.inf)
    if axis_name is not None:
        low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
    h = delta * ((x - high) + (x - low)) / jnp.maximum(high - low, 1e-6)
    scores = {
        "linupper": jnp.minimum(h + delta, delta),
        "upper": (h + delta) / 2,
        "quadratic": 1 - jnp.square(h / delta),
        "extremes": jnp.abs(h),
        "uniform": jnp.zeros_like(h),
    }[strategy] / temperature
    total = masked_logsumexp(scores, axis=None, where=exists, axis_name=axis_name)
    weights = jnp.where(exists, jnp.exp(scores - total), 0.0)
    return weights.astype(jnp.result_type(losses))


def reweighted_mean(
    losses: ArrayLike,
    *,
    strategy: Strategy = "linupper",
    temperature: ArrayLike = 0.4,
    delta: float = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean of a batch's losses by `loss_based_weights`, which have no gradient (of the set).

        L = Σ_i w_i l_i,   ∂L = Σ_i w_i ∂l_i

    Args:
      losses: l `[...]` floating point, of all examples of the batch.
      strategy, temperature, delta, where, axis_name: as in `loss_based_weights`.

    Returns:
      A scalar in the type of `losses`: the mean of the whole batch, on every shard; 0 where no
      example exists. Losses of examples that do not exist may be anything.

    Raises:
      ValueError, TypeError: as `loss_based_weights`.

    Use it in the place of the batch's mean. Where devices average gradients that each took of its
    own examples, each takes that of its own part of the sum times their number.

    Cost: that of `loss_based_weights` and a sum; no evaluation of the model beyond that of the
    mean.

    Example:
      >>> round(float(reweighted_mean(jnp.array([1.0, 2.0, 3.0, 4.0]))), 3)
      3.159

    Reference: Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic Loss-Based Sample
    Reweighting for Improved Large Language Model Pretraining", 2025, arXiv:2502.06733.
    """
    check_floating(losses=losses)
    x = jnp.asarray(losses).astype(compute_dtype(losses))
    weights = loss_based_weights(
        x,
        strategy=strategy,
        temperature=temperature,
        delta=delta,
        where=where,
        axis_name=axis_name,
    )
    if where is not None:
        x = jnp.where(where, x, 0.0)
    return sum_over_shards(jnp.sum(weights * x), axis_name).astype(jnp.result_type(losses))


def temperature_schedule(
    initial: float, final: float, warmup_steps: int, total_steps: int
) -> Callable[[ArrayLike], Array]:
    r"""Temperatures that begin high, while losses do not yet tell much of the examples.

        r(t) = initial                                   t < warmup_steps
               from initial to final along a line        warmup_steps ≤ t < total_steps
               final                                     total_steps ≤ t

    Args:
      initial: above 0: 100 in the authors' code for 1.4B and 7B parameters, by which weights
        differ by a hundredth.
      final: above 0.
      warmup_steps: at least 0: 1000 in the authors' code for small models, 2000 for large ones.
      total_steps: at least `warmup_steps`; equal for the authors' own jump from one temperature to
        the other.

    Returns:
      A function of the step, an integer that may be traced, to the temperature, in float32.

    Raises:
      ValueError: a number out of its range.

    Use it for the `temperature` of `loss_based_weights`.

    Cost: a few scalars a step.

    Example:
      >>> schedule = temperature_schedule(100.0, 0.5, 2, 4)
      >>> [float(schedule(step)) for step in (0, 2, 3, 4, 5)]
      [100.0, 100.0, 50.25, 0.5, 0.5]

    Reference: Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang, "Dynamic Loss-Based Sample
    Reweighting for Improved Large Language Model Pretraining", 2025, arXiv:2502.06733.
    """
    check_interval(0, jnp.inf, closed="right", initial=initial, final=final)
    check_interval(0, jnp.inf, warmup_steps=warmup_steps)
    check_interval(warmup_steps, jnp.inf, total_steps=total_steps)

    def temperature(step: ArrayLike) -> Array:
        if total_steps == warmup_steps:
            return jnp.where(jnp.asarray(step) < warmup_steps, initial, final)
        passed = (jnp.asarray(step, jnp.float32) - warmup_steps) / (total_steps - warmup_steps)
        return initial + (final - initial) * jnp.clip(passed, 0.0, 1.0)

    return temperature
