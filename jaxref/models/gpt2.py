"""GPT-2 weights in the layout of Hugging Face's safetensors files."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxref.models.blocks import component_class
from jaxref.models.conversions import with_scan_layers
from jaxref.models.transformer import Transformer, TransformerConfig
from jaxref.nn import MLP, Linear
from jaxref.norms import layer_norm

_HEAD_DIM = 64  # of every GPT-2 that was released
_EPSILON = 1e-5


def load_gpt2(path: str | Path, *, num_heads: int | None = None, **overrides: Any) -> Transformer:
    """A `Transformer` with the weights of a GPT-2 file.

    Reads `wte`, `wpe`, `h.N.{ln_1, attn.c_attn, attn.c_proj, ln_2, mlp.c_fc, mlp.c_proj}` and
    `ln_f`, with or without "transformer." before them. Other tensors that such files have, the
    masks `attn.bias` and `attn.masked_bias` and a tied `lm_head.weight`, are passed over.

    Args:
      path: the .safetensors file.
      num_heads: heads. Default: `n_head` of a config.json beside the file, or else those of 64
        entries, as in every released GPT-2.
      **overrides: of the `TransformerConfig`, that do not change the parameters: `dtype`,
        `param_dtype`, `dropout`, `remat`, `scan_layers`.

    Returns:
      The model: pre-norm with biases, learned positions, tanh GELU, tied embeddings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a tensor is missing, of an unexpected shape, or not known, or `num_heads` does not
        divide the width.
      ImportError: the package safetensors is missing.

    Use it to start from trained weights; `jaxref.models.generate` continues prompts of token ids.

    Cost: one read of the file, whose tensors are in memory twice until the model is made.

    Example:
      >>> from tempfile import TemporaryDirectory
      >>> config = gpt2_config(
      ...     vocab_size=16, max_length=8, num_layers=1, features=8, num_heads=2, mlp_features=32
      ... )
      >>> model, tokens = config.build(rngs=nnx.Rngs(0)), jnp.arange(8)[None]
      >>> with TemporaryDirectory() as directory:
      ...     save_safetensors(model, f"{directory}/model.safetensors")
      ...     loaded = load_gpt2(f"{directory}/model.safetensors", num_heads=2)
      >>> bool((model(tokens) == loaded(tokens)).all())
      True

    Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    tensors = {name.removeprefix("transformer."): x for name, x in _read(path).items()}
    tensors = {name: x for name, x in tensors.items() if not _is_passed_over(name)}
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}: it is not a GPT-2")
    (vocab_size, features), max_length = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
    layers = {int(name.split(".")[1]) for name in tensors if name.startswith("h.")}
    config = gpt2_config(
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=len(layers),
        features=features,
        num_heads=num_heads or _heads_beside(path) or max(features // _HEAD_DIM, 1),
        mlp_features=tensors["h.0.mlp.c_fc.weight"].shape[1],
        **{"param_dtype": jnp.float32} | overrides | {"scan_layers": False},
    )
    expected = _shapes(config)
    for name in sorted(expected.keys() | tensors.keys()):
        theirs = tensors[name].shape if name in tensors else None
        if theirs != expected.get(name):
            raise ValueError(
                f"{path}: tensor {name} must have shape {expected.get(name)}, got {theirs}"
            )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    params = jax.tree.map(
        lambda x: jnp.asarray(x, config.param_dtype), _from_tensors(config, tensors)
    )
    model = nnx.merge(graphdef, params)
    return with_scan_layers(model) if overrides.get("scan_layers") else model


def save_safetensors(model: Transformer, path: str | Path) -> None:
    """Writes a model of GPT-2's form to a file that `load_gpt2` and Hugging Face read.

    Args:
      model: a `Transformer` with the choices of `gpt2_config`, stacked layers or not.
      path: the .safetensors file; one that exists is replaced only once the new one is whole.

    Raises:
      ValueError: a model that GPT-2's layout has no place for.
      ImportError: the package safetensors is missing.

    Use it to hand a model of GPT-2's form to other programs; one of `gpt2_config` is of that form,
    and `load_gpt2` reads it back.

    Cost: a copy of the parameters on the host, and a file of their size.

    Example:
      >>> from tempfile import TemporaryDirectory
      >>> config = gpt2_config(
      ...     vocab_size=16, max_length=8, num_layers=1, features=8, num_heads=2, mlp_features=32
      ... )
      >>> with TemporaryDirectory() as directory:
      ...     save_safetensors(config.build(rngs=nnx.Rngs(0)), f"{directory}/model.safetensors")
      ...     [path.name for path in Path(directory).iterdir()]
      ['model.safetensors']

    Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    config = model.config
    plain = {
        "architecture": "decoder",
        "norm_placement": "pre",
        "positions": "learned",
        "use_bias": True,
        "gated": False,
        "tie_embeddings": True,
        "attention": gpt2_config(**_sizes(config)).attention,
        "activation": jax.nn.gelu,
        "linear": Linear,
        "mlp": MLP,
        "query_key_norm": None,
        "final_norm": None,
        "layer_norm_scaling": False,
        "stable_embedding": False,
    }
    wrong = [name for name, value in plain.items() if getattr(config, name) != value]
    if component_class(config.norm) is not layer_norm:
        wrong.append("norm")
    if config.num_kv_heads not in (None, config.num_heads):
        wrong.append("num_kv_heads")
    if wrong:
        raise ValueError(f"model is not of GPT-2's form: its {', '.join(wrong)} differ")
    single = with_scan_layers(model, False)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(single, nnx.Param)))
    tensors = _to_tensors(config, params)
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.tmp")
    _safetensors().save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def gpt2_config(**sizes: Any) -> TransformerConfig:
    """GPT-2 as a configuration.

    Args:
      **sizes: `vocab_size`, `max_length`, `num_layers`, `features`, `num_heads`, `mlp_features`,
        and other fields of `TransformerConfig` that are to differ. GPT-2 small is 50257, 1024, 12,
        768, 12, 3072.

    Returns:
      The configuration.

    Raises:
      ValueError: what `TransformerConfig` raises.

    Use it to train a GPT-2 from random weights, in a form that `save_safetensors` can write;
    `load_gpt2` starts from trained ones.

    Cost: no arrays; GPT-2 small has 124 million parameters and takes 134 million multiplications a
    token, of 1024.

    Example:
      >>> gpt2_config(
      ...     vocab_size=16, max_length=8, num_layers=1, features=8, num_heads=2, mlp_features=32
      ... ).positions
      'learned'

    Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    defaults: dict[str, Any] = {
        "norm": partial(layer_norm, epsilon=_EPSILON),
        "positions": "learned",
        "use_bias": True,
        "activation": jax.nn.gelu,
        "tie_embeddings": True,
    }
    return TransformerConfig(**defaults | sizes)


def _sizes(config: TransformerConfig) -> dict[str, int]:
    names = ("vocab_size", "max_length", "num_layers", "features", "num_heads", "mlp_features")
    return {name: getattr(config, name) for name in names}


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "GPT-2 files need the package safetensors: pip install 'jaxref[weights]'"
        ) from error
    return safetensors.numpy


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return _safetensors().load_file(path)
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged file brings about
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _is_passed_over(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias"))


def _heads_beside(path: Path) -> int | None:
    config = path.with_name("config.json")
    return json.loads(config.read_text()).get("n_head") if config.is_file() else None


def _norm(layer: str) -> dict[str, str]:
    return {"scale": f"{layer}.weight", "bias": f"{layer}.bias"}


def _linear(layer: str) -> dict[str, str]:
    return {"kernel": f"{layer}.weight", "bias": f"{layer}.bias"}


def _names(config: TransformerConfig) -> dict[str, Any]:
    """The names of GPT-2's tensors in the tree of the model's parameters.

    Query, key and value are one tensor there, `attn.c_attn`; here the names say which third.
    """

    def block(i: int) -> dict[str, Any]:
        at = f"h.{i}."
        attention = {
            part: {kind: f"{name}#{third}" for kind, name in _linear(at + "attn.c_attn").items()}
            for third, part in enumerate(("query", "key", "value"))
        }
        attention["output"] = _linear(at + "attn.c_proj")
        return {
            "attention": {"function": attention, "input_norm": _norm(at + "ln_1")},
            "mlp": {
                "function": {"up": _linear(at + "mlp.c_fc"), "down": _linear(at + "mlp.c_proj")},
                "input_norm": _norm(at + "ln_2"),
            },
        }

    return {
        "embed": {"embedding": "wte.weight"},
        "positions": {"embedding": "wpe.weight"},
        "blocks": {i: block(i) for i in range(config.num_layers)},
        "final_norm": _norm("ln_f"),
    }


def _from_tensors(config: TransformerConfig, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    heads = (config.num_heads, config.features // config.num_heads)

    def value(name: str) -> np.ndarray:
        tensor, _, third = name.partition("#")
        array = tensors[tensor]
        if third:
            array = np.split(array, 3, axis=-1)[int(third)]
            return array.reshape(*array.shape[:-1], *heads)
        if tensor.endswith("attn.c_proj.weight"):
            return array.reshape(*heads, config.features)
        return array

    return jax.tree.map(value, _names(config))


def _to_tensors(config: TransformerConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """GPT-2's tensors by name."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    shapes = _shapes(config)

    def visit(name: str, array: np.ndarray) -> None:
        tensor, _, third = name.partition("#")
        parts.setdefault(tensor, {})[third] = array.reshape(*shapes[tensor][:-1], -1)

    jax.tree.map(visit, _names(config), params)
    return {
        name: np.concatenate([arrays[third] for third in sorted(arrays)], axis=-1)
        for name, arrays in parts.items()
    }


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    d, hidden = config.features, config.mlp_features
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, d),
        "wpe.weight": (config.max_length, d),
        "ln_f.weight": (d,),
        "ln_f.bias": (d,),
    }
    linears = {
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "mlp.c_fc": (d, hidden),
        "mlp.c_proj": (hidden, d),
    }
    for i in range(config.num_layers):
        for name, shape in linears.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[1:]
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (d,), f"h.{i}.{name}.bias": (d,)}
    return shapes
