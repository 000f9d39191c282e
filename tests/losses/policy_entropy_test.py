from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref.data.rollout_selection import group_relative_advantage
from jaxref.losses.policy import clipped_policy_loss
from jaxref.losses.policy_entropy import (
    EntropyStats,
    entropy_temperature,
    hapo_loss,
    normalised_entropy,
    token_level_group_advantage,
)

normalised = jax.jit(normalised_entropy, static_argnames="pivot")
temperatures = jax.jit(entropy_temperature, static_argnames="tau")
of_tokens = jax.jit(
    token_level_group_advantage, static_argnames=("num_groups", "normalise_std", "fallback")
)
hapo = jax.jit(
    hapo_loss, static_argnames=("dual_clip", "pivot", "clip_strength", "advantage_strength")
)


def batch(seed=0, shape=(6, 8)):
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, size=shape)
    log_probs = old + rng.normal(0, 0.3, size=shape)
    entropy = np.exp(rng.normal(-2, 2, size=shape))
    where = rng.uniform(size=shape) < 0.8
    where[1] = False  # an empty response
    where[2] = np.arange(shape[1]) < 1  # of one token
    a = rng.normal(size=shape)
    return *(x.astype("f") for x in (log_probs, old, a, entropy)), where


def literal_h(entropy, where, pivot):
    """As released, with the sign of negative h as in the paper."""
    e = np.log(np.maximum(np.float64(entropy), 1e-8))
    ordered = np.sort(e[where])
    z = e - ordered[round(pivot * (len(ordered) - 1))]
    z /= max(np.sqrt(np.mean(z[where] ** 2)), 1e-4)
    z[~where] = 0
    return np.where(z > 0, z / max(z.max(), 1e-8), z / max(-z.min(), 1e-8))


def literal_hapo(log_probs, old, a, h, low, high, dual, alpha=1.0, beta=1.0):
    losses = np.zeros(h.shape)
    for t in np.ndindex(h.shape):
        below = low * (1 - alpha * h[t]) if h[t] <= 0 else low
        above = high * (1 + alpha * h[t]) if h[t] > 0 else high
        ratio = np.exp(np.float64(log_probs[t]) - old[t])
        inside = 1 - below / 2 < ratio < 1 + above / 2
        changed = inside if h[t] <= 0 else not inside
        own = a[t] * (1 + beta * h[t]) if changed else a[t]
        losses[t] = max(-own * ratio, -own * np.clip(ratio, 1 - below, 1 + above))
        if own < 0:
            losses[t] = min(losses[t], -dual * own)
    return losses


