"""PV-tuning: training weights that are codes of codebooks, values and codes in turn.

A kernel `[in, out]` is cut into groups of g inputs of one output, in a grid `[in / g, out]`. Each
group is a sum of vectors, one from each codebook, times a scale. With g = 1 and one codebook it is
a scalar format with free levels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


class CodebookWeight(NamedTuple):
    """A kernel in codebooks; `codebook_dequantize(*weight)` restores it.

    Attributes:
      codes: integers `[in / g, out, codebooks]`.
      codebooks: floating point `[codebooks, entries, g]`.
      scales: floating point, broadcastable to `[in / g, out]`; None for 1.

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """

    codes: Array
    codebooks: Array
    scales: Array | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight: codes in as few as their codebook needs, values as they are stored."""
        rows, outputs, _ = self.codes.shape
        bits: float = self.codes.size * math.ceil(math.log2(self.codebooks.shape[1]))
        for values in jax.tree.leaves((self.codebooks, self.scales)):
            bits += 8 * values.size * values.dtype.itemsize
        return bits / (rows * outputs * self.codebooks.shape[2])


class PVState(NamedTuple):
    """What `pv_tuning` carries from step to step.

    Attributes:
      values: optax's state for codebooks, scales and the weights that are not quantized.
      codes: optax's state for the direction that codes move in.
      buffers: for each `CodebookWeight`, in the order of the tree, the kernel that codes follow.

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """

    values: Any
    codes: Any
    buffers: list[Array]


class PVTuning(NamedTuple):
    """`init(params) -> state` and `update(gradients, state, params) -> (params, state)`.

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """

    init: Callable[[Any], PVState]
    update: Callable[[Any, PVState, Any], tuple[Any, PVState]]


class PVTrace(NamedTuple):
    """What `pv_exact` returns.

    Attributes:
      x: `[d]`, the last vector.
      losses: `[1 + 2 steps]`: at the start, and after each P step and each V step.

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """

    x: np.ndarray
    losses: np.ndarray


def codebook_dequantize(
    codes: ArrayLike, codebooks: ArrayLike, scales: ArrayLike | None = None
) -> Array:
    r"""The kernel that codes, codebooks and scales stand for.

    The group at (i, j) is s_ij Σ_m C_m[codes_ijm].

    Args:
      codes: integers `[in / g, out, codebooks]`, each below the entries of its codebook.
      codebooks: floating point `[codebooks, entries, g]`.
      scales: floating point, broadcastable to `[in / g, out]`. Default: 1.

    Returns:
      `[in, out]` in the type of the codebooks; differentiable in codebooks and scales.

    Raises:
      ValueError: shapes that do not match, or codes out of range where they are concrete.
      TypeError: codes that are not integers, or values that are not floating point.

    Use it to run a kernel of `codebook_quantize` or `pv_tuning`; `dequantize_codebooks` restores
    all kernels of a tree.

    Cost: a look-up of g numbers for each code; on the way the vectors of all codebooks, `codebooks`
    times the kernel.

    Example:
      >>> codebook = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
      >>> codebook_dequantize(jnp.array([[[1]], [[0]]]), codebook).ravel()
      Array([3., 4., 1., 2.], dtype=float32)

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """
    codes, codebooks = jnp.asarray(codes), jnp.asarray(codebooks)
    _check_parts(codes, codebooks, scales)
    which = jnp.arange(codebooks.shape[0])
    groups = jnp.sum(codebooks[which, codes], axis=-2)
    if scales is not None:
        groups *= jnp.broadcast_to(scales, codes.shape[:2])[..., None]
    return _ungrouped(groups).astype(codebooks.dtype)


def dequantize_codebooks(params: Any) -> Any:
    r"""A tree with every `CodebookWeight` restored to its kernel.

    Args:
      params: a tree of arrays and `CodebookWeight`.

    Returns:
      The tree of arrays that a loss takes, and the gradients for `pv_tuning` are of.

    Use it outside of the gradient when training with `pv_tuning`: the loss takes its result, and
    gradients are with respect to that. `codebook_dequantize` restores a single kernel.

    Cost: all kernels in floating point beside their codes.

    Example:
      >>> q = CodebookWeight(jnp.array([[[1]]]), jnp.array([[[1.0], [3.0]]]))
      >>> dequantize_codebooks({"bias": jnp.ones(1), "w": q})
      {'bias': Array([1.], dtype=float32), 'w': Array([[3.]], dtype=float32)}

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """
    return jax.tree.map(
        lambda leaf: codebook_dequantize(*leaf) if _is_coded(leaf) else leaf,
        params,
        is_leaf=_is_coded,
    )


