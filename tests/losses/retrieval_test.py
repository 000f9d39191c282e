from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses
from jaxref.metrics import area_over_curve, roc_auc


def random_scores(queries=5, documents=7, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(queries, documents)).astype(np.float32)
    return scores, rng.uniform(size=(queries, documents)) < 0.3


def double_loop(scores, positive, where, temperature):
    """The loss and its gradient, pair by pair in float64."""
    s, total, slope, pairs = np.float64(scores), 0.0, np.zeros(scores.shape), 0
    for p in zip(*np.nonzero(positive & where)):
        for n in zip(*np.nonzero(~positive & where)):
            d = (s[p] - s[n]) / temperature
            total, pairs = total + np.log1p(np.exp(-d)), pairs + 1
            slope[p] -= 1 / (1 + np.exp(d)) / temperature
            slope[n] += 1 / (1 + np.exp(d)) / temperature
    return total / max(pairs, 1), slope / max(pairs, 1)


class TestNumbers:
    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize("temperature", [0.3, 1.0])
    def test_pooled_loss_matches_the_double_loop(self, temperature, chunk_size):
        scores, positive = random_scores()
        where = np.random.default_rng(1).uniform(size=scores.shape) < 0.8
        loss = partial(
            losses.mann_whitney_loss,
            temperature=temperature,
            chunk_size=chunk_size,
            where=where,
        )
        value, slope = jax.jit(jax.value_and_grad(loss))(scores, positive)
        expected = double_loop(scores, positive, where, temperature)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(slope, expected[1], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(loss(scores, positive), value, rtol=1e-6)

    def test_loss_of_each_query_matches_the_double_loop(self):
        scores, positive = random_scores()
        positive[3] = False
        loss = partial(losses.mann_whitney_loss, across_queries=False)
        values = jax.jit(loss)(scores, positive)
        everything = np.ones((1, 7), bool)
        expected = [
            double_loop(s[None], p[None], everything, 1.0)[0] for s, p in zip(scores, positive)
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert values[3] == 0

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_embeddings_match_their_similarities(self, similarity):
        rng = np.random.default_rng(0)
        queries, documents = rng.normal(size=(4, 3)), rng.normal(size=(6, 3))
        index, where = np.array([2, 0, 5, 2]), rng.uniform(size=(4, 6)) < 0.9
        where[np.arange(4), index] = [True, True, True, False]

        def by_scores(queries, documents):
            if similarity == "cosine":
                queries, documents = (
                    x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, documents)
                )
            positive = index[:, None] == np.arange(6)
            return losses.mann_whitney_loss(
                queries @ documents.T, positive, temperature=0.2, where=where
            )

        def ours(queries, documents):
            return losses.mann_whitney_loss_from_embeddings(
                queries, documents, index, similarity=similarity, temperature=0.2, chunk_size=3,
                where=where,
            )  # fmt: skip

        arguments = queries.astype("f"), documents.astype("f")
        found, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*arguments) for f in (ours, by_scores)
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        for mine, theirs in zip(found[1], expected[1]):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)

    def test_contrastive_loss_matches_optax(self):
        scores, _ = random_scores()
        index = np.arange(5) % 7
        ours = losses.contrastive_retrieval_loss(scores, np.eye(7)[index], temperature=0.5)
        theirs = optax.softmax_cross_entropy_with_integer_labels(scores / 0.5, index)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        several = np.eye(7)[index] + np.eye(7)[index + 1]
        both = [losses.contrastive_retrieval_loss(scores, np.eye(7)[index + i]) for i in range(2)]
        ours = losses.contrastive_retrieval_loss(scores, several)
        np.testing.assert_allclose(ours, (both[0] + both[1]) / 2, rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("mann-whitney-loss")
    def test_bounds_the_area_over_the_curve_and_mends_offsets_that_infonce_cannot_see(self):
        """A dual encoder whose queries bring offsets of their own: only the offsets are trained."""
        rng = np.random.default_rng(0)
        positive = np.eye(12, dtype=bool)
        clean = rng.normal(size=(12, 12)) + 2.5 * positive
        offsets = 3 * rng.normal(size=(12, 1))
        scores = (clean + offsets).astype(np.float32)
        for s in (clean, scores):
            for temperature in (0.1, 1.0, 10.0):
                loss = losses.mann_whitney_loss(s.astype("f"), positive, temperature=temperature)
                assert 1 - roc_auc(s.astype("f"), positive) <= loss / np.log(2)
        infonce = losses.contrastive_retrieval_loss(scores, positive)
        np.testing.assert_allclose(
            infonce, losses.contrastive_retrieval_loss(clean.astype("f"), positive), rtol=1e-4
        )

        def trained(loss):
            step = lambda _, b: b - jax.grad(lambda b: loss(scores + b).mean())(b)
            b = jax.jit(lambda b: jax.lax.fori_loop(0, 300, step, b))(jnp.zeros((12, 1)))
            return roc_auc(scores + b, positive)

        before = roc_auc(scores, positive)
        by_infonce = trained(lambda s: losses.contrastive_retrieval_loss(s, positive))
        np.testing.assert_allclose(by_infonce, before, atol=2e-3)  # rounding alone moves it
        by_ours = trained(lambda s: losses.mann_whitney_loss(s, positive))
        assert by_ours > before + 0.05
        assert by_ours > roc_auc(clean.astype("f"), positive) - 0.01

    def test_low_temperature_gives_the_hinge_and_the_gradient_sums_to_0(self):
        scores, positive = random_scores()
        d = scores[positive][:, None] - scores[~positive]
        ours = 1e-3 * losses.mann_whitney_loss(scores, positive, temperature=1e-3)
        np.testing.assert_allclose(ours, np.maximum(-d, 0).mean(), rtol=1e-3)
        slope = jax.grad(losses.mann_whitney_loss)(scores, positive)
        np.testing.assert_allclose(slope.sum(), 0, atol=1e-6)
        area = area_over_curve(scores[positive], scores[~positive])
        np.testing.assert_allclose(area, 1 - roc_auc(scores, positive), atol=1e-6)


class TestShards:
    mesh = staticmethod(
        lambda: jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    )

    @pytest.mark.parametrize("chunk_size", [None, 3])
    def test_queries_over_eight_devices(self, chunk_size):
        scores, positive = random_scores(8, 8)
        axes = ("data", "fsdp")
        loss = partial(losses.mann_whitney_loss, chunk_size=chunk_size)
        sharded = jax.shard_map(
            partial(loss, axis_name=axes),
            mesh=self.mesh(),
            in_specs=(PartitionSpec(axes), PartitionSpec(axes)),
            out_specs=PartitionSpec(),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(f))(scores, positive) for f in (sharded, loss)
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-7)

    def test_embeddings_over_eight_devices(self):
        rng = np.random.default_rng(0)
        queries, documents = rng.normal(size=(2, 16, 3)).astype(np.float32)
        index, axes = rng.permutation(16), ("data", "fsdp")
        loss = losses.mann_whitney_loss_from_embeddings
        sharded = jax.shard_map(
            partial(loss, axis_name=axes),
            mesh=self.mesh(),
            in_specs=(PartitionSpec(axes),) * 3,
            out_specs=PartitionSpec(),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(queries, documents, index)
            for f in (sharded, loss)
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        for mine, theirs in zip(found[1], expected[1]):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-6)


