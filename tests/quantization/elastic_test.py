import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.quantization import (
    ElasticConfig,
    QuantSpec,
    dequantize,
    elastic_quantize,
    elastic_quantizer_init,
    group_progressive_guidance_loss,
    quantize,
    weight_distribution_regularization,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "elastic.npz")
KERNEL = AUTHORS["w"].T  # [in, out]
PARAMS = elastic_quantizer_init(KERNEL, channel_axis=-1)


def quantize64(x, scale, offset, low, high):
    """The value, and by hand its gradients to x, the scale and the offset before their factor."""
    x, scale, offset = (np.asarray(array, np.float64) for array in (x, scale, offset))
    steps = (x - offset) / scale
    codes = np.round(np.clip(steps, low, high))
    inside = (steps >= low) & (steps <= high)
    return codes * scale + offset, inside, np.where(inside, codes - steps, codes), ~inside


class TestClaims:
    @pytest.mark.claim("eq-net")
    def test_training_towards_a_uniform_law_prepares_weights_for_few_bits(self):
        """The regularization is 0 of uniform and 0.0216 of normal weights, whatever their mean and
        spread; going down it, two bits lose less. An offset of 0 gives the symmetric format, and
        at first more bits always lose less."""
        rng = np.random.default_rng(0)
        normal = rng.normal(size=(64, 64)).astype(np.float32)
        uniform = rng.uniform(size=(64, 64)).astype(np.float32)
        loss = jax.jit(jax.value_and_grad(weight_distribution_regularization))
        assert loss(uniform)[0] < 1e-3
        np.testing.assert_allclose(loss(normal)[0], 0.0216, rtol=0.2)
        np.testing.assert_allclose(loss(3 * normal + 1)[0], loss(normal)[0], rtol=1e-3)

        trained = normal
        for _ in range(60):
            value, gradient = loss(trained)
            trained = trained - 0.02 * gradient / jnp.abs(gradient).mean()
        assert value < 0.1 * loss(normal)[0]

        def relative_error(w):
            rounded = dequantize(quantize(w, QuantSpec(bits=2, symmetric=False)))
            return jnp.mean(jnp.square(w - rounded)) / jnp.var(w)

        assert relative_error(trained) < 0.8 * relative_error(normal)

        params = elastic_quantizer_init(normal)
        errors = [
            float(jnp.mean(jnp.square(elastic_quantize(normal, params, ElasticConfig(b)) - normal)))
            for b in range(2, 9)
        ]
        assert errors == sorted(errors, reverse=True)
        same = params._replace(scale=params.scale[:1].repeat(2, 0), offset=0 * params.offset)
        for bits in (2, 8):
            pair = [elastic_quantize(normal, same, ElasticConfig(bits, False, s)) for s in (0, 1)]
            np.testing.assert_array_equal(*pair)


