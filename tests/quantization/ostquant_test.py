import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from jaxref.quantization import (
    QuantSpec,
    TransformSite,
    apply_equivalent_transforms,
    equivalent_transforms_init,
    fake_quantize,
    kl_top_loss,
    ostquant,
    quantization_space_utilization_rate,
    range_fake_quantize,
    transformer_sites,
)
from tests.quantization.equivalent_transforms_test import SIZES, TOKENS, model


def random_logits(shape=(3, 7), seed=0, size=2.0):
    return (size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def log_softmax64(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class TestKLTop(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(7, 1000)
    def test_all_classes_are_the_kl_divergence(self, k):
        student, teacher = random_logits(), random_logits(seed=1)
        ours = self.variant(lambda x: jax.vjp(lambda x: kl_top_loss(x, teacher, k=k), x)[0])
        theirs = lambda x: optax.losses.kl_divergence(
            jax.nn.log_softmax(x), jax.nn.softmax(teacher)
        )
        np.testing.assert_allclose(ours(student), theirs(student), rtol=1e-5)
        gradients = (
            jax.grad(lambda x: f(x).sum())(student)
            for f in (lambda x: kl_top_loss(x, teacher, k=k), theirs)
        )
        np.testing.assert_allclose(*gradients, atol=1e-6)
        np.testing.assert_allclose(kl_top_loss(teacher + 3.0, teacher, k=k), 0.0, atol=1e-6)
        np.testing.assert_allclose(
            kl_top_loss(student.T, teacher.T, k=k, axis=0), theirs(student), rtol=1e-5
        )

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(False, True)
    def test_fewer_classes_match_the_formula(self, renormalize):
        student, teacher = random_logits(), random_logits(seed=1)
        p, q, expected = log_softmax64(teacher), log_softmax64(student), []
        for row in range(3):
            top = np.argsort(-teacher[row])[:2]
            log_p, log_q = p[row, top], q[row, top]
            if renormalize:
                log_p, log_q = log_softmax64(teacher[row, top]), log_softmax64(student[row, top])
            expected.append(np.sum(np.exp(log_p) * (log_p - log_q)))
        loss = self.variant(lambda x: kl_top_loss(x, teacher, k=2, renormalize=renormalize))
        np.testing.assert_allclose(loss(student), expected, rtol=1e-5)
        if renormalize:
            assert np.all(np.asarray(loss(student)) >= 0)
            outside = np.argsort(-teacher[0])[2:]
            gradient = jax.grad(lambda x: loss(x)[0])(student)
            np.testing.assert_array_equal(gradient[0, outside], 0.0)

    def test_teacher_gets_no_gradient(self):
        student, teacher = random_logits(), random_logits(seed=1)
        gradient = jax.grad(lambda t: kl_top_loss(student, t, k=2).sum())(teacher)
        np.testing.assert_array_equal(gradient, 0.0)

    def test_where_leaves_classes_out(self):
        student, teacher = random_logits(), random_logits(seed=1)
        where = np.array([1, 0, 1, 1, 0, 1, 1], bool)
        few = kl_top_loss(student[:, where], teacher[:, where], k=7)
        value, vjp = jax.vjp(lambda x: kl_top_loss(x, teacher, k=7, where=where), student)
        np.testing.assert_allclose(value, few, rtol=1e-5)
        gradient = vjp(jnp.ones(3))[0]
        np.testing.assert_array_equal(gradient[:, ~where], 0.0)
        nothing = kl_top_loss(student, teacher, where=jnp.zeros((3, 1), bool))
        np.testing.assert_array_equal(nothing, 0.0)

    @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
    def test_extreme_logits_stay_finite(self, dtype):
        student = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4]], dtype)
        value, vjp = jax.vjp(lambda x: kl_top_loss(x, student[::-1], k=2), student)
        assert value.dtype == dtype
        assert np.isfinite(np.asarray(value, float)).all()
        assert np.isfinite(np.asarray(vjp(jnp.ones(3, dtype))[0], float)).all()
        np.testing.assert_array_equal(kl_top_loss(student[:, :1], student[:, :1]), 0.0)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="target_logits must have shape"):
            kl_top_loss(jnp.ones(3), jnp.ones(4))
        with pytest.raises(ValueError, match="k must be in"):
            kl_top_loss(jnp.ones(3), jnp.ones(3), k=0)
        with pytest.raises(ValueError, match="logits must have at least one class"):
            kl_top_loss(jnp.ones((3, 0)), jnp.ones((3, 0)))
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            kl_top_loss(jnp.ones(3, int), jnp.ones(3))
        with pytest.raises(ValueError, match="where must broadcast"):
            kl_top_loss(jnp.ones(3), jnp.ones(3), where=jnp.ones(4, bool))


