"""Learning from the mean response of bags of samples: losses of bags and of their members."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.regression import squared_error

LossFunction = Callable[[Array, Array], Array]


def bag_level_loss(
    predictions: ArrayLike,
    bag_responses: ArrayLike,
    segment_ids: ArrayLike,
    *,
    loss_fn: LossFunction = squared_error,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The loss of the mean prediction of each bag (a loss of the set).

        L_a = ℓ(mean_{i in a} f_i, ȳ_a)

    All that is seen of the responses in bag a is their mean ȳ_a. Predictions within a bag are free
    to vary about theirs.

    Args:
      predictions: f `[n, ...]` floating point.
      bag_responses: ȳ `[m, ...]`, m bags.
      segment_ids: integer `[n]`: the bag of each sample, from 0 to m - 1. Traced ids outside
        of that belong to no bag.
      loss_fn: ℓ, `loss_fn(predictions, targets)` of `[m, ...]` arrays. Default `squared_error`.
      where: boolean `[n]`: the samples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the samples are spread, in any
        way; every shard has the responses of all bags. Not needed under jit with shardings.

    Returns:
      What ℓ gives for each bag, `[m]` for single responses, in the type of `predictions`; 0 for a
      bag without samples. Bags may differ in size, and count alike in the mean.

    Raises:
      ValueError: shapes that do not match, or an id outside [0, m).
      TypeError: predictions not floating point, or `segment_ids` not integer.

    Use it where samples are many and noise is weak: it is unbiased, but learns from m numbers
    alone. `instance_level_loss` has less variance; `interpolated_aggregate_loss` goes between.

    Cost: one sum of the n predictions by bag, and ℓ m times; with `axis_name` a reduction of m
    means over the shards.

    Example:
      >>> predictions, bags = jnp.array([1.0, 3.0, 0.0]), jnp.array([0, 0, 1])
      >>> print(bag_level_loss(predictions, jnp.array([1.0, 2.0]), bags))
      [1. 4.]

    Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses:
    Instance Level versus Bag Level Loss Functions", 2024, arXiv:2401.11081.
    """
    f, targets, bags = _bags(predictions, bag_responses, segment_ids, where, axis_name)
    losses = loss_fn(bags.mean(f), targets)
    return bags.nonempty(losses).astype(jnp.result_type(predictions))


