"""Losses of a concept bottleneck: what makes its activations or its weights sparse.

Concept logits `[batch, concepts]` say how much of each concept an image has, as the image-text
similarities of a contrastive model do, or the layer of `jaxref.nn.ConceptBottleneck` behind them.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.core.vectors import safe_sqrt


def gumbel_softmax(
    logits: ArrayLike,
    *,
    key: Array,
    temperature: float = 1.0,
    hard: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""A random choice of a class that is differentiable in the logits.

        G = softmax((z + g) / T),   g_k = -log(-log u_k), u_k uniform,   T = temperature

    The largest entry is class k with probability softmax(z)_k at every T. As T → 0, G becomes that
    choice; as T → ∞, it becomes uniform. With `hard` it is the choice itself, with the gradient
    of G.

    Args:
      logits: z `[..., classes]` floating point, the classes at `axis`.
      key: a random key.
      temperature: T above 0. Default 1.
      hard: whether to give one-hot choices. Default: no.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[..., classes]` of the shape and type of `logits`, of sum 1 over the classes; 0 for what is
      not admitted.

    Raises:
      ValueError: a `temperature` that is not positive, an `axis` out of range, or a `where` that
        does not broadcast.
      TypeError: logits that are not floating point.

    Use it for choices inside of a network; `jax.random.categorical` draws without a gradient, and
    `gumbel_contrastive_loss` makes a loss of it.

    Cost: a random number for each logit, and a softmax over the classes.

    Example:
      >>> choice = gumbel_softmax(jnp.array([0.0, 30.0]), key=jax.random.key(0), hard=True)
      >>> print(choice)
      [0. 1.]

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323; the estimator is of Jang, Gu, Poole,
    "Categorical Reparameterization with Gumbel-Softmax", 2016, arXiv:1611.01144.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, closed="neither", temperature=temperature)
    check_broadcastable(jnp.shape(logits), where=where)
    (axis,) = canonical_axes(axis, jnp.ndim(logits))
    z = jnp.asarray(logits).astype(compute_dtype(logits))
    noise = jax.random.gumbel(key, z.shape, z.dtype)
    log_g = masked_log_softmax((z + noise) / temperature, axis=axis, where=where)
    admitted = jnp.broadcast_to(True if where is None else where, z.shape)
    g = jnp.where(admitted, jnp.exp(log_g), 0.0)
    if hard:
        hot = jax.nn.one_hot(jnp.argmax(g, axis=axis), g.shape[axis], axis=axis, dtype=g.dtype)
        g = jnp.where(admitted, _straight_through(g, hot), 0.0)
    return g.astype(jnp.result_type(logits))


def gumbel_contrastive_loss(
    logits: ArrayLike,
    *,
    key: Array,
    temperature: float = 1.0,
    hard: bool = False,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The Sparse-CBM loss: random choices among images and among concepts (a loss of the set).

        L = -1/2 (mean_ij log G_ij + mean_ij log G'_ij)
        G = softmax over images i of (z + g) / T,   G' = softmax over concepts j of (z + g') / T

    with independent Gumbel noise g and g'. All entries count, as in the released code, not the
    diagonal alone: the loss is least for logits that are even, and the noise makes it steepest for
    the entries that are chosen least.

    Args:
      logits: z `[batch, concepts]` floating point, the outputs of the bottleneck.
      key: a random key; with `axis_name` the same for all shards.
      temperature: T above 0. Default 1.
      hard: whether to take one-hot choices, with the logarithm of at least 1e-10, and gradients of
        the soft ones where an entry is chosen. Default: no.
      where: boolean, broadcastable to `logits`: the entries that exist, `[batch, 1]` for whole
        images. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread.

    Returns:
      A scalar in the type of `logits`; 0 without entries.

    Raises:
      ValueError: a `temperature` that is not positive, or shapes that do not match.
      TypeError: logits that are not floating point.

    Use it to train the bottleneck's layer, beside cross-entropy on the classes; with
    `diagonal_contrastive_loss` in its place concepts are matched with images in order.

    Cost: two softmaxes of the logits, and two random numbers for each; with `axis_name` every shard
    draws the first noise of all, and drops the rest.

    Example:
      >>> loss = jax.jit(gumbel_contrastive_loss)
      >>> value = loss(jnp.zeros((2, 3)), key=jax.random.key(0), temperature=1e6)
      >>> print(value.round(3))  # (log 2 + log 3) / 2
      0.896

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323.
    """
    check_interval(0, jnp.inf, closed="neither", temperature=temperature)
    z, exists = _checked_logits(logits, where)
    total: Array | float = 0.0
    for axis, axis_key in enumerate(jax.random.split(key)):
        noisy = (z + _noise_of_shard(axis_key, z, axis_name)) / temperature
        log_g = _log_softmax(noisy, exists, axis, axis_name if axis == 0 else None)
        if hard:
            largest = jnp.max(jnp.where(exists, log_g, -jnp.inf), axis=axis, keepdims=True)
            if axis == 0 and axis_name is not None:
                largest = jax.lax.pmax(jax.lax.stop_gradient(largest), axis_name)
            choice = _straight_through(jnp.exp(log_g), log_g == largest)
            log_g = jnp.log(jnp.maximum(choice, 1e-10))
        total += jnp.sum(jnp.where(exists, log_g, 0.0))
    total, number = sum_over_shards((total, jnp.count_nonzero(exists)), axis_name)
    return (-0.5 * total / jnp.maximum(number, 1)).astype(jnp.result_type(logits))


