import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import norms


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "mlp": {"kernel": 0.5 * random((3, 4)), "bias": random(4)},
    "head": {"kernel": random((4, 2)) / 2},
}


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((1.0, 1.0), (0.5, 3.0), (2.0, 0.1))
    def test_values_and_gradients_match_the_formula(self, a, b):
        v = 2 * random((3, 4))
        ours = self.variant(lambda v, a, b: norms.weight_compander(v, a, b))
        wide = np.float64(v)
        np.testing.assert_allclose(ours(v, a, b), a * np.arctan(wide / b), rtol=1e-6)
        gradients = jax.vjp(ours, v, jnp.float32(a), jnp.float32(b))[1](np.ones_like(v))
        square = b**2 + wide**2
        expected = a * b / square, np.arctan(wide / b).sum(), (-a * wide / square).sum()
        chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_inverse_goes_back(self):
        w = np.linspace(-3, 3, 13).astype(np.float32)
        v = self.variant(lambda w: norms.weight_compander_inverse(w, 2.0, 0.3))(w)
        np.testing.assert_allclose(v, 0.3 * np.tan(np.float64(w) / 2), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(norms.weight_compander(v, 2.0, 0.3), w, rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1.0, 1.5, 2.0, 3.0)
    def test_power_propagation_with_its_gradient_at_zero_too(self, alpha):
        v = np.array([-2, -0.1, 0, 0.5, 3], np.float32)
        ours = self.variant(lambda v: norms.power_propagation(v, alpha))
        size = np.abs(np.float64(v))
        np.testing.assert_allclose(ours(v), np.sign(v) * size**alpha, rtol=1e-5)
        gradient = jax.vjp(ours, v)[1](np.ones_like(v))[0]
        np.testing.assert_allclose(gradient, alpha * size ** (alpha - 1), rtol=1e-5)


class TestParameters:
    def test_initial_weights_are_kept_and_biases_left_alone(self):
        raw, companders = norms.weight_compander_init(PARAMS, a=2.0, b=0.5)
        assert sorted(companders) == ["head/kernel", "mlp/kernel"]
        assert raw["mlp"]["bias"] is PARAMS["mlp"]["bias"]
        expected = 0.5 * np.tan(PARAMS["mlp"]["kernel"] / 2)
        np.testing.assert_allclose(raw["mlp"]["kernel"], expected, rtol=1e-5)
        chex.assert_trees_all_close(norms.compand_parameters(raw, companders), PARAMS, rtol=1e-5)

    def test_mask(self):
        mask = {"mlp": {"kernel": False, "bias": True}, "head": {"kernel": False}}
        raw, companders = norms.weight_compander_init(PARAMS, mask, a=3.0)
        assert list(companders) == ["mlp/bias"]
        assert raw["head"]["kernel"] is PARAMS["head"]["kernel"]

    def test_companders_learn(self):
        raw, companders = norms.weight_compander_init(PARAMS, a=2.0, b=0.5)
        total = lambda companders: jnp.sum(
            norms.compand_parameters(raw, companders)["head"]["kernel"] ** 2
        )
        gradient = jax.grad(total)(companders)["head/kernel"]
        w, v = PARAMS["head"]["kernel"], raw["head"]["kernel"]
        np.testing.assert_allclose(gradient.log_a, np.sum(2 * w * w), rtol=1e-4)
        slope = -2.0 * v * 0.5 / (0.5**2 + v**2)  # b ∂w/∂b
        np.testing.assert_allclose(gradient.log_b, np.sum(2 * w * slope), rtol=1e-4)

    def test_bad_input_is_named(self):
        with pytest.raises(
            ValueError, match=r"params\['head/kernel'\] cannot be companded: w must"
        ):
            norms.weight_compander_init({"head": {"kernel": np.full((2, 2), 1.6, "f")}})
        with pytest.raises(ValueError, match="mask must have the tree structure"):
            norms.weight_compander_init(PARAMS, {"mlp": True})
        with pytest.raises(TypeError, match="mask must have booleans as leaves, got 1"):
            norms.weight_compander_init({"kernel": random((2, 2))}, {"kernel": 1})
        with pytest.raises(ValueError, match="a must be in"):
            norms.weight_compander_init(PARAMS, a=0.0)
        with pytest.raises(ValueError, match=r"companders must be of leaves .* \['mlp'\]"):
            norms.compand_parameters(PARAMS, {"mlp": norms.Compander(0.0, 0.0)})


class TestClaims:
    @pytest.mark.claim("weight-compander")
    def test_training_bounds_large_weights_and_moves_small_ones_away_from_zero(self):
        """A step of v moves w by (dw/dv)² times the plain one; a network that overfits noisy
        labels then has fewer weights near zero, and none above the bound."""
        v, gradient = np.linspace(-4, 4, 9).astype(np.float32), random(9)
        a, b, rate = 1.0, 0.5, 1e-3
        w, vjp = jax.vjp(lambda v: norms.weight_compander(v, a, b), v)
        moved = norms.weight_compander(v - rate * vjp(gradient)[0], a, b)
        factor = (a * b / (b**2 + v**2)) ** 2
        np.testing.assert_allclose((moved - w) / (-rate * gradient), factor, rtol=0.02, atol=1e-3)
        np.testing.assert_allclose([factor[4], w[4]], [(a / b) ** 2, 0])
        np.testing.assert_array_equal(norms.weight_compander(-v, a, b), -w)
        assert np.all(np.diff(w) > 0)
        assert np.abs(norms.weight_compander(1e8 * v, a, b)).max() <= np.float32(a * np.pi / 2)
        np.testing.assert_allclose(norms.weight_compander(v, 1e4, 1e4), v, rtol=1e-5)

        x, labels = random((64, 10), 1), random((64, 1), 2) > 0
        params = {"up": 0.3 * random((10, 32), 3), "down": 0.3 * random((32, 1), 4)}
        optimizer = optax.sgd(0.5)

        def train(params, weights_of):
            def loss(params):
                weights = weights_of(params)
                logits = jnp.tanh(x @ weights["up"]) @ weights["down"]
                return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))

            def step(carry, _):
                params, state = carry
                value, gradient = jax.value_and_grad(loss)(params)
                updates, state = optimizer.update(gradient, state)
                return (optax.apply_updates(params, updates), state), value

            start = params, optimizer.init(params)
            (params, _), losses = jax.lax.scan(step, start, length=600)
            return weights_of(params), losses

        plain, plain_losses = jax.jit(lambda p: train(p, lambda p: p))(params)
        raw, companders = norms.weight_compander_init(params, a=1.0, b=0.5)
        ours, losses = jax.jit(
            lambda p: train(p, lambda p: norms.compand_parameters(p, companders))
        )(raw)
        np.testing.assert_allclose(losses[0], plain_losses[0], rtol=1e-4)
        assert losses[-1] < 0.1 * losses[0]
        sizes, plain_sizes = (
            np.abs(np.concatenate([w.ravel() for w in weights.values()]))
            for weights in (ours, plain)
        )
        assert sizes.max() < np.pi / 2 < plain_sizes.max()
        assert np.mean(sizes < 0.1) < 0.8 * np.mean(plain_sizes < 0.1)


