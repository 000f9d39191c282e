"""Optimizers of a part: of the parameters, or of each gradient."""

import optax

from jaxref import optimizers
from jaxref.train.methods.frame import Transformation


def norm_parameters_only(
    learning_rate: optax.Schedule, *, base: Transformation = optimizers.adamw
) -> optax.GradientTransformation:
    """Trains the scales and biases of the norms; everything else stays as it was drawn.

    Args:
      learning_rate: the program's.
      base: the optimizer of what is trained. Default `adamw`.

    Returns:
      The transformation.

    `jaxref.optimizers.norm_parameters_only` says what is selected.
    """
    return optimizers.train_only(
        base(learning_rate=learning_rate), lambda params: optimizers.norm_parameters_only(params)
    )


def adaptive_gradient_clip(
    learning_rate: optax.Schedule,
    *,
    base: Transformation = optimizers.adamw,
    clipping: float = 0.01,
    eps: float = 1e-3,
) -> optax.GradientTransformation:
    """Clips the gradient of each unit to a share of the norm of its weights.

    Args:
      learning_rate: the program's.
      base: the optimizer that descends along the clipped gradient. Default `adamw`.
      clipping: the share, above 0. Default 0.01.
      eps: the least norm of weights, above 0. Default 1e-3.

    Returns:
      The transformation.

    `jaxref.optimizers.adaptive_gradient_clip` says more.
    """
    clip = optimizers.adaptive_gradient_clip(clipping, eps)
    return optax.chain(clip, base(learning_rate=learning_rate))
