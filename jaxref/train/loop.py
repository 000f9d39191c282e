"""Training, evaluation and sampling of a run that lives in a working directory."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from etils.epath import Path
from grain import DatasetIterator
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxref.train.checkpoints import CheckpointError, Checkpoints
from jaxref.train.config import FREE_KEYS, ConfigError, learned, saved_config
from jaxref.train.data import Corpus, load_corpus
from jaxref.train.distributed import first_process
from jaxref.train.images import ImageSet, load_images
from jaxref.train.losses import TokenLoss, class_logits, token_cross_entropy
from jaxref.train.observe import NO_STEPS, Stopwatch, Trace, facts, seconds_at_peak
from jaxref.train.outcomes import save_forecast_plot, save_prediction_plot
from jaxref.train.places import place
from jaxref.train.program import Batch, Program, TrainState, build, within
from jaxref.train.progress import progress_bar, termination
from jaxref.train.quantized import directory, load_quantized, run_quantized
from jaxref.train.records import (
    Records,
    check_config,
    open_workdir,
    read_metrics,
    save_loss_plot,
    write_text_atomic,
)
from jaxref.train.sampling import check_request, sample
from jaxref.train.series import SeriesSet, load_series

Data = Corpus | ImageSet | SeriesSet

_SAMPLE = "sample.txt"


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that is not finite."""


def default_workdir(config: ConfigDict) -> Path:
    """`runs/DATA-OPTIMIZER-HASH` under the current directory: one for each configuration.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it. Keys that
        may change when a run is resumed (`FREE_KEYS`) do not count.

    Returns:
      The path, relative to the current directory; nothing is created.
    """
    fixed = {name: value for name, value in config.to_dict().items() if name not in FREE_KEYS}
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]
    data = config.data.name.partition(":")[0]
    return Path("runs") / f"{data}-{config.optimizer.name}-{digest}"


def train(config: ConfigDict, workdir: Path, profile: range = NO_STEPS) -> None:
    """Trains to the last step, from the newest checkpoint if there is one, and shows the outcome.

    The working directory then holds config.json, metrics.jsonl, starts.jsonl, TensorBoard events,
    checkpoints/, loss.png and sample.txt, predictions.png where the data are images, or
    forecasts.png where they are series. SIGTERM or Ctrl-C saves a checkpoint and returns; a run
    that was killed continues from its newest checkpoint when it is started again, and ends with the
    parameters, bit for bit, that it would have had.

    Args:
      config: what to train, and how.
      workdir: the working directory.
      profile: steps of which the first process writes a trace to `workdir / "profile"`. Default:
        none.

    Raises:
      ConfigError, ValueError: a configuration that cannot be run, or other than the directory's;
        or steps to profile that have been taken.
      OSError: the directory cannot be written.
      CheckpointError: a checkpoint cannot be written, or none of those that exist can be read.
      NonFiniteError: `max_nonfinite_steps` steps in a row had a gradient that is not finite.
    """
    data = load(config)
    program = build_program(config, data)
    validation = Validation(config, data, program)
    batches = training_batches(config, data, program.rows)
    prepare = _with_reference(config, program)
    outcome = _outcome(data, program)
    # what is wrong should show now, not after the training
    if isinstance(data, Corpus) and outcome == _SAMPLE:
        prompt_tokens(config, data)
        _check_generates(config, program)
    workdir = open_workdir(workdir)
    first_process(lambda: check_config(workdir, config.to_dict(), free=FREE_KEYS))
    kept = {"keep": config.keep_checkpoints, "keep_every": config.keep_checkpoint_every}
    with Checkpoints(workdir / "checkpoints", **kept) as checkpoints:
        restored = checkpoints.restore(program.abstract_state, batches)
        if restored is None:
            state, start = program.init(jax.random.key(config.seed)), 0
        else:
            state, start = restored
        _introduce(config, data, program, state, workdir)
        if start >= config.steps and (workdir / outcome).exists():
            described = validation.describe(**_last_validation(workdir, validation, state))
            print(f"This run is finished ({start} steps): validation {described}")
            return
        if len(profile) > 0 and profile.start <= start:
            raise ConfigError(
                f"--profile must start after step {start}, from where this run continues, got "
                f"{profile.start}:{profile.stop - 1}"
            )
        if start > 0:
            print(f"Continuing after step {start}.")
        state, step = _run(
            config,
            data,
            program,
            validation,
            checkpoints,
            workdir,
            batches,
            prepare,
            state,
            start,
            profile,
        )
    if step < config.steps:
        print(f"Terminated and saved at step {step}. The same command continues.")
        return
    primary = jax.process_index() == 0
    if primary:
        plot = save_loss_plot(workdir, baselines=validation.baselines, measure=validation.unit)
        print(f"Loss curve: {plot}")
    if isinstance(data, Corpus):
        if outcome == _SAMPLE:
            text = _sampled_text(config, data, program, state)
            if primary:
                write_text_atomic(workdir / outcome, text + "\n")
            print(f"Sample ({workdir / outcome}):\n{text}")
    else:
        inputs, targets = _shown(data)
        predicted = _predictions(program, state, inputs)
        if primary and isinstance(data, ImageSet):
            images = data.validation_images[: len(targets)]
            save_prediction_plot(workdir, images, targets, predicted.argmax(axis=-1))
        elif primary:
            save_forecast_plot(workdir, inputs, targets, predicted)
        print(f"Predictions: {workdir / outcome}")


