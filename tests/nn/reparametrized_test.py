import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from jaxref import norms
from jaxref.nn import (
    MLP,
    Linear,
    MultiHeadAttention,
    ScaledWeightStandardizedLinear,
    SigmaReparamLinear,
    SpectralNormalizedLinear,
    WeightNormalizedLinear,
    WeightStandardizedLinear,
)
from jaxref.parallel import logical_sharding, make_mesh

CLASSES = {
    "standardized": WeightStandardizedLinear,
    "scaled": ScaledWeightStandardizedLinear,
    "sigma": SigmaReparamLinear,
    "normalized": WeightNormalizedLinear,
    "spectral": SpectralNormalizedLinear,
}
SPECTRAL = ("sigma", "spectral")


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(name, inputs=(2, 3), outputs=(4, 5), **kwargs):
    axes = ("embed", None, "heads", None)[: len(inputs) + len(outputs)]
    return CLASSES[name](inputs, outputs, axes=axes, rngs=nnx.Rngs(0), **kwargs)


def expected_kernel(name, linear):
    """The function of `jaxref.norms`, of the flat kernel."""
    flat = linear.kernel[...].reshape(6, 20)
    if name == "standardized":
        return norms.weight_standardization(flat)
    if name == "scaled":
        return norms.scaled_weight_standardization(flat, linear.gain[...].ravel())
    if name == "normalized":
        return norms.weight_normalization(flat, linear.gain[...].ravel())
    gamma = linear.gamma[...] if name == "sigma" else 1.0
    state = norms.SpectralState(linear.u[...], linear.sigma[...])
    return norms.sigma_reparam(flat, gamma, state)[0]


def train_a_little(linear, steps=3):
    """Moves all parameters, and with them the state, away from where they started."""
    x, target = random((8, 2, 3), 1), random((8, 4, 5), 2)
    loss = lambda linear: jnp.mean((linear(x) - target) ** 2)
    for _ in range(steps):
        gradient = nnx.grad(loss)(linear)
        parameters = jax.tree.map(lambda p, g: p - 5 * g, nnx.state(linear, nnx.Param), gradient)
        nnx.update(linear, parameters)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*CLASSES)
    def test_matches_the_function(self, name):
        linear, x = build(name, use_bias=True), random((3, 2, 3))
        linear.bias[...] = random((4, 5), 1)
        expected = x.reshape(3, 6) @ expected_kernel(name, linear)
        graphdef, state = nnx.split(linear)
        ours = self.variant(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
        np.testing.assert_allclose(
            ours, expected.reshape(3, 4, 5) + linear.bias[...], rtol=1e-4, atol=1e-5
        )

    @parameterized.parameters(*CLASSES)
    def test_folded_computes_the_same_in_evaluation(self, name):
        linear, x = build(name, use_bias=True), random((3, 2, 3))
        train_a_little(linear)
        folded = linear.fold()
        linear.eval()
        assert type(folded) is Linear
        assert folded.kernel.get_metadata()["axes"] == ("embed", None, "heads", None)
        np.testing.assert_array_equal(folded(x), linear(x))
        assert np.abs(folded.kernel[...] - linear.kernel[...]).max() > 0.05
        half = build(name, use_bias=True, dtype=jnp.bfloat16)
        half_folded = half.fold()
        assert half_folded.kernel.dtype == half_folded.bias.dtype == jnp.bfloat16
        half.eval()
        np.testing.assert_array_equal(half_folded(x), half(x))

    @parameterized.parameters(*CLASSES)
    def test_folding_leaves_the_layer_as_it_is(self, name):
        linear = build(name)
        train_a_little(linear, 1)
        before = jax.tree.map(jnp.copy, nnx.state(linear))
        linear.fold()
        chex.assert_trees_all_equal(nnx.state(linear), before)


class TestState:
    @pytest.mark.parametrize("name", SPECTRAL)
    def test_training_stores_a_step_and_evaluation_does_not(self, name):
        linear, x = build(name), random((3, 2, 3))
        linear.kernel[...] = random((2, 3, 4, 5), 3)
        model = nnx.List([linear])
        before = linear.u[...]
        model.eval()
        y = linear(x)
        np.testing.assert_array_equal(linear.u[...], before)
        model.train()
        np.testing.assert_array_equal(linear(x), y)
        assert np.abs(linear.u[...] - before).max() > 1e-2
        for _ in range(100):
            linear(x)
        exact = np.linalg.norm(random((2, 3, 4, 5), 3).reshape(6, 20), 2)
        np.testing.assert_allclose(linear.sigma[...], exact, rtol=1e-5)

    def test_spectral_gamma_and_gains_of_weight_normalization_start_as_a_plain_layer(self):
        x = random((3, 2, 3))
        plain = Linear((2, 3), (4, 5), axes=(None,) * 4, rngs=nnx.Rngs(0))(x)
        sigma, normalized = build("sigma", gamma_init="spectral"), build("normalized")
        np.testing.assert_allclose(sigma(x), plain, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(normalized(x), plain, rtol=1e-4, atol=1e-5)
        assert sigma.gamma.shape == ()
        np.testing.assert_allclose(build("sigma", gamma_init=2.0).gamma[...], 2)

    @pytest.mark.parametrize("name", CLASSES)
    def test_all_parameters_learn(self, name):
        linear = build(name)
        before = jax.tree.map(jnp.copy, nnx.state(linear, nnx.Param))
        train_a_little(linear, 1)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(linear, nnx.Param))):
            assert np.abs(new - old).max() > 1e-4

    def test_axes_of_parameters_and_state(self):
        assert build("scaled").gain.get_metadata()["axes"] == ("heads", None)
        assert build("normalized").gain.shape == (4, 5)
        linear = build("sigma")
        assert linear.gamma.get_metadata()["axes"] == linear.sigma.get_metadata()["axes"] == ()
        assert linear.u.get_metadata()["axes"] == (None,)


