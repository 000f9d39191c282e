import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from jaxref.nn import (
    MultipletLayer,
    gini_mean,
    lehmer_mean,
    lehmer_mean_order_gradient,
    lehmer_mean_weight_gradient,
    mean_case_slope_score,
    multiplet,
)

ORDERS = (-math.inf, -7.5, -1.0, 0.0, 0.5, 1.0, 2.0, 9.0, math.inf)


def random_inputs(shape=(3, 5), seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 4, size=shape).astype("f"), rng.uniform(0, 2, shape[-1]).astype("f")


def lehmer64(x, w, p):
    x, w = np.float64(x), np.float64(w)
    if math.isinf(p):
        return (np.max if p > 0 else np.min)(x, axis=-1)
    return np.sum(w * x**p, -1) / np.sum(w * x ** (p - 1), -1)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_match_the_formula(self):
        x, w = random_inputs()
        ours = self.variant(lambda x, w: [lehmer_mean(x, w, p) for p in ORDERS])(x, w)
        for p, mean in zip(ORDERS, ours):
            np.testing.assert_allclose(mean, lehmer64(x, w, p), rtol=1e-5)

    def test_special_cases_match_scipy(self):
        x, w = random_inputs()
        means = {0.0: scipy.stats.hmean, 1.0: np.average}
        for p, mean in means.items():
            expected = mean(np.float64(x), axis=-1, weights=np.broadcast_to(w, x.shape))
            np.testing.assert_allclose(lehmer_mean(x, w, p), expected, rtol=1e-5)
        geometric = scipy.stats.gmean(np.float64(x[:, :2]), axis=-1)
        np.testing.assert_allclose(
            lehmer_mean(x[:, :2], np.ones(2, "f"), 0.5), geometric, rtol=1e-5
        )
        for p in (-2.0, 0.0, 3.0):
            expected = scipy.stats.pmean(np.float64(x), p, axis=-1, weights=np.tile(w, (3, 1)))
            np.testing.assert_allclose(gini_mean(x, w, p, 0.0), expected, rtol=2e-5)

    def test_gradients_match_finite_differences_in_float64(self):
        x, w = random_inputs((5,))
        w[1] = 0
        p, slopes = 1.7, jax.jit(jax.grad(lehmer_mean, argnums=(0, 1, 2)))
        ours = slopes(x, w, 1.7)

        def difference(i, index=()):
            ends = []
            for step in (1e-5, -1e-5):
                point = [np.float64(x), np.float64(w), np.float64(p)]
                point[i][index] += step
                ends.append(lehmer64(point[0], point[1], float(point[2])))
            return (ends[0] - ends[1]) / 2e-5

        for i in range(2):
            expected = [difference(i, j) for j in range(5)]
            np.testing.assert_allclose(ours[i], expected, rtol=1e-4, atol=1e-6)
        expected = (lehmer64(x, w, p + 1e-5) - lehmer64(x, w, p - 1e-5)) / 2e-5
        np.testing.assert_allclose(ours[2], expected, rtol=1e-4)

    def test_gini_mean_is_continuous_where_its_exponents_meet(self):
        x, w = random_inputs()
        logs = np.log(np.float64(x))
        powers = w * np.float64(x) ** 1.5
        expected = np.exp(np.sum(powers * logs, -1) / np.sum(powers, -1))
        np.testing.assert_allclose(gini_mean(x, w, 1.5, 1.5), expected, rtol=1e-5)
        for gap in (0.009, 0.011, 0.05):
            exact = np.sum(w * np.float64(x) ** (1.5 + gap), -1) / np.sum(powers, -1)
            ours = gini_mean(x, w, 1.5 + gap, 1.5)
            np.testing.assert_allclose(ours, exact ** (1 / gap), rtol=1e-4)
        slope = jax.grad(lambda r: gini_mean(x, w, r, 1.5).sum())(1.5)
        assert np.isfinite(slope)


class TestClaims:
    @pytest.mark.claim("multiplet-neuron")
    def test_one_set_of_weights_gives_every_mean_and_two_layers_exclusive_or(self):
        x, w = random_inputs()
        means = np.stack([lehmer_mean(x, w, p) for p in ORDERS])
        assert np.all(np.diff(means, axis=0) >= -1e-5)
        np.testing.assert_allclose(means[0], x.min(-1))
        np.testing.assert_allclose(means[-1], x.max(-1))
        for p in (-1.0, 0.5, 1.0, 3.0):
            np.testing.assert_allclose(gini_mean(x, w, p, p - 1), lehmer_mean(x, w, p), rtol=1e-5)
            np.testing.assert_allclose(
                lehmer_mean(7 * x, w, p), 7 * lehmer_mean(x, w, p), rtol=1e-5
            )
            grad = jax.vmap(jax.grad(lehmer_mean, argnums=(1, 2)), in_axes=(0, None, None))
            by_weight, by_order = grad(x, w, p)
            ours = lehmer_mean_weight_gradient(x, w, p)
            np.testing.assert_allclose(ours, by_weight, rtol=1e-3, atol=1e-5)
            ours = lehmer_mean_order_gradient(x, w, p)
            np.testing.assert_allclose(ours, by_order, rtol=1e-3, atol=1e-5)
        # a product, of an arithmetic and a harmonic mean
        a_and_h = multiplet(x[:, :2], np.ones((2, 1), "f"), (1.0, 0.0))
        np.testing.assert_allclose(a_and_h.prod((-1, -2)), x[:, 0] * x[:, 1], rtol=1e-5)
        # AND and OR are the two ends of one unit, and a signed readout is exclusive or
        corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
        logic = multiplet(corners, np.ones((2, 1), "f"), (-math.inf, math.inf))[:, 0]
        np.testing.assert_allclose(logic @ np.array([-1.0, 1.0]), [0, 1, 1, 0], atol=1e-6)

    def test_slope_score_is_a_covariance_and_zero_for_equal_inputs(self):
        x, w = random_inputs()
        share, logs = np.float64(w) / w.sum(), np.log(np.float64(x))
        expected = (share * x * logs).sum(-1) - (share * x).sum(-1) * (share * logs).sum(-1)
        np.testing.assert_allclose(mean_case_slope_score(x, w), expected, rtol=1e-4)
        ours = lehmer_mean_order_gradient(x, w, 1.0)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
        equal = np.full((2, 5), 3.3, "f")
        np.testing.assert_array_equal(mean_case_slope_score(equal, w), 0)
        for p in ORDERS:
            np.testing.assert_allclose(lehmer_mean(equal, w, p), 3.3, rtol=1e-5)


