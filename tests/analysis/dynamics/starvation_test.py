import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit

from jaxref import losses
from jaxref.analysis import feature_response, starved_response, tangent_features

S3 = 3**0.5 / 2
COUPLED = np.array([[S3, -0.5], [0.5, S3]])


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def random_problem(n=6, seed=0):
    rng = np.random.default_rng(seed)
    params = {"in": rng.normal(size=(3, 4)).astype("f"), "out": rng.normal(size=4).astype("f")}
    return params, rng.normal(size=(n, 3)).astype("f"), rng.integers(2, size=n)


class TestNumbers:
    def test_tangent_features_are_the_jacobian(self):
        params, x, _ = random_problem()
        ours = jax.jit(lambda p, x: tangent_features(network, p, x))(params, x)
        jacobian = jax.jacrev(network)(params, x)
        flat = np.concatenate([jacobian["in"].reshape(6, -1), jacobian["out"]], axis=1)
        np.testing.assert_allclose(ours, flat, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("p", [4, 9])
    def test_response_matches_numpy(self, p):
        rng = np.random.default_rng(0)
        features, labels = rng.normal(size=(6, p)), np.array([0, 1, 1, 0, 1, 0])
        outputs = rng.normal(size=(3, 6))
        ours = feature_response(features.astype("f"), labels, outputs.astype("f"))
        signs = 2 * labels - 1
        u, s, _ = np.linalg.svd(signs[:, None] * features, full_matrices=False)
        u = u * np.sign(u.sum(0))
        np.testing.assert_allclose(ours.directions, u, atol=1e-5)
        np.testing.assert_allclose(ours.strengths, s, rtol=1e-5)
        np.testing.assert_allclose(ours.responses, (outputs * signs) @ u, atol=1e-5)

    def test_converged_training_responds_as_computed(self):
        """Gradient descent on a linear model of random features, labels of both classes: what the
        measurement finds at its end is what the prediction says."""
        rng = np.random.default_rng(0)
        features, labels = rng.normal(size=(4, 4)).astype("f"), np.array([0, 1, 1, 0])

        @jax.jit
        def train(weight_decay, coefficient):
            def loss(w):
                sd = losses.spectral_decoupling_loss(features @ w, labels, coefficient=coefficient)
                return sd.sum() + weight_decay / 2 * w @ w

            step = lambda _, w: w - 0.1 * jax.grad(loss)(w)
            return features @ jax.lax.fori_loop(0, 4000, step, jnp.zeros(4))

        for penalties in ((0.1, 0.0), (0.05, 0.02)):
            measured = feature_response(features, labels, train(*penalties))
            expected = starved_response(
                measured.directions,
                measured.strengths,
                weight_decay=penalties[0],
                coefficient=penalties[1],
            )
            np.testing.assert_allclose(measured.responses, expected, atol=2e-3)


class TestClaims:
    @pytest.mark.claim("gradient-starvation")
    def test_weight_decay_starves_a_feature_of_what_spectral_decoupling_leaves_it(self):
        """Two features that share both examples: as the first one gets stronger, the response to
        the second falls with weight decay, and stays what each example alone gives with SD."""
        strengths = (2, 3, 4, 5, 6)
        decayed = [starved_response(COUPLED, [s, 2], weight_decay=0.01) for s in strengths]
        second = [z[1] for z in decayed]
        np.testing.assert_allclose(second, [1.640, 1.583, 1.467, 1.329, 1.185], atol=1e-3)
        margin = brentq(lambda u: expit(-u) - 2 * 0.001 * u, 0, 20)
        for s in strengths:
            decoupled = starved_response(COUPLED, [s, 2], coefficient=0.001)
            np.testing.assert_allclose(decoupled, COUPLED.T @ [margin, margin], rtol=1e-6)
        # features that share no example do not compete
        apart = [starved_response(np.eye(2), [s, 2], weight_decay=0.01)[1] for s in strengths]
        np.testing.assert_allclose(apart, apart[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tangent_features(lambda w, x: x, jnp.ones(2), np.ones((2, 3))), ValueError, "one"),
        (lambda: feature_response(np.ones(3), np.ones(3), np.ones(3)), ValueError, "features must"),
        (
            lambda: feature_response(np.ones((3, 2)), np.ones(2), np.ones(3)),
            ValueError,
            "labels must have shape",
        ),
        (
            lambda: feature_response(np.ones((3, 2)), np.ones(3), np.ones((5, 2))),
            ValueError,
            "outputs must have shape",
        ),
        (
            lambda: feature_response(np.ones((3, 2), int), np.ones(3), np.ones(3)),
            TypeError,
            "features must have a floating-point type",
        ),
        (lambda: starved_response(COUPLED, [1, 2]), ValueError, "must not both be 0"),
        (lambda: starved_response(2 * COUPLED, [1, 2], weight_decay=1.0), ValueError, "orthonor"),
        (
            lambda: starved_response(COUPLED, [1, 2], weight_decay=-1.0),
            ValueError,
            "weight_decay must be in",
        ),
        (
            lambda: starved_response(COUPLED, [1, 2, 3], weight_decay=1.0),
            ValueError,
            "strengths must have shape",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
