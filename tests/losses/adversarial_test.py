import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxref import losses

KEY = jax.random.key(0)
switching = jax.jit(losses.switching_one_versus_rest_loss, static_argnames="axis")


def random_batch(shape=(10, 5), seed=0, scale=2.0):
    """Logits, others near them, and integer labels over the last axis."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=shape)
    attacked = logits + 0.5 * rng.normal(size=shape)
    return logits.astype("f"), attacked.astype("f"), rng.integers(shape[-1], size=shape[:-1])


def margins64(logits, labels):
    hot = np.eye(logits.shape[-1], dtype=bool)[labels]
    return logits[hot] - np.where(hot, -np.inf, logits).max(-1)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_one_versus_rest_is_the_sum_of_optax_binary_cross_entropies(self):
        logits, _, labels = random_batch()
        hot = np.eye(5, dtype=np.float32)[labels]
        theirs = lambda z: optax.losses.sigmoid_binary_cross_entropy(z, hot).sum(-1)
        for target in (labels, hot):
            ours = self.variant(lambda z: losses.one_versus_rest_loss(z, target))
            np.testing.assert_allclose(ours(logits), theirs(logits), rtol=1e-5)
            gradient = jax.grad(lambda z: ours(z).sum())(logits)
            np.testing.assert_allclose(gradient, jax.nn.sigmoid(logits) - hot, atol=1e-6)
        soft = np.random.default_rng(0).dirichlet(np.ones(5), size=10).astype("f")
        each = [losses.one_versus_rest_loss(logits, np.full(10, k)) for k in range(5)]
        ours = losses.one_versus_rest_loss(logits, soft)
        np.testing.assert_allclose(ours, (soft * np.stack(each, -1)).sum(-1), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_switching_matches_a_sort_of_the_margins(self):
        logits, attacked, labels = random_batch()
        margins = margins64(logits, labels)
        np.testing.assert_allclose(losses.logit_margin(logits, labels), margins, rtol=1e-6)
        easy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        hard = losses.one_versus_rest_loss(logits, labels)
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(attacked)
        divergence = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
        ours = self.variant(
            lambda z, m: losses.switching_one_versus_rest_loss(z, labels, fraction=m, weight=0.7)
        )
        trades = self.variant(
            lambda z, a, m: losses.switching_ovr_trades_loss(
                z, a, labels, fraction=m, weight=0.7, beta=3.0
            )
        )
        for fraction, count in ((0.0, 0), (0.1, 1), (0.3, 3), (0.31, 4), (1.0, 10)):
            expected = np.array(easy)
            hardest = np.argsort(margins)[:count]
            expected[hardest] = 0.7 * hard[hardest]
            np.testing.assert_allclose(ours(logits, fraction), expected, rtol=1e-5)
            value = trades(logits, attacked, fraction)
            np.testing.assert_allclose(value, expected + 3 * divergence, rtol=1e-5)

    def test_trades_gradients_match_optax(self):
        logits, attacked, labels = random_batch()

        def theirs(z, a):
            easy = optax.losses.softmax_cross_entropy_with_integer_labels(z, labels)
            log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(a)
            return (easy + 6 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)).sum()

        ours = lambda z, a: losses.switching_ovr_trades_loss(z, a, labels, fraction=0.0).sum()
        gradients = (jax.jit(jax.grad(f, (0, 1)))(logits, attacked) for f in (ours, theirs))
        chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_mart_matches_the_formula(self):
        def literal(*pair):
            clean, moved = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in pair)
            expected = []
            for p, q, y in zip(clean, moved, labels, strict=True):
                margin = -np.log(q[y]) - np.log(1 - np.delete(q, y).max())
                expected.append(margin + 3 * (1 - p[y]) * np.sum(p * np.log(p / q)))
            return np.array(expected)

        logits, attacked, labels = random_batch()
        pair = [logits.astype(float), attacked.astype(float)]
        ours = self.variant(lambda z, a, y: losses.mart_loss(z, a, y, beta=3.0))
        expected = literal(*pair)
        np.testing.assert_allclose(ours(logits, attacked, labels), expected, rtol=1e-5)
        soft = 0.7 * np.eye(5, dtype="f")[labels] + 0.06
        np.testing.assert_allclose(ours(logits, attacked, soft), expected, rtol=1e-5)
        slopes = jax.grad(lambda *pair: ours(*pair, labels).sum(), (0, 1))(logits, attacked)
        for side in range(2):
            for i, k in ((0, 0), (4, 3), (9, labels[9])):
                steps = [[x.copy() for x in pair] for _ in range(2)]
                for step, sign in zip(steps, (1, -1), strict=True):
                    step[side][i, k] += sign * 1e-5
                finite = (literal(*steps[0]) - literal(*steps[1])).sum() / 2e-5
                np.testing.assert_allclose(slopes[side][i, k], finite, rtol=1e-3, atol=1e-4)

    @chex.variants(with_jit=True, without_jit=True)
    def test_smooth_adversarial_loss_matches_the_formula(self):
        logits, attacked, labels = random_batch()
        z, a = logits.astype(float), attacked.astype(float)
        for tau in (0.0, 1.0):
            expected = []
            for i, y in enumerate(labels):
                others = np.arange(5) != y
                clean, moved = ((x[i, y] - x[i])[others] for x in (z, a))
                u = np.exp(-clean / 0.8).sum()
                expected.append(u if tau == 0 else np.log1p(u))
                expected[-1] += 1.5 * np.linalg.norm(moved - clean)
            ours = self.variant(
                lambda z, a: losses.smooth_adversarial_comp_sum_loss(
                    z, a, labels, tau=tau, rho=0.8, nu=1.5
                )
            )
            np.testing.assert_allclose(ours(logits, attacked), expected, rtol=1e-5)

    @parameterized.parameters("inf", "2")
    def test_attack_matches_steps_by_hand_from_its_own_start(self, norm):
        rng = np.random.default_rng(0)
        weights, x = rng.normal(size=(3, 2, 4)), rng.random((5, 3, 2)).astype("f")
        loss_fn = lambda x: jnp.sum(jnp.tanh(jnp.einsum("bij,ijk->bk", x, weights)) ** 2, axis=-1)
        options = {"key": KEY, "epsilon": 0.3, "step_size": 0.1, "norm": norm}
        start = losses.projected_gradient_attack(loss_fn, x, num_steps=0, **options)
        perturbed = np.asarray(start, np.float64)
        for _ in range(4):
            t = np.tanh(np.einsum("bij,ijk->bk", perturbed, weights))
            slope = np.einsum("bk,ijk->bij", 2 * t * (1 - t**2), weights)
            length = lambda v: np.linalg.norm(v.reshape(5, -1), axis=-1)[:, None, None]
            moved = 0.1 * (np.sign(slope) if norm == "inf" else slope / length(slope))
            delta = perturbed + moved - x
            if norm == "inf":
                delta = np.clip(delta, -0.3, 0.3)
            else:
                delta *= np.minimum(1, 0.3 / length(delta))
            perturbed = np.clip(x + delta, 0, 1)
        ours = losses.projected_gradient_attack(loss_fn, x, num_steps=4, **options)
        np.testing.assert_allclose(ours, perturbed, atol=1e-5)


class TestClaims:
    @pytest.mark.claim("sovr")
    def test_margins_grow_twice_as_fast_under_one_versus_rest(self):
        """Gradient flow on ten logits from 0, to time 1e5: against log t, the margin rises by 2
        with one-versus-rest, and by 1 with cross-entropy, whatever its weight."""
        losses_of = {
            "one versus rest": losses.one_versus_rest_loss,
            "cross-entropy": losses.comp_sum_loss,
            "weighted": lambda z, y: 5 * losses.comp_sum_loss(z, y),
        }

        def flow(loss):
            """Runge-Kutta steps in log t."""

            def velocity(z, log_t):
                return -jnp.exp(log_t) * jax.grad(loss)(z, 0)

            def step(z, log_t):
                h = 0.02
                k1 = velocity(z, log_t)
                k2 = velocity(z + h / 2 * k1, log_t + h / 2)
                k3 = velocity(z + h / 2 * k2, log_t + h / 2)
                k4 = velocity(z + h * k3, log_t + h)
                return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), z[0] - z[1]

            log_t = jnp.arange(-4, np.log(1e5), 0.02)
            margins = jax.lax.scan(step, jnp.zeros(10), log_t)[1]
            late = np.flatnonzero(log_t > np.log(1e3))
            return np.polyfit(log_t[late], margins[late], 1)[0], margins[-1]

        slopes, ends = zip(*(flow(f) for f in losses_of.values()))
        np.testing.assert_allclose(slopes, [2, 1, 1], atol=0.01)
        assert ends[0] > ends[2] + 5

    def test_smooth_loss_is_above_the_loss_of_clipped_margins_at_every_perturbation(self):
        rng = np.random.default_rng(0)
        logits, _, labels = random_batch((400, 5))
        attacked = (logits + rng.exponential(2, size=(400, 1)) * rng.normal(size=(400, 5))).astype(
            "f"
        )
        for rho in (0.5, 1.0, 2.0):
            for tau in (0.0, 0.5, 1.0, 2.0):
                ours = losses.smooth_adversarial_comp_sum_loss(
                    logits, attacked, labels, tau=tau, rho=rho, nu=2 / rho
                )
                others = np.arange(5) != labels[:, None]
                margin = np.take_along_axis(attacked, labels[:, None], -1) - attacked
                u = (np.clip(1 - margin / rho, 0, 1) * others).sum(-1)
                lower = np.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
                assert np.all(ours >= lower - 1e-4)


class TestSets:
    def test_shards_rank_as_the_whole_set_does(self):
        logits, attacked, labels = random_batch((16, 5))
        where = np.random.default_rng(0).random(16) < 0.7
        labels[~where] = -1

        def loss(z, a, y, w, axis_name=None):
            return losses.switching_ovr_trades_loss(z, a, y, where=w, axis_name=axis_name)

        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.shard_map(
            lambda *arguments: loss(*arguments, "data"),
            mesh=mesh,
            in_specs=(P("data"),) * 4,
            out_specs=P("data"),
        )

        def evaluate(f):
            total = lambda z, a: f(z, a, labels, where).sum()
            return jax.jit(jax.value_and_grad(total, (0, 1)))(logits, attacked)

        chex.assert_trees_all_close(evaluate(loss), evaluate(sharded), rtol=1e-5)

    def test_missing_examples_count_for_nothing(self):
        logits, _, labels = random_batch()
        where = np.arange(10) < 7
        labels[7:] = -1
        poisoned = np.where(where[:, None], logits, np.nan).astype("f")
        ours, vjp = jax.vjp(lambda z: switching(z, labels, where=where), poisoned)
        expected = switching(logits[:7], labels[:7])
        np.testing.assert_allclose(ours, [*expected, 0, 0, 0], rtol=1e-6)
        assert np.all(vjp(jnp.ones(10))[0][7:] == 0)
        assert np.all(switching(logits, labels, where=np.zeros(10, bool)) == 0)

    def test_equal_margins_switch_in_order(self):
        logits = np.tile(np.array([1.0, 0.0], "f"), (4, 1))
        ours = switching(logits, np.zeros(4, int), fraction=0.5, weight=0.0)
        np.testing.assert_array_equal(ours == 0, [True, True, False, False])


class TestContract:
    def test_axis_types_and_masked_classes(self):
        logits, _, labels = random_batch((3, 4, 5))
        where = np.arange(5) < 3
        poisoned = np.where(where, logits, np.nan)
        per_example = {
            "ovr": lambda z, y, **k: losses.one_versus_rest_loss(z, y, **k),
            "margin": lambda z, y, **k: losses.logit_margin(z, y, **k),
            "smooth": lambda z, y, **k: losses.smooth_adversarial_comp_sum_loss(z, 2 * z, y, **k),
            "mart": lambda z, y, **k: losses.mart_loss(z, 2 * z, y, **k),
        }
        for loss in per_example.values():
            loss = jax.jit(loss, static_argnames="axis")
            expected = loss(logits, labels)
            np.testing.assert_allclose(
                loss(np.moveaxis(logits, -1, 0), labels, axis=0), expected, rtol=1e-6
            )
            np.testing.assert_allclose(jax.vmap(loss)(logits, labels), expected, rtol=1e-6)
            ours, vjp = jax.vjp(lambda z: loss(z, labels % 3, where=where), poisoned)
            np.testing.assert_allclose(ours, loss(logits[..., :3], labels % 3), rtol=1e-5)
            assert np.all(vjp(jnp.ones((3, 4)))[0][..., 3:] == 0)
            assert np.all(loss(logits, labels, where=where & ~where) == 0)
            assert np.isnan(loss(logits, labels + 5)).all()
            assert loss(logits.astype(jnp.bfloat16), labels).dtype == jnp.bfloat16
        moved = switching(np.moveaxis(logits, -1, 0), labels, axis=0)
        np.testing.assert_allclose(moved, switching(logits, labels), rtol=1e-6)
        only_own = losses.logit_margin(logits, labels, where=np.eye(5, dtype=bool)[labels])
        np.testing.assert_array_equal(only_own, 0)

    def test_extreme_and_equal_logits_stay_finite(self):
        @jax.jit
        def slopes(z, y):
            return [
                jax.value_and_grad(lambda z: f(z).sum())(z)
                for f in (
                    lambda z: losses.switching_ovr_trades_loss(z, -z, y, fraction=0.5),
                    lambda z: losses.mart_loss(z, -z, y),
                    lambda z: losses.smooth_adversarial_comp_sum_loss(z, z, y, tau=0.0),
                    lambda z: losses.smooth_adversarial_comp_sum_loss(z, -z, y, tau=2.0),
                )
            ]

        for size in (1e4, -1e4, 0.0):
            logits = np.array([[size, 0.0, -size], [size, size, size]], np.float32)
            for label in range(3):
                chex.assert_tree_all_finite(slopes(logits, np.full(2, label)))

    def test_gradient_against_finite_differences(self):
        with jax.enable_x64(True):
            logits, attacked = (x[:2].astype(float) for x in random_batch()[:2])
            q = np.random.default_rng(0).dirichlet(np.ones(5), size=2)
            loss = jax.jit(lambda z, a: losses.smooth_adversarial_comp_sum_loss(z, a, q, tau=0.5))
            check_grads(loss, (logits, attacked), order=1, modes=["rev"])

    @pytest.mark.parametrize("norm", ["inf", "2"])
    def test_attacks_stay_within_reach_and_bounds(self, norm):
        rng = np.random.default_rng(0)
        x = rng.random((64, 3, 4)).astype("f")
        options = {"key": KEY, "epsilon": 0.2, "norm": norm}
        attack = jax.jit(
            lambda x, slope, n: losses.projected_gradient_attack(
                lambda x: (x * slope).sum((1, 2)), x, num_steps=n, step_size=0.05, **options
            )
        )
        size = lambda delta: (
            np.abs(delta).max((1, 2))
            if norm == "inf"
            else np.linalg.norm(delta.reshape(64, -1), axis=1)
        )
        slope = rng.normal(size=(3, 4)).astype("f")
        for ours in (attack(x, slope, 0), attack(x, slope, 12), attack(x, 0 * slope, 3)):
            assert np.all((ours >= 0) & (ours <= 1))
            assert np.all(size(ours - x) <= 0.2 + 1e-6)
            assert np.all(size(ours - x) > 0.01)
        weak = lambda x: (x * (1e-25 * slope)).sum((1, 2))
        free = losses.projected_gradient_attack(
            weak, x, bounds=None, num_steps=40, step_size=0.05, **options
        )
        unit = np.sign(slope) if norm == "inf" else slope / np.linalg.norm(slope)
        np.testing.assert_allclose(free - x, np.broadcast_to(0.2 * unit, x.shape), atol=2e-3)
        half = losses.projected_gradient_attack(
            jnp.sum, x[:2].astype(jnp.bfloat16), num_steps=1, **options
        )
        assert half.dtype == jnp.bfloat16
        slopes = jax.grad(lambda x: attack(x, slope, 2).sum())(x)
        np.testing.assert_array_equal(slopes, 0)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda z, y: losses.logit_margin(z[:, :1], y * 0), ValueError, "two classes"),
            (lambda z, y: losses.one_versus_rest_loss(z, y[:3]), ValueError, "labels must have"),
            (lambda z, y: switching(z, y, where=y[:3] > 0), ValueError, "where must broadcast"),
            (
                lambda z, y: losses.switching_one_versus_rest_loss(z, y, fraction=1.1),
                ValueError,
                "fraction must be in",
            ),
            (
                lambda z, y: losses.switching_one_versus_rest_loss(z, y, weight=-1.0),
                ValueError,
                "weight must be in",
            ),
            (
                lambda z, y: losses.switching_ovr_trades_loss(z, z, y, beta=-1.0),
                ValueError,
                "beta must be in",
            ),
            (
                lambda z, y: losses.switching_ovr_trades_loss(z, z[:3], y),
                ValueError,
                "adversarial_logits must have shape",
            ),
            (lambda z, y: losses.mart_loss(z, z, y, beta=-1.0), ValueError, "beta must be in"),
            (lambda z, y: losses.mart_loss(z[:, :1], z[:, :1], y), ValueError, "two classes"),
            (
                lambda z, y: losses.smooth_adversarial_comp_sum_loss(z, z, y, rho=0.0),
                ValueError,
                "rho must be in",
            ),
            (
                lambda z, y: losses.projected_gradient_attack(jnp.sum, z, key=KEY, norm="1"),
                ValueError,
                "norm must be 'inf' or '2'",
            ),
            (
                lambda z, y: losses.projected_gradient_attack(jnp.sum, z, key=KEY, epsilon=-1.0),
                ValueError,
                "epsilon must be in",
            ),
            (
                lambda z, y: losses.projected_gradient_attack(jnp.sum, y, key=KEY),
                TypeError,
                "inputs must have a floating-point type",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        logits, _, labels = random_batch()
        with pytest.raises(error, match=message):
            call(logits, labels)
