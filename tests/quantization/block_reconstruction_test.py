import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.quantization import (
    GenieActivation,
    QuantSpec,
    genie_activation_quantizer_init,
    genie_block,
    genie_quantize,
    genie_reconstruct,
    genie_soft_weight,
    genie_weight_quantizer_init,
)

KEY = jax.random.key(0)
AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "zero_shot.npz")


def channels(bits):
    return QuantSpec(bits=bits, granularity="channel", axis=-1, symmetric=False)


def linear(weight, x, quantize):
    del quantize
    return x @ weight


def quantized_linear(weights, x, quantize):
    return quantize("inputs", x) @ weights["kernel"]


convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def first_convolution(weights, x, quantize):
    return jax.nn.relu(convolve(quantize("inputs", x), weights["first"]))


def two_convolutions(weights, x, quantize):
    hidden = first_convolution(weights, x, quantize)
    return convolve(quantize("hidden", hidden), weights["second"])


def random_layer(seed, examples=64, size=16, outputs=16):
    """A kernel, and inputs as after a ReLU, of which each is alike to others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 4)) @ rng.normal(size=(4, size)) / 2
    x = np.maximum(x + rng.normal(size=x.shape), 0)
    return rng.normal(size=(size, outputs)).astype("f"), x.astype("f")


class TestClaims:
    @pytest.mark.claim("genie")
    def test_scale_and_rounding_together_lose_less_than_rounding_alone(self):
        """They begin at the weights themselves. From there the scale may move without a change of
        the rounding, and make up for inputs that quantization has made smaller. With the same
        steps, and a rate of 0 for the scale in AdaRound; what is learned is one of two levels."""
        for seed in range(2):
            weight, x = random_layer(seed)
            state = genie_weight_quantizer_init(weight, channels(3))
            ends = [state.scale * (code - state.zero_point) for code in (-4, 3)]
            np.testing.assert_allclose(genie_soft_weight(state), jnp.clip(weight, *ends), atol=1e-5)
            rates = {"lr_rounding": 0.02, "round_weight": 0.2, "steps": 200}
            together, alone = (
                genie_reconstruct(
                    linear,
                    state,
                    {},
                    x,
                    0.8 * x,
                    x @ weight,
                    key=KEY,
                    lr_weight_scale=rate,
                    **rates,
                )
                for rate in (0.003, 0.0)
            )
            assert together.loss < 0.95 * alone.loss
            assert alone.loss < 0.8 * alone.initial_loss
            np.testing.assert_array_equal(alone.weights.scale, state.scale)
            levels = [np.clip(state.base + up + state.zero_point, -4, 3) for up in (0, 1)]
            for learned in (together, alone):
                codes = np.asarray(learned.weights.codes)
                assert ((codes == levels[0]) | (codes == levels[1])).all()
            assert (codes != genie_quantize(state).codes).any()


class TestReconstruction:
    def test_follows_the_authors(self):
        """On one example that is the whole batch, with all activations quantized."""
        kernels = AUTHORS["kernels"].transpose(0, 3, 4, 2, 1)
        x, x_q = jnp.asarray(AUTHORS["inputs"].transpose(0, 1, 3, 4, 2))
        y = AUTHORS["y"].transpose(0, 2, 3, 1)
        weights = {
            name: genie_weight_quantizer_init(kernel, channels(bits))
            for name, kernel, bits in zip(("first", "second"), kernels, (3, 2))
        }
        hard = {name: genie_quantize(state) for name, state in weights.items()}
        activations = {"inputs": genie_activation_quantizer_init(x_q, bits=4)}
        hidden = genie_block(first_convolution, hard, activations, x_q)
        activations["hidden"] = genie_activation_quantizer_init(hidden, bits=3)
        assert activations["inputs"].signed
        assert not activations["hidden"].signed
        for name, i in (("inputs", 0), ("hidden", 2)):
            np.testing.assert_allclose(
                activations[name].step, AUTHORS[f"step_start{i}"][0], rtol=1e-5
            )
        start = genie_block(two_convolutions, hard, activations, x_q)
        np.testing.assert_allclose(start, AUTHORS["y_start"].transpose(0, 2, 3, 1), atol=1e-5)

        block = genie_reconstruct(
            two_convolutions,
            weights,
            activations,
            x,
            x_q,
            y,
            steps=40,
            batch_size=1,
            round_weight=0.02,
            drop_probability=0.0,
            lr_rounding=0.05,
            lr_weight_scale=0.005,
            lr_activation_scale=0.004,
            key=KEY,
        )
        for name, i, activation in (("first", 0, "inputs"), ("second", 2, "hidden")):
            q = block.weights[name]
            np.testing.assert_allclose(q.scale.ravel(), AUTHORS[f"scale_end{i}"], rtol=1e-3)
            numbers = AUTHORS[f"hard{i}"].transpose(2, 3, 1, 0) / AUTHORS[f"scale_end{i}"]
            np.testing.assert_array_equal(q.codes - q.zero_point, np.round(numbers))
            step = block.activations[activation].step
            np.testing.assert_allclose(step, AUTHORS[f"step{i}"][0], rtol=1e-3)
        off = AUTHORS["y_learned"].transpose(0, 2, 3, 1) - y
        np.testing.assert_allclose(block.loss, np.square(off).sum(-1).mean(), rtol=1e-2)
        off = AUTHORS["y_start"].transpose(0, 2, 3, 1) - y
        np.testing.assert_allclose(block.initial_loss, np.square(off).sum(-1).mean(), rtol=1e-3)

    def test_dropping_shows_what_quantization_hides(self):
        """Of inputs or activations that are quantized to 0, only those that are dropped teach."""
        weight, x = random_layer(0, examples=4, outputs=2)
        state = genie_weight_quantizer_init(weight, channels(2))
        before = genie_quantize(state).codes
        for quantized_inputs, step in ((0 * x, 0.01), (x, 1e4)):
            activations = {"inputs": GenieActivation(jnp.float32(step), bits=8, signed=True)}
            for probability in (0.0, 0.5):
                block = genie_reconstruct(
                    quantized_linear,
                    {"kernel": state},
                    activations,
                    x,
                    quantized_inputs,
                    x @ weight,
                    steps=1,
                    lr_rounding=5.0,
                    lr_activation_scale=0.0,
                    round_weight=0.0,
                    drop_probability=probability,
                    key=KEY,
                )
                changed = jnp.any(block.weights["kernel"].codes != before)
                assert changed == (probability > 0)

    def test_no_steps_give_the_nearest_levels(self):
        weight, x = random_layer(0, examples=4, outputs=2)
        state = genie_weight_quantizer_init(weight, channels(3))
        block = genie_reconstruct(linear, state, {}, x, x, x @ weight, steps=0, key=KEY)
        np.testing.assert_array_equal(block.weights.codes, genie_quantize(state).codes)
        np.testing.assert_allclose(block.loss, block.initial_loss, rtol=1e-6)
        assert block.loss > 0

    def test_bad_input(self):
        weight, x = random_layer(0, examples=4, outputs=2)
        state = genie_weight_quantizer_init(weight, channels(3))
        good = {"block_fn": linear, "weights": state, "activations": {}, "inputs": x}
        good |= {"quantized_inputs": x, "targets": x @ weight, "key": KEY}
        for name, value, message in (
            ("weights", {}, "weights must have a GenieWeight"),
            ("block_fn", quantized_linear, "activations must have levels for 'inputs'"),
            ("quantized_inputs", x[:2], "quantized_inputs must have shape"),
            ("targets", x, "targets must have shape"),
            ("inputs", x + np.nan, "inputs must be finite"),
            ("drop_probability", 1.0, "drop_probability must be in"),
            ("batch_size", 0, "batch_size must be in"),
            ("lr_rounding", -1.0, "lr_rounding must be in"),
        ):
            arguments = good | {name: value}
            if name == "block_fn":
                arguments["weights"] = {"kernel": state}
            with pytest.raises(ValueError, match=message):
                genie_reconstruct(**arguments)
        empty = {"inputs": x[:0], "quantized_inputs": x[:0], "targets": x[:0, :2]}
        with pytest.raises(ValueError, match="inputs must have at least one example"):
            genie_reconstruct(**(good | empty))
        with pytest.raises(TypeError, match="weights must be GenieWeights, got"):
            genie_reconstruct(**(good | {"weights": weight}))
