"""Calibration errors: whether predictions are right as often as their confidence says.

All of them take probabilities `[..., classes]` with integer labels `[...]`, of which they look at
the predicted class, the first of the highest: its probability is the confidence c, and a = 1 where
it is the label and 0 where not. Or they take probabilities `[...]` of a binary event with labels
`[...]` that say whether it came, 0 or 1 (booleans too): then c is the probability and a the label.
Probabilities are not checked to be in [0, 1]. NaN, or an id that is no class, makes the result NaN.
`where` (boolean, broadcastable to the labels) says which examples count; the error of none is 0.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.figures import new_axes
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.core.ranks import ascending_ranks
from jaxref.core.reductions import masked_mean
from jaxref.metrics.classification import log_loss

Binning = Literal["width", "mass"]


class ReliabilityCurve(NamedTuple):
    """Confidence and accuracy of the examples in each bin of confidence; 0 in bins without any.

    Attributes:
      confidence: `[bins]` mean confidence.
      accuracy: `[bins]` share of right predictions.
      num_examples: `[bins]` how many they are.

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838.
    """

    confidence: Array
    accuracy: Array
    num_examples: Array


def reliability_curve(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    where: ArrayLike | None = None,
) -> ReliabilityCurve:
    r"""Mean confidence and accuracy in bins of confidence.

    Args:
      probabilities: floating point, `[..., classes]` or those of a binary event `[...]`.
      labels: `[...]` integer ids, or for a binary event 0 or 1.
      num_bins: M at least 1. Default 15.
      binning: "width" for M intervals ((m - 1)/M, m/M], the first with its 0 (the default); "mass"
        for M groups of almost as many examples, the first ones with one more, in order of
        confidence, at ties in the order given.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A `ReliabilityCurve` in at least float32.

    Raises:
      ValueError: shapes that do not match, `num_bins` below 1, or an unknown `binning`.
      TypeError: probabilities that are not floating point, or class labels that are not integers.

    Use it to see where confidence is wrong, with `plot_reliability`.

    Cost: one pass over the probabilities, O(n log M) for the bins; a sort of the n examples more
    for "mass".

    Example:
      >>> probabilities = jnp.array([0.9, 0.8, 0.3, 0.1])
      >>> reliability_curve(probabilities, jnp.array([1, 0, 1, 0]), num_bins=2).accuracy
      Array([0.5, 0.5], dtype=float32)

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838.
    """
    if not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"num_bins must be an integer of at least 1, got {num_bins!r}")
    if binning not in ("width", "mass"):
        raise ValueError(f"binning must be 'width' or 'mass', got {binning!r}")
    confidence, correct, counted = _events(probabilities, labels, where)
    if binning == "width":
        edges = jnp.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)
        index = jnp.searchsorted(edges, confidence, side="left") - 1
    else:
        ranks, total = ascending_ranks(confidence, where=counted)
        size, larger = total // num_bins, total % num_bins
        rest = ranks - larger * (size + 1)
        index = jnp.where(rest < 0, ranks // (size + 1), larger + rest // jnp.maximum(size, 1))
    index = jnp.clip(index, 0, num_bins - 1)
    columns = jnp.stack([counted.astype(confidence.dtype), confidence, correct], axis=-1)
    number, *sums = jax.ops.segment_sum(columns, index, num_bins).T
    mean_confidence, accuracy = (x / jnp.maximum(number, 1) for x in sums)
    return ReliabilityCurve(mean_confidence, accuracy, number)


def expected_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: float = 1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Mean difference of confidence and accuracy over bins of confidence (ECE).

        ( Σ_m (n_m / n) |acc_m - conf_m|^p )^(1/p),   p = norm;  the largest difference for p = ∞

    Mean differences within a bin cancel, so that one bin gives |accuracy - mean confidence|, the
    least; as many bins of equal mass as examples give the mean of |a - c|, the most. Noise alone
    gives about √(M/n).

    Args:
      probabilities: floating point, `[..., classes]` or those of a binary event `[...]`.
      labels: `[...]` integer ids, or for a binary event 0 or 1.
      num_bins: M at least 1. Default 15; small data want fewer.
      binning: "width" (the default) or "mass", the adaptive error: see `reliability_curve`.
      norm: p at least 1. Default 1, ECE; 2 is the root mean square, and infinity the maximum
        calibration error, MCE, over the bins that have examples.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32.

    Raises:
      ValueError: what `reliability_curve` raises, or `norm` below 1.
      TypeError: what `reliability_curve` raises.

    Use it to report, with `num_bins`; to compare models of almost the same error,
    `kolmogorov_smirnov_calibration_error` needs no bins. MCE hangs on the bins of a few examples.

    Cost: that of `reliability_curve`: one pass for "width", a sort of the n examples for "mass".

    Example:
      >>> probabilities = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
      >>> labels = jnp.array([0, 0, 1, 0])
      >>> print(expected_calibration_error(probabilities, labels, num_bins=1).round(3))
      0.0
      >>> print(expected_calibration_error(probabilities, labels, num_bins=10).round(3))
      0.3

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838.
    """
    if not norm >= 1:
        raise ValueError(f"norm must be at least 1, got {norm!r}")
    curve = reliability_curve(
        probabilities, labels, num_bins=num_bins, binning=binning, where=where
    )
    return _curve_error(curve, norm)


