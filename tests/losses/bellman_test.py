from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxref import losses

KINDS = ("squared", "huber", "absolute")
ERRORS = {
    "squared": partial(losses.mean_huber_bellman_error, threshold=1e6),
    "huber": losses.mean_huber_bellman_error,
    "absolute": losses.mean_absolute_bellman_error,
}


def random_transitions(n=6, seed=0):
    """v(s), v(s'), r, γ, u(s) and ρ, with the end of an episode."""
    rng = np.random.default_rng(seed)
    v, v_next, r, u = (2 * rng.normal(size=(4, n))).astype("f")
    gamma = np.where(np.arange(n) == 1, 0.0, 0.9).astype("f")
    return v, v_next, r, gamma, u, rng.uniform(0, 2, n).astype("f")


@partial(jax.jit, static_argnames=("kind", "correction"))
def values_and_gradients(v, v_next, r, gamma, u, rho, where, kind, correction):
    """Both losses, and the gradient of the sum of all with respect to v(s), v(s') and u."""

    def loss(v, v_next, u):
        return losses.saddlepoint_bellman_loss(
            v,
            v_next,
            r,
            gamma,
            u,
            kind=kind,
            threshold=0.7,
            correction=correction,
            importance_ratios=rho,
            where=where,
        )

    found, vjp = jax.vjp(loss, v, v_next, u)
    return found, vjp(tuple(jnp.ones_like(x) for x in found))


class TestNumbers:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("correction", [False, True])
    def test_surrogates_match_the_update_rules(self, kind, correction):
        arguments = random_transitions()
        v, v_next, r, gamma, u, rho = map(np.float64, arguments)
        where = np.arange(6) != 4
        poisoned = [np.where(where, x, np.nan).astype("f") for x in arguments]
        bound = {"squared": lambda a: a, "huber": lambda a: np.clip(a, -0.7, 0.7)}.get(
            kind, np.sign
        )
        delta, h = r + gamma * v_next - v, bound(u)
        found, gradients = values_and_gradients(*poisoned, where, kind, correction)
        if correction:
            expected = rho * gamma * h * v_next - rho * bound(delta) * v
            slopes = -rho * bound(delta), rho * gamma * h, u - rho * delta
        else:
            expected = rho * h * delta
            slopes = -rho * h, rho * gamma * h, u - rho * delta
        np.testing.assert_allclose(found[0], np.where(where, expected, 0), rtol=1e-4, atol=1e-6)
        auxiliary = (rho * delta - u) ** 2 / 2
        np.testing.assert_allclose(found[1], np.where(where, auxiliary, 0), rtol=1e-4)
        for ours, theirs in zip(gradients, slopes):
            np.testing.assert_allclose(ours, np.where(where, theirs, 0), rtol=1e-4, atol=1e-6)

    def test_errors_of_states_match_optax(self):
        errors, _, _, _, _, weights = random_transitions(16)
        huber = 2 * optax.losses.huber_loss(np.float32(errors), delta=0.7)
        found = losses.mean_huber_bellman_error(errors, weights, threshold=0.7)
        np.testing.assert_allclose(found, np.sum(weights * huber), rtol=1e-5)
        found = losses.mean_absolute_bellman_error(errors, weights)
        np.testing.assert_allclose(found, np.sum(weights * np.abs(errors)), rtol=1e-5)

    def test_control_reads_the_action_and_the_best_next_one(self):
        rng = np.random.default_rng(0)
        q, next_q, u = (2 * rng.normal(size=(3, 4, 3))).astype("f")
        rewards, actions = rng.normal(size=4).astype("f"), np.array([0, 2, 1, 3])
        params = {"w": rng.normal(size=(2, 3)).astype("f"), "b": np.ones(3, "f")}
        where = np.arange(4) != 2

        @jax.jit
        def run(q, next_q, u, params):
            def total(*trained):
                value, auxiliary = losses.qrc_huber_loss(
                    trained[0],
                    actions,
                    rewards,
                    0.9,
                    trained[1],
                    trained[2],
                    threshold=0.5,
                    regularization=0.3,
                    auxiliary_params=trained[3],
                    where=where,
                )
                known = actions < 3
                total = jnp.sum(value, where=known) + jnp.sum(auxiliary, where=known)
                return total, (value, auxiliary)

            return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(
                q, next_q, u, params
            )

        (_, (value, auxiliary)), gradients = run(q, next_q, u, params)
        rows, taken = np.arange(3), actions[:3]
        best = next_q[:3].argmax(-1)
        delta = rewards[:3] + 0.9 * next_q[rows, best] - q[rows, taken]
        h = np.clip(u[rows, taken], -0.5, 0.5)
        squares = sum(np.sum(w**2) for w in params.values())
        np.testing.assert_allclose(value[:3], where[:3] * h * delta, rtol=1e-4)
        expected = (delta - u[rows, taken]) ** 2 / 2 + 0.15 * squares
        np.testing.assert_allclose(auxiliary[:3], where[:3] * expected, rtol=1e-4)
        assert np.isnan(value[3])
        assert np.isnan(auxiliary[3])
        slope = np.zeros((3, 3))
        slope[rows, taken] = -h * where[:3]
        np.testing.assert_allclose(gradients[0][:3], slope, rtol=1e-4, atol=1e-6)
        slope = np.zeros((3, 3))
        slope[rows, best] = 0.9 * h * where[:3]
        np.testing.assert_allclose(gradients[1][:3], slope, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradients[3]["w"], 2 * 0.3 * params["w"], rtol=1e-4)


