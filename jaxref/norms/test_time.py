"""Batch normalization at test time, when the inputs are no longer those of training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.shards import AxisName
from jaxref.norms.batch import affine, batch_moments, checked_batch, global_mean
from jaxref.norms.rms import reciprocal_root


def alpha_batch_norm(
    x: ArrayLike,
    source_mean: ArrayLike,
    source_var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    alpha: float = 0.9,
    epsilon: float = 1e-5,
    mixture_moments: bool = False,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Batch normalization with a mixture of the training statistics and those of the batch.

        μ = α μ_s + (1 - α) μ_t,   σ² = α σ_s² + (1 - α) σ_t²
        y = scale · (x - μ) / √(σ² + ε) + bias

    with μ_s, σ_s² the running statistics of training (source) and μ_t, σ_t² the mean and biased
    variance of each channel over the examples and positions of the batch (target). α = 1 is
    evaluation as usual, α = 0 is test-time normalization. σ² leaves out that the means differ.

    Args:
      x: `[batch, ..., features]` floating point, channels last; at most about 1e16 in size.
      source_mean: μ_s `[features]`.
      source_var: σ_s² `[features]`, at least 0.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      alpha: α in [0, 1], the weight of the source. Default 0.9; some implementations call 1 - α
        by this name.
      epsilon: ε at least 0, added to the variance. Default 1e-5.
      mixture_moments: add α (1 - α) (μ_s - μ_t)² to σ², for the variance of the mixture of both
        distributions. Default False, as in the paper.
      axis_name: name or names of mapped axes over which the batch is spread; μ_t and σ_t² are then
        those of the global batch. Default: `x` is the whole batch.

    Returns:
      y of the shape and type of `x`, computed in at least float32. Gradients pass through the
      batch's statistics too.

    Raises:
      ValueError: `x` without batch axis or without entries, arrays that are not of shape
        `[features]`, `alpha` not in [0, 1], or a negative `epsilon`.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it on batches of mixed classes from a new environment, without any training, and with
    `jaxref.adaptation.core_adapt_step` to train on them; where neighbours in the stream are of one
    class, `unmix_tns` is the better choice.

    Cost: the reductions of `batch_norm` in training at every call; no state besides the source's,
    no gradient step.

    Example:
      >>> x = jnp.array([[8.0], [12.0]])  # trained on mean 0 and variance 1
      >>> for alpha in (1.0, 0.5, 0.0):
      ...     print(alpha_batch_norm(x, jnp.zeros(1), jnp.ones(1), alpha=alpha).round(2).ravel())
      [ 8. 12.]
      [1.9 4.43]
      [-1. 1.]

    Reference: You, Li, Zhao, "Test-time Batch Statistics Calibration for Covariate Shift", 2021,
    arXiv:2110.04065.
    """
    check_interval(0, 1, alpha=alpha)
    source = {"source_mean": jnp.asarray(source_mean), "source_var": jnp.asarray(source_var)}
    wide = checked_batch(x, source, epsilon=epsilon)
    centred, target_mean, target_var = batch_moments(wide, axis_name=axis_name)
    away = target_mean - source["source_mean"]
    variance = alpha * source["source_var"] + (1 - alpha) * target_var
    if mixture_moments:
        variance += alpha * (1 - alpha) * jnp.square(away)
    y = (centred + alpha * away) * reciprocal_root(variance, epsilon)
    return affine(y, scale, bias).astype(jnp.result_type(x))


class UnMixState(NamedTuple):
    """The components of `unmix_tns`, the statistics of one layer.

    Attributes:
      means: float32 `[components, features]`.
      variances: float32 `[components, features]`.
    """

    means: Array
    variances: Array