def nearest_codes(
    target: ArrayLike,
    codebooks: ArrayLike,
    scales: ArrayLike | None = None,
    *,
    codes: ArrayLike | None = None,
    beam_size: int = 5,
) -> Array:
    r"""The codes whose kernel is nearest to a target, by beam search over the codebooks.

    For each group, codebook after codebook, the code is chosen that leaves the least
    ‖target / s - Σ_m C_m[code_m]‖², and the `beam_size` best combinations are kept. It starts from
    `codes`, whose error it never raises, or with nothing in place of codes to be chosen yet. With
    one codebook it is the exact nearest neighbour.

    Args:
      target: floating point `[in, out]`.
      codebooks: floating point `[codebooks, entries, g]`, g a divisor of in.
      scales: floating point, broadcastable to `[in / g, out]`, not 0. Default: 1.
      codes: integers `[in / g, out, codebooks]` to start from. Default: none.
      beam_size: at least 1. Default 5, the paper's.

    Returns:
      int32 `[in / g, out, codebooks]`.

    Raises:
      ValueError: shapes that do not match, codes out of range, or `beam_size` below 1.
      TypeError: values that are not floating point, or codes that are not integers.

    Use it to encode weights in codebooks that stand, or to look again once these have moved;
    `codebook_quantize` finds the codebooks as well. A larger beam errs less where there are several
    of them.

    Cost: codebooks · beam_size · entries multiplications a weight; distances `[groups, beam_size,
    entries]` are in memory at once.

    Example:
      >>> nearest_codes(jnp.array([[0.2], [0.9]]), jnp.array([[[0.0], [1.0]]])).ravel()
      Array([0, 1], dtype=int32)

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852; the search is that of Egiazarian et al., "Extreme
    Compression of Large Language Models via Additive Quantization", 2024, arXiv:2401.06118.
    """
    groups, codebooks = _unscaled(target, codebooks, scales)
    _check_beam(beam_size)
    flat = groups.reshape(-1, groups.shape[-1])
    start = None
    if codes is not None:
        codes = jnp.asarray(codes)
        _check_parts(codes, codebooks, scales)
        check_shape((*groups.shape[:2], codebooks.shape[0]), codes=codes)
        start = codes.reshape(-1, codebooks.shape[0])
    found = _beam_search(flat, codebooks, start, beam_size, force_update=False)
    return found.reshape(*groups.shape[:2], -1)


