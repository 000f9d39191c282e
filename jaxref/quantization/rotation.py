"""Equivalent transforms before quantization: rotations and scalings that spread a distribution.

A float network does not change when `x` is multiplied by an invertible matrix and the next weights
by its inverse. What changes is how much of the range of a quantizer the numbers use.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.special import gammaln
from jax.typing import ArrayLike, DTypeLike
from scipy.stats import chi2

from jaxref.core.checks import check_floating, check_interval, check_same_tree, check_shape
from jaxref.core.numerics import compute_dtype

EXTENTS = ("principal", "exact")


def hadamard_matrix(n: int, *, dtype: DTypeLike = jnp.float32) -> Array:
    r"""An orthogonal matrix whose entries all have magnitude 1/√n: the best spread of an outlier.

        H Hᵀ = I,   |H_ij| = n^(-1/2)

    For n = 2^p, the symmetric matrix of Sylvester, H_2n = [[H_n, H_n], [H_n, -H_n]] / √2. For
    n = 2^p m, the Kronecker product of that with a matrix of Paley, from the quadratic residues of
    a prime q: m = q + 1 for q mod 4 = 3, m = 2 (q + 1) for q mod 4 = 1.

    Args:
      n: at least 1; its number of rows and columns.
      dtype: floating-point type of the result. Default: float32.

    Returns:
      `[n, n]`. It is a constant, built in NumPy: call it outside of loops.

    Raises:
      ValueError: `n` below 1, or none of these constructions gives a matrix of size `n`: none
        exists for an n above 2 that is no multiple of 4, and 52, 92 and 100 are the first
        multiples without.
      TypeError: `n` is not an int, or `dtype` not floating point.

    Use it for a rotation that is fixed, times a diagonal of random signs for a random one;
    `weight_outlier_minimization_init` fits the rotation to the weights.

    Cost: n² numbers, built on the host. A product with it takes n² multiplications a vector, where
    a fast transform would take n log2(n) sums.

    Example:
      >>> print(2 * hadamard_matrix(4))
      [[ 1.  1.  1.  1.]
       [ 1. -1.  1. -1.]
       [ 1.  1. -1. -1.]
       [ 1. -1. -1.  1.]]

    Reference: Paley, "On Orthogonal Matrices", Journal of Mathematics and Physics, 1933; as the
    rotation of a quantizer in Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated
    LLMs", 2024, arXiv:2404.00456.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int, got {n!r}")
    check_interval(1, jnp.inf, n=n)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type, got {jnp.dtype(dtype).name}")
    odd = n
    while odd % 2 == 0:
        odd //= 2
    sizes = [odd * 2**p for p in range(n.bit_length()) if odd * 2**p <= n]
    matrix = next((core for core in map(_paley, sizes) if core is not None), None)
    if matrix is None:
        raise ValueError(f"n must be a power of 2 times 1 or a size of Paley's, got {n}")
    while len(matrix) < n:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return jnp.asarray(matrix / np.sqrt(n), dtype)


def _paley(m: int) -> np.ndarray | None:
    """Paley's matrix of entries ±1 and size m, or None where no prime gives one."""
    if m == 1:
        return np.ones((1, 1))
    if _is_prime(m - 1) and m % 4 == 0:
        return np.eye(m) + _conference(m - 1, sign=-1)
    q = m // 2 - 1
    if m % 4 == 0 and _is_prime(q) and q % 4 == 1:
        return np.kron(_conference(q, sign=1), [[1, 1], [1, -1]]) + np.kron(
            np.eye(q + 1), [[1, -1], [-1, -1]]
        )
    return None


