"""Ensembles that stand for a posterior: members held to random anchors, and what they predict.

Members go along the leading axis of parameters, means and variances. A member predicts a normal
law, of a mean m and a variance v; the ensemble their mixture, each member with the same weight.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_same_tree,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards


class EnsembleMoments(NamedTuple):
    """Mean and variance of a mixture of normal laws.

    Attributes:
      mean: `[...]`.
      variance: `[...]`, the sum of the following.
      aleatoric: `[...]`, the mean of the members' variances: noise that no more data would remove.
      epistemic: `[...]`, the variance of their means: where members differ, for want of data.
    """

    mean: Array
    variance: Array
    aleatoric: Array
    epistemic: Array


class Rollout(NamedTuple):
    """A forecast of several steps.

    Attributes:
      values: `[horizon, ...]`, what each step was taken to be by the following ones.
      means: `[horizon, ...]`.
      variances: `[horizon, ...]`, of each step given the values before.
    """

    values: Array
    means: Array
    variances: Array


def sample_anchors(params: Any, prior_std: Any, *, members: int, key: Array) -> Any:
    r"""What the parameters of each member of an ensemble are held to: draws from their prior.

        a_j ~ N(0, diag(s²)),   s = prior_std,   j = 1 ... members

    Args:
      params: the parameters of one member, a tree of floating-point arrays; shapes and types alone
        are used.
      prior_std: s above 0, a number for all parameters, or a tree of the structure of `params` with
        numbers or arrays that broadcast to its leaves, such as 1 / √inputs for a kernel.
      members: at least 1.
      key: a random key.

    Returns:
      The tree with arrays `[members, *shape]` in the types of `params`.

    Raises:
      ValueError: no member, a `prior_std` that is not positive or does not fit the tree.
      TypeError: parameters that are not floating point.

    Use it twice: with one key for the anchors, which stay as they are, and with another for what
    the members start from.

    Cost: one draw for each parameter of each member, and memory for another copy of the ensemble.

    Example:
      >>> params = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}
      >>> prior_std = {"kernel": 0.5, "bias": 1.0}
      >>> sample_anchors(params, prior_std, members=5, key=jax.random.key(0))["kernel"].shape
      (5, 4, 2)

    Reference: Sengupta, Waxenegger-Wilfing, Martin, Hardi, Juniper, "Forecasting Thermoacoustic
    Instabilities in Liquid Propellant Rocket Engines Using Multimodal Bayesian Deep Learning",
    2021, arXiv:2107.06396; anchored ensembles are of Pearce, Leibfried, Brintrup, Zaki, Neely,
    "Uncertainty in Neural Networks: Approximately Bayesian Ensembling", 2018, arXiv:1810.05546.
    """
    check_interval(1, jnp.inf, members=members)
    leaves, structure = jax.tree.flatten(params)
    stds = _stds_of(prior_std, params)
    drawn = []
    for leaf, std, leaf_key in zip(leaves, stds, jax.random.split(key, max(len(leaves), 1))):
        check_floating(params=leaf)
        dtype = compute_dtype(leaf)
        noise = jax.random.normal(leaf_key, (members, *jnp.shape(leaf)), dtype)
        drawn.append((jnp.asarray(std, dtype) * noise).astype(jnp.result_type(leaf)))
    return jax.tree.unflatten(structure, drawn)


def anchored_ensemble_loss(
    means: ArrayLike,
    variances: ArrayLike,
    targets: ArrayLike,
    params: Any,
    anchors: Any,
    prior_std: Any,
    *,
    dataset_size: int,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How badly each member of an ensemble fits, and how far it is from its anchor.

        L_j = mean_n (log v_jn + (y_n - m_jn)² / v_jn) / 2 + Σ_k (θ_jk - a_jk)² / s_k² / (2 N)

    with the parameters θ, anchors a, prior deviations s and N = dataset_size examples in all. The
    minima, over random anchors, are spread about as the posterior is, more narrowly; if to the
    targets of each member noise of variance v is added, once, exactly so for a linear model.

    Args:
      means: m `[members, batch, ...]` floating point; the axes after the batch are outputs, whose
        errors are added up.
      variances: v above 0, broadcastable to `means`, such as softplus(output) + 1e-6. A constant
        stands for known noise.
      targets: y, broadcastable to `means`: `[batch, ...]` for all members.
      params: θ, a tree of arrays `[members, ...]`.
      anchors: a, the same tree, from `sample_anchors`; no gradient goes there.
      prior_std: s above 0: a number, or a tree as for `sample_anchors`.
      dataset_size: N at least 1, examples in all, and not in the batch.
      where: boolean, broadcastable to `[batch]`: the examples that count. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread.

    Returns:
      `[members]` losses in the type of `means`; the sum of them is what to minimise, as no member
      knows of another. Without any example, the second term alone.

    Raises:
      ValueError: shapes or trees that do not match, no member, or a `prior_std` or `dataset_size`
        out of range.
      TypeError: means or variances that are not floating point.

    Use it with `jax.vmap` of the network over members. Weight decay instead, towards 0, would bring
    the members together and leave no doubt where there are no data.

    Cost: one pass over predictions, parameters and anchors of all members; forward and backward
    passes are `members` times those of one network.

    Example:
      >>> params = anchors = {"w": jnp.array([[1.0], [2.0]])}  # two members
      >>> means = params["w"] * jnp.array([1.0, 2.0])
      >>> targets = jnp.array([1.0, 2.0])
      >>> print(anchored_ensemble_loss(means, 1.0, targets, params, anchors, 1.0, dataset_size=2))
      [0.   1.25]

    Reference: Sengupta, Waxenegger-Wilfing, Martin, Hardi, Juniper, "Forecasting Thermoacoustic
    Instabilities in Liquid Propellant Rocket Engines Using Multimodal Bayesian Deep Learning",
    2021, arXiv:2107.06396; the loss is of Pearce, Leibfried, Brintrup, Zaki, Neely, "Uncertainty in
    Neural Networks: Approximately Bayesian Ensembling", 2018, arXiv:1810.05546.
    """
    check_interval(1, jnp.inf, dataset_size=dataset_size)
    m, v = _checked_laws(means, variances)
    if m.ndim < 2 or len(m) == 0:
        raise ValueError(f"means must have shape [members, batch, ...], got {m.shape}")
    check_broadcastable(m.shape, targets=targets)
    check_broadcastable(m.shape[1:2], where=where)
    check_same_tree(params, anchors=anchors)
    stds = _stds_of(prior_std, jax.tree.map(lambda leaf: leaf[0], params))
    squares = jnp.zeros(len(m), m.dtype)
    for leaf, anchor, std in zip(jax.tree.leaves(params), jax.tree.leaves(anchors), stds):
        if jnp.ndim(leaf) == 0 or len(leaf) != len(m):
            raise ValueError(
                f"params must have a leading axis of {len(m)} members, got {jnp.shape(leaf)}"
            )
        anchor = jax.lax.stop_gradient(jnp.asarray(anchor, m.dtype))
        distance = (jnp.asarray(leaf, m.dtype) - anchor) / jnp.asarray(std, m.dtype)
        squares += jnp.sum(jnp.square(distance).reshape(len(m), -1), axis=1)
    y = jnp.broadcast_to(jnp.asarray(targets).astype(m.dtype), m.shape)
    counted = jnp.broadcast_to(True if where is None else jnp.asarray(where), m.shape[1:2])
    each = counted.reshape(1, -1, *[1] * (m.ndim - 2))
    m, v, y = (jnp.where(each, z, fill) for z, fill in ((m, 0.0), (v, 1.0), (y, 0.0)))
    fit = 0.5 * jnp.sum(jnp.log(v) + jnp.square(y - m) / v, axis=tuple(range(1, m.ndim)))
    total, count = sum_over_shards((fit, jnp.sum(counted)), axis_name)
    loss = total / jnp.maximum(count, 1) + squares / (2 * dataset_size)
    return loss.astype(jnp.result_type(means))


