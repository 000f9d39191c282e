"""Tuples of an anchor, a positive and negatives, hard ones by what a classifier confuses."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape


def hard_negative_tuple_indices(
    labels: ArrayLike,
    predictions: ArrayLike,
    anchors: ArrayLike,
    *,
    key: Array,
    tuple_size: int = 8,
    hard_probability: float = 0.5,
    missed_probability: float = 0.33,
) -> Array:
    r"""Draws tuples of images, with negatives that the model takes for the anchor's class.

    For an anchor of class c,

        positive:   another example of c; where the anchor is misclassified, one that is not
        negative:   where the anchor is classified rightly, with `hard_probability` an example of
                    another class that is taken for c; where it is not, with `missed_probability`
                    the same, else with probability 1/2 one of the class that the anchor is
                    taken for
        otherwise:  an example of a random other class, all classes alike

    A kind without any candidate left is such an example, too, and no tuple has an example twice.

    Args:
      labels: integers `[n]`, the classes.
      predictions: integers `[n]`, the classes by the model of the last epoch.
      anchors: integers `[tuples]`, the examples for which tuples are drawn.
      key: a random key.
      tuple_size: at least 2: anchor, positive, and negatives. Default 8, the authors'.
      hard_probability: in [0, 1]. Default 0.5, the authors'.
      missed_probability: in [0, 1]. Default 0.33, the authors'.

    Returns:
      int32 `[tuples, tuple_size]` examples: the anchor, its positive, the negatives; -1 where there
      is none left to draw.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: labels, predictions or anchors that are not integer.

    Use it for the tuples of `jaxref.losses.attentive_local_triplet_loss`, once an epoch, with the
    predictions of the epoch before.

    Cost: O(tuples · tuple_size · n) time and O(tuples · n) memory, and the predictions of an epoch.

    Example:
      >>> labels, predictions = jnp.array([0, 0, 1, 1, 2]), jnp.array([0, 0, 0, 1, 2])
      >>> hard_negative_tuple_indices(
      ...     labels, predictions, jnp.array([0]), key=jax.random.key(0), tuple_size=3,
      ...     hard_probability=1.0,
      ... )
      Array([[0, 1, 2]], dtype=int32)

    Reference: Zhu, Gao, Ke, Qiao, Sun, "Coarse-to-Fine: Learning Compact Discriminative
    Representation for Single-Stage Image Retrieval", 2023, arXiv:2308.04008.
    """
    y, taken_for, anchors = (jnp.asarray(x) for x in (labels, predictions, anchors))
    for name, x in (("labels", y), ("predictions", taken_for), ("anchors", anchors)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {x.dtype.name}")
        if x.ndim != 1:
            raise ValueError(f"{name} must have one axis, got shape {x.shape}")
    check_shape(y.shape, predictions=taken_for)
    check_interval(2, jnp.inf, tuple_size=tuple_size)
    check_interval(0, 1, hard_probability=hard_probability, missed_probability=missed_probability)
    n = len(y)
    if n == 0 or len(anchors) == 0:
        return jnp.full((len(anchors), tuple_size), -1, jnp.int32)
    # a random class, and of it a random example: log of one over the size of its class
    ordered = jnp.sort(y)
    sizes = jnp.searchsorted(ordered, y, side="right") - jnp.searchsorted(ordered, y, side="left")
    of_class = -jnp.log(sizes.astype(jnp.float32))

    def draw(key: Array, candidates: Array, weights: Array | float) -> Array:
        scores = jnp.where(candidates, weights, -jnp.inf) + jax.random.gumbel(key, (n,))
        return jnp.where(candidates.any(), jnp.argmax(scores), -1)

    def one_tuple(key: Array, anchor: Array) -> Array:
        label, mistaken = y[anchor], taken_for[anchor]
        is_right = mistaken == label
        same = (y == label) & (jnp.arange(n) != anchor)
        recognised = same & (taken_for == y)
        positives = jnp.where(~is_right & recognised.any(), recognised, same)
        key, of_positive = jax.random.split(key)
        positive = draw(of_positive, positives, 0.0)
        hard = (y != label) & (taken_for == label)
        confused = (y == mistaken) & ~is_right

        def negative(taken: Array, key: Array) -> tuple[Array, Array]:
            of_hard, of_confused, of_example = jax.random.split(key, 3)
            free = (y != label) & ~taken
            share = jnp.where(is_right, hard_probability, missed_probability)
            wants_hard = jax.random.uniform(of_hard) < share
            wants_confused = ~wants_hard & jax.random.bernoulli(of_confused)
            kind = jnp.where(wants_hard, hard, free) & jnp.where(wants_confused, confused, True)
            candidates = jnp.where((kind & free).any(), kind & free, free)
            weights = jnp.where(wants_hard | wants_confused, 0.0, of_class)
            chosen = draw(of_example, candidates, weights)
            return taken | (jnp.arange(n) == chosen), chosen

        keys = jax.random.split(key, tuple_size - 2)
        _, negatives = jax.lax.scan(negative, jnp.zeros(n, bool), keys)
        return jnp.concatenate([jnp.stack([anchor, positive]), negatives])

    keys = jax.random.split(key, len(anchors))
    return jax.vmap(one_tuple)(keys, anchors).astype(jnp.int32)
