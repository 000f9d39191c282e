from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "survey_losses.npz")
WEIGHTS, LABELS = PEER["weights"].astype("f"), PEER["labels"]


def value_and_gradient(loss, predictions):
    value, vjp = jax.vjp(loss, predictions)
    return value, vjp(jnp.ones_like(value))[0]


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        (
            "ids",
            "cross_entropy_ids",
            lambda p, t: losses.softmax_cross_entropy(
                p, LABELS, label_smoothing=0.1, class_weights=WEIGHTS
            ),
        ),
        (
            "soft",
            "cross_entropy_soft",
            lambda p, t: losses.softmax_cross_entropy(
                p, t, label_smoothing=0.2, class_weights=WEIGHTS
            ),
        ),
        (
            "nll",
            "negative_log_likelihood",
            lambda p, t: losses.negative_log_likelihood(p, LABELS, class_weights=WEIGHTS),
        ),
        (
            "binary",
            "binary_cross_entropy",
            lambda p, t: losses.binary_cross_entropy(p, t, positive_weight=WEIGHTS),
        ),
    )
    def test_values_and_gradients_match_pytorch(self, name, loss):
        predictions, targets = PEER[f"{name}_prediction"], PEER[f"{name}_target"]
        ours = self.variant(lambda p: value_and_gradient(lambda p: loss(p, targets), p))
        value, gradient = ours(predictions)
        np.testing.assert_allclose(value, PEER[f"{name}_value"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, PEER[f"{name}_gradient"], rtol=1e-5, atol=1e-6)

    def test_hinge_matches_optax_and_its_soft_targets_are_the_expectation(self):
        z = np.linspace(-3, 3, 13, dtype="f") + 0.1
        for t in (0, 1):
            ours = losses.hinge_loss(z, np.full(13, t))
            np.testing.assert_allclose(ours, optax.losses.hinge_loss(z, 2 * t - 1.0), rtol=1e-6)
        each = [losses.hinge_loss(z, t, margin=0.5) for t in (0, 1)]
        ours = losses.hinge_loss(z, 0.3, margin=0.5)
        np.testing.assert_allclose(ours, 0.7 * each[0] + 0.3 * each[1], rtol=1e-6)
        gradient = jax.grad(lambda z: losses.hinge_loss(z, 1).sum())(z)
        np.testing.assert_array_equal(gradient, np.where(z < 1, -1, 0))

    def test_smoothing_binary_targets_draws_them_to_a_half(self):
        z = np.linspace(-3, 3, 7, dtype="f")
        ours = losses.binary_cross_entropy(z, np.ones(7), label_smoothing=0.2)
        expected = optax.losses.sigmoid_binary_cross_entropy(z, 0.9)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


OVER_CLASSES = {
    "softmax_cross_entropy": losses.softmax_cross_entropy,
    "negative_log_likelihood": losses.negative_log_likelihood,
}


@pytest.mark.parametrize("name", OVER_CLASSES)
def test_contract_of_losses_over_classes(name):
    loss, rng = OVER_CLASSES[name], np.random.default_rng(0)
    logits, labels = rng.normal(size=(8, 3, 5)).astype("f"), rng.integers(5, size=(8, 3))
    weights = np.arange(1, 6, dtype="f")
    expected = loss(logits, labels, class_weights=weights)
    moved = loss(np.moveaxis(logits, -1, 1), labels, class_weights=weights, axis=1)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    ours = jax.jit(loss)(jax.device_put(logits, rows), jax.device_put(labels, rows))
    assert ours.sharding.is_equivalent_to(rows, 2)
    where, labels = np.arange(5) < 3, labels % 3
    poisoned = np.where(where, logits, np.nan).astype("f")
    ours, gradient = value_and_gradient(lambda z: loss(z, labels, where=where), poisoned)
    np.testing.assert_allclose(ours, loss(logits[..., :3], labels), rtol=1e-6)
    assert np.all(gradient[..., 3:] == 0)
    nothing, gradient = value_and_gradient(lambda z: loss(z, labels, where=~where[:1]), poisoned)
    assert np.all(nothing == 0)
    assert np.all(gradient == 0)
    labels[0, 0], labels[1, 1] = -1, 5
    np.testing.assert_array_equal(np.argwhere(np.isnan(loss(logits, labels))), [[0, 0], [1, 1]])
    half = logits.astype(jnp.float16)
    assert loss(half, labels).dtype == jnp.float16
    for bad, message in (
        ({"class_weights": weights[:3]}, "class_weights must have shape"),
        ({"class_weights": -weights}, "class_weights must be in"),
        ({"where": np.ones(4, bool)}, "where must broadcast"),
        ({"labels": labels[:2]}, "labels must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(logits, **({"labels": labels} | bad))
    with pytest.raises(TypeError, match="must have a floating-point type"):
        loss(logits.astype(int), labels)


def test_a_class_that_cannot_be_has_no_part_in_the_likelihood_of_others():
    log_p = jnp.array([[0.0, -jnp.inf], [0.0, -jnp.inf]])
    loss = lambda z: losses.negative_log_likelihood(z, jnp.array([0, 1]))
    value, gradient = value_and_gradient(loss, log_p)
    np.testing.assert_array_equal(value, [0, np.inf])
    np.testing.assert_array_equal(gradient, [[-1, 0], [0, -1]])


@pytest.mark.parametrize("name", ["binary_cross_entropy", "hinge_loss"])
def test_contract_of_binary_losses(name):
    loss = getattr(losses, name)
    for z in (1e4, -1e4, 0.0, 1.0, -1.0):
        for t in (0, 1, 0.5):
            value, gradient = jax.value_and_grad(loss)(z, t)
            assert np.isfinite(value)
            assert np.isfinite(gradient)
    logits, where = jnp.array([2.0, jnp.nan]), np.array([True, False])
    value, gradient = value_and_gradient(lambda z: loss(z, jnp.zeros(2), where=where), logits)
    assert value[0] > 0
    assert value[1] == gradient[1] == 0
    assert loss(logits.astype(jnp.bfloat16), np.zeros(2, bool)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="targets must broadcast"):
        loss(logits, np.zeros(3))
    with pytest.raises(TypeError, match="logits must have a floating-point type"):
        loss(np.zeros(2, int), np.zeros(2))
    bad = {"margin": -1.0} if name == "hinge_loss" else {"positive_weight": -1.0}
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be in"):
        loss(logits, np.zeros(2), **bad)
