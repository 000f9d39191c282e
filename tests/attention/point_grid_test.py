import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.attention import grid_to_points, point_grid_attention, scatter_softmax
from jaxref.attention.point_grid import grid_cells

MAP = np.random.default_rng(9).normal(size=(4, 2)).astype(np.float32)
"""A weight function's matrix: 4 features, 2 groups of 2 channels."""


def weight_fn(relation):
    return jax.nn.relu(relation @ MAP)


def random_inputs(batch=2, points=12, resolution=3, dim=2, seed=0):
    """Keys, values, queries of the grid, and positions."""
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, batch, points, 4))
    queries = rng.normal(size=(batch, *(resolution,) * dim, 4))
    positions = rng.random((batch, points, dim))
    return [x.astype(np.float32) for x in (keys, values, queries, positions)]


attend = partial(point_grid_attention, weight_fn=weight_fn, share_groups=2)


def attention64(keys, values, queries, positions, resolution):
    """The formula cell by cell in float64."""
    batch, _, dim = positions.shape
    grid = np.zeros(queries.shape)
    cells = np.floor(np.asarray(positions, np.float64) * resolution).astype(int)
    for b in range(batch):
        for cell in itertools.product(range(resolution), repeat=dim):
            inside = np.flatnonzero(np.all(cells[b] == cell, axis=-1))
            if inside.size:
                relation = np.asarray(keys[b, inside], np.float64) - queries[(b, *cell)]
                logits = np.maximum(relation @ MAP, 0)
                weights = np.exp(logits) / np.exp(logits).sum(0)
                grid[(b, *cell)] = (np.tile(weights, 2) * values[b, inside]).sum(0)
    return grid


def interpolation64(grid, positions):
    """The formula node by node in float64."""
    resolution = grid.shape[1:-1]
    result = np.zeros((*positions.shape[:2], grid.shape[-1]))
    places = np.clip(np.asarray(positions, np.float64), 0, 1) * (np.array(resolution) - 1)
    for b, i in np.ndindex(positions.shape[:2]):
        for node in np.ndindex(*resolution):
            share = np.maximum(0, 1 - np.abs(places[b, i] - node)).prod()
            result[b, i] += share * grid[(b, *node)]
    return result