class TestRangeFakeQuantize(chex.TestCase):
    @parameterized.parameters(
        QuantSpec(bits=4),
        QuantSpec(bits=3, symmetric=False),
        QuantSpec(bits=4, granularity="channel", axis=0),
        QuantSpec(bits=4, granularity="block", axis=1, block_size=3, symmetric=False),
    )
    def test_values_and_the_gradient_of_frozen_rounding(self, spec):
        x, weights = random_logits(), random_logits(seed=1)
        y = range_fake_quantize(x, spec)
        np.testing.assert_allclose(y, fake_quantize(x, spec), rtol=1e-5, atol=1e-6)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(weights * range_fake_quantize(x, spec))))(x)
        x64, expected = x.astype(np.float64), np.zeros(x.shape)
        largest = 2 ** (spec.bits - 1) - 1

        def scales(x):  # of every entry, by loops
            result = np.zeros(x.shape)
            for row in range(3):
                for column in range(7):
                    group = {"tensor": x, "channel": x[row : row + 1]}.get(spec.granularity)
                    if group is None:
                        start = column // 3 * 3
                        group = x[row, start : start + 3]
                    span = max(group.max(), 0) - min(group.min(), 0)
                    span = np.abs(group).max() / largest if spec.symmetric else span
                    result[row, column] = span if spec.symmetric else span / (2**spec.bits - 1)
            return result

        error = (np.asarray(y, np.float64) - x64) / scales(x64)
        for index in np.ndindex(x.shape):
            step = np.zeros(x.shape)
            step[index] = 1e-6
            difference = (scales(x64 + step) - scales(x64 - step)) * error + 2 * step
            expected[index] = np.sum(weights * difference) / 2e-6
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


class TestOSTQuant:
    def test_trains_a_transformers_transforms_only(self):
        apply_fn, params = model(num_layers=1)
        sites = transformer_sites(1, **SIZES)
        spec = QuantSpec(bits=3, granularity="channel", axis=1)
        result = ostquant(
            apply_fn, params, TOKENS, sites, spec, steps=100, k=10, rotation_learning_rate=0.1
        )
        assert result.losses.shape == (100,)
        assert result.losses[-6:].mean() < 0.85 * result.losses[:6].mean()
        expected = apply_fn(params, TOKENS[1])
        np.testing.assert_allclose(apply_fn(result.params, TOKENS[1]), expected, atol=2e-4)
        for name, (rotation, log_scale) in result.transforms.items():
            assert (rotation is not None) == (sites[name].rotation is not None)
            if rotation is not None:
                identity = np.broadcast_to(np.eye(rotation.shape[-1]), rotation.shape)
                np.testing.assert_allclose(rotation @ rotation.mT, identity, atol=1e-5)
            if log_scale is not None:
                assert np.abs(log_scale).max() > 0.01

    @pytest.mark.claim("ostquant")
    def test_outlier_channels_fill_the_quantizer_and_cost_less_error(self):
        """A few large channels: scaling and rotation leave the float network, use more of the
        range, and lower the divergence of a network with 4-bit weights and activations."""
        rng = np.random.default_rng(0)
        spread = np.ones(16, np.float32)
        spread[[3, 11]] = 25.0
        up, down = np.linalg.qr(rng.normal(size=(16, 16)))[0], rng.normal(size=(16, 10))
        params = {
            "up": jnp.asarray(up * spread, jnp.float32),
            "down": jnp.asarray(down / spread[:, None] / 2, jnp.float32),
        }
        batches = jnp.asarray(rng.standard_t(4, size=(4, 64, 16)), jnp.float32)
        rows, columns = (QuantSpec(bits=4, granularity="channel", axis=a) for a in (-2, -1))

        def network(params, x):
            return x @ params["up"] @ params["down"]

        def rounded(params, x):
            return range_fake_quantize(x @ params["up"], rows) @ params["down"]

        @jax.jit
        def error(changed):
            changed = changed | {"down": fake_quantize(changed["down"], columns)}
            x = batches.reshape(-1, 16)
            return kl_top_loss(rounded(changed, x), network(params, x), k=10).mean()

        def log_rate(x):
            return quantization_space_utilization_rate(x, extent="exact", log=True)

        site = TransformSite(
            features=16, writers=("up",), readers=("down",), rotation="learned", scaling=True
        )
        result = ostquant(
            network,
            params,
            batches,
            {"x": site},
            columns,
            quantized_apply_fn=rounded,
            k=10,
            steps=300,
            rotation_learning_rate=0.1,
            scale_learning_rate=0.05,
        )
        expected = network(params, batches)
        np.testing.assert_allclose(
            network(result.params, batches), expected, atol=1e-4 * np.abs(expected).max()
        )
        rotation, _ = result.transforms["x"]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
        hidden = batches @ params["up"]
        assert log_rate(hidden) < log_rate(hidden / spread) - 10
        assert log_rate(hidden) < log_rate(batches @ result.params["up"]) - 10
        start = equivalent_transforms_init(params, {"x": site})
        rotated = apply_equivalent_transforms(params, start, {"x": site})
        raw, hadamard, learned = (error(p) for p in (params, rotated, result.params))
        assert learned < 0.5 * raw
        assert learned < 0.5 * hadamard

    def test_bad_input(self):
        params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 3))}
        site = TransformSite(features=4, writers=("up",), readers=("down",), scaling=True)
        run = lambda **kwargs: ostquant(
            lambda p, x: x @ p["up"],
            params,
            jnp.ones((1, 2, 3)),
            {"x": site},
            QuantSpec(),
            **kwargs,
        )
        with pytest.raises(ValueError, match="quantized must name readers of sites, got 'up'"):
            run(quantized=("up",))
        with pytest.raises(ValueError, match="steps must be in"):
            run(steps=0)
        with pytest.raises(ValueError, match="calibration must be arrays"):
            ostquant(lambda p, x: x, params, jnp.ones((0, 2, 3)), {"x": site}, QuantSpec())
