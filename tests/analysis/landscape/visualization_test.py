import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.analysis.landscape.visualization import (
    LandscapeGrid,
    curvature_ratio,
    loss_line,
    loss_plane,
    plot_landscape,
    random_direction,
    trajectory_pca_directions,
)

ALPHAS = np.linspace(-1, 1, 9).astype(np.float32)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mlp(width=8, seed=0):
    """A network with one hidden layer, and the names of what it is made of."""
    return {
        "in": random(5, width, seed=seed) * np.linspace(0.2, 2, width, dtype=np.float32),
        "bias": random(width, seed=seed + 1),
        "out": random(width, 3, seed=seed + 2),
    }


def mlp_loss(params, np=jnp):
    x, y = random(20, 5, seed=7), random(20, 3, seed=8)
    hidden = np.maximum(x @ params["in"] + params.get("bias", 0), 0)
    return np.mean((hidden @ params["out"] - y) ** 2)


def move(params, *steps):
    """θ + Σ α d in float64."""
    return {
        k: np.float64(w) + sum(a * np.float64(d[k]) for a, d in steps) for k, w in params.items()
    }


def normalized(z, theta, how, filter_axes=(-1,)):
    """One array of a direction from its normal draw, filter by filter, in float64."""
    z, theta = np.float64(z), np.float64(theta)
    if how == "weight":
        return np.abs(theta) * z
    if how == "layer":
        return z * np.linalg.norm(theta) / np.linalg.norm(z)
    d = np.zeros_like(z)
    axes = [axis % z.ndim for axis in filter_axes]
    for channel in np.ndindex(*(z.shape[axis] for axis in axes)):
        where = [slice(None)] * z.ndim
        for axis, i in zip(axes, channel):
            where[axis] = i
        part = tuple(where)
        d[part] = z[part] * np.linalg.norm(theta[part]) / np.linalg.norm(z[part])
    return d


class TestRandomDirection:
    def test_is_the_normal_draw_at_the_size_of_the_weights(self):
        params = {"conv": random(3, 3, 2, 4), "heads": random(4, 2, 3), "bias": random(4)}
        hows = [
            ("filter", -1),
            ("filter", 0),
            ("filter", (-2, -1)),
            ("layer", -1),
            ("weight", -1),
        ]
        key = jax.random.key(0)

        @jax.jit
        def draw(params):
            z = random_direction(params, key, normalization="none", ignore_vectors=False)
            return z, [
                random_direction(params, key, normalization=how, filter_axes=axes)
                for how, axes in hows
            ]

        z, directions = draw(params)
        for (how, axes), ours in zip(hows, directions):
            np.testing.assert_array_equal(ours["bias"], 0)
            for name in ("conv", "heads"):
                listed = (axes,) if isinstance(axes, int) else axes
                expected = normalized(z[name], params[name], how, listed)
                np.testing.assert_allclose(ours[name], expected, rtol=2e-5, atol=1e-6)

    def test_draws_are_normal_and_nearly_orthogonal(self):
        keys = jax.random.split(jax.random.key(1), 200)
        shape = {"a": np.zeros((40, 5), "f"), "b": np.zeros((20, 10), "f")}
        z = jax.jit(jax.vmap(lambda k: random_direction(shape, k, normalization="none")))(keys)
        z = np.concatenate([np.reshape(x, (200, 200)) for x in z.values()], axis=1)
        np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=0.01)
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(200, 1)]
        np.testing.assert_allclose(np.abs(cosines).mean(), np.sqrt(2 / (np.pi * 400)), rtol=0.03)

    def test_vectors_that_are_not_ignored_go_along_themselves(self):
        params = mlp()
        d = random_direction(params, jax.random.key(0), ignore_vectors=False)
        np.testing.assert_array_equal(d["bias"], params["bias"])
        z = random_direction(params, jax.random.key(0), ignore_vectors=False, normalization="none")
        assert np.all(z["bias"] != params["bias"])

    def test_edges(self):
        kernel = np.float32([[0, 1e30, 1e-30, 3], [0, 1e30, 0, 4]])
        params = {"k": kernel, "empty": np.zeros((0, 3), "f"), "half": jnp.ones((4, 2), "bfloat16")}
        d = jax.jit(random_direction)(params, jax.random.key(0))
        norms = np.linalg.norm(np.float64(d["k"]), axis=0)
        np.testing.assert_allclose(norms, [0, np.sqrt(2) * 1e30, 1e-30, 5], rtol=1e-5)
        assert d["empty"].shape == (0, 3)
        assert d["half"].dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(d["half"], axis=0), 2, rtol=1e-6)

    def test_of_sharded_parameters(self):
        params = {"kernel": random(16, 8)}
        expected = random_direction(params, jax.random.key(0))
        mesh = jax.make_mesh((8,), ("model",))
        for spec in (P("model"), P(None, "model")):
            sharded = jax.device_put(params, NamedSharding(mesh, spec))
            ours = jax.jit(random_direction)(sharded, jax.random.key(0))
            np.testing.assert_allclose(ours["kernel"], expected["kernel"], rtol=1e-5)