def codebook_quantize(
    w: ArrayLike,
    *,
    codebook_size: int,
    group_size: int = 8,
    num_codebooks: int = 1,
    iterations: int = 25,
    beam_size: int = 5,
    key: Array,
) -> CodebookWeight:
    r"""Codes and codebooks of a kernel to start from, by residual k-means.

    Columns are divided by their norms, the scales. Each codebook is then fitted by Lloyd's k-means
    to what those before it leave of the groups, and the codes of all are searched again together.

    Args:
      w: floating point `[in, out]`.
      codebook_size: entries of a codebook, at least 2.
      group_size: g at least 1, a divisor of in. Default 8.
      num_codebooks: at least 1. Default 1.
      iterations: at least 0, of k-means. Default 25.
      beam_size: as for `nearest_codes`.
      key: of the groups that k-means starts from.

    Returns:
      A `CodebookWeight`, with values of the type of `w`.

    Raises:
      ValueError: an argument out of its range, a `group_size` that does not divide, not two axes,
        or NaN or infinite entries where the values are concrete.
      TypeError: `w` is not floating point.

    Use it to start `pv_tuning` at 1 to 3 bits a weight. It sees the weights alone; `gptq_quantize`,
    from 3 bits on, sees the inputs too.

    Cost: num_codebooks · (iterations + 1) searches of codebook_size multiplications a weight,
    distances `[groups, codebook_size]` in memory, and `nearest_codes`; no data.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (16, 8))
      >>> q = codebook_quantize(w, codebook_size=16, group_size=2, key=jax.random.key(1))
      >>> print(jnp.mean((codebook_dequantize(*q) - w) ** 2) < 0.2)
      True

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852; the start is that of Egiazarian et al., "Extreme
    Compression of Large Language Models via Additive Quantization", 2024, arXiv:2401.06118.
    """
    w = jnp.asarray(w)
    check_floating(w=w)
    check_interval(2, jnp.inf, codebook_size=codebook_size)
    check_interval(1, jnp.inf, group_size=group_size, num_codebooks=num_codebooks)
    check_interval(0, jnp.inf, iterations=iterations)
    if w.ndim != 2 or w.size == 0 or w.shape[0] % group_size:
        raise ValueError(
            f"w must have shape [in, out] with group_size = {group_size} dividing in, got {w.shape}"
        )
    if not isinstance(w, jax.core.Tracer) and not jnp.all(jnp.isfinite(w)):
        raise ValueError("w must be finite, got NaN or infinite entries")
    x = w.astype(compute_dtype(w))
    norms = jnp.linalg.norm(x, axis=0)
    scales = jnp.where(norms > 0, norms, 1.0)
    rest = _grouped(x / scales, group_size).reshape(-1, group_size)
    codebooks = []
    for one in jax.random.split(key, num_codebooks):
        centers = _k_means(one, rest, codebook_size, iterations)
        codebooks.append(centers)
        rest -= centers[_beam_search(rest, centers[None], None, 1, force_update=False)[:, 0]]
    stacked = jnp.stack(codebooks).astype(w.dtype)
    scales = scales[None].astype(w.dtype)
    return CodebookWeight(nearest_codes(w, stacked, scales, beam_size=beam_size), stacked, scales)


def pv_v_step(
    codes: ArrayLike,
    codebooks: ArrayLike,
    scales: ArrayLike | None,
    target: ArrayLike,
    *,
    max_code_change: float = 0.01,
    trust_ratio: float | None = None,
    force_update: bool = False,
    beam_size: int = 5,
) -> Array:
    r"""Moves the codes of a few groups towards a target, the linearized V step on a subspace.

    Of all groups, the part `max_code_change` with the largest ‖target - kernel‖₂ is encoded anew by
    `nearest_codes`; the others keep their codes. A small step of all weights would round back to
    where each was; a long one of few moves them.

    Args:
      codes: integers `[in / g, out, codebooks]`.
      codebooks: floating point `[codebooks, entries, g]`.
      scales: floating point, broadcastable to `[in / g, out]`, not 0; None for 1.
      target: floating point `[in, out]`, the kernel less a step along its gradient.
      max_code_change: in (0, 1], the part of the groups that may change; their number is rounded
        up. Default 0.01, the paper's.
      trust_ratio: positive; changes are taken in order until the norm of all of them exceeds this
        part of the norm of the kernel, at least one and the one that exceeds it included. Default:
        no such limit.
      force_update: whether the groups must leave their codes, for the nearest others.
      beam_size: as for `nearest_codes`.

    Returns:
      int32 `[in / g, out, codebooks]`.

    Raises:
      ValueError: an argument out of its range, or shapes that do not match.
      TypeError: values that are not floating point, or codes that are not integers.

    `pv_tuning` calls it at each step; with `max_code_change` 1 all groups are rounded, as a
    straight-through estimator does.

    Cost: a pass over the kernel and the largest distances of it; `nearest_codes` for the part
    `max_code_change` of the groups.

    Example:
      >>> codes, codebook = jnp.zeros((4, 1, 1), int), jnp.array([[[0.0], [1.0]]])
      >>> target = jnp.array([[0.6], [0.9], [0.2], [0.0]])
      >>> pv_v_step(codes, codebook, None, target, max_code_change=0.25).ravel()
      Array([0, 1, 0, 0], dtype=int32)

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """
    check_interval(0, 1, closed="right", max_code_change=max_code_change)
    if trust_ratio is not None:
        check_interval(0, jnp.inf, closed="neither", trust_ratio=trust_ratio)
    _check_beam(beam_size)
    codes = jnp.asarray(codes)
    _check_parts(codes, jnp.asarray(codebooks), scales)
    groups, codebooks = _unscaled(target, codebooks, scales)
    check_shape((*groups.shape[:2], codebooks.shape[0]), codes=codes)
    flat, old = groups.reshape(-1, groups.shape[-1]), codes.reshape(-1, codebooks.shape[0])
    size = jnp.ones(codes.shape[:2]) if scales is None else jnp.abs(jnp.asarray(scales))
    size = jnp.broadcast_to(size, codes.shape[:2]).ravel()
    which = jnp.arange(codebooks.shape[0])
    kernel = jnp.sum(codebooks[which, old], axis=1)
    distance = size * jnp.linalg.norm(flat - kernel, axis=-1)
    count = math.ceil(max_code_change * flat.shape[0])
    chosen = jax.lax.top_k(distance, count)[1]
    new = _beam_search(flat[chosen], codebooks, old[chosen], beam_size, force_update)
    if trust_ratio is not None:
        moved = size[chosen, None] * (jnp.sum(codebooks[which, new], axis=1) - kernel[chosen])
        so_far = jnp.sqrt(jnp.cumsum(jnp.sum(jnp.square(moved), axis=-1)))
        limit = trust_ratio * jnp.linalg.norm(size[:, None] * kernel)
        within = jnp.concatenate([jnp.ones(1, bool), so_far[:-1] < limit])
        new = jnp.where(within[:, None], new, old[chosen])
    return old.at[chosen].set(new).reshape(codes.shape).astype(jnp.int32)


