"""Spherical losses: those that see the outputs by their sum, their squares' sum and the target's.

With outputs o over D classes and the label c, a loss is spherical if it is a function of

    o_c,   s = Σ_k o_k,   q = Σ_k o_k²

alone. The squared error q - 2 o_c + 1 from the label's indicator is, and so are the losses below;
cross-entropy of the softmax is not, for it needs every exp(o_k). For a linear output o = W h both s
and q come from d numbers and d × d numbers that do not grow with D, which is what
`factored_output_loss` trains by. The losses here take all the outputs, as any other of the room.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval
from jaxref.core.labels import expected_over_labels, label_distribution
from jaxref.core.numerics import compute_dtype


def spherical_z_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    a: float = 1.0,
    b: float = 0.0,
    epsilon: float = 1e-12,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""How far the label's output stands out of all of them, by their standard deviation (Z-loss).

        L = log(1 + exp(a (b - z_c))) / a,   z_c = (o_c - μ) / (σ + ε)

    with μ and σ the mean and the standard deviation of the D outputs o and c the label. A shift or
    a positive scale of all outputs changes nothing (but by ε), and so the gradient has no component
    along them or along 1: outputs do not have to grow for the loss to fall. z_c is at most
    √(D - 1), which it reaches where all the other outputs are equal, so that L is never 0. Labels
    that are distributions give the expectation over the label.

    Args:
      logits: o `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      a: sharpness, above 0 and finite; for large a, L is max(0, b - z_c). Default 1, the authors'.
      b: by how many deviations the label should stand out. Default 0, the authors'.
      epsilon: ε at least 0. Default 1e-12, the authors'.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, D counts them. Default: all.

    Returns:
      `[...]` losses above 0, in the type of `logits`; 0 where no class is admitted. Where all
      outputs are equal, as those of one class are, z_c is 0 and there is no gradient.

    Raises:
      ValueError: a hyperparameter out of its range, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it where the rank of the label counts, as in the top-k error, and no probabilities are
    needed: for those take `softmax_cross_entropy` or `log_taylor_softmax_loss`. It is not
    `z_loss`, the penalty on the softmax's normaliser. Over very many classes
    `factored_output_loss` has it at a cost that does not depend on their number.

    Cost: two passes over the outputs, for mean and variance, and an exponential and a logarithm of
    each.

    Example:
      >>> logits = jnp.array([[3.0, 1.0, 2.0], [30.0, 10.0, 20.0]])
      >>> print(spherical_z_loss(logits, jnp.array([0, 0])).round(3))
      [0.258 0.258]

    Reference: de Brébisson, Vincent, "The Z-loss: a shift and scale invariant classification loss
    belonging to the Spherical Family", 2016, arXiv:1604.08859.
    """
    check_interval(0, jnp.inf, closed="right", a=a)
    check_interval(-jnp.inf, jnp.inf, b=b)
    check_interval(0, jnp.inf, epsilon=epsilon)
    q = label_distribution(labels, logits, axis=axis, where=where)
    o = jnp.asarray(logits).astype(q.dtype)
    admitted = jnp.ones(o.shape, bool) if where is None else jnp.broadcast_to(where, o.shape)
    o = jnp.where(admitted, o, 0.0)
    number = jnp.maximum(jnp.sum(admitted, axis=axis, keepdims=True), 1)
    mean = jnp.sum(o, axis=axis, keepdims=True) / number
    centred = jnp.where(admitted, o - mean, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=axis, keepdims=True) / number
    # equal outputs differ from their mean by its rounding, which is no deviation
    rounding = 4 * jnp.finfo(q.dtype).eps
    size = jnp.sum(jnp.square(o), axis=axis, keepdims=True) / number
    varies = variance > rounding**2 * size
    deviation = jnp.sqrt(jnp.where(varies, variance, 1.0))
    z = jnp.where(varies, centred / (deviation + epsilon), 0.0)
    losses = jnp.sum(q * jax.nn.softplus(a * (b - z)) / a, axis=axis)
    return losses.astype(jnp.result_type(logits))