def rescaled(params, scale):
    """The same function: hidden neurons made larger, and their outputs counted for less."""
    return {"in": params["in"] * scale, "out": params["out"] / np.reshape(scale, (-1, 1))}


@pytest.mark.claim("loss-landscape-visualization")
def test_a_rescaled_network_looks_the_same_with_filter_normalization_and_sharp_or_flat_without():
    params = {name: w for name, w in mlp().items() if name != "bias"}
    layers, neurons = np.full(8, np.float32(10)), np.geomspace(0.1, 10, 8, dtype=np.float32)
    networks = [rescaled(params, scale) for scale in (np.ones(8, "f"), layers, neurons)]
    losses = [mlp_loss(p) for p in networks]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)

    @jax.jit
    def curves(networks):
        def curve(p, how):
            d = random_direction(p, jax.random.key(3), normalization=how)
            return loss_line(mlp_loss, p, d, ALPHAS)

        hows = ("none", "layer", "filter", "weight")
        return {how: jnp.stack([curve(p, how) for p in networks]) for how in hows}

    seen = curves(networks)
    for how in ("layer", "filter", "weight"):
        np.testing.assert_allclose(seen[how][1], seen[how][0], rtol=1e-4)
    rise = seen["none"].max(axis=1) - seen["none"][:, 4]
    assert rise[1] > 20 * rise[0]
    # Neurons scaled one by one are more than filters undo: only "weight" does.
    np.testing.assert_allclose(seen["weight"][2], seen["weight"][0], rtol=1e-4)
    assert not np.allclose(seen["filter"][2], seen["filter"][0], rtol=0.05)


class LossLineTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_lines_and_planes_are_the_loss_point_by_point(self):
        params, d1, d2 = mlp(), mlp(seed=3), mlp(seed=6)
        betas = np.float32([0, 0.5])
        line = self.variant(lambda p, d: loss_line(mlp_loss, p, d, ALPHAS, chunk=4))(params, d1)
        plane = self.variant(
            lambda p, d1, d2: loss_plane(mlp_loss, p, d1, d2, ALPHAS, betas, chunk=50)
        )(params, d1, d2)
        expected = [[mlp_loss(move(params, (a, d1), (b, d2)), np) for b in betas] for a in ALPHAS]
        np.testing.assert_allclose(plane.losses, expected, rtol=1e-5)
        np.testing.assert_allclose(line, plane.losses[:, 0], rtol=1e-6)
        np.testing.assert_allclose(line[4], mlp_loss(params), rtol=1e-6)
        np.testing.assert_array_equal(plane.alphas, ALPHAS)
        np.testing.assert_array_equal(plane.betas, betas)
        chex.assert_trees_all_equal(plane.d1, d1)
        chex.assert_trees_all_equal(plane.d2, d2)


