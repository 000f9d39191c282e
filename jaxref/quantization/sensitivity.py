"""What quantizing each weight does to the loss, and a sparse part in full precision that undoes it.

Weights are any tree of arrays, and a loss is a function of such a tree; with `batches` it is one of
the tree and a batch, averaged over those on the first axis of `batches`, of which one at a time is
in memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array
from jax.experimental.sparse import BCOO

from jaxref.core.checks import check_floating, check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.tensor import QTensor
from jaxref.quantization.uniform import dequantize

Loss = Callable[..., Any]
Quantizer = Callable[[Array], Any]


class DenseAndSparse(NamedTuple):
    """A quantized array and what a few of its entries lack, `w ≈ dequantize(dense) + sparse`.

    Attributes:
      dense: what the quantizer returned, a `QTensor` or the restored array itself.
      sparse: a `BCOO` of the array's shape, the entries kept in full precision less their
        quantized values.

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """

    dense: Any
    sparse: BCOO

    @property
    def nbytes(self) -> int:
        """The memory of all parts, indices included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def taylor_sensitivity(
    loss_fn: Loss, w: Any, w_quantized: Any, *, order: int = 2, batches: Any = None
) -> Any:
    r"""What Taylor's formula at w makes of the change of the loss, by weight.

    With Δ = w_q - w, the gradient g and the Hessian H of the loss at w,

        order 1:   s_i = g_i Δ_i
        order 2:   s_i = g_i Δ_i + ½ Δ_i (H Δ)_i

    whose sum estimates F(w_q) - F(w).

    Args:
      loss_fn: F(w), or F(w, batch), a scalar.
      w: a tree of floating-point arrays, the weights.
      w_quantized: the same tree after quantization and dequantization.
      order: 1 or 2 (default). 2 takes one Hessian-vector product.
      batches: a tree of arrays with the batches on the first axis. Default: none, F is of w alone.

    Returns:
      The tree of s, signed, in at least float32.

    Raises:
      ValueError: trees or shapes that do not match, or another order.
      TypeError: weights that are not floating point.

    It is right for a quantization that stays where the expansion converges, and low by orders of
    magnitude for one of few bits; `post_quantization_integral` is exact.

    Cost: a gradient for each batch; of order 2 also a Hessian-vector product, about twice that.

    Example:
      >>> w, w_q = jnp.array([1.2, -0.4]), jnp.array([1.0, -1.0])
      >>> print(taylor_sensitivity(lambda w: jnp.sum(w**4), w, w_q, order=1).round(3))
      [-1.382  0.154]

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """
    w, w_quantized = _checked(w, w_quantized)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    gradient = _gradient(loss_fn, batches)
    change = jax.tree.map(jnp.subtract, w_quantized, w)
    if order == 1:
        return jax.tree.map(jnp.multiply, gradient(w), change)
    slope, curvature = jax.jvp(gradient, (w,), (change,))
    return jax.tree.map(lambda g, h, d: (g + 0.5 * h) * d, slope, curvature, change)


