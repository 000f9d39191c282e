"""Labels of two kinds: what is positive in a set of scores, and what negative."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_shape


def split_by_label(
    scores: ArrayLike, where: ArrayLike | None, **labels: ArrayLike
) -> tuple[Array, Array]:
    """Which entries are positive, and which negative: two masks of the shape of the scores.

    Args:
      scores: `[...]` floating point.
      where: boolean, broadcastable to the scores; excluded entries are neither.
      **labels: booleans or the numbers 0 and 1, of the shape of the scores, by the name of the
        argument. What is above 0 is positive where the values are traced; else others are refused.

    >>> split_by_label(jnp.zeros(3), None, labels=jnp.array([1, 0, 1]))[0]
    Array([ True, False,  True], dtype=bool)
    """
    check_floating(scores=scores)
    shape = jnp.shape(scores)
    check_shape(shape, **labels)
    check_broadcastable(shape, where=where)
    ((name, values),) = labels.items()
    if not isinstance(values, jax.core.Tracer) and not isinstance(where, jax.core.Tracer):
        admitted = np.asarray(values)
        if where is not None:
            admitted = admitted[np.broadcast_to(np.asarray(where), shape)]
        if not np.all((admitted == 0) | (admitted == 1)):
            raise ValueError(f"{name} must be 0 or 1, got {np.unique(admitted)[:8]}")
    positive = jnp.asarray(values) > 0
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    return positive & exists, ~positive & exists