class TestLossLine:
    def test_evaluates_a_chunk_at_once(self):
        seen = lambda chunk: jax.make_jaxpr(
            lambda p: loss_line(lambda p: jnp.sin(p)[0], p, p, ALPHAS[:8], chunk=chunk)
        )(np.ones(1, "f"))
        assert "length=2" in str(seen(4))
        assert "length=8" in str(seen(1))

    def test_of_a_quadratic_is_the_quadratic_form(self):
        root = random(6, 6)
        hessian = root @ root.T
        loss = lambda w: 0.5 * w["a"].reshape(-1) @ hessian @ w["a"].reshape(-1)
        d1, d2 = ({"a": random(2, 3, seed=s)} for s in (1, 2))
        grid = loss_plane(loss, {"a": np.zeros((2, 3), "f")}, d1, d2, ALPHAS, ALPHAS)
        plane = np.stack([d["a"].reshape(-1) for d in (d1, d2)])
        form = np.float64(plane) @ hessian @ plane.T
        points = np.stack(np.meshgrid(ALPHAS, ALPHAS, indexing="ij"), axis=-1)
        expected = 0.5 * np.einsum("ijk,kl,ijl->ij", points, form, points)
        np.testing.assert_allclose(grid.losses, expected, rtol=1e-4, atol=1e-5)

    def test_ends_at_the_other_model_and_its_slope_is_that_of_the_loss(self):
        a, b = mlp(), mlp(seed=3)
        direction = jax.tree.map(np.subtract, b, a)
        line = lambda alpha: loss_line(mlp_loss, a, direction, alpha[None])[0]
        value, slope = jax.jit(jax.value_and_grad(line))(jnp.float32(1))
        np.testing.assert_allclose(value, mlp_loss(b), rtol=1e-5)
        gradient = jax.grad(mlp_loss)(b)
        expected = sum(np.sum(gradient[k] * direction[k]) for k in a)
        np.testing.assert_allclose(slope, expected, rtol=1e-4)

    def test_half_precision_is_rounded_once(self):
        theta, d = jnp.ones(3, jnp.bfloat16), jnp.full(3, 1 + 2**-10, jnp.float32)
        loss = lambda w: jnp.sum(w.astype(jnp.float32)) + 0 * jnp.sum(w == theta)
        ours = loss_line(loss, theta, d, [0.0, 2.0**-9, 2.0**-7])
        assert ours.dtype == jnp.float32
        expected = [3, 3, 3 * (1 + 2**-7)]
        np.testing.assert_array_equal(ours, expected)

    def test_sharded_over_the_batch(self):
        params, d = mlp(), mlp(seed=3)
        x = random(16, 5)

        def line(x):
            return loss_line(lambda p: jnp.mean(jnp.tanh(x @ p["in"])), params, d, ALPHAS, chunk=3)

        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        expected = line(x)
        np.testing.assert_allclose(jax.jit(line)(jax.device_put(x, sharding)), expected, rtol=1e-5)


class TrajectoryPcaDirectionsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_singular_vectors(self):
        path = {"a": np.cumsum(random(7, 4, 5), axis=0), "b": random(7, 3, seed=1)}
        final = {"a": random(4, 5, seed=2), "b": random(3, seed=3)}
        flat = lambda tree, n: np.concatenate(
            [np.reshape(np.float64(x), (*n, -1)) for x in tree.values()], axis=-1
        )
        moved = flat(path, (7,)) - flat(final, ())
        for center in (True, False):
            rows = moved - moved.mean(axis=0) if center else moved
            _, s, v = np.linalg.svd(rows, full_matrices=False)
            v *= np.where(v @ moved[0] < 0, -1, 1)[:, None]
            ours = self.variant(
                lambda p, f, center=center: trajectory_pca_directions(p, f, center=center)
            )(path, final)
            for d, expected in zip((ours.d1, ours.d2), v):
                np.testing.assert_allclose(flat(d, ()), expected, atol=2e-5)
            np.testing.assert_allclose(ours.explained, (s**2 / np.sum(s**2))[:2], rtol=1e-5)
            np.testing.assert_allclose(ours.coordinates, moved @ v[:2].T, atol=1e-4)


