from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "query_reformulation.npz")


def cosines(shape):
    return np.cos(np.arange(np.prod(shape), dtype="f")).reshape(shape)


@jax.jit
def evaluate(revision_losses, margin, where):
    """The regulariser and its gradient, and the objective of weight 0.5, compiled once for all
    numbers of one shape."""
    loss = lambda x: losses.loss_over_loss(x, margin=margin, where=where)
    value, pull = jax.vjp(loss, revision_losses)
    objective = losses.lol_objective(revision_losses, weight=0.5, margin=margin, where=where)
    return value, *pull(cosines(value.shape).astype(value.dtype)), objective


@jax.jit
def evaluate_ranking(queries, passages, positive, where):
    loss = lambda *vectors: losses.query_reformulation_loss(*vectors, positive, where=where)
    value, pull = jax.vjp(loss, queries, passages)
    return value, *pull(cosines(value.shape).astype(value.dtype))


EVERYTHING = np.ones((5, 3), bool)


class TestNumbers:
    @pytest.mark.parametrize("margin", [0.0, 0.4])
    def test_regulariser_matches_the_authors_code(self, margin):
        value, gradient, _ = evaluate(ORACLE["revision_losses"], margin, EVERYTHING)
        np.testing.assert_allclose(value, ORACLE[f"hinge/{margin}"], rtol=1e-5)
        np.testing.assert_allclose(gradient, ORACLE[f"hinge/{margin}/0"], rtol=1e-5, atol=1e-7)

    def test_ranking_matches_the_authors_code(self):
        found = evaluate_ranking(
            ORACLE["queries"], ORACLE["passages"], ORACLE["positive"], np.ones((4, 7), bool)
        )
        for mine, name in zip(found, ("ranking", "ranking/0", "ranking/1")):
            np.testing.assert_allclose(mine, ORACLE[name], rtol=1e-4, atol=1e-6)

    def test_objective_is_the_mean_and_the_regulariser(self):
        x, where = ORACLE["revision_losses"], np.arange(3) < np.array([[3], [2], [1], [0], [3]])
        regulariser, _, found = evaluate(x, 0.4, where)
        mean = [row[mask].sum() / max(mask.sum(), 1) for row, mask in zip(x, where)]
        np.testing.assert_allclose(found, mean + 0.5 * np.asarray(regulariser), rtol=1e-5)

    def test_is_the_largest_term_of_the_decoupled_softmax(self):
        """Each relevant passage by itself, with the others left out."""
        arguments = [ORACLE[x] for x in ("queries", "passages", "positive")]
        each = [
            evaluate_ranking(*arguments, ~arguments[2] | (np.arange(7) == p))[0] for p in range(7)
        ]
        np.testing.assert_allclose(np.max(each, axis=0), ORACLE["ranking"], rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("lol-prf")
    def test_more_feedback_harms_less(self):
        """First what the loss says of losses; then a reformulator that adds the passages found, of
        which the first is good and the four others are not, with a mark that tells them apart."""
        x = ORACLE["revision_losses"]
        value, gradient, _ = evaluate(x, 0.0, EVERYTHING)
        np.testing.assert_array_equal(np.asarray(value) == 0, np.all(np.diff(x) >= 0, axis=1))
        np.testing.assert_allclose(np.sum(gradient, axis=1), 0, atol=1e-6)
        np.testing.assert_allclose(evaluate(x + 5, 0.0, EVERYTHING)[0], value, atol=1e-5)
        np.testing.assert_allclose(evaluate(3 * x, 0.0, EVERYTHING)[0], 3 * value, rtol=1e-5)
        two, *_ = evaluate(x, 0.0, EVERYTHING * np.arange(3) < 2)
        np.testing.assert_allclose(two, np.maximum(x[:, 0] - x[:, 1], 0), rtol=1e-5)

        def found(seed, number):
            rng = np.random.default_rng(seed)
            target, noise = rng.normal(size=(2, number, 6))
            feedback, mark = rng.normal(size=(number, 5, 6)), 0.5 * rng.normal(size=(number, 5))
            feedback[:, 0] = target + 0.5 * feedback[:, 0]
            mark += np.array([1, -1, -1, -1, -1])
            return [x.astype("f") for x in (target, target + 0.8 * noise, feedback, mark)]

        seen = np.arange(5) < np.arange(5, -1, -1)[:, None]  # by revisions with 5 to 0 passages

        def losses_of_revisions(parameters, target, query, feedback, mark):
            slope, offset, size = parameters
            gate = size * jax.nn.sigmoid(slope * mark + offset)
            vectors = query[:, None] + jnp.einsum("nk,rk,nkd->nrd", gate, seen, feedback)
            relevant = np.eye(len(query), dtype=bool)[:, None]
            return losses.query_reformulation_loss(vectors, target, relevant)

        def trained(weight, data, new_data):
            def objective(parameters):
                each = losses_of_revisions(parameters, *data)
                return losses.lol_objective(each, weight=weight).mean()

            descend = lambda x, _: (x - 0.6 * jax.grad(objective)(x), None)
            parameters, _ = jax.lax.scan(descend, jnp.array([0.0, 0.0, 1.0]), length=60)
            each = losses_of_revisions(parameters, *new_data)
            return each.mean(axis=0), losses.loss_over_loss(each).mean()

        means, harm = jax.jit(jax.vmap(trained, in_axes=(0, None, None)))(
            jnp.array([0.0, 1.0]), found(0, 48), found(1, 100)
        )
        assert harm[1] < 0.7 * harm[0]
        assert np.all(means[:, :5] < means[:, 5:])  # any feedback helps


def test_queries_and_passages_over_eight_devices():
    rng = np.random.default_rng(0)
    queries, passages = rng.normal(size=(8, 2, 3)).astype("f"), rng.normal(size=(16, 3)).astype("f")
    positive = (rng.uniform(size=(8, 16)) < 0.2)[:, None]
    loss = losses.query_reformulation_loss
    rows = PartitionSpec("data")
    sharded = jax.shard_map(
        partial(loss, axis_name="data"),
        mesh=jax.make_mesh((8,), ("data",), (AxisType.Auto,)),
        in_specs=(rows, rows, rows),
        out_specs=rows,
    )

    def value_and_gradients(loss):
        value, pull = jax.vjp(lambda *vectors: loss(*vectors, positive), queries, passages)
        return value, pull(cosines((8, 2)))

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        jax.jit(partial(value_and_gradients, sharded))(),
        jax.jit(partial(value_and_gradients, loss))(),
    )


