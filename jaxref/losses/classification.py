"""Classification losses on logits: the PolyLoss family and squentropy.

Every function takes integer ids or distributions as labels, reduces the class axis alone and
returns the per-example values in the type of the logits. `where` (boolean, broadcastable to the
logits) says which classes exist for an example; an example with none of them has loss 0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.labels import expected_over_labels, label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype


def poly_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: float | Sequence[float] = 1.0,
    label_smoothing: float = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy with its leading polynomial coefficients shifted (PolyLoss).

    With p the probability of the true class, cross-entropy is the series
    `-log p = Σ_{j≥1} (1/j) (1 - p)^j`. PolyLoss frees the first N coefficients:

        L = -log p + Σ_{j=1}^{N} ε_j (1 - p)^j

    N = 1 (a single number `epsilon`, Poly-1) is what the paper recommends; its gradient is
    `(1 + ε p) (softmax - onehot)`, so ε > 0 pushes confident examples further and ε < 0 lets go of
    them. Labels that are distributions, or smoothed, give the expectation `Σ_k q_k L(p_k)`.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      epsilon: ε_1, or the sequence ε_1 ... ε_N, each at least -1/j so that no coefficient
        `1/j + ε_j` turns negative. Default 1; 0 is plain cross-entropy. The paper tunes it per
        task: 2 for ImageNet classification, -1 for imbalanced detection heads.
      label_smoothing: in [0, 1], the mass spread evenly over the admitted classes.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in units of nats; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, an `epsilon` below -1/j, or `label_smoothing` outside
        [0, 1].
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it in place of cross-entropy when one more scalar to tune is worth its accuracy;
    `poly1_focal_loss` is the per-class sigmoid form for detection.

    Cost: that of cross-entropy, a softmax, and N powers for the label; for every class where labels
    are distributions or smoothed.

    Example:
      >>> losses = poly_cross_entropy(jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0]), epsilon=2.0)
      >>> print(losses.round(3))
      [0.482]

    Reference: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss
    Functions", 2022, arXiv:2204.12511.
    """
    epsilons = list(epsilon) if isinstance(epsilon, Sequence) else [epsilon]
    for j, epsilon_j in enumerate(epsilons, 1):
        check_interval(-1 / j, jnp.inf, epsilon=epsilon_j)

    def loss(log_p: Array) -> Array:
        miss = -jnp.expm1(log_p)  # 1 - p without cancellation near p = 1
        return sum((e * miss**j for j, e in enumerate(epsilons, 1)), start=-log_p)

    losses = expected_over_labels(
        loss, labels, logits, axis=axis, label_smoothing=label_smoothing, where=where
    )
    return losses.astype(jnp.result_type(logits))


