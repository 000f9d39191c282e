"""Values learned as classes: scalar targets as distributions over bins, and cross-entropy on them.

The bins are the last axis. `where` (boolean, broadcastable to the values) says which values exist;
the others have loss 0 and gradient 0 and may hold anything, NaN included. Targets have no gradient.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


@dataclass(frozen=True)
class HLGauss:
    r"""Numbers as histograms of a Gaussian around them, and back (HL-Gauss).

        p_i = [Φ((b_i - y) / σ) - Φ((b_{i-1} - y) / σ)] / [Φ((b_m - y) / σ) - Φ((b_0 - y) / σ)]

    for m bins of one width between the edges b_0 = min_value ... b_m = max_value, with Φ the
    normal distribution and σ = smoothing_ratio times the width. Back: Σ_i p_i c_i, c_i the middle
    of bin i, which is y but for rounding where y is 5 σ from both ends and σ 3/4 of the width.

    Args:
      min_value, max_value: the ends of the range, finite and in this order.
      bins: m at least 2. Default 51, the paper's for Atari, with -10 and 10.
      smoothing_ratio: at least 0. Default 0.75, the paper's; 0.5 to 2 is of use. 0 gives the bin
        that y is in.

    Raises:
      ValueError: `min_value` not below `max_value`, `bins` not an integer of at least 2, or a
        negative `smoothing_ratio`.

    Use it for targets and values of a critic that `hl_gauss_loss` trains. `two_hot_encode` is exact
    everywhere, and blind to how near other bins are.

    Cost: m + 1 error functions a value to encode, m multiplications to decode.

    Example:
      >>> support = HLGauss(-1.0, 1.0, bins=4)
      >>> probabilities = support.encode(jnp.array(0.2))
      >>> print(probabilities.round(1), support.decode(probabilities).round(1))
      [0.  0.3 0.5 0.2] 0.2

    Reference: Farebrother et al., "Stop Regressing: Training Value Functions via Classification for
    Scalable Deep RL", 2024, arXiv:2403.03950, after Imani, White, "Improving Regression Performance
    with Distributional Losses", 2018, arXiv:1806.04613.
    """

    min_value: float
    max_value: float
    bins: int = 51
    smoothing_ratio: float = 0.75

    def __post_init__(self):
        _check_support(self.min_value, self.max_value, self.bins, "bins")
        check_interval(0, jnp.inf, smoothing_ratio=self.smoothing_ratio)

    @property
    def edges(self) -> Array:
        """b `[bins + 1]`."""
        return jnp.linspace(self.min_value, self.max_value, self.bins + 1)

    @property
    def centers(self) -> Array:
        """c `[bins]`."""
        edges = self.edges
        return (edges[1:] + edges[:-1]) / 2

    def encode(self, values: ArrayLike) -> Array:
        """Probabilities `[..., bins]` of values `[...]`, clipped to the range; NaN of NaN.

        In the type of floating values, computed in at least float32.
        """
        y = jnp.asarray(values)
        wide = jnp.clip(y.astype(compute_dtype(y)), self.min_value, self.max_value)
        # in units of bins, from the first edge on
        place = (wide - self.min_value) / (self.max_value - self.min_value) * self.bins
        edges = jnp.arange(self.bins + 1, dtype=place.dtype)
        if not isinstance(self.smoothing_ratio, jax.core.Tracer) and self.smoothing_ratio == 0:
            bin_of = jnp.clip(jnp.floor(place), 0, self.bins - 1)[..., None]
            p = jnp.where(jnp.isnan(bin_of), bin_of, (edges[:-1] == bin_of).astype(place.dtype))
        else:
            z = (edges - place[..., None]) / (self.smoothing_ratio * math.sqrt(2))
            below = jax.lax.erf(z)
            p = jnp.diff(below, axis=-1) / (below[..., -1:] - below[..., :1])
        return p.astype(y.dtype) if jnp.issubdtype(y.dtype, jnp.floating) else p

    def decode(self, probabilities: ArrayLike) -> Array:
        """Σ_i p_i c_i `[...]` of probabilities `[..., bins]`: the softmax of logits, say."""
        return _expectation(probabilities, self.centers)


def hl_gauss_loss(
    logits: ArrayLike,
    values: ArrayLike,
    *,
    min_value: float,
    max_value: float,
    smoothing_ratio: float = 0.75,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy with the histogram of a Gaussian around a number, in place of regression.

        L = -Σ_i p_i log softmax(f)_i,   p = HLGauss(min_value, max_value, bins).encode(value)

    The gradient softmax(f) - p has a length of at most √2, whatever the scale of the values, and
    neighbouring bins share mass, so that how far off a prediction is still counts.

    Args:
      logits: f `[..., bins]` floating point, for at least 2 bins.
      values: `[...]` real numbers, clipped to the range: r + γ (1 - done) times the decoded value
        of the target network for temporal differences, or returns, or any other target.
      min_value, max_value: the ends of the range, finite and in this order: -10 and 10 for Atari
        with clipped rewards; else bounds on the return.
      smoothing_ratio: σ over the width of a bin, at least 0. Default 0.75, the paper's.
      where: boolean, broadcastable to `values`: the values that exist. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats: the entropy of p at least.

    Raises:
      ValueError: shapes that do not match, fewer than 2 bins, `min_value` not below `max_value`, or
        a negative `smoothing_ratio`.
      TypeError: logits that are not floating point.

    Use it where `squared_error` or `huber_loss` on values trains unsteadily, under noise and
    targets that move; `two_hot_loss` is its form without smoothing, and
    `categorical_distributional_loss` learns the distribution of the return.

    Cost: that of a softmax over the bins, and an error function each; a head of `bins` outputs in
    place of one.

    Example:
      >>> logits, values = jnp.array([[0.0, 0.0, 3.0, 0.0]]), jnp.array([0.2])
      >>> print(hl_gauss_loss(logits, values, min_value=-1.0, max_value=1.0).round(2))
      [1.64]

    Reference: Farebrother et al., "Stop Regressing: Training Value Functions via Classification for
    Scalable Deep RL", 2024, arXiv:2403.03950.
    """
    logits_, y = _checked(logits, values, where)
    support = HLGauss(min_value, max_value, logits_.shape[-1], smoothing_ratio)
    return _cross_entropy(logits_, support.encode(y), where).astype(jnp.result_type(logits))


