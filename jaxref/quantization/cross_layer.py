"""Quantizing activations by blocks of layers that depend on each other (Q-VLM)."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.tensor import QuantSpec

SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
EXHAUSTIVE_LAYERS = 3


class BlockRanges(NamedTuple):
    """What `search_block_ranges` found.

    Attributes:
      low, high: for each layer the range of its inputs, with 1 for axes that share one.
      factors: float32 `[layers]`, what the observed ranges were multiplied by.
      objective: float32 scalar, the block's error with these ranges.
      evaluations: how often the block was run to find them.
    """

    low: tuple[Array, ...]
    high: tuple[Array, ...]
    factors: Array
    objective: Array
    evaluations: int


def activation_entropy(x: ArrayLike, *, axis: int = -2, eps: float = 1e-7) -> Array:
    r"""How evenly the magnitude of activations is spread over the tokens.

        H = -mean over batch and channels of Σ_t p_t log(p_t + eps),   p_t = |x_t| / Σ_t' |x_t'|

    Args:
      x: `[..., tokens, channels]` floating point, quantized or not.
      axis: of the tokens. Default -2.
      eps: at least 0; 0 log 0 counts as 0. Default 1e-7.

    Returns:
      A scalar, at least float32, between about 0 (one token has it all) and log(tokens) (all have
      the same, or a channel is 0). A channel's scale does not matter. NaN where `x` is not finite.

    Raises:
      ValueError: `axis` out of range, no tokens, or a negative `eps`.
      TypeError: `x` not floating point.

    The proxy for a layer's discretization error in `partition_blocks`: large where a layer's
    inputs leave many options of rounding open.

    Cost: a logarithm for each entry, O(n) time and memory.

    Example:
      >>> print(activation_entropy(jnp.array([[1.0, 0.0], [-1.0, 2.0]])).round(4))
      0.3466

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    check_interval(0, jnp.inf, eps=eps)
    p, axis = _shares(x, axis, "x")
    return -jnp.mean(jnp.sum(p * _log(p, eps), axis=axis))


