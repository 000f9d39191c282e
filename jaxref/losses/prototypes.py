"""Few-shot losses on distances: to the prototypes of the classes, and to the nearest neighbours."""

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
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.core.vectors import squared_distances


def proto_triplet_loss(
    queries: ArrayLike,
    query_labels: ArrayLike,
    prototypes: ArrayLike,
    prototype_labels: ArrayLike,
    *,
    margin: float = 0.5,
    where: ArrayLike | None = None,
) -> Array:
    r"""How much nearer a query has to come to the prototype of its class than to any other
    (Proto-Triplet).

        L = max(0, δ(q, P_y) - min_{c≠y} δ(q, P_c) + m),   m = margin

    with δ² the squared distance plus 1e-6.

    Args:
      queries: q `[queries, features]` floating point.
      query_labels: y, integers `[queries]`. One without prototype gives NaN for its query.
      prototypes: P `[prototypes, features]` floating point, as of
        `jaxref.adaptation.class_prototypes`. With several of one class, the farthest of the query's
        own counts.
      prototype_labels: integers `[prototypes]`.
      margin: m at least 0. Default 0.5.
      where: boolean, broadcastable to `[queries, prototypes]`: the prototypes that exist for a
        query; one without any has loss 0. Default: all.

    Returns:
      `[queries]` losses in the type of `queries`; 0 where there is no other class.

    Raises:
      ValueError: shapes that do not match, or a negative `margin`.
      TypeError: queries or prototypes that are not floating point, or labels that are not integer.

    Use it beside the cross-entropy of a prototypical network, which is content with a small
    difference; `icnn_loss` looks at neighbours in place of prototypes.

    Cost: distances of all queries to all prototypes, one matrix product.

    Example:
      >>> queries, prototypes = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0], [1.25, 0.0]])
      >>> loss = proto_triplet_loss(queries, jnp.array([0]), prototypes, jnp.array([0, 1]))
      >>> print(loss.round(3))
      [0.25]

    Reference: Mendez-Ruiz et al., "SuSana Distancia is all you need: Enforcing class separability
    in metric learning via two novel distance-based loss functions for few-shot image
    classification", 2023, arXiv:2305.09062.
    """
    check_interval(0, jnp.inf, margin=margin)
    q, labels = _checked_points(queries=queries, query_labels=query_labels)
    p, others = _checked_points(prototypes=prototypes, prototype_labels=prototype_labels)
    check_shape((len(p), q.shape[1]), prototypes=p)
    check_broadcastable((len(q), len(p)), where=where)
    distances = _distances(q, p)
    is_own, is_other = labels[:, None] == others, labels[:, None] != others
    if where is not None:
        is_own, is_other = is_own & where, is_other & where
    own = jnp.max(distances, axis=1, where=is_own, initial=0.0)
    nearest = jnp.min(distances, axis=1, where=is_other, initial=jnp.inf)
    has_other = is_other.any(axis=1)
    losses = jax.nn.relu(own - jnp.where(has_other, nearest, 0.0) + margin)
    losses = jnp.where(has_other, losses, 0.0)
    is_lost = ~is_own.any(axis=1) if where is None else ~is_own.any(axis=1) & has_other
    return jnp.where(is_lost, jnp.nan, losses).astype(jnp.result_type(queries))


