from fractions import Fraction
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import norms
from jaxref.analysis import (
    hidden_state_statistics,
    layer_gradient_norms,
    pre_ln_variance_growth,
)

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "norm_placement.npz")
DEPTH, WIDTH = 64, 256


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def variances(weights, block):
    """Of the stream before and after each of the linear sublayers, at unit normal input."""

    def run(x, weights):
        def step(x, numbered):
            x = block(x, *numbered)
            return x, x

        _, outputs = jax.lax.scan(step, x, (weights, jnp.arange(1, len(weights) + 1)))
        return hidden_state_statistics([x, *outputs]).variance

    return np.asarray(jax.jit(run)(random((64, weights.shape[1]), 9), weights))


def block_of_two(x, kernels, scales, biases, placement):
    """The oracle's block: two linear sublayers, each with its own norms."""
    if placement == "peri":
        inner = [partial(norms.rms_norm, scale=scales[i]) for i in (0, 2)]
        outer = [partial(norms.rms_norm, scale=scales[i]) for i in (1, 3)]
    else:
        layer = partial(norms.layer_norm, epsilon=1e-5)
        inner = [partial(layer, scale=scales[i], bias=biases[i]) for i in (0, 1)]
        outer = [None, None]
    for kernel, norm, output_norm in zip(kernels, inner, outer):
        x = norms.residual_block(x, lambda y: y @ kernel, norm, placement, output_norm=output_norm)
    return x


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("pre", "post", "peri")
    def test_placements_match_torch_and_gemma(self, placement):
        kernels = jnp.stack([ORACLE["first"], ORACLE["second"]])

        @self.variant
        def run(x, kernels):
            block = lambda x, kernels: block_of_two(
                x, kernels, ORACLE["scales"], ORACLE["biases"], placement
            )
            y, vjp = jax.vjp(block, x, kernels)
            return y, *vjp(ORACLE["cotangent"])

        y, grad_x, grad_kernels = run(ORACLE["x"], kernels)
        np.testing.assert_allclose(y, ORACLE[placement], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grad_x, ORACLE[f"{placement}_grad_x"], rtol=1e-4, atol=1e-4)
        expected = ORACLE[f"{placement}_grad_second"]
        np.testing.assert_allclose(grad_kernels[1], expected, rtol=1e-4, atol=1e-4)

    @chex.variants(with_jit=True, without_jit=True)
    def test_layer_norm_scaling_is_the_norm_over_the_root_of_the_depth(self):
        x, scale, bias = random((3, 6)), random(6, 1), random(6, 2)
        for index in (1, 2, 9):
            ours = self.variant(norms.layer_norm_scaling)(x, index, scale)
            expected = scale * x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-6)
            np.testing.assert_allclose(ours, expected / index**0.5, rtol=1e-5)
            ours = norms.layer_norm_scaling(x, index, scale, bias, norm="layer", epsilon=0.1)
            expected = norms.layer_norm(x, scale, bias, epsilon=0.1)
            np.testing.assert_allclose(ours, expected / index**0.5, rtol=1e-5)

    def test_deep_norm_block_is_deep_norm_residual(self):
        x, kernel = random((3, 6)), random((6, 6), 1)
        ours = norms.residual_block(
            x, lambda y: y @ kernel, norms.layer_norm, "deep_norm", alpha=norms.deep_norm_alpha(5)
        )
        expected = norms.deep_norm_residual(x, x @ kernel, num_layers=5)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_peri_and_sandwich_are_the_same_block(self):
        x = random((3, 6))
        peri, sandwich = (
            norms.residual_block(x, jnp.sin, norms.rms_norm, name, output_norm=norms.layer_norm)
            for name in ("peri", "sandwich")
        )
        np.testing.assert_array_equal(peri, sandwich)