def discretization_entropy_dependency(
    x_k: ArrayLike, x_next: ArrayLike, *, axis: int = -2, eps: float = 1e-5
) -> Array:
    r"""How much the discretization error of a layer depends on that of the layer before.

        D = -mean over batch and channels of Σ_t J_t log(C_t + eps)
        J ∝ p_k p_next,   C ∝ p_next / (p_k + eps)

    with the shares p of `activation_entropy` of both layers' activations, and J and C normalized
    over the tokens. A conditional entropy, with one token of both layers beside the other.

    Args:
      x_k: `[..., tokens, channels]` floating point, quantized activations of layer k.
      x_next: those of layer k + 1. Where its shape is another there are no pairs, and D is
        `activation_entropy(x_next)`.
      axis: of the tokens. Default -2.
      eps: positive. Default 1e-5.

    Returns:
      A scalar, at least float32.

    Raises:
      ValueError: `axis` out of range, no tokens, or `eps` not positive.
      TypeError: not floating point.

    Large: choose the ranges of both layers together; small: one after the other.

    Cost: a logarithm for each pair of entries, O(n) time and memory, and one run of both layers for
    the activations.

    Example:
      >>> x = jnp.array([[1.0], [3.0]])
      >>> print(discretization_entropy_dependency(x, x).round(4))
      0.6931

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    check_interval(0, jnp.inf, closed="neither", eps=eps)
    if jnp.shape(x_k) != jnp.shape(x_next):
        check_floating(x_k=x_k)
        return activation_entropy(x_next, axis=axis)
    p_k, axis = _shares(x_k, axis, "x_k")
    p_next, _ = _shares(x_next, axis, "x_next")
    joint = _normalize(p_k * p_next, axis)
    conditional = _normalize(p_next / (p_k + eps), axis)
    return -jnp.mean(jnp.sum(joint * jnp.log(conditional + eps), axis=axis))


def _shares(x: ArrayLike, axis: int, name: str) -> tuple[Array, int]:
    check_floating(**{name: x})
    (axis,) = canonical_axes(axis, jnp.ndim(x))
    if not jnp.size(x):
        raise ValueError(f"{name} must have tokens and channels, got shape {jnp.shape(x)}")
    magnitude = jnp.abs(jnp.asarray(x, compute_dtype(x)))
    largest = jnp.max(magnitude, axis=axis, keepdims=True)
    return _normalize(magnitude / jnp.where(largest == 0, 1.0, largest), axis), axis


def _normalize(p: Array, axis: int) -> Array:
    """Sums of 1 along the axis, uniform where all is 0."""
    total = jnp.sum(p, axis=axis, keepdims=True)
    uniform = jnp.full_like(p, 1.0 / p.shape[axis])
    return jnp.where(total == 0, uniform, p / jnp.where(total == 0, 1.0, total))


def _log(p: Array, eps: float) -> Array:
    """log(p + eps), and 0 where that is infinite, to be multiplied by p = 0."""
    shifted = p + eps
    return jnp.log(jnp.where(shifted > 0, shifted, 1.0))


def partition_blocks(
    dependencies: ArrayLike, *, threshold: float | None = None, max_block: int = 3
) -> list[tuple[int, ...]]:
    """Cuts a chain of layers into blocks whose ranges are searched for together.

    Layer k + 1 joins the block of layer k where their dependency is at least the threshold and the
    block has room; else it starts the next one. Runs on the host.

    Args:
      dependencies: `[layers - 1]` finite, of each layer on the one before, as
        `discretization_entropy_dependency` gives them; empty for one layer.
      threshold: -inf fills all blocks, inf leaves every layer alone. Default: the mean of the
        dependencies up to and with this one.
      max_block: the most layers of a block, at least 1. Default 3: a search tries all
        combinations.

    Returns:
      The layers of each block, in order: every layer once.

    Raises:
      ValueError: dependencies that are not a vector of finite numbers, a `threshold` that is NaN,
        or `max_block` below 1.

    Use it once the dependencies of all layers are measured, to say what `search_block_ranges` looks
    at together. Larger blocks see more of the dependencies and take longer to search.

    Cost: O(layers²) on the host.

    Example:
      >>> partition_blocks([0.9, 0.2, 0.8, 0.7])
      [(0, 1), (2, 3, 4)]

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    values = np.asarray(dependencies, np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values)):
        raise ValueError(f"dependencies must be a vector of finite numbers, got {dependencies}")
    if threshold is not None and np.isnan(threshold):
        raise ValueError("threshold must be a number, got nan")
    check_interval(1, jnp.inf, max_block=max_block)
    blocks: list[tuple[int, ...]] = [(0,)]
    for layer, dependency in enumerate(values, 1):
        least = np.mean(values[:layer]) if threshold is None else threshold
        if dependency >= least and len(blocks[-1]) < max_block:
            blocks[-1] += (layer,)
        else:
            blocks.append((layer,))
    return blocks