class TestElasticQuantizer(chex.TestCase):
    def test_first_ranges_match_the_authors(self):
        symmetric, asymmetric = AUTHORS["symmetric"], AUTHORS["asymmetric"]
        np.testing.assert_allclose(PARAMS.scale[0].ravel(), symmetric[:, 0], rtol=1e-5)
        np.testing.assert_allclose(PARAMS.scale[1].ravel(), asymmetric[:, 0], rtol=1e-5)
        np.testing.assert_allclose(PARAMS.offset.ravel(), asymmetric[:, 1], rtol=1e-4, atol=1e-5)
        channels = AUTHORS["channel_asymmetric"]
        np.testing.assert_allclose(PARAMS.channel_scale[1, :, 0], channels[:, 0], rtol=1e-5)
        np.testing.assert_allclose(
            PARAMS.channel_offset[:, 0], channels[:, 1], rtol=1e-4, atol=1e-5
        )
        unsigned = elastic_quantizer_init(np.abs(KERNEL), signed=False)
        np.testing.assert_allclose(unsigned.scale[0].ravel(), AUTHORS["unsigned"], rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_formula_in_every_format_of_one_program(self):
        quantize = self.variant(lambda x, p, c: elastic_quantize(x, p, c))
        cotangent = np.random.default_rng(1).normal(size=KERNEL.shape)
        for bits, per_channel, symmetric in ((2, 0, 0), (3, 1, 1), (4, 0, 1), (8, 1, 0)):
            config = ElasticConfig(jnp.array(bits), jnp.array(per_channel), jnp.array(symmetric))
            y, vjp = jax.vjp(lambda x, p, c=config: quantize(x, p, c), KERNEL, PARAMS)
            dx, dparams = vjp(jnp.asarray(cotangent, jnp.float32))
            scales = PARAMS.channel_scale if per_channel else PARAMS.scale
            offsets = PARAMS.channel_offset if per_channel else PARAMS.offset
            scale = scales[1 - symmetric, bits - 2]
            offset = 0 * scale if symmetric else offsets[bits - 2]
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            expected, to_x, to_scale, to_offset = quantize64(KERNEL, scale, offset, low, high)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(dx, cotangent * to_x, rtol=1e-5, atol=1e-6)
            axes = (0,) if per_channel else (0, 1)
            factor = 1 / np.sqrt(high * KERNEL.size / scale.size)
            wanted = factor * (cotangent * to_scale).sum(axes, keepdims=True)
            dscales = dparams.channel_scale if per_channel else dparams.scale
            np.testing.assert_allclose(
                dscales[1 - symmetric, bits - 2], wanted, rtol=1e-3, atol=1e-4
            )
            assert jnp.count_nonzero(dscales) == wanted.size
            doffsets = dparams.channel_offset if per_channel else dparams.offset
            wanted = factor * (cotangent * to_offset).sum(axes, keepdims=True) * (not symmetric)
            np.testing.assert_allclose(doffsets[bits - 2], wanted, rtol=1e-3, atol=1e-5)

    def test_activations_that_are_never_negative_have_codes_from_zero(self):
        x = np.abs(KERNEL)
        params = elastic_quantizer_init(x, signed=False)
        y = elastic_quantize(x, params, ElasticConfig(2), signed=False)
        np.testing.assert_allclose(
            np.unique(y), np.arange(4) * params.scale[0, 0, 0, 0], rtol=1e-6, atol=1e-7
        )
        np.testing.assert_allclose(params.offset, 0)

    def test_edges(self):
        run = jax.jit(lambda x, p, c: jax.vjp(lambda p: elastic_quantize(x, p, c), p))
        for x in (jnp.zeros((3, 2)), jnp.full((3, 2), 0.7)):
            params = elastic_quantizer_init(x, channel_axis=-1)
            for per_channel in (False, True):
                config = ElasticConfig(4, jnp.array(per_channel), symmetric=False)
                y, vjp = run(x, params, config)
                np.testing.assert_allclose(y, x, rtol=1e-6)
                assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(vjp(y)))
        one = jnp.array([[-2.0]])
        y = elastic_quantize(one, elastic_quantizer_init(one), ElasticConfig(2, symmetric=False))
        np.testing.assert_allclose(y, one, rtol=1e-6)
        half = jnp.asarray(KERNEL, jnp.bfloat16)
        assert elastic_quantize(half, PARAMS, ElasticConfig(4)).dtype == jnp.bfloat16

    def test_bad_input(self):
        for bits in (1, 9):
            with pytest.raises(ValueError, match="bits must be in"):
                elastic_quantize(KERNEL, PARAMS, ElasticConfig(bits))
        with pytest.raises(TypeError, match="bits must be an integer"):
            elastic_quantize(KERNEL, PARAMS, ElasticConfig(2.5))
        activations = elastic_quantizer_init(KERNEL)
        with pytest.raises(ValueError, match="per_channel must be False"):
            elastic_quantize(KERNEL, activations, ElasticConfig(4, per_channel=True))
        with pytest.raises(ValueError, match="channel_scale must broadcast"):
            elastic_quantize(KERNEL[:, :3], PARAMS, ElasticConfig(4))
        with pytest.raises(ValueError, match="x must be finite"):
            elastic_quantizer_init(KERNEL * np.nan)
        with pytest.raises(ValueError, match="x must have entries"):
            elastic_quantizer_init(jnp.zeros((0, 2)))
        with pytest.raises(ValueError, match="channel_axis must name axes"):
            elastic_quantizer_init(KERNEL, channel_axis=2)


