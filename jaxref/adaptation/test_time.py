"""Test-time adaptation: steps on the batches of a new environment, without labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import sum_over_shards
from jaxref.optimizers import norm_parameters_only, train_only


def class_correlation_loss(
    logits: ArrayLike,
    *,
    normalize: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""How often the predictions of a set of examples confuse two classes, as a scalar (Core).

    With the predictions P = softmax(logits), B rows of K classes, and their class correlation
    R = Pᵀ P, the loss is what lies off its diagonal:

        1/K Σ_j Σ_(j' ≠ j) R_jj' / (Σ_k R_jk + 10⁻⁸)     normalised, each class counts alike
        1/B Σ_j Σ_(j' ≠ j) R_jj' = 1 - avg_b Σ_j p_bj²   otherwise, each example counts alike

    Between 0 and 1. It is 0 where every prediction is certain, whatever the classes. R is never
    formed: Σ_k R_jk = Σ_b p_bj, of which Σ_b p_bj² is on the diagonal.

    Args:
      logits: `[..., classes]` floating point; all axes before the last are examples, as the pixels
        of images are.
      normalize: whether to divide each row of R by its sum. Default True.
      axis_name: name or names of mapped axes over which the examples are spread; the loss is then
        that of the global set. Default: `logits` are the whole set.

    Returns:
      The loss, a scalar in at least float32. Gradients reach both factors of R.

    Raises:
      ValueError: `logits` without examples or classes.
      TypeError: `logits` are not floating point.

    Use it to adapt without labels, by `core_adapt_step`. Normalised, it gives classes that are
    predicted rarely the weight of the others: one that is never predicted adds almost 1/K, as long
    as the traces of it sum to more than 10⁻⁸.

    Cost: that of a softmax over the classes; shards exchange two numbers a class.

    Example:
      >>> class_correlation_loss(jnp.array([[0.0, 0.0], [0.0, 0.0]])).round(3)
      Array(0.5, dtype=float32)
      >>> class_correlation_loss(jnp.array([[99.0, 0.0], [0.0, 99.0]])).round(3)
      Array(0., dtype=float32)

    Reference: You, Li, Zhao, "Test-time Batch Statistics Calibration for Covariate Shift", 2021,
    arXiv:2110.04065.
    """
    check_floating(logits=logits)
    logits = jnp.asarray(logits)
    if logits.ndim < 2 or logits.size == 0:
        raise ValueError(f"logits must have shape [..., examples, classes], got {logits.shape}")
    probs = jax.nn.softmax(logits.astype(compute_dtype(logits)), axis=-1)
    examples = tuple(range(logits.ndim - 1))
    row = jnp.sum(probs, axis=examples)
    off_diagonal = jnp.sum(probs * (1 - probs), axis=examples)
    row, off_diagonal = sum_over_shards((row, off_diagonal), axis_name)
    if normalize:
        return jnp.mean(off_diagonal / (row + 1e-8))
    return jnp.sum(off_diagonal) / jnp.sum(row)


def core_adapt_step(
    params: Any,
    opt_state: optax.OptState,
    batch: Any,
    apply_fn: Callable[[Any, Any], Array],
    optimizer: optax.GradientTransformation,
    trainable: Any | Callable[[Any], Any] = norm_parameters_only,
) -> tuple[Any, optax.OptState, Array]:
    r"""One online step of Core: predicts a batch and adapts the norms to it, without labels.

        P = softmax(apply_fn(params, batch)),   params ← params + optimizer(∇ loss(P))

    with the normalised `class_correlation_loss`. The predictions are of the same forward pass, from
    before the step, so that a stream is predicted and adapted to in one go.

    Args:
      params: a tree of arrays, the paths of which name the modules.
      opt_state: at first `train_only(optimizer, trainable).init(params)`.
      batch: what `apply_fn` takes.
      apply_fn: `(params, batch) -> logits [..., classes]`, with `alpha_batch_norm`, or another norm
        that makes do with test batches, in the model.
      optimizer: an optax transformation, learning rate included.
      trainable: the parameters to adapt, a mask for `jaxref.optimizers.train_only`. Default: the
        scales and biases of the normalisation layers. All others stay as they are, to the bit.

    Returns:
      The new `params`, the new `opt_state`, and the predictions P, `[..., classes]` in at least
      float32.

    Raises:
      ValueError: no parameter is a norm's, under the default `trainable`; what the loss raises.
      TypeError: logits that are not floating point.

    Use it on a stream of batches with all classes in them. Nothing holds the parameters near their
    initial values: keep those to return to, and the learning rate small.

    Cost: a backward pass for each batch beside the forward one that predicts; the optimizer's state
    of what is adapted.

    Example:
      >>> from jaxref.optimizers import norm_parameters_only, train_only
      >>> params = {"norm": {"scale": jnp.ones(2)}, "head": {"kernel": jnp.eye(2)}}
      >>> apply_fn = lambda p, x: x * p["norm"]["scale"] @ p["head"]["kernel"]
      >>> optimizer = optax.sgd(0.1)
      >>> opt_state = train_only(optimizer, norm_parameters_only).init(params)
      >>> x = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> params, _, predictions = core_adapt_step(params, opt_state, x, apply_fn, optimizer)
      >>> print(params["norm"]["scale"].round(2), predictions.argmax(-1))
      [1.01 1.01] [0 1]

    Reference: You, Li, Zhao, "Test-time Batch Statistics Calibration for Covariate Shift", 2021,
    arXiv:2110.04065.
    """

    def loss_fn(params):
        logits = apply_fn(params, batch)
        return class_correlation_loss(logits), logits

    gradients, logits = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = train_only(optimizer, trainable).update(gradients, opt_state, params)
    predictions = jax.nn.softmax(logits.astype(compute_dtype(logits)), axis=-1)
    return optax.apply_updates(params, updates), opt_state, predictions
