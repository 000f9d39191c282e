from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from sklearn.metrics import roc_auc_score

from jaxref import metrics

LIBAUC = np.load(Path(__file__).parents[1] / "oracles" / "partial_auc.npz")
METRICS = {
    "roc_auc": metrics.roc_auc,
    "partial_auc": partial(metrics.partial_auc, max_fpr=0.3),
    "two_way": partial(metrics.two_way_partial_auc, max_fpr=0.3, min_tpr=0.4),
    "threshold": partial(metrics.threshold_at_fpr, max_fpr=0.3),
}


def tied_scores(n=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.uniform(size=n) < 0.4
    return np.round(rng.normal(size=n) + labels, 1).astype(np.float32), labels


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_areas_with_ties_match_scikit_learn(self):
        area = self.variant(metrics.roc_auc)
        part = self.variant(lambda s, y, m: metrics.partial_auc(s, y, max_fpr=m))
        for seed in range(3):
            scores, labels = tied_scores(seed=seed)
            np.testing.assert_allclose(
                area(scores, labels), roc_auc_score(labels, scores), rtol=1e-5
            )
            for max_fpr in (0.03, 0.25, 0.5, 1.0):
                expected = roc_auc_score(labels, scores, max_fpr=max_fpr)
                np.testing.assert_allclose(part(scores, labels, max_fpr), expected, rtol=1e-5)

    @chex.variants(with_jit=True)
    @parameterized.parameters(0, 1, 2)
    def test_two_way_areas_match_libauc(self, i):
        max_fpr, min_tpr = LIBAUC["rates"][i]
        area = self.variant(partial(metrics.two_way_partial_auc, max_fpr=max_fpr, min_tpr=min_tpr))
        ours = area(LIBAUC["metric_scores"], LIBAUC["metric_labels"])
        np.testing.assert_allclose(ours, LIBAUC["two_way_areas"][i], rtol=1e-5, atol=1e-6)

    def test_macro_auc_matches_scikit_learn_and_the_authors_count_of_ties(self):
        rng = np.random.default_rng(0)
        targets = rng.uniform(size=(30, 4)) < 0.4
        scores = np.round(rng.normal(size=(30, 4)) + targets, 1).astype(np.float32)
        expected = roc_auc_score(targets, scores, average="macro")
        np.testing.assert_allclose(metrics.macro_auc(scores, targets), expected, rtol=1e-5)
        wins = [
            np.mean(scores[targets[:, k], k][:, None] >= scores[~targets[:, k], k])
            for k in range(4)
        ]
        ours = metrics.macro_auc(scores, targets, ties=1.0)
        np.testing.assert_allclose(ours, np.mean(wins), rtol=1e-5)
        one_sided = np.concatenate([targets, np.zeros((30, 1), bool)], axis=1)
        wider = np.concatenate([scores, scores[:, :1]], axis=1)
        np.testing.assert_allclose(metrics.macro_auc(wider, one_sided), expected, rtol=1e-5)

    def test_threshold_is_the_lowest_that_is_allowed(self):
        scores, labels = tied_scores()
        for max_fpr in (0.0, 0.05, 0.3, 1.0):
            rates = [np.mean(scores[~labels] >= t) for t in scores]
            expected = min((t for t, r in zip(scores, rates) if r <= max_fpr), default=np.inf)
            assert metrics.threshold_at_fpr(scores, labels, max_fpr) == expected
        exact = np.arange(20.0, dtype=np.float32)
        assert metrics.threshold_at_fpr(exact, np.zeros(20), 0.05) == 19
        assert metrics.threshold_at_fpr(exact, np.zeros(20), 0.0) == np.inf

    def test_imbalance_and_profits_by_hand(self):
        targets = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
        np.testing.assert_allclose(metrics.label_imbalance(targets), [0.25, 0.5, 0])
        known = np.array([[1], [1], [1], [0]], bool)
        masked = metrics.label_imbalance(targets, where=known)
        np.testing.assert_allclose(masked, [1 / 3, 1 / 3, 0], rtol=1e-6)
        factors = metrics.imbalance_factors(targets[:, :2])
        np.testing.assert_allclose(factors[:3], [3, np.sqrt(3), 4], rtol=1e-6)
        assert np.array_equal(metrics.imbalance_factors(targets).has_both, [True, True, False])
        assert np.isinf(metrics.imbalance_factors(targets).mean)
        scores = np.array([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]], np.float32)
        profits = np.array([[10, -4, 2], [1, 2, 3]])
        np.testing.assert_allclose(metrics.top_group_profit(scores, profits, 2), [-1, 1.5])
        where = np.array([[True, False, True], [False, False, False]])
        masked = metrics.top_group_profit(scores, profits, 3, where=where)
        np.testing.assert_allclose(masked, [6, 0])


