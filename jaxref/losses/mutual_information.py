"""Dependence of pairs as an objective: critics that tell true pairs from mixed ones.

A critic is a function f(x, y) of one pair, without a batch axis, that returns a number; what it
learns, encoders of x and y included, it closes over.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.core.vectors import safe_sqrt

Critic = Callable[[Array, Array], Array]


def info_nce_bound(
    scores: ArrayLike, *, where: ArrayLike | None = None, axis_name: AxisName | None = None
) -> Array:
    r"""What a critic's scores of a batch show of the mutual information, at most log K (a metric of
    the set).

        I = mean_i (S_ii - log(1/K Σ_j exp S_ij)),   S_ij = f(x_i, y_j)

    of K pairs. Its expectation is no more than the mutual information and, for any critic, no more
    than log K: a batch cannot show more.

    Args:
      scores: S `[batch, K]` floating point, with the true pairs on the diagonal. K is the size of
        the batch, of all its shards with `axis_name`.
      where: boolean, broadcastable to `scores`: the candidates that count; a row without its
        diagonal entry counts for nothing. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the rows are spread.

    Returns:
      A scalar in the type of `scores`, in nats; 0 without rows.

    Raises:
      ValueError: scores that are not square.
      TypeError: scores that are not floating point.

    Use it where views share less than log K nats, or with its negative as a loss, contrastive
    predictive coding (CPC). With critics that are 1-Lipschitz it bounds the Wasserstein dependency,
    too: `wasserstein_predictive_coding_loss`.

    Cost: that of a softmax over each row; the K² scores take K² evaluations of the critic.

    Example:
      >>> print(jax.jit(info_nce_bound)(100 * jnp.eye(4)).round(4))  # log 4
      1.3863

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780; the bound is of van den Oord, Li, Vinyals,
    "Representation Learning with Contrastive Predictive Coding", 2018, arXiv:1807.03748.
    """
    s, own = _square_scores(scores, axis_name)
    check_broadcastable(s.shape, where=where)
    counts = jnp.broadcast_to(True if where is None else where, s.shape)
    anchors = jnp.any(own & counts, axis=1)
    losses = _losses_of_anchors(jnp.where(counts, s, 0.0), own, counts)
    bounds = jnp.log(jnp.maximum(jnp.sum(counts, axis=1), 1).astype(s.dtype)) - losses
    total, number = sum_over_shards(
        (jnp.sum(jnp.where(anchors, bounds, 0.0)), jnp.count_nonzero(anchors)), axis_name
    )
    return (total / jnp.maximum(number, 1)).astype(jnp.result_type(scores))


def wasserstein_dependency_bound(
    joint_scores: ArrayLike,
    product_scores: ArrayLike,
    *,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How much higher a critic scores true pairs than mixed ones (a metric of the set).

        I = mean f(x, y) - mean f(x', y')

    over pairs (x, y) of the joint distribution and (x', y') of the product of its marginals. For a
    1-Lipschitz critic it estimates a lower bound of the Wasserstein dependency measure, the
    distance of the two distributions, which the best such critic reaches.

    Args:
      joint_scores: f of true pairs, floating point of any shape.
      product_scores: f of mixed pairs, of any shape.
      axis_name: name or names of the mesh or vmap axes over whose shards both are spread.

    Returns:
      A scalar in the type of `joint_scores`, in the unit of the critic; the mean of no pairs is 0.

    Raises:
      TypeError: scores that are not floating point.

    Use it to train or to measure with; `wasserstein_predictive_coding_loss` is the paper's form
    with a softmax, `jaxref.analysis.exact_wasserstein_dependency` the value itself for small
    discrete distributions.

    Cost: one pass over the scores.

    Example:
      >>> print(wasserstein_dependency_bound(jnp.array([2.0, 1.0]), jnp.array([0.5, -0.5, 0.0])))
      1.5

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780.
    """
    check_floating(joint_scores=joint_scores, product_scores=product_scores)
    dtype = compute_dtype(joint_scores, product_scores)
    means = []
    for scores in (joint_scores, product_scores):
        wide = jnp.asarray(scores).astype(dtype)
        total, number = sum_over_shards((jnp.sum(wide), jnp.array(wide.size, dtype)), axis_name)
        means.append(total / jnp.maximum(number, 1))
    return (means[0] - means[1]).astype(jnp.result_type(joint_scores))


