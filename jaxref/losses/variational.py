"""Information measured between samples, without densities: Cauchy-Schwarz divergences.

Every function sees samples `[n, ...]`, whose other axes are flattened, as one set, and measures by
the kernel

    k(a, b) = exp(-||a - b||² / (2 σ²)),   σ = bandwidth

that is, between the densities that it smooths them to. Values are in nats; the authors' code has
them in bits, 1 / log 2 times as large.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, all_shards, sum_over_shards
from jaxref.core.vectors import squared_distances


def cauchy_schwarz_divergence(
    samples_p: ArrayLike,
    samples_q: ArrayLike,
    *,
    bandwidth: float = 1.0,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far two samples are apart: minus the log of their densities' cosine, twice (a loss of
    the set).

        D = log mean k(p, p) + log mean k(q, q) - 2 log mean k(p, q) = -2 log cos(p̂, q̂)

    over all pairs. At least 0 by Cauchy's and Schwarz's inequality, symmetric, and 0 for equal
    samples.

    Args:
      samples_p: `[n, ...]` floating point.
      samples_q: `[m, ...]`, with the same features.
      bandwidth: σ above 0, in the samples' unit. Default 1, for standardised features.
      axis_name: name or names of the mapped axes over whose shards both samples are spread.

    Returns:
      A scalar in the type of `samples_p`; it grows as the squared distance of samples that are far
      apart, and has a gradient there.

    Raises:
      ValueError: no sample, features that do not match, or a `bandwidth` that is not positive.
      TypeError: samples that are not floating point.

    Use it to bring two distributions together; `conditional_cauchy_schwarz_divergence` compares
    answers to the same questions, and `sinkhorn_divergence` the samples themselves, unsmoothed.

    Cost: kernels of all pairs, O((n + m)²) time and memory.

    Example:
      >>> samples = jnp.array([[0.0], [1.0]])
      >>> print(f"{jax.jit(cauchy_schwarz_divergence)(samples, samples + 3.0):.3f}")
      6.026

    Reference: Yu, Yu, Løkse, Jenssen, Principe, "Cauchy-Schwarz Divergence Information Bottleneck
    for Regression", 2024, arXiv:2404.17951.
    """
    check_interval(0, jnp.inf, closed="right", bandwidth=bandwidth)
    p, q = _flat(samples_p=samples_p), _flat(samples_q=samples_q)
    if p.shape[1] != q.shape[1]:
        raise ValueError(
            f"samples_q must have the {p.shape[1]} features of samples_p, got {q.shape[1]}"
        )

    def log_sum(a: Array, b: Array) -> Array:
        return masked_logsumexp(
            _exponents(a, b, bandwidth, axis_name), axis=None, axis_name=axis_name
        )

    divergence = log_sum(p, p) + log_sum(q, q) - 2 * log_sum(p, q)
    return divergence.astype(jnp.result_type(samples_p))


def conditional_cauchy_schwarz_divergence(
    inputs: ArrayLike,
    targets: ArrayLike,
    predictions: ArrayLike,
    *,
    bandwidth: float = 1.0,
    normalization: Literal["squared_sum", "sum_of_squares"] = "squared_sum",
    axis_name: AxisName | None = None,
) -> Array:
    r"""How far predictions are from the targets' distribution given the inputs (a loss of the set).

        D = log F(k(y, y)) + log F(k(ŷ, ŷ)) - 2 log F(k(ŷ, y)),
        F(L) = Σ_j Σ_i K_ji L_ji / (Σ_i K_ji)²,   K = k(x, x)

    Targets of similar inputs are compared with predictions of similar inputs, so that it needs no
    assumption about the noise, as squared errors do. It is 0 where predictions are the targets, and
    may be a little below for small batches.

    Args:
      inputs: x `[n, ...]` floating point.
      targets: y `[n, ...]`.
      predictions: ŷ, of the shape of `targets`.
      bandwidth: σ above 0 of all kernels, for standardised data. Default 1.
      normalization: "squared_sum", the formula (the default); or "sum_of_squares", Σ_i K_ji² in
        place of the denominator, as the authors' code has it.
      axis_name: name or names of the mapped axes over whose shards the batch is spread.

    Returns:
      A scalar in the type of `predictions`.

    Raises:
      ValueError: fewer than two examples, shapes that do not match, a `bandwidth` that is not
        positive, or an unknown `normalization`.
      TypeError: arrays that are not floating point.

    Use it as the loss of a regression, with batches of a hundred or so;
    `cauchy_schwarz_information_bottleneck_loss` adds the bottleneck.

    Cost: four kernels of all pairs, O(n²) time and memory.

    Example:
      >>> x, y = jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 0.0, 2.0])
      >>> print(f"{jax.jit(conditional_cauchy_schwarz_divergence)(x, y, y + 1.0):.3f}")
      0.733

    Reference: Yu, Yu, Løkse, Jenssen, Principe, "Cauchy-Schwarz Divergence Information Bottleneck
    for Regression", 2024, arXiv:2404.17951.
    """
    check_interval(0, jnp.inf, closed="right", bandwidth=bandwidth)
    if normalization not in ("squared_sum", "sum_of_squares"):
        raise ValueError(
            f"normalization must be 'squared_sum' or 'sum_of_squares', got {normalization!r}"
        )
    x, y, guess = _same_length(axis_name, inputs=inputs, targets=targets, predictions=predictions)
    if jnp.shape(predictions) != jnp.shape(targets):
        raise ValueError(
            f"predictions must have shape {jnp.shape(targets)}, got {jnp.shape(predictions)}"
        )
    log_k = _exponents(x, x, bandwidth, axis_name)
    if normalization == "squared_sum":
        log_norm = 2 * jax.nn.logsumexp(log_k, axis=1, keepdims=True)
    else:
        log_norm = jax.nn.logsumexp(2 * log_k, axis=1, keepdims=True)

    def log_f(a: Array, b: Array) -> Array:
        log_l = _exponents(a, b, bandwidth, axis_name)
        return masked_logsumexp(log_k + log_l - log_norm, axis=None, axis_name=axis_name)

    divergence = log_f(y, y) + log_f(guess, guess) - 2 * log_f(guess, y)
    return divergence.astype(jnp.result_type(predictions))


