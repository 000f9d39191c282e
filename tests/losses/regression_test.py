from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxref import losses, metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "survey_losses.npz")
FORECASTS = np.load(Path(__file__).parents[1] / "oracles" / "forecasting.npz")
LOSSES = {
    "squared_error": losses.squared_error,
    "absolute_error": losses.absolute_error,
    "absolute_percentage_error": losses.absolute_percentage_error,
    "huber_loss": losses.huber_loss,
    "log_cosh_loss": losses.log_cosh_loss,
    "quantile_loss": lambda *a, **k: losses.quantile_loss(*a, quantile=0.3, **k),
    "poisson_loss": lambda *a, **k: losses.poisson_loss(*a, log_rates=True, **k),
    "smooth_l1_loss": losses.smooth_l1_loss,
    "balanced_l1_loss": losses.balanced_l1_loss,
    "wing_loss": losses.wing_loss,
    "berhu_loss": losses.berhu_loss,
}


def value_and_gradient(loss, predictions, targets):
    value, vjp = jax.vjp(lambda p: loss(p, targets), predictions)
    return value, vjp(jnp.ones_like(value))[0]


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("squared", "squared_error", losses.squared_error),
        ("absolute", "absolute_error", losses.absolute_error),
        ("huber", "huber_loss", lambda p, t: losses.huber_loss(p, t, delta=1.5)),
        ("smooth", "smooth_l1_loss", lambda p, t: losses.smooth_l1_loss(p, t, beta=0.7)),
        ("balanced", "balanced_l1_loss", losses.balanced_l1_loss),
        ("poisson", "poisson_rate", losses.poisson_loss),
        ("poisson_log", "poisson_log_rate", lambda *a: losses.poisson_loss(*a, log_rates=True)),
    )
    def test_values_and_gradients_match_pytorch(self, name, loss):
        arguments = (PEER[f"{name}_prediction"], PEER[f"{name}_target"])
        value, gradient = self.variant(lambda p, t: value_and_gradient(loss, p, t))(*arguments)
        np.testing.assert_allclose(value, PEER[f"{name}_value"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, PEER[f"{name}_gradient"], rtol=2e-5, atol=1e-6)

    def test_log_cosh_is_precise_for_small_and_large_errors(self):
        e = np.array([1e-4, 1e-2, 0.5, 0.99, 1.01, 5.0, 80.0])
        value, gradient = value_and_gradient(losses.log_cosh_loss, e.astype("f"), 0.0)
        np.testing.assert_allclose(value, np.log(np.cosh(e)), rtol=1e-5)
        np.testing.assert_allclose(gradient, np.tanh(e), rtol=1e-5)
        np.testing.assert_allclose(value, optax.losses.log_cosh(e.astype("f")), atol=1e-6)
        curvature = jax.vmap(jax.grad(jax.grad(lambda e: losses.log_cosh_loss(e, 0.0))))
        np.testing.assert_allclose(curvature(jnp.array([0.0, 1.5])), [1, 1 / np.cosh(1.5) ** 2])

    def test_quantile_wing_and_berhu_match_the_formulas(self):
        p, t = PEER["squared_error_prediction"], PEER["squared_error_target"]
        r = np.float64(t) - p
        expected = np.where(r >= 0, 0.3 * r, -0.7 * r)
        value, gradient = value_and_gradient(LOSSES["quantile_loss"], p, t)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, np.where(r >= 0, -0.3, 0.7), rtol=1e-5)
        size, sign = abs(r), -np.sign(r)
        loss = lambda p, t: losses.wing_loss(p, t, width=3.0, curvature=0.5)
        value, gradient = value_and_gradient(loss, p, t)
        constant = 3 - 3 * np.log(1 + 3 / 0.5)
        expected = np.where(size < 3, 3 * np.log(1 + size / 0.5), size - constant)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        expected = sign * np.where(size < 3, 3 / (0.5 + size), 1)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)
        c = 0.2 * size.max()
        value, gradient = value_and_gradient(losses.berhu_loss, p, t)
        expected = np.where(size <= c, size, (size**2 + c**2) / (2 * c))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        expected = sign * np.where(size <= c, 1, size / c)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)

    def test_likelihood_and_both_its_gradients_match_pytorch(self):
        mean, targets, scale = (
            FORECASTS[n].astype("f") for n in ("mean", "nll_targets", "nll_scale")
        )

        @jax.jit
        def evaluated(mean, scale, where):
            loss = lambda m, s: losses.gaussian_negative_log_likelihood(
                m, targets, s, full=True, where=where
            )
            value, vjp = jax.vjp(loss, mean, scale)
            return value, vjp(jnp.ones_like(value))

        value, gradients = evaluated(mean, scale, np.ones(8, bool))
        np.testing.assert_allclose(value, FORECASTS["nll_value"], rtol=1e-5)
        for ours, name in zip(gradients, ("mean", "scale")):
            np.testing.assert_allclose(ours, FORECASTS[f"nll_{name}_gradient"], rtol=1e-4)
        where = np.arange(8) < 5
        poisoned = [np.where(where, x, np.nan) for x in (mean, scale)]
        masked = evaluated(*poisoned, where)
        for ours, expected in zip(jax.tree.leaves(masked), jax.tree.leaves((value, gradients))):
            np.testing.assert_allclose(ours, np.where(where, expected, 0), rtol=1e-5)
        plain = losses.gaussian_negative_log_likelihood(mean[0], targets[0], scale[0])
        np.testing.assert_allclose(plain, value[0] - np.log(2 * np.pi) / 2, rtol=1e-4)

    def test_percentages_biases_and_quantiles_match_scikit_learn(self):
        targets, predictions = FORECASTS["targets"], FORECASTS["predictions"]
        value, gradient = value_and_gradient(
            jax.jit(losses.absolute_percentage_error), predictions.astype("f"), targets
        )
        expected = sklearn.metrics.mean_absolute_percentage_error(targets, predictions)
        np.testing.assert_allclose(value.mean(), expected, rtol=1e-5)
        slope = FORECASTS["percentage_gradient"] * 12
        np.testing.assert_allclose(gradient, slope, rtol=1e-5)
        error = losses.bias_error(predictions.astype("f"), targets)
        np.testing.assert_allclose(error, predictions - targets, rtol=1e-4, atol=1e-6)
        quantiles = np.array([0.1, 0.5, 0.7])
        several = predictions[:, None] * np.array([0.7, 1.0, 1.2])
        loss = jax.jit(losses.multi_quantile_loss)(several.astype("f"), targets, quantiles)
        expected = sum(
            sklearn.metrics.mean_pinball_loss(targets, several[:, k], alpha=q)
            for k, q in enumerate(quantiles)
        )
        np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)
        zero = losses.absolute_percentage_error(jnp.array([0.0, 1.0]), jnp.zeros(2), epsilon=0.5)
        np.testing.assert_allclose(zero, [0, 2])


