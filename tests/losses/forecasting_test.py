from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "forecasting.npz")
CENTERS = np.array([-2.0, -1.0, 0.5, 1.0, 4.0], "f")
GRID = {"bins": 100, "low": -5.0, "high": 5.0, "special_tokens": 2}
DIRECTIONAL = {
    "mean_absolute_directional_loss": losses.mean_absolute_directional_loss,
    "generalized_mean_absolute_directional_loss": partial(
        losses.generalized_mean_absolute_directional_loss, slope=3.0, exponent=1.5
    ),
}


def value_and_gradient(loss, x, *arguments):
    value, vjp = jax.vjp(lambda x: loss(x, *arguments), x)
    return value, vjp(jnp.ones_like(value))[0]


generalized = jax.jit(
    partial(value_and_gradient, losses.generalized_mean_absolute_directional_loss)
)


def softmax64(logits):
    p = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def autoregressive(seed, outliers=0):
    """Three lags and the next of returns of about 1% that follow each other, heavy-tailed."""
    rng = np.random.default_rng(seed)
    noise = 0.01 * rng.standard_t(4, size=1500)
    returns = np.zeros(1500)
    for t in range(1, 1500):
        returns[t] = 0.2 * returns[t - 1] + noise[t]
    crashes = rng.choice(600, outliers, replace=False)
    returns[crashes] = 0.12
    returns[crashes + 1] = -0.12
    lags = np.lib.stride_tricks.sliding_window_view(returns, 4)
    return lags[:, :3].astype("f"), lags[:, 3].astype("f")


