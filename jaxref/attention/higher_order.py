"""Attention over pairs and tuples of keys, exact and in linear time by polynomials."""

from collections.abc import Sequence
from functools import reduce
from math import comb, exp

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.attention.dot_product import dot_product_attention
from jaxref.attention.linear import query_independent_mask, weighted_average
from jaxref.core.checks import (
    check_attention_arguments,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype

_MOST_FEATURES = 2**30  # numbers in one set of monomials: 4 GiB


def third_order_attention(
    query: ArrayLike,
    key1: ArrayLike,
    key2: ArrayLike,
    value1: ArrayLike,
    value2: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    mask1: ArrayLike | None = None,
    mask2: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    block_size: int | None = None,
) -> Array:
    r"""Softmax attention of queries over pairs of keys, averaging products of values.

    For each head, with elementwise products ⊙,

        y_i = Σ_{j,k} softmax_{j,k}(scale · Σ_l q_il a_jl b_kl) (u_j ⊙ v_k)

    for keys a, b and values u, v of the first and the second set: attention with the n² rows of
    the Khatri-Rao products of both key sets and both value sets. Pairs are formed `block_size` keys
    of the first set at a time, and again in the backward pass.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      key1: `[batch, k1_len, heads, head_dim]`; heads are not grouped.
      key2: `[batch, k2_len, heads, head_dim]`.
      value1: `[batch, k1_len, heads, value_dim]`.
      value2: `[batch, k2_len, heads, value_dim]`.
      mask: boolean, broadcastable to `[batch, heads, q_len, k1_len, k2_len]`; True where the query
        may see the pair. Default: everywhere.
      mask1, mask2: boolean, broadcastable to `[batch, heads, q_len, k1_len]` and
        `[..., k2_len]`: the keys of either set that the query may see, on top of `mask`.
      scale: a number; default `1 / head_dim`, the paper's.
      is_causal: query i sees the pairs with j ≤ i and k ≤ i only, all counted from the start.
      block_size: keys of the first set per block, at least 1. Default 16; a larger one is quicker
        where memory for `q_len · block_size · k2_len` weights allows.

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of the arguments, computed in at least
      float32; zeros for a query without any admitted pair.

    Raises:
      ValueError: shapes that do not match, heads that differ, or a `block_size` below 1.
      TypeError: an array that is not floating point, or a mask that is not boolean.

    Use it where what matters about a token shows in triples, which `dot_product_attention` cannot
    detect; `approximate_third_order_attention` is linear in the lengths for small entries.

    Cost: O(n³ · head_dim) time and O(n² · block_size) memory a head, for sets of n keys.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
      >>> one = jnp.ones((1, 1, 1, 1))
      >>> print(third_order_attention(x, x, one, x, one).round(2).ravel())  # pairs with a one
      [2.58 2.85 2.95]

    Reference: Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", 2023, arXiv:2310.04064.
    """
    _check_sets(query, (key1, key2), (value1, value2), (mask1, mask2))
    (batch, q_len, heads, head_dim), k1_len = jnp.shape(query), jnp.shape(key1)[1]
    k2_len, value_dim = jnp.shape(key2)[1], jnp.shape(value1)[3]
    check_broadcastable((batch, heads, q_len, k1_len, k2_len), mask=mask)
    if mask is not None and jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"mask must be boolean, got {jnp.result_type(mask).name}")
    block = min(16 if block_size is None else block_size, k1_len)
    check_interval(1, jnp.inf, block_size=block)
    scale = 1 / head_dim if scale is None else scale
    check_shape((), scale=scale)
    result_type = jnp.result_type(query, key1, key2, value1, value2)
    dtype = compute_dtype(query, key1, key2, value1, value2)
    arrays = (jnp.asarray(x, dtype).swapaxes(1, 2) for x in (query, key1, key2, value1, value2))
    query, key1, key2, value1, value2 = arrays  # [batch, heads, length, size] from here on
    query = query * scale

    blocks = -(-k1_len // block)
    missing = blocks * block - k1_len

    def split(x, axis):
        """The blocks of the first key set along `axis`, as leading axis."""
        x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    seen, first, second = _with_axes(mask, 5), _with_axes(mask1, 4), _with_axes(mask2, 4)
    first = jnp.broadcast_to(first, (*first.shape[:3], k1_len))  # the keys that fill up are not
    if is_causal:
        first = first & jnp.tri(q_len, k1_len, dtype=bool)
        second = second & jnp.tri(q_len, k2_len, dtype=bool)
    per_block = [split(key1, 2), split(value1, 2), split(first, 3)]
    if seen.shape[3] > 1:
        per_block.append(split(seen, 3))

    @jax.checkpoint
    def attend(carry, inputs):
        weighted, total, peak = carry
        key, value, admitted, *of_pairs = inputs
        admitted = admitted[..., None] & second[..., None, :] & (of_pairs[0] if of_pairs else seen)
        keys = key[:, :, :, None] * key2[:, :, None]
        logits = jnp.einsum("bhqd,bhjkd->bhqjk", query, keys)
        logits = jnp.where(admitted, logits, -jnp.inf)
        highest = jnp.maximum(peak, jax.lax.stop_gradient(jnp.max(logits, axis=(3, 4))))
        reference = jnp.where(highest > -jnp.inf, highest, 0)
        weights = jnp.exp(logits - reference[..., None, None])
        kept = jnp.exp(peak - reference)
        values = value[:, :, :, None] * value2[:, :, None]
        weighted = kept[..., None] * weighted + jnp.einsum("bhqjk,bhjkd->bhqd", weights, values)
        total = kept * total + jnp.sum(weights, axis=(3, 4))
        return (weighted, total, highest), None

    start = (
        jnp.zeros((batch, heads, q_len, value_dim), dtype),
        jnp.zeros((batch, heads, q_len), dtype),
        jnp.full((batch, heads, q_len), -jnp.inf, dtype),
    )
    (weighted, total, _), _ = jax.lax.scan(attend, start, tuple(per_block))
    output = weighted_average(weighted, total[..., None])
    return output.swapaxes(1, 2).astype(result_type)


def higher_order_attention(
    query: ArrayLike,
    keys: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    *,
    masks: Sequence[ArrayLike | None] | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    block_size: int | None = None,
) -> Array:
    r"""Softmax attention of queries over tuples with one key of each of p sets.

    For each head, with elementwise products ⊙ and one index for each set,

        y_i = Σ_{j1...jp} softmax(scale · Σ_l q_il a_{j1,l} ... z_{jp,l}) (u_{j1} ⊙ ... ⊙ w_{jp})

    One set is `dot_product_attention`, two are `third_order_attention`. Of more, all but the first
    are multiplied out beforehand.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point.
      keys: p arrays `[batch, k_len, heads, head_dim]`, p at least 1; lengths may differ.
      values: p arrays `[batch, k_len, heads, value_dim]`.
      masks: for each set None or boolean, broadcastable to `[batch, heads, q_len, k_len]`: the keys
        that a query may see. Default: all.
      scale: a number; default `1 / head_dim`, the paper's, at any order.
      is_causal: query i sees the tuples without a key later than i only.
      block_size: keys of the first set per block, at least 1. Default 16.

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of the arguments, computed in at least
      float32; zeros for a query without any admitted tuple.

    Raises:
      ValueError: no key set, as many values or masks as keys not given, shapes that do not match,
        or heads that differ.
      TypeError: an array that is not floating point, or a mask that is not boolean.

    Use it for orders above three on short sequences, where `third_order_attention` is not enough.

    Cost: O(n^(p+1) · head_dim) time and O(n^p · block_size) memory a head, for p sets of n keys.

    Example:
      >>> x = jnp.array([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1)
      >>> higher_order_attention(x, [x] * 3, [x] * 3).ravel().tolist()
      [1.0, 7.70, 8.0]

    Reference: Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", 2023, arXiv:2310.04064.
    """
    masks = [None] * len(keys) if masks is None else masks
    if not len(keys) == len(values) == len(masks) or not len(keys):
        raise ValueError(
            f"keys, values and masks must be as many, and at least one, "
            f"got {len(keys)}, {len(values)} and {len(masks)}"
        )
    _check_sets(query, keys, values, masks)
    _, q_len, _, head_dim = jnp.shape(query)
    scale = 1 / head_dim if scale is None else scale
    if len(keys) == 1:
        return dot_product_attention(
            query, keys[0], values[0], mask=masks[0], scale=scale, is_causal=is_causal
        )

    dtype = compute_dtype(query, *keys, *values)

    def tuples(sets: Sequence[ArrayLike]) -> Array:
        def pairs(x, y):
            z = x[:, :, None] * y[:, None]
            return z.reshape(z.shape[0], -1, *z.shape[3:])

        return reduce(pairs, (jnp.asarray(x, dtype) for x in sets))

    def admitted(mask: ArrayLike | None, key: ArrayLike) -> Array:
        k_len = jnp.shape(key)[1]
        admitted = _with_axes(mask, 4)
        admitted = jnp.broadcast_to(admitted, (*admitted.shape[:3], k_len))
        return admitted & jnp.tri(q_len, k_len, dtype=bool) if is_causal else admitted

    def all_admitted(x: Array, y: Array) -> Array:
        z = x[..., :, None] & y[..., None, :]
        return z.reshape(*z.shape[:3], -1)

    output = third_order_attention(
        jnp.asarray(query, dtype),
        jnp.asarray(keys[0], dtype),
        tuples(keys[1:]),
        jnp.asarray(values[0], dtype),
        tuples(values[1:]),
        mask1=admitted(masks[0], keys[0]),
        mask2=reduce(all_admitted, map(admitted, masks[1:], keys[1:])),
        scale=scale,
        block_size=block_size,
    )
    return output.astype(jnp.result_type(query, *keys, *values))


def polynomial_features(
    x: ArrayLike, degree: int, *, weighted: bool = False, scale: ArrayLike = 1.0
) -> Array:
    r"""All monomials of the entries of x up to a degree.

    For the multi-indices α with |α| = α_1 + ... + α_d ≤ g, by degree,

        x^α = Π_l x_l^α_l,   weighted:  scale^|α| x^α / Π_l α_l!

    The products of weighted features of q with plain ones of a, b, ... sum to the Taylor polynomial
    of degree g of exp(scale · Σ_l q_l a_l b_l ...).

    Args:
      x: `[..., d]` floating point; |x|^degree has to be finite.
      degree: g, at least 0.
      weighted: whether the monomials carry the polynomial's coefficients.
      scale: a number, used where `weighted`.

    Returns:
      `[..., C(d + g, g)]` in the type of `x`, computed in at least float32.

    Raises:
      ValueError: `x` is a scalar, or a negative `degree`.
      TypeError: `x` is not floating point.

    Use it as a feature map of `linear_attention`, or see
    `approximate_third_order_attention`, which does.

    Cost: C(d + g, g) numbers and about as many multiplications a vector: 4845 for d of 16 and g of
    4.

    Example:
      >>> print(polynomial_features(jnp.array([2.0, 3.0]), 2))
      [1. 2. 3. 4. 6. 9.]
      >>> print(polynomial_features(jnp.array([2.0, 3.0]), 2, weighted=True))
      [1. 2. 3. 2. 6. 4.5]

    Reference: Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", 2023, arXiv:2310.04064.
    """
    check_floating(x=x)
    check_interval(0, jnp.inf, degree=degree)
    check_shape((), scale=scale)
    if jnp.ndim(x) == 0:
        raise ValueError("x must have shape [..., d], got a scalar")
    x = jnp.asarray(x)
    wide = x.astype(compute_dtype(x))
    d = x.shape[-1]
    factors = wide * scale if weighted else wide
    monomials = [jnp.ones_like(wide[..., :1])]
    exponents = np.zeros((1, d), int)  # of the monomials of the latest degree
    for _ in range(degree):
        # Each once: multiplied by its last variable or a later one.
        last = np.where(exponents > 0, np.arange(d), 0).max(axis=1, initial=0)
        parents, variables = np.nonzero(np.arange(d) >= last[:, None])
        exponents = exponents[parents] + np.eye(d, dtype=int)[variables]
        grown = monomials[-1][..., parents] * factors[..., variables]
        if weighted:
            grown = grown / exponents[np.arange(len(variables)), variables].astype(wide.dtype)
        monomials.append(grown)
    return jnp.concatenate(monomials, axis=-1).astype(x.dtype)


def approximate_third_order_attention(
    query: ArrayLike,
    key1: ArrayLike,
    key2: ArrayLike,
    value1: ArrayLike,
    value2: ArrayLike,
    *,
    degree: int = 4,
    mask1: ArrayLike | None = None,
    mask2: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> Array:
    r"""Third-order attention with a Taylor polynomial for the exponential, in linear time.

    With the monomials φ of `polynomial_features`, weighted ones φ' for the query,

        exp(scale · Σ_l q_l a_l b_l) ≈ φ'(q) · (φ(a) ⊙ φ(b))
        y_i = φ'(q_i)ᵀ (φ(A)ᵀU ⊙ φ(B)ᵀV) / φ'(q_i)ᵀ (φ(A)ᵀ1 ⊙ φ(B)ᵀ1)

    for matrices A, B of keys and U, V of values: neither pairs nor weights are ever formed.

    Args:
      query: `[batch, q_len, heads, head_dim]` floating point, of small entries: the error grows
        with scale · head_dim · B³ for entries up to B, see `required_degree`.
      key1: `[batch, k1_len, heads, head_dim]`; heads are not grouped.
      key2: `[batch, k2_len, heads, head_dim]`.
      value1: `[batch, k1_len, heads, value_dim]`.
      value2: `[batch, k2_len, heads, value_dim]`.
      degree: g, even, at least 0, so that every weight is positive. Default 4.
      mask1, mask2: boolean, broadcastable to `[batch, heads, 1, k1_len]` and `[..., k2_len]`: the
        keys of either set that exist. They may not depend on the query.
      scale: a number; default `1 / head_dim`, the paper's.

    Returns:
      `[batch, q_len, heads, value_dim]` in the common type of the arguments, computed in at least
      float32; zeros for a query without any pair of keys.

    Raises:
      ValueError: shapes that do not match, heads that differ, an odd `degree`, a mask that depends
        on the query, or a set of features beyond 2^30 numbers (4 GiB).
      TypeError: an array that is not floating point, or a mask that is not boolean.

    Use it for long sequences with entries below about (log n)^(1/3); above that no algorithm is
    much faster than `third_order_attention`, if a widely held conjecture (SETH) is true.

    Cost: O(n r · value_dim) time and O(n r) memory a head, for n keys and the r features,
    C(head_dim + g, g): 4845 for heads of 16 and degree 4.

    Example:
      >>> x = jnp.array([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)
      >>> approximate_third_order_attention(x, x, x, x, x).ravel().tolist()
      [0.0401, 0.0401, 0.0402]

    Reference: Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", 2023, arXiv:2310.04064.
    """
    _check_sets(query, (key1, key2), (value1, value2), (mask1, mask2))
    check_interval(0, jnp.inf, degree=degree)
    if degree % 2:
        raise ValueError(f"degree must be even, so that all weights are positive, got {degree}")
    batch, q_len, heads, head_dim = jnp.shape(query)
    longest = max(q_len, jnp.shape(key1)[1], jnp.shape(key2)[1])
    numbers = batch * longest * heads * comb(head_dim + degree, degree)
    if numbers > _MOST_FEATURES:
        raise ValueError(
            f"degree {degree} takes {numbers} features for queries of shape {jnp.shape(query)}, "
            f"more than {_MOST_FEATURES}"
        )
    scale = 1 / head_dim if scale is None else scale
    result_type = jnp.result_type(query, key1, key2, value1, value2)
    dtype = compute_dtype(query, key1, key2, value1, value2)

    def state(key: ArrayLike, value: ArrayLike, **mask: ArrayLike | None) -> Array:
        features = polynomial_features(jnp.asarray(key, dtype), degree)
        ((name, exists),) = mask.items()
        if exists is not None:
            features = jnp.where(query_independent_mask(**{name: exists}), features, 0)
        value = jnp.asarray(value, dtype)
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        return jnp.einsum("bkhr,bkhv->bhrv", features, value)

    features = polynomial_features(jnp.asarray(query, dtype), degree, weighted=True, scale=scale)
    states = state(key1, value1, mask1=mask1) * state(key2, value2, mask2=mask2)
    summed = jnp.einsum("bqhr,bhrv->bqhv", features, states)
    return weighted_average(summed[..., :-1], summed[..., -1:]).astype(result_type)


def required_degree(
    entry_bound: float, dimension: int, epsilon: float, *, scale: float | None = None
) -> int:
    r"""The smallest even degree whose Taylor polynomial is as close to the exponential as asked.

    For logits of size up to X = scale · d · B³, of queries and two key sets of entries up to B,

        |exp(x) - Σ_{m ≤ g} x^m / m!| ≤ X^(g+1) e^X / (g + 1)! ≤ ε

    Args:
      entry_bound: B at least 0.
      dimension: d, the size of a head, at least 1.
      epsilon: ε above 0, the error of a weight exp(x).
      scale: the scale of the logits, above 0. Default 1 / d, with which d drops out.

    Returns:
      g, an int.

    Raises:
      ValueError: an argument out of its range, or X above 100, where the polynomial is no
        approximation of use.

    Use it to choose the `degree` of `approximate_third_order_attention`.

    Cost: g / 2 steps on the host, before the model is built.

    Example:
      >>> required_degree(1.0, 64, 1e-3), required_degree(2.0, 64, 1e-3)
      (6, 32)

    Reference: Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", 2023, arXiv:2310.04064.
    """
    check_interval(0, jnp.inf, entry_bound=entry_bound)
    check_interval(1, jnp.inf, dimension=dimension)
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    scale = 1 / dimension if scale is None else scale
    check_interval(0, jnp.inf, closed="neither", scale=scale)
    largest = scale * dimension * entry_bound**3
    if largest > 100:
        raise ValueError(
            f"entry_bound must leave logits of at most 100, got {entry_bound} with logits up to "
            f"{largest}"
        )
    degree, remainder = 0, largest * exp(largest)
    while remainder > epsilon:
        degree += 2
        remainder *= largest**2 / (degree * (degree + 1))
    return degree


def match_three_embedding(values: ArrayLike, modulus: int) -> tuple[Array, Array, Array]:
    r"""Query and key features that show which triples of integers sum to 0 modulo M.

        q = (c, -c, -s, -s),   a = (c, s, c, s),   b = (c, s, s, c),   c, s = cos, sin(2π x / M)
        Σ_l q_l(x) a_l(y) b_l(z) = cos(2π (x + y + z) / M)

    largest, namely 1, where x + y + z is a multiple of M.

    Args:
      values: x, integer `[...]`.
      modulus: M, at least 1.

    Returns:
      Features `[..., 4]` of query, first and second key, in float32.

    Raises:
      ValueError: `modulus` below 1.
      TypeError: `values` are not integers.

    Use it with a large scale in `third_order_attention`: one layer then finds the triples, where a
    layer over single keys needs heads and features that grow with the length of the sequence.

    Cost: 12 numbers a token, elementwise.

    Example:
      >>> query, key1, key2 = match_three_embedding(jnp.array([1, 2, 4]), 7)
      >>> print((query[0] * key1[1] * key2[2]).sum().round(4))
      1.0

    Reference: Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", 2023, arXiv:2310.04064.
    """
    check_interval(1, jnp.inf, modulus=modulus)
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"values must be integers, got {values.dtype.name}")
    angles = (values % modulus).astype(float) * (2 * np.pi / modulus)
    c, s = jnp.cos(angles), jnp.sin(angles)
    stacked = ((c, -c, -s, -s), (c, s, c, s), (c, s, s, c))
    query, key1, key2 = (jnp.stack(features, axis=-1) for features in stacked)
    return query, key1, key2


def _check_sets(
    query: ArrayLike,
    keys: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    masks: Sequence[ArrayLike | None],
) -> None:
    """Raises unless query and key sets fit together, with as many heads each."""
    for number, (key, value, mask) in enumerate(zip(keys, values, masks), 1):
        try:
            check_attention_arguments(query, key, value, mask=mask)
        except (TypeError, ValueError) as error:
            raise type(error)(f"in key set {number}: {error}") from None
        if jnp.shape(key)[2] != jnp.shape(query)[2]:
            raise ValueError(
                f"in key set {number}: key must have the query's {jnp.shape(query)[2]} heads, "
                f"got {jnp.shape(key)[2]}"
            )
        check_shape((*jnp.shape(value)[:3], jnp.shape(values[0])[3]), **{f"value{number}": value})


def _with_axes(mask: ArrayLike | None, ndim: int) -> Array:
    """The mask, or one that admits everything, with leading axes of size 1 up to `ndim`."""
    mask = jnp.asarray(True if mask is None else mask)
    return mask.reshape((1,) * (ndim - mask.ndim) + mask.shape)
