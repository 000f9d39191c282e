from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.nn import morlet_filter_bank, scattering_channels, scattering_transform

PEER = np.load(Path(__file__).parents[1] / "oracles" / "scattering.npz")
CASES = [name.removesuffix("_case") for name in PEER.files if name.endswith("_case")]
transform = jax.jit(scattering_transform, static_argnames=("J", "L", "max_order"))


@jax.jit
def value_and_slope(x, cotangent):
    value, vjp = jax.vjp(partial(scattering_transform, J=2, L=3), x)
    return value, *vjp(cotangent)


class TestNumbers:
    @pytest.mark.parametrize("case", CASES)
    def test_matches_kymatio(self, case):
        J, L, order = map(int, PEER[f"{case}_case"])
        expected = np.moveaxis(PEER[f"{case}_s"], 1, -1)
        found = partial(transform, J=J, L=L, max_order=order)
        value = found(PEER[f"{case}_x"][..., None])
        np.testing.assert_allclose(value, expected, atol=1e-4)
        assert value.shape[-1] == scattering_channels(J, L, max_order=order)

    def test_gradient_matches_kymatio(self):
        _, slope = value_and_slope(
            PEER["square_x"][..., None], np.moveaxis(PEER["cotangent"], 1, -1)
        )
        np.testing.assert_allclose(slope[..., 0], PEER["gradient"], atol=1e-4)

    def test_filters_match_kymatio(self):
        filters = morlet_filter_bank(8, 6, J=2, L=3)
        np.testing.assert_allclose(filters.psi.reshape(6, 8, 6), PEER["psi"], atol=1e-4)
        np.testing.assert_allclose(filters.phi, PEER["phi"], atol=1e-4)
        np.testing.assert_allclose(filters.psi[..., 0, 0], 0, atol=1e-12)
        assert not filters.phi.flags.writeable

    def test_channels_and_leading_axes_are_by_themselves(self):
        x = np.random.default_rng(0).normal(size=(2, 3, 12, 12, 2)).astype("f")
        together = transform(x, J=2, L=3)
        assert together.shape == (2, 3, 3, 3, 32)
        alone = transform(x[1, 2, ..., 1].reshape(1, 12, 12, 1), J=2, L=3)
        np.testing.assert_allclose(together[1, 2, ..., 16:], alone[0], atol=1e-6)


class TestEdges:
    def test_constant_images_and_half_precision(self):
        for level in (0.0, 1.0):
            x, ones = np.full((1, 12, 12, 1), level, "f"), np.ones((1, 3, 3, 16), "f")
            value, slope = value_and_slope(x, ones)
            np.testing.assert_allclose(value[..., 0], level, atol=1e-3)
            np.testing.assert_allclose(value[..., 1:], 0, atol=1e-5)
            assert np.all(np.isfinite(slope))
        half = transform(jnp.asarray(x, jnp.bfloat16), J=1, L=1, max_order=1)
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(half[..., 0]), 1, atol=0.01)

    def test_bad_input_is_named(self):
        images = jnp.zeros((1, 8, 8, 1))
        with pytest.raises(ValueError, match="J must be in"):
            scattering_transform(images, J=0)
        with pytest.raises(ValueError, match="L must be in"):
            scattering_transform(images, L=0)
        with pytest.raises(ValueError, match="max_order must be 1 or 2"):
            scattering_transform(images, max_order=3)
        with pytest.raises(ValueError, match="of at least 16 pixels a side"):
            scattering_transform(images, J=4)
        with pytest.raises(TypeError, match="images must have a floating-point type"):
            scattering_transform(np.zeros((8, 8, 1), int))
