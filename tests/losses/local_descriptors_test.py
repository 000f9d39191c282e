"""The marked claim of the paper is in tests/losses/angular_margin_median_test.py."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

STORED = np.load(Path(__file__).parents[1] / "oracles" / "metric_learning.npz")
Q, PAIRED, NEGATIVES = (STORED[key] for key in ("query", "positive", "negatives"))
run = jax.jit(
    jax.value_and_grad(partial(losses.attentive_local_triplet_loss, margin=0.3), argnums=(0, 1, 2))
)
match = jax.jit(partial(losses.match_local_descriptors, lowe_ratio=1.0, top_fraction=1.0))


class TestNumbers:
    def test_agree_with_the_authors(self):
        value, gradients = run(Q, PAIRED, NEGATIVES)
        np.testing.assert_allclose(value, STORED["local"], rtol=1e-5)
        for ours, name in zip(gradients, ("query", "positive", "negatives")):
            np.testing.assert_allclose(ours, STORED[f"local_d_{name}"], rtol=1e-4, atol=1e-6)
        places, matched = jax.jit(losses.match_local_descriptors)(Q, PAIRED)
        np.testing.assert_array_equal(np.flatnonzero(matched), STORED["match_positive"])
        np.testing.assert_array_equal(places[matched], STORED["match_query"])

    def test_one_set_is_matched_with_itself(self):
        order = np.random.default_rng(0).permutation(8)
        places, matched = match(Q, 3 * Q[order])
        np.testing.assert_array_equal(places, order)
        assert np.all(matched)

    def test_only_the_nearer_of_two_that_share_their_nearest(self):
        query, positive = np.zeros((2, 8, 5), "f")
        query[:, :2] = [[1, 0], [0, 1]] + [[-1, 0]] * 6
        positive[:, :2] = [[1, 0.2], [1, 0.1], [0, 1]] + [[-1, 0]] * 5
        places, matched = match(query, positive)
        np.testing.assert_array_equal(places[:3], [0, 0, 1])
        np.testing.assert_array_equal(matched, [False, True, True] + [False] * 5)


class TestEdges:
    def test_nothing_matches_and_points_fall_together(self):
        for images in ((0 * Q, 0 * Q), (np.ones_like(Q), np.ones_like(Q)), (1e4 * Q, 1e4 * Q)):
            value, gradients = run(*images, NEGATIVES)
            assert np.isfinite(value)
            assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
        value, _ = run(np.ones_like(Q), np.ones_like(Q), NEGATIVES)
        assert value == 0  # no place is nearest more than another

    def test_vmap_takes_several_tuples(self):
        batch = [np.stack([x, x[..., ::-1]]) for x in (Q, PAIRED, NEGATIVES)]
        values, _ = jax.jit(jax.vmap(run))(*batch)
        np.testing.assert_allclose(values, np.full(2, STORED["local"]), rtol=1e-5)

    def test_half_precision_and_bad_input(self):
        loss = losses.attentive_local_triplet_loss
        none = jax.jit(partial(loss, top_fraction=0.0))(
            jnp.asarray(Q, "bfloat16"), PAIRED, NEGATIVES
        )
        assert none == 0
        assert none.dtype == jnp.bfloat16
        for option, value in (("margin", -1.0), ("lowe_ratio", 0.0), ("top_fraction", 1.5)):
            with pytest.raises(ValueError, match=f"{option} must be in"):
                loss(Q, PAIRED, NEGATIVES, **{option: value})
        with pytest.raises(ValueError, match=r"query must have shape \[places, features\]"):
            loss(Q[:0], PAIRED, NEGATIVES)
        with pytest.raises(ValueError, match="positive must have shape"):
            loss(Q, PAIRED[:, :3], NEGATIVES)
        with pytest.raises(ValueError, match="negatives must have shape"):
            loss(Q, PAIRED, NEGATIVES[0])
        with pytest.raises(ValueError, match="attention must have shape"):
            loss(Q, PAIRED, NEGATIVES, np.ones(3, "f"))
        with pytest.raises(TypeError, match="positive must have a floating-point type"):
            loss(Q, PAIRED.astype(int), NEGATIVES)
