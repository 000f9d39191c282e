"""Trains a language model, a classifier of images or a forecaster of series; with no arguments, a
small language model on Python's standard library.

Modes
  train     (default) trains, continuing from the newest checkpoint of the working directory
  eval      prints the validation loss of the newest checkpoint, and of images the accuracy
  sample    prints text from the newest checkpoint
  quantize  writes the newest checkpoint's model with linear layers in few bits, and prints what
            that did; eval and sample run it when they are given the same --config.quantize.*
  align     goes on from the newest checkpoint, learning from rewards of what the model writes:
            whether it parses; the outcome is a run of its own, WORKDIR/aligned/METHOD
  unlearn   goes on from it, forgetting some files; likewise, WORKDIR/unlearned/METHOD
  report    writes WORKDIR/report.html: what the run is, how far it is, its curves

Configuration
  --config=FILE.py             a Python file with get_config(), one's own or one that comes with the
                               program, such as configs/digits.py; default: the main job's
  --config.KEY=VALUE           changes one key, dotted: --config.steps=2000
  --config.optimizer.name=NAME chooses by public name (jaxref.train.methods, jaxref.optimizers, or
                               else optax); every other key of the section is an argument of that
                               function, as in --config.optimizer.b1=0.95. Likewise schedule, loss,
                               model, model.norm, model.final_norm, model.linear, model.mlp,
                               model.attention, model.query_key_norm, model.activation; for image
                               models model.conv; and for methods that have them (sam, ef21, ...)
                               optimizer.base and optimizer.compressor.
  --config.data.name=SOURCE    of text: python_stdlib, text:GLOB, tokens:FILE (uint16, uint32 ids);
                               of images: digits, images:DIR (idx files, as of MNIST), with
                               data.as_series=True read row by row;
                               of series: seasons, series:FILE (commas between numbers, a line for
                               each step); also data.context_length, data.horizon, data.period
  --config.data.exclude=PATTERN  files of text not to train on, such as json/*.py
  --config.objective=NAME      what is learned of text: next_token, or, as in configs/
                               lm_objectives.py, goldfish, emo, reweighted, prior, electra,
                               codegen_mixture or glm_blank, with the arguments of its function in
                               jaxref.train.objectives, as in --config.objective.k=3
  --config.sample.prompt=TEXT  what a sample continues; also sample.length, and how it is drawn:
                               sample.temperature, sample.top_k, sample.top_p, and what the model
                               remembers: sample.cache, full or staircase
  --config.quantize.method=NAME  round_to_nearest, int8, llm_int8, float8, gptq, baq, lnq,
                               pyramid, adaptive_rounding, power, nupes or ternary; how many bits,
                               and inputs to a scale: quantize.bits, quantize.block_size (0: all);
                               and quantize.low_rank makes up for the error
  --config.align.method=NAME   grpo, hapo, d3s, pcpg, dpo or f_dpo; also align.steps, align.prompts
                               and align.samples (of each, a step), align.learning_rate, ..., and
                               the reward, align.reward.name: parses
  --config.unlearn.method=NAME loreun, salun, flat or gradient_ascent; unlearn.files is a pattern
                               of what to forget, unlearn.retrained the directory of a run that
                               never saw it, with which to end alike
  --config.mesh.AXIS=N         how many devices share what: data (the batch), fsdp (parameters too),
                               tensor (heads, hidden units, vocabulary), sequence (the tokens of
                               each sequence), expert (the experts of a mixture); -1 for all that
                               are left. config.rules says which axis of an array goes where.

Several processes
  --coordinator=HOST:PORT      where process 0 waits for the others; --num_processes, how many there
                               are, and --process_id, which of them this is. On a TPU pod, Slurm,
                               Open MPI and Kubernetes all of them are found (--distributed=auto).
                               On one machine: python -m jaxref.train.local --help

Looking on
  --config.norms_every=N       writes the norm of each parameter and gradient, every N steps
  --profile=START:STOP         writes a trace of these steps to WORKDIR/profile, for XProf

Examples
  python -m jaxref.train
  python -m jaxref.train --config.steps=2000 --config.optimizer.name=lion_k
  python -m jaxref.train --config.data.name='text:~/notes/**/*.md' --workdir=runs/notes
  python -m jaxref.train --mode=sample --workdir=runs/notes --config.sample.prompt='# '
  python -m jaxref.train --mode=quantize --workdir=runs/notes --config.quantize.method=gptq
  python -m jaxref.train --mode=eval --workdir=runs/notes --config.quantize.method=gptq
  python -m jaxref.train --mode=report --workdir=runs/notes
  python -m jaxref.train --config=configs/lm_objectives.py --config.objective=electra
  python -m jaxref.train --mode=align --workdir=runs/code --config.align.method=hapo
  python -m jaxref.train --mode=unlearn --workdir=runs/notes --config.unlearn.files='diary/*'
  python -m jaxref.train --config=configs/digits.py
  python -m jaxref.train --config=configs/digits.py --config.data.name=images:~/fashion-mnist
  python -m jaxref.train --config=configs/forecast.py --config.model.name=CARD
"""

import sys
from collections.abc import Sequence
from logging import CRITICAL, getLogger
from typing import Any

from absl import app, flags, logging
from etils.epath import Path