def evaluate(config: ConfigDict, workdir: Path) -> None:
    """Prints the validation loss, and of images the accuracy, of a directory's newest checkpoint;
    or where `quantize.method` is set of the quantized model that the section describes.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      workdir: the working directory of the run.

    Raises:
      ConfigError: the section `quantize` describes none.
      CheckpointError: there is no checkpoint that can be read.
    """
    data = load(config)
    program, state, name = _trained(config, data, workdir)
    validation = Validation(config, data, program)
    print(f"{name}: validation {validation.describe(**validation.measure(state))}")


def print_sample(config: ConfigDict, workdir: Path) -> None:
    """Prints a sample from the newest checkpoint in a working directory; or from a quantized model,
    as for `evaluate`.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it. `sample`
        says what is written.
      workdir: the working directory of the run.

    Raises:
      ConfigError: the run is one on images, or the section `quantize` describes no model.
      CheckpointError: there is no checkpoint that can be read.
    """
    data = load(config)
    if not isinstance(data, Corpus):
        raise ConfigError(f"--mode=sample is for text, and data.name={config.data.name} is none")
    program, state, _ = _trained(config, data, workdir)
    if not program.objective.generates:
        raise ConfigError(
            f"--mode=sample is for models that write, and objective.name={config.objective.name} "
            "trains one that reads"
        )
    print(_sampled_text(config, data, program, state))


def _trained(config: ConfigDict, data: Data, workdir: Path) -> tuple[Program, TrainState, str]:
    """What evaluates and samples: a program, its state, and what to call it."""
    program = build_program(config, data)
    if not config.quantize.method:
        state, step = restore(config, data, program, workdir)
        return program, state, f"Step {step}"
    path = directory(workdir, config.quantize)
    model, step = load_quantized(path, program)
    return *run_quantized(program, model, step), f"Step {step}, {path.name}"


def restore(
    config: ConfigDict, data: Data, program: Program, workdir: Path
) -> tuple[TrainState, int]:
    """The state in the newest intact checkpoint of a working directory, and its step.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      data: the run's data.
      program: the run's program.
      workdir: the working directory of the run.

    Returns:
      The state, on the program's devices, and how many steps it has behind it.

    Raises:
      CheckpointError: there is no checkpoint that can be read.
    """
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        restored = checkpoints.restore(
            program.abstract_state, training_batches(config, data, program.rows)
        )
    if restored is None:
        raise CheckpointError(f"{workdir} holds no checkpoint yet; train first")
    return restored