def pv_tuning(
    learning_rate: optax.ScalarOrSchedule = 3e-4,
    *,
    code_learning_rate: optax.ScalarOrSchedule = 1e-2,
    b1: float = 0.9,
    b2: float = 0.95,
    code_b1: float = 0.0,
    code_b2: float = 0.95,
    epsilon: float = 1e-6,
    max_code_change: float = 0.01,
    trust_ratio: float | None = None,
    force_update: bool = False,
    delta_decay: float = 1.0,
    beam_size: int = 5,
) -> PVTuning:
    r"""An optimizer of quantized weights that trains values and codes by the same gradient.

    With the gradient g of the loss at the kernel W of codes, codebooks and scales, each step is

        P:  codebooks, scales and weights that are not quantized take a step of Adam
        V:  B ← B - Adam(g) at `code_learning_rate`
            codes ← pv_v_step(codes, codebooks, scales, B)
            B ← (1 - δ) B + δ W

    with W of the new codes and values, δ = `delta_decay`, and B = W before the first step.

    Args:
      learning_rate: at least 0, or a schedule, of the values. Default 3e-4, the paper's.
      code_learning_rate: at least 0, or a schedule, of the steps that codes follow: so long that
        some of them move. Default 1e-2, the paper's.
      b1, b2: Adam's decay rates for the values, in [0, 1). Default 0.9 and 0.95, the paper's.
      code_b1, code_b2: those for the codes. Default 0 and 0.95, the paper's: without momentum, as
        what was wished for a code that has changed is out of date.
      epsilon: positive, of both. Default 1e-6, that of the authors' code.
      max_code_change, trust_ratio, force_update, beam_size: as for `pv_v_step`.
      delta_decay: δ in [0, 1]. 1 (default) starts each step from the weights as they are; 0 adds up
        what rounding leaves, a straight-through estimator with limited changes.

    Returns:
      A `PVTuning`. `init` takes the parameters, any tree of arrays and `CodebookWeight`; `update`
      takes gradients with respect to `dequantize_codebooks(params)`, the state and the parameters,
      and returns new ones. Both run under jit and in scan.

    Raises:
      ValueError: an argument out of its range, from here or, for shapes, from `update`.

    Codes are integers and take no optax update, so it is no `optax.GradientTransformation`. Use it
    after `codebook_quantize` to win back the accuracy of 1 to 3 bits.

    Cost: one gradient a step; beside the codes three float arrays of each kernel's size, the one
    that codes follow and its moments, and two moments of the values.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (16, 4))
      >>> params = codebook_quantize(w, codebook_size=4, group_size=1, key=jax.random.key(1))
      >>> tuner = pv_tuning()
      >>> gradient = jax.grad(lambda x: jnp.sum((x - w) ** 2))(dequantize_codebooks(params))
      >>> params, state = tuner.update(gradient, tuner.init(params), params)
      >>> params.codes.shape
      (16, 4, 1)

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """
    check_interval(0, 1, closed="left", b1=b1, b2=b2, code_b1=code_b1, code_b2=code_b2)
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    check_interval(0, 1, closed="right", max_code_change=max_code_change)
    check_interval(0, 1, delta_decay=delta_decay)
    for name, rate in (
        ("learning_rate", learning_rate),
        ("code_learning_rate", code_learning_rate),
    ):
        if not callable(rate):
            check_interval(0, jnp.inf, **{name: rate})  # type: ignore[arg-type]
    _check_beam(beam_size)
    adam = optax.adam(learning_rate, b1, b2, epsilon)
    code_adam = optax.adam(code_learning_rate, code_b1, code_b2, epsilon)

    def init(params: Any) -> PVState:
        leaves = jax.tree.leaves(params, is_leaf=_is_coded)
        buffers = [_buffer(leaf) for leaf in leaves if _is_coded(leaf)]
        values = [leaf[1:] if _is_coded(leaf) else leaf for leaf in leaves]
        return PVState(adam.init(values), code_adam.init(buffers), buffers)

    def update(gradients: Any, state: PVState, params: Any) -> tuple[Any, PVState]:
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_coded)
        slopes = jax.tree.leaves(gradients)
        if len(slopes) != len(leaves):
            raise ValueError(
                "gradients must be with respect to dequantize_codebooks(params), "
                f"got {len(slopes)} arrays for {len(leaves)}"
            )
        values = [leaf[1:] if _is_coded(leaf) else leaf for leaf in leaves]
        pulled = [_pull_back(leaf, g) if _is_coded(leaf) else g for leaf, g in zip(leaves, slopes)]
        change, values_state = adam.update(pulled, state.values, values)
        values = optax.apply_updates(values, change)

        coded = [i for i, leaf in enumerate(leaves) if _is_coded(leaf)]
        kernels = [slopes[i].astype(b.dtype) for i, b in zip(coded, state.buffers)]
        change, codes_state = code_adam.update(kernels, state.codes, state.buffers)
        buffers = optax.apply_updates(state.buffers, change)
        new, kept = list(values), []
        for i, buffer in zip(coded, buffers):
            codebooks, scales = values[i]
            codes = pv_v_step(
                leaves[i].codes,
                codebooks,
                scales,
                buffer,
                max_code_change=max_code_change,
                trust_ratio=trust_ratio,
                force_update=force_update,
                beam_size=beam_size,
            )
            new[i] = CodebookWeight(codes.astype(leaves[i].codes.dtype), codebooks, scales)
            kept.append((1 - delta_decay) * buffer + delta_decay * _buffer(new[i]))
        return jax.tree.unflatten(structure, new), PVState(values_state, codes_state, kept)

    return PVTuning(init, update)


