from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref.norms import group_norm, layer_norm

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "batch_norms.npz")


def random_input(shape=(2, 3, 8), seed=0):
    """x, and a scale and a bias over its last axis."""
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 2, size=shape).astype("f")
    return x, *rng.normal(size=(2, shape[-1])).astype("f")


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_and_gradients_match_torch(self):
        @self.variant
        def ours(*arguments):
            y, vjp = jax.vjp(lambda *a: group_norm(*a, groups=2, epsilon=1e-3), *arguments)
            return y, vjp(TORCH["cotangent"])

        y, gradients = ours(TORCH["x"], TORCH["scale"], TORCH["bias"])
        np.testing.assert_allclose(y, TORCH["group_y"], rtol=1e-5, atol=1e-5)
        for name, gradient in zip(("x", "0", "1"), gradients):
            expected = TORCH[f"group_grad_{name}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)

    @parameterized.parameters(1, 8)
    def test_one_group_is_layer_norm_and_one_for_each_channel_is_instance_norm(self, groups):
        x, scale, bias = random_input()
        axes = (1, 2) if groups == 1 else (1,)
        expected = layer_norm(x, axis=axes, epsilon=1e-5) * scale + bias
        ours = group_norm(x, scale, bias, groups=groups)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_gradient_against_finite_differences(self):
        arrays = random_input((2, 2, 4))
        with jax.enable_x64(True):
            check_grads(
                jax.jit(lambda *a: group_norm(*a, groups=2, epsilon=0.1)),
                [a.astype(np.float64) for a in arrays],
                order=1,
            )


def test_an_example_sees_neither_the_batch_nor_the_other_groups():
    x, scale, bias = random_input((3, 2, 4))
    norm = lambda x: group_norm(x, scale, bias, groups=2)
    jacobian = jax.jacobian(norm)(x)
    assert np.all(np.moveaxis(jacobian, 3, 1)[~np.eye(3, dtype=bool)] == 0)
    assert np.all(jacobian[..., :2, :, :, 2:] == 0)
    assert np.all(jacobian[0, ..., :2, 0, :, :2] != 0)


def test_vmap_and_a_sharded_batch():
    x, scale, bias = random_input((8, 3, 8))
    expected = group_norm(x, scale, bias, groups=4)
    mapped = jax.vmap(lambda x: group_norm(x[None], scale, bias, groups=4)[0])(x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    ours = jax.jit(lambda x: group_norm(x, scale, bias, groups=4))(jax.device_put(x, sharding))
    assert ours.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_half_precision_and_huge_and_constant_groups(dtype):
    x, scale, bias = random_input((2, 3, 8))
    x = jnp.asarray(1e4 * x, dtype).at[0, :, :4].set(0.1)
    norm = lambda x: group_norm(x, scale, bias, groups=2)
    y, vjp = jax.vjp(norm, x)
    assert y.dtype == dtype
    expected = norm(x.astype(jnp.float32)).astype(dtype)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(y[0, :, :4], jnp.broadcast_to(bias[:4].astype(dtype), (3, 4)))
    assert np.all(np.isfinite(vjp(jnp.ones_like(x))[0].astype("f")))


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_one_channel_without_positions_gives_the_bias(epsilon):
    x, scale, bias = random_input((2, 4))
    y, vjp = jax.vjp(lambda x: group_norm(x, scale, bias, groups=4, epsilon=epsilon), x)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (2, 4)))
    assert np.all(np.isfinite(vjp(np.ones_like(x))[0]))


def test_bad_input_is_named():
    x, scale, bias = random_input()
    for groups in (0, 3, 16, 2.0):
        with pytest.raises(ValueError, match="groups must be a divisor of the 8 features"):
            group_norm(x, groups=groups)
    with pytest.raises(ValueError, match=r"x must have shape \[batch, ..., features\]"):
        group_norm(scale)
    with pytest.raises(ValueError, match="holds no entries"):
        group_norm(x[:, :0], groups=2)
    with pytest.raises(ValueError, match=r"scale must have shape \(8,\)"):
        group_norm(x, scale[:2], groups=2)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        group_norm(x, None, bias[None], groups=2)
    with pytest.raises(ValueError, match="epsilon must be in"):
        group_norm(x, groups=2, epsilon=-1)
    with pytest.raises(TypeError, match="x must have a floating-point type"):
        group_norm(x.astype(int), groups=2)