class Validation:
    """The held-out data of a run, and the losses that need no model to compare with.

    Args:
      config: the whole configuration.
      data: the run's data.
      program: the run's program, which evaluates.

    Attributes:
      unit: what a loss is: nats per byte, say.
      baselines: losses by name, on the very data that is evaluated; none for an objective that
        measures otherwise.
    """

    def __init__(self, config: ConfigDict, data: Data, program: Program):
        self._program = program
        self.unit = program.objective.measure or data.measure
        batches, baselines = data.held_out(config)
        self.baselines = {} if program.objective.measure else baselines
        rows = program.rows
        self._batches = [{name: array[rows] for name, array in b.items()} for b in batches]

    def measure(self, state: TrainState) -> dict[str, float]:
        """`loss`, the mean cross-entropy in nats or the mean squared error, and for images
        `accuracy`; of the averaged parameters where the run keeps an average.

        Args:
          state: the run's state.

        Returns:
          The numbers by name, means over all tokens, images or forecasts that are held out.
        """
        params = state.params if state.average is None else state.average
        sums = [
            self._program.evaluate(params, self._program.put(batch), state.model_state)
            for batch in self._batches
        ]
        total = [sum(float(x) for x in column if x is not None) for column in zip(*sums)]
        loss, examples, correct = total
        measured = {"loss": loss / examples}
        if sums[0].correct is not None:
            measured["accuracy"] = correct / examples
        return measured

    def loss(self, state: TrainState) -> float:
        """Mean cross-entropy in nats, or mean squared error."""
        return self.measure(state)["loss"]

    def describe(self, loss: float, accuracy: float | None = None) -> str:
        """The measurement beside the baselines, nats in bits, too.

        Args:
          loss, accuracy: as of `measure`.

        Returns:
          One line of text.
        """
        in_nats = self.unit.startswith("nats")

        def number(loss: float, nats: str = "", bits: str = "") -> str:
            return f"{loss:.3f}{nats}" + in_nats * f" / {loss / math.log(2):.3f}{bits}"

        beside = ", ".join(f"{name} {number(loss)}" for name, loss in self.baselines.items())
        shown = number(loss, " nats", " bits") if in_nats else number(loss)
        text = f"{shown} {self.unit.removeprefix('nats ')}" + f" ({beside})" * bool(beside)
        return text if accuracy is None else f"{text}, {accuracy:.1%} right"


def _run(
    config: ConfigDict,
    data: Data,
    program: Program,
    validation: Validation,
    checkpoints: Checkpoints,
    workdir: Path,
    batches: DatasetIterator,
    prepare: Callable[[Batch], Batch],
    state: TrainState,
    start: int,
    profile: range,
) -> tuple[TrainState, int]:
    """The steps after `start`, and the number of the last one taken."""
    primary = jax.process_index() == 0
    count, per_second = data.per_step(config)
    ideal = seconds_at_peak(config, data, program, state)
    step = start
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(Records(workdir, resume_step=start)) if primary else None
        if records is not None:
            records.write_start(facts(program, state, data, validation.baselines))
        trace = stack.enter_context(Trace(workdir / "profile", profile if primary else NO_STEPS))
        terminated = stack.enter_context(termination())
        bar = stack.enter_context(progress_bar(start, config.steps, disable=not primary))
        watch, logged = Stopwatch(), start
        for step in range(start + 1, config.steps + 1):
            if trace.turns_before(step):
                with watch.measure("aside", after=state):
                    trace.turn()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with watch.measure("input"):
                    batch = prepare(program.put(next(batches)))
                if config.norms_every and step % config.norms_every == 0:
                    with watch.measure("aside", after=state):
                        _write_norms(step, program.norms(state, batch), records)
                state, metrics = program.step(state, batch)
            last, stop = step == config.steps, terminated(step)
            values: dict[str, float] = {}
            if step % config.log_every == 0 or last:
                values = {name: float(value) for name, value in metrics._asdict().items()}
                values["learning_rate"] = float(program.schedule(step - 1))
                values["nonfinite_steps"] = int(state.nonfinite)
                seconds = watch.lap(step - logged)
                speed = count / sum(seconds.values())
                values |= {per_second: speed, **seconds}
                if ideal is not None:
                    values["model_flops_utilisation"] = ideal / sum(seconds.values())
                logged = step
                bar.set_postfix_str(
                    f"loss {values['loss']:.3f}, lr {values['learning_rate']:.1e}, "
                    f"{speed / 1000:.1f}k {per_second.partition('_')[0]}/s",
                    refresh=False,
                )
                _stop_if_nonfinite(config, program, state, batch)
            bar.update()
            if step % config.validate_every == 0 or last:
                with watch.measure("aside", after=state):
                    measured = validation.measure(state)
                values |= {f"validation_{name}": value for name, value in measured.items()}
                if primary:
                    bar.write(f"step {step}: validation {validation.describe(**measured)}")
            if values and records is not None:
                records.write(step, values)
            if step % config.checkpoint_every == 0 or last or stop:
                with watch.measure("save", after=state):
                    if records is not None:
                        records.flush()
                    checkpoints.save(step, state, batches, config=config.to_dict(), blocking=stop)
            if stop:
                break
    return state, step


def _stop_if_nonfinite(
    config: ConfigDict, program: Program, state: TrainState, batch: Batch
) -> None:
    if int(state.nonfinite_in_row) < config.max_nonfinite_steps:
        return
    flags = program.nonfinite_parameters(state, batch)
    of_parameters, of_gradients = (_named(tree) for tree in flags)
    if of_parameters:
        where = f"Parameters that are not finite: {', '.join(of_parameters)}"
    elif of_gradients:
        where = f"Gradients that are not finite: {', '.join(of_gradients)}"
    else:
        where = "On the last batch again, all gradients are finite"
    raise NonFiniteError(
        f"{int(state.nonfinite_in_row)} steps in a row had a gradient that is not finite; stopped "
        f"after step {int(state.step)}. {where}"
    )


