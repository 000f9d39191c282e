from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxref.losses.preference import f_dpo_loss
from jaxref.losses.robust_preference import (
    SRPOLogProbs,
    revise,
    srpo_loss,
    srpo_optimal_policies,
)


def log_probs(seed=0, size=6):
    policy, reference = np.random.default_rng(seed).normal(-20, 2, size=(2, 6, size)).astype("f")
    return SRPOLogProbs(*policy), SRPOLogProbs(*reference)


def of_pairs(first, second):
    """The six log-probabilities of all ordered pairs of responses, by tables of logits
    `[responses]` and `[revised, responses]`."""
    first, second = (jax.nn.log_softmax(x, axis=-1) for x in (first, second))
    w, l = (x.ravel() for x in np.indices(second.shape))  # noqa: E741
    return SRPOLogProbs(first[w], first[l], second[l, w], second[w, l], second[l, l], second[w, w])


def intransitive(seed=0, size=4):
    """A game of a cycle and some noise, with references."""
    rng = np.random.default_rng(seed)
    turns = np.sin(2 * np.pi * (np.arange(size)[:, None] - np.arange(size)) / size)
    preference = scipy.special.expit(2 * turns + np.triu(rng.normal(size=(size, size)), 1))
    preference = np.triu(preference, 1) + np.tril(1 - preference.T, -1) + np.eye(size) / 2
    return preference, rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size), size=size)


