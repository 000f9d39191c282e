import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref.quantization import (
    QuantSpec,
    adaptive_rounding,
    nupes_quantize,
    power_dequantize,
    power_quantize,
    search_power_exponent,
)

KEY = jax.random.key(0)
CHANNELS = QuantSpec(bits=3, granularity="channel", axis=1)
IN, OUT = 16, 8


def random_layer(seed=0, examples=96):
    """A kernel with heavy tails, correlated inputs, and outputs."""
    rng = np.random.default_rng(seed)
    weight = rng.laplace(size=(IN, OUT))
    inputs = rng.normal(size=(examples, 4)) @ rng.normal(size=(4, IN)) / 2
    inputs += 0.1 * rng.normal(size=inputs.shape)
    return tuple(x.astype(np.float32) for x in (weight, inputs, inputs @ weight))


def error(q, inputs, targets):
    return float(np.mean((inputs @ np.asarray(power_dequantize(q)) - targets) ** 2))


LEARN = {"learning_rate": 0.03, "exponent_learning_rate": 0.01, "steps": 200, "key": KEY}


class TestNumbers:
    def test_matches_adam_by_hand(self):
        """Of one example, so that every batch is the same, in float64."""
        weight, inputs, targets = random_layer(seed=1, examples=1)
        weight[3] = 0
        targets = inputs @ weight + np.float32(4)
        rates = {"learning_rate": 0.08, "exponent_learning_rate": 0.004}
        result = nupes_quantize(
            weight, inputs, targets, CHANNELS, exponent=0.6, steps=10, key=KEY, **rates
        )
        w, x, y, a = np.float64(weight), np.float64(inputs[0]), np.float64(targets[0]), 0.6
        m, moments = np.abs(w).max(axis=0), [[0.0, 0.0], [0.0, 0.0]]
        v = np.sign(w) * 3 * (np.abs(w) / m) ** a

        def forward():
            q = np.rint(v)
            quantized = np.sign(q) * m * (np.abs(q) / 3) ** (1 / a)
            return q, quantized, x @ quantized - y

        np.testing.assert_allclose(result.initial_loss, np.mean(forward()[2] ** 2), rtol=1e-4)
        for count in range(1, 11):
            q, quantized, off = forward()
            down = np.outer(x, 2 * off / OUT)
            logs = np.log(np.where(q == 0, 1, np.abs(q) / 3))
            slopes = m / (3 * a) * (np.maximum(np.abs(q), 0.5) / 3) ** (1 / a - 1)
            updates = []
            for moment, g in zip(moments, (down * slopes, -np.sum(down * quantized * logs) / a**2)):
                moment[0] = 0.9 * moment[0] + 0.1 * g
                moment[1] = 0.999 * moment[1] + 0.001 * g**2
                root = np.sqrt(moment[1] / (1 - 0.999**count)) + 1e-8
                updates.append(moment[0] / (1 - 0.9**count) / root)
            v = np.clip(v - 0.08 * updates[0], -3, 3)
            a -= 0.004 * updates[1]
        q, quantized, off = forward()
        assert np.mean(off**2) < result.initial_loss
        np.testing.assert_array_equal(result.weight.transformed.codes, q)
        assert np.any(q[3] != 0)
        np.testing.assert_allclose(result.weight.exponent, a, rtol=1e-4)
        np.testing.assert_allclose(power_dequantize(result.weight), quantized, rtol=1e-3)
        np.testing.assert_allclose(result.loss, np.mean(off**2), rtol=1e-3)

    def test_better_than_its_start_and_than_rounding_up_or_down(self):
        ours, rounded = [], []
        for seed in range(3):
            weight, inputs, targets = random_layer(seed)
            result = nupes_quantize(weight, inputs, targets, CHANNELS, **LEARN)
            exponent = search_power_exponent(weight, CHANNELS)
            start = error(power_quantize(weight, exponent, CHANNELS), inputs, targets)
            np.testing.assert_allclose(result.initial_loss, start, rtol=1e-4)
            np.testing.assert_allclose(
                result.loss, error(result.weight, inputs, targets), rtol=1e-3
            )
            assert result.loss < 0.6 * start
            assert np.abs(result.weight.exponent - exponent) > 1e-3
            ours.append(result.loss)
            options = {"exponent": exponent, "steps": 200, "key": KEY}
            q = adaptive_rounding(weight, inputs, targets, CHANNELS, **options).weight
            rounded.append(error(q, inputs, targets))
        assert sum(ours) < 0.7 * sum(rounded)

    def test_each_part_alone(self):
        weight, inputs, targets = random_layer()
        start = power_quantize(weight, search_power_exponent(weight, CHANNELS), CHANNELS)
        only = nupes_quantize(weight, inputs, targets, CHANNELS, learn_weights=False, **LEARN)
        np.testing.assert_array_equal(only.weight.transformed.codes, start.transformed.codes)
        assert only.weight.exponent != start.exponent
        assert only.loss < only.initial_loss
        only = nupes_quantize(weight, inputs, targets, CHANNELS, learn_exponent=False, **LEARN)
        assert only.weight.exponent == start.exponent
        assert np.any(only.weight.transformed.codes != start.transformed.codes)
        assert only.loss < only.initial_loss


class TestTransformations:
    def test_vmap_and_sharded_examples(self):
        layers = [random_layer(seed) for seed in (0, 1)]
        learn = lambda *layer: nupes_quantize(*layer, CHANNELS, exponent=0.6, steps=20, key=KEY)
        alone = [learn(*layer).loss for layer in layers]
        both = jax.vmap(learn)(*(np.stack(arrays) for arrays in zip(*layers)))
        np.testing.assert_allclose(both.loss, alone, rtol=0.05)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.device_put(layers[0][1:], NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(learn(layers[0][0], *sharded).loss, alone[0], rtol=0.05)


class TestEdges:
    def test_zeros_blocks_that_do_not_divide_and_bfloat16(self):
        weight, inputs, targets = random_layer(examples=5)
        weight[:7], weight[7:14] = 0, 0.5
        spec = QuantSpec(bits=4, granularity="block", axis=0, block_size=7)
        half = jnp.asarray(weight, jnp.bfloat16)
        result = nupes_quantize(half, inputs, targets, spec, steps=20, key=KEY)
        restored = power_dequantize(result.weight)
        assert restored.dtype == jnp.bfloat16
        assert np.all(restored[:7] == 0)
        assert np.all(np.isfinite(restored.astype(np.float32)))
        assert result.loss <= result.initial_loss

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"weight": np.full((IN, OUT), np.nan)}, ValueError, "weight must be finite"),
            ({"inputs": np.ones((3, 5))}, ValueError, "inputs must have shape"),
            ({"targets": np.ones((3, 5))}, ValueError, r"targets must have shape \(96, 8\)"),
            ({"spec": QuantSpec(symmetric=False)}, ValueError, "spec must be symmetric"),
            ({"spec": "int4"}, TypeError, "spec must be a QuantSpec"),
            ({"exponent": 2.0}, ValueError, "exponent must be in"),
            ({"bounds": (0.0, 1.0)}, ValueError, "bounds must be in"),
            ({"learning_rate": -0.1}, ValueError, "learning_rate must be in"),
            ({"steps": True}, TypeError, "steps must be an int"),
        ],
    )
    def test_bad_input_is_named(self, change, error, message):
        layer = dict(zip(("weight", "inputs", "targets"), random_layer()))
        with pytest.raises(error, match=message):
            nupes_quantize(**(layer | {"spec": CHANNELS} | change), key=KEY)