class TestDirectional:
    @pytest.mark.claim("mean-absolute-directional-loss")
    def test_ranks_forecasters_by_what_they_earn_and_the_size_of_errors_does_not(self):
        """AR(1) returns: the forecaster of the smaller error is on the wrong side, and loses."""
        madl = jax.jit(losses.mean_absolute_directional_loss)
        np.testing.assert_allclose(madl(np.array([0.03, -0.01], "f"), 0.01), [-0.01, 0.01])
        lags, r = autoregressive(0)
        right = 0.2 * lags[:, -1]
        # big and right, small and wrong, and the same with another scale
        forecasts = np.stack([20 * right, -0.02 * right, 1e-6 * right, np.sign(r), -r, 0 * r])
        values = np.asarray(madl(forecasts, np.broadcast_to(r, forecasts.shape)))
        np.testing.assert_array_equal(values, -np.sign(forecasts) * r)
        mean, error = values.mean(axis=1), np.square(forecasts - r).mean(axis=1)
        earned = (np.sign(forecasts) * r).mean(axis=1)
        np.testing.assert_allclose(mean, -earned, rtol=1e-5)
        assert error[0] > error[1]
        assert earned[0] > 0 > earned[1]
        assert mean[0] == mean[2] < 0
        np.testing.assert_allclose(mean[3:], [-abs(r).mean(), abs(r).mean(), 0], rtol=1e-5)

    @pytest.mark.claim("directional-loss-transformers")
    def test_trains_a_forecaster_whose_signs_survive_outliers_that_mislead_squared_error(self):
        """Linear forecasters of AR(1) returns, least squares against descent, over five seeds."""
        series = [autoregressive(seed, outliers=4) for seed in range(5)]
        lags, r = (np.stack(x) for x in zip(*series))
        known = slice(0, 700), slice(750, None)
        x, y = lags[:, known[0]], r[:, known[0]]
        squares = np.stack([np.linalg.lstsq(a, b)[0] for a, b in zip(x, y)])

        def loss(w):  # of both starts, as a crash is a wall between the signs
            forecast = jnp.einsum("stl,bsl->bst", 100 * x, w)
            return losses.generalized_mean_absolute_directional_loss(
                forecast, jnp.broadcast_to(y, forecast.shape), slope=100.0
            ).sum(axis=-1)

        @jax.jit
        def trained():
            starts = jnp.array([-1.0, 1.0])[:, None, None] * jnp.array([0.0, 0.0, 1.0])
            step = lambda _, w: w - 0.02 * jax.grad(lambda w: loss(w).sum())(w)
            w = jax.lax.fori_loop(0, 100, step, jnp.broadcast_to(starts, (2, 5, 3)))
            return w[jnp.argmin(loss(w), axis=0), jnp.arange(5)]

        def test_loss(w):
            forecast = np.einsum("stl,sl->st", lags[:, known[1]], w)
            return np.mean(-np.sign(forecast) * r[:, known[1]], axis=1)

        ours, theirs = test_loss(trained()), test_loss(squares)
        assert np.median(theirs) > 0  # a few crashes turned its sign
        assert np.median(ours) < -5e-4
        assert np.sum(ours < theirs) >= 4

    def test_generalized_form_and_its_gradient_match_the_formula(self):
        predicted, observed = np.random.default_rng(0).normal(size=(2, 12))
        observed[0] = predicted[1] = 0
        loss = losses.generalized_mean_absolute_directional_loss
        arguments = predicted.astype("f"), observed.astype("f")
        for slope, exponent in ((3.0, 1.5), (0.5, 0.0), (2.0, 1.0)):
            f = partial(loss, slope=slope, exponent=exponent)
            value, *gradients = jax.jit(
                lambda p, o, f=f: (f(p, o), *jax.grad(lambda *a: f(*a).sum(), (0, 1))(p, o))
            )(*arguments)
            weight = abs(observed) ** exponent
            z = slope * predicted * observed
            np.testing.assert_allclose(
                value, -(1 / (1 + np.exp(-z)) - 0.5) * weight, rtol=1e-5, atol=1e-7
            )
            steepness = slope / 4 / np.cosh(z / 2) ** 2
            expected = -steepness * observed * weight
            np.testing.assert_allclose(gradients[0], expected, rtol=1e-5, atol=1e-7)
            lifted = exponent * np.tanh(z / 2) / 2 / np.where(observed == 0, 1, observed)
            expected = -(steepness * predicted + lifted) * weight
            np.testing.assert_allclose(gradients[1], expected, rtol=1e-4, atol=1e-6)

    def test_generalized_form_is_odd_bounded_and_half_the_plain_in_the_limit(self):
        predicted, observed = np.random.default_rng(1).normal(size=(2, 12)).astype("f")
        sharp = partial(losses.generalized_mean_absolute_directional_loss, slope=1e5)
        plain = jax.jit(partial(value_and_gradient, losses.mean_absolute_directional_loss))
        value, gradient = plain(predicted, observed)
        assert np.all(gradient == 0)
        np.testing.assert_allclose(2 * jax.jit(sharp)(predicted, observed), value, rtol=1e-5)
        value, gradient = generalized(predicted, 0.01 * observed)
        mirrored = generalized(-predicted, 0.01 * observed)
        np.testing.assert_allclose(mirrored[0], -value)
        np.testing.assert_allclose(mirrored[1], gradient, rtol=1e-3)
        assert np.all(generalized(0 * predicted, observed)[1] != 0)  # where training begins
        assert np.all(abs(value) <= 0.005 * abs(observed) + 1e-9)

    @pytest.mark.parametrize("name", DIRECTIONAL)
    def test_masks_types_and_bad_input(self, name):
        loss = DIRECTIONAL[name]
        predicted, observed = np.random.default_rng(2).normal(size=(2, 3, 4)).astype("f")
        where = np.arange(4) < 2
        poisoned = [np.where(where, x, np.nan) for x in (predicted, observed)]
        masked = jax.jit(lambda p, o, w: value_and_gradient(partial(loss, where=w), p, o))
        (value, gradient), expected = masked(*poisoned, where), masked(predicted, observed, True)
        np.testing.assert_allclose(value[:, :2], expected[0][:, :2])
        np.testing.assert_allclose(gradient[:, :2], expected[1][:, :2])
        assert np.all(value[:, 2:] == 0)
        assert np.all(gradient[:, 2:] == 0)
        half = jnp.asarray(1e-4 * predicted, jnp.float16), jnp.asarray(1e-4 * observed, jnp.float16)
        ours = jax.jit(loss)(*half)
        assert ours.dtype == jnp.float16
        wide = loss(*(x.astype(jnp.float32) for x in half)).astype(jnp.float16)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wide))
        with pytest.raises(ValueError, match="observed_returns must broadcast"):
            loss(predicted, observed[:, :2])
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(predicted, observed, where=np.ones(3, bool))
        with pytest.raises(TypeError, match="predicted_returns must have a floating-point type"):
            loss(np.ones(3, int), np.ones(3))

    def test_hyperparameters_out_of_range_raise(self):
        loss = losses.generalized_mean_absolute_directional_loss
        for arguments in ({"slope": 0.0}, {"exponent": -1.0}):
            with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be in"):
                loss(jnp.ones(2), jnp.ones(2), **arguments)


