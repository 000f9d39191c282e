"""One module for every norm of `jaxref.norms`, with or without statistics."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.nn.variables import GradientState


class Norm(nnx.Module):
    """A norm of `jaxref.norms` with its learned parameters and its statistics.

    The parameters are those that the function's signature asks for, all of shape `[features]`:
    names that end in `scale`, and EvoNorm's `v`, are initially 1; names that end in `bias`, 0. A
    function with an argument `state` is given its running statistics, and those that it returns in
    training replace them; `train()` and `eval()` of this or any enclosing module say which it is.

    Args:
      function: `norm(x, scale=None, bias=None, ...)`, or `norm(x, state, scale=None, bias=None, *,
        training, ...) -> (y, state)`, over the last axis. Further arguments are fixed with
        `functools.partial`, as are parameters not to learn: `partial(layer_norm, bias=None)`.
      features: size of the last axis.
      axes: logical name of that axis, for the rules of `jaxref.parallel`.
      init: `init(features) -> state`, a NamedTuple of arrays. Default: that of `jaxref.norms` with
        the function's name and `_init`.
      param_dtype: type of the parameters. Statistics are float32.

    Attributes:
      scale, bias, ...: the parameters, None where there is none.
      state: by field, `nnx.BatchStat`s, and `GradientState`s for what the backward pass advances;
        None for a norm without statistics.
      use_running_average: whether statistics are used as they are (evaluation). Initially False.

    Raises:
      ValueError: no `init` is known for a function with a state.
      What the function raises when called.

    Use it for every norm over the last axis of a model, chosen by its function. `AlphaBatchNorm`
    and `UnMixNorm` take its place at test time; `RegionNormBasic` and `RegionNormLearnable` are for
    the regions of an image.

    Cost: that of the norm, features numbers for each parameter of its signature, and its
    statistics, which every call in training replaces.

    Example:
      >>> from jaxref.norms import rms_norm
      >>> norm = Norm(rms_norm, 4)
      >>> norm.bias is None, norm(jnp.ones((2, 4))).shape
      (True, (2, 4))
    """

    scale: Any
    bias: Any

    def __init__(
        self,
        function: Callable[..., Any],
        features: int,
        *,
        axes: tuple[str | None] = (None,),
        init: Callable[[int], Any] | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        fixed = getattr(function, "keywords", {})  # of a functools.partial
        asked = inspect.signature(function).parameters
        self.function = function
        self._learned = tuple(name for name in asked if _is_learned(name) and name not in fixed)
        for name in {"scale": None, "bias": None} | dict.fromkeys(self._learned):
            initial = jnp.zeros if name.endswith("bias") else jnp.ones
            learned = name in self._learned
            parameter = nnx.Param(initial(features, param_dtype), axes=axes) if learned else None
            setattr(self, name, parameter)
        self.use_running_average = False
        self._takes_where = "where" in asked
        self._state_type: Any = None
        self.state: Any = None
        if "state" in asked:
            state = (init or _known_init(function))(features)
            self._state_type = type(state)
            backward = getattr(state, "backward_fields", ())
            self.state = nnx.data(
                {
                    name: (GradientState if name in backward else nnx.BatchStat)(
                        value, axes=(None,) * jnp.ndim(value)
                    )
                    for name, value in state._asdict().items()
                }
            )

    def __call__(self, x: Array, *, where: Array | None = None) -> Array:
        """Normalises `[..., features]`.

        `where` is boolean, broadcastable to `x`: the entries that count in the statistics. A norm
        without statistics has no use for it.
        """
        arguments: dict[str, Any] = {name: getattr(self, name)[...] for name in self._learned}
        if self.state is None:
            return self.function(x, **arguments)
        if where is not None and self._takes_where:
            arguments["where"] = where
        training = not self.use_running_average
        y, state = self.function(x, self.running_state(), **arguments, training=training)
        if training:
            for name, variable in self.state.items():
                if not isinstance(variable, GradientState):
                    variable[...] = getattr(state, name)
        return y

    def running_state(self) -> Any:
        """The statistics as the NamedTuple that the function takes; None where it takes none."""
        if self.state is None:
            return None
        return self._state_type(**{name: value[...] for name, value in self.state.items()})


def _is_learned(name: str) -> bool:
    return name.endswith(("scale", "bias")) or name == "v"


def _known_init(function: Callable[..., Any]) -> Callable[[int], Any]:
    from jaxref import norms

    while isinstance(function, partial):
        function = function.func
    init = getattr(norms, f"{function.__name__}_init", None)
    if init is None:
        raise ValueError(f"init must be given for {function.__name__}, whose state is not known")
    return init
