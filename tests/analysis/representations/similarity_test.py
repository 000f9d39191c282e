import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxref.analysis import angular_distance


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def angular_distance64(a, b):
    """The arc cosine in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return np.arccos(cosine) / np.pi


class AngularDistanceTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_arc_cosine_for_any_length(self):
        a, b = random((3, 5, 8)), random((3, 5, 8), 1)
        expected = angular_distance64(a, b)
        for scale in (1e-30, 1.0, 1e30):  # squares leave the range of float32
            ours = self.variant(angular_distance)(scale * a, b)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
        moved = angular_distance(np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0), axis=0)
        np.testing.assert_allclose(moved, expected, rtol=1e-5)
        mapped = jax.vmap(angular_distance)(a, b)
        np.testing.assert_allclose(mapped, expected, rtol=1e-5)

    def test_small_angles_keep_their_precision(self):
        angles = np.array([1e-6, 1e-4, 1e-2, 1.0, 3.0, np.pi - 1e-3])
        b = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
        a = np.broadcast_to(np.float32([1, 0]), b.shape)
        np.testing.assert_allclose(angular_distance(a, b), angles / np.pi, rtol=1e-4)

    def test_gradient_against_finite_differences(self):
        with jax.enable_x64(True):
            a, b = (random((3, 4), seed).astype(float) for seed in range(2))
            check_grads(jax.jit(angular_distance), (a, b), order=1, modes=["rev", "fwd"])

    def test_sharded_tokens(self):
        a, b = random((8, 6)), random((8, 6), 1)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = jax.jit(angular_distance)(*jax.device_put((a, b), sharding))
        np.testing.assert_allclose(ours, angular_distance64(a, b), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_equal_opposite_and_zero_vectors(size, dtype):
    x = jnp.asarray(size * random((4, 5)), dtype)
    zero = jnp.zeros_like(x)
    for other, expected in ((x, 0.0), (-x, 1.0), (zero, 0.5)):
        distance, vjp = jax.vjp(angular_distance, x, other)
        assert distance.dtype == jnp.float32
        np.testing.assert_allclose(distance, expected, atol=1e-6)
        for gradient in vjp(jnp.ones_like(distance)):
            np.testing.assert_allclose(gradient.astype(jnp.float32), 0, atol=1e-6)
    np.testing.assert_array_equal(angular_distance(zero, zero), 0.5)


def test_bad_input_is_named():
    x = random((3, 4))
    with pytest.raises(ValueError, match=r"hidden_b must have shape \(3, 4\)"):
        angular_distance(x, x[:1])
    with pytest.raises(ValueError, match="axis must name axes"):
        angular_distance(x, x, axis=2)
    with pytest.raises(TypeError, match="hidden_a must have a floating-point type"):
        angular_distance(x.astype(int), x)
