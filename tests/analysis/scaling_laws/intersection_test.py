import numpy as np
import pytest

from jaxref.analysis import scaling_intersection

HOURS = np.array([6.0, 12.0, 24.0, 48.0, 96.0])


def test_recovers_two_power_laws_and_where_they_meet():
    a, b = 5 * HOURS**-0.05, 8 * HOURS**-0.1
    trends = scaling_intersection(HOURS[::-1], a[::-1], HOURS, b)
    np.testing.assert_allclose(trends.coefficients_a, [np.log(5), -0.05], rtol=1e-9)
    np.testing.assert_allclose(trends.coefficients_b, [np.log(8), -0.1], rtol=1e-9)
    np.testing.assert_allclose(trends.hours, (8 / 5) ** 20, rtol=1e-6)
    np.testing.assert_allclose(trends.loss, 5 * trends.hours**-0.05, rtol=1e-6)
    swapped = scaling_intersection(HOURS, b, HOURS, a)
    np.testing.assert_allclose(swapped.hours, trends.hours, rtol=1e-6)


def test_fits_noisy_losses_by_least_squares_and_takes_different_budgets():
    rng = np.random.default_rng(0)
    loss = 5 * HOURS**-0.05 * np.exp(0.01 * rng.normal(size=5))
    trends = scaling_intersection(HOURS, loss, HOURS[:2], 8 * HOURS[:2] ** -0.1)
    level, slope = trends.coefficients_a
    residuals = np.log(loss) - level - slope * np.log(HOURS)
    for power in range(2):
        np.testing.assert_allclose(residuals @ np.log(HOURS) ** power, 0, atol=1e-9)
    assert np.abs(residuals).max() > 1e-3


def test_parallel_trends_never_meet():
    trends = scaling_intersection(HOURS, [3.0] * 5, HOURS, [2.0] * 5)
    assert (trends.hours, trends.loss) == (np.inf, 0.0)


@pytest.mark.parametrize(
    ("hours", "loss", "message"),
    [
        ([6.0], [1.0], "hours_b must hold at least two"),
        ([6.0, 6.0], [1.0, 2.0], "hours_b must hold at least two"),
        ([6.0, 12.0], [1.0], r"loss_b must have shape \(2,\)"),
        ([6.0, 0.0], [1.0, 2.0], "hours_b must be in"),
        ([6.0, 12.0], [1.0, -2.0], "loss_b must be in"),
    ],
)
def test_bad_input_is_named(hours, loss, message):
    with pytest.raises(ValueError, match=message):
        scaling_intersection(HOURS, HOURS, hours, loss)