class TestEdges:
    def test_no_pair_is_0(self):
        scores, positive = random_scores()
        loss = jax.jit(jax.value_and_grad(losses.mann_whitney_loss))
        for mask in (np.zeros_like(positive), np.ones_like(positive)):
            value, slope = loss(scores, mask)
            assert value == 0
            assert np.all(slope == 0)
        assert losses.mann_whitney_loss(scores[:0], positive[:0]) == 0
        none = losses.mann_whitney_loss(scores, positive, where=np.zeros((5, 1), bool))
        assert none == 0
        empty = losses.contrastive_retrieval_loss(scores, np.zeros_like(positive))
        assert np.all(empty == 0)

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_equal_scores_stay_finite(self, size):
        scores = np.array([[size, 0.0], [-size, size]], np.float32)
        for loss in (losses.mann_whitney_loss, losses.contrastive_retrieval_loss):
            value, slope = jax.value_and_grad(lambda s: loss(s, np.eye(2)).sum())(scores)
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))

    def test_excluded_scores_may_hold_anything(self):
        scores, positive = random_scores()
        where = np.arange(7) < 5
        poisoned = np.where(where, scores, np.nan)
        for loss in (losses.mann_whitney_loss, losses.contrastive_retrieval_loss):
            value, vjp = jax.vjp(lambda s: loss(s, positive, where=where), poisoned)
            expected = loss(scores[:, :5], positive[:, :5])
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            slope = vjp(jnp.ones_like(value))[0]
            assert np.all(slope[:, 5:] == 0)
            assert np.all(np.isfinite(slope))

    def test_zero_vectors_unknown_documents_and_half_precision(self):
        queries, documents = jnp.zeros((2, 3)), jnp.eye(3)
        loss = losses.mann_whitney_loss_from_embeddings
        value, slope = jax.value_and_grad(loss)(queries, documents, jnp.array([0, 1]))
        np.testing.assert_allclose(value, np.log(2), rtol=1e-5)
        assert np.all(np.isfinite(slope))
        assert np.isnan(loss(queries, documents, jnp.array([0, 3])))
        scores, positive = random_scores()
        half = jnp.asarray(scores, jnp.bfloat16)
        for loss in (losses.mann_whitney_loss, losses.contrastive_retrieval_loss):
            ours = loss(half, positive)
            assert ours.dtype == jnp.bfloat16
            expected = loss(half.astype(jnp.float32), positive).astype(jnp.bfloat16)
            np.testing.assert_array_equal(ours, expected)

    def test_bad_input_is_named(self):
        scores, positive = random_scores()
        embeddings = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.array([0, 1])
        from_embeddings = losses.mann_whitney_loss_from_embeddings
        for loss in (losses.mann_whitney_loss, losses.contrastive_retrieval_loss):
            with pytest.raises(ValueError, match="temperature must be in"):
                loss(scores, positive, temperature=0.0)
            with pytest.raises(ValueError, match="positive_mask must be 0 or 1"):
                loss(scores, 2 * positive)
            with pytest.raises(ValueError, match="positive_mask must have shape"):
                loss(scores, positive[:2])
            with pytest.raises(TypeError, match="scores must have a floating-point type"):
                loss(positive, positive)
        with pytest.raises(ValueError, match=r"scores must have shape \[queries, documents\]"):
            losses.mann_whitney_loss(scores[0], positive[0])
        with pytest.raises(ValueError, match="chunk_size must be an integer"):
            losses.mann_whitney_loss(scores, positive, chunk_size=0)
        with pytest.raises(ValueError, match="similarity must be 'cosine' or 'dot'"):
            from_embeddings(*embeddings, similarity="l2")
        with pytest.raises(ValueError, match=r"documents must have shape \(4, 3\)"):
            from_embeddings(embeddings[0], jnp.ones((4, 2)), embeddings[2])
        with pytest.raises(ValueError, match=r"positive_index must have shape \(2,\)"):
            from_embeddings(*embeddings[:2], jnp.array([0]))
        with pytest.raises(TypeError, match="positive_index must be integers"):
            from_embeddings(*embeddings[:2], jnp.ones(2))
