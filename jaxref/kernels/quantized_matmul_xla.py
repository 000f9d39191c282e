"""The product with a quantized kernel by XLA, and what all implementations share.

On a CPU, XLA would dequantize the whole kernel into memory and multiply it then, at several times
the cost of a product with floats. So it goes over the kernel in slices of few inputs, each of which
is dequantized and multiplied while it is in cache.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxref.core.shards import varying_alike

FLOAT8 = (jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2"))

# Inputs of a slice of the kernel on a CPU. More for many tokens, as their sums are read and written
# for every slice.
_SLICE = 256


class Operands(NamedTuple):
    """What is multiplied.

    Attributes:
      x: `[tokens, inputs]`, floating point or codes.
      values: `[inputs, columns]`, int8, float8 or bytes of several codes.
      scale: `[blocks, fields, columns]`.
      zero_point: the same, or None.
      codebook: `[levels, fields or 1, columns or 1]`, or None.
      x_scale: `[tokens, blocks or 1]` where x has codes, else None.
    """

    x: Any
    values: Any
    scale: Any
    zero_point: Any
    codebook: Any
    x_scale: Any


class Layout(NamedTuple):
    """What is static about it.

    Attributes:
      fields: codes to the byte.
      block: how many inputs share a scale.
      blocks: how many scales there are of an output.
      outputs: of the kernel, less than fields * columns where the last byte is filled up.
      dtype: of the result.
    """

    fields: int
    block: int
    blocks: int
    outputs: int
    dtype: jnp.dtype


def matmul(operands: Operands, layout: Layout) -> Array:
    """The products `[tokens, fields, columns]`, in the type of the scales."""
    scale, x_scale = operands.scale, operands.x_scale
    of_output = layout.blocks == 1
    of_token = x_scale is not None and x_scale.shape[1] == 1
    y = _sum(
        operands._replace(
            values=jax.lax.stop_gradient(operands.values),
            scale=None if of_output else scale,
            x_scale=None if of_token else x_scale,
        ),
        layout,
    ).astype(scale.dtype)
    if of_output:
        y *= scale[0]
    return y * x_scale[:, :, None] if of_token else y


def codes_of_field(values: Array, field: int, fields: int) -> Array:
    """The codes `[inputs, columns]` in one field of the bytes, as int32 if there are several."""
    if fields == 1:
        return values
    # The field moves to the top of a word, and the signed shift back extends its sign.
    width = 8 // fields
    return values.astype(jnp.int32) << (32 - width * (field + 1)) >> (32 - width)


def _sum(operands: Operands, layout: Layout) -> Array:
    """The products without the scales that all inputs of an output or a token have in common."""
    tokens, inputs = operands.x.shape
    if not jnp.issubdtype(operands.x.dtype, jnp.floating) or operands.x.dtype in FLOAT8:
        if layout.blocks == 1:
            return _product(operands, layout)
        return _sum_of_slices(operands, layout, layout.block)
    rows = max(_SLICE, tokens)
    if layout.blocks > 1:
        rows = -(-rows // layout.block) * layout.block
    if rows >= inputs:
        return _product(operands, layout)
    return jax.lax.platform_dependent(
        operands,
        cpu=partial(_sum_of_slices, layout=layout, rows=rows),
        default=partial(_product, layout=layout),
    )


def _product(operands: Operands, layout: Layout) -> Array:
    """The product at once, of inputs with codes in one block."""
    x, values, _, _, _, x_scale = operands
    fields = []
    for field in range(layout.fields):
        weight = codes_of_field(values, field, layout.fields)
        if x.dtype == jnp.int8:
            y = _dot(x, weight.astype(jnp.int8), jnp.int32)
        elif x.dtype in FLOAT8:
            y = _dot(x, weight, jnp.float32)
        else:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            weight = _dequantize(weight.astype(wide), operands, field, layout)
            y = _dot(x, weight.astype(x.dtype), wide)
        fields.append(y)
    y = jnp.stack(fields, axis=1)
    if x.dtype == jnp.int8 or x.dtype in FLOAT8:
        if operands.scale is not None:
            y = y.astype(operands.scale.dtype) * operands.scale[0]
        if x_scale is not None:
            y = y * x_scale[:, :, None]
    return y


def _dequantize(weight: Array, operands: Operands, field: int, layout: Layout) -> Array:
    """Codes `[inputs, columns]` as what is multiplied, less a scale that all have in common."""
    if operands.codebook is not None:
        index = weight.astype(jnp.int32) + len(operands.codebook) // 2
        codebook = operands.codebook[:, min(field, operands.codebook.shape[1] - 1)]
        shared = codebook.shape[1] == 1
        weight = codebook[:, 0][index] if shared else jnp.take_along_axis(codebook, index, axis=0)
    if operands.zero_point is not None:
        weight -= _by_input(operands.zero_point[:, field], layout.block, len(weight))
    if operands.scale is not None:
        weight *= _by_input(operands.scale[:, field], layout.block, len(weight))
    return weight


def _sum_of_slices(operands: Operands, layout: Layout, rows: int) -> Array:
    """The product as a sum over slices of `rows` inputs: whole blocks, or parts of the only one."""
    x, values, scale, zero_point, codebook, x_scale = operands
    (tokens, inputs), whole = x.shape, x.shape[1] // rows
    blocks = rows // layout.block  # 0 for parts of a block

    def in_slices(numbers: Array | None, axis: int) -> tuple[Any, Any]:
        """Those of the whole slices, along a new first axis, and those of the rest."""
        if numbers is None or not blocks:
            return None, numbers
        head, rest = jnp.split(numbers, [whole * blocks], axis=axis)
        head = head.reshape(*head.shape[:axis], whole, blocks, *head.shape[axis + 1 :])
        return jnp.moveaxis(head, axis, 0), rest

    x_slices = x[:, : whole * rows].reshape(tokens, whole, rows).swapaxes(0, 1)
    scales, last_scale = in_slices(scale, 0)
    zero_points, last_zero_point = in_slices(zero_point, 0)
    x_scales, last_x_scale = in_slices(x_scale, 1)

    @jax.checkpoint
    def step(total: Array, slice_: Any) -> tuple[Array, None]:
        i, x, scale, of_block, x_scale = slice_
        part = jax.lax.dynamic_slice_in_dim(values, i * rows, rows)
        of_block = of_block if blocks else zero_point
        return total + _product(Operands(x, part, scale, of_block, codebook, x_scale), layout), None

    dtype = jnp.promote_types(x.dtype, jnp.float32) if scale is None else scale.dtype
    total = jnp.zeros((tokens, layout.fields, values.shape[1]), dtype)
    total, *_ = varying_alike(total, *jax.tree.leaves(operands))
    slices = jnp.arange(whole), x_slices, scales, zero_points, x_scales
    total, _ = jax.lax.scan(step, total, slices)
    if inputs % rows:
        rest = x[:, whole * rows :], values[whole * rows :], last_scale, last_zero_point
        total += _product(Operands(*rest, codebook, last_x_scale), layout)
    return total


def _dot(x: Array, weight: Array, dtype: DTypeLike) -> Array:
    return jax.lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


def _by_input(numbers: Array, block: int, inputs: int) -> Array:
    """A number per block, repeated for the inputs in it."""
    if len(numbers) == 1:
        return numbers
    repeated = jnp.broadcast_to(numbers[:, None], (len(numbers), block, *numbers.shape[1:]))
    return repeated.reshape(-1, *numbers.shape[1:])[:inputs]
