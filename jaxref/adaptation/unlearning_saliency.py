"""Unlearning of training examples, by the weights that know them (SalUn) and those that know best
(LoReUn).

Both steer a forgetting loss over the examples to forget beside a retaining loss over the others:
SalUn lets it change the weights alone that the examples to forget depend on, LoReUn weighs each
example by how well it is known.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.losses import softmax_cross_entropy
from jaxref.optimizers import train_only

Scope = Literal["global", "leaf"]


def saliency_mask(
    forget_loss_fn: Callable[[Any, Any], ArrayLike],
    params: Any,
    batches: Iterable[Any],
    *,
    keep_fraction: float = 0.5,
    scope: Scope = "global",
    threshold: ArrayLike | None = None,
) -> Any:
    r"""Which weights the examples to forget depend on (the saliency map of SalUn).

        m = 1[|g| is among the ⌊k n⌋ largest of n],   g = Σ_batches ∇ loss(θ, batch)

    Gradients of all batches are summed before the magnitude is taken, so that examples which
    disagree on a weight cancel. Equal magnitudes rank in the order of the flattened tree.

    Args:
      forget_loss_fn: `(params, batch) -> loss`, a scalar, with the model in evaluation mode. Its
        sign and scale do not matter.
      params: θ, the weights that have learned the examples: a tree of floating-point arrays.
      batches: the whole forget set, batch by batch. Batches of the same shape compile once, and
        means count alike if batches are of the same size.
      keep_fraction: k in [0, 1]. Default 0.5, the paper's.
      scope: whether weights are ranked over the whole tree ("global", the default, as in the
        authors' code) or in each "leaf".
      threshold: if given, γ at least 0: m = 1[|g| >= γ] instead of a fraction.

    Returns:
      A tree like `params` of boolean arrays, True for weights that may change.

    Raises:
      ValueError: no batches, a number out of its range, or an unknown scope.

    Use it with `masked_updates`, or as the mask of `jaxref.optimizers.train_only`, and any loss
    that forgets. The global ranking sorts all weights in one array: take "leaf" or a threshold
    where they are spread over devices.

    Cost: a forward and backward pass over the forget set, once; a sum of gradients in float32 and a
    sort of all weights (of each leaf; none for a threshold).

    Example:
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
      >>> loss = lambda p, x: jnp.sum(p["a"] ** 2) * x + jnp.sum(p["b"])
      >>> print(saliency_mask(loss, params, [1.0, 1.0]))
      {'a': Array([ True,  True], dtype=bool), 'b': Array([False, False], dtype=bool)}

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023,
    arXiv:2310.12508.
    """
    check_interval(0, 1, keep_fraction=keep_fraction)
    if scope not in ("global", "leaf"):
        raise ValueError(f"scope must be 'global' or 'leaf', got {scope!r}")
    gradient = jax.jit(jax.grad(forget_loss_fn))
    total = None
    for batch in batches:
        wide = jax.tree.map(lambda g: g.astype(compute_dtype(g)), gradient(params, batch))
        total = wide if total is None else jax.tree.map(jnp.add, total, wide)
    if total is None:
        raise ValueError("batches must hold at least one batch, got none")
    magnitudes = jax.tree.map(jnp.abs, total)
    if threshold is not None:
        check_interval(0, jnp.inf, threshold=threshold)
        return jax.tree.map(lambda x: x >= threshold, magnitudes)
    if scope == "leaf":
        return jax.tree.map(
            lambda x: _largest(x.ravel(), keep_fraction).reshape(x.shape), magnitudes
        )
    leaves, structure = jax.tree.flatten(magnitudes)
    kept = _largest(jnp.concatenate([x.ravel() for x in leaves]), keep_fraction)
    ends = [int(end) for end in itertools.accumulate(x.size for x in leaves)]
    parts = jnp.split(kept, ends[:-1])
    return jax.tree.unflatten(structure, [m.reshape(x.shape) for m, x in zip(parts, leaves)])


def masked_updates(mask: Any | Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    r"""The updates of a mask's weights; no other weight moves, to the bit.

        u ← m ⊙ u

    It must come last in the chain, behind the learning rate: then θ_u = m ⊙ (θ + Δ) + (1 - m) ⊙ θ,
    and neither the momentum nor the weight decay of what comes before it reaches the others.

    Args:
      mask: m, a tree of boolean arrays as of `saliency_mask`, or what else
        `jaxref.optimizers.train_only` takes.

    Returns:
      The transformation; the mask is in its state, and goes with a checkpoint.

    Raises:
      ValueError: at `init`, a mask of another structure or shape than the parameters.
      TypeError: at `init`, a mask that is not boolean.

    Use it to put a mask on a chain that is there. `train_only` around an optimizer does this and
    masks the gradients too, so that clipping by a global norm sees the mask's weights alone.

    Cost: a boolean for each weight in the state, and a pass over the updates.

    Example:
      >>> weights = jnp.array([1.0, 1.0])
      >>> optimizer = optax.chain(optax.adamw(0.1), masked_updates(jnp.array([True, False])))
      >>> updates, _ = optimizer.update(weights, optimizer.init(weights), weights)
      >>> print(optax.apply_updates(weights, updates).round(3))
      [0.9 1. ]

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023,
    arXiv:2310.12508.
    """
    return train_only(optax.identity(), mask)


def random_label_forget_loss(
    logits: ArrayLike, labels: ArrayLike, *, key: Array, exclude_true: bool = True
) -> Array:
    r"""Cross-entropy with labels drawn at random, which replace what was learned by chance.

        L = -log softmax(logits)_y',   y' uniform over the classes but y

    Args:
      logits: `[..., classes]` floating point, of at least two classes.
      labels: y, integer ids `[...]`, the true ones. One that is no class gives NaN.
      key: of the labels. Take another for each epoch, or batch.
      exclude_true: whether y' must not be y, as in the paper. False draws from all classes, as the
        authors' code does.

    Returns:
      `[...]` losses in the type of `logits`.

    Raises:
      ValueError: shapes that do not match, or fewer than two classes.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use its mean as a forgetting loss by itself, as `salun_classification_loss` does, or with
    `loreun_loss`.

    Cost: that of a softmax over the classes, and a random number an example.

    Example:
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> loss = random_label_forget_loss(logits, jnp.array([0, 0]), key=jax.random.key(0))
      >>> print(loss.round(3))
      [2.127 0.127]

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023,
    arXiv:2310.12508.
    """
    check_floating(logits=logits)
    check_shape(jnp.shape(logits)[:-1], labels=labels)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels must be integers, got {jnp.result_type(labels).name}")
    classes = jnp.shape(logits)[-1]
    if classes < 2:
        raise ValueError(f"logits must have at least two classes, got shape {jnp.shape(logits)}")
    y = jnp.asarray(labels, jnp.int32)
    if exclude_true:
        drawn = (y + jax.random.randint(key, y.shape, 1, classes)) % classes
    else:
        drawn = jax.random.randint(key, y.shape, 0, classes)
    known = (y >= 0) & (y < classes)
    return softmax_cross_entropy(logits, jnp.where(known, drawn, -1))


def salun_classification_loss(
    forget_logits: ArrayLike,
    forget_labels: ArrayLike,
    retain_logits: ArrayLike,
    retain_labels: ArrayLike,
    *,
    key: Array,
    retain_weight: float = 1.0,
    exclude_true: bool = True,
    forget_where: ArrayLike | None = None,
    retain_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Random labels for a set to forget, true ones for a set to retain, as a scalar (SalUn).

        L = E_forget -log p(y') + α E_retain -log p(y),   y' of `random_label_forget_loss`

    Args:
      forget_logits: `[forget, classes]` floating point.
      forget_labels: integer ids `[forget]`, the true ones.
      retain_logits: `[retain, classes]`; as many or fewer or more.
      retain_labels: integer ids `[retain]`.
      key: of the random labels; another for each step.
      retain_weight: α at least 0. Default 1.
      exclude_true: as in `random_label_forget_loss`.
      forget_where, retain_where: boolean `[forget]` and `[retain]`: the examples that count.
        Default: all.
      axis_name: name or names of mapped axes over which the sets are spread; give each shard a key
        of its own.

    Returns:
      The loss, a scalar in the type of `forget_logits`. A set without examples adds 0.

    Raises:
      ValueError: shapes that do not match, fewer than two classes, or a negative weight.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use it with `masked_updates` of a `saliency_mask`: that is SalUn. All weights free, it is
    unlearning by random labels.

    Cost: that of a softmax over the classes; a forward and backward pass of both batches.

    Example:
      >>> logits = jnp.zeros((3, 2))
      >>> labels = jnp.array([0, 1, 0])
      >>> loss = salun_classification_loss(logits, labels, logits, labels, key=jax.random.key(0))
      >>> print(loss.round(3))
      1.386

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023,
    arXiv:2310.12508.
    """
    forget = random_label_forget_loss(
        forget_logits, forget_labels, key=key, exclude_true=exclude_true
    )
    retain = softmax_cross_entropy(retain_logits, retain_labels)
    return _objective(forget, retain, retain_weight, forget_where, retain_where, axis_name)


def salun_diffusion_loss(
    forget_noise: ArrayLike,
    pseudo_noise: ArrayLike,
    retain_noise: ArrayLike,
    target_noise: ArrayLike,
    *,
    retain_weight: float = 1.0,
    forget_where: ArrayLike | None = None,
    retain_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""A concept that a diffusion model is to see as another one, as a scalar (SalUn).

        L = E_forget |ε(x_t | c) - sg ε(x_t | c')|² + α E_retain |ε(x_t | c) - ε|²

    with |·|² the mean over the entries and sg for no gradient: images of the concept c are denoised
    as if they were of c', and all others as before.

    Args:
      forget_noise: ε(x_t | c) `[forget, ...]` floating point, the noise that the model predicts for
        images of the concept to forget.
      pseudo_noise: ε(x_t | c'), of that shape: for the same noisy images, with another concept.
      retain_noise: `[retain, ...]`, predicted for images to retain with their own concepts.
      target_noise: of that shape: the noise that was added to them.
      retain_weight: α at least 0. Default 1.
      forget_where, retain_where, axis_name: as in `salun_classification_loss`.

    Returns:
      The loss, a scalar in the type of `forget_noise`. A set without images adds 0.

    Raises:
      ValueError: shapes that do not match, or a negative weight.
      TypeError: predictions that are not floating point.

    Use it with `masked_updates` of a `saliency_mask`, that of the denoising loss on the images to
    forget.

    Cost: one pass over the predictions, which are three of the model, `pseudo_noise` without a
    backward pass.

    Example:
      >>> a, b = jnp.zeros((2, 3)), jnp.ones((4, 3))
      >>> print(salun_diffusion_loss(a, a + 1, b, b - 2, retain_weight=0.1).round(3))
      1.4

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023,
    arXiv:2310.12508.
    """
    check_floating(
        forget_noise=forget_noise,
        pseudo_noise=pseudo_noise,
        retain_noise=retain_noise,
        target_noise=target_noise,
    )
    check_shape(jnp.shape(forget_noise), pseudo_noise=pseudo_noise)
    check_shape(jnp.shape(retain_noise), target_noise=target_noise)
    forget = _mean_square(forget_noise, jax.lax.stop_gradient(pseudo_noise))
    retain = _mean_square(retain_noise, target_noise)
    return _objective(forget, retain, retain_weight, forget_where, retain_where, axis_name)


def loss_reweighting(
    losses: ArrayLike,
    *,
    temperature: float = 1.0,
    normalize: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Weights for a set of examples to forget, larger for those that are known well (LoReUn).

        w_i = exp(-l_i / τ),   normalised n exp(-l_i / τ) / Σ_j exp(-l_j / τ)

    with l_i the loss of the task itself on example i, not that of unlearning: what has a small loss
    is hard to forget. For cross-entropy and τ = 1, w_i is the probability of the true label.

    Args:
      losses: l, at least 0, `[...]` floating point, one for each example. Of the original model
        (the paper's static weights), or of the model at each step (dynamic).
      temperature: τ above 0. Default 1. Weights become alike as it grows.
      normalize: whether the weights shall have mean 1 over the set, which leaves the size of the
        loss as it was. Default True.
      where: boolean, broadcastable to `losses`: the examples that count. Default: all.
      axis_name: name or names of mapped axes over which the set is spread.

    Returns:
      w, of the shape and type of `losses`, without gradient; 0 for examples that do not count.

    Raises:
      ValueError: a temperature out of its range, or a mask that does not fit.
      TypeError: losses that are not floating point.

    Use it on any forgetting loss, by `loreun_loss` or a product of one's own.

    Cost: one pass over the losses. Static weights take one forward pass over the set in all,
    dynamic ones the losses of each step.

    Example:
      >>> print(loss_reweighting(jnp.array([0.0, 1.0, 2.0])).round(3))
      [1.996 0.734 0.27 ]

    Reference: Li, Shen, Wang, Kawaguchi, "LoReUn: Data Itself Implicitly Provides Cues to Improve
    Machine Unlearning", 2025, arXiv:2507.22499.
    """
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    check_floating(losses=losses)
    check_broadcastable(jnp.shape(losses), where=where)
    values = jax.lax.stop_gradient(jnp.asarray(losses))
    exists = jnp.broadcast_to(True if where is None else where, values.shape)
    exponents = jnp.where(exists, -values.astype(compute_dtype(values)) / temperature, -jnp.inf)
    if normalize:
        number = sum_over_shards(jnp.count_nonzero(exists), axis_name)
        total = masked_logsumexp(exponents.ravel(), where=exists.ravel(), axis_name=axis_name)
        exponents += jnp.log(jnp.maximum(number, 1)) - total
    return jnp.exp(exponents).astype(values.dtype)


def loreun_loss(
    forget_losses: ArrayLike,
    retain_losses: ArrayLike,
    weighting_losses: ArrayLike,
    *,
    temperature: float = 1.0,
    retain_weight: float = 1.0,
    normalize: bool = True,
    forget_where: ArrayLike | None = None,
    retain_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""A forgetting loss that dwells on what is known well, and a retaining one, as a scalar.

        L = E_forget w_i l_i + α E_retain l_j,   w = `loss_reweighting`(weighting_losses)

    Args:
      forget_losses: `[forget]` floating point, what is minimised to forget: those of
        `random_label_forget_loss`, or minus the cross-entropy for gradient ascent.
      retain_losses: `[retain]`, the task's losses on examples to retain.
      weighting_losses: `[forget]`, at least 0: the task's losses on the examples to forget, by
        their true labels. Those of the original model, computed once, make static weights; those of
        the model at each step dynamic ones. No gradient passes.
      temperature, normalize: as in `loss_reweighting`.
      retain_weight: α at least 0. Default 1.
      forget_where, retain_where: boolean, broadcastable to the losses: the examples that count.
        Default: all.
      axis_name: name or names of mapped axes over which the sets are spread.

    Returns:
      The loss, a scalar in the type of `forget_losses`. A set without examples adds 0.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: losses that are not floating point.

    Use it where some examples are still known after others are forgotten. It goes with
    `masked_updates`.

    Cost: one pass over the losses; a forward and backward pass of both batches, nothing more if the
    weights are of the same pass.

    Example:
      >>> forget, retain = jnp.array([3.0, 1.0]), jnp.array([0.5])
      >>> print(loreun_loss(forget, retain, jnp.array([0.0, 1.0])).round(3))
      2.962

    Reference: Li, Shen, Wang, Kawaguchi, "LoReUn: Data Itself Implicitly Provides Cues to Improve
    Machine Unlearning", 2025, arXiv:2507.22499.
    """
    check_floating(forget_losses=forget_losses, retain_losses=retain_losses)
    check_shape(jnp.shape(forget_losses), weighting_losses=weighting_losses)
    weights = loss_reweighting(
        weighting_losses,
        temperature=temperature,
        normalize=normalize,
        where=forget_where,
        axis_name=axis_name,
    )
    forget, retain = jnp.asarray(forget_losses), jnp.asarray(retain_losses)
    dtype = compute_dtype(forget)
    weighted = weights.astype(dtype) * forget.astype(dtype)
    loss = _objective(weighted, retain, retain_weight, forget_where, retain_where, axis_name)
    return loss.astype(forget.dtype)


def _largest(magnitudes: Array, fraction: float) -> Array:
    """Which of the magnitudes are the fraction, rounded down, of the largest."""
    order = jnp.argsort(magnitudes, descending=True, stable=True)
    kept = order[: math.floor(fraction * magnitudes.size)]
    return jnp.zeros(magnitudes.shape, bool).at[kept].set(True)


def _mean_square(x: ArrayLike, y: ArrayLike) -> Array:
    dtype = compute_dtype(x, y)
    square = jnp.square(jnp.asarray(x).astype(dtype) - jnp.asarray(y).astype(dtype))
    mean = jnp.mean(square, axis=tuple(range(1, square.ndim)))
    return mean.astype(jnp.result_type(x))


def _objective(
    forget: Array,
    retain: Array,
    retain_weight: float,
    forget_where: ArrayLike | None,
    retain_where: ArrayLike | None,
    axis_name: AxisName | None,
) -> Array:
    """The mean over the one set and α times that over the other, each over all shards."""
    check_interval(0, jnp.inf, retain_weight=retain_weight)
    means = []
    for losses, where in (
        (forget, forget_where),
        (retain, retain_where),
    ):
        check_broadcastable(losses.shape, where=where)
        exists = jnp.broadcast_to(True if where is None else where, losses.shape)
        wide = losses.astype(compute_dtype(losses))
        total, count = sum_over_shards(
            (jnp.sum(wide, where=exists), jnp.count_nonzero(exists)), axis_name
        )
        means.append(total / jnp.maximum(count, 1))
    return (means[0] + retain_weight * means[1]).astype(forget.dtype)
