import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.core.reductions import masked_logsumexp, masked_mean


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, (0, 2)])
def test_mean_of_the_admitted_entries(axis, keepdims):
    rng = np.random.default_rng(0)
    x, where = rng.normal(size=(2, 3, 4)).astype("f"), rng.random((2, 3, 1)) < 0.6
    where[0, 0] = True
    where[:, 1] = [[False], [True]]
    where[:, 2] = False
    admitted = np.broadcast_to(where, x.shape)
    with np.errstate(invalid="ignore"):
        expected = np.sum(x, axis, keepdims=keepdims, where=admitted) / np.sum(
            admitted, axis, keepdims=keepdims
        )
    ours = masked_mean(np.where(admitted, x, np.nan), axis=axis, where=where, keepdims=keepdims)
    np.testing.assert_allclose(ours, np.nan_to_num(expected), rtol=1e-5)
    plain = masked_mean(x, axis=axis, keepdims=keepdims)
    np.testing.assert_allclose(plain, x.mean(axis, keepdims=keepdims), rtol=1e-5)


def test_no_admitted_entry_gives_zero_with_zero_gradient():
    value, gradient = jax.value_and_grad(masked_mean)(jnp.ones(3), where=np.zeros(3, bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_logsumexp_of_the_admitted_entries():
    rng = np.random.default_rng(0)
    x, where = rng.normal(size=(2, 3, 4)).astype("f"), rng.random((3, 1)) < 0.6
    where[:, 0] = [True, False, True]
    poisoned = np.where(where, x, np.nan)
    expected = np.log(np.exp(x[:, ::2].astype(float)).sum(1))
    ours, vjp = jax.vjp(lambda x: masked_logsumexp(x, axis=1, where=where), poisoned)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    gradient = vjp(jnp.ones((2, 4)))[0]
    np.testing.assert_allclose(gradient[:, ::2], np.exp(x[:, ::2] - expected[:, None]), rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, 1], 0)
    plain = masked_logsumexp(x.astype(jnp.bfloat16))
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, np.log(np.exp(x.astype(float)).sum(-1)), rtol=1e-2, atol=1e-2)
    nothing = masked_logsumexp(x, where=np.zeros((2, 3, 4), bool))
    np.testing.assert_array_equal(nothing, 0)


def test_logsumexp_over_shards_is_that_of_all_entries():
    """Some shards have no entry, one column has none at all, columns are far from each other."""
    rng = np.random.default_rng(0)
    x = rng.normal([0, 0, 3e4, -3e4], size=(8, 2, 4)).astype("f")
    where = rng.random(x.shape) < 0.5
    where[3], where[..., 1] = False, False

    def mapped(x, where):
        reduce = lambda x, where: masked_logsumexp(x, axis=0, where=where, axis_name="shards")
        return jax.vmap(reduce, axis_name="shards")(x, where)

    ours, vjp = jax.vjp(lambda x: mapped(x, where)[0], x)
    expected, of_all = jax.vjp(
        lambda x: masked_logsumexp(x, axis=0, where=where.reshape(16, 4)), x.reshape(16, 4)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(
        vjp(jnp.ones(4))[0].reshape(16, 4), of_all(jnp.ones(4))[0], rtol=1e-3, atol=1e-6
    )
