"""Losses of retrieval: scores of relevant documents above those of others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.binary_labels import split_by_label
from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.core.shards import AxisName, all_shards
from jaxref.core.vectors import unit_vectors
from jaxref.losses.pairwise import mean_over_pairs


def mann_whitney_loss(
    scores: ArrayLike,
    positive_mask: ArrayLike,
    *,
    temperature: float = 1.0,
    across_queries: bool = True,
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Cross-entropy on differences of scores between all positives and negatives (MW loss; a loss
    of the set).

        L = mean over pairs (s⁺, s⁻) of log(1 + exp(-(s⁺ - s⁻) / T)),   T = temperature

    Pairs are formed across queries, too, so that scores of different queries become comparable, and
    one threshold serves all. L / log 2 is never below 1 - AUC, at any T; as T → 0, T L tends to the
    mean of max(s⁻ - s⁺, 0). Adding one constant to all scores changes nothing; adding one for each
    query does, which `contrastive_retrieval_loss` is blind to.

    Args:
      scores: `[queries, documents]` floating point: similarities, higher for relevant documents.
      positive_mask: `[queries, documents]`, True or 1 for relevant pairs.
      temperature: T above 0. Default 1.
      across_queries: whether positives of a query are set against negatives of all queries (True,
        the paper's) or of the same query alone.
      chunk_size: how many positives to handle at a time; memory is that times the number of scores,
        and chunks without positives cost no time. Default: as many as there are queries; all
        documents, where not `across_queries`.
      where: boolean, broadcastable to `scores`: the pairs that count, without false negatives and
        duplicates, say. Default: all.
      axis_name: name or names of the mapped axes over whose shards the queries are spread. Each
        shard compares its own positives with the negatives of all. Not needed under jit with
        shardings.

    Returns:
      A scalar in the type of `scores`; `[queries]` means over the pairs of each where not
      `across_queries`. 0 where there is no pair.

    Raises:
      ValueError: shapes that do not match, a mask other than 0 and 1, or a `temperature` or
        `chunk_size` that is not positive.
      TypeError: scores that are not floating point.

    Use it in place of InfoNCE where a global threshold on similarities has to separate relevant
    from irrelevant; `mann_whitney_loss_from_embeddings` starts from a dual encoder's outputs. All
    |P| |N| comparisons come from the same queries · documents similarities.

    Cost: |P|·queries·documents comparisons; memory `chunk_size` times the scores, chunks being
    computed anew for gradients.

    Example:
      >>> loss = mann_whitney_loss(jnp.array([[2.0, 0.0], [1.0, 3.0]]), jnp.eye(2))
      >>> print(loss.round(4))
      0.1539

    Reference: Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar, "Optimizing What Matters:
    AUC-Driven Learning for Robust Neural Retrieval", 2025, arXiv:2510.00137.
    """
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    positive, negative = split_by_label(scores, where, positive_mask=positive_mask)
    if positive.ndim != 2:
        raise ValueError(f"scores must have shape [queries, documents], got {positive.shape}")
    s = jnp.asarray(scores).astype(compute_dtype(scores))
    pair_loss = _cross_entropy_of_pairs(temperature)
    if across_queries:
        size = chunk_size if chunk_size is not None else max(len(s), 1)
        s, positive, negative = s.ravel(), positive.ravel(), negative.ravel()
        loss = mean_over_pairs(
            pair_loss, s, positive, s, negative, axis_name=axis_name, chunk_size=size
        )
    else:  # each query has its own pairs, all on one shard
        loss = mean_over_pairs(pair_loss, s.T, positive.T, s.T, negative.T, chunk_size=chunk_size)
    return loss.astype(jnp.result_type(scores))


