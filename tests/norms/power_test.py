from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.norms import (
    apply_gradient_state,
    group_scaling,
    power_norm,
    power_norm_init,
    power_norm_v,
)

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "running_norms.npz")


def random(shape, seed=0, mean=1.0):
    return np.random.default_rng(seed).normal(mean, 2, size=shape).astype(np.float32)


def train(state, xs, cotangents, scale=None, bias=None, **options):
    """Steps of the norm: the last state, and of each the value, the gradients and the state."""

    def step(state, batch):
        x, cotangent = batch
        norm = lambda x, scale, bias, nu: power_norm(
            x, state._replace(nu=nu), scale, bias, training=True, **options
        )
        y, vjp, following = jax.vjp(norm, x, scale, bias, state.nu, has_aux=True)
        dx, dscale, _, nu = vjp(cotangent)
        following = following._replace(nu=nu)
        return following, (y, dx, dscale, following)

    return jax.lax.scan(step, state, (xs, cotangents))


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(("power", None), ("power_grouped", 3))
    def test_steps_match_the_authors_code(self, case, groups):
        """Their backward pass divides by the batch's ψ after warm-up too, the paper's by the
        running one, and they keep ν / (1 - α)."""
        x, scale, bias = AUTHORS["x"], AUTHORS["scale"], AUTHORS["bias"]
        options = {"warmup_steps": 5, "groups": groups}
        state, (y, dx, dscale, states) = self.variant(partial(train, **options))(
            power_norm_init(3), x, AUTHORS["cotangent"], scale, bias
        )
        close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
        close(y, AUTHORS[f"{case}_y"])
        close(dscale, AUTHORS[f"{case}_dscale"])
        close(states.psi_squared, AUTHORS[f"{case}_running_phi"])
        close(states.nu, 0.1 * AUTHORS[f"{case}_ema_gz"])
        assert state.step == 10
        if groups is None:
            own = np.sqrt((x**2).mean((1, 2)) + 1e-5)
            running = np.sqrt(states.psi_squared[:-1] + 1e-5)  # from before the step
            factor = np.concatenate([np.ones((5, 3)), own[5:] / running[4:]])
            close(dx, AUTHORS[f"{case}_dx"] * factor[:, None, None])
        evaluated, _ = power_norm(x[-1], state, scale, bias, training=False, groups=groups)
        close(evaluated, AUTHORS[f"{case}_evaluated"])

    def test_masked_steps_match_the_authors_code(self):
        x, scale, bias = AUTHORS["x"], AUTHORS["scale"], AUTHORS["bias"]
        where = AUTHORS["mask"][..., None]
        _, (y, _, _, states) = train(
            power_norm_init(3), x, np.ones_like(x), scale, bias, warmup_steps=5, where=where
        )
        expected = np.where(where, AUTHORS["power_masked_y"], 0)
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-5)
        expected = AUTHORS["power_masked_running_phi"]
        np.testing.assert_allclose(states.psi_squared, expected, rtol=2e-5)

    def test_the_gradients_of_the_batch_variant_are_those_of_its_formula(self):
        x, cotangent, scale, bias = (random(s, i) for i, s in enumerate([(4, 3, 5)] * 2 + [5] * 2))
        y, vjp = jax.vjp(partial(power_norm_v, epsilon=0.1), x, scale, bias)
        wide = x.astype(np.float64)
        psi = np.sqrt((wide**2).mean((0, 1)) + 0.1)
        np.testing.assert_allclose(y, scale * wide / psi + bias, rtol=1e-5, atol=1e-5)
        x_hat, g = wide / psi, scale * cotangent
        dx = (g - (g * x_hat).mean((0, 1)) * x_hat) / psi
        expected = (dx, (cotangent * x_hat).sum((0, 1)), cotangent.sum((0, 1)))
        chex.assert_trees_all_close(vjp(cotangent), expected, rtol=1e-4, atol=1e-5)

    def test_group_scaling_by_hand(self):
        x = random((2, 3, 6))
        split = x.reshape(2, 3, 2, 3).astype(np.float64)
        expected = split / np.sqrt((split**2).mean(-1, keepdims=True) + 0.1)
        ours = group_scaling(x, 2, epsilon=0.1)
        np.testing.assert_allclose(ours, expected.reshape(x.shape), rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("power-norm")
    def test_statistics_converge_to_those_of_the_batch_and_the_gradient_to_the_exact_one(self):
        x, cotangent, scale = random((2, 5, 4)), random((2, 5, 4), 1, mean=0.0), random(4, 2)
        xs, cotangents = (np.broadcast_to(a, (300, *a.shape)) for a in (x, cotangent))
        run = jax.jit(partial(train, warmup_steps=0))
        state, (y, dx, dscale, _) = run(power_norm_init(4), xs, cotangents, scale)
        exact, vjp = jax.vjp(power_norm_v, x, scale)
        exact_dx, exact_dscale = vjp(cotangent)
        lambda_ = (scale * cotangent * power_norm_v(x)).mean((0, 1))
        np.testing.assert_allclose(state.psi_squared, (x**2).mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(state.nu, lambda_, rtol=1e-4, atol=1e-5)
        for ours, expected in ((y, exact), (dx, exact_dx), (dscale, exact_dscale)):
            scale_of = np.linalg.norm(expected)
            assert np.linalg.norm(ours[0] - expected) > 0.1 * scale_of
            assert np.linalg.norm(ours[-1] - expected) < 1e-4 * scale_of

    def test_its_normaliser_fluctuates_less_than_that_of_batch_norm(self):
        size = np.exp(np.random.default_rng(0).normal(0, 1, size=(200, 1, 1)))
        xs = (size * random((200, 8, 3), 1)).astype(np.float32)
        _, (_, _, _, states) = train(power_norm_init(3), xs, xs, warmup_steps=20)
        assert np.all(2 * np.var(states.psi_squared[50:], 0) < np.var(np.var(xs[50:], 1), 0))

    def test_what_it_ignores_and_that_evaluation_is_linear(self):
        x = random((6, 4))
        np.testing.assert_allclose(
            power_norm_v(7 * x, epsilon=0.0), power_norm_v(x, epsilon=0.0), rtol=1e-5
        )
        assert np.abs(power_norm_v(x + 5) - power_norm_v(x)).max() > 0.1
        state = power_norm_init(4)._replace(psi_squared=random(4, 1) ** 2)
        evaluate = lambda x: power_norm(x, state, random(4, 2), training=False)[0]
        np.testing.assert_allclose(
            evaluate(2 * x + x[::-1]), 2 * evaluate(x) + evaluate(x)[::-1], rtol=1e-4, atol=1e-5
        )


class TestState:
    def test_warm_up_uses_the_batch_and_its_plain_mean(self):
        xs = random((4, 5, 3))
        _, (y, _, _, states) = train(
            power_norm_init(3), xs, xs, warmup_steps=4, alpha_forward=1.0, epsilon=0.0
        )
        squares = (xs**2).mean(1)
        for step in range(4):
            expected = power_norm_v(xs[step], epsilon=0.0)
            np.testing.assert_allclose(y[step], expected, rtol=1e-5)
        np.testing.assert_allclose(states.psi_squared[2], squares[:3].mean(0), rtol=1e-5)
        np.testing.assert_allclose(states.psi_squared[3], states.psi_squared[2])

    def test_applied_to_the_result_of_the_forward_pass(self):
        x, state = random((4, 3)), power_norm_init(3)
        slope = jax.grad(
            lambda state: (lambda y, s: (jnp.sum(x * y**2), s))(
                *power_norm(x, state, training=True)
            ),
            has_aux=True,
            allow_int=True,
        )
        gradient, forward = slope(state)
        assert np.all(gradient.psi_squared == 0)
        following = apply_gradient_state(forward, gradient)
        assert following.step == 1
        assert np.all(following.nu != 0)
        np.testing.assert_array_equal(following.psi_squared, forward.psi_squared)

    def test_bad_gradient_is_named(self):
        with pytest.raises(ValueError, match=r"gradient.nu must have shape \(3,\), got \(2,\)"):
            apply_gradient_state(power_norm_init(3), power_norm_init(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": power_norm_init(3)}, ValueError, r"state.psi_squared must have shape \(4,\)"),
        ({"scale": np.ones(3, "f")}, ValueError, r"scale must have shape \(4,\)"),
        ({"bias": np.ones(4, int)}, TypeError, "bias must have a floating-point"),
        ({"x": np.ones((2, 4), int)}, TypeError, "x must have a floating-point"),
        ({"x": np.ones(4, "f")}, ValueError, r"x must have shape \[batch"),
        ({"alpha_forward": 1.1}, ValueError, "alpha_forward"),
        ({"alpha_backward": -0.1}, ValueError, "alpha_backward"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
        ({"groups": 3}, ValueError, "groups"),
        ({"groups": 0}, ValueError, "groups"),
        ({"where": np.ones((3, 1), bool)}, ValueError, "where must broadcast"),
        ({"where": np.ones((2, 1))}, ValueError, "boolean"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": random((2, 4)), "state": power_norm_init(4), "training": True} | change
    with pytest.raises(error, match=message):
        power_norm(**arguments)


def test_no_features_and_no_channel_axis_are_named():
    with pytest.raises(ValueError, match="features must be in"):
        power_norm_init(0)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., C\]"):
        group_scaling(np.float32(1))
