from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.norms import fold_unified_norm, power_norm_v, unified_norm, unified_norm_init

AUTHORS = np.load(Path(__file__).parents[1] / "oracles" / "running_norms.npz")
OPTIONS = {
    "unified": {"warmup_steps": 5},
    "unified_by_itself": {"warmup_steps": 5},
    "unified_filtered": {"warmup_steps": 5, "outlier_filtration": True},
    "unified_masked": {"warmup_steps": 1, "where": AUTHORS["mask"][..., None]},
    "unified_late": {"warmup_steps": 5},
}


def random(shape, seed=0, mean=1.0):
    return np.random.default_rng(seed).normal(mean, 2, size=shape).astype(np.float32)


def start(case, features=3):
    """The state with which the authors' code began."""
    windows = {"unified": (3, 4), "unified_by_itself": (1, 2), "unified_filtered": (4, 2)}
    windows |= {"unified_masked": (2, 2), "unified_late": (2, 3)}
    state = unified_norm_init(features, windows[case])
    if case == "unified_late":
        state = state._replace(step=jnp.int32(2000), x2_buffer=jnp.ones((2, features)))
    return state


def train(state, xs, cotangents, scale=None, bias=None, **options):
    """Steps of the norm: the last state, and of each the value, the gradients and the state."""

    def step(state, batch):
        x, cotangent = batch
        norm = lambda x, scale, bias, fields: unified_norm(
            x, state._replace(**fields), scale, bias, training=True, **options
        )
        fields = {name: getattr(state, name) for name in state.backward_fields}
        y, vjp, following = jax.vjp(norm, x, scale, bias, fields, has_aux=True)
        dx, dscale, _, fields = vjp(cotangent)
        following = following._replace(**fields)
        return following, (y, dx, dscale, following)

    return jax.lax.scan(step, state, (xs, cotangents))


