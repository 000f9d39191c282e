"""How alike images are, one by one and as sets: PSNR, SSIM, inception score, Fréchet distance."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def peak_signal_to_noise_ratio(
    predictions: ArrayLike, targets: ArrayLike, *, max_value: float = 1.0
) -> Array:
    r"""The size of an image's error against the range of its values, in decibels.

        PSNR = 10 log₁₀(max_value² / mean((prediction - target)²))

    Args:
      predictions: `[..., height, width, channels]` floating point.
      targets: the same shape.
      max_value: above 0, the range of the values: 1, or 255 for bytes. Default 1.

    Returns:
      `[...]` in the type of `predictions`; ∞ for equal images. Higher is better.

    Raises:
      ValueError: `max_value` not positive, or shapes that differ or have less than three axes.
      TypeError: predictions that are not floating point.

    Use it for noise and compression; `structural_similarity` sees what the eye does.

    Cost: one pass over the images.

    Example:
      >>> print(peak_signal_to_noise_ratio(jnp.full((4, 4, 1), 0.6), jnp.full((4, 4, 1), 0.5)))
      20.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    a, b = _checked(predictions, targets, max_value)
    mean_square = jnp.mean(jnp.square((a - b) / max_value), axis=(-3, -2, -1))
    return (-10 * jnp.log10(mean_square)).astype(jnp.result_type(predictions))


def structural_similarity_map(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    max_value: float = 1.0,
    window_size: int = 11,
    sigma: float | None = 1.5,
    reflect: bool = False,
) -> Array:
    r"""The structural similarity of two images (SSIM) around each pixel, for each channel.

        SSIM = (2 μ_a μ_b + C₁) (2 σ_ab + C₂) / ((μ_a² + μ_b² + C₁) (σ_a² + σ_b² + C₂))

    with the means μ, variances σ² and the covariance σ_ab in a window, C₁ = (0.01 max_value)² and
    C₂ = (0.03 max_value)².

    Args:
      predictions: `[..., height, width, channels]` floating point.
      targets: the same shape.
      max_value: above 0, the range of the values: 1, or 255 for bytes. Default 1.
      window_size: odd, in pixels. Default 11.
      sigma: above 0, the width of the Gaussian that weighs the window's pixels; None weighs them
        evenly. Default 1.5.
      reflect: continue the images by their reflection, so that the map has their size. Default: no,
        windows lie within the images.

    Returns:
      `[..., height - window_size + 1, width - window_size + 1, channels]`, or with `reflect` the
      shape of `predictions`, from -1 to 1 in their type; 1 for equal images.

    Raises:
      ValueError: a `window_size` that is not odd or exceeds the images, `max_value` or `sigma` not
        positive, or shapes that differ or have less than three axes.
      TypeError: predictions that are not floating point.

    Use it to see where images differ; its mean is `structural_similarity`.

    Cost: five window means of the images' size, each by 2 `window_size` multiplications a pixel;
    gradients keep them.

    Example:
      >>> image = jnp.arange(64.0).reshape(8, 8, 1) / 64
      >>> print(structural_similarity_map(image, image, window_size=7).shape)
      (2, 2, 1)

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (SSIM is Wang, Bovik, Sheikh,
    Simoncelli's, 2004).
    """
    a, b = _checked(predictions, targets, max_value)
    height, width = a.shape[-3:-1]
    half = window_size // 2
    largest = 2 * min(height, width) - 1 if reflect else min(height, width)
    if window_size % 2 != 1 or not 1 <= window_size <= largest:
        raise ValueError(
            f"window_size must be odd and at most {largest} for images of {height} by {width}, "
            f"got {window_size}"
        )
    offsets = np.arange(window_size) - half
    weights = np.ones(window_size)
    if sigma is not None:
        check_interval(0, jnp.inf, closed="right", sigma=sigma)
        weights = np.exp(-(offsets**2) / (2 * sigma**2))
    if reflect:
        edges = [(0, 0)] * (a.ndim - 3) + [(half, half), (half, half), (0, 0)]
        a, b = (jnp.pad(x, edges, mode="reflect") for x in (a, b))
    moments = jnp.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = _window_means(moments, weights / weights.sum())
    c1, c2 = (0.01 * max_value) ** 2, (0.03 * max_value) ** 2
    variances = square_a - jnp.square(mean_a) + square_b - jnp.square(mean_b)
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (jnp.square(mean_a) + jnp.square(mean_b) + c1)
    structure = (2 * covariance + c2) / (jnp.maximum(variances, 0) + c2)
    return (luminance * structure).astype(jnp.result_type(predictions))


