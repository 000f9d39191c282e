"""How a language model learns from what it wrote and from how that was judged.

A method is a function `loss(log_probs, entropy, batch) -> scalar` of a batch of rollouts, some for
each prompt, that stand one after the other:

    log_probs              log π of each token, [rows, length]
    entropy                of π at each token, without gradient, [rows, length]
    where                  the tokens that were written, [rows, length]
    old_log_probs          log π when they were written
    reference_log_probs    log π of the model at the start
    rewards                [rows]
    progress               the share of the rounds that lies behind, [rows]

They are chosen by `--config.align.method=NAME`. Keywords without a default are given by the
program.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from jaxref.core.reductions import masked_mean
from jaxref.data import down_sampling_schedule, group_relative_advantage
from jaxref.losses import (
    EntropyStats,
    clipped_policy_loss,
    d3s_policy_loss,
    entropy_temperature,
    f_dpo_loss,
    hapo_loss,
    kl_estimate,
    pseudo_convolutional_policy_gradient_loss,
    token_level_group_advantage,
)
from jaxref.losses.preference import Divergence
from jaxref.train.methods.frame import Batch


class Alignment(NamedTuple):
    """A way to learn from rewards.

    Attributes:
      loss: `loss(log_probs, entropy, batch)`, as above.
      temperature: `temperature(T, stats)`, a function of logits: what tokens are drawn at, given
        the entropies of the last round. Default: T.
    """

    loss: Callable[[Array, Array, Batch], Array]
    temperature: Callable[[float, EntropyStats | None], Partial] | None = None


def grpo(
    *,
    samples: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
    normalise_std: bool = True,
) -> Alignment:
    """Group relative policy optimization: rewards on the scale of their prompt's, clipped ratios,
    and β times the divergence from the model at the start; a mean over the rollouts' means.

    Args:
      samples: rollouts of each prompt, at least 1; given by the program.
      clip_low: how far a ratio of probabilities may fall below 1, at least 0. Default 0.2.
      clip_high: how far it may rise above 1, at least 0. Default 0.2.
      beta: β at least 0. Default 0.04; 0 leaves the divergence out.
      normalise_std: whether advantages are divided by the standard deviation of the prompt's
        rewards. Default: yes.

    Returns:
      The `Alignment`.
    """

    def loss(log_probs: Array, entropy: Array, batch: Batch) -> Array:
        del entropy
        where = batch["where"]
        advantages = _advantages(batch, samples, normalise_std)
        losses = clipped_policy_loss(
            log_probs,
            batch["old_log_probs"],
            advantages[:, None],
            clip_low=clip_low,
            clip_high=clip_high,
            where=where,
        )
        losses += beta * kl_estimate(log_probs, batch["reference_log_probs"], where=where)
        return jnp.mean(masked_mean(losses, axis=1, where=where))

    return Alignment(loss)


def hapo(
    *,
    samples: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 10.0,
    pivot: float = 0.8,
    clip_strength: float = 1.0,
    advantage_strength: float = 1.0,
    tau: float = 0.05,
) -> Alignment:
    """HAPO: temperature, advantages and clips of every token by its entropy (`hapo_loss`).

    Args:
      samples: rollouts of each prompt, at least 1; given by the program.
      clip_low: how far a ratio of probabilities may fall below 1, at least 0. Default 0.2.
      clip_high: how far it may rise above 1, at least 0. Default 0.2.
      dual_clip: the largest ratio that counts for negative advantages, above 1. Default 10; None
        for none.
      pivot: of the normalised entropy, as in `jaxref.losses.normalised_entropy`. Default 0.8.
      clip_strength: how much clips follow the entropy, at least 0. Default 1.
      advantage_strength: how much advantages do, in [0, 1]. Default 1.
      tau: the share by which temperatures do, in [0, 1). Default 0.05.

    Returns:
      The `Alignment`.
    """

    def loss(log_probs: Array, entropy: Array, batch: Batch) -> Array:
        where = batch["where"]
        advantages = token_level_group_advantage(
            batch["rewards"],
            _prompts(batch, samples),
            num_groups=len(batch["rewards"]) // samples,
            where=where,
        )
        losses = hapo_loss(
            log_probs,
            batch["old_log_probs"],
            advantages,
            entropy,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            pivot=pivot,
            clip_strength=clip_strength,
            advantage_strength=advantage_strength,
            where=where,
        )
        return masked_mean(losses, where=where)

    def temperature(base: float, stats: EntropyStats | None) -> Partial:
        return Partial(
            partial(entropy_temperature, tau=tau),
            temperature=jnp.float32(base),
            stats=stats,
        )

    return Alignment(loss, temperature)


def d3s(
    *,
    samples: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    first_share: float = 0.25,
    last_share: float = 1.0,
    first_token_share: float = 0.2,
    last_token_share: float = 1.0,
    sequence_ratio: bool = False,
) -> Alignment:
    """D³S: from a few rollouts and tokens that say most to, in the end, all of them
    (`d3s_policy_loss`).

    Args:
      samples: rollouts of each prompt, at least 1; given by the program.
      clip_low: how far a ratio of probabilities may fall below 1, at least 0. Default 0.2.
      clip_high: how far it may rise above 1, at least 0. Default 0.2.
      first_share, last_share: shares of the rollouts at the start and at the end, in (0, 1].
        Default a quarter, and all.
      first_token_share, last_token_share: likewise of the tokens. Default a fifth, and all.
      sequence_ratio: whether the ratio is one for all tokens of a rollout (GSPO), whose clips are
        far closer. Default: no.

    Returns:
      The `Alignment`.
    """

    def loss(log_probs: Array, entropy: Array, batch: Batch) -> Array:
        count = len(log_probs)
        num_samples, token_fraction = down_sampling_schedule(
            batch["progress"][0],
            initial=(max(1, round(first_share * count)), first_token_share),
            final=(max(1, round(last_share * count)), last_token_share),
        )
        losses, chosen = d3s_policy_loss(
            log_probs,
            batch["old_log_probs"],
            _advantages(batch, samples),
            entropy,
            num_samples=num_samples,
            token_fraction=token_fraction,
            clip_low=clip_low,
            clip_high=clip_high,
            sequence_ratio=sequence_ratio,
            where=batch["where"],
        )
        return masked_mean(losses, where=chosen)

    return Alignment(loss)


def pcpg(*, samples: int, kernel_size: int = 5, stride: int = 2) -> Alignment:
    """The policy gradient of windows of tokens (`pseudo_convolutional_policy_gradient_loss`), each
    of which is given the advantage of its rollout: there is one reward, for the whole.

    Args:
      samples: rollouts of each prompt, at least 1; given by the program.
      kernel_size: tokens of a window, at least 1. Default 5.
      stride: tokens from one window to the next, from 1 to `kernel_size`. Default 2.

    Returns:
      The `Alignment`.
    """

    def loss(log_probs: Array, entropy: Array, batch: Batch) -> Array:
        del entropy
        advantages = jnp.broadcast_to(_advantages(batch, samples)[:, None], log_probs.shape)
        losses = pseudo_convolutional_policy_gradient_loss(
            log_probs, advantages, kernel_size=kernel_size, stride=stride, where=batch["where"]
        )
        return jnp.mean(losses)

    return Alignment(loss)


def f_dpo(
    *,
    samples: int,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Alignment:
    """f-DPO on all pairs of a prompt's rollouts of which one has the higher reward
    (`f_dpo_loss`).

    Args:
      samples: rollouts of each prompt, at least 1; given by the program.
      beta: how dear the distance from the model at the start is, above 0. Default 0.1.
      divergence: "reverse_kl" (the default, DPO), "forward_kl", "jensen_shannon" or "alpha".
      alpha: of the last, in (0, 1). Default 1/2.
      label_smoothing: the share of pairs that are taken for mistaken, in [0, 1/2). Default 0.

    Returns:
      The `Alignment`.
    """

    def loss(log_probs: Array, entropy: Array, batch: Batch) -> Array:
        del entropy
        ours, reference = (
            jnp.sum(x, axis=1, where=batch["where"]).reshape(-1, samples, 1)
            for x in (log_probs, batch["reference_log_probs"])
        )
        rewards = batch["rewards"].reshape(-1, samples, 1)
        is_better = rewards > jnp.swapaxes(rewards, 1, 2)
        pairs = (
            jnp.broadcast_to(x, is_better.shape)
            for y in (ours, reference)
            for x in (y, jnp.swapaxes(y, 1, 2))
        )
        losses = f_dpo_loss(
            *pairs,
            beta=beta,
            divergence=divergence,
            alpha=alpha,
            label_smoothing=label_smoothing,
        )
        return masked_mean(losses, where=is_better)

    return Alignment(loss)


def dpo(*, samples: int, beta: float = 0.1, label_smoothing: float = 0.0) -> Alignment:
    """`f_dpo` with the reverse KL divergence.

    Args:
      samples, beta, label_smoothing: as for `f_dpo`.

    Returns:
      The `Alignment`.
    """
    return f_dpo(samples=samples, beta=beta, label_smoothing=label_smoothing)


def _prompts(batch: Batch, samples: int) -> Array:
    """The prompt that each rollout is of."""
    return jnp.arange(len(batch["rewards"])) // samples


def _advantages(batch: Batch, samples: int, normalise_std: bool = True) -> Array:
    return group_relative_advantage(
        batch["rewards"],
        _prompts(batch, samples),
        num_groups=len(batch["rewards"]) // samples,
        normalise_std=normalise_std,
    )
