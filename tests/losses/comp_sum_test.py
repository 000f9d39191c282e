import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.test_util import check_grads
from scipy.optimize import minimize

from jaxref import losses

comp_sum = jax.jit(losses.comp_sum_loss, static_argnames="axis")
TAUS = (0.0, 0.5, 1.0, 1.0 + 1e-7, 1.5, 1.7, 2.0, 3.0)


def random_batch(shape=(6, 5), seed=0, scale=2.0):
    """Logits, integer labels and soft labels over the last axis."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=shape)).astype(np.float32)
    labels = rng.integers(shape[-1], size=shape[:-1])
    soft = rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]).astype(np.float32)
    return logits, labels, soft


def phi(u, tau):
    return np.log1p(u) if abs(tau - 1) < 1e-6 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def comp_sum64(logits, tau):
    """The loss `[..., classes]` of every label, from the sum of exponentials."""
    z = np.asarray(logits, np.float64)
    return phi(np.exp(z[..., None, :] - z[..., :, None]).sum(-1) - 1, tau)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_and_gradients_match_the_sum_of_exponentials(self):
        logits, labels, soft = random_batch()
        ours = self.variant(
            jax.value_and_grad(lambda z, y, tau: losses.comp_sum_loss(z, y, tau=tau).sum())
        )
        p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        for tau in TAUS:
            each = comp_sum64(logits, tau)
            for target, q in ((labels, np.eye(5)[labels]), (soft, soft)):
                value, gradient = ours(logits, target, tau)
                np.testing.assert_allclose(value, (q * each).sum(), rtol=1e-5)
                # every label pulls with p_y^(τ - 1) (softmax - onehot)
                pull = q * p ** (tau - 1.0)
                expected = pull.sum(-1, keepdims=True) * p - pull
                np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)

    @parameterized.parameters(0.0, 0.3, 1.0, 1.2, 1.9, 1.99, 2.0, 3.0)
    def test_minimal_risk_is_the_minimum_over_scores(self, tau):
        p = np.array([0.5, 0.3, 0.2])
        risk = lambda z: comp_sum64(z, tau) @ p
        starts = (np.log(p), np.array([9.0, 0.0, 0.0]))
        least = min(minimize(risk, z, method="Nelder-Mead").fun for z in starts)
        ours = losses.comp_sum_minimal_risk(p, tau=tau)
        assert ours <= least + 1e-9
        np.testing.assert_allclose(ours, least, rtol=1e-3)

    def test_forms_join_at_their_ends(self):
        p = np.random.default_rng(0).dirichlet(np.ones(4), size=3)
        beta = np.linspace(0, 1, 5)
        for tau in (1.0, 2.0):
            around = [tau - 2e-6, tau, tau + 2e-6]
            for f in (
                lambda t: losses.comp_sum_minimal_risk(p, tau=t),
                lambda t: losses.comp_sum_consistency_transform(beta, tau=t, num_classes=4),
            ):
                np.testing.assert_allclose(f(around[0]), f(around[1]), rtol=1e-4, atol=1e-9)
                np.testing.assert_allclose(f(around[2]), f(around[1]), rtol=1e-4, atol=1e-9)
        certain = losses.comp_sum_minimal_risk([[1.0, 0.0]] * 2, tau=0.5)
        np.testing.assert_allclose(certain, 0, atol=1e-12)

    @parameterized.parameters(0.0, 0.5, 1.0, 1.5, 1.99, 2.0, 3.0)
    def test_bound_inverts_the_transform_below_its_closed_form(self, tau):
        beta = np.linspace(0, 1, 11)
        regret = losses.comp_sum_consistency_transform(beta, tau=tau, num_classes=10)
        bound = losses.comp_sum_consistency_bound(regret, tau=tau, num_classes=10)
        np.testing.assert_allclose(bound, beta, atol=1e-6)
        beyond = losses.comp_sum_consistency_bound(1e6, tau=tau, num_classes=10)
        np.testing.assert_allclose(beyond, 1)
        if tau < 2:
            growth = 2**tau * (2 - tau) if tau <= 1 else 2 * 10 ** (tau - 1)
            closed = np.sqrt(growth * regret)
        else:
            closed = (tau - 1) * 10 ** (tau - 1) * regret
        assert np.all(beta <= closed + 1e-9)


class TestClaims:
    @pytest.mark.claim("comp-sum-losses")
    def test_excess_loss_bounds_the_excess_of_errors_at_every_label_distribution(self):
        """And is attained: for two classes at even scores, and for labels that are certain of
        neither, the bound holds with equality up to τ = 1."""
        rng = np.random.default_rng(0)
        p = rng.dirichlet(0.5 * np.ones(4), size=4000)
        logits = (rng.exponential(3, size=(4000, 1)) * rng.normal(size=(4000, 4))).astype("f")
        errors = p.max(-1) - np.take_along_axis(p, logits.argmax(-1)[:, None], -1)[:, 0]
        for tau in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
            risk = comp_sum(logits, p.astype("f"), tau=tau)
            excess = risk - losses.comp_sum_minimal_risk(p, tau=tau)
            least = losses.comp_sum_consistency_transform(errors, tau=tau, num_classes=4)
            assert np.all(excess >= least - 1e-5 * (1 + risk))
        beta = np.linspace(0, 1, 7)
        even = np.stack([1 + beta, 1 - beta], -1) / 2
        for tau in (0.0, 0.5, 1.0):
            risk = comp_sum(np.zeros((7, 2), "f"), even.astype("f"), tau=tau)
            excess = risk - losses.comp_sum_minimal_risk(even, tau=tau)
            tight = losses.comp_sum_consistency_transform(beta, tau=tau, num_classes=2)
            np.testing.assert_allclose(excess, tight, atol=1e-5)

    def test_special_cases(self):
        logits, labels, soft = random_batch()
        p = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), labels[:, None], -1)[:, 0]
        cross_entropy = optax.losses.softmax_cross_entropy(logits, soft)
        np.testing.assert_allclose(losses.comp_sum_loss(logits, soft), cross_entropy, rtol=1e-5)
        ours = losses.generalized_cross_entropy(logits, labels)
        np.testing.assert_allclose(ours, (1 - p**0.7) / 0.7, rtol=1e-5)
        ours = losses.generalized_cross_entropy(logits, soft, q=0.0)
        np.testing.assert_allclose(ours, cross_entropy, rtol=1e-5)
        ours = losses.mean_absolute_error_classification(logits, labels)
        np.testing.assert_allclose(ours, 1 - p, rtol=1e-5)
        every = [losses.mean_absolute_error_classification(logits, np.full(6, k)) for k in range(5)]
        np.testing.assert_allclose(sum(every), 4, rtol=1e-6)


class TestContract:
    def test_gradient_against_finite_differences(self):
        with jax.enable_x64(True):
            logits, soft = np.array([[0.3, -1.0, 0.5]]), np.array([[0.2, 0.5, 0.3]])
            loss = jax.jit(lambda z: losses.comp_sum_loss(z, soft, tau=0.3))
            check_grads(loss, (logits,), order=1, modes=["rev", "fwd"])

    def test_axis_vmap_classes_and_types(self):
        logits, labels, _ = random_batch((3, 4, 5))
        expected = comp_sum(logits, labels, tau=0.5)
        moved = comp_sum(np.moveaxis(logits, -1, 1), labels, tau=0.5, axis=1)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)
        each = jax.vmap(lambda z, y: losses.comp_sum_loss(z, y, tau=0.5))(logits, labels)
        np.testing.assert_allclose(each, expected, rtol=1e-6)
        where = np.arange(5) < 3
        poisoned = np.where(where, logits, 1e30).astype("f")
        ours = comp_sum(poisoned, labels % 3, tau=0.5, where=where)
        fewer = comp_sum(logits[..., :3], labels % 3, tau=0.5)
        np.testing.assert_allclose(ours, fewer, rtol=1e-5)
        assert np.all(comp_sum(logits, labels, where=np.zeros(5, bool)) == 0)
        half = comp_sum(logits.astype(jnp.bfloat16), labels)
        assert half.dtype == jnp.bfloat16
        assert np.isnan(losses.generalized_cross_entropy(logits[0, 0], 5))

    def test_extreme_logits_stay_finite(self):
        loss = jax.jit(
            jax.value_and_grad(lambda z, y, tau: losses.comp_sum_loss(z, y, tau=tau).sum())
        )
        for size in (1e4, -1e4, 0.0):
            logits = np.array([[size, 0.0, -size], [size, size, size]], np.float32)
            for tau in (0.0, 1.0, 1.7, 3.0):
                for label in range(3):
                    value, gradient = loss(logits, np.full(2, label), tau)
                    assert np.isfinite(value)
                    assert np.all(np.isfinite(gradient))
        one_class = comp_sum(np.ones((2, 1), "f"), np.zeros(2, int), tau=0.0)
        np.testing.assert_array_equal(one_class, 0)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda z, y: losses.comp_sum_loss(z, y, tau=-0.1), ValueError, "tau must be in"),
            (lambda z, y: losses.comp_sum_loss(z, y[:3]), ValueError, "labels must have shape"),
            (lambda z, y: losses.generalized_cross_entropy(z, y, q=1.1), ValueError, "q must be"),
            (lambda z, y: losses.comp_sum_minimal_risk(z), ValueError, "probabilities must be in"),
            (
                lambda z, y: losses.comp_sum_minimal_risk(np.ones((2, 3)) / 4),
                ValueError,
                "probabilities must have sum 1",
            ),
            (
                lambda z, y: losses.comp_sum_consistency_transform(1.1, num_classes=3),
                ValueError,
                "beta must be in",
            ),
            (
                lambda z, y: losses.comp_sum_consistency_bound(0.1, num_classes=1),
                ValueError,
                "num_classes must be in",
            ),
            (
                lambda z, y: losses.comp_sum_consistency_bound(-0.1, num_classes=3),
                ValueError,
                "surrogate_regret must be in",
            ),
            (
                lambda z, y: jax.jit(lambda t: losses.comp_sum_minimal_risk([1.0], tau=t))(1.0),
                TypeError,
                "tau must be a number",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        logits, labels, _ = random_batch()
        with pytest.raises(error, match=message):
            call(logits, labels)