def pv_exact(phi: Callable[[Array], Array], x0: ArrayLike, num_values: int, steps: int) -> PVTrace:
    r"""The PV algorithm with both steps exact, for a few entries.

    Among the vectors with at most c distinct values, from y⁰ = x0,

        P:  y = argmin φ over the vectors that have equal entries where x has them
        V:  x = argmin φ over the vectors with values among those of y

    φ never grows, and x converges to a point that neither step improves.

    Args:
      phi: a function of `[d]`, convex and twice differentiable. The P step is Newton's, with halved
        steps where it does not descend: one is exact for a quadratic, four are taken.
      x0: floating point `[d]`, with at most `num_values` distinct values.
      num_values: c at least 1. The V step tries all c^d vectors, of which there may be 2^20.
      steps: at least 0, of P and V.

    Returns:
      A `PVTrace`. Computed on the host, around jitted evaluations of φ.

    Raises:
      ValueError: more values than `num_values` in `x0`, an argument out of its range, or more
        vectors than that to try.
      TypeError: `x0` is not floating point.

    It is the algorithm of the paper's theory, for study; `pv_tuning` is the practical one.

    Cost: c^d evaluations of φ for each V step, all in memory at once, and up to four Hessians of φ,
    `[d, d]`, for each P step.

    Example:
      >>> phi = lambda x: jnp.sum((x - jnp.array([0.0, 0.1, 1.0, 1.2])) ** 2)
      >>> print(pv_exact(phi, jnp.array([0.0, 1.0, 1.0, 1.0]), 2, steps=3).x.round(3))
      [0.05 0.05 1.1  1.1 ]

    Reference: Malinovskii et al., "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", 2024, arXiv:2405.14852.
    """
    check_floating(x0=x0)
    x = np.asarray(jnp.asarray(x0, compute_dtype(x0)))
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"x0 must have shape [d] with entries, got {x.shape}")
    check_interval(1, jnp.inf, num_values=num_values)
    check_interval(0, jnp.inf, steps=steps)
    distinct = len(np.unique(x))
    if distinct > num_values:
        raise ValueError(f"x0 must have at most {num_values} distinct values, got {distinct}")
    if num_values**x.size > 2**20:
        raise ValueError(f"num_values ** d must be at most 2 ** 20, got {num_values}^{x.size}")
    every = np.array(np.unravel_index(np.arange(num_values**x.size), [num_values] * x.size)).T
    loss = jax.jit(phi)
    of_all = jax.jit(jax.vmap(phi))
    slopes = jax.jit(lambda x: (jax.grad(phi)(x), jax.hessian(phi)(x)))
    losses = [float(loss(x))]
    for _ in range(steps):
        x = _exact_p_step(loss, slopes, x)
        losses.append(float(loss(x)))
        values = np.resize(np.unique(x), num_values)  # values repeat where there are fewer
        candidates = values[every]
        found = np.asarray(of_all(candidates))
        best = int(np.argmin(found))
        if found[best] < losses[-1]:  # and on a tie, x stays
            x = candidates[best]
        losses.append(float(loss(x)))
    return PVTrace(x, np.array(losses))


