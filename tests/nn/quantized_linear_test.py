import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.models import TransformerConfig
from jaxref.nn import (
    MLP,
    BitLinear,
    Linear,
    QuantizedBitLinear,
    QuantizedLinear,
    QuantizedWeight,
    ReducedPrecisionLinear,
    WeightStandardizedLinear,
    quantize_linears,
)
from jaxref.nn.quantized_linear import linear_layers, replace_modules
from jaxref.quantization import (
    QuantSpec,
    baq_quantize,
    dequantize_kernel,
    int8_matmul,
    llm_int8_matmul,
    lnq_quantize,
    power_quantize,
    pyramid_quantize,
    quantize,
    quantize_rowwise,
)

INT4 = QuantSpec(bits=4, granularity="block", axis=0, block_size=4)
FORMATS = {
    "int4 in blocks": lambda w: quantize(w, INT4),
    "asymmetric": lambda w: quantize(
        w, QuantSpec(bits=3, granularity="channel", axis=1, symmetric=False)
    ),
    "int8": lambda w: quantize_rowwise(w, axis=0),
    "lnq": lambda w: lnq_quantize(w, jnp.eye(len(w)), bits=2),
    "baq": lambda w: baq_quantize(w, jnp.eye(len(w)), 3),
    "power": lambda w: power_quantize(w, 0.5, INT4),
    "pyramid": lambda w: pyramid_quantize(w, pulses=12, group_size=4, key=jax.random.key(0)),
}


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.jit
def to_int4(kernel):
    return quantize(kernel, INT4)


@jax.jit
def to_int8(kernel):
    return quantize_rowwise(kernel, axis=0)


@jax.jit
def run(module, x):
    return module(x)


def rounded(path, kernel):
    return to_int4(kernel)


@pytest.fixture(scope="module")
def transformer():
    sizes = {"num_layers": 2, "features": 8, "num_heads": 2, "mlp_features": 16}
    config = TransformerConfig(vocab_size=11, max_length=6, **sizes)
    return config.build(rngs=nnx.Rngs(0))


class TestQuantizedLinear:
    @pytest.mark.parametrize("name", FORMATS)
    def test_is_the_product_with_the_dequantized_kernel(self, name):
        weight = jax.jit(FORMATS[name])(random((8, 6)))
        x, bias = random((3, 5, 2, 4), 1), random((2, 3), 2)
        linear = QuantizedLinear(weight, in_features=(2, 4), out_features=(2, 3), bias=bias)
        y, kernel, of_linear = jax.jit(
            lambda linear, x: (linear(x), dequantize_kernel(weight), linear.kernel)
        )(linear, x)
        expected = (np.reshape(x, (15, 8)) @ kernel).reshape(3, 5, 2, 3) + bias
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(of_linear, kernel.reshape(2, 4, 2, 3), rtol=1e-6)
        assert linear.nbytes == weight.nbytes

    def test_compensation_of_low_rank(self):
        w, x = random((8, 6)), random((5, 8), 1)
        model = quantize_linears(
            nnx.List([Linear(8, 6, axes=(None, None), kernel_init=lambda *_: w, rngs=nnx.Rngs(0))]),
            rounded,
            low_rank=6,
        )
        [linear] = model
        rounding = x @ (w - dequantize_kernel(linear.weight.get_value()))
        y = run(linear, x)
        # All of the error, but for what 8 bits of the factors leave of it.
        assert jnp.abs(y - x @ w).max() < 0.1 * jnp.abs(rounding).max()
        np.testing.assert_allclose(y, x @ linear.kernel, rtol=1e-5, atol=1e-5)
        assert linear.nbytes > linear.weight.nbytes

    def test_activations_in_8_bits(self):
        weight, x = to_int8(random((8, 6))), random((5, 8), 1)
        x = x.at[:, 3].mul(20)
        sizes = {"in_features": 8, "out_features": 6}
        int8 = QuantizedLinear(weight, activations="int8", **sizes)
        expected = jax.jit(lambda x: int8_matmul(quantize_rowwise(x), weight))(x)
        np.testing.assert_allclose(run(int8, x), expected, rtol=1e-5)
        llm = QuantizedLinear(weight, activations="llm_int8", threshold=5.0, **sizes)
        expected = jax.jit(lambda x: llm_int8_matmul(x, weight, threshold=5.0))(x)
        np.testing.assert_allclose(run(llm, x), expected, rtol=1e-5)
        off = [np.abs(run(linear, x) - x @ llm.kernel).max() for linear in (llm, int8)]
        assert off[0] < off[1] / 2

    def test_type_to_compute_in(self):
        weight = to_int8(random((8, 6)))
        linear = QuantizedLinear(weight, in_features=8, out_features=6, dtype=jnp.bfloat16)
        assert run(linear, random((2, 8))).dtype == linear.kernel.dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        weight = to_int8(random((8, 6)))
        with pytest.raises(ValueError, match=r"weight must have shape \(8, 5\), got \(8, 6\)"):
            QuantizedLinear(weight, in_features=8, out_features=5)
        with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
            QuantizedLinear(weight, in_features=8, out_features=6, bias=jnp.ones(5))
        with pytest.raises(ValueError, match="activations must be 'int8', 'llm_int8' or None"):
            QuantizedLinear(weight, in_features=8, out_features=6, activations="int4")
        factors = random((8, 2)), random((3, 6))
        with pytest.raises(ValueError, match=r"low_rank must have shapes .* got \(\(8, 2\), \(3, "):
            QuantizedLinear(weight, in_features=8, out_features=6, low_rank=factors)
        with pytest.raises(ValueError, match=r"x must have shape \[..., 8\], got \(2, 7\)"):
            QuantizedLinear(weight, in_features=8, out_features=6)(jnp.ones((2, 7)))


