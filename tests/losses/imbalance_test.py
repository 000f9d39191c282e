from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from sklearn.metrics import f1_score

from jaxref import losses, metrics

PEERS = np.load(Path(__file__).parents[1] / "oracles" / "imbalance.npz")


def random_set(n=16, seed=0):
    """Probabilities and rare positives."""
    rng = np.random.default_rng(seed)
    return rng.random(n).astype(np.float32), (rng.random(n) < 0.3).astype(np.int32)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_focal_loss_is_the_dual_focal_authors_baseline_and_optax_for_two_classes(self):
        logits, labels = PEERS["logits"].astype("f"), PEERS["labels"]
        ours = self.variant(lambda z, y: losses.focal_loss(z, y, gamma=2.5))
        log_p = np.asarray(jax.nn.log_softmax(PEERS["logits"]))[np.arange(12), labels]
        expected = -((1 - np.exp(log_p)) ** 2.5) * log_p
        np.testing.assert_allclose(ours(logits, labels), expected, rtol=1e-5)
        z = logits[:, 0]
        two = jnp.stack([jnp.zeros_like(z), z], axis=-1)
        value, gradient = jax.value_and_grad(lambda z: ours(z, labels % 2).sum())(two)
        binary = lambda z: optax.losses.sigmoid_focal_loss(z, labels % 2, gamma=2.5).sum()
        expected, slope = jax.value_and_grad(binary)(z)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient[:, 1], slope, rtol=1e-4, atol=1e-6)

    def test_focal_loss_of_distributions_is_the_expectation(self):
        logits = PEERS["logits"].astype("f")
        soft = np.random.default_rng(1).dirichlet(np.ones(5), size=12).astype("f")
        each = jnp.stack([losses.focal_loss(logits, jnp.full(12, k)) for k in range(5)], -1)
        np.testing.assert_allclose(
            losses.focal_loss(logits, soft), (soft * each).sum(-1), rtol=1e-5
        )

    @parameterized.parameters((0.0, None), (2.0, 0.25), (0.5, 0.75))
    def test_sigmoid_focal_loss_matches_optax_and_is_poly1_focal_loss_at_0(self, gamma, alpha):
        logits, targets = PEERS["logits"].astype("f"), np.eye(5, dtype="f")[PEERS["labels"]]
        ours = partial(losses.sigmoid_focal_loss, gamma=gamma, alpha=alpha)
        theirs = partial(optax.losses.sigmoid_focal_loss, gamma=gamma, alpha=alpha)
        poly = partial(losses.poly1_focal_loss, epsilon=0.0, gamma=gamma, alpha=alpha)
        for targets_ in (targets, 0.1 + 0.8 * targets):
            value, vjp = jax.vjp(lambda z: ours(z, targets_), logits)
            expected, expected_vjp = jax.vjp(lambda z: theirs(z, targets_), logits)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
            one = jnp.ones_like(logits)
            np.testing.assert_allclose(vjp(one)[0], expected_vjp(one)[0], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(value, poly(logits, targets_))

    def test_the_defaults_of_the_sigmoid_focal_loss_are_those_of_its_authors(self):
        z = jnp.array([1.0, -2.0])
        expected = optax.losses.sigmoid_focal_loss(z, jnp.array([1.0, 0.0]), alpha=0.25, gamma=2.0)
        ours = losses.sigmoid_focal_loss(z, jnp.array([True, False]))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)

    @parameterized.parameters(False, True)
    def test_self_adjusting_dice_matches_the_release_over_a_set(self, squared):
        logits, labels = PEERS["logits"].astype("f"), PEERS["labels"]
        settings = {"smooth": 0.7, "squared_denominator": squared}

        @jax.jit
        @jax.value_and_grad
        def binary(z, alpha, where):
            p, targets = jax.nn.sigmoid(z[:, 0]), PEERS["targets"]
            return losses.self_adjusting_dice_loss(
                p, targets, alpha=alpha, where=where, reduce_axes=0, **settings
            )

        @jax.jit
        @jax.value_and_grad
        def multiclass(z, alpha, _):
            loss = losses.self_adjusting_dice_loss_with_logits
            return loss(z, labels, alpha=alpha, **settings).sum()

        everything = np.ones(12, bool)
        cases = {
            "binary": (binary, logits[:, :1], everything),
            "masked": (binary, logits[:, :1], PEERS["mask"].astype(bool)),
            "multiclass": (multiclass, logits, everything),
        }
        for alpha in (0.0, 0.01, 1.0):
            for case, (loss, z, where) in cases.items():
                value, gradient = loss(z, alpha, where)
                name = f"dice_{alpha}_{squared}_{case}"
                np.testing.assert_allclose(value, PEERS[name], rtol=1e-5)
                expected = PEERS[f"{name}_gradient"]
                np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-7)

    def test_each_entry_is_a_set_of_its_own_by_default(self):
        p, y = random_set()
        for alpha, smooth in ((0.0, 1.0), (0.5, 0.1), (1.0, 2.0)):
            w = (1 - p.astype(np.float64)) ** alpha * p
            expected = 1 - (2 * w * y + smooth) / (w + y + smooth)
            ours = losses.self_adjusting_dice_loss(p, y, alpha=alpha, smooth=smooth)
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)

    @chex.variants(with_jit=True, without_jit=True)
    def test_hard_negatives_are_those_of_a_loop(self):
        rng = np.random.default_rng(0)
        for ratio in (0.0, 0.3, 1.0, 2.5, 100.0):
            scores, targets = rng.normal(size=(5, 8)).astype("f"), rng.random((5, 8)) < 0.25
            where = rng.random((5, 8)) < 0.8
            negatives = sorted(
                (-scores[i], i) for i in np.ndindex(5, 8) if where[i] and not targets[i]
            )
            expected = targets & where
            for _, i in negatives[: int(ratio * expected.sum() + 1e-9)]:
                expected[i] = True
            ours = self.variant(lambda *a: losses.hard_negative_mask(*a[:2], ratio, where=a[2]))
            np.testing.assert_array_equal(ours(scores, targets, where), expected)

    def test_gradients_against_finite_differences(self):
        with jax.enable_x64(True):
            logits, labels = PEERS["logits"][:3], PEERS["labels"][:3]
            for loss in (
                lambda z: losses.focal_loss(z, labels, gamma=1.5),
                lambda z: losses.self_adjusting_dice_loss_with_logits(z, labels, alpha=0.6),
                lambda z: losses.self_adjusting_dice_loss(jax.nn.sigmoid(z), np.eye(5)[labels]),
            ):
                assert loss(logits).dtype == jnp.float64
                check_grads(jax.jit(loss), (logits,), order=1, modes=["rev", "fwd"])


