"""Losses for classes of very different sizes: focal, self-adjusting Dice, and hard negatives."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import expected_over_labels, label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.ranks import ascending_ranks
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.classification import poly1_focal_loss
from jaxref.losses.segmentation import Axes, dice_loss


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float = 3.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy that fades for examples whose class is predicted with confidence.

        L = -(1 - p)^γ log p,   p = softmax(f)_y

    for logits f and the label y. Well predicted examples, p near 1, lose their weight, so that the
    many easy ones do not drown the few hard ones; the price is that confidence stays low
    (`dual_focal_loss` corrects that). Labels that are distributions give `Σ_k q_k L(p_k)`.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      gamma: γ at least 0; 0 is cross-entropy. Default 3, the dual focal paper's for this baseline.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats; 0 where no class is admitted.

    Raises:
      ValueError: a negative `gamma`, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it for one label among several classes where easy examples are the most by far;
    `sigmoid_focal_loss` is for independent decisions.

    Cost: that of cross-entropy, a softmax, and one power for each label.

    Example:
      >>> losses = focal_loss(jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1]), gamma=2.0)
      >>> print(losses.round(4))
      [0.0018 1.6501]

    Reference: Tao, Dong, Xu, "Dual Focal Loss for Calibration", 2023, arXiv:2305.13665, whose
    baseline is the loss of Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object
    Detection", 2017, arXiv:1708.02002.
    """
    check_interval(0, jnp.inf, gamma=gamma)

    def loss(log_p: Array) -> Array:
        # The floor keeps the gradient of miss**gamma finite for gamma < 1 where miss underflows.
        miss = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(log_p.dtype).tiny)
        return -(miss**gamma) * log_p

    losses = expected_over_labels(loss, labels, logits, axis=axis, where=where)
    return losses.astype(jnp.result_type(logits))


