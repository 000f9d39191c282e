import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.quantization import (
    QuantSpec,
    compensated_matmul,
    dequantize,
    low_rank_compensation,
    quantize,
    sensitivity_class,
)

COLUMNS = QuantSpec(bits=4, granularity="channel", axis=-1)

compensate = jax.jit(low_rank_compensation, static_argnames=("rank", "factor_bits"))


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def remaining(w, w_hat, a, b):
    a, b = (factor if isinstance(factor, jax.Array) else dequantize(factor) for factor in (a, b))
    return np.float64(w) - np.asarray(w_hat) - np.float64(a) @ np.float64(b)


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0, 1, 5, 20, 30)
    def test_matches_numpy(self, rank):
        w = random((32, 20))
        q = quantize(w, COLUMNS)
        left, sizes, right = np.linalg.svd(np.float64(w) - np.asarray(dequantize(q)), False)
        a, b = self.variant(lambda w, q: low_rank_compensation(w, q, rank=rank))(w, q)
        m = min(rank, 20)
        assert a.shape == (32, m)
        assert b.shape == (m, 20)
        expected = left[:, :m] * sizes[:m] @ right[:m]
        np.testing.assert_allclose(a @ b, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0) ** 2, sizes[:m], rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(b, axis=1) ** 2, sizes[:m], rtol=1e-4)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(None, 8)
    def test_product_is_that_of_the_sum(self, factor_bits):
        w, x = random((32, 20)), random((2, 3, 32), 1)
        q = quantize(w, COLUMNS)
        a, b = compensate(w, q, factor_bits=factor_bits)
        y = self.variant(compensated_matmul)(x, q, a, b)
        dense = w - remaining(w, dequantize(q), a, b)
        np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(compensated_matmul(x, dequantize(q), a, b), y, rtol=1e-5)


@pytest.mark.claim("zeroquant-v2-lorc")
def test_no_other_pair_of_that_rank_leaves_less_of_the_error_and_eight_bits_cost_nothing():
    w = random((128, 128))
    q = quantize(w, COLUMNS)
    w_hat = dequantize(q)
    sizes = np.linalg.svd(np.float64(w) - np.asarray(w_hat), compute_uv=False)
    errors = []
    for rank in (0, 4, 16):
        rest = remaining(w, w_hat, *low_rank_compensation(w, q, rank=rank))
        errors.append(np.sum(rest**2))
        np.testing.assert_allclose(errors[-1], np.sum(sizes[rank:] ** 2), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(rest, 2), sizes[16], rtol=1e-3)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.8 * errors[0]
    a = low_rank_compensation(w, q, rank=16)[0]
    for seed in range(2):  # pairs beside it, the second factor the best for the first
        other = np.float64(a) + 0.1 * np.std(a) * random(a.shape, seed)
        best = np.linalg.lstsq(other, np.float64(w) - np.asarray(w_hat), rcond=None)[0]
        assert np.sum(remaining(w, w_hat, jnp.asarray(other), jnp.asarray(best)) ** 2) > errors[2]
    eight_bits = np.sum(
        remaining(w, w_hat, *low_rank_compensation(w, q, rank=16, factor_bits=8)) ** 2
    )
    np.testing.assert_allclose(eight_bits, errors[2], rtol=1e-3)


def test_factors_in_eight_bits_take_a_byte_each_and_a_scale_per_column():
    w = random((32, 20))
    a, b = compensate(w, quantize(w, COLUMNS), rank=5, factor_bits=8)
    assert a.nbytes == 32 * 5 + 4 * 5
    assert b.nbytes == 5 * 20 + 4 * 20


def test_smaller_blocks_leave_less_to_compensate():
    w = random((256, 16)) * (1 + 30 * (random((256, 16), 1) > 3))
    errors = []
    for block_size in (256, 64, 16):
        q = quantize(w, QuantSpec(bits=4, granularity="block", axis=0, block_size=block_size))
        errors.append(np.mean((dequantize(q) - w) ** 2))
    assert errors[0] > errors[1] > errors[2]


