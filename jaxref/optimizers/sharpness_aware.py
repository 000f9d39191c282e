"""SAM: the gradient at the worst point near the parameters; adaptive and per-shard forms.

`sharpness_aware_free.py` has SAF and MESA, which do without the second gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers.lion_kappa import l1, lp, top_k_l1

_Flags = Any | Callable[[optax.Params], Any]  # a tree of booleans, or what makes one of a tree


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    rho: ArrayLike = 0.05,
    *,
    p: float = 2,
    adaptive: _Flags = False,
    eta: ArrayLike = 0.01,
    mask: _Flags = True,
    has_aux: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    sync_perturbation: bool = False,
    micro_batches: int = 1,
) -> Callable[..., tuple[Any, optax.Updates]]:
    r"""Sharpness-aware minimization: the loss here, its gradient at the worst point nearby.

        g = ∇L(w)
        e = argmax ⟨g, e⟩ over ‖e‖_p ≤ rho          (see `sam_perturbation`)
        the result: L(w) and ∇L(w + e), e taken as a constant

    It stands where `jax.value_and_grad(loss_fn)` would; any optimizer takes its gradients. Both
    passes see the same arguments, and so the same dropout keys.

    Args:
      loss_fn: (params, *args, **kwargs) → the loss, a scalar, or (loss, aux) with `has_aux`.
      rho: at least 0, the radius. Default 0.05; the paper tries 0.01 to 0.5. The adaptive form
        wants about ten times as much: its paper takes 0.5 to 2. 0 is `jax.value_and_grad`.
      p: of the norm of e, at least 1; `math.inf` gives sign steps. Default 2.
      adaptive: whether the radius is measured in units of |w| + eta (ASAM): a boolean, a tree of
        booleans, or a function that makes one of the params. ASAM's authors leave biases out.
      eta: at least 0, used with `adaptive`: what a weight of 0 counts as. Default 0.01.
      mask: boolean, tree of booleans (a prefix of the params' will do), or a function that makes
        one of the params: which leaves are perturbed. All have gradients.
      has_aux: whether `loss_fn` returns (loss, aux). The aux is that of the pass at w, so that
        statistics of batch normalisation belong to the parameters and not to w + e.
      axis_name: name of the axis (or axes) that the batch is sharded over, inside `shard_map`,
        where params are the same on each shard. Value and gradients then are means over it.
      sync_perturbation: with `axis_name`. By default every shard perturbs by the gradient of its
        own examples (m-sharpness, m the examples of a shard), which takes no communication
        besides that of the result; True takes the mean of their gradients, which takes as much
        again. The paper finds small m to generalise better.
      micro_batches: at least 1. With n above 1 every array in `args` and `kwargs` that has a
        leading axis is split along it, rows i, i + n, i + 2n, ... to micro-batch i (so that each
        has its part of what every device holds); a scalar typed random key is split with
        `jax.random.split`; anything else is the same for all. Each micro-batch perturbs by its
        own gradient, one after the other; the results are means.

    Returns:
      the function (params, *args, **kwargs) → (value, gradients), or ((value, aux), gradients)
      with `has_aux`; gradients have the params' types. With `axis_name` aux is of the shard's own
      examples; with n > 1 micro-batches its leaves get a leading axis of length n. Where the loss
      or gradient at w is not finite, gradients are not either, in general: NaN or inf go through,
      for `optax.apply_if_finite` around the optimizer to see.

    Raises:
      ValueError: a number out of its range, `micro_batches` that is no integer of at least 1,
        `sync_perturbation` without `axis_name`; in the function, a leading axis that
        `micro_batches` does not divide, or leading axes of different lengths.
      TypeError: as `jax.value_and_grad`, for params that are not floating point.

    Use it where generalisation matters more than time, or where labels are noisy; `saf_loss` and
    `mesa_loss` aim at the same for about one gradient.

    Cost: two gradients a step, one after the other, and a second copy of the parameters; no state.

    w + e is rounded to the type of w: keep params in float32 (and cast in `loss_fn`), in bfloat16
    most of e is lost. Under `jit` with a sharded batch and no `axis_name`, g is the gradient of the
    whole batch.

    Example:
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2) / 2
      >>> value, gradient = sam_value_and_grad(loss, rho=0.5)(jnp.array([2.0]), jnp.ones((4, 1)))
      >>> print(value, gradient)
      2.0 [2.5]

    Reference: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
    Improving Generalization", 2020, arXiv:2010.01412; the adaptive form: Kwon, Kim, Park, Choi,
    "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks", 2021, arXiv:2102.11600.
    """
    _check(rho, p, eta)
    if sync_perturbation and axis_name is None:
        raise ValueError("axis_name must be given with sync_perturbation=True, got None")
    if not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"micro_batches must be an integer of at least 1, got {micro_batches!r}")

    def loss_and_aux(*args, **kwargs):
        output = loss_fn(*args, **kwargs)
        return output if has_aux else (output, None)

    value_and_grad = jax.value_and_grad(loss_and_aux, has_aux=True)

    def one_batch(params, args, kwargs):
        output, gradients = value_and_grad(params, *args, **kwargs)
        if sync_perturbation:
            gradients = jax.lax.pmean(gradients, axis_name)
        e = _perturbation(gradients, params, rho, p, adaptive, eta, mask)
        _, gradients = value_and_grad(_perturbed(params, e), *args, **kwargs)
        return output, gradients

    def each_micro_batch(params, args, kwargs):
        slices, join = _split((args, kwargs), micro_batches)

        def add(total, one_slice):
            output, gradients = one_batch(params, *join(one_slice))
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients), output

        zeros = jax.tree.map(lambda w: jnp.zeros_like(w, dtype=compute_dtype(w)), params)
        total, (values, aux) = jax.lax.scan(add, zeros, slices)
        mean = jax.tree.map(
            lambda t, w: (t / micro_batches).astype(jnp.result_type(w)), total, params
        )
        return (jnp.mean(values), aux), mean

    def sam(params, *args, **kwargs):
        if axis_name is not None:
            # Replicated params would have their gradients summed over the axis on the way. Through
            # this condition, which is true everywhere, each shard has params of its own.
            here = jax.lax.axis_index(axis_name) >= 0
            params = jax.tree.map(lambda w: jnp.where(here, w, w), params)
        evaluate = one_batch if micro_batches == 1 else each_micro_batch
        (value, aux), gradients = evaluate(params, args, kwargs)
        if axis_name is not None:
            value, gradients = jax.lax.pmean((value, gradients), axis_name)
        return (value, aux) if has_aux else value, gradients

    return sam


def sam_perturbation(
    gradients: optax.Updates,
    rho: ArrayLike = 0.05,
    params: optax.Params | None = None,
    *,
    p: float = 2,
    adaptive: _Flags = False,
    eta: ArrayLike = 0.01,
    mask: _Flags = True,
) -> optax.Updates:
    r"""The step of norm rho along which a gradient promises the largest increase.

        e = rho sign(g) (|g| / ‖g‖_q)^{q-1},     1/p + 1/q = 1

    It maximises ⟨g, e⟩ over ‖e‖_p ≤ rho, and attains rho ‖g‖_q; norms are over all leaves. For
    p = 2 it is rho g / ‖g‖₂, for p = ∞ rho sign(g), for p = 1 all on the largest coordinate (in
    equal parts where several are). With T = |w| + eta, elementwise, the adaptive form maximises
    over ‖e / T‖_p ≤ rho:

        e = rho T sign(g) (T |g| / ‖T g‖_q)^{q-1},     for p = 2  rho T² g / ‖T g‖₂

    With eta = 0 it is as large for a layer scaled up as it is for the layer, in proportion.

    Args:
      gradients: g, a tree.
      rho: at least 0, the radius. Default 0.05; about ten times as much for the adaptive form.
      params: w, a tree like the gradients; only the adaptive form needs it.
      p: at least 1, or `math.inf`. Default 2.
      adaptive: boolean, tree of booleans or a function that makes one of the params: the leaves
        with T = |w| + eta; the others have T = 1. Default False.
      eta: at least 0. Default 0.01, as in the ASAM authors' code.
      mask: boolean, tree of booleans or a function that makes one of the params (without them of
        the gradients): the leaves to perturb; the others have e = 0 and no part in the norm.
        Default True.

    Returns:
      e, a tree like the gradients, in their types and computed in at least float32; 0 where all
      gradients are 0.

    Raises:
      ValueError: a number out of its range; params that are missing where `adaptive` needs them,
        or of another structure or shape than the gradients.

    Use it for a loop of one's own; `sam_value_and_grad` is the whole method.

    Cost: a norm over all parameters, and an array for each of them.

    Example:
      >>> print(sam_perturbation(jnp.array([3.0, -4.0]), rho=0.5))
      [ 0.3 -0.4]

    Reference: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
    Improving Generalization", 2020, arXiv:2010.01412; the adaptive form: Kwon, Kim, Park, Choi,
    "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks", 2021, arXiv:2102.11600.
    """
    _check(rho, p, eta)
    if params is not None:
        check_same_tree(gradients, params=params)
    e = _perturbation(gradients, params, rho, p, adaptive, eta, mask)
    return jax.tree.map(lambda e, g: e.astype(jnp.result_type(g)), e, gradients)


def sharpness(
    loss_fn: Callable[[optax.Params], Array],
    params: optax.Params,
    rho: ArrayLike = 0.05,
    *,
    steps: int = 1,
    p: float = 2,
    adaptive: _Flags = False,
    eta: ArrayLike = 0.01,
    mask: _Flags = True,
) -> Array:
    r"""How much the loss rises within the distance rho, along the gradient: SAM's sharpness.

        L(w + e) - L(w),     e ← argmax ⟨∇L(w + e), e'⟩ over ‖e'‖_p ≤ rho, from e = 0

    A lower bound of max L(w + e) - L(w) over the ball: with one step the first-order guess at it
    that SAM takes; each further one asks for the gradient again, at the point found. On a convex
    loss no step makes it smaller, and near a minimum it approaches rho² / 2 times the largest
    eigenvalue of the Hessian for p = 2.

    Args:
      loss_fn: params → the loss, a scalar.
      params: w, a tree of floating-point arrays.
      rho: at least 0, the radius. Default 0.05.
      steps: at least 1, how often e is renewed. Default 1.
      p: at least 1, or `math.inf`. Default 2.
      adaptive: for the adaptive sharpness, as of `sam_value_and_grad`. Default False.
      eta: at least 0. Default 0.01.
      mask: which leaves may move, as of `sam_value_and_grad`. Default True: all.

    Returns:
      the scalar, in the type of the loss; 0 where the gradient is 0.

    Raises:
      ValueError: a number out of its range, or `steps` that is no integer of at least 1.

    Use it to compare minima at one rho; the adaptive form to compare networks whose layers differ
    in scale.

    Cost: `steps` gradients and two evaluations of the loss; a second copy of the parameters.

    Example:
      >>> print(sharpness(lambda w: 3 * jnp.sum(w**2), jnp.array([1.0, 0.0]), rho=1.0))
      9.0

    Reference: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
    Improving Generalization", 2020, arXiv:2010.01412.
    """
    _check(rho, p, eta)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    params = jax.tree.map(jnp.asarray, params)

    def ascend(_, worst):
        e = _perturbation(jax.grad(loss_fn)(worst), params, rho, p, adaptive, eta, mask)
        return _perturbed(params, e)

    worst = jax.lax.fori_loop(0, steps, ascend, params)
    return loss_fn(worst) - loss_fn(params)


def _check(rho, p, eta):
    check_interval(0, jnp.inf, rho=rho, eta=eta)
    if p != math.inf:
        check_interval(1, jnp.inf, p=p)


def _perturbation(gradients, params, rho, p, adaptive, eta, mask):
    """e = rho T ∂‖T g‖_q in at least float32: the dual norm's subgradient is the maximiser."""
    dual = l1 if p == math.inf else top_k_l1(1) if p == 1 else lp(p / (p - 1))
    like = gradients if params is None else params
    adapts, moves = _flags(adaptive, like), _flags(mask, like)
    if params is None and any(jax.tree.leaves(adapts)):
        raise ValueError("params must be given where adaptive measures e in their size, got None")

    def scale_leaf(x, w, adapts, moves):
        x = jnp.asarray(x, compute_dtype(x))
        if not moves:
            return jnp.zeros_like(x)
        return x * (jnp.abs(jnp.asarray(w, x.dtype)) + eta) if adapts else x

    def scale(tree):
        return jax.tree.map(scale_leaf, tree, like, adapts, moves)

    return jax.tree.map(lambda u: rho * u, scale(dual.subgradient(scale(gradients))))


def _perturbed(params, e):
    return jax.tree.map(lambda w, e: (w + e).astype(jnp.result_type(w)), params, e)


def _flags(flags, tree):
    """One boolean for each leaf of the tree."""
    return jax.tree.broadcast(flags(tree) if callable(flags) else flags, tree)


def _split(arguments, count):
    """The leaves that micro-batches have of their own, stacked, and the way back to arguments."""
    leaves, structure = jax.tree.flatten(arguments)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}
    lengths = {x.shape[0] for x in arrays.values() if x.ndim}
    if len(lengths) > 1 or any(length % count for length in lengths):
        raise ValueError(
            f"the arguments' arrays must have leading axes of one length, a multiple of "
            f"micro_batches = {count}, got {sorted(lengths)}"
        )
    stacked = {}
    for i, x in arrays.items():
        if x.ndim:
            rows = (x.shape[0] // count, count)
            stacked[i] = jnp.swapaxes(x.reshape(*rows, *x.shape[1:]), 0, 1)
        elif jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            stacked[i] = jax.random.split(x, count)

    def join(own):
        return jax.tree.unflatten(structure, [own.get(i, x) for i, x in enumerate(leaves)])

    return stacked, join
