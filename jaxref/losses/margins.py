"""Losses of the margin: of two classes, drawn at random or fixed, and of many classes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.exponential import linear_tail_exp
from jaxref.core.labels import label_distribution
from jaxref.core.numerics import compute_dtype
from jaxref.core.ranks import ascending_ranks
from jaxref.core.shards import AxisName, sum_over_shards

_MARGIN_LOSSES: dict[str, Callable[[Array], Array]] = {
    "hinge": lambda s: jax.nn.relu(1 - s),
    "exponential": lambda s: linear_tail_exp(-s),
    "logistic": lambda s: jax.nn.softplus(-s),
    "inverse_tail_hinge": lambda s: jnp.where(s > 1, 1 / jnp.maximum(s, 1) - 1, 1 - s),
    "log_tail_hinge": lambda s: jnp.where(s > 1, -jnp.log(jnp.maximum(s, 1)), 1 - s),
}


def margin_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    kind: str = "logistic",
    where: ArrayLike | None = None,
) -> Array:
    r"""A convex loss of the margin of a binary decision, one of five fixed ones.

    With the label y in {0, 1} and the margin s = (2y - 1) · score,

        hinge                max(1 - s, 0)
        exponential          exp(-s)
        logistic             log(1 + exp(-s))
        inverse_tail_hinge   1 - s for s ≤ 1, then 1/s - 1
        log_tail_hinge       1 - s for s ≤ 1, then -log s

    All are classification-calibrated: convex with a negative slope at 0. The two tails make the
    hinge fall on beyond a margin of 1, as the slopes of `ensemble_calibrated_loss` do; the last has
    no lower bound.

    Args:
      scores: `[...]` floating point, positive for class 1.
      labels: y of the shape of `scores`: booleans, integers or floating point, each 0 or 1; any
        other value gives NaN for its example.
      kind: a name from the table. Default "logistic".
      where: boolean, broadcastable to `scores`; excluded entries have loss 0.

    Returns:
      `[...]` losses in the type of `scores`. The exponential goes on as its tangent once it passes
      1e27 (in float32).

    Raises:
      ValueError: a `kind` that is not in the table, or shapes that do not match.
      TypeError: scores that are not floating point.

    Use it as the fixed loss that a random one is compared with; `optax.losses` has the logistic one
    for soft labels.

    Cost: one pass over the scores.

    Example:
      >>> losses = margin_loss(jnp.array([2.0, 2.0]), jnp.array([1, 0]), kind="hinge")
      >>> print(losses)
      [0. 3.]

    Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification", 2024, arXiv:2409.00908, whose comparison these are of.
    """
    if kind not in _MARGIN_LOSSES:
        raise ValueError(f"kind must be one of {', '.join(_MARGIN_LOSSES)}, got {kind!r}")
    losses = _MARGIN_LOSSES[kind](_margins(scores, labels, where))
    if where is not None:
        losses = jnp.where(where, losses, 0.0)
    return losses.astype(jnp.result_type(scores))


def ensemble_calibrated_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    key: ArrayLike,
    box_cox_lambda: ArrayLike = 0.0,
    slope_floor: float = -1.0,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The slope of a random calibrated loss times each margin (a loss of the set): EnsLoss.

    Gradient descent sees a margin loss φ by its slopes alone. Each call draws one φ, through its
    slopes g_i = φ'(s_i) at the margins s_i of the set (`sample_calibrated_derivatives`), and gives

        L_i = stop_gradient(g_i) s_i,   s_i = (2 y_i - 1) · score_i

    The gradient with respect to score_i is (2 y_i - 1) g_i. The value has no meaning of its own: it
    can be negative and need not fall.

    Args:
      scores: `[...]` floating point, positive for class 1; all its entries are one set.
      labels: y of the shape of `scores`: booleans, integers or floating point, each 0 or 1; any
        other value gives NaN for its example.
      key: a key from `jax.random`, a new one for each step.
      box_cox_lambda: λ, finite: how heavy-tailed the slopes are. Default 0, the authors'.
      slope_floor: the steepest slope, negative. Default -1, the authors'.
      epsilon: what every slope is at least below 0, at least 0. Default 1e-6, the authors'.
      where: boolean, broadcastable to `scores`; excluded entries are no members of the set and have
        loss 0.
      axis_name: name or names of the mesh or vmap axes over which the set is spread. The key has to
        be the same on all shards.

    Returns:
      `[...]` values in the type of `scores`, for their mean to be differentiated.

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: scores that are not floating point.

    Use it to keep a large network from fitting the quirks of one loss, in batches of some dozens at
    least; `periodic_ensemble_calibrated_loss` varies λ, too, and `margin_loss` has losses whose
    values can be watched.

    Cost: that of `sample_calibrated_derivatives`: two sorts of n numbers a step, and n draws.

    Example:
      >>> scores, labels = jnp.array([0.5, -1.0, 3.0]), jnp.array([1, 1, 0])
      >>> loss = lambda s: ensemble_calibrated_loss(s, labels, key=jax.random.key(0)).sum()
      >>> print(jnp.sign(jax.grad(loss)(scores)))
      [-1. -1.  1.]

    Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification", 2024, arXiv:2409.00908.
    """
    margins = _margins(scores, labels, where)
    slopes = sample_calibrated_derivatives(
        margins,
        key=key,
        box_cox_lambda=box_cox_lambda,
        slope_floor=slope_floor,
        epsilon=epsilon,
        where=where,
        axis_name=axis_name,
    )
    return (slopes * margins).astype(jnp.result_type(scores))


