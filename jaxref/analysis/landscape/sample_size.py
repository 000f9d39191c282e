"""How little one more example changes the loss, and how many examples are enough by that."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.analysis.landscape.lanczos import stochastic_lanczos
from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype


def loss_difference_curve(
    per_example_losses: ArrayLike,
    *,
    num_permutations: int = 0,
    smoothing: ArrayLike = 0.0,
    key: Array | None = None,
) -> Array:
    r"""How much the mean loss of k examples changes with one more, for each k.

        Δ_k = |L_{k+1} - L_k| = |ℓ_{k+1} - L_k| / (k + 1),   L_k = (1/k) Σ_{i≤k} ℓ_i

    then, where wanted, the mean of Δ over random orders of the examples, and a moving average
    e_k = s e_{k-1} + (1 - s) Δ_k from e_1 = Δ_1.

    Args:
      per_example_losses: ℓ `[..., m]` floating point, finite, of m examples, at least 2, at the
        same parameters.
      num_permutations: random orders to average over, the same for all rows. Default 0, the order
        as given; 100 in the paper.
      smoothing: s in [0, 1). Default 0, none; 0.99 in the paper's figures.
      key: random key of the orders, needed for any.

    Returns:
      Δ for k = 1 ... m - 1, `[..., m - 1]`, in at least float32.

    Raises:
      ValueError: fewer than two examples, losses that are not finite, a number out of range, or
        orders without a key.
      TypeError: losses that are not floating point.

    Use it to see how the landscape settles: for examples from one distribution Δ falls like 1/k,
    and higher for a network whose losses vary more. `sufficient_sample_size` reads off a number.

    Cost: time O(m) a row for each order and for the average, memory m for each order; no
    evaluation of a model.

    Example:
      >>> print(loss_difference_curve(jnp.array([1.0, 3.0, 5.0, 3.0])))
      [1. 1. 0.]

    Reference: Kiselev, Grabovoy, "Unraveling the Hessian: A Key to Smooth Convergence in Loss
    Function Landscapes", 2024, arXiv:2409.11995.
    """
    check_floating(per_example_losses=per_example_losses)
    check_interval(0, jnp.inf, num_permutations=num_permutations)
    check_interval(0, 1, closed="left", smoothing=smoothing)
    if not isinstance(per_example_losses, jax.core.Tracer):
        check_interval(-jnp.inf, jnp.inf, per_example_losses=per_example_losses)
    losses = jnp.asarray(per_example_losses, compute_dtype(per_example_losses))
    if losses.ndim == 0 or losses.shape[-1] < 2:
        raise ValueError(
            f"per_example_losses must have shape [..., examples], at least 2, got {losses.shape}"
        )

    def shuffled(key: Array) -> Array:
        return _differences(jax.random.permutation(key, losses, axis=-1))

    if num_permutations == 0:
        curve = _differences(losses)
    elif key is None:
        raise ValueError("key must be given for num_permutations above 0")
    else:
        curve = jnp.mean(lax.map(shuffled, jax.random.split(key, num_permutations)), axis=0)

    def average(last, value):
        last = smoothing * last + (1 - smoothing) * value
        return last, last

    by_size = jnp.moveaxis(curve, -1, 0)
    return jnp.moveaxis(lax.scan(average, by_size[0], by_size)[1], 0, -1)


def sufficient_sample_size(
    per_example_losses: ArrayLike,
    tolerance: ArrayLike,
    *,
    num_permutations: int = 0,
    smoothing: ArrayLike = 0.99,
    key: Array | None = None,
) -> Array:
    r"""The number of examples from which on one more hardly changes the mean loss.

        min { k : e_j < τ for all j = k ... m - 1 }

    with e the smoothed curve of `loss_difference_curve`.

    Args:
      per_example_losses: ℓ `[..., m]` floating point, finite, of m examples, at least 2.
      tolerance: τ above 0, of a shape that broadcasts to `[...]`.
      num_permutations: random orders to average over. Default 0, the order as given.
      smoothing: s in [0, 1). Default 0.99, the paper's.
      key: random key of the orders, needed for any.

    Returns:
      k `[...]`, integers from 1 to m - 1; m where the last difference is no less than τ, for which
      the sample is too small to tell.

    Raises:
      ValueError: as `loss_difference_curve`, or a `tolerance` out of range.
      TypeError: losses that are not floating point.

    Use it after training, on held-out losses: where it is well below m, more data of this kind
    would not move the minimum by much. With 1/k for the curve it grows like 1/τ.

    Cost: as `loss_difference_curve`.

    Example:
      >>> losses = jnp.array([1.0, 3.0, 5.0, 3.0, 2.5, 3.5])
      >>> print(sufficient_sample_size(losses, 0.5, smoothing=0.0))
      3

    Reference: Kiselev, Grabovoy, "Unraveling the Hessian: A Key to Smooth Convergence in Loss
    Function Landscapes", 2024, arXiv:2409.11995.
    """
    check_interval(0, jnp.inf, closed="neither", tolerance=tolerance)
    curve = loss_difference_curve(
        per_example_losses, num_permutations=num_permutations, smoothing=smoothing, key=key
    )
    is_far = ~(curve < jnp.asarray(tolerance)[..., None])
    sizes = jnp.arange(1, curve.shape[-1] + 1)
    return jnp.max(jnp.where(is_far, sizes, 0), axis=-1) + 1


def relu_network_hessian_bound(
    num_layers: int,
    weight_norm: ArrayLike,
    input_norm: ArrayLike,
    *,
    variant: Literal["paper", "tight"] = "paper",
) -> Array:
    r"""A bound on the Hessian of one example's cross-entropy in the weights of a ReLU network.

        paper:  √2 (L M_x² M_W^{2L} + Σ_{p=1..L} M_W^{2p})
        tight:  ½ L M_x² M_W^{2(L-1)}

    for the spectral norm of the Gauss-Newton part Fᵀ A F of the Hessian, A = diag(p) - p pᵀ, of L
    linear layers without biases, with ReLU between them and softmax at the end. The paper takes
    ||A|| ≤ √2 and counts each layer's own matrix among those behind it, which makes the exponent
    2L and the bound too low for small M_W; the tight one has ||A|| ≤ ½ and those behind it only.

    Args:
      num_layers: L, at least 1, the number of weight matrices.
      weight_norm: M_W at least 0, of any shape, the largest spectral norm of a weight matrix; for
        entries up to M and a width of h it is at most h M.
      input_norm: M_x at least 0, the largest length of an input.
      variant: "paper" (default), a bound for M_W ≥ 1, or "tight", always one.

    Returns:
      the bound, of the common shape of the arguments, in at least float32.

    Raises:
      ValueError: an argument out of range, or an unknown `variant`.

    Use it for `loss_difference_bound`, to see the effect of depth and of width;
    `gauss_newton_hessian_norm` measures what it bounds, mostly much less.

    Cost: O(L) operations for each value, no evaluation of a model.

    Example:
      >>> print(relu_network_hessian_bound(2, 2.0, 1.0, variant="tight"))
      4.0

    Reference: Kiselev, Grabovoy, "Unraveling the Hessian: A Key to Smooth Convergence in Loss
    Function Landscapes", 2024, arXiv:2409.11995.
    """
    if variant not in ("paper", "tight"):
        raise ValueError(f"variant must be 'paper' or 'tight', got {variant!r}")
    check_interval(1, jnp.inf, num_layers=num_layers)
    check_interval(0, jnp.inf, weight_norm=weight_norm, input_norm=input_norm)
    dtype = compute_dtype(weight_norm, input_norm)
    weight, length = jnp.asarray(weight_norm, dtype), jnp.asarray(input_norm, dtype)
    square, by_input = jnp.square(weight), num_layers * jnp.square(length)
    if variant == "tight":
        return 0.5 * by_input * square ** (num_layers - 1)
    by_biases = sum(square**p for p in range(1, num_layers + 1))
    return jnp.sqrt(2.0).astype(dtype) * (by_input * square**num_layers + by_biases)


def loss_difference_bound(
    sample_size: ArrayLike,
    loss_bound: ArrayLike,
    hessian_bound: ArrayLike,
    radius: ArrayLike,
) -> Array:
    r"""A bound on how much one more example changes the mean loss near a minimum.

        |L_{k+1}(θ) - L_k(θ)| ≤ 2/(k + 1) (M_ℓ + M_H R²)

    for θ within R of a θ* at which both mean losses have gradient 0, to second order around it. As
    in the paper, M_H R² is there without its ½.

    Args:
      sample_size: k at least 1, of any shape.
      loss_bound: M_ℓ at least 0, the largest loss of an example at θ*.
      hessian_bound: M_H at least 0, the largest spectral norm of the Hessian of an example's loss
        at θ*, as from `relu_network_hessian_bound`.
      radius: R at least 0.

    Returns:
      the bound, of the common shape of the arguments, in at least float32.

    Raises:
      ValueError: an argument out of range.

    Use it for how the difference depends on k, on the distance and, through M_H, on the network:
    as L (hM)^{2L} R² / k. What `loss_difference_curve` measures is mostly far below.

    Cost: a few operations for each value, no evaluation of a model.

    Example:
      >>> print(loss_difference_bound(99, 2.0, 4.0, 0.5))
      0.06

    Reference: Kiselev, Grabovoy, "Unraveling the Hessian: A Key to Smooth Convergence in Loss
    Function Landscapes", 2024, arXiv:2409.11995.
    """
    check_interval(1, jnp.inf, sample_size=sample_size)
    check_interval(0, jnp.inf, loss_bound=loss_bound, hessian_bound=hessian_bound, radius=radius)
    dtype = compute_dtype(loss_bound, hessian_bound, radius)
    loss, hessian = jnp.asarray(loss_bound, dtype), jnp.asarray(hessian_bound, dtype)
    k, distance = jnp.asarray(sample_size, dtype), jnp.asarray(radius, dtype)
    return 2 / (k + 1) * (loss + hessian * jnp.square(distance))


def gauss_newton_hessian_norm(
    apply_fn: Callable[[Any, Any], Array],
    params: Any,
    x: Any,
    *,
    num_steps: int = 20,
    key: Array,
) -> Array:
    r"""The largest eigenvalue of the Gauss-Newton part of the Hessian of the cross-entropy.

        ||(1/n) Σ_i J_iᵀ A_i J_i||,   A_i = diag(p_i) - p_i p_iᵀ

    with J_i the Jacobian of the logits of example i in the parameters and p_i their softmax: by the
    Lanczos iteration on products with vectors. It does not depend on the labels, and is the Hessian
    itself where the logits are linear in the parameters.

    Args:
      apply_fn: `apply_fn(params, x)` gives logits `[..., classes]` floating point, whose leading
        axes together are the n examples: one example without leading axes gives ||H_i||.
      params: tree of floating-point arrays with P entries, at least one.
      x: what `apply_fn` takes.
      num_steps: Lanczos steps, at least 1. Default 20; as many as classes are enough for one
        example, whose matrix has that rank at most.
      key: random key of the start.

    Returns:
      the norm, a scalar at least 0 in at least float32.

    Raises:
      ValueError: `num_steps` out of range, no parameters, or logits without examples or classes.
      TypeError: parameters or logits that are not floating point.

    Use it for how sharp the loss is, without the curvature of the network itself, which near a
    minimum is small; `stochastic_lanczos` with a Hessian-vector product has all of it.

    Cost: with m steps, m forward and m backward passes over x along a linearization, which keeps
    the activations; memory m P.

    Example:
      >>> x = jnp.array([3.0, 4.0])  # p = 1/2, A has the eigenvalue 1/2
      >>> norm = gauss_newton_hessian_norm(jnp.matmul, jnp.zeros((2, 2)), x, key=jax.random.key(0))
      >>> print(f"{norm:.3f}")
      12.500

    Reference: Kiselev, Grabovoy, "Unraveling the Hessian: A Key to Smooth Convergence in Loss
    Function Landscapes", 2024, arXiv:2409.11995.
    """
    logits, push = jax.linearize(lambda params: apply_fn(params, x), params)
    check_floating(logits=logits)
    if logits.ndim == 0 or logits.size == 0:
        raise ValueError(f"logits must have shape [..., classes] and entries, got {logits.shape}")
    pull = jax.linear_transpose(push, params)
    p = jax.nn.softmax(logits.astype(compute_dtype(logits)), axis=-1)
    n = logits.size // logits.shape[-1]

    def product(v: Any) -> Any:
        u = p * push(v)
        curved = (u - p * jnp.sum(u, axis=-1, keepdims=True)) / n
        return pull(curved.astype(logits.dtype))[0]

    spectrum = stochastic_lanczos(product, params, num_steps=num_steps, key=key)
    return jnp.maximum(spectrum.ritz_max, 0.0)


def _differences(losses: Array) -> Array:
    """|L_{k+1} - L_k| at the last axis, without the difference of two means that nearly agree."""
    k = jnp.arange(1, losses.shape[-1], dtype=losses.dtype)
    means = jnp.cumsum(losses[..., :-1], axis=-1) / k
    return jnp.abs(losses[..., 1:] - means) / (k + 1)
