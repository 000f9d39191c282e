"""Gradient surgery: an auxiliary loss's gradient without what opposes the main one's."""

import jax
import jax.numpy as jnp
import optax

from jaxref.core.checks import check_same_tree
from jaxref.optimizers.common import store, widen


def align_gradients(primary_grads: optax.Updates, auxiliary_grads: optax.Updates) -> optax.Updates:
    r"""The sum of two gradients, the second less its part that opposes the first.

        g_k ← g_k - (⟨g_k, g_c⟩ / ||g_c||²) g_c   where ⟨g_k, g_c⟩ < 0
        g = g_c + g_k

    for the gradients g_c = primary_grads and g_k = auxiliary_grads, each as one vector over all
    parameters. Afterwards the two do not conflict, and to first order a step along g lowers the
    primary loss by as much as one along g_c would.

    Args:
      primary_grads: g_c, a tree of floating arrays, such as the gradients of the cross-entropy.
      auxiliary_grads: g_k, a tree like it, such as those of a distillation loss. Parameters that
        only one of the losses reaches have the gradient 0 in the other's tree.

    Returns:
      g, a tree like the gradients and of the types of `primary_grads`, computed in at least
      float32. g_c = 0 leaves g_k as it is.

    Raises:
      ValueError: trees that do not match.

    Use it before the optimizer, on the weighted gradients of `distillation_value_and_grads`;
    `distillation_oriented_sgd` keeps a momentum for each of the two instead.

    Cost: two inner products over all parameters, and both gradients at once; no state.

    Example:
      >>> print(align_gradients(jnp.array([1.0, 0.0]), jnp.array([-3.0, 2.0])))
      [1. 2.]

    Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits
    Utilization with an Auxiliary Head", 2024, arXiv:2411.08937.
    """
    check_same_tree(primary_grads, auxiliary_grads=auxiliary_grads)
    primary, auxiliary = widen(primary_grads), widen(auxiliary_grads)
    # at size 1 the products neither over- nor underflow
    unit, _ = _over_largest(primary)
    direction, size = _over_largest(auxiliary)
    product, square = optax.tree.vdot(direction, unit), optax.tree.vdot(unit, unit)
    opposing = jnp.minimum(product, 0.0) / jnp.where(square > 0, square, 1.0) * size
    aligned = jax.tree.map(lambda c, k, u: c + (k - opposing * u), primary, auxiliary, unit)
    return store(aligned, primary_grads)


def _over_largest(tree: optax.Updates) -> tuple[optax.Updates, jax.Array]:
    """The tree over the largest size in it, and that size; as it is where that is 0."""
    sizes = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack(sizes), initial=0.0) if sizes else jnp.float32(0)
    scale = jnp.where(largest > 0, largest, 1.0)
    return jax.tree.map(lambda x: x / scale, tree), scale
