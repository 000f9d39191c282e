"""Quantization without data: images from the statistics that batch normalization keeps.

Everything is channels last. A network comes as `activations_fn(images)`, a function that gives the
inputs of its normalization layers, in evaluation, so that they use their running statistics; these
come beside it, one mean and one variance `[channels]` for each of the layers.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.gptq import check_finite
from jaxref.quantization.reconstruction import check_spec, check_steps
from jaxref.quantization.tensor import QuantSpec
from jaxref.quantization.uniform import fake_quantize

REDUCTIONS = ("per_image", "per_batch")

_LEAST_RATE = 1e-4  # a plateau does not bring a learning rate below it

ActivationsFn = Callable[[Array], Sequence[Array]]


def batch_norm_statistics_loss(
    activations: Sequence[ArrayLike],
    running_means: Sequence[ArrayLike],
    running_variances: Sequence[ArrayLike],
    *,
    images: ArrayLike | None = None,
    reduction: str = "per_image",
    ddof: int = 0,
    epsilon: float = 1e-6,
) -> Array:
    r"""How far the statistics of activations are from those a network was trained on (of a batch).

    With mean m and deviation d = √(v + ε) of the activations at layer l, and the running μ and v_l,

        L = Σ_l avg (m_l - μ_l)² + (d_l - √(v_l + ε))²

    Per image, m and v are over the positions of each image and avg is the sum over channels and the
    mean over images. Per batch, they are over images and positions, and avg is the mean over
    channels. With `images`, these count as one more layer, per image, of mean 0 and variance 1.

    Args:
      activations: the inputs of the normalization layers, floating point `[batch, ..., channels]`.
      running_means: μ, for each of them `[channels]`.
      running_variances: v likewise, at least 0.
      images: `[batch, ..., channels]`, what the activations come from. Default: None.
      reduction: "per_image" (default), ZeroQ's, or "per_batch", that of GENIE.
      ddof: 0 or 1: the n - ddof by which the variances of n entries divide their sum. Default 0, as
        `jaxref.norms.batch_norm` and Flax keep running variances; 1 for those of PyTorch.
      epsilon: ε, positive, which keeps the gradient of the deviation finite. Default 10⁻⁶.

    Returns:
      L, a scalar in at least float32: 0 only if all of the statistics match.

    Raises:
      ValueError: no layers, different numbers of them, shapes that do not fit, no entries, an
        unknown reduction, or a number out of range.
      TypeError: arrays not floating point.

    `distilled_data` and `genie_distill` minimize it; use it alone to see how much like the training
    data a batch is, for a network that has no labels to tell.

    Cost: two passes over all activations, which take a forward pass of the network.

    Example:
      >>> x = jnp.array([[[0.0], [2.0]], [[1.0], [5.0]]])  # means 1 and 3, deviations 1 and 2
      >>> print(batch_norm_statistics_loss([x], [jnp.ones(1)], [jnp.ones(1)]).round(4))
      2.5

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020, arXiv:2001.00281; per batch by Jeon, Lee, Kim, "Genie: Show Me the Data for
    Quantization", 2022, arXiv:2212.04780.
    """
    means, variances = checked_statistics(running_means, running_variances)
    _check_reduction(reduction)
    check_ddof(ddof)
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    return statistics_loss(
        activations, means, variances, images, reduction=reduction, ddof=ddof, epsilon=epsilon
    )


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def check_ddof(ddof: int) -> None:
    """Raises ValueError unless `ddof` is 0 or 1."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")


def checked_statistics(
    running_means: Sequence[ArrayLike], running_variances: Sequence[ArrayLike]
) -> tuple[list[Array], list[Array]]:
    """The two as lists of arrays `[channels]` that fit together."""
    if not len(running_means):
        raise ValueError("running_means must have a normalization layer at least, got none")
    if len(running_means) != len(running_variances):
        raise ValueError(
            f"running_variances must be of {len(running_means)} layers as running_means is, "
            f"got {len(running_variances)}"
        )
    for i, (mean, variance) in enumerate(zip(running_means, running_variances)):
        of_mean: dict[str, Any] = {f"running_means[{i}]": mean}
        of_variance: dict[str, Any] = {f"running_variances[{i}]": variance}
        check_floating(**of_mean, **of_variance)
        if jnp.ndim(mean) != 1:
            shape = jnp.shape(mean)
            raise ValueError(f"running_means[{i}] must have shape [channels], got {shape}")
        check_shape(jnp.shape(mean), **of_variance)
        check_interval(-jnp.inf, jnp.inf, **of_mean)
        check_interval(0, jnp.inf, **of_variance)
    return [jnp.asarray(mean) for mean in running_means], [*map(jnp.asarray, running_variances)]


