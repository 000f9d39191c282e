import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref import losses


def random_pixels(shape=(2, 5, 4), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(*shape, classes))).astype(np.float32)
    return logits, rng.integers(classes, size=shape)


def cross_entropy(logits, labels):
    return np.asarray(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


class TestTopK:
    @pytest.mark.parametrize(("fraction", "count"), [(0.1, 4), (0.26, 10), (1.0, 40), (1e-6, 1)])
    def test_is_the_mean_of_the_largest_losses(self, fraction, count):
        logits, labels = random_pixels()
        hardest = np.sort(cross_entropy(logits, labels).ravel())[-count:]
        run = lambda z: losses.topk_cross_entropy(z, labels, fraction=fraction)
        value, gradient = jax.jit(jax.value_and_grad(run))(logits)
        np.testing.assert_allclose(value, hardest.mean(), rtol=1e-5)
        chosen = cross_entropy(logits, labels) >= hardest.min()
        softmax = np.asarray(jax.nn.softmax(logits)) - np.eye(3)[labels]
        expected = np.where(chosen[..., None], softmax / count, 0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)

    def test_a_mask_changes_how_many_they_are(self):
        logits, labels = random_pixels()
        where = np.arange(5)[:, None] < 2
        kept = losses.topk_cross_entropy(logits[:, :2], labels[:, :2], fraction=0.25)
        ours = losses.topk_cross_entropy(logits, labels, fraction=0.25, where=where)
        np.testing.assert_allclose(ours, kept, rtol=1e-6)

    def test_class_weights_and_axis(self):
        logits, labels = random_pixels()
        weights = np.array([1.0, 2.0, 0.5])
        expected = (weights[labels] * cross_entropy(logits, labels)).mean()
        ours = losses.topk_cross_entropy(
            np.moveaxis(logits, -1, 1), labels, fraction=1.0, class_weights=weights, axis=1
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_without_pixels(self):
        assert losses.topk_cross_entropy(jnp.zeros((0, 3)), jnp.zeros(0, int)) == 0

    def test_fraction_out_of_range_raises(self):
        with pytest.raises(ValueError, match="fraction must be in"):
            losses.topk_cross_entropy(*random_pixels(), fraction=0.0)


class TestDistanceWeighted:
    def test_matches_the_formula_and_is_cross_entropy_far_from_boundaries(self):
        logits, labels = random_pixels()
        proximity = losses.boundary_proximity_map(labels == 1, axes=(1, 2))
        ours = losses.distance_weighted_cross_entropy(logits, labels, proximity)
        np.testing.assert_allclose(ours, (1 + proximity) * cross_entropy(logits, labels), rtol=1e-5)
        plain = losses.distance_weighted_cross_entropy(logits, labels, 0.0)
        np.testing.assert_allclose(plain, cross_entropy(logits, labels), rtol=1e-5)

    def test_focal_loss_at_gamma_zero_is_cross_entropy_too(self):
        logits, labels = random_pixels()
        focal = losses.focal_loss(logits, labels, gamma=0.0)
        np.testing.assert_allclose(focal, losses.softmax_cross_entropy(logits, labels), rtol=1e-5)

    def test_shapes_that_do_not_match_raise(self):
        logits, labels = random_pixels()
        with pytest.raises(ValueError, match="proximity must broadcast"):
            losses.distance_weighted_cross_entropy(logits, labels, np.ones((2, 5, 3)))
