from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.metrics

from jaxref import losses
from jaxref.metrics import roc_auc

LOSSES = {
    "squared_log_error": losses.squared_log_error,
    "barrier": losses.logarithmic_squared_error,
    "log1p": partial(losses.logarithmic_squared_error, form="log1p"),
    "root": partial(losses.root_mean_squared_log_error, axis=()),
}
each = pytest.mark.parametrize("name", LOSSES)


@cache
def compiled(name):
    def evaluate(predictions, targets, where):
        loss = partial(LOSSES[name], where=where)
        value, vjp = jax.vjp(lambda p: loss(p, targets), predictions)
        return value, vjp(jnp.ones_like(value))[0]

    return jax.jit(evaluate)


def evaluated(name, predictions, targets=None, where=True):
    """Values and gradients of up to twelve entries, by one program for all tests."""
    size = np.size(predictions)
    padded = [
        np.resize(x, 12).astype("f") for x in (predictions, 0 if targets is None else targets)
    ]
    found = compiled(name)(*padded, np.broadcast_to(where, size)[np.arange(12) % size])
    return [np.asarray(x)[:size] for x in found]


class TestNumbers:
    def test_log_errors_match_scikit_learn(self):
        targets, predictions = np.random.default_rng(0).gamma(1.0, 3.0, size=(2, 12))
        value, gradient = evaluated("squared_log_error", predictions, targets)
        np.testing.assert_allclose(
            value.mean(), sklearn.metrics.mean_squared_log_error(targets, predictions), rtol=1e-5
        )
        slope = 2 * (np.log1p(predictions) - np.log1p(targets)) / (1 + predictions)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
        root = jax.jit(losses.root_mean_squared_log_error)(predictions.astype("f"), targets)
        expected = sklearn.metrics.root_mean_squared_log_error(targets, predictions)
        np.testing.assert_allclose(root, expected, rtol=1e-5)

    def test_log_errors_know_ratios_alone_and_cut_at_0(self):
        one_more = np.array([1.0, 2.0, 5.0, 40.0])
        ratio = evaluated("squared_log_error", 3 * one_more - 1, one_more - 1)[0]
        np.testing.assert_allclose(ratio, np.log(3) ** 2, rtol=1e-5)
        value, gradient = evaluated("squared_log_error", [-5.0, -5.0, 1.0], [1.0, -3.0, -3.0])
        np.testing.assert_allclose(value, [np.log(2) ** 2, 0, np.log(2) ** 2], rtol=1e-5)
        assert np.all(gradient[:2] == 0)
        assert gradient[2] > 0

    def test_logarithms_around_the_error_match_the_formulas(self):
        e = np.array([-0.95, -0.5, -0.1, -1e-3, 1e-4, 0.3, 0.49, 0.51, 0.9, 0.99, 0.999, 0.9999])
        value, gradient = evaluated("barrier", e)
        np.testing.assert_allclose(value, -np.log1p(-(e**2)), rtol=3e-5)
        np.testing.assert_allclose(gradient, 2 * e / (1 - e**2), rtol=2e-4)
        value, gradient = evaluated("log1p", 10 * e)
        np.testing.assert_allclose(value, np.log1p(100 * e**2), rtol=1e-5)
        np.testing.assert_allclose(gradient, 20 * e / (1 + 100 * e**2), rtol=1e-5)

    def test_the_barrier_goes_on_as_a_line(self):
        loss = jax.jit(
            jax.value_and_grad(
                lambda e: losses.logarithmic_squared_error(e, jnp.zeros(5), epsilon=0.19).sum()
            )
        )
        e = np.array([0.9 - 1e-4, 0.9 + 1e-4, 1.0, 10.0, -10.0], "f")
        slope = 1.8 / 0.19
        np.testing.assert_allclose(loss(e)[1], slope * np.array([1, 1, 1, 1, -1]), rtol=2e-3)
        expected = -5 * np.log(0.19) + slope * np.sum(abs(e) - 0.9)
        np.testing.assert_allclose(loss(e)[0], expected, rtol=1e-4)


