"""The numbers, shards and edges of its loss are in tests/losses/angular_margin_test.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

STORED = np.load(Path(__file__).parents[1] / "oracles" / "angular_margin.npz")
scale_margin = jax.jit(losses.madacos_scale_margin)


def cosines_of(e, w):
    e, w = (np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (e, w))
    return (e @ w.T).astype("f")


def batch(spread):
    rng = np.random.default_rng(0)
    weights, labels = rng.normal(size=(6, 12)), rng.integers(6, size=9)
    return cosines_of(weights[labels] + spread * rng.normal(size=(9, 12)), weights), labels


class TestClaims:
    @pytest.mark.claim("cfcd-madacos")
    def test_the_median_example_always_has_the_chosen_probability(self):
        for alpha in (0.02, 0.3):
            scales = []
            for spread in (0.3, 0.2, 0.1):
                cosines, labels = batch(spread)
                for size in (8, 9):
                    where = np.tile(np.arange(9)[:, None] < size, (1, 6))
                    scale, margin = scale_margin(cosines, labels, alpha=alpha, where=where)
                    assert margin > 0
                    target = cosines[np.arange(size), labels[:size]]
                    median = np.argsort(target)[(size - 1) // 2]
                    logits = np.float64(scale) * (
                        np.float64(cosines[median]) - np.float64(margin) * np.eye(6)[labels[median]]
                    )
                    p = np.exp(logits - logits.max())
                    np.testing.assert_allclose(p[labels[median]] / p.sum(), alpha, rtol=1e-3)
                scales.append(scale)
            assert np.all(np.diff(scales) > 0)  # stricter as the training goes on


class TestScaleAndMargin:
    def test_agree_with_the_authors(self):
        for name, step in (("madacos", 0), ("madacos_loose", 1)):
            cosines = cosines_of(STORED["embeddings"][step], STORED["weights"])
            found = scale_margin(cosines, STORED["labels"])
            np.testing.assert_allclose(found, STORED[f"{name}_scale_margin"], rtol=1e-4)

    def test_limits_evaluation_and_gradient(self):
        cosines, labels = batch(0.1)
        e, w, y = STORED["embeddings"][0], STORED["weights"], STORED["labels"]

        @jax.jit
        def several(cosines, labels, e, w, y):
            capped = losses.madacos_scale_margin(cosines, labels, max_scale=50.0)[0]
            slope = jax.grad(lambda c: sum(losses.madacos_scale_margin(c, labels)))(cosines)
            scale, _ = losses.madacos_scale_margin(
                losses.normalized_softmax_logits(e, w, scale=1.0), y
            )
            without = losses.madacos_loss(e, w, y, training=False)
            return capped, slope, without, losses.normalized_softmax_loss(e, w, y, scale=scale)

        capped, slope, without, plain = several(cosines, labels, e, w, y)
        assert capped == 50
        np.testing.assert_array_equal(slope, 0)
        np.testing.assert_allclose(without, plain, rtol=1e-5)
        everything = np.ones((9, 6), bool)
        assert scale_margin(-cosines, labels, alpha=0.02, where=everything)[0] == 32
        for extreme in (np.ones((9, 6), "f"), np.zeros((9, 6), "f"), np.eye(6, dtype="f")[labels]):
            found = scale_margin(extreme, labels, alpha=0.02, where=everything)
            assert np.all(np.isfinite(found))

    def test_examples_that_do_not_count(self):
        cosines, labels = batch(0.3)
        where = np.tile(np.arange(9)[:, None] < 6, (1, 6))
        found = scale_margin(cosines, labels, alpha=0.02, where=where)
        labels[6:] = -1, 6, 99
        expected = scale_margin(cosines, labels, alpha=0.02, where=~np.zeros_like(where))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        nothing = scale_margin(cosines, labels, alpha=0.02, where=np.zeros_like(where))
        np.testing.assert_array_equal(nothing, [32, 0])
        np.testing.assert_array_equal(scale_margin(cosines[:0], labels[:0]), [32, 0])
        only = np.eye(6, dtype=bool)[labels % 6]
        assert scale_margin(cosines, labels % 6, alpha=0.02, where=only)[1] == 0

    def test_bad_input_is_named(self):
        cosines, labels = batch(0.3)
        for options in ({"alpha": 0.0}, {"alpha": 1.0}, {"rho": 0.0}, {"min_scale": 0.0}):
            with pytest.raises(ValueError, match=f"{next(iter(options))} must be in"):
                losses.madacos_scale_margin(cosines, labels, **options)
        with pytest.raises(ValueError, match="max_scale must be in"):
            losses.madacos_scale_margin(cosines, labels, max_scale=8.0)
        with pytest.raises(ValueError, match="at least two classes"):
            losses.madacos_scale_margin(cosines[:, :1], labels * 0)
        with pytest.raises(TypeError, match="cosines must have a floating-point type"):
            losses.madacos_scale_margin(jnp.ones((2, 2), int), labels[:2])