def test_batched_and_mapped_kernels_are_those_one_by_one():
    w = random((3, 32, 20))
    w_hat = np.round(w)
    a, b = compensate(w, w_hat, rank=4)
    mapped = jax.vmap(lambda w, w_hat: compensate(w, w_hat, rank=4))(w, w_hat)
    x = random((5, 32), 1)
    for i in range(3):
        one = compensated_matmul(x, w_hat[i], *compensate(w[i], w_hat[i], rank=4))
        for factors in ((a, b), mapped):
            y = compensated_matmul(x, w_hat[i], factors[0][i], factors[1][i])
            np.testing.assert_allclose(y, one, rtol=1e-3, atol=1e-4)


def test_gradients_reach_the_input_and_the_factors():
    w, x = random((8, 6)), random((4, 8), 1)
    q = quantize(w, COLUMNS)
    a, b = low_rank_compensation(w, q, rank=2)
    y, vjp = jax.vjp(lambda x, a, b: compensated_matmul(x, q, a, b), x, a, b)
    g = random((4, 6), 2)
    dense = dequantize(q) + a @ b
    expected = (g @ dense.T, x.T @ g @ b.T, (x @ a).T @ g)
    chex.assert_trees_all_close(vjp(g), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-5)


def test_classes_of_sensitivity():
    differences = jnp.array([-1.0, 0.1, 0.11, 0.5, 0.51, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(sensitivity_class(differences), [1, 1, 2, 2, 3, 3, 3])
    assert int(sensitivity_class(0.2)) == 2


class TestEdges:
    def test_nothing_to_compensate(self):
        w = random((8, 6))
        for factor_bits in (None, 8):
            a, b = compensate(w, w, rank=3, factor_bits=factor_bits)
            np.testing.assert_array_equal(remaining(w, w, a, b), np.zeros((8, 6)))
        a, b = low_rank_compensation(w, 0 * w, rank=0, factor_bits=8)
        np.testing.assert_allclose(compensated_matmul(w.T, w, a, b), w.T @ w, rtol=1e-5)

    def test_one_entry(self):
        a, b = low_rank_compensation(jnp.array([[3.0]]), jnp.array([[5.0]]))
        np.testing.assert_allclose(a @ b, [[-2.0]], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        w = jnp.asarray(random((8, 6)), dtype)
        a, b = low_rank_compensation(w, jnp.round(w), rank=6)
        assert a.dtype == b.dtype == dtype
        y = compensated_matmul(jnp.eye(8, dtype=dtype), jnp.round(w), a, b)
        assert y.dtype == dtype
        np.testing.assert_allclose(np.float32(y), np.float32(w), atol=0.05)

    def test_bad_input_is_named(self):
        w = jnp.ones((8, 6))
        for call, error, message in (
            (
                lambda: low_rank_compensation(w, w[1:]),
                ValueError,
                "weight_quantized must have shape",
            ),
            (lambda: low_rank_compensation(w[0], w[0]), ValueError, r"weight must have shape \["),
            (lambda: low_rank_compensation(w, w, rank=-1), ValueError, "rank must be in"),
            (lambda: low_rank_compensation(w, w, factor_bits=9), ValueError, "bits must be in"),
            (lambda: low_rank_compensation(w * jnp.nan, w), ValueError, "weight must be finite"),
            (
                lambda: low_rank_compensation(w, w * jnp.inf),
                ValueError,
                "weight_quantized must be finite",
            ),
            (lambda: low_rank_compensation(w > 0, w), TypeError, "weight must have a floating"),
            (
                lambda: compensated_matmul(w[:, :3], w, w[:, :2], w[:2]),
                ValueError,
                r"weight must have shape \(3, 6\), got \(8, 6\)",
            ),
            (
                lambda: compensated_matmul(w.T, w, w[:, :2], w[:3]),
                ValueError,
                r"b must have shape \(2, 6\), got \(3, 6\)",
            ),
        ):
            with pytest.raises(error, match=message):
                call()
