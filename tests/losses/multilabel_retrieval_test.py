from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "multilabel_retrieval.npz")


@jax.jit
def evaluate(scores, positive, label_weights, where):
    """Losses and gradients, of a softmax over all labels too, compiled once for all numbers of one
    shape."""

    def both(scores):
        ours = losses.decoupled_softmax_loss(
            scores, positive, label_weights=label_weights, where=where
        )
        return ours, losses.contrastive_retrieval_loss(scores, positive, where=where)

    (ours, softmax), pull = jax.vjp(both, scores)
    ones, zeros = jnp.ones_like(ours), jnp.zeros_like(ours)
    return ours, *pull((ones, zeros)), softmax, *pull((zeros, ones))


ONES = np.ones((4, 10), np.float32)


class TestNumbers:
    @pytest.mark.parametrize("case", ["decoupled", "decoupled/weighted"])
    def test_matches_the_authors_code(self, case):
        weights = ORACLE["weights"] if case.endswith("weighted") else ONES
        value, gradient, *_ = evaluate(ORACLE["scores"], ORACLE["positive"], weights, ONES == 1)
        np.testing.assert_allclose(value, ORACLE[case], rtol=1e-5)
        np.testing.assert_allclose(gradient, ORACLE[f"{case}/gradient"], rtol=1e-4, atol=1e-7)

    def test_softmax_of_the_authors_sums_what_the_room_averages(self):
        positive = ORACLE["positive"]
        *_, mean, _ = evaluate(ORACLE["scores"], positive, ONES, ONES == 1)
        np.testing.assert_allclose(mean * positive.sum(axis=1), ORACLE["softmax"], rtol=1e-5)

    def test_one_positive_is_cross_entropy(self):
        label = np.array([3, 0, 9, 3])
        ours, *_ = evaluate(ORACLE["scores"], np.eye(10)[label] == 1, ONES, ONES == 1)
        logarithms = scipy.special.log_softmax(np.float64(ORACLE["scores"]), axis=1)
        np.testing.assert_allclose(ours, -logarithms[np.arange(4), label], rtol=1e-5)

    def test_drawn_positives(self):
        mask = np.arange(12) < np.array([[0], [2], [7]])
        where = np.arange(12) != 1
        draw = lambda key: losses.sampled_positives(mask, 3, key=key, where=where)
        kept = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 60))
        assert np.all(kept[:, ~mask & where])
        assert not kept[:, :, 1].any()
        np.testing.assert_array_equal((kept & mask).sum(axis=-1), [[0, 1, 3]] * 60)
        rates = kept[:, 2, :7].mean(axis=0)
        assert np.all(np.abs(rates[where[:7]] - 0.5) < 0.25)


class TestClaims:
    @pytest.mark.claim("decoupled-softmax-soft-topk")
    def test_sure_positives_are_not_pushed_down_and_come_first(self):
        """Two labels a query, one of them sure already; then a dual encoder of 3 dimensions on
        queries that all have a label of their own, and half of them about 5 of 10 others."""
        sure = np.pad([4.0, 1.0, 0.0, -1.0], (0, 6)) * ONES
        positive, where = np.arange(10) < 2 * ONES, np.arange(10) < 4 * ONES
        _, decoupled, _, softmax = evaluate(sure, positive, ONES, where)
        probability = np.exp(4) / np.exp([4, 1, 0, -1]).sum()
        np.testing.assert_allclose(softmax[0, 0], probability - 1 / 2, rtol=1e-5)
        assert softmax[0, 0] > 0
        assert np.all(decoupled[0, :2] < 0)
        assert np.all(decoupled[0, 2:4] > 0)

        def examples(seed, number):
            rng = np.random.default_rng(seed)
            group = rng.integers(6, size=number)
            centres = np.random.default_rng(99).normal(size=(6, 10))
            queries = centres[group] + 0.5 * rng.normal(size=(number, 10))
            others = (rng.uniform(size=(number, 10)) < 0.5) & (group % 2 == 0)[:, None]
            return queries.astype("f"), np.hstack([np.eye(6)[group], others]) == 1

        def unit(x):
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        def scores(parameters, queries):
            return unit(queries @ parameters[0]) @ unit(parameters[1]).T / 0.05

        kinds = losses.contrastive_retrieval_loss, losses.decoupled_softmax_loss

        def precision_at_1(kind, start, queries, positive, new_queries, new_positive):
            def objective(parameters):
                return jax.lax.switch(kind, kinds, scores(parameters, queries), positive).mean()

            def step(parameters, _):
                slopes = jax.grad(objective)(parameters)
                return [x - 3 * slope for x, slope in zip(parameters, slopes)], None

            parameters, _ = jax.lax.scan(step, [start[:10], start[10:]], length=100)
            first = jnp.argmax(scores(parameters, new_queries), axis=1, keepdims=True)
            return jnp.take_along_axis(new_positive, first, axis=1).mean()

        sets = [(*examples(seed, 64), *examples(100 + seed, 500)) for seed in range(4)]
        over_sets = jax.vmap(precision_at_1, in_axes=(None, *[0] * 5))
        over_losses = jax.jit(jax.vmap(over_sets, in_axes=(0, *[None] * 5)))
        start = np.random.default_rng(0).normal(size=(4, 26, 3)).astype("f")
        found = over_losses(np.arange(2), start, *map(np.stack, zip(*sets)))
        by_softmax, by_decoupled = np.mean(found, axis=1)
        assert by_decoupled > by_softmax + 0.04


