import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.nn import Conv, Linear, Norm
from jaxref.norms import batch_norm
from jaxref.quantization import (
    QuantSpec,
    activation_ranges,
    batch_norm_statistics_loss,
    dequantize,
    distilled_data,
    quantization_sensitivity,
    quantize,
)
from jaxref.quantization.zero_shot import _distilled_data

KEY = jax.random.key(0)
AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "zero_shot.npz")
MEANS, VARIANCES = ([AUTHORS[f"{name}{i}"] for i in range(2)] for name in ("mean", "var"))


def authors_activations(images):
    """The network of the oracle, with the inputs of its normalization layers."""
    inputs, x = [], images
    for i, stride in enumerate((2, 1)):
        kernel = AUTHORS[f"kernel{i}"].transpose(2, 3, 1, 0).astype(x.dtype)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        inputs.append(x)
        x = (x - MEANS[i]) / jnp.sqrt(VARIANCES[i] + 1e-5) * AUTHORS[f"scale{i}"]
        x = jax.nn.relu(x + AUTHORS[f"bias{i}"])
    return inputs


class Net(nnx.Module):
    """A convolution net whose call gives logits and the inputs of its norms."""

    def __init__(self, rngs):
        blurs = jax.nn.initializers.uniform(0.2)
        self.first = Conv(3, 6, (3, 3), strides=2, kernel_init=blurs, rngs=rngs)
        self.second = Conv(6, 6, (3, 3), rngs=rngs)
        self.norms = nnx.List([Norm(functools.partial(batch_norm, momentum=0.0), 6) for _ in "12"])
        self.head = Linear(6, 4, axes=(None, None), rngs=rngs)

    def __call__(self, x):
        inputs = []
        for conv, norm in zip((self.first, self.second), self.norms):
            inputs.append(conv(x))
            x = jax.nn.relu(norm(inputs[-1]))
        return self.head(x.mean(axis=(1, 2))), inputs


def smooth_images(count, size=12):
    """Natural in that neighbouring pixels, and colours, are alike; mean 0, variance 1."""
    rng = np.random.default_rng(0)
    at = np.arange(size) / size
    waves = np.array([np.cos(np.pi * k * (at + 0.5 / size)) / (1 + k) for k in range(4)])
    images = np.einsum("nabc,ax,by->nxyc", rng.normal(size=(count, 4, 4, 3)), waves, waves)
    images = images @ (np.eye(3) + 1.0)
    return ((images - images.mean()) / images.std()).astype(np.float32)


def statistics64(x, mean, variance, reduction, ddof, epsilon=1e-6):
    x = np.float64(x)
    images = x.reshape(len(x), -1, x.shape[-1])
    images = images if reduction == "per_image" else images.reshape(1, -1, x.shape[-1])
    deviation = np.sqrt(images.var(axis=1, ddof=ddof) + epsilon)
    off = (images.mean(axis=1) - mean) ** 2 + (deviation - np.sqrt(variance + epsilon)) ** 2
    return off.sum() / (len(x) if reduction == "per_image" else x.shape[-1])


class TestClaims:
    @pytest.mark.claim("zeroq")
    def test_distilled_images_have_the_statistics_and_ranges_that_noise_has_not(self):
        """From the running statistics of a network alone; no image is seen."""
        net = Net(nnx.Rngs(0))
        real = smooth_images(16)
        training = nnx.jit(lambda net, images: net(images)[1])
        activations = training(net, real)  # whose statistics it takes for its own
        net.eval()
        means, variances = zip(*(norm.running_state() for norm in net.norms))
        own = batch_norm_statistics_loss(activations, means, variances, reduction="per_batch")
        assert own < 1e-8

        activations_fn = jax.jit(lambda images: net(images)[1])
        noise = jax.random.normal(jax.random.key(1), (16, 12, 12, 3))
        data = distilled_data(activations_fn, means, variances, noise.shape, steps=150, key=KEY)
        assert data.losses.min() < 0.1 * data.losses[0]
        (_, wanted), (_, of_noise), (_, of_distilled) = (
            activation_ranges(activations_fn(images)) for images in (real, noise, data.images)
        )
        assert (abs(of_distilled - wanted) < abs(of_noise - wanted)).all()


