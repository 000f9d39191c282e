from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import integrate

from jaxref import norms

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "weight_norms.npz")
NORMS = {
    "standardization": norms.weight_standardization,
    "biased": lambda kernel, **o: norms.weight_standardization(kernel, unbiased=False, **o),
    "scaled": norms.scaled_weight_standardization,
    "normalization": norms.weight_normalization,
}


def random_kernel(shape=(3, 2, 4, 5), seed=0):
    """A kernel whose units differ in mean and spread."""
    rng = np.random.default_rng(seed)
    spread, mean = rng.uniform(0.5, 3, size=(2, shape[-1]))
    return (mean + spread * rng.normal(size=shape)).astype(np.float32)


def transcription(name, kernel, epsilon=None):
    """The formulas unit by unit in float64."""
    kernel = np.asarray(kernel, np.float64)
    units = []
    for w in kernel.reshape(-1, kernel.shape[-1]).T:
        centred = w - w.mean()
        if name == "standardization":
            eps = 1e-5 if epsilon is None else epsilon
            units.append(centred / np.sqrt(np.var(w, ddof=1) + eps))
        elif name == "biased":
            eps = 1e-5 if epsilon is None else epsilon
            units.append(centred / np.sqrt(np.var(w) + eps))
        elif name == "scaled":
            eps = 1e-4 if epsilon is None else epsilon
            units.append(centred / np.sqrt(max(len(w) * np.var(w), eps)))
        else:
            units.append(w / np.linalg.norm(w))
    return np.stack(units, -1).reshape(kernel.shape)


