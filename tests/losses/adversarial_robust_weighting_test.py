from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import optimize, special

from jaxref import losses

LOSSES = np.random.default_rng(0).normal(1, 2, size=24).astype("f")
robust = jax.jit(jax.value_and_grad(losses.kl_distributionally_robust_loss))
weights_of = jax.jit(losses.kl_robust_weights)
compositional = jax.jit(losses.compositional_weights)
START = losses.compositional_state_init()


class TestNumbers:
    @pytest.mark.parametrize("r", [0.5, 4.0])
    def test_weights_and_loss_match_scipy(self, r):
        value, slope = robust(LOSSES, r=r)
        wide = np.float64(LOSSES)
        expected = r * (special.logsumexp(wide / r) - np.log(24))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for found in (slope, weights_of(LOSSES, r=r)):
            np.testing.assert_allclose(found, special.softmax(wide / r), rtol=1e-4, atol=1e-7)

    def test_weights_solve_the_inner_problem(self):
        def negative(logits):
            w = special.softmax(logits)
            return -(w @ LOSSES[:4] - 2 * np.sum(w * np.log(4 * w)))

        best = optimize.minimize(negative, np.zeros(4), tol=1e-10)
        ours = losses.kl_robust_weights(LOSSES[:4], r=2.0)
        np.testing.assert_allclose(ours, special.softmax(best.x), atol=1e-4)
        value = losses.kl_distributionally_robust_loss(LOSSES[:4], r=2.0)
        np.testing.assert_allclose(value, -best.fun, rtol=1e-5)

    def test_running_mean_matches_the_formula(self):
        state, u = START, None
        for step in range(3):
            batch = np.roll(LOSSES, step) + step
            mean = np.exp(batch / 2.0).mean()
            u = mean if u is None else 0.7 * u + 0.3 * mean
            w, state = compositional(batch, state, r=2.0, eta=0.3)
            np.testing.assert_allclose(w, np.exp(batch / 2) / (24 * u), rtol=1e-4)
            np.testing.assert_allclose(state.log_mean, np.log(u), rtol=1e-5)
        assert state.step == 3
        w, _ = compositional(LOSSES, state, r=2.0, eta=1.0)
        np.testing.assert_allclose(w, weights_of(LOSSES, r=2.0), rtol=1e-5)

    @pytest.mark.parametrize("optimizer", ["gd", "adam"])
    def test_attack_matches_steps_by_hand(self, optimizer):
        rng = np.random.default_rng(0)
        a, x = rng.normal(size=(3, 2)), rng.random((4, 3)).astype("f")
        x[0] = [0.0, 1.0, 0.5]
        low, high = np.maximum(-0.3, -x), np.minimum(0.3, 1 - x)
        margin = 1e-3 * (high - low)
        delta = np.clip(np.zeros((4, 3)), low + margin, high - margin)
        m = v = np.zeros((4, 3))
        for t in range(1, 6):
            hidden = np.tanh((x + delta) @ a)
            slope = 0.02 * (1 / (high - delta) - 1 / (delta - low))
            slope -= 2 * (hidden * (1 - hidden**2)) @ a.T
            if optimizer == "adam":
                m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
                slope = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            delta = np.clip(delta - 0.02 * slope, low + margin, high - margin)
        attack = partial(
            losses.barrier_attack,
            lambda x: jnp.sum(jnp.tanh(x @ a) ** 2, axis=-1),
            epsilon=0.3,
            strength=0.02,
            step_size=0.02,
            num_steps=5,
            optimizer=optimizer,
        )
        np.testing.assert_allclose(jax.jit(attack)(x), x + delta, atol=1e-5)