def sigmoid_focal_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    where: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropy that fades for decisions predicted with confidence, per decision.

        L = α_t (1 - p_t)^γ BCE(p, t),   α_t = α t + (1 - α) (1 - t)

    with p = sigmoid(logit) and p_t = p t + (1 - p) (1 - t). It is `poly1_focal_loss` at ε = 0.
    The loss falls in γ for every logit and target, so that γ cannot be learned on the training
    loss: choose it by what unseen data say.

    Args:
      logits: `[...]` floating point, one binary decision each.
      targets: t `[...]` of the shape of `logits`, values in [0, 1] (booleans and integers too).
      gamma: γ at least 0; 0 without α is binary cross-entropy. Default 2, Lin et al.'s.
      alpha: α in [0, 1], weight of the positives, 1 - α of the negatives; None weighs both by 1.
        Default 0.25, Lin et al.'s at γ = 2.
      where: boolean, broadcastable to `logits`; excluded entries have loss 0.

    Returns:
      `[...]` losses in the type of `logits`, in nats.

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: logits that are not floating point.

    Use it for fake or genuine, object or background, where most decisions are easy; `focal_loss` is
    the form over one softmax.

    Cost: one pass over the logits, with a power for each.

    Example:
      >>> losses = sigmoid_focal_loss(jnp.array([2.0, 2.0]), jnp.array([1, 0]))
      >>> print(losses.round(4))
      [0.0005 1.2375]

    Reference: Shamanth, Mathias, Vijayalakshmi, "Detection of fake faces in videos", 2022,
    arXiv:2201.12051, which tunes γ of Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense
    Object Detection", 2017, arXiv:1708.02002.
    """
    return poly1_focal_loss(logits, targets, epsilon=0.0, gamma=gamma, alpha=alpha, where=where)


def self_adjusting_dice_loss(
    probabilities: ArrayLike,
    targets: ArrayLike,
    *,
    alpha: float = 1.0,
    smooth: float = 1.0,
    squared_denominator: bool = False,
    reduce_axes: Axes | None = (),
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Dice loss on down-weighted probabilities, of each entry or (a loss of the set) of many.

        L = 1 - (2 Σ w y + g) / (Σ w + Σ y + g),   w = (1 - p)^α p

    with p the probability of the positive class, y the target and g = smooth: `dice_loss` of w. The
    sums run over `reduce_axes`; without any, every entry is a set by itself, the paper's formula,
    in which negatives count through g alone, w / (w + g). The factor (1 - p)^α takes weight from
    decisions that are made. w rises with p up to 1 / (1 + α) only: an α near 1 pushes no positive
    much beyond a half, one near 0 does.

    Args:
      probabilities: p, floating point in [0, 1] of any shape, after a sigmoid or softmax. Values
        outside are not refused; w is meaningless there.
      targets: y, of the shape of `probabilities`, in [0, 1] (booleans and integers too); or class
        ids of that shape without its last axis, the classes.
      alpha: α at least 0; 0 is `dice_loss`. Default 1, the paper's formula; its released scripts
        have 0.01.
      smooth: g at least 0. Default 1, as in the released scripts.
      squared_denominator: whether to sum the squares in the denominator (V-Net's form). Default
        False.
      reduce_axes: the axes of the set; None for all. Default (), a loss for each entry. That of a
        batch comes nearer to the F1 score of the whole data than the mean of its entries'.
      where: boolean, broadcastable to `probabilities`: the entries that count. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the set is spread.

    Returns:
      Losses in [0, 1] with the axes that are left, in the type of `probabilities`; 0 for a set
      without entries.

    Raises:
      ValueError: a negative `alpha` or `smooth`, shapes that do not match, or axes that are not
        there.
      TypeError: probabilities that are not floating point.

    Use it in place of cross-entropy where positives are rare and F1 is what counts;
    `self_adjusting_dice_loss_with_logits` is the form for several classes.

    Cost: one pass over the probabilities, and three sums for each set.

    Example:
      >>> p, y = jnp.array([0.9, 0.1]), jnp.array([1, 0])
      >>> print(self_adjusting_dice_loss(p, y).round(2))
      [0.44 0.08]
      >>> print(self_adjusting_dice_loss(p, y, alpha=0.0, reduce_axes=0).round(3))
      0.067

    Reference: Li, Sun, Meng, Liang, Wu, Li, "Dice Loss for Data-imbalanced NLP Tasks", 2019,
    arXiv:1911.02855. On the choice of the set: Yuan, Zhang, Huang, Liang, "Simpson's Bias in NLP
    Training", 2021, arXiv:2103.11795.
    """
    check_floating(probabilities=probabilities)
    check_broadcastable(jnp.shape(probabilities), where=where)
    p = jnp.asarray(probabilities).astype(compute_dtype(probabilities))
    if where is not None:
        p = jnp.where(where, p, 0.0)
    loss = dice_loss(
        _self_adjusted(p, 1 - p, alpha),
        targets,
        reduce_axes=reduce_axes,
        smooth=smooth,
        squared_denominator=squared_denominator,
        where=where,
        axis_name=axis_name,
    )
    return loss.astype(jnp.result_type(probabilities))


