"""Losses that disperse representations, with no positive pairs: for generative models."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName, sum_over_shards
from jaxref.core.vectors import squared_distances, unit_vectors
from jaxref.parallel.ring import Block, reduce_pairs

_VARIANTS = ("info_nce_l2", "info_nce_cosine", "hinge", "covariance")


def dispersive_loss(
    features: ArrayLike,
    *,
    variant: str = "info_nce_l2",
    temperature: float = 0.5,
    margin: float = 1.0,
    normalize_by_dim: bool = True,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> Array:
    r"""How little the examples of a batch differ in what a network makes of them (a loss of the
    set).

    With z_i the features of an example, all axes in one, F numbers, and D_ij = |z_i - z_j|² / F,

        info_nce_l2:      log mean_ij exp(-D_ij / τ)
        info_nce_cosine:  log mean_ij exp(cos(z_i, z_j) / τ)
        hinge:            mean_ij max(0, m - D_ij)²
        covariance:       Σ_{k ≠ l} C_kl²,   C = mean_i (u_i - ū)(u_i - ū)ᵀ,   u_i = z_i / |z_i|

    Means are over all pairs, also of an example with itself. These are contrastive losses without
    what brings views of an example together, for which the loss of the generative model stands in;
    so they need one view, no projection and no larger batch.

    Args:
      features: `[batch, ...]` floating point, the hidden states of one block: a quarter into the
        network, in the paper.
      variant: one of the above. Default "info_nce_l2", the paper's choice.
      temperature: τ above 0, for InfoNCE. Default 0.5.
      margin: m above 0, for the hinge. Default 1.
      normalize_by_dim: whether D has the mean over features, as in the authors' code, or the sum,
        as in the paper's formula. Default: the mean.
      where: boolean `[batch]`: the examples that exist. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread: the loss is
        then that of all pairs. Without it, every device disperses its own part, as in the paper
        (16 examples on each); average that over devices.
      ring: with `axis_name`, whether examples go round a ring, which takes memory for one block of
        pairs `[batch / D, batch / D]` of D shards; else they are gathered. For the covariance too,
        which is computed from pairs of examples and never has F² numbers.

    Returns:
      A scalar in the type of `features`: InfoNCE with distances between -log batch, all far apart,
      and 0, all in one place. 0 without any example.

    Raises:
      ValueError: an unknown `variant`, a `temperature` or `margin` that is not above 0, or shapes
        that do not match.
      TypeError: features that are not floating point.

    Use it in `loss = jnp.mean(diffusion_losses) + 0.5 * dispersive_loss(hidden)`; 0.5 is the
    paper's weight. `nt_xent_loss` is for features that are themselves the aim, from two views.

    Cost: O(N² F) time for N examples and N² numbers; on D shards N² / D of them each, N² / D² at a
    time with `ring`. No forward pass beside the model's own.

    Example:
      >>> z, loss = jnp.array([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]]), jax.jit(dispersive_loss)
      >>> print(loss(z).round(3), loss(jnp.ones((3, 2))))
      -1.012 0.0

    Reference: Wang, He, "Diffuse and Disperse: Image Generation with Representation
    Regularization", 2025, arXiv:2506.09027.
    """
    check_floating(features=features)
    check_interval(0, jnp.inf, closed="right", temperature=temperature, margin=margin)
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {sorted(_VARIANTS)}, got {variant!r}")
    z = jnp.asarray(features)
    if z.ndim == 0:
        raise ValueError("features must have shape [batch, ...], got a scalar")
    z = z.astype(compute_dtype(z)).reshape(len(z), math.prod(z.shape[1:]))
    exists = jnp.ones(len(z), bool) if where is None else jnp.asarray(where, bool)
    check_shape((len(z),), where=exists)
    z = jnp.where(exists[:, None], z, 0.0)
    number = sum_over_shards(jnp.sum(exists, dtype=z.dtype), axis_name)
    at_least_one = jnp.maximum(number, 1)
    if variant in ("info_nce_cosine", "covariance"):
        z = unit_vectors(z)
    if variant != "info_nce_cosine":  # from the mean, whose own size would cost digits
        mean = sum_over_shards(jnp.sum(z, axis=0), axis_name) / at_least_one
        z = jnp.where(exists[:, None], z - mean, 0.0)

    by_dim = max(z.shape[1], 1) if normalize_by_dim else 1
    blocks: dict[str, tuple[Block, Literal["sum", "logsumexp"], float]] = {
        "info_nce_l2": (_log_total_of_distances, "logsumexp", temperature * by_dim),
        "info_nce_cosine": (_log_total_of_cosines, "logsumexp", temperature),
        "hinge": (_squared_hinges, "sum", by_dim),
        "covariance": (_squared_products, "sum", 1),
    }
    block, combine, divisor = blocks[variant]
    constants = jnp.asarray(1 / divisor, z.dtype), jnp.asarray(margin, z.dtype)
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(z)
    examples = _Examples(z, exists, start + jnp.arange(len(z)))
    rows = reduce_pairs(
        block, (examples, constants), examples, combine=combine, axis_name=axis_name, ring=ring
    )
    if combine == "logsumexp":
        loss = masked_logsumexp(rows, axis=None, where=exists, axis_name=axis_name) - 2 * jnp.log(
            at_least_one
        )
    else:
        total = sum_over_shards(jnp.sum(rows, where=exists), axis_name)
        if variant == "covariance":  # without the diagonal
            variances = sum_over_shards(jnp.sum(jnp.square(z), axis=0), axis_name)
            total = jnp.maximum(total - jnp.sum(jnp.square(variances)), 0.0)
        loss = total / jnp.square(at_least_one)
    return jnp.where(number > 0, loss, 0.0).astype(jnp.result_type(features))


class _Examples(NamedTuple):
    features: Array
    exists: Array
    place: Array


def _log_total_of_distances(rows: Any, columns: _Examples, *_: Any) -> Array:
    z, (scale, _margin) = rows
    return _masked_row_total(-scale * _distances(z, columns), columns.exists)


def _log_total_of_cosines(rows: Any, columns: _Examples, *_: Any) -> Array:
    z, (scale, _margin) = rows
    return _masked_row_total(scale * (z.features @ columns.features.T), columns.exists)


def _masked_row_total(exponents: Array, exists: Array) -> Array:
    total = masked_logsumexp(exponents, where=exists)
    return jnp.where(exists.any(), total, -jnp.inf)


def _squared_hinges(rows: Any, columns: _Examples, *_: Any) -> Array:
    z, (scale, margin) = rows
    hinges = jnp.square(jax.nn.relu(margin - scale * _distances(z, columns)))
    return jnp.sum(hinges, axis=1, where=columns.exists)


def _squared_products(rows: Any, columns: _Examples, *_: Any) -> Array:
    """Whose sum over pairs is that of the squares of all entries of Σ z zᵀ."""
    z, _constants = rows
    products = jnp.matmul(z.features, columns.features.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(products), axis=1, where=columns.exists)


def _distances(rows: _Examples, columns: _Examples) -> Array:
    """Squared, and exactly 0 from an example to itself."""
    distances = squared_distances(rows.features, columns.features)
    return jnp.where(rows.place[:, None] == columns.place, 0.0, distances)
