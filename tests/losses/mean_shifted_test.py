from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "mean_shifted.npz")
ROWS = PartitionSpec("data")


@jax.jit
def value_and_gradient(views, center):
    def total(views):
        values = losses.mean_shifted_contrastive_loss(*views, center)
        return values.astype("f").mean(), values

    return jax.value_and_grad(total, has_aux=True)(views)


class TestPeers:
    def test_loss_is_the_authors(self):
        (value, _), gradient = value_and_gradient(PEER["views"], PEER["center"])
        np.testing.assert_allclose(value, PEER["loss"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["grad"], rtol=1e-4, atol=1e-6)

    def test_angular_loss_is_a_quarter_of_the_authors_but_for_a_constant(self):
        def total(views, center):
            return losses.angular_center_loss(views, center).mean()

        slope = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        value, (gradient, of_center) = slope(PEER["views"], PEER["center"])
        np.testing.assert_allclose(4 * value + 4, PEER["angular"], rtol=1e-5)
        np.testing.assert_allclose(4 * gradient, PEER["angular_grad"], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(of_center, 0)


class TestClaims:
    @pytest.mark.claim("mean-shifted-contrastive")
    def test_near_the_center_directions_around_it_still_count(self):
        """And their distance from it does not, while NT-Xent loses sight of them."""
        rng = np.random.default_rng(0)
        center = np.eye(6)[0]
        tangents = np.concatenate([np.zeros((2, 4, 1)), rng.normal(size=(2, 4, 5))], axis=-1)
        unit = tangents / np.linalg.norm(tangents, axis=-1, keepdims=True)
        nt_xent = jax.jit(partial(losses.nt_xent_loss, temperature=0.25))
        limit = nt_xent(*unit.astype("f"))
        for size in (1e-2, 1e-3):
            views = (center + size * tangents).astype("f")
            (_, shifted), gradient = value_and_gradient(views, center.astype("f"))
            np.testing.assert_allclose(shifted, limit, rtol=10 * size)
            assert size * np.abs(gradient).max() > 0.01  # for a step of the size of the tangents
            (_, plain), gradient = value_and_gradient(views, np.zeros(6, "f"))
            np.testing.assert_allclose(plain, np.log(7), atol=50 * size**2)
            assert size * np.abs(gradient).max() < 50 * size**2
        np.testing.assert_allclose(plain, nt_xent(*views), rtol=1e-6)


class TestShards:
    def test_eight_devices_have_the_values_gradient_and_center_of_one(self):
        rng = np.random.default_rng(0)
        views = rng.normal(size=(2, 16, 5)).astype("f")

        def run(a, b, **options):
            center = losses.feature_center(a, **options)
            values = losses.mean_shifted_contrastive_loss(a, b, center, **options)
            return values.reshape(2, -1), center

        sharded = jax.shard_map(
            partial(run, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), (AxisType.Auto,)),
            in_specs=ROWS,
            out_specs=(PartitionSpec(None, "data"), PartitionSpec()),
        )

        def total(views, function):
            values, center = function(*views)
            return jnp.mean(values * (1 + jnp.arange(32.0).reshape(2, 16))), (values, center)

        found, expected = (
            jax.jit(jax.value_and_grad(partial(total, function=f), has_aux=True))(views)
            for f in (sharded, run)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
        unit = views[0] / np.linalg.norm(views[0], axis=-1, keepdims=True)
        mean = unit.mean(axis=0)
        center = expected[0][1][1]
        np.testing.assert_allclose(center, mean / np.linalg.norm(mean), rtol=1e-5)
        found = jax.jit(partial(losses.feature_center, normalize=False))(views[0])
        np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7)


class TestEdges:
    def test_features_at_the_center_zero_vectors_and_half_precision(self):
        views = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("f")
        center = np.eye(5, dtype="f")[0]
        views[0, 0], views[0, 1], views[1, 2] = 3 * center, 0, views[1, 2] * 1e18
        (_, values), gradient = value_and_gradient(views, center)
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[0, :2], 0)
        half = jnp.asarray(views, jnp.bfloat16)
        (_, found), _ = value_and_gradient(half, center)
        assert found.dtype == jnp.bfloat16
        (_, wide), _ = value_and_gradient(half.astype("f"), center)
        np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))
        assert jax.eval_shape(losses.angular_center_loss, half[0], center).dtype == jnp.bfloat16
        np.testing.assert_array_equal(jax.jit(losses.feature_center)(jnp.zeros((0, 5))), 0)

    def test_bad_input(self):
        view, center = np.ones((4, 5), "f"), np.ones(5, "f")
        with pytest.raises(ValueError, match=r"center must have shape \(5,\), got \(4,\)"):
            losses.mean_shifted_contrastive_loss(view, view, center[:4])
        with pytest.raises(ValueError, match=r"center must have shape \(5,\), got \(4,\)"):
            losses.angular_center_loss(view, center[:4])
        with pytest.raises(ValueError, match="temperature must be in"):
            losses.mean_shifted_contrastive_loss(view, view, center, temperature=0)
        with pytest.raises(ValueError, match=r"view_b must have shape \(4, 5\)"):
            losses.mean_shifted_contrastive_loss(view, view[:2], center)
        with pytest.raises(TypeError, match="center must have a floating-point type"):
            losses.mean_shifted_contrastive_loss(view, view, center.astype(int))
        with pytest.raises(ValueError, match=r"features must have shape \[examples, features\]"):
            losses.feature_center(center)
