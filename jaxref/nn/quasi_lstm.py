"""Quasi-LSTM: an LSTM whose gates see the input only, so that its steps run in parallel."""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import normal
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.nn.linear import Linear
from jaxref.nn.mlp import MLP
from jaxref.nn.normalization import Norm
from jaxref.norms import layer_norm

State = tuple[Array, Array]
Implementation = Literal["block", "scan", "associative"]


def quasi_lstm(
    forget_logits: ArrayLike,
    input_logits: ArrayLike,
    candidate_logits: ArrayLike,
    output_logits: ArrayLike,
    state: tuple[ArrayLike, ArrayLike],
    *,
    block_length: int = 16,
    implementation: Implementation | None = None,
) -> tuple[Array, State]:
    r"""The states of an LSTM whose gates are given for all steps at once.

        c_t = f_t c_{t-1} + i_t z_t,   h_t = o_t tanh(c_t)
        f, i, o = σ(logits),   z = tanh(candidate logits)

    elementwise. With D_k = f_1 ... f_k and ĉ_k the cells of a block of K steps that starts at 0,

        c_k = D_k c_0 + ĉ_k,   ĉ_k = f_k ĉ_{k-1} + i_k z_k

    Neither D nor ĉ needs c_0: all blocks compute theirs at once, in K steps, and length / K more
    carry the cell from block to block.

    Args:
      forget_logits, input_logits, candidate_logits, output_logits: `[batch, length, heads,
        head_dim]` floating point, functions of the input. Models add 1 to those of f.
      state: c and h before the first step, `[batch, heads, head_dim]` each; h is not read.
      block_length: K, a divisor of `length`; not used by "scan" and "associative". Default 16.
      implementation: "block" as above; "scan": step by step, the fastest on CPU; "associative": a
        scan in log(length) passes over all steps. Default: "scan" on CPU, "block" elsewhere.

    Returns:
      h `[batch, length, heads, head_dim]` in the type of the logits, and the state after the last
      step, in the types of `state`. Computed in at least float32.

    Raises:
      ValueError: shapes that differ, a `length` that `block_length` does not divide or of 0, or an
        unknown `implementation`.
      TypeError: an array that is not floating point.

    Use it where a recurrent model is wanted whose training runs in parallel over time; what it
    gives up against an LSTM (`LayerNormLSTMCell`) is gates that see the state.

    Cost: O(length · heads · head_dim), elementwise, in K + length / K steps that wait for each
    other ("block"), length ("scan") or O(log length) ("associative").

    Example:
      >>> logits = jnp.zeros((1, 4, 1, 1))
      >>> zero = jnp.zeros((1, 1, 1))
      >>> h, (c, _) = quasi_lstm(logits, logits, logits + 1, logits, (zero, zero), block_length=2)
      >>> [float(h) for h in h.ravel()], float(c[0, 0, 0])
      ([0.182, 0.258, 0.291, 0.307], 0.714)

    Reference: Stanić et al., "The Languini Kitchen: Enabling Language Modelling Research at
    Different Scales of Compute", 2023, arXiv:2309.11197.
    """
    arrays = {
        "forget_logits": forget_logits,
        "input_logits": input_logits,
        "candidate_logits": candidate_logits,
        "output_logits": output_logits,
    }
    check_floating(**arrays)
    shape = jnp.shape(forget_logits)
    if len(shape) != 4 or shape[1] == 0:
        raise ValueError(
            f"forget_logits must have shape [batch, length, heads, head_dim], got {shape}"
        )
    check_shape(shape, **arrays)
    c, h = map(jnp.asarray, state)
    check_floating(c=c, h=h)
    check_shape((shape[0], *shape[2:]), c=c, h=h)
    dtype = compute_dtype(*arrays.values(), c)
    forget, entrance, candidate, exit_ = (
        jnp.moveaxis(jnp.asarray(logits, dtype), 1, 0) for logits in arrays.values()
    )
    f, update = jax.nn.sigmoid(forget), jax.nn.sigmoid(entrance) * jnp.tanh(candidate)
    wide = c.astype(dtype)
    if implementation in (None, "block"):
        check_interval(1, jnp.inf, block_length=block_length)
        if shape[1] % block_length:
            raise ValueError(f"block_length must divide the length {shape[1]}, got {block_length}")
    implementation = implementation or ("scan" if jax.default_backend() == "cpu" else "block")
    if implementation == "block":
        cells = _in_blocks(f, update, wide, block_length)
    elif implementation == "scan":
        cells = _step_by_step(f, update, wide)
    elif implementation == "associative":
        cells = _in_passes(f, update, wide)
    else:
        raise ValueError(
            f"implementation must be 'block', 'scan' or 'associative', got {implementation!r}"
        )
    outputs = jax.nn.sigmoid(exit_) * jnp.tanh(cells)
    last = cells[-1].astype(c.dtype), outputs[-1].astype(h.dtype)
    logits_dtype = jnp.result_type(*arrays.values())
    return jnp.moveaxis(outputs, 0, 1).astype(logits_dtype), last


