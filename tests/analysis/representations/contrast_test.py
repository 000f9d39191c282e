from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxref.analysis import penalty_entropy, relative_penalty, tolerance, uniformity

PEER = np.load(Path(__file__).parents[2] / "oracles" / "contrast.npz")
S, INDEX, FEATURES = PEER["similarities"], PEER["index"], PEER["features"]


class TestPenalty:
    def test_is_the_softmax_over_negatives_that_count(self):
        where = np.arange(9) != (INDEX[:, None] + 1) % 9
        where[4] = np.arange(9) == INDEX[4]
        shares = jax.jit(relative_penalty)(S, INDEX, temperature=0.2, where=where)
        entropies = jax.jit(penalty_entropy)(S, INDEX, temperature=0.2, where=where)
        for i in range(4):
            negatives = where[i] & (np.arange(9) != INDEX[i])
            weights = np.where(negatives, np.exp(np.float64(S[i]) / 0.2), 0)
            np.testing.assert_allclose(shares[i], weights / weights.sum(), rtol=1e-5)
            np.testing.assert_allclose(entropies[i], scipy.stats.entropy(weights), rtol=1e-5)
        np.testing.assert_array_equal(shares[4], 0)  # no negative
        assert entropies[4] == 0

    def test_extremes(self):
        s, first = np.array([[0, 1e4, -1e4], [0, 1e4, 1e4]], "f"), np.zeros(2, int)
        shares, entropies = (jax.jit(f)(s, first) for f in (relative_penalty, penalty_entropy))
        np.testing.assert_allclose(shares, [[0, 1, 0], [0, 0.5, 0.5]])
        np.testing.assert_allclose(entropies, [0, np.log(2)], rtol=1e-6)

    @pytest.mark.parametrize("measure", [relative_penalty, penalty_entropy])
    def test_bad_input(self, measure):
        with pytest.raises(ValueError, match="temperature must be in"):
            measure(S, INDEX, temperature=0)
        with pytest.raises(ValueError, match=r"positive_index must have shape \(5,\)"):
            measure(S, INDEX[:2])
        with pytest.raises(TypeError, match="positive_index must be integers"):
            measure(S, np.ones(5))


class TestSphere:
    def test_uniformity_is_that_of_align_uniform_for_any_length(self):
        lengths = np.array([[1e-20], [1], [3], [1e15], [1], [2], [0.1]], "f")
        even = jax.jit(uniformity)
        for t, expected in zip((2, 0.5), PEER["uniformity"]):
            found = even(lengths * FEATURES, t=t)
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(even(jnp.ones((7, 4)), t=2), 0, atol=1e-5)
        assert np.isnan(even(FEATURES[:1]))

    def test_tolerance_is_the_mean_cosine_within_labels(self):
        labels = np.array([3, 0, 3, 3, 0, 7, -1])
        unit = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
        pairs = [(0, 2), (0, 3), (2, 3), (1, 4)]
        expected = np.mean([unit[i] @ unit[j] for i, j in pairs])
        alike = jax.jit(tolerance)
        np.testing.assert_allclose(alike(FEATURES, labels), expected, rtol=1e-5)
        assert np.isnan(alike(FEATURES, np.arange(7)))

    def test_bad_input(self):
        with pytest.raises(ValueError, match="t must be in"):
            uniformity(FEATURES, t=0)
        with pytest.raises(ValueError, match=r"features must have shape \[examples, features\]"):
            uniformity(FEATURES[0])
        with pytest.raises(ValueError, match=r"labels must have shape \(7,\)"):
            tolerance(FEATURES, INDEX)
        with pytest.raises(TypeError, match="labels must be integers"):
            tolerance(FEATURES, np.ones(7))