class TestStatisticsLoss(chex.TestCase):
    SHAPE = (3, 4, 2, 5)

    def problem(self, reduction, ddof):
        """The loss of one of two layers, and the same in float64."""
        rng = np.random.default_rng(0)
        first, second, images = rng.normal(1, 2, size=(3, *self.SHAPE)).astype(np.float32)
        means = [*rng.normal(size=(2, 5)).astype(np.float32)]
        variances = [*rng.uniform(0, 2, size=(2, 5)).astype(np.float32)]

        def reference(x):
            pairs = zip((x, second), means, variances)
            expected = sum(statistics64(*pair, reduction, ddof) for pair in pairs)
            return expected + statistics64(images, 0.0, 1.0, "per_image", ddof)

        def loss(x):
            return batch_norm_statistics_loss(
                [x, second], means, variances, images=images, reduction=reduction, ddof=ddof
            )

        return loss, reference, first

    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_its_formula(self):
        for options in (("per_image", 0), ("per_batch", 1)):
            loss, reference, x = self.problem(*options)
            np.testing.assert_allclose(self.variant(loss)(x), reference(x), rtol=1e-5)

    def test_gradients_are_the_numeric_ones(self):
        for options in (("per_image", 1), ("per_batch", 0)):
            loss, reference, x = self.problem(*options)
            gradient = jax.jit(jax.grad(loss))(x)
            for index in ((0, 0, 0, 0), (2, 3, 1, 4)):
                shift = np.zeros(self.SHAPE)
                shift[index] = 1e-4
                slope = (reference(x + shift) - reference(x - shift)) / 2e-4
                np.testing.assert_allclose(gradient[index], slope, rtol=1e-3)

    def test_sharded_mapped_and_half_precision(self):
        x = jax.random.normal(KEY, (8, 4, 3)) + 1.0
        loss = jax.jit(
            lambda x: batch_norm_statistics_loss([x], [np.zeros(3, "f")], [np.ones(3, "f")])
        )
        expected = loss(x)
        mesh = jax.make_mesh((8,), ("data",))
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(loss(sharded), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(loss)(x[:, None]).mean(), expected, rtol=1e-5)
        half = loss(x.astype(jnp.bfloat16))
        assert half.dtype == jnp.float32
        np.testing.assert_allclose(half, expected, rtol=2e-2)

    def test_constant_and_large_activations(self):
        zeros = [np.zeros(2, np.float32)]
        loss = jax.jit(
            lambda x, **options: batch_norm_statistics_loss([x], zeros, zeros, **options),
            static_argnames="reduction",
        )
        both = jax.jit(
            jax.value_and_grad(lambda x: batch_norm_statistics_loss([x], zeros, zeros, ddof=1))
        )
        for x in (jnp.ones((2, 3, 2)), 1e4 * jnp.ones((1, 1, 2)), jnp.zeros((2, 3, 2))):
            value, gradient = both(x)
            assert jnp.isfinite(value)
            assert jnp.isfinite(gradient).all()
        assert loss(jnp.zeros((2, 3, 2))) == 0
        assert loss(jnp.zeros((2, 2)), reduction="per_batch") == 0

    @parameterized.parameters(
        (([], [], []), {}, "running_means must have a normalization layer"),
        (([0], [0], []), {}, "running_variances must be of 1 layers"),
        (([], [0], [0]), {}, "activations must be of 1 normalization layers, got 0"),
        (([0], [0], [0]), {"reduction": "sum"}, "reduction must be one of"),
        (([0], [0], [0]), {"ddof": 2}, "ddof must be 0 or 1"),
        (([0], [0], [0]), {"epsilon": 0.0}, "epsilon must be in"),
    )
    def test_bad_input(self, layers, options, message):
        x, mean, variance = jnp.ones((2, 3, 2)), jnp.zeros(2), jnp.ones(2)
        arguments = [[array] * len(given) for array, given in zip((x, mean, variance), layers)]
        with pytest.raises(ValueError, match=message):
            batch_norm_statistics_loss(*arguments, **options)

    def test_bad_arrays(self):
        good = {"activations": [jnp.ones((2, 3, 2))], "running_means": [jnp.zeros(2)]}
        good["running_variances"] = [jnp.ones(2)]
        for name, value, message in (
            ("running_variances", -jnp.ones(2), r"running_variances\[0\] must be in"),
            ("running_variances", jnp.ones(3), r"running_variances\[0\] must have shape"),
            (
                "running_means",
                jnp.zeros((1, 2)),
                r"running_means\[0\] must have shape \[channels\]",
            ),
            ("activations", jnp.ones((2, 2)), r"activations\[0\] must have shape"),
            ("activations", jnp.ones((2, 0, 2)), r"activations\[0\] must have shape"),
            ("activations", jnp.ones((2, 3, 4)), r"the running mean of activations\[0\]"),
        ):
            with pytest.raises(ValueError, match=message):
                batch_norm_statistics_loss(**(good | {name: [value]}))
        with pytest.raises(TypeError, match=r"activations\[0\] must have a floating-point type"):
            batch_norm_statistics_loss(**(good | {"activations": [jnp.ones((2, 3, 2), int)]}))


