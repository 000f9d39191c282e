"""Modules of jaxref.nn inside of flax.linen, by `flax.nnx.bridge.to_linen`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.nnx import bridge

from jaxref import nn, norms

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
STATELESS = {
    "linear": lambda **kw: bridge.to_linen(nn.Linear, 8, 3, axes=("embed", "mlp"), **kw),
    "mlp": lambda **kw: bridge.to_linen(nn.MLP, 8, 12, gated=True, **kw),
    "attention": lambda **kw: bridge.to_linen(nn.MultiHeadAttention, 8, 2, rotary_base=1e4, **kw),
    "layer norm": lambda **kw: bridge.to_linen(nn.Norm, norms.layer_norm, 8, skip_rng=True, **kw),
}
BUILT = {
    "linear": lambda: nn.Linear(8, 3, axes=("embed", "mlp"), rngs=nnx.Rngs(0)),
    "mlp": lambda: nn.MLP(8, 12, gated=True, rngs=nnx.Rngs(0)),
    "attention": lambda: nn.MultiHeadAttention(8, 2, rotary_base=1e4, rngs=nnx.Rngs(0)),
    "layer norm": lambda: nn.Norm(norms.layer_norm, 8),
}


@pytest.mark.parametrize("name", STATELESS)
def test_the_same_function_of_the_same_parameters(name):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return 2 * STATELESS[name](name="inner")(x)

    variables = Net().init(jax.random.key(0), X)
    module = BUILT[name]()
    ours = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    theirs = linen.meta.unbox(variables["params"]["inner"])
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, ours)
    nnx.update(module, theirs)
    np.testing.assert_allclose(Net().apply(variables, X), 2 * module(X), rtol=1e-5, atol=1e-6)


def test_statistics_are_a_collection():
    norm = bridge.to_linen(nn.Norm, norms.batch_norm, 8, skip_rng=True)
    variables = norm.init(jax.random.key(0), X)
    assert set(variables) == {"params", "batch_stats"}
    _, after = norm.apply(variables, X, mutable=["batch_stats"])
    moved = linen.meta.unbox(after["batch_stats"])
    expected = nn.Norm(norms.batch_norm, 8)
    expected(X)
    ours, theirs = moved["state"], nnx.to_pure_dict(nnx.state(expected, nnx.BatchStat))["state"]
    for name in ("mean", "var"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)
