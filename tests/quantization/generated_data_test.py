import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.quantization import generated_data, genie_distill, swing_convolution_inputs
from jaxref.quantization.generated_data import _GENERATOR_DECAY, _genie_distill, genie_start

KEY = jax.random.key(0)
AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "zero_shot.npz")
MEANS, VARIANCES = ([AUTHORS[f"{name}{i}"] for i in range(2)] for name in ("mean", "var"))


def authors_activations(images, key):
    """The network of the oracle, whose windows are those in the middle: the inputs themselves."""
    del key
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


def authors_generator():
    stored = {name: AUTHORS["generator." + name] for name in ("linear.weight", "linear.bias")}
    for i in (0, 2, 3, 6):
        for part in ("weight", "bias"):
            stored[f"{i}.{part}"] = AUTHORS[f"generator.conv_layers.{i}.{part}"]
    kernel = stored["linear.weight"].T.reshape(6, 5, 2, 2)
    params = {
        "linear": {
            "kernel": kernel.transpose(0, 2, 3, 1),
            "bias": stored["linear.bias"].reshape(5, 2, 2).transpose(1, 2, 0),
        }
    }
    for name, i in (("before", 0), ("between", 3)):
        params[name] = {"scale": stored[f"{i}.weight"], "bias": stored[f"{i}.bias"]}
    for name, i in (("first", 2), ("second", 6)):
        kernel = stored[f"{i}.weight"].transpose(2, 3, 1, 0)
        params[name] = {"kernel": kernel, "bias": stored[f"{i}.bias"]}
    return params


class TestSwing:
    def test_windows_of_the_reflected_image_and_their_mean(self):
        x = jax.random.normal(KEY, (2, 5, 6, 3))
        windows = jax.vmap(swing_convolution_inputs, (None, 0))(x, jax.random.split(KEY, 200))
        x, windows = np.asarray(x), np.asarray(windows)
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        possible = [padded[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3)]
        np.testing.assert_array_equal(possible[4], x)
        kinds = [{k for k in range(9) if np.array_equal(window, possible[k])} for window in windows]
        assert all(len(kind) == 1 for kind in kinds)
        counts = np.bincount([kind.pop() for kind in kinds], minlength=9)
        assert counts.min() > 8  # 22 are expected of each
        box = sum(np.roll(x, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
        mean = np.mean(possible, axis=0)
        np.testing.assert_allclose(mean[:, 1:-1, 1:-1], box[:, 1:-1, 1:-1], atol=1e-6)

    def test_no_jitter_and_bad_input(self):
        x = jnp.ones((1, 2, 2), jnp.bfloat16)
        assert swing_convolution_inputs(x.mT, KEY, jitter=0).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match="x must have shape"):
            swing_convolution_inputs(jnp.ones((4, 1, 1, 3)), KEY)
        with pytest.raises(ValueError, match="x must have shape"):
            swing_convolution_inputs(jnp.ones((4, 4)), KEY)
        with pytest.raises(TypeError, match="jitter must be an int"):
            swing_convolution_inputs(x, KEY, jitter=0.5)


class TestGenieDistill:
    def test_follows_the_authors_through_a_plateau_and_decay(self, monkeypatch):
        """In float64, as rounding would be magnified a thousandfold on the way."""
        monkeypatch.setattr(generated_data, "_GENERATOR_DECAY", (10, _GENERATOR_DECAY[1]))
        expected = AUTHORS["genie_losses"]
        steps = len(expected) - 1  # the authors' images are of the step before the last
        options = {"activations_fn": authors_activations, "ddof": 1, "steps": steps}
        with jax.enable_x64(True):
            wide = functools.partial(jnp.asarray, dtype=jnp.float64)
            params = {"latents": AUTHORS["genie_latents"], "generator": authors_generator()}
            params, means, variances = jax.tree.map(wide, (params, MEANS, VARIANCES))
            data = _genie_distill(params, means, variances, (50.0, 0.01), 1, KEY, **options)
        np.testing.assert_allclose(data.losses, expected, rtol=1e-4)
        images = AUTHORS["genie_images"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(data.images, images, atol=1e-3)

    def test_generator_has_the_bounds_of_pytorch(self):
        params = genie_start(KEY, (2, 12, 8, 3), 6, (5, 4))["generator"]
        for name, inputs in (("linear", 6), ("first", 9 * 5), ("second", 9 * 4)):
            for part in ("kernel", "bias"):
                largest = jnp.abs(params[name][part]).max() * inputs**0.5
                assert (0.1 if part == "bias" else 0.9) < largest <= 1

    def test_bad_input(self):
        distil = functools.partial(genie_distill, authors_activations, MEANS, VARIANCES, key=KEY)
        for shape in ((2, 6, 8, 3), (2, 8, 3)):
            with pytest.raises(ValueError, match="shape must be"):
                distil(shape)
        with pytest.raises(ValueError, match="lr_latent must be in"):
            distil((2, 8, 8, 3), lr_latent=0.0)
        with pytest.raises(ValueError, match="latent_dim must be in"):
            distil((2, 8, 8, 3), latent_dim=0)
        with pytest.raises(ValueError, match="ddof must be 0 or 1"):
            distil((2, 8, 8, 3), ddof=3)
