"""Attention of tokens over parameters: linear maps that grow without forgetting."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype

Normalization = Literal["l2_gelu", "gelu_l2", "softmax"]


def parameter_attention_scale(normalization: Normalization, num_tokens: int) -> float:
    """The default `scale` of `parameter_attention`.

    Raises:
      ValueError: an unknown `normalization`.

    >>> parameter_attention_scale("l2_gelu", 16), parameter_attention_scale("softmax", 16)
    (4.0, 16.0)
    """
    if normalization not in ("l2_gelu", "gelu_l2", "softmax"):
        raise ValueError(
            f"normalization must be 'l2_gelu', 'gelu_l2' or 'softmax', got {normalization!r}"
        )
    return float(num_tokens) if normalization == "softmax" else math.sqrt(num_tokens)


def _unit_rows(x: Array, epsilon: float) -> Array:
    """Rows divided by their norm + ε; a row of zeros stays, and passes its gradient on."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.where(square > 0, square, 1.0)) + epsilon)


def parameter_attention(
    x: ArrayLike,
    key_tokens: ArrayLike,
    value_tokens: ArrayLike,
    *,
    normalization: Normalization = "l2_gelu",
    scale: ArrayLike | None = None,
    epsilon: float = 1e-5,
    where: ArrayLike | None = None,
) -> Array:
    r"""Attention of each input over n learned pairs of a key and a value, in place of a matrix.

        y = Θ(A) V,     A = x Kᵀ

    with, for each row of A,

        l2_gelu:   Θ(A) = gelu(τ A / (‖A‖₂ + ε))
        gelu_l2:   Θ(A) = τ gelu(A) / (‖gelu(A)‖₂ + ε)
        softmax:   Θ(A) = τ softmax(A)

    and gelu(a) = a Φ(a), exactly. Pairs can be added later (`grow_parameter_tokens`), which a
    matrix between features of fixed sizes cannot offer.

    Args:
      x: `[..., inputs]` floating point.
      key_tokens: K `[n, inputs]` floating point, n at least 1.
      value_tokens: V `[n, outputs]` floating point.
      normalization: "l2_gelu" (default), "gelu_l2" or "softmax".
      scale: τ above 0. Default: √n, and n for "softmax". Once tokens were added, pass what it was
        before: the default changes with n.
      epsilon: ε at least 0, added to the norm. Default 1e-5.
      where: boolean, broadcastable to `[..., n]`: the pairs that an input sees. The others
        contribute 0; the default of `scale` counts them. Default: all.

    Returns:
      y `[..., outputs]` in the type of `x`; scores and sums are in at least float32. An input that
      is orthogonal to all keys gives 0 in the first two forms, with a finite gradient for any ε.

    Raises:
      ValueError: shapes that do not match, no token at all, an unknown `normalization`, or a
        `scale` or `epsilon` out of range.
      TypeError: an array that is not floating point.

    Use it for the projections and the MLP of a transformer that is to grow in training, from
    `jaxref.nn.ParameterAttention`; for fixed sizes a matrix is half the work. "softmax" cannot grow
    without a change of the outputs.

    Cost: n (inputs + outputs) parameters, as many multiplications an input, and n scores in
    between.

    Example:
      >>> keys, values = jnp.eye(2), jnp.array([[1.0], [10.0]])
      >>> print(parameter_attention(jnp.array([[5.0, 0.0], [0.0, 0.1]]), keys, values).round(1))
      [[ 1.3]
       [13. ]]

    Reference: Wang et al., "TokenFormer: Rethinking Transformer Scaling with Tokenized Model
    Parameters", 2024, arXiv:2410.23168.
    """
    check_floating(x=x, key_tokens=key_tokens, value_tokens=value_tokens)
    check_interval(0, jnp.inf, epsilon=epsilon)
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("x must have shape [..., inputs], got a scalar")
    for name, tokens in (("key_tokens", key_tokens), ("value_tokens", value_tokens)):
        if jnp.ndim(tokens) != 2 or jnp.shape(tokens)[0] == 0:
            raise ValueError(
                f"{name} must have shape [n, features] with n at least 1, got {jnp.shape(tokens)}"
            )
    num_tokens = jnp.shape(key_tokens)[0]
    check_shape((num_tokens, x.shape[-1]), key_tokens=key_tokens)
    check_shape((num_tokens, jnp.shape(value_tokens)[1]), value_tokens=value_tokens)
    check_broadcastable((*x.shape[:-1], num_tokens), where=where)
    default_scale = parameter_attention_scale(normalization, num_tokens)
    if scale is None:
        scale = default_scale
    check_shape((), scale=scale)
    check_interval(0, jnp.inf, closed="neither", scale=scale)
    keys, values = (jnp.asarray(tokens, x.dtype) for tokens in (key_tokens, value_tokens))
    wide = compute_dtype(x)
    scores = jnp.matmul(x, keys.T, preferred_element_type=wide)
    if normalization == "softmax":
        weights = jnp.exp(masked_log_softmax(scores, axis=-1, where=where)) * scale
        weights = weights if where is None else jnp.where(where, weights, 0.0)
    else:
        scores = scores if where is None else jnp.where(where, scores, 0.0)
        if normalization == "l2_gelu":
            weights = jax.nn.gelu(_unit_rows(scores, epsilon) * scale, approximate=False)
        else:
            weights = _unit_rows(jax.nn.gelu(scores, approximate=False), epsilon) * scale
    return jnp.matmul(weights.astype(x.dtype), values, preferred_element_type=wide).astype(x.dtype)


