from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxref import metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "survey_metrics.npz")
IMAGES = PEER["images"]


class TestPairs:
    def test_psnr_matches_scikit_image(self):
        ours = metrics.peak_signal_to_noise_ratio(*IMAGES)
        np.testing.assert_allclose(ours, PEER["psnr"], rtol=1e-5)
        bytes_ = metrics.peak_signal_to_noise_ratio(*(255 * IMAGES), max_value=255)
        np.testing.assert_allclose(bytes_, PEER["psnr"], rtol=1e-5)
        assert metrics.peak_signal_to_noise_ratio(IMAGES[0], IMAGES[0]) == np.inf

    def test_ssim_matches_scikit_image(self):
        ssim = jax.jit(
            metrics.structural_similarity_map,
            static_argnames=("window_size", "sigma", "reflect", "max_value"),
        )
        gaussian = ssim(*IMAGES)
        np.testing.assert_allclose(gaussian, PEER["ssim_gaussian"], atol=1e-5)
        even = ssim(*IMAGES, window_size=7, sigma=None)
        np.testing.assert_allclose(even, PEER["ssim_even"], atol=1e-5)
        whole = ssim(*IMAGES, window_size=7, sigma=None, reflect=True)
        assert whole.shape == IMAGES[0].shape
        np.testing.assert_allclose(whole[3:-3, 3:-3], even, atol=1e-5)
        batch = np.stack([IMAGES, IMAGES[::-1]])
        mean = jax.jit(metrics.structural_similarity)(*batch)
        np.testing.assert_allclose(mean, np.full(2, gaussian.mean()), rtol=1e-5)
        bytes_ = ssim(*(255 * IMAGES), max_value=255)
        np.testing.assert_allclose(bytes_, gaussian, atol=1e-5)

    def test_edges_and_bad_input(self):
        image = IMAGES[0]
        for a in (image, np.zeros_like(image), np.ones_like(image)):
            ours = metrics.structural_similarity(a, a)
            np.testing.assert_allclose(ours, 1, rtol=1e-4)
        half = image.astype(jnp.bfloat16)
        assert metrics.structural_similarity(half, image).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match="window_size must be odd and at most 12"):
            metrics.structural_similarity(image, image, window_size=4)
        with pytest.raises(ValueError, match="targets must have shape"):
            metrics.peak_signal_to_noise_ratio(image, image[:2])
        with pytest.raises(ValueError, match=r"predictions must have shape \[..., height"):
            metrics.peak_signal_to_noise_ratio(image[0], image[0])
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            metrics.structural_similarity(image.astype(int), image)


class TestSets:
    def test_frechet_distance_matches_the_matrix_root(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(30, 4)), rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4)) + 1
        covariances = [np.cov(x, rowvar=False) for x in (a, b)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = np.sum((a.mean(0) - b.mean(0)) ** 2)
        expected += np.trace(covariances[0] + covariances[1] - 2 * root)
        np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-9)
        assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
        few = metrics.frechet_distance(a[:2], b)  # a covariance of rank one
        assert np.isfinite(few)
        one = metrics.frechet_distance(a[:, :1], 2 * a[:, :1])
        np.testing.assert_allclose(one, a[:, 0].mean() ** 2 + a[:, 0].var(ddof=1), rtol=1e-9)
        with pytest.raises(ValueError, match="features must have shape"):
            metrics.frechet_distance(a[:1], b)
        with pytest.raises(ValueError, match="features must have shape"):
            metrics.frechet_distance(a[:, :2], b)

    def test_inception_score(self):
        p = np.random.default_rng(0).dirichlet(np.ones(5), size=20)
        mean = p.mean(0)
        expected = np.exp(np.mean([np.sum(row * np.log(row / mean)) for row in p]))
        np.testing.assert_allclose(metrics.inception_score(p), expected, rtol=1e-12)
        np.testing.assert_allclose(metrics.inception_score(np.stack([p, p])), [expected] * 2)
        with pytest.raises(ValueError, match="probabilities must be in"):
            metrics.inception_score(-p)
        with pytest.raises(ValueError, match="probabilities must have shape"):
            metrics.inception_score(p[:0])
