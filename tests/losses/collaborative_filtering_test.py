from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses
from jaxref.metrics import ndcg_at_k

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "collaborative_filtering.npz")
LOSSES = {
    "contrastive/sum": partial(losses.cosine_contrastive_loss, margin=0.2),
    "contrastive/mean": partial(losses.cosine_contrastive_loss, margin=0.2, negative_weight=10),
    "ranking": losses.bayesian_personalized_ranking_loss,
    "hinge": partial(losses.pairwise_hinge_loss, margin=0.7),
    "softmax": losses.sampled_softmax_loss,
}


@jax.jit
def evaluate(scores, where):
    """Values and gradients of all losses, compiled once for all numbers of one shape."""

    def both(loss):
        value, pull = jax.vjp(lambda s: loss(s[:, 0], s[:, 1:], where=where[:, 1:]), scores)
        return value, *pull(jnp.ones_like(value))

    return {name: both(loss) for name, loss in LOSSES.items()}


class TestNumbers:
    def test_match_the_authors_code(self):
        found = evaluate(ORACLE["scores"], np.ones((3, 7), bool))
        for name, (value, gradient) in found.items():
            np.testing.assert_allclose(value, ORACLE[name], rtol=1e-5, err_msg=name)
            expected = ORACLE[f"{name}/scores"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7, err_msg=name)

    def test_one_negative(self):
        found = evaluate(ORACLE["scores"], np.broadcast_to(np.arange(7) < 2, (3, 7)))
        np.testing.assert_allclose(found["softmax"][0], found["ranking"][0], rtol=1e-5)


