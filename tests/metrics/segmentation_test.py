from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.metrics import f1_score, jaccard_score

from jaxref import losses, metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "segmentation.npz")


def random_ids(shape=(8, 12), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=shape)
    predictions = np.where(
        rng.uniform(size=shape) < 0.6, targets, rng.integers(classes, size=shape)
    )
    return predictions, targets


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_overlap_matches_scikit_learn_class_by_class(self):
        predictions, targets = random_ids()
        flat = targets.ravel(), predictions.ravel()
        dice = self.variant(lambda a, b: metrics.dice_score(a, b, num_classes=4))
        expected = [*f1_score(*flat, average=None), 1.0]  # the fourth class is nowhere
        np.testing.assert_allclose(dice(predictions, targets), expected, rtol=1e-6)
        mean = self.variant(lambda a, b: metrics.mean_iou(a, b, num_classes=4))
        expected = jaccard_score(*flat, average="macro")
        np.testing.assert_allclose(mean(predictions, targets), expected, rtol=1e-6)

    def test_hausdorff_distance_matches_monai(self):
        for i, pair in enumerate(PEER["masks"].swapaxes(0, 1)):
            ours = metrics.hausdorff_distance_95(*pair)
            np.testing.assert_allclose(ours, PEER["hausdorff_95"][i], rtol=1e-6)
            ours = metrics.hausdorff_distance_95(*pair, spacing=(2.0, 0.5))
            np.testing.assert_allclose(ours, PEER["hausdorff_95_spacing"][i], rtol=1e-6)

    def test_dice_is_one_minus_the_dice_loss(self):
        predictions, targets = random_ids()
        loss = losses.dice_loss(
            np.eye(3, dtype="f")[predictions], targets, smooth=0.0, reduce_axes=(0, 1)
        )
        ours = metrics.dice_score(predictions, targets, num_classes=3)
        np.testing.assert_allclose(ours, 1 - loss, rtol=1e-6)


class TestContract:
    def test_masks_empty_classes_and_unknown_ids(self):
        predictions, targets = random_ids()
        where = np.arange(12) < 9
        ours = metrics.mean_iou(predictions, targets, num_classes=3, where=where)
        kept = metrics.mean_iou(predictions[:, :9], targets[:, :9], num_classes=3)
        np.testing.assert_allclose(ours, kept, rtol=1e-6)
        ignored = np.where(where, targets, 255)
        ours = metrics.mean_iou(predictions, ignored, num_classes=3, where=where)
        np.testing.assert_allclose(ours, kept, rtol=1e-6)
        assert np.isnan(metrics.mean_iou(predictions, ignored, num_classes=3))
        nothing = np.zeros(12, bool)
        assert metrics.mean_iou(predictions, targets, num_classes=3, where=nothing) == 0
        dice = metrics.dice_score(predictions, targets, num_classes=3, where=nothing, empty=0.5)
        assert np.all(dice == 0.5)

    def test_pixels_over_eight_devices(self):
        inputs = random_ids()
        mesh = jax.make_mesh((8,), ("data",))
        placed = jax.device_put(inputs, NamedSharding(mesh, P("data")))
        for metric in (metrics.mean_iou, metrics.dice_score):
            sharded = jax.shard_map(
                lambda a, b, metric=metric: metric(a, b, num_classes=3, axis_name="data"),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P(),
            )
            expected = metric(*inputs, num_classes=3)
            np.testing.assert_allclose(jax.jit(sharded)(*placed), expected, rtol=1e-6)

    def test_hausdorff_distance_of_empty_masks(self):
        mask, empty = np.ones((3, 3)), np.zeros((3, 3))
        assert metrics.hausdorff_distance_95(empty, empty) == 0
        assert metrics.hausdorff_distance_95(mask, empty) == np.inf
        assert metrics.hausdorff_distance_95(mask, mask) == 0

    def test_bad_input_is_named(self):
        predictions, targets = random_ids()
        with pytest.raises(ValueError, match="targets must have shape"):
            metrics.mean_iou(predictions, targets[:2], num_classes=3)
        with pytest.raises(ValueError, match="num_classes must be in"):
            metrics.dice_score(predictions, targets, num_classes=0)
        with pytest.raises(TypeError, match="predictions must be integers"):
            metrics.mean_iou(jnp.ones((8, 12)), targets, num_classes=3)
        with pytest.raises(ValueError, match="where must broadcast"):
            metrics.mean_iou(predictions, targets, num_classes=3, where=np.ones(8, bool))
        with pytest.raises(ValueError, match="target must have shape"):
            metrics.hausdorff_distance_95(predictions, targets[:2])
        with pytest.raises(ValueError, match="spacing must be in"):
            metrics.hausdorff_distance_95(predictions, targets, spacing=-1.0)