from jaxref.core.host import prepare_host

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run: configuration, metrics, checkpoints, pictures, sample; or a place in "
    "an object store, gs://BUCKET/PATH or s3://BUCKET/PATH. Default: one for each configuration, "
    "under ./runs.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "sample", "quantize", "align", "unlearn", "report"],
    "What to do.",
)
_CONFIG = flags.DEFINE_string(
    "config", None, "Python file that defines get_config(). Single keys: --config.KEY=VALUE."
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, steps to write a trace of to WORKDIR/profile, both included."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether this is one process of several: auto, where it finds itself on a cluster or is given "
    "a coordinator.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where process 0 waits for the others. Default: the cluster's."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are. Default: the cluster's.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0 on. Default: the cluster's.", lower_bound=0
)
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
    "initialization_timeout", 300, "Seconds to wait for all processes at the start.", lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds without a sign of life after which a process is taken for dead, and all others end.",
    lower_bound=1,
)

_EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without those of the form --config.KEY=VALUE, and these as "KEY=VALUE".

    >>> split_overrides(["train", "--mode=eval", "--config.steps=3", "--config.seed", "1"])
    (['train', '--mode=eval'], ['steps=3', 'seed=1'])
    """
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        name = argument.lstrip("-")
        if not (argument.startswith("-") and name.startswith("config.")):
            rest.append(argument)
        elif "=" in name:
            overrides.append(name.removeprefix("config."))
        else:
            value = next(arguments, None)
            tail = "" if value is None else f"={value}"
            overrides.append(name.removeprefix("config.") + tail)
    return rest, overrides


def main(overrides: list[str]) -> None:
    """Does what the flags ask for, with the configuration's keys in `overrides` changed."""
    from jaxref.train import align, loop, quantize, report, unlearn
    from jaxref.train.config import ConfigError, load_config, saved_config, with_overrides
    from jaxref.train.observe import steps_to_profile

    if _PROFILE.value is not None and _MODE.value != "train":
        raise ConfigError(f"--profile is of a training, and --mode={_MODE.value} is none")
    config = load_config(_CONFIG.value, overrides)
    workdir = _workdir(config)
    if _MODE.value == "train":
        profile = steps_to_profile(_PROFILE.value, config.steps)
        _connect(config, workdir)
        loop.train(config, workdir, profile)
        return
    config = with_overrides(saved_config(workdir), overrides)
    if _MODE.value == "report":
        report.report(config, workdir)
        return
    _connect(config, workdir)
    modes = {
        "eval": loop.evaluate,
        "sample": loop.print_sample,
        "quantize": quantize.quantize,
        "align": align.align,
        "unlearn": unlearn.unlearn,
    }
    modes[_MODE.value](config, workdir)


def _connect(config: Any, workdir: Path) -> None:
    """Meets the other processes of the run, if there are any, and sees that they do the same."""
    from flax.traverse_util import flatten_dict

    from jaxref.train.distributed import check_agreement, initialize

    initialize(
        _DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        initialization_timeout=_INITIALIZATION_TIMEOUT.value,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
        saves_when_terminated=_MODE.value == "train",
    )
    asked = {
        "--mode": _MODE.value,
        "--workdir": str(workdir),
        "--profile": _PROFILE.value,
    }
    check_agreement(asked | flatten_dict(config.to_dict(), sep="."))


def _workdir(config: Any) -> Path:
    from jaxref.train.loop import default_workdir
    from jaxref.train.places import place

    return place(_WORKDIR.value or default_workdir(config))


def _quiet_checkpointing() -> None:
    """A save that fails is raised as an error of one line; orbax, tensorstore and the packages of
    object stores would print the tracebacks of their threads besides."""
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    for name in ("asyncio", "fsspec", "gcsfs", "s3fs", "google.auth", "botocore", "aiobotocore"):
        getLogger(name).setLevel(CRITICAL)
    print_unraisable = sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_unraisable(unraisable)

    sys.unraisablehook = print_others


def run() -> None:
    """The console script `jaxref-train`."""
    prepare_host()
    argv, overrides = split_overrides(sys.argv)

    # absl shows the docstring and the flags of the script that was started
    sys.modules["__main__"].__doc__ = __doc__
    for flag in (
        _WORKDIR,
        _MODE,
        _CONFIG,
        _PROFILE,
        _DISTRIBUTED,
        _COORDINATOR,
        _NUM_PROCESSES,
        _PROCESS_ID,
        _INITIALIZATION_TIMEOUT,
        _HEARTBEAT_TIMEOUT,
    ):
        flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS[flag.name])

    def guarded(positional: list[str]) -> None:
        if positional[1:]:
            sys.exit(f"unexpected argument {positional[1]!r}; --help shows what there is")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            _quiet_checkpointing()
        try:
            main(overrides)
        except (Exception, KeyboardInterrupt) as error:
            expected = isinstance(error, _EXPECTED_ERRORS) and not logging.level_debug()
            message = f"{type(error).__name__}: {error}" if expected else ""
            import jax

            if jax.distributed.is_initialized():
                from jaxref.train.distributed import leave

                leave(error, message)
            if not expected:
                raise
            sys.exit(message)

    app.run(guarded, argv=argv)


if __name__ == "__main__":
    run()
