"""Contrastive losses with a temperature for each example, learned by robustness (iSogCLR).

Every example of the training set has a state of its own: an array with a place for each, which
shards by example as the data do.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.exponential import log_blend
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName
from jaxref.core.vectors import embedding_pair
from jaxref.parallel.ring import reduce_pairs


class IndividualTemperatureState(NamedTuple):
    """What `isogclr_loss` carries from step to step, for N training examples.

    Attributes:
      log_mean: `[N]` float32, log s: that of the running mean of exp(h / τ) over negatives, -inf
        for an example that has not been visited.
      temperature: `[N]` float32, τ.
      momentum: `[N]` float32, u: the running mean of the gradient with respect to τ, initially 0.

    Reference: Qiu, Hu, Yuan, Zhou, Zhang, Yang, "Not All Semantics are Created Equal: Contrastive
    Self-supervised Learning with Automatic Temperature Individualization", 2023, arXiv:2305.11965.
    """

    log_mean: Array
    temperature: Array
    momentum: Array


def isogclr_init(num_examples: int, *, temperature: float = 0.07) -> IndividualTemperatureState:
    """The state of `isogclr_loss` before the first step: no example visited, all temperatures one.

    Args:
      num_examples: N at least 1, the size of the training set.
      temperature: τ to start from, above 0. Default 0.07.

    Returns:
      An `IndividualTemperatureState`.

    Raises:
      ValueError: `num_examples` below 1, or a `temperature` that is not above 0.

    Use it with `isogclr_loss`; `isogclr_bimodal_loss` takes two of them, one for the images and one
    for the texts.

    Cost: three numbers for each of N examples.

    Example:
      >>> print(isogclr_init(2).temperature, isogclr_init(2).log_mean)
      [0.07 0.07] [-inf -inf]

    Reference: Qiu, Hu, Yuan, Zhou, Zhang, Yang, "Not All Semantics are Created Equal: Contrastive
    Self-supervised Learning with Automatic Temperature Individualization", 2023, arXiv:2305.11965.
    """
    check_interval(1, jnp.inf, num_examples=num_examples)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    return IndividualTemperatureState(
        jnp.full(num_examples, -jnp.inf, jnp.float32),
        jnp.full(num_examples, temperature, jnp.float32),
        jnp.zeros(num_examples, jnp.float32),
    )


def isogclr_loss(
    view_a: ArrayLike,
    view_b: ArrayLike,
    indices: ArrayLike,
    state: IndividualTemperatureState,
    *,
    rho: float = 0.4,
    gamma: float = 0.8,
    beta: float = 0.9,
    temperature_lr: ArrayLike = 0.01,
    temperature_min: float = 0.05,
    temperature_max: float = 1.0,
    gradient_clip: float = 3.0,
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> tuple[Array, IndividualTemperatureState]:
    r"""Two views of an example, at a temperature of its own that learns with them (iSogCLR).

    One step that descends the mean of `robust_global_contrastive_loss` over the training set, both
    in the embeddings and in the temperatures, with means over all negatives of an anchor estimated
    by running ones. For an anchor i, one of the two views of an example with the state s, τ, u, and
    h_iz = e_i · e_z - e_i · e_i⁺ over the n views z of the batch's other examples,

        g_i = mean_z exp(h_iz / τ)
        s_i = (1 - γ) s + γ g_i,   g_i itself on the first visit
        L_i = mean_z p_iz h_iz,    p_iz = exp(h_iz / τ) / s_i without gradient

    and for the example, with means over its two views,

        s ← mean s_i
        u ← (1 - β) u + β clip(mean (log s_i + ρ - L_i / τ), -c, c)
        τ ← clip(τ - η u, τ_min, τ_max)

    The gradient of L estimates that of Σ_i τ log mean_z exp(h_iz / τ), and equals it on a first
    visit and for γ = 1; the value of L is not that of the objective.

    Args:
      view_a: `[batch, features]` floating point, brought to length 1 here.
      view_b: `[batch, features]` floating point: other views of the same examples.
      indices: integer `[batch]`, the examples' numbers in the training set, in [0, N) and distinct;
        of one that comes twice, either visit is kept. Any other gives NaN for its anchors.
      state: from `isogclr_init(N)` or the step before.
      rho: ρ at least 0: how far, in KL divergence, the weights of an anchor's negatives are from
        even ones. The larger, the lower the temperatures. Default 0.4; 0.1 to 0.5 for images.
      gamma: γ in (0, 1], the share of the batch in the running mean. Default 0.8.
      beta: β in (0, 1], the share of the new gradient in its running mean. Default 0.9.
      temperature_lr: η at least 0, may come from a schedule. Default 0.01.
      temperature_min: τ_min above 0. Default 0.05.
      temperature_max: τ_max at least τ_min. Default 1.
      gradient_clip: c above 0. Default 3.
      axis_name: name or names of the mapped axes over whose shards the batch is spread, and the
        state with it: shard k of D has the places [k N/D, (k + 1) N/D), and its part of the batch
        are examples of these; `indices` are still the numbers in the whole set, and one of another
        shard's gives NaN. Not needed under jit with shardings, where any batch goes with any state.
      ring: with `axis_name`, whether embeddings go round a ring, which takes memory for one block
        of pairs `[2 batch / D, 2 batch / D]`; else they are gathered, for `[2 batch / D, 2 batch]`.

    Returns:
      `[2 batch]` losses in the type of `view_a`, of the views in `view_a`, then of those in
      `view_b`, and the next state, which has no gradient. Over equal shards, the mean of all is the
      loss of the batch. A batch of one example gives 0 and the state as it was.

    Raises:
      ValueError: shapes that do not match, or a hyperparameter out of its range.
      TypeError: embeddings that are not floating point, or `indices` not integer.

    Use it for self-supervised learning on data whose examples are not alike: those of frequent
    semantics get a high temperature, which tolerates that their negatives look like them, rare ones
    a low one. `nt_xent_loss` has one temperature for all, and needs larger batches.

    Cost: the products of all pairs of 2 · batch views twice, once with a gradient, and as many
    logits; three float32 numbers of state for each training example.

    Example:
      >>> a, b = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> start = isogclr_init(3, temperature=0.5)
      >>> losses, state = jax.jit(isogclr_loss)(a, b, jnp.array([2, 0]), start)
      >>> print(losses.round(3), state.temperature.round(4))
      [-0.539 -0.8   -0.539 -0.2  ] [0.4964 0.5    0.4978]

    Reference: Qiu, Hu, Yuan, Zhou, Zhang, Yang, "Not All Semantics are Created Equal: Contrastive
    Self-supervised Learning with Automatic Temperature Individualization", 2023, arXiv:2305.11965.
    """
    rates = _checked_rates(
        rho, gamma, beta, temperature_lr, temperature_min, temperature_max, gradient_clip
    )
    a, b = embedding_pair(view_a=view_a, view_b=view_b)
    z = jnp.concatenate([a, b])
    anchors = _Anchors(z, jnp.tile(jnp.sum(a * b, axis=-1), 2), jnp.tile(_places(a, axis_name), 2))
    losses, state = _visit(
        anchors,
        (z, anchors.place),
        indices,
        state,
        rates=rates,
        axis_name=axis_name,
        ring=ring,
        views=2,
        names=("indices", "state"),
    )
    return losses.astype(jnp.result_type(view_a)), state


def isogclr_bimodal_loss(
    image: ArrayLike,
    text: ArrayLike,
    image_indices: ArrayLike,
    text_indices: ArrayLike,
    state: tuple[IndividualTemperatureState, IndividualTemperatureState],
    *,
    rho: float = 6.0,
    gamma: float = 0.8,
    beta: float = 0.9,
    temperature_lr: ArrayLike = 0.01,
    temperature_min: float = 0.005,
    temperature_max: float = 1.0,
    gradient_clip: float = 5.0,
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> tuple[Array, tuple[IndividualTemperatureState, IndividualTemperatureState]]:
    r"""Images and their texts, each at a temperature of its own that learns with them (iSogCLR).

    The step of `isogclr_loss` for two towers: an image's negatives are the batch's other texts, a
    text's the other images, and each has one anchor:

        image i:  h_ij = x_i · y_j - x_i · y_i        text i:  h_ij = x_j · y_i - x_i · y_i

    Args:
      image: `[batch, features]` floating point, brought to length 1 here.
      text: `[batch, features]` floating point, row i of which belongs to row i of `image`.
      image_indices: integer `[batch]`, the images' numbers in the training set, distinct.
      text_indices: integer `[batch]`, the texts' numbers: another set where images have several.
      state: two, from `isogclr_init` with the numbers of images and of texts, or from the step
        before.
      rho: ρ at least 0, as for `isogclr_loss`. Default 6: among a set's millions of texts few
        should matter. A batch has KL divergences up to log(batch - 1), below which ρ takes effect.
      gamma: γ in (0, 1]. Default 0.8.
      beta: β in (0, 1]. Default 0.9.
      temperature_lr: η at least 0. Default 0.01.
      temperature_min: τ_min above 0. Default 0.005.
      temperature_max: τ_max at least τ_min. Default 1.
      gradient_clip: c above 0. Default 5.
      axis_name: name or names of the mapped axes over whose shards the batch is spread, and both
        states with it, as for `isogclr_loss`.
      ring: with `axis_name`, whether embeddings go round a ring rather than be gathered.

    Returns:
      `[2 batch]` losses in the type of `image`, of the images, then of the texts, and the two next
      states, which have no gradient. Over equal shards, the mean of all is the loss of the batch. A
      batch of one pair gives 0 and the states as they were.

    Raises:
      ValueError: shapes that do not match, or a hyperparameter out of its range.
      TypeError: embeddings that are not floating point, or indices not integer.

    Use it to train two towers on pairs from the web, whose captions range from the common to the
    rare; `softmax_contrastive_loss` learns one temperature for all.

    Cost: batch² products four times, twice with a gradient; three float32 numbers of state for each
    image and each text of the training set.

    Example:
      >>> image, text = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> start, indices = isogclr_init(2, temperature=0.5), jnp.arange(2)
      >>> losses, (of_image, of_text) = jax.jit(isogclr_bimodal_loss)(
      ...     image, text, indices, indices, (start, start), rho=0.4
      ... )
      >>> print(losses.round(4), of_image.temperature.round(4))
      [-0.4 -0.8 -1.  -0.2] [0.4964 0.4964]

    Reference: Qiu, Hu, Yuan, Zhou, Zhang, Yang, "Not All Semantics are Created Equal: Contrastive
    Self-supervised Learning with Automatic Temperature Individualization", 2023, arXiv:2305.11965.
    """
    rates = _checked_rates(
        rho, gamma, beta, temperature_lr, temperature_min, temperature_max, gradient_clip
    )
    x, y = embedding_pair(image=image, text=text)
    positive, place = jnp.sum(x * y, axis=-1), _places(x, axis_name)
    towers = (x, y, image_indices, state[0], "image"), (y, x, text_indices, state[1], "text")
    (of_image, image_state), (of_text, text_state) = (
        _visit(
            _Anchors(anchors, positive, place),
            (others, place),
            indices,
            own,
            rates=rates,
            axis_name=axis_name,
            ring=ring,
            views=1,
            names=(f"{name}_indices", f"the {name} state"),
        )
        for anchors, others, indices, own, name in towers
    )
    losses = jnp.concatenate([of_image, of_text])
    return losses.astype(jnp.result_type(image)), (image_state, text_state)


def robust_global_contrastive_loss(
    differences: ArrayLike,
    temperature: ArrayLike,
    *,
    rho: float,
    where: ArrayLike | None = None,
) -> Array:
    r"""The objective of iSogCLR for an anchor: its worst mean over negatives near even weights.

        F_i = τ log mean_z exp(h_z / τ) + τ ρ

    whose minimum over τ > 0 is the maximum of Σ p_z h_z over the weights p of negatives with
    KL(p || uniform) ≤ ρ (distributionally robust optimisation). The gradients are

        ∂F/∂h_z = p_z,   ∂F/∂τ = ρ - KL(p || uniform),   p = softmax(h / τ)

    Args:
      differences: h `[..., negatives]` floating point: how much more similar to the anchor each
        negative is than the positive.
      temperature: τ above 0, broadcastable to `[...]`.
      rho: ρ at least 0. With 0, and one temperature for all, this is the global contrastive loss of
        SogCLR, τ times InfoNCE without the positive in the sum, less the log of the count.
      where: boolean, broadcastable to `differences`: the negatives that count. Default: all.

    Returns:
      `[...]` losses in the type of `differences`; 0 for an anchor without negatives.

    Raises:
      ValueError: shapes that do not match, a `temperature` that is not above 0 or a negative `rho`.
      TypeError: differences that are not floating point.

    Use it where all negatives of an anchor are at hand, and to see what `isogclr_loss`, which meets
    them batch by batch, descends.

    Cost: that of a log-sum-exp over the negatives.

    Example:
      >>> print(robust_global_contrastive_loss(jnp.array([-1.0, 0.0]), 0.5, rho=0.4).round(4))
      -0.0831

    Reference: Qiu, Hu, Yuan, Zhou, Zhang, Yang, "Not All Semantics are Created Equal: Contrastive
    Self-supervised Learning with Automatic Temperature Individualization", 2023, arXiv:2305.11965.
    """
    h, where = _checked_differences(differences, where)
    check_interval(0, jnp.inf, rho=rho)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    check_broadcastable(h.shape[:-1], temperature=temperature)
    tau = jnp.asarray(temperature, h.dtype)
    log_mean, exists = _log_mean_exp(h / tau[..., None], where)
    losses = jnp.where(exists, tau * (log_mean + rho), 0.0)
    return losses.astype(jnp.result_type(differences))


def kl_constrained_temperature(
    differences: ArrayLike,
    *,
    rho: float,
    temperature_min: float = 0.05,
    where: ArrayLike | None = None,
) -> Array:
    r"""The temperature at which an anchor's weights of negatives are ρ away from even ones.

        KL(p_τ || uniform) = ρ,   p_τ = softmax(h / τ)

    the minimum of `robust_global_contrastive_loss` over τ ≥ τ_min, where `isogclr_loss` is heading
    to. The divergence falls in τ, and is at most R² / (8 τ²) for h in a range of R, which brackets
    the root for bisection.

    Args:
      differences: h `[..., negatives]` floating point.
      rho: ρ above 0. From the log of the number of negatives on, no temperature is low enough.
      temperature_min: τ_min above 0, which is returned where no temperature above it gives ρ.
        Default 0.05.
      where: boolean, broadcastable to `differences`: the negatives that count. Default: all.

    Returns:
      `[...]` temperatures in at least float32, without gradient; τ_min for an anchor without
      negatives, and for one whose negatives are all alike.

    Raises:
      ValueError: shapes that do not match, or a `rho` or `temperature_min` that is not above 0.
      TypeError: differences that are not floating point.

    Use it to set temperatures at once where all negatives are at hand, and to choose ρ;
    `isogclr_loss` learns them from batches.

    Cost: 40 softmaxes over the negatives, by halving.

    Example:
      >>> h = jnp.array([-1.0, -0.5, 0.0])
      >>> print(kl_constrained_temperature(h, rho=0.4).round(2))
      0.38
      >>> print(kl_constrained_temperature(h, rho=2.0))  # above log 3
      0.05

    Reference: Qiu, Hu, Yuan, Zhou, Zhang, Yang, "Not All Semantics are Created Equal: Contrastive
    Self-supervised Learning with Automatic Temperature Individualization", 2023, arXiv:2305.11965.
    """
    h, where = _checked_differences(differences, where)
    check_interval(0, jnp.inf, closed="right", rho=rho, temperature_min=temperature_min)
    h = jax.lax.stop_gradient(h)
    lowest = jnp.min(h, axis=-1, where=where, initial=jnp.inf)
    highest = jnp.max(h, axis=-1, where=where, initial=-jnp.inf)
    low = jnp.full(lowest.shape, temperature_min, h.dtype)
    high = jnp.maximum(low, (highest - lowest) / jnp.sqrt(8 * jnp.asarray(rho, h.dtype)))

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        is_below = _divergence_from_even(h / middle[..., None], where) > rho
        return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (low, high))
    return jnp.maximum(high, temperature_min)


class _Rates(NamedTuple):
    rho: float
    gamma: float
    beta: float
    temperature_lr: ArrayLike
    temperature_min: float
    temperature_max: float
    gradient_clip: float


class _Anchors(NamedTuple):
    """Rows, one for each view of an example, and the views of all examples one after the other."""

    vectors: Array  # [views · examples, features]
    positive: Array  # the similarity of each with its positive
    place: Array  # of its example in the batch of all shards


def _checked_rates(*values: Any) -> _Rates:
    rates = _Rates(*values)
    check_interval(0, jnp.inf, rho=rates.rho, temperature_lr=rates.temperature_lr)
    check_interval(0, 1, closed="right", gamma=rates.gamma, beta=rates.beta)
    limits = {"temperature_min": rates.temperature_min, "gradient_clip": rates.gradient_clip}
    check_interval(0, jnp.inf, closed="right", **limits)
    check_interval(rates.temperature_min, jnp.inf, temperature_max=rates.temperature_max)
    return rates


def _places(rows: Array, axis_name: AxisName | None) -> Array:
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(rows)
    return start + jnp.arange(len(rows))


def _visit(
    anchors: _Anchors,
    others: tuple[Array, Array],
    indices: ArrayLike,
    state: IndividualTemperatureState,
    *,
    rates: _Rates,
    axis_name: AxisName | None,
    ring: bool,
    views: int,
    names: tuple[str, str],
) -> tuple[Array, IndividualTemperatureState]:
    """The anchors' losses against all `others` of other places, and the state of the next step."""
    examples = len(anchors.place) // views
    check_shape((examples,), **{names[0]: indices})
    numbers, state = _own_places(indices, state, axis_name, names)
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    negatives = views * (shards * examples - 1)
    if negatives < 1:
        return 0 * anchors.positive, state

    def pairs(block: Any, combine: Any, rows: Any, columns: Any) -> Array:
        return reduce_pairs(block, rows, columns, combine=combine, axis_name=axis_name, ring=ring)

    read: Any = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
    old, tau, momentum = (values.at[numbers].get(**read) for values in state)
    tau_of_anchor, old_of_anchor = jnp.tile(tau, views), jnp.tile(old, views)
    fixed, fixed_others = jax.lax.stop_gradient((anchors, others))
    log_g = pairs(_log_total_block, "logsumexp", (fixed, tau_of_anchor), fixed_others)
    log_g -= jnp.log(negatives)
    blend = log_blend(old_of_anchor, log_g, rates.gamma)
    log_s = jnp.where(jnp.isneginf(old_of_anchor), log_g, blend)
    losses = pairs(_weighted_block, "sum", (anchors, tau_of_anchor, log_s), others) / negatives

    slope = log_s + rates.rho - jax.lax.stop_gradient(losses) / tau_of_anchor
    slope, log_s = slope.reshape(views, examples), log_s.reshape(views, examples)
    slope = jnp.clip(jnp.mean(slope, axis=0), -rates.gradient_clip, rates.gradient_clip)
    momentum = (1 - rates.beta) * momentum + rates.beta * slope
    tau = tau - rates.temperature_lr * momentum
    visited = IndividualTemperatureState(
        log_mean=jax.nn.logsumexp(log_s, axis=0) - jnp.log(views),
        temperature=jnp.clip(tau, rates.temperature_min, rates.temperature_max),
        momentum=momentum,
    )
    write: Any = {"mode": "drop", "wrap_negative_indices": False}
    return losses, jax.tree.map(
        lambda values, new: values.at[numbers].set(new.astype(values.dtype), **write),
        state,
        visited,
    )


