import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.losses import signal_decay_loss, symmetric_absolute_percentage_error
from jaxref.metrics import symmetric_mean_absolute_percentage_error


def random_pair(shape=(3, 4, 2)):
    return np.random.default_rng(0).normal(size=(2, *shape)).astype("f")


class TestSignalDecay:
    @pytest.mark.parametrize("base", ["absolute", "squared"])
    def test_values_and_gradients_match_the_formula(self, base):
        predictions, targets = random_pair()
        weights = (np.arange(1, 5) ** -0.7)[:, None]
        error = predictions.astype(float) - targets
        expected, slope = {
            "absolute": (np.abs(error), np.sign(error)),
            "squared": (error**2, 2 * error),
        }[base]
        loss = lambda x: signal_decay_loss(x, targets, decay=0.7, base=base)
        value, vjp = jax.vjp(jax.jit(loss), predictions)
        np.testing.assert_allclose(value, weights * expected, rtol=1e-5)
        np.testing.assert_allclose(vjp(jnp.ones_like(value))[0], weights * slope, rtol=1e-5)

    def test_time_axis_no_decay_and_masks(self):
        predictions, targets = random_pair()
        expected = signal_decay_loss(predictions, targets)
        moved = signal_decay_loss(
            *(np.moveaxis(x, 1, 0) for x in (predictions, targets)), time_axis=0
        )
        np.testing.assert_array_equal(np.moveaxis(moved, 0, 1), expected)
        plain = signal_decay_loss(predictions, targets, decay=0.0)
        np.testing.assert_allclose(plain, np.abs(predictions - targets), rtol=1e-6)
        where = np.arange(4)[:, None] < 3
        poisoned = np.where(where, targets, np.nan)
        masked = signal_decay_loss(predictions, poisoned, where=where)
        np.testing.assert_array_equal(masked, np.where(where, expected, 0))


class TestSymmetricPercentage:
    def test_mean_is_the_metric_and_the_gradient_is_finite_everywhere(self):
        predictions, targets = random_pair()
        predictions[0, 0], targets[0, :2] = 0, 0
        predictions[1, 0] = targets[1, 0]
        where = np.arange(2) < 1
        poisoned = np.where(where, targets, np.nan)
        loss = lambda x: symmetric_absolute_percentage_error(x, poisoned, where=where)
        value, vjp = jax.vjp(jax.jit(loss), predictions)
        mean = symmetric_mean_absolute_percentage_error(predictions, targets, where=where)
        np.testing.assert_allclose(value.sum() / 12, mean, rtol=1e-5)
        p, t = predictions.astype(float), targets.astype(float)
        sizes = np.abs(p) + np.abs(t)
        safe = np.where(sizes == 0, 1, sizes)
        slope = 2 * (np.sign(p - t) * sizes - np.abs(p - t) * np.sign(p)) / safe**2
        expected = np.where(where, slope, 0)
        np.testing.assert_allclose(vjp(jnp.ones_like(value))[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", [signal_decay_loss, symmetric_absolute_percentage_error])
def test_half_precision_extremes_and_bad_input(loss):
    predictions, targets = random_pair()
    half = jnp.asarray(predictions, jnp.bfloat16)
    ours = loss(half, targets)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, loss(half.astype("f"), targets).astype(jnp.bfloat16))
    value, vjp = jax.vjp(lambda x: loss(x, -1e4 * targets), 1e4 * predictions)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(vjp(value)[0]))
    with pytest.raises(TypeError, match="predictions must have a floating-point type"):
        loss(np.ones((3, 2), int), 1.0)
    with pytest.raises(ValueError, match="targets must"):
        loss(predictions, targets[:2])
    with pytest.raises(ValueError, match="where must broadcast"):
        loss(predictions, targets, where=np.ones(4, bool))


def test_bad_options_are_named():
    predictions, targets = random_pair()
    for message, options in (
        ("decay must be in", {"decay": -1.0}),
        ("base must be 'absolute' or 'squared'", {"base": "huber"}),
        ("time_axis must name axes", {"time_axis": 3}),
    ):
        with pytest.raises(ValueError, match=message):
            signal_decay_loss(predictions, targets, **options)
