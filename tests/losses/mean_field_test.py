from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref import losses

STORED = np.load(Path(__file__).parents[1] / "oracles" / "metric_learning.npz")
SIMILARITY = {"alpha": 0.5, "beta": 20.0, "delta": 0.4}
NAMES = (
    "mean_field_contrastive",
    "mean_field_similarity",
    "classwise",
    "regularizer_contrastive",
    "regularizer_similarity",
)


def every_loss(e, fields, labels, where, classes, beta=20.0, axis_name=None, class_axis_name=None):
    """One value for each example, and those of the set in one array."""
    of_set = {**SIMILARITY, "beta": beta, "where": where, "axis_name": axis_name}
    by_class = {"class_axis_name": class_axis_name}
    penalty = partial(losses.mean_field_regularizer, fields, weight=0.7, **by_class)
    values = losses.mean_field_contrastive_loss(
        e, labels, fields, positive_margin=0.05, negative_margin=0.9, where=classes, **by_class
    )
    sets = [
        losses.mean_field_classwise_multi_similarity_loss(e, labels, fields, **of_set, **by_class),
        losses.classwise_multi_similarity_loss(e, labels, **of_set),
        penalty(negative_margin=0.9),
        penalty(kind="multi_similarity", beta=20.0, delta=0.4),
    ]
    return values, jnp.stack(sets)


def values_and_gradients(function, e, fields, *others):
    def of_all(e, fields):
        values, sets = function(e, fields, *others)
        every = jnp.concatenate([values.sum()[None] / 9, sets])
        return every, (every, values)

    gradients, (every, values) = jax.jacrev(of_all, argnums=(0, 1), has_aux=True)(e, fields)
    return every, values, *gradients


run = jax.jit(partial(values_and_gradients, every_loss))
BATCH = STORED["embeddings"], STORED["fields"], STORED["labels"]
EVERYONE, EVERY_CLASS = np.ones(9, bool), np.ones((9, 6), bool)


class TestNumbers:
    def test_agree_with_the_authors(self):
        every, _, of_e, of_fields = run(*BATCH, EVERYONE, EVERY_CLASS, 20.0)
        for place, name in enumerate(NAMES):
            np.testing.assert_allclose(every[place], STORED[name], rtol=1e-5)
            for ours, end in ((of_e, "embeddings"), (of_fields, "fields")):
                if f"{name}_d_{end}" in STORED:
                    expected = STORED[f"{name}_d_{end}"]
                    np.testing.assert_allclose(ours[place], expected, rtol=1e-4, atol=1e-6)