def grow_parameter_tokens(
    key_tokens: ArrayLike,
    value_tokens: ArrayLike,
    extra: int,
    *,
    key: Array,
    value_std: float = 0.02,
) -> tuple[Array, Array]:
    r"""More pairs for `parameter_attention`, that do not change what it computes.

        K ← [K; 0],     V ← [V; N(0, value_std²)]

    A key of 0 has score 0, which leaves the norm as it was, and gelu(0) = 0: in the forms with gelu
    and with `scale` held, the outputs stay. The new keys learn from the first step on, since
    gelu'(0) = 1/2 and their values are not 0; the new values follow them.

    Args:
      key_tokens: K `[n, ...]` floating point.
      value_tokens: V `[n, ...]` floating point.
      extra: pairs to add, at least 0.
      key: a random key, for the new values.
      value_std: their standard deviation, at least 0. Default 0.02.

    Returns:
      K and V `[n + extra, ...]` in their types, the new pairs last.

    Raises:
      ValueError: numbers of tokens that differ, or an argument out of its range.
      TypeError: tokens that are not floating point.

    Use it with `scale` fixed at the value before, and `grow_optimizer_state` for what the optimizer
    remembers. Not with the softmax form, in which a score of 0 has weight.

    Cost: a copy of the tokens, once; `extra` (inputs + outputs) parameters more.

    Example:
      >>> tokens = jnp.ones((4, 2)), jnp.ones((4, 3))
      >>> keys, values = grow_parameter_tokens(*tokens, 2, key=jax.random.key(0))
      >>> print(keys.shape, values.shape, keys[-1])
      (6, 2) (6, 3) [0. 0.]

    Reference: Wang et al., "TokenFormer: Rethinking Transformer Scaling with Tokenized Model
    Parameters", 2024, arXiv:2410.23168.
    """
    check_floating(key_tokens=key_tokens, value_tokens=value_tokens)
    check_interval(0, jnp.inf, extra=extra, value_std=value_std)
    keys, values = jnp.asarray(key_tokens), jnp.asarray(value_tokens)
    if keys.ndim == 0 or values.ndim == 0 or keys.shape[0] != values.shape[0]:
        raise ValueError(
            "key_tokens and value_tokens must have shapes [n, ...], "
            f"got {keys.shape} and {values.shape}"
        )
    new_keys = jnp.zeros((extra, *keys.shape[1:]), keys.dtype)
    new_values = value_std * jax.random.normal(key, (extra, *values.shape[1:]), values.dtype)
    return jnp.concatenate([keys, new_keys]), jnp.concatenate([values, new_values])


def grow_optimizer_state(state: Any, grown: Any) -> Any:
    r"""An optimizer's state for parameters that became larger, with zeros for what is new.

    Args:
      state: the optax state, for the parameters as they were.
      grown: a state of the same tree for the parameters as they are now, of which only the shapes
        are read: `jax.eval_shape(optimizer.init, params)`.

    Returns:
      `state` with every array padded by zeros at the end of its axes to the shape that `grown` has.
      Counts and the moments of the old entries stay.

    Raises:
      ValueError: trees that differ, or an array that is to become smaller or of other rank.

    Use it after `grow_parameter_tokens`, to go on with the schedule and the moments of a run. Under
    Adam the new entries' moments start from 0 at a late count, which no bias correction makes up
    for: their first step is up to (1 - β1) / √(1 - β2) times the learning rate, 3.2 by default.

    Cost: a copy of the state, once.

    Example:
      >>> state = {"count": jnp.array(7), "mu": jnp.ones((2, 3))}
      >>> grown = {"count": jnp.array(0), "mu": jnp.ones((4, 3))}
      >>> print(grow_optimizer_state(state, grown)["mu"][:, 0])
      [1. 1. 0. 0.]

    Reference: Wang et al., "TokenFormer: Rethinking Transformer Scaling with Tokenized Model
    Parameters", 2024, arXiv:2410.23168.
    """
    structure: Any = jax.tree.structure(state)
    if jax.tree.structure(grown) != structure:
        raise ValueError(
            f"grown must have the tree structure {structure}, got {jax.tree.structure(grown)}"
        )

    def pad(path, leaf, target):
        old, new = np.shape(leaf), np.shape(target)
        if len(old) != len(new) or any(b < a for a, b in zip(old, new)):
            name = "grown" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} must be no smaller than {old} along any axis, got {new}")
        return leaf if old == new else jnp.pad(leaf, [(0, b - a) for a, b in zip(old, new)])

    return jax.tree_util.tree_map_with_path(pad, state, grown)