def quantize_to_range(x: ArrayLike, low: ArrayLike, high: ArrayLike, *, bits: int) -> Array:
    r"""Quantizes and dequantizes to equally spaced levels of a given range; the rest is clipped.

        y = s (clip(round(x / s - z), 0, n) + z)
        n = 2^bits - 1,   s = (high - low) / n,   z = round(low / s)

    Args:
      x: floating point, of any shape.
      low, high: the range, broadcastable to `x`, with low ≤ high. Where they are equal, y is that.
      bits: 2 to 8.

    Returns:
      y with the shape and type of `x`, computed in at least float32. Its levels contain 0 where the
      range does. Piecewise constant: its gradient with respect to `x` is 0.

    Raises:
      ValueError: shapes that do not broadcast, concrete ranges with low above high, or `bits` out
        of range.
      TypeError: `x` not floating point.

    `fake_quantize` takes the range from the data instead and clips nothing.

    Cost: one elementwise pass.

    Example:
      >>> print(quantize_to_range(jnp.array([-1.0, 0.3, 1.2, 9.0]), -1.0, 2.0, bits=2))
      [-1. 0. 1. 2.]

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    check_floating(x=x)
    check_interval(2, 8, bits=bits)
    check_broadcastable(jnp.shape(x), low=low, high=high)
    x = jnp.asarray(x)
    dtype = compute_dtype(x)
    low, high = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    if not isinstance(low - high, jax.core.Tracer) and jnp.any(low > high):
        raise ValueError("low must be at most high, got ranges that are not")
    levels = 2**bits - 1
    # The step of a single number is its own size, so that the number is a level.
    alone = jnp.maximum(jnp.abs(low), jnp.finfo(dtype).tiny)
    step = jnp.where(high > low, high / levels - low / levels, alone)
    step = jnp.maximum(step, jnp.finfo(dtype).tiny)
    zero = jnp.round(low / step)
    codes = jnp.clip(jnp.round(x.astype(dtype) / step - zero), 0, jnp.where(high > low, levels, 0))
    return ((codes + zero) * step).astype(x.dtype)


def quantized_block(
    layers: Sequence[Callable[[Array], Array]],
    inputs: ArrayLike,
    low: Sequence[ArrayLike],
    high: Sequence[ArrayLike],
    *,
    bits: int,
) -> Array:
    """A chain of layers, each of which reads quantized activations.

        x ← layer(quantize_to_range(x, low, high)) for each

    Args:
      layers: functions of one array.
      inputs: of the first.
      low, high: a range for each layer, as in `BlockRanges`.
      bits: 2 to 8.

    Returns:
      The output of the last layer.

    Raises:
      ValueError: as many ranges as layers are not given, or as `quantize_to_range`.

    Use it to run a block with the ranges that `search_block_ranges` found, also one of layers whose
    weights are quantized.

    Cost: the layers' own, and one elementwise pass over the inputs of each.

    Example:
      >>> double = lambda x: 2 * x
      >>> print(quantized_block([double, double], jnp.array([0.4]), [0.0, 0.0], [3.0, 6.0], bits=2))
      [0.]

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    if not len(layers) == len(low) == len(high):
        raise ValueError(
            f"low and high must have a range for each of {len(layers)} layers, "
            f"got {len(low)} and {len(high)}"
        )
    x = jnp.asarray(inputs)
    for layer, least, largest in zip(layers, low, high):
        x = layer(quantize_to_range(x, least, largest, bits=bits))
    return x