class TestEntropy:
    @pytest.mark.parametrize("pivot", [0.0, 0.5, 0.8, 1.0])
    def test_matches_the_release(self, pivot):
        *_, entropy, where = batch()
        found, stats = normalised(entropy, pivot=pivot, where=where)
        expected = literal_h(entropy, where, pivot)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        again, same = normalised(np.where(where, entropy, np.nan), stats=stats, where=where)
        np.testing.assert_array_equal(again, found)
        assert same == stats

    def test_equal_single_zero_and_no_entropies(self):
        for entropy in (np.ones(4), np.ones(1), np.zeros(3)):
            h, stats = normalised(entropy.astype("f"))
            np.testing.assert_array_equal(h, 0)
            assert stats.above == stats.below == 1
        h, stats = normalised(np.ones(4, "f"), where=False)
        np.testing.assert_array_equal(h, 0)
        assert tuple(stats) == (0, 1, 1)
        half, _ = normalised(jnp.array([0.0, 1e-3, 4.0], jnp.bfloat16), pivot=0.5)
        np.testing.assert_array_equal(half, [-1, 0, 1])

    def test_temperature_follows_the_entropy(self):
        rng = np.random.default_rng(1)
        logits = (rng.normal(size=(40, 9)) * rng.uniform(0, 6, size=(40, 1))).astype("f")
        logits[:, 0], logits[0] = -np.inf, [0] + [-np.inf] * 8
        logits[1] = 1e4
        p = np.exp(np.float64(logits) - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
        stats = EntropyStats(*(jnp.float32(x) for x in (-0.5, 1.0, 2.0)))
        h = np.log(np.maximum(entropy, 1e-8)) + 0.5
        h = np.clip(np.where(h > 0, h, h / 2), -1, 1)
        found = temperatures(logits, 0.8, stats, tau=0.1)
        np.testing.assert_allclose(found, 0.8 * (1 + 0.1 * h), rtol=1e-5)
        moved = entropy_temperature(logits.T, np.full(40, 0.8), stats, tau=0.1, axis=0)
        np.testing.assert_allclose(moved, found, rtol=1e-5)
        np.testing.assert_array_equal(temperatures(logits, 0.8), np.full(40, 0.8, "f"))


class TestAdvantage:
    def test_matches_the_release_with_its_fallback(self):
        """Group 2 has one wrong token among forty right ones, whose advantage is above 5."""
        rewards = np.array([1, 0, 0, 1, 0, 2.5, 1, 0, 3], "f")
        groups = np.array([0, 0, 0, 1, 1, 1, 2, 2, 5])
        lengths = np.array([3, 9, 20, 20, 0, 7, 39, 1, 4])
        where = np.arange(40) < lengths[:, None]
        found = of_tokens(rewards, groups, num_groups=3, where=where)
        never = of_tokens(rewards, groups, num_groups=3, where=where, fallback=np.inf)
        for g in range(3):
            members = groups == g
            r = np.repeat(np.float64(rewards[members]), lengths[members])
            expected = (rewards[members] - r.mean()) / (r.std() + 1e-6)
            expected = np.where(where[members], expected[:, None], 0)
            np.testing.assert_allclose(never[members], expected, rtol=1e-4)
            if np.abs(expected).max() >= 5:
                own = rewards[members]
                expected = np.where(
                    where[members], ((own - own.mean()) / (own.std(ddof=1) + 1e-6))[:, None], 0
                )
            np.testing.assert_allclose(found[members], expected, rtol=1e-4)
        assert np.abs(never[7, 0]) > 5 > np.abs(found[7, 0])
        assert np.all(np.isnan(found[8, :4]))
        np.testing.assert_array_equal(found[8, 4:], 0)

    def test_equal_rewards_and_empty_groups_have_none(self):
        rewards, groups = np.array([0.1, 0.1, 0.7], "f"), np.array([0, 0, 1])
        where = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
        for normalise_std in (True, False):
            found = of_tokens(
                rewards, groups, num_groups=2, where=where, normalise_std=normalise_std
            )
            np.testing.assert_array_equal(found, 0)


class TestLoss:
    def test_loss_and_gradient_match_the_release(self):
        log_probs, old, a, entropy, where = batch()
        log_probs = np.where(where, log_probs, np.nan)
        options = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.3}
        value, pull = jax.vjp(
            lambda x: hapo(x, old, a, entropy, pivot=0.6, where=where, **options), log_probs
        )
        h = literal_h(entropy, where, 0.6)
        expected, above, below = (
            np.where(where, literal_hapo(np.float64(log_probs) + d, old, a, h, 0.2, 0.3, 1.3), 0)
            for d in (0, 1e-6, -1e-6)
        )
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
        (slope,) = pull(jnp.ones_like(value))
        np.testing.assert_allclose(slope, (above - below) / 2e-6, rtol=1e-3, atol=1e-4)

    @pytest.mark.claim("hapo")
    def test_tokens_are_treated_by_their_entropy(self):
        """h spans -1 to 1 and does not change under powers of the entropy; a prompt's token
        advantages add up to 0, as those of its responses do not. At h = -1 a token teaches nothing
        where the policy has not moved and may be unlearned twice as far; at h = 1 it teaches twice
        as much where it has, and may be learned twice as far. Temperatures stay within τ."""
        *_, entropy, where = batch(3)
        where[4, 2:] = False
        h, _ = normalised(entropy, where=where)
        assert h.min() == -1
        assert h.max() == 1
        np.testing.assert_allclose(
            normalised(entropy**0.5, where=where)[0], h, rtol=1e-4, atol=1e-5
        )
        logits = 9 * np.random.default_rng(4).normal(size=(50, 7)).astype("f")
        _, stats = normalised(np.exp(np.linspace(-6, -1, 11)).astype("f"))
        heated = temperatures(logits, 1.0, stats, tau=0.05)
        np.testing.assert_allclose([heated.min(), heated.max()], [0.95, 1.05], rtol=1e-6)
        assert len(np.unique(heated)) > 10

        rewards, groups = np.array([1, 0, 0, 1, 1, 0], "f"), np.array([0, 0, 0, 1, 1, 1])
        a = of_tokens(rewards, groups, num_groups=2, where=where)
        by_prompt = np.asarray(a).reshape(2, -1).sum(axis=1)
        np.testing.assert_allclose(by_prompt, 0, atol=1e-4)
        plain = group_relative_advantage(rewards, groups, num_groups=2)[:, None] * where
        assert np.all(np.abs(np.asarray(plain).reshape(2, -1).sum(axis=1)) > 1)

        # the ends of the scale, in every state of the policy
        ratio = np.array([0.55, 0.65, 0.75, 0.95, 1.05, 1.15, 1.35, 1.45], "f")
        x = np.log(np.stack([ratio, ratio, np.ones(8)])).astype("f")
        ends = np.repeat([[0.01], [1.0], [0.1]], 8, axis=1).astype("f")

        def slopes(sign):
            # as shares of those without clips
            total = lambda x: hapo(x, np.zeros((3, 8)), sign, ends, pivot=0.5).sum()
            return -sign * jax.grad(total)(x)[:2] / ratio

        good, bad = slopes(1.0), slopes(-1.0)
        np.testing.assert_allclose(good[0], [1, 1, 1, 0, 0, 1, 0, 0], atol=1e-5)
        np.testing.assert_allclose(good[1], [2, 2, 2, 1, 1, 1, 2, 0], rtol=1e-5)
        np.testing.assert_allclose(bad[0], [0, 1, 1, 0, 0, 1, 1, 1], atol=1e-5)
        np.testing.assert_allclose(bad[1], [0, 0, 0, 1, 1, 1, 2, 2], rtol=1e-5)

    def test_without_strength_it_is_the_clipped_loss(self):
        log_probs, old, a, entropy, where = batch()
        found = hapo(
            log_probs, old, a, entropy, clip_strength=0.0, advantage_strength=0.0, where=where
        )
        plain = clipped_policy_loss(log_probs, old, a, dual_clip=10.0, where=where)
        np.testing.assert_allclose(found, plain, rtol=1e-6)
        assert np.any(found != hapo(log_probs, old, a, entropy, where=where))

    def test_far_policies_empty_batches_and_half_precision(self):
        log_probs = np.array([0, -1e4, 0, -1e4], "f")
        old, a = log_probs[::-1].copy(), np.array([1, 1, -1, -1], "f")
        entropy = np.array([0, 1e4, 1, 2], "f")
        for where in (True, False):
            value, pull = jax.vjp(lambda x: hapo(x, old, a, entropy, where=where), log_probs)
            (slope,) = pull(jnp.ones(4))
            assert np.all(np.isfinite(value) & np.isfinite(slope))
        np.testing.assert_array_equal(value, 0)
        total = lambda *x: hapo_loss(*x).sum()
        others = jax.jit(jax.grad(total, (1, 2, 3)))(log_probs, old, a, entropy)
        for slope in others:
            np.testing.assert_array_equal(slope, 0)
        half = hapo(*(jnp.asarray(x, jnp.bfloat16) for x in (old, old, a, entropy)))
        assert half.dtype == jnp.bfloat16

    def test_eight_devices_have_one_scale(self):
        log_probs, old, _, entropy, where = batch(5, shape=(16, 4))
        rng = np.random.default_rng(6)
        rewards, groups = rng.normal(size=16).astype("f"), rng.integers(3, size=16)

        def loss(log_probs, old, entropy, where, rewards, groups, axis_name=None):
            options = {"where": where, "axis_name": axis_name}
            a = token_level_group_advantage(rewards, groups, num_groups=3, **options)
            return hapo_loss(log_probs, old, a, entropy, **options)

        sharded = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 6,
            out_specs=P("data"),
        )
        arguments = log_probs, old, entropy, where, rewards, groups
        found, expected = (jax.jit(f)(*arguments) for f in (sharded, loss))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_bad_input(self):
        x = np.ones((2, 3), "f")
        with pytest.raises(ValueError, match=r"pivot must be in \[0, 1\], got 1.5"):
            hapo_loss(x, x, x, x, pivot=1.5)
        with pytest.raises(ValueError, match=r"dual_clip must be in \(1, inf\), got 1"):
            hapo_loss(x, x, x, x, dual_clip=1.0)
        with pytest.raises(ValueError, match=r"advantage_strength must be in \[0, 1\], got 2"):
            hapo_loss(x, x, x, x, advantage_strength=2.0)
        with pytest.raises(ValueError, match="entropy must have shape"):
            hapo_loss(x, x, x, x[0])
        with pytest.raises(TypeError, match="entropy must have a floating-point type"):
            normalised_entropy(np.ones(3, int))
        with pytest.raises(ValueError, match=r"tau must be in \[0, 1\), got 1"):
            entropy_temperature(x, 1.0, tau=1.0)
        with pytest.raises(ValueError, match="temperature must be in"):
            entropy_temperature(x, 0.0)
        options = {"num_groups": 1, "where": np.ones((2, 3), bool)}
        with pytest.raises(ValueError, match="fallback must be in"):
            token_level_group_advantage(x[:, 0], np.zeros(2, int), fallback=0, **options)
        with pytest.raises(ValueError, match="rewards must have shape"):
            token_level_group_advantage(x[0], np.zeros(3, int), **options)
