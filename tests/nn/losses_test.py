from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.losses import (
    adaptive_ldr_init,
    adaptive_ldr_loss,
    factored_output_loss,
    factored_output_weights,
    squentropy,
)
from jaxref.nn import Loss
from jaxref.nn.losses import OutputOfLoss, keeps_something


def weighted_init(key, num_classes, spread=1.0):
    return {"weights": spread * jax.random.normal(key, (num_classes,))}


def weighted_loss(params, logits, labels, *, power=2.0):
    """A loss that learns a weight for each class."""
    return params["weights"][labels] * jnp.abs(logits.sum(axis=-1)) ** power


def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3)).astype("f")
    return logits, rng.integers(3, size=4), np.array([5, 0, 2, 3])


class TestState:
    def test_training_moves_it_and_evaluation_does_not(self):
        logits, labels, indices = batch()
        loss = Loss(partial(adaptive_ldr_loss, alpha=3.0), num_examples=6)
        state = adaptive_ldr_init(6)
        for _ in range(2):
            expected, state = adaptive_ldr_loss(logits, labels, indices, state, alpha=3.0)
            np.testing.assert_array_equal(loss(logits, labels, indices=indices), expected)
            jax.tree.map(np.testing.assert_array_equal, loss.kept("state"), state)
        loss.eval()
        loss(logits, labels, indices=indices)
        jax.tree.map(np.testing.assert_array_equal, loss.kept("state"), state)
        assert len(jax.tree.leaves(nnx.state(loss, nnx.BatchStat))) == 2
        assert not nnx.state(loss, nnx.Param)

    def test_an_output_matrix_is_a_layer_that_moves_with_it(self):
        loss = Loss(
            partial(factored_output_loss, loss="spherical", epsilon=0.1, learning_rate=1.0),
            num_classes=5,
            features=3,
            rngs=nnx.Rngs(0),
        )
        output, (hidden, labels, _) = OutputOfLoss(loss), batch()
        before = output(hidden)
        loss(hidden, labels)
        assert np.any(output(hidden) != before)
        weights = factored_output_weights(loss.kept("state"))
        squares = np.square(hidden @ weights.T) + 0.1
        expected = np.log(squares / squares.sum(-1, keepdims=True))
        np.testing.assert_allclose(output(hidden), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="loss must have a link"):
            OutputOfLoss(Loss(adaptive_ldr_loss, num_examples=6))


class TestParameters:
    def test_they_are_the_model_s_and_have_gradients(self):
        logits, labels, _ = batch()

        class Model(nnx.Module):
            def __init__(self):
                self.loss = Loss(
                    partial(weighted_loss, power=1.0),
                    init=partial(weighted_init, spread=2.0),
                    num_classes=3,
                    rngs=nnx.Rngs(0),
                )

        model = Model()
        (weights,) = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert weights.shape == (3,)
        gradient = nnx.grad(lambda model: model.loss(logits, labels).sum())(model)
        expected = jax.grad(
            lambda w: weighted_loss({"weights": w}, logits, labels, power=1.0).sum()
        )
        np.testing.assert_allclose(jax.tree.leaves(gradient)[0], expected(weights), rtol=1e-6)


class TestBadInput:
    def test_nothing_kept_and_nothing_given(self):
        with pytest.raises(ValueError, match="function must have an argument params or state"):
            Loss(squentropy)
        with pytest.raises(ValueError, match="init must be given for weighted_loss"):
            Loss(weighted_loss)
        with pytest.raises(ValueError, match="num_examples must be given for adaptive_ldr_loss"):
            Loss(adaptive_ldr_loss)
        with pytest.raises(ValueError, match="rngs must be given for weighted_loss"):
            Loss(weighted_loss, init=weighted_init, num_classes=3)

    def test_which_losses_keep_something(self):
        assert keeps_something(partial(adaptive_ldr_loss, alpha=3.0))
        assert keeps_something(weighted_loss)
        assert not keeps_something(squentropy)
