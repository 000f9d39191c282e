import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from jaxref import losses


def disc(side=15, radius=5, centre=(6, 8)):
    grid = np.indices((side, side))
    return sum((grid[i] - centre[i]) ** 2 for i in (0, 1)) <= radius**2


class TestDistances:
    def test_signed_distance_is_the_formula_per_image_and_class(self):
        masks = np.stack([disc(), ~disc(), np.zeros((15, 15), bool), np.ones((15, 15), bool)], -1)
        maps = losses.signed_distance_map(masks, axes=(0, 1))
        for i in (0, 1):
            mask = masks[..., i]
            outside, inside = distance_transform_edt(~mask), distance_transform_edt(mask)
            np.testing.assert_allclose(
                maps[..., i], outside * ~mask - (inside - 1) * mask, rtol=1e-6
            )
        assert np.all(maps[..., 2:] == 0)
        assert maps.dtype == np.float32

    def test_spacing_measures_in_other_units(self):
        mask = np.array([[0, 0, 1, 1, 1, 0]])
        np.testing.assert_allclose(
            losses.signed_distance_map(mask, spacing=(1.0, 2.0)), [[4, 2, -1, -3, -1, 2]]
        )

    def test_proximity_and_rectified_maps_are_the_authors_formulas(self):
        mask = disc()
        inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
        expected = np.where(mask, 1 - inside / inside.max(), 1 - outside / outside.max())
        ours = losses.boundary_proximity_map(mask)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        published = -inside / (inside.max() + 1e-15)
        published[published == 0] = 1
        np.testing.assert_allclose(losses.rectified_region_map(mask), published, rtol=1e-6)
        assert np.all(losses.rectified_region_map(np.ones((3, 3))) == -1)
        assert np.all(losses.rectified_region_map(np.zeros((3, 3))) == 1)

    @pytest.mark.parametrize("shape", [(37,), (7, 20), (4, 5, 6)])
    def test_the_transform_on_the_device_is_scipys(self, shape):
        mask = np.random.default_rng(0).uniform(size=shape) < 0.8
        run = jax.jit(losses.euclidean_distance_transform)
        np.testing.assert_allclose(run(mask), distance_transform_edt(mask), rtol=1e-6)
        batch = losses.euclidean_distance_transform(
            jnp.stack([mask, ~mask], -1), axes=tuple(range(len(shape)))
        )
        np.testing.assert_allclose(batch[..., 1], distance_transform_edt(~mask), rtol=1e-6)
        assert np.all(np.isinf(losses.euclidean_distance_transform(np.ones(shape, bool))))
        assert losses.euclidean_distance_transform(np.ones((0, 3), bool)).shape == (0, 3)

    def test_boundary_distance_counts_masked_pixels_as_boundary(self):
        labels = np.zeros((2, 6, 7), int)
        labels[0, :, 4:] = 2
        maps = losses.label_boundary_distance(labels)
        assert np.all(maps[0] == [2, 1, 0, 0, 0, 1, 2])
        assert np.all(maps[1] == 0)
        where = np.arange(7) != 0
        maps = losses.label_boundary_distance(labels, where=where)
        assert np.all(maps[1] == [0, 0, 1, 2, 3, 4, 5])


class TestBins:
    @pytest.mark.parametrize(("truncation", "num_bins"), [(3, 4), (4, 3), (5, 6), (6, 2)])
    def test_bins_decode_to_their_mask(self, truncation, num_bins):
        masks = np.stack([disc(), disc(radius=2), np.zeros((15, 15), bool)])
        numbers = {"truncation": truncation, "num_bins": num_bins, "axes": (1, 2)}
        bins = losses.truncated_distance_bins(masks, **numbers)
        assert bins.max() == num_bins - 1
        assert np.array_equal(bins > 0, masks)
        assert np.array_equal(losses.decode_distance_bins(bins, **numbers), masks)

    def test_every_distance_has_its_bin_and_a_hole_is_filled(self):
        numbers = {"truncation": 3, "num_bins": 4}
        bins = losses.truncated_distance_bins(disc(), **numbers)
        distance = np.minimum(np.ceil(distance_transform_edt(disc())), 3)
        assert np.array_equal(bins, distance)
        bins[6, 7:9] = 0  # missed next to the middle
        assert np.array_equal(losses.decode_distance_bins(bins, **numbers), disc())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: losses.signed_distance_map(m, axes=2), "axes must name axes"),
        (lambda m: losses.signed_distance_map(m, spacing=0.0), "spacing must be in"),
        (lambda m: losses.boundary_proximity_map(m, spacing=(1, 2, 3)), "one value for each of 2"),
        (lambda m: losses.truncated_distance_bins(m, truncation=0, num_bins=2), "truncation must"),
        (lambda m: losses.truncated_distance_bins(m, truncation=3, num_bins=5), "num_bins must"),
        (lambda m: losses.label_boundary_distance(m, where=np.ones(4, bool)), "where must"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(disc())
