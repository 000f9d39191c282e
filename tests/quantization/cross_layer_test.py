import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.quantization import (
    QuantSpec,
    activation_entropy,
    discretization_entropy_dependency,
    partition_blocks,
    quantize_to_range,
    quantized_block,
    search_block_ranges,
    search_visual_ranges,
    visual_encoder_objective,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "q_vlm.npz")
TENSOR = QuantSpec(bits=4, symmetric=False)
CHANNEL = QuantSpec(bits=4, symmetric=False, granularity="channel", axis=-1)


def random(shape=(2, 6, 5), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestEntropy(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_formula(self):
        x = random()
        p = np.abs(x.astype(np.float64))
        p /= p.sum(1, keepdims=True)
        expected = -(p * np.log(p + 1e-7)).sum(1).mean()
        np.testing.assert_allclose(self.variant(activation_entropy)(x), expected, rtol=1e-5)
        swapped = activation_entropy(np.swapaxes(x, 0, 1), axis=0)
        np.testing.assert_allclose(swapped, expected, rtol=1e-5)

    def test_constant_one_hot_and_scaled_channels(self):
        signs = np.sign(random())
        np.testing.assert_allclose(activation_entropy(signs), np.log(6), rtol=1e-5)
        one_hot = np.zeros((2, 6, 5), np.float32)
        one_hot[:, 2] = -3.0
        np.testing.assert_allclose(activation_entropy(one_hot), 0.0, atol=1e-6)
        np.testing.assert_allclose(activation_entropy(one_hot, eps=0.0), 0.0, atol=1e-6)
        scaled = random() * 10.0 ** np.arange(-2, 3, dtype=np.float32)
        np.testing.assert_allclose(
            activation_entropy(scaled), activation_entropy(random()), rtol=1e-5
        )
        np.testing.assert_allclose(activation_entropy(jnp.zeros((3, 4))), np.log(3), rtol=1e-5)
        assert jnp.isnan(activation_entropy(jnp.array([[jnp.nan], [1.0]])))
        huge = jnp.asarray(random() * 1e37)
        np.testing.assert_allclose(
            activation_entropy(huge), activation_entropy(random()), rtol=1e-4
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_dependency_is_the_authors(self):
        dependency = self.variant(discretization_entropy_dependency)
        value = dependency(AUTHORS["x"], AUTHORS["next"])
        np.testing.assert_allclose(value, AUTHORS["dependency"], rtol=1e-5)
        mixed = jax.vmap(discretization_entropy_dependency)(AUTHORS["x"], AUTHORS["next"])
        np.testing.assert_allclose(mixed.mean(), AUTHORS["dependency"], rtol=1e-5)

    def test_dependency_without_pairs_is_the_entropy(self):
        x, wide = random(), random((2, 6, 7), 1)
        np.testing.assert_array_equal(
            discretization_entropy_dependency(x, wide), activation_entropy(wide)
        )
        zero = jnp.zeros((2, 6, 5))
        np.testing.assert_allclose(
            discretization_entropy_dependency(zero, zero), np.log(6), rtol=1e-3
        )
        for a, b in ((x, zero), (zero, x)):
            assert jnp.isfinite(discretization_entropy_dependency(a, b))
        disjoint = jnp.eye(2)
        assert jnp.isfinite(discretization_entropy_dependency(disjoint, 1 - disjoint))
        gradient = jax.grad(lambda x: discretization_entropy_dependency(x, x))(zero)
        assert jnp.isfinite(gradient).all()
        assert jnp.isfinite(jax.grad(lambda x: activation_entropy(x, eps=0.0))(zero)).all()

    def test_bad_input(self):
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            activation_entropy(jnp.ones((2, 2), int))
        with pytest.raises(ValueError, match="eps must be in"):
            activation_entropy(random(), eps=-1.0)
        with pytest.raises(ValueError, match="axis must name axes"):
            activation_entropy(random(), axis=3)
        with pytest.raises(ValueError, match="x must have tokens and channels"):
            activation_entropy(jnp.ones((0, 3)))
        with pytest.raises(ValueError, match="eps must be in"):
            discretization_entropy_dependency(random(), random(), eps=0.0)


class TestPartitionBlocks:
    def test_every_layer_once_in_order(self):
        rng = np.random.default_rng(0)
        for length, most in itertools.product((0, 1, 5, 11), (1, 2, 3)):
            blocks = partition_blocks(rng.normal(size=length), max_block=most)
            assert [layer for block in blocks for layer in block] == list(range(length + 1))
            assert all(1 <= len(block) <= most for block in blocks)

    def test_thresholds(self):
        dependencies = [0.5, 0.1, 0.9, 0.9, 0.9]
        assert partition_blocks(dependencies, threshold=-np.inf) == [(0, 1, 2), (3, 4, 5)]
        assert partition_blocks(dependencies, threshold=np.inf) == [(n,) for n in range(6)]
        assert partition_blocks(dependencies, threshold=0.5) == [(0, 1), (2, 3, 4), (5,)]
        # Means so far: 0.5, 0.3, 0.5, 0.6, 0.66.
        assert partition_blocks(dependencies) == [(0, 1), (2, 3, 4), (5,)]
        assert partition_blocks([0.3, 0.2, 0.28]) == [(0, 1), (2, 3)]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="dependencies must be a vector of finite numbers"):
            partition_blocks([np.nan])
        with pytest.raises(ValueError, match="max_block must be in"):
            partition_blocks([1.0], max_block=0)
        with pytest.raises(ValueError, match="threshold must be a number"):
            partition_blocks([1.0], threshold=np.nan)


class TestQuantizeToRange(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_is_the_authors(self):
        quantized = self.variant(lambda x, low, high: quantize_to_range(x, low, high, bits=4))(
            AUTHORS["x"], AUTHORS["low"], AUTHORS["high"]
        )
        np.testing.assert_allclose(quantized, AUTHORS["quantized"], rtol=1e-5, atol=1e-6)

    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_edges(self, dtype):
        x = jnp.array([-2.0, 0.0, 3.0], dtype)
        for value in (0.0, 0.7, -1e30):
            constant = quantize_to_range(x, value, value, bits=4)
            assert constant.dtype == dtype
            np.testing.assert_allclose(constant.astype(float), value, rtol=1e-2)
        assert quantize_to_range(x, -1.0, 2.0, bits=8)[1] == 0
        extreme = quantize_to_range(jnp.array([3e38, -3e38]), -3e38, 3e38, bits=4)
        assert jnp.isfinite(extreme).all()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="low must be at most high"):
            quantize_to_range(random(), 1.0, 0.0, bits=4)
        with pytest.raises(ValueError, match="bits must be in"):
            quantize_to_range(random(), 0.0, 1.0, bits=9)
        with pytest.raises(ValueError, match="low must broadcast"):
            quantize_to_range(random(), jnp.zeros(4), 1.0, bits=4)


def relu_layers(count, seed, width=6):
    """Layers whose inputs have a few outliers."""
    rng = np.random.default_rng(seed)
    kernels = [rng.normal(size=(width, width)).astype(np.float32) for _ in range(count)]
    layers = [lambda x, k=k: jnp.maximum(x @ k, 0.0) for k in kernels]
    return layers, jnp.asarray(rng.standard_t(3, size=(2, 12, width)), jnp.float32)


class TestSearchBlockRanges:
    @pytest.mark.parametrize("spec", [TENSOR, CHANNEL])
    def test_is_the_best_of_all_combinations(self, spec):
        layers, x = relu_layers(2, 0)
        shrink, norm = (1.0, 0.7, 0.4), 1.5
        found = search_block_ranges(layers, x, spec, shrink=shrink, norm=norm)
        assert found.evaluations == 9
        axes = (0, 1, 2) if spec is TENSOR else (0, 1)
        hidden = layers[0](x)
        ends = [
            [np.asarray(f(a, axis=axes, keepdims=True)) for a in (x, hidden)]
            for f in (np.min, np.max)
        ]
        target, best = layers[1](hidden), (np.inf, None)
        for factors in itertools.product(shrink, repeat=2):
            low, high = ([f * end for f, end in zip(factors, side)] for side in ends)
            difference = quantized_block(layers, x, low, high, bits=4) - target
            error = (np.abs(np.asarray(difference, np.float64)) ** norm).sum() ** (1 / norm)
            best = min(best, (error, factors))
        np.testing.assert_allclose(found.factors, best[1], rtol=1e-6)
        np.testing.assert_allclose(found.objective, best[0], rtol=1e-4)
        for ours, end, factor in zip(found.high, ends[1], best[1]):
            np.testing.assert_allclose(ours, factor * end, rtol=1e-6)

    @pytest.mark.claim("q-vlm")
    def test_joint_search_is_never_worse_than_layer_by_layer(self):
        better = 0
        for seed in range(4):
            layers, x = relu_layers(2, seed)
            joint = search_block_ranges(layers, x, TENSOR)
            first = search_block_ranges(layers[:1], x, TENSOR)
            second = search_block_ranges(layers[1:], layers[0](x), TENSOR)
            low, high = first.low + second.low, first.high + second.high
            target = layers[1](layers[0](x))
            alone = jnp.linalg.norm(quantized_block(layers, x, low, high, bits=4) - target)
            together = jnp.linalg.norm(
                quantized_block(layers, x, joint.low, joint.high, bits=4) - target
            )
            np.testing.assert_allclose(together, joint.objective, rtol=1e-4)
            assert together <= alone * (1 + 1e-5)
            better += bool(together < 0.99 * alone)
        assert better >= 2

    def test_longer_blocks_go_layer_by_layer_until_nothing_changes(self):
        layers, x = relu_layers(4, 1)
        found = search_block_ranges(layers, x, TENSOR, shrink=(1.0, 0.7, 0.5))
        ones = search_block_ranges(layers, x, TENSOR, shrink=(1.0,))
        assert found.evaluations in (12 * 2, 12 * 3)
        assert ones.evaluations == 4
        assert found.objective < ones.objective
        np.testing.assert_array_equal(ones.factors, 1.0)

    def test_quantized_weights_count_too(self):
        layers, x = relu_layers(2, 2)
        wrong = [lambda x: layers[0](x) * 1.5, layers[1]]
        found = search_block_ranges(layers, x, TENSOR, quantized_layers=wrong, shrink=(1.0, 0.6))
        plain = search_block_ranges(layers, x, TENSOR, shrink=(1.0, 0.6))
        assert found.objective > 1.5 * plain.objective

    def test_constant_inputs(self):
        found = search_block_ranges([lambda x: 2 * x], jnp.full((3, 2), 0.7), CHANNEL)
        assert found.objective == 0
        assert found.factors == 1.0

    def test_bad_input(self):
        layers, x = relu_layers(1, 0)
        with pytest.raises(ValueError, match="spec must be asymmetric"):
            search_block_ranges(layers, x, QuantSpec())
        with pytest.raises(ValueError, match="layers must hold at least one"):
            search_block_ranges([], x, TENSOR)
        with pytest.raises(ValueError, match="inputs must be finite"):
            search_block_ranges(layers, x * jnp.nan, TENSOR)
        with pytest.raises(ValueError, match="shrink must be in"):
            search_block_ranges(layers, x, TENSOR, shrink=(1.0, 0.0))
        with pytest.raises(ValueError, match="shrink must hold at least one factor"):
            search_block_ranges(layers, x, TENSOR, shrink=())
        with pytest.raises(ValueError, match="norm must be in"):
            search_block_ranges(layers, x, TENSOR, norm=0.0)
        with pytest.raises(ValueError, match="low and high must have a range for each of 1 layers"):
            quantized_block(layers, x, [0.0, 1.0], [1.0], bits=4)


class TestVisualEncoder:
    def test_objective_matches_the_formula_and_its_gradient_is_finite(self):
        x, x_q, entropies = random(), random(seed=1), np.array([1.0, 2.5], np.float32)
        objective = lambda x_q, entropies: visual_encoder_objective(
            x, x_q, entropies, entropy_weight=0.1, power=0.7
        )
        expected = np.mean(np.abs(x_q.astype(np.float64) - x) ** 0.7) + 0.1 * 1.75
        np.testing.assert_allclose(objective(x_q, entropies), expected, rtol=1e-5)
        gradients = jax.grad(objective, argnums=(0, 1))(x_q, entropies)
        error = (x_q - x).astype(np.float64)
        slope = 0.7 * np.abs(error) ** -0.3 * np.sign(error) / error.size
        np.testing.assert_allclose(gradients[0], slope, rtol=1e-4)
        np.testing.assert_allclose(gradients[1], [0.05, 0.05], rtol=1e-6)
        np.testing.assert_array_equal(jax.grad(objective)(jnp.asarray(x), entropies), 0.0)
        with pytest.raises(ValueError, match="x_q must have shape"):
            visual_encoder_objective(x, x_q[0], entropies)
        with pytest.raises(ValueError, match="power must be in"):
            visual_encoder_objective(x, x_q, entropies, power=0.0)
        with pytest.raises(ValueError, match="entropies must have entries"):
            visual_encoder_objective(x, x_q, entropies[:0])

    def test_the_weight_of_the_entropy_moves_the_range(self):
        x = jnp.asarray(random((2, 8, 6)))
        spec = QuantSpec(bits=4, symmetric=False, granularity="channel", axis=-2)
        shrink = (1.0, 0.8, 0.6, 0.4)
        search = lambda entropies, weight: search_visual_ranges(
            entropies, x, spec, shrink=shrink, entropy_weight=weight
        )
        spread = lambda x_q: activation_entropy(x_q)[None]
        light, heavy = search(spread, 0.0), search(lambda x_q: -spread(x_q), 1e3)
        assert light.low[0].shape == (1, 8, 1)
        values = []
        for factor in shrink:
            low, high = (factor * f(x, axis=(0, 2), keepdims=True) for f in (jnp.min, jnp.max))
            x_q = quantize_to_range(x, low, high, bits=4)
            values.append((jnp.mean(jnp.sqrt(jnp.abs(x_q - x))), activation_entropy(x_q)))
        np.testing.assert_allclose(light.factors[0], shrink[int(np.argmin([v[0] for v in values]))])
        np.testing.assert_allclose(heavy.factors[0], shrink[int(np.argmax([v[1] for v in values]))])
        assert light.factors != heavy.factors
        assert light.evaluations == 4
