import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref.quantization import QuantSpec, dequantize, fake_quantize, quantize

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "quantization_uniform.npz")

SPECS = {
    "tensor": QuantSpec(),
    "tensor, 4 bits, asymmetric": QuantSpec(bits=4, symmetric=False),
    "channel, 3 bits": QuantSpec(bits=3, granularity="channel", axis=0),
    "channels, asymmetric": QuantSpec(granularity="channel", axis=(0, -1), symmetric=False),
    "block, 4 bits": QuantSpec(bits=4, granularity="block", axis=-1, block_size=4),
    "block, 2 bits, asymmetric": QuantSpec(
        bits=2, granularity="block", axis=0, block_size=3, symmetric=False
    ),
}


def random_matrix(shape=(7, 18), seed=0):
    """Rows of very different size and offset."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-2, 2, size=(shape[0], *[1] * (len(shape) - 1)))
    return (size * (rng.normal(size=shape) + rng.normal(size=size.shape))).astype(np.float32)


def groups_of(x, spec):
    """The index of every group of entries that share a scale, by plain loops."""
    if spec.granularity == "tensor":
        return [(slice(None),) * x.ndim]
    axes = [axis % x.ndim for axis in spec.axes]
    groups = []
    for index in np.ndindex(x.shape):
        group = [slice(None)] * x.ndim
        for axis in range(x.ndim):
            if spec.granularity == "block" and axis in axes:
                start = index[axis] // spec.block_size * spec.block_size
                group[axis] = slice(start, start + spec.block_size)
            elif spec.granularity == "block" or axis in axes:
                group[axis] = slice(index[axis], index[axis] + 1)
        if tuple(group) not in groups:
            groups.append(tuple(group))
    return groups


def quantize64(x, spec):
    """The formula group by group in float64: codes, dequantized values, scale of every entry."""
    x = x.astype(np.float64)
    codes, values, scales = np.zeros(x.shape, int), np.zeros(x.shape), np.zeros(x.shape)
    largest = 2 ** (spec.bits - 1) - 1
    for group in groups_of(x, spec):
        if spec.symmetric:
            s, z, smallest = np.abs(x[group]).max() / largest, 0, -largest
        else:
            low, high = min(x[group].min(), 0), max(x[group].max(), 0)
            s, smallest = (high - low) / (2**spec.bits - 1), -largest - 1
            z = smallest - round(low / s)
        codes[group] = np.clip(np.rint(x[group] / s) + z, smallest, largest)
        values[group], scales[group] = s * (codes[group] - z), s
    return codes, values, scales


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*range(12))
    def test_matches_torch(self, case):
        axis, symmetric = int(TORCH["axis"][case]), bool(TORCH["symmetric"][case])
        channel = {"granularity": "channel", "axis": axis} if axis >= 0 else {}
        spec = QuantSpec(bits=int(TORCH["bits"][case]), symmetric=symmetric, **channel)
        q = self.variant(lambda x: quantize(x, spec))(TORCH["x"])
        np.testing.assert_array_equal(q.codes, TORCH["codes"][case])
        np.testing.assert_allclose(
            np.broadcast_to(q.scale, q.shape), TORCH["scale"][case], rtol=1e-6
        )
        zero_point = 0 if symmetric else np.broadcast_to(q.zero_point, q.shape)
        np.testing.assert_array_equal(zero_point, TORCH["zero_point"][case])

        fake, vjp = jax.vjp(self.variant(lambda x: fake_quantize(x, spec)), TORCH["x"])
        np.testing.assert_allclose(fake, TORCH["fake_quantized"][case], rtol=1e-6)
        weights = jnp.arange(fake.size, dtype=jnp.float32).reshape(fake.shape)
        np.testing.assert_array_equal(vjp(weights)[0], TORCH["gradient"][case])

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*SPECS)
    def test_matches_the_formula(self, name):
        x, spec = random_matrix(), SPECS[name]
        codes, values, scales = quantize64(x, spec)
        q = self.variant(lambda x: quantize(x, spec))(x)
        np.testing.assert_array_equal(q.codes, codes)
        restored = self.variant(dequantize)(q)
        assert restored.dtype == jnp.float32
        np.testing.assert_allclose(restored, values, rtol=1e-5)
        np.testing.assert_array_equal(self.variant(lambda x: fake_quantize(x, spec))(x), restored)
        jax.tree.map(np.testing.assert_array_equal, q, quantize(x, spec))
        assert np.all(np.abs(restored - x) <= 0.5001 * scales)

    def test_halves_round_to_even(self):
        x = jnp.array([7.0, 0.5, 1.5, 2.5, -0.5, -1.5])
        np.testing.assert_array_equal(quantize(x, QuantSpec(bits=4)).codes, [7, 0, 2, 2, 0, -2])


@pytest.mark.parametrize("name", SPECS)
class TestContract:
    """What every spec owes its caller."""

    def test_quantizing_again_changes_no_code(self, name):
        for seed in range(5):
            q = quantize(random_matrix(seed=seed), SPECS[name])
            again = quantize(dequantize(q), q.spec)
            np.testing.assert_array_equal(again.values, q.values)
            np.testing.assert_allclose(again.scale, q.scale, rtol=1e-6)
            if q.zero_point is not None:
                np.testing.assert_array_equal(again.zero_point, q.zero_point)

    def test_straight_through_gradient_in_both_modes(self, name):
        x, weights = random_matrix(), random_matrix(seed=1)
        fake = lambda x: fake_quantize(x, SPECS[name])
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(weights * jnp.square(fake(x)))))(x)
        np.testing.assert_allclose(gradient, 2 * weights * fake(x), rtol=1e-6)
        np.testing.assert_array_equal(jax.jvp(fake, (x,), (weights,))[1], weights)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_sharded_equals_unsharded(self, name, axis_type):
        spec = SPECS[name]
        if spec.block_size is not None:  # one or more whole blocks and bytes to a shard
            spec = dataclasses.replace(spec, block_size=4)
        x = random_matrix((32, 64))
        expected = quantize(x, spec)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            for partition in (PartitionSpec("data", None), PartitionSpec(None, "data")):
                sharding = NamedSharding(mesh, partition)
                q = jax.jit(lambda x: quantize(x, spec))(jax.device_put(x, sharding))
                assert q.values.sharding.is_equivalent_to(sharding, 2)
                jax.tree.map(np.testing.assert_array_equal, q, expected)
                restored = jax.jit(dequantize)(q)
                assert restored.sharding.is_equivalent_to(sharding, 2)
                np.testing.assert_array_equal(restored, dequantize(expected))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, name, dtype):
        half = jnp.asarray(random_matrix(), dtype)
        q, exact = quantize(half, SPECS[name]), quantize(half.astype(jnp.float32), SPECS[name])
        assert q.scale.dtype == jnp.float32
        np.testing.assert_array_equal(q.values, exact.values)
        assert dequantize(q).dtype == fake_quantize(half, SPECS[name]).dtype == dtype
        np.testing.assert_array_equal(dequantize(q), dequantize(exact).astype(dtype))
        np.testing.assert_array_equal(dequantize(q, dtype=jnp.float32), dequantize(exact))

    def test_zeros_are_exact(self, name):
        x = random_matrix()
        x[:, ::5] = 0.0
        x[:3] = 0.0
        restored = np.asarray(fake_quantize(x, SPECS[name]))
        assert np.all(restored[x == 0] == 0)
        assert not fake_quantize(np.zeros_like(x), SPECS[name]).any()
        gradient = jax.grad(lambda x: fake_quantize(x, SPECS[name]).sum())(np.zeros_like(x))
        assert np.all(gradient == 1)

    @pytest.mark.parametrize("size", [1e30, np.finfo(np.float32).max, 1e-30, 1e-37, 1e-40])
    def test_extreme_sizes_stay_finite_and_within_half_a_step(self, name, size):
        x = random_matrix()
        x = (x / np.abs(x).max() * size).astype(np.float32)
        q = quantize(x, SPECS[name])
        step = np.max(np.asarray(q.scale, np.float64))
        assert np.isfinite(step)
        error = np.abs(np.asarray(dequantize(q), np.float64) - x)
        flushed = np.finfo(np.float32).tiny  # XLA takes subnormal numbers for 0
        assert np.all(error <= 0.5001 * step + flushed)

    @pytest.mark.parametrize("value", [0.3, -0.3, 1e30])
    def test_constant_tensors_are_represented(self, name, value):
        x = np.full((5, 7), value, np.float32)
        np.testing.assert_allclose(fake_quantize(x, SPECS[name]), x, rtol=2e-7)

    @pytest.mark.parametrize("shape", [(1, 1), (0, 3), (3, 0)])
    def test_one_entry_and_none(self, name, shape):
        x = np.full(shape, -2.5, np.float32)
        q = quantize(x, SPECS[name])
        assert q.shape == shape
        np.testing.assert_allclose(dequantize(q), x, rtol=2e-7)

    def test_entries_that_are_not_finite_raise_or_spoil_their_group_only(self, name):
        spec = SPECS[name]
        for value in (np.nan, np.inf, -np.inf):
            x = random_matrix()
            x[2, 5] = value
            for function in (quantize, fake_quantize):
                with pytest.raises(ValueError, match="x must be finite"):
                    function(x, spec)
            (spoilt,) = (g for g in groups_of(x, spec) if not np.isfinite(x[g]).all())
            q = jax.jit(lambda x: quantize(x, spec))(x)
            assert np.sum(~np.isfinite(q.scale)) == 1
            inside = np.zeros(x.shape, bool)
            inside[spoilt] = True
            restored = np.asarray(dequantize(q))
            assert np.all(np.isnan(restored[inside & np.isfinite(x)]))
            clean = random_matrix()
            np.testing.assert_array_equal(
                restored[~inside], np.asarray(fake_quantize(clean, spec))[~inside]
            )


def test_finer_granularity_bounds_the_reach_of_outliers():
    """One outlier to every 500 weights, as in the rows of a transformer's kernels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 256)).astype(np.float32)
    x[rng.uniform(size=x.shape) < 1 / 500] *= 30
    x *= rng.uniform(0.5, 2, size=(32, 1)).astype(np.float32)
    for symmetric in (True, False):
        specs = (
            QuantSpec(bits=4, symmetric=symmetric),
            QuantSpec(bits=4, granularity="channel", axis=0, symmetric=symmetric),
            QuantSpec(bits=4, granularity="block", axis=1, block_size=32, symmetric=symmetric),
        )
        tensor, channel, block = (np.mean((fake_quantize(x, s) - x) ** 2) for s in specs)
        assert block < 0.5 * channel
        assert channel < 0.8 * tensor