def _conference(q: int, *, sign: int) -> np.ndarray:
    """The characters of the differences mod q, framed: 0 on the diagonal and ±1 elsewhere."""
    residues = {i * i % q for i in range(1, q)}
    character = np.array([0] + [1 if i in residues else -1 for i in range(1, q)])
    differences = (np.arange(q)[:, None] - np.arange(q)) % q
    border = np.ones((1, q))
    return np.block([[np.zeros((1, 1)), border], [sign * border.T, character[differences]]])


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def quantization_space_utilization_rate(
    x: ArrayLike | None = None,
    *,
    mean: ArrayLike | None = None,
    covariance: ArrayLike | None = None,
    confidence: float = 0.99,
    extent: str = "principal",
    log: bool = False,
) -> Array:
    r"""The share of a quantizer's cube that a normal distribution fills (QSUR).

    For x ~ N(μ, Σ) in d dimensions with Σ = Q diag(λ) Qᵀ, λ_1 the largest, and c the quantile of
    χ²_d at the confidence,

        QSUR = V_x / V_cube
        V_x = π^(d/2) / Γ(d/2 + 1) c^(d/2) √(Π_j λ_j)        the ellipsoid that holds x
        V_cube = (max_j (μ_j + e_j) - min_j (μ_j - e_j))^d   one range for all channels
        principal:  e_j = √(c λ_1) |Q_j1|                    the ends of the longest axis
        exact:      e_j = √(c Σ_jj)                          the ellipsoid's bounding box

    The exact rate is at most that of a ball in its cube, π^(d/2) / (Γ(d/2 + 1) 2^d), and reaches
    it where the channels have one mean, one variance and no correlation. The principal one, the
    paper's, looks at one axis alone: it may exceed that, and with μ = 0 the best rotation makes
    all |Q_j1| equal, as a Hadamard matrix does.

    Args:
      x: `[..., d]` samples, whose mean and covariance (divided by their number) are taken; or
        None, with `covariance` given.
      mean: `[d]` μ. Default: 0, or that of `x`.
      covariance: `[d, d]` Σ, symmetric and positive semi-definite.
      confidence: in (0, 1), the probability that the ellipsoid holds. Default 0.99.
      extent: "principal" (default) or "exact".
      log: return log QSUR, which is what has digits left in hundreds of dimensions.

    Returns:
      A scalar, at least float32. 0 (its log -inf) where the covariance is singular to rounding, as
      that of fewer samples than dimensions is.

    Raises:
      ValueError: neither or both of `x` and `covariance`, shapes that do not fit, `confidence` or
        `extent` out of range, or NaN or infinite entries (which give NaN under jit).
      TypeError: arrays that are not floating point.

    It says how well a tensor suits a uniform quantizer before any is run, to compare transforms of
    it; `ostquant` trains on the network's output instead. QSUR^(1/d) compares dimensions.

    Cost: an eigendecomposition, O(d³), and O(d²) a sample for their covariance.

    Example:
      >>> stretched = jnp.diag(jnp.array([4.0, 1.0]))
      >>> rate = quantization_space_utilization_rate(covariance=stretched, extent="exact")
      >>> ball = quantization_space_utilization_rate(covariance=jnp.eye(2), extent="exact")
      >>> print(rate.round(3), ball.round(3))
      0.393 0.785

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    if (x is None) == (covariance is None):
        given = "none" if x is None else "both"
        raise ValueError(f"one of x and covariance must be given, got {given}")
    if extent not in EXTENTS:
        raise ValueError(f"extent must be one of {EXTENTS}, got {extent!r}")
    check_interval(0, 1, closed="neither", confidence=confidence)
    if x is not None:
        check_floating(x=x)
        samples = jnp.asarray(x, compute_dtype(x))
        if samples.ndim < 2 or not samples.size:
            raise ValueError(f"x must have shape [..., d] with samples, got {samples.shape}")
        samples = samples.reshape(-1, samples.shape[-1])
        center = jnp.mean(samples, axis=0)
        sigma = jnp.cov(samples, rowvar=False, bias=True).reshape(len(center), len(center))
        mean = center if mean is None else mean
    elif covariance is not None:
        check_floating(covariance=covariance)
        sigma = jnp.asarray(covariance, compute_dtype(covariance))
        if sigma.ndim != 2 or not sigma.size:
            raise ValueError(f"covariance must have shape [d, d], got {sigma.shape}")
        check_shape((sigma.shape[0],) * 2, covariance=sigma)
    d = sigma.shape[0]
    mu = jnp.zeros(d, sigma.dtype) if mean is None else jnp.asarray(mean, sigma.dtype)
    check_shape((d,), mean=mu)
    c = float(chi2.ppf(confidence, d))
    if not isinstance(sigma, jax.core.Tracer) and not jnp.all(jnp.isfinite(sigma)):
        given = "covariance" if x is None else "x"
        raise ValueError(f"{given} must be finite, got NaN or infinite entries or moments")
    lengths, axes = jnp.linalg.eigh(sigma)
    if extent == "principal":
        reach = jnp.sqrt(c * jnp.maximum(lengths[-1], 0)) * jnp.abs(axes[:, -1])
    else:
        reach = jnp.sqrt(c * jnp.diagonal(sigma))
    edge = jnp.max(mu + reach) - jnp.min(mu - reach)
    singular = lengths[0] <= d * jnp.finfo(sigma.dtype).eps * lengths[-1]
    lengths = jnp.where(singular, 1.0, lengths)
    log_ratio = (
        0.5 * d * jnp.log(jnp.pi * c)
        - gammaln(d / 2 + 1)
        + 0.5 * jnp.sum(jnp.log(lengths))
        - d * jnp.log(jnp.where(singular, 1.0, edge))
    )
    log_ratio = jnp.where(singular, -jnp.inf, log_ratio).astype(sigma.dtype)
    return log_ratio if log else jnp.exp(log_ratio)


def weight_outlier_minimization_init(weights: Sequence[ArrayLike]) -> Array:
    r"""A rotation that gives the rows of the weights that read one stream the same energy (WOMI).

        C = Σ_k W_k W_kᵀ = U diag(λ) Uᵀ,   R = U Hᵀ

    with the normalized Hadamard matrix H. The rotated weights Rᵀ W_k have the second moment
    H diag(λ) Hᵀ, whose diagonal is constant: no input channel stands out.

    Args:
      weights: kernels `[in, out]` (any `out`) or stacks of them `[heads, in, out]` with a rotation
        for each, all with the same leading axes and `in`, a size of `hadamard_matrix`.

    Returns:
      R, `[in, in]` or `[heads, in, in]`, in at least float32, to be used as x R and Rᵀ W.

    Raises:
      ValueError: no weights, shapes that do not fit, no Hadamard matrix of this size, or NaN or
        infinite entries.
      TypeError: weights that are not floating point.

    The start of `ostquant`; better than a random Hadamard rotation, which ignores the weights.

    Cost: O(in² out) for the second moment of each kernel and an eigendecomposition, O(in³), for
    each head; no data.

    Example:
      >>> kernel = jnp.array([[9.0, 0.0], [0.0, 1.0]])
      >>> rotated = weight_outlier_minimization_init([kernel]).T @ kernel
      >>> print(jnp.sum(rotated**2, axis=1).round(3))
      [41. 41.]

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    if not len(weights):
        raise ValueError("weights must hold at least one kernel, got none")
    check_floating(**{f"weights[{i}]": w for i, w in enumerate(weights)})
    dtype = compute_dtype(*weights)
    shape = jnp.shape(weights[0])
    if len(shape) not in (2, 3):
        raise ValueError(f"weights must have shape [in, out] or [heads, in, out], got {shape}")
    second_moment = jnp.zeros((*shape[:-1], shape[-2]), dtype)
    for i, kernel in enumerate(weights):
        kernel = jnp.asarray(kernel, dtype)
        check_shape((*shape[:-1], *kernel.shape[-1:]), **{f"weights[{i}]": kernel})
        second_moment += _matmul(kernel, kernel.mT)
    concrete = not isinstance(second_moment, jax.core.Tracer)
    if concrete and not jnp.all(jnp.isfinite(second_moment)):
        raise ValueError("weights must be finite, got NaN or infinite entries or squares")
    _, vectors = jnp.linalg.eigh(second_moment)
    hadamard = hadamard_matrix(shape[-2], dtype=dtype)
    return _matmul(vectors, hadamard.T)