def _own_places(
    indices: ArrayLike,
    state: IndividualTemperatureState,
    axis_name: AxisName | None,
    names: tuple[str, str],
) -> tuple[Array, IndividualTemperatureState]:
    """Where the examples are in this shard's part of the state, which has no gradient."""
    numbers = jnp.asarray(indices)
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(f"{names[0]} must be integers, got {numbers.dtype.name}")
    length = jnp.shape(state.log_mean)
    for name, values in state._asdict().items():
        check_shape(length, **{f"{names[1]}'s {name}": values})
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * length[0]
    return numbers.astype(jnp.int32) - start, jax.lax.stop_gradient(
        jax.tree.map(jnp.asarray, state)
    )


def _log_total_block(rows: Any, columns: Any, *_: Any) -> Array:
    anchors, tau = rows
    h, is_negative = _block_differences(anchors, *columns)
    return jax.nn.logsumexp(h / tau[:, None], axis=1, where=is_negative)


def _weighted_block(rows: Any, columns: Any, *_: Any) -> Array:
    anchors, tau, log_s = rows
    h, is_negative = _block_differences(anchors, *columns)
    exponents = jax.lax.stop_gradient(h) / tau[:, None] - log_s[:, None]
    weights = jnp.exp(jnp.where(is_negative, exponents, -jnp.inf))
    return jnp.sum(weights * h, axis=1)


