"""Blocks of a network rebuilt as they are quantized, from the outputs that they had (GENIE-M).

Kernels are `[..., in, out]` as in flax, linear or of convolutions, and channels come last.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.adaptive_rounding import rectified_sigmoid, rounding_regularizer
from jaxref.quantization.genie import (
    GenieActivation,
    GenieWeight,
    genie_quantize,
    genie_soft_weight,
)
from jaxref.quantization.gptq import check_finite
from jaxref.quantization.quantization_aware import learned_step_quantize
from jaxref.quantization.reconstruction import check_steps, random_batches
from jaxref.quantization.tensor import QTensor
from jaxref.quantization.uniform import dequantize

Quantize = Callable[[str, Array], Array]
BlockFn = Callable[[Any, Array, Quantize], Array]

_WARM_UP = 0.2  # of the steps, without the regularizer
_BETAS = (20.0, 2.0)  # its powers, from the end of the warm-up to the last step


class GenieBlock(NamedTuple):
    """A block that was rebuilt.

    Attributes:
      weights: the tree of weights, as `QTensor`s.
      activations: by name, a `GenieActivation` with the step that was learned.
      loss: the squared error of the outputs, from all of the quantized inputs.
      initial_loss: that of the nearest levels and the first steps, where it began.

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """

    weights: Any
    activations: dict[str, GenieActivation]
    loss: Array
    initial_loss: Array


def genie_block(
    block_fn: BlockFn, weights: Any, activations: dict[str, GenieActivation], inputs: ArrayLike
) -> Array:
    """The outputs of a quantized block.

    Args:
      block_fn: as in `genie_reconstruct`.
      weights: a tree of `QTensor`s, of a `GenieBlock` for one.
      activations: by name, their levels.
      inputs: what the block takes.

    Returns:
      What `block_fn` returns: the quantized inputs of the next block.

    Raises:
      ValueError: the block quantizes activations that `activations` does not have.

    Use it after `genie_reconstruct`, to run a block as it was rebuilt and to make the quantized
    inputs that the next one is fitted from.

    Cost: one run of the block, with all of its weights dequantized at each call.

    Example:
      >>> from jaxref.quantization import QuantSpec, quantize
      >>> block_fn = lambda weights, x, quantize: quantize("inputs", x) @ weights
      >>> levels = {"inputs": GenieActivation(jnp.array(0.5), bits=2, signed=False)}
      >>> weights = quantize(jnp.array([[2.0], [1.0]]), QuantSpec(bits=3))
      >>> print(genie_block(block_fn, weights, levels, jnp.array([[0.6, 7.0]])))
      [[3.]]

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """
    arrays = jax.tree.map(dequantize, weights, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return block_fn(arrays, jnp.asarray(inputs), functools.partial(_quantized, activations))


def _quantized(activations: dict[str, GenieActivation], name: str, x: Array) -> Array:
    if name not in activations:
        raise ValueError(f"activations must have levels for {name!r}, got {[*activations]}")
    levels = activations[name]
    return learned_step_quantize(x, levels.step, bits=levels.bits, signed=levels.signed)


def genie_reconstruct(
    block_fn: BlockFn,
    weights: Any,
    activations: dict[str, GenieActivation],
    inputs: ArrayLike,
    quantized_inputs: ArrayLike,
    targets: ArrayLike,
    *,
    key: Array,
    steps: int = 20_000,
    batch_size: int = 32,
    round_weight: float = 1.0,
    drop_probability: float = 0.5,
    lr_rounding: float = 1e-3,
    lr_weight_scale: float = 1e-4,
    lr_activation_scale: float = 4e-5,
) -> GenieBlock:
    r"""Learns rounding and scales of a block's weights, and its activations' steps, together.

        min over V, s and steps of   mean Σ_channels (f(Ŵ, x̃) - y)² + λ Σ 1 - |2 h(V) - 1|^β

    with Ŵ the `genie_soft_weight`s, and x̃ the quantized inputs where each entry is the
    full-precision one instead with some probability (QDrop); activations within the block are left
    as they are with the same probability. The regularizer begins after a fifth of the steps, and β
    falls from 20 then to 2 in the end. Adam; the rates of scales and steps fall to 0 as a cosine.
    At last V decides: up where it is at least 0.

    Args:
      block_fn: f as `block_fn(weights, x, quantize)`, a function with a name (jit caches by it, and
        with it the arrays that it closes over: biases, norms). It gets the tree of arrays for
        `weights`, and calls `quantize(name, activation)` where activations are quantized; one name,
        one step.
      weights: a tree of `GenieWeight`s, one at least. What is not to be quantized stays in f.
      activations: by name, the levels to begin with; {} for none.
      inputs: x, floating point `[examples, ...]`, the block's in the full-precision network.
      quantized_inputs: of the same shape, what the blocks before give as they are quantized
        (`genie_block`).
      targets: y, `[examples, ..., channels]`, the full-precision block's outputs.
      key: for batches and dropping.
      steps: at least 0. Default 20 000.
      batch_size: examples in a step, drawn at random. Default 32.
      round_weight: λ at least 0. Default 1.
      drop_probability: in [0, 1). Default 0.5.
      lr_rounding: the rate of V, at least 0. Default 10⁻³.
      lr_weight_scale: that of s, in its own units. Default 10⁻⁴. With 0 it is AdaRound, which
        learns the rounding alone.
      lr_activation_scale: that of the activations' steps. Default 4 · 10⁻⁵.

    Returns:
      A `GenieBlock`.

    Raises:
      ValueError: shapes that do not fit, no examples, no weights, NaN or infinite entries (not
        under jit), activations without levels, or a number out of range.
      TypeError: arrays not floating point, or weights that are no `GenieWeight`s.

    Block after block from the first to the last, a residual block or a layer each, on some thousand
    images; with those of `genie_distill` no data is needed at all. Scales that are learned make up
    for what quantization does to the inputs; where these are exact, a rate of 0 may lose less.
    `adaptive_rounding` does a single layer whose activations stay, and `adaquant` lets a weight go
    further than to its two neighbours.

    Cost: `steps` forward and backward passes of the block on `batch_size` examples, two forward
    ones on all; V, s and steps with two moments each.

    Example:
      >>> from jaxref.quantization import QuantSpec, genie_weight_quantizer_init
      >>> x = jax.nn.relu(jax.random.normal(jax.random.key(0), (64, 8)) + 0.5)
      >>> w = jax.random.normal(jax.random.key(1), (8, 16))
      >>> def block_fn(weights, x, quantize):
      ...     return x @ weights["kernel"]
      >>> spec = QuantSpec(bits=3, granularity="channel", axis=1, symmetric=False)
      >>> weights = {"kernel": genie_weight_quantizer_init(w, spec)}
      >>> block = genie_reconstruct(
      ...     block_fn, weights, {}, x, 0.8 * x, x @ w, steps=100, lr_rounding=0.02,
      ...     lr_weight_scale=0.003, key=jax.random.key(2))
      >>> bool(block.loss < 0.6 * block.initial_loss)
      True

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780;
    dropping by Wei et al., "QDrop", 2022, arXiv:2203.05740.
    """
    states = jax.tree.leaves(weights, is_leaf=_is_state)
    if not states:
        raise ValueError("weights must have a GenieWeight at least, got none")
    for state in states:
        if not _is_state(state):
            raise TypeError(f"weights must be GenieWeights, got {type(state).__name__}")
    arrays = {"inputs": inputs, "quantized_inputs": quantized_inputs, "targets": targets}
    check_floating(**arrays)
    check_shape(jnp.shape(inputs), quantized_inputs=quantized_inputs)
    wide = {name: jnp.asarray(array).astype(compute_dtype(array)) for name, array in arrays.items()}
    check_finite(**wide)
    if not jnp.ndim(inputs) or not jnp.shape(inputs)[0]:
        raise ValueError(f"inputs must have at least one example, got shape {jnp.shape(inputs)}")
    check_steps(steps=steps, batch_size=batch_size)
    check_interval(0, jnp.inf, round_weight=round_weight)
    check_interval(0, 1, closed="left", drop_probability=drop_probability)
    check_interval(0, jnp.inf, lr_rounding=lr_rounding, lr_weight_scale=lr_weight_scale)
    check_interval(0, jnp.inf, lr_activation_scale=lr_activation_scale)

    def outputs(weights: Any, x: Array) -> Array:
        soft = jax.tree.map(genie_soft_weight, weights, is_leaf=_is_state)
        return block_fn(soft, x, functools.partial(_quantized, activations))

    check_shape(jax.eval_shape(outputs, weights, wide["quantized_inputs"]).shape, targets=targets)
    return _reconstruct(
        weights,
        activations,
        wide,
        {
            "round_weight": round_weight,
            "drop": drop_probability,
            "rounding": lr_rounding,
            "scale": lr_weight_scale,
            "step": lr_activation_scale,
        },
        key,
        block_fn=block_fn,
        steps=steps,
        batch_size=batch_size,
    )


@functools.partial(jax.jit, static_argnames=("block_fn", "steps", "batch_size"))
def _reconstruct(
    weights: Any,
    activations: dict[str, GenieActivation],
    arrays: dict[str, Array],
    numbers: dict[str, ArrayLike],
    key: Array,
    *,
    block_fn: BlockFn,
    steps: int,
    batch_size: int,
) -> GenieBlock:
    def of_weights(function: Callable[..., Any], *trees: Any) -> Any:
        return jax.tree.map(function, weights, *trees, is_leaf=_is_state)

    params = {
        "rounding": of_weights(lambda w: w.rounding),
        "scale": of_weights(lambda w: w.scale),
        "step": {name: levels.step for name, levels in activations.items()},
    }

    def states(params: dict[str, Any]) -> tuple[Any, dict[str, GenieActivation]]:
        learned = of_weights(
            lambda w, rounding, scale: dataclasses.replace(w, rounding=rounding, scale=scale),
            params["rounding"],
            params["scale"],
        )
        levels = {
            name: dataclasses.replace(old, step=params["step"][name])
            for name, old in activations.items()
        }
        return learned, levels

    def objective(params: dict[str, Any], batch: Array, key: Array, count: Array) -> Array:
        learned, levels = states(params)
        calls = itertools.count(1)

        def dropped(full: Array, rounded: Array, call: int) -> Array:
            drawn = jax.random.bernoulli(jax.random.fold_in(key, call), numbers["drop"], full.shape)
            return jnp.where(drawn, full, rounded)

        def quantize_some(name: str, x: Array) -> Array:
            return dropped(x, _quantized(levels, name, x), next(calls))

        soft = jax.tree.map(genie_soft_weight, learned, is_leaf=_is_state)
        x = dropped(arrays["inputs"][batch], arrays["quantized_inputs"][batch], 0)
        error = _squared_error(block_fn(soft, x, quantize_some), arrays["targets"][batch])
        progress = (count - _WARM_UP * steps) / ((1 - _WARM_UP) * steps)
        beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * jnp.clip(progress, 0, 1)
        undecided = sum(
            rounding_regularizer(rectified_sigmoid(v), beta)
            for v in jax.tree.leaves(params["rounding"])
        )
        return error + jnp.where(progress >= 0, numbers["round_weight"], 0.0) * undecided

    adam = optax.scale_by_adam()

    def step(carry: Any, drawn: tuple[Array, Array, Array]) -> tuple[Any, None]:
        params, state = carry
        updates, state = adam.update(jax.grad(objective)(params, *drawn), state)
        falling = (1 + jnp.cos(jnp.pi * (drawn[-1] - 1) / steps)) / 2
        decay: dict[str, Any] = {"rounding": 1.0, "scale": falling, "step": falling}
        params = {
            name: optax.tree.add_scale(part, -decay[name] * numbers[name], updates[name])
            for name, part in params.items()
        }
        return (params | {"scale": jax.tree.map(_positive, params["scale"])}, state), None

    def hardened(params: dict[str, Any]) -> tuple[Any, dict[str, GenieActivation], Array]:
        learned, levels = states(params)
        rounded = jax.tree.map(genie_quantize, learned, is_leaf=_is_state)
        outputs = genie_block(block_fn, rounded, levels, arrays["quantized_inputs"])
        return rounded, levels, _squared_error(outputs, arrays["targets"])

    *_, initial_loss = hardened(params)
    batch_key, key = jax.random.split(key)
    batches = random_batches(batch_key, arrays["inputs"].shape[0], batch_size, steps)
    drawn = (batches, jax.random.split(key, steps), jnp.arange(1, steps + 1))
    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), drawn)
    return GenieBlock(*hardened(params), initial_loss)


def _positive(scale: Array) -> Array:
    return jnp.maximum(scale, 2.0 * jnp.finfo(scale.dtype).tiny)


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, GenieWeight)


def _squared_error(outputs: Array, targets: Array) -> Array:
    """Summed over the channels, the mean over all else."""
    return jnp.mean(jnp.sum(jnp.square(outputs - targets), axis=-1))