class TestClaims:
    @pytest.mark.claim("dice-loss-nlp")
    def test_easy_negatives_fade_and_a_rare_class_is_found(self):
        """(1) Without smoothing and adjustment the set loss is 1 - F1. (2) The pull of a negative
        vanishes at p = 1/2, and at small p is below that of cross-entropy. (3) A logistic model of
        2% positives, whose cross-entropy fit finds few of them at threshold 1/2."""
        y = np.array([1, 1, 1, 0, 0, 0, 0, 1])
        predicted = np.array([1, 0, 1, 1, 0, 0, 1, 1])
        hard = losses.self_adjusting_dice_loss(
            predicted.astype("f"), y, alpha=0.0, smooth=1e-8, reduce_axes=0
        )
        np.testing.assert_allclose(hard, 1 - f1_score(y, predicted), rtol=1e-6)

        slope = jax.vmap(jax.grad(lambda p: losses.self_adjusting_dice_loss(p, 0)))
        low, middle, high = slope(jnp.array([0.01, 0.5, 0.7]))
        np.testing.assert_allclose(low, 0.9609, rtol=1e-3)
        assert low < 1 / (1 - 0.01)  # cross-entropy's
        np.testing.assert_allclose(middle, 0, atol=1e-7)
        assert high < 0

        rng = np.random.default_rng(1)
        labels = (rng.random(2000) < 0.02).astype("f")
        x = rng.normal(size=(2000, 2)).astype("f") + 1.5 * labels[:, None]

        def dice(logits):
            p = jax.nn.sigmoid(logits)
            return losses.self_adjusting_dice_loss(p, labels, alpha=0.01, reduce_axes=0)

        def cross_entropy(logits):
            return optax.losses.sigmoid_binary_cross_entropy(logits, labels).mean()

        def fitted_f1(loss):
            optimizer = optax.adam(0.1)

            def step(carry, _):
                w, state = carry
                update, state = optimizer.update(
                    jax.grad(lambda w: loss(x @ w[:2] + w[2]))(w), state
                )
                return (w + update, state), None

            start = jnp.array([0.0, 0.0, -2.0])
            (w, _), _ = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=200))(
                start
            )
            return f1_score(labels, x @ w[:2] + w[2] > 0)

        assert fitted_f1(dice) > fitted_f1(cross_entropy) + 0.1

    @pytest.mark.claim("fake-face-focal")
    def test_gamma_only_lowers_the_training_loss_and_averaging_members_the_log_loss(self):
        """(1) Without γ it is weighted cross-entropy; (2) dL/dγ ≤ 0 for every logit and target, so
        that the training loss cannot choose γ; (3) a mean of probabilities has no higher log loss
        than its members have on average."""
        z = jnp.array(np.random.default_rng(0).normal(size=64), jnp.float32) * 4
        t = (jnp.arange(64) % 2).astype(jnp.float32)
        weighted = (0.25 * t + 0.75 * (1 - t)) * optax.losses.sigmoid_binary_cross_entropy(z, t)
        np.testing.assert_allclose(losses.sigmoid_focal_loss(z, t, gamma=0.0), weighted, rtol=1e-5)
        for gamma in (0.0, 0.5, 2.0, 5.0):
            slope = jax.jvp(lambda g: losses.sigmoid_focal_loss(z, t, gamma=g), (gamma,), (1.0,))[1]
            assert np.all(slope <= 0)
            assert np.mean(slope < 0) > 0.9
        members = jax.nn.sigmoid(jnp.stack([z, z[::-1], 0.5 * z]))
        log_loss = lambda p: -jnp.log(jnp.where(t == 1, p, 1 - p))
        together = log_loss(metrics.ensemble_probability(members))
        assert np.all(together <= log_loss(members).mean(axis=0) + 1e-6)


