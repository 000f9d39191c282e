from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.nn import (
    Conv,
    ScaledWeightStandardizedConv,
    SigmaReparamConv,
    WeightStandardizedConv,
)

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "weight_norms.npz")
LAYERS = {  # against layers in PyTorch
    "plain": (Conv, {}),
    "authors_ws": (WeightStandardizedConv, {}),
    "timm_ws": (WeightStandardizedConv, {"epsilon": 1e-6, "unbiased": False}),
    "timm_scaled": (ScaledWeightStandardizedConv, {"nonlinearity_gain": 1.7}),
    "sigma": (SigmaReparamConv, {}),
}
REPARAMETRIZED = (WeightStandardizedConv, ScaledWeightStandardizedConv, SigmaReparamConv)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def from_oracle(name):
    """The layer with the parameters that the oracle's has."""
    layer, options = LAYERS[name]
    conv = layer(
        3,
        4,
        (3, 2),
        strides=(2, 1),
        padding=((1, 1), (0, 0)),
        use_bias=True,
        rngs=nnx.Rngs(0),
        **options,
    )
    conv.kernel[...], conv.bias[...] = ORACLE["kernel"], ORACLE["bias"]
    if name == "timm_scaled":
        conv.gain[...] = ORACLE["gain"]
    if name == "sigma":
        conv.gamma[...] = jnp.float32(1.5)
        # Theirs starts from the other singular vector: this u makes the two first steps agree.
        matrix = ORACLE["kernel"].transpose(2, 0, 1, 3).reshape(18, 4)
        conv.u[...] = jnp.asarray(np.linalg.svd(matrix)[2][0])
    return conv


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*[name for name in LAYERS if name != "sigma"])
    def test_values_and_gradients_match_torch(self, name):
        graphdef, state = nnx.split(from_oracle(name))

        def apply(state, x):
            y = nnx.merge(graphdef, state)(x)
            return jnp.sum(y * ORACLE["cotangent"]), y

        differentiate = self.variant(jax.grad(apply, argnums=(0, 1), has_aux=True))
        (gradients, gradient_x), y = differentiate(state, ORACLE["x"])
        np.testing.assert_allclose(y, ORACLE[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradient_x, ORACLE[f"{name}_grad_x"], rtol=1e-4, atol=1e-5)
        for parameter, gradient in nnx.to_pure_dict(gradients).items():
            expected = ORACLE[f"{name}_grad_{parameter}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4, err_msg=parameter)

    def test_sigma_reparam_reaches_the_authors_layer_once_both_have_converged(self):
        conv = from_oracle("sigma")
        exact = np.linalg.norm(ORACLE["kernel"].reshape(18, 4), 2)
        y = conv(ORACLE["x"])
        plain = ORACLE["plain"] - ORACLE["bias"]
        np.testing.assert_allclose(y - ORACLE["bias"], 1.5 / exact * plain, rtol=1e-4, atol=1e-5)
        ratio = ORACLE["sigma_sigma"] / exact  # theirs after a single step
        theirs = ratio * (ORACLE["sigma"] - ORACLE["bias"])
        np.testing.assert_allclose(y - ORACLE["bias"], theirs, rtol=1e-4, atol=1e-5)

    def test_groups_match_torch(self):
        conv = Conv(
            4,
            6,
            (3, 3),
            padding=((1, 1), (2, 2)),
            feature_group_count=2,
            use_bias=True,
            rngs=nnx.Rngs(0),
        )
        assert conv.kernel.shape == (3, 3, 2, 6)
        conv.kernel[...], conv.bias[...] = ORACLE["grouped_kernel"], ORACLE["grouped_bias"]
        np.testing.assert_allclose(
            conv(ORACLE["grouped_x"]), ORACLE["grouped"], rtol=1e-5, atol=1e-5
        )

    @parameterized.parameters("SAME", "VALID")
    def test_sequences_match_flax(self, padding):
        ours = Conv(3, 4, (4,), strides=2, padding=padding, rngs=nnx.Rngs(0))
        theirs = nnx.Conv(3, 4, (4,), strides=2, padding=padding, use_bias=False, rngs=nnx.Rngs(1))
        theirs.kernel[...] = ours.kernel[...]
        x = random((2, 9, 3))
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours(x[0]), theirs(x)[0], rtol=1e-5, atol=1e-6)
        assert ours(x.reshape(2, 1, 9, 3)).shape == (2, 1, *theirs(x).shape[1:])


class TestFold:
    @pytest.mark.parametrize("layer", REPARAMETRIZED)
    def test_folded_computes_the_same(self, layer):
        options = {"strides": 2, "use_bias": True, "feature_group_count": 2, "axes": ("in", "out")}
        conv = layer(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
        conv.kernel[...] = 1 + random((3, 3, 2, 6))
        conv.bias[...] = random(6, 1)
        x = random((2, 5, 5, 4))
        conv(x)
        folded = conv.fold()
        conv.eval()
        assert type(folded) is Conv
        assert folded.kernel.get_metadata()["axes"] == (None, None, "in", "out")
        np.testing.assert_array_equal(folded(x), conv(x))
        assert np.abs(folded.kernel[...] - conv.kernel[...]).max() > 0.1

    def test_only_the_spectral_layer_has_state(self):
        for layer in REPARAMETRIZED:
            conv = layer(3, 4, (2, 2), rngs=nnx.Rngs(0))
            state = jax.tree.leaves(nnx.state(conv, nnx.BatchStat))
            assert len(state) == (2 if layer is SigmaReparamConv else 0)


class TestConv:
    def test_parameters(self):
        conv = Conv(3, 8, (5, 5), axes=("embed", "mlp"), use_bias=True, rngs=nnx.Rngs(0))
        assert conv.kernel.get_metadata()["axes"] == (None, None, "embed", "mlp")
        assert conv.bias.get_metadata()["axes"] == ("mlp",)
        np.testing.assert_allclose(np.var(conv.kernel[...]), 1 / 75, rtol=0.2)
        scaled = ScaledWeightStandardizedConv(3, 8, (5, 5), axes=(None, "mlp"), rngs=nnx.Rngs(0))
        assert scaled.gain.get_metadata()["axes"] == ("mlp",)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        x = random((2, 5, 5, 3))
        for layer in (Conv, *REPARAMETRIZED):
            exact = layer(3, 4, (3, 3), rngs=nnx.Rngs(0))(x)
            conv = layer(3, 4, (3, 3), dtype=dtype, rngs=nnx.Rngs(0))
            assert conv(x).dtype == dtype
            assert conv.kernel.dtype == jnp.float32
            tolerance = 16 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(np.float32(conv(x)), exact, rtol=tolerance, atol=tolerance)

    def test_sharded_batch(self):
        conv, x = Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), random((8, 5, 5, 3))
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = nnx.jit(lambda conv, x: conv(x))(conv, jax.device_put(x, sharding))
        assert ours.sharding.is_equivalent_to(sharding, 4)
        np.testing.assert_allclose(ours, conv(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"strides": (1,)}, "strides must be one for each of the 2 spatial axes"),
            ({"strides": 0}, "strides must be in"),
            ({"kernel_size": (3, 0)}, "kernel_size must be in"),
            ({"padding": "FULL"}, "padding must be 'SAME', 'VALID' or a pair"),
            ({"padding": ((1, 1),)}, "padding must be 'SAME', 'VALID' or a pair"),
            ({"feature_group_count": 2}, "feature_group_count must divide in_features = 3"),
            ({"feature_group_count": 0}, "feature_group_count must be in"),
        ],
    )
    def test_bad_input_is_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            Conv(3, 4, **{"kernel_size": (3, 3), "rngs": nnx.Rngs(0), **options})

    def test_bad_image_is_named(self):
        conv = Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        for shape in ((2, 5, 5, 4), (5, 3)):
            with pytest.raises(ValueError, match=r"x must have shape \[..., 2 spatial axes, 3\]"):
                conv(jnp.ones(shape))
