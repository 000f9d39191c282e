import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxref import losses
from jaxref.data import two_moons_shortcut


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    return (3 * rng.normal(size=(4, 5))).astype("f"), rng.integers(2, size=(4, 5))


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_optax_and_the_squares_with_their_gradients(self):
        logits, targets = random_batch()
        ours = self.variant(
            lambda f, t: losses.spectral_decoupling_loss(
                f, t, coefficient=0.1, offset_positive=2.5, offset_negative=0.44
            )
        )
        plain = optax.losses.sigmoid_binary_cross_entropy(logits, targets)
        gap = logits - np.where(targets == 1, 2.5, 0.44)
        for same in (targets, targets == 1, targets.astype(np.float32)):
            np.testing.assert_allclose(ours(logits, same), plain + 0.1 * gap**2, rtol=1e-5)
        gradient = jax.grad(lambda f: ours(f, targets).sum())(logits)
        expected = 1 / (1 + np.exp(-logits)) - targets + 0.2 * gap
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
        soft = losses.spectral_decoupling_loss(
            logits, np.full((4, 5), 0.25), coefficient=0.1, offset_positive=2.0
        )
        plain = optax.losses.sigmoid_binary_cross_entropy(logits, 0.25)
        np.testing.assert_allclose(soft, plain + 0.1 * (logits - 0.5) ** 2, rtol=1e-5)

    def test_coefficient_zero_is_the_logistic_loss_and_arrays_are_per_class(self):
        logits, targets = random_batch()
        plain = optax.losses.sigmoid_binary_cross_entropy(logits, targets)
        ours = losses.spectral_decoupling_loss(logits, targets, coefficient=0.0)
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-7)
        by_class = np.where(targets == 1, 0.3, 0.01)
        ours = losses.spectral_decoupling_loss(logits, targets, coefficient=by_class)
        np.testing.assert_allclose(ours, plain + by_class * logits**2, rtol=1e-5)
        default = losses.spectral_decoupling_penalty(logits, offset=1.0)
        np.testing.assert_allclose(default, 1e-3 * (logits - 1) ** 2, rtol=1e-5)

    def test_gradient_against_finite_differences(self):
        with jax.enable_x64(True):
            logits, targets = random_batch()
            loss = jax.jit(lambda f: losses.spectral_decoupling_loss(f, targets, coefficient=0.2))
            check_grads(loss, (logits.astype(float),), order=1, modes=["rev", "fwd"])


class TestClaims:
    def test_a_network_learns_past_the_shortcut_of_two_moons(self):
        """The marked claim is in tests/analysis/dynamics/starvation_test.py. Here: of what moves
        the outputs, a good part is left once the shortcut is removed; without the penalty, little.
        """
        x, y = two_moons_shortcut(300, key=jax.random.key(0))
        a, b, c = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 64), 64, 64]))
        start = (a, b, c / 8)
        forward = lambda w, x: jax.nn.relu(x @ w[0] + w[1]) @ w[2]
        optimizer = optax.sgd(0.1, momentum=0.9)

        @jax.jit
        def without_shortcut(coefficient):
            def step(carry, _):
                w, state = carry
                loss = lambda w: losses.spectral_decoupling_loss(
                    forward(w, x), y, coefficient=coefficient
                ).mean()
                updates, state = optimizer.update(jax.grad(loss)(w), state)
                return (optax.apply_updates(w, updates), state), None

            w, _ = jax.lax.scan(step, (start, optimizer.init(start)), length=1000)[0]
            accuracy = jnp.mean((forward(w, x) > 0) == y)
            return jnp.std(forward(w, x.at[:, 0].set(0))) / jnp.std(forward(w, x)), accuracy

        plain, accuracy = without_shortcut(0.0)
        ours, accuracy_too = without_shortcut(3e-3)
        assert accuracy == accuracy_too == 1
        assert ours > 2 * plain


class TestContract:
    @pytest.mark.parametrize("name", ["spectral_decoupling_loss", "spectral_decoupling_penalty"])
    def test_extremes_masks_and_types(self, name):
        where = np.array([True, True, True, False])
        logits = jnp.array([1e4, -1e4, 0.0, jnp.nan])
        for target in (0, 1):
            arguments = (np.full(4, target),) if name.endswith("loss") else ()
            loss = lambda f: getattr(losses, name)(f, *arguments, where=where)
            values, vjp = jax.vjp(loss, logits)
            assert np.all(np.isfinite(values))
            assert values[3] == 0
            assert np.all(np.isfinite(vjp(jnp.ones(4))[0][:3]))
            half = getattr(losses, name)(
                logits[2:3].astype(jnp.bfloat16), *(a[2:3] for a in arguments)
            )
            assert half.dtype == jnp.bfloat16

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"coefficient": -1.0}, ValueError, "coefficient must be in"),
            ({"targets": np.ones(3)}, ValueError, "targets must broadcast"),
            ({"where": np.ones((3, 5), bool)}, ValueError, "where must broadcast"),
            ({"coefficient": np.ones(4)}, ValueError, "coefficient must broadcast"),
            ({"logits": np.ones((4, 5), int)}, TypeError, "logits must have a floating-point type"),
        ],
    )
    def test_bad_input_is_named(self, options, error, message):
        logits, targets = random_batch()
        with pytest.raises(error, match=message):
            losses.spectral_decoupling_loss(**{"logits": logits, "targets": targets} | options)
