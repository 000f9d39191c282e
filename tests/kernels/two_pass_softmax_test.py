"""What two passes have beyond the tests of every softmax (softmax_test.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxref.kernels import (
    extended_add,
    extended_exponential,
    rows_gpu,
    rows_tpu,
    three_pass_softmax,
    two_pass_logsumexp,
    two_pass_softmax,
)


def value(pair):
    """log(m 2^n) in float64."""
    m, n = (np.asarray(part, np.float64) for part in pair)
    return np.log(m) + n * np.log(2)


class TestExtendedExponential:
    def test_mantissa_and_exponent(self):
        x = jnp.linspace(-11000, 11000, 20001)
        m, n = extended_exponential(x)
        assert np.all((m > 0.7) & (m < 1.42))
        np.testing.assert_array_equal(n, np.round(n))
        # relative to exp(x): the exponent's share is exact in float64
        exact = np.exp(np.float64(x) - np.float64(n) * np.log(2))
        np.testing.assert_allclose(m, exact, rtol=5e-7)

    def test_double_precision(self):
        with jax.enable_x64(True):
            x = jnp.linspace(-3000, 3000, 1001)
            np.testing.assert_allclose(value(extended_exponential(x)), x, rtol=1e-15, atol=1e-13)

    def test_what_is_no_number(self):
        m, n = extended_exponential(jnp.array([-jnp.inf, jnp.inf, jnp.nan, 3e38, -3e38]))
        assert m[0] == 0
        assert n[0] < -1e36
        assert np.isnan(m[1])
        assert np.isnan(m[2])
        assert np.all(np.isfinite(m[3:]) & np.isfinite(n[3:]))

    def test_integers_are_refused(self):
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            extended_exponential(3)


class TestExtendedAdd:
    def test_any_order_and_grouping_is_the_sum(self):
        x = np.random.default_rng(0).normal(size=30).astype(np.float32) * 50
        pairs = [extended_exponential(value) for value in x]
        left = right = pairs[0]
        for pair in pairs[1:]:
            left, right = extended_add(left, pair), extended_add(pair, right)
        halves = pairs
        while len(halves) > 1:
            halves = [
                extended_add(*halves[i : i + 2]) if i + 1 < len(halves) else halves[i]
                for i in range(0, len(halves), 2)
            ]
        exact = scipy.special.logsumexp(np.float64(x))
        for total in (left, right, halves[0]):
            np.testing.assert_allclose(value(total), exact, rtol=1e-6)

    def test_nothing_is_neutral_and_far_apart_is_the_larger(self):
        nothing, one, huge = (extended_exponential(x) for x in (-jnp.inf, 0.0, 10000.0))
        assert extended_add(nothing, one) == one
        assert extended_add(one, huge) == huge
        assert extended_add(nothing, nothing)[0] == 0


@pytest.mark.claim("two-pass-softmax")
def test_without_a_maximum_exact_finite_and_whatever_the_tiles(monkeypatch):
    """Within 1e-6 of the softmax up to |x| = 1e3, finite and normalised at 1e4, no exponential of
    anything but a remainder within ln 2 / 2, and the same sums however the row is cut."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-1e3, 1e3, (4, 700)), jnp.float32)
    exact = scipy.special.softmax(np.float64(x), axis=-1)
    np.testing.assert_allclose(two_pass_softmax(x), exact, atol=1e-6)
    for offset in (1e4, -1e4):
        y = two_pass_softmax(x / 100 + offset)
        assert np.all(np.isfinite(y))
        np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-5)
    jaxpr = str(jax.make_jaxpr(two_pass_softmax)(x))
    assert " exp " not in jaxpr
    assert "floor" in jaxpr

    assert np.all(two_pass_softmax(jnp.zeros(100_000)) == np.float32(1e-5))

    wide = scipy.special.logsumexp(np.float64(x), axis=-1)
    np.testing.assert_allclose(two_pass_logsumexp(x), wide, rtol=1e-6)
    for columns in (128, 256, 1024):
        monkeypatch.setattr(rows_tpu, "default_block", lambda *_, c=columns: (8, c))
        monkeypatch.setattr(rows_gpu, "default_block", lambda *_, c=columns: (1, c))
        for platform in ("tpu", "gpu"):
            tiled = two_pass_softmax(x, implementation=f"pallas_{platform}_interpret")
            np.testing.assert_allclose(tiled, exact, atol=1e-6)


class TestLogsumexp:
    @pytest.mark.parametrize("axis", [0, -1])
    def test_values_and_gradients(self, axis):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 9)) * 100, jnp.float32)
        ours = jax.value_and_grad(lambda x: two_pass_logsumexp(x, axis).sum())(x)
        theirs = jax.value_and_grad(lambda x: jax.nn.logsumexp(x, axis).sum())(x)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)

    def test_rows_of_nothing(self):
        assert two_pass_logsumexp(jnp.full(3, -jnp.inf)) == -jnp.inf
        assert two_pass_logsumexp(jnp.zeros((2, 0))).tolist() == [-np.inf, -np.inf]


class TestThreePasses:
    @pytest.mark.parametrize("recompute", [True, False])
    def test_is_the_softmax(self, recompute):
        x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8)) * 10, jnp.bfloat16)
        f = lambda x: three_pass_softmax(x, axis=0, recompute=recompute)
        exact = scipy.special.softmax(np.float64(x), axis=0)
        np.testing.assert_allclose(np.float64(f(x)), exact, rtol=0.01)
        assert f(x).dtype == jnp.bfloat16
        ours, theirs = (
            jax.grad(lambda x: (g(x)[0] ** 2).sum()) for g in (f, lambda x: jax.nn.softmax(x, 0))
        )
        x = x.astype(jnp.float32)
        np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6)
