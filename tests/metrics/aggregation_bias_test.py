from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import f1_score

from jaxref import losses, metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "bleu.npz")


def sentences(name):
    return [[int(token) for token in row if token >= 0] for row in PEER[name]]


def accuracy(statistics):
    return statistics[..., 0] / jnp.maximum(statistics[..., 1], 1)


class TestNumbers:
    def test_bleu_of_corpus_and_sentences_matches_sacrebleu(self):
        statistics = metrics.bleu_statistics(sentences("candidates"), sentences("references"))
        corpus = metrics.bleu_from_statistics(statistics.sum(axis=0))
        np.testing.assert_allclose(corpus, PEER["corpus"], rtol=1e-5)
        each = metrics.bleu_from_statistics(statistics, smoothing=1.0)
        np.testing.assert_allclose(each, PEER["sentences"], rtol=1e-5, atol=1e-7)
        expected = metrics.bleu(
            sentences("candidates"), [[reference] for reference in sentences("references")]
        )
        np.testing.assert_allclose(corpus, expected, rtol=1e-5)

    def test_pooled_and_averaged_f1_are_those_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        y, predicted, groups = rng.random(60) < 0.3, rng.random(60) < 0.3, rng.integers(4, size=60)
        counts = metrics.binary_counts(predicted, y, axis=())
        assert counts.shape == (60, 3)
        bias = jax.jit(lambda *a: metrics.simpsons_bias(metrics.f1_from_counts, *a, num_groups=6))
        result = bias(counts, groups)  # two groups have no members
        each = [f1_score(y[groups == t], predicted[groups == t]) for t in range(4)]
        np.testing.assert_allclose(result.population, f1_score(y, predicted), rtol=1e-6)
        np.testing.assert_allclose(result.average, np.mean(each), rtol=1e-6)
        np.testing.assert_allclose(result.bias, np.mean(each) - f1_score(y, predicted), atol=1e-6)
        by_size = metrics.simpsons_bias(
            metrics.f1_from_counts, counts, groups, num_groups=4, weights="size"
        )
        sizes = np.bincount(groups)
        np.testing.assert_allclose(by_size.average, np.average(each, weights=sizes), rtol=1e-6)

    @pytest.mark.parametrize("weights", ["uniform", "size"])
    def test_the_second_order_is_the_delta_method_for_a_ratio(self, weights):
        rng = np.random.default_rng(0)
        values, groups = rng.random((90, 2)) + 1, rng.integers(9, size=90)
        ratio = lambda s: s[..., 0] / s[..., 1]
        result = metrics.simpsons_bias(
            ratio, values.astype("f"), groups, num_groups=9, weights=weights
        )
        sizes = np.bincount(groups)
        sums = np.stack([values[groups == t].sum(0) for t in range(9)])
        share, x = (np.full(9, 1 / 9), sums) if weights == "uniform" else (
            sizes / 90, sums / sizes[:, None]
        )  # fmt: skip
        a, b = share @ x
        cov = (x - share @ x).T @ (share[:, None] * (x - share @ x))
        expected = (a / b * cov[1, 1] - cov[0, 1]) / b**2
        np.testing.assert_allclose(result.second_order, expected, rtol=1e-3)