def instance_level_loss(
    predictions: ArrayLike,
    bag_responses: ArrayLike,
    segment_ids: ArrayLike,
    *,
    loss_fn: LossFunction = squared_error,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean loss of each bag's members, all with the bag's mean response as target (a loss of
    the set).

        L_a = mean_{i in a} ℓ(f_i, ȳ_a)

    For the squared loss it is `bag_level_loss` plus the variance of the predictions within the bag:
    a regularizer that draws them together.

    Args:
      predictions: f `[n, ...]` floating point.
      bag_responses: ȳ `[m, ...]`, m bags.
      segment_ids: integer `[n]`: the bag of each sample, from 0 to m - 1. Traced ids outside
        of that belong to no bag.
      loss_fn: ℓ, `loss_fn(predictions, targets)` of `[n, ...]` arrays. Default `squared_error`.
      where: boolean `[n]`: the samples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the samples are spread, in any
        way; every shard has the responses of all bags. Not needed under jit with shardings.

    Returns:
      The mean of what ℓ gives for each member, `[m]` for single responses, in the type of
      `predictions`; 0 for a bag without samples.

    Raises:
      ValueError: shapes that do not match, or an id outside [0, m).
      TypeError: predictions not floating point, or `segment_ids` not integer.

    Use it where noise is strong against the signal, or bags hold like with like; otherwise its bias
    costs more than `bag_level_loss` does by its variance.

    Cost: ℓ for all n samples, and one sum of its values by bag; with `axis_name` a reduction of m
    means over the shards.

    Example:
      >>> predictions, bags = jnp.array([1.0, 3.0, 0.0]), jnp.array([0, 0, 1])
      >>> print(instance_level_loss(predictions, jnp.array([1.0, 2.0]), bags))
      [2. 4.]

    Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses:
    Instance Level versus Bag Level Loss Functions", 2024, arXiv:2401.11081.
    """
    f, targets, bags = _bags(predictions, bag_responses, segment_ids, where, axis_name)
    losses = loss_fn(f, targets.at[bags.ids].get(mode="fill", fill_value=0))
    return bags.mean(losses).astype(jnp.result_type(predictions))


def interpolated_aggregate_loss(
    predictions: ArrayLike,
    bag_responses: ArrayLike,
    segment_ids: ArrayLike,
    *,
    rho: float,
    loss_fn: LossFunction = squared_error,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""A blend of the losses of bags and of their members (a loss of the set).

        L_a = (1 - ρ) ℓ(mean_{i in a} f_i, ȳ_a) + ρ mean_{i in a} ℓ(f_i, ȳ_a)

    For the squared loss, `bag_level_loss` plus ρ times the variance within the bag.

    Args:
      predictions: f `[n, ...]` floating point.
      bag_responses: ȳ `[m, ...]`, m bags.
      segment_ids: integer `[n]`: the bag of each sample, from 0 to m - 1. Traced ids outside
        of that belong to no bag.
      rho: ρ in [0, 1]: 0 is `bag_level_loss`, 1 `instance_level_loss`.
      loss_fn: ℓ, `loss_fn(predictions, targets)`. Default `squared_error`.
      where: boolean `[n]`: the samples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the samples are spread, in any
        way; every shard has the responses of all bags. Not needed under jit with shardings.

    Returns:
      A loss for each bag, `[m]` for single responses, in the type of `predictions`; 0 for a bag
      without samples.

    Raises:
      ValueError: shapes that do not match, an id outside [0, m), or `rho` outside [0, 1].
      TypeError: predictions not floating point, or `segment_ids` not integer.

    Use it with ρ tuned on held-out bags: between the bias of one and the variance of the other.
    `aggregate_ridge_regression` is its minimum for linear models.

    Cost: that of both losses: ℓ for n samples and m bags, and two sums by bag.

    Example:
      >>> predictions, bags = jnp.array([1.0, 3.0, 0.0]), jnp.array([0, 0, 1])
      >>> print(interpolated_aggregate_loss(predictions, jnp.array([1.0, 2.0]), bags, rho=0.25))
      [1.25 4.  ]

    Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses:
    Instance Level versus Bag Level Loss Functions", 2024, arXiv:2401.11081.
    """
    check_interval(0, 1, rho=rho)
    bag, instance = (
        loss(
            predictions,
            bag_responses,
            segment_ids,
            loss_fn=loss_fn,
            where=where,
            axis_name=axis_name,
        )
        for loss in (bag_level_loss, instance_level_loss)
    )
    return ((1 - rho) * bag + rho * instance).astype(bag.dtype)


def aggregate_ridge_regression(
    features: ArrayLike, bag_responses: ArrayLike, segment_ids: ArrayLike, *, rho: float
) -> Array:
    r"""The linear model with the least interpolated squared loss, in closed form.

        θ = ( Σ_a [ (1 - ρ) x̄_a x̄_aᵀ + ρ mean_{i in a} x_i x_iᵀ ] )⁺ Σ_a ȳ_a x̄_a

    with x̄_a the mean of the features in bag a: of all minima of the mean of
    `interpolated_aggregate_loss` of xᵀθ, the one with the least norm. ρ = 1 is least squares with
    each sample's response replaced by the bag's; ρ = 0 that on the m means. In between the spread
    within bags is the matrix of a ridge penalty.

    Args:
      features: x `[n, d]` floating point.
      bag_responses: ȳ `[m]`.
      segment_ids: integer `[n]`: the bag of each sample, from 0 to m - 1.
      rho: ρ in [0, 1].

    Returns:
      θ `[d]` in the type of `features`. Bags of different sizes count alike.

    Raises:
      ValueError: shapes that do not match, an id outside [0, m), or `rho` outside [0, 1].
      TypeError: features not floating point, or `segment_ids` not integer.

    Use it for linear models, and to choose ρ; `interpolated_aggregate_loss` trains any other.

    Cost: a singular value decomposition of n + m rows, O((n + m) d²) where they are more than d.

    Example:
      >>> x, bags = jnp.array([[1.0], [3.0], [2.0]]), jnp.array([0, 0, 1])
      >>> print(aggregate_ridge_regression(x, jnp.array([4.0, 4.0]), bags, rho=0.0))
      [2.]

    Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses:
    Instance Level versus Bag Level Loss Functions", 2024, arXiv:2401.11081.
    """
    check_interval(0, 1, rho=rho)
    x, y, bags = _bags(features, bag_responses, segment_ids, None, None, name="features")
    if x.ndim != 2:
        raise ValueError(f"features must have shape [n, d], got {x.shape}")
    check_shape(y.shape[:1], bag_responses=y)
    # Normal equations of weighted rows, solved as rows: their square would double the condition.
    of_bags = jnp.full(len(y), 1 - rho, x.dtype)
    of_samples = (rho / jnp.maximum(bags.sizes, 1)).at[bags.ids].get(mode="fill", fill_value=0)
    weights = jnp.sqrt(jnp.concatenate([of_bags, of_samples]))
    rows = jnp.concatenate([bags.mean(x), x])
    targets = jnp.concatenate([y, y[bags.ids]])
    theta, *_ = jnp.linalg.lstsq(weights[:, None] * rows, weights * targets)
    return theta.astype(jnp.result_type(features))


def bag_level_risk(
    psi: ArrayLike, bag_size: ArrayLike, noise_std: ArrayLike, signal_norm: ArrayLike
) -> Array:
    r"""The excess risk of linear regression on bag means, for many samples and features.

    For isotropic normal features, d / n → ψ, bags of k at random, and noise of variance σ²,

        σ² kψ / (1 - kψ)                          for kψ < 1
        |θ|² (1 - 1/(kψ)) + σ² / (kψ - 1)         for kψ > 1

    the risk of least squares on n / k samples: averaging k features and k noises by the same factor
    takes away nothing but the number of equations.

    Args:
      psi: ψ above 0, features per sample.
      bag_size: k at least 1.
      noise_std: σ at least 0. For responses with further noise of variance v in each bag, such as
        that of `private_bag_responses`, it is √(σ² + k v).
      signal_norm: |θ| at least 0, the norm of the true coefficients.

    Returns:
      The risk in float32, of the shape to which the arguments broadcast; infinite at kψ = 1.

    Raises:
      ValueError: a number out of its range.

    Use it over a range of k to choose the size of bags: larger ones need less noise for the same
    privacy, and leave fewer equations. `aggregate_ridge_regression` with ρ = 0 has this risk.

    Cost: a few operations for each entry.

    Example:
      >>> print(bag_level_risk(0.1, jnp.array([1, 4, 20]), 0.7, 1.0).round(3))
      [0.054 0.327 0.99]

    Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses:
    Instance Level versus Bag Level Loss Functions", 2024, arXiv:2401.11081.
    """
    check_interval(0, jnp.inf, closed="right", psi=psi)
    check_interval(1, jnp.inf, bag_size=bag_size)
    check_interval(0, jnp.inf, noise_std=noise_std, signal_norm=signal_norm)
    arrays = (jnp.asarray(x, jnp.float32) for x in (psi, bag_size, noise_std, signal_norm))
    psi, bag_size, noise_std, signal_norm = jnp.broadcast_arrays(*arrays)
    ratio = bag_size * psi
    distance = jnp.abs(1 - ratio)
    variance = jnp.square(noise_std) * jnp.minimum(ratio, 1) / jnp.where(distance > 0, distance, 1)
    bias = jnp.square(signal_norm) * (1 - 1 / jnp.maximum(ratio, 1))
    return jnp.where(distance > 0, variance + bias, jnp.inf)


def private_bag_responses(
    responses: ArrayLike,
    segment_ids: ArrayLike,
    *,
    num_bags: int,
    key: Array,
    epsilon: float,
    clip: float,
    where: ArrayLike | None = None,
) -> Array:
    r"""Mean responses of bags, released with differential privacy for each response.

    With the limit B = clip · √(log n) and bags of k_a samples,

        ȳ_a = mean_{i in a} min(max(y_i, -B), B) + Laplace(2 B / (k_a ε))

    One response moves its bag's mean by at most 2 B / k_a, so that all means together are
    ε-differentially private with respect to it.

    Args:
      responses: y `[n]`, floating point or integer; n counts those of `where`.
      segment_ids: integer `[n]`: the bag of each sample, from 0 to m - 1.
      num_bags: m at least 1.
      key: random key of the noise; a release needs a new one.
      epsilon: ε above 0: small for more privacy, and more noise.
      clip: C above 0, in the unit of the responses: √2 of their standard deviations clips few of n
        normal ones.
      where: boolean `[n]`: the samples that count. Default: all.

    Returns:
      `[m]` means in at least float32; 0 for a bag without samples.

    Raises:
      ValueError: shapes that do not match, an id outside [0, m), or a number that is not positive.
      TypeError: `segment_ids` that are not integer.

    Use it once on the data, and learn from its result by the losses of this file. Which samples
    share a bag, and how many, is not protected.

    Cost: one sum of n responses by bag and m draws; the loss of privacy adds up over releases.

    Example:
      >>> y, bags = jnp.array([1.0, 2.0, 0.5, -1.0]), jnp.array([0, 0, 1, 1])
      >>> noisy = private_bag_responses(
      ...     y, bags, num_bags=2, key=jax.random.key(0), epsilon=1e6, clip=2.0
      ... )
      >>> print(noisy.round(3))
      [ 1.5 -0.25 ]

    Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses:
    Instance Level versus Bag Level Loss Functions", 2024, arXiv:2401.11081.
    """
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon, clip=clip)
    if not isinstance(num_bags, int) or num_bags < 1:
        raise ValueError(f"num_bags must be an integer of at least 1, got {num_bags!r}")
    y = jnp.asarray(responses).astype(compute_dtype(responses))
    if y.ndim != 1:
        raise ValueError(f"responses must have shape [n], got {y.shape}")
    y, _, bags = _bags(y, jnp.zeros(num_bags), segment_ids, where, None, name="responses")
    limit = clip * jnp.sqrt(jnp.log(jnp.maximum(jnp.sum(bags.sizes), 1)))
    scale = 2 * limit / (jnp.maximum(bags.sizes, 1) * epsilon)
    noise = scale * jax.random.laplace(key, (num_bags,), y.dtype)
    return bags.nonempty(bags.mean(jnp.clip(y, -limit, limit)) + noise)


