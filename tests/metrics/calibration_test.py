from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.metrics import brier_score_loss

from jaxref import losses, metrics

PEERS = np.load(Path(__file__).parents[1] / "oracles" / "calibration.npz")
ERRORS = {
    "ece": metrics.expected_calibration_error,
    "kolmogorov_smirnov": metrics.kolmogorov_smirnov_calibration_error,
    "mmce": metrics.maximum_mean_calibration_error,
    "kernel_density": metrics.kernel_density_calibration_error,
    "brier": metrics.brier_score,
    "log_loss": metrics.log_loss,
}


def sampled(n, seed=0, sharpness=1.0):
    """Logits and labels that follow softmax(logits / sharpness)."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(n, 5))
    gumbel = rng.gumbel(size=(n, 5))
    return (sharpness * logits).astype("f"), np.argmax(logits + gumbel, axis=-1)


def by_mass(confidence, correct, bins):
    parts = zip(*(np.array_split(x[np.argsort(confidence)], bins) for x in (confidence, correct)))
    return sum(abs(c.sum() - a.sum()) for c, a in parts) / len(confidence)


class TestNumbers:
    def test_errors_match_torchmetrics_netcal_and_the_authors(self):
        norms = {"l1": 1, "l2": 2, "max": np.inf}

        @jax.jit
        def errors(p, y):
            of_bins = {
                f"{name}_{bins}": metrics.expected_calibration_error(p, y, num_bins=bins, norm=norm)
                for bins in (5, 15)
                for name, norm in norms.items()
            }
            return of_bins | {
                "classwise_25": metrics.classwise_calibration_error(p, y, num_bins=25),
                "kolmogorov_smirnov": metrics.kolmogorov_smirnov_calibration_error(p, y),
                "mmce": metrics.maximum_mean_calibration_error(p, y),
                "kernel_density": metrics.kernel_density_calibration_error(p, y),
            }

        ours = errors(PEERS["probabilities"], PEERS["labels"])
        # where there are no examples, the peer's integral over the kernels keeps its last value
        kernel_density = ours.pop("kernel_density")
        np.testing.assert_allclose(kernel_density, PEERS["kernel_density"], rtol=1e-3)
        for name, error in ours.items():
            np.testing.assert_allclose(error, PEERS[name], rtol=1e-5)
        eager = metrics.expected_calibration_error(PEERS["probabilities"], PEERS["labels"])
        np.testing.assert_allclose(eager, PEERS["l1_15"], rtol=1e-5)

    def test_groups_of_equal_mass_are_those_of_array_split(self):
        p, y = PEERS["probabilities"], PEERS["labels"]
        confidence, correct = p.max(-1), p.argmax(-1) == y
        for bins in (1, 15, 200, 300):
            ours = metrics.expected_calibration_error(p, y, num_bins=bins, binning="mass")
            np.testing.assert_allclose(ours, by_mass(confidence, correct, bins), rtol=1e-4)
        each = [by_mass(p[:, k], y == k, 8) for k in range(4)]
        ours = metrics.classwise_calibration_error(p, y, num_bins=8, binning="mass")
        np.testing.assert_allclose(ours, np.mean(each), rtol=1e-5)

    def test_intervals_are_closed_above(self):
        p = np.array([0.0, 0.25, 0.5, 0.75, 1.0], "f")
        curve = metrics.reliability_curve(p, np.ones(5), num_bins=4)
        assert curve.num_examples.tolist() == [2, 1, 1, 1]
        np.testing.assert_allclose(curve.confidence, [0.125, 0.5, 0.75, 1.0])
        assert curve.accuracy.tolist() == [1, 1, 1, 1]

    def test_mmce_is_the_double_sum(self):
        rng = np.random.default_rng(0)
        c, a = rng.random(50).astype("f"), rng.random(50) < 0.6
        for bandwidth in (0.05, 0.4):
            r = a - np.float64(c)
            kernel = np.exp(-abs(c[:, None] - np.float64(c)) / bandwidth)
            expected = np.sqrt(r @ kernel @ r) / 50
            ours = metrics.maximum_mean_calibration_error(c, a, bandwidth=bandwidth)
            np.testing.assert_allclose(ours, expected, rtol=1e-4)

    def test_brier_score_matches_scikit_learn(self):
        p, y = PEERS["probabilities"], PEERS["labels"]
        expected = np.mean(((p - np.eye(4)[y]) ** 2).sum(-1))
        np.testing.assert_allclose(metrics.brier_score(p, y), expected, rtol=1e-5)
        binary = metrics.brier_score(p[:, 0], y == 0)
        np.testing.assert_allclose(binary, brier_score_loss(y == 0, p[:, 0]), rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("calibration-benchmark")
    def test_measures_agree_on_calibration_and_rank_models_alike(self):
        """(1) Of a calibrated model all errors go to 0 with the examples; (2) bins only cancel:
        one bin gives the least error, each example its own the most; at a constant confidence
        every error is the difference from the accuracy; (3) temperature scaling mends logits that
        are too sure; (4) the number of bins hardly changes the order of models."""
        size = 3000

        @jax.jit
        def padded_suite(logits, labels, where):
            p = jax.nn.softmax(logits)
            return metrics.calibration_suite(p, labels, bins=(15, 25), where=where)

        def suite(logits, labels):  # of any number of examples, compiled once
            where = np.arange(size) < len(labels)
            return padded_suite(np.resize(logits, (size, 5)), np.resize(labels, size), where)

        small, large = suite(*sampled(200)), suite(*sampled(size))
        for name in ("ECE_15", "ECE_em_15", "cwCE_15", "cwCE_em_15", "KSCE", "KDECE", "MMCE"):
            assert large[name] < 0.05
            assert large[name] < small[name]

        logits, labels = sampled(200, sharpness=3.0)
        p = jax.nn.softmax(logits)
        confidence, correct = np.max(p, -1), np.argmax(p, -1) == labels
        for binning in ("width", "mass"):
            ece = [
                metrics.expected_calibration_error(p, labels, num_bins=m, binning=binning)
                for m in (1, 10)
            ]
            np.testing.assert_allclose(ece[0], abs(np.mean(confidence - correct)), rtol=1e-4)
            assert ece[0] <= ece[1] + 1e-6
        most = metrics.expected_calibration_error(p, labels, num_bins=200, binning="mass")
        np.testing.assert_allclose(most, np.abs(confidence - correct).mean(), rtol=1e-4)
        constant, came = np.full(200, 0.8, "f"), np.arange(200) % 2
        for name in ("ece", "kolmogorov_smirnov", "mmce", "kernel_density"):
            np.testing.assert_allclose(ERRORS[name](constant, came), 0.3, rtol=2e-3)
        np.testing.assert_allclose(
            metrics.expected_calibration_error(constant, came, norm=np.inf), 0.3, rtol=1e-5
        )

        scaled = losses.temperature_scale(logits, losses.fit_temperature(logits, labels))
        before, after = suite(logits, labels), suite(scaled, labels)
        for name in ("ECE_15", "ECE_em_25", "KSCE", "KDECE", "MMCE", "NLL", "Brier"):
            assert after[name] < before[name]

        models = [sampled(200, seed, sharpness=1 + seed / 10) for seed in range(20)]
        suites = [suite(*model) for model in models]
        ranks = [[float(s[f"ECE_{m}"]) for s in suites] for m in (15, 25)]
        assert kendalltau(*ranks).statistic > 0.85

    def test_the_suite_has_all_columns_of_the_data_set(self):
        logits, labels = sampled(50)
        suite = jax.eval_shape(
            lambda p, y: metrics.calibration_suite(p, y, bins=(5, 10)), logits, labels
        )
        names = [f"{n}_{m}" for m in (5, 10) for n in ("ECE", "MCE", "ECE_em", "cwCE", "cwCE_em")]
        assert set(suite) == {*names, "KSCE", "KDECE", "MMCE", "NLL", "Brier"}
        default = metrics.calibration_suite.__kwdefaults__["bins"]
        assert 5 * len(default) == 45  # the 90 before and after scaling


@pytest.mark.parametrize("name", ERRORS)
class TestContract:
    def test_masked_examples_count_for_nothing(self, name):
        p, y = PEERS["probabilities"][:40], PEERS["labels"][:40]
        where = np.arange(40) % 3 > 0
        poisoned = np.where(where[:, None], p, np.nan).astype("f")
        error = jax.jit(ERRORS[name])
        ours = error(poisoned, np.where(where, y, 99), where=where)
        np.testing.assert_allclose(ours, error(p[where], y[where]), rtol=1e-4)
        assert error(p, y, where=np.zeros(40, bool)) == 0
        assert ERRORS[name](p[:0], y[:0]) == 0

    def test_leading_axes_types_and_vmap(self, name):
        p, y = PEERS["probabilities"][:40], PEERS["labels"][:40]
        error = jax.jit(ERRORS[name])
        expected = error(p, y)
        folded = error(p.reshape(4, 10, 4), y.reshape(4, 10))
        np.testing.assert_allclose(folded, expected, rtol=1e-5)
        each = jax.jit(jax.vmap(ERRORS[name]))(p.reshape(2, 20, 4), y.reshape(2, 20))
        np.testing.assert_allclose(each[1], error(p[20:], y[20:]), rtol=1e-5)
        assert error(jnp.asarray(p, jnp.bfloat16), y).dtype == jnp.float32

    def test_nan_and_unknown_labels_are_not_hidden(self, name):
        p, y = PEERS["probabilities"][:6], PEERS["labels"][:6].copy()
        broken = p.copy()
        broken[2] = np.nan
        y_unknown = np.where(np.arange(6) == 3, 4, y)
        error = jax.jit(ERRORS[name])
        assert np.isnan(error(broken, y))
        assert np.isnan(error(p, y_unknown))

    def test_sure_predictions_are_finite(self, name):
        p, error = np.array([0.0, 1.0, 1.0, 0.0], "f"), jax.jit(jax.value_and_grad(ERRORS[name]))
        for y in (np.zeros(4), np.ones(4), np.array([0, 1, 1, 0])):
            value, gradient = error(p, y.astype("f"))
            assert np.isfinite(value)
            chex.assert_tree_all_finite(gradient)

    def test_bad_input_is_named(self, name):
        p, y = PEERS["probabilities"], PEERS["labels"]
        with pytest.raises(ValueError, match="labels must have shape"):
            ERRORS[name](p, y[:3])
        with pytest.raises(ValueError, match="where must broadcast"):
            ERRORS[name](p, y, where=np.ones(3, bool))
        with pytest.raises(TypeError, match="probabilities must have a floating-point type"):
            ERRORS[name](y, y)


class TestPlot:
    def test_reliability_is_drawn_for_bins_with_examples(self):
        curve = metrics.reliability_curve(np.array([0.9, 0.8, 0.3], "f"), np.array([1, 0, 0]))
        ax = metrics.plot_reliability(curve)
        assert metrics.plot_reliability(curve, ax=ax) is ax
        assert len(ax.collections[1].get_offsets()) == 3
        assert ax.get_ylabel() == "accuracy"
        empty = metrics.ReliabilityCurve(*np.zeros((3, 5)))
        with pytest.raises(ValueError, match="curve must have examples"):
            metrics.plot_reliability(empty)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, y: metrics.expected_calibration_error(p, y, num_bins=0), "num_bins must be"),
        (lambda p, y: metrics.expected_calibration_error(p, y, binning="x"), "binning must be"),
        (lambda p, y: metrics.expected_calibration_error(p, y, norm=0.5), "norm must be"),
        (
            lambda p, y: metrics.maximum_mean_calibration_error(p, y, bandwidth=0.0),
            "bandwidth must be in",
        ),
        (
            lambda p, y: metrics.kernel_density_calibration_error(p, y, bandwidth=0.0),
            "bandwidth must be in",
        ),
        (lambda p, y: metrics.kernel_density_calibration_error(p, y, num_points=0), "num_points"),
        (lambda p, y: metrics.classwise_calibration_error(p[:, 0], y), "labels must have shape"),
    ],
)
def test_arguments_out_of_range_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(PEERS["probabilities"], PEERS["labels"])
