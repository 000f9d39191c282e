"""Quantization of a layer that is guided by what its outputs do to the end loss.

Kernels are `[in, out]` as in flax, and the layer computes z = x W. A Hessian for each group of
consecutive outputs takes the place of the one that all outputs share. LNQ is the solver for levels
that need not be equally spaced; `guided_gptq` is the one for levels that are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.gptq import check_finite, gptq_quantize
from jaxref.quantization.packing import pack, unpack, values_per_byte
from jaxref.quantization.tensor import QTensor, QuantSpec

_LAZY = 128  # inputs whose changes reach the others together
_CHANNELS = 64  # outputs whose one-hot codes are in memory at once
_LLOYD_STEPS = 30
_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LNQTensor:
    """A kernel `[in, out]` of which every output has its own 2^bits levels.

    A pytree; `lnq_quantize` makes one and `lnq_dequantize` gives the kernel back. A weight costs 2,
    4 (of 3 bits too) or 8 bits for its code, and 32 · 2^bits / in of the codebook.

    Attributes:
      values: the codes, packed along the outputs as `pack` does, from -2^(bits-1) on.
      codebook: `[2^bits, out]` in at least float32, the levels.
      bits: 2 to 8.
      dtype: the floating-point type to dequantize to.
      padding: how many codes at the end of the packed axis only fill up its last byte.

    Reference: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance", 2025, arXiv:2505.07004.
    """

    values: Array
    codebook: Array
    bits: int = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    padding: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return (*self.values.shape[:-1], self.codebook.shape[-1])

    @property
    def nbytes(self) -> int:
        """The memory of codes and codebook together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def codes(self) -> Array:
        """The index of every weight's level, int32 `[in, out]`."""
        codes = unpack(self.values, self.bits, padding=self.padding)
        return codes.astype(jnp.int32) + 2 ** (self.bits - 1)