def choices(seed, users=40, items=150):
    """What users choose of items that are points on a sphere: mostly the nearest. Six to train on,
    four to find; where tables start, and what is drawn against the six in each of 60 steps."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(users + items, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    utility = 20 * points[:users] @ points[users:].T + rng.gumbel(size=(users, items))
    chosen = rng.permuted(np.argsort(-utility, axis=1)[:, :10], axis=1)
    labels = np.zeros((2, users, items), bool)
    for label, some in zip(labels, (chosen[:, :6], chosen[:, 6:])):
        np.put_along_axis(label, some, True, axis=1)
    tables = 0.3 * rng.normal(size=(users + items, 4)).astype("f")
    return (
        chosen[:, :6],
        *labels,
        tables[:users],
        tables[users:],
        rng.integers(items, size=(60, 64)),
    )


class TestClaims:
    @pytest.mark.claim("simplex-ccl")
    def test_easy_negatives_have_no_gradient_and_many_negatives_find_more(self):
        """Matrix factorization of the same choices by three losses, and by CCL with few negatives,
        which are drawn at random in each step."""
        scores = np.array([[0.4, 0.19, 0.21, 0.9, -1, 0, 0]] * 3, "f")
        value, slopes = evaluate(scores, np.ones((3, 7), bool))["contrastive/sum"]
        np.testing.assert_allclose(value, 0.6 + 0.01 + 0.7, rtol=1e-5)
        np.testing.assert_array_equal(slopes, [[-1, 0, 1, 1, 0, 0, 0]] * 3)

        def contrastive(chosen, others, where):
            return losses.cosine_contrastive_loss(chosen, others, negative_weight=2.0, where=where)

        def squares(chosen, others, where):
            del where
            return losses.squared_error(chosen, 1.0) + losses.squared_error(others, 0.0).mean(-1)

        ranking = losses.bayesian_personalized_ranking_loss

        def ndcg(kind, number, chosen, known, hidden, users, items, drawn):
            def scores(tables):
                unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in tables]
                user, item = (jnp.where(kind == 0, u, x) for u, x in zip(unit, tables))
                return user @ item.T

            def objective(tables, others):
                s = scores(tables)
                positive = jnp.take_along_axis(s, chosen, axis=1)
                negative = jnp.broadcast_to(s[:, None, others], (*positive.shape, 64))
                kinds = [
                    partial(loss, where=jnp.arange(64) < number)
                    for loss in (contrastive, ranking, squares)
                ]
                return jnp.mean(jax.lax.switch(kind, kinds, positive, negative))

            def step(tables, others):
                slopes = jax.grad(objective)(tables, others)
                return [x - 30 * slope for x, slope in zip(tables, slopes)], None

            tables, _ = jax.lax.scan(step, [users, items], drawn)
            return ndcg_at_k(scores(tables), hidden.astype("f"), 10, where=~known).mean()

        data = map(np.stack, zip(*map(choices, range(2))))
        over_data = jax.vmap(ndcg, in_axes=(None, None, *[0] * 6))
        over_losses = jax.jit(jax.vmap(over_data, in_axes=(0, 0, *[None] * 6)))
        found = over_losses(np.array([0, 0, 1, 2]), np.array([64, 2, 64, 64]), *data)
        many, few, by_ranking, by_squares = np.mean(found, axis=1)
        assert many > few + 0.04
        assert many > by_ranking + 0.04
        assert many > by_squares + 0.04


class TestEdges:
    def test_excluded_negatives_may_hold_anything(self):
        where = np.arange(7) < np.array([[5], [1], [7]])
        found = evaluate(np.where(where, ORACLE["scores"], np.nan), where)
        chosen, others = np.float64(ORACLE["scores"][0, 0]), np.float64(ORACLE["scores"][0, 1:5])
        excess = np.maximum(others - 0.2, 0)
        expected = {
            "contrastive/sum": 1 - chosen + excess.sum(),
            "contrastive/mean": 1 - chosen + 10 * excess.mean(),
            "ranking": np.log1p(np.exp(others - chosen)).mean(),
            "hinge": np.maximum(0.7 + others - chosen, 0).mean(),
            "softmax": np.log1p(np.exp(others - chosen).sum()),
        }
        for name, (value, slope) in found.items():
            nothing = (1 - ORACLE["scores"][1, 0]) * ("contrastive" in name)
            all_of_row = ORACLE[name][2]
            np.testing.assert_allclose(value, [expected[name], nothing, all_of_row], rtol=1e-5)
            np.testing.assert_array_equal(slope[~where], 0)
            assert np.all(np.isfinite(slope))
        empty = losses.cosine_contrastive_loss(chosen, others[:0], negative_weight=2.0)
        np.testing.assert_allclose(empty, 1 - chosen, rtol=1e-5)

    def test_far_and_equal_scores(self):
        scores = np.array([[1e4, -1e4, 1e4], [-1e4, 1e4, 0], [1, 0.2, 0.2]], np.float32)
        scores = np.pad(scores, ((0, 0), (0, 4)))
        found = evaluate(scores, np.broadcast_to(np.arange(7) < 3, (3, 7)))
        for value, slope in found.values():
            assert np.all(np.isfinite(value))
            assert np.all(np.isfinite(slope))
        np.testing.assert_array_equal(found["contrastive/sum"][0][2], 0)
        np.testing.assert_array_equal(found["contrastive/sum"][1][2], 0)
        expected = [np.log(2) / 2, 1.5e4, np.log1p(np.exp(-0.8))]
        np.testing.assert_allclose(found["ranking"][0], expected, rtol=1e-5)

    def test_half_precision_computes_in_float32(self):
        half = jnp.asarray(ORACLE["scores"], jnp.bfloat16)
        where = np.ones((3, 7), bool)
        found, expected = evaluate(half, where), evaluate(half.astype("f"), where)
        for name, (value, _) in found.items():
            assert value.dtype == jnp.bfloat16
            np.testing.assert_array_equal(value, expected[name][0].astype(jnp.bfloat16))

    def test_bad_input_is_named(self):
        s = ORACLE["scores"]
        for loss in LOSSES.values():
            with pytest.raises(ValueError, match="negative_scores must have shape"):
                loss(s[:, 0], s[:2, 1:])
            with pytest.raises(ValueError, match="where must broadcast"):
                loss(s[:, 0], s[:, 1:], where=np.ones(3, bool))
            with pytest.raises(TypeError, match="positive_scores must have a floating-point type"):
                loss(np.ones(3, int), s[:, 1:])
        contrastive = losses.cosine_contrastive_loss
        with pytest.raises(ValueError, match=r"margin must be in \[-1, 1\], got 1\.5"):
            contrastive(s[:, 0], s[:, 1:], margin=1.5)
        with pytest.raises(ValueError, match="negative_weight must be in"):
            contrastive(s[:, 0], s[:, 1:], negative_weight=-1.0)
        with pytest.raises(ValueError, match="margin must be in"):
            losses.pairwise_hinge_loss(s[:, 0], s[:, 1:], margin=-1.0)