class TestClaims:
    @pytest.mark.claim("regression-losses-forecasting-survey")
    def test_the_fourteen_losses_hang_together(self):
        """Each is compared with another of them in a limit, on a scale, or at its least value."""
        y = np.random.default_rng(0).gamma(2.0, size=16).astype("f")
        close = {"rtol": 2e-5, "atol": 1e-6}

        @jax.jit
        def fourteen(f, y):
            relative = metrics.normalized_root_mean_squared_error
            return {
                "MAE": losses.absolute_error(f, y).mean(),
                "MSE": losses.squared_error(f, y).mean(),
                "MBE": losses.bias_error(f, y).mean(),
                "RAE": losses.relative_absolute_error(f, y),
                "RSE": losses.relative_squared_error(f, y),
                "MAPE": losses.absolute_percentage_error(f, y).mean(),
                "RMSE": losses.root_mean_squared_error(f, y),
                "MSLE": losses.squared_log_error(f, y).mean(),
                "RMSLE": losses.root_mean_squared_log_error(f, y),
                "NRMSE": jnp.stack([relative(f, y, normalization=n) for n in ("mean", "std")]),
                "RRMSE": losses.relative_root_mean_squared_error(f, y),
                "Huber": losses.huber_loss(f, y, delta=1e4).mean(),
                "Huber of 0": losses.huber_loss(f, y, delta=1e-4).mean() / 1e-4,
                "log-cosh": losses.log_cosh_loss(f, y).mean(),
                "quantile": losses.quantile_loss(f, y).mean(),
            }

        f = (y + np.random.default_rng(1).normal(size=16)).clip(0).astype("f")
        found, scaled = fourteen(f, y), fourteen(7 * f, 7 * y)
        equal = lambda a, b: np.testing.assert_allclose(a, b, **close)
        equal(found["MSE"], found["MBE"] ** 2 + np.var(f - y))
        equal(found["RMSE"] ** 2, found["MSE"])
        equal(found["RMSLE"] ** 2, found["MSLE"])
        equal(found["NRMSE"][1] ** 2, found["RSE"])
        equal(found["RSE"], 1 - metrics.r2_score(f, y))
        equal(found["NRMSE"][0], found["RMSE"] / y.mean())
        equal(found["RRMSE"], found["RMSE"] / np.sqrt(np.mean(f**2)))
        equal(found["RAE"], found["MAE"] / np.mean(abs(y - y.mean())))
        equal(found["Huber"], found["MSE"] / 2)
        np.testing.assert_allclose(found["Huber of 0"], found["MAE"], rtol=1e-3)
        equal(found["quantile"], found["MAE"] / 2)
        for name in ("RAE", "RSE", "MAPE", "NRMSE", "RRMSE"):
            equal(scaled[name], found[name])
        for name, power in {"MAE": 1, "MSE": 2, "MBE": 1, "RMSE": 1}.items():
            np.testing.assert_allclose(scaled[name], 7**power * found[name], rtol=1e-4)
        ratio = fourteen(3 * (1 + f) - 1, 3 * (1 + y) - 1)
        np.testing.assert_allclose(ratio["MSLE"], found["MSLE"], rtol=1e-4)
        of_mean = fourteen(np.full(16, y.mean()), y)
        equal([of_mean["RAE"], of_mean["RSE"], of_mean["NRMSE"][1]], 1)
        small, large = fourteen(y + 1e-2, y), fourteen(y + 1e4, y)
        np.testing.assert_allclose(small["log-cosh"], small["MSE"] / 2, rtol=1e-3)
        np.testing.assert_allclose(large["log-cosh"], large["MAE"] - np.log(2), rtol=1e-6)
        exact = fourteen(y, y)
        assert all(np.all(value == 0) for value in exact.values())

    @pytest.mark.claim("losses-and-metrics-survey")
    def test_the_losses_are_each_others_limits(self):
        """The identities by which the survey's losses hang together."""
        e = np.concatenate([np.linspace(-4, 4, 33), [30.0, -30.0]]).astype("f")
        zero, close = np.zeros_like(e), {"rtol": 1e-5, "atol": 1e-6}
        square, size = losses.squared_error(e, zero), losses.absolute_error(e, zero)
        np.testing.assert_allclose(losses.huber_loss(e, zero, delta=1e6), square / 2, **close)
        np.testing.assert_allclose(losses.quantile_loss(e, zero), size / 2, **close)
        np.testing.assert_allclose(losses.smooth_l1_loss(e, zero, beta=0.0), size, **close)
        huber = losses.huber_loss(e, zero, delta=2.0)
        np.testing.assert_allclose(losses.smooth_l1_loss(e, zero, beta=2.0), huber / 2, **close)
        far = abs(e) > 29
        np.testing.assert_allclose(losses.log_cosh_loss(e, zero)[far], size[far] - np.log(2))
        edge = 6 + np.array([-1e-3, 0, 1e-3, 24], "f")  # 6 = 0.2 · 30 is where berHu changes
        np.testing.assert_allclose(losses.berhu_loss(edge, np.zeros(4))[:3], edge[:3], **close)
        wing = losses.wing_loss(e, zero, width=1e4, curvature=1e4)
        np.testing.assert_allclose(wing, size, rtol=2e-3)
        box, halves = np.array([0.0, 0, 2, 2], "f"), np.array([[0.0, 0, 1, 2], [0, 0, 2, 1]], "f")
        np.testing.assert_allclose(losses.giou_loss(halves, box), losses.iou_loss(halves, box))
        similar = np.array([[1.0, 1, 4, 4], [5, 5, 6, 6]], "f")
        np.testing.assert_allclose(losses.ciou_loss(similar, box), losses.diou_loss(similar, box))
        assert np.all(losses.ciou_loss(halves, box) > losses.diou_loss(halves, box) + 1e-3)
        assert metrics.r2_score(jnp.full(e.shape, e.mean()), e) == pytest.approx(0, abs=1e-6)
        logits, labels = e.reshape(7, 5), np.arange(7) % 5
        log_p = jax.nn.log_softmax(logits)
        np.testing.assert_allclose(
            losses.softmax_cross_entropy(logits, labels),
            losses.negative_log_likelihood(log_p, labels),
            **close,
        )
        two = np.stack([e, zero], axis=-1)
        np.testing.assert_allclose(
            losses.binary_cross_entropy(e, far),
            losses.softmax_cross_entropy(two, 1 - far.astype(int)),
            **close,
        )

    def test_each_loss_is_least_at_its_own_summary_of_the_targets(self):
        targets = np.array([0.0, 1.0, 2.0, 3.0, 14.0], "f")
        grid = np.linspace(0, 15, 301, dtype="f")[:, None]

        def best(loss):
            return grid[np.argmin(np.sum(loss(np.broadcast_to(grid, (301, 5)), targets), -1)), 0]

        assert best(losses.squared_error) == pytest.approx(4, abs=0.03)  # the mean
        assert best(losses.absolute_error) == pytest.approx(2, abs=0.03)  # the median
        quantile = lambda p, t: losses.quantile_loss(p, t, quantile=0.7)
        assert best(quantile) == pytest.approx(3, abs=0.03)
        huber = lambda p, t: losses.huber_loss(p, t, delta=1.5)
        assert 1.5 < best(huber) < 2.5
        assert best(losses.poisson_loss) == pytest.approx(4, abs=0.03)


