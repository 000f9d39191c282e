"""Temporary memory of the kernels on TPUs, by the TPU's own compiler; no TPU is needed.

Loss and gradients of a language-model head, beside the one that writes its logits, and causal
attention with its gradients at two lengths, for a core of every generation. Needs libtpu, which the
extra `tpu-aot` brings.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxref import kernels
from jaxref.bench.ahead_of_time import TOPOLOGIES, compile_for_tpu
from jaxref.bench.harness import Measurement, progress
from jaxref.bench.linear_softmax_cross_entropy import plain

NAME = "tpu_memory"


def run(*, quick: bool = False) -> Iterator[Measurement]:
    """Every chip, or the smallest one at small shapes."""
    if importlib.util.find_spec("libtpu") is None:
        progress("libtpu is not installed (the extra tpu-aot): nothing can be compiled")
        return
    for chip in ("v5e",) if quick else TOPOLOGIES:
        yield from head(chip, (256, 128, 1024) if quick else (8192, 4096, 131072))
        for length in (512,) if quick else (8192, 16384):
            yield from attention(chip, (1, length, 2, 128) if quick else (4, length, 16, 128))


def head(chip: str, sizes: tuple[int, int, int]) -> Iterator[Measurement]:
    """The head of a language model with these tokens, features and vocabulary."""
    tokens, features, vocabulary = sizes
    case = f"{chip}: head, tokens={tokens} features={features} vocabulary={vocabulary} bfloat16"
    shapes = (
        jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16),
        jax.ShapeDtypeStruct((features, vocabulary), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    fused = partial(kernels.linear_softmax_cross_entropy, implementation="pallas_tpu")
    memory = {}
    for name, losses in (("plain", plain), ("linear_softmax_cross_entropy", fused)):

        def mean_loss(*args: Array, losses: Callable[..., Array] = losses) -> Array:
            return losses(*args).mean()

        memory[name] = temporary(chip, jax.value_and_grad(mean_loss, (0, 1)), *shapes)
        ratio = None if name == "plain" else memory[name] / memory["plain"]
        peer = None if name == "plain" else "plain"
        yield Measurement(NAME, case, name, "temporary bytes", memory[name], peer, ratio)


def attention(chip: str, shape: tuple[int, int, int, int]) -> Iterator[Measurement]:
    """Causal attention of this shape, forward and backward."""

    def total(*args: Array) -> Array:
        output = kernels.flash_attention(*args, is_causal=True, implementation="pallas_tpu")
        return jnp.sum(jnp.asarray(output), dtype=jnp.float32)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    used = temporary(chip, jax.value_and_grad(total, (0, 1, 2)), *shapes)
    case = f"{chip}: attention, {list(shape)} bfloat16"
    yield Measurement(NAME, case, "flash_attention", "temporary bytes", used)


def temporary(chip: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> float:
    """Bytes, or NaN for a program that does not fit the chip's memory."""
    try:
        compiled = compile_for_tpu(chip, function, *shapes)
    except jax.errors.JaxRuntimeError as error:
        progress(f"{chip}: {str(error).partition(chr(10))[0]}")
        return float("nan")
    memory = compiled.memory_analysis()
    return float("nan") if memory is None else memory.temp_size_in_bytes