def unmix_tns_init(
    key: Array,
    source_mean: ArrayLike,
    source_var: ArrayLike,
    num_components: int = 16,
    alpha: float = 0.5,
) -> UnMixState:
    r"""Splits the statistics of a trained batch norm into components of the same moments.

        μ_k = μ_s + √(α K / (K - 1)) σ_s ε_k,   ε_k ~ N(0, I),   σ_k² = (1 - α) σ_s²

    so that the expected moments of the mixture of the K components are μ_s and σ_s²: the means'
    spread is the share α of the variance. A single component is μ_s and σ_s² themselves.

    Args:
      key: a PRNG key, another one for each layer.
      source_mean: μ_s `[features]`, floating point.
      source_var: σ_s² `[features]`, at least 0.
      num_components: K at least 1. Default 16, the paper's.
      alpha: α in [0, 1]. Default 0.5, the authors'. Without meaning for K = 1.

    Returns:
      An `UnMixState`.

    Raises:
      ValueError: an argument out of its range, or shapes that differ.
      TypeError: a statistic that is not floating point.

    Use it once for each batch norm that `unmix_tns` takes the place of.

    Cost: 2 K numbers a channel, drawn once.

    Example:
      >>> state = unmix_tns_init(jax.random.key(0), jnp.zeros(8), jnp.ones(8))
      >>> print(state.means.shape, state.variances[0, 0])
      (16, 8) 0.5

    Reference: Tomar, Vray, Thiran, Bozorgtabar, "Un-Mixing Test-Time Normalization Statistics:
    Combatting Label Temporal Correlation", 2024, arXiv:2401.08328.
    """
    check_floating(source_mean=source_mean, source_var=source_var)
    mean, var = jnp.asarray(source_mean, jnp.float32), jnp.asarray(source_var, jnp.float32)
    if mean.ndim != 1:
        raise ValueError(f"source_mean must have shape [features], got {mean.shape}")
    check_shape(mean.shape, source_var=var)
    check_interval(0, 1, alpha=alpha)
    if not isinstance(num_components, int) or num_components < 1:
        raise ValueError(f"num_components must be an integer of at least 1, got {num_components!r}")
    shape = (num_components, *mean.shape)
    if num_components == 1:
        return UnMixState(mean.reshape(shape), var.reshape(shape))
    spread = jnp.sqrt(alpha * num_components / (num_components - 1) * var)
    means = mean + spread * jax.random.normal(key, shape)
    return UnMixState(means, jnp.broadcast_to((1 - alpha) * var, shape))


