"""What the objectives of language models do to a small one, beside what their papers claim.

All models are byte-level transformers of two layers, which learn the source of Python's standard
library, or texts made of it, from the same first parameters on the same windows in the same number
of steps, unless a name says otherwise. Nats per byte are cross-entropies of files that no model
learns.

- goldfish: ten passages of 100 bytes come again and again, in half of the windows. Each model goes
  on greedily from their first 20 bytes: the share that it recites to the last byte, and what is
  common (ROUGE-L), beside that of passages which it never saw. The paper: no recitals where plain
  training has many, at nearly the same validation loss, and the same for as many learned tokens.
- emo: the mean cost of moving a model's mass to the right byte, by the output matrix of the plain
  model; in text that it samples, the share of words of four letters or more that the library has,
  and how many are different. From the start, or for half as many steps after plain training, at a
  lower learning rate. The paper: better samples than maximum likelihood.
- reweighted: half of the windows are one of eight, again and again. The paper: `linupper`, which
  looks away from what has been learned, gets further in as many steps; `extremes` looks at both
  ends and is the control.
- prior: weights from a model of a tenth of the steps, and nats of the half of the tokens that it
  finds hard and of the other. The paper (for captions, by a model that does not see the image):
  what the reference does not know is learned better, at the cost of the rest.
- codegen_mixture: nats of held-out text, and of five bytes in the middle of a window: given both
  sides, in the format of its blanks, or the left one. The plain model is asked in the same format,
  too, with zero bytes for special tokens. The paper: infilling is learned, and costs a little of
  what is learned from left to right.
- electra: the share of tokens of which the detector is right, and its nats, beside those of saying
  "original" of each with the same probability, which is right of all that are. The paper: every
  token teaches the detector, not the masked ones alone.
- glm_blank: nats of each token of a blank and its end, for short blanks, which have two sides, and
  for those of all of the end, beside those of each byte from left to right. The paper: a context
  that sees all of itself tells more.

The first four show in 300 steps. The others ask for more: blanks are not yet filled better for
their right sides, by either format, nor are replaced tokens told much better than by chance.

Standard errors are those over the seeds, which draw parameters and windows.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxref.bench.harness import Measurement, progress
from jaxref.data import corrupt_spans
from jaxref.losses import linear_earth_mover_loss
from jaxref.metrics import exact_match, rouge
from jaxref.models import generate
from jaxref.train.config import load_config
from jaxref.train.data import Batch, load_corpus, train_batches, validation_batches
from jaxref.train.losses import token_cross_entropy
from jaxref.train.methods.frame import Batch as DeviceBatch
from jaxref.train.methods.frame import Params
from jaxref.train.program import build

NAME = "objectives"
VOCABULARY = 256
PLAIN = "next_token"
PASSAGES = 10
PROMPT = 20
BLANK = 5

Found = dict[str, float]
"""Numbers of a model by what they are."""


def run(
    *, quick: bool = False, seeds: int = 2, steps: int = 300, only: str = ""
) -> Iterator[Measurement]:
    """`steps` steps from each of `seeds` seeds; `only`: some of the objectives, by commas."""
    if quick:
        seeds, steps, only = 1, 2, only or "goldfish,codegen_mixture"  # the rest compiles for long
    study = Study(quick=quick, seeds=seeds, steps=steps)
    for name in only.split(",") if only else PARTS:
        progress(f"{study.steps} steps from {study.seeds} seeds\n{caption(name)}")
        found: dict[str, list[Found]] = {}
        for seed in range(study.seeds):
            for implementation, numbers in PARTS[name](study, seed).items():
                found.setdefault(implementation, []).append(numbers)
        yield from measurements(name, found)


def caption(name: str) -> str:
    """What the numbers of a part are, and what its paper says."""
    found = re.search(rf"^- {name}: .*?(?=^- |^$)", __doc__ or "", re.DOTALL | re.MULTILINE)
    return found[0].rstrip() if found else name


def measurements(case: str, found: Mapping[str, Sequence[Found]]) -> Iterator[Measurement]:
    """Means over the seeds, beside those of the plain training before in the table."""
    peer: str | None = None
    for implementation, of_seeds in found.items():
        is_plain = implementation.startswith(PLAIN)
        for metric in of_seeds[0]:
            values = [numbers[metric] for numbers in of_seeds]
            mean, ratio = float(np.mean(values)), None
            if peer is not None and not is_plain and metric in found[peer][0]:
                plain = float(np.mean([numbers[metric] for numbers in found[peer]]))
                ratio = mean / plain if plain else None
            beside = None if ratio is None else peer
            yield Measurement(NAME, case, implementation, metric, mean, beside, ratio)
            if len(values) > 1:
                error = float(np.std(values, ddof=1)) / len(values) ** 0.5
                yield Measurement(NAME, case, implementation, f"{metric} standard error", error)
        peer = implementation if is_plain else peer


class Learner:
    """The program of a configuration, compiled once for all seeds and texts."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.program = build(config, VOCABULARY)
        self._nats = jax.jit(self._nats_of_batch)

    def train(
        self,
        text: np.ndarray,
        seed: int,
        *,
        start: Params | None = None,
        prepare: Callable[[DeviceBatch], DeviceBatch] = lambda batch: batch,
    ) -> Params:
        """The parameters after all steps, from those of the seed or from `start`."""
        config = self.config
        shape = {"batch_size": config.batch_size, "length": config.length}
        batches = iter(train_batches(text, **shape, seed=seed))
        state = self.program.init(jax.random.key(seed))
        if start is not None:
            state = state._replace(params=jax.tree.map(jnp.copy, start))  # a step donates them
        for step in range(config.steps):
            batch = prepare(self.program.put(next(batches)))
            state, metrics = self.program.step(state, batch)
            if step % 100 == 0 or step == config.steps - 1:
                loss = float(metrics.loss)
                progress(f"  {config.objective.name}, seed {seed}: step {step}, loss {loss:.3f}")
        return state.params

    def evaluate(self, params: Params, batches: Sequence[Batch]) -> tuple[float, float]:
        """The objective's own measure, a mean, and the share of right answers, NaN without any."""
        sums = [self.program.evaluate(params, self.program.put(batch)) for batch in batches]
        examples = sum(float(found.examples) for found in sums)
        right = [float("nan") if found.correct is None else float(found.correct) for found in sums]
        return sum(float(found.loss) for found in sums) / examples, sum(right) / examples

    def nats(self, params: Params, batches: Sequence[Batch]) -> np.ndarray:
        """Of each target given those before it, `[windows, length]`."""
        return np.concatenate([self.nats_of_batch(params, batch) for batch in batches])

    def nats_of_batch(self, params: Params, batch: Mapping[str, Any]) -> Array:
        """As `nats`, of one batch, as it comes or on the devices."""
        return self._nats(params, {name: batch[name] for name in ("inputs", "targets")})

    def _nats_of_batch(self, params: Params, batch: DeviceBatch) -> Array:
        return token_cross_entropy(self.program.model(params), batch)

    def go_on(self, params: Params, prompts: np.ndarray, **options: Any) -> np.ndarray:
        """What the model writes behind prompts of one length, until `length` tokens."""
        count = self.config.length - prompts.shape[1]
        model = self.program.model(params)
        return np.asarray(generate(model, prompts, num_tokens=count, **options))