def ensemble_predictive_moments(
    means: ArrayLike, variances: ArrayLike, *, axis: int = 0
) -> EnsembleMoments:
    r"""Mean and variance that an ensemble predicts, and which part of it is doubt.

        mean = avg_j m_j,   aleatoric = avg_j v_j,   epistemic = avg_j (m_j - mean)²,
        variance = aleatoric + epistemic

    Args:
      means: m `[members, ...]` floating point, the members at `axis`.
      variances: v at least 0, broadcastable to `means`.
      axis: the axis of the members. Default 0.

    Returns:
      `EnsembleMoments` in the type of `means`, without `axis`. One member has epistemic 0.

    Raises:
      ValueError: no member, an axis out of range, or shapes that do not match.
      TypeError: means or variances that are not floating point.

    Use the epistemic part to see where a model is out of its depth: far from its data, or where a
    sensor fails.

    Cost: two passes over the means, one over the variances; predictions need a forward pass for
    each member.

    Example:
      >>> moments = ensemble_predictive_moments(jnp.array([1.0, 3.0]), jnp.array([0.5, 1.5]))
      >>> print(*moments)
      2.0 2.0 1.0 1.0

    Reference: Sengupta, Waxenegger-Wilfing, Martin, Hardi, Juniper, "Forecasting Thermoacoustic
    Instabilities in Liquid Propellant Rocket Engines Using Multimodal Bayesian Deep Learning",
    2021, arXiv:2107.06396.
    """
    m, v, _ = _along_members(means, variances, axis)
    mean, aleatoric = jnp.mean(m, axis=0), jnp.mean(v, axis=0)
    epistemic = jnp.mean(jnp.square(m - mean), axis=0)
    moments = mean, aleatoric + epistemic, aleatoric, epistemic
    return EnsembleMoments(*(moment.astype(jnp.result_type(means)) for moment in moments))


