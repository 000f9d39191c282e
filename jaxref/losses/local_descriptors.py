"""Descriptors of the places of an image: which of two images belong together, and a loss on them.

Descriptors are compared at length 1. A single tuple of images goes in: `jax.vmap` takes several.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import squared_distances, unit_vectors


def match_local_descriptors(
    query: ArrayLike,
    positive: ArrayLike,
    attention: ArrayLike | None = None,
    *,
    lowe_ratio: float = 0.9,
    top_fraction: float = 0.5,
) -> tuple[Array, Array]:
    r"""Which descriptors of two images of the same thing show the same place (without gradient).

    A descriptor p of the positive image matches q, its nearest of the query image, where

        p is the nearest of q in turn,
        |p - q| ≤ ratio · |p - q'|, with q' the second nearest of the query image, and
        p is in the given fraction of largest attention.

    Args:
      query: `[places, features]` floating point, at least one place.
      positive: `[places', features]` floating point.
      attention: `[places']` floating point. Default: Σ |p| over the features.
      lowe_ratio: in (0, 1]. Default 0.9.
      top_fraction: in [0, 1], of the places', rounded down. Default 0.5.

    Returns:
      `[places']` int32, the nearest query descriptor of each positive one, and `[places']`
      booleans, whether the two match.

    Raises:
      ValueError: shapes that do not match, no place, or a number out of its range.
      TypeError: descriptors or attention that are not floating point.

    Use it to find the pairs of `attentive_local_triplet_loss`, or to show what a model recognises.

    Cost: the distances of all places · places' pairs, in time and memory, and a top-k over the
    attention.

    Example:
      >>> descriptors = jnp.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
      >>> places, matched = match_local_descriptors(descriptors, descriptors[::-1])
      >>> print(places, matched)
      [2 1 0] [ True False False]

    Reference: Zhu, Gao, Ke, Qiao, Sun, "Coarse-to-Fine: Learning Compact Discriminative
    Representation for Single-Stage Image Retrieval", 2023, arXiv:2308.04008.
    """
    check_interval(0, 1, closed="right", lowe_ratio=lowe_ratio)
    check_interval(0, 1, top_fraction=top_fraction)
    q, p = jax.lax.stop_gradient(_descriptors(query=query, positive=positive))
    if attention is None:
        attention = jnp.sum(jnp.abs(p), axis=1)
    check_floating(attention=attention)
    check_shape(p.shape[:1], attention=attention)
    squares = squared_distances(unit_vectors(q), unit_vectors(p))
    nearest, column = jnp.argmin(squares, axis=0), jnp.arange(len(p))
    is_mutual = jnp.argmin(squares, axis=1)[nearest] == column
    first = squares[nearest, column]
    second = jnp.min(squares.at[nearest, column].set(jnp.inf), axis=0)
    is_distinct = (first <= lowe_ratio**2 * second) & (second > 0)
    _, attended = jax.lax.top_k(jnp.asarray(attention), int(top_fraction * len(p)))
    is_attended = jnp.zeros(len(p), bool).at[attended].set(True)
    return nearest.astype(jnp.int32), is_mutual & is_distinct & is_attended


def attentive_local_triplet_loss(
    query: ArrayLike,
    positive: ArrayLike,
    negatives: ArrayLike,
    attention: ArrayLike | None = None,
    *,
    margin: float = 0.1,
    lowe_ratio: float = 0.9,
    top_fraction: float = 0.5,
) -> Array:
    r"""Triplet loss of the matched places of a query and a positive image, against the most similar
    place of each negative image (a loss of the set).

        L = Σ over matches (q, p) and negatives of max(0, |q - p|² - |q - n|² + m),   m = margin

    with n the descriptor of the negative image that is nearest to q.

    Args:
      query: `[places, features]` floating point, at least one place: descriptors of an image.
      positive: `[places', features]` floating point: those of an image of the same thing.
      negatives: `[images, places'', features]` floating point: those of images of other things.
      attention: `[places']` floating point. Default: Σ |p| over the features.
      margin: m at least 0. Default 0.1.
      lowe_ratio, top_fraction: of the matches, see `match_local_descriptors`.

    Returns:
      A scalar in the type of `query`; 0 where nothing matches. The authors add it to the loss on
      whole images with weight 0.05.

    Raises:
      ValueError: shapes that do not match, no place, or a number out of its range.
      TypeError: descriptors or attention that are not floating point.

    Use it to train the features beneath a global descriptor once that separates whole images
    (`madacos_loss`), with negatives that it still takes for the query: places of the same thing
    then agree, and nothing local has to be stored for retrieval.

    Cost: the distances of all pairs of places' with `places` and with the places'' of each negative
    image, all of these in memory at once.

    Example:
      >>> query = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> negatives = jnp.array([[[0.8, 0.6]], [[-1.0, 0.0]]])
      >>> print(attentive_local_triplet_loss(query, query, negatives, margin=0.5).round(3))
      0.1

    Reference: Zhu, Gao, Ke, Qiao, Sun, "Coarse-to-Fine: Learning Compact Discriminative
    Representation for Single-Stage Image Retrieval", 2023, arXiv:2308.04008.
    """
    check_interval(0, jnp.inf, margin=margin)
    check_floating(negatives=negatives)
    q, p = _descriptors(query=query, positive=positive)
    others = jnp.asarray(negatives).astype(q.dtype)
    if others.ndim != 3 or others.shape[1] == 0:
        raise ValueError(
            f"negatives must have shape [images, places, features], at least one place, "
            f"got {others.shape}"
        )
    check_shape((*others.shape[:2], q.shape[1]), negatives=others)
    places, is_match = match_local_descriptors(
        query, positive, attention, lowe_ratio=lowe_ratio, top_fraction=top_fraction
    )
    q, p, others = unit_vectors(q)[places], unit_vectors(p), unit_vectors(others)

    def of_image(descriptors: Array) -> Array:
        squares = squared_distances(*jax.lax.stop_gradient((q, descriptors)))
        nearest = descriptors[jnp.argmin(squares, axis=1)]
        excess = jnp.sum(jnp.square(q - p), axis=1) - jnp.sum(jnp.square(q - nearest), axis=1)
        return jnp.sum(jax.nn.relu(excess + margin), where=is_match)

    return jnp.sum(jax.vmap(of_image)(others)).astype(jnp.result_type(query))


def _descriptors(**arguments: ArrayLike) -> tuple[Array, Array]:
    """Two sets of descriptors of as many features, in the type to compute in."""
    check_floating(**arguments)
    dtype = compute_dtype(*arguments.values())
    for name, values in arguments.items():
        if jnp.ndim(values) != 2 or jnp.shape(values)[0] == 0:
            raise ValueError(
                f"{name} must have shape [places, features], at least one place, "
                f"got {jnp.shape(values)}"
            )
    first, second = (jnp.asarray(values).astype(dtype) for values in arguments.values())
    check_shape((len(second), first.shape[1]), **{list(arguments)[1]: second})
    return first, second
