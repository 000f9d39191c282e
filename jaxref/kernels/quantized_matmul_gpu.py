"""The product with a quantized kernel on a GPU: codes become numbers in a program's registers.

A program multiplies one tile of the result, going over the inputs. The fields of a byte are outputs
of their own: each has a sum of its own, and the bytes are loaded once for all of them.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxref.kernels.block_sizes import tuned_block
from jaxref.kernels.implementation import kernel_result
from jaxref.kernels.quantized_matmul_xla import Layout, Operands, codes_of_field

# Tokens, columns of bytes and inputs of the tiles that a program multiplies.
_BLOCK = (64, 128, 64)

# The least that a matrix unit multiplies of each.
_LEAST = 16


def takes(layout: Layout) -> bool:
    """Whether blocks of inputs with a scale are whole tiles of a program.

    >>> takes(Layout(1, 48, 4, 8, jnp.dtype("float32")))
    True
    """
    return layout.blocks == 1 or layout.block % _LEAST == 0


def matmul(operands: Operands, layout: Layout, interpret: bool) -> Array:
    """The products `[tokens, fields, columns]`, in the type of the result."""
    x, values, scale, zero_point, codebook, x_scale = operands
    (tokens, inputs), columns, fields = x.shape, values.shape[1], layout.fields
    rows, width, depth = _block(tokens, columns, inputs, layout)
    is_blocked = layout.blocks > 1
    of_block = x_scale is not None and x_scale.shape[1] > 1
    sums = jnp.int32 if x.dtype == jnp.int8 and not is_blocked else jnp.float32
    names = ("zero_point", "codebook", "x_scale")
    given = {
        name: array
        for name, array in zip(names, (zero_point, codebook, x_scale), strict=True)
        if array is not None
    }

    def program(x_ref, values_ref, scale_ref, *refs):
        *given_refs, out_ref = refs
        others = dict(zip(given, given_refs, strict=True))
        row, row_exists = _range(pl.program_id(0), rows, tokens)
        column, column_exists = _range(pl.program_id(1), width, columns)

        def of_output(ref, block: Array | int, field: int) -> Array:
            numbers = ref.at[jnp.int32(block), jnp.int32(field), column]
            return plgpu.load(numbers, mask=column_exists, other=0)[None, :].astype(jnp.float32)

        def of_token(block: Array | int) -> Array:
            numbers = others["x_scale"].at[row, jnp.int32(block)]
            return plgpu.load(numbers, mask=row_exists, other=0)[:, None].astype(jnp.float32)

        def add(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            at, exists = _range(k, depth, inputs)
            x = plgpu.load(
                x_ref.at[row, at], mask=row_exists[:, None] & exists[None, :], other=_zero(x_ref)
            )
            stored = plgpu.load(
                values_ref.at[at, column],
                mask=exists[:, None] & column_exists[None, :],
                other=_zero(values_ref),
            )
            block = k * depth // layout.block if is_blocked else 0
            updated = []
            for field, total in enumerate(totals):
                weight = codes_of_field(stored, field, fields)
                if x_scale is None:
                    weight = weight.astype(jnp.float32)
                    if codebook is not None:
                        weight = look_up(weight, others["codebook"], field)
                    if zero_point is not None:
                        weight -= of_output(others["zero_point"], block, field)
                    if is_blocked:
                        weight *= of_output(scale_ref, block, field)
                    # x is 0 where there are no inputs
                    updated.append(total + _dot(x, weight.astype(x.dtype), jnp.float32))
                    continue
                part = _dot_of_codes(x, weight)
                if is_blocked:
                    part = part.astype(jnp.float32) * of_output(scale_ref, block, field)
                    part = part * of_token(block) if of_block else part
                updated.append(total + part)
            return tuple(updated)

        def look_up(codes: Array, ref, field: int) -> Array:
            levels, own, _ = ref.shape
            weight = jnp.zeros(codes.shape, jnp.float32)
            for level in range(levels):
                if own == 1 and ref.shape[2] == 1:
                    value = ref[level, 0, 0].astype(jnp.float32)
                else:
                    value = of_output(ref, level, field)
                weight = jnp.where(codes == level - levels // 2, value, weight)
            return weight

        zeros = tuple(jnp.zeros((rows, width), sums) for _ in range(fields))
        totals = jax.lax.fori_loop(0, pl.cdiv(inputs, depth), add, zeros)
        for field, total in enumerate(totals):
            y = total.astype(jnp.float32)
            if not is_blocked:
                y *= of_output(scale_ref, 0, field)
            if x_scale is not None and not of_block:
                y *= of_token(0)
            plgpu.store(
                out_ref.at[row, jnp.int32(field), column],
                y.astype(out_ref.dtype),
                mask=row_exists[:, None] & column_exists[None, :],
            )

    arrays = x, values, scale, *given.values()
    return pl.pallas_call(
        program,
        grid=(pl.cdiv(tokens, rows), pl.cdiv(columns, width)),
        out_shape=kernel_result((tokens, fields, columns), layout.dtype, *arrays),
        compiler_params=plgpu.CompilerParams(num_warps=4 if rows <= 16 else 8, num_stages=4),
        interpret=interpret,
        name="quantized_matmul",
    )(*arrays)


def _block(tokens: int, columns: int, inputs: int, layout: Layout) -> tuple[int, int, int]:
    """Tokens, columns and inputs of a tile: powers of two, the inputs within a block."""
    tuned = tuned_block("quantized_matmul", (tokens, inputs, columns))
    rows, width, depth = tuned or _BLOCK
    width //= max(1, layout.fields // 2)
    if layout.blocks > 1:
        depth = min(depth, layout.block & -layout.block)  # the largest power of two that divides it
    return (
        min(rows, _power_of_two(tokens)),
        min(width, _power_of_two(columns)),
        min(depth, _power_of_two(inputs)),
    )


def _power_of_two(size: int) -> int:
    return max(_LEAST, 1 << math.ceil(math.log2(size)))


def _range(block: Array, size: int, end: int) -> tuple[pl.Slice | slice, Array]:
    """The places of a block, and whether each exists."""
    return pl.ds(block * size, size), block * size + jnp.arange(size) < end


def _dot_of_codes(x: Array, codes: Array) -> Array:
    if x.dtype == jnp.int8:
        return _dot(x, codes.astype(jnp.int8), jnp.int32)
    if x.dtype != codes.dtype:  # matrix units take two of one type
        x, codes = (a.astype(jnp.float32).astype(jnp.bfloat16) for a in (x, codes))
    return _dot(x, codes, jnp.float32)


def _zero(ref) -> int | float:
    return 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0


def _dot(x: Array, weight: Array, dtype: jnp.dtype) -> Array:
    return jax.lax.dot(
        x,
        weight,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )
