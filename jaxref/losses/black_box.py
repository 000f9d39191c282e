"""Proper losses of generative models that can only be sampled, over a finite alphabet.

Neither the model's probabilities p nor the targets' q are known, but draws of both. A loss of draws
is proper if its expectation is least at p = q. These have no gradient: they evaluate and compare
models. Symbols are integer ids.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import gammainc
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape

Monomial = tuple[tuple[int, ...], tuple[int, ...]]


def power_estimator(counts: ArrayLike, exponents: Sequence[int]) -> Array:
    r"""An unbiased estimate of a monomial of probabilities, from counts of draws.

        E[Π_i c_i (c_i - 1) ··· (c_i - a_i + 1) / (n (n - 1) ··· (n - a + 1))] = Π_i p_i^{a_i}

    with the counts c of n independent draws, the exponents a_i and a = Σ_i a_i. It is the share of
    ordered draws of a that are a_i of each symbol i.

    Args:
      counts: c `[..., symbols]`, integers at least 0 that sum to n.
      exponents: a_i, integers at least 0, one for each symbol.

    Returns:
      `[...]` estimates, at least 0, in float32 (float64 where that is enabled and `counts` are so).
      NaN where n is below a, if that is not known when it is called.

    Raises:
      ValueError: exponents of another number than the symbols or negative, negative counts, or less
        than a draws.

    Use it to build losses that are polynomials of p and q, as all are of draws of a fixed number:
    `black_box_polynomial_loss` sums several of them.

    Cost: O(a) for each row of counts, unrolled when it is traced.

    Example:
      >>> print(power_estimator(jnp.array([2, 1, 1]), (1, 1, 0)).round(4))
      0.1667

    Reference: Kimpara, Frongillo, Waggoner, "Proper losses for discrete generative models", 2022,
    arXiv:2211.03761.
    """
    c = _checked_counts(exponents, counts=counts)
    n, degree = jnp.sum(c, axis=-1), sum(exponents)
    estimate = jnp.ones_like(n)
    drawn = 0
    for i, exponent in enumerate(exponents):
        for j in range(exponent):
            estimate *= jnp.maximum(c[..., i] - j, 0) / jnp.maximum(n - drawn, 1)
            drawn += 1
    return jnp.where(n >= degree, estimate, jnp.nan)


def black_box_polynomial_loss(
    model_counts: ArrayLike, target_counts: ArrayLike, coefficients: Mapping[Monomial, float]
) -> Array:
    r"""An unbiased estimate of a polynomial of the model's and the targets' probabilities.

        E L = Σ_{(a, b)} k_{ab} Π_i p_i^{a_i} q_i^{b_i}

    It is proper if that polynomial is least at p = q. No loss of n draws of the model and m of the
    targets has an expectation that is not such a polynomial, of degree at most n in p and m in q;
    cross-entropy is none.

    Args:
      model_counts: `[..., symbols]`, integers at least 0: how often the model drew each.
      target_counts: `[..., symbols]`, of the targets.
      coefficients: k by the exponents (a, b), each a tuple with one integer for each symbol.

    Returns:
      `[...]` losses in float32 (float64 where that is enabled and the counts are so).

    Raises:
      ValueError: no coefficients, or what `power_estimator` raises: above all, fewer draws than the
        degree.

    Use it for a loss of one's own, such as Σ_i (p_i - q_i)⁴; `black_box_squared_loss` is the
    simplest one.

    Cost: two `power_estimator` a monomial, so that time goes by the sum of all degrees.

    Example:
      >>> squares = {((2, 0), (0, 0)): 1.0, ((0, 2), (0, 0)): 1.0}
      >>> products = {((1, 0), (1, 0)): -2.0, ((0, 1), (0, 1)): -2.0}
      >>> loss = black_box_polynomial_loss(
      ...     jnp.array([2, 1]), jnp.array([1, 0]), squares | products
      ... )
      >>> print(loss.round(4))  # as black_box_squared_loss of [0, 0, 1] and [0]
      -1.0

    Reference: Kimpara, Frongillo, Waggoner, "Proper losses for discrete generative models", 2022,
    arXiv:2211.03761.
    """
    if not coefficients:
        raise ValueError("coefficients must hold at least one monomial, got none")
    terms = [
        coefficient * power_estimator(model_counts, a) * power_estimator(target_counts, b)
        for (a, b), coefficient in coefficients.items()
    ]
    return jnp.sum(jnp.stack(jnp.broadcast_arrays(*terms)), axis=0)


def black_box_squared_loss(
    model_samples: ArrayLike, target_samples: ArrayLike, *, num_categories: int | None = None
) -> Array:
    r"""An unbiased estimate of the squared distance of two distributions, less a constant.

        L = Σ_i c_i (c_i - 1) / (n (n - 1)) - 2 Σ_i c_i d_i / (n m),   E L = |p - q|² - |q|²

    with the counts c of n draws of the model, and d of m draws of the targets: how often two draws
    of the model are equal, less twice how often one of each are. Setting p to c / n in |p - q|²
    instead is not proper; it favours models that repeat themselves.

    Args:
      model_samples: integer ids `[..., n]`, n at least 2.
      target_samples: integer ids `[..., m]`, m at least 1.
      num_categories: the number of ids, to compare by counts; ids outside of [0, num_categories)
        give NaN. Default: by pairs, for any ids and an alphabet of any size, in O(n² + n m).

    Returns:
      `[...]` losses from -2 to 1 in float32; lower is better.

    Raises:
      ValueError: fewer draws than those, other leading axes, or `num_categories` below 1.
      TypeError: samples that are not integers.

    Use it to compare generators whose likelihood is unknown, on any number of draws; unlike
    `sequential_cross_entropy` it needs no luck to be finite.

    Cost: O(n² + n m) comparisons of pairs; with `num_categories` K, O((n + m) K).

    Example:
      >>> print(black_box_squared_loss(jnp.array([0, 0, 1]), jnp.array([0])).round(4))
      -1.0

    Reference: Kimpara, Frongillo, Waggoner, "Proper losses for discrete generative models", 2022,
    arXiv:2211.03761.
    """
    x = _checked_ids(model_samples=model_samples)
    y = _checked_ids(target_samples=target_samples)
    n, m = (z.shape[-1] if z.ndim else 0 for z in (x, y))
    check_interval(2, jnp.inf, number_of_model_samples=n)
    check_interval(1, jnp.inf, number_of_target_samples=m)
    check_shape((*x.shape[:-1], m), target_samples=y)
    if num_categories is None:
        equal = jnp.sum(x[..., :, None] == x[..., None, :], axis=(-2, -1)) - n
        shared = jnp.sum(x[..., :, None] == y[..., None, :], axis=(-2, -1))
        own = equal.astype(jnp.float32)
    else:
        check_interval(1, jnp.inf, num_categories=num_categories)
        known = jnp.all((x >= 0) & (x < num_categories), axis=-1)
        known &= jnp.all((y >= 0) & (y < num_categories), axis=-1)
        symbols = jnp.arange(num_categories)
        c, d = (jnp.sum(z[..., None] == symbols, axis=-2) for z in (x, y))
        c, d = c.astype(jnp.float32), d.astype(jnp.float32)
        own = jnp.where(known, jnp.sum(c * (c - 1), axis=-1), jnp.nan)
        shared = jnp.sum(c * d, axis=-1)
    return own / (n * (n - 1)) - 2 * shared / (n * m)


def random_size_cross_entropy(
    sample_fn: Callable[[Array], Array], target_samples: ArrayLike, *, key: Array, rate: float
) -> Array:
    r"""An unbiased estimate of cross-entropy from a random number of draws (Poisson sampling).

        L = Σ_{k=1}^{K} 1[Y not in X_1 ... X_k] / (k P(K ≥ k)),   E L = -log p_Y

    for the target Y and K draws X of the model, K from a Poisson distribution. No fixed number of
    draws gives cross-entropy. By -log p = Σ_{k≥1} (1 - p)^k / k, of which the k-th term is seen
    with probability P(K ≥ k).

    Args:
      sample_fn: draws from the model: from a key, ids of the shape of `target_samples`, one draw
        for each target, independent of those of other keys.
      target_samples: integer ids `[...]`, Y.
      key: of all random numbers.
      rate: the mean of K, above 0. A small one leaves the whole sum to rare, large values: use
        several times 1 / p.

    Returns:
      `[...]` losses in float32, at least 0: their mean over targets estimates the cross-entropy.

    Raises:
      ValueError: a `rate` that is not positive.
      TypeError: targets that are not integers.

    Use it where the number of draws has to be settled before they are seen;
    `sequential_cross_entropy` stops at the first hit, and varies much less.

    Cost: rounds of one draw for every target, until the last is hit or out of draws: at most the
    largest K of the batch.

    Example:
      >>> fair_die = lambda key: jax.random.randint(key, (5000,), 0, 6)
      >>> targets = jnp.zeros(5000, int)
      >>> losses = random_size_cross_entropy(fair_die, targets, key=jax.random.key(0), rate=20.0)
      >>> print(abs(losses.mean() - jnp.log(6.0)) < 0.1)
      True

    Reference: Kimpara, Frongillo, Waggoner, "Proper losses for discrete generative models", 2022,
    arXiv:2211.03761.
    """
    check_interval(0, jnp.inf, closed="right", rate=rate)
    targets = _checked_ids(target_samples=target_samples)
    size_key, draw_key = jax.random.split(key)
    sizes = jax.random.poisson(size_key, rate, targets.shape)

    def draw(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        k, missing, loss = carry
        drawn = sample_fn(jax.random.fold_in(draw_key, k))
        missing = missing & (drawn != targets) & (k <= sizes)
        term = 1 / (k * gammainc(k.astype(jnp.float32), rate))  # P(K ≥ k)
        return k + 1, missing, loss + jnp.where(missing, term, 0.0)

    start = (jnp.int32(1), sizes > 0, jnp.zeros(targets.shape, jnp.float32))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), draw, start)[2]


def sequential_cross_entropy(model_samples: ArrayLike, target_samples: ArrayLike) -> Array:
    r"""An unbiased estimate of cross-entropy from draws until the target appears.

        L = Σ_{k=1}^{T-1} 1/k,   E L = -log p_Y,   T = first draw that is Y

    Args:
      model_samples: integer ids `[..., draws]`, in the order of drawing; those behind the first hit
        are no matter.
      target_samples: integer ids `[...]`, Y.

    Returns:
      `[...]` losses in float32; ∞ where no draw is the target: draw more then, as leaving those
      targets out is biased. Their mean over targets estimates the cross-entropy.

    Raises:
      ValueError: shapes that do not match.
      TypeError: samples that are not integers.

    Use it to estimate the likelihood of a sampler for symbols that it draws often enough, at about
    1 / p draws each; `black_box_squared_loss` takes any number of draws.

    Cost: one pass over the draws, and what those took: about 1 / p of the model for each target.

    Example:
      >>> draws = jnp.array([[2, 0, 1, 1], [1, 0, 0, 0]])
      >>> print(sequential_cross_entropy(draws, jnp.array([1, 1])))
      [1.5 0. ]

    Reference: Kimpara, Frongillo, Waggoner, "Proper losses for discrete generative models", 2022,
    arXiv:2211.03761 (a case of sampling whose number of draws depends on them).
    """
    x = _checked_ids(model_samples=model_samples)
    y = _checked_ids(target_samples=target_samples)
    check_shape(x.shape[:-1], target_samples=y)
    misses = jnp.cumsum(x == y[..., None], axis=-1) == 0
    draws = x.shape[-1]
    harmonic = jnp.cumsum(1 / jnp.arange(1, draws + 1, dtype=jnp.float32))
    sums = jnp.concatenate([jnp.zeros(1), harmonic])[:draws]
    return jnp.append(sums, jnp.inf)[jnp.sum(misses, axis=-1)]


def _checked_counts(exponents: Sequence[int], **counts: ArrayLike) -> Array:
    ((name, value),) = counts.items()
    check_interval(0, jnp.inf, counts=value, exponents=list(exponents))
    if jnp.ndim(value) < 1 or jnp.shape(value)[-1] != len(exponents):
        raise ValueError(
            f"{name} must have shape [..., {len(exponents)}], one for each of exponents, "
            f"got {jnp.shape(value)}"
        )
    c = jnp.asarray(value)
    c = c.astype(jnp.promote_types(c.dtype, jnp.float32))
    check_interval(sum(exponents), jnp.inf, number_of_draws=jnp.sum(c, axis=-1))
    return c


def _checked_ids(**samples: ArrayLike) -> Array:
    ((name, value),) = samples.items()
    ids = jnp.asarray(value)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {ids.dtype.name}")
    return ids
