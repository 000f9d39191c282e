from functools import partial

import numpy as np
import pytest
import scipy.optimize

from jaxref.analysis.scaling_laws.downstream import (
    downstream_log_law,
    downstream_loss_law,
    fit_downstream_log_law,
    fit_downstream_loss_law,
    plot_downstream_law,
    pretraining_value_report,
    translation_alignment_score,
)

TOKENS = 10.0 ** np.linspace(7.5, 10.5, 7)
SCORES = downstream_log_law(TOKENS, -10.0, 2.0, 0.8)
LOSSES = downstream_loss_law(TOKENS, 1.2, 50.0, 0.2)


def literal_score(tokens, log_a, alpha, beta):
    return np.array([np.log(np.exp(log_a) * d**alpha) ** beta for d in tokens])


def literal_loss(tokens, e, a, alpha):
    return np.array([e + a / d**alpha for d in tokens])


def huber_sum(predictions, observations, delta):
    r = np.abs(np.log(predictions) - np.log(observations))
    return np.sum(np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)))


class TestLaws:
    def test_match_the_formulas(self):
        np.testing.assert_allclose(SCORES, literal_score(TOKENS, -10.0, 2.0, 0.8), rtol=1e-9)
        np.testing.assert_allclose(LOSSES, literal_loss(TOKENS, 1.2, 50.0, 0.2), rtol=1e-12)
        outside = downstream_log_law([1e-9, 1e9], -10.0, 2.0, 0.5)
        np.testing.assert_allclose(outside, [1e-3, np.sqrt(2 * np.log(1e9) - 10)], rtol=1e-6)
        each = downstream_log_law(1e9, -10.0, 2.0, np.array([0.5, 1.0]))
        np.testing.assert_allclose(each, (2 * np.log(1e9) - 10) ** np.array([0.5, 1.0]))

    def test_alignment_matches_the_formula(self):
        source, target = np.array([0.2, 0.6, 0.0]), np.array([0.3, 0.4, 0.0])
        expected = [0.06 + 0.14 + 0.24, 0.24 + 0.42 + 0.32, 0.0]
        np.testing.assert_allclose(translation_alignment_score(source, target), expected)


