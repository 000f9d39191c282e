from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "segmentation.npz")


def weighted(loss):
    """The sum of losses that the stored gradients belong to."""
    return jnp.sum(loss.ravel() * jnp.arange(1.0, loss.size + 1))


def random_pixels(shape=(2, 5, 4), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(*shape, classes))).astype(np.float32)
    return logits, rng.integers(classes, size=shape)


class NumbersTest(chex.TestCase):
    """Against the peers whose numbers tests/oracles/segmentation.py stored."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_hausdorff_matches_monai(self):
        def run(p):
            values = losses.hausdorff_distance_loss(p, PEER["labels"], alpha=1.5)
            return weighted(values), values

        (_, values), gradient = self.variant(jax.value_and_grad(run, has_aux=True))(
            PEER["probabilities"]
        )
        np.testing.assert_allclose(values, PEER["hausdorff"], rtol=1e-5)
        expected = np.moveaxis(PEER["hausdorff_gradient"], 1, -1)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_difference_over_union_matches_the_authors(self):
        """An object of moderate size, and one so large that alpha is cut off at 0.8."""
        loss = lambda p, y: losses.boundary_difference_over_union_loss(p, y, axes=(0, 1))
        run = self.variant(jax.value_and_grad(loss))
        for name, side in (("middling", 12), ("large", 44)):
            y = np.zeros((48, 48), np.float32)
            y[2 : 2 + side, 3 : 3 + side] = 1
            p = np.clip(np.roll(y, 3, axis=0) * 0.9 + 0.05, 0, 1)
            value, gradient = run(p, y)
            np.testing.assert_allclose(value, PEER[f"difference_{name}"], rtol=1e-4)
            expected = PEER[f"difference_{name}_gradient"][0]
            np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-9)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_products_are_their_formulas(self):
        logits, labels = random_pixels()
        softmax = np.asarray(jax.nn.softmax(logits))
        z = np.moveaxis(
            losses.rectified_region_map(np.moveaxis(np.eye(3)[labels], -1, 1), axes=(2, 3)), 1, -1
        )
        ours = self.variant(losses.region_wise_loss)(logits, z)
        np.testing.assert_allclose(ours, (softmax * z).sum(-1), rtol=1e-4, atol=1e-6)
        moved = losses.region_wise_loss(np.moveaxis(logits, -1, 1), np.moveaxis(z, -1, 1), axis=1)
        np.testing.assert_allclose(moved, ours, rtol=1e-5, atol=1e-6)
        entries = self.variant(losses.boundary_loss)(softmax, z)
        np.testing.assert_allclose(entries, softmax * z, rtol=1e-5)
        np.testing.assert_allclose(entries.sum(-1), ours, rtol=1e-4, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_boundary_aware_is_a_binary_cross_entropy_per_bin(self):
        logits, bins = random_pixels(classes=4)
        expected = optax.losses.sigmoid_binary_cross_entropy(logits, np.eye(4)[bins]).sum(-1)
        ours = self.variant(losses.boundary_aware_loss)(logits, bins)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


class TestMeaning:
    def test_the_mask_itself_has_the_least_boundary_loss_of_all_masks(self):
        """All 512 masks of a 3 x 3 grid: no other is below it, and those that tie with it differ
        on pixels of distance 0 alone."""
        truth = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
        distance = losses.signed_distance_map(truth)
        masks = (np.arange(512)[:, None] >> np.arange(9) & 1).reshape(-1, 3, 3).astype(np.float32)
        values = np.asarray(losses.boundary_loss(masks, np.broadcast_to(distance, masks.shape)))
        values = values.sum((1, 2))
        least = (truth * distance).sum()
        assert values.min() == least
        ties = masks[values == least] != truth
        assert np.all(distance[ties.any(0)] == 0)

    def test_far_errors_cost_more_in_hausdorff_distance(self):
        truth = np.zeros((1, 12, 12, 1), np.float32)
        truth[:, 2:5, 2:5] = 1
        run = jax.jit(losses.hausdorff_distance_loss)
        near, far = truth.copy(), truth.copy()
        near[:, 5, 3], far[:, 10, 10] = 1, 1
        assert run(far, truth) > 10 * run(near, truth) > 0
        dice = losses.dice_loss(near, truth), losses.dice_loss(far, truth)
        np.testing.assert_allclose(*dice)
        assert run(truth, truth) == 0

    def test_difference_over_union_of_a_thin_object_is_one_minus_iou(self):
        truth = np.zeros((1, 8, 8, 1), np.float32)
        truth[:, 3, 1:7] = 1
        shifted = np.roll(truth, 2, axis=2)
        ours = losses.boundary_difference_over_union_loss(shifted, truth)
        expected = losses.jaccard_loss(shifted, truth, smooth=0.0)
        np.testing.assert_allclose(ours, [[expected]], rtol=1e-5)

    def test_the_edge_of_an_image_is_a_boundary(self):
        """An object of 10 x 12 across the image: 40 of its 120 pixels are outermost, those at the
        two sides of the image too."""
        truth = np.zeros((1, 12, 12, 1), np.float32)
        truth[:, 1:11] = 1
        alpha = 1 - 2 * 40 / 120
        ours = losses.boundary_difference_over_union_loss(truth / 2, truth, smooth=0.0)
        np.testing.assert_allclose(ours, [[30 / (30 + (1 - alpha) * 60)]], rtol=1e-5)

    def test_a_volume_has_boundaries_too(self):
        truth = np.zeros((1, 6, 6, 6, 1), np.float32)
        truth[:, 1:5, 1:5, 1:5] = 1
        p = 0.8 * truth + 0.1
        # 56 of its 64 pixels are at the boundary, so that alpha is 0
        intersection, squares = 64 * 0.9, 64 * 0.81 + 152 * 0.01
        expected = 1 - intersection / (squares + 64 - intersection)
        ours = losses.boundary_difference_over_union_loss(p, truth)
        np.testing.assert_allclose(ours, [[expected]], rtol=1e-5)
        assert losses.hausdorff_distance_loss(p, truth).shape == (1, 1)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, y: losses.boundary_loss(p, y[:1]), "signed_distance must have shape"),
        (lambda p, y: losses.region_wise_loss(p, y[:1]), "region_map must have shape"),
        (lambda p, y: losses.hausdorff_distance_loss(p, y, alpha=0.0), "alpha must be in"),
        (lambda p, y: losses.hausdorff_distance_loss(p, y, axes=5), "axes must name axes"),
        (
            lambda p, y: losses.boundary_difference_over_union_loss(p, y, smooth=-1.0),
            "smooth must be in",
        ),
        (lambda p, y: losses.boundary_aware_loss(p, np.zeros((2, 5), int)), "labels must have"),
    ],
)
def test_bad_input_is_named(loss, message):
    p = np.full((2, 5, 4, 3), 1 / 3, np.float32)
    with pytest.raises(ValueError, match=message):
        loss(p, np.zeros_like(p))
