"""What the tests of the training app share: a text, a tiny run on it, one device of the eight, the
program called in this process."""

import random
import sys

import jax
import pytest
from absl import flags
from absl import logging as absl_logging

from jaxref.parallel import make_mesh
from jaxref.train import __main__ as cli
from jaxref.train import program
from jaxref.train.config import load_config

WORDS = "the loss of a small model falls when its gradient is followed down to where it ends"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 8000 words or so, in an order that can be learnt."""
    draw, words, sentences = random.Random(0), WORDS.split(), []
    for _ in range(1000):
        start = draw.randrange(10)
        sentences.append(" ".join(words[start : start + 8]))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(".\n".join(sentences))
    return path


@pytest.fixture(scope="session")
def tiny(text):
    """`tiny("key=value", ...)`: the overrides of a run of a few seconds."""
    base = [
        f"data.name=text:{text}",
        "data.validation_fraction=0.1",
        "steps=12",
        "batch_size=8",
        "length=16",
        "model.num_layers=1",
        "model.features=16",
        "model.num_heads=4",
        "model.mlp_features=32",
        "log_every=1",
        "validate_every=6",
        "validation_tokens=1024",
        "checkpoint_every=4",
        "sample.prompt=the ",
        "sample.length=20",
    ]
    return lambda *overrides: [*base, *overrides]


@pytest.fixture(scope="session")
def tiny_config(tiny):
    return lambda *overrides: load_config(overrides=tiny(*overrides))


@pytest.fixture
def devices(monkeypatch):
    """`devices(n)`: programs that are built from now on have the first n devices, at first one."""

    def use(count):
        mesh = lambda sizes, _: make_mesh(sizes, jax.devices()[:count])
        monkeypatch.setattr(program, "make_mesh", mesh)

    use(1)
    return use


@pytest.fixture
def arguments(tiny):
    """`arguments(workdir, "key=value", ...)`: the command line of a tiny run."""

    def of(workdir, *overrides):
        return [f"--workdir={workdir}", *(f"--config.{change}" for change in tiny(*overrides))]

    return of


@pytest.fixture
def call(devices, monkeypatch, capsys):
    """`call(*argv)`: runs the program in this process; what it exits with, and what it printed."""
    verbosity = absl_logging.get_verbosity()

    def called(*argv):
        monkeypatch.setattr(sys, "argv", ["jaxref-train", *map(str, argv)])
        monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
        for name in ("workdir", "mode", "config", "profile"):
            flags.FLAGS[name].unparse()
        with pytest.raises(SystemExit) as error:
            cli.run()
        return error.value.code, capsys.readouterr().out

    yield called
    absl_logging.set_verbosity(verbosity)


@pytest.fixture
def warnings(monkeypatch):
    """What `absl.logging.warning` says of damage; orbax has complaints of its own."""
    messages = []

    def warning(text, *args):
        if text.startswith("Damaged"):
            messages.append(text % args)

    monkeypatch.setattr(absl_logging, "warning", warning)
    return messages
