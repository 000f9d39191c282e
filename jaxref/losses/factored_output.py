"""A linear output over very many classes, trained exactly at a cost that does not depend on them.

The matrix W of the outputs o = W h has D rows, one a class. Backpropagation of a spherical loss
changes every row: what a step of gradient descent subtracts from W is a multiple of W itself, a
constant row, and something in the rows of the labels. Written as

    W = V U + 1 wᵀ

with V like W, and U of d × d, the first of these changes U alone, the second w, and the third a row
of V for each example. Together with Q = Wᵀ W and m = Wᵀ 1, which give the loss, everything else is
of d × d numbers: W is never read, nor are the outputs formed.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.losses.spherical import (
    log_parabola,
    spherical_of_statistics,
    squared_of_statistics,
    taylor_of_statistics,
    z_of_statistics,
)

Statistics = tuple[Array, Array, Array]
LossOfStatistics = Callable[..., Array]

LOSSES: dict[str, Callable[..., Array]] = {
    "z": z_of_statistics,
    "taylor": taylor_of_statistics,
    "spherical": spherical_of_statistics,
    "squared": squared_of_statistics,
}
"""Losses by the names that `factored_output_loss` knows them by."""

DIRECTIONS = 8
"""How many directions of V are corrected in one pass over it."""

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""Errors of these products stay in the state and add up: accelerators are not to round them."""


class FactoredOutputState(NamedTuple):
    """An output matrix W = V U + 1 wᵀ `[classes, d]`, and what its sums are.

    Attributes:
      factors: V `[classes, d]`.
      mixing: U `[d, d]`.
      mixing_inverse: U⁻¹ `[d, d]`.
      shift: w `[d]`.
      gram: Q = Wᵀ W `[d, d]`.
      total: m = Wᵀ 1 `[d]`.
      step: int32, updates that were asked for, those refused included.
      refused: int32, updates that were refused.

    Reference: Vincent, de Brébisson, Bouthillier, "Efficient Exact Gradient Update for training
    Deep Networks with Very Large Sparse Targets", 2014, arXiv:1412.7091, as in de Brébisson,
    Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
    Family", 2016, arXiv:1604.08859.
    """

    factors: Array
    mixing: Array
    mixing_inverse: Array
    shift: Array
    gram: Array
    total: Array
    step: Array
    refused: Array


def factored_output_init(
    weights: ArrayLike | None = None,
    *,
    num_classes: int | None = None,
    features: int | None = None,
    key: Array | None = None,
    stddev: float | None = None,
) -> FactoredOutputState:
    r"""The state of a factored output layer, from weights or at random.

        V = W,   U = I,   w = 0,   Q = Wᵀ W,   m = Wᵀ 1

    Args:
      weights: W `[classes, d]` floating point, one row a class.
      num_classes, features, key: in place of `weights`: the sizes and a random key, for normal
        weights.
      stddev: their standard deviation, above 0. Default 1 / √d.

    Returns:
      A `FactoredOutputState` in the type of `weights`, at least float32.

    Raises:
      ValueError: neither `weights` nor sizes and key, or both; weights that are not a matrix; an
        argument out of its range.
      TypeError: weights that are not floating point.

    Use it before training. From the weights of a state,
    `factored_output_init(factored_output_weights(state))` takes out all rounding that it collected.
    W = 0 has no gradient under the Z-loss.

    Cost: O(D d²) time for Q, and memory for W and three d × d matrices; one more copy of W where
    `weights` are given.

    Example:
      >>> state = factored_output_init(jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]))
      >>> print(state.gram, state.total)
      [[2. 2.]
       [2. 5.]] [2. 3.]

    Reference: Vincent, de Brébisson, Bouthillier, "Efficient Exact Gradient Update for training
    Deep Networks with Very Large Sparse Targets", 2014, arXiv:1412.7091, as in de Brébisson,
    Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
    Family", 2016, arXiv:1604.08859.
    """
    if weights is None:
        if num_classes is None or features is None or key is None:
            raise ValueError(
                "weights, or num_classes, features and key must be given, got "
                f"num_classes={num_classes}, features={features} and key={key}"
            )
        check_interval(1, jnp.inf, num_classes=num_classes, features=features)
        if stddev is None:
            stddev = features**-0.5
        check_interval(0, jnp.inf, closed="right", stddev=stddev)
        v = stddev * jax.random.normal(key, (num_classes, features))
    else:
        if any(x is not None for x in (num_classes, features, key, stddev)):
            raise ValueError("weights have sizes and values: give no num_classes, features, key")
        check_floating(weights=weights)
        v = jnp.array(weights, compute_dtype(weights))  # a copy, so that the state can be donated
        if v.ndim != 2 or 0 in v.shape:
            raise ValueError(f"weights must have shape [classes, d], got {v.shape}")
    identity = jnp.eye(v.shape[1], dtype=v.dtype)
    return FactoredOutputState(
        factors=v,
        mixing=identity,
        mixing_inverse=jnp.copy(identity),
        shift=jnp.zeros(v.shape[1], v.dtype),
        gram=matmul(v.T, v),
        total=jnp.sum(v, axis=0),
        step=jnp.zeros((), jnp.int32),
        refused=jnp.zeros((), jnp.int32),
    )


