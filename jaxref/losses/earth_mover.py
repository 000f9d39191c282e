"""Language modelling by the earth mover's distance between words (EMO).

Mass that a model puts on a wrong word costs as much as that word is far from the right one, by the
angle between their embeddings: c(i, j) = 1 - cos(e_i, e_j), and c(i, i) = 0. Where the data are one
word there is one plan of transport only, so that the distance is a mean cost.

A loss is taken from logits, or from the hidden states and the output kernel. The latter goes over
blocks of the vocabulary, forward and backward, and memory does not grow with tokens times
vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import varying_alike
from jaxref.core.vectors import unit_vectors
from jaxref.kernels.linear_softmax_cross_entropy_xla import operand_dtype
from jaxref.losses.cross_entropy import softmax_cross_entropy

Mode = Literal["mle", "emo"]

_MODES = ("mle", "emo")
_BLOCK_WIDTH = 2048  # columns of the vocabulary at a time, enough for products at full speed


def earth_mover_language_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    cost_embedding: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Mean cost of moving a model's mass to the labels' words: the earth mover's distance.

        D = Σ_j p_j c(y, j),   p = softmax(f),   c(i, j) = 1 - cos(e_i, e_j) for i ≠ j, else 0

    for a label y. For labels that are distributions q, Σ_ij q_i p_j c(i, j), which is the cost of
    independent plans: an upper bound of the distance. Backward, p_j (c(y, j) - D): far words are
    pushed down most, words of the label's direction not at all, and mass that is settled rests.

    Args:
      logits: f `[..., vocabulary]` floating point, the vocabulary at `axis`.
      labels: y, integer ids `[...]`, or distributions of the shape of `logits`. An id that is out
        of the vocabulary gives NaN for its token.
      cost_embedding: e `[vocabulary, width]` floating point, of any length, without gradient: such
        as the output kernel of a pretrained model, transposed, or the model's own. A vector of
        length 0 is at right angles to all.
      axis: the axis of the vocabulary.
      where: boolean, broadcastable to `logits` without `axis`: the tokens that count; others may
        hold anything. Default: all.

    Returns:
      `[...]` losses in [0, 2], in the type of `logits`; 0 for tokens that do not count.

    Raises:
      ValueError: shapes that do not match, or `axis` out of range.
      TypeError: logits or embeddings that are not floating point, or labels of a type that is
        neither.

    Use it through `emo_loss`: its gradient is small where the label has next to no mass.
    `linear_earth_mover_loss` needs no logits.

    Cost: tokens · vocabulary · width multiplications for the costs, beside a softmax, and an array
    of costs as large as the logits.

    Example:
      >>> embedding = jnp.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> print(earth_mover_language_loss(logits, jnp.array([0]), embedding).round(4))
      [0.5]

    Reference: Ren, Wu, Zhu, "EMO: Earth Mover Distance Optimization for Auto-Regressive Language
    Modeling", 2023, arXiv:2310.04691.
    """
    distance, _, counted = _terms(logits, labels, cost_embedding, axis, where)
    return _masked(distance, counted).astype(jnp.result_type(logits))


