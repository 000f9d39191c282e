"""Losses on adversarial examples, and the attack that makes these.

Labels are integer ids or distributions. The losses on logits return per-example values in the type
of the logits; those that switch between examples rank the batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.ranks import ascending_ranks
from jaxref.core.shards import AxisName
from jaxref.losses.comp_sum import comp_sum_loss


def one_versus_rest_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""The sum of the binary cross-entropies of every class against the rest.

        L = log(1 + exp(-z_y)) + Σ_{k≠y} log(1 + exp(z_k))

    with logits z and the label y. The gradient is `sigmoid(z) - onehot`: every logit is trained for
    its own level. Under gradient flow the margin z_y - z_k grows as 2 log t with time t, twice as
    fast as that of cross-entropy. Labels that are distributions give the expectation over the
    label.

    Args:
      logits: z `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where margins have to be wide, at some cost in fit; `switching_one_versus_rest_loss`
    takes it for the hard examples alone.

    Cost: one pass over the logits, with one exponential and one logarithm for each.

    Example:
      >>> losses = one_versus_rest_loss(jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0]))
      >>> print(losses.round(3))
      [1.133]

    Reference: Kanai et al., "One-vs-the-Rest Loss to Focus on Important Samples in Adversarial
    Training", 2022, arXiv:2207.10283.
    """
    q = label_distribution(labels, logits, axis=axis, where=where)
    z = jnp.asarray(logits).astype(q.dtype)
    if where is not None:
        z = jnp.where(where, z, 0.0)
    # q softplus(-z) + (1 - q) softplus(z) with one exponential, and gradients that do not cancel
    losses = (jnp.where(z < 0, 0, 1) - q) * z + jnp.log1p(jnp.exp(-jnp.abs(z)))
    if where is not None:
        losses = jnp.where(where, losses, 0.0)
    return jnp.sum(losses, axis=axis).astype(jnp.result_type(logits))


