"""N-BEATS: forecasts by blocks that explain a window of the past, each what others have left."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval
from jaxref.losses import stack_alignment_loss
from jaxref.models.series import check_series, check_series_config
from jaxref.nn import AuxiliaryLoss, Linear
from jaxref.parallel import constrain

STACKS = ("generic", "trend", "seasonality")
"""The kinds of stacks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NBEATSConfig:
    """What an `NBEATS` is made of; `build` makes it. The defaults are the interpretable form.

    Attributes:
      context_length: steps of the window that is read.
      horizon: steps of the forecast.
      channels: number of series that are read side by side, each by itself; None takes any.
      stacks: the kind of each stack: "generic", "trend" or "seasonality". The generic form of the
        paper is three times "generic".
      num_blocks: blocks of each stack.
      share_weights: whether the blocks of a stack are one, applied again and again.
      num_layers: layers of a block that make its features.
      features: their width, one number for all stacks or one for each. The aligned model of the
        paper has (2048, 512, 512).
      degree: of the trend's polynomials.
      harmonics: how finely the seasons' frequencies are spaced: in steps of 1 / harmonics periods
        a horizon.
      activation: of the layers.
      alignment: at least 0, the weight of `jaxref.losses.stack_alignment_loss` in training, with
        each channel a domain; in the paper 0.3 to 1. It trains the layers before the features
        alone. Default 0.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1, an unknown stack or none, or widths that are not one per stack.

    Use the defaults where trend and seasons are to be told apart, `stacks=("generic",) * 3` where
    they are not known; `share_weights=False` has `num_blocks` times the parameters at the same
    work.

    Cost: 2.6 million parameters and 10.6 million multiplications a series at the defaults, for 120
    steps and a horizon of 24.

    Example:
      >>> config = NBEATSConfig(context_length=120, horizon=24)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      2647040

    Reference: Lee, Jeon, Kang, Park, "Feature-aligned N-BEATS with Sinkhorn divergence", 2023,
    arXiv:2305.15196; the model is of Oreshkin, Carpov, Chapados, Bengio, "N-BEATS: Neural basis
    expansion analysis for interpretable time series forecasting", 2019, arXiv:1905.10437.
    """

    context_length: int
    horizon: int
    channels: int | None = None
    stacks: tuple[str, ...] = ("trend", "seasonality", "seasonality")
    num_blocks: int = 4
    share_weights: bool = True
    num_layers: int = 4
    features: int | tuple[int, ...] = 512
    degree: int = 2
    harmonics: int = 2
    activation: Callable[[Array], Array] = jax.nn.relu
    alignment: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "NBEATS":
        """The model of this configuration."""
        return NBEATS(self, rngs=rngs)

    def widths(self) -> tuple[int, ...]:
        """The width of each stack's features."""
        if isinstance(self.features, int):
            return (self.features,) * len(self.stacks)
        return tuple(self.features)

    def __post_init__(self):
        check_series_config(self, sizes=("num_blocks", "num_layers", "features", "harmonics"))
        check_interval(0, jnp.inf, degree=self.degree, alignment=self.alignment)
        if not self.stacks or not set(self.stacks) <= set(STACKS):
            raise ValueError(f"stacks must be some of {STACKS}, got {self.stacks!r}")
        if len(self.widths()) != len(self.stacks):
            raise ValueError(
                f"features must be one number or one for each of {len(self.stacks)} stacks, got "
                f"{self.features!r}"
            )