class Texts(NamedTuple):
    """Bytes to learn that are made of the library's.

    Attributes:
      repeats: with passages that come again and again.
      passages, others: those passages, and some that never come, `[10, bytes]`.
      boilerplate: half of whose windows are one of eight.
    """

    repeats: np.ndarray
    passages: np.ndarray
    others: np.ndarray
    boilerplate: np.ndarray


class Study:
    """Sizes, texts and the models that several parts compare with.

    Attributes:
      seeds, steps: how many.
      length: of a window.
      text: the library's bytes to learn.
      held_out: batches of files that are not.
    """

    def __init__(self, *, quick: bool, seeds: int, steps: int):
        self.seeds, self.steps = seeds, steps
        layers, width, self.length, rows = (1, 16, 64, 8) if quick else (2, 96, 128, 16)
        self._overrides = [
            f"steps={steps}",
            f"length={self.length}",
            f"batch_size={rows}",
            f"model.num_layers={layers}",
            f"model.features={width}",
            "model.num_heads=2",
            f"model.mlp_features={width * 5 // 2}",
        ]
        corpus = load_corpus()
        self.text = corpus.train
        window = {"batch_size": rows, "length": self.length}
        tokens = 1024 if quick else 2**15
        self.held_out = list(validation_batches(corpus.validation, **window, max_tokens=tokens))
        self._learners: dict[str, Learner] = {}
        self._plain: dict[int, Params] = {}

    def learner(self, *overrides: str) -> Learner:
        """The one of these overrides, built when it is first asked for."""
        config = load_config(overrides=[*self._overrides, *overrides])
        key = config.to_json()
        if key not in self._learners:
            self._learners[key] = Learner(config)
        return self._learners[key]

    def plain(self, seed: int) -> Params:
        """The parameters after plain training on the library."""
        if seed not in self._plain:
            self._plain[seed] = self.learner().train(self.text, seed)
        return self._plain[seed]

    @functools.cached_property
    def texts(self) -> Texts:
        rng = np.random.default_rng(0)
        pieces = self.text[: len(self.text) // self.length * self.length].reshape(-1, self.length)
        background = rng.permutation(pieces[: len(pieces) * 9 // 10])[:4000]
        size = self.length * 25 // 32
        unseen = rng.permutation(pieces[len(pieces) * 9 // 10 :])
        passages, others = unseen[: 2 * PASSAGES, :size].reshape(2, PASSAGES, size)
        repeats = background.copy()
        for i, row in enumerate(repeats[: len(repeats) // 2]):
            start = rng.integers(self.length - size + 1)
            row[start : start + size] = passages[i % PASSAGES]
        boilerplate = background.copy()
        boilerplate[: len(background) // 2] = unseen[-8:][np.arange(len(background) // 2) % 8]
        rng.shuffle(repeats)
        rng.shuffle(boilerplate)
        return Texts(repeats.ravel(), passages, others, boilerplate.ravel())

    @functools.cached_property
    def words(self) -> set[bytes]:
        """The words of the library."""
        return set(words_of(self.text.tobytes()))


def goldfish(study: Study, seed: int) -> dict[str, Found]:
    longer = f"steps={study.steps * 4 // 3}"
    return {
        PLAIN: recitals(study, study.learner(), seed),
        "goldfish": recitals(study, study.learner("objective=goldfish"), seed),
        "goldfish, 4/3 of the steps": recitals(
            study, study.learner("objective=goldfish", longer), seed
        ),
    }


def recitals(study: Study, learner: Learner, seed: int) -> Found:
    """The validation loss, and how much is recited of what came often, and of what did not."""
    texts = study.texts
    params = learner.train(texts.repeats, seed)
    size = texts.passages.shape[1]
    both = np.concatenate([texts.passages, texts.others])
    drawn = learner.go_on(params, both[:, :PROMPT], temperature=0.0)[:, : size - PROMPT]
    written, rest = drawn.tolist(), both[:, PROMPT:].tolist()
    common = [rouge(a, b) for a, b in zip(written, rest)]
    return {
        "nats per byte": float(learner.nats(params, study.held_out).mean()),
        "exact match": exact_match(written[:PASSAGES], [[text] for text in rest[:PASSAGES]]),
        "ROUGE-L": float(np.mean(common[:PASSAGES])),
        "ROUGE-L of unseen passages": float(np.mean(common[PASSAGES:])),
    }


def emo(study: Study, seed: int) -> dict[str, Found]:
    plain = study.plain(seed)
    more = f"steps={study.steps // 2}", "schedule.peak_value=2e-3"
    found = {PLAIN: manner(study, study.learner(), plain, judge=plain)}
    for name, overrides, start in (
        ("emo", ("objective=emo",), None),
        (f"{PLAIN}, half as long again", more, plain),
        ("emo, half as long again", ("objective=emo", *more), plain),
    ):
        learner = study.learner(*overrides)
        params = learner.train(study.text, seed, start=start)
        found[name] = manner(study, learner, params, judge=plain)
    return found


def manner(study: Study, learner: Learner, params: Params, *, judge: Params) -> Found:
    """Losses, and what words are sampled; bytes are as far apart as in the output of `judge`."""
    embedding = study.learner().program.model(judge).output_kernel().T

    @jax.jit
    def distances(params: Params, batch: DeviceBatch) -> Array:
        model = learner.program.model(params)
        hidden = model.hidden(batch["inputs"])
        return linear_earth_mover_loss(hidden, model.output_kernel(), batch["targets"], embedding)

    batches = study.held_out
    prompts = np.concatenate([batch["inputs"][:, :PROMPT] for batch in batches])
    written = learner.go_on(params, prompts, temperature=1.0, key=jax.random.key(0))
    words = [w for row in written for w in words_of(row.astype(np.uint8).tobytes())]
    return {
        "nats per byte": float(learner.nats(params, batches).mean()),
        "embedding distance": float(np.mean([distances(params, batch) for batch in batches])),
        "known words, share": float(np.mean([word in study.words for word in words or [b""]])),
        "different words, share": len(set(words)) / max(len(words), 1),
    }


def words_of(text: bytes) -> list[bytes]:
    """Words of four letters or more, whole ones: not those at the ends.

    >>> words_of(b"eturn self._value of value, els")
    [b'self', b'value', b'value']
    """
    return re.findall(rb"(?<=[^a-zA-Z])[a-zA-Z]{4,}(?=[^a-zA-Z])", text)


def reweighted(study: Study, seed: int) -> dict[str, Found]:
    found = {}
    for name in (PLAIN, "linupper", "extremes"):
        overrides = ["objective=reweighted", f"objective.strategy={name}"]
        learner = study.learner(*([] if name == PLAIN else overrides))
        params = learner.train(study.texts.boilerplate, seed)
        found[name] = {"nats per byte": float(learner.nats(params, study.held_out).mean())}
    return found


def prior(study: Study, seed: int) -> dict[str, Found]:
    early = study.learner(f"steps={max(study.steps // 10, 1)}")
    reference = early.train(study.text, seed)

    def with_reference(batch: DeviceBatch) -> DeviceBatch:
        return batch | {"reference_log_probs": -early.nats_of_batch(reference, batch)}

    # a directory in a run of the program; here the batches bring what it would compute
    weighted = study.learner("objective=prior", "objective.reference=given")
    params = weighted.train(study.text, seed, prepare=with_reference)
    expected = early.nats(reference, study.held_out)
    is_hard = expected > np.median(expected)

    def parts(nats: np.ndarray) -> Found:
        return {
            "nats per byte": float(nats.mean()),
            "nats per hard byte": float(nats[is_hard].mean()),
            "nats per easy byte": float(nats[~is_hard].mean()),
        }

    return {
        PLAIN: parts(study.learner().nats(study.plain(seed), study.held_out)),
        "prior": parts(weighted.nats(params, study.held_out)),
        "the reference": parts(expected),
    }


def codegen_mixture(study: Study, seed: int) -> dict[str, Found]:
    mixture = study.learner("objective=codegen_mixture")
    models = {
        PLAIN: (study.learner(), study.plain(seed)),
        "codegen_mixture": (mixture, mixture.train(study.text, seed)),
    }
    start = study.length // 2
    blank = slice(start - 1, start - 1 + BLANK)  # of the targets
    found = {}
    for name, (learner, params) in models.items():
        nats = learner.nats(params, study.held_out)
        asked = [
            with_blank(batch["inputs"], start, has_special_ids=name != PLAIN)
            for batch in study.held_out
        ]
        infilled = np.concatenate(
            [learner.nats_of_batch(params, batch)[:, batch["place"]] for batch in asked]
        )
        found[name] = {
            "nats per byte": float(nats.mean()),
            "nats of the middle, left side given": float(nats[:, blank].mean()),
            "nats of the middle, both sides given": float(infilled.mean()),
        }
    return found


def with_blank(windows: np.ndarray, start: int, *, has_special_ids: bool) -> dict[str, Any]:
    """Windows with a blank from `start` on, and behind them what fills it, whose targets are at
    `place`; without special ids, 0 stands for each."""
    length = windows.shape[1]
    kept = length - 4  # for the two sentinels and three marks, the last of them a target only
    separator, end_of_mask, end_of_text, sentinel = range(VOCABULARY, VOCABULARY + 4)
    mask = (np.arange(kept) >= start) & (np.arange(kept) < start + BLANK)

    @jax.vmap
    def corrupt(window: Array) -> Array:
        return corrupt_spans(
            window,
            mask,
            sentinel_ids=[sentinel],
            separator_id=separator,
            end_of_mask_id=end_of_mask,
            end_of_text_id=end_of_text,
            output_length=length + 1,
        ).tokens

    tokens = np.asarray(corrupt(jnp.asarray(windows[:, :kept])))
    if not has_special_ids:
        tokens = np.where(tokens < VOCABULARY, tokens, 0)
    first = kept - BLANK + 4  # behind the rest, two sentinels and two marks
    place = slice(first - 1, first - 1 + BLANK)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "place": place}


def electra(study: Study, seed: int) -> dict[str, Found]:
    learner = study.learner("objective=electra")
    params = learner.train(study.text, seed)
    undecided = params | {"output": jax.tree.map(jnp.zeros_like, params["output"])}
    nats, right = learner.evaluate(params, study.held_out)
    _, original = learner.evaluate(undecided, study.held_out)  # which takes none for replaced
    always = -original * np.log(original) - (1 - original) * np.log1p(-original)
    return {
        "electra": {"tokens told rightly": right, "nats per token": nats},
        "always original": {"tokens told rightly": original, "nats per token": float(always)},
    }


def glm_blank(study: Study, seed: int) -> dict[str, Found]:
    learner = study.learner("objective=glm_blank")
    params = learner.train(study.text, seed)
    found = {}
    for name, share in (("short blanks", 1.0), ("the end", 0.0)):
        of_kind = study.learner("objective=glm_blank", f"objective.short_mask_probability={share}")
        nats, _ = of_kind.evaluate(params, study.held_out)
        found[f"glm_blank, {name}"] = {"nats per byte": nats}
    plain = study.learner().nats(study.plain(seed), study.held_out)
    return {PLAIN: {"nats per byte": float(plain.mean())}} | found


PARTS: dict[str, Callable[[Study, int], dict[str, Found]]] = {
    "goldfish": goldfish,
    "emo": emo,
    "reweighted": reweighted,
    "prior": prior,
    "codegen_mixture": codegen_mixture,
    "electra": electra,
    "glm_blank": glm_blank,
}
"""What is found of a seed, by model and by number."""