class TestLoss:
    def test_matches_the_formula(self):
        policy, reference = log_probs()
        preference = np.random.default_rng(1).uniform(size=6).astype("f")
        loss = jax.jit(partial(srpo_loss, beta=0.2, mixing=0.3))

        def literal(policy):
            d = {
                name: np.float64(x) - y
                for name, x, y in zip(SRPOLogProbs._fields, policy, reference)
            }
            both = d["chosen_given_rejected"] - d["rejected_given_chosen"]
            both += d["chosen"] - d["rejected"]
            joint = (preference - 0.5 - 0.1 * both) ** 2
            up = d["chosen_given_rejected"] - d["rejected_given_rejected"]
            down = d["rejected_given_chosen"] - d["chosen_given_chosen"]
            revised = (preference - 0.5 - 0.2 * up) ** 2 + (1 - preference - 0.5 - 0.2 * down) ** 2
            return 0.7 * joint + 0.3 * revised

        value, pull = jax.vjp(lambda p, r: loss(p, r, preference=preference), policy, reference)
        np.testing.assert_allclose(value, literal(policy), rtol=1e-4)
        slopes, to_reference = pull(jnp.ones(6))
        for i, slope in enumerate(slopes):
            moved = [
                [np.float64(x) + (step if i == j else 0) for j, x in enumerate(policy)]
                for step in (1e-4, -1e-4)
            ]
            finite = (literal(moved[0]) - literal(moved[1])) / 2e-4
            np.testing.assert_allclose(slope, finite, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(to_reference, 0)
        for mixing in (0.0, 0.5, 1.0):
            same = srpo_loss(reference, reference, mixing=mixing)
            np.testing.assert_allclose(same, (1 + mixing) / 4, rtol=1e-6)

    @pytest.mark.claim("srpo")
    def test_what_is_learned_does_not_depend_on_whose_responses_were_compared(self):
        """Choices between responses of two very different writers, on a table of preferences that
        go round in a circle: both lead to the policies of the closed form, though every choice
        counts as certain, while DPO's policies are far apart."""
        preference, reference, conditional = intransitive()
        known = of_pairs(*(np.log(x).astype("f") for x in (reference, conditional)))
        writers = np.array([[0.55, 0.25, 0.1, 0.1], [0.1, 0.1, 0.25, 0.55]])
        drawn = (writers[:, :, None] * writers[:, None] * preference).reshape(2, -1)

        @jax.jit
        @jax.vmap
        def trained(weights):
            def loss(tables):
                pairs = of_pairs(tables["first"], tables["second"])
                compared = of_pairs(tables["compared"], tables["second"])
                dpo = f_dpo_loss(*compared[:2], *known[:2], beta=0.5)
                return jnp.sum(weights * (srpo_loss(pairs, known, beta=0.5) + dpo))

            start = {"first": jnp.log(reference), "second": jnp.log(conditional)}
            start["compared"] = start["first"]
            step = lambda _, x: jax.tree.map(lambda a, b: a - 4.0 * b, x, jax.grad(loss)(x))
            found = jax.lax.fori_loop(0, 3000, step, start)
            return jax.tree.map(partial(jax.nn.softmax, axis=-1), found)

        found = trained(drawn.astype("f"))
        policy, revision = srpo_optimal_policies(
            preference.astype("f"), reference.astype("f"), conditional.astype("f"), beta=0.5
        )
        for i in range(2):
            np.testing.assert_allclose(found["first"][i], policy, atol=1e-4)
            np.testing.assert_allclose(found["second"][i], revision, atol=1e-4)
        assert np.abs(np.diff(found["compared"], axis=0)).max() > 0.4
        assert np.abs(policy - reference).max() > 0.05


class TestOptimalPolicies:
    def test_solve_the_game_and_its_equations(self):
        """Against a general optimiser of the game, in which the best revision is its own largest
        value; and every pair of responses satisfies both equations, so that the loss is 0."""
        preference, reference, conditional = intransitive(1)
        policy, revision = srpo_optimal_policies(
            preference.astype("f"), reference.astype("f"), conditional.astype("f"), beta=0.4
        )

        def minus_gain(z):
            rho = scipy.special.softmax(z.reshape(4, 4), axis=1)
            gains = np.sum(rho * preference.T, axis=1)
            return -np.sum(gains - 0.4 * np.sum(rho * np.log(rho / conditional), axis=1))

        best = scipy.optimize.minimize(minus_gain, np.log(conditional).ravel(), tol=1e-12)
        found = scipy.special.softmax(best.x.reshape(4, 4), axis=1)
        np.testing.assert_allclose(revision, found, atol=1e-4)
        gains = np.sum(found * (preference.T - 0.4 * np.log(found / conditional)), axis=1)

        def value(z):
            pi = scipy.special.softmax(z)
            return np.sum(pi * (gains + 0.4 * np.log(pi / reference)))

        best = scipy.optimize.minimize(value, np.log(reference), tol=1e-12)
        np.testing.assert_allclose(policy, scipy.special.softmax(best.x), atol=1e-4)
        pairs = of_pairs(jnp.log(policy), jnp.log(revision))
        known = of_pairs(*(np.log(x).astype("f") for x in (reference, conditional)))
        chances = preference.ravel().astype("f")
        for mixing in (0.0, 1.0):
            losses = srpo_loss(pairs, known, beta=0.4, mixing=mixing, preference=chances)
            np.testing.assert_allclose(losses, 0, atol=1e-10)

    def test_without_preferences_and_with_impossible_responses(self):
        reference = np.array([0.5, 0.5, 0], "f")
        policy, revision = srpo_optimal_policies(np.full((3, 3), 0.5, "f"), reference)
        np.testing.assert_allclose(policy, reference, rtol=1e-5)
        np.testing.assert_allclose(revision, np.tile(reference, (3, 1)), rtol=1e-5)
        half = jnp.full((3, 3), 0.5, jnp.bfloat16)
        assert [x.dtype for x in srpo_optimal_policies(half, reference)] == [jnp.bfloat16] * 2


class TestRevise:
    def test_revisions_are_made_of_what_was_before(self):
        """By draws from the policies of the closed form: half the first drafts are the worse of two
        responses, and each revision leaves fewer."""
        preference = jnp.array([[0.5, 0.9], [0.1, 0.5]])
        _, revision = srpo_optimal_policies(preference, jnp.full(2, 0.5), beta=0.4)
        keys = iter(jax.random.split(jax.random.key(0), 4))
        draw = jax.jit(lambda key, log_p: jax.random.categorical(key, log_p, shape=(4000,)))

        def sample(prompt, draft):
            table = jnp.zeros((1, 2)) if draft is None else jnp.log(revision)[draft]
            return draw(next(keys), table + prompt)

        drafts = revise(sample, 0.0, num_revisions=3)
        shares = [float(jnp.mean(draft == 0)) for draft in drafts]
        expected = [np.array([0.5, 0.5]) @ np.linalg.matrix_power(revision, k) for k in range(4)]
        np.testing.assert_allclose(shares, [x[0] for x in expected], atol=0.03)
        assert shares[0] < 0.53 < 0.7 < shares[1]
        assert revise(lambda prompt, draft: (prompt, draft), "x", num_revisions=0) == [("x", None)]
        longer = lambda prompt, draft: (draft or prompt) + "."
        assert revise(longer, "x", num_revisions=2) == ["x.", "x..", "x..."]
        assert len(revise(lambda prompt, draft: None, "x")) == 6


class TestEdges:
    def test_alike_far_impossible_and_half(self):
        policy, reference = log_probs(size=3)
        alike = [SRPOLogProbs(*(x[0],) * 2, *(x[2],) * 4) for x in (policy, reference)]
        np.testing.assert_allclose(srpo_loss(*alike), 0.375, rtol=1e-6)
        ends = np.array([-np.inf, -1e4, -1], "f")
        cases = np.stack(np.meshgrid(ends, ends), -1).reshape(-1, 2).T
        loss = jax.jit(srpo_loss)
        for i in range(6):
            ours, theirs = [list(np.full((6, 9), -1, "f")) for _ in range(2)]
            ours[i], theirs[i] = cases
            value, pull = jax.vjp(loss, SRPOLogProbs(*ours), SRPOLogProbs(*theirs))
            assert np.all(np.isfinite(value))
            assert np.all(np.isfinite(jax.tree.leaves(pull(jnp.ones(9)))))
            np.testing.assert_allclose(value[::4], 0.375, rtol=1e-6)
        half = [SRPOLogProbs(*jnp.asarray(x, jnp.bfloat16)) for x in (policy, reference)]
        found = loss(*half)
        assert found.dtype == jnp.bfloat16
        full = loss(*jax.tree.map(lambda x: x.astype(jnp.float32), half))
        np.testing.assert_allclose(found.astype("f"), full, rtol=1e-2)

    def test_bad_input(self):
        one = SRPOLogProbs(*np.zeros((6, 3), "f"))
        with pytest.raises(ValueError, match=r"beta must be in \(0, inf\), got 0"):
            srpo_loss(one, one, beta=0)
        with pytest.raises(ValueError, match=r"mixing must be in \[0, 1\], got 1.5"):
            srpo_loss(one, one, mixing=1.5)
        with pytest.raises(ValueError, match=r"reference\.rejected must have shape \(3,\)"):
            srpo_loss(one, one._replace(rejected=np.zeros(2, "f")))
        with pytest.raises(TypeError, match=r"policy\.chosen must have a floating-point type"):
            srpo_loss(one._replace(chosen=np.zeros(3, int)), one)
        with pytest.raises(ValueError, match="preference must broadcast"):
            srpo_loss(one, one, preference=np.ones(2, "f"))
        with pytest.raises(ValueError, match=r"preference must have shape \(3, 3\)"):
            srpo_optimal_policies(np.zeros(3, "f"), np.ones(3, "f") / 3)
        with pytest.raises(ValueError, match="num_revisions must be in"):
            revise(lambda prompt, draft: prompt, 0, num_revisions=-1)
