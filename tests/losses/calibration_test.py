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

from jaxref import losses, metrics

PEERS = np.load(Path(__file__).parents[1] / "oracles" / "imbalance.npz")
LOSSES = {
    "dual_focal_loss": losses.dual_focal_loss,
    "correctness_aware_loss": losses.correctness_aware_loss,
    "calibration_kl": losses.calibration_kl,
}


def random_batch(shape=(6, 5), seed=0):
    rng = np.random.default_rng(seed)
    return (2 * rng.normal(size=shape)).astype("f"), rng.integers(shape[-1], size=shape[:-1])


def softmax64(logits):
    e = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def literal_dual_focal(logits, labels, gamma):
    expected = []
    for p, y in zip(softmax64(logits), labels):
        below = [p_k for p_k in p if p_k < p[y]]
        expected.append(-((1 - p[y] + max(below, default=0)) ** gamma) * np.log(p[y]))
    return np.array(expected)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0.0, 0.5, 5.0)
    def test_dual_focal_loss_matches_the_release(self, gamma):
        logits, labels = PEERS["logits"].astype("f"), PEERS["labels"]
        loss = self.variant(lambda z: losses.dual_focal_loss(z, labels, gamma=gamma).sum())
        value, gradient = jax.value_and_grad(loss)(logits)
        np.testing.assert_allclose(value, PEERS[f"dual_{gamma}"], rtol=1e-5)
        expected = PEERS[f"dual_{gamma}_gradient"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_binary_dual_focal_loss_is_the_closed_form(self):
        z = np.array([3.0, 0.5, -0.5, -3.0], "f")
        p = 1 / (1 + np.exp(-np.float64(z)))
        for target, p_t in ((True, p), (False, 1 - p)):
            doubled = np.where(p_t > 0.5, 2, 1)
            expected = -((doubled * (1 - p_t)) ** 3) * np.log(p_t)
            ours = losses.sigmoid_dual_focal_loss(z, np.full(4, target), gamma=3.0)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_correctness_aware_loss_matches_the_formula(self):
        logits, labels = random_batch((12, 3))
        q = softmax64(logits)
        confidence, correct = q.max(-1), q.argmax(-1) == labels
        errors = (confidence - correct) ** 2
        ours = self.variant(partial(losses.correctness_aware_loss, balance=False))
        np.testing.assert_allclose(ours(logits, labels), errors, rtol=1e-5)
        balanced = self.variant(losses.correctness_aware_loss)(logits, labels)
        rate = correct.mean()
        weights = np.where(correct, 1 - rate, rate)  # the release's
        np.testing.assert_allclose(
            np.mean(balanced), (weights * errors).sum() / weights.sum(), rtol=1e-5
        )
        halves = (errors[correct].mean() + errors[~correct].mean()) / 2
        np.testing.assert_allclose(np.mean(balanced), halves, rtol=1e-5)

    def test_given_predictions_decide_what_is_correct(self):
        logits, labels = random_batch((12, 3))
        ours = losses.correctness_aware_loss(logits, labels, predictions=labels)
        np.testing.assert_allclose(ours, (softmax64(logits).max(-1) - 1) ** 2, rtol=1e-4)

    def test_mixup_is_cross_entropy_to_the_mixed_label(self):
        """The mixture is seen from outside through a linear model of one-hot inputs."""
        labels, seen = np.arange(5), []

        def predict(x):
            seen.append(np.asarray(x))
            return 3 * x

        for size in (1, 3):
            ours = losses.mixup_loss(
                predict, jnp.eye(5), labels, key=jax.random.key(size), mix_size=size
            )
            mixed = seen.pop()  # of one-hot inputs with the label as place: the label mixture too
            np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-6)
            assert (mixed > 0).sum(-1).max() <= size
            expected = optax.losses.softmax_cross_entropy(3 * mixed, mixed)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
        squares = lambda z, y: jnp.square(z - y).mean(-1)
        ours = losses.mixup_loss(
            predict,
            jnp.eye(5),
            jnp.ones((5, 5)),
            key=jax.random.key(0),
            mix_size=3,
            loss_fn=squares,
        )
        np.testing.assert_allclose(ours, squares(3 * seen.pop(), 1.0), rtol=1e-5)

    def test_calibration_kl_matches_the_formula(self):
        logits, labels = random_batch()
        q = np.random.default_rng(1).dirichlet(np.ones(5), size=6)
        expected = (q * (np.log(q) - np.log(softmax64(logits)))).sum(-1)
        np.testing.assert_allclose(
            losses.calibration_kl(logits, q.astype("f")), expected, rtol=1e-4
        )
        certain = losses.calibration_kl(logits, labels)
        expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(certain, expected, rtol=1e-5)

    def test_gradients_against_finite_differences(self):
        logits, labels = random_batch((3, 4))
        with jax.enable_x64(True):
            for loss in LOSSES.values():
                of_logits = jax.jit(lambda z, loss=loss: loss(z, labels))
                check_grads(of_logits, (logits.astype(float),), order=1, modes=["rev", "fwd"])


