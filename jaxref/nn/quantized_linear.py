"""The linear map that a trained one becomes when its kernel is stored in few bits."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.nn.bit_linear import BitLinear
from jaxref.nn.linear import Linear, _as_rows, _as_tuple, _from_rows
from jaxref.quantization import (
    bit_linear,
    dequantize_kernel,
    low_rank_compensation,
    quantized_linear,
)

Activations = Literal["int8", "llm_int8"] | None
Select = Callable[[str, nnx.Module], bool]
QuantizeKernel = Callable[[str, Array], Any]
Model = TypeVar("Model", bound=nnx.Module)


class QuantizedWeight(nnx.Variable):
    """A kernel in few bits: a `QTensor`, or another quantized pytree of `jaxref.quantization`.

    No `nnx.Param`, so that an optimizer of those leaves it alone.

    Use it to tell kernels in few bits from parameters, as in `nnx.state(model, QuantizedWeight)`;
    `QuantizedLinear` has them.

    Cost: the bits of its pytree, scales included.

    Example:
      >>> from jaxref.quantization import QuantSpec, quantize
      >>> weight = QuantizedWeight(quantize(jnp.ones((4, 2)), QuantSpec(bits=8)))
      >>> isinstance(weight, nnx.Param)
      False
    """


class QuantizedLinear(nnx.Module):
    """What a `Linear` becomes when its kernel is quantized, for inference.

        y = x Ŵ (+ (x A) B) (+ b)

    with the product of `jaxref.quantization.quantized_linear`, which reads the kernel's few bits
    where the whole of it does not fit into the caches, and A and B those of
    `jaxref.quantization.low_rank_compensation`.

    Args:
      weight: Ŵ `[inputs, outputs]` with one axis for each, as a quantized pytree.
      in_features: size of the input's last axis, or sizes of its last axes.
      out_features: the same for the output.
      bias: b `[*out_features]`, or None.
      low_rank: A `[inputs, rank]` and B `[rank, outputs]`, quantized too; None for none.
      activations: None (weights alone), or, for a `QTensor` with a scale per output, "int8" (inputs
        in 8 bits with a scale per token) or "llm_int8" (that, but for outlier features).
      threshold, max_outliers: of "llm_int8", as for `jaxref.quantization.llm_int8_matmul`.
      dtype: type to compute in. Default float32.

    Attributes:
      weight: the `QuantizedWeight`.
      bias: an `nnx.Param`, or None.
      low_rank_in, low_rank_out: A and B, or None.
      kernel: the array `[*in_features, *out_features]` that the weight stands for, for those that
        read it in place of calling the layer.

    Raises:
      ValueError: a weight, bias or factors of another shape, unknown `activations`, or an input of
        the wrong size.

    Use it for inference with a trained kernel in few bits; `quantize_linears` makes all of a
    model's. `QuantizedBitLinear` is for a `BitLinear`, trained in few bits.

    Cost: `nbytes` of weights and scales, which each call reads; inputs · outputs multiplications a
    row, and rank · (inputs + outputs) for A and B.

    Example:
      >>> import jax
      >>> from jaxref.quantization import quantize_rowwise
      >>> w = jax.random.normal(jax.random.key(0), (8, 6))
      >>> weight = quantize_rowwise(w, axis=0)
      >>> linear = QuantizedLinear(weight, in_features=8, out_features=(2, 3))
      >>> x = jnp.ones((5, 8))
      >>> bool(jnp.allclose(linear(x).reshape(5, 6), x @ w, atol=0.1))
      True
      >>> linear.weight.nbytes, w.nbytes
      (72, 192)

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339; the factors: Yao, Wu, Li, Youn, He,
    "ZeroQuant-V2", 2023, arXiv:2303.08302.
    """

    def __init__(
        self,
        weight: Any,
        *,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        bias: Array | None = None,
        low_rank: tuple[Any, Any] | None = None,
        activations: Activations = None,
        threshold: float = 6.0,
        max_outliers: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        self.in_features, self.out_features = _as_tuple(in_features), _as_tuple(out_features)
        inputs, outputs = math.prod(self.in_features), math.prod(self.out_features)
        if tuple(weight.shape) != (inputs, outputs):
            raise ValueError(
                f"weight must have shape {(inputs, outputs)}, got {tuple(weight.shape)}"
            )
        if activations not in ("int8", "llm_int8", None):
            raise ValueError(f"activations must be 'int8', 'llm_int8' or None, got {activations!r}")
        if bias is not None:
            check_shape(self.out_features, bias=bias)
        if low_rank is not None:
            shapes = tuple(tuple(factor.shape) for factor in low_rank)
            rank = shapes[0][-1]
            if shapes != ((inputs, rank), (rank, outputs)):
                raise ValueError(
                    f"low_rank must have shapes {(inputs, 'rank')} and {('rank', outputs)}, "
                    f"got {shapes}"
                )
        self.weight = QuantizedWeight(weight)
        axes = (None,) * len(self.out_features)
        self.bias = None if bias is None else nnx.Param(bias, axes=axes)
        self.low_rank_in = None if low_rank is None else QuantizedWeight(low_rank[0])
        self.low_rank_out = None if low_rank is None else QuantizedWeight(low_rank[1])
        self.activations = activations
        self.threshold, self.max_outliers = threshold, max_outliers
        self.dtype = jnp.dtype(dtype)

    @property
    def low_rank(self) -> tuple[Any, Any] | None:
        """A and B as they are stored, or None."""
        if self.low_rank_in is None or self.low_rank_out is None:
            return None
        return self.low_rank_in.get_value(), self.low_rank_out.get_value()

    def effective_kernel(self) -> Array:
        """The matrix `[inputs, outputs]` that the weight and its compensation stand for, in the
        type to compute in."""
        kernel = dequantize_kernel(self.weight.get_value())
        if self.low_rank is not None:
            left, right = map(dequantize_kernel, self.low_rank)
            kernel = kernel + left @ right
        return kernel.astype(self.dtype)

    @property
    def kernel(self) -> Array:
        """`effective_kernel` with the axes of a `Linear`'s."""
        return self.effective_kernel().reshape(self.in_features + self.out_features)

    @property
    def nbytes(self) -> int:
        """The memory of the weight and of its compensation, scales included."""
        return sum(part.nbytes for part in (self.weight.get_value(), *(self.low_rank or ())))

    def __call__(self, x: Array) -> Array:
        """Maps `[..., *in_features]` to `[..., *out_features]`."""
        y = self._product(_as_rows(x.astype(self.dtype), self.in_features))
        y = _from_rows(y, x, self.in_features, self.out_features)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def _product(self, rows: Array) -> Array:
        y = quantized_linear(
            rows,
            self.weight.get_value(),
            activations=self.activations,
            threshold=self.threshold,
            max_outliers=self.max_outliers,
        )
        if self.low_rank is not None:
            left, right = self.low_rank
            y = y + quantized_linear(quantized_linear(rows, left), right)
        return y