def test_weights_alone_in_four_bits_with_a_scale_per_output():
    """GLM-130B's scheme, which it writes for rows of `[out, in]` weights."""
    rows, levels = random_matrix((7, 18)), np.arange(-7, 8)
    rows[3] = 0
    rows[4, :15] = np.float32(0.3 * levels)
    rows[4, 15:] = 0
    scale = np.abs(rows.astype(np.float64)).max(1, keepdims=True) / 7
    scale[3] = 1
    spec = QuantSpec(bits=4, granularity="channel", axis=1)
    q = jax.jit(lambda kernel: quantize(kernel, spec))(rows.T)
    codes = np.asarray(q.codes).T
    np.testing.assert_array_equal(codes, np.rint(rows / scale))
    np.testing.assert_array_equal(codes[4, :15], levels)
    assert q.scale.shape == (1, 7)
    assert q.values.nbytes == 18 * 4
    restored = np.asarray(dequantize(q)).T
    assert np.all(np.abs(restored - rows) <= 0.5001 * scale)
    assert not restored[3].any()
    largest = np.abs(rows).argmax(1)[:, None]
    exact = np.take_along_axis(rows, largest, 1)
    np.testing.assert_allclose(np.take_along_axis(restored, largest, 1), exact, rtol=2e-7)


