from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxref import adaptation, losses

STORED = np.load(Path(__file__).parents[1] / "oracles" / "metric_learning.npz")
E, Y, TARGETS = STORED["embeddings"], STORED["labels"], STORED["fields"]


@jax.jit
def several(e, targets):
    """The stored numbers with their gradients, in one program."""
    ids = jnp.arange(6)
    cases = {
        "icnn_two": lambda e, t: losses.icnn_score(e, Y, k=2),
        "icnn_all": lambda e, t: losses.icnn_score(e, Y, k=8),
        "icnn_wide": lambda e, t: losses.icnn_score(e, Y, k=3, num_neighbors=6),
        "icnn_target": lambda e, t: losses.icnn_score(e, Y, t, ids, k=3),
        "proto": lambda e, t: losses.proto_triplet_loss(e, Y, t, ids, margin=0.8).mean(),
    }
    return {name: jax.value_and_grad(f, argnums=(0, 1))(e, targets) for name, f in cases.items()}


score = jax.jit(partial(losses.icnn_score, k=3))
triplet = jax.jit(losses.proto_triplet_loss)


class TestNumbers:
    def test_agree_with_the_authors(self):
        for name, (value, gradients) in several(E, TARGETS).items():
            np.testing.assert_allclose(value, STORED[name], rtol=1e-5)
            for ours, end in zip(gradients, ("embeddings", "fields")):
                if f"{name}_d_{end}" in STORED:
                    expected = STORED[f"{name}_d_{end}"]
                    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


class TestClaims:
    @pytest.mark.claim("icnn-proto-triplet")
    def test_neighbours_of_the_own_class_raise_the_score_and_training_for_it_the_accuracy(self):
        rng = np.random.default_rng(0)
        y = np.repeat(np.arange(4), 5)
        centres = 6 * rng.normal(size=(4, 3))
        noise = rng.normal(size=(20, 3))
        scores = [score((centres[y] + s * noise).astype("f"), y) for s in (8.0, 3.0, 1.5, 1e-4)]
        assert np.all(np.diff(scores) > 0)
        np.testing.assert_allclose(scores[-1], 1, atol=0.02)
        # turned, shifted and stretched
        points = (centres[y] + 3 * noise).astype("f")
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        np.testing.assert_allclose(score(points, y), score((7 * points @ turn + 5).astype("f"), y),
                                   rtol=1e-4)  # fmt: skip
        # a linear embedding, trained on the support of data with two useful features of ten
        rng = np.random.default_rng(1)
        centres = np.zeros((4, 10))
        centres[:, :2] = 3 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
        noise = rng.normal(size=(2, 20, 10)) * np.array([1.0] * 2 + [2.0] * 8)
        support, queries = (centres[y] + noise).astype("f")

        @jax.jit
        def trained(w):
            def accuracy(w):
                prototypes = adaptation.class_prototypes(support @ w, y, 4)
                distances = jnp.sum((queries @ w - prototypes[:, None]) ** 2, -1)
                return jnp.mean(jnp.argmin(distances, 0) == y)

            def step(w, _):
                loss = lambda w: losses.icnn_loss(support @ w, y, num_neighbors=5)
                return w - 0.3 * jax.grad(loss)(w), None

            return accuracy(w), accuracy(jax.lax.scan(step, w, length=30)[0])

        before, after = trained(np.eye(10, dtype="f"))
        assert after > before + 0.1

    def test_purity_and_margin(self):
        """γ is the share of neighbours of the own class, and Proto-Triplet 0 beyond its margin."""
        y = np.array([0, 0, 0, 0, 1, 1, 1, 1])
        collapsed = np.eye(2, dtype="f")[y]
        np.testing.assert_allclose(score(collapsed, y), 1, atol=1e-2)
        apart = triplet(3 * collapsed, y, 3 * np.eye(2, dtype="f"), np.arange(2))
        assert np.all(apart == 0)
        near = triplet(0.5 * collapsed, y, 0.5 * np.eye(2, dtype="f"), np.arange(2), margin=1.0)
        np.testing.assert_allclose(near, 1 - np.sqrt(0.5) + 1e-3, rtol=1e-3)


class TestShards:
    def test_over_eight_devices(self):
        e, y, targets = E[:8], Y[:8], np.concatenate([TARGETS, E[6:8]])

        def both(e, y, targets, ids, axis_name=None):
            options = {"k": 3, "axis_name": axis_name}
            return losses.icnn_loss(e, y, **options) - 2 * losses.icnn_loss(
                e, y, targets, ids, **options
            )

        sharded = jax.shard_map(
            partial(both, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=P("data"),
            out_specs=P(),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 2)))(e, y, targets, y)
            for f in (sharded, both)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)


class TestEdges:
    def test_finite_where_points_fall_together(self):
        run = jax.jit(jax.value_and_grad(partial(losses.icnn_loss, k=3)))
        for points in (0 * E, np.ones_like(E), 1e4 * E, np.eye(9, 4, dtype="f")):
            for y in (Y, 0 * Y, np.arange(9)):
                value, gradient = run(points, y)
                assert 0 <= value <= 14
                assert np.all(np.isfinite(gradient))
        assert score(E[:0], Y[:0], E, Y) == 1

    def test_queries_without_prototypes(self):
        ids = np.arange(6)
        where = np.ones((9, 6), bool)
        where[2] = False
        where[3, [0, 2, 3, 4, 5]] = False
        values = triplet(E, np.where(np.arange(9) == 1, 8, Y), TARGETS, ids, where=where)
        np.testing.assert_array_equal(np.isnan(values), np.arange(9) == 1)
        assert np.all(values[2:4] == 0)

    def test_half_precision_and_bad_input(self):
        half = jnp.asarray(E, jnp.bfloat16)
        assert triplet(half, Y, TARGETS, np.arange(6)).dtype == jnp.bfloat16
        assert score(half, Y).dtype == jnp.bfloat16
        for loss in (losses.icnn_loss, losses.icnn_score):
            with pytest.raises(ValueError, match="k must be an integer"):
                loss(E, Y, k=0)
            with pytest.raises(ValueError, match="num_neighbors must be an integer"):
                loss(E, Y, k=3, num_neighbors=2)
            with pytest.raises(ValueError, match="at least 3 points"):
                loss(E[:2], Y[:2])
            with pytest.raises(ValueError, match="target_labels must be given"):
                loss(E, Y, TARGETS)
            with pytest.raises(ValueError, match=r"target must have shape \(6, 4\)"):
                loss(E, Y, TARGETS[:, :2], np.arange(6))
            with pytest.raises(TypeError, match="origin must have a floating-point type"):
                loss(E.astype(int), Y)
            with pytest.raises(TypeError, match="origin_labels must be integer ids"):
                loss(E, E[:, 0])
        with pytest.raises(ValueError, match="margin must be in"):
            losses.proto_triplet_loss(E, Y, TARGETS, np.arange(6), margin=-1.0)
        with pytest.raises(ValueError, match="prototype_labels must have shape"):
            losses.proto_triplet_loss(E, Y, TARGETS, np.arange(5))
        with pytest.raises(ValueError, match=r"queries must have shape \[points, features\]"):
            losses.proto_triplet_loss(E[0], Y, TARGETS, np.arange(6))
        with pytest.raises(ValueError, match="where must broadcast"):
            losses.proto_triplet_loss(E, Y, TARGETS, np.arange(6), where=np.ones(4, bool))