def _exact_p_step(loss: Callable, slopes: Callable, x: np.ndarray) -> np.ndarray:
    """Newton's method on the values of x, each shared by its entries."""
    values, codes = np.unique(x, return_inverse=True)
    shares = np.eye(len(values))[codes]
    now = float(loss(x))
    for _ in range(4):
        slope, curvature = (np.float64(part) for part in slopes(x))
        step = np.linalg.lstsq(shares.T @ curvature @ shares, shares.T @ slope, rcond=None)[0]
        for halving in range(20):
            trial = (values - step * 0.5**halving)[codes].astype(x.dtype)
            reached = float(loss(trial))
            if reached < now:
                x, values, now = trial, values - step * 0.5**halving, reached
                break
        else:
            break
    return x


def _is_coded(leaf: Any) -> bool:
    return isinstance(leaf, CodebookWeight)


def _buffer(weight: CodebookWeight) -> Array:
    kernel = codebook_dequantize(*weight)
    return kernel.astype(compute_dtype(kernel))


def _pull_back(weight: CodebookWeight, gradient: Array) -> tuple[Array, Array | None]:
    """The gradient with respect to codebooks and scales."""
    kernel, pull = jax.vjp(
        lambda codebooks, scales: codebook_dequantize(weight.codes, codebooks, scales), *weight[1:]
    )
    return pull(gradient.astype(kernel.dtype))


def _check_beam(beam_size: int) -> None:
    if isinstance(beam_size, bool) or not isinstance(beam_size, int) or beam_size < 1:
        raise ValueError(f"beam_size must be an integer of at least 1, got {beam_size!r}")


def _check_parts(codes: Array, codebooks: Array, scales: ArrayLike | None) -> None:
    check_floating(codebooks=codebooks)
    if codebooks.ndim != 3 or codebooks.size == 0:
        raise ValueError(
            f"codebooks must have shape [codebooks, entries, g], got {codebooks.shape}"
        )
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype.name}")
    if codes.ndim != 3 or codes.shape[2] != codebooks.shape[0]:
        raise ValueError(
            f"codes must have shape [in / g, out, {codebooks.shape[0]}], got {codes.shape}"
        )
    if not isinstance(codes, jax.core.Tracer):
        check_interval(0, codebooks.shape[1] - 1, codes=codes)
    if scales is not None:
        check_floating(scales=scales)
        check_broadcastable(codes.shape[:2], scales=scales)