def factored_output_weights(state: FactoredOutputState) -> Array:
    r"""The output matrix W of a factored output layer.

        W = V U + 1 wᵀ

    Args:
      state: from `factored_output_init` or an update.

    Returns:
      `[classes, d]` in the type of the state; the outputs of h are `W @ h`.

    Use it to write the weights out; `factored_output_log_probabilities` evaluates without them.

    Cost: O(D d²) time, and memory for W.

    Example:
      >>> weights = jnp.array([[1.0, 2.0], [0.0, 1.0]])
      >>> bool((factored_output_weights(factored_output_init(weights)) == weights).all())
      True

    Reference: Vincent, de Brébisson, Bouthillier, "Efficient Exact Gradient Update for training
    Deep Networks with Very Large Sparse Targets", 2014, arXiv:1412.7091, as in de Brébisson,
    Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
    Family", 2016, arXiv:1604.08859.
    """
    return matmul(state.factors, state.mixing) + state.shift


def spherical_statistics(
    hidden: ArrayLike, labels: ArrayLike, state: FactoredOutputState
) -> Statistics:
    r"""What a spherical loss needs of the outputs o = W h, without forming them.

        o_c = (V U)_c h + w · h,   s = Σ_k o_k = m · h,   q = Σ_k o_k² = hᵀ Q h

    Args:
      hidden: h `[..., d]` floating point.
      labels: integer ids `[...]`.
      state: from `factored_output_init` or an update.

    Returns:
      `(target_output, sum_outputs, sum_squared_outputs)`, `[...]` each, in the type of the state
      or a wider one of `hidden`. The target's output is NaN for an id that is no class.

    Raises:
      ValueError: shapes that do not match.
      TypeError: `hidden` not floating point, or `labels` not integer.

    Use it with `factored_output_update` for a loss, or a scale of it, of one's own;
    `factored_output_loss` joins them.

    Cost: O(d²) for each example, whatever the number of classes.

    Example:
      >>> state = factored_output_init(jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]))
      >>> for statistic in spherical_statistics(jnp.array([[1.0, -1.0]]), jnp.array([2]), state):
      ...     print(statistic)
      [1.]
      [-1.]
      [3.]

    Reference: Vincent, de Brébisson, Bouthillier, "Efficient Exact Gradient Update for training
    Deep Networks with Very Large Sparse Targets", 2014, arXiv:1412.7091, as in de Brébisson,
    Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
    Family", 2016, arXiv:1604.08859.
    """
    h, places, known = _examples(hidden, labels, state)
    target, total, squares = _statistics(h, _target_rows(state, places), state)
    shape = jnp.shape(labels)
    target = jnp.where(known, target, jnp.nan)
    return target.reshape(shape), total.reshape(shape), squares.reshape(shape)


