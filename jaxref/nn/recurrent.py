"""Recurrent cells with layer normalization, for `flax.nnx.RNN`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.norms import layer_norm


class LayerNormLSTMParams(NamedTuple):
    """Parameters of `layer_norm_lstm_cell`; the gates lie as forget, input, output, candidate.

    Attributes:
      input_kernel: W_x `[inputs, 4 hidden]`.
      recurrent_kernel: W_h `[hidden, 4 hidden]`.
      bias: b `[4 hidden]`.
      input_scale, input_bias: a_2, b_2 `[4 hidden]`, of the norm of W_x x.
      recurrent_scale, recurrent_bias: a_1, b_1 `[4 hidden]`, of the norm of W_h h.
      cell_scale, cell_bias: a_3, b_3 `[hidden]`, of the norm of the cell.
    """

    input_kernel: Array
    recurrent_kernel: Array
    bias: Array
    input_scale: Array
    input_bias: Array
    recurrent_scale: Array
    recurrent_bias: Array
    cell_scale: Array
    cell_bias: Array


class LayerNormGRUParams(NamedTuple):
    """Parameters of `layer_norm_gru_cell`; the gates lie as update, reset, candidate.

    Attributes:
      input_kernel: W_x and W `[inputs, 3 hidden]`.
      recurrent_kernel: W_h and U `[hidden, 3 hidden]`.
      input_scale, input_bias: `[3 hidden]`, of the norms of what the input gives.
      recurrent_scale, recurrent_bias: `[3 hidden]`, of the norms of what the state gives.
    """

    input_kernel: Array
    recurrent_kernel: Array
    input_scale: Array
    input_bias: Array
    recurrent_scale: Array
    recurrent_bias: Array


def layer_norm_lstm_cell(
    params: LayerNormLSTMParams,
    carry: tuple[ArrayLike, ArrayLike],
    x: ArrayLike,
    *,
    epsilon: float = 1e-6,
) -> tuple[tuple[Array, Array], Array]:
    r"""One step of an LSTM whose gates and cell are layer-normalised.

        (f, i, o, g) = LN(W_h h; a_1, b_1) + LN(W_x x; a_2, b_2) + b
        c' = σ(f) c + σ(i) tanh(g),   h' = σ(o) tanh(LN(c'; a_3, b_3))

    with each of the first two norms over the four gates jointly. The cell is carried on as it is;
    only its way out is normalised.

    Args:
      params: `LayerNormLSTMParams`.
      carry: c and h, `[..., hidden]` floating point each.
      x: `[..., inputs]` floating point.
      epsilon: ε at least 0 of the norms. Default 1e-6.

    Returns:
      The carry (c', h'), and h' again as the output, in the types of c and h; computed in at least
      float32.

    Raises:
      ValueError: shapes that do not match, or a negative `epsilon`.
      TypeError: `x` or the carry is not floating point.

    Use it with `jax.lax.scan` for recurrent networks on long sequences, where the scale of the
    recurrent kernel would let the state explode or die; `LayerNormLSTMCell` is the module.

    Cost: 4 · hidden · (inputs + hidden) multiplications a step and three layer norms; steps wait
    for each other.

    Example:
      >>> cell = LayerNormLSTMCell(3, 2, rngs=nnx.Rngs(0))
      >>> carry = cell.initialize_carry((3,))
      >>> _, h = layer_norm_lstm_cell(cell.params, carry, jnp.ones(3))
      >>> h.shape
      (2,)

    Reference: Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    c, h = map(jnp.asarray, carry)
    _check_cell(params, h, x, gates=4)
    check_floating(c=c)
    check_shape(h.shape, c=c)
    dtype = compute_dtype(c, h, x)
    p = LayerNormLSTMParams(*(jnp.asarray(parameter, dtype) for parameter in params))
    recurrent, given = h.astype(dtype) @ p.recurrent_kernel, jnp.asarray(x, dtype) @ p.input_kernel
    gates = layer_norm(recurrent, p.recurrent_scale, p.recurrent_bias, epsilon=epsilon) + p.bias
    gates += layer_norm(given, p.input_scale, p.input_bias, epsilon=epsilon)
    f, i, o, g = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * c.astype(dtype) + jax.nn.sigmoid(i) * jnp.tanh(g)
    normed = layer_norm(cell, p.cell_scale, p.cell_bias, epsilon=epsilon)
    output = (jax.nn.sigmoid(o) * jnp.tanh(normed)).astype(h.dtype)
    return (cell.astype(c.dtype), output), output


def layer_norm_gru_cell(
    params: LayerNormGRUParams, h: ArrayLike, x: ArrayLike, *, epsilon: float = 1e-6
) -> Array:
    r"""One step of a gated recurrent unit whose gates and candidate are layer-normalised.

        (z, r) = LN(W_h h) + LN(W_x x)
        g = tanh(LN(W x) + σ(r) LN(U h)),   h' = (1 - σ(z)) h + σ(z) g

    with a norm over both gates jointly and one over the candidate, for input and state each, so
    that there are four norms with gains and biases of their own.

    Args:
      params: `LayerNormGRUParams`.
      h: `[..., hidden]` floating point.
      x: `[..., inputs]` floating point.
      epsilon: ε at least 0 of the norms. Default 1e-6.

    Returns:
      h' in the type of `h`, computed in at least float32.

    Raises:
      ValueError: shapes that do not match, or a negative `epsilon`.
      TypeError: `x` or `h` is not floating point.

    Use it as `layer_norm_lstm_cell`, with one state in place of two; `LayerNormGRUCell` is the
    module. `flax.nnx.GRUCell` has no norms, and the opposite meaning of z.

    Cost: 3 · hidden · (inputs + hidden) multiplications a step, three quarters of the LSTM's, and
    four layer norms; steps wait for each other.

    Example:
      >>> cell = LayerNormGRUCell(3, 2, rngs=nnx.Rngs(0))
      >>> layer_norm_gru_cell(cell.params, jnp.zeros(2), jnp.ones(3)).shape
      (2,)

    Reference: Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    h = jnp.asarray(h)
    _check_cell(params, h, x, gates=3)
    dtype = compute_dtype(h, x)
    p = LayerNormGRUParams(*(jnp.asarray(parameter, dtype) for parameter in params))
    gates, candidate = slice(2 * h.shape[-1]), slice(2 * h.shape[-1], None)

    def normed(features: Array, scale: Array, bias: Array) -> list[Array]:
        return [
            layer_norm(features[..., part], scale[part], bias[part], epsilon=epsilon)
            for part in (gates, candidate)
        ]

    wide = h.astype(dtype)
    recurrent = normed(wide @ p.recurrent_kernel, p.recurrent_scale, p.recurrent_bias)
    given = normed(jnp.asarray(x, dtype) @ p.input_kernel, p.input_scale, p.input_bias)
    z, r = jnp.split(jax.nn.sigmoid(recurrent[0] + given[0]), 2, axis=-1)
    g = jnp.tanh(given[1] + r * recurrent[1])
    return ((1 - z) * wide + z * g).astype(h.dtype)


def _check_cell(
    params: LayerNormLSTMParams | LayerNormGRUParams, h: Array, x: ArrayLike, *, gates: int
) -> None:
    check_floating(h=h, x=x)
    for name, array in (("h", h), ("x", x)):
        if jnp.ndim(array) == 0:
            raise ValueError(f"{name} must have shape [..., features], got a scalar")
    hidden, inputs = h.shape[-1], jnp.shape(x)[-1]
    check_shape((*h.shape[:-1], inputs), x=x)
    check_shape((inputs, gates * hidden), input_kernel=params.input_kernel)
    check_shape((hidden, gates * hidden), recurrent_kernel=params.recurrent_kernel)


class _LayerNormCell(nnx.RNNCellBase):
    """The parameters of a cell, by the fields of its NamedTuple."""

    params_type: Any
    gates: int
    recurrent_kernel: nnx.Param

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        epsilon: float = 1e-6,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        recurrent_init: Initializer = jax.nn.initializers.orthogonal(),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.hidden_features = in_features, hidden_features
        self.epsilon, self.dtype = epsilon, dtype
        width = self.gates * hidden_features
        for name in self.params_type._fields:
            if name.endswith("kernel"):
                recurrent = name.startswith("recurrent")
                init = recurrent_init if recurrent else kernel_init
                rows = hidden_features if recurrent else in_features
                # The orthogonal initializer has no half precision.
                value = init(
                    rngs.params(), (rows, width), jnp.promote_types(param_dtype, "float32")
                )
                value = value.astype(param_dtype)
                axes: tuple[str | None, ...] = (None, None) if recurrent else ("embed", None)
            else:
                size = hidden_features if name.startswith("cell") else width
                value = jnp.full(size, float(name.endswith("scale")), param_dtype)
                axes = (None,)
            setattr(self, name, nnx.Param(value, axes=axes))

    @property
    def params(self):
        """The parameters as the pure function takes them."""
        return self.params_type(*(getattr(self, name)[...] for name in self.params_type._fields))

    @property
    def num_feature_axes(self) -> int:
        return 1

    def _zeros(self, input_shape: tuple[int, ...]) -> Array:
        dtype = self.dtype or self.recurrent_kernel.dtype
        return jnp.zeros((*input_shape[:-1], self.hidden_features), dtype)


class LayerNormLSTMCell(_LayerNormCell):
    """`layer_norm_lstm_cell` with its parameters, a cell of `flax.nnx.RNN`.

    Args:
      in_features: size of the input.
      hidden_features: size of the state.
      epsilon: of the norms.
      kernel_init, recurrent_init: initializers of the two kernels. Gains start at 1, biases at 0.
      dtype: type of a carry that `initialize_carry` makes; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      params: `LayerNormLSTMParams`; each field is an attribute, too.

    Raises:
      What `layer_norm_lstm_cell` raises when called.

    Use it for recurrent networks on long sequences, in `flax.nnx.RNN`; `LayerNormGRUCell` is
    smaller, and the steps of a `QuasiLSTM` run in parallel.

    Cost: about 4 · hidden · (inputs + hidden) parameters, as many multiplications a step, and
    2 · hidden numbers of state; steps wait for each other.

    Example:
      >>> rnn = nnx.RNN(LayerNormLSTMCell(4, 8, rngs=nnx.Rngs(0)))
      >>> rnn(jnp.ones((2, 5, 4))).shape
      (2, 5, 8)

    Reference: Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    params_type, gates = LayerNormLSTMParams, 4

    def __call__(
        self, carry: tuple[Array, Array], inputs: Array
    ) -> tuple[tuple[Array, Array], Array]:
        """The carry (c, h) after `inputs [..., in_features]`, and h again as the output."""
        return layer_norm_lstm_cell(self.params, carry, inputs, epsilon=self.epsilon)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | Callable[..., Any] | None = None,
    ) -> tuple[Array, Array]:
        """Zeros (c, h) for inputs of shape `[..., in_features]`; only `input_shape` is used."""
        return self._zeros(input_shape), self._zeros(input_shape)


class LayerNormGRUCell(_LayerNormCell):
    """`layer_norm_gru_cell` with its parameters, a cell of `flax.nnx.RNN`.

    Args:
      in_features: size of the input.
      hidden_features: size of the state.
      epsilon: of the norms.
      kernel_init, recurrent_init: initializers of the two kernels. Gains start at 1, biases at 0.
      dtype: type of a carry that `initialize_carry` makes; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      params: `LayerNormGRUParams`; each field is an attribute, too.

    Raises:
      What `layer_norm_gru_cell` raises when called.

    Use it in place of `LayerNormLSTMCell` where parameters and state are to be fewer; the steps of
    a `QuasiLSTM` run in parallel.

    Cost: about 3 · hidden · (inputs + hidden) parameters, as many multiplications a step, and
    hidden numbers of state; steps wait for each other.

    Example:
      >>> rnn = nnx.RNN(LayerNormGRUCell(4, 8, rngs=nnx.Rngs(0)))
      >>> rnn(jnp.ones((2, 5, 4))).shape
      (2, 5, 8)

    Reference: Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    params_type, gates = LayerNormGRUParams, 3

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """The state after `inputs [..., in_features]`, as carry and as output."""
        h = layer_norm_gru_cell(self.params, carry, inputs, epsilon=self.epsilon)
        return h, h

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | Callable[..., Any] | None = None,
    ) -> Array:
        """Zeros for inputs of shape `[..., in_features]`; only `input_shape` is used."""
        return self._zeros(input_shape)
