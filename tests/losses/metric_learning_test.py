from functools import partial
from itertools import permutations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxref import losses, metrics
from jaxref.losses import metric_learning

STORED = np.load(Path(__file__).parents[1] / "oracles" / "metric_learning.npz")
TCM = {
    "margin_positive": 0.7,
    "margin_negative": 0.1,
    "weight_positive": 0.8,
    "weight_negative": 1.2,
}


def every_loss(e, labels, targets, where, axis_name=None):
    """The losses of the set in one array, and those of the anchors."""
    options = {"where": where, "axis_name": axis_name}
    triplet = partial(losses.contrastive_regression_triplet_loss, e, targets, **options)
    sets = [
        losses.threshold_consistent_margin_loss(e, labels, **TCM, **options),
        triplet(margin=0.2),
        triplet(margin=0.2, reduction="mean_valid"),
        triplet(normalize=False),
    ]
    return jnp.stack(sets), triplet(reduction="none")


def values_and_gradients(function, e, *others):
    def of_sets(e):
        sets, anchors = function(e, *others)
        values = jnp.concatenate([sets, anchors.sum()[None]])
        return values, (values, anchors)

    gradients, (values, anchors) = jax.jacrev(of_sets, has_aux=True)(e)
    return values, anchors, gradients


run = jax.jit(partial(values_and_gradients, every_loss))
BATCH = STORED["embeddings"], STORED["labels"], STORED["targets"]


def triplets_by_loop(e, y, margin, normalize=True):
    """The losses of all triplets, by anchor, in float64."""
    e = np.float64(e)
    if normalize:
        e /= np.linalg.norm(e, axis=1, keepdims=True)
    d = np.linalg.norm(e[:, None] - e, axis=-1)
    gaps = np.abs(np.float64(y)[:, None] - y)
    found = [[] for _ in y]
    for i, j, k in permutations(range(len(y)), 3):
        if gaps[i, j] < gaps[i, k]:
            m = (gaps[i, k] - gaps[i, j]) / 4 if margin == "adaptive" else margin
            found[i].append(max(0, d[i, j] - d[i, k] + m))
    return found


class TestNumbers:
    def test_agree_with_the_package(self):
        values, _, gradients = run(*BATCH, np.ones(9, bool))
        for place, name in enumerate(("tcm", "triplet_active", "triplet_valid")):
            np.testing.assert_allclose(values[place], STORED[name], rtol=1e-5)
            expected = STORED[f"{name}_d_embeddings"]
            np.testing.assert_allclose(gradients[place], expected, rtol=1e-4, atol=1e-6)

    def test_adaptive_margin_is_that_of_all_triplets_one_by_one(self):
        e, labels, y = BATCH
        where = np.arange(9) < 7
        poisoned = np.where(where[:, None], e, np.nan)  # what does not count may hold anything
        values, anchors, gradients = run(poisoned, labels, y, where)
        assert np.all(np.isfinite(gradients))
        by_anchor = triplets_by_loop(e[:7], y[:7], "adaptive")
        means = [np.mean(found) for found in by_anchor] + [0, 0]
        np.testing.assert_allclose(anchors, means, rtol=1e-4)
        raw = np.concatenate(triplets_by_loop(e[:7], y[:7], "adaptive", normalize=False))
        np.testing.assert_allclose(values[3], raw[raw > 0].mean(), rtol=1e-4)

    def test_chunks_of_anchors_change_nothing(self, monkeypatch):
        e, _, y = BATCH
        expected = run(*BATCH, np.ones(9, bool))
        monkeypatch.setattr(metric_learning, "_TRIPLETS_AT_ONCE", 4 * 81)
        loss = partial(losses.contrastive_regression_triplet_loss, targets=y, margin=0.2)
        value, gradient = jax.jit(jax.value_and_grad(loss))(e)
        np.testing.assert_allclose(value, expected[0][1], rtol=1e-6)
        np.testing.assert_allclose(gradient, expected[2][1], rtol=1e-5, atol=1e-7)