class NumbersTest(chex.TestCase):
    @parameterized.parameters(*OPTIONS)
    def test_steps_match_the_authors_code(self, case):
        x, scale, bias = AUTHORS["x"], AUTHORS["scale"], AUTHORS["bias"]
        state, (y, dx, dscale, states) = train(
            start(case), x, AUTHORS["cotangent"], scale, bias, **OPTIONS[case]
        )
        stored = lambda name: AUTHORS[f"{case}_{name}"]
        close = partial(np.testing.assert_allclose, rtol=5e-5, atol=2e-5)
        where = OPTIONS[case].get("where", True)
        close(y, np.where(where, stored("y"), 0))
        close(states.running_var, stored("running_var"))
        close(states.x2_buffer.reshape(stored("buffer_x2").shape), stored("buffer_x2"))
        np.testing.assert_array_equal(states.skipped, stored("skip_counter"))
        if case != "unified_masked":  # the means of their gradients are not masked
            close(dx, stored("dx"))
            close(dscale, stored("dscale"))
            close(states.gz_ema, stored("ema_gz"))
            close(states.gz_buffer, stored("buffer_gz"))
        evaluated, unchanged = unified_norm(x[-1], state, scale, bias, training=False)
        close(evaluated, stored("evaluated"))
        chex.assert_trees_all_equal(unchanged, state)
        if case == "unified_filtered":
            assert 0 < state.skipped < 10

    @chex.variants(with_jit=True, without_jit=True)
    def test_one_step_with_and_without_jit(self):
        case, options = "unified_filtered", {**OPTIONS["unified_filtered"], "warmup_steps": 0}
        x, cotangent = AUTHORS["x"][:1], AUTHORS["cotangent"][:1]
        run = self.variant(partial(train, **options))
        found = run(start(case), x, cotangent, AUTHORS["scale"], AUTHORS["bias"])
        np.testing.assert_allclose(found[1][0], AUTHORS[f"{case}_y"][:1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[1][1], AUTHORS[f"{case}_dx"][:1], rtol=1e-4, atol=1e-5)


class TestClaims:
    @pytest.mark.claim("unified-normalization")
    def test_one_wild_batch_is_left_out_of_the_window_and_given_its_exact_gradient(self):
        xs, cotangents = random((8, 6, 3), mean=0.0), random((8, 6, 3), 1)
        xs[5] *= 100
        run = partial(train, unified_norm_init(3), xs, cotangents, warmup_steps=0)
        _, (y, dx, _, states) = run(outlier_filtration=True)
        np.testing.assert_array_equal(states.skipped, [0, 0, 0, 0, 0, 1, 1, 1])
        np.testing.assert_array_equal(states.x2_buffer[5, 6 % 4], states.running_var[4])
        np.testing.assert_array_equal(states.gz_buffer[5, 6 % 4], states.gz_ema[4])
        exact, vjp = jax.vjp(power_norm_v, xs[5])
        np.testing.assert_allclose(y[5], exact, rtol=1e-4)
        np.testing.assert_allclose(dx[5], vjp(cotangents[5])[0], rtol=1e-3, atol=1e-5)
        _, (unguarded, _, _, _) = run(outlier_filtration=False)
        shrunk = np.abs(unguarded[6]).mean() / np.abs(y[6]).mean()
        assert (
            0.2 < shrunk < 0.4
        )  # one of four means is 10⁴ times as large: σ is √10 times as large
        calm = np.abs(y[6]).mean() / np.abs(y[4]).mean()
        assert 0.5 < calm < 2

    def test_outliers_exceed_the_bound_of_the_means(self):
        """AM - GM ≤ M Var(√v), with equality for M = 2 and the population variance times 2."""
        v = np.exp(random((1000, 4)))
        excess = v.mean(1) - np.exp(np.log(v).mean(1))
        assert np.all(excess <= 4 * np.sqrt(v).var(1) * (1 + 1e-5))
        pair = v[:, :2].astype(np.float64)
        excess = pair.mean(1) - np.sqrt(pair.prod(1))
        np.testing.assert_allclose(excess, 2 * np.sqrt(pair).var(1), rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize(("excess", "skipped"), [(0.75, 0), (1.2, 1)])
    def test_the_bound_by_hand(self, excess, skipped):
        """Of the window (4, 1): 2 Var(2, 1) = 1, with the unbiased variance; of (q, 1):
        AM - GM = (√q - 1)² / 2."""
        state = unified_norm_init(1, (2, 2))._replace(
            step=jnp.int32(99), x2_buffer=jnp.array([[4.0], [1.0]])
        )
        x = np.full((3, 1), 1 + np.sqrt(2 * excess), np.float32)
        _, state = unified_norm(x, state, training=True, warmup_steps=100, outlier_filtration=True)
        assert state.skipped == skipped
        stored = 1 if skipped else x[0, 0] ** 2  # running_var, or q
        np.testing.assert_allclose(state.x2_buffer[:, 0], [stored, 1], rtol=1e-6)

    def test_windows_of_one_step_give_the_exact_gradient(self):
        x, cotangent, scale, bias = random((6, 3)), random((6, 3), 1), random(3, 2), random(3, 3)
        state = unified_norm_init(3, (1, 1))._replace(step=jnp.int32(5000))
        _, (y, dx, dscale, _) = train(state, x[None], cotangent[None], scale, bias)
        exact, vjp = jax.vjp(power_norm_v, x, scale, bias)
        np.testing.assert_allclose(y[0], exact, rtol=1e-5, atol=1e-5)
        for ours, expected in zip((dx, dscale), vjp(cotangent)):
            np.testing.assert_allclose(ours[0], expected, rtol=1e-4, atol=1e-5)

    def test_the_gradient_converges_to_the_exact_one(self):
        x, cotangent = random((6, 3)), random((6, 3), 1)
        xs, cotangents = (np.broadcast_to(a, (150, *a.shape)) for a in (x, cotangent))
        state, (_, dx, _, _) = train(unified_norm_init(3), xs, cotangents, warmup_steps=0)
        exact, vjp = jax.vjp(power_norm_v, x)
        (expected,) = vjp(cotangent)
        np.testing.assert_allclose(state.gz_ema, (cotangent * exact).mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dx[-1], expected, rtol=1e-3, atol=1e-5)
        assert np.abs(dx[0] - expected).max() > 0.1


class TestFold:
    @pytest.mark.parametrize("outputs", [(5,), (2, 3)])
    def test_equals_the_norm_and_the_layer(self, outputs):
        state = unified_norm_init(4)._replace(running_var=random(4) ** 2)
        x, scale, bias = random((6, 4), 1), random(4, 2), random(4, 3)
        kernel, kernel_bias = random((4, *outputs), 4), random(outputs, 5)
        y, _ = unified_norm(x, state, scale, bias, training=False, epsilon=0.1)
        layer = lambda x, kernel, bias: np.tensordot(x, kernel, 1) + bias
        folded = fold_unified_norm(state, scale, bias, kernel, kernel_bias, epsilon=0.1)
        expected = layer(y, kernel, kernel_bias)
        np.testing.assert_allclose(layer(x, *folded), expected, rtol=1e-4, atol=1e-4)
        plain, _ = unified_norm(x, state, training=False)
        folded = fold_unified_norm(state, None, None, kernel)
        np.testing.assert_allclose(layer(x, *folded), layer(plain, kernel, 0), rtol=1e-4, atol=1e-4)

    def test_types_are_kept_and_bad_input_is_named(self):
        state, kernel = unified_norm_init(4), jnp.ones((4, 2), jnp.bfloat16)
        folded = fold_unified_norm(state, jnp.ones(4), jnp.ones(4), kernel)
        assert [a.dtype for a in folded] == [jnp.bfloat16] * 2
        for change, message in (
            ({"kernel": np.ones((3, 2), "f")}, r"kernel must have shape \(4, 2\)"),
            ({"scale": np.ones(3, "f")}, r"scale must have shape \(4,\)"),
            ({"bias": np.ones(3, "f")}, r"bias must have shape \(4,\)"),
            ({"kernel_bias": np.ones(3, "f")}, r"kernel_bias must have shape \(2,\)"),
            ({"epsilon": -1.0}, "epsilon"),
        ):
            given = {"scale": None, "bias": None, "kernel": kernel} | change
            with pytest.raises(ValueError, match=message):
                fold_unified_norm(state, **given)
        with pytest.raises(TypeError, match="kernel must have a floating-point"):
            fold_unified_norm(state, None, None, np.ones((4, 2), int))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": unified_norm_init(3)}, ValueError, r"state.running_var must have shape \(4,\)"),
        ({"scale": np.ones(3, "f")}, ValueError, r"scale must have shape \(4,\)"),
        ({"bias": np.ones(4, int)}, TypeError, "bias must have a floating-point"),
        ({"x": np.ones((2, 4), int)}, TypeError, "x must have a floating-point"),
        ({"momentum": 1.1}, ValueError, "momentum"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
        ({"where": np.ones((3, 1), bool)}, ValueError, "where must broadcast"),
        ({"where": np.ones((2, 1))}, ValueError, "boolean"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": random((2, 4)), "state": unified_norm_init(4), "training": True} | change
    with pytest.raises(error, match=message):
        unified_norm(**arguments)


def test_bad_window_is_named():
    with pytest.raises(ValueError, match="window must be in"):
        unified_norm_init(4, (0, 2))