def _named(flags: Any) -> list[str]:
    """The paths of the leaves that are true."""
    return [path for path, flag in _by_path(flags).items() if flag]


def _by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _write_norms(step: int, norms: Any, records: Records | None) -> None:
    of_parameters, of_gradients = map(_by_path, jax.device_get(norms))
    if records is not None:
        records.write_norms(step, parameters=of_parameters, gradients=of_gradients)


def load(config: ConfigDict) -> Data:
    """The text, the images or the series that a configuration names.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.

    Returns:
      A `Corpus`, an `ImageSet` or a `SeriesSet`, by the form of `data.name`.

    Raises:
      ConfigError: a name of no known form.
      ValueError, FileNotFoundError, ImportError: as `load_corpus`, `load_images` or `load_series`.
    """
    source = config.data.name.partition(":")[0]
    if source in ("digits", "images"):
        return load_images(**config.data.to_dict())
    if source in ("python_stdlib", "text", "tokens"):
        return load_corpus(**config.data.to_dict())
    if source in ("seasons", "series"):
        return load_series(**config.data.to_dict())
    raise ConfigError(
        "data.name must be python_stdlib, text:GLOB, tokens:FILE, digits, images:DIR, seasons or "
        f"series:FILE, got {config.data.name!r}"
    )


def build_program(
    config: ConfigDict,
    data: Data,
    *,
    losses: TokenLoss | None = None,
    last: optax.GradientTransformation | None = None,
) -> Program:
    """The program of a run on the data, with `losses` and `last` as for `build`.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      data: what is learned from.
      losses: what to minimise the mean of. Default: the objective's.
      last: what the optimizer's updates go through at the end. Default: nothing.

    Returns:
      The `Program`, on all devices that there are.

    Raises:
      ConfigError, ValueError: as `build`.
    """
    return build(config, **data.sizes(config), losses=losses, last=last)


def training_batches(
    config: ConfigDict, data: Data, rows: np.ndarray | None = None
) -> DatasetIterator:
    """The endless training batches, or of each these rows; a checkpoint can save where they are.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      data: what they are cut out of.
      rows: rows of a global batch, ascending. Default: all.

    Returns:
      An iterator of dictionaries of arrays, in an order that `config.seed` decides.
    """
    return iter(data.batches(config, rows))


def _introduce(
    config: ConfigDict, data: Data, program: Program, state: TrainState, workdir: Path
) -> None:
    if jax.process_index() != 0:
        return
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    used = {axis: size for axis, size in program.mesh.shape.items() if size > 1}
    count, per_second = data.per_step(config)
    print(
        f"Working directory: {workdir}\n"
        f"Data: {data.summary()}\n"
        f"Model: {config.model.name} with {parameters:,} parameters on {program.mesh.size} "
        f"{jax.devices()[0].platform} device(s) {used or ''}\n"
        f"Training: {config.steps} steps of {count:,} {per_second.partition('_')[0]}, "
        f"{config.optimizer.name}, {learned(config)}",
        flush=True,
    )


def _outcome(data: Data, program: Program) -> str:
    """The file that a finished run leaves last."""
    if isinstance(data, Corpus):
        return "loss.png" if not program.objective.generates else _SAMPLE
    return "predictions.png" if isinstance(data, ImageSet) else "forecasts.png"


def _last_validation(workdir: Path, validation: Validation, state: TrainState) -> dict[str, float]:
    """What the last record says, or where it is lost, what is measured anew."""
    last = (read_metrics(workdir) or [{}])[-1]
    names = {"validation_loss": "loss", "validation_accuracy": "accuracy"}
    measured = {short: last[name] for name, short in names.items() if name in last}
    return measured if "loss" in measured else validation.measure(state)


def _shown(data: ImageSet | SeriesSet) -> tuple[np.ndarray, np.ndarray]:
    """The held-out inputs that are drawn, and their targets."""
    if isinstance(data, ImageSet):
        return data.inputs(slice(1024), held_out=True), data.validation_labels[:1024]
    starts = data.held_out_starts()
    batch = data.windows(starts[np.linspace(0, len(starts) - 1, num=3, dtype=int)])
    return batch["inputs"], batch["targets"]


