import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import stats

from jaxref import decision

EMPULSE = np.load(Path(__file__).parents[1] / "oracles" / "expected_maximum_profit.npz")
COSTS = {"offer_cost": 10.0, "contact_cost": 1.0, "acceptance": 0.3}
PAIRS = {
    "regret": decision.targeting_regret,
    "logistic": decision.profit_regret_surrogate,
    "hinge": lambda *a, **k: decision.profit_regret_surrogate(*a, kind="hinge", **k),
    "sigmoid": lambda *a, **k: decision.profit_regret_surrogate(*a, kind="sigmoid", **k),
    "spo": decision.spo_plus_loss,
    "spo_budget": lambda *a, **k: decision.spo_plus_loss(*a, budget=2, **k),
}


CAMPAIGN = {
    "lifetime_value": 200.0, "offer_cost": 10.0, "contact_cost": 1.0, "alpha": 6.0, "beta": 14.0
}  # fmt: skip
compiled = jax.jit(decision.expected_maximum_profit)


def maximum_profit(scores, churned, where=True, **campaign):
    """Compiled once, for up to 80 customers."""
    filled = [np.resize(x, 80) for x in (scores, churned)]
    where = np.arange(80) < np.where(where, len(scores), 0)
    return compiled(*filled, where=where, **CAMPAIGN | campaign)


def random_pair(size=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=size).astype("f"), (2 * rng.normal(size=size)).astype("f")


def choices(size, budget):
    """All ways to contact some of the customers."""
    every = np.array(list(itertools.product((0, 1), repeat=size)))
    return every if budget is None else every[every.sum(1) <= budget]


def literal_spo_plus(h, profits, budget):
    """The definition by enumeration, and its subgradient."""
    every = choices(len(h), budget)
    worst, best = (every[np.argmax(every @ x)] for x in (2 * h - profits, profits))
    value = (every @ (2 * h - profits)).max() - 2 * h @ best + profits @ best
    return value, 2.0 * (worst - best)


def literal_expected_maximum(scores, churned, v, d, f, alpha, beta):
    """The best of all thresholds for each of many acceptance rates, averaged."""
    thresholds = np.append(np.unique(scores), np.inf)
    contacted = scores >= thresholds[:, None]
    churners, others = (contacted & churned).mean(1), (contacted & ~churned).mean(1)
    gamma = stats.beta(alpha, beta).ppf((np.arange(20000) + 0.5) / 20000)[:, None]
    profits = (gamma * (v - d) - f) * churners - (d + f) * others
    best = profits.argmax(1)
    return profits.max(1).mean(), contacted.mean(1)[best].mean()


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_profit_is_the_average_over_what_a_customer_does(self):
        churned, values = np.array([1, 0, 1, 0]), np.array([200.0, 200.0, 20.0, 0.0], "f")
        expected = [
            0.3 * (200 - 10 - 1) + 0.7 * -1,
            -11,
            0.3 * (20 - 10 - 1) + 0.7 * -1,
            -11,
        ]
        profit = self.variant(lambda c, v: decision.retention_profit(c, v, **COSTS))
        for same in (churned, churned == 1, churned.astype("f")):
            np.testing.assert_allclose(profit(same, values), expected, rtol=1e-5)
        half = profit(np.full(4, 0.5, "f"), values)
        both = (profit(np.ones(4), values) + profit(np.zeros(4), values)) / 2
        np.testing.assert_allclose(half, both, rtol=1e-5)
        each = decision.retention_profit(
            churned, values, offer_cost=0.1 * values, contact_cost=1, acceptance=np.full(4, 0.3)
        )
        np.testing.assert_allclose(each, [0.3 * 180 - 1, -21, 0.3 * 18 - 1, -1], rtol=1e-5)

    @parameterized.parameters(None, 0, 1, 2, 9)
    def test_spo_plus_and_targeting_match_enumeration(self, budget):
        loss = jax.jit(
            jax.value_and_grad(lambda h, p: decision.spo_plus_loss(h, p, budget=budget).sum())
        )
        targeting = jax.jit(lambda p: decision.optimal_targeting(p, budget=budget))
        for seed in range(4):
            h, profits = random_pair(seed=seed)
            value, gradient = loss(h, profits)
            expected, subgradient = literal_spo_plus(h, profits, budget)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(gradient, subgradient)
            every = choices(6, budget)
            np.testing.assert_array_equal(targeting(profits), every[np.argmax(every @ profits)])

    def test_surrogates_match_their_formulas(self):
        s, profits = random_pair(12)
        margin, size = np.sign(profits) * s / 0.5, np.abs(profits)
        for kind, expected, slope in (
            ("logistic", np.log2(1 + np.exp(-margin)), -1 / (1 + np.exp(margin)) / np.log(2)),
            ("hinge", np.maximum(1 - margin, 0), -1.0 * (margin < 1)),
            ("sigmoid", 1 / (1 + np.exp(margin)), -1 / (2 + 2 * np.cosh(margin))),
        ):
            ours, vjp = jax.vjp(
                lambda s: decision.profit_regret_surrogate(s, profits, kind=kind, temperature=0.5),
                s,
            )
            np.testing.assert_allclose(ours, size * expected, rtol=1e-5)
            gradient = profits * slope / 0.5
            np.testing.assert_allclose(vjp(np.ones(12, "f"))[0], gradient, rtol=1e-4, atol=1e-6)

    def test_expected_maximum_profit_matches_empulse_and_numerical_integration(self):
        for name in ("scores", "tied_scores"):
            scores, churned = EMPULSE[name].astype("f"), EMPULSE[f"{name}_churned"] == 1
            for campaign, expected in zip(EMPULSE["campaigns"], EMPULSE[f"{name}_profits"]):
                result = maximum_profit(scores, churned, **dict(zip(CAMPAIGN, campaign)))
                np.testing.assert_allclose(result.profit, expected, rtol=1e-5)
                literal = literal_expected_maximum(scores, churned, *campaign)
                np.testing.assert_allclose(result, literal, rtol=2e-3)
        defaults = decision.expected_maximum_profit(scores, churned)
        np.testing.assert_allclose(defaults.profit, EMPULSE["tied_scores_profits"][0], rtol=1e-5)


