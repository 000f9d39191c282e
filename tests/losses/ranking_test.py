from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from jaxref import losses
from jaxref.losses.ranking import LAMBDA_SCHEMES
from jaxref.metrics import top_group_profit

RELEASE = np.load(Path(__file__).parents[1] / "oracles" / "ranking.npz")
LOSSES = {
    "profit": losses.profit_aware_ranking_loss,
    "ndcg2pp": losses.lambda_ranking_loss,
    "ndcg1": partial(losses.lambda_ranking_loss, scheme="ndcg1"),
}


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(("profit", 6), ("profit_3", 3))
    def test_profit_aware_loss_matches_the_release(self, name, top_k):
        loss = self.variant(partial(losses.profit_aware_ranking_loss, top_k=top_k))
        ours, vjp = jax.vjp(lambda s: loss(s, RELEASE["profits"]), RELEASE["scores"])
        np.testing.assert_allclose(ours, RELEASE[name], rtol=1e-5)
        np.testing.assert_allclose(
            vjp(np.ones(3, "f"))[0], RELEASE[f"{name}_grad"], rtol=1e-4, atol=1e-6
        )

    @chex.variants(with_jit=True)
    @parameterized.parameters(*LAMBDA_SCHEMES)
    def test_lambda_losses_match_the_release(self, scheme):
        loss = self.variant(partial(losses.lambda_ranking_loss, scheme=scheme, sigma=0.7, mu=3.0))
        ours, vjp = jax.vjp(lambda s: loss(s, RELEASE["relevance"]), RELEASE["scores"])
        np.testing.assert_allclose(ours, RELEASE[scheme], rtol=1e-5)
        np.testing.assert_allclose(
            vjp(np.ones(3, "f"))[0], RELEASE[f"{scheme}_grad"], rtol=1e-4, atol=1e-6
        )