class EnsembleState(NamedTuple):
    """What `periodic_ensemble_calibrated_loss` carries from step to step.

    Attributes:
      box_cox_lambda: float32, λ as it was drawn last; 0 before.
      epoch: int32, the epoch of the last step, from 1; 0 before the first.
      examples: int32, how many examples were seen in it.
      num_examples: int32, how many an epoch has.

    Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification", 2024, arXiv:2409.00908.
    """

    box_cox_lambda: Array
    epoch: Array
    examples: Array
    num_examples: Array


def periodic_ensemble_calibrated_init(num_examples: int) -> EnsembleState:
    """The state of `periodic_ensemble_calibrated_loss` before the first step.

    Args:
      num_examples: the size of the training set, at least 1.

    Returns:
      An `EnsembleState` with λ = 0.

    Raises:
      ValueError: `num_examples` below 1.

    Use it once, with the size of the training set and not of a batch: epochs are counted by it.

    Cost: four numbers.

    Example:
      >>> periodic_ensemble_calibrated_init(3).box_cox_lambda
      Array(0., dtype=float32)

    Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification", 2024, arXiv:2409.00908.
    """
    check_interval(1, jnp.inf, num_examples=num_examples)
    size = jnp.asarray(num_examples, jnp.int32)
    return EnsembleState(jnp.float32(0), jnp.int32(0), size, size)  # the next step begins an epoch


def periodic_ensemble_calibrated_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    state: EnsembleState,
    *,
    key: ArrayLike,
    period: int = 10,
    slope_floor: float = -1.0,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, EnsembleState]:
    r"""The slope of a random calibrated loss of a changing kind times each margin (of the set).

    It is `ensemble_calibrated_loss` with a λ that is 0 at first and drawn anew with the first step
    of every epoch e = 1, 2, ... that the period p divides:

        λ ~ U(-1, 1)   where e mod p = 0

    An epoch begins once as many examples as the training set has were seen since the last.

    Args:
      scores: `[...]` floating point, positive for class 1; all its entries are one set.
      labels: y of the shape of `scores`: booleans, integers or floating point, each 0 or 1; any
        other value gives NaN for its example.
      state: from `periodic_ensemble_calibrated_init` or the step before.
      key: a key from `jax.random`, a new one for each step.
      period: p at least 1, in epochs. Default 10, the least that the authors compare.
      slope_floor: the steepest slope, negative. Default -1, the authors'.
      epsilon: what every slope is at least below 0, at least 0. Default 1e-6, the authors'.
      where: boolean, broadcastable to `scores`; excluded entries are no members of the set, have
        loss 0 and do not count as seen.
      axis_name: name or names of the mesh or vmap axes over which the set is spread. The key has to
        be the same on all shards.

    Returns:
      `[...]` values in the type of `scores`, for their mean to be differentiated, and the next
      state, which has no gradient.

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: scores that are not floating point.

    Use it for an ensemble over losses of light and of heavy tails, in runs of many epochs;
    `ensemble_calibrated_loss` keeps to one λ and needs no state.

    Cost: that of `ensemble_calibrated_loss`, two sorts of n numbers and n draws a step; a state of
    four numbers.

    Example:
      >>> scores, labels = jnp.array([0.5, -1.0, 3.0]), jnp.array([1, 1, 0])
      >>> state, key = periodic_ensemble_calibrated_init(3), jax.random.key(0)
      >>> lambdas = []
      >>> for epoch in range(4):
      ...     _, state = periodic_ensemble_calibrated_loss(
      ...         scores, labels, state, key=jax.random.fold_in(key, epoch), period=2
      ...     )
      ...     lambdas.append(float(state.box_cox_lambda))
      >>> [a == b for a, b in zip([0.0, *lambdas], lambdas)]
      [True, False, True, False]

    Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification", 2024, arXiv:2409.00908.
    """
    check_interval(1, jnp.inf, period=period)
    slopes_key, lambda_key = jax.random.split(key)
    epoch = state.epoch + state.examples // state.num_examples
    redraw = epoch // period > state.epoch // period
    drawn = jax.random.uniform(lambda_key, (), jnp.float32, -1, 1)
    box_cox_lambda = jnp.where(redraw, drawn, state.box_cox_lambda)
    losses = ensemble_calibrated_loss(
        scores,
        labels,
        key=slopes_key,
        box_cox_lambda=box_cox_lambda,
        slope_floor=slope_floor,
        epsilon=epsilon,
        where=where,
        axis_name=axis_name,
    )
    admitted = True if where is None else where
    seen = jnp.sum(jnp.broadcast_to(admitted, jnp.shape(scores)), dtype=jnp.int32)
    seen = sum_over_shards(seen, axis_name)
    examples = state.examples % state.num_examples + seen
    return losses, EnsembleState(box_cox_lambda, epoch, examples, state.num_examples)