class TestTrajectoryPcaDirections:
    def test_a_straight_path_has_one_direction(self):
        start, final = random(30), random(30, seed=1)
        path = start + np.linspace(0, 1, 6)[:, None].astype("f") * (final - start)
        for center in (True, False):
            plane = trajectory_pca_directions(path, final, center=center)
            np.testing.assert_allclose(plane.explained, [1, 0], atol=1e-6)
            towards = (start - final) / np.linalg.norm(start - final)
            np.testing.assert_allclose(plane.d1, towards, atol=1e-5)
            np.testing.assert_allclose(np.dot(plane.d1, plane.d2), 0, atol=1e-5)
            np.testing.assert_allclose(plane.coordinates[:, 1], 0, atol=1e-5)
            np.testing.assert_allclose(plane.coordinates[-1], 0, atol=1e-5)

    def test_a_small_second_direction_is_exact(self):
        path = np.zeros((3, 4), "f")
        path[0, 0], path[1, 1] = 1, 1e-4
        plane = trajectory_pca_directions(path, np.zeros(4, "f"), center=False)
        np.testing.assert_allclose(plane.d2, [0, 1, 0, 0], atol=1e-6)
        np.testing.assert_allclose(plane.explained, [1, 1e-8], rtol=1e-5)

    def test_a_path_that_does_not_move(self):
        plane = trajectory_pca_directions(np.ones((3, 4), "f"), np.ones(4, "f"))
        for value in jax.tree.leaves(plane):
            np.testing.assert_array_equal(value, 0)

    def test_bfloat16_is_computed_in_float32(self):
        path = jnp.asarray(random(5, 6), jnp.bfloat16)
        ours = trajectory_pca_directions(path, path[-1])
        expected = trajectory_pca_directions(path.astype("f"), path[-1].astype("f"))
        assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
        chex.assert_trees_all_close(ours, expected)


class TestCurvatureRatio:
    def test_matches_the_eigenvalues_along_a_line(self):
        params, d = mlp(width=3), mlp(width=3, seed=3)
        smooth = lambda p: mlp_loss({**p, "out": jnp.sin(p["out"])})
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        points = np.stack([flat + a * jax.flatten_util.ravel_pytree(d)[0] for a in (0, 0.5, 1)])

        def at(x):
            theta = unravel(x)
            hvp = lambda v: jax.jvp(jax.grad(smooth), (theta,), (v,))[1]
            return curvature_ratio(hvp, theta, key=jax.random.key(0))

        ours = jax.jit(lambda xs: jax.lax.map(at, xs))(points)
        hessians = jax.jit(jax.vmap(jax.hessian(lambda x: smooth(unravel(x)))))(points)
        values = np.linalg.eigvalsh(np.float64(hessians))
        assert np.all(values[:, 0] < 0)
        np.testing.assert_allclose(ours.lambda_max, values[:, -1], rtol=1e-4)
        np.testing.assert_allclose(ours.lambda_min, values[:, 0], rtol=1e-3)
        np.testing.assert_allclose(ours.ratio, np.abs(values[:, 0] / values[:, -1]), rtol=2e-3)

    @pytest.mark.parametrize(
        ("diagonal", "expected"),
        [([2.0, 1.0], 0.5), ([-1.0, -4.0], 4.0), ([0.0, 0.0], 0.0), ([0.0, -2.0], 1e6)],
    )
    def test_at_the_edges(self, diagonal, expected):
        hvp = lambda v: np.float32(diagonal) * v
        ours = curvature_ratio(hvp, np.zeros(2, "f"), key=jax.random.key(0))
        np.testing.assert_allclose(np.minimum(ours.ratio, 1e6), expected, rtol=1e-5)


