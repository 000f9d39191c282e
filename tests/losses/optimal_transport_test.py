from functools import partial
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.optimize import linear_sum_assignment

from jaxref import losses

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "optimal_transport.npz")
EQUAL = np.ones(6, "f")


@jax.jit
def weighted_divergence(x, y, weights_x, weights_y, blur):
    return jax.value_and_grad(losses.sinkhorn_divergence, argnums=(0, 1))(
        x, y, weights_x=weights_x, weights_y=weights_y, blur=blur
    )


def divergence(x, y, *, weights_x=EQUAL, weights_y=EQUAL, blur=0.5):
    """The divergence of six points from six others, and its gradients in both; one program."""
    return weighted_divergence(x, y, weights_x, weights_y, blur)


@jax.jit
def transport(x, y, weights_x, weights_y, epsilon):
    def cost(x, y):
        found = losses.entropic_optimal_transport(
            x, y, epsilon=epsilon, iterations=200, weights_x=weights_x, weights_y=weights_y
        )
        return found.cost, found

    return jax.value_and_grad(cost, argnums=(0, 1), has_aux=True)(x, y)


alignment = partial(losses.stack_alignment_loss, num_domains=3, blur=0.3, iterations=60)
alignment_and_slopes = jax.jit(jax.value_and_grad(alignment))


def two_clouds(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(6, 3)).astype("f"), (rng.normal(size=(6, 3)) + 1).astype("f")


def plan64(x, y, a, b, epsilon):
    """The optimal plan by 5000 steps of Sinkhorn's iteration in float64."""
    kernel = np.exp(-np.square(np.float64(x)[:, None] - y).sum(-1) / 2 / epsilon)
    v = np.ones(len(y))
    for _ in range(5000):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v


class TestNumbers:
    @pytest.mark.parametrize("case", ["uniform", "weighted"])
    @pytest.mark.parametrize("blur", [0.3, 1.0])
    def test_values_and_gradients_match_geomloss(self, case, blur):
        x, y, a, b = (ORACLE[name] for name in ("x", "y", "weights_x", "weights_y"))
        if case == "uniform":
            a, b = 3 * EQUAL, EQUAL  # scaled to the sum 1
        value, slopes = divergence(x, y, weights_x=a, weights_y=b, blur=blur)
        (cost, found), cost_slopes = transport(x, y[:5], a, b[:5], blur**2)
        for name, ours, gradients in (
            ("divergence", value, slopes),
            ("transport", cost, cost_slopes),
        ):
            np.testing.assert_allclose(ours, ORACLE[f"{case}/{blur}/{name}"], rtol=1e-4)
            for points, gradient in zip("xy", gradients):
                expected = ORACLE[f"{case}/{blur}/{name}/{points}"]  # which is not quite the end
                np.testing.assert_allclose(gradient, expected, atol=2e-3)
        a, b = np.float64(a) / a.sum(), np.float64(b[:5]) / b[:5].sum()
        dual = a @ found.potential_x + b @ found.potential_y
        np.testing.assert_allclose(dual, cost, rtol=1e-4)
        plan = plan64(x, y[:5], a, b, blur**2)
        exact = (plan[..., None] * (x[:, None] - y[:5])).sum(1)
        np.testing.assert_allclose(cost_slopes[0], exact, atol=1e-4)


