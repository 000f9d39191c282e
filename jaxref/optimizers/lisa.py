"""LISA: layerwise importance sampling, an optimizer with moments for a few layers at a time."""

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.optimizers.adamw import scale_by_adam
from jaxref.optimizers.common import descend


class ScaleByLisaState(NamedTuple):
    """State of `scale_by_lisa`.

    Attributes:
      count: int32 scalar, the steps taken.
      layers: int32 `[active_layers]`, which layers the last update moved, counted from 0 in the
        order of their numbers; -1 in a model without layers.
      always: the direction's state for the parameters outside of the layers.
      active: its state for the active layers, in the places of the model's first layers. Both are
        trees like the parameters, with a scalar 0 for what they do not hold.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    layers: Array
    always: optax.OptState
    active: optax.OptState


def scale_by_lisa(
    direction: optax.GradientTransformation,
    active_layers: int = 2,
    period: ArrayLike = 20,
    key: Array | int = 0,
    layer_of: Callable[[tuple], int | None] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A direction for a few random layers at a time, whose state has room for these layers alone.

        every `period` steps:  draw S, `active_layers` of the layers, and forget their state
        u_l = direction(g_l) for l in S and for all that is in no layer;  0 elsewhere

    The embeddings, the output matrix and whatever else is in no layer always move, with a state
    that lasts. That of a layer starts afresh whenever layers are drawn, as in the paper's
    experiments, with a count of steps of its own: a kept one would have to be stored for all
    layers. So put a schedule of the learning rate, and weight decay, behind it, as `lisa` does.

    Args:
      direction: g → u(g), such as `scale_by_adam`. It acts on layers and the rest apart.
      active_layers: at least 1, how many layers move; all where the model has fewer. Default 2,
        as in the ScaleBiO program; it fixes shapes, and so is static (`static_args` of
        `optax.inject_hyperparams`).
      period: at least 1, the steps from one drawing to the next. Default 20, likewise.
      key: a random key, or an integer that makes one.
      layer_of: path of a leaf, as of `jax.tree_util`, → number of its layer, or None for what is
        in no layer. Default: the first integer of the path, which is the place in a list of blocks.

    Returns:
      the transformation. It needs params in `update`; its state is a `ScaleByLisaState`.

    Raises:
      ValueError: a number out of its range; layers whose leaves differ in shape or type; in
        `update`, params missing, or of another structure or shape than the gradients.

    Use it in an `optax.chain` of one's own where the moments of all layers do not fit; `lisa` is
    the whole optimizer, and `frugal` moves also what has no moments.

    Cost: the state of `active_layers` of the L layers and of all that is in none; the gradients of
    all layers.

    Example:
      >>> params = {"blocks": [jnp.ones(2), jnp.ones(2), jnp.ones(2)], "head": jnp.ones(2)}
      >>> direction = scale_by_lisa(optax.trace(0.9), active_layers=1)
      >>> updates, state = direction.update(params, direction.init(params), params)
      >>> print(*updates["blocks"], updates["head"], state.layers)
      [1. 1.] [0. 0.] [0. 0.] [1. 1.] [0]

    Reference: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
    Model Fine-Tuning", 2024, arXiv:2403.17919; in ScaleBiO: Pan et al., 2024, arXiv:2406.19976.
    """
    check_interval(1, jnp.inf, active_layers=active_layers, period=period)
    if not isinstance(active_layers, Integral):
        raise ValueError(f"active_layers must be an integer, got {active_layers!r}")
    if not (
        isinstance(key, Array) and (key.ndim or jnp.issubdtype(key.dtype, jax.dtypes.prng_key))
    ):
        key = jax.random.key(key)
    direction = optax.with_extra_args_support(direction)

    def draw(count, layers):
        if not layers:
            return jnp.array([-1])  # empty arrays cannot be saved
        drawn = jax.random.fold_in(key, count // period)
        return jax.random.permutation(drawn, len(layers))[: min(active_layers, len(layers))]

    def init(params):
        layers = _layers(params, layer_of)
        count = jnp.zeros([], jnp.int32)
        chosen = draw(count, layers)
        states = map(direction.init, _split(params, layers, chosen))
        return ScaleByLisaState(count, chosen, *states)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("params must be passed to update: a new layer's state needs them")
        check_same_tree(updates, params=params)
        layers = _layers(updates, layer_of)
        chosen = draw(state.count, layers)
        always, active = _split(updates, layers, chosen)
        always_params, active_params = _split(params, layers, chosen)
        is_new = state.count % period == 0
        active_state = jax.tree.map(
            lambda fresh, old: jnp.where(is_new, fresh.astype(old.dtype), old),
            direction.init(active_params),
            state.active,
        )
        always, always_state = direction.update(always, state.always, always_params, **extra_args)
        active, active_state = direction.update(active, active_state, active_params, **extra_args)
        count = optax.safe_increment(state.count)
        return (
            _merge(always, active, layers, chosen),
            ScaleByLisaState(count, chosen, always_state, active_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def lisa(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    active_layers: int = 2,
    period: ArrayLike = 20,
    key: Array | int = 0,
    layer_of: Callable[[tuple], int | None] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LISA, layerwise importance-sampled AdamW: AdamW on a few random layers at a time.

        every `period` steps:  draw S, `active_layers` of the layers
        x_l ← x_l - lr (Adam(g_l) + wd x_l)   for l in S and for all that is in no layer

    The other layers stay as they are: they do not decay either. Moments exist for the layers of S
    only; they start from 0 whenever layers are drawn. See `scale_by_lisa`.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      b1: in [0, 1), decay of the average of the gradients. Default 0.9.
      b2: in [0, 1), decay of the average of their squares. Default 0.999.
      eps: at least 0, added to the root. Default 1e-8.
      mu_dtype: the floating type of the average of the gradients; None takes the parameters'.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. Default 1e-4, as in
        `optax.adamw`.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.
      active_layers: at least 1, how many layers move. Default 2. Static.
      period: at least 1, the steps from one drawing to the next. Default 20.
      key: a random key, or an integer that makes one.
      layer_of: path of a leaf → number of its layer, or None; default the first integer of the
        path. A model without layers is trained by AdamW.

    Returns:
      the transformation; it needs params in `update`, and its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range; layers whose leaves differ in shape or type; in
        `update`, params missing, or trees that do not match.
      TypeError: `mu_dtype` is not floating point.

    Use it to fine-tune a deep model whose moments do not fit: with 2 of 32 layers they take a
    sixteenth. For w and u of `first_order_bilevel_step` give it two keys.

    Cost: two moments for `active_layers` of the L layers and for all that is in none; the gradients
    of all layers.

    Example:
      >>> params = {"blocks": [jnp.ones(2), jnp.ones(2), jnp.ones(2)], "head": jnp.ones(2)}
      >>> optimizer = lisa(0.1, weight_decay=0.0, active_layers=1)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> print(*updates["blocks"], updates["head"])
      [-0.1 -0.1] [0. 0.] [0. 0.] [-0.1 -0.1]

    Reference: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
    Model Fine-Tuning", 2024, arXiv:2403.17919; in ScaleBiO: Pan et al., 2024, arXiv:2406.19976.
    """
    adam = scale_by_adam(b1, b2, eps, mu_dtype)
    direction = scale_by_lisa(adam, active_layers, period, key, layer_of)
    steps = descend(direction, learning_rate, weight_decay, mask)

    def update(updates, state, params=None, **extra_args):
        updates, state = steps.update(updates, state, params, **extra_args)
        layers, chosen = _layers(updates, layer_of), state[0].layers
        _, active = _split(updates, layers, chosen)
        return _merge(updates, active, layers, chosen), state

    return optax.GradientTransformationExtraArgs(steps.init, update)


def _layers(tree, layer_of):
    """For each layer, the numbers of its leaves among the tree's."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    layers: dict[int, list[int]] = {}
    for number, (path, _) in enumerate(paths_and_leaves):
        layer = (layer_of or _first_integer)(path)
        if layer is not None:
            layers.setdefault(layer, []).append(number)
    described = [f"{jnp.result_type(x).name}{list(jnp.shape(x))}" for _, x in paths_and_leaves]
    kinds = {layer: [described[number] for number in layers[layer]] for layer in sorted(layers)}
    for layer, kind in kinds.items():
        if kind != kinds[min(kinds)]:
            raise ValueError(
                f"layers must have the same leaves: layer {min(kinds)} has {kinds[min(kinds)]}, "
                f"layer {layer} has {kind}"
            )
    return [layers[layer] for layer in kinds]


def _first_integer(path):
    keys = (getattr(entry, "key", getattr(entry, "idx", None)) for entry in path)
    return next((key for key in keys if isinstance(key, int)), None)


def _split(tree, layers, chosen):
    """The leaves in no layer; those of the chosen layers, in the places of the first ones. Both
    are trees like `tree`, so that they shard and map as it does, with a 0 for what is absent."""
    leaves, structure = jax.tree.flatten(tree)
    absent = [jnp.zeros((), jnp.result_type(x)) for x in leaves]
    always, active = list(leaves), list(absent)
    for slot, layer in zip(layers, chosen):
        for place, *candidates in zip(slot, *layers):
            active[place] = jax.lax.select_n(layer, *(leaves[number] for number in candidates))
    for number in (number for layer in layers for number in layer):
        always[number] = absent[number]
    return jax.tree.unflatten(structure, always), jax.tree.unflatten(structure, active)


def _merge(always, active, layers, chosen):
    """What `_split` took apart, with 0 for the layers that were not chosen."""
    leaves, structure = jax.tree.flatten(always)
    slots = jax.tree.leaves(active)
    for position, layer in enumerate(layers):
        for number, *places in zip(layer, *layers[: len(chosen)]):
            found = [jnp.where(slot == position, slots[p], 0) for slot, p in zip(chosen, places)]
            leaves[number] = sum(found[1:], start=found[0])
    return jax.tree.unflatten(structure, leaves)
