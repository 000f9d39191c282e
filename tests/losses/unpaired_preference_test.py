from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import Mesh, PartitionSpec

from jaxref.losses.preference import f_dpo_loss
from jaxref.losses.unpaired_preference import kto_loss, nca_loss

expit = scipy.special.expit


def log_probs(seed=0, size=16):
    return np.random.default_rng(seed).normal(-20, 2, size=(4, size)).astype("f")


def literal_kto(arguments, labels, beta, desirable_weight, undesirable_weight, where):
    """One example after the other, as the authors' trainer has it."""
    policy, reference, policy_mismatched, reference_mismatched = np.float64(arguments)
    kl = max(0.0, np.mean((policy_mismatched - reference_mismatched)[where]))
    losses, slopes = np.zeros(len(labels)), np.zeros(len(labels))
    for i in np.nonzero(where)[0]:
        ratio = policy[i] - reference[i]
        if labels[i]:
            chosen = expit(beta * (ratio - kl))
            losses[i] = desirable_weight * (1 - chosen)
            slopes[i] = -desirable_weight * beta * chosen * (1 - chosen)
        else:
            rejected = expit(beta * (kl - ratio))
            losses[i] = undesirable_weight * (1 - rejected)
            slopes[i] = undesirable_weight * beta * rejected * (1 - rejected)
    return losses, slopes


class TestKTO:
    @pytest.mark.parametrize("shift", [-2, 2])
    def test_matches_the_authors_formula_sharded_or_not(self, shift):
        """With a reference point at 0 and above it, and examples that do not count."""
        policy, reference, *mismatched = log_probs()
        mismatched[0] += np.float32(shift)
        rng = np.random.default_rng(1)
        labels, where = rng.integers(2, size=16), rng.uniform(size=16) < 0.8
        weights = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
        arguments = (policy, reference, labels, *mismatched)
        expected, slopes = literal_kto(
            (policy, reference, *mismatched), labels, *weights.values(), where
        )
        above = np.mean((mismatched[0] - mismatched[1])[where]) > 0
        assert above == (shift > 0)
        loss = lambda *x, **options: kto_loss(*x[:5], where=x[5], **weights, **options)
        value, pull = jax.vjp(
            jax.jit(lambda *x: loss(x[0], x[1], labels, x[2], x[3], where)),
            policy,
            reference,
            *mismatched,
        )
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        gradients = pull(jnp.ones(16))
        np.testing.assert_allclose(gradients[0], slopes, rtol=1e-4)
        for other in gradients[1:]:
            np.testing.assert_array_equal(other, 0)
        rows = PartitionSpec("data")
        sharded = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=Mesh(np.array(jax.devices()), "data"),
            in_specs=rows,
            out_specs=rows,
        )
        np.testing.assert_allclose(jax.jit(sharded)(*arguments, where), expected, rtol=1e-4)

    def test_nothing_counts_far_impossible_and_half(self):
        policy, reference, *mismatched = log_probs()
        labels = np.arange(16) % 2
        loss = jax.jit(partial(kto_loss, beta=0.5))
        nothing = np.full(16, np.nan, "f")
        value, pull = jax.vjp(
            lambda x: kto_loss(x, nothing, labels, nothing, nothing, where=False), nothing
        )
        np.testing.assert_array_equal(value, 0)
        np.testing.assert_array_equal(pull(jnp.ones(16))[0], 0)
        same = loss(policy, policy, labels, policy, policy)
        np.testing.assert_allclose(same, 0.5)
        far = np.array([-1e4, 1e4, -np.inf, -1, -np.inf, -1] + [-1] * 10, "f")
        other = np.array([0, 0, -1, -np.inf, -np.inf, -1e4] + [-1] * 10, "f")
        for pair in ((mismatched[0], mismatched[0]), (far, other)):
            for kind in (np.zeros(16, int), np.ones(16, int)):
                value, pull = jax.vjp(
                    lambda x, pair=pair, kind=kind: loss(x, other, kind, *pair), far
                )
                assert np.all(np.isfinite(value) & np.isfinite(pull(jnp.ones(16))[0]))
        gain = loss(far, other, np.ones(16, int), mismatched[0], mismatched[0])
        np.testing.assert_allclose(gain[:6], [1, 0, 1, 0, 0.5, 0], atol=1e-6)
        half = [jnp.asarray(x, jnp.bfloat16) for x in (policy, reference, *mismatched)]
        assert kto_loss(*half[:2], labels, *half[2:]).dtype == jnp.bfloat16

    def test_bad_input(self):
        one = np.zeros(3, "f")
        with pytest.raises(ValueError, match="labels must be 0 or 1"):
            kto_loss(one, one, np.array([0, 1, 2]), one, one)
        with pytest.raises(ValueError, match="reference_mismatched must have shape"):
            kto_loss(one, one, np.array([0, 1, 1]), one, one[:2])
        with pytest.raises(ValueError, match="undesirable_weight must be in"):
            kto_loss(one, one, np.array([0, 1, 1]), one, one, undesirable_weight=-1)
        with pytest.raises(ValueError, match="beta must be in"):
            kto_loss(one, one, np.array([0, 1, 1]), one, one, beta=0)


