"""Fixed-point numbers, and the shortest of their formats that a tensor can do with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype

ROUNDINGS = ("stochastic", "nearest")
STRATEGIES = ("min", "mean", "max")
MAX_LENGTH = 32
MIN_FRACTION = 4
BUFFER = 8


def fixed_point_quantize(
    x: ArrayLike,
    word_length: ArrayLike,
    fraction_length: ArrayLike,
    *,
    rounding: str = "stochastic",
    key: Array | None = None,
) -> Array:
    r"""Rounds to signed fixed-point numbers of WL bits, FL of them behind the point.

        y = clip(r(x 2^FL) 2^-FL, -2^(WL-FL-1), 2^(WL-FL-1) - 2^-FL)
        stochastic:  r(a) = ⌊a + u⌋, u ~ U[0, 1),  so that E[y] = x inside the range
        nearest:     the nearest integer, halves to the even one

    The gradient is straight-through: ∂y/∂x := 1.

    Args:
      x: floating point, of any shape.
      word_length: WL, integer in [1, 32]; may be traced, and broadcast to `x`.
      fraction_length: FL, integer in [0, 32], likewise. Above WL all numbers are below 1/2.
      rounding: "stochastic" (default) or "nearest".
      key: random key, for stochastic rounding.

    Returns:
      y with the shape and type of `x`, computed in at least float32. More than 24 significant bits
      are those of float32.

    Raises:
      ValueError: a length out of range, an unknown `rounding`, or no `key` where one is needed.
      TypeError: `x` not floating point, or lengths that are not integers.

    The format is given, and what exceeds it is clipped; `quantize` takes its scale from the data.

    Cost: one elementwise pass, with a random number for each entry if stochastic.

    Example:
      >>> x = jnp.array([0.3, -9.0, 9.0])
      >>> print(fixed_point_quantize(x, 8, 4, rounding="nearest"))
      [ 0.3125 -8.  7.9375]

    Reference: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015,
    arXiv:1502.02551; as the format of Kummer et al., "Adaptive Precision Training (AdaPT): A
    dynamic fixed point quantized training approach for DNNs", 2021, arXiv:2107.13490.
    """
    check_floating(x=x)
    check_length(1, MAX_LENGTH, word_length=word_length)
    check_length(0, MAX_LENGTH, fraction_length=fraction_length)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    x = jnp.asarray(x)
    wide = x.astype(compute_dtype(x))
    bits, fraction = jnp.asarray(word_length), jnp.asarray(fraction_length)
    scaled = jnp.ldexp(wide, fraction)
    if rounding == "nearest":
        codes = jnp.round(scaled)
    elif key is None:
        raise ValueError("key must be given for stochastic rounding, got None")
    else:
        codes = jnp.floor(scaled + jax.random.uniform(key, x.shape, wide.dtype))
    half_codes = jnp.ldexp(jnp.ones((), wide.dtype), bits - 1)
    codes = jnp.clip(codes, -half_codes, half_codes - 1)
    y = jnp.ldexp(codes, -fraction).astype(x.dtype)
    return _straight_through(x, y)


@jax.custom_jvp
def _straight_through(x: Array, y: Array) -> Array:
    del x
    return y


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return _straight_through(*primals), tangents[0]


def empirical_kl(x: ArrayLike, x_q: ArrayLike, *, resolution: int) -> Array:
    r"""What a histogram loses when its numbers are rounded.

        KL = Σ_b p_b log(p_b / q_b)

    for the shares p and q of the numbers of x and of x_q in `resolution` equal bins between the
    least and the largest x; what lies outside counts in the nearest bin.

    Args:
      x: floating point, of any shape.
      x_q: of the same shape, its rounded numbers.
      resolution: number of bins, at least 1.

    Returns:
      A scalar, at least float32, at least 0; infinite where a bin has lost all its numbers. 0 for
      no numbers, or equal ones, which fill one bin.

    Raises:
      ValueError: shapes that differ, or `resolution` below 1.
      TypeError: not floating point.

    More bins see finer changes. `push_down` looks for the shortest format without a loss.

    Cost: two histograms, each a pass with scattered additions; O(resolution) memory beside copies
    of the inputs.

    Example:
      >>> x = jnp.array([0.0, 0.2, 0.7, 1.0])
      >>> [float(empirical_kl(x, jnp.round(x), resolution=bins)) for bins in (2, 4)]
      [0.0, inf]

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    check_floating(x=x, x_q=x_q)
    check_shape(jnp.shape(x), x_q=x_q)
    check_interval(1, jnp.inf, resolution=resolution)
    return _empirical_kl(jnp.asarray(x), jnp.asarray(x_q), jnp.asarray(resolution), resolution)


