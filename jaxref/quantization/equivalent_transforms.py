"""Equivalent transforms of a network: matrices folded into its parameters that cancel."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.rotation import hadamard_matrix, weight_outlier_minimization_init

ROTATIONS = (None, "learned", "hadamard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformSite:
    """A place in a network where x may be multiplied by T, and what reads it by the inverse of T.

    Parameters are named by their path, keys joined with "/".

    Args:
      features: the size of x, of one head where there are heads.
      readers: kernels whose first axis is `features` (`[heads, features, out]` with heads): they
        become T⁻¹ W. Any axes may follow.
      writers: what makes x, with `features` last (and heads before it): kernels, biases, an
        embedding. They become W T.
      duals: like writers, for the other side of a scalar product: they become W T⁻ᵀ. With the
        queries' kernels as writers and the keys' as duals all scores stay.
      gain: the gain `[features]` of a norm without bias that makes x; it becomes g s. Only for a
        site without rotation.
      heads: the number of transforms, each of `features`; None for one without a heads axis.
        Readers, writers and duals may have a multiple of it, as grouped queries do: neighbours
        then share one.
      rotation: None; "learned", a free orthogonal matrix; "hadamard", that matrix, which stays.
      scaling: whether T has a scale for each feature.
      tied: entries i, i + features / tied, ... share a scale: 2 for queries and keys behind rotary
        positions, which turn the pairs of the two halves.

    Raises:
      ValueError: no features, a gain with a rotation, `tied` that does not divide `features`, or an
        unknown rotation.

    A site without writer is an online transform: what runs the network multiplies there itself,
    as by the Hadamard matrix before the map that leaves a gated MLP.

    Example:
      >>> TransformSite(features=8, writers=("up",), readers=("down",), scaling=True).tied
      1
    """

    features: int
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    duals: tuple[str, ...] = ()
    gain: str | None = None
    heads: int | None = None
    rotation: str | None = None
    scaling: bool = False
    tied: int = 1

    def __post_init__(self) -> None:
        check_interval(1, jnp.inf, features=self.features, tied=self.tied)
        if self.heads is not None:
            check_interval(1, jnp.inf, heads=self.heads)
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation must be one of {ROTATIONS}, got {self.rotation!r}")
        if self.gain is not None and self.rotation is not None:
            raise ValueError(f"gain {self.gain!r} must not be rotated: it is a factor per feature")
        if self.features % self.tied:
            raise ValueError(f"tied must divide features = {self.features}, got {self.tied}")


class EquivalentTransform(NamedTuple):
    """T = R diag(exp(log_scale)) of a site, or of each of its heads.

    Attributes:
      rotation: `[features, features]` or `[heads, features, features]` orthogonal; None for I.
      log_scale: `[features / tied]` or `[heads, features / tied]`; None for scales of 1.
    """

    rotation: Array | None
    log_scale: Array | None


def transformer_sites(
    num_layers: int,
    *,
    features: int,
    num_heads: int,
    head_dim: int,
    mlp_features: int,
    num_kv_heads: int | None = None,
    rotary: bool = True,
    gated: bool = True,
    online_hadamard: bool = False,
) -> dict[str, TransformSite]:
    """The sites of a decoder with RMS norms before its sublayers, by `jaxref.models`' names.

    In the order in which `apply_equivalent_transforms` needs them: one learned rotation of the
    residual stream ("residual"), and in each block scales behind the two norms ("0/attention",
    "0/mlp"), a rotation and scales per key/value head between values and output ("0/value"),
    scales between queries and keys ("0/query"), and between the hidden units' two factors and the
    map that leaves them ("0/hidden").

    Args:
      num_layers, features, num_heads, head_dim, mlp_features, num_kv_heads: the model's sizes;
        `num_kv_heads` defaults to `num_heads`.
      rotary: whether rotary positions turn all of each head, which ties the scales of each pair.
      gated: whether the MLP is gated. The hidden units of a plain one have no scales: these would
        have to pass the activation.
      online_hadamard: add the Hadamard matrix before the map that leaves the MLP
        ("0/hidden_hadamard"), which the network then has to apply to its hidden units.

    Returns:
      Sites by name. The parameters' paths are those of `flax.nnx.to_pure_dict` of the state of a
      `Transformer` with `norm_placement="pre"`, `scan_layers=False` and untied embeddings.

    Raises:
      ValueError: a size below 1.

    Write the dictionary yourself for other networks; LayerNorm, which subtracts a mean, does not
    commute with a rotation of its input.

    Cost: O(layers) names, no arrays.

    Example:
      >>> sizes = dict(features=8, num_heads=2, head_dim=4, mlp_features=16)
      >>> list(transformer_sites(1, **sizes))[:3]
      ['residual', '0/attention', '0/query']

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    check_interval(1, jnp.inf, num_layers=num_layers)
    blocks = [f"blocks/{i}" for i in range(num_layers)]
    attention = [f"{block}/attention/function" for block in blocks]
    mlp = [f"{block}/mlp/function" for block in blocks]
    projections = [tuple(f"{a}/{n}/kernel" for n in ("query", "key", "value")) for a in attention]
    entries = [tuple(f"{m}/{n}/kernel" for n in ("gate", "up")[not gated :]) for m in mlp]
    exits = [f"{a}/output/kernel" for a in attention] + [f"{m}/down/kernel" for m in mlp]
    sites = {
        "residual": TransformSite(
            features=features,
            writers=("embed/embedding", *exits),
            readers=(*(p for ps in (*projections, *entries) for p in ps), "output/kernel"),
            rotation="learned",
        )
    }
    for i, block in enumerate(blocks):
        sites[f"{i}/attention"] = TransformSite(
            features=features,
            gain=f"{block}/attention/input_norm/scale",
            readers=projections[i],
            scaling=True,
        )
        query, key, value = projections[i]
        heads = num_heads if num_kv_heads is None else num_kv_heads
        sites[f"{i}/query"] = TransformSite(
            features=head_dim,
            heads=heads,
            writers=(query,),
            duals=(key,),
            scaling=True,
            tied=2 if rotary else 1,
        )
        sites[f"{i}/value"] = TransformSite(
            features=head_dim,
            heads=heads,
            writers=(value,),
            readers=(f"{attention[i]}/output/kernel",),
            rotation="learned",
            scaling=True,
        )
        sites[f"{i}/mlp"] = TransformSite(
            features=features,
            gain=f"{block}/mlp/input_norm/scale",
            readers=entries[i],
            scaling=True,
        )
        down = (f"{mlp[i]}/down/kernel",)
        if gated:
            sites[f"{i}/hidden"] = TransformSite(
                features=mlp_features, writers=entries[i][-1:], readers=down, scaling=True
            )
        if online_hadamard:
            sites[f"{i}/hidden_hadamard"] = TransformSite(
                features=mlp_features, readers=down, rotation="hadamard"
            )
    sites["final"] = TransformSite(
        features=features, gain="final_norm/scale", readers=("output/kernel",)
    )
    return sites


