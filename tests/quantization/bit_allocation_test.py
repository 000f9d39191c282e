import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from absl.testing import parameterized

from jaxref.quantization import (
    QuantSpec,
    allocation_gain,
    baq_dequantize,
    baq_levels,
    baq_quantize,
    dequantize,
    gptq_quantize,
    hessian_sensitivity,
    optimal_bit_allocation,
)


def random_sensitivity(shape=(6,), seed=0, spread=2.0):
    return np.exp(np.random.default_rng(seed).normal(size=shape) * spread).astype(np.float32)


def random_layer(inputs=32, outputs=8, seed=0):
    """The Hessian of correlated inputs of log-normal size, one of them dead, and a kernel."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    x = rng.normal(size=(200, inputs)) @ mixing * np.exp(rng.normal(size=inputs) * 1.5)
    x[:, 3] = 0
    w = rng.normal(size=(inputs, outputs))
    return w.astype(np.float32), (2 * x.T @ x / len(x)).astype(np.float32)


def minimised(c, mean_bits, weights, min_bits):
    """The allocation by a general solver, in float64."""
    c, weights = c.astype(np.float64), weights.astype(np.float64)
    found = scipy.optimize.minimize(
        lambda bits: np.log(np.sum(weights * c * 4.0**-bits)),
        np.full(c.shape, mean_bits),
        method="SLSQP",
        bounds=[(min_bits, None)] * len(c),
        constraints={"type": "eq", "fun": lambda bits: np.sum(weights * (bits - mean_bits))},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return found.x


def authors64(w, h, mean_bits, damping=0.01, exponent=1.95, floor=0.0):
    """Both passes as the authors' program does them, in float64, with all errors fed back."""
    w, h = w.T.astype(np.float64), h.astype(np.float64)  # [out, in] as there
    dead = np.diag(h) == 0
    w[:, dead] = 0
    h = h + np.diag(np.where(dead, 1, damping * np.diag(h)[~dead].mean()))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    low, high = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)

    def one_pass(levels):
        rest, codes, values = w.copy(), np.zeros(w.shape, int), np.zeros(w.shape)
        losses = np.zeros(len(levels))
        for j, n in enumerate(levels):
            scale = (high - low) / (n - 1 + 1e-8)
            zero = np.round(-low / scale)
            codes[:, j] = np.clip(np.round(rest[:, j] / scale) + zero, 0, n - 1)
            values[:, j] = scale * (codes[:, j] - zero)
            error = (rest[:, j] - values[:, j]) / upper[j, j]
            losses[j] = 0.5 * np.sum(error**2)
            rest[:, j:] -= np.outer(error, upper[j, j:])
        return codes.T, values.T, losses

    _, _, losses = one_pass([2**mean_bits] * w.shape[1])
    live = losses > floor
    mean = np.exp(np.log(losses[live]).mean())
    # The dead input has a level, and the others have its bits.
    bits = mean_bits * len(losses) / live.sum()
    two_to_the_bits = (losses / mean * 2 ** (exponent * bits)) ** (1 / exponent)
    levels = np.round(np.maximum(two_to_the_bits, 1)).astype(int)
    assert two_to_the_bits[live].min() > 1
    return levels, *one_pass(levels)[:2]


