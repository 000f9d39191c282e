from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import BehaviorAggregationParams, SimpleX, behavior_aggregation

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "collaborative_filtering.npz")
NAMES = ("projection", "key_kernel", "key_bias", "query")
PARAMS = BehaviorAggregationParams(*(ORACLE[name] for name in NAMES))
MODES = ("mean", "user_attention", "self_attention")


@partial(jax.jit, static_argnames="mode")
def evaluate(mode, user, history, params, where, gamma, cotangent):
    """The vectors and their gradients, compiled once a mode."""
    h, pull = jax.vjp(
        lambda *vectors: behavior_aggregation(*vectors, mode=mode, gamma=gamma, where=where),
        user,
        history,
        params,
    )
    return h, *pull(cotangent)


@pytest.mark.parametrize("mode", MODES)
class TestAggregation:
    def test_matches_the_authors_code(self, mode):
        where, history = ORACLE["where"], ORACLE["history"]
        poisoned = np.where(where[..., None], history, np.nan)
        h, user, items, params = evaluate(
            mode, ORACLE["user"], poisoned, PARAMS, where, 0.3, ORACLE["cotangent"]
        )
        np.testing.assert_allclose(h, ORACLE[mode], rtol=1e-5, atol=1e-6)
        found = {"user": user, "history": items, **params._asdict()}
        for name, gradient in found.items():
            expected = ORACLE.get(f"{mode}/{name}", np.zeros(()))  # what the mode does not use
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5, err_msg=name)

    def test_no_history_and_no_weight_for_it(self, mode):
        where = np.zeros((3, 4), bool)
        user, cotangent = ORACLE["user"], ORACLE["cotangent"]
        h, *gradients = evaluate(mode, user, ORACLE["history"], PARAMS, where, 0.3, cotangent)
        np.testing.assert_allclose(h, 0.3 * user, rtol=1e-6)
        np.testing.assert_array_equal(gradients[1], 0)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
        empty = behavior_aggregation(user, ORACLE["history"][:, :0], PARAMS, mode=mode, gamma=0.3)
        np.testing.assert_allclose(empty, h, rtol=1e-6)
        h, *_ = evaluate(mode, user, ORACLE["history"], PARAMS, ORACLE["where"], 1.0, cotangent)
        np.testing.assert_array_equal(h, user)

    def test_bad_input_is_named(self, mode):
        user, history = ORACLE["user"], ORACLE["history"]
        aggregate = partial(behavior_aggregation, mode=mode)
        with pytest.raises(ValueError, match="history must have shape"):
            aggregate(user, history[:2], PARAMS)
        with pytest.raises(ValueError, match="where must broadcast"):
            aggregate(user, history, PARAMS, where=np.ones(3, bool))
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
            aggregate(user, history, PARAMS, gamma=1.5)
        with pytest.raises(ValueError, match=r"params\.projection must have shape \(5, 5\)"):
            aggregate(user, history, PARAMS._replace(projection=np.ones((5, 4))))
        with pytest.raises(TypeError, match="user must have a floating-point type"):
            aggregate(user.astype(int), history, PARAMS)
        if mode != "mean":
            with pytest.raises(ValueError, match=r"params\.key_bias must not be None"):
                aggregate(user, history, PARAMS._replace(key_bias=None))


@pytest.mark.parametrize("mode", ["mean", "self_attention"])
def test_model_is_the_function_of_its_tables(mode):
    users, history = np.array([5, 0]), np.array([[1, 8, -7], [3, 100, 2]])
    where = np.array([[1, 1, 0], [1, 0, 1]]) == 1

    @nnx.jit
    def outputs(users, history, where):
        model = SimpleX(6, 9, features=4, mode=mode, gamma=0.3, rngs=nnx.Rngs(0))
        h = model(users, history, where=where)
        cosines = model.cosines(h, jnp.array([[3, 0], [1, 1]])), model.all_cosines(h)
        dropped = model(users, history, where=where, key=jax.random.key(0))
        params = BehaviorAggregationParams(
            model.projection.kernel[...],
            *(() if mode == "mean" else (model.key.kernel[...], model.key.bias[...])),
            *((model.query.kernel[:, 0],) if mode == "self_attention" else ()),
        )
        table = model.items.embedding[...]
        vectors = model.users.embedding[...][users], table[history * where]
        expected = behavior_aggregation(*vectors, params, mode=mode, gamma=0.3, where=where)
        return h, *cosines, dropped, table, expected

    h, cosines, all_cosines, dropped, table, expected = outputs(users, history, where)
    np.testing.assert_allclose(h, expected, rtol=1e-5)
    norms = [np.linalg.norm(x, axis=1, keepdims=True) for x in (h, table)]
    scores = (h / norms[0]) @ (table / norms[1]).T
    np.testing.assert_allclose(all_cosines, scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cosines[0], scores[0, [3, 0]], rtol=1e-5, atol=1e-6)
    kept = np.asarray(dropped) != 0
    np.testing.assert_allclose(dropped, np.where(kept, h / 0.9, 0), rtol=1e-5)


def test_model_without_history_in_half_precision():
    @nnx.jit
    def outputs(users):
        model = SimpleX(6, 9, features=4, gamma=1.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        h = model(users)
        return h, model.all_cosines(h), model.users.embedding[...].astype(jnp.bfloat16)

    h, cosines, table = outputs(np.array([2, 9]))
    assert h.dtype == jnp.bfloat16
    np.testing.assert_array_equal(h[0], table[2])
    assert np.all(np.isnan(np.float32(h[1])))
    assert cosines.dtype == jnp.float32
    for name, wrong in {"mode": "max", "gamma": -0.1, "dropout": 1.0, "features": 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            SimpleX(2, 2, **{name: wrong}, rngs=nnx.Rngs(0))
