"""CARD: a transformer that forecasts several series together, attending over channels and time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.attention import attention_probabilities
from jaxref.core.checks import canonical_axes, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import safe_sqrt
from jaxref.models.series import check_series, check_series_config
from jaxref.models.vision import dropout, split_keys
from jaxref.models.vit import token_parameter
from jaxref.nn import MLP, Linear, Norm
from jaxref.norms import batch_norm
from jaxref.parallel import constrain


def exponential_moving_average(x: ArrayLike, *, alpha: float = 0.5, axis: int) -> Array:
    r"""A series smoothed by an average that forgets.

        s_1 = x_1,   s_i = α x_i + (1 - α) s_{i-1},   α = alpha

    by one product with the lower triangular matrix of its weights, whose rows have the sum 1.

    Args:
      x: `[...]` floating point.
      alpha: α in (0, 1]; 1 leaves x as it is. Default 1/2.
      axis: the axis to go along.

    Returns:
      s of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: an `alpha` or `axis` out of range.
      TypeError: `x` is not floating point.

    Use it on queries and keys, so that attention compares neighbourhoods and not single noisy
    steps; along hundreds of steps, not millions.

    Cost: a product with a matrix of length² weights: length² multiplications for each series.

    Example:
      >>> print(exponential_moving_average(jnp.array([0.0, 8.0, 8.0]), axis=0))
      [0. 4. 6.]

    Reference: Wang, Zhou, Wen, Gao, Ding, Jin, "CARD: Channel Aligned Robust Blend Transformer for
    Time Series Forecasting", 2023, arXiv:2305.12095.
    """
    check_floating(x=x)
    check_interval(0, 1, closed="right", alpha=alpha)
    x = jnp.asarray(x)
    (axis,) = canonical_axes(axis, x.ndim)
    i, j = np.indices((x.shape[axis],) * 2)
    ages = np.maximum(i - j, 0.0)
    weights = (j <= i) * (1 - alpha) ** ages * ((j == 0) + (j > 0) * alpha)
    matrix = jnp.asarray(weights, compute_dtype(x))
    series = jnp.moveaxis(x, axis, 0).astype(matrix.dtype)
    smoothed = jnp.tensordot(matrix, series, axes=1, precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(smoothed, 0, axis).astype(x.dtype)


def dynamic_projection(x: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None = None) -> Array:
    r"""A sequence made short by averages whose weights depend on it.

        y = Pᵀ x,   P = softmax_r(x W + b)

    with the softmax over the r new places: every token spreads a mass of 1 over them.

    Args:
      x: `[..., length, features]` floating point: the keys or the values of a head.
      kernel: W `[features, r]`.
      bias: b `[r]`. Default: 0.

    Returns:
      y `[..., r, features]` in the type of `x`, computed in at least float32.

    Raises:
      ValueError: shapes that do not match.
      TypeError: `x`, `kernel` or `bias` is not floating point.

    Use it on the keys and values of attention over many channels, where all pairs of channels are
    too many.

    Cost: 2 · length · r · features multiplications, and length · r weights in memory.

    Example:
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> print(dynamic_projection(x, jnp.zeros((2, 1))))
      [[4. 6.]]

    Reference: Wang, Zhou, Wen, Gao, Ding, Jin, "CARD: Channel Aligned Robust Blend Transformer for
    Time Series Forecasting", 2023, arXiv:2305.12095.
    """
    check_floating(x=x, kernel=kernel)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim < 2 or kernel.ndim != 2:
        raise ValueError(
            "x must have shape [..., length, features] and kernel [features, r], got "
            f"{x.shape} and {kernel.shape}"
        )
    check_shape((x.shape[-1], kernel.shape[1]), kernel=kernel)
    wide = x.astype(compute_dtype(x, kernel))
    logits = wide @ kernel.astype(wide.dtype)
    if bias is not None:
        check_floating(bias=bias)
        check_shape(kernel.shape[1:], bias=bias)
        logits += jnp.asarray(bias, wide.dtype)
    shares = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("...nr,...ne->...re", shares, wide).astype(x.dtype)


def token_blend(x: ArrayLike, *, merge_size: int = 2) -> Array:
    r"""Merges attention's heads so that neighbouring tokens come together in one.

    The tokens of all heads, one head after the other, are cut into as many runs as there are
    tokens: the run of group g = 0 ... heads / m - 1 and number t holds m entries of that group,

        y_t = concat over i, g of the entry m t + i of group g,   i = 0 ... m - 1,   m = merge_size

    so that the first tokens come from the first head of each group, the last from its last, and
    each covers m times the time. All entries stay; only their places change.

    Args:
      x: `[..., length, heads, head_dim]`.
      merge_size: m at least 1, a divisor of the heads; 1 merges heads as usual. Default 2.

    Returns:
      `[..., length, heads * head_dim]` in the type of `x`.

    Raises:
      ValueError: a `merge_size` that does not divide the heads, or fewer than three axes.

    Use it before a feed-forward layer, in place of the usual merge, to see series at two
    resolutions.

    Cost: none but a transposition: entries change places.

    Example:
      >>> x = jnp.arange(6).reshape(3, 2, 1)  # three tokens, two heads
      >>> print(token_blend(x).tolist())
      [[0, 2], [4, 1], [3, 5]]

    Reference: Wang, Zhou, Wen, Gao, Ding, Jin, "CARD: Channel Aligned Robust Blend Transformer for
    Time Series Forecasting", 2023, arXiv:2305.12095.
    """
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"x must have shape [..., length, heads, head_dim], got {x.shape}")
    *leading, length, heads, head_dim = x.shape
    check_merge(heads, merge_size)
    by_head = jnp.swapaxes(x, -3, -2)
    runs = by_head.reshape(*leading, heads // merge_size, length, merge_size, head_dim)
    return jnp.moveaxis(runs, -4, -2).reshape(*leading, length, heads * head_dim)


def check_merge(num_heads: int, merge_size: int) -> None:
    """Raises ValueError unless heads can be merged in groups of `merge_size`."""
    check_interval(1, jnp.inf, merge_size=merge_size)
    if num_heads % merge_size:
        raise ValueError(f"merge_size must divide the {num_heads} heads, got {merge_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CARDConfig:
    """What a `CARD` is made of; `build` makes it. The defaults are the authors' for ETTm1.

    Attributes:
      channels: number of series that are forecast together.
      context_length: steps of the window that is read.
      horizon: steps of the forecast.
      patch_size: steps of a token.
      stride: steps from one token to the next, a divisor of `context_length - patch_size`.
      features, num_heads, mlp_features, num_layers: width, heads, hidden units, depth.
      alpha: in (0, 1], of the `exponential_moving_average` of queries and keys.
      projection_rank: how many keys and values attention over channels is left with.
      merge_size: of `token_blend`, a divisor of the heads.
      use_statistics: whether the token in front is made of the channels' mean and standard
        deviation, or learned alone.
      dropout: rate in [0, 1), where a key is given: on the patches, on attention's weights, on the
        hidden units and on what a layer adds.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1, a rate out of range, or sizes that do not divide each other.

    Use `use_statistics` where the level of a series tells of its future; without it the forecast
    follows any change of a channel's unit. Use a small `projection_rank` for many channels.

    Cost: at the defaults for 7 channels 32 thousand parameters and 1.5 million multiplications a
    window.

    Example:
      >>> config = CARDConfig(channels=7)
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      32112

    Reference: Wang, Zhou, Wen, Gao, Ding, Jin, "CARD: Channel Aligned Robust Blend Transformer for
    Time Series Forecasting", 2023, arXiv:2305.12095.
    """

    channels: int
    context_length: int = 96
    horizon: int = 96
    patch_size: int = 16
    stride: int = 8
    features: int = 16
    num_heads: int = 2
    mlp_features: int = 32
    num_layers: int = 2
    alpha: float = 0.5
    projection_rank: int = 8
    merge_size: int = 2
    use_statistics: bool = False
    dropout: float = 0.3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "CARD":
        """The model of this configuration."""
        return CARD(self, rngs=rngs)

    def __post_init__(self):
        sizes = ("patch_size", "stride", "features", "num_heads", "mlp_features", "num_layers")
        check_series_config(self, sizes=(*sizes, "projection_rank"))
        check_interval(0, 1, closed="right", alpha=self.alpha)
        check_interval(0, 1, closed="left", dropout=self.dropout)
        check_interval(1, self.context_length, patch_size=self.patch_size)
        if (self.context_length - self.patch_size) % self.stride:
            raise ValueError(
                f"stride must divide context_length - patch_size = "
                f"{self.context_length - self.patch_size}, or the newest steps would be left out, "
                f"got {self.stride}"
            )
        if self.features % self.num_heads:
            raise ValueError(
                f"num_heads must divide features = {self.features}, got {self.num_heads}"
            )
        check_merge(self.num_heads, self.merge_size)


class CARD(nnx.Module):
    r"""A forecaster of several series: tokens are patches, attended over channels and over time.

    Every channel is standardised by its window and cut into patches, each a token, with one more
    token in front. A layer is

        a = attention over channels(x),   b = attention over tokens(a),
        x ← norm(x + (a + b) W)

    where each attention has two branches, of the tokens along its axis, with smoothed queries and
    keys, and of the features of a head among each other,

        softmax(ema(q) ema(k)ᵀ / √head_dim) v   and   v softmax(qᵀ k / √length)ᵀ,

    whose heads are merged by `token_blend` and which go through a feed-forward layer each. Over
    channels, keys and values are shortened by `dynamic_projection`. The forecast of a channel is
    linear in its last tokens, at its own mean and scale.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: when called, inputs of another shape.

    Use it on series that tell of each other, with `jaxref.losses.signal_decay_loss`; `NBEATS` sees
    each by itself.

    Cost: about num_layers · (7 · features² + 8 · features · mlp_features) parameters, as many
    multiplications a token, and the head's; attention over channels is linear in them.

    `train()` and `eval()` say whether norms use the batch's statistics and move theirs. Without
    `use_statistics` the forecast follows any change of a channel's unit, x → a x + b. The order of
    the channels matters, as queries and keys are smoothed along them.

    Example:
      >>> config, inputs = CARDConfig(channels=7), jnp.ones((2, 96, 7))
      >>> nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(inputs)).shape
      (2, 96, 7)

    Reference: Wang, Zhou, Wen, Gao, Ding, Jin, "CARD: Channel Aligned Robust Blend Transformer for
    Time Series Forecasting", 2023, arXiv:2305.12095.
    """

    Config = CARDConfig

    def __init__(self, config: CARDConfig, *, rngs: nnx.Rngs):
        self.config = config
        patches = (config.context_length - config.patch_size) // config.stride + 1
        features, param_dtype = config.features, config.param_dtype
        normal = jax.nn.initializers.normal(0.01)
        self.project = _linear(config, config.patch_size, features, (None, "embed"), rngs)
        self.positions = token_parameter(patches, features, param_dtype, normal, rngs)
        given = config.use_statistics
        self.token = None if given else token_parameter(1, features, param_dtype, normal, rngs)
        statistics: Any = _linear(config, 2, features, (None, "embed"), rngs) if given else None
        self.statistics = statistics
        self.layers = nnx.List(_Layer(config, rngs) for _ in range(config.num_layers))
        self.head = Linear(
            (patches + 1, features),
            config.horizon,
            axes=(None, "embed", None),
            use_bias=True,
            dtype=self._dtype(),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, inputs: ArrayLike, *, key: Array | None = None) -> Array:
        """The forecast `[batch, horizon, channels]`, in at least float32.

        Args:
          inputs: floating point `[batch, context_length, channels]`, the newest step last.
          key: random key for dropout; None (evaluation) drops nothing.

        Raises:
          ValueError: inputs of another shape.
          TypeError: inputs that are not floating point.
        """
        config = self.config
        first, *keys = split_keys(key, len(self.layers) + 1)
        series = jnp.swapaxes(check_series(inputs, config), 1, 2).astype(self._dtype())
        standard, mean, deviation = _standardised(series, axis=-1)
        starts = np.arange(0, config.context_length - config.patch_size + 1, config.stride)
        patches = standard[..., starts[:, None] + np.arange(config.patch_size)]
        x = dropout(self.project(patches), config.dropout, first)
        x = x + self.positions[...].astype(x.dtype)
        if self.token is not None:
            in_front = jnp.broadcast_to(
                self.token[...].astype(x.dtype), (*x.shape[:2], 1, x.shape[3])
            )
        else:
            both = jnp.concatenate([mean, deviation], axis=-1)
            if config.channels > 1:
                both, _, _ = _standardised(both, axis=-2)
            in_front = self.statistics(both)[:, :, None]
        x = jnp.concatenate([in_front, x], axis=2)
        for layer, layer_key in zip(self.layers, keys):
            x = layer(x, layer_key)
        forecast = self.head(x) * (deviation + _FLOOR) + mean
        return jnp.swapaxes(forecast, 1, 2)

    def _dtype(self) -> DTypeLike:
        """The type of the series' own numbers."""
        return jnp.promote_types(self.config.param_dtype, jnp.float32)