def mixture_negative_log_likelihood(
    means: ArrayLike, variances: ArrayLike, targets: ArrayLike, *, axis: int = 0
) -> Array:
    r"""The negative log-likelihood of targets under an ensemble's mixture of normal laws.

        L = -log( 1/M Σ_j N(y; m_j, v_j) )

    Never above the mean of the members' own, since -log is convex.

    Args:
      means: m `[members, ...]` floating point, the members at `axis`.
      variances: v above 0, broadcastable to `means`.
      targets: y, of the shape of `means` without `axis`.
      axis: the axis of the members. Default 0.

    Returns:
      Losses of the shape of `targets` in the type of `means`, in nats.

    Raises:
      ValueError: no member, an axis out of range, or shapes that do not match.
      TypeError: means or variances that are not floating point.

    Use it to report how well an ensemble knows what it does not know; train members one by one,
    with `anchored_ensemble_loss`.

    Cost: that of a log-sum-exp over the M members for each target.

    Example:
      >>> loss = mixture_negative_log_likelihood(jnp.array([0.0, 4.0]), jnp.ones(2), 0.0)
      >>> print(loss.round(3))
      1.612

    Reference: Sengupta, Waxenegger-Wilfing, Martin, Hardi, Juniper, "Forecasting Thermoacoustic
    Instabilities in Liquid Propellant Rocket Engines Using Multimodal Bayesian Deep Learning",
    2021, arXiv:2107.06396.
    """
    m, v, place = _along_members(means, variances, axis)
    shape = jnp.shape(means)
    check_shape(shape[:place] + shape[place + 1 :], targets=targets)
    errors = jnp.square(jnp.asarray(targets).astype(m.dtype) - m)
    log_laws = -0.5 * (math.log(2 * math.pi) + jnp.log(v) + errors / v)
    loss = math.log(len(m)) - jax.nn.logsumexp(log_laws, axis=0)
    return loss.astype(jnp.result_type(means))