class QuantizedBitLinear(QuantizedLinear):
    """What a `BitLinear` becomes: the kernel that it was trained with, in 2 bits.

        y = x̂ Ŵ (+ b)

    as `BitLinear` computes it, to the last bit, without its floating-point parameter.

    Args:
      weight, in_features, out_features, bias, dtype: as for `QuantizedLinear`, the weight as
        `BitLinear.quantized_kernel` gives it.
      activation_bits, norm, epsilon: those of the `BitLinear`.

    Raises:
      ValueError: what `QuantizedLinear` raises.

    Use it for inference with what was trained as a `BitLinear`; `quantize_linears` makes it of
    every one, whatever is done to the other layers.

    Cost: 2 bits per weight and one scale; inputs · outputs multiplications a row, in 8-bit
    integers.

    Example:
      >>> linear = BitLinear(8, 16, axes=(None, None), rngs=nnx.Rngs(0))
      >>> small = QuantizedBitLinear(linear.quantized_kernel(), in_features=8, out_features=16)
      >>> x = jnp.linspace(-1, 1, 24).reshape(3, 8)
      >>> bool(jnp.array_equal(small(x), linear(x))), small.nbytes, linear.kernel.nbytes
      (True, 36, 512)

    Reference: Nielsen, Schneider-Kamp, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on
    Smaller Networks", 2024, arXiv:2407.09527.
    """

    def __init__(
        self,
        weight: Any,
        *,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        bias: Array | None = None,
        activation_bits: int = 8,
        norm: Literal["layer", "rms"] | None = "layer",
        epsilon: float = 1e-5,
        dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(
            weight, in_features=in_features, out_features=out_features, bias=bias, dtype=dtype
        )
        self.activation_bits, self.norm, self.epsilon = activation_bits, norm, epsilon

    def _product(self, rows: Array) -> Array:
        return bit_linear(
            rows,
            self.weight.get_value(),
            activation_bits=self.activation_bits,
            norm=self.norm,
            epsilon=self.epsilon,
        ).astype(self.dtype)


def quantize_linears(
    model: Model,
    quantize_kernel: QuantizeKernel,
    *,
    select: Select | None = None,
    low_rank: int = 0,
    activations: Activations = None,
    threshold: float = 6.0,
    max_outliers: int | None = None,
) -> Model:
    """A copy of a model in which linear layers are `QuantizedLinear`s.

    Those are replaced that compute x W (+ b): `Linear`, those of its subclasses that change the
    kernel only, and `flax.nnx.Linear`. A `BitLinear` becomes a `QuantizedBitLinear`, with the
    kernel that it has.

    Args:
      model: any module; it stays as it is, and shares all other arrays with the copy.
      quantize_kernel: `quantize_kernel(path, kernel)` gives the quantized pytree of a kernel
        `[inputs, outputs]`, which has its parameter's type. The path is dotted, as
        "blocks.0.mlp.function.up".
      select: `select(path, layer)`, whether to replace a layer. Default: all.
      low_rank: at least 0, the rank of what makes up for the kernel's error, in 8 bits. Default 0,
        none.
      activations, threshold, max_outliers: as for `QuantizedLinear`.

    Returns:
      The copy.

    Raises:
      ValueError: a kernel with a leading axis for layers that are scanned (take them apart first,
        for a transformer by `jaxref.models.blocks.unstack_block`), or a negative `low_rank`.

    Use it with any function of `jaxref.quantization` for kernels, and `collect_hessians` where that
    needs to know the inputs.

    Cost: one call of `quantize_kernel` a layer, and with `low_rank` a singular value decomposition,
    O(inputs · outputs · min(inputs, outputs)).

    Example:
      >>> from jaxref.nn import MLP
      >>> from jaxref.quantization import QuantSpec, quantize
      >>> mlp = MLP(4, 16, rngs=nnx.Rngs(0))
      >>> spec = QuantSpec(bits=4, granularity="channel", axis=1)
      >>> small = quantize_linears(mlp, lambda path, kernel: quantize(kernel, spec))
      >>> type(small.up).__name__, small.up.weight.spec.bits, small(jnp.ones((2, 4))).shape
      ('QuantizedLinear', 4, (2, 4))

    Reference: Yao, Wu, Li, Youn, He, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs
    from Comprehensive Study to Low Rank Compensation", 2023, arXiv:2303.08302, for `low_rank`.
    """
    check_interval(0, jnp.inf, low_rank=low_rank)
    replacements: dict[str, nnx.Module] = {}
    for path, layer in linear_layers(model).items():
        if select is not None and not select(path, layer):
            continue
        if isinstance(layer, BitLinear):
            _check_single(path, layer)
            replacements[path] = QuantizedBitLinear(
                layer.quantized_kernel(),
                in_features=layer.in_features,
                out_features=layer.out_features,
                bias=None if layer.bias is None else layer.bias[...],
                activation_bits=layer.activation_bits,
                norm=layer.norm,
                epsilon=layer.epsilon,
                dtype=layer.dtype or layer.kernel.dtype,
            )
        if not _is_plain(layer):
            continue
        _check_single(path, layer)
        kernel = _kernel(layer)
        weight = quantize_kernel(path, kernel)
        factors = None
        if low_rank:
            rounded = dequantize_kernel(weight)
            factors = low_rank_compensation(kernel, rounded, rank=low_rank, factor_bits=8)
        replacements[path] = QuantizedLinear(
            weight,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=None if layer.bias is None else layer.bias[...],
            low_rank=factors,
            activations=activations,
            threshold=threshold,
            max_outliers=max_outliers,
            dtype=layer.dtype or layer.kernel.dtype,
        )
    return replace_modules(model, replacements)


def linear_layers(model: nnx.Module) -> dict[str, Any]:
    """Every `Linear` (subclasses too) and `flax.nnx.Linear` of a model by its dotted path; one that
    is shared by several modules once.

    >>> from jaxref.nn import MLP
    >>> sorted(linear_layers(MLP(4, 16, rngs=nnx.Rngs(0))))
    ['down', 'up']
    """
    return {
        dotted(path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear | nnx.Linear)
    }


def replace_modules(model: Model, replacements: Mapping[str, nnx.Module]) -> Model:
    """A copy of a model with other modules at the given dotted paths.

    All variables but those of the replaced modules are shared with the model.

    >>> from jaxref.nn import MLP
    >>> mlp = MLP(4, 16, rngs=nnx.Rngs(0))
    >>> changed = replace_modules(mlp, {"up": Linear(4, 8, axes=(None, None), rngs=nnx.Rngs(1))})
    >>> changed.up.out_features, changed.down.kernel is mlp.down.kernel, mlp.up.out_features
    ((8,), True, (16,))
    """
    left = dict(replacements)

    def replaced(path: Any, node: Any) -> Any:
        return left.pop(dotted(path), node)

    copy = nnx.recursive_map(replaced, model)
    if left:
        raise ValueError(f"replacements must be for modules of the model, got {sorted(left)}")
    return copy


def dotted(path: tuple[Any, ...]) -> str:
    """A path of keys as it is written.

    >>> dotted(("blocks", 0, "mlp"))
    'blocks.0.mlp'
    """
    return ".".join(map(str, path))


def _is_plain(layer: Any) -> bool:
    """Whether a layer computes x W (+ b), for the kernel that it says it has."""
    if isinstance(layer, Linear):
        return type(layer)._product is Linear._product
    return type(layer) is nnx.Linear


def _check_single(path: str, layer: Any) -> None:
    own = len(_as_tuple(layer.in_features)) + len(_as_tuple(layer.out_features))
    if layer.kernel.ndim != own:
        raise ValueError(
            f"{path} must have a kernel of its own, got those of several layers in one, of shape "
            f"{tuple(layer.kernel.shape)}; take them apart first, as unstack_block does"
        )


def _kernel(layer: Any) -> Array:
    """The kernel that is used, `[inputs, outputs]`, in the type of the parameter."""
    if isinstance(layer, Linear):
        if type(layer).effective_kernel is Linear.effective_kernel:
            return layer._kernel_by_output()
        return layer.effective_kernel().astype(layer.kernel.dtype)
    return layer.kernel[...]
