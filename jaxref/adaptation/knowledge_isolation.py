"""Unlearning in the layers that hold a fact: where these are, and a loss that spares the rest.

Causal tracing finds the layers, by restoring one state at a time in a network that was disturbed.
Only their MLPs are then trained, against what is to be forgotten and for what is to be retained,
the latter the more the worse it gets.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.labels import expected_over_labels
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards

Edit = Callable[[int, Array], Array]


class ConstrainedUnlearningState(NamedTuple):
    """How well the data to retain were known at first.

    Attributes:
      retain_sum: the sum of the mean losses of batches to retain in the first epoch, float32.
      retain_count: the number of these batches, int32.
    """

    retain_sum: Array
    retain_count: Array


class CausalTrace(NamedTuple):
    """What states do for an answer.

    Attributes:
      indirect_effect: how much more probable the answer is for restoring the states of a layer at
        one position, `[prompts, layers, positions]`.
      clean_probability: of the answer, in the network as it is, `[prompts]`.
      corrupted_probability: of the answer, where the subject is disturbed and nothing restored,
        `[prompts]`.
    """

    indirect_effect: Array
    clean_probability: Array
    corrupted_probability: Array


def adaptive_retain_multiplier(
    retain_loss: ArrayLike,
    reference_loss: ArrayLike,
    *,
    base: float = 1.2,
    maximum: float = 2.3,
) -> Array:
    r"""The weight of a loss to retain, which grows with what is lost already.

        m = clip(round(0.3 · 6^d + 0.8, one decimal), base, maximum)   for d > 0, else base
        d = retain_loss - reference_loss

    Args:
      retain_loss: the loss now, floating point of any shape.
      reference_loss: what it was at first, broadcastable to it.
      base: the least weight, at least 0. Default 1.2.
      maximum: the largest, at least `base`. Default 2.3, of the authors' code, reached at d = 0.9.

    Returns:
      m, of the shape and type of `retain_loss`, without gradient.

    Raises:
      ValueError: shapes that do not match, or a `maximum` below `base`.
      TypeError: losses that are not floating point.

    Use it by `constrained_unlearning_loss`, which keeps the reference.

    Cost: elementwise.

    Example:
      >>> print(adaptive_retain_multiplier(jnp.array([0.1, 0.5, 1.0, 9.0]), 0.0))
      [1.2 1.5 2.3 2.3]

    Reference: Agrawal, Huang, "SHA256 at SemEval-2025 Task 4: Selective Amnesia -- Constrained
    Unlearning for Large Language Models via Knowledge Isolation", 2025, arXiv:2504.12996.
    """
    check_interval(0, jnp.inf, base=base, maximum=maximum)
    check_interval(0, jnp.inf, maximum_above_base=maximum - base)
    check_floating(retain_loss=retain_loss, reference_loss=reference_loss)
    check_broadcastable(jnp.shape(retain_loss), reference_loss=reference_loss)
    loss = jax.lax.stop_gradient(jnp.asarray(retain_loss))
    dtype = compute_dtype(loss)
    lost = loss.astype(dtype) - jax.lax.stop_gradient(jnp.asarray(reference_loss)).astype(dtype)
    grown = jnp.round(0.3 * 6.0 ** jnp.clip(lost, 0.0, 30.0) + 0.8, 1)
    multiplier = jnp.where(lost > 0, jnp.clip(grown, base, maximum), base)
    return multiplier.astype(loss.dtype)


def constrained_unlearning_init() -> ConstrainedUnlearningState:
    """The state of `constrained_unlearning_loss` before the first batch.

    Returns:
      `ConstrainedUnlearningState` of no retained example.

    Use it once, before the first epoch. Keep the state in checkpoints:
    `constrained_unlearning_loss` cannot find the losses of the first epoch again.

    Cost: two scalars.

    Example:
      >>> constrained_unlearning_init().retain_count
      Array(0, dtype=int32)

    Reference: Agrawal, Huang, "SHA256 at SemEval-2025 Task 4: Selective Amnesia -- Constrained
    Unlearning for Large Language Models via Knowledge Isolation", 2025, arXiv:2504.12996.
    """
    return ConstrainedUnlearningState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def constrained_unlearning_loss(
    forget_nll: ArrayLike,
    retain_nll: ArrayLike,
    state: ConstrainedUnlearningState,
    *,
    epoch: ArrayLike,
    base: float = 1.2,
    maximum: float = 2.3,
    forget_where: ArrayLike | None = None,
    retain_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, ConstrainedUnlearningState]:
    r"""Ascent on answers to forget and descent on those to retain, as a scalar of a batch.

        L = -mean(forget_nll) + m mean(retain_nll)

    In the first epoch m is `base`, and the mean c of the batches' losses to retain is recorded.
    Afterwards m = `adaptive_retain_multiplier`(mean(retain_nll), c).

    Args:
      forget_nll: -log p `[...]` floating point, of the tokens of answers to forget.
      retain_nll: -log p `[...]`, of the tokens of answers to retain.
      state: at first `constrained_unlearning_init()`.
      epoch: 0 for the first; may be traced.
      base, maximum: as in `adaptive_retain_multiplier`.
      forget_where: boolean, broadcastable to `forget_nll`: the tokens of the answers, neither the
        prompts' nor padding. Default: all.
      retain_where: likewise, of `retain_nll`.
      axis_name: name or names of mapped axes over which the batch is spread.

    Returns:
      The loss, a scalar in the type of `forget_nll`, and the new state. A batch without tokens to
      forget, or to retain, has no such term; c is the mean over batches with tokens to retain, and
      m is `base` if there was none.

    Raises:
      ValueError: masks that do not fit, or a `maximum` below `base`.
      TypeError: losses that are not floating point.

    Use it with `jaxref.optimizers.train_only` and a `layer_filter`. Ascent has no bound: stop once
    enough is forgotten. The authors train for 8 epochs at a rate of 1.5e-5, 120 examples a step.

    Cost: one pass over the tokens' losses and two scalars of state; a forward and backward pass of
    both batches, no reference model.

    Example:
      >>> forget, retain = jnp.array([1.0, 3.0]), jnp.array([0.5])
      >>> state = constrained_unlearning_init()
      >>> loss, state = constrained_unlearning_loss(forget, retain, state, epoch=0)
      >>> print(loss.round(3))
      -1.4
      >>> loss, state = constrained_unlearning_loss(forget, retain + 0.5, state, epoch=1)
      >>> print(loss.round(3))
      -0.5

    Reference: Agrawal, Huang, "SHA256 at SemEval-2025 Task 4: Selective Amnesia -- Constrained
    Unlearning for Large Language Models via Knowledge Isolation", 2025, arXiv:2504.12996.
    """
    check_floating(forget_nll=forget_nll, retain_nll=retain_nll)
    check_broadcastable(jnp.shape(forget_nll), forget_where=forget_where)
    check_broadcastable(jnp.shape(retain_nll), retain_where=retain_where)
    forget, _ = _token_mean(forget_nll, forget_where, axis_name)
    retain, exists = _token_mean(retain_nll, retain_where, axis_name)
    first = jnp.asarray(epoch) == 0
    reference = state.retain_sum / jnp.maximum(state.retain_count, 1)
    adaptive = adaptive_retain_multiplier(retain, reference, base=base, maximum=maximum)
    multiplier = jnp.where(first | (state.retain_count == 0), base, adaptive)
    recorded = first & exists
    state = ConstrainedUnlearningState(
        state.retain_sum + jnp.where(recorded, jax.lax.stop_gradient(retain), 0.0),
        state.retain_count + recorded,
    )
    return (multiplier * retain - forget).astype(jnp.result_type(forget_nll)), state


def layer_filter(params: Any, layers: Iterable[int] = range(6), module: str = "mlp") -> Any:
    r"""The mask of one module's parameters in some of the layers.

    A leaf is selected where its path has the number of a layer, blocks/3 or layers_3, and further
    in the module: blocks/3/mlp/up/kernel, or model.layers.3.mlp.down_proj.weight.

    Args:
      params: a tree whose paths name the modules: nested dictionaries, `flax.nnx` states.
      layers: the numbers of the layers. Default 0 to 5, where the paper finds facts about subjects.
      module: the name of the module. Default "mlp".

    Returns:
      A tree of booleans like `params`.

    Raises:
      ValueError: no layers, or a layer that has no such module.

    Use it as the mask of `jaxref.optimizers.train_only`, after `causal_tracing` has shown which
    layers matter. The first number in a path is that of the layer; layers that are stacked in one
    array have none.

    Cost: a look at each path, no arrays.

    Example:
      >>> layer = {"attention": {"kernel": 0.0}, "mlp": {"kernel": 0.0}}
      >>> layer_filter({"blocks": [layer, layer]}, layers=[1])["blocks"][1]
      {'attention': {'kernel': False}, 'mlp': {'kernel': True}}

    Reference: Agrawal, Huang, "SHA256 at SemEval-2025 Task 4: Selective Amnesia -- Constrained
    Unlearning for Large Language Models via Knowledge Isolation", 2025, arXiv:2504.12996.
    """
    wanted = set(layers)
    found = set()

    def selected(path, _):
        parts = re.split(r"[/.]", jax.tree_util.keystr(path, simple=True, separator="/"))
        numbers = [re.search(r"(?:^|_)(\d+)$", part) for part in parts]
        place, number = next(((i, n) for i, n in enumerate(numbers) if n), (0, None))
        if number is None or module not in parts[place + 1 :]:
            return False
        layer = int(number[1])
        found.add(layer)
        return layer in wanted

    mask = jax.tree_util.tree_map_with_path(selected, params)
    if not wanted or wanted - found:
        raise ValueError(
            f"layers must be of those with a module {module!r}, {sorted(found)}, got "
            f"{sorted(wanted)}"
        )
    return mask


def causal_tracing(
    apply_fn: Callable[[Any, Array, Edit], Array],
    params: Any,
    embeddings: ArrayLike,
    subject: ArrayLike,
    target: ArrayLike,
    *,
    key: Array,
    noise_scale: float = 3.0,
    draws: int = 10,
    window: int = 1,
) -> CausalTrace:
    r"""In which layer and at which position a network looks up what it answers of a subject.

    Three kinds of runs: a clean one; corrupted ones, with noise on the embeddings of the subject;
    and corrupted ones in which the states of a layer at one position are those of the clean run.

        IE(layer, position) = mean p(target | corrupted, restored) - mean p(target | corrupted)

    over draws of the noise, which has `noise_scale` times the standard deviation of the entries of
    all subjects' embeddings. The same draws serve all places.

    Args:
      apply_fn: `(params, embeddings [batch, length, features], edit) -> logits [batch, classes]` of
        the token that follows. It passes the state `[batch, length, ...]` of each layer through
        `edit(layer, state)` and goes on with what comes back; layers count from 0, in Python, not
        in a scan. What a state is, is its choice: the output of a layer, of its MLP, or of its
        attention.
      params: what `apply_fn` takes.
      embeddings: `[prompts, length, features]` floating point, of prompts of one length.
      subject: boolean, broadcastable to `[prompts, length]`: the tokens of the subject.
      target: ids `[prompts]` of the answers. One that is no class gives NaN.
      key: of the noise.
      noise_scale: at least 0. Default 3, the authors'.
      draws: of the noise for each prompt, at least 1. Default 10.
      window: how many layers are restored together, at least 1, centred at the one that is named.
        Default 1; the authors take 10 for the outputs of MLPs and of attention.

    Returns:
      `CausalTrace`, in the type of `embeddings`.

    Raises:
      ValueError: shapes that do not match, a number out of its range, or an `apply_fn` that edits
        nothing.
      TypeError: embeddings that are not floating point, or targets that are not integers.

    Use it on facts that the model knows, whose clean probability is high, and average over prompts
    by the role of their positions: first and last token of the subject, those after it.

    Cost: layers · length forward passes of prompts · draws sequences, one after the other in one
    program; the clean states of all layers in memory.

    Example:
      >>> def apply_fn(params, x, edit):
      ...     x = edit(0, x)
      ...     return edit(1, jnp.cumsum(x, axis=1))[:, -1]
      >>> embeddings = 9 * jnp.eye(3)[None, :2]
      >>> subject, target = jnp.array([True, False]), jnp.array([0])
      >>> trace = causal_tracing(apply_fn, None, embeddings, subject, target, key=jax.random.key(0))
      >>> print((trace.indirect_effect[0] > 0.1).astype(int))
      [[1 0]
       [0 1]]

    Reference: Agrawal, Huang, "SHA256 at SemEval-2025 Task 4: Selective Amnesia -- Constrained
    Unlearning for Large Language Models via Knowledge Isolation", 2025, arXiv:2504.12996; causal
    tracing is of Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT",
    2022, arXiv:2202.05262.
    """
    check_interval(0, jnp.inf, noise_scale=noise_scale)
    check_interval(1, jnp.inf, draws=draws, window=window)
    check_floating(embeddings=embeddings)
    if jnp.ndim(embeddings) != 3:
        raise ValueError(
            f"embeddings must have shape [prompts, length, features], got {jnp.shape(embeddings)}"
        )
    clean = jnp.asarray(embeddings)
    prompts, length, features = clean.shape
    check_broadcastable((prompts, length), subject=subject)
    check_shape((prompts,), target=target)
    if not jnp.issubdtype(jnp.result_type(target), jnp.integer):
        raise TypeError(f"target must be integers, got {jnp.result_type(target).name}")
    answers = jnp.tile(jnp.asarray(target), draws)
    disturbed = jnp.broadcast_to(jnp.asarray(subject, bool), (prompts, length))[..., None]
    wide = clean.astype(compute_dtype(clean))
    deviation = jnp.std(wide, where=disturbed)
    noise = jax.random.normal(key, (draws, *clean.shape), wide.dtype)
    corrupted = jnp.where(disturbed, wide + noise_scale * deviation * noise, wide)
    corrupted = corrupted.astype(clean.dtype).reshape(-1, length, features)

    states: list[Array] = []

    def record(layer: int, state: Array) -> Array:
        if layer != len(states):
            raise ValueError(
                f"apply_fn must call edit once for each layer, in order, got layer {layer} after "
                f"{len(states)} others"
            )
        states.append(state)
        return state

    known = expected_over_labels(jnp.exp, target, apply_fn(params, clean, record))
    if not states:
        raise ValueError("apply_fn must pass the state of each layer through edit, got no call")

    def corrupted_probability(edit: Edit) -> Array:
        p = expected_over_labels(jnp.exp, answers, apply_fn(params, corrupted, edit))
        return jnp.mean(p.reshape(draws, prompts), axis=0)

    def restored_probability(place: Array) -> Array:
        centre, position = place

        def restore(layer: int, state: Array) -> Array:
            near = (layer >= centre - window // 2) & (layer < centre + (window + 1) // 2)
            here = near & (jnp.arange(length) == position)
            here = here.reshape(-1, *[1] * (state.ndim - 2))
            each = state.reshape(draws, *states[layer].shape)
            return jnp.where(here, states[layer], each).reshape(state.shape)

        return corrupted_probability(restore)

    unknown = corrupted_probability(lambda layer, state: state)
    places = jnp.stack(jnp.divmod(jnp.arange(len(states) * length), length), axis=-1)
    effects = jax.lax.map(restored_probability, places) - unknown
    effects = effects.T.reshape(prompts, len(states), length)
    return CausalTrace(*(x.astype(clean.dtype) for x in (effects, known, unknown)))


def _token_mean(
    nll: ArrayLike, where: ArrayLike | None, axis_name: AxisName | None
) -> tuple[Array, Array]:
    """The mean over the tokens of all shards, 0 without any, and whether there is one."""
    values = jnp.asarray(nll)
    counted = jnp.broadcast_to(True if where is None else where, values.shape)
    total = jnp.sum(values.astype(compute_dtype(values)), where=counted)
    total, count = sum_over_shards((total, jnp.count_nonzero(counted)), axis_name)
    return total / jnp.maximum(count, 1), count > 0
