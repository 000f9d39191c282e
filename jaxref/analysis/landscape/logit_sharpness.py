"""Sharpness of the loss in the logits, which a forward pass is enough to measure."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from scipy.optimize import minimize

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import expected_over_labels, masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.losses import softmax_cross_entropy


def logit_sharpness(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: float = 1e-3,
    method: Literal["exact", "lbfgs"] = "exact",
    loss: Callable[..., Array] | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""How far the loss can rise if every logit moves by a small part of its size, in per cent.

        φ = 100 (max_{δ in C} ℓ(y + δ) - ℓ(y)) / (1 + ℓ(y)),   C = { δ : |δ_j| ≤ ε (|y_j| + 1) }

    The cross-entropy with target t rises with every logit but the target's, so its maximum is at
    the corner δ_t = -r_t and δ_j = r_j of the box, r_j = ε (|y_j| + 1), and with p = softmax(y)

        ℓ(y + δ) - ℓ(y) = log(1 + Σ_{j≠t} p_j (exp(r_j + r_t) - 1))

    Args:
      logits: y `[..., classes]` floating point. For a language model those of the last position,
        `logits[:, -1]`, which depend on all tokens before.
      targets: integer ids t `[...]`, the next tokens; or, for "lbfgs", anything that `loss` takes,
        with the axes `[...]` first. An id that is not an admitted class gives NaN.
      epsilon: ε at least 0. Default 1e-3, where Keskar et al. also take 5e-4.
      method: "exact" (default) is the corner. "lbfgs" climbs from y with L-BFGS and projections
        onto the box, one example after the other in float64 on the host, not under jit: for losses
        that have their maximum elsewhere, and then a local one.
      loss: for "lbfgs", `loss(logits, targets)` with one value for each example, as those of
        `jaxref.losses`; `where` goes on to it as a keyword. Default: cross-entropy.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      φ `[...]` at least 0 in at least float32, its mean over a batch being the paper's metric; 0
      where no class is admitted, or only the target.

    Raises:
      ValueError: shapes that do not match, a negative `epsilon`, an unknown `method`, a `loss` for
        "exact", or traced arrays for "lbfgs".
      TypeError: logits that are not floating point, or for "exact" targets that are not integers.

    Use it while training, on a batch that stays the same: in the paper it rises before the loss
    does, as precision falls. Sharpness in the weights takes a forward and a backward pass for each
    step of the climb. For small ε it is 100 ε Σ_j |∂ℓ/∂y_j| (|y_j| + 1) / (1 + ℓ).

    Cost: a forward pass of the model and a softmax; for "lbfgs" a loss and gradient in the logits
    for each step and example, on the host.

    Example:
      >>> logits, targets = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0])
      >>> print(logit_sharpness(logits, targets).round(4))
      [0.0571]
      >>> print(logit_sharpness(logits, targets, method="lbfgs").round(4))
      [0.0571]

    Reference: Lee, Bae, Kim, Kwon, Lee, "To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability", 2024, arXiv:2405.18710, after Keskar, Mudigere, Nocedal,
    Smelyanskiy, Tang, "On Large-Batch Training for Deep Learning: Generalization Gap and Sharp
    Minima", 2016, arXiv:1609.04836.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, epsilon=epsilon)
    shape = jnp.shape(logits)
    if not shape or shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., classes], at least one, got {shape}")
    check_broadcastable(shape, where=where)
    if method == "exact":
        if loss is not None:
            raise ValueError("loss must be None for method 'exact', which is for cross-entropy")
        return _corner(jnp.asarray(logits), jnp.asarray(targets), epsilon, where)
    if method != "lbfgs":
        raise ValueError(f"method must be 'exact' or 'lbfgs', got {method!r}")
    if any(isinstance(x, jax.core.Tracer) for x in (logits, targets, where)):
        raise ValueError("method 'lbfgs' runs on the host and takes no traced arrays")
    return _climb(logits, targets, epsilon, loss or softmax_cross_entropy, where)


def _corner(y: Array, targets: Array, epsilon: ArrayLike, where: ArrayLike | None) -> Array:
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets must be integer ids, got {targets.dtype.name}")
    check_shape(y.shape[:-1], targets=targets)
    loss = expected_over_labels(jnp.negative, targets, y, where=where)
    if where is not None:
        y = jnp.where(where, y, 0)
    log_p = masked_log_softmax(y, axis=-1, where=where)
    reach = epsilon * (jnp.abs(y.astype(log_p.dtype)) + 1)
    is_target = jnp.arange(y.shape[-1]) == targets[..., None]
    gain = reach + jnp.sum(reach, axis=-1, keepdims=True, where=is_target)  # on the target
    moves = ~is_target & (gain > 0)
    if where is not None:
        moves &= where
    # log(p (exp(gain) - 1)): a difference of two losses would leave nothing of a small rise
    gain = jnp.where(moves, gain, 1.0)
    terms = jnp.where(moves, log_p + gain + jnp.log(-jnp.expm1(-gain)), jnp.finfo(gain.dtype).min)
    return 100 * jax.nn.softplus(jax.nn.logsumexp(terms, axis=-1)) / (1 + loss)


def _climb(
    logits: ArrayLike,
    targets: ArrayLike,
    epsilon: float,
    loss: Callable[..., Array],
    where: ArrayLike | None,
) -> Array:
    y, t = np.asarray(logits, np.float64), np.asarray(targets)
    leading = y.shape[:-1]
    if t.shape[: len(leading)] != leading:
        raise ValueError(f"targets must have the axes {leading} first, got shape {t.shape}")
    admitted = np.broadcast_to(True if where is None else np.asarray(where, bool), y.shape)
    y = np.where(admitted, y, 0.0)
    reach = np.where(admitted, epsilon * (np.abs(y) + 1), 0.0)
    sharpness = np.zeros(leading)
    with jax.enable_x64(True):
        for i in np.ndindex(leading):
            extra = {} if where is None else {"where": admitted[i]}
            base, rise = _highest(y[i], reach[i], t[i], loss, extra)
            sharpness[i] = 100 * rise / (1 + base)
    return jnp.asarray(sharpness, compute_dtype(logits))


def _highest(
    y: np.ndarray, reach: np.ndarray, target: Any, loss: Callable[..., Array], extra: dict[str, Any]
) -> tuple[float, float]:
    """The loss at y, and how much higher it is at the end of the climb from there."""
    start = np.zeros_like(y)
    base, slope = (np.asarray(x) for x in _loss_and_slope(start, y, reach, target, loss, extra))
    unit = np.max(np.abs(slope), initial=0.0)
    if unit == 0 or not np.isfinite(base):
        return float(base), float(0 * base)

    def fall(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _loss_and_slope(u, y, reach, target, loss, extra)
        return float(base - value) / unit, np.asarray(slope) / -unit

    found = minimize(
        fall,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(-1, 1)] * y.size,
        options={"ftol": 1e-12, "gtol": 1e-9},
    )
    return float(base), max(float(-found.fun * unit), 0.0)


@functools.partial(jax.jit, static_argnames="loss")
def _loss_and_slope(u, y, reach, target, loss, extra):
    """In coordinates u in which the box is [-1, 1]."""
    return jax.value_and_grad(lambda u: loss(y + reach * u, target, **extra))(u)