def factored_output_update(
    state: FactoredOutputState,
    hidden: ArrayLike,
    labels: ArrayLike,
    grads: Statistics,
    learning_rate: ArrayLike,
    *,
    stabilize_every: int = 100,
) -> FactoredOutputState:
    r"""The exact step of gradient descent on an output matrix, however many rows it has.

        W ← W - η Σ_i ∂L/∂o_i h_iᵀ,   ∂L/∂o_i = g_s 1 + 2 g_q o_i + g_c onehot(c_i)

    with the gradients g of each example's statistics. For rows h_i of H, k = 2 η g_q,
    M = I - Hᵀ diag(k) H and Y the matrix with Σ η g_c h of the examples of a class in its row,

        U ← U M,   U⁻¹ ← M⁻¹ U⁻¹,   w ← M w - η Hᵀ g_s,   V ← V - Y U⁻¹

    and Q and m follow in the same way. M⁻¹ is the inverse of an n × n system by Woodbury's identity
    for n < d examples. Of V the labels' rows alone change, examples of one class adding up.

    Every `stabilize_every` updates, and as soon as the norm of U or of U⁻¹ says that there are any,
    the singular values of U that have left [1/2, 2] are set to 1, and V is corrected so that V U
    stays as it is; U⁻¹ is then computed anew. The authors' code looks at fixed times alone, too
    late for a large learning rate.

    A step of which M is nearly singular, for one example 2 η g_q |h|² = 1, would lose a direction
    of V U for good. It is refused, as is one that is not finite: the state stays as it is but for
    its counts. It takes a learning rate so large that the outputs along a direction change sign.

    Args:
      state: from `factored_output_init` or the update before.
      hidden: h `[..., d]` floating point, all of it one batch.
      labels: integer ids `[...]`. An example whose id is no class takes no part.
      grads: `(g_c, g_s, g_q)` `[...]` each: of the batch's loss with respect to what
        `spherical_statistics` returns, in its order.
      learning_rate: η at least 0; may be traced.
      stabilize_every: at least 1. Default 100, the authors'.

    Returns:
      The state after the step, which has no gradient.

    Raises:
      ValueError: shapes that do not match, or an argument out of its range.
      TypeError: `hidden` not floating point, or `labels` not integer.

    Use it for a loss of one's own, where `factored_output_loss` takes the step itself; under jit
    with the state donated, or every step copies V. Rounding adds up in the state: relative 1e-5 or
    so over a thousand steps in float32 (see `factored_output_init`).

    Cost: O(n d² + n² d + n³) for n < d examples, O(n d² + d³) for more, and nothing with D; with a
    correction O(d³), and a pass over V for every 8 singular values.

    Example:
      >>> weights = jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]])
      >>> hidden, label = jnp.array([[1.0, -1.0]]), jnp.array([2])
      >>> squared_error = jnp.array([-2.0]), jnp.array([0.0]), jnp.array([1.0])  # q - 2 o_c
      >>> state = factored_output_init(weights)
      >>> state = factored_output_update(state, hidden, label, squared_error, 0.1)
      >>> weights = factored_output_weights(state)  # o was [-1, -1, 1], the last of them right
      >>> bool(jnp.allclose(weights, jnp.array([[1.2, 1.8], [0.2, 0.8], [1.0, 0.0]])))
      True

    Reference: Vincent, de Brébisson, Bouthillier, "Efficient Exact Gradient Update for training
    Deep Networks with Very Large Sparse Targets", 2014, arXiv:1412.7091, as in de Brébisson,
    Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
    Family", 2016, arXiv:1604.08859.
    """
    check_interval(0, jnp.inf, learning_rate=learning_rate)
    check_interval(1, jnp.inf, stabilize_every=stabilize_every)
    check_shape(jnp.shape(labels), **dict(zip(("g_c", "g_s", "g_q"), grads, strict=True)))
    state, hidden, grads = jax.lax.stop_gradient((state, hidden, grads))
    h, places, known = _examples(hidden, labels, state)
    rate = jnp.asarray(learning_rate, h.dtype)
    y, s, q = (jnp.where(known, rate * jnp.ravel(g).astype(h.dtype), 0.0) for g in grads)
    stepped = _step(state, h, places, _target_rows(state, places), y, s, q)
    return _stabilized(stepped, stabilize_every)


