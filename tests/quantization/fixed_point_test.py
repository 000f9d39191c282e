from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.quantization import (
    empirical_kl,
    fixed_point_quantize,
    gradient_diversity,
    push_down,
    push_up,
)

QTORCH = np.load(Path(__file__).parents[1] / "oracles" / "fixed_point.npz")
KEY = jax.random.key(0)


class TestFixedPointQuantize(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_qtorch(self):
        nearest = self.variant(
            lambda x, word, fraction: fixed_point_quantize(x, word, fraction, rounding="nearest")
        )
        for (word, fraction), expected in zip(QTORCH["formats"], QTORCH["rounded"]):
            np.testing.assert_array_equal(nearest(QTORCH["x"], word, fraction), expected)
        words, fractions = QTORCH["formats"].T
        every = jax.vmap(nearest, in_axes=(None, 0, 0))(QTORCH["x"], words, fractions)
        np.testing.assert_array_equal(every, QTORCH["rounded"])

    def test_nearest_is_within_half_a_step_and_the_gradient_straight_through(self):
        x = np.random.default_rng(0).uniform(-7.9, 7.8, size=100).astype(np.float32)
        rounded = fixed_point_quantize(x, 8, 4, rounding="nearest")
        assert np.abs(rounded - x).max() <= 2.0**-5
        far = jnp.array([0.3, 100.0])
        gradient = jax.grad(lambda x: fixed_point_quantize(x, 8, 4, rounding="nearest").sum())(far)
        np.testing.assert_array_equal(gradient, 1.0)

    def test_stochastic_rounding_is_unbiased_and_out_of_range_clamps(self):
        x = jnp.array([0.3, -0.3, 1.01, -5.97, 0.25])
        draws = jax.vmap(lambda key: fixed_point_quantize(x, 8, 4, key=key))(
            jax.random.split(KEY, 2000)
        )
        error = np.asarray(draws, np.float64).mean(0) - x
        spread = np.asarray(draws, np.float64).std(0) / np.sqrt(2000)
        assert np.all(np.abs(error) <= 3 * spread + 1e-7)
        assert set(np.unique(draws[:, 0])) == {0.25, 0.3125}
        np.testing.assert_array_equal(draws[:, 4], 0.25)
        extreme = fixed_point_quantize(jnp.array([1e30, -1e30]), 8, 4, key=KEY)
        np.testing.assert_array_equal(extreme, [7.9375, -8.0])

    @parameterized.parameters(jnp.bfloat16, jnp.float16)
    def test_half_precision(self, dtype):
        x = jnp.asarray(QTORCH["x"][1:], dtype)
        wide = fixed_point_quantize(x.astype(jnp.float32), 8, 4, rounding="nearest")
        ours = fixed_point_quantize(x, 8, 4, rounding="nearest")
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, wide.astype(dtype))

    def test_longest_formats_stay_finite(self):
        x = jnp.array([1.5e9, -0.3, 1e-9, 1e38])
        for word, fraction in ((32, 0), (32, 24), (32, 32), (1, 0)):
            assert jnp.isfinite(fixed_point_quantize(x, word, fraction, key=KEY)).all()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="word_length must be in"):
            fixed_point_quantize(jnp.ones(2), 33, 4, key=KEY)
        with pytest.raises(ValueError, match="fraction_length must be in"):
            fixed_point_quantize(jnp.ones(2), 8, -1, key=KEY)
        with pytest.raises(TypeError, match="word_length must be an integer"):
            fixed_point_quantize(jnp.ones(2), 8.0, 4, key=KEY)
        with pytest.raises(ValueError, match="key must be given for stochastic rounding"):
            fixed_point_quantize(jnp.ones(2), 8, 4)
        with pytest.raises(ValueError, match="rounding must be one of"):
            fixed_point_quantize(jnp.ones(2), 8, 4, rounding="down")
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            fixed_point_quantize(jnp.ones(2, int), 8, 4, key=KEY)


class TestEmpiricalKL:
    def test_matches_numpys_histograms(self):
        x = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
        x_q = np.round(x * 8) / 8
        edges = np.linspace(x.min(), x.max(), 5)
        inside = np.clip(x_q, x.min(), x.max())
        p, q = (np.histogram(values, edges)[0] / 200 for values in (x, inside))
        expected = np.sum(p * np.log(p / q))
        assert expected > 1e-4
        np.testing.assert_allclose(empirical_kl(x, x_q, resolution=4), expected, rtol=1e-3)

    def test_edges(self):
        x = jnp.array([0.0, 0.3, 1.0])
        assert empirical_kl(x, x, resolution=100) == 0
        assert empirical_kl(x, jnp.array([0.0, 0.0, 1.0]), resolution=3) == 0
        assert empirical_kl(x, jnp.array([0.0, 0.0, 1.0]), resolution=4) == jnp.inf
        assert empirical_kl(jnp.ones(3), jnp.zeros(3), resolution=5) == 0
        assert empirical_kl(jnp.zeros((0, 2)), jnp.zeros((0, 2)), resolution=5) == 0
        assert empirical_kl(x, jnp.array([-1e30, 0.3, 1e30]), resolution=5) == 0
        with pytest.raises(ValueError, match="x_q must have shape"):
            empirical_kl(x, x[:2], resolution=4)
        with pytest.raises(ValueError, match="resolution must be in"):
            empirical_kl(x, x, resolution=0)


