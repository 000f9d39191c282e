"""Regression helped by classification: targets in bins, whose class is predicted beside the number.

A network with two heads on one backbone predicts the number and the class of its interval; only the
number is used in the end. The bins are found from the training targets once, on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.losses.cross_entropy import softmax_cross_entropy
from jaxref.losses.regression import squared_error


def target_bins(targets: ArrayLike, bins: int, *, equalize: bool = False) -> np.ndarray:
    r"""The edges of intervals that divide the range of the training targets into classes.

    `bins` intervals of equal width between the smallest and the largest target, or, equalized, of
    those the unions that `histogram_equalized_edges` finds.

    Args:
      targets: the training targets, finite numbers of any shape, known when it is called.
      bins: how many intervals, at least 1; the paper tries 4 to 1024.
      equalize: whether to join intervals until each has about as many targets. Default: no.

    Returns:
      float32 `[classes + 1]` edges in ascending order; `bins` classes, or fewer where equalized.
      One number alone gets a range of width 1 around it.

    Raises:
      ValueError: `bins` not positive, no target, or one that is not finite.
      TypeError: `bins` not an integer.

    Use it before training, with the targets of all of it; `bin_targets` gives the classes.

    Cost: one pass over the targets, on the host.

    Example:
      >>> print(target_bins([0.0, 0.1, 0.2, 1.0, 4.0], 4))
      [0. 1. 2. 3. 4.]
      >>> print(target_bins([0.0, 0.1, 0.2, 1.0, 4.0], 4, equalize=True))
      [0. 1. 4.]

    Reference: Pintea, Lin, Dijkstra, van Gemert, "A step towards understanding why classification
    helps regression", 2023, arXiv:2308.10603.
    """
    if not isinstance(bins, (int, np.integer)):
        raise TypeError(f"bins must be an integer, got {bins!r}")
    check_interval(1, np.inf, bins=bins)
    values = np.asarray(targets, np.float64).ravel()
    if not values.size:
        raise ValueError("targets must have at least one number, got none")
    check_interval(-np.inf, np.inf, targets=values)
    counts, edges = np.histogram(values, bins)
    if equalize:
        return histogram_equalized_edges(counts, edges)[0]
    return edges.astype(np.float32)


def histogram_equalized_edges(
    histogram: ArrayLike, edges: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    r"""Joins the bins of a histogram until each holds about as many.

        q_i = ⌈K C_i / N⌉,   C_i = Σ_{j ≤ i} h_j,   N = Σ_j h_j

    for the counts h of K bins: neighbours of one q become one class. Empty bins join the one before
    them, those at the start the first that is not empty, and are no part of K.

    Args:
      histogram: h `[bins]`, integers at least 0, not all 0, known when it is called.
      edges: `[bins + 1]` numbers in ascending order.

    Returns:
      The edges `[classes + 1]` (float32) and counts `[classes]` (int64) of the classes.

    Raises:
      ValueError: shapes that do not match, a negative count or none at all, or edges that do not
        ascend.

    Use it where a few values have most of the targets: it is recommended for very skewed ones.
    `target_bins` calls it on the targets themselves.

    Cost: one pass over the bins, on the host.

    Example:
      >>> edges, counts = histogram_equalized_edges([0, 4, 1, 1, 2], [0, 1, 2, 3, 4, 5])
      >>> print(edges, counts)
      [0. 2. 4. 5.] [4 2 2]

    Reference: Pintea, Lin, Dijkstra, van Gemert, "A step towards understanding why classification
    helps regression", 2023, arXiv:2308.10603.
    """
    h, e = np.asarray(histogram), np.asarray(edges)
    if h.ndim != 1:
        raise ValueError(f"histogram must have shape [bins], got {h.shape}")
    check_shape((h.size + 1,), edges=e)
    check_interval(0, np.inf, histogram=h)
    _check_ascending(e)
    if not h.any():
        raise ValueError("histogram must have a bin that is not empty, got zeros alone")
    first = np.flatnonzero(h)[0]
    kept = h[first:].astype(np.int64)
    classes = -(-kept.size * np.cumsum(kept) // kept.sum())  # whole numbers do not round
    starts = np.flatnonzero(np.diff(classes, prepend=0))
    inner = e[first + starts[1:]]
    joined = np.concatenate([e[:1], inner, e[-1:]]).astype(np.float32)
    return joined, np.add.reduceat(kept, starts)


def bin_targets(targets: ArrayLike, edges: ArrayLike) -> Array:
    r"""The class of the interval that each target lies in.

        class = the i with edges_i ≤ target < edges_{i + 1}

    Args:
      targets: `[...]` numbers.
      edges: `[classes + 1]` numbers in ascending order.

    Returns:
      int32 `[...]` from 0 to classes - 1. What is below the first edge is in the first class, and
      what is at the last edge or above it in the last: targets of a test may be out of range.

    Raises:
      ValueError: less than two edges, or edges that do not ascend.

    Use it with the edges of `target_bins`; `regression_classification_loss` calls it itself.

    Cost: a comparison of each target with each edge, without a loop.

    Example:
      >>> print(bin_targets(jnp.array([-3.0, 0.5, 1.0, 4.0]), jnp.array([0.0, 1.0, 4.0])))
      [0 0 1 1]

    Reference: Pintea, Lin, Dijkstra, van Gemert, "A step towards understanding why classification
    helps regression", 2023, arXiv:2308.10603.
    """
    _check_ascending(edges)
    # comparing with all is as large as the logits, and has no loop
    places = jnp.searchsorted(
        jnp.asarray(edges)[1:-1], jnp.asarray(targets), side="right", method="compare_all"
    )
    return places.astype(jnp.int32)


def balanced_class_mask(labels: ArrayLike, counts: ArrayLike, *, key: Array) -> Array:
    r"""A random choice of examples in which every class is as frequent as the rarest.

        P(kept | class k) = min_j c_j / c_k

    Args:
      labels: `[...]` integer classes, as of `bin_targets`. One that is no class is not kept.
      counts: c `[classes]` at least 0: how many training targets each class has. Classes without
        any do not count towards the least.
      key: the random key.

    Returns:
      boolean `[...]`, for `class_where` of `regression_classification_loss`.

    Raises:
      ValueError: `counts` of another shape, or negative.
      TypeError: labels that are not integers.

    Use it, drawn anew for every batch so that all examples are seen in time, for classes that
    differ after equalization by `target_bins` still.

    Cost: one random number an example.

    Example:
      >>> labels = jnp.array([0, 0, 0, 0, 1])
      >>> print(balanced_class_mask(labels, jnp.array([4, 1]), key=jax.random.key(3)))
      [ True False False False  True]

    Reference: Pintea, Lin, Dijkstra, van Gemert, "A step towards understanding why classification
    helps regression", 2023, arXiv:2308.10603.
    """
    labels, c = jnp.asarray(labels), jnp.asarray(counts)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype.name}")
    if c.ndim != 1 or not c.size:
        raise ValueError(f"counts must have shape [classes], got {c.shape}")
    check_interval(0, np.inf, counts=counts)
    c = c.astype(compute_dtype(c))
    least = jnp.min(c, where=c > 0, initial=jnp.inf)
    keep = jnp.where(c > 0, least / jnp.where(c > 0, c, 1), 0)
    known = (labels >= 0) & (labels < c.size)
    return known & (jax.random.uniform(key, labels.shape) < keep[jnp.where(known, labels, 0)])


def regression_classification_loss(
    predictions: ArrayLike,
    class_logits: ArrayLike,
    targets: ArrayLike,
    edges: ArrayLike,
    *,
    regression_weight: float = 100.0,
    class_where: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Squared error of a number, and cross-entropy of the interval that it lies in.

        L = λ (f - y)² - log softmax_c(z),   c = bin_targets(y, edges),   λ = regression_weight

    for the two heads f and z of one backbone. Squared error fits p(y | x) as the training targets
    are distributed; where some are rare, the class, which weighs them by -log p, draws the features
    back to them. The heads touch one another through the backbone only.

    Args:
      predictions: f `[...]` floating point.
      class_logits: z `[..., classes]` floating point.
      targets: y `[...]` numbers.
      edges: `[classes + 1]` numbers in ascending order, as of `target_bins`.
      regression_weight: λ at least 0. Default 100, the paper's for clean targets; it takes 1000 for
        noisy ones, and 10000 for others than those trained on. 0 leaves the class alone.
      class_where: boolean, broadcastable to `targets`: the examples whose class counts, such as
        those of `balanced_class_mask`. The others keep the first term. Default: all.
      where: boolean, broadcastable to `targets`; excluded entries have loss 0. Default: all.

    Returns:
      `[...]` losses in the type of `predictions`. One class gives λ (f - y)².

    Raises:
      ValueError: a negative `regression_weight`, edges that do not ascend, or shapes that do not
        match.
      TypeError: predictions or logits that are not floating point.

    Use it where the targets are spread unevenly and all of the range matters; where they are
    uniform, `squared_error` alone does as well.

    Cost: that of a softmax over the classes; a second head of the model.

    Example:
      >>> predictions, class_logits = jnp.array([0.5, 2.0]), jnp.array([[2.0, 0.0], [2.0, 0.0]])
      >>> targets, edges = jnp.array([0.5, 2.1]), jnp.array([0.0, 1.0, 4.0])
      >>> print(regression_classification_loss(predictions, class_logits, targets, edges).round(3))
      [0.127 3.127]

    Reference: Pintea, Lin, Dijkstra, van Gemert, "A step towards understanding why classification
    helps regression", 2023, arXiv:2308.10603.
    """
    check_floating(predictions=predictions, class_logits=class_logits)
    check_interval(0, np.inf, regression_weight=regression_weight)
    entries = jnp.shape(predictions)
    check_shape(entries, targets=targets)
    _check_ascending(edges)
    check_shape((*entries, jnp.size(edges) - 1), class_logits=class_logits)
    check_broadcastable(entries, class_where=class_where, where=where)
    dtype = compute_dtype(predictions, class_logits)
    error = squared_error(jnp.asarray(predictions).astype(dtype), targets, where=where)
    counted = jnp.ones(entries, bool)
    for mask in (class_where, where):
        if mask is not None:
            counted &= jnp.asarray(mask)
    class_loss = softmax_cross_entropy(
        jnp.asarray(class_logits).astype(dtype),
        bin_targets(targets, edges),
        where=counted[..., None],
    )
    return (regression_weight * error + class_loss).astype(jnp.result_type(predictions))


def _check_ascending(edges: ArrayLike) -> None:
    """Raises ValueError unless there are two edges or more, in ascending order where known."""
    if jnp.ndim(edges) != 1 or jnp.size(edges) < 2:
        raise ValueError(f"edges must have shape [classes + 1], got {jnp.shape(edges)}")
    if not isinstance(edges, jax.core.Tracer) and not np.all(np.diff(np.asarray(edges)) > 0):
        raise ValueError(f"edges must be in ascending order, got {np.asarray(edges)}")
