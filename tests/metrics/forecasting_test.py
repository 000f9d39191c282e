from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from jaxref import metrics


def literal(returns, positions, periods_per_year, cost):
    """The metrics of one strategy, period by period in float64."""
    equity, peak, drawdown, held, gains, curve = 1.0, 1.0, 0.0, 0.0, [], []
    for r, p in zip(returns, positions):
        gain = p * r - cost * abs(p - held)
        equity, held = equity * max(1 + gain, 0), p
        peak = max(peak, equity)
        drawdown = max(drawdown, 1 - equity / peak)
        gains.append(gain)
        curve.append(equity)
    annual = equity ** (periods_per_year / len(returns)) - 1
    deviation = np.sqrt(periods_per_year) * np.std(gains, ddof=1)
    ratio = annual / deviation
    return [curve, annual, deviation, drawdown, ratio, annual * abs(annual) / deviation / drawdown]


investment = jax.jit(partial(metrics.investment_metrics, periods_per_year=60, cost=0.002))


class TestInvestment:
    def test_matches_the_period_by_period_account(self):
        rng = np.random.default_rng(0)
        returns, positions = 0.02 * rng.standard_t(4, size=(3, 40)), rng.integers(-1, 2, (3, 40))
        everything = np.ones((3, 40), bool)
        found = investment(returns.astype("f"), positions, where=everything)
        for i in range(3):
            expected = literal(returns[i], positions[i], 60, 0.002)
            for ours, theirs in zip(found, expected):
                np.testing.assert_allclose(ours[i], theirs, rtol=1e-3, atol=1e-5)
        # periods that do not exist are as if they were left out
        where = rng.uniform(size=(3, 40)) < 0.6
        poisoned = np.where(where, returns, np.nan).astype("f")
        found = investment(poisoned, np.where(where, positions, 7), where=where)
        for i in range(3):
            expected = literal(returns[i][where[i]], positions[i][where[i]], 60, 0.002)
            np.testing.assert_allclose(found.equity[i][where[i]], expected[0], rtol=1e-5)
            for ours, theirs in zip(found[1:], expected[1:]):
                np.testing.assert_allclose(ours[i], theirs, rtol=1e-3, atol=1e-5)

    def test_ruin_no_risk_and_no_period(self):
        returns = np.zeros((3, 40), "f")
        returns[0, 3], returns[0, 10] = -2.0, 0.5
        positions, everything = np.ones((3, 40), int), np.ones((3, 40), bool)
        positions[1] = 0
        found = investment(returns, positions, where=everything & (np.arange(3)[:, None] < 2))
        np.testing.assert_array_equal(found.equity[0, 3:], 0)
        assert found.annual_return[0] == -1
        assert found.maximum_drawdown[0] == 1
        np.testing.assert_array_equal(found.equity[1:], 1)
        for ratio in found[1:]:
            np.testing.assert_array_equal(ratio[1:], 0)
        nothing = investment(np.ones((2, 0), "f"), 1)
        np.testing.assert_array_equal(np.stack(nothing[1:]), np.zeros((5, 2)))
        half = jax.eval_shape(investment, jnp.ones((3, 40), jnp.float16), positions)
        assert {x.dtype for x in half} == {jnp.dtype("float16")}

    def test_bad_input_is_named(self):
        loss = metrics.investment_metrics
        with pytest.raises(ValueError, match="periods_per_year must be in"):
            loss(jnp.ones(3), jnp.ones(3), periods_per_year=0)
        with pytest.raises(ValueError, match="cost must be in"):
            loss(jnp.ones(3), jnp.ones(3), periods_per_year=1, cost=-1.0)
        with pytest.raises(ValueError, match="positions must broadcast"):
            loss(jnp.ones(3), jnp.ones(2), periods_per_year=1)
        with pytest.raises(TypeError, match="returns must have a floating-point type"):
            loss(np.ones(3, int), jnp.ones(3), periods_per_year=1)


class TestForecasts:
    def test_scaled_error_is_that_of_the_seasonal_naive_forecast(self):
        rng = np.random.default_rng(0)
        history, targets = rng.normal(size=(2, 12)), rng.normal(size=(2, 5))
        predictions = targets + 0.3 * rng.normal(size=(2, 5))
        error = jax.jit(partial(metrics.mean_absolute_scaled_error, period=3))
        where, known = np.arange(5) < 4, np.arange(12) > 1
        found = error(
            np.where(where, predictions, np.nan).astype("f"),
            targets.astype("f"),
            np.where(known, history, np.nan).astype("f"),
            where=where,
            history_where=known,
        )
        for i in range(2):
            naive = np.mean(abs(history[i, 5:] - history[i, 2:-3]))
            expected = np.mean(abs(predictions - targets)[i, :4]) / naive
            np.testing.assert_allclose(found[i], expected, rtol=1e-5)
        constant = np.ones((2, 5), "f"), np.ones((2, 12), "f")
        naive_is_exact = error(
            constant[0] * [[1.0], [2.0]], *constant, where=where, history_where=known
        )
        np.testing.assert_array_equal(naive_is_exact, [0, np.inf])

    def test_weighted_quantile_loss_matches_scikit_learn(self):
        rng = np.random.default_rng(0)
        targets, quantiles = rng.normal(size=(6, 4)), np.array([0.1, 0.5, 0.9])
        predictions = targets[..., None] + rng.normal(size=(6, 4, 3))
        where = rng.uniform(size=(6, 4)) < 0.7
        loss = jax.jit(metrics.weighted_quantile_loss, static_argnames="axis_name")
        poisoned = np.where(where[..., None], predictions, np.nan)
        found = loss(poisoned.astype("f"), targets.astype("f"), quantiles, where=where)
        y, f = targets[where], predictions[where]
        pinball = [
            sklearn.metrics.mean_pinball_loss(y, f[:, k], alpha=q) for k, q in enumerate(quantiles)
        ]
        np.testing.assert_allclose(found, 2 * np.mean(pinball) / abs(y).mean(), rtol=1e-5)
        shards = jax.vmap(
            lambda f, y, w: loss(f, y, quantiles, where=w, axis_name="shards"), axis_name="shards"
        )(poisoned.astype("f"), targets.astype("f"), where)
        np.testing.assert_allclose(shards, np.full(6, found), rtol=1e-5)
        nothing = loss(poisoned.astype("f"), targets.astype("f"), quantiles, where=where & False)
        assert nothing == 0

    def test_bad_input_is_named(self):
        error, ones = metrics.mean_absolute_scaled_error, jnp.ones((2, 3))
        with pytest.raises(ValueError, match="period must be an integer at least 1"):
            error(ones, ones, ones, period=0)
        with pytest.raises(ValueError, match=r"history must have shape \(2, 3\)"):
            error(ones, ones, jnp.ones((3, 3)))
        with pytest.raises(ValueError, match=r"targets must have shape \(2, 3\)"):
            error(ones, ones[:1], ones)
        loss = metrics.weighted_quantile_loss
        with pytest.raises(ValueError, match=r"quantiles must be in \(0, 1\)"):
            loss(ones, ones[:, 0], [0.1, 0.5, 1.0])
        with pytest.raises(ValueError, match=r"quantiles must have shape \(3,\)"):
            loss(ones, ones[:, 0], [0.1])
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            loss(np.ones((2, 1), int), ones[:, 0], [0.1])
