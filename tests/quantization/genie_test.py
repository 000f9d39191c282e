import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.quantization import (
    QuantSpec,
    dequantize,
    genie_activation_quantizer_init,
    genie_quantize,
    genie_soft_weight,
    genie_weight_quantizer_init,
    quantize,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "zero_shot.npz")
KERNELS = AUTHORS["kernels"].transpose(0, 3, 4, 2, 1)


def channels(bits, **options):
    return QuantSpec(
        **{"granularity": "channel", "axis": -1, "symmetric": False} | options, bits=bits
    )


class TestWeights:
    def test_first_scales_and_soft_weights_match_the_authors(self):
        for index, name, bits in ((0, "0", 3), (1, "2", 2)):
            state = genie_weight_quantizer_init(KERNELS[index], channels(bits))
            assert state.scale.shape == (1, 1, 1, 4)
            np.testing.assert_allclose(
                state.scale.ravel(), AUTHORS["scale_start" + name], rtol=1e-5
            )
            zero_point = state.zero_point.ravel() + 2 ** (bits - 1)  # their codes begin at 0
            np.testing.assert_array_equal(zero_point, AUTHORS["zero_point" + name])
            soft = AUTHORS["soft" + name].transpose(2, 3, 1, 0)
            np.testing.assert_allclose(genie_soft_weight(state), soft, atol=1e-5)

    def test_gradients_are_those_of_the_formula(self):
        state = genie_weight_quantizer_init(KERNELS[0], channels(3))
        out = np.random.default_rng(0).normal(size=KERNELS[0].shape)

        def loss(rounding, scale):
            new = dataclasses.replace(state, rounding=rounding, scale=scale)
            return jnp.sum(out.astype("f") * genie_soft_weight(new))

        d_rounding, d_scale = jax.grad(loss, (0, 1))(state.rounding, 1.3 * state.scale)
        sigmoid = 1 / (1 + np.exp(-np.float64(state.rounding)))
        level = state.base + np.clip(1.2 * sigmoid - 0.1, 0, 1)
        level = np.float64(level) + np.asarray(state.zero_point)
        inside = (level > -4) & (level < 3)
        number = np.clip(level, -4, 3) - np.asarray(state.zero_point)
        np.testing.assert_allclose(
            d_scale.ravel(), (out * number).sum(axis=(0, 1, 2)), rtol=1e-4, atol=1e-4
        )
        slope = 1.3 * np.asarray(state.scale) * 1.2 * sigmoid * (1 - sigmoid)
        np.testing.assert_allclose(d_rounding, out * slope * inside, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize(
        "options", [{"granularity": "block", "axis": 0, "block_size": 5}, {"symmetric": True}]
    )
    def test_other_formats_clip_where_it_pays(self, options):
        weight = np.random.default_rng(0).standard_t(2, size=(12, 3)).astype(np.float32)
        spec = channels(3, **options)
        state = genie_weight_quantizer_init(weight, spec)
        q, unclipped = genie_quantize(state), quantize(weight, spec)
        values = np.asarray(dequantize(q))
        error = lambda values: np.mean(np.abs(weight - values) ** 2.4)
        assert error(values) < error(np.asarray(dequantize(unclipped)))
        ratio = np.asarray(state.scale) / np.asarray(unclipped.scale)
        np.testing.assert_allclose(ratio * 100, np.round(ratio * 100), atol=1e-3)
        assert (ratio < 0.995).any()
        assert ratio.max() < 1.001
        tiny = genie_weight_quantizer_init(weight * np.float32(2.0**-60), spec)
        np.testing.assert_array_equal(tiny.scale * 2.0**60, state.scale)
        inside = np.clip(weight, values.min(), values.max())
        assert np.abs(inside - values).max() < 0.51 * q.scale.max()

    def test_zero_constant_and_half_precision_weights(self):
        there_and_back = jax.jit(
            lambda w: dequantize(genie_quantize(genie_weight_quantizer_init(w, channels(2))))
        )
        for value in (0.0, 2.0, -1e4):
            weight = np.full((3, 2), value, np.float32)
            np.testing.assert_allclose(there_and_back(weight), weight, rtol=1e-6)
        half = genie_weight_quantizer_init(jnp.ones((3, 2), jnp.bfloat16), channels(4))
        assert half.scale.dtype == jnp.float32
        assert dequantize(genie_quantize(half)).dtype == jnp.bfloat16

    def test_bad_input(self):
        with pytest.raises(TypeError, match="spec must be a QuantSpec"):
            genie_weight_quantizer_init(jnp.ones((2, 2)), 4)
        with pytest.raises(ValueError, match="weight must be finite"):
            genie_weight_quantizer_init(jnp.full((2, 2), jnp.nan), channels(4))
        for function in (genie_soft_weight, genie_quantize):
            with pytest.raises(TypeError, match="state must be a GenieWeight"):
                function(jnp.ones(3))


class TestActivations:
    def test_steps_are_the_best_of_a_literal_search(self):
        x = np.random.default_rng(0).normal(size=60).astype(np.float32)
        for signed, values in ((True, x), (False, np.abs(x))):
            levels = genie_activation_quantizer_init(values, bits=3)
            assert levels.signed == signed
            low, high = (-4, 3) if signed else (0, 7)
            largest = (2 if signed else 1) * np.abs(values).max() / 7
            tried = largest * np.arange(100, 0, -1) / 100
            codes = np.clip(np.round(values / tried[:, None]), low, high)
            errors = (np.abs(values - codes * tried[:, None]) ** 2.4).mean(axis=1)
            np.testing.assert_allclose(levels.step, tried[errors.argmin()], rtol=1e-5)

    def test_edges_and_bad_input(self):
        levels = genie_activation_quantizer_init(jnp.zeros(3), bits=4, signed=True)
        assert levels.signed
        assert levels.step > 0
        with pytest.raises(ValueError, match="x must have entries"):
            genie_activation_quantizer_init(jnp.zeros((0, 3)), bits=4)
        with pytest.raises(ValueError, match="bits must be in"):
            genie_activation_quantizer_init(jnp.zeros(3), bits=9)
        with pytest.raises(ValueError, match="x must be finite"):
            genie_activation_quantizer_init(jnp.array([jnp.inf]), bits=4)