def diagonal_contrastive_loss(
    logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The contrastive loss of CLIP with image i paired with concept i (a loss of the set).

        L = -1/2 mean_{i<min(B, M)} (log softmax_i(z_{·i}) + log softmax_i(z_{i·}))

    with the softmax over the B images of a concept, and over the M concepts of an image.

    Args:
      logits: z `[batch, concepts]` floating point: B images, M concepts.
      where: boolean, broadcastable to `logits`: the entries that exist. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread.

    Returns:
      A scalar in the type of `logits`; log B for even logits of B images and concepts, 0 where no
      pair exists.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point.

    Use it where images and texts come in pairs. In a bottleneck they do not, and its result depends
    on the order of the batch: the paper's variant for comparison.

    Cost: two softmaxes of the logits.

    Example:
      >>> print(jax.jit(diagonal_contrastive_loss)(jnp.zeros((4, 4))).round(4))
      1.3863

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323.
    """
    z, exists = _checked_logits(logits, where)
    start: Array | int = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(z)
    own = (start + jnp.arange(len(z)))[:, None] == jnp.arange(z.shape[1])
    paired = own & exists
    log_p = _log_softmax(z, exists, 0, axis_name) + _log_softmax(z, exists, 1, None)
    total, number = sum_over_shards(
        (jnp.sum(jnp.where(paired, log_p, 0.0)), jnp.count_nonzero(paired)), axis_name
    )
    return (-0.5 * total / jnp.maximum(number, 1)).astype(jnp.result_type(logits))


def l1_bottleneck_penalty(weights: ArrayLike, *, weight: float = 1e-3) -> Array:
    r"""The sum of the sizes of a layer's weights, which makes many of them 0.

        R = λ Σ_ij |W_ij|,   λ = weight

    Args:
      weights: W floating point of any shape.
      weight: λ at least 0. Default 1e-3, the authors', who divide it by the number of concepts in
        training.

    Returns:
      A scalar in the type of `weights`, with slopes of ±λ, and 0 for a weight of 0.

    Raises:
      ValueError: a negative `weight`.
      TypeError: weights that are not floating point.

    Use it beside the classes' cross-entropy for concepts that few classes read: it makes weights
    sparse, `gumbel_contrastive_loss` activations.

    Cost: one pass over the weights.

    Example:
      >>> print(l1_bottleneck_penalty(jnp.array([[1.0, -2.0]]), weight=0.5))
      1.5

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323.
    """
    check_floating(weights=weights)
    check_interval(0, jnp.inf, weight=weight)
    w = jnp.asarray(weights).astype(compute_dtype(weights))
    return (weight * jnp.sum(w * jnp.sign(w))).astype(jnp.result_type(weights))


def cubic_cosine_similarity_loss(
    clip_logits: ArrayLike,
    bottleneck_logits: ArrayLike,
    *,
    cubed: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How unlike a concept's activations are to the similarities behind (a loss of the set).

        L_j = -cos(a_j³, b_j³),   a_j = u_j - mean u_j, b_j = c_j - mean c_j over the batch

    with similarities u, activations c, and cubes by element, which single out the images that have
    most of a concept.

    Args:
      clip_logits: u `[batch, concepts]` floating point, of the model before the bottleneck.
      bottleneck_logits: c of the same shape.
      cubed: whether to take cubes, or the centred values themselves. Default: yes.
      where: boolean, broadcastable to `clip_logits`: the entries that exist. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the batch is spread.

    Returns:
      `[concepts]` losses in [-1, 1], in the type of `bottleneck_logits`; 0, with gradient 0, for a
      concept that is constant on either side.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point.

    Use its mean to keep the neurons of a bottleneck to their concepts without any labels;
    `diagonal_contrastive_loss` asks for pairs.

    Cost: a few passes over both logits; with `axis_name` only `concepts` numbers at a time pass
    between shards.

    Example:
      >>> u = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
      >>> print(jax.jit(cubic_cosine_similarity_loss)(u, u).round(3))
      [-1. -1.]

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323, after Oikarinen, Das, Nguyen, Weng,
    "Label-Free Concept Bottleneck Models", 2023, arXiv:2304.06129.
    """
    u, exists = _checked_logits(clip_logits, where, name="clip_logits")
    c, _ = _checked_logits(bottleneck_logits, where, name="bottleneck_logits")
    check_shape(u.shape, bottleneck_logits=c)
    number = jnp.maximum(sum_over_shards(jnp.count_nonzero(exists, axis=0), axis_name), 1)

    def direction(x: Array) -> Array:
        mean = sum_over_shards(jnp.sum(x, axis=0), axis_name) / number
        x = jnp.where(exists, x - mean, 0.0)
        largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=0, initial=0.0)
        if axis_name is not None:
            largest = jax.lax.pmax(largest, axis_name)
        x = x / jnp.where(largest > 0, largest, 1.0)  # so that no cube vanishes or overflows
        x = x**3 if cubed else x
        size = safe_sqrt(sum_over_shards(jnp.sum(jnp.square(x), axis=0), axis_name))
        return x / jnp.where(size > 0, size, 1.0)

    similarity = sum_over_shards(jnp.sum(direction(u) * direction(c), axis=0), axis_name)
    return -similarity.astype(jnp.result_type(bottleneck_logits))