def emo_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    cost_embedding: ArrayLike,
    *,
    mode: Mode = "mle",
    epsilon: float = 1e-10,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy and the earth mover's distance between words, at the same size (EMO).

        mle   L = (N + w D) / 2,   w = N / (D + ε)
        emo   L = D + w N,         w = D / (N + ε)

    with the cross-entropy N, the distance D of `earth_mover_language_loss`, and weights w without
    gradient. The value is N in the first mode and 2 D in the second.

    Args:
      logits, labels, cost_embedding: as in `earth_mover_language_loss`.
      mode: "mle", the default, which keeps the size of cross-entropy, or "emo", that of the
        distance, which the authors take to go on training a model that is good already.
      epsilon: ε above 0. Default 1e-10, the authors'.
      axis, where: as in `earth_mover_language_loss`.

    Returns:
      `[...]` losses at least 0, in the type of `logits`; 0 for tokens that do not count.

    Raises:
      ValueError: an unknown `mode`, an `epsilon` that is not positive, or as
        `earth_mover_language_loss`.
      TypeError: as `earth_mover_language_loss`.

    Use it to fine-tune a language model on text of which it should learn the manner rather than the
    letters; `linear_emo_loss` where the vocabulary is large. The modes are 1 and 2 of the authors'
    package, of which some releases limit w to 3 in mode 1; their program for GPT-2 calls the first
    one "emo".

    Cost: that of `earth_mover_language_loss`: a product of tokens · vocabulary · width, a softmax,
    and costs as large as the logits.

    Example:
      >>> embedding = jnp.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> for mode in ("mle", "emo"):
      ...     print(emo_loss(logits, jnp.array([0]), embedding, mode=mode).round(4))
      [0.6931]
      [1.]

    Reference: Ren, Wu, Zhu, "EMO: Earth Mover Distance Optimization for Auto-Regressive Language
    Modeling", 2023, arXiv:2310.04691.
    """
    distance, cross_entropy, counted = _terms(logits, labels, cost_embedding, axis, where)
    losses = _balanced(cross_entropy, distance, mode, epsilon)
    return _masked(losses, counted).astype(jnp.result_type(logits))


def linear_earth_mover_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    cost_embedding: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""`earth_mover_language_loss` of the logits `hidden @ kernel`, without storing them.

        D = Σ_j p_j c(y, j),   p = softmax(h W)

    Args:
      hidden: h `[..., features]` floating point, the inputs of the output layer.
      kernel: W `[features, vocabulary]` floating point, its weights.
      labels: y, integer ids `[...]`. One that is out of the vocabulary gives NaN for its token, and
        no gradient.
      cost_embedding: e `[vocabulary, width]` floating point, without gradient; `kernel.T` for the
        model's own.
      where: boolean, broadcastable to `labels`: the tokens that count; others may hold anything.
        Default: all.

    Returns:
      `[...]` losses in [0, 2], in the type of `hidden`; 0 for tokens that do not count.

    Raises:
      ValueError: shapes that do not match, or a vocabulary without a word.
      TypeError: arrays that are not floating point, or labels that are not integers.

    The products with `kernel` take operands of its type and sum in float32; those of unit vectors
    run in float32. It differentiates in reverse mode (`jax.grad`), once.

    Use it, through `linear_emo_loss`, where the logits would be the largest arrays of a step.

    Cost: six products of the size of tokens · vocabulary, two forward, and four backward, which
    forms the logits again; memory for 2048 words at a time.

    Example:
      >>> hidden, kernel = jnp.array([[0.0, 0.0]]), jnp.ones((2, 3))
      >>> embedding = jnp.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
      >>> print(linear_earth_mover_loss(hidden, kernel, jnp.array([0]), embedding).round(4))
      [0.6667]

    Reference: Ren, Wu, Zhu, "EMO: Earth Mover Distance Optimization for Auto-Regressive Language
    Modeling", 2023, arXiv:2310.04691; blocks of the vocabulary after Wijmans et al., "Cut Your
    Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.
    """
    distance, _, counted = _linear_terms(hidden, kernel, labels, cost_embedding, where)
    return _masked(distance, counted).astype(jnp.result_type(hidden))


def linear_emo_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    cost_embedding: ArrayLike,
    *,
    mode: Mode = "mle",
    epsilon: float = 1e-10,
    where: ArrayLike | None = None,
) -> Array:
    r"""`emo_loss` of the logits `hidden @ kernel`, without storing them.

        mle   L = (N + w D) / 2,   w = N / (D + ε)
        emo   L = D + w N,         w = D / (N + ε)

    Cross-entropy N and distance D come from the same blocks of logits, and so do their gradients:
    six products of the size of tokens times vocabulary in all.

    Args:
      hidden, kernel, labels, cost_embedding, where: as in `linear_earth_mover_loss`.
      mode, epsilon: as in `emo_loss`.

    Returns:
      `[...]` losses at least 0, in the type of `hidden`; 0 for tokens that do not count.

    Raises:
      ValueError: an unknown `mode`, an `epsilon` that is not positive, or as
        `linear_earth_mover_loss`.
      TypeError: as `linear_earth_mover_loss`.

    Use it in place of `jaxref.kernels.linear_softmax_cross_entropy`, which it is with the distance
    left out.

    Cost: that of `linear_earth_mover_loss`: six products of the size of tokens · vocabulary, and
    memory for tokens · 2048 numbers.

    Example:
      >>> hidden, kernel = jnp.array([[0.0, 0.0]]), jnp.ones((2, 3))
      >>> embedding = jnp.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
      >>> print(linear_emo_loss(hidden, kernel, jnp.array([0]), embedding).round(4))
      [1.0986]

    Reference: Ren, Wu, Zhu, "EMO: Earth Mover Distance Optimization for Auto-Regressive Language
    Modeling", 2023, arXiv:2310.04691; blocks of the vocabulary after Wijmans et al., "Cut Your
    Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.
    """
    distance, cross_entropy, counted = _linear_terms(hidden, kernel, labels, cost_embedding, where)
    losses = _balanced(cross_entropy, distance, mode, epsilon)
    return _masked(losses, counted).astype(jnp.result_type(hidden))


