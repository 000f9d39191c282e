import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref import losses, metrics

P = np.array([1e-30, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6])


def literal(p, n):
    log_miss = n * np.log1p(-np.asarray(p, np.float64))
    return np.where(log_miss < -1, -np.log1p(-np.exp(log_miss)), -np.log(-np.expm1(log_miss)))


def factor(p, n):
    p = np.asarray(p, np.float64)
    return n * p * (1 - p) ** (n - 1) / -np.expm1(n * np.log1p(-p))


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_and_gradients_match_the_formula(self):
        log_p = np.log(P).astype("f")
        for n in (1, 1.5, 16, 1e6):
            loss = lambda x: losses.direct_coverage_loss(x, num_samples=n)
            ours = self.variant(lambda x: (loss(x), jax.vjp(loss, x)[1](jnp.ones(len(P)))[0]))
            value, gradient = ours(log_p)
            # rounding log p in float32 moves p near 1 by more than the loss's own error
            np.testing.assert_allclose(
                value[:6], literal(np.exp(np.float64(log_p)), n)[:6], rtol=2e-5
            )
            np.testing.assert_allclose(value[6], literal(P, n)[6], rtol=1e-3, atol=1e-12)
            np.testing.assert_allclose(gradient, -factor(P, n), rtol=2e-4, atol=1e-12)
            ours = losses.direct_coverage_gradient_factor(log_p, n)
            np.testing.assert_allclose(ours, -gradient, rtol=1e-6)

    def test_gradient_against_finite_differences(self):
        with jax.enable_x64(True):
            log_p = np.log(P[1:6])
            loss = lambda x: losses.direct_coverage_loss(x, num_samples=16)
            check_grads(loss, (log_p,), order=2, modes=["rev"], rtol=1e-4)
            exact = losses.direct_coverage_loss(np.log(P[:3]), num_samples=16.0)
            np.testing.assert_allclose(exact, literal(P[:3], 16), rtol=1e-13)

    def test_logits_of_tokens_in_one_answer_and_in_steps(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(3, 6, 5)).astype("f")
        labels = rng.integers(5, size=(3, 6))
        where = np.array([[0, 1, 1, 1, 1, 0], [1] * 6, [0] * 6], bool)
        steps = np.array([[0, 0, 1, 1, 4, 4]] * 3)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        token = np.where(where, np.take_along_axis(p, labels[..., None], -1)[..., 0], 1)
        poisoned = np.where(where[..., None], logits, np.nan)
        loss = jax.jit(losses.direct_coverage_loss_from_logits, static_argnames="num_samples")
        ours, vjp = jax.vjp(
            lambda z: loss(z, np.where(where, labels, -1), num_samples=8, where=where), poisoned
        )
        np.testing.assert_allclose(ours[:2], literal(token[:2].prod(-1), 8), rtol=1e-5)
        assert ours[2] == 0
        chex.assert_tree_all_finite(vjp(jnp.ones(3)))
        ours = loss(poisoned, labels, num_samples=8, where=where, steps=steps)
        pairs = token.reshape(3, 3, 2).prod(-1)
        expected = [sum(literal(x[x < 1], 8)) for x in pairs]
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-12)
        labels[0, 1] = 5
        assert np.array_equal(np.isnan(loss(logits, labels, num_samples=8)), [True, False, False])


class TestClaims:
    @pytest.mark.claim("direct-coverage-optimization")
    def test_training_for_several_samples_covers_more_and_hits_less_at_once(self):
        """An overfitted linear classifier: with cross-entropy (N = 1), surplus confidence costs
        coverage of held-out examples; with N = 16 confidence is held back, at a cost for one."""
        rng = np.random.default_rng(0)

        def examples(n):
            labels = rng.integers(8, size=n)
            features = rng.normal(size=(n, 30)) + 0.9 * np.eye(8, 30)[labels]
            return features.astype("f"), labels

        (features, labels), (held_out, truth) = examples(60), examples(2000)

        def log_likelihood(w, features, labels):
            log_p = jax.nn.log_softmax(features @ w)
            return jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]

        @jax.jit
        def covered(n):
            def loss(w):
                log_p = log_likelihood(w, features, labels)
                return losses.direct_coverage_loss(log_p, num_samples=n).mean()

            step = lambda _, w: w - 0.3 * jax.grad(loss)(w)
            w = jax.lax.fori_loop(0, 200, step, jnp.zeros((30, 8)))
            p = jnp.exp(log_likelihood(w, held_out, truth))
            fitted = jnp.exp(log_likelihood(w, features, labels))
            return p.mean(), metrics.pass_at_n(p, 16).mean(), fitted.mean()

        one, several = covered(1.0), covered(16.0)
        assert several[1] > one[1] + 0.2
        assert several[0] < one[0]
        assert several[2] < 0.6 < 0.8 < one[2]

    def test_one_sample_is_cross_entropy(self):
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(8, 1, 5)).astype("f"), rng.integers(5, size=(8, 1))
        ours = losses.direct_coverage_loss_from_logits(logits, labels, num_samples=1)
        expected = losses.softmax_cross_entropy(logits, labels)[:, 0]
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


class TestContract:
    def test_edges(self):
        log_p = jnp.array([0.0, 1e-6, -1e4, -1e-30])
        for n in (1, 16):
            loss = lambda x: losses.direct_coverage_loss(x, num_samples=n)
            value, vjp = jax.vjp(loss, log_p)
            np.testing.assert_allclose(value, [0, 0, 1e4 - np.log(n), 0], atol=1e-6)
            (gradient,) = vjp(jnp.ones(4))
            np.testing.assert_allclose(gradient, [-(n == 1), 0, -1, -(n == 1)], atol=1e-6)
        where = np.array([True, False])
        loss = lambda x: losses.direct_coverage_loss(x, num_samples=4, where=where).sum()
        value, gradient = jax.value_and_grad(loss)(jnp.array([-1.0, jnp.nan]))
        assert np.isfinite(value)
        assert gradient[1] == 0
        half = losses.direct_coverage_loss(jnp.array([-1.0], jnp.bfloat16), num_samples=4)
        assert half.dtype == jnp.bfloat16

    def test_sharded_and_mapped(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(8, 3, 5)).astype("f")
        labels = rng.integers(5, size=(8, 3), dtype=np.int32)
        loss = jax.jit(lambda z, y: losses.direct_coverage_loss_from_logits(z, y, num_samples=4))
        expected = loss(logits, labels)
        rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        ours = loss(*jax.device_put((logits, labels), rows))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(loss)(logits, labels), expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"num_samples": 0.5}, ValueError, "num_samples must be in"),
            ({"labels": np.zeros((2, 4), int)}, ValueError, "labels must have shape"),
            ({"labels": np.zeros((2, 3))}, TypeError, "labels must be integers"),
            ({"steps": np.zeros((2, 3))}, TypeError, "steps must be integers"),
            ({"steps": np.zeros(3, int)}, ValueError, "steps must have shape"),
            ({"where": np.ones((2, 4), bool)}, ValueError, "where must broadcast"),
            ({"logits": np.zeros((2, 3, 5), int)}, TypeError, "logits must have a floating"),
            ({"logits": np.zeros(5, "f")}, ValueError, r"logits must have shape \[..., tokens"),
        ],
    )
    def test_bad_input_is_named(self, changes, error, message):
        good = {"logits": np.zeros((2, 3, 5), "f"), "labels": np.zeros((2, 3), int)}
        with pytest.raises(error, match=message):
            losses.direct_coverage_loss_from_logits(**(good | {"num_samples": 4} | changes))
