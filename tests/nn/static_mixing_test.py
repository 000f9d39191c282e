import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.attention import causal_pair_reduction
from jaxref.nn import MLP, CausalActivation


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestCausalActivation:
    def test_is_the_function_and_has_no_parameters(self):
        x, where = random((2, 5, 3)), np.array([True, False, True, True, False])[:, None]
        activation = CausalActivation("max", "causal")
        expected = causal_pair_reduction(x, reduction="max", context="causal", where=where)
        np.testing.assert_array_equal(activation(x, where=where), expected)
        np.testing.assert_array_equal(CausalActivation()(x), causal_pair_reduction(x))
        assert not jax.tree.leaves(nnx.state(activation))

    def test_mlp_then_reads_the_token_before(self):
        mlp = MLP(3, 8, activation=CausalActivation(), rngs=nnx.Rngs(0))
        x = random((1, 4, 3))
        y, changed = (
            nnx.jit(lambda mlp, x: mlp(x))(mlp, tokens)
            for tokens in (x, jnp.asarray(x).at[:, 1].add(1))
        )
        differs = np.any(np.asarray(y != changed), axis=-1)[0]
        np.testing.assert_array_equal(differs, [False, True, True, False])
        gradients = nnx.grad(lambda mlp: jnp.sum(mlp(x) ** 2))(mlp)
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match="reduction must be"):
            CausalActivation("sum")
        with pytest.raises(ValueError, match="context must be"):
            CausalActivation(context="local")
