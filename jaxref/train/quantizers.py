"""The methods of `--mode=quantize`: entries to functions of `jaxref.quantization`, each for a
kernel and what is known of its inputs."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax
from jax import Array
from ml_collections import ConfigDict

from jaxref.nn.quantized_linear import Activations
from jaxref.quantization import (
    QuantSpec,
    adaptive_rounding,
    baq_quantize,
    gptq_quantize,
    hessian,
    lnq_quantize,
    nupes_quantize,
    power_quantize,
    pyramid_bits_per_weight,
    pyramid_quantize_hessian,
    quantize,
    quantize_rowwise,
    search_power_exponent,
    ternary_weight_quantize,
)
from jaxref.quantization.gptq import HessianState
from jaxref.train.config import ConfigError, near
from jaxref.train.configs.default import get_config

_ADAM = optax.adam(1e-2)  # one object: programs are cached by it
_GROUP, _AMPLITUDE_BITS = 16, 4  # of pyramid vectors


class Layer(NamedTuple):
    """What a method is given of a layer.

    Attributes:
      kernel: `[inputs, outputs]`, floating point.
      key: a random key of its own.
      moments: second moments of the inputs, with all before this layer's block quantized; for
        methods that need "moments".
      inputs: `[rows, inputs]`, some of those inputs; for methods that need "inputs".
      targets: `[rows, outputs]`, what the layer made of the same tokens when nothing was quantized,
        without bias.
    """

    kernel: Array
    key: Array
    moments: HessianState | None = None
    inputs: Array | None = None
    targets: Array | None = None


class Quantizer(NamedTuple):
    """A method.

    Attributes:
      quantize: `quantize(layer, options)` gives the quantized pytree of the layer's kernel. The
        options are those of the section, with `bits` in place of 0.
      bits: the bits of a weight that it can have, the usual ones first.
      needs: what it has to know of the inputs; None for nothing.
      options: the keys of the section that it reads, besides those that all do.
      activations: what is done to the inputs when the model runs; see `QuantizedLinear`.
    """

    quantize: Callable[[Layer, ConfigDict], Any]
    bits: tuple[int, ...]
    needs: Literal["moments", "inputs"] | None = None
    options: tuple[str, ...] = ()
    activations: Activations = None


def quantizer(options: ConfigDict) -> tuple[Quantizer, ConfigDict]:
    """The method that a configuration's section names, and its options with `bits` in place of 0.

    Args:
      options: the section `quantize` of a configuration.

    Returns:
      The method, and a copy of the section.

    Raises:
      ConfigError: there is no such method, or it has no such bits, or an option is set that it does
        not read.
    """
    if options.method not in QUANTIZERS:
        raise ConfigError(
            f"quantize.method: there is no {options.method!r}{near(options.method, QUANTIZERS)}"
        )
    method = QUANTIZERS[options.method]
    options = options.copy_and_resolve_references()
    options.bits = options.bits or method.bits[0]
    if options.bits not in method.bits:
        raise ConfigError(
            f"quantize.bits: {options.method} has {', '.join(map(str, sorted(method.bits)))}, "
            f"got {options.bits}"
        )
    read = _read_by(method)
    for name, default in get_config().quantize.items():
        if name not in read and options[name] != default:
            raise ConfigError(
                f"quantize.{name} has no meaning for {options.method}, which reads "
                f"{', '.join(f'quantize.{other}' for other in read)}"
            )
    return method, options


def checkpoint_name(options: ConfigDict) -> str:
    """What a quantized model is called: its method, its bits, and what else is not the default.

    Args:
      options: the section `quantize` of a configuration.

    Returns:
      The name, of one directory.

    Raises:
      ConfigError: as `quantizer`.

    >>> options = get_config().quantize
    >>> options.method, options.block_size = "gptq", 0
    >>> checkpoint_name(options)
    'gptq-4bit-block_size=0'
    """
    method, options = quantizer(options)
    defaults = get_config().quantize
    others = [
        f"{name}={options[name]}"
        for name in _read_by(method)
        if name not in ("method", "bits") and options[name] != defaults[name]
    ]
    return "-".join([options.method, f"{options.bits}bit", *others])


def _read_by(method: Quantizer) -> list[str]:
    """The keys of the section that a method reads, in the section's order."""
    calibration = {
        None: (),
        "moments": ("calibration_batches",),
        "inputs": ("calibration_batches", "calibration_rows"),
    }[method.needs]
    read = {"method", "bits", "low_rank", *method.options, *calibration}
    return [name for name in get_config().quantize if name in read]