def churn_customers(rng, size):
    """Features, churn and lifetime values of customers; values have nothing to do with churn."""
    x, values = rng.normal(size=(size, 2)), 60 * rng.lognormal(sigma=1.2, size=size)
    risk = 1 / (1 + np.exp(1.5 - x @ np.array([1.5, -1.0])))
    features = np.stack([np.ones(size), *x.T, np.log(values)], 1)
    return features.astype("f"), rng.random(size) < risk, values.astype("f"), risk.astype("f")


@jax.jit
def train(features, churned, profits):
    """Linear models of churn and of the decision, full-batch: a row each."""
    losses = [
        lambda s: optax.losses.sigmoid_binary_cross_entropy(s, churned),
        lambda s: decision.profit_regret_surrogate(s, profits),
        lambda s: decision.profit_regret_surrogate(s, profits, kind="hinge"),
        lambda s: decision.spo_plus_loss(s, profits),
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 200))

    def objective(weights):
        return sum(loss(features @ w).mean() for loss, w in zip(losses, weights))

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(objective)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros((len(losses), features.shape[1]))
    return jax.lax.scan(step, (weights, optimizer.init(weights)), length=200)[0][0]


class TestClaims:
    @pytest.mark.claim("profit-churn-predict-optimize")
    def test_regret_learns_whom_to_contact_where_values_differ(self):
        """A model of churn with a threshold for the average value earns less than one that learned
        the decision from each customer's own profit, which comes near to the best there is."""
        rng = np.random.default_rng(0)
        features, churned, values, _ = churn_customers(rng, 5000)
        profits = decision.retention_profit(churned, values, **COSTS)
        weights = np.asarray(train(features, churned, profits / jnp.abs(profits).mean()))
        features, churned, tested, risk = churn_customers(rng, 5000)
        profits = np.asarray(decision.retention_profit(churned, tested, **COSTS))
        of_churn, logistic, hinge, spo_plus = np.asarray(weights @ features.T)

        def earned(scores):
            return profits.clip(0).sum() - decision.targeting_regret(scores, profits).sum()

        average = decision.retention_profit(jax.nn.sigmoid(of_churn), values.mean(), **COSTS)
        best = earned(decision.retention_profit(risk, tested, **COSTS))
        np.testing.assert_allclose(earned(average), profits[average > 0].sum(), rtol=1e-3)
        assert earned(average) < 0.8 * best
        assert min(earned(logistic), earned(hinge)) > 0.97 * best
        # lines are no good fit to profits, and still better than none
        assert earned(spo_plus) > 1.1 * earned(average)

    def test_losses_are_never_below_the_regret_and_0_where_decisions_are_right(self):
        s, profits = random_pair(200)
        regrets = decision.targeting_regret(s, profits)
        np.testing.assert_array_equal(regrets > 0, (s > 0) != (profits > 0))
        np.testing.assert_array_equal(decision.targeting_regret(profits, profits), 0)
        for name in ("logistic", "hinge", "spo"):
            assert np.all(PAIRS[name](s, profits) >= regrets)
        sharp = decision.profit_regret_surrogate(s, profits, kind="sigmoid", temperature=1e-4)
        np.testing.assert_allclose(sharp, regrets, atol=1e-3)
        np.testing.assert_array_equal(decision.spo_plus_loss(profits, profits), 0)
        for budget in (0, 3, 50, 300):
            done, best = (decision.optimal_targeting(x, budget=budget) for x in (s, profits))
            missed = profits[best].sum() - profits[done].sum()
            assert decision.spo_plus_loss(s, profits, budget=budget) >= missed - 1e-4
            assert decision.spo_plus_loss(profits, profits, budget=budget) == 0
        assert done.sum() == (s > 0).sum()

    def test_equal_values_leave_a_threshold_of_the_probability(self):
        p = np.linspace(0, 1, 101).astype("f")
        profit = decision.retention_profit(p, 200.0, **COSTS)
        np.testing.assert_array_equal(profit > 0, p > 11 / (0.3 * 190 + 10))

    def test_maximum_profit_is_about_the_order_alone_and_grows_with_it(self):
        scores, churned = EMPULSE["scores"].astype("f"), EMPULSE["scores_churned"]
        result = maximum_profit(scores, churned)
        chex.assert_trees_all_close(maximum_profit(scores**3 - 9, churned), result)
        order = np.random.default_rng(0).permutation(80)
        chex.assert_trees_all_close(maximum_profit(scores[order], churned[order]), result)
        perfect = maximum_profit(churned.astype("f"), churned)
        useless = maximum_profit(np.zeros(80, "f"), churned)
        assert perfect.profit > result.profit > useless.profit
        # all churners are contacted unless too few of them accept
        paid = stats.beta(6, 14).expect(lambda g: max(190 * g - 1, 0))
        np.testing.assert_allclose(perfect.profit, churned.mean() * paid, rtol=1e-4)
        np.testing.assert_allclose(perfect.fraction, churned.mean(), rtol=1e-4)


