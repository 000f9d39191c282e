from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref.core.reductions import masked_mean
from jaxref.data.rollout_selection import group_relative_advantage
from jaxref.losses.policy import clipped_policy_loss, d3s_policy_loss, kl_estimate

clipped = jax.jit(clipped_policy_loss, static_argnames="dual_clip")
divergence = jax.jit(kl_estimate)
d3s = jax.jit(d3s_policy_loss, static_argnames="sequence_ratio")


def batch(seed=0, shape=(6, 5)):
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, size=shape)
    log_probs = old + rng.normal(0, 0.5, size=shape)
    where = rng.uniform(size=shape) < 0.8
    where[1] = False  # an empty response
    where[2] = np.arange(shape[1]) < 1  # of one token
    advantages, entropy = rng.normal(size=shape[0]), rng.exponential(size=shape)
    return *(x.astype("f") for x in (log_probs, old, advantages, entropy)), where


def literal_loss(log_prob, old, a, low, high, dual):
    ratio = np.exp(np.float64(log_prob) - old)
    loss = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    return min(loss, -dual * a) if dual and a < 0 else loss


class TestClipped:
    @pytest.mark.parametrize("dual", [None, 1.5])
    def test_loss_and_gradient_match_the_formula(self, dual):
        log_probs, old, a, entropy, where = batch()
        low, high = 0.1 + 0.1 * entropy, np.float32(0.3)
        value, pull = jax.vjp(
            lambda x: clipped(
                x, old, a[:, None], clip_low=low, clip_high=high, dual_clip=dual, where=where
            ),
            log_probs,
        )
        arguments = np.broadcast_arrays(old, a[:, None], low, high)
        points = [np.float64(log_probs) + step for step in (0, 1e-5, -1e-5)]
        expected, above, below = (
            np.array([literal_loss(*t, dual) for t in zip(x.flat, *(y.flat for y in arguments))])
            for x in points
        )
        mask = where.ravel()
        np.testing.assert_allclose(value.ravel(), np.where(mask, expected, 0), rtol=1e-5)
        slope = np.where(mask, (above - below) / 2e-5, 0)
        (found,) = pull(jnp.ones_like(value))
        np.testing.assert_allclose(found.ravel(), slope, rtol=1e-4, atol=1e-6)
        assert 0 < np.sum(slope[mask] == 0) < mask.sum()  # some are clipped, and some are not

    def test_first_step_is_the_policy_gradient(self):
        """Where the policy is the old one the loss is -A, and its gradient -A ∇ log π."""
        log_probs, _, a, _, _ = batch()
        value, pull = jax.vjp(lambda x: clipped(x, log_probs, a[:, None]), log_probs)
        expected = np.broadcast_to(-a[:, None], value.shape)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(pull(jnp.ones_like(value))[0], expected, rtol=1e-6)

    def test_only_log_probs_have_a_gradient(self):
        log_probs, old, a, _, _ = batch()
        total = lambda *arguments: clipped_policy_loss(*arguments).sum()
        slopes = jax.jit(jax.grad(total, (0, 1, 2)))(log_probs, old, a[:, None])
        assert np.any(slopes[0] != 0)
        for slope in slopes[1:]:
            np.testing.assert_array_equal(slope, 0)

    def test_far_policies_what_does_not_count_and_half_precision(self):
        log_probs = np.array([0, -1e4, 0, -1e4, np.nan, -np.inf], "f")
        old = np.array([-1e4, 0, -1e4, 0, 0, -np.inf], "f")
        a, where = np.array([1, 1, -1, -1, np.nan, 1], "f"), np.arange(6) < 4
        for dual in (None, 3.0):
            value, pull = jax.vjp(
                lambda x: clipped(x, old, a, dual_clip=dual, where=where), log_probs
            )
            value, slope = np.asarray(value), np.asarray(pull(jnp.ones(6))[0])
            assert np.all(np.isfinite(value) & np.isfinite(slope))
            np.testing.assert_allclose(value[[0, 1, 3, 4, 5]], [-1.2, 0, 0.8, 0, 0], rtol=1e-6)
            np.testing.assert_array_equal(slope[[0, 4, 5]], 0)
            assert value[2] == 3 if dual else value[2] > 1e20
        nothing = clipped(log_probs, old, a, where=False)
        np.testing.assert_array_equal(nothing, 0)
        half = clipped(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16), a[:2])
        assert half.dtype == jnp.bfloat16
        np.testing.assert_array_equal(half, [-1, -1])

    def test_bad_input(self):
        x = np.zeros((2, 3), "f")
        with pytest.raises(ValueError, match=r"dual_clip must be in \(1, inf\), got 1"):
            clipped_policy_loss(x, x, x, dual_clip=1.0)
        with pytest.raises(ValueError, match="clip_high must be in"):
            clipped_policy_loss(x, x, x, clip_high=-0.1)
        with pytest.raises(ValueError, match="old_log_probs must have shape"):
            clipped_policy_loss(x, x[0], x)
        with pytest.raises(ValueError, match="advantages must broadcast to shape"):
            clipped_policy_loss(x, x, x[:, 0])
        with pytest.raises(TypeError, match="log_probs must have a floating-point type"):
            clipped_policy_loss(np.zeros((2, 3), int), x, x)
        with pytest.raises(ValueError, match="reference_log_probs must have shape"):
            kl_estimate(x, x[0])
        with pytest.raises(ValueError, match=r"log_probs must have shape \[rollouts, length\]"):
            d3s_policy_loss(x[0], x[0], x[0], x[0], num_samples=1, token_fraction=1.0)
        with pytest.raises(ValueError, match="advantages must have shape"):
            d3s_policy_loss(x, x, x, x, num_samples=1, token_fraction=1.0)