class NBEATS(nnx.Module):
    r"""A forecaster that takes a window of a series apart, stack by stack and block by block.

    Each block maps what is left of the window to features h and these to coefficients θ, of a
    basis of the window and one of the horizon:

        h = MLP(r),   (θ_b, θ_f) = W h,   r ← r - θ_b V_b,   forecast ← forecast + θ_f V_f

    from r = the window, newest value first, and forecast = that value. The bases V are the identity
    ("generic"), powers (t / length)^i ("trend"), or cosines and sines 2π k t / horizon, those of
    the window running backwards ("seasonality"). What the blocks take away and what they leave add
    up to the window, and their forecasts to the forecast.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: when called, inputs of another shape.

    Attributes:
      alignment_loss: where `config.alignment` is above 0, an `AuxiliaryLoss`, what the newest call
        in training owes.
      deterministic: whether this is evaluation. Initially False.

    Use it on single series, and with `config.alignment`, or `forecast_with_features` and
    `jaxref.losses.stack_alignment_loss`, where it is to forecast in domains that it has not seen;
    `CARD` reads several channels together.

    Cost: about features · (context_length + (num_layers - 1) · features) parameters a block, shared
    ones once, and as many multiplications a series for each block.

    Every channel is a series by itself, with the same parameters. Standardise series of different
    scales beforehand.

    Example:
      >>> config = NBEATSConfig(context_length=20, horizon=4)
      >>> inputs = jnp.ones((2, 20, 3))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(inputs)).shape
      (2, 4, 3)

    Reference: Lee, Jeon, Kang, Park, "Feature-aligned N-BEATS with Sinkhorn divergence", 2023,
    arXiv:2305.15196; the model is of Oreshkin, Carpov, Chapados, Bengio, "N-BEATS: Neural basis
    expansion analysis for interpretable time series forecasting", 2019, arXiv:1905.10437.
    """

    Config = NBEATSConfig

    def __init__(self, config: NBEATSConfig, *, rngs: nnx.Rngs):
        self.config = config
        count = 1 if config.share_weights else config.num_blocks
        self.stacks = nnx.List(
            nnx.List(_Block(config, kind, width, rngs) for _ in range(count))
            for kind, width in zip(config.stacks, config.widths())
        )
        if config.alignment > 0:
            self.alignment_loss = AuxiliaryLoss(jnp.zeros((), jnp.float32), axes=())
        self.deterministic = False

    def __call__(self, inputs: ArrayLike, *, key: Array | None = None) -> Array:
        """The forecast `[batch, horizon, channels]`, in at least float32.

        Args:
          inputs: floating point `[batch, context_length, channels]`, the newest step last.
          key: for the training program's sake; nothing is random.

        Raises:
          ValueError: inputs of another shape.
          TypeError: inputs that are not floating point.
        """
        del key
        parts = self.decompose(inputs)
        if self.config.alignment > 0 and not self.deterministic:
            self.alignment_loss[...] = self.config.alignment * self._distance_of_channels(parts)
        return parts["level"] + sum(parts["forecasts"])

    def forecast_with_features(self, inputs: ArrayLike) -> tuple[Array, tuple[Array, ...]]:
        """The forecast and, of each stack, the features of its last block.

        Features are `[batch, channels, width]`, for `stack_alignment_loss`. In the paper that loss
        trains the layers before the features alone, whose parameters are those below `layers`
        (`nnx.PathContains("layers")`), and the loss of the forecast everything.
        """
        parts = self.decompose(inputs)
        features = tuple(parts["features"][self._last_blocks()])
        return parts["level"] + sum(parts["forecasts"]), features

    def decompose(self, inputs: ArrayLike) -> dict[str, Any]:
        """What the forecast is made of.

        Returns:
          A dictionary: `level` `[batch, 1, channels]`, the window's last value; by block,
          `forecasts` `[batch, horizon, channels]`, `backcasts` `[batch, context_length, channels]`
          (the newest step last, as in the inputs), `features` `[batch, channels, width]` and what
          the block was given as `residuals` `[batch, channels, context_length]`, which run
          backwards; and what the blocks leave of the window as `residual`.
        """
        inputs = check_series(inputs, self.config)
        level = inputs[:, -1:].astype(self._dtype())
        residual = jnp.swapaxes(inputs[:, ::-1], 1, 2).astype(self._dtype())
        parts: dict[str, Any] = {"level": level}
        parts |= {name: [] for name in ("forecasts", "backcasts", "features", "residuals")}
        for stack in self.stacks:
            for i in range(self.config.num_blocks):
                parts["residuals"].append(residual)
                backcast, forecast, features = stack[i % len(stack)](residual)
                residual = constrain(residual - backcast, "batch", None, None)
                parts["backcasts"].append(jnp.swapaxes(backcast, 1, 2)[:, ::-1])
                parts["forecasts"].append(jnp.swapaxes(forecast, 1, 2))
                parts["features"].append(features)
        return parts | {"residual": jnp.swapaxes(residual, 1, 2)[:, ::-1]}

    def _last_blocks(self) -> slice:
        """Which of all blocks are the last of their stacks."""
        return slice(self.config.num_blocks - 1, None, self.config.num_blocks)

    def _distance_of_channels(self, parts: dict[str, Any]) -> Array:
        """How far the channels' features are apart, as a function of their layers alone."""
        features = [
            jnp.swapaxes(stack[-1].features(jax.lax.stop_gradient(residual)), 0, 1)
            for stack, residual in zip(self.stacks, parts["residuals"][self._last_blocks()])
        ]
        channels = len(features[0])
        distance = stack_alignment_loss(features, np.arange(channels), num_domains=channels)
        return distance.astype(jnp.float32)

    def _dtype(self) -> DTypeLike:
        """The type of residuals and forecasts, which are sums of many terms."""
        return jnp.promote_types(self.config.param_dtype, jnp.float32)


