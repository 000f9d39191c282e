from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxref import losses

LOSS = losses.multi_teacher_adversarial_distillation_loss


def softmax64(z):
    e = np.exp(np.float64(z) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def random_logits(steps=4, examples=6, classes=5):
    """Natural and adversarial logits of a student, of an accurate and of a robust teacher."""
    rng = np.random.default_rng(0)
    return tuple(
        (size * rng.normal(size=(steps, examples, classes))).astype("f") for size in (1, 1, 5, 2)
    )


class Literal:
    """The authors' training loop, a step at a time, without what they add within logarithms."""

    def __init__(self):
        self.temperatures, self.weights, self.initial = [1.0, 1.0], [0.5, 0.5], None

    def step(self, s_nat, s_adv, t_nat, t_adv, temperature_rate, weight_rate):
        q = [softmax64(t / tau) for t, tau in zip((t_adv, t_nat), self.temperatures)]
        p = [softmax64(s) for s in (s_adv, s_nat)]
        divergences = [np.sum(b * np.log(b / a), -1) for a, b in zip(p, q)]
        entropies = [-np.mean(np.sum(b * np.log(b), -1)) for b in q]
        losses = [d.mean() for d in divergences]
        for k in (0, 1):
            sign = np.sign(entropies[k] / entropies[1 - k] - 1)
            moved = self.temperatures[k] - temperature_rate * sign
            self.temperatures[k] = max(min(10, moved), 1)
        self.initial = self.initial or losses
        relative = [a / b for a, b in zip(losses, self.initial)]
        for k in (0, 1):
            self.weights[k] -= weight_rate * (self.weights[k] - relative[k] / sum(relative))
        w = self.weights
        gradients = [w[k] * (p[k] - q[k]) / len(s_nat) for k in (0, 1)]
        return w[0] * divergences[0] + w[1] * divergences[1], gradients


@jax.jit
def run(student_natural, student_adversarial, t_nat, t_adv, where=True):
    """All steps: values, gradients of the mean with respect to both students, and states."""

    def step(state, logits):
        def mean(s_nat, s_adv):
            values, following, metrics = LOSS(
                s_nat,
                s_adv,
                *logits[2:],
                state,
                temperature_rate=0.3,
                weight_rate=0.2,
                where=where,
            )
            return values.mean(), (values, following, metrics)

        (_, kept), gradients = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(*logits[:2])
        return kept[1], (kept, gradients)

    logits = student_natural, student_adversarial, t_nat, t_adv
    return jax.lax.scan(step, losses.mtard_init(), logits)[1]


class TestNumbers:
    def test_steps_match_the_release(self):
        logits = random_logits()
        (values, states, metrics), gradients = run(*logits)
        literal = Literal()
        for i in range(4):
            expected, slopes = literal.step(*(z[i] for z in logits), 0.3, 0.2)
            np.testing.assert_allclose(values[i], expected, rtol=1e-5)
            for ours, theirs in zip(gradients, slopes[::-1]):
                np.testing.assert_allclose(ours[i], theirs, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(states.temperatures[i], literal.temperatures, rtol=1e-5)
            np.testing.assert_allclose(states.weights[i], literal.weights, rtol=1e-5)
            np.testing.assert_allclose(states.initial_losses[i], literal.initial, rtol=1e-5)
        np.testing.assert_array_equal(states.step, [1, 2, 3, 4])
        assert metrics.entropies.shape == metrics.losses.shape == (4, 2)

    def test_exponent_and_a_loss_that_was_0(self):
        balance = jax.jit(losses.normalized_loss_balance)
        weights = balance([0.2, 0.8], [1.0, 3.0], [2.0, 2.0], rate=1.0, exponent=2.0)
        np.testing.assert_allclose(weights, [0.1, 0.9], rtol=1e-5)
        weights = balance([0.3, 0.7], [1.0, 2.0], [0.0, 1.0], rate=1.0, exponent=1.0)
        np.testing.assert_allclose(weights, [1 / 3, 2 / 3], rtol=1e-5)
        weights = balance([0.3, 0.7], [0.0, 0.0], [1.0, 1.0], rate=1.0, exponent=1.0)
        np.testing.assert_allclose(weights, [0.3, 0.7], rtol=1e-6)


class TestClaims:
    @pytest.mark.claim("multi-teacher-adversarial-distillation")
    def test_weights_follow_what_lags_and_temperatures_level_what_teachers_know(self):
        """Weights under losses that stay, against their closed form; and two teachers, one sharp,
        one flat, until they are equally uncertain."""
        relative = np.array([0.9, 0.3])
        target = relative / relative.sum()

        @jax.jit
        def balance(weights):
            step = lambda w, _: (losses.normalized_loss_balance(w, relative, [1.0, 1.0]), w)
            return jax.lax.scan(step, weights, length=100)[1]

        weights = balance(jnp.array([0.1, 0.9]))
        decay = 0.975 ** np.arange(100)[:, None]
        np.testing.assert_allclose(weights, target + decay * ([0.1, 0.9] - target), rtol=1e-4)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)

        logits = np.random.default_rng(0).normal(size=(8, 5)).astype("f")
        teachers = np.stack([logits, 4 * logits])  # robust and flat, accurate and sharp

        def entropies(temperatures):
            log_q = jax.nn.log_softmax(teachers / temperatures[:, None, None])
            return -jnp.mean(jnp.sum(jnp.exp(log_q) * log_q, -1), -1)

        @jax.jit
        def level(temperatures):
            def step(tau, _):
                h = entropies(tau)
                return jnp.stack(losses.entropy_balance(*tau, *h, rate=0.05)), (tau, h)

            return jax.lax.scan(step, temperatures, length=150)[1]

        temperatures, uncertain = level(jnp.ones(2))
        gaps = np.abs(uncertain[:, 0] - uncertain[:, 1])
        assert gaps[0] > 0.5
        assert np.all(gaps[-10:] < 0.05)
        assert np.all((temperatures >= 1) & (temperatures <= 10))
        np.testing.assert_allclose(temperatures[-1], [1, 4], atol=0.1)

    def test_equal_teachers_that_fall_alike_are_a_fixed_point(self):
        s, _, t, _ = random_logits()
        (_, states, metrics), _ = run(s, s, t, t)
        np.testing.assert_allclose(states.weights[0], 0.5, rtol=1e-5)
        np.testing.assert_allclose(metrics.entropies[0, 0], metrics.entropies[0, 1], rtol=1e-5)
        assert losses.entropy_balance(2.0, 3.0, 0.7, 0.7, rate=0.5) == (2.0, 3.0)


class TestTransformations:
    def test_a_batch_over_eight_devices(self):
        logits = [z[0] for z in random_logits(1, 16)]
        state = losses.mtard_init()._replace(
            initial_losses=jnp.array([0.5, 3.0]), step=jnp.int32(3)
        )

        def mean(s_nat, s_adv, t_nat, t_adv, axis_name=None):
            values, following, _ = LOSS(s_nat, s_adv, t_nat, t_adv, state, axis_name=axis_name)
            total = values.mean() if axis_name is None else jax.lax.pmean(values.mean(), axis_name)
            return total, following

        sharded = jax.shard_map(
            partial(mean, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=(PartitionSpec("data"),) * 4,
            out_specs=PartitionSpec(),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*logits)
            for f in (sharded, mean)
        )
        for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7)


