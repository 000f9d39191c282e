"""Models whose linear layers are quantized: their checkpoints, and the program that runs them.

A quantized model lives in `quantized/NAME/` of its run's working directory, in a checkpoint like
those of the run: it appears when all of it is on disk, replaces the one before it only then, and is
checked bit for bit when it is read. Beside the arrays its manifest says what they are the parts of:
formats, shapes, types.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from etils.epath import Path
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxref.models.blocks import unstack_block
from jaxref.nn.quantized_linear import (
    QuantizedBitLinear,
    QuantizedLinear,
    dotted,
    replace_modules,
)
from jaxref.quantization import (
    BAQTensor,
    LNQTensor,
    PowerTensor,
    PyramidTensor,
    QTensor,
    QuantSpec,
)
from jaxref.train.checkpoints import CheckpointError, Checkpoints, has_checkpoint
from jaxref.train.evaluation import Evaluation
from jaxref.train.places import total_bytes
from jaxref.train.program import (
    NO_STATE,
    Batch,
    ModelState,
    Program,
    TrainState,
    within,
)
from jaxref.train.quantizers import checkpoint_name

FORMATS = {
    kind.__name__: kind for kind in (QTensor, LNQTensor, BAQTensor, PowerTensor, PyramidTensor)
}
"""The quantized pytrees that a checkpoint can hold, by name."""


def directory(workdir: Path, options: ConfigDict) -> Path:
    """Where the model is that a section `quantize` describes.

    Args:
      workdir: the working directory of the run.
      options: the section, which has a method.

    Returns:
      The path, `quantized/NAME` below `workdir`; it need not exist.
    """
    return workdir / "quantized" / checkpoint_name(options)


def unstacked(model: Any) -> Any:
    """The model with single blocks in the place of stacked ones; others as they are.

    Args:
      model: the model; its list of blocks is replaced in place.

    Returns:
      The same model.
    """
    for name in ("blocks", "encoder"):
        blocks = getattr(model, name, None)
        if isinstance(blocks, nnx.List) and any(getattr(b, "depth", None) for b in blocks):
            single = [layer for block in blocks for layer in unstack_block(block)]
            setattr(model, name, nnx.List(single))
    return model


def run_quantized(program: Program, model: Any, step: int) -> tuple[Program, TrainState]:
    """A program that evaluates and samples from a quantized model, and its state.

    Args:
      program: that of the run.
      model: the quantized model. Its arrays are copied to all devices.
      step: of the training, after which the model was quantized.

    Returns:
      The program, with `model`, `evaluate`, `put` and what else has no part in training, and a
      state for it that has parameters and nothing else.
    """
    graphdef, state = nnx.split(model)
    everywhere = replicated(program)
    params = jax.device_put(nnx.to_pure_dict(state), everywhere)

    def merge(params: Any, model_state: ModelState) -> Any:
        del model_state  # with the parameters
        return nnx.merge(graphdef, params)

    def evaluate(params: Any, batch: Batch) -> Evaluation:
        model = merge(params, NO_STATE)
        model.eval()
        return program.objective.evaluate(model, batch)

    measure = jax.jit(
        within(program.mesh, program.rules, evaluate),
        in_shardings=(everywhere, None),
        out_shardings=everywhere,
    )

    def evaluated(params: Any, batch: Batch, model_state: ModelState | None = None) -> Evaluation:
        del model_state
        return measure(params, batch)

    zero = jnp.zeros((), jnp.int32)
    return (
        program._replace(graphdef=graphdef, merge=merge, evaluate=evaluated),
        TrainState(
            step=jnp.asarray(step, jnp.int32),
            params=params,
            opt_state=(),
            average=None,
            key=jax.random.key(0),
            nonfinite=zero,
            nonfinite_in_row=zero,
            model_state=NO_STATE,
        ),
    )


def save_quantized(path: Path, model: Any, *, step: int, config: ConfigDict) -> int:
    """Writes a quantized model, in the place of one that is there.

    Args:
      path: its directory.
      model: with `QuantizedLinear`s.
      step: of the training, after which it was quantized.
      config: what it was made by.

    Returns:
      The bytes that its arrays take on disk.

    Raises:
      CheckpointError: it could not be written; what was there before still is.
    """
    linears = {
        dotted(at): _describe_linear(module)
        for at, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedLinear)
    }
    content = {"config": config.to_dict(), "step": step, "linears": linears}
    with Checkpoints(path, keep=1) as checkpoints:
        number = (checkpoints.latest_step() or 0) + 1
        arrays = _by_name(nnx.to_pure_dict(nnx.state(model)))
        checkpoints.save(number, arrays, config=content, blocking=True)
    return total_bytes(path / str(number) / "state")


def load_quantized(path: Path, program: Program) -> tuple[Any, int]:
    """The quantized model in a directory, and the step of the training that it is from.

    Args:
      path: its directory.
      program: that of the run.

    Returns:
      The model, its arrays on all devices of the program, and the step.

    Raises:
      CheckpointError: there is none, or none that can be read.
      ValueError: it is of another model than the program's.
    """
    if not has_checkpoint(path):
        written = sorted(other.name for other in path.parent.glob("*") if has_checkpoint(other))
        raise CheckpointError(
            f"{path.parent.parent} holds no quantized model {path.name}"
            + (f", but {', '.join(written)}" if written else "")
            + "; --mode=quantize with the same --config.quantize.* writes it"
        )
    made: dict[str, Any] = {}

    def abstract(content: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        model = _abstract_model(program, content["linears"])
        graphdef, state = nnx.split(model)
        params = nnx.to_pure_dict(state)
        arrays = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(program))
            for name, x in _by_name(params).items()
        }
        made.update(graphdef=graphdef, params=params, names=list(arrays), step=content["step"])
        return arrays

    with Checkpoints(path, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert restored is not None
    leaves = [restored[0][name] for name in made["names"]]
    params = jax.tree.unflatten(jax.tree.structure(made["params"]), leaves)
    return nnx.merge(made["graphdef"], params), made["step"]


def describe(weight: Any) -> dict[str, Any]:
    """A quantized pytree without its arrays, as what JSON can hold; `abstract_weight` undoes it.

    Args:
      weight: a quantized weight of `jaxref.quantization`.

    Returns:
      Its "format", the name of the class, and its "fields".

    >>> from jaxref.quantization import quantize
    >>> description = describe(quantize(jnp.ones((4, 2)), QuantSpec(bits=4)))
    >>> description["format"], description["fields"]["values"]
    ('QTensor', {'shape': [4, 1], 'dtype': 'uint8'})
    """
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(weight):
        value = getattr(weight, field.name)
        if type(value).__name__ in FORMATS:
            value = describe(value)
        elif isinstance(value, QuantSpec):
            value = dataclasses.asdict(value)
        elif field.name == "dtype":
            value = jnp.dtype(value).name
        elif value is not None and not field.metadata.get("static"):
            value = _describe_array(value)
        fields[field.name] = value
    return {"format": type(weight).__name__, "fields": fields}


def abstract_weight(description: dict[str, Any]) -> Any:
    """The quantized pytree of a description, with `jax.ShapeDtypeStruct`s for arrays.

    Args:
      description: what `describe` gave, from JSON too.

    Returns:
      The pytree, of the same structure.

    >>> from jaxref.quantization import quantize
    >>> weight = quantize(jnp.ones((4, 2)), QuantSpec(bits=4))
    >>> again = abstract_weight(describe(weight))
    >>> jax.tree.structure(again) == jax.tree.structure(weight), again.values.dtype.name
    (True, 'uint8')
    """
    kind = FORMATS[description["format"]]
    fields = {}
    for field in dataclasses.fields(kind):
        value = description["fields"][field.name]
        if field.name == "spec":
            axis = value["axis"]
            value = QuantSpec(**value | {"axis": tuple(axis) if isinstance(axis, list) else axis})
        elif field.name == "dtype":
            value = jnp.dtype(value)
        elif isinstance(value, dict) and "format" in value:
            value = abstract_weight(value)
        elif isinstance(value, dict):
            value = _abstract_array(value)
        elif isinstance(value, list):
            value = tuple(value)
        fields[field.name] = value
    return kind(**fields)


def _describe_linear(linear: QuantizedLinear) -> dict[str, Any]:
    options = ("activations", "threshold", "max_outliers")
    if isinstance(linear, QuantizedBitLinear):
        options = ("activation_bits", "norm", "epsilon")
    return {
        "class": type(linear).__name__,
        "weight": describe(linear.weight.get_value()),
        "low_rank": None if linear.low_rank is None else [describe(f) for f in linear.low_rank],
        "bias": None if linear.bias is None else _describe_array(linear.bias[...]),
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "dtype": linear.dtype.name,
        "options": {name: getattr(linear, name) for name in options},
    }


def _abstract_linear(description: dict[str, Any]) -> QuantizedLinear:
    bias, factors = description["bias"], description["low_rank"]
    made: Any = {kind.__name__: kind for kind in (QuantizedLinear, QuantizedBitLinear)}
    options = dict(description["options"])
    if factors is not None:
        options["low_rank"] = tuple(map(abstract_weight, factors))
    return made[description["class"]](
        abstract_weight(description["weight"]),
        bias=None if bias is None else _abstract_array(bias),
        in_features=tuple(description["in_features"]),
        out_features=tuple(description["out_features"]),
        dtype=description["dtype"],
        **options,
    )


def _abstract_model(program: Program, linears: dict[str, Any]) -> Any:
    """The run's model with quantized layers, without arrays."""
    state = program.abstract_state
    model = nnx.eval_shape(
        lambda params, model_state: unstacked(program.merge(params, model_state)),
        state.params,
        state.model_state,
    )
    return replace_modules(model, {path: _abstract_linear(d) for path, d in linears.items()})


def _describe_array(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": jnp.dtype(array.dtype).name}


def _abstract_array(description: dict[str, Any]) -> Any:
    return jax.ShapeDtypeStruct(tuple(description["shape"]), jnp.dtype(description["dtype"]))


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, in their order, by their dotted paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def replicated(program: Program) -> NamedSharding:
    """The sharding of what is on every device of the program as a whole.

    Args:
      program: whose mesh has the devices.

    Returns:
      The sharding, for arrays of any shape.
    """
    return NamedSharding(program.mesh, PartitionSpec())
