"""Kernels of a bounded or learned spectral norm, which a power iteration follows in training."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype

_dot = partial(jnp.dot, precision="highest")  # accelerators round float32 products by default


class SpectralState(NamedTuple):
    """What the power iteration on one kernel remembers.

    Attributes:
      u: float32 `[out]` of norm 1: the estimate of the singular vector of the outputs.
      sigma: float32 scalar: the spectral norm, as the newest step in training found it.
    """

    u: Array
    sigma: Array


def _matrix(kernel: ArrayLike) -> Array:
    """A kernel as `[fan_in, out]` in at least float32."""
    check_floating(kernel=kernel)
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2 or kernel.size == 0:
        raise ValueError(f"kernel must have shape [..., out] with inputs, got {kernel.shape}")
    return kernel.astype(compute_dtype(kernel)).reshape(-1, kernel.shape[-1])


def _direction(x: Array) -> tuple[Array, Array]:
    """x / ‖x‖, without overflow or underflow of the squares, and whether x is not 0."""
    largest = jnp.max(jnp.abs(x))
    x /= jnp.where(largest > 0, largest, 1.0)
    return x / jnp.where(largest > 0, jnp.linalg.norm(x), 1.0), largest > 0


def spectral_norm_power_iteration(
    kernel: ArrayLike, u: ArrayLike, num_steps: int = 1
) -> tuple[Array, Array, Array]:
    r"""The largest singular value of a kernel by power iteration, and its singular vectors.

        v ← W u / ‖W u‖,   u ← Wᵀ v / ‖Wᵀ v‖,   σ = vᵀ W u

    u and v count as constants: the gradient of σ is v uᵀ, which is that of the spectral norm once
    they have converged. σ never exceeds the spectral norm.

    Args:
      kernel: W, `[..., out]` floating point, taken as the matrix `[fan_in, out]`.
      u: `[out]` of norm 1, the estimate to start from: what the last call gave.
      num_steps: steps to make, at least 1. Default 1, enough for a kernel that moves little between
        two calls.

    Returns:
      σ, a scalar, and u `[out]` and v `[fan_in]`, all in at least float32. Where W
      maps `u` to 0, the step starts from the output with the largest weights instead, so that σ is
      0 only for W = 0, for which u stays as it is and v is 0.

    Raises:
      ValueError: `kernel` has less than two axes or no entries, `u` is not of shape `[out]`, or
        `num_steps` is below 1.
      TypeError: `kernel` or `u` is not floating point.

    Use it to follow the spectral norm of a kernel in training; `jnp.linalg.norm(matrix, 2)` is
    exact and costs a whole singular value decomposition.

    Cost: three products of the kernel with a vector for each step, and one more for σ.

    Example:
      >>> sigma, u, v = spectral_norm_power_iteration(jnp.diag(jnp.array([3.0, 1.0])), jnp.ones(2))
      >>> print(*(f"{x:.2f}" for x in (sigma, *u)))
      2.86 0.99 0.11

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296, after Miyato, Kataoka, Koyama, Yoshida, "Spectral
    Normalization for Generative Adversarial Networks", 2018, arXiv:1802.05957.
    """
    matrix = _matrix(kernel)
    check_floating(u=u)
    check_shape(matrix.shape[1:], u=u)
    check_interval(1, jnp.inf, num_steps=num_steps)
    fixed = jax.lax.stop_gradient(matrix)
    u = jax.lax.stop_gradient(jnp.asarray(u, matrix.dtype))
    sizes = jnp.max(jnp.abs(fixed), axis=0)
    largest_output = (jnp.arange(u.size) == jnp.argmax(sizes)).astype(u.dtype)
    for _ in range(num_steps):
        image = _dot(fixed, u)
        v, _ = _direction(jnp.where(jnp.any(image != 0), image, _dot(fixed, largest_output)))
        next_u, moved = _direction(_dot(v, fixed))
        u = jnp.where(moved, next_u, u)
    return _dot(_dot(v, matrix), u), u, v


def spectral_normalization_init(kernel: ArrayLike) -> SpectralState:
    """The state for `spectral_normalization` and `sigma_reparam`, exact by decomposition.

    Args:
      kernel: `[..., out]` floating point, taken as the matrix `[fan_in, out]`.

    Returns:
      the `SpectralState` of the largest singular value and its vector.

    Raises:
      ValueError: `kernel` has less than two axes or no entries.
      TypeError: `kernel` is not floating point.

    Use it before training, and again for kernels that were loaded without their state: the power
    iteration then starts where it would have ended.

    Cost: a singular value decomposition, O(fan_in · out · min(fan_in, out)), once.

    Example:
      >>> print(spectral_normalization_init(jnp.diag(jnp.array([3.0, 1.0]))).sigma)
      3.0

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """
    matrix = jax.lax.stop_gradient(_matrix(kernel)).astype(jnp.float32)
    _, singular_values, directions = jnp.linalg.svd(matrix, full_matrices=False)
    return SpectralState(directions[0], singular_values[0])


def spectral_normalization(
    kernel: ArrayLike, state: SpectralState, *, update: bool = True, epsilon: float = 1e-12
) -> tuple[Array, SpectralState]:
    r"""Spectral normalization: a kernel over its largest singular value.

        Ŵ = W / max(σ, ε)

    with σ of one step of `spectral_norm_power_iteration`. The layer then stretches no vector; being
    `W → c W` without effect for c > 0, the gradient is orthogonal to W.

    Args:
      kernel: W, `[..., out]` floating point, taken as the matrix `[fan_in, out]`.
      state: of `spectral_normalization_init`, or what the last call gave.
      update: whether the step is stored: True in training.
      epsilon: ε at least 0, the least σ that is divided by. Default 1e-12.

    Returns:
      Ŵ of the shape and type of `kernel`, computed in at least float32, and the next state, `state`
      itself without `update`. A kernel of zeros stays 0, with gradients enlarged by 1 / ε.

    Raises:
      ValueError: `kernel` has less than two axes or no entries, a state of another kernel, or a
        negative `epsilon`.
      TypeError: `kernel` is not floating point.

    Use it on the linear maps of a network whose Lipschitz constant matters or that has no norm of
    the activations; `sigma_reparam` learns the norm, `weight_normalization` treats every output on
    its own.

    Cost: four products of the kernel with a vector a call, in evaluation too; out + 1 numbers of
    state for a kernel.

    Example:
      >>> kernel = jnp.diag(jnp.array([4.0, 1.0]))
      >>> print(spectral_normalization(kernel, spectral_normalization_init(kernel))[0])
      [[1.   0.  ]
       [0.   0.25]]

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489,
    after Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial
    Networks", 2018, arXiv:1802.05957.
    """
    return sigma_reparam(kernel, 1.0, state, update=update, epsilon=epsilon)


def sigma_reparam_init(
    kernel: ArrayLike, gamma_init: float | Literal["spectral"] = 1.0
) -> tuple[Array, SpectralState]:
    r"""The learned spectral norm γ and the state that `sigma_reparam` starts from.

    Args:
      kernel: W₀, `[..., out]` floating point, taken as the matrix `[fan_in, out]`.
      gamma_init: a number, 1 (default) in the paper and in its speech recognizer, or "spectral" for
        σ(W₀), which leaves the initial layer as it is, as in its vision transformer.

    Returns:
      γ, a float32 scalar, and the `SpectralState`, exact by singular value decomposition.

    Raises:
      ValueError: an unknown `gamma_init`, or a `kernel` of less than two axes or without entries.
      TypeError: `kernel` is not floating point.

    Use it before training, once for each kernel of `sigma_reparam`; with "spectral" where the layer
    should start as it is, trained weights for example.

    Cost: a singular value decomposition, O(fan_in · out · min(fan_in, out)), once.

    Example:
      >>> gamma, state = sigma_reparam_init(jnp.diag(jnp.array([4.0, 1.0])), "spectral")
      >>> print(gamma)
      4.0

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """
    state = spectral_normalization_init(kernel)
    if isinstance(gamma_init, str):
        if gamma_init != "spectral":
            raise ValueError(f"gamma_init must be a number or 'spectral', got {gamma_init!r}")
        return state.sigma, state
    check_interval(-jnp.inf, jnp.inf, gamma_init=gamma_init)
    return jnp.asarray(gamma_init, jnp.float32), state


def sigma_reparam(
    kernel: ArrayLike,
    gamma: ArrayLike,
    state: SpectralState,
    *,
    update: bool = True,
    epsilon: float = 1e-12,
) -> tuple[Array, SpectralState]:
    r"""σReparam: a kernel whose spectral norm is a parameter of its own.

        Ŵ = γ W / max(σ(W), ε)

    with σ of one step of `spectral_norm_power_iteration`, through which the gradient flows. In a
    transformer the logits of attention grow with the spectral norms of its projections, and with
    them the entropy of attention falls: here they move only as fast as the scalars γ do. The scale
    of W is without effect, so that weight decay belongs to neither.

    Args:
      kernel: W, `[..., out]` floating point, taken as the matrix `[fan_in, out]`.
      gamma: γ, a scalar.
      state: of `sigma_reparam_init`, or what the last call gave.
      update: whether the step is stored: True in training. Without, the step is made all the same.
      epsilon: ε at least 0, the least σ that is divided by. Default 1e-12.

    Returns:
      Ŵ of the shape and type of `kernel`, computed in at least float32, and the next state, `state`
      itself without `update`. A kernel of zeros stays 0, with gradients enlarged by γ / ε.

    Raises:
      ValueError: `kernel` has less than two axes or no entries, `gamma` is not a scalar, a state of
        another kernel, or a negative `epsilon`.
      TypeError: `kernel` or `gamma` is not floating point.

    Use it on all linear maps and convolutions of a transformer, not on embeddings and norms, to
    train it without warm-up, weight decay or normalization; `query_key_norm_attention` bounds
    the logits directly.

    Cost: four products of the kernel with a vector a call, in evaluation too; γ to learn and out +
    1 numbers of state for a kernel.

    Example:
      >>> kernel = jnp.diag(jnp.array([4.0, 1.0]))
      >>> gamma, state = sigma_reparam_init(kernel, 2.0)
      >>> print(sigma_reparam(kernel, gamma, state)[0])
      [[2.  0. ]
       [0.  0.5]]

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """
    check_floating(gamma=gamma)
    check_shape((), gamma=gamma)
    check_interval(0, jnp.inf, epsilon=epsilon)
    kernel = jnp.asarray(kernel)
    sigma, u, _ = spectral_norm_power_iteration(kernel, state.u)
    divisor = jnp.maximum(sigma, epsilon)
    divisor = jnp.where(divisor > 0, divisor, 1.0)  # both may be 0
    y = (kernel * (gamma / divisor)).astype(kernel.dtype)
    if not update:
        return y, state
    sigma = jax.lax.stop_gradient(sigma)
    return y, SpectralState(u.astype(jnp.float32), sigma.astype(jnp.float32))
