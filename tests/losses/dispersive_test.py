from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "dispersive.npz")
VARIANTS = ("info_nce_l2", "info_nce_cosine", "hinge", "covariance")
OPTIONS = {"temperature": 0.7, "margin": 1.5, "normalize_by_dim": True}
LOSSES = {v: partial(losses.dispersive_loss, variant=v, **OPTIONS) for v in VARIANTS}


@partial(jax.jit, static_argnames="variant")
def run(variant, features, where):
    return jax.value_and_grad(partial(LOSSES[variant], where=where))(features)


def literal(z, variant, divisor):
    """Over all pairs, or entries of the covariance, in float64."""
    z = np.float64(z).reshape(len(z), -1)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    distances = np.square(z[:, None] - z).sum(axis=-1) / divisor
    if variant == "covariance":
        c = np.cov(unit.T, bias=True)
        return np.square(c).sum() - np.square(np.diag(c)).sum()
    if variant == "hinge":
        return np.square(np.maximum(1.5 - distances, 0)).mean()
    exponents = -distances if variant == "info_nce_l2" else unit @ unit.T
    return scipy.special.logsumexp(exponents / 0.7) - 2 * np.log(len(z))


def features(number=6, seed=0):
    return np.random.default_rng(seed).normal(size=(number, 3, 2)).astype("f")


class TestNumbers:
    def test_is_the_authors_loss_at_temperature_1(self):
        loss = partial(losses.dispersive_loss, temperature=1.0)
        value, gradient = jax.jit(jax.value_and_grad(loss))(PEER["features"])
        np.testing.assert_allclose(value, PEER["loss"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["grad"], rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_matches_the_literal_formula_with_a_mask(self, variant):
        where = np.array([True, False, True, True, False, True])
        z = features()
        value, gradient = run(variant, z, np.ones(6, bool))
        np.testing.assert_allclose(value, literal(z, variant, 6), rtol=1e-4)
        poisoned = np.where(where[:, None, None], z, np.nan)
        value, gradient = run(variant, poisoned, where)
        np.testing.assert_allclose(value, literal(z[where], variant, 6), rtol=1e-4)
        step = 0.05 * np.random.default_rng(1).normal(size=z.shape)
        ahead, behind = (literal((z + s * step)[where], variant, 6) for s in (1e-4, -1e-4))
        slope = np.sum(np.where(where[:, None, None], step * gradient, 0))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-4, rtol=1e-3)
        np.testing.assert_array_equal(np.asarray(gradient)[~where], 0)

    def test_sums_over_features_where_wished(self):
        loss = partial(losses.dispersive_loss, temperature=0.7, normalize_by_dim=False)
        value = jax.jit(loss)(features())
        np.testing.assert_allclose(value, literal(features(), "info_nce_l2", 1), rtol=1e-4)


class TestClaims:
    @pytest.mark.claim("dispersive-loss")
    def test_is_info_nce_without_its_positives_and_spreads_what_has_collapsed(self):
        """From 0 at a collapse towards -log batch, by pushes with softmax weights."""
        z, everything = features(), np.ones(6, bool)
        value, gradient = run("info_nce_l2", z, everything)
        distances = np.square(z[:, None] - z).mean(axis=(2, 3))
        weights = scipy.special.softmax(-distances / 0.7)
        push = np.einsum("ij,ijkl->ikl", weights, z[:, None] - z) * -4 / (6 * 0.7)
        np.testing.assert_allclose(gradient, push, rtol=1e-3, atol=1e-6)

        # each example its own positive, whose distance is 0; the mean of logs is the log of the
        # mean where all examples have the same surroundings
        angles = 2 * np.pi * np.arange(6) / 6
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("f")
        for x, is_even in ((circle, True), (z.reshape(6, 6), False)):
            between = np.square(x[:, None] - x).mean(axis=-1)
            info_nce = jax.jit(losses.info_nce_loss)(-between, np.arange(6), temperature=0.7).mean()
            found, _ = run("info_nce_l2", x, everything)
            if is_even:
                np.testing.assert_allclose(found, info_nce - np.log(6), rtol=1e-5)
            assert found > info_nce - np.log(6) - 1e-6

        for far in (1.0, 1e4):
            moved = far + z @ np.array([[0.6, -0.8], [0.8, 0.6]], "f")
            np.testing.assert_allclose(run("info_nce_l2", moved, everything)[0], value, rtol=2e-3)
        assert run("info_nce_l2", np.full_like(z, 7.3), everything)[0] == 0
        apart, _ = run("info_nce_l2", 100 * z, everything)
        np.testing.assert_allclose(apart, -np.log(6), rtol=1e-6)

        step = lambda z, _: (z - jax.grad(LOSSES["info_nce_l2"])(z), None)
        spread = jax.jit(lambda z: jax.lax.scan(step, z, length=100)[0])(1e-2 * z)
        assert run("info_nce_l2", 1e-2 * z, everything)[0] > -0.01
        assert -np.log(6) < run("info_nce_l2", spread, everything)[0] < -1


@pytest.mark.parametrize(
    ("variant", "ring"),
    [("info_nce_l2", True), ("info_nce_cosine", False), ("hinge", True), ("covariance", True)],
)
def test_eight_devices_have_the_value_and_gradient_of_one(variant, ring):
    z, where = features(16), np.arange(16) % 5 != 3
    where[4:6] = False  # one device has none
    sharded = jax.shard_map(
        lambda z, where: LOSSES[variant](z, where=where, axis_name="data", ring=ring),
        mesh=jax.make_mesh((8,), ("data",), (AxisType.Auto,)),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    found = jax.jit(jax.value_and_grad(sharded))(z, where)
    expected = run(variant, z, where)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)


class TestEdges:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_extremes_are_finite_and_nothing_gives_0(self, variant):
        z = features()
        z[0], z[1] = 0, 1e4
        for x, where in ((z, np.ones(6, bool)), (np.zeros_like(z), np.ones(6, bool)),
                         (z, np.zeros(6, bool))):  # fmt: skip
            value, gradient = run(variant, x, where)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
        assert value == 0
        half, _ = run(variant, jnp.asarray(features(), jnp.bfloat16), np.ones(6, bool))
        assert half.dtype == jnp.bfloat16

    def test_no_example(self):
        assert run("info_nce_l2", np.zeros((0, 3), "f"), np.zeros(0, bool))[0] == 0

    def test_bad_input(self):
        loss = losses.dispersive_loss
        with pytest.raises(ValueError, match="variant must be one of"):
            loss(features(), variant="l2")
        with pytest.raises(ValueError, match="temperature must be in"):
            loss(features(), temperature=0)
        with pytest.raises(ValueError, match="margin must be in"):
            loss(features(), margin=-1)
        with pytest.raises(ValueError, match=r"where must have shape \(6,\), got \(5,\)"):
            loss(features(), where=np.ones(5, bool))
        with pytest.raises(ValueError, match=r"features must have shape \[batch, ...\]"):
            loss(jnp.float32(1))
        with pytest.raises(TypeError, match="features must have a floating-point type"):
            loss(np.ones((3, 2), int))
