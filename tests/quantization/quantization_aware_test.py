from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from jaxref.attention import query_key_reparameterization
from jaxref.quantization import (
    confidence_guided_annealing,
    confidence_guided_mask,
    learned_step_init,
    learned_step_quantize,
    oscillation_tracker_init,
    oscillation_tracker_update,
    statistical_weight_codes,
    statistical_weight_quantize,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "quantization_aware.npz")
KERNEL = AUTHORS["w"].T  # [in, out]


class TestStatisticalWeightQuantize(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(2, 4)
    def test_matches_the_authors_and_its_gradient_is_the_cotangent(self, bits):
        quantize = self.variant(lambda w: statistical_weight_quantize(w, bits=bits))
        w_q, vjp = jax.vjp(quantize, KERNEL)
        np.testing.assert_allclose(w_q, AUTHORS[f"statsq_{bits}"].T, rtol=1e-6)
        cotangent = np.random.default_rng(1).normal(size=KERNEL.shape).astype(np.float32)
        np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)

    def test_axes(self):
        w_q = statistical_weight_quantize(AUTHORS["x"], bits=2, axis=(0, -1))
        np.testing.assert_allclose(w_q, AUTHORS["statsq_three_axes"], rtol=1e-6)
        stack = np.stack([KERNEL, 2 * KERNEL])
        every = jax.vmap(lambda w: statistical_weight_quantize(w, bits=2))(stack)
        np.testing.assert_array_equal(every, statistical_weight_quantize(stack, bits=2))

    @parameterized.parameters(1, 2, 3, 8)
    def test_few_levels_that_scale_with_the_weights(self, bits):
        w_q = np.asarray(statistical_weight_quantize(KERNEL, bits=bits))
        for column in w_q.T:
            assert len(np.unique(column)) <= 2**bits
            assert np.all(column != 0)
        np.testing.assert_array_equal(statistical_weight_quantize(4 * KERNEL, bits=bits), 4 * w_q)
        codes, scale = statistical_weight_codes(KERNEL, bits=bits)
        assert codes.dtype == jnp.int8
        assert (codes.min(), codes.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        np.testing.assert_array_equal(scale * (codes + 0.5) / 2 ** (bits - 1), w_q)
        np.testing.assert_allclose(scale, 2 * np.abs(KERNEL).mean(0, keepdims=True), rtol=1e-6)

    def test_the_product_of_query_and_key_quantized_once(self):
        """Both factors learn, and a factorization of the same product gives the same levels."""
        w_query, w_key = np.random.default_rng(0).normal(size=(2, 6, 2, 3)).astype(np.float32)

        def product(w_query, w_key):
            w = query_key_reparameterization(w_query, w_key)
            return statistical_weight_quantize(w, bits=2, axis=-1)

        w_q, vjp = jax.vjp(product, w_query, w_key)
        np.testing.assert_array_equal(product(2 * w_query, w_key / 2), w_q)
        assert len(np.unique(np.round(w_q[0, 0], 5))) <= 4
        expected = jax.vjp(query_key_reparameterization, w_query, w_key)[1](w_q)
        for gradient, wanted in zip(vjp(w_q), expected):
            np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)

    def test_edges(self):
        zeros = jnp.array([[0.0, 1.0], [0.0, -1e-30], [0.0, 1e30]])
        w_q, vjp = jax.vjp(lambda w: statistical_weight_quantize(w, bits=2), zeros)
        np.testing.assert_array_equal(w_q[:, 0], 0)
        assert np.all(np.isfinite(w_q))
        np.testing.assert_array_equal(vjp(w_q)[0], w_q)
        assert not confidence_guided_mask(zeros, bits=2, boundary=0.5)[:, 0].any()
        one = statistical_weight_quantize(jnp.array([[0.3]]), bits=2)
        assert round(float(one[0, 0]), 6) in (0.15, 0.45)  # between two levels
        assert statistical_weight_quantize(jnp.zeros((0, 3)), bits=2).shape == (0, 3)
        half = jnp.asarray(KERNEL, jnp.bfloat16)
        w_q = statistical_weight_quantize(half, bits=2)
        assert w_q.dtype == jnp.bfloat16
        wide = statistical_weight_quantize(half.astype(jnp.float32), bits=2)
        np.testing.assert_array_equal(w_q, wide.astype(jnp.bfloat16))

    def test_bad_input(self):
        for bits in (0, 9):
            with pytest.raises(ValueError, match="bits must be in"):
                statistical_weight_quantize(KERNEL, bits=bits)
        with pytest.raises(ValueError, match="axis must name axes"):
            statistical_weight_quantize(KERNEL[0], bits=2)
        with pytest.raises(ValueError, match="w must be finite"):
            statistical_weight_codes(KERNEL * np.inf, bits=2)
        with pytest.raises(TypeError, match="w must have a floating-point type"):
            statistical_weight_quantize(jnp.ones((2, 2), int), bits=2)


