"""Losses that train or correct a classifier for confidence that is right as often as it says."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses.classification import poly_cross_entropy


def dual_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float = 5.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Focal loss that holds on until the gap to the next class is wide, not only p is high.

        L = -(1 - p_y + p_j)^γ log p_y,   p_j = max { p_k : p_k < p_y }

    with p = softmax(logits), and p_j = 0 where no class is below the label's. Where y is the top
    class, p_j is the runner-up's, and the factor one minus their gap, which fades later than the
    focal loss's 1 - p_y and leaves less under-confidence; where it is not, p_j is the next class
    below, not the winner. Between the two losses, (1 - p_y)^γ CE ≤ L ≤ CE. It jumps where another
    class overtakes the label's, and classes of exactly its probability do not count as below.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`. An id that is not an admitted class gives NaN for its example.
      gamma: γ at least 0; 0 is cross-entropy. Default 5; the paper picks it among 1 to 10 by the
        calibration error on validation data.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats; 0 where no class is admitted.

    Raises:
      ValueError: a negative `gamma`, or shapes that do not match.
      TypeError: logits that are not floating point, or labels that are not integers: a
        distribution has no class to rank the others by.

    Use it to train classifiers whose confidence is read; `focal_loss` ends up under-confident, and
    cross-entropy over-confident.

    Cost: a softmax over the classes, and another pass for the next class below.

    Example:
      >>> losses = dual_focal_loss(jnp.array([[2.0, 1.0, -1.0]]), jnp.array([0]), gamma=2.0)
      >>> print(losses.round(4))
      [0.1072]

    Reference: Tao, Dong, Xu, "Dual Focal Loss for Calibration", 2023, arXiv:2305.13665.
    """
    check_interval(0, jnp.inf, gamma=gamma)
    _check_integers(labels=labels)
    q = label_distribution(labels, logits, axis=axis, where=where)
    log_p = masked_log_softmax(logits, axis=axis, where=where)
    log_p_y = jnp.sum(q * log_p, axis=axis)
    # Ranks are those of the logits themselves: a computed log p need not equal itself, where the
    # compiler computes it twice.
    z = jnp.asarray(logits)
    below = z < jnp.sum(jnp.where(q == 1, z, 0), axis=axis, keepdims=True)
    if where is not None:
        below &= jnp.asarray(where)
    p_j = jnp.where(below.any(axis=axis), jnp.exp(_at_highest(z, log_p, below, axis)), 0.0)
    # The floor keeps the gradient of the power finite for gamma < 1 where the base underflows.
    base = jnp.maximum(-jnp.expm1(log_p_y) + p_j, jnp.finfo(log_p.dtype).tiny)
    return (-(base**gamma) * log_p_y).astype(jnp.result_type(logits))


