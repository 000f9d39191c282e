"""Rounding that is learned from the outputs of a layer: the AdaRound family.

To round a weight down or up is a choice of one in two, made soft while gradients decide, by a few
examples. Kernels are `[in, out]` as in flax; papers write the transpose.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from jaxref.quantization.gptq import check_finite
from jaxref.quantization.power import PowerTensor, power_transform
from jaxref.quantization.reconstruction import (
    LayerFn,
    as_qtensor,
    check_spec,
    check_steps,
    checked_layer,
    linear,
    random_batches,
)
from jaxref.quantization.tensor import QTensor, QuantSpec
from jaxref.quantization.uniform import _per_entry, quantize

LOSSES = ("mse", "l1", "cosine", "kl")
VARIABLES = ("sigmoid", "softmax", "direct")

_WARM_UP = 0.2  # of the steps, without the regularizer
_BETAS = (20.0, 2.0)  # its powers, from the end of the warm-up to the last step


class AdaptiveRounding(NamedTuple):
    """A layer whose rounding was learned.

    Attributes:
      weight: the `QTensor`, or the `PowerTensor` if there was an exponent.
      bias: the bias, learned or as it came; None if there is none.
      loss: the reconstruction loss of this layer on all of the inputs.

    Reference: Yvinec, Dapogny, Bailly, "Gradient-Based Post-Training Quantization: Challenging the
    Status Quo", 2023, arXiv:2308.07662.
    """

    weight: QTensor | PowerTensor
    bias: Array | None
    loss: Array


def rectified_sigmoid(v: ArrayLike, *, low: float = -0.1, high: float = 1.1) -> Array:
    r"""A sigmoid that is stretched and then clipped, so that it reaches 0 and 1.

        h(v) = min(max((high - low) / (1 + e^(-v)) + low, 0), 1)

    Args:
      v: floating point, of any shape.
      low: below 0, or 0 for no stretch. Default -0.1.
      high: above 1, or 1. Default 1.1.

    Returns:
      h with the shape and type of `v`. Its gradient is 0 where it is clipped.

    Raises:
      ValueError: `low` above 0 or `high` below 1.
      TypeError: `v` not floating point.

    The soft choice between two levels of `adaptive_rounding`, and the gate of L0 regularization.

    Cost: elementwise.

    Example:
      >>> print(rectified_sigmoid(jnp.array([-9.0, 0.0, 1.0, 9.0])).round(4))
      [0.     0.5    0.7773 1.    ]

    Reference: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0
    Regularization", 2017, arXiv:1712.01312; for rounding in Nagel et al., "Up or Down? Adaptive
    Rounding for Post-Training Quantization", 2020, arXiv:2004.10568, and Yvinec, Dapogny, Bailly,
    "Gradient-Based Post-Training Quantization: Challenging the Status Quo", 2023, arXiv:2308.07662.
    """
    check_floating(v=v)
    check_interval(-jnp.inf, 0, low=low)
    check_interval(1, jnp.inf, high=high)
    v = jnp.asarray(v)
    stretched = (high - low) * jax.nn.sigmoid(v.astype(compute_dtype(v))) + low
    return jnp.clip(stretched, 0.0, 1.0).astype(v.dtype)


def rounding_regularizer(h: ArrayLike, beta: ArrayLike) -> Array:
    r"""How undecided soft roundings are: 0 for all of them at 0 or 1, their number for all at 1/2.

        R = Σ 1 - |2 h - 1|^β

    Args:
      h: floating point in [0, 1], of any shape.
      beta: β at least 1. A large one is flat but for the neighbourhood of 0 and 1, so that h may
        move; 2 pulls from everywhere.

    Returns:
      R, a scalar in the type of `h`, 0 without entries.

    Raises:
      ValueError: `beta` below 1.
      TypeError: `h` not floating point.

    Let β fall during the optimization, as `adaptive_rounding` does from 20 to 2.

    Cost: one pass over the entries.

    Example:
      >>> print(rounding_regularizer(jnp.array([0.0, 0.5, 0.75]), 2.0))
      1.75

    Reference: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    arXiv:2004.10568; studied in Yvinec, Dapogny, Bailly, "Gradient-Based Post-Training
    Quantization: Challenging the Status Quo", 2023, arXiv:2308.07662.
    """
    check_floating(h=h)
    check_interval(1, jnp.inf, beta=beta)
    h = jnp.asarray(h)
    distance = jnp.abs(2 * h.astype(compute_dtype(h)) - 1)
    return jnp.sum(1 - distance**beta).astype(h.dtype)


def adaptive_rounding(
    weight: ArrayLike,
    inputs: ArrayLike,
    targets: ArrayLike,
    spec: QuantSpec,
    *,
    key: Array,
    bias: ArrayLike | None = None,
    layer_fn: LayerFn = linear,
    loss: Literal["mse", "l1", "cosine", "kl"] = "mse",
    variable: Literal["sigmoid", "softmax", "direct"] = "sigmoid",
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    exponent: ArrayLike | None = None,
    where: ArrayLike | None = None,
    learn_bias: bool = False,
    learn_scale: bool = False,
    drop_probability: float = 0.0,
    full_precision_inputs: ArrayLike | None = None,
    noise: float = 0.0,
    regularization: float = 0.01,
    batch_size: int = 32,
    steps: int = 10_000,
) -> AdaptiveRounding:
    r"""Rounds each weight down or up, whichever serves the outputs of the layer.

    With the scale s and the zero point z of `quantize`, f the layer, X its inputs in the quantized
    network and Y its outputs in the full-precision one, the variable V solves

        min_V  loss(f(Ŵ, X), Y) + λ Σ 1 - |2 h(V) - 1|^β
        Ŵ = s (clip(⌊W / s⌋ + h(V) + z, q_min, q_max) - z)

    by gradients on random batches. It starts at h(V) = W/s - ⌊W/s⌋, where Ŵ = W within the range.
    The regularizer is off for the first fifth of the steps; then β falls from 20 to 2, steadily,
    and drives h to 0 or 1. At the end h is 1 where it is at least 1/2, and 0 elsewhere. The loss is
    the mean over examples (all axes but the last) of, for outputs o and targets y along the last,

        mse: ‖o - y‖²   l1: ‖o - y‖₁   cosine: 1 - o·y / (‖o‖ ‖y‖)   kl: KL(softmax y ‖ softmax o)

    With an exponent a, levels are those of `power_quantize`: sign(W) |W|^a takes the place of W,
    and the power 1/a of the levels that of Ŵ.

    Args:
      weight: floating point and finite, `[in, out]` unless `layer_fn` says otherwise.
      inputs: X, `[examples, ...]`, for a linear layer `[examples, ..., in]`: outputs of the layers
        before it as they are quantized, so that this layer makes up for their errors.
      targets: Y, `[examples, ..., out]`: outputs of the full-precision layer on the full-precision
        inputs; for "kl" logits.
      spec: format and granularity of the weight, a `QuantSpec`.
      key: for the batches, and for dropping and noise.
      bias: what `layer_fn` takes as its second argument. Default: None.
      layer_fn: f as `f(weight, bias, inputs)`, a function with a name (jit caches by it). Default:
        the linear layer. With what follows up to the end of a block, or of the network, the weight
        is fitted to the outputs there.
      loss: "mse" (default), "l1", "cosine", or "kl".
      variable: h(V): "sigmoid" (default), the `rectified_sigmoid`; "softmax", over two numbers for
        down and up; "direct", V itself, kept in [0, 1] after each step.
      optimizer: any optax transformation, of a dict with V as "rounding" and, where they are
        learned, "bias" and t as "log_factor". Default: Adam with learning rate 10⁻³.
      exponent: a, one positive number. Default: None, uniform levels.
      where: boolean, broadcastable to `weight`: the weights whose rounding is learned; all others
        go to the nearest level. Default: all.
      learn_bias: whether to learn the bias too, which must be given then. Default False.
      learn_scale: whether to learn the scales too, by a factor e^t each. ⌊W / s⌋ stays that of the
        first scale. Default False.
      drop_probability: in [0, 1), how often an entry of X is that of the full-precision inputs in
        its place, drawn anew at each step. Default 0.
      full_precision_inputs: the layer's inputs in the full-precision network, of the shape of
        `inputs`; needed to drop.
      noise: at least 0, the standard deviation of Gaussian noise that is added to X at each step,
        in units of that of each feature (last axis). Default 0.
      regularization: λ at least 0. Default 0.01.
      batch_size: examples in a step, drawn at random. Default 32.
      steps: at least 0. Default 10 000.

    Returns:
      An `AdaptiveRounding` of weight, bias and loss. No weight is off by more than s, and by s only
      if another level was nearer, unless scales were learned. The weight's type is kept.

    Raises:
      ValueError: shapes that do not fit, an unknown loss or variable, no examples, NaN or infinite
        entries (not under jit), `learn_bias` without bias, dropping without full-precision inputs,
        or a number out of range.
      TypeError: arrays not floating point, a `where` not boolean, a `spec` that is none.

    Which of the axes to turn depends on the network; defaults are those of AdaRound. To round to
    nearest needs no data and loses more, `gptq_quantize` is a closed form of the squared error
    without gradients, `adaquant` lets weights move further than the next level.

    Cost: `steps` forward and backward passes of the layer on `batch_size` examples, one forward
    pass on all; V (two arrays for "softmax") and the optimizer's state.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 1)) @ jnp.ones((1, 4))  # four equal inputs
      >>> w = jnp.array([[1.0], [0.46], [0.4], [0.34]])  # only their sum counts
      >>> spec, adam, key = QuantSpec(bits=2), optax.adam(0.03), jax.random.key(1)
      >>> learned = adaptive_rounding(w, x, x @ w, spec, optimizer=adam, steps=300, key=key)
      >>> print(quantize(w, spec).codes.ravel(), learned.weight.codes.ravel())
      [1 0 0 0] [1 1 0 0]

    Reference: Yvinec, Dapogny, Bailly, "Gradient-Based Post-Training Quantization: Challenging the
    Status Quo", 2023, arXiv:2308.07662; base problem by Nagel et al., "Up or Down? Adaptive
    Rounding for Post-Training Quantization", 2020, arXiv:2004.10568; dropping by Wei et al.,
    "QDrop", 2022, arXiv:2203.05740.
    """
    check_spec(spec=spec)
    wide_weight, bias, inputs, targets = checked_layer(weight, bias, inputs, targets, layer_fn)
    for name, value, known in (("loss", loss, LOSSES), ("variable", variable, VARIABLES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    check_steps(steps=steps, batch_size=batch_size)
    check_interval(0, 1, closed="left", drop_probability=drop_probability)
    check_interval(0, jnp.inf, noise=noise, regularization=regularization)
    if exponent is not None:
        check_shape((), exponent=exponent)
        check_interval(0, jnp.inf, closed="neither", exponent=exponent)
    if learn_bias and bias is None:
        raise ValueError("bias must be given with learn_bias, got None")
    if full_precision_inputs is not None:
        check_floating(full_precision_inputs=full_precision_inputs)
        check_shape(inputs.shape, full_precision_inputs=full_precision_inputs)
        full_precision_inputs = jnp.asarray(full_precision_inputs, inputs.dtype)
    elif isinstance(drop_probability, jax.core.Tracer) or drop_probability > 0:
        raise ValueError("full_precision_inputs must be given with drop_probability, got None")
    where = jnp.ones((), bool) if where is None else jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got {where.dtype.name}")
    check_broadcastable(wide_weight.shape, where=where)
    return _adaptive_rounding(
        wide_weight,
        bias,
        inputs,
        targets,
        full_precision_inputs,
        where,
        exponent,
        {"drop": drop_probability, "noise": noise, "regularization": regularization},
        key,
        spec=spec.resolve(wide_weight.ndim),
        dtype=jnp.result_type(weight),
        layer_fn=layer_fn,
        loss=loss,
        variable=variable,
        optimizer=optimizer,
        learned=(learn_bias, learn_scale),
        is_noisy=isinstance(noise, jax.core.Tracer) or bool(noise > 0),
        batch_size=batch_size,
        steps=steps,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("spec", "dtype", "layer_fn", "loss", "variable", "optimizer", "learned"),
        *("is_noisy", "batch_size", "steps"),
    ),
)
def _adaptive_rounding(
    weight: Array,
    bias: Array | None,
    inputs: Array,
    targets: Array,
    full_inputs: Array | None,
    where: Array,
    exponent: Array | None,
    strengths: dict[str, Array],
    key: Array,
    *,
    spec: QuantSpec,
    dtype: Any,
    layer_fn: LayerFn,
    loss: str,
    variable: str,
    optimizer: optax.GradientTransformation,
    learned: tuple[bool, bool],
    is_noisy: bool,
    batch_size: int,
    steps: int,
) -> AdaptiveRounding:
    domain = weight if exponent is None else power_transform(weight, exponent)
    start = quantize(domain, spec)
    position = domain / _per_entry(start.scale, weight.shape, spec)
    floor = jnp.floor(position)
    fraction = position - floor
    nearest = (fraction >= 0.5).astype(weight.dtype)
    zero_point: Array | float = 0.0
    if start.zero_point is not None:
        zero_point = _per_entry(start.zero_point.astype(weight.dtype), weight.shape, spec)

    def codes(h: Array) -> Array:
        return jnp.clip(floor + jnp.where(where, h, nearest) + zero_point, *spec.code_range)

    def layer_loss(params: dict[str, Any], h: Array, inputs: Array, targets: Array) -> Array:
        scale = start.scale * jnp.exp(params["log_factor"]) if learned[1] else start.scale
        values = (codes(h) - zero_point) * _per_entry(scale, weight.shape, spec)
        if exponent is not None:
            values = power_transform(values, 1 / exponent)
        outputs = layer_fn(values, params.get("bias", bias), inputs)
        return _reconstruction_loss(outputs, targets, loss)

    params: dict[str, Any] = {"rounding": _rounding_start(fraction, variable)}
    if learned[0]:
        params["bias"] = bias
    if learned[1]:
        params["log_factor"] = jnp.zeros_like(start.scale)
    deviation = jnp.std(inputs, axis=tuple(range(inputs.ndim - 1)))
    warm_up = int(_WARM_UP * steps)

    def step(carry: Any, drawn: tuple[Array, Array, Array]) -> tuple[Any, None]:
        params, state = carry
        index, batch, key = drawn
        x = inputs[batch]
        if full_inputs is not None:
            is_dropped = jax.random.bernoulli(key, strengths["drop"], x.shape)
            x = jnp.where(is_dropped, full_inputs[batch], x)
        if is_noisy:
            noise_key = jax.random.fold_in(key, 1)
            x += strengths["noise"] * deviation * jax.random.normal(noise_key, x.shape, x.dtype)
        progress = (index - warm_up) / max(steps - warm_up, 1)
        beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * jnp.clip(progress, 0, 1)
        strength = jnp.where(index < warm_up, 0.0, strengths["regularization"])

        def objective(params: dict[str, Any]) -> Array:
            h = _soft_rounding(params["rounding"], variable)
            undecided = rounding_regularizer(jnp.where(where, h, nearest), beta)
            return layer_loss(params, h, x, targets[batch]) + strength * undecided

        updates, state = optimizer.update(jax.grad(objective)(params), state, params)
        params = optax.apply_updates(params, updates)
        if variable == "direct":
            params |= {"rounding": jnp.clip(params["rounding"], 0, 1)}
        return (params, state), None

    carry = (params, optimizer.init(params))
    batch_key, key = jax.random.split(key)
    batches = random_batches(batch_key, inputs.shape[0], batch_size, steps)
    drawn = (jnp.arange(steps), batches, jax.random.split(key, steps))
    (params, _), _ = jax.lax.scan(step, carry, drawn)
    h = (_soft_rounding(params["rounding"], variable) >= 0.5).astype(weight.dtype)
    scale = start.scale * jnp.exp(params["log_factor"]) if learned[1] else start.scale
    q = as_qtensor(codes(h), scale, start.zero_point, spec, dtype)
    return AdaptiveRounding(
        q if exponent is None else PowerTensor(q, jnp.asarray(exponent, weight.dtype)),
        params.get("bias", bias),
        layer_loss(params, h, inputs, targets),
    )


def _rounding_start(fraction: Array, variable: str) -> Array:
    """The variable for which h is the fraction."""
    if variable == "direct":
        return fraction
    if variable == "sigmoid":  # (h + 0.1) / 1.2 is never 0 or 1
        stretched = (fraction + 0.1) / 1.2
        return jnp.log(stretched) - jnp.log1p(-stretched)
    inside = jnp.clip(fraction, 1e-6, 1 - 1e-6)
    return jnp.stack([jnp.log1p(-inside), jnp.log(inside)])


def _soft_rounding(v: Array, variable: str) -> Array:
    if variable == "direct":
        return v
    return rectified_sigmoid(v) if variable == "sigmoid" else jax.nn.softmax(v, axis=0)[1]


def _reconstruction_loss(outputs: Array, targets: Array, loss: str) -> Array:
    if loss == "mse":
        losses = jnp.sum(jnp.square(outputs - targets), axis=-1)
    elif loss == "l1":
        losses = jnp.sum(jnp.abs(outputs - targets), axis=-1)
    elif loss == "cosine":
        squares = jnp.sum(outputs**2, axis=-1) * jnp.sum(targets**2, axis=-1)
        has_angle = squares > 0
        cosine = jnp.sum(outputs * targets, -1) / jnp.sqrt(jnp.where(has_angle, squares, 1.0))
        losses = jnp.where(has_angle, 1 - cosine, 0.0)
    else:
        log_p, log_q = (jax.nn.log_softmax(logits, axis=-1) for logits in (targets, outputs))
        losses = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.mean(losses)


def importance_mixed_precision(
    weight: ArrayLike,
    gradient: ArrayLike,
    mean_bits: float,
    *,
    choices: tuple[int, ...] = (2, 4, 8),
    axis: int = -1,
) -> Array:
    r"""Widths for the channels of a weight: more bits where the loss depends more on them.

    A channel c is as important as its weights times their gradients on calibration data, and the
    error of b bits is modelled as 4^(-b):

        I_c = Σ_{w in c} |w ∂L/∂w| / Σ_w |w ∂L/∂w|,   min_b Σ_c I_c 4^(-b_c),   mean b ≤ mean_bits

    All channels start with the fewest bits. Then the next width is given to one channel after the
    other, in the order of I_c times the fall of the error per bit, as long as bits are left. Ties
    go to the lower index.

    Args:
      weight: floating point and finite, of any shape with at least one axis.
      gradient: ∂L/∂w of the shape of `weight`, summed or averaged over the data.
      mean_bits: between the least and the largest of the choices.
      choices: widths of at least 1 bit, rising. Default (2, 4, 8).
      axis: the axis of the channels. Default -1, the outputs of an `[in, out]` kernel.

    Returns:
      int32 `[channels]`. Their mean is `mean_bits`, or less by fewer than one step between choices
      for one channel. This runs in NumPy on the host.

    Raises:
      ValueError: shapes that do not fit, no entries, NaN or infinite ones, `mean_bits` outside of
        the choices, or choices that do not rise.
      TypeError: arrays not floating point.

    For widths within a layer by one gradient; `allocate_bits_integer_program` chooses among widths
    of whole layers by what each did to the loss when it was tried.

    Cost: one gradient of the loss, a pass over the weight, and a sort of the channels' steps on the
    host.

    Example:
      >>> w = jnp.array([[1.0, 1.0, 1.0, 1.0]])
      >>> print(importance_mixed_precision(w, jnp.array([[5.0, 0.1, -0.2, 0.1]]), 4.0))
      [8 2 4 2]

    Reference: Yvinec, Dapogny, Bailly, "Gradient-Based Post-Training Quantization: Challenging the
    Status Quo", 2023, arXiv:2308.07662.
    """
    check_floating(weight=weight, gradient=gradient)
    check_finite(weight=jnp.asarray(weight), gradient=jnp.asarray(gradient))
    check_shape(jnp.shape(weight), gradient=gradient)
    (axis,) = canonical_axes(axis, jnp.ndim(weight))
    if jnp.size(weight) == 0:
        raise ValueError(f"weight must have entries, got shape {jnp.shape(weight)}")
    widths = np.asarray(choices)
    if widths.ndim != 1 or widths.size == 0 or widths[0] < 1 or np.any(np.diff(widths) <= 0):
        raise ValueError(f"choices must be rising widths of at least 1, got {choices}")
    check_interval(float(widths[0]), float(widths[-1]), mean_bits=mean_bits)

    share = np.abs(np.asarray(weight, np.float64) * np.asarray(gradient, np.float64))
    share /= max(share.max(), np.finfo(np.float64).tiny)
    importance = share.sum(axis=tuple(i for i in range(share.ndim) if i != axis))
    steps = np.diff(widths)
    gains = importance[:, None] * -np.diff(4.0**-widths) / steps
    left = np.floor((mean_bits - widths[0]) * importance.size + 1e-6)
    level = np.zeros(importance.size, int)
    for index in np.argsort(-gains, axis=None, kind="stable"):
        channel, step = divmod(index, max(steps.size, 1))
        if level[channel] == step and steps[step] <= left:
            level[channel] += 1
            left -= steps[step]
    return jnp.asarray(widths[level], jnp.int32)
