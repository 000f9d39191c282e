"""FRUGAL: moments for a part of the gradient, a step without state for the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.optimizers.adamw import scale_by_adam
from jaxref.optimizers.common import descend, momentum_trace, store, widen
from jaxref.optimizers.lion import scale_by_lion
from jaxref.optimizers.projectors import (
    Projector,
    block_projector,
    column_projector,
    random_coordinate_projector,
    random_orthogonal_projector,
    row_projector,
    svd_projector,
)

_PROJECTORS = {
    "blockwise": block_projector,
    "columns": column_projector,
    "rows": row_projector,
    "coordinates": random_coordinate_projector,
    "svd": svd_projector,
    "random": random_orthogonal_projector,
}
_STATE_FREE = {"sign_sgd": jnp.sign, "sgd": lambda x: x, "none": jnp.zeros_like}
_OUTPUT_NAMES = {"output", "head", "lm_head", "classifier", "logits"}


class ScaleByFrugalState(NamedTuple):
    """State of `scale_by_frugal`.

    Attributes:
      count: int32 scalar, the steps taken.
      key: uint32, the data of the random key from which the bases are drawn.
      basis: the projector's basis.
      always: the state-full direction's state for the parameters that are not split.
      projected: its state for the low-dimensional part of those that are.

    `basis` and the trees of the last two are trees like the parameters, with a scalar 0 for what
    they do not hold. The other arrays have shapes of their own, with density times the entries;
    a program that shards state by the shapes of the parameters has to replicate them.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    key: Array
    basis: Any
    always: optax.OptState
    projected: optax.OptState