class TestNumbers(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((-100.0, 0), (0.0, 1), (1.5, 2), (2.0, 3))
    def test_allocation_matches_a_solver(self, min_bits, seed):
        c = random_sensitivity(seed=seed)
        weights = np.random.default_rng(seed).integers(1, 9, size=6).astype(np.float32)
        bits = self.variant(
            lambda c, w: optimal_bit_allocation(c, 2.0, weights=w, min_bits=min_bits)
        )(c, weights)
        np.testing.assert_allclose(bits, minimised(c, 2.0, weights, min_bits), atol=2e-3)
        np.testing.assert_allclose(np.sum(weights * bits), 2 * np.sum(weights), rtol=1e-6)

    def test_bound_is_met_where_it_binds(self):
        c = jnp.array([1e-9, 1.0, 4.0, 0.0])
        bits = optimal_bit_allocation(c, 1.0, min_bits=0.5)
        np.testing.assert_allclose(bits, [0.5, 1.0, 2.0, 0.5], atol=1e-6)

    def test_gradients_of_the_allocation(self):
        """Central differences, with one component at its bound."""
        c = jnp.array([1e-3, 1.0, 4.0, 9.0])
        with jax.enable_x64(True):
            c = jnp.asarray(c, jnp.float64)
            function = jax.jit(lambda c: jnp.sin(optimal_bit_allocation(c, 1.0)).sum())
            chex.assert_numerical_grads(function, (c,), order=1, eps=1e-6)

    def test_baq_matches_the_authors_algorithm(self):
        w, h = random_layer()
        levels, codes, values = authors64(w, h, 4)
        q = jax.jit(lambda w, h: baq_quantize(w, h, 4))(w, h)
        np.testing.assert_array_equal(q.levels, levels)
        np.testing.assert_array_equal(q.codes, codes)
        np.testing.assert_allclose(baq_dequantize(q), values, atol=1e-4)

    def test_sensitivity_predicts_the_losses_of_independent_inputs(self):
        w, h = random_layer(outputs=200)
        diagonal = np.diag(h)
        levels = 64
        low, high = np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0)
        step = (high - low) / (levels - 1)
        rounded = np.round(w / step) * step
        damped = diagonal + 0.01 * diagonal[diagonal > 0].mean()
        measured = 0.5 * np.sum((w - rounded) ** 2, axis=1) * damped
        c = hessian_sensitivity(w, np.diag(diagonal))
        assert c[3] == 0
        ratio = np.delete(measured / np.maximum(c, 1e-30) * (levels - 1) ** 2, 3)
        np.testing.assert_allclose(ratio, 1, atol=0.3)
        np.testing.assert_allclose(ratio.mean(), 1, atol=0.04)


class TestClaims:
    @pytest.mark.claim("baq")
    def test_equal_losses_the_gain_of_the_means_and_less_error_than_equal_bits(self):
        c = random_sensitivity((50,), spread=1.0)
        with jax.enable_x64(True):
            c = jnp.asarray(c, jnp.float64)
            bits = jax.jit(lambda c: optimal_bit_allocation(c, 6.0))(c)
            losses = c * 4.0**-bits
            np.testing.assert_allclose(bits.mean(), 6.0, rtol=1e-12)
            np.testing.assert_allclose(losses, losses[0], rtol=1e-12)
            gain = losses.sum() / (c * 4.0**-6.0).sum()
            np.testing.assert_allclose(gain, allocation_gain(c), rtol=1e-12)
            for seed in range(20):
                other = np.random.default_rng(seed).normal(size=50)
                changed = bits + other - other.mean()
                assert np.sum(c * 4.0**-changed) > losses.sum()
        w, h = random_layer(outputs=16)
        spec = QuantSpec(bits=3, granularity="channel", axis=1, symmetric=False)
        equal = dequantize(gptq_quantize(w, h, spec))
        q = baq_quantize(w, h, 2.95)
        assert q.bits_per_weight <= 3
        unequal = baq_dequantize(q)
        losses = [np.trace((w - x).T @ h @ (w - x)) for x in (unequal, equal)]
        assert losses[0] < 0.6 * losses[1], losses


def test_gain_of_degenerate_sensitivities():
    c = jnp.array([[0.0, 0.0], [1e30, 1e30], [1.0, 0.0], [1e-30, 4e-30]])
    np.testing.assert_allclose(allocation_gain(c), [1, 1, 0, 0.8], rtol=1e-5)
    weights = jnp.array([3.0, 1.0])
    np.testing.assert_allclose(allocation_gain(jnp.array([1.0, 16.0]), weights=weights), 2 / 4.75)


def test_allocation_of_degenerate_sensitivities():
    c = jnp.array([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0], [1e-30, 1e30, 1e30], [2.0, 2.0, 2.0]])
    expected = [[2, 2, 2], [0, 0, 6], [0, 3, 3], [2, 2, 2]]
    bits, vjp = jax.vjp(jax.jit(lambda c: optimal_bit_allocation(c, 2)), c)
    np.testing.assert_allclose(bits, expected, rtol=1e-6)
    assert np.isfinite(vjp(jnp.arange(12.0).reshape(4, 3))[0]).all()
    np.testing.assert_array_equal(optimal_bit_allocation(jnp.array([3.0]), 1.5), [1.5])
    np.testing.assert_array_equal(optimal_bit_allocation(c[:, :2], 1.5, min_bits=1.5), 1.5)
    assert optimal_bit_allocation(c.astype(jnp.bfloat16), 2).dtype == jnp.bfloat16