class TestQuantizeLinears:
    def test_every_linear_of_a_transformer_is_replaced_and_the_model_stays(self, transformer):
        model, tokens = transformer, jnp.arange(6)[None]
        before = run(model, tokens)
        quantized = quantize_linears(model, lambda path, kernel: to_int8(kernel))
        found = [m for _, m in nnx.iter_modules(quantized) if isinstance(m, QuantizedLinear)]
        assert len(found) == len(linear_layers(model)) == 13
        assert not linear_layers(quantized)
        np.testing.assert_array_equal(run(model, tokens), before)
        after = run(quantized, tokens)  # reads the output matrix as `kernel`
        assert 0 < jnp.abs(after - before).max() < 0.1 * jnp.abs(before).max()
        assert quantized.embed.embedding is model.embed.embedding

    def test_select_by_path(self, transformer):
        in_last_mlp = lambda path, layer: path.startswith("blocks.1.mlp")
        quantized = quantize_linears(transformer, rounded, select=in_last_mlp)
        paths = {path for path, m in nnx.iter_modules(quantized) if isinstance(m, QuantizedLinear)}
        assert paths == {("blocks", 1, "mlp", "function", name) for name in ("up", "down")}

    def test_parts_are_no_parameters_and_go_through_jit(self):
        quantized = quantize_linears(MLP(8, 16, use_bias=True, rngs=nnx.Rngs(0)), rounded)
        graphdef, params, weights = nnx.split(quantized, nnx.Param, QuantizedWeight)
        assert {leaf.shape for leaf in jax.tree.leaves(params)} == {(16,), (8,)}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(weights)} == {"uint8", "float32"}

        @jax.jit
        def step(params, weights, x):
            loss = lambda params: jnp.sum(nnx.merge(graphdef, params, weights)(x) ** 2)
            moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
            return nnx.merge(graphdef, params, weights)(x), moved

        x = random((3, 8))
        y, params = step(params, weights, x)
        np.testing.assert_allclose(y, run(quantized, x), rtol=1e-4, atol=1e-5)
        nnx.update(quantized, params)
        assert jnp.any(quantized.up.bias[...] != 0)

    def test_which_classes_it_takes(self):
        axes = ("embed", "mlp")
        layers = nnx.List(
            [
                nnx.Linear(8, 6, rngs=nnx.Rngs(0)),
                WeightStandardizedLinear(8, 6, axes=axes, use_bias=True, rngs=nnx.Rngs(1)),
                BitLinear(8, 6, axes=axes, rngs=nnx.Rngs(2)),
                ReducedPrecisionLinear(8, 6, axes=axes, rngs=nnx.Rngs(3)),  # a product of its own
            ]
        )
        quantized = quantize_linears(layers, lambda path, kernel: to_int8(kernel))
        assert [type(layer).__name__ for layer in quantized] == [
            *["QuantizedLinear"] * 2,
            "QuantizedBitLinear",
            "ReducedPrecisionLinear",
        ]
        x = random((4, 8))
        for small, layer in zip(quantized, layers):
            np.testing.assert_allclose(run(small, x), run(layer, x), atol=0.1)

    def test_a_bit_linear_keeps_its_kernel_in_2_bits(self):
        mlp = MLP(8, 16, linear=BitLinear, use_bias=True, rngs=nnx.Rngs(0))
        small = quantize_linears(mlp, rounded)
        x = random((3, 8))
        assert isinstance(small.up, QuantizedBitLinear)
        np.testing.assert_array_equal(run(small, x), run(mlp, x))
        assert small.up.nbytes == 8 * 16 / 4 + 4
        np.testing.assert_array_equal(small.down.kernel, mlp.down.effective_kernel())

    def test_a_layer_that_modules_share_is_one(self):
        shared = Linear(8, 8, axes=(None, None), rngs=nnx.Rngs(0))
        quantized = quantize_linears(nnx.List([shared, nnx.List([shared])]), rounded)
        assert isinstance(quantized[0], QuantizedLinear)
        assert quantized[1][0] is quantized[0]

    def test_bad_input_is_named(self):
        stacked = Linear(8, 8, axes=(None, None), rngs=nnx.Rngs(0))
        stacked.kernel = nnx.Param(jnp.ones((3, 8, 8)))
        model = nnx.List([stacked])
        with pytest.raises(
            ValueError, match=r"0 must have a kernel of its own, .* \(3, 8, 8\); ta"
        ):
            quantize_linears(model, rounded)
        with pytest.raises(ValueError, match="low_rank must be in"):
            quantize_linears(model, rounded, low_rank=-1)
        with pytest.raises(ValueError, match=r"modules of the model, got \['middle'\]"):
            replace_modules(model, {"middle": nnx.List([])})
