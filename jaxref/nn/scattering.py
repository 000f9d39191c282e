"""The scattering transform: wavelets and moduli in place of the first, learned convolutions."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype


class MorletFilters(NamedTuple):
    """A bank of filters in the Fourier domain, where all of them are real.

    Attributes:
      psi: `[J, L, height, width]` float64, the wavelets by scale and angle.
      phi: `[height, width]` float64, the low-pass filter of the largest scale.

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """

    psi: np.ndarray
    phi: np.ndarray


@functools.lru_cache(maxsize=16)
def morlet_filter_bank(height: int, width: int, *, J: int, L: int) -> MorletFilters:
    r"""The filters of a scattering transform: Morlet wavelets and a Gaussian.

        g_σ,θ,s(u) = s / (2π σ²) exp(-(v₁² + s² v₂²) / (2σ²)),   v = u in axes turned by θ
        ψ_jl(u) = g_σ,θ,s(u) (exp(i ξ v₁) - κ),   φ(u) = g_σ,0,1(u)

    with σ = 0.8 · 2^j, ξ = 3π/4 · 2^-j, s = 4 / L, θ = (max(⌊L/2⌋ - 1, 0) - l) π / L and κ such
    that ψ has sum 0, for j = 0, ..., J - 1 and l = 0, ..., L - 1; σ = 0.8 · 2^(J-1) for φ. All are
    made periodic with the size of the image.

    Args:
      height, width: size of the image, at least 1.
      J: number of scales, at least 1.
      L: number of angles, at least 1.

    Returns:
      `MorletFilters`, the Fourier transforms of the filters. Do not change the arrays: they are
      kept for the next call.

    Raises:
      ValueError: a size below 1.

    Use it for the wavelets of another transform, or to look at them; `scattering_transform` makes
    its own.

    Cost: 25 · height · width values for each of 2 · J · L + 1 waves, on the host; the filters of 16
    sizes are kept.

    Example:
      >>> filters = morlet_filter_bank(16, 16, J=2, L=4)
      >>> filters.psi.shape, filters.phi.shape
      ((2, 4, 16, 16), (16, 16))

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939; the constants are
    those of Andreux et al., "Kymatio: Scattering Transforms in Python", 2018, arXiv:1812.11214.
    """
    check_interval(1, np.inf, height=height, width=width, J=J, L=L)

    def wave(sigma: float, theta: float, xi: float, slant: float) -> np.ndarray:
        # five periods on each axis, as beyond them the Gaussian is 0
        rows = np.arange(-2 * height, 3 * height)[:, None]
        columns = np.arange(-2 * width, 3 * width)
        along = rows * np.cos(theta) + columns * np.sin(theta)
        across = columns * np.cos(theta) - rows * np.sin(theta)
        envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
        value = envelope * np.exp(1j * xi * along) * slant / (2 * np.pi * sigma**2)
        return value.reshape(5, height, 5, width).sum(axis=(0, 2))

    psi = np.empty((J, L, height, width))
    for j in range(J):
        for angle in range(L):
            theta = (max(L // 2 - 1, 0) - angle) * np.pi / L
            shape = {"sigma": 0.8 * 2**j, "theta": theta, "slant": 4 / L}
            gabor = wave(xi=0.75 * np.pi / 2**j, **shape)
            envelope = wave(xi=0.0, **shape)
            wavelet = gabor - gabor.sum() / envelope.sum() * envelope
            psi[j, angle] = np.fft.fft2(wavelet).real
    phi = np.fft.fft2(wave(0.8 * 2 ** (J - 1), 0.0, 0.0, 1.0)).real
    for filters in (psi, phi):
        filters.setflags(write=False)
    return MorletFilters(psi, phi)


def scattering_channels(J: int, L: int, *, max_order: int = 2) -> int:
    r"""How many maps a scattering transform makes of one channel.

        1 + L J + L² J (J - 1) / 2,   without the last term for max_order = 1

    Args:
      J: number of scales, at least 1.
      L: number of angles, at least 1.
      max_order: 1 or 2. Default 2.

    Returns:
      Their number.

    Raises:
      ValueError: an argument out of its range.

    Use it to size the layer that reads what `scattering_transform` gives, and to choose J, L and
    the order by it.

    Cost: one formula.

    Example:
      >>> scattering_channels(2, 16)
      289

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """
    check_interval(1, np.inf, J=J, L=L)
    if max_order not in (1, 2):
        raise ValueError(f"max_order must be 1 or 2, got {max_order!r}")
    return 1 + L * J + (L * L * J * (J - 1) // 2 if max_order == 2 else 0)


def scattering_transform(images: ArrayLike, *, J: int = 2, L: int = 8, max_order: int = 2) -> Array:
    r"""Maps of an image that hardly move with it: averages of moduli of wavelet transforms.

        S₀ = x ∗ φ,   S₁[j, l] = |x ∗ ψ_jl| ∗ φ,
        S₂[j, l, j', l'] = ||x ∗ ψ_jl| ∗ ψ_j'l'| ∗ φ   for j < j'

    of each channel x, with the filters of `morlet_filter_bank`, taken at every 2^J-th pixel. The
    image is continued by reflection. S is the same for a shift of well below 2^J pixels but for
    little, brings images no further apart, and keeps their energy.

    Args:
      images: `[..., height, width, channels]` floating point.
      J: number of scales, at least 1, with 2^J at most the smaller side. Default 2.
      L: number of angles, at least 1. Default 8, for which the filters are designed.
      max_order: 1 or 2, the number of wavelets in a row. Default 2.

    Returns:
      `[..., ⌊height / 2^J⌋, ⌊width / 2^J⌋, channels · scattering_channels(J, L)]` in the type of
      `images`, computed in at least float32. The maps of a channel are together: S₀, then S₁ by
      scale and angle, then S₂ in the same order of its first wavelet, then of its second.

    Raises:
      ValueError: sizes out of range, another `max_order`, or images of fewer than three axes.
      TypeError: images that are not floating point.

    Use it as the fixed first layers of a network for few images; `jaxref.models.ScatSimCLR` is one.

    Cost: no parameters; Fourier transforms of J · L + L² · J (J - 1) / 2 maps a channel, O(N log N)
    each for N pixels; memory of L images at a time.

    Example:
      >>> transform = jax.jit(lambda x: scattering_transform(x, J=1, L=4))
      >>> transform(jnp.ones((2, 8, 8, 3))).shape
      (2, 4, 4, 15)

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939; the transform is
    of Bruna, Mallat, "Invariant Scattering Convolution Networks", 2012, arXiv:1203.1513, and agrees
    with Andreux et al., "Kymatio: Scattering Transforms in Python", 2018, arXiv:1812.11214.
    """
    check_floating(images=images)
    maps = scattering_channels(J, L, max_order=max_order)
    shape = jnp.shape(images)
    if len(shape) < 3 or min(shape[-3:-1]) < 2**J:
        raise ValueError(
            f"images must have shape [..., height, width, channels] of at least {2**J} pixels a "
            f"side, got {shape}"
        )
    padded = [(size // 2**J + 2) * 2**J for size in shape[-3:-1]]
    filters = morlet_filter_bank(*padded, J=J, L=L)
    x = jnp.moveaxis(jnp.asarray(images).astype(compute_dtype(images)), -1, -3)
    x = x.reshape(-1, *shape[-3:-1])
    pads = [((p - size) // 2, (p - size + 1) // 2) for p, size in zip(padded, shape[-3:-1])]
    spectrum = jnp.fft.fft2(jnp.pad(x, ((0, 0), *pads), mode="reflect"))

    psi = [[_periodized(filters.psi[j], r, x.dtype) for r in range(j + 1)] for j in range(J)]
    phi = [_periodized(filters.phi, r, x.dtype) for r in range(J)]

    def averaged(of: Array, resolution: int) -> Array:
        """What the low-pass filter leaves of spectra `[..., m, n]` at a resolution 2^-r."""
        low = _subsampled(of * phi[resolution], 2 ** (J - resolution))
        return jnp.fft.ifft2(low).real[..., 1:-1, 1:-1]

    def modulus(of: Array, wavelets: Array, step: int) -> Array:
        """The spectra of |· ∗ ψ|, at every `step`-th pixel."""
        return jnp.fft.fft2(jnp.abs(jnp.fft.ifft2(_subsampled(of * wavelets, step))))

    first, second = [averaged(spectrum, 0)[:, None]], []
    for j in range(J):

        def of_angle(wavelet: Array, j: int = j) -> tuple[Array, Array]:
            u = modulus(spectrum, wavelet, 2**j)
            low = averaged(u, j)
            deeper = [jnp.zeros((len(x), 0, *low.shape[1:]), low.dtype)]
            if max_order == 2:
                for k in range(j + 1, J):
                    deeper.append(averaged(modulus(u[:, None], psi[k][j], 2 ** (k - j)), k))
            return low, jnp.concatenate(deeper, axis=1)

        of_first, of_second = jax.lax.map(of_angle, psi[j][0])
        first.append(jnp.moveaxis(of_first, 0, 1))
        second.append(jnp.moveaxis(of_second, 0, 1).reshape(len(x), -1, *of_first.shape[-2:]))
    s = jnp.concatenate(first + second, axis=1)
    s = s.reshape(*shape[:-3], shape[-1] * maps, *s.shape[-2:])
    return jnp.moveaxis(s, -3, -1).astype(jnp.result_type(images))


def _subsampled(spectrum: Array, step: int) -> Array:
    """The spectra of every `step`-th pixel."""
    *leading, m, n = spectrum.shape
    return spectrum.reshape(*leading, step, m // step, step, n // step).mean(axis=(-4, -2))


def _periodized(filters: np.ndarray, resolution: int, dtype: jnp.dtype) -> Array:
    """Filters for images at every 2^r-th pixel: their low frequencies."""
    step, (m, n) = 2**resolution, filters.shape[-2:]
    kept = filters.copy()
    for axis, size in ((-2, m), (-1, n)):
        start = size // (2 * step)
        high = [slice(None)] * filters.ndim
        high[axis] = slice(start, start + size - size // step)
        kept[tuple(high)] = 0
    folded = kept.reshape(*filters.shape[:-2], step, m // step, step, n // step).sum(axis=(-4, -2))
    return jnp.asarray(folded, dtype)
