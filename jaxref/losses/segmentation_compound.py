"""Compound losses of segmentation: a pixel loss and an overlap loss of the same image, together.

Each takes logits `[batch, ..., classes]` and returns one value per image. To make the whole batch
one set, give it as one image.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.losses.segmentation import (
    binary_targets,
    pixel_mask,
    power_from_zero,
    soft_counts,
    soft_dice,
    soft_tversky,
)


def combo_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Weighted binary cross-entropy and Dice loss of an image, each class with its own sigmoid.

        L = α mean[-β y log p - (1 - β) (1 - y) log(1 - p)] + (1 - α) (1/C) Σ_c Dice loss_c

    β above 1/2 makes false negatives dearer, α shares between the two. The method's paper subtracts
    the Dice coefficient in place of adding the loss, which is less by 1 - α.

    Args:
      logits: `[batch, ..., classes]` floating point; p is their sigmoid.
      targets: y of the shape of `logits`, in [0, 1]; or class ids of that shape without its last
        axis. An id that is no class gives its image NaN.
      alpha: α in [0, 1]. Default 1/2.
      beta: β in [0, 1]. Default 1/2.
      smooth: of the Dice loss, at least 0. Default 1.
      where: boolean, broadcastable to `[batch, ...]`: the pixels that count.

    Returns:
      `[batch]` losses in the type of `logits`; 0 for an image without pixels.

    Raises:
      ValueError: shapes that do not match, or a hyperparameter out of its range.
      TypeError: logits that are not floating point.

    Use it as the plain first choice for medical images; `exponential_logarithmic_loss` and
    `unified_focal_loss` have softmax classes, and focus.

    Cost: one pass over the logits; three sums for each class of an image.

    Example:
      >>> logits, targets = jnp.array([[[2.0], [-2.0], [1.0]]]), jnp.array([[[1], [0], [1]]])
      >>> print(combo_loss(logits, targets).round(3))
      [0.101]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Taghanaki et al., "Combo Loss: Handling Input and Output
    Imbalance in Multi-Organ Segmentation", 2018, arXiv:1805.02798.
    """
    check_interval(0, 1, alpha=alpha, beta=beta)
    check_floating(logits=logits)
    z = _images(logits)
    exists = pixel_mask(where, z.shape)
    y = binary_targets(targets, z)
    if exists is not None:
        z, y = jnp.where(exists, z, 0.0), jnp.where(exists, y, 0.0)
    inside = tuple(range(1, z.ndim))
    positive, negative = -y * jax.nn.log_sigmoid(z), -(1 - y) * jax.nn.log_sigmoid(-z)
    cross_entropy = masked_mean(beta * positive + (1 - beta) * negative, axis=inside, where=exists)
    dice = soft_dice(
        jax.nn.sigmoid(z),
        y,
        reduce_axes=inside[:-1],
        smooth=smooth,
        where=exists,
        axis_name=None,
    )
    loss = alpha * cross_entropy + (1 - alpha) * jnp.mean(dice, axis=-1)
    return loss.astype(jnp.result_type(logits))