class TestClaims:
    @pytest.mark.claim("layernorm-scaling")
    def test_variance_grows_with_the_logarithm_of_depth_not_with_depth(self):
        weights = random((DEPTH, WIDTH, WIDTH)) / WIDTH**0.5

        def block(x, weight, index, norm):
            return norms.residual_block(x, lambda y: y @ weight, lambda y: norm(y, index), "pre")

        measured = {
            scaling: variances(weights, partial(block, norm=norm))
            for scaling, norm in (
                (False, lambda y, index: norms.rms_norm(y)),
                (True, norms.layer_norm_scaling),
            )
        }
        for scaling, variance in measured.items():
            expected = pre_ln_variance_growth(DEPTH, 1.0, scaling=scaling)
            np.testing.assert_allclose(variance, expected, rtol=0.1)
        np.testing.assert_allclose(measured[False][-1], 65, rtol=0.1)
        np.testing.assert_allclose(measured[True][-1], 5.74, rtol=0.1)
        index = np.arange(1, DEPTH + 1)[:, None, None]
        smaller = variances(
            weights / index**0.5, partial(block, norm=lambda y, _: norms.rms_norm(y))
        )
        np.testing.assert_allclose(measured[True], smaller, rtol=1e-4)

    @pytest.mark.claim("peri-ln")
    def test_stream_and_gradient_do_not_depend_on_the_size_of_the_weights(self):
        """Variance 1 + L for weights of any size, where pre-norm gives 1 + c² L; and a gradient
        orthogonal to the last weights, which falls as they grow."""
        weights = random((DEPTH, WIDTH, WIDTH)) / WIDTH**0.5
        exact = partial(norms.rms_norm, epsilon=0.0)

        def block(x, weight, _, placement):
            output_norm = exact if placement == "peri" else None
            return norms.residual_block(
                x, lambda y: y @ weight, exact, placement, output_norm=output_norm
            )

        peri, scaled = (
            variances(size * weights, partial(block, placement="peri")) for size in (1.0, 30.0)
        )
        np.testing.assert_allclose(scaled, peri, rtol=1e-3)
        np.testing.assert_allclose(peri, 1 + np.arange(DEPTH + 1), rtol=0.1)
        pre = variances(2 * weights, partial(block, placement="pre"))
        np.testing.assert_allclose(pre, 1 + 4 * np.arange(DEPTH + 1), rtol=0.1)

        x, cotangent = random((64, WIDTH), 1), random((64, WIDTH), 2)
        loss = lambda w, placement: jnp.sum(cotangent * block(x, w, None, placement))
        gradient = jax.grad(loss)(weights[0], "peri")
        size = jnp.linalg.norm(gradient) * jnp.linalg.norm(weights[0])
        assert abs(jnp.vdot(gradient, weights[0])) < 1e-4 * size
        smaller = jax.grad(loss)(10 * weights[0], "peri")
        np.testing.assert_allclose(10 * smaller, gradient, rtol=1e-3, atol=1e-4)
        pre = jax.grad(loss)(weights[0], "pre")
        assert abs(jnp.vdot(pre, weights[0])) > 1e-3 * jnp.linalg.norm(pre)

    @pytest.mark.claim("mix-ln")
    def test_growth_starts_behind_the_post_norm_blocks_and_deep_blocks_gain_gradient(self):
        blocks, width = 12, 64
        assert norms.norm_placement(blocks, post_fraction=0.25) == ("post",) * 3 + ("pre",) * 9
        x, target = random((128, width), 1), random((128, width), 2)
        weights = {
            "up": random((blocks, width, 2 * width), 3) / width**0.5,
            "down": random((blocks, 2 * width, width), 4) / width**0.5,
        }

        def stream(weights, placements):
            states = [x]
            for i, placement in enumerate(placements):
                mlp = lambda y: jax.nn.relu(y @ weights["up"][i]) @ weights["down"][i]
                states.append(norms.residual_block(states[-1], mlp, norms.rms_norm, placement))
            return states

        def gradients(placements):
            loss = lambda w: jnp.sum(target * norms.rms_norm(stream(w, placements)[-1]))
            return layer_gradient_norms(jax.jit(jax.grad(loss))(weights), layer_axis=0)

        placements = {
            name: norms.norm_placement(blocks, "mix", fraction)
            for name, fraction in (("pre", 0), ("mix", 0.25), ("post", 1))
        }
        assert placements["pre"] == norms.norm_placement(blocks, "pre")
        assert placements["post"] == norms.norm_placement(blocks, "post")
        growth = hidden_state_statistics(stream(weights, placements["pre"])).variance
        mixed = stream(weights, placements["mix"])
        for state in mixed[1:4]:
            np.testing.assert_allclose(jnp.mean(state**2, -1), 1, rtol=1e-4)
        variance = hidden_state_statistics(mixed).variance
        np.testing.assert_allclose(variance[3:], growth[:-3], rtol=0.3)
        assert variance[-1] < 0.85 * growth[-1]
        pre, mix, post = (gradients(placements[name]) for name in ("pre", "mix", "post"))
        assert np.all(mix[6:] > 1.05 * pre[6:])
        assert post[-1] / post[0] > 1.5 * max(pre[-1] / pre[0], mix[-1] / mix[0])


class TestNormPlacement:
    @pytest.mark.parametrize("scheme", ["pre", "post", "peri", "sandwich", "deep_norm"])
    def test_uniform_schemes(self, scheme):
        assert norms.norm_placement(3, scheme) == (scheme,) * 3

    @pytest.mark.parametrize(
        ("blocks", "fraction", "post"),
        [
            (12, 0.25, 3),
            (10, 0.3, 3),  # 0.3 is less than 3/10 in binary
            (100, 0.29, 29),
            (12, 1 / 3, 4),
            (7, 0.5, 3),
            (7, Fraction(6, 7), 6),
            (5, 0, 0),
            (5, 1, 5),
        ],
    )
    def test_mix_rounds_down_exactly(self, blocks, fraction, post):
        placements = norms.norm_placement(blocks, "mix", fraction)
        assert placements == ("post",) * post + ("pre",) * (blocks - post)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="num_layers must be in"):
            norms.norm_placement(0)
        with pytest.raises(ValueError, match="scheme must be one of pre, post"):
            norms.norm_placement(2, "past")
        with pytest.raises(ValueError, match=r"post_fraction must be in \[0, 1\]"):
            norms.norm_placement(2, post_fraction=1.5)