def test_each_bit_halves_the_step():
    x = random_matrix()
    scales = [float(quantize(x, QuantSpec(bits=b, symmetric=False)).scale[0, 0]) for b in (4, 8)]
    np.testing.assert_allclose(scales[0] / scales[1], 255 / 15, rtol=1e-6)


def test_asymmetric_halves_the_step_of_one_sided_data():
    x = jnp.abs(random_matrix())
    symmetric, asymmetric = (quantize(x, QuantSpec(symmetric=s)).scale for s in (True, False))
    np.testing.assert_allclose(asymmetric / symmetric, 127 / 255, rtol=1e-6)


def test_symmetric_codes_are_odd():
    x = random_matrix()
    codes = quantize(x, SPECS["block, 4 bits"]).codes
    np.testing.assert_array_equal(quantize(-x, SPECS["block, 4 bits"]).codes, -codes)
    assert codes.min() == -7


def test_rounding_never_carries_a_half_past_its_largest_number():
    x = jnp.array([65504.0, -103.0], jnp.float16)  # the level above 65504 is 65607
    spec = QuantSpec(symmetric=False)
    np.testing.assert_array_equal(fake_quantize(x, spec), jnp.array([65504.0, 0.0], jnp.float16))


def test_a_range_whose_ends_lie_half_way_between_levels_is_clipped():
    q = quantize(jnp.array([-9.5, 5.5]), QuantSpec(bits=4, symmetric=False))
    np.testing.assert_array_equal(q.scale, [1.0])
    np.testing.assert_array_equal(q.zero_point, [2])
    np.testing.assert_array_equal(q.codes, [-8, 7])
    np.testing.assert_array_equal(dequantize(q), [-10.0, 5.0])


