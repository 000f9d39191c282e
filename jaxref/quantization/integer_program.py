"""Widths of the layers of a network, by an integer programme."""

import numpy as np
import scipy.optimize
import scipy.sparse
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape

_SMALLEST_INCREASE = 1e-6  # of the loss: less is noise of its measurement


def allocate_bits_integer_program(
    loss_increase: ArrayLike,
    cost: ArrayLike,
    budget: float | None = None,
    *,
    max_loss_increase: float | None = None,
) -> np.ndarray:
    r"""Which of its settings each layer takes, exactly: least loss within a budget, or the reverse.

    With I binary, d the measured increase of the loss when layer l alone has setting k, and P its
    cost,

        min_I Σ_lk I_lk d_lk   such that  Σ_k I_lk = 1 for every l,  Σ_lk I_lk P_lk ≤ budget
        min_I Σ_lk I_lk P_lk   such that  Σ_k I_lk = 1 for every l,  Σ_lk I_lk d_lk ≤ limit

    which takes the increases of several layers for their sum.

    Args:
      loss_increase: d, `[layers, settings]`, finite. What is below 10⁻⁶ counts as that, as a
        network does not get better by fewer bits.
      cost: P, `[layers, settings]`, at least 0: parameters times bits, say, or multiplications
        times the bits of weights and of activations. Settings that a layer does not have repeat
        another one's numbers.
      budget: the largest total cost. Give either this
      max_loss_increase: or this, the largest total of the increases.

    Returns:
      int64 `[layers]`, the index of each layer's setting: a NumPy array from SciPy's mixed-integer
      solver, on the host.

    Raises:
      ValueError: shapes that do not match, NaN or infinite entries, a negative cost, both or none
        of the limits, or a limit that no choice meets (the message has the least possible).

    Use it when the loss of each layer and setting has been measured. `importance_mixed_precision`
    needs one gradient in place of that; `pareto_bit_allocation` gives the answers for all budgets
    at once.

    Cost: layers · settings measurements of the loss before; then seconds on the host for hundreds
    of layers, exponential at worst.

    Example:
      >>> increase = np.array([[0.5, 0.1, 0.0], [0.1, 0.05, 0.0]])  # of 2, 4 and 8 bits
      >>> bits = np.array([[2, 4, 8], [2, 4, 8]]) * 100
      >>> print(allocate_bits_integer_program(increase, bits, budget=1000))
      [2 0]

    Reference: Hubara, Nahshan, Hanani, Banner, Soudry, "Improving Post Training Neural
    Quantization: Layer-wise Calibration and Integer Programming", 2020, arXiv:2006.10518.
    """
    if np.ndim(loss_increase) != 2 or 0 in np.shape(loss_increase):
        raise ValueError(
            "loss_increase must have shape [layers, settings], none of them 0, "
            f"got {np.shape(loss_increase)}"
        )
    check_interval(-np.inf, np.inf, loss_increase=loss_increase)
    check_interval(0, np.inf, cost=cost)
    check_shape(np.shape(loss_increase), cost=cost)
    if (budget is None) == (max_loss_increase is None):
        raise ValueError(
            "one of budget and max_loss_increase must be given, "
            f"got {budget} and {max_loss_increase}"
        )
    increase = np.maximum(np.asarray(loss_increase, np.float64), _SMALLEST_INCREASE)
    price = np.asarray(cost, np.float64)
    if budget is not None:
        check_interval(-np.inf, np.inf, budget=budget)
        return _solve("budget", increase, price, float(budget))
    check_interval(-np.inf, np.inf, max_loss_increase=max_loss_increase)
    return _solve("max_loss_increase", price, increase, float(max_loss_increase))  # type: ignore[arg-type]


def _solve(name: str, objective: np.ndarray, amount: np.ndarray, limit: float) -> np.ndarray:
    """The least objective with an amount of at most the limit."""
    layers, settings = amount.shape
    least = amount.min(axis=1)
    slack = 1e-12 * (abs(limit) + least.sum())  # a sum in another order
    room = limit - least.sum()
    if room < -slack:
        raise ValueError(f"{name} must be at least {least.sum():g}, got {limit:g}")
    above = amount - least[:, None]
    # In units that make the solver's tolerance, 1e-6, small against any difference.
    unit = max(above.max(), np.finfo(float).tiny) / 1e4
    one_each = scipy.sparse.kron(scipy.sparse.eye_array(layers), np.ones((1, settings)))
    constraints = [
        scipy.optimize.LinearConstraint(one_each, 1, 1),
        scipy.optimize.LinearConstraint(above.reshape(1, -1) / unit, ub=max(room, 0) / unit),
    ]
    while True:
        result = scipy.optimize.milp(
            objective.ravel() / max(objective.max(), np.finfo(float).tiny),
            integrality=np.ones(objective.size),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        choice = result.x.reshape(layers, settings).argmax(axis=1)
        if above[np.arange(layers), choice].sum() <= room + slack:
            return choice
        # It meets the limit within the tolerance only: all of its settings together are ruled out.
        taken = np.eye(settings)[choice].reshape(1, -1)
        constraints.append(scipy.optimize.LinearConstraint(taken, ub=layers - 1))
