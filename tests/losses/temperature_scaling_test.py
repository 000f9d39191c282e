from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import minimize_scalar

from jaxref import losses

PEERS = np.load(Path(__file__).parents[1] / "oracles" / "calibration.npz")


def parameters(when):
    return losses.AdaptiveTemperature(
        *(jnp.asarray(PEERS[f"{when}_{name}"]) for name in losses.AdaptiveTemperature._fields)
    )


def random_batch(n=80, classes=4, seed=0):
    """Over-confident logits with their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = 4 * (rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels])
    return logits.astype("f"), labels


def cross_entropy(logits, labels):
    z = np.float64(logits)
    log_z = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
    return np.mean(log_z - np.take_along_axis(z, labels[:, None], -1)[:, 0])


def two_regions(overlap, gap, n=1000):
    """Logits of an interpolating classifier of two classes, that are equal on a share of the data;
    there half of the labels are the other class."""
    wrong = np.arange(n) < round(n * overlap / 2)
    logits = np.stack([np.full(n, gap), np.zeros(n)], axis=-1).astype("f")
    return logits, wrong.astype(int)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_temperature_is_that_of_a_generic_minimiser(self):
        fit = self.variant(losses.fit_temperature)
        for seed in range(3):
            logits, labels = random_batch(seed=seed)
            best = minimize_scalar(
                lambda u: cross_entropy(logits * np.exp(-u), labels), bounds=(-5, 5)
            )
            np.testing.assert_allclose(fit(logits, labels), np.exp(best.x), rtol=1e-4)

    def test_temperatures_and_their_training_match_the_release(self):
        logits, features = PEERS["adaptive_logits"], PEERS["adaptive_features"]
        labels = PEERS["adaptive_labels"]
        temperature = losses.adaptive_temperature(parameters("after"), features)
        np.testing.assert_allclose(temperature, PEERS["temperature"], rtol=1e-5)
        scaled = losses.temperature_scale(logits, temperature)
        np.testing.assert_allclose(scaled, PEERS["scaled"], rtol=1e-5)

        def loss(params):
            scaled = losses.temperature_scale(logits, losses.adaptive_temperature(params, features))
            return jnp.mean(losses.correctness_aware_loss(scaled, labels))

        optimizer, params = optax.adam(1e-4), parameters("before")
        step = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s))
        state = optimizer.init(params)
        for _ in range(10):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(params, parameters("after"), rtol=1e-4, atol=1e-7)

    def test_features_are_those_of_a_loop(self):
        rng = np.random.default_rng(0)
        logits, copies = rng.normal(size=(5, 6)).astype("f"), rng.normal(size=(2, 5, 6)).astype("f")
        ours = losses.transformed_topk_features(logits, copies, k=3)
        for i in range(5):
            chosen = np.argsort(-logits[i])[:3]
            expected = [jax.nn.softmax(z[i])[chosen] for z in (logits, *copies)]
            np.testing.assert_allclose(ours[i], np.concatenate(expected), rtol=1e-5)
        assert losses.transformed_topk_features(logits[0], copies[:, 0]).shape == (12,)

    def test_overlap_of_several_classes_is_the_sum_over_both_regions(self):
        v, classes, m, gap = 0.4, 10, 3, 2.5
        result = losses.overlap_interpolator_calibration(
            v, gap, num_classes=classes, num_overlapping=m
        )
        z = np.zeros(classes)
        z[0] = gap / result.temperature
        q = np.exp(z) / np.exp(z).sum()
        np.testing.assert_allclose(q[0], 1 - v + v / m, rtol=1e-5)
        np.testing.assert_allclose(q[0], result.confidence, rtol=1e-5)
        expected = v * np.mean(np.log(1 / m) - np.log(q[:m])) - (1 - v) * np.log(q[0])
        np.testing.assert_allclose(result.kl, expected, rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("temperature-scaling-limits")
    def test_no_temperature_is_right_for_overlap_and_rest_and_mixup_is(self):
        """(1) The fitted temperature and what is left after it are the closed form, and a
        temperature for each region leaves nothing; (2) of two classes that overlap half of the
        time, a model that interpolates and then is scaled is further from the true probabilities
        than one that is trained by mixup."""
        for overlap in (0.1, 0.3, 0.6):
            logits, labels = two_regions(overlap, gap=7.0)
            expected = losses.overlap_interpolator_calibration(overlap, 7.0)
            temperature = losses.fit_temperature(logits, labels)
            np.testing.assert_allclose(temperature, expected.temperature, rtol=1e-4)
            closed = 7.0 / np.log((2 - overlap) / overlap)
            np.testing.assert_allclose(temperature, closed, rtol=1e-4)

            true = np.array([[0.5, 0.5], [1.0, 0.0]], "f")  # in the overlap, and elsewhere
            share = np.array([overlap, 1 - overlap])
            scaled = losses.temperature_scale(logits[:2], temperature)
            kl = share @ np.asarray(losses.calibration_kl(scaled, true))
            np.testing.assert_allclose(kl, expected.kl, rtol=1e-4)
            oracle = losses.temperature_scale(logits[:2], jnp.array([1e6, 0.1]))
            np.testing.assert_allclose(losses.calibration_kl(oracle, true), 0, atol=1e-6)
        expected = losses.overlap_interpolator_calibration(0.3).kl
        np.testing.assert_allclose(expected, 0.2148, atol=1e-4)

        # points of the plane with a bump at each: two classes apart, and half of the data between,
        # where the labels are drawn evenly
        rng = np.random.default_rng(0)
        overlaps = rng.random(200) < 0.5
        labels = np.where(overlaps, rng.integers(2, size=200), np.arange(200) % 2)
        centre = np.where(overlaps, 0.0, np.where(labels == 1, 3.0, -3.0))
        x = rng.normal(size=(200, 2)) * [0.3, 1.0] + np.stack([centre, 0 * centre], axis=-1)
        x = jnp.asarray(x, jnp.float32)
        true = np.where(overlaps[:, None], 0.5, np.eye(2)[labels]).astype("f")
        fresh_labels = np.where(overlaps, rng.integers(2, size=200), labels)

        def model(w, inputs):
            return jnp.exp(-20 * jnp.square(inputs[:, None] - x).sum(-1)) @ w

        def trained(mix_size):
            def step(w, key):
                loss = lambda w: losses.mixup_loss(
                    partial(model, w), x, labels, key=key, mix_size=mix_size
                ).mean()
                return w - 8 * jax.grad(loss)(w), None

            keys = jax.random.split(jax.random.key(0), 200)
            return jax.jit(lambda w: jax.lax.scan(step, w, keys)[0])(jnp.zeros((200, 2)))

        def left(logits):
            scaled = losses.temperature_scale(logits, losses.fit_temperature(logits, fresh_labels))
            return losses.calibration_kl(scaled, true).mean()

        plain, mixed = (model(trained(size), x) for size in (1, 2))
        assert np.mean(plain.argmax(-1) == labels) > 0.9  # nearly interpolates
        assert left(mixed) < 0.7 * left(plain)


class TestContract:
    def test_distributions_masks_and_axis(self):
        logits, labels = random_batch()
        expected = losses.fit_temperature(logits, labels)
        one_hot = np.eye(4, dtype="f")[labels]
        np.testing.assert_allclose(losses.fit_temperature(logits, one_hot), expected, rtol=1e-5)
        across = losses.fit_temperature(logits.T, labels, axis=0)
        np.testing.assert_allclose(across, expected, rtol=1e-5)
        padded = np.concatenate([logits, np.full((7, 4), np.nan, "f")])
        where = (np.arange(87) < 80)[:, None]
        ours = losses.fit_temperature(padded, np.append(labels, [9] * 7), where=where)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        wider = np.concatenate([logits, np.full((80, 2), 1e4, "f")], axis=-1)
        ours = losses.fit_temperature(wider, labels, where=np.arange(6) < 4)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_sharded_over_the_batch(self):
        logits, labels = random_batch()
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        ours = jax.jit(losses.fit_temperature)(*jax.device_put((logits, labels), rows))
        np.testing.assert_allclose(ours, losses.fit_temperature(logits, labels), rtol=1e-5)

    def test_edges(self):
        logits, _ = random_batch(8)
        top, bottom = logits.argmax(-1), logits.argmin(-1)
        fit = jax.jit(losses.fit_temperature)
        np.testing.assert_allclose(fit(logits, top), 1e-3, rtol=1e-3)
        np.testing.assert_allclose(fit(logits, bottom), 1e3, rtol=1e-3)
        assert fit(np.full((3, 4), 5.0, "f"), np.zeros(3, int)) == 1
        assert fit(logits, top, where=np.zeros((8, 4), bool)) == 1
        assert np.isnan(fit(logits, np.full(8, 4)))
        far = fit(1e4 * logits, np.where(np.arange(8) < 2, bottom, top))
        assert np.isfinite(far)
        assert losses.fit_temperature(logits.astype(jnp.bfloat16), top).dtype == jnp.float32
        half = losses.temperature_scale(logits.astype(jnp.bfloat16), 2.0)
        assert half.dtype == jnp.bfloat16
        gradient = jax.grad(lambda z: losses.fit_temperature(z, top))(jnp.asarray(logits))
        assert np.all(gradient == 0)

    def test_scales_per_example_and_along_any_axis(self):
        logits, _ = random_batch(3)
        t = np.array([0.5, 1.0, 2.0], "f")
        ours = losses.temperature_scale(logits, t)
        np.testing.assert_allclose(ours, logits / t[:, None], rtol=1e-6)
        np.testing.assert_allclose(losses.temperature_scale(logits.T, t, axis=0), ours.T)

    def test_adaptive_temperatures_start_near_1_and_stay_within_their_bounds(self):
        features = np.random.default_rng(0).random((50, 16)).astype("f")
        params = losses.adaptive_temperature_init(jax.random.key(0), 16)
        start = losses.adaptive_temperature(params, features)
        assert np.all(np.abs(start - 1) < 0.8)
        for size, bound in ((100.0, 10.0), (-100.0, 0.1)):
            far = params._replace(bias=jnp.float32(size))
            np.testing.assert_allclose(losses.adaptive_temperature(far, features), bound)

    def test_overlap_at_its_ends(self):
        ends = losses.overlap_interpolator_calibration(np.array([0.0, 1.0]), 3.0)
        np.testing.assert_allclose(ends.kl, 0, atol=1e-6)
        assert ends.temperature[0] == 0
        assert np.isinf(ends.temperature[1])
        assert ends.confidence.tolist() == [1, 0.5]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: losses.temperature_scale(z, 0.0), ValueError, "temperature must be in"),
        (lambda z, y: losses.temperature_scale(z, np.ones(3)), ValueError, "temperature must"),
        (lambda z, y: losses.temperature_scale(y, 1.0), TypeError, "logits must have"),
        (
            lambda z, y: losses.fit_temperature(z, y, minimum=2.0, maximum=1.0),
            ValueError,
            "minimum",
        ),
        (lambda z, y: losses.fit_temperature(z, y[:3]), ValueError, "labels must have shape"),
        (lambda z, y: losses.transformed_topk_features(z, z[None], k=5), ValueError, "k must be"),
        (
            lambda z, y: losses.transformed_topk_features(z, z[None, :3]),
            ValueError,
            "transformed_logits must have",
        ),
        (
            lambda z, y: losses.adaptive_temperature(
                losses.adaptive_temperature_init(jax.random.key(0), 3), z
            ),
            ValueError,
            r"features must have shape \[\.\.\., 3\]",
        ),
        (
            lambda z, y: losses.fit_adaptive_temperature(
                z, z[None], y, key=jax.random.key(0), num_steps=0
            ),
            ValueError,
            "num_steps must be",
        ),
        (lambda z, y: losses.overlap_interpolator_calibration(1.5), ValueError, "overlap must be"),
        (
            lambda z, y: losses.overlap_interpolator_calibration(0.5, num_overlapping=3),
            ValueError,
            "num_overlapping must be",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*random_batch(8))
