import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import adaptation


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_an_input_alike_in_all_channels_has_the_response_that_it_had(channels):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 3, 5)).astype(np.float32)
    image = rng.normal(size=(1, 8, 8, 1)).astype(np.float32)

    def response(kernel):
        x = jnp.repeat(image, kernel.shape[2], axis=3)
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    inflated = adaptation.inflate_input_channels(kernel, channels)
    assert inflated.shape == (3, 3, channels, 5)
    np.testing.assert_allclose(response(inflated), response(kernel), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(inflated[:, :, 0], kernel.mean(2) * 3 / channels, rtol=1e-5)


def test_axis_and_type():
    kernel = jnp.ones((3, 5), jnp.bfloat16)
    inflated = adaptation.inflate_input_channels(kernel, 6, axis=0)
    assert inflated.shape == (6, 5)
    assert inflated.dtype == jnp.bfloat16
    np.testing.assert_allclose(inflated.astype("f"), 0.5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="channels must be in"):
        adaptation.inflate_input_channels(jnp.ones((3, 5)), 0)
    with pytest.raises(TypeError, match="kernel must have a floating-point type"):
        adaptation.inflate_input_channels(jnp.ones((3, 5), int), 2)
    with pytest.raises(ValueError, match="axis must name axes"):
        adaptation.inflate_input_channels(jnp.ones((3, 5)), 2, axis=2)
