"""Where the norms of a deep residual network stand, and how its depth scales them."""

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.norms.layer import layer_norm
from jaxref.norms.rms import rms_norm

PLACEMENTS = ("pre", "post", "peri", "sandwich", "deep_norm")
SCHEMES = (*PLACEMENTS, "mix")


def layer_norm_scaling_factor(layer_index: ArrayLike) -> Array:
    r"""What LayerNorm Scaling multiplies the normalised input of block l by.

        1 / √l

    Args:
      layer_index: l, integers from 1 of any shape: the number of the block, the same for both of
        its sublayers. May be traced; `jnp.arange(1, blocks + 1)` for scanned layers.

    Returns:
      The factor, of the shape of `layer_index`, in at least float32.

    Raises:
      ValueError: `layer_index` below 1, where it is not traced.
      TypeError: `layer_index` is not integer.

    Use it on the result of any norm in a pre-norm model: of a block's two, not of the one before
    the output. `layer_norm_scaling` has both in one.

    Cost: one root for each block.

    Example:
      >>> print(layer_norm_scaling_factor(jnp.array([1, 4, 16])))
      [1.   0.5  0.25]

    Reference: Sun et al., "The Curse of Depth in Large Language Models", 2025, arXiv:2502.05795.
    """
    if not jnp.issubdtype(jnp.result_type(layer_index), jnp.integer):
        kind = jnp.result_type(layer_index).name
        raise TypeError(f"layer_index must have an integer type, got {kind}")
    check_interval(1, jnp.inf, layer_index=layer_index)
    return 1 / jnp.sqrt(jnp.asarray(layer_index, compute_dtype(0.0)))


def layer_norm_scaling(
    x: ArrayLike,
    layer_index: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    norm: Literal["rms", "layer"] = "rms",
    axis: int | tuple[int, ...] = -1,
    epsilon: float = 1e-6,
) -> Array:
    r"""LayerNorm Scaling: the norm before a sublayer of block l, smaller the deeper it stands.

        y = norm(x; scale, bias) / √l

    Behind it a block adds the variance c/l to the stream in place of c, so that after L blocks of a
    new model it has grown to about 1 + c ln L, not 1 + c L: deep blocks keep a say in the output.

    Args:
      x: `[...]` floating point, the stream.
      layer_index: l, an integer from 1: the number of the block, the same for both of its
        sublayers. May be traced.
      scale: the gain, of the shape of the normalised axes. Default: 1.
      bias: of the same shape, for `norm="layer"` only. Default: 0.
      norm: "rms" for `rms_norm`, the paper's in its LLaMA models, or "layer" for `layer_norm`.
      axis: the axis or axes to normalise over.
      epsilon: ε at least 0 of the norm. Default 1e-6.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: `layer_index` below 1 or not a scalar, an unknown `norm`, a `bias` for "rms", or
        what the norm itself rejects.
      TypeError: `layer_index` is not integer, or an array that is not floating point.

    Use it in both norms of each block of a deep pre-norm model, without an initialisation that
    shrinks with depth, which does the same at the start of training. The norm before the output
    stays unscaled.

    Cost: that of `rms_norm` or `layer_norm`, and one product for each entry; no parameters of its
    own.

    Example:
      >>> print(layer_norm_scaling(jnp.array([3.0, 4.0]), 4).round(3))
      [0.424 0.566]

    Reference: Sun et al., "The Curse of Depth in Large Language Models", 2025, arXiv:2502.05795.
    """
    check_floating(x=x)
    check_shape((), layer_index=layer_index)
    x = jnp.asarray(x)
    wide = x.astype(compute_dtype(x))
    if norm == "layer":
        y = layer_norm(wide, scale, bias, axis=axis, epsilon=epsilon)
    elif norm != "rms":
        raise ValueError(f"norm must be 'rms' or 'layer', got {norm!r}")
    elif bias is not None:
        raise ValueError("bias must be None for norm='rms'")
    else:
        y = rms_norm(wide, scale, axis=axis, epsilon=epsilon)
    return (y * layer_norm_scaling_factor(layer_index)).astype(x.dtype)