def log_taylor_softmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of the Taylor softmax, whose exponentials are parabolas.

        L = -log p_c,   p_k = (1 + o_k + o_k² / 2) / (D + s + q / 2)

    with s and q the sums of the D outputs o and of their squares, and c the label: the softmax with
    exp to its second order. 1 + o + o²/2 is at least 1/2, at o = -1, and grows again below: an
    output that is far from 0 makes its class probable, whatever its sign. Labels that are
    distributions give the expectation over the label.

    Args:
      logits: o `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, D counts them. Default: all.

    Returns:
      `[...]` losses of at least 0, in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it for probabilities over a few classes, where it did better than the softmax in the
    authors' experiments, and not over thousands, where it did worse; a constant added to all
    outputs changes it. `log_spherical_softmax_loss` is unchanged by scales, and `spherical_z_loss`
    by both.

    Cost: that of a softmax over the classes and a logarithm each, as it is computed from
    logarithms.

    Example:
      >>> print(log_taylor_softmax_loss(jnp.array([[1.0, 0.0, -1.0]]), jnp.array([0])).round(3))
      [0.47]

    Reference: de Brébisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the
    Spherical Loss Family", 2015, arXiv:1511.05042, as in de Brébisson, Vincent, "The Z-loss: a
    shift and scale invariant classification loss belonging to the Spherical Family", 2016,
    arXiv:1604.08859.
    """
    terms = log_parabola(_outputs(logits, where))
    losses = expected_over_labels(jnp.negative, labels, terms, axis=axis, where=where)
    return losses.astype(jnp.result_type(logits))


def log_spherical_softmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: float = 1e-2,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy of the spherical softmax, whose exponentials are squares.

        L = -log p_c,   p_k = (o_k² + ε) / (q + D ε)

    with q the sum of the squares of the D outputs o, and c the label. Without ε it depends on the
    direction of o alone, up to the outputs' signs. Labels that are distributions give the
    expectation over the label.

    Args:
      logits: o `[..., classes]` floating point, the classes at `axis`.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class gives NaN for its example.
      epsilon: ε above 0 and finite, which bounds the loss where o_c is 0. Default 1e-2.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, D counts them. Default: all.

    Returns:
      `[...]` losses of at least 0, in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: an `epsilon` that is not above 0, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it to compare; `log_taylor_softmax_loss` has no such symmetry of signs around 0, and was
    better in the authors' experiments. A label whose output starts at 0 gets no gradient.

    Cost: that of a softmax over the classes and a logarithm each, as it is computed from
    logarithms.

    Example:
      >>> print(log_spherical_softmax_loss(jnp.array([[2.0, 1.0, -1.0]]), jnp.array([0])).round(3))
      [0.408]

    Reference: de Brébisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the
    Spherical Loss Family", 2015, arXiv:1511.05042, as in de Brébisson, Vincent, "The Z-loss: a
    shift and scale invariant classification loss belonging to the Spherical Family", 2016,
    arXiv:1604.08859.
    """
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)
    log_square = jnp.log(jnp.square(_outputs(logits, where)) + epsilon)
    losses = expected_over_labels(jnp.negative, labels, log_square, axis=axis, where=where)
    return losses.astype(jnp.result_type(logits))


def log_parabola(o: Array) -> Array:
    """log(1 + o + o² / 2)."""
    return jnp.log1p(o * (1 + o / 2))


def z_of_statistics(
    target: Array,
    total: Array,
    squares: Array,
    number: int,
    *,
    a: float = 1.0,
    b: float = 0.0,
    epsilon: float = 1e-12,
) -> Array:
    """`spherical_z_loss` from o_c, s, q and D; a variance that is rounding alone counts as none."""
    check_interval(0, jnp.inf, closed="right", a=a)
    check_interval(-jnp.inf, jnp.inf, b=b)
    check_interval(0, jnp.inf, epsilon=epsilon)
    mean, mean_square = total / number, squares / number
    variance = mean_square - jnp.square(mean)
    varies = variance > 4 * jnp.finfo(variance.dtype).eps * mean_square
    deviation = jnp.sqrt(jnp.where(varies, variance, 1.0))
    z = jnp.where(varies, (target - mean) / (deviation + epsilon), 0.0)
    return jax.nn.softplus(a * (b - z)) / a


def taylor_of_statistics(target: Array, total: Array, squares: Array, number: int) -> Array:
    """`log_taylor_softmax_loss` from o_c, s, q and D."""
    # the sum of parabolas is at least D / 2, below which only rounding takes it
    normaliser = jnp.maximum(number + total + squares / 2, number / 2)
    return jnp.log(normaliser) - log_parabola(target)


def spherical_of_statistics(
    target: Array, total: Array, squares: Array, number: int, *, epsilon: float = 1e-2
) -> Array:
    """`log_spherical_softmax_loss` from o_c, q and D."""
    del total
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)
    normaliser = jnp.maximum(squares, 0.0) + number * epsilon
    return jnp.log(normaliser) - jnp.log(jnp.square(target) + epsilon)


def squared_of_statistics(target: Array, total: Array, squares: Array, number: int) -> Array:
    """The squared error from the label's indicator, Σ_k (o_k - 1[k = c])², from o_c and q."""
    del total, number
    return squares - 2 * target + 1


def _outputs(logits: ArrayLike, where: ArrayLike | None) -> Array:
    """The outputs in at least float32, 0 where they are no class."""
    check_floating(logits=logits)
    check_broadcastable(jnp.shape(logits), where=where)
    o = jnp.asarray(logits).astype(compute_dtype(logits))
    return o if where is None else jnp.where(where, o, 0.0)
