"""Group normalization: each example standardised over its positions and groups of channels."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.norms.layer import layer_norm
from jaxref.norms.rms import spread_parameter


def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    groups: int = 32,
    epsilon: float = 1e-5,
) -> Array:
    r"""Group normalization: zero mean and unit variance over each group of channels of an example.

    With the mean μ and the biased variance σ² of the entries of one example and one group, over all
    positions and the C / `groups` neighbouring channels of the group,

        y = scale · (x - μ) / √(σ² + ε) + bias

    One group is layer normalization over the whole example, C groups are instance normalization.
    The same in training and evaluation, without state, and independent of the rest of the batch.

    Args:
      x: `[batch, ..., C]` floating point, channels last; at most about 1e16 in size.
      scale: the gain `[C]`. Default: 1.
      bias: `[C]`. Default: 0.
      groups: a divisor of C, at least 1. Default 32.
      epsilon: ε at least 0, added to the variance. Default 1e-5 as in PyTorch.

    Returns:
      y of the shape and type of `x`, computed in at least float32; equals `bias` where the entries
      of a group are all equal, with a finite gradient for any ε.

    Raises:
      ValueError: `x` without a batch axis or without entries in an example, C not a multiple of
        `groups`, `scale` or `bias` not of shape `[C]`, or a negative `epsilon`.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it in convolutional networks whose batches are too small for `batch_norm`;
    `batch_channel_norm` puts batch statistics in front of it.

    Cost: the reductions of `layer_norm`, over the positions and channels of a group; no state.

    Example:
      >>> print(group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), groups=2).round(3))
      [[-1.  1. -1.  1.]]

    Reference: Wu, He, "Group Normalization", 2018, arXiv:1803.08494.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape [batch, ..., features], got {x.shape}")
    features = x.shape[-1]
    check_groups(groups, features)
    grouped = x.astype(compute_dtype(x)).reshape(*x.shape[:-1], groups, features // groups)
    of_a_group = (*range(1, x.ndim - 1), x.ndim)
    y = layer_norm(grouped, axis=of_a_group, epsilon=epsilon).reshape(x.shape)
    if scale is not None:
        y *= spread_parameter("scale", scale, (x.ndim - 1,), x.shape)
    if bias is not None:
        y += spread_parameter("bias", bias, (x.ndim - 1,), x.shape)
    return y.astype(x.dtype)


def check_groups(groups: int, features: int) -> None:
    """Raises ValueError unless `groups` is an integer of at least 1 that divides `features`."""
    if not isinstance(groups, int) or groups < 1 or features % groups:
        raise ValueError(f"groups must be a divisor of the {features} features, got {groups!r}")