def cayley_update(rotation: ArrayLike, gradient: ArrayLike, learning_rate: ArrayLike) -> Array:
    r"""A step of gradient descent that keeps a matrix orthogonal.

        A = G Rᵀ - R Gᵀ
        R ← (I + η/2 A)⁻¹ (I - η/2 A) R

    A is skew-symmetric, so that the Cayley transform of it is a rotation: R stays orthogonal for
    any step, up to rounding, and keeps the sign of its determinant. To first order in η it is the
    step -η A R = -η (G - R Gᵀ R), twice the gradient projected on the tangent space.

    Args:
      rotation: `[..., n, n]` orthogonal R.
      gradient: the same shape, G = ∂L/∂R.
      learning_rate: η, scalar or broadcastable to `[..., 1, 1]`; negative ones ascend.

    Returns:
      The next R, in the type of `rotation`, computed in at least float32.

    Raises:
      ValueError: shapes that differ or are not square.
      TypeError: not floating point.

    `stiefel_adam` uses it on an average of gradients; a retraction by QR or SVD instead would stay
    on the manifold too, but not turn back by the opposite step as this does.

    Cost: a solve and two products of n × n matrices, O(n³).

    Example:
      >>> rotation = cayley_update(jnp.eye(2), jnp.array([[0.0, 1.0], [0.0, 0.0]]), 1.0)
      >>> print(rotation)
      [[ 0.6 -0.8]
       [ 0.8  0.6]]

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987; the step is of
    Wen, Yin, "A feasible method for optimization with orthogonality constraints", 2013.
    """
    check_floating(rotation=rotation, gradient=gradient)
    dtype = compute_dtype(rotation, gradient)
    r, g = jnp.asarray(rotation, dtype), jnp.asarray(gradient, dtype)
    _check_square(rotation=r)
    check_shape(r.shape, gradient=g)
    half = 0.5 * jnp.asarray(learning_rate, dtype)
    product = _matmul(g, r.mT)
    skew = half * (product - product.mT)
    identity = jnp.eye(r.shape[-1], dtype=dtype)
    return jnp.linalg.solve(identity + skew, r - _matmul(skew, r)).astype(jnp.result_type(rotation))


