"""Calibration layer by layer: AdaQuant, and the statistics of outputs put right.

Kernels are `[in, out]` as in flax; the paper writes the transpose. Its light pipeline is
`allocate_bits_integer_program` and then `para_normalization` or `bias_correction`; its advanced one
has `adaquant` between the two.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.reconstruction import (
    LayerFn,
    as_qtensor,
    check_spec,
    check_steps,
    checked_layer,
    linear,
    minimize_keeping_best,
    round_straight_through,
)
from jaxref.quantization.tensor import QTensor, QuantSpec
from jaxref.quantization.uniform import _per_entry, dequantize, quantize

_SMALLEST_RANGE = 1e-6


class AdaQuantLayer(NamedTuple):
    """A calibrated layer.

    Attributes:
      weight: the `QTensor`.
      bias: the bias as it was learned; None if there is none.
      input_scale: the step of the inputs' levels, an array of as many axes as an input; None if
        inputs are not quantized.
      input_zero_point: the code of 0 likewise; None for symmetric levels.
      loss: the mean squared error of the outputs on all calibration data.
      initial_loss: that of the nearest levels between the extremes, where calibration began.

    Reference: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural
    Quantization: Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518.
    """

    weight: QTensor
    bias: Array | None
    input_scale: Array | None
    input_zero_point: Array | None
    loss: Array
    initial_loss: Array


def adaquant(
    weight: ArrayLike,
    bias: ArrayLike | None,
    inputs: ArrayLike,
    targets: ArrayLike,
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None = None,
    *,
    key: Array,
    layer_fn: LayerFn = linear,
    steps: int = 1000,
    batch_size: int = 50,
    lr_weight: float = 1e-5,
    lr_bias: float = 1e-3,
    lr_weight_scale: float = 1e-3,
    lr_input_scale: float = 1e-1,
) -> AdaQuantLayer:
    r"""Fits weights, bias and all levels of a quantized layer to its outputs (AdaQuant).

    With Q the quantizer of each spec, X the inputs and Y the outputs of the layer f as it was,

        min over W, b, r_W, r_X of   mean (f(Q_W(W), b, Q_X(X)) - Y)²
        Q(v) = s (clip(round(v / s + z), q_min, q_max) - z)

    by Adam on random batches, each of the four with its own learning rate. Rounding has the
    gradient of the identity, so a weight may go as many levels as serves the outputs, where
    `adaptive_rounding` gives it two. The levels of every group that shares a scale are learned by
    the end or ends of their range r:

        symmetric:   s = range / q_max                  asymmetric:  s = range / (q_max - q_min)
                                                                     z = round(q_min - low / s)

    It starts from the extremes of the data. Every tenth step, and at the last, the loss is taken
    on all examples, and the best of all iterates is returned, the start among them.

    Args:
      weight: floating point and finite, `[in, out]` unless `layer_fn` says otherwise.
      bias: what `layer_fn` takes as its second argument, or None.
      inputs: X, `[examples, ...]`, for a linear layer `[examples, ..., in]`: the full-precision
        network's, or those that the quantized layers before it give (see `sequential_adaquant`).
      targets: Y, `[examples, ..., out]`, the full-precision outputs.
      weight_spec: format and granularity of the weight, a `QuantSpec`. The paper has one range per
        output channel: granularity "channel", axis 1.
      input_spec: those of the inputs, of granularity "tensor" or "channel" along an axis that is
        not the examples'. Default: None, inputs are not quantized.
      key: for the batches.
      layer_fn: f as `f(weight, bias, inputs)`, a function with a name (jit caches by it). Where a
        ReLU follows, put it into f, so that errors below it do not count. Default: linear.
      steps: at least 0. Default 1000.
      batch_size: examples in a step, drawn at random. Default 50.
      lr_weight, lr_bias, lr_weight_scale, lr_input_scale: learning rates, at least 0, in units of
        the weights, biases, and of the ends of their ranges and of the inputs'. Default 10⁻⁵,
        10⁻³, 10⁻³, 10⁻¹, the authors', for 8 bits and networks with batch normalization; other
        sizes of weights and inputs, and fewer bits, want others. With all of them 0 but
        `lr_bias`, the biases alone are tuned.

    Returns:
      An `AdaQuantLayer`; its weight has the type of `weight`.

    Raises:
      ValueError: shapes that do not fit, no examples, NaN or infinite entries (not under jit), an
        `input_spec` with blocks or scales along the examples, or a number out of range.
      TypeError: arrays not floating point, or a spec that is none.

    A layer takes seconds and 50 to 1000 examples. With few of them and few bits it overfits less
    than its freedom suggests, as the start is near; `gptq_quantize` has fewer knobs but cannot
    learn the levels of the inputs.

    Cost: `steps` forward and backward passes of the layer on `batch_size` examples, and every tenth
    step a forward pass over all of them.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 2)) @ jnp.array([[1.0] * 4, [0.0, 1, 0, 1]])
      >>> w = jnp.array([[3.0], [1.4], [0.4], [1.3]])
      >>> options = {"lr_weight": 0.01, "steps": 100, "key": jax.random.key(1)}
      >>> layer = adaquant(w, None, x, x @ w, QuantSpec(bits=3), **options)
      >>> bool(layer.loss < 0.5 * layer.initial_loss)
      True

    Reference: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural
    Quantization: Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518.
    """
    check_spec(weight_spec=weight_spec)
    wide, bias, inputs, targets = checked_layer(weight, bias, inputs, targets, layer_fn)
    check_steps(steps=steps, batch_size=batch_size)
    rates = {"weight": lr_weight, "bias": lr_bias, "weight_range": lr_weight_scale}
    rates["input_range"] = lr_input_scale
    check_interval(0, jnp.inf, lr_weight=lr_weight, lr_bias=lr_bias)
    check_interval(0, jnp.inf, lr_weight_scale=lr_weight_scale, lr_input_scale=lr_input_scale)
    if input_spec is not None:
        check_spec(input_spec=input_spec)
        input_spec = input_spec.resolve(inputs.ndim)
        if input_spec.block_size is not None or -inputs.ndim in input_spec.axes:
            raise ValueError(
                "input_spec must have granularity 'tensor', or 'channel' along an axis that is not "
                f"the examples', got {input_spec}"
            )
    return _adaquant(
        wide,
        bias,
        inputs,
        targets,
        rates,
        key,
        weight_spec=weight_spec.resolve(wide.ndim),
        input_spec=input_spec,
        dtype=jnp.result_type(weight),
        layer_fn=layer_fn,
        steps=steps,
        batch_size=batch_size,
    )


@functools.partial(
    jax.jit,
    static_argnames=("weight_spec", "input_spec", "dtype", "layer_fn", "steps", "batch_size"),
)
def _adaquant(
    weight: Array,
    bias: Array | None,
    inputs: Array,
    targets: Array,
    rates: dict[str, Array],
    key: Array,
    *,
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
    dtype: Any,
    layer_fn: LayerFn,
    steps: int,
    batch_size: int,
) -> AdaQuantLayer:
    params: dict[str, Any] = {"weight": weight, "weight_range": _range(weight, weight_spec)}
    if bias is not None:
        params["bias"] = bias
    if input_spec is not None:
        params["input_range"] = _range(inputs, input_spec)

    def objective(params: dict[str, Any], inputs: Array, targets: Array) -> Array:
        codes, scale, zero_point = _learned_codes(
            params["weight"], params["weight_range"], weight_spec
        )
        quantized = _values(codes, scale, zero_point, weight_spec)
        if input_spec is not None:
            inputs = _values(*_learned_codes(inputs, params["input_range"], input_spec), input_spec)
        return jnp.mean(jnp.square(layer_fn(quantized, params.get("bias"), inputs) - targets))

    best, loss, initial_loss = minimize_keeping_best(
        objective,
        params,
        {name: jax.tree.map(lambda _, name=name: rates[name], params[name]) for name in params},
        inputs,
        targets,
        steps=steps,
        batch_size=batch_size,
        key=key,
    )
    codes, scale, zero_point = _learned_codes(best["weight"], best["weight_range"], weight_spec)
    input_scale, input_zero_point = None, None
    if input_spec is not None:
        input_scale, input_zero_point = _scale_and_zero_point(best["input_range"], input_spec)
    return AdaQuantLayer(
        as_qtensor(codes, scale, zero_point, weight_spec, dtype),
        best.get("bias"),
        input_scale,
        input_zero_point if input_zero_point is None else input_zero_point.astype(jnp.int8),
        loss,
        initial_loss,
    )


def _range(x: Array, spec: QuantSpec) -> dict[str, Array]:
    """The range of every group from the scales of `quantize`: its size, and its lower end."""
    q = quantize(x, spec)
    q_min, q_max = spec.code_range
    if q.zero_point is None:
        return {"size": q.scale * q_max}
    return {"size": q.scale * (q_max - q_min), "low": q.scale * (q_min - q.zero_point)}


def _scale_and_zero_point(ends: dict[str, Array], spec: QuantSpec) -> tuple[Array, Array | None]:
    q_min, q_max = spec.code_range
    size = jnp.maximum(ends["size"], _SMALLEST_RANGE)
    if spec.symmetric:
        return size / q_max, None
    scale = size / (q_max - q_min)
    zero_point = round_straight_through(q_min - ends["low"] / scale)
    return scale, jnp.clip(zero_point, q_min, q_max)


def _learned_codes(
    x: Array, ends: dict[str, Array], spec: QuantSpec
) -> tuple[Array, Array, Array | None]:
    """Codes, scale and zero point, differentiable in x and in the ends of the range."""
    scale, zero_point = _scale_and_zero_point(ends, spec)
    position = x / _per_entry(scale, x.shape, spec)
    if zero_point is not None:
        position += _per_entry(zero_point, x.shape, spec)
    codes = round_straight_through(jnp.clip(position, *spec.code_range))
    return codes, scale, zero_point


def _values(codes: Array, scale: Array, zero_point: Array | None, spec: QuantSpec) -> Array:
    if zero_point is not None:
        codes = codes - _per_entry(zero_point, codes.shape, spec)
    return codes * _per_entry(scale, codes.shape, spec)


def adaquant_inputs(layer: AdaQuantLayer, inputs: ArrayLike, input_spec: QuantSpec) -> Array:
    r"""The inputs of a calibrated layer on the levels that it learned for them.

        x̂ = s (clip(round(x / s + z), q_min, q_max) - z)

    Args:
      layer: what `adaquant` returned with this `input_spec`.
      inputs: floating point, as the layer takes them.
      input_spec: the `QuantSpec` of the inputs.

    Returns:
      x̂ with the shape and type of `inputs`.

    Raises:
      ValueError: the layer was calibrated without levels for its inputs.
      TypeError: `inputs` not floating point, or `input_spec` not a `QuantSpec`.

    Use it before a calibrated layer wherever that runs: its weights and biases were fitted to
    inputs on these levels, not to those of `quantize`.

    Cost: one elementwise pass over the inputs.

    Example:
      >>> spec = QuantSpec(bits=8, symmetric=False)
      >>> x = jnp.linspace(0.0, 2.55, 256)[:, None]
      >>> layer = adaquant(jnp.ones((1, 2)), None, x, x * jnp.ones(2), spec, spec, steps=0,
      ...                  key=jax.random.key(0))
      >>> print(adaquant_inputs(layer, jnp.array([[0.007], [3.0]]), spec).ravel().round(3))
      [0.01 2.55]

    Reference: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural
    Quantization: Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518.
    """
    check_spec(input_spec=input_spec)
    check_floating(inputs=inputs)
    if layer.input_scale is None:
        raise ValueError("layer must have levels for its inputs, got input_scale=None")
    inputs = jnp.asarray(inputs)
    position = inputs.astype(compute_dtype(inputs)) / layer.input_scale
    zero_point = 0 if layer.input_zero_point is None else layer.input_zero_point
    codes = jnp.clip(jnp.round(position + zero_point), *input_spec.code_range)
    return ((codes - zero_point) * layer.input_scale).astype(inputs.dtype)


def sequential_adaquant(
    layers: Sequence[tuple[LayerFn, ArrayLike, ArrayLike | None]],
    inputs: ArrayLike,
    weight_spec: QuantSpec | Sequence[QuantSpec],
    input_spec: QuantSpec | None = None,
    *,
    key: Array,
    parallel: bool = False,
    **options: Any,
) -> list[AdaQuantLayer]:
    r"""`adaquant` for layers that follow each other.

    With X_0 the inputs and f_l the layers, targets are those of the full-precision network,

        X_l = f_l(W_l, b_l, X_{l-1}),   X̂_l = f_l(Ŵ_l, b̂_l, Q(X̂_{l-1}))

    and layer l is fitted from X̂_{l-1} to X_l, so that it makes up for the errors of those before
    it. In parallel, it is fitted from X_{l-1} to X_l.

    Args:
      layers: for each layer `(layer_fn, weight, bias)` as in `adaquant`, the first argument the
        layer with what follows up to the next one (its ReLU, say).
      inputs: X_0, `[examples, ...]`.
      weight_spec: a `QuantSpec` for all weights, or one for each, as the integer programme chose.
      input_spec: that of the inputs of every layer, or None.
      key: for the batches.
      parallel: whether layers see full-precision inputs, and so do not depend on each other.
        Default False.
      **options: `steps`, `batch_size` and learning rates of `adaquant`.

    Returns:
      An `AdaQuantLayer` for each layer.

    Raises:
      ValueError: no layers, specs for another number of them, or what `adaquant` raises.

    Sequential is more accurate, most of all in few bits and with small networks; parallel runs each
    layer by itself, and allows any choice of widths among its results afterwards.

    Cost: an `adaquant` for each layer and two runs of the network over all examples; with
    `parallel` too, layers are fitted one after the other.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (20, 4))
      >>> relu = lambda weight, bias, x: jax.nn.relu(x @ weight)
      >>> layers = [(relu, jnp.eye(4), None), (relu, jnp.ones((4, 2)), None)]
      >>> fitted = sequential_adaquant(layers, x, QuantSpec(bits=4), steps=0, key=jax.random.key(1))
      >>> [layer.weight.shape for layer in fitted]
      [(4, 4), (4, 2)]

    Reference: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural
    Quantization: Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518.
    """
    if not layers:
        raise ValueError("layers must have at least one layer, got none")
    specs = [weight_spec] * len(layers) if isinstance(weight_spec, QuantSpec) else weight_spec
    if len(specs) != len(layers):
        raise ValueError(f"weight_spec must have one spec for each of {len(layers)} layers")
    full = quantized = jnp.asarray(inputs)
    fitted = []
    for (layer_fn, weight, bias), spec, layer_key in zip(
        layers, specs, jax.random.split(key, len(layers))
    ):
        targets = layer_fn(jnp.asarray(weight), None if bias is None else jnp.asarray(bias), full)
        layer = adaquant(
            weight,
            bias,
            full if parallel else quantized,
            targets,
            spec,
            input_spec,
            layer_fn=layer_fn,
            key=layer_key,
            **options,
        )
        if input_spec is not None:
            quantized = adaquant_inputs(layer, quantized, input_spec)
        quantized = layer_fn(dequantize(layer.weight), layer.bias, quantized)
        full = targets
        fitted.append(layer)
    return fitted


def para_normalization(
    outputs: ArrayLike, gamma: ArrayLike, beta: ArrayLike, *, epsilon: float = 1e-5
) -> tuple[Array, Array]:
    r"""Gives the channels of a quantized layer back the mean and deviation that they had.

    Batch normalization that was folded into a layer left outputs of mean β and deviation |γ|. With
    μ and σ² mean and variance of the outputs y after quantization,

        (y - μ) √(γ² + ε) / √(σ² + ε) + β  =  scale · y + shift

    Without quantization, that changes nothing.

    Args:
      outputs: y, floating point `[..., channels]`: the quantized layer's on calibration data.
      gamma: γ `[channels]`, the scale of the batch normalization that was folded.
      beta: β `[channels]`, its shift.
      epsilon: ε, positive. Default 10⁻⁵.

    Returns:
      `(scale, shift)`, each `[channels]` in at least float32, to be absorbed by the layer: scales
      of its weights (one per output channel) times `scale`, bias times `scale` plus `shift`. A
      channel that is constant keeps β.

    Raises:
      ValueError: shapes that do not match, no outputs, or an `epsilon` that is not positive.
      TypeError: arrays not floating point.

    For networks with batch normalization; others use `bias_correction`, which restores the mean
    alone. Layers in order, each with the ones before it corrected.

    Cost: two passes over the outputs, once; nothing in inference.

    Example:
      >>> y = jnp.array([[1.0], [3.0]])
      >>> scale, shift = para_normalization(y, jnp.array([2.0]), jnp.array([5.0]))
      >>> print((scale * y + shift).ravel().round(3))
      [3. 7.]

    Reference: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural
    Quantization: Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518.
    """
    check_floating(outputs=outputs, gamma=gamma, beta=beta)
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    if jnp.ndim(outputs) < 2 or jnp.size(outputs) == 0:
        raise ValueError(
            f"outputs must have shape [..., channels], at least one, got {jnp.shape(outputs)}"
        )
    y = jnp.asarray(outputs)
    check_shape(y.shape[-1:], gamma=gamma, beta=beta)
    dtype = compute_dtype(outputs, gamma, beta)
    y, gamma, beta = y.astype(dtype), jnp.asarray(gamma, dtype), jnp.asarray(beta, dtype)
    axes = tuple(range(y.ndim - 1))
    scale = jnp.sqrt((gamma**2 + epsilon) / (jnp.var(y, axis=axes) + epsilon))
    return scale, beta - scale * jnp.mean(y, axis=axes)


def bias_correction(outputs: ArrayLike, targets: ArrayLike) -> Array:
    r"""What to add to the biases of a quantized layer so that its outputs keep their means.

        Δb = mean(Y - Ŷ)  for each channel

    Args:
      outputs: Ŷ, floating point `[..., channels]`, of the quantized layer.
      targets: Y of the same shape, of the full-precision one.

    Returns:
      Δb `[channels]` in at least float32.

    Raises:
      ValueError: shapes that do not match, or no outputs.
      TypeError: arrays not floating point.

    The simplest repair, for any layer. `adaquant` with all learning rates 0 but `lr_bias` tunes the
    biases to the outputs themselves; `para_normalization` restores the deviations as well.

    Cost: one pass over the outputs, once; nothing in inference.

    Example:
      >>> print(bias_correction(jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.array([[2.0, 1.0]] * 2)))
      [0.5 1. ]

    Reference: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural
    Quantization: Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518.
    """
    check_floating(outputs=outputs, targets=targets)
    check_shape(jnp.shape(outputs), targets=targets)
    if jnp.ndim(outputs) < 2 or jnp.size(outputs) == 0:
        raise ValueError(
            f"outputs must have shape [..., channels], at least one, got {jnp.shape(outputs)}"
        )
    dtype = compute_dtype(outputs, targets)
    off = jnp.asarray(targets, dtype) - jnp.asarray(outputs, dtype)
    return jnp.mean(off, axis=tuple(range(off.ndim - 1)))