def search_block_ranges(
    layers: Sequence[Callable[[Array], Array]],
    inputs: ArrayLike,
    spec: QuantSpec,
    *,
    quantized_layers: Sequence[Callable[[Array], Array]] | None = None,
    shrink: Sequence[float] = SHRINK,
    norm: float = 2.0,
    sweeps: int = 3,
) -> BlockRanges:
    r"""The ranges of a block's activations that disturb its output least, found together.

        min over factors c_l in shrink of  ‖block_q(x; c) - block(x)‖_norm

    with the range of layer l's inputs, from their least to their largest number on `inputs`,
    multiplied by c_l. Blocks of up to three layers try all combinations; longer ones go through
    the layers, one factor at a time with the others held, until a sweep changes nothing.

    Args:
      layers: functions of one array; the block is their chain.
      inputs: calibration data, floating point, of the first layer.
      spec: an asymmetric `QuantSpec`: bits, and whether a "tensor" or each "channel" along `axis`
        has a range: the channels for language layers, the tokens for a vision tower.
      quantized_layers: the same layers with quantized weights, for block_q. Default `layers`.
      shrink: factors in (0, 1], 1 first. Default 1.0, 0.9, ..., 0.4.
      norm: the p of the norm, positive. Default 2.
      sweeps: the most sweeps over more than three layers. Default 3.

    Returns:
      `BlockRanges`; of equal errors, the first combination in the order of `shrink`. The
      combinations run one after the other in one compiled loop.

    Raises:
      ValueError: no layers or inputs, inputs that are not finite, a symmetric `spec` or one with
        blocks, or factors or a norm out of range.
      TypeError: inputs not floating point.

    One layer at a time is the ordinary search for a clipping range; more at a time pay where
    `partition_blocks` puts layers together.

    Cost: len(shrink)^layers runs of the block up to three layers, beyond at most sweeps · layers ·
    len(shrink), one after the other; no gradients.

    Example:
      >>> relu = lambda x: jnp.maximum(x, 0.0)
      >>> spec = QuantSpec(bits=4, symmetric=False)
      >>> found = search_block_ranges([relu, relu], jnp.linspace(-1.0, 1.0, 32), spec)
      >>> found.factors.shape, found.evaluations
      ((2,), 49)

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    rounded_layers = layers if quantized_layers is None else quantized_layers
    if not len(layers) or len(rounded_layers) != len(layers):
        raise ValueError(
            f"layers must hold at least one, and quantized_layers as many, "
            f"got {len(layers)} and {len(rounded_layers)}"
        )
    _check_search(inputs, spec, shrink)
    check_interval(0, jnp.inf, closed="neither", norm=norm)
    check_interval(1, jnp.inf, sweeps=sweeps)

    @jax.jit
    def observe(x):
        low: list[Array] = []
        high: list[Array] = []
        for layer in layers:
            for ends, function in ((low, jnp.min), (high, jnp.max)):
                ends.append(_per_range(function, x, spec))
            x = layer(x)
        return tuple(low), tuple(high), x

    low, high, target = observe(jnp.asarray(inputs))

    @jax.jit
    def errors(candidates, x):
        def error(factors):
            scaled = ([f * end for f, end in zip(factors, ends)] for ends in (low, high))
            difference = quantized_block(rounded_layers, x, *scaled, bits=spec.bits) - target
            difference = jnp.abs(difference.astype(compute_dtype(difference)))
            largest = jnp.max(difference)
            safe = jnp.where(largest > 0, largest, 1.0)
            return largest * jnp.sum((difference / safe) ** norm) ** (1 / norm)

        return jax.lax.map(error, candidates)

    count, evaluations = len(layers), 0
    if count <= EXHAUSTIVE_LAYERS:
        candidates = np.array(list(itertools.product(shrink, repeat=count)), np.float32)
        values = np.asarray(errors(candidates, inputs))
        best, evaluations = int(np.argmin(values)), len(candidates)
        factors, objective = candidates[best], values[best]
    else:
        factors, objective = np.full(count, shrink[0], np.float32), np.inf
        for _ in range(sweeps):
            before = factors
            for layer in range(count):
                candidates = np.repeat(factors[None], len(shrink), axis=0)
                candidates[:, layer] = shrink
                values = np.asarray(errors(candidates, inputs))
                evaluations += len(shrink)
                if values.min() < objective:
                    factors, objective = candidates[np.argmin(values)], values.min()
            if np.array_equal(before, factors):
                break
    return BlockRanges(
        tuple(f * end for f, end in zip(factors, low)),
        tuple(f * end for f, end in zip(factors, high)),
        jnp.asarray(factors),
        jnp.asarray(objective, jnp.float32),
        evaluations,
    )


def visual_encoder_objective(
    x: ArrayLike,
    x_q: ArrayLike,
    entropies: ArrayLike,
    *,
    entropy_weight: float = 0.01,
    power: float = 0.5,
) -> Array:
    r"""What the vision tower's ranges are chosen by: its own error and the entropy behind it.

        L = mean |x_q - x|^power + entropy_weight · mean entropies

    Args:
      x: floating point, of any shape: activations of the tower.
      x_q: the same shape, quantized.
      entropies: `activation_entropy` of the language layers that read the result, any shape.
      entropy_weight: at least 0. Default 0.01.
      power: positive. Default 0.5, which forgives a few large errors for many small ones.

    Returns:
      A scalar, at least float32. Its gradient is 0 where x_q = x.

    Raises:
      ValueError: shapes that differ, no entries, or numbers out of range.
      TypeError: not floating point.

    Lower entropy means less dependency between the language layers: more of them can be searched
    alone. `search_visual_ranges` minimizes it.

    Cost: one pass over the activations.

    Example:
      >>> print(visual_encoder_objective(jnp.zeros(2), jnp.array([0.25, 0.0]), jnp.array([2.0])))
      0.27

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    check_floating(x=x, x_q=x_q, entropies=entropies)
    check_shape(jnp.shape(x), x_q=x_q)
    check_interval(0, jnp.inf, entropy_weight=entropy_weight)
    check_interval(0, jnp.inf, closed="neither", power=power)
    for name, array in (("x", x), ("entropies", entropies)):
        if not jnp.size(array):
            raise ValueError(f"{name} must have entries, got shape {jnp.shape(array)}")
    dtype = compute_dtype(x, x_q)
    error = jnp.abs(jnp.asarray(x_q, dtype) - jnp.asarray(x, dtype))
    terms = jnp.where(error > 0, jnp.where(error > 0, error, 1.0) ** power, 0.0)
    return jnp.mean(terms) + entropy_weight * jnp.mean(jnp.asarray(entropies, dtype))


