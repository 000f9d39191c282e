"""The time-series transformer: classifies light curves, and other series resampled to a grid."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.attention import sinusoidal_position_embedding
from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.models.vision import dropout, logits_dtype, split_keys
from jaxref.nn import MLP, Linear, MultiHeadAttention, Norm
from jaxref.norms import layer_norm
from jaxref.parallel import constrain


def class_activation_map(
    tokens: ArrayLike,
    classifier_kernel: ArrayLike,
    class_index: ArrayLike,
    *,
    normalize: bool = False,
) -> Array:
    r"""How much each step of a series speaks for a class.

        M(l) = Σ_k W[k, c] x_l[k]

    for a classifier that takes the mean of the tokens x over the steps l and then W: the mean of M
    over the steps, and the bias of c, is the logit of c.

    Args:
      tokens: x `[..., length, features]` floating point: what the mean is taken of.
      classifier_kernel: W `[features, classes]`.
      class_index: c, an integer for all or `[...]` for each example; no class gives NaN.
      normalize: whether to bring the least of a series to 0 and the greatest to 1, as the paper's
        figures do; a map that is all the same becomes 0. Default False.

    Returns:
      `[..., length]` in the type of `tokens`.

    Raises:
      ValueError: shapes that do not match.
      TypeError: tokens or kernel not floating point, or an index not integer.

    Use it to see which observations a decision rests on, with
    `TimeSeriesTransformer.tokens(...)` and `model.head.kernel[...]`.

    Cost: length · features multiplications a series; no gradient, no further call of the model.

    Example:
      >>> tokens, kernel = jnp.array([[1.0, 0.0], [2.0, 1.0]]), jnp.array([[1.0, 0.0], [3.0, 1.0]])
      >>> print(class_activation_map(tokens, kernel, 0))
      [1. 5.]

    Reference: Allam, McEwen, "Paying Attention to Astronomical Transients: Introducing the
    Time-series Transformer for Photometric Classification", 2021, arXiv:2105.06178, after Zhou,
    Khosla, Lapedriza, Oliva, Torralba, "Learning Deep Features for Discriminative Localization",
    2015, arXiv:1512.04150.
    """
    check_floating(tokens=tokens, classifier_kernel=classifier_kernel)
    x, kernel, index = (jnp.asarray(a) for a in (tokens, classifier_kernel, class_index))
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"class_index must be integers, got {index.dtype.name}")
    if x.ndim < 2 or kernel.ndim != 2:
        raise ValueError(
            "tokens must have shape [..., length, features] and classifier_kernel [features, "
            f"classes], got {x.shape} and {kernel.shape}"
        )
    check_shape((x.shape[-1], kernel.shape[1]), classifier_kernel=kernel)
    if index.ndim:
        check_shape(x.shape[:-2], class_index=index)
    dtype = compute_dtype(x, kernel)
    column = kernel.T.astype(dtype).at[index].get(mode="fill", wrap_negative_indices=False)
    activation = jnp.einsum("...lk,...k->...l", x.astype(dtype), column)
    if normalize:
        least = jnp.min(activation, axis=-1, keepdims=True)
        span = jnp.max(activation, axis=-1, keepdims=True) - least
        activation = (activation - least) / jnp.where(span == 0, 1.0, span)
    return activation.astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeSeriesTransformerConfig:
    """What a `TimeSeriesTransformer` is made of; `build` makes it. The defaults are the paper's.

    Attributes:
      num_classes: number of classes.
      channels: numbers per step, such as the fluxes in six passbands.
      features, num_heads, mlp_features, num_layers: width, heads, hidden units, depth.
      auxiliary_features: numbers per series besides, such as the redshift and its error. Default 0.
      add_auxiliary_to: "channels" (the paper's M), where every step has them; or "time" (its L),
        where each is a step at the end, the same in all channels.
      dropout: rate in [0, 1), where a key is given: on what attention and MLP give, and on the
        mean.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1, a rate out of range, heads that do not divide the features, or an
        unknown `add_auxiliary_to`.

    Use `add_auxiliary_to="channels"` where every step is to be read in the light of the auxiliary
    numbers, "time" to see in `class_activation_map` how much they speak for a class.

    Cost: at the defaults for 14 classes and 6 channels 13 thousand parameters and 1.9 million
    multiplications a series of 100 steps.

    Example:
      >>> config = TimeSeriesTransformerConfig(num_classes=14, channels=6)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      13390

    Reference: Allam, McEwen, "Paying Attention to Astronomical Transients: Introducing the Time-
    series Transformer for Photometric Classification", 2021, arXiv:2105.06178.
    """

    num_classes: int
    channels: int
    features: int = 32
    num_heads: int = 16
    mlp_features: int = 128
    num_layers: int = 1
    auxiliary_features: int = 0
    add_auxiliary_to: Literal["channels", "time"] = "channels"
    dropout: float = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "TimeSeriesTransformer":
        """The model of this configuration."""
        return TimeSeriesTransformer(self, rngs=rngs)

    def __post_init__(self):
        sizes = ("num_classes", "channels", "features", "num_heads", "mlp_features", "num_layers")
        for name in sizes:
            check_interval(1, jnp.inf, **{name: getattr(self, name)})
        check_interval(0, jnp.inf, auxiliary_features=self.auxiliary_features)
        check_interval(0, 1, closed="left", dropout=self.dropout)
        if self.features % self.num_heads:
            raise ValueError(
                f"num_heads must divide features = {self.features}, got {self.num_heads}"
            )
        if self.add_auxiliary_to not in ("channels", "time"):
            raise ValueError(
                f"add_auxiliary_to must be 'channels' or 'time', got {self.add_auxiliary_to!r}"
            )


class TimeSeriesTransformer(nnx.Module):
    """A classifier of series: embed each step, add positions, post-norm blocks, mean, logits.

        x ← relu(x W + b) + positions
        x ← norm(x + drop(attention(x))),   x ← norm(x + drop(mlp(x)))      in each block
        logits = head(drop(mean over steps of x))

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: when called, inputs of another shape, or auxiliary numbers that the configuration
        does not have.

    Use it for light curves and other series of several channels, of any number of steps; `NBEATS`
    and `CARD` forecast. `class_activation_map` shows what a decision rests on.

    Cost: num_layers · (4 · features² + 2 · features · mlp_features) parameters, as many
    multiplications a step, and attention over all pairs of steps.

    The series are to be resampled to regular steps beforehand (in the paper 100, by a Gaussian
    process over time and wavelength). The paper reports `jaxref.losses.weighted_log_loss`.

    Example:
      >>> config = TimeSeriesTransformerConfig(num_classes=14, channels=6, auxiliary_features=2)
      >>> light_curves, redshifts = jnp.ones((2, 100, 6)), jnp.ones((2, 2))
      >>> run = lambda: config.build(rngs=nnx.Rngs(0))(light_curves, redshifts)
      >>> nnx.eval_shape(run).shape
      (2, 14)

    Reference: Allam, McEwen, "Paying Attention to Astronomical Transients: Introducing the
    Time-series Transformer for Photometric Classification", 2021, arXiv:2105.06178.
    """

    Config = TimeSeriesTransformerConfig

    def __init__(self, config: TimeSeriesTransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        inputs = config.channels
        if config.add_auxiliary_to == "channels":
            inputs += config.auxiliary_features
        types: dict[str, Any] = {
            "use_bias": True,
            "kernel_init": jax.nn.initializers.xavier_uniform(),
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        self.embed = Linear(
            inputs, config.features, axes=(None, "embed"), dtype=config.dtype, **types
        )
        self.blocks = nnx.List(_Block(config, rngs) for _ in range(config.num_layers))
        self.head = Linear(
            config.features,
            config.num_classes,
            axes=("embed", None),
            dtype=logits_dtype(config),
            **types,
        )

    def __call__(
        self, inputs: ArrayLike, auxiliary: ArrayLike | None = None, *, key: Array | None = None
    ) -> Array:
        """Logits `[batch, num_classes]`, in at least float32.

        Args:
          inputs: floating point `[batch, length, channels]`.
          auxiliary: floating point `[batch, auxiliary_features]`, where there are some.
          key: random key for dropout; None (evaluation) drops nothing.

        Raises:
          ValueError: arrays of another shape.
          TypeError: arrays that are not floating point.
        """
        first, last = split_keys(key, 2)
        tokens = self.tokens(inputs, auxiliary, key=first).astype(self.head.dtype)
        return self.head(dropout(tokens.mean(axis=1), self.config.dropout, last))

    def tokens(
        self, inputs: ArrayLike, auxiliary: ArrayLike | None = None, *, key: Array | None = None
    ) -> Array:
        """The last block's tokens `[batch, steps, features]`, for `class_activation_map`.

        The steps are those of the inputs and, with `add_auxiliary_to="time"`, the auxiliary ones.
        """
        x = self._with_auxiliary(inputs, auxiliary)
        x = jax.nn.relu(self.embed(x))
        positions = sinusoidal_position_embedding(x.shape[1], self.config.features)
        x = x + positions.astype(x.dtype)
        for block, block_key in zip(self.blocks, split_keys(key, len(self.blocks))):
            x = block(x, block_key)
        return x

    def _with_auxiliary(self, inputs: ArrayLike, auxiliary: ArrayLike | None) -> Array:
        """The inputs and the auxiliary numbers as one series."""
        config = self.config
        check_floating(inputs=inputs)
        x = jnp.asarray(inputs)
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != config.channels:
            raise ValueError(
                f"inputs must have shape [batch, length, {config.channels}], got {x.shape}"
            )
        if (auxiliary is None) != (config.auxiliary_features == 0):
            given = "none" if auxiliary is None else "some"
            raise ValueError(
                f"auxiliary must hold {config.auxiliary_features} numbers per series, got {given}"
            )
        if auxiliary is None:
            return x
        check_floating(auxiliary=auxiliary)
        check_shape((len(x), config.auxiliary_features), auxiliary=auxiliary)
        z = jnp.asarray(auxiliary).astype(x.dtype)
        if config.add_auxiliary_to == "channels":
            z = jnp.broadcast_to(z[:, None], (*x.shape[:2], z.shape[1]))
            return jnp.concatenate([x, z], axis=2)
        z = jnp.broadcast_to(z[:, :, None], (*z.shape, x.shape[2]))
        return jnp.concatenate([x, z], axis=1)


class _Block(nnx.Module):
    """Attention and MLP with the norms after them."""

    def __init__(self, config: TimeSeriesTransformerConfig, rngs: nnx.Rngs):
        features = config.features
        types: dict[str, Any] = {
            "use_bias": True,
            "kernel_init": jax.nn.initializers.xavier_uniform(),
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        self.attention = MultiHeadAttention(features, config.num_heads, **types)
        self.mlp = MLP(features, config.mlp_features, activation=jax.nn.relu, **types)
        self.attention_norm, self.mlp_norm = (
            Norm(layer_norm, features, axes=("embed",), param_dtype=config.param_dtype)
            for _ in range(2)
        )
        self.rate = config.dropout

    def __call__(self, x: Array, key: Array | None) -> Array:
        """`x [batch, length, features]` after the block."""
        keys = split_keys(key, 2)
        x = self.attention_norm(x + dropout(self.attention(x), self.rate, keys[0]))
        x = self.mlp_norm(x + dropout(self.mlp(x), self.rate, keys[1]))
        return constrain(x, "batch", None, None)
