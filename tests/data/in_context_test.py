import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.data import InContextPrompts, linear_regression_prompts

KEY = jax.random.key(0)
COVARIANCE = np.array([[2.0, 0.8], [0.8, 0.5]], "f")


class PromptsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_targets_follow_the_weights(self):
        draw = self.variant(
            lambda key: linear_regression_prompts(key, 3, 5, 2, nonlinearity=jnp.sin)
        )
        prompts = draw(KEY)
        signal = np.einsum("bnd,bd->bn", prompts.x, prompts.weights)
        np.testing.assert_allclose(prompts.y, np.sin(signal), rtol=1e-5, atol=1e-6)
        asked = np.einsum("bd,bd->b", prompts.x_query, prompts.weights)
        np.testing.assert_allclose(prompts.y_query, np.sin(asked), rtol=1e-5, atol=1e-6)
        assert prompts.x.shape == (3, 5, 2)

    def test_laws_of_inputs_weights_and_noise(self):
        prompts = linear_regression_prompts(
            KEY, 20_000, 4, 2, noise_variance=0.3, covariance=COVARIANCE
        )
        inputs = prompts.x.reshape(-1, 2)
        np.testing.assert_allclose(inputs.T @ inputs / len(inputs), COVARIANCE, atol=0.05)
        weights = prompts.weights
        precision = np.linalg.inv(COVARIANCE)
        np.testing.assert_allclose(weights.T @ weights / len(weights), precision, rtol=0.05)
        signal = np.einsum("bnd,bd->bn", prompts.x, weights)
        np.testing.assert_allclose(np.var(signal), 2, rtol=0.05)
        np.testing.assert_allclose(np.var(prompts.y - signal), 0.3, rtol=0.05)
        asked = np.einsum("bd,bd->b", prompts.x_query, weights)
        np.testing.assert_allclose(np.var(prompts.y_query - asked), 0.3, rtol=0.05)

    def test_keys_decide(self):
        draw = lambda key: linear_regression_prompts(key, 2, 3, 2, noise_variance=1.0)
        chex.assert_trees_all_equal(draw(KEY), draw(KEY))
        assert np.all(draw(jax.random.key(1)).x != draw(KEY).x)

    def test_tokens(self):
        x, y, query = (
            np.arange(6.0).reshape(3, 2),
            np.array([7.0, 8.0, 9.0]),
            np.array([-1.0, -2.0]),
        )
        prompts = InContextPrompts(x, y, query, np.float64(3), np.zeros(2))
        expected = [[0, 1, 7], [2, 3, 8], [4, 5, 9], [-1, -2, 0]]
        np.testing.assert_array_equal(prompts.tokens, expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_examples": 0}, ValueError, "num_examples must be in"),
        ({"dimension": 0}, ValueError, "dimension must be in"),
        ({"batch": 0}, ValueError, "batch must be in"),
        ({"noise_variance": -1.0}, ValueError, "noise_variance must be in"),
        ({"covariance": np.eye(3, dtype="f")}, ValueError, r"covariance must have shape \(2, 2\)"),
        ({"covariance": np.eye(2, dtype=int)}, TypeError, "covariance must have a floating-point"),
        ({"covariance": -np.eye(2, dtype="f")}, ValueError, "positive definite"),
        ({"covariance": np.array([[1, 0.5], [0, 1]], "f")}, ValueError, "symmetric"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        linear_regression_prompts(
            **{"key": KEY, "batch": 2, "num_examples": 3, "dimension": 2, **kwargs}
        )
