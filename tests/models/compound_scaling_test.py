import itertools
import math

import numpy as np
import pytest

from jaxref.models import (
    TINYNET_ANCHORS,
    Multipliers,
    efficientnet_b0_flops,
    fit_tiny_formula,
    inverse_giant_formula,
    scale_channels,
    tiny_formula,
)


class TestChannels:
    @pytest.mark.parametrize(
        ("channels", "width", "expected"),
        [(16, 0.54, 8), (24, 0.75, 24), (112, 0.51, 56), (320, 0.54, 176), (40, 1.0, 40)],
    )
    def test_channels(self, channels, width, expected):
        assert scale_channels(channels, width) == expected

    def test_channels_lose_no_more_than_a_tenth(self):
        for channels in range(1, 400, 7):
            for width in np.linspace(0.05, 2, 40):
                scaled = scale_channels(channels, float(width))
                assert scaled % 8 == 0
                assert scaled >= 0.9 * channels * width
                assert abs(scaled - max(8, channels * width)) <= 8


class TestFormula:
    @pytest.mark.claim("tinynet")
    def test_small_networks_keep_resolution_and_give_up_width(self):
        for c in np.geomspace(0.01, 2, 30):
            r, d, w = tiny_formula(c)
            np.testing.assert_allclose(d * w**2 * r**2, c, rtol=1e-9)
        for anchor in TINYNET_ANCHORS.values():
            np.testing.assert_allclose(tiny_formula(anchor.compression), anchor, rtol=1e-9)
        for variant in "bcde":
            anchor = TINYNET_ANCHORS[variant]
            giant = inverse_giant_formula(
                -math.log(anchor.compression) / math.log(1.2 * 1.1**2 * 1.15**2)
            )
            assert giant.compression == pytest.approx(anchor.compression)
            assert tiny_formula(anchor.compression).width < giant.width
            assert anchor.depth * anchor.resolution**2 > giant.depth * giant.resolution**2

    def test_between_and_beyond_its_anchors(self):
        anchors = [Multipliers(0.5, 1.0, 1.0), Multipliers(1.0, 1.0, 1.0)]  # c = 1/4 and 1
        for order in (anchors, anchors[::-1]):
            assert tiny_formula(0.5, anchors=order).resolution == pytest.approx(0.75)
            assert tiny_formula(0.05, anchors=order).resolution == 0.5
            assert tiny_formula(3.0, anchors=order)[:2] == (1.0, 1.0)

    def test_fit_finds_the_frontier_of_a_known_law(self):
        """Accuracy falls with the distance from r(c) = 0.5 + 0.4 c and d(c) = 0.7 + 0.3 c."""
        rng = np.random.default_rng(0)
        r, d = rng.uniform(0.4, 1, 600), rng.uniform(0.5, 1.1, 600)
        c = rng.uniform(0.05, 1, 600)
        w = np.sqrt(c / (d * r**2))
        off = (r - 0.5 - 0.4 * c) ** 2 + (d - 0.7 - 0.3 * c) ** 2
        accuracy = 0.6 + 0.1 * np.log(c) - off
        configs = [Multipliers(*row) for row in np.stack([r, d, w], axis=-1)]
        formula = fit_tiny_formula(configs, accuracy, efficientnet_b0_flops() * c)
        for at in (0.2, 0.4, 0.6, 0.8):
            fitted = formula(at)
            assert fitted.compression == pytest.approx(at)
            assert abs(fitted.resolution - (0.5 + 0.4 * at)) < 0.06
            assert abs(fitted.depth - (0.7 + 0.3 * at)) < 0.06

    def test_fit_matches_a_literal_gaussian_process(self):
        """At the hyperparameters that maximise the likelihood, found on a grid."""
        rng = np.random.default_rng(1)
        c = np.sort(rng.uniform(0.1, 1, 12))
        r = np.sin(4 * c) + 2 + 0.05 * rng.normal(size=12)
        configs = [Multipliers(float(value), 1.0, 1.0) for value in r]
        formula = fit_tiny_formula(configs, c, c, base_flops=1.0, keep=1.0)
        residual = r - r.mean()

        def posterior(signal, length, noise):
            kernel = lambda a, b: signal**2 * np.exp(-((a[:, None] - b) ** 2) / (2 * length**2))
            gram = kernel(c, c) + noise**2 * np.eye(12)
            loss = residual @ np.linalg.solve(gram, residual) + np.linalg.slogdet(gram)[1]
            mean = kernel(np.array([0.33, 0.71]), c) @ np.linalg.solve(gram, residual) + r.mean()
            return loss, mean

        grid = np.geomspace(0.5, 2, 9)
        fits = [
            posterior(1.2 * s, 0.35 * e, 0.05 * n) for s, e, n in itertools.product(grid, repeat=3)
        ]
        expected = min(fits, key=lambda fit: fit[0])[1]
        ours = [formula(at).resolution for at in (0.33, 0.71)]
        np.testing.assert_allclose(ours, expected, atol=5e-3)

    def test_dominated_networks_are_left_out(self):
        good = [Multipliers(0.5 + 0.05 * i, 1.0, 1.0) for i in range(6)]
        bad = [Multipliers(0.1, 3.0, 1.0)] * 24
        cost = np.array([g.compression for g in good] + [0.5] * 24)
        accuracy = np.array([0.5 + 0.05 * i for i in range(6)] + [0.1] * 24)
        formula = fit_tiny_formula(good + bad, accuracy, cost, base_flops=1.0)
        fitted = formula(good[2].compression)
        np.testing.assert_allclose(fitted, good[2], atol=0.02)


class TestBadInput:
    @pytest.mark.parametrize("compression", [0.0, -1.0, np.inf])
    def test_compression(self, compression):
        with pytest.raises(ValueError, match="compression must be in"):
            tiny_formula(compression)

    def test_anchors(self):
        with pytest.raises(ValueError, match="anchors must have at least one"):
            tiny_formula(0.5, anchors=())
        with pytest.raises(ValueError, match="anchors must differ"):
            tiny_formula(0.5, anchors=[Multipliers(1.0, 1.0, 1.0)] * 2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"keep": 0.0}, r"keep must be in \(0, 1\]"),
            ({"keep": 0.2}, "keep must leave 3 networks at least, got 0.2 of 4"),
            ({"flops": [1.0, 1.0, 1.0]}, r"flops must have shape \(4,\)"),
            ({"flops": [1.0, 1.0, 1.0, 0.0]}, "flops must be in"),
            ({"accuracies": [np.nan] * 4}, "accuracies must be in"),
            ({"base_flops": 0.0}, "base_flops must be in"),
        ],
    )
    def test_fit(self, change, message):
        given = {
            "configs": [Multipliers(1.0, 1.0, 1.0)] * 4,
            "accuracies": [0.1, 0.2, 0.3, 0.4],
            "flops": [1.0, 2.0, 3.0, 4.0],
            "base_flops": 1.0,
            "keep": 1.0,
        }
        with pytest.raises(ValueError, match=message):
            fit_tiny_formula(**(given | change))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: scale_channels(0, 1.0), "channels must be in"),
            (lambda: scale_channels(8, 0.0), "width must be in"),
            (lambda: efficientnet_b0_flops(0.0), "resolution must be in"),
            (lambda: inverse_giant_formula(1.0, alpha=0.0), "alpha must be in"),
        ],
    )
    def test_others(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
