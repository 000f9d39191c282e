import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref.kernels import linear_softmax_entropy


def states(seed=0, tokens=(3, 5), features=4, vocabulary=12):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(features, vocabulary))
    return rng.normal(size=(*tokens, features)).astype("f"), kernel.astype("f")


@pytest.mark.parametrize("blocks", ["tokens", "vocabulary"])
def test_is_the_entropy_of_the_softmax(blocks):
    hidden, kernel = states()
    where = np.arange(15).reshape(3, 5) % 4 > 0
    found = jax.jit(lambda h, w: linear_softmax_entropy(h, w, where=where, blocks=blocks))(
        hidden, kernel
    )
    logits = np.float64(hidden) @ kernel
    expected = scipy.stats.entropy(np.exp(logits), axis=-1)
    np.testing.assert_allclose(found, np.where(where, expected, 0), atol=1e-5)
    assert not np.any(jax.grad(lambda h: linear_softmax_entropy(h, kernel).sum())(hidden))


def test_sure_even_and_half_precision():
    kernel = np.eye(4, dtype="f")
    found = linear_softmax_entropy(np.array([[1e4, 0, 0, 0], [3, 3, 3, 3]], "f"), kernel)
    np.testing.assert_allclose(found, [0, np.log(4)], atol=1e-5)
    hidden, kernel = (jnp.asarray(x, jnp.bfloat16) for x in states())
    half = linear_softmax_entropy(hidden, kernel)
    assert half.dtype == jnp.bfloat16
    full = linear_softmax_entropy(hidden.astype("f"), kernel.astype("f"))
    np.testing.assert_allclose(half.astype("f"), full, rtol=1e-2, atol=1e-2)


def test_a_vocabulary_over_devices():
    hidden, kernel = states(vocabulary=16)
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        lambda h, w: linear_softmax_entropy(h, w, axis_name="tensor"),
        mesh=mesh,
        in_specs=(P(), P(None, "tensor")),
        out_specs=P(),
    )
    np.testing.assert_allclose(
        jax.jit(spread)(hidden, kernel), linear_softmax_entropy(hidden, kernel), atol=1e-5
    )


def test_the_logits_never_exist():
    tokens, vocabulary = 1024, 32768
    hidden = jax.ShapeDtypeStruct((tokens, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((16, vocabulary), jnp.float32)
    compiled = jax.jit(linear_softmax_entropy).lower(hidden, kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4 / 2


def test_bad_input():
    hidden, kernel = states()
    with pytest.raises(TypeError, match="hidden must have a floating-point type"):
        linear_softmax_entropy(np.zeros((2, 4), int), kernel)
    with pytest.raises(ValueError, match="kernel must have shape"):
        linear_softmax_entropy(hidden, kernel.T)
