"""Parts of a data set for cross-validation."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval


def stratified_k_fold(labels: ArrayLike, *, num_folds: int, key: Array) -> Array:
    """Deals examples out to folds at random, with every class spread evenly over them.

    Shuffled and sorted by class, the ith example goes to fold i mod num_folds, the folds in random
    order. So the folds differ by at most one example, and by at most one of each class.

    Args:
      labels: `[examples]` integers, the class of each example; any values.
      num_folds: at least 2, and at most the number of examples.
      key: a random key.

    Returns:
      int32 `[examples]`, the fold of each example, from 0 to num_folds - 1. Train on
      `fold != k` and measure on `fold == k`, for each k.

    Raises:
      ValueError: labels that are not of one axis, or `num_folds` out of its range.
      TypeError: labels that are not integers.

    Use it for small or imbalanced data, where one held-out part would decide by chance. A class
    with fewer examples than folds is missing from some.

    Cost: a shuffle and a sort, O(n log n); num_folds models are then trained.

    Example:
      >>> labels = jnp.array([0, 1, 0, 0, 1, 0])
      >>> fold = stratified_k_fold(labels, num_folds=2, key=jax.random.key(0))
      >>> [labels[fold == k].sum().item() for k in range(2)]
      [1, 1]

    Reference: Shamanth, Mathias, Vijayalakshmi, "Detection of fake faces in videos", 2022,
    arXiv:2201.12051.
    """
    y = jnp.asarray(labels)
    if y.ndim != 1:
        raise ValueError(f"labels must have shape [examples], got {y.shape}")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {y.dtype.name}")
    check_interval(2, len(y), num_folds=num_folds)
    example_key, fold_key = jax.random.split(key)
    shuffled = jax.random.permutation(example_key, len(y))
    by_class = shuffled[jnp.argsort(y[shuffled])]
    folds = jax.random.permutation(fold_key, num_folds).astype(jnp.int32)
    return jnp.zeros(len(y), jnp.int32).at[by_class].set(folds[jnp.arange(len(y)) % num_folds])