def filters(kernel):
    return np.asarray(kernel).reshape(-1, kernel.shape[-1])


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*NORMS)
    def test_values_match_the_formula_for_any_output_axis(self, name):
        kernel = random_kernel()
        expected = transcription(name, kernel)
        ours = self.variant(NORMS[name])(kernel)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        moved = NORMS[name](np.moveaxis(kernel, -1, 1), output_axis=1)
        np.testing.assert_allclose(np.moveaxis(moved, 1, -1), expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters("standardization", "biased", "scaled")
    def test_epsilon(self, name):
        kernel = 0.1 * random_kernel()
        for epsilon in (0.0, 0.5):
            ours = NORMS[name](kernel, epsilon=epsilon)
            expected = transcription(name, kernel, epsilon)
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(ours - transcription(name, kernel, 0.0)).max() > 0.05

    def test_gains_match_torch_weight_norm_with_gradients(self):
        kernel = ORACLE["kernel"].transpose(2, 0, 1, 3).reshape(18, 4)
        w, vjp = jax.vjp(norms.weight_normalization, kernel, ORACLE["gain"])
        np.testing.assert_allclose(w, ORACLE["weight_norm"], rtol=1e-5, atol=1e-6)
        for name, gradient in zip(("kernel", "gain"), vjp(ORACLE["rows"])):
            expected = ORACLE[f"weight_norm_grad_{name}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)

    def test_scaled_gains(self):
        kernel, gain = random_kernel(), np.array([1, 2, 0, -1, 0.5], np.float32)
        ours = norms.scaled_weight_standardization(kernel, gain, nonlinearity_gain=1.7)
        expected = transcription("scaled", kernel) * gain * 1.7
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        moved = norms.scaled_weight_standardization(
            np.moveaxis(kernel, -1, 0), gain, output_axis=0, nonlinearity_gain=1.7
        )
        np.testing.assert_allclose(np.moveaxis(moved, 0, -1), expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(*NORMS)
    def test_gradient_is_that_of_the_formula(self, name):
        kernel, cotangent = random_kernel((3, 4)), random_kernel((3, 4), 1)
        gradient = jax.vjp(NORMS[name], kernel)[1](cotangent)[0]
        step, expected = 1e-5, np.zeros(kernel.shape)
        for index in np.ndindex(*kernel.shape):
            move = np.zeros(kernel.shape)
            move[index] = step
            change = transcription(name, kernel + move) - transcription(name, kernel - move)
            expected[index] = np.sum(cotangent * change) / (2 * step)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


class TestNonlinearityGain:
    def test_table_is_the_integral(self):
        functions = {name: getattr(jax.nn, name, None) for name in norms.weight._NONLINEARITY_GAINS}
        functions |= {"identity": lambda x: x, "tanh": jnp.tanh}
        z = np.linspace(-9, 9, 36001)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        with jax.enable_x64(True):
            for name, function in functions.items():
                y = np.asarray(function(jnp.asarray(z)))
                mean = integrate.simpson(y * density, x=z)
                variance = integrate.simpson((y - mean) ** 2 * density, x=z)
                np.testing.assert_allclose(
                    norms.nonlinearity_gain(name), variance**-0.5, rtol=1e-7, err_msg=name
                )

    def test_estimate_is_within_a_percent(self):
        for name in ("relu", "silu"):
            estimate = norms.estimate_nonlinearity_gain(getattr(jax.nn, name), jax.random.key(1))
            np.testing.assert_allclose(estimate, norms.nonlinearity_gain(name), rtol=0.01)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match=r"name must be one of \['celu', .*got 'swoosh'"):
            norms.nonlinearity_gain("swoosh")
        with pytest.raises(ValueError, match="num_samples must be in"):
            norms.estimate_nonlinearity_gain(jax.nn.relu, jax.random.key(0), 1)


class TestResidualScales:
    def test_variance_grows_in_a_stage_and_starts_anew_in_the_next(self):
        scales = norms.nf_residual_scales((3, 2, 1), alpha=0.2)
        squares = [1, 1.04, 1.08, 1.12, 1.04, 1.08]
        np.testing.assert_allclose([scale.beta**2 for scale in scales], squares)
        assert [scale.is_transition for scale in scales] == [True, False, False, True, False, True]
        assert {scale.alpha for scale in scales} == {0.2}

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="num_blocks_per_stage must be in"):
            norms.nf_residual_scales([2, 0])
        with pytest.raises(ValueError, match="alpha must be in"):
            norms.nf_residual_scales([2], alpha=0.0)


class TestClaims:
    @pytest.mark.claim("weight-standardization-batch-channel-norm")
    def test_gradient_loses_its_mean_and_its_part_along_the_weights(self):
        """Which makes it smaller: the paper's reason for a smoother loss."""
        kernel, direction = random_kernel((7, 3)), random_kernel((7, 3), 1)
        standardise = lambda w: norms.weight_standardization(w, epsilon=0.0, unbiased=False)
        w, vjp = jax.vjp(standardise, kernel)
        shifted = standardise(kernel * np.array([3, 0.1, 20], "f") + np.array([1, -2, 5], "f"))
        np.testing.assert_allclose(shifted, w, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(w.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(w.var(0), 1, rtol=1e-5)
        (gradient,) = vjp(direction)
        np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-5)
        np.testing.assert_allclose((gradient * kernel).sum(0), 0, atol=1e-5)
        # ‖∂L/∂w‖² = (‖∂L/∂ŵ‖² - (1ᵀ ∂L/∂ŵ)² / N - (ŵᵀ ∂L/∂ŵ)² / N) / σ²
        sum_of_squares = (direction**2).sum(0)
        lost = (direction.sum(0) ** 2 + (direction * w).sum(0) ** 2) / 7
        np.testing.assert_allclose(
            (gradient**2).sum(0), (sum_of_squares - lost) / kernel.var(0), rtol=1e-4
        )
        assert np.all(lost > 0.05 * sum_of_squares)
        # with the authors' epsilon and N - 1, the same but for a factor
        authors = norms.weight_standardization(kernel)
        np.testing.assert_allclose(authors, np.sqrt(6 / 7) * w, rtol=1e-4, atol=1e-5)

    @pytest.mark.claim("nf-resnet-scaled-weight-standardization")
    def test_signal_keeps_the_predicted_variance_where_a_plain_network_explodes(self):
        """A saw-tooth 1 + α² l with no mean, over 3 stages of 4 blocks of ReLU layers."""
        width, gain = 512, norms.nonlinearity_gain("relu")
        scales = norms.nf_residual_scales([4, 4, 4])
        keys = jax.random.split(jax.random.key(0), len(scales) + 1)
        x = plain = jax.random.normal(keys[-1], (256, width))
        variances, squared_means, plain_variances = [], [], []
        for key, (beta, alpha, is_transition) in zip(keys, scales):
            kernel = 0.2 + jax.random.normal(key, (width, width))
            standardised = norms.scaled_weight_standardization(kernel, nonlinearity_gain=gain)
            np.testing.assert_allclose(standardised.sum(0), 0, atol=1e-4)
            np.testing.assert_allclose((standardised**2).sum(0), gain**2, rtol=1e-4)
            variances.append(x.var(0).mean())
            squared_means.append(jnp.square(x.mean(0)).mean())
            plain_variances.append(plain.var(0).mean())
            shortcut = x / beta if is_transition else x
            x = shortcut + alpha * (jax.nn.relu(x / beta) @ standardised)
            he = jnp.sqrt(2 / width) * jax.random.normal(key, (width, width))
            plain = plain + jax.nn.relu(plain) @ he
        predicted = [scale.beta**2 for scale in scales]
        np.testing.assert_allclose(variances, predicted, rtol=0.02)
        assert max(squared_means) < 0.02
        assert plain_variances[-1] > 500


@pytest.mark.parametrize("name", NORMS)
class TestContract:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, name, dtype):
        kernel = jnp.asarray(300 * random_kernel(), dtype)  # squares overflow float16
        ours = NORMS[name](kernel)
        assert ours.dtype == dtype
        expected = NORMS[name](kernel.astype(jnp.float32)).astype(dtype)
        np.testing.assert_array_equal(ours, expected)

    @pytest.mark.parametrize("value", [0.0, -0.1, 1e4])
    def test_equal_weights_have_finite_gradients(self, name, value):
        kernel = random_kernel((9, 3))
        kernel[:, 1] = value
        options = [{}] if name == "normalization" else [{}, {"epsilon": 0.0}]
        for given in options:
            y, vjp = jax.vjp(lambda kernel: NORMS[name](kernel, **given), kernel)
            chex.assert_tree_all_finite(vjp(np.ones_like(kernel)))
            if name != "normalization" or value == 0:
                np.testing.assert_array_equal(y[:, 1], 0)

    def test_extreme_sizes(self, name):
        kernel = random_kernel()
        expected = transcription(name, kernel)
        for size in (1e4, 1e16):
            np.testing.assert_allclose(NORMS[name](size * kernel), expected, rtol=1e-3, atol=1e-4)

    def test_vmap_and_sharded_units(self, name):
        kernels = random_kernel((3, 4, 16))
        expected = np.stack([transcription(name, kernel) for kernel in kernels])
        np.testing.assert_allclose(jax.vmap(NORMS[name])(kernels), expected, rtol=1e-4, atol=1e-5)
        mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
        sharding = NamedSharding(mesh, P("fsdp", "tensor"))
        ours = jax.jit(NORMS[name])(jax.device_put(kernels[0], sharding))
        assert ours.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(ours, expected[0], rtol=1e-4, atol=1e-5)

    def test_bad_input_is_named(self, name):
        kernel = random_kernel()
        with pytest.raises(TypeError, match="kernel must have a floating-point type"):
            NORMS[name](kernel.astype(int))
        with pytest.raises(ValueError, match="output_axis must name axes"):
            NORMS[name](kernel, output_axis=4)
        with pytest.raises(ValueError, match="kernel must have inputs"):
            NORMS[name](kernel[:0])
        with pytest.raises(ValueError, match="kernel must have inputs"):
            NORMS[name](kernel[0, 0, 0])
        if name != "normalization":
            with pytest.raises(ValueError, match="epsilon must be in"):
                NORMS[name](kernel, epsilon=-1.0)


def test_a_single_weight_has_no_variance():
    kernel = np.ones((1, 1, 3), np.float32)
    for norm in (norms.weight_standardization, norms.scaled_weight_standardization):
        with pytest.raises(ValueError, match="kernel must have two weights for each output"):
            norm(kernel)
    assert np.all(norms.weight_standardization(kernel, unbiased=False) == 0)


def test_bad_gains_are_named():
    kernel = random_kernel()
    for norm in (norms.weight_normalization, norms.scaled_weight_standardization):
        with pytest.raises(ValueError, match=r"gain must have shape \(5,\)"):
            norm(kernel, np.ones(4, np.float32))
        with pytest.raises(TypeError, match="gain must have a floating-point type"):
            norm(kernel, np.ones(5, int))
    with pytest.raises(ValueError, match="nonlinearity_gain must be in"):
        norms.scaled_weight_standardization(kernel, nonlinearity_gain=0.0)
