"""Contrastive fine-tuning for anomaly detection, as seen from the centre of the normal data."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.core.vectors import embedding_pair, unit_rows, unit_vectors
from jaxref.losses.contrastive import nt_xent_loss


def feature_center(
    features: ArrayLike, *, normalize: bool = True, axis_name: AxisName | None = None
) -> Array:
    r"""The centre of the normal data: the mean of their unit features.

        c = mean φ(x),   φ(x) = f(x) / |f(x)|,   then c / |c| if wanted

    Args:
      features: f `[examples, features]` floating point, of the whole training set by the network
        before it is fine-tuned.
      normalize: whether to bring c to length 1, as `angular_center_loss` needs it. Default: yes.
      axis_name: name or names of the mapped axes over whose shards the examples are spread.

    Returns:
      c `[features]` in at least float32. 0 for no example.

    Raises:
      ValueError: features of another number of axes.
      TypeError: features that are not floating point.

    Use it once, and keep c while `mean_shifted_contrastive_loss` trains.

    Cost: one pass over the features of the training set.

    Example:
      >>> print(feature_center(jnp.array([[2.0, 0.0], [0.0, 3.0]]), normalize=False))
      [0.5 0.5]

    Reference: Reiss, Hoshen, "Mean-Shifted Contrastive Loss for Anomaly Detection", 2021,
    arXiv:2106.03844.
    """
    phi = unit_rows(features)
    number = sum_over_shards(jnp.float32(len(phi)), axis_name)
    center = sum_over_shards(jnp.sum(phi, axis=0), axis_name) / jnp.maximum(number, 1)
    return unit_vectors(center) if normalize else center


def mean_shifted_contrastive_loss(
    view_a: ArrayLike,
    view_b: ArrayLike,
    center: ArrayLike,
    *,
    temperature: float = 0.25,
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> Array:
    r"""NT-Xent of directions as seen from the centre of the normal data and not from the origin.

        L_i = -θ_i · θ_i⁺ / τ + log Σ_{k ≠ i} exp(θ_i · θ_k / τ)
        θ = (φ - c) / |φ - c|,   φ the features at length 1

    over all 2N views of the batch. From the origin, normal features lie in one narrow cone, where
    `nt_xent_loss` can do nothing but open it, until they are as far from c as anomalies are. L
    tells them apart by where they are around c, and changes nothing with their distance from it.

    Args:
      view_a: `[N, features]` floating point.
      view_b: `[N, features]` floating point: other views of the same examples.
      center: c `[features]`, from `feature_center`; without gradient.
      temperature: τ above 0. Default 0.25.
      axis_name: name or names of the mapped axes over whose shards the examples are spread.
      ring: with `axis_name`, whether embeddings go round a ring rather than be gathered, as for
        `nt_xent_loss`.

    Returns:
      `[2N]` losses in the type of `view_a`: of the views in `view_a`, then of those in `view_b`.
      Over equal shards, the mean of all is the loss of the whole batch. Features that lie at c have
      similarity 0 with any, and gradient 0.

    Raises:
      ValueError: shapes that do not match, or a temperature that is not above 0.
      TypeError: features or a centre that are not floating point.

    Use it to fine-tune a pre-trained network on normal data alone, with a small step size, and
    score by `jaxref.metrics.knn_anomaly_score`; `nt_xent_loss` is for training from nothing.

    Cost: that of `nt_xent_loss`: similarities of all pairs of 2N views, O(N²) time and memory.

    Example:
      >>> center = feature_center(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
      >>> view = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> print(mean_shifted_contrastive_loss(view, view, center).round(4))
      [0.0022 0.0022 0.0022 0.0022]

    Reference: Reiss, Hoshen, "Mean-Shifted Contrastive Loss for Anomaly Detection", 2021,
    arXiv:2106.03844.
    """
    phi_a, phi_b = embedding_pair(view_a=view_a, view_b=view_b)
    c = _checked_center(center, phi_a)
    losses = nt_xent_loss(
        phi_a - c, phi_b - c, temperature=temperature, axis_name=axis_name, ring=ring
    )
    return losses.astype(jnp.result_type(view_a))


def angular_center_loss(features: ArrayLike, center: ArrayLike) -> Array:
    r"""Keeps features at the centre of the normal data.

        L = -φ · c = |φ - c|² / 2 - 1   for |c| = 1,   φ the features at length 1

    Args:
      features: `[..., features]` floating point.
      center: c `[features]` of length 1, from `feature_center`; without gradient.

    Returns:
      `[...]` losses in [-1, 1], in the type of `features`. 0, with gradient 0, for a zero vector.

    Raises:
      ValueError: a centre of another shape.
      TypeError: features or a centre that are not floating point.

    Use it in a sum with `mean_shifted_contrastive_loss`, the means of both with equal weight. The
    authors' code adds the squared distance of both views, four times the slope of their mean here.

    Cost: one pass over the features.

    Example:
      >>> print(angular_center_loss(jnp.array([[3.0, 4.0], [0.0, 2.0]]), jnp.array([0.0, 1.0])))
      [-0.8 -1. ]

    Reference: Reiss, Hoshen, "Mean-Shifted Contrastive Loss for Anomaly Detection", 2021,
    arXiv:2106.03844.
    """
    check_floating(features=features)
    x = jnp.asarray(features)
    phi = unit_vectors(x.astype(compute_dtype(x)))
    return -jnp.sum(phi * _checked_center(center, phi), axis=-1).astype(x.dtype)


def _checked_center(center: ArrayLike, phi: Array) -> Array:
    check_floating(center=center)
    check_shape(phi.shape[-1:], center=center)
    return jax.lax.stop_gradient(jnp.asarray(center).astype(phi.dtype))