def icnn_score(
    origin: ArrayLike,
    origin_labels: ArrayLike,
    target: ArrayLike | None = None,
    target_labels: ArrayLike | None = None,
    *,
    k: int = 4,
    num_neighbors: int | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How well the nearest neighbours of points part their classes (ICNN; of the set).

    Of each point the nearest target is left out, which is the point itself within one set, and of
    the n next ones d_1 ≤ ... ≤ d_n are the distances, root of the squared distance plus 1e-6:

        a_j = d_j / nearest d of another class, over max(1, the largest of the first k of them)
        A = mean of a_j over neighbours of the same class,  B = mean of d_j / D over those of others
        λ = (1 - mean A + mean B) / 2,   γ = share of the same class
        score = (λ + γ) / 2

    with neighbours j ≤ k, D the largest distance to one of another class, and means over the points
    that have such a neighbour. a_j is 0 without any other class among the n, and mean B is 1 where
    no point has one among the k.

    Args:
      origin: `[points, features]` floating point.
      origin_labels: integers `[points]`, the classes.
      target: `[targets, features]` floating point, at least 3: where neighbours are looked for.
        Default: the points themselves.
      target_labels: integers `[targets]`, with `target`.
      k: at least 1. Default 4; with fewer targets, two less than there are, and then γ is 1.
      num_neighbors: n at least k, as the number of examples of a class. Default: k + 1.
      axis_name: name or names of the mapped axes over whose shards points and targets are spread.
        Not needed under jit with shardings.

    Returns:
      A scalar in the type of `origin`, near 1 where classes are far from each other, and small
      where neighbours are of other classes; 1 for no point.

    Raises:
      ValueError: shapes that do not match, too few targets, or `k` or `num_neighbors` too small.
      TypeError: points that are not floating point, or labels that are not integer.

    Use it to see how difficult a support set is, or, as `icnn_loss`, to train; it has a gradient
    through the distances, and none through the choice of neighbours. A rotation, shift or stretch
    of the space does not change it.

    Cost: distances of all points to all targets, O(points·targets) memory; a selection of the n + 1
    nearest of each point.

    Example:
      >>> points = jnp.array([[0.0, 0], [0, 1], [1, 0], [9, 9], [9, 8], [8, 9]])
      >>> print(icnn_score(points, jnp.array([0, 0, 0, 1, 1, 1]), k=2).round(3))
      0.975

    Reference: Mendez-Ruiz et al., "SuSana Distancia is all you need: Enforcing class separability
    in metric learning via two novel distance-based loss functions for few-shot image
    classification", 2023, arXiv:2305.09062.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    x, labels = _checked_points(origin=origin, origin_labels=origin_labels)
    if target is None:
        targets, their_labels = x, labels
    elif target_labels is None:
        raise ValueError("target_labels must be given with target")
    else:
        targets, their_labels = _checked_points(target=target, target_labels=target_labels)
        check_shape((len(targets), x.shape[1]), target=targets)
    targets, their_labels = (all_shards(a, axis_name) for a in (targets, their_labels))
    if len(targets) < 3:
        raise ValueError(f"target must have at least 3 points, got {len(targets)}")
    has_all = k + 2 >= len(targets)
    k = min(k, len(targets) - 2)
    if num_neighbors is not None and (not isinstance(num_neighbors, int) or num_neighbors < k):
        raise ValueError(f"num_neighbors must be an integer of at least {k}, got {num_neighbors!r}")
    n = min(num_neighbors or k + 1, len(targets) - 1)

    distances = _distances(x, targets)
    if target is None:  # first of its neighbours, whatever rounding says
        start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(x)
        is_self = jnp.arange(len(x))[:, None] + start == jnp.arange(len(targets))
        distances = jnp.where(is_self, 0.0, distances)
    nearest, index = jax.lax.top_k(-distances, n + 1)
    d, is_same = -nearest[:, 1:], labels[:, None] == their_labels[index[:, 1:]]
    other = jnp.min(d, axis=1, where=~is_same, initial=jnp.inf, keepdims=True)
    has_other = ~is_same.all(axis=1, keepdims=True)
    ratio = jnp.where(has_other, d / (jnp.where(has_other, other, 1.0) + 1e-7), 0.0)
    d, is_same, ratio = d[:, :k], is_same[:, :k], ratio[:, :k]
    ratio = ratio / jnp.maximum(jnp.max(ratio, axis=1, keepdims=True), 1.0)
    largest = jnp.max(d, where=~is_same, initial=0.0)
    if axis_name is not None:
        largest = jnp.max(all_shards(largest[None], axis_name))
    scaled = d / (largest + 1e-7)

    def mean_of(values: Array, chosen: Array) -> tuple[Array, Array]:
        """Over points of the mean over chosen neighbours, and the number of points with any."""
        number = jnp.sum(chosen, axis=1)
        means = jnp.sum(values, axis=1, where=chosen) / jnp.maximum(number, 1)
        sums = jnp.sum(means), jnp.sum(number > 0, dtype=d.dtype)
        total, points = sum_over_shards(sums, axis_name)
        return total / jnp.maximum(points, 1), points

    same, _ = mean_of(ratio, is_same)
    different, points = mean_of(scaled, ~is_same)
    lambda_ = (1 - same + jnp.where(points > 0, different, 1.0)) / 2
    gamma, _ = mean_of(is_same.astype(d.dtype), jnp.ones_like(is_same))
    if has_all or d.size == 0:
        gamma = jnp.ones_like(gamma)
    return ((lambda_ + gamma) / 2).astype(jnp.result_type(origin))


def icnn_loss(
    origin: ArrayLike,
    origin_labels: ArrayLike,
    target: ArrayLike | None = None,
    target_labels: ArrayLike | None = None,
    *,
    k: int = 4,
    num_neighbors: int | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How badly the nearest neighbours of points part their classes (ICNN; a loss of the set).

        L = -log score

    Args:
      origin, origin_labels, target, target_labels, k, num_neighbors, axis_name: as for
        `icnn_score`.

    Returns:
      A scalar in the type of `origin`, at least 0 up to rounding; at most -log 1e-6.

    Raises:
      As `icnn_score`.

    Use it on the support set, on queries against it, or on both together, which does best, with as
    many neighbours as a class has examples; averaged with the cross-entropy of the episode and
    with `proto_triplet_loss`.

    Cost: that of `icnn_score`: the distances of all points to all targets, and a selection of the
    nearest.

    Example:
      >>> points = jnp.array([[0.0, 0], [0, 1], [1, 0], [9, 9], [9, 8], [8, 9]])
      >>> print(icnn_loss(points, jnp.array([0, 0, 0, 1, 1, 1]), k=2).round(3))
      0.026

    Reference: Mendez-Ruiz et al., "SuSana Distancia is all you need: Enforcing class separability
    in metric learning via two novel distance-based loss functions for few-shot image
    classification", 2023, arXiv:2305.09062.
    """
    wide = jnp.asarray(origin)
    wide = wide.astype(compute_dtype(wide)) if jnp.issubdtype(wide.dtype, jnp.floating) else wide
    score = icnn_score(
        wide,
        origin_labels,
        target,
        target_labels,
        k=k,
        num_neighbors=num_neighbors,
        axis_name=axis_name,
    )
    return -jnp.log(jnp.maximum(score, 1e-6)).astype(jnp.result_type(origin))


def _checked_points(**arguments: ArrayLike) -> tuple[Array, Array]:
    """Points `[n, features]` in the type to compute in, and their labels."""
    (name, points), (_, labels) = arguments.items()
    check_floating(**{name: points})
    x, y = jnp.asarray(points), jnp.asarray(labels)
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape [points, features], got {x.shape}")
    labels_name = list(arguments)[1]
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"{labels_name} must be integer ids, got {y.dtype.name}")
    check_shape(x.shape[:1], **{labels_name: y})
    return x.astype(compute_dtype(x)), y


def _distances(x: Array, y: Array) -> Array:
    """√(|x_i - y_j|² + 1e-6), from a common centre: the further away it is, the more is lost."""
    centre = jax.lax.stop_gradient(jnp.mean(y, axis=0)) if len(y) else 0.0
    return jnp.sqrt(squared_distances(x - centre, y - centre) + 1e-6)