class TestClaims:
    @pytest.mark.claim("simpsons-bias")
    def test_averaged_f1_is_another_metric_than_that_of_the_whole(self):
        """(1) Means have no bias, and averages of F1 turn the order of two models round; (2) the
        bias of random batches falls like one over their size, as the second order says; (3) a Dice
        loss of each example trains to a worse F1 than that of the batch."""
        right = np.array([[1, 1], [0, 1], [1, 1], [1, 1]], "f")
        means = metrics.simpsons_bias(
            accuracy, right, np.array([0, 0, 0, 1]), num_groups=2, weights="size"
        )
        np.testing.assert_allclose(means.bias, 0, atol=1e-7)

        one = np.array([[1, 0, 0], [50, 0, 50]], "f")  # of 1 and of 100 positives
        two = np.array([[0, 0, 1], [90, 0, 10]], "f")
        first, second = (
            metrics.simpsons_bias(metrics.f1_from_counts, x, np.arange(2), num_groups=2)
            for x in (one, two)
        )
        assert first.average > second.average + 0.3
        assert first.population < second.population - 0.2

        rng = np.random.default_rng(0)
        y = rng.random(2**16) < 0.3
        predicted = np.where(rng.random(2**16) < 0.8, y, rng.random(2**16) < 0.3)
        counts = metrics.binary_counts(predicted, y, axis=())
        biases = []
        for batch in (16, 64):
            result = metrics.simpsons_bias(
                metrics.f1_from_counts, counts, np.arange(2**16) // batch, num_groups=2**16 // batch
            )
            biases.append(result.bias)
        np.testing.assert_allclose(result.second_order, result.bias, rtol=0.2)
        slope = np.log(biases[1] / biases[0]) / np.log(4)
        assert -1.4 < slope < -0.7

        labels = (rng.random(1500) < 0.05).astype("f")
        x = rng.normal(size=(1500, 2)).astype("f") + 1.5 * labels[:, None]
        optimizer = optax.adam(0.1)

        def trained_f1(axes):
            def loss(w):
                p = jax.nn.sigmoid(x @ w[:2] + w[2])
                return losses.dice_loss(p, labels, smooth=0.01, reduce_axes=axes).mean()

            def step(carry, _):
                w, state = carry
                update, state = optimizer.update(jax.grad(loss)(w), state)
                return (w + update, state), None

            run = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=100)[0][0])
            w = run(jnp.zeros(3))
            return metrics.f1_score(x @ w[:2] + w[2] > 0, labels)

        assert trained_f1(None) > trained_f1(()) + 0.1


class TestContract:
    def test_groups_without_statistics_are_reported(self):
        counts = np.array([[0, 0, 0], [1, 1, 0], [0, 0, 0], [2, 0, 0]], "f")
        for empty in (0.0, 1.0):
            result = metrics.simpsons_bias(
                lambda s: metrics.f1_from_counts(s, empty=empty),
                counts,
                np.array([0, 1, 2, 3]),
                num_groups=4,
            )
            assert result.empty_fraction == 0.5
            np.testing.assert_allclose(result.average, (2 * empty + 2 / 3 + 1) / 4, rtol=1e-6)

    def test_stray_ids_are_not_hidden(self):
        counts = np.ones((3, 3), "f")
        for stray in (-1, 2):
            result = metrics.simpsons_bias(
                metrics.f1_from_counts, counts, np.array([0, 1, stray]), num_groups=2
            )
            assert np.isnan(result.population)
            assert np.isnan(result.average)

    def test_bleu_without_matches_or_tokens_is_0(self):
        statistics = metrics.bleu_statistics([[1, 2], []], [[3, 4], [1]])
        assert metrics.bleu_from_statistics(statistics, smoothing=1.0).tolist() == [0, 0]
        gradient = jax.grad(lambda s: metrics.bleu_from_statistics(s).sum())(jnp.zeros((2, 10)))
        assert np.all(np.isfinite(gradient))
        assert metrics.bleu_statistics([], []).shape == (0, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"statistics": np.zeros((0, 3))}, ValueError, "statistics must have shape"),
        ({"group_ids": np.zeros(3, int)}, ValueError, "group_ids must have shape"),
        ({"group_ids": np.zeros(2)}, TypeError, "group_ids must be integers"),
        ({"num_groups": 0}, ValueError, "num_groups must be in"),
        ({"weights": "x"}, ValueError, "weights must be"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    good = {"statistics": np.ones((2, 3), "f"), "group_ids": np.zeros(2, int), "num_groups": 1}
    with pytest.raises(error, match=message):
        metrics.simpsons_bias(metrics.f1_from_counts, **(good | arguments))


def test_bad_bleu_input_is_named():
    with pytest.raises(ValueError, match="references must be as many"):
        metrics.bleu_statistics([[1]], [])
    with pytest.raises(ValueError, match="max_order must be"):
        metrics.bleu_statistics([[1]], [[1]], max_order=0)
    with pytest.raises(ValueError, match="statistics must have shape"):
        metrics.bleu_from_statistics(np.ones(3))
    with pytest.raises(ValueError, match="smoothing must be in"):
        metrics.bleu_from_statistics(np.ones(10), smoothing=-1.0)