class TestModels:
    @pytest.mark.parametrize("name", ["sigma", "scaled"])
    def test_stands_in_for_linear_in_attention_and_mlp(self, name):
        options = {"linear": CLASSES[name], "rngs": nnx.Rngs(0)}
        model = nnx.List([MultiHeadAttention(8, 2, **options), MLP(8, 16, **options)])
        x = random((2, 5, 8))

        @nnx.jit
        def loss_and_gradient(model, x):
            return nnx.value_and_grad(lambda model, x: jnp.sum(model[1](model[0](x)) ** 2))(
                model, x
            )

        loss, gradient = loss_and_gradient(model, x)
        chex.assert_tree_all_finite((loss, gradient))
        state = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
        assert len(state) == (12 if name == "sigma" else 0)  # u and sigma of six layers

    def test_sharded_rows_and_kernel(self):
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        axes = ("embed", "heads", None)
        linear = SigmaReparamLinear(8, (2, 4), axes=axes, rngs=nnx.Rngs(0))
        linear.eval()
        x = random((4, 3, 8))
        expected = linear(x)
        linear.kernel[...] = jax.device_put(
            linear.kernel[...], logical_sharding(axes, (8, 2, 4), mesh)
        )
        rows = jax.device_put(x, logical_sharding(("batch", None, None), x.shape, mesh))
        ours = nnx.jit(lambda linear, x: linear(x))(linear, rows)
        assert not ours.is_fully_replicated
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_half_precision_reparametrizes_in_float32(name):
    linear = build(name, dtype=jnp.bfloat16)
    linear.eval()
    assert linear.effective_kernel().dtype == linear(random((3, 2, 3))).dtype == jnp.bfloat16
    exact = expected_kernel(name, build(name)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(linear.effective_kernel(), exact)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="gamma_init must be a number or 'spectral'"):
        build("sigma", gamma_init="one")
    with pytest.raises(ValueError, match="epsilon must be in"):
        build("standardized", epsilon=-1.0)
    with pytest.raises(ValueError, match="nonlinearity_gain must be in"):
        build("scaled", nonlinearity_gain=0.0)
    with pytest.raises(ValueError, match="axes must name"):
        SigmaReparamLinear(2, 3, axes=(None,), rngs=nnx.Rngs(0))
