import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref.data.rollout_selection import (
    down_sampling_schedule,
    group_relative_advantage,
    max_variance_subset,
    select_rollouts,
    select_tokens,
)

advantage = jax.jit(
    group_relative_advantage,
    static_argnames=("num_groups", "correction", "normalise_std", "epsilon"),
)
subset = jax.jit(max_variance_subset)
tokens = jax.jit(select_tokens)
of_groups = jax.jit(partial(select_rollouts, mode="group"), static_argnames="num_groups")


def literal_advantage(rewards, groups, weights, correction, epsilon):
    out = np.zeros(len(rewards))
    for g in set(groups):
        members = np.flatnonzero((groups == g) & (weights > 0))
        if len(members) == 0:
            continue
        r = np.repeat(np.float64(rewards[members]), weights[members])
        spread = np.std(r, ddof=correction) if len(r) > correction else 0.0
        out[members] = (rewards[members] - r.mean()) / (spread + epsilon)
    return out


def best_variance(values, size):
    return max(np.var(values[list(s)]) for s in itertools.combinations(range(len(values)), size))


class TestAdvantage:
    @pytest.mark.parametrize("correction", [0, 1])
    def test_matches_the_formula(self, correction):
        rng = np.random.default_rng(0)
        rewards, groups = rng.normal(5, 2, size=20).astype("f"), rng.integers(4, size=20)
        weights = rng.integers(4, size=20)
        for w in (None, weights):
            found = advantage(rewards, groups, num_groups=5, weights=w, correction=correction)
            expected = literal_advantage(
                rewards, groups, np.ones(20, int) if w is None else w, correction, 1e-6
            )
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_unbiased_variance_of_each_group_is_one(self):
        """As trl and verl have it: with the standard deviation of n - 1."""
        rewards = np.random.default_rng(1).normal(size=(3, 6)).astype("f")
        found = advantage(rewards.ravel(), np.repeat(np.arange(3), 6), num_groups=3)
        np.testing.assert_allclose(np.var(found.reshape(3, 6), axis=1, ddof=1), 1, rtol=1e-4)
        plain = advantage(
            rewards.ravel(), np.repeat(np.arange(3), 6), num_groups=3, normalise_std=False
        )
        expected = rewards - rewards.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(plain.reshape(3, 6), expected, rtol=1e-4, atol=1e-6)

    def test_groups_without_a_difference_have_none(self):
        """Exactly 0, though the mean of equal rewards is rounded; and so in a group of one."""
        rewards = np.array([0.1] * 7 + [1e4 + 0.3] * 3 + [0.7], "f")
        groups = np.array([0] * 7 + [1] * 3 + [2])
        for normalise_std in (True, False):
            found = advantage(rewards, groups, num_groups=3, normalise_std=normalise_std)
            np.testing.assert_array_equal(found, 0)
        slope = jax.grad(lambda r: advantage(r, groups, num_groups=3)[0])(rewards)
        np.testing.assert_array_equal(slope, 0)

    def test_unknown_groups_excluded_rollouts_and_half_precision(self):
        rewards = np.array([1, 2, np.nan, 5, 7, 9], "f")
        groups, weights = np.array([0, 0, 0, 1, -1, 2]), np.array([1, 1, 0, 1, 1, 1])
        found = advantage(rewards, groups, num_groups=2, weights=weights)
        np.testing.assert_allclose(found[:4], [-(0.5**0.5), 0.5**0.5, 0, 0], rtol=1e-5)
        assert np.all(np.isnan(found[4:]))
        half = advantage(jnp.array([1.0, 0.0], jnp.bfloat16), np.zeros(2, int), num_groups=1)
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype("f"), [0.707, -0.707], rtol=1e-2)


