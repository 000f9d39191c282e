"""The entropy of attention along training, whose collapse precedes divergence."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.figures import new_axes


def plot_attention_entropy(
    curves: Mapping[str, ArrayLike],
    num_keys: int,
    *,
    steps: ArrayLike | None = None,
    ax: Any = None,
) -> Any:
    """Draws the entropy of attention over the steps of training, one line a run.

    A dashed line is the limit log(keys), the entropy of attention that is uniform; 0 is that of
    attention to a single key.

    Args:
      curves: by the name of the run, its mean entropies in nats, `[steps]`, or `[steps, layers]`,
        of which the lowest layer is drawn as a line and the range of the others as a band.
      num_keys: keys that a query may see, at least 1.
      steps: the steps at which all runs were measured, `[steps]`. Default: counted from 0.
      ax: matplotlib axes. Default: those of a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: no curves, one without measurements or of more than two axes, `num_keys` below 1,
        or `steps` of another length than a curve.

    Use it on runs of which some diverge: entropy falls towards 0 before the loss rises.

    Cost: one line for each run, on the host; the entropies come from one forward pass a step.

    Example:
      >>> ax = plot_attention_entropy({"plain": [2.0, 1.0, 0.1]}, 8)
      >>> ax.get_ylabel()
      'attention entropy (nats)'

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """
    check_interval(1, np.inf, num_keys=num_keys)
    if not curves:
        raise ValueError("curves must hold at least one run")
    lines = {name: np.asarray(values, float) for name, values in curves.items()}
    x = None if steps is None else np.asarray(steps)
    for name, values in lines.items():
        if values.ndim not in (1, 2) or not values.size:
            raise ValueError(
                f"curves[{name!r}] must have shape [steps] or [steps, layers], got {values.shape}"
            )
        if x is not None:
            check_shape((len(values),), steps=x)
    ax = new_axes() if ax is None else ax
    for name, values in lines.items():
        layers = values.reshape(len(values), -1)
        low, high = layers.min(axis=1), layers.max(axis=1)
        at = np.arange(len(values)) if x is None else x
        (line,) = ax.plot(at, low, label=name)
        if layers.shape[1] > 1:
            ax.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.axhline(np.log(num_keys), color="black", linestyle="--", label=f"uniform, log {num_keys}")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
    ax.set_ylabel("attention entropy (nats)")
    ax.legend(frameon=False)
    return ax
