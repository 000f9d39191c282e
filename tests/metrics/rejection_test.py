import jax
import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from jaxref import metrics

curve = jax.jit(metrics.precision_coverage_curve)


def test_curve_matches_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    scores, correct = rng.integers(6, size=40).astype("f"), rng.random(40) < 0.6
    ours = curve(scores, correct)
    precision, _, thresholds = precision_recall_curve(correct, scores)
    for theta, expected in zip(thresholds, precision):
        at = ours.thresholds == theta
        np.testing.assert_allclose(ours.precision[at], expected, rtol=1e-6)
        np.testing.assert_allclose(ours.coverage[at], (scores >= theta).mean(), rtol=1e-6)
    np.testing.assert_array_equal(ours.thresholds, np.sort(scores)[::-1])
    soft = curve(scores, np.full(40, 0.25, "f"))
    np.testing.assert_allclose(soft.precision, 0.25, rtol=1e-6)


def test_missing_outputs_count_for_nothing():
    scores = np.array([0.1, np.nan, 0.9, 0.5, 7.0], np.float32)
    correct, where = np.array([0, 1, 1, 1, 1]), np.array([1, 0, 1, 1, 0], bool)
    ours, expected = curve(scores, correct, where=where), curve(scores[where], correct[where])
    for part, whole in zip(ours, expected):
        np.testing.assert_allclose(part, [*whole, np.nan, np.nan])
    nothing = curve(scores, correct, where=np.zeros(5, bool))
    assert all(np.isnan(part).all() for part in nothing)
    options = {"where": np.zeros(5, bool)}
    assert metrics.coverage_at_precision(scores, correct, precision=0.5, **options) == 0
    assert metrics.rejection_risk(scores, correct, cost=0.5, **options) == 0
    assert metrics.coverage_at_precision(np.zeros(0, "f"), np.zeros(0), precision=0.5) == 0


def test_coverage_at_precision_is_the_largest():
    """The curve may dip below the precision and come back."""
    correct = np.array([1, 0, 1, 1, 1, 0, 0])
    scores = np.arange(7, 0, -1).astype("f")
    for precision, covered in ((1.0, 1), (0.8, 5), (0.75, 5), (0.5, 7), (0.0, 7)):
        ours = metrics.coverage_at_precision(scores, correct, precision=precision)
        np.testing.assert_allclose(ours, covered / 7, rtol=1e-6)
    assert metrics.coverage_at_precision(scores, 1 - correct, precision=0.9) == 0


def test_risk_counts_wrong_and_rejected_outputs():
    scores = np.array([1.0, 2.0, -1.0, 0.0, 3.0], np.float32)
    correct = np.array([True, False, False, True, False])
    np.testing.assert_allclose(metrics.rejection_risk(scores, correct, cost=0.3), 2.6 / 5)
    where = np.array([True, True, True, True, False])
    ours = metrics.rejection_risk(scores, correct, cost=0.3, where=where)
    np.testing.assert_allclose(ours, 1.6 / 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: metrics.rejection_risk(r, True, cost=0.0), ValueError, "cost must be in"),
        (
            lambda r: metrics.precision_coverage_curve(r, True),
            ValueError,
            "correct must have shape",
        ),
        (lambda r: metrics.precision_coverage_curve(r[None], r), ValueError, "must have shape"),
        (
            lambda r: metrics.coverage_at_precision(r, r, precision=1.1),
            ValueError,
            "precision must be in",
        ),
        (
            lambda r: metrics.precision_coverage_curve(r.astype(int), r),
            TypeError,
            "rejection_scores must have",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones(3, np.float32))
