"""Widths of the layers of a network, by the frontier of size and sensitivity."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape


class ParetoAllocation(NamedTuple):
    """The frontier of `pareto_bit_allocation`, and the point on it that was taken.

    Attributes:
      bits: `[layers]`, the width of each layer.
      size: Σ_i P_i k_i of these widths.
      sensitivity: Σ_i Ω_i of them.
      frontier_bits: `[points, layers]`, the widths at every point of the frontier.
      frontier_sizes: `[points]`, rising.
      frontier_sensitivities: `[points]`, falling.

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020, arXiv:2001.00281.
    """

    bits: np.ndarray
    size: float
    sensitivity: float
    frontier_bits: np.ndarray
    frontier_sizes: np.ndarray
    frontier_sensitivities: np.ndarray


def pareto_bit_allocation(
    sensitivity: ArrayLike, sizes: ArrayLike, choices: ArrayLike, budget: float
) -> ParetoAllocation:
    r"""The width of each layer that loses least within a budget, and all other bargains.

        min_k Σ_i Ω_i(k_i)   such that   Σ_i P_i k_i ≤ budget

    The sensitivities of several layers are taken for their sum. So what is best for the first i
    layers is on the frontier of what was best for i - 1: layer by layer, every pair of size and
    sensitivity is combined with every choice, and those are dropped than which another one is no
    larger and no worse. That is exact.

    Args:
      sensitivity: Ω, `[layers, choices]`, finite, of `quantization_sensitivity` for one.
      sizes: P, `[layers]`, at least 0: the numbers of weights.
      choices: k, `[choices]`, widths in bits, above 0. The paper's: 2, 4 and 8.
      budget: the largest total size, in bits.

    Returns:
      A `ParetoAllocation` of NumPy arrays, on the host; `bits` is its last point within the budget.

    Raises:
      ValueError: shapes that do not match, no layers, NaN or infinite entries, numbers out of
        range, or a budget that no choice meets (the message has the least possible).

    The frontier is there for any budget; `allocate_bits_integer_program` solves for a single one,
    with costs that need not be sizes.

    Cost: a sort of points · choices for each layer, on the host; the points grow with the layers,
    to thousands for fifty.

    Example:
      >>> sensitivity = [[0.5, 0.1, 0.0], [0.1, 0.05, 0.0]]
      >>> best = pareto_bit_allocation(sensitivity, [100, 100], [2, 4, 8], budget=1000)
      >>> print(best.bits, best.frontier_sizes, best.frontier_sensitivities.round(2))
      [8 2] [ 400.  600.  800. 1000. 1200. 1600.] [0.6  0.2  0.15 0.1  0.05 0.  ]

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization
    Framework", 2020, arXiv:2001.00281.
    """
    if np.ndim(sensitivity) != 2 or 0 in np.shape(sensitivity):
        raise ValueError(
            "sensitivity must have shape [layers, choices], none of them 0, "
            f"got {np.shape(sensitivity)}"
        )
    layers, count = np.shape(sensitivity)
    check_shape((layers,), sizes=sizes)
    check_shape((count,), choices=choices)
    check_interval(-np.inf, np.inf, sensitivity=sensitivity, budget=budget)
    check_interval(0, np.inf, sizes=sizes)
    check_interval(0, np.inf, closed="neither", choices=choices)
    widths = np.asarray(choices)
    losses = np.asarray(sensitivity, np.float64)
    costs = np.asarray(sizes, np.float64)[:, None] * widths.astype(np.float64)

    size, loss = np.zeros(1), np.zeros(1)
    bits = np.empty((1, 0), widths.dtype)
    for layer in range(layers):
        sums = np.add.outer(size, costs[layer]).ravel()
        totals = np.add.outer(loss, losses[layer]).ravel()
        order = np.lexsort((totals, sums))
        least_before = np.minimum.accumulate(np.append(np.inf, totals[order][:-1]))
        kept = order[totals[order] < least_before]
        size, loss = sums[kept], totals[kept]
        point, choice = np.divmod(kept, count)
        bits = np.concatenate([bits[point], widths[choice][:, None]], axis=1)

    inside = np.searchsorted(size, float(budget), side="right") - 1
    if inside < 0:
        raise ValueError(f"budget must be at least {size[0]:g}, got {budget:g}")
    return ParetoAllocation(
        bits[inside], float(size[inside]), float(loss[inside]), bits, size, loss
    )
