"""Temperatures for the logits of a finished classifier: one for all, or one for each example."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_floating, check_interval, check_shape
from jaxref.core.labels import label_distribution, masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.losses.calibration import correctness_aware_loss


def temperature_scale(logits: ArrayLike, temperature: ArrayLike, *, axis: int = -1) -> Array:
    r"""Logits over a temperature, which changes confidence and no prediction.

        z / T

    Args:
      logits: z `[..., classes]` floating point, the classes at `axis`.
      temperature: T, positive: a number for all examples, or `[...]` for each of them. Above 1 it
        lowers confidence, below it raises it.
      axis: the class axis.

    Returns:
      Logits of the shape and type of `logits`.

    Raises:
      ValueError: a `temperature` that is not positive, of a shape that is neither, or an `axis` out
        of range.
      TypeError: logits that are not floating point.

    Use it with `fit_temperature` or `adaptive_temperature`.

    Cost: one division a logit.

    Example:
      >>> print(temperature_scale(jnp.array([[2.0, -1.0]]), 2.0))
      [[ 1.  -0.5]]

    Reference: Chidambaram, Ge, "On the Limitations of Temperature Scaling for Distributions with
    Overlaps", 2023, arXiv:2306.00740, on Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern
    Neural Networks", 2017, arXiv:1706.04599.
    """
    check_floating(logits=logits)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    z, t = jnp.asarray(logits), jnp.asarray(temperature)
    (axis,) = canonical_axes(axis, z.ndim)
    if t.ndim:
        check_shape(z.shape[:axis] + z.shape[axis + 1 :], temperature=t)
        t = jnp.expand_dims(t, axis)
    return (z.astype(compute_dtype(z)) / t).astype(z.dtype)


def fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    minimum: float = 1e-3,
    maximum: float = 1e3,
) -> Array:
    r"""The temperature of least cross-entropy, one for all examples.

        T* = argmin_T mean_i CE(softmax(z_i / T), y_i)

    Cross-entropy is convex in β = 1/T, with the slope mean(Σ_k softmax(β z)_k z_k - z_y), so that
    halving an interval of log β finds T* surely, without a learning rate.

    Args:
      logits: z `[..., classes]` floating point, of data that the classifier was not trained on.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is not an
        admitted class spoils the result, as does NaN.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit, `[..., 1]` for whole examples.
        Default: all.
      minimum: the lowest temperature, above 0, for labels that are always the top class.
      maximum: the highest, for logits that are worse than none.

    Returns:
      T*, a scalar in at least float32; 1 where the logits are all equal or there are no examples.
      It carries no gradient.

    Raises:
      ValueError: shapes that do not match, or a `minimum` that is not in (0, `maximum`).
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it first: it is one number, and keeps accuracy. Where classes overlap on a part of the data
    it is too high elsewhere and too low there (`overlap_interpolator_calibration`).

    Cost: 50 softmaxes of all logits, of the halvings; no gradient, and no pass of the model.

    Example:
      >>> logits = jnp.array([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
      >>> print(fit_temperature(logits, jnp.array([0, 0, 0, 1])).round(3))  # 3 / log 3
      2.731

    Reference: Chidambaram, Ge, "On the Limitations of Temperature Scaling for Distributions with
    Overlaps", 2023, arXiv:2306.00740, on Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern
    Neural Networks", 2017, arXiv:1706.04599.
    """
    check_interval(0, jnp.inf, closed="right", maximum=maximum)
    check_interval(0, maximum, closed="right", minimum=minimum)
    q = label_distribution(labels, logits, axis=axis, where=where)
    z = jnp.asarray(logits).astype(q.dtype)
    lowest = jnp.finfo(z.dtype).min
    top = jnp.max(z if where is None else jnp.where(where, z, lowest), axis=axis, keepdims=True)
    z = z - top  # slopes are differences of logits: nothing is lost to their common size
    if where is not None:
        z = jnp.where(where, z, 0.0)
        where_example = jnp.broadcast_to(where, z.shape).any(axis=axis)
    else:
        where_example = None
    observed = jnp.sum(q * z, axis=axis)

    def slope(log_beta: Array) -> Array:
        log_p = masked_log_softmax(jnp.exp(log_beta) * z, axis=axis, where=where)
        return masked_mean(jnp.sum(jnp.exp(log_p) * z, axis=axis) - observed, where=where_example)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        rising = slope(middle) > 0
        return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    ends = (-jnp.log(jnp.asarray(maximum, z.dtype)), -jnp.log(jnp.asarray(minimum, z.dtype)))
    low, high = jax.lax.fori_loop(0, 50, halve, ends)
    temperature = jnp.where(jnp.any(z != 0), jnp.exp(-(low + high) / 2), 1.0)
    return jax.lax.stop_gradient(jnp.where(jnp.isnan(observed).any(), jnp.nan, temperature))


def transformed_topk_features(
    logits: ArrayLike, transformed_logits: ArrayLike, *, k: int = 4
) -> Array:
    r"""What a classifier makes of changed copies of an input, at the classes it first thought of.

        [p_I, p¹_I, ..., p^t_I],   I the k classes of highest p, in order

    with p the softmax of the example and p¹ ... p^t those of its transformed copies (rotated, grey,
    colour-jittered). A prediction that is right tends to survive the change.

    Args:
      logits: `[..., classes]` floating point.
      transformed_logits: `[t, ..., classes]` floating point, in the order of the transformations,
        the same for fitting and use.
      k: classes to look at, from 1 to all. Default 4, the paper's.

    Returns:
      `[..., (t + 1) k]` probabilities in the type of `logits`. Of classes with equal logits the
      first come first.

    Raises:
      ValueError: shapes that do not match, or `k` out of range.
      TypeError: logits that are not floating point.

    Use it as the features of `adaptive_temperature`.

    Cost: t + 1 softmaxes and a selection of k; before, t + 1 forward passes of the classifier an
    example.

    Example:
      >>> logits, rotated = jnp.log(jnp.array([[0.7, 0.3], [0.4, 0.6]]))
      >>> print(transformed_topk_features(logits, rotated[None], k=2))
      [0.7 0.3 0.4 0.6]

    Reference: Liu, Wang, Zou, Zou, Zheng, "Optimizing Calibration by Gaining Aware of Prediction
    Correctness", 2024, arXiv:2404.13016.
    """
    check_floating(logits=logits, transformed_logits=transformed_logits)
    z, copies = jnp.asarray(logits), jnp.asarray(transformed_logits)
    if z.ndim < 1 or copies.ndim < 1:
        raise ValueError(f"logits must have shape [..., classes], got {z.shape}")
    check_shape((copies.shape[0], *z.shape), transformed_logits=copies)
    check_interval(1, z.shape[-1], k=k)
    top = jax.lax.top_k(z, k)[1]
    p = jax.nn.softmax(jnp.stack([z, *copies], axis=-2).astype(compute_dtype(z)), axis=-1)
    chosen = jnp.take_along_axis(p, top[..., None, :], axis=-1)
    return chosen.reshape(*z.shape[:-1], -1).astype(z.dtype)


class AdaptiveTemperature(NamedTuple):
    """The parameters of `adaptive_temperature`, F features and H hidden units.

    Attributes:
      hidden_kernel: `[F, H]`.
      hidden_bias: `[H]`.
      kernel: `[H]`.
      bias: scalar.

    Reference: Liu, Wang, Zou, Zou, Zheng, "Optimizing Calibration by Gaining Aware of Prediction
    Correctness", 2024, arXiv:2404.13016.
    """

    hidden_kernel: Array
    hidden_bias: Array
    kernel: Array
    bias: Array


def adaptive_temperature_init(
    key: Array, num_features: int, *, hidden: int = 5
) -> AdaptiveTemperature:
    """Parameters of `adaptive_temperature` before the first step, near T = 1.

    Weights and the hidden bias are drawn evenly from ±1/√(inputs of their layer). The last bias is
    1: at 0, half of all examples would start at the lowest temperature, where no gradient gets
    through.

    Args:
      key: a random key.
      num_features: F at least 1.
      hidden: H at least 1. Default 5, as in the released code.

    Returns:
      An `AdaptiveTemperature` in float32.

    Raises:
      ValueError: a size below 1.

    Use it to train the parameters by a loop of one's own; `fit_adaptive_temperature` calls it
    itself.

    Cost: (F + 2) H + 1 parameters.

    Example:
      >>> params = adaptive_temperature_init(jax.random.key(0), 16)
      >>> params.hidden_kernel.shape, params.kernel.shape
      ((16, 5), (5,))

    Reference: Liu, Wang, Zou, Zou, Zheng, "Optimizing Calibration by Gaining Aware of Prediction
    Correctness", 2024, arXiv:2404.13016.
    """
    check_interval(1, jnp.inf, num_features=num_features, hidden=hidden)
    kernel_key, bias_key, last_key = jax.random.split(key, 3)
    first, last = num_features**-0.5, hidden**-0.5
    return AdaptiveTemperature(
        jax.random.uniform(kernel_key, (num_features, hidden), minval=-first, maxval=first),
        jax.random.uniform(bias_key, (hidden,), minval=-first, maxval=first),
        jax.random.uniform(last_key, (hidden,), minval=-last, maxval=last),
        jnp.ones(()),
    )


def adaptive_temperature(
    params: AdaptiveTemperature,
    features: ArrayLike,
    *,
    minimum: float = 0.1,
    maximum: float = 10.0,
) -> Array:
    r"""A temperature for each example, from features that tell of its correctness.

        T = clip(v · relu(W x + b) + c, minimum, maximum)

    Args:
      params: W, b, v, c, from `fit_adaptive_temperature`.
      features: x `[..., F]` floating point, from `transformed_topk_features`.
      minimum: lowest temperature, above 0. Default 0.1, the paper's.
      maximum: highest. Default 10, the paper's. Beyond the two the gradient is 0.

    Returns:
      `[...]` temperatures in at least float32, for `temperature_scale`.

    Raises:
      ValueError: features of another number than the parameters', or a `minimum` that is not in
        (0, `maximum`].
      TypeError: features that are not floating point.

    Use it where some examples deserve more confidence than others of the same logits.

    Cost: (F + 1) H multiplications an example; its features take t + 1 forward passes of the
    classifier.

    Example:
      >>> v, c = jnp.array([1.0, -1.0]), jnp.ones(())
      >>> params = AdaptiveTemperature(jnp.eye(2), jnp.zeros(2), v, c)
      >>> print(adaptive_temperature(params, jnp.array([[0.5, 0.2], [0.0, 3.0]])))
      [1.3 0.1]

    Reference: Liu, Wang, Zou, Zou, Zheng, "Optimizing Calibration by Gaining Aware of Prediction
    Correctness", 2024, arXiv:2404.13016.
    """
    check_floating(features=features)
    check_interval(0, jnp.inf, closed="right", maximum=maximum)
    check_interval(0, maximum, closed="right", minimum=minimum)
    x = jnp.asarray(features).astype(compute_dtype(features))
    if x.shape[-1:] != params.hidden_kernel.shape[:1]:
        raise ValueError(
            f"features must have shape [..., {params.hidden_kernel.shape[0]}], got {x.shape}"
        )
    hidden = jax.nn.relu(x @ params.hidden_kernel + params.hidden_bias)
    return jnp.clip(hidden @ params.kernel + params.bias, minimum, maximum)


def fit_adaptive_temperature(
    logits: ArrayLike,
    transformed_logits: ArrayLike,
    labels: ArrayLike,
    *,
    key: Array,
    num_steps: int,
    batch_size: int = 1000,
    learning_rate: float = 1e-4,
    hidden: int = 5,
    k: int = 4,
    minimum: float = 0.1,
    maximum: float = 10.0,
) -> AdaptiveTemperature:
    r"""Fits a temperature for each example to the correctness of a finished classifier.

    `num_steps` steps of Adam on the mean of the balanced `correctness_aware_loss` of the scaled
    logits, over batches drawn at random.

    Args:
      logits: `[examples, classes]` floating point, of validation data from the distribution of the
        training data.
      transformed_logits: `[t, examples, classes]` floating point, those of transformed copies.
      labels: `[examples]` integer ids.
      key: a random key, for the parameters and the batches.
      num_steps: steps of Adam, at least 1; the paper passes ten times over the data.
      batch_size: examples in a step, at least 1; all where there are fewer. Default 1000.
      learning_rate: of Adam, above 0. Default 1e-4, the paper's.
      hidden: hidden units. Default 5.
      k: classes that `transformed_topk_features` looks at. Default 4.
      minimum: lowest temperature. Default 0.1.
      maximum: highest. Default 10.

    Returns:
      An `AdaptiveTemperature`.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use it after training, with the transformations that will be applied to each test example by
    itself; `fit_temperature` needs none and cannot tell examples apart.

    Cost: `num_steps` gradients of a small network, each with a shuffle of all examples; t + 1
    passes of the classifier before.

    Example:
      >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0]])  # right where its copy agrees
      >>> copies = jnp.array([[[2.0, 0.0], [0.0, 2.0]]])
      >>> params = fit_adaptive_temperature(logits, copies, jnp.array([0, 1]), k=2,
      ...     key=jax.random.key(0), num_steps=200, learning_rate=0.1)
      >>> features = transformed_topk_features(logits, copies, k=2)
      >>> right, wrong = adaptive_temperature(params, features)
      >>> bool(right < 0.5), bool(wrong > 5)
      (True, True)

    Reference: Liu, Wang, Zou, Zou, Zheng, "Optimizing Calibration by Gaining Aware of Prediction
    Correctness", 2024, arXiv:2404.13016.
    """
    check_interval(1, jnp.inf, num_steps=num_steps, batch_size=batch_size)
    check_interval(0, jnp.inf, closed="right", learning_rate=learning_rate)
    z, y = jnp.asarray(logits), jnp.asarray(labels)
    features = transformed_topk_features(z, transformed_logits, k=k)
    init_key, batch_key = jax.random.split(key)
    params = adaptive_temperature_init(init_key, features.shape[-1], hidden=hidden)
    optimizer = optax.adam(learning_rate)

    def mean_loss(params: AdaptiveTemperature, batch: Array) -> Array:
        t = adaptive_temperature(params, features[batch], minimum=minimum, maximum=maximum)
        return jnp.mean(correctness_aware_loss(temperature_scale(z[batch], t), y[batch]))

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        params, state = carry
        batch = jnp.arange(len(z))
        if batch_size < len(z):
            batch = jax.random.choice(key, len(z), (batch_size,), replace=False)
        updates, state = optimizer.update(jax.grad(mean_loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batch_key, num_steps)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params


class OverlapCalibration(NamedTuple):
    """What the best temperature makes of an interpolating classifier on overlapping classes.

    Attributes:
      temperature: `[...]`, that of least cross-entropy.
      confidence: `[...]`, the confidence that it gives to every prediction: the accuracy.
      kl: `[...]`, the expected divergence from the true probabilities that is left, in nats.

    Reference: Chidambaram, Ge, "On the Limitations of Temperature Scaling for Distributions with
    Overlaps", 2023, arXiv:2306.00740.
    """

    temperature: Array
    confidence: Array
    kl: Array


def overlap_interpolator_calibration(
    overlap: ArrayLike,
    logit_gap: ArrayLike = 1.0,
    *,
    num_classes: int = 2,
    num_overlapping: int = 2,
) -> OverlapCalibration:
    r"""How far one temperature leaves a classifier that interpolates classes which overlap.

    On a share v of the data m of K classes have equal probability, elsewhere one is certain. The
    classifier fits its training data: everywhere one logit is g above the others, and right with
    the probability a,

        a = 1 - v + v/m,   T* = g / log(a (K - 1) / (1 - a))
        KL = v [ -log m - (1/m) log a - (1 - 1/m) log((1 - a) / (K - 1)) ] - (1 - v) log a

    The confidence a is too low on the certain part and too high on the other; a temperature for
    each part would leave 0. For m = K = 2, KL grows from 0 at v = 0 to 0.22, and falls to 0 at
    v = 1; in K it grows without end, like v (1 - 1/m) log K.

    Args:
      overlap: v `[...]` in [0, 1].
      logit_gap: g `[...]` above 0. Default 1; KL does not depend on it.
      num_classes: K at least 2.
      num_overlapping: m from 2 to K.

    Returns:
      An `OverlapCalibration` in float32 or wider. T* is 0 without overlap, and infinite where a
      falls to 1/K.

    Raises:
      ValueError: an argument out of its range.

    Use it to see whether a temperature can be enough for the overlap or label noise that the data
    have; `mixup_loss` trains for calibration in the overlap itself. It is an exact instance of the
    paper's argument, not one of its bounds.

    Cost: a closed formula.

    Example:
      >>> print(overlap_interpolator_calibration(0.3).kl.round(4))
      0.2148

    Reference: Chidambaram, Ge, "On the Limitations of Temperature Scaling for Distributions with
    Overlaps", 2023, arXiv:2306.00740.
    """
    check_interval(0, 1, overlap=overlap)
    check_interval(0, jnp.inf, closed="right", logit_gap=logit_gap)
    check_interval(2, jnp.inf, num_classes=num_classes)
    check_interval(2, num_classes, num_overlapping=num_overlapping)
    v = jnp.asarray(overlap, compute_dtype(overlap))
    g = jnp.asarray(logit_gap, compute_dtype(logit_gap))
    missed = v * (1 - 1 / num_overlapping)  # 1 - a, the weight of all that log((1 - a)/(K - 1)) has
    log_a = jnp.log1p(-missed)
    log_other = jnp.log(jnp.where(missed > 0, missed, 1.0) / (num_classes - 1))
    temperature = jnp.where(missed > 0, g / (log_a - log_other), 0.0)
    kl = -v * jnp.log(num_overlapping) - (1 - missed) * log_a - missed * log_other
    return OverlapCalibration(temperature, 1 - missed, kl)
