import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.attention import key_value_cache_append, key_value_cache_init


def test_sequences_at_different_lengths():
    rng = np.random.default_rng(0)
    cache = key_value_cache_init(3, 6, 2, 4, value_dim=5)
    key, value = rng.normal(size=(3, 2, 2, 4)), rng.normal(size=(3, 2, 2, 5))
    cache = jax.jit(key_value_cache_append)(cache, key, value, jnp.array([0, 3, 1]))
    for row, start in enumerate((0, 3, 1)):
        expected = np.zeros((6, 2, 4))
        expected[start : start + 2] = key[row]
        np.testing.assert_allclose(cache.key[row], expected, rtol=1e-6)
        np.testing.assert_allclose(cache.value[row, start : start + 2], value[row], rtol=1e-6)


def test_what_lies_beyond_the_end_is_dropped():
    cache = key_value_cache_init(1, 3, 1, 1)
    ones = jnp.ones((1, 2, 1, 1))
    cache = key_value_cache_append(cache, ones, ones, jnp.array([2]))
    np.testing.assert_array_equal(cache.key[0, :, 0, 0], [0, 0, 1])


def test_types():
    cache = key_value_cache_init(1, 3, 1, 2, dtype=jnp.bfloat16)
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
    new = jnp.ones((1, 1, 1, 2))
    assert key_value_cache_append(cache, new, new, jnp.array([0])).key.dtype == jnp.bfloat16


def test_bad_input():
    with pytest.raises(ValueError, match="max_length must be in"):
        key_value_cache_init(1, 0, 1, 1)
    cache, new = key_value_cache_init(2, 3, 1, 2), jnp.ones((2, 1, 1, 2))
    with pytest.raises(ValueError, match=r"key must have shape \(2, 1, 1, 2\)"):
        key_value_cache_append(cache, new[..., :1], new, jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"value must have shape"):
        key_value_cache_append(cache, new, new[:, :, :, :1], jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"start must have shape \(2,\)"):
        key_value_cache_append(cache, new, new, jnp.zeros(1, int))
