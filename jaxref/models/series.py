"""What the models that forecast series share: checks of windows and configurations.

Every one is a `Config` with `context_length`, `horizon`, `channels`, `dtype` and `param_dtype`,
whose `build` makes a model that maps the window `[batch, context_length, channels]`, equally spaced
in time and the newest step last, to the forecast `[batch, horizon, channels]`.
"""

from typing import Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval


class SeriesConfig(Protocol):
    """What every forecaster's configuration has."""

    @property
    def context_length(self) -> int: ...

    @property
    def horizon(self) -> int: ...

    @property
    def channels(self) -> int | None: ...


def check_series_config(config: SeriesConfig, *, sizes: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a length, or a named field, below 1; no number of channels passes."""
    for name in ("context_length", "horizon", "channels", *sizes):
        if name != "channels" or config.channels is not None:
            check_interval(1, jnp.inf, **{name: getattr(config, name)})


def check_series(inputs: ArrayLike, config: SeriesConfig) -> Array:
    """The inputs as an array; raises unless they are floating point `[batch, length, channels]`."""
    check_floating(inputs=inputs)
    shape = jnp.shape(inputs)
    fits = len(shape) == 3 and shape[1] == config.context_length
    if not fits or config.channels not in (None, shape[2]):
        channels = "channels" if config.channels is None else config.channels
        raise ValueError(
            f"inputs must have shape [batch, {config.context_length}, {channels}], got {shape}"
        )
    return jnp.asarray(inputs)