class TestEdges:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        v = jnp.asarray(random(9), dtype)
        for function in (norms.weight_compander, norms.weight_compander_inverse):
            ours = function(v, 2.0, 0.5)
            assert ours.dtype == dtype
            expected = function(v.astype(jnp.float32), 2.0, 0.5).astype(dtype)
            np.testing.assert_array_equal(ours, expected)
        assert norms.power_propagation(v).dtype == dtype

    @pytest.mark.parametrize("value", [0.0, 1e4, -1e16])
    def test_extremes_have_finite_gradients(self, value):
        v = np.full(2, value, np.float32)
        slopes = jax.jacobian(norms.weight_compander, argnums=(0, 1, 2))(v, 0.5, 1e-3)
        chex.assert_tree_all_finite(slopes)
        chex.assert_tree_all_finite(jax.jacobian(norms.power_propagation)(v))

    def test_weights_out_of_range(self):
        w = np.array([0.1, 1.6], np.float32)
        with pytest.raises(ValueError, match=r"w must be below a π/2 = 1.57.* got 1.6"):
            norms.weight_compander_inverse(w, 1.0, 1.0)
        traced = jax.jit(lambda w: norms.weight_compander_inverse(w, 1.0, 1.0))(w)
        np.testing.assert_array_equal(np.isnan(traced), [False, True])

    def test_vmap_and_sharding(self):
        v, a = random((8, 4)), np.linspace(1, 2, 8).astype(np.float32)
        expected = norms.weight_compander(v, a[:, None], 0.5)
        mapped = jax.vmap(lambda v, a: norms.weight_compander(v, a, 0.5))(v, a)
        np.testing.assert_allclose(mapped, expected, rtol=1e-6)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = jax.jit(norms.weight_compander)(jax.device_put(v, sharding), 1.5, 0.5)
        assert ours.sharding.is_equivalent_to(sharding, 2)

    def test_bad_input_is_named(self):
        v = random((2, 3))
        for function in (norms.weight_compander, norms.weight_compander_inverse):
            with pytest.raises(ValueError, match="a must be in"):
                function(v, 0.0, 1.0)
            with pytest.raises(ValueError, match="b must be in"):
                function(v, 1.0, -1.0)
            with pytest.raises(ValueError, match="b must broadcast"):
                function(v, 1.0, np.ones(2, np.float32))
            with pytest.raises(TypeError, match="must have a floating-point type"):
                function(v.astype(int), 1.0, 1.0)
        with pytest.raises(ValueError, match="alpha must be in"):
            norms.power_propagation(v, 0.5)
        with pytest.raises(TypeError, match="v must have a floating-point type"):
            norms.power_propagation(v.astype(int))