def post_quantization_integral(
    loss_fn: Loss,
    w: Any,
    w_quantized: Any,
    *,
    intervals: int = 32,
    absolute: bool = True,
    rule: str = "midpoint",
    batches: Any = None,
) -> Any:
    r"""What quantizing each weight did to the loss, by the integral of the gradient on the way.

    The change of the loss is exactly ∫₀¹ ∇F(w + t Δ)·Δ dt with Δ = w_q - w. With N points of it,

        G = (1/N) Σ_n ∇F(w + t_n Δ),   s_i = |G_i| |Δ_i|   (signed: s_i = G_i Δ_i)

    at t_n = (n + ½) / N ("midpoint", exact for a quadratic loss, otherwise off by O(1/N²)) or
    t_n = (n + 1) / N ("right"), n = 0 ... N-1. The signed values sum to F(w_q) - F(w); s_i is the
    part that putting weight i back would undo.

    Args:
      loss_fn: F(w), or F(w, batch), a scalar, say the mean cross-entropy of a token.
      w: a tree of floating-point arrays, the weights.
      w_quantized: the same tree after quantization and dequantization.
      intervals: N at least 1, the gradients that are taken for each batch. Default 32, the paper's.
      absolute: whether to return magnitudes, to rank by, or signed parts of the change.
      rule: "midpoint" (default) or "right".
      batches: a tree of arrays with the batches on the first axis. Default: none, F is of w alone.

    Returns:
      The tree of s in at least float32; 0 wherever the two weights agree.

    Raises:
      ValueError: trees or shapes that do not match, `intervals` below 1, or another rule.
      TypeError: weights that are not floating point.

    Use it after a quantization to see which weights to put back; `taylor_sensitivity` is what to
    compare it with.

    Cost: N gradients for each batch, one after the other; their mean G is kept, of the size of w.

    Example:
      >>> w, w_q = jnp.array([1.2, -0.4]), jnp.array([1.0, -1.0])
      >>> loss = lambda w: jnp.sum(w**4)
      >>> print(post_quantization_integral(loss, w, w_q, absolute=False).round(2))
      [-1.07  0.97]

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """
    w, w_quantized = _checked(w, w_quantized)
    if isinstance(intervals, bool) or not isinstance(intervals, int) or intervals < 1:
        raise ValueError(f"intervals must be an integer of at least 1, got {intervals!r}")
    if rule not in ("midpoint", "right"):
        raise ValueError(f"rule must be 'midpoint' or 'right', got {rule!r}")
    gradient = _gradient(loss_fn, batches)
    change = jax.tree.map(jnp.subtract, w_quantized, w)
    offset = 0.5 if rule == "midpoint" else 1.0

    def step(total: Any, n: Array) -> tuple[Any, None]:
        t = (n + offset) / intervals
        here = jax.tree.map(lambda w, d: w + t * d, w, change)
        return jax.tree.map(lambda s, g: s + g / intervals, total, gradient(here)), None

    total, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, w), jnp.arange(intervals))
    scores = jax.tree.map(jnp.multiply, total, change)
    return jax.tree.map(jnp.abs, scores) if absolute else scores


def select_outliers(scores: Any, ratio: float) -> Any:
    r"""The entries with the largest scores, of a whole tree.

    Args:
      scores: a tree of arrays; magnitudes of weights, say, or what `post_quantization_integral`
        returns.
      ratio: in [0, 1], the part of all entries to select; their number is rounded to the nearest.

    Returns:
      A tree of booleans. Among equal scores, the first ones of the tree.

    Raises:
      ValueError: `ratio` out of range.

    Use it on magnitudes for the weights that stretch a range, on a `post_quantization_integral` for
    those that matter most. `self_adaptive_outlier_ratios` gives each array a ratio of its own.

    Cost: one sort of all entries, O(n log n), which are copied into one array.

    Example:
      >>> select_outliers({"a": jnp.array([0.1, 3.0]), "b": jnp.array([2.0, 0.2])}, 0.5)
      {'a': Array([False,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """
    check_interval(0, 1, ratio=ratio)
    return _largest(scores, round(ratio * _size(scores)))


