"""Comp-sum losses, from the sum of exponentials over cross-entropy to the mean absolute error.

The losses take integer ids or distributions as labels, reduce the class axis alone and return the
per-example values in the type of the logits. The functions of their theory are computed on the host
in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy.special import logsumexp, xlogy

from jaxref.core.checks import canonical_axes, check_interval
from jaxref.core.exponential import relative_expm1
from jaxref.core.labels import expected_over_labels


def comp_sum_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    tau: float = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""A function of the sum of the exponential losses of the wrong classes (comp-sum loss).

    With logits f and the label y,

        L = Φ_τ(Σ_{k≠y} exp(f_k - f_y)),   Φ_τ(u) = ((1 + u)^{1-τ} - 1) / (1 - τ)

    and Φ_1(u) = log(1 + u). Since 1 + u = 1/p_y with p the softmax, L = (p_y^{τ-1} - 1) / (1 - τ):
    the sum of exponentials at τ = 0, cross-entropy at 1, generalized cross-entropy between 1 and 2,
    the mean absolute error 1 - p_y at 2. The gradient is `p_y^{τ-1} (softmax - onehot)`: a larger τ
    turns away from examples that are far on the wrong side. Labels that are distributions give
    the expectation over the label.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      tau: τ at least 0. Default 1, cross-entropy.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted. For τ < 1 the
      exponential is continued by its tangent once it passes 1e27 (in float32).

    Raises:
      ValueError: a negative `tau`, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it to choose between the convergence of cross-entropy and robustness to wrong labels by one
    number; `generalized_cross_entropy` is the same between the two under its own parameter, and
    `comp_sum_consistency_bound` says what a value of τ guarantees.

    Cost: that of cross-entropy: a softmax over the classes.

    Example:
      >>> losses = comp_sum_loss(jnp.array([[2.0, 0.0, -1.0]]), jnp.array([1]), tau=0.0)
      >>> print(losses.round(3))
      [7.757]

    Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and
    Applications", 2023, arXiv:2304.07288.
    """
    check_interval(0, jnp.inf, tau=tau)

    def loss(log_p: Array) -> Array:
        # ((1 + u)^{1-τ} - 1) / (1 - τ) with 1 + u = 1 / p, for every τ by one formula
        return -log_p * relative_expm1((tau - 1) * log_p)

    losses = expected_over_labels(loss, labels, logits, axis=axis, where=where)
    return losses.astype(jnp.result_type(logits))


def generalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    q: float = 0.7,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy tempered towards the mean absolute error, against wrong labels.

        L = (1 - p_y^q) / q

    with p the softmax of the logits and y the label: cross-entropy in the limit q = 0 and 1 - p_y
    at q = 1. It is `comp_sum_loss` with τ = 1 + q.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits` (the expectation over
        the label). An id that is not an admitted class gives NaN for its example.
      q: in [0, 1]. Default 0.7, Zhang and Sabuncu's.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in [0, 1/q], in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: `q` outside [0, 1], or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where labels are wrong for a good part of the examples, with the usual learning rates;
    `mean_absolute_error_classification` is more robust and learns more slowly.

    Cost: that of cross-entropy: a softmax over the classes.

    Example:
      >>> losses = generalized_cross_entropy(jnp.array([[2.0, 0.0]]), jnp.array([1]))
      >>> print(losses.round(3))
      [1.106]

    Reference: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks
    with Noisy Labels", 2018, arXiv:1805.07836, as in Mao, Mohri, Zhong, "Cross-Entropy Loss
    Functions: Theoretical Analysis and Applications", 2023, arXiv:2304.07288.
    """
    check_interval(0, 1, q=q)
    return comp_sum_loss(logits, labels, tau=1 + q, axis=axis, where=where)


def mean_absolute_error_classification(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""The probability of a wrong class under the softmax: classification's mean absolute error.

        L = 1 - p_y = |onehot(y) - p|_1 / 2

    with p the softmax of the logits and y the label: `comp_sum_loss` with τ = 2. It is symmetric,
    Σ_y L(p, y) is the same for every p, so that uniform label noise does not move its minimum.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits` (the expectation over
        the label). An id that is not an admitted class gives NaN for its example.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in [0, 1], in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it under heavy label noise with few classes: its gradients vanish on examples that are far
    on the wrong side. `generalized_cross_entropy` keeps some of them.

    Cost: that of cross-entropy: a softmax over the classes.

    Example:
      >>> losses = mean_absolute_error_classification(jnp.array([[2.0, 0.0]]), jnp.array([1]))
      >>> print(losses.round(3))
      [0.881]

    Reference: Ghosh, Kumar, Sastry, "Robust Loss Functions under Label Noise for Deep Neural
    Networks", 2017, arXiv:1712.09482, as in Mao, Mohri, Zhong, "Cross-Entropy Loss Functions:
    Theoretical Analysis and Applications", 2023, arXiv:2304.07288.
    """
    return comp_sum_loss(logits, labels, tau=2.0, axis=axis, where=where)


def comp_sum_minimal_risk(
    probabilities: ArrayLike, *, tau: float = 1.0, axis: int = -1
) -> np.ndarray:
    r"""The least expected comp-sum loss of any scores, where the label has a given distribution.

    With p the distribution of the label and a = 1 / (2 - τ),

        C*(p) = (‖p‖_a - 1) / (1 - τ),  ‖p‖_a = (Σ_y p_y^a)^{1/a}    0 ≤ τ < 2
        C*(p) = (1 - max_y p_y) / (τ - 1)                            τ ≥ 2

    and the entropy -Σ_y p_y log p_y at τ = 1. The risk of the best scores in a class of functions
    less the mean of C* over the inputs is that class's minimizability gap.

    Args:
      probabilities: p `[..., classes]` in [0, 1], with sum 1 over `axis`.
      tau: τ at least 0, a number.
      axis: the class axis.

    Returns:
      `[...]` values of at least 0, in float64 on the host.

    Raises:
      ValueError: a negative `tau`, probabilities outside [0, 1] or without sum 1 (to 1e-3), or an
        `axis` out of range.

    Use it to tell how much of a loss is noise of the labels; the rest is what
    `comp_sum_consistency_bound` turns into a bound on excess errors.

    Cost: one pass over the probabilities, on the host.

    Example:
      >>> print(comp_sum_minimal_risk([[0.5, 0.5], [0.9, 0.1]], tau=2.0))
      [0.5 0.1]

    Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and
    Applications", 2023, arXiv:2304.07288.
    """
    tau = _checked_tau(tau)
    p = np.asarray(probabilities, np.float64)
    check_interval(0, 1, probabilities=p)
    canonical_axes(axis, p.ndim)
    if not np.allclose(p.sum(axis), 1, atol=1e-3):
        raise ValueError(f"probabilities must have sum 1 over axis {axis}, got {p.sum(axis)}")
    if tau >= 2:
        return (1 - p.max(axis)) / (tau - 1)
    if abs(tau - 1) < 1e-6:
        return -xlogy(p, p).sum(axis)
    with np.errstate(divide="ignore"):
        log_norm = (2 - tau) * logsumexp(np.log(p) / (2 - tau), axis=axis)
    return np.expm1(log_norm) / (1 - tau)


def comp_sum_consistency_transform(
    beta: ArrayLike, *, tau: float = 1.0, num_classes: int
) -> np.ndarray:
    r"""The least excess risk of a comp-sum loss that an excess of zero-one risk comes with.

    With n classes and a = 1 / (2 - τ), the mean M(β) = ((1 + β)^a + (1 - β)^a) / 2,

        T_τ(β) = 2^{1-τ} (1 - M(β)^{2-τ}) / (1 - τ)                   0 ≤ τ < 1
        T_1(β) = ((1 + β) log(1 + β) + (1 - β) log(1 - β)) / 2
        T_τ(β) = (M(β)^{2-τ} - 1) / ((τ - 1) n^{τ-1})                 1 < τ < 2
        T_τ(β) = β / ((τ - 1) n^{τ-1})                                τ ≥ 2

    Scores whose choice is worse than the best by β in probability have an expected loss that is
    above `comp_sum_minimal_risk` by at least T_τ(β), and there is no larger such function.

    Args:
      beta: β `[...]` in [0, 1].
      tau: τ at least 0, a number.
      num_classes: n, an integer of at least 2.

    Returns:
      `[...]` values from 0 up, increasing and convex in β, in float64 on the host.

    Raises:
      ValueError: an argument out of its range.

    Use it to compare what values of τ promise; `comp_sum_consistency_bound` is its inverse.

    Cost: a few operations for each β, on the host.

    Example:
      >>> print(comp_sum_consistency_transform([0.0, 0.6], tau=0.0, num_classes=10))
      [0.  0.2]

    Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and
    Applications", 2023, arXiv:2304.07288.
    """
    tau = _checked_tau(tau)
    check_interval(2, np.inf, num_classes=num_classes)
    b = np.asarray(beta, np.float64)
    check_interval(0, 1, beta=b)
    if tau >= 2:
        return b / ((tau - 1) * num_classes ** (tau - 1))
    if abs(tau - 1) < 1e-6:
        return (xlogy(1 + b, 1 + b) + xlogy(1 - b, 1 - b)) / 2
    with np.errstate(divide="ignore"):
        logs = np.log1p(b), np.log1p(-b)
    log_mean = np.logaddexp(*(log / (2 - tau) for log in logs)) - np.log(2)
    gap = np.expm1((2 - tau) * log_mean) / (tau - 1)
    return gap * (2 ** (1 - tau) if tau < 1 else num_classes ** (1 - tau))


def comp_sum_consistency_bound(
    surrogate_regret: ArrayLike, *, tau: float = 1.0, num_classes: int
) -> np.ndarray:
    r"""How much zero-one risk can be in excess where a comp-sum loss is in excess by so much.

        Γ_τ(t) = the β in [0, 1] with T_τ(β) = t, or 1 beyond T_τ(1)

    T is `comp_sum_consistency_transform`. For every class of functions H that can score each class
    as it likes, with risks R, their infima R* over H and minimizability gaps M,

        R_01 - R_01* + M_01 ≤ Γ_τ(R_τ - R_τ* + M_τ)

    It is at most √(2^τ (2 - τ) t) for τ ≤ 1, √(2 n^{τ-1} t) for τ up to 2, and (τ - 1) n^{τ-1} t
    from there on.

    Args:
      surrogate_regret: t `[...]` of at least 0.
      tau: τ at least 0, a number.
      num_classes: n, an integer of at least 2.

    Returns:
      `[...]` in [0, 1], in float64 on the host.

    Raises:
      ValueError: an argument out of its range.

    Use it to read an excess of a loss as one of errors, for instance to stop training.

    Cost: 60 evaluations of `comp_sum_consistency_transform`, by halving, on the host.

    Example:
      >>> print(comp_sum_consistency_bound([0.2, 7.0], tau=0.0, num_classes=10))
      [0.6 1. ]

    Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and
    Applications", 2023, arXiv:2304.07288.
    """
    regret = np.asarray(surrogate_regret, np.float64)
    check_interval(0, np.inf, surrogate_regret=regret)
    low, high = np.zeros(regret.shape), np.ones(regret.shape)
    for _ in range(60):  # T increases: halve to float64's resolution
        middle = (low + high) / 2
        above = comp_sum_consistency_transform(middle, tau=tau, num_classes=num_classes) > regret
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high


def _checked_tau(tau: float) -> float:
    """τ as a number: which form holds depends on it."""
    if isinstance(tau, jax.core.Tracer):
        raise TypeError("tau must be a number, got a traced value")
    check_interval(0, np.inf, tau=tau)
    return float(tau)
