"""Configurations: a Python file gives the defaults, `--config.a.b=value` changes one.

A section with a `name` is a component. Its name is a public function or class of a room, and its
other keys are that function's keyword arguments, whichever they are: what a room offers can be
chosen without being listed anywhere. Naming another component drops the default's arguments.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jaxref.train.places import only_os_errors

ROOMS: dict[str, tuple[str, ...]] = {
    "model": ("jaxref.models",),
    "model.norm": ("jaxref.norms",),
    "model.query_key_norm": ("jaxref.norms",),
    "model.final_norm": ("jaxref.norms",),
    "model.attention": ("jaxref.attention", "jaxref.nn"),
    "model.linear": ("jaxref.nn",),
    "model.mlp": ("jaxref.nn",),
    "model.activation": ("jax.nn", "jaxref.nn"),
    "model.conv": ("jaxref.nn",),
    "objective": ("jaxref.train.objectives",),
    "loss": ("jaxref.kernels", "jaxref.losses", "optax.losses"),
    "align.method": ("jaxref.train.alignment",),
    "align.reward": ("jaxref.train.rewards",),
    "unlearn.method": ("jaxref.train.unlearning",),
    "optimizer": ("jaxref.train.methods", "jaxref.optimizers", "optax"),
    "optimizer.base": ("jaxref.optimizers", "optax"),
    "optimizer.compressor": ("jaxref.optimizers",),
    "schedule": ("jaxref.optimizers", "optax.schedules"),
}
"""Where a component's name is looked up, in this order. optax completes our own rooms."""

OPTIONAL = ("model.query_key_norm", "model.norm", "model.final_norm")
"""Components whose name may be None."""

FREE_KEYS = (
    "mesh",
    "rules",
    "log_every",
    "norms_every",
    "validate_every",
    "validation_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_checkpoint_every",
    "max_nonfinite_steps",
    "sample",
    "quantize",
    "align",
    "unlearn",
)
"""What may change when a run is resumed: it has no part in the parameters that come out."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what and lists near matches."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration that a file and overrides of single keys make.

    Args:
      path: a Python file that defines `get_config() -> ConfigDict`, relative to the current
        directory or, like configs/digits.py, to jaxref/train. Default: the main job's,
        configs/default.py. Keys that the file leaves out are the main job's.
      overrides: as in `with_overrides`.

    Returns:
      The configuration, with every key that the main job's has.

    Raises:
      ConfigError: the file is missing, cannot be run or defines no `get_config`, a key does not
        exist (near matches are listed), or a value has another type than the default.

    >>> config = load_config(overrides=["optimizer.name=lion_k", "optimizer.kappa=l2", "steps=20"])
    >>> config.optimizer.to_dict(), config.steps
    ({'kappa': 'l2', 'name': 'lion_k'}, 20)
    """
    from jaxref.train.configs.default import get_config

    config = get_config()
    if path is not None:
        _merge(config, _from_file(Path(path)), prefix="")
    return with_overrides(config, overrides)