class TestEdges:
    def test_revisions_that_are_not_there(self):
        x, where = ORACLE["revision_losses"], np.arange(3) != np.array([[0], [1], [2], [5], [5]])
        where[4] = [True, False, False]
        value, gradient, _ = evaluate(np.where(where, x, np.nan), 0.4, where)
        pairs = [(x[0, 1], x[0, 2]), (x[1, 0], x[1, 2]), (x[2, 0], x[2, 1])]
        expected = [max(0.4 + a - b, 0) for a, b in pairs]
        np.testing.assert_allclose(value, [*expected, ORACLE["hinge/0.4"][3], 0], rtol=1e-5)
        np.testing.assert_array_equal(gradient[~where], 0)
        assert np.all(np.isfinite(gradient))
        assert losses.loss_over_loss(x[:, :1]).tolist() == [0] * 5
        spread, *_ = evaluate(np.where(where, x, np.nan), 0.4, EVERYTHING)
        assert np.all(np.isnan(spread[:3]))

    def test_no_relevant_or_irrelevant_passage_and_far_vectors(self):
        positive = ORACLE["positive"].copy()
        positive[0], positive[1] = False, True
        far = 1e3 * ORACLE["queries"]
        value, *gradients = evaluate_ranking(
            far, ORACLE["passages"], positive, np.ones((4, 7), bool)
        )
        scores = np.float64(far) @ np.float64(ORACLE["passages"]).T
        expected = [
            max(0, scores[i][~positive[i]].max() - scores[i][positive[i]].min()) for i in (2, 3)
        ]
        np.testing.assert_allclose(value, [0, 0, *expected], rtol=1e-4)
        assert all(np.all(np.isfinite(x)) for x in gradients)
        np.testing.assert_array_equal(gradients[0][:2], 0)

    def test_half_precision_computes_in_float32(self):
        half = jnp.asarray(ORACLE["revision_losses"], jnp.bfloat16)
        found, *_ = evaluate(half, 0.0, EVERYTHING)
        assert found.dtype == jnp.bfloat16
        expected, *_ = evaluate(half.astype("f"), 0.0, EVERYTHING)
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
        vectors = (jnp.asarray(ORACLE[x], jnp.bfloat16) for x in ("queries", "passages"))
        ranking, *_ = evaluate_ranking(*vectors, ORACLE["positive"], np.ones((4, 7), bool))
        assert ranking.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(ranking), ORACLE["ranking"], rtol=0.05, atol=0.05)

    def test_bad_input_is_named(self):
        x = ORACLE["revision_losses"]
        for loss in (losses.loss_over_loss, losses.lol_objective):
            with pytest.raises(ValueError, match="revision_losses must have at least one revision"):
                loss(x[:, :0])
            with pytest.raises(ValueError, match="margin must be in"):
                loss(x, margin=-0.1)
            with pytest.raises(ValueError, match="where must broadcast"):
                loss(x, where=np.ones(4, bool))
            with pytest.raises(TypeError, match="revision_losses must have a floating-point type"):
                loss(x.astype(int))
        with pytest.raises(ValueError, match="weight must be in"):
            losses.lol_objective(x, weight=-1.0)
        ranking = losses.query_reformulation_loss
        queries, passages, positive = (ORACLE[x] for x in ("queries", "passages", "positive"))
        with pytest.raises(ValueError, match="passage_vectors must have shape"):
            ranking(queries, passages[:, :5], positive)
        with pytest.raises(ValueError, match="positive_mask must broadcast"):
            ranking(queries, passages, positive[:3])
        with pytest.raises(ValueError, match="positive_mask must be 0 or 1"):
            ranking(queries, passages, 2 * positive)
        with pytest.raises(TypeError, match="query_vectors must have a floating-point type"):
            ranking(queries.astype(int), passages, positive)
