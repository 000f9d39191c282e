"""Softmax, cross-entropy and attention kernels beside JAX's, PyTorch's and the speed of a copy.

On a CPU the softmax of long rows, in every way to go over them, and cross-entropy forward and
backward. On a GPU or TPU also the Pallas kernels, and on a GPU flash attention beside cuDNN's.
"copy speed" is the time of a plain copy of the input over the time of the function: no function
that reads an array and writes one can reach more than 1. `--tune` measures sizes of the kernels'
tiles first, and keeps the best for all later programs.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxref import kernels
from jaxref.bench.harness import (
    Measurement,
    compiled_cost,
    interleave,
    optional_peer,
    progress,
    ratios,
)
from jaxref.bench.tuning import Block, tune

NAME = "softmax"
PEER = "jax.nn.softmax"


def run(*, quick: bool = False, repeats: int = 30, tune: bool = False) -> Iterator[Measurement]:
    """`repeats` rounds of every function at every shape."""
    repeats = 2 if quick else repeats
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        shapes = [((2, 256), "float32")]
        if not quick:
            shapes = [((16, 2**20), "float32"), ((256, 32000), "float32"), ((1, 2**20), "float32")]
    else:
        shapes = [((8192, 32000), "bfloat16"), ((4096, 32000), "float32"), ((64, 2**20), "float32")]
    if tune:
        if on_cpu:
            raise ValueError("tune needs a GPU or a TPU: XLA's programs for a CPU have no tiles")
        for shape, dtype in shapes:
            yield from tuned_rows(shape, dtype, repeats=repeats)
        yield from tuned_attention((8, 4096, 16, 128), "bfloat16", repeats=repeats)
        yield from tuned_head((8192, 4096, 131072), "bfloat16", repeats=repeats)
    for shape, dtype in shapes:
        yield from softmax_case(shape, dtype, repeats=repeats, on_cpu=on_cpu)
    shape, dtype = shapes[0] if not on_cpu else ((4, 128) if quick else (2048, 32000), "float32")
    yield from cross_entropy_case(shape, dtype, repeats=repeats, on_cpu=on_cpu)
    if jax.default_backend() == "gpu":
        yield from attention_case((8, 4096, 16, 128), "bfloat16", repeats=repeats)


def softmax_case(
    shape: tuple[int, int], dtype: str, *, repeats: int, on_cpu: bool
) -> Iterator[Measurement]:
    """The softmax of rows, forward."""
    x = 4 * jax.random.normal(jax.random.key(0), shape, dtype)
    functions: dict[str, Callable[[Array], Array]] = {
        "copy": lambda x: -x,  # a copy that the compiler cannot leave out
        PEER: jax.nn.softmax,
        "softmax": partial(kernels.softmax, implementation="xla"),
        "two_pass_softmax": partial(kernels.two_pass_softmax, implementation="xla"),
        "three passes, recomputing": kernels.three_pass_softmax,
        "three passes, reloading": partial(kernels.three_pass_softmax, recompute=False),
    }
    if not on_cpu:
        functions["softmax, pallas"] = partial(kernels.softmax, implementation="pallas")
        functions["two_pass_softmax, pallas"] = partial(
            kernels.two_pass_softmax, implementation="pallas"
        )
    calls: dict[str, Callable[[], Any]] = {}
    for name, function in functions.items():
        calls[name] = partial(jax.jit(function), x)
    if on_cpu and (torch := optional_peer("torch")) is not None:
        theirs = torch.tensor(jax.device_get(x))
        calls["torch.softmax"] = lambda: torch.softmax(theirs, -1)
    case = f"{list(shape)} {dtype}, softmax"
    yield from timed(case, calls, peer=PEER, repeats=repeats, copy="copy")


def cross_entropy_case(
    shape: tuple[int, int], dtype: str, *, repeats: int, on_cpu: bool
) -> Iterator[Measurement]:
    """Cross-entropy of logits and its gradient."""
    logits = 4 * jax.random.normal(jax.random.key(0), shape, dtype)
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, shape[1])
    plain = optax.losses.softmax_cross_entropy_with_integer_labels

    def step(losses: Callable[..., Array]) -> Callable[..., Any]:
        return jax.jit(jax.value_and_grad(lambda x, ids: losses(x, ids).mean()))

    peer = "optax"
    steps = {
        peer: step(plain),
        "softmax_cross_entropy": step(partial(kernels.softmax_cross_entropy, implementation="xla")),
    }
    if not on_cpu:
        steps["softmax_cross_entropy, pallas"] = step(
            partial(kernels.softmax_cross_entropy, implementation="pallas")
        )
    case = f"{list(shape)} {dtype}, cross-entropy forward and backward"
    calls: dict[str, Callable[[], Any]] = {
        name: partial(step, logits, labels) for name, step in steps.items()
    }
    yield from timed(case, calls, peer=peer, repeats=repeats)
    for name, function in steps.items():
        memory = compiled_cost(function, logits, labels).temporary_bytes
        yield Measurement(NAME, case, name, "temporary bytes", memory)


def attention_case(
    shape: tuple[int, int, int, int],
    dtype: str,
    *,
    repeats: int,
    implementation: str = "pallas",
    peer: str = "cudnn",
) -> Iterator[Measurement]:
    """Causal attention, forward alone and with its gradients, beside that of JAX."""
    keys = jax.random.split(jax.random.key(0), 3)
    args = tuple(jax.random.normal(key, shape, dtype) for key in keys)
    functions: dict[str, Callable[..., Array]] = {
        f"jax.nn, {peer}": partial(
            jax.nn.dot_product_attention, is_causal=True, implementation=peer
        ),
        "flash_attention": lambda *qkv: jnp.asarray(
            kernels.flash_attention(*qkv, is_causal=True, implementation=implementation)
        ),
    }
    for metric in ("forward", "forward and backward"):
        calls: dict[str, Callable[[], Any]] = {}
        for name, f in functions.items():
            call: Callable[..., Any] = f
            if metric != "forward":
                call = jax.value_and_grad(lambda *x, f=f: f(*x).sum().astype("float32"), (0, 1, 2))
            calls[name] = partial(jax.jit(call), *args)
        case = f"{list(shape)} {dtype}, causal attention {metric}"
        yield from timed(case, calls, peer=f"jax.nn, {peer}", repeats=repeats)


def timed(
    case: str,
    calls: Mapping[str, Callable[[], Any]],
    *,
    peer: str,
    repeats: int,
    copy: str | None = None,
) -> Iterator[Measurement]:
    """Seconds of every call, and its share of the speed of the copy among them."""
    progress(case)
    times = interleave(calls, repeats=repeats)
    for name, seconds in times.items():
        ratio = None if name == peer else ratios(times, name, peer)
        against = None if ratio is None else peer
        yield Measurement(NAME, case, name, "seconds", statistics.median(seconds), against, ratio)
        if copy is not None and name != copy:
            yield Measurement(NAME, case, name, "copy speed", ratios(times, copy, name))


def tuned_rows(
    shape: tuple[int, int],
    dtype: str,
    *,
    repeats: int,
    implementation: str = "pallas",
    candidates: Sequence[Block] | None = None,
) -> Iterator[Measurement]:
    """Measures sizes of tiles for every kernel over rows of this shape."""
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, shape[1])
    for name in ("softmax", "log_softmax", "logsumexp", "two_pass_softmax"):
        function = partial(getattr(kernels, name), implementation=implementation)
        yield from tune(NAME, name, shape, function, (x,), candidates or row_tiles(shape), repeats)
    function = partial(kernels.softmax_cross_entropy, implementation=implementation)
    candidates = candidates or row_tiles(shape)
    yield from tune(
        NAME, "softmax_cross_entropy", shape, function, (x, labels), candidates, repeats
    )


def tuned_attention(
    shape: tuple[int, int, int, int],
    dtype: str,
    *,
    repeats: int,
    implementation: str = "pallas",
    candidates: Sequence[Block] | None = None,
) -> Iterator[Measurement]:
    """Measures blocks of queries and keys for causal attention with its gradients."""
    args = jax.random.normal(jax.random.key(0), (3, *shape), dtype)

    def total(*args: Array) -> Array:
        attend = partial(kernels.flash_attention, is_causal=True, implementation=implementation)
        return jnp.sum(jnp.asarray(attend(*args)), dtype=jnp.float32)

    sizes = (128, 256, 512, 1024) if jax.default_backend() == "tpu" else (32, 64, 128)
    candidates = candidates or tuple(itertools.product(sizes, sizes))
    step = jax.value_and_grad(total, (0, 1, 2))
    yield from tune(NAME, "flash_attention", shape[1:], step, tuple(args), candidates, repeats)


def tuned_head(
    sizes: tuple[int, int, int],
    dtype: str,
    *,
    repeats: int,
    implementation: str = "pallas",
    candidates: Sequence[Block] | None = None,
) -> Iterator[Measurement]:
    """Measures tiles of tokens, vocabulary and, on a GPU, features, for a language model's head."""
    tokens, features, vocabulary = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, features), dtype)
    kernel = jax.random.normal(keys[1], (features, vocabulary), dtype) * features**-0.5
    labels = jax.random.randint(keys[2], (tokens,), 0, vocabulary)

    def mean_loss(hidden: Array, kernel: Array, labels: Array) -> Array:
        return kernels.linear_softmax_cross_entropy(
            hidden, kernel, labels, blocks="vocabulary", implementation=implementation
        ).mean()

    if candidates is None and jax.default_backend() == "tpu":
        candidates = tuple(itertools.product((256, 512, 1024, 2048), (256, 512, 1024)))
    candidates = candidates or tuple(itertools.product((64, 128), (64, 128, 256), (32, 64)))
    step, args = jax.value_and_grad(mean_loss, (0, 1)), (hidden, kernel, labels)
    yield from tune(NAME, "linear_softmax_cross_entropy", sizes, step, args, candidates, repeats)


def row_tiles(shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Sizes of tiles worth a try: what a platform's kernels can have at all.

    >>> len(row_tiles((1024, 32000))) > 10
    True
    """
    on_tpu = jax.default_backend() == "tpu"
    rows = (8, 16, 32, 64, 128, 256) if on_tpu else (1, 2, 4, 8)
    columns = (512, 2048, 8192, 32768) if on_tpu else (512, 1024, 2048, 4096, 8192)
    width = max(shape[1], min(columns))
    return tuple((r, c) for r, c in itertools.product(rows, columns) if c <= 2 * width)