class TestDivergence:
    def test_is_0_of_equal_clouds_symmetric_and_positive(self):
        for seed in range(5):
            x, y = two_clouds(seed=seed)
            forth, back = divergence(x, y)[0], divergence(y, x)[0]
            np.testing.assert_allclose(forth, back, rtol=1e-5)
            assert forth > 0
            value, slopes = divergence(x, x)
            assert abs(value) < 1e-6
            np.testing.assert_allclose(slopes, np.zeros((2, 6, 3)), atol=1e-5)

    @pytest.mark.parametrize("blur", [0.05, 0.5, 20.0])
    def test_a_translate_is_half_its_squared_length_away_at_any_blur(self, blur):
        x, _ = two_clouds()
        value, (slope, _) = divergence(x, x + np.array([3, 4, 0], "f"), blur=blur)
        np.testing.assert_allclose(value, 12.5, rtol=1e-4)
        np.testing.assert_allclose(slope, np.tile([-3 / 6, -4 / 6, 0], (6, 1)), atol=1e-3)

    def test_a_small_blur_matches_points_and_a_large_one_means(self):
        x, y = two_clouds()
        costs = np.square(x[:, None] - y).sum(-1) / 2
        near, _ = divergence(x, y, blur=0.02)
        matched = costs[linear_sum_assignment(costs)].mean()
        np.testing.assert_allclose(near, matched, rtol=1e-2)
        far, _ = divergence(x, y, blur=1e4)
        means = np.square(x.mean(0) - y.mean(0)).sum() / 2
        np.testing.assert_allclose(far, means, rtol=1e-4)

    def test_descent_moves_a_cloud_onto_another_where_plain_transport_shrinks_it(self):
        x, y = two_clouds()
        onto = shrunk = x
        for _ in range(20):
            onto = onto - 6 * 0.7 * divergence(onto, y, blur=1.0)[1][0]
            shrunk = shrunk - 6 * 0.7 * transport(shrunk, y[:5], EQUAL, EQUAL[:5], 1.0)[1][0]
        spread = lambda z: np.square(z - z.mean(0)).mean()
        assert divergence(onto, y, blur=1.0)[0] < 0.02 * divergence(x, y, blur=1.0)[0]
        np.testing.assert_allclose(spread(onto), spread(y), rtol=0.1)
        assert spread(shrunk) < 0.6 * spread(y[:5])


class TestAlignment:
    def test_is_the_sum_of_the_greatest_divergences_between_domains(self):
        """Of two channels, which are further samples of an example's domain."""
        rng = np.random.default_rng(0)
        ids = np.repeat([0, 1, 2], 3)
        each = np.repeat(ids, 2)
        flat = [(2 * rng.normal(size=(18, w)) + each[:, None]).astype("f") for w in (3, 3)]
        flat[1][:, 1] -= 3 * each
        apart = lambda stacks: [stack.reshape(9, 2, 3) for stack in stacks]
        run = alignment_and_slopes
        value, slopes = run(apart(flat), ids)
        expected, gradients = 0, []
        for stack in flat:
            shares, vjp = jax.vjp(jax.nn.softmax, stack)
            pairs = {
                (i, j): divergence(shares[each == i], shares[each == j], blur=0.3)
                for i, j in combinations(range(3), 2)
            }
            pair = max(pairs, key=lambda pair: pairs[pair][0])
            expected += pairs[pair][0]
            cotangent = np.zeros(stack.shape, "f")
            for domain, slope in zip(pair, pairs[pair][1]):
                cotangent[each == domain] = slope
            gradients.append(vjp(cotangent)[0])
        np.testing.assert_allclose(value, expected, rtol=1e-3)
        np.testing.assert_allclose(slopes, apart(gradients), rtol=1e-2, atol=1e-5)
        same = [np.concatenate([stack[:6]] * 3) for stack in flat]
        value, slopes = run(apart(same), ids)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(slopes, np.zeros((2, 9, 2, 3)), atol=1e-5)
        value, slopes = run(apart(flat), np.zeros(9, int))  # one domain
        assert value == 0
        assert not np.any(slopes)
        assert np.isnan(run(apart(flat), ids - 1)[0])

    def test_fewer_than_two_domains_or_no_example_is_0(self):
        features = np.ones((8, 3), "f")
        assert losses.stack_alignment_loss([features], np.zeros(8, int)) == 0
        assert losses.stack_alignment_loss([features[:0]], np.zeros(0, int)) == 0


