"""DeepNorm: post-normalization that stays trainable in deep stacks, and its embedding remedy."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.norms.layer import layer_norm


def deep_norm_residual(
    x: ArrayLike,
    sublayer_output: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_layers: int,
    alpha: float | None = None,
    epsilon: float = 1e-6,
) -> Array:
    r"""The DeepNorm residual connection: layer normalization after an enlarged skip branch.

        y = scale · (z - mean(z)) / √(var(z) + ε) + bias,   z = α x + F(x),   α = √(2N)

    With the initial weights of `deep_norm_gain` a step of the parameters moves the output of all N
    layers about as far as that of one; α = 1 is the post-LN of the first transformers.

    Args:
      x: the stream, `[..., features]` floating point.
      sublayer_output: F(x), of the same shape: attention or feed-forward network of one block.
      scale: the gain `[features]`. Default: 1.
      bias: `[features]`. Default: 0.
      num_layers: N, the blocks of the model, at least 1.
      alpha: α > 0. Default `deep_norm_alpha(num_layers)`.
      epsilon: ε at least 0, added to the variance. Default 1e-6.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: shapes that do not match, `num_layers` below 1, an `alpha` that is not positive,
        or a negative `epsilon`.
      TypeError: an array that is not floating point.

    Use it where a post-LN model is wanted that is too deep to train as one; pre-LN and Peri-LN
    (`residual_block`) are stable without it, with a stream that grows.

    Cost: one `layer_norm`, as in any post-LN block.

    Example:
      >>> x, f = jnp.array([1.0, -1.0]), jnp.array([0.0, 4.0])
      >>> print(deep_norm_residual(x, f, num_layers=8))  # of 4 x + F(x) = [4, 0]
      [ 1. -1.]

    Reference: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2022, arXiv:2210.02414,
    after Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022, arXiv:2203.00555.
    """
    check_floating(x=x, sublayer_output=sublayer_output)
    check_shape(jnp.shape(x), sublayer_output=sublayer_output)
    default = deep_norm_alpha(num_layers)
    alpha = default if alpha is None else alpha
    check_interval(0, jnp.inf, closed="right", alpha=alpha)
    x = jnp.asarray(x)
    dtype = compute_dtype(x, sublayer_output)
    z = alpha * x.astype(dtype) + jnp.asarray(sublayer_output, dtype)
    return layer_norm(z, scale, bias, epsilon=epsilon).astype(x.dtype)


def deep_norm_alpha(num_layers: int) -> float:
    r"""The weight of the skip branch in a DeepNorm model of N blocks.

        α = √(2N)

    the choice of GLM-130B. DeepNet's own for a decoder is its square root, `(2N)^(1/4)`, with a
    gain of `(8N)^(-1/4)`: another split of the same bound between skip branch and initial weights.

    Args:
      num_layers: N, at least 1; a block is attention and feed-forward network.

    Returns:
      α.

    Raises:
      ValueError: `num_layers` below 1.

    Use it with `deep_norm_gain`; neither does its work without the other.

    Cost: one formula, before training.

    Example:
      >>> deep_norm_alpha(8)
      4.0

    Reference: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2022, arXiv:2210.02414.
    """
    check_interval(1, jnp.inf, num_layers=num_layers)
    return (2 * num_layers) ** 0.5


def deep_norm_gain(num_layers: int) -> float:
    r"""The gain of the initial weights in a DeepNorm model of N blocks.

        β = 1 / √(2N)

    for feed-forward, value and output projections: W is normal of variance 2 β² / (fan_in +
    fan_out). Query and key projections have gain 1, biases start at 0.

    Args:
      num_layers: N, at least 1; a block is attention and feed-forward network.

    Returns:
      β.

    Raises:
      ValueError: `num_layers` below 1.

    Use it as `jax.nn.initializers.variance_scaling(deep_norm_gain(N) ** 2, "fan_avg", "normal")`,
    with `deep_norm_alpha` at the skip branch.

    Cost: one formula, before training.

    Example:
      >>> deep_norm_gain(8)
      0.25

    Reference: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2022, arXiv:2210.02414.
    """
    return 1 / deep_norm_alpha(num_layers)


def shrink_embedding_gradient(x: ArrayLike, alpha: float = 0.1) -> Array:
    r"""The identity, with a gradient multiplied by α.

        y = α x + (1 - α) stop_gradient(x)

    in value exactly x.

    Args:
      x: any floating-point array: the embeddings that a model has looked up.
      alpha: α in [0, 1]. Default 0.1; 1 changes nothing, 0 freezes the embeddings.

    Returns:
      `x`, unchanged.

    Raises:
      ValueError: `alpha` outside [0, 1].
      TypeError: `x` is not floating point.

    Use it behind the embedding table, whose gradient is the largest of all early in training and
    precedes spikes of the loss. Under Adam, which divides a gradient by its size, it acts through
    ε, the clipping of the global norm, and tables tied to the output.

    Cost: elementwise, forward and backward.

    Example:
      >>> jax.grad(lambda x: shrink_embedding_gradient(x) ** 2)(3.0)
      Array(0.6, dtype=float32, weak_type=True)

    Reference: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2022, arXiv:2210.02414.
    """
    check_floating(x=x)
    check_interval(0, 1, alpha=alpha)
    x = jnp.asarray(x)
    # The formula's two weighted terms, rearranged: their rounding would change the value.
    fixed = jax.lax.stop_gradient(x)
    return fixed + (alpha * (x - fixed)).astype(x.dtype)