class TestNCA:
    def test_matches_the_authors_formula(self):
        rng = np.random.default_rng(0)
        policy, reference = rng.normal(-20, 4, size=(2, 5, 4)).astype("f")
        wanted = scipy.special.softmax(rng.normal(size=(5, 4)), axis=1).astype("f")
        loss = jax.jit(partial(nca_loss, beta=0.3))
        value, pull = jax.vjp(loss, policy, reference, wanted)
        r = 0.3 * (np.float64(policy) - reference)
        expected = -np.mean(np.log(expit(-r)), axis=1) - np.sum(wanted * np.log(expit(r)), axis=1)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        slopes = pull(jnp.ones(5))
        literal = 0.3 * (expit(r) / 4 - wanted * expit(-r))
        np.testing.assert_allclose(slopes[0], literal, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(slopes[1], 0)
        pair = nca_loss(policy[:, :2].T, reference[:, :2].T, np.zeros(5, int), beta=0.3, axis=0)
        chosen, rejected = expit(r[:, :2].T)
        literal = -np.log(chosen) - 0.5 * np.log(1 - chosen) - 0.5 * np.log(1 - rejected)
        np.testing.assert_allclose(pair, literal, rtol=1e-5)

    def test_what_is_chosen_has_a_reward_of_its_own(self):
        """Of log 2: where both rewards are high, DPO asks for more of the chosen response and NCA
        for less; where both are low but far apart, DPO is content and NCA is not."""
        rewards = jnp.array([[5.0, 4.0], [-5.0, -12.0]])
        zeros = jnp.zeros_like(rewards)
        loss = partial(nca_loss, reference_log_probs=zeros, labels=jnp.zeros(2, int), beta=1.0)
        own = jax.grad(lambda r: jnp.sum(loss(r)))(rewards)[:, 0]
        pairs = lambda r: jnp.sum(f_dpo_loss(r[:, 0], r[:, 1], zeros[0], zeros[1], beta=1.0))
        compared = jax.grad(pairs)(rewards)[:, 0]
        assert own[0] > 0.4
        assert compared[0] < -0.2
        assert own[1] < -0.9
        assert compared[1] > -0.01

    def test_masked_impossible_and_half(self):
        policy = np.array([[-1, -2, np.nan], [-1, -np.inf, -3], [-5, -np.inf, 1e4]], "f")
        reference = np.array([[-1, -2, -np.inf], [-1, -np.inf, -3], [-np.inf, -4, -1e4]], "f")
        where = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
        loss = jax.jit(lambda x, y: nca_loss(x, y, np.array([0, 1, 2]), beta=1.0, where=where))
        value, pull = jax.vjp(loss, policy, reference)
        np.testing.assert_allclose(value[:2], 2 * np.log(2), rtol=1e-5)
        np.testing.assert_allclose(value[2], (1e9 + 2e4) / 3, rtol=1e-4)
        for slope in pull(jnp.ones(3)):
            assert np.all(np.isfinite(slope))
        assert nca_loss(policy[0], reference[0], 0, where=False) == 0
        assert np.isnan(nca_loss(policy[1], reference[1], 3))
        half = [jnp.asarray(x[:2], jnp.bfloat16) for x in (policy, reference)]
        assert nca_loss(*half, np.array([0, 0])).dtype == jnp.bfloat16

    def test_bad_input(self):
        one = np.zeros((2, 3), "f")
        with pytest.raises(ValueError, match="reference_log_probs must have shape"):
            nca_loss(one, one[:1], np.zeros(2, int))
        with pytest.raises(ValueError, match="labels must have shape"):
            nca_loss(one, one, np.zeros(3, int))
        with pytest.raises(ValueError, match="where must broadcast"):
            nca_loss(one, one, np.zeros(2, int), where=np.ones(2, bool))
