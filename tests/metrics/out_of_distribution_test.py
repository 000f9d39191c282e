import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from jaxref.metrics import knn_anomaly_score


def features(number, seed):
    return np.random.default_rng(seed).normal(size=(number, 4)).astype("f")


class TestNearestNeighbours:
    @pytest.mark.parametrize(
        ("metric", "peer"), [("cosine", "cosine"), ("euclidean", "sqeuclidean")]
    )
    def test_matches_scikit_learn(self, metric, peer):
        train, test = features(20, 0), features(7, 1)
        neighbours = NearestNeighbors(n_neighbors=3, metric=peer, algorithm="brute").fit(train)
        expected = neighbours.kneighbors(test)[0].sum(axis=1)
        score = jax.jit(knn_anomaly_score, static_argnames=("k", "metric"))
        found = score(train, test, k=3, metric=metric)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        if metric == "cosine":  # on unit features, half the other
            unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
            half = score(*unit, k=3, metric="euclidean") / 2
            np.testing.assert_allclose(found, half, rtol=1e-5, atol=1e-6)

    def test_zero_vectors_large_ones_and_half_precision(self):
        train, test = features(5, 0), features(3, 1)
        train[0], test[0], test[1] = 0, 0, test[1] * 1e18
        score = jax.jit(knn_anomaly_score)
        found = score(train, test)
        assert np.all(np.isfinite(found))
        np.testing.assert_array_equal(found[0], 2)
        half = jax.eval_shape(knn_anomaly_score, *(features(3, k).astype("e") for k in (0, 1)))
        assert half.dtype == jnp.float32

    def test_bad_input(self):
        train, test = features(5, 0), features(3, 1)
        for k in (0, 6):
            with pytest.raises(ValueError, match=f"k must be from 1 to the 5 training .*got {k}"):
                knn_anomaly_score(train, test, k=k)
        with pytest.raises(TypeError, match="k must be an int, got"):
            knn_anomaly_score(train, test, k=2.0)
        with pytest.raises(ValueError, match="metric must be 'cosine' or 'euclidean', got 'l1'"):
            knn_anomaly_score(train, test, metric="l1")
        with pytest.raises(ValueError, match=r"test_features must have shape \(3, 4\)"):
            knn_anomaly_score(train, test[:, :2])
        with pytest.raises(ValueError, match=r"train_features must have shape \[examples"):
            knn_anomaly_score(train[0], test)
        with pytest.raises(TypeError, match="test_features must have a floating-point type"):
            knn_anomaly_score(train, test.astype(int))
