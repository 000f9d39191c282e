import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.models import TransformerConfig, VisionTransformer
from jaxref.nn import (
    MLP,
    BitLinear,
    Linear,
    called_linears,
    collect_hessians,
    collect_inputs,
    quantize_linears,
)
from jaxref.quantization import QuantSpec, gptq_quantize, hessian, quantize

SEEN = []
LAYERS = [
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"attention.function.{name}" for name in ("query", "key", "value", "output")),
        *("mlp.function.up", "mlp.function.down"),
    )
]


class Spy(Linear):
    """A `Linear` that puts its inputs aside."""

    def __call__(self, x):
        SEEN.append(x.reshape(-1, math.prod(self.in_features)))
        return super().__call__(x)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def transformer(**changes):
    sizes = {"num_layers": 2, "features": 8, "num_heads": 2, "mlp_features": 12}
    config = TransformerConfig(vocab_size=11, max_length=6, **sizes | changes)
    return config.build(rngs=nnx.Rngs(0))


def batches(count=3):
    return [np.random.default_rng(i).integers(0, 11, (2, 6)) for i in range(count)]


def hidden(model, tokens):
    return model.hidden(tokens)


class HandMade(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.second = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.norm(self.first(x))))


@pytest.fixture(scope="module")
def model():
    return transformer()


@pytest.fixture(scope="module")
def captured():
    """Inputs of every layer of that transformer over the batches, as it calls them in turn."""

    @jax.jit
    def inputs(model, tokens):
        SEEN.clear()
        model.hidden(tokens)
        return list(SEEN)

    spied = transformer(linear=Spy)
    each = [inputs(spied, tokens) for tokens in batches()]
    return dict(zip(LAYERS, map(np.concatenate, zip(*each)), strict=True))


class TestHessians:
    def test_are_those_of_the_inputs_of_a_transformer(self, model, captured):
        states = collect_hessians(model, batches(), call=hidden)
        assert set(states) == {*captured, "output"}
        for path, inputs in captured.items():
            np.testing.assert_allclose(states[path].sum, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
            assert states[path].count == len(inputs) == 36
        assert states["output"].count == 0  # which a loss reads

    def test_of_scanned_layers_have_an_axis_of_layers(self, captured):
        stacked = transformer(scan_layers=True, remat=True)
        states = collect_hessians(stacked, batches(), call=hidden)
        for i in range(2):
            inputs = captured[f"blocks.{i}.mlp.function.down"]
            state = jax.tree.map(lambda x, i=i: x[i], states["blocks.0.mlp.function.down"])
            np.testing.assert_allclose(state.sum, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
            assert state.count == 36

    def test_of_a_module_of_ones_own_in_evaluation(self):
        model, x = HandMade(nnx.Rngs(0)), random((5, 4))
        before = jax.tree.map(np.asarray, nnx.state(model))
        states = collect_hessians(model, [x, 2 * x])
        np.testing.assert_allclose(states["first"].sum, 5 * x.T @ x, rtol=1e-5)
        model.eval()
        inner = jax.jit(lambda model, x: jax.nn.relu(model.norm(model.first(x))))
        rows = np.concatenate([inner(model, y) for y in (x, 2 * x)])
        np.testing.assert_allclose(states["second"].sum, rows.T @ rows, rtol=1e-4, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
        assert type(model.first) is nnx.Linear

    def test_of_a_vision_transformer(self):
        sizes = {"num_layers": 1, "features": 8, "num_heads": 2, "mlp_features": 8}
        config = VisionTransformer.Config(
            image_shape=(4, 4, 1), num_classes=3, patch_size=2, **sizes
        )
        model, images = config.build(rngs=nnx.Rngs(0)), random((5, 4, 4, 1))
        paths = called_linears(model, images)
        assert (paths[0], paths[-1]) == ("patches.project", "head")
        states = collect_hessians(model, [images])
        assert set(states) == set(paths)
        rows = images.reshape(5, 2, 2, 2, 2).swapaxes(2, 3).reshape(20, 4)
        np.testing.assert_allclose(states["patches.project"].sum, rows.T @ rows, rtol=1e-5)
        assert states["head"].count == 5

    def test_select_and_subclasses(self):
        model = MLP(8, 16, linear=BitLinear, rngs=nnx.Rngs(0))
        states = collect_hessians(model, [random((3, 8))], select=lambda path, _: path == "up")
        assert set(states) == {"up"}
        with pytest.raises(ValueError, match="select must admit a linear layer of the model"):
            collect_hessians(model, [], select=lambda path, _: False)

    def test_serve_gptq(self):
        """Inputs that lie in a plane: GPTQ makes up for most of what rounding takes."""
        x = random((64, 2)) @ random((2, 8), 1)
        model = nnx.List([nnx.Linear(8, 6, rngs=nnx.Rngs(0))])
        states = collect_hessians(model, [x], call=lambda model, x: model[0](x))
        spec = QuantSpec(bits=3, granularity="channel", axis=1)
        by_gptq = jax.jit(lambda w, state: gptq_quantize(w, hessian(state), spec))
        rounding = jax.jit(lambda w: quantize(w, spec))
        gptq = quantize_linears(model, lambda path, w: by_gptq(w, states[path]))
        nearest = quantize_linears(model, lambda path, w: rounding(w))
        errors = [np.mean(np.square(q[0](x) - model[0](x))) for q in (gptq, nearest)]
        assert errors[0] < 0.3 * errors[1]


class TestInputs:
    def test_are_the_first_rows(self, model, captured):
        called = lambda path, _: path != "output"
        inputs = collect_inputs(model, batches(), 20, call=hidden, select=called)
        for path, rows in captured.items():
            np.testing.assert_allclose(inputs[path], rows[:20], rtol=1e-4, atol=1e-5)

    def test_no_more_batches_are_taken_than_needed(self):
        taken = iter(batches(5))
        inputs = collect_inputs(HandMade(nnx.Rngs(0)), (random((3, 4)) for _ in taken), 5)
        assert inputs["second"].shape == (5, 6)
        assert len(list(taken)) == 3

    def test_fewer_rows_than_asked_for(self):
        assert collect_inputs(HandMade(nnx.Rngs(0)), [random((3, 4))], 5)["first"].shape == (3, 4)
        with pytest.raises(ValueError, match="rows must be in"):
            collect_inputs(HandMade(nnx.Rngs(0)), [], 0)


def test_called_linears_are_in_the_order_of_the_calls(model):
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    assert called_linears(model, tokens, call=hidden) == LAYERS
