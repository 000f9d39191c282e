"""How far examples are from the training data: scores to find anomalies by."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import squared_distances, unit_vectors


def knn_anomaly_score(
    train_features: ArrayLike,
    test_features: ArrayLike,
    *,
    k: int = 2,
    metric: str = "cosine",
) -> Array:
    r"""How far examples are from their nearest ones of the training set.

        cosine:     Σ (1 - φ · φ_t)     over the k training examples t of the least terms,
        euclidean:  Σ |f - f_t|²        likewise

    with φ = f / |f|. On features of length 1 the second is twice the first.

    Args:
      train_features: `[examples, features]` floating point, of normal data.
      test_features: f `[tests, features]` floating point.
      k: how many neighbours, from 1 to the number of examples. Default 2.
      metric: "cosine" or "euclidean". Default "cosine". A zero vector has cosine 0 with any.

    Returns:
      `[tests]` scores of at least 0 in at least float32, higher for anomalies.

    Raises:
      ValueError: shapes that do not match, a `metric` that is neither, or a `k` out of range.
      TypeError: features that are not floating point, or a `k` that is no int.

    Use it with `roc_auc` to judge one-class features, as those of
    `jaxref.losses.mean_shifted_contrastive_loss`; it needs no labels and no density.

    Cost: tests · examples · features multiplications, all tests times examples in memory, and the k
    least of each row.

    Example:
      >>> train = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
      >>> print(knn_anomaly_score(train, jnp.array([[2.0, 0.0], [-1.0, 0.0]])).round(1))
      [0.2 3.4]

    Reference: Reiss, Hoshen, "Mean-Shifted Contrastive Loss for Anomaly Detection", 2021,
    arXiv:2106.03844.
    """
    check_floating(train_features=train_features, test_features=test_features)
    dtype = compute_dtype(train_features, test_features)
    train, test = (jnp.asarray(x).astype(dtype) for x in (train_features, test_features))
    if train.ndim != 2:
        raise ValueError(f"train_features must have shape [examples, features], got {train.shape}")
    check_shape((*test.shape[:1], train.shape[1]), test_features=test)
    if not isinstance(k, int):
        raise TypeError(f"k must be an int, got {k!r}")
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be from 1 to the {len(train)} training examples, got {k}")
    if metric == "cosine":
        cosines = jnp.matmul(
            unit_vectors(test), unit_vectors(train).T, precision=jax.lax.Precision.HIGHEST
        )
        distances = jnp.maximum(1 - cosines, 0.0)
    elif metric == "euclidean":
        distances = squared_distances(test, train)
    else:
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    return -jnp.sum(jax.lax.top_k(-distances, k)[0], axis=-1)