def two_hot_encode(values: ArrayLike, atoms: ArrayLike) -> Array:
    r"""Numbers as distributions over the two nearest of a set of numbers, with the right mean.

        p_i = (z_{i+1} - y) / (z_{i+1} - z_i),   p_{i+1} = 1 - p_i   for z_i ≤ y < z_{i+1}

    Args:
      values: y `[...]` real numbers; those outside of the atoms are clipped to the first or the
        last one, which then has all mass.
      atoms: z `[m]` in ascending order without repetition, m at least 2, at any distances.

    Returns:
      p `[..., m]` in the type of floating values, computed in at least float32; NaN of NaN.

    Raises:
      ValueError: `atoms` of another shape, or not ascending (where they are concrete).

    Use it where a value has to come back exactly, by `two_hot_decode`; `HLGauss` spreads mass over
    about six bins instead.

    Cost: a binary search and m numbers for each value.

    Example:
      >>> print(two_hot_encode(jnp.array([0.5, 7.0]), jnp.array([0.0, 2.0, 3.0])))
      [[0.75 0.25 0.  ]
       [0.   0.   1.  ]]

    Reference: a baseline of Farebrother et al., "Stop Regressing: Training Value Functions via
    Classification for Scalable Deep RL", 2024, arXiv:2403.03950.
    """
    y = jnp.asarray(values)
    z = _checked_atoms(atoms).astype(compute_dtype(y, atoms))
    wide = jnp.clip(y.astype(z.dtype), z[0], z[-1])
    left = jnp.clip(jnp.searchsorted(z, wide, side="right") - 1, 0, z.size - 2)
    right_mass = (wide - z[left]) / (z[left + 1] - z[left])
    ids, left, right_mass = jnp.arange(z.size), left[..., None], right_mass[..., None]
    p = jnp.where(ids == left + 1, right_mass, jnp.where(ids == left, 1 - right_mass, 0.0))
    p = jnp.where(jnp.isnan(right_mass), right_mass, p)
    return p.astype(y.dtype) if jnp.issubdtype(y.dtype, jnp.floating) else p


def two_hot_decode(probabilities: ArrayLike, atoms: ArrayLike) -> Array:
    r"""The mean of a distribution over a set of numbers.

        Σ_i p_i z_i

    Args:
      probabilities: p `[..., m]` floating point: the softmax of logits, say.
      atoms: z `[m]` in ascending order without repetition, m at least 2.

    Returns:
      `[...]` means in the type of `probabilities`, computed in at least float32.

    Raises:
      ValueError: shapes that do not match, or `atoms` not ascending (where they are concrete).
      TypeError: probabilities that are not floating point.

    Use it to read a value off the softmax of logits that `two_hot_loss` or
    `categorical_distributional_loss` trains; `HLGauss.decode` does for `hl_gauss_loss`.

    Cost: m multiplications a value.

    Example:
      >>> print(two_hot_decode(jnp.array([0.75, 0.25, 0.0]), jnp.array([0.0, 2.0, 3.0])))
      0.5

    Reference: a baseline of Farebrother et al., "Stop Regressing: Training Value Functions via
    Classification for Scalable Deep RL", 2024, arXiv:2403.03950.
    """
    return _expectation(probabilities, _checked_atoms(atoms))


