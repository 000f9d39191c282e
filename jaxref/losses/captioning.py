"""Captioning: cross-entropy of the tokens, and the meaning of the sentence beside it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.core.vectors import unit_vectors
from jaxref.losses.cross_entropy import softmax_cross_entropy
from jaxref.losses.regression import huber_loss, squared_error

KINDS = ("cosine", "smooth_l1", "mse")


def sentence_embedding_regression_loss(
    predicted: ArrayLike,
    target: ArrayLike,
    *,
    kind: str = "cosine",
    where: ArrayLike | None = None,
) -> Array:
    r"""How far a predicted sentence embedding is from that of the reference.

        cosine:     1 - ⟨ê, e⟩ / (||ê|| ||e||)
        smooth_l1:  mean_d huber(ê_d - e_d), with δ = 1
        mse:        mean_d (ê_d - e_d)²

    Args:
      predicted: ê `[..., features]` floating point.
      target: e of the same shape: the embedding of the reference by a frozen sentence encoder,
        computed beforehand; no gradient.
      kind: one of the names above. Default "cosine", which does not see lengths.
      where: boolean, broadcastable to `[...]`: the sentences that exist; the others have loss 0.
        Default: all.

    Returns:
      `[...]` losses in the type of `predicted`; of kind "cosine" in [0, 2], with loss 1 and
      gradient 0 where a vector is 0.

    Raises:
      ValueError: shapes that do not match, or an unknown `kind`.
      TypeError: predictions that are not floating point.

    Use it beside the cross-entropy of the tokens, as `captioning_multitask_loss` does.

    Cost: one pass over the embeddings; the sentence encoder runs once for each reference, before
    training.

    Example:
      >>> loss = sentence_embedding_regression_loss(jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0]))
      >>> print(loss.round(3))
      0.4

    Reference: Labbé, Pinquier, Pellegrini, "Multitask learning in Audio Captioning: a sentence
    embedding regression loss acts as a regularizer", 2023, arXiv:2305.01482.
    """
    check_floating(predicted=predicted)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {kind!r}")
    shape = jnp.shape(predicted)
    if not shape or shape[-1] == 0:
        raise ValueError(f"predicted must have shape [..., features], got {shape}")
    check_shape(shape, target=target)
    check_broadcastable(shape[:-1], where=where)
    dtype = compute_dtype(predicted)
    e_hat, e = (jnp.asarray(x).astype(dtype) for x in (predicted, target))
    if where is not None:
        exists = jnp.broadcast_to(where, shape[:-1])[..., None]
        e_hat, e = (jnp.where(exists, x, 0.0) for x in (e_hat, e))
    e = jax.lax.stop_gradient(e)
    if kind == "cosine":
        loss = 1 - jnp.sum(unit_vectors(e_hat) * unit_vectors(e), axis=-1)
    else:
        loss = jnp.mean({"smooth_l1": huber_loss, "mse": squared_error}[kind](e_hat, e), axis=-1)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(predicted))


def captioning_multitask_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    hidden: ArrayLike,
    projection: Callable[[Array], Array],
    target_embedding: ArrayLike,
    *,
    embedding_weight: float = 1.0,
    label_smoothing: float = 0.0,
    kind: str = "cosine",
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of a caption's tokens, and the regression of its sentence embedding.

        L = mean_t CE(logits_t, labels_t) + λ SER(projection(mean_t hidden_t), e)

    with the means over the tokens t that exist, SER = `sentence_embedding_regression_loss` and
    λ = embedding_weight. The decoder learns from both, the projection from the second alone.

    Args:
      logits: `[..., tokens, vocabulary]` floating point, from teacher forcing.
      labels: integer ids `[..., tokens]`, or distributions of the shape of `logits`; any in tokens
        that do not exist. Of those that do, an id outside of the vocabulary gives NaN for its
        sentence.
      hidden: `[..., tokens, features]` floating point: the decoder's last states.
      projection: from `[..., features]` to `[..., embedding]`, such as the `projection` of a
        `jaxref.nn.SentenceEmbeddingHead`.
      target_embedding: e `[..., embedding]`; of several references that of the labels. No gradient.
      embedding_weight: λ at least 0. Default 1; 0 is cross-entropy.
      label_smoothing: in [0, 1], the mass spread evenly over the vocabulary. Default 0.
      kind: "cosine", "smooth_l1" or "mse". Default "cosine".
      where: boolean, broadcastable to `[..., tokens]`: the tokens that exist. Default: all.

    Returns:
      `[...]` losses of the sentences in the type of `logits`; 0 for one without tokens.

    Raises:
      ValueError: shapes that do not match, an unknown `kind`, a negative `embedding_weight` or a
        `label_smoothing` outside of [0, 1].
      TypeError: logits or hidden not floating point, or labels of a type that is neither.

    Use it where little data makes a captioner overfit and weight decay is low: the second term
    acts as a regularizer, of no effect beside a high one. `softmax_cross_entropy` is the first term
    alone.

    Cost: that of a softmax over the vocabulary for each token, one pass over `hidden`, and one
    `projection` for each sentence.

    Example:
      >>> logits, hidden = jnp.zeros((1, 2, 4)), jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
      >>> loss = captioning_multitask_loss(
      ...     logits, jnp.array([[3, 1]]), hidden, lambda h: h, jnp.array([[1.0, 1.0]])
      ... )
      >>> print(loss.round(3))
      [1.386]

    Reference: Labbé, Pinquier, Pellegrini, "Multitask learning in Audio Captioning: a sentence
    embedding regression loss acts as a regularizer", 2023, arXiv:2305.01482.
    """
    check_floating(logits=logits, hidden=hidden)
    check_interval(0, jnp.inf, embedding_weight=embedding_weight)
    tokens = jnp.shape(logits)[:-1]
    if not tokens:
        raise ValueError(
            f"logits must have shape [..., tokens, vocabulary], got {jnp.shape(logits)}"
        )
    check_shape((*tokens, *jnp.shape(hidden)[-1:]), hidden=hidden)
    check_broadcastable(tokens, where=where)
    exists = jnp.ones(tokens, bool) if where is None else jnp.broadcast_to(where, tokens)
    cross_entropy = softmax_cross_entropy(
        jnp.asarray(logits).astype(compute_dtype(logits)),
        labels,
        label_smoothing=label_smoothing,
        where=None if where is None else exists[..., None],
    )
    predicted = projection(mean_over_tokens(hidden, exists))
    check_shape(jnp.shape(predicted), target_embedding=target_embedding)
    regression = sentence_embedding_regression_loss(
        predicted, target_embedding, kind=kind, where=exists.any(axis=-1)
    )
    loss = masked_mean(cross_entropy, axis=-1, where=exists) + embedding_weight * regression
    return loss.astype(jnp.result_type(logits))


def mean_over_tokens(hidden: ArrayLike, where: ArrayLike | None) -> Array:
    """`[..., features]` means of `[..., tokens, features]` over the tokens that exist; 0 without.

    In the type of `hidden`, computed in at least float32.
    """
    hidden = jnp.asarray(hidden)
    if where is not None:
        where = jnp.broadcast_to(where, hidden.shape[:-1])[..., None]
    mean = masked_mean(hidden.astype(compute_dtype(hidden)), axis=-2, where=where)
    return mean.astype(hidden.dtype)