@pytest.mark.parametrize(
    ("fit", "literal", "start", "clean", "delta"),
    [
        (fit_downstream_log_law, literal_score, (-8.0, 1.5, 1.0), SCORES, 0.01),
        (fit_downstream_loss_law, literal_loss, (1.0, 30.0, 0.15), LOSSES, 0.005),
    ],
)
class TestFits:
    def test_no_other_optimizer_finds_less(self, fit, literal, start, clean, delta):
        noise = np.random.default_rng(0).normal(size=7)
        observations = clean * np.exp(0.02 * noise)
        found = fit(TOKENS, observations, huber_delta=delta)
        np.testing.assert_allclose(found.predictions, literal(TOKENS, *found.params), rtol=1e-6)
        expected = np.log(found.predictions) - np.log(observations)
        np.testing.assert_allclose(found.residuals, expected, atol=1e-12)
        assert np.abs(found.residuals).max() > delta  # so that both parts of the loss count
        ours = huber_sum(found.predictions, observations, delta)

        def objective(theta):
            with np.errstate(invalid="ignore"):
                predictions = literal(TOKENS, theta[0], *np.exp(theta[1:]))
            bad = not np.all(predictions > 0)
            return 1e3 if bad else huber_sum(predictions, observations, delta)

        theirs = scipy.optimize.minimize(
            objective,
            (start[0], *np.log(start[1:])),
            method="Nelder-Mead",
            options={"maxiter": 5000, "maxfev": 5000, "xatol": 1e-9, "fatol": 1e-14},
        )
        assert ours <= theirs.fun * (1 + 1e-4)
        assert ours < 0.9 * huber_sum(clean, observations, delta)

    def test_takes_the_smallest_tokens_in_any_order_and_any_unit(
        self, fit, literal, start, clean, delta
    ):
        del literal, delta
        observations = clean.copy()
        observations[5:] *= 1.5  # which are not fitted
        order = np.array([3, 6, 0, 5, 1, 4, 2])
        found = fit(TOKENS[order], observations[order], num_fit=5)
        np.testing.assert_array_equal(found.tokens, TOKENS)
        np.testing.assert_array_equal(found.observations, observations)
        np.testing.assert_allclose(found.predictions, clean, rtol=1e-4)
        np.testing.assert_allclose(found.prediction_error, clean[5:].mean() / 2, rtol=1e-3)
        assert (found.num_fit, found.converged) == (5, True)
        in_billions = fit(TOKENS / 1e9, clean)
        np.testing.assert_allclose(in_billions.predictions, clean, rtol=1e-6)
        one_start = fit(TOKENS, clean, initial_grid=[start])
        np.testing.assert_allclose(one_start.predictions, clean, rtol=1e-3)

    def test_flat_and_opposite_curves_stay_finite(self, fit, literal, start, clean, delta):
        del literal, start, delta
        flat = fit(TOKENS, np.full(7, 3.0))
        np.testing.assert_allclose(flat.predictions, 3.0, rtol=1e-3)
        opposite = fit(TOKENS, clean[::-1])  # no parameters are of such a curve: the best is flat
        assert np.all(np.isfinite(opposite.params))
        assert np.ptp(opposite.predictions) < 0.01 * opposite.predictions.mean()
        steps = fit(
            TOKENS, np.array([1e-3, 1e-3, 1, 1, 1, 1e3, 1e3])[:: -1 if clean is LOSSES else 1]
        )
        assert np.all(np.isfinite(steps.predictions))

    def test_bad_input_is_named(self, fit, literal, start, clean, delta):
        del literal, start, delta
        name = "losses" if clean is LOSSES else "scores"
        for arguments, options, message in (
            ((TOKENS, clean[:3]), {}, rf"{name} must have shape \(7,\)"),
            ((TOKENS, -clean), {}, f"{name} must be in"),
            ((0 * TOKENS, clean), {}, "tokens must be in"),
            ((TOKENS[:2], clean[:2]), {}, "at least three different"),
            (([1e8, 1e8, 1e9], clean[:3]), {}, "at least three different"),
            ((TOKENS, clean), {"num_fit": 2}, "at least three different"),
            ((TOKENS, clean), {"num_fit": 8}, r"num_fit must be in \[0, 7\]"),
            ((TOKENS, clean), {"huber_delta": 0.0}, "huber_delta must be in"),
            ((TOKENS, clean), {"initial_grid": [(1.0, 1.0)]}, "initial_grid must have shape"),
            ((TOKENS, clean), {"initial_grid": [(1.0, -1.0, 1.0)]}, "initial_grid must be in"),
            ((TOKENS[None], clean[None]), {}, r"tokens must have shape \[points\]"),
        ):
            with pytest.raises(ValueError, match=message):
                fit(*arguments, **options)