def classwise_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    where: ArrayLike | None = None,
) -> Array:
    r"""Mean over classes of the calibration error of each class's probability (static, cwCE).

        (1/K) Σ_k Σ_m (n_mk / n) |frequency of class k in bin m of p_k - mean p_k there|

    Args:
      probabilities: `[..., classes]` floating point.
      labels: `[...]` integer ids.
      num_bins: M at least 1. Default 15.
      binning: "width" (the default) or "mass": see `reliability_curve`.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A scalar in at least float32. It falls like 1/K for many classes, most of whose probabilities
      are near 0 and rightly so.

    Raises:
      ValueError: what `reliability_curve` raises, or probabilities without a class axis.
      TypeError: what `reliability_curve` raises.

    Use it where the whole distribution is read and not the predicted class alone.

    Cost: that of `expected_calibration_error` for each of the K classes, all at once: O(n K)
    memory.

    Example:
      >>> probabilities = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
      >>> labels = jnp.array([0, 0, 1, 0])
      >>> print(classwise_calibration_error(probabilities, labels, num_bins=2).round(3))
      0.15

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838.
    """
    check_floating(probabilities=probabilities)
    p = jnp.asarray(probabilities)
    one_hot = label_distribution(jnp.asarray(labels), p)

    def of_class(p: Array, is_class: Array) -> Array:
        return expected_calibration_error(
            p, is_class, num_bins=num_bins, binning=binning, where=where
        )

    return jnp.mean(jax.vmap(of_class, in_axes=-1)(p, one_hot))