def guided_hessian(inputs: ArrayLike, output_gradients: ArrayLike, *, num_groups: int = 1) -> Array:
    r"""The second moments of a layer's inputs, weighted by what its outputs do to the loss.

    With x_t the input of token t and g_tj = ∂L/∂z_tj, for each group J_k of consecutive outputs,

        H_k = Σ_t x_t x_tᵀ · mean_{j ∈ J_k} g_tj²

    With a group for each output this is that output's block of the Fisher matrix, and
    Σ_j (w_j - ŵ_j)ᵀ H_j (w_j - ŵ_j) = Σ_t Σ_j g_tj² (x_tᵀ (w_j - ŵ_j))².

    Args:
      inputs: x, floating point `[..., in]`.
      output_gradients: g, floating point `[..., out]` with the same leading axes: of the loss with
        respect to the layer's outputs, in full precision of the weights. Computed in at least
        float32, where squares vanish below about 1e-19: scale the loss up if need be.
      num_groups: how many groups of equal size, a divisor of `out`; 1 (default) to 4 is usual, as
        each takes a matrix.

    Returns:
      `[num_groups, in, in]`. Those of several batches add up.

    Raises:
      ValueError: shapes that do not fit, or a `num_groups` that does not divide.
      TypeError: arguments not floating point.

    Use it where a backward pass over the calibration data is affordable; with gradients that are
    the same for all tokens and outputs it is `hessian` up to a factor. Get the gradients by adding
    zeros to the layer's outputs and differentiating with respect to those.

    Cost: a backward pass over the calibration data; num_groups · d_in² multiplications a token, and
    num_groups matrices of d_in² numbers.

    Example:
      >>> x, g = jnp.array([[1.0, 2.0], [1.0, 0.0]]), jnp.array([[1.0, 0.0], [2.0, 2.0]])
      >>> print(guided_hessian(x, g)[0])
      [[4.5 1. ]
       [1.  2. ]]

    Reference: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance", 2025, arXiv:2505.07004.
    """
    check_floating(inputs=inputs, output_gradients=output_gradients)
    x, g = jnp.asarray(inputs), jnp.asarray(output_gradients)
    if x.ndim == 0:
        raise ValueError("inputs must have shape [..., in], got ()")
    check_shape((*x.shape[:-1], *g.shape[-1:]), output_gradients=g)
    check_interval(1, jnp.inf, num_groups=num_groups)
    if g.shape[-1] % num_groups:
        raise ValueError(f"num_groups must divide the {g.shape[-1]} outputs, got {num_groups}")
    dtype = compute_dtype(x, g)
    x = x.reshape(-1, x.shape[-1]).astype(dtype)
    g = g.reshape(len(x), num_groups, g.shape[-1] // num_groups).astype(dtype)
    return _weighted_moments(x, jnp.mean(g**2, axis=-1).T)


def guided_objective(weight: ArrayLike, weight_hat: ArrayLike, hessians: ArrayLike) -> Array:
    r"""The estimate of what replacing a layer's weights does to the end loss.

        Σ_k Σ_{j ∈ J_k} (w_j - ŵ_j)ᵀ H_k (w_j - ŵ_j)

    Args:
      weight: W, floating point `[in, out]`.
      weight_hat: Ŵ, of the same shape.
      hessians: H, `[groups, in, in]` as `guided_hessian` gives them, or `[in, in]` for one group of
        all outputs.

    Returns:
      A number in at least float32. With H of `hessian`, it is twice the sum of the outputs' mean
      squared errors.

    Raises:
      ValueError: shapes that do not fit, or NaN or infinite entries where they are known.
      TypeError: arguments not floating point.

    Use it to compare quantized kernels of a layer without running the model.

    Cost: d_in² d_out multiplications, no run of the model.

    Example:
      >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> print(guided_objective(w, w - 1, jnp.array([[2.0, 1.0], [1.0, 3.0]])))
      14.0

    Reference: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance", 2025, arXiv:2505.07004.
    """
    weight, hessians = _checked(weight, hessians)
    check_floating(weight_hat=weight_hat)
    check_shape(weight.shape, weight_hat=weight_hat)
    difference = _in_groups(weight - jnp.asarray(weight_hat, weight.dtype), len(hessians))
    return jnp.sum(jax.vmap(_objective)(difference, hessians))


def lnq_quantize(
    weight: ArrayLike,
    hessians: ArrayLike,
    *,
    bits: int,
    iterations: int = 3,
    coordinate_cycles: int = 4,
    ridge: float = 1e-7,
    init: tuple[ArrayLike, ArrayLike] | None = None,
) -> LNQTensor:
    r"""Quantizes each output of a kernel to levels of its own that need not be equally spaced.

    For each output, with its weights w, the one-hot codes P `[in, 2^bits]` and the levels c,

        min over P and c of (w - P c)ᵀ H (w - P c)

    by turns: the best levels for the codes, c ← c + (Pᵀ H P + ρ I)⁻¹ Pᵀ H (w - P c), and for one
    input i after the other the best code for these levels, the one whose level is nearest to

        w_i - Σ_{k≠i} H_ik (ŵ_k - w_k) / H_ii

    Every half step is kept for those outputs only whose objective it does not raise, so none ends
    above where it started.

    Args:
      weight: floating point `[in, out]`, finite.
      hessians: H `[groups, in, in]` as `guided_hessian` gives them, symmetric and positive
        semidefinite, or `[in, in]` for one that all outputs share. An input with H_ii = 0 has the
        levels nearest to its weights.
      bits: 2 to 8.
      iterations: how often the levels are updated, at least 0, and the codes in between. Default 3.
      coordinate_cycles: how often all inputs take their turn in each update of the codes, at least
        1. Default 4.
      ridge: ρ over the mean of the diagonal of H, above 0. Default 1e-7. It holds levels where they
        are that no code uses.
      init: codes, integers `[in, out]` from 0 to 2^bits - 1, and levels `[2^bits, out]` to start
        from. Default: k-means of the weights of each output, each counting H_ii.

    Returns:
      An `LNQTensor`.

    Raises:
      ValueError: shapes that do not fit, NaN or infinite entries, or an argument out of range.
      TypeError: `weight` or `hessians` not floating point, or codes that are no integers.

    The most accurate of the methods of this file at 2 to 4 bits, for kernels that are read from
    memory and looked up. `guided_gptq` gives levels at equal distances, which multiply as integers.

    Cost: an iteration is O(d_in² d_out (2^bits + coordinate_cycles)), with the inputs in sequence;
    no factorization, one-hot codes of 64 outputs a group at a time.

    Example:
      >>> w = jnp.array([[0.0], [0.1], [1.0], [1.1], [4.0], [5.0]])
      >>> q = lnq_quantize(w, jnp.eye(6), bits=2)
      >>> print(lnq_dequantize(q).T)
      [[0.05 0.05 1.05 1.05 4.   5.  ]]

    Reference: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance", 2025, arXiv:2505.07004.
    """
    check_interval(2, 8, bits=bits)
    check_interval(0, jnp.inf, iterations=iterations)
    check_interval(1, jnp.inf, coordinate_cycles=coordinate_cycles)
    check_interval(0, jnp.inf, closed="right", ridge=ridge)
    dtype = jnp.result_type(weight)
    w, hessians = _checked(weight, hessians)
    groups = len(hessians)
    start = None
    if init is not None:
        codes, codebook = jnp.asarray(init[0]), jnp.asarray(init[1])
        if not jnp.issubdtype(codes.dtype, jnp.integer):
            raise TypeError(f"init must have integers for codes, got {codes.dtype.name}")
        check_floating(**{"init[1]": codebook})
        check_shape(w.shape, **{"init[0]": codes})
        check_shape((2**bits, w.shape[1]), **{"init[1]": codebook})
        check_interval(0, 2**bits - 1, closed="both", **{"init[0]": codes})
        check_finite(**{"init[1]": codebook})
        start = (
            _in_groups(codes.astype(jnp.int32), groups),
            _in_groups(codebook.astype(w.dtype), groups),
        )
    codes, codebook = _lnq(
        _in_groups(w, groups), hessians, start, ridge, 2**bits, iterations, coordinate_cycles
    )
    codes = (_joined(codes) - 2 ** (bits - 1)).astype(jnp.int8)
    padding = -w.shape[1] % values_per_byte(bits)
    return LNQTensor(pack(codes, bits), _joined(codebook), bits, jnp.dtype(dtype), padding)


def lnq_dequantize(q: LNQTensor, *, dtype: DTypeLike | None = None) -> Array:
    """The kernel that the codes stand for: each weight's level.

    Args:
      q: what `lnq_quantize` returned.
      dtype: floating-point type of the result. Default: the type that was quantized.

    Returns:
      `[in, out]`, differentiable in `q.codebook`.

    Raises:
      TypeError: `q` is not an `LNQTensor`, or `dtype` not floating point.

    Use it to compare kernels, or to train the levels by gradients through it with the codes as they
    are; `quantized_linear` multiplies by the codes.

    Cost: a look-up for each weight; the whole kernel in floating point, and its codes as int32 on
    the way.

    Example:
      >>> q = lnq_quantize(jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.eye(2), bits=2)
      >>> print(lnq_dequantize(q))
      [[1. 2.]
       [3. 5.]]

    Reference: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance", 2025, arXiv:2505.07004.
    """
    if not isinstance(q, LNQTensor):
        raise TypeError(f"q must be an LNQTensor, got {type(q).__name__}")
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type, got {dtype.name}")
    return jnp.take_along_axis(q.codebook, q.codes, axis=-2).astype(dtype)


def guided_gptq(
    weight: ArrayLike,
    hessians: ArrayLike,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
    static_groups: bool = False,
) -> QTensor:
    r"""`gptq_quantize` with a Hessian for each group of outputs.

    Args:
      weight: floating point `[in, out]`, finite.
      hessians: `[groups, in, in]` as `guided_hessian` gives them, or `[in, in]`.
      spec: a `QuantSpec` that gives every output scales of its own: "channel" with axis 1, or
        "block" with axis 0.
      damping, activation_order, static_groups: as in `gptq_quantize`.

    Returns:
      A `QTensor` with the shape of `weight`.

    Raises:
      ValueError: a spec whose scales outputs share, and all that `gptq_quantize` raises.
      TypeError: `weight` or `hessians` not floating point, or `spec` not a `QuantSpec`.

    Use it in place of `gptq_quantize` where gradients of the end loss are to be had.

    Cost: O(groups d_in³ + d_in² d_out): a factorization for each group, `gptq_quantize` for its
    outputs, one group after the other.

    Example:
      >>> h = jnp.stack([jnp.eye(3), jnp.array([[2.0, 1.9, 0], [1.9, 2.0, 0], [0, 0, 1.0]])])
      >>> w = jnp.array([[0.4, 0.4], [0.4, 0.4], [3.0, 3.0]])
      >>> guided_gptq(w, h, QuantSpec(bits=3, granularity="channel", axis=1)).codes
      Array([[0, 0],
             [0, 1],
             [3, 3]], dtype=int8)

    Reference: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance", 2025, arXiv:2505.07004.
    """
    w, hessians = _checked(weight, hessians)
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, got {type(spec).__name__}")
    spec = spec.resolve(2)
    own = spec.axes == (-2,) if spec.granularity == "block" else -1 in spec.axes
    if not own:
        raise ValueError(f"spec must give every output scales of its own, got {spec}")
    parts = [
        gptq_quantize(
            part,
            each,
            spec,
            damping=damping,
            activation_order=activation_order,
            static_groups=static_groups,
        )
        for part, each in zip(_in_groups(jnp.asarray(weight), len(hessians)), hessians)
    ]
    codes = jnp.concatenate([part.codes for part in parts], axis=-1)
    scale = jnp.concatenate([part.scale for part in parts], axis=-1)
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    zero_point = jnp.concatenate(zeros, axis=-1) if zeros else None
    padding = -w.shape[1] % values_per_byte(spec.bits)
    values = pack(codes, spec.bits)
    return QTensor(values, scale, zero_point, spec, parts[0].dtype, padding)


def update_codebook(
    w: Array, hessian: Array, codes: Array, codebook: Array, ridge: ArrayLike
) -> Array:
    """The best levels `[values, out]` of a group's outputs for their codes `[in, out]`.

    >>> w = jnp.array([[1.0], [2.0], [5.0]])
    >>> print(update_codebook(w, jnp.eye(3), jnp.array([[0], [0], [1]]), jnp.ones((3, 1)), 1e-7).T)
    [[1.5 5.  1. ]]
    """
    values = len(codebook)
    size = jnp.mean(jnp.diagonal(hessian))
    size = jnp.where(size > 0, size, 1)  # a Hessian of zeros then moves nothing

    def of_channel(channel: tuple[Array, Array, Array]) -> Array:
        w, codes, codebook = channel
        one_hot = jax.nn.one_hot(codes, values, dtype=w.dtype)
        moments = jnp.matmul(hessian, one_hot, precision=_HIGHEST)
        matrix = jnp.matmul(one_hot.T, moments, precision=_HIGHEST)
        error = jnp.matmul(w - codebook[codes], moments, precision=_HIGHEST)
        matrix += ridge * size * jnp.eye(values, dtype=w.dtype)
        return codebook + jnp.linalg.solve(matrix, error)

    return jax.lax.map(
        of_channel, (w.T, codes.T, codebook.T), batch_size=min(_CHANNELS, w.shape[1])
    ).T


def update_codes(
    w: Array, hessian: Array, codes: Array, codebook: Array, cycles: int | Array
) -> Array:
    """Cyclic coordinate descent on the codes of a group's outputs, with the levels as they are.

    >>> w, codebook = jnp.array([[0.4], [0.4]]), jnp.array([[0.0], [1.0]])
    >>> h = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> print(update_codes(w, h, jnp.array([[0], [0]]), codebook, 1).T)
    [[1 0]]
    """
    inputs = len(w)
    size = min(_LAZY, inputs)
    padding = -inputs % size
    diagonal = jnp.pad(jnp.diagonal(hessian), (0, padding))
    hessian = jnp.pad(hessian, [(0, padding), (0, padding)])
    w, codes = (jnp.pad(x, [(0, padding), (0, 0)]) for x in (w, codes))

    def block(number: Array, loop: tuple[Array, Array]) -> tuple[Array, Array]:
        codes, gradient = loop  # the latter H (ŵ - w)
        start = number * size
        columns = jax.lax.dynamic_slice_in_dim(hessian, start, size)  # rows, and it is symmetric
        square = jax.lax.dynamic_slice_in_dim(columns, start, size, axis=1)

        def step(i: Array, loop: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            codes, gradient, changes = loop
            own, h = w[start + i], diagonal[start + i]
            now = jnp.take_along_axis(codebook, codes[start + i][None], axis=0)[0]
            alone = gradient[i] - h * (now - own)
            target = own - jnp.where(h > 0, alone / jnp.where(h > 0, h, 1), 0)
            code = jnp.argmin(jnp.abs(target - codebook), axis=0).astype(codes.dtype)
            change = jnp.take_along_axis(codebook, code[None], axis=0)[0] - now
            gradient += square[:, i, None] * change
            return codes.at[start + i].set(code), gradient, changes.at[i].set(change)

        own = jax.lax.dynamic_slice_in_dim(gradient, start, size)
        end = jnp.minimum(size, inputs - start)
        codes, _, changes = jax.lax.fori_loop(0, end, step, (codes, own, jnp.zeros_like(own)))
        return codes, gradient + jnp.matmul(columns.T, changes, precision=_HIGHEST)

    def cycle(_: Array, codes: Array) -> Array:
        rounded = jnp.take_along_axis(codebook, codes, axis=0)
        gradient = jnp.matmul(hessian, rounded - w, precision=_HIGHEST)
        return jax.lax.fori_loop(0, len(w) // size, block, (codes, gradient))[0]

    return jax.lax.fori_loop(0, cycles, cycle, codes)[:inputs]


def weighted_k_means(w: Array, importance: Array, values: int) -> tuple[Array, Array]:
    """Codes and levels by Lloyd's algorithm for each output, from quantiles of its weights.

    >>> w = jnp.array([[0.0], [1.0], [5.0], [6.0]])
    >>> print(weighted_k_means(w, jnp.array([3.0, 1.0, 1.0, 1.0]), 2)[1].T)
    [[0.25 5.5 ]]
    """
    importance = jnp.where(jnp.any(importance > 0), importance, 1)
    middles = (jnp.arange(values) + 0.5) / values

    def of_channel(w: Array) -> tuple[Array, Array]:
        def nearest(levels: Array) -> Array:
            return jnp.argmin(jnp.abs(w[:, None] - levels), axis=-1)

        def step(_: Array, levels: Array) -> Array:
            counts = jax.nn.one_hot(nearest(levels), values, dtype=w.dtype) * importance[:, None]
            total = jnp.sum(counts, axis=0)
            mean = jnp.matmul(w, counts, precision=_HIGHEST) / jnp.where(total > 0, total, 1)
            return jnp.where(total > 0, mean, levels)

        levels = jax.lax.fori_loop(0, _LLOYD_STEPS, step, jnp.quantile(w, middles))
        return nearest(levels).astype(jnp.int32), levels

    codes, levels = jax.lax.map(of_channel, w.T, batch_size=min(_CHANNELS, w.shape[1]))
    return codes.T, levels.T


def _checked(weight: ArrayLike, hessians: ArrayLike) -> tuple[Array, Array]:
    """The kernel in at least float32 and the Hessians `[groups, in, in]`."""
    check_floating(weight=weight, hessians=hessians)
    w, hessians = jnp.asarray(weight), jnp.asarray(hessians)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"weight must have shape [in, out], none of them 0, got {w.shape}")
    if hessians.ndim == 2:
        hessians = hessians[None]
    check_shape((*hessians.shape[:1], len(w), len(w)), hessians=hessians)
    if len(hessians) == 0 or w.shape[1] % len(hessians):
        raise ValueError(
            f"hessians must be as many as divide the {w.shape[1]} outputs, got {len(hessians)}"
        )
    check_finite(weight=w, hessians=hessians)
    dtype = compute_dtype(w, hessians)
    return w.astype(dtype), hessians.astype(dtype)


def _in_groups(x: Array, groups: int) -> Array:
    """`[n, out]` as `[groups, n, out / groups]`."""
    return x.reshape(len(x), groups, -1).swapaxes(0, 1)


def _joined(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


@jax.jit
def _weighted_moments(x: Array, importance: Array) -> Array:
    """Group by group: all at once would take the inputs' memory for each."""
    return jax.lax.map(
        lambda each: jnp.matmul((x * each[:, None]).T, x, precision=_HIGHEST), importance
    )


def _objective(difference: Array, hessian: Array) -> Array:
    """δᵀ H δ of every column δ of `[in, out]`."""
    return jnp.sum(difference * jnp.matmul(hessian, difference, precision=_HIGHEST), axis=0)


@functools.partial(jax.jit, static_argnames=("values", "iterations", "cycles"))
def _lnq(
    w: Array,
    hessians: Array,
    start: tuple[Array, Array] | None,
    ridge: ArrayLike,
    values: int,
    iterations: int,
    cycles: int,
) -> tuple[Array, Array]:
    """Codes and levels of all groups."""

    def of_group(
        w: Array, hessian: Array, start: tuple[Array, Array] | None
    ) -> tuple[Array, Array]:
        codes, codebook = start or weighted_k_means(w, jnp.diagonal(hessian), values)

        def objective(codes: Array, codebook: Array) -> Array:
            return _objective(jnp.take_along_axis(codebook, codes, axis=0) - w, hessian)

        def iteration(step: Array, loop: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            codes, codebook, least = loop
            # The first turn is that of the levels alone.
            new = update_codes(w, hessian, codes, codebook, jnp.where(step > 0, cycles, 0))
            value = objective(new, codebook)
            better = value <= least
            codes, least = jnp.where(better, new, codes), jnp.where(better, value, least)
            levels = update_codebook(w, hessian, codes, codebook, ridge)
            value = objective(codes, levels)
            better = value <= least
            codebook, least = jnp.where(better, levels, codebook), jnp.where(better, value, least)
            return codes, codebook, least

        loop = (codes, codebook, objective(codes, codebook))
        return jax.lax.fori_loop(0, iterations, iteration, loop)[:2]

    return jax.vmap(of_group)(w, hessians, start)
