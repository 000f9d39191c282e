"""The plain losses of classification: cross-entropy in its forms, and the hinge.

`where` (boolean) says which classes exist for an example of `softmax_cross_entropy` and
`negative_log_likelihood`, and which decisions count in the binary losses.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import expected_over_labels, label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of the softmax, with label smoothing and weights of the classes.

        L = -Σ_k w_k q_k log softmax(f)_k,   q_k = (1 - s) 1[k = label] + s / C

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      label_smoothing: s in [0, 1], the mass spread evenly over the C admitted classes. Default 0.
      class_weights: w `[classes]` at least 0, such as the inverse of the classes' frequencies.
        Default: 1.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats; 0 where no class is admitted. The weighted
      mean over a batch divides their sum by that of the labels' weights.

    Raises:
      ValueError: `label_smoothing` outside of [0, 1], a negative weight, or shapes that do not
        match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it as the loss of one label among several; `binary_cross_entropy` is for labels that do not
    exclude each other, `poly_cross_entropy` and `squentropy` change its tail, and over a large
    vocabulary `jaxref.kernels.linear_softmax_cross_entropy` saves the logits' memory.

    Cost: that of a softmax over the classes, which keeps one array of the logits' size for the
    gradient.

    Example:
      >>> logits, labels = jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1])
      >>> weights = jnp.array([1.0, 3.0])
      >>> print(softmax_cross_entropy(logits, labels, class_weights=weights).round(3))
      [0.127 6.381]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    choice: dict[str, Any] = {"axis": axis, "label_smoothing": label_smoothing, "where": where}
    if class_weights is None:
        losses = expected_over_labels(jnp.negative, labels, logits, **choice)
    else:
        q = _weighted(label_distribution(labels, logits, **choice), class_weights, axis)
        losses = -jnp.sum(q * masked_log_softmax(logits, axis=axis, where=where), axis=axis)
    return losses.astype(jnp.result_type(logits))


def negative_log_likelihood(
    log_probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of probabilities that are given by their logarithms.

        L = -Σ_k w_k q_k log p_k

    Args:
      log_probabilities: log p `[..., classes]` floating point, the classes at `axis`; taken as they
        are, whether or not the p sum to 1, and -∞ for a class that cannot be.
      labels: integer ids `[...]`, or distributions q of the shape of `log_probabilities`. An id
        that is not an admitted class gives NaN for its example.
      class_weights: w `[classes]` at least 0. Default: 1.
      axis: the class axis.
      where: boolean, broadcastable to `log_probabilities`; classes to admit. Default: all. The
        others drop out, and the probabilities are not normalised again.

    Returns:
      `[...]` losses in the type of `log_probabilities`, in nats; 0 where no class is admitted, ∞
      where the label's probability is 0.

    Raises:
      ValueError: a negative weight, or shapes that do not match.
      TypeError: `log_probabilities` not floating point, or labels of a type that is neither.

    Use it behind a model whose output is normalised already, such as a mixture;
    `softmax_cross_entropy` takes logits.

    Cost: one pass over the log-probabilities, and an array of targets of their size.

    Example:
      >>> log_p = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.0]]))
      >>> print(negative_log_likelihood(log_p, jnp.array([0, 0])).round(3))
      [1.386 0.693]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_floating(log_probabilities=log_probabilities)
    q = label_distribution(labels, log_probabilities, axis=axis, where=where)
    q = _weighted(q, class_weights, axis)
    counts = q != 0  # what a class without weight holds, -∞ included, is no matter
    log_p = jnp.where(counts, jnp.asarray(log_probabilities).astype(q.dtype), 0.0)
    return -jnp.sum(q * log_p, axis=axis).astype(jnp.result_type(log_probabilities))


def binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    positive_weight: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of the sigmoid, with label smoothing and a weight of the positives.

        L = -w t log sigmoid(z) - (1 - t) log sigmoid(-z),   t = (1 - s) target + s / 2

    Args:
      logits: z `[...]` floating point, one binary decision each.
      targets: `[...]` of the shape of `logits`, values in [0, 1] (booleans and integers too).
      label_smoothing: s in [0, 1]. Default 0.
      positive_weight: w at least 0: a number, or an array broadcastable to `logits`, such as one
        for each of several labels; the ratio of negatives to positives balances them. Default 1.
      where: boolean, broadcastable to `logits`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats.

    Raises:
      ValueError: `label_smoothing` outside of [0, 1], a negative weight, or shapes that do not
        match.
      TypeError: logits that are not floating point.

    Use it for decisions that do not exclude each other; `softmax_cross_entropy` is for one label
    among several, `margin_binary_cross_entropy` asks for a margin.

    Cost: one pass over the logits.

    Example:
      >>> print(binary_cross_entropy(jnp.array([2.0, 2.0]), jnp.array([1, 0])).round(3))
      [0.127 2.127]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(0, 1, label_smoothing=label_smoothing)
    check_interval(0, jnp.inf, positive_weight=positive_weight)
    check_broadcastable(jnp.shape(logits), positive_weight=positive_weight)
    z, t = _decisions(logits, targets, where)
    t = (1 - label_smoothing) * t + label_smoothing / 2
    weighted = jnp.asarray(positive_weight, z.dtype) * t
    loss = -weighted * jax.nn.log_sigmoid(z) - (1 - t) * jax.nn.log_sigmoid(-z)
    return _masked(loss, where).astype(jnp.result_type(logits))


def hinge_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    margin: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""How far a score falls short of a margin on its side: the loss of support vector machines.

        L = t max(0, m - z) + (1 - t) max(0, m + z),   m = margin

    Scores beyond the margin have no gradient, and the others one of size 1.

    Args:
      logits: z `[...]` floating point, scores of which the sign decides.
      targets: t `[...]` of the shape of `logits`, values in [0, 1] (booleans and integers too); not
        -1 and 1.
      margin: m at least 0; 0 is the perceptron's loss. Default 1.
      where: boolean, broadcastable to `logits`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `logits`.

    Raises:
      ValueError: a negative `margin`, or shapes that do not match.
      TypeError: logits that are not floating point.

    Use it for a boundary that the hard examples alone decide; `binary_cross_entropy` is smooth, and
    gives probabilities.

    Cost: one pass over the logits, without exponentials.

    Example:
      >>> print(hinge_loss(jnp.array([2.0, 0.5, 0.5]), jnp.array([1, 1, 0])))
      [0.  0.5 1.5]

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(0, jnp.inf, margin=margin)
    z, t = _decisions(logits, targets, where)
    loss = t * jnp.maximum(margin - z, 0) + (1 - t) * jnp.maximum(margin + z, 0)
    return _masked(loss, where).astype(jnp.result_type(logits))


def _weighted(q: Array, class_weights: ArrayLike | None, axis: int) -> Array:
    """The distribution q times the weights of its classes, which lie at `axis`."""
    if class_weights is None:
        return q
    axis %= q.ndim
    check_shape((q.shape[axis],), class_weights=class_weights)
    check_interval(0, jnp.inf, class_weights=class_weights)
    weights = jnp.asarray(class_weights).astype(q.dtype)
    return q * weights.reshape([-1 if a == axis else 1 for a in range(q.ndim)])


def _decisions(
    logits: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array]:
    """Logits and targets of binary decisions in the type to compute in."""
    check_floating(logits=logits)
    check_broadcastable(jnp.shape(logits), targets=targets, where=where)
    dtype = compute_dtype(logits)
    z, t = jnp.asarray(logits).astype(dtype), jnp.asarray(targets).astype(dtype)
    return (z if where is None else jnp.where(where, z, 0.0)), t


def _masked(loss: Array, where: ArrayLike | None) -> Array:
    return loss if where is None else jnp.where(where, loss, 0.0)
