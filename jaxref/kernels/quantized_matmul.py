"""The product of an input and a kernel that is stored in few bits."""

import math
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval
from jaxref.core.shards import varying_alike
from jaxref.kernels import quantized_matmul_xla as xla
from jaxref.kernels.implementation import Implementation, choose_implementation
from jaxref.kernels.quantized_matmul_xla import FLOAT8, Layout, Operands

_FLOATS = (jnp.dtype("float16"), jnp.dtype("bfloat16"), jnp.dtype("float32"), jnp.dtype("float64"))


def quantized_matmul(
    x: ArrayLike,
    values: ArrayLike,
    scale: ArrayLike,
    *,
    x_scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    codebook: ArrayLike | None = None,
    bits: int = 8,
    padding: int = 0,
    block_size: int | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    r"""The product of an input and a quantized kernel, which is not dequantized in memory.

    With the inputs h of a block in B, scales a per token and s per output,

        y_{t,o} = Σ_B a_{t,B} s_{B,o} Σ_{h∈B} x_{t,h} (v_{h,o} - z_{B,o})

    where v is the stored code, or the entry of a codebook that it stands for. One function for

        weights alone     x floating point, v int8, packed codes of 2 to 4 bits, a codebook, float8
        int8 · int8       x int8 with x_scale: products summed in int32, exactly (vector-wise)
        float8 · float8   x float8 with x_scale: products summed in float32

    with one scale for all, per output, or per block of inputs and output.

    Args:
      x: `[..., in]` floating point, or int8 or float8 (e4m3fn, e5m2) codes with `x_scale`.
      values: codes `[in, out]` of type int8 or float8, or uint8 `[in, ceil(out / k)]` with k = 8 //
        bits codes to the byte, the first one lowest, as `jaxref.quantization.pack` stores them.
      scale: s, broadcastable to `[blocks, out]`, floating point: blocks = ceil(in / block_size).
      x_scale: a `[..., 1]`, or `[..., blocks]`, floating point; for int8 and float8 inputs.
      zero_point: z, broadcastable as `scale`, of a floating-point input's kernel. Default: 0.
      codebook: `[2^bits]`, or `[2^bits, out]` for one per output, floating point: the code
        -2^(bits-1) stands for the first entry. For a floating-point input. Default: none.
      bits: 2 to 8, the bits of a code; for uint8 `values` 2 to 4.
      padding: how many columns at the end of packed `values` only fill up their last byte.
      block_size: how many inputs share a scale; the last block may be shorter. Default: all.
      dtype: type of the result. Default: that of a floating-point `x`, else that of `x_scale`.
      implementation: None, for the best that the platform supports; "xla"; "pallas", the kernel of
        the default backend; or another name of `choose_implementation`.

    Returns:
      y `[..., out]`. Sums run in float32 (float64 for an `x` of that type), those of int8 · int8 in
      int32. For a half-precision `x`, kernels with scales in blocks are rounded to its type, as
      they are multiplied by matrix units; without blocks nothing is rounded but the result.

      Differentiable (`jax.grad`, once) in `x`, `scale`, `x_scale` and `codebook`, as that formula;
      `values` and `zero_point` are constants.

    Raises:
      ValueError: shapes that do not match, bits, padding or block_size out of range, `x_scale`
        missing or out of place, zero points or codebooks for codes as inputs, so many int8 inputs
        in a block that int32 may overflow (from 133145 on, for codes from -127 to 127), or an
        `implementation` that cannot run here.
      TypeError: arrays of other types than these.

    Use it where the kernel is read more than computed with: a single token's product takes as long
    as the kernel takes to read. `jaxref.quantization.quantized_linear` calls it with a `QTensor`;
    int8 · int8 and float8 · float8 multiply faster than floats too where the chip has units for
    them.

    Cost: in · out multiplications a token, and the stored bytes of the kernel; kernels dequantize a
    tile at a time, XLA on a CPU 256 inputs or as many as tokens.

    Example:
      >>> x = jnp.array([[1.0, 2.0]])
      >>> print(quantized_matmul(x, jnp.array([[3, 4], [1, 0]], jnp.int8), jnp.array([[0.1, 1.0]])))
      [[0.5 4. ]]

    Reference: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, arXiv:2208.07339; scales in blocks: Dettmers, Zettlemoyer, "The
    case for 4-bit precision: k-bit Inference Scaling Laws", 2022, arXiv:2212.09720.
    """
    x, values = jnp.asarray(x), jnp.asarray(values)
    layout = _layout(x, values, bits, padding, block_size, dtype, x_scale)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    scale = _by_block("scale", scale, layout).astype(wide)
    if zero_point is not None:
        zero_point = _by_block("zero_point", zero_point, layout).astype(wide)
    if codebook is not None:
        codebook = _by_level(codebook, layout, bits).astype(wide)
    lead, tokens = x.shape[:-1], math.prod(x.shape[:-1])
    rows = x.reshape(tokens, x.shape[-1])
    if x_scale is not None:
        x_scale = _by_token(x_scale, x, layout).astype(wide)
        if zero_point is not None or codebook is not None:
            name = "zero_point" if codebook is None else "codebook"
            raise ValueError(f"{name} must be None for an x of codes, of type {x.dtype.name}")
    chosen = choose_implementation(implementation, x)
    if rows.size == 0 or values.size == 0:
        chosen = Implementation("xla")
    elif chosen.platform != "xla" and not _kernels(chosen.platform).takes(layout):
        if implementation is not None:
            raise ValueError(
                f"block_size must suit the kernel that implementation={implementation!r} names, "
                f"got {block_size}: multiples of 32 up to 1024 always do, and 'xla' takes any"
            )
        chosen = Implementation("xla")
    given = Operands(rows, values, scale, zero_point, codebook, x_scale)
    leaves, structure = jax.tree.flatten(given)
    operands = jax.tree.unflatten(structure, varying_alike(*leaves))
    if chosen.platform == "xla":
        y = xla.matmul(operands, layout)
    else:
        y = _by_kernel(operands, layout, chosen)
    columns = values.shape[1] * layout.fields
    y = y.swapaxes(1, 2).reshape(tokens, columns)[:, : layout.outputs]
    return y.reshape(*lead, layout.outputs).astype(layout.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_kernel(operands: Operands, layout: Layout, implementation: Implementation) -> Array:
    kernels = _kernels(implementation.platform)
    return kernels.matmul(operands, layout, implementation.interpret)


def _by_kernel_forward(operands: Operands, *static: Any) -> tuple[Array, Operands]:
    return _by_kernel(operands, *static), operands


def _by_kernel_backward(
    layout: Layout, _: Implementation, operands: Operands, gradient: Array
) -> tuple[Operands]:
    constant = operands._replace(values=None, zero_point=None)
    if not jnp.issubdtype(operands.x.dtype, jnp.floating):
        constant = constant._replace(x=None)

    def product(given: Operands) -> Array:
        return xla.matmul(
            Operands(*(b if a is None else a for a, b in zip(given, operands, strict=True))), layout
        )

    return jax.vjp(product, constant)[1](gradient)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _kernels(platform: str) -> ModuleType:
    """The module of a platform's kernels. Pallas takes a while to load: it does on first use."""
    if platform == "tpu":
        from jaxref.kernels import quantized_matmul_tpu

        return quantized_matmul_tpu
    from jaxref.kernels import quantized_matmul_gpu

    return quantized_matmul_gpu


def _layout(
    x: Array,
    values: Array,
    bits: int,
    padding: int,
    block_size: int | None,
    dtype: DTypeLike | None,
    x_scale: ArrayLike | None,
) -> Layout:
    """What is static, with the shapes and types of both sides checked."""
    check_interval(2, 8, bits=bits)
    if values.dtype == jnp.uint8:
        if bits > 4:
            raise ValueError(f"bits must be in [2, 4] for packed values, got {bits}")
    elif values.dtype != jnp.int8 and values.dtype not in FLOAT8:
        raise TypeError(
            f"values must be int8, packed uint8, float8_e4m3fn or float8_e5m2, got "
            f"{values.dtype.name}"
        )
    fields = 8 // bits if values.dtype == jnp.uint8 else 1
    check_interval(0, fields - 1, padding=padding)
    if x.dtype != jnp.int8 and x.dtype not in (*FLOAT8, *_FLOATS):
        raise TypeError(f"x must be floating point, int8 or float8, got {x.dtype.name}")
    is_coded = x.dtype not in _FLOATS
    if is_coded != (x_scale is not None):
        asked = "given" if is_coded else "None"
        raise ValueError(f"x_scale must be {asked} for an x of type {x.dtype.name}")
    if is_coded and (x.dtype in FLOAT8) != (values.dtype in FLOAT8):
        raise TypeError(
            f"values must be {'float8' if x.dtype in FLOAT8 else 'integers'} for an x of type "
            f"{x.dtype.name}, got {values.dtype.name}"
        )
    if x.ndim == 0 or values.ndim != 2 or values.shape[0] != x.shape[-1]:
        inputs = x.shape[-1] if x.ndim else "in"
        raise ValueError(f"values must have shape [{inputs}, out], got {values.shape}")
    inputs = x.shape[-1]
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    block = max(1, inputs if block_size is None else min(block_size, inputs))
    if x.dtype == jnp.int8 and block * 127**2 >= 2**31:
        raise ValueError(f"block_size must be at most 133144 for sums in int32, got {block}")
    if dtype is None:
        dtype = jnp.result_type(x_scale) if is_coded else x.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type, got {jnp.dtype(dtype).name}")
    outputs = values.shape[1] * fields - padding
    return Layout(fields, block, -(-inputs // block), outputs, jnp.dtype(dtype))


def _by_block(name: str, given: ArrayLike, layout: Layout) -> Array:
    """A number per block and output as `[blocks, fields, columns]`, as the bytes have them."""
    given = jnp.asarray(given)
    shape = (layout.blocks, layout.outputs)
    if given.ndim != 2 or any(a not in (1, b) for a, b in zip(given.shape, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to {shape}, with two axes, got {given.shape}")
    return _by_field(jnp.broadcast_to(given, shape), layout)


def _by_level(codebook: ArrayLike, layout: Layout, bits: int) -> Array:
    """The codebook as `[levels, fields, columns]`, or `[levels, 1, 1]` if one serves all."""
    codebook = jnp.asarray(codebook)
    if codebook.shape == (2**bits,):
        return codebook[:, None, None]
    if codebook.shape != (2**bits, layout.outputs):
        raise ValueError(
            f"codebook must have shape ({2**bits},) or ({2**bits}, {layout.outputs}), got "
            f"{codebook.shape}"
        )
    return _by_field(codebook, layout)


def _by_field(rows: Array, layout: Layout) -> Array:
    """Columns `[n, out]` in the order of the bytes that hold their codes: `[n, fields, bytes]`."""
    rows = jnp.pad(rows, ((0, 0), (0, -layout.outputs % layout.fields)))
    return rows.reshape(len(rows), rows.shape[1] // layout.fields, layout.fields).swapaxes(1, 2)


def _by_token(x_scale: ArrayLike, x: Array, layout: Layout) -> Array:
    """A number per token, and per block if there are so many: `[tokens, 1]` or more columns."""
    x_scale = jnp.asarray(x_scale)
    if x_scale.ndim != x.ndim or x_scale.shape[-1] not in (1, layout.blocks):
        raise ValueError(
            f"x_scale must have shape {(*x.shape[:-1], 1)} or {(*x.shape[:-1], layout.blocks)}, "
            f"got {x_scale.shape}"
        )
    shape = (*x.shape[:-1], x_scale.shape[-1])
    if any(a not in (1, b) for a, b in zip(x_scale.shape, shape, strict=True)):
        raise ValueError(f"x_scale must broadcast to {shape}, got {x_scale.shape}")
    return jnp.broadcast_to(x_scale, shape).reshape(math.prod(shape[:-1]), shape[-1])
