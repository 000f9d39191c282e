"""Losses of forecasts: of returns by their direction, and of series whose values are tokens.

A series becomes tokens by its scale and a grid of bins (`quantize_series`), so that a language
model forecasts it; the Wasserstein distance between bins then tells a near miss from a far one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean


def mean_absolute_directional_loss(
    predicted_returns: ArrayLike, observed_returns: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The loss of a position of one unit in the direction of each forecast (MADL).

        L = -sign(r̂ r) |r| = -sign(r̂) r

    for the predicted return r̂ and the observed one r. Its mean over time is minus the mean return
    of the strategy that buys where r̂ is positive and sells short where it is negative. A forecast
    of 0 takes no position. Whatever the size of r̂, L is the same, where squared and absolute
    errors reward forecasts that are close to 0 on the wrong side.

    Args:
      predicted_returns: r̂ `[...]` floating point.
      observed_returns: r, broadcastable to `predicted_returns`: simple returns over the next
        interval, not prices, which are all positive.
      where: boolean, broadcastable to `predicted_returns`: the entries that exist; the others, such
        as days without a price, have loss 0 and may hold anything. Default: all.

    Returns:
      `[...]` losses from -|r| to |r| in the type of `predicted_returns`. The gradient with respect
      to the forecasts is 0 everywhere.

    Raises:
      ValueError: `observed_returns` or `where` do not broadcast to `predicted_returns`.
      TypeError: `predicted_returns` not floating point.

    Use it to choose among models and hyperparameters; nothing can be trained with it by gradients,
    for which `generalized_mean_absolute_directional_loss` is.

    Cost: one pass over the returns.

    Example:
      >>> predicted, observed = jnp.array([0.03, -0.01, 0.0]), jnp.array([0.01, 0.01, 0.02])
      >>> print(mean_absolute_directional_loss(predicted, observed))
      [-0.01  0.01 -0.  ]

    Reference: Michańków, Sakowski, Ślepaczuk, "Mean Absolute Directional Loss as a New Loss
    Function for Machine Learning Problems in Algorithmic Investment Strategies", 2023,
    arXiv:2309.10546, by which the same authors train and compare in "Alternative Loss Function in
    Evaluation of Transformer Models", 2025, arXiv:2507.16548.
    """
    predicted, observed = _returns(predicted_returns, observed_returns, where)
    # sign(r̂) r and not sign(r̂ r) |r|: the product of two small returns may be 0
    return (-jnp.sign(predicted) * observed).astype(jnp.result_type(predicted_returns))


