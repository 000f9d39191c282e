"""Kinds of variables that a training step treats in a way of their own."""

from flax import nnx


class GradientState(nnx.Variable):
    """State that the backward pass advances: the gradient with respect to it is its next value.

    The norms that have such state say so in `backward_fields` of their state. A training step
    differentiates with respect to it beside the parameters, and stores the gradient in its place;
    `jaxref.train` does. In evaluation it is not read.

    Use it for statistics that only the backward pass knows; `nnx.BatchStat` is for those of the
    forward pass, `AuxiliaryLoss` for what is to be minimised.

    Cost: a gradient of the size of the state in every step of training.

    Example:
      >>> import jax.numpy as jnp
      >>> isinstance(GradientState(jnp.zeros(2)), nnx.Param)
      False
    """


class AuxiliaryLoss(nnx.Variable):
    """A scalar that training adds to the loss: what the module's newest call in training owes.

    The weight is in it already. A training step takes the sum of a model's after the call, inside
    of the function that it differentiates; `jaxref.train` does. It is no part of a checkpoint.

    Use it in a module that has something to be minimised beside the loss, as the balance of
    `MixtureOfExperts`; `GradientState` is for statistics.

    Cost: one scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> print(AuxiliaryLoss(jnp.float32(0.5)).get_value())
      0.5
    """
