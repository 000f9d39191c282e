from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.nn import (
    LayerNormGRUCell,
    LayerNormGRUParams,
    LayerNormLSTMCell,
    LayerNormLSTMParams,
    layer_norm_gru_cell,
    layer_norm_lstm_cell,
)

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "layer_norm_lstm.npz")
CELLS = {"lstm": LayerNormLSTMCell, "gru": LayerNormGRUCell}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reordered(gates):
    """PyTorch's input, forget, candidate, output, as forget, input, output, candidate."""
    i, f, g, o = np.split(gates, 4, axis=-1)
    return np.concatenate([f, i, o, g], axis=-1)


def layer_norm64(x, scale, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return scale * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) + bias


def sigmoid64(x):
    return 1 / (1 + np.exp(-x))


def gru64(params, h, x, epsilon):
    """The paper's formula in float64, with a matrix for each of its symbols."""
    p = LayerNormGRUParams(*(np.asarray(value, np.float64) for value in params))
    hidden = h.shape[-1]
    norm = lambda kernel, y, which, part: layer_norm64(
        y.astype(np.float64) @ kernel[:, part],
        getattr(p, f"{which}_scale")[part],
        getattr(p, f"{which}_bias")[part],
        epsilon,
    )
    gates, candidate = slice(0, 2 * hidden), slice(2 * hidden, None)
    z, r = np.split(
        norm(p.recurrent_kernel, h, "recurrent", gates) + norm(p.input_kernel, x, "input", gates),
        2,
        axis=-1,
    )
    g = np.tanh(
        norm(p.input_kernel, x, "input", candidate)
        + sigmoid64(r) * norm(p.recurrent_kernel, h, "recurrent", candidate)
    )
    return (1 - sigmoid64(z)) * h + sigmoid64(z) * g


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_lstm_step_matches_torch(self):
        torch = {name: ORACLE[f"param_{name}"] for name in ("weight_ih", "weight_hh")}
        norms = {
            f"{ours}_{part}": ORACLE[f"param_layernorm_{theirs}.{torch_part}"]
            for ours, theirs in (("input", "i"), ("recurrent", "h"), ("cell", "c"))
            for part, torch_part in (("scale", "weight"), ("bias", "bias"))
        }
        params = LayerNormLSTMParams(
            input_kernel=reordered(torch["weight_ih"].T),
            recurrent_kernel=reordered(torch["weight_hh"].T),
            bias=np.zeros(4 * 5, np.float32),
            **{k: v if k.startswith("cell") else reordered(v) for k, v in norms.items()},
        )

        @self.variant
        def run(params, c, h, x):
            step = lambda params, c, h, x: layer_norm_lstm_cell(params, (c, h), x, epsilon=1e-5)
            ((c, h), output), vjp = jax.vjp(step, params, c, h, x)
            zero = jnp.zeros_like(c)
            return c, h, output, *vjp(((zero, zero), ORACLE["cotangent"]))

        c, h, output, grad_params, *gradients = run(params, *(ORACLE[n] for n in "chx"))
        np.testing.assert_allclose(output, ORACLE["y"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(output, h)
        normed = layer_norm64(c, params.cell_scale, params.cell_bias, 1e-5)
        np.testing.assert_allclose(normed, ORACLE["normed_cell"], rtol=1e-4, atol=1e-4)
        for name, gradient in zip("chx", gradients):
            expected = ORACLE[f"grad_{name}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
        for ours, theirs in (
            (grad_params.input_kernel, ORACLE["grad_weight_ih"].T),
            (grad_params.recurrent_kernel, ORACLE["grad_weight_hh"].T),
            (grad_params.recurrent_scale, ORACLE["grad_layernorm_h.weight"]),
            (grad_params.bias, ORACLE["grad_layernorm_i.bias"]),
        ):
            np.testing.assert_allclose(ours, reordered(theirs), rtol=1e-4, atol=1e-5)
        expected = ORACLE["grad_layernorm_c.weight"]
        np.testing.assert_allclose(grad_params.cell_scale, expected, rtol=1e-4, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_gru_step_matches_the_formula_in_float64(self):
        shapes = LayerNormGRUParams((4, 15), (5, 15), 15, 15, 15, 15)
        params = LayerNormGRUParams(*(random(shape, i) for i, shape in enumerate(shapes)))
        h, x = random((3, 5), 7), random((3, 4), 8)
        ours = self.variant(lambda *a: layer_norm_gru_cell(*a, epsilon=0.1))(params, h, x)
        np.testing.assert_allclose(ours, gru64(params, h, x, 0.1), rtol=1e-5, atol=1e-5)
        direction = random((3, 5), 9)
        step = 1e-6
        slope = (
            gru64(params, h + step * direction.astype(float), x, 0.1)
            - gru64(params, h - step * direction.astype(float), x, 0.1)
        ) / (2 * step)
        run = self.variant(lambda h: layer_norm_gru_cell(params, h, x, epsilon=0.1))
        np.testing.assert_allclose(jax.jvp(run, (h,), (direction,))[1], slope, rtol=1e-3, atol=1e-4)

    def test_the_cell_is_carried_on_unnormalised(self):
        cell = LayerNormLSTMCell(4, 5, rngs=nnx.Rngs(0))
        (c, _), _ = cell((10 * random((3, 5)), random((3, 5), 1)), random((3, 4), 2))
        assert np.abs(c).max() > 5  # a norm would hold it below √5


class TestWhatTheNormDoes:
    def test_scaling_a_recurrent_kernel_changes_nothing(self):
        """What keeps the state from exploding: cells without norms depend on that scale."""
        x, h, c = random((3, 4)), random((3, 5), 1), random((3, 5), 2)
        for name, cell_class in CELLS.items():
            cell = cell_class(4, 5, epsilon=0.0, rngs=nnx.Rngs(0))
            carry = h if name == "gru" else (c, h)
            before = cell(carry, x)[1]
            cell.recurrent_kernel[...] *= 50
            np.testing.assert_allclose(cell(carry, x)[1], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CELLS)
class TestModules:
    def test_rnn_is_a_loop_over_the_pure_function(self, name):
        cell = CELLS[name](4, 5, rngs=nnx.Rngs(0))
        x = random((2, 6, 4))
        carry, outputs = nnx.RNN(cell, return_carry=True)(x)
        h = np.zeros((2, 5), np.float32)
        expected_carry, expected = (h if name == "gru" else (h, h)), []
        for t in range(6):
            if name == "gru":
                expected_carry = layer_norm_gru_cell(cell.params, expected_carry, x[:, t])
                expected.append(expected_carry)
            else:
                expected_carry, h = layer_norm_lstm_cell(cell.params, expected_carry, x[:, t])
                expected.append(h)
        np.testing.assert_allclose(outputs, np.stack(expected, 1), rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(carry, expected_carry, rtol=1e-5, atol=1e-6)

    def test_parameters_and_types(self, name):
        cell = CELLS[name](4, 5, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        assert cell.input_kernel.get_metadata()["axes"] == ("embed", None)
        assert cell.recurrent_kernel.get_metadata()["axes"] == (None, None)
        assert all(p.dtype == jnp.bfloat16 for p in cell.params)
        np.testing.assert_array_equal(cell.recurrent_scale[...], 1)
        np.testing.assert_array_equal(cell.recurrent_bias[...], 0)
        carry = cell.initialize_carry((3, 4))
        carry, output = cell(carry, jnp.asarray(random((3, 4)), jnp.bfloat16))
        assert {leaf.dtype for leaf in jax.tree.leaves((carry, output))} == {jnp.bfloat16.dtype}

    def test_extreme_and_zero_input_stays_finite(self, name):
        cell = CELLS[name](4, 5, epsilon=0.0, rngs=nnx.Rngs(0))
        for size in (0.0, 1e4):
            x = size * random((3, 4))
            carry = jax.tree.map(lambda c: c + size, cell.initialize_carry(x.shape))
            output, vjp = jax.vjp(lambda carry, x: cell(carry, x)[1], carry, x)
            gradients = vjp(jnp.ones_like(output))
            assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((output, gradients)))

    def test_sharded_batch(self, name):
        cell = CELLS[name](4, 5, rngs=nnx.Rngs(0))
        x = random((8, 6, 4))
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = nnx.jit(lambda cell, x: nnx.RNN(cell)(x))(cell, jax.device_put(x, sharding))
        np.testing.assert_allclose(ours, nnx.RNN(cell)(x), rtol=1e-5, atol=1e-6)

    def test_bad_input_is_named(self, name):
        cell = CELLS[name](4, 5, rngs=nnx.Rngs(0))
        carry = cell.initialize_carry((3, 4))
        with pytest.raises(ValueError, match=r"x must have shape \(3, 4\)"):
            cell(carry, random((2, 4)))
        with pytest.raises(ValueError, match="input_kernel must have shape"):
            cell(jax.tree.map(lambda c: c[:, 1:], carry), random((3, 4)))
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            cell(carry, np.ones((3, 4), int))
        with pytest.raises(ValueError, match="h must have shape"):
            cell(jax.tree.map(lambda c: c[0, 0], carry), random((3, 4)))


def test_lstm_carry_must_match():
    cell = LayerNormLSTMCell(4, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"c must have shape \(3, 5\)"):
        cell((random((3, 4)), random((3, 5))), random((3, 4)))