def self_adjusting_dice_loss_with_logits(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 1.0,
    smooth: float = 1.0,
    squared_denominator: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Self-adjusting Dice loss of each class over all examples (a loss of the set).

        L_k = 1 - (2 Σ_i w_ik q_ik + g) / (Σ_i w_ik + Σ_i q_ik + g),   w_ik = (1 - p_ik)^α p_ik

    with p = softmax(logits), q the labels as distributions, one-hot for ids, and g = smooth.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN.
      alpha: α at least 0. Default 1, the paper's formula; its released scripts have 0.01.
      smooth: g at least 0. Default 1, as in the released scripts.
      squared_denominator: whether to sum the squares in the denominator. Default False.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, `[..., 1]` for whole examples.
        What is excluded counts neither in w nor in q. Default: all.
      axis_name: name or names of the mesh or vmap axes over whose shards the examples are spread.

    Returns:
      `[classes]` losses in the type of `logits`, one for each class over the whole set; 0 for a
      class that is nowhere admitted. Take their mean, or their sum as the released code does.

    Raises:
      ValueError: a negative `alpha` or `smooth`, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it for tagging and other tasks whose classes differ much in size; for binary decisions pass
    `jax.nn.sigmoid(logits)` to `self_adjusting_dice_loss`.

    Cost: a softmax over the classes and three sums of `classes` numbers over the set; targets as
    large as the logits.

    Example:
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
      >>> print(self_adjusting_dice_loss_with_logits(logits, jnp.array([0, 1, 0])).round(3))
      [0.542 0.442]

    Reference: Li, Sun, Meng, Liang, Wu, Li, "Dice Loss for Data-imbalanced NLP Tasks", 2019,
    arXiv:1911.02855.
    """
    q = label_distribution(labels, logits, axis=axis, where=where)
    log_p = masked_log_softmax(logits, axis=axis, where=where)
    loss = dice_loss(
        _self_adjusted(jnp.exp(log_p), -jnp.expm1(log_p), alpha),
        q,
        reduce_axes=tuple(a for a in range(q.ndim) if a != axis % q.ndim),
        smooth=smooth,
        squared_denominator=squared_denominator,
        where=where,
        axis_name=axis_name,
    )
    return loss.astype(jnp.result_type(logits))


def _self_adjusted(p: Array, miss: Array, alpha: float) -> Array:
    """(1 - p)^α p, from p and from miss = 1 - p."""
    check_interval(0, jnp.inf, alpha=alpha)
    # For alpha < 1 the slope at p = 1 is infinite: the factor ends at the last p below 1.
    return jnp.maximum(miss, jnp.finfo(p.dtype).eps) ** alpha * p


def hard_negative_mask(
    scores: ArrayLike,
    targets: ArrayLike,
    ratio: float,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Which entries of a set to train on: all positives, and the negatives of highest score.

        keep = positives ∪ the ⌊ratio · positives⌋ negatives with the highest scores

    Args:
      scores: `[...]` floating point, higher for entries that look positive, such as logits or
        probabilities; all entries together are the set.
      targets: `[...]` of the shape of `scores`, positive above 1/2 (booleans and integers too).
      ratio: negatives to keep for each positive, at least 0.
      where: boolean, broadcastable to `scores`: the entries that exist. Default: all.
      axis_name: name or names of mapped axes over whose shards the set is spread.

    Returns:
      Boolean `[...]`, for the `where` of a loss; without a positive no entry is kept. Of negatives
      with equal scores the first are taken.

    Raises:
      ValueError: a negative `ratio`, or shapes that do not match.
      TypeError: scores that are not floating point.

    Use it with `self_adjusting_dice_loss` where easy negatives are so many that even their small
    weights add up.

    Cost: one sort of the n scores of all shards, O(n log n).

    Example:
      >>> scores, targets = jnp.array([0.1, 0.9, 0.7, 0.4]), jnp.array([0, 1, 0, 0])
      >>> hard_negative_mask(scores, targets, 1.0).tolist()
      [False, True, True, False]

    Reference: Li, Sun, Meng, Liang, Wu, Li, "Dice Loss for Data-imbalanced NLP Tasks", 2019,
    arXiv:1911.02855, whose released code trains on such a subset.
    """
    check_floating(scores=scores)
    check_interval(0, jnp.inf, ratio=ratio)
    shape = jnp.shape(scores)
    check_shape(shape, targets=targets)
    check_broadcastable(shape, where=where)
    exists = jnp.broadcast_to(True if where is None else where, shape)
    is_positive = jnp.asarray(targets) > 0.5
    positive, negative = exists & is_positive, exists & ~is_positive
    ranks, _ = ascending_ranks(-jnp.asarray(scores), where=negative, axis_name=axis_name)
    num_positive = jnp.count_nonzero(positive)
    num_positive = sum_over_shards(num_positive, axis_name)
    kept = jnp.floor(ratio * num_positive + 1e-3)  # 0.3 of 10 are 3, whatever 0.3 is in binary
    return positive | (negative & (ranks < kept))
