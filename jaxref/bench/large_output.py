"""A training step over very many classes: the factored Z-loss layer against log-softmax.

A language model of bags of words: the mean of ten embeddings is the hidden state, of 512 numbers,
and the next word one of 793,471, the vocabulary of the One Billion Word data. Both sides take a
step of gradient descent on the embeddings of the words that occur and on the output matrix, with
what they train donated. The peer multiplies out the outputs and gives them to
`optax.losses.softmax_cross_entropy_with_integer_labels`.

The second part times the layer's step from 10^4 to 10^6 classes, all sizes in the same rounds.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import optax
from jax import Array

from jaxref.bench.harness import Measurement, compiled_cost, interleave, progress, ratios
from jaxref.losses import factored_output_init, factored_output_loss

NAME = "large_output"

WORDS = 10
"""How many words the next one is predicted from, as in the authors' example."""

EMBEDDINGS = 10_000
"""How many of them have an embedding of their own: it is the output that is measured."""


def factored_step(trained: Any, words: Array, labels: Array) -> tuple[Any, Array]:
    """The embeddings by their gradient, the layer by its loss."""
    embeddings, layer = trained

    def loss(vectors: Array) -> tuple[Array, Any]:
        values, after = factored_output_loss(vectors.mean(axis=1), labels, layer, learning_rate=1.0)
        return values.mean(), after

    gradient, layer = jax.grad(loss, has_aux=True)(embeddings[words])
    return (embeddings.at[words].add(-gradient), layer), layer.step


def plain_step(trained: Any, words: Array, labels: Array) -> tuple[Any, Array]:
    """The embeddings and the output matrix by their gradients, from all outputs."""
    embeddings, weights = trained

    def loss(vectors: Array, weights: Array) -> Array:
        outputs = vectors.mean(axis=1) @ weights.T
        return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    value, (for_vectors, for_weights) = jax.value_and_grad(loss, argnums=(0, 1))(
        embeddings[words], weights
    )
    return (embeddings.at[words].add(-for_vectors), weights - for_weights), value


def run(
    *,
    quick: bool = False,
    batch: int = 128,
    features: int = 512,
    repeats: int = 3,
    layer_repeats: int = 100,
) -> Iterator[Measurement]:
    """The step with both outputs, and the layer's by the number of classes."""
    classes = 793_471
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    if quick:
        classes, sizes, batch, features = 20_000, (1_000, 10_000), 8, 32
    yield from compare(batch, features, classes, repeats=repeats, steps_a_round=2 if quick else 20)
    yield from by_classes(batch, features, sizes, repeats=layer_repeats)


def compare(
    batch: int, features: int, classes: int, *, repeats: int, steps_a_round: int
) -> Iterator[Measurement]:
    """Ours and the plain version at one shape: several steps of ours to one of the plain version,
    so that what they leave of each other in the caches does not count."""
    case = f"batch={batch} features={features} classes={classes} float32"
    progress(case)
    words, labels = examples(batch, classes)
    weights = features**-0.5 * jax.random.normal(jax.random.key(0), (classes, features))
    layer = factored_output_init(weights)
    steps = {
        "jaxref": Repeated(factored_step, (table(features), layer), times=steps_a_round),
        "log-softmax": Repeated(plain_step, (table(features), weights)),
    }
    del layer, weights
    memory = {name: step.temporary_bytes(words, labels) for name, step in steps.items()}
    calls = {name: partial(step, words, labels) for name, step in steps.items()}
    times = interleave(calls, repeats=repeats, warmup=1)
    times["jaxref"] = [seconds / steps_a_round for seconds in times["jaxref"]]
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for metric, values, ratio in (
        ("seconds", seconds, ratios(times, "jaxref", "log-softmax")),
        ("temporary bytes", memory, memory["jaxref"] / memory["log-softmax"]),
    ):
        yield Measurement(NAME, case, "jaxref", metric, values["jaxref"], "log-softmax", ratio)
        yield Measurement(NAME, case, "log-softmax", metric, values["log-softmax"])


def by_classes(
    batch: int, features: int, sizes: tuple[int, ...], *, repeats: int
) -> Iterator[Measurement]:
    """The layer's step at several numbers of classes, each over the first's."""
    steps = {}
    for classes in sizes:
        progress(f"classes={classes}")
        layer = factored_output_init(num_classes=classes, features=features, key=jax.random.key(0))
        step = Repeated(factored_step, (table(features), layer))
        steps[f"{classes} classes"] = partial(step, *examples(batch, classes))
    times = interleave(steps, repeats=repeats, warmup=2)
    first, *_ = steps
    for name, values in times.items():
        yield Measurement(
            NAME,
            f"batch={batch} features={features} float32",
            name,
            "seconds",
            statistics.median(values),
            first,
            ratios(times, name, first),
        )


class Repeated:
    """A step that is given its own result, whose memory it takes over, some times in a row."""

    def __init__(self, step: Callable[..., tuple[Any, Array]], trained: Any, *, times: int = 1):
        self.step = jax.jit(step, donate_argnums=0)
        self.trained = trained
        self.times = times

    def __call__(self, *batch: Array) -> Any:
        for _ in range(self.times):
            self.trained, _ = self.step(self.trained, *batch)
        return self.trained

    def temporary_bytes(self, *batch: Array) -> float:
        return compiled_cost(self.step, self.trained, *batch).temporary_bytes


def examples(batch: int, classes: int) -> tuple[Array, Array]:
    """Random words, and the words that follow."""
    words_key, labels_key = jax.random.split(jax.random.key(1))
    words = jax.random.randint(words_key, (batch, WORDS), 0, EMBEDDINGS)
    return words, jax.random.randint(labels_key, (batch,), 0, classes)


def table(features: int) -> Array:
    """Embeddings whose mean has outputs of about unit size."""
    return WORDS**0.5 * jax.random.normal(jax.random.key(2), (EMBEDDINGS, features))
