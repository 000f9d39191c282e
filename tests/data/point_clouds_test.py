from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.data import boundary_mask

RELEASE = np.load(Path(__file__).parents[1] / "oracles" / "gridformer.npz")
POINTS, OCCUPANCY = RELEASE["boundary_points"], RELEASE["boundary_occupancy"]


def mask64(points, occupancy, radius, neighbors):
    """The nearest neighbours one point at a time."""
    kept = []
    for point, own in zip(points, occupancy):
        distances = np.linalg.norm(points - point, axis=-1)
        nearest = np.argsort(distances)[:neighbors]
        kept.append(np.any((occupancy[nearest] != own) & (distances[nearest] < radius)))
    return np.array(kept)


class BoundaryTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_release(self):
        ours = self.variant(boundary_mask)(POINTS, OCCUPANCY)
        np.testing.assert_array_equal(ours, RELEASE["boundary_mask"])
        for wider in ({"radius": 9.0}, {"neighbors": 240}):  # both limits decide there
            assert np.sum(boundary_mask(POINTS, OCCUPANCY, **wider)) > ours.sum() + 10

    def test_limits_and_blocks_match_a_loop(self):
        points = np.random.default_rng(1).random((600, 2))
        occupancy = np.linalg.norm(points - 0.5, axis=-1) < 0.3
        for radius, neighbors in ((0.1, 4), (0.03, 100), (5.0, 1)):
            ours = boundary_mask(
                points.astype("f"), occupancy.astype(int), radius=radius, neighbors=neighbors
            )
            expected = mask64(points, occupancy, radius, neighbors)
            np.testing.assert_array_equal(ours, expected)

    def test_vmap(self):
        points = np.stack([POINTS, 2 * POINTS])
        ours = jax.vmap(lambda points: boundary_mask(points, OCCUPANCY))(points)
        np.testing.assert_array_equal(ours[0], RELEASE["boundary_mask"])
        np.testing.assert_array_equal(ours[1], boundary_mask(points[1], OCCUPANCY))


def test_one_point_equal_points_and_one_side():
    assert boundary_mask(np.zeros((1, 3), "f"), np.array([True])).tolist() == [False]
    assert not np.any(boundary_mask(POINTS, np.ones(240, bool)))
    same = np.full((4, 3), 1e4, np.float32)
    assert np.all(boundary_mask(same, np.array([0, 1, 1, 1])))
    half = boundary_mask(jnp.zeros((2, 1), jnp.bfloat16), np.array([0, 1]))
    assert np.all(half)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": POINTS[0]}, ValueError, r"points must have shape \[points, dim\]"),
        ({"points": POINTS.astype(int)}, TypeError, "points must have a floating-point"),
        ({"occupancy": OCCUPANCY[:3]}, ValueError, r"occupancy must have shape \(240,\)"),
        ({"occupancy": OCCUPANCY.astype("f")}, TypeError, "occupancy must be boolean or integers"),
        ({"radius": 0.0}, ValueError, "radius must be in"),
        ({"neighbors": 0}, ValueError, "neighbors must be in"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        boundary_mask(**{"points": POINTS, "occupancy": OCCUPANCY, **change})
