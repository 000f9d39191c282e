import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import RegionNormBasic, RegionNormLearnable
from jaxref.norms import region_norm_basic, region_norm_learnable


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype(np.float32)


def test_basic_is_the_function_with_parameters_initially_zero():
    x, mask = random((2, 4, 4, 3)), np.random.default_rng(1).random((2, 8, 8, 1)) < 0.6
    norm = RegionNormBasic(3, axes=("embed",), per_sample=False, epsilon=0.1)
    options = {"per_sample": False, "epsilon": 0.1}
    np.testing.assert_allclose(norm(x, mask), region_norm_basic(x, mask, **options), rtol=1e-6)
    names = ("foreground_scale", "foreground_bias", "background_scale", "background_bias")
    arguments = {name: random(3, i) for i, name in enumerate(names)}
    for name, value in arguments.items():
        assert getattr(norm, name).get_metadata()["axes"] == ("embed",)
        getattr(norm, name)[...] = value
    expected = region_norm_basic(x, mask, **arguments, **options)
    np.testing.assert_allclose(norm(x, mask), expected, rtol=1e-5, atol=1e-6)


def test_learnable_is_the_function_and_learns():
    x = random((2, 8, 8, 3))
    norm = RegionNormLearnable(
        kernel_size=3, threshold=0.6, per_sample=False, epsilon=0.1, rngs=nnx.Rngs(0)
    )
    assert norm.attention_kernel.shape == (3, 3, 2, 1)
    names = ("attention_kernel", "scale_kernel", "scale_bias", "bias_kernel", "bias_bias")
    for i, name in enumerate(names):
        parameter = getattr(norm, name)
        parameter[...] = random(parameter.shape, i) / parameter.size
    arguments = {name: getattr(norm, name)[...] for name in names}
    expected = region_norm_learnable(x, **arguments, threshold=0.6, per_sample=False, epsilon=0.1)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    gradients = nnx.grad(lambda norm: jnp.sum(norm(x) ** 3))(norm)
    assert all(np.any(gradient != 0) for gradient in jax.tree.leaves(gradients))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types(dtype):
    norm = RegionNormLearnable(param_dtype=dtype, rngs=nnx.Rngs(0))
    basic = RegionNormBasic(3, param_dtype=dtype)
    assert {parameter.dtype for parameter in jax.tree.leaves(nnx.state((norm, basic)))} == {
        jnp.dtype(dtype)
    }
    x = random((1, 8, 8, 3)).astype(jnp.float16)
    assert norm(x).dtype == basic(x, np.ones((1, 8, 8, 1), bool)).dtype == jnp.float16
