"""NUPES: codes and exponent of power quantization, learned from the outputs of a layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.quantization.power import (
    PowerTensor,
    power_quantize,
    power_transform,
    search_power_exponent,
)
from jaxref.quantization.reconstruction import (
    LayerFn,
    as_qtensor,
    check_spec,
    check_steps,
    checked_layer,
    linear,
    minimize_keeping_best,
)
from jaxref.quantization.tensor import QuantSpec
from jaxref.quantization.uniform import _per_entry


class NupesResult(NamedTuple):
    """A weight quantized by a learned power.

    Attributes:
      weight: the `PowerTensor`.
      loss: the mean squared error of the outputs on all inputs.
      initial_loss: that of the data-free start.

    Reference: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power
    Exponent Search", 2023, arXiv:2308.05600.
    """

    weight: PowerTensor
    loss: Array
    initial_loss: Array


def nupes_quantize(
    weight: ArrayLike,
    inputs: ArrayLike,
    targets: ArrayLike,
    spec: QuantSpec,
    *,
    key: Array,
    bias: ArrayLike | None = None,
    layer_fn: LayerFn = linear,
    exponent: ArrayLike | None = None,
    learn_exponent: bool = True,
    learn_weights: bool = True,
    learning_rate: float = 1e-2,
    exponent_learning_rate: float = 1e-3,
    bounds: tuple[float, float] = (0.05, 1.5),
    steps: int = 1000,
    batch_size: int = 32,
) -> NupesResult:
    r"""Learns where among all levels each weight goes, and the power that spaces the levels.

    With m the largest |w| that shares a scale, L = 2^(b-1) - 1, f the layer, and V one real number
    for each weight that may go anywhere in [-L, L],

        min over V, a of   mean (f(Ŵ, b, X) - Y)²,   Ŵ = sign(q) m (|q| / L)^(1/a),   q = round(V)

    by Adam on random batches, from V = sign(W) L (|W| / m)^a. The largest level is m whatever the
    exponent: the scale s = m^a / L goes with a. Rounding has the gradient of the identity, so that

        ∂Ŵ/∂V = m / (a L) · (max(|q|, 1/2) / L)^(1/a - 1)
        ∂Ŵ/∂a = -Ŵ log(|q| / L) / a²,   and 0 at q = 0

    where 1/2 lets codes leave 0. V and a are kept within their ranges. Every tenth step, and at the
    last, the loss is taken on all examples, and the best of all iterates is returned, the start
    among them, which is `power_quantize`.

    Args:
      weight: floating point and finite, `[in, out]` unless `layer_fn` says otherwise.
      inputs: X, `[examples, ...]`, for a linear layer `[examples, ..., in]`.
      targets: Y, `[examples, ..., out]`: outputs of the layer as it was.
      spec: format and granularity of the weight, a symmetric `QuantSpec`.
      key: for the batches.
      bias: what `layer_fn` takes as its second argument. Default: None.
      layer_fn: f as `f(weight, bias, inputs)`, a function with a name (jit caches by it). Default:
        the linear layer.
      exponent: a to start from, one number within the bounds. Default: `search_power_exponent`.
      learn_exponent: whether to learn a. Default True.
      learn_weights: whether to learn V; otherwise codes stay, and the levels move. Default True.
      learning_rate: that of V, at least 0, in levels. Default 10⁻².
      exponent_learning_rate: that of a, at least 0. Default 10⁻³.
      bounds: the least and the largest exponent, positive. Default (0.05, 1.5).
      steps: at least 0. Default 1000.
      batch_size: examples in a step, drawn at random. Default 32.

    Returns:
      A `NupesResult`; its weight has the type of `weight`, and `loss <= initial_loss`.

    Raises:
      ValueError: shapes that do not fit, no examples, NaN or infinite entries (not under jit), an
        asymmetric spec, or a number out of range.
      TypeError: arrays not floating point, or a `spec` that is none.

    `adaptive_rounding` with an exponent chooses between the two nearest levels only, which the
    uneven ones of a power make a narrow choice for small weights. Straight-through rounding of the
    codes, with its slope at 0, and the learning rates are choices made here.

    Cost: `steps` forward and backward passes of the layer on `batch_size` examples, every tenth
    step a forward one on all; first 122 roundings for the exponent.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 2)) @ jnp.ones((2, 8))
      >>> w = jax.random.laplace(jax.random.key(1), (8, 4))
      >>> learned = nupes_quantize(w, x, x @ w, QuantSpec(bits=3), steps=100, key=jax.random.key(2))
      >>> bool(learned.loss < learned.initial_loss)
      True

    Reference: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power
    Exponent Search", 2023, arXiv:2308.05600.
    """
    check_spec(spec=spec)
    if not spec.symmetric:
        raise ValueError("spec must be symmetric, got symmetric=False")
    wide, bias, inputs, targets = checked_layer(weight, bias, inputs, targets, layer_fn)
    check_steps(steps=steps, batch_size=batch_size)
    check_interval(0, jnp.inf, learning_rate=learning_rate)
    check_interval(0, jnp.inf, exponent_learning_rate=exponent_learning_rate)
    check_interval(0, jnp.inf, closed="neither", bounds=bounds)
    if exponent is None:
        exponent = search_power_exponent(wide, spec, bounds=bounds)
    else:
        check_shape((), exponent=exponent)
        check_interval(*bounds, exponent=exponent)
    return _nupes(
        wide,
        bias,
        inputs,
        targets,
        jnp.asarray(exponent, wide.dtype),
        {
            "codes": learning_rate * learn_weights,
            "exponent": exponent_learning_rate * learn_exponent,
        },
        tuple(bounds),
        key,
        spec=spec.resolve(wide.ndim),
        dtype=jnp.result_type(weight),
        layer_fn=layer_fn,
        steps=steps,
        batch_size=batch_size,
    )


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "layer_fn", "steps", "batch_size"))
def _nupes(
    weight: Array,
    bias: Array | None,
    inputs: Array,
    targets: Array,
    exponent: Array,
    rates: dict[str, Array],
    bounds: tuple[float, float],
    key: Array,
    *,
    spec: QuantSpec,
    dtype: Any,
    layer_fn: LayerFn,
    steps: int,
    batch_size: int,
) -> NupesResult:
    levels = spec.code_range[1]
    start = power_quantize(weight, exponent, spec).transformed
    ends = power_transform(start.scale * levels, 1 / exponent)  # m of every group
    largest = _per_entry(ends, weight.shape, spec)
    position = power_transform(weight, exponent) / _per_entry(start.scale, weight.shape, spec)

    def objective(params: dict[str, Array], inputs: Array, targets: Array) -> Array:
        q, inverse = jnp.round(params["codes"]), 1 / params["exponent"]
        quantized = power_transform(q / levels, inverse)
        # At q = 0 the slope of the power is 0, and the code could never leave.
        away = jnp.maximum(jnp.abs(q), 0.5) / levels
        slope = jax.lax.stop_gradient(inverse * away ** (inverse - 1) / levels)
        quantized += slope * (params["codes"] - jax.lax.stop_gradient(params["codes"]))
        quantized *= largest
        return jnp.mean(jnp.square(layer_fn(quantized, bias, inputs) - targets))

    def project(params: dict[str, Array]) -> dict[str, Array]:
        return {
            "codes": jnp.clip(params["codes"], -levels, levels),
            "exponent": jnp.clip(params["exponent"], *bounds),
        }

    best, loss, initial_loss = minimize_keeping_best(
        objective,
        project({"codes": position, "exponent": exponent}),
        rates,
        inputs,
        targets,
        steps=steps,
        batch_size=batch_size,
        key=key,
        project=project,
    )
    scale = power_transform(ends, best["exponent"]) / levels
    q = as_qtensor(jnp.round(best["codes"]), scale, None, spec, dtype)
    return NupesResult(PowerTensor(q, best["exponent"]), loss, initial_loss)
