"""`--mode=align`: a trained language model learns from how what it writes is judged."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax import Array
from jax.experimental.multihost_utils import process_allgather
from ml_collections import ConfigDict

from jaxref.core.checks import check_interval
from jaxref.losses import EntropyStats, normalised_entropy
from jaxref.models import generate
from jaxref.train.alignment import Alignment
from jaxref.train.components import build_objective
from jaxref.train.config import ConfigError, resolve
from jaxref.train.continuation import Continuation
from jaxref.train.data import Corpus
from jaxref.train.loop import Data, Validation, load
from jaxref.train.losses import token_cross_entropy_and_entropy
from jaxref.train.methods.frame import Batch, Params
from jaxref.train.outcomes import save_alignment_plot, table
from jaxref.train.program import TrainState, within
from jaxref.train.records import read_metrics, write_text_atomic
from jaxref.train.rewards import body_length, definition_headers

_SHORTEST = 16  # bytes to write, at least
_SHOWN = 4  # headers whose bodies are shown, before and after


class Rollouts(NamedTuple):
    """What a policy wrote, some for each prompt, one after the other.

    Attributes:
      batch: the arrays that `jaxref.train.alignment` lists, as far as they follow from writing.
      texts: the bytes that were written, of each.
      entropy: of the policy at each token, `[rows, length]`.
    """

    batch: dict[str, np.ndarray]
    texts: list[bytes]
    entropy: np.ndarray

    def summary(self) -> dict[str, float]:
        """Means over the rollouts: reward, KL(π || π_ref) of a whole one in nats, as estimated from
        them, and number of tokens."""
        where = self.batch["where"]
        ratio = self.batch["old_log_probs"] - self.batch["reference_log_probs"]
        return {
            "reward": float(self.batch["rewards"].mean()),
            "divergence": float(np.where(where, ratio, 0).sum(axis=1).mean()),
            "written_tokens": float(where.sum(axis=1).mean()),
        }


def align(config: ConfigDict, workdir: Path) -> None:
    """Aligns the newest checkpoint of a run by `config.align`, and prints what that did.

    In each step the model writes on after lines that begin a definition, is rewarded, and moves
    `align.epochs` times on all of it. The directory `aligned/NAME` of the run then holds a run of
    its own, with alignment.png and samples.txt; started again, it continues.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      workdir: the working directory of the run to start from.

    Raises:
      ConfigError: a configuration that does not go together.
      ValueError: a number out of range, or a configuration other than the directory's.
      CheckpointError: there is no checkpoint that can be read.
    """
    options, data = config.align, load(config)
    _check(config, data)
    assert isinstance(data, Corpus)
    prompts = _prompts(data.train, options.prompt_length)
    held_out = _prompts(data.validation, options.prompt_length)
    method: Alignment = resolve(config, "align.method", {"samples": "align.samples"})(
        samples=options.samples
    )

    def losses(model: Any, batch: Batch, key: Array) -> Array:
        del key
        nats, entropy = token_cross_entropy_and_entropy(model, batch)
        return method.loss(-nats, entropy, batch)

    directory = f"aligned/{options.name or options.method.name}"
    run = Continuation(config, workdir, directory, "align", data, losses)
    writer = _Writer(run)
    chosen = np.random.default_rng(options.seed).choice(len(held_out), options.validation_samples)
    asked = [held_out[i] for i in chosen]
    validation = Validation(run.config, data, run.program)
    stats: EntropyStats | None = None

    def advance(state: TrainState, step: int) -> tuple[TrainState, dict[str, float], bool]:
        nonlocal stats
        if method.temperature is None:
            temperature = options.temperature
        else:
            stats = _last_stats(run.workdir) if stats is None and step > 1 else stats
            temperature = method.temperature(options.temperature, stats)
        rng = np.random.default_rng((options.seed, step))
        of_step = [prompts[i] for i in rng.choice(len(prompts), options.prompts)]
        rollouts = writer.write(
            state.params,
            [prompt for prompt in of_step for _ in range(options.samples)],
            jax.random.fold_in(state.key, state.step),
            temperature,
        )
        values = rollouts.summary()
        progress = (step - 1) / max(options.steps - 1, 1)
        rows = {"progress": np.full(len(rollouts.texts), progress, np.float32)}
        batch = run.put(rollouts.batch | rows)
        for _ in range(options.epochs):
            state, metrics = run.program.step(state, batch)
        if method.temperature is not None:
            _, stats = normalised_entropy(rollouts.entropy, where=rollouts.batch["where"])
            values |= {f"entropy_{name}": float(x) for name, x in stats._asdict().items()}
        values |= {name: float(x) for name, x in metrics._asdict().items()}
        values["nonfinite_steps"] = int(state.nonfinite)
        return state, values, False

    before, written_before = writer.judge(run.start.params, asked)
    if not run.run(advance, shown=("reward", "divergence")):
        print(f"Terminated and saved in {run.workdir}. The same command continues.")
        return
    after, written_after = writer.judge(run.state.params, asked)
    losses_of = [validation.loss(state) for state in (run.start, run.state)]
    reward = config.align.reward.name
    if jax.process_index() == 0:
        plot = save_alignment_plot(run.workdir, read_metrics(run.workdir), reward, before, after)
        shown = "".join(
            f"# {name}\n{header.decode(errors='replace')}{text.decode(errors='replace')}\n\n"
            for header, *texts in zip(asked[:_SHOWN], written_before, written_after)
            for name, text in zip(("before", "after"), texts)
        )
        write_text_atomic(run.workdir / "samples.txt", shown)
        print(f"{shown}Curves: {plot}\nSamples: {run.workdir / 'samples.txt'}")
    rows = {
        f"{reward}, of {len(asked)} held-out headers": [
            f"{x['reward']:.1%}" for x in (before, after)
        ],
        "KL from the start, nats per body": [f"{x['divergence']:.2f}" for x in (before, after)],
        "bytes written": [f"{x['written_tokens']:.1f}" for x in (before, after)],
        f"validation, {validation.unit}": [f"{loss:.4f}" for loss in losses_of],
    }
    print(table(("before", "after"), rows))


def _check(config: ConfigDict, data: Data) -> None:
    """Raises where something does not go together, before anything is computed."""
    options = config.align
    for name in ("steps", "prompts", "epochs", "validation_samples"):
        check_interval(1, jnp.inf, **{f"align.{name}": options[name]})
    check_interval(2, jnp.inf, **{"align.samples": options.samples})
    check_interval(0, jnp.inf, closed="neither", **{"align.temperature": options.temperature})
    if not isinstance(data, Corpus) or not data.is_bytes:
        raise ConfigError(
            f"--mode=align is for models of text as bytes, and data.name={config.data.name} is none"
        )
    objective = build_objective(config, data.vocab_size)
    if objective.asked is not None or not objective.generates:
        raise ConfigError(
            f"--mode=align is for models that write on, and objective.name={config.objective.name} "
            "trains another kind"
        )
    if config.length + 1 - options.prompt_length < _SHORTEST:
        raise ConfigError(
            f"align.prompt_length must leave at least {_SHORTEST} of the {config.length} tokens of "
            f"length to write, got {options.prompt_length}"
        )


def _prompts(tokens: np.ndarray, longest: int) -> list[bytes]:
    """The headers of definitions in a part of the corpus."""
    headers = definition_headers(tokens.tobytes(), longest)
    if not headers:
        raise ConfigError(
            "--mode=align continues definitions of Python, and the data to train on or that held "
            f"out has none of at most align.prompt_length = {longest} bytes"
        )
    return headers


class _Writer:
    """Writes on after prompts, by a run's model, and has it judged."""

    def __init__(self, run: Continuation):
        self._run, self._options = run, run.config.align
        self._reward = resolve(run.config, "align.reward")
        program = run.program
        self._rows = self._options.prompts * self._options.samples
        self._length = run.config.length
        self._num_tokens = self._length + 1 - self._options.prompt_length

        def score(params: Params, batch: Batch) -> tuple[Array, Array]:
            model = program.model(params, run.state.model_state)
            nats, entropy = token_cross_entropy_and_entropy(model, batch)
            return -nats, entropy

        self._score = jax.jit(within(program.mesh, program.rules, score))

    def write(
        self, params: Params, prompts: Sequence[bytes], key: Array, temperature: Any
    ) -> Rollouts:
        """A continuation of each prompt."""
        lengths = np.array([len(prompt) for prompt in prompts])
        padded = np.zeros((len(prompts), self._options.prompt_length), np.int32)
        for row, prompt in zip(padded, prompts):
            row[: len(prompt)] = np.frombuffer(prompt, np.uint8)
        drawn = generate(
            self._run.program.model(params, self._run.state.model_state),
            padded,
            lengths,
            num_tokens=self._num_tokens,
            temperature=temperature,
            key=key,
        )
        drawn = process_allgather(drawn, tiled=True)
        tokens = np.zeros((len(prompts), self._length + 1), np.int32)
        where = np.zeros((len(prompts), self._length), bool)
        texts, rewards = [], []
        for i, (prompt, written) in enumerate(zip(prompts, drawn)):
            text = np.where(written < 256, written, 0).astype(np.uint8).tobytes()
            n, end = len(prompt), body_length(text)
            count = len(text) if end is None else end + 1  # with what ends it
            tokens[i, :n], tokens[i, n : n + len(text)] = padded[i, :n], written
            where[i, n - 1 : n - 1 + count] = True
            texts.append(text[:end])
            rewards.append(self._reward(prompt, text))
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "where": where}
        arrays = self._run.put(batch)
        scores = process_allgather(
            (self._score(params, arrays), self._score(self._run.start.params, arrays)[0]),
            tiled=True,
        )
        (old, entropy), reference = jax.tree.map(np.asarray, scores)
        batch |= {
            "rewards": np.array(rewards, np.float32),
            "old_log_probs": old,
            "reference_log_probs": reference,
        }
        return Rollouts(batch, texts, entropy)

    def judge(self, params: Params, prompts: Sequence[bytes]) -> tuple[dict[str, float], list]:
        """The summary of a continuation of each prompt, and the continuations."""
        parts, texts = [], []
        for first in range(0, len(prompts), self._rows):
            some = list(prompts[first : first + self._rows])
            padding = [some[0]] * (self._rows - len(some))  # one shape, one compilation
            key = jax.random.fold_in(jax.random.key(self._options.seed), first)
            rollouts = self.write(params, some + padding, key, self._options.temperature)
            count = len(some)
            kept = {name: x[:count] for name, x in rollouts.batch.items()}
            parts.append((rollouts._replace(batch=kept).summary(), count))
            texts += rollouts.texts[:count]
        total = {
            name: sum(part[name] * count for part, count in parts) / len(prompts)
            for name in parts[0][0]
        }
        return total, texts


def _last_stats(workdir: Path) -> EntropyStats:
    """The entropies of the last step that was recorded."""
    last = read_metrics(workdir)[-1]
    return EntropyStats(*(jnp.float32(last[f"entropy_{name}"]) for name in EntropyStats._fields))
