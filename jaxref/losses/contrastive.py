"""Contrastive losses of the batch: embeddings of two views, each other's positives, all else not.

Every loss here exists over the shards of a mesh: with `axis_name` a shard's rows are set against
those of all shards. Either these are gathered, or they go round a ring, which needs memory for one
block of a shard's rows with another's at a time (`jaxref.parallel.ring`).
"""

from typing import NamedTuple

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
from jaxref.core.shards import AxisName
from jaxref.core.vectors import embedding_pair
from jaxref.parallel.ring import reduce_pairs


class SigmoidContrastiveParams(NamedTuple):
    """What `sigmoid_contrastive_loss` learns beside the embeddings, float32 scalars.

    Attributes:
      log_temperature: t', the logarithm of the factor of the cosines.
      bias: b, added to every pair's logit.
    """

    log_temperature: Array
    bias: Array


def siglip_init(*, temperature: float = 10.0, bias: float = -10.0) -> SigmoidContrastiveParams:
    """The factor and the bias that `sigmoid_contrastive_loss` starts from.

    Args:
      temperature: exp(t') above 0 and finite: the factor of the cosines, not its inverse. Default
        10.
      bias: b, finite. Default -10: nearly all pairs of a batch are negatives, and a loss that
        starts from that prior has no large first steps that only learn it.

    Returns:
      The two parameters, float32 scalars.

    Raises:
      ValueError: a temperature that is not above 0, or a bias that is not finite.

    Use it with `sigmoid_contrastive_loss`; a softmax over the batch starts from a temperature of
    1 / 0.07 and has no bias, which would not change it.

    Cost: two scalars.

    Example:
      >>> print(*siglip_init())
      2.3025851 -10.0

    Reference: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training",
    2023, arXiv:2303.15343.
    """
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    check_interval(-jnp.inf, jnp.inf, bias=bias)
    return SigmoidContrastiveParams(
        jnp.log(jnp.asarray(temperature, jnp.float32)), jnp.asarray(bias, jnp.float32)
    )


