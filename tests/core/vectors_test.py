import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.core.vectors import safe_sqrt, squared_distances, unit_vectors


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_unit_vectors_of_any_length(scale):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("f")
    np.testing.assert_allclose(
        unit_vectors(jnp.asarray(scale * x)),
        x / np.linalg.norm(x, axis=-1, keepdims=True),
        rtol=1e-6,
    )


def test_gradient_of_unit_vectors_is_across_them_and_0_at_0():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    jacobian = jax.vmap(jax.jacrev(unit_vectors))(x)
    np.testing.assert_allclose(jacobian[0], np.array([[16, -12], [-12, 9]]) / 125, rtol=1e-5)
    np.testing.assert_array_equal(jacobian[1], 0)


def test_squared_distances_are_those_of_differences_and_never_negative():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 5, 3)).astype("f"), rng.normal(size=(2, 4, 3)).astype("f")
    y[:, 0] = x[:, 0]
    expected = np.square(np.float64(x)[:, :, None] - y[:, None]).sum(axis=-1)
    found = squared_distances(x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.all(found >= 0)


def test_slope_of_the_root_at_0_is_0():
    root = jax.vmap(jax.value_and_grad(safe_sqrt))(jnp.array([0.0, 4.0]))
    np.testing.assert_array_equal(root, [[0, 2], [0, 0.25]])
