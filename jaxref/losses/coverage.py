"""Losses for answers that are drawn several times: what counts is that one of them is right."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype


def direct_coverage_loss(
    log_probabilities: ArrayLike, *, num_samples: float, where: ArrayLike | None = None
) -> Array:
    r"""The negative log-probability that one of several samples is right (DCO).

        L = -log(1 - (1 - p)^N),   N = num_samples

    for the probability p that the model gives to the right answer. N = 1 is cross-entropy. The
    gradient is that of cross-entropy times `direct_coverage_gradient_factor`, which vanishes for
    answers that N samples find anyway: what is more likely than about log(N) / N is left as it is.

    Args:
      log_probabilities: log p `[...]` floating point: of a whole answer, the sum over its tokens.
        Above 0 they count as 0. Where the answer follows on hidden steps, p is the mean over
        these: the log-mean-exp of the answer's log-probabilities after several of them.
      num_samples: N at least 1, how often the model is to be asked; need not be whole.
      where: boolean, broadcastable to `log_probabilities`; excluded answers have loss 0. Default:
        all.

    Returns:
      `[...]` losses, at least 0, in the type of `log_probabilities`, in nats; about
      -log p - log N for small p, and 0 with gradient 0 at p = 1 (for N = 1 gradient -1).

    Raises:
      ValueError: `num_samples` below 1, or a `where` that does not broadcast.
      TypeError: log-probabilities that are not floating point.

    Use it to fine-tune a model whose answers will be checked, as by a verifier or by tests, so that
    pass@N counts; with N = 1 for a single answer.

    Cost: a few operations for each answer; N makes no difference, as nothing is drawn.

    Example:
      >>> print(direct_coverage_loss(jnp.log(jnp.array([0.1, 0.9])), num_samples=16).round(3))
      [0.205 0.   ]

    Reference: Chen, Raventós, Cheng, Ganguli, Druckmann, "Rethinking Fine-Tuning when Scaling
    Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", 2025, arXiv:2502.07154.
    """
    log_p, samples = _checked(log_probabilities, num_samples)
    check_broadcastable(log_p.shape, where=where)
    if where is not None:
        log_p = jnp.where(where, log_p, 0.0)
    loss = _coverage_loss(log_p, samples)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(log_probabilities))


def direct_coverage_loss_from_logits(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    num_samples: float,
    steps: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Direct coverage loss of an answer's logits (a loss of the set of its tokens).

        L = -log(1 - (1 - p)^N),   log p = Σ_t log softmax(f_t)_{y_t},   N = num_samples

    over the tokens t of the answer; with `steps`, the sum of L over the steps, each with its own p.

    Args:
      logits: f `[..., tokens, classes]` floating point.
      labels: integer ids y `[..., tokens]`; one that is no class gives NaN for its answer.
      num_samples: N at least 1, how often the model is to be asked; with `steps`, how often at each
        of them: the effective branching of the search.
      steps: integer `[..., tokens]`, in [0, tokens): which step of a proof or search each token
        belongs to. Default: all to one.
      where: boolean, broadcastable to `[..., tokens]`: the tokens of the answer, without those of
        the question. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats; 0 for an answer without tokens.

    Raises:
      ValueError: `num_samples` below 1, or shapes that do not match.
      TypeError: logits not floating point, or `labels` or `steps` not integer.

    Use it in place of the sum of the tokens' cross-entropies; `direct_coverage_loss` takes
    log-probabilities that are summed already.

    Cost: that of a softmax over the classes of each token; with `steps` tokens² numbers more for
    each answer.

    Example:
      >>> logits = jnp.zeros((3, 4))
      >>> tokens = jnp.array([0, 1, 2])
      >>> print(direct_coverage_loss_from_logits(logits, tokens, num_samples=64).round(3))
      0.454

    Reference: Chen, Raventós, Cheng, Ganguli, Druckmann, "Rethinking Fine-Tuning when Scaling
    Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", 2025, arXiv:2502.07154.
    """
    check_floating(logits=logits)
    logits = jnp.asarray(logits)
    if logits.ndim < 2:
        raise ValueError(f"logits must have shape [..., tokens, classes], got {logits.shape}")
    tokens = logits.shape[:-1]
    for name, ids in {"labels": labels, "steps": steps}.items():
        if ids is not None:
            check_shape(tokens, **{name: ids})
            if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
                raise TypeError(f"{name} must be integers, got {jnp.result_type(ids).name}")
    check_broadcastable(tokens, where=where)
    wide = logits.astype(compute_dtype(logits))
    admitted = jnp.broadcast_to(True if where is None else where, tokens)
    wide = jnp.where(admitted[..., None], wide, 0.0)
    labels = jnp.where(admitted, labels, 0)
    log_p = jnp.sum(label_distribution(labels, wide) * jax.nn.log_softmax(wide), axis=-1)
    log_p = jnp.where(admitted, log_p, 0.0)
    if steps is None:
        of_step = jnp.sum(log_p, axis=-1, keepdims=True)
    else:
        in_step = jnp.asarray(steps)[..., None] == jnp.arange(tokens[-1])
        of_step = jnp.sum(jnp.where(in_step, log_p[..., None], 0.0), axis=-2)
    losses = direct_coverage_loss(of_step, num_samples=num_samples)
    return jnp.sum(losses, axis=-1).astype(logits.dtype)


