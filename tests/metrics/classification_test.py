import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from jaxref import metrics


def random_decisions(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(n) < 0.4, rng.random(n) < 0.4


class TestNumbers:
    def test_log_loss_matches_scikit_learn(self):
        rng = np.random.default_rng(0)
        p, y = rng.dirichlet(np.ones(4), size=20).astype("f"), rng.integers(4, size=20)
        expected = sklearn_metrics.log_loss(y, p, labels=range(4))
        np.testing.assert_allclose(jax.jit(metrics.log_loss)(p, y), expected, rtol=1e-5)
        np.testing.assert_allclose(
            metrics.log_loss(p[:, 0], y == 0), sklearn_metrics.log_loss(y == 0, p[:, 0]), rtol=1e-5
        )

    def test_scores_of_counts_match_scikit_learn(self):
        predicted, y = random_decisions()
        counts = metrics.binary_counts(predicted, y)
        for ours, theirs in (
            (metrics.precision_from_counts, sklearn_metrics.precision_score),
            (metrics.recall_from_counts, sklearn_metrics.recall_score),
            (metrics.f1_from_counts, sklearn_metrics.f1_score),
        ):
            np.testing.assert_allclose(ours(counts), theirs(y, predicted), rtol=1e-6)
        f1 = jax.jit(metrics.f1_score)
        np.testing.assert_allclose(f1(predicted, y), sklearn_metrics.f1_score(y, predicted))
        where = np.arange(40) < 25
        expected = sklearn_metrics.f1_score(y[:25], predicted[:25])
        np.testing.assert_allclose(f1(predicted, y, where=where), expected, rtol=1e-6)

    def test_counts_over_some_axes(self):
        predicted, y = (x.reshape(8, 5) for x in random_decisions())
        by_class = metrics.binary_counts(predicted, y, axis=0)
        assert by_class.shape == (5, 3)
        np.testing.assert_array_equal(by_class.sum(0), metrics.binary_counts(predicted, y))
        each = metrics.binary_counts(predicted, y, axis=())
        np.testing.assert_array_equal(each.sum(0), by_class)
        expected = [sklearn_metrics.f1_score(y[:, k], predicted[:, k]) for k in range(5)]
        np.testing.assert_allclose(metrics.f1_from_counts(by_class), expected, rtol=1e-6)


class TestEdges:
    def test_sure_errors_cost_what_the_limit_says(self):
        sure = np.array([1.0, 0.0], "f")
        ours = metrics.log_loss(sure, np.array([0, 1]), limit=1e-4)
        np.testing.assert_allclose(ours, -np.log(1e-4), rtol=1e-5)
        assert metrics.log_loss(sure, np.array([1, 0])) == 0
        many = metrics.log_loss(np.array([[1.0, 0.0]], "f"), np.array([1]))
        np.testing.assert_allclose(many, -np.log(1e-12), rtol=1e-5)

    def test_nothing_to_find_is_a_convention(self):
        nothing = jnp.zeros(4, bool)
        for empty in (0.0, 1.0):
            assert metrics.f1_score(nothing, nothing, empty=empty) == empty
        assert metrics.f1_score(nothing, nothing, where=nothing) == 0
        assert metrics.f1_score(nothing, ~nothing) == 0
        counts = np.zeros(3, "f")
        assert metrics.precision_from_counts(counts, empty=1.0) == 1
        assert metrics.recall_from_counts(counts) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, y: metrics.log_loss(y, y), TypeError, "probabilities must have"),
        (lambda p, y: metrics.log_loss(p, y[:2]), ValueError, "labels must have shape"),
        (lambda p, y: metrics.log_loss(p, y, limit=0.5), ValueError, "limit must be in"),
        (lambda p, y: metrics.binary_counts(y, y[:2]), ValueError, "must have shape"),
        (lambda p, y: metrics.binary_counts(y, y, axis=1), ValueError, "axis must name"),
        (lambda p, y: metrics.f1_from_counts(y), ValueError, r"counts must have shape"),
        (lambda p, y: metrics.f1_score(y, y, where=y[:2]), ValueError, "where must broadcast"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(np.full(4, 0.5, "f"), np.array([0, 1, 1, 0]))
