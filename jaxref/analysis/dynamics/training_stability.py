"""How stable a training recipe is: its sensitivity to the learning rate, and logits that grow."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_attention_arguments,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp


def learning_rate_sensitivity(
    learning_rates: ArrayLike, final_losses: ArrayLike, initial_loss: float
) -> float:
    r"""How much worse than its best a recipe does on average over a range of learning rates.

        S = mean_η [ min(ℓ(η), ℓ_0) - ℓ* ],   ℓ* = min_η min(ℓ(η), ℓ_0)

    with ℓ(η) the final loss at learning rate η and ℓ_0 the loss at initialisation, which stands for
    every run that diverged. The mean is over log η: 0 for a recipe that does not care, and
    comparable between recipes on the same learning rates only.

    Args:
      learning_rates: `[rates]`, at least two, in ascending order and evenly spaced in log η, give
        or take a quarter of a step. The paper takes half decades from 3e-4 to 3e-1.
      final_losses: `[rates]`; a NaN or infinite loss is a diverged run.
      initial_loss: ℓ_0, a finite number.

    Returns:
      S at least 0, in the units of the loss; computed in float64 on the host.

    Raises:
      ValueError: fewer than two rates, rates that are not positive, ascending and evenly spaced,
        shapes that differ, or an `initial_loss` that is not finite.

    Use it to compare interventions (qk-norm, z-loss, warm-up) at sizes small enough to sweep; plot
    the losses as well, since one number does not say at which end a recipe fails.

    Cost: O(rates) on the host; each rate is a training run.

    Example:
      >>> learning_rate_sensitivity([1e-3, 1e-2, 1e-1], [3.0, 2.5, float("nan")], 4.0)
      0.6666

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv:2309.14322.
    """
    rates, losses = np.asarray(learning_rates, float), np.asarray(final_losses, float)
    check_interval(0, np.inf, closed="right", learning_rates=rates)
    check_interval(-np.inf, np.inf, initial_loss=initial_loss)
    if rates.ndim != 1 or rates.size < 2:
        raise ValueError(f"learning_rates must be at least two in a row, got shape {rates.shape}")
    check_shape(rates.shape, final_losses=losses)
    steps = np.diff(np.log(rates))
    if np.any(np.abs(steps - steps.mean()) > 0.25 * steps.mean()):
        raise ValueError(f"learning_rates must ascend evenly in their logarithm, got {rates}")
    losses = np.minimum(np.where(np.isfinite(losses), losses, initial_loss), initial_loss)
    return float(np.mean(losses - losses.min()))


def max_attention_logit(
    query: ArrayLike,
    key: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    r"""The largest attention logit of each head, the first sign of attention about to collapse.

        max over batch, queries i and keys j of  scale · q_i · k_j

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point, as attention receives it.
      key: `[batch, k_len, kv_heads, head_dim]`, `kv_heads` a divisor of `heads`.
      scale: a number; default `1 / sqrt(head_dim)`.
      mask: boolean, broadcastable to `[batch, heads, q_len, k_len]`; True where the query may see
        the key, such as `jnp.tri(length, dtype=bool)` for causal attention.

    Returns:
      `[heads]` in at least float32; -inf, the maximum of nothing, for a head without any pair.

    Raises:
      ValueError: shapes that do not match.
      TypeError: `query` or `key` not floating point, or a `mask` that is not boolean.

    Use it to follow each layer in training: without qk-norm, runs in the paper diverge once logits
    pass about 1e4 (`extrapolate_instability`); `jaxref.attention.query_key_norm_attention` bounds
    them.

    Cost: the logits of all pairs, `[batch, heads, q_len, k_len]` in memory, as plain attention
    holds them.

    Example:
      >>> query = jnp.array([[1.0, 0.0], [0.0, 3.0]]).reshape(1, 2, 1, 2)
      >>> print(max_attention_logit(query, 2 * query, scale=1.0))
      [18.]

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv:2309.14322.
    """
    check_attention_arguments(query, key, key, mask=mask)
    query, key = jnp.asarray(query), jnp.asarray(key)
    (batch, q_len, heads, head_dim), kv_heads = query.shape, key.shape[2]
    factor = head_dim**-0.5 if scale is None else scale
    check_shape((), scale=factor)
    dtype = compute_dtype(query, key)
    query = query.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("bqngd,bknd->bngqk", query, key, preferred_element_type=dtype)
    logits = logits.reshape(batch, heads, q_len, key.shape[1]) * factor
    return jnp.max(logits, axis=(0, 2, 3), initial=-jnp.inf, where=mask)


def log_z(logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> Array:
    r"""The logarithm of the softmax normaliser, whose drift from 0 precedes divergence.

        log Z = log Σ_j exp(f_j)

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` in at least float32; 0 where no class is admitted.

    Raises:
      ValueError: `axis` out of range, or a `where` that does not broadcast.
      TypeError: logits that are not floating point.

    Use it to follow the output logits in training; `jaxref.losses.z_loss` is the penalty on its
    square that holds it near 0.

    Cost: that of a softmax over the classes, without its result.

    Example:
      >>> print(log_z(jnp.array([[0.0, 0.0], [-50.0, -50.0]])).round(3))
      [  0.693 -49.307]

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv:2309.14322.
    """
    check_floating(logits=logits)
    check_broadcastable(jnp.shape(logits), where=where)
    (axis,) = canonical_axes(axis, jnp.ndim(logits))
    return masked_logsumexp(logits, axis=axis, where=where)


class StabilityForecast(NamedTuple):
    """The growth of the largest attention logit with model size, by `extrapolate_instability`.

    Attributes:
      coefficients: `[3]`; c_0, c_1, c_2 of log max-logit = Σ_k c_k (log parameters)^k.
      predicted: `[sizes]`; the largest logit by that fit at the sizes given.
      unstable_at: the smallest parameter count, from the smallest given upwards, at which the fit
        reaches the threshold; inf where it never does.
    """

    coefficients: np.ndarray
    predicted: np.ndarray
    unstable_at: float


def extrapolate_instability(
    parameter_counts: ArrayLike, max_logits: ArrayLike, *, threshold: float = 1e4
) -> StabilityForecast:
    r"""Predicts at which model size attention logits grow so large that training fails.

    Fits, by least squares over the models of a sweep at one learning rate,

        log m = c_0 + c_1 log N + c_2 (log N)²

    with N the parameters of a model and m its largest attention logit, and follows the fit upwards
    to the size at which m passes the threshold.

    Args:
      parameter_counts: N, `[sizes]`, at least three different positive numbers.
      max_logits: m, `[sizes]`, positive numbers, as of `max_attention_logit`.
      threshold: the logit above which training fails. Default 1e4, where the paper's models
        without qk-norm diverge.

    Returns:
      A `StabilityForecast`, computed in float64 on the host.

    Raises:
      ValueError: fewer than three different sizes, shapes that differ, or numbers not positive.

    Use it on the sizes one can afford, before training the one that counts, with m at the learning
    rate meant for that one. It is an extrapolation: leave the largest size out and see whether the
    others predict it.

    Cost: a least squares fit of three coefficients on the host; each size is a training run.

    Example:
      >>> forecast = extrapolate_instability([1e6, 1e7, 1e8], [10.0, 100.0, 1000.0])
      >>> print(f"{forecast.unstable_at:.3g}")
      1e+09

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv:2309.14322.
    """
    counts, maxima = np.asarray(parameter_counts, float), np.asarray(max_logits, float)
    check_interval(
        0,
        np.inf,
        closed="right",
        parameter_counts=counts,
        max_logits=maxima,
        threshold=threshold,
    )
    if counts.ndim != 1 or np.unique(counts).size < 3:
        raise ValueError(f"parameter_counts must hold at least three sizes, got {counts}")
    check_shape(counts.shape, max_logits=maxima)
    start = np.log(counts.min())
    beyond = np.log(counts) - start  # from the smallest size, for the fit's condition
    curvature, slope, level = np.polyfit(beyond, np.log(maxima), 2)
    missing = np.log(threshold) - level
    discriminant = slope**2 + 4 * curvature * missing
    if missing <= 0:
        distance = 0.0
    elif discriminant >= 0 and slope + np.sqrt(discriminant) > 0:
        distance = 2 * missing / (slope + np.sqrt(discriminant))  # no cancellation for c_2 near 0
    else:
        distance = np.inf
    with np.errstate(over="ignore"):
        unstable_at = float(np.exp(start + distance))
    predicted = np.exp(level + slope * beyond + curvature * beyond**2)
    coefficients = np.array(
        [
            level - slope * start + curvature * start**2,
            slope - 2 * curvature * start,
            curvature,
        ]
    )
    return StabilityForecast(coefficients, predicted, unstable_at)
