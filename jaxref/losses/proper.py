"""Proper multiclass losses: the canonical log loss, and links that are learned with the model.

Scores of C classes are C - 1 numbers, the last class being the one that the others are compared
with. Learned links are pytrees of parameters, which train with the model's.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.losses.cross_entropy import negative_log_likelihood

_LEAST_SCALE = 1e-3  # of a normalised layer, in the authors' release


def log_softmax_plus(values: ArrayLike) -> Array:
    r"""The logarithms of C probabilities from C - 1 numbers (softmax+).

        p_k = exp(v_k) / (1 + Σ_j exp(v_j)) for k < C,   p_C = 1 / (1 + Σ_j exp(v_j))

    the gradient of the convex log(1 + Σ_j exp(v_j)), and a bijection onto the inside of the
    simplex.

    Args:
      values: v `[..., C - 1]` floating point, at least one.

    Returns:
      log p `[..., C]` in the type of `values`.

    Raises:
      ValueError: no value along the last axis.
      TypeError: values that are not floating point.

    Use it where every distribution should have one set of values; the softmax of C values leaves a
    constant free.

    Cost: that of a softmax over the C classes.

    Example:
      >>> print(jnp.exp(log_softmax_plus(jnp.log(jnp.array([2.0, 1.0])))))
      [0.5 0.25 0.25]

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """
    v = _checked_scores(values=values)
    return jax.nn.log_softmax(_with_reference(v), axis=-1).astype(jnp.result_type(values))


def canonical_log_loss(values: ArrayLike, labels: ArrayLike) -> Array:
    r"""The log loss composed with its canonical link: the multinomial logistic loss.

        L = -log p_y = log(1 + Σ_j exp(v_j)) - v_y,   v_C = 0

    Args:
      values: v `[..., C - 1]` floating point.
      labels: integer ids `[...]` from 0 to C - 1, or distributions `[..., C]`. An id that is no
        class gives NaN for its example.

    Returns:
      `[...]` losses in the type of `values`, in nats.

    Raises:
      ValueError: shapes that do not match.
      TypeError: values that are not floating point, or labels of a type that is neither.

    Use it as the fixed link that `legendretron_loss` is compared with, where a model has C - 1
    outputs; `softmax_cross_entropy` is the same for C of them.

    Cost: that of a softmax over the C classes.

    Example:
      >>> print(canonical_log_loss(jnp.zeros((1, 3)), jnp.array([3])).round(3))
      [1.386]

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """
    wide = _checked_scores(values=values)
    loss = negative_log_likelihood(log_softmax_plus(wide), labels)
    return loss.astype(jnp.result_type(values))


class ConvexPotential(NamedTuple):
    """The parameters of `convex_potential` of D inputs, with H hidden units and K further layers.

    Attributes:
      first_kernel: `[D, H]`, `first_bias` `[H]`: the first layer.
      hidden_kernels: `[K, H, H/2]`: of the hidden units, positive through softplus.
      input_kernels: `[K, D, H/2]`: of the inputs, beside those.
      shifts: `[K, H/2]`, `log_scales` `[K, H/2]`: what normalises their sum.
      skip_kernels: `[K, D, H/2]`, `skip_biases` `[K, H/2]`: of the layer's other half.
      output_kernel: `[H]` positive through softplus, `output_input_kernel` `[D]`,
        `output_log_scale` `[]`: the output.
      network_weight: `[]` and `quadratic_weight` `[]`, positive through softplus: of the network
        and of |z|² / 2 in the potential.

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """

    first_kernel: Array
    first_bias: Array
    hidden_kernels: Array
    input_kernels: Array
    shifts: Array
    log_scales: Array
    skip_kernels: Array
    skip_biases: Array
    output_kernel: Array
    output_input_kernel: Array
    output_log_scale: Array
    network_weight: Array
    quadratic_weight: Array


def convex_potential_init(
    key: Array, dim: int, *, hidden: int = 4, depth: int = 4, scores: ArrayLike | None = None
) -> ConvexPotential:
    r"""Random parameters of a convex potential, normalised to the scores that it will get.

    Args:
      key: of the random numbers.
      dim: D at least 1, the size of the inputs.
      hidden: H, even and at least 2. Default 4.
      depth: number of hidden layers, K + 1, at least 1. Default 4.
      scores: `[batch, D]` of the first batch, on which every layer's sums are given mean 0 and
        variance 1. Default: scales of 1 and shifts of 0.

    Returns:
      A `ConvexPotential` in float32, or in the type of `scores` if that is wider.

    Raises:
      ValueError: `dim` or `depth` below 1, `hidden` odd or below 2, or scores of another shape.

    Use it for one block of a learned link; `legendretron_init` makes several for a number of
    classes.

    Cost: D·H + K·H·(D + H/2) parameters and a few more; with `scores` a pass of the batch through
    the layers.

    Example:
      >>> convex_potential_init(jax.random.key(0), 2).hidden_kernels.shape
      (3, 4, 2)

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """
    check_interval(1, jnp.inf, dim=dim, depth=depth)
    if hidden < 2 or hidden % 2:
        raise ValueError(f"hidden must be even and at least 2, got {hidden}")
    layers, half = depth - 1, hidden // 2
    dtype = jnp.float32 if scores is None else compute_dtype(scores)
    keys = iter(jax.random.split(key, 9))

    def uniform(fan_in: int, *shape: int) -> Array:
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(next(keys), shape, dtype, -bound, bound)

    params = ConvexPotential(
        first_kernel=uniform(dim, dim, hidden),
        first_bias=uniform(dim, hidden),
        hidden_kernels=uniform(hidden, layers, hidden, half),
        input_kernels=uniform(dim, layers, dim, half),
        shifts=jnp.zeros((layers, half), dtype),
        log_scales=jnp.zeros((layers, half), dtype),
        skip_kernels=uniform(dim, layers, dim, half),
        skip_biases=uniform(dim, layers, half),
        output_kernel=uniform(hidden, hidden),
        output_input_kernel=uniform(dim, dim),
        output_log_scale=jnp.zeros((), dtype),
        network_weight=jnp.zeros((), dtype),
        quadratic_weight=jnp.zeros((), dtype),
    )
    weights = jax.random.normal(next(keys), (2,), dtype)
    params = params._replace(network_weight=weights[0], quadratic_weight=weights[1])
    if scores is None:
        return params
    if jnp.ndim(scores) != 2:
        raise ValueError(f"scores must have shape [batch, {dim}], got {jnp.shape(scores)}")
    check_shape((jnp.shape(scores)[0], dim), scores=scores)
    z = jnp.asarray(scores).astype(dtype)
    shifts, log_scales = [], []
    h = _first_layer(params, z)
    for layer in range(layers):
        sums = _layer_sums(params, layer, h, z)
        shifts.append(-jnp.mean(sums, axis=0))
        log_scales.append(-jnp.log(jnp.std(sums, axis=0) + 1e-6))
        params = params._replace(
            shifts=params.shifts.at[layer].set(shifts[-1]),
            log_scales=params.log_scales.at[layer].set(log_scales[-1]),
        )
        h = _hidden_layer(params, layer, h, z)
    spread = jnp.std(_output_sums(params, h, z))
    return params._replace(output_log_scale=-jnp.log(spread + 1e-6))


def convex_potential(params: ConvexPotential, z: ArrayLike) -> Array:
    r"""A strongly convex function of z: an input-convex network and a square.

        F(z) = softplus(w₁) N(z) + softplus(w₀) |z|² / 2

    with the network N of layers

        h ← [softplus(s (P h + A z + b)), softplus(B z + c)],   N = s (P h + A z)

    which is convex in z as every softplus is convex and increasing, P = softplus(raw) / fan-in and
    s = exp(log s) + 0.001 positive, and sums of convex functions are.

    Args:
      params: a `ConvexPotential` of D inputs.
      z: `[..., D]` floating point.

    Returns:
      F `[...]` in the type of `z`.

    Raises:
      ValueError: another number of inputs than the parameters'.
      TypeError: `z` not floating point.

    Use it where the value of a convex function is wanted; a link takes `convex_gradient_map`, its
    gradient in z. `jaxref.nn.InputConvexNetwork` is its module.

    Cost: D·H + K·H·(D + H/2) multiplications an example, one for each parameter.

    Example:
      >>> params = convex_potential_init(jax.random.key(0), 2)
      >>> a, b = jnp.array([3.0, -1.0]), jnp.array([0.0, 2.0])
      >>> ends = (convex_potential(params, a) + convex_potential(params, b)) / 2
      >>> print(convex_potential(params, (a + b) / 2) < ends)
      True

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695 (the network is Huang et al.'s, 2020, arXiv:2012.05942).
    """
    check_floating(z=z)
    check_shape((*jnp.shape(z)[:-1], params.first_kernel.shape[0]), z=z)
    wide = jnp.asarray(z).astype(compute_dtype(z, params.first_kernel))
    h = _first_layer(params, wide)
    for layer in range(params.shifts.shape[0]):
        h = _hidden_layer(params, layer, h, wide)
    network = _output_sums(params, h, wide) * (jnp.exp(params.output_log_scale) + _LEAST_SCALE)
    square = jnp.sum(jnp.square(wide), axis=-1) / 2
    potential = jax.nn.softplus(params.network_weight) * network
    potential += jax.nn.softplus(params.quadratic_weight) * square
    return potential.astype(jnp.result_type(z))


def convex_gradient_map(params: ConvexPotential, z: ArrayLike) -> Array:
    r"""The gradient of a convex potential: a monotone bijection of the space.

        G(z) = ∇F(z),   (G(a) - G(b)) · (a - b) ≥ softplus(w₀) |a - b|²

    Args:
      params: a `ConvexPotential` of D inputs.
      z: `[..., D]` floating point.

    Returns:
      G `[..., D]` in the type of `z`.

    Raises:
      ValueError: another number of inputs than the parameters'.
      TypeError: `z` not floating point.

    Use it where a map of vectors should keep their order as an increasing function keeps that of
    numbers.

    Cost: a forward and a backward pass of `convex_potential`; to train it, a gradient of that
    gradient.

    Example:
      >>> params = convex_potential_init(jax.random.key(0), 1)
      >>> low, high = convex_gradient_map(params, jnp.array([[0.0], [1.0]]))
      >>> print(low < high)
      [ True]

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """
    check_floating(z=z)
    wide = jnp.asarray(z).astype(compute_dtype(z, params.first_kernel))
    gradient = jax.grad(lambda z: jnp.sum(convex_potential(params, z)))(wide)
    return gradient.astype(jnp.result_type(z))


def legendretron_init(
    key: Array,
    num_classes: int,
    *,
    num_blocks: int = 1,
    hidden: int = 4,
    depth: int = 4,
    scores: ArrayLike | None = None,
) -> tuple[ConvexPotential, ...]:
    r"""Random parameters of a learned link for C classes.

    Args:
      key: of the random numbers.
      num_classes: C at least 2.
      num_blocks: B at least 1, potentials one after the other. Default 1; only then is the link
        itself the gradient of a convex function.
      hidden: of `convex_potential_init`. Default 4.
      depth: of `convex_potential_init`. Default 4.
      scores: `[batch, C - 1]` of the first batch, to normalise the layers. Default: do not.

    Returns:
      B `ConvexPotential`s of C - 1 inputs, the first one applied first.

    Raises:
      ValueError: `num_classes` below 2, `num_blocks` below 1, or what `convex_potential_init`
        raises.

    Use it once before training, and train its result with the model's parameters, by the same
    optimizer, with some weight decay; one block alone is `convex_potential_init`.

    Cost: B times the parameters of `convex_potential_init` with D = C - 1; with `scores` a gradient
    map of the batch a block.

    Example:
      >>> len(legendretron_init(jax.random.key(0), 3, num_blocks=2))
      2

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """
    check_interval(2, jnp.inf, num_classes=num_classes)
    check_interval(1, jnp.inf, num_blocks=num_blocks)
    blocks: list[ConvexPotential] = []
    for block_key in jax.random.split(key, num_blocks):
        block = convex_potential_init(
            block_key, num_classes - 1, hidden=hidden, depth=depth, scores=scores
        )
        blocks.append(block)
        if scores is not None:
            scores = convex_gradient_map(block, scores)
    return tuple(blocks)


def legendretron_log_probabilities(values: ArrayLike, params: tuple[ConvexPotential, ...]) -> Array:
    r"""Log-probabilities of scores through a learned link (LegendreTron).

        log p = log softmax+(G_B(... G_1(z)))

    with the gradient maps G of convex potentials.

    Args:
      values: z `[..., C - 1]` floating point, the scores of the model.
      params: of `legendretron_init`.

    Returns:
      log p `[..., C]` in the type of `values`.

    Raises:
      ValueError: another number of values than the parameters'.
      TypeError: values that are not floating point.

    Use it to predict with a model that `legendretron_loss` has trained.

    Cost: B gradient maps, each a forward and a backward pass of a small network, and a softmax.

    Example:
      >>> params = legendretron_init(jax.random.key(0), 3)
      >>> print(jnp.exp(legendretron_log_probabilities(jnp.zeros((1, 2)), params)).sum().round(4))
      1.0

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """
    z = _checked_scores(values=values)
    for potential in params:
        z = convex_gradient_map(potential, z)
    return log_softmax_plus(z).astype(jnp.result_type(values))


def legendretron_loss(
    values: ArrayLike, labels: ArrayLike, params: tuple[ConvexPotential, ...]
) -> Array:
    r"""The log loss of scores through a link that is learned with them (LegendreTron).

        L = -log p_y,   log p = log softmax+(G_B(... G_1(z)))

    Whatever the link, a distribution over the labels is best answered by scores whose probabilities
    it is: the loss is proper. What the link learns is how scores turn into probabilities, in place
    of the exponential of the softmax.

    Args:
      values: z `[..., C - 1]` floating point, the scores of the model.
      labels: integer ids `[...]` from 0 to C - 1, or distributions `[..., C]`. An id that is no
        class gives NaN for its example.
      params: of `legendretron_init`; differentiated with the model's parameters.

    Returns:
      `[...]` losses in the type of `values`, in nats.

    Raises:
      ValueError: another number of values than the parameters', or labels that do not match.
      TypeError: values that are not floating point, or labels of a type that is neither.

    Use it for simple models of many classes, such as linear ones, whose scores no fixed link fits;
    `canonical_log_loss` has no parameters.

    Cost: B gradient maps an example, which training differentiates once more, and a softmax; small
    for few classes.

    Example:
      >>> params = legendretron_init(jax.random.key(0), 3)
      >>> legendretron_loss(jnp.zeros((4, 2)), jnp.array([0, 1, 2, 2]), params).shape
      (4,)

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695.
    """
    wide = _checked_scores(values=values)
    loss = negative_log_likelihood(legendretron_log_probabilities(wide, params), labels)
    return loss.astype(jnp.result_type(values))


def _checked_scores(**scores: ArrayLike) -> Array:
    """The scores in the type to compute in."""
    check_floating(**scores)
    ((name, value),) = scores.items()
    if jnp.ndim(value) < 1 or jnp.shape(value)[-1] < 1:
        raise ValueError(f"{name} must have shape [..., classes - 1], got {jnp.shape(value)}")
    return jnp.asarray(value).astype(compute_dtype(value))


def _with_reference(v: Array) -> Array:
    return jnp.concatenate([v, jnp.zeros_like(v[..., :1])], axis=-1)


def _first_layer(params: ConvexPotential, z: Array) -> Array:
    return jax.nn.softplus(z @ params.first_kernel + params.first_bias)


def _positive_mean(h: Array, raw_kernel: Array) -> Array:
    return h @ jax.nn.softplus(raw_kernel) / raw_kernel.shape[0]


def _layer_sums(params: ConvexPotential, layer: int, h: Array, z: Array) -> Array:
    return _positive_mean(h, params.hidden_kernels[layer]) + z @ params.input_kernels[layer]


def _hidden_layer(params: ConvexPotential, layer: int, h: Array, z: Array) -> Array:
    scale = jnp.exp(params.log_scales[layer]) + _LEAST_SCALE
    sums = scale * (_layer_sums(params, layer, h, z) + params.shifts[layer])
    skip = z @ params.skip_kernels[layer] + params.skip_biases[layer]
    return jax.nn.softplus(jnp.concatenate([sums, skip], axis=-1))


def _output_sums(params: ConvexPotential, h: Array, z: Array) -> Array:
    return _positive_mean(h, params.output_kernel) + z @ params.output_input_kernel