def random_tokens(seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(4, 7))
    return logits.astype("f"), np.array([2, 6, 4, 0]), rng.dirichlet(np.ones(7), size=4).astype("f")


def tokens_loss(p, where=None):
    loss = partial(
        losses.ordinal_wasserstein_loss, bin_centers=CENTERS, p=p, special_tokens=2, where=where
    )
    return partial(value_and_gradient, loss)


class TestWasserstein:
    @pytest.mark.parametrize("p", [1, 2, 1.5])
    def test_one_label_matches_the_formula(self, p):
        logits, labels, _ = random_tokens()
        value, gradient = jax.jit(tokens_loss(p))(logits, labels)
        probabilities = softmax64(logits[:, 2:])
        label = CENTERS[np.maximum(labels - 2, 0)][:, None]
        distance = abs(CENTERS - label) ** p * (labels >= 2)[:, None]
        expected = np.sum(probabilities * distance, axis=1)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        slope = probabilities * (distance - expected[:, None])
        np.testing.assert_allclose(gradient[:, 2:], slope, rtol=1e-4, atol=1e-6)
        assert np.all(gradient[:, :2] == 0)

    @pytest.mark.parametrize("p", [1, 2])
    def test_distributions_match_scipy_and_the_quantile_functions(self, p):
        logits, _, q = random_tokens()
        q[0] = np.eye(7)[5]
        value, gradient = jax.jit(tokens_loss(p))(logits, q)
        probabilities, target = softmax64(logits[:, 2:]), np.float64(q[:, 2:])
        mass = target.sum(-1)
        u = (np.arange(40000) + 0.5) / 40000
        for i in range(4):
            cumulative = np.cumsum(probabilities[i]), np.cumsum(target[i] / mass[i])
            ranks = (np.minimum(np.searchsorted(F, u), 4) for F in cumulative)
            a, b = (CENTERS[rank] for rank in ranks)
            np.testing.assert_allclose(value[i], mass[i] * np.mean(abs(a - b) ** p), rtol=1e-3)
            if p == 1:
                exact = scipy.stats.wasserstein_distance(
                    CENTERS, CENTERS, probabilities[i], target[i] / mass[i]
                )
                np.testing.assert_allclose(value[i], mass[i] * exact, rtol=1e-5)
        ids = jax.jit(tokens_loss(p))(logits, np.array([5, 5, 5, 5]))
        np.testing.assert_allclose(value[0], ids[0][0], rtol=1e-5)
        np.testing.assert_allclose(gradient[0], ids[1][0], rtol=1e-4, atol=1e-6)
        step = 1e-2 * np.random.default_rng(1).normal(size=logits.shape).astype("f")
        ahead, behind = (jax.jit(tokens_loss(p))(logits + s * step, q)[0] for s in (1, -1))
        slope = np.sum(gradient * step, axis=1)
        np.testing.assert_allclose((ahead - behind) / 2, slope, rtol=2e-2, atol=1e-5)

    @pytest.mark.claim("wasserstein-token-forecasting")
    def test_descent_ends_at_the_median_or_mean_where_cross_entropy_finds_the_distribution(self):
        """A skewed law of targets: W1 is least at a point on its median, W2 on its mean."""
        centers = np.linspace(0, 10, 11, dtype="f")
        law = np.array([0.1, 0.2, 0.25, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.1], "f")
        labels = np.arange(11)
        median, mean = 2, round(float(law @ centers))
        assert mean == 4

        @jax.jit
        def trained():
            def loss(z):
                every = [jnp.broadcast_to(row, (11, 11)) for row in z]
                distance = partial(losses.ordinal_wasserstein_loss, bin_centers=centers)
                of_label = (
                    distance(every[0], labels),
                    distance(every[1], labels, p=2),
                    losses.softmax_cross_entropy(every[2], labels),
                )
                return sum(law @ x for x in of_label)

            step = lambda _, z: z - jnp.array([[5.0], [1.0], [3.0]]) * jax.grad(loss)(z)
            z = jax.lax.fori_loop(0, 200, step, jnp.zeros((3, 11)))
            near = losses.ordinal_wasserstein_loss(
                jnp.log(jnp.eye(11)[labels + (1 - 2 * (labels == 10))] + 1e-30), labels, centers
            )
            return jax.nn.softmax(z), near

        (first, second, third), near = trained()
        assert first[median] > 0.9
        assert second[mean] > 0.9
        np.testing.assert_allclose(third, law, atol=1e-2)
        error = lambda forecast: abs(np.subtract.outer(centers, centers)) @ law @ forecast
        assert error(first) < error(second) < error(third)
        crps = lambda forecast: np.sum((np.cumsum(forecast) - np.cumsum(law)) ** 2)
        assert crps(third) < 0.01 * crps(first)
        np.testing.assert_allclose(near, 1, rtol=1e-5)  # one bin off, where cross-entropy is -log 0
        far = np.full((1, 200), -60, "f")
        far[0, [30]] = 0
        distance = jax.jit(partial(losses.ordinal_wasserstein_loss, bin_centers=np.arange(200.0)))
        found = distance(np.broadcast_to(far, (2, 200)), np.array([29, 130]))
        np.testing.assert_allclose(found, [1, 100], rtol=1e-5)
        tokens = losses.softmax_cross_entropy(np.broadcast_to(far, (2, 200)), np.array([29, 130]))
        assert tokens[0] == tokens[1]

    def test_masks_special_and_unknown_tokens_and_extremes(self):
        logits, labels, _ = random_tokens()
        logits[:2] *= 1e4
        logits[3] = np.nan
        labels = np.array([2, 7, -1, 3])
        where = np.arange(4) < 3
        loss = jax.jit(tokens_loss(1, where))
        value, gradient = loss(logits, labels)
        np.testing.assert_array_equal(np.isnan(value), [False, True, True, False])
        assert np.isfinite(value[0])
        assert np.all(np.isfinite(gradient[0]))
        assert value[3] == 0
        assert np.all(gradient[3] == 0)
        half = jnp.asarray(random_tokens()[0], jnp.bfloat16)
        ours, wide = loss(half, labels)[0], loss(np.asarray(half, "f"), labels)[0]
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(ours, "f"), wide.astype(jnp.bfloat16).astype("f"))
        one_bin = jax.jit(losses.ordinal_wasserstein_loss)(
            np.ones((1, 1)), np.zeros(1, int), np.ones(1)
        )
        assert one_bin == 0

    def test_equal_distributions_are_at_0_with_gradient_0(self):
        p = np.array([0.0, 0.3, 0.0, 0.7, 0.0], "f")
        for power in (1, 3):
            distance = partial(losses.discrete_wasserstein, p=power)
            measure = jax.jit(lambda a, b, f=distance: value_and_gradient(f, a, b, CENTERS))
            value, gradient = measure(p, p)
            np.testing.assert_allclose(value, 0, atol=1e-6)
            assert np.all(np.isfinite(gradient))

    def test_bad_input_is_named(self):
        logits, labels, q = random_tokens()
        loss = partial(losses.ordinal_wasserstein_loss, special_tokens=2)
        with pytest.raises(ValueError, match="bin_centers must be in ascending order"):
            loss(logits, labels, CENTERS[::-1])
        with pytest.raises(ValueError, match=r"bin_centers must have shape \[points\]"):
            loss(logits, labels, CENTERS[None])
        with pytest.raises(ValueError, match=r"logits must have shape \(4, 6\)"):
            loss(logits, labels, CENTERS[1:])
        with pytest.raises(ValueError, match="p must be in"):
            loss(logits, labels, CENTERS, p=0.5)
        with pytest.raises(ValueError, match="special_tokens must be an integer at least 0"):
            losses.ordinal_wasserstein_loss(logits, labels, CENTERS, special_tokens=-1)
        with pytest.raises(ValueError, match=r"labels must have shape \(4,\)"):
            loss(logits, labels[:2], CENTERS)
        with pytest.raises(TypeError, match="labels must be integer ids or a distribution"):
            loss(logits, labels > 1, CENTERS)
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            loss(logits.astype(int), labels, CENTERS)
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(logits, labels, CENTERS, where=np.ones(3, bool))
        with pytest.raises(ValueError, match=r"probs_q must have shape \(4, 5\)"):
            losses.discrete_wasserstein(q[:, :5], q[:, :4], CENTERS)
        with pytest.raises(ValueError, match="centers must be in ascending order"):
            losses.discrete_wasserstein(q, q, np.zeros(7) - np.arange(7))
        with pytest.raises(TypeError, match="probs_p must have a floating-point type"):
            losses.discrete_wasserstein(labels, labels, CENTERS[:4])


