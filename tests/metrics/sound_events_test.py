import chex
import numpy as np
import pytest
from sklearn.metrics import f1_score

from jaxref import metrics


def random_activity(shape=(2, 11, 3), seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=shape), rng.uniform(size=shape) < 0.2


def segments(x, frames):
    """Any activity in each segment, one by one; the last is shorter."""
    starts = range(0, x.shape[1], frames)
    return np.stack([x[:, start : start + frames].any(axis=1) for start in starts], axis=1)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_f1_matches_scikit_learn(self):
        p, y = random_activity()
        for frames, threshold in ((1, 0.5), (4, 0.8)):
            ours = self.variant(
                lambda p, y, frames=frames, threshold=threshold: metrics.segment_based_f1(
                    p, y, frames_per_segment=frames, threshold=threshold
                )
            )(p, y)
            flat = [segments(x, frames).ravel() for x in (y, p > threshold)]
            np.testing.assert_allclose(ours, f1_score(*flat), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_error_rate_counts_substitutions_deletions_and_insertions(self):
        p, y = random_activity()
        ours = self.variant(
            lambda p, y: metrics.segment_based_error_rate(p, y, frames_per_segment=4, threshold=0.8)
        )(p, y)
        substitutions = deletions = insertions = 0
        predicted, actual = segments(p > 0.8, 4), segments(y, 4)
        for k in np.ndindex(2, 3):
            missed, invented = sum(actual[k] & ~predicted[k]), sum(predicted[k] & ~actual[k])
            substitutions += min(missed, invented)
            deletions += max(0, missed - invented)
            insertions += max(0, invented - missed)
        expected = (substitutions + deletions + insertions) / actual.sum()
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


class TestContract:
    def test_rates_of_all_and_nothing(self):
        _, y = random_activity()
        nothing = np.zeros_like(y)
        rate = lambda p, y: metrics.segment_based_error_rate(p, y, frames_per_segment=2)
        assert rate(y, y) == 0
        assert rate(nothing, y) == 1
        assert rate(nothing, nothing) == 0
        assert rate(y, nothing) == np.inf
        assert metrics.segment_based_f1(nothing, nothing, frames_per_segment=2, empty=1.0) == 1
        assert metrics.segment_based_f1(y, y, frames_per_segment=2) == 1

    def test_masked_frames_are_silent(self):
        p, y = random_activity()
        where = np.arange(11)[:, None] < 8
        for metric in (metrics.segment_based_f1, metrics.segment_based_error_rate):
            kept = metric(p[:, :8], y[:, :8], frames_per_segment=4)
            ours = metric(p, y, frames_per_segment=4, where=where)
            np.testing.assert_allclose(ours, kept, rtol=1e-6)

    @pytest.mark.parametrize("metric", [metrics.segment_based_f1, metrics.segment_based_error_rate])
    def test_bad_input_is_named(self, metric):
        p, y = random_activity()
        with pytest.raises(ValueError, match="targets must have shape"):
            metric(p, y[:1], frames_per_segment=2)
        with pytest.raises(ValueError, match="predictions must have shape"):
            metric(p[0, 0], y[0, 0], frames_per_segment=2)
        with pytest.raises(ValueError, match="frames_per_segment must be in"):
            metric(p, y, frames_per_segment=0)
        with pytest.raises(ValueError, match="threshold must be in"):
            metric(p, y, frames_per_segment=2, threshold=1.0)