class StiefelAdamState(NamedTuple):
    """The moments of `stiefel_adam`.

    Attributes:
      count: int32 scalar, the steps taken.
      mu: like the rotations, in at least float32: the average tangent vector.
      nu: `[..., 1, 1]` for each: the average squared length of the gradient.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    mu: Any
    nu: Any


def stiefel_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    r"""Adam for orthogonal matrices: moments in the tangent space, steps by the Cayley transform.

    With the projection P_R(M) = (M - R Mᵀ R) / 2 on the tangent space at R, and G = ∂L/∂R,

        m ← b1 m + (1 - b1) P_R(G)
        v ← b2 v + (1 - b2) ‖P_R(G)‖²
        R' = cayley_update(R, D / 2, η),   D = m̂ / (√v̂ + eps)
        m ← P_R'(m)

    with m̂ and v̂ corrected for their start at zero. v is one number to a matrix, not one to an
    entry: scaling entries would leave the tangent space. So a step has a length of about η in the
    Frobenius norm. One Newton-Schulz step, R (3 I - Rᵀ R) / 2, takes the rounding off, so that the
    matrix does not drift from orthogonality over any number of steps.

    Args:
      learning_rate: η at least 0, or a schedule count → η.
      b1: in [0, 1), how long m lasts. Default 0.9.
      b2: in [0, 1), how long v lasts. Default 0.999.
      eps: at least 0, added to the root. Default 1e-8.

    Returns:
      an optax transformation whose parameters are `[..., n, n]` orthogonal matrices. Its update is
      R' - R, with the learning rate in it: `optax.apply_updates` lands on R', and nothing may be
      chained behind it.

    Raises:
      ValueError: a number out of its range; in `update`, no params, or leaves that are not square
        or do not fit the gradients.

    Use it for the rotations among the parameters, by `optax.multi_transform`; scales beside them,
    and matrices that need not be orthogonal, take an ordinary Adam.

    Cost: one moment of the size of each matrix, and a number; a solve and eight products of n × n
    matrices a step, O(n³).

    Example:
      >>> optimizer = stiefel_adam(0.1)
      >>> rotation = jnp.eye(2)
      >>> gradient = jnp.array([[0.0, 0.0], [1.0, 1.0]])
      >>> updates, _ = optimizer.update(gradient, optimizer.init(rotation), rotation)
      >>> rotation = optax.apply_updates(rotation, updates)
      >>> print((rotation @ rotation.T).round(4))
      [[1. 0.]
       [0. 1.]]

    Reference: Li, Fuxin, Todorovic, "Efficient Riemannian Optimization on the Stiefel Manifold via
    the Cayley Transform", 2020, arXiv:2002.01113; as the optimizer of Hu et al., "OstQuant:
    Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for
    Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    check_interval(0, 1, closed="left", b1=b1, b2=b2)
    check_interval(0, jnp.inf, eps=eps)
    if not callable(learning_rate):
        check_interval(0, jnp.inf, learning_rate=learning_rate)

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            _check_square(**{"params" + jax.tree_util.keystr(path): jnp.asarray(leaf)})
        return StiefelAdamState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda r: jnp.zeros(r.shape, compute_dtype(r)), params),
            jax.tree.map(lambda r: jnp.zeros((*r.shape[:-2], 1, 1), compute_dtype(r)), params),
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params must be passed to update: the steps start there, got None")
        check_same_tree(state.mu, updates=updates, params=params)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)

        def leaf(g, r, mu, nu):
            wide = jnp.asarray(r, mu.dtype)
            tangent = _tangent(wide, jnp.asarray(g, mu.dtype))
            mu = b1 * mu + (1 - b1) * tangent
            squares = jnp.sum(jnp.square(tangent), axis=(-2, -1), keepdims=True)
            nu = b2 * nu + (1 - b2) * squares
            corrected = nu / (1 - b2 ** count.astype(mu.dtype))
            root = jnp.sqrt(jnp.where(corrected > 0, corrected, 1.0)) * (corrected > 0)
            length = (1 - b1 ** count.astype(mu.dtype)) * (root + eps)
            direction = mu / jnp.where(length > 0, length, 1.0)
            turned = cayley_update(wide, 0.5 * direction, rate)
            turned = 1.5 * turned - 0.5 * _matmul(turned, _matmul(turned.mT, turned))
            return (turned - wide).astype(jnp.result_type(g)), _tangent(turned, mu), nu

        triples = jax.tree.map(leaf, updates, params, state.mu, state.nu)
        outer, inner = jax.tree.structure(updates), jax.tree.structure((0, 0, 0))
        steps, mu, nu = jax.tree.transpose(outer, inner, triples)
        return steps, StiefelAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _tangent(r: Array, m: Array) -> Array:
    """The part of m along the orthogonal matrices at r."""
    return 0.5 * (m - _matmul(r, _matmul(m.mT, r)))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _check_square(**arrays: Array) -> None:
    for name, array in arrays.items():
        if array.ndim < 2 or array.shape[-1] != array.shape[-2]:
            raise ValueError(f"{name} must have shape [..., n, n], got {array.shape}")
