"""The product with a quantized kernel on a TPU: codes become numbers in its fast memory alone.

A step of the grid multiplies a block of tokens by a block of the kernel, as many inputs at a time
as hold whole blocks with a scale. The fields of a byte are outputs of their own until the end, as
lanes of a vector cannot be interleaved cheaply.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxref.kernels.block_sizes import tuned_block
from jaxref.kernels.implementation import kernel_result
from jaxref.kernels.quantized_matmul_xla import FLOAT8, Layout, Operands, codes_of_field
from jaxref.kernels.row_function import next_multiple

# Tokens, columns and inputs of a step at most.
_BLOCK = (256, 512, 512)

# Inputs of a step at most where a block with a scale asks for more than the above.
_MAX_INPUTS = 4096

# What the compiler may use of the fast memory; the smallest, that of a TPU v7x, has 64 MiB.
_MEMORY_BYTES = 48 * 2**20


def takes(layout: Layout) -> bool:
    """Whether blocks of inputs with a scale are such as steps can hold: rows of int8 in whole
    tiles, and not too many of them.

    >>> takes(Layout(1, 64, 4, 8, jnp.dtype("float32")))
    True
    """
    if layout.blocks == 1:
        return True
    return layout.block % 32 == 0 and math.lcm(layout.block, 128) <= _MAX_INPUTS


def matmul(operands: Operands, layout: Layout, interpret: bool) -> Array:
    """The products `[tokens, fields, columns]`, in the type of the result."""
    x, values, scale, zero_point, codebook, x_scale = operands
    if x.dtype == jnp.float16:  # the chips multiply none
        x = x.astype(jnp.float32)
    if values.dtype == jnp.uint8:
        values = jax.lax.bitcast_convert_type(values, jnp.int8)
    (tokens, inputs), columns, fields = x.shape, values.shape[1], layout.fields
    block_rows, block_columns, block_inputs = _block(tokens, columns, inputs, layout)
    steps = pl.cdiv(inputs, block_inputs)
    is_blocked = layout.blocks > 1
    groups = block_inputs // layout.block if is_blocked else 1
    sums_integers = x.dtype == jnp.int8 and not is_blocked

    def of_step(numbers: Array) -> Array:
        """Numbers per block `[blocks, ...]` by the step that needs them, `[steps, groups, ...]`."""
        missing = steps * groups - len(numbers) if is_blocked else 0
        numbers = jnp.pad(numbers, ((0, missing), *((0, 0),) * (numbers.ndim - 1)))
        return numbers.reshape(-1, groups, *numbers.shape[1:])

    arrays = {"x": x, "values": values}
    specs = [
        pl.BlockSpec((block_rows, block_inputs), lambda i, j, k: (i, k)),
        pl.BlockSpec((block_inputs, block_columns), lambda i, j, k: (k, j)),
    ]
    for name, numbers in (("scale", scale), ("zero_point", zero_point)):
        if numbers is not None:
            numbers = of_step(numbers.astype(jnp.float32))
            arrays[name] = numbers.reshape(len(numbers), groups * fields, columns)
            shape = (1, groups * fields, block_columns)
            specs.append(pl.BlockSpec(shape, lambda i, j, k: (k if is_blocked else 0, 0, j)))
    if codebook is not None:
        rows = len(codebook) * fields
        codebook = jnp.broadcast_to(codebook, (len(codebook), fields, columns))
        arrays["codebook"] = codebook.reshape(rows, columns).astype(jnp.float32)
        specs.append(pl.BlockSpec((rows, block_columns), lambda i, j, k: (0, j)))
    of_block = x_scale is not None and x_scale.shape[1] > 1
    if x_scale is not None:
        by_step = of_step(x_scale.T) if of_block else x_scale.T[None]
        arrays["x_scale"] = by_step.swapaxes(1, 2).astype(jnp.float32)
        shape = (1, block_rows, by_step.shape[1])
        specs.append(pl.BlockSpec(shape, lambda i, j, k: (k if of_block else 0, i, 0)))

    def step(*refs):
        *given, out_ref, total_ref = refs
        ref = dict(zip(arrays, given, strict=True))
        k = pl.program_id(2)

        @pl.when(k == 0)
        def _():
            total_ref[...] = jnp.zeros(total_ref.shape, total_ref.dtype)

        def of_group(name: str, group: int, field: int) -> Array:
            row = group * fields + field
            return ref[name][0, row : row + 1, :]

        def inputs_of(group: int) -> slice:
            return slice(group * layout.block, (group + 1) * layout.block)

        def number(weight: Array, group: int, field: int) -> Array:
            if zero_point is not None:
                weight = weight - of_group("zero_point", group, field)
            return weight * of_group("scale", group, field) if is_blocked else weight

        def dequantized(codes: Array, field: int) -> Array:
            weight = codes.astype(jnp.float32)
            if codebook is not None:
                weight = _look_up(weight, ref["codebook"], field, fields)
            if groups == 1:
                return number(weight, 0, field)
            parts = [number(weight[inputs_of(g)], g, field) for g in range(groups)]
            return jnp.concatenate(parts)

        x, values = ref["x"][...], ref["values"][...]
        exists = None
        if inputs % block_inputs:  # what fills up a block may be anything
            end = inputs - k * block_inputs
            x = _keep(x, jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < end)
            exists = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < end
        if x.dtype in FLOAT8:
            x = x.astype(jnp.float32).astype(jnp.bfloat16)
        for field in range(fields):
            codes = codes_of_field(values, field, fields)
            if x.dtype == jnp.int8:
                weight = codes.astype(jnp.int8)
            else:
                weight = dequantized(codes, field) if x_scale is None else codes.astype(jnp.float32)
                weight = weight if exists is None else jnp.where(exists, weight, 0)
                weight = weight.astype(x.dtype)
            if x_scale is None or not is_blocked:
                total_ref[field] += _dot(x, weight)
                continue
            for group in range(groups):
                own = inputs_of(group)
                part = _dot(x[:, own], weight[own]).astype(jnp.float32)
                part *= of_group("scale", group, field)
                if of_block:
                    part *= ref["x_scale"][0, :, group : group + 1]
                total_ref[field] += part

        @pl.when(k == steps - 1)
        def _():
            for field in range(fields):
                y = total_ref[field].astype(jnp.float32)
                if not is_blocked:
                    y *= of_group("scale", 0, field)
                if x_scale is not None and not of_block:
                    y *= ref["x_scale"][0]
                out_ref[field] = y.astype(out_ref.dtype)

    out = jnp.float32 if layout.dtype == jnp.float16 else layout.dtype
    y = pl.pallas_call(
        step,
        grid=(pl.cdiv(tokens, block_rows), pl.cdiv(columns, block_columns), steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((fields, block_rows, block_columns), lambda i, j, k: (0, i, j)),
        out_shape=kernel_result((fields, tokens, columns), out, *arrays.values()),
        scratch_shapes=[
            pltpu.VMEM(
                (fields, block_rows, block_columns), jnp.int32 if sums_integers else jnp.float32
            )
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_MEMORY_BYTES,
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(*arrays.values())
    return y.swapaxes(0, 1)


def _block(tokens: int, columns: int, inputs: int, layout: Layout) -> tuple[int, int, int]:
    """Tokens, columns and inputs of a step, whole tiles of every type."""
    tuned = tuned_block("quantized_matmul", (tokens, inputs, columns))
    block_rows, block_columns, block_inputs = tuned or _BLOCK
    if layout.blocks > 1:
        unit = math.lcm(layout.block, 128)
        block_inputs = unit * max(1, block_inputs // unit)
    return (
        min(block_rows, next_multiple(tokens, 32)),
        min(block_columns, next_multiple(columns, 128)),
        min(block_inputs, next_multiple(inputs, math.lcm(layout.block, 128)))
        if layout.blocks > 1
        else min(block_inputs, next_multiple(inputs, 128)),
    )


def _look_up(codes: Array, codebook_ref, field: int, fields: int) -> Array:
    """The levels that codes stand for, chosen one by one: the chip has no gather."""
    levels = codebook_ref.shape[0] // fields
    weight = jnp.zeros(codes.shape, jnp.float32)
    for level in range(levels):
        row = level * fields + field
        weight = jnp.where(codes == level - levels // 2, codebook_ref[row : row + 1, :], weight)
    return weight


def _keep(x: Array, exists: Array) -> Array:
    """`x` where it exists, else 0; narrow types are chosen from in 32 bits."""
    wide = x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
    return jnp.where(exists, wide, 0).astype(x.dtype)


def _dot(x: Array, weight: Array) -> Array:
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
    )
