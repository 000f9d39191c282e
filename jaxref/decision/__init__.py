"""Decisions: solvers, search without gradients, and whom to contact."""

from jaxref.decision.black_box import CrossEntropyResult, Gaussian, cross_entropy_search
from jaxref.decision.predict_and_optimize import (
    ExpectedMaximumProfit,
    expected_maximum_profit,
    optimal_targeting,
    profit_regret_surrogate,
    retention_profit,
    spo_plus_loss,
    targeting_regret,
)
from jaxref.decision.solvers import SolveInfo, levenberg_marquardt

__all__ = [
    "levenberg_marquardt",
    "SolveInfo",
    "cross_entropy_search",
    "CrossEntropyResult",
    "Gaussian",
    "retention_profit",
    "optimal_targeting",
    "targeting_regret",
    "profit_regret_surrogate",
    "spo_plus_loss",
    "expected_maximum_profit",
    "ExpectedMaximumProfit",
]