def structural_similarity(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    max_value: float = 1.0,
    window_size: int = 11,
    sigma: float | None = 1.5,
) -> Array:
    r"""The mean structural similarity of two images (SSIM), over pixels and channels.

        mean of (2 μ_a μ_b + C₁) (2 σ_ab + C₂) / ((μ_a² + μ_b² + C₁) (σ_a² + σ_b² + C₂))

    over all windows within the images; see `structural_similarity_map`.

    Args:
      predictions: `[..., height, width, channels]` floating point.
      targets: the same shape.
      max_value: above 0, the range of the values: 1, or 255 for bytes. Default 1.
      window_size: odd, in pixels. Default 11.
      sigma: above 0, the width of the Gaussian that weighs the window's pixels; None weighs them
        evenly. Default 1.5.

    Returns:
      `[...]` from -1 to 1 in the type of `predictions`; 1 for equal images.

    Raises:
      ValueError: a `window_size` that is not odd or exceeds the images, `max_value` or `sigma` not
        positive, or shapes that differ or have less than three axes.
      TypeError: predictions that are not floating point.

    Use it to compare images as the eye does, with no regard to a shift of all values;
    `jaxref.losses.ssim_loss` trains on it.

    Cost: that of `structural_similarity_map`: five window means of the images' size.

    Example:
      >>> image = jnp.arange(256.0).reshape(16, 16, 1) / 256
      >>> print(structural_similarity(image, image), structural_similarity(image, 1 - image) < 0)
      1.0 True

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (SSIM is Wang, Bovik, Sheikh,
    Simoncelli's, 2004).
    """
    check_floating(predictions=predictions)
    wide = jnp.asarray(predictions).astype(compute_dtype(predictions))
    ssim = structural_similarity_map(
        wide, targets, max_value=max_value, window_size=window_size, sigma=sigma
    )
    return jnp.mean(ssim, axis=(-3, -2, -1)).astype(jnp.result_type(predictions))


def inception_score(probabilities: ArrayLike) -> np.ndarray:
    r"""How sure a classifier is of each generated image, and how diverse they are.

        IS = exp(mean_i KL(p_i || p̄)),   p̄ = mean_i p_i

    Args:
      probabilities: p `[..., images, classes]`, at least 0: the classifier's for each image.

    Returns:
      `[...]` from 1 up to the number of classes, in float64 on the host. Higher is better.

    Raises:
      ValueError: negative probabilities, less than two axes, or no image.

    Use it for images of the classifier's own classes; it knows no real image, and
    `frechet_distance` compares with them.

    Cost: one pass over the probabilities, on the host; the classifier's forward pass on each image
    before it.

    Example:
      >>> print(float(inception_score(np.eye(4))), float(inception_score(np.full((3, 4), 0.25))))
      4.0 1.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    p = np.asarray(probabilities, np.float64)
    check_interval(0, np.inf, probabilities=p)
    if p.ndim < 2 or p.shape[-2] == 0:
        raise ValueError(f"probabilities must have shape [..., images, classes], got {p.shape}")
    mean = p.mean(axis=-2, keepdims=True)
    log_ratio = np.log(np.where(p > 0, p, 1)) - np.log(np.where(mean > 0, mean, 1))
    return np.exp(np.sum(p * log_ratio, axis=-1).mean(axis=-1))


def frechet_distance(features: ArrayLike, reference_features: ArrayLike) -> float:
    r"""The Fréchet distance of two sets of features, taken as normal: FID on Inception's features.

        |μ_a - μ_b|² + trace(Σ_a + Σ_b - 2 (Σ_a^{1/2} Σ_b Σ_a^{1/2})^{1/2})

    Args:
      features: `[images, features]`, at least two images: of the generated ones.
      reference_features: `[reference_images, features]`, at least two: of the real ones.

    Returns:
      The distance, at least 0 and 0 for equal sets, in float64 on the host. Lower is better. The
      covariances Σ are those with n - 1.

    Raises:
      ValueError: shapes that do not match, or less than two images.

    Use it to compare generators on one set of real images, always with the same number of images,
    as it falls with their number.

    Cost: O(images d² + d³) for d features, on the host: two covariances, their roots and singular
    values.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(50, 3))
      >>> print(round(frechet_distance(x, x + 2), 6))
      12.0

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694 (FID is Heusel et al.'s, 2017,
    arXiv:1706.08500).
    """
    sets = {"features": features, "reference_features": reference_features}
    moments = []
    for name, value in sets.items():
        x = np.asarray(value, np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{name} must have shape [images >= 2, features], got {x.shape}")
        moments.append((x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    check_shape(mean_b.shape, features=mean_a)
    # tr (Σ_a^{1/2} Σ_b Σ_a^{1/2})^{1/2} is the sum of the singular values of Σ_a^{1/2} Σ_b^{1/2}
    roots = []
    for cov in (cov_a, cov_b):
        values, vectors = scipy.linalg.eigh(cov)
        roots.append(vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T)
    shared = scipy.linalg.svdvals(roots[0] @ roots[1]).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * shared
    return float(max(distance, 0.0))


def _checked(predictions: ArrayLike, targets: ArrayLike, max_value: float) -> tuple[Array, Array]:
    """Both images in the type to compute in."""
    check_floating(predictions=predictions)
    check_interval(0, jnp.inf, closed="right", max_value=max_value)
    shape = jnp.shape(predictions)
    if len(shape) < 3:
        raise ValueError(f"predictions must have shape [..., height, width, channels], got {shape}")
    check_shape(shape, targets=targets)
    dtype = compute_dtype(predictions)
    return jnp.asarray(predictions).astype(dtype), jnp.asarray(targets).astype(dtype)


def _window_means(x: Array, weights: np.ndarray) -> Array:
    """Means over all windows within `[..., height, width, channels]`, weighted along both axes."""
    planes = jnp.moveaxis(x, -1, 0)
    means = planes.reshape(-1, 1, *planes.shape[-2:])
    for shape in ((-1, 1), (1, -1)):
        kernel = jnp.asarray(weights, x.dtype).reshape(1, 1, *shape)
        # in full precision, as variances are differences of these means
        means = jax.lax.conv(means, kernel, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(means.reshape(*planes.shape[:-2], *means.shape[-2:]), 0, -1)
