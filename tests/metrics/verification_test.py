import jax
import numpy as np
import pytest

from jaxref import metrics

RANGE = (0.05, 0.4)


def clusters(spreads, number=6, seed=0):
    """Classes about orthogonal directions, with a spread for each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(spreads)), number)
    e = np.eye(12)[labels] + np.repeat(spreads, number)[:, None] * rng.normal(
        size=(len(labels), 12)
    )
    return e.astype("f"), labels


def literal(e, labels, false_accept_range, number, c, epsilon):
    """Pair by pair, in float64."""
    e = np.float64(e) / np.linalg.norm(e, axis=1, keepdims=True)
    n = len(e)
    pairs = [(i, j, e[i] @ e[j]) for i in range(n) for j in range(i)]
    negatives = [s for i, j, s in pairs if labels[i] != labels[j]]
    d_max, d_min = np.quantile(negatives, 1 - np.array(false_accept_range))
    thresholds = np.linspace(d_min, d_max, number)
    curves = []
    for k in sorted(set(labels)):
        within = np.array([s for i, j, s in pairs if labels[i] == k == labels[j]])
        between = np.array([s for i, j, s in pairs if (labels[i] == k) != (labels[j] == k)])
        if len(within) == 0:
            continue
        psi = (within >= thresholds[:, None]).mean(1)
        phi = (between < thresholds[:, None]).mean(1)
        curves.append((1 + c**2) * phi * psi / np.maximum(c**2 * phi + psi, 1e-300))
    curves = np.array(curves)
    squares = (curves - curves.mean(0)) ** 2
    width = d_max - d_min
    of_class = np.trapezoid(squares, thresholds, axis=1) / width
    worst = np.argsort(np.trapezoid(curves, thresholds, axis=1))
    worst = worst[: int(np.ceil(epsilon * len(curves)))]
    return of_class.mean(), of_class[worst].mean()


@jax.jit
def scores(e, labels, where, c):
    options = {"false_accept_range": RANGE, "num_thresholds": 20, "c": c, "where": where}
    return (
        metrics.operating_point_inconsistency_score(e, labels, **options),
        metrics.epsilon_opis(e, labels, epsilon=0.4, **options),
    )


class TestOpis:
    @pytest.mark.parametrize("c", [1.0, 2.0])
    def test_matches_all_pairs_one_by_one(self, c):
        e, labels = clusters([0.1, 0.3, 0.5, 0.4])
        labels[-1] = 7  # a class of one is a stranger to the others alone
        found = scores(e, 3 * labels, np.ones(24, bool), c)
        np.testing.assert_allclose(found, literal(e, labels, RANGE, 20, c, 0.4), rtol=1e-4)
        few = scores(e, labels, np.arange(24) < 18, c)
        np.testing.assert_allclose(few, literal(e[:18], labels[:18], RANGE, 20, c, 0.4), rtol=1e-4)

    def test_grows_with_unequal_spread_and_is_0_for_alike_classes(self):
        everything = np.ones(24, bool)
        angles = np.array([-0.2, -0.13, 0.0, 0.06, 0.21, 0.3])  # no two differences are equal
        quarters = angles + np.pi / 2 * np.arange(4)[:, None]  # one figure, four times
        alike = np.stack([np.cos(quarters), np.sin(quarters)], axis=-1).reshape(24, 2).astype("f")
        labels = np.repeat(np.arange(4), 6)
        # Cosines come in fours, equal but for rounding: neither end may fall on one of 216.
        between = (11.5 / 215, 83.5 / 215)
        for score in (metrics.operating_point_inconsistency_score, metrics.epsilon_opis):
            found = score(alike, labels, false_accept_range=between)
            np.testing.assert_allclose(found, 0, atol=1e-9)
        growing = [
            scores(clusters([0.15, 0.15, 0.15, wide])[0], labels, everything, 1.0)[0]
            for wide in (0.15, 0.35, 0.7)
        ]
        assert np.all(np.diff(growing) > 0)

    def test_curves_of_classes_that_cannot_be_judged_and_bad_input(self):
        e, labels = clusters([0.1, 0.3])
        one = scores(np.tile(e, (2, 1)), np.zeros(24, int), np.ones(24, bool), 1.0)
        assert np.all(np.isnan(one))
        nothing = scores(np.tile(e, (2, 1)), np.arange(24) // 2, np.zeros(24, bool), 1.0)
        assert np.all(np.isnan(nothing))
        equal = scores(np.ones((24, 12), "f"), np.arange(24) // 2, np.ones(24, bool), 1.0)
        assert np.all(np.isfinite(equal))
        score = metrics.operating_point_inconsistency_score
        for options, message in (
            ({"false_accept_range": (0.1, 0.01)}, "ascending order"),
            ({"false_accept_range": (0.1, 1.1)}, "false_accept_range must be in"),
            ({"num_thresholds": 1}, "num_thresholds must be in"),
            ({"c": 0.0}, "c must be in"),
        ):
            with pytest.raises(ValueError, match=message):
                score(e, labels, **options)
        with pytest.raises(ValueError, match="epsilon must be in"):
            metrics.epsilon_opis(e, labels, epsilon=0.0)
        with pytest.raises(ValueError, match=r"embeddings must have shape \[n, features\]"):
            score(e[0], labels)
        with pytest.raises(ValueError, match="labels must have shape"):
            score(e, labels[1:])
        with pytest.raises(TypeError, match="labels must be integer ids"):
            score(e, e[:, 0])
        with pytest.raises(TypeError, match="embeddings must have a floating-point type"):
            score(labels[:, None], labels)
        with pytest.raises(ValueError, match=r"similarities must have shape \[n, n\]"):
            metrics.class_utility_curves(e[:, :3], labels, e[0], num_classes=2)
        with pytest.raises(ValueError, match=r"thresholds must have shape \[t\]"):
            metrics.class_utility_curves(e @ e.T, labels, e, num_classes=2)