class TestOscillationTracker:
    def test_matches_the_authors(self):
        codes = jnp.asarray(AUTHORS["codes"], jnp.int8)
        step = lambda state, row: (oscillation_tracker_update(state, row, momentum=0.1), None)
        state = jax.jit(lambda rows: jax.lax.scan(step, oscillation_tracker_init(rows[0]), rows))
        frequency = state(codes)[0].frequency
        assert frequency.min() > 0.05
        np.testing.assert_allclose(frequency, AUTHORS["frequency"], rtol=1e-5)

    def test_bad_input(self):
        state = oscillation_tracker_init(jnp.zeros(3, int))
        with pytest.raises(ValueError, match="codes must have shape"):
            oscillation_tracker_update(state, jnp.zeros(2, int))
        with pytest.raises(ValueError, match="momentum must be in"):
            oscillation_tracker_update(state, jnp.zeros(3, int), momentum=1.5)
        with pytest.raises(TypeError, match="codes must be integers"):
            oscillation_tracker_init(jnp.zeros(3))

    def test_a_learned_step_makes_weights_oscillate_more_than_their_mean_does(self):
        """Weights of 2 bits learn a target between the levels with a small rate."""
        rng = np.random.default_rng(0)
        start, target = rng.normal(size=(2, 16, 64)).astype(np.float32)
        inputs = rng.normal(size=(300, 32, 64)).astype(np.float32)

        def mean_frequency(quantize, codes, params, target):
            def loss(params, x):
                return 0.5 * jnp.mean(jnp.square(x @ (quantize(params) - target)))

            def step(carry, x):
                params, state = carry
                gradients = jax.grad(loss)(params, x)
                params = jax.tree.map(lambda w, g: w - 1e-3 * g, params, gradients)
                return (params, oscillation_tracker_update(state, codes(params))), None

            carry = params, oscillation_tracker_init(codes(params))
            return jnp.mean(jax.lax.scan(step, carry, inputs)[0][1].frequency)

        def of_statistic(w, target):
            quantize = lambda w: statistical_weight_quantize(w, bits=2, axis=-1)
            codes = lambda w: statistical_weight_codes(w, bits=2, axis=-1)[0]
            return mean_frequency(quantize, codes, w, target)

        def of_learned_step(w, target):
            quantize = lambda p: learned_step_quantize(*p, bits=2)
            codes = lambda p: jnp.round(quantize(p) / p[1]).astype(jnp.int32)
            return mean_frequency(quantize, codes, (w, learned_step_init(w, bits=2)), target)

        both = jax.jit(
            jax.vmap(lambda w, t: jnp.stack([of_statistic(w, t), of_learned_step(w, t)]))
        )
        statistic, learned = both(start, target).mean(0)
        assert 0 < 1.5 * statistic < learned


