"""A softmax whose classes are spread over the shards of a mapped axis.

Every shard has the columns of its own classes, shard 0 the first ones. It reduces them to numbers
per row, and only those are exchanged: their maxima, sums and the logit of the label.

    ids, here = local_ids(labels, width, axis_name)
    top = stop_gradient(max_j l_j);  log_sum = log Σ_j exp(l_j - top)
    label_logit = l[ids] where here, else 0
    top, log_sum, label_logit = combine_over_vocabulary(top, log_sum, axis_name, label_logit)
    loss = log_sum + (top - label_logit)
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxref.core.shards import AxisName


def combine_over_vocabulary(
    top: Array, log_sum: Array, axis_name: AxisName | None, *row_sums: Array
) -> tuple[Array, ...]:
    r"""What the rows have over all shards, from what they have in each.

        top = max_s top_s,   log_sum = log Σ_s exp(log_sum_s + top_s - top),   r = Σ_s r_s

    so that top + log_sum is log Z of the whole row. The largest logit counts as a constant, here
    and where log_sum_s is computed (`jax.lax.stop_gradient`): then the gradient of log_sum alone is
    that of log Z.

    Args:
      top: `[...]` the largest logit of the shard's own classes; -inf where it has none of the row.
      log_sum: `[...]` log Σ exp(l - top) over them; any finite number where there is none.
      axis_name: name or names of the mesh or vmap axes over whose shards the classes are spread;
        None for no exchange.
      *row_sums: r `[...]`, sums over the shard's own classes: the label's logit, 0 in shards that
        have not its class; the sum of all logits, for smoothed labels; counts.

    Returns:
      (top, log_sum, *row_sums) of the whole rows, the same on every shard. A row without any class
      has top -inf and log_sum 0.

    Collectives are of the size of `top`, one maximum and one sum. Gradients taken outside of
    `jax.shard_map` equal the unsharded ones.
    """
    top = jax.lax.stop_gradient(top)
    if axis_name is None:
        return top, log_sum, *row_sums
    whole_top = jax.lax.pmax(top, axis_name)
    there = top > -jnp.inf
    # NaN stays: it is not below -inf, and shows in the sum
    shift = jnp.where(there | jnp.isnan(top), top - whole_top, -jnp.inf)
    total, *row_sums_of_all = jax.lax.psum((jnp.exp(log_sum + shift), *row_sums), axis_name)
    log_total = jnp.where(total == 0, 0, jnp.log(jnp.where(total == 0, 1, total)))
    return whole_top, log_total, *row_sums_of_all


def local_ids(labels: Array, width: int, axis_name: AxisName | None) -> tuple[Array, Array]:
    """The labels as columns of this shard, and whether it has them.

    Args:
      labels: integer ids `[...]` among the classes of all shards; any others are in none.
      width: classes of a shard, the same in each.
      axis_name: name or names of the axes over whose shards the classes are spread; None for one.

    Returns:
      Integer ids `[...]` within [0, width), 0 where the class is not here, and booleans `[...]`.

    >>> local_ids(jnp.array([1, 5, -1]), 4, None)
    (Array([1, 0, 0], dtype=int32), Array([ True, False, False], dtype=bool))
    """
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # int8 has no 1000
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * width
    here = (labels >= start) & (labels < start + width)
    return jnp.where(here, labels - start, 0), here


def whole_width(width: int, axis_name: AxisName | None) -> int:
    """The number of classes of all shards, each of which has `width`."""
    return width if axis_name is None else width * jax.lax.axis_size(axis_name)