def _balanced(cross_entropy: Array, distance: Array, mode: Mode, epsilon: float) -> Array:
    """The sum of both, where one has a weight that brings it to the size of the other."""
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")
    if mode == "mle":
        weight = lax.stop_gradient(cross_entropy / (distance + epsilon))
        return (cross_entropy + weight * distance) / 2
    return distance + lax.stop_gradient(distance / (cross_entropy + epsilon)) * cross_entropy


def _masked(losses: Array, counted: Array | None) -> Array:
    return losses if counted is None else jnp.where(counted, losses, 0.0)


def _terms(
    logits: ArrayLike,
    labels: ArrayLike,
    cost_embedding: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> tuple[Array, Array, Array | None]:
    """Distances and cross-entropies in at least float32, and which tokens count."""
    check_floating(logits=logits, cost_embedding=cost_embedding)
    f, y = jnp.asarray(logits), jnp.asarray(labels)
    (axis,) = canonical_axes(axis, f.ndim)
    f = jnp.moveaxis(f.astype(compute_dtype(f)), axis, -1)
    if y.ndim == f.ndim:
        y = jnp.moveaxis(y, axis, -1)
    *tokens, vocabulary = f.shape
    _check_embedding(vocabulary, cost_embedding)
    check_broadcastable(tuple(tokens), where=where)
    counted = None if where is None else jnp.broadcast_to(where, tokens)
    if counted is not None:
        f = jnp.where(counted[..., None], f, 0.0)
    cross_entropy = softmax_cross_entropy(f, y)
    e = unit_vectors(lax.stop_gradient(jnp.asarray(cost_embedding, f.dtype)))
    if jnp.issubdtype(y.dtype, jnp.integer):
        y, known = _ids(y, vocabulary)
        costs = _costs(e[y], e, jnp.arange(vocabulary) == y[..., None])
        distance = jnp.where(known, jnp.sum(jax.nn.softmax(f) * costs, axis=-1), jnp.nan)
    else:
        q = y.astype(f.dtype)
        of_zero = 1 - jnp.sum(jnp.square(e), axis=-1)  # c(i, i) = 0 for these, too
        products = jnp.matmul(jnp.matmul(q, e, precision="highest"), e.T, precision="highest")
        costs = jnp.sum(q, axis=-1, keepdims=True) - products - q * of_zero
        distance = jnp.sum(jax.nn.softmax(f) * jnp.maximum(costs, 0.0), axis=-1)
    return distance, cross_entropy, counted


def _ids(labels: Array, vocabulary: int) -> tuple[Array, Array]:
    """Ids of the vocabulary, 0 for others, and which labels are such ids."""
    ids = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # int8 does not know 1000
    known = (ids >= 0) & (ids < vocabulary)
    return jnp.where(known, ids, 0), known


def _costs(e_label: Array, e: Array, is_label: Array) -> Array:
    """c(y, j) `[..., words]` from unit vectors of the labels and of some words."""
    # float32 all through: in bfloat16 a cosine near 1 is off by more than near words are apart
    cosines = jnp.matmul(e_label, e.T, precision="highest")
    return jnp.where(is_label, 0.0, jnp.maximum(1 - cosines, 0.0))


def _check_embedding(vocabulary: int, cost_embedding: ArrayLike) -> None:
    shape = jnp.shape(cost_embedding)
    if len(shape) != 2 or shape[0] != vocabulary or vocabulary == 0:
        raise ValueError(
            f"cost_embedding must have shape ({vocabulary}, width), with at least one word, got "
            f"{shape}"
        )


def _linear_terms(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    cost_embedding: ArrayLike,
    where: ArrayLike | None,
) -> tuple[Array, Array, Array | None]:
    """As `_terms`, of the logits `hidden @ kernel`."""
    check_floating(hidden=hidden, kernel=kernel, cost_embedding=cost_embedding)
    x, weights, y = jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(labels)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {y.dtype.name}")
    if x.ndim == 0 or weights.ndim != 2 or weights.shape[0] != x.shape[-1]:
        raise ValueError(
            f"kernel must have shape (features, vocabulary) for hidden of shape (..., features), "
            f"got {weights.shape} and {x.shape}"
        )
    vocabulary = weights.shape[1]
    _check_embedding(vocabulary, cost_embedding)
    check_shape(x.shape[:-1], labels=y)
    check_broadcastable(y.shape, where=where)
    counted = None if where is None else jnp.broadcast_to(where, y.shape)
    if counted is not None:
        x = jnp.where(counted[..., None], x, 0)
    ids, known = _ids(y, vocabulary)
    e = lax.stop_gradient(jnp.asarray(cost_embedding))
    rows = varying_alike(x.reshape(-1, x.shape[-1]), weights, ids.reshape(-1), e)
    cross_entropy, distance = (
        jnp.where(known, term.reshape(y.shape), jnp.nan) for term in _by_blocks(*rows)
    )
    return distance, cross_entropy, counted


@jax.custom_vjp
def _by_blocks(
    hidden: Array, kernel: Array, labels: Array, cost_embedding: Array
) -> tuple[Array, Array]:
    """Cross-entropies and distances of the rows of `hidden [tokens, features]`."""
    return _forward(hidden, kernel, labels, cost_embedding)[0]


def _forward(hidden: Array, kernel: Array, labels: Array, cost_embedding: Array) -> Any:
    """Sums of exponentials, and of these times costs, relative to the largest logit so far."""
    block_of = _blocks(hidden, kernel, labels, cost_embedding)

    def update(start: Array | int, width: int, carry: Any) -> Any:
        top, total, cost, of_label = carry
        _, logits, costs, is_label = block_of(start, width)
        new_top = jnp.maximum(top, logits.max(axis=-1))
        shrink, mass = jnp.exp(top - new_top), jnp.exp(logits - new_top[:, None])
        total = total * shrink + mass.sum(axis=-1)
        cost = cost * shrink + jnp.sum(mass * costs, axis=-1)
        of_label += jnp.sum(logits, axis=-1, where=is_label)
        return new_top, total, cost, of_label

    zeros = jnp.zeros_like(hidden, compute_dtype(hidden, kernel), shape=labels.shape)
    carry = zeros - jnp.inf, zeros, zeros, zeros
    top, total, cost, of_label = _over_blocks(update, kernel.shape[1], carry)
    distance = cost / total
    residuals = hidden, kernel, labels, cost_embedding, top, total, distance
    return (jnp.log(total) + (top - of_label), distance), residuals


def _backward(residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    """At a logit, p_j (a + b (c(y, j) - D)) - a 1[j = y] of the cotangents a of N and b of D."""
    hidden, kernel, labels, cost_embedding, top, total, distance = residuals
    of_cross_entropy, of_distance = (x[:, None] for x in cotangents)
    block_of = _blocks(hidden, kernel, labels, cost_embedding)

    def update(start: Array | int, width: int, carry: Any) -> Any:
        d_hidden, d_kernel = carry
        block, logits, costs, is_label = block_of(start, width)
        p = jnp.exp(logits - top[:, None]) / total[:, None]
        slopes = p * (of_cross_entropy + of_distance * (costs - distance[:, None]))
        slopes = (slopes - jnp.where(is_label, of_cross_entropy, 0)).astype(operand)
        d_hidden += jnp.matmul(slopes, block.T, preferred_element_type=dtype)
        d_block = jnp.matmul(hidden.T, slopes, preferred_element_type=dtype).astype(kernel.dtype)
        return d_hidden, lax.dynamic_update_slice_in_dim(d_kernel, d_block, start, axis=1)

    dtype, operand = compute_dtype(hidden, kernel), operand_dtype(hidden, kernel)
    zeros = jnp.zeros_like(hidden, dtype), jnp.zeros_like(kernel)
    d_hidden, d_kernel = _over_blocks(update, kernel.shape[1], zeros)
    return d_hidden.astype(hidden.dtype), d_kernel, None, jnp.zeros_like(cost_embedding)


_by_blocks.defvjp(_forward, _backward)


def _blocks(
    hidden: Array, kernel: Array, labels: Array, cost_embedding: Array
) -> Callable[[Array | int, int], tuple[Array, Array, Array, Array]]:
    """A function of a block's first word and width, which gives its part of the kernel, and its
    logits, costs and which of them are the labels', `[tokens, width]` each."""
    dtype = compute_dtype(hidden, kernel)
    e_label = unit_vectors(cost_embedding[labels].astype(dtype))

    def block_of(start: Array | int, width: int) -> tuple[Array, Array, Array, Array]:
        block = lax.dynamic_slice_in_dim(kernel, start, width, axis=1)
        e = unit_vectors(lax.dynamic_slice_in_dim(cost_embedding, start, width).astype(dtype))
        is_label = start + jnp.arange(width) == labels[:, None]
        logits = jnp.matmul(hidden, block, preferred_element_type=dtype)
        return block, logits, _costs(e_label, e, is_label), is_label

    return block_of


def _over_blocks(
    update: Callable[[Array | int, int, Any], Any], vocabulary: int, carry: Any
) -> Any:
    """Folds `update(first word, width, carry)` over blocks; the last may be narrower."""
    width = min(_BLOCK_WIDTH, vocabulary)
    whole, rest = divmod(vocabulary, width)
    carry = lax.fori_loop(0, whole, lambda i, carry: update(i * width, width, carry), carry)
    return update(whole * width, rest, carry) if rest else carry