class TestContract:
    def test_sharded_sets_have_the_value_and_gradient_of_the_whole(self):
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(16, 3)).astype("f"), rng.integers(3, size=16)
        p, y = random_set()
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows = PartitionSpec("data")
        binary = partial(losses.self_adjusting_dice_loss, reduce_axes=0)
        cases = [
            (binary, p, y),
            (losses.self_adjusting_dice_loss_with_logits, logits, labels),
        ]
        for loss, x, target in cases:
            shard = jax.shard_map(
                partial(loss, axis_name="data"),
                mesh=mesh,
                in_specs=rows,
                out_specs=PartitionSpec(),
            )
            value, gradient = jax.jit(jax.value_and_grad(lambda x: shard(x, target).sum()))(x)
            expected, slope = jax.jit(jax.value_and_grad(lambda x: loss(x, target).sum()))(x)
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)
        mask = jax.shard_map(
            lambda p, y: losses.hard_negative_mask(p, y, 1.0, axis_name="data"),
            mesh=mesh,
            in_specs=rows,
            out_specs=rows,
        )
        np.testing.assert_array_equal(mask(p, y), losses.hard_negative_mask(p, y, 1.0))

    def test_axis_vmap_and_masks(self):
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(3, 4, 5)).astype("f"), rng.integers(3, size=(3, 4))
        for loss in (losses.focal_loss, losses.self_adjusting_dice_loss_with_logits):
            expected = jax.jit(loss)(logits, labels)
            moved = jax.jit(partial(loss, axis=1))(np.moveaxis(logits, -1, 1), labels)
            np.testing.assert_allclose(moved, expected, rtol=1e-6)
            each = jax.jit(jax.vmap(loss))(logits, labels)
            np.testing.assert_allclose(each[1], jax.jit(loss)(logits[1], labels[1]), rtol=1e-6)
            where = np.arange(5) < 3
            poisoned = np.where(where, logits, np.nan).astype("f")

            @jax.jit
            def masked(z):
                values = loss(z, labels, where=where)
                return values.sum(), values

            (_, values), gradient = jax.value_and_grad(masked, has_aux=True)(poisoned)
            cut = jax.jit(loss)(logits[..., :3], labels)
            absent = np.zeros_like(values)[..., cut.shape[-1] :]  # classes that are nowhere
            expected = np.concatenate([cut, absent], axis=-1)
            np.testing.assert_allclose(values, expected, rtol=1e-5)
            chex.assert_tree_all_finite(gradient)
            assert np.all(gradient[..., 3:] == 0)

    def test_unknown_labels_are_nan(self):
        logits, labels = np.zeros((3, 4), "f"), np.array([0, 4, -1])
        assert np.array_equal(np.isnan(losses.focal_loss(logits, labels)), [False, True, True])
        assert np.isnan(losses.self_adjusting_dice_loss_with_logits(logits, labels)).all()

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        p, y = (jnp.asarray(x) for x in random_set())
        for loss, x, target in (
            (losses.focal_loss, p.reshape(4, 4), y[:4]),
            (losses.sigmoid_focal_loss, p, y),
            (losses.self_adjusting_dice_loss, p, y),
            (losses.self_adjusting_dice_loss_with_logits, p.reshape(4, 4), y[:4]),
        ):
            half = x.astype(dtype)
            ours = loss(half, target)
            assert ours.dtype == dtype
            expected = loss(half.astype(jnp.float32), target).astype(dtype)
            np.testing.assert_array_equal(ours, expected)

    def test_extremes_are_finite_with_finite_gradients(self):
        dice = partial(losses.self_adjusting_dice_loss_with_logits, alpha=0.01, smooth=0.0)
        for loss in (partial(losses.focal_loss, gamma=0.5), dice):
            slope = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).sum()))
            for size in (1e4, -1e4, 0.0):
                logits = jnp.array([[size, 0.0, -size], [size, size, size]])
                for label in range(3):
                    chex.assert_tree_all_finite(slope(logits, jnp.full(2, label)))

        @jax.jit
        @jax.value_and_grad
        def entries(p, target, alpha):
            return losses.self_adjusting_dice_loss(p, target, alpha=alpha, smooth=0.0).sum()

        for target in (0, 1):
            for alpha in (0.0, 0.01, 2.0):
                chex.assert_tree_all_finite(entries(jnp.array([0.0, 1.0, 0.5]), target, alpha))
        one_class = losses.focal_loss(jnp.ones((2, 1)), jnp.zeros(2, int))
        np.testing.assert_array_equal(one_class, 0)

    def test_empty_and_masked_sets_are_0(self):
        for smooth in (0.0, 1.0):
            loss = lambda p, **k: losses.self_adjusting_dice_loss(
                p, jnp.ones_like(p), smooth=smooth, reduce_axes=None, **k
            )
            assert loss(jnp.zeros((0,))) == 0
            value, slope = jax.value_and_grad(lambda p: loss(p, where=False))(jnp.full(3, jnp.nan))
            assert value == 0
            assert np.all(slope == 0)
        nothing = np.zeros(4, bool)
        assert not losses.hard_negative_mask(jnp.ones(4), nothing, 5.0).any()
        assert not losses.hard_negative_mask(jnp.ones(4), ~nothing, 5.0, where=nothing).any()
        masked = losses.focal_loss(
            jnp.ones((2, 3)), jnp.array([0, 7]), where=jnp.zeros((2, 3), bool)
        )
        np.testing.assert_array_equal(masked, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: losses.focal_loss(z, y, gamma=-1.0), ValueError, "gamma must be in"),
        (lambda z, y: losses.focal_loss(z, y[:2]), ValueError, "labels must have shape"),
        (lambda z, y: losses.sigmoid_focal_loss(z, z, gamma=-1.0), ValueError, "gamma must be"),
        (lambda z, y: losses.sigmoid_focal_loss(z, z, alpha=2.0), ValueError, "alpha must be"),
        (lambda z, y: losses.self_adjusting_dice_loss(z, z, alpha=-1.0), ValueError, "alpha"),
        (lambda z, y: losses.self_adjusting_dice_loss(z, z, smooth=-1.0), ValueError, "smooth"),
        (lambda z, y: losses.self_adjusting_dice_loss(y, y), TypeError, "probabilities must"),
        (lambda z, y: losses.self_adjusting_dice_loss(z, z[0]), ValueError, "targets must"),
        (
            lambda z, y: losses.self_adjusting_dice_loss(z, z, reduce_axes=2),
            ValueError,
            "reduce_axes must name",
        ),
        (
            lambda z, y: losses.self_adjusting_dice_loss_with_logits(z, y, axis=2),
            ValueError,
            "axis 2 is out of range",
        ),
        (lambda z, y: losses.hard_negative_mask(z, z, -1.0), ValueError, "ratio must be in"),
        (lambda z, y: losses.hard_negative_mask(z, y, 1.0), ValueError, "targets must have"),
        (lambda z, y: losses.hard_negative_mask(y, y, 1.0), TypeError, "scores must have"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(np.zeros((3, 4), "f"), np.zeros(3, int))