def _unscaled(
    target: ArrayLike, codebooks: ArrayLike, scales: ArrayLike | None
) -> tuple[Array, Array]:
    """The target's groups `[in / g, out, g]` over their scales, and the codebooks, to compute."""
    target, codebooks = jnp.asarray(target), jnp.asarray(codebooks)
    check_floating(target=target, codebooks=codebooks)
    if codebooks.ndim != 3 or target.ndim != 2 or target.shape[0] % codebooks.shape[2]:
        raise ValueError(
            f"target must have shape [in, out], g of codebooks [codebooks, entries, g] dividing in,"
            f" got {target.shape} and {codebooks.shape}"
        )
    dtype = compute_dtype(target, codebooks)
    groups = _grouped(target.astype(dtype), codebooks.shape[2])
    if scales is not None:
        check_floating(scales=scales)
        check_broadcastable(groups.shape[:2], scales=scales)
        groups /= jnp.broadcast_to(jnp.asarray(scales, dtype), groups.shape[:2])[..., None]
    return groups, codebooks.astype(dtype)


def _grouped(w: Array, group_size: int) -> Array:
    """`[in, out]` as `[in / g, out, g]`."""
    return w.reshape(-1, group_size, w.shape[1]).swapaxes(1, 2)


def _ungrouped(groups: Array) -> Array:
    return groups.swapaxes(1, 2).reshape(-1, groups.shape[1])


@functools.partial(jax.jit, static_argnames=("beam_size", "force_update"))
def _beam_search(
    target: Array, codebooks: Array, codes: Array | None, beam_size: int, force_update: bool
) -> Array:
    """Codes int32 `[groups, codebooks]` of `[groups, g]`, from `codes` or from nothing."""
    count, entries, _ = codebooks.shape
    which = jnp.arange(count)
    if codes is None:
        beam = jnp.zeros((target.shape[0], 1, count), jnp.int32)
        rest = target[:, None]
    else:
        beam = codes.astype(jnp.int32)[:, None]
        rest = (target - jnp.sum(codebooks[which, codes], axis=1))[:, None]
    for m, book in enumerate(codebooks):
        if codes is not None:
            rest += book[beam[..., m]]
        error = jnp.sum(jnp.square(rest), -1, keepdims=True) - 2 * rest @ book.T
        error += jnp.sum(jnp.square(book), axis=-1)  # [groups, beam, entries]
        is_last = m == count - 1
        if is_last and force_update and codes is not None:
            same = jnp.all(beam[..., :m] == codes[:, None, :m], axis=-1)[..., None]
            same &= jnp.arange(entries) == codes[:, None, m:]
            error = jnp.where(same, jnp.inf, error)
        keep = 1 if is_last else min(beam_size, beam.shape[1] * entries)
        _, index = jax.lax.top_k(-error.reshape(target.shape[0], -1), keep)
        source, code = jnp.divmod(index, entries)
        beam = jnp.take_along_axis(beam, source[..., None], axis=1).at[..., m].set(code)
        rest = jnp.take_along_axis(rest, source[..., None], axis=1) - book[code]
    return beam[:, 0]


def _k_means(key: Array, x: Array, k: int, iterations: int) -> Array:
    """Centers `[k, g]` of `[n, g]`; one that loses all of its points stays."""
    first = jax.random.choice(key, x.shape[0], (k,), replace=x.shape[0] < k)

    def step(_: int, centers: Array) -> Array:
        codes = _beam_search(x, centers[None], None, 1, force_update=False)[:, 0]
        count = jax.ops.segment_sum(jnp.ones(x.shape[0]), codes, k)[:, None]
        mean = jax.ops.segment_sum(x, codes, k) / jnp.maximum(count, 1)
        return jnp.where(count > 0, mean, centers)

    return jax.lax.fori_loop(0, iterations, step, x[first])
