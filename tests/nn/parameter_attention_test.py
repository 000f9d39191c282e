import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref.attention import grow_optimizer_state, parameter_attention
from jaxref.nn import ParameterAttention
from jaxref.parallel import logical_sharding, make_mesh

CASES = {"flat": (6, 4), "to_heads": (6, (2, 4)), "from_heads": ((2, 3), 4)}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(case, **kwargs):
    inputs, outputs = CASES[case]
    ndim = sum(1 if isinstance(n, int) else len(n) for n in (inputs, outputs))
    return ParameterAttention(inputs, outputs, axes=(None,) * ndim, rngs=nnx.Rngs(0), **kwargs)


@nnx.jit
def apply(module, x):
    return module(x)


class TestParameterAttention:
    @pytest.mark.parametrize("case", CASES)
    def test_is_the_function_on_flat_features(self, case):
        module = build(case, num_tokens=5)
        for leading in ((), (2, 3)):
            x = random(leading + module.in_features)
            expected = parameter_attention(
                x.reshape(-1, 6),
                module.key_tokens[...].reshape(5, 6),
                module.value_tokens[...].reshape(5, -1),
            )
            ours = apply(module, x)
            assert ours.shape == leading + module.out_features
            np.testing.assert_allclose(ours, expected.reshape(ours.shape), rtol=1e-5, atol=1e-6)

    def test_parameters_their_names_and_their_sizes(self):
        axes = ("embed", "heads", None)
        module = ParameterAttention(64, (8, 16), axes=axes, rngs=nnx.Rngs(0))
        assert module.key_tokens.shape == (64, 64)
        assert module.value_tokens.shape == (64, 8, 16)
        assert module.key_tokens.get_metadata()["axes"] == ("mlp", "embed")
        assert module.value_tokens.get_metadata()["axes"] == ("mlp", "heads", None)
        np.testing.assert_allclose(np.std(module.key_tokens[...]), 0.02, rtol=0.05)
        np.testing.assert_allclose(np.var(module.value_tokens[...]), 1 / 64, rtol=0.05)
        assert module.scale == 8
        shapes = []
        init = lambda key, shape, dtype: shapes.append(shape) or jnp.zeros(shape, dtype)
        build("from_heads", num_tokens=9, kernel_init=init, value_init=init)
        assert shapes == [(9, 6), (9, 4)]
        assert build("flat", normalization="softmax").scale == 6
        assert build("flat", scale=2.5).scale == 2.5

    @pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2"])
    def test_growth_keeps_the_outputs_and_the_new_tokens_learn(self, normalization):
        module = build("to_heads", normalization=normalization)
        x, target = random((7, 6)), random((7, 2, 4), 1)
        before = apply(module, x)
        optimizer = optax.adam(1e-2)
        state = optimizer.init(nnx.state(module, nnx.Param))
        module.grow(3, value_std=0.5, rngs=nnx.Rngs(1))
        np.testing.assert_allclose(apply(module, x), before, rtol=1e-5, atol=1e-6)
        assert module.key_tokens.shape == (9, 6)
        assert module.value_tokens.shape == (9, 2, 4)
        assert module.value_tokens.get_metadata()["axes"] == ("mlp", None, None)
        np.testing.assert_allclose(np.std(module.value_tokens[6:]), 0.5, rtol=0.5)

        loss = nnx.jit(nnx.value_and_grad(lambda module: jnp.mean((module(x) - target) ** 2)))
        parameters = nnx.state(module, nnx.Param)
        state = grow_optimizer_state(state, jax.eval_shape(optimizer.init, parameters))
        losses = []
        for _ in range(5):
            value, gradients = loss(module)
            losses.append(value)
            updates, state = optimizer.update(gradients, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
            nnx.update(module, parameters)
        assert np.all(np.diff(losses) < 0)
        assert np.all(np.any(module.key_tokens[6:] != 0, axis=1))

    @pytest.mark.parametrize(
        ("kwargs", "result", "kept"),
        [
            ({}, jnp.float32, jnp.float32),
            ({"dtype": jnp.bfloat16}, jnp.bfloat16, jnp.float32),
            ({"param_dtype": jnp.bfloat16}, jnp.bfloat16, jnp.bfloat16),
        ],
    )
    def test_types(self, kwargs, result, kept):
        module = build("flat", **kwargs)
        assert module.key_tokens.dtype == module.value_tokens.dtype == kept
        x = random((3, 6))
        for array in (x, jnp.asarray(x, jnp.bfloat16)):
            assert apply(module, array).dtype == result

    def test_sharded_rows_and_tokens(self):
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        axes = ("embed", "heads", None)
        module = ParameterAttention(8, (2, 4), axes=axes, rngs=nnx.Rngs(0))
        x = random((4, 3, 8))
        expected = apply(module, x)
        for tokens in (module.key_tokens, module.value_tokens):
            names = tokens.get_metadata()["axes"]
            sharding = logical_sharding(names, tokens.shape, mesh)
            tokens[...] = jax.device_put(tokens[...], sharding)
        rows = jax.device_put(x, logical_sharding(("batch", None, None), x.shape, mesh))
        ours = apply(module, rows)
        assert len(ours.sharding.device_set) == 8
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match=r"axes must name the 3 axes of input and output"):
            ParameterAttention(6, (2, 4), axes=("embed", "heads"), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"x must have shape \[..., 2, 3\], got \(6,\)"):
            build("from_heads")(jnp.ones(6))
        with pytest.raises(ValueError, match="num_tokens must be in"):
            build("flat", num_tokens=0)
        with pytest.raises(ValueError, match="normalization must be"):
            build("flat", normalization="l1")
        with pytest.raises(ValueError, match="to grow, got 'softmax'"):
            build("flat", normalization="softmax").grow(1, rngs=nnx.Rngs(0))
