"""Label-distributionally robust losses: soft hinges with one temperature, or one per example."""

import math
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
from jaxref.losses.margins import largest, margin_violations


def label_distributionally_robust_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: float = 1.0,
    margin: float = 0.1,
    normalize_logits: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""The worst mean over the classes of how much each beats the true one, entropy permitting.

    With logits f over K classes, the label y and d_k = m 1[k≠y] + f_k - f_y,

        L = max_p Σ_k p_k d_k - λ KL(p, 1/K) = λ log((1/K) Σ_k exp(d_k / λ))

    over all distributions p, with λ = temperature and m = margin: LDR-KL. It is the hinge of
    `crammer_singer_loss` at λ = 0, cross-entropy with margin less log K at 1, and the mean of the
    d_k, a symmetric loss, at λ = inf. For λ > 0 it is consistent for the k best classes, every k.
    For labels that are distributions q, f_y is Σ_k q_k f_k and 1[k≠y] is 1 - q_k.

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      temperature: λ in [0, inf], both ends included; a traced one has to be positive and finite.
        Default 1.
      margin: m at least 0. Default 0.1, the authors'.
      normalize_logits: first scale f so that the mean of |f_k| is 1, which bounds the loss; logits
        without any size are left as they are. The authors' LDR loss always does, of softplus(f).
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, K counts them. Default: all.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: a negative `temperature` or `margin`, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it between cross-entropy and a loss that forgives wrong labels, by one number;
    `adaptive_ldr_loss` finds one for every example.

    Cost: that of a softmax over the classes.

    Example:
      >>> logits, labels = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0])
      >>> for temperature in (0.0, 1.0, jnp.inf):
      ...     print(label_distributionally_robust_loss(logits, labels, temperature=temperature))
      [0.]
      [-0.912]
      [-1.600]

    Reference: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class
    Classification: Consistency, Robustness and Adaptivity", 2021, arXiv:2112.14869.
    """
    traced = isinstance(temperature, jax.core.Tracer)
    endless = not traced and math.isinf(temperature) and temperature > 0
    if not endless:
        check_interval(0, jnp.inf, temperature=temperature)
    f = _unit_mean_size(logits, axis=axis, where=where) if normalize_logits else logits
    d, count = margin_violations(f, labels, margin=margin, axis=axis, where=where)
    if endless:
        losses = jnp.sum(d, axis=axis, keepdims=True) / count
    elif not traced and temperature == 0:
        losses = largest(d, axis)
    else:
        losses = _soft_maximum(d, temperature, count, axis=axis, where=where)
    return jnp.squeeze(losses, axis=axis).astype(jnp.result_type(logits))


class AdaptiveLDRState(NamedTuple):
    """What `adaptive_ldr_loss` carries from visit to visit.

    Attributes:
      temperatures: float32 `[num_examples]`, λ_i of each example of the training set.
      reference: float32 scalar, λ_0: where they start, and the most they can be.

    Reference: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class
    Classification: Consistency, Robustness and Adaptivity", 2021, arXiv:2112.14869.
    """

    temperatures: Array
    reference: Array


def adaptive_ldr_init(num_examples: int, temperature: float = 1.0) -> AdaptiveLDRState:
    """The state of `adaptive_ldr_loss` before any example was visited.

    Args:
      num_examples: the size of the training set, at least 1.
      temperature: λ_0, positive and finite. Default 1, the authors'.

    Returns:
      An `AdaptiveLDRState` with λ_i = λ_0 for all examples.

    Raises:
      ValueError: an argument out of its range.

    Use it once before training, with the size of the whole training set;
    `label_distributionally_robust_loss`, which has one temperature, needs none.

    Cost: one float32 number for each training example.

    Example:
      >>> adaptive_ldr_init(3).temperatures
      Array([1., 1., 1.], dtype=float32)

    Reference: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class
    Classification: Consistency, Robustness and Adaptivity", 2021, arXiv:2112.14869.
    """
    check_interval(1, jnp.inf, num_examples=num_examples)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    reference = jnp.asarray(temperature, jnp.float32)
    return AdaptiveLDRState(jnp.full(num_examples, reference), reference)


def adaptive_ldr_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    indices: ArrayLike,
    state: AdaptiveLDRState,
    *,
    alpha: float = 2.0,
    margin: float = 0.1,
    normalize_logits: bool = True,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> tuple[Array, AdaptiveLDRState]:
    r"""A label-distributionally robust loss that finds a temperature for every example (ALDR-KL).

        L_i = max_{p, λ ≥ 0} Σ_k p_k d_k - λ KL(p, 1/K) - (α log K / 2λ_0) (λ - λ_0)²

    with d as in `label_distributionally_robust_loss`. A visit of an example takes one step of each
    half of the maximum, with its λ_i from the visit before:

        p = softmax(f / λ_i),   λ_i ← λ_0 (1 - KL(p, 1/K) / (α log K))
        L_i = λ_i log((1/K) Σ_k exp(d_k / λ_i)) - (α log K / 2λ_0) (λ_i - λ_0)²

    Where the model is sure of a class λ_i falls, to no less than λ_0 (1 - 1/α), and the loss turns
    towards the hinge; where it is not, λ_i stays near λ_0. As in the authors' code p is of the
    logits without margin, smoothed by 1e-5.

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      indices: integer `[...]`, the place of each example in the training set, each at most once;
        one outside [0, num_examples) gives NaN and changes nothing.
      state: from `adaptive_ldr_init` or the step before.
      alpha: α above 1. Default 2, the authors'.
      margin: m at least 0. Default 0.1, the authors'.
      normalize_logits: first scale f so that the mean of |f_k| is 1. Default True, as the authors.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, K counts them. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, and the state with the new λ_i, which has no gradient.
      An example without any admitted class has loss 0 and changes nothing.

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: logits that are not floating point, indices that are not integers, or labels of a
        type that is neither.

    Use it where some labels are wrong and it is not known which;
    `label_distributionally_robust_loss` has one temperature and needs no state.

    Cost: that of two softmaxes over the classes; one float32 number for each training example, kept
    between steps.

    Example:
      >>> logits, labels = jnp.array([[4.0, -0.5, 0.0], [0.5, 0.4, 0.5]]), jnp.array([0, 1])
      >>> loss, state = adaptive_ldr_loss(logits, labels, jnp.array([2, 0]), adaptive_ldr_init(3))
      >>> print(state.temperatures.round(2))
      [1.   1.   0.69]

    Reference: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class
    Classification: Consistency, Robustness and Adaptivity", 2021, arXiv:2112.14869.
    """
    check_interval(1, jnp.inf, closed="right", alpha=alpha)
    if not jnp.issubdtype(jnp.result_type(indices), jnp.integer):
        raise TypeError(f"indices must be integers, got {jnp.result_type(indices).name}")
    f = _unit_mean_size(logits, axis=axis, where=where) if normalize_logits else logits
    d, count = margin_violations(f, labels, margin=margin, axis=axis, where=where)
    admitted = jnp.ones(d.shape, bool) if where is None else jnp.broadcast_to(where, d.shape)
    visited = admitted.any(axis=axis)
    check_shape(visited.shape, indices=indices)

    # beyond the end are those that are not visited, and negative ones, which would count from it
    places, size = jnp.asarray(indices), state.temperatures.size
    places = jnp.where(visited & (places >= 0), places, size)
    before = state.temperatures.at[places].get(mode="fill", fill_value=jnp.nan)
    before = jnp.expand_dims(before, axis)
    scaled = jnp.asarray(f).astype(d.dtype) / before
    p = jnp.where(admitted, jnp.exp(masked_log_softmax(scaled, axis=axis, where=where)) + 1e-5, 0.0)
    p /= jnp.maximum(p.sum(axis=axis, keepdims=True), 1e-5)
    divergence = jnp.sum(p * jnp.log(jnp.where(admitted, count * p, 1.0)), axis=axis, keepdims=True)
    log_count = jnp.log(count.astype(d.dtype))
    # one class has no divergence to divide by its bound
    share = divergence / (alpha * jnp.where(count > 1, log_count, 1.0))
    reference = state.reference
    after = jax.lax.stop_gradient(reference * (1 - share)).astype(jnp.float32)

    penalty = alpha * log_count * jnp.square(after - reference) / (2 * reference)
    losses = _soft_maximum(d, after, count, axis=axis, where=where) - penalty
    temperatures = state.temperatures.at[places].set(jnp.squeeze(after, axis=axis), mode="drop")
    losses = jnp.where(visited, jnp.squeeze(losses, axis=axis), 0.0)
    losses = losses.astype(jnp.result_type(logits))
    return losses, AdaptiveLDRState(temperatures, reference)


def _soft_maximum(
    d: Array, temperature: ArrayLike, count: Array, *, axis: int, where: ArrayLike | None
) -> Array:
    """λ log((1/K) Σ_k exp(d_k / λ)), the class axis kept: exact for λ near 0 and for large λ."""
    largest = jax.lax.stop_gradient(jnp.max(d, axis=axis, keepdims=True))
    below = (d - largest) / temperature
    if where is not None:
        below = jnp.where(where, below, 0.0)
    # log of a mean near 1 from its difference to 1, which a large λ would lose
    difference = jnp.sum(jnp.expm1(below), axis=axis, keepdims=True) / count
    mean = jnp.exp(below)
    if where is not None:
        mean = jnp.where(where, mean, 0.0)
    mean = jnp.sum(mean, axis=axis, keepdims=True) / count
    near = jnp.log1p(jnp.maximum(difference, -0.5))
    far = jnp.log(jnp.where(mean > 0, mean, 1.0))
    return largest + temperature * jnp.where(difference > -0.5, near, far)


def _unit_mean_size(logits: ArrayLike, *, axis: int, where: ArrayLike | None) -> Array:
    """f K / Σ_k |f_k|, in at least float32; f itself where there is no size to speak of."""
    check_floating(logits=logits)
    check_broadcastable(jnp.shape(logits), where=where)
    canonical_axes(axis, jnp.ndim(logits))
    f = jnp.asarray(logits)
    f = f.astype(compute_dtype(f))
    admitted = jnp.ones(f.shape, bool) if where is None else jnp.broadcast_to(where, f.shape)
    f = jnp.where(admitted, f, 0.0)
    count = admitted.sum(axis=axis, keepdims=True)
    total = jnp.sum(jnp.abs(f), axis=axis, keepdims=True)
    sizeable = total > jnp.finfo(f.dtype).eps ** 2
    return f * jnp.where(sizeable, count / jnp.where(sizeable, total, 1.0), 1.0)
