"""EXAdam: Adam whose two moments correct each other, with steps that grow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers.adamw import ScaleByAdamState, scale_by_adam
from jaxref.optimizers.common import (
    accumulate,
    accumulate_squares,
    bias_correction,
    descend,
    store,
)


def scale_by_exadam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    *,
    growing_step: bool = True,
) -> optax.GradientTransformation:
    r"""The direction of EXAdam: averaged plus current gradient, debiased across the moments.

        m ← b1 m + (1 - b1) g,     v ← b2 v + (1 - b2) g²,     m = v = 0 at first
        d₁ = 1 + b2ᵗ v/(v + eps),     d₂ = 1 + b1ᵗ m²/(m² + eps)
        u = s d₁ (m + g)/(1 - b1ᵗ) / (√(d₂ v/(1 - b2ᵗ)) + eps)
        s = ln(√2 √(t + 1)) with growing_step, else 1

    The corrections d₁ and d₂ are up to 1 + b2ᵗ and 1 + b1ᵗ and end at 1; u is then Adam's
    direction plus g/√v. eps stands beside squares there: coordinates with |g| well below √eps
    are hardly corrected, so that u depends on the scale of the loss, as Adam's does not.

    Args:
      b1: in [0, 1), decay of the average of the gradients. Default 0.9.
      b2: in [0, 1), decay of the average of their squares. Default 0.999.
      eps: at least 0. Default 1e-8. With 0 a coordinate whose gradients were all zero gives NaN.
      mu_dtype: the floating type of m; None takes the parameters'. v has at least float32.
      growing_step: whether s grows with the steps: 0.69 at the first, 3.8 at the 1000th, 5 at
        the 10 000th. Default True, the paper's first version; its second has s = 1.

    Returns:
      the transformation; its updates have the gradients' types, and are computed in at least
      float32. Its state is a `ScaleByAdamState`.

    Raises:
      ValueError: a number out of its range; in `update`, gradients of another structure or shape
        than m.
      TypeError: `mu_dtype` is not floating point.

    Use it in an `optax.chain` of one's own; `exadam` is the whole optimizer.

    Cost: two moments for each parameter, as Adam; elementwise work, somewhat more than Adam's.

    Example:
      >>> direction = scale_by_exadam(growing_step=False)
      >>> gradient = jnp.array([3.0, -0.5])
      >>> print(direction.update(gradient, direction.init(gradient))[0].round(2))
      [ 15.95 -15.95]

    Reference: Adly, "EXAdam: The Power of Adaptive Cross-Moments", 2024, arXiv:2412.20302.
    """
    check_interval(0, 1, closed="left", b1=b1, b2=b2)
    check_interval(0, jnp.inf, eps=eps)

    def update(updates, state, params=None):
        del params
        check_same_tree(state.mu, updates=updates)
        count = optax.safe_increment(state.count)
        mu = accumulate(b1, 1 - b1, state.mu, updates)
        nu = accumulate_squares(b2, 1 - b2, state.nu, updates)
        first, second = bias_correction(b1, count), bias_correction(b2, count)
        step = jnp.log(2 * (count + 1.0)) / 2 if growing_step else 1.0

        def leaf(g, m, v):
            d1 = 1 + (1 - second) * (v / (v + eps))
            d2 = 1 + (1 - first) * (m**2 / (m**2 + eps))
            g = jnp.asarray(g, compute_dtype(g))
            return (step / first) * d1 * (m + g) / (jnp.sqrt(d2 * v / second) + eps)

        direction = jax.tree.map(leaf, updates, mu, nu)
        state = ScaleByAdamState(count, store(mu, state.mu), store(nu, state.nu))
        return store(direction, updates), state

    return optax.GradientTransformation(scale_by_adam(mu_dtype=mu_dtype).init, update)


def exadam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    growing_step: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""EXAdam: Adam with cross-moment debiasing, the current gradient, and a growing step.

        x ← x - lr (u + wd x)
        u = s d₁ (m + g)/(1 - b1ᵗ) / (√(d₂ v/(1 - b2ᵗ)) + eps)
        d₁ = 1 + b2ᵗ v/(v + eps),     d₂ = 1 + b1ᵗ m²/(m² + eps)
        s = ln(√2 √(t + 1)) with growing_step, else 1

    m and v are Adam's averages of g and g², with the new gradient in. The decay has the rate lr
    and does not grow. The first step of each coordinate is 16 lr s with the default values, where
    Adam's is lr: begin with a smaller lr than Adam's, or a warmup.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr, which s multiplies. Default 1e-3.
      b1: in [0, 1), decay of the average of the gradients. Default 0.9.
      b2: in [0, 1), decay of the average of their squares. Default 0.999.
      eps: at least 0, in the root's sum and beside the squares in d₁ and d₂. Default 1e-8.
      mu_dtype: the floating type of m; None takes the parameters'. v has at least float32.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. Default 0.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.
      growing_step: whether s multiplies lr by 0.69 at the first step, 3.8 at the 1000th and 5 at
        the 10 000th. Default True, the paper's first version; its second, and the authors'
        present code, have s = 1.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range; in `update`, trees that do not match, or params
        missing where `weight_decay` needs them.
      TypeError: `mu_dtype` is not floating point.

    Use it where Adam reacts too slowly to the present gradient. With a schedule that decays, take
    `growing_step=False`; `adamw` is the safe choice.

    Cost: that of `adamw`: two moments for each parameter, one gradient a step.

    Example:
      >>> optimizer = exadam(0.01, weight_decay=0.5)
      >>> x = jnp.array([1.0, -2.0])
      >>> print(optimizer.update(jnp.array([3.0, -0.1]), optimizer.init(x), x)[0].round(4))
      [-0.1156  0.1205]

    Reference: Adly, "EXAdam: The Power of Adaptive Cross-Moments", 2024, arXiv:2412.20302.
    """
    direction = scale_by_exadam(b1, b2, eps, mu_dtype, growing_step=growing_step)
    return descend(direction, learning_rate, weight_decay, mask)
