from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "contrastive_temperature.npz")
OPTIONS = {"rho": 0.3, "gamma": 0.7, "beta": 0.6, "temperature_lr": 0.05,
           "temperature_min": 0.1, "temperature_max": 0.9}  # fmt: skip


def bimodal(image, text, indices, state, **options):
    return losses.isogclr_bimodal_loss(image, text, indices, indices, state, **options)


@partial(jax.jit, static_argnums=(0, 1))
def step(loss, factor, views, indices, state):
    """The mean of the losses times a factor, the next state, and the gradient of both views."""

    def total(views):
        values, following = loss(*views, indices, state, **OPTIONS)
        return factor * jnp.mean(values), following

    (value, following), gradient = jax.value_and_grad(total, has_aux=True)(views)
    return value, gradient, following


def embeddings(number=16, features=5, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(number, features))
    return first.astype("f"), (first + rng.normal(size=first.shape)).astype("f")


class TestPeers:
    def test_first_visit_is_that_of_libauc(self):
        start = losses.isogclr_init(8, temperature=0.4)
        value, gradient, state = step(
            losses.isogclr_loss, 2, PEER["views"][0], PEER["indices"][0], start
        )
        np.testing.assert_allclose(value, PEER["visit"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["visit_grad"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.temperature, PEER["visit_tau"], rtol=1e-5)

    def test_later_visit_is_that_of_the_authors_class_of_differences(self):
        start = losses.isogclr_init(8, temperature=0.4)._replace(log_mean=jnp.log(PEER["s"]))
        value, gradient, state = step(
            losses.isogclr_loss, 2, PEER["views"][0], PEER["indices"][0], start
        )
        np.testing.assert_allclose(value, PEER["unimodal"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["unimodal_grad"], rtol=1e-4, atol=1e-6)
        found = jnp.exp(state.log_mean), *state[1:]
        np.testing.assert_allclose(found, PEER["unimodal_state"], rtol=1e-5, atol=1e-6)

    def test_two_towers_are_those_of_libauc(self):
        """Whose value is the sum over negatives, where ours is the mean."""
        state = (losses.isogclr_init(8, temperature=0.4),) * 2
        for t in range(2):
            value, gradient, state = step(bimodal, 5, PEER["views"][t], PEER["indices"][t], state)
            np.testing.assert_allclose(value, PEER[f"bimodal{t}"], rtol=1e-5)
            np.testing.assert_allclose(gradient, PEER[f"bimodal{t}_grad"], rtol=1e-4, atol=1e-6)
            visited = PEER["indices"][t]
            for found, expected in zip(state, PEER[f"bimodal{t}_state"]):
                np.testing.assert_allclose(
                    np.stack(found)[:, visited], expected[:, visited], rtol=1e-4, atol=1e-6
                )


def even_divergence(h, tau):
    p = scipy.special.softmax(h / tau)
    return np.sum(scipy.special.xlogy(p, p * len(p)))


class TestObjective:
    def test_gradients_are_the_weights_and_the_divergence(self):
        h = np.random.default_rng(0).uniform(-2, 1, size=(3, 7))
        tau = np.array([0.1, 0.4, 2.0])

        def total(h, tau):
            values = losses.robust_global_contrastive_loss(h, tau, rho=0.4)
            return jnp.sum(values), values

        slope = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, values), gradients = slope(h.astype("f"), tau.astype("f"))
        expected = [
            t * (scipy.special.logsumexp(row / t) - np.log(7) + 0.4) for row, t in zip(h, tau)
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        weights = scipy.special.softmax(h / tau[:, None], axis=1)
        np.testing.assert_allclose(gradients[0], weights, rtol=1e-4, atol=1e-7)
        divergences = [even_divergence(row, t) for row, t in zip(h, tau)]
        np.testing.assert_allclose(gradients[1], 0.4 - np.array(divergences), rtol=1e-4)

    def test_constrained_temperature_has_the_divergence_and_the_least_objective(self):
        h = np.random.default_rng(0).uniform(-2, 1, size=(4, 30)).astype("f")
        factors = jnp.array([[1.0], [0.8], [1.25]])

        @jax.jit
        def run(rho):
            tau = losses.kl_constrained_temperature(h, rho=rho, temperature_min=0.02)
            objective = jax.vmap(
                lambda factor: losses.robust_global_contrastive_loss(h, factor * tau, rho=rho)
            )
            return tau, objective(factors)

        for rho in (0.01, 0.4, 2.0):
            tau, (least, lower, higher) = run(rho)
            found = [even_divergence(np.float64(row), t) for row, t in zip(h, np.float64(tau))]
            np.testing.assert_allclose(found, rho, rtol=3e-4)
            assert np.all(np.minimum(lower, higher) > least)
        np.testing.assert_allclose(run(np.log(30))[0], 0.02)

    def test_masks_extremes_and_nothing_to_compare(self):
        h = np.random.default_rng(0).uniform(-2, 1, size=(4, 6)).astype("f")
        where = np.arange(6) < np.array([[4], [6], [0], [2]])
        h[3] = [1e4, -1e4, 0, 0, 0, 0]
        poisoned = np.where(where, h, np.nan)

        @jax.jit
        def run(h):
            def objective(h):
                return losses.robust_global_contrastive_loss(h, 0.3, rho=0.4, where=where)

            values, pull = jax.vjp(objective, h)
            tau = losses.kl_constrained_temperature(h, rho=0.4, where=where)
            return values, pull(jnp.ones(4))[0], tau

        values, gradient, tau = run(poisoned)
        expected = [
            0.3 * (scipy.special.logsumexp(row[:n] / 0.3) - np.log(n) + 0.4)
            for row, n in zip(np.float64(h), (4, 6, 1, 2))
        ]
        expected[2] = 0
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        np.testing.assert_array_equal(gradient[~where], 0)
        assert np.all(np.isfinite(gradient))
        for row, t, n in zip(h, tau, (4, 6)):
            np.testing.assert_allclose(even_divergence(np.float64(row[:n]), t), 0.4, rtol=1e-3)
        assert tau[2] == np.float32(0.05)
        np.testing.assert_allclose(even_divergence(np.array([1e4, -1e4]), tau[3]), 0.4, rtol=1e-3)
        _, _, same = run(np.full((4, 6), -1e4, "f"))
        np.testing.assert_allclose(same, 0.05, rtol=1e-6)


class TestClaims:
    @pytest.mark.claim("isogclr")
    def test_temperatures_descend_to_the_given_divergence_and_tell_frequent_from_rare(self):
        """With all examples in the batch and nothing else learned."""
        rng = np.random.default_rng(0)
        frequent = np.eye(12)[0] + 0.05 * rng.normal(size=(10, 12))
        x = np.concatenate([frequent, rng.normal(size=(22, 12))]).astype("f")

        def run(rho):
            options = {"rho": rho, "gamma": 1.0, "beta": 1.0, "temperature_lr": 0.02}

            def one(state, _):
                values, state = losses.isogclr_loss(x, x, jnp.arange(32), state, **options)
                return state, values.mean()

            return jax.lax.scan(one, losses.isogclr_init(32, temperature=0.1), length=200)[0]

        state = jax.jit(run)(0.6)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        h = (unit @ unit.T)[~np.eye(32, dtype=bool)].reshape(32, 31) - 1
        expected = losses.kl_constrained_temperature(h, rho=0.6)
        np.testing.assert_allclose(state.temperature, expected, rtol=1e-3)
        assert state.temperature[:10].min() > 1.2 * state.temperature[10:].max()
        log_mean = [
            scipy.special.logsumexp(row / t) - np.log(31) for row, t in zip(h, state.temperature)
        ]
        np.testing.assert_allclose(state.log_mean, log_mean, rtol=1e-3)


class TestShards:
    @pytest.mark.parametrize(
        ("towers", "ring"), [(1, False), (2, True)], ids=["views gathered", "towers on a ring"]
    )
    def test_eight_devices_have_the_value_gradient_and_state_of_one(self, towers, ring):
        """Each holds the state of four examples, two of which are in its part of the batch."""
        rng = np.random.default_rng(1)
        indices = np.concatenate([4 * k + rng.permutation(4)[:2] for k in range(8)])
        start = losses.IndividualTemperatureState(
            np.where(np.arange(32) % 3, rng.normal(size=32), -np.inf).astype("f"),
            rng.uniform(0.2, 0.8, size=32).astype("f"),
            rng.normal(size=32).astype("f"),
        )
        loss, start = (losses.isogclr_loss, start) if towers == 1 else (bimodal, (start, start))
        rows = PartitionSpec("data")
        sharded = jax.shard_map(
            lambda views, indices, state: tuple(
                part if k else part.reshape(2, -1)
                for k, part in enumerate(
                    loss(*views, indices, state, axis_name="data", ring=ring, **OPTIONS)
                )
            ),
            mesh=jax.make_mesh((8,), ("data",), (AxisType.Auto,)),
            in_specs=((rows, rows), rows, rows),
            out_specs=(PartitionSpec(None, "data"), rows),
        )

        def plain(views, indices, state):
            values, state = loss(*views, indices, state, **OPTIONS)
            return values.reshape(2, -1), state

        def total(views, function):
            values, state = function(views, indices, start)
            weights = 1 + jnp.arange(32.0).reshape(2, 16)
            return jnp.mean(weights * values), (values, state)

        found, expected = (
            jax.jit(jax.value_and_grad(partial(total, function=f), has_aux=True))(embeddings())
            for f in (sharded, plain)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


class TestEdges:
    start = losses.isogclr_init(9)

    @pytest.mark.parametrize("loss", [losses.isogclr_loss, bimodal], ids=["views", "towers"])
    def test_zero_vectors_one_example_and_half_precision(self, loss):
        is_bimodal = loss is bimodal
        start = (self.start, self.start) if is_bimodal else self.start

        @jax.jit
        def run(a, b):
            values, pull, state = jax.vjp(
                lambda a, b: loss(a, b, np.arange(4), start), a, b, has_aux=True
            )
            return values, pull(jnp.ones_like(values)), state

        a, b = embeddings(4)
        a[1] = 0
        b[2] *= 1e18
        values, gradients, state = run(a, b)
        for x in (values, *gradients):
            assert np.all(np.isfinite(x))
        np.testing.assert_array_equal(gradients[0][1], 0)
        visited = state[0] if is_bimodal else state
        np.testing.assert_array_equal(np.isfinite(visited.log_mean), np.arange(9) < 4)
        assert np.all(np.isfinite(visited.temperature))
        one, same = jax.jit(loss)(a[:1], b[:1], np.array([3]), start)
        np.testing.assert_array_equal(one, 0)
        chex.assert_trees_all_equal(same, start)
        half = [jnp.asarray(x, jnp.bfloat16) for x in embeddings(4)]
        found, _, _ = run(*half)
        assert found.dtype == jnp.bfloat16
        wide, _, _ = run(*(x.astype("f") for x in half))
        np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))

    def test_low_temperatures_do_not_overflow(self):
        a, b = (jnp.array([[1.0, 0.0], [x, 1.0], [-1.0, 0.0]]) for x in (-1.0, 0.0))
        state = losses.IndividualTemperatureState(
            jnp.full(3, -500.0), jnp.full(3, 1e-3), jnp.zeros(3)
        )
        values, state = jax.jit(losses.isogclr_loss)(a, -b, jnp.arange(3), state)
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(jnp.stack(state)))

    def test_ids_outside_of_the_set_give_nan_and_leave_the_state(self):
        loss = jax.jit(losses.isogclr_loss)
        values, state = loss(*embeddings(4), np.array([3, 9, -1, 0]), self.start)
        np.testing.assert_array_equal(np.isnan(values), np.tile([False, True, True, False], 2))
        np.testing.assert_array_equal(np.isfinite(state.log_mean), np.isin(np.arange(9), [3, 0]))

    def test_bad_input(self):
        a, b = embeddings(4)
        call = partial(losses.isogclr_loss, a, b, np.arange(4), self.start)
        for name, value in (
            ("rho", -0.1),
            ("gamma", 0.0),
            ("beta", 1.5),
            ("temperature_lr", -1.0),
            ("temperature_min", 0.0),
            ("temperature_max", 0.01),
            ("gradient_clip", 0.0),
        ):
            with pytest.raises(ValueError, match=f"{name} must be in"):
                call(**{name: value})
        with pytest.raises(ValueError, match=r"view_b must have shape \(4, 5\), got \(3, 5\)"):
            losses.isogclr_loss(a, b[:3], np.arange(4), self.start)
        with pytest.raises(ValueError, match=r"indices must have shape \(4,\), got \(3,\)"):
            losses.isogclr_loss(a, b, np.arange(3), self.start)
        with pytest.raises(TypeError, match="image_indices must be integers, got float32"):
            losses.isogclr_bimodal_loss(a, b, np.ones(4, "f"), np.arange(4), (self.start,) * 2)
        with pytest.raises(ValueError, match=r"state's momentum must have shape \(9,\)"):
            losses.isogclr_loss(a, b, np.arange(4), self.start._replace(momentum=jnp.zeros(8)))
        with pytest.raises(ValueError, match="num_examples must be in"):
            losses.isogclr_init(0)
        with pytest.raises(ValueError, match="temperature must be in"):
            losses.isogclr_init(3, temperature=0.0)
        with pytest.raises(ValueError, match="rho must be in"):
            losses.kl_constrained_temperature(a, rho=0.0)
        with pytest.raises(ValueError, match="temperature must broadcast to shape"):
            losses.robust_global_contrastive_loss(a, np.ones(3, "f"), rho=0.1)
        with pytest.raises(ValueError, match="differences must have shape"):
            losses.kl_constrained_temperature(jnp.float32(1), rho=0.1)
