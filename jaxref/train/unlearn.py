"""`--mode=unlearn`: a trained language model forgets some of its files."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from jax import Array
from ml_collections import ConfigDict

from jaxref.adaptation import (
    UnlearningMetrics,
    masked_updates,
    saliency_mask,
    unlearning_gap,
    unlearning_metrics,
)
from jaxref.core.checks import check_interval
from jaxref.train.config import ConfigError, resolve, with_overrides
from jaxref.train.continuation import Continuation
from jaxref.train.data import Corpus, validation_batches
from jaxref.train.loop import load, reference
from jaxref.train.losses import token_cross_entropy
from jaxref.train.methods.frame import Batch, Params
from jaxref.train.outcomes import save_unlearning_plot, table
from jaxref.train.places import place
from jaxref.train.program import ModelState, Program, TrainState, within
from jaxref.train.records import read_metrics
from jaxref.train.unlearning import Unlearning

_MEASURED_LOGITS = 2**23


class Measurement(NamedTuple):
    """What a model knows.

    Attributes:
      forget, retain, validation: mean cross-entropy of the files to forget, of as much of the rest,
        and of held-out text, in nats.
      metrics: what a classifier of tokens is measured by.
    """

    forget: float
    retain: float
    validation: float
    metrics: UnlearningMetrics


def unlearn(config: ConfigDict, workdir: Path) -> None:
    """Makes the newest checkpoint of a run forget `unlearn.files`, and prints what that did.

    The directory `unlearned/NAME` of the run then holds a run of its own, with unlearning.png;
    started again, it continues. With `unlearn.retrained`, the directory of a run that never saw
    the files (`data.exclude`), it ends as soon as it knows as little of them as that, and the
    rest's loss is within `unlearn.retain_within` of what it was; that part does not count for a
    method that would not get the rest back.

    Raises:
      ConfigError: a configuration that does not go together.
      ValueError: a number out of range, a configuration other than the directory's, or a pattern
        that matches no file, or all.
      CheckpointError: there is no checkpoint that can be read.
    """
    options = config.unlearn
    check_interval(1, jnp.inf, **{"unlearn.steps": options.steps})
    check_interval(1, jnp.inf, **{"unlearn.measure_every": options.measure_every})
    check_interval(0, jnp.inf, **{"unlearn.retain_within": options.retain_within})
    if not options.files or config.data.exclude:
        raise ConfigError(
            "--mode=unlearn takes the files unlearn.files, a pattern such as json/*.py, out of a "
            f"model that was trained on all, got {options.files!r} with data.exclude="
            f"{config.data.exclude!r}"
        )
    data = load(config)
    if not isinstance(data, Corpus):
        raise ConfigError(f"--mode=unlearn is for text, and data.name={config.data.name} is none")
    method: Unlearning = resolve(config, "unlearn.method")()
    without = load(with_overrides(config, [f"data.exclude={options.files}"]))
    assert isinstance(without, Corpus)
    forget, retain = without.excluded, without.train

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        kept = {name: batch[f"retain_{name}"] for name in ("inputs", "targets")}
        told = {name: batch[name] for name in ("inputs", "targets")}
        return method.loss(model, told, kept, key)

    def last(program: Program, start: TrainState) -> optax.GradientTransformation | None:
        if method.keep_fraction == 1:
            return None
        model_state = start.model_state

        def forgotten(params: Params, batch: Batch) -> Array:
            model = program.model(params, model_state)
            return jnp.sum(token_cross_entropy(model, batch)) / batch["targets"].size

        batches = (program.put(batch) for batch in _all(config, forget))
        loss = within(program.mesh, program.rules, forgotten)
        return masked_updates(
            saliency_mask(loss, start.params, batches, keep_fraction=method.keep_fraction)
        )

    directory = f"unlearned/{options.name or options.method.name}"
    run = Continuation(config, workdir, directory, "unlearn", data, losses, last=last)
    tokens = {"forget": forget, "retain": retain, "validation": data.validation}
    measure = _Measure(config, tokens)
    retrained = None
    if options.retrained:
        program, state = reference(config, place(options.retrained))
        retrained = measure.all(program, state.params, state.model_state)
    before = measure.all(run.program, run.start.params, run.start.model_state)
    sampled = _Windows(config, forget), _Windows(config, retain)

    def advance(state: TrainState, step: int) -> tuple[TrainState, dict[str, float], bool]:
        told, kept = (windows.batch(step) for windows in sampled)
        batch = told | {f"retain_{name}": x for name, x in kept.items()}
        batch["ids"] = np.arange(len(batch["inputs"]), dtype=np.int32)
        state, metrics = run.program.step(state, run.put(batch))
        values = {name: float(x) for name, x in metrics._asdict().items()}
        values["nonfinite_steps"] = int(state.nonfinite)
        enough = False
        if step % options.measure_every == 0 or step == options.steps:
            for name in ("forget", "retain"):
                values[name] = measure.loss(run.program, state.params, state.model_state, name)
            forgotten = retrained is not None and values["forget"] >= retrained.forget
            retained = values["retain"] <= (1 + options.retain_within) * before.retain
            enough = forgotten and (retained or not method.retains)
        return state, values, enough

    if not run.run(advance, shown=("loss",)):
        print(f"Terminated and saved in {run.workdir}. The same command continues.")
        return
    after = measure.all(run.program, run.state.params, run.state.model_state)
    if jax.process_index() == 0:
        plot = save_unlearning_plot(
            run.workdir,
            read_metrics(run.workdir),
            before._asdict(),
            None if retrained is None else retrained._asdict(),
        )
        print(f"Curves: {plot}")
    print(_table({"before": before, "after": after}, retrained))


def _table(measured: dict[str, Measurement], retrained: Measurement | None) -> str:
    columns = {**measured} if retrained is None else {**measured, "retrained": retrained}
    rows: dict[str, list[str]] = {
        f"{name}, nats per token": [f"{getattr(m, name):.4f}" for m in columns.values()]
        for name in ("forget", "retain", "validation")
    }
    for name, label in (
        ("unlearning_accuracy", "forget, wrong"),
        ("retain_accuracy", "retain, right"),
        ("test_accuracy", "validation, right"),
        ("mia_efficacy", "forget, taken for new"),
    ):
        rows[label] = [f"{getattr(m.metrics, name):.1%}" for m in columns.values()]
    if retrained is not None:
        gaps = [unlearning_gap(m.metrics, retrained.metrics) for m in columns.values()]
        rows["mean gap to retrained"] = [f"{gap.average:.1%}" for gap in gaps]
    return table(list(columns), rows)


class _Windows:
    """Batches of windows of some text, in an order that is shuffled anew every time."""

    def __init__(self, config: ConfigDict, tokens: np.ndarray):
        self._seed, self._rows = config.unlearn.seed, config.batch_size
        batches = list(_all(config, tokens))
        self._arrays = {
            name: np.concatenate([b[name][b["where"].any(axis=1)] for b in batches])
            for name in ("inputs", "targets")
        }

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, from 1."""
        count = len(self._arrays["inputs"])
        places = (step - 1) * self._rows + np.arange(self._rows)
        rows = [
            np.random.default_rng((self._seed, epoch)).permutation(count)[places[i] % count]
            for i, epoch in enumerate(places // count)
        ]
        return {name: x[rows] for name, x in self._arrays.items()}


class _Measure:
    """Measures models on the same text."""

    def __init__(self, config: ConfigDict, tokens: dict[str, np.ndarray]):
        self._config = config
        most = {"validation": config.validation_tokens, "retain": tokens["forget"].size}
        self._batches = {
            name: list(_all(config, part, most.get(name))) for name, part in tokens.items()
        }

    def loss(self, program: Program, params: Params, model_state: ModelState, name: str) -> float:
        """The mean cross-entropy of a part."""
        loss = examples = 0.0
        for batch in self._batches[name]:
            # one by one: virtual devices that add up while others still exchange can block them
            sums = program.evaluate(params, program.put(batch), model_state)
            loss, examples = loss + float(sums.loss), examples + float(sums.examples)
        return loss / examples

    def all(self, program: Program, params: Params, model_state: ModelState) -> Measurement:
        """Everything."""

        def read(params: Params, inputs: Array) -> Array:
            return program.model(params, model_state)(inputs)

        logits = jax.jit(within(program.mesh, program.rules, read))

        def classified(name: str) -> tuple[np.ndarray, np.ndarray]:
            batches = self._batches[name]
            made = np.asarray(logits(params, program.put(batches[0])["inputs"]))
            count = max(1, min(len(batches), _MEASURED_LOGITS // made.size))
            chosen = [batches[i] for i in np.linspace(0, len(batches) - 1, count).astype(int)]
            rows = [np.asarray(logits(params, program.put(b)["inputs"])) for b in chosen]
            where = np.concatenate([b["where"] for b in chosen])
            labels = np.concatenate([b["targets"] for b in chosen])
            return np.concatenate(rows)[where], labels[where]

        parts = ("forget", "retain", "validation")
        losses = {name: self.loss(program, params, model_state, name) for name in parts}
        metrics = unlearning_metrics(*(x for name in parts for x in classified(name)))
        return Measurement(**losses, metrics=metrics)


def _all(config: ConfigDict, tokens: np.ndarray, most: int | None = None) -> Iterator[Any]:
    """Windows of a text, in batches as they are held out."""
    if len(tokens) < config.length + 1:
        raise ConfigError(
            f"unlearn.files must hold more than length = {config.length} tokens, got {len(tokens)}"
        )
    yield from validation_batches(
        tokens,
        batch_size=config.batch_size,
        length=config.length,
        max_tokens=max(most or len(tokens), config.length),
    )
