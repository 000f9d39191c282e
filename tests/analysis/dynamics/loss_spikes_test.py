import numpy as np
import pytest

from jaxref.analysis import divergence_rate, loss_spike_score


def score64(losses, window, deviations):
    """Step by step, of finite losses."""
    spikes = [
        losses[t] > losses[t - window : t].mean() + deviations * losses[t - window : t].std()
        for t in range(window, len(losses))
    ]
    return np.mean(spikes)


class TestLossSpikeScore:
    @pytest.mark.parametrize(("window", "deviations"), [(1, 7.0), (5, 2.0), (20, 1.5), (59, 0.5)])
    def test_matches_a_loop(self, window, deviations):
        losses = np.random.default_rng(0).gamma(0.3, size=(2, 3, 60))
        ours = loss_spike_score(losses, window, deviations=deviations)
        expected = [[score64(run, window, deviations) for run in runs] for runs in losses]
        np.testing.assert_allclose(ours, expected)
        if window < 59:
            assert np.all((ours > 0) & (ours < 1))

    def test_neither_noise_nor_learning_counts_but_what_stands_out_does(self):
        rng = np.random.default_rng(0)
        losses = 2 + np.exp(-np.arange(500) / 100) + 0.02 * rng.normal(size=500)
        assert loss_spike_score(losses, 50) == 0
        losses[[100, 200, 300]] += 1.0
        np.testing.assert_allclose(loss_spike_score(losses, 50), 3 / 450)
        assert loss_spike_score(-losses, 50) == 0

    def test_flat_losses_have_none_whatever_they_are(self):
        for value in (0.1, 1e30, 0.0):
            losses = np.full(40, value)
            assert loss_spike_score(losses, 7) == 0
            losses[20] += 1e-3 * (value or 1)
            np.testing.assert_allclose(loss_spike_score(losses, 7), 1 / 33)

    def test_losses_that_are_not_finite_are_spikes_and_spoil_no_window(self):
        losses = np.full(20, 2.0)
        losses[[8, 9]] = np.nan, np.inf
        assert loss_spike_score(losses, 4) == 2 / 16
        losses[15] = 3.0
        assert loss_spike_score(losses, 4) == 3 / 16
        losses[:3] = np.nan
        assert loss_spike_score(losses, 4) == 3 / 16
        assert loss_spike_score(np.full(20, np.nan), 4) == 1

    def test_bad_input_is_named(self):
        for window in (0, 10):
            with pytest.raises(ValueError, match=r"window must be in \[1, 9\]"):
                loss_spike_score(np.ones(10), window)
        with pytest.raises(ValueError, match="deviations must be in"):
            loss_spike_score(np.ones(10), 3, deviations=0)
        with pytest.raises(ValueError, match=r"losses must have shape \[\.\.\., steps\], got \(\)"):
            loss_spike_score(1.0, 3)


class TestDivergenceRate:
    def test_counts_the_runs_that_end_high_or_not_at_all(self):
        losses = np.full((2, 5, 7), 2.0)
        losses[0, 0, 3] = np.nan  # recovers
        losses[0, 1, -1] = np.nan
        losses[0, 2, -1] = np.inf
        losses[0, 3, 4:] = 3.1
        losses[1, :, -1] = 3.0  # no more than the threshold
        np.testing.assert_array_equal(divergence_rate(losses, 3.0), [0.6, 0.0])

    def test_bad_input_is_named(self):
        for losses in (np.ones(3), np.ones((0, 3)), np.ones((3, 0))):
            with pytest.raises(ValueError, match=r"losses must have shape \[\.\.\., runs, steps\]"):
                divergence_rate(losses, 1.0)
        with pytest.raises(ValueError, match="threshold must be in"):
            divergence_rate(np.ones((2, 3)), np.nan)