# Each takes f and i z, `[length, ...]`, and c before the first step, and gives all c.


def _in_blocks(f: Array, update: Array, c: Array, block_length: int) -> Array:
    def within(steps: State, inputs: State) -> tuple[State, State]:
        (decay, cell), (f, update) = steps, inputs
        steps = f * decay, f * cell + update
        return steps, steps

    def across(c: Array, last: State) -> tuple[Array, Array]:
        decay, cell = last
        return decay * c + cell, c

    shape = (-1, block_length, *f.shape[1:])
    f, update = (jnp.moveaxis(x.reshape(shape), 1, 0) for x in (f, update))  # [step, block, ...]
    start = jnp.ones_like(f[0]), jnp.zeros_like(update[0])
    decay, cells = jax.lax.scan(within, start, (f, update))[1]
    starts = jax.lax.scan(across, c, (decay[-1], cells[-1]))[1]
    return jnp.moveaxis(decay * starts + cells, 0, 1).reshape(-1, *c.shape)


def _step_by_step(f: Array, update: Array, c: Array) -> Array:
    def step(c: Array, inputs: State) -> tuple[Array, Array]:
        f, update = inputs
        c = f * c + update
        return c, c

    return jax.lax.scan(step, c, (f, update))[1]


def _in_passes(f: Array, update: Array, c: Array) -> Array:
    def compose(first: State, then: State) -> State:
        return first[0] * then[0], then[0] * first[1] + then[1]

    decay, cells = jax.lax.associative_scan(compose, (f, update))
    return decay * c + cells


