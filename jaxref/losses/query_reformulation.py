"""Losses of queries that are written anew from what they found, with more of it and with less."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.core.shards import AxisName, all_shards
from jaxref.losses.multilabel_retrieval import log_sum_of_negatives


def query_reformulation_loss(
    query_vectors: ArrayLike,
    passage_vectors: ArrayLike,
    positive_mask: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How well a query, written anew, finds the passages of the batch that it should.

        L = -v · d⁺ + log( exp(v · d⁺) + Σ_{n irrelevant} exp(v · d_n) )

    with v the query's vector and d⁺ the relevant passage that scores lowest.

    Args:
      query_vectors: v `[..., features]` floating point: one for each query, or for each revision of
        it, `[queries, revisions, features]`.
      passage_vectors: d `[passages, features]` of the whole batch. Passages that are no query's,
        such as mined ones, are negatives of all.
      positive_mask: True or 1 for relevant passages, broadcastable to `[..., passages]`:
        `[queries, 1, passages]` where queries have revisions. With `axis_name` it has this shard's
        queries and all passages.
      where: boolean, broadcastable to `[..., passages]`: the passages that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards queries and passages are spread:
        passages are gathered.

    Returns:
      `[...]` losses of at least 0 in the type of `query_vectors`, of this shard's queries; 0 for
      one without relevant or without irrelevant passages.

    Raises:
      ValueError: shapes that do not match, or a mask other than 0 and 1.
      TypeError: vectors that are not floating point.

    Use it for pseudo-relevance feedback, with `loss_over_loss` over the revisions of a query;
    `decoupled_softmax_loss` of the scores is the mean over relevant passages, of which this is the
    largest term.

    Cost: one product of all queries, or revisions, with all passages of the batch, and a softmax
    over these.

    Example:
      >>> passages, relevant = jnp.eye(3), jnp.array([[1, 0, 1]])
      >>> loss = query_reformulation_loss(jnp.array([[2.0, 1.0, 0.0]]), passages, relevant)
      >>> print(loss.round(4))
      [1.3133]

    Reference: Zhu, Pang, Lan, Cheng, "LoL: A Comparative Regularization Loss over Query
    Reformulation Losses for Pseudo-Relevance Feedback", 2022, arXiv:2204.11545.
    """
    check_floating(query_vectors=query_vectors, passage_vectors=passage_vectors)
    dtype = compute_dtype(query_vectors, passage_vectors)
    v, d = (jnp.asarray(x).astype(dtype) for x in (query_vectors, passage_vectors))
    if d.ndim != 2 or v.ndim < 1 or v.shape[-1] != d.shape[1]:
        raise ValueError(
            "passage_vectors must have shape [passages, features], with the features of "
            f"query_vectors, got {d.shape} and {v.shape}"
        )
    scores = v @ all_shards(d, axis_name).T
    check_broadcastable(scores.shape, positive_mask=positive_mask)
    mask = jnp.broadcast_to(positive_mask, scores.shape)
    positive, negative = split_by_label(scores, where, positive_mask=mask)
    log_total, has_negative = log_sum_of_negatives(scores, negative)
    defined = has_negative & positive.any(axis=-1)
    lowest = jnp.min(jnp.where(positive, scores, jnp.inf), axis=-1, initial=jnp.inf)
    loss = jax.nn.softplus(log_total - jnp.where(defined, lowest, 0.0))
    return jnp.where(defined, loss, 0.0).astype(jnp.result_type(query_vectors))