def poly1_focal_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: float = 1.0,
    gamma: float = 2.0,
    alpha: float | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Sigmoid focal loss with its leading polynomial coefficient shifted, per class.

    With p = sigmoid(logit) and p_t = p t + (1 - p) (1 - t) the probability given to the target t,

        L = α_t [ (1 - p_t)^γ BCE(p, t) + ε (1 - p_t)^{γ+1} ],   α_t = α t + (1 - α) (1 - t)

    For binary t the focal loss is the series `Σ_j (1/j) (1 - p_t)^{j+γ}`, and ε shifts the
    coefficient of its first term.

    Args:
      logits: `[...]` floating point, one binary decision each.
      targets: `[...]` of the shape of `logits`, values in [0, 1] (booleans and integers too).
      epsilon: ε at least -1; 0 is the focal loss. Default 1 as in the paper's Poly-1.
      gamma: γ at least 0, the focusing power; 0 with ε = 0 is binary cross-entropy. Default 2, the
        focal loss paper's.
      alpha: α in [0, 1], weight of the positives, 1 - α of the negatives; None weighs both by 1.
      where: boolean, broadcastable to `logits`; excluded entries have loss 0.

    Returns:
      `[...]` losses in the type of `logits`; the caller sums over classes.

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: logits that are not floating point.

    Use it for many independent, mostly negative decisions (detection, multi-label);
    `poly_cross_entropy` is the softmax form for one label among many.

    Cost: one pass over the logits.

    Example:
      >>> losses = poly1_focal_loss(jnp.array([2.0, -1.0]), jnp.array([1, 0]), epsilon=1.0)
      >>> print(losses.round(4))
      [0.0035 0.0421]

    Reference: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss
    Functions", 2022, arXiv:2204.12511.
    """
    check_floating(logits=logits)
    check_interval(-1, jnp.inf, epsilon=epsilon)
    check_interval(0, jnp.inf, gamma=gamma)
    check_broadcastable(jnp.shape(logits), targets=targets, where=where)
    dtype = compute_dtype(logits)
    x, t = jnp.asarray(logits).astype(dtype), jnp.asarray(targets).astype(dtype)
    bce = -t * jax.nn.log_sigmoid(x) - (1 - t) * jax.nn.log_sigmoid(-x)
    miss = t * jax.nn.sigmoid(-x) + (1 - t) * jax.nn.sigmoid(x)  # 1 - p_t
    # The floor keeps the gradient of miss**gamma finite for gamma < 1 where miss underflows.
    focus = jnp.maximum(miss, jnp.finfo(dtype).tiny) ** gamma
    loss = focus * (bce + epsilon * miss)
    if alpha is not None:
        check_interval(0, 1, alpha=alpha)
        loss *= alpha * t + (1 - alpha) * (1 - t)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(logits))


def truncated_poly_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    num_terms: int,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""The first terms of cross-entropy's polynomial series (PolyLoss, drop form).

        L = Σ_{j=1}^{N} (1/j) (1 - p)^j,   N = num_terms

    Bounded by the harmonic number H_N, which makes it robust to wrong labels: one term is the mean
    absolute error 1 - p, and N → ∞ is cross-entropy.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      num_terms: N at least 1.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: `num_terms` below 1 or not an integer, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it to study how much of cross-entropy's tail is needed, or under label noise;
    `poly_cross_entropy` keeps the whole tail.

    Cost: a softmax, and N terms for the label; for every class where labels are distributions.

    Example:
      >>> losses = truncated_poly_loss(jnp.array([[2.0, 0.0]]), jnp.array([1]), num_terms=1)
      >>> print(losses.round(4))
      [0.8808]

    Reference: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss
    Functions", 2022, arXiv:2204.12511.
    """
    if not isinstance(num_terms, int) or num_terms < 1:
        raise ValueError(f"num_terms must be an integer of at least 1, got {num_terms!r}")

    def loss(log_p: Array) -> Array:
        coefficients = jnp.array([*(1 / j for j in range(num_terms, 0, -1)), 0.0], log_p.dtype)
        return jnp.polyval(coefficients, -jnp.expm1(log_p))

    losses = expected_over_labels(loss, labels, logits, axis=axis, where=where)
    return losses.astype(jnp.result_type(logits))


def squentropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    square_weight: float = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy plus the mean square of the logits of the wrong classes.

    For logits f over C classes and the label y,

        L = -log softmax(f)_y + w / (C - 1) Σ_{j≠y} f_j²,   w = square_weight

    Unlike cross-entropy it is not invariant to adding a constant to f: the wrong logits are pulled
    to 0, which calibrates the probabilities and steadies training over seeds. The gradient is
    `softmax_j - 1[j=y] + 2 w f_j 1[j≠y] / (C - 1)`. Labels that are distributions give the
    expectation over the label (an extension of the paper).

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      square_weight: w at least 0. The paper has no such parameter (w = 1); 0 is cross-entropy.
      axis: the class axis; at least two classes.
      where: boolean, broadcastable to `logits`; classes to admit, C counts them. An example with
        one admitted class has no wrong logit, and loss 0.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: fewer than two classes, a negative `square_weight`, shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it in place of cross-entropy, with the same optimizer and learning rate, where calibrated
    probabilities matter; `rescaled_square_loss` drops the cross-entropy altogether.

    Cost: a softmax, and one sum of squares beside it.

    Example:
      >>> losses = squentropy(jnp.array([[2.0, 1.0, -1.0]]), jnp.array([0]))
      >>> print(losses.round(3))
      [1.349]

    Reference: Hui, Belkin, Wright, "Cut your Losses with Squentropy", 2023, arXiv:2302.03952.
    """
    check_interval(0, jnp.inf, square_weight=square_weight)
    q = label_distribution(labels, logits, axis=axis, where=where)
    log_p = masked_log_softmax(logits, axis=axis, where=where)
    num_classes: int | Array = jnp.shape(logits)[axis]
    if num_classes < 2:
        raise ValueError(f"logits must have at least two classes, got {num_classes}")
    squares = jnp.square(jnp.asarray(logits).astype(log_p.dtype))
    if where is not None:
        squares = jnp.where(where, squares, 0.0)
        admitted = jnp.broadcast_to(where, jnp.shape(logits)).sum(axis=axis)
        num_classes = jnp.maximum(admitted, 2)
    # Σ_k q_k Σ_{j≠k} f_j² = Σ_j (Σ_k q_k - q_j) f_j², with no sum to subtract from
    wrong_mass = jnp.sum(q, axis=axis, keepdims=True) - q
    cross_entropy = -jnp.sum(q * log_p, axis=axis)
    mean_square = jnp.sum(wrong_mass * squares, axis=axis) / (num_classes - 1)
    return (cross_entropy + square_weight * mean_square).astype(jnp.result_type(logits))


def rescaled_square_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    true_class_weight: float = 1.0,
    target_scale: float = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Square loss for classification, with the true class weighted and its target rescaled.

        L = (1/C) [ k (f_y - M)² + Σ_{j≠y} f_j² ]

    k = true_class_weight, M = target_scale: the square-loss baseline that squentropy is measured
    against. k = M = 1 is the mean squared error to the one-hot label.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits` (the expectation over
        the label). An id that is not an admitted class gives NaN for its example.
      true_class_weight: k above 0; 1 for few classes, up to 15 for many.
      target_scale: M above 0; 1 for few classes, 5 to 30 for many.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, C counts them.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: a hyperparameter that is not positive, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where least squares is wanted for its closed forms or its robustness; `squentropy` keeps
    most of its calibration without its two parameters.

    Cost: one pass over the logits, without exponentials.

    Example:
      >>> losses = rescaled_square_loss(jnp.array([[2.0, 1.0, -1.0]]), jnp.array([0]))
      >>> print(losses.round(3))
      [1.]

    Reference: Hui, Belkin, Wright, "Cut your Losses with Squentropy", 2023, arXiv:2302.03952
    (the form is Hui and Belkin's, 2021, arXiv:2006.07322).
    """
    check_interval(
        0,
        jnp.inf,
        closed="right",
        true_class_weight=true_class_weight,
        target_scale=target_scale,
    )
    q = label_distribution(labels, logits, axis=axis, where=where)
    f = jnp.asarray(logits).astype(q.dtype)
    wrong_mass = jnp.sum(q, axis=axis, keepdims=True) - q
    terms = true_class_weight * q * jnp.square(f - target_scale) + wrong_mass * jnp.square(f)
    num_classes: int | Array = f.shape[axis]
    if where is not None:
        terms = jnp.where(where, terms, 0.0)
        admitted = jnp.broadcast_to(where, f.shape).sum(axis=axis)
        num_classes = jnp.maximum(admitted, 1)
    return (jnp.sum(terms, axis=axis) / num_classes).astype(jnp.result_type(logits))


def margin_binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    margin: float = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropy that asks each logit to clear a margin on its side (margin BCE).

        L = BCE(sigmoid(z - m (2t - 1)), t) = softplus(m - (2t - 1) z)   for t in {0, 1}

    with m = margin. A decision counts as the plain loss would at m less of evidence for it, so that
    the gradient at z = 0 is sigmoid(m) in size in place of 1/2, and the values between yes and no
    become few. The least expected loss of an even chance stays at z = 0.

    Args:
      logits: z `[...]` floating point, one binary decision each.
      targets: t `[...]` of the shape of `logits`, values in [0, 1] (booleans and integers too); for
        those between the first form above holds.
      margin: m at least 0; 0 is binary cross-entropy, for the first stage of training. Default 2,
        the paper's for the second stage, on the points at the boundary alone.
      where: boolean, broadcastable to `logits`; excluded entries have loss 0.

    Returns:
      `[...]` losses in the type of `logits`, in nats.

    Raises:
      ValueError: a negative `margin`, or shapes that do not match.
      TypeError: logits that are not floating point.

    Use it to sharpen a trained boundary, such as the surface of an occupancy field, on examples
    that lie at it (`jaxref.data.boundary_mask`); `poly1_focal_loss` turns to hard examples without
    moving the decision.

    Cost: one pass over the logits, as of binary cross-entropy.

    Example:
      >>> losses = margin_binary_cross_entropy(jnp.array([2.0, 2.0]), jnp.array([1, 0]))
      >>> print(losses.round(3))
      [0.693 4.018]

    Reference: Li, Gao, Liu, Liu, Gu, "GridFormer: Point-Grid Transformer for Surface
    Reconstruction", 2024, arXiv:2401.02292.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, margin=margin)
    check_broadcastable(jnp.shape(logits), targets=targets, where=where)
    dtype = compute_dtype(logits)
    t = jnp.asarray(targets).astype(dtype)
    z = jnp.asarray(logits).astype(dtype) - margin * (2 * t - 1)
    loss = -t * jax.nn.log_sigmoid(z) - (1 - t) * jax.nn.log_sigmoid(-z)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(logits))
