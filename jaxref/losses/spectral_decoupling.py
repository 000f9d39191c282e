"""Spectral decoupling: logistic loss with a penalty on the outputs in place of the weights."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype


def spectral_decoupling_penalty(
    logits: ArrayLike,
    *,
    coefficient: ArrayLike = 1e-3,
    offset: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""A quadratic penalty on each logit.

        R = c (f - g)²,   c = coefficient, g = offset

    The paper's λ is 2c, as in its code. Weight decay stops the training of every feature once the
    strongest explains the labels; with the penalty on outputs the features stop apart.

    Args:
      logits: f `[...]` floating point.
      coefficient: c at least 0, a number or an array that broadcasts to `logits`. Default 1e-3, as
        in the paper's experiment on two features.
      offset: g, a number or an array that broadcasts to `logits`. Default 0.
      where: boolean, broadcastable to `logits`; excluded entries have penalty 0.

    Returns:
      `[...]` penalties in the type of `logits`.

    Raises:
      ValueError: a negative `coefficient`, or arrays that do not broadcast.
      TypeError: logits that are not floating point.

    Use it for several classes, its sum over them added to the cross-entropy (the paper has two
    classes, see `spectral_decoupling_loss`), without weight decay. `z_loss` holds their normaliser
    alone.

    Cost: one pass over the logits.

    Example:
      >>> print(spectral_decoupling_penalty(jnp.array([3.0, -1.0]), coefficient=0.5))
      [4.5 0.5]

    Reference: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks",
    2020, arXiv:2011.09468.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, coefficient=coefficient)
    shape, dtype = jnp.shape(logits), compute_dtype(logits)
    check_broadcastable(shape, coefficient=coefficient, offset=offset, where=where)
    f = jnp.asarray(logits).astype(dtype)
    penalty = jnp.asarray(coefficient, dtype) * jnp.square(f - jnp.asarray(offset, dtype))
    if where is not None:
        penalty = jnp.where(where, penalty, 0.0)
    return penalty.astype(jnp.result_type(logits))


def spectral_decoupling_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    coefficient: ArrayLike = 1e-3,
    offset_positive: float = 0.0,
    offset_negative: float = 0.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropy whose outputs are held near 0, so that no feature starves another (SD).

        L = BCE(sigmoid(f), t) + c (f - g_t)²,   c = coefficient

    with g_1 = offset_positive and g_0 = offset_negative. Without offsets every example stops where
    sigmoid(-u) = 2c u, u its margin, however strong the features are; with weight decay the
    response to one feature falls as another one gets stronger (`jaxref.analysis.starved_response`).

    Args:
      logits: f `[...]` floating point, one binary decision each.
      targets: t of the shape of `logits`, values in [0, 1] (booleans and integers too); for those
        between g is the mean of both offsets, weighted by t.
      coefficient: c at least 0, a number or an array that broadcasts to `logits`: half the paper's
        λ. 0 is binary cross-entropy. Default 1e-3; the paper has 2e-5 for coloured digits after a
        first phase without, 3e-3 for two moons, 0.1 with offsets for faces.
      offset_positive: g_1. Default 0; 2.5 for the paper's faces.
      offset_negative: g_0. Default 0; 0.44 for the paper's faces.
      where: boolean, broadcastable to `logits`; excluded entries have loss 0.

    Returns:
      `[...]` losses in the type of `logits`.

    Raises:
      ValueError: a negative `coefficient`, or arrays that do not broadcast.
      TypeError: logits that are not floating point.

    Use it where a simple feature predicts most labels in training but should not be all that is
    learnt, with no weight decay beside it; `jaxref.data.two_moons_shortcut` makes such data.

    Cost: one pass over the logits.

    Example:
      >>> losses = spectral_decoupling_loss(jnp.array([3.0, 3.0]), jnp.array([1, 0]))
      >>> print(losses.round(3))
      [0.058 3.058]

    Reference: Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks",
    2020, arXiv:2011.09468.
    """
    check_floating(logits=logits)
    check_broadcastable(jnp.shape(logits), targets=targets, where=where)
    dtype = compute_dtype(logits)
    f, t = jnp.asarray(logits).astype(dtype), jnp.asarray(targets).astype(dtype)
    offset = t * offset_positive + (1 - t) * offset_negative
    penalty = spectral_decoupling_penalty(f, coefficient=coefficient, offset=offset)
    loss = -t * jax.nn.log_sigmoid(f) - (1 - t) * jax.nn.log_sigmoid(-f) + penalty
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(logits))
