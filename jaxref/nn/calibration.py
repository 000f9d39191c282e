"""What the linear layers of a model are given, gathered while the model runs: calibration."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxref.core.checks import check_interval
from jaxref.nn.linear import _as_rows, _as_tuple
from jaxref.nn.quantized_linear import Select, dotted, linear_layers, replace_modules
from jaxref.quantization import HessianState, hessian_init, hessian_update

Call = Callable[[Any, Any], Any]
Update = Callable[[Any, Array], Any]


class Gathered(nnx.Variable):
    """What a layer was given so far. Models have it while they are calibrated, and not after."""


def collect_hessians(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    select: Select | None = None,
) -> dict[str, HessianState]:
    """The second moments of what each linear layer of a model is given, over batches.

        sum += Σ x xᵀ,   count += the number of x

    by `jaxref.quantization.hessian_update`. Nothing else is kept.

    Args:
      model: any module with `Linear`s (subclasses too) or `flax.nnx.Linear`s. It is called in
        evaluation, and stays as it is.
      batches: pytrees of arrays of the same shapes, for which one program is compiled. Wrap them
        in `tqdm` to see the progress.
      call: `call(model, batch)`, runs the model. Default: `model(batch)`.
      select: `select(path, layer)`, whether to look at a layer. Default: all.

    Returns:
      By the dotted path of each layer ("blocks.0.mlp.function.up") its `HessianState`, for
      `jaxref.quantization.hessian`. The count is 0 for a layer that is never called, such as an
      output matrix that is read by a loss. Layers that are scanned, with their kernels along a
      leading axis, have states with that axis.

    Raises:
      ValueError: no layer is selected.

    Use it before `gptq_quantize` and its relatives; `collect_inputs` for methods that learn from
    examples.

    Cost: a forward pass of each batch, with inputs² multiplications more a token and layer; one
    matrix `[inputs, inputs]` of memory a layer, however many batches.

    Example:
      >>> from jaxref.nn import MLP
      >>> mlp = MLP(4, 16, rngs=nnx.Rngs(0))
      >>> states = collect_hessians(mlp, [jnp.ones((3, 4)), 2 * jnp.ones((3, 4))])
      >>> states["down"].sum.shape, states["up"].sum[0, 0].item(), states["up"].count.item()
      ((16, 16), 15.0, 6)

    Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, arXiv:2210.17323.
    """
    return _gather(model, batches, hessian_update, hessian_init, call, select)


def collect_inputs(
    model: nnx.Module,
    batches: Iterable[Any],
    rows: int,
    *,
    call: Call | None = None,
    select: Select | None = None,
) -> dict[str, Array]:
    """The first vectors that each linear layer of a model is given.

    Args:
      model, batches, call, select: as for `collect_hessians`. Batches are taken until every layer
        has its rows.
      rows: at least 1, how many vectors to keep for each layer.

    Returns:
      By path `[rows, inputs]` in float32, or as many rows as there were.

    Raises:
      ValueError: no layer is selected, or `rows` out of range.

    Use it before `adaptive_rounding` and others that learn from examples. Rows of the same number
    are of the same token, for layers that are called once.

    Cost: forward passes of as many batches as it takes; `rows` vectors of inputs float32 numbers a
    layer.

    Example:
      >>> from jaxref.nn import MLP
      >>> mlp = MLP(4, 16, rngs=nnx.Rngs(0))
      >>> inputs = collect_inputs(mlp, [jnp.ones((3, 4)), 2 * jnp.ones((3, 4))], 5)
      >>> print(inputs["up"][:, 0], inputs["down"].shape)
      [1. 1. 1. 2. 2.] (5, 16)

    Reference: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    arXiv:2004.10568.
    """
    check_interval(1, jnp.inf, rows=rows)

    def keep(state: tuple[Array, Array], x: Array) -> tuple[Array, Array]:
        kept, count = state
        places = count + jnp.arange(len(x))
        kept = kept.at[places].set(x.astype(kept.dtype), mode="drop")
        return kept, jnp.minimum(count + len(x), rows)

    def init(inputs: int) -> tuple[Array, Array]:
        return jnp.zeros((rows, inputs)), jnp.zeros((), jnp.int32)

    def is_full(states: dict[str, tuple[Array, Array]]) -> bool:
        return all(bool(jnp.all(count >= rows)) for _, count in states.values())

    gathered = _gather(model, batches, keep, init, call, select, until=is_full)
    return {path: kept[..., : int(count.max()), :] for path, (kept, count) in gathered.items()}


def called_linears(model: nnx.Module, batch: Any, *, call: Call | None = None) -> list[str]:
    """The dotted paths of the linear layers that a model calls, in the order of the calls.

    Nothing is computed. What is left out, compared with all of its linear layers, are those whose
    kernels something else reads: a loss, or a fused function.

    Args:
      model, call: as for `collect_hessians`.
      batch: a pytree of arrays, or of `jax.ShapeDtypeStruct`s.

    Returns:
      The paths, each at the place of its first call.

    Raises:
      What the model raises when called.

    Use it to quantize the layers of a model one after the other, each behind those that are done
    already; `collect_hessians` and `collect_inputs` run the model for what they are given.

    Cost: one abstract trace of the model; no array is computed.

    Example:
      >>> from jaxref.nn import MLP
      >>> called_linears(MLP(4, 16, gated=True, rngs=nnx.Rngs(0)), jnp.ones((3, 4)))
      ['gate', 'up', 'down']
    """
    order: dict[str, None] = {}

    def note(path: str) -> Update:
        return lambda state, x: order.setdefault(path) or state

    taps = {
        path: _Tap(layer, note(path), _start(layer, lambda _: jnp.zeros(())))
        for path, layer in linear_layers(model).items()
    }
    tapped = replace_modules(model, taps)
    tapped.eval()
    graphdef, state = nnx.split(tapped)
    jax.eval_shape(
        lambda state, batch: _call(call, nnx.merge(graphdef, state), batch), state, batch
    )
    return list(order)


class _Tap(nnx.Module):
    """A linear layer that gathers what it is given; in all else the layer itself."""

    def __init__(self, layer: Any, update: Update, state: Any):
        self.layer = layer
        self.update = update
        self.gathered = Gathered(state)

    def __call__(self, x: Array) -> Array:
        rows = _as_rows(x, _as_tuple(self.layer.in_features))
        self.gathered.set_value(self.update(self.gathered.get_value(), rows))
        return self.layer(x)

    def __getattr__(self, name: str) -> Any:
        if name == "layer" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.layer, name)


def _call(call: Call | None, model: Any, batch: Any) -> Any:
    return model(batch) if call is None else call(model, batch)


def _gather(
    model: nnx.Module,
    batches: Iterable[Any],
    update: Update,
    init: Callable[[int], Any],
    call: Call | None,
    select: Select | None,
    until: Callable[[dict[str, Any]], bool] | None = None,
) -> dict[str, Any]:
    """The state of every selected layer after all batches, or those before `until` is true."""
    layers = {
        path: layer
        for path, layer in linear_layers(model).items()
        if select is None or select(path, layer)
    }
    if not layers:
        raise ValueError("select must admit a linear layer of the model, got none")
    taps = {path: _Tap(layer, update, _start(layer, init)) for path, layer in layers.items()}
    tapped = replace_modules(model, taps)
    tapped.eval()
    parts: Any = nnx.split(tapped, Gathered, ...)
    graphdef, gathered, rest = parts

    @partial(jax.jit, donate_argnums=0)
    def step(gathered: nnx.State, rest: nnx.State, batch: Any) -> nnx.State:
        merged: Any = nnx.merge(graphdef, gathered, rest)
        _call(call, merged, batch)
        return nnx.state(merged, Gathered)

    def states() -> dict[str, Any]:
        entries: Any = nnx.to_flat_state(gathered)
        flat = {dotted(path[:-1]): variable.get_value() for path, variable in entries}
        return {path: flat[path] for path in layers}

    for batch in batches:
        gathered = step(gathered, rest, batch)
        if until is not None and until(states()):
            break
    return states()


def _start(layer: Any, init: Callable[[int], Any]) -> Any:
    """The state of a layer before any input; of scanned layers, one for each along their axis."""
    in_features, out_features = _as_tuple(layer.in_features), _as_tuple(layer.out_features)
    stacked = layer.kernel.shape[: layer.kernel.ndim - len(in_features) - len(out_features)]
    return jax.tree.map(
        lambda x: jnp.zeros(stacked + x.shape, x.dtype), init(math.prod(in_features))
    )
