import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.optimizers import gradient_noise_weights


def test_mean_one_the_variance_given_and_independent():
    draw = lambda key: gradient_noise_weights(key, 4, 9.0)
    z = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 50_000)))
    np.testing.assert_allclose(z.mean(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(np.cov(z.T), 9 * np.eye(4), atol=0.3)
    assert z.dtype == np.float32


def test_weighted_losses_give_the_weighted_gradients():
    rng = np.random.default_rng(0)
    x, y, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 3), (6,), (3,)))
    losses = lambda w: jnp.square(x @ w - y)
    z = gradient_noise_weights(jax.random.key(1), 6, 2.0)
    ours = jax.jit(jax.grad(lambda w: jnp.mean(z * losses(w))))(w)
    each = 2 * (x @ w - y)[:, None] * x
    np.testing.assert_allclose(ours, np.mean(np.asarray(z)[:, None] * each, axis=0), rtol=1e-5)


def test_a_large_batch_gets_the_covariance_of_a_small_one():
    """Gradients of mean zero, batches of 64 against 4: σ² = 64/4 - 1."""
    root = jnp.array([[1.0, 0.0], [0.5, 0.2]])

    def gradient(size, variance):
        def one(key):
            examples, noise = jax.random.split(key)
            g = jax.random.normal(examples, (size, 2)) @ root.T
            return jnp.mean(gradient_noise_weights(noise, size, variance)[:, None] * g, axis=0)

        return np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(size), 20_000)))

    expected = np.asarray(root @ root.T) / 4
    np.testing.assert_allclose(np.cov(gradient(4, 0.0).T), expected, atol=0.01)
    np.testing.assert_allclose(np.cov(gradient(64, 15.0).T), expected, atol=0.01)


def test_without_variance_all_are_one_and_a_traced_one_is_no_error():
    np.testing.assert_array_equal(gradient_noise_weights(jax.random.key(0), 5, 0), np.ones(5))
    draw = jax.jit(lambda v: gradient_noise_weights(jax.random.key(0), 5, v))
    np.testing.assert_allclose(
        draw(2.0), gradient_noise_weights(jax.random.key(0), 5, 2.0), rtol=1e-6
    )


def test_the_same_when_sharded_with_the_batch():
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    draw = lambda: gradient_noise_weights(jax.random.key(0), 16, 3.0)
    np.testing.assert_allclose(jax.jit(draw, out_shardings=rows)(), draw(), rtol=1e-6)


def test_bad_input_is_named():
    for variance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="variance must be in"):
            gradient_noise_weights(jax.random.key(0), 4, variance)
    with pytest.raises(ValueError, match="batch_size must be in"):
        gradient_noise_weights(jax.random.key(0), 0, 1.0)