class TestClaims:
    @pytest.mark.claim("robust-bellman-losses")
    def test_robust_errors_of_expectations_have_the_mean_and_clipped_samples_have_not(self):
        """One state, reward 0 nine times of ten and 10 once: descent on both networks at once, from
        single samples, with the best h learned; and the semi-gradient rule that clips samples."""
        rewards = jnp.array([0.0] * 9 + [10.0])

        def descend(kind, correction):
            def total(v, u):
                value, auxiliary = losses.saddlepoint_bellman_loss(
                    jnp.full(10, v),
                    jnp.zeros(10),
                    rewards,
                    0.0,
                    jnp.full(10, u),
                    kind=kind,
                    correction=correction,
                )
                return value.mean() + auxiliary.mean()

            def step(weights, i):
                v, u = weights
                slopes = jax.grad(total, argnums=(0, 1))(v, u)
                return (v - 0.2 * 0.97**i * slopes[0], u - 0.5 * slopes[1]), None

            start = jnp.array(0.0), jnp.array(0.0)
            (v, _), _ = jax.lax.scan(step, start, jnp.arange(200.0))
            return v

        cases = [(kind, correction) for kind in KINDS for correction in (False, True)]
        found = dict(zip(cases, jax.jit(lambda: [descend(*case) for case in cases])()))
        for kind in KINDS:
            np.testing.assert_allclose(found[kind, False], 1, atol=0.1)
        np.testing.assert_allclose(found["squared", True], 1, atol=0.02)
        np.testing.assert_allclose(found["huber", True], 1 / 9, atol=0.02)

    def test_the_surrogates_gradient_is_that_of_the_error_and_best_h_makes_it(self):
        """Exact expectations in a small Markov chain: p(a) = max over h, and the gradients."""
        rng = np.random.default_rng(0)
        transition = rng.dirichlet(np.ones(4), size=4)
        rewards, v, d = rng.normal(size=4), 2 * rng.normal(size=4), rng.dirichlet(np.ones(4))

        def expected_errors(v):
            return rewards + 0.9 * transition @ v - v

        a = expected_errors(v)
        s, s_next = np.repeat(np.arange(4), 4), np.tile(np.arange(4), 4)
        weights = np.float32(d[:, None] * transition).ravel()
        grid = np.linspace(-8, 8, 16001)
        cases = {
            "squared": (8, 2 * a[:, None] * grid - grid**2),
            "huber": (1, 2 * a[:, None] * grid - grid**2),
            "absolute": (1, a[:, None] * grid),
        }

        def surrogate(v, kind):
            u = np.float32(a)[s]
            value, _ = losses.saddlepoint_bellman_loss(
                v[s], v[s_next], rewards[s], 0.9, u, kind=kind
            )
            return weights @ value

        @jax.jit
        def run(v):
            error = lambda v, kind: ERRORS[kind](expected_errors(v), d)
            return {
                kind: (*jax.value_and_grad(error)(v, kind), jax.grad(surrogate)(v, kind))
                for kind in KINDS
            }

        for kind, (error, slope, ours) in run(np.float32(v)).items():
            limit, terms = cases[kind]
            best = np.where(np.abs(grid) <= limit, terms, -np.inf).max(-1)
            np.testing.assert_allclose(error, d @ best, rtol=1e-4)
            half = 1.0 if kind == "absolute" else 0.5
            np.testing.assert_allclose(ours, half * slope, rtol=1e-4, atol=1e-6)

    def test_bairds_counterexample(self):
        """Seven states, eight weights, a policy to follow that the one that acts hardly takes:
        temporal difference learning diverges, the saddlepoint does not. Expected updates."""
        features = np.zeros((7, 8), "f")
        features[np.arange(6), np.arange(6)], features[:6, 7] = 2, 1
        features[6, 6], features[6, 7] = 1, 2

        def mean_loss(w, head, kind):
            v = features @ w
            value, auxiliary = losses.saddlepoint_bellman_loss(
                v,
                jnp.full(7, v[6]),
                0.0,
                0.99,
                features @ head,
                kind=kind,
            )
            return value.mean() + auxiliary.mean()

        def semi_gradient(w):
            v = features @ w
            return -features.T @ (0.99 * v[6] - v) / 7

        def step(weights, _):
            td, *pairs = weights
            following = [td - 0.1 * semi_gradient(td)]
            for (w, head), kind in zip(pairs, ("squared", "huber")):
                slopes = jax.grad(mean_loss, argnums=(0, 1))(w, head, kind)
                following.append((w - 0.1 * slopes[0], head - 0.2 * slopes[1]))
            return following, None

        start = jnp.ones(8).at[6].set(10.0)
        weights = [start, (start, jnp.zeros(8)), (start, jnp.zeros(8))]
        td, *pairs = jax.jit(lambda w: jax.lax.scan(step, w, length=1000)[0])(weights)
        error = lambda w: np.sqrt(np.mean((0.99 * (features @ w)[6] - features @ w) ** 2))
        assert error(td) > 10 * error(start)
        for w, _ in pairs:
            assert error(w) < 0.1 * error(start)