class _Layer(nnx.Module):
    """Attention over channels, then over tokens."""

    def __init__(self, config: CARDConfig, rngs: nnx.Rngs):
        self.channels = _Attention(config, rngs, project=True)
        self.tokens = _Attention(config, rngs)
        features = config.features
        self.output = _linear(config, features, features, ("embed", None), rngs)
        self.norm = Norm(batch_norm, features, param_dtype=config.param_dtype)
        self.rate = config.dropout

    def __call__(self, x: Array, key: Array | None) -> Array:
        """`x [batch, channels, tokens, features]` after the layer."""
        keys = split_keys(key, 3)
        over_channels = jnp.swapaxes(self.channels(jnp.swapaxes(x, 1, 2), keys[0]), 1, 2)
        over_tokens = self.tokens(over_channels, keys[1])
        y = dropout(self.output(over_channels + over_tokens), self.rate, keys[2])
        return constrain(self.norm(x + y), "batch", None, None, None)


class _Attention(nnx.Module):
    """Attention along the third axis and along a head's features, blended, with its residual."""

    def __init__(self, config: CARDConfig, rngs: nnx.Rngs, *, project: bool = False):
        features, heads = config.features, config.num_heads
        head_dim = features // heads
        types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}

        def to_heads() -> Linear:
            return _linear(config, features, (heads, head_dim), ("embed", "heads", None), rngs)

        def norm() -> Norm:
            return Norm(batch_norm, features, param_dtype=config.param_dtype)

        def mlp() -> MLP:
            return MLP(
                features,
                config.mlp_features,
                activation=_exact_gelu,
                use_bias=True,
                **types,
                rngs=rngs,
            )

        self.query, self.key, self.value = to_heads(), to_heads(), to_heads()
        ranks = [config.projection_rank] * 2 if project else []  # of keys and of values
        self.shorten = nnx.List(
            _linear(config, head_dim, rank, (None, None), rngs) for rank in ranks
        )
        self.branch_norms = nnx.List([norm(), norm()])
        self.branches = nnx.List([mlp(), mlp()])
        self.norm = norm()
        self.alpha, self.merge_size, self.rate = config.alpha, config.merge_size, config.dropout

    def __call__(self, x: Array, key: Array | None) -> Array:
        """Maps `[batch, others, length, features]` to the same."""
        keys = split_keys(key, 4)
        rows = x.reshape(-1, *x.shape[2:])
        query, entries, values = self.query(rows), self.key(rows), self.value(rows)
        short = [entries, values]
        if self.shorten:
            short = [_shortened(y, linear) for y, linear in zip(short, self.shorten)]
        smooth = [
            exponential_moving_average(y, alpha=self.alpha, axis=1) for y in (query, short[0])
        ]
        along = self._attend(smooth[0], smooth[1], short[1], keys[0])
        # of the features: they are what a head has in place of tokens
        query, entries, values = (jnp.swapaxes(y, 1, 3) for y in (query, entries, values))
        among = jnp.swapaxes(self._attend(query, entries, values, keys[1]), 1, 3)
        y = x
        for branch, norm, mlp, mlp_key in zip(
            (along, among), self.branch_norms, self.branches, keys[2:]
        ):
            blended = token_blend(branch, merge_size=self.merge_size).reshape(x.shape)
            hidden = mlp.activation(mlp.up(norm(blended)))
            y = y + mlp.down(dropout(hidden, self.rate, mlp_key))
        return self.norm(y)

    def _attend(self, query: Array, entries: Array, values: Array, key: Array | None) -> Array:
        weights = dropout(attention_probabilities(query, entries), self.rate, key)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, values)


def _shortened(x: Array, linear: Linear) -> Array:
    """`dynamic_projection` of `[batch, length, heads, head_dim]`, head by head."""
    assert linear.bias is not None
    short = dynamic_projection(jnp.swapaxes(x, 1, 2), linear.kernel[...], linear.bias[...])
    return jnp.swapaxes(short, 1, 2)


def _exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _linear(
    config: CARDConfig, inputs: Any, outputs: Any, axes: tuple[str | None, ...], rngs: nnx.Rngs
) -> Linear:
    """A map with a bias."""
    return Linear(
        inputs,
        outputs,
        axes=axes,
        use_bias=True,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


_FLOOR = 1e-4
"""What is added to standard deviations, so that a constant becomes 0."""


def _standardised(x: Array, *, axis: int) -> tuple[Array, Array, Array]:
    """x at mean 0 and deviation 1 along the axis, and its mean and unbiased standard deviation."""
    mean = jnp.mean(x, axis=axis, keepdims=True)
    squares = jnp.sum(jnp.square(x - mean), axis=axis, keepdims=True)
    deviation = safe_sqrt(squares / max(x.shape[axis] - 1, 1))
    return (x - mean) / (deviation + _FLOOR), mean, deviation