def test_levels_keep_the_mean_where_some_would_have_less_than_one():
    losses = jnp.array([1e-12, 1.0, 2.0, 3.0, 4.0, 0.0])
    levels = baq_levels(losses, 2.0)
    assert levels[0] == levels[5] == 1
    np.testing.assert_allclose(np.log2(levels).mean(), 2.0, atol=0.05)
    formula = (losses[1:5] / np.exp(np.log(losses[1:5]).mean()) * 2 ** (1.95 * 3)) ** (1 / 1.95)
    np.testing.assert_array_equal(levels[1:5], np.round(formula))
    np.testing.assert_array_equal(baq_levels(losses * 1e20, 2.0), levels)
    assert baq_levels(jnp.array([0.0, 0.0, 1.0]), 8.0)[2] == 65536


def test_tensor_is_a_pytree_and_counts_its_bytes():
    w, h = random_layer()
    q = baq_quantize(w.astype(jnp.bfloat16), h, 4)
    assert q.shape == w.shape
    assert q.nbytes == 2 * w.size + 4 * 32 + 2 * 4 * 8
    np.testing.assert_allclose(q.bits_per_weight, np.log2(q.levels).mean(), rtol=1e-6)
    assert baq_dequantize(q).dtype == jnp.bfloat16
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q)
    values = jax.vmap(baq_dequantize)(stacked)
    np.testing.assert_array_equal(values[1], baq_dequantize(q))
    np.testing.assert_array_equal(baq_dequantize(stacked), values)


def test_degenerate_kernels():
    w, h = random_layer()
    w[:, 0], w[:, 1] = 0, 1
    q = baq_quantize(w, h, 4)
    values = baq_dequantize(q)
    np.testing.assert_array_equal(values[:, 0], 0)
    np.testing.assert_array_equal(values[3], 0)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(baq_dequantize(baq_quantize(0 * w, h, 4)), 0)
    one = baq_quantize(jnp.array([[-3.0]]), jnp.array([[2.0]]), 2)
    np.testing.assert_allclose(baq_dequantize(one), -3, rtol=1e-6)


def test_bad_input_is_named():
    w, h = random_layer()
    c = random_sensitivity()
    with pytest.raises(ValueError, match="sensitivity must be in"):
        optimal_bit_allocation(-c, 2)
    with pytest.raises(ValueError, match="sensitivity must be in"):
        allocation_gain(jnp.array([1.0, jnp.nan]))
    with pytest.raises(ValueError, match="sensitivity must have at least one component"):
        allocation_gain(jnp.array([]))
    with pytest.raises(TypeError, match="sensitivity must have a floating-point type"):
        optimal_bit_allocation(jnp.array([1, 2]), 2)
    with pytest.raises(ValueError, match=r"mean_bits must be in \(0, inf\), got 0"):
        optimal_bit_allocation(c, 0)
    with pytest.raises(ValueError, match="min_bits must be in"):
        optimal_bit_allocation(c, 2, min_bits=3)
    with pytest.raises(ValueError, match=r"weights must be in \(0, inf\)"):
        optimal_bit_allocation(c, 2, weights=0 * c)
    with pytest.raises(ValueError, match=r"weights must broadcast to shape \(6,\)"):
        optimal_bit_allocation(c, 2, weights=c[1:])
    with pytest.raises(ValueError, match="column_losses must be in"):
        baq_levels(-c, 2)
    with pytest.raises(ValueError, match="reference_bits must be in"):
        baq_levels(c, -1)
    with pytest.raises(ValueError, match="exponent must be in"):
        baq_quantize(w, h, 2, exponent=0)
    with pytest.raises(ValueError, match=r"mean_bits must be in \(0, 16\], got 0"):
        baq_quantize(w, h, 0)
    with pytest.raises(ValueError, match="damping must be in"):
        hessian_sensitivity(w, h, damping=-1)
    with pytest.raises(ValueError, match="weight must be finite"):
        baq_quantize(w * np.nan, h, 2)
    with pytest.raises(ValueError, match=r"hessian must have shape \(32, 32\)"):
        hessian_sensitivity(w, h[1:])
    with pytest.raises(ValueError, match="hessian must be positive definite with its damping"):
        baq_quantize(w, -h, 2)
    unknown = jax.jit(lambda w, h: baq_quantize(w, h, 4))(w, -h)
    assert np.isnan(baq_dequantize(unknown)).all()
    with pytest.raises(TypeError, match="q must be a BAQTensor, got ndarray"):
        baq_dequantize(w)
    with pytest.raises(TypeError, match="dtype must be a floating-point type, got int8"):
        baq_dequantize(baq_quantize(w, h, 2), dtype=jnp.int8)