def direct_coverage_gradient_factor(log_probabilities: ArrayLike, num_samples: float) -> Array:
    r"""The part of cross-entropy's gradient that several samples leave of it (DCO).

        F = N p (1 - p)^{N-1} / (1 - (1 - p)^N),   ∂L/∂θ = -F ∂(log p)/∂θ

    for L = `direct_coverage_loss`. It is 1 for N = 1; for any other N it falls from 1 at p = 0 to
    0 at p = 1.

    Args:
      log_probabilities: log p `[...]` floating point, at most 0.
      num_samples: N at least 1.

    Returns:
      `[...]` from 0 to 1, in the type of `log_probabilities`.

    Raises:
      ValueError: `num_samples` below 1.
      TypeError: log-probabilities that are not floating point.

    Use it to see which answers still train, or to weigh another loss as this one does.

    Cost: a few operations for each answer.

    Example:
      >>> print(direct_coverage_gradient_factor(jnp.log(jnp.array([1e-3, 0.1, 0.5])), 16).round(4))
      [0.9925 0.4044 0.0001]

    Reference: Chen, Raventós, Cheng, Ganguli, Druckmann, "Rethinking Fine-Tuning when Scaling
    Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", 2025, arXiv:2502.07154.
    """
    log_p, samples = _checked(log_probabilities, num_samples)
    return _gradient_factor(log_p, samples).astype(jnp.result_type(log_probabilities))


def _checked(log_probabilities: ArrayLike, num_samples: float) -> tuple[Array, Array]:
    """log p, at most 0, and N in the type to compute in."""
    check_floating(log_probabilities=log_probabilities)
    check_interval(1, jnp.inf, num_samples=num_samples)
    log_p = jnp.asarray(log_probabilities)
    log_p = log_p.astype(compute_dtype(log_p))
    log_p = jnp.where(log_p > 0, 0.0, log_p)
    return log_p, jnp.asarray(num_samples, log_p.dtype)


@jax.custom_jvp
def _coverage_loss(log_p: Array, samples: Array) -> Array:
    # log(-y) for y = N log(1 - p); below e^-20, -log(1 - p) is p (1 + p/2), and p may underflow
    rare = log_p < -20
    odds = jnp.log(-_log_one_minus_exp(jnp.where(rare, -1.0, log_p)))
    log_y = jnp.log(samples) + jnp.where(rare, log_p + jnp.exp(log_p) / 2, odds)
    y = -jnp.exp(log_y)
    rare = log_y < -20
    return -jnp.where(rare, log_y + y / 2, _log_one_minus_exp(jnp.where(rare, -1.0, y)))


@_coverage_loss.defjvp
def _coverage_loss_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """By the factor itself, which is finite where the logarithms' slopes are not."""
    return _coverage_loss(*primals), -_gradient_factor(*primals) * tangents[0]


def _gradient_factor(log_p: Array, samples: Array) -> Array:
    certain = log_p == 0
    log_miss = _log_one_minus_exp(jnp.where(certain, -1.0, log_p))
    log_factor = jnp.log(samples) + log_p + (samples - 1) * log_miss
    factor = jnp.exp(log_factor + _coverage_loss(log_p, samples))
    return jnp.where(certain, jnp.where(samples == 1, 1.0, 0.0), jnp.minimum(factor, 1.0))


def _log_one_minus_exp(x: Array) -> Array:
    """log(1 - exp x) for x ≤ 0."""
    near = x > -0.6931
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(x)))
