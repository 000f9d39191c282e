"""How the curvature of a batch exceeds that of the data, and the learning rates it admits."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.analysis.landscape.lanczos import random_directions, stochastic_lanczos
from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype


class LearningRateAndMomentum(NamedTuple):
    """The two constants of gradient descent with heavy-ball momentum.

    Attributes:
      learning_rate: α, a scalar.
      momentum: ρ in [0, 1), a scalar.
    """

    learning_rate: Array
    momentum: Array


def batch_hessian_top_eigenvalue(
    lambda_1: ArrayLike,
    hessian_variance: ArrayLike,
    num_params: ArrayLike,
    batch_size: ArrayLike,
    dataset_size: ArrayLike | None = None,
) -> Array:
    r"""The largest eigenvalue of the Hessian of a batch, by the law of a spiked random matrix.

    The Hessian of B of N examples is that of all plus noise, a symmetric matrix of independent
    entries of variance σ² / b. An eigenvalue λ_1 of the full Hessian that stands out becomes

        λ_1' = λ_1 + (P/b) σ² / λ_1    for λ_1 > √(P/b) σ,    1/b = 1/B - 1/N
        λ_1' = 2 √(P/b) σ              otherwise, the edge of the noise alone

    Args:
      lambda_1: λ_1 at least 0, of any shape; for the least eigenvalue take -λ and read -λ'.
      hessian_variance: σ² at least 0, the variance of an entry of one example's Hessian, as from
        `estimate_hessian_variance`.
      num_params: P, at least 1.
      batch_size: B, at least 1 and at most N.
      dataset_size: N. Default: None, examples without end, b = B.

    Returns:
      λ_1' of the common shape of the arguments, in at least float32; λ_1 for B = N.

    Raises:
      ValueError: an argument out of range.

    Use it to foresee the sharpness of one batch size from that of another; the law holds for many
    parameters and a few outliers. `batch_gauss_newton_top_eigenvalue` is for a curvature that is
    never negative.

    Cost: a few operations for each value, no evaluation of a model.

    Example:
      >>> print(batch_hessian_top_eigenvalue(8.0, 1.0, 600, 40))
      9.875

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", 2020, arXiv:2006.09092.
    """
    spike, variance = _floats(lambda_1=lambda_1, hessian_variance=hessian_variance)
    noise = _params_per_example(num_params, batch_size, dataset_size, spike.dtype) * variance
    stands_out = jnp.square(spike) > noise
    risen = spike + noise / jnp.where(stands_out, spike, 1.0)
    is_noisy = noise > 0
    edge = jnp.where(is_noisy, 2 * jnp.sqrt(jnp.where(is_noisy, noise, 1.0)), 0.0)
    return jnp.where(stands_out, risen, edge)


def batch_gauss_newton_top_eigenvalue(
    lambda_1: ArrayLike,
    noise_variance: ArrayLike,
    num_params: ArrayLike,
    batch_size: ArrayLike,
    dataset_size: ArrayLike | None = None,
) -> Array:
    r"""The largest eigenvalue of a batch's Gauss-Newton matrix, by the spiked covariance law.

    The matrix is a mean over B examples of products j jᵀ, with entries of j of variance σ² but for
    the direction of λ_1, in which it is λ_1. With c = P/b and 1/b = 1/B - 1/N,

        λ_1' = λ_1 (1 + c σ² / (λ_1 - σ²))    for λ_1 > σ² (1 + √c)
        λ_1' = σ² (1 + √c)²                   otherwise, the edge of the noise alone

    Args:
      lambda_1: λ_1 at least 0, of any shape; as λ_1 is the largest, at least σ².
      noise_variance: σ² at least 0: the eigenvalue of the full matrix away from the outliers.
      num_params: P, at least 1.
      batch_size: B, at least 1 and at most N.
      dataset_size: N. Default: None, examples without end, b = B.

    Returns:
      λ_1' of the common shape of the arguments, in at least float32; λ_1 for B = N.

    Raises:
      ValueError: an argument out of range.

    Use it for squared error and cross-entropy near a minimum, where the Hessian is its Gauss-Newton
    part; its edge grows like P/b for a small batch, that of `batch_hessian_top_eigenvalue` like
    the root.

    Cost: a few operations for each value, no evaluation of a model.

    Example:
      >>> print(batch_gauss_newton_top_eigenvalue(5.0, 1.0, 600, 400))
      6.875

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", 2020, arXiv:2006.09092; the law is of Baik,
    Silverstein, "Eigenvalues of large sample covariance matrices of spiked population models",
    2004, arXiv:math/0408165.
    """
    spike, variance = _floats(lambda_1=lambda_1, noise_variance=noise_variance)
    ratio = _params_per_example(num_params, batch_size, dataset_size, spike.dtype)
    is_noisy = ratio > 0
    root = jnp.where(is_noisy, jnp.sqrt(jnp.where(is_noisy, ratio, 1.0)), 0.0)
    stands_out = spike > variance * (1 + root)
    risen = spike * (1 + ratio * variance / jnp.where(stands_out, spike - variance, 1.0))
    return jnp.where(stands_out, risen, variance * jnp.square(1 + root))


_LAWS = {
    "hessian": batch_hessian_top_eigenvalue,
    "gauss_newton": batch_gauss_newton_top_eigenvalue,
}


def maximal_learning_rate(
    lambda_1: ArrayLike,
    variance: ArrayLike,
    num_params: ArrayLike,
    batch_size: ArrayLike,
    dataset_size: ArrayLike | None = None,
    *,
    curvature: Literal["hessian", "gauss_newton"] = "hessian",
) -> Array:
    r"""The largest learning rate that gradient descent on a batch bears.

        α = 2 / λ_1'

    with λ_1' the largest eigenvalue for that batch size. It is 2 / λ_1 for a large batch. For a
    small one it grows with B: like B for "gauss_newton"; for "hessian", of which the noise term
    P σ² / (b λ_1) falls like 1/B, at most like √B, as the edge takes over where that term is λ_1.

    Args:
      lambda_1: λ_1 at least 0, of any shape, the largest eigenvalue for all examples.
      variance: σ² at least 0, as the law of `curvature` has it.
      num_params: P, at least 1.
      batch_size: B, at least 1 and at most N.
      dataset_size: N. Default: None, examples without end.
      curvature: which law: `batch_hessian_top_eigenvalue` (default) or
        `batch_gauss_newton_top_eigenvalue`.

    Returns:
      α of the common shape of the arguments, in at least float32; infinite for no curvature.

    Raises:
      ValueError: an argument out of range, or an unknown `curvature`.

    Use it for the rate at one batch size where the curvature is known; `scale_learning_rate` goes
    from a rate that works to another batch size without it.

    Cost: a few operations for each value, no evaluation of a model.

    Example:
      >>> rates = maximal_learning_rate(8.0, 1.0, 600, jnp.array([4, 40, 400000]))
      >>> print(*(f"{rate:.4f}" for rate in rates))
      0.0816 0.2025 0.2500

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", 2020, arXiv:2006.09092.
    """
    if curvature not in _LAWS:
        raise ValueError(f"curvature must be one of {', '.join(_LAWS)}, got {curvature!r}")
    check_interval(0, jnp.inf, variance=variance)
    law = _LAWS[curvature]
    return 2 / law(lambda_1, variance, num_params, batch_size, dataset_size)


def scale_learning_rate(
    learning_rate: ArrayLike,
    old_batch_size: ArrayLike,
    new_batch_size: ArrayLike,
    *,
    rule: Literal["linear", "sqrt"] = "linear",
) -> Array:
    r"""A learning rate for another batch size, in proportion to it or to its root.

        α' = α r   or   α' = α √r,   r = B' / B

    Args:
      learning_rate: α at least 0, of any shape.
      old_batch_size: B for which α is good, above 0.
      new_batch_size: B', above 0.
      rule: "linear" (default) for stochastic gradient descent, whose largest rate is 2 over the
        largest eigenvalue of the batch; "sqrt" for Adam and other adaptive methods, which divide by
        their estimate of the curvature and are left with the edge of its noise, as 1/√B.

    Returns:
      α' of the common shape of the arguments, in at least float32.

    Raises:
      ValueError: an argument out of range, or an unknown `rule`.

    Use it while the noise of the batch is the larger part of its curvature: beyond that size the
    largest rate stays what it is, as `maximal_learning_rate` shows.

    Cost: one multiplication.

    Example:
      >>> print(scale_learning_rate(0.25, 128, 512))
      1.0
      >>> print(scale_learning_rate(0.25, 128, 512, rule="sqrt"))
      0.5

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", 2020, arXiv:2006.09092.
    """
    if rule not in ("linear", "sqrt"):
        raise ValueError(f"rule must be 'linear' or 'sqrt', got {rule!r}")
    check_interval(0, jnp.inf, learning_rate=learning_rate)
    for name, size in (("old_batch_size", old_batch_size), ("new_batch_size", new_batch_size)):
        check_interval(0, jnp.inf, closed="right", **{name: size})
    dtype = compute_dtype(learning_rate)
    old, new = jnp.asarray(old_batch_size, dtype), jnp.asarray(new_batch_size, dtype)
    ratio = new / old
    return jnp.asarray(learning_rate, dtype) * (ratio if rule == "linear" else jnp.sqrt(ratio))


def estimate_hessian_variance(
    batch_hvps: Callable[[Any], Any],
    full_hvp: Callable[[Any], Any],
    params: Any,
    batch_size: ArrayLike,
    dataset_size: ArrayLike | None = None,
    *,
    num_probes: int = 1,
    key: Array,
) -> Array:
    r"""The variance of an entry of one example's Hessian, from products with random vectors.

        σ² = (b / P) mean_{batches, v} ||(H_batch - H) v||²,   1/b = 1/B - 1/N

    for v uniform on the unit sphere: E ||(H_batch - H) v||² = ||H_batch - H||_F² / P, in which
    each of the P² entries has variance σ² / b.

    Args:
      batch_hvps: v ↦ H_batch v for each of some random batches of B examples: from a tree like
        `params` to one with a first axis more, `[batches, ...]`, as `jax.vmap` over batches gives.
      full_hvp: v ↦ H v for all N examples, or a large sample; from and to trees like `params`.
      params: tree of floating-point arrays with P entries; only its shapes and types matter.
      batch_size: B, at least 1 and at most N.
      dataset_size: N. Default: None, for batches and a sample that have few examples in common.
      num_probes: random vectors v, at least 1. Default 1, good for a few per cent in a large model.
      key: random key of the probes.

    Returns:
      σ², a scalar in at least float32, without bias; NaN for B = N, which says nothing of it.

    Raises:
      ValueError: an argument out of range, no parameters, or products that are not like `params`.
      TypeError: parameters that are not floating point.

    Use it for the σ² of `batch_hessian_top_eigenvalue`; batches of one size are enough to foresee
    all others.

    Cost: for each probe one product with every batch's Hessian and one with the full one, memory
    for the P entries of each batch's product.

    Example:
      >>> noise = jnp.array([[1.0, -1.0], [-1.0, 1.0]])  # two batches, diagonal Hessians
      >>> variance = estimate_hessian_variance(
      ...     lambda v: (3 + noise) * v, lambda v: 3 * v, jnp.zeros(2), 4, key=jax.random.key(0)
      ... )
      >>> print(f"{variance:.4f}")
      2.0000

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", 2020, arXiv:2006.09092.
    """
    check_interval(1, jnp.inf, num_probes=num_probes)
    direction, unravel = random_directions(params)

    def one_probe(key: Array) -> Array:
        v = direction(key)
        batches, full = batch_hvps(unravel(v)), full_hvp(unravel(v))
        _check_batches(params, batches, full)
        gaps = jax.tree.map(lambda a, b: a.astype(v.dtype) - b.astype(v.dtype), batches, full)
        squares = [jnp.sum(jnp.square(gap)) / gap.shape[0] for gap in jax.tree.leaves(gaps)]
        return sum(squares) / v.size

    mean = jnp.mean(lax.map(one_probe, jax.random.split(key, num_probes)))
    return mean / _params_per_example(1, batch_size, dataset_size, mean.dtype)


def lanczos_learning_rate_and_momentum(
    hvp: Callable[[Any], Any],
    params: Any,
    *,
    num_steps: int = 10,
    num_probes: int = 1,
    key: Array,
) -> LearningRateAndMomentum:
    r"""A learning rate and a momentum for where training is, from a few Lanczos steps.

        α = (2 / (√l_max + √l_min))²,   ρ = ((√l_max - √l_min) / (√l_max + √l_min))²

    with l_max and l_min the extreme positive nodes of `stochastic_lanczos`: the best constants of
    θ_{t+1} = θ_t - α g_t + ρ (θ_t - θ_{t-1}) for a quadratic with eigenvalues from l_min to l_max.
    Negative curvature and what is 0 up to rounding do not count.

    Args:
      hvp: v ↦ H v, as for `stochastic_lanczos`: of the batch size to train with, whose curvature
        is what limits the rate.
      params: tree of floating-point arrays with P entries.
      num_steps: m, at least 1. Default 10.
      num_probes: random vectors to start from, at least 1. Default 1.
      key: random key of the probes.

    Returns:
      a `LearningRateAndMomentum` of scalars in at least float32. One node gives α = 1/l and ρ = 0,
      no positive node α = infinity and ρ = 0.

    Raises:
      ValueError: counts out of range, no parameters, or a result of `hvp` that is not like
        `params`.
      TypeError: parameters that are not floating point.

    Use it every few epochs in place of a search for the two constants. The nodes lie within the
    spectrum, so that l_max is somewhat low: with few steps take a part of α.

    Cost: as `stochastic_lanczos`: for each probe m products H v, time O(m² P), memory m P.

    Example:
      >>> hvp = lambda v: jnp.array([1.0, 4.0, -2.0]) * v
      >>> found = lanczos_learning_rate_and_momentum(hvp, jnp.zeros(3), key=jax.random.key(0))
      >>> print(*(f"{x:.4f}" for x in found))
      0.4444 0.1111

    Reference: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random
    Matrix Theory Approach to Neural Network Training", 2020, arXiv:2006.09092.
    """
    spectrum = stochastic_lanczos(hvp, params, num_steps=num_steps, num_probes=num_probes, key=key)
    nodes = spectrum.nodes
    rounding = 32 * jnp.finfo(nodes.dtype).eps * jnp.max(jnp.abs(nodes))
    counts = (nodes > rounding) & (spectrum.weights > 0)
    any_counts = jnp.any(counts)
    high = jnp.sqrt(jnp.max(nodes, where=counts, initial=0.0))
    low = jnp.sqrt(jnp.min(nodes, where=counts, initial=jnp.inf))
    total = jnp.where(any_counts, high + low, 1.0)
    rate = jnp.where(any_counts, jnp.square(2 / total), jnp.inf)
    momentum = jnp.where(any_counts, jnp.square((high - low) / total), 0.0)
    return LearningRateAndMomentum(rate, momentum)


def _floats(**values: Any) -> tuple[Array, ...]:
    """The values, at least 0, in their common type of at least float32."""
    check_interval(0, jnp.inf, **values)
    dtype = compute_dtype(*values.values())
    return tuple(jnp.asarray(value, dtype) for value in values.values())


def _params_per_example(
    num_params: ArrayLike, batch_size: ArrayLike, dataset_size: ArrayLike | None, dtype: jnp.dtype
) -> Array:
    """P/b = P (1/B - 1/N)."""
    check_interval(1, jnp.inf, num_params=num_params, batch_size=batch_size)
    params, batch = (jnp.asarray(x, dtype) for x in (num_params, batch_size))
    if dataset_size is None:
        return params / batch
    check_interval(1, jnp.inf, dataset_size=dataset_size)
    is_traced = any(isinstance(size, jax.core.Tracer) for size in (batch_size, dataset_size))
    if not is_traced and np.any(np.asarray(batch_size) > np.asarray(dataset_size)):
        raise ValueError(
            f"batch_size must be at most dataset_size {dataset_size}, got {batch_size}"
        )
    examples = jnp.asarray(dataset_size, dtype)
    return params / batch * ((examples - batch) / examples)


def _check_batches(params: Any, batches: Any, full: Any) -> None:
    """Raises ValueError unless `full` is like `params`, and `batches` with one axis in front."""
    check_same_tree(params, **{"full_hvp(v)": full})
    first = [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)]
    count = max(*first[0], 1) if first and first[0] else 1

    def stacked(p: ArrayLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *jnp.shape(p)), jnp.result_type(p))

    check_same_tree(jax.tree.map(stacked, params), **{"batch_hvps(v)": batches})