class TestSets:
    def test_shards_spend_one_budget(self):
        h, profits = random_pair((16, 2))
        where = np.random.default_rng(1).random((16, 2)) < 0.8

        def both(h, p, w, axis_name=None):
            arguments = {"budget": 5, "where": w, "axis_name": axis_name}
            return decision.spo_plus_loss(h, p, **arguments), decision.optimal_targeting(
                h, **arguments
            )

        sharded = jax.shard_map(
            lambda h, p, w: both(h, p, w, "data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 3,
            out_specs=(P(), P("data")),
        )
        results = [
            jax.jit(jax.value_and_grad(lambda h: f(h, profits, where), has_aux=True))(h)
            for f in (both, sharded)
        ]
        chex.assert_trees_all_close(*results, rtol=1e-5)
        assert results[0][0][1].sum() == 5

    def test_vmap_is_a_set_each(self):
        h, profits = random_pair((3, 6))
        loss = lambda h, p: decision.spo_plus_loss(h, p, budget=2)
        np.testing.assert_allclose(jax.vmap(loss)(h, profits), [loss(*x) for x in zip(h, profits)])
        scores = np.stack([EMPULSE["scores"], EMPULSE["tied_scores"]]).astype("f")
        churned = np.stack([EMPULSE["scores_churned"], EMPULSE["tied_scores_churned"]])
        results = jax.vmap(compiled)(scores, churned)
        expected = [EMPULSE["scores_profits"][0], EMPULSE["tied_scores_profits"][0]]
        np.testing.assert_allclose(results.profit, expected, rtol=1e-5)


class TestContract:
    @pytest.mark.parametrize("name", PAIRS)
    def test_masks_extremes_and_types(self, name):
        loss = PAIRS[name]
        h, profits = random_pair(8)
        where = np.arange(8) < 5
        poisoned = [np.where(where, x, np.nan) for x in (h, profits)]
        values = loss(*poisoned, where=where)
        expected = loss(h[:5], profits[:5])
        np.testing.assert_allclose(values[:5] if values.ndim else values, expected, rtol=1e-6)
        assert np.all(loss(*poisoned, where=~where & where) == 0)
        assert np.all(loss(np.zeros(0, "f"), np.zeros(0, "f")) == 0)
        if values.ndim:
            assert np.all(values[5:] == 0)
        extremes = np.array([1e4, -1e4, 0.0, 1e4, -1e4, 0.0], "f")
        profits = np.array([1e4, 1e4, 1e4, -1e4, 0.0, 0.0], "f")
        values, vjp = jax.vjp(lambda h: loss(h, profits), extremes)
        assert np.all(np.isfinite(values))
        assert np.all(values >= 0)
        assert np.all(np.isfinite(vjp(jnp.ones_like(values))[0]))
        for dtype in (jnp.bfloat16, jnp.float16):
            assert loss(h.astype(dtype), h.astype(dtype)).dtype == dtype
        assert name == "regret" or np.isnan(loss(np.full(2, np.nan, "f"), np.ones(2, "f"))).any()

    def test_ties_and_masks_of_targeting(self):
        profits = np.array([2.0, 3.0, 2.0, 2.0, 0.0], "f")
        targeted = decision.optimal_targeting(profits, budget=2)
        np.testing.assert_array_equal(targeted, [True, True, False, False, False])
        where = np.array([True, False, True, True, True])
        profits[1] = np.nan
        targeted = decision.optimal_targeting(profits, budget=2, where=where)
        np.testing.assert_array_equal(targeted, [True, False, True, False, False])

    def test_sets_without_churners_scores_and_customers(self):
        scores, churned = np.array([1e4, -1e4, 0.0, np.nan], "f"), np.array([1, 0, 1, 0])
        assert np.isfinite(maximum_profit(scores[:3], churned[:3])).all()
        assert np.isnan(maximum_profit(scores, churned)).all()
        scores, churned = scores[:3], churned[:3]
        assert maximum_profit(scores, 0 * churned) == (0, 0)
        assert maximum_profit(scores, churned, where=False) == (0, 0)
        everyone = maximum_profit(scores, 0 * churned + 1)
        np.testing.assert_allclose(everyone.fraction, 1, rtol=1e-3)
        free = maximum_profit(scores, churned, offer_cost=0.0, contact_cost=0.0)
        np.testing.assert_allclose(free, (2 / 3 * 0.3 * 200, 2 / 3), rtol=1e-4)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda x: decision.retention_profit(2, x, **COSTS),
                ValueError,
                "churned must be in",
            ),
            (
                lambda x: decision.retention_profit(1, -x, **COSTS),
                ValueError,
                "lifetime_value must be in",
            ),
            (
                lambda x: decision.retention_profit(1, x, **COSTS | {"acceptance": 1.5}),
                ValueError,
                "acceptance must be in",
            ),
            (
                lambda x: decision.optimal_targeting(x, budget=-1),
                ValueError,
                "budget must be in",
            ),
            (
                lambda x: decision.spo_plus_loss(x, x, budget=1.5),
                TypeError,
                "budget must be an integer",
            ),
            (
                lambda x: decision.targeting_regret(x, x * np.inf),
                ValueError,
                "profits must be in",
            ),
            (
                lambda x: decision.spo_plus_loss(x, x[:2]),
                ValueError,
                "profits must have shape",
            ),
            (
                lambda x: decision.targeting_regret(x > 0, x),
                TypeError,
                "decision_scores must have a floating-point type",
            ),
            (
                lambda x: decision.profit_regret_surrogate(x, x, kind="square"),
                ValueError,
                "kind must be one of logistic, hinge, sigmoid",
            ),
            (
                lambda x: decision.profit_regret_surrogate(x, x, temperature=0.0),
                ValueError,
                "temperature must be in",
            ),
            (
                lambda x: decision.expected_maximum_profit(x, x > 0, offer_cost=200.0),
                ValueError,
                r"offer_cost must be in \[0, 200.0\)",
            ),
            (
                lambda x: decision.expected_maximum_profit(x, 2 * x),
                ValueError,
                "churned must be 0 or 1",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        with pytest.raises(error, match=message):
            call(np.ones(3, "f"))