def fold_norm_gains(params: Any, sites: Mapping[str, TransformSite]) -> Any:
    """Moves the gains of norms into the kernels behind them: W becomes diag(g) W, and g 1.

    Without it a norm does not commute with a rotation of its input.

    Args:
      params: tree of arrays.
      sites: sites by name; those with a `gain` are folded into their readers.

    Returns:
      The tree with those leaves changed, the same function of the input up to rounding.

    Raises:
      ValueError: a path that is not in `params`, or a leaf whose shape does not fit its site.

    Use it before transforms that rotate what a norm reads (`apply_equivalent_transforms`);
    `ostquant` does it first.

    Cost: one pass over the readers, once; nothing in inference.

    Example:
      >>> params = {"norm": jnp.array([2.0, 3.0]), "kernel": jnp.ones((2, 1))}
      >>> site = TransformSite(features=2, gain="norm", readers=("kernel",))
      >>> folded = fold_norm_gains(params, {"norm": site})
      >>> print(folded["norm"], folded["kernel"].T)
      [1. 1.] [[2. 3.]]

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    leaves, rebuild = leaves_by_path(params)
    for site in sites.values():
        if site.gain is not None:
            gain = _take(leaves, site.gain, site, "gain")
            for path in site.readers:
                kernel = _take(leaves, path, site, "reader")
                leaves[path] = (kernel * gain.reshape(-1, *[1] * (kernel.ndim - 1))).astype(
                    kernel.dtype
                )
            leaves[site.gain] = jnp.ones_like(gain)
    return rebuild(leaves)


def equivalent_transforms_init(
    params: Any, sites: Mapping[str, TransformSite]
) -> dict[str, EquivalentTransform]:
    """Transforms to start from: scales of 1, and rotations that spread the readers' outliers.

    Args:
      params: tree of arrays, with the norms' gains folded.
      sites: sites by name.

    Returns:
      An `EquivalentTransform` for each: learned rotations by `weight_outlier_minimization_init` of
      the site's readers.

    Raises:
      ValueError: a path or shape that does not fit, a learned rotation without readers, or a size
        for which there is no Hadamard matrix.

    Use it to start `ostquant`, or alone where there is no data: its rotations already spread the
    outliers of the weights. `fold_norm_gains` goes first.

    Cost: an eigendecomposition, O(features³), for each learned rotation, and W Wᵀ of its readers;
    no data.

    Example:
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> site = TransformSite(features=2, readers=("kernel",), scaling=True)
      >>> print(equivalent_transforms_init(params, {"x": site})["x"].log_scale)
      [0. 0.]

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    leaves, _ = leaves_by_path(params)
    transforms = {}
    for name, site in sites.items():
        rotation = log_scale = None
        leading = () if site.heads is None else (site.heads,)
        if site.rotation == "learned":
            kernels = [_take(leaves, path, site, "reader") for path in site.readers]
            if not kernels:
                raise ValueError(f"sites[{name!r}] must have readers to learn a rotation from")
            rotation = weight_outlier_minimization_init([_matrices(k, site) for k in kernels])
        elif site.rotation == "hadamard":
            rotation = jnp.broadcast_to(
                hadamard_matrix(site.features), (*leading, site.features, site.features)
            )
        if site.scaling:
            log_scale = jnp.zeros((*leading, site.features // site.tied))
        transforms[name] = EquivalentTransform(rotation, log_scale)
    return transforms


def apply_equivalent_transforms(
    params: Any,
    transforms: Mapping[str, EquivalentTransform],
    sites: Mapping[str, TransformSite],
) -> Any:
    r"""Folds transforms into the parameters: what the network computes stays, up to rounding.

        y = x W = (x T) (T⁻¹ W),   T = R diag(s),   T⁻¹ = diag(1/s) Rᵀ

    Writers of x become W T, readers T⁻¹ W, and the duals of writers W T⁻ᵀ = W R diag(1/s).

    Args:
      params: tree of arrays, with gains of 1 (`fold_norm_gains`) where a rotation passes a norm.
      transforms: an `EquivalentTransform` by the name of its site.
      sites: sites by name, applied in this order; it matters where two act on one axis: what the
        stream meets first comes first.

    Returns:
      The tree with those leaves changed, in their types, computed in at least float32.
      Differentiable in the transforms and the parameters.

    Raises:
      ValueError: a transform missing, a path that is not in `params`, or a shape that does not fit.

    Use it at each step of learning transforms, and once at the end, before the weights are
    quantized. `ostquant` is the whole method.

    Cost: a product of T, `[features, features]` also without rotation, with each reader and writer;
    nothing in inference but for online sites.

    Example:
      >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [4.0]])}
      >>> site = TransformSite(features=2, writers=("up",), readers=("down",), scaling=True)
      >>> transform = EquivalentTransform(None, jnp.log(jnp.array([2.0, 0.5])))
      >>> changed = apply_equivalent_transforms(params, {"x": transform}, {"x": site})
      >>> print(changed["up"], changed["up"] @ changed["down"])
      [[2. 1.]] [[11.]]

    Reference: Hu et al., "OstQuant: Refining Large Language Model Quantization with Orthogonal and
    Scaling Transformations for Better Distribution Fitting", 2025, arXiv:2501.13987.
    """
    leaves, rebuild = leaves_by_path(params)
    for name, site in sites.items():
        if name not in transforms:
            raise ValueError(f"transforms must have one for the site {name!r}, got none")
        forward, inverse, dual = _matrices_of(transforms[name], site, name)
        gains = () if site.gain is None else (site.gain,)
        for role, paths, fold, matrix in (
            ("writer", site.writers, _from_right, forward),
            ("dual", site.duals, _from_right, dual),
            ("reader", site.readers, _from_left, inverse),
            ("gain", gains, _from_right, forward),
        ):
            for path in paths:
                leaf = _take(leaves, path, site, role)
                wide = fold(leaf.astype(compute_dtype(leaf)), matrix, site)
                leaves[path] = wide.astype(leaf.dtype)
    return rebuild(leaves)


def leaves_by_path(tree: Any) -> tuple[dict[str, Array], Callable[[dict[str, Array]], Any]]:
    """The leaves by their path, and the function that makes the tree of them again."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.asarray(leaf)
        for path, leaf in paths
    }
    return leaves, lambda leaves: jax.tree.unflatten(structure, list(leaves.values()))


def _take(leaves: dict[str, Array], path: str, site: TransformSite, role: str) -> Array:
    """The leaf at the path, its shape tested against its role at the site."""
    if path not in leaves:
        raise ValueError(f"params must have the {role} {path!r}, got {sorted(leaves)}")
    shape = leaves[path].shape
    count = 1 if site.heads is None else 2
    given = shape[:count] if role in ("reader", "gain") else shape[-count:]
    fits = len(given) == count and given[-1] == site.features
    if site.heads is not None and fits:
        fits = given[0] > 0 and given[0] % site.heads == 0
    if not fits or (role == "gain" and len(shape) != 1):
        heads = "" if site.heads is None else f"a multiple of {site.heads} heads and "
        raise ValueError(f"{role} {path!r} must have {heads}{site.features} features, got {shape}")
    return leaves[path]


def _matrices(kernel: Array, site: TransformSite) -> Array:
    """A reader as `[features, out]`, or `[heads, features, out]` with the heads of a group
    beside each other in `out`."""
    if site.heads is None:
        return kernel.reshape(site.features, -1)
    grouped = kernel.reshape(site.heads, -1, site.features, math.prod(kernel.shape[2:]))
    return grouped.swapaxes(1, 2).reshape(site.heads, site.features, -1)


def _matrices_of(
    transform: EquivalentTransform, site: TransformSite, name: str
) -> tuple[Array, Array, Array]:
    """T, T⁻¹ and T⁻ᵀ, `[features, features]` each or one for each head."""
    leading = () if site.heads is None else (site.heads,)
    square = (*leading, site.features, site.features)
    rotation, log_scale = transform
    if rotation is None:
        rotation = jnp.broadcast_to(jnp.eye(site.features), square)
    check_shape(square, **{f"transforms[{name!r}].rotation": rotation})
    if log_scale is None:
        return rotation, rotation.mT, rotation
    check_shape(
        (*leading, site.features // site.tied), **{f"transforms[{name!r}].log_scale": log_scale}
    )
    log_scale = jnp.tile(log_scale, (*[1] * len(leading), site.tied))
    scale = jnp.exp(log_scale)[..., None, :]
    dual = rotation / scale
    return rotation * scale, dual.mT, dual


def _from_right(w: Array, matrix: Array, site: TransformSite) -> Array:
    """The last axis of w times the matrix, per head where the site has them."""
    if site.heads is None:
        return jnp.matmul(w, matrix, precision="highest")
    matrix = jnp.repeat(matrix, w.shape[-2] // site.heads, axis=0)
    return jnp.einsum("...hi,hij->...hj", w, matrix, precision="highest")


def _from_left(w: Array, matrix: Array, site: TransformSite) -> Array:
    """The matrix times the first axis of w (the second, per head, where the site has heads)."""
    if site.heads is None:
        return jnp.einsum("ij,j...->i...", matrix, w, precision="highest")
    matrix = jnp.repeat(matrix, w.shape[0] // site.heads, axis=0)
    return jnp.einsum("hij,hj...->hi...", matrix, w, precision="highest")