class TestDistilledData:
    def test_follows_the_authors_through_plateaus(self):
        expected = AUTHORS["zeroq_losses"]
        options = {"activations_fn": authors_activations, "reduction": "per_image", "ddof": 1}
        with jax.enable_x64(True):
            wide = functools.partial(jnp.asarray, dtype=jnp.float64)
            start = wide(AUTHORS["zeroq_start"].transpose(0, 2, 3, 1))
            statistics = jax.tree.map(wide, (MEANS, VARIANCES))
            data = _distilled_data(start, *statistics, 0.5, 4, steps=len(expected), **options)
        np.testing.assert_allclose(data.losses[:-1], expected, rtol=1e-4)
        images = np.float32(data.images)
        best = batch_norm_statistics_loss(
            authors_activations(images), MEANS, VARIANCES, images=images, ddof=1
        )
        np.testing.assert_allclose(best, np.asarray(data.losses).min(), rtol=1e-4)

    def test_no_steps_and_bad_input(self):
        distil = functools.partial(distilled_data, authors_activations, MEANS, VARIANCES, key=KEY)
        data = distil((2, 8, 8, 3), steps=0)
        assert data.losses.shape == (1,)
        np.testing.assert_array_equal(data.images, jax.random.normal(KEY, (2, 8, 8, 3)))
        with pytest.raises(ValueError, match="learning_rate must be in"):
            distil((2, 8, 8, 3), learning_rate=0.0)
        with pytest.raises(ValueError, match="patience must be in"):
            distil((2, 8, 8, 3), patience=0)
        with pytest.raises(TypeError, match="steps must be an int"):
            distil((2, 8, 8, 3), steps=1.5)
        with pytest.raises(ValueError, match="running_means must have a normalization layer"):
            distilled_data(authors_activations, [], [], (2, 8, 8, 3), key=KEY)


class TestActivationRanges:
    def test_extremes_percentiles_and_zero(self):
        x = [np.arange(first, first + 101, dtype=np.float32) for first in (1, -50, -102)]
        for p in (100.0, 90.0):
            lows, highs = activation_ranges(x, percentile=p)
            lowest, highest = ([np.percentile(v, q) for v in x] for q in (100 - p, p))
            np.testing.assert_allclose(lows, [0, *lowest[1:]], rtol=1e-6)
            np.testing.assert_allclose(highs, [*highest[:2], 0], rtol=1e-6)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="percentile must be in"):
            activation_ranges([jnp.ones(2)], percentile=50)
        with pytest.raises(ValueError, match="activations must be of one layer"):
            activation_ranges([])
        with pytest.raises(ValueError, match=r"activations\[0\] must have entries"):
            activation_ranges([jnp.ones((0, 2))])


class TestQuantizationSensitivity:
    SPECS = tuple(
        QuantSpec(bits=bits, granularity="channel", axis=-1, symmetric=False) for bits in (2, 4, 8)
    )

    def test_matches_a_float64_transcription(self):
        rng = np.random.default_rng(0)
        params = {
            "layers": [{"kernel": rng.normal(size=(6, 6)).astype("f")} for _ in range(2)],
            "bias": rng.normal(size=6).astype("f"),
        }
        data = rng.normal(size=(5, 6)).astype("f")

        def apply_fn(params, x, maximum=jnp.maximum):
            first, second = (layer["kernel"] for layer in params["layers"])
            return maximum(x @ first + params["bias"], 0) @ second

        names = ["layers/1/kernel", "layers/0/kernel"]
        omega = quantization_sensitivity(apply_fn, params, data, names, self.SPECS)

        def log_probs(*kernels):
            wide = {"layers": [{"kernel": np.float64(kernel)} for kernel in kernels]}
            logits = apply_fn(wide | {"bias": params["bias"]}, data, np.maximum)
            return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

        kernels = [layer["kernel"] for layer in params["layers"]]
        log_p = log_probs(*kernels)
        for i, at in enumerate((1, 0)):
            for j, spec in enumerate(self.SPECS):
                changed = list(kernels)
                changed[at] = dequantize(quantize(kernels[at], spec))
                gap = np.exp(log_p) * (log_p - log_probs(*changed))
                np.testing.assert_allclose(omega[i, j], gap.sum(-1).mean(), rtol=1e-3, atol=1e-6)

    def test_takes_a_flax_network(self):
        net = Net(nnx.Rngs(0))
        net.eval()
        graph, state = nnx.split(net)

        def apply_fn(params, images):
            state = nnx.State(params)
            return nnx.merge(graph, state)(images)[0]

        params, data = nnx.to_pure_dict(state), smooth_images(2)
        omega = quantization_sensitivity(apply_fn, params, data, ["second/kernel"], self.SPECS[:1])
        assert omega > 0

    def test_bad_input(self):
        apply_fn, params, x = lambda params, x: x @ params["w"], {"w": jnp.eye(2)}, jnp.eye(2)
        with pytest.raises(ValueError, match=r"layers must be among \['w'\], got \['v'\]"):
            quantization_sensitivity(apply_fn, params, x, ["v"], self.SPECS)
        with pytest.raises(ValueError, match="layers and specs must not be empty"):
            quantization_sensitivity(apply_fn, params, x, [], self.SPECS)
        with pytest.raises(TypeError, match=r"specs\[0\] must be a QuantSpec"):
            quantization_sensitivity(apply_fn, params, x, ["w"], [4])
