import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.analysis import logit_sharpness
from jaxref.losses import softmax_cross_entropy

sharpness = jax.jit(logit_sharpness, static_argnames=("method", "loss"))


def random_logits(shape=(6, 5), seed=0):
    rng = np.random.default_rng(seed)
    return (3 * rng.normal(size=shape)).astype(np.float32), rng.integers(shape[-1], size=shape[:-1])


def cross_entropy64(y, target):
    y = np.asarray(y, np.float64)
    y = y - y.max(-1, keepdims=True)
    return np.log(np.exp(y).sum(-1)) - y[..., target]


def highest_corner64(y, target, epsilon):
    """φ with the maximum over all corners of the box, which is where a convex loss has it."""
    y = np.asarray(y, np.float64)
    corners = np.array(list(itertools.product((-1, 1), repeat=len(y))))
    highest = cross_entropy64(y + corners * epsilon * (np.abs(y) + 1), target).max()
    loss = cross_entropy64(y, target)
    return 100 * (highest - loss) / (1 + loss)


class LogitSharpnessTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_is_that_of_the_highest_corner(self):
        logits, targets = random_logits()
        for epsilon in (1e-3, 0.3):
            ours = self.variant(
                lambda y, t, epsilon=epsilon: logit_sharpness(y, t, epsilon=epsilon)
            )
            expected = [highest_corner64(y, t, epsilon) for y, t in zip(logits, targets)]
            np.testing.assert_allclose(ours(logits, targets), expected, rtol=1e-5)


class TestExact:
    def test_no_random_point_of_the_box_is_higher_and_the_climb_gets_there(self):
        logits, targets = random_logits((4, 9))
        exact = sharpness(logits, targets, epsilon=0.1)
        u = np.random.default_rng(1).uniform(-1, 1, size=(5000, 9))
        for y, target, phi in zip(np.float64(logits), targets, exact):
            points = y + 0.1 * u * (np.abs(y) + 1)
            loss = cross_entropy64(y, target)
            assert phi >= 100 * (cross_entropy64(points, target).max() - loss) / (1 + loss)
        climbed = logit_sharpness(logits, targets, epsilon=0.1, method="lbfgs")
        assert climbed.dtype == jnp.float32
        np.testing.assert_allclose(climbed, exact, rtol=1e-5)

    def test_grows_with_epsilon_from_its_first_order(self):
        logits, targets = random_logits()
        values = [sharpness(logits, targets, epsilon=e) for e in (0.0, 1e-4, 5e-4, 1e-3, 1.0)]
        np.testing.assert_array_equal(values[0], 0)
        assert np.all(np.diff(values, axis=0) > 0)
        slope = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 5)
        loss = softmax_cross_entropy(logits, targets)
        first_order = 100 * np.sum(np.abs(slope) * (np.abs(logits) + 1), -1) / (1 + loss)
        np.testing.assert_allclose(values[1] / 1e-4, first_order, rtol=2e-3)

    def test_a_rise_that_is_lost_in_the_loss_is_not_lost(self):
        y = np.float32([30.0, 0.0, -1.0])
        p = np.exp(np.float64(y) - 30)
        expected = 100 * np.log1p(p[1] * np.expm1(0.032) + p[2] * np.expm1(0.033))
        np.testing.assert_allclose(sharpness(y, 0), expected, rtol=1e-5)

    def test_classes_that_are_not_admitted_do_not_count(self):
        logits, targets = random_logits((6, 5))
        padded = np.full((6, 8), np.nan, np.float32)
        padded[:, [0, 2, 3, 5, 7]] = logits
        ids = np.array([0, 2, 3, 5, 7])[targets]
        where = ~np.isnan(padded)
        expected = sharpness(logits, targets)
        np.testing.assert_allclose(sharpness(padded, ids, where=where), expected, rtol=1e-6)
        climbed = logit_sharpness(padded[:2], ids[:2], where=where[:2], method="lbfgs")
        np.testing.assert_allclose(climbed, expected[:2], rtol=1e-5)
        phi = lambda y: jnp.sum(sharpness(y, ids, where=where))
        assert np.all(np.isfinite(jax.grad(phi)(padded)))

    def test_edges(self):
        logits = np.float32([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4]])
        logits, targets = np.tile(logits, (4, 1)), np.array([0, 1, 2, 1, 0, 0] * 2)
        epsilon = np.repeat(np.float32([1e-3, 0.0]), 6)
        values = jax.vmap(
            jax.value_and_grad(lambda y, t, e: logit_sharpness(y, t, epsilon=e)), (0, 0, 0)
        )
        phi, gradient = jax.jit(values)(logits, targets, epsilon)
        assert np.all(np.isfinite(phi) & (phi >= 0))
        assert np.all(np.isfinite(gradient))
        np.testing.assert_allclose(phi[3], 100 * (10.001 + 10.001) / 20001, rtol=1e-5)
        np.testing.assert_array_equal(phi[6:], 0)
        assert sharpness(jnp.zeros((2, 1)), jnp.zeros(2, int)).tolist() == [0.0, 0.0]
        assert not np.any(sharpness(logits, targets, where=False))
        assert sharpness(jnp.zeros((0, 3)), jnp.zeros(0, int)).shape == (0,)
        for method in ("exact", "lbfgs"):
            unknown = logit_sharpness(jnp.ones((2, 3)), jnp.array([3, -1]), method=method)
            assert np.all(np.isnan(unknown))

    def test_half_precision_computes_in_float32(self):
        logits, targets = random_logits()
        half = jnp.asarray(logits, jnp.bfloat16)
        ours = logit_sharpness(half, targets)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, sharpness(half.astype(jnp.float32), targets), rtol=1e-6)

    def test_sharded_over_the_batch(self):
        logits, targets = random_logits((16, 5))
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = sharpness(*(jax.device_put(x, sharding) for x in (logits, targets)))
        assert ours.sharding.is_equivalent_to(sharding, 1)
        np.testing.assert_allclose(ours, sharpness(logits, targets), rtol=1e-6)