def generalized_mean_absolute_directional_loss(
    predicted_returns: ArrayLike,
    observed_returns: ArrayLike,
    *,
    slope: float = 1000.0,
    exponent: float = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""A smooth directional loss, which gradients can train (GMADL).

        L = -(σ(a r̂ r) - 1/2) |r|^b = -tanh(a r̂ r / 2) |r|^b / 2,   a = slope, b = exponent

    for the predicted return r̂ and the observed one r, with the gradient
    -(a / 4) r |r|^b / cosh²(a r̂ r / 2), which is steepest at r̂ = 0. For a → ∞ and b = 1 it is half
    of `mean_absolute_directional_loss`.

    Args:
      predicted_returns: r̂ `[...]` floating point.
      observed_returns: r, broadcastable to `predicted_returns`: simple returns.
      slope: a above 0: how sharply the sign of r̂ r decides. Default 1000, for returns of about 1%;
        about 1 over the variance of r.
      exponent: b at least 0: how much more large moves count than small ones. Default 1.
      where: boolean, broadcastable to `predicted_returns`: the entries that exist; the others have
        loss 0 and may hold anything. Default: all.

    Returns:
      `[...]` losses from -|r|^b / 2 to |r|^b / 2 in the type of `predicted_returns`.

    Raises:
      ValueError: `slope` not positive, a negative `exponent`, or shapes that do not match.
      TypeError: `predicted_returns` not floating point.

    Use it to train forecasters of returns whose signs are traded, then compare them by
    `mean_absolute_directional_loss` and `jaxref.metrics.investment_metrics`.

    Cost: one pass over the returns, with a tanh and a power for each.

    Example:
      >>> loss = generalized_mean_absolute_directional_loss
      >>> print(loss(jnp.array([0.1, 0.0, -0.1]), jnp.array([0.1, 0.1, 0.1])).round(4))
      [-0.05 -0.    0.05]

    Reference: Michańków, Sakowski, Ślepaczuk, "Alternative Loss Function in Evaluation of
    Transformer Models", 2025, arXiv:2507.16548, and "Generalized Mean Absolute Directional Loss as
    a Solution to Overfitting and High Transaction Costs in Machine Learning Models Used in
    High-Frequency Algorithmic Investment Strategies", 2024, arXiv:2412.18405.
    """
    check_interval(0, jnp.inf, closed="right", slope=slope)
    check_interval(0, jnp.inf, exponent=exponent)
    predicted, observed = _returns(predicted_returns, observed_returns, where)
    is_still = observed == 0
    moved = jnp.abs(jnp.where(is_still, 1.0, observed)) ** exponent
    size = jnp.where(is_still, jnp.asarray(exponent == 0, moved.dtype), moved)
    loss = -0.5 * jnp.tanh(0.5 * (slope * observed) * predicted) * size
    return loss.astype(jnp.result_type(predicted_returns))


def ordinal_wasserstein_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    bin_centers: ArrayLike,
    *,
    p: float = 1.0,
    special_tokens: int = 0,
    where: ArrayLike | None = None,
) -> Array:
    r"""The Wasserstein distance of predicted bins from the right one, to the power p.

        L = W_p(P, label)^p = Σ_k P_k |c_k - c_label|^p,   P = softmax(logits)

    with the bins' centers c. It is the expected error of a forecast drawn from P; cross-entropy
    sees the label's own bin alone. Its gradient P_k (|c_k - c_label|^p - L) vanishes where P is
    sure of a wrong bin. In expectation it is least where P is a point at the median of the targets
    (p = 1) or at their mean (p = 2): better points, and no spread.

    Args:
      logits: `[..., special_tokens + bins]` floating point.
      labels: integer ids `[...]`, or distributions of the shape of `logits`, whose mass on special
        tokens drops out. An id that is no token gives NaN for its example.
      bin_centers: c `[bins]` in ascending order.
      p: at least 1. Default 1, in the unit of the centers.
      special_tokens: how many of the first tokens are no bins, such as padding and the end of a
        series. Their logits are left out of the softmax, and labels that are special have loss 0.
        Default 0.
      where: boolean, broadcastable to the labels `[...]` without classes: the positions that count;
        the others have loss 0 and may hold anything. Default: all.

    Returns:
      `[...]` losses in the type of `logits`. The power, not the root, which has no slope at 0.

    Raises:
      ValueError: `p` below 1, centers that descend, or shapes that do not match.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it to fine-tune a model that cross-entropy has trained, or beside cross-entropy, where a
    good point forecast matters; special tokens need cross-entropy in any case.

    Cost: a softmax over the bins and an array of distances as large; for distributions as labels
    and p > 1 a sort of 2 · bins.

    Example:
      >>> logits, centers = jnp.log(jnp.array([[0.5, 0.0, 0.5]])), jnp.array([0.0, 1.0, 3.0])
      >>> print(ordinal_wasserstein_loss(logits, jnp.array([0]), centers))
      [1.5]

    Reference: Chernov, "Fine-Tuning a Time Series Foundation Model with Wasserstein Loss", 2024,
    arXiv:2409.15367.
    """
    check_floating(logits=logits)
    check_interval(1, jnp.inf, p=p)
    centers = _checked_centers(bin_centers, "bin_centers")
    if not isinstance(special_tokens, int) or special_tokens < 0:
        raise ValueError(f"special_tokens must be an integer at least 0, got {special_tokens!r}")
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    positions, tokens = logits.shape[:-1], special_tokens + centers.size
    check_shape((*positions, tokens), logits=logits)
    check_broadcastable(positions, where=where)
    is_ids = jnp.issubdtype(labels.dtype, jnp.integer)
    if not is_ids and not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(f"labels must be integer ids or a distribution, got {labels.dtype.name}")
    check_shape(positions if is_ids else logits.shape, labels=labels)
    wide = logits[..., special_tokens:].astype(compute_dtype(logits))
    centers = centers.astype(wide.dtype)
    if where is not None:
        wide = jnp.where(jnp.asarray(where)[..., None], wide, 0.0)
    probabilities = jax.nn.softmax(wide, axis=-1)
    if is_ids:
        ids = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
        is_bin = (ids >= special_tokens) & (ids < tokens)
        center = centers[jnp.where(is_bin, ids - special_tokens, 0)]
        distance = jnp.abs(centers - center[..., None]) ** p
        loss = jnp.sum(probabilities * distance, axis=-1)
        loss = jnp.where(is_bin, loss, jnp.where((ids >= 0) & (ids < tokens), 0.0, jnp.nan))
    else:
        target = labels[..., special_tokens:].astype(wide.dtype)
        if where is not None:
            target = jnp.where(jnp.asarray(where)[..., None], target, 0.0)
        mass = jnp.sum(target, axis=-1, keepdims=True)
        loss = discrete_wasserstein(mass * probabilities, target, centers, p=p)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(logits.dtype)


def discrete_wasserstein(
    probs_p: ArrayLike, probs_q: ArrayLike, centers: ArrayLike, *, p: float = 1.0
) -> Array:
    r"""The Wasserstein distance of two distributions over points on a line, to the power p.

        W_1 = Σ_{k < n} |F_k - G_k| (c_{k+1} - c_k)
        W_p^p = ∫₀¹ |F⁻¹(u) - G⁻¹(u)|^p du

    with the cumulative sums F and G of the probabilities and the points c. On a line the best plan
    matches equal quantiles, which sorting F and G together finds.

    Args:
      probs_p: `[..., points]` floating point, at least 0.
      probs_q: the same shape, of the same sum.
      centers: c `[points]` in ascending order.
      p: at least 1. Default 1, in the unit of the centers.

    Returns:
      `[...]` distances to the power p in the type of `probs_p`, differentiable in both
      distributions.

    Raises:
      ValueError: `p` below 1, centers that descend, or shapes that do not match.
      TypeError: probabilities that are not floating point.

    Use it for targets that are themselves spread over points; `ordinal_wasserstein_loss` takes
    logits. On other spaces than a line ott-jax has it.

    Cost: one cumulative sum over the points for W_1, and for other p a sort of 2 · points, O(points
    · log points).

    Example:
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.0, 0.5, 0.5])
      >>> centers = jnp.array([0.0, 1.0, 3.0])
      >>> print(discrete_wasserstein(p, q, centers), discrete_wasserstein(p, q, centers, p=2))
      1.5 2.5

    Reference: Chernov, "Fine-Tuning a Time Series Foundation Model with Wasserstein Loss", 2024,
    arXiv:2409.15367.
    """
    check_floating(probs_p=probs_p, probs_q=probs_q)
    check_interval(1, jnp.inf, p=p)
    dtype = compute_dtype(probs_p, probs_q)
    c = _checked_centers(centers, "centers").astype(dtype)
    shape = jnp.shape(probs_p)
    check_shape((*shape[:-1], c.size), probs_p=probs_p)
    check_shape(shape, probs_q=probs_q)
    first, second = (jnp.asarray(x).astype(dtype) for x in (probs_p, probs_q))
    if p == 1:
        difference = jnp.cumsum(first - second, axis=-1)[..., :-1]
        size = difference * jnp.sign(difference)
        return jnp.sum(size * jnp.diff(c), axis=-1).astype(jnp.result_type(probs_p))
    levels = jnp.concatenate([jnp.cumsum(x, axis=-1) for x in (first, second)], axis=-1)
    order = jnp.argsort(levels, axis=-1)
    ends = jnp.take_along_axis(levels, order, axis=-1)
    widths = jnp.diff(ends, axis=-1, prepend=0.0)
    of_first = (order < c.size).astype(jnp.int32)
    i, j = (jnp.cumsum(x, axis=-1) - x for x in (of_first, 1 - of_first))  # levels passed before
    last = c.size - 1
    distance = jnp.abs(c[jnp.minimum(i, last)] - c[jnp.minimum(j, last)]) ** p
    return jnp.sum(widths * distance, axis=-1).astype(jnp.result_type(probs_p))


def quantize_series(
    values: ArrayLike,
    *,
    bins: int = 4094,
    low: float = -15.0,
    high: float = 15.0,
    special_tokens: int = 0,
    context: int | None = None,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    r"""Turns series into tokens: divided by their scale, each value is the nearest of the bins.

        token = special_tokens + argmin_k |x / s - c_k|,   s = mean |x| over the context

    with the bins' centers c evenly spaced from `low` to `high`, both included.

    Args:
      values: x `[..., time]` floating point.
      bins: at least 2. Default 4094.
      low: the first center. Default -15.
      high: the last center, above `low`. Default 15.
      special_tokens: how many tokens come before the bins. Default 0.
      context: how many of the first values are known, from which the scale is taken. Default: all.
      where: boolean, broadcastable to `values`: the values that exist; the others do not enter the
        scale, have token 0 (padding, where there are special tokens), and may hold anything.
        Default: all.

    Returns:
      int32 tokens `[..., time]`, the first or last bin for what is beyond them, and scales `[...]`
      in at least float32, 1 where the context is 0 throughout or empty.

    Raises:
      ValueError: less than two bins, `low` not below `high`, negative `special_tokens`, a
        `context` not between 0 and the time, or a `where` that does not broadcast.
      TypeError: values that are not floating point.

    Use it before a language model over the tokens; `dequantize_series` goes back, with an error of
    at most half a bin times the scale within the range. The centers, for
    `ordinal_wasserstein_loss`, are `jnp.linspace(low, high, bins)`.

    Cost: two passes over the values.

    Example:
      >>> tokens, scale = quantize_series(jnp.array([1.0, -2.0, 3.0]), bins=5, low=-2.0, high=2.0)
      >>> print(tokens, scale)
      [3 1 4] 2.0

    Reference: Chernov, "Fine-Tuning a Time Series Foundation Model with Wasserstein Loss", 2024,
    arXiv:2409.15367, after Ansari et al., "Chronos: Learning the Language of Time Series", 2024,
    arXiv:2403.07815.
    """
    check_floating(values=values)
    _check_grid(bins, low, high, special_tokens)
    x = jnp.asarray(values).astype(compute_dtype(values))
    if x.ndim == 0:
        raise ValueError("values must have shape [..., time], got ()")
    length = x.shape[-1]
    if context is None:
        context = length
    if not isinstance(context, int) or not 0 <= context <= length:
        raise ValueError(f"context must be an integer from 0 to {length}, got {context!r}")
    check_broadcastable(x.shape, where=where)
    exists = jnp.broadcast_to(True if where is None else where, x.shape)
    x = jnp.where(exists, x, 0.0)
    scale = masked_mean(jnp.abs(x[..., :context]), axis=-1, where=exists[..., :context])
    scale = jnp.where(scale > 0, scale, 1.0)
    step = (high - low) / (bins - 1)
    nearest = jnp.floor((x / scale[..., None] - low) / step + 0.5)
    tokens = jnp.clip(nearest, 0, bins - 1).astype(jnp.int32) + special_tokens
    return jnp.where(exists, tokens, 0), scale


def dequantize_series(
    tokens: ArrayLike,
    scale: ArrayLike,
    *,
    bins: int = 4094,
    low: float = -15.0,
    high: float = 15.0,
    special_tokens: int = 0,
) -> Array:
    r"""Turns tokens back into the values that they stand for.

        x = s c_{token - special_tokens}

    Args:
      tokens: integer `[..., time]`, as of `quantize_series`, or drawn from a model.
      scale: s `[...]` floating point.
      bins, low, high, special_tokens: as for `quantize_series`.

    Returns:
      `[..., time]` values in the type of `scale`; NaN for a token that is no bin.

    Raises:
      ValueError: less than two bins, `low` not below `high`, negative `special_tokens`, or shapes
        that do not match.
      TypeError: tokens that are not integers, or scales that are not floating point.

    Use it on several drawn series, of which the median or the mean is the point forecast;
    `quantize_series` makes the tokens.

    Cost: one pass over the tokens.

    Example:
      >>> series = dequantize_series(
      ...     jnp.array([3, 1, 4]), jnp.array(2.0), bins=5, low=-2.0, high=2.0
      ... )
      >>> print(series)
      [ 2. -2.  4.]

    Reference: Chernov, "Fine-Tuning a Time Series Foundation Model with Wasserstein Loss", 2024,
    arXiv:2409.15367, after Ansari et al., "Chronos: Learning the Language of Time Series", 2024,
    arXiv:2403.07815.
    """
    check_floating(scale=scale)
    _check_grid(bins, low, high, special_tokens)
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype.name}")
    check_shape(tokens.shape[:-1], scale=scale)
    place = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32)) - special_tokens
    wide = jnp.asarray(scale).astype(compute_dtype(scale))
    center = low + place.astype(wide.dtype) * ((high - low) / (bins - 1))
    series = jnp.where((place >= 0) & (place < bins), center, jnp.nan) * wide[..., None]
    return series.astype(jnp.result_type(scale))


def _returns(
    predicted_returns: ArrayLike, observed_returns: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array]:
    """Both in the type to compute in and of one shape, and 0 at the entries that do not exist."""
    check_floating(predicted_returns=predicted_returns)
    shape = jnp.shape(predicted_returns)
    check_broadcastable(shape, observed_returns=observed_returns, where=where)
    dtype = compute_dtype(predicted_returns)
    predicted = jnp.asarray(predicted_returns).astype(dtype)
    observed = jnp.broadcast_to(jnp.asarray(observed_returns).astype(dtype), shape)
    if where is None:
        return predicted, observed
    return jnp.where(where, predicted, 0.0), jnp.where(where, observed, 0.0)


def _checked_centers(centers: ArrayLike, name: str) -> Array:
    """The points of a line, in ascending order where they are known."""
    c = jnp.asarray(centers)
    if c.ndim != 1 or c.size == 0:
        raise ValueError(f"{name} must have shape [points], got {c.shape}")
    if not isinstance(centers, jax.core.Tracer):
        named: dict[str, Any] = {name: centers}
        check_interval(-jnp.inf, jnp.inf, **named)
        if np.any(np.diff(np.asarray(centers)) < 0):
            raise ValueError(f"{name} must be in ascending order, got {np.asarray(centers)}")
    return c


def _check_grid(bins: int, low: float, high: float, special_tokens: int) -> None:
    for name, value, least in (("bins", bins, 2), ("special_tokens", special_tokens, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer at least {least}, got {value!r}")
    check_interval(-jnp.inf, jnp.inf, low=low)
    check_interval(low, jnp.inf, closed="right", high=high)
