from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxref.losses.process_reward import (
    implicit_reward_cross_entropy,
    implicit_step_rewards,
    implicit_token_rewards,
    response_score,
)

VOCABULARY, LENGTH = 3, 4
PREFIXES = (VOCABULARY**LENGTH - 1) // (VOCABULARY - 1)
RESPONSES = np.array(list(np.ndindex(*(VOCABULARY,) * LENGTH)))
"""All responses of four tokens out of three, in the order of a tree's leaves."""


def prefix_ids(responses):
    """The node of a tree of prefixes at which each token is chosen, level after level."""
    ids = np.zeros(responses.shape, int)
    for t in range(1, LENGTH):
        ids[:, t] = VOCABULARY * ids[:, t - 1] + 1 + responses[:, t - 1]
    return ids


NODES = prefix_ids(RESPONSES)


def token_log_probs(table):
    """log π(y_t | y_<t) `[responses, length]` by a table of logits `[prefixes, vocabulary]`."""
    return jax.nn.log_softmax(table)[NODES, RESPONSES]


def soft_values(rewards, reference, beta):
    """β log E_ref[exp(r / β) | y_≤t] of all prefixes `[responses, length]`, by enumeration."""
    weights = np.exp(np.sum(reference, axis=1))
    values = np.zeros(RESPONSES.shape)
    for i, response in enumerate(RESPONSES):
        for t in range(LENGTH):
            same = np.all(RESPONSES[:, : t + 1] == response[: t + 1], axis=1)
            share = weights[same] / weights[same].sum()
            values[i, t] = beta * scipy.special.logsumexp(rewards[same] / beta, b=share)
    return values


def random_policies():
    tables = np.random.default_rng(0).normal(size=(2, PREFIXES, VOCABULARY))
    return [np.float64(token_log_probs(table)) for table in tables]


class TestRewards:
    def test_values_are_those_of_the_best_that_can_follow(self):
        """By enumeration of all ends of all prefixes; steps add up however they are cut."""
        policy, reference = random_policies()
        rewards = implicit_token_rewards(policy.astype("f"), reference.astype("f"), beta=0.3)
        np.testing.assert_allclose(rewards, 0.3 * (policy - reference), rtol=1e-4, atol=1e-6)
        outcomes = 0.3 * np.sum(policy - reference, axis=1)
        values = implicit_step_rewards(rewards, mode="accumulated")
        np.testing.assert_allclose(values, soft_values(outcomes, reference, 0.3), atol=1e-5)
        np.testing.assert_allclose(implicit_step_rewards(rewards), rewards, atol=1e-6)
        halves = implicit_step_rewards(rewards, np.full((81, 2), [1, 3]))
        np.testing.assert_allclose(halves, np.add.reduceat(rewards, [0, 2], axis=1), atol=1e-6)

    def test_values_go_from_the_best_outcome_to_the_mean_as_beta_grows(self):
        """Of policies that are best for the same outcome rewards, near the same reference."""
        rng = np.random.default_rng(1)
        _, reference = random_policies()
        outcomes = rng.normal(size=81)
        weights = np.exp(reference.sum(axis=1))
        for beta, expected in ((0.01, np.max), (100.0, partial(np.average, weights=weights[:27]))):
            joint = np.log(weights) + outcomes / beta
            total = [scipy.special.logsumexp(joint)]
            for t in range(LENGTH):
                sums = scipy.special.logsumexp(joint.reshape(VOCABULARY ** (t + 1), -1), axis=1)
                total.append(np.repeat(sums, VOCABULARY ** (LENGTH - t - 1)))
            policy = np.diff(np.broadcast_arrays(*total), axis=0).T
            rewards = implicit_token_rewards(policy.astype("f"), reference.astype("f"), beta=beta)
            values = implicit_step_rewards(rewards, mode="accumulated")
            offset = beta * scipy.special.logsumexp(outcomes / beta, b=weights)
            np.testing.assert_allclose(values[:, -1] + offset, outcomes, atol=1e-2)
            np.testing.assert_allclose(values[0, 0] + offset, expected(outcomes[:27]), atol=0.05)

    def test_steps_and_scores_of_padded_responses(self):
        rewards = np.array([[1, 2, -4, 1, 9], [3, -1, 0, np.nan, np.nan]], "f")
        where = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
        ends = np.array([[1, 3, -1], [4, -1, -1]])
        single = implicit_step_rewards(rewards, ends, where=where)
        np.testing.assert_array_equal(single, [[3, -3, 0], [2, 0, 0]])
        together = implicit_step_rewards(rewards, ends, mode="accumulated", where=where)
        np.testing.assert_array_equal(together, [[3, 0, 0], [2, 0, 0]])
        exists = ends >= 0
        np.testing.assert_array_equal(response_score(single, where=exists), [-3, 2])
        np.testing.assert_array_equal(response_score(single, reduction="sum", where=exists), [0, 2])
        np.testing.assert_array_equal(
            response_score(single.T, reduction="mean", axis=0, where=exists.T), [0, 2]
        )
        for reduction in ("min", "sum", "mean"):
            assert response_score(single[0], reduction=reduction, where=False) == 0
        assert np.isnan(implicit_step_rewards(rewards[0], np.array([5]))).all()
        assert np.isnan(implicit_step_rewards(rewards[0], np.array([-2]))).all()

    def test_judges_without_a_reference(self):
        policy, _ = random_policies()
        rewards = implicit_token_rewards(policy.astype("f"), None, beta=2.0)
        np.testing.assert_allclose(rewards, 2 * policy, rtol=1e-6)