def cauchy_schwarz_mutual_information(
    x: ArrayLike,
    t: ArrayLike,
    *,
    bandwidth: float | None = None,
    normalized: bool = False,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How much two variables tell of each other, from pairs of samples (a loss of the set).

        I = log mean_ij K_ij L_ij + log (mean K · mean L) - 2 log mean_i (K_i L_i),
        K = k(x, x),   L = k(t, t),   K_i and L_i their rows' means

    the Cauchy-Schwarz divergence between the joint density and the product of the densities. At
    least 0, symmetric, 0 where one of them is constant, whatever their law and dimensions.

    Args:
      x: `[n, ...]` floating point.
      t: `[n, ...]`, the sample of each x.
      bandwidth: σ above 0 of both kernels. Default: of each its own, 10 times the median squared
        distance of its samples (their mean where that is 0), and at least 0.1; without gradient.
      normalized: whether to give I / √(I(x; x) I(t; t)) in place of I: 1 where both are the same.
      axis_name: name or names of the mapped axes over whose shards the samples are spread.

    Returns:
      A scalar in the type of `t`, exact to rounding for the small values that wide kernels give.
      Normalised, 0 where one of the two is constant.

    Raises:
      ValueError: fewer than two samples, different numbers of them, or a `bandwidth` that is not
        positive.
      TypeError: samples that are not floating point.

    Use it as the price of a representation, or to see what a layer keeps of its input, without a
    variational bound and without noise in the encoder; `info_nce_bound` needs a critic.

    Cost: two kernels of all pairs, O(n²) time and memory; without `bandwidth` a median of all
    distances, on each shard.

    Example:
      >>> x = jnp.array([-1.0, 0.0, 1.0, 2.0])
      >>> information = jax.jit(cauchy_schwarz_mutual_information, static_argnames="normalized")
      >>> print(f"{information(x, 2 * x, bandwidth=1.0, normalized=True):.3f}")
      0.955

    Reference: Yu, Yu, Løkse, Jenssen, Principe, "Cauchy-Schwarz Divergence Information Bottleneck
    for Regression", 2024, arXiv:2404.17951.
    """
    if bandwidth is not None:
        check_interval(0, jnp.inf, closed="right", bandwidth=bandwidth)
    samples = _same_length(axis_name, x=x, t=t)

    def log_kernel(sample: Array) -> Array:
        width = _wide_bandwidth(sample, axis_name) if bandwidth is None else bandwidth
        return _exponents(sample, sample, width, axis_name)

    log_k, log_l = map(log_kernel, samples)
    information = _information(log_k, log_l, axis_name)
    if normalized:
        own = [_information(kernel, kernel, axis_name) for kernel in (log_k, log_l)]
        varies = (own[0] > 0) & (own[1] > 0)
        # of each root by itself, as the product of small numbers may vanish
        roots = [jnp.sqrt(jnp.where(varies, value, 1.0)) for value in own]
        information = jnp.where(varies, information / roots[0] / roots[1], 0.0)
    return information.astype(jnp.result_type(t))


def cauchy_schwarz_information_bottleneck_loss(
    inputs: ArrayLike,
    representation: ArrayLike,
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    beta: float = 0.01,
    bandwidth: float = 1.0,
    normalization: Literal["squared_sum", "sum_of_squares"] = "squared_sum",
    axis_name: AxisName | None = None,
) -> Array:
    r"""Regression that keeps of its inputs no more than the answer needs (a loss of the set).

        L = D(targets, predictions | inputs) + β I(inputs; representation),   β = beta

    with D the `conditional_cauchy_schwarz_divergence` and I the normalised
    `cauchy_schwarz_mutual_information`.

    Args:
      inputs: x `[n, ...]` floating point, standardised.
      representation: t `[n, ...]`, what the network makes of x and predicts from.
      predictions: ŷ `[n, ...]`.
      targets: y, of the shape of `predictions`, standardised.
      beta: β at least 0: the price of information. Default 0.01; the paper tries 1e-4 to 1.
      bandwidth: σ above 0 of all kernels. Default 1.
      normalization: as for the divergence.
      axis_name: name or names of the mapped axes over whose shards the batch is spread.

    Returns:
      A scalar in the type of `predictions`.

    Raises:
      ValueError: fewer than two examples, shapes that do not match, or a hyperparameter out of its
        range.
      TypeError: arrays that are not floating point.

    Use it in place of the squared error and a variational bottleneck, for regression that holds up
    under perturbed inputs; the paper has batches of 128 and Adam at 1e-4. Kernels of features of
    many dimensions need a larger bandwidth, or none of the pairs is near.

    Cost: six kernels of all pairs of the batch, O(n²) time and memory.

    Example:
      >>> x, y = jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 0.0, 2.0])
      >>> bottleneck = jax.jit(cauchy_schwarz_information_bottleneck_loss)
      >>> loss = bottleneck(x, 2 * x, y + 1.0, y, beta=0.1)
      >>> print(f"{loss:.3f}")
      0.830

    Reference: Yu, Yu, Løkse, Jenssen, Principe, "Cauchy-Schwarz Divergence Information Bottleneck
    for Regression", 2024, arXiv:2404.17951.
    """
    check_interval(0, jnp.inf, beta=beta)
    result, dtype = jnp.result_type(predictions), compute_dtype(predictions)
    check_floating(representation=representation, predictions=predictions)
    divergence = conditional_cauchy_schwarz_divergence(
        inputs,
        targets,
        jnp.asarray(predictions, dtype),
        bandwidth=bandwidth,
        normalization=normalization,
        axis_name=axis_name,
    )
    information = cauchy_schwarz_mutual_information(
        inputs,
        jnp.asarray(representation, dtype),
        bandwidth=bandwidth,
        normalized=True,
        axis_name=axis_name,
    )
    return (divergence + beta * information).astype(result)


def _flat(**samples: ArrayLike) -> Array:
    """Samples, by the name of the argument, as `[n, features]` in the type to compute in."""
    check_floating(**samples)
    ((name, values),) = samples.items()
    x = jnp.asarray(values)
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"{name} must have shape [n, ...] and hold entries, got {x.shape}")
    return x.reshape(len(x), -1).astype(compute_dtype(x))


def _same_length(axis_name: AxisName | None, **samples: ArrayLike) -> list[Array]:
    """Samples of the same examples, at least two, as `[n, features]`."""
    flat = [_flat(**{name: values}) for name, values in samples.items()]
    for name, x in zip(samples, flat):
        if len(x) != len(flat[0]):
            raise ValueError(
                f"{name} must have {len(flat[0])} samples as {next(iter(samples))} has, "
                f"got {len(x)}"
            )
    if axis_name is None and len(flat[0]) < 2:
        raise ValueError(f"{next(iter(samples))} must have at least two samples, got one")
    return flat


def _exponents(a: Array, b: Array, bandwidth: ArrayLike, axis_name: AxisName | None) -> Array:
    """log k between this shard's samples and those of all."""
    every = all_shards(b, axis_name)
    # from their centre, as squares of far coordinates would drown the differences
    centre = jax.lax.stop_gradient(jnp.mean(every, axis=0))
    return squared_distances(a - centre, every - centre) / (-2 * jnp.square(bandwidth))