class TestClaims:
    @pytest.mark.claim("done-doubly-robust-at")
    def test_gradients_through_attack_and_weights_are_those_of_the_whole_objective(self):
        """Against finite differences of the objective, whose attacks are solved again at every
        point; without the implicit term, or with the barrier's curvature alone, they are not."""

        def loss_fn(w, x, y):
            return jax.nn.softplus(-y * (x @ w + 0.3 * (x @ w) ** 2))

        solved = {"epsilon": 0.5, "strength": 0.1, "bounds": None}
        solved |= {"step_size": 0.05, "num_steps": 400, "optimizer": "gd"}
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            w, x = rng.normal(size=3), rng.normal(size=(5, 3))
            y = np.array([1.0, -1, 1, 1, -1])

            @jax.jit
            def objective(w):
                attacked = losses.barrier_attack(lambda x: loss_fn(w, x, y), x, **solved)
                return losses.kl_distributionally_robust_loss(loss_fn(w, attacked, y), r=0.7)

            def gradient(**how):
                grad_fn = losses.doubly_robust_value_and_grad(loss_fn, r=0.7, **solved, **how)
                (value, _), slope = jax.jit(grad_fn)(w, START, x, y)
                np.testing.assert_allclose(value, objective(w), rtol=1e-10)
                return slope

            steps = 1e-5 * np.eye(3)
            finite = [(objective(w + e) - objective(w - e)) / 2e-5 for e in steps]
            np.testing.assert_allclose(gradient(hessian_steps=4), finite, rtol=1e-5)
            error = lambda slope: np.linalg.norm(slope - np.array(finite))
            diagonal, constant = gradient(), gradient(implicit=False)
            assert 1e-3 < error(diagonal) < 0.5 * error(constant)

    def test_the_weakest_class_is_more_robust_than_with_equal_weights(self):
        """Three overlapping blobs, one of them rare; accuracy under a projected attack."""
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(3), (150, 150, 12))
        centres = np.array([[0.3, 0.3], [0.7, 0.3], [0.5, 0.5]])
        x = (centres[labels] + 0.06 * rng.normal(size=(312, 2))).clip(0, 1).astype("f")
        logits = lambda params, x: 10 * (x - 0.4) @ params["w"] + params["b"]

        def loss_fn(params, x):
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels)

        @jax.jit
        def train(r):
            grad_fn = losses.doubly_robust_value_and_grad(
                loss_fn, r=r, epsilon=0.05, step_size=0.01, num_steps=8
            )

            def step(carry, _):
                params, state = carry
                (_, state), slope = grad_fn(params, state, x)
                return (jax.tree.map(lambda p, g: p - 0.3 * g, params, slope), state), None

            params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
            (params, _), _ = jax.lax.scan(step, (params, START), length=200)
            attacked = losses.projected_gradient_attack(
                lambda x: loss_fn(params, x), x, key=jax.random.key(0), epsilon=0.05, step_size=0.01
            )
            right = jnp.argmax(logits(params, attacked), axis=-1) == labels
            return jnp.stack([right[labels == k].mean() for k in range(3)])

        ours, equal = train(0.5), train(1000.0)
        assert ours.min() > equal.min() + 0.2
        assert ours.mean() > equal.mean()


class TestSets:
    def test_eight_devices_see_the_whole_set(self):
        where = np.arange(24) % 5 > 0

        def loss(values, where, axis_name=None):
            options = {"r": 2.0, "where": where, "axis_name": axis_name}
            w, state = losses.compositional_weights(values, START, **options)
            equal = losses.kl_robust_weights(values, **options) - w  # 0 in the first step
            value = losses.kl_distributionally_robust_loss(values, **options)
            return value, (equal, state.log_mean)

        sharded = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 2,
            out_specs=(P(), (P("data"), P())),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(f, has_aux=True))(LOSSES, where) for f in (sharded, loss)
        )
        for mine, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found[0][1][0], 0, atol=1e-6)
        np.testing.assert_allclose(found[0][0], robust(LOSSES[where], r=2.0)[0], rtol=1e-5)