class QuasiLSTM(nnx.Module):
    """A layer of quasi-LSTM heads: gates by linear maps of the input, heads projected back.

        f, i, z, o = maps of x (+ 1 for f),   y = W [h of all heads] + b

    Args:
      features: size of input and output.
      heads, head_dim: number and size of the heads; their product need not be `features`.
      block_length, implementation: as for `quasi_lstm`.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Raises:
      What `quasi_lstm` raises when called.

    Use it as a mixer over the sequence in place of attention, for long sequences; `QuasiLSTMBlock`
    has it in a residual block, `LayerNormLSTMCell` is an LSTM whose gates see the state.

    Cost: 5 · features · heads · head_dim parameters, as many multiplications a token;
    2 · heads · head_dim numbers of state a sequence, however long.

    Example:
      >>> layer = QuasiLSTM(4, 2, 3, block_length=5, rngs=nnx.Rngs(0))
      >>> y, state = layer(jnp.ones((2, 5, 4)))
      >>> y.shape, state[0].shape
      ((2, 5, 4), (2, 2, 3))

    Reference: Stanić et al., "The Languini Kitchen: Enabling Language Modelling Research at
    Different Scales of Compute", 2023, arXiv:2309.11197.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        head_dim: int,
        *,
        block_length: int = 16,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads, self.head_dim = heads, head_dim
        self.block_length, self.implementation = block_length, implementation
        linear = partial(
            Linear,
            use_bias=True,
            kernel_init=normal(0.02),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        gate = partial(linear, features, (heads, head_dim), axes=("embed", "heads", None))
        self.forget, self.input, self.candidate, self.output = gate(), gate(), gate(), gate()
        self.projection = linear((heads, head_dim), features, axes=("heads", None, "embed"))

    def __call__(self, x: Array, state: State | None = None) -> tuple[Array, State]:
        """Maps `x [batch, length, features]`, and the state of the segment before it or None.

        Returns y of the shape of `x`, and the state for the segment after it; put
        `jax.lax.stop_gradient` around that to end backpropagation at the segment.
        """
        if state is None:
            zeros = jnp.zeros((x.shape[0], self.heads, self.head_dim), compute_dtype(x))
            state = zeros, zeros
        h, state = quasi_lstm(
            self.forget(x) + 1,
            self.input(x),
            self.candidate(x),
            self.output(x),
            state,
            block_length=self.block_length,
            implementation=self.implementation,
        )
        return self.projection(h), state


class QuasiLSTMBlock(nnx.Module):
    """A pre-norm block of a quasi-LSTM and a feed-forward network.

        x' = x + QuasiLSTM(LN(x)),   y = x' + MLP(LN(x'))

    Args:
      features: size of the stream.
      mlp_features: size of the hidden layer of the feed-forward network, whose activation is the
        GELU in its tanh form. The paper's models have 4 `features`.
      heads, head_dim: number and size of the heads.
      num_layers: N, blocks of the model: what writes the output of the feed-forward network starts
        normal of deviation 0.02 / √(2N), all other kernels with 0.02.
      block_length, implementation: as for `quasi_lstm`.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Raises:
      What `quasi_lstm` raises when called.

    Use it for recurrent language models: embeddings times √features, N blocks, a last norm, and an
    output map of its own. The paper's smallest has 4 blocks of 512 features and 8 heads of 32.

    Cost: that of `QuasiLSTM`, and 2 · features · mlp_features parameters, as many multiplications a
    token, of the `MLP`.

    Example:
      >>> block = QuasiLSTMBlock(4, 16, 2, 3, num_layers=2, block_length=5, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 5, 4)))[0].shape
      (2, 5, 4)

    Reference: Stanić et al., "The Languini Kitchen: Enabling Language Modelling Research at
    Different Scales of Compute", 2023, arXiv:2309.11197.
    """

    def __init__(
        self,
        features: int,
        mlp_features: int,
        heads: int,
        head_dim: int,
        *,
        num_layers: int,
        block_length: int = 16,
        implementation: Implementation | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, num_layers=num_layers)
        norm = partial(
            Norm,
            partial(layer_norm, epsilon=1e-5),
            features,
            axes=("embed",),
            param_dtype=param_dtype,
        )
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.lstm_norm, self.mlp_norm = norm(), norm()
        self.lstm = QuasiLSTM(
            features,
            heads,
            head_dim,
            block_length=block_length,
            implementation=implementation,
            **types,
            rngs=rngs,
        )
        self.mlp = MLP(
            features,
            mlp_features,
            use_bias=True,
            kernel_init=normal(0.02),
            output_init=normal(0.02 / math.sqrt(2 * num_layers)),
            **types,
            rngs=rngs,
        )

    def __call__(self, x: Array, state: State | None = None) -> tuple[Array, State]:
        """Maps `x [batch, length, features]` and a state as `QuasiLSTM` does."""
        y, state = self.lstm(self.lstm_norm(x), state)
        x += y
        return x + self.mlp(self.mlp_norm(x)), state
