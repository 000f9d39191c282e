import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.quantization import (
    QuantSpec,
    fake_quantize,
    power_dequantize,
    power_quantize,
    power_transform,
    quantize,
    search_power_exponent,
)

TENSOR = QuantSpec(bits=4)
CHANNELS = QuantSpec(bits=4, granularity="channel", axis=1)
BLOCKS = QuantSpec(bits=3, granularity="block", axis=0, block_size=4, symmetric=False)


def random_matrix(shape=(10, 6), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def round_trip(x, exponent, spec):
    return power_dequantize(power_quantize(x, exponent, spec))


def literal(x, exponent, levels, axis=None):
    """Codes and values of the symmetric format in float64."""
    x = np.float64(x)
    s = np.max(np.abs(x), axis=axis, keepdims=True) ** exponent / levels
    codes = np.clip(np.rint(np.sign(x) * np.abs(x) ** exponent / s), -levels, levels)
    return codes, np.sign(codes) * (np.abs(codes) * s) ** (1 / exponent)


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0.1, 0.5, 1.0, 1.4)
    def test_transform_and_its_gradients(self, exponent):
        x = np.array([-3.0, -1e-3, 0.0, 0.7, 40.0], np.float32)
        wide, inside = np.float64(x), x != 0
        y, vjp = jax.vjp(self.variant(power_transform), x, jnp.float32(exponent))
        np.testing.assert_allclose(y, np.sign(wide) * np.abs(wide) ** exponent, rtol=3e-6)
        weights = np.arange(1.0, 6.0, dtype="f")
        gradient, to_exponent = vjp(weights)
        magnitude = np.abs(wide[inside])
        slopes = exponent * magnitude ** (exponent - 1)
        np.testing.assert_allclose(gradient[inside], weights[inside] * slopes, rtol=1e-5)
        assert np.all(np.isfinite(gradient))
        logs = np.sign(wide[inside]) * magnitude**exponent * np.log(magnitude)
        np.testing.assert_allclose(to_exponent, np.sum(weights[inside] * logs), rtol=1e-4)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((TENSOR, 0.5, None), (CHANNELS, 0.7, 0), (CHANNELS, 1.3, 0))
    def test_matches_the_formula(self, spec, exponent, axis):
        x = random_matrix()
        codes, values = literal(x, exponent, 7, axis)
        q = self.variant(lambda x: power_quantize(x, exponent, spec))(x)
        np.testing.assert_array_equal(q.transformed.codes, codes)
        np.testing.assert_allclose(self.variant(power_dequantize)(q), values, rtol=1e-5)
        assert q.shape == x.shape
        assert q.size == x.size
        assert q.nbytes == q.transformed.nbytes + 4

    def test_gradients_of_scale_and_exponent(self):
        x, exponent, weights = random_matrix(), 0.6, random_matrix(seed=1)
        q = power_quantize(x, exponent, TENSOR)
        codes, values = literal(x, exponent, 7)

        def total(scale, exponent):
            transformed = dataclasses.replace(q.transformed, scale=scale)
            moved = dataclasses.replace(q, transformed=transformed, exponent=exponent)
            return jnp.sum(weights * power_dequantize(moved))

        to_scale, to_exponent = jax.grad(total, (0, 1))(q.transformed.scale, q.exponent)
        s = float(q.transformed.scale[0, 0])
        np.testing.assert_allclose(to_scale, np.sum(weights * values) / exponent / s, rtol=1e-4)
        logs = np.where(codes == 0, 0, np.log(np.abs(np.where(codes == 0, 1, codes)) * s))
        expected = -np.sum(weights * values * logs) / exponent**2
        np.testing.assert_allclose(to_exponent, expected, rtol=1e-4)

    @pytest.mark.claim("nupes")
    def test_powers_keep_products_and_fit_bell_shapes(self):
        """A quarter less error for Gaussian weights, half for Laplace, nothing for uniform ones."""
        x, y = random_matrix(), random_matrix(seed=1)
        for exponent in (0.3, 0.5, 1.2):
            product = power_transform(x, exponent) * power_transform(y, exponent)
            np.testing.assert_allclose(power_transform(x * y, exponent), product, rtol=1e-5)

        rng = np.random.default_rng(0)
        draws = {"normal": rng.normal, "laplace": rng.laplace, "uniform": rng.uniform}
        found = {}
        for name, draw in draws.items():
            w = draw(size=(64, 128)).astype(np.float32) - (0.5 if name == "uniform" else 0)
            exponent = search_power_exponent(w, TENSOR)
            errors = [np.mean((round_trip(w, a, TENSOR) - w) ** 2) for a in (exponent, 1.0)]
            found[name] = (float(exponent), errors[0] / errors[1])
        assert 0.5 < found["normal"][0] < 0.75
        assert found["normal"][1] < 0.75
        assert found["laplace"][0] < found["normal"][0] - 0.05
        assert found["laplace"][1] < 0.5
        assert 0.9 < found["uniform"][0] < 1.1
        assert 0.97 < found["uniform"][1] <= 1.0001

    def test_exponent_of_one_is_uniform_to_the_last_bit(self):
        x = random_matrix()
        for spec in (TENSOR, CHANNELS, BLOCKS):
            q, uniform = power_quantize(x, 1.0, spec).transformed, quantize(x, spec)
            jax.tree.map(np.testing.assert_array_equal, q, uniform)
            np.testing.assert_array_equal(round_trip(x, 1.0, spec), fake_quantize(x, spec))

    def test_levels_are_kept(self):
        for exponent in (0.4, 1.5):
            x = round_trip(random_matrix(), exponent, CHANNELS)
            np.testing.assert_allclose(round_trip(x, exponent, CHANNELS), x, rtol=1e-5)