class TestDivergence:
    def test_estimate_is_unbiased_positive_and_exact_near_zero(self):
        rng = np.random.default_rng(1)
        p, q = rng.dirichlet(np.ones(6), size=2).astype("f")
        found = divergence(np.log(p), np.log(q))
        assert np.all(found > 0)
        np.testing.assert_allclose(p @ found, p @ np.log(p / q), rtol=1e-4)
        d = np.array([0, 1e-6, -1e-3, 0.09, -0.11, 3, -20], "f")
        exact = np.expm1(np.float64(d)) - np.float64(d)
        exact[:3] = np.float64(d[:3]) ** 2 / 2 * (1 + np.float64(d[:3]) / 3)
        value, pull = jax.vjp(lambda x: divergence(x, d), np.zeros(7, "f"))
        np.testing.assert_allclose(value, exact, rtol=2e-5)
        np.testing.assert_allclose(
            pull(jnp.ones(7))[0], -np.expm1(np.float64(d)), rtol=1e-5, atol=1e-12
        )

    def test_far_and_excluded(self):
        far = np.array([0, -1e4, np.nan], "f")
        value, pull = jax.vjp(lambda x: divergence(x, far[[1, 0, 2]], where=np.arange(3) < 2), far)
        assert np.all(np.isfinite(value) & np.isfinite(pull(jnp.ones(3))[0]))
        np.testing.assert_allclose(value[::2], [1e4 - 1, 0], rtol=1e-6)


class TestD3S:
    def test_everything_is_grpo_and_less_is_its_best_tokens(self):
        log_probs, old, a, entropy, where = batch()
        plain = clipped(log_probs, old, a[:, None], where=where)
        losses, chosen = d3s(
            log_probs, old, a, entropy, num_samples=6, token_fraction=1.0, where=where
        )
        np.testing.assert_array_equal(chosen, where)
        np.testing.assert_array_equal(losses, plain)

        losses, chosen = d3s(
            log_probs, old, a, entropy, num_samples=2, token_fraction=0.3, where=where
        )
        present = np.array([0, 2, 3, 4, 5])
        pairs = [(i, j) for i in present for j in present if i < j]
        best = max(pairs, key=lambda pair: abs(a[pair[0]] - a[pair[1]]))
        score = np.where(where, np.abs(a)[:, None] * entropy, -1)
        score[np.setdiff1d(np.arange(6), best)] = -1
        count = int(np.ceil(0.3 * np.sum(score >= 0)))
        expected = score >= np.sort(score.ravel())[-count]
        np.testing.assert_array_equal(chosen, expected)
        np.testing.assert_array_equal(losses, np.where(expected, plain, 0))

    def test_sequence_ratio_is_that_of_gspo(self):
        """The mean over the tokens of a response is GSPO's loss of the response, and so is its
        gradient; each token's own is by its own probability alone."""
        log_probs, old, a, entropy, where = batch(2)

        def ours(x):
            options = {"num_samples": 6, "token_fraction": 1.0, "sequence_ratio": True}
            losses, chosen = d3s(x, old, a, entropy, where=where, **options)
            return masked_mean(losses, axis=1, where=chosen).sum(), losses

        def gspo(x):
            ratio = jnp.exp(masked_mean(x - old, axis=1, where=where))
            losses = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
            return jnp.where(where.any(axis=1), losses, 0).sum()

        (value, losses), slope = jax.jit(jax.value_and_grad(ours, has_aux=True))(log_probs)
        expected, expected_slope = jax.jit(jax.value_and_grad(gspo))(log_probs)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-6)
        assert np.any(slope != 0)
        for row, present in zip(losses, where):
            assert len(np.unique(row[present])) <= 1

    def test_without_a_difference_nothing_is_learned(self):
        log_probs, old, _, entropy, where = batch()
        a = group_relative_advantage(np.full(6, 0.3, "f"), np.zeros(6, int), num_groups=1)

        def total(x, where):
            losses, chosen = d3s(x, old, a, entropy, num_samples=4, token_fraction=0.5, where=where)
            return masked_mean(losses, where=chosen)

        for mask in (where, np.zeros_like(where)):
            value, slope = jax.value_and_grad(total)(log_probs, mask)
            assert value == 0
            np.testing.assert_array_equal(slope, 0)

    def test_eight_devices_choose_in_the_whole_batch(self):
        arguments = batch(3, shape=(16, 4))
        loss = lambda *x, axis_name=None: d3s_policy_loss(
            *x[:4], where=x[4], num_samples=5, token_fraction=0.5, axis_name=axis_name
        )
        sharded = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 5,
            out_specs=P("data"),
        )
        found, expected = (jax.jit(f)(*arguments) for f in (sharded, loss))
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        assert 0 < expected[1].sum() <= 10