def test_numbers_without_axes():
    for spec in (QuantSpec(), QuantSpec(bits=5, symmetric=False)):
        q = quantize(jnp.float32(-2.5), spec)
        assert q.shape == ()
        np.testing.assert_allclose(dequantize(q), -2.5, rtol=2e-7)
    with pytest.raises(ValueError, match="must have an axis to pack along"):
        quantize(jnp.float32(1.0), QuantSpec(bits=4))


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        x = jnp.array([1e300, -0.3e300])
        q = quantize(x, QuantSpec())
        assert q.scale.dtype == dequantize(q).dtype == jnp.float64
        np.testing.assert_allclose(dequantize(q)[0], 1e300, rtol=1e-15)


def test_bad_input_is_named():
    x = random_matrix()
    spec = SPECS["channel, 3 bits"]
    for function in (quantize, fake_quantize):
        with pytest.raises(TypeError, match="x must have a floating-point type, got int32"):
            function(np.ones((2, 2), int), spec)
        with pytest.raises(TypeError, match="spec must be a QuantSpec, got int"):
            function(x, 8)
        with pytest.raises(ValueError, match="axis must name axes of an array with 2 dimensions"):
            function(x, QuantSpec(granularity="channel", axis=2))
        with pytest.raises(ValueError, match="axis names the same axis twice"):
            function(x, QuantSpec(granularity="channel", axis=(1, -1)))
    with pytest.raises(TypeError, match="q must be a QTensor"):
        dequantize(x)
    with pytest.raises(TypeError, match="dtype must be a floating-point type, got int8"):
        dequantize(quantize(x, spec), dtype=jnp.int8)


class TestFloat8:
    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
    def test_codes_are_those_of_ml_dtypes_of_scaled_entries(self, name):
        x = random_matrix((6, 40))
        kind, finfo = np.dtype(name), jnp.finfo(name)
        for spec, size in (
            (QuantSpec(format=name), np.abs(x).max()),
            (
                QuantSpec(format=name, granularity="block", axis=1, block_size=8),
                np.repeat(np.abs(x.reshape(6, 5, 8)).max(-1), 8, axis=1),
            ),
        ):
            q = jax.jit(quantize, static_argnums=1)(x, spec)
            scale = (size / float(finfo.max)).astype(np.float32)
            assert q.values.dtype == kind
            codes = (x / scale).astype(kind)
            # division and multiplication by the reciprocal round a few to another code
            assert np.mean(np.asarray(q.codes, "f") == codes.astype("f")) > 0.98
            np.testing.assert_allclose(
                dequantize(q), x, rtol=1.01 * float(finfo.eps) / 2, atol=2.0**-9 * np.max(scale)
            )
            np.testing.assert_array_equal(fake_quantize(x, spec), dequantize(q))

    def test_zeros_the_largest_number_and_gradients(self):
        spec = QuantSpec(format="float8_e4m3fn", granularity="channel", axis=0)
        x = jnp.array([[0.0, 0.0], [3.0, -3.0], [1e38, 1e-38]])
        np.testing.assert_allclose(dequantize(quantize(x, spec)), x, rtol=1e-6, atol=1e-30)
        np.testing.assert_array_equal(jax.grad(lambda x: fake_quantize(x, spec).sum())(x), 1)

    def test_methods_of_equally_spaced_levels_refuse_it(self):
        with pytest.raises(ValueError, match="format must be 'int'"):
            QuantSpec(format="float8_e5m2").code_range  # noqa: B018
