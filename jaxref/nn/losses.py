"""One module for every loss of `jaxref.losses` that learns or remembers something."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array

KEPT = ("params", "state")
"""Names of the arguments of a loss that hold what it keeps."""


class Loss(nnx.Module):
    """A loss of `jaxref.losses` with its learned parameters and its state.

    A function with an argument `params` is given parameters that train like any model's. One with
    an argument `state` is given its state, and the one that it returns in training replaces it;
    `train()` and `eval()` of this or any enclosing module say which it is. Where a model has such a
    loss as an attribute, checkpoints, shardings and averages of the model hold what the loss keeps.

    Args:
      function: `loss(predictions, targets, ...)`, whose value is the losses or, with a state,
        `(losses, state)`. Hyperparameters are fixed with `functools.partial`.
      init: makes the parameters or the state. It is given those of `num_examples`, `num_classes`,
        `features` and `key` that it asks for. Default: that of `jaxref.losses` with the function's
        name, `_init` in place of `_loss`.
      num_examples: size of the training set.
      num_classes: number of classes.
      features: size of the hidden states, for a loss that reads these.
      rngs: for an `init` that asks for a key; it takes one of `rngs.params`.

    Attributes:
      params: a list of `nnx.Param`s, empty for a loss that learns nothing.
      state: a list of `nnx.BatchStat`s, empty for a loss that remembers nothing.
      link: `link(predictions, params or state) -> log-probabilities`, the function of
        `jaxref.losses` that is named like the loss, with `_log_probabilities` in place of `_loss`,
        and those of the loss's hyperparameters that it takes; None without any.
      use_running_average: whether the state stays as it is (evaluation). Initially False.

    Raises:
      ValueError: a function that keeps nothing, or for which no `init` is known, or an `init` that
        asks for what was not given.
      What the function raises when called.

    Use it to train with a loss of `jaxref.losses` that has an argument `params` or `state`, so that
    either is a part of the model; any other loss is called as the function that it is.

    Cost: that of `function`, and the parameters or state that its `init` makes, for some losses a
    row for each example or class.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxref.losses import adaptive_ldr_loss
      >>> loss = Loss(adaptive_ldr_loss, num_examples=3)
      >>> values = loss(jnp.zeros((2, 4)), jnp.array([0, 1]), indices=jnp.array([2, 0]))
      >>> values.shape, loss.kept("state").temperatures.shape
      ((2,), (3,))
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        init: Callable[..., Any] | None = None,
        num_examples: int | None = None,
        num_classes: int | None = None,
        features: int | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        asked = inspect.signature(function).parameters
        self.function = function
        self.use_running_average = False
        self._targets = tuple(name for name in asked if name not in KEPT)[:2]
        kinds = [name for name in KEPT if name in asked]
        if not kinds:
            raise ValueError(
                f"function must have an argument {' or '.join(KEPT)}, got one of "
                f"{', '.join(asked)}; call it without a module"
            )
        (self._kind,) = kinds
        given: dict[str, Any] = {
            "num_examples": num_examples,
            "num_classes": num_classes,
            "features": features,
        }
        if rngs is not None:
            given["key"] = rngs.params()
        made = _initial(function, init, given)
        leaves, self._structure = jax.tree.flatten(made)
        kind = nnx.Param if self._kind == "params" else nnx.BatchStat
        variables = [kind(leaf, axes=(None,) * leaf.ndim) for leaf in leaves]
        self.params = nnx.List(variables if self._kind == "params" else [])
        self.state = nnx.List(variables if self._kind == "state" else [])

    def __call__(self, predictions: Array, targets: Array, **keywords: Any) -> Array:
        """The losses of predictions and targets; `keywords` are the function's other arguments."""
        arguments = dict(zip(self._targets, (predictions, targets)))
        arguments[self._kind] = self.kept(self._kind)
        result = self.function(**arguments, **keywords)
        if self._kind == "params":
            return result
        losses, state = result
        if not self.use_running_average:
            for variable, value in zip(self.state, jax.tree.leaves(state)):
                variable[...] = value
        return losses

    @property
    def link(self) -> Callable[..., Array] | None:
        link = _relative(self.function, "_log_probabilities")
        if link is None or not isinstance(self.function, partial):
            return link
        asked = inspect.signature(link).parameters
        return partial(link, **{k: v for k, v in self.function.keywords.items() if k in asked})

    def log_probabilities(self, predictions: Array) -> Array:
        """What the predictions mean, by the link of the loss."""
        if self.link is None:
            raise ValueError("the loss has no link: its predictions are logits, or scores")
        return self.link(predictions, self.kept(self._kind))

    def kept(self, kind: str) -> Any:
        """What the function is given as its argument `params` or `state`."""
        variables = self.params if kind == "params" else self.state
        return jax.tree.unflatten(self._structure, [variable[...] for variable in variables])


class OutputOfLoss(nnx.Module):
    """The output layer that a loss keeps and trains, in the place of a model's own.

    Args:
      loss: a `Loss` that reads hidden states and has a link.

    Raises:
      ValueError: a loss without a link.

    Use it with `factored_output_loss`, so that evaluation and sampling read what the loss trains.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxref.losses import factored_output_loss
      >>> loss = Loss(factored_output_loss, num_classes=5, features=3, rngs=nnx.Rngs(0))
      >>> OutputOfLoss(loss)(jnp.ones((2, 3))).shape
      (2, 5)
    """

    def __init__(self, loss: Loss):
        if loss.link is None:
            raise ValueError("loss must have a link to log-probabilities, got one without")
        self.loss = loss

    def __call__(self, hidden: Array) -> Array:
        """Log-probabilities `[..., classes]` of states `[..., features]`."""
        return self.loss.log_probabilities(hidden)


def keeps_something(function: Callable[..., Any]) -> bool:
    """Whether a loss has parameters or a state, and so has to be a module to train.

    >>> from jaxref.losses import adaptive_ldr_loss, squentropy
    >>> keeps_something(adaptive_ldr_loss), keeps_something(squentropy)
    (True, False)
    """
    return any(name in inspect.signature(function).parameters for name in KEPT)


def _initial(
    function: Callable[..., Any], init: Callable[..., Any] | None, given: dict[str, Any]
) -> Any:
    name = _unbound(function).__name__
    init = init or _relative(function, "_init")
    if init is None:
        raise ValueError(f"init must be given for {name}, for which jaxref.losses has none")
    asked = inspect.signature(init).parameters
    for argument, parameter in asked.items():
        if parameter.default is parameter.empty and given.get(argument) is None:
            needed = "rngs" if argument == "key" else argument
            raise ValueError(f"{needed} must be given for {name}, got None")
    known = {argument: given.get(argument) for argument in asked}
    return init(**{argument: value for argument, value in known.items() if value is not None})


def _relative(function: Callable[..., Any], suffix: str) -> Callable[..., Any] | None:
    """The function of `jaxref.losses` named like a loss, but for the end of its name."""
    from jaxref import losses

    return getattr(losses, _unbound(function).__name__.removesuffix("_loss") + suffix, None)


def _unbound(function: Callable[..., Any]) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function
