"""From the cosines of retrieval to relevance that means the same for all queries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.losses.cross_entropy import binary_cross_entropy

# What slopes and powers, and the shifted cosine, are kept from 0 by.
_POSITIVE = 1e-6

_MAPS: dict[str, tuple[int, Callable[..., Array]]] = {
    "linear": (2, lambda c, u: c),
    "sqrt": (2, lambda c, u: jnp.sqrt(u)),
    "quadratic": (2, lambda c, u: jnp.square(u)),
    "power": (3, lambda c, u, p: u**p),
}


def monotone_score_map(cosine: ArrayLike, parameters: ArrayLike, *, kind: str = "power") -> Array:
    r"""A logit of relevance that grows with the cosine, by parameters of each query.

        linear:  z = a c + b          sqrt:       z = a √u + b
        power:   z = a u^p + b        quadratic:  z = a u² + b

    with u = (1 + c) / 2 in [10⁻⁶, 1], and a and p the softplus of what is given, plus 10⁻⁶, above
    0. So no order within a query changes, and with it no metric of its ranking; what changes is how
    queries compare.

    Args:
      cosine: c `[..., documents]` floating point, of a query with its documents.
      parameters: `[..., 2]` floating point, or `[..., 3]` for "power": (a, b) and p before the
        softplus, b as it is; broadcastable to the queries, as `jaxref.nn.CosineAdapter` gives
        them.
      kind: one of the names above. Default "power".

    Returns:
      z `[..., documents]` in the type of `cosine`; `jax.nn.sigmoid` of it is the probability of
      relevance.

    Raises:
      ValueError: shapes that do not match, an unknown `kind`, or concrete cosines further than
        0.001 outside of [-1, 1].
      TypeError: cosines or parameters that are not floating point.

    Use it before a threshold that all queries share, `jaxref.metrics.threshold_at_recall`. "linear"
    is Platt scaling with parameters of each query; "power" has the most freedom.

    Cost: one pass over the cosines; two or three parameters a query.

    Example:
      >>> parameters = jnp.array([jnp.log(jnp.expm1(2.0)), -1.0])
      >>> print(monotone_score_map(jnp.array([1.0, 0.0]), parameters, kind="linear").round(3))
      [ 1. -1.]

    Reference: Rossi, Lin, Liu, Yang, Lee, Magnani, Liao, "Relevance Filtering for Embedding-based
    Retrieval", 2024, arXiv:2408.04887.
    """
    number = score_map_parameters(kind)
    check_floating(cosine=cosine, parameters=parameters)
    c = jnp.asarray(cosine).astype(compute_dtype(cosine, parameters))
    given = jnp.asarray(parameters).astype(c.dtype)
    if c.ndim < 1:
        raise ValueError(f"cosine must have shape [..., documents], got {c.shape}")
    if given.ndim < 1 or given.shape[-1] != number:
        raise ValueError(f"parameters must have shape [..., {number}], got {given.shape}")
    check_broadcastable(c.shape[:-1], **{"parameters without their last axis": given[..., 0]})
    if not isinstance(cosine, jax.core.Tracer):
        outside = np.abs(np.asarray(c)) > 1 + 1e-3
        if outside.any():
            raise ValueError(f"cosine must be in [-1, 1], got {np.asarray(c)[outside][:8]}")
    raw_slope, offset, *raw_power = (given[..., i, None] for i in range(number))
    slope, *power = (jax.nn.softplus(x) + _POSITIVE for x in (raw_slope, *raw_power))
    u = jnp.clip((1 + c) / 2, _POSITIVE, 1)  # where √u and u^p have gradients that are finite
    _, shape = _MAPS[kind]
    return (slope * shape(c, u, *power) + offset).astype(jnp.result_type(cosine))


def relevance_filter_loss(
    cosine: ArrayLike,
    parameters: ArrayLike,
    relevance: ArrayLike,
    *,
    kind: str = "power",
    where: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropy of the relevance that `monotone_score_map` sees in each document.

        L = -y log sigmoid(z) - (1 - y) log sigmoid(-z),   z = map(c; θ)

    Args:
      cosine: c `[..., documents]` floating point, of a query with its documents. The encoders that
        it is from are trained already; their gradient is not stopped here.
      parameters: θ of each query, as for `monotone_score_map`.
      relevance: y `[..., documents]` in [0, 1]: labels, or grades brought to that range.
      kind: as for `monotone_score_map`.
      where: boolean, broadcastable to `cosine`: the documents that have a label. The others have
        loss 0. Default: all.

    Returns:
      `[..., documents]` losses in the type of `cosine`, in nats.

    Raises:
      ValueError: shapes that do not match, an unknown `kind`, a concrete relevance outside of
        [0, 1], or such cosines far outside of [-1, 1].
      TypeError: cosines or parameters that are not floating point.

    Use it to train a `jaxref.nn.CosineAdapter` on labelled pairs behind encoders that stay as they
    are; losses of retrieval, such as `mann_whitney_loss`, train the encoders.

    Cost: one pass over the cosines; encoders that stay as they are need no gradient.

    Example:
      >>> cosine, parameters = jnp.array([0.9, 0.1]), jnp.array([3.0, -2.0, 0.5])
      >>> print(relevance_filter_loss(cosine, parameters, jnp.array([1, 0])).round(2))
      [0.34 0.56]

    Reference: Rossi, Lin, Liu, Yang, Lee, Magnani, Liao, "Relevance Filtering for Embedding-based
    Retrieval", 2024, arXiv:2408.04887.
    """
    check_shape(jnp.shape(cosine), relevance=relevance)
    check_broadcastable(jnp.shape(cosine), where=where)
    if where is not None:
        cosine, relevance = (jnp.where(where, x, 0) for x in (cosine, relevance))
    check_interval(0, 1, relevance=relevance)
    logits = monotone_score_map(cosine, parameters, kind=kind)
    return binary_cross_entropy(logits, relevance, where=where)


def score_map_parameters(kind: str) -> int:
    """How many parameters a kind of `monotone_score_map` has.

    >>> score_map_parameters("power")
    3
    """
    if kind not in _MAPS:
        raise ValueError(f"kind must be one of {sorted(_MAPS)}, got {kind!r}")
    return _MAPS[kind][0]