class TestTransformations:
    def test_states_over_eight_devices(self):
        errors, _, _, _, _, weights = random_transitions(16)

        def both(errors, weights, axis_name=None):
            huber = losses.mean_huber_bellman_error(errors, weights, axis_name=axis_name)
            return huber + losses.mean_absolute_bellman_error(errors, weights, axis_name=axis_name)

        sharded = jax.shard_map(
            partial(both, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=(PartitionSpec("data"), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )
        found, expected = (jax.jit(jax.value_and_grad(f))(errors, weights) for f in (sharded, both))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)

    def test_half_precision_scalars_and_vmap(self):
        arguments = random_transitions()
        v, v_next, r, gamma, u, _ = arguments
        half = jax.ShapeDtypeStruct((6,), jnp.bfloat16)
        loss = losses.saddlepoint_bellman_loss
        value, auxiliary = jax.eval_shape(loss, half, half, r, gamma, u)
        assert value.dtype == jnp.bfloat16
        assert auxiliary.dtype == jnp.float32
        mapped = jax.jit(jax.vmap(lambda *x: loss(*x[:2], 1.0, 0.9, x[2])))(v, v_next, u)
        np.testing.assert_allclose(mapped[0], u * (1 + 0.9 * v_next - v), rtol=1e-4, atol=1e-6)


def test_bad_input_is_named():
    v, v_next, r, gamma, u, rho = random_transitions()
    loss = losses.saddlepoint_bellman_loss
    with pytest.raises(ValueError, match="kind must be one of"):
        loss(v, v_next, r, gamma, u, kind="quantile")
    with pytest.raises(ValueError, match="threshold must be in"):
        loss(v, v_next, r, gamma, u, kind="huber", threshold=0.0)
    with pytest.raises(ValueError, match="auxiliary must have shape"):
        loss(v, v_next, r, gamma, u[:3])
    with pytest.raises(ValueError, match="discounts must broadcast"):
        loss(v, v_next, r, gamma[:3], u)
    with pytest.raises(ValueError, match="importance_ratios must be in"):
        loss(v, v_next, r, gamma, u, importance_ratios=-rho)
    with pytest.raises(TypeError, match="values must have a floating-point type"):
        loss(v.astype(int), v_next, r, gamma, u)
    q = np.zeros((6, 2), "f")
    with pytest.raises(TypeError, match="actions must be integers"):
        losses.qrc_huber_loss(q, r, r, gamma, q, q)
    with pytest.raises(ValueError, match="next_q_values must have shape"):
        losses.qrc_huber_loss(q, np.zeros(6, int), r, gamma, q[:3], q)
    with pytest.raises(ValueError, match="regularization must be in"):
        losses.qrc_huber_loss(q, np.zeros(6, int), r, gamma, q, q, regularization=-1.0)
    for error in (losses.mean_huber_bellman_error, losses.mean_absolute_bellman_error):
        with pytest.raises(ValueError, match="state_weights must be in"):
            error(v, -rho)
        with pytest.raises(ValueError, match="state_weights must broadcast"):
            error(v, rho[:3])
    with pytest.raises(ValueError, match="threshold must be in"):
        losses.mean_huber_bellman_error(v, rho, threshold=-1.0)
