"""Training a part of the parameters: the norms' scales and biases, or entries drawn at random."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxref.core.checks import canonical_axes, check_shape
from jaxref.optimizers.common import broadcast_mask


class TrainOnlyState(NamedTuple):
    """State of `train_only`.

    Attributes:
      inner_state: the state of the transformation, an `optax.MaskedState` without the leaves that
        are not trained at all.
      entries: a tree like the parameters: which entries are trained in the leaves that are trained
        in part, booleans of the leaf's shape; `optax.MaskedNode()` for other leaves.
    """

    inner_state: optax.OptState
    entries: Any


def train_only(
    transform: optax.GradientTransformation, mask: Any | Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    r"""The transformation for the parameters of a mask; all others stay as they are, to the bit.

        u = M ⊙ transform(M ⊙ g)

    Weight decay, momentum and whatever else moves parameters belongs inside: nothing of it reaches
    what is frozen. The state holds no moments for leaves that are not trained at all.

    Args:
      transform: the whole optimizer, weight decay and learning rate included.
      mask: M, a tree of booleans, or a function that makes one of the parameters: True trains a
        leaf, or a whole part of the tree as in `optax.masked`, False freezes it, and an array of
        booleans of the leaf's shape trains some of its entries. A function is called at `init`
        with the parameters, for the arrays, and at each `update` with the gradients, for the
        booleans.

    Returns:
      the transformation; extra arguments of `update` go to `transform`. Its state is a
      `TrainOnlyState`.

    Raises:
      ValueError: a mask of another structure than the parameters, or an array in it of another
        shape than its leaf.
      TypeError: a leaf of the mask is neither a boolean nor an array of booleans.

    Use it to train a part of a model and freeze the rest to the bit, with masks as of
    `norm_parameters_only`; `optax.masked` by itself passes the gradients of other leaves on as
    their updates.

    Cost: the state of `transform` for the leaves that are trained, and a boolean an entry for those
    trained in part.

    A rule that takes norms of whole leaves, as a trust ratio does, sees the frozen entries of a
    leaf that is trained in part.

    Example:
      >>> params = {"norm": jnp.array([1.0]), "kernel": jnp.array([2.0, 2.0])}
      >>> mask = {"norm": True, "kernel": jnp.array([True, False])}
      >>> optimizer = train_only(optax.sgd(0.5), mask)
      >>> print(optimizer.update(params, optimizer.init(params))[0])
      {'kernel': Array([-1., -0.], dtype=float32), 'norm': Array([-0.5], dtype=float32)}

    Reference: Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm: On the Expressive
    Power of Random Features in CNNs", 2020, arXiv:2003.00152.
    """

    def trained(tree):
        """Which leaves are trained, be it in part."""
        return jax.tree.map(lambda m: not _is_boolean(m) or bool(m), broadcast_mask(mask, tree))

    inner = optax.masked(transform, trained, mask_compatible_extra_args=True)

    def init(params):
        # Without leaves there is nothing to ask the mask: so it is where optax seeks the leaves
        # of the state that are like the parameters, with a placeholder in their stead.
        entries = (
            _entries(broadcast_mask(mask, params), params) if jax.tree.leaves(params) else params
        )
        return TrainOnlyState(inner.init(params), entries)

    def update(updates, state, params=None, **extra_args):
        flags = trained(updates)

        def keep(gradients, outside):
            return jax.tree.map(
                lambda flag, entry, g: (
                    _where(entry, g, outside) if flag else jnp.full_like(g, outside)
                ),
                flags,
                state.entries,
                gradients,
            )

        updates, inner_state = inner.update(
            keep(updates, 0.0), state.inner_state, params, **extra_args
        )
        # x + 0 would turn a parameter that is -0 into +0; x + (-0) is x, always.
        return keep(updates, -0.0), TrainOnlyState(inner_state, state.entries)

    return optax.GradientTransformationExtraArgs(init, update)


def norm_parameters_only(
    params: Any,
    names: tuple[str, ...] = ("scale", "bias"),
    within: tuple[str, ...] = ("norm", "^bn"),
) -> Any:
    r"""The mask of the affine parameters γ and β of the normalisation layers.

    A leaf is selected where its own name is one of `names` and the module it lies in matches
    `within`: blocks/0/attention/input_norm/scale, BatchNorm_0/bias, bn1/scale, norms/3/bias.

    Args:
      params: a tree whose paths name the modules: nested dictionaries, `flax.nnx` states, Equinox
        modules. Names that hold several parts, "encoder/norm", are taken apart.
      names: the names of the leaves. Default scale and bias, as flax has them.
      within: regular expressions, of which one must be found in the name of the innermost module
        around the leaf, indices passed over, upper or lower case. Default: a name with "norm" in
        it or that starts with "bn". ("^BatchNorm",) takes those alone.

    Returns:
      a tree of booleans like `params`.

    Raises:
      ValueError: no leaf is selected.

    Use it as the mask of `train_only`, to train the normalisation alone; `random_parameter_subset`
    is its control.

    Cost: a walk over the names, before training.

    Pass the function itself where a mask may be one. Statistics that a layer gathers are no
    parameters and go on as they do.

    Example:
      >>> layer = {"conv": {"kernel": 1.0, "bias": 0.0}, "norm": {"scale": 1.0, "bias": 0.0}}
      >>> norm_parameters_only(layer)
      {'conv': {'bias': False, 'kernel': False}, 'norm': {'bias': True, 'scale': True}}

    Reference: Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm: On the Expressive
    Power of Random Features in CNNs", 2020, arXiv:2003.00152.
    """

    def selected(path, _):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if parts[-1] == "value" and "value" not in names:  # of an nnx.Variable
            parts.pop()
        *modules, name = parts
        module = next((m for m in reversed(modules) if not m.isdigit()), "")
        return name in names and any(re.search(w, module, re.IGNORECASE) for w in within)

    mask = jax.tree_util.tree_map_with_path(selected, params)
    if not any(jax.tree.leaves(mask)):
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        raise ValueError(
            f"params must have a leaf named one of {names} in a module that matches one of "
            f"{within}, got {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}"
        )
    return mask


def random_parameter_subset(
    key: Array,
    params: Any,
    count_per_channel: int = 2,
    *,
    mask: Any | Callable[[Any], Any] | None = None,
    channel_axis: int = -1,
) -> Any:
    r"""The mask of as many entries, drawn at random, in each output channel of the kernels.

    The control for `norm_parameters_only`: two weights of every channel in place of its γ and β.

    Args:
      key: a PRNG key; each leaf draws with its own.
      params: the parameters.
      count_per_channel: entries to a channel, at least 1, drawn without replacement. Default 2.
      mask: tree of booleans, or a function that makes one of the parameters: the kernels to draw
        from. None (the default) takes the leaves of two or more dimensions; the paper leaves out
        the output layer.
      channel_axis: the axis of the output channels of each kernel. Default the last.

    Returns:
      a tree like `params`, for `train_only`: booleans of the kernel's shape where it is drawn
      from, False for other leaves and those without entries.

    Raises:
      ValueError: a channel with fewer entries than `count_per_channel`, `count_per_channel` no
        integer of at least 1, or a leaf without `channel_axis`.

    Use it with `train_only` to tell whether `norm_parameters_only` owes its accuracy to γ and β or
    to the number of parameters alone.

    Cost: a random permutation of each channel, before training; a boolean for each entry of the
    kernels.

    Example:
      >>> params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
      >>> drawn = random_parameter_subset(jax.random.key(0), params)
      >>> print(drawn["kernel"].sum(axis=0), drawn["bias"])
      [2 2 2] False

    Reference: Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm: On the Expressive
    Power of Random Features in CNNs", 2020, arXiv:2003.00152.
    """
    if not isinstance(count_per_channel, int) or count_per_channel < 1:
        raise ValueError(
            f"count_per_channel must be an integer of at least 1, got {count_per_channel!r}"
        )
    kernels = (
        (lambda tree: jax.tree.map(lambda x: jnp.ndim(x) >= 2, tree)) if mask is None else mask
    )

    def draw(path, x, is_kernel, key):
        if not is_kernel or jnp.size(x) == 0:
            return False
        name = f"params{jax.tree_util.keystr(path)}"
        (axis,) = canonical_axes(channel_axis, jnp.ndim(x), name=f"channel_axis of {name}")
        channels, *others = moved = jnp.moveaxis(x, axis, 0).shape
        if count_per_channel > math.prod(others):
            raise ValueError(
                f"count_per_channel must be at most {math.prod(others)}, the entries of a channel "
                f"of {name} of shape {jnp.shape(x)}, got {count_per_channel}"
            )
        chosen = jnp.arange(math.prod(others)) < count_per_channel
        rows = jnp.broadcast_to(chosen, (channels, chosen.size))
        drawn = jax.random.permutation(key, rows, axis=1, independent=True)
        return jnp.moveaxis(drawn.reshape(moved), 0, axis)

    leaves, structure = jax.tree.flatten(params)
    keys = jax.tree.unflatten(structure, jax.random.split(key, len(leaves)))
    return jax.tree_util.tree_map_with_path(draw, params, broadcast_mask(kernels, params), keys)


def _is_boolean(leaf):
    """Whether a leaf of a mask speaks for the whole leaf of the parameters."""
    return isinstance(leaf, bool) or (jnp.shape(leaf) == () and not isinstance(leaf, Array))


def _entries(mask, params):
    """The leaves of the mask that are arrays, checked; `optax.MaskedNode()` for booleans."""

    def leaf(path, m, x):
        if not jnp.issubdtype(jnp.result_type(m), jnp.bool_):
            raise TypeError(
                f"mask{jax.tree_util.keystr(path)} must be a boolean or an array of booleans, "
                f"got {m!r}"
            )
        if _is_boolean(m):
            return optax.MaskedNode()
        check_shape(jnp.shape(x), **{"mask" + jax.tree_util.keystr(path): m})
        return jnp.asarray(m)

    return jax.tree_util.tree_map_with_path(leaf, mask, params)


def _where(entry, x, outside):
    """`x` at the entries that are trained: all, or those of an array of booleans."""
    return x if isinstance(entry, optax.MaskedNode) else jnp.where(entry, x, outside)