class NumbersTest(chex.TestCase):
    """`PointGridBlock` is compared with the authors' layer in tests/nn/point_grid_test.py."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1, 2, 3)
    def test_attention_matches_the_formula(self, dim):
        inputs = random_inputs(dim=dim)
        ours = self.variant(partial(attend, resolution=3))(*inputs)
        np.testing.assert_allclose(ours, attention64(*inputs, 3), rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(((5,),), ((3, 4),), ((3, 1, 2),))
    def test_interpolation_matches_the_formula(self, resolution):
        rng = np.random.default_rng(1)
        grid = rng.normal(size=(2, *resolution, 3)).astype(np.float32)
        positions = rng.uniform(-0.3, 1.3, size=(2, 9, len(resolution))).astype(np.float32)
        positions[:, 0], positions[:, 1] = 0, 1
        ours = self.variant(grid_to_points)(grid, positions)
        np.testing.assert_allclose(ours, interpolation64(grid, positions), rtol=1e-5, atol=1e-6)

    def test_gradients_match_finite_differences_of_the_formula(self):
        inputs = random_inputs(batch=1, points=6, resolution=2)
        cotangent = np.random.default_rng(2).normal(size=(1, 2, 2, 4))
        ours = jax.jit(
            jax.grad(
                lambda *a: jnp.sum(cotangent * attend(*a, inputs[3], resolution=2)),
                argnums=(0, 1, 2),
            )
        )(*inputs[:3])
        directions = random_inputs(batch=1, points=6, resolution=2, seed=3)
        for i, (gradient, direction) in enumerate(zip(ours, directions)):
            moved = []
            for step in (1e-5, -1e-5):
                shifted = [x.astype(np.float64) for x in inputs]
                shifted[i] += step * direction
                moved.append(np.sum(cotangent * attention64(*shifted, 2)))
            expected = (moved[0] - moved[1]) / 2e-5
            np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4)

    def test_interpolation_gradients(self):
        """Exact, as the result is linear in the grid and, within a cell, in each coordinate."""
        rng = np.random.default_rng(1)
        grid, slope = rng.normal(size=(2, 1, 3, 4, 2)).astype(np.float32)
        positions = rng.uniform(0.05, 0.25, size=(1, 5, 2)).astype(np.float32)
        _, pushed = jax.jvp(lambda g: grid_to_points(g, positions), (grid,), (slope,))
        np.testing.assert_allclose(pushed, interpolation64(slope, positions), rtol=1e-5, atol=1e-6)
        for axis in range(2):
            step = np.eye(2, dtype="f")[axis] * np.ones_like(positions)
            _, pushed = jax.jvp(lambda x: grid_to_points(grid, x), (positions,), (step,))
            ahead = interpolation64(grid, positions.astype(np.float64) + 1e-3 * step)
            behind = interpolation64(grid, positions.astype(np.float64) - 1e-3 * step)
            np.testing.assert_allclose(pushed, (ahead - behind) / 2e-3, rtol=1e-4, atol=1e-5)

    def test_softmax_of_segments_with_channels(self):
        logits = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
        ids = np.array([2, 0, 2, 5, -1, 2])
        expected = np.zeros_like(logits)
        for rows in ([0, 2, 5], [1]):
            expected[rows] = jax.nn.softmax(logits[rows], axis=0)
        ours = scatter_softmax(logits, ids, 3)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


class TestClaims:
    @pytest.mark.claim("gridformer")
    def test_a_cell_is_a_weighted_mean_of_its_own_points_in_any_order(self):
        keys, values, queries, positions = random_inputs()
        positions[0] = 0.3 * positions[0]  # one cell has them all ...
        positions[0, 0] = 0.9  # ... but this one, which is alone in another
        grid = attend(keys, values, queries, positions, resolution=3)
        np.testing.assert_array_equal(grid[0, 2, 2], values[0, 0])
        nothing = np.ones((3, 3), bool)
        nothing[0, 0] = nothing[2, 2] = False
        assert np.all(grid[0][nothing] == 0)

        ones = attend(keys, np.ones_like(values), queries, positions, resolution=3)
        occupied = np.any(np.asarray(grid) != 0, axis=-1)
        assert 2 < occupied[1].sum() < 9
        np.testing.assert_allclose(ones[occupied], 1, rtol=1e-6)
        first = values[0, 1:]  # the others do not reach, and weights are positive
        assert np.all((first.min(0) < grid[0, 0, 0]) & (grid[0, 0, 0] < first.max(0)))
        assert np.abs(grid[0, 0, 0] - first.mean(0)).max() > 0.05

        order = np.random.default_rng(1).permutation(12)
        shuffled = attend(
            keys[:, order], values[:, order], queries, positions[:, order], resolution=3
        )
        np.testing.assert_allclose(shuffled, grid, rtol=1e-5, atol=1e-6)

    def test_a_cell_sees_no_other_cell_and_no_other_example(self):
        keys, values, queries, positions = random_inputs()
        cells, _ = grid_cells(positions, 3)
        assert np.unique(cells[0]).size > 2
        jacobian = jax.jacobian(
            lambda values: attend(keys, values, queries, positions, resolution=3)
        )(values)
        reached = np.any(np.asarray(jacobian) != 0, axis=(3, 6)).reshape(2, 9, 2, 12)
        expected = np.zeros_like(reached)
        for b, i in np.ndindex(2, 12):
            expected[b, cells[b, i], b, i] = True
        np.testing.assert_array_equal(reached, expected)

    def test_weights_are_shared_by_the_groups(self):
        keys, values, queries, positions = random_inputs()
        values[..., 2:] = 3 * values[..., :2]
        grid = attend(keys, values, queries, positions, resolution=3)
        np.testing.assert_allclose(grid[..., 2:], 3 * grid[..., :2], rtol=1e-5, atol=1e-6)

    def test_linear_functions_are_read_exactly(self):
        nodes = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in (3, 5)), indexing="ij"), -1)
        grid = np.asarray(nodes @ np.array([[2.0], [-3.0]]), np.float32)[None]
        positions = random_inputs()[3][:1]
        expected = positions @ np.array([[2.0], [-3.0]])
        np.testing.assert_allclose(grid_to_points(grid, positions), expected, atol=1e-6)


class TestTransformations:
    def test_vmap_and_a_sharded_batch(self):
        inputs = random_inputs(batch=8)

        @jax.jit
        def there_and_back(keys, values, queries, positions):
            return grid_to_points(attend(keys, values, queries, positions, resolution=3), positions)

        expected = there_and_back(*inputs)
        alone = jax.vmap(lambda *a: there_and_back(*(x[None] for x in a))[0])(*inputs)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        placed = [jax.device_put(x, sharding) for x in inputs]
        assert "all-" not in there_and_back.lower(*placed).compile().as_text()
        ours = there_and_back(*placed)
        assert ours.sharding.is_equivalent_to(sharding, 3)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


class TestEdges:
    def test_coordinates_outside_count_for_the_cell_at_the_border(self):
        x = np.array([[-0.4, 0.999], [0.0, 1.0], [0.1, 7.0], [0.34, -1e4]], np.float32)
        cells, offsets = grid_cells(x, 3)
        np.testing.assert_array_equal(cells, [2, 2, 2, 3])
        expected = [[0, 0.999 - 2 / 3], [0, 1 / 3], [0.1, 1 / 3], [0.34 - 1 / 3, 0]]
        np.testing.assert_allclose(offsets, expected, atol=1e-6)

    def test_huge_logits_and_no_points(self):
        keys, values, queries, positions = random_inputs(points=6)
        keys[0], values[1] = 1e4, 0
        positions[1] = 0.5
        loss = lambda *a: jnp.sum(attend(*a, positions, resolution=3) ** 2)
        value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        value, gradients = value_and_grad(keys, values, queries)
        chex.assert_tree_all_finite((value, gradients))
        logits = np.array([1e4, -1e4, -1e4, 1e4], np.float32)
        softmax = lambda logits: scatter_softmax(logits, np.array([0, 0, 1, 7]), 2)
        np.testing.assert_array_equal(softmax(logits), [1, 0, 1, 0])
        assert np.all(np.isfinite(jax.jacobian(softmax)(logits)))
        none = attend(keys[:, :0], values[:, :0], queries, positions[:, :0], resolution=3)
        np.testing.assert_array_equal(none, np.zeros_like(queries))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        keys, values, queries, positions = random_inputs()
        half = [jnp.asarray(x, dtype) for x in (keys, values, queries)]
        run = jax.jit(
            lambda *a: (
                attend(*a, positions, resolution=3),
                grid_to_points(a[2], positions),
                scatter_softmax(a[0][0], jnp.zeros(12, int), 1),
            )
        )
        grid, points, softmax = run(*half)
        exact, exact_points, _ = run(*(x.astype(jnp.float32) for x in half))
        assert grid.dtype == points.dtype == softmax.dtype == dtype
        tolerance = 16 * float(jnp.finfo(dtype).eps)
        for ours, expected in ((grid, exact), (points, exact_points)):
            ours = ours.astype(jnp.float32)
            np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"resolution": 0}, ValueError, "resolution must be in"),
        ({"resolution": 4}, ValueError, r"grid_queries must have shape \(2, 4, 4, 4\)"),
        ({"share_groups": 3}, ValueError, "share_groups must divide 4 features"),
        ({"share_groups": 0}, ValueError, "share_groups must be in"),
        ({"positions": np.zeros((2, 5, 2), "f")}, ValueError, r"positions must have shape \[2, 12"),
        ({"positions": np.zeros((2, 12, 3), "f")}, ValueError, "grid_queries must have shape"),
        ({"positions": np.zeros((2, 12, 0), "f")}, ValueError, "positions must have shape"),
        ({"positions": np.zeros((2, 12, 2), int)}, TypeError, "positions must have a floating"),
        ({"point_keys": np.zeros((12, 4), "f")}, ValueError, "point_keys must have shape"),
        ({"point_values": np.zeros((2, 12, 3), "f")}, ValueError, "point_values must have shape"),
        ({"weight_fn": lambda x: x}, ValueError, r"weight_fn returns must have shape \(2, 12, 2\)"),
    ],
)
def test_bad_input_of_attention_is_named(change, error, message):
    names = ("point_keys", "point_values", "grid_queries", "positions")
    given = dict(zip(names, random_inputs()))
    given |= {"weight_fn": weight_fn, "resolution": 3, "share_groups": 2, **change}
    with pytest.raises(error, match=message):
        point_grid_attention(**given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scatter_softmax(np.zeros(3, "f"), np.zeros(2, int), 2), ValueError, "segment_ids"),
        (lambda: scatter_softmax(np.zeros(3, "f"), np.zeros(3, "f"), 2), TypeError, "segment_ids"),
        (lambda: scatter_softmax(np.zeros(3, int), np.zeros(3, int), 2), TypeError, "logits"),
        (lambda: scatter_softmax(np.float32(0), np.zeros((), int), 2), ValueError, "logits"),
        (lambda: scatter_softmax(np.zeros(3, "f"), np.zeros(3, int), 0), ValueError, "num_segm"),
        (
            lambda: grid_to_points(np.zeros((2, 3), "f"), np.zeros((2, 4, 1), "f")),
            ValueError,
            "gri",
        ),
        (
            lambda: grid_to_points(np.zeros((2, 0, 3), "f"), np.zeros((2, 4, 1), "f")),
            ValueError,
            "grid must have shape",
        ),
        (
            lambda: grid_to_points(np.zeros((2, 3, 3, 1), "f"), np.zeros((2, 4, 3), "f")),
            ValueError,
            r"positions must have shape \[2, points, 2\]",
        ),
    ],
)
def test_bad_input_of_the_others_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
