import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref import losses
from jaxref.analysis import exact_wasserstein_dependency, mutual_information

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y, W = (RNG.normal(size=shape).astype("f") for shape in ((8, 3), (8, 2), (3, 2)))


bound = jax.jit(jax.value_and_grad(losses.info_nce_bound))


def critic(w):
    return lambda x, y: losses.bilinear_critic(x, y, w)


class TestNumbers:
    def test_coding_loss_matches_optax(self):
        def ours(w):
            options = {"key": KEY, "penalty_weight": 0.0}
            return losses.wasserstein_predictive_coding_loss(critic(w), X, Y, **options)

        def theirs(w):
            scores = X @ w @ Y.T
            return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(8))

        def evaluate(f):
            def value_and_slope(w):
                value, vjp = jax.vjp(f, w)
                return value, *vjp(jnp.ones(8))

            return jax.jit(value_and_slope)(W)

        found, expected = evaluate(ours), evaluate(theirs)
        for mine, whole in zip(found, expected):
            np.testing.assert_allclose(mine, whole, rtol=1e-3, atol=1e-5)
        value, _ = bound(X @ W @ Y.T)
        np.testing.assert_allclose(value, np.log(8) - expected[0].mean(), rtol=1e-4)

    def test_penalty_matches_the_formula(self):
        """Where all pairs are alike, mixing them changes nothing."""
        x, y = (np.tile(v[:1], (4, 1)) for v in (X, Y))

        def literal(w):
            slope = np.concatenate([w @ np.float64(y[0]), np.float64(x[0]) @ w])
            return np.linalg.norm(slope) - 1

        @jax.jit
        def penalties(w, target):
            def total(w, one_sided):
                options = {"key": KEY, "target": target, "one_sided": one_sided}
                return losses.pairwise_gradient_penalty(critic(w), x, y, **options).sum()

            return jax.value_and_grad(total)(w, False), total(w, True)

        (value, slope), above = penalties(W, 1.0)
        np.testing.assert_allclose(value, 4 * literal(np.float64(W)) ** 2, rtol=1e-5)
        for i, j in itertools.product(range(3), range(2)):
            step = np.zeros((3, 2))
            step[i, j] = 1e-5
            finite = literal(W + step) ** 2 - literal(W - step) ** 2
            np.testing.assert_allclose(slope[i, j], 4 * finite / 2e-5, rtol=1e-3, atol=1e-4)
        assert literal(np.float64(W)) > 0
        np.testing.assert_allclose(above, value, rtol=1e-6)
        assert penalties(W, 100.0)[1] == 0
        (value, slope), _ = penalties(0 * W, 1.0)
        assert (value, np.any(slope)) == (4, False)

    def test_points_lie_between_true_and_mixed_pairs(self):
        """Critics whose slopes are the points themselves tell where these are."""
        x, y = np.array([1.0, 2.0, 4.0], "f"), np.array([8.0, 16.0, 32.0], "f")
        half_squares = (lambda x, y: x**2 / 2, lambda x, y: y**2 / 2)
        slopes = partial(losses.pairwise_gradient_penalty, key=KEY, target=0.0)
        at_x, at_y = np.sqrt(jax.jit(lambda x, y: [slopes(f, x, y) for f in half_squares])(x, y))
        moved = 0
        for i in range(3):
            shares = []
            for others, own, point in ((x, x[i], at_x[i]), (y, y[i], at_y[i])):
                apart = others[others != own]
                shares.append(list((point - apart) / (own - apart)))
                if abs(point - own) < 1e-5:
                    shares[-1].append(None)  # the partner is the pair itself: any share
            fits = [
                u is None or v is None or (abs(u - v) < 1e-4 and 0 <= u <= 1)
                for u, v in itertools.product(*shares)
            ]
            assert any(fits)
            moved += abs(at_x[i] - x[i]) > 1e-3
        assert moved >= 1

    def test_bound_is_the_difference_of_means(self):
        scores = X @ W @ Y.T
        difference = losses.wasserstein_dependency_bound(np.diag(scores), scores)
        np.testing.assert_allclose(difference, np.trace(scores) / 8 - scores.mean(), rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("wasserstein-dependency-measure")
    def test_information_outgrows_any_batch_and_the_distance_does_not(self):
        """N equal symbols that two views share, with orthonormal embeddings: information is log N
        and the distance √2 (1 - 1/N). No critic shows a batch of K more than log K; one that is
        1-Lipschitz shows the distance; and its predictive coding stays below it."""
        information = mutual_information(np.eye(64) / 64)
        np.testing.assert_allclose(information, np.log(64), rtol=1e-5)
        for n in (2, 4, 6):
            joint, cost = np.eye(n) / n, np.sqrt(2) * (1 - np.eye(n))
            exact = exact_wasserstein_dependency(joint, cost, cost)
            np.testing.assert_allclose(exact.value, np.sqrt(2) * (1 - 1 / n), rtol=1e-6)
            independent = exact_wasserstein_dependency(np.ones((n, n)) / n**2, cost, cost)
            np.testing.assert_allclose(independent.value, 0, atol=1e-8)

        rng = np.random.default_rng(1)
        symbols = rng.integers(64, size=(200, 8))
        wild = 1e3 * rng.normal(size=(64, 64)) + 3e3 * np.eye(64)
        scores = wild[symbols[:, :, None], symbols[:, None, :]].astype("f")
        bounds_of = jax.jit(jax.vmap(losses.info_nce_bound))
        bounds = bounds_of(scores)
        assert np.max(bounds) < np.log(8) + 1e-5 < information - 1
        # √2 for the same symbol and 0 for others is 1-Lipschitz in the sum of both distances
        joint_scores, product_scores = np.full(64, np.sqrt(2)), np.sqrt(2) * np.eye(64)
        attained = losses.wasserstein_dependency_bound(joint_scores, product_scores)
        np.testing.assert_allclose(attained, np.sqrt(2) * (1 - 1 / 64), rtol=1e-6)
        scores = np.sqrt(2) * np.eye(64)[symbols[:, :, None], symbols[:, None, :]]
        bounds = bounds_of(scores.astype("f"))
        assert 0.3 < np.mean(bounds) < 7 / 8 * np.sqrt(2) * (1 - 1 / 64)

    def test_the_penalty_holds_a_critic_to_the_exact_distance(self):
        """A scalar pair: y = x = ±1 has distance 1; the penalised critic is trained to it, and to
        much more without penalty."""
        x = np.tile(np.array([[1.0], [-1.0]], "f"), (16, 1))
        apart = 2 * (1 - np.eye(2))
        exact = exact_wasserstein_dependency(np.eye(2) / 2, apart, apart).value
        np.testing.assert_allclose(exact, 1.0, rtol=1e-6)

        @jax.jit
        def train(weight):
            def step(w, key):
                loss = lambda w: losses.wasserstein_predictive_coding_loss(
                    critic(w), x, x, key=key, penalty_weight=weight
                ).mean()
                return w - 0.03 * jax.grad(loss)(w), None

            w, _ = jax.lax.scan(step, jnp.zeros((1, 1)) + 0.1, jax.random.split(KEY, 150))
            scores = x @ w @ x.T
            return losses.wasserstein_dependency_bound(jnp.diag(scores), scores)

        held, free = train(10.0), train(0.0)
        assert 0.6 < held < 1.2
        assert free > held + 0.4


class TestShards:
    def test_eight_devices_see_the_whole_batch(self):
        x, y = np.concatenate([X, 2 * X]), np.concatenate([Y, -Y])

        def loss(w, x, y, axis_name=None):
            coding = losses.wasserstein_predictive_coding_loss(
                critic(w), x, y, key=KEY, axis_name=axis_name
            )
            whole = y if axis_name is None else jax.lax.all_gather(y, axis_name, tiled=True)
            shown = losses.info_nce_bound(x @ w @ whole.T, axis_name=axis_name)
            means = losses.wasserstein_dependency_bound(x, y, axis_name=axis_name)
            return coding, shown + means

        sharded = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P("data"), P()),
        )

        def evaluate(f):
            def total(*arguments):
                coding, bounds = f(*arguments)
                return coding.mean() + bounds, (coding, bounds)

            return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(W, x, y)

        found, expected = evaluate(sharded), evaluate(loss)
        for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_allclose(ours, whole, rtol=1e-3, atol=1e-5)


