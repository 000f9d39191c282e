import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref.quantization import (
    QuantSpec,
    adaptive_rounding,
    dequantize,
    fake_quantize,
    importance_mixed_precision,
    power_dequantize,
    power_quantize,
    quantize,
    rectified_sigmoid,
    rounding_regularizer,
)
from jaxref.quantization.adaptive_rounding import _rounding_start, _soft_rounding

KEY = jax.random.key(0)
ADAM = optax.adam(0.1)
CHANNELS = QuantSpec(bits=3, granularity="channel", axis=1)
IN, OUT, EXAMPLES = 16, 8, 64
LEARN = {"optimizer": ADAM, "regularization": 0.1, "steps": 200, "key": KEY}


def random_layer(seed=0, examples=EXAMPLES):
    """A kernel, inputs that are correlated (near a space of four dimensions), and outputs."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(IN, OUT))
    inputs = rng.normal(size=(examples, 4)) @ rng.normal(size=(4, IN)) / 2
    inputs += 0.1 * rng.normal(size=inputs.shape)
    return tuple(x.astype(np.float32) for x in (weight, inputs, inputs @ weight))


def squared_error(weight, inputs, targets):
    return float(np.mean(np.sum((inputs @ np.asarray(weight) - targets) ** 2, axis=-1)))


def literal_losses(outputs, targets):
    """All four in float64, example by example."""
    o, y = np.float64(outputs), np.float64(targets)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (y, o))
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(o, y)]
    return {
        "mse": np.mean(((o - y) ** 2).sum(-1)),
        "l1": np.mean(np.abs(o - y).sum(-1)),
        "cosine": np.mean(1 - np.array(cosine)),
        "kl": np.mean((p * np.log(p / q)).sum(-1)),
    }


class TestPieces(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_rectified_sigmoid(self):
        v = np.array([-1e4, -3.0, -0.7, 0.0, 0.3, 2.0, 4.0, 1e4], np.float32)
        s = 1 / (1 + np.exp(-np.float64(v.clip(-700, 700))))
        value, vjp = jax.vjp(self.variant(rectified_sigmoid), v)
        np.testing.assert_allclose(value, np.clip(1.2 * s - 0.1, 0, 1), atol=1e-6)
        inside = (1.2 * s > 0.1) & (1.2 * s < 1.1)
        np.testing.assert_allclose(
            vjp(np.ones_like(v))[0], inside * 1.2 * s * (1 - s), rtol=1e-5, atol=1e-7
        )
        wide = rectified_sigmoid(v, low=-1.0, high=1.5)
        np.testing.assert_allclose(wide, np.clip(2.5 * s - 1, 0, 1), atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1.0, 2.0, 7.5, 20.0)
    def test_rounding_regularizer(self, beta):
        h = np.array([0.0, 0.1, 0.45, 0.5, 0.8, 1.0], np.float32)
        u = 2 * np.float64(h) - 1
        value, gradient = jax.value_and_grad(self.variant(rounding_regularizer))(h, beta)
        np.testing.assert_allclose(value, np.sum(1 - np.abs(u) ** beta), rtol=1e-6)
        inner = u != 0
        expected = -2 * beta * np.sign(u) * np.abs(u) ** (beta - 1)
        np.testing.assert_allclose(gradient[inner], expected[inner], rtol=1e-5)
        assert np.all(np.isfinite(gradient))

    def test_types_and_no_entries(self):
        half = jnp.array([0.25, 1.0], jnp.bfloat16)
        assert rectified_sigmoid(half).dtype == rounding_regularizer(half, 2.0).dtype == half.dtype
        assert rounding_regularizer(jnp.zeros(0), 2.0) == 0


@pytest.mark.parametrize("variable", ["sigmoid", "softmax", "direct"])
def test_the_start_reproduces_the_weights(variable):
    fraction = jnp.array([0.0, 1e-6, 0.2, 0.5, 0.97, 1 - 1e-6])
    h = _soft_rounding(_rounding_start(fraction, variable), variable)
    np.testing.assert_allclose(h, fraction, atol=2e-6)


class TestNumbers:
    def test_matches_gradient_descent_by_hand(self):
        """Of one example, so that every batch is the same, in float64, with all that is learned."""
        weight, inputs, targets = random_layer(examples=1)
        weight, where = weight[:, :3], np.abs(weight[:, :3]) < np.abs(weight[:, :3]).max(axis=0)
        bias, targets = np.array([0.3, -0.2, 0.0], np.float32), targets[:, :3] + 1
        rates = {"rounding": 0.2, "bias": 0.02, "log_factor": 0.002}
        sgd = optax.multi_transform(
            {name: optax.sgd(rate) for name, rate in rates.items()}, {name: name for name in rates}
        )
        steps, strength = 25, 0.03
        result = adaptive_rounding(
            weight,
            inputs,
            targets,
            CHANNELS,
            bias=bias,
            optimizer=sgd,
            where=where,
            learn_bias=True,
            learn_scale=True,
            regularization=strength,
            steps=steps,
            batch_size=2,
            key=KEY,
        )
        w, x, y, b = (np.float64(a) for a in (weight, inputs[0], targets[0], bias))
        s = np.abs(w).max(axis=0) / 3
        floor, h_fixed, t = np.floor(w / s), np.rint(w / s) - np.floor(w / s), np.zeros(3)
        v = np.log((w / s - floor + 0.1) / 1.2 / (1 - (w / s - floor + 0.1) / 1.2))
        for step in range(steps):
            sigmoid = 1 / (1 + np.exp(-v))
            h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
            codes = np.clip(floor + np.where(where, h, h_fixed), -3, 3)
            quantized = s * np.exp(t) * codes
            slope = 2 * np.outer(x, x @ quantized + b - y)
            in_range = where & (np.abs(floor + h) < 3)
            down = slope * s * np.exp(t) * in_range
            if step >= 5:
                beta, u = 20 - 18 * (step - 5) / 20, 2 * h - 1
                down -= strength * 2 * beta * np.sign(u) * np.abs(u) ** (beta - 1) * where
            stretched = 1.2 * sigmoid - 0.1
            down *= 1.2 * sigmoid * (1 - sigmoid) * (stretched > 0) * (stretched < 1)
            t = t - rates["log_factor"] * (slope * quantized).sum(axis=0)
            b = b - rates["bias"] * 2 * (x @ quantized + b - y)
            v = v - rates["rounding"] * down
        h = 1.2 / (1 + np.exp(-v)) - 0.1 >= 0.5
        codes = np.clip(floor + np.where(where, h, h_fixed), -3, 3)
        assert np.any(codes != np.clip(np.rint(w / s), -3, 3))
        np.testing.assert_array_equal(result.weight.codes, codes)
        np.testing.assert_allclose(result.weight.scale[0], s * np.exp(t), rtol=1e-4)
        np.testing.assert_allclose(result.bias, b, rtol=1e-3, atol=1e-4)
        outputs = x @ (s * np.exp(t) * codes) + b
        np.testing.assert_allclose(result.loss, np.sum((outputs - y) ** 2), rtol=1e-3)

    @pytest.mark.parametrize(
        ("loss", "variable"),
        [("mse", "softmax"), ("l1", "direct"), ("cosine", "sigmoid"), ("kl", "softmax")],
    )
    def test_losses_and_variables(self, loss, variable):
        weight, inputs, targets = random_layer()
        options = LEARN | {"loss": loss, "variable": variable}
        result = adaptive_rounding(weight, inputs, targets, CHANNELS, **options)
        ours, nearest = (
            literal_losses(inputs @ np.asarray(w), targets)[loss]
            for w in (dequantize(result.weight), fake_quantize(weight, CHANNELS))
        )
        np.testing.assert_allclose(result.loss, ours, rtol=1e-4)
        assert ours < 0.95 * nearest
        position = weight / np.asarray(result.weight.scale)
        assert np.all(np.abs(result.weight.codes - position) < 1)

    def test_power_levels(self):
        weight, inputs, targets = random_layer()
        result = adaptive_rounding(weight, inputs, targets, CHANNELS, exponent=0.7, **LEARN)
        nearest = power_quantize(weight, 0.7, CHANNELS)
        np.testing.assert_array_equal(result.weight.transformed.scale, nearest.transformed.scale)
        ours, theirs = (
            squared_error(power_dequantize(q), inputs, targets) for q in (result.weight, nearest)
        )
        np.testing.assert_allclose(result.loss, ours, rtol=1e-4)
        assert ours < 0.9 * theirs
        off = result.weight.transformed.codes - nearest.transformed.codes
        assert np.abs(off).max() == 1

    def test_dropping_puts_full_precision_inputs_in_place(self):
        """Inputs of zeros teach nothing."""
        weight, inputs, targets = random_layer()
        options = LEARN | {"full_precision_inputs": inputs, "noise": 0.1}
        codes = [
            adaptive_rounding(
                weight, np.zeros_like(inputs), targets, CHANNELS, drop_probability=p, **options
            ).weight.codes
            for p in (0.0, 0.9)
        ]
        position = weight / np.asarray(quantize(weight, CHANNELS).scale)
        decided = np.abs(position - np.rint(position)) < 0.4
        np.testing.assert_array_equal(codes[0][decided], np.rint(position)[decided])
        assert np.sum(codes[1] != codes[0]) > 5


@pytest.mark.claim("gradient-based-ptq")
def test_beats_nearest_rounding_even_if_half_of_the_weights_are_not_learned():
    for seed in range(3):
        weight, inputs, targets = random_layer(seed)
        nearest = squared_error(fake_quantize(weight, CHANNELS), inputs, targets)
        halves = np.random.default_rng(seed).random(weight.shape) < 0.5
        errors = []
        for where in (np.ones_like(halves), halves, ~halves):
            q = adaptive_rounding(weight, inputs, targets, CHANNELS, where=where, **LEARN).weight
            errors.append(squared_error(dequantize(q), inputs, targets))
            step = np.broadcast_to(q.scale, weight.shape)
            assert np.all(np.abs(dequantize(q) - weight) < step * (1 + 1e-5))
            assert np.all(q.codes[~where] == quantize(weight, CHANNELS).codes[~where])
        assert errors[0] < 0.6 * nearest
        assert max(errors[1:]) < 0.6 * nearest


class TestTransformations:
    def test_vmap_over_layers(self):
        layers = [random_layer(seed) for seed in (0, 1)]
        learn = lambda *layer: adaptive_rounding(*layer, CHANNELS, **LEARN)
        both = jax.vmap(learn)(*(np.stack(arrays) for arrays in zip(*layers)))
        for i, layer in enumerate(layers):
            alone = learn(*layer)
            assert np.mean(both.weight.codes[i] == alone.weight.codes) > 0.95  # rounding of sums
            np.testing.assert_allclose(both.loss[i], alone.loss, rtol=0.1)

    def test_sharded_examples(self):
        weight, inputs, targets = random_layer()
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        sharded = adaptive_rounding(
            weight, *jax.device_put((inputs, targets), sharding), CHANNELS, **LEARN
        )
        alone = adaptive_rounding(weight, inputs, targets, CHANNELS, **LEARN)
        assert np.mean(sharded.weight.codes == alone.weight.codes) > 0.95
        np.testing.assert_allclose(sharded.loss, alone.loss, rtol=0.1)


class TestEdges:
    def test_zeros_in_half_precision_with_fewer_examples_than_inputs(self):
        """Blocks that do not divide, one of them constant, one all zero."""
        weight, inputs, targets = random_layer(examples=3)
        weight[:5], weight[5:10] = 0, 0.5
        spec = QuantSpec(bits=4, granularity="block", axis=0, block_size=5, symmetric=False)
        half = jnp.asarray(weight, jnp.bfloat16)
        result = adaptive_rounding(half, inputs, targets, spec, **LEARN)
        restored = dequantize(result.weight)
        assert restored.dtype == jnp.bfloat16
        np.testing.assert_array_equal(restored[:5], 0)
        assert np.all(np.isfinite(restored.astype(np.float32)))
        assert np.isfinite(result.loss)

    def test_cosine_of_zero_vectors(self):
        weight, inputs, targets = random_layer()
        inputs[:40] = 0
        result = adaptive_rounding(weight, inputs, 0 * targets, CHANNELS, loss="cosine", **LEARN)
        assert result.loss == 0

    def test_bad_input_is_named(self):
        weight, inputs, targets = random_layer()
        good = {"weight": weight, "inputs": inputs, "targets": targets, "spec": CHANNELS}
        nan = np.where(np.arange(OUT) == 2, np.nan, weight)
        cases = [
            ({"weight": nan}, ValueError, "weight must be finite"),
            ({"weight": weight[0]}, ValueError, r"weight must have shape \[in, out\]"),
            ({"weight": weight.astype(int)}, TypeError, "weight must have a floating-point type"),
            (
                {"inputs": inputs[:, :3]},
                ValueError,
                r"inputs must have shape \[examples, ..., 16\]",
            ),
            ({"inputs": inputs[:0]}, ValueError, "inputs must have at least one example"),
            ({"targets": targets[:3]}, ValueError, r"targets must have shape \(64, 8\)"),
            ({"spec": 4}, TypeError, "spec must be a QuantSpec"),
            ({"loss": "huber"}, ValueError, "loss must be one of"),
            ({"variable": "tanh"}, ValueError, "variable must be one of"),
            ({"steps": -1}, ValueError, "steps must be in"),
            ({"batch_size": 0}, ValueError, "batch_size must be in"),
            ({"learn_bias": True}, ValueError, "bias must be given with learn_bias"),
            ({"drop_probability": 1.0}, ValueError, "drop_probability must be in"),
            ({"drop_probability": 0.5}, ValueError, "full_precision_inputs must be given"),
            (
                {"full_precision_inputs": inputs[:2]},
                ValueError,
                "full_precision_inputs must have shape",
            ),
            ({"exponent": 0.0}, ValueError, "exponent must be in"),
            ({"where": np.ones(3, bool)}, ValueError, "where must broadcast"),
            ({"where": np.ones(OUT)}, TypeError, "where must be boolean"),
        ]
        for change, error, message in cases:
            with pytest.raises(error, match=message):
                adaptive_rounding(**(good | change), key=KEY)
        with pytest.raises(ValueError, match="low must be in"):
            rectified_sigmoid(jnp.zeros(2), low=0.1)
        with pytest.raises(ValueError, match="beta must be in"):
            rounding_regularizer(jnp.zeros(2), 0.5)


class TestImportance:
    def error(self, weight, gradient, bits):
        """The model's: importance by 4^-bits."""
        return np.sum(np.abs(weight * gradient).sum(axis=0) * 4.0 ** -np.asarray(bits))

    def test_best_of_all_allocations_where_widths_are_evenly_spaced(self):
        rng = np.random.default_rng(0)
        weight, gradient = rng.normal(size=(2, 3, 5)) * rng.uniform(0.1, 3, size=5)
        bits = importance_mixed_precision(weight, gradient, 4.0, choices=(2, 4, 6))
        assert bits.sum() == 20
        every = np.stack(np.meshgrid(*[[2, 4, 6]] * 5), -1).reshape(-1, 5)
        every = every[every.sum(-1) <= 20]
        least = min(self.error(weight, gradient, row) for row in every)
        np.testing.assert_allclose(self.error(weight, gradient, bits), least, rtol=1e-12)

    def test_beats_even_bits_where_importance_has_a_heavy_tail(self):
        """The change of the outputs, weighed by what each does to the loss."""
        weight, inputs, targets = random_layer()
        sizes = np.random.default_rng(1).pareto(1.0, size=OUT) + 0.1
        gradient = np.ones_like(weight) * sizes.astype(np.float32)
        bits = np.asarray(importance_mixed_precision(weight, gradient, 4.0))
        assert bits.mean() == 4
        assert set(bits) == {2, 4, 8}
        assert np.all(np.diff(bits[np.argsort(np.abs(weight * gradient).sum(0))]) >= 0)

        def damage(widths):
            columns = [
                fake_quantize(weight[:, i], dataclasses.replace(QuantSpec(), bits=int(b)))
                for i, b in enumerate(widths)
            ]
            off = inputs @ np.stack(columns, axis=1) - targets
            return np.mean(off**2 * sizes)

        assert damage(bits) < 0.8 * damage([4] * OUT)

    def test_edges(self):
        ones = np.ones((2, 4), np.float32)
        np.testing.assert_array_equal(importance_mixed_precision(ones, ones, 3.0), [4, 4, 2, 2])
        np.testing.assert_array_equal(importance_mixed_precision(ones, 0 * ones, 8.0), [8] * 4)
        np.testing.assert_array_equal(
            importance_mixed_precision(ones, ones, 5, choices=(5,), axis=0), [5, 5]
        )
        np.testing.assert_array_equal(  # 3 bits more pay for no first step of 4
            importance_mixed_precision(ones[:, :1], ones[:, :1], 5, choices=(2, 6, 8)), [2]
        )
        huge = np.array([[1e30, 1e30, 2e30]], np.float32)
        np.testing.assert_array_equal(importance_mixed_precision(huge, huge, 2.7), [2, 2, 4])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"mean_bits": 1.5}, ValueError, "mean_bits must be in"),
            ({"mean_bits": 9}, ValueError, "mean_bits must be in"),
            ({"choices": (4, 2)}, ValueError, "choices must be rising"),
            ({"gradient": np.ones(3, np.float32)}, ValueError, "gradient must have shape"),
            ({"gradient": np.full((2, 4), np.nan)}, ValueError, "gradient must be finite"),
            ({"weight": np.ones((2, 4), int)}, TypeError, "weight must have a floating-point"),
            ({"axis": 2}, ValueError, "axis must name axes"),
        ],
    )
    def test_bad_input_is_named(self, change, error, message):
        ones = np.ones((2, 4), np.float32)
        with pytest.raises(error, match=message):
            importance_mixed_precision(
                **({"weight": ones, "gradient": ones, "mean_bits": 4} | change)
            )