def quadratic(y, target):
    return jnp.sum(jnp.square(y - target))


class TestClimb:
    def test_of_another_loss_with_targets_of_its_own(self):
        """Away from the target along every axis."""
        logits, _ = random_logits((2, 3, 4))
        targets = random_logits((2, 3, 4), seed=1)[0]
        far = np.abs(logits - targets) + 0.01 * (np.abs(logits) + 1)
        loss = np.square(logits - targets).sum(-1)
        expected = 100 * (np.square(far).sum(-1) - loss) / (1 + loss)
        ours = logit_sharpness(logits, targets, epsilon=0.01, method="lbfgs", loss=quadratic)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)

    def test_stays_at_a_maximum_and_finds_one_within_the_box(self):
        bump = lambda y, target: jnp.exp(-jnp.sum(jnp.square(y - target)))
        y = np.zeros((2, 3), np.float32)
        targets = np.float32([[0, 0, 0], [0.3, -0.2, 0.1]])
        ours = logit_sharpness(y, targets, epsilon=0.5, method="lbfgs", loss=bump)
        loss = np.exp(-0.14)
        np.testing.assert_allclose(ours, [0, 100 * (1 - loss) / (1 + loss)], rtol=1e-4)


def test_bad_input_is_named():
    logits, targets = random_logits()
    f = lambda *args, **kwargs: logit_sharpness(*(args or (logits, targets)), **kwargs)
    for arguments, keywords, error, message in [
        ((), {"epsilon": -1e-3}, ValueError, "epsilon must be in"),
        ((), {"method": "newton"}, ValueError, "method must be 'exact' or 'lbfgs', got 'newton'"),
        ((), {"loss": quadratic}, ValueError, "loss must be None for method 'exact'"),
        ((), {"where": np.ones(4, bool)}, ValueError, "where must broadcast"),
        ((logits, targets[:2]), {}, ValueError, r"targets must have shape \(6,\)"),
        (
            (logits, targets[:2]),
            {"method": "lbfgs"},
            ValueError,
            r"must have the axes \(6,\) first",
        ),
        ((logits, np.float32(logits)), {}, TypeError, "targets must be integer ids, got float32"),
        ((np.ones((6, 0), "f"), targets), {}, ValueError, r"logits must have shape \[\.\.\., cl"),
        ((targets, targets), {}, TypeError, "logits must have a floating-point type"),
    ]:
        with pytest.raises(error, match=message):
            f(*arguments, **keywords)
    with pytest.raises(ValueError, match="method 'lbfgs' runs on the host"):
        sharpness(logits, targets, method="lbfgs")
