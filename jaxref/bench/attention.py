"""The attention functions against jax.nn.dot_product_attention, forward and backward.

Two shapes of self-attention, with and without the causal mask, then one query over a cache of
keys, as in generation, forward only. Third-order attention, whose time grows with the cube of the
length, has a short shape of its own.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref import attention
from jaxref.bench.harness import Measurement, compiled_cost, interleave, progress, ratios

NAME = "attention"
PEER = "jax.nn.dot_product_attention"


def run(*, quick: bool = False, repeats: int = 20) -> Iterator[Measurement]:
    """`repeats` rounds of every function at every shape."""
    repeats = 2 if quick else repeats
    shapes = [(2, 16, 2, 8)] if quick else [(8, 256, 8, 64), (2, 1024, 8, 64)]
    for shape in shapes:
        for is_causal in (True,) if quick else (False, True):
            case = described(shape, is_causal)
            calls = {name: partial(call, is_causal=is_causal) for name, call in functions(shape)}
            yield from compared(case, calls, [shape] * 3, repeats=repeats)

    shape = (1, 8, 2, 8) if quick else (2, 64, 4, 64)
    third = {
        PEER: lambda q, k, v, *_: jax.nn.dot_product_attention(q, k, v),
        "third_order_attention": lambda q, k, v, k2, v2: attention.third_order_attention(
            q, k, k2, v, v2
        ),
    }
    yield from compared(described(shape, False), third, [shape] * 5, repeats=repeats)

    batch, k_len, heads, dim = (2, 16, 2, 8) if quick else (8, 1024, 8, 64)
    case = f"one query batch={batch} k_len={k_len} heads={heads} dim={dim}, forward"
    mask = jnp.arange(k_len) < jnp.linspace(1, k_len, batch, dtype=int)[:, None, None, None]
    calls = {
        PEER: partial(jax.nn.dot_product_attention, mask=mask),
        "dot_product_attention": partial(attention.dot_product_attention, mask=mask),
    }
    shapes = [(batch, length, heads, dim) for length in (1, k_len, k_len)]
    yield from compared(case, calls, shapes, repeats=repeats, backward=False)


def functions(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[..., Array]]]:
    """Names and functions `f(query, key, value, *, is_causal)`."""
    _, length, heads, _ = shape
    log_temperature = jnp.zeros((heads, length))
    yield PEER, jax.nn.dot_product_attention
    for name in (
        "dot_product_attention",
        "query_key_norm_attention",
        "linear_attention",
        "rope_alibi_attention",
    ):
        yield name, getattr(attention, name)
    yield (
        "entropy_guided_attention",
        lambda q, k, v, **kw: attention.entropy_guided_attention(q, k, v, log_temperature, **kw),
    )
    yield (
        "probabilistic_block_attention",
        partial(attention.probabilistic_block_attention, key_rng=jax.random.key(0)),
    )
    yield "causal_pair_reduction", pair_reduction


def pair_reduction(query: Array, key: Array, value: Array, *, is_causal: bool) -> Array:
    """The values mixed without regard to queries and keys."""
    flat = value.reshape(*value.shape[:2], -1)
    mixed = attention.causal_pair_reduction(flat, context="causal" if is_causal else "global")
    return mixed.reshape(value.shape)


def compared(
    case: str,
    calls: Mapping[str, Callable[..., Array]],
    shapes: Sequence[tuple[int, ...]],
    *,
    repeats: int,
    backward: bool = True,
) -> Iterator[Measurement]:
    """The time and the scratch memory of each function of arrays of these shapes."""
    progress(case)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    cotangent = jnp.asarray(rng.standard_normal(shapes[0], np.float32))

    def step(call: Callable[..., Array]) -> jax.stages.Wrapped:
        def both(cotangent: Array, *arrays: Array) -> Any:
            output, vjp = jax.vjp(call, *arrays)
            return output, vjp(cotangent)

        return jax.jit(both if backward else lambda _, *arrays: call(*arrays))

    steps = {name: step(call) for name, call in calls.items()}
    if "dot_product_attention" in steps:
        results = (steps[name](cotangent, *arrays) for name in (PEER, "dot_product_attention"))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), *results)
    memory = {
        name: compiled_cost(step, cotangent, *arrays).temporary_bytes
        for name, step in steps.items()
    }
    times = interleave(
        {name: partial(step, cotangent, *arrays) for name, step in steps.items()}, repeats=repeats
    )
    for name in calls:
        seconds = statistics.median(times[name])
        if name == PEER:
            yield Measurement(NAME, case, name, "seconds", seconds)
        else:
            ratio = ratios(times, name, PEER)
            yield Measurement(NAME, case, name, "seconds", seconds, PEER, ratio)
        yield Measurement(NAME, case, name, "temporary bytes", memory[name])


def described(shape: tuple[int, ...], is_causal: bool) -> str:
    batch, length, heads, dim = shape
    causal = " causal" if is_causal else ""
    return f"batch={batch} length={length} heads={heads} dim={dim}{causal}"