class TestCrossEntropy:
    def test_matches_the_formula(self):
        rng = np.random.default_rng(0)
        policy, reference = rng.normal(-20, 5, size=(2, 6)).astype("f")
        labels = np.array([1, 0, 1, 0, 0.3, 0.8], "f")
        loss = jax.jit(partial(implicit_reward_cross_entropy, beta=0.2))
        value, pull = jax.vjp(loss, policy, reference, labels)
        sigmoid = scipy.special.expit(0.2 * (np.float64(policy) - reference))
        literal = -labels * np.log(sigmoid) - (1 - labels) * np.log(1 - sigmoid)
        np.testing.assert_allclose(value, literal, rtol=1e-5)
        to_policy, to_reference, _ = pull(jnp.ones(6))
        np.testing.assert_allclose(to_policy, 0.2 * (sigmoid - labels), rtol=1e-4)
        np.testing.assert_array_equal(to_reference, 0)
        np.testing.assert_allclose(loss(policy, policy, labels), np.log(2), rtol=1e-6)

    @pytest.mark.claim("implicit-process-reward")
    def test_labels_of_answers_teach_where_a_response_goes_wrong(self):
        """A table of four steps, where one wrong step spoils the answer, trained on whether answers
        are right: the first wrong step has the least reward in all 65 responses that end wrong,
        what comes after it next to none, and the values are those of what can follow."""
        rng = np.random.default_rng(2)
        right = rng.integers(2, size=(PREFIXES, VOCABULARY)) > 0
        right[np.arange(PREFIXES), rng.integers(VOCABULARY, size=PREFIXES)] = True
        good = right[NODES, RESPONSES]
        labels = good.all(axis=1)
        reference = token_log_probs(jnp.zeros((PREFIXES, VOCABULARY)))

        @jax.jit
        def trained():
            def loss(table):
                log_probs = jnp.sum(token_log_probs(table), axis=1)
                known = jnp.sum(reference, axis=1)
                return jnp.sum(implicit_reward_cross_entropy(log_probs, known, labels, beta=0.5))

            step = lambda _, table: table - 0.5 * jax.grad(loss)(table)
            zeros = jnp.zeros((PREFIXES, VOCABULARY))
            policy = token_log_probs(jax.lax.fori_loop(0, 500, step, zeros))
            return implicit_token_rewards(policy, reference, beta=0.5)

        rewards = trained()
        steps = implicit_step_rewards(rewards)[~labels]
        first = np.argmin(good[~labels], axis=1)
        assert 20 < len(first) < 81
        assert len(set(first)) == LENGTH
        np.testing.assert_array_equal(np.argmin(steps, axis=1), first)
        later = np.arange(LENGTH) > first[:, None]
        np.testing.assert_allclose(np.asarray(steps)[later], 0, atol=1e-4)
        scores = response_score(implicit_step_rewards(rewards))
        assert scores[labels].min() > scores[~labels].max() + 0.5
        values = implicit_step_rewards(rewards, mode="accumulated")
        outcomes = np.float64(values[:, -1])
        np.testing.assert_allclose(values, soft_values(outcomes, reference, 0.5), atol=1e-4)


