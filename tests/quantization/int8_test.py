import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.quantization import (
    QuantSpec,
    dequantize,
    emergent_outlier_statistics,
    fake_quantize,
    int8_matmul,
    llm_int8_matmul,
    outlier_features,
    quantize,
    quantize_rowwise,
)

BITSANDBYTES = np.load(Path(__file__).parents[1] / "oracles" / "bitsandbytes_int8.npz")


product = jax.jit(llm_int8_matmul, static_argnames=("threshold", "max_outliers"))
statistics_of = jax.jit(
    emergent_outlier_statistics, static_argnames=("min_layer_fraction", "min_token_fraction")
)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_outliers(shape, features, seed=0):
    x = random(shape, seed)
    x[..., features] *= 40
    return x


def llm_int8_64(x, w, threshold):
    """The decomposition row by row and column by column in float64: x̂, ŵ and their product."""
    x_hat, w_hat = np.float64(x), np.float64(w)
    outliers = np.abs(x).max(axis=0) >= threshold
    for vectors, own in ((x_hat, outliers), (w_hat.T, outliers)):
        for v in vectors:
            scale = np.abs(v[~own]).max() / 127
            v[~own] = scale * np.rint(v[~own] / scale)
    return x_hat, w_hat, x_hat @ w_hat


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(("plain", 0.0), ("decomposed", 6.0))
    def test_matches_bitsandbytes(self, name, threshold):
        x, w = BITSANDBYTES["x"], BITSANDBYTES["w"]
        x_q, w_q = quantize_rowwise(x), quantize_rowwise(w, axis=0)
        np.testing.assert_array_equal(x_q.codes, BITSANDBYTES["x_codes"])
        np.testing.assert_array_equal(w_q.codes, BITSANDBYTES["w_codes"])
        np.testing.assert_allclose(127 * x_q.scale[:, 0], BITSANDBYTES["x_absmax"], rtol=1e-6)
        np.testing.assert_allclose(127 * w_q.scale[0], BITSANDBYTES["w_absmax"], rtol=1e-6)
        f = self.variant(lambda x, w: llm_int8_matmul(x, w, threshold=threshold))
        y, vjp = jax.vjp(lambda x: f(x, w_q), x)
        np.testing.assert_allclose(y, BITSANDBYTES[name], rtol=1e-4, atol=1e-3)
        expected = BITSANDBYTES[f"{name}_gradient"]
        np.testing.assert_allclose(vjp(BITSANDBYTES["cotangent"])[0], expected, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((0.0, None), (6.0, None), (6.0, 3), (6.0, 20))
    def test_matches_the_formula(self, threshold, max_outliers):
        x, w, cotangent = with_outliers((6, 16), [2, 9, 10]), random((16, 5), 1), random((6, 5), 2)
        w[[2, 10]] *= 4  # which must not coarsen the levels of the other rows
        x_hat, w_hat, y = llm_int8_64(x, w, threshold or np.inf)
        f = lambda x, w: llm_int8_matmul(x, w, threshold=threshold, max_outliers=max_outliers)
        ours, vjp = jax.vjp(self.variant(f), x, w)
        np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-4)
        x_gradient, w_gradient = vjp(cotangent)
        np.testing.assert_allclose(x_gradient, cotangent @ w_hat.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(w_gradient, x_hat.T @ cotangent, rtol=1e-5, atol=1e-4)

    @parameterized.parameters(
        (8, True, True), (8, False, True), (4, False, False), (2, True, False)
    )
    def test_integer_product_is_that_of_the_dequantized(self, bits, x_symmetric, w_symmetric):
        x, w = np.abs(random((2, 3, 16))), random((16, 5), 1)
        x_q = quantize_rowwise(x, bits=bits, symmetric=x_symmetric)
        w_q = quantize_rowwise(w, axis=0, bits=bits, symmetric=w_symmetric)
        f = jax.jit(int8_matmul)
        expected = dequantize(x_q) @ dequantize(w_q)
        np.testing.assert_allclose(f(x_q, w_q), expected, rtol=1e-5, atol=1e-5)
        vector = quantize_rowwise(x[1, 2], bits=bits, symmetric=x_symmetric)
        np.testing.assert_allclose(f(vector, w_q), expected[1, 2], rtol=1e-5, atol=1e-5)
        ours = jax.grad(lambda s: f(x_q, dataclasses.replace(w_q, scale=s)).sum())(w_q.scale)
        np.testing.assert_allclose(ours * w_q.scale, expected.sum((0, 1))[None], rtol=1e-4)

    def test_one_scale_for_all(self):
        x, w = random((3, 16)), random((16, 5), 1)
        x_q, w_q = quantize(x, QuantSpec()), quantize(w, QuantSpec())
        expected = dequantize(x_q) @ dequantize(w_q)
        np.testing.assert_allclose(int8_matmul(x_q, w_q), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.claim("llm-int8")
def test_outlier_features_cost_the_decomposition_nothing_and_int8_ten_times_the_error():
    """0.1 percent of the features outliers, in most tokens."""
    x = random((32, 1000))
    x[:, 7] = 60 * np.sign(x[:, 7]) + x[:, 7]
    w = random((1000, 24), 1)
    exact = np.float64(x) @ np.float64(w)
    error = lambda y: np.sqrt(np.mean((np.asarray(y) - exact) ** 2))
    decomposed = error(product(x, w))
    vector_wise = error(product(x, w, threshold=0))
    one_scale = error(int8_matmul(quantize(x, QuantSpec()), quantize(w, QuantSpec())))
    row_wise = error(int8_matmul(quantize_rowwise(x), quantize(w, QuantSpec())))
    assert 5 * decomposed < vector_wise <= row_wise <= 1.01 * one_scale
    assert 10 * decomposed < one_scale
    # and as without them, where there are none
    calm = np.where(np.arange(1000) == 7, 0, x)
    np.testing.assert_allclose(
        decomposed, np.sqrt(np.mean((product(calm, w) - calm @ w) ** 2)), rtol=0.05
    )


class TestLimits:
    def test_integers_that_fill_the_range_are_exact(self):
        rng = np.random.default_rng(0)
        x, w = rng.integers(-127, 128, (6, 16)), rng.integers(-127, 128, (16, 5))
        x[:, 3], w[5] = 127, -127
        y = product(np.float32(x), np.float32(w), threshold=0)
        np.testing.assert_array_equal(y, x @ w)

    def test_without_outliers_nothing_is_taken_out(self):
        x, w = np.clip(random((6, 16)), -5.9, 5.9), random((16, 5), 1)
        plain = product(x, w, threshold=np.inf)
        for max_outliers in (None, 0, 2):
            y = product(x, w, max_outliers=max_outliers)
            np.testing.assert_array_equal(y, plain)

    def test_a_low_threshold_takes_all(self):
        x, w = random((6, 16)), random((16, 5), 1)
        for max_outliers in (None, 16):
            y = product(x, w, threshold=1e-20, max_outliers=max_outliers)
            np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-6)

    def test_a_bound_keeps_the_largest(self):
        x, w = random((6, 16)), random((16, 5), 1)
        x[0, [1, 4, 6]] = 10.0, -30.0, 20.0
        # The third stays in the integers: as if it stood below the threshold.
        bounded = product(x, w, max_outliers=2)
        np.testing.assert_allclose(bounded, product(x, w, threshold=15.0), rtol=1e-5)
        assert np.abs(bounded - product(x, w)).max() > 1e-3

    def test_quantized_kernels_bound_the_outliers_too(self):
        x, w_q = with_outliers((6, 16), [3, 8]), quantize_rowwise(random((16, 5), 1), axis=0)
        for q in (w_q, quantize_rowwise(dequantize(w_q), axis=0, bits=4, symmetric=False)):
            exact = product(x, q)
            gathered = product(x, q, max_outliers=4)
            np.testing.assert_allclose(gathered, exact, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(exact, x @ dequantize(q), rtol=0.02, atol=0.2)


def test_gradients_of_a_quantized_kernel_reach_its_scales():
    x, w_q = with_outliers((6, 16), [3]), quantize_rowwise(random((16, 5), 1), axis=0)
    loss = lambda scale: product(x, dataclasses.replace(w_q, scale=scale)).sum()
    expected = product(x, w_q).sum(0)
    gradient = jax.jit(jax.grad(loss))(w_q.scale)
    np.testing.assert_allclose(gradient[0] * w_q.scale[0], expected, rtol=1e-4)


def test_rowwise_is_fake_quantization_of_every_vector():
    x = random((2, 3, 8))
    for axis in (0, 1, 2):
        others = tuple(a for a in range(3) if a != axis)
        spec = QuantSpec(granularity="channel", axis=others)
        q = quantize_rowwise(x, axis=axis)
        assert q.scale.shape[axis] == 1
        np.testing.assert_array_equal(dequantize(q), fake_quantize(x, spec))
    assert quantize_rowwise(x[0, 0]).scale.shape == (1,)


def test_statistics_find_what_persists():
    x = random((8, 4, 50, 12))
    x = np.clip(x, -5, 5)
    x[::2, ..., 2] += 20  # half of the layers, all positions: systematic
    x[:, 0, :3, 5] = 9.0  # all layers, few positions
    x[:1, ..., 7] = -11.0  # one layer
    statistics = statistics_of(x)
    np.testing.assert_array_equal(np.flatnonzero(statistics.systematic), [2])
    layers, tokens = np.zeros(12), np.zeros(12)
    layers[[2, 5, 7]], tokens[[2, 5, 7]] = (0.5, 1, 1 / 8), (0.5, 3 / 200, 1 / 8)
    np.testing.assert_allclose(statistics.layer_fraction, layers)
    np.testing.assert_allclose(statistics.token_fraction, tokens)
    np.testing.assert_allclose(statistics.largest, np.abs(x).max((0, 1, 2)))
    loose = statistics_of(x, min_layer_fraction=0.1, min_token_fraction=0.01)
    np.testing.assert_array_equal(np.flatnonzero(loose.systematic), [2, 5, 7])
    np.testing.assert_array_equal(outlier_features(x), statistics.layer_fraction > 0)


class TestTransformations:
    def test_vmap_takes_the_outliers_of_each_example(self):
        x, w = random((3, 4, 16)), random((16, 5), 1)
        x[0, 0, 2], x[2, 1, 9] = 50.0, -50.0
        mapped = jax.jit(jax.vmap(lambda x: product(x, w, max_outliers=2)))(x)
        for one, y in zip(x, mapped, strict=True):
            np.testing.assert_allclose(product(one, w), y, rtol=1e-5, atol=1e-5)

    def test_sharded_batch_has_common_outliers(self):
        x, w = random((16, 16)), random((16, 8), 1)
        x[3, 2] = 50.0
        f = jax.jit(
            jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(llm_int8_matmul(*args))), (0, 1))
        )
        mesh = jax.make_mesh((8,), ("data",))
        place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
        value, gradients = f(place(x, "data"), place(w))
        expected_value, expected_gradients = f(x, w)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        chex.assert_trees_all_close(
            jax.tree.map(np.asarray, gradients), expected_gradients, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        x, w = with_outliers((6, 16), [3]).astype(dtype), random((16, 5), 1).astype(dtype)
        y, vjp = jax.vjp(product, x, w)
        gradients = vjp(jnp.ones_like(y))
        assert {y.dtype, *(g.dtype for g in gradients)} == {jnp.dtype(dtype)}
        wide = product(x.astype(jnp.float32), w.astype(jnp.float32))
        np.testing.assert_allclose(np.float32(y), wide, rtol=0.02, atol=0.05)


class TestEdges:
    @pytest.mark.parametrize("max_outliers", [None, 2])
    @pytest.mark.parametrize("size", [0.0, 1e4, 1e-30])
    def test_zero_and_extreme_inputs_stay_finite(self, size, max_outliers):
        x, w = size * random((6, 16)), random((16, 5), 1)
        x[1], w[:, 1] = 0, 0
        f = lambda x, w: product(x, w, max_outliers=max_outliers)
        y, vjp = jax.vjp(f, np.float32(x), w)
        np.testing.assert_allclose(y, x @ w, rtol=0.1, atol=0.05 * size)
        chex.assert_tree_all_finite(vjp(jnp.ones_like(y)))

    def test_no_rows_and_one_vector(self):
        w = random((8, 3))
        assert product(jnp.zeros((0, 8)), w).shape == (0, 3)
        x = with_outliers((8,), [2])
        np.testing.assert_allclose(product(x, w), x @ w, rtol=0.05, atol=0.05)

    def test_values_that_are_not_finite(self):
        x, w = random((6, 16)), random((16, 5), 1)
        x[1, 2] = np.inf  # an outlier
        assert np.array_equal(np.isfinite(product(x, w)).all(1), [1, 0, 1, 1, 1, 1])
        x[1, 2] = np.nan
        with pytest.raises(ValueError, match="x must be finite"):
            llm_int8_matmul(x, w)
        y = product(x, w)
        assert np.array_equal(np.isnan(y).all(1), [0, 1, 0, 0, 0, 0])

    def test_bad_input_is_named(self):
        x, w = jnp.ones((4, 8)), jnp.ones((8, 3))
        x_q, w_q = quantize_rowwise(x), quantize_rowwise(w, axis=0)
        for call, error, message in (
            (lambda: llm_int8_matmul(x, w[1:]), ValueError, r"w must have shape \[8, out\]"),
            (lambda: llm_int8_matmul(x, w, threshold=-1), ValueError, "threshold must be at least"),
            (lambda: llm_int8_matmul(x, w, max_outliers=-1), ValueError, "max_outliers must be in"),
            (lambda: llm_int8_matmul(jnp.ones((4, 8), int), w), TypeError, "x must have a float"),
            (lambda: llm_int8_matmul(x, jnp.ones((8, 3), int)), TypeError, "w must have a float"),
            (
                lambda: llm_int8_matmul(x, quantize_rowwise(w)),
                ValueError,
                r"w must have a scale of shape \[1, out\], got \(8, 1\)",
            ),
            (lambda: int8_matmul(x, w_q), TypeError, "x_q must be a QTensor"),
            (lambda: int8_matmul(x_q, w), TypeError, "w_q must be a QTensor"),
            (lambda: int8_matmul(x_q, w_q, dtype=int), TypeError, "dtype must be a floating"),
            (
                lambda: int8_matmul(quantize_rowwise(x, axis=0), w_q),
                ValueError,
                r"x_q must have a scale of shape \[..., 1\]",
            ),
            (lambda: quantize_rowwise(x, axis=2), ValueError, "axis must name axes"),
            (lambda: quantize_rowwise(x, bits=9), ValueError, "bits must be in"),
            (lambda: outlier_features(x, threshold=float("nan")), ValueError, "threshold must be"),
            (
                lambda: outlier_features(jnp.float32(3)),
                ValueError,
                r"x must have shape \[..., in\]",
            ),
            (
                lambda: emergent_outlier_statistics(jnp.ones(3)),
                ValueError,
                "hidden_states must have shape",
            ),
            (
                lambda: emergent_outlier_statistics(x, min_token_fraction=2),
                ValueError,
                "min_token_fraction must be in",
            ),
        ):
            with pytest.raises(error, match=message):
                call()

    def test_sums_that_int32_may_not_hold_are_refused(self):
        shapes = lambda n: (
            jax.eval_shape(quantize_rowwise, jnp.zeros((1, n))),
            jax.eval_shape(lambda w: quantize_rowwise(w, axis=0), jnp.zeros((n, 1))),
        )
        assert jax.eval_shape(int8_matmul, *shapes(133_144)).shape == (1, 1)
        with pytest.raises(ValueError, match="x_q must have fewer inputs"):
            jax.eval_shape(int8_matmul, *shapes(133_145))