def sample_calibrated_derivatives(
    margins: ArrayLike,
    *,
    key: ArrayLike,
    box_cox_lambda: ArrayLike = 0.0,
    slope_floor: float = -1.0,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Slopes of a random convex, classification-calibrated loss at the margins of a set.

    A convex loss is calibrated if and only if its slope at 0 is negative. With ξ_i ~ N(0, 1), one
    for each of the n margins s_i, and the inverse Box-Cox transform,

        r_i = -B(ξ_i),   B(ξ) = max(1 + λ ξ, 0)^{1/λ},   exp ξ at λ = 0   (λ = box_cox_lambda)
        g_i = the rank(s_i)-th smallest of max(r, slope_floor), over max(s_i, 1), less ε

    so that slopes are negative and do not decrease with the margin: a convex loss that falls
    everywhere. Beyond a margin of 1 it falls ever more slowly.

    Args:
      margins: s `[...]` floating point, one set.
      key: a key from `jax.random`.
      box_cox_lambda: λ, finite. Default 0.
      slope_floor: the steepest slope, negative. Default -1, the authors'.
      epsilon: ε at least 0. Default 1e-6, the authors'.
      where: boolean, broadcastable to `margins`; excluded entries are not ranked and have slope 0.
      axis_name: name or names of the mesh or vmap axes over which the set is spread. The key has to
        be the same on all shards.

    Returns:
      Slopes `[...]` in at least float32, in [slope_floor - ε, 0), with no gradient.

    Raises:
      ValueError: a hyperparameter out of its range, or a `where` that does not broadcast.
      TypeError: margins that are not floating point.

    Use it to look at the losses that `ensemble_calibrated_loss` draws, on a grid of margins.

    Cost: two sorts and n draws, O(n log n), for the n margins of all shards, on each of them.

    Example:
      >>> margins = jnp.array([2.0, -1.0, 0.0])
      >>> slopes = sample_calibrated_derivatives(margins, key=jax.random.key(0))
      >>> print(jnp.argsort(slopes), (slopes < 0).all())
      [1 2 0] True

    Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification", 2024, arXiv:2409.00908.
    """
    check_floating(margins=margins)
    check_interval(-jnp.inf, jnp.inf, box_cox_lambda=box_cox_lambda)
    check_interval(-jnp.inf, 0, closed="neither", slope_floor=slope_floor)
    check_interval(0, jnp.inf, epsilon=epsilon)
    check_broadcastable(jnp.shape(margins), where=where)
    s = jax.lax.stop_gradient(jnp.asarray(margins).astype(compute_dtype(margins)))
    ranks, number = ascending_ranks(s, where=where, axis_name=axis_name)
    drawn = s.size if axis_name is None else s.size * jax.lax.axis_size(axis_name)
    xi = jax.random.normal(key, (drawn,), s.dtype)
    steepest_first = jnp.maximum(-_inverse_box_cox(xi, box_cox_lambda), slope_floor)
    # n of the draws, sorted: the others go to the end, where no rank of a member leads
    steepest_first = jnp.sort(jnp.where(jnp.arange(drawn) < number, steepest_first, jnp.inf))
    slopes = steepest_first[ranks] / jnp.maximum(s, 1) - epsilon
    if where is not None:
        slopes = jnp.where(where, slopes, 0.0)
    return jax.lax.stop_gradient(slopes)


def crammer_singer_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""The multi-class hinge: by how much the worst rival comes within a margin of the true class.

        L = max_k (m 1[k≠y] + f_k - f_y)

    with m = margin; k = y makes it at least 0. It is the limit of
    `label_distributionally_robust_loss` at temperature 0. For labels that are distributions q, f_y
    is Σ_k q_k f_k and 1[k≠y] is 1 - q_k.

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      margin: m at least 0. Default 1.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: a negative `margin`, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where one class is certain for each input; else it is not consistent, which
    `label_distributionally_robust_loss` repairs. `weston_watkins_loss` counts every rival.

    Cost: one pass over the logits, without exponentials; targets as large as they are.

    Example:
      >>> print(crammer_singer_loss(jnp.array([[2.0, 1.5, -1.0]]), jnp.array([0])))
      [0.5]

    Reference: Crammer, Singer, "On the Algorithmic Implementation of Multiclass Kernel-based Vector
    Machines", JMLR 2, 2001, as in Zhu, Ying, Yang, "Label Distributionally Robust Losses for
    Multi-class Classification: Consistency, Robustness and Adaptivity", 2021, arXiv:2112.14869.
    """
    violations, _ = margin_violations(logits, labels, margin=margin, axis=axis, where=where)
    return jnp.squeeze(largest(violations, axis), axis).astype(jnp.result_type(logits))


def weston_watkins_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""The multi-class hinge that counts every rival within a margin of the true class.

        L = (1/K) Σ_k max(m 1[k≠y] + f_k - f_y, 0)

    over K classes, the true one included, with m = margin. For labels that are distributions q, f_y
    is Σ_k q_k f_k and 1[k≠y] is 1 - q_k.

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      margin: m at least 0. Default 1.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, K counts them. Default: all.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: a negative `margin`, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it in place of `crammer_singer_loss` where a gradient for all rivals at once helps; that one
    has a gradient for the worst alone.

    Cost: one pass over the logits, without exponentials; targets as large as they are.

    Example:
      >>> print(weston_watkins_loss(jnp.array([[2.0, 1.5, 1.25]]), jnp.array([0])).round(3))
      [0.25]

    Reference: Weston, Watkins, "Support Vector Machines for Multi-Class Pattern Recognition", 1999,
    as in Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification:
    Consistency, Robustness and Adaptivity", 2021, arXiv:2112.14869.
    """
    violations, count = margin_violations(logits, labels, margin=margin, axis=axis, where=where)
    total = jnp.sum(jax.nn.relu(violations), axis=axis, keepdims=True)
    return jnp.squeeze(total / count, axis=axis).astype(jnp.result_type(logits))


def margin_violations(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    margin: float,
    axis: int,
    where: ArrayLike | None,
) -> tuple[Array, Array]:
    """`m (1 - q_k) + f_k - Σ_j q_j f_j` for every class, and the number of classes, at least 1.

    In at least float32, with the class axis kept in both. Classes that `where` excludes are 0,
    which is no more than the largest entry of the others.
    """
    check_interval(0, jnp.inf, margin=margin)
    q = label_distribution(labels, logits, axis=axis, where=where)
    f = jnp.asarray(logits).astype(q.dtype)
    admitted = jnp.ones(f.shape, bool) if where is None else jnp.broadcast_to(where, f.shape)
    f = jnp.where(admitted, f, 0.0)
    own = jnp.sum(q * f, axis=axis, keepdims=True)
    violations = jnp.where(admitted, margin * (1 - q) + f - own, 0.0)
    return violations, jnp.maximum(admitted.sum(axis=axis, keepdims=True), 1)


def largest(values: Array, axis: int) -> Array:
    """The maximum of computed values, the axis kept, with a gradient for one entry.

    The gradient of jnp.max asks which entries equal it, and finds none where a compiler computes
    the values twice and rounds them differently.
    """
    place = jnp.argmax(jax.lax.stop_gradient(values), axis=axis, keepdims=True)
    return jnp.take_along_axis(values, place, axis)


def _margins(scores: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> Array:
    """(2y - 1) · score in at least float32: NaN for a label that is neither 0 nor 1, and 0 for
    entries that `where` excludes."""
    check_floating(scores=scores)
    check_shape(jnp.shape(scores), labels=labels)
    check_broadcastable(jnp.shape(scores), where=where)
    y = jnp.asarray(labels)
    signs = jnp.where(y == 1, 1.0, jnp.where(y == 0, -1.0, jnp.nan))
    f = jnp.asarray(scores).astype(compute_dtype(scores))
    margins = signs.astype(f.dtype) * f
    return margins if where is None else jnp.where(where, margins, 0.0)


def _inverse_box_cox(x: Array, lam: ArrayLike) -> Array:
    """max(1 + λ x, 0)^{1/λ}, and exp x at λ = 0; infinite for a base of 0 and λ below it."""
    lam = jnp.asarray(lam, x.dtype)
    some = jnp.where(lam == 0, 1.0, lam)
    return jnp.exp(jnp.where(lam == 0, x, jnp.log1p(jnp.maximum(lam * x, -1)) / some))
