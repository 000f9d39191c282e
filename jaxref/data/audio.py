"""Augmentation of multichannel audio: masks over spectrograms, and turned recordings."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_interval

# Where the four microphones of a tetrahedral array are: signs of x (front), y (left), z (up).
_TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


def spec_augment_mask(
    key: Array,
    shape: tuple[int, ...],
    *,
    time_width: int,
    frequency_width: int,
    time_masks: int = 2,
    frequency_masks: int = 2,
) -> Array:
    r"""Random bands of time and of frequency to blank out of a spectrogram (SpecAugment).

    Each band has a width uniform in {0 ... width} and a place uniform where it fits.

    Args:
      key: a random key.
      shape: `[..., time, frequency]`; each of the leading indices gets its own bands.
      time_width: the largest width of a band of time, in frames, from 0 to `time`.
      frequency_width: the largest width of a band of frequency, in bins, from 0 to `frequency`.
      time_masks: how many bands of time, at least 0. Default 2.
      frequency_masks: how many bands of frequency, at least 0. Default 2.

    Returns:
      Booleans of `shape`: False in the bands, True in what is kept.

    Raises:
      ValueError: a shape of fewer than two axes, or numbers out of their range.

    Use it as `jnp.where(mask, spectrogram, fill)`, all channels of a recording under one mask, with
    the mean for `fill`; labels of events stay.

    Cost: masks · (time + frequency) comparisons and a boolean an entry, for each spectrogram.

    Example:
      >>> mask = spec_augment_mask(jax.random.key(0), (6, 8), time_width=2, frequency_width=3)
      >>> print(mask.any(axis=1).sum() >= 2, mask.any(axis=0).sum() >= 2)
      True True

    Reference: Watcharasupat et al., "Improving Polyphonic Sound Event Detection on Multichannel
    Recordings with the Sørensen-Dice Coefficient Loss and Transfer Learning", 2021,
    arXiv:2107.10471, after Park et al., "SpecAugment: A Simple Data Augmentation Method for
    Automatic Speech Recognition", 2019, arXiv:1904.08779.
    """
    if len(shape) < 2:
        raise ValueError(f"shape must be [..., time, frequency], got {shape}")
    *batch, time, frequency = shape
    check_interval(0, time, time_width=time_width)
    check_interval(0, frequency, frequency_width=frequency_width)
    check_interval(0, jnp.inf, time_masks=time_masks, frequency_masks=frequency_masks)
    time_key, frequency_key = jax.random.split(key)
    kept_times = _outside_bands(time_key, tuple(batch), time, time_width, time_masks)
    kept_bins = _outside_bands(
        frequency_key, tuple(batch), frequency, frequency_width, frequency_masks
    )
    return kept_times[..., :, None] & kept_bins[..., None, :]


def channel_swap(
    key: Array,
    x: ArrayLike,
    *,
    array: Literal["ambisonics", "tetrahedral"],
    axis: int = 0,
    signed: bool = True,
) -> Array:
    r"""A recording as if the scene had been turned or mirrored, by a swap of its channels.

    One of the maps `(x, y, z) -> (±x, ±y, ±z)`, with x and y swapped or not, that the array allows,
    all alike likely:

        ambisonics:   the 16 of them; channels W, Y, Z, X are swapped and change sign
        tetrahedral:  the 8 that map the microphones on each other; channels are swapped

    Args:
      key: a random key; take `jax.vmap` over keys and recordings for a map of each.
      x: four channels at `axis`. "ambisonics": first-order, in the order W, Y, Z, X. "tetrahedral":
        microphones at azimuth and elevation (45, 35), (-45, -35), (135, -35), (-135, 35) degrees.
      array: which.
      axis: the channels'. Default: the first.
      signed: whether ambisonic channels can change sign: True (the default) for signals and
        intensity vectors, False for magnitudes and their logarithms.

    Returns:
      An array of the shape and type of `x`.

    Raises:
      ValueError: another array, an axis that is not there or has not four channels.

    Use it on the training data of a direction-blind detector, whose labels stay; where directions
    are labels they would have to turn too.

    Cost: four random bits and one copy of the recording.

    Example:
      >>> wave = jnp.array([1.0, 0.0, 0.0, 1.0])  # from the front
      >>> turned = channel_swap(jax.random.key(0), wave, array="ambisonics")
      >>> print(jnp.abs(turned).sum(), turned[0], turned[2])
      2.0 1.0 0.0

    Reference: Watcharasupat et al., "Improving Polyphonic Sound Event Detection on Multichannel
    Recordings with the Sørensen-Dice Coefficient Loss and Transfer Learning", 2021,
    arXiv:2107.10471, after Mazzon et al., "First order ambisonics domain spatial augmentation for
    DNN-based direction of arrival estimation", 2019, arXiv:1910.04388.
    """
    if array not in ("ambisonics", "tetrahedral"):
        raise ValueError(f'array must be "ambisonics" or "tetrahedral", got {array!r}')
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    if x.shape[axis] != 4:
        raise ValueError(f"x must have 4 channels at axis {axis}, got shape {x.shape}")
    swap, *flips = jax.random.bernoulli(key, shape=(4,))
    sign_x, sign_y, sign_z = (1 - 2 * flip.astype(jnp.int32) for flip in flips)
    if array == "ambisonics":
        order = jnp.where(swap, jnp.array([0, 3, 2, 1]), jnp.arange(4))
        x = jnp.take(x, order, axis=axis)
        if not signed:
            return x
        signs = jnp.stack([jnp.ones_like(sign_x), sign_y, sign_z, sign_x])
        return x * signs.reshape([-1] + [1] * (x.ndim - 1 - axis)).astype(x.dtype)
    # A microphone hears now what was heard where the inverse map takes it: first signs, then swap.
    signs = jnp.stack([sign_x, sign_y, sign_x * sign_y])
    came_from = jnp.asarray(_TETRAHEDRON) * signs
    came_from = jnp.where(swap, came_from[:, jnp.array([1, 0, 2])], came_from)
    order = jnp.argmax(jnp.sum(came_from[:, None] * _TETRAHEDRON, axis=-1), axis=-1)
    return jnp.take(x, order, axis=axis)


def _outside_bands(key: Array, batch: tuple[int, ...], size: int, width: int, number: int) -> Array:
    """Booleans `[*batch, size]`, False in `number` bands of at most `width`."""
    width_key, start_key = jax.random.split(key)
    widths = jax.random.randint(width_key, (*batch, number, 1), 0, width + 1)
    starts = jax.random.randint(start_key, (*batch, number, 1), 0, size - widths + 1)
    index = jnp.arange(size)
    return ~jnp.any((index >= starts) & (index < starts + widths), axis=-2)