def _predictions(program: Program, state: TrainState, inputs: np.ndarray) -> np.ndarray:
    """The model's logits of images, or its forecasts."""
    params = state.params if state.average is None else state.average

    @partial(jax.jit, out_shardings=NamedSharding(program.mesh, PartitionSpec()))
    def predict(params: Any, model_state: Any, inputs: Any) -> Any:
        return class_logits(program.model(params, model_state), inputs)

    return np.asarray(predict(params, state.model_state, inputs))


def prompt_tokens(config: ConfigDict, corpus: Corpus) -> np.ndarray:
    """The ids of the tokens that a sample continues.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      corpus: the data of the run.

    Returns:
      Integer `[n]`: the bytes of `sample.prompt`, or the ids that it lists where the corpus is not
      bytes.

    Raises:
      ConfigError: a prompt that lists no ids where they are asked for.
      ValueError: an empty prompt, an id outside of the vocabulary, or another key of `sample` out
        of range.
    """
    options = config.sample
    if corpus.is_bytes:
        prompt = np.frombuffer(options.prompt.encode(), np.uint8)
    else:
        try:
            prompt = np.array([int(token) for token in options.prompt.split()])
        except ValueError as error:
            raise ConfigError(
                "sample.prompt must be token ids with spaces between them where the data is "
                f"{config.data.name}, got {options.prompt!r}"
            ) from error
    check_request(prompt, corpus.vocab_size, length=options.length, **_choices(options))
    return prompt


def _check_generates(config: ConfigDict, program: Program) -> None:
    """Raises, without computing anything, where the model cannot go on token by token."""

    def one_token(params: Any, model_state: Any) -> Any:
        model = program.model(params, model_state)
        cache = model.init_cache(1, kind=config.sample.cache)
        return model.extend(np.zeros((1, 1), np.int32), cache)

    state = program.abstract_state
    jax.eval_shape(one_token, state.params, state.model_state)


def _choices(options: ConfigDict) -> dict[str, Any]:
    """How a sample's tokens are drawn."""
    return {name: options[name] for name in ("temperature", "top_k", "top_p", "cache")}


def _with_reference(config: ConfigDict, program: Program) -> Callable[[Batch], Batch]:
    """Adds what the objective asks of a reference model: its log-probabilities of the targets."""
    workdir = program.objective.reference
    if not workdir:
        return lambda batch: batch
    scored, state = reference(config, place(workdir))

    def log_probs(params: Any, model_state: Any, batch: Batch) -> Any:
        return -token_cross_entropy(scored.model(params, model_state), batch)

    score = jax.jit(within(scored.mesh, scored.rules, log_probs))

    def with_reference(batch: Batch) -> Batch:
        found = score(state.params, state.model_state, batch)
        return batch | {"reference_log_probs": found}

    return with_reference


def reference(config: ConfigDict, workdir: Path) -> tuple[Program, TrainState]:
    """The model of another run on the same devices and windows, and its newest state.

    Args:
      config: that of the run that asks for it, whose mesh is taken.
      workdir: the working directory of the other run.

    Returns:
      Its program and its state, on the devices of this run.

    Raises:
      ConfigError: its vocabulary or windows are others.
      CheckpointError: there is no checkpoint that can be read.
    """
    other = saved_config(workdir)
    for key in ("length", "batch_size"):
        if other[key] != config[key]:
            raise ConfigError(
                f"{key} must be that of the reference {workdir}, {other[key]}, got {config[key]}"
            )
    if other.data.vocab_size != config.data.vocab_size:
        raise ConfigError(
            f"data.vocab_size must be that of the reference {workdir}, {other.data.vocab_size}, "
            f"got {config.data.vocab_size}"
        )
    other.mesh, other.rules = config.mesh, config.rules
    data = load(other)
    program = build_program(other, data)
    return program, restore(other, data, program, workdir)[0]


def _sampled_text(config: ConfigDict, corpus: Corpus, program: Program, state: TrainState) -> str:
    """A sample as text; for a corpus that is not bytes, its ids."""
    options = config.sample
    params = state.params if state.average is None else state.average
    tokens = sample(
        program.model(params, state.model_state),
        prompt_tokens(config, corpus),
        asked=program.objective.asked,
        length=options.length,
        key=jax.random.key(options.seed),
        **_choices(options),
    )
    tokens = tokens[tokens < corpus.vocab_size]
    if corpus.is_bytes:
        return tokens.astype(np.uint8).tobytes().decode(errors="replace")
    return " ".join(map(str, tokens))