class TestClaims:
    @pytest.mark.claim("logarithmic-mean-squared-error")
    def test_pulls_harder_than_the_squared_error_and_trains_an_autoencoder_sooner(self):
        """One digit is normal: the reconstruction error, and how well it finds the others."""
        e = np.array([0.0, 0.1, -0.1, 0.5, 0.9, -0.9])
        barrier, robust = (evaluated(form, e) for form in ("barrier", "log1p"))
        assert np.all(barrier[0][1:] > e[1:] ** 2)
        assert np.all(robust[0][1:] < e[1:] ** 2)
        assert barrier[0][0] == robust[0][0] == 0
        ratio = barrier[1][1:] / (2 * e[1:])
        np.testing.assert_allclose(ratio, 1 / (1 - e[1:] ** 2), rtol=1e-5)
        np.testing.assert_allclose(ratio[2:4], [1.33, 5.26], rtol=3e-3)

        digits = sklearn.datasets.load_digits()
        images = (digits.data / 16).astype("f")
        ones = images[digits.target == 1]
        normal, test = ones[:100], np.concatenate([ones[100:], images[digits.target != 1][:200]])
        is_other = np.arange(len(test)) >= len(ones) - 100
        rng = np.random.default_rng(0)
        weights = [(0.17 * rng.normal(size=(3, *s))).astype("f") for s in ((64, 8), (8, 64))]
        weights += [np.zeros((3, 1, 8), "f"), np.zeros((3, 1, 64), "f")]

        def reconstructed(w, x):
            return jax.nn.sigmoid(jnp.tanh(x @ w[0] + w[2]) @ w[1] + w[3])

        @jax.jit
        def trained(is_barrier):
            def loss(w):
                out, target = reconstructed(w, normal), jnp.broadcast_to(normal, (3, 100, 64))
                logarithmic = losses.logarithmic_squared_error(out, target)
                return jnp.where(is_barrier, logarithmic, jnp.square(out - target)).mean((1, 2))

            def step(w, _):
                slope = jax.grad(lambda w: loss(w).sum())(w)
                w = jax.tree.map(lambda w, g: w - 5 * g, w, slope)
                return w, jnp.square(reconstructed(w, normal) - normal).mean((1, 2))

            w, errors = jax.lax.scan(step, weights, length=150)
            return errors, jnp.square(reconstructed(w, test) - test).mean(-1)

        (ours, our_scores), (theirs, their_scores) = trained(True), trained(False)
        assert np.all(np.median(ours, axis=1)[20:] < np.median(theirs, axis=1)[20:])
        areas = [np.median([roc_auc(s, is_other) for s in x]) for x in (our_scores, their_scores)]
        assert areas[0] > areas[1] - 0.005


class TestEdges:
    @each
    def test_masks_extremes_and_exact_predictions(self, name):
        sizes = np.array([0.0, 0.5, 1.0, 2.0, 1e4, np.nan])
        where = np.isfinite(sizes)
        for targets in (np.zeros(6), np.where(where, sizes, np.nan)):
            value, gradient = evaluated(name, sizes, targets, where)
            assert np.all(np.isfinite(value))
            assert np.all(np.isfinite(gradient))
            assert value[5] == gradient[5] == 0
        assert np.all(value == 0)
        assert np.all(gradient == 0)

    @each
    def test_half_precision_and_bad_input(self, name):
        loss = LOSSES[name]
        half, ones = np.linspace(0, 2, 12).astype(jnp.bfloat16), np.ones(12, "f")
        ours, wide = (compiled(name)(x, ones, ones > 0)[0] for x in (half, half.astype("f")))
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours.astype("f"), wide.astype(jnp.bfloat16).astype("f"))
        with pytest.raises(ValueError, match="targets must"):
            loss(jnp.ones(3), jnp.ones(2))
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(jnp.ones(3), jnp.ones(3), where=np.ones(2, bool))
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            loss(np.ones(3, int), np.ones(3))

    def test_hyperparameters_out_of_range_raise(self):
        for arguments, message in (
            ({"epsilon": 0.0}, "epsilon must be in"),
            ({"epsilon": 1.0}, "epsilon must be in"),
            ({"form": "log"}, "form must be 'barrier' or 'log1p'"),
        ):
            with pytest.raises(ValueError, match=message):
                losses.logarithmic_squared_error(jnp.ones(2), jnp.ones(2), **arguments)
