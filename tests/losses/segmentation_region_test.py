from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn.metrics import jaccard_score

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "segmentation.npz")


def weighted(loss):
    """The sum of losses that the stored gradients belong to."""
    return jnp.sum(loss.ravel() * jnp.arange(1.0, loss.size + 1))


def hard_predictions(shape=(60,), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=shape)
    predicted = np.where(rng.uniform(size=shape) < 0.6, labels, rng.integers(classes, size=shape))
    return labels, predicted


class NumbersTest(chex.TestCase):
    """Against the peers whose numbers tests/oracles/segmentation.py stored."""

    def check(self, name, loss, argument, atol=1e-6):
        def run(x):
            values = loss(x)
            return weighted(values), values

        (_, values), gradient = self.variant(jax.value_and_grad(run, has_aux=True))(argument)
        np.testing.assert_allclose(values, PEER[name], rtol=1e-5)
        expected = PEER[f"{name}_gradient"]
        if argument.ndim == 4:
            expected = np.moveaxis(expected, 1, -1)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=atol)

    @chex.variants(with_jit=True, without_jit=True)
    def test_generalized_wasserstein_dice_matches_monai(self):
        matrix = np.array([[0, 1, 1], [1, 0, 0.3], [1, 0.3, 0]])
        loss = lambda z: losses.generalized_wasserstein_dice_loss(
            jax.nn.softmax(z), PEER["labels"], distance_matrix=matrix, reduce_axes=(1, 2)
        )
        self.check("wasserstein", loss, PEER["logits"])

    @chex.variants(with_jit=True)
    def test_lovasz_matches_segmentation_models(self):
        loss = lambda z: losses.lovasz_softmax_loss(jax.nn.softmax(z), PEER["labels"])
        self.check("lovasz", loss, PEER["logits"])
        loss = lambda z: losses.lovasz_hinge_loss(z, PEER["labels"] > 0)
        self.check("lovasz_hinge", loss, PEER["logits"][..., 0])

    @chex.variants(with_jit=True)
    def test_mutual_information_matches_the_authors(self):
        loss = lambda z: losses.region_mutual_information_loss(
            z, PEER["truth"], pool_size=2, cross_entropy_weight=0.0
        )
        self.check("mutual_information", loss, PEER["maps"], atol=2e-4)

    @chex.variants(with_jit=True, without_jit=True)
    def test_robust_t_matches_the_authors_and_learns_nu(self):
        loss = lambda p: losses.robust_t_loss(p, PEER["noisy"], nu=jnp.exp(0.7))
        self.check("t_loss", loss, PEER["guess"])
        loss = lambda raw: losses.robust_t_loss(PEER["guess"], PEER["noisy"], nu=jnp.exp(raw)).sum()
        slope = self.variant(jax.grad(loss))(0.7)
        np.testing.assert_allclose(slope, PEER["t_loss_log_nu_gradient"], rtol=1e-4)