def bilinear_critic(x: ArrayLike, y: ArrayLike, weight: ArrayLike) -> Array:
    r"""The score of a pair of representations by a matrix.

        f(x, y) = xᵀ W y

    Args:
      x: `[..., n]` floating point.
      y: `[..., m]`, of which the leading axes broadcast with those of `x`.
      weight: W `[n, m]`.

    Returns:
      `[...]` scores in the common type of `x` and `y`.

    Raises:
      ValueError: shapes that do not match.
      TypeError: arguments that are not floating point.

    Use it as a critic, `lambda x, y: bilinear_critic(encode(x), encode(y), w)`. With W of spectral
    norm 1, as `jaxref.norms.spectral_normalization` makes it, and representations of length 1 it is
    Lipschitz with constant √2.

    Cost: n·m multiplications for each x, m for each pair with a y; n·m parameters.

    Example:
      >>> print(bilinear_critic(jnp.array([1.0, 2.0]), jnp.array([3.0]), jnp.ones((2, 1))))
      9.0

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780.
    """
    check_floating(x=x, y=y, weight=weight)
    if jnp.ndim(x) < 1 or jnp.ndim(y) < 1:
        raise ValueError(f"x and y must have features, got {jnp.shape(x)} and {jnp.shape(y)}")
    n, m = jnp.shape(x)[-1], jnp.shape(y)[-1]
    if jnp.shape(weight) != (n, m):
        raise ValueError(f"weight must have shape {(n, m)}, got {jnp.shape(weight)}")
    dtype = compute_dtype(x, y, weight)
    a, b, w = (jnp.asarray(v).astype(dtype) for v in (x, y, weight))
    image = jnp.matmul(a, w, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(image * b, axis=-1).astype(jnp.result_type(x, y))


def pairwise_gradient_penalty(
    critic: Critic,
    x: ArrayLike,
    y: ArrayLike,
    *,
    key: Array,
    target: float = 1.0,
    one_sided: bool = False,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far a critic's slope is from that of a 1-Lipschitz one, between true and mixed pairs.

        P_i = (‖∇f(p_i)‖ - g)²,   or max(0, ‖∇f(p_i)‖ - g)²,   g = target
        p_i = u_i (x_i, y_i) + (1 - u_i) (x_π(i), y_σ(i)),   u_i uniform in [0, 1]

    with random permutations π and σ, and ∇ with respect to x and y together.

    Args:
      critic: f of one x and one y, to a number.
      x: `[batch, ...]` floating point.
      y: `[batch, ...]` floating point, with as many rows, which belong to those of x.
      key: a random key; with `axis_name` the same for all shards.
      target: g at least 0. Default 1.
      one_sided: whether slopes below g are let be. Default: no, as in WGAN-GP.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread; pairs
        are mixed over all of it.

    Returns:
      `[batch]` penalties of at least 0 in the type of `x`; at a slope of 0 their gradient is 0.

    Raises:
      ValueError: shapes that do not match, a negative `target`, or a critic that does not return
        one number for a pair.
      TypeError: pairs that are not floating point.

    Use it with a weight of 10 or so, its mean added to a loss of the critic; encoders inside of the
    critic are penalised, too, which makes distances of raw inputs the metric. For matrices alone
    `jaxref.norms.spectral_normalization` is cheaper.

    Cost: a forward and a backward pass of the critic for each pair, and in training the gradient of
    both.

    Example:
      >>> x = jnp.array([[1.0], [2.0]])
      >>> flat = lambda x, y: x @ y * 0
      >>> penalty = jax.jit(lambda x, key: pairwise_gradient_penalty(flat, x, x, key=key))
      >>> print(penalty(x, jax.random.key(0)))
      [1. 1.]

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780, after Gulrajani, Ahmed, Arjovsky,
    Dumoulin, Courville, "Improved Training of Wasserstein GANs", 2017, arXiv:1704.00028.
    """
    check_interval(0, jnp.inf, target=target)
    pair = _checked_pairs(x, y)
    whole = [all_shards(v, axis_name) for v in pair]
    size, (*permutation_keys, mix_key) = len(whole[0]), jax.random.split(key, 3)
    u = jax.random.uniform(mix_key, (size,), jnp.float32)
    orders = [jax.random.permutation(k, size) for k in permutation_keys]
    if axis_name is not None:
        start = jax.lax.axis_index(axis_name) * len(pair[0])
        u, *orders = (jax.lax.dynamic_slice_in_dim(v, start, len(pair[0])) for v in (u, *orders))

    def between(own: Array, others: Array) -> Array:
        share = u.reshape((-1,) + (1,) * (own.ndim - 1)).astype(own.dtype)
        return share * own + (1 - share) * others

    points = [between(v, w[order]) for v, w, order in zip(pair, whole, orders)]

    def score(x: Array, y: Array) -> Array:
        value = critic(x, y)
        if jnp.shape(value) != ():
            raise ValueError(f"critic must return one number, got shape {jnp.shape(value)}")
        return value

    slopes = jax.vmap(jax.grad(score, argnums=(0, 1)))(*points)
    square = sum(
        jnp.sum(jnp.square(v.astype(jnp.float32)), axis=tuple(range(1, v.ndim))) for v in slopes
    )
    excess = safe_sqrt(jnp.asarray(square)) - target
    penalty = jnp.square(jnp.maximum(excess, 0.0) if one_sided else excess)
    return penalty.astype(jnp.result_type(x))


def wasserstein_predictive_coding_loss(
    critic: Critic,
    x: ArrayLike,
    y: ArrayLike,
    *,
    key: Array,
    penalty_weight: float = 10.0,
    one_sided: bool = False,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Contrastive predictive coding by a critic that is held to be 1-Lipschitz (WPC).

        L_i = -S_ii + log Σ_j exp S_ij + λ P_i,   S_ij = f(x_i, y_j)

    with the penalty P of `pairwise_gradient_penalty` and λ = penalty_weight. For K pairs and a
    critic that is 1-Lipschitz, log K - mean L is expected to be at most 1 - 1/K of the Wasserstein
    dependency measure. Without the penalty, mutual information beyond log K makes no difference
    to L: once a few factors of the data explain that much, an encoder has no reason to keep the
    others.

    Args:
      critic: f of one x and one y, without batch axis, to a number. It is mapped over all pairs;
        encoders inside are evaluated once for each x and each y.
      x: `[batch, ...]` floating point.
      y: `[batch, ...]` floating point, with as many rows, which belong to those of x.
      key: a random key for the penalty; with `axis_name` the same for all shards.
      penalty_weight: λ at least 0. Default 10, WGAN-GP's; 0 is CPC.
      one_sided: whether slopes below 1 go without penalty. Default: no.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread; every
        x is then compared with the y of all.

    Returns:
      `[batch]` losses in the type of `x`. Over equal shards, the mean of all is the loss of the
      whole batch.

    Raises:
      ValueError: shapes that do not match, a negative `penalty_weight`, or a critic that does not
        return one number for a pair.
      TypeError: pairs that are not floating point.

    Use it in place of CPC where views share much information, such as many objects or long
    histories. Minimise it over critic and encoders.

    Cost: the critic on batch² pairs, encoders once an example; then `pairwise_gradient_penalty`, a
    gradient of a gradient.

    Example:
      >>> critic = lambda x, y: bilinear_critic(x, y, jnp.eye(2) / jnp.sqrt(2.0))
      >>> x = jnp.eye(2)
      >>> loss = lambda x, y: wasserstein_predictive_coding_loss(
      ...     critic, x, y, key=jax.random.key(0)
      ... )
      >>> jax.eval_shape(loss, x, x).shape
      (2,)

    Reference: Ozair, Lynch, Bengio, van den Oord, Levine, Sermanet, "Wasserstein Dependency Measure
    for Representation Learning", 2019, arXiv:1903.11780.
    """
    check_interval(0, jnp.inf, penalty_weight=penalty_weight)
    pair = _checked_pairs(x, y)
    across = jax.vmap(jax.vmap(critic, in_axes=(None, 0)), in_axes=(0, None))
    scores, own = _square_scores(across(pair[0], all_shards(pair[1], axis_name)), axis_name)
    losses = _losses_of_anchors(scores, own, None)
    penalty = pairwise_gradient_penalty(
        critic, *pair, key=key, one_sided=one_sided, axis_name=axis_name
    )
    return (losses + penalty_weight * penalty).astype(jnp.result_type(x))


def _checked_pairs(x: ArrayLike, y: ArrayLike) -> list[Array]:
    """Both in their types, but in at least float32."""
    check_floating(x=x, y=y)
    if jnp.ndim(x) < 1 or jnp.ndim(y) < 1 or jnp.shape(x)[0] != jnp.shape(y)[0]:
        raise ValueError(
            f"x and y must have shapes [batch, ...], got {jnp.shape(x)} and {jnp.shape(y)}"
        )
    return [jnp.asarray(v).astype(compute_dtype(v)) for v in (x, y)]


def _square_scores(scores: ArrayLike, axis_name: AxisName | None) -> tuple[Array, Array]:
    """This shard's rows of the scores in the type to compute in, and where their own pairs are."""
    check_floating(scores=scores)
    shape = jnp.shape(scores)
    shards = 1 if axis_name is None else sum_over_shards(1, axis_name)
    if len(shape) != 2 or shape[1] != shape[0] * shards:
        raise ValueError(f"scores must have shape [batch, batch], got {shape}")
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * shape[0]
    own = (start + jnp.arange(shape[0]))[:, None] == jnp.arange(shape[1])
    return jnp.asarray(scores).astype(compute_dtype(scores)), own


def _losses_of_anchors(scores: Array, own: Array, counts: Array | None) -> Array:
    """log Σ_j exp S_ij - S_ii of each row."""
    positive = jnp.sum(jnp.where(own, scores, 0.0), axis=1)
    return masked_logsumexp(scores, axis=1, where=counts) - positive