class TestConfidenceGuidedAnnealing:
    @pytest.mark.parametrize("bits", [2, 4])
    def test_the_mask_matches_the_authors(self, bits):
        mask = confidence_guided_mask(KERNEL, bits=bits, boundary=0.05)
        assert 0 < mask.sum() < mask.size / 4
        np.testing.assert_array_equal(mask, ~AUTHORS[f"frozen_{bits}"].T)

    def test_half_a_step_frees_all_weights_inside_the_outermost_levels(self):
        steps = KERNEL / (2 * np.abs(KERNEL).mean(0)) * 2 - 0.5
        mask = confidence_guided_mask(KERNEL, bits=2, boundary=0.5)
        np.testing.assert_array_equal(mask, (steps >= -2) & (steps < 1))

    def test_confident_weights_keep_their_bits_under_momentum_and_decay(self):
        inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3, momentum=0.9))
        optimizer = confidence_guided_annealing(inner, bits=2, boundary=0.02)
        params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.ones(6)}

        def step(carry, key):
            params, state = carry
            gradients = jax.tree.map(lambda w: jax.random.normal(key, w.shape), params)
            updates, state = optimizer.update(gradients, state, params)
            following = optax.apply_updates(params, updates)
            w, new = params["kernel"], following["kernel"]
            free = confidence_guided_mask(w, bits=2, boundary=0.02)
            flips = (
                statistical_weight_codes(w, bits=2)[0] != statistical_weight_codes(new, bits=2)[0]
            )
            counts = jnp.sum(free), jnp.sum(flips), jnp.sum((new != w) & ~free)
            return (following, state), (*counts, jnp.sum((new != w) & free))

        run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
        keys = jax.random.split(jax.random.key(0), 30)
        (trained, state), counts = run((params, optimizer.init(params)), keys)
        free, flips, moved_though_held, moved = (np.asarray(count) for count in counts)
        assert np.all(moved_though_held == 0)
        assert np.all(flips <= free)
        assert flips.sum() > 0
        np.testing.assert_array_equal(moved, free)
        assert 0 < free[0] < KERNEL.size / 10
        assert np.all(trained["bias"] != 1)
        never = ~np.asarray(confidence_guided_mask(KERNEL, bits=2, boundary=0.1))
        np.testing.assert_array_equal(trained["kernel"][never], KERNEL[never])
        trace = optax.tree_utils.tree_get(state, "trace")["kernel"]
        assert np.all(np.isfinite(trace))

    def test_the_inner_optimizer_sees_no_gradient_of_held_weights(self):
        optimizer = confidence_guided_annealing(optax.trace(0.9), bits=2)
        params = {"w": jnp.array([[0.001], [-0.7], [0.9]])}
        _, state = optimizer.update({"w": jnp.ones((3, 1))}, optimizer.init(params), params)
        np.testing.assert_array_equal(state.trace["w"].ravel(), [1, 0, 0])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="boundary must be in"):
            confidence_guided_mask(KERNEL, bits=2, boundary=0.6)
        with pytest.raises(ValueError, match="bits must be in"):
            confidence_guided_annealing(optax.sgd(0.1), bits=9)
        optimizer = confidence_guided_annealing(optax.sgd(0.1), bits=2)
        params = {"w": KERNEL}
        with pytest.raises(ValueError, match="params must be passed"):
            optimizer.update(params, optimizer.init(params))
        with pytest.raises(ValueError, match="updates must have the tree structure"):
            optimizer.update({"v": KERNEL}, optimizer.init(params), params)


class TestLearnedStep(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(bits=(2, 4), signed=(True, False))
    def test_matches_the_authors(self, bits, signed):
        key = f"{bits}_{signed}"
        x = AUTHORS["x"] if signed else np.abs(AUTHORS["x"])
        step = learned_step_init(x, bits=bits, signed=signed, axis=(0, -1))
        np.testing.assert_allclose(step.ravel(), AUTHORS[f"step_{key}"], rtol=1e-6)
        quantize = self.variant(lambda x, s: learned_step_quantize(x, s, bits=bits, signed=signed))
        y, vjp = jax.vjp(quantize, x, step)
        dx, dstep = vjp(AUTHORS["cotangent"])
        np.testing.assert_allclose(y, AUTHORS[f"lsq_{key}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx, AUTHORS[f"lsq_dx_{key}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dstep.ravel(), AUTHORS[f"lsq_dstep_{key}"], rtol=1e-4, atol=1e-6)

    def test_edges(self):
        x = jnp.array([0.0, 1e4, -1e4, 0.25])
        for step in (0.0, -1.0, 0.5):
            y, vjp = jax.vjp(lambda x, s: learned_step_quantize(x, s, bits=2), x, step)
            for array in (y, *vjp(y)):
                assert np.all(np.isfinite(array))
        assert learned_step_init(jnp.zeros(3), bits=2) == 0
        assert learned_step_quantize(jnp.zeros((0, 2)), 0.5, bits=2).shape == (0, 2)
        assert learned_step_quantize(x.astype(jnp.bfloat16), 0.5, bits=2).dtype == jnp.bfloat16

    def test_bad_input(self):
        with pytest.raises(ValueError, match="bits must be in"):
            learned_step_quantize(jnp.ones(3), 0.5, bits=1)
        with pytest.raises(ValueError, match="step must broadcast"):
            learned_step_quantize(jnp.ones(3), jnp.ones(2), bits=2)
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            learned_step_init(jnp.ones(3, int), bits=2)