class TestLayerNormScaling:
    def test_index_may_be_traced_and_scanned(self):
        x = random((3, 6))
        index = jnp.arange(1, 5)
        scanned = jax.lax.map(lambda i: norms.layer_norm_scaling(x, i), index)
        mapped = jax.vmap(norms.layer_norm_scaling, in_axes=(None, 0))(x, index)
        expected = norms.rms_norm(x) * norms.layer_norm_scaling_factor(index)[:, None, None]
        np.testing.assert_allclose(scanned, expected, rtol=1e-6)
        np.testing.assert_allclose(mapped, expected, rtol=1e-6)

    def test_axis_and_half_precision(self):
        x = random((3, 6))
        ours = norms.layer_norm_scaling(x.T, 4, axis=0)
        np.testing.assert_allclose(ours.T, norms.rms_norm(x) / 2, rtol=1e-5)
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(x, dtype)
            ours = norms.layer_norm_scaling(half, 3)
            assert ours.dtype == dtype
            expected = norms.layer_norm_scaling(half.astype(jnp.float32), 3).astype(dtype)
            np.testing.assert_array_equal(ours, expected)

    def test_bad_input_is_named(self):
        x = random((3, 6))
        with pytest.raises(ValueError, match="layer_index must be in"):
            norms.layer_norm_scaling(x, 0)
        with pytest.raises(TypeError, match="layer_index must have an integer type"):
            norms.layer_norm_scaling(x, 1.5)
        with pytest.raises(ValueError, match=r"layer_index must have shape \(\)"):
            norms.layer_norm_scaling(x, np.arange(1, 3))
        with pytest.raises(ValueError, match="norm must be 'rms' or 'layer'"):
            norms.layer_norm_scaling(x, 1, norm="batch")
        with pytest.raises(ValueError, match="bias must be None"):
            norms.layer_norm_scaling(x, 1, bias=x[0])
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            norms.layer_norm_scaling(x.astype(int), 1)


class TestResidualBlock:
    def test_zero_sublayer_output_stays_finite(self):
        x = random((3, 6))
        zero = lambda y: 0 * y
        peri = partial(norms.residual_block, placement="peri", output_norm=norms.rms_norm)
        y, vjp = jax.vjp(lambda x: peri(x, zero, norms.rms_norm), x)
        np.testing.assert_array_equal(y, x)
        assert np.all(np.isfinite(vjp(x)[0]))

    @pytest.mark.parametrize("placement", ["pre", "post", "peri", "deep_norm"])
    def test_sharded_batch_and_half_precision(self, placement):
        x, kernel = random((16, 6)), random((6, 6), 1)
        options = {
            "peri": {"output_norm": norms.rms_norm},
            "deep_norm": {"alpha": 2.0},
        }.get(placement, {})
        block = jax.jit(
            lambda x: norms.residual_block(
                x, lambda y: y @ kernel.astype(x.dtype), norms.rms_norm, placement, **options
            )
        )
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = block(jax.device_put(x, sharding))
        assert ours.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(ours, block(x), rtol=1e-5, atol=1e-6)
        assert block(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        block, x, norm = norms.residual_block, random((3, 6)), norms.rms_norm
        with pytest.raises(ValueError, match="placement must be one of pre, post"):
            block(x, jnp.sin, norm, "mix")
        with pytest.raises(ValueError, match="output_norm must be given for 'peri'"):
            block(x, jnp.sin, norm, "peri")
        with pytest.raises(ValueError, match="output_norm must not be given for 'pre'"):
            block(x, jnp.sin, norm, "pre", output_norm=norm)
        with pytest.raises(ValueError, match="alpha must be given for 'deep_norm'"):
            block(x, jnp.sin, norm, "deep_norm")
        with pytest.raises(ValueError, match="alpha must not be given for 'post'"):
            block(x, jnp.sin, norm, "post", alpha=2.0)
        with pytest.raises(ValueError, match="alpha must be in"):
            block(x, jnp.sin, norm, "deep_norm", alpha=0.0)
        with pytest.raises(ValueError, match=r"the result of sublayer must have shape \(3, 6\)"):
            block(x, lambda y: y[:, :1], norm, "pre")
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            block(x.astype(int), jnp.sin, norm, "pre")
