"""Whether stochastic gradient descent stays at a minimum, from the Hessians of the examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import safe_sqrt, unit_vectors

_HIGHEST = lax.Precision.HIGHEST


class CoherenceResult(NamedTuple):
    """How much the Hessians of the examples point in the same directions.

    Attributes:
      sigma: σ, a scalar.
      matrix: S `[n, n]`, symmetric, with entries at least 0.
    """

    sigma: Array
    matrix: Array


def hessian_coherence(hessians: ArrayLike, *, factored: bool = False) -> CoherenceResult:
    r"""The coherence of the Hessians of examples: from 1, apart, to n, all along one direction.

        S_ij = ||H_i^{1/2} H_j^{1/2}||_F = √tr(H_i H_j),   σ = λ_max(S) / max_i λ_max(H_i)

    For H_i = x_i x_iᵀ it is S_ij = |x_i · x_j|; σ is 1 for orthogonal vectors of one length and n
    for n equal ones. It is the same for c H_i, and for all H_i in other coordinates.

    Args:
      hessians: H_i `[n, d, d]` floating point, symmetric and positive semidefinite: of the losses
        of n examples at a minimum of each, where the Gauss-Newton part is all there is.
      factored: whether `hessians` holds factors F_i `[n, d, r]` of H_i = F_i F_iᵀ instead. For
        squared error F_i is the Jacobian of the r outputs, for rank one their gradient
        `[n, d, 1]`; with cross-entropy, F_i = J_iᵀ A_i^{1/2}. Default: False.

    Returns:
      a `CoherenceResult` in at least float32; σ is NaN where all Hessians are 0.

    Raises:
      ValueError: a shape that is not square where it has to be, no entries, or Hessians that are
        not symmetric.
      TypeError: Hessians that are not floating point.

    Use it with `sgd_instability_threshold`, to tell from σ and the sharpness alone that a minimum
    cannot hold. `linearized_sgd_growth_rate` is exact and dearer.

    Cost: time O(n² d² + n d³), memory n d² + n²; factored, time O(n² r² d), memory n d r + n² r².

    Example:
      >>> x = jnp.array([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
      >>> print(f"{hessian_coherence(x[:, :, None], factored=True).sigma:.3f}")
      2.000

    Reference: Dexter et al., "A Precise Characterization of SGD Stability Using Loss Surface
    Geometry", 2024, arXiv:2401.12332.
    """
    h = _hessians(hessians, factored)
    largest = jnp.max(jnp.abs(h))
    is_zero = largest == 0
    h = h / jnp.where(is_zero, 1.0, largest)  # products of which neither over- nor underflow
    if factored:
        n, _, rank = h.shape
        products = jnp.einsum("iap,jaq->ipjq", h, h, precision=_HIGHEST)
        traces = jnp.sum(jnp.square(products), axis=(1, 3))
        blocks = products.reshape(n, rank, n, rank)[jnp.arange(n), :, jnp.arange(n)]
        sharpest = jnp.max(jnp.linalg.eigvalsh(blocks))
    else:
        traces = jnp.einsum("iab,jab->ij", h, h, precision=_HIGHEST)
        sharpest = jnp.max(jnp.linalg.eigvalsh(h))
    matrix = safe_sqrt(jnp.maximum(traces, 0.0))
    sigma = jnp.linalg.eigvalsh(matrix)[-1] / jnp.where(is_zero, jnp.nan, sharpest)
    return CoherenceResult(sigma, matrix * (jnp.square(largest) if factored else largest))


def linearized_sgd_growth_rate(
    hessians: ArrayLike,
    learning_rate: ArrayLike,
    batch_size: ArrayLike,
    *,
    num_iterations: int = 200,
    factored: bool = False,
) -> Array:
    r"""The factor by which a step of SGD near a minimum multiplies the mean square distance to it.

    With each example in the batch with probability B/n, a step of the linearized dynamics is
    w ← (I - (η/B) Σ_{i in batch} H_i) w, and N = E[w wᵀ] follows

        T(N) = (I - ηH) N (I - ηH) + (η²/n²) (n/B - 1) Σ_i H_i N H_i,   H = mean_i H_i

    The result is the spectral radius of T, by power iteration with the Rayleigh quotient: above 1
    the distance grows without end, below it falls to 0.

    Args:
      hessians: H_i `[n, d, d]` floating point, symmetric and positive semidefinite.
      learning_rate: η above 0.
      batch_size: B, 1 to n, the mean number of examples in a batch.
      num_iterations: steps of the power iteration, at least 1. Default 200, which leaves a result
        that is too low by some 1/1000 at worst, where two eigenvalues nearly agree.
      factored: whether `hessians` holds factors F_i `[n, d, r]` of H_i = F_i F_iᵀ. Default: False.

    Returns:
      a scalar at least 0 in at least float32. Directions in which no example has curvature, which
      SGD leaves as they are, do not count; 1 where there are no others.

    Raises:
      ValueError: an argument out of range, a wrong shape, or Hessians that are not symmetric.
      TypeError: Hessians that are not floating point.

    Use it for the exact answer on a model or a subspace that is small enough;
    `sgd_instability_threshold` needs two numbers and says only where SGD certainly diverges.

    Cost: with k = min(d, n r) factored and k = d else, each iteration takes time O(n k² r) or
    O(n k³) and memory n k r or n k²; before, one decomposition of d × n r or d × d.

    Example:
      >>> x = jnp.eye(3)[:, :, None]  # three examples, each with its own direction
      >>> for rate in (1.9, 2.1):
      ...     print(f"{linearized_sgd_growth_rate(x, rate, 1.0, factored=True):.3f}")
      0.937
      1.070

    Reference: Dexter et al., "A Precise Characterization of SGD Stability Using Loss Surface
    Geometry", 2024, arXiv:2401.12332.
    """
    h = _hessians(hessians, factored)
    n = h.shape[0]
    _check_step(learning_rate, n, batch_size)
    check_interval(1, jnp.inf, num_iterations=num_iterations)
    rate, batch = jnp.asarray(learning_rate, h.dtype), jnp.asarray(batch_size, h.dtype)
    # In the eigenvectors of H, of which those with eigenvalue 0 are left out.
    if factored:
        stacked = jnp.moveaxis(h, 0, 1).reshape(h.shape[1], -1)
        _, singular, vectors = jnp.linalg.svd(stacked, full_matrices=False)
        curvatures = jnp.square(singular) / n
        counts = singular > _rounding(stacked) * jnp.max(singular)
        factors = jnp.where(counts, singular, 0.0)[:, None] * vectors
        h = jnp.moveaxis(factors.reshape(-1, n, h.shape[2]), 1, 0)
    else:
        curvatures, basis = jnp.linalg.eigh(jnp.mean(h, axis=0))
        h = jnp.einsum("ap,iab,bq->ipq", basis, h, basis, precision=_HIGHEST)
        counts = curvatures > _rounding(curvatures) * jnp.max(curvatures)
        h = jnp.where(counts[:, None] & counts, h, 0.0)
    shrink = 1 - rate * curvatures
    noise = jnp.square(rate / n) * (n / batch - 1)

    def step(moments: Array) -> Array:
        spread = _spread_factored(h, moments) if factored else _spread(h, moments)
        return shrink[:, None] * moments * shrink + noise * spread

    def iterate(_, moments):
        return unit_vectors(step(moments).ravel()).reshape(moments.shape)

    start = jnp.diag(counts.astype(h.dtype)) / jnp.sqrt(jnp.maximum(jnp.sum(counts), 1))
    moments = lax.fori_loop(0, num_iterations - 1, iterate, start)
    return jnp.where(jnp.any(counts), jnp.sum(moments * step(moments)), 1.0)


def sgd_instability_threshold(
    sigma: ArrayLike, learning_rate: ArrayLike, num_examples: int, batch_size: ArrayLike
) -> Array:
    r"""The sharpness above which SGD leaves a minimum for certain.

        λ_max(H) > min(2/η, (σ/η) (n/B - 1)^{-1/2})

    Args:
      sigma: σ above 0, of any shape, as from `hessian_coherence`.
      learning_rate: η above 0.
      num_examples: n, at least 1.
      batch_size: B, 1 to n; B = n leaves 2/η, the edge of gradient descent.

    Returns:
      the threshold for λ_max of the mean Hessian, of the common shape, in at least float32.

    Raises:
      ValueError: an argument out of range.

    Use it for a certain answer from three numbers of a minimum. Below it SGD may still diverge:
    `sgd_stability_boundary` is how low the sharpness can be for that.

    Cost: a few operations for each value, no evaluation of a model.

    Example:
      >>> print(f"{sgd_instability_threshold(2.0, 0.1, 100, 4):.3f}")
      4.082

    Reference: Dexter et al., "A Precise Characterization of SGD Stability Using Loss Surface
    Geometry", 2024, arXiv:2401.12332.
    """
    sigma, rate, excess = _scalars(sigma, learning_rate, num_examples, batch_size)
    is_noisy = excess > 0
    by_noise = sigma / rate * lax.rsqrt(jnp.where(is_noisy, excess, 1.0))
    return jnp.where(is_noisy, jnp.minimum(2 / rate, by_noise), 2 / rate)


def sgd_stability_boundary(
    sigma: ArrayLike, learning_rate: ArrayLike, num_examples: int, batch_size: ArrayLike
) -> Array:
    r"""The sharpness at which SGD just holds, for Hessians in clusters.

        λ_max(H) = (2σ/η) / (σ + n/B - 1)

    It is exact for n/σ orthogonal directions, each with σ examples of the same Hessian of rank one:
    up to there some minimum with this σ is stable, so that no condition on σ and λ_max can say
    more than `sgd_instability_threshold` by far.

    Args:
      sigma: σ above 0, of any shape; 1 to n for such clusters.
      learning_rate: η above 0.
      num_examples: n, at least 1.
      batch_size: B, 1 to n.

    Returns:
      the boundary for λ_max of the mean Hessian, of the common shape, in at least float32.

    Raises:
      ValueError: an argument out of range.

    Use it to see the effect of a batch size or a learning rate: λ_max η up to 2 for a full batch,
    to 2σ B/n for a small one. For given Hessians, `linearized_sgd_growth_rate` is exact.

    Cost: a few operations for each value, no evaluation of a model.

    Example:
      >>> print(f"{sgd_stability_boundary(2.0, 0.1, 100, 4):.3f}")
      1.538

    Reference: Dexter et al., "A Precise Characterization of SGD Stability Using Loss Surface
    Geometry", 2024, arXiv:2401.12332.
    """
    sigma, rate, excess = _scalars(sigma, learning_rate, num_examples, batch_size)
    return 2 * sigma / (rate * (sigma + excess))


def simulate_linearized_sgd(
    hessians: ArrayLike,
    start: ArrayLike,
    learning_rate: ArrayLike,
    batch_size: ArrayLike,
    *,
    num_steps: int,
    key: Array,
    factored: bool = False,
) -> Array:
    r"""A run of SGD near a minimum at 0, with each example in the batch with probability B/n.

        w_{t+1} = w_t - (η/B) Σ_{i in batch t} H_i w_t

    Args:
      hessians: H_i `[n, d, d]` floating point, symmetric and positive semidefinite.
      start: w_0 `[d]` floating point, the way from the minimum to where SGD starts.
      learning_rate: η above 0.
      batch_size: B, 1 to n, the mean number of examples in a batch.
      num_steps: steps to make, at least 1.
      key: random key of the batches.
      factored: whether `hessians` holds factors F_i `[n, d, r]` of H_i = F_i F_iᵀ. Default: False.

    Returns:
      w_0 ... w_T `[num_steps + 1, d]` in at least float32.

    Raises:
      ValueError: an argument out of range, a wrong shape, or Hessians that are not symmetric.
      TypeError: Hessians or a start that are not floating point.

    Use it under `jax.vmap` over keys, to see the spread about the mean that
    `linearized_sgd_growth_rate` foretells: a few runs often hold most of it.

    Cost: each step takes time O(n d²), factored O(n d r), of which B/n is for the batch; memory for
    the Hessians and T d.

    Example:
      >>> h = jnp.array([[[1.0]], [[3.0]]])  # a full batch has the mean of both
      >>> run = simulate_linearized_sgd(h, jnp.ones(1), 0.25, 2, num_steps=2, key=jax.random.key(0))
      >>> print(run[:, 0])
      [1.   0.5  0.25]

    Reference: Dexter et al., "A Precise Characterization of SGD Stability Using Loss Surface
    Geometry", 2024, arXiv:2401.12332.
    """
    h = _hessians(hessians, factored)
    check_floating(start=start)
    check_shape((h.shape[1],), start=start)
    _check_step(learning_rate, h.shape[0], batch_size)
    check_interval(1, jnp.inf, num_steps=num_steps)
    dtype = jnp.promote_types(h.dtype, compute_dtype(start))
    h, w0 = h.astype(dtype), jnp.asarray(start, dtype)
    share = jnp.asarray(batch_size, dtype) / h.shape[0]
    scale = jnp.asarray(learning_rate, dtype) / jnp.asarray(batch_size, dtype)

    def step(w, key):
        is_in = jax.random.bernoulli(key, share, (h.shape[0],)).astype(dtype)
        if factored:
            inner = is_in[:, None] * jnp.einsum("iap,a->ip", h, w, precision=_HIGHEST)
            slope = jnp.einsum("iap,ip->a", h, inner, precision=_HIGHEST)
        else:
            slope = jnp.einsum("i,iab,b->a", is_in, h, w, precision=_HIGHEST)
        w = w - scale * slope
        return w, w

    _, run = lax.scan(step, w0, jax.random.split(key, num_steps))
    return jnp.concatenate([w0[None], run])


def _hessians(hessians: ArrayLike, factored: bool) -> Array:
    """The Hessians or their factors in at least float32."""
    check_floating(hessians=hessians)
    shape = jnp.shape(hessians)
    if len(shape) != 3 or 0 in shape or (shape[1] != shape[2] and not factored):
        expected = "[examples, d, r]" if factored else "[examples, d, d]"
        raise ValueError(f"hessians must have shape {expected} and entries, got {shape}")
    h = jnp.asarray(hessians, compute_dtype(hessians))
    if not factored and not isinstance(h, jax.core.Tracer):
        gap = np.max(np.abs(h - jnp.swapaxes(h, 1, 2)))
        if gap > 1e-3 * np.max(np.abs(h)):
            raise ValueError(f"hessians must be symmetric, got entries that differ by {gap}")
    return h


def _check_step(learning_rate: ArrayLike, num_examples: int, batch_size: ArrayLike) -> None:
    check_interval(0, jnp.inf, closed="neither", learning_rate=learning_rate)
    check_interval(1, num_examples, batch_size=batch_size)


def _scalars(
    sigma: ArrayLike, learning_rate: ArrayLike, num_examples: int, batch_size: ArrayLike
) -> tuple[Array, Array, Array]:
    """σ, η and n/B - 1, in at least float32."""
    check_interval(1, jnp.inf, num_examples=num_examples)
    _check_step(learning_rate, num_examples, batch_size)
    check_interval(0, jnp.inf, closed="neither", sigma=sigma)
    dtype = compute_dtype(sigma, learning_rate)
    batch = jnp.asarray(batch_size, dtype)
    excess = (num_examples - batch) / batch
    return jnp.asarray(sigma, dtype), jnp.asarray(learning_rate, dtype), excess


def _rounding(x: Array) -> float:
    """How small an eigenvalue or singular value is against the largest to count as 0."""
    return max(x.shape) * 4 * float(jnp.finfo(x.dtype).eps)


def _spread(h: Array, moments: Array) -> Array:
    """Σ_i H_i N H_i."""
    return jnp.einsum("iab,bc,icd->ad", h, moments, h, precision=_HIGHEST)


def _spread_factored(f: Array, moments: Array) -> Array:
    """Σ_i F_i (F_iᵀ N F_i) F_iᵀ."""
    inner = jnp.einsum("iap,ab,ibq->ipq", f, moments, f, precision=_HIGHEST)
    return jnp.einsum("iap,ipq,ibq->ab", f, inner, f, precision=_HIGHEST)