def autoregressive_rollout(
    step_fn: Callable[[Array, Any], tuple[ArrayLike, ArrayLike]],
    history: ArrayLike,
    controls: Any = None,
    *,
    horizon: int | None = None,
    key: Array | None = None,
) -> Rollout:
    r"""Forecasts several steps with a model of one: each step becomes history of the next.

        (m_t, v_t) = step_fn(history, controls_t),   history ← (history without its first, x_t),
        x_t = m_t,   or, with a key, a draw from N(m_t, v_t)

    Args:
      step_fn: maps the history and one step's controls to the mean and variance of the next step,
        each of the shape of a step, or broadcasting to it.
      history: `[length, ...]` floating point, a window of steps, the newest last.
      controls: what is known of the future: a tree of arrays `[horizon, ...]`, such as valve
        positions. Default: nothing, and `step_fn` gets None.
      horizon: how many steps. Default: the length of the controls.
      key: a random key, for one possible course; None goes along the means.

    Returns:
      A `Rollout` in the type of `history`.

    Raises:
      ValueError: no history, or a `horizon` that is missing, below 1, or not that of the controls.
      TypeError: a history that is not floating point.

    Use it for forecasts as far ahead as the controls are known. Along the means, doubt about
    earlier steps is left out; the spread of many draws, or of members (with `jax.vmap`), has it.

    Cost: `horizon` calls of `step_fn`, one after another; for gradients the window of each step is
    kept.

    Example:
      >>> halve = lambda history, control: (0.5 * history[-1] + control, 1.0)
      >>> print(autoregressive_rollout(halve, jnp.array([4.0, 8.0]), jnp.array([0.0, 1.0])).means)
      [4. 3.]

    Reference: Sengupta, Waxenegger-Wilfing, Martin, Hardi, Juniper, "Forecasting Thermoacoustic
    Instabilities in Liquid Propellant Rocket Engines Using Multimodal Bayesian Deep Learning",
    2021, arXiv:2107.06396.
    """
    check_floating(history=history)
    window = jnp.asarray(history)
    if window.ndim == 0 or len(window) == 0:
        raise ValueError(f"history must have shape [length, ...], got {window.shape}")
    lengths = {len(jnp.asarray(leaf)) for leaf in jax.tree.leaves(controls)}
    if horizon is None:
        if len(lengths) != 1:
            raise ValueError(
                "horizon must be given where controls do not have one length, got None"
            )
        (horizon,) = lengths
    check_interval(1, jnp.inf, horizon=horizon)
    if lengths - {horizon}:
        raise ValueError(f"controls must be known for {horizon} steps, got {sorted(lengths)}")
    keys = None if key is None else jax.random.split(key, horizon)

    def step(window: Array, given: Any) -> tuple[Array, Rollout]:
        control, step_key = given
        law = [
            jnp.broadcast_to(jnp.asarray(z, window.dtype), window.shape[1:])
            for z in step_fn(window, control)
        ]
        mean, variance = law
        value = mean
        if step_key is not None:
            noise = jax.random.normal(step_key, mean.shape, compute_dtype(mean))
            value = mean + (jnp.sqrt(variance) * noise).astype(mean.dtype)
        return jnp.concatenate([window[1:], value[None]]), Rollout(value, mean, variance)

    return jax.lax.scan(step, window, (controls, keys), length=horizon)[1]


def _stds_of(prior_std: Any, params: Any) -> list[ArrayLike]:
    """The prior deviations for each leaf of one member's parameters."""
    leaves, stds = jax.tree.leaves(params), jax.tree.leaves(prior_std)
    wanted: Any = jax.tree.structure(params)
    given: Any = jax.tree.structure(prior_std)
    if given == jax.tree.structure(0.0):
        stds = stds * len(leaves)
    elif given != wanted:
        raise ValueError(
            f"prior_std must be a number or a tree of the structure {wanted}, got {given}"
        )
    for std, leaf in zip(stds, leaves):
        check_interval(0, jnp.inf, closed="right", prior_std=std)
        check_broadcastable(jnp.shape(leaf), prior_std=std)
    return stds


def _checked_laws(means: ArrayLike, variances: ArrayLike) -> tuple[Array, Array]:
    """Means and variances of one shape in the type to compute in, the latter above 0."""
    check_floating(means=means, variances=variances)
    check_broadcastable(jnp.shape(means), variances=variances)
    dtype = compute_dtype(means, variances)
    m = jnp.asarray(means).astype(dtype)
    v = jnp.maximum(jnp.asarray(variances).astype(dtype), jnp.finfo(dtype).tiny)
    return m, jnp.broadcast_to(v, m.shape)


def _along_members(means: ArrayLike, variances: ArrayLike, axis: int) -> tuple[Array, Array, int]:
    """Means and variances with the members first, and where they were."""
    m, v = _checked_laws(means, variances)
    (place,) = canonical_axes(axis, m.ndim)
    if m.shape[place] == 0:
        raise ValueError(f"means must have at least one member, got shape {m.shape}")
    return jnp.moveaxis(m, place, 0), jnp.moveaxis(v, place, 0), place
