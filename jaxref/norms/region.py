"""Region normalization: for inpainting, the hole and the rest of an image each by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.norms.layer import layer_norm
from jaxref.norms.rms import spread_parameter


def region_norm(
    x: ArrayLike,
    region_labels: ArrayLike,
    *,
    num_regions: int = 2,
    per_sample: bool = True,
    epsilon: float = 1e-5,
) -> Array:
    r"""Region normalization: zero mean and unit variance over each region of an image.

    With the mean μ_r and the biased variance σ_r² of a channel over the pixels of region r,

        y = (x - μ_r) / √(σ_r² + ε)   at the pixels of r

    which is instance normalization where all of an image is one region. What one region holds
    changes nothing in another.

    Args:
      x: `[batch, height, width, features]` floating point; at most about 1e16 in size.
      region_labels: integers in [0, num_regions), broadcastable to `[batch, height, width, 1]`.
      num_regions: the number of regions, at least 1. Default 2.
      per_sample: take the statistics of each image. False: those of a region in all of the batch,
        as the authors' code does.
      epsilon: ε at least 0, added to the variances. Default 1e-5.

    Returns:
      y of the shape and type of `x`, computed in at least float32; 0 where a region's pixels are
      all equal and where the label is none of the regions, with finite gradients.

    Raises:
      ValueError: `x` not of four axes, labels that do not broadcast, `num_regions` below 1, or a
        negative `epsilon`.
      TypeError: `x` is not floating point or the labels are not integers.

    Use `region_norm_basic` where the hole is known, which also has parameters, and
    `region_norm_learnable` where it has been filled by earlier layers; this is the core of both.

    Cost: for each region, the reductions of `layer_norm` over the whole image, under a mask.

    Example:
      >>> x = jnp.array([1.0, 3.0, 100.0, 300.0]).reshape(1, 1, 4, 1)
      >>> labels = jnp.array([0, 0, 1, 1]).reshape(1, 1, 4, 1)
      >>> print(region_norm(x, labels).round(3).ravel())
      [-1.  1. -1.  1.]

    Reference: Yu et al., "Region Normalization for Image Inpainting", 2019, arXiv:1911.10375.
    """
    x = _image(x)
    check_interval(1, jnp.inf, num_regions=num_regions)
    check_broadcastable((*x.shape[:3], 1), region_labels=region_labels)
    if not jnp.issubdtype(jnp.result_type(region_labels), jnp.integer):
        raise TypeError(f"region_labels must be integers, got {jnp.result_type(region_labels)}")
    labels = jnp.asarray(region_labels)
    axes = (1, 2) if per_sample else (0, 1, 2)
    y = jnp.zeros_like(x)
    for region in range(num_regions):
        y += layer_norm(x, axis=axes, epsilon=epsilon, where=labels == region)
    return y


def region_norm_basic(
    x: ArrayLike,
    mask: ArrayLike,
    foreground_scale: ArrayLike | None = None,
    foreground_bias: ArrayLike | None = None,
    background_scale: ArrayLike | None = None,
    background_bias: ArrayLike | None = None,
    *,
    per_sample: bool = True,
    epsilon: float = 1e-5,
) -> Array:
    r"""Region normalization by a given mask, each region with parameters of its own (RN-B).

        y = (1 + g_f) · x̂ + b_f  where the mask is 1,   y = (1 + g_b) · x̂ + b_b  where it is 0

    with x̂ = `region_norm(x, mask)`. The mask is brought to the size of x by its nearest
    neighbours: row i of H takes row ⌊i h / H⌋ of the mask's h, and columns likewise.

    The authors' code adds b_f + b_b at every pixel: to use weights of theirs, set both biases to
    that sum.

    Args:
      x: `[batch, height, width, features]` floating point; at most about 1e16 in size.
      mask: `[batch or 1, h, w, 1]`, boolean, or numbers that are 0 or 1; from 1/2 on a pixel is
        foreground, as valid pixels are in inpainting.
      foreground_scale: g_f `[features]`, what the gain has above 1. Default: 0, also its initial
        value.
      foreground_bias: b_f `[features]`. Default: 0.
      background_scale: g_b `[features]`. Default: 0, also its initial value.
      background_bias: b_b `[features]`. Default: 0.
      per_sample: take the statistics of each image. False: those of a region in all of the batch,
        as the authors' code does.
      epsilon: ε at least 0, added to the variances. Default 1e-5. The authors' code has ε N / N_r
        for a region of N_r of the N pixels.

    Returns:
      y of the shape and type of `x`, computed in at least float32. No gradient reaches the mask.

    Raises:
      ValueError: `x` or `mask` not of four axes, a mask of another batch or of several channels,
        parameters not of shape `[features]`, or a negative `epsilon`.
      TypeError: `x` or a parameter is not floating point.

    Use it in the first layers of an inpainting network, where the mask tells the hole's pixels
    from others; later `region_norm_learnable`.

    Cost: two masked norms of the whole image; four parameters a channel.

    Example:
      >>> x = jnp.array([1.0, 3.0, 0.0, 0.0]).reshape(1, 1, 4, 1)
      >>> mask = jnp.array([True, False]).reshape(1, 1, 2, 1)
      >>> print(region_norm_basic(x, mask, background_bias=jnp.array([9.0])).round(3).ravel())
      [-1.  1.  9.  9.]

    Reference: Yu et al., "Region Normalization for Image Inpainting", 2019, arXiv:1911.10375.
    """
    x = _image(x)
    foreground = _resized(mask, x.shape)
    wide = x.astype(compute_dtype(x))
    y = region_norm(
        wide, foreground.astype(jnp.int32), num_regions=2, per_sample=per_sample, epsilon=epsilon
    )
    for inside, name, gain, shift in (
        (foreground, "foreground", foreground_scale, foreground_bias),
        (~foreground, "background", background_scale, background_bias),
    ):
        if gain is not None:
            y = jnp.where(
                inside, y * (1 + spread_parameter(f"{name}_scale", gain, (3,), x.shape)), y
            )
        if shift is not None:
            y = jnp.where(inside, y + spread_parameter(f"{name}_bias", shift, (3,), x.shape), y)
    return y.astype(x.dtype)


def region_norm_learnable(
    x: ArrayLike,
    attention_kernel: ArrayLike,
    scale_kernel: ArrayLike,
    scale_bias: ArrayLike,
    bias_kernel: ArrayLike,
    bias_bias: ArrayLike,
    *,
    threshold: float = 0.8,
    per_sample: bool = True,
    epsilon: float = 1e-5,
) -> Array:
    r"""Region normalization by regions that the layer finds itself (RN-L).

        s = region_attention_map(x, W_s),   region = [s ≥ threshold]
        y = region_norm(x, region) · (1 + conv(s, W_γ) + b_γ) + conv(s, W_β) + b_β

    so that each pixel has a gain and a bias, shared by its channels. The regions carry no gradient:
    W_s learns through the gain and the bias alone.

    Args:
      x: `[batch, height, width, features]` floating point; at most about 1e16 in size.
      attention_kernel: W_s `[k, l, 2, 1]`; the paper's are 7 by 7.
      scale_kernel: W_γ `[k, l, 1, 1]`.
      scale_bias: b_γ `[1]`.
      bias_kernel: W_β `[k, l, 1, 1]`.
      bias_bias: b_β `[1]`.
      threshold: the importance in (0, 1) from which a pixel is of the first region. Default 0.8.
      per_sample: take the statistics of each image. False: those of a region in all of the batch,
        as the authors' code does.
      epsilon: ε at least 0, added to the variances. Default 1e-5. The authors' code has ε N / N_r
        for a region of N_r of the N pixels.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: shapes that do not fit, `threshold` not in (0, 1), or a negative `epsilon`.
      TypeError: an array that is not floating point.

    Use it in the later layers of an inpainting network, where the hole is partly filled and the
    mask says little; before that `region_norm_basic`.

    Cost: two masked norms of the whole image and three convolutions to one channel; 4 k l + 2
    parameters.

    Example:
      >>> x = jnp.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 4, 1)
      >>> kernel, none, zero = jnp.ones((1, 1, 2, 1)), jnp.zeros((1, 1, 1, 1)), jnp.zeros(1)
      >>> y = region_norm_learnable(x, kernel / 3, none, zero, none, zero)  # s ≥ 0.8 from x = 2.1
      >>> y.ravel().tolist()
      [0.000, -0.991, -0.379, 1.369]

    Reference: Yu et al., "Region Normalization for Image Inpainting", 2019, arXiv:1911.10375.
    """
    x = _image(x)
    check_interval(0, 1, closed="neither", threshold=threshold)
    importance = region_attention_map(x.astype(compute_dtype(x)), attention_kernel)
    regions = (importance >= threshold).astype(jnp.int32)
    y = region_norm(x.astype(importance.dtype), regions, per_sample=per_sample, epsilon=epsilon)
    gain = _same_convolution(importance, "scale_kernel", scale_kernel)
    shift = _same_convolution(importance, "bias_kernel", bias_kernel)
    for name, parameter in (("scale_bias", scale_bias), ("bias_bias", bias_bias)):
        check_floating(**{name: parameter})
        check_shape((1,), **{name: parameter})
    return (y * (1 + gain + scale_bias) + shift + bias_bias).astype(x.dtype)


def region_attention_map(x: ArrayLike, kernel: ArrayLike) -> Array:
    r"""How much each pixel looks like valid content: the map by which RN-L finds its regions.

        s = sigmoid(conv([mean_c x, max_c x], kernel))

    over the channels c, with zeros around the image, so that s has its size.

    Args:
      x: `[batch, height, width, features]` floating point.
      kernel: `[k, l, 2, 1]`, for the mean and the maximum in this order.

    Returns:
      s `[batch, height, width, 1]` in (0, 1), of the type of `x`, computed in at least float32.

    Raises:
      ValueError: `x` not of four axes, or a kernel of another shape.
      TypeError: `x` or `kernel` is not floating point.

    Use it to look at the regions that `region_norm_learnable` has learned.

    Cost: two reductions over the channels, and a convolution from two channels to one.

    Example:
      >>> x = jnp.array([[1.0, 3.0], [-2.0, 2.0]]).reshape(1, 1, 2, 2)
      >>> kernel = jnp.array([1.0, -1.0]).reshape(1, 1, 2, 1)
      >>> region_attention_map(x, kernel).ravel().tolist()
      [0.269, 0.119]

    Reference: Yu et al., "Region Normalization for Image Inpainting", 2019, arXiv:1911.10375.
    """
    x = _image(x)
    wide = x.astype(compute_dtype(x))
    pooled = jnp.concatenate(
        [jnp.mean(wide, axis=3, keepdims=True), jnp.max(wide, axis=3, keepdims=True)], axis=3
    )
    return jax.nn.sigmoid(_same_convolution(pooled, "kernel", kernel)).astype(x.dtype)


def _image(x: ArrayLike) -> Array:
    check_floating(x=x)
    if jnp.ndim(x) != 4 or jnp.size(x) == 0:
        raise ValueError(
            f"x must have shape [batch, height, width, features] and hold entries, got "
            f"{jnp.shape(x)}"
        )
    return jnp.asarray(x)


def _resized(mask: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Whether a pixel of an image of `shape` is foreground, `[batch or 1, height, width, 1]`."""
    batch, height, width, _ = shape
    given = jnp.shape(mask)
    if len(given) != 4 or given[0] not in (1, batch) or 0 in given[1:3] or given[3] != 1:
        raise ValueError(f"mask must have shape [{batch} or 1, h, w, 1], got {given}")
    rows, columns = (np.arange(n) * m // n for n, m in ((height, given[1]), (width, given[2])))
    return (jnp.asarray(mask) >= 0.5)[:, rows][:, :, columns]


def _same_convolution(x: Array, name: str, kernel: ArrayLike) -> Array:
    """To one channel, in the type of `x`, of its size."""
    check_floating(**{name: kernel})
    kernel = jnp.asarray(kernel)
    check_shape((*kernel.shape[:2], x.shape[3], 1), **{name: kernel})
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",  # accelerators round float32 products by default
    )
