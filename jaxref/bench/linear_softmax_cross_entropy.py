"""Cross-entropy of a linear head, in blocks, against the plain logits: time, memory, accuracy.

Loss and gradients of the mean over the tokens, of a language-model head with a large vocabulary
and of one so small that blocks would gain nothing and must cost nothing. The peer multiplies out
the logits and gives them to `optax.losses.softmax_cross_entropy_with_integer_labels`. On a GPU or a
TPU the Pallas kernels and both ways to cut the logits into blocks are measured too, and the head of
a model of some eight billion parameters, in bfloat16.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxref.bench.harness import Measurement, compiled_cost, interleave, progress, ratios
from jaxref.kernels import linear_softmax_cross_entropy

NAME = "linear_softmax_cross_entropy"


def plain(hidden: Array, kernel: Array, labels: Array) -> Array:
    """The losses from all logits at once."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)


def run(
    *, quick: bool = False, repeats: int = 5, small_repeats: int = 200, dtype: str = "float32"
) -> Iterator[Measurement]:
    """Shapes of a training step's head, with `repeats` rounds of the large ones."""
    ours = implementations()
    large = (2048, 64, 8192) if quick else (4096, 512, 131072)
    yield from compare(*large, ours, dtype=dtype, repeats=repeats)
    yield from compare(
        2048, 160, 256, {"jaxref": ours["jaxref"]}, dtype=dtype, repeats=small_repeats
    )
    if jax.default_backend() in ("gpu", "tpu") and not quick:
        yield from compare(8192, 4096, 131072, ours, dtype="bfloat16", repeats=repeats)


def implementations() -> dict[str, Callable[..., Array]]:
    """Names and functions of ours that the backend is worth measuring with."""
    ours = {"jaxref": linear_softmax_cross_entropy}
    if jax.default_backend() in ("gpu", "tpu"):
        for name, blocks in (("pallas", None), ("xla", "vocabulary"), ("xla", "tokens")):
            key = f"jaxref {name}" + (f" by {blocks}" if blocks else "")
            ours[key] = partial(linear_softmax_cross_entropy, implementation=name, blocks=blocks)
    return ours


def compare(
    tokens: int,
    features: int,
    vocabulary: int,
    ours: Mapping[str, Callable[..., Array]],
    *,
    dtype: str,
    repeats: int,
) -> Iterator[Measurement]:
    """Ours and the plain version at one shape."""
    case = f"tokens={tokens} features={features} vocabulary={vocabulary} {dtype}"
    progress(case)
    keys = jax.random.split(jax.random.key(0), 3)
    args = (
        jax.random.normal(keys[0], (tokens, features), dtype),
        jax.random.normal(keys[1], (features, vocabulary), dtype) * features**-0.5,
        jax.random.randint(keys[2], (tokens,), 0, vocabulary),
    )

    def step(losses: Callable[..., Array]) -> jax.stages.Wrapped:
        return jax.jit(jax.value_and_grad(lambda *args: losses(*args).mean(), argnums=(0, 1)))

    steps = {name: step(losses) for name, losses in {**ours, "plain": plain}.items()}
    memory = {name: compiled_cost(step, *args).temporary_bytes for name, step in steps.items()}
    _, expected = steps["plain"](*args)
    for name in ours:
        _, gradients = steps[name](*args)
        for of, a, b in zip(("hidden", "kernel"), gradients, expected):
            error = jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b)
            metric = f"relative difference of the gradient of {of}"
            yield Measurement(NAME, case, name, metric, float(error))
        del gradients, a, b
    del expected

    calls = {name: partial(step, *args) for name, step in steps.items()}
    times = interleave(calls, repeats=repeats, warmup=1)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for metric, values in (("temporary bytes", memory), ("seconds", seconds)):
        for name in ours:
            ratio = memory[name] / memory["plain"]
            if metric == "seconds":
                ratio = ratios(times, name, "plain")
            yield Measurement(NAME, case, name, metric, values[name], "plain", ratio)
        yield Measurement(NAME, case, "plain", metric, values["plain"])