def scale_by_frugal(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    *,
    state_full: str | optax.GradientTransformation = "adam",
    state_free: str = "sign_sgd",
    projection: str | Projector = "blockwise",
    density: float = 0.25,
    update_gap: ArrayLike = 200,
    state_free_lr_scale: ArrayLike = 1.0,
    projected_lr_scale: ArrayLike = 1.0,
    reset_state: bool = True,
    projectable: Callable[[tuple], bool] | None = None,
    key: Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of FRUGAL: state-full in a subspace, state-free in its complement.

        every `update_gap` steps:  draw the basis P, from g and the key, and forget the state
        u = a (Pᵀ(direction(P(g))) + c F(g - Pᵀ(P(g))))      of the parameters that are split
        u = direction(g)                                     of all others

    with F(x) = sign(x), x or 0, and sign(0) = 0.

    Args:
      b1, b2, eps: of the state-full direction: b1 and b2 in [0, 1), eps at least 0. Adam has all
        three, Lion b1 and b2, momentum b1. Defaults 0.9, 0.999 and 1e-8, which are Adam's; Lion's
        b2 is 0.99.
      mu_dtype: the floating type of the first moment; None takes the parameters'.
      state_full: "adam", "sgdm" (m ← b1 m + g), "lion", or an optax transformation g → u(g), to
        which the four arguments above do not apply. It gets no params.
      state_free: F: "sign_sgd", the sign; "sgd", the identity; "none", 0.
      projection: "blockwise", "columns", "rows", "coordinates", "svd" or "random"; see
        `block_projector` and its neighbours. Or a `Projector`, which has a density of its own.
      density: in [0, 1], the fraction of the space of the parameters that are split which the
        moments cover. Default 0.25. Static, as it fixes shapes (`static_args` of
        `optax.inject_hyperparams`).
      update_gap: at least 1, the steps from one basis to the next. Default 200.
      state_free_lr_scale: c at least 0. Default 1, the authors' for pre-training; they fine-tune
        with 0.1.
      projected_lr_scale: a at least 0. Default 1.
      reset_state: whether a new basis starts with fresh moments and a fresh count of steps, as
        in the paper, or, as in GaLore, with those of the old basis.
      projectable: path of a leaf, as of `jax.tree_util`, → whether it is split, asked for leaves of
        at least two dimensions; others are not. Default: those without "embed" in their path and
        not of an output layer: "head", "lm_head", "classifier" or "logits" in the path, or
        "output" where it begins (what follows in a block projects out of attention, say).
      key: a random key, or an integer that makes one.

    Returns:
      the transformation; its updates have the gradients' types, and are computed in at least
      float32. Its state is a `ScaleByFrugalState`.

    Raises:
      ValueError: a number out of its range, an unknown name; in `update`, trees that do not match.
      TypeError: `mu_dtype` is not floating point; `state_full` or `projection` is neither a name
        nor the object it stands for.

    Use it in an `optax.chain` of one's own; `frugal` is the whole optimizer.

    Cost: `density` of the state for parameters that are split, and their basis, redrawn every
    `update_gap` steps.

    Example:
      >>> direction = scale_by_frugal(projection="columns", density=0.5)
      >>> gradient = jnp.array([[3.0, -0.1], [0.2, 0.0]])
      >>> state = direction.init(gradient)
      >>> print(direction.update(gradient, state)[0].round(3), state.projected.mu.shape)
      [[ 1. -1.] [ 1. 0.]] (2, 1)

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837.
    """
    if isinstance(state_full, str):
        makers = {
            "adam": lambda: scale_by_adam(b1, b2, eps, mu_dtype),
            "sgdm": lambda: _momentum(b1, mu_dtype),
            "lion": lambda: scale_by_lion(b1, b2, mu_dtype),
        }
        state_full = _named(makers, state_full=state_full)()
    elif not isinstance(state_full, optax.GradientTransformation):
        raise TypeError(f"state_full must be a name or an optax transformation, got {state_full!r}")
    if isinstance(projection, str):
        projector = _named(_PROJECTORS, projection=projection)(density)
    elif isinstance(projection, Projector):
        projector = projection
    else:
        raise TypeError(f"projection must be a name or a Projector, got {projection!r}")
    free_step = _named(_STATE_FREE, state_free=state_free)
    check_interval(1, jnp.inf, update_gap=update_gap)
    check_interval(
        0,
        jnp.inf,
        state_free_lr_scale=state_free_lr_scale,
        projected_lr_scale=projected_lr_scale,
    )
    full = optax.with_extra_args_support(state_full)
    is_projectable = _is_inner_kernel if projectable is None else projectable

    def parts(tree):
        """Which leaves are split; the others alone; these alone."""
        split = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.ndim(x) >= 2 and bool(is_projectable(path)), tree
        )
        absent = jax.tree.map(lambda x: jnp.zeros([], jnp.result_type(x)), tree)
        always = jax.tree.map(lambda s, x, zero: zero if s else x, split, tree, absent)
        projected = jax.tree.map(lambda s, x, zero: x if s else zero, split, tree, absent)
        return split, always, projected

    def draw(key, count, tree):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        return projector.draw(key, count // update_gap, tree)

    def init(params):
        _, always, projected = parts(params)
        count, data = jnp.zeros([], jnp.int32), _key_data(key)
        shapes = jax.eval_shape(draw, data, count, projected)
        basis = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        low, _ = projector.split(basis, jax.tree.map(jnp.zeros_like, projected))
        return ScaleByFrugalState(count, data, basis, full.init(always), full.init(low))

    def update(updates, state, params=None, **extra_args):
        if params is not None:
            check_same_tree(updates, params=params)
        structure: Any = jax.tree.structure(state.basis)
        if jax.tree.structure(updates) != structure:
            raise ValueError(
                f"updates must have the tree structure {structure}, "
                f"got {jax.tree.structure(updates)}"
            )
        split, always, projected = parts(widen(updates))
        is_new = state.count % update_gap == 0
        basis = jax.lax.cond(
            is_new, lambda: draw(state.key, state.count, projected), lambda: state.basis
        )
        low, rest = projector.split(basis, projected)
        inner = state.projected
        if reset_state:
            inner = jax.tree.map(
                lambda fresh, old: jnp.where(is_new, fresh.astype(old.dtype), old),
                full.init(jax.tree.map(jnp.zeros_like, low)),
                inner,
            )
        always, always_state = full.update(always, state.always, None, **extra_args)
        low, inner = full.update(low, inner, None, **extra_args)
        free = jax.tree.map(lambda g: state_free_lr_scale * free_step(g), rest)
        joined = projector.join(basis, low, free)
        direction = jax.tree.map(
            lambda s, u, v: projected_lr_scale * v if s else u, split, always, joined
        )
        count = optax.safe_increment(state.count)
        state = ScaleByFrugalState(count, state.key, basis, always_state, inner)
        return store(direction, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    state_full: str | optax.GradientTransformation = "adam",
    state_free: str = "sign_sgd",
    projection: str | Projector = "blockwise",
    density: float = 0.25,
    update_gap: ArrayLike = 200,
    state_free_lr_scale: ArrayLike = 1.0,
    projected_lr_scale: ArrayLike = 1.0,
    reset_state: bool = True,
    projectable: Callable[[tuple], bool] | None = None,
    key: Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""FRUGAL: Adam in a subspace that changes now and then, signSGD in the rest of the space.

        every `update_gap` steps:  draw the basis P, from g and the key, and forget the moments
        x ← x - lr (a (Pᵀ(Adam(P(g))) + c sign(g - Pᵀ(P(g)))) + wd x)

    Only P(g) has moments, and still every direction of the space is trained at every step: the
    update has full rank. Embeddings, the output layer, biases and scales, which are few or need it,
    keep all of their moments: x ← x - lr (Adam(g) + wd x).

    Special cases: density 0 is signSGD with decoupled decay; density 1 is AdamW, but for "svd" and
    "random", where it is Adam in a rotated space; state_free="none" is BAdam for "blockwise", and
    with reset_state=False GaLore for "svd".

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      b1, b2, eps: of the state-full direction: b1 and b2 in [0, 1), eps at least 0. Defaults 0.9,
        0.999 and 1e-8.
      mu_dtype: the floating type of the first moment; None takes the parameters'.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. Default 0.
      mask: tree of booleans, or a function that makes one of the gradients: what to decay.
      state_full: "adam", "sgdm", "lion", or an optax transformation g → u(g).
      state_free: "sign_sgd", "sgd" or "none".
      projection: "blockwise", "columns", "rows", "coordinates", "svd" or "random", or a
        `Projector`.
      density: in [0, 1], the fraction of the space that has moments. Default 0.25. Static.
      update_gap: at least 1, the steps from one basis to the next. Default 200.
      state_free_lr_scale: c at least 0. Default 1; 0.1 to fine-tune.
      projected_lr_scale: a at least 0. Default 1.
      reset_state: whether the moments start afresh with each basis. Default True.
      projectable: path of a leaf → whether it is split. Default: all kernels but embeddings and
        the output layer, by their names.
      key: a random key, or an integer that makes one.

    More on the last ten is in `scale_by_frugal`.

    Returns:
      the transformation; its updates have the gradients' types.

    Raises:
      ValueError: a number out of its range, an unknown name; in `update`, trees that do not match,
        or params missing where `weight_decay` needs them.
      TypeError: `mu_dtype` is not floating point; `state_full` or `projection` is neither a name
        nor the object it stands for.

    Use it to pre-train where AdamW's moments do not fit. `adam_8bit` keeps all moments in a quarter
    of the memory; `lisa` leaves the rest of the parameters as they are.

    Cost: `density` of `adamw`'s two moments for the kernels, all of them elsewhere; one gradient a
    step, and a new basis every `update_gap` steps.

    Example:
      >>> optimizer = frugal(0.1, projection="rows", weight_decay=0.5)
      >>> x = jnp.ones((4, 1))
      >>> state = optimizer.init(x)
      >>> print(optimizer.update(jnp.full((4, 1), -3.0), state, x)[0].T.round(4))
      [[0.05 0.05 0.05 0.05]]

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837.
    """
    direction = scale_by_frugal(
        b1,
        b2,
        eps,
        mu_dtype,
        state_full=state_full,
        state_free=state_free,
        projection=projection,
        density=density,
        update_gap=update_gap,
        state_free_lr_scale=state_free_lr_scale,
        projected_lr_scale=projected_lr_scale,
        reset_state=reset_state,
        projectable=projectable,
        key=key,
    )
    return descend(direction, learning_rate, weight_decay, mask)


def _named(table, **argument):
    ((name, value),) = argument.items()
    if value not in table:
        raise ValueError(f"{name} must be one of {', '.join(table)}, got {value!r}")
    return table[value]


def _momentum(b1, mu_dtype):
    check_interval(0, 1, closed="left", b1=b1)
    return momentum_trace(b1, mu_dtype)


def _key_data(key):
    if isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(key)
    return jnp.asarray(key) if jnp.ndim(key) else jax.random.key_data(jax.random.key(key))


def _is_inner_kernel(path):
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    is_output = names[:1] == ["output"] or not _OUTPUT_NAMES.isdisjoint(set(names) - {"output"})
    return not is_output and not any("embed" in name.lower() for name in names)
