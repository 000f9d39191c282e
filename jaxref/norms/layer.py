"""Layer normalization: every example standardised over its own features."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref import kernels
from jaxref.core.checks import check_broadcastable, check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.norms.rms import apply_kernel, normalised_axes, rms_norm, spread_parameter


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Layer normalization: zero mean and unit variance over the features of each example.

    With the mean μ and the biased variance σ² of the H entries along `axis`,

        y = scale · (x - μ) / √(σ² + ε) + bias,   μ = (1/H) Σ_i x_i,   σ² = (1/H) Σ_i (x_i - μ)²

    which is `rms_norm(x - μ)`. Unchanged by `x → a x + b` for a > 0 (up to ε), the same in training
    and evaluation, without state, and independent of the rest of the batch. The variance is that of
    the centred entries, so that a mean far larger than the spread costs no precision.

    Args:
      x: `[...]` floating point, of a size whose square float32 holds: at most about 1e16.
      scale: the gain, of the shape of the normalised axes in the order in which `x` has them.
        Default: 1.
      bias: of the same shape. Default: 0.
      axis: the axis or axes to normalise over.
      epsilon: ε at least 0, added to the variance. Default 1e-6 as in Flax; PyTorch has 1e-5.
      where: boolean, broadcastable to `x`: the entries that exist. The others count for nothing and
        come out 0. Default: all.
      implementation: "xla"; or a kernel of `jaxref.kernels`, "pallas" or another name of
        `jaxref.kernels.implementation`: one pass over memory forward and one backward, without
        `jax.jvp` or `where`. Default: XLA, which joins a norm to what stands around it.

    Returns:
      y of the shape and type of `x`, computed in at least float32; equals `bias` where the admitted
      entries are all equal, with a finite gradient for any ε.

    Raises:
      ValueError: `axis` out of range or over no entries, `scale` or `bias` not of the normalised
        shape, a mask that is not boolean or does not broadcast, a negative `epsilon`, or an
        `implementation` that does not exist or cannot run.
      TypeError: `x`, `scale` or `bias` is not floating point.

    Use it in transformers and recurrent networks, where batch statistics are unreliable;
    `rms_norm` is cheaper and as good where the mean carries no information.

    Cost: three reductions over the features (largest entry, mean, variance), where `rms_norm` has
    one; a kernel reads `x` once. No state.

    Example:
      >>> y = layer_norm(jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
      >>> print(y.round(3))
      [[-1.225  0.     1.225]
       [-1.225  0.     1.225]]

    Reference: Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    axes = normalised_axes(axis, x.shape)
    check_broadcastable(x.shape, where=where)
    if implementation not in (None, "xla"):
        kernel = partial(kernels.layer_norm, epsilon=epsilon, implementation=implementation)
        return apply_kernel(kernel, x, axes, where, scale=scale, bias=bias)
    wide = x.astype(compute_dtype(x))
    # Measured from one of its own entries, the mean of equal entries is exact.
    admitted = wide if where is None else jnp.where(where, wide, jnp.finfo(wide.dtype).min)
    wide -= jax.lax.stop_gradient(jnp.max(admitted, axis=axes, keepdims=True))
    centred = wide - masked_mean(wide, axis=axes, where=where, keepdims=True)
    y = rms_norm(centred, scale, axis=axes, epsilon=epsilon, where=where)
    if bias is not None:
        y += spread_parameter("bias", bias, axes, x.shape)
        if where is not None:
            y = jnp.where(where, y, 0.0)
    return y.astype(x.dtype)