def test_labels_over_eight_devices():
    """Both losses and the shares that one of them is of."""
    rng = np.random.default_rng(0)
    scores = np.round(2 * rng.normal(size=(6, 16)), 1).astype("f")
    scores[0, :9] = 1.0  # equal scores on both sides of the cut, over several shards
    positive = rng.uniform(size=(6, 16)) < 0.3
    positive[1] = np.arange(16) < 2
    where = rng.uniform(size=(6, 16)) < 0.9
    where[2, 4:8] = False

    def values(s, positive, where, **axis):
        shares = losses.soft_top_k(s, 6, where=where, **axis)
        each = losses.decoupled_softmax_loss, losses.soft_top_k_loss
        return *(loss(s, positive, where=where, **axis) for loss in each), shares

    rows, both = PartitionSpec("data"), PartitionSpec("data", "labels")
    sharded = jax.shard_map(
        partial(values, axis_name="labels"),
        mesh=jax.make_mesh((2, 4), ("data", "labels"), (AxisType.Auto,) * 2),
        in_specs=both,
        out_specs=(rows, rows, both),
    )

    def values_and_gradients(function):
        results, pull = jax.vjp(lambda s: function(s, positive, where), scores)
        weights = (np.cos(np.arange(x.size, dtype="f")).reshape(x.shape) for x in results)
        return results, pull(tuple(weights))

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        jax.jit(partial(values_and_gradients, sharded))(),
        jax.jit(partial(values_and_gradients, values))(),
    )


class TestEdges:
    def test_none_relevant_none_irrelevant_and_far_scores(self):
        scores = np.pad(np.array([[1e4, -1e4, 0.0]] * 4, np.float32), ((0, 0), (0, 7)))
        positive = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]) == 1
        positive = np.pad(positive, ((0, 0), (0, 7)))
        value, slope, *_ = evaluate(scores, positive, ONES, ONES * np.arange(10) < 3)
        np.testing.assert_allclose(value, [0, 0, 2e4, 0], rtol=1e-6)
        expected = np.zeros((4, 10))
        expected[2, :2] = [1, -1]
        np.testing.assert_allclose(slope, expected, atol=1e-6)
        nothing = evaluate(scores, positive, ONES, ONES == 0)
        np.testing.assert_array_equal(nothing[0], 0)
        np.testing.assert_array_equal(nothing[1], 0)
        assert losses.decoupled_softmax_loss(scores[:0], positive[:0]).shape == (0,)

    def test_excluded_labels_may_hold_anything(self):
        scores, positive = ORACLE["scores"], ORACLE["positive"]
        where = ONES * np.arange(10) < 8
        value, slope, *_ = evaluate(np.where(where, scores, np.nan), positive, ONES, where)
        low = np.where(where, scores, -80)  # of too little weight to be seen
        expected, *_ = evaluate(low, positive & where, ONES, ONES == 1)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_array_equal(slope[:, 8:], 0)
        assert np.all(np.isfinite(slope))
        shown, *_ = evaluate(np.where(where, scores, np.nan), positive, ONES, ONES == 1)
        assert np.all(np.isnan(shown))

    def test_half_precision_computes_in_float32(self):
        half = jnp.asarray(ORACLE["scores"], jnp.bfloat16)
        found, *_ = evaluate(half, ORACLE["positive"], ONES, ONES == 1)
        assert found.dtype == jnp.bfloat16
        expected, *_ = evaluate(half.astype("f"), ORACLE["positive"], ONES, ONES == 1)
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))

    def test_bad_input_is_named(self):
        scores, positive = ORACLE["scores"], ORACLE["positive"]
        loss = losses.decoupled_softmax_loss
        with pytest.raises(ValueError, match="positive_mask must be 0 or 1"):
            loss(scores, 2 * positive)
        with pytest.raises(ValueError, match="positive_mask must have shape"):
            loss(scores, positive[:2])
        with pytest.raises(ValueError, match="label_weights must be in"):
            loss(scores, positive, label_weights=-1.0)
        with pytest.raises(ValueError, match="label_weights must broadcast"):
            loss(scores, positive, label_weights=np.ones(3))
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            loss(positive, positive)
        with pytest.raises(ValueError, match="number must be an integer of at least 1"):
            losses.sampled_positives(positive, 0, key=jax.random.key(0))