def sigmoid_dual_focal_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    gamma: float = 5.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Dual focal loss of binary decisions: `dual_focal_loss` over the logits (0, z).

        L = -(2 (1 - p_t))^γ log p_t  for p_t > 1/2,   -(1 - p_t)^γ log p_t  for the others

    with p_t the probability sigmoid(±z) that the decision gives to its target. It doubles its base
    where the decision turns right, p_t = 1/2.

    Args:
      logits: z `[...]` floating point, one binary decision each.
      targets: `[...]` of the shape of `logits`, 0 or 1 as integers or booleans; another integer
        gives NaN.
      gamma: γ at least 0; 0 is binary cross-entropy. Default 5.
      where: boolean, broadcastable to `logits`; excluded entries have loss 0.

    Returns:
      `[...]` losses in the type of `logits`, in nats.

    Raises:
      ValueError: a negative `gamma`, or shapes that do not match.
      TypeError: logits that are not floating point, or targets that are.

    Use it for independent decisions whose probabilities are read; `sigmoid_focal_loss` weighs the
    classes too.

    Cost: one pass over the logits.

    Example:
      >>> losses = sigmoid_dual_focal_loss(jnp.array([2.0, 2.0]), jnp.array([1, 0]), gamma=2.0)
      >>> print(losses.round(4))
      [0.0072 1.6501]

    Reference: Tao, Dong, Xu, "Dual Focal Loss for Calibration", 2023, arXiv:2305.13665.
    """
    check_interval(0, jnp.inf, gamma=gamma)
    check_floating(logits=logits)
    t = jnp.asarray(targets)
    check_shape(jnp.shape(logits), targets=t)
    check_broadcastable(jnp.shape(logits), where=where)
    if t.dtype == bool:
        t = t.astype(jnp.int32)
    _check_integers(targets=t)
    z = jnp.asarray(logits).astype(compute_dtype(logits))
    z = jnp.where(t == 1, z, jnp.where(t == 0, -z, jnp.nan))
    miss = jnp.where(z > 0, 2, 1) * jax.nn.sigmoid(-z)
    # The floor keeps the gradient of the power finite for gamma < 1 where the base underflows.
    losses = -(jnp.maximum(miss, jnp.finfo(z.dtype).tiny) ** gamma) * jax.nn.log_sigmoid(z)
    if where is not None:
        losses = jnp.where(where, losses, 0.0)
    return losses.astype(jnp.result_type(logits))


def correctness_aware_loss(
    calibrated_logits: ArrayLike,
    labels: ArrayLike,
    *,
    predictions: ArrayLike | None = None,
    balance: bool = True,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Squared difference of confidence and correctness, for fitting a calibrator.

        L_i = b_i (c_i - a_i)²,   c_i = max_k softmax(z_i)_k,   a_i = 1[ŷ_i = y_i]

    with ŷ the predicted class. Balanced (a loss of the set), b_i is 1/(2r) for correct and
    1/(2(1 - r)) for wrong predictions, r the accuracy, so that the mean of L is the mean of the two
    groups' means; b = 1 where one of them is missing, and without balance. On a narrow miss, the
    true class just below the top, cross-entropy still asks for more confidence; L never does. Where
    all correct predictions have confidence 1 and all wrong ones 1/K, its least value is reached:
    the unbalanced mean is then (1 - r) / K².

    Args:
      calibrated_logits: z `[..., classes]` floating point, what the calibrator makes of the logits.
      labels: y `[...]` integer ids. An id that is not an admitted class gives NaN for its example.
      predictions: ŷ `[...]` integer ids. Default: the highest of the logits, at ties the first;
        a temperature leaves that as it is.
      balance: whether to weigh both groups alike. Default True, as in the released code.
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit, `[..., 1]` for whole examples,
        which then do not count in r. Default: all.
      axis_name: name or names of mapped axes over whose shards the examples are spread, for r.

    Returns:
      `[...]` losses in the type of the logits; 0 where no class is admitted. a and b carry no
      gradient.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point, labels or predictions that are not integers.

    Use it to fit what `adaptive_temperature` needs; one temperature for all examples cannot tell
    right from wrong, and is fitted by `fit_temperature`.

    Cost: that of a softmax over the classes; the balance counts two groups of the set.

    Example:
      >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.6, 0.4]]))
      >>> print(correctness_aware_loss(logits, jnp.array([0, 1])).round(3))
      [0.04 0.36]

    Reference: Liu, Wang, Zou, Zou, Zheng, "Optimizing Calibration by Gaining Aware of Prediction
    Correctness", 2024, arXiv:2404.13016.
    """
    _check_integers(labels=labels)
    q = label_distribution(labels, calibrated_logits, axis=axis, where=where)
    log_p = masked_log_softmax(calibrated_logits, axis=axis, where=where)
    z = jnp.asarray(calibrated_logits)
    admitted = True if where is None else where
    if predictions is None:
        predictions = _highest(z, admitted, axis)
    _check_integers(predictions=predictions)
    check_shape(q.sum(axis=axis).shape, predictions=predictions)
    valid = q.sum(axis=axis) == 1  # neither excluded nor of an unknown label
    correct = valid & (jnp.asarray(predictions) == jnp.asarray(labels))
    confidence = jnp.exp(_at_highest(z, log_p, admitted, axis))
    loss = jnp.square(confidence - correct)
    if balance:
        counts = [jnp.count_nonzero(group) for group in (correct, valid)]
        counts = sum_over_shards(counts, axis_name)
        num_correct, total = (count.astype(loss.dtype) for count in counts)
        group = jnp.where(correct, num_correct, total - num_correct)
        both = (num_correct > 0) & (num_correct < total)
        loss *= jnp.where(both, total / (2 * jnp.maximum(group, 1)), 1.0)
    unknown = jnp.isnan(q).any(axis=axis)
    loss = jnp.where(valid, loss, jnp.where(unknown, jnp.nan, 0.0))
    return loss.astype(jnp.result_type(calibrated_logits))