class TestClaims:
    @pytest.mark.claim("pa-riskranker")
    def test_the_top_ten_earn_more_than_by_cross_entropy_on_the_risky_label(self):
        """Linear scores of lists of 50 traders, whose rare large profits have another direction
        than the many small ones that decide a label."""
        rng = np.random.default_rng(0)
        features = rng.normal(size=(60, 50, 4)).astype(np.float32)
        small, large = features[..., 0], np.maximum(features[..., 1] - 1.0, 0)
        profits = small + 40 * large**2 + 0.5 * rng.standard_t(3, size=(60, 50))
        profits = profits.astype(np.float32)
        risky = profits > np.quantile(profits, 0.5)

        def earned(loss):
            step = lambda _, w: w - 0.3 * jax.grad(lambda w: loss(features[:40] @ w))(w)
            w = jax.jit(lambda w: jax.lax.fori_loop(0, 100, step, w))(jnp.zeros(4))
            return top_group_profit(features[40:] @ w, profits[40:], 10).mean()

        by_profit = earned(lambda s: losses.profit_aware_ranking_loss(s, profits[:40]).mean())
        by_label = earned(lambda s: optax.sigmoid_binary_cross_entropy(s, risky[:40]).mean())
        assert by_profit > 1.1 * by_label

    def test_only_differences_of_scores_and_of_profits_count(self):
        scores, profits = RELEASE["scores"], RELEASE["profits"]
        loss = jax.jit(losses.profit_aware_ranking_loss)
        expected = loss(scores, profits)
        np.testing.assert_allclose(loss(scores + 3, profits), expected, rtol=1e-4)
        np.testing.assert_allclose(loss(scores, profits - 7), expected, rtol=1e-4)
        assert np.all(np.abs(loss(scores, 10 * profits) - expected) > 1e-3)
        slope = jax.jit(jax.grad(lambda s: loss(s, profits).sum()))(scores)
        np.testing.assert_allclose(slope.sum(-1), 0, atol=1e-5)
        assert np.all(np.sum(slope != 0, axis=-1) == 6)
        by_profits = jax.grad(lambda p: losses.profit_aware_ranking_loss(scores, p).sum())(profits)
        assert np.all(by_profits == 0)

    def test_swapping_two_members_in_the_right_order_costs(self):
        scores, profits = np.array([3.0, 2.0, 1.0], "f"), np.array([50.0, 20.0, 0.0], "f")
        for i, j in ((0, 1), (1, 2), (0, 2)):
            swapped = scores.copy()
            swapped[[i, j]] = swapped[[j, i]]
            for loss in (losses.profit_aware_ranking_loss, losses.lambda_ranking_loss):
                y = profits if loss is losses.profit_aware_ranking_loss else np.array([2, 1, 0])
                assert loss(swapped, y) > loss(scores, y)


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_axis_vmap_and_leading_axes(self, name):
        scores, y = RELEASE["scores"], RELEASE["relevance"]
        expected = LOSSES[name](scores, y)
        assert expected.shape == (3,)
        np.testing.assert_allclose(LOSSES[name](scores.T, y.T, axis=0), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(LOSSES[name])(scores, y), expected, rtol=1e-6)

    def test_absent_members_count_for_nothing(self, name):
        scores, y, where = RELEASE["scores"], RELEASE["relevance"], np.arange(9) % 2 == 0
        poisoned, unknown = np.where(where, scores, np.nan), np.where(where, y, 99)
        ours, vjp = jax.vjp(lambda s: LOSSES[name](s, unknown, where=where), poisoned)
        expected = LOSSES[name](scores[:, where], y[:, where])
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        gradient = vjp(np.ones(3, "f"))[0]
        assert np.all(gradient[:, ~where] == 0)
        assert np.all(np.isfinite(gradient))
        nobody, vjp = jax.vjp(lambda s: LOSSES[name](s, y, where=np.zeros(9, bool)), scores)
        assert np.all(nobody == 0)
        assert np.all(vjp(np.ones(3, "f"))[0] == 0)

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_equal_values_stay_finite(self, name, size):
        scores = np.array([[size, 0.0, -size], [size] * 3], np.float32)
        for y in (np.array([[2, 0, 1]] * 2), np.ones((2, 3)), np.zeros((2, 3))):
            value, slope = jax.value_and_grad(lambda s: LOSSES[name](s, y).sum())(scores)
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))
            if name != "ndcg1" and np.all(y == y[0, 0]):
                assert value == 0
        assert LOSSES[name](scores[:, :1], y[:, :1]).shape == (2,)

    def test_half_precision_computes_in_float32(self, name):
        half = jnp.asarray(RELEASE["scores"], jnp.bfloat16)
        ours = LOSSES[name](half, RELEASE["relevance"])
        assert ours.dtype == jnp.bfloat16
        expected = LOSSES[name](half.astype(jnp.float32), RELEASE["relevance"])
        np.testing.assert_array_equal(ours, expected.astype(jnp.bfloat16))

    def test_bad_input_is_named(self, name):
        scores, y = RELEASE["scores"], RELEASE["relevance"]
        argument = "profits" if name == "profit" else "relevance"
        with pytest.raises(ValueError, match=rf"{argument} must have shape \(3, 9\)"):
            LOSSES[name](scores, y[:2])
        with pytest.raises(ValueError, match="where must broadcast"):
            LOSSES[name](scores, y, where=np.ones(4, bool))
        with pytest.raises(ValueError, match="axis must name"):
            LOSSES[name](scores, y, axis=2)
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            LOSSES[name](y, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "ndcg3"}, "scheme must be one of"),
        ({"sigma": 0.0}, "sigma must be in"),
        ({"mu": -1.0}, "mu must be in"),
        ({"relevance": np.full((3, 9), -1)}, "relevance must be in"),
    ],
)
def test_bad_options_of_the_lambda_loss(options, message):
    arguments = {"relevance": RELEASE["relevance"]} | options
    with pytest.raises(ValueError, match=message):
        losses.lambda_ranking_loss(RELEASE["scores"], **arguments)
    with pytest.raises(ValueError, match="top_k must be an integer"):
        losses.profit_aware_ranking_loss(RELEASE["scores"], RELEASE["profits"], top_k=0)