def factored_output_loss(
    hidden: ArrayLike,
    labels: ArrayLike,
    state: FactoredOutputState,
    *,
    learning_rate: float | Array | optax.Schedule,
    loss: str | LossOfStatistics = "z",
    stabilize_every: int = 100,
    **hyperparameters: float,
) -> tuple[Array, FactoredOutputState]:
    r"""A spherical loss of a linear output layer over very many classes, which trains the layer.

        L_i = f(o_c, s, q),   o = W h_i;   W ← W - η ∂(mean_i L_i)/∂W

    with the layer's W in the state. Loss, gradient with respect to `hidden` and the exact step of
    gradient descent on W come from `spherical_statistics` and `factored_output_update`: no array of
    the outputs' size is made, and the cost does not depend on the number of classes. The layers
    below train by the gradient, with whatever optimizer.

    Args:
      hidden: h `[..., d]` floating point, all of it one batch.
      labels: integer ids `[...]`. An id that is no class gives NaN for its example, which has no
        gradient and counts in the step as an example without.
      state: from `factored_output_init` or the step before.
      learning_rate: η at least 0 of the mean loss of the batch: a number, or an optax schedule of
        `state.step`.
      loss: "z" for `spherical_z_loss`, "taylor" for `log_taylor_softmax_loss`, "spherical" for
        `log_spherical_softmax_loss`, "squared" for q - 2 o_c + 1, or an elementwise function of
        (o_c, s, q, D). Default "z".
      stabilize_every: as in `factored_output_update`.
      **hyperparameters: of the loss: a, b and epsilon of "z", epsilon of "spherical".

    Returns:
      `[...]` losses in the type of `hidden`, at the state that was given, and the state after the
      step, which has no gradient.

    Raises:
      ValueError: an unknown `loss`, shapes that do not match, or an argument out of its range.
      TypeError: `hidden` not floating point, `labels` not integer, or a hyperparameter that the
        loss does not have.

    Use it from tens of thousands of classes on, under jit with the state donated: of 793,471
    classes, 512 features and 128 examples a step takes 1/140 of that with log-softmax on a CPU, and
    from 10^4 to 10^6 classes the same time (`python -m jaxref.bench large_output`). Plain gradient
    descent wants its own learning rate, for the Z-loss one that grows with D. Over fewer classes
    train W by any optimizer, with `spherical_z_loss` or cross-entropy.

    Cost: that of `factored_output_update`, O(n d² + n² d + n³) a step for n < d examples; memory
    for W, and none for its gradient or the outputs.

    Example:
      >>> state = factored_output_init(num_classes=50000, features=4, key=jax.random.key(0))
      >>> step = jax.jit(partial(factored_output_loss, learning_rate=100.0))
      >>> hidden, labels = jnp.eye(4), jnp.array([7, 30000, 7, 9])
      >>> before, state = step(hidden, labels, state)
      >>> after, state = step(hidden, labels, state)
      >>> bool((after < before).all())
      True

    Reference: Vincent, de Brébisson, Bouthillier, "Efficient Exact Gradient Update for training
    Deep Networks with Very Large Sparse Targets", 2014, arXiv:1412.7091, and de Brébisson, Vincent,
    "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    2016, arXiv:1604.08859.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
        loss = LOSSES[loss]
    state = jax.lax.stop_gradient(state)
    h, places, known = _examples(hidden, labels, state)
    rows = _target_rows(state, places)

    def losses_of(*statistics: Array) -> Array:
        return loss(*statistics, state.factors.shape[0], **hyperparameters)

    statistics = _statistics(h, rows, state)
    losses, vjp = jax.vjp(losses_of, *jax.lax.stop_gradient(statistics))
    check_shape(places.shape, **{"the value of loss": losses})
    share = jnp.where(known, 1.0 / max(places.size, 1), 0.0).astype(losses.dtype)
    shape = jnp.shape(labels)
    state = factored_output_update(
        state,
        hidden,
        labels,
        tuple(g.reshape(shape) for g in vjp(share)),  # type: ignore[arg-type]
        learning_rate(state.step) if callable(learning_rate) else learning_rate,
        stabilize_every=stabilize_every,
    )
    losses = jnp.where(known, losses_of(*statistics), jnp.nan)
    return losses.reshape(shape).astype(jnp.result_type(hidden)), state


def factored_output_log_probabilities(
    hidden: ArrayLike,
    state: FactoredOutputState,
    *,
    loss: str | LossOfStatistics = "z",
    epsilon: float = 1e-2,
) -> Array:
    r"""Log-probabilities of all the classes that a factored output layer gives.

        log p_k = log g(o_k) - log Σ_j g(o_j),   o = W h

    with g(o) = 1 + o + o² / 2 for "taylor", o² + ε for "spherical" and exp o for any other loss:
    the Z-loss and the squared error order the classes, and have no probabilities of their own.

    Args:
      hidden: h `[..., d]` floating point.
      state: from `factored_output_init` or an update.
      loss: what the layer was trained by. Default "z".
      epsilon: ε above 0, of "spherical". Default 1e-2.

    Returns:
      `[..., classes]` in the type of the state or a wider one of `hidden`.

    Raises:
      ValueError: shapes that do not match, or an `epsilon` that is not above 0.
      TypeError: `hidden` not floating point.

    Use it to evaluate and to sample; `factored_output_loss` trains without forming the outputs.

    Cost: O(D d) time and D outputs for each example, as of any output layer.

    Example:
      >>> state = factored_output_init(jnp.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]))
      >>> log_p = factored_output_log_probabilities(jnp.array([1.0, -1.0]), state, loss="taylor")
      >>> print(jnp.exp(log_p).round(3))
      [0.143 0.143 0.714]

    Reference: de Brébisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the
    Spherical Loss Family", 2015, arXiv:1511.05042, as in de Brébisson, Vincent, "The Z-loss: a
    shift and scale invariant classification loss belonging to the Spherical Family", 2016,
    arXiv:1604.08859.
    """
    check_floating(hidden=hidden)
    check_interval(0, jnp.inf, closed="right", epsilon=epsilon)
    h = jnp.asarray(hidden)
    check_shape((*h.shape[:-1], state.shift.size), hidden=h)
    h = h.astype(compute_dtype(h, state.factors))
    o = matmul(matmul(h, state.mixing.T), state.factors.T) + matmul(h, state.shift)[..., None]
    if loss == "taylor":
        o = log_parabola(o)
    elif loss == "spherical":
        o = jnp.log(jnp.square(o) + epsilon)
    return jax.nn.log_softmax(o, axis=-1)


def _examples(
    hidden: ArrayLike, labels: ArrayLike, state: FactoredOutputState
) -> tuple[Array, Array, Array]:
    """The batch as rows h `[n, d]`, ids that are classes `[n]`, and whether they were."""
    check_floating(hidden=hidden)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {labels.dtype.name}")
    number, features = state.factors.shape
    check_shape((*labels.shape, features), hidden=hidden)
    h = jnp.asarray(hidden).reshape(-1, features)
    ids = labels.ravel().astype(jnp.promote_types(labels.dtype, jnp.int32))
    known = (ids >= 0) & (ids < number)
    return h.astype(compute_dtype(h, state.factors)), jnp.where(known, ids, 0), known


def _target_rows(state: FactoredOutputState, places: Array) -> Array:
    """The rows of W at `places`."""
    return matmul(state.factors[places], state.mixing) + state.shift


def _statistics(h: Array, rows: Array, state: FactoredOutputState) -> Statistics:
    return (
        jnp.sum(rows * h, axis=-1),
        matmul(h, state.total.astype(h.dtype)),
        jnp.sum(matmul(h, state.gram.astype(h.dtype)) * h, axis=-1),
    )


def _step(
    state: FactoredOutputState,
    h: Array,
    places: Array,
    rows: Array,
    y: Array,
    s: Array,
    q: Array,
) -> FactoredOutputState:
    """The step for gradients y, s, q of the statistics times the rate, if it can be taken."""
    (number, d), n = state.factors.shape, h.shape[0]
    v, u, inverse, shift, gram, total = state[:6]
    kh = 2 * q[:, None] * h

    # M = I - Hᵀ K H, applied or inverted by whichever of n and d is smaller
    if n < d:

        def m_times(x: Array) -> Array:
            return x - matmul(h.T, matmul(kh, x))

        system = jnp.eye(n, dtype=h.dtype) - matmul(kh, h.T)
        inverse_after = inverse + matmul(h.T, jnp.linalg.solve(system, matmul(kh, inverse)))
    else:
        m = jnp.eye(d, dtype=h.dtype) - matmul(h.T, kh)
        m_times = partial(matmul, m)
        inverse_after = jnp.linalg.solve(m, inverse)

    yh, along_y, along_s = y[:, None] * h, matmul(y, h), matmul(s, h)
    cross = matmul((s[:, None] * total + y[:, None] * rows).T, h)  # Wᵀ A, where W ← W M - A
    sums = _class_sums(yh, places)
    square = (  # Aᵀ A
        number * jnp.outer(along_s, along_s)
        + jnp.outer(along_s, along_y)
        + jnp.outer(along_y, along_s)
        + matmul(sums.T, sums)
    )
    half = m_times(m_times(gram).T / 2 - cross)  # (M Q M) / 2 - M Wᵀ A: Q stays symmetric
    changed = {
        "mixing": m_times(u.T).T,
        "mixing_inverse": inverse_after,
        "shift": m_times(shift[:, None])[:, 0] - along_s,
        "gram": half + half.T + square,
        "total": m_times(total[:, None])[:, 0] - number * along_s - along_y,
    }
    limit = jnp.finfo(h.dtype).eps ** -0.5
    taken = jnp.linalg.norm(inverse_after) <= limit * jnp.linalg.norm(inverse)
    for x in changed.values():
        taken &= jnp.isfinite(x).all()
    change = jnp.where(taken, matmul(yh, inverse_after), 0.0)
    for name, x in changed.items():
        old = getattr(state, name)
        changed[name] = jnp.where(taken, x, old).astype(old.dtype)
    return state._replace(
        factors=v.at[places].add(-change.astype(v.dtype)),
        step=state.step + 1,
        refused=state.refused + ~taken,
        **changed,
    )


def _class_sums(x: Array, places: Array) -> Array:
    """The sum of the rows of `x` for each class among `places`, in as many rows, some of them 0."""
    order = jnp.argsort(places)
    ordered = places[order]
    new = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])[: places.size]
    return jax.ops.segment_sum(
        x[order], jnp.cumsum(new), num_segments=places.size, indices_are_sorted=True
    )


def _stabilized(state: FactoredOutputState, every: int) -> FactoredOutputState:
    """The same W with the singular values of U in [1/2, 2], if it is time to see to that."""
    d = state.mixing.shape[0]

    def corrected(u: Array, inverse: Array) -> tuple[Array, ...]:
        del inverse
        left, values, right = jnp.linalg.svd(u)
        out = (values < 0.5) | (values > 2)
        after = jnp.where(out, 1.0, values)
        u = u + matmul(left * (after / values - 1), matmul(left.T, u))
        order = jnp.argsort(~out)
        shares = (values / after - 1)[order]  # 0 for the values that stay
        inverse = matmul(right.T / after, left.T)
        return u, inverse, left[:, order], shares, jnp.count_nonzero(out).astype(jnp.int32)

    def unchanged(u: Array, inverse: Array) -> tuple[Array, ...]:
        return u, inverse, jnp.zeros_like(u), jnp.zeros(d, u.dtype), jnp.int32(0)

    # norms that [1/2, 2] does not allow
    far = jnp.maximum(jnp.linalg.norm(state.mixing), jnp.linalg.norm(state.mixing_inverse)) > (
        2 * d**0.5
    )
    u, inverse, directions, shares, number = jax.lax.cond(
        far | (state.step % every == 0), corrected, unchanged, state.mixing, state.mixing_inverse
    )
    directions = jnp.pad(directions, ((0, 0), (0, -d % DIRECTIONS)))
    shares = jnp.pad(shares, (0, -d % DIRECTIONS))

    def correct(i: Array, v: Array) -> Array:
        p = jax.lax.dynamic_slice_in_dim(directions, i * DIRECTIONS, DIRECTIONS, axis=1)
        share = jax.lax.dynamic_slice_in_dim(shares, i * DIRECTIONS, DIRECTIONS)
        along = matmul(v, p) * share
        for j in range(DIRECTIONS):  # not a product of matrices, which would need a second V
            v = v + along[:, j, None] * p[:, j]
        return v

    # a loop of no passes, mostly: V is changed in place, which the branches of a cond would not
    v = jax.lax.fori_loop(0, -(-number // DIRECTIONS), correct, state.factors)
    return state._replace(factors=v, mixing=u, mixing_inverse=inverse)
