"""Training without gradients and almost without communication: one byte per perturbation.

Every machine knows every perturbation, since its random key is made of public identifiers; what
only its own machine knows is the slope of the loss along it, and that is one number.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.lax import optimization_barrier
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype

Mask = Any | Callable[[optax.Params], Any] | None


def sample_key(
    base_key: Array, step: ArrayLike, machine: ArrayLike = 0, sample: ArrayLike = 0
) -> Array:
    """The key of one perturbation, which every machine can make.

        key = fold_in(fold_in(fold_in(base_key, step), machine), sample)

    It depends on identifiers alone, not on who else takes part: machines may join and leave.

    Args:
      base_key: the key that all machines share.
      step: integer, at least 0; the training step.
      machine: integer, at least 0; which machine measures.
      sample: integer, at least 0; which of the machine's perturbations in this step.

    Returns:
      a key of the type of `base_key`.

    Raises:
      ValueError: a negative identifier.
      TypeError: an identifier is not an integer.

    Use it with `spsa_projected_gradient` where the bytes travel by a transport of one's own;
    `decentralized_spsa_step` does it inside of one program.

    Cost: three hashes; nothing is communicated.

    Example:
      >>> key = sample_key(jax.random.key(0), step=3, machine=1)
      >>> print(jax.random.normal(key, 2))
      [-0.49698514  0.26633894]

    Reference: Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on
    Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness", 2023,
    arXiv:2306.10015.
    """
    for name, value in {"step": step, "machine": machine, "sample": sample}.items():
        _check_identifiers(name, value)
        base_key = jax.random.fold_in(base_key, value)  # type: ignore[arg-type]
    return base_key


def spsa_projected_gradient(
    loss_fn: Callable[[optax.Params], ArrayLike],
    params: optax.Params,
    key: Array,
    *,
    epsilon: ArrayLike = 1e-3,
    mask: Mask = None,
) -> Array:
    r"""The slope of the loss along a random direction, from two evaluations.

        g = (L(θ + ε z) - L(θ - ε z)) / (2 ε),     z ~ N(0, I) from the key

    g z is an unbiased estimate of ∇L up to O(ε²), and exact along z where L is quadratic.

    Args:
      loss_fn: L, a function of the parameters to a scalar; it must be the same function both
        times (the same minibatch, the same dropout key).
      params: θ, a tree of floating-point arrays.
      key: the key of z, a `sample_key`. Leaf i of the tree draws from `fold_in(key, i)`, in
        float32 whatever its type.
      epsilon: ε above 0. Default 1e-3, as in the paper. θ ± ε z is rounded to the type of θ: with
        bfloat16 parameters take ε of the size of their spacing, 1e-2 say.
      mask: tree of booleans (or a prefix of one), or a function that makes one of the parameters:
        the leaves to perturb (adapters, say). Default: all.

    Returns:
      g, a scalar in at least float32; not finite where a loss is not.

    Raises:
      ValueError: `epsilon` is not positive and finite, `loss_fn` returns no scalar, `mask` does
        not fit `params`.
      TypeError: a leaf to perturb is not floating point.

    Use it where there is no memory for a backward pass or no derivative at all; the estimate is
    d-dimensional noise around the gradient, and wants small learning rates.

    Cost: two evaluations of the loss, one after the other, and no backward pass; one perturbed copy
    of the parameters, and z of one leaf.

    Example:
      >>> x, key = jnp.array([3.0, -1.0]), jax.random.key(0)
      >>> slope = spsa_projected_gradient(lambda x: jnp.sum(x**2) / 2, x, key)
      >>> z = jax.random.normal(jax.random.fold_in(key, 0), 2)
      >>> print(round(float(slope), 2), round(float(x @ z), 2))
      3.92 3.92

    Reference: Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on
    Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness", 2023,
    arXiv:2306.10015.
    """
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    return _slope_and_loss(loss_fn, params, key, epsilon, mask)[0]


def encode_projected_gradient(
    gradient: ArrayLike, *, bits: int = 8, log_scale: float | None = None
) -> Array:
    r"""Projected gradients as codes of one byte: a sign and a rounded logarithm.

        q = clip(round(s ln|g|), -m, m),     m = 2^(bits-2) - 1
        code = 2^(bits-1) [g < 0] + 2^(bits-2) + q

    Code 0 is g = 0. Code 2^(bits-1) says "no contribution" and stands for every g that is not
    finite. Magnitudes beyond e^(±m/s) are clipped to it.

    Args:
      gradient: g of any shape, floating point.
      bits: 8, a strict byte of 127 magnitudes, or 9, the 255 magnitudes and a sign of the authors'
        program, which take two bytes.
      log_scale: s, steps per factor e, at least m/64. The relative error within the range is at
        most e^(1/2s) - 1. None: 8 for 8 bits and 16 for 9, the authors' value: both reach from
        e^-7.9 to e^7.9 (3.8e-4 to 2.7e3), with errors of 6.5 % and 3.2 %.

    Returns:
      the codes, uint8 (uint16 for 9 bits), with the shape of `gradient`.

    Raises:
      ValueError: `bits` is neither 8 nor 9, `log_scale` out of its range.
      TypeError: `gradient` is not floating point.

    Use it to send what `spsa_projected_gradient` measured; scale a loss whose slopes lie outside of
    the range rather than take another s.

    Cost: elementwise; one byte a gradient, two with 9 bits.

    Example:
      >>> codes = encode_projected_gradient(jnp.array([1.0, -1.0, 0.0, jnp.nan]))
      >>> print(codes, codes.dtype)
      [ 64 192   0 128] uint8

    Reference: Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on
    Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness", 2023,
    arXiv:2306.10015.
    """
    log_scale = _checked_log_scale(bits, log_scale)
    check_floating(gradient=gradient)
    gradient = jnp.asarray(gradient, compute_dtype(gradient))
    middle, sign_bit = 2 ** (bits - 2), 2 ** (bits - 1)
    coded = jnp.isfinite(gradient) & (gradient != 0)
    logarithm = jnp.log(jnp.where(coded, jnp.abs(gradient), 1))
    q = jnp.clip(jnp.round(log_scale * logarithm), 1 - middle, middle - 1)
    code = q.astype(jnp.int32) + middle + jnp.where(gradient < 0, sign_bit, 0)
    code = jnp.where(gradient == 0, 0, jnp.where(coded, code, sign_bit))
    return code.astype(jnp.uint8 if bits == 8 else jnp.uint16)


def decode_projected_gradient(
    codes: ArrayLike, *, bits: int = 8, log_scale: float | None = None
) -> Array:
    r"""The projected gradients that codes stand for.

        g = ± e^(q/s),     q = code mod 2^(bits-1) - 2^(bits-2)

    Args:
      codes: integers of any shape, from `encode_projected_gradient`.
      bits: 8 or 9, as they were encoded.
      log_scale: s, as they were encoded; None as there.

    Returns:
      g in float32, with the shape of `codes`. Exactly 0 for zero and for "no contribution", and
      for integers that are no code. The values come from a table, the same bits on every machine.

    Raises:
      ValueError: `bits` is neither 8 nor 9, `log_scale` out of its range.
      TypeError: `codes` are not integers.

    Use it to look at a log of bytes; `shared_randomness_update` decodes by itself.

    Cost: one look-up for each code.

    Example:
      >>> print(decode_projected_gradient(jnp.array([64, 192, 72, 0, 128], jnp.uint8)))
      [ 1.        -1.         2.7182817  0.         0.       ]

    Reference: Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on
    Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness", 2023,
    arXiv:2306.10015.
    """
    log_scale = _checked_log_scale(bits, log_scale)
    _check_integers("codes", codes)
    middle = 2 ** (bits - 2)
    magnitudes = np.exp((np.arange(2 * middle) - middle) / log_scale)
    magnitudes[0] = 0.0
    table = np.concatenate([magnitudes, 0.0 - magnitudes]).astype(np.float32)
    index = jnp.asarray(codes).astype(jnp.uint32)  # a negative index would count from the end
    return jnp.asarray(table).at[index].get(mode="fill", fill_value=0.0)


def shared_randomness_update(
    params: optax.Params,
    codes: ArrayLike,
    machines: ArrayLike,
    samples: ArrayLike = 0,
    *,
    base_key: Array,
    step: ArrayLike,
    learning_rate: optax.ScalarOrSchedule,
    normalization: Literal["sqrt", "mean"] = "sqrt",
    where: ArrayLike | None = None,
    mask: Mask = None,
    bits: int = 8,
    log_scale: float | None = None,
) -> optax.Params:
    r"""Applies the messages (machine, sample, code) of one step, on every machine alike.

        θ ← θ - lr Σ_(k,j) g_(k,j) z_(k,j) / √n     in the order of (k, j)

    z_(k,j) is drawn again from `sample_key(base_key, step, k, j)`; n counts the messages that
    contribute. Machines that apply the same messages to the same parameters keep the same bits, in
    whatever order the messages came and whatever else their programs do, as long as they are of
    one kind (processor and jax version: the normal distribution is not computed alike on all).

    Args:
      params: θ, a tree of floating-point arrays; those of a step's beginning.
      codes: what was received, any shape, zero-size too: integer codes of
        `encode_projected_gradient`, or the projected gradients themselves (floating point).
      machines: integer identifiers k, at least 0, broadcastable to `codes`.
      samples: integer identifiers j, at least 0, broadcastable to `codes`. Default 0.
      base_key: the key that all machines share.
      step: integer, at least 0: the step that the messages belong to.
      learning_rate: lr at least 0, or a schedule step → lr.
      normalization: "sqrt" divides by √n, as the authors' program does; "mean" by n, which makes
        an unbiased estimate of the gradient.
      where: boolean, broadcastable to `codes`: the messages that arrived. Default: all.
      mask: the leaves that were perturbed, as in `spsa_projected_gradient`; others stay.
      bits: 8 or 9, of integer codes.
      log_scale: s of integer codes.

    Returns:
      the new parameters in their types; summed in at least float32, rounded once. Codes "no
      contribution", gradients that are not finite and absent messages change nothing, and do not
      count in n; a zero gradient counts.

    Raises:
      ValueError: two messages of the same machine and sample, a number out of its range, shapes
        or trees that do not match, an unknown `normalization`.
      TypeError: identifiers are not integers, a leaf to update is not floating point.

    Use it where processes exchange bytes by a transport of their own, and to replay a log of them
    from a checkpoint: a newcomer who does has the bits of those that took part.

    Cost: a random number for each parameter and message, drawn one leaf and message after the
    other; in memory one leaf's z and its float32 copy.

    Example:
      >>> x = {"w": jnp.zeros(2)}
      >>> codes = jnp.array([64, 128], jnp.uint8)  # slopes of 1 and of no contribution
      >>> key = jax.random.key(0)
      >>> print(shared_randomness_update(x, codes, jnp.array([7, 2]), base_key=key, step=0,
      ...                                learning_rate=0.1)["w"])
      [-0.19412564  0.00311757]

    Reference: Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on
    Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness", 2023,
    arXiv:2306.10015.
    """
    if normalization not in ("sqrt", "mean"):
        raise ValueError(f"normalization must be 'sqrt' or 'mean', got {normalization!r}")
    _check_identifiers("machines", machines)
    _check_identifiers("samples", samples)
    codes = jnp.asarray(codes)
    check_broadcastable(codes.shape, machines=machines, samples=samples, where=where)
    arrived = jnp.ones(codes.shape, bool) if where is None else where
    messages = [jnp.broadcast_to(x, codes.shape).ravel() for x in (machines, samples, arrived)]
    _check_distinct(*messages)
    order = jnp.lexsort((messages[1], messages[0]))
    machines, samples, arrived, codes = (x[order] for x in (*messages, codes.ravel()))

    if jnp.issubdtype(codes.dtype, jnp.floating):
        gradients, contributes = codes.astype(jnp.float32), jnp.isfinite(codes)
    else:
        gradients = decode_projected_gradient(codes, bits=bits, log_scale=log_scale)
        contributes = (gradients != 0) | (codes == 0)
    contributes &= arrived
    rate = _learning_rate(learning_rate, step)
    # The barriers, here and below, keep compilers from merging roundings with their surroundings.
    count, gradients, rate = optimization_barrier((contributes.sum(), gradients, rate))
    norm = jnp.maximum(count, 1).astype(jnp.float32)
    norm = jnp.sqrt(norm) if normalization == "sqrt" else norm
    steps = optimization_barrier(rate * jnp.where(contributes, gradients, 0.0) / norm)
    keys = jax.vmap(lambda k, j: sample_key(base_key, step, k, j))(machines, samples)

    def descend_leaf(index, leaf):
        def apply(x, message):
            key, step = message

            def moved(x):
                return x - optimization_barrier(step * _normal(key, index, x.shape))

            return jax.lax.cond(step != 0, moved, lambda x: x, x), None

        wide, _ = jax.lax.scan(apply, leaf.astype(compute_dtype(leaf)), (keys, steps))
        return optimization_barrier(wide.astype(leaf.dtype))

    return _map_selected(descend_leaf, params, mask)


class SpsaInfo(NamedTuple):
    """What `decentralized_spsa_step` tells besides the parameters.

    Attributes:
      losses: [samples], (L(θ + ε z) + L(θ - ε z)) / 2 of this machine's samples; they stay here.
      codes: [machines, samples], what all machines sent: the log that `shared_randomness_update`
        replays.
    """

    losses: Array
    codes: Array


def decentralized_spsa_step(
    loss_fn: Callable[..., ArrayLike],
    params: optax.Params,
    batches: Any = None,
    *,
    base_key: Array,
    step: ArrayLike,
    learning_rate: optax.ScalarOrSchedule,
    epsilon: ArrayLike = 1e-3,
    num_samples: int | None = None,
    normalization: Literal["sqrt", "mean"] = "sqrt",
    mask: Mask = None,
    bits: int = 8,
    log_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[optax.Params, SpsaInfo]:
    r"""A training step of machines that send each other one byte per perturbation.

        g_(k,j) = (L_(k,j)(θ + ε z_(k,j)) - L_(k,j)(θ - ε z_(k,j))) / (2 ε)
        θ ← θ - lr Σ_(k,j) decode(encode(g_(k,j))) z_(k,j) / √n

    Machine k measures its samples j on its own data; the codes of all are gathered, and every
    machine makes the same update. Nothing else is exchanged: neither parameters nor gradients.

    Args:
      loss_fn: `loss_fn(params, batch)` to a scalar, or `loss_fn(params)` where `batches` is None.
      params: θ, a tree of floating-point arrays, the same on all machines.
      batches: tree of this machine's minibatches, one per sample, along the leading axis of each
        leaf. What both evaluations must share belongs to it: dropout keys, say. None: every
        sample perturbs the same `loss_fn(params)`.
      base_key: the key that all machines share.
      step: integer, at least 0; the training step.
      learning_rate: lr at least 0, or a schedule step → lr.
      epsilon: ε above 0. Default 1e-3, as in the paper.
      num_samples: perturbations per step on this machine. Default: as many as there are
        minibatches, or 1.
      normalization: "sqrt" (default) or "mean", as in `shared_randomness_update`.
      mask: the leaves to train, as in `spsa_projected_gradient`. Default: all.
      bits: 8 or 9, of the codes.
      log_scale: s of the codes.
      axis_name: the axis (or axes) of `shard_map` whose devices are the machines. Default: there
        is one machine, number 0, which may itself be sharded.

    Returns:
      the new parameters, and the `SpsaInfo`. Measurements that are not finite are sent as "no
      contribution".

    Raises:
      ValueError: a number out of its range, shapes or trees that do not match, `batches` without
        a common leading axis of `num_samples`.
      TypeError: a leaf to train is not floating point.

    Use it where memory allows inference only, or where the wire is slow; with a wire, gradients
    learn faster per step. Between processes with a transport of their own, compose
    `spsa_projected_gradient`, `encode_projected_gradient` and `shared_randomness_update`.

    Cost: two evaluations of the loss a sample, no backward pass; one byte a sample travels; the
    update draws z of all samples of all machines.

    Example:
      >>> loss = lambda x, target: jnp.sum((x - target) ** 2)
      >>> targets = jnp.ones((4, 3))  # four perturbations a step
      >>> train = jax.jit(lambda x, step: decentralized_spsa_step(
      ...     loss, x, targets, base_key=jax.random.key(0), step=step, learning_rate=0.1))
      >>> x = jnp.zeros(3)
      >>> for step in range(100):
      ...     x, info = train(x, step)
      >>> print(info.codes.shape, info.codes.dtype, bool(info.losses.mean() < 1e-3))
      (1, 4) uint8 True

    Reference: Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on
    Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness", 2023,
    arXiv:2306.10015.
    """
    check_interval(0, jnp.inf, closed="neither", epsilon=epsilon)
    num_samples = _checked_num_samples(batches, num_samples)
    machine = 0 if axis_name is None else jax.lax.axis_index(axis_name)

    def measure(sample_and_batch):
        sample, batch = sample_and_batch
        loss = loss_fn if batches is None else lambda params: loss_fn(params, batch)
        key = sample_key(base_key, step, machine, sample)
        slope, value = _slope_and_loss(loss, params, key, epsilon, mask)
        return value, encode_projected_gradient(slope, bits=bits, log_scale=log_scale)

    losses, codes = jax.lax.map(measure, (jnp.arange(num_samples), batches))
    if axis_name is None:
        codes = codes[None]
    else:
        codes = jax.lax.all_gather(codes, axis_name, to="invarying")
    new = shared_randomness_update(
        params,
        codes,
        jnp.arange(codes.shape[0])[:, None],
        jnp.arange(num_samples),
        base_key=base_key,
        step=step,
        learning_rate=learning_rate,
        normalization=normalization,
        mask=mask,
        bits=bits,
        log_scale=log_scale,
    )
    return new, SpsaInfo(losses, codes)


def _normal(key, index, shape):
    """z of leaf `index`: float32 and on its own, so that its bits depend on nothing around it."""
    key = jax.random.fold_in(key, index)
    return optimization_barrier(jax.random.normal(key, shape, jnp.float32))


def _slope_and_loss(loss_fn, params, key, epsilon, mask):
    """(L₊ - L₋) / 2ε and (L₊ + L₋) / 2."""

    def loss_at(shift):
        def shifted(index, x):
            wide = x.astype(compute_dtype(x)) + shift * _normal(key, index, x.shape)
            return wide.astype(x.dtype)

        loss = jnp.asarray(loss_fn(_map_selected(shifted, params, mask)))
        check_shape((), **{"the value of loss_fn": loss})
        return loss.astype(compute_dtype(loss))

    # A loop, not two calls: so only one perturbed copy of the parameters is alive.
    epsilon = jnp.asarray(epsilon, jnp.float32)
    plus, minus = jax.lax.map(loss_at, jnp.stack([epsilon, -epsilon]))
    return (plus - minus) / (2 * epsilon), (plus + minus) / 2


def _map_selected(function, params, mask):
    """`function(index, leaf)` of the leaves that the mask selects; the others as they are."""
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    mask = mask(params) if callable(mask) else mask
    try:
        selected = jax.tree.leaves(jax.tree.broadcast(True if mask is None else mask, params))
    except ValueError as error:
        raise ValueError(
            f"mask must be a tree of booleans for the tree structure {structure}, "
            f"got {jax.tree.structure(mask)}"
        ) from error
    leaves = [jnp.asarray(leaf) for _, leaf in paths]
    for (path, _), leaf, chosen in zip(paths, leaves, selected):
        if chosen:
            check_floating(**{"params" + jax.tree_util.keystr(path): leaf})
    new = [
        function(index, leaf) if chosen else leaf
        for index, (leaf, chosen) in enumerate(zip(leaves, selected))
    ]
    return jax.tree.unflatten(structure, new)


def _learning_rate(learning_rate, step):
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    check_interval(0, jnp.inf, learning_rate=rate)
    return jnp.asarray(rate, jnp.float32)


def _checked_log_scale(bits, log_scale):
    if bits not in (8, 9):
        raise ValueError(f"bits must be 8 or 9, got {bits!r}")
    if log_scale is None:
        return 2.0 ** (bits - 5)
    check_interval((2 ** (bits - 2) - 1) / 64, jnp.inf, log_scale=log_scale)
    return log_scale


def _checked_num_samples(batches, num_samples):
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if batches is None:
        sizes = {(1 if num_samples is None else num_samples,)}
    if len(sizes) != 1 or () in sizes or (num_samples is not None and sizes != {(num_samples,)}):
        raise ValueError(
            "batches must have one leading axis of samples"
            + ("" if num_samples is None else f" of size num_samples = {num_samples}")
            + f", got {jax.tree.map(jnp.shape, batches)}"
        )
    ((size,),) = sizes
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"num_samples must be an integer of at least 1, got {size!r}")
    return size


def _check_integers(name, values):
    if not jnp.issubdtype(jnp.result_type(values), jnp.integer):
        raise TypeError(f"{name} must be integers, got {jnp.result_type(values).name}")


def _check_identifiers(name, values):
    _check_integers(name, values)
    check_interval(0, 2**32 - 1, **{name: values})


def _check_distinct(machines, samples, arrived):
    if any(isinstance(x, jax.core.Tracer) for x in (machines, samples, arrived)):
        return
    arrived = np.asarray(arrived)
    names = np.stack([np.asarray(machines), np.asarray(samples)], axis=1)[arrived]
    distinct, counts = np.unique(names, axis=0, return_counts=True)
    if np.any(counts > 1):
        machine, sample = distinct[counts > 1][0]
        raise ValueError(
            "machines and samples must name each message once, "
            f"got machine {machine}, sample {sample} more than once"
        )