def _checked_logits(
    logits: ArrayLike, where: ArrayLike | None, *, name: str = "logits"
) -> tuple[Array, Array]:
    """The logits in the type to compute in, 0 where they do not exist, and where they do."""
    check_floating(**{name: logits})
    shape = jnp.shape(logits)
    if len(shape) != 2:
        raise ValueError(f"{name} must have shape [batch, concepts], got {shape}")
    check_broadcastable(shape, where=where)
    exists = jnp.broadcast_to(True if where is None else where, shape)
    return jnp.where(exists, jnp.asarray(logits).astype(compute_dtype(logits)), 0.0), exists


def _noise_of_shard(key: Array, z: Array, axis_name: AxisName | None) -> Array:
    """This shard's rows of the Gumbel noise for the logits of all shards."""
    if axis_name is None:
        return jax.random.gumbel(key, z.shape, z.dtype)
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    shards = math.prod(jax.lax.axis_size(name) for name in names)
    noise = jax.random.gumbel(key, (shards * len(z), z.shape[1]), z.dtype)
    start = jax.lax.axis_index(axis_name) * len(z)
    return jax.lax.dynamic_slice_in_dim(noise, start, len(z))


def _log_softmax(x: Array, exists: Array, axis: int, axis_name: AxisName | None) -> Array:
    """log softmax over the entries along an axis that exist, on all shards; 0 for the others."""
    log_total = masked_logsumexp(x, axis=axis, where=exists, axis_name=axis_name)
    return jnp.where(exists, x - jnp.expand_dims(log_total, axis), 0.0)


def _straight_through(soft: Array, choice: Array) -> Array:
    """The choice, with the gradient of the soft one."""
    return choice + (soft - jax.lax.stop_gradient(soft))