def mann_whitney_loss_from_embeddings(
    queries: ArrayLike,
    documents: ArrayLike,
    positive_index: ArrayLike,
    *,
    similarity: str = "cosine",
    temperature: float = 0.05,
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The Mann-Whitney loss of a dual encoder with in-batch negatives (a loss of the set).

    `mann_whitney_loss` of the similarities of all queries with all documents, where each query has
    one relevant document:

        L = mean_q mean over (r, d), d not relevant to r, of log(1 + exp(-(s_q⁺ - s_rd) / T))

    Args:
      queries: `[queries, features]` floating point.
      documents: `[documents, features]`, positives of all queries and hard negatives.
      positive_index: integer `[queries]`: the row of `documents` that is relevant to each query, of
        the documents of all shards with `axis_name`. One that is no row gives NaN.
      similarity: "cosine" or "dot". A zero vector has cosine 0 with any.
      temperature: T above 0. Default 0.05, for cosines.
      chunk_size: how many queries' positives to handle at a time; memory is that times queries
        times documents, and nothing is kept for the backward pass. Default: all.
      where: boolean, broadcastable to `[queries, documents]`: the pairs that count (documents of
        all shards). Default: all.
      axis_name: name or names of the mapped axes over whose shards queries and documents are
        spread: documents are gathered, and each shard handles its own queries' positives.

    Returns:
      A scalar in the type of `queries`; 0 where there is no pair.

    Raises:
      ValueError: shapes that do not match, an unknown `similarity`, or a `temperature` or
        `chunk_size` that is not positive.
      TypeError: embeddings not floating point, or a `positive_index` not integer.

    Use it as the loss of a retriever's batch; `mann_whitney_loss` takes any similarities, and
    several relevant documents for a query.

    Cost: queries²·documents comparisons; memory chunk_size·queries·documents, and one matrix
    product.

    Example:
      >>> queries, documents = jnp.eye(3)[:2], jnp.array([[2.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
      >>> loss = mann_whitney_loss_from_embeddings(
      ...     queries, documents, jnp.array([0, 1]), temperature=1.0
      ... )
      >>> print(loss.round(4))
      0.3202

    Reference: Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar, "Optimizing What Matters:
    AUC-Driven Learning for Robust Neural Retrieval", 2025, arXiv:2510.00137.
    """
    check_floating(queries=queries, documents=documents)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    dtype = compute_dtype(queries, documents)
    q, d = (jnp.asarray(x).astype(dtype) for x in (queries, documents))
    if q.ndim != 2:
        raise ValueError(f"queries must have shape [queries, features], got {q.shape}")
    check_shape((*d.shape[:1], q.shape[1]), documents=d)
    index = jnp.asarray(positive_index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"positive_index must be integers, got {index.dtype.name}")
    check_shape(q.shape[:1], positive_index=index)
    if similarity == "cosine":
        q, d = unit_vectors(q), unit_vectors(d)
    elif similarity != "dot":
        raise ValueError(f"similarity must be 'cosine' or 'dot', got {similarity!r}")
    scores = q @ all_shards(d, axis_name).T
    check_broadcastable(scores.shape, where=where)
    is_positive = index[:, None] == jnp.arange(scores.shape[1])
    exists = (
        jnp.ones(scores.shape, bool) if where is None else jnp.broadcast_to(where, scores.shape)
    )
    positives = jnp.sum(jnp.where(is_positive, scores, 0.0), axis=1)
    positives = jnp.where(is_positive.any(axis=1), positives, jnp.nan)
    loss = mean_over_pairs(
        _cross_entropy_of_pairs(temperature),
        positives,
        jnp.any(exists & is_positive, axis=1) | ~is_positive.any(axis=1),
        scores.ravel(),
        (exists & ~is_positive).ravel(),
        axis_name=axis_name,
        chunk_size=chunk_size,
    )
    return loss.astype(jnp.result_type(queries))


def contrastive_retrieval_loss(
    scores: ArrayLike,
    positive_mask: ArrayLike,
    *,
    temperature: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Softmax cross-entropy of the relevant documents among all of a query (InfoNCE).

        L_q = mean over relevant d of -log softmax_d(s_q / T),   T = temperature

    It does not change where a constant is added to all scores of a query, and so cannot bring the
    scores of different queries to one scale: it is unrelated to the AUC over all of them.

    Args:
      scores: `[..., documents]` floating point: similarities of each query with the documents.
      positive_mask: of the same shape, True or 1 for relevant documents.
      temperature: T above 0. Default 1.
      where: boolean, broadcastable to `scores`: the documents that count for a query. Default: all.

    Returns:
      `[...]` losses of the queries in the type of `scores`; 0 for one without relevant documents.

    Raises:
      ValueError: shapes that do not match, a mask other than 0 and 1, or a `temperature` that is
        not positive.
      TypeError: scores that are not floating point.

    Use it where only the order within a query matters; `mann_whitney_loss` is its counterpart for a
    threshold over all queries.

    Cost: that of a softmax over the documents of each query.

    Example:
      >>> scores = jnp.array([[2.0, 0.0], [1.0, 3.0]])
      >>> print(contrastive_retrieval_loss(scores, jnp.eye(2)).round(4))
      [0.1269 0.1269]

    Reference: Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar, "Optimizing What Matters:
    AUC-Driven Learning for Robust Neural Retrieval", 2025, arXiv:2510.00137; InfoNCE is of van den
    Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
    arXiv:1807.03748; |P| times it, for |P| relevant documents, is the multi-label softmax loss that
    Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon, "Dual-Encoders for Extreme Multi-Label
    Classification", 2023, arXiv:2310.10636, start from.
    """
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    positive, _ = split_by_label(scores, where, positive_mask=positive_mask)
    wide = jnp.asarray(scores).astype(compute_dtype(scores))
    log_p = masked_log_softmax(wide / temperature, axis=-1, where=where)
    return -masked_mean(log_p, axis=-1, where=positive).astype(jnp.result_type(scores))


def _cross_entropy_of_pairs(temperature: float) -> Callable[[Array], Array]:
    return lambda difference: jax.nn.softplus(-difference / temperature)
