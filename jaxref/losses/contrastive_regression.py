"""Contrastive regularisation of regression: features in the order of their labels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_logsumexp
from jaxref.core.shards import AxisName
from jaxref.core.vectors import safe_sqrt, unit_vectors
from jaxref.parallel.ring import reduce_pairs


def conr_loss(
    features: ArrayLike,
    targets: ArrayLike,
    predictions: ArrayLike,
    *,
    similarity_window: float = 1.0,
    temperature: float = 0.07,
    push_scale: float = 0.01,
    sample_weights: ArrayLike | None = None,
    pushing: str = "exponential",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    ring: bool = False,
) -> Array:
    r"""Pushes apart what a regression takes to be alike and is not (ConR; in the batch).

    With unit features v, d_ij = |y_i - y_j| of the labels, d̂_ij of the predictions, and the window
    w, an example i has

        positives P_i = {j ≠ i : d_ij ≤ w},   negatives N_i = {j : d_ij > w, d̂_ij ≤ w}

    of which negatives are those that the model confuses with it, and

        L_i = η_i mean_{p ∈ P_i} -log( exp(v_i · v_p / τ) / D_i )
        D_i = Σ_{q ∈ P_i} exp(v_i · v_q / τ) + Σ_{n ∈ N_i} S_in exp(v_i · v_n / τ)
        S_in = η_i exp(e d_in)  (exponential)  or  η_i e d_in  (linear)

    so that negatives are pushed the harder the farther their labels are, and rare examples push
    the most. L_i is 0 where P_i or N_i is empty: where nothing is confused there is no loss.

    Args:
      features: `[batch, features]` floating point, of two augmented views of each example, say.
      targets: y, `[batch]` or `[batch, k]` real numbers, whose distance is Euclidean. For dense
        maps, their means.
      predictions: ŷ, of the same shape, floating point. They choose negatives and have no gradient.
      similarity_window: w at least 0, in the unit of the labels. Default 1, a year of age; 0.2 for
        metres of depth.
      temperature: τ above 0. Default 0.07.
      push_scale: e at least 0, per unit of the labels. Default 0.01; 0.2 for "linear".
      sample_weights: η, `[batch]` at least 0, without gradient: the inverse density of the labels.
        Default: 1.
      pushing: "exponential", for ages, or "linear", for depths.
      where: boolean `[batch]`: the examples that exist, as anchors and as others. Default: all.
      axis_name: name or names of the mapped axes over whose shards the batch is spread.
      ring: with `axis_name`, whether examples go round a ring, which takes memory for one block
        of pairs `[batch / D, batch / D]` of D shards; else they are gathered, for
        `[batch / D, batch]`.

    Returns:
      `[batch]` losses in the type of `features`, of this shard's examples, to be averaged and added
      to the loss of the regression (4 times, in the paper, for ages). Over equal shards, the mean
      of all is that of the whole batch. A zero vector has similarity 0 with any.

    Raises:
      ValueError: shapes that do not match, a hyperparameter out of its range, or a `pushing` that
        is neither.
      TypeError: features or predictions that are not floating point.

    Use it beside any loss for imbalanced regression, such as one weighted by `label_density`: it
    keeps the features of rare labels from falling in with those of frequent ones. The authors' code
    also adds 1 to D_i for each example that is no positive.

    Cost: the products of all pairs twice, O(N² F) time for N examples of F features and O(N²)
    memory; O(N² / D²) at a time with `ring` on D shards.

    Example:
      >>> features = jnp.array([[1.0, 0.0], [1.0, 0.2], [0.8, 0.6]])
      >>> targets, predictions = jnp.array([20.0, 21.0, 60.0]), jnp.array([20.0, 22.0, 21.0])
      >>> loss = jax.jit(conr_loss)(features, targets, predictions, temperature=0.5)
      >>> print(loss.round(3))
      [0.713 0.816 0.   ]

    Reference: Keramati, Meng, Evans, "ConR: Contrastive Regularizer for Deep Imbalanced
    Regression", 2023, arXiv:2309.06651.
    """
    check_floating(features=features, predictions=predictions)
    check_interval(0, jnp.inf, similarity_window=similarity_window, push_scale=push_scale)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    if pushing not in ("exponential", "linear"):
        raise ValueError(f"pushing must be 'exponential' or 'linear', got {pushing!r}")
    v = jnp.asarray(features)
    if v.ndim != 2:
        raise ValueError(f"features must have shape [batch, features], got {v.shape}")
    batch = len(v)
    shape = jnp.shape(targets)
    if shape[:1] != (batch,) or len(shape) > 2:
        raise ValueError(f"targets must have shape ({batch},) or ({batch}, k), got {shape}")
    check_shape(shape, predictions=predictions)
    exists = jnp.ones(batch, bool) if where is None else jnp.asarray(where, bool)
    eta = jnp.ones(batch) if sample_weights is None else jnp.asarray(sample_weights)
    check_shape((batch,), where=exists, sample_weights=eta)
    check_interval(0, jnp.inf, sample_weights=eta)

    dtype = compute_dtype(v)
    v = unit_vectors(jnp.where(exists[:, None], v.astype(dtype), 0.0))
    y, y_hat, eta = jax.lax.stop_gradient(
        (_as_rows(targets), _as_rows(predictions), eta.astype(dtype))
    )
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch
    examples = _Examples(v, y, y_hat, exists, start + jnp.arange(batch))
    block = _Block(similarity_window, temperature, push_scale, pushing == "exponential")

    def over_pairs(function: Any, combine: Any) -> Array:
        return reduce_pairs(
            function, (examples, eta), examples, combine=combine, axis_name=axis_name, ring=ring
        )

    log_total = over_pairs(block.log_total, "logsumexp")
    attraction, positives, negatives = jnp.moveaxis(over_pairs(block.sums, "sum"), -1, 0)
    is_active = (positives > 0) & (negatives > 0)
    losses = jnp.where(is_active, log_total, 0.0) - attraction / jnp.maximum(positives, 1)
    return jnp.where(is_active, eta * losses, 0.0).astype(jnp.result_type(features))


class _Examples(NamedTuple):
    vectors: Array
    targets: Array
    predictions: Array
    exists: Array
    place: Array


class _Block(NamedTuple):
    """What a block of pairs of examples adds to the sums of its rows."""

    window: float
    temperature: float
    push_scale: float
    is_exponential: bool

    def log_total(self, rows: Any, columns: _Examples, *_: Any) -> Array:
        """log D, -inf where there is nothing."""
        anchors, eta = rows
        logits, distance, positive, negative = self._pairs(anchors, columns)
        if self.is_exponential:
            log_push, pushes = self.push_scale * distance, jnp.array(True)
        else:
            pushes = distance * self.push_scale > 0
            log_push = jnp.log(jnp.where(pushes, self.push_scale * distance, 1.0))
        pushes &= eta[:, None] > 0
        log_push += jnp.log(jnp.where(eta > 0, eta, 1.0))[:, None]
        counts = positive | (negative & pushes)
        total = masked_logsumexp(logits + jnp.where(positive, 0.0, log_push), where=counts)
        return jnp.where(counts.any(axis=1), total, -jnp.inf)

    def sums(self, rows: Any, columns: _Examples, *_: Any) -> Array:
        """`[rows, 3]`: of the positives' logits, and the numbers of positives and negatives."""
        logits, _distance, positive, negative = self._pairs(rows[0], columns)
        each = jnp.where(positive, logits, 0.0), positive, negative
        return jnp.stack([jnp.sum(x, axis=1, dtype=logits.dtype) for x in each], axis=-1)

    def _pairs(self, rows: _Examples, columns: _Examples) -> tuple[Array, Array, Array, Array]:
        """Logits, distances of labels, and which pairs are positive and which negative."""
        logits = rows.vectors @ columns.vectors.T / self.temperature
        distance = _distances(rows.targets, columns.targets)
        alike = distance <= self.window
        confused = _distances(rows.predictions, columns.predictions) <= self.window
        pair = rows.exists[:, None] & columns.exists
        other = rows.place[:, None] != columns.place
        return logits, distance, pair & other & alike, pair & ~alike & confused


def _as_rows(values: ArrayLike) -> Array:
    values = jnp.asarray(values)
    return values.astype(compute_dtype(values)).reshape(len(values), -1)


def _distances(x: Array, y: Array) -> Array:
    """Of all pairs, without cancellation, as a window may end at just these."""
    if x.shape[1] == 1:
        return jnp.abs(x - y[:, 0])
    return safe_sqrt(jnp.sum(jnp.square(x[:, None] - y), axis=-1))
