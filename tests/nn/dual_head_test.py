import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import DualHeadClassifier


def features(batch=6, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, 4)).astype("f")


@jax.jit(static_argnums=0)
def call(graph, state, x):
    model = nnx.merge(graph, state)
    outputs = model(x)
    return outputs, nnx.state(model)


def build(**keywords):
    return DualHeadClassifier(4, 3, rngs=nnx.Rngs(0), **keywords)


def linear64(layer, x):
    return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])


def test_linear_heads_are_two():
    heads, x = build(), features()
    (main, auxiliary), _ = call(*nnx.split(heads), x)
    np.testing.assert_allclose(main, linear64(heads.main, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(auxiliary, linear64(heads.auxiliary, x), rtol=1e-5, atol=1e-6)
    assert not np.allclose(main, auxiliary)


def test_nonlinear_head_is_the_releases():
    """Dense, dropout, batch norm, relu and dense: in training by the batch's moments."""
    heads, x = build(auxiliary="nonlinear", hidden=5, dropout=0.0), features()
    first, _, norm, _, last = heads.auxiliary.layers
    norm.scale[...], norm.bias[...] = np.float32([1, 2, 3, 1, 1]), np.float32([0, 1, 0, -1, 2])
    h = linear64(first, x)
    moments = h.mean(0), h.var(0)

    def expected(mean, var):
        normed = (h - mean) / np.sqrt(var + 1e-5) * norm.scale[...] + norm.bias[...]
        return linear64(last, np.maximum(normed, 0))

    (_, training), state = call(*nnx.split(heads), x)
    np.testing.assert_allclose(training, expected(*moments), rtol=1e-4, atol=1e-5)
    nnx.update(heads, state)
    heads.eval()
    (_, evaluated), _ = call(*nnx.split(heads), x)
    running = 0.1 * moments[0], 0.9 + 0.1 * moments[1]
    np.testing.assert_allclose(evaluated, expected(*running), rtol=1e-4, atol=1e-5)


def test_dropout_rests_in_evaluation():
    heads = build(auxiliary="nonlinear", hidden=50, dropout=0.5)
    graph, state = nnx.split(heads)
    (main, first), state = call(graph, state, features())
    (same, second), state = call(graph, state, features())
    np.testing.assert_array_equal(main, same)
    assert not np.allclose(first, second)
    heads.eval()
    graph, state = nnx.split(heads)
    _, first = call(graph, state, features())[0]
    _, second = call(graph, state, features())[0]
    np.testing.assert_array_equal(first, second)


def test_parameters_types_and_bad_input():
    heads = build(auxiliary="nonlinear", param_dtype=jnp.bfloat16)
    first, last = heads.auxiliary.layers[0], heads.auxiliary.layers[-1]
    assert first.kernel.shape == (4, 200)
    assert first.kernel.get_metadata()["axes"] == ("embed", "mlp")
    assert last.kernel.get_metadata()["axes"] == ("mlp", None)
    params = jax.tree.leaves(nnx.state(heads, nnx.Param))
    assert {leaf.dtype for leaf in params} == {jnp.bfloat16.dtype}
    with pytest.raises(ValueError, match="auxiliary must be 'linear' or 'nonlinear'"):
        build(auxiliary="deep")
    with pytest.raises(ValueError, match="dropout must be in"):
        build(auxiliary="nonlinear", dropout=1.0)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 4\]"):
        build()(jnp.ones((2, 5)))