class TestWeightDistributionRegularization(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_authors(self):
        """Whose deviation divides by n - 1."""
        ratio = KERNEL.size / (KERNEL.size - 1)
        kurtosis, skewness = AUTHORS["kurtosis"] * ratio**2, AUTHORS["skewness"] * ratio**1.5
        expected = 0.015 * (kurtosis - 1.8) ** 2 + skewness**2
        regularization = self.variant(weight_distribution_regularization)
        np.testing.assert_allclose(regularization(KERNEL), expected, rtol=1e-4)
        two = {"a": KERNEL, "b": jnp.ones((3, 3))}
        np.testing.assert_allclose(regularization(two), expected / 2, rtol=1e-4)

    def test_gradient(self):
        w = KERNEL[:6, :2]
        with jax.enable_x64(True):
            loss = weight_distribution_regularization
            chex.assert_numerical_grads(loss, (jnp.asarray(w, jnp.float64),), order=1, atol=1e-4)

    @parameterized.parameters(0.0, 0.1, -1e30, 1e30)
    def test_constant_tensors_have_none(self, value):
        constant = jnp.full((5, 3), value)
        loss, gradient = jax.value_and_grad(weight_distribution_regularization)([constant])
        assert loss == 0
        np.testing.assert_array_equal(gradient[0], 0)

    def test_other_edges(self):
        assert weight_distribution_regularization({}) == 0
        assert weight_distribution_regularization([jnp.zeros((0, 2))]) == 0
        far = jnp.asarray(KERNEL) * 1e30
        np.testing.assert_allclose(
            weight_distribution_regularization(far),
            weight_distribution_regularization(KERNEL),
            rtol=1e-4,
        )
        with pytest.raises(ValueError, match="kurtosis_weight must be in"):
            weight_distribution_regularization(KERNEL, kurtosis_weight=-1.0)
        with pytest.raises(TypeError, match="must have a floating-point type"):
            weight_distribution_regularization([jnp.ones(3, int)])


class TestGroupProgressiveGuidance(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_authors(self):
        loss = self.variant(
            lambda z: jnp.mean(group_progressive_guidance_loss(z, AUTHORS["labels"]))
        )
        value, gradient = jax.value_and_grad(loss)(AUTHORS["logits"])
        np.testing.assert_allclose(value, AUTHORS["loss"], rtol=1e-5)
        np.testing.assert_allclose(gradient, AUTHORS["dlogits"], rtol=1e-4, atol=1e-6)

    def test_temperature_and_alpha(self):
        z, labels = np.float64(AUTHORS["logits"]), AUTHORS["labels"]
        law = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        entropy = lambda z: -np.log(law(z)[np.arange(5), labels])
        expected = entropy(z[0])
        for before, after in itertools.pairwise(z):
            p, q = law(before / 3), law(after / 3)
            expected = expected + 0.7 * 9 * (p * np.log(p / q)).sum(-1) + 0.3 * entropy(after)
        ours = group_progressive_guidance_loss(
            AUTHORS["logits"], labels, alpha=0.7, temperature=3.0
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_edges(self):
        far = jnp.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]])
        value, gradient = jax.value_and_grad(group_progressive_guidance_loss)(far, jnp.array(0))
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
        assert np.isnan(group_progressive_guidance_loss(far, jnp.array(2)))
        half = group_progressive_guidance_loss(far.astype(jnp.bfloat16), jnp.array(0))
        assert half.dtype == jnp.bfloat16
        with pytest.raises(ValueError, match="logits must have shape"):
            group_progressive_guidance_loss(far[0], jnp.array(0))
        with pytest.raises(ValueError, match="alpha must be in"):
            group_progressive_guidance_loss(far, jnp.array(0), alpha=2.0)
        with pytest.raises(ValueError, match="temperature must be in"):
            group_progressive_guidance_loss(far, jnp.array(0), temperature=0.0)