def loss_over_loss(
    revision_losses: ArrayLike, *, margin: float = 0.0, where: ArrayLike | None = None
) -> Array:
    r"""More feedback is not to make a query worse: a hinge on the losses of its revisions (LoL).

        L = mean over pairs a, b, of which a had more feedback, of max(0, m + l_a - l_b)

    It is 0 where, and for m = 0 only where, no revision is worse than one from less feedback. The
    gradient of a pair that offends lowers the one and raises the other, and so those of a query add
    up to 0: the better revision is not to forget what it had, but to mark what is to be ignored.

    Args:
      revision_losses: l `[..., revisions]` floating point: losses of the same query, as
        `query_reformulation_loss` gives them, from the most feedback to the least.
      margin: m at least 0. Default 0, the paper's.
      where: boolean, broadcastable to `revision_losses`: the revisions that there are. Default:
        all.

    Returns:
      `[...]` of at least 0 in the type of `revision_losses`; 0 for fewer than two revisions. What
      is not finite spreads.

    Raises:
      ValueError: no revisions, shapes that do not match, or a negative `margin`.
      TypeError: losses that are not floating point.

    Use it in `lol_objective`. The paper draws two of the numbers 0 to 5 of feedback passages for
    each query and step, `jnp.sort(jax.random.choice(key, 6, (2,), replace=False))[::-1]`, and gives
    the first of the same passages, in any order, to the revision with fewer.

    Cost: all pairs of a query's revisions, elementwise.

    Example:
      >>> print(loss_over_loss(jnp.array([[0.75, 0.5, 1.0], [0.5, 0.6, 0.7]])).round(4))
      [0.0833 0.    ]

    Reference: Zhu, Pang, Lan, Cheng, "LoL: A Comparative Regularization Loss over Query
    Reformulation Losses for Pseudo-Relevance Feedback", 2022, arXiv:2204.11545.
    """
    check_interval(0, jnp.inf, margin=margin)
    losses, exists = _revisions(revision_losses, where)
    more, less = np.triu_indices(losses.shape[-1], 1)
    excess = jax.nn.relu(margin + losses[..., more] - losses[..., less])
    both = exists[..., more] & exists[..., less]
    return masked_mean(excess, axis=-1, where=both).astype(jnp.result_type(revision_losses))


def lol_objective(
    revision_losses: ArrayLike,
    *,
    weight: float = 1.0,
    margin: float = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""What reformulators are trained by: the mean loss of the revisions, and `loss_over_loss`.

        L = mean_r l_r + λ `loss_over_loss`(l),   λ = weight

    Args:
      revision_losses: l `[..., revisions]` floating point, from the most feedback to the least.
      weight: λ at least 0. Default 1; the paper tries 0.5 to 2.
      margin, where: as for `loss_over_loss`.

    Returns:
      `[...]` in the type of `revision_losses`; 0 for a query without revisions.

    Raises:
      As `loss_over_loss`, and ValueError for a negative `weight`.

    Use it with two revisions of each query; with one, or with weight 0, it is plain
    pseudo-relevance feedback, `query_reformulation_loss`.

    Cost: elementwise; each revision is a pass of the query encoder, so that two take twice the time
    of one.

    Example:
      >>> print(lol_objective(jnp.array([[0.75, 0.5], [0.5, 0.75]])))
      [0.875 0.625]

    Reference: Zhu, Pang, Lan, Cheng, "LoL: A Comparative Regularization Loss over Query
    Reformulation Losses for Pseudo-Relevance Feedback", 2022, arXiv:2204.11545.
    """
    check_interval(0, jnp.inf, weight=weight)
    losses, exists = _revisions(revision_losses, where)
    regularizer = loss_over_loss(losses, margin=margin, where=where)
    objective = masked_mean(losses, axis=-1, where=exists) + weight * regularizer
    return objective.astype(jnp.result_type(revision_losses))


def _revisions(losses: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array]:
    """The losses in the type to compute in, 0 where there is no revision, and which there are."""
    check_floating(revision_losses=losses)
    shape = jnp.shape(losses)
    if not shape or shape[-1] == 0:
        raise ValueError(f"revision_losses must have at least one revision, got shape {shape}")
    check_broadcastable(shape, where=where)
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    return jnp.where(exists, jnp.asarray(losses).astype(compute_dtype(losses)), 0.0), exists