class TestTokens:
    def test_tokens_match_chronos(self):
        """Whose first bin is the id after the special ones and one more."""
        series = PEER["series"]
        quantize = jax.jit(partial(losses.quantize_series, context=20, **GRID))
        whole = np.concatenate([series, 3 * series[:, :4]], axis=1)
        tokens, scale = quantize(whole, where=~np.isnan(whole))
        peer = np.concatenate([PEER["tokens"], PEER["future_tokens"]], axis=1)
        np.testing.assert_array_equal(tokens, np.where(peer == 0, 0, peer - 1))
        np.testing.assert_allclose(scale, PEER["scale"], rtol=1e-6)
        back = jax.jit(partial(losses.dequantize_series, **GRID))(tokens, scale)
        expected = np.where(np.isnan(series), np.nan, PEER["series_back"])
        np.testing.assert_allclose(back[:, :20], expected, rtol=1e-5, atol=1e-6)

    def test_values_come_back_within_half_a_bin_and_ends_are_cut(self):
        values = np.random.default_rng(0).normal(size=(2, 50)).astype("f")
        values[:, 0] = 1e4, -1e4
        tokens, scale = jax.jit(partial(losses.quantize_series, context=0, **GRID))(values)
        np.testing.assert_array_equal(scale, 1)
        np.testing.assert_array_equal(tokens[:, 0], [101, 2])
        back = jax.jit(partial(losses.dequantize_series, **GRID))(tokens, scale)
        np.testing.assert_allclose(back[:, 1:], values[:, 1:], atol=10 / 99 / 2 + 1e-5)
        half = jnp.zeros((2, 0), jnp.float16)
        nothing = jax.jit(losses.quantize_series)(half)
        assert nothing[0].shape == (2, 0)
        assert nothing[1].dtype == jnp.float32
        np.testing.assert_array_equal(nothing[1], 1)

    def test_bad_input_is_named(self):
        values, scale = jnp.ones((2, 3)), jnp.ones(2)
        for arguments, message in (
            ({"bins": 1}, "bins must be an integer at least 2"),
            ({"special_tokens": -1}, "special_tokens must be an integer at least 0"),
            ({"low": 3.0, "high": 3.0}, "high must be in"),
        ):
            with pytest.raises(ValueError, match=message):
                losses.quantize_series(values, **arguments)
            with pytest.raises(ValueError, match=message):
                losses.dequantize_series(jnp.ones((2, 3), int), scale, **arguments)
        with pytest.raises(ValueError, match="context must be an integer from 0 to 3"):
            losses.quantize_series(values, context=4)
        with pytest.raises(ValueError, match="where must broadcast"):
            losses.quantize_series(values, where=np.ones(2, bool))
        with pytest.raises(TypeError, match="values must have a floating-point type"):
            losses.quantize_series(np.ones(3, int))
        with pytest.raises(TypeError, match="tokens must be integers"):
            losses.dequantize_series(values, scale)
        with pytest.raises(ValueError, match=r"scale must have shape \(2,\)"):
            losses.dequantize_series(jnp.ones((2, 3), int), jnp.ones(3))
