"""Losses of language models on the logits over their vocabulary."""

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
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import sum_over_shards


def z_loss(
    logits: ArrayLike,
    *,
    coefficient: float = 1e-4,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Penalty on the softmax normaliser, which keeps the logits from drifting.

        L = c (log Z)²,   Z = Σ_j exp(f_j),   c = coefficient

    Cross-entropy ignores a constant added to all logits f, so that nothing holds log Z: it drifts
    to large negative values late in training at high learning rates, and the loss diverges. The
    gradient is `2 c log Z softmax(f)`.

    Args:
      logits: `[..., classes]` floating point, the classes at `axis`.
      coefficient: c at least 0. Default 1e-4, PaLM's and the paper's.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, to be added to the cross-entropy of each token; 0
      where no class is admitted.

    Raises:
      ValueError: `axis` out of range or without any class, a `where` that does not broadcast, or a
        negative `coefficient`.
      TypeError: logits that are not floating point.

    Use it with cross-entropy over a large vocabulary, above all in low precision;
    `jaxref.kernels.linear_softmax_cross_entropy` has it built in (`z_loss=1e-4`).

    Cost: one log-sum-exp over the classes, which cross-entropy takes, too.

    Example:
      >>> losses = z_loss(jnp.array([[2.0, 1.0], [-30.0, -30.0]]))
      >>> print(losses.round(4))
      [0.0005 0.0859]

    Reference: Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv:2309.14322, after Chowdhery et al., "PaLM: Scaling Language Modeling
    with Pathways", 2022, arXiv:2204.02311.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, coefficient=coefficient)
    check_broadcastable(jnp.shape(logits), where=where)
    (axis,) = canonical_axes(axis, jnp.ndim(logits))
    if jnp.shape(logits)[axis] == 0:
        raise ValueError(f"logits must have at least one class, got shape {jnp.shape(logits)}")
    log_z = masked_logsumexp(logits, axis=axis, where=where)
    return (coefficient * jnp.square(log_z)).astype(jnp.result_type(logits))


def load_balance_loss(
    probabilities: ArrayLike,
    assignment: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""How unequally a router's experts are used. A loss on the whole set of tokens: one number.

        L = E Σ_i m_i P_i

    with E experts, m_i the share of all (token, choice) pairs that went to expert i, and P_i the
    mean probability that the router gave it. It is 1 where both are uniform, and E where the router
    sends all tokens to one expert for certain. m has no gradient: L pushes the probability of the
    experts that are used most down.

    Args:
      probabilities: `[..., tokens, E]` floating point: the router's softmax.
      assignment: integer `[..., tokens, K]`, the K experts that each token chose, those choices
        included for which there was no place; an id outside [0, E) gives NaN.
      where: boolean, broadcastable to `[..., tokens]`: the tokens that exist. Default: all.
      axis_name: name or names of the mesh or vmap axes over which the tokens are spread, whose
        means are taken together.

    Returns:
      A scalar in at least float32; 0 where no token exists.

    Raises:
      ValueError: shapes that do not match, or a `where` that does not broadcast.
      TypeError: probabilities not floating point, or an assignment not integer.

    Use it in training a mixture of experts that leaves some idle, with a weight of about 0.01 for
    each mixture; of one that is stacked or used in several layers, the mean over those.
    `jaxref.nn.MixtureOfExperts` does.

    Cost: one pass over the probabilities, and tokens · K · E comparisons for the shares.

    Example:
      >>> probabilities = jnp.array([[0.75, 0.25], [0.5, 0.5]])
      >>> print(load_balance_loss(probabilities, jnp.array([[0], [0]])))
      1.25

    Reference: Xue, Shi, Wei, Lou, Liu, You, "Go Wider Instead of Deeper", 2021, arXiv:2107.11817,
    after Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with
    Simple and Efficient Sparsity", 2021, arXiv:2101.03961.
    """
    check_floating(probabilities=probabilities)
    probabilities, assignment = jnp.asarray(probabilities), jnp.asarray(assignment)
    if not jnp.issubdtype(assignment.dtype, jnp.integer):
        raise TypeError(f"assignment must be integers, got {assignment.dtype.name}")
    if probabilities.ndim < 2:
        raise ValueError(
            f"probabilities must have shape [..., tokens, experts], got {probabilities.shape}"
        )
    tokens, num_experts = probabilities.shape[:-1], probabilities.shape[-1]
    check_shape((*tokens, *assignment.shape[-1:]), assignment=assignment)
    check_broadcastable(tokens, where=where)
    wide = probabilities.astype(compute_dtype(probabilities))
    admitted = jnp.ones(tokens, bool) if where is None else jnp.broadcast_to(where, tokens)
    chosen = assignment[..., None] == jnp.arange(num_experts)
    chosen = jnp.where(chosen.any(axis=-1, keepdims=True), chosen, jnp.nan)  # [..., tokens, K, E]
    of_token = jnp.mean(chosen, axis=-2, dtype=wide.dtype)
    every_token = tuple(range(len(tokens)))
    sums = [
        jnp.sum(of_token, axis=every_token, where=admitted[..., None]),
        jnp.sum(wide, axis=every_token, where=admitted[..., None]),
        jnp.sum(admitted, dtype=wide.dtype),
    ]
    sums = sum_over_shards(sums, axis_name)
    shares, mean_probabilities = (total / jnp.maximum(sums[2], 1) for total in sums[:2])
    return num_experts * jnp.sum(jax.lax.stop_gradient(shares) * mean_probabilities)
