import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import MLP, CRReLU, ScaledFusedMLP

ACTIVATIONS = {
    "relu": (jax.nn.relu, lambda z: np.maximum(z, 0)),
    "silu": (jax.nn.silu, lambda z: z / (1 + np.exp(-z))),
    "gelu": (
        jax.nn.gelu,
        lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    ),
}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_matches_the_formula(activation, gated, leading):
    function, act = ACTIVATIONS[activation]
    mlp = MLP(4, 6, activation=function, gated=gated, rngs=nnx.Rngs(0))
    x = random((*leading, 4))
    up, down = (np.float64(linear.kernel[...]) for linear in (mlp.up, mlp.down))
    hidden = act(x @ np.float64(mlp.gate.kernel[...])) * (x @ up) if gated else act(x @ up)
    np.testing.assert_allclose(mlp(x), hidden @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_match_plain_jax(gated):
    mlp, x = MLP(4, 6, gated=gated, rngs=nnx.Rngs(0)), random((2, 3, 4))
    loss = lambda mlp: jnp.sum(mlp(x) * random(x.shape, 1))
    ours = nnx.to_pure_dict(nnx.grad(loss)(mlp))

    def plain(params):
        hidden = jnp.einsum("abi,ih->abh", x, params["up"]["kernel"])
        if gated:
            gate = jnp.einsum("abi,ih->abh", x, params["gate"]["kernel"])
            hidden = jax.nn.gelu(gate) * hidden
        else:
            hidden = jax.nn.gelu(hidden)
        y = jnp.einsum("abh,ho->abo", hidden, params["down"]["kernel"])
        return jnp.sum(y * random(x.shape, 1))

    expected = jax.grad(plain)(nnx.to_pure_dict(nnx.state(mlp)))
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_parameters():
    mlp = MLP(4, 6, gated=True, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    assert mlp.up.kernel.get_metadata()["axes"] == ("embed", "mlp")
    assert mlp.gate.kernel.get_metadata()["axes"] == ("embed", "mlp")
    assert mlp.down.kernel.get_metadata()["axes"] == ("mlp", "embed")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(mlp))} == {jnp.bfloat16.dtype}
    assert not np.array_equal(mlp.up.kernel[...], mlp.gate.kernel[...])
    assert MLP(4, 6, rngs=nnx.Rngs(0)).gate is None


def test_initializers():
    ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
    mlp = MLP(4, 6, gated=True, kernel_init=ones, output_init=zeros, rngs=nnx.Rngs(0))
    assert (mlp.up.kernel[...] == 1).all()
    assert (mlp.gate.kernel[...] == 1).all()
    assert (mlp.down.kernel[...] == 0).all()
    assert (MLP(4, 6, kernel_init=ones, rngs=nnx.Rngs(0)).down.kernel[...] == 1).all()


def test_half_precision():
    mlp = MLP(4, 6, gated=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    full = MLP(4, 6, gated=True, rngs=nnx.Rngs(0))
    x = random((3, 4))
    assert mlp(x).dtype == jnp.bfloat16
    assert mlp.up.kernel.dtype == jnp.float32
    np.testing.assert_allclose(np.float32(mlp(x)), full(x), atol=0.03)


def test_input_of_another_size_raises():
    with pytest.raises(ValueError, match=r"x must have shape \[..., 4\], got \(3, 5\)"):
        MLP(4, 6, rngs=nnx.Rngs(0))(jnp.ones((3, 5)))


class TestScaledFused:
    def test_with_the_residual_it_is_the_papers_sublayer(self):
        mlp = ScaledFusedMLP(4, 16, rngs=nnx.Rngs(0))
        mlp.alpha[...], mlp.beta[...] = jnp.float32(2.0), jnp.float32(0.7)
        x = np.random.default_rng(0).normal(size=(3, 4)).astype("f")
        np.testing.assert_allclose(
            x + mlp(x), 0.7 * x + x @ mlp.map.kernel[...] / 2, rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize(
        "kwargs", [{"gated": True}, {"use_bias": True}, {"activation": jax.nn.relu}]
    )
    def test_what_it_does_not_have_is_refused(self, kwargs):
        with pytest.raises(ValueError, match="have no meaning in ScaledFusedMLP"):
            ScaledFusedMLP(4, 16, rngs=nnx.Rngs(0), **kwargs)


def test_an_activation_may_be_a_module_with_parameters():
    mlp = MLP(4, 6, activation=CRReLU, use_bias=True, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f")
    up = x @ mlp.up.kernel[...] + mlp.up.bias[...]
    hidden = np.maximum(up, 0) + 0.01 * up * np.exp(-(up**2) / 2)
    np.testing.assert_allclose(mlp(x), hidden @ mlp.down.kernel[...], rtol=1e-4, atol=1e-5)
    gradient = nnx.grad(lambda mlp: jnp.sum(jnp.sin(mlp(x))))(mlp)
    assert all(np.any(leaf[...]) for _, leaf in nnx.to_flat_state(gradient))
