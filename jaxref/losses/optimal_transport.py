"""Optimal transport between clouds of points, with entropy: the Sinkhorn divergence.

Every function sees clouds `[points, features]` as one set and moves mass at the cost

    C(x, y) = ||x - y||² / 2

Potentials are kept in the log domain. Gradients are those of the optimum by the envelope theorem:
no iteration is differentiated, but for one last step, and second derivatives are not to be trusted.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.core.vectors import squared_distances


class EntropicTransport(NamedTuple):
    """What moving one cloud onto another costs.

    Attributes:
      cost: OT_ε, a scalar.
      potential_x: f `[n]`, what a unit of mass at each point of x costs.
      potential_y: g `[m]`, likewise of y; cost = Σ a f + Σ b g.
    """

    cost: Array
    potential_x: Array
    potential_y: Array


def entropic_optimal_transport(
    x: ArrayLike,
    y: ArrayLike,
    *,
    epsilon: float,
    iterations: int = 100,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> EntropicTransport:
    r"""The cost of moving one cloud of points onto another, with entropy (a loss of the set).

        OT_ε = min_π Σ π_ij C_ij + ε KL(π || a ⊗ b) = max_{f,g} Σ_i a_i f_i + Σ_j b_j g_j

    over plans π whose sums are the weights a and b, C_ij = ||x_i - y_j||² / 2. At the optimum

        f_i = -ε log Σ_j b_j exp((g_j - C_ij) / ε)

    and likewise g. The iterations start at an ε of the size of the costs and bring it down.

    Args:
      x: `[n, features]` floating point.
      y: `[m, features]`.
      epsilon: ε above 0, in the unit of C: the square of the distance below which points blur.
      iterations: at least 1, half of them at ε itself. Default 100. The potentials are those of the
        last one; more are needed the smaller ε is beside C.
      weights_x: a `[n]` at least 0, scaled to the sum 1. Default: all alike.
      weights_y: b `[m]`, likewise.
      axis_name: name or names of the mapped axes over whose shards both clouds are spread; each
        shard computes the rows of its own points.

    Returns:
      An `EntropicTransport` in the type of `x`, the potentials without gradient.

    Raises:
      ValueError: no point, shapes that do not match, negative or all-zero weights, or an `epsilon`
        or `iterations` out of range.
      TypeError: points or weights that are not floating point.

    Use it for the transport itself. As a distance it is biased: it is not 0 between equal clouds,
    and least for one that is shrunk; `sinkhorn_divergence` takes that away. For other costs, or
    clouds too large for their matrix of costs, take ott-jax.

    Cost: O(iterations·(n + m)²) time, O((n + m)²) memory: of costs between and within clouds.
    Gradients go through the last iteration only.

    Example:
      >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [2.0]])
      >>> transport = jax.jit(lambda x, y: entropic_optimal_transport(x, y, epsilon=0.01))
      >>> print(transport(x, y).cost.round(3))
      0.507

    Reference: Lee, Jeon, Kang, Park, "Feature-aligned N-BEATS with Sinkhorn divergence", 2023,
    arXiv:2305.15196, after Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal
    Transport", 2013, arXiv:1306.0895.
    """
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)
    pairs = ((0, 1), (1, 0))
    costs, potentials = _between_clouds(
        x, y, weights_x, weights_y, epsilon, iterations, axis_name, pairs
    )
    found = costs[0, 1], potentials[0, 1], potentials[1, 0]
    return EntropicTransport(*(value.astype(jnp.result_type(x)) for value in found))


def sinkhorn_divergence(
    x: ArrayLike,
    y: ArrayLike,
    *,
    blur: float = 0.05,
    iterations: int = 100,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far two clouds of points are apart: optimal transport without entropy's bias (a loss of
    the set).

        S = OT_ε(x, y) - OT_ε(x, x) / 2 - OT_ε(y, y) / 2,   ε = blur²

    with OT_ε that of `entropic_optimal_transport`. At least 0 and symmetric, and 0 for equal clouds
    alone. blur → 0 is half the squared Wasserstein-2 distance, blur → ∞ half the squared distance
    of the means; a cloud and its translate by v are |v|² / 2 apart at any blur.

    Args:
      x: `[n, features]` floating point.
      y: `[m, features]`.
      blur: above 0, in the points' unit: the distance below which detail does not count. Default
        0.05, geomloss's and the paper's.
      iterations: at least 1. Default 100; a smaller blur beside the clouds' diameter needs more.
      weights_x: a `[n]` at least 0, scaled to the sum 1. Default: all alike.
      weights_y: b `[m]`, likewise.
      axis_name: name or names of the mapped axes over whose shards both clouds are spread; each
        shard computes the rows of its own points.

    Returns:
      A scalar in the type of `x`, in the square of the points' unit. It may be below 0 by the
      solver's tolerance.

    Raises:
      ValueError: no point, shapes that do not match, negative or all-zero weights, or a `blur` or
        `iterations` out of range.
      TypeError: points or weights that are not floating point.

    Use it to pull two samples together, point by point: its gradient keeps its size however far
    apart they are. `stack_alignment_loss` takes several samples and layers at once.

    Cost: O(iterations·(n + m)²) time, O((n + m)²) memory, for all three transports. Gradients go
    through the last iteration only.

    Example:
      >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> print(jax.jit(sinkhorn_divergence)(x, x + jnp.array([3.0, 4.0])).round(3))
      12.5

    Reference: Lee, Jeon, Kang, Park, "Feature-aligned N-BEATS with Sinkhorn divergence", 2023,
    arXiv:2305.15196; the divergence is of Feydy, Séjourné, Vialard, Amari, Trouvé, Peyré,
    "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", 2018,
    arXiv:1810.08278.
    """
    check_interval(0, jnp.inf, closed="right", blur=blur)
    pairs = ((0, 0), (0, 1), (1, 0), (1, 1))
    costs, _ = _between_clouds(x, y, weights_x, weights_y, blur**2, iterations, axis_name, pairs)
    divergence = costs[0, 1] - costs[0, 0] / 2 - costs[1, 1] / 2
    return divergence.astype(jnp.result_type(x))


