import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import metrics


class TestEnsemble:
    """The marked claim, on log loss, is in tests/losses/imbalance_test.py."""

    def test_means_match_numpy(self):
        p = np.random.default_rng(0).random((3, 4, 2)).astype("f")
        ensemble = jax.jit(metrics.ensemble_probability)
        np.testing.assert_allclose(ensemble(p), p.mean(0), rtol=1e-6)
        weights = np.array([1.0, 0.0, 3.0], "f")
        ours = metrics.ensemble_probability(p, weights=weights)
        np.testing.assert_allclose(ours, np.average(p, axis=0, weights=weights), rtol=1e-6)
        ours = metrics.ensemble_probability(p, weights=weights, space="logit")
        logit = np.average(np.log(p / (1 - p)), axis=0, weights=weights)
        np.testing.assert_allclose(ours, 1 / (1 + np.exp(-logit)), rtol=1e-5)

    def test_sure_members_are_finite(self):
        for space in ("probability", "logit"):
            loss = lambda p: metrics.ensemble_probability(p, space=space).sum()
            value, gradient = jax.value_and_grad(loss)(jnp.array([[0.0, 1.0], [1.0, 1.0]]))
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
        half = metrics.ensemble_probability(jnp.ones((2, 3), jnp.bfloat16))
        assert half.dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        p = np.full((2, 3), 0.5, "f")
        with pytest.raises(ValueError, match="weights must have shape"):
            metrics.ensemble_probability(p, weights=np.ones(3))
        with pytest.raises(ValueError, match="weights must be in"):
            metrics.ensemble_probability(p, weights=np.array([-1.0, 2.0]))
        with pytest.raises(ValueError, match="the sum of weights must be"):
            metrics.ensemble_probability(p, weights=np.zeros(2))
        with pytest.raises(ValueError, match="space must be"):
            metrics.ensemble_probability(p, space="log")
        with pytest.raises(ValueError, match="probabilities must have shape"):
            metrics.ensemble_probability(p[:0])
        with pytest.raises(TypeError, match="probabilities must have a floating-point type"):
            metrics.ensemble_probability(np.ones((2, 3), int))


class TestVideo:
    def test_frames_that_count_are_averaged_within_the_limit(self):
        frames = np.array([[0.2, 0.4, np.nan], [1.0, 1.0, 1.0], [0.9, 0.9, 0.9]], "f")
        where = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
        ours = jax.jit(metrics.video_probability)(frames, where)
        np.testing.assert_allclose(ours, [0.3, 0.99, 0.5], rtol=1e-6)
        free = metrics.video_probability(frames[1], limit=0.0)
        assert free == 1
        assert metrics.video_probability(frames[:, :0]).tolist() == [0.5] * 3

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="limit must be in"):
            metrics.video_probability(np.ones(3, "f"), limit=0.6)
        with pytest.raises(ValueError, match="where must broadcast"):
            metrics.video_probability(np.ones(3, "f"), np.ones(2, bool))
        with pytest.raises(TypeError, match="frame_probabilities must have"):
            metrics.video_probability(np.ones(3, int))