class TestPlotLandscape:
    grid = LandscapeGrid(ALPHAS, ALPHAS[:5], ALPHAS[:, None] ** 2 + 0 * ALPHAS[:5], None, None)

    def test_lines_are_where_the_loss_is(self):
        levels = [0.25, 0.5, 0.75]
        ax = plot_landscape(self.grid, levels=levels)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("α", "β")
        lines = ax.collections[0]
        np.testing.assert_allclose(lines.levels, levels)
        quarter = lines.get_paths()[0].vertices
        np.testing.assert_allclose(np.abs(quarter[:, 0]), 0.5, atol=1e-6)
        assert (quarter[:, 1].min(), quarter[:, 1].max()) == (-1, 0)
        assert plot_landscape(self.grid, ax=ax) is ax
        for count in (3, 20):
            levels = plot_landscape(self.grid, levels=count).collections[0].levels
            assert count / 2 < np.sum((levels > 0) & (levels < 1)) + 2 <= count + 1

    def test_surface(self):
        ax = plot_landscape(self.grid, "surface")
        assert ax.name == "3d"
        assert ax.get_zlabel() == "loss"
        assert ax.get_xlim()[1] >= 1 > ax.get_ylim()[1]

    def test_what_is_not_finite_is_left_out(self):
        losses = np.array(self.grid.losses)
        losses[0], losses[-1] = np.inf, np.nan
        for kind in ("contour", "surface"):
            ax = plot_landscape(self.grid._replace(losses=losses), kind)
            ax.figure.draw_without_rendering()
        assert not np.any(np.isnan(plot_landscape(self.grid).collections[0].levels))


def test_bad_input_is_named():
    params, key = mlp(), jax.random.key(0)
    other = {**params, "in": random(5, 9)}
    bare = {"in": params["in"]}
    integers = {"a": np.arange(3)}
    grid = TestPlotLandscape.grid
    flat = plot_landscape(grid)
    line = lambda *args, **kwargs: loss_line(mlp_loss, *args, **kwargs)
    plane = lambda *args: loss_plane(mlp_loss, *args)
    for f, error, message in [
        (
            lambda: random_direction(params, key, normalization="x"),
            ValueError,
            "must be one of fil",
        ),
        (lambda: random_direction(params, key, filter_axes=2), ValueError, "filter_axes must name"),
        (lambda: random_direction(integers, key), TypeError, r"params\['a'\] must have a floating"),
        (lambda: line(params, other, ALPHAS), ValueError, r"direction\['in'\] must have shape"),
        (lambda: line(params, bare, ALPHAS), ValueError, "direction must have the tree structure"),
        (lambda: line(params, params, 1.0), ValueError, r"alphas must have shape \[n\], got \(\)"),
        (lambda: line(params, params, ALPHAS, chunk=0), ValueError, "chunk must be in"),
        (
            lambda: line(integers, integers, ALPHAS),
            TypeError,
            r"params\['a'\] must have a floating",
        ),
        (lambda: plane(params, other, params, ALPHAS, ALPHAS), ValueError, r"d1\['in'\] must have"),
        (lambda: plane(params, params, other, ALPHAS, ALPHAS), ValueError, r"d2\['in'\] must have"),
        (lambda: plane(params, params, params, ALPHAS, [ALPHAS]), ValueError, "betas must have sh"),
        (lambda: trajectory_pca_directions(params, params), ValueError, "one first axis of 2 or"),
        (lambda: trajectory_pca_directions(random(1, 3), random(3)), ValueError, "or more, got"),
        (
            lambda: trajectory_pca_directions(random(4, 3), random(2)),
            ValueError,
            r"checkpoints must have shape \(4, 2\), got \(4, 3\)",
        ),
        (lambda: trajectory_pca_directions(random(4, 3), np.arange(3)), TypeError, "final must"),
        (
            lambda: curvature_ratio(lambda v: v, params, num_steps=0, key=key),
            ValueError,
            "num_steps must be in",
        ),
        (lambda: plot_landscape(grid, "bars"), ValueError, "kind must be 'contour' or 'surface'"),
        (lambda: plot_landscape(grid, "surface", ax=flat), ValueError, "ax must have projection"),
        (
            lambda: plot_landscape(grid._replace(losses=np.zeros((1, 5)))),
            ValueError,
            r"finite losses, two or more each way, got \(1, 5\)",
        ),
        (
            lambda: plot_landscape(grid._replace(losses=np.full((9, 5), np.nan))),
            ValueError,
            "got .*, 0 of them finite",
        ),
    ]:
        with pytest.raises(error, match=message):
            f()