def stack_alignment_loss(
    features_by_stack: Sequence[ArrayLike],
    domain_ids: ArrayLike,
    *,
    num_domains: int | None = None,
    normalizer: Literal["softmax", "tanh", "identity"] = "softmax",
    blur: float = 0.05,
    iterations: int = 100,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far the features of several domains are apart, layer by layer (a loss of the set).

        L = Σ_m max(0, max_{i<j} S(σ(F_m^i), σ(F_m^j)))

    with F_m^i the features that the stack m of a model has of the examples of domain i, σ the
    normalizer over features, and S the `sinkhorn_divergence`.

    Args:
      features_by_stack: for each stack `[batch, ..., features]` floating point; axes between the
        two hold further samples of an example's domain, such as channels.
      domain_ids: integer `[batch]` in [0, num_domains). Another id makes the loss NaN.
      num_domains: number of domains. Default: one more than the greatest id, which then must not be
        traced. Domains without examples are left out.
      normalizer: σ: "softmax" (the default), "tanh", or "identity".
      blur, iterations: of the divergence.
      axis_name: name or names of the mapped axes over whose shards the batch is spread.

    Returns:
      A scalar in the type of the features; 0 where there are fewer than two domains.

    Raises:
      ValueError: no stack, shapes that do not match, an unknown `normalizer`, traced ids without
        `num_domains`, or a `blur` or `iterations` out of range.
      TypeError: features that are not floating point, or ids not integers.

    Use it times λ, from 0.3 to 1, beside the loss of a forecast, or of any model with layers whose
    features are to be the same in each domain. `jaxref.models.NBEATS.forecast_with_features` gives
    the features. The authors let it train the layers before the features alone;
    `sinkhorn_divergence` takes two samples of one layer.

    Cost: O(iterations·domains²·n²) time for each stack of n vectors of features; the memory of
    their n² costs, for all stacks at once.

    Example:
      >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
      >>> loss = jax.jit(lambda x, ids: stack_alignment_loss([x], ids, num_domains=2))
      >>> print(loss(features, jnp.array([0, 1, 0, 1])).round(4))
      0.2136

    Reference: Lee, Jeon, Kang, Park, "Feature-aligned N-BEATS with Sinkhorn divergence", 2023,
    arXiv:2305.15196.
    """
    check_interval(0, jnp.inf, closed="right", blur=blur)
    check_interval(1, jnp.inf, iterations=iterations)
    domain = jnp.asarray(domain_ids)
    if not jnp.issubdtype(domain.dtype, jnp.integer):
        raise TypeError(f"domain_ids must be integers, got {domain.dtype.name}")
    if domain.ndim != 1:
        raise ValueError(f"domain_ids must have shape [batch], got {domain.shape}")
    if num_domains is None:
        if isinstance(domain_ids, jax.core.Tracer):
            raise ValueError("num_domains must be given where domain_ids are traced, got None")
        num_domains = int(np.max(np.asarray(domain_ids), initial=-1)) + 1
    if normalizer not in _NORMALIZERS:
        raise ValueError(f"normalizer must be one of {sorted(_NORMALIZERS)}, got {normalizer!r}")
    if len(features_by_stack) == 0:
        raise ValueError("features_by_stack must have at least one stack, got none")
    result = jnp.result_type(*features_by_stack)
    rows: list[Array] = []
    shape = jnp.shape(features_by_stack[0])
    for features in features_by_stack:
        check_floating(features_by_stack=features)
        if jnp.ndim(features) < 2:
            raise ValueError(
                "features_by_stack must have shape [batch, ..., features], got "
                f"{jnp.shape(features)}"
            )
        check_shape((*domain.shape, *shape[1:-1], jnp.shape(features)[-1]), features=features)
        wide = jnp.asarray(features).astype(compute_dtype(features))
        normalized = _NORMALIZERS[normalizer](wide)
        rows.append(normalized.reshape(-1, normalized.shape[-1]))
    if num_domains < 2 or rows[0].shape[0] == 0:
        return jnp.zeros((), result)
    domain = jnp.repeat(domain, rows[0].shape[0] // len(domain))
    members = domain == jnp.arange(num_domains)[:, None]
    counts = sum_over_shards(jnp.sum(members, axis=1), axis_name)
    weights = list(members / jnp.maximum(counts, 1)[:, None])
    every = [all_shards(x, axis_name) for x in rows]
    costs = jnp.stack([_costs(x, all_x) for x, all_x in zip(rows, every)])
    bounds = jnp.stack([_cost_bound(all_x) for all_x in every])

    def divergences(costs: Array, bound: Array) -> Array:
        pairs = itertools.product(range(num_domains), range(num_domains))
        matrices = dict.fromkeys(pairs, costs)  # each domain is all, weighted by its own
        found, _ = _transport(matrices, bound, weights, blur**2, iterations, axis_name)
        total = jnp.stack(list(found.values())).reshape(num_domains, num_domains)
        alone = jnp.diagonal(total) / 2
        return total - alone[:, None] - alone

    between = jax.vmap(divergences)(costs, bounds)
    is_pair = (counts[:, None] > 0) & (counts > 0) & np.triu(np.ones((num_domains,) * 2, bool), 1)
    loss = jnp.sum(jnp.max(between, axis=(1, 2), initial=0.0, where=is_pair))
    strangers = sum_over_shards(jnp.sum(~members.any(axis=0)), axis_name)
    return jnp.where(strangers > 0, jnp.nan, loss).astype(result)


_ByPair = dict[tuple[int, int], Array]

_MOMENTUM = 0.8
"""With it 100 steps come closer to the optimum than 100 of both potentials in turn, by far."""

_NORMALIZERS = {"softmax": jax.nn.softmax, "tanh": jnp.tanh, "identity": lambda x: x}


def _between_clouds(
    x: ArrayLike,
    y: ArrayLike,
    weights_x: ArrayLike | None,
    weights_y: ArrayLike | None,
    epsilon: float,
    iterations: int,
    axis_name: AxisName | None,
    pairs: Iterable[tuple[int, int]],
) -> tuple[_ByPair, _ByPair]:
    """`_transport` of pairs of two clouds, set 0 and set 1, after the checks of both."""
    check_floating(x=x, y=y)
    check_interval(1, jnp.inf, iterations=iterations)
    if jnp.ndim(x) != 2 or jnp.ndim(y) != 2:
        raise ValueError(
            f"x and y must have shape [points, features], got {jnp.shape(x)} and {jnp.shape(y)}"
        )
    dtype = compute_dtype(x, y)
    clouds = [jnp.asarray(points).astype(dtype) for points in (x, y)]
    check_shape((len(clouds[1]), clouds[0].shape[1]), y=y)
    weights = []
    for cloud, given, name in zip(clouds, (weights_x, weights_y), ("x", "y")):
        if len(cloud) == 0:
            raise ValueError(f"{name} must have at least one point, got shape {cloud.shape}")
        share = jnp.ones(len(cloud), dtype)
        if given is not None:
            name = f"weights_{name}"
            named: dict[str, Any] = {name: given}
            check_floating(**named)
            check_shape(share.shape, **named)
            check_interval(0, jnp.inf, **named)
            share = jnp.asarray(given).astype(dtype)
        total = sum_over_shards(jnp.sum(share), axis_name)
        check_interval(0, jnp.inf, closed="right", **{f"the sum of {name}": total})
        weights.append(share / total)
    every = [all_shards(cloud, axis_name) for cloud in clouds]
    costs = {(i, j): _costs(clouds[i], every[j]) for i, j in pairs}
    bound = _cost_bound(jnp.concatenate(every))
    return _transport(costs, bound, weights, epsilon, iterations, axis_name)


def _costs(points: Array, every: Array) -> Array:
    """C between this shard's points and those of all."""
    # from their centre, as squares of far coordinates would drown the differences
    centre = jax.lax.stop_gradient(jnp.mean(every, axis=0))
    return squared_distances(points - centre, every - centre) / 2


def _cost_bound(points: Array) -> Array:
    """What no C between the points is above."""
    points = jax.lax.stop_gradient(points)
    return 2 * jnp.max(jnp.sum(jnp.square(points - jnp.mean(points, axis=0)), axis=-1))


def _transport(
    costs: _ByPair,
    bound: Array,
    weights: Sequence[Array],
    epsilon: float,
    iterations: int,
    axis_name: AxisName | None,
) -> tuple[_ByPair, _ByPair]:
    """OT_ε between the two sets of each pair, and the potentials of this shard's points of the
    first against the second, without gradient.

    `costs[i, j]` are those between this shard's points of set i and all points of set j; with a
    pair there is its reverse. `weights` are those of this shard's points. Both potentials of a pair
    move at a time, half of the way, so that nothing depends on the order of the sets; momentum
    makes up for the half steps, and more.
    """
    masses = [all_shards(weight, axis_name) for weight in weights]

    def transform(
        potentials: _ByPair,
        costs: _ByPair,
        masses: Sequence[Array],
        epsilon: Array | float,
        *,
        last: bool = False,
    ) -> _ByPair:
        """-ε log Σ_y b_y exp((g_y - C_xy) / ε) for each point x of the first set of a pair."""
        every = jax.tree.map(lambda own: all_shards(own, axis_name), potentials)
        return {
            (i, j): -epsilon * _log_mean_exp((every[j, i] - cost) / epsilon, masses[j], last)
            for (i, j), cost in costs.items()
        }

    fixed, still = jax.lax.stop_gradient((costs, masses))
    left = np.maximum(0, 1 - 2 * np.arange(iterations) / iterations)
    epsilons = epsilon * jnp.maximum(bound / epsilon, 1) ** left.astype(bound.dtype)

    def step(
        state: tuple[_ByPair, _ByPair], epsilon: Array
    ) -> tuple[tuple[_ByPair, _ByPair], None]:
        potentials, before = state
        ahead = jax.tree.map(lambda p, b: p + _MOMENTUM * (p - b), potentials, before)
        moved = transform(ahead, fixed, still, epsilon)
        return (jax.tree.map(lambda a, m: (a + m) / 2, ahead, moved), potentials), None

    # 0, of the costs, so that under shard_map it varies from shard to shard as they do
    start = jax.tree.map(lambda matrix: 0 * matrix[:, 0], fixed)
    potentials = jax.lax.stop_gradient(jax.lax.scan(step, (start, start), epsilons)[0][0])
    moved = transform(potentials, costs, masses, epsilon, last=True)
    means = {pair: jnp.sum(weights[pair[0]] * (potentials[pair] + moved[pair])) for pair in costs}
    means = sum_over_shards(means, axis_name)
    return {(i, j): (means[i, j] + means[j, i]) / 2 for i, j in costs}, potentials


def _log_mean_exp(scores: Array, weights: Array, exactly: bool) -> Array:
    """log Σ_y b_y exp(scores_xy) for weights b of the sum 1; 0 where all of them are 0.

    `exactly` is to relative precision where scores are nearly all the same, too.
    """
    counted = weights > 0
    exists = counted.any()
    excluded = jnp.where(counted | ~exists, 0.0, -jnp.inf)
    log_weights = jnp.log(jnp.where(counted, weights, 1.0)) + excluded
    result = jnp.where(exists, jax.nn.logsumexp(scores + log_weights, axis=-1), 0.0)
    if not exactly:
        return result
    highest = jax.lax.stop_gradient(jnp.max(scores + excluded, axis=-1))
    below = jnp.where(counted, scores - highest[..., None], 0.0)
    lack = jnp.sum(weights * jnp.expm1(below), axis=-1)
    is_small = exists & (lack > -0.5)
    return jnp.where(is_small, highest + jnp.log1p(jnp.where(is_small, lack, 0.0)), result)
