import math
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

from jaxref import losses

ENSLOSS = np.load(Path(__file__).parents[1] / "oracles" / "ensloss.npz")
AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "label_robust.npz")
KINDS = ("hinge", "exponential", "logistic", "inverse_tail_hinge", "log_tail_hinge")
KEY = jax.random.key(0)


def slope(loss, scores):
    return jax.grad(lambda s: loss(s).sum())(scores)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*KINDS)
    def test_fixed_margin_losses_match_the_release(self, kind):
        scores, labels = ENSLOSS["scores"].astype("f"), ENSLOSS["labels"]
        ours = self.variant(lambda s: losses.margin_loss(s, labels, kind=kind))
        np.testing.assert_allclose(ours(scores), ENSLOSS[kind], rtol=1e-5, atol=1e-6)
        gradient = ENSLOSS[f"{kind}_gradient"]
        np.testing.assert_allclose(slope(ours, scores), gradient, rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_fixed_margin_losses_match_optax(self):
        scores = np.linspace(-3, 3, 12).astype("f")
        labels = np.arange(12) % 2 == 0
        for kind, theirs in (
            ("hinge", optax.losses.hinge_loss(scores, 2 * labels - 1)),
            ("logistic", optax.losses.sigmoid_binary_cross_entropy(scores, labels)),
        ):
            ours = self.variant(lambda s, y: losses.margin_loss(s, y, kind=kind))
            for same in (labels, labels.astype(int), labels.astype(np.float32)):
                np.testing.assert_allclose(ours(scores, same), theirs, rtol=1e-5)

    def test_random_slopes_match_the_release_on_its_draws(self):
        scores, labels = ENSLOSS["scores"].astype("f"), ENSLOSS["labels"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda *_: ENSLOSS["draws"].astype("f"))
            for lam, expected in zip(ENSLOSS["lambdas"], ENSLOSS["ensemble_gradients"]):
                loss = lambda s: losses.ensemble_calibrated_loss(
                    s, labels, key=KEY, box_cox_lambda=lam
                )
                np.testing.assert_allclose(slope(loss, scores), expected, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_multi_class_hinges_match_the_release(self):
        logits, labels = AUTHORS["logits"][0].astype("f"), AUTHORS["labels"]
        for name in ("crammer_singer", "weston_watkins"):
            loss = getattr(losses, f"{name}_loss")
            ours = self.variant(lambda z: loss(z, labels, margin=1.5))
            np.testing.assert_allclose(ours(logits), AUTHORS[name], rtol=1e-5)
            gradient = AUTHORS[f"{name}_gradient"]
            np.testing.assert_allclose(slope(ours, logits), gradient, rtol=1e-5, atol=1e-6)


@jax.jit
def random_slopes(margins, key, box_cox_lambda=0.0):
    return losses.sample_calibrated_derivatives(margins, key=key, box_cox_lambda=box_cox_lambda)


class TestClaims:
    @pytest.mark.claim("ensloss")
    def test_every_draw_is_a_convex_calibrated_loss_and_its_gradient(self):
        """Slopes are negative and rise with the margin, so that they are those of a convex loss
        with a negative slope at 0; and no two draws are of the same one."""
        rng = np.random.default_rng(0)
        scores, labels = (3 * rng.normal(size=64)).astype("f"), rng.integers(2, size=64)
        signs = 2 * labels - 1

        @jax.jit
        def gradient(key, lam):
            loss = lambda s: losses.ensemble_calibrated_loss(s, labels, key=key, box_cox_lambda=lam)
            return slope(loss, scores)

        drawn = [
            signs * gradient(key, lam)
            for key in jax.random.split(KEY, 4)
            for lam in (-1.0, -0.3, 0.0, 1e-4, 1.0)
        ]
        order = np.argsort(signs * scores)
        for slopes in drawn:
            assert np.all(slopes < 0)
            assert np.all(slopes >= -1 - 2e-6)
            assert np.all(np.diff(slopes[order]) >= 0)
            assert np.ptp(slopes[signs * scores < 1]) > 0.05
        assert len({float(slopes[order[10]]) + float(slopes.sum()) for slopes in drawn}) == 20

    def test_slopes_are_those_of_the_inverse_box_cox_of_normal_draws(self):
        """Below a margin of 1, their law: -B(ξ) no steeper than the floor."""
        margins = np.linspace(-2, 0.9, 20000).astype("f")
        for lam in (-0.5, 0.0, 1e-5, 0.5):
            slopes = np.asarray(random_slopes(margins, KEY, lam))
            for level in (0.2, 0.5, 0.9):
                xi = np.log(level) if abs(lam) < 1e-4 else (level**lam - 1) / lam
                share = 0.5 * (1 + math.erf(xi / math.sqrt(2)))
                np.testing.assert_allclose((slopes > -level).mean(), share, atol=0.012)
            # at the floor are all that would be steeper
            np.testing.assert_allclose((slopes <= -1).mean(), 0.5, atol=0.012)

    def test_tail_falls_as_one_over_the_margin(self):
        margins = np.linspace(-1, 4, 40).astype("f")
        slopes = random_slopes(margins, KEY) + 1e-6
        bounded = random_slopes(np.minimum(margins, 1), KEY) + 1e-6
        np.testing.assert_allclose(slopes, bounded / np.maximum(margins, 1), rtol=1e-5)

    def test_kind_of_loss_is_drawn_anew_every_few_epochs(self):
        """As the authors' loop over epochs and batches does, whose last one is smaller."""
        rng = np.random.default_rng(0)
        scores, labels = rng.normal(size=4).astype("f"), np.array([0, 1, 1, 0])
        where, key = np.arange(4) < np.array([[4], [4], [2]]), KEY
        step = jax.jit(losses.periodic_ensemble_calibrated_loss, static_argnames="period")
        for period in (1, 2, 3):
            state, lam = losses.periodic_ensemble_calibrated_init(10), 0.0
            for epoch in range(1, 7):
                redrawn = epoch % period == 0
                for batch in range(3):
                    key, step_key = jax.random.split(key)
                    values, state = step(
                        scores, labels, state, key=step_key, period=period, where=where[batch]
                    )
                    assert (state.box_cox_lambda != lam) == (redrawn and batch == 0)
                    lam = float(state.box_cox_lambda)
                    assert -1 <= lam <= 1
                assert state.epoch == epoch
                # the values are of this λ, and of the part of the key that is left for them
                expected = losses.ensemble_calibrated_loss(
                    scores,
                    labels,
                    key=jax.random.split(step_key)[0],
                    box_cox_lambda=lam,
                    where=where[2],
                )
                np.testing.assert_allclose(values, expected, rtol=1e-5)

    def test_kinds_of_losses_are_uniform(self):
        state = losses.periodic_ensemble_calibrated_init(1)
        loss = lambda key: losses.periodic_ensemble_calibrated_loss(
            jnp.zeros(1), jnp.ones(1), state, key=key, period=1
        )
        draws = jax.jit(jax.vmap(lambda key: loss(key)[1].box_cox_lambda))
        quantiles = np.quantile(draws(jax.random.split(KEY, 4000)), np.linspace(0, 1, 9))
        np.testing.assert_allclose(quantiles, np.linspace(-1, 1, 9), atol=0.05)


class TestSets:
    def test_state_counts_what_all_shards_have_seen(self):
        where = np.arange(16) % 4 > 0
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.shard_map(
            lambda s, w: losses.periodic_ensemble_calibrated_loss(
                s,
                jnp.ones(2),
                losses.periodic_ensemble_calibrated_init(12),
                key=KEY,
                where=w,
                period=1,
                axis_name="data",
            ),
            mesh=mesh,
            in_specs=(P("data"),) * 2,
            out_specs=(P("data"), P()),
        )
        _, state = jax.jit(sharded)(np.arange(16.0, dtype="f"), where)
        assert (state.epoch, state.examples) == (1, 12)
        assert state.box_cox_lambda != 0

    def test_shards_draw_what_the_whole_set_does(self):
        rng = np.random.default_rng(0)
        scores, labels = rng.normal(size=(16, 2)).astype("f"), rng.integers(2, size=(16, 2))
        where = rng.random((16, 2)) < 0.8

        def loss(s, y, w, axis_name=None):
            return losses.ensemble_calibrated_loss(
                s, y, key=KEY, where=w, axis_name=axis_name, box_cox_lambda=0.3
            )

        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.shard_map(
            lambda s, y, w: loss(s, y, w, "data"),
            mesh=mesh,
            in_specs=(P("data"),) * 3,
            out_specs=P("data"),
        )
        results = [
            jax.jit(jax.value_and_grad(lambda s: jnp.sum(f(s, labels, where))))(scores)
            for f in (loss, sharded)
        ]
        chex.assert_trees_all_close(*results, rtol=1e-5)

    def test_masked_members_count_for_nothing(self):
        rng = np.random.default_rng(0)
        margins = rng.normal(size=10).astype("f")
        where = np.array([True] * 6 + [False] * 4)
        slopes = losses.sample_calibrated_derivatives(
            np.where(where, margins, np.nan), key=KEY, where=where
        )
        assert np.all(slopes[6:] == 0)
        assert np.all(slopes[:6] < 0)
        order = np.argsort(margins[:6])
        assert np.all(np.diff(slopes[:6][order]) >= 0)
        other = np.where(where, margins, 100).astype("f")
        again = losses.sample_calibrated_derivatives(other, key=KEY, where=where)
        np.testing.assert_array_equal(slopes, again)
        # a few members of many get draws from all of their law, not the steepest of all draws
        few = np.arange(400) % 50 == 0
        slopes = losses.sample_calibrated_derivatives(np.zeros(400, "f"), key=KEY, where=few)
        assert np.ptp(slopes[few]) > 0.3
        empty = losses.ensemble_calibrated_loss(np.zeros(0, "f"), np.zeros(0, int), key=KEY)
        assert empty.shape == (0,)


class TestContract:
    def test_labels_axis_and_masked_classes(self):
        logits, labels = AUTHORS["logits"].astype("f"), np.stack([AUTHORS["labels"]] * 3)
        where = np.arange(5) < 3
        for loss in (losses.crammer_singer_loss, losses.weston_watkins_loss):
            loss = jax.jit(loss, static_argnames="axis")
            expected = loss(logits, labels)
            np.testing.assert_allclose(loss(logits, np.eye(5, dtype="f")[labels]), expected)
            np.testing.assert_allclose(loss(np.moveaxis(logits, -1, 0), labels, axis=0), expected)
            poisoned = np.where(where, logits, 1e30).astype("f")
            ours = loss(poisoned, labels % 3, where=where)
            np.testing.assert_allclose(ours, loss(logits[..., :3], labels % 3), rtol=1e-6)
            assert np.all(loss(logits, labels, where=~where & where) == 0)
            assert np.isnan(loss(logits, labels + 5)).all()
            assert loss(logits.astype(jnp.bfloat16), labels).dtype == jnp.bfloat16

    @pytest.mark.parametrize("kind", [*KINDS, "ensemble"])
    def test_extreme_scores_masks_and_types(self, kind):
        scores = np.array([1e4, -1e4, 0.0, 1.0, np.nan], np.float32)
        where = np.array([True, True, True, True, False])

        def loss(scores, labels):
            if kind == "ensemble":
                return losses.ensemble_calibrated_loss(
                    scores, labels, key=KEY, where=where, box_cox_lambda=-1.0
                )
            return losses.margin_loss(scores, labels, kind=kind, where=where)

        loss = jax.jit(loss)
        for label in (0, 1):
            values, vjp = jax.vjp(lambda s: loss(s, np.full(5, label)), scores)
            assert np.all(np.isfinite(values))
            assert np.all(np.isfinite(vjp(np.ones(5, "f"))[0][:4]))
            assert values[4] == 0
        values = loss(scores, np.array([2, 1, 1, 1, 7]))
        np.testing.assert_array_equal(np.isnan(values), [True, False, False, False, False])
        assert loss(scores.astype(jnp.float16), np.ones(5)).dtype == jnp.float16

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda s, y: losses.margin_loss(s, y, kind="square"), "kind must be one of hinge"),
            (lambda s, y: losses.margin_loss(s, y[:2]), "labels must have shape"),
            (
                lambda s, y: losses.ensemble_calibrated_loss(s, y, key=KEY, slope_floor=0.0),
                "slope_floor must be in",
            ),
            (
                lambda s, y: losses.sample_calibrated_derivatives(s, key=KEY, epsilon=-1.0),
                "epsilon must be in",
            ),
            (
                lambda s, y: losses.sample_calibrated_derivatives(s, key=KEY, where=y[:2] > 0),
                "where must broadcast",
            ),
            (
                lambda s, y: losses.periodic_ensemble_calibrated_loss(
                    s, y, losses.periodic_ensemble_calibrated_init(3), key=KEY, period=0
                ),
                "period must be in",
            ),
            (
                lambda s, y: losses.periodic_ensemble_calibrated_init(0),
                "num_examples must be in",
            ),
            (lambda s, y: losses.crammer_singer_loss(s, 0, margin=-1.0), "margin must be in"),
            (lambda s, y: losses.weston_watkins_loss(s, 0, axis=1), "axis"),
        ],
    )
    def test_bad_input_is_named(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(np.ones(3, "f"), np.ones(3, int))
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            losses.margin_loss(np.ones(3, int), np.ones(3, int))
