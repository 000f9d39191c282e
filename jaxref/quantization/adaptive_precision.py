"""Training whose layers choose their own fixed-point formats (AdaPT)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.fixed_point import (
    MAX_LENGTH,
    STRATEGIES,
    check_length,
    diversity_of_norms,
    fixed_point_quantize,
    norm_of,
    push_down,
    push_up,
)


class AdaptPrecisionState(NamedTuple):
    """The formats of a network's layers, and the windows that move them.

    A layer is a leaf of the parameters with two axes or more, in the order of the tree.

    Attributes:
      word_length, fraction_length: int32 `[layers]`, the formats.
      lookback: int32 `[layers]`, gradients that fill a window.
      resolution: int32 `[layers]`, bins of the histograms.
      window_count: int32 `[layers]`, gradients in the window.
      window_norm: float32 `[layers]`, the sum of their norms.
      window_sum: a float32 array for each layer, their sum.
      strategy: int32 scalar, 0 for "min", 1 for "mean", 2 for "max".
      losses: float32 `[max_lookback]`, the last losses, newest first.
      loss_count: int32 scalar, how many losses came.
    """

    word_length: Array
    fraction_length: Array
    lookback: Array
    resolution: Array
    window_count: Array
    window_norm: Array
    window_sum: tuple[Array, ...]
    strategy: Array
    losses: Array
    loss_count: Array


class AdaptState(NamedTuple):
    """The state of `adapt`.

    Attributes:
      precision: an `AdaptPrecisionState`.
      key: of the next step.
      inner: the state of the optimizer inside.
    """

    precision: AdaptPrecisionState
    key: Array
    inner: Any


def adapt_precision_init(
    params: Any,
    *,
    word_length: int = 8,
    fraction_length: int = 4,
    lookback: int = 10,
    resolution: int = 50,
    max_lookback: int = 100,
) -> AdaptPrecisionState:
    """Every layer in one fixed-point format, with empty windows.

    Args:
      params: tree of arrays, of which those with two axes or more are the layers.
      word_length, fraction_length: the format at first. Defaults 8 and 4.
      lookback: gradients to fill a window at first. Default 10.
      resolution: bins of the histograms at first. Default 50.
      max_lookback: the longest window, also of the losses. Default 100.

    Returns:
      The `AdaptPrecisionState`.

    Raises:
      ValueError: no layers, or numbers out of range.

    Use it where you keep the formats yourself, in a training loop of your own; `adapt` calls it in
    its `init`. A short first format is safe: `adapt_precision_update` lengthens it.

    Cost: one float32 array of the size of each layer, for the sum of the window's gradients, and a
    few numbers a layer.

    Example:
      >>> state = adapt_precision_init({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
      >>> state.word_length, state.window_sum[0].shape
      (Array([8], dtype=int32), (2, 3))

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    check_length(1, MAX_LENGTH, word_length=word_length, fraction_length=fraction_length)
    check_length(1, jnp.inf, lookback=lookback, resolution=resolution, max_lookback=max_lookback)
    layers = [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) >= 2]
    if not layers:
        raise ValueError("params must have a leaf with two axes or more, got none")
    count = len(layers)
    return AdaptPrecisionState(
        word_length=jnp.full(count, word_length, jnp.int32),
        fraction_length=jnp.full(count, fraction_length, jnp.int32),
        lookback=jnp.full(count, lookback, jnp.int32),
        resolution=jnp.full(count, resolution, jnp.int32),
        window_count=jnp.zeros(count, jnp.int32),
        window_norm=jnp.zeros(count, jnp.float32),
        window_sum=tuple(jnp.zeros(jnp.shape(layer), jnp.float32) for layer in layers),
        strategy=jnp.zeros((), jnp.int32),
        losses=jnp.zeros(max_lookback, jnp.float32),
        loss_count=jnp.zeros((), jnp.int32),
    )


def adapt_precision_update(
    state: AdaptPrecisionState,
    params: Any,
    gradients: Any,
    loss: ArrayLike,
    key: Array,
    *,
    min_lookback: int = 10,
    lookback_momentum: float = 0.33,
    max_resolution: int = 100,
    tolerance: float = 1e-2,
) -> AdaptPrecisionState:
    r"""Takes a step's gradients and loss in, and moves the formats of layers whose window is full.

    The strategy of `push_up` goes from "min" to "mean" to "max" while |loss| is no less than the
    size of its mean over the last lookbacks, and back to "min" once it is. Then for each layer,
    with the diversity Δ of the window,

        lookback ← ⌈0.33 ⌈clip(max_lookback / Δ, min_lookback, max_lookback)⌉ + 0.67 lookback⌉
        resolution ← one more where the lookback is the longest, one fewer where the shortest

    and where the window holds as many gradients as that, `push_down`, `push_up`, a new window.

    Args:
      state: of the step before.
      params: the float weights that are trained.
      gradients: like `params`.
      loss: scalar, of this step.
      key: random key of the rounding in `push_down`.
      min_lookback: the shortest window. Default 10; the longest is that of `adapt_precision_init`.
      lookback_momentum: the share of the new lookback, in [0, 1]. Default 0.33.
      max_resolution: the most bins. Default 100.
      tolerance: of `push_down`.

    Returns:
      The next state. It has no gradient.

    Raises:
      ValueError: trees that do not fit the state, or numbers out of range.

    Use it once a step in a training loop of your own, after the gradients and before the weights
    move; `adapt` does so around any optimizer.

    Cost: a pass over the gradients a step; in a layer whose window is full also 12 roundings of its
    weights, with two histograms each.

    Example:
      >>> params = {"kernel": jnp.eye(2) / 8}
      >>> state = adapt_precision_init(params, lookback=1, max_lookback=1)
      >>> state = adapt_precision_update(
      ...     state, params, params, 1.0, jax.random.key(0), min_lookback=1
      ... )
      >>> state.word_length, state.fraction_length
      (Array([13], dtype=int32), Array([5], dtype=int32))

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    check_same_tree(params, gradients=gradients)
    check_interval(0, 1, lookback_momentum=lookback_momentum)
    max_lookback = len(state.losses)
    check_length(1, max_lookback, min_lookback=min_lookback)
    check_length(1, jnp.inf, max_resolution=max_resolution)
    layers = [
        (w, g)
        for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(gradients))
        if jnp.ndim(w) >= 2
    ]
    shapes = [jnp.shape(w) for w, _ in layers]
    if shapes != [jnp.shape(total) for total in state.window_sum]:
        raise ValueError(f"params must have the layers of the state, got shapes {shapes}")
    loss = jnp.abs(jax.lax.stop_gradient(jnp.asarray(loss, jnp.float32)))
    state = _adapt_strategy(state, loss)
    columns: list[tuple[Array, ...]] = []
    sums = []
    for i, (w, g) in enumerate(layers):
        g = jax.lax.stop_gradient(jnp.asarray(g, jnp.float32))
        total = state.window_sum[i] + g
        norm, count = state.window_norm[i] + norm_of(g), state.window_count[i] + 1
        diversity = diversity_of_norms(norm, norm_of(total))
        fresh = jnp.ceil(jnp.clip(max_lookback / diversity, min_lookback, max_lookback))
        mixed = lookback_momentum * fresh + (1 - lookback_momentum) * state.lookback[i]
        # The products' rounding must not carry a whole number up.
        lookback = jnp.ceil(mixed - 1e-4).astype(jnp.int32)
        finer = (lookback == max_lookback).astype(jnp.int32)
        coarser = (lookback == min_lookback).astype(jnp.int32)
        resolution = jnp.clip(state.resolution[i] + finer - coarser, 1, max_resolution)

        def move(i=i, w=w, resolution=resolution, diversity=diversity):
            word, fraction = push_down(
                w,
                state.word_length[i],
                state.fraction_length[i],
                resolution=resolution,
                key=jax.random.fold_in(key, i),
                tolerance=tolerance,
                max_resolution=max_resolution,
            )
            return push_up(word, fraction, diversity, strategy=state.strategy)

        def stay(i=i):
            return state.word_length[i], state.fraction_length[i]

        full = count >= lookback
        word, fraction = jax.lax.cond(full, move, stay)
        sums.append(jnp.where(full, 0.0, total))
        columns.append(
            (
                word,
                fraction,
                lookback,
                resolution,
                jnp.where(full, 0, count),
                jnp.where(full, 0.0, norm),
            )
        )
    word, fraction, lookbacks, resolutions, counts, norms = map(jnp.stack, zip(*columns))
    return state._replace(
        word_length=word,
        fraction_length=fraction,
        lookback=lookbacks,
        resolution=resolutions,
        window_count=counts,
        window_norm=norms,
        window_sum=tuple(sums),
    )


def _adapt_strategy(state: AdaptPrecisionState, loss: Array) -> AdaptPrecisionState:
    """The next strategy, with the loss added to the window."""
    window = jnp.mean(state.lookback.astype(jnp.float32)).astype(jnp.int32)
    recent = jnp.arange(len(state.losses)) < window
    mean = jnp.sum(jnp.where(recent, state.losses, 0.0)) / window
    worse = jnp.minimum(state.strategy + 1, len(STRATEGIES) - 1)
    moved = jnp.where(loss >= jnp.abs(mean), worse, 0)
    return state._replace(
        strategy=jnp.where(state.loss_count >= window, moved, state.strategy),
        losses=jnp.roll(state.losses, 1).at[0].set(loss),
        loss_count=optax.safe_increment(state.loss_count),
    )


def adapt_quantize(params: Any, state: AdaptPrecisionState, *, key: Array) -> Any:
    """The weights in the formats of their layers: what the forward pass of AdaPT computes with.

    Args:
      params: the float weights; leaves with fewer than two axes (biases, gains) take the format of
        the layer whose path has most in common with theirs.
      state: the formats.
      key: random key of the stochastic rounding.

    Returns:
      The tree of `fixed_point_quantize`d leaves, straight-through: gradients pass to `params`.

    Raises:
      ValueError: params without the state's layers.

    Use it in the loss, with a new key each step, and in inference after training;
    `fixed_point_quantize` rounds one array to a format of your own.

    Cost: a random number and a rounding for each weight; a second copy of the tree.

    Example:
      >>> params = {"kernel": jnp.full((1, 2), 0.25), "bias": jnp.array([9.0, 0.5])}
      >>> state = adapt_precision_init(params)
      >>> print(adapt_quantize(params, state, key=jax.random.key(0))["bias"])
      [7.9375 0.5   ]

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    leaves, structure = jax.tree.flatten(params)
    quantized = [
        fixed_point_quantize(
            leaf,
            state.word_length[i],
            state.fraction_length[i],
            key=jax.random.fold_in(key, n),
        )
        for n, (leaf, i) in enumerate(zip(leaves, _layer_of_leaves(params, state)))
    ]
    return jax.tree.unflatten(structure, quantized)


def _layer_of_leaves(params: Any, state: AdaptPrecisionState) -> list[int]:
    """For each leaf the layer whose format it has."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    layers = [path for path, leaf in paths if jnp.ndim(leaf) >= 2]
    if len(layers) != len(state.window_sum):
        raise ValueError(
            f"params must have the state's {len(state.window_sum)} layers, got {len(layers)}"
        )

    def nearest(path):
        def common(layer):
            equal = [x == y for x, y in zip(path, layer)]
            return equal.index(False) if False in equal else len(equal)

        return layers.index(path) if path in layers else layers.index(max(layers, key=common))

    return [nearest(path) for path, _ in paths]


def adapt_penalty(
    quantized: Any,
    state: AdaptPrecisionState,
    *,
    l1: float = 1e-5,
    l2: float = 1e-4,
    precision: float = 1e-2,
) -> Array:
    r"""What AdaPT adds to the loss: weights that are small, few and short.

        P = l1 Σ|w| + l2/2 Σ w² + precision · Σ_layers (WL / 32) · density

    with the share of weights that are not 0 as the density. The last sum has no gradient; it makes
    the loss, which picks the strategy, dearer for long words.

    Args:
      quantized: the tree that `adapt_quantize` gave.
      state: the formats.
      l1, l2, precision: at least 0. Defaults 1e-5, 1e-4 and 1e-2; the paper names none.

    Returns:
      A scalar, at least float32.

    Raises:
      ValueError: a negative weight, or params without the state's layers.

    Use it in the loss of training with `adapt`; without it nothing draws weights to zero, and
    `adapt_cost` counts only the short words.

    Cost: one pass over the weights.

    Example:
      >>> params = {"kernel": jnp.array([[0.5, 0.0]])}
      >>> print(adapt_penalty(params, adapt_precision_init(params), l1=1.0, l2=1.0, precision=1.0))
      0.75

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    check_interval(0, jnp.inf, l1=l1, l2=l2, precision=precision)
    leaves = [jnp.asarray(leaf, compute_dtype(leaf)) for leaf in jax.tree.leaves(quantized)]
    # Written so that the gradient at 0 is 0.
    sizes = sum(jnp.sum(w * jax.lax.stop_gradient(jnp.sign(w))) for w in leaves)
    squares = sum(jnp.sum(jnp.square(w)) for w in leaves)
    lengths = jnp.sum(_layer_costs(quantized, state)[0])
    return l1 * jnp.asarray(sizes) + 0.5 * l2 * squares + precision * lengths


def adapt_cost(quantized: Any, state: AdaptPrecisionState) -> Array:
    r"""The work of the layers relative to dense float32: the cost model behind AdaPT's speed-ups.

        cost = Σ_layers n (WL / 32) density / Σ_layers n

    with n the layer's weights, each of which costs one product to an input.

    Args:
      quantized: the tree that `adapt_quantize` gave.
      state: the formats.

    Returns:
      A float32 scalar in [0, 1]; its reciprocal is the speed-up of hardware whose time goes with
      the bits and that skips zeros.

    Raises:
      ValueError: params without the state's layers.

    Use it to report or compare what trained formats save on hardware made for them; common
    processors do not multiply faster for it. `adapt_penalty` is what training minimizes.

    Cost: one pass over the weights, to count those that are not 0.

    Example:
      >>> params = {"kernel": jnp.array([[0.5, 0.0]])}
      >>> print(adapt_cost(params, adapt_precision_init(params)))
      0.125

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    costs, sizes = _layer_costs(quantized, state)
    return jnp.sum(costs * sizes) / max(sum(sizes.tolist()), 1)


def _layer_costs(quantized: Any, state: AdaptPrecisionState) -> tuple[Array, Array]:
    """WL / 32 times the density of each layer, and how many weights it has."""
    _layer_of_leaves(quantized, state)
    layers = [leaf for leaf in jax.tree.leaves(quantized) if jnp.ndim(leaf) >= 2]
    density = jnp.stack([jnp.mean(jnp.asarray(w) != 0, dtype=jnp.float32) for w in layers])
    sizes = [jnp.size(w) for w in layers]
    return state.word_length / MAX_LENGTH * density, jnp.asarray(sizes, jnp.float32)


def adapt(
    inner: optax.GradientTransformation,
    *,
    key: Array,
    word_length: int = 8,
    fraction_length: int = 4,
    lookback: int = 10,
    resolution: int = 50,
    min_lookback: int = 10,
    max_lookback: int = 100,
    lookback_momentum: float = 0.33,
    max_resolution: int = 100,
    tolerance: float = 1e-2,
    quantize_gradients: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive precision training (AdaPT) around an optimizer: layers choose their word lengths.

    At each step the gradient of every leaf is rounded to its layer's fixed-point format and scaled
    to norm 1; the formats follow by `adapt_precision_update`; and `inner` moves the float weights
    by those gradients. The loss is to be taken of

        adapt_quantize(params, state.precision, key=...)

    with `adapt_penalty` added, so that forward and backward pass see fixed-point weights alone.

    Args:
      inner: the optimizer of the float weights; the paper's is SGD with momentum.
      key: random key of the rounding, kept in the state.
      word_length, fraction_length, lookback, resolution, max_lookback: of `adapt_precision_init`.
      min_lookback, lookback_momentum, max_resolution, tolerance: of `adapt_precision_update`.
      quantize_gradients: whether to round the gradients. Default True.

    Returns:
      an optax transformation whose `update` needs `params` and the loss as `value`; other extra
      arguments go to `inner`. Its state is an `AdaptState`.

    Raises:
      ValueError: a number out of its range; in `update`, params missing or of another structure.

    Against training in one short format it spends bits where a layer's gradients contradict each
    other; the float weights stay, so memory is saved after training only.

    Cost: beside the state of `inner` one float32 array of each layer's size; one gradient a step,
    and the search for formats of `adapt_precision_update`.

    Example:
      >>> optimizer = adapt(optax.sgd(0.5), key=jax.random.key(0))
      >>> params = {"kernel": jnp.array([[0.5, 0.25]])}
      >>> state = optimizer.init(params)
      >>> gradients = {"kernel": jnp.array([[3.0, 4.0]])}
      >>> updates, state = optimizer.update(gradients, state, params, value=1.0)
      >>> print(updates["kernel"], state.precision.window_count)
      [[-0.3 -0.4]] [1]

    Reference: Kummer et al., "Adaptive Precision Training (AdaPT): A dynamic fixed point quantized
    training approach for DNNs", 2021, arXiv:2107.13490.
    """
    wrapped = optax.with_extra_args_support(inner)

    def init(params):
        precision = adapt_precision_init(
            params,
            word_length=word_length,
            fraction_length=fraction_length,
            lookback=lookback,
            resolution=resolution,
            max_lookback=max_lookback,
        )
        return AdaptState(precision, key, wrapped.init(params))

    def normalized(g):
        wide = jnp.asarray(g, compute_dtype(g))
        norm = norm_of(wide)
        return (wide / jnp.where(norm > 0, norm, 1.0)).astype(jnp.result_type(g))

    def update(updates, state, params=None, *, value, **extra_args):
        if params is None:
            raise ValueError("params must be passed to update: formats follow them, got None")
        check_same_tree(params, updates=updates)
        following, rounding, search = jax.random.split(state.key, 3)
        if quantize_gradients:
            updates = adapt_quantize(updates, state.precision, key=rounding)
        updates = jax.tree.map(normalized, updates)
        precision = adapt_precision_update(
            state.precision,
            params,
            updates,
            value,
            search,
            min_lookback=min_lookback,
            lookback_momentum=lookback_momentum,
            max_resolution=max_resolution,
            tolerance=tolerance,
        )
        updates, inner_state = wrapped.update(
            updates, state.inner, params, value=value, **extra_args
        )
        return updates, AdaptState(precision, following, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