class TestGradientDiversity:
    def test_parallel_orthonormal_and_cancelling(self):
        g = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32)
        parallel = g * np.array([[1.0], [3.0], [0.5]], np.float32)
        np.testing.assert_allclose(gradient_diversity(parallel), 1.0, rtol=1e-6)
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
        tree = {"a": rotation[:, :4].astype(np.float32), "b": rotation[:, 4:].astype(np.float32)}
        np.testing.assert_allclose(gradient_diversity(tree), 3.0, rtol=1e-5)
        assert gradient_diversity(jnp.array([[1.0, 2.0], [-1.0, -2.0]])) == jnp.inf
        assert gradient_diversity(jnp.zeros((3, 2))) == 1.0
        np.testing.assert_allclose(gradient_diversity(1e30 * jnp.eye(4)), 2.0, rtol=1e-5)

    def test_matches_the_formula(self):
        g = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(np.float32)
        flat = g.reshape(5, 6).astype(np.float64)
        expected = np.linalg.norm(flat, axis=1).sum() / np.linalg.norm(flat.sum(0))
        np.testing.assert_allclose(gradient_diversity(g), expected, rtol=1e-5)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="gradients must be arrays"):
            gradient_diversity({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})
        with pytest.raises(ValueError, match="gradients must be arrays"):
            gradient_diversity({})


class TestPushDown:
    def test_a_grid_needs_no_more_than_the_shortest_fraction(self):
        grid = jnp.asarray(np.random.default_rng(0).integers(-20, 21, size=(8, 9)) / 8, jnp.float32)
        search = jax.jit(lambda w, bins: push_down(w, 24, 16, resolution=bins, key=KEY))
        word, fraction = search(grid, 50)
        assert fraction == 4
        assert 2.0 ** (word - 5) > jnp.abs(grid).max() >= 2.0 ** (word - 6)
        rounded = fixed_point_quantize(grid, word, fraction, key=KEY)
        assert empirical_kl(grid, rounded, resolution=50) == 0

    def test_finer_histograms_ask_for_more_bits(self):
        w = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, size=2000), jnp.float32)
        search = jax.jit(lambda bins: push_down(w, 24, 16, resolution=bins, key=KEY))
        found = [search(bins) for bins in (1, 20, 100)]
        assert [int(f) for _, f in found] == sorted(int(f) for _, f in found)
        assert found[0][1] == 4 < found[2][1] < 16
        for (word, fraction), bins in zip(found, (1, 20, 100)):
            rounded = fixed_point_quantize(w, word, fraction, key=jax.random.key(1))
            assert empirical_kl(w, rounded, resolution=bins) < 3e-2

    def test_never_longer_than_given(self):
        w = jnp.asarray(np.random.default_rng(0).normal(size=300), jnp.float32)
        word, fraction = push_down(w, 9, 5, resolution=100, key=KEY)
        assert (int(word), int(fraction)) == (9, 5)
        with pytest.raises(ValueError, match="resolution must be in"):
            push_down(w, 9, 5, resolution=101, key=KEY)
        with pytest.raises(TypeError, match="weights must have a floating-point type"):
            push_down(jnp.ones(3, int), 9, 5, resolution=10, key=KEY)


def push_up64(word, fraction, diversity, strategy):
    step = 1
    if np.isfinite(diversity) and np.log(diversity) > 1:
        square = (np.log(diversity) - 1) ** 2
        s1 = max(int(np.ceil(1 / square)), 1)
        s2 = max(min(int(np.ceil(32 * square)), 32) - fraction, 0)
        step = {"min": min(s1, s2), "mean": -(-(s1 + s2) // 2), "max": max(s1, s2)}[strategy]
    fraction = min(fraction + step, 32)
    word = min(max(word, fraction) + 1, 32)
    fraction = min(fraction, 24)
    return max(min(fraction + 8, 32), word), fraction


class TestPushUp:
    @pytest.mark.parametrize("strategy", ["min", "mean", "max"])
    def test_matches_the_formula(self, strategy):
        raise_ = jax.jit(lambda w, f, d: push_up(w, f, d, strategy=strategy))
        for word, fraction in ((8, 4), (16, 12), (32, 24), (12, 20)):
            for diversity in (1.0, 2.5, 3.0, 4.0, 7.0, 30.0, np.inf):
                ours = tuple(int(length) for length in raise_(word, fraction, diversity))
                assert ours == push_up64(word, fraction, diversity, strategy)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="strategy must be one of"):
            push_up(8, 4, 1.0, strategy="most")
        with pytest.raises(ValueError, match="word_length must be in"):
            push_up(0, 4, 1.0, strategy="min")