def search_visual_ranges(
    entropies_fn: Callable[[Array], ArrayLike],
    x: ArrayLike,
    spec: QuantSpec,
    *,
    shrink: Sequence[float] = (1.0, 0.999, 0.998),
    entropy_weight: float = 0.01,
    power: float = 0.5,
) -> BlockRanges:
    """The range of the vision tower's activations that `visual_encoder_objective` is least for.

    Args:
      entropies_fn: `entropies_fn(x_q)`: the `activation_entropy` of the language layers that run
        on the quantized activations.
      x: calibration data, floating point.
      spec: an asymmetric `QuantSpec`; a range for each token (`axis=-2`) is the paper's.
      shrink: factors in (0, 1]. Default 1, 0.999 and 0.998, the paper's.
      entropy_weight, power: of `visual_encoder_objective`.

    Returns:
      `BlockRanges` of one layer.

    Raises:
      ValueError: as `search_block_ranges`.
      TypeError: `x` not floating point.

    Use it for the vision tower, before the blocks of the language layers are cut
    (`partition_blocks`): it trades some of the tower's own error for less dependency between those
    layers.

    Cost: len(shrink) runs of `entropies_fn`, one after the other.

    Example:
      >>> x = jnp.linspace(-1.0, 1.0, 12).reshape(1, 4, 3)
      >>> spec = QuantSpec(bits=4, symmetric=False, granularity="channel", axis=-2)
      >>> search_visual_ranges(activation_entropy, x, spec).low[0].shape
      (1, 4, 1)

    Reference: Wang et al., "Q-VLM: Post-training Quantization for Large Vision-Language Models",
    2024, arXiv:2410.08119.
    """
    _check_search(x, spec, shrink)
    x = jnp.asarray(x)
    low, high = _per_range(jnp.min, x, spec), _per_range(jnp.max, x, spec)

    @jax.jit
    def objectives(factors):
        def objective(factor):
            x_q = quantize_to_range(x, factor * low, factor * high, bits=spec.bits)
            entropies = jnp.asarray(entropies_fn(x_q))
            return visual_encoder_objective(
                x, x_q, entropies, entropy_weight=entropy_weight, power=power
            )

        return jax.lax.map(objective, factors)

    factors = jnp.asarray(shrink, jnp.float32)
    values = objectives(factors)
    best = jnp.argmin(values)
    return BlockRanges(
        (factors[best] * low,),
        (factors[best] * high,),
        factors[best][None],
        values[best].astype(jnp.float32),
        len(shrink),
    )


def _per_range(function: Callable[..., Array], x: Array, spec: QuantSpec) -> Array:
    """A reduction over the entries that share a range."""
    axes = spec.resolve(x.ndim).axes
    shared = tuple(axis for axis in range(-x.ndim, 0) if axis not in axes)
    return function(x, axis=shared, keepdims=True)


def _check_search(x: ArrayLike, spec: QuantSpec, shrink: Sequence[float]) -> None:
    check_floating(inputs=x)
    if spec.symmetric or spec.granularity == "block":
        raise ValueError(f"spec must be asymmetric, with a range per tensor or channel, got {spec}")
    if not len(shrink):
        raise ValueError("shrink must hold at least one factor, got none")
    check_interval(0, 1, closed="right", shrink=np.asarray(shrink))
    if not jnp.size(x):
        raise ValueError(f"inputs must have entries, got shape {jnp.shape(x)}")
    if not isinstance(x, jax.core.Tracer) and not jnp.all(jnp.isfinite(jnp.asarray(x))):
        raise ValueError("inputs must be finite, got NaN or infinite entries")