@pytest.mark.parametrize("name", METRICS)
class TestContract:
    def test_excluded_entries_count_for_nothing(self, name):
        scores, labels = tied_scores()
        where = np.arange(60) < 41
        ours = jax.jit(METRICS[name])(
            np.where(where, scores, np.nan), np.where(where, labels, 7), where=where
        )
        np.testing.assert_allclose(ours, METRICS[name](scores[:41], labels[:41]), rtol=1e-6)

    def test_any_shape_is_one_set_and_half_precision_gives_float32(self, name):
        scores, labels = tied_scores()
        square = METRICS[name](scores.reshape(6, 10), labels.reshape(6, 10))
        np.testing.assert_allclose(square, METRICS[name](scores, labels), rtol=1e-6)
        assert METRICS[name](jnp.asarray(scores, jnp.bfloat16), labels).dtype == jnp.float32
        each = jax.vmap(METRICS[name])(scores.reshape(3, 20), labels.reshape(3, 20))
        alone = [METRICS[name](scores[i : i + 20], labels[i : i + 20]) for i in (0, 20, 40)]
        np.testing.assert_allclose(each, alone, rtol=1e-6)

    def test_what_is_not_defined_is_nan(self, name):
        scores, labels = tied_scores()
        measure = jax.jit(METRICS[name])
        assert np.isnan(measure(scores, np.ones(60, bool)))
        assert np.isnan(measure(np.where(np.arange(60) == 3, np.nan, scores), labels))
        assert np.isnan(METRICS[name](scores[:0], labels[:0]))
        if name != "threshold":
            assert np.isnan(measure(scores, np.zeros(60, bool)))

    def test_perfect_equal_and_extreme_scores(self, name):
        labels = np.arange(10) < 5
        perfect = METRICS[name](1e4 * (2 * labels - 1.0).astype("f"), labels)
        equal = METRICS[name](np.zeros(10, "f"), labels)
        expected = (1e4, np.inf) if name == "threshold" else (1, 0.5)
        np.testing.assert_allclose((perfect, equal), expected, rtol=1e-6)

    def test_bad_input_is_named(self, name):
        scores, labels = tied_scores()
        with pytest.raises(ValueError, match="labels must be 0 or 1"):
            METRICS[name](scores, labels * 2)
        with pytest.raises(ValueError, match="labels must have shape"):
            METRICS[name](scores, labels[:3])
        with pytest.raises(ValueError, match="where must broadcast"):
            METRICS[name](scores, labels, where=np.ones(3, bool))
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            METRICS[name](labels, labels)


def test_whole_ranges_give_the_whole_area():
    scores, labels = tied_scores()
    whole = metrics.roc_auc(scores, labels)
    two_way = metrics.two_way_partial_auc(scores, labels, max_fpr=1.0, min_tpr=0.0)
    np.testing.assert_allclose(two_way, whole, rtol=1e-6)
    over = metrics.area_over_curve(scores[labels], scores[~labels])
    np.testing.assert_allclose(1 - over, whole, rtol=1e-6)
    assert np.isnan(metrics.area_over_curve(scores[:0], scores))


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda s, y: metrics.partial_auc(s, y, max_fpr=0.0), "max_fpr must be in"),
        (lambda s, y: metrics.two_way_partial_auc(s, y, max_fpr=1.1), "max_fpr must be in"),
        (lambda s, y: metrics.two_way_partial_auc(s, y, min_tpr=1.0), "min_tpr must be in"),
        (lambda s, y: metrics.threshold_at_fpr(s, y, -0.1), "max_fpr must be in"),
        (lambda s, y: metrics.macro_auc(s, y), r"scores must have shape \[n, K\]"),
        (lambda s, y: metrics.macro_auc(s[None], y[None], ties=2.0), "ties must be in"),
        (lambda s, y: metrics.label_imbalance(y), r"targets must have shape \[n, K\]"),
        (lambda s, y: metrics.imbalance_factors(y[None] * 2), "targets must be 0 or 1"),
        (lambda s, y: metrics.top_group_profit(s, s, 0), "k must be an integer from 1"),
        (lambda s, y: metrics.top_group_profit(s, s, 61), "k must be an integer from 1"),
        (lambda s, y: metrics.top_group_profit(s, s[:3], 1), "profits must have shape"),
    ],
)
def test_bad_options_are_named(measure, message):
    with pytest.raises(ValueError, match=message):
        measure(*tied_scores())