def self_adaptive_outlier_ratios(
    loss_fn: Loss,
    params: Any,
    quantize_fn: Quantizer,
    *,
    total_ratio: float,
    candidates: Sequence[float] | None = None,
    intervals: int = 32,
    batches: Any = None,
) -> Any:
    r"""How a budget of outliers is best shared among arrays: the part of each that stays exact.

    Each candidate ratio r is tried on all arrays at once: the largest magnitudes of each are taken
    out, the rest is quantized, and S_l(r) is the sum over array l of `post_quantization_integral`.
    Then, with n_l entries in array l,

        minimise Σ_l S_l(r_l)   so that   Σ_l r_l n_l ≤ total_ratio Σ_l n_l

    which is solved exactly, as an integer programme on the host.

    Args:
      loss_fn: F(params), or F(params, batch), a scalar.
      params: a tree of floating-point arrays to be quantized.
      quantize_fn: from an array to its `QTensor`, or to its quantized and restored values.
      total_ratio: in [0, 1], the part of all weights that may be outliers.
      candidates: at least one, in [0, 1], at least one of them at most `total_ratio`. Default: 0,
        ½, 1, 2 and 4 times `total_ratio`, up to 1.
      intervals, batches: as for `post_quantization_integral`.

    Returns:
      A tree of floats in the structure of `params`.

    Raises:
      ValueError: a ratio out of range, no candidate within the budget, or what
        `post_quantization_integral` raises.

    The search is a choice of this library where the paper's own is not spelled out. Arrays whose
    outliers do not matter leave theirs to the others; `requant` uses it.

    Cost: a `post_quantization_integral` for each candidate, 5 · 32 gradients a batch by default,
    and an integer programme of arrays · candidates.

    Example:
      >>> params = {"smooth": jnp.linspace(-1, 1, 16), "spiky": jnp.ones(16).at[3].set(40.0)}
      >>> to_ints = lambda w: jnp.round(w / (x := jnp.max(jnp.abs(w)) / 3)) * x
      >>> loss = lambda p: sum(jnp.sum(x**2) for x in p.values())
      >>> self_adaptive_outlier_ratios(loss, params, to_ints, total_ratio=1 / 32)
      {'smooth': 0.0, 'spiky': 0.0625}

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """
    check_interval(0, 1, total_ratio=total_ratio)
    if candidates is None:
        candidates = [f * total_ratio for f in (0.0, 0.5, 1.0, 2.0, 4.0) if f * total_ratio <= 1]
    candidates = sorted(set(candidates))
    check_interval(0, 1, candidates=np.array(candidates, float))
    if not candidates or candidates[0] > total_ratio:
        raise ValueError(
            f"candidates must have a ratio of at most total_ratio = {total_ratio}, got {candidates}"
        )
    score = _score(loss_fn, intervals, batches)
    costs = []
    for ratio in candidates:
        outliers = jax.tree.map(lambda w: select_outliers(jnp.abs(w), ratio), params)  # noqa: B023
        restored = jax.tree.map(_keep_outliers(quantize_fn), params, outliers)
        scores = jax.tree.leaves(score(params, restored))
        costs.append([float(jnp.sum(s)) for s in scores])
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(params)])
    counts = np.round(np.array(candidates)[:, None] * sizes)
    budget = max(round(total_ratio * int(sizes.sum())), int(counts[0].sum()))
    chosen = _allocate(np.array(costs), counts, budget)
    ratios = [candidates[i] for i in chosen]
    return jax.tree.unflatten(jax.tree.structure(params), ratios)


def stepwise_significant_detach(
    loss_fn: Loss,
    w: Any,
    w_quantized: Any,
    *,
    ratio: float,
    steps: int = 4,
    intervals: int = 32,
    batches: Any = None,
) -> Any:
    r"""The weights to put back to full precision, those that matter most after each other's return.

    `steps` times, the `post_quantization_integral` of the weights as they are by now is computed,
    and the ratio / steps of all weights with the largest values, which were not chosen before, are
    put back, so that the next integral ends there.

    Args:
      loss_fn: F(w), or F(w, batch), a scalar.
      w: a tree of floating-point arrays, the weights.
      w_quantized: the same tree after quantization and dequantization.
      ratio: in [0, 1], the part of all weights to put back.
      steps: at least 1. Default 4. With 1 all are chosen by the first integral.
      intervals, batches: as for `post_quantization_integral`.

    Returns:
      A tree of booleans, True for the weights to keep: `jnp.where(mask, w, w_quantized)`.

    Raises:
      ValueError: a ratio or number of steps out of range, or what `post_quantization_integral`
        raises.

    Use it after any quantization, to choose which weights return to full precision. More steps see
    what the return of some does to the worth of others; `requant` shares out the outliers first.

    Cost: steps · intervals gradients for each batch, and a sort of all weights at each step.

    Example:
      >>> w, w_q = jnp.array([1.2, -0.4, 0.3]), jnp.array([1.0, -1.0, 0.0])
      >>> print(stepwise_significant_detach(lambda w: jnp.sum(w**4), w, w_q, ratio=0.33, steps=1))
      [ True False False]

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """
    w, w_quantized = _checked(w, w_quantized)
    check_interval(0, 1, ratio=ratio)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    score = _score(loss_fn, intervals, batches)
    total = round(ratio * _size(w))
    kept = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), w)
    for step in range(steps):
        count = round(total * (step + 1) / steps) - round(total * step / steps)
        mixed = jax.tree.map(jnp.where, kept, w, w_quantized)
        # those put back before have a 0 here too, and may not be counted twice
        scores = jax.tree.map(lambda k, s: jnp.where(k, -1.0, s), kept, score(w, mixed))
        kept = jax.tree.map(jnp.logical_or, kept, _largest(scores, count))
    return kept