def logit_margin(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""By how much the logit of the true class exceeds the largest of the others.

        m = z_y - max_{k≠y} z_k

    positive exactly where the classifier is right. For labels that are distributions, y is the most
    probable class. The paper ranks by the logit margin loss, which is -m.

    Args:
      logits: z `[..., classes]` floating point, the classes at `axis`, two at least.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` margins in the type of `logits`; 0 where fewer than two classes are admitted.

    Raises:
      ValueError: fewer than two classes, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it to see how far examples are from being flipped, under attack above all. Its negative is
    the loss that attacks of Carlini and Wagner's kind raise with `projected_gradient_attack`.

    Cost: one pass over the logits.

    Example:
      >>> print(logit_margin(jnp.array([[2.0, 0.5, -1.0], [2.0, 0.5, -1.0]]), jnp.array([0, 1])))
      [ 1.5 -1.5]

    Reference: Kanai et al., "One-vs-the-Rest Loss to Focus on Important Samples in Adversarial
    Training", 2022, arXiv:2207.10283.
    """
    q, own, admitted = _own_class(labels, logits, axis=axis, where=where)
    z = jnp.asarray(logits).astype(q.dtype)
    rival = jnp.max(z, axis=axis, where=admitted & ~own, initial=jnp.finfo(z.dtype).min)
    margins = jnp.sum(jnp.where(own, z, 0.0), axis=axis) - rival
    margins = jnp.where(admitted.sum(axis=axis) > 1, margins, 0.0)
    margins = jnp.where(jnp.isnan(q).any(axis=axis), jnp.nan, margins)
    return margins.astype(jnp.result_type(logits))


def switching_one_versus_rest_loss(
    adversarial_logits: ArrayLike,
    labels: ArrayLike,
    *,
    fraction: float = 0.4,
    weight: float = 0.4,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Cross-entropy, but one-versus-rest on the hardest examples (a loss of the set): SOVR.

        L_i = w OVR(z_i, y_i)   for the ⌈M n⌉ of n examples with the smallest `logit_margin`,
        L_i = CE(z_i, y_i)      for the others

    with M = fraction, w = weight and OVR `one_versus_rest_loss`. Hard examples get wider margins,
    where more weight on their cross-entropy would only narrow those of the easy ones. M = 0 is
    adversarial training with cross-entropy. Equal margins switch in the order of the batch.

    Args:
      adversarial_logits: z `[..., classes]` floating point, the classes at `axis`: of adversarial
        examples, from `projected_gradient_attack` on the cross-entropy. All are one set.
      labels: integer ids `[...]`, or distributions of the shape of the logits. An id that is not a
        class gives NaN for its example.
      fraction: M in [0, 1]. Default 0.4.
      weight: w at least 0. Default 0.4.
      axis: the class axis.
      where: boolean, broadcastable to `[...]`: the examples that exist. The others have loss 0 and
        do not rank.
      axis_name: name or names of the mesh or vmap axes over which the set is spread.

    Returns:
      `[...]` losses in the type of the logits, weighted, for their mean. The choice of examples has
      no gradient.

    Raises:
      ValueError: a hyperparameter out of its range, fewer than two classes, or shapes that do not
        match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it in adversarial training, where few examples decide how robust the model is;
    `switching_ovr_trades_loss` also keeps the accuracy on clean inputs.

    Cost: a softmax and a second pass over the logits for both losses of all n examples, and one
    sort of the n margins, of all shards with `axis_name`.

    Example:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.2, 0.0], [0.0, 3.0]]), jnp.array([0, 0, 1])
      >>> print(switching_one_versus_rest_loss(logits, labels, fraction=0.3, weight=1.0).round(3))
      [0.127 1.291 0.049]

    Reference: Kanai et al., "One-vs-the-Rest Loss to Focus on Important Samples in Adversarial
    Training", 2022, arXiv:2207.10283.
    """
    check_interval(0, 1, fraction=fraction)
    check_interval(0, jnp.inf, weight=weight)
    classes = _classes_of_members(adversarial_logits, axis=axis, where=where)
    margins = logit_margin(adversarial_logits, labels, axis=axis, where=classes)
    easy = comp_sum_loss(adversarial_logits, labels, axis=axis, where=classes)
    hard = weight * one_versus_rest_loss(adversarial_logits, labels, axis=axis, where=classes)
    ranks, number = ascending_ranks(margins, where=where, axis_name=axis_name)
    # the tolerance keeps the ceiling of, say, 0.1 · 30 at 3
    switched = ranks < jnp.ceil(fraction * number - 1e-3)
    return jnp.where(switched, hard, easy).astype(margins.dtype)


def switching_ovr_trades_loss(
    natural_logits: ArrayLike,
    adversarial_logits: ArrayLike,
    labels: ArrayLike,
    *,
    fraction: float = 0.4,
    weight: float = 0.4,
    beta: float = 6.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""TRADES with the switching one-versus-rest loss on clean inputs (a loss of the set).

        L_i = S_i(z, y) + β KL(softmax z_i, softmax z'_i)

    with z the logits of the clean inputs, z' those of their adversarial examples, and S the
    `switching_one_versus_rest_loss`, which ranks by z. `fraction` = 0 is TRADES: cross-entropy on
    clean inputs, and predictions that an attack does not change.

    Args:
      natural_logits: z `[..., classes]` floating point, the classes at `axis`. All are one set.
      adversarial_logits: z' of the shape of z: where `projected_gradient_attack` found a large
        divergence within reach.
      labels: integer ids `[...]`, or distributions of the shape of z. An id that is not a class
        gives NaN for its example.
      fraction: in [0, 1], the share of examples that switch. Default 0.4.
      weight: at least 0, of the one-versus-rest loss. Default 0.4.
      beta: β at least 0. Default 6, as for TRADES.
      axis: the class axis.
      where: boolean, broadcastable to `[...]`: the examples that exist. The others have loss 0 and
        do not rank.
      axis_name: name or names of the mesh or vmap axes over which the set is spread.

    Returns:
      `[...]` losses in the type of z, for their mean. Gradients reach z and z'.

    Raises:
      ValueError: a hyperparameter out of its range, fewer than two classes, or shapes that do not
        match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it to trade accuracy on clean inputs for robustness by β; `switching_one_versus_rest_loss`
    trains on adversarial examples alone.

    Cost: the forward passes for z and z', beside the attack's; here two softmaxes, one pass for the
    margins and one sort of them.

    Example:
      >>> clean, attacked = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.5]])
      >>> loss = switching_ovr_trades_loss(clean, attacked, jnp.array([0]), fraction=0.0)
      >>> print(loss.round(3))
      [1.137]

    Reference: Kanai et al., "One-vs-the-Rest Loss to Focus on Important Samples in Adversarial
    Training", 2022, arXiv:2207.10283, with TRADES of Zhang et al., "Theoretically Principled
    Trade-off between Robustness and Accuracy", 2019, arXiv:1901.08573.
    """
    check_interval(0, jnp.inf, beta=beta)
    check_floating(adversarial_logits=adversarial_logits)
    check_shape(jnp.shape(natural_logits), adversarial_logits=adversarial_logits)
    switching = switching_one_versus_rest_loss(
        natural_logits,
        labels,
        fraction=fraction,
        weight=weight,
        axis=axis,
        where=where,
        axis_name=axis_name,
    )
    classes = _classes_of_members(natural_logits, axis=axis, where=where)
    log_p = masked_log_softmax(natural_logits, axis=axis, where=classes)
    log_q = masked_log_softmax(adversarial_logits, axis=axis, where=classes)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=axis)
    return (switching + beta * divergence).astype(jnp.result_type(natural_logits))


def mart_loss(
    natural_logits: ArrayLike,
    adversarial_logits: ArrayLike,
    labels: ArrayLike,
    *,
    beta: float = 5.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy with a margin under attack, and stability where the clean input is missed.

        L = -log p'_y - log(1 - max_{k≠y} p'_k) + β (1 - p_y) KL(p, p')

    with p the softmax of the clean logits and p' that of the adversarial ones. For labels that are
    distributions, y is the most probable class.

    Args:
      natural_logits: `[..., classes]` floating point, of clean inputs; the classes at `axis`, two
        at least.
      adversarial_logits: the same shape, of their adversarial examples, from
        `projected_gradient_attack` on the cross-entropy.
      labels: integer ids `[...]`, or distributions of the shape of the logits. An id that is not an
        admitted class gives NaN for its example.
      beta: β at least 0. Default 5; the authors also use 6.
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `natural_logits`; 0 where fewer than two classes are admitted.
      Gradients reach both logits, as 1 - p_y is no constant either. The sum over the classes but
      the rival stands for 1 - max p', so that it needs no guard.

    Raises:
      ValueError: `beta` out of range, fewer than two classes, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where examples that the model misses count for more in robustness: it weights their
    consistency; `switching_ovr_trades_loss` widens the margins of the hardest instead.

    Cost: the forward passes for both logits, beside the attack's; here two softmaxes over the
    classes.

    Example:
      >>> clean, attacked = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.5]])
      >>> print(mart_loss(clean, attacked, jnp.array([0])).round(2))
      [1.05]

    Reference: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", 2020, ICLR.
    """
    check_interval(0, jnp.inf, beta=beta)
    check_floating(adversarial_logits=adversarial_logits)
    check_shape(jnp.shape(natural_logits), adversarial_logits=adversarial_logits)
    q, own, admitted = _own_class(labels, natural_logits, axis=axis, where=where)
    log_p = masked_log_softmax(natural_logits, axis=axis, where=where)
    log_q = masked_log_softmax(adversarial_logits, axis=axis, where=where)
    others = admitted & ~own
    rival = jnp.argmax(jnp.where(others, log_q, jnp.finfo(log_q.dtype).min), axis=axis)
    rival = jax.nn.one_hot(rival, q.shape[axis], axis=axis, dtype=bool)
    any_other = others.any(axis=axis)
    rest = jnp.where(jnp.expand_dims(any_other, axis), admitted & ~rival, True)
    log_true_p, log_true_q = (jnp.sum(jnp.where(own, x, 0.0), axis=axis) for x in (log_p, log_q))
    boosted = -log_true_q - jax.nn.logsumexp(log_q, axis=axis, where=rest)
    divergence = jnp.sum(jnp.where(admitted, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=axis)
    losses = boosted - beta * jnp.expm1(log_true_p) * divergence
    losses = jnp.where(any_other, losses, 0.0)
    losses = jnp.where(jnp.isnan(q).any(axis=axis), jnp.nan, losses)
    return losses.astype(jnp.result_type(natural_logits))


def smooth_adversarial_comp_sum_loss(
    logits: ArrayLike,
    adversarial_logits: ArrayLike,
    labels: ArrayLike,
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""A comp-sum loss plus how far an attack moves the margins (smooth adversarial comp-sum loss).

    With D(x) the vector of margins f_y - f_k of the label y over every other class k,

        L = Φ_τ(Σ_{k≠y} exp(-D_k(x) / ρ)) + ν ‖D(x') - D(x)‖_2

    and Φ_τ of `comp_sum_loss`. For ν ≥ √(n - 1) / ρ with n classes it is at least the comp-sum loss
    of the clipped margins min(max(1 - D_k(x') / ρ, 0), 1) in place of the exponentials,
    whatever the perturbed input x'. Labels that are distributions give the expectation over the
    label.

    Args:
      logits: f(x) `[..., classes]` floating point, the classes at `axis`.
      adversarial_logits: f(x') of the shape of `logits`, at the perturbed input that makes the
        second term largest: raise this loss in x' by `projected_gradient_attack`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      tau: τ at least 0. Default 1, cross-entropy.
      rho: ρ above 0, the margin that counts as safe. Default 1.
      nu: ν at least 0. Default 1.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted. The gradient of the
      second term is 0 where it is.

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it for robustness with a guarantee for the adversarial zero-one loss and good accuracy on
    clean inputs; `switching_ovr_trades_loss` keeps predictions together in place of margins.

    Cost: the forward passes for both logits, beside the attack's; here a softmax and O(n) more for
    each example with n classes.

    Example:
      >>> clean, attacked = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.5]])
      >>> print(smooth_adversarial_comp_sum_loss(clean, attacked, jnp.array([0])).round(3))
      [1.627]

    Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and
    Applications", 2023, arXiv:2304.07288.
    """
    check_interval(0, jnp.inf, closed="right", rho=rho)
    check_interval(0, jnp.inf, nu=nu)
    check_floating(logits=logits, adversarial_logits=adversarial_logits)
    check_shape(jnp.shape(logits), adversarial_logits=adversarial_logits)
    dtype = compute_dtype(logits, adversarial_logits)
    clean, attacked = (jnp.asarray(x).astype(dtype) for x in (logits, adversarial_logits))
    natural = comp_sum_loss(clean / rho, labels, tau=tau, axis=axis, where=where)
    q = label_distribution(labels, clean, axis=axis, where=where)
    admitted = jnp.ones(q.shape, bool) if where is None else jnp.broadcast_to(where, q.shape)
    count = jnp.maximum(admitted.sum(axis=axis, keepdims=True), 1)
    moved = jnp.where(admitted, attacked - clean, 0.0)
    moved = jnp.where(admitted, moved - moved.sum(axis=axis, keepdims=True) / count, 0.0)
    # Σ_k (m_y - m_k)² = n m_y² + Σ_k m_k² for every y at once, since the m_k have mean 0
    squares = count * jnp.square(moved) + jnp.sum(jnp.square(moved), axis=axis, keepdims=True)
    positive = admitted & (squares > 0)
    distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    losses = natural + nu * jnp.sum(q * distance, axis=axis)
    return losses.astype(jnp.result_type(logits))


def projected_gradient_attack(
    loss_fn: Callable[[Array], Array],
    inputs: ArrayLike,
    *,
    key: ArrayLike,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    num_steps: int = 10,
    norm: str = "inf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Array:
    r"""Adversarial examples: perturbed inputs within reach that raise a loss (PGD).

    From a random start in the ball of radius ε around the inputs x, each step is

        norm "inf":  x' ← Π(x' + α sign(∇ L(x')))
        norm "2":    x' ← Π(x' + α ∇ L(x') / ‖∇ L(x')‖_2)

    with α = step_size; Π projects on the ball, and then on `bounds`.

    Args:
      loss_fn: from inputs of the shape and type of `inputs` to losses of any shape, whose sum is
        raised; the loss of an example has to depend on that example alone.
      inputs: x `[batch, ...]` floating point, within `bounds`. For norm "2" an example is all axes
        but the first.
      key: a key from `jax.random`, for the start: uniform in the ball.
      epsilon: ε at least 0, in units of the inputs. Default 8/255, the usual one for CIFAR and
        norm "inf".
      step_size: α at least 0. Default 2/255.
      num_steps: at least 0; 0 gives the random start. Default 10.
      norm: "inf" or "2".
      bounds: the least and the largest value of an input, or None. Default (0, 1).

    Returns:
      x' of the shape and type of `inputs`, with no gradient.

    Raises:
      ValueError: a hyperparameter out of its range, or a `norm` that is neither.
      TypeError: inputs that are not floating point.

    Use it to make the second argument of the losses of this file, with dropout and updates of
    running statistics off in `loss_fn`. For evaluation take more steps and restarts.

    Cost: `num_steps` forward and backward passes of `loss_fn`, one after another; memory of one of
    them, whatever their number.

    Example:
      >>> loss_fn = lambda x: x @ jnp.array([1.0, -1.0])
      >>> x = jnp.array([[0.5, 0.5]])
      >>> attack = projected_gradient_attack(loss_fn, x, key=jax.random.key(0), epsilon=0.03)
      >>> print(attack.round(3))
      [[0.53 0.47]]

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2017,
    arXiv:1706.06083, as in Kanai et al., "One-vs-the-Rest Loss to Focus on Important Samples in
    Adversarial Training", 2022, arXiv:2207.10283.
    """
    check_floating(inputs=inputs)
    check_interval(0, jnp.inf, epsilon=epsilon, step_size=step_size, num_steps=num_steps)
    if norm not in ("inf", "2"):
        raise ValueError(f"norm must be 'inf' or '2', got {norm!r}")
    x = jnp.asarray(inputs)
    wide = x.astype(compute_dtype(x))
    features = tuple(range(1, x.ndim))

    def unit(v: Array) -> Array:
        largest = jnp.max(jnp.abs(v), axis=features, keepdims=True, initial=0.0)
        v = v / jnp.where(largest > 0, largest, 1.0)  # so that no square underflows
        size = jnp.sqrt(jnp.sum(jnp.square(v), axis=features, keepdims=True))
        return v / jnp.where(size > 0, size, 1.0)

    def project(delta: Array) -> Array:
        if norm == "inf":
            delta = jnp.clip(delta, -epsilon, epsilon)
        else:
            size = jnp.sqrt(jnp.sum(jnp.square(delta), axis=features, keepdims=True))
            delta *= jnp.minimum(1.0, epsilon / jnp.where(size > 0, size, 1.0))
        return delta if bounds is None else jnp.clip(wide + delta, *bounds) - wide

    def step(_: int, delta: Array) -> Array:
        gradient = jax.grad(lambda x: jnp.sum(loss_fn(x)))((wide + delta).astype(x.dtype))
        gradient = gradient.astype(delta.dtype)
        direction = jnp.sign(gradient) if norm == "inf" else unit(gradient)
        return project(delta + step_size * direction)

    if norm == "inf":
        start = jax.random.uniform(key, x.shape, wide.dtype, -epsilon, epsilon)
    else:
        direction_key, radius_key = jax.random.split(key)
        direction = unit(jax.random.normal(direction_key, x.shape, wide.dtype))
        radius = jax.random.uniform(radius_key, x.shape[:1] + (1,) * len(features), wide.dtype)
        start = epsilon * direction * radius ** (1 / max(1, x[0].size))
    delta = jax.lax.fori_loop(0, num_steps, step, project(start))
    return jax.lax.stop_gradient((wide + delta).astype(x.dtype))


def _classes_of_members(logits: ArrayLike, *, axis: int, where: ArrayLike | None) -> Array | None:
    """Which classes exist for an example of a set: all or none. None without `where`."""
    if where is None:
        return None
    shape = list(jnp.shape(logits))
    (axis,) = canonical_axes(axis, len(shape))
    del shape[axis]
    check_broadcastable(tuple(shape), where=where)
    return jnp.expand_dims(jnp.broadcast_to(where, shape), axis)


def _own_class(
    labels: ArrayLike, logits: ArrayLike, *, axis: int, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """The labels as distributions, where their most probable class is, and what `where` admits."""
    q = label_distribution(labels, logits, axis=axis, where=where)
    classes = q.shape[axis]
    if classes < 2:
        raise ValueError(f"logits must have at least two classes, got {classes}")
    own = jax.nn.one_hot(jnp.argmax(q, axis=axis), classes, axis=axis, dtype=bool)
    admitted = jnp.ones(q.shape, bool) if where is None else jnp.broadcast_to(where, q.shape)
    return q, own, admitted
