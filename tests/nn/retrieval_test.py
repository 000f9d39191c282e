from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref import losses, metrics
from jaxref.nn import CosineAdapter, DenseQuery, sparse_query_vector

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "query_reformulation.npz")
SPECIAL = np.isin(np.arange(12), ORACLE["special"])


def cosines(shape):
    return np.cos(np.arange(np.prod(shape), dtype="f")).reshape(shape)


class TestCosineAdapter:
    @pytest.mark.claim("cosine-adapter")
    def test_one_threshold_serves_queries_whose_cosines_are_shifted(self):
        """Cosines of relevant documents lie 0.3 above the others, and all of a query by a linear
        function of it higher or lower, which the adapter reads from the query."""

        def examples(seed):
            rng = np.random.default_rng(seed)
            query = rng.normal(size=(60, 6))
            query /= np.linalg.norm(query, axis=1, keepdims=True)
            shift = 0.6 * query @ (np.array([1, -1, 1, 0, 1, -1]) / 5**0.5)
            relevant = rng.uniform(size=(60, 12)) < 0.3
            exact = 0.1 + 0.3 * relevant + 0.08 * rng.normal(size=(60, 12))
            cosine = np.clip(exact + shift[:, None], -1, 1)
            return query.astype("f"), cosine.astype("f"), relevant, exact.astype("f")

        graph, start = nnx.split(CosineAdapter(6, hidden=8, kind="linear", rngs=nnx.Rngs(0)))
        optimizer = optax.adam(0.1)

        @jax.jit
        def train(start, query, cosine, relevant):
            def objective(parameters):
                adapter = nnx.merge(graph, parameters)
                loss = losses.relevance_filter_loss(cosine, adapter(query), relevant, kind="linear")
                return loss.mean()

            def step(carry, _):
                parameters, state = carry
                updates, state = optimizer.update(jax.grad(objective)(parameters), state)
                return (optax.apply_updates(parameters, updates), state), None

            return jax.lax.scan(step, (start, optimizer.init(start)), length=120)[0][0]

        query, cosine, relevant, exact = examples(1)
        adapter = nnx.merge(graph, train(start, *examples(0)[:3]))
        found = adapter.relevance(query, cosine)
        precision = jax.jit(metrics.precision_at_recall)
        by_cosine, by_adapter, by_truth = (
            precision(scores, relevant) for scores in (cosine, found, exact)
        )
        assert by_cosine < 0.5
        assert by_adapter > 0.85 * by_truth
        in_order = np.take_along_axis(np.asarray(found), np.argsort(cosine, axis=1), axis=1)
        assert np.all(np.diff(in_order, axis=1) >= 0)

    def test_is_the_map_of_a_network(self):
        adapter = CosineAdapter(5, hidden=4, rngs=nnx.Rngs(1))
        rng = np.random.default_rng(0)
        query, cosine = rng.normal(size=(3, 5)), rng.uniform(-1, 1, size=(3, 4))
        w1, w2 = (np.float64(x.kernel[...]) for x in (adapter.hidden, adapter.output))
        parameters = np.maximum(query @ w1, 0) @ w2

        @nnx.jit
        def evaluate(adapter, query, cosine, parameters):
            logits = losses.monotone_score_map(cosine, parameters, kind="power")
            return adapter(query), adapter.relevance(query, cosine), logits

        arguments = (x.astype("f") for x in (query, cosine, parameters))
        found, relevance, logits = evaluate(adapter, *arguments)
        np.testing.assert_allclose(found, parameters, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(relevance, 1 / (1 + np.exp(-np.float64(logits))), rtol=1e-5)
        assert adapter.hidden.bias is not None
        assert adapter.output.bias is not None

    def test_bad_input_is_named(self):
        for name, wrong in {"kind": "cubic", "hidden": 0}.items():
            with pytest.raises(ValueError, match=f"{name} must be"):
                CosineAdapter(3, **{name: wrong}, rngs=nnx.Rngs(0))


class TestSparseQueryVector:
    @pytest.mark.parametrize(
        ("name", "options"),
        {
            "plain": {},
            "logarithm": {"log_saturation": True, "norm": 1},
            "signed": {"relu": False},
        }.items(),
    )
    def test_matches_the_authors_code(self, name, options):
        function = partial(sparse_query_vector, special_token_mask=SPECIAL, **options)
        mask = ORACLE["attention_mask"]
        poisoned = np.where(mask[..., None], ORACLE["token_logits"], np.nan)

        @jax.jit
        def evaluate(logits):
            value, pull = jax.vjp(lambda x: function(x, mask), logits)
            return value, *pull(cosines((3, 12)))

        value, gradient = evaluate(poisoned)
        np.testing.assert_allclose(value, ORACLE[f"sparse/{name}"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradient, ORACLE[f"sparse/{name}/0"], rtol=1e-4, atol=1e-6)

    def test_nothing_to_see_is_0(self):
        @partial(jax.jit, static_argnames="norm")
        def evaluate(logits, mask, norm):
            value, pull = jax.vjp(lambda x: sparse_query_vector(x, mask, norm=norm), logits)
            return value, *pull(cosines((3, 12)))

        negative = -np.abs(ORACLE["token_logits"])
        for norm in (1, 2):
            for arguments in (
                (negative, np.ones((3, 5), bool)),
                (-negative, np.zeros((3, 5), bool)),
            ):
                for x in evaluate(*arguments, norm=norm):
                    np.testing.assert_array_equal(x, 0)
        half = jnp.asarray(ORACLE["token_logits"], jnp.bfloat16)
        found = sparse_query_vector(half, norm=None)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, np.maximum(np.float32(half).max(axis=1), 0))

    def test_bad_input_is_named(self):
        logits, mask = ORACLE["token_logits"], ORACLE["attention_mask"]
        with pytest.raises(ValueError, match="attention_mask must broadcast"):
            sparse_query_vector(logits, mask[:2])
        with pytest.raises(ValueError, match="special_token_mask must have shape"):
            sparse_query_vector(logits, mask, special_token_mask=SPECIAL[:3])
        with pytest.raises(ValueError, match="norm must be 1, 2 or None, got 3"):
            sparse_query_vector(logits, mask, norm=3)
        with pytest.raises(ValueError, match="log_saturation must be False"):
            sparse_query_vector(logits, mask, relu=False, log_saturation=True)
        with pytest.raises(ValueError, match="token_logits must have shape"):
            sparse_query_vector(logits[0, 0])
        with pytest.raises(TypeError, match="token_logits must have a floating-point type"):
            sparse_query_vector(logits.astype(int))


def test_dense_query_matches_the_authors_code():
    graph, state = nnx.split(DenseQuery(6, rngs=nnx.Rngs(0)))
    scale, zero = np.ones(6, "f"), np.zeros(6, "f")

    @jax.jit
    def values_and_gradients(hidden, kernel, bias):
        def vector(hidden, kernel, bias):
            parameters = {"projection": {"kernel": kernel, "bias": bias}}
            nnx.replace_by_pure_dict(state, parameters | {"norm": {"scale": scale, "bias": zero}})
            return nnx.merge(graph, state)(hidden)

        value, pull = jax.vjp(vector, hidden, kernel, bias)
        return value, pull(cosines((3, 6)))

    arguments = (ORACLE[name] for name in ("hidden", "kernel", "bias"))
    value, gradients = values_and_gradients(*arguments)
    np.testing.assert_allclose(value, ORACLE["dense"], rtol=1e-4, atol=1e-5)
    for i, gradient in enumerate(gradients):
        np.testing.assert_allclose(gradient, ORACLE[f"dense/{i}"], rtol=1e-3, atol=1e-4)