class _Bags(NamedTuple):
    """Which sample is in which bag, and how many each has over all shards."""

    ids: Array  # m for a sample that does not count, and is in none
    sizes: Array
    axis_name: AxisName | None

    def mean(self, values: Array) -> Array:
        """`[m, ...]` means of `[n, ...]` values; 0 for an empty bag."""
        total = sum_over_shards(
            jax.ops.segment_sum(values, self.ids, len(self.sizes)), self.axis_name
        )
        return total / jnp.maximum(self.sizes, 1).reshape(-1, *[1] * (values.ndim - 1))

    def nonempty(self, values: Array) -> Array:
        """`[m, ...]` values, 0 for an empty bag."""
        return jnp.where(self.sizes.reshape(-1, *[1] * (values.ndim - 1)) > 0, values, 0)


def _bags(
    predictions: ArrayLike,
    bag_responses: ArrayLike,
    segment_ids: ArrayLike,
    where: ArrayLike | None,
    axis_name: AxisName | None,
    *,
    name: str = "predictions",
) -> tuple[Array, Array, _Bags]:
    """Predictions and responses in the type to compute in, and the bags, all checked."""
    check_floating(**{name: predictions})
    f = jnp.asarray(predictions)
    if f.ndim == 0:
        raise ValueError(f"{name} must have shape [n, ...], got a scalar")
    y = jnp.asarray(bag_responses)
    if y.ndim == 0:
        raise ValueError("bag_responses must have shape [bags, ...], got a scalar")
    ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {ids.dtype.name}")
    check_shape(f.shape[:1], segment_ids=ids)
    check_broadcastable(f.shape[:1], where=where)
    exists = jnp.ones(len(f), bool) if where is None else jnp.broadcast_to(where, len(f))
    if not isinstance(exists, jax.core.Tracer) and not isinstance(ids, jax.core.Tracer):
        check_interval(0, len(y) - 1, segment_ids=np.asarray(ids)[np.asarray(exists)])
    dtype = compute_dtype(f)
    f = jnp.where(exists.reshape(-1, *[1] * (f.ndim - 1)), f, 0).astype(dtype)
    ids = jnp.where(exists & (ids >= 0), ids, len(y))  # negative ones would count from the end
    sizes = sum_over_shards(jnp.zeros(len(y), dtype).at[ids].add(1, mode="drop"), axis_name)
    return f, y.astype(dtype), _Bags(ids, sizes, axis_name)