class TestClaims:
    @pytest.mark.claim("dual-focal-loss")
    def test_it_lies_between_focal_and_cross_entropy_by_the_gap_to_the_next_class(self):
        """(1) It is the literal formula, strict inequality and all, with cross-entropy at γ = 0 and
        between the two losses elsewhere; (2) at equal p_y a stronger runner-up raises it; (3) so a
        model that is fitted to noisy labels is less confident than by cross-entropy, and more than
        by the focal loss."""
        logits, labels = random_batch((64, 5))
        logits[:8] = np.round(logits[:8])  # ties
        for gamma in (0.5, 3.0):
            dual = losses.dual_focal_loss(logits, labels, gamma=gamma)
            expected = literal_dual_focal(logits, labels, gamma)
            np.testing.assert_allclose(dual, expected, rtol=1e-4, atol=1e-7)
            focal = losses.focal_loss(logits, labels, gamma=gamma)
            plain = losses.dual_focal_loss(logits, labels, gamma=0.0)
            assert np.all(focal <= dual * (1 + 1e-6))
            assert np.all(dual <= plain * (1 + 1e-6))
            assert np.mean(focal < 0.99 * dual) > 0.4
        expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(plain, expected, rtol=1e-5)

        others = np.array([[0.25, 0.24], [0.35, 0.14], [0.45, 0.04]])
        p = np.concatenate([np.full((3, 1), 0.51), others], axis=-1)
        by_gap = losses.dual_focal_loss(np.log(p).astype("f"), np.zeros(3, int))
        assert np.all(np.diff(by_gap) > 0)

        rng = np.random.default_rng(0)
        y = rng.integers(4, size=200)
        x = (rng.normal(size=(200, 30)) + 2 * np.eye(4, 30)[y]).astype("f")
        noisy = np.where(rng.random(200) < 0.1, rng.integers(4, size=200), y)

        def confidence(loss):
            step = lambda _, w: w - 0.5 * jax.grad(lambda w: loss(x @ w, noisy).mean())(w)
            w = jax.jit(lambda w: jax.lax.fori_loop(0, 200, step, w))(jnp.zeros((30, 4)))
            return softmax64(x @ w).max(-1).mean()

        plain, dual, focal = (
            confidence(partial(loss, gamma=gamma))
            for loss, gamma in (
                (losses.dual_focal_loss, 0.0),
                (losses.dual_focal_loss, 3.0),
                (losses.focal_loss, 3.0),
            )
        )
        assert plain > dual + 0.02 > focal + 0.04

    @pytest.mark.claim("correctness-aware-calibration")
    def test_it_asks_for_confidence_by_correctness_where_cross_entropy_does_not(self):
        """(1) A higher temperature is worse for every correct and better for every wrong example,
        while on a narrow miss cross-entropy too asks for more confidence; (2) accuracy stays; (3)
        with transformed copies that tell of correctness, the fitted temperatures separate right
        from wrong better than one for all does, and come closer to both."""
        logits, labels = random_batch((64, 5), seed=1)
        correct = logits.argmax(-1) == labels
        by_temperature = lambda loss: jax.jvp(
            lambda t: loss(losses.temperature_scale(logits, t), labels),
            (jnp.ones(64),),
            (jnp.ones(64),),
        )[1]
        slope = by_temperature(losses.correctness_aware_loss)
        assert 10 < correct.sum() < 54
        assert np.all(slope[correct] > 0)
        assert np.all(slope[~correct] < 0)
        narrow = jnp.log(jnp.array([[0.45, 0.40, 0.15]]))
        plain, aware = (
            jax.grad(lambda t, loss=loss: loss(narrow / t, jnp.array([1])).sum())(1.0)
            for loss in (
                optax.losses.softmax_cross_entropy_with_integer_labels,
                losses.correctness_aware_loss,
            )
        )
        assert plain > 0 > aware

        rng = np.random.default_rng(0)
        y = rng.integers(4, size=600)
        z = (rng.normal(size=(600, 4)) + 2 * np.eye(4)[y]).astype("f")
        z *= 3  # over-confident
        right = z.argmax(-1) == y
        agree = rng.random((2, 600)) < np.where(right, 0.95, 0.3)  # copies that keep the prediction
        copies = np.where(agree[..., None], z, np.roll(z, 1, axis=-1)).astype("f")
        fit, held = slice(0, 300), slice(300, 600)
        params = losses.fit_adaptive_temperature(
            z[fit], copies[:, fit], y[fit], key=jax.random.key(0), num_steps=200, learning_rate=0.05
        )
        features = losses.transformed_topk_features(z[held], copies[:, held])
        adaptive = losses.temperature_scale(z[held], losses.adaptive_temperature(params, features))
        one = losses.temperature_scale(z[held], losses.fit_temperature(z[fit], y[fit]))
        np.testing.assert_array_equal(adaptive.argmax(-1), z[held].argmax(-1))

        def scores(logits):
            confidence = softmax64(logits).max(-1).astype("f")
            auroc = metrics.roc_auc(confidence, right[held])
            return auroc, metrics.brier_score(confidence, right[held])

        (auroc, distance), (auroc_of_one, distance_of_one) = scores(adaptive), scores(one)
        assert auroc > auroc_of_one + 0.05
        assert distance < distance_of_one - 0.02


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_axis_and_vmap(self, name):
        logits, labels = random_batch((3, 4, 5))
        loss = partial(LOSSES[name], **({"balance": False} if "aware" in name else {}))
        expected = loss(logits, labels)
        assert expected.shape == (3, 4)
        moved = loss(np.moveaxis(logits, -1, 1), labels, axis=1)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(loss)(logits, labels), expected, rtol=1e-6)

    def test_masks(self, name):
        logits, labels = random_batch((6, 5))
        labels %= 3
        where = np.ones((6, 5), bool) & (np.arange(5) < 3)
        where[2] = False
        poisoned = np.where(where, logits, np.nan).astype("f")

        @jax.jit
        def loss(z):
            values = LOSSES[name](z, labels, where=where)
            return values.sum(), values

        (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(poisoned)
        kept = [0, 1, 3, 4, 5]
        expected = LOSSES[name](logits[kept, :3], labels[kept])
        np.testing.assert_allclose(values[np.array(kept)], expected, rtol=1e-5, atol=1e-7)
        assert values[2] == 0
        chex.assert_tree_all_finite(gradient)
        assert np.all(gradient[~where] == 0)

    def test_out_of_range_labels_give_nan_in_their_row_only(self, name):
        logits, labels = random_batch((4, 5))
        labels[1], labels[2] = -1, 5
        assert np.array_equal(np.isnan(LOSSES[name](logits, labels)), [False, True, True, False])

    def test_extremes_and_half_precision(self, name):
        loss = jax.jit(jax.value_and_grad(lambda z, y: LOSSES[name](z, y).sum()))
        for size in (1e4, -1e4, 0.0):
            logits = jnp.array([[size, 0.0, -size], [size, size, size]])
            for label in range(3):
                chex.assert_tree_all_finite(loss(logits, jnp.full(2, label)))
        logits, labels = random_batch()
        half = jnp.asarray(logits, jnp.bfloat16)
        ours = LOSSES[name](half, labels)
        assert ours.dtype == jnp.bfloat16
        expected = LOSSES[name](half.astype(jnp.float32), labels).astype(jnp.bfloat16)
        np.testing.assert_array_equal(ours, expected)
        assert LOSSES[name](np.ones((2, 1), "f"), np.zeros(2, int)).tolist() == [0, 0]


def test_balance_over_shards_is_that_of_the_whole():
    logits, labels = random_batch((16, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    sharded = jax.shard_map(
        partial(losses.correctness_aware_loss, axis_name="data"),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
    )
    value, gradient = jax.jit(jax.value_and_grad(lambda z: sharded(z, labels).mean()))(logits)
    expected, slope = jax.jit(
        jax.value_and_grad(lambda z: losses.correctness_aware_loss(z, labels).mean())
    )(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


def test_one_group_alone_weighs_as_without_balance():
    logits, _ = random_batch()
    top = logits.argmax(-1)
    for labels in (top, (top + 1) % 5):
        ours = losses.correctness_aware_loss(logits, labels)
        expected = losses.correctness_aware_loss(logits, labels, balance=False)
        np.testing.assert_array_equal(ours, expected)


def test_dual_focal_loss_without_a_class_below_is_the_focal_loss():
    equal, labels = np.zeros((2, 3), "f"), np.array([0, 2])
    ours = losses.dual_focal_loss(equal, labels, gamma=2.0)
    np.testing.assert_allclose(ours, (2 / 3) ** 2 * np.log(3), rtol=1e-6)
    masked = losses.sigmoid_dual_focal_loss(
        np.ones(2, "f"), np.array([1, 2]), where=np.array([True, False])
    )
    assert masked[0] > 0 == masked[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: losses.dual_focal_loss(z, y, gamma=-1.0), ValueError, "gamma must be in"),
        (lambda z, y: losses.dual_focal_loss(z, z), TypeError, "labels must be integer ids"),
        (lambda z, y: losses.dual_focal_loss(z, y[:2]), ValueError, "labels must have shape"),
        (lambda z, y: losses.sigmoid_dual_focal_loss(z, y), ValueError, "targets must have"),
        (lambda z, y: losses.sigmoid_dual_focal_loss(z, z), TypeError, "targets must be integer"),
        (lambda z, y: losses.correctness_aware_loss(z, z), TypeError, "labels must be integer"),
        (
            lambda z, y: losses.correctness_aware_loss(z, y, predictions=y[:2]),
            ValueError,
            "predictions must have",
        ),
        (lambda z, y: losses.calibration_kl(z, z[:2]), ValueError, "labels must have shape"),
        (
            lambda z, y: losses.mixup_loss(lambda x: x, z, y, key=jax.random.key(0), mix_size=0),
            ValueError,
            "mix_size must be an integer",
        ),
        (
            lambda z, y: losses.mixup_loss(lambda x: x, z, y, key=jax.random.key(0), alpha=0.0),
            ValueError,
            "alpha must be in",
        ),
        (
            lambda z, y: losses.mixup_loss(lambda x: x, z, y[:2], key=jax.random.key(0)),
            ValueError,
            "labels must have the batch",
        ),
        (
            lambda z, y: losses.mixup_loss(lambda x: x, y, y, key=jax.random.key(0)),
            TypeError,
            "inputs must have a floating-point type",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*random_batch())
