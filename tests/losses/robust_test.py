from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxref import losses

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "label_robust.npz")
LOGITS, LABELS = AUTHORS["logits"].astype(np.float32), AUTHORS["labels"]
robust = losses.label_distributionally_robust_loss


def adaptive(logits, labels, places, state, **options):
    """One visit: the losses, the gradient of their sum, and the new state."""

    def loss(z):
        values, after = losses.adaptive_ldr_loss(z, labels, places, state, **options)
        return values.sum(), (values, after)

    gradient, (values, after) = jax.grad(loss, has_aux=True)(logits)
    return values, gradient, after


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0.3, 2.0)
    def test_matches_the_release_which_normalises_softplus(self, temperature):
        def ours(z):
            return robust(
                jax.nn.softplus(z), LABELS, temperature=temperature, normalize_logits=True
            )

        values, vjp = jax.vjp(self.variant(ours), LOGITS[0])
        np.testing.assert_allclose(values, AUTHORS[f"ldr_{temperature}"], rtol=1e-5)
        gradient = AUTHORS[f"ldr_{temperature}_gradient"]
        np.testing.assert_allclose(vjp(np.ones(6, "f"))[0], gradient, rtol=1e-4, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_three_adaptive_visits_match_the_release(self):
        visit = self.variant(lambda z, s: adaptive(z, LABELS, AUTHORS["places"], s))
        state = losses.adaptive_ldr_init(8, 1.5)
        for i in range(3):
            values, gradient, state = visit(LOGITS[i], state)
            np.testing.assert_allclose(values, AUTHORS[f"adaptive_{i}"], rtol=1e-5)
            expected = AUTHORS[f"adaptive_{i}_gradient"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
            expected = AUTHORS[f"temperatures_{i}"]
            np.testing.assert_allclose(state.temperatures, expected, rtol=1e-5)
        assert state.reference == 1.5

    def test_matches_the_formula_and_finite_differences_for_soft_labels(self):
        rng = np.random.default_rng(0)
        f, q = rng.normal(size=(2, 4)), rng.dirichlet(np.ones(4), size=2)
        d = 0.5 * (1 - q) + f - (q * f).sum(-1, keepdims=True)
        with jax.enable_x64(True):
            loss = jax.jit(lambda z: robust(z, q, temperature=0.7, margin=0.5))
            expected = 0.7 * np.log(np.exp(d / 0.7).mean(-1))
            np.testing.assert_allclose(loss(f), expected, rtol=1e-6)
            check_grads(loss, (f,), order=1, modes=["rev", "fwd"])


class TestClaims:
    @pytest.mark.claim("label-distributionally-robust")
    def test_one_temperature_spans_three_losses_and_each_example_finds_its_own(self):
        """From the hinge over cross-entropy to a symmetric loss; and repeated visits of fixed
        logits reach the joint maximum over distribution and temperature, which is low where the
        model is sure."""
        f, y = LOGITS[0], LABELS
        d = 0.5 * (1 - np.eye(5)[y]) + f - np.take_along_axis(f, y[:, None], -1)
        for temperature, limit in ((1e-3, d.max(-1)), (0.0, d.max(-1)), (1e4, d.mean(-1))):
            ours = robust(f, y, temperature=temperature, margin=0.5)
            np.testing.assert_allclose(ours, limit, atol=2e-3)
        hinge = losses.crammer_singer_loss(f, y, margin=0.5)
        np.testing.assert_allclose(robust(f, y, temperature=0.0, margin=0.5), hinge)
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(f, y)
        plain = robust(f, y, margin=0.0)
        np.testing.assert_allclose(plain, cross_entropy - np.log(5), rtol=1e-5, atol=1e-6)
        every = sum(robust(f, np.full(6, k), temperature=jnp.inf) for k in range(5))
        np.testing.assert_allclose(every, 4 * 0.1, rtol=1e-4)  # whatever the logits are

        logits = f * np.array([[0.01], [0.1], [0.5], [1.0], [2.0], [10.0]], np.float32)
        state = losses.adaptive_ldr_init(6)
        visit = jax.jit(
            lambda s: losses.adaptive_ldr_loss(
                logits, y, jnp.arange(6), s, margin=0.0, normalize_logits=False
            )
        )
        for _ in range(60):
            value, state = visit(state)
        gaps = logits - np.take_along_axis(logits, y[:, None], -1)
        grid = np.linspace(0.05, 1.5, 2000)[:, None]
        objective = grid * np.log(np.exp(gaps / grid[..., None]).mean(-1))
        objective -= 2 * np.log(5) / 2 * (grid - 1) ** 2
        np.testing.assert_allclose(value, objective.max(0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(state.temperatures, grid[objective.argmax(0), 0], atol=5e-3)
        assert np.all(np.diff(state.temperatures) < 0)
        assert np.all((state.temperatures >= 0.5) & (state.temperatures <= 1))

    def test_wrong_labels_cost_less_accuracy(self):
        """A linear model with half as many features as examples fits wrong labels too, the less so
        the less a loss insists."""
        rng = np.random.default_rng(0)

        def sample(n):
            y = rng.integers(3, size=n)
            return (rng.normal(size=(n, 60)) + 3 * np.eye(3, 60)[y]).astype("f"), y

        x, truth = sample(120)
        held_out, held_labels = sample(1000)
        wrong = rng.random(120) < 0.4
        labels = np.where(wrong, rng.integers(3, size=120), truth)

        @jax.jit
        def train():
            def step(carry, _):
                plain, ours, state = carry
                cross_entropy = lambda w: robust(x @ w, labels, margin=0.0).mean()

                def loss(w):
                    values, after = losses.adaptive_ldr_loss(
                        x @ w, labels, jnp.arange(120), state, normalize_logits=True
                    )
                    return values.mean(), after

                slope, state = jax.grad(loss, has_aux=True)(ours)
                return (plain - 0.3 * jax.grad(cross_entropy)(plain), ours - 0.3 * slope, state), 0

            start = jnp.full((60, 3), 1e-3) * jnp.arange(3)
            carry = (jnp.zeros((60, 3)), start, losses.adaptive_ldr_init(120))
            return jax.lax.scan(step, carry, length=200)[0]

        plain, ours, state = train()
        accuracy = lambda w: np.mean(np.argmax(held_out @ w, -1) == held_labels)
        assert accuracy(ours) > accuracy(plain) + 0.1
        assert np.ptp(state.temperatures) > 0.2


class TestContract:
    def test_axis_vmap_masks_and_types(self):
        expected = robust(LOGITS, np.stack([LABELS] * 3), normalize_logits=True)
        loss = jax.jit(lambda z, y: robust(z, y, normalize_logits=True))
        moved = robust(np.moveaxis(LOGITS, -1, 0), np.stack([LABELS] * 3), axis=0)
        np.testing.assert_allclose(moved, robust(LOGITS, np.stack([LABELS] * 3)), rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(lambda z: loss(z, LABELS))(LOGITS), expected, rtol=1e-6)
        half = robust(LOGITS[0].astype(jnp.bfloat16), LABELS, normalize_logits=True)
        assert half.dtype == jnp.bfloat16
        where = np.arange(5) < 3
        poisoned = np.where(where, LOGITS[0], 1e30).astype("f")
        for temperature in (0.0, 1.0, jnp.inf):
            options = {"temperature": temperature, "normalize_logits": True}
            ours = robust(poisoned, LABELS % 3, where=where, **options)
            fewer = robust(LOGITS[0][:, :3], LABELS % 3, **options)
            np.testing.assert_allclose(ours, fewer, rtol=1e-5)
            assert np.all(robust(LOGITS[0], LABELS, where=where & ~where, **options) == 0)

    def test_adaptive_masks_places_and_types(self):
        state = losses.adaptive_ldr_init(8)
        where = np.ones((6, 5), bool)
        where[1] = False  # no class
        where[2] = np.arange(5) == LABELS[2]  # one
        places = AUTHORS["places"].copy()
        places[1] = places[0]  # as padding may have it
        places[4:] = (-1, 8)
        values, gradient, after = jax.jit(adaptive)(LOGITS[0], LABELS, places, state, where=where)
        np.testing.assert_array_equal(np.isnan(values), [False] * 4 + [True] * 2)
        assert values[1] == 0
        assert np.all(np.isfinite(gradient[:4]))
        changed = np.flatnonzero(after.temperatures != 1)
        np.testing.assert_array_equal(changed, sorted(places[[0, 3]]))
        whole = jax.jit(adaptive)(LOGITS[0], LABELS, AUTHORS["places"], state)[2]
        np.testing.assert_allclose(after.temperatures[changed], whole.temperatures[changed])
        half = jax.jit(adaptive)(LOGITS[0].astype(jnp.float16), LABELS, AUTHORS["places"], state)
        assert half[0].dtype == jnp.float16
        assert half[2].temperatures.dtype == jnp.float32
        moved = losses.adaptive_ldr_loss(LOGITS[0].T, LABELS, AUTHORS["places"], state, axis=0)
        plain = losses.adaptive_ldr_loss(LOGITS[0], LABELS, AUTHORS["places"], state)
        chex.assert_trees_all_close(moved, plain, rtol=1e-6)

    def test_sharded_batch_and_state(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        logits, labels = np.concatenate([LOGITS, LOGITS])[:4].reshape(-1, 5), np.tile(LABELS, 4)
        places, state = np.arange(24)[::-1].copy(), losses.adaptive_ldr_init(24)
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
        spread = state._replace(temperatures=place(state.temperatures))
        visit = jax.jit(losses.adaptive_ldr_loss)
        ours = visit(place(logits), place(labels), place(places), spread)
        chex.assert_trees_all_close(ours, visit(logits, labels, places, state), rtol=1e-6)

    def test_extreme_and_equal_logits_stay_finite(self):
        state = losses.adaptive_ldr_init(2, 0.01)
        visit = jax.jit(adaptive, static_argnames="normalize_logits")

        @jax.jit
        def slopes(z, y):
            return [
                jax.value_and_grad(lambda z: robust(z, y, temperature=t, normalize_logits=n).sum())(
                    z
                )
                for t in (0.0, 0.01, 1e6, jnp.inf)
                for n in (False, True)
            ]

        for size in (1e4, -1e4, 0.0):
            logits = np.array([[size, 0.0, -size], [size, size, size]], np.float32)
            for label in range(3):
                labels = np.full(2, label)
                chex.assert_tree_all_finite(slopes(logits, labels))
                for normalize in (False, True):
                    chex.assert_tree_all_finite(
                        visit(logits, labels, np.arange(2), state, normalize_logits=normalize)
                    )
        assert np.isnan(robust(LOGITS[0], LABELS + 5)).all()

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda s: robust(LOGITS[0], LABELS, temperature=-1.0), ValueError, "temperature must"),
            (lambda s: robust(LOGITS[0], LABELS, margin=-1.0), ValueError, "margin must be in"),
            (lambda s: losses.adaptive_ldr_init(0), ValueError, "num_examples must be in"),
            (lambda s: losses.adaptive_ldr_init(3, 0.0), ValueError, "temperature must be in"),
            (
                lambda s: losses.adaptive_ldr_loss(LOGITS[0], LABELS, LABELS, s, alpha=1.0),
                ValueError,
                "alpha must be in",
            ),
            (
                lambda s: losses.adaptive_ldr_loss(LOGITS[0], LABELS, LABELS[:2], s),
                ValueError,
                "indices must have shape",
            ),
            (
                lambda s: losses.adaptive_ldr_loss(LOGITS[0], LABELS, LABELS * 1.0, s),
                TypeError,
                "indices must be integers",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        with pytest.raises(error, match=message):
            call(losses.adaptive_ldr_init(8))
