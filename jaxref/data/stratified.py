"""Batches that hold targets of every size, the rare ones too."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval


def stratified_batches(labels: ArrayLike, batch_size: int, *, key: Array) -> Array:
    """An epoch of batches, each with one example from every group of examples of like targets.

    The n examples are sorted by target and cut into `batch_size` groups that differ by one example
    at most. Within each group the order is random; the batch of step t takes the member at t. Where
    groups are smaller than the largest, their last member, of the largest target, comes twice.

    Args:
      labels: `[n]` real numbers, the target of each example.
      batch_size: from 1 to n.
      key: a random key; a new one for each epoch.

    Returns:
      int32 `[⌈n / batch_size⌉, batch_size]`: the examples of each batch, in the
      order of their groups, that of the smallest targets first.

    Raises:
      ValueError: labels that are not of one axis, or a `batch_size` out of its range.

    Use it for regression on rare targets, which uniform batches often lack, with
    `jaxref.losses.cisir_loss`. Every batch then has nearly the targets' distribution of the whole
    set; rare examples are not repeated.

    Cost: a sort of the targets and a shuffle of each group, O(n log n) an epoch.

    Example:
      >>> labels = jnp.array([0.0, 9.0, 0.1, 0.2, 8.0, 0.3])
      >>> batches = jax.jit(stratified_batches, static_argnums=1)(labels, 3, key=jax.random.key(0))
      >>> print(batches.shape, jnp.all(labels[batches[:, 2]] > 7))  # one of the largest in each
      (2, 3) True

    Reference: Moukpe, Chan, Zhang, "Highly Imbalanced Regression with Tabular Data in SEP and Other
    Applications", 2025, arXiv:2509.16339.
    """
    y = jnp.asarray(labels)
    if y.ndim != 1:
        raise ValueError(f"labels must have shape [n], got {y.shape}")
    n = len(y)
    check_interval(1, max(n, 1), batch_size=batch_size)
    steps = -(-n // batch_size)
    group = jnp.arange(batch_size)
    size, larger = n // batch_size, n % batch_size
    start = group * size + jnp.minimum(group, larger)
    member = jnp.minimum(jnp.arange(steps), size + (group < larger)[:, None] - 1)
    groups = jnp.argsort(y)[start[:, None] + member].astype(jnp.int32)
    return jax.random.permutation(key, groups, axis=1, independent=True).T
