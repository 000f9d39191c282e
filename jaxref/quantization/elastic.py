"""Networks that run in any of many number formats (EQ-Net): elastic quantizers and their training.

One network is trained for 2 to 8 bits, one scale per tensor or per channel, with or without offset.
Which bits each layer should then have is the matter of `elastic_search`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
)
from jaxref.core.labels import expected_over_labels
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.fixed_point import check_length
from jaxref.quantization.quantization_aware import round_to_step, scale_gradient

LEAST_BITS, MOST_BITS = 2, 8
_POWER = 2.4  # of the errors that the first ranges are chosen by


class ElasticConfig(NamedTuple):
    """A number format of `elastic_quantize`; all three may be traced.

    Attributes:
      bits: 2 to 8.
      per_channel: whether every channel has a scale and an offset of its own. Default False.
      symmetric: whether the offset is 0. Default True.
    """

    bits: ArrayLike
    per_channel: ArrayLike = False
    symmetric: ArrayLike = True


class ElasticParams(NamedTuple):
    """What an elastic quantizer learns: a scale and an offset for each of its formats.

    Attributes:
      scale: `[2, 7, ...]`, one per tensor: symmetric ones first, then by bits from 2 to 8, and as
        many axes of size 1 as the tensor has.
      offset: `[7, ...]`, of the formats that are not symmetric.
      channel_scale, channel_offset: the same, one per channel; None for activations.
    """

    scale: Array
    offset: Array
    channel_scale: Array | None
    channel_offset: Array | None


def elastic_quantizer_init(
    x: ArrayLike, *, channel_axis: int | None = None, signed: bool = True
) -> ElasticParams:
    r"""The scales and offsets to begin with: of each format the range that loses least.

        range = shrink [min x, max x],   [-max|x|, max|x|] if symmetric,   [0, max x] if not signed
        shrink ∈ {1.00, 0.99, ..., 0.21} with the least mean |x - x_q|^2.4
        s = (high - low) / (2^bits - 1),   β = low - s q_min

    Args:
      x: floating point, with one entry or more: weights, or the first batch of activations.
      channel_axis: the axis of the channels: -1 for a kernel `[in, out]`. Default: no scales per
        channel, as for activations.
      signed: of `elastic_quantize`.

    Returns:
      The `ElasticParams`, in at least float32.

    Raises:
      ValueError: no entries, `channel_axis` out of range, or NaN or infinite entries where values
        can be tested.
      TypeError: `x` is not floating point.

    Use it once for each weight, and for activations on the first batch, before training with
    `elastic_quantize`; `learned_step_init` starts a quantizer of a single format.

    Cost: 80 ranges for each of 14 formats, 1120 roundings of `x`, with 14 copies of it at a time;
    twice that with channels.

    Example:
      >>> params = elastic_quantizer_init(jnp.array([-1.0, 0.0, 1.0, 2.0]))
      >>> print(params.scale.shape, params.scale[1, 0], params.offset[0])
      (2, 7, 1) [1.] [1.]

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    if not x.size:
        raise ValueError(f"x must have entries to take a range from, got shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and not jnp.all(jnp.isfinite(x)):
        raise ValueError("x must be finite, got NaN or infinite entries")
    x = jax.lax.stop_gradient(x.astype(compute_dtype(x)))
    scale, offset = _best_ranges(x, tuple(range(x.ndim)), signed)
    if channel_axis is None:
        return ElasticParams(scale, offset, None, None)
    (channel,) = canonical_axes(channel_axis, x.ndim, name="channel_axis")
    shared = tuple(axis for axis in range(x.ndim) if axis != channel)
    return ElasticParams(scale, offset, *_best_ranges(x, shared, signed))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _best_ranges(x: Array, axes: tuple[int, ...], signed: bool) -> tuple[Array, Array]:
    """Scales `[2, 7, ...]` and offsets `[7, ...]` for the entries along `axes` together."""
    low, high = (f(x, axis=axes, keepdims=True) for f in (jnp.min, jnp.max))
    largest = jnp.maximum(-low, high)
    if signed:
        lows, highs = jnp.stack([-largest, low]), jnp.stack([largest, high])
    else:
        lows, highs = jnp.zeros((2, *low.shape), x.dtype), jnp.stack([largest, high])

    def ranges(bits, low, high, symmetric):
        q_min, q_max = _code_range(bits, signed)

        def try_range(best, shrink):
            scale = shrink * (high - low) / (q_max - q_min)
            offset = jnp.where(symmetric, 0.0, shrink * low - scale * q_min)
            x_q = round_to_step(x - offset, scale, q_min, q_max, 1.0) + offset
            error = jnp.mean(jnp.abs(x - x_q) ** _POWER, axis=axes, keepdims=True)
            better = error < best[0]
            kept = (jnp.where(better, a, b) for a, b in zip((error, scale, offset), best))
            return tuple(kept), None

        start = jnp.full_like(low, jnp.inf), jnp.zeros_like(low), jnp.zeros_like(low)
        return jax.lax.scan(try_range, start, 1.0 - 0.01 * jnp.arange(80, dtype=x.dtype))[0][1:]

    every_bits = jax.vmap(ranges, in_axes=(0, None, None, None))
    both = jax.vmap(every_bits, in_axes=(None, 0, 0, 0))
    bits = jnp.arange(LEAST_BITS, MOST_BITS + 1)
    scale, offset = both(bits, lows, highs, jnp.array([True, False]))
    return scale, offset[1]


def elastic_quantize(
    x: ArrayLike, params: ElasticParams, config: ElasticConfig, *, signed: bool = True
) -> Array:
    r"""Rounds in one of many formats, each of which has learned its scale and offset.

        y = s round(clip((x - β) / s, q_min, q_max)) + β
        q_min, q_max = -2^(bits-1), 2^(bits-1) - 1,   or 0, 2^bits - 1 if not signed

    with s and β those of the format in `params`, and β = 0 if symmetric. Rounding is
    straight-through; the gradients of s and β are those of `learned_step_quantize`, times
    1/√(q_max n) with n the entries that share them, and formats that are not in use get none.

    Args:
      x: floating point, of the axes that `params` were made for.
      params: of `elastic_quantizer_init`.
      config: the `ElasticConfig`. Since it may be traced, one compiled program serves all formats.
      signed: False for activations that are never negative. Default True.

    Returns:
      y in the type of `x`, computed in at least float32.

    Raises:
      ValueError: bits outside 2 to 8, params of another shape, or scales per channel asked of
        params without them.
      TypeError: `x` not floating point, or bits that are not integers.

    The first and the last layer keep 8 bits in the paper. `learned_step_quantize` has one format.

    Cost: one elementwise pass; 21 numbers to learn for a tensor, and as many for each channel.

    Example:
      >>> params = elastic_quantizer_init(jnp.array([-1.0, 0.0, 1.0, 2.0]))
      >>> x = jnp.array([-1.0, 0.2, 1.3, 9.0])
      >>> for bits in (2, 8):
      ...     print(elastic_quantize(x, params, ElasticConfig(bits, symmetric=False)).round(2))
      [-1.  0.  1.  2.]
      [-1.   0.2  1.3  2. ]

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    check_floating(x=x)
    check_length(LEAST_BITS, MOST_BITS, bits=config.bits)
    x = jnp.asarray(x)
    wide = x.astype(compute_dtype(x))
    index = jnp.asarray(config.bits) - LEAST_BITS
    kind = jnp.where(config.symmetric, 0, 1)
    scale, offset = params.scale[kind, index], params.offset[index]
    check_broadcastable(x.shape, scale=scale)
    entries: ArrayLike = x.size
    if params.channel_scale is not None and params.channel_offset is not None:
        channel_scale = params.channel_scale[kind, index]
        check_broadcastable(x.shape, channel_scale=channel_scale)
        scale = jnp.where(config.per_channel, channel_scale, scale)
        offset = jnp.where(config.per_channel, params.channel_offset[index], offset)
        entries = jnp.where(config.per_channel, x.size // channel_scale.size, x.size)
    elif isinstance(config.per_channel, jax.core.Tracer) or config.per_channel:
        raise ValueError(
            "per_channel must be False for params without channels, got true or traced"
        )
    q_min, q_max = _code_range(jnp.asarray(config.bits), signed)
    factor = jax.lax.rsqrt(q_max * jnp.maximum(entries, 1).astype(wide.dtype))
    offset = scale_gradient(jnp.where(config.symmetric, 0.0, offset), factor)
    return (round_to_step(wide - offset, scale, q_min, q_max, factor) + offset).astype(x.dtype)


def _code_range(bits: Array, signed: bool) -> tuple[Array, Array]:
    low = -jnp.ldexp(1.0, bits - 1) if signed else jnp.zeros(())
    return low, low + jnp.ldexp(1.0, bits) - 1.0


def weight_distribution_regularization(
    weights: Any,
    *,
    kurtosis_target: float = 1.8,
    skewness_target: float = 0.0,
    kurtosis_weight: float = 0.015,
    skewness_weight: float = 1.0,
) -> Array:
    r"""How far the weights of layers are from a uniform distribution (the WDR loss).

        z = (w - mean w) / std w
        L = mean over layers of 0.015 (mean z⁴ - 1.8)² + (mean z³ - 0)²

    1.8 is the kurtosis of a uniform distribution, whose weights few bits serve as well as many; it
    is 3 for a normal one, so that L = 0.0216.

    Args:
      weights: tree of arrays, floating point: the kernels of the quantized layers but the first.
      kurtosis_target, skewness_target: 1.8 and 0 by default.
      kurtosis_weight, skewness_weight: at least 0. Defaults 0.015 and 1.

    Returns:
      A scalar, at least float32. A tensor of equal entries counts 0, and so does no tensor.

    Raises:
      ValueError: a negative weight.
      TypeError: not floating point.

    Use it beside the loss of the task when one network shall serve many numbers of bits
    (`elastic_quantize`); one that has a single format need not change the law of its weights.

    Cost: a few passes over the weights a step.

    Example:
      >>> print(weight_distribution_regularization({"a": jnp.linspace(-1.0, 1.0, 1001)}) < 1e-8)
      True

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    check_interval(0, jnp.inf, kurtosis_weight=kurtosis_weight, skewness_weight=skewness_weight)
    leaves = jax.tree.leaves(weights)
    check_floating(**{f"weights[{i}]": leaf for i, leaf in enumerate(leaves)})

    def of_layer(w):
        w = jnp.asarray(w, compute_dtype(w)).ravel()
        if not w.size:
            return jnp.zeros(())
        low = jax.lax.stop_gradient(jnp.min(w))
        span = jax.lax.stop_gradient(jnp.max(w)) - low
        varies = span > 0
        unit = (w - low) / jnp.where(varies, span, 1.0)  # the law does not mind, the powers do
        centred = unit - jnp.mean(unit)
        variance = jnp.where(varies, jnp.mean(jnp.square(centred)), 1.0)
        z = centred * jax.lax.rsqrt(variance)
        kurtosis, skewness = jnp.mean(z**4), jnp.mean(z**3)
        loss = kurtosis_weight * jnp.square(kurtosis - kurtosis_target)
        loss += skewness_weight * jnp.square(skewness - skewness_target)
        return jnp.where(varies, loss, 0.0)

    return sum((of_layer(w) for w in leaves), start=jnp.zeros(())) / max(len(leaves), 1)


def group_progressive_guidance_loss(
    logits: ArrayLike, labels: ArrayLike, *, alpha: float = 0.5, temperature: float = 1.0
) -> Array:
    r"""Each network of a group learns from the one before, from most bits to least (the GPG loss).

        L = CE(z_0, y) + Σ_{i≥1} [α T² KL(softmax(z_{i-1}/T) ‖ softmax(z_i/T)) + (1 - α) CE(z_i, y)]

    in which the teacher z_{i-1} has no gradient.

    Args:
      logits: `[networks, ..., classes]` floating point: of the same inputs in the format with the
        most bits, then in random ones, and last in the one with the fewest; 3 in the paper.
      labels: integer ids `[...]`, or distributions `[..., classes]`. An id that is no class gives
        NaN for its example.
      alpha: α in [0, 1]. Default 0.5.
      temperature: T above 0. Default 1.

    Returns:
      `[...]` losses in the type of `logits`, each the sum over the networks.

    Raises:
      ValueError: logits without networks or classes, labels of another shape, or numbers out of
        range.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Every step of training takes the gradient of the whole group, clipped to [-1, 1], together with
    that of `weight_distribution_regularization`.

    Cost: that of two softmaxes over the classes for each network; the logits take a forward and
    backward pass of each, three a step in the paper.

    Example:
      >>> logits = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
      >>> print(f"{group_progressive_guidance_loss(logits, jnp.array(0)):.3f}")
      0.719

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    check_floating(logits=logits)
    check_interval(0, 1, alpha=alpha)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    logits = jnp.asarray(logits)
    if logits.ndim < 2 or not logits.shape[0]:
        raise ValueError(f"logits must have shape [networks, ..., classes], got {logits.shape}")
    wide = logits.astype(compute_dtype(logits))
    entropies = jnp.stack([expected_over_labels(jnp.negative, labels, z, axis=-1) for z in wide])
    log_p = jax.nn.log_softmax(wide / temperature, axis=-1)
    teacher, student = jax.lax.stop_gradient(log_p[:-1]), log_p[1:]
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    following = alpha * temperature**2 * divergence + (1 - alpha) * entropies[1:]
    return (entropies[0] + jnp.sum(following, axis=0)).astype(logits.dtype)
