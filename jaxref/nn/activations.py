"""Activations found through the entropy of their outputs, and the search for them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating
from jaxref.core.numerics import compute_dtype

Function = Callable[[Array], Array]


def crrelu(x: ArrayLike, epsilon: ArrayLike = 0.01) -> Array:
    r"""ReLU with the correction that its entropy asks for (CRReLU).

        y = max(0, x) + ε x exp(-x² / 2),   ∂y/∂x = 1[x > 0] + ε (1 - x²) exp(-x² / 2)

    The correction is odd, at most `ε exp(-1/2)` in size, at x = ±1, and vanishes where |x| is
    large. With it, small negative inputs have a gradient too.

    Args:
      x: `[...]` floating point.
      epsilon: ε, a number or broadcastable to `x`; learned, one for each layer. Default 0.01, from
        which the paper starts.

    Returns:
      y of the shape and type of `x`, computed in at least float32.

    Raises:
      TypeError: `x` is not floating point.

    Use it in place of ReLU or GELU where small negative inputs are to keep a gradient; `CRReLU` is
    the module with a learned ε, `entropy_correction` derives others.

    Cost: elementwise, with one exponential for each entry.

    Example:
      >>> print(crrelu(jnp.array([-1.0, 0.0, 1.0]), 0.1).round(3))
      [-0.061  0.     1.061]

    Reference: Sun et al., "A Method on Searching Better Activation Functions", 2024,
    arXiv:2405.12954.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    wide = x.astype(compute_dtype(x))
    y = jax.nn.relu(wide) + epsilon * wide * jnp.exp(-jnp.square(wide) / 2)
    return y.astype(x.dtype)


class CRReLU(nnx.Module):
    """`crrelu` with a learned ε.

        y = max(0, x) + ε x exp(-x² / 2)

    Args:
      epsilon: initial ε. Default 0.01.
      param_dtype: type of ε.

    Attributes:
      epsilon: the parameter, a scalar.

    Raises:
      TypeError: an input that is not floating point.

    Use it as the `activation` of an `MLP`, which makes one of its own from the class.

    Cost: one parameter; elementwise, with one exponential for each entry.

    Example:
      >>> print(CRReLU()(jnp.array([-1.0, 2.0])).round(3))
      [-0.006  2.003]

    Reference: Sun et al., "A Method on Searching Better Activation Functions", 2024,
    arXiv:2405.12954.
    """

    def __init__(self, epsilon: float = 0.01, *, param_dtype: DTypeLike = jnp.float32):
        self.epsilon = nnx.Param(jnp.asarray(epsilon, param_dtype), axes=())

    def __call__(self, x: Array) -> Array:
        """Maps `[...]` to the same."""
        return crrelu(x, self.epsilon[...])


def worst_activation(
    x: ArrayLike, cumulative_distribution: Function, *, low: float = 0.0, high: float = 1.0
) -> Array:
    r"""The bounded activation whose outputs have the most entropy: the inputs' own distribution.

        f(x) = low + (high - low) F(x),   F(x) = P(input ≤ x)

    Its outputs are uniform on (low, high) whatever comes in, which tells the least about it.
    Sigmoid and tanh are close to it for normal inputs.

    Args:
      x: `[...]` floating point.
      cumulative_distribution: F, elementwise, such as `jax.scipy.stats.norm.cdf`.
      low, high: the boundary values. Default 0 and 1.

    Returns:
      f(x), of the shape of `x`.

    Raises:
      TypeError: `x` is not floating point.

    Use it as the end of the scale that `activation_entropy` measures on; to see which bounded
    activation to avoid for a given distribution.

    Cost: elementwise, one call of `cumulative_distribution`.

    Example:
      >>> print(worst_activation(jnp.array([-1e4, 0.0, 1e4]), jax.scipy.stats.norm.cdf, low=-1.0))
      [-1. 0. 1.]

    Reference: Sun et al., "A Method on Searching Better Activation Functions", 2024,
    arXiv:2405.12954.
    """
    check_floating(x=x)
    return low + (high - low) * cumulative_distribution(jnp.asarray(x))


def entropy_correction(inverse: Function, density: Function) -> Function:
    r"""How to change an activation's inverse so that the entropy of its outputs falls fastest.

    With y the inverse of an increasing activation and p the density of its inputs, the outputs
    have the density `q(t) = p(y(t)) y'(t)` and the entropy `G[y] = -∫ q log q dt`, and

        η(t) = -δG/δy(t) = -(p'(y) y' + p(y) y'' / y')

    For ReLU on the positive side, y(t) = t, and normal inputs, `η(t) = t p(t)`, which is the
    correction of `crrelu` up to its factor.

    Args:
      inverse: y, from a scalar to a scalar, twice differentiable by JAX.
      density: p, from a scalar to a scalar, differentiable and positive.

    Returns:
      η, a function of `[...]`. NaN or infinite where y' is 0: mask it there.

    Raises:
      Nothing of its own.

    Use it to derive a better activation from a known one and the distribution of its inputs.

    Cost: two derivatives of `inverse` and one of `density` at each point where η is taken.

    Example:
      >>> eta = entropy_correction(lambda t: t, jax.scipy.stats.norm.pdf)
      >>> print(eta(jnp.array([0.0, 1.0])).round(3))
      [0.    0.242]

    Reference: Sun et al., "A Method on Searching Better Activation Functions", 2024,
    arXiv:2405.12954.
    """
    slope = jax.grad(inverse)
    curvature, density_slope = jax.grad(slope), jax.grad(density)

    def correction(t: Array) -> Array:
        y, dy = inverse(t), slope(t)
        return -(density_slope(y) * dy + density(y) * curvature(t) / dy)

    return jnp.vectorize(correction)


def activation_entropy(inverse: Function, density: Function, grid: ArrayLike) -> Array:
    r"""The entropy of an activation's outputs.

        G = -∫ q(t) log q(t) dt,   q(t) = p(y(t)) y'(t)

    by the trapezoid rule.

    Args:
      inverse: y, the inverse of an increasing activation, from a scalar to a scalar.
      density: p, the density of the inputs, from a scalar to a scalar.
      grid: `[n]` floating point, increasing: output values between which q is integrated.

    Returns:
      A scalar, in nats. At most `log(high - low)` for outputs in (low, high), which the
      `worst_activation` reaches.

    Raises:
      ValueError: a grid that is not a vector of two points or more.
      TypeError: a grid that is not floating point.

    Use it to compare activations for inputs of a known distribution.

    Cost: O(n): `density`, `inverse` and its derivative at each point of the grid.

    Example:
      >>> grid = jnp.linspace(1e-4, 1 - 1e-4, 2000)
      >>> normal = jax.scipy.stats.norm.pdf
      >>> print(activation_entropy(jax.scipy.special.logit, normal, grid).round(2))  # of sigmoid
      -0.19

    Reference: Sun et al., "A Method on Searching Better Activation Functions", 2024,
    arXiv:2405.12954.
    """
    check_floating(grid=grid)
    grid = jnp.asarray(grid)
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"grid must be a vector of two points or more, got shape {grid.shape}")
    q = jax.vmap(lambda t: density(inverse(t)) * jax.grad(inverse)(t))(grid)
    positive = jnp.where(q > 0, q, 1.0)
    return -jnp.trapezoid(q * jnp.log(positive), grid)
