"""Clipping of gradients, unit by unit, against the size of the weights they move."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype

Axes = int | tuple[int, ...] | None


def adaptive_gradient_clip(
    clipping: ArrayLike = 0.01,
    eps: ArrayLike = 1e-3,
    axis: Axes | Callable[[str], Axes] = None,
) -> optax.GradientTransformation:
    r"""Adaptive gradient clipping: no unit's gradient is larger than a part of its weights.

        g_i ← g_i min(1, λ max(‖w_i‖, ε) / ‖g_i‖)     for every unit i

    A unit is what feeds one output: a column of an `[in, out]` kernel, a filter of a convolution.

    Args:
      clipping: λ above 0, the largest ratio of a unit's gradient to its weights. Default 0.01,
        the paper's for batches of 4096; the larger the batch, the smaller it has to be.
      eps: ε at least 0. Default 1e-3: weights that start at zero can leave it.
      axis: the axes of a leaf that run within a unit. None (the default) is all but the last of
        kernels, so `[in, out]`, HWIO and DHWIO; leaves of less than two dimensions are one unit,
        whatever `axis` says, unless it is a function of the leaf's path, "blocks/0/mlp/kernel",
        that returns axes for it.

    Returns:
      the transformation, without state. `update` needs the params. Norms are computed in at least
      float32 and do not overflow; the updates have the gradients' types. A unit whose gradient is
      not finite is passed on as it is.

    Raises:
      ValueError: a number out of its range, an axis that a leaf does not have; in `update`, params
        that are missing or of another structure or shape than the gradients.

    Use it first in an `optax.chain`, to train networks without normalisation at large rates;
    `optax.clip_by_global_norm` knows no weights and one threshold for everything.

    Cost: two passes over gradients and weights for their norms; no state.

    The paper does not clip the last linear layer, which is `optax.masked`'s to leave out.

    Example:
      >>> clip = adaptive_gradient_clip(0.1)
      >>> w, g = jnp.array([[3.0, 0.0], [4.0, 1.0]]), jnp.array([[3.0, 0.06], [4.0, 0.08]])
      >>> print(clip.update(g, clip.init(w), w)[0])
      [[0.3  0.06]
       [0.4  0.08]]

    Reference: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
    Normalization", 2021, arXiv:2102.06171.
    """
    check_interval(0, jnp.inf, closed="neither", clipping=clipping)
    check_interval(0, jnp.inf, eps=eps)

    def init(params):
        del params
        return optax.EmptyState()

    def clip(path, g, w):
        axes = _axes_within_a_unit(axis, path, jnp.ndim(g))
        wide = jnp.asarray(g, compute_dtype(g))
        size = _norm(wide, axes)
        limit = clipping * jnp.maximum(_norm(jnp.asarray(w, compute_dtype(w)), axes), eps)
        clips = size > limit
        factor = jnp.where(clips, limit / jnp.where(clips, size, 1), 1)
        return (wide * factor).astype(jnp.result_type(g))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params must be passed to update: clipping needs them, got None")
        check_same_tree(updates, params=params)
        return jax.tree_util.tree_map_with_path(clip, updates, params), state

    return optax.GradientTransformation(init, update)


def _axes_within_a_unit(axis, path, ndim):
    if callable(axis):
        axes = axis(jax.tree_util.keystr(path, simple=True, separator="/"))
    else:
        axes = axis if ndim >= 2 else None
    if axes is not None:
        return canonical_axes(axes, ndim)
    return tuple(range(ndim - 1 if ndim >= 2 else ndim))


def _norm(x: Array, axes: tuple[int, ...]) -> Array:
    """‖x‖ along the axes, which are kept with size 1, without overflow of the squares."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=axes, keepdims=True))