def with_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of the configuration in which some keys are changed.

    Args:
      config: the configuration.
      overrides: `"a.b=value"` each, later ones win. Where a string stands, the value is the text
        itself; elsewhere it is a Python literal, or else a string. A component's section is given
        its name: "objective=goldfish" is "objective.name=goldfish".

    Returns:
      The copy; `config` stays as it is.

    Raises:
      ConfigError: as `load_config`.
    """
    config = config.copy_and_resolve_references()
    _merge(config, _nested(overrides), prefix="")
    return config


def resolve(
    config: ConfigDict, section: str, given: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """The function that a component section names, with the section's keywords bound to it.

    Args:
      config: the whole configuration.
      section: a key of `ROOMS`. Sections below it (a model's norm) are resolved too, to None
        where they are `OPTIONAL` and their name is.
      given: arguments that the caller will give, and the key each follows from.

    Returns:
      The function. For a model, its configuration class.

    Raises:
      ConfigError: no room of the section has such a name, or the function takes no such keyword
        (near matches are listed), or the section sets a keyword that is `given`.
    """
    keywords = dict(_section(config, section))
    name = keywords.pop("name", None)
    function = _lookup(name, section)
    function = getattr(function, "Config", function)  # a model is made from its configuration
    for key, source in (given or {}).items():
        if key in keywords:
            raise ConfigError(f"{section}.{key} follows from {source}; set that instead")
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in keywords:
            if key not in parameters:
                raise ConfigError(
                    f"{section}.name={name} takes no argument {key!r}{near(key, parameters)}"
                )
    for key, value in keywords.items():
        if isinstance(value, ConfigDict):
            below = f"{section}.{key}"
            if below in OPTIONAL and value.get("name") is None:
                keywords[key] = None
            else:
                keywords[key] = resolve(config, below) if below in ROOMS else value.to_dict()
    return partial(function, **keywords) if keywords else function


def from_json(text: str) -> ConfigDict:
    """The configuration that `config.json` of a working directory holds.

    Sections that it does not have, being older, are the main job's, and so is what is missing in
    sections that are no components: those have the arguments of their function.

    Args:
      text: the JSON.

    Returns:
      The configuration.

    Raises:
      ConfigError: the text is not valid JSON.
    """
    from jaxref.train.configs.default import get_config

    try:
        config = ConfigDict(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"config.json of the workdir is not valid JSON: {error}") from error
    for key, value in get_config().items():
        if key not in config:
            config[key] = value
        elif isinstance(value, ConfigDict) and key not in (*ROOMS, "mesh", "rules"):
            for name in set(value) - set(config[key]):
                config[key][name] = value[name]
    return config


def saved_config(workdir: epath.Path) -> ConfigDict:
    """The configuration of the run that a directory belongs to.

    Args:
      workdir: the directory.

    Returns:
      The configuration in its `config.json`, as of `from_json`.

    Raises:
      FileNotFoundError: it is no run's.
      ConfigError: as `from_json`.
    """
    saved = workdir / "config.json"
    with only_os_errors(saved):
        if not saved.is_file():
            raise FileNotFoundError(f"{workdir} is not the working directory of a run")
        text = saved.read_text()
    return from_json(text)


def learned(config: ConfigDict) -> str:
    """What a run learns, by name: its objective, or the loss of that.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.

    Returns:
      `objective.name`, or for "next_token" `loss.name`.
    """
    is_plain = config.objective.name == "next_token"
    return config.loss.name if is_plain else config.objective.name


def _lookup(name: str | None, section: str) -> Callable[..., Any]:
    candidates: list[str] = []
    for room in ROOMS[section]:
        module = importlib.import_module(room)
        public = [n for n in getattr(module, "__all__", dir(module)) if not n.startswith("_")]
        if name in public and callable(getattr(module, str(name))):
            return getattr(module, str(name))
        candidates += [n for n in public if callable(getattr(module, n))]
    rooms = " or ".join(ROOMS[section])
    raise ConfigError(f"{section}.name: {rooms} has no {name!r}{near(str(name), candidates)}")


def _section(config: ConfigDict, dotted: str) -> ConfigDict:
    for key in dotted.split("."):
        config = config[key]
    return config


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file() and (Path(__file__).parent / path).is_file():
        path = Path(__file__).parent / path  # one of ours: configs/digits.py
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {path}")
    spec = importlib.util.spec_from_file_location("jaxref_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # whatever the file does
        raise ConfigError(f"--config: {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config: {path} must define get_config() -> ml_collections.ConfigDict")
    return config.to_dict()


class _Text(str):
    """A value as it was typed."""


def _nested(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--config.{dotted} needs a value: --config.{dotted}=VALUE")
        *parents, last = (f"{dotted}.name" if dotted in ROOMS else dotted).split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--config.{dotted}: {key!r} is given a value of its own")
        node[last] = _Text(text)
    return tree


def _read(value: Any, default: Any, component: bool) -> Any:
    """What is meant by a value that replaces `default`, if it is as it was typed."""
    if isinstance(value, dict) and not isinstance(default, ConfigDict):
        return {key: _read(below, None, component) for key, below in value.items()}
    if not isinstance(value, _Text):
        return value
    if isinstance(default, str) and not (component and value.lower() == "none"):
        return str(value)
    return _literal(value)


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return str(text)


def _merge(config: ConfigDict, changes: dict[str, Any], prefix: str) -> None:
    """Writes the tree of changes into `config`, with the checks that `load_config` names."""
    component = prefix.rstrip(".") in ROOMS
    if component and "name" in changes:
        name = _read(changes["name"], config.name, component)
        if name != config.name:
            for key in list(config):  # another component's arguments
                del config[key]
            config.name = name
    for key, value in changes.items():
        dotted = prefix + key
        if key not in config:
            if not component:
                raise ConfigError(f"unknown configuration key {dotted!r}{near(key, config)}")
            config[key] = _read(value, None, component)
            continue
        value = _read(value, config[key], component)
        if not isinstance(config[key], ConfigDict):
            config[key] = _like(config[key], value, dotted, component)
        elif isinstance(value, dict):
            _merge(config[key], value, prefix=f"{dotted}.")
        else:
            raise ConfigError(
                f"{dotted} is a section; set one of its keys: "
                + ", ".join(f"{dotted}.{name}" for name in config[key])
            )


def _like(default: Any, value: Any, dotted: str, component: bool) -> Any:
    """`value` in the type of `default`; arguments of components may be None, too."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, str) and not isinstance(value, dict) and value is not None:
        return str(value)  # a name may look like a number
    if type(value) is not type(default) and not (component and None in (value, default)):
        raise ConfigError(
            f"{dotted} must be {type(default).__name__} like its default {default!r}, got {value!r}"
        )
    return value


def near(name: str, candidates: Iterable[str]) -> str:
    """What to add to an error about a name that does not exist.

    Args:
      name: the name.
      candidates: the names that there are.

    Returns:
      Up to five candidates that are spelled nearly like it or hold it; if there are none, up to
      forty of all of them, sorted.

    >>> near("gtpq", ["gptq", "lnq"])
    '; did you mean gptq?'
    """
    candidates = list(candidates)
    close = difflib.get_close_matches(name, candidates, n=5, cutoff=0.5)
    longer = [c for c in candidates if name.lower() in c.lower() and c not in close]
    if close or longer:
        return f"; did you mean {', '.join([*close, *longer][:5])}?"
    return f"; there are {', '.join(sorted(candidates)[:40])}"
