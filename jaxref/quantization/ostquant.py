"""Learning equivalent transforms of a network before it is quantized (OSTQuant)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.equivalent_transforms import (
    EquivalentTransform,
    TransformSite,
    apply_equivalent_transforms,
    equivalent_transforms_init,
    fold_norm_gains,
    leaves_by_path,
)
from jaxref.quantization.rotation import stiefel_adam
from jaxref.quantization.tensor import QuantSpec
from jaxref.quantization.uniform import dequantize, quantize


class OSTQuantResult(NamedTuple):
    """What `ostquant` learned.

    Attributes:
      params: the transformed parameters, not quantized: the same float network, for any quantizer.
      transforms: an `EquivalentTransform` by the name of its site.
      losses: `[steps]` float32, the loss before each step.
    """

    params: Any
    transforms: dict[str, EquivalentTransform]
    losses: Array


def range_fake_quantize(x: ArrayLike, spec: QuantSpec) -> Array:
    r"""Quantizes and dequantizes at once, with a gradient that knows what sets the range.

        y = x + s ε,   ε = round(x / s) - x / s,   ∂ε := 0

    with the scale s of the group, which moves with its largest magnitude (its range, if not
    symmetric): ∂L/∂x_i has the straight-through part ∂L/∂y_i, and for the entry that sets the
    range also ε·∂L/∂y times ∂s/∂x_i, so that training can shrink an outlier.

    Args:
      x: floating point, of any shape.
      spec: format and granularity, a `QuantSpec`.

    Returns:
      y with the shape and type of `x`: the values of `fake_quantize`, up to rounding.

    Raises:
      ValueError: as `quantize`.
      TypeError: as `quantize`.

    To train what shapes a distribution, as transforms do; `fake_quantize` has the plain
    straight-through gradient, to which rotations of an outlier look all the same.

    Cost: that of `fake_quantize`, two passes; the gradient keeps the error, an array of the size of
    `x`.

    Example:
      >>> x = jnp.array([0.7, -3.0, 2.2])
      >>> print(range_fake_quantize(x, QuantSpec(bits=3)))
      [ 1. -3.  2.]
      >>> print(jax.grad(lambda x: range_fake_quantize(x, QuantSpec(bits=3)).sum())(x).round(3))
      [1.    0.967 1.   ]

    Reference: the gradient of the rounding in Hu et al., "OstQuant: Refining Large Language Model
    Quantization with Orthogonal and Scaling Transformations for Better Distribution Fitting", 2025,
    arXiv:2501.13987.
    """
    q = quantize(x, spec)
    x, scale = jnp.asarray(x), q.scale
    if q.spec.block_size is not None:
        axis = q.spec.axes[0] + x.ndim
        scale = jnp.repeat(scale, q.spec.block_size, axis=axis)
        scale = jax.lax.slice_in_dim(scale, 0, x.shape[axis], axis=axis)
    wide = x.astype(scale.dtype)
    error = jax.lax.stop_gradient((dequantize(q, dtype=scale.dtype) - wide) / scale)
    return (wide + scale * error).astype(x.dtype)


def kl_top_loss(
    logits: ArrayLike,
    target_logits: ArrayLike,
    *,
    k: int = 1000,
    renormalize: bool = False,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Divergence from a teacher's distribution, on the k classes that it thinks likeliest.

        L = Σ_{i in top-k of p} p_i (log p_i - log q_i),   p = softmax(target), q = softmax(logits)

    Both softmaxes run over all classes, so that with k below their number it is a part of the KL
    divergence and may be negative; with `renormalize` they run over the k classes alone, and it is
    the divergence of those conditional distributions.

    Args:
      logits: `[..., classes]` floating point.
      target_logits: the same shape; the loss sends no gradient there.
      k: at least 1, at most the number of classes counts. Default 1000, the paper's.
      renormalize: see above. Default False, the paper's formula.
      axis: the class axis.
      where: boolean, broadcastable to `logits`; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `logits`; 0 where no class is admitted.

    Raises:
      ValueError: shapes that differ, `axis` out of range or without any class, a `where` that does
        not broadcast, or `k` below 1.
      TypeError: logits that are not floating point.

    For the calibration of a quantized language model on few tokens: the tail of the vocabulary,
    tens of thousands of small probabilities, is noise there; `optax.losses.kl_divergence` has all
    classes, and cross-entropy with the next token one.

    Cost: two softmaxes over the classes and the k largest of them; with `renormalize` softmaxes
    over k.

    Example:
      >>> teacher = jnp.array([2.0, 1.0, -1.0, -2.0])
      >>> print(kl_top_loss(jnp.zeros(4), teacher, k=2).round(4))
      0.7197

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    check_floating(logits=logits, target_logits=target_logits)
    shape = jnp.shape(logits)
    check_shape(shape, target_logits=target_logits)
    check_broadcastable(shape, where=where)
    (axis,) = canonical_axes(axis, len(shape))
    if shape[axis] == 0:
        raise ValueError(f"logits must have at least one class, got shape {shape}")
    check_interval(1, jnp.inf, k=k)
    dtype = compute_dtype(logits, target_logits)
    excluded = 0.25 * float(jnp.finfo(dtype).min)

    def admitted(x):
        x = jnp.asarray(x, dtype)
        return jnp.moveaxis(x if where is None else jnp.where(where, x, excluded), axis, -1)

    student = admitted(logits)
    teacher = jax.lax.stop_gradient(admitted(target_logits))
    k = min(k, shape[axis])
    _, top = jax.lax.top_k(teacher, k)
    if renormalize:
        student, teacher = (jnp.take_along_axis(x, top, axis=-1) for x in (student, teacher))
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    if not renormalize:
        log_q, log_p = (jnp.take_along_axis(x, top, axis=-1) for x in (log_q, log_p))
    loss = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return loss.astype(jnp.result_type(logits))


def ostquant(
    apply_fn: Callable[..., Array],
    params: Any,
    calibration: Any,
    sites: Mapping[str, TransformSite],
    spec: QuantSpec,
    *,
    quantized: Sequence[str] | None = None,
    quantized_apply_fn: Callable[..., Array] | None = None,
    steps: int = 150,
    rotation_learning_rate: float = 0.02,
    scale_learning_rate: float = 0.03,
    k: int = 1000,
    renormalize: bool = False,
) -> OSTQuantResult:
    r"""Learns rotations and scales with which a quantized network keeps the float one's outputs.

    With the transforms T of all sites folded into the parameters,

        min_T  mean over tokens of kl_top(f_q(Q(T(params)), x), f(params, x))

    where Q rounds the kernels, by `range_fake_quantize`. Rotations start from the weights'
    eigenvectors times a Hadamard matrix and move by `stiefel_adam`, scales start at 1 and move by
    Adam on their logarithms; both learning rates fall by a cosine to 0. The weights themselves do
    not train.

    Args:
      apply_fn: `apply_fn(params, batch) -> logits [..., vocabulary]`, the float network f.
      params: its parameters, a tree of arrays.
      calibration: a tree of arrays `[batches, ...]`: step i takes batch i mod batches. The paper's
        are of 8 sequences with 2048 tokens.
      sites: where transforms go, by name, as `transformer_sites` lists them.
      spec: the format of the kernels as matrices `[in, out]`.
      quantized: paths of the kernels to quantize, each the reader of a site. Default: all readers.
      quantized_apply_fn: f_q, where the quantized network differs from f: to round its
        activations (by `range_fake_quantize`), or to apply the online transforms of sites without
        writers. Default `apply_fn`.
      steps: at least 1. Default 150, the paper's.
      rotation_learning_rate, scale_learning_rate: at least 0. Defaults 0.02 and 0.03, the paper's,
        for matrices of thousands of rows: a step moves a rotation by its rate in Frobenius norm.
      k, renormalize: of `kl_top_loss`.

    Returns:
      An `OSTQuantResult`; quantize its `params` with `quantize`, or by a method that also looks at
      the inputs, and run them with `quantized_apply_fn`.

    Raises:
      ValueError: sites that do not fit the parameters, a kernel to quantize that no site reads, no
        batches, or numbers out of range.

    More work than a fixed Hadamard rotation or scales from the activations' maxima, and better at
    4 bits, as it sees the network's output. The paper then rounds the weights by GPTQ.

    Cost: `steps` forward and backward passes of the network and as many forward ones of the
    teacher, all kernels transformed in each; moments of T alone.

    Example:
      >>> params = {"up": jnp.eye(2), "down": jnp.array([[9.0, 0.1], [0.1, 0.2]])}
      >>> site = TransformSite(features=2, writers=("up",), readers=("down",), rotation="learned")
      >>> network = lambda params, x: x @ params["up"] @ params["down"]
      >>> spec = QuantSpec(bits=4)
      >>> result = ostquant(network, params, jnp.ones((1, 3, 2)), {"x": site}, spec, steps=2)
      >>> bool(jnp.allclose(network(result.params, jnp.ones(2)), jnp.array([9.1, 0.3]), rtol=1e-4))
      True

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    check_interval(1, jnp.inf, steps=steps)
    check_interval(
        0,
        jnp.inf,
        rotation_learning_rate=rotation_learning_rate,
        scale_learning_rate=scale_learning_rate,
    )
    batches = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(calibration)}
    if len(batches) != 1 or batches & {(), (0,)}:
        raise ValueError(f"calibration must be arrays [batches, ...], got leading axes {batches}")
    ((batch_count,),) = batches
    reading = {path: site for site in sites.values() for path in site.readers}
    quantized = tuple(reading) if quantized is None else tuple(quantized)
    for path in quantized:
        if path not in reading:
            raise ValueError(f"quantized must name readers of sites, got {path!r}")
    student_fn = apply_fn if quantized_apply_fn is None else quantized_apply_fn
    params = fold_norm_gains(params, sites)
    start = equivalent_transforms_init(params, sites)
    trained, fixed = _split(start, sites)

    def rounded(tree):
        leaves, rebuild = leaves_by_path(tree)
        for path in quantized:
            leaf, site = leaves[path], reading[path]
            rows = math.prod(leaf.shape[: 1 if site.heads is None else 2])
            leaves[path] = range_fake_quantize(leaf.reshape(rows, -1), spec).reshape(leaf.shape)
        return rebuild(leaves)

    def loss(trained, params, batch):
        transformed = apply_equivalent_transforms(params, _join(trained, fixed), sites)
        student = student_fn(rounded(transformed), batch)
        teacher = apply_fn(params, batch)
        return jnp.mean(kl_top_loss(student, teacher, k=k, renormalize=renormalize))

    optimizer = optax.multi_transform(
        {
            "rotation": stiefel_adam(optax.cosine_decay_schedule(rotation_learning_rate, steps)),
            "scale": optax.adam(optax.cosine_decay_schedule(scale_learning_rate, steps)),
        },
        {name: {part: part for part in parts} for name, parts in trained.items()},
    )

    @jax.jit
    def train(trained, params, calibration):
        def step(carry, i):
            trained, state = carry
            batch = jax.tree.map(lambda x: jnp.asarray(x)[i % batch_count], calibration)
            value, gradients = jax.value_and_grad(loss)(trained, params, batch)
            updates, state = optimizer.update(gradients, state, trained)
            return (optax.apply_updates(trained, updates), state), value

        carry = trained, optimizer.init(trained)
        (trained, _), losses = jax.lax.scan(step, carry, jnp.arange(steps))
        return trained, losses

    trained, losses = train(trained, params, calibration)
    transforms = _join(trained, fixed)
    return OSTQuantResult(
        apply_equivalent_transforms(params, transforms, sites), transforms, losses
    )


def _split(
    transforms: dict[str, EquivalentTransform], sites: Mapping[str, TransformSite]
) -> tuple[dict[str, dict[str, Array]], dict[str, EquivalentTransform]]:
    """What is trained, by site and part, and the transforms with None in its place."""
    trained: dict[str, dict[str, Array]] = {name: {} for name in transforms}
    fixed = {}
    for name, (rotation, log_scale) in transforms.items():
        if rotation is not None and sites[name].rotation == "learned":
            trained[name]["rotation"], rotation = rotation, None
        if log_scale is not None:
            trained[name]["scale"] = log_scale
        fixed[name] = EquivalentTransform(rotation, None)
    return trained, fixed


def _join(
    trained: dict[str, dict[str, Array]], fixed: dict[str, EquivalentTransform]
) -> dict[str, EquivalentTransform]:
    return {
        name: EquivalentTransform(
            trained[name].get("rotation", transform.rotation), trained[name].get("scale")
        )
        for name, transform in fixed.items()
    }
