import copy
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref.quantization import (
    QuantSpec,
    adaquant,
    adaquant_inputs,
    bias_correction,
    dequantize,
    fake_quantize,
    para_normalization,
    quantize,
    sequential_adaquant,
)

KEY = jax.random.key(0)
CHANNELS = QuantSpec(bits=4, granularity="channel", axis=1)
INPUTS = QuantSpec(bits=4, symmetric=False)
RATES = {"lr_weight": 0.003, "lr_weight_scale": 0.001, "lr_bias": 0.01, "lr_input_scale": 0.01}
IN, OUT = 16, 8


def random_layer(seed=0, examples=96, fresh=256):
    """A kernel, correlated inputs, and others of the same kind that calibration does not see."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(IN, OUT))
    inputs = rng.normal(size=(examples + fresh, 4)) @ rng.normal(size=(4, IN)) / 2
    inputs += 0.1 * rng.normal(size=inputs.shape)
    return weight.astype("f"), inputs[:examples].astype("f"), inputs[examples:].astype("f")


def linear_relu(weight, bias, x):
    return jax.nn.relu(x @ weight + bias)


class LiteralAdaQuant:
    """Adam on one example of a linear layer, in float64, with gradients by hand."""

    def __init__(self, weight, bias, inputs, targets, rates):
        self.x, self.y = np.float64(inputs), np.float64(targets)
        low, high = self.x.min(), self.x.max()
        self.params = {
            "weight": np.float64(weight),
            "bias": np.float64(bias),
            "size": np.abs(weight).max(axis=0).astype(np.float64),
            "input_size": high - low,
            "input_low": low,
        }
        self.rates = rates
        self.moments = dict.fromkeys(self.params, (0.0, 0.0))

    def forward(self):
        p = self.params
        # What lies on the end of the range counts half, as the mean of both sides.
        share = lambda at, end: np.where(at < end, 1.0, np.where(at == end, 0.5, 0.0))
        self.s = p["size"] / 7
        position = p["weight"] / self.s
        self.w_in = share(np.abs(position), 7)
        self.codes = np.rint(np.clip(position, -7, 7))
        self.t = p["input_size"] / 15
        self.z = np.rint(-8 - p["input_low"] / self.t)
        position = self.x / self.t + self.z
        self.x_in = share(np.abs(position + 0.5), 7.5)
        self.x_codes = np.rint(np.clip(position, -8, 7)) - self.z
        self.outputs = self.t * self.x_codes @ (self.s * self.codes) + p["bias"]
        return np.mean((self.outputs - self.y) ** 2)

    def step(self, count):
        self.forward()
        p, off = self.params, 2 * (self.outputs - self.y) / self.y.size
        d_w = np.outer(self.t * self.x_codes, off)
        d_x = (self.s * self.codes) @ off
        d_z = d_x * (self.x_in - 1) * self.t
        d_t = np.sum(d_x * (self.x_codes - self.x_in * self.x / self.t))
        gradient = {
            "weight": d_w * self.w_in,
            "bias": off,
            "size": np.sum(d_w * (self.codes - self.w_in * p["weight"] / self.s), axis=0) / 7,
            "input_size": (d_t + np.sum(d_z) * p["input_low"] / self.t**2) / 15,
            "input_low": -np.sum(d_z) / self.t,
        }
        for name, g in gradient.items():
            m, v = self.moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            self.moments[name] = m, v
            update = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
            p[name] = p[name] - self.rates[name] * update


class TestAdaQuant:
    def test_matches_adam_by_hand(self):
        rng = np.random.default_rng(0)
        weight = rng.uniform(-6, 6, size=(6, 3)).astype("f")
        weight[0], weight[3, 1] = [7, -14, 3.5], 9.3  # extremes that are levels to the last bit
        weight[0] *= [1, 1, 2]
        inputs = np.array([-3, 12, 2.2, 0.7, 5.4, -1.2], "f")
        bias, targets = np.array([0.1, 0.0, -3.0], "f"), inputs @ weight + np.float32(20)
        rates = {"lr_weight": 0.11, "lr_bias": 0.3, "lr_weight_scale": 0.05, "lr_input_scale": 0.07}
        layer = adaquant(
            *(weight, bias, inputs[None], targets[None], CHANNELS, INPUTS),
            steps=12,
            batch_size=3,
            key=KEY,
            **rates,
        )
        names = ("weight", "bias", "size", "input_size", "input_low")
        by_name = dict(zip(names, (*rates.values(), rates["lr_input_scale"])))
        ours = LiteralAdaQuant(weight, bias, inputs, targets, by_name)
        np.testing.assert_allclose(layer.initial_loss, ours.forward(), rtol=1e-4)
        for count in range(1, 11):  # the best of the iterates that are looked at: 0, 10 and 12
            ours.step(count)
        best = copy.deepcopy(ours)
        for count in (11, 12):
            ours.step(count)
        assert best.forward() < ours.forward()
        ours = best
        np.testing.assert_allclose(layer.loss, ours.forward(), rtol=1e-3)
        np.testing.assert_array_equal(layer.weight.codes, ours.codes)
        np.testing.assert_allclose(layer.weight.scale[0], ours.s, rtol=1e-4)
        np.testing.assert_allclose(layer.bias, ours.params["bias"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(layer.input_scale, [[ours.t]], rtol=1e-4)
        np.testing.assert_array_equal(layer.input_zero_point, [[ours.z]])
        moved = np.abs(layer.weight.codes - quantize(weight, CHANNELS).codes)
        assert moved.max() >= 1

    @pytest.mark.claim("adaquant-calibtip")
    def test_generalizes_from_a_hundred_examples_where_scales_alone_do_not_suffice(self):
        """At 4 bits, on inputs that were not seen."""
        for seed in range(5):
            weight, inputs, fresh = random_layer(seed)
            error = lambda q: np.mean((fresh @ (dequantize(q) - weight)) ** 2)
            learn = lambda **rates: adaquant(
                *(weight, None, inputs, inputs @ weight, CHANNELS),
                **(RATES | {"steps": 400, "key": KEY} | rates),
            )
            ours, scales_only = learn(), learn(lr_weight=0.0, lr_weight_scale=0.01)
            nearest = error(quantize(weight, CHANNELS))
            assert scales_only.loss <= scales_only.initial_loss
            assert ours.loss < 0.5 * ours.initial_loss
            assert error(ours.weight) < 0.5 * nearest
            assert error(ours.weight) < 0.75 * error(scales_only.weight)

    def test_result_is_what_its_loss_says(self):
        """Blocks that do not divide, a zero block, inputs by channel, bfloat16, few examples."""
        weight, inputs, _ = random_layer(examples=5)
        weight[:6] = 0
        half = jnp.asarray(weight, jnp.bfloat16)
        spec = QuantSpec(bits=3, granularity="block", axis=0, block_size=6, symmetric=False)
        input_spec = QuantSpec(bits=4, granularity="channel", axis=-1)
        targets = inputs @ half.astype(jnp.float32)
        layer = adaquant(half, None, inputs, targets, spec, input_spec, steps=30, key=KEY, **RATES)
        assert layer.bias is None
        assert layer.input_zero_point is None
        assert dequantize(layer.weight).dtype == jnp.bfloat16
        kernel = dequantize(layer.weight, dtype=jnp.float32)
        outputs = adaquant_inputs(layer, inputs, input_spec) @ kernel
        np.testing.assert_allclose(layer.loss, np.mean((outputs - targets) ** 2), rtol=1e-4)
        assert layer.loss < layer.initial_loss

    def test_never_worse_than_the_start(self):
        weight, inputs, _ = random_layer()
        for rate in (3.0, 1e38):  # the latter makes NaN of scales
            wild = {"lr_weight": rate, "lr_weight_scale": rate, "steps": 30}
            layer = adaquant(weight, None, inputs, inputs @ weight, CHANNELS, key=KEY, **wild)
            assert layer.loss == layer.initial_loss
            np.testing.assert_array_equal(layer.weight.codes, quantize(weight, CHANNELS).codes)

    def test_zeros(self):
        zeros = np.zeros((IN, IN), "f")
        layer = adaquant(zeros, None, zeros, zeros, CHANNELS, INPUTS, steps=30, key=KEY, **RATES)
        assert layer.loss == 0
        assert not np.any(dequantize(layer.weight))

    def test_vmap_and_sharded_examples(self):
        layers = [random_layer(seed)[:2] for seed in (0, 1)]
        learn = lambda w, x: adaquant(w, None, x, x @ w, CHANNELS, steps=30, key=KEY, **RATES)
        alone = [learn(*layer) for layer in layers]
        both = jax.vmap(learn)(*(np.stack(arrays) for arrays in zip(*layers)))
        np.testing.assert_allclose(both.loss, [layer.loss for layer in alone], rtol=0.05)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.device_put(layers[0][1], NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(learn(layers[0][0], sharded).loss, alone[0].loss, rtol=0.05)

    def test_bad_input_is_named(self):
        weight, inputs, _ = random_layer()
        good = dict(zip(("weight", "bias", "inputs"), (weight, None, inputs)))
        good |= {"targets": inputs @ weight, "weight_spec": CHANNELS, "input_spec": INPUTS}
        blocks = QuantSpec(granularity="block", axis=-1, block_size=4)
        cases = [
            ({"weight": np.where(weight > 2, np.inf, weight)}, ValueError, "weight must be finite"),
            ({"bias": np.ones(OUT, int)}, TypeError, "bias must have a floating-point type"),
            ({"inputs": inputs[:, :5]}, ValueError, "inputs must have shape"),
            ({"targets": inputs}, ValueError, r"targets must have shape \(96, 8\)"),
            ({"weight_spec": 4}, TypeError, "weight_spec must be a QuantSpec"),
            ({"input_spec": 4}, TypeError, "input_spec must be a QuantSpec"),
            ({"input_spec": blocks}, ValueError, "input_spec must have granularity"),
            (
                {"input_spec": QuantSpec(granularity="channel", axis=0)},
                ValueError,
                "input_spec must have granularity",
            ),
            ({"lr_bias": -1.0}, ValueError, "lr_bias must be in"),
            ({"steps": 1.5}, TypeError, "steps must be an int"),
        ]
        for change, error, message in cases:
            with pytest.raises(error, match=message):
                adaquant(**(good | change), key=KEY)


class TestSequential:
    def networks(self, spec, **options):
        """Three layers with ReLU, sequential and parallel, and their outputs on fresh inputs."""
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=(IN, IN)).astype("f") / 3 for _ in range(3)]
        layers = [(linear_relu, weight, np.full(IN, 0.1, "f")) for weight in weights]
        _, inputs, fresh = random_layer()

        def outputs(layers, x, quantized_inputs=lambda layer, x: x):
            for layer in layers:
                weight, bias = layer[:2]
                x = linear_relu(weight, bias, quantized_inputs(layer, x))
            return x

        full = outputs([layer[1:] for layer in layers], fresh)
        errors = []
        for parallel in (False, True):
            fitted = sequential_adaquant(
                layers, inputs, spec, INPUTS, parallel=parallel, key=KEY, **options
            )
            as_used = [layer._replace(weight=dequantize(layer.weight)) for layer in fitted]
            ours = outputs(as_used, fresh, lambda layer, x: adaquant_inputs(layer, x, INPUTS))
            errors.append(float(np.mean((ours - full) ** 2)))
        return fitted, errors

    def test_makes_up_for_the_errors_of_earlier_layers(self):
        spec = dataclasses.replace(CHANNELS, bits=3)
        fitted, (sequential, parallel) = self.networks(spec, steps=200, **RATES)
        _, (start, _) = self.networks([spec] * 3, steps=0)
        assert all(layer.loss < layer.initial_loss for layer in fitted)
        assert sequential < parallel < start

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="layers must have at least one layer"):
            sequential_adaquant([], np.ones((2, 3)), CHANNELS, key=KEY)
        layers = [(linear_relu, np.ones((3, 3), "f"), np.ones(3, "f"))]
        with pytest.raises(ValueError, match="weight_spec must have one spec for each of 1 layers"):
            sequential_adaquant(layers, np.ones((2, 3), "f"), [CHANNELS] * 2, key=KEY)
        layer = adaquant(np.eye(3), None, np.eye(3), np.eye(3), CHANNELS, steps=0, key=KEY)
        with pytest.raises(ValueError, match="layer must have levels for its inputs"):
            adaquant_inputs(layer, np.eye(3), INPUTS)


class TestStatistics(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_para_normalization_restores_mean_and_deviation(self):
        rng = np.random.default_rng(0)
        gamma, beta = rng.normal(size=(2, 5)).astype("f")
        y = (rng.normal(size=(7, 9, 5)) * [0.5, 1, 2, 3, 4] + [3, -1, 0, 2, 5]).astype("f")
        normalize = self.variant(lambda y: para_normalization(y, gamma, beta, epsilon=1e-12))
        scale, shift = normalize(y)
        ours = scale * y + shift
        np.testing.assert_allclose(ours.mean((0, 1)), beta, atol=1e-5)
        np.testing.assert_allclose(ours.std((0, 1)), np.abs(gamma), rtol=1e-5)
        again = normalize(np.asarray(ours))
        np.testing.assert_allclose(again[0], 1, rtol=1e-5)
        np.testing.assert_allclose(again[1], 0, atol=1e-5)

    def test_matches_the_formula_and_survives_constant_channels(self):
        y = np.array([[1.0, 2.0], [4.0, 2.0], [1.0, 2.0]], "f")
        gamma, beta = np.array([0.5, 3.0], "f"), np.array([1.0, -1.0], "f")
        scale, shift = para_normalization(y, gamma, beta, epsilon=0.25)
        expected = (y - y.mean(0)) * np.sqrt(gamma**2 + 0.25) / np.sqrt(y.var(0) + 0.25) + beta
        np.testing.assert_allclose(scale * y + shift, expected, rtol=1e-5)
        np.testing.assert_allclose((scale * y + shift)[:, 1], -1.0, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_bias_correction_restores_the_mean(self):
        weight, inputs, _ = random_layer()
        inputs += 1
        quantized = inputs @ np.asarray(fake_quantize(weight, QuantSpec(bits=2)))
        correction = self.variant(bias_correction)(quantized, inputs @ weight)
        assert np.abs(correction).max() > 0.1
        np.testing.assert_allclose(
            (quantized + correction).mean(0), (inputs @ weight).mean(0), atol=1e-4
        )
        half = bias_correction(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros((2, 3), jnp.bfloat16))
        assert half.dtype == jnp.float32

    def test_bad_input_is_named(self):
        y, ones = np.ones((4, 3), "f"), np.ones(3, "f")
        with pytest.raises(ValueError, match=r"gamma must have shape \(3,\)"):
            para_normalization(y, ones[:2], ones)
        with pytest.raises(ValueError, match="epsilon must be in"):
            para_normalization(y, ones, ones, epsilon=0.0)
        for function in (
            lambda x: para_normalization(x, ones, ones),
            lambda x: bias_correction(x, x),
        ):
            with pytest.raises(ValueError, match="outputs must have shape"):
                function(y[:0])
        with pytest.raises(ValueError, match=r"targets must have shape \(4, 3\)"):
            bias_correction(y, y[:2])