def _wide_bandwidth(sample: Array, axis_name: AxisName | None) -> Array:
    """Ten times the median squared distance of two samples of all shards."""
    every = jax.lax.stop_gradient(all_shards(sample, axis_name))
    pairs = np.triu_indices(len(every), 1)
    centred = every - jnp.mean(every, axis=0)
    distances = squared_distances(centred, centred)[pairs]
    middle = jnp.median(distances)
    middle = jnp.where(middle > 0, middle, jnp.mean(distances))
    return 10 * jnp.maximum(middle, 1e-2)


def _information(log_k: Array, log_l: Array, axis_name: AxisName | None) -> Array:
    """I of two kernels, of which this shard has some rows.

    With P = mean K mean L, c P the covariance of their rows' means, and h P the mean product of the
    kernels without their rows' and columns' means,

        I = log (1 + 2c + h) - 2 log (1 + c) = log (1 + (h - c²) / (1 + c)²)

    where no two large logarithms cancel, so that it stays exact where kernels are nearly 1.
    """
    n = log_k.shape[1]
    product: Array | float = 1.0
    row_means, centred = [], []
    for exponents in (log_k, log_l):
        product *= sum_over_shards(jnp.sum(jnp.exp(exponents)), axis_name) / n**2
        minus_1 = jnp.expm1(exponents)
        rows = jnp.mean(minus_1, axis=1)
        mean = sum_over_shards(jnp.sum(rows), axis_name) / n
        row_means.append(rows - mean)
        centred.append(minus_1 - rows[:, None] - all_shards(rows, axis_name) + mean)
    c = sum_over_shards(jnp.sum(row_means[0] * row_means[1]), axis_name) / n / product
    h = sum_over_shards(jnp.sum(centred[0] * centred[1]), axis_name) / n**2 / product
    return jnp.log1p((h - jnp.square(c)) / jnp.square(1 + c))