class TestEdges:
    def test_limits_and_extreme_losses(self):
        np.testing.assert_allclose(robust(LOSSES, r=1e5)[0], LOSSES.mean(), rtol=1e-4)
        np.testing.assert_allclose(robust(LOSSES, r=1e-3)[0], LOSSES.max(), rtol=2e-3)
        for size in (1e4, -1e4):
            large = np.where(np.arange(24) < 2, size, 0).astype("f")
            value, slope = robust(large, r=0.1)
            assert np.isfinite(value)
            np.testing.assert_allclose(slope.sum(), 1, rtol=1e-5)
            w, state = compositional(large, START, r=0.1)
            w, state = compositional(large[::-1], state, r=0.1)
            assert np.all(np.isfinite(w))
            assert np.isfinite(state.log_mean)

    def test_empty_sets(self):
        none = np.zeros(24, bool)
        value, slope = robust(LOSSES * np.nan, r=1.0, where=none)
        assert value == 0
        assert np.all(slope == 0)
        w, state = compositional(LOSSES, START, r=1.0, where=none)
        assert np.all(w == 0)
        assert state.step == 0
        assert losses.kl_distributionally_robust_loss(jnp.zeros(0), r=1.0) == 0
        half = losses.kl_robust_weights(jnp.asarray(LOSSES, jnp.bfloat16), r=1.0)
        assert half.dtype == jnp.bfloat16

    def test_barrier_at_and_beyond_the_edge(self):
        delta = jnp.array([0.5, 1.0, 2.0, 0.0])
        low, high = jnp.array([-1.0, -1, -1, 0]), jnp.array([1.0, 1, 1, 0])
        barrier = jax.jit(lambda d: losses.box_log_barrier(d, low, high, strength=0.2))
        value, vjp = jax.vjp(barrier, delta)
        np.testing.assert_allclose(value, [-0.2 * np.log(0.75), np.inf, np.inf, 0], rtol=1e-6)
        slope = vjp(jnp.ones(4))[0]
        np.testing.assert_allclose(slope, [0.2 * (2 - 1 / 1.5), 0, 0, 0], rtol=1e-5)

    def test_no_reach_is_clean_training(self):
        x = np.random.default_rng(0).random((4, 3)).astype("f")
        loss_fn = lambda w, x: jnp.sum(jnp.square(x - w), axis=-1)
        options = {"r": 2.0, "epsilon": 0.0, "num_steps": 2}
        grad_fn = losses.doubly_robust_value_and_grad(loss_fn, **options)
        (value, _), slope = jax.jit(grad_fn)(jnp.ones(3), START, x)
        clean = lambda w: losses.kl_distributionally_robust_loss(loss_fn(w, x), r=2.0)
        expected = jax.jit(jax.value_and_grad(clean))(jnp.ones(3))
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(slope, expected[1], rtol=1e-5)

    def test_bad_input_is_named(self):
        for function in (
            losses.kl_robust_weights,
            losses.kl_distributionally_robust_loss,
            partial(losses.compositional_weights, state=START),
        ):
            with pytest.raises(ValueError, match="r must be in"):
                function(LOSSES, r=0.0)
            with pytest.raises(ValueError, match="where must broadcast"):
                function(LOSSES, r=1.0, where=np.ones(3, bool))
            with pytest.raises(TypeError, match="losses must have a floating-point type"):
                function(np.arange(3), r=1.0)
        with pytest.raises(ValueError, match="eta must be in"):
            losses.compositional_weights(LOSSES, START, r=1.0, eta=0.0)
        with pytest.raises(ValueError, match="strength must be in"):
            losses.box_log_barrier(LOSSES, -1.0, 1.0, strength=0.0)
        with pytest.raises(ValueError, match="optimizer must be"):
            losses.barrier_attack(jnp.sum, LOSSES, optimizer="sgd")
        with pytest.raises(ValueError, match="epsilon must be in"):
            losses.barrier_attack(jnp.sum, LOSSES, epsilon=-1.0)
        grad_fn = losses.doubly_robust_value_and_grad(lambda w, x: jnp.sum(w * x), r=1.0)
        with pytest.raises(ValueError, match=r"losses of loss_fn must have shape \(24,\)"):
            grad_fn(1.0, START, LOSSES)