class TestClaims:
    @pytest.mark.claim("tcm-opis")
    def test_one_pair_of_margins_for_all_classes_makes_one_threshold_do(self):
        """Clusters of unequal spread, trained without and with the regularizer."""
        rng = np.random.default_rng(0)
        y = np.repeat(np.arange(4), 6)
        spreads = np.repeat([0.1, 0.2, 0.4, 0.6], 6)[:, None]
        start = (np.eye(8)[y] + spreads * rng.normal(size=(24, 8))).astype("f")
        weights = np.eye(4, 8, dtype="f")

        @jax.jit
        def trained(e, weight):
            def loss(e):
                base = losses.normalized_softmax_loss(e, weights, y).mean()
                return base + weight * losses.threshold_consistent_margin_loss(e, y)

            e, _ = jax.lax.scan(lambda e, _: (e - 0.5 * jax.grad(loss)(e), None), e, length=30)
            score = metrics.operating_point_inconsistency_score(e, y, num_thresholds=20)
            return e, score, losses.threshold_consistent_margin_loss(e, y)

        plain, with_margins = trained(start, 0.0), trained(start, 1.0)
        assert with_margins[1] < 0.1 * plain[1]
        # 0 is where every pair is on its side of its margin
        for e, _, loss in (plain, with_margins):
            e = np.float64(e) / np.linalg.norm(e, axis=1, keepdims=True)
            s, same = e @ e.T, y[:, None] == y
            on_its_side = np.where(same, s >= 0.9, s <= 0.5)
            assert (loss == 0) == on_its_side.all()

    @pytest.mark.claim("scoreq")
    def test_distances_as_the_ratings_differ_cost_nothing_in_any_order(self):
        y = STORED["targets"]
        everything = np.ones(9, bool)
        found = {}
        for name, factor in (("right", 1 / 4), ("half", 1 / 8)):
            e = np.zeros((9, 4), "f")
            e[:, 0] = factor * y
            found[name] = run(e, STORED["labels"], y, everything)[0][3]
        np.testing.assert_allclose(found["right"], 0, atol=1e-5)
        gaps = np.abs(y[:, None] - y)
        margins = [
            (gaps[i, k] - gaps[i, j]) / 4
            for i, j, k in permutations(range(9), 3)
            if gaps[i, j] < gaps[i, k]
        ]
        np.testing.assert_allclose(found["half"], np.mean(margins) / 2, rtol=1e-4)
        # turning the space, the order of the batch, and the sign of the scale are no matter
        e, labels, _ = BATCH
        expected = run(e, labels, y, everything)[0]
        turned = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype("f")
        order = np.random.default_rng(0).permutation(9)
        moved = run((e @ turned)[order], labels[order], 6 - y[order], everything)[0]
        np.testing.assert_allclose(moved, expected, rtol=1e-4)


class TestShards:
    def test_over_eight_devices(self):
        """The batch of 9 and 7 more that do not count."""
        where = np.arange(9) != 5
        expected = run(*BATCH, where)
        sharded = jax.shard_map(
            partial(every_loss, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=P("data"),
            out_specs=(P(), P("data")),
        )
        more = [np.concatenate([x, np.zeros_like(x[:7])]) for x in (*BATCH, where)]
        values, anchors, gradients = jax.jit(partial(values_and_gradients, sharded))(*more)
        for ours, theirs in zip((values, anchors[:9], gradients[:, :9]), expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class TestEdges:
    def test_finite_and_0_where_there_is_nothing_to_compare(self):
        e, labels, y = BATCH
        everything = np.ones(9, bool)
        for points in (0 * e, np.ones_like(e), 1e4 * e, np.eye(9, 4, dtype="f")):
            for ours in run(points, labels, y, everything):
                assert np.all(np.isfinite(ours))
        for where in (np.zeros(9, bool), np.arange(9) == 3):
            values, anchors, gradients = run(e, labels, y, where)
            assert np.all(values == 0)
            assert np.all(anchors == 0)
            assert np.all(gradients == 0)
        equal = run(e, labels, 0 * y, everything)
        assert np.all(equal[0][1:] == 0)
        one_class = run(e, 0 * labels, y, everything)[0]
        assert np.isfinite(one_class[0])

    def test_easy_pairs_change_nothing(self):
        e = np.zeros((9, 4), "f")
        e[:2, 0], e[1, 1], e[2, 1], e[3:, 2] = 1, 0.8, 1, 1
        labels = np.array([0, 0, 1] + [2] * 6)
        few, many = (run(e, labels, e[:, 0], np.arange(9) < n)[0][0] for n in (4, 9))
        assert few > 0
        np.testing.assert_allclose(many, few, rtol=1e-6)

    def test_half_precision_and_bad_input(self):
        e, labels, y = BATCH
        half = jnp.asarray(e, jnp.bfloat16)
        values, anchors = jax.jit(every_loss)(half, labels, y, np.ones(9, bool))
        assert values.dtype == anchors.dtype == jnp.bfloat16
        expected = run(np.float32(half), labels, y, np.ones(9, bool))[0]
        np.testing.assert_allclose(np.float32(values), expected[:-1], rtol=1e-2)
        tcm = losses.threshold_consistent_margin_loss
        triplet = losses.contrastive_regression_triplet_loss
        for loss, of_examples, name in ((tcm, labels, "labels"), (triplet, y, "targets")):
            with pytest.raises(ValueError, match=r"embeddings must have shape \[batch, features\]"):
                loss(e[0], of_examples)
            with pytest.raises(ValueError, match=f"{name} must have shape"):
                loss(e, of_examples[:3])
            with pytest.raises(ValueError, match="where must broadcast"):
                loss(e, of_examples, where=np.ones(4, bool))
            with pytest.raises(TypeError, match=f"{name} must be"):
                loss(e, of_examples > 0)
            with pytest.raises(TypeError, match="embeddings must have a floating-point type"):
                loss(e.astype(int), of_examples)
        for option, value in (("margin_positive", 1.1), ("weight_negative", -1.0)):
            with pytest.raises(ValueError, match=f"{option} must be in"):
                tcm(e, labels, **{option: value})
        for option, value in (("margin", -0.1), ("target_range", 0.0)):
            with pytest.raises(ValueError, match=f"{option} must be in"):
                triplet(e, y, **{option: value})
        with pytest.raises(ValueError, match="margin must be 'adaptive' or a number"):
            triplet(e, y, margin="fixed")
        with pytest.raises(ValueError, match="reduction must be"):
            triplet(e, y, reduction="sum")