class TestClaims:
    @pytest.mark.claim("downstream-scaling-law")
    def test_few_pretrainings_predict_more_unless_scores_and_loss_part_ways(self):
        """Four small pretrainings give the law back and predict ten times the tokens of the largest
        one; an outlier moves the fit far less than least squares; and of scores that rise and then
        fall, while the loss falls as its law says, the report finds that the data is misaligned."""
        far = 10 * TOKENS
        scores = partial(downstream_log_law, far)
        losses = partial(downstream_loss_law, far)
        for log_a, alpha, beta in ((-10.0, 2.0, 1.0), (-500.0, 60.0, 0.5), (-3.0, 0.3, 2.0)):
            y = downstream_log_law(TOKENS, log_a, alpha, beta)
            found = fit_downstream_log_law(TOKENS, y, num_fit=4)
            np.testing.assert_allclose(scores(*found.params), scores(log_a, alpha, beta), rtol=1e-3)
            assert found.prediction_error < 1e-3 * y.mean()
        for e, a, alpha in ((1.2, 50.0, 0.2), (0.5, 3.0, 0.05), (2.0, 1e5, 0.7)):
            y = downstream_loss_law(TOKENS, e, a, alpha)
            found = fit_downstream_loss_law(TOKENS, y, num_fit=4)
            np.testing.assert_allclose(losses(*found.params), losses(e, a, alpha), rtol=1e-3)
        linear = downstream_log_law(TOKENS, -10.0, 2.0, 1.0)
        np.testing.assert_allclose(np.diff(linear), np.log(10.0), rtol=1e-9)  # of √10 times D
        assert np.all(np.diff(LOSSES) < 0)
        np.testing.assert_allclose(downstream_loss_law(1e60, 1.2, 50.0, 0.2), 1.2, rtol=1e-6)
        shares = np.array([[0.5, 0.5], [1, 0], [0, 1], [0, 0]]).T
        np.testing.assert_allclose(translation_alignment_score(*shares), [1.0, 0.7, 0.8, 0.0])

        corrupted = LOSSES.copy()
        corrupted[3] *= 1.3
        robust = fit_downstream_loss_law(TOKENS, corrupted)
        squares = scipy.optimize.least_squares(
            lambda theta: np.log(literal_loss(TOKENS, *np.exp(theta))) - np.log(corrupted),
            np.log([1.2, 50.0, 0.2]),
        )
        off = [
            np.abs(losses(*params) / losses(1.2, 50.0, 0.2) - 1).max()
            for params in (robust.params, np.exp(squares.x))
        ]
        assert off[0] < 0.2 * off[1]

        noise = np.exp(0.003 * np.random.default_rng(0).normal(size=7))
        useful = pretraining_value_report(TOKENS, SCORES * noise, LOSSES * noise, num_fit=4)
        assert useful.verdict == "useful"
        falling = SCORES * np.array([1, 1, 1, 1, 0.94, 0.88, 0.8])
        parted = pretraining_value_report(TOKENS, falling, LOSSES, num_fit=4)
        assert (parted.verdict, parted.losses_fall) == ("misaligned", True)
        assert parted.loss_fit.prediction_error < 1e-6


class TestReport:
    def test_numbers_and_verdicts(self):
        scores = np.array([20.0, 24.0, 23.4, 25.0])
        tokens, losses = TOKENS[:4], np.array([3.0, 2.0, 2.1, 1.5])
        report = partial(pretraining_value_report, tokens, scores, losses)
        found = report()
        np.testing.assert_allclose(found.score_drop, 0.6 / 24)
        expected = np.abs(found.score_fit.predictions - scores).mean() / scores.mean()
        np.testing.assert_allclose(found.score_error, expected)
        assert (found.verdict, found.losses_fall) == ("misaligned", False)
        assert report(tolerance=0.05).verdict == "useful"
        assert report(tolerance=0.05, baseline_score=24.0).verdict == "useful"
        assert report(tolerance=0.05, baseline_score=25.0).verdict == "unneeded"
        jump = np.array([20.0, 20.1, 20.2, 40.0])  # rises, but not as the law says
        found = pretraining_value_report(tokens, jump, losses, num_fit=3)
        assert (found.verdict, found.score_drop) == ("misaligned", 0.0)
        with pytest.raises(ValueError, match="tolerance must be in"):
            report(tolerance=-0.1)
        with pytest.raises(ValueError, match="baseline_score must be in"):
            report(baseline_score=-1.0)

    def test_plots_the_law_and_both_kinds_of_points(self):
        fit = fit_downstream_loss_law(TOKENS, LOSSES, num_fit=4)
        ax = plot_downstream_law(fit)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), fit.predictions)
        assert [len(points.get_offsets()) for points in ax.collections] == [4, 3]
        assert plot_downstream_law(fit._replace(num_fit=7), ax=ax) is ax
        assert len(ax.collections) == 3


def test_bad_numbers_are_named():
    for call, message in (
        (lambda: downstream_log_law([0.0], 1.0, 1.0, 1.0), "pretraining_tokens must be in"),
        (lambda: downstream_log_law([1.0], 1.0, 1.0, 0.0), "beta must be in"),
        (lambda: downstream_log_law([1.0], np.inf, 1.0, 1.0), "log_a must be in"),
        (lambda: downstream_loss_law([1.0], 1.0, -1.0, 1.0), "a must be in"),
        (lambda: translation_alignment_score(1.2, 0.0), "source_share must be in"),
        (lambda: translation_alignment_score(0.7, 0.7), "a sum of at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
