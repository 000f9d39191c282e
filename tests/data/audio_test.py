import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import data

TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)


def ambisonics(direction):
    """First-order channels W, Y, Z, X of a plane wave."""
    x, y, z = direction
    return np.array([1.0, y, z, x], np.float32)


def tetrahedral(direction):
    """Four channels that tell how a plane wave meets the microphones."""
    return np.exp(TETRAHEDRON @ direction).astype(np.float32)


def maps(product):
    """The maps of the axes that allow a swap of x and y, of the given sign products."""
    for swap in (np.eye(3), np.eye(3)[[1, 0, 2]]):
        for bits in np.ndindex(2, 2, 2):
            signs = 1 - 2 * np.array(bits)
            if np.prod(signs) in product:
                yield np.diag(signs) @ swap


class TestChannelSwap:
    @pytest.mark.parametrize(
        ("array", "encode", "products", "number"),
        [("ambisonics", ambisonics, (1, -1), 16), ("tetrahedral", tetrahedral, (1,), 8)],
    )
    def test_is_the_recording_of_a_turned_scene(self, array, encode, products, number):
        """Every result is what a wave from one of the mapped directions would have given, all of
        these occur, and none is much more frequent than others."""
        direction = np.array([0.8, 0.5, np.sqrt(0.11)])
        expected = np.stack([encode(m @ direction) for m in maps(products)])
        assert len(expected) == number
        keys = jax.random.split(jax.random.key(0), 40 * number)
        wave = encode(direction)
        swap = lambda key: data.channel_swap(key, wave, array=array)
        turned = np.asarray(jax.jit(jax.vmap(swap))(keys))
        distance = np.abs(turned[:, None] - expected).max(-1)
        assert np.all(distance.min(1) < 1e-6)
        counts = np.bincount(distance.argmin(1), minlength=number)
        assert counts.min() > 15
        assert counts.max() < 75

    def test_magnitudes_keep_their_signs_and_other_axes_their_order(self):
        x = np.random.default_rng(0).uniform(size=(3, 4, 5)).astype(np.float32)
        seen = set()
        for seed in range(12):
            y = data.channel_swap(jax.random.key(seed), x, array="ambisonics", axis=1, signed=False)
            order = (0, 3, 2, 1) if np.array_equal(y[:, 1], x[:, 3]) else (0, 1, 2, 3)
            assert np.array_equal(y, x[:, order])
            seen.add(order)
        assert len(seen) == 2

    def test_bad_input_is_named(self):
        key, x = jax.random.key(0), jnp.ones((4, 6))
        with pytest.raises(ValueError, match="array must be"):
            data.channel_swap(key, x, array="binaural")
        with pytest.raises(ValueError, match="x must have 4 channels"):
            data.channel_swap(key, x, array="ambisonics", axis=1)


class TestSpecAugment:
    def test_bands_have_their_widths_and_span_the_other_axis(self):
        shape = (500, 30, 20)
        mask = jax.jit(
            lambda key: data.spec_augment_mask(
                key, shape, time_width=6, frequency_width=4, time_masks=1, frequency_masks=1
            )
        )(jax.random.key(0))
        dropped_times = np.asarray(~mask.any(axis=2))
        dropped_bins = np.asarray(~mask.any(axis=1))
        kept = ~dropped_times[:, :, None] & ~dropped_bins[:, None, :]
        assert np.array_equal(mask, kept)
        for dropped, width in ((dropped_times, 6), (dropped_bins, 4)):
            sizes = dropped.sum(1)
            # one band: at most one rise
            rises = np.diff(dropped.astype(int), axis=1, prepend=0) == 1
            assert rises.sum(1).max() == 1
            counts = np.bincount(sizes, minlength=width + 1) / len(sizes)
            np.testing.assert_allclose(counts, 1 / (width + 1), atol=0.06)
            assert dropped.mean(0).min() > 0  # anywhere, the ends included

    def test_number_of_masks_and_examples_of_their_own(self):
        numbers = {"time_width": 3, "frequency_width": 3}
        none = data.spec_augment_mask(
            jax.random.key(0), (4, 9, 9), time_masks=0, frequency_masks=0, **numbers
        )
        assert none.all()
        several = data.spec_augment_mask(jax.random.key(0), (4, 9, 9), **numbers)
        assert len(np.unique(several.reshape(4, -1), axis=0)) == 4

    @pytest.mark.parametrize(
        ("shape", "changes", "message"),
        [
            ((9,), {}, "shape must be"),
            ((9, 9), {"time_width": 10}, "time_width must be in"),
            ((9, 9), {"frequency_width": -1}, "frequency_width must be in"),
            ((9, 9), {"time_masks": -1}, "time_masks must be in"),
        ],
    )
    def test_bad_input_is_named(self, shape, changes, message):
        numbers = {"time_width": 3, "frequency_width": 3} | changes
        with pytest.raises(ValueError, match=message):
            data.spec_augment_mask(jax.random.key(0), shape, **numbers)