class TestSelection:
    @pytest.mark.claim("d3s")
    def test_the_chosen_rollouts_vary_most_and_come_from_prompts_that_teach(self):
        """The choice is the best of all subsets, whose unbiased variance is never below that of all
        rollouts; and where one prompt is half solved and others are solved by all or none, only
        rollouts of the one are chosen, half of each sign."""
        rng = np.random.default_rng(2)
        for n in (1, 4, 9):
            draws = [rng.normal(size=n), rng.exponential(size=n), rng.integers(3, size=n) - 5.0]
            for values, size in itertools.product(draws, range(1, n + 1)):
                values = values.astype("f")
                chosen = np.asarray(subset(values, size))
                assert chosen.sum() == size
                best = best_variance(np.float64(values), size)
                np.testing.assert_allclose(np.var(np.float64(values)[chosen]), best, atol=1e-5)
                if size > 1:
                    own = np.var(values[chosen], ddof=1)
                    assert own >= np.var(values, ddof=1) - 1e-5

        solved = np.repeat([[0.0], [1.0], [0.0], [1.0]], 6, axis=1).astype("f")
        solved[2, ::2] = 1
        a = advantage(solved.ravel(), np.repeat(np.arange(4), 6), num_groups=4)
        for size in (2, 4, 6):
            chosen = np.asarray(subset(a, size)).reshape(4, 6)
            np.testing.assert_array_equal(chosen.sum(axis=1), [0, 0, size, 0])
            assert np.sum(chosen & (solved == 1)) == size // 2

    def test_more_varied_rollouts_move_the_policy_more(self):
        """The gradient Σ A_i ∇ log π(y_i) / N of a softmax bandit is longer, on average, over the
        chosen rollouts than over as many random ones."""

        def norms(key):
            logits, actions, mask = jax.random.split(key, 3)
            z = jax.random.normal(logits, (8,))
            y = jax.random.categorical(actions, z, shape=(32,))
            a = group_relative_advantage((y < 2) * 1.0, jnp.zeros(32, int), num_groups=1)
            score = jax.nn.one_hot(y, 8) - jax.nn.softmax(z)
            random = jax.random.permutation(mask, 32) < 8
            return [
                jnp.linalg.norm(jnp.where(s, a, 0) @ score / 8)
                for s in (max_variance_subset(a, 8), random)
            ]

        chosen, random = jax.jit(jax.vmap(norms))(jax.random.split(jax.random.key(0), 100))
        assert jnp.mean(chosen) > 1.2 * jnp.mean(random)

    def test_groups_choose_their_own(self):
        rng = np.random.default_rng(3)
        values, groups = rng.normal(size=15).astype("f"), rng.permutation(np.repeat([0, 1, 2], 5))
        groups[4] = 7
        where = np.arange(15) != 2
        chosen = of_groups(values, 3, group_ids=groups, num_groups=3, where=where)
        expected = np.zeros(15, bool)
        for g in range(3):
            members = np.flatnonzero((groups == g) & where)
            expected[members] = subset(values[members], 3)
        np.testing.assert_array_equal(chosen, expected)

    def test_excluded_values_sizes_and_ties(self):
        values = np.array([np.nan, 3, 1, np.inf, 2, -1e4], "f")
        where = np.array([0, 1, 1, 0, 1, 1], bool)
        chosen = [np.flatnonzero(subset(values, size, where=where)) for size in (1, 2, 3, 4, 9)]
        assert len(chosen[0]) == 1
        np.testing.assert_array_equal(chosen[1], [1, 5])
        np.testing.assert_array_equal(chosen[2], [1, 4, 5])
        for everything in chosen[3:]:
            np.testing.assert_array_equal(everything, [1, 2, 4, 5])
        assert not np.any(subset(values, 3, where=np.zeros(6, bool)))
        assert subset(np.zeros(6, "f"), 4).sum() == 4
        np.testing.assert_array_equal(subset(np.array([1, 2, 3, 4], "f"), 1), [0, 0, 0, 1])

    def test_tokens_are_those_of_the_largest_scores(self):
        rng = np.random.default_rng(4)
        a, entropy = rng.normal(size=4).astype("f"), rng.exponential(size=(4, 10)).astype("f")
        where = rng.uniform(size=(4, 10)) < 0.7
        for fraction in (0.01, 0.3, 1.0):
            found = np.asarray(tokens(a, entropy, fraction=fraction, where=where))
            count = int(np.ceil(fraction * where.sum()))
            score = np.where(where, np.abs(a)[:, None] * entropy, -np.inf)
            expected = score >= np.sort(score.ravel())[-count]
            np.testing.assert_array_equal(found, expected)
        even = tokens(np.ones(5, "f"), np.ones((5, 10), "f"), fraction=0.3)
        np.testing.assert_array_equal(even.ravel(), np.arange(50) < 15)
        assert tokens(a[:1], entropy[:1], fraction=1e-5).sum() == 1
        assert not np.any(tokens(a, entropy, fraction=1.0, where=False))

    def test_eight_devices_choose_in_the_whole_batch(self):
        rng = np.random.default_rng(5)
        rewards, groups = rng.normal(size=24).astype("f"), rng.integers(3, size=24)
        entropy = rng.exponential(size=(24, 4)).astype("f")

        def choose(rewards, groups, entropy, axis_name=None):
            options = {"axis_name": axis_name}
            a = group_relative_advantage(rewards, groups, num_groups=3, **options)
            batch = select_rollouts(a, 7, where=rewards > -1, **options)
            grouped = select_rollouts(a, 3, mode="group", group_ids=groups, num_groups=3, **options)
            return (
                a,
                batch,
                grouped,
                select_tokens(a, entropy, fraction=0.3, where=batch[:, None], **options),
            )

        sharded = jax.shard_map(
            partial(choose, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 3,
            out_specs=P("data"),
        )
        found, expected = (jax.jit(f)(rewards, groups, entropy) for f in (sharded, choose))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
        for ours, whole in zip(found[1:], expected[1:]):
            np.testing.assert_array_equal(ours, whole)
        assert [int(x.sum()) for x in expected[1:]] == [7, 9, 9]


class TestSchedule:
    def test_goes_in_a_line_from_end_to_end_within_jit(self):
        @jax.jit
        def chosen(progress):
            size, fraction = down_sampling_schedule(progress, initial=(4, 0.2), final=(20, 1.0))
            return size, fraction, max_variance_subset(jnp.arange(20.0), size).sum()

        for progress, size, fraction in ((0.0, 4, 0.2), (0.25, 8, 0.4), (0.5, 12, 0.6), (1, 20, 1)):
            found = chosen(progress)
            assert found[0] == found[2] == size
            np.testing.assert_allclose(found[1], fraction, rtol=1e-6)


def test_bad_input():
    one, ids = np.ones(4, "f"), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"size must be in \[1, inf\), got 0"):
        max_variance_subset(one, 0)
    with pytest.raises(TypeError, match="size must be integer, got float"):
        max_variance_subset(one, 2.5)
    with pytest.raises(ValueError, match="values must have one axis, got shape"):
        max_variance_subset(one[None], 2)
    with pytest.raises(ValueError, match="mode must be 'batch' or 'group', got 'prompt'"):
        select_rollouts(one, 2, mode="prompt")
    with pytest.raises(ValueError, match="group_ids and num_groups must be given"):
        select_rollouts(one, 2, mode="group", group_ids=ids)
    with pytest.raises(TypeError, match="group_ids must be integer, got float32"):
        group_relative_advantage(one, one, num_groups=1)
    with pytest.raises(ValueError, match="group_ids must have shape"):
        group_relative_advantage(one, ids[:2], num_groups=1)
    with pytest.raises(TypeError, match="rewards must have a floating-point type"):
        group_relative_advantage(ids, ids, num_groups=1)
    with pytest.raises(ValueError, match="epsilon must be in"):
        group_relative_advantage(one, ids, num_groups=1, epsilon=0)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        select_tokens(one, np.ones((4, 2), "f"), fraction=0)
    with pytest.raises(ValueError, match=r"entropy must have shape \[rollouts, length\]"):
        select_tokens(one, one, fraction=0.5)
    with pytest.raises(ValueError, match="rollouts must be in"):
        down_sampling_schedule(0.5, initial=(0, 0.2), final=(4, 1.0))
    with pytest.raises(ValueError, match="progress must be in"):
        down_sampling_schedule(1.5, initial=(1, 0.2), final=(4, 1.0))