class TestClaims:
    @pytest.mark.claim("mean-field-metric-learning")
    def test_fields_stand_for_collapsed_classes_and_are_content_with_right_angles(self):
        _, fields, labels = BATCH
        every, values, *_ = run(fields[labels], fields, labels, EVERYONE, EVERY_CLASS, 20.0)
        # examples in their fields: the contrastive loss is that of the pairs of the classes
        m = np.float64(fields) / np.linalg.norm(fields, axis=1, keepdims=True)
        hinges = np.maximum(0, 0.9 - (1 - m @ m.T)) * (1 - np.eye(6))
        np.testing.assert_allclose(values, hinges.sum(1)[labels], rtol=1e-5)
        # so is the class-wise one for its classes, of which each then has one value for all pairs
        n = len(set(labels))
        q = np.exp(20 * (m @ m.T - 0.4)) * (1 - np.eye(6))
        q *= np.isin(np.arange(6), labels)[:, None]
        pairs = np.log1p(np.exp(-0.5 * 0.6)) / 0.5 + np.log1p(q + q.T).sum() / (2 * 20 * n)
        np.testing.assert_allclose(every[1], pairs, rtol=1e-5)
        # a regular figure of 6 directions in 4 dimensions does not exist, one of 4 does
        corners, four = np.eye(4, dtype="f"), np.arange(9) % 4
        loss = jax.jit(losses.mean_field_contrastive_loss)(corners[four], four, corners)
        assert np.all(loss == 0)
        assert jax.jit(partial(losses.mean_field_regularizer, weight=1.0))(corners) == 0

    def test_hinges_remain_as_beta_grows(self):
        """And the largest β of the paper does not overflow on the way."""
        e, fields, labels = BATCH
        e = e.copy()
        c = lambda a, b: (
            np.float64(a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        )
        cosines = c(e, fields)
        expected = 0
        for k in set(labels):
            for other in range(6):
                if other != k:
                    hardest = max(cosines[labels == k, other])
                    back = cosines[labels == other, k]
                    hardest = max(hardest, *back) if len(back) else hardest
                    expected += max(0, hardest - 0.4) * (1 if len(back) else 2)
        every = run(e, fields, labels, EVERYONE, EVERY_CLASS, 1e5)[0]
        attraction = np.mean(
            [np.log1p(np.mean(np.exp(-0.5 * (cosines[labels == k, k] - 0.4)))) for k in set(labels)]
        )
        expected = attraction / 0.5 + expected / (2 * len(set(labels)))
        np.testing.assert_allclose(every[1], expected, rtol=1e-3)


class TestShards:
    def test_batch_and_classes_over_eight_devices(self):
        """The batch of 9 and 3 more that do not count."""
        e, fields, labels = BATCH
        where = np.arange(9) != 4
        classes = np.random.default_rng(0).uniform(size=(9, 6)) < 0.8
        classes[np.arange(9), labels] = True
        classes[2] = False
        expected = run(e, fields, labels, where, classes, 20.0)
        mesh = jax.make_mesh((4, 2), ("data", "classes"), axis_types=(AxisType.Auto,) * 2)
        sharded = jax.shard_map(
            partial(every_loss, axis_name="data", class_axis_name="classes"),
            mesh=mesh,
            in_specs=(P("data"), P("classes"), P("data"), P("data"), P("data", "classes"), P()),
            out_specs=(P("data"), P()),
        )
        more = [np.concatenate([x, np.zeros_like(x[:3])]) for x in (e, labels, where, classes)]
        found = jax.jit(partial(values_and_gradients, sharded))(more[0], fields, *more[1:], 20.0)
        for ours, theirs in zip(found, expected):
            if ours.shape != theirs.shape:  # of the examples, which are at the last axis but one
                ours = ours[:9] if ours.ndim == 1 else ours[:, :9]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class TestEdges:
    def test_excluded_examples_and_unknown_classes(self):
        e, fields, labels = BATCH
        some = np.isin(labels, (0, 3))
        every = run(e, fields, labels, some, EVERY_CLASS, 20.0)
        poisoned = np.where(some[:, None], e, 7)
        again = run(poisoned, fields, np.where(some, labels, -1), some, EVERY_CLASS, 20.0)
        np.testing.assert_allclose(again[0][1:], every[0][1:], rtol=1e-5)
        np.testing.assert_array_equal(np.isnan(again[1]), ~some)
        assert np.all(again[2][1:3, ~some] == 0)
        assert np.all(np.isfinite(again[3][1:]))
        strange = run(e, fields, np.where(some, labels, 6), EVERYONE, EVERY_CLASS, 20.0)
        assert np.isnan(strange[0][1])
        assert np.isfinite(strange[0][2])  # which has no fields to be unknown to
        excluded = EVERY_CLASS.copy()
        excluded[0, labels[0]], excluded[1] = False, False
        values = run(e, fields, labels, EVERYONE, excluded, 20.0)[1]
        assert np.isnan(values[0])
        assert values[1] == 0

    def test_finite_at_the_ends(self):
        e, fields, labels = BATCH
        for points in (0 * e, np.ones_like(e), 1e4 * e):
            for theirs in (fields, 0 * fields, np.ones_like(fields)):
                for y in (labels, 0 * labels):
                    for where in (EVERYONE, ~EVERYONE):
                        for ours in run(points, theirs, y, where, EVERY_CLASS, 80.0):
                            assert np.all(np.isfinite(ours))
        half = jax.jit(partial(every_loss, where=EVERYONE[:0], classes=EVERY_CLASS[:0]))
        values, sets = half(e[:0].astype("float16"), fields.astype("float16"), labels[:0])
        assert values.shape == (0,)
        np.testing.assert_array_equal(sets[:2], 0)
        assert values.dtype == sets.dtype == jnp.float16

    def test_bad_input_is_named(self):
        e, fields, labels = BATCH
        both = (
            losses.mean_field_contrastive_loss,
            losses.mean_field_classwise_multi_similarity_loss,
        )
        for loss in both:
            with pytest.raises(TypeError, match="embeddings must have a floating-point type"):
                loss(e.astype(int), labels, fields)
            with pytest.raises(ValueError, match="labels must have shape"):
                loss(e, labels[:3], fields)
            with pytest.raises(TypeError, match="labels must be integer ids"):
                loss(e, labels > 0, fields)
            with pytest.raises(ValueError, match="must have shape"):
                loss(e, labels, fields[:, :3])
        with pytest.raises(ValueError, match="positive_margin must be in"):
            both[0](e, labels, fields, positive_margin=-1.0)
        for option, value in (("alpha", 0.0), ("beta", 0.0), ("delta", 2.0)):
            for loss in (
                partial(both[1], mean_fields=fields),
                losses.classwise_multi_similarity_loss,
            ):
                with pytest.raises(ValueError, match=f"{option} must be in"):
                    loss(e, labels, **{option: value})
        with pytest.raises(ValueError, match=r"embeddings must have shape \[batch, features\]"):
            losses.classwise_multi_similarity_loss(e[0], labels)
        with pytest.raises(ValueError, match="kind must be"):
            losses.mean_field_regularizer(fields, weight=1.0, kind="hinge")
        with pytest.raises(ValueError, match="weight must be in"):
            losses.mean_field_regularizer(fields, weight=-1.0)
        with pytest.raises(ValueError, match="power must be in"):
            losses.mean_field_regularizer(fields, weight=1.0, power=0.5)
