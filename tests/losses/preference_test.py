from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from jaxref import losses
from jaxref.losses.preference import DIVERGENCES

SLOPES = {
    "reverse_kl": lambda u: np.log(u),
    "forward_kl": lambda u: -1 / u,
    "jensen_shannon": lambda u: np.log(2 * u / (u + 1)),
    "alpha": lambda u: (1 - u**-0.3) / 0.3,
}
"""f' of the ratio itself, with α = 0.3."""
GENERATORS = {
    "reverse_kl": lambda u: u * np.log(u),
    "forward_kl": lambda u: -np.log(u),
    "jensen_shannon": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    "alpha": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
}


def log_probs(seed=0, size=6):
    return np.random.default_rng(seed).normal(-2, 1, size=(4, size)).astype("f")


@pytest.mark.parametrize("divergence", DIVERGENCES)
class TestNumbers:
    def test_loss_and_gradient_match_the_formula(self, divergence):
        arguments = log_probs()
        loss = partial(losses.f_dpo_loss, beta=0.4, divergence=divergence, alpha=0.3)

        def literal(chosen, rejected, epsilon=0.2):
            u, v = np.exp(chosen - arguments[2]), np.exp(rejected - arguments[3])
            margin = 0.4 * (SLOPES[divergence](u) - SLOPES[divergence](v))
            sigmoid = scipy.special.expit(margin)
            return -(1 - epsilon) * np.log(sigmoid) - epsilon * np.log(1 - sigmoid)

        smooth = jax.jit(partial(loss, label_smoothing=0.2))
        value, pull = jax.vjp(smooth, *arguments)
        chosen, rejected = np.float64(arguments[:2])
        np.testing.assert_allclose(value, literal(chosen, rejected), rtol=1e-5)
        slopes = pull(jnp.ones(6))
        for slope, (above, below) in zip(
            slopes,
            (
                (literal(chosen + 1e-5, rejected), literal(chosen - 1e-5, rejected)),
                (literal(chosen, rejected + 1e-5), literal(chosen, rejected - 1e-5)),
            ),
        ):
            np.testing.assert_allclose(slope, (above - below) / 2e-5, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(slopes[2:], 0)

    def test_divergence_matches_its_generator(self, divergence):
        p, q = np.random.default_rng(1).dirichlet(np.ones(5), size=(2, 3))
        found = losses.f_divergence(p.astype("f"), q.astype("f"), divergence=divergence, alpha=0.3)
        expected = np.sum(q * GENERATORS[divergence](p / q), axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    def test_optimal_policy_is_the_best_there_is(self, divergence):
        """Against a general optimiser of the objective; on gaps large and small."""
        rng = np.random.default_rng(2)
        rewards, q = 3 * rng.normal(size=4), rng.dirichlet(np.ones(4))

        def minus_objective(z):
            p = scipy.special.softmax(z)
            return -(p @ rewards - 0.5 * np.sum(q * GENERATORS[divergence](p / q)))

        best = scipy.optimize.minimize(minus_objective, np.log(q), tol=1e-12)
        found = losses.optimal_f_policy(
            rewards.astype("f"), q.astype("f"), beta=0.5, divergence=divergence, alpha=0.3
        )
        np.testing.assert_allclose(found, scipy.special.softmax(best.x), atol=1e-4)
        gaps = np.array([[0, 0, 0, 0], [100, 0, 0, 0], [2, 2, -50, 0]], "f")
        far = losses.optimal_f_policy(
            gaps, np.full((3, 4), 0.25, "f"), beta=0.5, divergence=divergence, alpha=0.3
        )
        np.testing.assert_allclose(far.sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(far[0], 0.25, rtol=1e-5)
        np.testing.assert_allclose(far[2, 0], far[2, 1], rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("f-dpo")
    def test_choices_by_rewards_lead_to_the_policy_that_earns_most_near_the_reference(self):
        """For each divergence, on a table: pairs chosen by Bradley and Terry's law of the rewards,
        descent to the end. Of the four, reverse KL gives the worst outcome least."""
        rng = np.random.default_rng(0)
        rewards = jnp.asarray(rng.normal(size=5), jnp.float32)
        reference = jnp.asarray(rng.dirichlet(np.full(5, 4.0)), jnp.float32)
        first, second = np.nonzero(~np.eye(5, dtype=bool))
        share = jax.nn.sigmoid(rewards[first] - rewards[second])
        worst = {}
        for divergence in DIVERGENCES:
            options = {"beta": 0.5, "divergence": divergence}

            @jax.jit
            def trained(options=options):
                def loss(z):
                    log_p, log_q = jax.nn.log_softmax(z), jnp.log(reference)
                    pairs = (log_p[first], log_p[second], log_q[first], log_q[second])
                    return jnp.mean(share * losses.f_dpo_loss(*pairs, **options))

                step = lambda _, z: z - 2.0 * jax.grad(loss)(z)
                return jax.nn.softmax(jax.lax.fori_loop(0, 6000, step, jnp.log(reference)))

            expected = losses.optimal_f_policy(rewards, reference, **options)
            np.testing.assert_allclose(trained(), expected, atol=2e-3)
            implied = losses.f_dpo_reward(jnp.log(expected), jnp.log(reference), **options)
            np.testing.assert_allclose(jnp.diff(implied - rewards), 0, atol=1e-4)
            far = losses.optimal_f_policy(8 * rewards, reference, **options)
            worst[divergence] = far[jnp.argmin(rewards)]
        assert worst["forward_kl"] > worst["alpha"] > 1e3 * worst["reverse_kl"]


class TestEdges:
    def test_alpha_goes_from_one_divergence_to_the_other(self):
        arguments = log_probs()
        loss = jax.jit(losses.f_dpo_loss, static_argnames=("divergence", "alpha"))
        for alpha, limit in ((1e-4, "reverse_kl"), (1 - 1e-4, "forward_kl")):
            near = loss(*arguments, divergence="alpha", alpha=alpha)
            np.testing.assert_allclose(near, loss(*arguments, divergence=limit), rtol=2e-3)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_alike_far_and_half(self, divergence):
        loss = jax.jit(partial(losses.f_dpo_loss, divergence=divergence))
        same = log_probs()[0]
        np.testing.assert_allclose(loss(same, same, same, same), np.log(2), rtol=1e-6)
        far = np.array([-1e4, 0, -1e4], "f"), np.array([0, -1e4, -1e4], "f")
        value, pull = jax.vjp(loss, *far, np.zeros(3, "f"), np.zeros(3, "f"))
        for x in (value, *pull(jnp.ones(3))):
            assert np.all(np.isfinite(x))
        half = [jnp.asarray(x, jnp.bfloat16) for x in log_probs()]
        found = loss(*half)
        assert found.dtype == jnp.bfloat16
        full = loss(*(x.astype("f") for x in half))
        np.testing.assert_allclose(found.astype("f"), full, rtol=1e-2)

    def test_bad_input(self):
        one = np.zeros(3, "f")
        loss = partial(losses.f_dpo_loss, one, one, one)
        with pytest.raises(ValueError, match="divergence must be one of"):
            loss(one, divergence="chi_squared")
        with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got 1"):
            loss(one, divergence="alpha", alpha=1)
        with pytest.raises(ValueError, match="beta must be in"):
            loss(one, beta=0)
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), got 0.5"):
            loss(one, label_smoothing=0.5)
        with pytest.raises(ValueError, match="reference_rejected must have shape"):
            loss(one[:2])
        with pytest.raises(TypeError, match="policy_chosen must have a floating-point type"):
            losses.f_dpo_loss(np.zeros(3, int), one, one, one)
        with pytest.raises(ValueError, match="reference must have shape"):
            losses.optimal_f_policy(one, one[:2])
