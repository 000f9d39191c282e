"""Weights of tokens by what a model predicts that does not see the image (PRIOR)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.cross_entropy import softmax_cross_entropy

Weighting = Literal["complement", "inverse"]
Normalise = Literal["sequence", "batch"] | None

_WEIGHTINGS = ("complement", "inverse")
_NORMALISES = ("sequence", "batch", None)


class ImportanceDiagnostics(NamedTuple):
    """How unevenly weights are spread.

    Attributes:
      effective_sample_size: (Σ w)² / Σ w² `[...]`, from 1 to the number of weights.
      maximum: the largest weight `[...]`.
    """

    effective_sample_size: Array
    maximum: Array


def reference_token_weights(
    reference_log_probs: ArrayLike,
    *,
    exponent: ArrayLike = 1.0,
    weighting: Weighting = "complement",
    floor: float = 0.0,
    ceiling: float = 10.0,
    normalise: Normalise = "sequence",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Weights of tokens that are larger the less a reference expects them.

        complement   s = (1 - p)^k        inverse   s = p^-k
        w_t = n s_t / Σ s,   s between `floor` and `ceiling`,   k = exponent

    with p the reference's probability of the token, and n and Σ over the tokens of a sequence or of
    the batch, whose mean weight is 1. Where all scores are 0, weights are 1.

    Args:
      reference_log_probs: log p `[..., length]` floating point, at most 0, -inf included: of a
        language model that was trained on the same texts without their images, say.
      exponent: k at least 0; may be traced. 0 is 1 for all tokens. Default 1.
      weighting: "complement" (the default) or "inverse".
      floor: at least 0, the least score. Default 0: what the reference is sure of counts for
        nothing.
      ceiling: above 0 and at least `floor`, the largest score. Default 10, of use for "inverse"
        alone.
      normalise: "sequence" (the default), "batch", or None for the scores themselves.
      where: boolean, broadcastable to `reference_log_probs`: the tokens that count. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread; for
        "batch".

    Returns:
      `[..., length]` weights in the type of `reference_log_probs`, without gradient; 0 for tokens
      that do not count.

    Raises:
      ValueError: an unknown choice, a number out of its range, a mask that does not fit, or, where
        it is not traced, a log-probability that counts and is NaN or above 1e-6.
      TypeError: log-probabilities that are not floating point.

    Use it to weigh losses of tokens that come without logits, such as those of
    `jaxref.kernels.linear_softmax_cross_entropy`; `prior_loss` does it with logits. The form of the
    score is a choice: the paper names weights by the reference's probability, and no code is
    public.

    Cost: one pass over the tokens; a forward pass of the reference, once for each text.

    Example:
      >>> log_probs = jnp.log(jnp.array([0.9, 0.5, 0.1, 0.5]))
      >>> weights = reference_token_weights(log_probs)
      >>> [round(float(weight), 3) for weight in weights]
      [0.2, 1.0, 1.8, 1.0]

    Reference: Chen, Peng, Zhang, Ji, "Prioritizing Image-Related Tokens Enhances Vision-Language
    Pre-Training", 2025, arXiv:2505.08971.
    """
    check_floating(reference_log_probs=reference_log_probs)
    if jnp.ndim(reference_log_probs) == 0:
        raise ValueError("reference_log_probs must have shape [..., length], got ()")
    check_broadcastable(jnp.shape(reference_log_probs), where=where)
    check_interval(0, jnp.inf, exponent=exponent, floor=floor)
    check_interval(floor, jnp.inf, ceiling=ceiling)
    check_interval(0, jnp.inf, closed="right", ceiling=ceiling)
    if weighting not in _WEIGHTINGS:
        raise ValueError(f"weighting must be one of {_WEIGHTINGS}, got {weighting!r}")
    if normalise not in _NORMALISES:
        raise ValueError(f"normalise must be one of {_NORMALISES}, got {normalise!r}")
    log_p = jnp.asarray(reference_log_probs).astype(compute_dtype(reference_log_probs))
    counts = jnp.broadcast_to(True if where is None else where, log_p.shape)
    log_p = jax.lax.stop_gradient(jnp.where(counts, log_p, 0.0))
    if not isinstance(log_p, jax.core.Tracer) and not np.all(np.asarray(log_p) <= 1e-6):
        raise ValueError(
            f"reference_log_probs must be at most 0, got {float(np.max(np.asarray(log_p)))}"
        )

    # Logarithms: a power of a small number is 0 before its share of the sum is.
    log_base = jnp.log(-jnp.expm1(jnp.minimum(log_p, 0.0))) if weighting == "complement" else -log_p
    is_even = jnp.asarray(exponent) == 0
    log_scores = jnp.where(is_even, 0.0, exponent * log_base)
    log_scores = jnp.clip(log_scores, jnp.log(floor), jnp.log(ceiling))
    if normalise is not None:
        axis, shards = (-1, None) if normalise == "sequence" else (None, axis_name)
        scored = counts & (log_scores > -jnp.inf)
        number, number_scored = sum_over_shards(
            [jnp.sum(x, axis=axis, keepdims=True) for x in (counts, scored)], shards
        )
        total = masked_logsumexp(log_scores, axis=axis, where=scored, axis_name=shards)
        log_scores += jnp.log(jnp.maximum(number, 1)) - total.reshape(number.shape)
        log_scores = jnp.where(number_scored == 0, 0.0, log_scores)
    return jnp.where(counts, jnp.exp(log_scores), 0.0).astype(jnp.result_type(reference_log_probs))


