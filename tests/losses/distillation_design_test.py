import jax
import numpy as np
import pytest

from jaxref import losses


def test_layers_of_each_strategy():
    assert losses.layer_mapping(12, 6) == (1, 3, 5, 7, 9, 11)
    assert losses.layer_mapping(12, 5) == (1, 3, 6, 8, 11)
    assert losses.layer_mapping(12, 3, "last") == (9, 10, 11)
    assert losses.layer_mapping(12, 3, "first") == (0, 1, 2)
    for strategy in ("skip", "last", "first"):
        assert losses.layer_mapping(4, 4, strategy) == (0, 1, 2, 3)


def runs(seed=0):
    """Twenty tasks of 3 features and 8 ways of two choices, whose best depends on the first."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(20, 3))
    choices = [np.eye(2)[[a, b]].ravel() for a in (0, 1) for b in (0, 1)]
    candidates = np.array(choices * 2)
    score = lambda x: 0.1 * (x[0] * (candidates[:, 0] - candidates[:, 1]) + candidates[:, 2])
    scores = np.stack([score(x) + rng.uniform() for x in features])
    return features, scores, candidates


def test_prediction_is_ridge_regression_on_features_choices_and_products():
    features, scores, candidates = runs()
    scores[rng := np.random.default_rng(1).uniform(size=scores.shape) < 0.3] = np.nan
    new = np.array([1.5, 0.0, -0.5])
    mean, std = features.mean(0), features.std(0)
    y = (scores - np.nanmean(scores, 1, keepdims=True)) / np.nanstd(scores, 1, keepdims=True)

    def product(x, c):
        return np.outer(np.r_[1, (x - mean) / std / np.sqrt(3)], np.r_[1, c / 2]).ravel()

    rows = np.array([product(x, c) for x in features for c in candidates])[~rng.ravel()]
    target = y.ravel()[~rng.ravel()]
    weights = np.linalg.solve(rows.T @ rows + 0.7 * np.eye(rows.shape[1]), rows.T @ target)
    expected = [product(new, c) @ weights for c in candidates]
    recommend = jax.jit(losses.recommend_pipeline, static_argnames="top_k")
    ids, predicted = recommend(features, scores, candidates, new, top_k=8, ridge=0.7)
    np.testing.assert_allclose(predicted, np.array(expected)[ids], atol=1e-4)
    assert np.all(np.diff(predicted) <= 1e-6)
    assert ids.dtype == np.int32
    # the first four ways are the same as the last four, and come first
    np.testing.assert_array_equal(ids[:2], [0, 4])
    ids, _ = recommend(features, scores, candidates, -new, top_k=8, ridge=0.7)
    np.testing.assert_array_equal(ids[:2], [2, 6])


def test_bad_input_is_named():
    features, scores, candidates = runs()
    arguments = features, scores, candidates, features[0]
    with pytest.raises(ValueError, match="top_k must be an integer from 1 to 8"):
        losses.recommend_pipeline(*arguments, top_k=9)
    with pytest.raises(ValueError, match="ridge must be in"):
        losses.recommend_pipeline(*arguments, ridge=0.0)
    with pytest.raises(ValueError, match=r"scores must have shape \(20, 8\)"):
        losses.recommend_pipeline(features, scores.T, candidates, features[0])
    with pytest.raises(ValueError, match=r"new_features must have shape \(3,\)"):
        losses.recommend_pipeline(*arguments[:3], features)
    with pytest.raises(ValueError, match="features must be a matrix"):
        losses.recommend_pipeline(features[0], *arguments[1:])
    with pytest.raises(ValueError, match="strategy must be one of"):
        losses.layer_mapping(12, 6, "middle")
    with pytest.raises(ValueError, match="student_layers must be in"):
        losses.layer_mapping(4, 5)
    with pytest.raises(ValueError, match="teacher_layers must be an integer"):
        losses.layer_mapping(12.0, 6)
