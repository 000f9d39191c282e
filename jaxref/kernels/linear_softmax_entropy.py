"""Entropy of a linear head's softmax, whose logits never exist as a whole.

It needs no kernel of its own. With logits l = h W, H = log Z - Σ_j p_j l_j, and of the
cross-entropy L = log Z - l_y the gradient is ∂L/∂h = W (p - onehot(y)), so that

    h · ∂L/∂h = Σ_j p_j l_j - l_y   and   H = L - h · ∂L/∂h

whatever the label y.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.kernels.linear_softmax_cross_entropy import linear_softmax_cross_entropy


def linear_softmax_entropy(
    hidden: ArrayLike, kernel: ArrayLike, *, where: ArrayLike | None = None, **options: Any
) -> Array:
    r"""Entropy of the softmax of the logits `hidden @ kernel`, without storing them.

        H = log Z - Σ_j p_j l_j,   l = h W,   p = softmax(l),   Z = Σ_j exp l_j

    Args:
      hidden: `[..., features]` floating point, the inputs of the head.
      kernel: `[features, vocabulary]` floating point, the head's weights.
      where: boolean, broadcastable to `[...]`: the tokens that count. Default: all.
      **options: `blocks`, `axis_name` and `implementation` of `linear_softmax_cross_entropy`.

    Returns:
      H `[...]` in nats, in [0, log vocabulary] up to rounding, in the type of `hidden` and without
      gradient; 0 where `where` is False.

    Raises:
      ValueError, TypeError: as `linear_softmax_cross_entropy`.

    Use it to watch or to weigh by how sure a language model is, token by token. Rounding is of the
    size of the logits, whatever H.

    Cost: that of `linear_softmax_cross_entropy` with its gradients, of which that of the kernel is
    dropped; a block of logits in memory.

    Example:
      >>> hidden, kernel = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.eye(2)
      >>> print(linear_softmax_entropy(hidden, kernel).round(4))
      [0.5822 0.6931]
    """
    check_floating(hidden=hidden, kernel=kernel)
    dtype = compute_dtype(hidden)
    h = jax.lax.stop_gradient(jnp.asarray(hidden).astype(dtype))
    w = jax.lax.stop_gradient(jnp.asarray(kernel))
    labels = jnp.zeros(h.shape[:-1], jnp.int32)
    losses, pull = jax.vjp(
        partial(linear_softmax_cross_entropy, kernel=w, labels=labels, where=where, **options), h
    )
    (slope,) = pull(jnp.ones_like(losses))
    return (losses - jnp.sum(h * slope, axis=-1)).astype(jnp.result_type(hidden))
