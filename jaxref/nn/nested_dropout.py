"""Nested dropout: features in the order of their importance, and how many of them to keep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


class Truncation(NamedTuple):
    """How many features a classifier needs.

    Attributes:
      width: int32 scalar, the best number of features, from 1 to K.
      accuracies: float32 `[K]`, the accuracy with the first 1, 2, ... K features.

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """

    width: Array
    accuracies: Array


class BiasVariance(NamedTuple):
    """What the squared error of predictions is made of, over many training sets.

    Attributes:
      bias_squared: squared error of the mean prediction.
      variance: mean squared deviation from it.

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """

    bias_squared: Array
    variance: Array


def nested_dropout_distribution(dim: int, *, mean: float = 0.0, std: float = 100.0) -> Array:
    r"""How probable it is to keep the first k features, and no others.

        p_k ∝ exp(-((k - μ) / σ)²),   k = 1, ..., K

    Args:
      dim: K at least 1, the number of features.
      mean: μ, the most probable number. Default 0, the authors': fewer are always more probable.
      std: σ above 0, about how many features carry information. Default 100, for CIFAR-100 and
        Clothing1M; the paper has 10 for CIFAR-10.

    Returns:
      p `[K]` float32 of sum 1.

    Raises:
      ValueError: an argument out of its range.

    Use it for `nested_dropout`; feature j is trained with the probability of k ≥ j, which falls in
    j.

    Cost: O(K), once.

    Example:
      >>> nested_dropout_distribution(3, std=2.0).tolist()
      [0.622, 0.294, 0.084]

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """
    check_interval(1, jnp.inf, dim=dim)
    check_interval(-jnp.inf, jnp.inf, mean=mean)
    check_interval(0, jnp.inf, closed="neither", std=std)
    k = jnp.arange(1, dim + 1, dtype=jnp.float32)
    return jax.nn.softmax(-jnp.square((k - mean) / std))


def nested_dropout(
    features: ArrayLike,
    *,
    key: Array | None = None,
    probabilities: ArrayLike | None = None,
    per_example: bool = False,
    keep: ArrayLike | None = None,
) -> Array:
    r"""The first k features, for a random k, and 0 for the others.

        y_j = x_j where j ≤ k, else 0,   k drawn from p

    Others than in dropout, the features that stay are not enlarged. A classifier behind it learns
    to say as much as it can with the first features, which so become the important ones.

    Args:
      features: x `[..., K]` floating point.
      key: a random key, in training; None draws nothing.
      probabilities: p `[K]`, of keeping 1, ..., K features, as of `nested_dropout_distribution`.
        Default: that with its own defaults.
      per_example: whether every example has a k of its own, or all the same. Default: the same, the
        authors'.
      keep: k, an integer from 1 to K that may be traced, to keep in place of a random one: the
        width of `best_truncation`, in evaluation, or one for two models.

    Returns:
      y of the shape and type of `features`; x itself without `key` and `keep`.

    Raises:
      ValueError: `keep` out of its range or together with `key`, probabilities of another shape,
        features without an axis.
      TypeError: features that are not floating point.

    Use it before the last linear layer, without bias, where labels are noisy: features that are
    rarely kept learn little, noise least of all.

    Cost: elementwise, with one draw among K widths, or one for each example.

    Example:
      >>> print(nested_dropout(jnp.array([3.0, 2.0, 1.0]), keep=2))
      [3. 2. 0.]

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140, after Rippel, Gelbart, Adams, "Learning Ordered Representations with
    Nested Dropout", 2014, arXiv:1402.0915.
    """
    check_floating(features=features)
    x = jnp.asarray(features)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"features must have shape [..., K], got {x.shape}")
    size = x.shape[-1]
    if keep is not None:
        if key is not None:
            raise ValueError("keep and key exclude each other, got both")
        check_interval(1, size, keep=keep)
        width = jnp.asarray(keep)
    elif key is None:
        return x
    else:
        if probabilities is None:
            probabilities = nested_dropout_distribution(size)
        check_shape((size,), probabilities=probabilities)
        p = jnp.asarray(probabilities)
        shape = (*x.shape[:-1], 1) if per_example else ()
        logits = jnp.log(jnp.where(p > 0, p, 1.0))
        width = 1 + jax.random.categorical(key, jnp.where(p > 0, logits, -jnp.inf), shape=shape)
    return jnp.where(jnp.arange(size) < width, x, 0)


def nested_logits(features: ArrayLike, kernel: ArrayLike) -> Array:
    r"""The logits of a linear layer with its first 1, 2, ... K features, in one pass.

        z_k = Σ_{j≤k} x_j W_j,   k = 1, ..., K

    Args:
      features: x `[..., K]` floating point.
      kernel: W `[K, classes]`.

    Returns:
      z `[K, ..., classes]` in the type of `features`.

    Raises:
      ValueError: shapes that do not match.
      TypeError: arguments that are not floating point.

    Use it to look at every width at once; `best_truncation` finds the best without holding the
    logits of all.

    Cost: K · classes multiplications an example, those of the layer, and K times its logits in
    memory.

    Example:
      >>> print(nested_logits(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [1.0, 1.0]])))
      [[1. 0.]
       [3. 2.]]

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """
    x, w = _checked_layer(features, kernel)
    terms = jnp.moveaxis(x, -1, 0)[..., None] * jnp.expand_dims(w, tuple(range(1, x.ndim)))
    return jnp.cumsum(terms, axis=0).astype(jnp.result_type(features))


def best_truncation(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    penalty: float = 1e-5,
    where: ArrayLike | None = None,
) -> Truncation:
    r"""The number of features with which a linear classifier is most accurate.

        k* = argmax_k (accuracy of Σ_{j≤k} x_j W_j - penalty · k)

    the smallest where several are best.

    Args:
      features: x `[..., K]` floating point, of the validation set; or `[models, ..., K]` of
        several models, whose logits are averaged.
      kernel: W `[K, classes]`, or `[models, K, classes]`.
      labels: integer ids `[...]`.
      penalty: at least 0, the accuracy that one more feature has to bring. Default 1e-5, the
        authors'.
      where: boolean, broadcastable to `labels`: the examples that exist. Default: all.

    Returns:
      A `Truncation`: k* and the accuracies at all widths.

    Raises:
      ValueError: shapes that do not match, or a negative `penalty`.
      TypeError: arguments of another type.

    Use it after each epoch, and its width for `nested_dropout(..., keep=width)`; `nested_logits`
    has the logits of all widths.

    Cost: K steps one after the other, K · classes multiplications an example and model in all;
    memory of the logits of one width.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [-1.0, 3.0]])
      >>> print(best_truncation(x, jnp.array([[1.0, -1.0], [1.0, -1.0]]), jnp.array([0, 1])).width)
      1

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """
    x, w = _checked_layer(features, kernel, models=True)
    y = jnp.asarray(labels)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {y.dtype.name}")
    check_shape(x.shape[1:-1], labels=y)
    check_broadcastable(y.shape, where=where)
    check_interval(0, jnp.inf, penalty=penalty)

    def wider(logits: Array, feature: tuple[Array, Array]) -> tuple[Array, Array]:
        values, rows = feature
        logits = logits + jnp.einsum("m...,mc->...c", values, rows)
        right = jnp.argmax(logits, axis=-1) == y
        return logits, masked_mean(right.astype(jnp.float32), where=where)

    start = jnp.zeros((*y.shape, w.shape[-1]), x.dtype)
    _, accuracies = jax.lax.scan(wider, start, (jnp.moveaxis(x, -1, 0), jnp.moveaxis(w, 1, 0)))
    width = 1 + jnp.argmax(accuracies - penalty * jnp.arange(len(accuracies)))
    return Truncation(width.astype(jnp.int32), accuracies)


def bias_variance_of_predictions(predictions: ArrayLike, targets: ArrayLike) -> BiasVariance:
    r"""Squared error as bias and variance, over models trained on different draws of the data.

        mean_d (f_d - y)² = (mean_d f_d - y)² + mean_d (f_d - mean_d f_d)²

    of predictions f_d for true values y. Noise of the labels that y is free of would come on top.

    Args:
      predictions: f `[draws, ...]` floating point, of one model for each draw.
      targets: y `[...]` real numbers, or what broadcasts to it.

    Returns:
      A `BiasVariance` of arrays `[...]` in the type of `predictions`.

    Raises:
      ValueError: no draw, or shapes that do not match.
      TypeError: predictions that are not floating point.

    Use it to see what compression of features does: it lowers the variance for a little bias, and
    the average of two models halves what variance they do not share.

    Cost: two passes over the predictions, for which as many models were trained as there are draws.

    Example:
      >>> bias_squared, variance = bias_variance_of_predictions(jnp.array([1.0, 3.0]), 1.0)
      >>> print(bias_squared, variance)
      1.0 1.0

    Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels",
    2022, arXiv:2206.13140.
    """
    check_floating(predictions=predictions)
    f = jnp.asarray(predictions).astype(compute_dtype(predictions))
    if f.ndim < 1 or len(f) == 0:
        raise ValueError(f"predictions must have shape [draws, ...], got {f.shape}")
    check_broadcastable(f.shape[1:], targets=targets)
    mean = jnp.mean(f, axis=0)
    parts = jnp.square(mean - targets), jnp.mean(jnp.square(f - mean), axis=0)
    return BiasVariance(*(part.astype(jnp.result_type(predictions)) for part in parts))


def _checked_layer(
    features: ArrayLike, kernel: ArrayLike, *, models: bool = False
) -> tuple[Array, Array]:
    """Features and kernel in the type to compute in, with an axis of models where asked for."""
    check_floating(features=features, kernel=kernel)
    dtype = compute_dtype(features, kernel)
    x, w = (jnp.asarray(v).astype(dtype) for v in (features, kernel))
    if models and w.ndim == 2:
        x, w = x[None], w[None]
    leading = w.shape[:-2]
    if (
        len(leading) != models
        or x.ndim < 1
        or x.shape != (*leading, *x.shape[models:-1], w.shape[-2])
    ):
        raise ValueError(
            "features and kernel must have shapes [..., K] and [K, classes], "
            f"got {jnp.shape(features)} and {jnp.shape(kernel)}"
        )
    return x, w
