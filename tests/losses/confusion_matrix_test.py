from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from sklearn import metrics as sklearn_metrics

from jaxref import losses

LOSSES = {
    "accuracy": losses.accuracy_loss,
    "f_half": partial(losses.f_beta_loss, beta=0.5),
    "f1": losses.f_beta_loss,
    "geometric_mean": losses.geometric_mean_loss,
    "balanced_accuracy": losses.balanced_accuracy_loss,
}


def random_set(shape=(16,), seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(shape).astype(np.float32), (rng.random(shape) < 0.4).astype(np.int32)


def literal(name, p, y, steepness=73.0, counted=None):
    """The loss and the gradient of its formula by central differences, in float64."""

    def value(p):
        weight = np.ones(p.shape) if counted is None else counted
        a = 1 / (1 + np.exp(-steepness * (p - 0.5)))
        tp, fn, fp, tn = (
            np.sum(weight * x) for x in (y * a, y * (1 - a), (1 - y) * a, (1 - y) * (1 - a))
        )
        beta = 0.25 if name == "f_half" else 1.0
        return (
            1
            - {
                "accuracy": (tp + tn) / (tp + fn + fp + tn),
                "f_half": (1 + beta) * tp / ((1 + beta) * tp + beta * fn + fp),
                "f1": 2 * tp / (2 * tp + fn + fp),
                "geometric_mean": np.sqrt(tp / (tp + fn) * tn / (tn + fp)),
                "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
            }[name]
        )

    p = np.asarray(p, np.float64)
    steps = 1e-6 * np.eye(p.size)
    return value(p), np.array([(value(p + s) - value(p - s)) / 2e-6 for s in steps])


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*LOSSES)
    def test_value_and_gradient_match_the_formula(self, name):
        p, y = random_set()
        where = np.arange(16) % 5 > 0
        loss = self.variant(
            jax.value_and_grad(lambda p: LOSSES[name](p, y, steepness=12.0, where=where))
        )
        value, gradient = loss(np.where(where, p, np.nan).astype("f"))
        expected, slope = literal(name, p, y, 12.0, where)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-6)

    @parameterized.parameters(*LOSSES)
    def test_gradient_against_finite_differences(self, name):
        p, y = random_set((6,), seed=3)
        with jax.enable_x64(True):
            loss = jax.jit(lambda p: LOSSES[name](p, y, steepness=5.0))
            check_grads(loss, (p.astype(np.float64),), order=2, modes=["rev"])

    def test_the_default_steepness_is_73(self):
        p, y = random_set()
        for name, loss in LOSSES.items():
            np.testing.assert_allclose(loss(p, y), literal(name, p, y)[0], rtol=1e-4)

    def test_sets_side_by_side(self):
        """One-against-rest decisions of three classes, on one-hot targets."""
        p, _ = random_set((16, 3))
        one_hot = np.eye(3)[np.arange(16) % 3]
        ours = losses.f_beta_loss(p, one_hot, reduce_axes=0)
        each = [losses.f_beta_loss(p[:, k], one_hot[:, k]) for k in range(3)]
        np.testing.assert_allclose(ours, each, rtol=1e-5)
        matrix = losses.soft_confusion_matrix(p, one_hot, reduce_axes=0)
        np.testing.assert_allclose(sum(matrix), 16, rtol=1e-6)

    def test_any_metric_of_the_counts(self):
        p, y = random_set()
        matrix = losses.soft_confusion_matrix(p, y)
        jaccard = lambda m: (
            m.true_positives / (m.true_positives + m.false_negatives + m.false_positives)
        )
        ours = losses.metric_loss(p, y, jaccard)
        np.testing.assert_allclose(ours, 1 - jaccard(matrix), rtol=1e-6)