def exponential_logarithmic_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    dice_weight: float = 0.8,
    cross_entropy_weight: float = 0.2,
    dice_gamma: float = 0.3,
    cross_entropy_gamma: float = 0.3,
    class_weights: ArrayLike | None = None,
    smooth: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Powers of the logarithms of Dice coefficients and of probabilities, for an image.

        L = a (1/C) Σ_c (-log Dice_c)^γ_D + b mean_n Σ_k w_k q_nk (-log p_nk)^γ_X

    with the softmax p, the labels q and w = class_weights. A power between 0 and 1 (steep near the
    perfect, flat in the middle) keeps up the pressure on structures that are easy, a power above 1
    leaves them. Below 1e-7 the powers are straight lines to 0, whose slope is finite.

    Args:
      logits: `[batch, ..., classes]` floating point.
      labels: integer ids `[batch, ...]`, or distributions of the shape of `logits`. An id that is
        no class gives its image NaN.
      dice_weight: a at least 0. Default 0.8, as all of them the paper's.
      cross_entropy_weight: b at least 0. Default 0.2.
      dice_gamma: γ_D above 0. Default 0.3.
      cross_entropy_gamma: γ_X above 0. Default 0.3.
      class_weights: w `[classes]`; the paper takes the square root of the inverse frequencies in
        the training data. Default: 1.
      smooth: s of Dice_c = (2 Σ p q + s) / (Σ p + Σ q + s), above 0. Default 1.
      where: boolean, broadcastable to `[batch, ...]`: the pixels that count.

    Returns:
      `[batch]` losses in the type of `logits`; 0 for an image without pixels.

    Raises:
      ValueError: shapes that do not match, or a hyperparameter out of its range.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it for structures of very different sizes in one image; `combo_loss` is its form without
    powers and, for the Dice part, without logarithm.

    Cost: that of a softmax over the classes, and three sums for each class of an image.

    Example:
      >>> logits = jnp.array([[[2.0, 0.0], [0.0, 2.0], [0.0, 1.0]]])
      >>> print(exponential_logarithmic_loss(logits, jnp.array([[0, 1, 1]])).round(3))
      [0.56]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Wong et al., "3D Segmentation with Exponential
    Logarithmic Loss for Highly Unbalanced Object Sizes", 2018, arXiv:1809.00076.
    """
    check_interval(0, jnp.inf, dice_weight=dice_weight, cross_entropy_weight=cross_entropy_weight)
    check_interval(
        0,
        jnp.inf,
        closed="right",
        dice_gamma=dice_gamma,
        cross_entropy_gamma=cross_entropy_gamma,
        smooth=smooth,
    )
    check_floating(logits=logits)
    z = _images(logits)
    exists = pixel_mask(where, z.shape)
    q = label_distribution(labels, z, where=exists)
    log_p = masked_log_softmax(z, axis=-1, where=exists)
    weights = jnp.ones(z.shape[-1:], z.dtype) if class_weights is None else class_weights
    check_shape(z.shape[-1:], class_weights=weights)
    inside = tuple(range(1, z.ndim - 1))
    counts = soft_counts(jnp.exp(log_p), q, reduce_axes=inside, where=exists, axis_name=None)
    errors = counts.false_positives + counts.false_negatives
    minus_log_dice = jnp.log1p(errors / (2 * counts.true_positives + smooth))
    dice_part = jnp.mean(power_from_zero(minus_log_dice, dice_gamma), axis=-1)
    surprise = jnp.asarray(weights) * q * power_from_zero(-log_p, cross_entropy_gamma)
    pixel = None if exists is None else exists[..., 0]
    cross_entropy_part = masked_mean(jnp.sum(surprise, axis=-1), axis=inside, where=pixel)
    loss = dice_weight * dice_part + cross_entropy_weight * cross_entropy_part
    return loss.astype(jnp.result_type(logits))


def unified_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    asymmetric: bool = True,
    background: int = 0,
    smooth: float = 1e-7,
    where: ArrayLike | None = None,
) -> Array:
    r"""Focal loss and focal Tversky loss of an image, under one set of parameters.

        L = λ mean_n Σ_c δ_c q_nc (1 - p_nc)^a_c (-log p_nc) + (1 - λ) (1/C) Σ_c (1 - TI_c)^b_c

    with the softmax p, the labels q, λ = weight; δ_c is δ = delta for the objects and 1 - δ for the
    background; TI is the Tversky index with weight δ on false negatives and 1 - δ on false
    positives. The asymmetric form focuses each part on one side alone: the pixels of the background
    are turned down (a = γ there, 0 else), poor overlap of the objects is raised (b = 1 - γ there,
    1 else). The symmetric form has a = 1 - γ and b = γ for all classes.

    Args:
      logits: `[batch, ..., classes]` floating point.
      labels: integer ids `[batch, ...]`, or distributions of the shape of `logits`. An id that is
        no class gives its image NaN.
      weight: λ in [0, 1]. Default 1/2.
      delta: δ in [0, 1]. Default 0.6.
      gamma: γ in [0, 1); above 0 in the symmetric form. Default 1/2.
      asymmetric: which form. Default True, the better one for rare objects.
      background: the id of the background. Default 0.
      smooth: of the Tversky index, at least 0. Default 1e-7, the authors' code's.
      where: boolean, broadcastable to `[batch, ...]`: the pixels that count.

    Returns:
      `[batch]` losses at least 0 in the type of `logits`; 0 for an image without pixels.

    Raises:
      ValueError: shapes that do not match, a background that is no class, or a hyperparameter out
        of its range.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it for one rare object, tuning γ alone; the two parts by themselves are `focal_loss` and
    `focal_tversky_loss`.

    Cost: that of a softmax over the classes, and three sums for each class of an image.

    Example:
      >>> logits = jnp.array([[[2.0, 0.0], [0.0, 2.0], [0.0, 1.0]]])
      >>> print(unified_focal_loss(logits, jnp.array([[0, 1, 1]])).round(3))
      [0.194]

    Reference: Azad et al., "Loss Functions in the Era of Semantic Segmentation: A Survey and
    Outlook", 2023, arXiv:2312.05391, after Yeung et al., "Unified Focal loss: Generalising Dice and
    cross entropy-based losses to handle class imbalanced medical image segmentation", 2021,
    arXiv:2102.04525.
    """
    check_interval(0, 1, weight=weight, delta=delta)
    check_interval(0, 1, closed="left" if asymmetric else "neither", gamma=gamma)
    check_interval(0, jnp.inf, smooth=smooth)
    check_floating(logits=logits)
    z = _images(logits)
    if not 0 <= background < z.shape[-1]:
        raise ValueError(f"background must be one of {z.shape[-1]} classes, got {background}")
    exists = pixel_mask(where, z.shape)
    q = label_distribution(labels, z, where=exists)
    log_p = masked_log_softmax(z, axis=-1, where=exists)
    is_background = jnp.arange(z.shape[-1]) == background
    pixel_power: float | Array = 1 - gamma
    overlap_power: float | Array = gamma
    if asymmetric:
        pixel_power = jnp.where(is_background, gamma, 0.0)
        overlap_power = jnp.where(is_background, 1.0, 1 - gamma)
    class_weights = jnp.where(is_background, 1 - delta, delta)
    inside = tuple(range(1, z.ndim - 1))
    pixel = None if exists is None else exists[..., 0]
    focus = jnp.where(pixel_power > 0, power_from_zero(-jnp.expm1(log_p), pixel_power), 1.0)
    focal = masked_mean(
        jnp.sum(class_weights * q * focus * -log_p, axis=-1), axis=inside, where=pixel
    )
    tversky = soft_tversky(
        jnp.exp(log_p),
        q,
        false_positive_weight=1 - delta,
        false_negative_weight=delta,
        reduce_axes=inside,
        smooth=smooth,
        where=exists,
        axis_name=None,
    )
    overlap = jnp.mean(power_from_zero(tversky, overlap_power), axis=-1)
    return (weight * focal + (1 - weight) * overlap).astype(jnp.result_type(logits))


def _images(logits: ArrayLike) -> Array:
    """Logits in the type to compute in, with a batch, pixels and classes."""
    z = jnp.asarray(logits).astype(compute_dtype(logits))
    if z.ndim < 3:
        raise ValueError(f"logits must have shape [batch, ..., classes], got {z.shape}")
    return z