class TestEdges:
    def test_masks_one_pair_and_no_pair(self):
        scores = X @ W @ Y.T
        counts = (np.arange(8) < 5) & (np.arange(8) < 5)[:, None]
        ours, slope = bound(np.where(counts, scores, np.nan), where=counts)
        block = np.float64(scores[:5, :5])
        expected = np.mean(np.log(5) + np.diag(block) - np.log(np.exp(block).sum(1)))
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
        assert np.all(slope[~counts] == 0)
        assert bound(scores[:1, :1])[0] == 0
        assert bound(scores, where=np.zeros((8, 8), bool))[0] == 0
        assert losses.wasserstein_dependency_bound(jnp.zeros(0), jnp.zeros(0)) == 0

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_scores_stay_finite(self, size):
        value, slope = bound(np.float32(size) * (X @ W @ Y.T))
        assert value <= np.log(8) + 1e-5
        assert np.all(np.isfinite(slope))

    def test_half_precision(self):
        half = [jnp.asarray(v, jnp.bfloat16) for v in (X, Y)]
        loss = partial(losses.wasserstein_predictive_coding_loss, critic(W), key=KEY)
        ours = jax.jit(partial(loss, penalty_weight=0.0))(*half)
        assert ours.dtype == jnp.bfloat16
        x, y = (np.float64(v) for v in half)
        scores = x @ W @ y.T
        expected = np.log(np.exp(scores).sum(1)) - np.diag(scores)
        np.testing.assert_allclose(np.float32(ours), expected, rtol=1e-2, atol=1e-2)

    def test_bad_input_is_named(self):
        penalty = partial(losses.pairwise_gradient_penalty, key=KEY)
        coding = partial(losses.wasserstein_predictive_coding_loss, key=KEY)
        with pytest.raises(ValueError, match=r"scores must have shape \[batch, batch\]"):
            losses.info_nce_bound(X)
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            losses.info_nce_bound(np.eye(2, dtype=int))
        with pytest.raises(ValueError, match=r"weight must have shape \(3, 2\)"):
            losses.bilinear_critic(X, Y, W.T)
        for function in (penalty, coding):
            with pytest.raises(ValueError, match="x and y must have shapes"):
                function(critic(W), X, Y[:3])
            with pytest.raises(TypeError, match="y must have a floating-point type"):
                function(critic(W), X, np.ones((8, 2), int))
        with pytest.raises(ValueError, match="critic must return one number"):
            jax.eval_shape(lambda: penalty(lambda x, y: x, X, Y))
        with pytest.raises(ValueError, match="scores must have shape"):
            jax.eval_shape(lambda: coding(lambda x, y: x, X, Y))
        with pytest.raises(ValueError, match="target must be in"):
            penalty(critic(W), X, Y, target=-1.0)
        with pytest.raises(ValueError, match="penalty_weight must be in"):
            coding(critic(W), X, Y, penalty_weight=-1.0)
