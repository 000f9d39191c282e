from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses
from jaxref.metrics import concordance_index

PEERS = np.load(Path(__file__).parents[1] / "oracles" / "survival.npz")
HAZARD = tuple(PEERS[name] for name in ("logits", "interval", "observed"))
COX = tuple(PEERS[name] for name in ("log_risk", "times", "ended"))
SHORT, LONG = np.array([1.0, 3.0, 7.0]), np.array([14.0, 28.0])


def mesh_of_eight():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_hazard_loss_matches_pycox(self):
        loss = self.variant(losses.discrete_hazard_loss)
        ours, vjp = jax.vjp(lambda a: loss(a, *HAZARD[1:]), HAZARD[0])
        np.testing.assert_allclose(ours, PEERS["hazard"], rtol=1e-5)
        expected = PEERS["hazard_grad"]
        np.testing.assert_allclose(vjp(np.ones(8, "f"))[0], expected, rtol=1e-4, atol=1e-7)

    @chex.variants(with_jit=True, without_jit=True)
    def test_cox_loss_matches_pycox(self):
        loss = self.variant(losses.cox_partial_likelihood_loss)
        ours, vjp = jax.vjp(lambda r: loss(r, *COX[1:]), COX[0])
        ends = COX[2].sum()
        np.testing.assert_allclose(ours.sum() / ends, PEERS["cox_mean"], rtol=1e-5)
        gradient = vjp(np.full(12, 1 / ends, "f"))[0]
        np.testing.assert_allclose(gradient, PEERS["cox_grad"], rtol=1e-4, atol=1e-6)
        assert np.all(ours[COX[2] == 0] == 0)

    def test_cox_loss_with_ties_matches_the_formula(self):
        rng = np.random.default_rng(0)
        risk, times = rng.normal(size=30).astype(np.float32), PEERS["tied_times"]
        ended = PEERS["tied_ended"]
        at_risk = [np.log(np.sum(np.exp(np.float64(risk[times >= t])))) for t in times]
        ours = losses.cox_partial_likelihood_loss(risk, times, ended)
        np.testing.assert_allclose(ours, ended * (at_risk - risk), rtol=1e-5, atol=1e-6)

    def test_two_terms_match_their_parts(self):
        rng = np.random.default_rng(0)
        times = np.array([0.5, 3.0, 7.0, 7.5, 20.0, 90.0, 10.0, 2.0], np.float32)
        observed = np.array([1, 1, 1, 1, 1, 1, 0, 0])
        short, long = (rng.normal(size=(8, n)).astype(np.float32) for n in (3, 2))
        weights = np.arange(1.0, 9, dtype=np.float32)
        ours = losses.two_term_hazard_loss(
            short, long, times, observed,
            short_boundaries=SHORT, long_boundaries=LONG, ctr_weights=weights, mix=0.5,
        )  # fmt: skip
        h, g = (1 / (1 + np.exp(-np.float64(a))) for a in (short, long))
        log = lambda *probabilities: -np.log(probabilities).sum()
        expected = [
            log(h[0, 0]),
            log(1 - h[1, 0], h[1, 1]),
            log(1 - h[2, 0], 1 - h[2, 1], h[2, 2]),
            log(*(1 - h[3])) + 0.5 * log(g[3, 0]),
            log(*(1 - h[4])) + 0.5 * log(1 - g[4, 0], g[4, 1]),
            log(*(1 - h[5])) + 0.5 * log(*(1 - g[5])),
            log(*(1 - h[6])),  # last seen within the first long interval
            log(1 - h[7, 0]),
        ]
        np.testing.assert_allclose(ours, weights * expected, rtol=1e-5)

    def test_click_through_rate_weights(self):
        clicks, impressions = np.array([0, 3, 50]), np.array([10, 100, 400])
        rates = (clicks + 0.5) / (impressions + 20)
        ours = losses.click_through_rate_weights(clicks, impressions, power=0.7, prior=(0.5, 20.0))
        np.testing.assert_allclose(ours, rates**0.7 / np.mean(rates**0.7), rtol=1e-5)
        even = losses.click_through_rate_weights(clicks, impressions, power=0.0)
        np.testing.assert_allclose(even, 1, rtol=1e-6)


