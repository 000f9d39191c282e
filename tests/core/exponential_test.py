import jax
import jax.numpy as jnp
import numpy as np

from jaxref.core.exponential import linear_tail_exp, relative_expm1


def test_exp_below_the_limit_and_its_tangent_above():
    x = np.array([-1e4, -3.0, 0.0, 1.0, 60.0], np.float32)
    np.testing.assert_allclose(linear_tail_exp(x), np.exp(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(linear_tail_exp))(x), np.exp(x), rtol=1e-6)
    limit = 0.7 * np.log(np.finfo(np.float32).max)
    slopes = jax.vmap(jax.grad(linear_tail_exp))(jnp.array([limit + 1, 1e4]))
    np.testing.assert_allclose(slopes, np.exp(limit), rtol=1e-4)
    np.testing.assert_allclose(linear_tail_exp(limit + 9), 10 * np.exp(limit), rtol=1e-4)
    assert linear_tail_exp(jnp.bfloat16(1)).dtype == jnp.float32


def test_relative_expm1_and_its_gradient():
    x = np.array([-1e4, -1.0, -1e-3, -9e-5, 1e-9, 1.1e-4, 0.5, 0.999, 1.001, 50.0])
    expected = np.expm1(x) / x
    np.testing.assert_allclose(relative_expm1(x.astype("f")), expected, rtol=1e-6)
    with jax.enable_x64(True):
        slopes = jax.vmap(jax.grad(relative_expm1))(x)
    exact = np.where(abs(x) < 1e-3, 0.5 + x / 3, (x * np.exp(x) - np.expm1(x)) / x**2)
    np.testing.assert_allclose(slopes, exact, rtol=1e-6)
    assert relative_expm1(0.0) == 1
    assert np.isfinite(jax.grad(relative_expm1)(1e4))
