"""The numbers, shards and edges of `unpg_loss` are in tests/losses/angular_margin_test.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

unpg = jax.jit(partial(losses.unpg_loss, scale=16.0))


def batch():
    rng = np.random.default_rng(0)
    e, w = rng.normal(size=(12, 40)), rng.normal(size=(5, 40))
    return e.astype("f"), w.astype("f"), rng.integers(5, size=12)


def by_formula(e, w, y):
    """The base loss, that with pairs, and which pairs i < k are in it."""
    e, w = (np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (e, w))
    pairs = {(i, k): e[i] @ e[k] for k in range(len(e)) for i in range(k) if y[i] != y[k]}
    ordered = sorted(pairs.values())
    low, high = (ordered[int(q * len(pairs))] for q in (0.25, 0.75))
    kept = {
        place: s
        for place, s in pairs.items()
        if low - 1.5 * (high - low) <= s <= high + 1.5 * (high - low)
    }
    z, rows = 16 * e @ w.T, np.arange(len(e))
    z[rows, y] = 16 * np.cos(np.arccos(z[rows, y] / 16) + 0.5)
    total = np.exp(z).sum(1)
    negatives = np.exp(16 * np.array(list(kept.values()))).sum()
    return np.log(total) - z[rows, y], np.log(total + negatives) - z[rows, y], kept


class TestClaims:
    @pytest.mark.claim("unpg")
    def test_pairs_of_strangers_join_the_denominator_and_outliers_do_not(self):
        e, w, y = batch()
        e[0] = e[1] = 3.0  # one cosine far beyond the whiskers
        y[:2] = 0, 1
        base, with_pairs, kept = by_formula(e, w, y)
        assert (0, 1) not in kept
        ours = unpg(e, w, y, where=np.ones((12, 5), bool))
        np.testing.assert_allclose(ours, with_pairs, rtol=1e-4)
        assert np.all(ours > base)

        @jax.jit
        def of_pairs(e):
            cosines, is_negative = losses.in_batch_negative_similarities(e, y)
            mask = losses.box_and_whisker_mask(cosines, where=is_negative)
            loss = lambda cosines: losses.unified_negative_pair_softmax(
                jnp.zeros((1, 2)), jnp.array([0]), cosines, negative_mask=mask
            ).sum()
            return jax.grad(loss)(cosines)

        slope = np.array(of_pairs(e))  # outliers have none
        assert set(zip(*np.nonzero(slope > 1e-30))) <= set(kept)
        slope[tuple(np.array(list(kept)).T)] = 0
        np.testing.assert_array_equal(slope, 0)

    def test_training_with_pairs_parts_the_nearest_strangers(self):
        """Embeddings and class vectors as free parameters, many more classes than features."""
        rng = np.random.default_rng(0)
        y = np.repeat(np.arange(16), 2)
        start = rng.normal(size=(48, 3)).astype("f")

        def trained(loss):
            def step(x, _):
                return x - 0.1 * jax.grad(lambda x: loss(x[:32], x[32:], y).mean())(x), None

            x, _ = jax.jit(lambda x: jax.lax.scan(step, x, length=150))(start)
            e = np.float64(x[:32]) / np.linalg.norm(x[:32], axis=1, keepdims=True)
            return np.max(e @ e.T, where=y[:, None] != y, initial=-1)

        alone = trained(lambda *a: losses.arcface_loss(*a, scale=16.0))
        assert trained(lambda *a: losses.unpg_loss(*a, scale=16.0)) < alone - 0.005


class TestPieces:
    def test_no_pair_and_no_negative_leave_the_head(self):
        e, w, _ = batch()
        everything = np.ones((12, 5), bool)
        same = np.zeros(12, int)
        alone = unpg(e, w, same, where=everything)
        np.testing.assert_allclose(alone, by_formula_of_one_class(e, w), rtol=1e-4)

        @jax.jit
        def without(t):
            y = jnp.array([0, 1])
            return [
                losses.unified_negative_pair_softmax(t, y, n, scale=8.0, negative_mask=mask)
                for n, mask in ((jnp.zeros((0,)), None), (jnp.ones(3), np.zeros(3, bool)))
            ] + [losses.softmax_cross_entropy(8.0 * t, y)]

        empty, masked, base = without(jnp.array([[0.3, 0.1, 0.2], [0.5, 0.1, 0.9]]))
        np.testing.assert_allclose(empty, base, rtol=1e-5)
        np.testing.assert_allclose(masked, base, rtol=1e-5)

    def test_excluded_and_unknown_examples_are_in_no_pair(self):
        e, w, y = batch()
        expected = by_formula(e[:9], w, y[:9])[1]
        masked = unpg(e, w, y, where=np.tile(np.arange(12)[:, None] < 9, (1, 5)))
        np.testing.assert_allclose(masked[:9], expected, rtol=1e-4)
        assert np.all(masked[9:] == 0)
        y[9:] = -1
        unknown = unpg(e, w, y, where=np.ones((12, 5), bool))
        np.testing.assert_allclose(unknown[:9], expected, rtol=1e-4)
        assert np.all(np.isnan(unknown[9:]))

    def test_box_plot_of_sets(self):
        mask = jax.jit(partial(losses.box_and_whisker_mask, whisker=0.5))
        x = np.random.default_rng(0).normal(size=8).astype("f")
        for n in range(9):
            where = np.arange(8) < n
            found = mask(x, where=where)
            if n:
                ordered = np.sort(x[:n])
                low, high = ordered[int(0.25 * n)], ordered[int(0.75 * n)]
                where &= (x >= low - 0.5 * (high - low)) & (x <= high + 0.5 * (high - low))
            np.testing.assert_array_equal(found, where)
        equal = mask(np.float32([0.2] * 7 + [0.9]), where=np.ones(8, bool))
        np.testing.assert_array_equal(equal, [True] * 7 + [False])
        assert losses.box_and_whisker_mask(jnp.zeros((0, 2))).shape == (0, 2)

    def test_bad_input_is_named(self):
        e, w, y = batch()
        with pytest.raises(ValueError, match="head must be one of"):
            losses.unpg_loss(e, w, y, head="magface")
        with pytest.raises(ValueError, match="whisker must be in"):
            losses.box_and_whisker_mask(e, whisker=-1.0)
        with pytest.raises(ValueError, match=r"embeddings must have shape \[batch, features\]"):
            losses.in_batch_negative_similarities(e[0], y)
        with pytest.raises(ValueError, match="negative_mask must broadcast"):
            losses.unified_negative_pair_softmax(e, y, e[0], negative_mask=np.ones(3, bool))
        with pytest.raises(TypeError, match="negative_similarities must have a floating"):
            losses.unified_negative_pair_softmax(e, y, y)


def by_formula_of_one_class(e, w):
    """ArcFace's loss of examples that are all of class 0."""
    e, w = (np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (e, w))
    z = 16 * e @ w.T
    z[:, 0] = 16 * np.cos(np.arccos(z[:, 0] / 16) + 0.5)
    return np.log(np.exp(z).sum(1)) - z[:, 0]