def norm_placement(
    num_layers: int, scheme: str = "mix", post_fraction: float = 0.25
) -> tuple[str, ...]:
    r"""Where the norms of each block stand, under a scheme for the whole model.

    Of L blocks "mix" gives the first ⌊a L⌋ post-norm and the others pre-norm; every other scheme
    places the norms of all blocks alike. A pre-norm stream grows with depth, and the gradient of
    deep blocks falls with it; behind post-norm blocks it starts anew at unit size, which leaves
    deep blocks a larger gradient.

    Args:
      num_layers: L, at least 1.
      scheme: "pre", "post", "peri", "sandwich", "deep_norm" or "mix" (default).
      post_fraction: a in [0, 1] of "mix", read as the simplest fraction that it stands for: 0.3 of
        10 blocks are 3, not the 2 of binary rounding. Default 0.25, the paper's best.

    Returns:
      A tuple of L placements, which `residual_block` takes. Models keep one norm before their
      output in any scheme.

    Raises:
      ValueError: `num_layers` below 1, an unknown scheme, or a `post_fraction` outside [0, 1].

    Use "mix" where deep blocks of a pre-norm model contribute nothing (see
    `jaxref.analysis.layer_removal_drop`); it needs the warm-up that post-norm needs.

    Cost: a tuple, before training.

    Example:
      >>> norm_placement(4)
      ('post', 'pre', 'pre', 'pre')

    Reference: Li, Yin, Liu, "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and
    Post-LN", 2024, arXiv:2412.13795.
    """
    check_interval(1, jnp.inf, num_layers=num_layers)
    check_interval(0, 1, post_fraction=float(post_fraction))  # of a Fraction, too
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if scheme != "mix":
        return (scheme,) * num_layers
    fraction = Fraction(float(post_fraction)).limit_denominator(10**6)
    num_post = int(fraction * num_layers)  # rounds down
    return ("post",) * num_post + ("pre",) * (num_layers - num_post)


def residual_block(
    x: Array,
    sublayer: Callable[[Array], Array],
    norm: Callable[[Array], Array],
    placement: str,
    *,
    output_norm: Callable[[Array], Array] | None = None,
    alpha: float | None = None,
) -> Array:
    r"""A sublayer f with its residual connection, normalised at one of the usual places.

        pre:              x + f(n(x))
        post:             n(x + f(x))
        peri, sandwich:   x + n_out(f(n(x)))
        deep_norm:        n(α x + f(x))

    A peri block adds a branch of unit variance at initialisation whatever the size of its weights,
    so that the stream's variance grows linearly with depth; a pre block adds what its sublayer
    gives, a post block keeps the stream at unit variance and shrinks the gradient of early blocks.
    "peri" and "sandwich" are the same block. A Peri-LN model also normalises the embeddings once,
    before the first block, which is not done here; a sandwich model does not.

    Args:
      x: the stream, `[..., features]` floating point.
      sublayer: f, such as attention or a feed-forward network; maps to the shape of `x`.
      norm: n, such as `functools.partial(rms_norm, scale=scale)`.
      placement: "pre", "post", "peri", "sandwich" or "deep_norm".
      output_norm: n_out, with parameters of its own; for "peri" and "sandwich", and only there.
      alpha: α, as of `deep_norm_alpha`; for "deep_norm", and only there.

    Returns:
      The stream after the sublayer, of the shape of `x`.

    Raises:
      ValueError: an unknown `placement`, an `output_norm` or `alpha` missing where needed or given
        where not, an `alpha` that is not positive, or a sublayer whose result is not of the shape
        of `x`.
      TypeError: `x` is not floating point.

    Use it for each sublayer of a block with the block's entry of `norm_placement`;
    `layer_norm_scaling` is a pre block with that norm.

    Cost: the sublayer and one norm; two norms for "peri" and "sandwich".

    Example:
      >>> x = jnp.array([3.0, 4.0])
      >>> print(residual_block(x, jnp.square, rms_norm, "pre"))
      [3.72 5.28]

    Reference: Kim et al., "Peri-LN: Revisiting Layer Normalization in the Transformer
    Architecture", 2025, arXiv:2502.02732; Li, Yin, Liu, "Mix-LN: Unleashing the Power of Deeper
    Layers by Combining Pre-LN and Post-LN", 2024, arXiv:2412.13795.
    """
    check_floating(x=x)
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    around = placement in ("peri", "sandwich")
    for name, value, needed in (
        ("output_norm", output_norm, around),
        ("alpha", alpha, placement == "deep_norm"),
    ):
        if (value is not None) != needed:
            raise ValueError(f"{name} must {'' if needed else 'not '}be given for {placement!r}")
    if alpha is not None:
        check_interval(0, jnp.inf, closed="right", alpha=alpha)
    x = jnp.asarray(x)
    branch = sublayer(norm(x) if around or placement == "pre" else x)
    check_shape(x.shape, **{"the result of sublayer": branch})
    if output_norm is not None:
        branch = output_norm(branch)
    y = (x if alpha is None else alpha * x) + branch
    return norm(y) if placement in ("post", "deep_norm") else y