def _block_differences(anchors: _Anchors, others: Array, place: Array) -> tuple[Array, Array]:
    h = anchors.vectors @ others.T - anchors.positive[:, None]
    return h, anchors.place[:, None] != place


def _checked_differences(
    differences: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array | None]:
    check_floating(differences=differences)
    h = jnp.asarray(differences)
    if h.ndim == 0:
        raise ValueError("differences must have shape [..., negatives], got a scalar")
    check_broadcastable(h.shape, where=where)
    h = h.astype(compute_dtype(h))
    return h, None if where is None else jnp.broadcast_to(jnp.asarray(where, bool), h.shape)


def _log_mean_exp(x: Array, where: Array | None) -> tuple[Array, Array]:
    """log mean exp over the last axis, 0 where there is nothing, and whether there is."""
    ones = jnp.ones(x.shape, bool) if where is None else where
    number = jnp.sum(ones, axis=-1)
    log_mean = masked_logsumexp(x, where=ones) - jnp.log(jnp.maximum(number, 1).astype(x.dtype))
    return log_mean, number > 0


def _divergence_from_even(x: Array, where: Array | None) -> Array:
    """KL(softmax x || uniform) over the last axis, 0 where there is nothing."""
    log_mean, _ = _log_mean_exp(x, where)
    ratio = jnp.exp(x - log_mean[..., None])  # of p to the even weights
    terms = ratio * (x - log_mean[..., None])
    ones = jnp.ones(x.shape, bool) if where is None else where
    return jnp.sum(terms, axis=-1, where=ones) / jnp.maximum(jnp.sum(ones, axis=-1), 1)