class TestFormulas:
    """Literal transcriptions in float64, and what hard predictions make of them."""

    def test_sensitivity_and_specificity(self):
        rng = np.random.default_rng(0)
        p, y = rng.uniform(size=(2, 30)), rng.uniform(size=(2, 30)) < 0.3
        square = (y - p) ** 2
        misses = (square * y).sum(1) / y.sum(1)
        alarms = (square * ~y).sum(1) / (~y).sum(1)
        ours = losses.sensitivity_specificity_loss(
            p.astype("f"), y, sensitivity_weight=0.2, reduce_axes=1
        )
        np.testing.assert_allclose(ours, 0.2 * misses + 0.8 * alarms, rtol=1e-5)
        hard = (p > 0.5).astype("f")
        ours = losses.sensitivity_specificity_loss(hard, y, sensitivity_weight=1.0, reduce_axes=1)
        np.testing.assert_allclose(ours, 1 - (hard * y).sum(1) / y.sum(1), rtol=1e-6)
        with jax.enable_x64(True):
            check_grads(lambda p: losses.sensitivity_specificity_loss(p, y), (p,), 1, ["rev"])

    def test_wasserstein_at_distance_one_is_the_dice_loss_of_the_foreground(self):
        labels, _ = hard_predictions(classes=2)
        p = np.random.default_rng(1).uniform(size=60).astype("f")
        ours = losses.generalized_wasserstein_dice_loss(
            np.stack([1 - p, p], -1), labels, distance_matrix=1 - np.eye(2)
        )
        np.testing.assert_allclose(ours, losses.dice_loss(p, labels == 1), rtol=1e-5)

    def test_a_near_confusion_costs_less(self):
        labels, wrong = np.arange(3), {"near": [0, 2, 1], "far": [0, 0, 0]}
        matrix = np.array([[0, 1, 1], [1, 0, 0.1], [1, 0.1, 0]])
        near, far = (
            losses.generalized_wasserstein_dice_loss(
                np.eye(3, dtype="f")[ids], labels, distance_matrix=matrix
            )
            for ids in wrong.values()
        )
        assert near < 0.2 * far

    def test_lovasz_of_hard_predictions_is_one_minus_iou_and_absent_classes_are_left_out(self):
        labels, predicted = hard_predictions()
        hard = np.eye(4, dtype="f")[predicted]  # nothing is of the fourth class
        iou = jaccard_score(labels, predicted, average=None)
        ours = losses.lovasz_softmax_loss(hard, labels)
        np.testing.assert_allclose(ours, 1 - iou.mean(), rtol=1e-5)
        every = losses.lovasz_softmax_loss(hard, labels, only_present=False)
        np.testing.assert_allclose(every, (3 - iou.sum()) / 4, rtol=1e-5)

    def test_masked_pixels_are_as_good_as_not_there(self):
        labels, _ = hard_predictions()
        p = np.random.default_rng(3).dirichlet(np.ones(3), size=60).astype("f")
        where, kept = np.arange(60) % 3 > 0, np.flatnonzero(np.arange(60) % 3)
        for loss in (losses.lovasz_softmax_loss, losses.sensitivity_specificity_loss):
            ours = loss(p, labels, where=where[:, None])
            np.testing.assert_allclose(ours, loss(p[kept], labels[kept]), rtol=1e-5)
        hinge = losses.lovasz_hinge_loss(p[:, 0], labels == 0, where=where)
        expected = losses.lovasz_hinge_loss(p[kept, 0], labels[kept] == 0)
        np.testing.assert_allclose(hinge, expected, rtol=1e-5)
        image = (p[None, :, 0], (labels == 0)[None])
        ours = losses.robust_t_loss(*image, where=where)
        expected = losses.robust_t_loss(*(x[:, kept] for x in image))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_lovasz_hinge_is_convex_and_needs_a_margin(self):
        labels, _ = hard_predictions(classes=2)
        sign = np.where(labels == 1, 1.0, -1.0).astype("f")
        a, b = np.random.default_rng(2).normal(size=(2, 60)).astype("f")
        loss = lambda z: losses.lovasz_hinge_loss(z, labels)
        assert loss((a + b) / 2) <= (loss(a) + loss(b)) / 2
        assert loss(sign) == 0
        assert loss(0.9 * sign) > 0

    def test_mutual_information_falls_as_predictions_explain_the_labels(self):
        labels = np.zeros((1, 16, 16), int)
        labels[:, 4:11, 5:12] = 1
        noise = np.random.default_rng(0).normal(size=(1, 16, 16, 1)).astype("f")
        right = (labels[..., None] * 8.0 - 4).astype("f")
        run = jax.jit(
            lambda z: losses.region_mutual_information_loss(
                z, labels[..., None], pool_size=1, cross_entropy_weight=0.0
            )
        )
        # It asks for a linear relation alone: the negative of a prediction explains as much.
        best, noisy, none = (run(z) for z in (right, right + 2 * noise, 0 * right))
        assert best < noisy - 1
        assert noisy < none - 0.5
        np.testing.assert_allclose(run(-right), run(right), rtol=0.05)
        nearly_none = losses.region_mutual_information_loss(right, labels[..., None], pool_size=1)
        both = losses.region_mutual_information_loss(
            right, labels[..., None], pool_size=1, cross_entropy_weight=1.0
        )
        bce = np.log1p(np.exp(-4.0))
        np.testing.assert_allclose(both, bce, rtol=1e-5)
        np.testing.assert_allclose(nearly_none, (bce + run(right)) / 2, rtol=1e-4)

    def test_mutual_information_of_stripes_is_finite(self):
        """All rows are alike, so that scatter matrices are singular but for epsilon."""
        labels = np.tile(np.arange(64) // 2 % 2, (1, 64, 1))
        z = np.where(labels == 1, 9.0, -9.0).astype("f")[..., None]
        run = jax.value_and_grad(
            lambda z: losses.region_mutual_information_loss(z, labels[..., None], pool_size=1).sum()
        )
        for logits in (z, 0 * z):
            value, gradient = jax.jit(run)(logits)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))

    def test_robust_t_lets_go_of_images_that_are_all_wrong(self):
        targets = np.zeros((2, 100), "f")
        p = np.stack([np.full(100, 0.1), np.full(100, 0.9)]).astype("f")
        slope = jax.grad(lambda p: losses.robust_t_loss(p, targets).sum())(p)
        assert slope[0, 0] > 1.5 * slope[1, 0] > 0
        flat = jax.grad(lambda p: losses.robust_t_loss(p, targets, nu=1e6).sum())(p)
        np.testing.assert_allclose(flat, p, rtol=1e-2)  # half the squared error's


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda z, y: losses.generalized_wasserstein_dice_loss(
                z, y, distance_matrix=np.zeros((2, 2))
            ),
            "distance_matrix must have shape",
        ),
        (
            lambda z, y: losses.generalized_wasserstein_dice_loss(
                z, y, distance_matrix=np.ones((3, 3))
            ),
            "distance_matrix must be 0 on its diagonal",
        ),
        (
            lambda z, y: losses.generalized_wasserstein_dice_loss(
                z, y, distance_matrix=1 - np.eye(3), background=3
            ),
            "background must be one of 3",
        ),
        (lambda z, y: losses.lovasz_hinge_loss(z, y), "targets must have shape"),
        (lambda z, y: losses.region_mutual_information_loss(z, y), "at least 3 x 3 pixels"),
        (lambda z, y: losses.region_mutual_information_loss(z[0], y), "logits must have shape"),
        (lambda z, y: losses.robust_t_loss(z, z, nu=0.0), "nu must be in"),
        (
            lambda z, y: losses.sensitivity_specificity_loss(z, z, sensitivity_weight=2.0),
            "sensitivity_weight must be in",
        ),
    ],
)
def test_hyperparameters_out_of_range_raise(loss, message):
    with pytest.raises(ValueError, match=message):
        loss(np.full((1, 4, 4, 3), 1 / 3, np.float32), np.zeros((1, 4, 4), int))