def batch(shape=(4, 6), seed=0):
    rng = np.random.default_rng(seed)
    return (2 * rng.normal(size=shape)).astype("f"), np.abs(rng.normal(size=shape)).astype("f")


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_mask_shards_and_half_precision(self, name):
        predictions, targets = batch((8, 3))
        where = np.arange(8)[:, None] % 2 == 0
        poisoned = np.where(where, predictions, np.nan).astype("f")
        loss = jax.jit(LOSSES[name])
        value, vjp = jax.vjp(lambda p: LOSSES[name](p, targets, where=where), poisoned)
        np.testing.assert_allclose(value[::2], loss(predictions[::2], targets[::2]), rtol=1e-5)
        assert np.all(value[1::2] == 0)
        (gradient,) = vjp(jnp.ones((8, 3)))
        assert np.all(gradient[1::2] == 0)
        assert np.all(np.isfinite(gradient))
        rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        placed = [jax.device_put(x, rows) for x in (predictions, targets)]
        np.testing.assert_allclose(loss(*placed), loss(predictions, targets), rtol=1e-5)
        half = predictions.astype(jnp.bfloat16)
        assert loss(half, targets).dtype == jnp.bfloat16
        expected = loss(half.astype("f"), targets).astype(jnp.bfloat16)
        np.testing.assert_array_equal(loss(half, targets).view("u2"), expected.view("u2"))
        empty = LOSSES[name](np.zeros((0, 3), "f"), np.zeros((0, 3), "f"))
        assert empty.shape == (0, 3)

    def test_finite_at_equality_and_for_large_errors(self, name):
        sizes = np.array([0.0, 1.0, 20.0 if name == "poisson_loss" else 1e4], "f")
        for targets in (sizes, np.zeros(3, "f")):
            value, gradient = value_and_gradient(LOSSES[name], sizes, targets)
            chex.assert_tree_all_finite((value, gradient))
        if name not in {"poisson_loss", "quantile_loss"}:
            value, gradient = value_and_gradient(LOSSES[name], sizes, sizes)
            assert np.all(value == 0)
            assert np.all(gradient == 0)

    def test_bad_input_is_named(self, name):
        predictions, targets = batch()
        with pytest.raises(ValueError, match="targets must broadcast"):
            LOSSES[name](predictions, targets[:, :2])
        with pytest.raises(ValueError, match="where must broadcast"):
            LOSSES[name](predictions, targets, where=np.ones((4, 5), bool))
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            LOSSES[name](predictions.astype(int), targets)


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        (losses.huber_loss, {"delta": 0.0}, "delta must be in"),
        (losses.absolute_percentage_error, {"epsilon": 0.0}, "epsilon must be in"),
        (losses.quantile_loss, {"quantile": 1.0}, "quantile must be in"),
        (losses.quantile_loss, {"quantile": np.full(4, 0.5)}, "quantile must broadcast"),
        (losses.smooth_l1_loss, {"beta": -1.0}, "beta must be in"),
        (losses.balanced_l1_loss, {"alpha": 0.0}, "alpha must be in"),
        (losses.wing_loss, {"curvature": 0.0}, "curvature must be in"),
        (losses.berhu_loss, {"fraction": 0.0}, "fraction must be in"),
    ],
)
def test_hyperparameters_out_of_range_raise(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(*batch(), **arguments)


def test_bad_input_of_several_quantiles_and_of_scales_is_named():
    predictions, targets = batch((4, 3))
    loss = losses.multi_quantile_loss
    for quantiles in ([0.0, 0.5, 0.9], [0.1, 0.5, 1.5]):
        with pytest.raises(ValueError, match=r"quantiles must be in \(0, 1\)"):
            loss(predictions, targets[:, 0], quantiles)
    with pytest.raises(ValueError, match=r"quantiles must have shape \(3,\)"):
        loss(predictions, targets[:, 0], [0.5])
    with pytest.raises(ValueError, match=r"targets must have shape \(4,\)"):
        loss(predictions, targets, [0.1, 0.5, 0.9])
    with pytest.raises(TypeError, match="predictions must have a floating-point type"):
        loss(predictions.astype(int), targets[:, 0], [0.1, 0.5, 0.9])
    loss = losses.gaussian_negative_log_likelihood
    with pytest.raises(ValueError, match="min_variance must be in"):
        loss(predictions, targets, 1.0, min_variance=0.0)
    with pytest.raises(ValueError, match="scale must broadcast"):
        loss(predictions, targets, np.ones(2))


def test_poisson_edges():
    rates, counts = jnp.array([0.0, 0.0, -1.0, 2.0]), jnp.array([0, 3, 1, 0])
    value, gradient = value_and_gradient(losses.poisson_loss, rates, counts)
    np.testing.assert_array_equal(value, [0, np.inf, np.nan, 2])
    np.testing.assert_array_equal(gradient[::3], [1, 1])
    where = np.array([True, False])
    loss = lambda p: losses.poisson_loss(p, jnp.ones(2), log_rates=True, where=where).sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.array([0.5, jnp.nan])), [np.e**0.5 - 1, 0])


def test_berhu_threshold_is_that_of_all_shards():
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    sharded = jax.shard_map(
        lambda p, t: losses.berhu_loss(p, t, axis_name="data"),
        mesh=rows.mesh,
        in_specs=rows.spec,
        out_specs=rows.spec,
    )
    arguments = batch((8, 3))
    ours = jax.jit(lambda p, t: value_and_gradient(sharded, p, t))(*jax.device_put(arguments, rows))
    expected = value_and_gradient(losses.berhu_loss, *arguments)
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)
