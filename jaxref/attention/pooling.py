"""Attention that pools: a sequence of tokens averaged by learned weights into one vector."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_shape
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype


def sequence_pooling(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    where: ArrayLike | None = None,
) -> Array:
    r"""The average of a sequence's tokens, weighted by what a linear map thinks of each (SeqPool).

        z = Σ_n w_n x_n,   w = softmax_n(x_n · g + b)

    The order of the tokens says nothing. With g = 0 it is their mean; a long g picks the token that
    reaches farthest along it.

    Args:
      x: `[..., N, C]` floating point, N tokens.
      kernel: g, `[C]` floating point.
      bias: b, a scalar. Default: 0. The softmax takes it out again: it is here because the authors'
        linear map has one.
      where: boolean, broadcastable to `[..., N]`: the tokens that exist. Default: all.

    Returns:
      z `[..., C]` in the type of `x`, computed in at least float32; zeros, with zero gradients, for
      a sequence without any token.

    Raises:
      ValueError: `x` without an axis of tokens, `kernel` not of shape `[C]`, `bias` not a scalar,
        or `where` that does not broadcast.
      TypeError: `x`, `kernel` or `bias` is not floating point.

    Use it behind an encoder in place of a class token, which takes part in every layer and still
    reads no more than this does, or of a mean, which weighs background and object alike.

    Cost: C parameters and 2 N C multiplications a sequence.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> print(sequence_pooling(x, jnp.zeros(2)), sequence_pooling(x, jnp.array([0.0, 50.0])))
      [0.5 2. ] [0. 4.]

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """
    check_floating(x=x, kernel=kernel)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim < 2:
        raise ValueError(f"x must have shape [..., tokens, features], got {x.shape}")
    check_shape(x.shape[-1:], kernel=kernel)
    check_broadcastable(x.shape[:-1], where=where)
    wide = x.astype(compute_dtype(x, kernel))
    if where is not None:
        wide = jnp.where(jnp.expand_dims(where, -1), wide, 0.0)
    scores = wide @ kernel.astype(wide.dtype)
    if bias is not None:
        check_floating(bias=bias)
        check_shape((), bias=bias)
        scores += bias
    weights = jnp.exp(masked_log_softmax(scores, axis=-1, where=where))
    if where is not None:
        weights = jnp.where(where, weights, 0.0)
    return jnp.einsum("...n,...nc->...c", weights, wide).astype(x.dtype)