class TestClaims:
    @pytest.mark.claim("anyloss")
    def test_decisions_are_counted_with_a_gradient_that_never_dies(self):
        """(1) Decisions away from 1/2 give scikit-learn's metrics; (2) 73 is the steepest whole
        number whose A(1) is below 1 in float64, and the slope there is positive in float32 too;
        (3) a logistic model of 5% positives finds more of them than one of cross-entropy."""
        p, y = random_set((40,))
        decided = np.where(p > 0.5, 0.9, 0.1).astype("f")
        hard = p > 0.5
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(y, hard),
            "f_half": sklearn_metrics.fbeta_score(y, hard, beta=0.5),
            "f1": sklearn_metrics.f1_score(y, hard),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, hard),
        }
        for name, score in expected.items():
            np.testing.assert_allclose(LOSSES[name](decided, y), 1 - score, atol=1e-6)

        with jax.enable_x64(True):
            sure = [losses.amplify_probability(jnp.float64(1), steepness=s) for s in (73, 74)]
            assert sure[0] < 1 == sure[1]
        slope = jax.grad(losses.amplify_probability)
        np.testing.assert_allclose(slope(1.0), 73 * np.exp(-36.5), rtol=1e-4)
        np.testing.assert_allclose(slope(0.0), 73 * np.exp(-36.5), rtol=1e-4)

        rng = np.random.default_rng(0)
        labels = (rng.random(1000) < 0.05).astype("f")
        x = rng.normal(size=(1000, 2)).astype("f") + 1.2 * labels[:, None]
        optimizer = optax.adam(0.02)

        def fitted(loss):
            def step(carry, _):
                w, state = carry
                gradient = jax.grad(lambda w: loss(x @ w[:2] + w[2]))(w)
                update, state = optimizer.update(gradient, state)
                return (w + update, state), None

            run = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=200)[0][0])
            w = run(jnp.zeros(3))
            return x @ w[:2] + w[2] > 0

        plain = fitted(lambda z: optax.losses.sigmoid_binary_cross_entropy(z, labels).mean())
        by_f1 = fitted(lambda z: losses.f_beta_loss(jax.nn.sigmoid(z), labels))
        balanced = fitted(lambda z: losses.balanced_accuracy_loss(jax.nn.sigmoid(z), labels))
        for decisions, score in (
            (by_f1, sklearn_metrics.f1_score),
            (balanced, sklearn_metrics.balanced_accuracy_score),
        ):
            assert score(labels, decisions) > score(labels, plain) + 0.1


class TestContract:
    def test_amplification_is_symmetric(self):
        p = jnp.linspace(0, 1, 101)
        a = losses.amplify_probability(p)
        assert a[50] == 0.5
        np.testing.assert_allclose(a + losses.amplify_probability(1 - p), 1, rtol=1e-5)
        assert losses.amplify_probability(p.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def test_sharded_sets_have_the_value_and_gradient_of_the_whole(self):
        p, y = random_set()
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        for loss in (losses.f_beta_loss, losses.geometric_mean_loss):
            sharded = jax.shard_map(
                partial(loss, axis_name="data", steepness=9.0),
                mesh=mesh,
                in_specs=PartitionSpec("data"),
                out_specs=PartitionSpec(),
            )
            value, gradient = jax.jit(jax.value_and_grad(sharded))(p, y)
            expected, slope = jax.jit(jax.value_and_grad(partial(loss, steepness=9.0)))(p, y)
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)

    def test_vmap(self):
        p, y = random_set((3, 8))
        for loss in LOSSES.values():
            each = jax.vmap(loss)(p, y)
            np.testing.assert_allclose(each, loss(p, y, reduce_axes=1), rtol=1e-6)

    @pytest.mark.parametrize("name", LOSSES)
    def test_lacking_classes_and_sure_errors_are_finite(self, name):
        loss = jax.jit(jax.value_and_grad(LOSSES[name]))
        for p in (np.zeros(4, "f"), np.ones(4, "f"), np.full(4, 0.5, "f")):
            for y in (np.zeros(4), np.ones(4), np.array([0, 1, 0, 1.0])):
                value, gradient = loss(p, y)
                chex.assert_tree_all_finite((value, gradient))
                assert -1e-6 <= value <= 1
        half = LOSSES[name](jnp.asarray([0.2, 0.9], jnp.float16), np.array([True, False]))
        assert half.dtype == jnp.float16

    def test_conventions_for_lacking_classes(self):
        p, negatives = np.array([0.1, 0.9, 0.1, 0.1], "f"), np.zeros(4)
        np.testing.assert_allclose(losses.f_beta_loss(p, negatives), 1)
        np.testing.assert_allclose(losses.geometric_mean_loss(p, negatives), 1)
        ours = losses.balanced_accuracy_loss(p, negatives)
        np.testing.assert_allclose(ours, 1 - 0.75 / 2, rtol=1e-6)

    @pytest.mark.parametrize("name", LOSSES)
    def test_a_set_without_entries_has_loss_and_gradient_0(self, name):
        loss = lambda p: LOSSES[name](p, jnp.ones(3), where=jnp.zeros(3, bool))
        value, gradient = jax.value_and_grad(loss)(jnp.full(3, jnp.nan))
        assert value == 0
        assert np.all(gradient == 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, y: losses.amplify_probability(p, steepness=0.0), ValueError, "steepness must"),
        (lambda p, y: losses.amplify_probability(y), TypeError, "probabilities must have"),
        (lambda p, y: losses.f_beta_loss(p, y, beta=0.0), ValueError, "beta must be in"),
        (lambda p, y: losses.accuracy_loss(p, y, steepness=-1.0), ValueError, "steepness must"),
        (lambda p, y: losses.accuracy_loss(y, y), TypeError, "probabilities must have"),
        (lambda p, y: losses.accuracy_loss(p, y[:3]), ValueError, "targets must broadcast"),
        (lambda p, y: losses.accuracy_loss(p, y, where=y[:3]), ValueError, "where must"),
        (lambda p, y: losses.accuracy_loss(p, y, reduce_axes=1), ValueError, "reduce_axes must"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*random_set())
