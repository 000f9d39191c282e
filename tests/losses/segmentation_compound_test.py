from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "segmentation.npz")


def random_images(shape=(2, 4, 5), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(*shape, classes)), rng.integers(classes, size=shape)


def softmax64(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dice64(p, y, smooth=1.0):
    """Dice coefficients of each class of an image."""
    pixels = tuple(range(p.ndim - 1))
    return (2 * (p * y).sum(pixels) + smooth) / (p.sum(pixels) + y.sum(pixels) + smooth)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_unified_focal_matches_monai(self):
        def run(p):
            values = losses.unified_focal_loss(
                jnp.log(p), np.minimum(PEER["labels"], 1), weight=0.4, delta=0.7, gamma=0.3
            )
            return values @ jnp.arange(1.0, 3), values

        z = PEER["logits"][..., :2]
        (_, values), gradient = self.variant(jax.value_and_grad(run, has_aux=True))(
            jax.nn.softmax(z)
        )
        np.testing.assert_allclose(values, PEER["unified"], rtol=1e-5)
        # Ours takes logits, whose gradient has no part along the sum of the probabilities.
        tangent = lambda g: g - (g * np.asarray(jax.nn.softmax(z))).sum(-1, keepdims=True)
        expected = tangent(np.moveaxis(PEER["unified_gradient"], 1, -1))
        np.testing.assert_allclose(tangent(np.asarray(gradient)), expected, rtol=1e-3, atol=1e-6)

    @chex.variants(with_jit=True)
    def test_symmetric_unified_focal_is_the_papers_equations(self):
        z, labels = random_images(classes=2)
        p, y = softmax64(z), np.eye(2)[labels]
        delta, gamma, weight = 0.6, 0.3, 0.4
        focal = (np.array([1 - delta, delta]) * y * (1 - p) ** (1 - gamma) * -np.log(p)).sum(-1)
        true, false_negative, false_positive = (
            (a * b).sum((1, 2)) for a, b in ((p, y), (1 - p, y), (p, 1 - y))
        )
        index = true / (true + delta * false_negative + (1 - delta) * false_positive)
        expected = weight * focal.mean((1, 2)) + (1 - weight) * ((1 - index) ** gamma).mean(1)
        run = self.variant(
            lambda z: losses.unified_focal_loss(
                z, labels, weight=weight, delta=delta, gamma=gamma, asymmetric=False
            )
        )
        np.testing.assert_allclose(run(z.astype("f")), expected, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_combo_matches_the_formula(self):
        z, labels = random_images()
        p, y = 1 / (1 + np.exp(-z)), np.eye(3)[labels]
        entropy = -0.7 * y * np.log(p) - 0.3 * (1 - y) * np.log(1 - p)
        dice = np.array([1 - dice64(*image) for image in zip(p, y)])
        expected = 0.4 * entropy.mean((1, 2, 3)) + 0.6 * dice.mean(-1)
        run = self.variant(lambda z: losses.combo_loss(z, labels, alpha=0.4, beta=0.7))
        np.testing.assert_allclose(run(z.astype("f")), expected, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_exponential_logarithmic_matches_the_formula(self):
        z, labels = random_images()
        p, y = softmax64(z), np.eye(3)[labels]
        weights = np.array([0.5, 1.0, 2.0])
        surprise = (weights * y * (-np.log(p)) ** 1.5).sum(-1).mean((1, 2))
        dice = np.array([dice64(*image) for image in zip(p, y)])
        expected = 0.8 * ((-np.log(dice)) ** 0.3).mean(-1) + 0.2 * surprise
        run = self.variant(
            lambda z: losses.exponential_logarithmic_loss(
                z, labels, cross_entropy_gamma=1.5, class_weights=weights
            )
        )
        np.testing.assert_allclose(run(z.astype("f")), expected, rtol=1e-5)


class TestRelations:
    def test_combo_at_the_ends_is_its_parts(self):
        z, labels = random_images()
        z, y = z.astype("f"), np.eye(3)[labels]
        entropy = losses.combo_loss(z, labels, alpha=1.0)
        bce = losses.binary_cross_entropy(z, y).mean((1, 2, 3))
        np.testing.assert_allclose(entropy, bce / 2, rtol=1e-5)
        dice = losses.dice_loss(jax.nn.sigmoid(z), y, reduce_axes=(1, 2)).mean(-1)
        np.testing.assert_allclose(losses.combo_loss(z, labels, alpha=0.0), dice, rtol=1e-5)

    def test_exponential_logarithmic_at_gamma_one_holds_cross_entropy(self):
        z, labels = random_images()
        ours = losses.exponential_logarithmic_loss(
            z.astype("f"),
            labels,
            dice_weight=0.0,
            cross_entropy_weight=1.0,
            cross_entropy_gamma=1.0,
        )
        expected = losses.softmax_cross_entropy(z.astype("f"), labels).mean((1, 2))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_unified_focal_at_gamma_zero_is_cross_entropy_and_tversky(self):
        z, labels = random_images()
        z = z.astype("f")
        arguments = {"delta": 0.5, "gamma": 0.0}
        focal = losses.unified_focal_loss(z, labels, weight=1.0, **arguments)
        entropy = losses.softmax_cross_entropy(z, labels).mean((1, 2))
        np.testing.assert_allclose(focal, entropy / 2, rtol=1e-5)
        overlap = losses.unified_focal_loss(z, labels, weight=0.0, **arguments)
        dice = losses.dice_loss(jax.nn.softmax(z), labels, reduce_axes=(1, 2), smooth=0.0)
        np.testing.assert_allclose(overlap, dice.mean(-1), rtol=1e-5)

    def test_gradients_against_finite_differences(self):
        z, labels = random_images((1, 2, 3))
        with jax.enable_x64(True):
            for loss in (losses.combo_loss, losses.exponential_logarithmic_loss):
                check_grads(jax.jit(lambda z, loss=loss: loss(z, labels)), (z,), 1, ["rev"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, y: losses.combo_loss(z, y, alpha=1.5), "alpha must be in"),
        (lambda z, y: losses.combo_loss(z[0, 0], y), "logits must have shape"),
        (lambda z, y: losses.exponential_logarithmic_loss(z, y, smooth=0.0), "smooth must be in"),
        (
            lambda z, y: losses.exponential_logarithmic_loss(z, y, class_weights=np.ones(2)),
            "class_weights must have shape",
        ),
        (lambda z, y: losses.unified_focal_loss(z, y, gamma=1.0), "gamma must be in"),
        (
            lambda z, y: losses.unified_focal_loss(z, y, gamma=0.0, asymmetric=False),
            "gamma must be in",
        ),
        (lambda z, y: losses.unified_focal_loss(z, y, background=-1), "background must be"),
        (lambda z, y: losses.unified_focal_loss(z, y[:1]), "labels must have shape"),
    ],
)
def test_hyperparameters_out_of_range_raise(loss, message):
    z, labels = random_images()
    with pytest.raises(ValueError, match=message):
        loss(z.astype("f"), labels)
