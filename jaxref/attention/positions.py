"""Position information for attention: rotations, vectors and biases by distance."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import digamma
from jax.typing import ArrayLike

from jaxref.attention.dot_product import dot_product_attention
from jaxref.core.checks import (
    check_attention_arguments,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype


def rotary_embedding(
    x: ArrayLike, positions: ArrayLike | None = None, *, base: float = 10000.0
) -> Array:
    r"""Rotates pairs of features of query or key by angles proportional to the position (RoPE).

    Feature i of the first half of `head_dim` = d is paired with feature i of the second half, and
    the pair at position t is turned by the angle t θ_i:

        (x_i, x_{i+d/2}) → (x_i cos tθ_i - x_{i+d/2} sin tθ_i,  x_i sin tθ_i + x_{i+d/2} cos tθ_i)
        θ_i = base^(-2i/d),   i = 0 ... d/2 - 1

    so that the product of a rotated query and a rotated key depends on the distance of their
    positions alone.

    Args:
      x: query or key `[batch, length, heads, head_dim]`, floating point, `head_dim` even.
      positions: integer or floating `[length]` or `[batch, length]`. Default: 0 ... length - 1.
      base: above 1; the longest wavelength is 2π base^(1-2/d) positions. Default 10000, the
        paper's.

    Returns:
      The rotated array of the shape and type of `x`, computed in at least float32.

    Raises:
      ValueError: `x` without four axes or with an odd `head_dim`, positions of another shape, or
        `base` at most 1.
      TypeError: `x` is not floating point.

    Use it on query and key before any attention; it adds no parameters and no length limit. The
    pairing by halves is that of Llama and Gemma; the paper pairs neighbours, which is the same up
    to a permutation of the features.

    Cost: four multiplications for each pair of features, and a table of [length, head_dim / 2]
    angles.

    Example:
      >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
      >>> rotary_embedding(x, jnp.array([2]))[0, 0, 0].tolist()  # cos 2, sin 2
      [-0.416, 0.909]

    Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    arXiv:2104.09864.
    """
    check_floating(x=x)
    check_interval(1, jnp.inf, closed="right", base=base)
    x = jnp.asarray(x)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(
            f"x must have shape [batch, length, heads, even head_dim], got {tuple(x.shape)}"
        )
    length, half = x.shape[1], x.shape[-1] // 2
    positions = np.arange(length) if positions is None else jnp.asarray(positions)
    if positions.shape not in ((length,), (x.shape[0], length)):
        raise ValueError(
            f"positions must have shape {(length,)} or {(x.shape[0], length)}, "
            f"got {tuple(positions.shape)}"
        )
    dtype = compute_dtype(x)
    frequencies = base ** (-np.arange(half) / half)
    angles = positions[..., None, None] * frequencies  # [(batch,) length, 1, half]
    # Known positions make the tables constants: XLA's CPU backend would otherwise take the cosines
    # again for every example and head.
    numpy = np if isinstance(angles, np.ndarray) else jnp
    cos, sin = numpy.cos(angles).astype(dtype), numpy.sin(angles).astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def sinusoidal_position_embedding(length: int, dim: int, *, base: float = 10000.0) -> Array:
    r"""Fixed position vectors: sines and cosines of the position at wavelengths of all sizes.

    With positions t = 0 ... length - 1 and features i = 0 ... dim - 1,

        e_{t,2i} = sin(t / base^(2i/dim)),   e_{t,2i+1} = cos(t / base^(2i/dim))

    Args:
      length: the number of positions, at least 0.
      dim: size of a vector, at least 1. An odd one ends in a sine without its cosine.
      base: above 1; the longest wavelength is 2π base, short of it by a factor base^(2/dim).
        Default 10000, the paper's.

    Returns:
      `[length, dim]` in float32, exact to its rounding at any position.

    Raises:
      ValueError: a size out of range, or `base` at most 1.

    Use it on the embeddings of a sequence, or of the patches of an image in reading order, added
    ahead of the first layer. `rotary_embedding` acts on query and key instead, so that attention
    sees distances alone.

    Cost: length · dim numbers, made once on the host; nothing to learn.

    For the next token of a generation take a row.

    Example:
      >>> print(sinusoidal_position_embedding(2, 4))
      [[0.     1.     0.     1.    ]
       [0.841  0.540  0.010  1.000 ]]

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.
    """
    check_interval(0, jnp.inf, length=length)
    check_interval(1, jnp.inf, dim=dim)
    check_interval(1, jnp.inf, closed="right", base=base)
    frequencies = base ** (-2.0 * (np.arange(dim) // 2) / dim)
    angles = np.arange(length)[:, None] * frequencies
    table = np.where(np.arange(dim) % 2 == 0, np.sin(angles), np.cos(angles))
    return jnp.asarray(table, jnp.float32)


def alibi_slopes(num_heads: int, kind: str = "geometric") -> Array:
    r"""How fast each head loses interest with distance: the factors of ALiBi's biases.

    For the heads h = 1 ... H,

        geometric:  m_h = 2^(-8h/H)        harmonic:  m_h = 1/h

    The geometric form is ALiBi's. Where H is no power of two it takes the slopes of the power of
    two below, C, followed by the 1st, 3rd, 5th ... of those of 2C, as released models do.

    Args:
      num_heads: H, at least 1.
      kind: "geometric" or "harmonic".

    Returns:
      m `[num_heads]` in float32, all in (0, 1].

    Raises:
      ValueError: `num_heads` below 1, or another `kind`.

    Use it to see what `harmonic_alibi_bias` multiplies by, or to start slopes that are learnt.
    With 16 heads the geometric ones fall from 0.71 to 1/256, the harmonic ones from 1 to 1/16.

    Cost: H numbers, made once on the host.

    Example:
      >>> print(alibi_slopes(4))
      [0.25       0.0625     0.015625   0.00390625]
      >>> print(alibi_slopes(4, "harmonic"))
      [1.         0.5        0.33333334 0.25      ]

    Reference: Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases Enables
    Input Length Extrapolation", 2021, arXiv:2108.12409; the harmonic form after Li, "The Nature of
    Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI", 2024,
    arXiv:2410.18441.
    """
    check_interval(1, jnp.inf, num_heads=num_heads)
    if kind == "harmonic":
        slopes = 1 / np.arange(1, num_heads + 1)
    elif kind == "geometric":
        power_below = 2 ** int(np.log2(num_heads))
        heads = np.arange(1, power_below + 1)
        between = heads[: num_heads - power_below] - 0.5
        slopes = 2.0 ** (-8 * np.concatenate([heads, between]) / power_below)
    else:
        raise ValueError(f"kind must be 'geometric' or 'harmonic', got {kind!r}")
    return jnp.asarray(slopes, jnp.float32)


def harmonic_alibi_bias(
    num_heads: int,
    q_len: int,
    k_len: int,
    *,
    slopes: str | ArrayLike = "harmonic",
    distance: str = "harmonic",
    query_positions: ArrayLike | None = None,
) -> Array:
    r"""Biases on the logits of attention that fall with distance: ALiBi, with a harmonic series.

    For head h, a query at position i and a key at position j,

        b_hij = -m_h δ(|i - j|),   δ(n) = H(n) = 1 + 1/2 + ... + 1/n  (harmonic)  or  n  (linear)

    H(0) = 0, and H grows like log n: a weight exp(b) falls as a power of the distance where the
    linear bias makes it fall exponentially, so that far keys stay visible.

    Args:
      num_heads: the number of heads, at least 1.
      q_len: queries.
      k_len: keys; they stand at 0 ... k_len - 1.
      slopes: m, "harmonic" or "geometric" (see `alibi_slopes`), or numbers `[num_heads]`.
      distance: δ, "harmonic" or "linear". With geometric slopes the linear one is ALiBi.
      query_positions: integer `[q_len]` or `[batch, q_len]`, where the queries stand. Default:
        0 ... q_len - 1.

    Returns:
      b `[num_heads, q_len, k_len]`, with a leading batch axis where `query_positions` have one;
      float32 unless `slopes` are wider. A key behind its query is as far as one ahead of it.

    Raises:
      ValueError: a size below 1, slopes or positions of another shape, or an unknown name.
      TypeError: `query_positions` are not integers, or `slopes` not floating point.

    Use it as `bias` of any attention, or as `position_bias` of `jaxref.nn.MultiHeadAttention`;
    `rope_alibi_attention` has it together with the rotation.

    Cost: num_heads · q_len · k_len numbers, which every attention that takes them reads.

    Example:
      >>> print(harmonic_alibi_bias(1, 3, 3)[0].round(2))
      [[-0.  -1.  -1.5]
       [-1.  -0.  -1. ]
       [-1.5 -1.  -0. ]]
      >>> print(harmonic_alibi_bias(1, 1, 3, query_positions=jnp.array([2]))[0].round(2))
      [[-1.5 -1.  -0. ]]

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441, after Press, Smith, Lewis, "Train Short, Test Long:
    Attention with Linear Biases Enables Input Length Extrapolation", 2021, arXiv:2108.12409.
    """
    check_interval(1, jnp.inf, num_heads=num_heads, q_len=q_len, k_len=k_len)
    if distance not in ("harmonic", "linear"):
        raise ValueError(f"distance must be 'harmonic' or 'linear', got {distance!r}")
    if isinstance(slopes, str):
        if slopes not in ("harmonic", "geometric"):
            raise ValueError(
                f"slopes must be 'harmonic', 'geometric' or numbers [num_heads], got {slopes!r}"
            )
        slopes = alibi_slopes(num_heads, slopes)
    check_floating(slopes=slopes)
    check_shape((num_heads,), slopes=slopes)
    slopes = jnp.asarray(slopes, compute_dtype(slopes))
    positions = _query_positions(query_positions, q_len)
    apart = jnp.abs(positions[..., None] - jnp.arange(k_len)).astype(slopes.dtype)
    if distance == "harmonic":  # H(n) = ψ(n + 1) - ψ(1), which needs no table for any position
        apart = jnp.where(apart > 0, digamma(apart + 1) + np.euler_gamma, 0.0)
    return -slopes[:, None, None] * apart[..., None, :, :]


def rope_alibi_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mixing: ArrayLike = 1.0,
    slopes: str | ArrayLike = "harmonic",
    distance: str = "harmonic",
    base: float = 10000.0,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = True,
    query_positions: ArrayLike | None = None,
) -> Array:
    r"""Attention that knows positions in two ways: rotated features, and a bias by distance.

    For head h, a query q_i at position i and a key k_j at position j,

        softmax_j(mixing · scale · ⟨R_i q_i, R_j k_j⟩ - m_h δ(|i - j|) + bias) V

    with the rotations R of `rotary_embedding` and the slopes m and distances δ of
    `harmonic_alibi_bias`. Both parts depend on i - j alone. With slopes of 0 it is attention with
    rotary positions; with `mixing` 0 it averages by distance, whatever is in query and key.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point, `head_dim` even.
      key: `[batch, k_len, kv_heads, head_dim]`, at positions 0 ... k_len - 1; `kv_heads` a divisor
        of `heads`.
      value: `[batch, k_len, kv_heads, value_dim]`.
      mixing: a number, the share of the rotated part against the biases. Default 1.
      slopes: m, "harmonic" or "geometric", or numbers `[heads]`. Default harmonic.
      distance: δ, "harmonic" or "linear". Default harmonic.
      base: of the wavelengths of the rotation, above 1. Default 10000.
      bias: added to the logits, broadcastable to `[batch, heads, q_len, k_len]`.
      mask: boolean, broadcastable to `[batch, heads, q_len, k_len]`; True where the query may see
        the key.
      scale: a number; default `1 / sqrt(head_dim)`.
      is_causal: a query sees no key at a later position than its own. Default True.
      query_positions: integer `[q_len]` or `[batch, q_len]`, where the queries stand, for a step of
        a generation. Default: 0 ... q_len - 1.

    Returns:
      `[batch, q_len, heads, value_dim]` as `dot_product_attention` does; zeros for a query without
      any admitted key.

    Raises:
      ValueError: shapes that do not match, an odd `head_dim`, or an argument out of its range.
      TypeError: an array that is not floating point, a `mask` that is not boolean, or positions
        that are not integers.

    Use it for sequences longer than those trained on, where rotated features alone meet angles that
    they have never seen and the bias keeps attention near.

    Cost: that of `dot_product_attention`, with a bias of heads · q_len · k_len numbers and a
    rotation of query and key.

    Example:
      >>> x = jnp.ones((1, 3, 1, 2))
      >>> value = jnp.array([6.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
      >>> attend = lambda **kw: rope_alibi_attention(x, x, value, mixing=0.0, **kw).ravel()
      >>> print(attend(slopes=jnp.zeros(1)))
      [6.  3.  2.]
      >>> print(attend())
      [6.   1.61  0.84]

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    check_attention_arguments(query, key, value, bias=bias, mask=mask)
    check_shape((), mixing=mixing)
    check_interval(-jnp.inf, jnp.inf, mixing=mixing)
    (_, q_len, heads, head_dim), k_len = jnp.shape(query), jnp.shape(key)[1]
    distance_bias = harmonic_alibi_bias(
        heads, q_len, k_len, slopes=slopes, distance=distance, query_positions=query_positions
    )
    if is_causal and query_positions is not None:
        positions = _query_positions(query_positions, q_len)
        seen = jnp.arange(k_len) <= positions[..., None, :, None]
        mask = seen if mask is None else seen & mask
    return dot_product_attention(
        rotary_embedding(query, query_positions, base=base),
        rotary_embedding(key, base=base),
        value,
        bias=distance_bias if bias is None else distance_bias + bias,
        mask=mask,
        scale=mixing * (head_dim**-0.5 if scale is None else scale),
        is_causal=is_causal and query_positions is None,
    )


def _query_positions(positions: ArrayLike | None, q_len: int) -> Array:
    """Integer positions `[q_len]` or `[batch, q_len]`; by default they count from 0."""
    if positions is None:
        return jnp.arange(q_len)
    if not jnp.issubdtype(jnp.result_type(positions), jnp.integer):
        raise TypeError(f"query_positions must be integers, got {jnp.result_type(positions).name}")
    shape = jnp.shape(positions)
    if len(shape) not in (1, 2) or shape[-1] != q_len:
        raise ValueError(
            f"query_positions must have shape [{q_len}] or [batch, {q_len}], got {shape}"
        )
    return jnp.asarray(positions)
