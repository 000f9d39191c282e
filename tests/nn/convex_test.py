import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref import losses, nn


def test_is_the_potential_of_its_parameters_and_trains():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    network = nn.InputConvexNetwork(3, hidden=6, depth=3, inputs=z, rngs=nnx.Rngs(0))
    params = network.parameters()
    np.testing.assert_array_equal(network(z), losses.convex_potential(params, z))
    np.testing.assert_array_equal(network.gradient(z), losses.convex_gradient_map(params, z))
    assert params.hidden_kernels.shape == (2, 6, 3)
    slopes = nnx.grad(lambda network: network.gradient(z).sum())(network)
    assert any(np.any(slope != 0) for slope in jax.tree.leaves(slopes))
    chord = (network(z[:1]) + network(z[1:2])) / 2
    assert network((z[:1] + z[1:2]) / 2) < chord
    with pytest.raises(ValueError, match="hidden must be even"):
        nn.InputConvexNetwork(3, hidden=5, rngs=nnx.Rngs(0))


def test_the_loss_module_keeps_a_learned_link():
    loss = nn.Loss(losses.legendretron_loss, num_classes=4, rngs=nnx.Rngs(0))
    scores, labels = jnp.zeros((2, 3)), jnp.array([0, 3])
    expected = losses.legendretron_loss(scores, labels, loss.kept("params"))
    np.testing.assert_array_equal(loss(scores, labels), expected)
    assert len(loss.params) == len(losses.ConvexPotential._fields)
