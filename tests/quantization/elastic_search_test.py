import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.quantization import (
    accuracy_predictor_features,
    accuracy_predictor_fit,
    evolutionary_bit_search,
    predict_accuracy,
)

KEY = jax.random.key(0)
CONDITIONS = {"per_channel": True, "symmetric_weights": False, "symmetric_activations": True}


def cost(weight_bits, activation_bits):
    return jnp.mean(weight_bits + activation_bits, axis=-1)


class TestFeatures:
    def test_one_hot_bits_and_conditions(self):
        weights, activations = np.array([[2, 8], [5, 3]]), np.array([[4, 4], [8, 2]])
        features = np.asarray(accuracy_predictor_features(weights, activations, **CONDITIONS))
        assert features.shape == (2, 31)
        np.testing.assert_array_equal(features[:, -3:], [[1, 0, 1]] * 2)
        codes = features[:, :28].reshape(2, 2, 2, 7)
        np.testing.assert_array_equal(codes.sum(-1), 1)
        np.testing.assert_array_equal(codes.argmax(-1) + 2, np.stack([weights, activations], 1))

    def test_bad_input(self):
        with pytest.raises(ValueError, match="weight_bits must be in"):
            accuracy_predictor_features([9], [2], **CONDITIONS)
        with pytest.raises(ValueError, match="activation_bits must have shape"):
            accuracy_predictor_features([2, 3], [2], **CONDITIONS)
        with pytest.raises(TypeError, match="weight_bits must be an integer"):
            accuracy_predictor_features([2.0], [2], **CONDITIONS)


class TestPredictor:
    def test_learns_an_accuracy_that_saturates_and_finds_other_formats_with_it(self):
        rng = np.random.default_rng(0)
        bits = rng.integers(2, 9, size=(2, 300, 3))
        features = np.asarray(accuracy_predictor_features(*bits, **CONDITIONS))
        accuracies = 0.7 - np.sum(0.5**bits, axis=(0, 2)).astype(np.float32) / 3
        fit = {"key": KEY, "hidden_size": 32, "steps": 200}
        predictor = accuracy_predictor_fit(features[:200], accuracies[:200], **fit)
        errors = predict_accuracy(predictor, features[200:]) - accuracies[200:]
        assert np.mean(np.square(errors)) < 0.3 * np.var(accuracies[200:])
        np.testing.assert_allclose(predictor.base, accuracies[:200].mean(), rtol=1e-5)

    def test_no_steps_give_the_mean_and_other_edges(self):
        predictor = accuracy_predictor_fit(jnp.eye(3), jnp.array([0.1, 0.2, 0.6]), key=KEY, steps=0)
        assert [kernel.shape for kernel in predictor.kernels] == [
            (3, 400),
            (400, 400),
            (400, 400),
            (400, 1),
        ]
        np.testing.assert_allclose(predict_accuracy(predictor, jnp.ones((2, 3))), 0.3, rtol=1e-6)
        with pytest.raises(ValueError, match="features must have shape"):
            predict_accuracy(predictor, jnp.ones((2, 4)))
        with pytest.raises(ValueError, match="accuracies must have shape"):
            accuracy_predictor_fit(jnp.eye(3), jnp.ones(2), key=KEY)


class TestSearch:
    def test_finds_the_best_of_all(self):
        gains = np.random.default_rng(0).uniform(size=(2, 2)).astype(np.float32)

        def accuracy(weight_bits, activation_bits):
            losses = gains[0] * 0.5**weight_bits + gains[1] * 0.5**activation_bits
            return -jnp.sum(losses, axis=-1)

        every = np.array(list(itertools.product(range(2, 9), repeat=4))).reshape(-1, 2, 2)
        values = np.asarray(accuracy(every[:, 0], every[:, 1]))
        admitted = every.sum((1, 2)) <= 2 * 7
        best = every[np.argmax(np.where(admitted, values, -np.inf))]
        found = evolutionary_bit_search(
            accuracy, cost, 7, layers=2, key=KEY, generations=100, mutation_probability=0.3
        )
        np.testing.assert_array_equal(found.weight_bits, best[0])
        np.testing.assert_array_equal(found.activation_bits, best[1])
        np.testing.assert_allclose(found.accuracy, values[admitted].max(), rtol=1e-6)
        assert np.all(np.diff(found.history) >= 0)

    def test_a_tight_budget_is_kept(self):
        accuracy = lambda w, a: jnp.sum(w, -1) + jnp.sum(a, -1)
        found = evolutionary_bit_search(
            accuracy, cost, 4.1, layers=20, key=KEY, generations=40, population=40
        )
        assert found.accuracy == found.weight_bits.sum() + found.activation_bits.sum() == 82

    def test_bad_input(self):
        for wrong, name in (({"layers": 0}, "layers"), ({"parent_ratio": 0.0}, "parent_ratio")):
            with pytest.raises(ValueError, match=f"{name} must be in"):
                evolutionary_bit_search(cost, cost, 9, **({"layers": 2, "key": KEY} | wrong))
        with pytest.raises(ValueError, match="budget must be in"):
            evolutionary_bit_search(cost, cost, 3.9, layers=2, key=KEY)