def _empirical_kl(x: Array, x_q: Array, resolution: Array, bins: int) -> Array:
    """With the resolution traced, at most `bins`."""
    dtype = compute_dtype(x, x_q)
    x, x_q = x.astype(dtype).ravel(), x_q.astype(dtype).ravel()
    low = jnp.min(x, initial=jnp.inf)
    span = jnp.max(x, initial=-jnp.inf) - low
    width = jnp.where((span > 0) & jnp.isfinite(span), span, 1.0)

    def shares(values):
        # Clipped first: a number far outside has no integer bin.
        place = jnp.clip((values - low) / width, 0.0, 1.0) * resolution
        index = jnp.minimum(place.astype(jnp.int32), resolution - 1)
        return jnp.zeros(bins, dtype).at[index].add(1.0) / max(values.size, 1)

    p, q = shares(x), shares(x_q)
    kept = (p > 0) & (q > 0)
    terms = jnp.where(kept, p * jnp.log(jnp.where(kept, p, 1.0) / jnp.where(kept, q, 1.0)), 0.0)
    lost = jnp.any((p > 0) & (q == 0))
    return jnp.where(lost, jnp.inf, jnp.maximum(jnp.sum(terms), 0.0))


def gradient_diversity(gradients: Any) -> Array:
    r"""How much successive gradients contradict each other.

        Δ = Σ_k ‖g_k‖ / ‖Σ_k g_k‖

    Args:
      gradients: a tree of arrays `[K, ...]` floating point: K gradients.

    Returns:
      A scalar, at least float32 and at least 1: 1 for parallel gradients, √K for orthonormal ones,
      infinite where they cancel. 1 for no gradients, or zero ones.

    Raises:
      ValueError: no arrays, or arrays of different K.
      TypeError: not floating point.

    Use it on the last gradients to see whether steps still agree: near 1 short words move the
    weights, far above they need longer ones (`push_up`). `adapt_precision_update` sums as it goes
    and keeps none of the K.

    Cost: O(K n) time and memory, for K gradients of n entries that are kept.

    Example:
      >>> print(gradient_diversity(jnp.eye(4)))
      2.0

    Reference: Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning",
    2017, arXiv:1706.05699; with norms in place of their squares in Kummer et al., "Adaptive
    Precision Training (AdaPT): A dynamic fixed point quantized training approach for DNNs", 2021,
    arXiv:2107.13490.
    """
    leaves = jax.tree.leaves(gradients)
    counts = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"gradients must be arrays [K, ...] of one K, got leading axes {counts}")
    check_floating(**{f"gradients[{i}]": leaf for i, leaf in enumerate(leaves)})
    dtype = compute_dtype(*leaves)
    flat = [jnp.asarray(leaf, dtype).reshape(len(leaf), -1) for leaf in leaves]
    joined = jnp.concatenate(flat, axis=1)
    return diversity_of_norms(jnp.sum(norm_of(joined, axis=1)), norm_of(jnp.sum(joined, axis=0)))


def _root(x: Array) -> Array:
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def norm_of(x: Array, axis: int | None = None) -> Array:
    """The norm, without overflow or underflow of the squares."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0)
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    return jnp.squeeze(largest, axis) * _root(jnp.sum(jnp.square(scaled), axis=axis))


def diversity_of_norms(norms: Array, norm_of_sum: Array) -> Array:
    """The gradient diversity from the sum of the gradients' norms and the norm of their sum."""
    ratio = norms / jnp.where(norm_of_sum > 0, norm_of_sum, 1.0)
    infinite = jnp.where(norms > 0, jnp.inf, 1.0)
    return jnp.where(norm_of_sum > 0, jnp.maximum(ratio, 1.0), infinite)


