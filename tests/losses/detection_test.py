from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref import losses, metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "survey_losses.npz")
YOLO = jax.jit(losses.yolo_loss)
BOX_LOSSES = ("iou_loss", "giou_loss", "diou_loss", "ciou_loss")


def value_and_gradient(loss, predictions, targets):
    value, vjp = jax.vjp(lambda p: loss(p, targets), predictions)
    return value, vjp(jnp.ones_like(value))[0]


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("giou_loss", "diou_loss", "ciou_loss")
    def test_values_and_gradients_match_torchvision(self, name):
        loss = self.variant(lambda p, t: value_and_gradient(getattr(losses, name), p, t))
        value, gradient = loss(PEER[f"{name}_prediction"], PEER[f"{name}_target"])
        np.testing.assert_allclose(value, PEER[f"{name}_value"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, PEER[f"{name}_gradient"], rtol=1e-4, atol=1e-5)

    def test_iou_is_that_of_the_metric(self):
        a, b = PEER["giou_loss_prediction"], PEER["giou_loss_target"]
        every = 1 - losses.iou_loss(np.broadcast_to(a[:, None], (16, 16, 4)), b)
        np.testing.assert_allclose(every, metrics.box_overlaps(a, b), atol=1e-6)
        assert np.all(np.diag(every)[:4] == 0)  # those that were moved away


class TestBoxes:
    @pytest.mark.parametrize("name", BOX_LOSSES)
    def test_edges(self, name):
        loss = getattr(losses, name)
        boxes = np.array([[0, 0, 1, 2], [1e4, 1e4, 2e4, 2e4], [-3, -2, -1, -1]], "f")
        value, gradient = value_and_gradient(loss, boxes, boxes)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        assert np.all(np.isfinite(gradient))
        odd = np.array([[1, 1, 1, 1], [1, 1, 3, 1], [3, 3, 1, 1], [0, 0, 1e4, 1e-4]], "f")
        for target in (odd, odd[::-1], np.array([0, 0, 2, 2], "f")):
            value, gradient = value_and_gradient(loss, odd, target)
            assert np.all(np.isfinite(value))
            assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(loss(odd[:1], odd[:1]), 1)

    @pytest.mark.parametrize("name", BOX_LOSSES)
    def test_mask_vmap_shards_and_half_precision(self, name):
        loss = getattr(losses, name)
        a, b = PEER["giou_loss_prediction"], PEER["giou_loss_target"]
        expected = loss(a, b)
        where = np.arange(16) % 2 == 0
        poisoned = np.where(where[:, None], a, np.nan)
        value, vjp = jax.vjp(lambda p: loss(p, b, where=where), poisoned)
        np.testing.assert_allclose(value, np.where(where, expected, 0), rtol=1e-6)
        assert np.all(np.where(where[:, None], 0, vjp(jnp.ones(16))[0]) == 0)
        np.testing.assert_allclose(jax.vmap(loss)(a, b), expected, rtol=1e-5)
        rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        ours = jax.jit(loss)(*jax.device_put((a, b), rows))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        half = jnp.asarray(a, jnp.float16)
        expected = loss(half.astype("f"), b).astype(jnp.float16)
        np.testing.assert_array_equal(loss(half, b), expected)

    def test_distant_boxes_are_drawn_together_by_all_but_the_plain_one(self):
        box, target = np.array([0.0, 0, 1, 1], "f"), np.array([5.0, 0, 6, 1], "f")
        for name in BOX_LOSSES:
            gradient = jax.grad(lambda p: getattr(losses, name)(p, target))(box)
            assert (gradient[2] < 0) == (name != "iou_loss")

    def test_bad_input_is_named(self):
        boxes = np.zeros((3, 4), "f")
        for name in BOX_LOSSES:
            loss = getattr(losses, name)
            with pytest.raises(ValueError, match=r"predictions must have shape \[..., 4\]"):
                loss(boxes[:, :3], boxes[:, :3])
            with pytest.raises(ValueError, match="targets must broadcast"):
                loss(boxes, boxes[:2])
            with pytest.raises(ValueError, match="where must broadcast"):
                loss(boxes, boxes, where=np.ones((3, 4), bool))
            with pytest.raises(TypeError, match="predictions must have a floating-point type"):
                loss(boxes.astype(int), boxes)


def grid(seed=0, size=3, per_cell=2, classes=4):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(0.1, 0.9, size=(2, size, size, per_cell, 4)).astype("f")
    confidences = rng.uniform(size=(2, size, size, per_cell)).astype("f")
    probabilities = rng.dirichlet(np.ones(classes), size=(2, size, size)).astype("f")
    truth = rng.uniform(0.1, 0.9, size=(2, size, size, 4)).astype("f")
    labels = rng.integers(classes, size=(2, size, size), dtype=np.int32)
    return boxes, confidences, probabilities, truth, labels, rng.uniform(size=labels.shape) < 0.4


def literal_yolo(boxes, confidences, probabilities, truth, labels, has_object):
    """Cell by cell, with boxes in the coordinates of the whole image."""
    size = boxes.shape[1]

    def corners(box, row, column):
        x, y = (column + box[0]) / size, (row + box[1]) / size
        return [x - box[2] / 2, y - box[3] / 2, x + box[2] / 2, y + box[3] / 2]

    totals = []
    for image in range(len(boxes)):
        total = 0.0
        for row, column in np.ndindex(size, size):
            cell = image, row, column
            ious = [0.0] * len(boxes[cell])
            best = None
            if has_object[cell]:
                box = corners(truth[cell], row, column)
                ious = [
                    metrics.box_overlaps([corners(b, row, column)], [box])[0, 0]
                    for b in boxes[cell]
                ]
                best = int(np.argmax(ious))
                hot = np.eye(probabilities.shape[-1])[labels[cell]]
                total += np.sum((probabilities[cell] - hot) ** 2)
            for b, box in enumerate(np.float64(boxes[cell])):
                if b == best:
                    place = np.sum((box[:2] - truth[cell][:2]) ** 2)
                    place += np.sum((np.sqrt(box[2:]) - np.sqrt(truth[cell][2:])) ** 2)
                    total += 5 * place + (confidences[cell][b] - ious[b]) ** 2
                else:
                    total += 0.5 * confidences[cell][b] ** 2
        totals.append(total)
    return totals


class TestYolo:
    def test_matches_the_formula_cell_by_cell(self):
        arguments = grid()
        ours = YOLO(*arguments)
        np.testing.assert_allclose(ours, literal_yolo(*arguments), rtol=1e-5)
        one = YOLO(*(x[1] for x in arguments))
        np.testing.assert_allclose(one, ours[1], rtol=1e-6)

    def test_gradient_against_finite_differences(self):
        boxes, *rest = grid(size=2)
        confidences, probabilities = (jnp.float64(x) for x in rest[:2])
        with jax.enable_x64(True):
            loss = jax.jit(lambda c, p: losses.yolo_loss(np.float64(boxes), c, p, *rest[2:]).sum())
            arguments = (np.float64(confidences), np.float64(probabilities))
            check_grads(loss, arguments, order=1, modes=["rev"])
        gradient = jax.grad(lambda b: YOLO(b, *rest).sum())(boxes)
        truth, has_object = rest[2], rest[4]
        moved = np.any(gradient != 0, axis=-1)
        np.testing.assert_array_equal(moved.sum(-1), has_object)  # the responsible box alone
        expected = 10 * (boxes - truth[..., None, :])[..., :2]
        np.testing.assert_allclose(gradient[moved][:, :2], expected[moved], rtol=1e-4, atol=1e-5)

    def test_what_cells_without_object_hold_is_no_matter(self):
        boxes, confidences, p, truth, labels, has_object = grid()
        expected = YOLO(boxes, confidences, p, truth, labels, has_object)
        truth = np.where(has_object[..., None], truth, np.nan)
        unknown = np.where(has_object, labels, -1)
        loss = lambda b, c, p: YOLO(b, c, p, truth, unknown, has_object)
        ours, vjp = jax.vjp(loss, boxes, confidences, p)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        chex.assert_tree_all_finite(vjp(jnp.ones(2)))
        unknown[0][has_object[0]] = 4
        ours = YOLO(boxes, confidences, p, truth, unknown, has_object)
        np.testing.assert_array_equal(np.isnan(ours), [True, False])

    def test_edges_and_bad_input(self):
        boxes, *rest = grid()
        nothing = YOLO(boxes, *rest[:4], np.zeros((2, 3, 3), bool))
        np.testing.assert_allclose(nothing, 0.5 * np.square(rest[0]).sum((1, 2, 3)), rtol=1e-5)
        flat = np.zeros_like(boxes) - np.array([0, 0, 0, 1], "f")
        value, gradient = jax.value_and_grad(lambda b: YOLO(b, *rest).sum())(flat)
        chex.assert_tree_all_finite((value, gradient))
        assert YOLO(boxes.astype(jnp.bfloat16), *rest).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match=r"boxes must have shape \[..., S, S, B, 4\]"):
            losses.yolo_loss(boxes[..., :3], *rest)
        with pytest.raises(ValueError, match="confidences must have shape"):
            losses.yolo_loss(boxes, rest[0][..., :1], *rest[1:])
        with pytest.raises(TypeError, match="target_labels must be integers"):
            losses.yolo_loss(boxes, *rest[:3], rest[3] * 1.0, rest[4])
        with pytest.raises(ValueError, match="coordinate_weight must be in"):
            losses.yolo_loss(boxes, *rest, coordinate_weight=-1.0)