def unmix_tns(
    x: ArrayLike,
    state: UnMixState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    momentum: float,
    temperature: float = 0.07,
    epsilon: float = 1e-5,
    cross_variance: bool = False,
    axis_name: AxisName | None = None,
) -> tuple[Array, UnMixState]:
    r"""Normalization of each example by components of which those like it move towards it.

    With m_b, v_b the mean and biased variance of each channel over the positions of example b, and
    K components of means μ_k and variances σ_k²,

        p_bk = softmax_k(cos(m_b, μ_k) / τ)
        M_bk = (1 - p_bk) μ_k + p_bk m_b,   S_bk = (1 - p_bk) σ_k² + p_bk v_b
        μ_b = avg_k M_bk,   σ_b² = avg_k S_bk + avg_k (M_bk - μ_b)²
        y_b = scale · (x_b - μ_b) / √(σ_b² + ε) + bias

    and after that, with averages over the batch and η the momentum,

        μ_k ← μ_k + η avg_b p_bk (m_b - μ_k),   σ_k² ← σ_k² + η avg_b p_bk (v_b - σ_k²)

    An example does not see the others of its batch, so that it makes no difference for it whether
    they are of its class.

    Args:
      x: `[batch, ..., features]` floating point with at least one axis of positions, channels
        last; at most about 1e16 in size.
      state: the components, from `unmix_tns_init` at first.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      momentum: η in [0, 1]; `unmix_momentum()` is the authors'.
      temperature: τ above 0. Default 0.07, the authors'.
      epsilon: ε at least 0, added to the variance. Default 1e-5.
      cross_variance: add p_bk (1 - p_bk) (m_b - μ_k)² to S_bk, for the variance of the mixture of
        both. Default False, as in the authors' code.
      axis_name: name or names of mapped axes over which the batch is spread; the components then
        follow the global batch. Default: `x` is the whole batch.

    Returns:
      y of the shape and type of `x`, computed in at least float32, and the next state, which
      carries no gradient. Gradients reach `x` through m_b and v_b but not through p_bk. A single
      component is instance normalization.

    Raises:
      ValueError: `x` without positions or without entries, arrays of other shapes, or an argument
        out of its range.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it at test time in place of a trained `batch_norm`, where neighbours in the stream are
    related; a layer without positions keeps its training statistics, as
    `jaxref.nn.UnMixNorm` does. `alpha_batch_norm` needs no state where they are not related.

    Cost: the moments of each example, arrays [batch, K, features], and 2 K numbers a channel of
    state; no gradient step.

    Example:
      >>> state = unmix_tns_init(jax.random.key(0), jnp.zeros(1), jnp.ones(1), num_components=1)
      >>> y, state = unmix_tns(jnp.array([[[4.0], [6.0]]]), state, momentum=unmix_momentum())
      >>> print(y.round(3).ravel(), state.means)
      [-1. 1.] [[0.5]]

    Reference: Tomar, Vray, Thiran, Bozorgtabar, "Un-Mixing Test-Time Normalization Statistics:
    Combatting Label Temporal Correlation", 2024, arXiv:2401.08328.
    """
    wide = checked_batch(x, {}, epsilon=epsilon)
    if wide.ndim < 3:
        raise ValueError(
            f"x must have an axis of positions, [batch, ..., features], got {wide.shape}"
        )
    if jnp.ndim(state.means) != 2:
        raise ValueError(
            f"state.means must have shape [components, features], got {jnp.shape(state.means)}"
        )
    shape = (state.means.shape[0], wide.shape[-1])
    check_shape(shape, **{"state.means": state.means, "state.variances": state.variances})
    check_interval(0, 1, momentum=momentum)
    check_interval(0, jnp.inf, closed="neither", temperature=temperature)

    positions = tuple(range(1, wide.ndim - 1))
    _, mean, variance = batch_moments(wide, axes=positions)
    to_mean = _unit(state.means)
    of_example = _unit(mean.reshape(-1, shape[1]))
    cosine = jnp.dot(of_example, to_mean.T, precision="highest")
    share = jax.lax.stop_gradient(jax.nn.softmax(cosine / temperature, axis=1))

    # [batch, components, features]
    p, m, v = share[..., None], mean.reshape(-1, 1, shape[1]), variance.reshape(-1, 1, shape[1])
    mixed_mean = (1 - p) * state.means + p * m
    mixed_var = (1 - p) * state.variances + p * v
    if cross_variance:
        mixed_var += p * (1 - p) * jnp.square(m - state.means)
    example_mean = mixed_mean.mean(axis=1, keepdims=True)
    example_var = (mixed_var + jnp.square(mixed_mean - example_mean)).mean(axis=1)
    y = (wide - example_mean.reshape(mean.shape)) * reciprocal_root(
        example_var.reshape(mean.shape), epsilon
    )

    def advanced(component, new):
        step = global_mean(p * (new - component), axes=(0,), axis_name=axis_name)[0]
        return jax.lax.stop_gradient((component + momentum * step).astype(component.dtype))

    state = UnMixState(advanced(state.means, m), advanced(state.variances, v))
    return affine(y, scale, bias).astype(jnp.result_type(x)), state


def unmix_momentum(
    base_momentum: float = 0.1, batch_size: int = 64, max_batch_size: int = 64
) -> float:
    r"""The momentum of `unmix_tns` that forgets as fast per example at any batch size.

        1 - (1 - base_momentum)^(batch_size / max_batch_size)

    Args:
      base_momentum: in [0, 1], for batches of `max_batch_size`, the share of the new batch.
        Default 0.1, with which PyTorch trains its batch norms; 1 minus `batch_norm`'s momentum.
      batch_size: examples at a time, at least 1.
      max_batch_size: at least 1. Default 64, the authors'.

    Returns:
      The momentum.

    Raises:
      ValueError: an argument out of its range.

    Use it for `unmix_tns` on a stream that comes in small batches.

    Cost: one formula, before the stream.

    Example:
      >>> unmix_momentum(), unmix_momentum(batch_size=1)
      (0.1, 0.001645)

    Reference: Tomar, Vray, Thiran, Bozorgtabar, "Un-Mixing Test-Time Normalization Statistics:
    Combatting Label Temporal Correlation", 2024, arXiv:2401.08328.
    """
    check_interval(0, 1, base_momentum=base_momentum)
    check_interval(1, jnp.inf, batch_size=batch_size, max_batch_size=max_batch_size)
    return 1 - (1 - base_momentum) ** (batch_size / max_batch_size)


def _unit(x: Array) -> Array:
    """The rows of `x` at length 1; 0 for rows of zeros."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)  # so that no square overflows
    return x * reciprocal_root(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 0.0)
