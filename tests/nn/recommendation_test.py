from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref import losses
from jaxref.metrics import ndcg_at_k, recall_at_k
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


USERS, ITEMS = 120, 200


def choices(seed):
    """Fifteen items that each user chose: history to train on `[users, 10]`, which items these are,
    and which are the five to find.

    Users and items belong to eight groups. A user chooses without replacement, an item of the own
    group in proportion to 0.8 / sqrt(rank), one of another to 0.2 / 7 / sqrt(rank), with a rank of
    popularity for every item.
    """
    rng = np.random.default_rng(seed)
    user_group, item_group = rng.integers(8, size=USERS), rng.integers(8, size=ITEMS)
    rank = rng.permutation(np.arange(1, ITEMS + 1))
    rate = np.where(user_group[:, None] == item_group, 0.8, 0.2 / 7) / np.sqrt(rank)
    order = np.argsort(-(np.log(rate) + rng.gumbel(size=rate.shape)), axis=1)
    chosen = rng.permuted(order[:, :15], axis=1)
    known, hidden = np.zeros((2, USERS, ITEMS), bool)
    np.put_along_axis(known, chosen[:, :10], True, axis=1)
    np.put_along_axis(hidden, chosen[:, 10:], True, axis=1)
    return chosen[:, :10], known, hidden.astype("f")


def test_trained_with_many_negatives_it_finds_more_than_with_few_or_by_pairs():
    """SimpleX learns three sets of `choices` by the cosine contrastive loss with 64 negatives or 2,
    and by BPR of inner products with 64 or 1, at a learning rate that is better for BPR. Items to
    find are ranked among all that a user did not train on."""
    users, model_of = np.arange(USERS), partial(SimpleX, USERS, ITEMS, features=16)

    def found(paired, number, rate, key, history, known, hidden):
        graph, start = nnx.split(model_of(rngs=nnx.Rngs(key)))
        optimizer = optax.adam(rate)

        def scores(model, h):
            return jnp.where(paired, h @ model.items.embedding[...].T, model.all_cosines(h))

        def objective(params, key):
            model = nnx.merge(graph, params)
            keys = jax.random.split(key, 3)
            at = jax.random.randint(keys[0], (USERS, 1), 0, 10)
            others = jax.random.randint(keys[1], (64,), 0, ITEMS)
            h = model(users, history, where=jnp.arange(10) != at, key=keys[2])
            s = scores(model, h)
            positive = jnp.take_along_axis(s, jnp.take_along_axis(history, at, 1), 1)[:, 0]
            negative, counts = s[:, others], jnp.arange(64) < number
            contrastive = losses.cosine_contrastive_loss(
                positive, negative, margin=0.4, negative_weight=1.0, where=counts
            )
            by_pairs = losses.bayesian_personalized_ranking_loss(positive, negative, where=counts)
            return jnp.mean(jnp.where(paired, by_pairs, contrastive))

        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(objective)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 100)
        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), keys)
        model = nnx.merge(graph, params)
        ranked = scores(model, model(users, history))
        metrics = ndcg_at_k, recall_at_k
        return jnp.stack([f(ranked, hidden, 20, where=~known).mean() for f in metrics])

    data = map(np.stack, zip(*map(choices, range(3))))
    over_data = jax.vmap(found, in_axes=(None, None, None, *[0] * 4))
    over_losses = jax.jit(jax.vmap(over_data, in_axes=(0, 0, 0, *[None] * 4)))
    paired, number = np.array([False, False, True, True]), np.array([64, 2, 64, 1])
    rate = np.where(paired, 0.01, 0.03)
    keys = jax.random.split(jax.random.key(0), 3)
    many, *rest = np.mean(over_losses(paired, number, rate, keys, *data), axis=1)
    for other in rest:
        assert np.all(many > other + 0.03)  # NDCG and recall
