"""What happens along the depth of a residual network: its stream, its gradients, its use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.figures import new_axes
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def pre_ln_variance_growth(
    depth: int, sublayer_variances: ArrayLike, *, scaling: bool = False
) -> np.ndarray:
    r"""The variance of a pre-norm model's stream after each block, at initialisation.

        s_0 = 1,   s_l = s_{l-1} + c_l         pre-norm
                   s_l = s_{l-1} + c_l / l     with LayerNorm Scaling

    c_l is what block l, all its sublayers together, adds to the stream for a normalised input. For
    c_l = c the stream grows as 1 + c L, or with scaling as 1 + c ln L.

    Args:
      depth: L, the number of blocks, at least 1.
      sublayer_variances: c_l at least 0, `[depth]` or one number for all.
      scaling: whether norms are followed by the factor 1 / √l of
        `jaxref.norms.layer_norm_scaling`. Default: no.

    Returns:
      s `[depth + 1]` from s_0 on, computed in float64 on the host.

    Raises:
      ValueError: `depth` below 1, variances that are negative or of another shape.

    Use it beside the variances that `hidden_state_statistics` measures: it holds while sublayers
    are independent of the stream; trained pre-norm models grow faster.

    Cost: O(depth) on the host, without a model.

    Example:
      >>> print(pre_ln_variance_growth(4, 1.0))
      [1. 2. 3. 4. 5.]
      >>> print(pre_ln_variance_growth(4, 1.0, scaling=True).round(2))
      [1.   2.   2.5  2.83 3.08]

    Reference: Sun et al., "The Curse of Depth in Large Language Models", 2025, arXiv:2502.05795.
    """
    check_interval(1, np.inf, depth=depth)
    added = np.asarray(sublayer_variances, float)
    check_interval(0, np.inf, sublayer_variances=added)
    check_broadcastable((depth,), sublayer_variances=added)
    added = np.broadcast_to(added, depth) / (np.arange(1, depth + 1) if scaling else 1)
    return np.cumsum(np.append(1.0, added))


class DepthStatistics(NamedTuple):
    """What the stream looks like at each depth, by `hidden_state_statistics`.

    Attributes:
      variance: `[layers]`; over the tokens and channels.
      max_abs: `[layers]`; the largest activation.
      massive_ratio: `[layers]`; the largest activation over the median one, both in size.
      gradient_norm: `[layers]`; of the loss with respect to the stream there, or None.
    """

    variance: Array
    max_abs: Array
    massive_ratio: Array
    gradient_norm: Array | None = None


def hidden_state_statistics(
    hidden_states: ArrayLike | Sequence[ArrayLike],
    *,
    gradients: ArrayLike | Sequence[ArrayLike] | None = None,
    where: ArrayLike | None = None,
) -> DepthStatistics:
    r"""Variance, largest activation and gradient of the stream at each depth.

        variance = mean((x - mean(x))²),   massive ratio = max|x| / median|x|

    over all tokens and channels of one depth, and ‖∂L/∂x‖ where gradients are given.

    Args:
      hidden_states: x, `[layers, ..., features]` floating point, or a sequence of `[..., features]`
        of one shape: the stream before the first block and after each.
      gradients: of a loss with respect to them, of the same shapes. Default: none.
      where: boolean, broadcastable to `[..., features]`: the entries that exist, such as
        `tokens[..., None] != padding`. Default: all.

    Returns:
      `DepthStatistics` in at least float32. The massive ratio is inf where more than half of the
      entries are 0; everything is 0 where all of them are, or none exists.

    Raises:
      ValueError: shapes that differ, no layers, or a mask that is not boolean or does not
        broadcast.
      TypeError: an array that is not floating point.

    Use it at initialisation and along training: post-norm streams keep their variance and lose
    gradient towards the input, pre-norm streams grow without bound, Peri-LN streams linearly. A
    massive ratio of thousands makes half precision and quantization fail.

    Cost: three passes over the stream and a sort of each layer's entries for the median; the stack
    of all layers in memory.

    Example:
      >>> stream = [jnp.array([[1.0, -1.0]]), jnp.array([[3.0, -1.0]])]
      >>> print(hidden_state_statistics(stream).variance)
      [1. 4.]

    Reference: Kim et al., "Peri-LN: Revisiting Layer Normalization in the Transformer
    Architecture", 2025, arXiv:2502.02732.
    """
    states = _stack("hidden_states", hidden_states)
    check_broadcastable(states.shape[1:], where=where)
    axes = tuple(range(1, states.ndim))
    if where is not None:
        where = jnp.broadcast_to(where, states.shape)
    mean = masked_mean(states, axis=axes, where=where, keepdims=True)
    variance = masked_mean(jnp.square(states - mean), axis=axes, where=where)
    size = jnp.abs(states)
    max_abs = jnp.max(size, axis=axes, initial=0.0, where=where)
    median = jnp.nanmedian(size if where is None else jnp.where(where, size, jnp.nan), axis=axes)
    ratio = jnp.where(max_abs > 0, max_abs / median, 0.0)
    norm = None
    if gradients is not None:
        gradient = _stack("gradients", gradients)
        check_shape(states.shape, gradients=gradient)
        if where is not None:
            gradient = jnp.where(where, gradient, 0.0)
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=axes))
    return DepthStatistics(variance, max_abs, ratio, norm)


def _stack(name: str, arrays: ArrayLike | Sequence[ArrayLike]) -> Array:
    layers = list(arrays)  # type: ignore[arg-type]  # of an array: its first axis
    if not layers:
        raise ValueError(f"{name} must hold at least one layer")
    for i, layer in enumerate(layers):
        check_floating(**{f"{name}[{i}]": layer})
        check_shape(jnp.shape(layers[0]), **{f"{name}[{i}]": layer})
    stacked = jnp.stack(layers)
    return stacked.astype(compute_dtype(stacked))


def layer_gradient_norms(grads: Any, *, layer_axis: int | None = None) -> Array:
    r"""The norm of the gradient of each layer's parameters.

        ‖g_l‖ = √(Σ over parameters and their entries g²)

    Args:
      grads: a sequence with one tree of gradients a layer, in order; or, with `layer_axis`, one
        tree whose leaves hold all layers along that axis, as scanned models have them.
      layer_axis: the axis of the layers in every leaf. Default: `grads` is a sequence.

    Returns:
      `[layers]` in at least float32.

    Raises:
      ValueError: no layer or no gradient, a `layer_axis` out of range, or leaves that differ in
        their number of layers.
      TypeError: a gradient that is not floating point.

    Use it to see which layers learn: with pre-norm the norms fall with depth, and deep layers
    change little; `jaxref.norms.norm_placement` mixes pre- with post-norm against that.

    Cost: one pass over the gradients of one backward pass.

    Example:
      >>> grads = [{"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 1.0])}]
      >>> print(layer_gradient_norms(grads))
      [5. 1.]

    Reference: Li, Yin, Liu, "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and
    Post-LN", 2024, arXiv:2412.13795.
    """

    def squares(path: Any, gradient: ArrayLike, axes: tuple[int, ...]) -> Array:
        check_floating(**{"grads" + jax.tree_util.keystr(path): gradient})
        gradient = jnp.asarray(gradient)
        return jnp.sum(jnp.square(gradient.astype(compute_dtype(gradient))), axis=axes)

    if layer_axis is None:
        trees = [jax.tree_util.tree_leaves_with_path(layer) for layer in grads]
        if not trees or not all(trees):
            raise ValueError("grads must hold a gradient for each of at least one layer")
        every = lambda gradient: tuple(range(jnp.ndim(gradient)))  # noqa: E731
        sums = [sum(squares(path, g, every(g)) for path, g in leaves) for leaves in trees]
        return jnp.sqrt(jnp.stack(sums))
    total: Array | None = None
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        (layers,) = canonical_axes(layer_axis, jnp.ndim(gradient), name="layer_axis")
        others = tuple(a for a in range(jnp.ndim(gradient)) if a != layers)
        square = squares(path, gradient, others)
        if total is not None and square.shape != total.shape:
            name = "grads" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} must have {total.size} layers, got {square.size}")
        total = square if total is None else total + square
    if total is None:
        raise ValueError("grads must hold at least one gradient")
    return jnp.sqrt(total)


def layer_removal_drop(
    loss_fn: Callable[[Any, Array], ArrayLike], params: Any, layers: int
) -> Array:
    r"""How much worse a model gets when one of its blocks is skipped, for each block.

        drop_l = L(all but block l) - L(all)

    Args:
      loss_fn: `loss_fn(params, keep) -> scalar`, with `keep` boolean `[layers]`: block l gives
        `jnp.where(keep[l], block(x), x)`.
      params: the parameters, passed on.
      layers: the number of blocks, at least 1.

    Returns:
      `[layers]` in the type of the loss: near 0 for a block that the model does not need, negative
      for one that it is better without.

    Raises:
      ValueError: `layers` below 1, or a loss that is not a scalar.

    Use it on a trained model: at initialisation no block is of use.
    `jaxref.analysis.angular_distance` tells without a loss which blocks do next to nothing.

    Cost: `layers + 1` losses, that is forward passes, one after the other.

    Example:
      >>> add = lambda params, keep: (params * keep).sum()
      >>> print(layer_removal_drop(add, jnp.array([-1.0, -0.5]), 2))
      [1.  0.5]

    Reference: Li, Yin, Liu, "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and
    Post-LN", 2024, arXiv:2412.13795.
    """
    check_interval(1, np.inf, layers=layers)
    keep = ~np.eye(layers + 1, layers, dtype=bool)  # the last row keeps all

    def loss(row: Array) -> Array:
        value = jnp.asarray(loss_fn(params, row))
        check_shape((), **{"the value of loss_fn": value})
        return value

    losses = jax.lax.map(loss, jnp.asarray(keep))
    return losses[:-1] - losses[-1]


def plot_depth_statistics(curves: Mapping[str, DepthStatistics], *, ax: Any = None) -> Any:
    """Draws the variance of the stream by depth, one line a model.

    Args:
      curves: statistics by the name of the model, such as one for each placement of the norms.
      ax: matplotlib axes. Default: those of a new figure.

    Returns:
      The axes, logarithmic in the variance.

    Raises:
      ValueError: no curves.

    Use it on `hidden_state_statistics` of models of one depth: on this scale exponential growth is
    straight, and linear growth bends.

    Cost: one line for each model, on the host.

    Example:
      >>> stream = [jnp.array([[1.0, -1.0]]), jnp.array([[3.0, -1.0]])]
      >>> plot_depth_statistics({"pre": hidden_state_statistics(stream)}).get_xlabel()
      'blocks passed'

    Reference: Kim et al., "Peri-LN: Revisiting Layer Normalization in the Transformer
    Architecture", 2025, arXiv:2502.02732.
    """
    if not curves:
        raise ValueError("curves must hold at least one model")
    ax = new_axes() if ax is None else ax
    for name, statistics in curves.items():
        ax.plot(np.asarray(statistics.variance), label=name)
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("blocks passed")
    ax.set_ylabel("variance of the stream")
    ax.legend(frameon=False)
    return ax
