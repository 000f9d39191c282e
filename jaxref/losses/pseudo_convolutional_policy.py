"""Sequences learned from the edit distance of their samples (pseudo-convolutional policy gradient).

A decoder that is trained on true prefixes alone meets its own for the first time when it is used,
and is measured by an error rate that it was not trained for. Here it is trained on what it draws
itself, by how each token changes the distance to the reference, and tokens share rewards with their
neighbours as in a convolution.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def prefix_edit_distance(
    hypothesis: ArrayLike,
    reference: ArrayLike,
    *,
    hypothesis_where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Array:
    r"""The edit distance to a reference of every prefix of a sequence (Levenshtein).

        D_t = least number of insertions, deletions and substitutions from y_1..t to the reference
        D_tj = min(D_(t-1)(j-1) + 1[y_t ≠ r_j], D_(t-1)j + 1, D_t(j-1) + 1),   D_t = D_tU

    Args:
      hypothesis: y, integers `[..., length]`.
      reference: r, integers `[..., U]`, with the same leading axes.
      hypothesis_where: boolean, broadcastable to `hypothesis`: the tokens that there are; others
        repeat the distance before them. Default: all.
      reference_where: boolean, broadcastable to `reference`, likewise.

    Returns:
      int32 `[..., length + 1]`: D_0, the length of the reference, to D of the whole. To an empty
      reference D_t is t. The end of a sequence counts as a token where the caller has it be one.

    Raises:
      ValueError: shapes that do not match.
      TypeError: sequences that are not integers.

    Use it within jit; `jaxref.metrics.token_error_rate` is for texts on the host.

    Cost: `length` steps one after the other, each over the U tokens of the reference at once;
    memory O(length + U).

    Example:
      >>> print(prefix_edit_distance(jnp.array([3, 1, 4, 4]), jnp.array([3, 4, 1])))
      [3 2 1 2 2]

    Reference: Luo, Yang, Shan, Chen, "Pseudo-Convolutional Policy Gradient for
    Sequence-to-Sequence Lip-Reading", 2020, arXiv:2003.03983.
    """
    y, r = jnp.asarray(hypothesis), jnp.asarray(reference)
    for name, x in (("hypothesis", y), ("reference", r)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {x.dtype.name}")
        if x.ndim == 0:
            raise ValueError(f"{name} must have shape [..., length], got ()")
    check_shape((*y.shape[:-1], r.shape[-1]), reference=r)
    check_broadcastable(y.shape, hypothesis_where=hypothesis_where)
    check_broadcastable(r.shape, reference_where=reference_where)
    is_token, is_wanted = (
        jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), x.shape)
        for where, x in ((hypothesis_where, y), (reference_where, r))
    )
    before = ((0, 0),) * (r.ndim - 1) + ((1, 0),)
    place = jnp.pad(jnp.cumsum(is_wanted, axis=-1, dtype=jnp.int32), before)
    far = jnp.int32(y.shape[-1] + r.shape[-1] + 1)

    def step(above: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        y_t, exists = token
        substituted = above[..., :-1] + (r != y_t[..., None])
        row = jnp.minimum(substituted, above[..., 1:] + 1)
        row = jnp.where(is_wanted, row, far)  # as if it were not there
        row = jnp.concatenate([above[..., :1] + 1, row], axis=-1)
        # D_tj = min over i ≤ j of what i has without an insertion, and the insertions from i to j
        row = jax.lax.cummin(row - place, axis=row.ndim - 1) + place
        row = jnp.where(exists[..., None], row, above)
        return row, row[..., -1]

    tokens = jnp.moveaxis(y, -1, 0), jnp.moveaxis(is_token, -1, 0)
    _, distances = jax.lax.scan(step, place, tokens)
    return jnp.concatenate([place[..., -1:], jnp.moveaxis(distances, 0, -1)], axis=-1)


def edit_distance_reward(
    hypothesis: ArrayLike,
    reference: ArrayLike,
    *,
    normalise: bool = False,
    hypothesis_where: ArrayLike | None = None,
    reference_where: ArrayLike | None = None,
) -> Array:
    r"""By how much each token of a sequence brings it nearer to its reference, in edits.

        r_t = D_(t-1) - D_t,   D = `prefix_edit_distance`,   Σ_t r_t = U - D_T = U (1 - CER)

    Args:
      hypothesis: y, integers `[..., length]`: a sample of the policy.
      reference: integers `[..., U]`, with the same leading axes.
      normalise: True divides by the reference's length, so that the rewards add up to 1 - CER.
      hypothesis_where, reference_where: as in `prefix_edit_distance`.

    Returns:
      r `[..., length]` in float32: 1, 0 or -1 without `normalise`, and 0 where there is no token.

    Raises:
      ValueError, TypeError: as `prefix_edit_distance`.

    Use it for `pseudo_convolutional_policy_gradient_loss`, as it is or less a baseline, such as the
    reward of the greedy sequence at the same place.

    Cost: that of `prefix_edit_distance`, `length` steps over the reference; no gradient.

    Example:
      >>> print(edit_distance_reward(jnp.array([3, 1, 4, 4]), jnp.array([3, 4, 1])))
      [ 1.  1. -1.  0.]

    Reference: Luo, Yang, Shan, Chen, "Pseudo-Convolutional Policy Gradient for
    Sequence-to-Sequence Lip-Reading", 2020, arXiv:2003.03983.
    """
    distances = prefix_edit_distance(
        hypothesis,
        reference,
        hypothesis_where=hypothesis_where,
        reference_where=reference_where,
    ).astype(jnp.float32)
    rewards = distances[..., :-1] - distances[..., 1:]
    return rewards / jnp.maximum(distances[..., :1], 1.0) if normalise else rewards


def pseudo_convolutional_policy_gradient_loss(
    log_probs: ArrayLike,
    rewards: ArrayLike,
    *,
    kernel_size: int = 5,
    stride: int = 2,
    where: ArrayLike | None = None,
) -> Array:
    r"""The policy gradient of a sample, with the rewards of windows (PCPG).

        L = Σ_j R_j G_j,   R_j = Σ_{t in window j} r_t,   G_j = Σ_{t in window j} -log π(y_t)

    Window j has the k positions from j s on, and the last one reaches past the end where it must to
    cover it. k = s = 1 is the policy gradient of single steps, Σ_t -r_t log π(y_t), and k of at
    least the length that of whole sequences; between them a token is answerable for the rewards of
    its neighbourhood, with less noise than for all of them.

    Args:
      log_probs: log π(y_t) `[..., length]` floating point, of the tokens of a sample, each given
        those that were drawn before it.
      rewards: r `[..., length]`, without gradient, such as `edit_distance_reward`.
      kernel_size: k at least 1. Default 5.
      stride: s from 1 to k. Default 2, with which windows overlap; s = k is the variant without.
        The defaults are ours.
      where: boolean, broadcastable to `[..., length]`: the tokens that count. Default: all.

    Returns:
      `[...]` losses, of each sequence, in the type of `log_probs`, of either sign.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: log-probabilities or rewards that are not floating point.

    Use it in `pcpg_loss`. `clipped_policy_loss` is for samples that are used in several updates,
    with one reward for all of their tokens.

    Cost: two sums over each window, length·k/s additions; the sample is drawn token by token
    before.

    Example:
      >>> log_probs, rewards = jnp.log(jnp.array([0.5, 0.5, 0.25])), jnp.array([1.0, 0.0, -1.0])
      >>> loss = pseudo_convolutional_policy_gradient_loss(
      ...     log_probs, rewards, kernel_size=2, stride=1
      ... )
      >>> print((loss / jnp.log(2)).round(3))
      -1.0

    Reference: Luo, Yang, Shan, Chen, "Pseudo-Convolutional Policy Gradient for
    Sequence-to-Sequence Lip-Reading", 2020, arXiv:2003.03983.
    """
    check_interval(1, jnp.inf, kernel_size=kernel_size)
    check_interval(1, kernel_size, stride=stride)
    check_floating(log_probs=log_probs, rewards=rewards)
    shape = jnp.shape(log_probs)
    if not shape:
        raise ValueError("log_probs must have shape [..., length], got ()")
    check_shape(shape, rewards=rewards)
    check_broadcastable(shape, where=where)
    dtype = compute_dtype(log_probs, rewards)
    exists = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), shape)
    length = shape[-1]
    past_first = max(length - kernel_size, 0)
    beyond = kernel_size - length if length < kernel_size else -past_first % stride
    lone = (1,) * (len(shape) - 1)

    def windows(x: ArrayLike) -> Array:
        return jax.lax.reduce_window(
            jnp.where(exists, jnp.asarray(x, dtype), 0.0),
            0.0,
            jax.lax.add,
            (*lone, kernel_size),
            (*lone, stride),
            [(0, 0)] * len(lone) + [(0, beyond)],
        )

    losses = -jnp.sum(windows(jax.lax.stop_gradient(rewards)) * windows(log_probs), axis=-1)
    return losses.astype(jnp.result_type(log_probs))


def pcpg_loss(
    label_log_probs: ArrayLike,
    sampled_log_probs: ArrayLike,
    rewards: ArrayLike,
    *,
    weight: float = 0.5,
    kernel_size: int = 5,
    stride: int = 2,
    label_where: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of the reference, and the policy gradient of a sample beside it (PCPG).

        L = (1 - w) Σ_u -log π(label_u | labels before it) + w L_PCPG

    with L_PCPG of `pseudo_convolutional_policy_gradient_loss`.

    Args:
      label_log_probs: log-probabilities `[..., U]` of the reference's tokens, each given those
        before it (teacher forcing).
      sampled_log_probs: log π(y_t) `[..., length]`, of the tokens of a sample.
      rewards: r `[..., length]`, without gradient, such as `edit_distance_reward`.
      weight: w in [0, 1]. Default 0.5, which is ours.
      kernel_size, stride: as in `pseudo_convolutional_policy_gradient_loss`.
      label_where: boolean, broadcastable to `[..., U]`: the reference's tokens. Default: all.
      where: boolean, broadcastable to `[..., length]`: the sample's tokens. Default: all.

    Returns:
      `[...]` losses, of each sequence, in the type of `label_log_probs`.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: log-probabilities or rewards that are not floating point.

    Use it on a model that cross-entropy has trained already: samples of an untrained one have few
    rewards.

    Cost: the policy's forward and backward passes over the reference and over a sample, which it
    has to draw before.

    Example:
      >>> labels, sampled = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.25]))
      >>> loss = pcpg_loss(labels, sampled, jnp.array([1.0, 0.0]), weight=0.5)
      >>> print((loss / jnp.log(2)).round(3))
      2.5

    Reference: Luo, Yang, Shan, Chen, "Pseudo-Convolutional Policy Gradient for
    Sequence-to-Sequence Lip-Reading", 2020, arXiv:2003.03983.
    """
    check_interval(0, 1, weight=weight)
    check_floating(label_log_probs=label_log_probs, sampled_log_probs=sampled_log_probs)
    shape = jnp.shape(label_log_probs)
    if not shape or shape[:-1] != jnp.shape(sampled_log_probs)[:-1]:
        raise ValueError(
            "label_log_probs must have shape [..., U] with the leading axes of sampled_log_probs, "
            f"got {shape} and {jnp.shape(sampled_log_probs)}"
        )
    check_broadcastable(shape, label_where=label_where)
    dtype = compute_dtype(label_log_probs, sampled_log_probs)
    is_label = jnp.broadcast_to(True if label_where is None else label_where, shape)
    cross_entropy = -jnp.sum(jnp.asarray(label_log_probs, dtype), axis=-1, where=is_label)
    gradient_loss = pseudo_convolutional_policy_gradient_loss(
        jnp.asarray(sampled_log_probs, dtype),
        rewards,
        kernel_size=kernel_size,
        stride=stride,
        where=where,
    )
    losses = (1 - weight) * cross_entropy + weight * gradient_loss
    return losses.astype(jnp.result_type(label_log_probs))
