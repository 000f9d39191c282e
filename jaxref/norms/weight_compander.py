"""Weights as a bounded function of the parameters that are trained."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.numerics import compute_dtype


class Compander(NamedTuple):
    """The two positive numbers of one layer's weight compander, as logarithms to be learned.

    Attributes:
      log_a: log a, a float32 scalar.
      log_b: log b, a float32 scalar.
    """

    log_a: Array
    log_b: Array


def weight_compander(v: ArrayLike, a: ArrayLike, b: ArrayLike) -> Array:
    r"""Weight compander: weights that a saturating function makes of the parameters.

        w = Ψ(v) = a arctan(v / b),   |w| < a π/2,   dw/dv = a b / (b² + v²)

    Trained by v, no weight can exceed a π/2, and those near zero move the more: with a > b a step
    changes them (a / b)² times as much as without, until they are away from zero.

    Args:
      v: the parameters, floating point.
      a: a > 0, which bounds the weights; broadcastable to `v`, as a rule one number for a layer.
      b: b > 0, the size of v at which the function bends; the same.

    Returns:
      w of the shape and type of `v`, computed in at least float32.

    Raises:
      ValueError: `a` or `b` not positive, or of a shape that does not broadcast to that of `v`.
      TypeError: `v` is not floating point.

    Use it against overfitting, with or without weight decay, dropout and augmentation, through
    `weight_compander_init` and `compand_parameters`; `power_propagation` does the opposite at zero.

    Cost: an arctangent for each weight in every pass, and a copy of the weights.

    Example:
      >>> print(weight_compander(jnp.array([-1.0, 0.0, 1.0]), 4 / jnp.pi, 1.0))
      [-1.  0.  1.]

    Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for
    Regularization", 2023, arXiv:2306.16993.
    """
    v, wide = _check(a, b, v=v)
    return jnp.multiply(a, jnp.arctan(wide / b)).astype(v.dtype)


def weight_compander_inverse(w: ArrayLike, a: ArrayLike, b: ArrayLike) -> Array:
    r"""The parameters that `weight_compander` makes given weights of.

        v = b tan(w / a),   |w| < a π/2

    Args:
      w: the weights, floating point.
      a, b: as in `weight_compander`.

    Returns:
      v of the shape and type of `w`, computed in at least float32; under a transformation, where
      values are not known, NaN for a weight out of range.

    Raises:
      ValueError: a weight out of range, `a` or `b` not positive, or of a shape that does not
        broadcast.
      TypeError: `w` is not floating point.

    Use it to compand weights that are there already, such as those of an initializer.

    Cost: a tangent for each weight, once.

    Example:
      >>> print(weight_compander_inverse(jnp.array([0.199, 1.571]), 2.0, 1.0).round(2))
      [0.1 1. ]

    Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for
    Regularization", 2023, arXiv:2306.16993.
    """
    w, wide = _check(a, b, w=w)
    angle = wide / a
    inside = jnp.abs(angle) < math.pi / 2
    if not isinstance(inside, jax.core.Tracer) and not np.all(inside):
        bound = f"a π/2 = {np.asarray(a) * math.pi / 2}"
        raise ValueError(f"w must be below {bound} in size, got {np.max(np.abs(wide))}")
    return jnp.where(inside, b * jnp.tan(jnp.where(inside, angle, 0.0)), jnp.nan).astype(w.dtype)


def weight_compander_init(
    params: Any, mask: Any = None, a: float = 1.0, b: float = 1.0
) -> tuple[Any, dict[str, Compander]]:
    r"""Raw parameters and companders with which a network is at first what it was.

        v₀ = b tan(w₀ / a)      for every leaf of the mask

    Args:
      params: a tree of weights.
      mask: a tree of booleans of the same structure, True for the leaves to compand. Default: those
        of two or more dimensions, which leaves out biases and the parameters of norms.
      a: a > 0, for every leaf. Default 1: weights stay below π/2.
      b: b > 0, the same. Default 1: near zero the weights move as without.

    Returns:
      The tree of v, and the `Compander` of every companded leaf by its path, "mlp/up/kernel". To
      learn a and b, differentiate with respect to them as well, without weight decay.

    Raises:
      ValueError: a weight of a π/2 or more, `a` or `b` not positive, or a mask of another
        structure.
      TypeError: a leaf of the mask that is not a boolean.

    Use it before training: train the parameters v, with `compand_parameters` inside of the loss,
    and apply that once when training is over.

    Cost: a tangent for each weight of the mask, once; two numbers a leaf.

    Weight decay in the optimizer acts on v.

    Example:
      >>> weights = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
      >>> params, companders = weight_compander_init(weights)
      >>> print(params["kernel"].round(3), params["bias"], list(companders))
      [[1.557 1.557]] [1. 1.] ['kernel']

    Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for
    Regularization", 2023, arXiv:2306.16993.
    """
    check_interval(0, jnp.inf, closed="neither", a=a, b=b)
    if mask is None:
        mask = jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(mask) != structure:
        raise ValueError(
            f"mask must have the tree structure {structure}, got {jax.tree.structure(mask)}"
        )
    for chosen in jax.tree.leaves(mask):
        if not isinstance(chosen, (bool, np.bool_)):
            raise TypeError(f"mask must have booleans as leaves, got {chosen!r}")
    companders = {}

    def raw(path, leaf, chosen):
        if not chosen:
            return leaf
        name = _name(path)
        companders[name] = Compander(*(jnp.log(jnp.asarray(x, jnp.float32)) for x in (a, b)))
        try:
            return weight_compander_inverse(leaf, a, b)
        except ValueError as error:
            raise ValueError(f"params[{name!r}] cannot be companded: {error}") from error

    return jax.tree_util.tree_map_with_path(raw, params, mask), companders


def compand_parameters(params: Any, companders: Mapping[str, Compander]) -> Any:
    r"""The weights of a network of its raw parameters: `weight_compander` for each of its layers.

    Args:
      params: the tree of v, of `weight_compander_init`.
      companders: of the same.

    Returns:
      the tree of weights; leaves without compander are passed on.

    Raises:
      ValueError: a compander for a leaf that is not there.

    Use it inside of the loss, and once on the trained parameters, which then need no companders.

    Cost: an arctangent for each companded weight in every pass, and a copy of the weights.

    Example:
      >>> params, companders = weight_compander_init({"kernel": jnp.ones((1, 2))})
      >>> print(compand_parameters(params, companders)["kernel"])
      [[1. 1.]]

    Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for
    Regularization", 2023, arXiv:2306.16993.
    """
    names = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if unknown := set(companders) - names:
        raise ValueError(f"companders must be of leaves of params, got {sorted(unknown)}")

    def effective(path, leaf):
        compander = companders.get(_name(path))
        if compander is None:
            return leaf
        return weight_compander(leaf, jnp.exp(compander.log_a), jnp.exp(compander.log_b))

    return jax.tree_util.tree_map_with_path(effective, params)


def power_propagation(v: ArrayLike, alpha: ArrayLike = 2.0) -> Array:
    r"""Powerpropagation: weights as a power of the parameters, which keeps small ones small.

        w = v |v|^{α - 1},   dw/dv = α |v|^{α - 1}

    Args:
      v: the parameters, floating point.
      alpha: α at least 1, the identity. Default 2.

    Returns:
      w of the shape and type of `v`, computed in at least float32, with a finite gradient at 0.

    Raises:
      ValueError: `alpha` below 1.
      TypeError: `v` is not floating point.

    Use it for weights that are to be pruned, or to compare `weight_compander` with, which moves
    small weights away from zero.

    Cost: a power for each weight in every pass, and a copy of the weights.

    Example:
      >>> print(power_propagation(jnp.array([-0.1, 2.0])).round(3))
      [-0.01  4.  ]

    Reference: Schwarz, Jayakumar, Pascanu, Latham, Teh, "Powerpropagation: A sparsity inducing
    weight reparameterisation", 2021, arXiv:2110.00296, the baseline of Cakaj, Mehnert, Yang,
    "Weight Compander: A Simple Weight Reparameterization for Regularization", 2023,
    arXiv:2306.16993.
    """
    check_floating(v=v)
    check_interval(1, jnp.inf, alpha=alpha)
    v = jnp.asarray(v)
    wide = v.astype(compute_dtype(v))
    size = jnp.where(wide == 0, 1.0, jnp.abs(wide))
    at_zero = jnp.where(jnp.asarray(alpha) == 1, wide, 0.0)
    return jnp.where(wide == 0, at_zero, wide * size ** (alpha - 1)).astype(v.dtype)


def _check(a: ArrayLike, b: ArrayLike, **weights: ArrayLike) -> tuple[Array, Array]:
    """The weights as they are and in at least float32, once all arguments have been checked."""
    check_floating(**weights)
    check_interval(0, jnp.inf, closed="neither", a=a, b=b)
    (array,) = map(jnp.asarray, weights.values())
    check_broadcastable(array.shape, a=a, b=b)
    return array, array.astype(compute_dtype(array))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
