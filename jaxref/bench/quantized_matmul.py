"""Products with quantized kernels beside those of floats, and of PyTorch's integers.

On a CPU weights of 8 and 4 bits for one and for sixteen tokens, beside a float32 product and beside
one that dequantizes first, and int8 · int8; on a GPU the same in large, with float8. "bytes" is
what a product has to read and write, "ratio" then its share of what the peer has to. `--tune`
measures sizes of the kernels' tiles first, and keeps the best for all later programs.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.bench.harness import Measurement, interleave, optional_peer, progress, ratios
from jaxref.bench.tuning import Block, tune
from jaxref.kernels import quantized_matmul
from jaxref.quantization import QuantSpec, dequantize, quantize, quantize_rowwise

NAME = "quantized_matmul"

OUTPUTS = QuantSpec(granularity="channel", axis=1)
FORMATS = {
    "int8": OUTPUTS,
    "int8, blocks of 64": QuantSpec(granularity="block", axis=0, block_size=64),
    "int4, blocks of 64": QuantSpec(bits=4, granularity="block", axis=0, block_size=64),
    "int2": QuantSpec(bits=2, granularity="channel", axis=1),
}


def run(*, quick: bool = False, repeats: int = 30, tune: bool = False) -> Iterator[Measurement]:
    """`repeats` rounds of every product of every shape."""
    repeats = 2 if quick else repeats
    backend = jax.default_backend()
    implementations = ("xla",) if backend == "cpu" else ("xla", "pallas")
    dtype = "float32" if backend == "cpu" else "bfloat16"
    size = 128 if quick else 4096 if backend == "cpu" else 8192
    if tune:
        if backend == "cpu":
            raise ValueError("tune needs a GPU or a TPU: XLA's programs for a CPU have no tiles")
        for tokens in (1, 16, size):
            yield from tuned((tokens, size, size), dtype, repeats=repeats)
    for tokens in (1, 16):
        yield from of_weights((tokens, size, size), dtype, implementations, repeats=repeats)
    shape = (64, 128, 128) if quick else (512, 2048, 2048) if backend == "cpu" else (size,) * 3
    yield from of_integers(shape, dtype, implementations, repeats=repeats)
    if backend != "cpu":
        yield from of_float8(shape, dtype, implementations, repeats=repeats)


def of_weights(
    shape: tuple[int, int, int], dtype: str, implementations: tuple[str, ...], *, repeats: int
) -> Iterator[Measurement]:
    """The product of floats with weights in few bits: `tokens, inputs, outputs`."""
    tokens, inputs, outputs = shape
    x, w = random_operands(shape, dtype)
    calls: dict[str, Callable[[], Any]] = {dtype: partial(jax.jit(jnp.matmul), x, w)}
    moved = {dtype: w.nbytes}
    for (name, spec), implementation in itertools.product(FORMATS.items(), implementations):
        q = quantize(w, spec)

        def product(x: Array, q: Any, implementation: str = implementation) -> Array:
            return quantized_matmul(
                x,
                q.values,
                q.scale,
                bits=q.spec.bits,
                padding=q.padding,
                block_size=q.spec.block_size,
                implementation=implementation,
            )

        full_name = f"{name}, {implementation}"
        calls[full_name], moved[full_name] = partial(jax.jit(product), x, q), q.nbytes
    first = quantize(w, OUTPUTS)
    naive = jax.jit(lambda x, q: x @ dequantize(q))
    calls["int8, dequantized first"], moved["int8, dequantized first"] = (
        partial(naive, x, first),
        first.nbytes,
    )
    both = x.nbytes + x.dtype.itemsize * tokens * outputs
    traffic = {name: nbytes + both for name, nbytes in moved.items()}
    yield from timed(f"{[tokens, inputs]} x {[inputs, outputs]}", calls, dtype, repeats, traffic)


def of_integers(
    shape: tuple[int, int, int], dtype: str, implementations: tuple[str, ...], *, repeats: int
) -> Iterator[Measurement]:
    """The product of codes of 8 bits on both sides, beside XLA's of the codes without any scale."""
    x, w = random_operands(shape, dtype)
    x_q, w_q = quantize_rowwise(x), quantize(w, OUTPUTS)
    calls: dict[str, Callable[[], Any]] = {dtype: partial(jax.jit(jnp.matmul), x, w)}
    for implementation in implementations:
        product = jax.jit(partial(_of_codes, implementation=implementation))
        arrays = x_q.values, w_q.values, w_q.scale, x_q.scale
        calls[f"int8 · int8, {implementation}"] = partial(product, *arrays)
    for name, kernel, axis in (
        ("codes alone", w_q.values, 0),
        ("codes alone, transposed", jnp.asarray(w_q.values.T), 1),
    ):
        dot = partial(
            jax.lax.dot_general,
            dimension_numbers=(((1,), (axis,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        calls[f"int8 · int8, {name}"] = partial(jax.jit(dot), x_q.values, kernel)
    if jax.default_backend() == "cpu" and (torch := optional_peer("torch")) is not None:
        a, b = (torch.tensor(jax.device_get(q.values)) for q in (x_q, w_q))
        calls["torch._int_mm"] = lambda: torch._int_mm(a, b)
    yield from timed(f"{list(shape)}, both sides", calls, dtype, repeats)


def of_float8(
    shape: tuple[int, int, int], dtype: str, implementations: tuple[str, ...], *, repeats: int
) -> Iterator[Measurement]:
    """The product of float8 codes on both sides, one scale each."""
    x, w = random_operands(shape, dtype)
    codes = tuple(a.astype(jnp.float8_e4m3fn) for a in (x, w))
    calls: dict[str, Callable[[], Any]] = {dtype: partial(jax.jit(jnp.matmul), x, w)}
    for implementation in implementations:
        product = jax.jit(partial(_of_codes, implementation=implementation))
        of_token = jnp.ones((len(x), 1))
        arrays = *codes, jnp.ones((1, 1)), of_token
        calls[f"float8 · float8, {implementation}"] = partial(product, *arrays)
    yield from timed(f"{list(shape)}, float8", calls, dtype, repeats)


def tuned(
    shape: tuple[int, int, int],
    dtype: str,
    *,
    repeats: int,
    implementation: str = "pallas",
    candidates: tuple[Block, ...] | None = None,
) -> Iterator[Measurement]:
    """Measures sizes of tiles (tokens, columns, inputs) for weights of 4 bits in blocks of 64."""
    x, w = random_operands(shape, dtype)
    q = quantize(w, FORMATS["int4, blocks of 64"])

    def product(x: Array, values: Array, scale: Array) -> Array:
        return quantized_matmul(
            x, values, scale, bits=4, block_size=64, implementation=implementation
        )

    if candidates is None:
        on_tpu = jax.default_backend() == "tpu"
        rows = {min(r, max(16, shape[0])) for r in ((64, 256, 512) if on_tpu else (16, 64, 128))}
        others = ((256, 512, 1024), (256, 512, 1024)) if on_tpu else ((64, 128, 256), (32, 64))
        candidates = tuple(itertools.product(sorted(rows), *others))
    entry = (shape[0], shape[1], q.values.shape[1])
    yield from tune(NAME, NAME, entry, product, (x, q.values, q.scale), candidates, repeats)


def timed(
    case: str,
    calls: dict[str, Callable[[], Any]],
    peer: str,
    repeats: int,
    traffic: dict[str, int] | None = None,
) -> Iterator[Measurement]:
    """Seconds of every call beside the peer's, and the bytes that it has to move."""
    progress(case)
    times = interleave(calls, repeats=repeats)
    for name, seconds in times.items():
        ratio = None if name == peer else ratios(times, name, peer)
        against = None if ratio is None else peer
        yield Measurement(NAME, case, name, "seconds", statistics.median(seconds), against, ratio)
        if traffic is not None:
            share = None if ratio is None else traffic[name] / traffic[peer]
            yield Measurement(NAME, case, name, "bytes", traffic[name], against, share)


def random_operands(shape: tuple[int, int, int], dtype: str) -> tuple[Array, Array]:
    """Normal `[tokens, inputs]` and `[inputs, outputs]`."""
    tokens, inputs, outputs = shape
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (tokens, inputs), dtype)
    return x, jax.random.normal(keys[1], (inputs, outputs), dtype) * inputs**-0.5


def _of_codes(x: Array, values: Array, scale: Array, x_scale: Array, implementation: str) -> Array:
    return quantized_matmul(x, values, scale, x_scale=x_scale, implementation=implementation)
