import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import SentenceEmbeddingHead


def test_is_a_linear_map_of_the_mean_over_tokens_that_exist():
    head = SentenceEmbeddingHead(3, 2, rngs=nnx.Rngs(0))
    head.projection.bias[...] = np.float32([0.5, -1])
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 4, 3)).astype("f")
    where = np.array([[True, True, False, False], [True] * 4, [False] * 4])
    poisoned = np.where(where[..., None], hidden, np.nan)
    graph, state = nnx.split(head)

    @jax.jit
    def run(state, hidden):
        def total(hidden):
            embedding = nnx.merge(graph, state)(hidden, where=where)
            return embedding.sum(), embedding

        return jax.value_and_grad(total, has_aux=True)(hidden)

    (_, found), gradient = run(state, poisoned)
    kernel, bias = (np.float64(x[...]) for x in (head.projection.kernel, head.projection.bias))
    for i, n in enumerate((2, 4)):
        expected = np.float64(hidden[i, :n]).mean(0) @ kernel + bias
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)
    np.testing.assert_allclose(found[2], bias)
    np.testing.assert_array_equal(gradient[~where], 0)
    np.testing.assert_allclose(head(hidden[1]), found[1], rtol=1e-5)


def test_types_and_bad_input():
    head = SentenceEmbeddingHead(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert head.projection.kernel.shape == (3, 768)
    assert head.projection.kernel.get_metadata()["axes"] == ("embed", None)
    assert jax.eval_shape(head, jax.ShapeDtypeStruct((2, 4, 3), "f")).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"hidden must have shape \[..., tokens, features\]"):
        head(jnp.ones(3))
    with pytest.raises(ValueError, match="where must broadcast"):
        head(jnp.ones((2, 4, 3)), where=np.ones(5, bool))
    with pytest.raises(ValueError, match=r"x must have shape \[..., 3\]"):
        head(jnp.ones((2, 4, 5)))