class TestEdges:
    def test_empty_alike_impossible_and_half(self):
        """Of a response without tokens, one that is as likely as in the reference, one token, and
        probabilities of 0 and nearly 0."""
        policy = np.array([[np.nan, -3], [-2, -4], [-1, 0], [-1, -2], [-np.inf, -1], [-np.inf, -1]])
        reference = np.array(
            [[-np.inf, np.nan], [-2, -4], [-1e4, 0], [-np.inf, -2], [-np.inf, -1], [-2, -1]]
        )
        where = np.array([[0, 0], [1, 1], [1, 0], [1, 1], [1, 1], [1, 1]], bool)

        @jax.jit
        def of_tokens(policy, reference, labels):
            policy, reference = (jnp.sum(x, axis=1, where=where) for x in (policy, reference))
            return implicit_reward_cross_entropy(policy, reference, labels, beta=0.5)

        for labels in (np.zeros(6), np.ones(6)):
            value, pull = jax.vjp(of_tokens, policy.astype("f"), reference.astype("f"), labels)
            log_2 = np.log(2)
            wrong = [log_2, log_2, 4999.5, 5e8, log_2, 0]
            good = [log_2, log_2, 0, 0, log_2, 5e8]
            np.testing.assert_allclose(value, good if labels[0] else wrong, rtol=1e-5)
            for slope in pull(jnp.ones(6))[:2]:
                assert np.all(np.isfinite(slope))
        token = jax.jit(partial(implicit_token_rewards, beta=0.5, where=where))
        rewards, pull = jax.vjp(token, policy.astype("f"), reference.astype("f"))
        expected = [[0, 0], [0, 0], [4999.5, 0], [5e8, 0], [0, 0], [-5e8, 0]]
        np.testing.assert_allclose(rewards, expected, rtol=1e-5)
        for slope in pull(jnp.ones((6, 2))):
            assert np.all(np.isfinite(slope))
        half = [jnp.asarray(x[1:3], jnp.bfloat16) for x in (policy, reference)]
        found = implicit_token_rewards(*half)
        assert found.dtype == jnp.bfloat16
        assert implicit_step_rewards(found).dtype == jnp.bfloat16
        assert response_score(found).dtype == jnp.bfloat16
        assert implicit_reward_cross_entropy(*half, np.ones((2, 2))).dtype == jnp.bfloat16

    def test_examples_that_do_not_count(self):
        policy, one = np.array([np.nan, -1], "f"), np.ones(2, "f")
        loss = partial(implicit_reward_cross_entropy, where=np.array([False, True]))
        value, pull = jax.vjp(lambda x: loss(x, -one, one), policy)
        np.testing.assert_allclose(value, [0, np.log(2)], rtol=1e-6)
        np.testing.assert_allclose(pull(jnp.ones(2))[0], [0, -0.025], rtol=1e-5)

    def test_bad_input(self):
        one = np.zeros(3, "f")
        with pytest.raises(ValueError, match=r"beta must be in \(0, inf\), got 0"):
            implicit_token_rewards(one, one, beta=0)
        with pytest.raises(ValueError, match="reference_log_probs must have shape"):
            implicit_token_rewards(one, one[:2])
        with pytest.raises(TypeError, match="policy_log_probs must have a floating-point type"):
            implicit_token_rewards(np.zeros(3, int), one)
        with pytest.raises(ValueError, match=r"labels must be in \[0, 1\]"):
            implicit_reward_cross_entropy(one, one, np.array([0, 1, 2]))
        with pytest.raises(ValueError, match="labels must have shape"):
            implicit_reward_cross_entropy(one, one, one[:2])
        with pytest.raises(ValueError, match="mode must be"):
            implicit_step_rewards(one, mode="total")
        with pytest.raises(TypeError, match="step_ends must be integers, got float"):
            implicit_step_rewards(one, np.array([0.5]))
        with pytest.raises(ValueError, match="step_ends must have shape"):
            implicit_step_rewards(np.zeros((2, 3), "f"), np.array([1, 2]))
        with pytest.raises(ValueError, match="reduction must be"):
            response_score(one, reduction="max")