def prior_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    reference_log_probs: ArrayLike,
    *,
    exponent: ArrayLike = 1.0,
    weighting: Weighting = "complement",
    floor: float = 0.0,
    ceiling: float = 10.0,
    normalise: Normalise = "sequence",
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Next-token cross-entropy by how little a reference without the image expects each token.

        L_t = w_t (-log p(y_t | image, y_<t)),   w = `reference_token_weights`

    Most tokens of a caption follow from those before them; the weights leave more of the gradient
    to those that only the image tells.

    Args:
      logits: `[..., length, vocabulary]` floating point, the vocabulary at `axis`.
      labels: y, integer ids `[..., length]`. One that is out of the vocabulary gives NaN where it
        counts.
      reference_log_probs: log p_ref(y_t | y_<t) `[..., length]`, at most 0, without gradient.
      exponent, weighting, floor, ceiling, normalise, axis_name: as in `reference_token_weights`.
      axis: the axis of the vocabulary.
      where: boolean, broadcastable to `labels`: the tokens of text that count. Default: all.

    Returns:
      `[..., length]` losses in the type of `logits`, 0 for tokens that do not count. Their mean is
      taken over those that do.

    Raises:
      ValueError: shapes that do not match, or as `reference_token_weights`.
      TypeError: logits or log-probabilities that are not floating point, or labels that are not
        integers.

    Use it to train on captions; `softmax_cross_entropy` learns all tokens alike. With an exponent
    of 0 it is that.

    Cost: that of `softmax_cross_entropy` over the vocabulary; a forward pass of the reference, once
    for each text.

    Example:
      >>> logits, reference = jnp.zeros((2, 4)), jnp.log(jnp.array([0.75, 0.25]))
      >>> print(prior_loss(logits, jnp.array([1, 2]), reference).round(3))
      [0.693 2.079]

    Reference: Chen, Peng, Zhang, Ji, "Prioritizing Image-Related Tokens Enhances Vision-Language
    Pre-Training", 2025, arXiv:2505.08971.
    """
    y = jnp.asarray(labels)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {y.dtype.name}")
    check_shape(y.shape, reference_log_probs=reference_log_probs)
    check_broadcastable(y.shape, where=where)
    check_floating(logits=logits, reference_log_probs=reference_log_probs)
    f, reference = (jnp.asarray(x).astype(compute_dtype(x)) for x in (logits, reference_log_probs))
    losses = softmax_cross_entropy(f, y, axis=axis)
    weights = reference_token_weights(
        reference,
        exponent=exponent,
        weighting=weighting,
        floor=floor,
        ceiling=ceiling,
        normalise=normalise,
        where=where,
        axis_name=axis_name,
    )
    weighted = losses * weights
    if where is not None:
        weighted = jnp.where(where, weighted, 0.0)
    return weighted.astype(jnp.result_type(logits))


def importance_sampling_diagnostics(
    weights: ArrayLike, *, axis: int | None = None, where: ArrayLike | None = None
) -> ImportanceDiagnostics:
    r"""How many evenly weighted samples weights are worth, and the largest of them.

        ESS = (Σ w)² / Σ w²

    Args:
      weights: `[...]` floating point, at least 0.
      axis: the axis over which samples are counted. Default: all entries are one set.
      where: boolean, broadcastable to `weights`: the samples that exist. Default: all.

    Returns:
      `ImportanceDiagnostics` of the shape of `weights` without `axis`, in its type; both are 0
      where no weight is above 0.

    Raises:
      ValueError: a mask that does not fit.
      TypeError: weights that are not floating point.

    Use it to watch any weights of samples or tokens: few effective samples mean noisy gradients, a
    sign to lower the `exponent` or the `ceiling` of `reference_token_weights`.

    Cost: two passes over the weights.

    Example:
      >>> found = importance_sampling_diagnostics(jnp.array([1.0, 1.0, 0.0, 2.0]))
      >>> round(float(found.effective_sample_size), 3), float(found.maximum)
      (2.667, 2.0)

    Reference: Chen, Peng, Zhang, Ji, "Prioritizing Image-Related Tokens Enhances Vision-Language
    Pre-Training", 2025, arXiv:2505.08971.
    """
    check_floating(weights=weights)
    check_broadcastable(jnp.shape(weights), where=where)
    w = jnp.asarray(weights).astype(compute_dtype(weights))
    if where is not None:
        w = jnp.where(where, w, 0.0)
    maximum = jnp.max(w, axis=axis, initial=0.0)
    top = jnp.max(w, axis=axis, keepdims=True, initial=0.0)
    shares = w / jnp.where(top > 0, top, 1.0)  # whose squares neither over- nor underflow
    squares = jnp.sum(jnp.square(shares), axis=axis)
    size = jnp.square(jnp.sum(shares, axis=axis)) / jnp.maximum(squares, 1.0)
    dtype = jnp.result_type(weights)
    return ImportanceDiagnostics(size.astype(dtype), maximum.astype(dtype))