def _spec(options: ConfigDict) -> QuantSpec:
    """Scales for blocks of inputs of each output, or for each output."""
    if options.block_size:
        where: dict[str, Any] = {"axis": 0, "block_size": options.block_size}
        granularity = "block"
    else:
        where, granularity = {"axis": 1}, "channel"
    return QuantSpec(
        bits=options.bits, granularity=granularity, symmetric=options.symmetric, **where
    )


def _round_to_nearest(layer: Layer, options: ConfigDict) -> Any:
    return quantize(layer.kernel, _spec(options))


def _int8(layer: Layer, options: ConfigDict) -> Any:
    return quantize_rowwise(layer.kernel, axis=0, bits=options.bits)


def _float8(layer: Layer, options: ConfigDict) -> Any:
    del options
    return quantize(layer.kernel, QuantSpec(format="float8_e4m3fn", granularity="channel", axis=1))


def _gptq(layer: Layer, options: ConfigDict) -> Any:
    return gptq_quantize(
        layer.kernel,
        _hessian(layer),
        _spec(options),
        damping=options.damping,
        activation_order=options.activation_order,
    )


def _baq(layer: Layer, options: ConfigDict) -> Any:
    return baq_quantize(layer.kernel, _hessian(layer), options.bits, damping=options.damping)


def _lnq(layer: Layer, options: ConfigDict) -> Any:
    return lnq_quantize(layer.kernel, _hessian(layer), bits=options.bits)


def _pyramid(layer: Layer, options: ConfigDict) -> Any:
    """With as many pulses as the bits allow, norms and lengths included."""

    def bits(pulses: int) -> float:
        return pyramid_bits_per_weight(
            _GROUP, pulses, _AMPLITUDE_BITS, row_size=layer.kernel.shape[0]
        )

    pulses = 1
    while bits(pulses + 1) <= options.bits:
        pulses += 1
    return pyramid_quantize_hessian(
        layer.kernel,
        _hessian(layer),
        pulses=pulses,
        group_size=_GROUP,
        amplitude_bits=_AMPLITUDE_BITS,
        damping=options.damping,
        key=layer.key,
    )


def _power(layer: Layer, options: ConfigDict) -> Any:
    spec = _spec(options)
    return power_quantize(layer.kernel, search_power_exponent(layer.kernel, spec), spec)


def _nupes(layer: Layer, options: ConfigDict) -> Any:
    inputs, targets = _examples(layer)
    learned = nupes_quantize(
        layer.kernel, inputs, targets, _spec(options), key=layer.key, steps=options.steps
    )
    return learned.weight


def _adaptive_rounding(layer: Layer, options: ConfigDict) -> Any:
    inputs, targets = _examples(layer)
    learned = adaptive_rounding(
        layer.kernel,
        inputs,
        targets,
        _spec(options),
        key=layer.key,
        optimizer=_ADAM,
        steps=options.steps,
    )
    return learned.weight


def _ternary(layer: Layer, options: ConfigDict) -> Any:
    del options
    return ternary_weight_quantize(layer.kernel)


def _hessian(layer: Layer) -> Array:
    assert layer.moments is not None
    return hessian(layer.moments)


def _examples(layer: Layer) -> tuple[Array, Array]:
    assert layer.inputs is not None
    assert layer.targets is not None
    return layer.inputs, layer.targets


_BLOCKS = ("block_size", "symmetric")

QUANTIZERS: dict[str, Quantizer] = {
    "round_to_nearest": Quantizer(_round_to_nearest, (8, 2, 3, 4, 5, 6, 7), options=_BLOCKS),
    "int8": Quantizer(_int8, (8,), activations="int8"),
    "llm_int8": Quantizer(
        _int8, (8,), options=("threshold", "max_outliers"), activations="llm_int8"
    ),
    "float8": Quantizer(_float8, (8,)),
    "gptq": Quantizer(
        _gptq, (4, 2, 3, 5, 6, 7, 8), "moments", (*_BLOCKS, "damping", "activation_order")
    ),
    "baq": Quantizer(_baq, (4, 2, 3, 5, 6, 7, 8), "moments", ("damping",)),
    "lnq": Quantizer(_lnq, (4, 2, 3), "moments"),
    "pyramid": Quantizer(_pyramid, (4, 2, 3), "moments", ("damping",)),
    "adaptive_rounding": Quantizer(
        _adaptive_rounding, (4, 2, 3, 5, 6, 7, 8), "inputs", (*_BLOCKS, "steps")
    ),
    "power": Quantizer(_power, (4, 2, 3, 5, 6, 7, 8), options=_BLOCKS),
    "nupes": Quantizer(_nupes, (4, 2, 3, 5, 6, 7, 8), "inputs", ("block_size", "steps")),
    "ternary": Quantizer(_ternary, (2,)),
}
"""The methods by their names."""