def requant(
    loss_fn: Loss,
    params: Any,
    quantize_fn: Quantizer,
    *,
    outlier_ratio: float = 0.0025,
    significant_ratio: float = 0.0025,
    candidates: Sequence[float] | None = None,
    steps: int = 4,
    intervals: int = 32,
    batches: Any = None,
) -> Any:
    r"""Improves any quantization by a sparse part in full precision (ReQuant).

    1. `self_adaptive_outlier_ratios` shares the outliers among the arrays;
    2. these, the largest magnitudes of each array, are set to 0, and the rest, of a smaller range,
       is quantized;
    3. `stepwise_significant_detach` finds the weights that matter most of what is left.

    Both kinds are kept in full precision.

    Args:
      loss_fn: F(params), or F(params, batch), a scalar.
      params: a tree of floating-point arrays, all of them to be quantized.
      quantize_fn: from an array to its `QTensor`, or to its quantized and restored values.
      outlier_ratio: in [0, 1], of all weights. Default 0.0025.
      significant_ratio: in [0, 1], of all weights. Default 0.0025. The two together are usually
        0.05 to 0.5 percent.
      candidates: as for `self_adaptive_outlier_ratios`.
      steps: as for `stepwise_significant_detach`.
      intervals, batches: as for `post_quantization_integral`.

    Returns:
      A tree of `DenseAndSparse`, for `restore_dense_and_sparse`. Without any outliers and
      significant weights, the quantization alone.

    Raises:
      ValueError: an argument out of its range.

    Use it as a second pass after GPTQ, round-to-nearest or codebooks, on the host around compiled
    gradients.

    Cost: (candidates + steps) · intervals gradients a batch, 288 by default; a value and an int32
    index for each axis to an entry that is kept.

    Example:
      >>> from jaxref.quantization import QuantSpec, quantize
      >>> params = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8).at[3, 3].set(9.0)}
      >>> fit = lambda p: jnp.sum((p["w"] - params["w"]) ** 2)
      >>> q = requant(fit, params, lambda w: quantize(w, QuantSpec(bits=4)), outlier_ratio=1 / 64)
      >>> restore_dense_and_sparse(q)["w"][3, 3]
      Array(9., dtype=float32)

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """
    check_interval(0, 1, outlier_ratio=outlier_ratio, significant_ratio=significant_ratio)
    check_floating(**{f"params{jax.tree_util.keystr(p)}": x for p, x in _leaves(params)})
    shared = {"intervals": intervals, "batches": batches}
    if outlier_ratio > 0:
        ratios = self_adaptive_outlier_ratios(
            loss_fn, params, quantize_fn, total_ratio=outlier_ratio, candidates=candidates, **shared
        )
    else:
        ratios = jax.tree.map(lambda _: 0.0, params)
    outliers = jax.tree.map(lambda w, r: select_outliers(jnp.abs(w), r), params, ratios)
    dense = jax.tree.map(lambda w, out: quantize_fn(jnp.where(out, 0, w)), params, outliers)
    restored = jax.tree.map(lambda w, q: _restored(q), params, dense)
    mixed = jax.tree.map(jnp.where, outliers, params, restored)
    kept = outliers
    if significant_ratio > 0:
        significant = stepwise_significant_detach(
            loss_fn, params, mixed, ratio=significant_ratio, steps=steps, **shared
        )
        kept = jax.tree.map(jnp.logical_or, outliers, significant)
    return jax.tree.map(
        lambda w, q, x, k: DenseAndSparse(q, _sparse(w - x, k)), params, dense, restored, kept
    )


