from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from jaxref import metrics

SETS = {
    "threshold": metrics.threshold_at_recall,
    "precision": metrics.precision_at_recall,
    "area": metrics.precision_recall_auc,
}


def lists(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 11)).astype("f"), rng.integers(0, 4, size=(5, 11))


@partial(jax.jit, static_argnums=2)
def evaluate_lists(scores, grades, k, where):
    """NDCG, and the recall of what has grade 3, compiled once for each k."""
    ndcg = metrics.ndcg_at_k(scores, grades, k, where=where)
    return ndcg, metrics.recall_at_k(scores, grades == 3, k, where=where)


EVERYTHING = np.ones((5, 11), bool)


class TestLists:
    @pytest.mark.parametrize("k", [1, 4, 20])
    def test_match_scikit_learn_and_the_sets(self, k):
        scores, grades = lists()
        grades[1] = 0
        ndcg, recall = evaluate_lists(scores, grades, k, EVERYTHING)
        expected = [
            sklearn.metrics.ndcg_score(g[None], s[None], k=k) for s, g in zip(scores, grades)
        ]
        np.testing.assert_allclose(ndcg, expected, rtol=1e-5)
        expected = [
            len(set(np.argsort(-s)[:k]) & set(np.nonzero(y)[0])) / max(y.sum(), 1)
            for s, y in zip(scores, grades == 3)
        ]
        np.testing.assert_allclose(recall, expected, rtol=1e-6)

    def test_items_that_do_not_exist_and_ties(self):
        scores, grades = lists()
        where = EVERYTHING * np.arange(11) < 7
        found = evaluate_lists(np.where(where, scores, np.nan), grades, 4, where)
        last = np.where(where, scores, -10)
        expected = evaluate_lists(last, np.where(where, grades, 0), 4, EVERYTHING)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert np.sum(found) > 5
        ties = evaluate_lists(0 * scores, 3 * np.eye(5, 11, dtype=int), 4, EVERYTHING)
        np.testing.assert_allclose(ties[0], [*(1 / np.log2([2, 3, 4, 5])), 0], rtol=1e-6)
        np.testing.assert_array_equal(ties[1], [1, 1, 1, 1, 0])
        few = evaluate_lists(scores, grades, 4, ~EVERYTHING)
        np.testing.assert_array_equal(few, 0)
        assert metrics.recall_at_k(jnp.ones(3, jnp.bfloat16), np.ones(3), 1).dtype == jnp.float32

    def test_bad_input_is_named(self):
        scores, grades = lists()
        for metric, name in ((metrics.ndcg_at_k, "relevance"), (metrics.recall_at_k, "labels")):
            with pytest.raises(ValueError, match=f"{name} must have shape"):
                metric(scores, grades[:2] // 3, 2)
            with pytest.raises(ValueError, match=f"{name} must be"):
                metric(scores, -grades, 2)
            with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
                metric(scores, grades // 3, 0)
            with pytest.raises(TypeError, match="scores must have a floating-point type"):
                metric(grades, grades // 3, 2)


@jax.jit
def evaluate(scores, labels, recall, where):
    areas = {"area": metrics.precision_recall_auc(scores, labels, where=where)}
    for name in ("threshold", "precision"):
        areas[name] = SETS[name](scores, labels, recall, where=where)
    return areas


class TestSets:
    @pytest.mark.parametrize("recall", [0.95, 0.5, 1.0])
    def test_match_scikit_learn(self, recall):
        """Also with many equal scores, and with entries that do not count."""
        rng = np.random.default_rng(0)
        labels, where = rng.uniform(size=(2, 20, 5)) < [[[0.4]], [[0.8]]]
        raw = rng.normal(size=(20, 5)) + labels
        for scores in (raw.astype("f"), np.round(raw, 1).astype("f")):
            y, s = labels[where], scores[where]
            precisions, recalls, thresholds = sklearn.metrics.precision_recall_curve(y, s)
            place = np.nonzero(recalls[:-1] >= recall)[0][-1]
            expected = {
                "area": sklearn.metrics.average_precision_score(y, s),
                "threshold": thresholds[place],
                "precision": precisions[place],
            }
            found = evaluate(np.where(where, scores, np.nan), labels, recall, where)
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-5)

    def test_exact_shares(self):
        """19 of 20 positives are 0.95 of them."""
        scores = -np.arange(100, dtype="f").reshape(20, 5)
        found = evaluate(scores, scores > -20, 0.95, scores <= 0)
        assert found["threshold"] == -18
        assert found["precision"] == 1

    def test_undefined_and_equal_scores(self):
        scores, where = np.zeros((20, 5), "f"), np.ones((20, 5), bool)
        labels = where & (np.arange(5) < 2)
        found = evaluate(scores, labels, 0.5, where)
        np.testing.assert_allclose(found["area"], 0.4, rtol=1e-6)
        np.testing.assert_allclose(found["precision"], 0.4, rtol=1e-6)
        assert found["threshold"] == 0
        nan = np.where(labels, scores, np.nan)
        for undefined in ((scores, ~where, where), (nan, labels, where), (scores, labels, ~where)):
            found = evaluate(*undefined[:2], 0.5, undefined[2])
            assert np.all(np.isnan(list(found.values())))
        empty = [metric(np.zeros(0, "f"), np.zeros(0)) for metric in SETS.values()]
        assert np.all(np.isnan(empty))

    def test_bad_input_is_named(self):
        scores, labels = np.ones(3, "f"), np.array([0, 1, 1])
        for metric in SETS.values():
            with pytest.raises(ValueError, match="labels must be 0 or 1"):
                metric(scores, 2 * labels)
            with pytest.raises(TypeError, match="scores must have a floating-point type"):
                metric(labels, labels)
        for name in ("threshold", "precision"):
            with pytest.raises(ValueError, match=r"recall must be in \(0, 1\], got 0"):
                SETS[name](scores, labels, 0)