class TestSearch:
    @pytest.mark.parametrize("norm", [1.0, 2.0])
    def test_no_exponent_on_a_fine_grid_is_better_for_all_layers_together(self, norm):
        layers = {"a": random_matrix((40, 40), seed=2), "b": random_matrix((30, 20), seed=3) ** 3}
        exponent = float(search_power_exponent(layers, TENSOR, norm=norm))
        total = lambda a: sum(
            np.sum(np.abs(literal(w, a, 7)[1] - w) ** norm) ** (1 / norm) for w in layers.values()
        )
        grid = [total(a) for a in np.linspace(0.05, 1.5, 300)]
        assert total(exponent) < 1.02 * min(grid)

    def test_bounds_and_zeros(self):
        w = random_matrix()
        assert search_power_exponent(w, TENSOR, bounds=(0.8, 0.8)) == np.float32(0.8)
        assert 0.05 <= search_power_exponent(0 * w, TENSOR) <= 1.5
        with pytest.raises(ValueError, match="weights must have at least one array"):
            search_power_exponent({}, TENSOR)
        with pytest.raises(ValueError, match="bounds must be in"):
            search_power_exponent(w, TENSOR, bounds=(0.0, 1.0))
        with pytest.raises(ValueError, match="bounds must not fall"):
            search_power_exponent(w, TENSOR, bounds=(1.0, 0.5))
        with pytest.raises(ValueError, match="norm must be in"):
            search_power_exponent(w, TENSOR, norm=0.5)
        with pytest.raises(ValueError, match="x must be finite"):
            search_power_exponent(np.full((2, 2), np.nan, "f"), TENSOR)


class TestTransformations:
    def test_vmap_with_an_exponent_for_each_layer(self):
        layers, exponents = np.stack([random_matrix(), random_matrix(seed=1)]), np.array([0.5, 0.8])
        both = jax.vmap(lambda x, a: power_quantize(x, a, CHANNELS))(layers, exponents)
        restored = jax.vmap(power_dequantize)(both)
        for i in range(2):
            alone = round_trip(layers[i], exponents[i], CHANNELS)
            np.testing.assert_allclose(restored[i], alone, rtol=1e-5)

    def test_sharded_equals_unsharded(self):
        x = random_matrix((16, 24))
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data", None))
        restored = jax.jit(lambda x: round_trip(x, 0.6, CHANNELS))(jax.device_put(x, sharding))
        assert restored.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(restored, round_trip(x, 0.6, CHANNELS), rtol=1e-5)


class TestEdges:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        x = jnp.asarray(random_matrix(), dtype)
        q = power_quantize(x, 0.5, TENSOR)
        assert q.transformed.scale.dtype == jnp.float32
        restored = power_dequantize(q)
        assert restored.dtype == power_transform(x, 0.5).dtype == dtype
        exact = round_trip(x.astype(jnp.float32), 0.5, TENSOR)
        np.testing.assert_array_equal(restored, exact.astype(dtype))

    def test_zeros_constants_and_one_entry(self):
        x = random_matrix()
        x[:, 0], x[:, 1], x[::2, 2] = 0, -2.5, 0
        restored = round_trip(x, 0.5, CHANNELS)
        assert np.all(restored[:, 0] == 0)
        assert np.all(restored[x == 0] == 0)
        np.testing.assert_allclose(restored[:, 1], -2.5, rtol=1e-5)
        np.testing.assert_allclose(
            round_trip(np.full((1, 1), 1e4, "f"), 1.5, TENSOR), 1e4, rtol=1e-5
        )
        gradient = jax.grad(lambda x: jnp.sum(power_transform(x, 0.05)))(jnp.array([0.0, 1e-38]))
        assert np.all(np.isfinite(gradient))

    def test_unsigned_activations_use_all_levels(self):
        x = np.abs(random_matrix((50, 8)))
        spec = QuantSpec(bits=4, symmetric=False)
        errors = [np.mean((round_trip(x, 0.5, s) - x) ** 2) for s in (spec, TENSOR)]
        assert errors[0] < 0.4 * errors[1]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"exponent": 0.0}, ValueError, "exponent must be in"),
            ({"exponent": -1.0}, ValueError, "exponent must be in"),
            ({"exponent": np.ones(2)}, ValueError, r"exponent must have shape \(\)"),
            ({"x": np.ones((2, 2), int)}, TypeError, "x must have a floating-point type"),
            ({"x": np.full((2, 2), np.inf)}, ValueError, "x must be finite"),
            ({"spec": 4}, TypeError, "spec must be a QuantSpec"),
        ],
    )
    def test_bad_input_is_named(self, change, error, message):
        with pytest.raises(error, match=message):
            power_quantize(**({"x": np.ones((2, 2)), "exponent": 0.5, "spec": TENSOR} | change))
        with pytest.raises(TypeError, match="q must be a PowerTensor"):
            power_dequantize(quantize(np.ones((2, 2)), TENSOR))