class TestShards:
    def test_clouds_over_eight_devices(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(2, 16, 2)).astype("f")
        y, weights = y[:8] + 1, rng.uniform(size=16).astype("f")

        def cost(x, y, weights, axis_name=None):
            return losses.sinkhorn_divergence(
                x, y, weights_x=weights, blur=0.5, iterations=4, axis_name=axis_name
            )

        data = PartitionSpec("data")
        sharded = jax.shard_map(
            partial(cost, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(data,) * 3,
            out_specs=PartitionSpec(),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, y, weights)
            for f in (sharded, cost)
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
        for mine, theirs in zip(found[1], expected[1]):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)

    def test_a_batch_of_stacks_in_parts(self):
        rng = np.random.default_rng(0)
        features = [*rng.normal(size=(2, 9, 2, 3)).astype("f")]
        ids = np.array([0, 2, 2, 2, 2, 0, 0, 0, 0])  # no example of domain 1
        whole, _ = alignment_and_slopes(features, ids)
        parts = jax.vmap(partial(alignment, axis_name="parts"), axis_name="parts")
        found = jax.jit(parts)([f.reshape(3, 3, 2, 3) for f in features], ids.reshape(3, 3))
        np.testing.assert_allclose(found, whole, rtol=1e-4)


class TestEdges:
    def test_far_equal_single_and_weightless_points(self):
        x, y = two_clouds()
        for a, b in ((1e4 * x, -1e4 * y), (x * 0, y * 0), (x, x + 1e4)):
            value, slopes = divergence(a, b)
            assert np.isfinite(value)
            assert np.all(np.isfinite(slopes))
        first = np.eye(6, dtype="f")[0]
        y[1:] += 100
        value, slopes = divergence(x, y, weights_x=first, weights_y=first)
        np.testing.assert_allclose(value, np.square(x[0] - y[0]).sum() / 2, rtol=1e-3)
        assert np.all(np.asarray(slopes)[:, 1:] == 0)

    def test_half_precision_and_batches_of_clouds(self):
        half, wide = jnp.zeros((2, 6, 3), jnp.bfloat16), jnp.zeros((2, 4, 3))
        assert jax.eval_shape(losses.sinkhorn_divergence, half[0], wide[0]).dtype == jnp.bfloat16
        assert jax.eval_shape(jax.vmap(losses.sinkhorn_divergence), wide, half).shape == (2,)

    def test_bad_input_is_named(self):
        x, y = two_clouds()
        for loss, name in (
            (losses.sinkhorn_divergence, "blur"),
            (partial(losses.entropic_optimal_transport, epsilon=1.0), "epsilon"),
        ):
            for message, arguments, options in (
                (f"{name} must be in", (x, y), {name: 0.0}),
                ("iterations must be in", (x, y), {"iterations": 0}),
                (r"y must have shape \(6, 3\)", (x, y[:, :1]), {}),
                (r"x and y must have shape \[points, features\]", (x[0], y), {}),
                ("y must have at least one point", (x, y[:0]), {}),
                (r"weights_x must have shape \(6,\)", (x, y), {"weights_x": EQUAL[:5]}),
                ("weights_y must be in", (x, y), {"weights_y": -EQUAL}),
                ("the sum of weights_y must be in", (x, y), {"weights_y": 0 * EQUAL}),
            ):
                with pytest.raises(ValueError, match=message):
                    loss(*arguments, **options)
            with pytest.raises(TypeError, match="x must have a floating-point type"):
                loss(np.ones((6, 3), int), y)
        align, ids = losses.stack_alignment_loss, np.arange(6) % 2
        for message, features, options in (
            ("normalizer must be one of", [x], {"normalizer": "layer"}),
            ("features_by_stack must have at least one", [], {}),
            (r"features must have shape \(6, 3\)", [x, x[:3]], {}),
            (r"features_by_stack must have shape \[batch", [x[:, 0]], {}),
            ("blur must be in", [x], {"blur": -1.0}),
        ):
            with pytest.raises(ValueError, match=message):
                align(features, ids, **options)
        with pytest.raises(TypeError, match="domain_ids must be integers"):
            align([x], x[:, 0])
        with pytest.raises(ValueError, match="num_domains must be given"):
            jax.eval_shape(align, [x], ids)