def statistics_loss(
    activations: Sequence[ArrayLike],
    means: list[Array],
    variances: list[Array],
    images: ArrayLike | None,
    *,
    reduction: str,
    ddof: int,
    epsilon: float = 1e-6,
) -> Array:
    """`batch_norm_statistics_loss` of statistics that are checked."""
    if len(activations) != len(means):
        raise ValueError(
            f"activations must be of {len(means)} normalization layers, got {len(activations)}"
        )
    names = [f"activations[{i}]" for i in range(len(means))]
    layers = list(zip(names, activations, means, variances, itertools.repeat(reduction)))
    if images is not None:
        shape = jnp.shape(images)[-1:]
        layers.append(("images", images, jnp.zeros(shape), jnp.ones(shape), "per_image"))
    loss: Any = 0.0
    for name, x, mean, variance, how in layers:
        check_floating(**{name: x})
        least = 3 if how == "per_image" else 2
        if jnp.ndim(x) < least or not jnp.size(x):
            wanted = "batch, positions, ..., channels" if least == 3 else "batch, ..., channels"
            raise ValueError(f"{name} must have shape [{wanted}] and entries, got {jnp.shape(x)}")
        check_shape(jnp.shape(x)[-1:], **{f"the running mean of {name}": mean})
        x = jnp.asarray(x, compute_dtype(x, mean))
        axes = tuple(range(1 if how == "per_image" else 0, x.ndim - 1))
        count = math.prod(x.shape[axis] for axis in axes)
        spread = jnp.var(x, axis=axes) * (count / max(count - ddof, 1))
        off = jnp.square(jnp.mean(x, axis=axes) - mean)
        off += jnp.square(jnp.sqrt(spread + epsilon) - jnp.sqrt(variance + epsilon))
        loss += jnp.mean(jnp.sum(off, axis=-1)) if how == "per_image" else jnp.mean(off)
    return loss


class DistilledData(NamedTuple):
    """Images made from a network.

    Attributes:
      images: `[batch, height, width, channels]`, or whatever shape was asked for.
      losses: `[steps + 1]`, the statistics loss of every iterate, the start being the first.

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020, arXiv:2001.00281.
    """

    images: Array
    losses: Array


def distilled_data(
    activations_fn: ActivationsFn,
    running_means: Sequence[ArrayLike],
    running_variances: Sequence[ArrayLike],
    shape: tuple[int, ...],
    *,
    key: Array,
    steps: int = 500,
    learning_rate: float = 0.5,
    patience: int = 100,
    reduction: str = "per_image",
    ddof: int = 0,
) -> DistilledData:
    r"""Images whose activations have the statistics of the training data (ZeroQ).

        x ~ N(0, 1),   x ← x - η Adam(∂L/∂x),   L the `batch_norm_statistics_loss` with images x

    η is divided by 10, down to 10⁻⁴ at the least, each time that L has not fallen by a ten
    thousandth of its least value for more than `patience` steps.

    Args:
      activations_fn: `activations_fn(images)`, the inputs of the normalization layers in
        evaluation. It is compiled once for all keys, with the weights that it closes over: pass the
        same function again for more images, and a new one after the network has changed.
      running_means: of these layers, `[channels]` each.
      running_variances: likewise.
      shape: of the images, `[batch, ..., channels]`, as the network takes them.
      key: for the noise at the start.
      steps: at least 0. Default 500.
      learning_rate: η above 0. Default 0.5.
      patience: at least 1. Default 100.
      reduction, ddof: of `batch_norm_statistics_loss`. Default "per_image" and 0.

    Returns:
      `DistilledData`; its images are the iterate with the least loss, where the authors take the
      last one.

    Raises:
      ValueError: no layers, statistics or activations that do not fit, a shape without positions or
        entries, or a number out of range.
      TypeError: statistics or activations not floating point, or counts not ints.

    Use it where there is no data to calibrate with, for ranges of activations
    (`activation_ranges`), and to tell which layers can do with few bits
    (`quantization_sensitivity`); for more images call it with other keys. `genie_distill` takes
    longer for images that carry a reconstruction of weights.

    Cost: `steps` forward and backward passes of the network for a batch: seconds for the usual
    ones.

    Example:
      >>> from flax import nnx
      >>> from jaxref.nn import Conv, Norm
      >>> from jaxref.norms import batch_norm
      >>> conv, norm = Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), Norm(batch_norm, 4)
      >>> norm.eval()
      >>> def activations_fn(images):
      ...     first = conv(images)
      ...     return [first]  # a second one would be `second_conv(jax.nn.relu(norm(first)))`
      >>> state = norm.running_state()
      >>> statistics, shape = ([state.mean], [state.var]), (2, 8, 8, 3)
      >>> data = distilled_data(activations_fn, *statistics, shape, steps=20, key=jax.random.key(0))
      >>> data.images.shape, bool(data.losses.min() < data.losses[0] / 4)
      ((2, 8, 8, 3), True)

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020, arXiv:2001.00281.
    """
    means, variances = checked_statistics(running_means, running_variances)
    _check_reduction(reduction)
    check_ddof(ddof)
    check_steps(steps=steps, patience=patience)
    check_interval(0, jnp.inf, closed="neither", learning_rate=learning_rate)
    return _distilled_data(
        jax.random.normal(key, shape),
        means,
        variances,
        learning_rate,
        patience,
        activations_fn=activations_fn,
        reduction=reduction,
        ddof=ddof,
        steps=steps,
    )