class TestLayer:
    def test_trained_orders_and_gradients(self):
        layer = MultipletLayer(3, 2, (0.0, 2.0), train_orders=True, rngs=nnx.Rngs(0))
        x = random_inputs((4, 3))[0]
        weights = jax.nn.softplus(layer.kernel[...])
        expected = np.stack([[lehmer64(x, weights[:, u], p) for p in (0.0, 2.0)] for u in range(2)])
        y = layer(x)
        np.testing.assert_allclose(y.reshape(4, 2, 2), np.moveaxis(expected, 2, 0), rtol=1e-5)
        slopes = nnx.to_pure_dict(nnx.grad(lambda layer: layer(x).sum())(layer))
        assert np.all(slopes["orders"] > 0)
        assert slopes["kernel"].shape == (3, 2)
        assert layer.kernel.get_metadata()["axes"] == ("embed", "mlp")

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match="orders must be at least one"):
            MultipletLayer(3, 2, (), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="orders must be in"):
            MultipletLayer(3, 2, (math.inf,), True, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"x must have shape \[..., 3\]"):
            MultipletLayer(3, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))


class TestEdges:
    @pytest.mark.parametrize("size", [0.0, 1e-6, 1e4])
    def test_extreme_inputs_have_finite_gradients(self, size):
        x, w = random_inputs()
        w[0], x[0] = 0, 1
        x *= size
        for p in (-30.0, 0.5, 30.0):
            value, slopes = jax.value_and_grad(lambda *a: lehmer_mean(*a).sum(), argnums=(0, 1, 2))(
                x, w, p
            )
            assert np.isfinite(value)
            chex.assert_tree_all_finite(slopes)

    def test_an_input_without_weight_changes_nothing_however_large(self):
        x, w = random_inputs((4,))
        w[0] = 0
        for p in ORDERS:
            expected = lehmer_mean(x[1:], w[1:], p)
            for other in (1e-10, 1e10):
                x[0] = other
                np.testing.assert_allclose(lehmer_mean(x, w, p), expected, rtol=1e-5)

    def test_axis_vmap_and_half_precision(self):
        x, w = random_inputs()
        expected = lehmer_mean(x, w, 2.0)
        np.testing.assert_allclose(lehmer_mean(x.T, w, 2.0, axis=0), expected, rtol=1e-6)
        mapped = jax.vmap(lambda x: lehmer_mean(x, w, 2.0))(x)
        np.testing.assert_allclose(mapped, expected, rtol=1e-6)
        half = jnp.asarray(x, jnp.bfloat16)
        ours = lehmer_mean(half, w, 2.0)
        assert ours.dtype == jnp.bfloat16
        exact = lehmer_mean(half.astype("f"), w, 2.0).astype(jnp.bfloat16)
        np.testing.assert_array_equal(ours, exact)

    def test_bad_input_is_named(self):
        x, w = random_inputs()
        with pytest.raises(ValueError, match="x must be in"):
            lehmer_mean(-x, w, 1.0)
        with pytest.raises(ValueError, match="weights must be in"):
            lehmer_mean(x, -w, 1.0)
        with pytest.raises(ValueError, match="weights must not all be 0"):
            lehmer_mean(x, 0 * w, 1.0)
        with pytest.raises(ValueError, match="weights must broadcast to shape"):
            lehmer_mean(x, w[:4], 1.0)
        with pytest.raises(ValueError, match="epsilon must be in"):
            lehmer_mean(x, w, 1.0, epsilon=0.0)
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            lehmer_mean(x.astype(int), w, 1.0)
        with pytest.raises(ValueError, match="r must be in"):
            gini_mean(x, w, math.inf, 1.0)
        with pytest.raises(ValueError, match=r"weights must have shape \[n, units\]"):
            multiplet(x, w, (1.0,))
        with pytest.raises(ValueError, match=r"x must have shape \(3, 4\)"):
            multiplet(x, np.ones((4, 2), "f"), (1.0,))
        with pytest.raises(ValueError, match="orders must be a vector"):
            multiplet(x, np.ones((5, 2), "f"), ())