class _Block(nnx.Module):
    """What a block explains of a window and forecasts from it, and its features."""

    def __init__(self, config: NBEATSConfig, kind: str, width: int, rngs: nnx.Rngs):
        types: dict[str, Any] = {
            "kernel_init": jax.nn.initializers.he_uniform(),
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        inputs = [config.context_length] + [width] * (config.num_layers - 1)
        self.layers = nnx.List(
            Linear(size, width, axes=(None, "mlp"), use_bias=True, **types) for size in inputs
        )
        self.config, self.kind = config, kind
        types["kernel_init"] = jax.nn.initializers.lecun_normal()
        count = sum(_coefficients(config, kind))
        self.coefficients = Linear(width, count, axes=("mlp", None), **types)

    def __call__(self, residual: Array) -> tuple[Array, Array, Array]:
        """`[..., context_length]`, `[..., horizon]` and `[..., width]` of `[..., context_length]`,
        which runs backwards."""
        features = self.features(residual)
        theta = self.coefficients(features).astype(residual.dtype)
        parts = jnp.split(theta, _coefficients(self.config, self.kind)[:1], axis=-1)
        backcast, forecast = (
            part if basis is None else part @ basis.astype(part.dtype)
            for part, basis in zip(parts, _bases(self.config, self.kind))
        )
        return backcast, forecast, features

    def features(self, residual: Array) -> Array:
        """`[..., width]` of `[..., context_length]`, which runs backwards."""
        features = residual
        for layer in self.layers:
            features = self.config.activation(layer(features))
        return features


def _coefficients(config: NBEATSConfig, kind: str) -> list[int]:
    """How many coefficients the window takes, and how many the horizon."""
    lengths = config.context_length, config.horizon
    return [n if v is None else len(v) for n, v in zip(lengths, _bases(config, kind))]


def _bases(config: NBEATSConfig, kind: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """V_b and V_f `[coefficients, length]`; None stands for the identity."""
    if kind == "generic":
        return None, None
    lengths = config.context_length, config.horizon
    if kind == "trend":
        powers = np.arange(config.degree + 1)[:, None]
        back, ahead = ((np.arange(n) / n) ** powers for n in lengths)
        return back, ahead
    steps = np.arange(config.harmonics, config.harmonics / 2 * config.horizon)
    frequencies = np.concatenate([[0], steps / config.harmonics])[:, None]
    angles = [
        sign * 2 * np.pi * frequencies * np.arange(n) / config.horizon
        for sign, n in zip((-1, 1), lengths)
    ]
    back, ahead = (np.concatenate([np.cos(angle), np.sin(angle)]) for angle in angles)
    return back, ahead