@functools.partial(jax.jit, static_argnames=("activations_fn", "reduction", "ddof", "steps"))
def _distilled_data(
    images: Array,
    means: list[Array],
    variances: list[Array],
    learning_rate: ArrayLike,
    patience: ArrayLike,
    *,
    activations_fn: ActivationsFn,
    reduction: str,
    ddof: int,
    steps: int,
) -> DistilledData:
    def objective(images: Array, _: Array) -> tuple[Array, Array]:
        loss = statistics_loss(
            activations_fn(images), means, variances, images, reduction=reduction, ddof=ddof
        )
        return loss, images

    optimizer = adam_until_plateaus(learning_rate, patience)
    return descend(objective, images, optimizer, images, jnp.arange(steps + 1), keep_best=True)


def adam_until_plateaus(
    learning_rate: ArrayLike, patience: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Adam with a rate that falls tenfold after more than `patience` steps without progress."""
    return optax.chain(
        optax.adam(learning_rate),
        optax.contrib.reduce_on_plateau(
            factor=0.1,
            patience=patience + 1,
            rtol=1e-4,
            min_scale=jnp.minimum(_LEAST_RATE / learning_rate, 1.0),
        ),
    )


def descend(
    objective: Callable[[Any, Array], tuple[Array, Array]],
    params: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    images: Array,
    inputs: Array,
    *,
    keep_best: bool,
) -> DistilledData:
    """Minimizes `objective(params, input) -> (loss, images)`, one step less than it looks at it.

    The images are those of the least loss, or of the last.
    """

    def step(carry: Any, value: Array) -> tuple[Any, Array]:
        params, state, previous, images, least = carry
        (loss, news), gradient = jax.value_and_grad(objective, has_aux=True)(params, value)
        loss = loss.astype(least.dtype)
        is_kept = loss < least if keep_best else True
        images = jnp.where(is_kept, news, images)
        # A plateau is told from the losses before this step, and shows in the step after it.
        updates, state = optimizer.update(gradient, state, params, value=previous)
        params = optax.apply_updates(params, updates)
        return (params, state, loss, images, jnp.where(is_kept, loss, least)), loss

    none = jnp.full((), jnp.inf, images.dtype)
    carry = (params, optimizer.init(params), none, images, none)
    (_, _, _, images, _), losses = jax.lax.scan(step, carry, inputs)
    return DistilledData(images, losses)


def activation_ranges(
    activations: Sequence[ArrayLike], *, percentile: float = 100.0
) -> tuple[Array, Array]:
    r"""The range that each layer's activations need, and 0 with it.

        low = min(0, the (100 - p)-th percentile),   high = max(0, the p-th)

    Args:
      activations: floating point arrays of any shapes, of a batch of data or distilled data.
      percentile: p in (50, 100]. Default 100, the least and the largest value.

    Returns:
      `(lows, highs)`, each `[layers]` in at least float32.

    Raises:
      ValueError: no activations, arrays without entries, or `percentile` out of range.
      TypeError: arrays not floating point.

    `quantize_to_range` takes them. Where few values are large, 99.9 may lose less than 100.

    Cost: one pass over the activations, a sort of each layer's for a percentile below 100.

    Example:
      >>> lows, highs = activation_ranges([jnp.array([0.5, 2.0]), jnp.array([[-1.0, -3.0]])])
      >>> print(lows, highs)
      [ 0. -3.] [2. 0.]

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020, arXiv:2001.00281.
    """
    check_interval(50, 100, closed="right", percentile=percentile)
    if not len(activations):
        raise ValueError("activations must be of one layer at least, got none")
    lows, highs = [], []
    for i, x in enumerate(activations):
        check_floating(**{f"activations[{i}]": x})
        if not jnp.size(x):
            raise ValueError(f"activations[{i}] must have entries, got shape {jnp.shape(x)}")
        x = jnp.asarray(x, compute_dtype(x))
        if isinstance(percentile, jax.core.Tracer) or percentile < 100:
            low, high = jnp.percentile(x, jnp.stack([100 - percentile, percentile]))
        else:
            low, high = jnp.min(x), jnp.max(x)
        lows.append(jnp.minimum(low, 0.0))
        highs.append(jnp.maximum(high, 0.0))
    return jnp.stack(lows), jnp.stack(highs)


def quantization_sensitivity(
    apply_fn: Callable[[Any, Array], Array],
    params: Any,
    data: Array,
    layers: Sequence[str],
    specs: Sequence[QuantSpec],
) -> Array:
    r"""What a network's outputs lose if one layer alone is quantized, for all layers and formats.

        Ω_i(k) = mean over data of KL(softmax f(θ; x) ‖ softmax f(θ with θ_i in format k; x))

    Args:
      apply_fn: f as `apply_fn(params, data)`, logits `[..., classes]`, in evaluation.
      params: θ, a pytree.
      data: what f takes, such as the images of `distilled_data`.
      layers: the weights to quantize, by their paths in `params` with "/" between keys:
        "first/kernel". A `flax.nnx` state comes as `state.to_pure_dict()`.
      specs: the formats, each a `QuantSpec`. Those of the paper are of granularity "channel" along
        the outputs, asymmetric, with 2, 4 and 8 bits.

    Returns:
      Ω, `[layers, specs]` in at least float32, at least 0 up to rounding.

    Raises:
      ValueError: no layers, no specs, a path that `params` does not have, or what `quantize`
        raises.
      TypeError: a spec that is none, or logits not floating point.

    Use it with `pareto_bit_allocation`, which makes of it the widths of all layers;
    `taylor_sensitivity` needs a gradient only, but a loss.

    Cost: layers · specs + 1 forward passes over `data`, no labels and no gradients.

    Example:
      >>> params = {"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.array([[1.0, 0.2], [0.3, 1]])}}
      >>> apply_fn = lambda params, x: x @ params["a"]["kernel"] @ params["b"]["kernel"]
      >>> specs = [QuantSpec(bits=2), QuantSpec(bits=8)]
      >>> print(quantization_sensitivity(
      ...     apply_fn, params, jnp.eye(2), ["a/kernel", "b/kernel"], specs).round(4))
      [[0.     0.    ]
       [0.0069 0.    ]]

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020, arXiv:2001.00281.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    values = [leaf for _, leaf in leaves]
    if not len(layers) or not len(specs):
        raise ValueError(f"layers and specs must not be empty, got {layers} and {specs}")
    for i, spec in enumerate(specs):
        check_spec(**{f"specs[{i}]": spec})
    unknown = [name for name in layers if name not in names]
    if unknown:
        raise ValueError(f"layers must be among {names}, got {unknown}")
    check_finite(**{name: values[names.index(name)] for name in layers})

    @jax.jit
    def log_probs(values: list[Any]) -> Array:
        logits = apply_fn(jax.tree.unflatten(structure, values), data)
        check_floating(logits=logits)
        return jax.nn.log_softmax(logits.astype(compute_dtype(logits)), axis=-1)

    rounded = jax.jit(fake_quantize, static_argnums=1)
    reference = log_probs(values)
    divergences = []
    for name in layers:
        at = names.index(name)
        for spec in specs:
            changed = [*values[:at], rounded(values[at], spec), *values[at + 1 :]]
            gaps = jnp.exp(reference) * (reference - log_probs(changed))
            divergences.append(jnp.mean(jnp.sum(gaps, axis=-1)))
    return jnp.stack(divergences).reshape(len(layers), len(specs))