class TestEdges:
    def test_excluded_classes_and_examples_count_for_nothing(self):
        logits = random_logits()
        where = np.ones((6, 5), bool)
        where[:, 3:], where[4:] = False, False
        poisoned = [np.where(where, z, np.nan) for z in logits]
        (values, states, _), gradients = run(*poisoned, where)
        literal = Literal()
        for i in range(4):
            expected, _ = literal.step(*(z[i, :4, :3] for z in logits), 0.3, 0.2)
            np.testing.assert_allclose(values[i, :4], expected, rtol=1e-5)
        np.testing.assert_array_equal(values[:, 4:], 0)
        np.testing.assert_allclose(states.weights[-1], literal.weights, rtol=1e-5)
        np.testing.assert_allclose(states.temperatures[-1], literal.temperatures, rtol=1e-5)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient[:, ~where], 0)
        (values, states, _), _ = run(*logits, np.zeros((6, 5), bool))
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_array_equal(states.step, 0)
        np.testing.assert_array_equal(states.weights, 0.5)

    def test_extreme_and_equal_logits_stay_finite(self):
        far = 1e4 * np.sign(random_logits())
        for logits in (far, [np.zeros((4, 6, 5), "f")] * 4):
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run(*logits)))

    def test_types_and_bad_input(self):
        z = np.zeros((6, 5), "f")
        state = losses.mtard_init(temperature=2.0, weights=(0.25, 0.75))
        half = jnp.asarray(z, jnp.bfloat16)
        values, following, _ = jax.eval_shape(LOSS, half, half, half, half, state)
        assert values.dtype == jnp.bfloat16
        shapes = [(x.shape, x.dtype) for x in following]
        assert shapes == [(x.shape, x.dtype) for x in state]
        with pytest.raises(ValueError, match="student_adversarial must have shape"):
            LOSS(z, z[:2], z, z, state)
        with pytest.raises(TypeError, match="clean_teacher_natural must have a floating-point"):
            LOSS(z, z, z.astype(int), z, state)
        with pytest.raises(ValueError, match="temperature_bounds must be in"):
            LOSS(z, z, z, z, state, temperature_bounds=(0.0, 10.0))
        with pytest.raises(ValueError, match=r"bounds must be \(least, largest\)"):
            losses.entropy_balance(1.0, 1.0, 1.0, 1.0, bounds=(3.0, 2.0))
        with pytest.raises(ValueError, match="weight_rate must be in"):
            LOSS(z, z, z, z, state, weight_rate=2.0)
        with pytest.raises(ValueError, match="weights must have the sum 1"):
            losses.mtard_init(weights=(0.5, 0.6))
        with pytest.raises(ValueError, match="losses must have shape"):
            losses.normalized_loss_balance([0.5, 0.5], [1.0], [1.0, 1.0])