def push_down(
    weights: ArrayLike,
    word_length: ArrayLike,
    fraction_length: ArrayLike,
    *,
    resolution: ArrayLike,
    key: Array,
    tolerance: float = 1e-2,
    max_resolution: int = 100,
) -> tuple[Array, Array]:
    r"""The shortest fixed-point format that a histogram of the weights does not tell from floats.

        FL ← least f in [4, FL] with KL(w, q(w; WL, f)) ≤ tolerance
        WL ← least l in [FL, WL] with KL(w, q(w; l, FL)) ≤ tolerance

    with stochastic rounding q, each found by bisection.

    Args:
      weights: floating point, of any shape.
      word_length, fraction_length: WL and FL, integers in [1, 32], the format to shorten.
      resolution: bins of `empirical_kl`, at least 1; may be traced.
      key: random key of the rounding.
      tolerance: what counts as no loss, at least 0. Default 1e-2: one number of a hundred may have
        moved to the next bin, as the rounding of numbers near an edge does.
      max_resolution: the bins to make room for, at least `resolution`. Default 100.

    Returns:
      WL and FL, int32 scalars, neither longer than given (FL at least 4).

    Raises:
      ValueError: a number out of its range.
      TypeError: not floating point, or lengths that are not integers.

    Use it on trained weights to find what they can be stored in; in training follow it by
    `push_up`, which gives steps room again, as `adapt_precision_update` does.

    Cost: 12 roundings of the weights (two bisections of six) with two histograms each.

    Example:
      >>> grid = jnp.arange(-8.0, 9.0) / 8
      >>> lengths = push_down(grid, 16, 12, resolution=10, key=jax.random.key(0))
      >>> [int(length) for length in lengths]
      [5, 4]

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    check_floating(weights=weights)
    check_length(1, MAX_LENGTH, word_length=word_length, fraction_length=fraction_length)
    check_length(1, max_resolution, resolution=resolution)
    check_interval(0, jnp.inf, tolerance=tolerance)
    w = jax.lax.stop_gradient(jnp.asarray(weights))
    bins = jnp.asarray(resolution, jnp.int32)

    def keeps(word, fraction, key):
        rounded = fixed_point_quantize(w, word, fraction, key=key)
        return _empirical_kl(w, rounded, bins, max_resolution) <= tolerance

    def least(low, high, key, test):
        def halve(i, ends):
            low, high = ends
            middle = (low + high) // 2
            open_, fits = low < high, test(middle, jax.random.fold_in(key, i))
            low = jnp.where(open_ & ~fits, middle + 1, low)
            return low, jnp.where(open_ & fits, middle, high)

        return jax.lax.fori_loop(0, MAX_LENGTH.bit_length(), halve, (low, high))[1]

    first, second = jax.random.split(key)
    word = jnp.asarray(word_length, jnp.int32)
    fraction = jnp.maximum(jnp.asarray(fraction_length, jnp.int32), MIN_FRACTION)
    fraction = least(
        jnp.asarray(MIN_FRACTION, jnp.int32), fraction, first, lambda f, key: keeps(word, f, key)
    )
    low = jnp.minimum(fraction, word)
    word = least(low, word, second, lambda length, key: keeps(length, fraction, key))
    return word, fraction


def push_up(
    word_length: ArrayLike,
    fraction_length: ArrayLike,
    diversity: ArrayLike,
    *,
    strategy: str | ArrayLike,
) -> tuple[Array, Array]:
    r"""A longer fixed-point format, so that small steps still move the weights.

        h = (ln Δ - 1)²,   s1 = max(⌈1/h⌉, 1),   s2 = max(min(⌈32 h⌉, 32) - FL, 0)
        s = min(s1, s2), ⌈(s1 + s2)/2⌉ or max(s1, s2) by the strategy, and 1 where ln Δ ≤ 1 or Δ = ∞
        FL ← min(FL + s, 24),   WL ← max(min(max(WL, FL + s) + 1, 32), FL + 8)

    so that eight bits before the point are left to sum products in.

    Args:
      word_length, fraction_length: WL and FL, integers in [1, 32].
      diversity: Δ, the `gradient_diversity` of the last gradients.
      strategy: "min", "mean" or "max", or its index.

    Returns:
      WL and FL, int32 scalars.

    Raises:
      ValueError: a length out of range, or an unknown strategy.
      TypeError: lengths that are not integers.

    Use it after `push_down` in training. "min" keeps words short; "max" gives most room when the
    loss no longer falls.

    Cost: a few scalars.

    Example:
      >>> [int(length) for length in push_up(8, 4, jnp.e**2, strategy="min")]
      [13, 5]

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    check_length(1, MAX_LENGTH, word_length=word_length, fraction_length=fraction_length)
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
        strategy = STRATEGIES.index(strategy)
    check_length(0, len(STRATEGIES) - 1, strategy=strategy)
    word = jnp.asarray(word_length, jnp.int32)
    fraction = jnp.asarray(fraction_length, jnp.int32)
    diversity = jnp.asarray(diversity, jnp.float32)
    grows = jnp.isfinite(diversity) & (diversity > jnp.e)
    excess = jnp.log(jnp.where(grows, diversity, jnp.e**2)) - 1
    square = jnp.maximum(jnp.square(excess), 1 / MAX_LENGTH**2)  # a longer step would be cut anyway
    s1 = jnp.ceil(1 / square).astype(jnp.int32)
    s2 = jnp.minimum(jnp.ceil(MAX_LENGTH * square), MAX_LENGTH).astype(jnp.int32) - fraction
    s2 = jnp.maximum(s2, 0)
    steps = jnp.stack([jnp.minimum(s1, s2), (s1 + s2 + 1) // 2, jnp.maximum(s1, s2)])
    step = jnp.where(grows, steps[strategy], 1)
    fraction = jnp.minimum(fraction + step, MAX_LENGTH)
    word = jnp.minimum(jnp.maximum(word, fraction) + 1, MAX_LENGTH)
    fraction = jnp.minimum(fraction, MAX_LENGTH - BUFFER)
    return jnp.maximum(jnp.minimum(fraction + BUFFER, MAX_LENGTH), word), fraction


def check_length(low: float, high: float, **values: Any) -> None:
    """Raises unless the values, where concrete, are integers in [low, high]."""
    for name, value in values.items():
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    check_interval(low, high, **values)