class TestClaims:
    @pytest.mark.claim("ad-discontinuation-survival")
    def test_two_heads_order_short_and_long_lifetimes_better_than_one(self):
        """Cut-out within a week hangs on one feature, wear-out over months on another; one head
        with as many intervals has to spread them over all of the time. Both encode linearly."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(600, 2)).astype(np.float32)
        cut_out = rng.uniform(size=600) < 0.4
        times = np.where(
            cut_out,
            7 * rng.beta(1, 3 * np.exp(x[:, 0])),
            7 + 20 * rng.exponential(size=600) * np.exp(-x[:, 1]),
        ).astype(np.float32)
        observed = rng.uniform(size=600) < 0.9
        short, long = np.array([0.5, 1, 2, 3, 5, 7]), np.array([10.0, 14, 20, 30, 50, 100])
        even = np.linspace(0, 100, 13)[1:]

        def two(w):
            a = x @ w[:2] + w[2]
            return losses.two_term_hazard_loss(
                a[:, :6], a[:, 6:], times, observed, short_boundaries=short, long_boundaries=long
            ).mean()

        targets = losses.discretize_times(times, observed, even)
        one = lambda w: losses.discrete_hazard_loss(x @ w[:2] + w[2], *targets).mean()

        def fitted(loss):
            step = lambda _, w: w - 2.0 * jax.grad(loss)(w)
            return x @ (w := jax.lax.fori_loop(0, 200, step, jnp.zeros((3, 12))))[:2] + w[2]

        def index(logits, ends, chosen):
            survival = losses.survival_from_hazard(logits)
            widths = np.diff(ends, prepend=ends[0] - ends[0])
            return concordance_index(-survival @ widths, times, observed, where=chosen)

        a, b = jax.jit(lambda: (fitted(two), fitted(one)))()
        early, late = times <= 7, times > 7
        assert index(a[:, :6], short, early) > index(b, even, early) + 0.02
        assert index(a[:, 6:], long - 7, late) > index(b, even, late) - 0.01

    def test_outcomes_have_probability_1_and_the_loss_is_masked_cross_entropy(self):
        logits = HAZARD[0]
        ends = [losses.discrete_hazard_loss(logits, np.full(8, k), np.ones(8)) for k in range(5)]
        alive = losses.survival_from_hazard(logits)[:, -1]
        np.testing.assert_allclose(sum(np.exp(-end) for end in ends) + alive, 1, rtol=1e-5)
        still = losses.discrete_hazard_loss(logits, np.full(8, 4), np.zeros(8))
        np.testing.assert_allclose(np.exp(-still), alive, rtol=1e-5)
        hot = (np.arange(5) == HAZARD[1][:, None]) & (HAZARD[2][:, None] == 1)
        entropies = optax.sigmoid_binary_cross_entropy(logits, hot)
        expected = np.sum(entropies, axis=1, where=np.arange(5) <= HAZARD[1][:, None])
        np.testing.assert_allclose(losses.discrete_hazard_loss(*HAZARD), expected, rtol=1e-5)

    def test_fitted_hazards_are_kaplan_meier(self):
        """Whole times in intervals (t - 1, t], shifted by one: what is censored at t outlived t."""
        interval, ended = losses.discretize_times(
            PEERS["tied_times"] + 1, PEERS["tied_ended"], np.arange(1.0, 7)
        )
        loss = lambda a: losses.discrete_hazard_loss(
            jnp.broadcast_to(a, (30, 6)), interval, ended
        ).mean()
        step = lambda _, a: a - 5 * jax.grad(loss)(a)
        logits = jax.jit(lambda a: jax.lax.fori_loop(0, 2000, step, a))(jnp.zeros(6))
        np.testing.assert_allclose(
            losses.survival_from_hazard(logits), PEERS["kaplan_meier"], atol=2e-3
        )


class TestShards:
    def test_cox_loss_and_weights_over_eight_devices(self):
        rng = np.random.default_rng(0)
        risk = rng.normal(size=16).astype(np.float32)
        times, ended = rng.integers(6, size=16).astype(np.float32), rng.integers(2, size=16)
        axes = ("data", "fsdp")
        shard = lambda f: jax.shard_map(
            partial(f, axis_name=axes),
            mesh=mesh_of_eight(),
            in_specs=PartitionSpec(axes),
            out_specs=PartitionSpec(axes),
        )
        weights = np.arange(16, dtype=np.float32)
        loss = losses.cox_partial_likelihood_loss
        found, expected = (
            jax.jit(jax.value_and_grad(lambda r: weights @ f(r, times, ended)))(risk)
            for f in (shard(loss), loss)
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
        rates = losses.click_through_rate_weights
        counts = rng.integers(9, size=16), np.full(16, 100)
        np.testing.assert_allclose(shard(rates)(*counts), rates(*counts), rtol=1e-5)


class TestEdges:
    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_equal_logits_stay_finite(self, size):
        logits = np.array([[size, -size, 0.0], [size] * 3], np.float32)
        for interval, ended in ((2, 1), (2, 0), (0, 1), (-1, 0)):
            loss = lambda a: losses.discrete_hazard_loss(
                a, np.full(2, interval), np.full(2, ended)
            ).sum()
            value, slope = jax.value_and_grad(loss)(logits)
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))
        survival, vjp = jax.vjp(losses.survival_from_hazard, logits)
        assert np.all((survival >= 0) & (survival <= 1))
        assert np.all(np.isfinite(vjp(np.ones_like(logits))[0]))
        loss = lambda r: losses.cox_partial_likelihood_loss(r, np.arange(3), np.ones(3)).sum()
        for row in logits:
            value, slope = jax.value_and_grad(loss)(row)
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))

    def test_excluded_items_count_for_nothing(self):
        where = np.arange(12) < 9
        risk, times = (np.where(where, x, np.nan) for x in COX[:2])
        loss = lambda r: losses.cox_partial_likelihood_loss(r, times, COX[2], where=where)
        ours, vjp = jax.vjp(loss, risk)
        alone = losses.cox_partial_likelihood_loss(*(x[:9] for x in COX))
        np.testing.assert_allclose(ours, np.r_[alone, 0, 0, 0], rtol=1e-5, atol=1e-7)
        gradient = vjp(np.ones(12, "f"))[0]
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[9:] == 0)
        nobody = losses.cox_partial_likelihood_loss(*COX, where=np.zeros(12, bool))
        assert np.all(nobody == 0)
        assert losses.cox_partial_likelihood_loss(*(x[:0] for x in COX)).shape == (0,)
        chosen = np.arange(8) < 5
        logits = np.where(chosen[:, None], HAZARD[0], np.nan)
        ours, vjp = jax.vjp(
            lambda a: losses.discrete_hazard_loss(a, *HAZARD[1:], where=chosen), logits
        )
        np.testing.assert_allclose(ours, np.where(chosen, PEERS["hazard"], 0), rtol=1e-5)
        assert np.all(vjp(np.ones(8, "f"))[0][5:] == 0)
        weights = losses.click_through_rate_weights(
            np.arange(4), np.full(4, 9), where=np.arange(4) < 3
        )
        np.testing.assert_allclose([weights.sum(), weights[3]], [3, 0], atol=1e-6)

    def test_weights_without_clicks_or_with_large_powers(self):
        none = losses.click_through_rate_weights(np.zeros(3), np.zeros(3), prior=(0.0, 0.0))
        assert np.all(none == 0)
        sharp = losses.click_through_rate_weights(np.array([1, 2]), np.full(2, 10**6), power=40.0)
        np.testing.assert_allclose(sharp.sum(), 2, rtol=1e-5)

    def test_intervals_that_are_none_give_nan_in_their_item(self):
        logits = np.zeros((5, 3), np.float32)
        interval, observed = np.array([0, 3, -2, -1, -1]), np.array([1, 1, 0, 0, 1])
        values = losses.discrete_hazard_loss(logits, interval, observed)
        assert np.array_equal(np.isnan(values), [False, True, True, False, True])
        assert values[3] == 0

    def test_weights_have_no_gradient_and_half_precision_keeps_its_type(self):
        total = lambda w: losses.discrete_hazard_loss(*HAZARD, weights=w).sum()
        assert np.all(jax.grad(total)(np.ones(8, "f")) == 0)
        half = jnp.asarray(HAZARD[0], jnp.bfloat16)
        assert losses.discrete_hazard_loss(half, *HAZARD[1:]).dtype == jnp.bfloat16
        assert losses.survival_from_hazard(half).dtype == jnp.bfloat16
        risk = jnp.asarray(COX[0], jnp.bfloat16)
        assert losses.cox_partial_likelihood_loss(risk, *COX[1:]).dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        logits, interval, observed = HAZARD
        hazard, cox = losses.discrete_hazard_loss, losses.cox_partial_likelihood_loss
        with pytest.raises(ValueError, match=r"event_interval must have shape \(8,\)"):
            hazard(logits, interval[:3], observed)
        with pytest.raises(ValueError, match="observed must be 0 or 1"):
            hazard(logits, interval, observed + 1)
        with pytest.raises(ValueError, match=r"\[..., intervals\]"):
            hazard(logits[:, :0], interval, observed)
        with pytest.raises(ValueError, match="weights must broadcast"):
            hazard(logits, interval, observed, weights=np.ones(3))
        with pytest.raises(TypeError, match="event_interval must be integers"):
            hazard(logits, logits[:, 0], observed)
        with pytest.raises(TypeError, match="hazard_logits must have a floating-point type"):
            hazard(interval[:, None], interval, observed)
        for ends in ([1.0, 1.0], [0.0, 1.0], [2.0, 1.0]):
            with pytest.raises(ValueError, match="boundaries must be positive and increase"):
                losses.discretize_times(np.ones(2), np.ones(2), np.array(ends))
        with pytest.raises(ValueError, match="times must be in"):
            losses.discretize_times(-np.ones(2), np.ones(2), SHORT)
        terms = partial(losses.two_term_hazard_loss, logits[:, :3], logits[:, :2], np.ones(8),
                        observed)  # fmt: skip
        with pytest.raises(ValueError, match="long_boundaries must be in"):
            terms(short_boundaries=SHORT, long_boundaries=LONG - 7)
        with pytest.raises(ValueError, match="mix must be in"):
            terms(short_boundaries=SHORT, long_boundaries=LONG, mix=-1.0)
        with pytest.raises(ValueError, match=r"long_logits must have shape \(8, 3\)"):
            terms(short_boundaries=SHORT, long_boundaries=SHORT + 9)
        with pytest.raises(ValueError, match="clicks must be in"):
            losses.click_through_rate_weights(-np.ones(2), np.ones(2))
        with pytest.raises(ValueError, match=r"times must have shape \(12,\)"):
            cox(COX[0], COX[1][:3], COX[2])
        with pytest.raises(ValueError, match=r"log_risk must have shape \[n\]"):
            cox(logits, logits, logits)
        with pytest.raises(TypeError, match="log_risk must have a floating-point type"):
            cox(COX[2], COX[1], COX[2])