def restore_dense_and_sparse(tree: Any) -> Any:
    r"""The arrays that the `DenseAndSparse` of a tree stand for, `dequantize(dense) + sparse`.

    Args:
      tree: as `requant` returns it; other leaves stay as they are.

    Returns:
      The tree with arrays, of the type of the dense parts.

    Use it to run or to measure what `requant` returned: the two parts are not multiplied apart from
    each other.

    Cost: that of `dequantize`, and a scattered addition of the entries that were kept.

    Example:
      >>> sparse = BCOO.fromdense(jnp.array([0.0, 0.5]))
      >>> restore_dense_and_sparse(DenseAndSparse(jnp.ones(2), sparse))
      Array([1. , 1.5], dtype=float32)

    Reference: Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", 2025,
    arXiv:2503.01901.
    """

    def restore(leaf: Any) -> Any:
        if not isinstance(leaf, DenseAndSparse):
            return leaf
        dense = _restored(leaf.dense)
        index = tuple(leaf.sparse.indices.T)
        return dense.at[index].add(leaf.sparse.data.astype(dense.dtype))

    return jax.tree.map(restore, tree, is_leaf=lambda leaf: isinstance(leaf, DenseAndSparse))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _size(tree: Any) -> int:
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def _checked(w: Any, w_quantized: Any) -> tuple[Any, Any]:
    """Both trees in at least float32."""
    check_same_tree(w, w_quantized=w_quantized)
    for name, tree in (("w", w), ("w_quantized", w_quantized)):
        check_floating(**{name + jax.tree_util.keystr(path): leaf for path, leaf in _leaves(tree)})
    computed = [
        jax.tree.map(lambda x: jnp.asarray(x, compute_dtype(x)), t) for t in (w, w_quantized)
    ]
    return computed[0], computed[1]


def _gradient(loss_fn: Loss, batches: Any) -> Callable[[Any], Any]:
    """The gradient of the loss, averaged over the batches one after the other."""
    if batches is None:
        return jax.grad(loss_fn)
    count = jax.tree.leaves(batches)[0].shape[0]

    def gradient(w: Any) -> Any:
        def step(total: Any, batch: Any) -> tuple[Any, None]:
            slope = jax.grad(loss_fn)(w, batch)
            return jax.tree.map(lambda s, g: s + g / count, total, slope), None

        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, w), batches)[0]

    return gradient


def _score(loss_fn: Loss, intervals: int, batches: Any) -> Callable[[Any, Any], Any]:
    """`post_quantization_integral`, compiled once for several pairs of weights."""
    score = functools.partial(post_quantization_integral, loss_fn, intervals=intervals)
    compiled = jax.jit(lambda w, w_quantized, batches: score(w, w_quantized, batches=batches))
    return lambda w, w_quantized: compiled(w, w_quantized, batches)


def _largest(scores: Any, count: int) -> Any:
    """The `count` largest entries of a tree."""
    leaves, structure = jax.tree.flatten(scores)
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
    order = jnp.argsort(-flat, stable=True)
    mask = jnp.zeros(flat.shape, bool).at[order[:count]].set(True)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(mask, ends)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)]
    )


def _allocate(costs: np.ndarray, counts: np.ndarray, budget: int) -> np.ndarray:
    """The candidate of each array at the least total cost within the budget: `[candidates, l]`."""
    choices, arrays = costs.shape
    scale = max(np.max(np.abs(costs)), np.finfo(float).tiny)
    one_each = np.tile(np.eye(arrays), choices)
    solution = scipy.optimize.milp(
        costs.ravel() / scale,
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(counts.reshape(1, -1), -np.inf, budget),
        ],
        integrality=np.ones(costs.size),
        bounds=scipy.optimize.Bounds(0, 1),
    )
    return np.argmax(solution.x.reshape(choices, arrays), axis=0)


def _restored(quantized: Any) -> Array:
    return dequantize(quantized) if isinstance(quantized, QTensor) else jnp.asarray(quantized)


def _keep_outliers(quantize_fn: Quantizer) -> Callable[[Array, Array], Array]:
    return lambda w, out: jnp.where(out, w, _restored(quantize_fn(jnp.where(out, 0, w))))


def _sparse(x: Array, mask: Array) -> BCOO:
    """The entries of `x` that the mask selects."""
    indices = np.argwhere(np.asarray(mask)).astype(np.int32)
    values = x[tuple(indices.T)]
    return BCOO(
        (values, jnp.asarray(indices)), shape=x.shape, indices_sorted=True, unique_indices=True
    )