def two_hot_loss(
    logits: ArrayLike,
    values: ArrayLike,
    *,
    min_value: float,
    max_value: float,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy with the two atoms around a number, in place of regression.

        L = -Σ_i p_i log softmax(f)_i,   p = two_hot_encode(value, linspace(min, max, m))

    Args:
      logits: f `[..., m]` floating point, m at least 2.
      values: `[...]` real numbers, clipped to the range.
      min_value, max_value: the first and the last atom, finite and in this order.
      where: boolean, broadcastable to `values`: the values that exist. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats: the entropy of p at least.

    Raises:
      ValueError: shapes that do not match, fewer than 2 atoms, or `min_value` not below
        `max_value`.
      TypeError: logits that are not floating point.

    Use it where values have to come back exactly, at the ends of the range too; the paper finds
    `hl_gauss_loss` better.

    Cost: that of a softmax over the atoms; a head of m outputs in place of one.

    Example:
      >>> logits, values = jnp.array([[0.0, 2.0, 0.0]]), jnp.array([0.5])
      >>> print(two_hot_loss(logits, values, min_value=-1.0, max_value=1.0).round(3))
      [1.239]

    Reference: a baseline of Farebrother et al., "Stop Regressing: Training Value Functions via
    Classification for Scalable Deep RL", 2024, arXiv:2403.03950.
    """
    logits_, y = _checked(logits, values, where)
    _check_support(min_value, max_value, logits_.shape[-1], "the last axis of logits")
    atoms = jnp.linspace(min_value, max_value, logits_.shape[-1])
    return _cross_entropy(logits_, two_hot_encode(y, atoms), where).astype(jnp.result_type(logits))


def categorical_td_targets(
    next_probs: ArrayLike,
    rewards: ArrayLike,
    discounts: ArrayLike,
    *,
    min_value: float,
    max_value: float,
) -> Array:
    r"""The distribution of r + γ Z on the atoms of Z (the projection of C51).

        p_i = Σ_j q_j max(0, 1 - |clip(r + γ z_j) - z_i| / Δ)

    for the atoms z_1 = min_value ... z_m = max_value at distances Δ, and the probabilities q of Z
    at them: each atom is moved, clipped to the range, and its mass is split as in `two_hot_encode`.

    Args:
      next_probs: q `[..., m]` floating point, m at least 2: those of the target network in the next
        state, for the action taken there.
      rewards: r, real numbers, broadcastable to `[...]`.
      discounts: γ (1 - done), likewise; 0 at the end of an episode.
      min_value, max_value: the first and the last atom, finite and in this order.

    Returns:
      p `[..., m]` in the type of `next_probs`, of the same sum; with the mean of r + γ Z where
      nothing is clipped.

    Raises:
      ValueError: shapes that do not match, fewer than 2 atoms, or `min_value` not below
        `max_value`.
      TypeError: probabilities that are not floating point.

    Use it where the targets themselves are wanted; `categorical_distributional_loss` takes them in.

    Cost: O(m²) time a transition, for all pairs of atoms; a pass of the target network.

    Example:
      >>> targets = categorical_td_targets(
      ...     jnp.array([[0.0, 0.5, 0.5]]), jnp.array([0.25]), 0.5, min_value=-1.0, max_value=1.0
      ... )
      >>> print(targets)
      [[0.  0.5 0.5]]

    Reference: the baseline C51 of Farebrother et al., "Stop Regressing: Training Value Functions
    via Classification for Scalable Deep RL", 2024, arXiv:2403.03950, after Bellemare, Dabney,
    Munos, "A Distributional Perspective on Reinforcement Learning", 2017, arXiv:1707.06887.
    """
    check_floating(next_probs=next_probs)
    shape = jnp.shape(next_probs)
    _check_support(min_value, max_value, shape[-1] if shape else 0, "the last axis of next_probs")
    check_broadcastable(shape[:-1], rewards=rewards, discounts=discounts)
    dtype = compute_dtype(next_probs)
    q, r, gamma = (jnp.asarray(x).astype(dtype) for x in (next_probs, rewards, discounts))
    ids = jnp.arange(shape[-1], dtype=dtype)
    atoms = jnp.linspace(min_value, max_value, shape[-1], dtype=dtype)
    moved = jnp.clip(r[..., None] + gamma[..., None] * atoms, min_value, max_value)
    place = (moved - min_value) / (max_value - min_value) * (shape[-1] - 1)
    share = jnp.maximum(1 - jnp.abs(place[..., None] - ids), 0.0)
    return jnp.sum(q[..., None] * share, axis=-2).astype(jnp.result_type(next_probs))


def categorical_distributional_loss(
    logits: ArrayLike,
    next_probs: ArrayLike,
    rewards: ArrayLike,
    discounts: ArrayLike,
    *,
    min_value: float,
    max_value: float,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy with the distribution of the return one step on (C51).

        L = -Σ_i p_i log softmax(f)_i,   p = categorical_td_targets(next_probs, rewards, discounts)

    Args:
      logits: f `[..., m]` floating point, m at least 2: of the action taken.
      next_probs: `[..., m]` floating point: those of the target network in the next state, for the
        action taken there, whose mean return is highest.
      rewards: real numbers, broadcastable to `[...]`.
      discounts: γ (1 - done), likewise.
      min_value, max_value: the first and the last atom, finite and in this order.
      where: boolean, broadcastable to `[...]`: the transitions that exist. Default: all.

    Returns:
      `[...]` losses in the type of `logits`, in nats: the entropy of p at least.

    Raises:
      ValueError: shapes that do not match, fewer than 2 atoms, or `min_value` not below
        `max_value`.
      TypeError: logits or probabilities that are not floating point.

    Use it to learn how returns are distributed; `hl_gauss_loss` learns their mean, and is the
    better of the two in the paper.

    Cost: O(m²) time a transition for the targets, and a softmax; a pass of the target network.

    Example:
      >>> logits, next_probs = jnp.array([[0.0, 0.0, 2.0]]), jnp.array([[0.0, 0.5, 0.5]])
      >>> loss = categorical_distributional_loss(
      ...     logits, next_probs, jnp.array([0.25]), 0.5, min_value=-1.0, max_value=1.0
      ... )
      >>> print(loss.round(2))
      [1.24]

    Reference: the baseline C51 of Farebrother et al., "Stop Regressing: Training Value Functions
    via Classification for Scalable Deep RL", 2024, arXiv:2403.03950, after Bellemare, Dabney,
    Munos, "A Distributional Perspective on Reinforcement Learning", 2017, arXiv:1707.06887.
    """
    check_floating(next_probs=next_probs)
    check_shape(jnp.shape(logits), next_probs=next_probs)
    logits_, _ = _checked(logits, jnp.zeros(jnp.shape(logits)[:-1]), where)
    wide = jnp.asarray(next_probs).astype(logits_.dtype)
    targets = categorical_td_targets(
        wide, rewards, discounts, min_value=min_value, max_value=max_value
    )
    return _cross_entropy(logits_, targets, where).astype(jnp.result_type(logits))


def _check_support(min_value: float, max_value: float, size: int, name: str) -> None:
    check_interval(-jnp.inf, jnp.inf, min_value=min_value, max_value=max_value)
    is_traced = any(isinstance(x, jax.core.Tracer) for x in (min_value, max_value))
    if not is_traced and not min_value < max_value:
        raise ValueError(f"min_value must be below max_value, got {min_value} and {max_value}")
    if not isinstance(size, int) or size < 2:
        raise ValueError(f"{name} must be an integer of at least 2, got {size!r}")


def _checked_atoms(atoms: ArrayLike) -> Array:
    if jnp.ndim(atoms) != 1 or jnp.size(atoms) < 2:
        raise ValueError(f"atoms must have shape [m] with m at least 2, got {jnp.shape(atoms)}")
    if not isinstance(atoms, jax.core.Tracer) and not np.all(np.diff(np.asarray(atoms)) > 0):
        raise ValueError(f"atoms must be in ascending order without repetition, got {atoms}")
    return jnp.asarray(atoms)


def _checked(logits: ArrayLike, values: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array]:
    """Both in the type to compute in, the values with 0 for those that do not exist."""
    check_floating(logits=logits)
    if jnp.ndim(logits) == 0:
        raise ValueError("logits must have shape [..., bins], got a scalar")
    shape = jnp.shape(logits)[:-1]
    check_shape(shape, values=values)
    check_broadcastable(shape, where=where)
    wide = jnp.asarray(logits).astype(compute_dtype(logits))
    y = jnp.asarray(values).astype(wide.dtype)
    if where is not None:
        y = jnp.where(where, y, 0.0)
        wide = jnp.where(jnp.broadcast_to(where, shape)[..., None], wide, 0.0)
    return wide, y


def _cross_entropy(logits: Array, targets: Array, where: ArrayLike | None) -> Array:
    targets = jax.lax.stop_gradient(targets)
    losses = -jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return losses if where is None else jnp.where(where, losses, 0.0)


def _expectation(probabilities: ArrayLike, numbers: Array) -> Array:
    check_floating(probabilities=probabilities)
    p = jnp.asarray(probabilities)
    check_shape((*p.shape[:-1], numbers.size), probabilities=p)
    wide = p.astype(compute_dtype(p))
    return jnp.sum(wide * numbers, axis=-1).astype(p.dtype)
