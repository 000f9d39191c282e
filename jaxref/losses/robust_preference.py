"""Preferences learned as revisions: policies that do not depend on where pairs came from (SRPO).

One policy writes a response and another one revises it, with the first response before its eyes;
one network can be both, with two prompts. The first is to leave little to be improved, the second
to improve what it can, both near a reference:

    min_π max_ρ E[p(y' > y) - β KL(ρ(·|y) || ρ_ref(·|y)) + β KL(π || π_ref)],   y ~ π, y' ~ ρ(·|y)

with p(y' > y) how probably y' is preferred. Written in log-ratios its solution satisfies one
equation for each pair of responses, whoever drew it; the loss is how far these are from holding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.losses.preference import log_ratio


class SRPOLogProbs(NamedTuple):
    """Log-probabilities of pairs of responses, `[...]` each: sums over their tokens, in nats.

    `chosen` and `rejected` are those of a response to the prompt, the others those of the first
    response as a revision of the second: to the prompt with the second response in it.

    Reference: Choi, Ahmadian, Geist, Pietquin, Azar, "Self-Improving Robust Preference
    Optimization", 2024, arXiv:2406.01660.
    """

    chosen: ArrayLike
    rejected: ArrayLike
    chosen_given_rejected: ArrayLike
    rejected_given_chosen: ArrayLike
    rejected_given_rejected: ArrayLike
    chosen_given_chosen: ArrayLike


def srpo_loss(
    policy: SRPOLogProbs,
    reference: SRPOLogProbs,
    *,
    beta: float = 0.1,
    mixing: float = 0.5,
    preference: ArrayLike = 1.0,
) -> Array:
    r"""How far two policies are from explaining a preference by an improvement (SRPO).

        L   = (1 - μ) L_π + μ L_ρ
        L_π = (p - 1/2 - β/2 (a(w|l) - a(l|w) + b(w) - b(l)))²
        L_ρ = (p - 1/2 - β (a(w|l) - a(l|l)))² + (p - 1/2 - β (a(w|w) - a(l|w)))²

    with a(y'|y) = log ρ(y'|y) - log ρ_ref(y'|y) of revisions, b(y) = log π(y) - log π_ref(y), and p
    how probably the chosen response w is preferred to the rejected one l. Without it a choice is
    taken as certain, p = 1: many choices together have their minimum where p has it.

    Args:
      policy: log π and log ρ of the two responses of each pair `[...]`, floating point.
      reference: the same by the references, without gradient.
      beta: β above 0, how dear the distance from the reference is. Default 0.1.
      mixing: μ in [0, 1]. 0 has only the loss of both policies, which does not determine them
        alone, 1 only that of the revisions. Default 1/2.
      preference: p in [0, 1], broadcastable to `[...]`. Default 1.

    Returns:
      `[...]` losses at least 0 in the type of `policy.chosen`; with p = 1 they are (1 + μ) / 4
      where the policies are the references, or the two responses are alike. A log-probability of
      -∞ counts as -1e9.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: log-probabilities that are not floating point.

    Use it where pairs come from other models than the one that is trained, or where answers are to
    be revised; `f_dpo_loss` is simpler for pairs that the reference could have drawn.

    Cost: six log-probabilities of a pair by the policy, and six by the reference, where
    `f_dpo_loss` takes two of each.

    Example:
      >>> same = SRPOLogProbs(*jnp.full((6, 1), -3.0))
      >>> print(srpo_loss(same, same, mixing=1.0))
      [0.5]

    Reference: Choi, Ahmadian, Geist, Pietquin, Azar, "Self-Improving Robust Preference
    Optimization", 2024, arXiv:2406.01660.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    check_interval(0, 1, mixing=mixing, preference=preference)
    shape = jnp.shape(policy.chosen)
    for name, group in (("policy", policy), ("reference", reference)):
        named = {f"{name}.{field}": x for field, x in group._asdict().items()}
        check_floating(**named)
        check_shape(shape, **named)
    check_broadcastable(shape, preference=preference)
    b_w, b_l, a_wl, a_lw, a_ll, a_ww = (
        log_ratio(policy=ours, reference=theirs) for ours, theirs in zip(policy, reference)
    )
    excess = jnp.asarray(preference, b_w.dtype) - 0.5
    losses = (1 - mixing) * jnp.square(excess - beta / 2 * (a_wl - a_lw + b_w - b_l))
    losses += mixing * jnp.square(excess - beta * (a_wl - a_ll))
    losses += mixing * jnp.square(excess - beta * (a_ww - a_lw))
    return losses.astype(jnp.result_type(policy.chosen))


def srpo_optimal_policies(
    preference: ArrayLike,
    reference: ArrayLike,
    conditional_reference: ArrayLike | None = None,
    *,
    beta: float = 0.1,
) -> tuple[Array, Array]:
    r"""The two policies that solve SRPO over finitely many responses.

        ρ(y'|y) = ρ_ref(y'|y) exp(p(y' > y) / β) / Z(y),   π(y) ∝ π_ref(y) / Z(y)

    with Z(y) the sum that makes ρ(·|y) a distribution: large where y can be improved much.

    Args:
      preference: p `[..., responses, responses]` floating point, in [0, 1]: how probably that of
        the row is preferred to that of the column; p and its transpose add up to 1.
      reference: π_ref `[..., responses]` floating point, summing to 1.
      conditional_reference: ρ_ref `[..., responses, responses]`, a distribution of revisions in
        each row, that of the response that is revised. Default: `reference`, whatever is revised.
      beta: β above 0. Default 0.1.

    Returns:
      π `[..., responses]` and ρ `[..., responses, responses]`, in its rows, in the type of
      `preference`, without gradient. What the reference finds impossible stays so.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: preferences or references that are not floating point.

    Use it to see what `srpo_loss` leads to.

    Cost: two passes over the `[responses, responses]` preferences.

    Example:
      >>> preference = jnp.array([[0.5, 1.0], [0.0, 0.5]])
      >>> policy, revision = srpo_optimal_policies(preference, jnp.full(2, 0.5), beta=1.0)
      >>> print(policy.round(3), revision[1].round(3))
      [0.622 0.378] [0.622 0.378]

    Reference: Choi, Ahmadian, Geist, Pietquin, Azar, "Self-Improving Robust Preference
    Optimization", 2024, arXiv:2406.01660.
    """
    check_interval(0, jnp.inf, closed="right", beta=beta)
    check_floating(preference=preference, reference=reference)
    check_interval(0, 1, preference=preference)
    shape = jnp.shape(reference)
    if not shape:
        raise ValueError("reference must have shape [..., responses], got ()")
    check_shape((*shape, shape[-1]), preference=preference)
    dtype = compute_dtype(preference, reference)
    first = jax.lax.stop_gradient(jnp.log(jnp.asarray(reference).astype(dtype)))
    second = first[..., None, :]
    if conditional_reference is not None:
        check_floating(conditional_reference=conditional_reference)
        check_shape((*shape, shape[-1]), conditional_reference=conditional_reference)
        second = jax.lax.stop_gradient(jnp.log(jnp.asarray(conditional_reference).astype(dtype)))
    p = jax.lax.stop_gradient(jnp.asarray(preference).astype(dtype))
    scores = second + jnp.swapaxes(p, -1, -2) / beta
    policy = jax.nn.softmax(first - jax.nn.logsumexp(scores, axis=-1), axis=-1)
    revision = jax.nn.softmax(scores, axis=-1)
    kind = jnp.result_type(preference)
    return policy.astype(kind), revision.astype(kind)


def revise(
    sample_fn: Callable[[Any, Any], Any], prompt: Any, *, num_revisions: int = 5
) -> list[Any]:
    r"""A response and its revisions, each made of the one before.

        y_0 ~ π(· | x),   y_{k+1} ~ ρ(· | y_k, x)

    Args:
      sample_fn: draws a response, of whatever kind, from a prompt and the response to revise; the
        latter is None at first. A sampler that needs keys draws them from an iterator of its own.
      prompt: x, handed on to `sample_fn`.
      num_revisions: at least 0. Default 5, the authors'.

    Returns:
      All `num_revisions + 1` responses in order; the last is the answer.

    Raises:
      ValueError: a negative `num_revisions`.

    Use it with a model that was trained by `srpo_loss`: policies of `f_dpo_loss` gain nothing from
    it. The loop is Python's and unrolls under jit.

    Cost: num_revisions + 1 generations, one after the other, each with the one before in its
    prompt.

    Example:
      >>> revise(lambda prompt, draft: prompt if draft is None else draft / 2, 8.0, num_revisions=2)
      [8.0, 4.0, 2.0]

    Reference: Choi, Ahmadian, Geist, Pietquin, Azar, "Self-Improving Robust Preference
    Optimization", 2024, arXiv:2406.01660.
    """
    check_interval(0, jnp.inf, num_revisions=num_revisions)
    drafts = [sample_fn(prompt, None)]
    for _ in range(num_revisions):
        drafts.append(sample_fn(prompt, drafts[-1]))
    return drafts