def kolmogorov_smirnov_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Largest difference of summed confidence and summed correctness up to a confidence (KSCE).

        max_s | (1/n) Σ_{i: c_i ≤ s} (c_i - a_i) |

    Args:
      probabilities: floating point, `[..., classes]` or those of a binary event `[...]`.
      labels: `[...]` integer ids, or for a binary event 0 or 1.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32, at least |accuracy - mean confidence|.

    Raises:
      ValueError: shapes that do not match.
      TypeError: probabilities that are not floating point, or class labels that are not integers.

    Use it for a number without bins or bandwidth. Too much confidence here and too little there
    cancel only along the order of confidence.

    Cost: one sort and a running sum, O(n log n).

    Example:
      >>> p, came = jnp.array([0.9, 0.8, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> print(kolmogorov_smirnov_calibration_error(p, came).round(3))
      0.15

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838,
    after Gupta et al., "Calibration of Neural Networks using Splines", 2020, arXiv:2006.12800.
    """
    confidence, correct, counted = _events(probabilities, labels, where)
    if confidence.size == 0:
        return jnp.zeros((), confidence.dtype)
    keys = jnp.where(counted, confidence, jnp.inf)
    order = jnp.argsort(keys)
    sorted_keys = keys[order]
    sums = jnp.cumsum((confidence - correct)[order])
    complete = jnp.append(sorted_keys[1:] != sorted_keys[:-1], True)  # ties enter together
    return jnp.max(jnp.where(complete, jnp.abs(sums), 0.0)) / jnp.maximum(counted.sum(), 1)


def maximum_mean_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    bandwidth: float = 0.4,
    where: ArrayLike | None = None,
) -> Array:
    r"""Maximum mean calibration error, by a kernel on confidence (MMCE).

        √( (1/n²) Σ_ij (a_i - c_i) (a_j - c_j) exp(-|c_i - c_j| / h) ),   h = bandwidth

    In order of confidence the kernel is a product of steps, and the double sum a recurrence.

    Args:
      probabilities: floating point, `[..., classes]` or those of a binary event `[...]`.
      labels: `[...]` integer ids, or for a binary event 0 or 1.
      bandwidth: h above 0. Default 0.4, the authors' and the benchmark's.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32. Its gradient with respect to probabilities is finite,
      so that it may be added to a loss.

    Raises:
      ValueError: shapes that do not match, or a `bandwidth` that is not positive.
      TypeError: probabilities that are not floating point, or class labels that are not integers.

    Use it where a differentiable error is wanted, or one without bins.

    Cost: one sort and a scan, O(n log n) time and O(n) memory in place of the n² pairs.

    Example:
      >>> p, came = jnp.array([0.9, 0.8, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> print(maximum_mean_calibration_error(p, came).round(2))
      0.21

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838,
    whose metric is that of Kumar, Sarawagi, Jain, "Trainable Calibration Measures for Neural
    Networks from Kernel Mean Embeddings", 2018.
    """
    check_interval(0, jnp.inf, closed="right", bandwidth=bandwidth)
    confidence, correct, counted = _events(probabilities, labels, where)
    if confidence.size == 0:
        return jnp.zeros((), confidence.dtype)
    order = jnp.argsort(confidence)
    residual, sorted_confidence = (correct - confidence)[order], confidence[order]
    steps = jnp.diff(sorted_confidence, prepend=sorted_confidence[:1])

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    # below_i = Σ_{j ≤ i} residual_j exp(-(c_i - c_j) / h)
    decay = jnp.exp(-steps / bandwidth)
    _, below = jax.lax.associative_scan(compose, (decay, residual))
    square = jnp.sum(residual * (2 * below - residual)) / jnp.maximum(counted.sum(), 1) ** 2
    none = square <= 0  # rounding may take it below
    return jnp.where(none, 0.0, jnp.sqrt(jnp.where(none, 1.0, square)))


def kernel_density_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    bandwidth: float | None = None,
    num_points: int = 1000,
    where: ArrayLike | None = None,
) -> Array:
    r"""Mean difference of confidence and accuracy, both smoothed by a kernel (KDE-ECE).

        ∫ |r - acc(r)| f(r) dr,   f(r) ∝ Σ_i K((r - c_i) / 3h),
        acc(r) = Σ_i a_i K((r - c_i) / 3h) / Σ_i K((r - c_i) / 3h),   K(u) = (1 - u²)³ for |u| < 1

    on [0, 1], where every example is mirrored at the nearer end; h is the standard deviation of the
    kernel.

    Args:
      probabilities: floating point, `[..., classes]` or those of a binary event `[...]`.
      labels: `[...]` integer ids, or for a binary event 0 or 1.
      bandwidth: h above 0. Default: (2n)^(-1/5) times the standard deviation of the confidence of
        the right predictions. It is kept at 1/num_points or above.
      num_points: points of [0, 1] at which the integral is taken, at least 1. Default 1000.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A scalar in [0, 1] in at least float32.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: probabilities that are not floating point, or class labels that are not integers.

    Use it where bins would decide, on a few hundred examples or more.

    Cost: 2 n · num_points evaluations of the kernel, 64 points at a time: O(64 n) memory.

    Example:
      >>> p, came = jnp.array([0.9, 0.8, 0.3, 0.1]), jnp.array([1, 0, 1, 0])
      >>> print(kernel_density_calibration_error(p, came, bandwidth=0.01).round(2))
      0.42

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838,
    after Zhang, Kailkhura, Han, "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty
    Calibration in Deep Learning", 2020, arXiv:2003.07329.
    """
    check_interval(1, jnp.inf, num_points=num_points)
    confidence, correct, counted = _events(probabilities, labels, where)
    if bandwidth is None:
        mean, square = (
            jnp.sum(correct * x) / jnp.maximum(jnp.sum(correct), 1)
            for x in (confidence, jnp.square(confidence))
        )
        variance = square - jnp.square(mean)
        deviation = jnp.sqrt(jnp.where(variance > 0, variance, 1.0)) * (variance > 0)
        h = deviation * (2 * jnp.maximum(counted.sum(), 1)) ** -0.2
    else:
        check_interval(0, jnp.inf, closed="right", bandwidth=bandwidth)
        h = jnp.asarray(bandwidth, confidence.dtype)
    reach = 3 * jnp.maximum(h, 1 / num_points)  # the kernel's standard deviation is a third of it
    mirrored = jnp.where(confidence < 0.5, -confidence, 2 - confidence)

    def at(r: Array) -> tuple[Array, Array]:
        near = (
            jnp.maximum(1 - jnp.square((r - c) / reach), 0) ** 3 for c in (confidence, mirrored)
        )
        density = jnp.where(counted, sum(near), 0.0)
        mass = jnp.sum(density)
        accuracy = jnp.sum(correct * density) / jnp.where(mass > 0, mass, 1.0)
        return mass * jnp.abs(r - accuracy), mass

    points = (jnp.arange(num_points, dtype=confidence.dtype) + 0.5) / num_points
    differences, masses = jax.lax.map(at, points, batch_size=min(64, num_points))
    total = jnp.sum(masses)
    return jnp.sum(differences) / jnp.where(total > 0, total, 1.0)


def brier_score(
    probabilities: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Mean squared difference of probabilities and what happened.

        mean_i Σ_k (p_ik - 1[k = y_i])²,   or mean_i (p_i - y_i)² for a binary event

    Args:
      probabilities: floating point, `[..., classes]` or those of a binary event `[...]`.
      labels: `[...]` integer ids, or for a binary event 0 or 1.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      A scalar in at least float32: in [0, 2] for classes, in [0, 1] for a binary event, which with
      two classes instead is counted twice.

    Raises:
      ValueError: shapes that do not match.
      TypeError: probabilities that are not floating point, or class labels that are neither
        integers nor distributions.

    Use it as a score of calibration and sharpness in one, proper as `log_loss` is, and bounded.

    Cost: one pass over the probabilities.

    Example:
      >>> print(brier_score(jnp.array([[0.7, 0.2, 0.1]]), jnp.array([0])).round(3))
      0.14

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838.
    """
    check_floating(probabilities=probabilities)
    p, y = jnp.asarray(probabilities), jnp.asarray(labels)
    p = p.astype(compute_dtype(p))
    check_broadcastable(y.shape, where=where)
    where = True if where is None else where
    if p.ndim == y.ndim + 1:
        return masked_mean(jnp.sum(jnp.square(p - label_distribution(y, p)), axis=-1), where=where)
    check_shape(p.shape, labels=y)
    return masked_mean(jnp.square(p - y.astype(p.dtype)), where=where)


def calibration_suite(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    bins: tuple[int, ...] = (5, 10, 15, 20, 25, 50, 100, 200, 500),
    where: ArrayLike | None = None,
) -> dict[str, Array]:
    r"""All calibration measures of a benchmark at once, by the names of its data set's columns.

    ECE and MCE with bins of equal width, ECE_em of equal mass, cwCE and cwCE_em by class, for each
    number of bins M as ECE_M and so on; and the measures without bins, KSCE, KDECE, MMCE, NLL and
    Brier.

    Args:
      probabilities: `[..., classes]` floating point.
      labels: `[...]` integer ids.
      bins: numbers of bins, each at least 1. Default: the nine of the benchmark.
      where: boolean, broadcastable to `labels`: the examples that count. Default: all.

    Returns:
      Scalars by name, 5 · len(bins) + 5 of them. The benchmark has them before and after
      temperature scaling, that is a second time on
      `softmax(temperature_scale(logits, fit_temperature(...)))`, and beside them the AUC of
      telling the test data from two others (`roc_auc` of the confidence).

    Raises:
      ValueError: what the single measures raise.
      TypeError: what the single measures raise.

    Use it to compare measures, and to see that a finding does not hang on the number of bins; under
    `jax.jit` their common work is done once.

    Cost: for each number of bins 2 K + 2 binnings, K + 1 of them by a sort; once, the 2000 n kernel
    evaluations of KDECE.

    Example:
      >>> p = jnp.array([[0.9, 0.1], [0.3, 0.7]])
      >>> list(calibration_suite(p, jnp.array([0, 0]), bins=(5,)))[:5]
      ['ECE_5', 'MCE_5', 'ECE_em_5', 'cwCE_5', 'cwCE_em_5']

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838.
    """
    suite = {}
    for m in bins:
        curve = reliability_curve(probabilities, labels, num_bins=m, where=where)
        suite[f"ECE_{m}"] = _curve_error(curve, 1)
        suite[f"MCE_{m}"] = _curve_error(curve, np.inf)
        suite[f"ECE_em_{m}"] = expected_calibration_error(
            probabilities, labels, num_bins=m, binning="mass", where=where
        )
        binnings: dict[str, Binning] = {"cwCE": "width", "cwCE_em": "mass"}
        for name, binning in binnings.items():
            suite[f"{name}_{m}"] = classwise_calibration_error(
                probabilities, labels, num_bins=m, binning=binning, where=where
            )
    without_bins = {
        "KSCE": kolmogorov_smirnov_calibration_error,
        "KDECE": kernel_density_calibration_error,
        "MMCE": maximum_mean_calibration_error,
        "NLL": log_loss,
        "Brier": brier_score,
    }
    return suite | {
        name: metric(probabilities, labels, where=where) for name, metric in without_bins.items()
    }


def plot_reliability(curve: ReliabilityCurve, *, ax: Any = None) -> Any:
    """Draws accuracy over confidence, with the gap to the diagonal of each bin.

    Args:
      curve: from `reliability_curve`. Bins without examples are left out.
      ax: matplotlib axes. Default: those of a new figure.

    Returns:
      The axes. Points above the diagonal are under-confident, those below over-confident; the area
      of a point is its share of the examples.

    Raises:
      ValueError: a curve without examples.

    Use it with `binning="mass"` to give every point the same weight.

    Cost: one point for each bin, on the host.

    Example:
      >>> curve = reliability_curve(jnp.array([0.9, 0.8, 0.3]), jnp.array([1, 0, 0]), num_bins=2)
      >>> plot_reliability(curve).get_xlabel()
      'confidence'

    Reference: Tao, Zhu, Guo, Dong, Xu, "A Benchmark Study on Calibration", 2023, arXiv:2308.11838.
    """
    confidence, accuracy, count = (np.asarray(x, float) for x in curve)
    filled = count > 0
    if not filled.any():
        raise ValueError("curve must have examples, got counts of 0 in all bins")
    ax = new_axes() if ax is None else ax
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", label="calibrated")
    ax.vlines(confidence[filled], confidence[filled], accuracy[filled], alpha=0.4)
    share = count[filled] / count.sum()
    ax.scatter(confidence[filled], accuracy[filled], s=20 + 400 * share, label="bins")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.legend(frameon=False)
    return ax


def _curve_error(curve: ReliabilityCurve, norm: float) -> Array:
    gaps = jnp.abs(curve.accuracy - curve.confidence)
    if np.isinf(norm):
        return jnp.max(gaps)
    total = jnp.sum(curve.num_examples * gaps**norm) / jnp.maximum(jnp.sum(curve.num_examples), 1)
    if norm == 1:
        return total
    return jnp.where(total == 0, 0.0, jnp.where(total == 0, 1.0, total) ** (1 / norm))


def _events(
    probabilities: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Confidence, correctness, and whether they count, `[n]` each; both are 0 where they do not."""
    check_floating(probabilities=probabilities)
    p, y = jnp.asarray(probabilities), jnp.asarray(labels)
    p = p.astype(compute_dtype(p))
    check_broadcastable(y.shape, where=where)
    if p.ndim == y.ndim + 1:
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"labels of classes must be integer ids, got {y.dtype.name}")
        check_shape(p.shape[:-1], labels=y)
        predicted = jnp.argmax(p, axis=-1)
        confidence = jnp.take_along_axis(p, predicted[..., None], axis=-1)[..., 0]
        known = (y >= 0) & (y < p.shape[-1])
        correct = jnp.where(known, (predicted == y).astype(p.dtype), jnp.nan)
    else:
        check_shape(p.shape, labels=y)
        confidence, correct = p, y.astype(p.dtype)
    counted = jnp.broadcast_to(True if where is None else where, y.shape)
    confidence, correct = (jnp.where(counted, x, 0.0).ravel() for x in (confidence, correct))
    return confidence, correct, counted.ravel()