def sigmoid_contrastive_loss(
    image: ArrayLike,
    text: ArrayLike,
    log_temperature: ArrayLike,
    bias: ArrayLike,
    *,
    positive_mask: ArrayLike | None = None,
    normalize: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Every pair of the batch as a binary decision of its own: is this its text? (SigLIP).

        L_i = Σ_j log(1 + exp(-z_ij (t x_i · y_j + b))),   t = exp(t'),
        z_ij = 1 where j = i, else -1

    with x_i and y_j the embeddings at length 1. The mean over the batch is the paper's loss, which
    divides by the number of rows and not of pairs. No pair needs any other: there is no softmax,
    and the loss of a batch is the sum of those of blocks of pairs.

    Args:
      image: `[batch, features]` floating point.
      text: `[batch, features]` floating point, row i of which belongs to row i of `image`.
      log_temperature: t', a scalar, learned; `siglip_init` has where to start.
      bias: b, a scalar, learned.
      positive_mask: boolean `[batch, texts]`, True where z is 1: where a text belongs to several
        images. Default: the diagonal. With `axis_name` it has this shard's images and all texts.
      normalize: whether to bring the embeddings to length 1 here. A zero vector stays, at logit b.
      where: boolean, broadcastable to `[batch, texts]`: the pairs that count, as those that
        `kept_negatives` gives. Default: all. With `axis_name`: as for `positive_mask`.
      axis_name: name or names of the mapped axes over whose shards the batch is spread: texts go
        round a ring, D - 1 times to the next of D shards, and no device ever has more than one
        block `[batch / D, batch / D]` of pairs, forward or backward.

    Returns:
      `[batch]` losses above 0 in the type of `image`, of this shard's images. Over equal shards,
      the mean of all is the loss of the whole batch.

    Raises:
      ValueError: shapes that do not match.
      TypeError: embeddings that are not floating point.

    Use it to train two towers on pairs, above all over many devices; `softmax_contrastive_loss`
    compares all texts of the batch with one another, and gains from larger batches for longer.
    Swapping image and text changes the rows but not their mean.

    Cost: O(N² F) time and N² logits for N pairs of F features; N² / D² logits at a time on each of
    D shards.

    Example:
      >>> image, text = jnp.eye(2), jnp.array([[0.9, 0.0], [0.1, 2.0]])
      >>> print(sigmoid_contrastive_loss(image, text, *siglip_init()).round(4))
      [0.6932 0.6994]

    Reference: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training",
    2023, arXiv:2303.15343.
    """
    x, y = embedding_pair(image=image, text=text, normalize=normalize)
    check_shape((), log_temperature=log_temperature, bias=bias)
    texts = len(y) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    masks = {"positive_mask": positive_mask, "where": where}
    for name, mask in masks.items():
        check_broadcastable((len(x), texts), **{name: mask})
        if mask is not None:
            masks[name] = jnp.broadcast_to(jnp.asarray(mask, bool), (len(x), texts))
    parameters = jnp.exp(jnp.asarray(log_temperature, x.dtype)), jnp.asarray(bias, x.dtype)
    losses = reduce_pairs(
        _sigmoid_block, (x, parameters, masks), y, axis_name=axis_name, ring=axis_name is not None
    )
    return losses.astype(jnp.result_type(image))


def softmax_contrastive_loss(
    image: ArrayLike,
    text: ArrayLike,
    log_temperature: ArrayLike,
    *,
    normalize: bool = True,
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> Array:
    r"""Which text of the batch is this image's, and which image this text's (InfoNCE; CLIP).

        L_i = -(log softmax_j(t x_i · y_j)_i + log softmax_j(t y_i · x_j)_i) / 2,   t = exp(t')

    with x_i and y_j the embeddings at length 1: the mean of two cross-entropies over the batch.

    Args:
      image: `[batch, features]` floating point.
      text: `[batch, features]` floating point, row i of which belongs to row i of `image`.
      log_temperature: t', a scalar, learned; log(1 / 0.07) is where to start.
      normalize: whether to bring the embeddings to length 1 here. A zero vector stays, at logit 0.
      axis_name: name or names of the mapped axes over whose shards the batch is spread.
      ring: with `axis_name`, whether embeddings go round a ring, which takes memory for one block
        of pairs `[batch / D, batch / D]` of D shards; else they are gathered, for blocks
        `[batch / D, batch]`.

    Returns:
      `[batch]` losses of at least 0 in the type of `image`, of this shard's rows; 0 for a batch of
      one. Over equal shards, the mean of all is the loss of the whole batch.

    Raises:
      ValueError: shapes that do not match.
      TypeError: embeddings that are not floating point.

    Use it as the baseline of two towers; `sigmoid_contrastive_loss` needs no normaliser over the
    batch. `nt_xent_loss` is for two views by one tower, and has the batch's other views of both
    kinds as negatives.

    Cost: O(N² F) time for N pairs of F features, each direction on its own, and 2 N² logits; on D
    shards N² / D of each, N² / D² with `ring`.

    Example:
      >>> image, text = jnp.eye(2), jnp.array([[0.9, 0.0], [0.1, 2.0]])
      >>> print(softmax_contrastive_loss(image, text, jnp.log(2.0)).round(4))
      [0.1331 0.1335]

    Reference: the symmetric loss that Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language
    Image Pre-Training", 2023, arXiv:2303.15343, compare with; it is of Radford et al., "Learning
    Transferable Visual Models From Natural Language Supervision", 2021, arXiv:2103.00020.
    """
    x, y = embedding_pair(image=image, text=text, normalize=normalize)
    check_shape((), log_temperature=log_temperature)
    scale = jnp.exp(jnp.asarray(log_temperature, x.dtype))
    positive = scale * jnp.sum(x * y, axis=-1)
    totals = [
        reduce_pairs(
            _softmax_block,
            (rows, scale),
            columns,
            combine="logsumexp",
            axis_name=axis_name,
            ring=ring,
        )
        for rows, columns in ((x, y), (y, x))
    ]
    return (sum(totals) / 2 - positive).astype(jnp.result_type(image))


def nt_xent_loss(
    view_a: ArrayLike,
    view_b: ArrayLike,
    *,
    temperature: float = 0.5,
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> Array:
    r"""Two views of an example, each to be found among all others of the batch (NT-Xent; SimCLR).

        L_i = -s_{i i⁺} / τ + log Σ_{k ≠ i} exp(s_ik / τ),   s the cosines of all 2N views

    with i⁺ the other view of the same example, which is in the sum, and i itself not.

    Args:
      view_a: `[N, features]` floating point.
      view_b: `[N, features]` floating point: other views of the same examples.
      temperature: τ above 0. Default 0.5, SimCLR's for small images.
      axis_name: name or names of the mapped axes over whose shards the examples are spread.
      ring: with `axis_name`, whether embeddings go round a ring, which takes memory for one block
        of pairs `[2N / D, 2N / D]` of D shards; else they are gathered, for blocks `[2N / D, 2N]`.

    Returns:
      `[2N]` losses in the type of `view_a`: of the views in `view_a`, then of those in `view_b`.
      0 for one example. Of this shard's examples; over equal shards, the mean of all is the loss
      of the whole batch. Zero vectors have cosine 0 with any.

    Raises:
      ValueError: shapes that do not match, or a temperature that is not above 0.
      TypeError: embeddings that are not floating point.

    Use it for self-supervised features of one tower; `softmax_contrastive_loss` is for two towers,
    and `mean_shifted_contrastive_loss` fine-tunes features that are good already.

    Cost: O(4 N² F) time for F features, and 4 N² logits; on D shards 4 N² / D each, 4 N² / D² with
    `ring`.

    Example:
      >>> print(nt_xent_loss(jnp.eye(2), jnp.eye(2)).round(4))
      [0.2395 0.2395 0.2395 0.2395]

    Reference: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of
    Visual Representations", 2020, arXiv:2002.05709, as in Kinakh, Taran, Voloshynovskiy,
    "ScatSimCLR: self-supervised contrastive learning with pretext task regularization for
    small-scale datasets", 2021, arXiv:2108.13939.
    """
    a, b = embedding_pair(view_a=view_a, view_b=view_b, normalize=True)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    z = jnp.concatenate([a, b])
    positive = jnp.tile(jnp.sum(a * b, axis=-1), 2)
    scale = jnp.asarray(1 / temperature, z.dtype)
    others = reduce_pairs(
        _others_block, (z, scale), z, combine="logsumexp", axis_name=axis_name, ring=ring
    )
    return (others - scale * positive).astype(jnp.result_type(view_a))


def kept_negatives(
    similarities: ArrayLike,
    *,
    keep_fraction: float,
    mode: str = "random",
    positive_mask: ArrayLike | None = None,
    key: Array | None = None,
) -> Array:
    """Which pairs stay where only a share of each row's negatives counts.

    Args:
      similarities: `[batch, texts]` floating point, of images with texts.
      keep_fraction: in [0, 1], the share of a row's negatives to keep, rounded to whole numbers.
      mode: which ones: "random", or the "hard" of the highest similarities, or the "easy" of the
        lowest.
      positive_mask: boolean `[batch, texts]`. Default: the diagonal.
      key: for "random".

    Returns:
      Boolean `[batch, texts]`: the positives and the negatives that are kept, for the `where` of
      `sigmoid_contrastive_loss`. Nothing here has a gradient.

    Raises:
      ValueError: a fraction out of range, a mode that is none, shapes that do not match, or no key
        for "random".
      TypeError: similarities that are not floating point.

    Use it to study the imbalance of positives and negatives: few random ones hurt, while the hard
    ones carry nearly all there is to learn.

    Cost: two sorts of each row, O(texts · log texts), and similarities of all pairs in memory.

    Example:
      >>> similarities = jnp.array([[0.9, 0.2, 0.4, 0.1], [0.8, 0.9, 0.1, 0.3]])
      >>> print(kept_negatives(similarities, keep_fraction=1 / 3, mode="hard").astype(int))
      [[1 0 1 0]
       [1 1 0 0]]

    Reference: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training",
    2023, arXiv:2303.15343.
    """
    check_floating(similarities=similarities)
    check_interval(0, 1, keep_fraction=keep_fraction)
    s = jax.lax.stop_gradient(jnp.asarray(similarities))
    if s.ndim != 2:
        raise ValueError(f"similarities must have shape [batch, texts], got {s.shape}")
    check_broadcastable(s.shape, positive_mask=positive_mask)
    positive = _same_place(s, 0, 0) if positive_mask is None else positive_mask
    positive = jnp.broadcast_to(jnp.asarray(positive, bool), s.shape)
    if mode == "random":
        if key is None:
            raise ValueError("key must be given where mode is 'random'")
        order = jax.random.uniform(key, s.shape)
    elif mode in ("hard", "easy"):
        order = -s if mode == "hard" else s
    else:
        raise ValueError(f"mode must be 'random', 'hard' or 'easy', got {mode!r}")
    ranks = jnp.argsort(jnp.argsort(jnp.where(positive, jnp.inf, order), axis=-1), axis=-1)
    kept = jnp.round(keep_fraction * jnp.sum(~positive, axis=-1, keepdims=True))
    return positive | (ranks < kept)


def _sigmoid_block(
    rows: tuple[Array, tuple[Array, Array], dict[str, Array | None]],
    columns: Array,
    first_row: Array | int,
    first_column: Array | int,
) -> Array:
    x, (scale, bias), masks = rows
    logits = scale * (x @ columns.T) + bias
    positive, where = (
        None
        if mask is None
        else jax.lax.dynamic_slice_in_dim(mask, first_column, len(columns), axis=1)
        for mask in masks.values()
    )
    if positive is None:
        positive = _same_place(logits, first_row, first_column)
    losses = jax.nn.softplus(jnp.where(positive, -logits, logits))
    return jnp.sum(losses, axis=1, where=where)


def _softmax_block(
    rows: tuple[Array, Array], columns: Array, first_row: Array | int, first_column: Array | int
) -> Array:
    del first_row, first_column
    x, scale = rows
    return jax.nn.logsumexp(scale * (x @ columns.T), axis=1)


def _others_block(
    rows: tuple[Array, Array], columns: Array, first_row: Array | int, first_column: Array | int
) -> Array:
    """The log of the sum of exponentials over all columns but the row itself."""
    x, scale = rows
    logits = scale * (x @ columns.T)
    return jax.nn.logsumexp(logits, axis=1, where=~_same_place(logits, first_row, first_column))


def _same_place(block: Array, first_row: Array | int, first_column: Array | int) -> Array:
    row, column = (jnp.arange(size) for size in block.shape)
    return (first_row + row)[:, None] == first_column + column