def mixup_loss(
    predict: Callable[[Array], Array],
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    key: Array,
    mix_size: int = 2,
    alpha: float = 1.0,
    loss_fn: Callable[[Array, ArrayLike], Array] = partial(poly_cross_entropy, epsilon=0.0),
) -> Array:
    r"""Loss on mixtures of examples, against the same mixture of their labels (mixup).

        x̃ = Σ_j λ_j x[π_j],   L = Σ_j λ_j loss(f(x̃), y[π_j]),   λ ~ Dirichlet(α, ..., α)

    over j = 1 ... d, with one draw of λ for the batch, π_1 the identity and the other π_j random
    permutations. With cross-entropy as the loss, L is that against the mixed label. Between its
    training points, where labels disagree, the model has to predict in between, which no
    temperature can do for it afterwards.

    Args:
      predict: f, from inputs `[batch, ...]` to predictions `[batch, ...]`: a model.
      inputs: x `[batch, ...]` floating point.
      labels: y `[batch, ...]`, whatever `loss_fn` takes.
      key: a random key.
      mix_size: d at least 1, how many examples are mixed; 1 is the plain loss. Default 2, mixup.
      alpha: α above 0; 1 draws λ evenly, towards 0 one example rules. Default 1, the paper's.
      loss_fn: from predictions and labels to losses `[batch, ...]`. Default: cross-entropy of
        logits and integer ids or distributions.

    Returns:
      Losses as `loss_fn` returns them; those of the ith example are of the mixture that it starts.

    Raises:
      ValueError: `mix_size` below 1 or not an integer, `alpha` not positive, a batch of labels of
        another size, or what `loss_fn` raises.
      TypeError: inputs that are not floating point.

    Use it in training where classes overlap or labels are noisy and confidence matters, with or
    without `fit_temperature` after. A batch that is spread over mapped axes mixes within shards.

    Cost: one forward pass for the batch, as without mixing, with `mix_size` shuffled copies of the
    inputs and as many calls of `loss_fn`.

    Example:
      >>> x, y = jnp.eye(3), jnp.arange(3)
      >>> losses = mixup_loss(lambda x: 2 * x, x, y, key=jax.random.key(0), mix_size=1)
      >>> print(losses.round(4))
      [0.2395 0.2395 0.2395]

    Reference: Chidambaram, Ge, "On the Limitations of Temperature Scaling for Distributions with
    Overlaps", 2023, arXiv:2306.00740, whose d-Mixup extends Zhang, Cisse, Dauphin, Lopez-Paz,
    "mixup: Beyond Empirical Risk Minimization", 2017, arXiv:1710.09412.
    """
    check_floating(inputs=inputs)
    check_interval(0, jnp.inf, closed="right", alpha=alpha)
    if not isinstance(mix_size, int) or mix_size < 1:
        raise ValueError(f"mix_size must be an integer of at least 1, got {mix_size!r}")
    x, y = jnp.asarray(inputs), jnp.asarray(labels)
    if x.ndim == 0 or y.shape[:1] != x.shape[:1]:
        raise ValueError(f"labels must have the batch of inputs {x.shape}, got shape {y.shape}")
    weight_key, *order_keys = jax.random.split(key, mix_size)
    weights = jax.random.dirichlet(weight_key, jnp.full(mix_size, alpha, compute_dtype(x)))
    identity = jnp.arange(len(x))
    orders = [identity, *(jax.random.permutation(k, identity) for k in order_keys)]
    mixed = sum(weight * x[order] for weight, order in zip(weights, orders))
    predictions = predict(jnp.asarray(mixed).astype(x.dtype))
    losses = [loss_fn(predictions, y[order]) for order in orders]
    loss = sum(weight * loss for weight, loss in zip(weights, losses))
    return jnp.asarray(loss).astype(losses[0].dtype)


def calibration_kl(
    logits: ArrayLike,
    probabilities: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Kullback-Leibler divergence of a model's softmax from the true probabilities.

        KL = Σ_k q_k (log q_k - log softmax(f)_k)

    Args:
      logits: f `[..., classes]` floating point, the classes at `axis`.
      probabilities: q `[..., classes]`, the true distribution of the label, or integer ids `[...]`
        where it is certain. It is not checked to sum to 1, and carries no gradient.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` divergences in the type of `logits`, in nats; 0 where no class is admitted. Their mean
      is the paper's calibration error in log loss.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point, or probabilities of a type that is neither.

    Use it on synthetic data, where q is known; `jaxref.metrics.expected_calibration_error` needs
    labels alone.

    Cost: that of a softmax over the classes.

    Example:
      >>> print(calibration_kl(jnp.zeros((1, 2)), jnp.array([[0.9, 0.1]])).round(3))
      [0.368]

    Reference: Chidambaram, Ge, "On the Limitations of Temperature Scaling for Distributions with
    Overlaps", 2023, arXiv:2306.00740.
    """
    q = jax.lax.stop_gradient(label_distribution(probabilities, logits, axis=axis, where=where))
    log_p = masked_log_softmax(logits, axis=axis, where=where)
    terms = jax.scipy.special.xlogy(q, q) - q * log_p
    return jnp.sum(terms, axis=axis).astype(jnp.result_type(logits))


def _highest(z: Array, admitted: ArrayLike, axis: int) -> Array:
    """The id of the highest z that is admitted, at ties the first."""
    return jnp.argmax(jnp.where(admitted, z, -jnp.inf), axis=axis)


def _at_highest(z: Array, values: Array, admitted: ArrayLike, axis: int) -> Array:
    """The value of the class with the highest z, through which alone the gradient goes."""
    index = jnp.expand_dims(_highest(z, admitted, axis), axis)
    return jnp.squeeze(jnp.take_along_axis(values, index, axis=axis), axis)


def _check_integers(**ids: ArrayLike) -> None:
    for name, value in ids.items():
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise TypeError(f"{name} must be integer ids, got {jnp.result_type(value).name}")
