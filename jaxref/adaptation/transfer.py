"""Transfer of pretrained weights to inputs of another form."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_floating, check_interval


def inflate_input_channels(kernel: ArrayLike, channels: int, *, axis: int = -2) -> Array:
    r"""A first layer's kernel for another number of input channels (inter-modal transfer).

        K'_m = (C / M) mean_c K_c   for m = 1 ... M

    Every one of the M channels gets the mean of the C pretrained ones, scaled so that an input that
    is the same in all channels has the response that it had: weights learned on colour images then
    serve for the channels of a multichannel spectrogram.

    Args:
      kernel: pretrained, floating point, its C input channels at `axis`.
      channels: M at least 1.
      axis: the input channels'. Default -2, as in flax's convolutions `[..., in, out]`.

    Returns:
      The kernel with M channels at `axis`, in the type of `kernel`.

    Raises:
      ValueError: an axis that is not there, or `channels` below 1.
      TypeError: a kernel that is not floating point.

    Use it on the first convolution of an image model that is to be fine-tuned on another modality;
    all further layers transfer as they are.

    Cost: one pass over the kernel, which becomes M / C times as large.

    Example:
      >>> rgb = jnp.arange(6.0).reshape(1, 3, 2)
      >>> print(inflate_input_channels(rgb, 4))
      [[[1.5  2.25]
        [1.5  2.25]
        [1.5  2.25]
        [1.5  2.25]]]

    Reference: Watcharasupat et al., "Improving Polyphonic Sound Event Detection on Multichannel
    Recordings with the Sørensen-Dice Coefficient Loss and Transfer Learning", 2021,
    arXiv:2107.10471.
    """
    check_floating(kernel=kernel)
    check_interval(1, jnp.inf, channels=channels)
    kernel = jnp.asarray(kernel)
    (axis,) = canonical_axes(axis, kernel.ndim)
    total = jnp.sum(kernel, axis=axis, keepdims=True, dtype=jnp.promote_types(kernel, jnp.float32))
    return jnp.repeat(total / channels, channels, axis=axis).astype(kernel.dtype)
